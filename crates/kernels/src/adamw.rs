//! The AdamW update (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019).

use base::Random;
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
        let update = Update::new(self, step, parameter.len(), [gradient.len(), m.len(), v.len()]);
        let isa = Isa::current();
        parameter
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
            .for_each(|((parameter, gradient), (m, v))| update_chunk(isa, update, parameter, gradient, m, v));
    }

    /// [`AdamW::update`] with moments stored as bfloat16 (its 16 bits). The parameter moves by the moments as they are before
    /// they are rounded for storage.
    ///
    /// Rounding is stochastic: a moment becomes the next bfloat16 above or below, with the probabilities that make its
    /// expected value the moment itself. Rounded to the nearest, a second moment would stop moving as soon as one step
    /// changes it by less than half of the last of its 8 bits, which at `beta2` = 0.999 is almost at once. What is drawn
    /// depends on `noise` and the element's index alone; `noise` must be another for every tensor and every update.
    ///
    /// # Panics
    /// As [`AdamW::update`].
    pub fn update_bf16(
        self,
        step: AdamWStep,
        parameter: &mut [f32],
        gradient: &[f32],
        m: &mut [u16],
        v: &mut [u16],
        noise: Random,
    ) {
        let update = Update::new(self, step, parameter.len(), [gradient.len(), m.len(), v.len()]);
        let isa = Isa::current();
        parameter
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
            .enumerate()
            .for_each(|(chunk, ((parameter, gradient), (m, v)))| {
                let first = chunk * (CHUNK / BLOCK * DRAWS);
                update_chunk_bf16(isa, update, parameter, gradient, m, v, noise, first as u32);
            });
    }
}

/// Elements of one task.
const CHUNK: usize = 1 << 15;
/// Draws that are made at a time; each serves four elements.
const DRAWS: usize = 16;
/// Elements that they serve.
const BLOCK: usize = 4 * DRAWS;

/// One update, with what all elements share.
#[derive(Clone, Copy)]
struct Update {
    method: AdamW,
    step: AdamWStep,
    m_correction: f32,
    v_correction: f32,
}

impl Update {
    fn new(method: AdamW, step: AdamWStep, parameters: usize, others: [usize; 3]) -> Self {
        assert!(others.iter().all(|&len| len == parameters), "AdamW: the slices differ in length");
        assert!(step.step > 0, "AdamW: updates count from 1");
        let correction = |beta: f32| 1.0 / (1.0 - power(f64::from(beta), step.step)) as f32;
        Self { method, step, m_correction: correction(method.beta1), v_correction: correction(method.beta2) }
    }

    /// Moves one parameter and returns its new moments.
    #[inline(always)]
    fn element(self, parameter: &mut f32, gradient: f32, m: f32, v: f32) -> (f32, f32) {
        let Self { method, step, m_correction, v_correction } = self;
        let gradient = gradient * step.gradient_scale;
        let m = method.beta1 * m + (1.0 - method.beta1) * gradient;
        let v = method.beta2 * v + (1.0 - method.beta2) * gradient * gradient;
        let direction = m * m_correction / ((v * v_correction).sqrt() + method.epsilon);
        *parameter -= step.learning_rate * (direction + step.weight_decay * *parameter);
        (m, v)
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
    fn update_chunk(update: Update, parameter: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((parameter, &gradient), m), v) in parameter.iter_mut().zip(gradient).zip(m).zip(v) {
            (*m, *v) = update.element(parameter, gradient, *m, *v);
        }
    }
}

multiversion! {
    fn update_chunk_bf16(
        update: Update,
        parameter: &mut [f32],
        gradient: &[f32],
        m: &mut [u16],
        v: &mut [u16],
        noise: Random,
        first_draw: u32,
    ) {
        let moments = m.chunks_mut(BLOCK).zip(v.chunks_mut(BLOCK));
        let blocks = parameter.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK)).zip(moments);
        for (((parameter, gradient), (m, v)), draw) in blocks.zip((first_draw..).step_by(DRAWS)) {
            // Word `w` of draw `d` is for element `w * DRAWS + d` of the block.
            let mut bits = [[0; DRAWS]; 4];
            for lane in 0..DRAWS {
                let words = noise.at(draw + lane as u32).0;
                for (bits, word) in bits.iter_mut().zip(words) {
                    bits[lane] = word;
                }
            }
            let elements = parameter.iter_mut().zip(gradient).zip(m).zip(v).zip(bits.as_flattened());
            for ((((parameter, &gradient), m), v), &bits) in elements {
                let (new_m, new_v) = update.element(parameter, gradient, widened(*m), widened(*v));
                *m = rounded(new_m, bits & 0xffff);
                *v = rounded(new_v, bits >> 16);
            }
        }
    }
}

#[inline(always)]
fn widened(bf16: u16) -> f32 {
    f32::from_bits(u32::from(bf16) << 16)
}

/// `x` cut to its upper half after `noise`, uniform below 2^16, was added to the lower.
#[inline(always)]
fn rounded(x: f32, noise: u32) -> u16 {
    (x.to_bits().wrapping_add(noise) >> 16) as u16
}
