//! Partners: other models, or scripts in their place, that answer messages with text.
//!
//! A partner judges answers ([`crate::reward::judge`]). What a remote model says is not a function of a seed: a run with one
//! repeats to the same bytes only if the model does.

pub mod remote;
pub mod scripted;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use remote::RemoteOptions;
pub use scripted::ScriptedOptions;

/// What somebody said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Who: `system`, `user` or `assistant`, the partner itself.
    pub role: String,
    /// What.
    pub content: String,
}

impl Line {
    /// A line of this role.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A partner's answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reply {
    /// The text.
    pub text: String,
    /// Whether the answer was cut off for its length.
    pub truncated: bool,
}

/// Something that answers messages.
pub trait Partner: Send + Sync {
    /// Answers the last of these lines.
    ///
    /// # Errors
    /// See [`PartnerError`].
    fn reply(&self, lines: &[Line]) -> Result<Reply, PartnerError>;

    /// Questions that may be asked at the same time.
    fn concurrency(&self) -> usize {
        1
    }
}

/// Asks a partner several things, as many at a time as it allows. The answers come in order.
pub fn ask_all(partner: &dyn Partner, questions: &[Vec<Line>]) -> Vec<Result<Reply, PartnerError>> {
    let next = AtomicUsize::new(0);
    let answers: Vec<Mutex<Option<Result<Reply, PartnerError>>>> = questions.iter().map(|_| Mutex::new(None)).collect();
    let work = || {
        while let Some((question, answer)) = {
            let index = next.fetch_add(1, Ordering::Relaxed);
            questions.get(index).zip(answers.get(index))
        } {
            let reply = partner.reply(question);
            *answer.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(reply);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..partner.concurrency().min(questions.len()) {
            scope.spawn(work);
        }
        work();
    });
    let answered = |answer: Mutex<Option<_>>| answer.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    answers.into_iter().filter_map(answered).collect()
}

/// A partner and its options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum PartnerConfig {
    /// Fixed answers to what a message contains.
    Scripted(ScriptedOptions),
    /// A model behind an OpenAI-compatible interface over HTTP.
    Remote(RemoteOptions),
}

impl PartnerConfig {
    /// Makes the partner.
    ///
    /// # Errors
    /// An option with an impossible value. A remote model is only asked by the first message.
    pub fn build(&self) -> Result<Box<dyn Partner>, PartnerError> {
        Ok(match self {
            Self::Scripted(options) => Box::new(scripted::Scripted::new(options.clone())),
            Self::Remote(options) => Box::new(remote::Remote::new(options.clone())?),
        })
    }
}

/// Why a partner did not answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PartnerError {
    /// An option has an impossible value.
    #[error("partner: {0}")]
    Options(String),
    /// The environment variable that should hold the API key is not set.
    #[error("the environment variable {variable}, which should hold the API key of {url}, is not set")]
    Key {
        /// The variable.
        variable: String,
        /// The server.
        url: String,
    },
    /// The server refuses the request, and would refuse it again.
    #[error("{url} answers with status {status}: {message}")]
    Refused {
        /// The address asked.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What the server says.
        message: String,
    },
    /// The server could not be reached, or failed, in every attempt.
    #[error("{url} gave no answer in {attempts} attempts over {seconds:.1} s; the last: {reason}")]
    Unreachable {
        /// The address asked.
        url: String,
        /// How often it was tried.
        attempts: u32,
        /// For how long.
        seconds: f64,
        /// What happened in the last attempt.
        reason: String,
    },
    /// The server answered with something that is no completion.
    #[error("{url} answers with something that is no chat completion: {reason}")]
    Malformed {
        /// The address asked.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A judge replied without a score.
    #[error("the judge's reply{} has no {expected}: {reply:?}", if *.truncated { ", cut off at `max_tokens`," } else { "" })]
    NoScore {
        /// What was asked for.
        expected: String,
        /// The beginning of the reply.
        reply: String,
        /// Whether the reply was cut off for its length.
        truncated: bool,
    },
    /// A script has no answer.
    #[error("the script has no rule for {0:?}")]
    NoRule(String),
}

impl base::Hint for PartnerError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Options(_) => "`posttrain config explain rewards` lists every option".into(),
            Self::Key { variable, .. } => format!("`export {variable}=...`, or leave out `api_key_variable` for a server without keys"),
            Self::Refused { status: 401 | 403, .. } => "check the API key in the variable that `api_key_variable` names".into(),
            Self::Refused { status: 404, .. } => {
                "check `base_url`, which usually ends with /v1, and `model`: `curl BASE_URL/models` lists what is served".into()
            }
            Self::Refused { .. } => "check `base_url` and `model`".into(),
            Self::Unreachable { .. } => {
                "check that the server runs and `base_url`; for a slow one raise `timeout_seconds` and `deadline_seconds`".into()
            }
            Self::Malformed { .. } => "`base_url` must lead to an OpenAI-compatible server; it usually ends with /v1".into(),
            Self::NoScore { truncated: true, .. } => "raise the partner's `max_tokens`, or set `on_error = \"score\"` to go on".into(),
            Self::NoScore { .. } => "make the template ask for it more clearly, or set `on_error = \"score\"` to go on".into(),
            Self::NoRule(_) => "give the script an answer for everything else: `otherwise`".into(),
        })
    }
}
