//! The fused head on the device: one chunk of logits at a time, forward and backward.

use candle_core::{D, DType, Result as CandleResult, Tensor};

use super::super::head::{Ends, Head, LogProbs, LogitRow, Target, chunk_rows};
use super::super::not_prepared;
use super::super::workspace::HeadScratch;
use super::{Decoder, OnDevice, accumulate, product, product_type, to_host};
use crate::error::Result;

/// Statistics of a chunk of logits, one row a target.
struct Chunk {
    /// The log-probability of every token.
    log_p: Tensor,
    /// The targets as a column.
    ids: Tensor,
    /// Log-probabilities of the targets, as a column.
    chosen: Tensor,
    /// Entropies, as a column.
    entropy: Tensor,
}

impl Chunk {
    fn new(logits: &Tensor, targets: &[Target], temperature: f32) -> CandleResult<Self> {
        let logits = (logits / f64::from(temperature))?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
        let log_p = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
        let ids: Vec<u32> = targets.iter().map(|target| target.token).collect();
        let ids = Tensor::from_vec(ids, (targets.len(), 1), logits.device())?;
        let chosen = log_p.gather(&ids, 1)?;
        let entropy = (log_p.exp()? * &log_p)?.sum_keepdim(D::Minus1)?.neg()?;
        Ok(Self { log_p, ids, chosen, entropy })
    }

    /// Appends what is asked for to what was found before.
    fn append_to(&self, found: &mut LogProbs, want_entropy: bool) -> CandleResult<()> {
        let chosen = to_host(&self.chosen)?;
        let most = to_host(&self.log_p.max_keepdim(D::Minus1)?)?;
        found.most_probable.extend(chosen.iter().zip(&most).map(|(chosen, most)| chosen >= most));
        found.log_prob.extend(chosen);
        if want_entropy {
            found.entropy.extend(to_host(&self.entropy)?);
        }
        Ok(())
    }

    /// The gradient of the logits, given those of log-probabilities and entropies as columns:
    /// `d_log_prob · (1[j = target] - p_j) - d_entropy · p_j · (log p_j + entropy)`, over the temperature.
    fn d_logits(&self, d_log_prob: &Tensor, d_entropy: Option<&Tensor>, temperature: f32) -> CandleResult<Tensor> {
        let p = self.log_p.exp()?;
        let mut slope = d_log_prob.broadcast_as(p.shape())?.contiguous()?;
        if let Some(d_entropy) = d_entropy {
            slope = (slope + self.log_p.broadcast_add(&self.entropy)?.broadcast_mul(d_entropy)?)?;
        }
        let d_logits = (p * slope)?.neg()?.scatter_add(&self.ids, d_log_prob, 1)?;
        d_logits / f64::from(temperature)
    }
}

/// The head's weight, and what products with it need to know.
struct HeadWeight<'a> {
    /// `vocabulary × hidden`.
    weight: &'a Tensor,
    of: DType,
    hidden: usize,
    vocabulary: usize,
    trained: bool,
}

impl OnDevice {
    fn head(&self, decoder: &Decoder) -> Result<HeadWeight<'_>> {
        let weights = self.ready(decoder)?;
        let Head { hidden, vocabulary, .. } = *decoder.language_head()?;
        Ok(HeadWeight {
            weight: weights.head.as_ref().ok_or_else(not_prepared)?,
            of: product_type(weights.precision),
            hidden,
            vocabulary,
            trained: decoder.adapter.is_none(),
        })
    }

    /// [`Decoder::logits`].
    pub fn logits(&self, decoder: &Decoder, hidden: &[f32], logits: &mut [f32]) -> Result<()> {
        let head = self.head(decoder)?;
        let hidden = Tensor::from_slice(hidden, (hidden.len() / head.hidden, head.hidden), self.device())?;
        logits.copy_from_slice(&to_host(&head.logits(&hidden)?)?);
        Ok(())
    }

    /// [`Decoder::log_probs`].
    pub fn log_probs(
        &self,
        decoder: &Decoder,
        hidden: &[f32],
        targets: &[Target],
        temperature: f32,
        want_entropy: bool,
    ) -> Result<LogProbs> {
        let head = self.head(decoder)?;
        let mut found = LogProbs::default();
        for (_, targets) in head.chunks(targets) {
            let logits = head.logits(&self.gather(hidden, targets, head.hidden)?)?;
            Chunk::new(&logits, targets, temperature)?.append_to(&mut found, want_entropy)?;
        }
        found.checked(targets)
    }

    /// [`Decoder::visit_logits`].
    pub fn visit<E>(
        &self,
        decoder: &Decoder,
        hidden: &[f32],
        targets: &[Target],
        scratch: &mut HeadScratch,
        mut visit: impl FnMut(Vec<LogitRow<'_>>) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<(), E>> {
        let head = self.head(decoder)?;
        for (first, targets) in head.chunks(targets) {
            scratch.logits = to_host(&head.logits(&self.gather(hidden, targets, head.hidden)?)?)?;
            if let Err(error) = visit(rows(first, &mut scratch.logits, head.vocabulary)) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }

    /// The head's part of [`Decoder::backward`].
    pub fn backward_head(
        &self,
        decoder: &Decoder,
        targets: &[Target],
        temperature: f32,
        (d_log_prob, d_entropy): (&[f32], Option<&[f32]>),
        ends: &mut Ends<'_>,
    ) -> Result<LogProbs> {
        let head = self.head(decoder)?;
        let mut found = LogProbs::default();
        let mut d_weight = None;
        for (first, targets) in head.chunks(targets) {
            let here = first..first + targets.len();
            let column = |values: &[f32]| Tensor::from_slice(&values[here.clone()], (targets.len(), 1), self.device());
            let hidden = self.gather(ends.hidden, targets, head.hidden)?;
            let chunk = Chunk::new(&head.logits(&hidden)?, targets, temperature)?;
            chunk.append_to(&mut found, true)?;
            let d_entropy = d_entropy.map(column).transpose()?;
            let d_logits = chunk.d_logits(&column(d_log_prob)?, d_entropy.as_ref(), temperature)?;
            head.backward(&d_logits, &hidden, targets, ends, &mut d_weight)?;
        }
        head.finish(decoder, d_weight, ends)?;
        found.checked(targets)
    }

    /// The head's part of [`Decoder::backward_logits`].
    pub fn backward_visit<E>(
        &self,
        decoder: &Decoder,
        targets: &[Target],
        ends: &mut Ends<'_>,
        scratch: &mut HeadScratch,
        mut visit: impl FnMut(Vec<LogitRow<'_>>) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<(), E>> {
        let head = self.head(decoder)?;
        let mut d_weight = None;
        for (first, targets) in head.chunks(targets) {
            let hidden = self.gather(ends.hidden, targets, head.hidden)?;
            scratch.logits = to_host(&head.logits(&hidden)?)?;
            if let Err(error) = visit(rows(first, &mut scratch.logits, head.vocabulary)) {
                return Ok(Err(error));
            }
            let d_logits = Tensor::from_slice(&scratch.logits, (targets.len(), head.vocabulary), self.device())?;
            head.backward(&d_logits, &hidden, targets, ends, &mut d_weight)?;
        }
        head.finish(decoder, d_weight, ends)?;
        Ok(Ok(()))
    }

    /// The hidden states that predict a chunk of targets.
    fn gather(&self, hidden: &[f32], targets: &[Target], d: usize) -> CandleResult<Tensor> {
        let rows: Vec<f32> = targets.iter().flat_map(|target| &hidden[target.row * d..][..d]).copied().collect();
        Tensor::from_vec(rows, (targets.len(), d), self.device())
    }
}

/// The rows of a chunk that begins with target `first`.
fn rows(first: usize, logits: &mut [f32], vocabulary: usize) -> Vec<LogitRow<'_>> {
    let rows = (first..).zip(logits.chunks_exact_mut(vocabulary));
    rows.map(|(target, logits)| LogitRow { target, logits }).collect()
}

impl HeadWeight<'_> {
    /// `targets` in chunks, each with the place of its first.
    fn chunks<'a>(&self, targets: &'a [Target]) -> impl Iterator<Item = (usize, &'a [Target])> + use<'a> {
        let rows = chunk_rows(self.vocabulary, targets.len());
        targets.chunks(rows).enumerate().map(move |(index, targets)| (index * rows, targets))
    }

    fn logits(&self, hidden: &Tensor) -> CandleResult<Tensor> {
        product(self.of, hidden, &self.weight.t()?)
    }

    /// From the gradient of a chunk of logits to those of its hidden states, and to the weight's, if that is trained.
    fn backward(
        &self,
        d_logits: &Tensor,
        hidden: &Tensor,
        targets: &[Target],
        ends: &mut Ends<'_>,
        d_weight: &mut Option<Tensor>,
    ) -> CandleResult<()> {
        let d = self.hidden;
        let d_rows = to_host(&product(self.of, d_logits, self.weight)?)?;
        for (target, gradient) in targets.iter().zip(d_rows.chunks_exact(d)) {
            kernels::add(&mut ends.d_hidden[target.row * d..][..d], gradient);
        }
        if self.trained {
            let here = product(self.of, &d_logits.t()?, hidden)?;
            *d_weight = Some(match d_weight.take() {
                Some(sum) => (sum + here)?,
                None => here,
            });
        }
        Ok(())
    }

    /// Adds the weight's gradient, gathered over all chunks, to the others.
    fn finish(&self, decoder: &Decoder, d_weight: Option<Tensor>, ends: &mut Ends<'_>) -> Result<()> {
        if let Some(d_weight) = d_weight {
            accumulate(ends.gradients, &decoder.language_head()?.weight, &d_weight)?;
        }
        Ok(())
    }
}
