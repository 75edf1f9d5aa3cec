//! From the files of a finished run to its page.

use std::path::Path;

use base::files;
use serde_json::{Map, Value};
use train::directory::Directory;
use train::evaluation::{Evaluation, Measure};
use train::metrics::Metrics;
use train::summary::Summary;
use train::timing::Phase;

use super::chart::{Curve, Estimate};
use super::{Report, Sample, Stage, bytes, caption, duration};
use crate::failure::Failure;
use crate::measure::is_share;

/// Answers shown side by side.
const SAMPLES: usize = 8;

/// The order of the curves on the page.
const CURVES: [&str; 17] = [
    "reward",
    "accuracy",
    "eval_accuracy",
    "loss",
    "divergence",
    "margin",
    "mean_reward",
    "rewards/accuracies",
    "rewards/margins",
    "completions/mean_length",
    "entropy",
    "kl",
    "grad_norm",
    "frac_reward_zero_std",
    "completions/clipped_ratio",
    "clip_ratio/region_mean",
    "learning_rate",
];

/// The files of a run directory that are not the training loop's.
pub const FILES: [&str; 2] = ["report.html", "result.svg"];

/// Writes [`FILES`] into the directory of a finished run.
///
/// `steps` are those of each stage.
pub fn write(directory: &Directory, summary: &Summary, steps: &[u64]) -> Result<(), Failure> {
    let report = read(directory, summary, steps)?;
    let [page, picture] = FILES.map(|name| directory.root().join(name));
    files::write(&page, report.html().as_bytes())?;
    files::write(&picture, report.picture().as_bytes())?;
    Ok(())
}

fn read(directory: &Directory, summary: &Summary, steps: &[u64]) -> Result<Report, Failure> {
    let lines = json_lines::<Metrics>(&directory.metrics())?;
    let methods = summary.stages.join(", then ");
    let before =
        summary.before.as_ref().filter(|before| summary.after.as_ref().is_none_or(|after| after.step > before.step));
    Ok(Report {
        title: format!(
            "{}, post-trained with {}",
            base_name(&summary.base_model),
            methods.to_uppercase().replace("THEN", "then")
        ),
        subtitle: format!("{} steps on {}", summary.steps, training_data(summary)),
        evaluations: [("before", before), ("after", summary.after.as_ref())]
            .into_iter()
            .filter_map(|(label, evaluation)| estimate(label, evaluation?))
            .collect(),
        difference: summary.change.as_ref().map(difference),
        facts: facts(summary),
        alarms: summary.alarms.iter().map(ToString::to_string).collect(),
        stages: stages(&lines, &summary.stages, steps),
        samples: samples(directory, summary)?,
        phases: phases(summary),
        config: files::read_to_string(&directory.config())?,
        command: summary.command.clone(),
    })
}

/// The last part of a path, or the name itself.
fn base_name(model: &str) -> &str {
    Path::new(model).file_name().and_then(|name| name.to_str()).unwrap_or(model)
}

fn training_data(summary: &Summary) -> String {
    let names: Vec<&str> =
        summary.data.iter().map(|source| source.name.as_str()).filter(|name| name.starts_with("train")).collect();
    if names.is_empty() { "no data".to_owned() } else { names.join(", ").replace("train: ", "") }
}

fn estimate(label: &str, evaluation: &Evaluation) -> Option<Estimate> {
    let measure = evaluation.measures.first()?;
    let Measure { value, low, high, .. } = *measure;
    Some(Estimate { label: label.to_owned(), value, low, high, share: is_share(&measure.name) })
}

/// The paired difference in words.
pub fn difference(change: &eval::paired::Comparison) -> String {
    let p = match change.p_value {
        p if p < 1e-4 => "p < 0.0001".to_owned(),
        p => format!("p = {p:.4}"),
    };
    let (gained, lost, test) = match change.shares {
        false => ("became right", "became wrong", "McNemar's exact test"),
        true => ("more often right", "less often", "sign test"),
    };
    format!(
        "{:+.1} points on the same problems (95 % interval {:+.1} to {:+.1}; {} {gained}, {} {lost}; {p}, {test})",
        100.0 * change.difference,
        100.0 * change.interval.low,
        100.0 * change.interval.high,
        change.gained,
        change.lost
    )
}

fn facts(summary: &Summary) -> Vec<(String, String)> {
    let mut facts = Vec::new();
    let mut add = |key: &str, value: String| facts.push((key.to_owned(), value));
    if let Some(measure) = summary.after.as_ref().and_then(|after| after.measures.first()) {
        add("held-out problems", measure.items.to_string());
    }
    add("steps", summary.steps.to_string());
    add("tokens trained on", grouped(summary.num_tokens));
    add("parameters trained", grouped(summary.trained_parameters as u64));
    add("wall time", duration(summary.timing.seconds));
    if let Some(peak) = summary.timing.peak_memory_bytes {
        add("peak memory", bytes(peak));
    }
    if summary.rollbacks > 0 {
        add("rollbacks", summary.rollbacks.to_string());
    }
    add("seed", summary.seed.to_string());
    add("configuration", summary.config_sha256.chars().take(12).collect());
    add("program", summary.program.clone());
    facts
}

/// `1234567` → `1 234 567`.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// The curves of every stage. A line belongs to the stage whose steps it falls into, and one before the first step to the first stage.
fn stages(lines: &[Metrics], names: &[String], steps: &[u64]) -> Vec<Stage> {
    let ends = steps.iter().scan(0, |end, steps| {
        *end += steps;
        Some(*end as f64)
    });
    let mut rest = lines;
    let parts: Vec<Vec<&Metrics>> = ends
        .map(|end| {
            let within = |line: &Metrics| line.get("step").is_none_or(|step| step <= end);
            let (part, later) = rest.split_at(rest.iter().take_while(|line| within(line)).count());
            rest = later;
            part.iter().collect()
        })
        .collect();
    let curve = |part: &[&Metrics], name: &str| {
        let points: Vec<(f64, f64)> =
            part.iter().filter_map(|line| Some((line.get("step")?, line.get(name)?))).collect();
        let caption = caption(name).unwrap_or_default();
        (points.len() > 1).then(|| Curve { name: name.to_owned(), caption, points })
    };
    parts
        .iter()
        .zip(names)
        .map(|(part, name)| Stage {
            name: name.clone(),
            curves: CURVES.iter().filter_map(|name| curve(part, name)).collect(),
        })
        .collect()
}

fn phases(summary: &Summary) -> Vec<(String, f64)> {
    let name = |phase: Phase| match phase {
        Phase::Evaluate => "evaluation",
        Phase::Rollout => "sampling",
        Phase::Score => "scoring",
        Phase::Reference => "reference model",
        Phase::Train => "training",
        Phase::Save => "saving",
    };
    let mut phases: Vec<(String, f64)> =
        summary.timing.phases.iter().map(|(phase, seconds)| (name(*phase).to_owned(), *seconds)).collect();
    phases.sort_by(|a, b| b.1.total_cmp(&a.1));
    phases
}

/// A few problems with both answers: those that changed first, since they show what training did.
fn samples(directory: &Directory, summary: &Summary) -> Result<Vec<Sample>, Failure> {
    let read = |evaluation: Option<&Evaluation>| match evaluation {
        Some(evaluation) => json_lines::<Map<String, Value>>(&directory.samples(evaluation.step)),
        None => Ok(Vec::new()),
    };
    let (before, after) = (read(summary.before.as_ref())?, read(summary.after.as_ref())?);
    let answer = |sample: &Map<String, Value>| {
        let text = sample.get("completion").and_then(Value::as_str).unwrap_or_default().trim().to_owned();
        (text, sample.get("solved").and_then(Value::as_bool))
    };
    let paired = before.len() == after.len();
    let all: Vec<Sample> = after
        .iter()
        .enumerate()
        .map(|(i, sample)| Sample {
            prompt: sample.get("question").and_then(Value::as_str).unwrap_or_default().to_owned(),
            expected: sample
                .get("answer")
                .map(|answer| answer.as_str().map_or_else(|| answer.to_string(), str::to_owned)),
            before: if paired { before.get(i).map(answer) } else { None },
            after: answer(sample),
        })
        .collect();
    // Of every kind of outcome a fair share: mostly gained, but also what was lost and what stayed wrong.
    let kind = |sample: &Sample| (sample.before.as_ref().map(|before| before.1), sample.after.1);
    let (right, wrong) = (Some(true), Some(false));
    let shares =
        [((Some(wrong), right), 3), ((Some(right), right), 1), ((Some(right), wrong), 2), ((Some(wrong), wrong), 2)];
    let mut chosen: Vec<usize> = Vec::new();
    for (wanted, share) in shares {
        chosen.extend(all.iter().enumerate().filter(|(_, sample)| kind(sample) == wanted).map(|(i, _)| i).take(share));
    }
    let rest: Vec<usize> = (0..all.len()).filter(|i| !chosen.contains(i)).collect();
    chosen.extend(rest);
    chosen.truncate(SAMPLES);
    let mut all: Vec<Option<Sample>> = all.into_iter().map(Some).collect();
    Ok(chosen.into_iter().filter_map(|i| all[i].take()).collect())
}

/// The lines of a file of ours; an absent file has none.
fn json_lines<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>, Failure> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = files::read_to_string(path)?;
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|error| Failure::new(format!("{}, line {}: {error}", path.display(), i + 1)))
    };
    text.lines().enumerate().map(parse).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    /// The second stage starts beyond the first epoch of the first.
    #[test]
    fn stages_are_told_apart_by_their_steps() {
        let line = |step: f64, epoch: Option<f64>, name: &str| {
            let mut line = Metrics::new();
            line.set("step", step);
            if let Some(epoch) = epoch {
                line.set("epoch", epoch);
            }
            line.set(name, 1.0);
            line
        };
        let lines = [
            line(0.0, None, "eval_accuracy"),
            line(1.0, Some(0.1), "loss"),
            line(2.0, Some(0.2), "loss"),
            line(2.0, None, "eval_accuracy"),
            line(3.0, Some(0.5), "reward"),
            line(4.0, Some(1.0), "reward"),
            line(4.0, None, "eval_accuracy"),
            line(5.0, Some(1.5), "reward"),
            line(5.0, None, "eval_accuracy"),
        ];
        let names = ["sft", "grpo"].map(str::to_owned);
        let found = stages(&lines, &names, &[2, 3]);
        let curves = |stage: &Stage| -> Vec<(String, usize)> {
            stage.curves.iter().map(|curve| (curve.name.clone(), curve.points.len())).collect()
        };
        assert_eq!(curves(&found[0]), [("eval_accuracy".to_owned(), 2), ("loss".to_owned(), 2)]);
        assert_eq!(curves(&found[1]), [("reward".to_owned(), 3), ("eval_accuracy".to_owned(), 2)]);
    }
}
