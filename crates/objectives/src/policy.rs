//! Policy gradients: one loss made of parts, of which every published name is a choice.
//!
//! ```text
//! r_t = π(y_t) / π_old(y_t)                                 at the level of a token or of the sequence
//! c_t = π_old(y_t) / π_sampler(y_t), bounded                1 where the sampler is π_old
//! L   = Σ_t w_t [ - m_t c_t J(r_t, A_t) + β KL_t ] - c_H mean_t H_t
//! ```
//!
//! | part | what it decides | options |
//! | --- | --- | --- |
//! | `A` ([`mod@crate::advantage`]) | what a token is paid | `baseline`, `scale_rewards`, `credit`, `gamma`, `lam`, `whiten_advantages` |
//! | `r` ([`mod@crate::ratio`]) | how off-policy it is | `importance_sampling_level` |
//! | `J` ([`mod@crate::clip`]) | the surrogate: `min(r A, clip(r) A)` and others | `clip`, `epsilon`, `epsilon_high`, `delta` |
//! | `∇J` for `A < 0` ([`mod@crate::negative`]) | how a token becomes less likely | `negative` |
//! | `c` ([`mod@crate::correction`]) | correction for the sampler | `importance_sampling_mode` and its bounds |
//! | `m` ([`mod@crate::filter`]) | which tokens take part | `top_entropy_quantile`, `off_policy_mask_threshold` |
//! | `KL` ([`mod@crate::kl`]) | distance to the reference, in the loss or in the reward | `beta`, `kl`, `kl_direction`, `kl_in` |
//! | `H` ([`mod@crate::entropy`]) | a bonus for staying undecided | `entropy_coef`, `entropy_target` and its bounds |
//! | `w` ([`mod@crate::aggregation`]) | how much a token counts | `aggregation` |
//!
//! Deviations from the papers:
//! 1. Tokens of the batch count the same by default (`aggregation = "token"`, DAPO, and TRL's default); GRPO's paper averages
//!    over sequences, `aggregation = "sequence"`.
//! 2. β is 0 by default, as in TRL; GRPO's paper has 0.04.
//! 3. Log-ratios are bounded by 20 before the exponential, so that no ratio is infinite.
//!
//! Metrics, named as TRL names them; a token "is clipped" where the clip changed its loss:
//! - `kl`: mean of the divergence estimate over the loss tokens, where it is in the loss and β is not 0.
//! - `clip_ratio/low_mean`, `clip_ratio/high_mean`: fraction held at the bound for A < 0 and for A > 0. On the first
//!   optimisation pass both are exactly 0. `clip_ratio/region_mean`: at either. Of tokens; where a sequence's tokens share one
//!   ratio, of the tokens of each sequence, in the mean over sequences.
//! - `clip_ratio/low_min`, `clip_ratio/high_max`: the same fractions in the sequence where they are least and most.
//! - `clip_ratio/dual_mean`: fraction of tokens held at `delta`, where that is set.
//! - `cispo_clip_ratio`: fraction of tokens with A > 0 whose weight is bounded. `vespo/phi_seq_mean`: mean of `φ`.
//! - `sampling/importance_sampling_ratio/min|mean|max`: of `c` over the loss tokens; absent where the sampler is π_old.
//! - With a value model: `policy/approxkl_avg` (`mean d² / 2`), `policy/clipfrac_avg`, `val/ratio`,
//!   `loss/policy_avg` (mean loss of a token, unweighted).

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::advantage::{Baseline, Credit, Estimator, ScaleRewards};
use crate::clip::{Inputs, Surrogate};
use crate::correction::{Correction, CorrectionMode};
use crate::entropy::EntropyControl;
use crate::kl::{KlDirection, KlPlacement};
use crate::loss::{Error, Loss, Reduce, Result, Statistic, bounded_exp, check_length, constant, per_token, values};
use crate::sequences::Sequences;
use crate::{Aggregation, Clip, ClipKind, KlEstimator, Negative, RatioLevel, filter};

/// The parts of the objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyOptions {
    /// What is subtracted from a reward: the mean of the group, of the group's other samples, the reward of a greedy
    /// completion, the value model's estimate (PPO), or nothing.
    pub baseline: Baseline,
    /// What the difference to the baseline is divided by (TRL's name): the standard deviation of the group, of the batch, or
    /// nothing. With the baselines `greedy` and `none` it has to be `none`, as with `credit = "token"` where `kl_in = "reward"` or
    /// `gamma` is below 1. Not read with a value model.
    pub scale_rewards: ScaleRewards,
    /// Which rewards a token answers for: those of its whole completion, those from itself on, those of its turn in a
    /// conversation and of later ones, or that of its span, a part of the answer that a reward judges on its own (the
    /// `confidence` reward: a stated confidence), and none outside of spans. The first two differ where `kl_in = "reward"` or
    /// `gamma` is below 1. With a value model only `span` is read.
    pub credit: Credit,
    /// Discount of later rewards, per token; with `credit = "turn"`, per turn.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub gamma: f64,
    /// λ of generalised advantage estimation, with a value model.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub lam: f64,
    /// λ of the returns that the value model learns; `lam` when absent. 1 lets a late reward reach early tokens.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub lam_value: Option<f64>,
    /// Divide the rewards of tokens by their standard deviation over the step, with a value model.
    pub whiten_rewards: bool,
    /// Shift and scale the advantages of all loss tokens of the step to mean 0 and variance 1.
    pub whiten_advantages: bool,
    /// What the importance ratio is of: each token, or the sequence.
    pub importance_sampling_level: RatioLevel,
    /// What bounds the policy's movement.
    pub clip: ClipKind,
    /// How far the ratio may fall below 1 before it is clipped. For `gmpo` how far a log-ratio, for `dppo_*` how far a divergence.
    pub epsilon: f64,
    /// How far the ratio may rise above 1; `epsilon` when absent. For `cispo` the largest ratio itself, at least 1, which has to be given.
    pub epsilon_high: Option<f64>,
    /// The largest ratio: with `clip = "ppo"` for negative advantages (dual clip, TRL's two-sided clip), with `dppo_*` for all. None
    /// when absent.
    pub delta: Option<f64>,
    /// Temperature of SAPO's gate for positive advantages.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub sapo_temperature_pos: f64,
    /// Temperature of SAPO's gate for other advantages.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub sapo_temperature_neg: f64,
    /// Exponent of VESPO's weight for advantages of at least 0.
    pub vespo_k_pos: f64,
    /// Decay of VESPO's weight for advantages of at least 0.
    pub vespo_lambda_pos: f64,
    /// Exponent of VESPO's weight for negative advantages.
    pub vespo_k_neg: f64,
    /// Decay of VESPO's weight for negative advantages.
    pub vespo_lambda_neg: f64,
    /// `clip_cov` and `kl_cov`: share of an update's tokens that are left out or held back.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub cov_ratio: f64,
    /// `clip_cov`: the least covariance of a token that may be left out.
    pub clip_cov_min: f64,
    /// `clip_cov`: the largest.
    pub clip_cov_max: f64,
    /// `kl_cov`: weight of the penalty on the chosen tokens.
    pub kl_cov_coef: f64,
    /// How a token with a negative advantage becomes less likely.
    pub negative: Negative,
    /// How much each token counts.
    pub aggregation: Aggregation,
    /// Weight of the divergence from the reference model; 0 needs no reference model.
    pub beta: f64,
    /// The estimate of that divergence.
    pub kl: KlEstimator,
    /// Which of the two divergences.
    pub kl_direction: KlDirection,
    /// Where it is paid: in the loss, or in the reward of each token.
    pub kl_in: KlPlacement,
    /// With `kl_in = "reward"`: `beta` follows the divergence of a completion, so that this stays near the target. Absent, `beta`
    /// is constant.
    pub kl_target: Option<f64>,
    /// With `kl_target`: a step of n completions changes `beta` by at most `0.2 n / kl_horizon` of itself, which has to be below 1.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub kl_horizon: f64,
    /// Multiply the divergence in the loss by the importance ratio, which makes it unbiased where the policy has moved
    /// (DeepSeek-V3.2).
    pub use_bias_correction_kl: bool,
    /// Share of an update's tokens, those of highest entropy, that the policy learns from.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0))]
    pub top_entropy_quantile: f64,
    /// Weight of the mean entropy of a token, which the loss rewards whatever the aggregation (TRL's names). With `entropy_target`
    /// the weight at the start.
    #[schemars(range(min = 0.0))]
    pub entropy_coef: f64,
    /// `entropy_coef` follows the mean entropy of a token, in nats, so that this does not fall below the target: it grows after
    /// updates at or below it, shrinks after others, and has no effect above it. Absent, `entropy_coef` is constant.
    pub entropy_target: Option<f64>,
    /// With `entropy_target`: what one update changes.
    #[schemars(range(min = 0.0))]
    pub entropy_coef_delta: f64,
    /// With `entropy_target`: the least weight.
    #[schemars(range(min = 0.0))]
    pub entropy_coef_min: f64,
    /// With `entropy_target`: the largest weight.
    #[schemars(range(min = 0.0))]
    pub entropy_coef_max: f64,
    /// Leave out sequences with a negative advantage that the policy has left by more than this, in nats a token. None when absent.
    pub off_policy_mask_threshold: Option<f64>,
    /// How a sampler whose weights are not the trainer's is corrected for (`rollout_weights = "int8"`, episodes of older weights).
    pub importance_sampling_mode: CorrectionMode,
    /// The least factor of that correction; none when absent.
    pub importance_sampling_clip_min: Option<f64>,
    /// The largest factor of that correction: how much more probable a token, or a sequence, may count to the trainer than to the
    /// sampler.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub importance_sampling_clip_max: f64,
}

impl Default for PolicyOptions {
    fn default() -> Self {
        Self {
            baseline: Baseline::GroupMean,
            scale_rewards: ScaleRewards::Group,
            credit: Credit::Sequence,
            gamma: 1.0,
            lam: 0.95,
            lam_value: None,
            whiten_rewards: false,
            whiten_advantages: false,
            importance_sampling_level: RatioLevel::Token,
            clip: ClipKind::Ppo,
            epsilon: 0.2,
            epsilon_high: None,
            delta: None,
            sapo_temperature_pos: 1.0,
            sapo_temperature_neg: 1.05,
            vespo_k_pos: 2.0,
            vespo_lambda_pos: 3.0,
            vespo_k_neg: 3.0,
            vespo_lambda_neg: 2.0,
            cov_ratio: 2e-4,
            clip_cov_min: 1.0,
            clip_cov_max: 5.0,
            kl_cov_coef: 1.0,
            negative: Negative::GradientAscent,
            aggregation: Aggregation::Token,
            beta: 0.0,
            kl: KlEstimator::K3,
            kl_direction: KlDirection::Reverse,
            kl_in: KlPlacement::Loss,
            kl_target: None,
            kl_horizon: 10_000.0,
            use_bias_correction_kl: false,
            top_entropy_quantile: 1.0,
            entropy_coef: 0.0,
            entropy_target: None,
            entropy_coef_delta: 0.005,
            entropy_coef_min: 0.0,
            entropy_coef_max: 1.0,
            off_policy_mask_threshold: None,
            importance_sampling_mode: CorrectionMode::TokenTruncate,
            importance_sampling_clip_min: None,
            importance_sampling_clip_max: 2.0,
        }
    }
}

impl PolicyOptions {
    /// How rewards become advantages.
    pub fn estimator(&self) -> Estimator {
        Estimator {
            baseline: self.baseline,
            scale: self.scale_rewards,
            credit: self.credit,
            gamma: self.gamma,
            lambda: self.lam,
            lambda_value: self.lam_value.unwrap_or(self.lam),
            whiten_rewards: self.whiten_rewards,
            whiten_advantages: self.whiten_advantages,
        }
    }

    /// The surrogate.
    pub fn clip(&self) -> Clip {
        Clip {
            kind: self.clip,
            low: self.epsilon,
            high: self.epsilon_high.unwrap_or(self.epsilon),
            delta: self.delta,
            sapo_temperature: (self.sapo_temperature_pos, self.sapo_temperature_neg),
            vespo: [(self.vespo_k_pos, self.vespo_lambda_pos), (self.vespo_k_neg, self.vespo_lambda_neg)],
            cov_ratio: self.cov_ratio,
            cov_bounds: (self.clip_cov_min, self.clip_cov_max),
            cov_penalty: self.kl_cov_coef,
        }
    }

    /// The correction for the sampler.
    pub fn correction(&self) -> Correction {
        Correction {
            mode: self.importance_sampling_mode,
            min: self.importance_sampling_clip_min,
            max: self.importance_sampling_clip_max,
        }
    }

    /// Whether the log-probs of a reference model are needed.
    pub fn needs_reference(&self) -> bool {
        self.beta != 0.0
    }

    /// Whether the divergence is a term of the loss.
    pub fn kl_in_loss(&self) -> bool {
        self.needs_reference() && self.kl_in == KlPlacement::Loss
    }

    /// Whether the divergence is part of the reward.
    pub fn kl_in_reward(&self) -> bool {
        self.needs_reference() && self.kl_in == KlPlacement::Reward
    }

    /// Whether the loss of a token depends on the other tokens of the update, so that all have to be given at once.
    pub fn needs_whole_update(&self) -> bool {
        self.clip.needs_whole_update() || self.filters_by_entropy()
    }

    /// Whether the loss depends on entropies.
    pub fn needs_entropy(&self) -> bool {
        self.filters_by_entropy() || self.entropy_coef != 0.0
    }

    fn filters_by_entropy(&self) -> bool {
        self.top_entropy_quantile < 1.0
    }

    /// How the weight of the entropy moves, where it does.
    pub fn entropy_control(&self) -> Option<EntropyControl> {
        self.entropy_target.map(|target| EntropyControl {
            target,
            delta: self.entropy_coef_delta,
            min: self.entropy_coef_min,
            max: self.entropy_coef_max,
        })
    }

    /// Refuses values that make no sense, naming the option.
    pub fn validate(&self) -> Result<()> {
        let high = self.epsilon_high.unwrap_or(self.epsilon);
        let below_one = matches!(self.clip, ClipKind::Ppo | ClipKind::ClipCov);
        let range = |what, got: f64, accepted: bool, expected| match got.is_finite() && accepted {
            true => Ok(()),
            false => Err(Error::Range { what, got, expected }),
        };
        let unit = |what, got: f64| range(what, got, (0.0..=1.0).contains(&got), "0 to 1");
        let positive = |what, got: f64| range(what, got, got > 0.0, "a number above 0");
        match below_one {
            true => range("epsilon", self.epsilon, (0.0..1.0).contains(&self.epsilon), "at least 0 and below 1")?,
            false => range("epsilon", self.epsilon, self.epsilon >= 0.0, "a number, at least 0")?,
        }
        if self.clip == ClipKind::Cispo {
            let why = "with clip = \"cispo\" it is the largest ratio itself, 5 in the method's preset, and not how far above 1";
            let largest = self.epsilon_high.ok_or(Error::Missing { what: "epsilon_high", why })?;
            range("epsilon_high", largest, largest >= 1.0, "at least 1: with cispo it is the largest ratio itself")?;
        }
        range("epsilon_high", high, high >= 0.0, "a number, at least 0")?;
        if let Some(delta) = self.delta {
            range("delta", delta, delta > 1.0 + high, "a number above 1 + epsilon_high")?;
            let read = matches!(self.clip, ClipKind::Ppo | ClipKind::ClipCov | ClipKind::DppoTv | ClipKind::DppoKl);
            range("delta", delta, read, "nothing: this clip has no such bound")?;
        }
        unit("gamma", self.gamma)?;
        let own_returns = self.credit == Credit::Token && (self.kl_in_reward() || self.gamma != 1.0);
        let of_group = matches!(self.baseline, Baseline::GroupMean | Baseline::LeaveOneOut) && !own_returns;
        if !(of_group || self.baseline == Baseline::Value || self.scale_rewards == ScaleRewards::None) {
            let why = "a deviation of rewards bounds differences to their mean alone: with baseline = \"greedy\" or \"none\", and with credit = \"token\" where \
                       kl_in = \"reward\" or gamma is below 1, it has to be \"none\" (whiten_advantages = true scales all advantages)";
            return Err(Error::Conflict { what: "scale_rewards", why });
        }
        unit("lam", self.lam)?;
        unit("lam_value", self.lam_value.unwrap_or(self.lam))?;
        positive("sapo_temperature_pos", self.sapo_temperature_pos)?;
        positive("sapo_temperature_neg", self.sapo_temperature_neg)?;
        for (what, got) in [("vespo_k_pos", self.vespo_k_pos), ("vespo_k_neg", self.vespo_k_neg)] {
            range(what, got, got >= 0.0, "a number, at least 0")?;
        }
        positive("vespo_lambda_pos", self.vespo_lambda_pos)?;
        positive("vespo_lambda_neg", self.vespo_lambda_neg)?;
        unit("cov_ratio", self.cov_ratio)?;
        range("clip_cov_min", self.clip_cov_min, true, "a number")?;
        range("clip_cov_max", self.clip_cov_max, self.clip_cov_max > self.clip_cov_min, "a number above clip_cov_min")?;
        range("kl_cov_coef", self.kl_cov_coef, self.kl_cov_coef >= 0.0, "a number, at least 0")?;
        if self.negative == Negative::CeU && self.clip == ClipKind::KlCov {
            let why = "ce_u has no meaning with kl_cov, which pulls tokens back by the gradient that ce_u exchanges";
            return Err(Error::Conflict { what: "negative", why });
        }
        range("beta", self.beta, self.beta >= 0.0, "a number, at least 0")?;
        if let Some(target) = self.kl_target {
            positive("kl_target", target)?;
            range("kl_target", target, self.kl_in_reward(), "nothing unless kl_in is \"reward\" and beta above 0")?;
        }
        positive("kl_horizon", self.kl_horizon)?;
        let quantile = self.top_entropy_quantile;
        range("top_entropy_quantile", quantile, quantile > 0.0 && quantile <= 1.0, "above 0 and at most 1")?;
        for (what, got) in [
            ("entropy_coef", self.entropy_coef),
            ("entropy_target", self.entropy_target.unwrap_or(0.0)),
            ("entropy_coef_delta", self.entropy_coef_delta),
            ("entropy_coef_min", self.entropy_coef_min),
        ] {
            range(what, got, got >= 0.0, "a number, at least 0")?;
        }
        let largest = self.entropy_coef_max;
        range("entropy_coef_max", largest, largest >= self.entropy_coef_min, "a number, at least entropy_coef_min")?;
        if let Some(threshold) = self.off_policy_mask_threshold {
            range("off_policy_mask_threshold", threshold, threshold >= 0.0, "a number, at least 0")?;
        }
        let most = self.importance_sampling_clip_max;
        positive("importance_sampling_clip_max", most)?;
        if let Some(least) = self.importance_sampling_clip_min {
            let accepted = least >= 0.0 && least <= most;
            range("importance_sampling_clip_min", least, accepted, "0 to importance_sampling_clip_max")?;
        }
        Ok(())
    }
}

/// The loss tokens of sampled completions: of a micro-batch, or of a whole update where the options need it
/// ([`PolicyOptions::needs_whole_update`]). Every list has one entry per loss token.
#[derive(Debug)]
pub struct PolicyBatch {
    /// log π(y_t) of the policy being trained, `[N]`, tracking gradients.
    pub log_probs: Tensor,
    /// log π_old(y_t) of the policy at the time of sampling, `[N]`.
    pub old_log_probs: Tensor,
    /// log π_sampler(y_t) of what the tokens were drawn from, `[N]`, where that is not π_old.
    pub sampling_log_probs: Option<Tensor>,
    /// log ρ(y_t) of the reference model, `[N]`; needed when the divergence is in the loss.
    pub reference_log_probs: Option<Tensor>,
    /// The entropy of the policy at each token, `[N]`, tracking gradients; needed by an entropy quantile and an entropy bonus.
    pub entropy: Option<Tensor>,
    /// The advantage of each token, `[N]`.
    pub advantages: Tensor,
    /// The weight of each token, with its global denominator inside, `[N]`.
    pub weights: Tensor,
    /// The sequence each token belongs to; tokens of one sequence are adjacent.
    pub sequence: Vec<u32>,
    /// Loss tokens of the whole update.
    pub tokens: usize,
    /// A number in `0..1` drawn for each token, `[N]`; needed by [`ClipKind::ClipCov`].
    pub draws: Option<Vec<f64>>,
}

/// The loss of a policy gradient.
///
/// # Errors
/// Inputs that differ in length, and inputs that the options need and that are missing.
pub fn policy(options: &PolicyOptions, batch: &PolicyBatch) -> Result<Loss> {
    let tokens = batch.log_probs.elem_count();
    let log_probs = per_token("log_probs", &batch.log_probs, tokens)?;
    let old = constant("old_log_probs", &batch.old_log_probs, tokens)?;
    let advantages = constant("advantages", &batch.advantages, tokens)?;
    let weights = constant("weights", &batch.weights, tokens)?;
    check_length("sequence", batch.sequence.len(), tokens)?;
    let sequences = Sequences::of(&batch.sequence);
    let optional = |what, tensor: &Option<Tensor>| tensor.as_ref().map(|t| constant(what, t, tokens)).transpose();
    let sampling = optional("sampling_log_probs", &batch.sampling_log_probs)?;
    let entropy = batch.entropy.as_ref().map(|entropy| per_token("entropy", entropy, tokens)).transpose()?;
    let missing = Error::Missing { what: "entropy", why: "top_entropy_quantile is below 1, or entropy_coef above 0" };
    let entropy = if options.needs_entropy() { Some(entropy.ok_or(missing)?) } else { None };
    let mut statistics = Vec::new();

    let level = options.importance_sampling_level;
    let log_ratio = level.log_ratio(&log_probs, &old, &sequences)?;
    let learnt = options.negative.log_probs(&log_probs, &advantages.lt(0.0)?)?;
    let correction = match &sampling {
        Some(sampling) => options.correction().factors(&old, sampling, &sequences)?,
        None => None,
    };
    let surrogate = options.clip().surrogate(&Inputs {
        log_probs: &learnt,
        old: &old,
        log_ratio: &level.log_ratio(&learnt, &old, &sequences)?,
        advantages: &advantages,
        correction: correction.as_ref(),
        correction_is_shared: options.correction().is_shared(),
        draws: batch.draws.as_deref(),
        sequences: &sequences,
    })?;
    let mut loss = surrogate.objective.neg()?;

    if let Some(threshold) = options.off_policy_mask_threshold {
        let behaviour = sampling.as_ref().unwrap_or(&old);
        loss = loss.mul(&filter::near_policy(&log_probs, behaviour, &advantages, threshold, &sequences)?)?;
    }
    let (mut undecided, mut learnt_from) = (entropy, batch.tokens);
    if let (Some(entropy), true) = (&mut undecided, options.filters_by_entropy()) {
        let kept = filter::high_entropy(entropy, options.top_entropy_quantile)?;
        loss = loss.mul(&kept)?;
        learnt_from = values(&kept)?.iter().filter(|&&kept| kept > 0.0).count();
        *entropy = entropy.mul(&kept)?;
    }
    if let Some(factors) = &correction {
        let mut all = values(factors)?;
        if options.correction().is_shared() {
            all = sequences.first(&all);
        }
        statistics.extend([
            Statistic { name: "sampling/importance_sampling_ratio/min", values: all.clone(), reduce: Reduce::Min },
            Statistic { name: "sampling/importance_sampling_ratio/mean", values: all.clone(), reduce: Reduce::Mean },
            Statistic { name: "sampling/importance_sampling_ratio/max", values: all, reduce: Reduce::Max },
        ]);
        // VESPO's weight has the correction inside.
        if options.clip != ClipKind::Vespo {
            loss = loss.mul(factors)?;
        }
    }
    let policy_loss = values(&loss)?;

    if options.kl_in_loss() {
        let reference = batch.reference_log_probs.as_ref();
        let reference = reference.ok_or(Error::Missing { what: "reference_log_probs", why: "beta is not 0" })?;
        let reference = constant("reference_log_probs", reference, tokens)?;
        let mut kl = options.kl.per_token(options.kl_direction, &log_probs, &reference)?;
        if options.use_bias_correction_kl {
            kl = kl.mul(&bounded_exp(&log_ratio)?)?;
        }
        statistics.push(Statistic { name: "kl", values: values(&kl)?, reduce: Reduce::Mean });
        loss = loss.add(&kl.affine(options.beta, 0.0)?)?;
    }

    clip_statistics(options, &surrogate, &sequences, &mut statistics);
    if options.baseline == Baseline::Value {
        let moved = values(&log_probs.sub(&old)?)?;
        let ratio = values(&bounded_exp(&log_ratio)?)?;
        let approximate = moved.iter().map(|d| d * d / 2.0).collect();
        let mean = |name, values| Statistic { name, values, reduce: Reduce::Mean };
        statistics.push(mean("policy/approxkl_avg", approximate));
        if let Some((low, high)) = &surrogate.held {
            statistics.push(mean("policy/clipfrac_avg", low.iter().zip(high).map(|(low, high)| low + high).collect()));
        }
        statistics.push(mean("val/ratio", ratio));
        statistics.push(mean("loss/policy_avg", policy_loss));
    }
    let mut loss = loss.mul(&weights)?;
    if let Some(entropy) = undecided {
        loss = loss.sub(&entropy.affine(options.entropy_coef / learnt_from.max(1) as f64, 0.0)?)?;
    }
    Ok(Loss { per_token: loss, statistics })
}

/// Where the surrogate acted.
fn clip_statistics(
    options: &PolicyOptions,
    surrogate: &Surrogate,
    sequences: &Sequences,
    statistics: &mut Vec<Statistic>,
) {
    let mut push = |name, values, reduce| statistics.push(Statistic { name, values, reduce });
    if let Some(phi) = &surrogate.phi {
        push("vespo/phi_seq_mean", sequences.first(phi), Reduce::Mean);
    }
    let Some((low, high)) = &surrogate.held else { return };
    if options.clip == ClipKind::Cispo {
        push("cispo_clip_ratio", high.clone(), Reduce::Mean);
        return;
    }
    // GMPO shares one ratio, but clips each token's.
    let shared = options.importance_sampling_level.is_shared() && options.clip != ClipKind::Gmpo;
    let counted = |values: &[f64]| if shared { sequences.means(values) } else { values.to_vec() };
    let region: Vec<f64> = low.iter().zip(high).map(|(low, high)| low + high).collect();
    push("clip_ratio/low_mean", counted(low), Reduce::Mean);
    push("clip_ratio/low_min", sequences.means(low), Reduce::Min);
    push("clip_ratio/high_mean", counted(high), Reduce::Mean);
    push("clip_ratio/high_max", sequences.means(high), Reduce::Max);
    push("clip_ratio/region_mean", counted(&region), Reduce::Mean);
    if let Some(dual) = &surrogate.dual {
        push("clip_ratio/dual_mean", counted(dual), Reduce::Mean);
    }
}
