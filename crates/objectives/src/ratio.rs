//! The importance ratio: how much more probable a completion, or a token of it, has become since it was sampled.
//!
//! With `d_t = log π(y_t) - log π_old(y_t)` and `n` loss tokens in the sequence:
//!
//! | `importance_sampling_level` | log-ratio of token t | source |
//! | --- | --- | --- |
//! | `token` | `d_t` | PPO, GRPO |
//! | `sequence` | `Σ_k d_k / n` | GSPO, arXiv 2507.18071 |
//! | `sequence_token` | `sg[Σ_k d_k / n] + log π(y_t) - sg[log π(y_t)]` | GSPO-token, the same paper, section 4.3 |
//! | `sequence_product` | `Σ_k d_k` | RLOO as in TRL: the ratio of whole completions |
//!
//! `sg` stops the gradient. `sequence` and `sequence_token` have the same value, and with one advantage for all tokens of a
//! sequence and `aggregation = "sequence"` the same gradient; with advantages of their own the tokens need the latter.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::Result;
use crate::sequences::Sequences;

/// What an importance ratio is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RatioLevel {
    /// Each token.
    #[default]
    Token,
    /// The sequence: the geometric mean of its tokens' ratios.
    Sequence,
    /// As `sequence`, but a token's gradient is its own.
    SequenceToken,
    /// The sequence: the product of its tokens' ratios.
    SequenceProduct,
}

impl RatioLevel {
    /// Whether all tokens of a sequence share one ratio.
    pub fn is_shared(self) -> bool {
        matches!(self, Self::Sequence | Self::SequenceProduct)
    }

    /// The log-ratio of every token, `[N]`.
    pub(crate) fn log_ratio(self, log_probs: &Tensor, old: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        let own = log_probs.sub(old)?;
        Ok(match self {
            Self::Token => own,
            Self::Sequence => sequences.spread(&sequences.mean(&own)?)?,
            Self::SequenceToken => {
                let mean = sequences.spread(&sequences.mean(&own.detach())?)?;
                mean.add(&log_probs.sub(&log_probs.detach())?)?
            }
            Self::SequenceProduct => sequences.spread(&sequences.sum(&own)?)?,
        })
    }
}
