//! What a preference costs: losses of a pair of completions, one of them chosen, the other rejected.
//!
//! For each completion, `h` is its log-ratio and `g` its score (see [`mod@crate::preference`]; both the same unless a
//! divergence says otherwise), `n` its number of tokens. With `m = g_chosen - g_rejected`, smoothing `ε`, margin `γ` and
//! `S(u) = -(1 - ε) log σ(u) - ε log σ(-u)`:
//!
//! | name | loss of a pair | source |
//! | --- | --- | --- |
//! | `sigmoid` | `S(β m - γ)` | DPO, arXiv 2305.18290; with ε, conservative DPO; with γ, SimPO, arXiv 2405.14734 |
//! | `sigmoid_norm` | `S(β (g_c/n_c - g_r/n_r) - γ)` | Tülu 3, arXiv 2411.15124 |
//! | `hinge` | `max(0, 1 - (β m - γ))` | SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657 |
//! | `ipo` | `(g_c/n_c - g_r/n_r - 1/(2β))²` | IPO, arXiv 2310.12036 |
//! | `exo_pair` | `KL(p_m ‖ (1 - ε, ε))`, `p_m = (σ(β m), σ(-β m))` | EXO, arXiv 2402.00856 |
//! | `nca_pair` | `-log σ(β h_c) - (log σ(-β h_c) + log σ(-β h_r)) / 2` | NCA, arXiv 2402.05369 |
//! | `robust` | `(-(1 - ε) log σ(β m) + ε log σ(-β m)) / (1 - 2ε)` | robust DPO, arXiv 2403.00409 |
//! | `bco_pair` | `-log σ(β h_c) - log σ(-β h_r)` | BCO, arXiv 2404.04656 |
//! | `sppo_hard` | `(h_c - 1/(2β))² + (h_r + 1/(2β))²` | SPPO, arXiv 2405.00675 |
//! | `aot` | `S(β (k-th smallest m of the policy - k-th smallest m of the reference))` | AOT, arXiv 2406.05882 |
//! | `aot_unpaired` | `S(β (k-th smallest h_c - k-th smallest h_r))` | the same |
//! | `apo_zero` | `σ(-β h_c) + σ(β h_r)` | APO, arXiv 2408.06266 |
//! | `apo_down` | `σ(β h_c) + σ(-β (h_c - h_r))` | the same |
//! | `plackett_luce` | `-log σ(β (h_c - h_r))`; of rankings see [`mod@crate::ranking`] | DPO, appendix A.3 |
//! | `discopop` | `-log σ(u) (1 - σ(u/τ)) + e^{-u} σ(u/τ)`, `u = β m` | DiscoPOP, arXiv 2406.08414 |
//!
//! `aot` and `aot_unpaired` compare the distributions of a whole batch: the k-th loss belongs to a rank, not to a pair.
//!
//! Beware of `discopop`: with τ = 0.05 its slope at a margin of 0, where a policy equals its reference, is +0.78: it lowers
//! the margin first, and settles in a minimum below 0 unless something else lifts it over the hump.
//!
//! Deviation: the `e^{-u}` of `discopop` is bounded by `e^20`; beyond the bound it is constant and its gradient 0.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{Result, bounded_exp, values};
use crate::scalar::{log_sigmoid, sigmoid};

/// A loss of pairs; TRL's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PairLoss {
    /// Logistic in the margin.
    Sigmoid,
    /// Logistic in the margin per token.
    SigmoidNorm,
    /// Linear up to a margin of 1.
    Hinge,
    /// Squared distance of the margin per token from `1/(2β)`.
    Ipo,
    /// Reverse divergence from the smoothed preference; needs `label_smoothing`.
    ExoPair,
    /// Noise-contrastive: the chosen one up, both held.
    NcaPair,
    /// Logistic, unbiased when a share `label_smoothing` of the preferences is flipped.
    Robust,
    /// A binary classifier of chosen and rejected.
    BcoPair,
    /// Self-play: each log-ratio towards `±1/(2β)`.
    SppoHard,
    /// Margins of the policy above those of the reference, as distributions.
    Aot,
    /// Chosen log-ratios above rejected ones, as distributions.
    AotUnpaired,
    /// Chosen up and rejected down, for data better than the model.
    ApoZero,
    /// Both down, rejected more, for data worse than the model.
    ApoDown,
    /// Logistic and exponential, blended; a loss found by search.
    Discopop,
    /// The model of Plackett and Luce, for rankings of any length.
    PlackettLuce,
    /// Negative log-likelihood of the chosen completion, or of the `reference` completion where rows have one, averaged
    /// over its tokens in the whole batch.
    Sft,
}

impl PairLoss {
    /// Whether the loss is a function of the margin of scores, so that any divergence's scores have a meaning in it.
    pub fn takes_any_score(self) -> bool {
        use PairLoss::{Discopop, ExoPair, Hinge, Ipo, Robust, Sft, Sigmoid, SigmoidNorm};
        matches!(self, Sigmoid | SigmoidNorm | Hinge | Ipo | ExoPair | Robust | Discopop | Sft)
    }

    /// Whether the loss never gains from a more likely rejected completion, without smoothing.
    pub fn only_lowers_rejected(self) -> bool {
        use PairLoss::{Aot, AotUnpaired, ApoZero, BcoPair, Hinge, Sft, Sigmoid, SigmoidNorm};
        matches!(self, Sigmoid | SigmoidNorm | Hinge | BcoPair | Aot | AotUnpaired | ApoZero | Sft)
    }

    /// Whether the loss reads the share of preferences that are the wrong way round.
    pub fn reads_smoothing(self) -> bool {
        use PairLoss::{Aot, AotUnpaired, ExoPair, Robust, Sigmoid, SigmoidNorm};
        matches!(self, Sigmoid | SigmoidNorm | ExoPair | Robust | Aot | AotUnpaired)
    }

    /// Whether the loss of a pair depends on the other pairs of the batch.
    pub fn compares_pairs(self) -> bool {
        matches!(self, Self::Aot | Self::AotUnpaired)
    }
}

/// A number for each chosen and each rejected completion, `[P]` each.
#[derive(Clone, Debug)]
pub(crate) struct Two {
    pub chosen: Tensor,
    pub rejected: Tensor,
}

impl Two {
    pub fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { chosen: f(&self.chosen)?, rejected: f(&self.rejected)? })
    }

    pub fn zip(&self, other: &Self, f: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>) -> Result<Self> {
        Ok(Self { chosen: f(&self.chosen, &other.chosen)?, rejected: f(&self.rejected, &other.rejected)? })
    }

    pub fn difference(&self) -> Result<Tensor> {
        Ok(self.chosen.sub(&self.rejected)?)
    }
}

/// What the losses are functions of.
#[derive(Debug)]
pub(crate) struct Pairs {
    /// Log-probabilities under the policy, and under the reference (0 without one).
    pub policy: Two,
    pub reference: Two,
    /// Their difference `h`.
    pub ratio: Two,
    /// The score `g`, and the same per token.
    pub score: Two,
    pub score_per_token: Two,
    pub beta: f64,
    pub gamma: f64,
    pub label_smoothing: f64,
    pub discopop_tau: f64,
}

impl Pairs {
    /// The loss of every pair. [`PairLoss::Sft`] is about tokens, not pairs, and is 0 here.
    pub fn loss(&self, loss: PairLoss) -> Result<Tensor> {
        let beta = self.beta;
        let scaled = |x: &Tensor| Ok(x.affine(beta, 0.0)?);
        let reward = || self.ratio.map(scaled);
        let margin = || scaled(&self.score.difference()?);
        Ok(match loss {
            PairLoss::Sigmoid => self.smoothed(&margin()?.affine(1.0, -self.gamma)?)?,
            PairLoss::SigmoidNorm => self.smoothed(&self.score_per_token.difference()?.affine(beta, -self.gamma)?)?,
            PairLoss::Hinge => margin()?.affine(-1.0, 1.0 + self.gamma)?.relu()?,
            PairLoss::Ipo => self.score_per_token.difference()?.affine(1.0, -0.5 / beta)?.sqr()?,
            PairLoss::ExoPair => {
                let (log_won, log_lost) = (log_sigmoid(&margin()?)?, log_sigmoid(&margin()?.neg()?)?);
                let term = |log_q: &Tensor, p: f64| log_q.exp()?.mul(&log_q.affine(1.0, -p.ln())?);
                term(&log_won, 1.0 - self.label_smoothing)?.add(&term(&log_lost, self.label_smoothing)?)?
            }
            PairLoss::NcaPair => {
                let held = reward()?.map(|reward| log_sigmoid(&reward.neg()?))?;
                let held = held.chosen.add(&held.rejected)?.affine(0.5, 0.0)?;
                log_sigmoid(&reward()?.chosen)?.add(&held)?.neg()?
            }
            PairLoss::Robust => {
                let smoothing = self.label_smoothing;
                let kept = log_sigmoid(&margin()?)?.affine(-(1.0 - smoothing), 0.0)?;
                let flipped = log_sigmoid(&margin()?.neg()?)?.affine(smoothing, 0.0)?;
                kept.add(&flipped)?.affine(1.0 / (1.0 - 2.0 * smoothing), 0.0)?
            }
            PairLoss::BcoPair => {
                let reward = reward()?;
                log_sigmoid(&reward.chosen)?.add(&log_sigmoid(&reward.rejected.neg()?)?)?.neg()?
            }
            PairLoss::SppoHard => {
                let goal = 0.5 / beta;
                let won = self.ratio.chosen.affine(1.0, -goal)?.sqr()?;
                won.add(&self.ratio.rejected.affine(1.0, goal)?.sqr()?)?
            }
            PairLoss::Aot => {
                let (policy, reference) = (sorted(&self.policy.difference()?)?, sorted(&self.reference.difference()?)?);
                self.smoothed(&policy.sub(&reference)?.affine(beta, 0.0)?)?
            }
            PairLoss::AotUnpaired => {
                let sorted = self.ratio.map(sorted)?;
                self.smoothed(&sorted.difference()?.affine(beta, 0.0)?)?
            }
            PairLoss::ApoZero => {
                let reward = reward()?;
                sigmoid(&reward.chosen.neg()?)?.add(&sigmoid(&reward.rejected)?)?
            }
            PairLoss::ApoDown => {
                let reward = reward()?;
                sigmoid(&reward.chosen)?.add(&sigmoid(&reward.difference()?.neg()?)?)?
            }
            PairLoss::Discopop => {
                let margin = margin()?;
                let blend = sigmoid(&margin.affine(1.0 / self.discopop_tau, 0.0)?)?;
                let logistic = log_sigmoid(&margin)?.neg()?.mul(&blend.affine(-1.0, 1.0)?)?;
                logistic.add(&bounded_exp(&margin.neg()?)?.mul(&blend)?)?
            }
            PairLoss::PlackettLuce => log_sigmoid(&reward()?.difference()?)?.neg()?,
            PairLoss::Sft => self.score.chosen.zeros_like()?,
        })
    }

    /// `-(1 - ε) log σ(u) - ε log σ(-u)`.
    fn smoothed(&self, u: &Tensor) -> Result<Tensor> {
        let kept = log_sigmoid(u)?.affine(-(1.0 - self.label_smoothing), 0.0)?;
        if self.label_smoothing == 0.0 {
            return Ok(kept);
        }
        Ok(kept.sub(&log_sigmoid(&u.neg()?)?.affine(self.label_smoothing, 0.0)?)?)
    }
}

/// The values in ascending order; gradients find their way back.
fn sorted(x: &Tensor) -> Result<Tensor> {
    let values = values(x)?;
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|&a, &b| values[a as usize].total_cmp(&values[b as usize]));
    Ok(x.index_select(&Tensor::from_slice(&order, order.len(), x.device())?, 0)?)
}
