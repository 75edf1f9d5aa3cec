//! What a user can say about sampling.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How completions are sampled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingOptions {
    /// Logits are divided by it; 0 takes the most probable token instead of drawing one.
    #[schemars(range(min = 0.0))]
    pub temperature: f64,
    /// Draw from the `top_k` most probable tokens only; 0 is off.
    pub top_k: usize,
    /// Draw from the most probable tokens that together reach this probability; 1 is off.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_p: f64,
    /// Draw from the tokens at least `min_p` times as probable as the most probable one; 0 is off.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_p: f64,
    /// Most tokens in a completion; forced tokens at its start count.
    #[schemars(range(min = 1))]
    pub max_new_tokens: usize,
    /// Fewest tokens in a completion: no token or string stops it before.
    pub min_new_tokens: usize,
    /// Strings that end a completion. The tokens up to the end of the string stay; the text is cut before it. The name of a special
    /// token, such as `<|im_end|>`, stands for the token too.
    pub stop: Vec<String>,
    /// Tokens that end a completion, besides the model's own end-of-text tokens.
    pub stop_token_ids: Vec<u32>,
    /// For each position, record this many of the most probable tokens; 0 is off.
    pub top_log_probs: usize,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            max_new_tokens: 256,
            min_new_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            top_log_probs: 0,
        }
    }
}

impl SamplingOptions {
    /// The most probable token at every position.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self { temperature: 0.0, max_new_tokens, ..Self::default() }
    }

    /// Whether tokens are chosen without drawing.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// The temperature at which log-probs are recorded: the sampling temperature, or 1 when it is 0. A trainer that
    /// recomputes the log-probs must use the same.
    pub fn log_prob_temperature(&self) -> f32 {
        if self.is_greedy() { 1.0 } else { self.temperature as f32 }
    }

    /// Refuses values that make no sense, naming the option.
    pub fn validate(&self) -> Result<()> {
        let refuse = |option: &'static str, got: &dyn std::fmt::Display, expected: &'static str| {
            Err(Error::Option { option, got: got.to_string(), expected })
        };
        // The f32 the kernels divide by must not be 0 where the f64 is not.
        if !(self.is_greedy() || self.temperature >= 1e-6) || !self.temperature.is_finite() {
            return refuse("temperature", &self.temperature, "0 (greedy) or a number from 1e-6");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", &self.top_p, "a number above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse("min_p", &self.min_p, "a number from 0 to 1");
        }
        if self.max_new_tokens == 0 {
            return refuse("max_new_tokens", &self.max_new_tokens, "at least 1");
        }
        if self.min_new_tokens > self.max_new_tokens {
            return refuse("min_new_tokens", &self.min_new_tokens, "at most max_new_tokens");
        }
        if self.stop.iter().any(String::is_empty) {
            return refuse("stop", &"an empty string", "strings of at least one character");
        }
        Ok(())
    }
}
