//! The model card: where a model comes from, how good it is, and how to make it again.

use std::fmt::Write;

use base::files;

use crate::checkpoint::State;
use crate::evaluation::Evaluation;
use crate::methods;
use crate::run::Run;

/// The text of `README.md`, with the front matter the Hugging Face hub reads. It holds nothing that depends on the clock.
pub(crate) fn text(run: &Run<'_>, stages: &[&str], state: &State) -> String {
    let provenance = &run.provenance;
    let adapter = run.decoder.adapter_config();
    let trained: usize = run.decoder.parameters().iter().map(|info| info.shape.iter().product::<usize>()).sum();
    let before = state.evaluations.first().filter(|evaluation| evaluation.step == 0);
    let after = state.evaluations.last().filter(|evaluation| evaluation.step > 0);

    let mut card = String::new();
    let mut line = |text: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(card, "{text}");
    };
    line("---".into());
    line(format!("base_model: {:?}", provenance.base_model));
    line(format!("library_name: {}", if adapter.is_some() { "peft" } else { "transformers" }));
    let writes = run.decoder.config().has_language_head();
    line(format!("pipeline_tag: {}", if writes { "text-generation" } else { "text-classification" }));
    line("tags:".into());
    line("- posttrain".into());
    stages.iter().for_each(|stage| line(format!("- {stage}")));
    line("---".into());
    line(format!("\n# {}, post-trained with {}\n", provenance.base_model, stages.join(", then ")));
    line(format!("Made by {}.", provenance.program));

    if let Some(after) = after {
        line("\n## Evaluation\n".into());
        line("95 % confidence intervals in brackets.\n".into());
        evaluation_table(before, after).into_iter().for_each(&mut line);
        if let Some(change) = before.and_then(|before| after.compare(before, run.seed)) {
            let changed = match change.shares {
                false => format!("{} solved only after, {} only before", change.gained, change.lost),
                true => format!("{} more often right after, {} before", change.gained, change.lost),
            };
            let test = if change.shares { "sign test's" } else { "McNemar's exact" };
            line(format!(
                "\nProblem by problem: {changed}; difference {:+.3} [{:+.3}, {:+.3}], {test} p = {:.2e}.",
                change.difference, change.interval.low, change.interval.high, change.p_value
            ));
        }
    }

    line("\n## Training\n".into());
    line("| | |\n| --- | --- |".into());
    line(format!("| Base model | {} |", provenance.base_model));
    if let Some(hash) = &state.origin.base_model_sha256 {
        line(format!("| Base model, SHA-256 | `{hash}` |"));
    }
    line(format!("| Method | {} |", stages.join(", then ")));
    for stage in stages {
        if let Some((_, preset)) = methods::find(stage) {
            line(format!("| Paper ({stage}) | {} |", preset.paper));
        }
    }
    match adapter {
        Some(config) => line(format!("| Trained | LoRA of rank {}, {trained} parameters |", config.r)),
        None => line(format!("| Trained | all {trained} parameters |")),
    }
    line(format!("| Precision | {:?} |", run.precision));
    line(format!("| Steps | {} |", state.global_step));
    line(format!("| Tokens | {} |", state.num_tokens));
    line(format!("| Seed | {} |", run.seed));
    line(format!("| Configuration, SHA-256 | `{}` |", files::sha256_of(provenance.config.as_bytes())));
    for data in &provenance.data {
        line(format!("| Data: {}, {} rows, SHA-256 | `{}` |", data.name, data.rows, data.sha256));
    }

    line("\n## Make it again\n".into());
    line(format!("```sh\n{}\n```\n", provenance.command));
    line("with this configuration; the result is the same byte for byte.\n".into());
    line(format!("```toml\n{}\n```", provenance.config.trim_end()));
    card
}

/// One row a measure; with an evaluation before training, its numbers beside those after.
fn evaluation_table(before: Option<&Evaluation>, after: &Evaluation) -> Vec<String> {
    let cell = |evaluation: &Evaluation, name: &str| {
        let measure = evaluation.measures.iter().find(|measure| measure.name == name);
        measure.map_or_else(String::new, |m| format!("{:.3} [{:.3}, {:.3}]", m.value, m.low, m.high))
    };
    let mut rows = match before {
        Some(_) => vec!["| | Before | After | Problems |".into(), "| --- | --- | --- | --- |".into()],
        None => vec!["| | After | Problems |".into(), "| --- | --- | --- |".into()],
    };
    for measure in &after.measures {
        let (name, now) = (&measure.name, cell(after, &measure.name));
        let items = measure.items;
        rows.push(match before {
            Some(before) => format!("| {name} | {} | {now} | {items} |", cell(before, name)),
            None => format!("| {name} | {now} | {items} |"),
        });
    }
    rows
}
