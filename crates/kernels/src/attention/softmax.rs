//! Rows of scores.

use crate::isa::multiversion;
use crate::math::{LANES, exp, ln, max, sum, sum_of_two};

/// The length of a row of `keys` scores with which no kernel here is left with single elements at the end.
pub(super) fn score_stride(keys: usize) -> usize {
    keys.next_multiple_of(LANES)
}

/// What a row of weights adds up to.
#[derive(Clone, Copy, Default)]
pub(super) struct Normaliser {
    /// The sum of the weights.
    total: f32,
    /// The largest of the scaled scores, which weighs one.
    largest: f32,
}

impl Normaliser {
    /// The factor that makes the weights add up to one.
    pub(super) fn inverse(self) -> f32 {
        1.0 / self.total
    }

    /// The log of the sum of the exponentials of the scaled scores. A long chain of operations: those of several rows, one right after the
    /// other, overlap.
    pub(super) fn log_sum_exp(self) -> f32 {
        self.largest + ln(self.total)
    }
}

multiversion! {
    /// Turns the scores of the `visible` first keys into `e^((score - largest) * scale)`, and all after them into zeros: what is
    /// computed but not visible weighs nothing.
    pub(super) fn softmax(scores: &mut [f32], visible: usize, scale: f32) -> Normaliser {
        // They do not change a bit of what follows, and spare it elements that do not fill a vector.
        scores[visible..].fill(f32::NEG_INFINITY);
        let largest = max(scores);
        for score in scores.iter_mut() {
            *score = exp((*score - largest) * scale);
        }
        Normaliser { total: sum(scores, |score| score), largest: largest * scale }
    }
}

multiversion! {
    /// Divides the weighted sum of values by the row's sum. Adding zero gives a sum that underflowed one sign of zero,
    /// whether or not keys of weight zero were folded in.
    pub(super) fn normalise(out: &mut [f32], inverse_total: f32) {
        for out in out {
            *out = *out * inverse_total + 0.0;
        }
    }
}

multiversion! {
    /// From scores and the gradients of the weights, for the visible keys: the weights, and the gradients of the scores
    /// (which replace those of the weights). `along` is the inner product of the row's output and its gradient.
    pub(super) fn softmax_backward(scores: &mut [f32], d_weights: &mut [f32], scale: f32, log_sum_exp: f32, along: f32) {
        for (score, d_weight) in scores.iter_mut().zip(d_weights) {
            *score = exp(*score * scale - log_sum_exp);
            *d_weight = *score * (*d_weight - along) * scale;
        }
    }
}

multiversion! {
    /// The inner product of two rows.
    pub(super) fn inner(a: &[f32], b: &[f32]) -> f32 {
        sum_of_two(a, b, |a, b| a * b)
    }
}
