//! Logits that sampling leaves for the head's backward.
//!
//! What a token was drawn from is what the gradient of its log-probability starts from, bit for bit: with the logits at hand, backward
//! has one of the head's three products less. They lie among the [`Gradients`](super::Gradients), where those of other weights will
//! once the head's backward is through, so that keeping them takes no memory. Where not all fit, those of the first rows are kept: backward
//! goes from there on, a chunk of rows at a time.

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

    /// Takes in logits: pairs of a row of `logits` and its row on the tape. Where there is no room, the last rows go.
    pub fn take(&mut self, data: &mut [f32], logits: &[f32], rows: &[(usize, usize)]) {
        let room = self.place.len() / self.vocabulary;
        let mut copies = BTreeMap::new();
        for &(from, row) in rows {
            // Samples of one prompt have the row of its end in common.
            if self.rows.contains_key(&row) {
                continue;
            }
            let number = match (self.rows.len(), self.rows.last_entry()) {
                (count, _) if count < room => count,
                (_, Some(last)) if *last.key() > row => last.remove(),
                _ => continue,
            };
            self.rows.insert(row, number);
            copies.insert(number, from);
        }
        let copies: Vec<(usize, usize)> = copies.into_iter().map(|(number, from)| (from, number)).collect();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::WeightFormat;
    use crate::decoder::identity::Values;

    /// Logits of a row, as a row of three.
    fn of(row: usize) -> [f32; 3] {
        [row as f32, row as f32 + 0.5, -1.0]
    }

    #[test]
    fn the_first_rows_are_kept_whatever_comes_first() {
        let weights =
            WeightsId { values: Values::fresh(), precision: None, format: WeightFormat::Full, adapter: false };
        let (mut data, head) = (vec![7.0; 4 + 12 + 2], 0..4);
        // From the next cache line on there is room for nothing, before the head neither.
        let none = KeptLogits::new(weights, 3, 18, Some(&head)).place;
        assert_eq!(none, 16..18);
        let mut kept = KeptLogits::new(weights, 3, 14, None);
        for call in [&[5, 1, 9][..], &[2, 5, 8, 0], &[7, 3]] {
            let logits: Vec<f32> = call.iter().flat_map(|&row| of(row)).collect();
            let rows: Vec<(usize, usize)> = call.iter().copied().enumerate().collect();
            kept.take(&mut data, &logits, &rows);
        }
        let found: Vec<(usize, Range<usize>)> = (0..10).filter_map(|row| Some((row, kept.place_of(row)?))).collect();
        assert!(found.iter().map(|(row, _)| *row).eq(0..4), "{found:?}");
        for (row, place) in found {
            assert_eq!(data[place], of(row), "row {row}");
        }
        assert!(data[12..].iter().all(|x| *x == 7.0), "what is not theirs is as it was");
    }
}
