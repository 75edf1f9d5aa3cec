//! Averages of weights: model soups (Wortsman et al., arXiv 2203.05482) and weight-averaged reward models (WARM, Ramé et al.,
//! arXiv 2401.12187).

use super::{Decoder, identity};
use crate::error::{Error, Result};

impl Decoder {
    /// Replaces each weight by its mean over this decoder and `others`, weighted by `shares`, this one's first, which are scaled to a sum of
    /// one. Sums are folded in f64, in order. Adapters must have been merged.
    ///
    /// # Errors
    /// A decoder of another shape or with an adapter; shares that are not one a decoder, negative, not finite or all zero.
    pub fn average(&mut self, others: &[Self], shares: &[f64]) -> Result<()> {
        let count = others.len() + 1;
        let total: f64 = shares.iter().sum();
        let usable = shares.iter().all(|share| share.is_finite() && *share >= 0.0) && total.is_finite() && total > 0.0;
        if shares.len() != count || !usable {
            return Err(Error::Invalid(format!("expected {count} shares from 0 up and not all 0, got {shares:?}")));
        }
        let shapes = self.config.tensor_shapes();
        for (number, other) in (2..).zip(others) {
            if other.config.tensor_shapes() != shapes {
                return Err(Error::Invalid(format!("model {number} has not the shape of the first")));
            }
        }
        if self.adapter.is_some() || others.iter().any(|other| other.adapter.is_some()) {
            return Err(Error::Invalid("a model with an adapter cannot be averaged; merge it first".into()));
        }
        self.check_whole();
        others.iter().for_each(Self::check_whole);
        for (index, value) in self.base.iter_mut().enumerate() {
            let of_others = others.iter().zip(&shares[1..]).map(|(other, share)| share * f64::from(other.base[index]));
            *value = (of_others.fold(shares[0] * f64::from(*value), |sum, term| sum + term) / total) as f32;
        }
        self.base_stale = true;
        self.int8 = None;
        self.values = identity::Values::fresh();
        Ok(())
    }
}
