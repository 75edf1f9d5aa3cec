//! `posttrain mix weights`: the shares of a mixture with which the worst-off objective is best off.

use serde_json::json;
use train::mixing::{Pool, PoolOptions, Proposal, pool, weights};

use super::generate::BATCH;
use crate::cli::MixWeights;
use crate::config::Config;
use crate::config::load::Layers;
use crate::corpus::{self, Language};
use crate::failure::Failure;
use crate::opened::{Opened, Opener};
use crate::terminal::print;
use crate::voice::check_language;

/// An effective number of responses below this is too few to trust.
const FEW: f64 = 2.0;

/// Runs the command.
pub fn run(arguments: &MixWeights, opener: Opener) -> Result<(), Failure> {
    if arguments.mix.len() < 2 {
        return Err(Failure::usage("a mixture needs two models: expected `--mix` at least twice, got it once"));
    }
    let options = PoolOptions {
        proposal: if arguments.from_models { Proposal::Models } else { Proposal::Reference },
        responses: arguments.responses,
        max_new_tokens: arguments.max_new_tokens,
        batch_size: BATCH,
    };
    options.validate().map_err(|error| Failure::usage(error.to_string()))?;
    let layers = Layers { files: arguments.recipe.recipes.clone(), assignments: arguments.recipe.set.clone() };
    let config = Config::load(&layers)?;
    let open = |name: &String| {
        let mut opened = opener.open_on(config.model.device, name, config.seed)?;
        opened.decoder.prepare(config.model.precision.into());
        Ok::<_, Failure>(opened)
    };
    let reference = open(&config.model.name)?;
    let models: Vec<Opened> = arguments.mix.iter().map(open).collect::<Result<_, _>>()?;
    models.iter().try_for_each(|model| check_language(&reference, model))?;
    let language = Language {
        tokenizer: &reference.tokenizer,
        template: reference.template.as_ref(),
        context: reference.decoder.config().max_positions,
    };
    let language = language.with_room("--max-new-tokens", arguments.max_new_tokens)?;
    let prompts = corpus::evenly(corpus::prompts(&config, language, opener.terminal)?, arguments.prompts as usize);
    let decoders: Vec<&model::Decoder> = models.iter().map(|model| &model.decoder).collect();
    let (pool, _) = pool(&reference.decoder, &decoders, &reference.tokenizer, &prompts, &options, config.seed)?;
    let found = weights(&pool, arguments.rate, arguments.steps, config.seed);
    if arguments.json {
        return print(format!("{}\n", as_json(arguments, &pool, &found)));
    }
    let effective = pool.effective_size(&found);
    if effective < FEW {
        opener.terminal.note(format!(
            "of {} responses to a prompt, {effective:.1} speak for all: more `--responses`, or `--from-models`, make the shares more certain",
            arguments.responses
        ));
    }
    print(table(arguments, &pool, &found))
}

fn table(arguments: &MixWeights, pool: &Pool, found: &[f64]) -> String {
    let width = arguments.mix.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(5);
    let mut text = format!("{:width$}  share  log-ratio\n", "model");
    for ((name, share), ratio) in arguments.mix.iter().zip(found).zip(pool.gradient(found)) {
        text += &format!("{name:width$}  {share:5.3}  {ratio:9.3}\n");
    }
    let mixes: String = arguments.mix.iter().map(|name| format!(" --mix {name}")).collect();
    let shares: Vec<String> = found.iter().map(|share| format!("{share:.3}")).collect();
    text + &format!("\nposttrain generate{mixes} --shares {}\n", shares.join(","))
}

fn as_json(arguments: &MixWeights, pool: &Pool, found: &[f64]) -> serde_json::Value {
    let (ratios, masses) = (pool.gradient(found), pool.log_masses(found.len()));
    let model =
        |k: usize| json!({"model": arguments.mix[k], "share": found[k], "log_ratio": ratios[k], "log_mass": masses[k]});
    json!({
        "models": (0..found.len()).map(model).collect::<Vec<_>>(),
        "value": pool.value(found),
        "effective_responses": pool.effective_size(found),
        "prompts": pool.prompts.len(),
        "responses": arguments.responses,
    })
}
