//! The fused head: log-probabilities, entropies and their gradients straight from hidden states.
//!
//! Logits exist for one chunk of rows at a time. Backward computes them again, which costs one product and saves
//! `tokens × vocabulary` floats; all but those that sampling could keep for it ([`Gradients::keep_logits`]). What needs whole
//! distributions sees the same chunks as [`LogitRow`]s.

use std::convert::Infallible;
use std::ops::Range;

use kernels::{Int8Matrix, Matrix, MatrixMut, Onto, PackedMatrix, Precision, RowStats, matmul};

use super::linear::{Products, multiply, pack, pack_int8};
use super::parameters::Gradients;
use super::workspace::{HeadScratch, resize};
use super::{NonFinite, PackedTokens};
use crate::error::{Error, Result};

/// A token whose log-probability is asked for, and the row of the hidden state that predicts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The row whose hidden state predicts the token: the row before the token's own.
    pub row: usize,
    /// The token.
    pub token: u32,
}

/// Log-probabilities of targets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogProbs {
    /// One for each target, in nats.
    pub log_prob: Vec<f32>,
    /// The entropy of the distribution each target was taken from, in nats; empty unless asked for.
    pub entropy: Vec<f32>,
    /// Whether no token is more probable than the target, for each target.
    pub most_probable: Vec<bool>,
}

/// Checks a temperature.
pub(super) fn check_temperature(temperature: f32) -> Result<()> {
    match temperature.is_finite() && temperature > 0.0 {
        true => Ok(()),
        false => Err(Error::Invalid(format!("expected a positive temperature, got {temperature}"))),
    }
}

/// One row of logits on its way through the fused head.
#[derive(Debug)]
pub struct LogitRow<'a> {
    /// The place of the row's target in the list that was asked for.
    pub target: usize,
    /// The logit of every token.
    pub logits: &'a mut [f32],
}

/// Floats of logits held at a time (96 MiB); a chunk has as many rows as fit, within limits.
const CHUNK_FLOATS: usize = 24 << 20;

/// The output projection.
#[derive(Clone)]
pub(super) struct Head {
    /// The weight's place among the base parameters: the embedding's, if tied.
    pub weight: Range<usize>,
    pub hidden: usize,
    pub vocabulary: usize,
    packed: Option<PackedMatrix>,
    /// The same in 8 bits, where generation asks for it.
    int8: Option<Int8Matrix>,
}

/// Rows of one chunk of `rows`: of chunks alike, as a backward packs the weight for each, and even, so that they do not separate the
/// pairs of a bf16 product.
pub(super) fn chunk_rows(vocabulary: usize, rows: usize) -> usize {
    let most = (CHUNK_FLOATS / vocabulary).clamp(16, 1024) / 2 * 2;
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1).next_multiple_of(2)
}

/// Where one row of the head's products comes from; `None` is a row of zeros.
type Slot = Option<usize>;

impl Head {
    pub fn new(weight: Range<usize>, hidden: usize, vocabulary: usize) -> Self {
        Self { weight, hidden, vocabulary, packed: None, int8: None }
    }

    pub fn pack(&mut self, precision: Precision, base: &[f32]) {
        let weight = Matrix::new(&base[self.weight.clone()], self.vocabulary, self.hidden);
        pack(&mut self.packed, precision, weight.transposed());
    }

    /// Packs the weight in 8 bits.
    pub fn pack_int8(&mut self, precision: Precision, base: &[f32]) {
        let weight = Matrix::new(&base[self.weight.clone()], self.vocabulary, self.hidden);
        pack_int8(&mut self.int8, precision, weight.transposed());
    }

    /// Gives back the packed weight.
    pub fn release(&mut self) {
        self.packed = None;
    }

    pub fn packed_bytes(&self) -> usize {
        self.packed.as_ref().map_or(0, PackedMatrix::bytes) + self.int8.as_ref().map_or(0, Int8Matrix::bytes)
    }

    /// `slots` in chunks of one size, the last perhaps shorter.
    fn chunks<'a>(&self, slots: &'a [Slot]) -> impl Iterator<Item = &'a [Slot]> + use<'a> {
        slots.chunks(chunk_rows(self.vocabulary, slots.len()))
    }

    /// The logits of `hidden` rows.
    pub fn logits(&self, products: Products<'_>, hidden: &[f32], logits: &mut [f32]) {
        let rows = hidden.len() / self.hidden;
        let weight = Matrix::new(&products.base[self.weight.clone()], self.vocabulary, self.hidden).transposed();
        let (hidden, logits) = (Matrix::new(hidden, rows, self.hidden), MatrixMut::new(logits, rows, self.vocabulary));
        multiply(products, &self.packed, &self.int8, hidden, weight, logits, Onto::Zero);
    }

    /// Checks targets against the batch and the vocabulary.
    pub fn check(&self, targets: &[Target], rows: usize) -> Result<()> {
        for (index, target) in targets.iter().enumerate() {
            if target.row >= rows || target.token as usize >= self.vocabulary {
                let (row, token, vocabulary) = (target.row, target.token, self.vocabulary);
                return Err(Error::Invalid(format!(
                    "target {index} is token {token} after row {row}: the batch has {rows} rows, the vocabulary {vocabulary} tokens"
                )));
            }
            if index > 0 && targets[index - 1].row > target.row {
                return Err(Error::Invalid(format!("target {index} is out of order: targets go by ascending row")));
            }
        }
        Ok(())
    }

    /// Gathers the hidden states of a chunk of slots and computes their logits, unless all of them are kept.
    fn chunk_logits<'k>(
        &self,
        products: Products<'_>,
        slots: &[Slot],
        targets: &[Target],
        hidden: &[f32],
        kept: impl Fn(usize) -> Option<&'k [f32]>,
        scratch: &mut HeadScratch,
    ) {
        let d = self.hidden;
        resize(&mut scratch.hidden, slots.len() * d);
        resize(&mut scratch.logits, slots.len() * self.vocabulary);
        for (slot, row) in slots.iter().zip(scratch.hidden.chunks_exact_mut(d)) {
            match slot {
                Some(target) => row.copy_from_slice(&hidden[targets[*target].row * d..][..d]),
                None => row.fill(0.0),
            }
        }
        let kept = slots.iter().map(|slot| slot.map_or(Some(&[][..]), |target| kept(targets[target].row)));
        match kept.collect::<Option<Vec<_>>>() {
            Some(kept) => {
                let rows = scratch.logits.chunks_exact_mut(self.vocabulary).zip(kept);
                kernels::on_each(&mut rows.collect::<Vec<_>>(), |(row, kept)| row[..kept.len()].copy_from_slice(kept));
            }
            None => self.logits(products, &scratch.hidden, &mut scratch.logits),
        }
    }

    /// Log-probabilities (and entropies) of `targets` at `temperature`.
    pub fn log_probs(
        &self,
        products: Products<'_>,
        hidden: &[f32],
        targets: &[Target],
        temperature: f32,
        want_entropy: bool,
        scratch: &mut HeadScratch,
    ) -> Result<LogProbs> {
        let mut all_stats = vec![RowStats::default(); targets.len()];
        let Ok(()) = self.visit(products, hidden, targets, scratch, |rows| -> std::result::Result<(), Infallible> {
            for_each(rows, &mut all_stats, |row, stats| {
                *stats = kernels::log_softmax_row(row.logits, 1.0 / temperature, targets[row.target].token as usize);
            });
            Ok(())
        });
        collect(&all_stats, targets, want_entropy)
    }

    /// Hands the logits of `targets` to `visit`, chunk after chunk, until it fails.
    pub fn visit<E>(
        &self,
        products: Products<'_>,
        hidden: &[f32],
        targets: &[Target],
        scratch: &mut HeadScratch,
        mut visit: impl FnMut(Vec<LogitRow<'_>>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let slots: Vec<Slot> = (0..targets.len()).map(Some).collect();
        for slots in self.chunks(&slots) {
            self.chunk_logits(products, slots, targets, hidden, |_| None, scratch);
            visit(rows(slots, &mut scratch.logits, self.vocabulary))?;
        }
        Ok(())
    }

    /// The gradient of `Σ d_log_prob · log_prob + d_entropy · entropy` with respect to the hidden states, added to
    /// `d_hidden`, and to the head's weight where it is trained. Returns the log-probabilities and entropies, which fall out on the way.
    #[allow(clippy::too_many_arguments, reason = "the gradients of one head on top of those of its logits")]
    pub fn backward(
        &self,
        products: Products<'_>,
        tokens: &PackedTokens,
        targets: &[Target],
        temperature: f32,
        d_log_prob: &[f32],
        d_entropy: Option<&[f32]>,
        ends: &mut Ends<'_>,
        scratch: &mut HeadScratch,
    ) -> Result<LogProbs> {
        let mut all_stats = vec![RowStats::default(); targets.len()];
        let Ok(()) = self.backward_visit(
            products,
            tokens,
            targets,
            ends,
            scratch,
            |rows| -> std::result::Result<(), Infallible> {
                for_each(rows, &mut all_stats, |row, stats| {
                    let (scale, token) = (1.0 / temperature, targets[row.target].token as usize);
                    *stats = kernels::log_softmax_row(row.logits, scale, token);
                    let d_entropy = d_entropy.map_or(0.0, |d_entropy| d_entropy[row.target]);
                    let d_log_prob = d_log_prob[row.target];
                    kernels::log_softmax_backward_row(row.logits, scale, token, *stats, d_log_prob, d_entropy);
                });
                Ok(())
            },
        );
        collect(&all_stats, targets, true)
    }

    /// [`Head::visit`] where `visit` replaces the logits by the gradient of a loss with respect to them, which goes on to
    /// the hidden states and to the head's weight where it is trained.
    pub fn backward_visit<E>(
        &self,
        products: Products<'_>,
        tokens: &PackedTokens,
        targets: &[Target],
        ends: &mut Ends<'_>,
        scratch: &mut HeadScratch,
        mut visit: impl FnMut(Vec<LogitRow<'_>>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let (d, vocabulary) = (self.hidden, self.vocabulary);
        let slots = pair_slots(targets, tokens);
        for slots in self.chunks(&slots) {
            let kept = |row| ends.gradients.logits_of(row);
            self.chunk_logits(products, slots, targets, ends.hidden, kept, scratch);
            visit(rows(slots, &mut scratch.logits, vocabulary))?;
            for (slot, logits) in slots.iter().zip(scratch.logits.chunks_exact_mut(vocabulary)) {
                if slot.is_none() {
                    logits.fill(0.0);
                }
            }
            let d_logits = Matrix::new(&scratch.logits, slots.len(), vocabulary);
            let weight = Matrix::new(&products.base[self.weight.clone()], vocabulary, d);
            resize(&mut scratch.d_hidden, slots.len() * d);
            let d_rows = MatrixMut::new(&mut scratch.d_hidden, slots.len(), d);
            matmul(products.precision, d_logits, weight, d_rows, Onto::Zero);
            for (slot, gradient) in slots.iter().zip(scratch.d_hidden.chunks_exact(d)) {
                if let Some(index) = slot {
                    let row = &mut ends.d_hidden[targets[*index].row * d..][..d];
                    row.iter_mut().zip(gradient).for_each(|(sum, gradient)| *sum += gradient);
                }
            }
            if products.trains_base() {
                let hidden = Matrix::new(&scratch.hidden, slots.len(), d);
                let (d_weight, onto) = ends.gradients.range_to_write(&self.weight);
                let d_weight = MatrixMut::new(d_weight, vocabulary, d);
                matmul(products.precision, d_logits.transposed(), hidden, d_weight, onto);
            }
        }
        Ok(())
    }
}

/// Where the head's backward comes from and goes to.
pub(super) struct Ends<'a> {
    /// The hidden states of all rows of the batch.
    pub hidden: &'a [f32],
    /// The gradient of the hidden states, added to.
    pub d_hidden: &'a mut [f32],
    /// The gradients of the weights, added to.
    pub gradients: &'a mut Gradients,
}

/// The rows of a chunk that belong to targets.
fn rows<'a>(slots: &[Slot], logits: &'a mut [f32], vocabulary: usize) -> Vec<LogitRow<'a>> {
    let all = slots.iter().zip(logits.chunks_exact_mut(vocabulary));
    all.filter_map(|(slot, logits)| slot.map(|target| LogitRow { target, logits })).collect()
}

/// Calls `work` with each row and the statistics of its target, on the kernels' threads.
fn for_each(
    rows: Vec<LogitRow<'_>>,
    stats: &mut [RowStats],
    work: impl Fn(&mut LogitRow<'_>, &mut RowStats) + Sync + Send,
) {
    let mut rows: Vec<_> = rows.into_iter().map(|row| (row, RowStats::default())).collect();
    kernels::on_each(&mut rows, |(row, stats)| work(row, stats));
    for (row, found) in rows {
        stats[row.target] = found;
    }
}

/// The targets with a gap wherever a sequence would otherwise start at an odd row of the head's products, so that a bf16
/// product never pairs rows of two sequences and no split of a batch changes a bit.
fn pair_slots(targets: &[Target], tokens: &PackedTokens) -> Vec<Slot> {
    let mut slots = Vec::with_capacity(targets.len() + tokens.segments().len());
    let mut segments = tokens.segments().iter().peekable();
    for (index, target) in targets.iter().enumerate() {
        let mut moved = false;
        while segments.peek().is_some_and(|segment| target.row >= segment.start + segment.len) {
            segments.next();
            moved = true;
        }
        if moved && slots.len() % 2 == 1 {
            slots.push(None);
        }
        slots.push(Some(index));
    }
    if slots.len() % 2 == 1 {
        slots.push(None);
    }
    slots
}

/// Splits statistics into columns, after a check that they are numbers.
fn collect(stats: &[RowStats], targets: &[Target], want_entropy: bool) -> Result<LogProbs> {
    let log_prob = stats.iter().map(|stats| stats.log_prob).collect();
    let entropy = if want_entropy { stats.iter().map(|stats| stats.entropy).collect() } else { Vec::new() };
    let most_probable = stats.iter().map(|stats| stats.most_probable).collect();
    LogProbs { log_prob, entropy, most_probable }.checked(targets)
}

impl LogProbs {
    /// The same, if every log-probability is a number.
    pub(super) fn checked(self, targets: &[Target]) -> Result<Self> {
        match NonFinite::find(None, "log-probability", &self.log_prob, 1) {
            Some(found) => Err(NonFinite { row: targets[found.row].row, ..found }.into()),
            None => Ok(self),
        }
    }
}
