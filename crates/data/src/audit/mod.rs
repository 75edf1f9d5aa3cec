//! Is this data fit to train on? What [`audit()`] looks at, and how bad each finding is:
//!
//! | check | error: training would refuse it, or its result could not be trusted | warning: rows that are left out, or odd |
//! | --- | --- | --- |
//! | rows | a row that cannot be read or rendered; rows of several types | |
//! | columns | | a column of several types, or missing in a few rows |
//! | begin and end | a doubled BOS; a completion whose end is not learnt | a template that leaves out BOS or the generation prompt |
//! | mask | | nothing to learn |
//! | length | too long, with `overlong = "error"` | too long and left out; a completion that is cut |
//! | repeats | | exact and near [duplicates]; a preference pair of two equal completions |
//! | held-out rows | a held-out prompt that is trained on | one that [overlaps](overlap) with a training row |
//!
//! Nothing here changes what training does: the same renderer makes the same tokens.

pub mod columns;
pub mod duplicates;
pub mod lengths;
pub mod overlap;
pub mod tokens;
mod words;

use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use model::chat::{ChatTemplate, Message};
use model::tokenizer::Tokenizer;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::render::{RenderOptions, Renderer, Sequence, Use};
use crate::row::{Row, Source};
use crate::sample::{self, Content, Kind, Sample, Text};
use columns::Column;
use lengths::Lengths;
use overlap::Trained;
use tokens::Inspector;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Training would refuse it, or its result could not be trusted.
    Error,
    /// Rows that are left out, or odd.
    Warning,
}

/// What was looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// A row that cannot be read, recognised or rendered.
    Unusable,
    /// Rows of more than one type.
    MixedTypes,
    /// A sequence that begins twice.
    DoubledBos,
    /// A sequence without the begin that plain text gets.
    MissingBos,
    /// A completion whose end is not learnt.
    MissingEos,
    /// A template that does not open the assistant's turn.
    NoGenerationPrompt,
    /// A row of which nothing is learnt.
    NothingToLearn,
    /// A sequence longer than the limit.
    TooLong,
    /// A completion that is cut.
    TruncatedCompletion,
    /// Two equal completions of a pair.
    EqualPair,
    /// A held-out prompt that is trained on.
    Leak,
    /// A held-out prompt that shares much with a training row.
    Overlap,
    /// A row that is there twice.
    Duplicate,
    /// A row that is nearly there twice.
    NearDuplicate,
    /// A column with values of several types.
    MixedColumn,
    /// A column without a value in a few rows.
    MissingValue,
}

impl fmt::Display for Check {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Unusable => "unusable rows",
            Self::MixedTypes => "rows of several types",
            Self::DoubledBos => "doubled BOS",
            Self::MissingBos => "missing BOS",
            Self::MissingEos => "end not learnt",
            Self::NoGenerationPrompt => "no generation prompt",
            Self::NothingToLearn => "nothing to learn",
            Self::TooLong => "too long",
            Self::TruncatedCompletion => "completions cut off",
            Self::EqualPair => "equal pairs",
            Self::Leak => "held-out prompts trained on",
            Self::Overlap => "overlap with held-out prompts",
            Self::Duplicate => "duplicates",
            Self::NearDuplicate => "near duplicates",
            Self::MixedColumn => "columns of several types",
            Self::MissingValue => "missing values",
        })
    }
}

/// Something that is wrong, or may be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What was looked for.
    pub check: Check,
    /// The row, where it is about one.
    pub at: Option<Source>,
    /// What was found.
    pub detail: String,
}

/// Rows to look at.
#[derive(Debug, Default)]
pub struct Rows {
    /// To train on, from files: rows, and errors for those that cannot be read.
    pub train: Vec<Result<Row>>,
    /// To train on, from a generator: it may repeat itself.
    pub generated: Vec<Row>,
    /// To forget.
    pub forget: Vec<Result<Row>>,
    /// Held out.
    pub test: Vec<Result<Row>>,
}

/// What the rows are for.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its chat template.
    pub template: Option<&'a ChatTemplate>,
    /// Its longest sequence.
    pub context: usize,
    /// Tokens kept free for answers, in training and to held-out prompts: taken off the longest prompt.
    pub answer: usize,
    /// See `answer`.
    pub held_out_answer: usize,
    /// How rows are rendered.
    pub rendering: &'a RenderOptions,
    /// What training rows are for. The first is what is shown and counted.
    pub used: &'a [Use<'a>],
    /// What held-out rows are for.
    pub held_out: &'a [Use<'a>],
}

/// A row with its sequences, to be shown.
#[derive(Clone, Debug)]
pub struct Specimen {
    /// Where it comes from.
    pub source: Source,
    /// Its sequences, whole.
    pub sequences: Vec<Sequence>,
}

/// What there is to say about data.
#[derive(Clone, Debug)]
pub struct Audit {
    /// Training rows, and those of them that were made by a generator.
    pub train: usize,
    /// See `train`.
    pub generated: usize,
    /// Rows to forget.
    pub forget: usize,
    /// Held-out rows.
    pub test: usize,
    /// The type of the training rows.
    pub kind: Option<Kind>,
    /// Longest sequence that is trained on.
    pub limit: usize,
    /// The columns of the training rows.
    pub columns: Vec<Column>,
    /// Length of the sequences of training rows, and of the parts of them that are given and learnt.
    pub tokens: Lengths,
    /// See `tokens`.
    pub given: Lengths,
    /// See `tokens`.
    pub learnt: Lengths,
    /// The first rows.
    pub specimens: Vec<Specimen>,
    /// What was found, errors first, then by check, then in the order of the rows.
    pub findings: Vec<Finding>,
}

impl Audit {
    /// Findings of a severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }
}

/// Looks at rows as training would see them; the first `shown` are kept whole.
pub fn audit(rows: Rows, setting: Setting<'_>, shown: usize) -> Audit {
    let mut findings = Vec::new();
    let generated: HashSet<Arc<Path>> = rows.generated.iter().map(|row| row.source.file.clone()).collect();
    let made = rows.generated.len();
    let all: Vec<Row> = usable(rows.train, &mut findings).into_iter().chain(rows.generated).collect();
    let forget = usable(rows.forget, &mut findings);
    let test = usable(rows.test, &mut findings);
    let columns = columns::columns(&all.iter().collect::<Vec<_>>());
    findings.extend(columns::findings(&columns, all.len()));

    let count = (all.len(), forget.len(), test.len());
    let train = recognised(all, &mut findings);
    let forget = recognised(forget, &mut findings);
    let test = recognised(test, &mut findings);
    findings.extend(setting.template.and_then(|template| tokens::template_findings(template, &train)));

    let unlimited = RenderOptions { max_length: None, ..setting.rendering.clone() };
    let renderer = Renderer::new(setting.tokenizer, setting.template, usize::MAX, &unlimited);
    let limit_of = |used: Use<'_>, answer: usize| {
        let room = setting.context.saturating_sub(if used == Use::Answer { answer } else { 0 });
        setting.rendering.max_length.map_or(room, |length| length.min(room))
    };
    // The sequences of the first use; the others only add what the first does not find in the row.
    let look = |sample: &Sample, uses: &[Use<'_>], answer: usize, findings: &mut Vec<Finding>| {
        let (mut first, mut found) = (None, Vec::<Finding>::new());
        for &used in uses {
            let limit = limit_of(used, answer);
            let inspector = Inspector { tokenizer: setting.tokenizer, rendering: setting.rendering, limit };
            let mut more = Vec::new();
            let sequences = rendered(&renderer, sample, used, &mut more);
            more.extend(sequences.iter().flat_map(|sequence| inspector.look(sample, sequence)));
            more.retain(|finding| found.iter().all(|known| known.check != finding.check));
            found.extend(more);
            first.get_or_insert(sequences);
        }
        findings.extend(found);
        first.unwrap_or_default()
    };
    let limit = limit_of(setting.used.first().copied().unwrap_or(Use::Learn), setting.answer);
    let mut specimens: Vec<Specimen> = Vec::new();
    let (mut total, mut given, mut learnt) = (Vec::new(), Vec::new(), Vec::new());
    for sample in &train {
        let sequences = look(sample, setting.used, setting.answer, &mut findings);
        for sequence in &sequences {
            let (length, learns) = (sequence.ids.len(), sequence.learnt());
            total.push(length);
            given.push(length - learns);
            learnt.push(learns);
        }
        if !sequences.is_empty() && specimens.len() < shown {
            specimens.push(Specimen { source: sample.source.clone(), sequences });
        }
        if let Content::Preference { chosen, rejected, .. } = &sample.content
            && chosen == rejected
        {
            findings.push(warning(Check::EqualPair, sample, "chosen and rejected are equal".into()));
        }
    }
    for sample in &forget {
        look(sample, &[Use::Imitate], 0, &mut findings);
    }
    for sample in &test {
        look(sample, setting.held_out, setting.held_out_answer, &mut findings);
    }
    let compared: Vec<&Sample> = train.iter().filter(|sample| !generated.contains(&sample.source.file)).collect();
    findings.extend(repeats(&compared));
    findings.extend(leaks(&train, &test));
    findings.sort_by(|a, b| (a.severity, a.check, &a.at).cmp(&(b.severity, b.check, &b.at)));
    Audit {
        train: count.0,
        generated: made,
        forget: count.1,
        test: count.2,
        kind: train.first().map(|sample| sample.content.kind()),
        limit,
        columns,
        tokens: Lengths::of(total),
        given: Lengths::of(given),
        learnt: Lengths::of(learnt),
        specimens,
        findings,
    }
}

fn warning(check: Check, sample: &Sample, detail: String) -> Finding {
    Finding { severity: Severity::Warning, check, at: Some(sample.source.clone()), detail }
}

/// The finding that an error is. Its text without the row, which the finding names itself.
fn refused(error: &Error) -> Finding {
    let check = match error {
        Error::DoubledBegin { .. } => Check::DoubledBos,
        _ => Check::Unusable,
    };
    let (at, text) = (error.source().cloned(), error.to_string());
    let place = at.as_ref().map(Source::to_string).unwrap_or_default();
    let detail = text.strip_prefix(&place).unwrap_or(&text).trim_start_matches([',', ':', ' ']).to_owned();
    Finding { severity: Severity::Error, check, at, detail }
}

/// The rows without the errors, which are findings.
fn usable(rows: Vec<Result<Row>>, findings: &mut Vec<Finding>) -> Vec<Row> {
    rows.into_iter().filter_map(|row| row.map_err(|error| findings.push(refused(&error))).ok()).collect()
}

/// The rows that are of the type of the first.
fn recognised(rows: Vec<Row>, findings: &mut Vec<Finding>) -> Vec<Sample> {
    let samples: Vec<Sample> = (rows.into_iter().map(sample::parse_row))
        .filter_map(|sample| sample.map_err(|error| findings.push(refused(&error))).ok())
        .collect();
    let Some(kind) = samples.first().map(|sample| sample.content.kind()) else { return samples };
    let (same, others): (Vec<Sample>, Vec<Sample>) =
        samples.into_iter().partition(|sample| sample.content.kind() == kind);
    findings.extend(others.iter().map(|other| Finding {
        severity: Severity::Error,
        check: Check::MixedTypes,
        at: Some(other.source.clone()),
        detail: format!("a {} row among {kind} rows", other.content.kind()),
    }));
    same
}

/// The sequences of a sample, or none and a finding.
fn rendered(renderer: &Renderer<'_>, sample: &Sample, used: Use<'_>, findings: &mut Vec<Finding>) -> Vec<Sequence> {
    match renderer.sequences(sample, used) {
        Ok(Ok(sequences)) => sequences,
        Ok(Err(reason)) => {
            findings.push(warning(Check::NothingToLearn, sample, format!("{reason}: the row is left out")));
            Vec::new()
        }
        Err(error) => {
            findings.push(refused(&error));
            Vec::new()
        }
    }
}

/// Rows that are there twice.
fn repeats(samples: &[&Sample]) -> Vec<Finding> {
    let texts: Vec<Vec<u64>> = samples.iter().map(|sample| words_of(&sample.content, true).whole).collect();
    let finding = |duplicate: &duplicates::Duplicate| {
        let (sample, first) = (samples[duplicate.row], &samples[duplicate.first].source);
        match duplicate.similarity {
            1.0 => warning(Check::Duplicate, sample, format!("the same as {first}")),
            alike => warning(Check::NearDuplicate, sample, format!("{:.0} % like {first}", 100.0 * alike)),
        }
    };
    duplicates::find(&texts).iter().map(finding).collect()
}

/// Held-out prompts that are trained on.
fn leaks(train: &[Sample], test: &[Sample]) -> Vec<Finding> {
    let trained: Vec<Trained> = train.iter().map(|sample| words_of(&sample.content, false)).collect();
    let held_out: Vec<Vec<u64>> = test.iter().map(|sample| words_of(&sample.content, false).prompt).collect();
    let finding = |overlap: &overlap::Overlap| {
        let (sample, row) = (&test[overlap.test], &train[overlap.train].source);
        let (severity, check, detail) = match overlap.same {
            true => (Severity::Error, Check::Leak, format!("{row} has the same prompt")),
            false => {
                let share = 100.0 * overlap.share;
                (Severity::Warning, Check::Overlap, format!("{share:.0} % of the prompt is in {row} too"))
            }
        };
        Finding { severity, check, at: Some(sample.source.clone()), detail }
    };
    overlap::find(&trained, &held_out).iter().map(finding).collect()
}

/// The words of a row and of its prompt, those of `system` messages only with `instructions`.
fn words_of(content: &Content, instructions: bool) -> Trained {
    let text = |text: &Text| match text {
        Text::Plain(text) => text.clone(),
        Text::Messages(messages) => {
            let kept = messages.iter().filter(|message| instructions || message.role() != "system");
            kept.map(message_text).collect::<Vec<_>>().join("\n")
        }
    };
    let (prompt, rest) = match content {
        Content::LanguageModeling(Text::Messages(messages)) => {
            let turns = messages.iter().rposition(|message| message.role() != "assistant").map_or(0, |last| last + 1);
            let (prompt, rest) = messages.split_at(turns);
            (text(&Text::Messages(prompt.to_vec())), vec![text(&Text::Messages(rest.to_vec()))])
        }
        Content::LanguageModeling(all) | Content::PromptOnly(all) => (text(all), Vec::new()),
        Content::PromptCompletion { prompt, completion } => (text(prompt), vec![text(completion)]),
        Content::Preference { prompt, chosen, rejected, reference } => {
            (text(prompt), [chosen, rejected].into_iter().chain(reference).map(text).collect())
        }
        Content::Ranking { prompt, completions } => (text(prompt), completions.iter().map(text).collect()),
        Content::UnpairedPreference { prompt, completion, label } => {
            (text(prompt), vec![text(completion), label.to_string()])
        }
        Content::Stepwise { prompt, steps } => {
            (text(prompt), steps.iter().map(|(step, right)| format!("{step} {right}")).collect())
        }
        Content::Tokens { ids, .. } => {
            let ids: Vec<u64> = ids.iter().map(|&id| u64::from(id)).collect();
            return Trained { prompt: ids.clone(), whole: ids };
        }
    };
    let prompt = words::words(&prompt);
    let rest = rest.iter().flat_map(|part| words::words(part));
    Trained { whole: prompt.iter().copied().chain(rest).collect(), prompt }
}

/// What a message says, with its tool calls.
fn message_text(message: &Message) -> String {
    let fields =
        ["content", "tool_calls"].iter().filter_map(|field| message.get(field)).filter(|value| !value.is_null());
    fields.map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned)).collect::<Vec<_>>().join("\n")
}
