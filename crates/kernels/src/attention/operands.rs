//! Heads of packed rows in the order in which the inner loops of the products read them.

use super::{AttentionShape, Segment};
use crate::isa::Isa;
use crate::matrix::Matrix;
use crate::matrix::kernel::MOST_COLUMNS;
use crate::matrix::pack::{Storage, pack_panels};

/// A run of neighbouring rows whose keys follow those of the run before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// The first row.
    pub start: usize,
    /// The number of rows.
    pub len: usize,
    /// Keys before it.
    pub offset: usize,
}

impl Run {
    /// The keys of this run that a block of queries needs which sees nothing before key `first` and ends before key
    /// `end`: where they start (on the border of a panel, of any instruction set) and how many they are.
    pub(super) fn needed(self, first: usize, end: usize) -> (usize, usize) {
        let skipped = first.saturating_sub(self.offset).min(self.len) / MOST_COLUMNS * MOST_COLUMNS;
        (skipped, end.saturating_sub(self.offset).min(self.len).saturating_sub(skipped))
    }
}

/// The runs of keys that the first `rows` rows of a segment see: the prefix, then their own.
pub(super) fn runs(segments: &[Segment], segment: Segment, rows: usize) -> [Run; 2] {
    let prefix = segment.prefix.map_or(Run { start: 0, len: 0, offset: 0 }, |index| Run {
        start: segments[index].start,
        len: segments[index].len,
        offset: 0,
    });
    [prefix, Run { start: segment.start, len: rows, offset: prefix.len }]
}

/// One head inside rows of some width.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    pub rows: &'a [f32],
    pub width: usize,
    pub column: usize,
    pub head_dim: usize,
}

impl Head<'_> {
    pub(super) fn query(shape: AttentionShape, qkv: &[f32], head: usize) -> Head<'_> {
        Head { rows: qkv, width: shape.width(), column: head * shape.head_dim, head_dim: shape.head_dim }
    }

    /// Elements of a head, padded to whole panels.
    pub(super) fn padded(self) -> usize {
        self.head_dim.next_multiple_of(MOST_COLUMNS)
    }

    /// The head of one row.
    pub(super) fn at(&self, row: usize) -> &[f32] {
        &self.rows[row * self.width + self.column..][..self.head_dim]
    }

    /// Elements that [`Head::pack_columns`] writes for `len` rows.
    pub(super) fn columns_len(self, len: usize) -> usize {
        len.next_multiple_of(MOST_COLUMNS) * self.head_dim
    }

    /// Packs rows `start..start + len` as the columns of a right operand.
    pub(super) fn pack_columns(self, isa: Isa, start: usize, len: usize, out: &mut [f32]) {
        if len == 0 {
            return;
        }
        let data = &self.rows[start * self.width + self.column..];
        let columns = Matrix::new(data, len, self.head_dim).with_row_stride(self.width).transposed();
        pack_panels(isa, Storage::Floats, columns, out);
    }

    /// Copies rows `start..start + len`, padded with zeros, as the rows of a right operand.
    pub(super) fn pack_rows(&self, start: usize, len: usize, out: &mut [f32]) {
        for (row, out) in out.chunks_exact_mut(self.padded()).enumerate().take(len) {
            let (head, padding) = out.split_at_mut(self.head_dim);
            head.copy_from_slice(self.at(start + row));
            padding.fill(0.0);
        }
    }
}
