//! What a reward sees and what it says.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The columns of a prompt's row, with everything the data set carried along: the expected answer among them.
pub type Columns = serde_json::Map<String, serde_json::Value>;

/// The verdict beside a score's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The answer is right, or, for rewards that only shape the value, it was measured.
    Ok,
    /// The answer could be read and is not the expected one.
    Wrong,
    /// The answer could not be read: no number, a missing tag, unbalanced parentheses.
    Malformed,
    /// The verifier gave up: its step budget or its deadline ran out.
    Timeout,
    /// The verifier itself failed: an external command crashed or replied with something that is not a score.
    Error,
}

impl Status {
    /// Every status, in order of declaration.
    pub const ALL: [Self; 5] = [Self::Ok, Self::Wrong, Self::Malformed, Self::Timeout, Self::Error];

    /// The name used in files and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Wrong => "wrong",
            Self::Malformed => "malformed",
            Self::Timeout => "timeout",
            Self::Error => "error",
        }
    }
}

/// A reward's judgement of one answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The reward, always finite. Verifiers give 1 to a right answer and 0 to any other.
    pub value: f64,
    /// The verdict.
    pub status: Status,
    /// Named contributions to the value, to be logged; empty where the value says it all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<(String, f64)>,
    /// The turns of a conversation, where the environment judges them; what their rewards leave of the value is paid for the
    /// whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub turns: Vec<TurnScore>,
    /// Parts of the answer that are judged on their own, in the order of the text, none within another; empty where the answer is judged as a whole. With
    /// `credit = "span"` a policy gradient pays them, and not the value.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spans: Vec<SpanScore>,
}

/// A judgement of one part of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpanScore {
    /// Where it is: bytes of the completion's text.
    pub text: Range<usize>,
    /// What it is paid in place of the score's value, always finite.
    pub reward: f64,
}

/// An environment's judgement of one turn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TurnScore {
    /// Its reward, always finite.
    pub reward: f64,
    /// The verdict.
    pub status: Status,
    /// Tools that were called in it, or attempts at it.
    pub calls: usize,
    /// Those of them that failed: not readable, of a tool that does not exist, refused by the tool.
    pub failed_calls: usize,
}

impl Score {
    /// A score without parts.
    pub fn new(value: f64, status: Status) -> Self {
        Self { value, status, parts: Vec::new(), turns: Vec::new(), spans: Vec::new() }
    }

    /// 1 for [`Status::Ok`], 0 for every other status.
    pub fn verdict(status: Status) -> Self {
        Self::new(if status == Status::Ok { 1.0 } else { 0.0 }, status)
    }
}

/// One completion together with the row it answers. Prompt, completion and columns travel as one record, so that a
/// completion can't be scored against another row's answer.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// The prompt as the model saw it, rendered to text.
    pub prompt_text: &'a str,
    /// The completion as text, without special tokens.
    pub completion: &'a str,
    /// The completion's tokens.
    pub completion_ids: &'a [u32],
    /// The columns of the prompt's row.
    pub columns: &'a Columns,
}
