//! What can go wrong while generating.

use base::Hint;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong while generating.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A sampling option outside its range.
    #[error("{option} is {got}, expected {expected}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its value.
        got: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A request that cannot be served, and why.
    #[error("request {index} (prompt {prompt_id}, sample {sample}): {reason}")]
    Request {
        /// Position in the list of requests.
        index: usize,
        /// The prompt's id.
        prompt_id: u32,
        /// The sample's number.
        sample: u32,
        /// What is wrong with it.
        reason: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Logits from which no token can be drawn.
    #[error("prompt {prompt_id}, sample {sample}, token {position}: {reason}")]
    Logits {
        /// The prompt's id.
        prompt_id: u32,
        /// The sample's number.
        sample: u32,
        /// Position in the completion.
        position: usize,
        /// What is wrong with them.
        reason: String,
    },
    /// A list of conversations' openings that does not match the requests.
    #[error("{openings} openings of conversations for {requests} requests")]
    Openings {
        /// Openings given.
        openings: usize,
        /// Requests given.
        requests: usize,
    },
    /// The other side of a conversation failed.
    #[error("prompt {prompt_id}, sample {sample}, turn {turn}: {source}")]
    Response {
        /// The prompt's id.
        prompt_id: u32,
        /// The sample's number.
        sample: u32,
        /// The turn that was to be answered, from 0.
        turn: usize,
        /// What happened.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A value model that cannot guide, and why.
    #[error("the value model: {reason}")]
    ValueModel {
        /// What is wrong with it.
        reason: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Generation was cancelled.
    #[error("generation was cancelled")]
    Cancelled,
    /// The model refused.
    #[error(transparent)]
    Model(#[from] model::Error),
}

impl Hint for Error {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Request { hint, .. } | Self::ValueModel { hint, .. } => hint.clone(),
            Self::Logits { .. } => Some(
                "the weights may have diverged: lower the learning rate, or start from an earlier checkpoint".into(),
            ),
            Self::Model(error) => error.hint(),
            Self::Option { .. } | Self::Openings { .. } | Self::Response { .. } | Self::Cancelled => None,
        }
    }
}
