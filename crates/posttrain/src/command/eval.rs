//! `posttrain eval`: how good is a model, with intervals.

use base::files;
use train::Evaluator;

use crate::cli::Eval;
use crate::config::Config;
use crate::config::load::Layers;
use crate::corpus::{Corpus, Language};
use crate::failure::Failure;
use crate::measure::Measurer;
use crate::opened::Opener;
use crate::terminal::print;

/// Runs the command.
pub fn run(arguments: &Eval, opener: Opener) -> Result<(), Failure> {
    let layers = Layers { files: arguments.recipe.recipes.clone(), assignments: arguments.recipe.set.clone() };
    let mut config = Config::load(&layers)?;
    if let Some(model) = &arguments.model {
        config.model.name.clone_from(model);
    }
    if !config.has_evaluation() {
        let failure =
            Failure::new("the recipe has nothing to measure: expected `[[rewards]]`, and `[[tasks]]` or `data.test`");
        return Err(failure.hint("recipes/quickstart.toml has both"));
    }
    let mut model = opener.open_on(config.model.device, &config.model.name, config.seed)?;
    model.decoder.prepare_for_generation(config.model.precision.into(), arguments.weights.into());
    let language = Language {
        tokenizer: &model.tokenizer,
        template: model.template.as_ref(),
        context: model.decoder.config().max_positions,
    };
    let corpus = Corpus::for_evaluation(&config, language, opener.terminal)?;
    let mut progress = opener.terminal.progress("evaluating", "problem", corpus.test_rows() as u64);
    let mut measurer = Measurer::new(&config, corpus.test, corpus.test_pairs, &model.tokenizer)?;
    let evaluation = measurer
        .evaluate(&model.decoder, &mut |done, _| progress.update(done as u64, ""))
        .map_err(|error| Failure::advised(&*error))?;
    progress.clear();
    if let Some(path) = &arguments.answers {
        let lines: String = evaluation.samples.iter().map(|sample| format!("{sample}\n")).collect();
        files::write(path, lines.as_bytes())?;
    }
    let mut text = format!("model    {}\n", config.model.name);
    for measure in &evaluation.measures {
        let (scale, unit) = if measure.name == "accuracy" { (100.0, " %") } else { (1.0, "") };
        text += &format!(
            "{:8} {:.2}{unit}  (95 % interval {:.2} to {:.2}, {} problems)\n",
            measure.name,
            scale * measure.value,
            scale * measure.low,
            scale * measure.high,
            measure.items
        );
    }
    print(text)
}
