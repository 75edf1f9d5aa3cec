//! The value model's loss: squared distance from the returns, moving no further from the old estimates than a bound.
//!
//! ```text
//! L = Σ_t w_t / 2 · max((V_t - R_t)², (clip(V_t, V_old,t ± c) - R_t)²)
//! ```
//!
//! PPO's implementations (Engstrom et al., arXiv 2005.12729, section 3); without a bound the plain squared error.
//!
//! Metrics, named as TRL names them:
//! - `loss/value_avg`: mean loss of a token.
//! - `val/clipfrac_avg`: fraction of tokens where the bound acted.
//! - `val/explained_variance` is `1 - var(R - V) / var(R)`; it needs all tokens at once and comes from [`explained_variance`].

use candle_core::Tensor;

use crate::loss::{Loss, Reduce, Result, Statistic, constant, per_token, values};

/// The loss tokens of a micro-batch; every tensor has one entry per loss token.
#[derive(Debug)]
pub struct ValueBatch {
    /// V_t of the model being trained, `[N]`, tracking gradients.
    pub values: Tensor,
    /// V_old,t at the time of sampling, `[N]`.
    pub old_values: Tensor,
    /// R_t, what is to be learnt, `[N]`.
    pub returns: Tensor,
    /// The weight of each token, with its global denominator inside, `[N]`.
    pub weights: Tensor,
}

/// The loss of a value model; `clip` is how far an estimate may move from the old one, if bounded.
///
/// # Errors
/// Inputs that differ in length.
pub fn value(clip: Option<f64>, batch: &ValueBatch) -> Result<Loss> {
    let tokens = batch.values.elem_count();
    let new = per_token("values", &batch.values, tokens)?;
    let old = constant("old_values", &batch.old_values, tokens)?;
    let returns = constant("returns", &batch.returns, tokens)?;
    let weights = constant("weights", &batch.weights, tokens)?;
    let free = new.sub(&returns)?.sqr()?;
    let (squares, held) = match clip {
        None => (free.clone(), free.zeros_like()?),
        Some(clip) => {
            let bounded = new.minimum(&old.affine(1.0, clip)?)?.maximum(&old.affine(1.0, -clip)?)?;
            let bounded = bounded.sub(&returns)?.sqr()?;
            let held = bounded.gt(&free)?;
            (held.where_cond(&bounded, &free)?, held.to_dtype(candle_core::DType::F64)?)
        }
    };
    let loss = squares.affine(0.5, 0.0)?;
    let statistics = vec![
        Statistic { name: "loss/value_avg", values: values(&loss)?, reduce: Reduce::Mean },
        Statistic { name: "val/clipfrac_avg", values: values(&held)?, reduce: Reduce::Mean },
    ];
    Ok(Loss { per_token: loss.mul(&weights)?, statistics })
}

/// How much of the returns' variance the estimates explain: 1 is all, 0 no more than their mean; `None` where the returns do
/// not vary.
pub fn explained_variance(estimates: &[f64], returns: &[f64]) -> Option<f64> {
    let variance = |values: &mut dyn Iterator<Item = f64>| {
        let values: Vec<f64> = values.collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        values.iter().map(|value| (value - mean).powi(2)).sum::<f64>()
    };
    let all = variance(&mut returns.iter().copied());
    let left = variance(&mut returns.iter().zip(estimates).map(|(r, v)| r - v));
    (all > 0.0).then(|| 1.0 - left / all)
}
