//! PPO's clip: a ratio stops paying once it has moved far enough in the direction its advantage asks for.
//!
//! ```text
//! min(r A, clip(r, 1 - ε_low, 1 + ε_high) A)
//! ```
//!
//! Proximal Policy Optimization, arXiv 1707.06347, equation 7; ε_high > ε_low is the "clip-higher" of DAPO, arXiv
//! 2503.14476. The minimum is taken by cases: with A > 0 the ratio is held at 1 + ε_high, with A < 0 at 1 - ε_low, and
//! is left alone otherwise. A held ratio is a constant, so its gradient is exactly 0.

use candle_core::Tensor;

use crate::loss::Result;

/// How far the ratio may move from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    /// Room below 1, in `0..1`.
    pub low: f64,
    /// Room above 1.
    pub high: f64,
}

/// A clipped objective, and where the clip acted.
#[derive(Debug)]
pub struct Clipped {
    /// `min(r A, clip(r) A)`, to be maximised.
    pub objective: Tensor,
    /// 1 where the ratio was held at `1 - low` (A < 0), else 0.
    pub low: Tensor,
    /// 1 where the ratio was held at `1 + high` (A > 0), else 0.
    pub high: Tensor,
}

impl Clip {
    /// The clipped objective for every token; gradients flow into `ratio` only.
    pub fn apply(&self, ratio: &Tensor, advantages: &Tensor) -> Result<Clipped> {
        let advantages = advantages.detach();
        let (floor, ceiling) = (1.0 - self.low, 1.0 + self.high);
        let low = ratio.lt(floor)?.mul(&advantages.lt(0.0)?)?;
        let high = ratio.gt(ceiling)?.mul(&advantages.gt(0.0)?)?;
        let ones = ratio.ones_like()?;
        let held = low.where_cond(&ones.affine(floor, 0.0)?, ratio)?;
        let held = high.where_cond(&ones.affine(ceiling, 0.0)?, &held)?;
        Ok(Clipped { objective: held.mul(&advantages)?, low, high })
    }
}
