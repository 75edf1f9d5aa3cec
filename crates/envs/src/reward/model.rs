//! Rewards that are models: their options. What they compute lies above this crate, which knows no models: whoever loads them passes a
//! maker to [`RewardConfig::build_with`](super::RewardConfig::build_with).

use objectives::reward::{Ensemble, StepAggregation};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RewardError;

/// Options of the `model` reward: what a reward model, a process reward model or several of them say about the answer.
///
/// The answer is rendered after its row's prompt by the template of each model, so that the models need not share a tokenizer with the one
/// that is trained. A process reward model is asked after every step of the answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelRewardOptions {
    /// Folders of models with a score head: runs of `[reward_model]` or `[process_reward]`, or what transformers saved. More than one
    /// are an ensemble.
    pub models: Vec<String>,
    /// How the scores of an ensemble become one: `mean`, `min` or `uncertainty_penalized`.
    pub ensemble: Ensemble,
    /// What a unit of variance between the models costs, for `uncertainty_penalized`.
    pub uncertainty_penalty: f64,
    /// The value is the probability of being right, the logistic function of the score, rather than the score itself. Process reward models
    /// always give probabilities.
    pub as_probability: bool,
    /// How the probabilities of the steps become one, for process reward models: `min`, `product`, `last` or `mean`.
    pub step_aggregation: StepAggregation,
    /// Text that ends a step, for process reward models: the `step_separator` they were trained with.
    pub step_separator: String,
    /// Rows computed at once. Has no influence on the result.
    pub micro_batch_tokens: usize,
}

impl Default for ModelRewardOptions {
    fn default() -> Self {
        Self {
            models: Vec::new(),
            ensemble: Ensemble::default(),
            uncertainty_penalty: 1.0,
            as_probability: false,
            step_aggregation: StepAggregation::default(),
            step_separator: "\n".into(),
            micro_batch_tokens: 2048,
        }
    }
}

impl ModelRewardOptions {
    /// Refuses values that mean nothing, for the reward of this name.
    ///
    /// # Errors
    /// The option, what it is, and what it may be.
    pub fn validate(&self, reward: &str) -> Result<(), RewardError> {
        let refuse = |reason: String| Err(RewardError::Options { reward: reward.to_owned(), reason });
        if self.models.is_empty() {
            return refuse("models is empty, expected at least one folder".into());
        }
        if self.step_separator.is_empty() {
            return refuse("step_separator is empty, expected at least one character".into());
        }
        if self.micro_batch_tokens == 0 {
            return refuse("micro_batch_tokens is 0, expected at least 1".into());
        }
        let penalty = self.uncertainty_penalty;
        if !(penalty.is_finite() && penalty >= 0.0) {
            return refuse(format!("uncertainty_penalty is {penalty}, expected a number from 0 up"));
        }
        Ok(())
    }
}
