//! The score head over hidden states, forward and backward.
//!
//! Its products are a few columns wide and always in f32: a score has the same bits whatever the precision's pairs of rows,
//! and a weight's gradient folds over rows in order, whatever the split of a batch.

use std::ops::Range;

use kernels::{Matrix, MatrixMut, Precision, matmul};

use super::parameters::{Gradients, Layout};
use crate::config::ScoreHead;
use crate::error::{Error, Result};

/// A score head's place in one flat storage: the base's, or an adapter's own copy of it.
#[derive(Clone)]
pub(super) struct Score {
    outputs: usize,
    hidden: usize,
    weight: Range<usize>,
    bias: Option<Range<usize>>,
}

/// Gradients of scores: what a backward through the score head starts from.
#[derive(Clone, Copy, Debug)]
pub struct ScoreGradients<'a> {
    /// Rows of the batch, ascending.
    pub rows: &'a [usize],
    /// The gradient of every output of every row: rows × outputs.
    pub d_scores: &'a [f32],
}

impl Score {
    /// Lays out the head's tensors.
    pub fn new(layout: &mut Layout, prefix: &str, head: ScoreHead, hidden: usize) -> Self {
        let mut ranges = head.tensor_shapes(prefix, hidden).into_iter().map(|(name, shape)| layout.push(name, shape));
        let weight = ranges.next().expect("a head has a weight");
        Self { outputs: head.outputs, hidden, weight, bias: ranges.next() }
    }

    /// The values of all its tensors: they are neighbours.
    pub fn range(&self) -> Range<usize> {
        self.weight.start..self.bias.as_ref().unwrap_or(&self.weight).end
    }

    /// Checks rows against a batch, and gradients against both.
    pub fn check(&self, gradients: ScoreGradients<'_>, rows: usize) -> Result<()> {
        check_rows(gradients.rows, rows)?;
        let (found, expected) = (gradients.d_scores.len(), gradients.rows.len() * self.outputs);
        if found != expected {
            return Err(Error::Invalid(format!("expected {expected} gradients of scores, got {found}")));
        }
        Ok(())
    }

    /// The scores of the chosen rows of `hidden`: rows × outputs.
    pub fn forward(&self, values: &[f32], hidden: &[f32], rows: &[usize]) -> Vec<f32> {
        let chosen = self.gather(hidden, rows);
        let mut scores = vec![0.0; rows.len() * self.outputs];
        let weight = Matrix::new(&values[self.weight.clone()], self.outputs, self.hidden).transposed();
        let chosen = Matrix::new(&chosen, rows.len(), self.hidden);
        matmul(Precision::F32, chosen, weight, MatrixMut::new(&mut scores, rows.len(), self.outputs), false);
        if let Some(bias) = &self.bias {
            kernels::add_bias(&mut scores, &values[bias.clone()]);
        }
        scores
    }

    /// Adds the gradient of the chosen rows to `d_hidden`, and that of the head's tensors, which lie in `values`, to `parameters`.
    pub fn backward(
        &self,
        values: &[f32],
        hidden: &[f32],
        gradients: ScoreGradients<'_>,
        d_hidden: &mut [f32],
        parameters: &mut Gradients,
    ) {
        let (rows, d) = (gradients.rows.len(), self.hidden);
        let d_scores = Matrix::new(gradients.d_scores, rows, self.outputs);
        let mut d_chosen = vec![0.0; rows * d];
        let weight = Matrix::new(&values[self.weight.clone()], self.outputs, d);
        matmul(Precision::F32, d_scores, weight, MatrixMut::new(&mut d_chosen, rows, d), false);
        for (&row, gradient) in gradients.rows.iter().zip(d_chosen.chunks_exact(d)) {
            kernels::add(&mut d_hidden[row * d..][..d], gradient);
        }
        let chosen = self.gather(hidden, gradients.rows);
        let d_weight = MatrixMut::new(parameters.range_mut(&self.weight), self.outputs, d);
        matmul(Precision::F32, d_scores.transposed(), Matrix::new(&chosen, rows, d), d_weight, true);
        if let Some(bias) = &self.bias {
            kernels::bias_backward(gradients.d_scores, parameters.range_mut(bias));
        }
    }

    fn gather(&self, hidden: &[f32], rows: &[usize]) -> Vec<f32> {
        rows.iter().flat_map(|row| &hidden[row * self.hidden..][..self.hidden]).copied().collect()
    }
}

/// Checks that rows are rows of a batch and go up.
pub(super) fn check_rows(chosen: &[usize], rows: usize) -> Result<()> {
    if let Some(row) = chosen.iter().find(|&&row| row >= rows) {
        return Err(Error::Invalid(format!("a score of row {row} is asked for, but the batch has {rows} rows")));
    }
    if let Some(pair) = chosen.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(Error::Invalid(format!("scores of rows {} and {}: expected ascending rows", pair[0], pair[1])));
    }
    Ok(())
}
