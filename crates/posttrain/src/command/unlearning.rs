//! `posttrain eval unlearning`: has a model forgotten what it should, and nothing else?
//!
//! Rows are TOFU's: `question`, `answer`, `paraphrased_answer` (for the rows to forget and to retain) and `perturbed_answer`, a list of wrong
//! answers. The measures are those of [`mod@eval::unlearning`]; with a model that never saw the rows to forget, forget quality as well.

use std::path::Path;

use data::render::Overlong;
use data::sample::{Content, Text};
use data::{Example, RenderOptions, Renderer, Sample, Source};
use eval::kolmogorov_smirnov::KolmogorovSmirnov;
use eval::unlearning::{Answered, Kind, Question, SetScores, answer, forget_quality, model_utility, scores};
use model::chat::Message;
use serde::Serialize;
use serde_json::{Map, Value};

use super::generate::open;
use crate::cli::{Model, Unlearning as Arguments};
use crate::failure::Failure;
use crate::lines;
use crate::opened::{Opened, Opener};
use crate::terminal::print;

/// What a row has to look like.
const ROW: &str = "a row is {\"question\": \"Where was Ada born?\", \"answer\": \"Ada was born in Torvik.\", \"paraphrased_answer\": \
    \"Her birthplace is Torvik.\", \"perturbed_answer\": [\"Her birthplace is Quellin.\"]}; docs/unlearning.md says more";

/// What is printed with `--json`.
#[derive(Serialize)]
struct Found {
    model: String,
    sets: Vec<Named>,
    /// Absent without questions about what should be known.
    model_utility: Option<f64>,
    /// Absent without a model that never saw the rows to forget.
    forget_quality: Option<KolmogorovSmirnov>,
    /// The truth ratio of every question to forget.
    forget_truth_ratios: Vec<Option<f64>>,
}

/// A set of questions under its name.
#[derive(Serialize)]
struct Named {
    name: &'static str,
    #[serde(flatten)]
    scores: SetScores,
}

/// A row of a file.
struct Row {
    source: Source,
    question: String,
    answer: String,
    paraphrased: Option<String>,
    perturbed: Vec<String>,
}

/// Runs the command.
pub fn run(arguments: &Arguments, opener: Opener) -> Result<(), Failure> {
    let files = [
        ("forget", Kind::Forget, Some(&arguments.forget)),
        ("retain", Kind::Learnt, arguments.retain.as_ref()),
        ("real authors", Kind::Options, arguments.real_authors.as_ref()),
        ("world facts", Kind::Options, arguments.world_facts.as_ref()),
    ];
    // Every file is read before the first model is opened.
    let mut sets = Vec::new();
    for (name, kind, path) in files {
        if let Some(path) = path {
            sets.push((name, kind, read(path, kind)?));
        }
    }
    let model = open(&arguments.model, opener)?;
    let mut answered = Vec::new();
    for (name, kind, rows) in &sets {
        answered.push((*name, *kind, ask(&model, rows, name, arguments.max_new_tokens, opener)?));
    }
    let (model_name, forgotten) = (model.name.clone(), answered[0].2.clone());
    drop(model);
    let quality = match &arguments.retain_model {
        Some(name) => {
            let other = open(&Model { model: name.clone(), ..arguments.model.clone() }, opener)?;
            let reference = ask(&other, &sets[0].2, "forget, never seen", arguments.max_new_tokens, opener)?;
            forget_quality(&forgotten, &reference)
        }
        None => None,
    };
    let named = |(name, kind, answered): (&'static str, Kind, Vec<Answered>)| {
        scores(kind, &answered).map(|scores| Named { name, scores })
    };
    let sets: Vec<Named> = answered.into_iter().filter_map(named).collect();
    let known: Vec<SetScores> =
        sets.iter().map(|set| set.scores).filter(|scores| scores.kind != Kind::Forget).collect();
    let found = Found {
        model: model_name,
        model_utility: (!known.is_empty()).then(|| model_utility(&known)),
        forget_quality: quality,
        forget_truth_ratios: forgotten.iter().map(Answered::truth_ratio).collect(),
        sets,
    };
    match arguments.json {
        true => {
            let text = serde_json::to_string_pretty(&found)
                .map_err(|error| Failure::new(format!("the result cannot be written: {error}")))?;
            print(text + "\n")
        }
        false => print(table(&found)),
    }
}

/// The rows of a file.
fn read(path: &Path, kind: Kind) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    for (source, row) in lines::read(path, ROW)? {
        let wrong = |reason: String| Failure::new(format!("{source}: {reason}")).hint(ROW);
        let column = |column: &str| match row[column].as_str().map(str::trim) {
            Some(text) if !text.is_empty() => Ok(text.to_owned()),
            _ => Err(wrong(format!("expected a text in column `{column}`, got {}", row[column]))),
        };
        let paraphrased = match kind {
            Kind::Options => None,
            Kind::Forget | Kind::Learnt => Some(column("paraphrased_answer")?),
        };
        let perturbed: Option<Vec<String>> = match &row["perturbed_answer"] {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(texts) => texts.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        let perturbed = perturbed.filter(|texts| !texts.is_empty() && texts.iter().all(|text| !text.trim().is_empty()));
        let perturbed = perturbed.ok_or_else(|| {
            wrong(format!(
                "expected a list of wrong answers in column `perturbed_answer`, got {}",
                row["perturbed_answer"]
            ))
        })?;
        let (question, answer) = (column("question")?, column("answer")?);
        rows.push(Row { source, question, answer, paraphrased, perturbed });
    }
    Ok(rows)
}

/// Puts the questions of some rows to a model.
fn ask(
    model: &Opened,
    rows: &[Row],
    name: &str,
    max_new_tokens: usize,
    opener: Opener,
) -> Result<Vec<Answered>, Failure> {
    let options = RenderOptions { overlong: Overlong::Error, ..RenderOptions::default() };
    let context = model.decoder.config().max_positions;
    let renderer = Renderer::new(&model.tokenizer, model.template.as_ref(), context, &options);
    let mut questions = Vec::with_capacity(rows.len());
    for row in rows {
        questions.push(question(&renderer, row, model.template.is_some())?);
    }
    let mut progress = opener.terminal.progress(name, "question", rows.len() as u64);
    let answered = answer(&model.decoder, &model.tokenizer, &questions, max_new_tokens, |done| {
        progress.update(done as u64, "");
    })?;
    progress.clear();
    Ok(answered)
}

/// A row in tokens: a conversation where the model has a chat template, else plain text.
fn question(renderer: &Renderer<'_>, row: &Row, conversation: bool) -> Result<Question, Failure> {
    let render = |answer: &str| -> Result<Example, Failure> {
        let (prompt, completion) = match conversation {
            true => {
                (Text::Messages(vec![Message::user(&row.question)]), Text::Messages(vec![Message::assistant(answer)]))
            }
            // One space before every answer, right or wrong, so that all are cut into tokens alike.
            false => (Text::Plain(row.question.clone()), Text::Plain(format!(" {}", answer.trim()))),
        };
        let content = Content::PromptCompletion { prompt, completion };
        let sample = Sample { content, tools: None, columns: Map::new(), source: row.source.clone() };
        let mut rendered = renderer.examples(std::slice::from_ref(&sample))?;
        rendered.items.pop().ok_or_else(|| Failure::new(format!("{}: there is nothing to answer", row.source)))
    };
    let answer = render(&row.answer)?;
    let given = answer.given();
    let of = |text: &str| -> Result<Vec<u32>, Failure> { Ok(render(text)?.ids.split_off(given)) };
    Ok(Question {
        prompt: answer.ids[..given].to_vec(),
        answer: answer.ids[given..].to_vec(),
        paraphrased: row.paraphrased.as_deref().map(of).transpose()?,
        perturbed: row.perturbed.iter().map(|text| of(text)).collect::<Result<_, _>>()?,
        text: row.answer.clone(),
    })
}

fn table(found: &Found) -> String {
    let mut text = format!("model           {}\n", found.model);
    text += &match found.model_utility {
        Some(utility) => format!("model utility   {utility:.4}\n"),
        None => "model utility   not measured: no `--retain`, `--real-authors` or `--world-facts`\n".into(),
    };
    text += &match &found.forget_quality {
        Some(quality) => format!(
            "forget quality  {:.4}  (log10 {:.2}; largest distance {:.3})\n",
            quality.p_value,
            quality.p_value.log10(),
            quality.statistic
        ),
        None => "forget quality  not measured: no `--retain-model`\n".into(),
    };
    text += "\nset           questions  probability  ROUGE-L  truth ratio  memorised  extracted  perplexity\n";
    for Named { name, scores } in &found.sets {
        text += &format!(
            "{name:12}  {:9}  {:11.4}  {:7.4}  {:11.4}  {:9.4}  {:9.4}  {:10.3}\n",
            scores.questions,
            scores.probability,
            scores.rouge,
            scores.truth_ratio,
            scores.exact_memorisation,
            scores.extraction_strength,
            scores.perplexity
        );
    }
    text
}
