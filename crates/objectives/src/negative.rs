//! What is to become less likely: by gradient ascent, or by CE-U.
//!
//! With `p` the probability of a token `y` that the loss lowers,
//!
//! ```text
//! gradient_ascent    ∇ log p                       in the logits    1 - p for y,    -p_v              for others
//! ce_u               ∇ [ - log(1 - p) ]                             p     for y,    -p_v p / (1 - p)  for others
//! ```
//!
//! Gradient ascent does not move what the model is sure of, and never stops at what it has given up: `1 - p` goes to 1, while `log p`
//! falls without bound. CE-U (Yang, arXiv 2503.01224) is the other way round. Its gradient is that of the loss `-log(1 - p)` of unlikelihood training
//! (Welleck et al., arXiv 1908.04319), and of cross-entropy towards the model's own distribution without the token.
//!
//! Everything else of the objective stays: margins, ratios and clips are those of `log p`, whose gradient alone is exchanged, by the factor
//! `p / (1 - p)`. The gradient is then that of no loss, since margins and ratios still are those of likelihoods.
//!
//! Deviation: the factor takes a probability of at most `1 - 1e-6`, since a log-probability of single precision does not tell how far from 1 a
//! probability beyond that is: from there on CE-U's pull fades, where it should stay 1. [`mod@crate::unlearning`], which sees whole
//! distributions, has no such bound.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::Result;

/// The most probable a token may be: `log(1 - 1e-6)`, nearly.
const MAX_LOG_PROB: f64 = -1e-6;

/// How what is to become less likely does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Negative {
    /// By gradient ascent on its negative log-likelihood: not at all where the model is sure, without end where it has given up.
    #[default]
    GradientAscent,
    /// By CE-U: at once where the model is sure, and then it stops.
    CeU,
}

impl Negative {
    /// Log-probabilities with the same values whose gradient, for the tokens that are `lowered` (1, else 0), is what this says.
    ///
    /// Both tensors are `[N]`; gradients flow into the first.
    pub(crate) fn log_probs(self, log_probs: &Tensor, lowered: &Tensor) -> Result<Tensor> {
        match self {
            Self::GradientAscent => Ok(log_probs.clone()),
            Self::CeU => {
                let constant = log_probs.detach();
                let p = constant.minimum(MAX_LOG_PROB)?.exp()?;
                let factor = p.div(&p.affine(-1.0, 1.0)?)?;
                let factor = lowered.where_cond(&factor, &factor.ones_like()?)?;
                // The difference is exactly 0, and the value what it was.
                Ok(constant.add(&log_probs.sub(&constant)?.mul(&factor)?)?)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// The derivative of the sum of the tokens' log-probabilities with respect to each.
    fn slopes(negative: Negative, log_probs: &[f64], lowered: &[u8]) -> Vec<f64> {
        let variable = Var::from_slice(log_probs, log_probs.len(), &Device::Cpu).unwrap();
        let lowered = Tensor::from_slice(lowered, lowered.len(), &Device::Cpu).unwrap();
        let found = negative.log_probs(variable.as_tensor(), &lowered).unwrap();
        assert_eq!(found.to_vec1::<f64>().unwrap(), log_probs, "values do not change");
        let gradients = found.sum_all().unwrap().backward().unwrap();
        gradients.get(variable.as_tensor()).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_slope_is_that_of_the_unlikelihood() {
        let log_probs = [-4.0, -0.7, -0.01, -1e-4];
        let found = slopes(Negative::CeU, &log_probs, &[1, 1, 1, 1]);
        for (x, found) in log_probs.into_iter().zip(found) {
            let (h, loss) = (1e-7 * f64::abs(x), |x: f64| -(-x.exp_m1()).ln());
            let difference = (loss(x + h) - loss(x - h)) / (2.0 * h);
            assert!((found / difference - 1.0).abs() < 1e-6, "{x}: {found}, expected {difference}");
        }
    }

    #[test]
    fn others_are_left_alone() {
        let log_probs = [-4.0, -0.7, -0.01];
        assert_eq!(slopes(Negative::GradientAscent, &log_probs, &[1, 1, 1]), [1.0; 3]);
        let found = slopes(Negative::CeU, &log_probs, &[0, 1, 0]);
        assert_eq!((found[0], found[2]), (1.0, 1.0));
    }

    #[test]
    fn limits() {
        // What is given up no longer pulls; what is certain pulls with 1 in the logit of the token, (1 - p) times the slope, and
        // less beyond what single precision tells apart.
        let found = slopes(Negative::CeU, &[-800.0, -1e-5, -1e-6, 0.0], &[1, 1, 1, 1]);
        assert!(found[0] < 1e-300, "{found:?}");
        for (x, slope) in [-1e-5f64, -1e-6].into_iter().zip(&found[1..]) {
            assert!((slope * -x.exp_m1() - 1.0).abs() < 2e-5, "{found:?}");
        }
        assert!(found[3].is_finite() && found[3] == found[2], "{found:?}");
    }
}
