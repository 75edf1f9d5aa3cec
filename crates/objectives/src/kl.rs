//! Per-token estimates of the divergence between the policy π and a reference ρ, from tokens sampled by π.
//!
//! With `d = log ρ(y) - log π(y)` (Schulman, "Approximating KL Divergence", 2020), of KL(π ‖ ρ), the `reverse` divergence:
//!
//! | name | value | as an estimate of KL(π ‖ ρ) | its gradient as a loss term |
//! | --- | --- | --- | --- |
//! | `k1` | `-d` | unbiased, high variance, can be negative | 0 in expectation: use it inside rewards |
//! | `k2` | `d² / 2` | biased, never negative | that of KL(π ‖ ρ), on policy |
//! | `k3` | `e^d - d - 1` | unbiased, low variance, never negative | that of KL(ρ ‖ π), on policy |
//! | `k1+`, `k3+` | as `k1`, `k3` | as `k1`, `k3` | that of `k2`: the value is one, the gradient the other's |
//!
//! `forward` estimates KL(ρ ‖ π) from the same tokens, weighing each by `e^d = ρ(y) / π(y)`: `k1` is `e^d d`, `k2` again `d² / 2`
//! (the two divergences agree to second order), `k3` is `e^d d - (e^d - 1)`.
//!
//! Deviation: in exponents `d` is bounded by 20, so that the value stays finite where the policy gives a token of the
//! reference almost no probability; beyond the bound the exponential is constant and its gradient 0.
//!
//! As a penalty inside the reward the coefficient may follow the divergence ([`AdaptiveKl`]).

use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{MAX_LOG_RATIO, Result, constant, values};

/// An estimate of the divergence to the reference from one sampled token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum KlEstimator {
    /// `log π - log ρ`.
    #[serde(rename = "k1")]
    K1,
    /// Half the squared difference.
    #[serde(rename = "k2")]
    K2,
    /// `ρ/π - log(ρ/π) - 1`, as in GRPO.
    #[default]
    #[serde(rename = "k3")]
    K3,
    /// The value of `k1` with the gradient of `k2`.
    #[serde(rename = "k1+")]
    K1Plus,
    /// The value of `k3` with the gradient of `k2`.
    #[serde(rename = "k3+")]
    K3Plus,
}

/// Which of the two divergences is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlDirection {
    /// KL(π ‖ ρ): the policy is kept from doing what the reference does not.
    #[default]
    Reverse,
    /// KL(ρ ‖ π): the policy is kept doing what the reference does.
    Forward,
}

/// Where the divergence is paid for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlPlacement {
    /// In the loss, as a term of its own (GRPO).
    #[default]
    Loss,
    /// In the reward of each token, before advantages are taken (PPO, RLOO, REINFORCE++).
    Reward,
}

impl KlEstimator {
    /// The estimate for every token; gradients flow into `log_probs` only.
    pub fn per_token(self, direction: KlDirection, log_probs: &Tensor, reference_log_probs: &Tensor) -> Result<Tensor> {
        let d = reference_log_probs.detach().sub(log_probs)?;
        let ratio = || Ok::<_, candle_core::Error>((d.minimum(MAX_LOG_RATIO)?, d.minimum(MAX_LOG_RATIO)?.exp()?));
        Ok(match (self, direction) {
            (Self::K2, _) => d.sqr()?.affine(0.5, 0.0)?,
            (Self::K1, KlDirection::Reverse) => d.neg()?,
            (Self::K3, KlDirection::Reverse) => {
                let (d, ratio) = ratio()?;
                ratio.sub(&d)?.affine(1.0, -1.0)?
            }
            (Self::K1, KlDirection::Forward) => {
                let (d, ratio) = ratio()?;
                ratio.mul(&d)?
            }
            (Self::K3, KlDirection::Forward) => {
                let (d, ratio) = ratio()?;
                ratio.mul(&d)?.sub(&ratio)?.affine(1.0, 1.0)?
            }
            (Self::K1Plus | Self::K3Plus, _) => {
                let plain = if self == Self::K1Plus { Self::K1 } else { Self::K3 };
                let value = plain.per_token(direction, &log_probs.detach(), reference_log_probs)?;
                let gradient = Self::K2.per_token(direction, log_probs, reference_log_probs)?;
                gradient.sub(&gradient.detach())?.add(&value)?
            }
        })
    }
}

impl KlEstimator {
    /// The estimates of plain numbers.
    ///
    /// # Errors
    /// Lists that differ in length.
    pub fn values(self, direction: KlDirection, log_probs: &[f32], reference: &[f32]) -> Result<Vec<f64>> {
        let new = Tensor::from_slice(log_probs, log_probs.len(), &Device::Cpu)?;
        let reference = Tensor::from_slice(reference, reference.len(), &Device::Cpu)?;
        let [new, reference] =
            [constant("log_probs", &new, log_probs.len())?, constant("reference", &reference, log_probs.len())?];
        values(&self.per_token(direction, &new, &reference)?)
    }
}

/// A coefficient that keeps the divergence near a target: it grows while the divergence is above it, and shrinks below.
///
/// ```text
/// β ← β (1 + clip(KL / target - 1, -0.2, 0.2) · n / horizon)
/// ```
///
/// Ziegler et al., "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593, section 2.2. `KL` is the mean over
/// completions of the divergence summed over their tokens, `n` the completions it was measured on, fewer than `5 horizon`: from there on
/// one step below the target could leave nothing of β.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdaptiveKl {
    /// The coefficient of the next step.
    pub coefficient: f64,
}

impl AdaptiveKl {
    /// Takes the divergence of a step into account.
    pub fn update(&mut self, kl: f64, completions: usize, target: f64, horizon: f64) {
        let error = (kl / target - 1.0).clamp(-0.2, 0.2);
        self.coefficient *= 1.0 + error * completions as f64 / horizon;
    }
}
