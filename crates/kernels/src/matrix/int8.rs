//! Products with a right operand in 8 bits, for weights that are read far more often than they change.
//!
//! A column is cut into blocks of [`BLOCK`] elements, each stored as integers from -127 to 127 and one scale: the largest
//! element over 127 (as in GGML's `Q8_0`, but with a scale in f32). The left operand stays as the precision says. Integers
//! that small are exact in bfloat16, so a block's sum is the product's usual chain over its integers, from zero; and an
//! element of the result is a left fold of fused multiply-adds of these sums with their scales, over the blocks in order.
//! That chain depends on the reduced length alone: not on the number of rows, on threads or on the instruction set.

use crate::buffer::{Buffer, with_scratch};
use crate::isa::{Isa, multiversion};
use crate::matrix::kernel::{Hints, Left, MOST_COLUMNS, Product, Right, Start, multiply, panel_width};
use crate::matrix::pack::{Storage, pack_tiles};
use crate::matrix::{Matrix, MatrixMut, Onto, Precision, check_shapes};
use crate::parallel::{SharedMut, each};

/// Elements of a column that share a scale.
const BLOCK: usize = 32;
/// Rows of the left operand that meet a block of a panel at a time; their sums stay in the caches next to the processor.
const BLOCK_ROWS: usize = 192;
/// The largest integer.
const LARGEST: f32 = 127.0;
/// Columns whose integers lie side by side.
const PANEL: usize = MOST_COLUMNS;
/// Integers of one block of a panel.
const BLOCK_BYTES: usize = BLOCK * PANEL;

/// A `k x n` right operand in 8 bits, packed once for many products.
#[derive(Clone, Debug)]
pub struct Int8Matrix {
    precision: Precision,
    k: usize,
    n: usize,
    /// Panel after panel, in it block after block, in it the elements of all columns one after the other.
    integers: Vec<i8>,
    /// One for each column of each block, in the same order.
    scales: Buffer,
}

impl Int8Matrix {
    /// A matrix of zeros, for products whose left operand is read as `precision` says.
    pub fn new(precision: Precision, k: usize, n: usize) -> Self {
        let blocks = k.div_ceil(BLOCK) * n.div_ceil(PANEL);
        Self { precision, k, n, integers: vec![0; blocks * BLOCK_BYTES], scales: Buffer::zeros(blocks * PANEL) }
    }

    /// Rounds `b` to 8 bits. Where a block holds a value that is not finite, so do the products with it.
    ///
    /// # Panics
    /// If `b` has another shape.
    pub fn pack(&mut self, b: Matrix<'_>) {
        assert_eq!((b.rows, b.cols), (self.k, self.n), "pack: the matrix has the shape that was announced");
        let isa = Isa::current();
        let blocks = self.k.div_ceil(BLOCK);
        let (integers, scales) = (SharedMut::new(&mut self.integers), SharedMut::new(self.scales.as_mut_slice()));
        each(self.n.div_ceil(PANEL), self.k * self.n, |panel| {
            // SAFETY: panel `panel` belongs to this call alone.
            let (integers, scales) = unsafe {
                (
                    integers.slice(panel * blocks * BLOCK_BYTES, blocks * BLOCK_BYTES),
                    scales.slice(panel * blocks * PANEL, blocks * PANEL),
                )
            };
            let column = panel * PANEL;
            let columns = b.block(0, column, b.rows, PANEL.min(b.cols - column));
            round_panel(isa, columns, integers, scales);
        });
    }

    /// `c = onto + a self`. The bits of a row do not depend on the other rows.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn matmul(&self, a: Matrix<'_>, mut c: MatrixMut<'_>, onto: Onto<'_>) {
        check_shapes(a, (self.k, self.n), &c, onto);
        onto.fill(&mut c);
        if c.rows == 0 || c.cols == 0 || self.k == 0 {
            return;
        }
        let (isa, threads) = (Isa::current(), rayon::current_num_threads());
        let storage = Storage::of(isa, self.precision);
        let stride = self.k.div_ceil(BLOCK) * storage.steps(BLOCK);
        with_scratch([a.rows * stride], |[left]| {
            let shared = SharedMut::new(left);
            let rows = a.rows.div_ceil(4 * threads);
            each(a.rows.div_ceil(rows), a.rows * self.k, |task| {
                for row in task * rows..a.rows.min((task + 1) * rows) {
                    // SAFETY: row `row` belongs to this task alone.
                    let row_of_left = unsafe { shared.slice(row * stride, stride) };
                    row_of_left[storage.steps(self.k)..].fill(0.0);
                    pack_tiles(isa, storage, a.block(row, 0, 1, a.cols), 1, row_of_left);
                }
            });
            let task =
                Task { isa, storage, left, stride, rows: a.rows, c: SharedMut::new(c.data), c_stride: c.row_stride };
            let panels = self.n.div_ceil(PANEL);
            let run = panels.div_ceil(4 * threads);
            each(panels.div_ceil(run), c.rows * c.cols * self.k, |index| {
                for panel in index * run..panels.min((index + 1) * run) {
                    self.add_panel(&task, panel);
                }
            });
        });
    }

    /// Adds the product with one panel.
    fn add_panel(&self, task: &Task<'_>, panel: usize) {
        let (blocks, steps) = (self.k.div_ceil(BLOCK), task.storage.steps(BLOCK));
        let (column, columns) = (panel * PANEL, PANEL.min(self.n - panel * PANEL));
        with_scratch([steps * PANEL, BLOCK_ROWS * PANEL], |[right, sums]| {
            for first in (0..task.rows).step_by(BLOCK_ROWS) {
                let rows = BLOCK_ROWS.min(task.rows - first);
                for block in 0..blocks {
                    let place = panel * blocks + block;
                    let integers = &self.integers[place * BLOCK_BYTES..][..BLOCK_BYTES];
                    let b = match task.storage {
                        Storage::Floats => {
                            expand(task.isa, integers, right);
                            Right::Floats(right.as_ptr())
                        }
                        Storage::Pairs => {
                            expand_pairs(task.isa, integers, right);
                            Right::Pairs(right.as_ptr())
                        }
                        Storage::Halves | Storage::Widened => {
                            expand_swapped(task.isa, integers, right);
                            Right::Floats(right.as_ptr())
                        }
                    };
                    let product = Product {
                        rows,
                        columns: PANEL,
                        steps,
                        a: task.left[first * task.stride + block * steps..].as_ptr(),
                        left: Left::Rows { stride: task.stride },
                        b,
                        panel_stride: panel_width(task.isa),
                        step_stride: PANEL,
                        c: sums.as_mut_ptr(),
                        c_stride: PANEL,
                        start: Start::Zero,
                        hints: Hints::NONE,
                    };
                    // SAFETY: the rows were packed in full, the block is a whole panel high, the sums are ours.
                    unsafe { multiply(task.isa, product) };
                    let scales = &self.scales.as_slice()[place * PANEL..][..columns];
                    for (row, sums) in (first..first + rows).zip(sums.chunks_exact(PANEL)) {
                        // SAFETY: these columns of the result belong to this task alone.
                        let to = unsafe { task.c.slice(row * task.c_stride + column, columns) };
                        add_scaled(task.isa, to, sums, scales);
                    }
                }
            }
        });
    }

    /// The precision of the left operand.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The memory it takes.
    pub fn bytes(&self) -> usize {
        self.integers.len() + size_of_val(self.scales.as_slice())
    }
}

/// What the tasks of one product share.
struct Task<'a> {
    isa: Isa,
    storage: Storage,
    /// The packed rows of the left operand, `stride` apart.
    left: &'a [f32],
    stride: usize,
    rows: usize,
    c: SharedMut<f32>,
    c_stride: usize,
}

multiversion! {
    /// Rounds the columns of `b` (at most [`PANEL`] of them) block by block.
    fn round_panel(b: Matrix<'_>, integers: &mut [i8], scales: &mut [f32]) {
        let blocks = integers.chunks_exact_mut(BLOCK_BYTES).zip(scales.chunks_exact_mut(PANEL));
        for (first, (integers, scales)) in (0..b.rows).step_by(BLOCK).zip(blocks) {
            let count = BLOCK.min(b.rows - first);
            for (column, scale) in scales.iter_mut().enumerate().take(b.cols) {
                let mut values = [0.0f32; BLOCK];
                let data = &b.data[first * b.row_stride + column * b.col_stride..];
                if b.row_stride == 1 {
                    values[..count].copy_from_slice(&data[..count]);
                } else {
                    for (i, value) in values.iter_mut().enumerate().take(count) {
                        *value = data[i * b.row_stride];
                    }
                }
                let finite = values.iter().fold(true, |finite, value| finite & value.is_finite());
                let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                *scale = if finite { largest / LARGEST } else { f32::NAN };
                let divisor = if *scale > 0.0 { *scale } else { 1.0 };
                let rounded = values.map(|value| (value / divisor).round_ties_even().clamp(-LARGEST, LARGEST) as i8);
                for (i, integer) in rounded.into_iter().enumerate() {
                    integers[i * PANEL + column] = integer;
                }
            }
        }
    }
}

multiversion! {
    /// The integers of a block as pairs of bfloat16.
    fn expand_pairs(integers: &[i8], out: &mut [f32]) {
        for (pair, out) in integers.chunks_exact(2 * PANEL).zip(out.chunks_exact_mut(PANEL)) {
            let (first, second) = pair.split_at(PANEL);
            for ((out, &first), &second) in out.iter_mut().zip(first).zip(second) {
                // Eight bits of the fraction are more than enough: the lower half of either number is zero.
                *out = f32::from_bits(f32::from(first).to_bits() >> 16 | f32::from(second).to_bits());
            }
        }
    }
}

multiversion! {
    /// The integers of a block as they are.
    fn expand(integers: &[i8], out: &mut [f32]) {
        for (out, &integer) in out.iter_mut().zip(integers) {
            *out = f32::from(integer);
        }
    }
}

multiversion! {
    /// The same with the second element of each pair before the first, as [`Storage::Halves`] has the left operand.
    fn expand_swapped(integers: &[i8], out: &mut [f32]) {
        for (pair, out) in integers.chunks_exact(2 * PANEL).zip(out.chunks_exact_mut(2 * PANEL)) {
            let (first, second) = pair.split_at(PANEL);
            for (out, &integer) in out.iter_mut().zip(second.iter().chain(first)) {
                *out = f32::from(integer);
            }
        }
    }
}

multiversion! {
    /// `to += sums * scales`, rounded once.
    fn add_scaled(to: &mut [f32], sums: &[f32], scales: &[f32]) {
        for ((to, &sum), &scale) in to.iter_mut().zip(sums).zip(scales) {
            *to = sum.mul_add(scale, *to);
        }
    }
}
