//! The AdamW update (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019).

use rayon::prelude::*;

use crate::isa::{Isa, multiversion};

/// The constants of the method.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
}

/// What differs from one update to the next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// The number of this update, from 1.
    pub step: u64,
    /// The learning rate.
    pub learning_rate: f32,
    /// The decay of the weights, relative to the learning rate; 0 for biases and norms, by convention.
    pub weight_decay: f32,
    /// The gradient is multiplied by this first (clipping).
    pub gradient_scale: f32,
}

impl AdamW {
    /// Updates `parameter` and its two moments from `gradient`:
    ///
    /// ```text
    /// g = gradient_scale * gradient
    /// m = beta1 m + (1 - beta1) g           v = beta2 v + (1 - beta2) g^2
    /// parameter -= learning_rate * (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + epsilon) + weight_decay * parameter)
    /// ```
    ///
    /// # Panics
    /// If the slices differ in length or the step is 0.
    pub fn update(self, step: AdamWStep, parameter: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]) {
        let n = parameter.len();
        assert!(gradient.len() == n && m.len() == n && v.len() == n, "AdamW: the slices differ in length");
        assert!(step.step > 0, "AdamW: updates count from 1");
        let correction = |beta: f32| 1.0 / (1.0 - power(f64::from(beta), step.step)) as f32;
        let (m_correction, v_correction) = (correction(self.beta1), correction(self.beta2));
        let isa = Isa::current();
        const CHUNK: usize = 1 << 15;
        parameter
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
            .for_each(|((parameter, gradient), (m, v))| {
                update_chunk(isa, self, step, m_correction, v_correction, parameter, gradient, m, v);
            });
    }
}

/// `base^exponent` by squaring: the same bits everywhere, unlike the C library's.
fn power(base: f64, exponent: u64) -> f64 {
    let (mut result, mut square, mut rest) = (1.0, base, exponent);
    while rest > 0 {
        if rest & 1 == 1 {
            result *= square;
        }
        square *= square;
        rest >>= 1;
    }
    result
}

multiversion! {
    fn update_chunk(
        method: AdamW,
        step: AdamWStep,
        m_correction: f32,
        v_correction: f32,
        parameter: &mut [f32],
        gradient: &[f32],
        m: &mut [f32],
        v: &mut [f32],
    ) {
        for (((parameter, &gradient), m), v) in parameter.iter_mut().zip(gradient).zip(m).zip(v) {
            let gradient = gradient * step.gradient_scale;
            *m = method.beta1 * *m + (1.0 - method.beta1) * gradient;
            *v = method.beta2 * *v + (1.0 - method.beta2) * gradient * gradient;
            let direction = *m * m_correction / ((*v * v_correction).sqrt() + method.epsilon);
            *parameter -= step.learning_rate * (direction + step.weight_decay * *parameter);
        }
    }
}
