//! Per-token estimates of the divergence between the policy π and a reference ρ, from tokens sampled by π.
//!
//! With `d = log ρ(y) - log π(y)` (Schulman, "Approximating KL Divergence", 2020):
//!
//! | name | value | as an estimate of KL(π ‖ ρ) | its gradient as a loss term |
//! | --- | --- | --- | --- |
//! | `k1` | `-d` | unbiased, high variance, can be negative | 0 in expectation: use it inside rewards |
//! | `k2` | `d² / 2` | biased, never negative | that of KL(π ‖ ρ), on policy |
//! | `k3` | `e^d - d - 1` | unbiased, low variance, never negative | that of KL(ρ ‖ π), on policy |
//!
//! Deviation: in `k3`, `d` is bounded by 20, so that the value stays finite where the policy gives a token of the
//! reference almost no probability; beyond the bound it is constant and its gradient 0.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{MAX_LOG_RATIO, Result};

/// Which estimate of the divergence to the reference is added to the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// `log π - log ρ`.
    K1,
    /// Half the squared difference.
    K2,
    /// `ρ/π - log(ρ/π) - 1`, as in GRPO.
    #[default]
    K3,
}

impl KlEstimator {
    /// The estimate for every token; gradients flow into `log_probs` only.
    pub fn per_token(self, log_probs: &Tensor, reference_log_probs: &Tensor) -> Result<Tensor> {
        let d = reference_log_probs.detach().sub(log_probs)?;
        Ok(match self {
            Self::K1 => d.neg()?,
            Self::K2 => d.sqr()?.affine(0.5, 0.0)?,
            Self::K3 => {
                let d = d.minimum(MAX_LOG_RATIO)?;
                d.exp()?.sub(&d)?.affine(1.0, -1.0)?
            }
        })
    }
}
