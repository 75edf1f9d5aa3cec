//! Group relative policy optimisation: PPO's clipped ratio with the samples of one prompt as each other's baseline.
//!
//! ```text
//! r_t = π(y_t) / π_old(y_t)
//! s_t = min(π_old(y_t) / π_sampler(y_t), C)                1 where the sampler is π_old
//! L   = Σ_t w_t [ - s_t min(r_t A, clip(r_t, 1 - ε, 1 + ε_high) A) + β KL_t ]
//! ```
//!
//! GRPO: arXiv 2402.03300, equation 3. `A` is the advantage of the token's sequence ([`crate::Advantage`]), `w` the
//! weight of the token ([`crate::Aggregation`]), `KL` the estimate of the divergence from the reference
//! ([`KlEstimator`]). `s` corrects for a sampler whose weights are not those of π_old, as truncated importance sampling (Yao et
//! al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025); it is a constant. With ε, ε_high, β and the parts chosen freely, DAPO's and Dr. GRPO's losses are settings of this.
//!
//! Deviations from the paper:
//! 1. Tokens of the batch count the same by default (`aggregation = "token"`, DAPO, and TRL's default); the paper's
//!    average over sequences is `aggregation = "sequence"`.
//! 2. β is 0 by default, as in TRL; the paper has 0.04.
//! 3. The standard deviation of a group gets [`crate::advantage::EPSILON`] added; a group of equal rewards gets
//!    advantage 0.
//! 4. Log-ratios are bounded by 20 before the exponential, so that no ratio is infinite.
//!
//! Metrics, named as TRL names them; a token "is clipped" where the clip changed its loss:
//! - `entropy`: mean entropy of the policy at the loss tokens, in nats.
//! - `kl`: mean of the divergence estimate over the loss tokens; absent when β is 0.
//! - `clip_ratio/low_mean`, `clip_ratio/high_mean`: fraction of tokens held at `1 - ε` (A < 0) and at `1 + ε_high`
//!   (A > 0). On the first optimisation pass both are exactly 0.
//! - `clip_ratio/region_mean`: fraction of tokens held at either bound.
//! - `clip_ratio/low_min`, `clip_ratio/high_max`: the same fractions in the sequence where they are least and most.
//! - `sampling/importance_sampling_ratio/min|mean|max`: of `s` over the loss tokens; absent where the sampler is π_old.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{Error, Loss, Reduce, Result, Statistic, bounded_exp, check_length, constant, per_token, values};
use crate::{Advantage, Aggregation, Clip, KlEstimator};

/// The parts of the objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GrpoOptions {
    /// How the rewards of a group become advantages.
    pub advantage: Advantage,
    /// How much each token counts.
    pub aggregation: Aggregation,
    /// How far the ratio of a token may fall below 1 before it is clipped.
    pub epsilon: f64,
    /// How far the ratio may rise above 1; `epsilon` when absent.
    pub epsilon_high: Option<f64>,
    /// Weight of the divergence from the reference model in the loss; 0 needs no reference model.
    pub beta: f64,
    /// The estimate of that divergence.
    pub kl: KlEstimator,
    /// Where the sampler's weights are not the trainer's (`rollout_weights = "int8"`): a token counts by how much more
    /// probable it is to the trainer than to the sampler, at most this much.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub importance_sampling_clip_max: f64,
}

impl Default for GrpoOptions {
    fn default() -> Self {
        Self {
            advantage: Advantage::GroupMeanStd,
            aggregation: Aggregation::Token,
            epsilon: 0.2,
            epsilon_high: None,
            beta: 0.0,
            kl: KlEstimator::K3,
            importance_sampling_clip_max: 2.0,
        }
    }
}

impl GrpoOptions {
    /// The room of the ratio.
    pub fn clip(&self) -> Clip {
        Clip { low: self.epsilon, high: self.epsilon_high.unwrap_or(self.epsilon) }
    }

    /// Whether the log-probs of a reference model are needed.
    pub fn needs_reference(&self) -> bool {
        self.beta != 0.0
    }

    /// Refuses values that make no sense, naming the option.
    pub fn validate(&self) -> Result<()> {
        let Clip { low, high } = self.clip();
        if !(0.0..1.0).contains(&low) {
            return Err(Error::Range { what: "epsilon", got: low, expected: "at least 0 and below 1" });
        }
        if !(high.is_finite() && high >= 0.0) {
            return Err(Error::Range { what: "epsilon_high", got: high, expected: "a number, at least 0" });
        }
        if !(self.beta.is_finite() && self.beta >= 0.0) {
            return Err(Error::Range { what: "beta", got: self.beta, expected: "a number, at least 0" });
        }
        let most = self.importance_sampling_clip_max;
        if !(most.is_finite() && most > 0.0) {
            return Err(Error::Range { what: "importance_sampling_clip_max", got: most, expected: "a number above 0" });
        }
        Ok(())
    }
}

/// The loss tokens of a micro-batch of sampled completions; every list has one entry per loss token.
#[derive(Debug)]
pub struct PolicyBatch {
    /// log π(y_t) of the policy being trained, `[N]`, tracking gradients.
    pub log_probs: Tensor,
    /// log π_old(y_t) of the policy at the time of sampling, `[N]`.
    pub old_log_probs: Tensor,
    /// log π_sampler(y_t) of what the tokens were drawn from, `[N]`, where that is not π_old.
    pub sampling_log_probs: Option<Tensor>,
    /// log ρ(y_t) of the reference model, `[N]`; needed when β is not 0.
    pub reference_log_probs: Option<Tensor>,
    /// The entropy of the policy at each token, `[N]`, where it was computed.
    pub entropy: Option<Tensor>,
    /// The advantage of each token, `[N]`.
    pub advantages: Tensor,
    /// The weight of each token, with its global denominator inside, `[N]`.
    pub weights: Tensor,
    /// The sequence each token belongs to; tokens of one sequence are adjacent.
    pub sequence: Vec<u32>,
}

/// The loss of group relative policy optimisation.
///
/// Fails when the inputs differ in length, or when β is not 0 and the reference is missing.
pub fn grpo(options: &GrpoOptions, batch: &PolicyBatch) -> Result<Loss> {
    let tokens = batch.log_probs.elem_count();
    let log_probs = per_token("log_probs", &batch.log_probs, tokens)?;
    let old_log_probs = constant("old_log_probs", &batch.old_log_probs, tokens)?;
    let advantages = constant("advantages", &batch.advantages, tokens)?;
    let weights = constant("weights", &batch.weights, tokens)?;
    check_length("sequence", batch.sequence.len(), tokens)?;
    let mut statistics = Vec::new();

    let ratio = bounded_exp(&log_probs.sub(&old_log_probs)?)?;
    let clipped = options.clip().apply(&ratio, &advantages)?;
    let mut loss = clipped.objective.neg()?;

    if let Some(sampling) = &batch.sampling_log_probs {
        let sampling = constant("sampling_log_probs", sampling, tokens)?;
        let correction = bounded_exp(&old_log_probs.sub(&sampling)?)?.minimum(options.importance_sampling_clip_max)?;
        let all = values(&correction)?;
        statistics.extend([
            Statistic { name: "sampling/importance_sampling_ratio/min", values: all.clone(), reduce: Reduce::Min },
            Statistic { name: "sampling/importance_sampling_ratio/mean", values: all.clone(), reduce: Reduce::Mean },
            Statistic { name: "sampling/importance_sampling_ratio/max", values: all, reduce: Reduce::Max },
        ]);
        loss = loss.mul(&correction)?;
    }

    if options.needs_reference() {
        let reference = batch.reference_log_probs.as_ref();
        let reference = reference.ok_or(Error::Missing { what: "reference_log_probs", why: "beta is not 0" })?;
        let reference = constant("reference_log_probs", reference, tokens)?;
        let kl = options.kl.per_token(&log_probs, &reference)?;
        statistics.push(Statistic { name: "kl", values: values(&kl)?, reduce: Reduce::Mean });
        loss = loss.add(&kl.affine(options.beta, 0.0)?)?;
    }

    if let Some(entropy) = &batch.entropy {
        let entropy = constant("entropy", entropy, tokens)?;
        statistics.push(Statistic { name: "entropy", values: values(&entropy)?, reduce: Reduce::Mean });
    }
    let (low, high) = (values(&clipped.low)?, values(&clipped.high)?);
    let region = low.iter().zip(&high).map(|(low, high)| low + high).collect();
    let low_of_sequences = sequence_means(&low, &batch.sequence);
    let high_of_sequences = sequence_means(&high, &batch.sequence);
    statistics.extend([
        Statistic { name: "clip_ratio/low_mean", values: low, reduce: Reduce::Mean },
        Statistic { name: "clip_ratio/low_min", values: low_of_sequences, reduce: Reduce::Min },
        Statistic { name: "clip_ratio/high_mean", values: high, reduce: Reduce::Mean },
        Statistic { name: "clip_ratio/high_max", values: high_of_sequences, reduce: Reduce::Max },
        Statistic { name: "clip_ratio/region_mean", values: region, reduce: Reduce::Mean },
    ]);
    Ok(Loss { per_token: loss.mul(&weights)?, statistics })
}

/// The mean of each sequence's values, in order.
fn sequence_means(values: &[f64], sequence: &[u32]) -> Vec<f64> {
    let mut rest = values;
    sequence
        .chunk_by(|a, b| a == b)
        .map(|tokens| {
            let own;
            (own, rest) = rest.split_at(tokens.len());
            own.iter().sum::<f64>() / own.len() as f64
        })
        .collect()
}
