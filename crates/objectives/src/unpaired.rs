//! Preference optimisation from single judgements: each completion was found good or bad, and has no partner.
//!
//! ```text
//! h(y) = Σ_t log π(y_t) - Σ_t log ρ(y_t)               the log-ratio to the reference
//! u_i  = ± β (h(y_i) - z)                              + for a good completion, - for a bad one
//! L    = Σ_i w_i λ_i v(u_i)                            λ_i: desirable_weight or undesirable_weight, w_i: 1/n
//! ```
//!
//! | method | baseline `z` | `v(u)` | source |
//! | --- | --- | --- | --- |
//! | KTO | `max(0, mean h of mismatched completions)` | `1 - σ(u)` | arXiv 2402.01306 |
//! | APO-zero, unpaired | 0 | `1 - σ(u)` | arXiv 2408.06266 |
//! | BCO | running mean of all `h` so far | `-log σ(u)` | arXiv 2404.04656 |
//!
//! A mismatched completion is that of another row, after this row's prompt: its mean log-ratio estimates how far the policy
//! is from the reference. BCO may weigh bad completions by their prompts ([`mod@crate::density_ratio`]). The baseline is one number for the whole step, and a constant: no gradient flows through it.
//!
//! Deviations:
//! 1. TRL estimates KTO's baseline per micro-batch and rank; here it is that of the step.
//!
//! Metrics, named as TRL names them; "chosen" are the good completions, "rejected" the bad ones:
//! - `kl`: KTO's baseline. `delta`: BCO's, times β.
//! - `rewards/chosen`, `rewards/rejected`: mean `β h`.
//! - `logps/chosen`, `logps/rejected`: mean log-probability of the completion.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{Error, Loss, Reduce, Result, Statistic, check_length, constant, per_token, values};
use crate::scalar::{log_sigmoid, sequence_sums, sigmoid};

/// The parts of the objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct UnpairedOptions {
    /// What a log-ratio is compared with.
    pub baseline: UnpairedBaseline,
    /// What the comparison costs.
    pub utility: Utility,
    /// How strongly the policy is held to the reference; the scale of rewards.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub beta: f64,
    /// Weight of the good completions.
    #[schemars(range(min = 0))]
    pub desirable_weight: f64,
    /// Weight of the bad completions.
    #[schemars(range(min = 0))]
    pub undesirable_weight: f64,
}

impl Default for UnpairedOptions {
    fn default() -> Self {
        Self {
            baseline: UnpairedBaseline::Kl,
            utility: Utility::Sigmoid,
            beta: 0.1,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
        }
    }
}

impl UnpairedOptions {
    /// Refuses values that make no sense, naming the option.
    pub fn validate(&self) -> Result<()> {
        if !(self.beta.is_finite() && self.beta > 0.0) {
            return Err(Error::Range { what: "beta", got: self.beta, expected: "a number above 0" });
        }
        for (what, got) in
            [("desirable_weight", self.desirable_weight), ("undesirable_weight", self.undesirable_weight)]
        {
            if !(got.is_finite() && got >= 0.0) {
                return Err(Error::Range { what, got, expected: "a number, at least 0" });
            }
        }
        Ok(())
    }

    /// Whether mismatched completions are needed.
    pub fn needs_mismatched(&self) -> bool {
        self.baseline == UnpairedBaseline::Kl
    }

    /// Whether the loss of a completion depends on the others of the batch, which then have to be given all at once.
    pub fn compares_completions(&self) -> bool {
        self.baseline == UnpairedBaseline::RunningMean
    }
}

/// What a log-ratio is compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UnpairedBaseline {
    /// Nothing.
    Zero,
    /// The mean log-ratio of mismatched completions, where it is above 0 (KTO).
    #[default]
    Kl,
    /// The mean log-ratio of all completions since the stage began, those of the step included (BCO).
    RunningMean,
}

/// What the comparison costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Utility {
    /// `1 - σ(u)`: levels off at both ends.
    #[default]
    Sigmoid,
    /// `-log σ(u)`: the loss of a binary classifier.
    LogSigmoid,
}

/// The mean of the log-ratios seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunningMean {
    /// How many there were.
    pub count: u64,
    /// Their mean; 0 of none.
    pub mean: f64,
}

impl RunningMean {
    /// The mean with more values.
    #[must_use]
    pub fn with(self, values: &[f64]) -> Self {
        let count = self.count + values.len() as u64;
        let difference: f64 = values.iter().map(|value| value - self.mean).sum();
        Self { count, mean: self.mean + difference / count.max(1) as f64 }
    }
}

/// The loss tokens of some judged completions; lists have one entry per loss token unless they say otherwise.
#[derive(Debug)]
pub struct UnpairedBatch {
    /// log π(y_t), `[N]`, tracking gradients.
    pub log_probs: Tensor,
    /// log ρ(y_t) of the reference model, `[N]`.
    pub reference_log_probs: Tensor,
    /// The sequence each token belongs to; tokens of one sequence are adjacent. A sequence may have none.
    pub sequence: Vec<u32>,
    /// For each sequence, whether it is good.
    pub good: Vec<bool>,
    /// The weight of each sequence, `[S]`, with its global denominator inside: 1/n.
    pub weights: Tensor,
    /// The log-ratios of all mismatched completions of the step, one each; needed where the baseline is `kl`.
    pub mismatched: Vec<f64>,
    /// The log-ratios of earlier steps.
    pub running: RunningMean,
}

/// The value of the objective, and what the next step needs of this one.
#[derive(Debug)]
pub struct Unpaired {
    /// One weighted loss for each sequence.
    pub loss: Loss,
    /// The log-ratios of all steps so far.
    pub running: RunningMean,
}

/// The loss of unpaired preference optimisation.
///
/// With [`UnpairedOptions::compares_completions`], the batch must be the whole one.
///
/// Fails when the inputs differ in length, or when the baseline needs mismatched completions and there are none.
pub fn unpaired(options: &UnpairedOptions, batch: &UnpairedBatch) -> Result<Unpaired> {
    let (tokens, sequences) = (batch.log_probs.elem_count(), batch.good.len());
    let log_probs = per_token("log_probs", &batch.log_probs, tokens)?;
    let reference = constant("reference_log_probs", &batch.reference_log_probs, tokens)?;
    let weights = constant("weights", &batch.weights, sequences)?;
    check_length("sequence", batch.sequence.len(), tokens)?;
    if sequences == 0 {
        return Ok(Unpaired { loss: Loss { per_token: weights, statistics: Vec::new() }, running: batch.running });
    }
    let policy = sequence_sums(&log_probs, &batch.sequence, sequences)?;
    let ratio = policy.sub(&sequence_sums(&reference, &batch.sequence, sequences)?)?;
    let ratios = values(&ratio)?;

    let running = batch.running.with(&ratios);
    let mut statistics = Vec::new();
    let mut log = |name, values: Vec<f64>| statistics.push(Statistic { name, values, reduce: Reduce::Mean });
    let baseline = match options.baseline {
        UnpairedBaseline::Zero => 0.0,
        UnpairedBaseline::Kl if batch.mismatched.is_empty() => {
            return Err(Error::Missing { what: "mismatched", why: "baseline is kl" });
        }
        UnpairedBaseline::Kl => {
            let mean = batch.mismatched.iter().sum::<f64>() / batch.mismatched.len() as f64;
            log("kl", vec![mean.max(0.0)]);
            mean.max(0.0)
        }
        UnpairedBaseline::RunningMean => {
            log("delta", vec![options.beta * running.mean]);
            running.mean
        }
    };

    let each = |good: f64, bad: f64| {
        let values: Vec<f64> = batch.good.iter().map(|&is_good| if is_good { good } else { bad }).collect();
        Tensor::new(values, ratio.device())
    };
    let u = ratio.affine(options.beta, -options.beta * baseline)?.mul(&each(1.0, -1.0)?)?;
    let loss = match options.utility {
        Utility::Sigmoid => sigmoid(&u.neg()?)?,
        Utility::LogSigmoid => log_sigmoid(&u)?.neg()?,
    };
    let weights = weights.mul(&each(options.desirable_weight, options.undesirable_weight)?)?;

    let log_probs = values(&policy)?;
    let rewards: Vec<f64> = ratios.iter().map(|ratio| options.beta * ratio).collect();
    let of = |values: &[f64], good: bool| -> Vec<f64> {
        values.iter().zip(&batch.good).filter(|(_, found)| **found == good).map(|(&value, _)| value).collect()
    };
    log("rewards/chosen", of(&rewards, true));
    log("rewards/rejected", of(&rewards, false));
    log("logps/chosen", of(&log_probs, true));
    log("logps/rejected", of(&log_probs, false));
    Ok(Unpaired { loss: Loss { per_token: loss.mul(&weights)?, statistics }, running })
}
