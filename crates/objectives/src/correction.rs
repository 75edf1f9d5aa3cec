//! Correction for a sampler that is not the policy the ratio is relative to: other weights, another number format, or an older
//! policy.
//!
//! With `c_t = π_old(y_t) / π_sampler(y_t)`, or its product over a sequence, a token's loss is multiplied by a constant:
//!
//! | `importance_sampling_mode` | factor | known as |
//! | --- | --- | --- |
//! | `token_truncate` | `c_t` held between the bounds | truncated importance sampling (TIS), Yao et al., 2025 |
//! | `token_mask` | `c_t` between the bounds, else 0 | masked importance sampling (MIS); with a lower bound IcePop |
//! | `sequence_truncate` | `Π_k c_k` held between the bounds | sequence-level TIS |
//! | `sequence_mask` | `Π_k c_k` between the bounds, else 0 | sequence-level MIS |
//! | `none` | 1 | |
//!
//! TRL's `vllm_importance_sampling_mode`, with the same names.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{Result, bounded_exp};
use crate::sequences::Sequences;

/// How the difference between the sampler and the policy is corrected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CorrectionMode {
    /// Each token's ratio, held between the bounds.
    #[default]
    TokenTruncate,
    /// Each token's ratio; 0 outside the bounds.
    TokenMask,
    /// The sequence's ratio, held between the bounds.
    SequenceTruncate,
    /// The sequence's ratio; 0 outside the bounds.
    SequenceMask,
    /// Nothing is corrected.
    None,
}

/// A correction and its bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Correction {
    /// What is done.
    pub mode: CorrectionMode,
    /// The lower bound, where there is one.
    pub min: Option<f64>,
    /// The upper bound.
    pub max: f64,
}

impl Correction {
    /// Whether all tokens of a sequence share one factor.
    pub fn is_shared(&self) -> bool {
        matches!(self.mode, CorrectionMode::SequenceTruncate | CorrectionMode::SequenceMask)
    }

    /// The factor of every token, `[N]`, a constant; `None` where nothing is corrected.
    pub(crate) fn factors(&self, old: &Tensor, sampling: &Tensor, sequences: &Sequences) -> Result<Option<Tensor>> {
        let own = old.detach().sub(&sampling.detach())?;
        let log_ratio = match self.mode {
            CorrectionMode::None => return Ok(None),
            CorrectionMode::TokenTruncate | CorrectionMode::TokenMask => own,
            CorrectionMode::SequenceTruncate | CorrectionMode::SequenceMask => {
                sequences.spread(&sequences.sum(&own)?)?
            }
        };
        let ratio = bounded_exp(&log_ratio)?;
        let least = self.min.unwrap_or(0.0);
        Ok(Some(match self.mode {
            CorrectionMode::TokenTruncate | CorrectionMode::SequenceTruncate => {
                ratio.minimum(self.max)?.maximum(least)?
            }
            _ => {
                let kept = ratio.le(self.max)?.mul(&ratio.ge(least)?)?;
                kept.where_cond(&ratio, &ratio.zeros_like()?)?
            }
        }))
    }
}
