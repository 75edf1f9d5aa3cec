//! What is asked of the generator and what it answers.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::conversation::Fidelity;

/// One completion that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Names the prompt in random draws.
    pub prompt_id: u32,
    /// Names the sample among those of its prompt in random draws.
    pub sample: u32,
    /// The prompt's tokens; requests with equal prompts share their computation.
    pub prompt: Arc<[u32]>,
    /// The completion's first tokens, which are given rather than sampled: a forced opening, or what an interrupted
    /// generation had produced. Often empty.
    pub prefix: Vec<u32>,
}

impl Request {
    /// Samples `0..count` of a prompt, nothing forced.
    pub fn samples(prompt_id: u32, prompt: &Arc<[u32]>, count: u32) -> impl Iterator<Item = Self> + '_ {
        (0..count).map(move |sample| Self { prompt_id, sample, prompt: Arc::clone(prompt), prefix: Vec::new() })
    }
}

/// Why a completion, or a turn of it, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// By a stop token or a stop string; a conversation, by its other side.
    Stop,
    /// By reaching the most tokens, or turns, allowed.
    Length,
}

/// One turn of the model within a completion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Its tokens in the completion, forced ones at its start included. Between turns lies what the other side says.
    pub tokens: Range<usize>,
    /// Why it ended.
    pub finish: Finish,
}

/// A conversation as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transcript {
    /// What follows the prompt, with the marks of the turns.
    pub text: String,
    /// How the tokens compare with those that the chat template gives for the text.
    pub fidelity: Fidelity,
}

/// One completion, in tokens from start to end. The lists have one entry per token of the completion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Episode {
    /// As in the request.
    pub prompt_id: u32,
    /// As in the request.
    pub sample: u32,
    /// As in the request.
    #[serde(with = "shared")]
    pub prompt: Arc<[u32]>,
    /// The tokens, with the one that ended it: a stop token, or the last token of a stop string. In a conversation, all
    /// tokens after the prompt.
    pub completion: Vec<u32>,
    /// True for sampled tokens, false for forced ones and for what the other side of a conversation says.
    pub loss_mask: Vec<bool>,
    /// Log-probs under softmax(logits / temperature) over the whole vocabulary, before hooks and filters. A greedy
    /// completion has those of temperature 1. 0 for what the other side of a conversation says.
    pub log_probs: Vec<f32>,
    /// Log-probs under the distribution the token was drawn from, after hooks, bans, top-k, top-p and min-p; 0 for a
    /// greedy choice. Forced tokens, which were not drawn, repeat `log_probs`.
    pub filtered_log_probs: Vec<f32>,
    /// For each token the most probable tokens at its position and their log-probs, falling, under the distribution of
    /// `log_probs`; empty unless asked for.
    pub top_log_probs: Vec<Vec<(u32, f32)>>,
    /// Why it ended.
    pub finish: Finish,
    /// The turns of the model: one, except in conversations.
    pub turns: Vec<Turn>,
    /// Conversations as text.
    pub transcript: Option<Transcript>,
    /// The completion as text, without special tokens and cut before a stop string; in a conversation, its last turn. A
    /// view: nothing is ever encoded from it.
    pub text: String,
}

impl Episode {
    /// Of values that there are of every token of the completion, those of the sampled ones, in order.
    pub fn of_sampled<'a>(&'a self, values: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        values.iter().zip(&self.loss_mask).filter(|(_, sampled)| **sampled).map(|(&value, _)| value)
    }
}

/// Tokens that several owners share, written down like a list of one's own.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(tokens: &Arc<[u32]>, serializer: S) -> Result<S::Ok, S::Error> {
        tokens.as_ref().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<[u32]>, D::Error> {
        Vec::deserialize(deserializer).map(Arc::from)
    }
}
