//! Sums, scales, biases and checks over whole slices.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::isa::{Isa, multiversion};
use crate::parallel::{SharedMut, each, each_chunk};
use crate::simd::stream;

/// Elements of one task.
const CHUNK: usize = 1 << 15;

/// `y += x`.
pub fn add(y: &mut [f32], x: &[f32]) {
    assert_eq!(y.len(), x.len(), "add: lengths differ");
    let isa = Isa::current();
    each_chunk(y, CHUNK, |start, y| add_chunk(isa, y, &x[start..][..y.len()]));
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
    each_chunk(x, CHUNK, |_, x| scale_chunk(isa, x, factor));
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
    let shared = SharedMut::new(d_bias);
    each(width.div_ceil(columns), d_rows.len(), |task| {
        let (first, count) = (task * columns, columns.min(width - task * columns));
        // SAFETY: these columns belong to this call alone.
        let d_bias = unsafe { shared.slice(first, count) };
        for row in d_rows.chunks_exact(width) {
            add_chunk(isa, d_bias, &row[first..][..count]);
        }
    });
}

/// The sum of squares of `x`, in f64 and in an order that depends on its length alone.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    let isa = Isa::current();
    let mut parts = vec![0.0; x.len().div_ceil(CHUNK)];
    let shared = SharedMut::new(&mut parts);
    each(x.len().div_ceil(CHUNK), x.len(), |task| {
        let start = task * CHUNK;
        // SAFETY: part `task` belongs to this call alone.
        let part = unsafe { shared.slice(task, 1) };
        part[0] = sum_of_squares_chunk(isa, &x[start..x.len().min(start + CHUNK)]);
    });
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
    let spoilt = AtomicBool::new(false);
    each(x.len().div_ceil(CHUNK), x.len(), |task| {
        let start = task * CHUNK;
        if !all_finite_chunk(isa, &x[start..x.len().min(start + CHUNK)]) {
            spoilt.store(true, Ordering::Relaxed);
        }
    });
    if spoilt.into_inner() { x.iter().position(|x| !x.is_finite()) } else { None }
}

multiversion! {
    fn all_finite_chunk(x: &[f32]) -> bool {
        // The exponent of an infinity or a NaN has all its bits set.
        const EXPONENT: u32 = 0x7f80_0000;
        x.iter().fold(false, |bad, x| bad | (x.to_bits() & EXPONENT == EXPONENT)) ^ true
    }
}

/// Rows of one array, and the array that some of them are copied to.
#[derive(Debug)]
pub struct RowCopy<'a> {
    /// Elements of a row.
    pub width: usize,
    /// Where rows come from.
    pub from: &'a [f32],
    /// Where they go.
    pub to: &'a mut [f32],
}

/// Copies the same rows in several arrays, past the caches: for each pair of `rows`, the first is where it comes from and the second where it goes.
///
/// # Panics
/// If a row lies outside an array, or two go to the same place.
pub fn copy_rows(arrays: &mut [RowCopy<'_>], rows: &[(usize, usize)]) {
    let mut places: Vec<usize> = rows.iter().map(|&(_, to)| to).collect();
    places.sort_unstable();
    assert!(places.is_sorted_by(|a, b| a < b), "copy_rows: two rows go to the same place");
    let (last_from, last_to) = (rows.iter().map(|&(from, _)| from).max(), places.last());
    for RowCopy { width, from, to } in &*arrays {
        let fits = |row: Option<&usize>, len: usize| row.is_none_or(|row| (row + 1) * width <= len);
        assert!(fits(last_from.as_ref(), from.len()) && fits(last_to, to.len()), "copy_rows: a row outside an array");
    }
    let work = rows.len() * arrays.iter().map(|array| array.width).sum::<usize>();
    let arrays: Vec<(usize, &[f32], SharedMut<f32>)> =
        arrays.iter_mut().map(|array| (array.width, array.from, SharedMut::new(array.to))).collect();
    each(rows.len(), work, |index| {
        let (row, place) = rows[index];
        for &(width, from, to) in &arrays {
            // SAFETY: the place lies inside the array, and no other call has it.
            stream(&from[row * width..][..width], unsafe { to.slice(place * width, width) });
        }
    });
}
