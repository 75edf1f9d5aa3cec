//! What a row means.
//!
//! TRL's row types, each plain (strings) or conversational (lists of messages), and the formats that are imported as
//! one of them: Alpaca, ShareGPT, OpenAI fine-tuning files, verl's RLVR rows, raw tokens.

mod fields;
mod import;

use std::fmt;

use model::chat::Message;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::read::names;
use crate::row::{Row, Source};
use fields::Fields;

/// The row types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `text`, or `messages`.
    LanguageModeling,
    /// `prompt` and `completion`.
    PromptCompletion,
    /// `prompt`, and whatever its reward needs.
    PromptOnly,
    /// `chosen` and `rejected`, with `prompt` or with what both begin with; `reference`, a third answer to learn by heart, if
    /// there is one.
    Preference,
    /// `prompt`, two or more `completions`, and their order: `ranking` (1 is the best) or `scores` (the largest is).
    Ranking,
    /// `prompt`, `completion` and whether it is good: `label`.
    UnpairedPreference,
    /// `prompt`, `completions` (steps) and whether each is right, or how probably: `labels`.
    Stepwise,
    /// `input_ids`, with `labels` or `completion_mask`.
    Tokens,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::LanguageModeling => "language modeling",
            Self::PromptCompletion => "prompt-completion",
            Self::PromptOnly => "prompt-only",
            Self::Preference => "preference",
            Self::Ranking => "ranking",
            Self::UnpairedPreference => "unpaired preference",
            Self::Stepwise => "stepwise supervision",
            Self::Tokens => "tokens",
        })
    }
}

/// Text as a string or as turns of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub enum Text {
    /// A string, to which no chat template is applied.
    Plain(String),
    /// Turns, to be rendered by the model's chat template.
    Messages(Vec<Message>),
}

/// What is in a sample.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Text to learn.
    LanguageModeling(Text),
    /// A prompt and the completion to learn.
    PromptCompletion {
        /// What is given.
        prompt: Text,
        /// What is to follow; plain if and only if the prompt is.
        completion: Text,
    },
    /// A prompt to complete.
    PromptOnly(Text),
    /// Two completions, one of them better.
    Preference {
        /// What is given.
        prompt: Text,
        /// The better completion.
        chosen: Text,
        /// The worse completion.
        rejected: Text,
        /// A completion that is right beyond comparison, for methods that learn it by heart.
        reference: Option<Text>,
    },
    /// Several completions in an order.
    Ranking {
        /// What is given.
        prompt: Text,
        /// The completions from best to worst, two or more.
        completions: Vec<Text>,
    },
    /// A completion that is good or bad.
    UnpairedPreference {
        /// What is given.
        prompt: Text,
        /// What follows.
        completion: Text,
        /// Whether it is good.
        label: bool,
    },
    /// A solution in steps.
    Stepwise {
        /// The problem.
        prompt: Text,
        /// The steps and how right each is, from 0 to 1.
        steps: Vec<(String, f64)>,
    },
    /// Token ids and which of them are to be learnt.
    Tokens {
        /// The tokens.
        ids: Vec<u32>,
        /// For each token, whether it is learnt.
        loss_mask: Vec<bool>,
    },
}

impl Content {
    /// What is given, in rows that have it. `messages` are a prompt where nothing is said to follow.
    pub fn prompt(&self) -> Option<&Text> {
        match self {
            Self::PromptOnly(prompt)
            | Self::PromptCompletion { prompt, .. }
            | Self::Preference { prompt, .. }
            | Self::Ranking { prompt, .. }
            | Self::UnpairedPreference { prompt, .. }
            | Self::Stepwise { prompt, .. }
            | Self::LanguageModeling(prompt @ Text::Messages(_)) => Some(prompt),
            Self::LanguageModeling(Text::Plain(_)) | Self::Tokens { .. } => None,
        }
    }

    /// The row type.
    pub fn kind(&self) -> Kind {
        match self {
            Self::LanguageModeling(_) => Kind::LanguageModeling,
            Self::PromptCompletion { .. } => Kind::PromptCompletion,
            Self::PromptOnly(_) => Kind::PromptOnly,
            Self::Preference { .. } => Kind::Preference,
            Self::Ranking { .. } => Kind::Ranking,
            Self::UnpairedPreference { .. } => Kind::UnpairedPreference,
            Self::Stepwise { .. } => Kind::Stepwise,
            Self::Tokens { .. } => Kind::Tokens,
        }
    }
}

/// A row and what it means.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// What the row means.
    pub content: Content,
    /// Descriptions of the tools the assistant may call, as JSON schemas, for the chat template.
    pub tools: Option<Vec<Value>>,
    /// All columns of the row, for rewards. verl's `reward_model.ground_truth` is also here as `answer`.
    pub columns: Map<String, Value>,
    /// Where the row comes from.
    pub source: Source,
}

impl Sample {
    /// Whether it holds completions to compare.
    pub fn is_pair(&self) -> bool {
        matches!(self.content.kind(), Kind::Preference | Kind::Ranking)
    }
}

/// Which columns hold the sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Tokens,
    Preference,
    Ranking,
    Stepwise,
    UnpairedPreference,
    PromptCompletion,
    Messages,
    ShareGpt,
    Text,
    Alpaca,
    Prompt,
}

/// The first column of a layout that is there decides, so the more telling come first.
const LAYOUTS: [(&str, Layout); 11] = [
    ("input_ids", Layout::Tokens),
    ("chosen", Layout::Preference),
    ("rejected", Layout::Preference),
    ("completions", Layout::Stepwise),
    ("completion", Layout::PromptCompletion),
    ("messages", Layout::Messages),
    ("conversations", Layout::ShareGpt),
    ("text", Layout::Text),
    ("instruction", Layout::Alpaca),
    ("prompt", Layout::Prompt),
    ("label", Layout::UnpairedPreference),
];

impl Layout {
    fn of(row: &Row) -> Result<Self> {
        let found = LAYOUTS.into_iter().find(|(column, _)| row.get(column).is_some());
        match found {
            Some((_, Self::PromptCompletion)) if row.get("label").is_some() => Ok(Self::UnpairedPreference),
            Some((_, Self::Stepwise)) if row.get("labels").is_none() && ranks(row).is_some() => Ok(Self::Ranking),
            Some((_, layout)) => Ok(layout),
            None => Err(unknown(row)),
        }
    }
}

/// The column that orders completions.
fn ranks(row: &Row) -> Option<&'static str> {
    ["ranking", "scores"].into_iter().find(|column| row.get(column).is_some())
}

/// The error for a row without any column that would tell its type.
fn unknown(row: &Row) -> Error {
    let reason = format!("no column tells what the row is; its columns are {}", names(row));
    let expected = LAYOUTS.map(|(column, _)| column);
    let near = row.columns.keys().find_map(|column| Some((column, base::hint::nearest(column, expected)?)));
    Error::row(&row.source, reason).with_hint(match near {
        Some((column, near)) => {
            format!("did you mean {near} by {column}? columns = {{ {near} = \"{column}\" }} says so")
        }
        None => {
            "expected one of text, messages, prompt, completion, chosen and rejected, completions, input_ids".into()
        }
    })
}

/// Recognises rows. All must be of the same type.
pub fn parse(rows: Vec<Row>) -> Result<Vec<Sample>> {
    let mut first: Option<(Kind, Source)> = None;
    rows.into_iter()
        .map(|row| {
            let sample = parse_row(row)?;
            let kind = sample.content.kind();
            match &first {
                None => first = Some((kind, sample.source.clone())),
                Some((expected, source)) if *expected != kind => {
                    let reason = format!("a {kind} row among {expected} rows ({source} is the first)");
                    return Err(Error::row(&sample.source, reason));
                }
                Some(_) => {}
            }
            Ok(sample)
        })
        .collect()
}

/// Recognises one row.
pub fn parse_row(row: Row) -> Result<Sample> {
    let fields = Fields::new(&row);
    let content = match Layout::of(&row)? {
        Layout::Tokens => fields.tokens()?,
        Layout::Preference => fields.preference()?,
        Layout::Ranking => fields.ranking(ranks(&row).unwrap_or_default())?,
        Layout::Stepwise => fields.stepwise()?,
        Layout::UnpairedPreference => {
            let (prompt, completion) = fields.prompt_and("completion")?;
            Content::UnpairedPreference { prompt, completion, label: fields.flag("label")? }
        }
        Layout::PromptCompletion => {
            let (prompt, completion) = fields.prompt_and("completion")?;
            Content::PromptCompletion { prompt, completion }
        }
        Layout::Messages => Content::LanguageModeling(Text::Messages(fields.messages("messages")?)),
        Layout::Text => Content::LanguageModeling(Text::Plain(fields.string("text")?.to_owned())),
        Layout::Prompt => Content::PromptOnly(fields.text("prompt")?),
        Layout::ShareGpt => import::share_gpt(&fields)?,
        Layout::Alpaca => import::alpaca(&fields)?,
    };
    let tools = fields.tools()?;
    let answer = import::verl_answer(&fields)?;
    let Row { source, mut columns } = row;
    if let Some(answer) = answer {
        columns.entry("answer").or_insert(answer);
    }
    Ok(Sample { content, tools, columns, source })
}
