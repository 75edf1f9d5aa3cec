//! Products with a packed right operand.

use std::ops::Range;

use crate::buffer::{Buffer, with_scratch};
use crate::isa::Isa;
use crate::matrix::kernel::{Hints, Left, Product, Right, Start, multiply, panel_width, tile_height};
use crate::matrix::pack::{Storage, TOGETHER, halves, pack_panels, pack_tiles};
use crate::matrix::{Matrix, MatrixMut, Onto, Precision, check_shapes};
use crate::parallel::{SharedMut, each, each_part};
use crate::profile::{Call, Kind};
use crate::simd::fence;

/// Steps of the reduced index in one block. Each block reads and writes the destination once more; the left operand's has to stay in
/// the second-level cache.
pub(super) const BLOCK_STEPS: usize = 576;
/// Rows of the left operand that one task packs at a time (324 KiB with the steps of a block).
const BLOCK_ROWS: usize = 144;
/// Elements of a result from which on it is written past the caches.
const LARGE_RESULT: usize = 1 << 20;
/// Rows up to which all of the left operand is packed first and tasks share out columns.
const FEW_ROWS: usize = 48;

/// A `k x n` right operand, packed once for many products; the weights of a linear map, say.
///
/// Several matrices may lie side by side in one (query, key and value projections).
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    isa: Isa,
    precision: Precision,
    k: usize,
    n: usize,
    panels: Buffer,
}

impl PackedMatrix {
    /// A matrix of zeros.
    pub fn new(precision: Precision, k: usize, n: usize) -> Self {
        let isa = Isa::current();
        let storage = Storage::of(isa, precision);
        let width = panel_width(isa);
        let panels = Buffer::zeros(n.div_ceil(width) * storage.len(storage.steps(k), width));
        Self { isa, precision, k, n, panels }
    }

    /// How the panels hold the matrix.
    fn storage(&self) -> Storage {
        Storage::of(self.isa, self.precision)
    }

    /// The f32 of a panel.
    fn panel_len(&self) -> usize {
        self.storage().len(self.storage().steps(self.k), panel_width(self.isa))
    }

    /// Packs `b` into the columns from `first_column` on.
    ///
    /// # Panics
    /// If `b` has another number of rows or overruns the columns.
    pub fn pack(&mut self, first_column: usize, b: Matrix<'_>) {
        assert_eq!(b.rows, self.k, "pack: the matrix has {} rows, the packed one {}", b.rows, self.k);
        assert!(first_column + b.cols <= self.n, "pack: columns {first_column}+{} of {}", b.cols, self.n);
        let width = panel_width(self.isa);
        if !first_column.is_multiple_of(width) || (first_column + b.cols < self.n && !b.cols.is_multiple_of(width)) {
            return self.pack_inside_panels(first_column, b);
        }
        let (isa, storage, len) = (self.isa, self.storage(), self.panel_len());
        let panels = &mut self.panels.as_mut_slice()[first_column / width * len..];
        pack_on_threads(isa, storage, b, panels);
    }

    /// Packs columns that share panels with their neighbours: each panel is packed aside and its columns copied over.
    fn pack_inside_panels(&mut self, first_column: usize, b: Matrix<'_>) {
        fn copy<T: Copy>(from: &[T], to: &mut [T], width: usize, columns: Range<usize>) {
            for (to, from) in to.chunks_exact_mut(width).zip(from.chunks_exact(width)) {
                to[columns.clone()].copy_from_slice(&from[..columns.len()]);
            }
        }
        let (isa, storage, len) = (self.isa, self.storage(), self.panel_len());
        let width = panel_width(isa);
        let panels = self.panels.as_mut_slice();
        with_scratch([len], |[aside]| {
            let aside = &mut aside[..len];
            let mut column = 0;
            while column < b.cols {
                let place = (first_column + column) % width;
                let count = (width - place).min(b.cols - column);
                pack_panels(isa, storage, b.block(0, column, b.rows, count), aside);
                let panel = &mut panels[(first_column + column) / width * len..][..len];
                match storage {
                    Storage::Halves => copy(halves(aside), halves(panel), width, place..place + count),
                    Storage::Floats | Storage::Widened | Storage::Pairs => {
                        copy(aside, panel, width, place..place + count)
                    }
                }
                column += count;
            }
        });
    }

    /// `c = onto + a self`.
    ///
    /// The bits are those of [`matmul`](crate::matmul) with the same operands, and a row's do not depend on the others.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn matmul(&self, a: Matrix<'_>, c: MatrixMut<'_>, onto: Onto<'_>) {
        check_shapes(a, (self.k, self.n), &c, onto);
        let _call = Call::start(Kind::Product, 2 * a.rows * self.k * self.n);
        multiply_packed(self.isa, self.storage(), a, self.panels.as_slice(), onto, c);
    }

    /// The precision it was packed for.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The memory it takes.
    pub fn bytes(&self) -> usize {
        size_of_val(self.panels.as_slice())
    }
}

/// Packs `b` as panels, on all threads.
pub(super) fn pack_on_threads(isa: Isa, storage: Storage, b: Matrix<'_>, panels: &mut [f32]) {
    let (width, steps) = (panel_width(isa), storage.steps(b.rows));
    assert!(panels.len() >= storage.len(steps, b.cols.next_multiple_of(width)), "the panels have room for the matrix");
    let panels = SharedMut::new(panels);
    each(b.cols.div_ceil(TOGETHER), b.rows * b.cols, |task| {
        let (first, columns) = (task * TOGETHER, TOGETHER.min(b.cols - task * TOGETHER));
        let (start, len) = (storage.len(steps, first), storage.len(steps, columns.next_multiple_of(width)));
        // SAFETY: these panels are there, as was checked, and belong to this call alone.
        let out = unsafe { panels.slice(start, len) };
        pack_panels(isa, storage, b.block(0, first, b.rows, columns), out);
    });
}

/// `c = start + a b` with `b` as whole panels over the whole of `a`'s columns.
pub(super) fn multiply_packed(
    isa: Isa,
    storage: Storage,
    a: Matrix<'_>,
    panels: &[f32],
    onto: Onto<'_>,
    mut c: MatrixMut<'_>,
) {
    if c.rows == 0 || c.cols == 0 {
        return;
    }
    let steps = storage.steps(a.cols);
    if steps == 0 {
        return onto.fill(&mut c);
    }
    let width = panel_width(isa);
    assert!(panels.len() >= c.cols.div_ceil(width) * storage.len(steps, width), "the panels cover the product");
    // Of a large result nothing is left in a cache when it is read next, and what is read once only pushes out the operands.
    let past_caches = c.rows * c.cols >= LARGE_RESULT && steps <= BLOCK_STEPS && !matches!(onto, Onto::Held);
    let (c_stride, c_rows, c_cols) = (c.row_stride, c.rows, c.cols);
    let c = SharedMut::new(c.data);
    let task = Task { isa, storage, width, a, panels, steps, onto, c, c_stride, past_caches };
    let work = c_rows * c_cols * a.cols;
    let threads = rayon::current_num_threads();
    if c_rows <= FEW_ROWS {
        task.few_rows(c_cols, work, threads);
    } else {
        let blocks = c_rows.div_ceil(BLOCK_ROWS * threads) * threads;
        let block_rows = c_rows.div_ceil(blocks);
        let row_blocks = c_rows.div_ceil(block_rows);
        each(row_blocks, work, |block| {
            let row = block * block_rows;
            task.block(row, block_rows.min(c_rows - row), c_cols);
        });
    }
}

/// What the tasks of one product share.
struct Task<'a> {
    isa: Isa,
    storage: Storage,
    /// Columns of a panel.
    width: usize,
    a: Matrix<'a>,
    panels: &'a [f32],
    steps: usize,
    onto: Onto<'a>,
    c: SharedMut<f32>,
    c_stride: usize,
    past_caches: bool,
}

impl Task<'_> {
    /// The panels from `panel` on, from step `step` of each.
    fn right(&self, panel: usize, step: usize) -> Right {
        let start = self.storage.len(panel * self.steps + step, self.width);
        self.storage.right(&self.panels[start..])
    }

    /// A product of few rows: the left operand is read where it lies, or rounded by each thread for itself, which is sooner done than
    /// waiting for another thread's; tasks take runs of panels.
    fn few_rows(&self, columns: usize, work: usize, threads: usize) {
        let (a, isa) = (self.a, self.isa);
        let in_place = self.storage == Storage::Floats && a.col_stride == 1;
        let panels = columns.div_ceil(self.width);
        each_part(panels, panels.div_ceil(8 * threads), work, |runs| {
            let mut runs = runs.peekable();
            if runs.peek().is_none() {
                return;
            }
            with_scratch([if in_place { 0 } else { a.rows * self.steps }], |[scratch]| {
                let (left, data): (Left, &[f32]) = if in_place {
                    (Left::Rows { stride: a.row_stride }, a.data)
                } else if self.storage == Storage::Pairs {
                    // A tile of one row is that row.
                    pack_tiles(isa, self.storage, a, 1, scratch);
                    (Left::Rows { stride: self.steps }, scratch)
                } else {
                    let height = tile_height(isa, a.rows);
                    pack_tiles(isa, self.storage, a, height, scratch);
                    (Left::Tiles { height }, scratch)
                };
                // A run's last panel asks for the first of the next.
                for panels in runs {
                    let column = panels.start * self.width;
                    let product = Product {
                        rows: a.rows,
                        columns: (panels.len() * self.width).min(columns - column),
                        steps: self.steps,
                        a: data.as_ptr(),
                        left,
                        b: self.right(panels.start, 0),
                        panel_stride: self.width * self.steps,
                        step_stride: self.width,
                        // SAFETY: the columns from `column` on lie inside the rows of `c`.
                        c: unsafe { self.c.get().add(column) },
                        c_stride: self.c_stride,
                        start: self.onto.start(0, column),
                        hints: Hints::NONE,
                    };
                    // SAFETY: `a` was checked by its view or packed in full, the panels are whole, and these columns of
                    // `c` belong to this task alone.
                    unsafe { multiply(isa, product) };
                }
            });
        });
    }

    /// Some rows of the product, in blocks of the reduced index.
    fn block(&self, row: usize, rows: usize, columns: usize) {
        let height = tile_height(self.isa, rows);
        with_scratch([rows * BLOCK_STEPS.min(self.steps)], |[packed]| {
            for step in (0..self.steps).step_by(BLOCK_STEPS) {
                let steps = BLOCK_STEPS.min(self.steps - step);
                let k = self.storage.elements(step);
                let a = self.a.block(row, k, rows, self.storage.elements(steps).min(self.a.cols - k));
                pack_tiles(self.isa, self.storage, a, height, packed);
                let product = Product {
                    rows,
                    columns,
                    steps,
                    a: packed.as_ptr(),
                    left: Left::Tiles { height },
                    b: self.right(0, step),
                    panel_stride: self.width * self.steps,
                    step_stride: self.width,
                    // SAFETY: row `row` is a row of `c`.
                    c: unsafe { self.c.get().add(row * self.c_stride) },
                    c_stride: self.c_stride,
                    start: if step > 0 { Start::Held } else { self.onto.start(row, 0) },
                    hints: Hints { past_caches: self.past_caches, ..Hints::NONE },
                };
                // SAFETY: the tiles were just packed, the panels are whole, and these rows of `c` belong to this task alone.
                unsafe { multiply(self.isa, product) };
            }
            if self.past_caches {
                fence();
            }
        });
    }
}
