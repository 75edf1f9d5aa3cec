//! Rotary position embeddings (Su et al., "RoFormer", 2021) in the half-split layout of GPT-NeoX: element `i` of a head
//! turns with element `i + head_dim / 2`.

use crate::isa::{Isa, multiversion};
use crate::parallel::{SharedMut, each, each_chunk};

/// A run of neighbouring heads inside rows such as `[q | k | v]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadRange {
    /// Elements of a whole row.
    pub width: usize,
    /// The first head of the range, counted in heads from the row's start.
    pub first: usize,
    /// How many heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl HeadRange {
    /// The number of rows in `elements`.
    pub(crate) fn check(self, elements: usize) -> usize {
        assert!((self.first + self.heads) * self.head_dim <= self.width, "the heads {self:?} overrun the row");
        assert!(
            self.width > 0 && elements.is_multiple_of(self.width),
            "{elements} is no number of rows of {}",
            self.width
        );
        elements / self.width
    }
}

/// Cosines and sines of every position's angles.
#[derive(Clone, Debug)]
pub struct RopeTable {
    half: usize,
    /// For each position `half` cosines, then `half` sines.
    values: Vec<f32>,
}

impl RopeTable {
    /// The table for positions below `max_positions`, computed in f64: `cos` and `sin` of
    /// `position * inverse_frequencies[i]`, both times `attention_factor` (1 except for scaled variants).
    pub fn new(inverse_frequencies: &[f64], attention_factor: f64, max_positions: usize) -> Self {
        let half = inverse_frequencies.len();
        let mut values = vec![0.0; 2 * half * max_positions];
        each_chunk(&mut values, (2 * half).max(1), |start, row| {
            let position = (start / (2 * half)) as f64;
            let (cosines, sines) = row.split_at_mut(half);
            for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(inverse_frequencies) {
                let angle = position * frequency;
                *cosine = (angle.cos() * attention_factor) as f32;
                *sine = (angle.sin() * attention_factor) as f32;
            }
        });
        Self { half, values }
    }

    /// For each position its cosines, then its sines.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// How many positions the table covers.
    pub fn max_positions(&self) -> usize {
        self.values.len().checked_div(2 * self.half).unwrap_or(0)
    }
}

/// Turns the heads `range` of each row by the row's position; `inverse` turns them back, which is the gradient.
///
/// # Panics
/// If a position is outside the table or a head is not twice as long as the table's rows.
pub fn rope(rows: &mut [f32], range: HeadRange, positions: &[u32], table: &RopeTable, inverse: bool) {
    let count = range.check(rows.len());
    assert_eq!(count, positions.len(), "rope: one position for each row");
    assert_eq!(range.head_dim, 2 * table.half, "rope: the table is for another head_dim");
    let isa = Isa::current();
    let width = range.heads * range.head_dim;
    let rows = SharedMut::new(rows);
    each(count, count * width, |row| {
        // SAFETY: row `row` belongs to this call alone.
        let heads = unsafe { rows.slice(row * range.width + range.first * range.head_dim, width) };
        let angles = &table.values[positions[row] as usize * range.head_dim..][..range.head_dim];
        let (cosines, sines) = angles.split_at(table.half);
        rotate(isa, heads, cosines, sines, if inverse { -1.0 } else { 1.0 });
    });
}

multiversion! {
    fn rotate(heads: &mut [f32], cosines: &[f32], sines: &[f32], direction: f32) {
        let half = cosines.len();
        for head in heads.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            for (((x, y), &cosine), &sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
                let sine = sine * direction;
                (*x, *y) = (*x * cosine - *y * sine, *y * cosine + *x * sine);
            }
        }
    }
}
