//! Logits that sampling leaves for the head's backward.
//!
//! What a token was drawn from is what the gradient of its log-probability starts from, bit for bit: with the logits at hand, backward
//! has one of the head's three products less. They lie among the [`Gradients`](super::Gradients), where those of other weights will
//! once the head's backward is through, so that keeping them takes no memory. As many are kept as fit.

use std::collections::BTreeMap;
use std::ops::Range;

use kernels::RowCopy;

use super::{PackedTokens, WeightsId};

/// Which rows have their logits where.
pub(super) struct KeptLogits {
    /// The weights that computed them.
    weights: WeightsId,
    /// The tokens whose rows they belong to; while sampling goes on, rows are those of the tape.
    tokens: Option<PackedTokens>,
    vocabulary: usize,
    /// The part of the gradients' storage that they may take.
    place: Range<usize>,
    /// For each row the number of its logits.
    rows: BTreeMap<usize, usize>,
}

impl KeptLogits {
    /// Nothing yet, in the larger part of `len` floats beside the head's own.
    pub fn new(weights: WeightsId, vocabulary: usize, len: usize, head: Option<&Range<usize>>) -> Self {
        /// Floats of a cache line: rows are written past the caches line by line.
        const LINE: usize = 16;
        let head = head.cloned().unwrap_or(0..0);
        let place =
            if head.start > len - head.end { 0..head.start } else { head.end.next_multiple_of(LINE).min(len)..len };
        Self { weights, tokens: None, vocabulary, place, rows: BTreeMap::new() }
    }

    /// Takes in logits, as far as there is room: pairs of a row of `logits` and its row on the tape.
    pub fn take(&mut self, data: &mut [f32], logits: &[f32], rows: &[(usize, usize)]) {
        let room = self.place.len() / self.vocabulary;
        let mut copies = Vec::with_capacity(rows.len());
        for &(from, row) in rows {
            let next = self.rows.len();
            // Samples of one prompt have the row of its end in common.
            if next < room && !self.rows.contains_key(&row) {
                self.rows.insert(row, next);
                copies.push((from, next));
            }
        }
        let to = &mut data[self.place.clone()];
        kernels::copy_rows(&mut [RowCopy { width: self.vocabulary, from: logits, to }], &copies);
    }

    /// From now on rows are those of `tokens`, where sequence `i` began on the tape at `starts[i]`.
    pub fn belong_to(&mut self, tokens: &PackedTokens, starts: &[usize]) {
        let mut rows = BTreeMap::new();
        for (segment, &start) in tokens.segments().iter().zip(starts) {
            let own = self.rows.range(start..start + segment.len);
            rows.extend(own.map(|(row, number)| (segment.start + row - start, *number)));
        }
        self.rows = rows;
        self.tokens = Some(tokens.clone());
    }

    /// Whether they are what these weights make of these tokens.
    pub fn are_of(&self, weights: WeightsId, tokens: &PackedTokens) -> bool {
        self.weights == weights && self.tokens.as_ref() == Some(tokens)
    }

    /// The place of a row's logits, if they are kept.
    pub fn place_of(&self, row: usize) -> Option<Range<usize>> {
        let start = self.place.start + self.rows.get(&row)? * self.vocabulary;
        Some(start..start + self.vocabulary)
    }

    /// Whether a part of the storage may be theirs.
    pub fn may_take(&self, part: &Range<usize>) -> bool {
        part.start < self.place.end && self.place.start < part.end
    }
}
