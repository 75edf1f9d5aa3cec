//! Sums, scales, biases and checks over whole slices.

use rayon::prelude::*;

use crate::isa::{Isa, multiversion};
use crate::parallel::{SharedMut, each};

/// Elements of one task.
const CHUNK: usize = 1 << 15;

/// `y += x`.
pub fn add(y: &mut [f32], x: &[f32]) {
    assert_eq!(y.len(), x.len(), "add: lengths differ");
    let isa = Isa::current();
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| add_chunk(isa, y, x));
}

multiversion! {
    fn add_chunk(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }
}

/// `x *= factor`.
pub fn scale(x: &mut [f32], factor: f32) {
    let isa = Isa::current();
    x.par_chunks_mut(CHUNK).for_each(|x| scale_chunk(isa, x, factor));
}

multiversion! {
    fn scale_chunk(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }
}

/// Adds `bias` to each row of `rows`, whose width is the bias's length.
pub fn add_bias(rows: &mut [f32], bias: &[f32]) {
    let width = bias.len();
    assert!(width > 0 && rows.len().is_multiple_of(width), "add_bias: {} is no number of rows of {width}", rows.len());
    let isa = Isa::current();
    let count = rows.len() / width;
    let shared = SharedMut::new(rows);
    each(count, count * width, |row| {
        // SAFETY: row `row` belongs to this call alone.
        let row = unsafe { shared.slice(row * width, width) };
        add_chunk(isa, row, bias);
    });
}

/// The gradient of [`add_bias`]: `d_bias[j]` plus the sum over rows, in order, of `d_rows[.., j]`.
pub fn bias_backward(d_rows: &[f32], d_bias: &mut [f32]) {
    let width = d_bias.len();
    assert!(
        width > 0 && d_rows.len().is_multiple_of(width),
        "bias_backward: {} is no number of rows of {width}",
        d_rows.len()
    );
    let isa = Isa::current();
    let columns = width.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(16);
    d_bias.par_chunks_mut(columns).enumerate().for_each(|(task, d_bias)| {
        for row in d_rows.chunks_exact(width) {
            let first = task * columns;
            add_chunk(isa, d_bias, &row[first..first + d_bias.len()]);
        }
    });
}

/// The sum of squares of `x`, in f64 and in an order that depends on its length alone.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    let isa = Isa::current();
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(|x| sum_of_squares_chunk(isa, x)).collect();
    parts.iter().sum()
}

multiversion! {
    fn sum_of_squares_chunk(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for chunk in chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(x) * f64::from(x);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(x) * f64::from(x);
        }
        lanes.iter().sum()
    }
}

/// The index of the first element of `x` that is infinite or NaN.
pub fn finite(x: &[f32]) -> Option<usize> {
    let isa = Isa::current();
    let chunk = x.par_chunks(CHUNK).position_first(|x| !all_finite_chunk(isa, x))?;
    let start = chunk * CHUNK;
    x[start..].iter().position(|x| !x.is_finite()).map(|offset| start + offset)
}

multiversion! {
    fn all_finite_chunk(x: &[f32]) -> bool {
        // The exponent of an infinity or a NaN has all its bits set.
        const EXPONENT: u32 = 0x7f80_0000;
        x.iter().fold(false, |bad, x| bad | (x.to_bits() & EXPONENT == EXPONENT)) ^ true
    }
}
