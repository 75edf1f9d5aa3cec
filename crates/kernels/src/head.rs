//! Rows of logits: the log-probability of a target, the entropy, and their gradients.

use crate::isa::{Isa, multiversion};
use crate::math::{exp, ln, max, sum, two_sums};

/// What one row of logits says, at temperature `1 / inverse_temperature`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowStats {
    /// The log-probability of the target.
    pub log_prob: f32,
    /// The log of the sum of the exponentials of the scaled logits.
    pub log_sum_exp: f32,
    /// The entropy of the row's distribution, in nats.
    pub entropy: f32,
    /// Whether no token is more probable than the target.
    pub most_probable: bool,
}

/// The statistics of the distribution `softmax(logits * inverse_temperature)`.
///
/// A logit of negative infinity is a token of probability 0. A row with a NaN or with positive infinity, or with nothing
/// but negative infinities, gives NaN.
///
/// # Panics
/// If the target is not a token of the row.
pub fn log_softmax_row(logits: &[f32], inverse_temperature: f32, target: usize) -> RowStats {
    assert!(target < logits.len(), "target {target} is outside the {} logits", logits.len());
    let (largest, total, weighted) = log_softmax_sums(Isa::current(), logits, inverse_temperature);
    let log_total = ln(total);
    // log_prob <= 0 holds in floating point too: the largest logit's own term is 1, so total >= 1.
    RowStats {
        log_prob: (logits[target] - largest) * inverse_temperature - log_total,
        log_sum_exp: largest * inverse_temperature + log_total,
        entropy: log_total - weighted / total,
        most_probable: logits[target] == largest,
    }
}

multiversion! {
    /// The largest logit, the sum of `e^s` and the sum of `s e^s`, where `s` is the scaled distance to the largest.
    fn log_softmax_sums(logits: &[f32], inverse_temperature: f32) -> (f32, f32, f32) {
        let largest = max(logits);
        let (total, weighted) = two_sums(logits, |logit| {
            let scaled = (logit - largest) * inverse_temperature;
            let weight = exp(scaled);
            // Infinitely far below: 0 times that is no number.
            (weight, if weight == 0.0 { 0.0 } else { weight * scaled })
        });
        (largest, total, weighted)
    }
}

/// What turns a logit of a row into a log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalizer {
    largest: f32,
    log_total: f32,
    inverse_temperature: f32,
}

impl Normalizer {
    /// The log-probability of a token with this logit: bit for bit that of [`log_softmax_row`].
    pub fn log_prob(self, logit: f32) -> f32 {
        (logit - self.largest) * self.inverse_temperature - self.log_total
    }
}

/// The unnormalised probabilities `e^((logits - max) * inverse_temperature)` of a row: between 0 and 1, and 1 for the
/// largest logit. They are the terms that [`log_softmax_row`] sums, so that the normaliser comes with them.
///
/// # Panics
/// If `weights` is not as long as `logits`.
pub fn softmax_weights(logits: &[f32], inverse_temperature: f32, weights: &mut [f32]) -> Normalizer {
    assert_eq!(weights.len(), logits.len(), "one weight for each logit");
    let (largest, total) = softmax_weights_row(Isa::current(), logits, inverse_temperature, weights);
    Normalizer { largest, log_total: ln(total), inverse_temperature }
}

multiversion! {
    fn softmax_weights_row(logits: &[f32], inverse_temperature: f32, weights: &mut [f32]) -> (f32, f32) {
        let largest = max(logits);
        for (weight, &logit) in weights.iter_mut().zip(logits) {
            *weight = exp((logit - largest) * inverse_temperature);
        }
        (largest, sum(weights, |weight| weight))
    }
}

/// Turns a row of logits into the gradient with respect to itself of
/// `d_log_prob * log_prob + d_entropy * entropy`, in place.
///
/// With `p = softmax(logits * t)`: `d_logits = t (d_log_prob (1[target] - p) - d_entropy p (ln p + entropy))`.
pub fn log_softmax_backward_row(
    logits: &mut [f32],
    inverse_temperature: f32,
    target: usize,
    stats: RowStats,
    d_log_prob: f32,
    d_entropy: f32,
) {
    log_softmax_gradient(Isa::current(), logits, inverse_temperature, stats, d_log_prob, d_entropy);
    logits[target] += d_log_prob * inverse_temperature;
}

multiversion! {
    fn log_softmax_gradient(logits: &mut [f32], inverse_temperature: f32, stats: RowStats, d_log_prob: f32, d_entropy: f32) {
        for logit in logits {
            let log_p = *logit * inverse_temperature - stats.log_sum_exp;
            let p = exp(log_p);
            let spread = if p == 0.0 { 0.0 } else { log_p + stats.entropy };
            *logit = -inverse_temperature * p * (d_log_prob + d_entropy * spread);
        }
    }
}
