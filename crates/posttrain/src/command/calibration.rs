//! `posttrain eval calibration`: does a model know what it knows?
//!
//! Every question is asked with the request to state a confidence from 0 to 10 ([`mod@envs::reward::confidence`]); confidences are then held
//! against the answers ([`mod@eval::calibration`]), and against those of another model to the same questions. With `--several` a reply states any
//! number of answers, each with its confidence; every one of every reply counts the same. Answers without a readable
//! confidence are counted, and left out of everything but that count.

use std::path::Path;

use base::{Purpose, Random, files};
use envs::reward::confidence::{Facts, LEVELS, accepted};
use eval::Interval;
use eval::calibration::{Calibration, Difference, Measures, Question, calibration, differences, intervals};
use eval::interval::wilson;
use model::chat::Message;
use rollout::{Generator, Request};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::eval::write_lines;
use super::generate::{BATCH, encode, open, options};
use crate::cli::Calibration as Arguments;
use crate::failure::Failure;
use crate::lines;
use crate::opened::Opener;
use crate::report::chart::{Lines, short};
use crate::terminal::print;

/// What the model is asked for beside the answer.
const INSTRUCTION: &str = "Answer the question in as few words as possible, and state how sure you are as a whole number from 0 to 10: \
    0 means that your answer is certainly wrong, 10 that it is certainly right, and 7 that it is right seven times out of ten. \
    Reply with exactly one line of this form and nothing else:\nAnswer: <your answer>, Confidence: <0, 1, 2, 3, 4, 5, 6, 7, 8, 9 or 10>";

/// The same for several answers.
const SEVERAL: &str = "Give all answers to the question that you know, each in as few words as possible and on a line of its own, and state how sure \
    you are of each as a whole number from 0 to 10: 0 means that it is certainly wrong, 10 that it is certainly right, and 7 that such answers are right \
    seven times out of ten. Reply with lines of this form and nothing else:\nAnswer: <your answer>, Confidence: <0, 1, 2, 3, 4, 5, 6, 7, 8, 9 or 10>";

/// A question and the answers that are accepted.
type Row = (String, Vec<String>);

/// What is printed with `--json`.
#[derive(Serialize)]
struct Found {
    model: String,
    /// Answers, replies that state none included.
    asked: usize,
    malformed: usize,
    /// Of the answers that can be read.
    #[serde(flatten)]
    calibration: Option<Calibration>,
    /// 95 % intervals.
    intervals: Measures<Interval>,
    /// To the answers of `--before`.
    #[serde(skip_serializing_if = "Option::is_none")]
    differences: Option<Measures<Difference>>,
}

/// An answer, as it is written down.
#[derive(Serialize, Deserialize)]
struct Stated {
    id: usize,
    sample: usize,
    question: String,
    completion: String,
    /// What the confidence is about; absent where none can be read.
    answer: Option<String>,
    /// From 0 to 10; absent where none can be read.
    confidence: Option<u8>,
    /// Whether the answer is right; absent where none can be read.
    right: Option<bool>,
}

impl Stated {
    /// What a reply states, given the accepted answers. A reply that states nothing is an answer that cannot be read.
    fn of(facts: Facts, (id, sample): (usize, usize), (question, accepted): &Row, reply: &str) -> Vec<Self> {
        let stated = facts.of(reply).into_iter().map(|stated| Some((stated.answer, stated.level?)));
        let stated: Vec<Option<(&str, u8)>> = stated.collect();
        let one = |read: Option<(&str, u8)>| Self {
            id,
            sample,
            question: question.clone(),
            completion: reply.to_owned(),
            answer: read.map(|(answer, _)| answer.to_owned()),
            confidence: read.map(|(_, level)| level),
            right: read.map(|(answer, _)| facts.is_right(answer, accepted)),
        };
        match stated.is_empty() {
            true => vec![one(None)],
            false => stated.into_iter().map(one).collect(),
        }
    }

    /// What calibration is about.
    fn pair(&self) -> Option<(f64, bool)> {
        Some((f64::from(self.confidence?) / f64::from(LEVELS), self.right?))
    }
}

/// Runs the command.
pub fn run(arguments: &Arguments, opener: Opener) -> Result<(), Failure> {
    let options = options(&arguments.sampling)?;
    let rows = read(arguments)?;
    let before = arguments.before.as_ref().map(|path| earlier(path, &rows)).transpose()?;
    let model = open(&arguments.model, opener)?;
    let (facts, usual) = if arguments.several { (Facts::Several, SEVERAL) } else { (Facts::One, INSTRUCTION) };
    let system = arguments.system.as_deref().unwrap_or(usual);
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

    let n = arguments.n as usize;
    let replies = episodes.iter().enumerate();
    let stated: Vec<Stated> = replies
        .flat_map(|(index, episode)| Stated::of(facts, (index / n, index % n), &rows[index / n], &episode.text))
        .collect();
    if let Some(path) = &arguments.answers {
        let lines: Vec<Value> =
            stated.iter().map(serde_json::to_value).collect::<Result<_, _>>().map_err(unwritable)?;
        write_lines(path, &lines)?;
    }
    let questions = by_question(&stated, rows.len());
    let pairs = questions.concat();
    let found = Found {
        model: model.name,
        asked: stated.len(),
        malformed: stated.len() - pairs.len(),
        calibration: calibration(&pairs),
        intervals: intervals(&questions, arguments.sampling.seed),
        differences: before.map(|before| differences(&before, &questions, arguments.sampling.seed)),
    };
    if let Some(path) = &arguments.report {
        files::write(path, picture(&found).as_bytes())?;
        opener.terminal.note(format!("wrote {}", path.display()));
    }
    match arguments.json {
        true => {
            let text = serde_json::to_string_pretty(&found).map_err(unwritable)?;
            print(text + "\n")
        }
        false => print(table(&found)),
    }
}

fn unwritable(error: serde_json::Error) -> Failure {
    Failure::new(format!("the result cannot be written: {error}"))
}

/// The answers that can be read, question by question.
fn by_question(stated: &[Stated], count: usize) -> Vec<Question> {
    let mut questions = vec![Question::new(); count];
    for one in stated {
        questions[one.id].extend(one.pair());
    }
    questions
}

/// Answers of another model that `--answers` wrote, to these very questions.
fn earlier(path: &Path, rows: &[Row]) -> Result<Vec<Question>, Failure> {
    const HINT: &str = "`posttrain eval calibration QUESTIONS --model OTHER --answers FILE` writes such a file";
    let (mut stated, mut answered) = (Vec::<Stated>::new(), vec![false; rows.len()]);
    for (source, row) in lines::read(path, HINT)? {
        let wrong = |reason: String| Failure::new(format!("{source}: {reason}")).hint(HINT);
        let one: Stated = serde_json::from_value(row).map_err(|error| wrong(format!("no answer: {error}")))?;
        if rows.get(one.id).is_none_or(|(question, _)| *question != one.question) {
            return Err(wrong(format!("question {} is not {:?} in the file of questions", one.id, one.question)));
        }
        answered[one.id] = true;
        stated.push(one);
    }
    if let Some(missing) = answered.iter().position(|answered| !answered) {
        let name = path.display();
        return Err(Failure::new(format!("{name} has no answer to question {missing}, {:?}", rows[missing].0)));
    }
    Ok(by_question(&stated, rows.len()))
}

/// Questions with their accepted answers.
fn read(arguments: &Arguments) -> Result<Vec<Row>, Failure> {
    const ROW: &str = "a row is {\"question\": \"Who wrote Emma?\", \"answer\": [\"Jane Austen\", \"Austen\"]}";
    let mut rows = Vec::new();
    for (source, row) in lines::read(&arguments.file, ROW)? {
        let wrong = |reason: String| Failure::new(format!("{source}: {reason}")).hint(ROW);
        let question = row["question"].as_str().ok_or_else(|| wrong("expected a text in column `question`".into()))?;
        let answers = accepted(&row["answer"])
            .ok_or_else(|| wrong("expected a text, a number or a list of these in column `answer`".into()))?;
        rows.push((question.to_owned(), answers));
    }
    Ok(rows)
}

fn table(found: &Found) -> String {
    let malformed = wilson(found.malformed, found.asked);
    let mut text = format!("model       {}\nanswers     {}\n", found.model, found.asked);
    text += &format!(
        "malformed   {:.1} %  (95 % interval {:.1} to {:.1})\n",
        100.0 * found.malformed as f64 / found.asked as f64,
        100.0 * malformed.low,
        100.0 * malformed.high
    );
    let Some(calibration) = &found.calibration else {
        return text + "no confidence could be read\n";
    };
    text += &format!("confidence  {:.4}\n", calibration.confidence);
    let intervals = &found.intervals;
    for (name, value, interval) in [
        ("accuracy", Some(calibration.accuracy), intervals.accuracy),
        ("ECE", Some(calibration.ece), intervals.ece),
        ("AUROC", calibration.auroc, intervals.auroc),
        ("Brier", Some(calibration.brier), intervals.brier),
    ] {
        text += &match value.zip(interval) {
            Some((value, of)) => format!("{name:10}  {value:.4}  (95 % interval {:.4} to {:.4})\n", of.low, of.high),
            None => format!("{name:10}  undefined: all answers are right, or none\n"),
        };
    }
    if let Some(Measures { accuracy, ece, auroc, brier }) = found.differences {
        text += "\nless the answers before\n";
        for (name, difference) in [("accuracy", accuracy), ("ECE", ece), ("AUROC", auroc), ("Brier", brier)] {
            text += &match difference {
                Some(Difference { difference, interval: of }) => {
                    format!("{name:10}  {difference:+.4}  (95 % interval {:+.4} to {:+.4})\n", of.low, of.high)
                }
                None => format!("{name:10}  undefined: all answers of one are right, or none\n"),
            };
        }
    }
    text += "\nconfidence  right  95 % interval   answers\n";
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

#[cfg(test)]
mod tests {
    use super::*;

    fn row(question: &str, accepted: &[&str]) -> Row {
        (question.into(), accepted.iter().map(|&text| text.into()).collect())
    }

    #[test]
    fn every_fact_of_every_reply_counts_the_same() {
        let rows = [row("Novels?", &["Emma", "Sense and Sensibility", "Sensibility"]), row("Capital?", &["Rome"])];
        let replies = [
            (
                0,
                "Answer: Emma, Confidence: 10\nAnswer: Sense Sensibility, Confidence: 8\nAnswer: Ulysses, Confidence: 8",
            ),
            (1, "Answer: Rome, Confidence: 99"),
            (1, "Rome"),
            (1, "Answer: Paris, Confidence: 2"),
        ];
        let of = |facts| -> Vec<Stated> {
            let replies = replies.iter().enumerate();
            replies.flat_map(|(sample, (id, reply))| Stated::of(facts, (*id, sample), &rows[*id], reply)).collect()
        };
        let stated = of(Facts::Several);
        let questions = by_question(&stated, rows.len());
        assert_eq!((stated.len(), questions.concat().len()), (6, 4));
        assert_eq!(questions, [vec![(1.0, true), (0.8, true), (0.8, false)], vec![(0.2, false)]]);
        assert_eq!(stated[1].answer.as_deref(), Some("Sense Sensibility"));
        assert!(stated[3].answer.is_none() && stated[3].right.is_none(), "a confidence that cannot be read");
        // By the answers, not by the replies: 0 at 1, half of two at 0.8, 0.2 at 0.2.
        let ece = calibration(&questions.concat()).map(|found| found.ece);
        assert!(ece.is_some_and(|ece| (ece - (0.0 + 2.0 * 0.3 + 0.2) / 4.0).abs() < 1e-12), "{ece:?}");
        // Read as single answers, only the first of the first reply is one, and has to be the same text.
        let stated = of(Facts::One);
        assert_eq!(by_question(&stated, rows.len()), [vec![(1.0, true)], vec![(0.2, false)]]);
        assert_eq!(stated.len(), replies.len());
    }
}
