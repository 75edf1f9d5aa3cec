//! Surrogates: what is maximised for a ratio `r` and an advantage `A`, and where a moving policy stops being paid.
//!
//! | `clip` | objective of a token | source |
//! | --- | --- | --- |
//! | `ppo` | `min(r A, clip(r, 1 - ε, 1 + ε_high) A)`, and with `delta` at least `δ A` where `A < 0` | arXiv 1707.06347, equation 7; dual clip: arXiv 1912.09729 |
//! | `none` | `r A` | REINFORCE with an importance weight |
//! | `cispo` | `sg[min(r, ε_high)] A log π` | MiniMax-M1, arXiv 2506.13585 |
//! | `sapo` | `4 / τ · σ(τ (r - 1)) A`, with `τ` by the sign of `A` | SAPO, arXiv 2511.20347 |
//! | `gmpo` | `A exp(Σ_k clip±(d_k) / n)`: each log-ratio `d` held at `ε_high` (A > 0) or `-ε` (A < 0), then their mean | GMPO, arXiv 2507.20673 |
//! | `vespo` | `sg[φ(w)] A log π`, `φ(w) = exp(λ + k log w - λ w)`, `w` the product of the sequence's ratios and corrections | VESPO, arXiv 2602.10693 |
//! | `dppo_tv` | `sg[min(r, δ)] A log π`, 0 where π moved from π_old by more than ε_high (A > 0) or ε (A < 0) in probability | DPPO, arXiv 2602.04879 |
//! | `dppo_kl` | the same with the divergence of the two-way choice "this token or another" | the same |
//! | `clip_cov` | as `ppo`; 0 for a few tokens whose covariance `(A - mean A)(log π - mean log π)` lies between two bounds | arXiv 2505.22617 |
//! | `kl_cov` | `r A - c |d|` for the few tokens of the largest covariance, else `r A` | the same |
//!
//! `ε_high > ε` is the "clip-higher" of DAPO, arXiv 2503.14476. In `ppo` the minimum is taken by cases: with A > 0 the ratio is
//! held at 1 + ε_high, with A < 0 at 1 - ε, and is left alone otherwise. A held ratio is a constant, so its gradient is exactly
//! 0. `sg` stops the gradient. As in TRL, `ε_high` of `cispo` bounds the ratio itself.
//!
//! `clip_cov` and `kl_cov` compare each token with all tokens of an update, and have to be given all of them at once.

use candle_core::{D, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{Error, MAX_LOG_RATIO, Result, bounded_exp, check_length, values};
use crate::sequences::Sequences;

/// What bounds the policy's movement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClipKind {
    /// PPO's minimum of the ratio and the clipped ratio.
    #[default]
    Ppo,
    /// Nothing.
    None,
    /// A bounded ratio as a constant weight of the log-probability (CISPO).
    Cispo,
    /// A soft gate instead of a clip (SAPO).
    Sapo,
    /// Log-ratios clipped one by one, then averaged over the sequence (GMPO).
    Gmpo,
    /// A smooth weight of the whole sequence's ratio (VESPO).
    Vespo,
    /// Tokens leave the loss when their probability has moved too far (DPPO, total variation).
    DppoTv,
    /// Tokens leave the loss when their divergence is too large (DPPO, Kullback-Leibler).
    DppoKl,
    /// PPO's, without a few tokens of large covariance (Clip-Cov).
    ClipCov,
    /// No clip, but a penalty on the few tokens of the largest covariance (KL-Cov).
    KlCov,
}

impl ClipKind {
    /// Whether a token's objective depends on the other tokens of the update.
    pub fn needs_whole_update(self) -> bool {
        matches!(self, Self::ClipCov | Self::KlCov)
    }
}

/// A surrogate and its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    /// Which.
    pub kind: ClipKind,
    /// Room below 1 (or for a divergence).
    pub low: f64,
    /// Room above 1 (or for a divergence; `cispo`: the largest ratio).
    pub high: f64,
    /// The largest ratio: `ppo`'s dual clip, the weight of `dppo_*`.
    pub delta: Option<f64>,
    /// `sapo`: τ for positive and for other advantages.
    pub sapo_temperature: (f64, f64),
    /// `vespo`: k and λ for advantages of at least 0, and for negative ones.
    pub vespo: [(f64, f64); 2],
    /// `clip_cov`, `kl_cov`: the share of tokens that is chosen.
    pub cov_ratio: f64,
    /// `clip_cov`: the covariances chosen from.
    pub cov_bounds: (f64, f64),
    /// `kl_cov`: the penalty `c`.
    pub cov_penalty: f64,
}

/// What surrogates are made from; every tensor is `[N]`.
pub(crate) struct Inputs<'a> {
    pub log_probs: &'a Tensor,
    pub old: &'a Tensor,
    /// At the level asked for, with its gradient.
    pub log_ratio: &'a Tensor,
    pub advantages: &'a Tensor,
    /// The correction's factors, where there are any.
    pub correction: Option<&'a Tensor>,
    /// Whether all tokens of a sequence have one factor, that of the sequence.
    pub correction_is_shared: bool,
    /// One number in `0..1` for each token, for `clip_cov`.
    pub draws: Option<&'a [f64]>,
    pub sequences: &'a Sequences,
}

/// A surrogate's value, and where it acted.
pub(crate) struct Surrogate {
    /// To be maximised, `[N]`.
    pub objective: Tensor,
    /// For each token 1 where the bound for negative advantages acted, and the same for positive ones; absent where the
    /// surrogate has no such bounds.
    pub held: Option<(Vec<f64>, Vec<f64>)>,
    /// For each token 1 where `delta` acted; absent where there is none.
    pub dual: Option<Vec<f64>>,
    /// `vespo`: φ of each token's sequence.
    pub phi: Option<Vec<f64>>,
}

impl Surrogate {
    fn new(objective: Tensor) -> Self {
        Self { objective, held: None, dual: None, phi: None }
    }
}

impl Clip {
    /// The objective of every token; gradients flow into log-probabilities and log-ratio only.
    pub(crate) fn surrogate(&self, inputs: &Inputs<'_>) -> Result<Surrogate> {
        match self.kind {
            ClipKind::Ppo => self.ppo(inputs),
            ClipKind::None => Ok(Surrogate::new(bounded_exp(inputs.log_ratio)?.mul(inputs.advantages)?)),
            ClipKind::Cispo => self.cispo(inputs),
            ClipKind::Sapo => self.sapo(inputs),
            ClipKind::Gmpo => self.gmpo(inputs),
            ClipKind::Vespo => self.vespo(inputs),
            ClipKind::DppoTv | ClipKind::DppoKl => self.dppo(inputs),
            ClipKind::ClipCov => self.clip_cov(inputs),
            ClipKind::KlCov => self.kl_cov(inputs),
        }
    }

    fn ppo(&self, inputs: &Inputs<'_>) -> Result<Surrogate> {
        let (ratio, advantages) = (bounded_exp(inputs.log_ratio)?, inputs.advantages);
        let low = ratio.lt(1.0 - self.low)?.mul(&advantages.lt(0.0)?)?;
        let high = ratio.gt(1.0 + self.high)?.mul(&advantages.gt(0.0)?)?;
        let mut held = hold(&low, 1.0 - self.low, &ratio)?;
        held = hold(&high, 1.0 + self.high, &held)?;
        let mut dual = None;
        if let Some(delta) = self.delta {
            let acted = ratio.gt(delta)?.mul(&advantages.lt(0.0)?)?;
            held = hold(&acted, delta, &held)?;
            dual = Some(values(&acted)?);
        }
        Ok(Surrogate { held: Some((values(&low)?, values(&high)?)), dual, ..Surrogate::new(held.mul(advantages)?) })
    }

    fn cispo(&self, inputs: &Inputs<'_>) -> Result<Surrogate> {
        let ratio = bounded_exp(inputs.log_ratio)?.detach();
        let high = ratio.gt(self.high)?.mul(&inputs.advantages.gt(0.0)?)?;
        let objective = ratio.minimum(self.high)?.mul(inputs.advantages)?.mul(inputs.log_probs)?;
        let high = values(&high)?;
        Ok(Surrogate { held: Some((vec![0.0; high.len()], high)), ..Surrogate::new(objective) })
    }

    fn sapo(&self, inputs: &Inputs<'_>) -> Result<Surrogate> {
        let ratio = bounded_exp(inputs.log_ratio)?;
        let ones = ratio.ones_like()?;
        let (positive, other) = self.sapo_temperature;
        let temperature = hold(&inputs.advantages.gt(0.0)?, positive, &ones.affine(other, 0.0)?)?;
        // 1 / (1 + e^-x); x is at least -τ, so the exponential is bounded.
        let gate = ratio.affine(1.0, -1.0)?.mul(&temperature)?.neg()?.exp()?.affine(1.0, 1.0)?.recip()?;
        let gate = gate.affine(4.0, 0.0)?.div(&temperature)?;
        Ok(Surrogate::new(gate.mul(inputs.advantages)?))
    }

    fn gmpo(&self, inputs: &Inputs<'_>) -> Result<Surrogate> {
        let own = inputs.log_probs.sub(inputs.old)?;
        let low = own.lt(-self.low)?.mul(&inputs.advantages.lt(0.0)?)?;
        let high = own.gt(self.high)?.mul(&inputs.advantages.gt(0.0)?)?;
        let held = hold(&high, self.high, &hold(&low, -self.low, &own)?)?;
        let mean = inputs.sequences.spread(&inputs.sequences.mean(&held)?)?;
        let objective = bounded_exp(&mean)?.mul(inputs.advantages)?;
        Ok(Surrogate { held: Some((values(&low)?, values(&high)?)), ..Surrogate::new(objective) })
    }

    fn vespo(&self, inputs: &Inputs<'_>) -> Result<Surrogate> {
        let least = 1e-8f64.ln();
        let own = inputs.log_probs.sub(inputs.old)?.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)?;
        let mut log_ratio = inputs.sequences.sum(&own)?;
        if let Some(factors) = inputs.correction {
            let factors = factors.log()?.clamp(least, MAX_LOG_RATIO)?;
            let of_sequences = match inputs.correction_is_shared {
                true => Tensor::new(inputs.sequences.first(&values(&factors)?), &Device::Cpu)?,
                false => inputs.sequences.sum(&factors)?,
            };
            log_ratio = log_ratio.add(&of_sequences)?;
        }
        let log_ratio = inputs.sequences.spread(&log_ratio.clamp(least, MAX_LOG_RATIO)?)?;
        let gained = inputs.advantages.ge(0.0)?;
        let ones = log_ratio.ones_like()?;
        let [(k, lambda), (k_negative, lambda_negative)] = self.vespo;
        let k = hold(&gained, k, &ones.affine(k_negative, 0.0)?)?;
        let lambda = hold(&gained, lambda, &ones.affine(lambda_negative, 0.0)?)?;
        let exponent = k.mul(&log_ratio)?.add(&lambda)?.sub(&lambda.mul(&log_ratio.exp()?)?)?;
        let phi = exponent.exp()?;
        let objective = phi.mul(inputs.advantages)?.mul(inputs.log_probs)?;
        Ok(Surrogate { phi: Some(values(&phi)?), ..Surrogate::new(objective) })
    }

    fn dppo(&self, inputs: &Inputs<'_>) -> Result<Surrogate> {
        let (log_prob, log_old) = (inputs.log_probs.detach(), inputs.old);
        let (prob, old) = (log_prob.exp()?, log_old.exp()?);
        let moved = prob.sub(&old)?;
        let (up, down) = (moved.gt(0.0)?, moved.lt(0.0)?);
        let distance = match self.kind {
            ClipKind::DppoTv => moved.abs()?,
            _ => {
                let others = |p: &Tensor| p.affine(-1.0, 1.0 + 1e-8);
                let this = old.mul(&log_old.sub(&log_prob)?)?;
                let another = old.affine(-1.0, 1.0)?.mul(&others(&old)?.div(&others(&prob)?)?.log()?)?;
                this.add(&another)?
            }
        };
        let low = distance.gt(self.low)?.mul(&down)?.mul(&inputs.advantages.lt(0.0)?)?;
        let high = distance.gt(self.high)?.mul(&up)?.mul(&inputs.advantages.gt(0.0)?)?;
        let mut weight = bounded_exp(inputs.log_ratio)?.detach();
        if let Some(delta) = self.delta {
            weight = weight.minimum(delta)?;
        }
        let weight = hold(&high, 0.0, &hold(&low, 0.0, &weight)?)?;
        let objective = weight.mul(inputs.advantages)?.mul(inputs.log_probs)?;
        Ok(Surrogate { held: Some((values(&low)?, values(&high)?)), ..Surrogate::new(objective) })
    }

    fn clip_cov(&self, inputs: &Inputs<'_>) -> Result<Surrogate> {
        let Surrogate { objective, held, dual, .. } = self.ppo(inputs)?;
        let (low, high) = held.unwrap_or_default();
        let covariances = covariances(inputs)?;
        let why = "clip_cov leaves out tokens at random";
        let draws = inputs.draws.ok_or(Error::Missing { what: "draws", why })?;
        check_length("draws", draws.len(), covariances.len())?;
        let (least, most) = self.cov_bounds;
        let mut chosen: Vec<usize> = (0..covariances.len())
            .filter(|&token| low[token] + high[token] == 0.0 && covariances[token] > least && covariances[token] < most)
            .collect();
        chosen.sort_by(|&a, &b| draws[a].total_cmp(&draws[b]).then(a.cmp(&b)));
        chosen.truncate(self.cov_count(covariances.len()));
        let objective = objective.mul(&mask(&chosen, covariances.len(), 0.0, 1.0)?)?;
        Ok(Surrogate { held: Some((low, high)), dual, ..Surrogate::new(objective) })
    }

    fn kl_cov(&self, inputs: &Inputs<'_>) -> Result<Surrogate> {
        let objective = bounded_exp(inputs.log_ratio)?.mul(inputs.advantages)?;
        let covariances = covariances(inputs)?;
        let mut chosen: Vec<usize> = (0..covariances.len()).collect();
        chosen.sort_by(|&a, &b| covariances[b].total_cmp(&covariances[a]).then(a.cmp(&b)));
        chosen.truncate(self.cov_count(covariances.len()));
        // The slope of |x| at 0 is taken for 0.
        let distance = inputs.log_ratio.mul(&inputs.log_ratio.detach().sign()?)?;
        let penalty = distance.mul(&mask(&chosen, covariances.len(), self.cov_penalty, 0.0)?)?;
        Ok(Surrogate::new(objective.sub(&penalty)?))
    }

    /// How many of `tokens` are chosen: at least one of any.
    fn cov_count(&self, tokens: usize) -> usize {
        ((self.cov_ratio * tokens as f64) as usize).max(1)
    }
}

/// `value` where `acted`, else what is in `otherwise`.
fn hold(acted: &Tensor, value: f64, otherwise: &Tensor) -> Result<Tensor> {
    Ok(acted.where_cond(&otherwise.ones_like()?.affine(value, 0.0)?, otherwise)?)
}

/// `(A - mean A)(log π - mean log π)` of every token, means over all tokens.
fn covariances(inputs: &Inputs<'_>) -> Result<Vec<f64>> {
    if inputs.log_probs.dims1()? == 0 {
        return Ok(Vec::new());
    }
    let centred = |x: &Tensor| x.broadcast_sub(&x.mean_keepdim(D::Minus1)?);
    values(&centred(inputs.advantages)?.mul(&centred(&inputs.log_probs.detach())?)?)
}

/// `chosen` at the chosen places and `other` elsewhere, `[N]`.
fn mask(places: &[usize], tokens: usize, chosen: f64, other: f64) -> Result<Tensor> {
    let mut values = vec![other; tokens];
    for &place in places {
        values[place] = chosen;
    }
    Ok(Tensor::from_slice(&values, tokens, &Device::Cpu)?)
}
