//! A batch of sequences packed into rows.

use kernels::Segment;

use crate::error::{Error, Result};

/// Sequences packed one after the other: one row a token, no sequence sees another but for a shared prefix.
///
/// Each segment starts at an even row, so that the pairs of rows that a bf16 product reduces together never belong to two
/// sequences; a row between segments is padding, its outputs mean nothing and its gradient is exactly zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedTokens {
    ids: Vec<u32>,
    segments: Vec<Segment>,
}

impl PackedTokens {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a sequence and returns its segment's index. With `prefix`, the index of an earlier segment without a prefix
    /// of its own, the sequence continues that segment: it sees all of its tokens and its positions follow on.
    ///
    /// # Errors
    /// An empty sequence, or a prefix that is not an earlier segment without a prefix.
    pub fn push(&mut self, ids: &[u32], prefix: Option<usize>) -> Result<usize> {
        if ids.is_empty() {
            return Err(Error::Invalid(format!("sequence {} of the batch is empty", self.segments.len())));
        }
        if let Some(prefix) = prefix
            && self.segments.get(prefix).is_none_or(|segment| segment.prefix.is_some())
        {
            return Err(Error::Invalid(format!("sequence {} cannot continue sequence {prefix}", self.segments.len())));
        }
        if !self.ids.len().is_multiple_of(2) {
            self.ids.push(0);
        }
        self.segments.push(Segment { start: self.ids.len(), len: ids.len(), prefix });
        self.ids.extend_from_slice(ids);
        Ok(self.segments.len() - 1)
    }

    /// Number of rows, padding included.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// The token of each row; 0 on padding.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The sequences, in the order they were pushed.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The number of tokens that precede a segment's own: the length of its prefix.
    pub fn prefix_len(&self, segment: &Segment) -> usize {
        segment.prefix.map_or(0, |prefix| self.segments[prefix].len)
    }

    /// The position of each row's token in its sequence; 0 on padding.
    pub(super) fn positions(&self) -> Vec<u32> {
        let mut positions = vec![0; self.rows()];
        for segment in &self.segments {
            let first = self.prefix_len(segment) as u32;
            for (position, value) in positions[segment.start..][..segment.len].iter_mut().zip(first..) {
                *position = value;
            }
        }
        positions
    }

    /// Checks tokens against the vocabulary and lengths against the longest context.
    pub(super) fn check(&self, vocabulary: usize, max_positions: usize) -> Result<()> {
        if let Some(row) = self.ids.iter().position(|&id| id as usize >= vocabulary) {
            let id = self.ids[row];
            return Err(Error::Invalid(format!("row {row}: token {id} is not below the vocabulary size {vocabulary}")));
        }
        for (index, segment) in self.segments.iter().enumerate() {
            let length = self.prefix_len(segment) + segment.len;
            if length > max_positions {
                return Err(Error::Invalid(format!(
                    "sequence {index} has {length} tokens, but the model's context holds {max_positions}"
                )));
            }
        }
        Ok(())
    }
}
