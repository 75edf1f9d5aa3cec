//! Rotary position embeddings (Su et al., "RoFormer", 2021) in the half-split layout of GPT-NeoX: element `i` of a head
//! turns with element `i + head_dim / 2`.

use std::sync::OnceLock;

use crate::isa::{Isa, multiversion};
use crate::parallel::{SharedMut, each};

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

/// Positions whose angles are made together.
const BLOCK: usize = 256;

/// Cosines and sines of positions' angles, made when a position is first asked for: models claim contexts far longer than most
/// sequences.
#[derive(Clone, Debug)]
pub struct RopeTable {
    inverse_frequencies: Vec<f64>,
    attention_factor: f64,
    max_positions: usize,
    /// For each position as many cosines as there are frequencies, then as many sines.
    blocks: Vec<OnceLock<Vec<f32>>>,
}

impl RopeTable {
    /// The table for positions below `max_positions`, computed in f64: `cos` and `sin` of
    /// `position * inverse_frequencies[i]`, both times `attention_factor` (1 except for scaled variants).
    pub fn new(inverse_frequencies: &[f64], attention_factor: f64, max_positions: usize) -> Self {
        let blocks = std::iter::repeat_with(OnceLock::new).take(max_positions.div_ceil(BLOCK)).collect();
        Self { inverse_frequencies: inverse_frequencies.to_vec(), attention_factor, max_positions, blocks }
    }

    /// The cosines of a position, then its sines.
    ///
    /// # Panics
    /// If the position is outside the table.
    pub fn row(&self, position: usize) -> &[f32] {
        assert!(position < self.max_positions, "position {position} is outside a table of {}", self.max_positions);
        let width = 2 * self.inverse_frequencies.len();
        let block = self.blocks[position / BLOCK].get_or_init(|| self.block(position / BLOCK * BLOCK));
        &block[position % BLOCK * width..][..width]
    }

    fn block(&self, first: usize) -> Vec<f32> {
        let mut values = Vec::with_capacity(BLOCK * 2 * self.inverse_frequencies.len());
        for position in first..first + BLOCK {
            let angles = self.inverse_frequencies.iter().map(|frequency| position as f64 * frequency);
            values.extend(angles.clone().map(|angle| (angle.cos() * self.attention_factor) as f32));
            values.extend(angles.map(|angle| (angle.sin() * self.attention_factor) as f32));
        }
        values
    }

    /// How many positions the table covers.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }
}

/// Turns the heads `range` of each row by the row's position; `inverse` turns them back, which is the gradient.
///
/// # Panics
/// If a position is outside the table or a head is not twice as long as the table's rows.
pub fn rope(rows: &mut [f32], range: HeadRange, positions: &[u32], table: &RopeTable, inverse: bool) {
    let count = range.check(rows.len());
    assert_eq!(count, positions.len(), "rope: one position for each row");
    let half = table.inverse_frequencies.len();
    assert_eq!(range.head_dim, 2 * half, "rope: the table is for another head_dim");
    let isa = Isa::current();
    let width = range.heads * range.head_dim;
    let rows = SharedMut::new(rows);
    each(count, count * width, |row| {
        // SAFETY: row `row` belongs to this call alone.
        let heads = unsafe { rows.slice(row * range.width + range.first * range.head_dim, width) };
        let (cosines, sines) = table.row(positions[row] as usize).split_at(half);
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
