//! Rewards written in any language: an external command over JSON lines.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Reward, RewardError};
use crate::score::{Answer, Score};

/// What to do when the command fails to score an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// Stop the run with an error.
    #[default]
    Stop,
    /// Give the answer value 0 with status `error` or `timeout`, and go on.
    Score,
}

/// Options of the `process` reward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProcessOptions {
    /// The program and its arguments. It is not run by a shell.
    pub command: Vec<String>,
    /// Seconds the command may take for one answer, measured from the previous reply.
    #[serde(default = "default_deadline")]
    pub deadline_seconds: f64,
    /// What to do when the command crashes, is late, or replies with something that is not a score.
    #[serde(default)]
    pub on_error: OnError,
}

fn default_deadline() -> f64 {
    10.0
}

/// See [`ProcessOptions`].
pub struct ProcessReward {
    name: String,
    options: ProcessOptions,
}

impl ProcessReward {
    /// The reward under a name.
    ///
    /// # Errors
    /// An empty command or an impossible deadline.
    pub fn new(name: String, options: ProcessOptions) -> Result<Self, RewardError> {
        Ok(Self { name, options })
    }
}

impl Reward for ProcessReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, _answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        Err(RewardError::Process {
            reward: self.name.clone(),
            command: self.options.command.join(" "),
            reason: String::new(),
        })
    }
}
