//! A penalty on long answers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Reward, RewardError};
use crate::score::{Answer, Score, Status};

/// Options of the `length` reward: the soft overlong punishment of DAPO (Yu et al., 2025, equation 13).
///
/// With `L` the completion's tokens, the value is 0 up to `max_length - buffer`, falls linearly to -1 at `max_length`, and
/// stays -1 beyond.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LengthOptions {
    /// Tokens from which on the penalty is full.
    pub max_length: usize,
    /// Tokens before `max_length` over which the penalty grows.
    pub buffer: usize,
}

/// See [`LengthOptions`].
pub struct LengthReward {
    name: String,
    options: LengthOptions,
}

impl LengthReward {
    /// The reward under a name.
    ///
    /// # Errors
    /// A buffer longer than `max_length`.
    pub fn new(name: String, options: LengthOptions) -> Result<Self, RewardError> {
        if options.buffer > options.max_length {
            let reason = format!("buffer is {}, expected at most max_length = {}", options.buffer, options.max_length);
            return Err(RewardError::Options { reward: name, reason });
        }
        Ok(Self { name, options })
    }

    /// The value for a completion of `length` tokens.
    pub fn value(&self, length: usize) -> f64 {
        let LengthOptions { max_length, buffer } = self.options;
        let free = max_length - buffer;
        if length <= free {
            0.0
        } else if length >= max_length {
            -1.0
        } else {
            -((length - free) as f64) / buffer as f64
        }
    }
}

impl Reward for LengthReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        Ok(answers.iter().map(|answer| Some(Score::new(self.value(answer.completion_ids.len()), Status::Ok))).collect())
    }
}
