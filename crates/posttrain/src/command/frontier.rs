//! `posttrain frontier`: the sums of task vectors that no other beats, measured by a recipe's rewards.

use envs::{Reward, RewardConfig};
use eval::metrics::mean;
use model::decoder::TaskVectors;
use rollout::SamplingOptions;
use train::frontier::{Frontier, Probe, ProbeOptions, Region, SearchOptions};

use super::generate::BATCH;
use crate::cli;
use crate::config::Config;
use crate::config::load::Layers;
use crate::corpus::{self, Language};
use crate::failure::Failure;
use crate::frontier_file::{FrontierFile, Part};
use crate::judges;
use crate::opened::{Opened, Opener};
use crate::terminal::print;
use crate::voice::check_language;

/// Runs the command.
pub fn run(arguments: &cli::Frontier, opener: Opener) -> Result<(), Failure> {
    let layers = Layers { files: arguments.recipe.recipes.clone(), assignments: arguments.recipe.set.clone() };
    let config = Config::load(&layers)?;
    if config.rewards.len() < 2 {
        let count = config.rewards.len();
        let failure = Failure::new(format!(
            "a frontier is one of several objectives: expected two `[[rewards]]` or more, got {count}"
        ));
        return Err(failure.hint("each reward of the recipe is an objective"));
    }
    let (longest, sampling) = config.sampling();
    let probing = ProbeOptions {
        samples: arguments.samples,
        sampling: SamplingOptions { top_log_probs: 0, ..sampling },
        batch_size: BATCH,
    };
    let search = SearchOptions {
        region: Region::Extrapolation,
        low: arguments.low,
        high: arguments.high,
        grid: arguments.grid as usize,
        averages: arguments.averages as usize,
        refinements: arguments.refinements,
        granularity: arguments.granularity.into(),
        halvings: arguments.halvings,
        max_perplexity_ratio: arguments.max_perplexity_ratio,
    };
    search.validate().map_err(|error| Failure::usage(error.to_string()))?;
    probing.validate().map_err(|error| Failure::new(error.to_string()))?;

    let base = opener.open(&config.model.name, config.seed)?;
    let opened: Vec<Opened> =
        arguments.models.iter().map(|name| opener.open(name, config.seed)).collect::<Result<_, _>>()?;
    opened.iter().try_for_each(|model| check_language(&base, model))?;
    let part = |name: &String, opened: &Opened| Part::of(name, opened);
    let parts = arguments.models.iter().zip(&opened).map(|(name, opened)| part(name, opened));
    let (base_part, parts) = (part(&config.model.name, &base)?, parts.collect::<Result<Vec<_>, _>>()?);

    let language = Language {
        tokenizer: &base.tokenizer,
        template: base.template.as_ref(),
        context: base.decoder.config().max_positions,
    };
    let language = language.with_room(&longest, probing.sampling.max_new_tokens)?;
    let prompts = corpus::evenly(corpus::prompts(&config, language, opener.terminal)?, arguments.prompts as usize);
    let mut rewards: Vec<Box<dyn Reward>> = Vec::with_capacity(config.rewards.len());
    for reward in &config.rewards {
        // An objective is a reward as it is, not as training is paid it.
        let plain = RewardConfig { shaping: None, ..reward.clone() };
        rewards.push(plain.build_with(&mut |name, options| judges::load(name, options, &config, opener))?);
    }
    let objectives: Vec<&dyn Reward> = rewards.iter().map(|reward| &**reward).collect();

    let vectors = TaskVectors::new(base.decoder, opened.into_iter().map(|model| model.decoder).collect())?;
    let context = (config.model.precision.into(), config.seed);
    let probe = Probe::new(vectors.base().clone(), &base.tokenizer, &prompts, &objectives, &probing, context)?;
    let mut progress = opener.terminal.progress("searching", "look", 0);
    let frontier = Frontier::find(&vectors, &probe, &search, |looks| progress.update(looks as u64, ""))?;
    progress.clear();
    let text = table(&frontier, vectors.len());
    FrontierFile::new(config.seed, base_part, parts, frontier).write(&arguments.out)?;
    opener.terminal.note(format!("wrote {}", arguments.out.display()));
    print(text)
}

/// One line a policy, by the first objective, with a coefficient for each model. Where blocks have coefficients of their own, their mean is shown.
fn table(frontier: &Frontier, models: usize) -> String {
    let mut policies: Vec<_> = frontier.policies.iter().collect();
    policies.sort_by(|a, b| a.scores.objectives[0].total_cmp(&b.scores.objectives[0]));
    let numbers = |values: &[f64]| values.iter().map(|value| format!("{value:>9.3}")).collect::<String>();
    let before: Vec<f64> = frontier.objectives.iter().map(|objective| objective.mean).collect();
    let names: String = frontier.objectives.iter().map(|objective| format!("{:>9}", objective.name)).collect();
    let width = 9 * models.max(2);
    let line = |what: &str, values: &str, divergence: f64| format!("{what:>width$}{values}{divergence:>9.3}");
    let mut text = format!("{:>width$}{names}       KL\n", "coefficients");
    for policy in policies {
        let (scores, blocks) = (&policy.scores, policy.coefficients.chunks(models));
        let of = |model: usize| mean(&blocks.clone().map(|block| block[model]).collect::<Vec<_>>());
        let means: Vec<f64> = (0..models).map(of).collect();
        text += &line(&numbers(&means), &numbers(&scores.objectives), scores.divergence);
        text += if blocks.len() > 1 { "  by block, mean\n" } else { "\n" };
    }
    text + &line("before training", &numbers(&before), 0.0) + "\n"
}
