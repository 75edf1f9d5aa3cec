//! `posttrain eval calibration`: does a model know what it knows?
//!
//! Every question is asked with the request to state a confidence from 0 to 10 ([`mod@envs::reward::confidence`]); confidences are then held
//! against the answers ([`mod@eval::calibration`]). Answers without a readable confidence are counted, and left out of everything but that count
//! and, where at least the answer can be read, the accuracy.

use base::{Purpose, Random, files};
use envs::reward::confidence::{LEVELS, accepted, is_right, parse};
use eval::calibration::{Calibration, calibration};
use eval::interval::wilson;
use model::chat::Message;
use rollout::{Generator, Request};
use serde::Serialize;
use serde_json::Value;

use super::generate::{BATCH, encode, open, options};
use crate::cli::Calibration as Arguments;
use crate::failure::Failure;
use crate::opened::Opener;
use crate::report::chart::{Lines, short};
use crate::terminal::print;

/// What the model is asked for beside the answer.
const INSTRUCTION: &str = "Answer the question in as few words as possible, and state how sure you are as a whole number from 0 to 10: \
    0 means that your answer is certainly wrong, 10 that it is certainly right, and 7 that it is right seven times out of ten. \
    Reply with exactly one line of this form and nothing else:\nAnswer: <your answer>, Confidence: <0, 1, 2, 3, 4, 5, 6, 7, 8, 9 or 10>";

/// What is printed with `--json`.
#[derive(Serialize)]
struct Found {
    model: String,
    answers: usize,
    malformed: usize,
    #[serde(flatten)]
    calibration: Option<Calibration>,
}

/// Runs the command.
pub fn run(arguments: &Arguments, opener: Opener) -> Result<(), Failure> {
    let options = options(&arguments.sampling)?;
    let rows = read(arguments)?;
    let model = open(&arguments.model, opener)?;
    let system = arguments.system.as_deref().unwrap_or(INSTRUCTION);
    let mut requests = Vec::new();
    for (row, (question, _)) in rows.iter().enumerate() {
        let ids = encode(&model, &[Message::new("system", system), Message::new("user", question)])?;
        requests.extend(Request::samples(row as u32, &ids, arguments.n));
    }
    let generator = Generator::new(&options, BATCH, Random::new(arguments.sampling.seed, Purpose::Sampling));
    let mut progress = opener.terminal.progress("asking", "answer", requests.len() as u64);
    let episodes = generator.generate(&model.decoder, &model.tokenizer, &requests, |now| {
        progress.update(now.finished as u64, "");
    })?;
    progress.clear();

    let mut stated = Vec::new();
    for (index, episode) in episodes.iter().enumerate() {
        let (_, gold) = &rows[index / arguments.n as usize];
        if let Some((answer, level)) = parse(&episode.text).and_then(|stated| Some((stated.answer, stated.level?))) {
            stated.push((f64::from(level) / f64::from(LEVELS), is_right(answer, gold.iter().map(String::as_str))));
        }
    }
    let found = Found {
        model: model.name,
        answers: episodes.len(),
        malformed: episodes.len() - stated.len(),
        calibration: calibration(&stated),
    };
    if let Some(path) = &arguments.report {
        files::write(path, picture(&found).as_bytes())?;
        opener.terminal.note(format!("wrote {}", path.display()));
    }
    match arguments.json {
        true => {
            let text = serde_json::to_string_pretty(&found)
                .map_err(|error| Failure::new(format!("the result cannot be written: {error}")))?;
            print(text + "\n")
        }
        false => print(table(&found)),
    }
}

/// Questions with their accepted answers.
fn read(arguments: &Arguments) -> Result<Vec<(String, Vec<String>)>, Failure> {
    let name = arguments.file.display();
    let text = files::read_to_string(&arguments.file)?;
    let mut rows = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |reason: String| {
            Failure::new(format!("{name}, line {}: {reason}", number + 1))
                .hint("a row is {\"question\": \"Who wrote Emma?\", \"answer\": [\"Jane Austen\", \"Austen\"]}")
        };
        let row: Value = serde_json::from_str(line).map_err(|error| wrong(format!("not valid JSON: {error}")))?;
        let question = row["question"].as_str().ok_or_else(|| wrong("expected a text in column `question`".into()))?;
        let answers = accepted(&row["answer"])
            .ok_or_else(|| wrong("expected a text, a number or a list of these in column `answer`".into()))?;
        rows.push((question.to_owned(), answers));
    }
    match rows.is_empty() {
        true => Err(Failure::new(format!("{name} has no rows"))),
        false => Ok(rows),
    }
}

fn table(found: &Found) -> String {
    let malformed = wilson(found.malformed, found.answers);
    let mut text = format!("model       {}\nanswers     {}\n", found.model, found.answers);
    text += &format!(
        "malformed   {:.1} %  (95 % interval {:.1} to {:.1})\n",
        100.0 * found.malformed as f64 / found.answers as f64,
        100.0 * malformed.low,
        100.0 * malformed.high
    );
    let Some(calibration) = &found.calibration else {
        return text + "no confidence could be read\n";
    };
    text += &format!("accuracy    {:.1} %\n", 100.0 * calibration.accuracy);
    text += &format!("confidence  {:.1} %\n", 100.0 * calibration.confidence);
    text += &format!("ECE         {:.4}\n", calibration.ece);
    text += &match calibration.auroc {
        Some(auroc) => format!("AUROC       {auroc:.4}\n"),
        None => "AUROC       undefined: all answers are right, or none\n".into(),
    };
    text += &format!("Brier       {:.4}\n\nconfidence  right  95 % interval   answers\n", calibration.brier);
    for bin in &calibration.bins {
        text += &format!(
            "{:>10}  {:5.3}  {:5.3} to {:5.3}  {:7}\n",
            short(bin.confidence),
            bin.accuracy,
            bin.interval.low,
            bin.interval.high,
            bin.answers
        );
    }
    text
}

/// The reliability diagram as a page.
fn picture(found: &Found) -> String {
    let bins = found.calibration.iter().flat_map(|found| &found.bins);
    let points = bins.map(|bin| (bin.confidence, bin.accuracy)).collect();
    crate::report::systems::page(
        "Reliability",
        &format!(
            "<header><h1>Reliability</h1></header><div class=\"curves\">{}</div><pre>{}</pre>\n",
            Lines {
                title: "Stated and true".into(),
                axes: ("confidence".into(), "share of right answers".into()),
                competitors: vec![(found.model.clone(), vec![points])],
                diagonal: true,
            }
            .html(),
            crate::report::chart::escape(&table(found))
        ),
    )
}
