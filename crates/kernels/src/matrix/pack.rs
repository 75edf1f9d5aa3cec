//! Operands in the order in which the inner loops read them, rounded to bfloat16 on the way if asked for.

use crate::half::bfloat16;
use crate::isa::multiversion;
use crate::matrix::kernel::PANEL;
use crate::matrix::{Matrix, Precision};
use crate::simd::{Lines, prefetch, write_columns};

/// Steps of the reduced index `k` are elements, or pairs of bfloat16.
pub(crate) fn steps(precision: Precision, k: usize) -> usize {
    match precision {
        Precision::F32 => k,
        Precision::Bf16 => k.div_ceil(2),
    }
}

#[inline(always)]
fn pair(first: f32, second: f32) -> f32 {
    f32::from_bits(u32::from(bfloat16(first)) | u32::from(bfloat16(second)) << 16)
}

/// Steps that are handled at a time where a vector's elements are neighbours: those of a cache line.
const BLOCK: usize = Lines::FLOATS;

/// All elements are rounded before they are paired: that way the loop runs in vectors.
#[inline(always)]
fn pair_block(elements: &[f32; 2 * BLOCK]) -> [f32; BLOCK] {
    let rounded = elements.map(bfloat16);
    std::array::from_fn(|step| f32::from_bits(u32::from(rounded[2 * step]) | u32::from(rounded[2 * step + 1]) << 16))
}

/// Steps ahead for which sources are asked for whose steps lie apart: the processor sees no stream in a few lines of each row.
const STEPS_AHEAD: usize = 8;
/// Blocks of steps ahead for which sources are asked for whose steps are neighbours.
const BLOCKS_AHEAD: usize = 2;

/// Asks for `count` elements of `data` from `start` on, which may lie beyond its end.
#[inline(always)]
fn ask_for(data: &[f32], start: usize, count: usize) {
    for line in (0..count).step_by(Lines::FLOATS) {
        prefetch(data.as_ptr().wrapping_add(start + line));
    }
}

/// Asks for what stands [`STEPS_AHEAD`] steps behind the `count` elements at `start`; a step is `per_step` rows, `stride` apart.
#[inline(always)]
fn ask_ahead(data: &[f32], start: usize, count: usize, per_step: usize, stride: usize) {
    for row in STEPS_AHEAD * per_step..(STEPS_AHEAD + 1) * per_step {
        ask_for(data, start + row * stride, count);
    }
}

/// `count` vectors of length `k`: element `step` of vector `i` is `data[i * stride + step * step_stride]`.
#[derive(Clone, Copy)]
struct Vectors<'a> {
    data: &'a [f32],
    count: usize,
    k: usize,
    stride: usize,
    step_stride: usize,
}

/// Writes `vectors` step by step, `width` elements a step. `TURN` is for processors with AVX-512, which turn blocks in their registers.
#[inline(always)]
fn interleave<const PAIRS: bool, const TURN: bool>(vectors: Vectors<'_>, width: usize, out: &mut [f32]) {
    let Vectors { data, count, k, stride, step_stride } = vectors;
    let per_step = if PAIRS { 2 } else { 1 };
    let (whole, steps) = (k / per_step, k.div_ceil(per_step));
    let out = &mut out[..steps * width];
    if count < width {
        out.fill(0.0);
    }
    if stride == 1 {
        for (step, out) in out.chunks_exact_mut(width).enumerate().take(whole) {
            ask_ahead(data, step * per_step * step_stride, count, per_step, step_stride);
            let first = &data[step * per_step * step_stride..][..count];
            if PAIRS {
                let second = &data[(step * 2 + 1) * step_stride..][..count];
                for ((out, &first), &second) in out.iter_mut().zip(first).zip(second) {
                    *out = pair(first, second);
                }
            } else {
                out[..count].copy_from_slice(first);
            }
        }
    } else if step_stride == 1 {
        // Some steps of one vector at a time: they share a cache line of the source, and the stores stay near.
        let blocks = whole - whole % BLOCK;
        let block = |start: usize, i: usize| -> [f32; BLOCK] {
            let source = &data[i * stride + start * per_step..];
            ask_for(source, BLOCKS_AHEAD * BLOCK * per_step, BLOCK * per_step);
            if PAIRS {
                pair_block(source.first_chunk().expect("a block of pairs"))
            } else {
                *source.first_chunk().expect("a block of elements")
            }
        };
        for start in (0..blocks).step_by(BLOCK) {
            if TURN {
                for first in (0..count).step_by(BLOCK) {
                    let here = BLOCK.min(count - first);
                    let mut rows = [[0.0; BLOCK]; BLOCK];
                    for (i, row) in rows.iter_mut().enumerate().take(here) {
                        *row = block(start, first + i);
                    }
                    let out = &mut out[start * width + first..][..(BLOCK - 1) * width + here];
                    // SAFETY: `TURN` says that the processor can.
                    unsafe { write_columns(&rows, here, out, width) };
                }
            } else {
                for i in 0..count {
                    let out = &mut out[start * width + i..][..(BLOCK - 1) * width + 1];
                    for (step, value) in block(start, i).into_iter().enumerate() {
                        out[step * width] = value;
                    }
                }
            }
        }
        for step in blocks..whole {
            for i in 0..count {
                let source = &data[i * stride + step * per_step..];
                out[step * width + i] = if PAIRS { pair(source[0], source[1]) } else { source[0] };
            }
        }
    } else {
        for step in 0..whole {
            for i in 0..count {
                let at = |element: usize| data[i * stride + element * step_stride];
                out[step * width + i] = if PAIRS { pair(at(2 * step), at(2 * step + 1)) } else { at(step) };
            }
        }
    }
    if whole < steps {
        for i in 0..count {
            out[whole * width + i] = pair(data[i * stride + (k - 1) * step_stride], 0.0);
        }
    }
}

/// [`interleave`] for any width.
#[inline(always)]
fn interleave_any<const PAIRS: bool, const TURN: bool>(vectors: Vectors<'_>, width: usize, out: &mut [f32]) {
    // A panel's width as a constant lets its copies become plain vector moves.
    if width == PANEL && vectors.count == PANEL {
        interleave::<PAIRS, TURN>(Vectors { count: PANEL, ..vectors }, PANEL, out);
    } else {
        interleave::<PAIRS, TURN>(vectors, width, out);
    }
}

multiversion! {
    fn interleave_f32(vectors: Vectors<'_>, width: usize, out: &mut [f32]) {
        interleave_any::<false, false>(vectors, width, out);
    }
}

multiversion! {
    fn interleave_bf16(vectors: Vectors<'_>, width: usize, out: &mut [f32]) {
        interleave_any::<true, false>(vectors, width, out);
    }
}

/// [`interleave_f32`] or [`interleave_bf16`] for the neighbouring steps of several vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn turn_avx512<const PAIRS: bool>(vectors: Vectors<'_>, width: usize, out: &mut [f32]) {
    interleave_any::<PAIRS, true>(vectors, width, out);
}

/// Writes `vectors` as the precision says.
fn write_steps(isa: crate::Isa, precision: Precision, vectors: Vectors<'_>, width: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, crate::Isa::Avx512Bf16 | crate::Isa::Avx512) && vectors.step_stride == 1 && vectors.count > 1 {
        // SAFETY: `Isa::current` returns only what the processor was seen to have.
        return unsafe {
            match precision {
                Precision::F32 => turn_avx512::<false>(vectors, width, out),
                Precision::Bf16 => turn_avx512::<true>(vectors, width, out),
            }
        };
    }
    match precision {
        Precision::F32 => interleave_f32(isa, vectors, width, out),
        Precision::Bf16 => interleave_bf16(isa, vectors, width, out),
    }
}

multiversion! {
    /// Writes a row as pairs; an odd element at its end is paired with zero.
    fn pair_row(row: &[f32], out: &mut [f32]) {
        let (blocks, rest) = row.as_chunks::<{ 2 * BLOCK }>();
        let (outs, rest_out) = out.split_at_mut(blocks.len() * BLOCK);
        for (out, block) in outs.as_chunks_mut::<BLOCK>().0.iter_mut().zip(blocks) {
            *out = pair_block(block);
        }
        for (out, elements) in rest_out.iter_mut().zip(rest.chunks(2)) {
            *out = pair(elements[0], elements.get(1).copied().unwrap_or(0.0));
        }
    }
}

/// Packs the columns of `b` (at most [`PANEL`] of them) as one panel.
pub(crate) fn pack_panel(isa: crate::Isa, precision: Precision, b: Matrix<'_>, out: &mut [f32]) {
    let vectors = Vectors { data: b.data, count: b.cols, k: b.rows, stride: b.col_stride, step_stride: b.row_stride };
    write_steps(isa, precision, vectors, PANEL, out);
}

/// Writes the columns of `source` (`rows` neighbours each, one step or pair of steps after the other) as tiles of `height`
/// rows. Goes along each row of the source once, where [`interleave`] would come back for every tile.
#[inline(always)]
fn spread<const PAIRS: bool>(source: Vectors<'_>, height: usize, out: &mut [f32]) {
    /// Rows that are rounded before they go to their tiles; a multiple of every whole tile's height.
    const RUN: usize = 144;
    let Vectors { data, count, k, step_stride, .. } = source;
    let per_step = if PAIRS { 2 } else { 1 };
    let steps = k.div_ceil(per_step);
    let zeros = [0.0; RUN];
    let mut run = [0.0; RUN];
    let whole = RUN / height * height;
    for start in (0..count).step_by(whole) {
        let len = whole.min(count - start);
        let run = &mut run[..len];
        for step in 0..steps {
            let element = step * per_step;
            ask_ahead(data, element * step_stride + start, len, per_step, step_stride);
            let first = &data[element * step_stride + start..][..len];
            if PAIRS {
                let second = match element + 1 < k {
                    true => &data[(element + 1) * step_stride + start..][..len],
                    false => &zeros[..len],
                };
                for ((run, &first), &second) in run.iter_mut().zip(first).zip(second) {
                    *run = pair(first, second);
                }
            } else {
                run.copy_from_slice(first);
            }
            for (tile, rows) in run.chunks(height).enumerate() {
                let out = &mut out[(start + tile * height) * steps + step * rows.len()..][..rows.len()];
                // The usual height as a constant lets the copy become a few vector moves.
                match (out.first_chunk_mut::<12>(), rows.first_chunk::<12>()) {
                    (Some(out), Some(rows)) if height == 12 => *out = *rows,
                    _ => out.copy_from_slice(rows),
                }
            }
        }
    }
}

multiversion! {
    fn spread_f32(source: Vectors<'_>, height: usize, out: &mut [f32]) {
        spread::<false>(source, height, out);
    }
}

multiversion! {
    fn spread_bf16(source: Vectors<'_>, height: usize, out: &mut [f32]) {
        spread::<true>(source, height, out);
    }
}

/// Packs the rows of `a` as tiles of `height` rows, fewer in the last.
pub(crate) fn pack_tiles(isa: crate::Isa, precision: Precision, a: Matrix<'_>, height: usize, out: &mut [f32]) {
    let steps = steps(precision, a.cols);
    let vectors = |a| {
        let Matrix { data, rows, cols, row_stride, col_stride } = a;
        Vectors { data, count: rows, k: cols, stride: row_stride, step_stride: col_stride }
    };
    if a.row_stride == 1 {
        return match precision {
            Precision::F32 => spread_f32(isa, vectors(a), height, out),
            Precision::Bf16 => spread_bf16(isa, vectors(a), height, out),
        };
    }
    for row in (0..a.rows).step_by(height) {
        let count = height.min(a.rows - row);
        let tile = vectors(a.block(row, 0, count, a.cols));
        let out = &mut out[row * steps..][..count * steps];
        match precision {
            // Of one row there is nothing to interleave.
            Precision::Bf16 if count == 1 && a.col_stride == 1 => pair_row(isa, &tile.data[..a.cols], out),
            _ => write_steps(isa, precision, tile, count, out),
        }
    }
}
