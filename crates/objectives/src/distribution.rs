//! Losses of whole next-token distributions, one row of logits at a time.
//!
//! Most objectives need the log-probability of one token in each row, and the engine gives them that alone. A divergence
//! from a teacher, smoothed labels or the probability of everything *but* a token need the whole row. The engine hands out
//! such rows chunk by chunk and takes back, in place of each logit, the gradient of the loss with respect to it.
//!
//! A loss `D` of `p = softmax(z / T)` is written as its value and `g_v = p_v ∂D/∂p_v`, which stays finite where `∂D/∂p_v`
//! does not; the softmax then gives
//!
//! ```text
//! ∂D/∂z_v = (g_v - p_v Σ_u g_u) / T
//! ```
//!
//! [`by_autodiff`] is the convenient way to the same: a loss of a `[rows, vocabulary]` tensor, differentiated by candle, at
//! several times the cost.

use candle_core::{Device, Tensor, Var};

use crate::loss::{Error, Result, check_length, values};

/// The distribution `softmax(z / T)` over the vocabulary, in f64. A logit of negative infinity is a token of probability 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution {
    log_probs: Vec<f64>,
    probs: Vec<f64>,
}

impl Distribution {
    /// From logits at a temperature above 0.
    pub fn new(logits: &[f32], temperature: f64) -> Self {
        Self::of(logits.iter().map(|&logit| f64::from(logit) / temperature).collect())
    }

    /// From logits, or from anything that differs from them by a constant.
    pub fn of(mut logits: Vec<f64>) -> Self {
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut probs: Vec<f64> = logits.iter().map(|logit| (logit - largest).exp()).collect();
        let total: f64 = probs.iter().sum();
        let log_total = largest + total.ln();
        logits.iter_mut().for_each(|logit| *logit -= log_total);
        probs.iter_mut().for_each(|prob| *prob /= total);
        Self { log_probs: logits, probs }
    }

    /// log p of every token.
    pub fn log_probs(&self) -> &[f64] {
        &self.log_probs
    }

    /// p of every token.
    pub fn probs(&self) -> &[f64] {
        &self.probs
    }

    /// The entropy, in nats.
    pub fn entropy(&self) -> f64 {
        -self.pairs().map(|(p, log_p)| times(p, log_p)).sum::<f64>()
    }

    /// The most probable token; the first of several.
    pub fn most_probable(&self) -> usize {
        let first = |best: usize, token: usize| if self.probs[token] > self.probs[best] { token } else { best };
        (0..self.probs.len()).fold(0, first)
    }

    /// (p, log p) of every token.
    pub fn pairs(&self) -> impl Iterator<Item = (f64, f64)> {
        self.probs.iter().copied().zip(self.log_probs.iter().copied())
    }

    /// Replaces the logits this was made of at `temperature` by the gradient of `weight · D`, given `g_v = p_v ∂D/∂p_v`.
    ///
    /// # Panics
    /// If the lists differ in length.
    pub fn write_gradient(&self, g: &[f64], weight: f64, temperature: f64, logits: &mut [f32]) {
        assert!(g.len() == logits.len() && g.len() == self.probs.len(), "one value for each token");
        let (total, scale) = (g.iter().sum::<f64>(), weight / temperature);
        for ((logit, g), p) in logits.iter_mut().zip(g).zip(&self.probs) {
            *logit = (scale * (g - p * total)) as f32;
        }
    }
}

/// `p · x`, where a probability of 0, or too small for its logarithm to be trusted, makes any `x` count for nothing.
pub(crate) fn times(p: f64, x: f64) -> f64 {
    if p < f64::MIN_POSITIVE { 0.0 } else { p * x }
}

/// `log(e^a + e^b)`.
pub(crate) fn log_add_exp(a: f64, b: f64) -> f64 {
    let largest = a.max(b);
    if largest == f64::NEG_INFINITY { largest } else { largest + ((a - largest).exp() + (b - largest).exp()).ln() }
}

/// Replaces rows of logits by the gradient of a loss of them all: `loss` receives them as a `[rows, vocabulary]` f32 tensor that
/// tracks gradients and returns the weighted loss of every row, whose sum is differentiated. Returns these losses.
///
/// # Errors
/// Rows of different length, a loss that is not one number a row, and whatever `loss` fails with.
pub fn by_autodiff(rows: &mut [&mut [f32]], loss: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Vec<f64>> {
    let Some(vocabulary) = rows.first().map(|row| row.len()) else { return Ok(Vec::new()) };
    for row in rows.iter() {
        check_length("a row of logits", row.len(), vocabulary)?;
    }
    let all = rows.concat();
    let logits = Var::from_vec(all, (rows.len(), vocabulary), &Device::Cpu)?;
    let losses = loss(logits.as_tensor())?;
    check_length("the losses of the rows", losses.elem_count(), rows.len())?;
    let gradients = losses.sum_all()?.backward()?;
    let gradient = match gradients.get(logits.as_tensor()) {
        Some(gradient) => gradient.flatten_all()?.to_vec1::<f32>()?,
        None => vec![0.0; rows.len() * vocabulary],
    };
    for (row, gradient) in rows.iter_mut().zip(gradient.chunks_exact(vocabulary)) {
        row.copy_from_slice(gradient);
    }
    values(&losses)
}

/// Refuses a value outside `valid`.
pub(crate) fn check_range(what: &'static str, value: f64, valid: bool, expected: &'static str) -> Result<()> {
    if value.is_finite() && valid { Ok(()) } else { Err(Error::Range { what, got: value, expected }) }
}
