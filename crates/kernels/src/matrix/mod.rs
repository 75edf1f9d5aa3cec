//! Matrix products.
//!
//! Operands are packed into tiles (left, twelve rows at most) and panels (right, 32 columns), as in Goto and van de
//! Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008); unlike there, a block of the reduced index continues
//! the sums that the block before it left in the destination, so that blocking does not change a bit.

mod int8;
pub(crate) mod kernel;
pub(crate) mod pack;
mod packed;

pub use int8::Int8Matrix;
pub use packed::PackedMatrix;

use crate::buffer::with_scratch;
use crate::isa::Isa;
use crate::parallel::{SharedMut, each};
use crate::profile::{Call, Kind};

/// How the operands of a product are read. Results are f32 and sums are kept in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// As they are: an element of the product is a left fold of fused multiply-adds.
    F32,
    /// Rounded to bfloat16 (nearest, ties to even), and multiplied in pairs of neighbours along the reduced index: a step of
    /// the fold adds the second product of a pair, then the first. The hardware instruction takes subnormal numbers as zero;
    /// its stand-in on other processors does not, and that is the only difference between them.
    Bf16,
}

/// A strided view of f32.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

/// The number of elements that a strided view reaches over.
fn extent(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + (cols - 1) * col_stride + 1 }
}

impl<'a> Matrix<'a> {
    /// A `rows x cols` matrix whose rows lie one after the other at the start of `data`.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }.checked()
    }

    /// The same with rows (before any transposition) `row_stride` apart.
    ///
    /// # Panics
    /// If the data is too short.
    pub fn with_row_stride(mut self, row_stride: usize) -> Self {
        self.row_stride = row_stride;
        self.checked()
    }

    /// The transposed matrix, over the same data.
    pub fn transposed(self) -> Self {
        let Self { data, rows, cols, row_stride, col_stride } = self;
        Self { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The `rows x cols` part from `(row, col)` on.
    pub(crate) fn block(self, row: usize, col: usize, rows: usize, cols: usize) -> Self {
        assert!(row + rows <= self.rows && col + cols <= self.cols, "the block lies inside the matrix");
        let start = if rows == 0 || cols == 0 { 0 } else { row * self.row_stride + col * self.col_stride };
        Self { data: &self.data[start..], rows, cols, ..self }
    }

    fn checked(self) -> Self {
        let needed = extent(self.rows, self.cols, self.row_stride, self.col_stride);
        assert!(needed <= self.data.len(), "a matrix of {}x{} needs {needed} elements", self.rows, self.cols);
        self
    }
}

/// A mutable view of f32 with contiguous rows.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// A `rows x cols` matrix whose rows lie one after the other at the start of `data`.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols }.checked()
    }

    /// The same with rows `row_stride` apart.
    ///
    /// # Panics
    /// If the rows would overlap or the data is too short.
    pub fn with_row_stride(mut self, row_stride: usize) -> Self {
        assert!(row_stride >= self.cols, "rows of {} columns, {row_stride} apart, would overlap", self.cols);
        self.row_stride = row_stride;
        self.checked()
    }

    fn checked(self) -> Self {
        let needed = extent(self.rows, self.cols, self.row_stride, 1);
        assert!(needed <= self.data.len(), "a matrix of {}x{} needs {needed} elements", self.rows, self.cols);
        self
    }

    fn fill_zero(&mut self) {
        for row in 0..self.rows {
            self.data[row * self.row_stride..][..self.cols].fill(0.0);
        }
    }

    /// The columns `first..first + count`.
    fn columns(&mut self, first: usize, count: usize) -> MatrixMut<'_> {
        MatrixMut { data: &mut self.data[first..], rows: self.rows, cols: count, row_stride: self.row_stride }
    }
}

/// Elements of the right operand that are packed at a time.
const PACKED_ELEMENTS: usize = 1 << 21;
/// Columns of the right operand that are packed at a time.
const PACKED_COLUMNS: usize = 3072;

/// `c = a b`, or `c += a b`.
///
/// # Panics
/// If the shapes do not fit.
pub fn matmul(precision: Precision, a: Matrix<'_>, b: Matrix<'_>, mut c: MatrixMut<'_>, accumulate: bool) {
    assert!(
        a.cols == b.rows && c.rows == a.rows && c.cols == b.cols,
        "matmul: {}x{} times {}x{} into {}x{}",
        a.rows,
        a.cols,
        b.rows,
        b.cols,
        c.rows,
        c.cols
    );
    let _call = Call::start(Kind::Product, 2 * a.rows * a.cols * b.cols);
    if a.cols == 0 {
        if !accumulate {
            c.fill_zero();
        }
        return;
    }
    let isa = Isa::current();
    for column in (0..b.cols).step_by(PACKED_COLUMNS) {
        let columns = PACKED_COLUMNS.min(b.cols - column);
        let padded = columns.next_multiple_of(kernel::PANEL);
        // A whole number of blocks, and of pairs.
        let depth = (PACKED_ELEMENTS / padded).next_multiple_of(2 * packed::BLOCK_STEPS);
        for k in (0..a.cols).step_by(depth) {
            let depth = depth.min(a.cols - k);
            let steps = pack::steps(precision, depth);
            with_scratch([padded * steps], |[panels]| {
                let shared = SharedMut::new(panels);
                each(padded / kernel::PANEL, depth * columns, |panel| {
                    // SAFETY: panel `panel` belongs to this call alone.
                    let out = unsafe { shared.slice(panel * kernel::PANEL * steps, kernel::PANEL * steps) };
                    let first = panel * kernel::PANEL;
                    let count = kernel::PANEL.min(columns - first);
                    pack::pack_panel(isa, precision, b.block(k, column + first, depth, count), out);
                });
                let a = a.block(0, k, a.rows, depth);
                packed::multiply_packed(isa, precision, a, panels, c.columns(column, columns), accumulate || k > 0);
            });
        }
    }
}
