//! Matrix products.
//!
//! Operands are packed into tiles (left, twelve rows at most) and panels (right, two vectors wide), as in Goto and van de
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
use crate::matrix::kernel::{Start, panel_width};
use crate::matrix::pack::Storage;
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

    /// The columns `first..first + count`.
    fn columns(&mut self, first: usize, count: usize) -> MatrixMut<'_> {
        MatrixMut { data: &mut self.data[first..], rows: self.rows, cols: count, row_stride: self.row_stride }
    }
}

/// What a product is added to: its sums start from there, so that the bits are those of one sum.
#[derive(Clone, Copy, Debug)]
pub enum Onto<'a> {
    /// Nothing.
    Zero,
    /// What the destination holds.
    Held,
    /// A matrix of the destination's shape, with contiguous rows.
    Rows(Matrix<'a>),
}

impl Onto<'_> {
    /// The same for the columns `first..first + count` of the destination.
    fn columns(self, first: usize, count: usize) -> Self {
        match self {
            Self::Rows(start) => Self::Rows(start.block(0, first, start.rows, count)),
            other => other,
        }
    }

    /// The same from an element of the destination on, for the inner loops.
    fn start(self, row: usize, column: usize) -> Start {
        match self {
            Self::Zero => Start::Zero,
            Self::Held => Start::Held,
            Self::Rows(start) => {
                let rest = start.block(row, column, start.rows - row, start.cols - column);
                Start::Rows { from: rest.data.as_ptr(), stride: start.row_stride }
            }
        }
    }

    /// The product over nothing.
    fn fill(self, c: &mut MatrixMut<'_>) {
        for row in 0..c.rows {
            let to = &mut c.data[row * c.row_stride..][..c.cols];
            match self {
                Self::Zero => to.fill(0.0),
                Self::Held => {}
                Self::Rows(start) => to.copy_from_slice(&start.data[row * start.row_stride..][..to.len()]),
            }
        }
    }
}

/// Checks the shapes of a product with a `k x n` right operand.
fn check_shapes(a: Matrix<'_>, (k, n): (usize, usize), c: &MatrixMut<'_>, onto: Onto<'_>) {
    let (m, inner, rows, cols) = (a.rows, a.cols, c.rows, c.cols);
    assert!(inner == k && rows == m && cols == n, "matmul: {m}x{inner} times {k}x{n} into {rows}x{cols}");
    if let Onto::Rows(start) = onto {
        let fits = start.rows == rows && start.cols == cols && start.col_stride == 1;
        assert!(fits, "matmul: {}x{} as the start of {rows}x{cols}", start.rows, start.cols);
    }
}

/// The f32 of the right operand that are packed at a time: a share of the last-level cache, where all rows then find them.
const PACKED_FLOATS: usize = 1 << 20;
/// Columns of the right operand that are packed at a time.
const PACKED_COLUMNS: usize = 3072;

/// `c = onto + a b`.
///
/// # Panics
/// If the shapes do not fit.
pub fn matmul(precision: Precision, a: Matrix<'_>, b: Matrix<'_>, mut c: MatrixMut<'_>, onto: Onto<'_>) {
    check_shapes(a, (b.rows, b.cols), &c, onto);
    let _call = Call::start(Kind::Product, 2 * a.rows * a.cols * b.cols);
    if a.cols == 0 {
        return onto.fill(&mut c);
    }
    let isa = Isa::current();
    let (storage, width) = (Storage::for_one_product(isa, precision), panel_width(isa));
    for column in (0..b.cols).step_by(PACKED_COLUMNS) {
        let columns = PACKED_COLUMNS.min(b.cols - column);
        let panels = columns.div_ceil(width);
        // A whole number of blocks, and of pairs.
        let depth = storage.elements(PACKED_FLOATS / (panels * width)).next_multiple_of(2 * packed::BLOCK_STEPS);
        for k in (0..a.cols).step_by(depth) {
            let depth = depth.min(a.cols - k);
            let len = storage.len(storage.steps(depth), width);
            with_scratch([panels * len], |[packed]| {
                packed::pack_on_threads(isa, storage, b.block(k, column, depth, columns), packed);
                let a = a.block(0, k, a.rows, depth);
                let onto = if k > 0 { Onto::Held } else { onto.columns(column, columns) };
                packed::multiply_packed(isa, storage, a, packed, onto, c.columns(column, columns));
            });
        }
    }
}
