//! Parameters and their gradients: flat storage with named views.
//!
//! All weights of a decoder lie in one slice, in the order of their [`ParameterInfo`]. The projections that the engine
//! computes together (q, k, v; gate, up) are neighbours there, so that one product serves them and each name is a view.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use kernels::{Floats, Onto};

use super::kept_logits::KeptLogits;
use super::{Decoder, NonFinite, PackedTokens, WeightsId};
use crate::weights::TensorView;

/// The embedding's name.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";

/// One tensor among the parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterInfo {
    /// Its Hugging Face (or PEFT) name.
    pub name: String,
    /// Its shape; linear weights are `[out, in]`.
    pub shape: Vec<usize>,
    /// Whether weight decay applies: to matrices, not to norms and biases.
    pub decay: bool,
    /// Its place in the flat storage.
    pub range: Range<usize>,
}

/// The order and places of a set of parameters.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    pub entries: Vec<ParameterInfo>,
    index: BTreeMap<String, usize>,
    pub len: usize,
}

impl Layout {
    /// Appends a tensor and returns its range.
    pub fn push(&mut self, name: String, shape: Vec<usize>) -> Range<usize> {
        let range = self.len..self.len + shape.iter().product::<usize>();
        self.len = range.end;
        self.index.insert(name.clone(), self.entries.len());
        let decay = shape.len() > 1;
        self.entries.push(ParameterInfo { name, shape, decay, range: range.clone() });
        range
    }

    /// The entry called `name`.
    pub fn get(&self, name: &str) -> Option<&ParameterInfo> {
        self.index.get(name).map(|&i| &self.entries[i])
    }

    /// Every tensor of the flat storage `values`, by name.
    pub fn views<'a>(&'a self, values: &'a [f32]) -> impl Iterator<Item = (&'a String, TensorView<'a>)> {
        self.entries
            .iter()
            .map(|entry| (&entry.name, TensorView { shape: &entry.shape, data: &values[entry.range.clone()] }))
    }
}

/// The gradients of a decoder's trainable parameters, accumulated over micro-batches.
///
/// Every element is a left fold over tokens, so that splitting a batch into consecutive micro-batches gives the same
/// bytes. A tied embedding is reached twice by each micro-batch, from the head and from the input; the two folds are kept
/// apart until [`Gradients::finish`] adds them.
///
/// A gradient's first part overwrites what is in the storage, and zeros are written only where nothing came ([`Gradients::finish`]).
/// Until the first gradient comes that needs the place, it may hold logits that sampling keeps ([`Gradients::keep_logits`]).
pub struct Gradients {
    layout: Arc<Layout>,
    data: Floats,
    input_embedding: SparseRows,
    /// The parts that hold gradients; what lies in the others means nothing.
    written: Parts,
    logits: Option<KeptLogits>,
}

impl Gradients {
    pub(super) fn zeros(layout: Arc<Layout>) -> Self {
        let data = Floats::zeros(layout.len);
        Self { layout, data, input_embedding: SparseRows::default(), written: Parts::default(), logits: None }
    }

    /// Starts anew from gradients of zero, keeping the storage.
    pub fn clear(&mut self) {
        self.logits = None;
        self.written = Parts::default();
        self.input_embedding.clear();
    }

    /// Makes room for logits of rows on a tape, if no gradient is there; see [`Tape::start`](super::Tape::start).
    pub(super) fn start_logits(&mut self, decoder: &Decoder) {
        let head = decoder.head.as_ref().filter(|_| self.written.0.is_empty());
        self.logits = head.map(|head| {
            let own = decoder.adapter.is_none().then_some(&head.weight);
            KeptLogits::new(decoder.weights_id(), head.vocabulary, self.data.len(), own)
        });
    }

    /// Keeps logits that sampling computed for the backward of the same tokens, as far as there is room: pairs of a row of `logits` and
    /// its row on the tape that was started with these gradients. Without one, nothing happens.
    pub fn keep_logits(&mut self, logits: &[f32], rows: &[(usize, usize)]) {
        if let Some(kept) = &mut self.logits {
            kept.take(&mut self.data, logits, rows);
        }
    }

    /// Says which tokens the rows of kept logits are, see [`Tape::finish`](super::Tape::finish).
    pub(super) fn finish_logits(&mut self, tokens: &PackedTokens, starts: &[usize]) {
        if let Some(kept) = &mut self.logits {
            kept.belong_to(tokens, starts);
        }
    }

    /// Forgets kept logits unless they are what these weights make of these tokens.
    pub(super) fn expect_logits(&mut self, weights: WeightsId, tokens: &PackedTokens) {
        if self.logits.as_ref().is_some_and(|kept| !kept.are_of(weights, tokens)) {
            self.logits = None;
        }
    }

    /// The logits of a row, if they are kept.
    pub(super) fn logits_of(&self, row: usize) -> Option<&[f32]> {
        Some(&self.data[self.logits.as_ref()?.place_of(row)?])
    }

    /// Adds what is still kept apart, and writes the zeros. Call it once after the last micro-batch, before reading.
    pub fn finish(&mut self) {
        self.range_mut(&(0..self.layout.len));
        if let Some(entry) = self.layout.get(EMBEDDING) {
            let width = entry.shape[1];
            let embedding = &mut self.data[entry.range.clone()];
            for (&row, values) in self.input_embedding.index.keys().zip(self.input_embedding.in_row_order(width)) {
                for (gradient, value) in embedding[row as usize * width..][..width].iter_mut().zip(values) {
                    *gradient += value;
                }
            }
        }
        self.input_embedding.clear();
    }

    /// The gradient of parameter `index`, in the order of `Decoder::parameters`; after [`Gradients::finish`].
    pub fn grad(&self, index: usize) -> &[f32] {
        &self.data[self.layout.entries[index].range.clone()]
    }

    /// All gradients, in the order of `Decoder::parameters`; after [`Gradients::finish`].
    pub fn flat(&self) -> &[f32] {
        &self.data
    }

    /// All gradients, to be scaled or replaced.
    pub fn flat_mut(&mut self) -> &mut [f32] {
        self.range_mut(&(0..self.layout.len))
    }

    /// Storage in bytes.
    pub fn bytes(&self) -> usize {
        4 * (self.data.len() + self.input_embedding.values.len())
    }

    /// The first gradient that is infinite or NaN, by parameter name and row.
    pub fn non_finite(&self) -> Option<NonFinite> {
        let first = kernels::finite(&self.data)?;
        let entry = self.layout.entries.iter().find(|entry| entry.range.contains(&first))?;
        let name = format!("gradient of {}", entry.name);
        let width = entry.shape.last().copied().unwrap_or(1);
        NonFinite::find(layer_of(&entry.name), &name, &self.data[entry.range.clone()], width)
    }

    /// The gradients of a range of the layout, to be added to.
    pub(super) fn range_mut(&mut self, range: &Range<usize>) -> &mut [f32] {
        for gap in self.written.insert(range) {
            set_to_zero(&mut self.data[gap]);
        }
        self.forget_logits(range);
        &mut self.data[range.clone()]
    }

    /// The storage of a range of the layout, all of which is to be written, and what is to be added to: the gradients that it holds, if
    /// there are any.
    pub(super) fn range_to_write(&mut self, range: &Range<usize>) -> (&mut [f32], Onto<'static>) {
        let gaps = self.written.insert(range);
        let onto = if gaps.first() == Some(range) {
            Onto::Zero
        } else {
            for gap in gaps {
                set_to_zero(&mut self.data[gap]);
            }
            Onto::Held
        };
        self.forget_logits(range);
        (&mut self.data[range.clone()], onto)
    }

    /// Forgets kept logits if they may lie in a range.
    fn forget_logits(&mut self, range: &Range<usize>) {
        if self.logits.as_ref().is_some_and(|kept| kept.may_take(range)) {
            self.logits = None;
        }
    }

    /// Adds `scale · values` to the input side of the embedding's gradient at `token`.
    pub(super) fn add_input_embedding(&mut self, token: u32, values: &[f32], scale: f32) {
        self.input_embedding.add(token, values, scale);
    }
}

/// Ranges, ascending and apart from each other.
#[derive(Default)]
struct Parts(Vec<Range<usize>>);

impl Parts {
    /// Adds a range, and returns what of it was missing.
    fn insert(&mut self, range: &Range<usize>) -> Vec<Range<usize>> {
        if range.is_empty() {
            return Vec::new();
        }
        let first = self.0.partition_point(|part| part.end < range.start);
        let last = self.0.partition_point(|part| part.start <= range.end);
        let (mut missing, mut from, mut whole) = (Vec::new(), range.start, range.clone());
        for part in &self.0[first..last] {
            if from < part.start {
                missing.push(from..part.start);
            }
            from = from.max(part.end);
            whole = whole.start.min(part.start)..whole.end.max(part.end);
        }
        if from < range.end {
            missing.push(from..range.end);
        }
        self.0.splice(first..last, [whole]);
        missing
    }
}

/// Sets values to zero, on all threads.
fn set_to_zero(values: &mut [f32]) {
    const CHUNK: usize = 1 << 18;
    kernels::on_each(&mut values.chunks_mut(CHUNK).collect::<Vec<_>>(), |chunk| chunk.fill(0.0));
}

/// The layer number inside a parameter's name.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    let (_, rest) = name.split_once("layers.")?;
    rest.split('.').next()?.parse().ok()
}

/// A matrix most of whose rows are zero.
#[derive(Default)]
struct SparseRows {
    index: BTreeMap<u32, usize>,
    values: Vec<f32>,
}

impl SparseRows {
    fn add(&mut self, row: u32, values: &[f32], scale: f32) {
        let next = self.index.len();
        let slot = *self.index.entry(row).or_insert(next);
        if slot == next {
            self.values.resize((next + 1) * values.len(), 0.0);
        }
        for (sum, value) in self.values[slot * values.len()..][..values.len()].iter_mut().zip(values) {
            *sum += scale * value;
        }
    }

    fn in_row_order(&self, width: usize) -> impl Iterator<Item = &[f32]> {
        self.index.values().map(move |slot| &self.values[slot * width..][..width])
    }

    fn clear(&mut self) {
        self.index.clear();
        self.values.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_know_what_is_missing(ranges in prop::collection::vec((0usize..40, 0usize..12), 0..20)) {
            let (mut parts, mut held) = (Parts::default(), [false; 60]);
            for (start, len) in ranges {
                let missing = parts.insert(&(start..start + len));
                let expected: Vec<usize> = (start..start + len).filter(|&place| !held[place]).collect();
                prop_assert_eq!(missing.into_iter().flatten().collect::<Vec<_>>(), expected);
                held[start..start + len].fill(true);
                let all: Vec<usize> = (0..60).filter(|&place| held[place]).collect();
                prop_assert_eq!(parts.0.iter().cloned().flatten().collect::<Vec<_>>(), all);
                prop_assert!(parts.0.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }
}
