//! `posttrain eval`: how good is a model, with intervals.

use std::path::Path;

use base::files;
use data::Prompt;
use eval::{Answerer, answer_at_test_time};
use serde_json::Value;

use crate::cli::Eval;
use crate::config::Config;
use crate::config::load::Layers;
use crate::corpus::{Corpus, Language};
use crate::failure::Failure;
use crate::opened::{Opened, Opener};
use crate::terminal::print;
use crate::{judges, measure};

/// Runs the command.
pub fn run(arguments: &Eval, opener: Opener) -> Result<(), Failure> {
    let layers = Layers { files: arguments.recipe.recipes.clone(), assignments: arguments.recipe.set.clone() };
    let mut config = Config::load(&layers)?;
    if let Some(strategy) = arguments.test_time {
        config.test_time.get_or_insert_default().strategy = strategy.into();
    }
    if let Some(model) = &arguments.model {
        config.model.name.clone_from(model);
    }
    if !config.has_evaluation() {
        let failure =
            Failure::new("the recipe has nothing to measure: expected `[[rewards]]`, and `[[tasks]]` or `data.test`");
        return Err(failure.hint("recipes/quickstart.toml has both"));
    }
    let (precision, weights) = (config.model.precision.into(), arguments.weights.into());
    let model = opener.open_to_generate(config.model.device, &config.model.name, config.seed, precision, weights)?;
    let language = Language {
        tokenizer: &model.tokenizer,
        template: model.template.as_ref(),
        context: model.decoder.config().max_positions,
    };
    let corpus = Corpus::for_evaluation(&config, language, opener.terminal)?;
    if arguments.test_time.is_some() {
        return test_time(&config, arguments.answers.as_deref(), &model, &corpus.test, opener);
    }
    // Held-out rows of a model that scores are no answers: they come once.
    let samples = if corpus.held.is_some() { 1 } else { u64::from(config.evaluation.samples) };
    let total = corpus.test_rows() as u64 * samples;
    let mut progress = opener.terminal.progress("evaluating", "answer", total);
    let measurer = measure::evaluator(
        &config,
        (corpus.test, corpus.test_pairs, corpus.held),
        (&model.tokenizer, model.template.as_ref()),
        opener,
    )?;
    let mut measurer = measurer.ok_or_else(|| Failure::new("the recipe holds nothing out"))?;
    let evaluation = measurer
        .evaluate(&model.decoder, &mut |done, _| progress.update(done as u64, ""))
        .map_err(|error| Failure::advised(&*error))?;
    progress.clear();
    if let Some(path) = &arguments.answers {
        write_lines(path, &evaluation.samples)?;
    }
    let mut text = format!("model    {}\n", config.model.name);
    for measure in &evaluation.measures {
        let (scale, unit, digits) = measure::scale(&measure.name, 2);
        text += &format!(
            "{:8} {:.digits$}{unit}  (95 % interval {:.digits$} to {:.digits$}, {} problems)\n",
            measure.name,
            scale * measure.value,
            scale * measure.low,
            scale * measure.high,
            measure.items
        );
    }
    print(text)
}

/// Writes one JSON object a line.
pub(super) fn write_lines(path: &Path, values: &[Value]) -> Result<(), Failure> {
    let lines: String = values.iter().map(|value| format!("{value}\n")).collect();
    Ok(files::write(path, lines.as_bytes())?)
}

/// Measures the answers that cost more than one completion.
fn test_time(
    config: &Config,
    answers: Option<&Path>,
    model: &Opened,
    prompts: &[Prompt],
    opener: Opener,
) -> Result<(), Failure> {
    let options = config.test_time.clone().unwrap_or_default();
    let judge = match (&config.judge, options.strategy.needs_judge()) {
        (Some(judge), true) => Some(judges::load("judge", judge, config, opener)?),
        // An environment says itself which of its episodes is best.
        (None, true) if config.environment.is_some() => None,
        (None, true) => {
            let failure = Failure::new(
                "the strategy asks a judge which answer is best, and the recipe has none: expected `[judge]`",
            );
            return Err(failure.hint("name a reward model: `--set judge.models=['runs/reward_model']`"));
        }
        (_, false) => None,
    };
    let reward = judges::judgement(config, opener)?;
    let world = config.world(model.template.as_ref())?;
    let answerer = Answerer { decoder: &model.decoder, tokenizer: &model.tokenizer, world };
    let samples = if options.strategy.takes_samples() { u64::from(options.samples) } else { 1 };
    let mut progress = opener.terminal.progress("answering", "completion", prompts.len() as u64 * samples);
    let found = answer_at_test_time(answerer, prompts, judge.as_deref(), &*reward, &options, |done, _| {
        progress.update(done as u64, "");
    })?;
    progress.clear();
    let evaluation = &found.evaluation;
    if let Some(path) = answers {
        let written = prompts.iter().zip(&evaluation.samples).map(|(prompt, sample)| measure::written(prompt, sample));
        write_lines(path, &written.collect::<Vec<_>>())?;
    }
    let percent = |value: f64| 100.0 * value;
    let mut text = format!(
        "model    {}\naccuracy {:.2} %  (95 % interval {:.2} to {:.2}, {} problems)\ntokens   {:.0} generated for each\n",
        config.model.name,
        percent(evaluation.accuracy),
        percent(evaluation.interval.low),
        percent(evaluation.interval.high),
        prompts.len(),
        found.tokens_per_problem
    );
    for (k, accuracy) in &found.by_samples {
        text += &format!("with {k:3} {:.2} %\n", percent(*accuracy));
    }
    print(text)
}
