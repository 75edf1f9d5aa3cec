//! The score head over hidden states, forward and backward.
//!
//! Its products are a few columns wide and always in f32: a score has the same bits whatever the precision's pairs of rows,
//! and a weight's gradient folds over rows in order, whatever the split of a batch.

use std::ops::Range;

use base::{Purpose, Random};
use kernels::{Matrix, MatrixMut, Onto, Precision, matmul};

use super::parameters::{Gradients, Layout};
use super::{Decoder, NonFinite, Workspace, fill};
use crate::config::{ModelConfig, ScoreHead};
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
    /// Which outputs the gradients are of; of all of them, where this is `None`.
    pub blocks: Option<Blocks<'a>>,
    /// The gradient of every output of every row, rows × outputs; with blocks, of those of its block: rows × width.
    pub d_scores: &'a [f32],
}

/// Some outputs of each row, of a head whose outputs are blocks of equal width: one for every token that may come next, say, of
/// which one came. What the others are is not computed.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    /// Outputs of a block.
    pub width: usize,
    /// The block of each row.
    pub of_rows: &'a [usize],
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

    /// The weights, outputs × width of the hidden states, in the storage that they lie in.
    pub fn weight<'v>(&self, values: &'v [f32]) -> &'v [f32] {
        &values[self.weight.clone()]
    }

    /// Adds a gradient of the weights to those of all parameters.
    pub fn add_weight_gradient(&self, gradient: &[f32], parameters: &mut Gradients) -> Result<()> {
        let (found, expected) = (gradient.len(), self.weight.len());
        if found != expected {
            return Err(Error::Invalid(format!(
                "expected {expected} gradients of a score head's weights, got {found}"
            )));
        }
        kernels::add(parameters.range_mut(&self.weight), gradient);
        Ok(())
    }

    /// Checks rows against a batch, and gradients against both.
    pub fn check(&self, gradients: ScoreGradients<'_>, rows: usize) -> Result<()> {
        check_rows(gradients.rows, rows)?;
        gradients.blocks.map_or(Ok(()), |blocks| self.check_blocks(gradients.rows, blocks))?;
        let width = gradients.blocks.map_or(self.outputs, |blocks| blocks.width);
        let (found, expected) = (gradients.d_scores.len(), gradients.rows.len() * width);
        if found != expected {
            return Err(Error::Invalid(format!("expected {expected} gradients of scores, got {found}")));
        }
        Ok(())
    }

    /// Checks that the outputs are blocks of this width, and that every row has one of them.
    pub fn check_blocks(&self, rows: &[usize], blocks: Blocks<'_>) -> Result<()> {
        let Blocks { width, of_rows } = blocks;
        if width == 0 || !self.outputs.is_multiple_of(width) {
            return Err(Error::Invalid(format!("{} outputs are not blocks of {width}", self.outputs)));
        }
        if of_rows.len() != rows.len() {
            return Err(Error::Invalid(format!(
                "expected a block for each of {} rows, got {}",
                rows.len(),
                of_rows.len()
            )));
        }
        let count = self.outputs / width;
        match of_rows.iter().find(|&&block| block >= count) {
            Some(block) => Err(Error::Invalid(format!("block {block} is asked for, but the head has {count}"))),
            None => Ok(()),
        }
    }

    /// The scores of the chosen rows of `hidden`: rows × outputs.
    pub fn forward(&self, values: &[f32], hidden: &[f32], rows: &[usize]) -> Vec<f32> {
        let chosen = self.gather(hidden, rows);
        let mut scores = vec![0.0; rows.len() * self.outputs];
        let weight = Matrix::new(&values[self.weight.clone()], self.outputs, self.hidden).transposed();
        let chosen = Matrix::new(&chosen, rows.len(), self.hidden);
        matmul(Precision::F32, chosen, weight, MatrixMut::new(&mut scores, rows.len(), self.outputs), Onto::Zero);
        if let Some(bias) = &self.bias {
            kernels::add_bias(&mut scores, &values[bias.clone()]);
        }
        scores
    }

    /// The scores of a block of each of the chosen rows of `hidden`, rows × width, with the bits that [`Score::forward`] gives them.
    pub fn forward_blocks(&self, values: &[f32], hidden: &[f32], rows: &[usize], blocks: Blocks<'_>) -> Vec<f32> {
        let (width, d) = (blocks.width, self.hidden);
        let mut scores = vec![0.0; rows.len() * width];
        for ((&row, &block), scores) in rows.iter().zip(blocks.of_rows).zip(scores.chunks_exact_mut(width)) {
            let weight = Matrix::new(&values[self.weight_of(block, width)], width, d).transposed();
            let chosen = Matrix::new(&hidden[row * d..][..d], 1, d);
            matmul(Precision::F32, chosen, weight, MatrixMut::new(scores, 1, width), Onto::Zero);
            if let Some(bias) = &self.bias {
                kernels::add_bias(scores, &values[bias.start + block * width..][..width]);
            }
        }
        scores
    }

    /// Where the weights of a block lie.
    fn weight_of(&self, block: usize, width: usize) -> Range<usize> {
        let size = width * self.hidden;
        self.weight.start + block * size..self.weight.start + (block + 1) * size
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
        if let Some(blocks) = gradients.blocks {
            return self.backward_blocks(values, hidden, (gradients, blocks), d_hidden, parameters);
        }
        let (rows, d) = (gradients.rows.len(), self.hidden);
        let d_scores = Matrix::new(gradients.d_scores, rows, self.outputs);
        let mut d_chosen = vec![0.0; rows * d];
        let weight = Matrix::new(&values[self.weight.clone()], self.outputs, d);
        matmul(Precision::F32, d_scores, weight, MatrixMut::new(&mut d_chosen, rows, d), Onto::Zero);
        for (&row, gradient) in gradients.rows.iter().zip(d_chosen.chunks_exact(d)) {
            kernels::add(&mut d_hidden[row * d..][..d], gradient);
        }
        let chosen = self.gather(hidden, gradients.rows);
        let d_weight = MatrixMut::new(parameters.range_mut(&self.weight), self.outputs, d);
        matmul(Precision::F32, d_scores.transposed(), Matrix::new(&chosen, rows, d), d_weight, Onto::Held);
        if let Some(bias) = &self.bias {
            kernels::bias_backward(gradients.d_scores, parameters.range_mut(bias));
        }
    }

    /// [`Score::backward`] of blocks: the weights of the others have no gradient.
    fn backward_blocks(
        &self,
        values: &[f32],
        hidden: &[f32],
        (gradients, blocks): (ScoreGradients<'_>, Blocks<'_>),
        d_hidden: &mut [f32],
        parameters: &mut Gradients,
    ) {
        let (width, d) = (blocks.width, self.hidden);
        let mut d_chosen = vec![0.0; d];
        let of_rows = gradients.rows.iter().zip(blocks.of_rows).zip(gradients.d_scores.chunks_exact(width));
        for ((&row, &block), own) in of_rows {
            let weight = self.weight_of(block, width);
            let d_scores = Matrix::new(own, 1, width);
            let of_block = Matrix::new(&values[weight.clone()], width, d);
            matmul(Precision::F32, d_scores, of_block, MatrixMut::new(&mut d_chosen, 1, d), Onto::Zero);
            kernels::add(&mut d_hidden[row * d..][..d], &d_chosen);
            let chosen = Matrix::new(&hidden[row * d..][..d], 1, d);
            let d_weight = MatrixMut::new(parameters.range_mut(&weight), width, d);
            matmul(Precision::F32, d_scores.transposed(), chosen, d_weight, Onto::Held);
            if let Some(bias) = &self.bias {
                let start = bias.start + block * width;
                kernels::add(parameters.range_mut(&(start..start + width)), own);
            }
        }
    }

    fn gather(&self, hidden: &[f32], rows: &[usize]) -> Vec<f32> {
        rows.iter().flat_map(|row| &hidden[row * self.hidden..][..self.hidden]).copied().collect()
    }
}

impl Decoder {
    /// Adds a score head with weights drawn from a normal distribution of this deviation (0: all zero) and a bias of zero.
    /// A head that scores sequences or tokens takes the place of the language model's.
    ///
    /// # Errors
    /// A head that is none, or one on top of another; a decoder with an adapter, whose part the head would have to be.
    pub fn add_score(&mut self, head: ScoreHead, deviation: f64, seed: u64) -> Result<()> {
        if self.config.score.is_some() || self.adapter.is_some() {
            let what = if self.adapter.is_some() { "an adapter" } else { "a score head" };
            return Err(Error::Invalid(format!("a score head cannot be added to a decoder that has {what} already")));
        }
        self.check_whole();
        let mut decoder = Self::zeros(ModelConfig { score: Some(head), ..self.config.clone() })?;
        for entry in &decoder.layout.entries {
            let values = &mut decoder.base[entry.range.clone()];
            if let Some(own) = self.layout.get(&entry.name) {
                values.copy_from_slice(&self.base[own.range.clone()]);
            } else if entry.shape.len() > 1 {
                let random = Random::new(seed, Purpose::Init).step(2);
                fill(values, |i| (random.normal(i) * deviation) as f32);
            }
        }
        decoder.device = self.device.take();
        *self = decoder;
        Ok(())
    }

    /// Leaves the first of the score head's outputs and drops the others; the adapter's copy of the head, if there is one, likewise.
    ///
    /// # Errors
    /// A decoder without a score head.
    pub fn keep_first_score(&mut self) -> Result<()> {
        let head = self.config.score.ok_or_else(no_score_head)?;
        self.check_whole();
        let adapter = self.adapter_config().cloned().zip(Some(self.adapter_tensors()));
        let mut decoder =
            Self::zeros(ModelConfig { score: Some(ScoreHead { outputs: 1, ..head }), ..self.config.clone() })?;
        for entry in &decoder.layout.entries {
            let Some(own) = self.layout.get(&entry.name) else { continue };
            // The rows of the head's tensors are its outputs.
            let own = &self.base[own.range.clone()];
            decoder.base[entry.range.clone()].copy_from_slice(&own[..entry.range.len()]);
        }
        decoder.device = self.device.take();
        if let Some((config, mut tensors)) = adapter {
            for (name, tensor) in &mut tensors {
                if name.contains("score.") {
                    tensor.data.truncate(tensor.data.len() / head.outputs);
                    tensor.shape[0] = 1;
                }
            }
            decoder.load_adapter(&config, tensors)?;
        }
        *self = decoder;
        Ok(())
    }

    /// The weights of the score head that counts, outputs × width of the hidden states.
    ///
    /// # Errors
    /// A decoder without a score head.
    pub fn score_weight(&self) -> Result<&[f32]> {
        let (score, values) = self.score()?;
        Ok(score.weight(values))
    }

    /// Adds a gradient of [`Decoder::score_weight`], of a loss of the weights themselves, to `gradients`.
    ///
    /// # Errors
    /// A decoder without a score head; a gradient of another length; an adapter that is switched off.
    pub fn add_score_weight_gradient(&self, gradient: &[f32], gradients: &mut Gradients) -> Result<()> {
        self.check_adapter_is_on()?;
        self.score()?.0.add_weight_gradient(gradient, gradients)
    }

    /// The score head that counts, with the storage it lies in: the adapter's while the adapter is on.
    fn score(&self) -> Result<(&Score, &[f32])> {
        let adapted = self.adapter.as_ref().filter(|adapter| adapter.on);
        let adapted = adapted.and_then(|adapter| Some((adapter.score.as_ref()?, &adapter.values[..])));
        let own = || self.score.as_ref().map(|score| (score, &self.base[..]));
        adapted.or_else(own).ok_or_else(no_score_head)
    }

    /// The outputs of the score head at the given rows, ascending, of the last forward or decode: rows × outputs.
    ///
    /// # Errors
    /// A model without such a head, weights that are not prepared, rows outside the batch or out of order, and the first
    /// score that is not finite.
    pub fn scores(&self, workspace: &Workspace, rows: &[usize]) -> Result<Vec<f32>> {
        self.scores_of(workspace, rows, |score, values| Ok(score.forward(values, &workspace.hidden, rows)))
    }

    /// One block of the outputs of the score head at each of the given rows, with the bits that [`Decoder::scores`] gives it: rows × width.
    ///
    /// # Errors
    /// As [`Decoder::scores`], and blocks that the head does not have.
    pub fn block_scores(&self, workspace: &Workspace, rows: &[usize], blocks: Blocks<'_>) -> Result<Vec<f32>> {
        self.scores_of(workspace, rows, |score, values| {
            score.check_blocks(rows, blocks)?;
            Ok(score.forward_blocks(values, &workspace.hidden, rows, blocks))
        })
    }

    fn scores_of(
        &self,
        workspace: &Workspace,
        rows: &[usize],
        forward: impl FnOnce(&Score, &[f32]) -> Result<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        match &self.device {
            Some(device) => device.check_ready(self)?,
            None => drop(self.ready()?),
        }
        let (score, values) = self.score()?;
        check_rows(rows, workspace.rows)?;
        let scores = forward(score, values)?;
        match NonFinite::find(None, "score", &scores, scores.len() / rows.len().max(1)) {
            Some(found) => Err(NonFinite { row: rows[found.row], ..found }.into()),
            None => Ok(scores),
        }
    }

    pub(super) fn backward_score_head(
        &self,
        workspace: &Workspace,
        scores: ScoreGradients<'_>,
        d_hidden: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        if scores.rows.is_empty() {
            return Ok(());
        }
        let (score, values) = self.score()?;
        score.check(scores, workspace.rows)?;
        score.backward(values, &workspace.hidden, scores, d_hidden, gradients);
        Ok(())
    }
}

/// Checks that rows are rows of a batch and go up.
fn check_rows(chosen: &[usize], rows: usize) -> Result<()> {
    if let Some(row) = chosen.iter().find(|&&row| row >= rows) {
        return Err(Error::Invalid(format!("a score of row {row} is asked for, but the batch has {rows} rows")));
    }
    if let Some(pair) = chosen.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(Error::Invalid(format!("scores of rows {} and {}: expected ascending rows", pair[0], pair[1])));
    }
    Ok(())
}

fn no_score_head() -> Error {
    Error::Invalid("the model has no score head".into())
}
