//! Which tokens of a step take part in the loss, decided from their numbers.
//!
//! - **Entropy quantile** (Wang et al., "Beyond the 80/20 Rule", arXiv 2506.01939; TRL's `top_entropy_quantile`): only the
//!   tokens whose entropy is among the highest share `q` of the update's tokens. The threshold is the quantile `1 - q`, linearly
//!   interpolated, of all of them.
//! - **Off-policy sequences** (DeepSeek-V3.2, arXiv 2512.02556; TRL's `off_policy_mask_threshold`): a sequence with a negative
//!   advantage is left out when `Σ_t (log π_sampler - log π) / n` exceeds the threshold.
//! - **Groups without variance** (the dynamic sampling of DAPO, arXiv 2503.14476): a group whose rewards are all equal has no
//!   gradient under a group's baseline; others are sampled in its place ([`has_variance`]).

use candle_core::{Device, Tensor};

use crate::loss::{Result, values};
use crate::sequences::Sequences;

/// The quantile `q` of `numbers`, linearly interpolated between neighbours; `None` of no numbers.
pub fn quantile(numbers: &[f64], q: f64) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = q * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(below + (above - below) * place.fract())
}

/// 1 for each token whose entropy is in the highest share `q`, else 0, `[N]`.
pub(crate) fn high_entropy(entropy: &Tensor, q: f64) -> Result<Tensor> {
    let numbers = values(entropy)?;
    let threshold = quantile(&numbers, 1.0 - q).unwrap_or(0.0);
    let kept: Vec<f64> = numbers.iter().map(|&entropy| f64::from(u8::from(entropy >= threshold))).collect();
    Ok(Tensor::from_slice(&kept, kept.len(), &Device::Cpu)?)
}

/// 0 for each token of a sequence that the policy has left by more than `threshold` and that was worse than expected, else 1,
/// `[N]`.
pub(crate) fn near_policy(
    log_probs: &Tensor,
    sampling: &Tensor,
    advantages: &Tensor,
    threshold: f64,
    sequences: &Sequences,
) -> Result<Tensor> {
    let away = sampling.detach().sub(&log_probs.detach())?;
    let away = sequences.spread(&sequences.mean(&away)?)?;
    let left_out = away.gt(threshold)?.mul(&advantages.lt(0.0)?)?;
    let ones = advantages.ones_like()?;
    Ok(left_out.where_cond(&ones.zeros_like()?, &ones)?)
}

/// Whether the scored rewards of a group differ, so that its baseline leaves something to learn.
pub fn has_variance(scores: &[Option<f64>]) -> bool {
    let mut scored = scores.iter().flatten();
    scored.next().is_some_and(|first| scored.any(|score| score != first))
}
