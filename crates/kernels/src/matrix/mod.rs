//! Matrix products.

use crate::isa::{Isa, multiversion};
use crate::parallel::{SharedMut, each};

/// How operands are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    F32,
    /// Rounded to bfloat16, accumulated in f32.
    Bf16,
}

/// A strided view.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows one after the other.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }
    /// With another distance between rows.
    pub fn with_row_stride(mut self, row_stride: usize) -> Self {
        self.row_stride = row_stride;
        self
    }
    /// Rows as columns.
    pub fn transposed(self) -> Self {
        Self { data: self.data, rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride }
    }
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    fn at(&self, i: usize, j: usize) -> f32 {
        self.data[i * self.row_stride + j * self.col_stride]
    }
}

/// A mutable view with contiguous rows.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// Rows one after the other.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols }
    }
    /// With another distance between rows.
    pub fn with_row_stride(mut self, row_stride: usize) -> Self {
        self.row_stride = row_stride;
        self
    }
}

fn rounded(x: f32, precision: Precision) -> f32 {
    match precision {
        Precision::F32 => x,
        Precision::Bf16 => {
            let b = x.to_bits();
            f32::from_bits(b.wrapping_add(0x7fff + ((b >> 16) & 1)) & 0xffff_0000)
        }
    }
}

/// `c (+)= a b`.
pub fn matmul(precision: Precision, a: Matrix<'_>, b: Matrix<'_>, c: MatrixMut<'_>, accumulate: bool) {
    let mut packed = PackedMatrix::new(precision, b.rows, b.cols);
    packed.pack(0, b);
    packed.matmul(a, c, accumulate);
}

/// A right operand packed once.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    precision: Precision,
    k: usize,
    n: usize,
    data: Vec<f32>,
}

impl PackedMatrix {
    /// Zeros, `k × n`.
    pub fn new(precision: Precision, k: usize, n: usize) -> Self {
        Self { precision, k, n, data: vec![0.0; k * n] }
    }
    /// Packs `b` from `first_column` on.
    pub fn pack(&mut self, first_column: usize, b: Matrix<'_>) {
        for k in 0..self.k {
            for j in 0..b.cols {
                self.data[k * self.n + first_column + j] = rounded(b.at(k, j), self.precision);
            }
        }
    }
    /// The precision it was packed for.
    pub fn precision(&self) -> Precision {
        self.precision
    }
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.len() * 4
    }
    /// `c (+)= a self`.
    pub fn matmul(&self, a: Matrix<'_>, c: MatrixMut<'_>, accumulate: bool) {
        let isa = Isa::current();
        let (rows, row_stride) = (c.rows, c.row_stride);
        assert_eq!((a.rows, a.cols, c.cols), (rows, self.k, self.n));
        let shared = SharedMut::new(c.data);
        each(rows, rows * self.k * self.n, |i| {
            // SAFETY: rows are disjoint.
            let row = unsafe { shared.slice(i * row_stride, self.n) };
            if !accumulate {
                row.fill(0.0);
            }
            let left: Vec<f32> = (0..self.k).map(|k| rounded(a.at(i, k), self.precision)).collect();
            row_product(isa, &left, &self.data, row);
        });
    }
}

multiversion! {
    fn row_product(left: &[f32], right: &[f32], row: &mut [f32]) {
        for (k, &x) in left.iter().enumerate() {
            for (c, &b) in row.iter_mut().zip(&right[k * row.len()..]) {
                *c = x.mul_add(b, *c);
            }
        }
    }
}
