//! RMSNorm over whole rows and over the heads inside query-key-value rows, forward and backward.
//!
//! `y = x * inverse_rms * (offset + weight)` with `inverse_rms = 1 / sqrt(mean(x^2) + epsilon)` (Zhang and Sennrich,
//! "Root Mean Square Layer Normalization", 2019). The offset is 0, or 1 for Gemma, which stores `weight - 1`.

use crate::isa::{Isa, multiversion};
use crate::math::{sum, sum_of_three};
use crate::parallel::{SharedMut, each, each_chunk, rows_per_task};
use crate::rope::HeadRange;

/// Normalises each row of `x` (rows of the weight's length) into `y` and leaves each row's `inverse_rms`.
pub fn rms_norm(x: &[f32], weight: &[f32], weight_offset: f32, epsilon: f32, y: &mut [f32], inverse_rms: &mut [f32]) {
    let width = weight.len();
    assert_eq!(x.len(), y.len(), "rms_norm: input and output differ in length");
    assert_eq!(x.len(), inverse_rms.len() * width, "rms_norm: one inverse_rms for each row");
    if x.is_empty() {
        return;
    }
    let isa = Isa::current();
    let rows = rows_per_task(inverse_rms.len(), width);
    let shared = SharedMut::new(inverse_rms);
    each_chunk(y, rows * width, |start, y| {
        // SAFETY: a chunk of `y` is whole rows, and their entries belong to this call alone.
        let inverse_rms = unsafe { shared.slice(start / width, y.len() / width) };
        norm_rows(isa, &x[start..][..y.len()], weight, weight_offset, epsilon, y, inverse_rms);
    });
}

multiversion! {
    fn norm_rows(x: &[f32], weight: &[f32], offset: f32, epsilon: f32, y: &mut [f32], inverse_rms: &mut [f32]) {
        let width = weight.len();
        for ((x, y), inverse_rms) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(inverse_rms) {
            *inverse_rms = inverse_rms_of(x, epsilon);
            for ((y, &x), &weight) in y.iter_mut().zip(x).zip(weight) {
                *y = x * *inverse_rms * (offset + weight);
            }
        }
    }
}

#[inline(always)]
fn inverse_rms_of(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (sum(x, |x| x * x) / x.len() as f32 + epsilon).sqrt()
}

/// The gradient of [`rms_norm`]: adds to `dx` and, if given, to `dweight` (over rows in order).
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    weight_offset: f32,
    inverse_rms: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
) {
    let width = weight.len();
    assert!(x.len() == dy.len() && x.len() == dx.len(), "rms_norm_backward: rows differ in length");
    assert_eq!(x.len(), inverse_rms.len() * width, "rms_norm_backward: one inverse_rms for each row");
    if x.is_empty() {
        return;
    }
    let isa = Isa::current();
    let rows = rows_per_task(inverse_rms.len(), width);
    each_chunk(dx, rows * width, |start, dx| {
        let (x, dy) = (&x[start..][..dx.len()], &dy[start..][..dx.len()]);
        let inverse_rms = &inverse_rms[start / width..][..dx.len() / width];
        norm_rows_backward(isa, x, weight, weight_offset, inverse_rms, dy, dx);
    });
    if let Some(dweight) = dweight {
        assert_eq!(dweight.len(), width, "rms_norm_backward: the weight's gradient differs in length");
        let columns = width.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(16);
        let shared = SharedMut::new(dweight);
        each(width.div_ceil(columns), x.len(), |task| {
            let first = task * columns;
            // SAFETY: these columns belong to this call alone.
            let dweight = unsafe { shared.slice(first, columns.min(width - first)) };
            weight_gradient(isa, x, dy, inverse_rms, width, first, dweight);
        });
    }
}

multiversion! {
    fn norm_rows_backward(x: &[f32], weight: &[f32], offset: f32, inverse_rms: &[f32], dy: &[f32], dx: &mut [f32]) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width)).zip(inverse_rms);
        for (((x, dy), dx), &inverse) in rows {
            let along = sum_of_three([dy, weight, x], |dy, weight, x| dy * (offset + weight) * x);
            let along = along * inverse * inverse * inverse / width as f32;
            for i in 0..width {
                dx[i] += dy[i] * (offset + weight[i]) * inverse - x[i] * along;
            }
        }
    }
}

multiversion! {
    fn weight_gradient(x: &[f32], dy: &[f32], inverse_rms: &[f32], width: usize, first: usize, dweight: &mut [f32]) {
        let columns = dweight.len();
        for ((x, dy), &inverse) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(inverse_rms) {
            let (x, dy) = (&x[first..first + columns], &dy[first..first + columns]);
            for i in 0..columns {
                dweight[i] += dy[i] * x[i] * inverse;
            }
        }
    }
}

/// Normalises the heads `range` of each row in place (the query and key norm of Qwen3 and Gemma3), each over its
/// `head_dim` with one `weight` of that length.
///
/// Leaves in `input` (`rows * heads * head_dim`) the heads as they were and in `inverse_rms` (`rows * heads`) what
/// [`head_norm_backward`] needs.
pub fn head_norm(
    range: HeadRange,
    rows: &mut [f32],
    weight: &[f32],
    weight_offset: f32,
    epsilon: f32,
    input: &mut [f32],
    inverse_rms: &mut [f32],
) {
    let count = range.check(rows.len());
    let width = range.heads * range.head_dim;
    assert_eq!(weight.len(), range.head_dim, "head_norm: the weight is as long as a head");
    assert_eq!(input.len(), count * width, "head_norm: input holds rows x heads x head_dim");
    assert_eq!(inverse_rms.len(), count * range.heads, "head_norm: one inverse_rms for each head of each row");
    let isa = Isa::current();
    let (rows, input, inverse_rms) = (SharedMut::new(rows), SharedMut::new(input), SharedMut::new(inverse_rms));
    each(count, count * width, |row| {
        // SAFETY: these parts belong to row `row`, which this call alone handles.
        let (heads, input, inverse_rms) = unsafe {
            (
                rows.slice(row * range.width + range.first * range.head_dim, width),
                input.slice(row * width, width),
                inverse_rms.slice(row * range.heads, range.heads),
            )
        };
        input.copy_from_slice(heads);
        norm_rows(isa, input, weight, weight_offset, epsilon, heads, inverse_rms);
    });
}

/// The gradient of [`head_norm`]: the heads `range` of `d_rows` become the gradients of the norm's input, and `dweight`,
/// if given, gains the weight's gradient over rows and heads in order.
pub fn head_norm_backward(
    range: HeadRange,
    input: &[f32],
    inverse_rms: &[f32],
    weight: &[f32],
    weight_offset: f32,
    d_rows: &mut [f32],
    dweight: Option<&mut [f32]>,
) {
    let count = range.check(d_rows.len());
    let width = range.heads * range.head_dim;
    assert_eq!(weight.len(), range.head_dim, "head_norm_backward: the weight is as long as a head");
    assert_eq!(input.len(), count * width, "head_norm_backward: input holds rows x heads x head_dim");
    assert_eq!(inverse_rms.len(), count * range.heads, "head_norm_backward: one inverse_rms for each head of each row");
    let isa = Isa::current();
    let head_offset = range.first * range.head_dim;
    if let Some(dweight) = dweight {
        assert_eq!(dweight.len(), range.head_dim, "head_norm_backward: the weight's gradient differs in length");
        let rows =
            input.chunks_exact(width).zip(d_rows.chunks_exact(range.width)).zip(inverse_rms.chunks_exact(range.heads));
        for ((input, d_row), inverse_rms) in rows {
            let d_heads = &d_row[head_offset..head_offset + width];
            weight_gradient(isa, input, d_heads, inverse_rms, range.head_dim, 0, dweight);
        }
    }
    let d_rows = SharedMut::new(d_rows);
    each(count, count * width, |row| {
        // SAFETY: row `row` belongs to this call alone.
        let d_heads = unsafe { d_rows.slice(row * range.width + head_offset, width) };
        let input = &input[row * width..][..width];
        let inverse_rms = &inverse_rms[row * range.heads..][..range.heads];
        head_norm_row_backward(isa, input, weight, weight_offset, inverse_rms, d_heads);
    });
}

multiversion! {
    fn head_norm_row_backward(x: &[f32], weight: &[f32], offset: f32, inverse_rms: &[f32], d: &mut [f32]) {
        let width = weight.len();
        for ((x, d), &inverse) in x.chunks_exact(width).zip(d.chunks_exact_mut(width)).zip(inverse_rms) {
            let along = sum_of_three([d, weight, x], |d, weight, x| d * (offset + weight) * x);
            let along = along * inverse * inverse * inverse / width as f32;
            for i in 0..width {
                d[i] = d[i] * (offset + weight[i]) * inverse - x[i] * along;
            }
        }
    }
}
