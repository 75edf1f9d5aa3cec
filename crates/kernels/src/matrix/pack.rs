//! Operands in the order in which the inner loops read them, rounded to bfloat16 on the way if asked for.

use std::marker::PhantomData;

use crate::half::{bfloat16, widened};
use crate::isa::{Isa, multiversion};
use crate::matrix::kernel::{MOST_COLUMNS, Right, panel_width};
use crate::matrix::{Matrix, Precision};
use crate::simd::{Lines, pair_apart, pair_neighbours, prefetch, write_columns};

/// How packed operands hold the elements of the reduced index. A step of a product is one f32 of the left operand, and what it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    /// One element a step, in f32.
    Floats,
    /// Two bfloat16 a step on either side, for the instruction that multiplies pairs.
    Pairs,
    /// One bfloat16 a step, where there is no such instruction: the left operand's are widened already, as they meet many columns, and the
    /// right operand's as they are read. Of each pair the second comes first, as [`Precision::Bf16`] adds them.
    Halves,
    /// As [`Storage::Halves`], with the right operand's widened, too, when they are packed: twice the memory, and two instructions less for
    /// each vector.
    Widened,
}

impl Storage {
    /// What products of this precision are made of.
    pub(crate) fn of(isa: Isa, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::Floats,
            Precision::Bf16 if isa.multiplies_pairs() => Self::Pairs,
            Precision::Bf16 => Self::Halves,
        }
    }

    /// The same where the right operand is packed for one product, and found in a cache: with AVX2, instructions are dearer than bytes
    /// there.
    pub(crate) fn for_one_product(isa: Isa, precision: Precision) -> Self {
        match (isa, precision) {
            (Isa::Avx2, Precision::Bf16) => Self::Widened,
            _ => Self::of(isa, precision),
        }
    }

    /// The steps of `k` elements: the f32 that a row of a packed left operand takes.
    pub(crate) fn steps(self, k: usize) -> usize {
        match self {
            Self::Floats => Floats::places(k),
            Self::Pairs => Pairs::places(k),
            Self::Halves | Self::Widened => Swapped::<f32>::places(k),
        }
    }

    /// The elements of `steps` steps.
    pub(crate) fn elements(self, steps: usize) -> usize {
        if self == Self::Pairs { 2 * steps } else { steps }
    }

    /// The f32 that `steps` steps of a panel of `width` columns take.
    pub(crate) fn len(self, steps: usize, width: usize) -> usize {
        if self == Self::Halves { width * steps / 2 } else { width * steps }
    }

    /// Panels as the inner loops take them.
    pub(crate) fn right(self, panels: &[f32]) -> Right {
        match self {
            Self::Floats | Self::Widened => Right::Floats(panels.as_ptr()),
            Self::Pairs => Right::Pairs(panels.as_ptr()),
            Self::Halves => Right::Halves(panels.as_ptr().cast()),
        }
    }
}

/// The bfloat16 of panels that hold [`Storage::Halves`].
pub(crate) fn halves(panels: &mut [f32]) -> &mut [u16] {
    // SAFETY: an f32 is two u16, whatever they are, and lies where a u16 may.
    unsafe { std::slice::from_raw_parts_mut(panels.as_mut_ptr().cast(), 2 * panels.len()) }
}

/// Places that are handled at a time where a vector's elements are neighbours: those of a cache line.
const BLOCK: usize = Lines::FLOATS;

/// How elements are written: what goes to each of the places that follow each other.
trait Format {
    /// What stands in a place.
    type Place: Place;
    /// Elements that share a place.
    const ELEMENTS: usize;
    /// Places of `k` elements.
    #[inline(always)]
    fn places(k: usize) -> usize {
        k.div_ceil(Self::ELEMENTS)
    }
    /// The place where the elements from `Self::ELEMENTS * index` on go.
    #[inline(always)]
    fn place(index: usize) -> usize {
        index
    }
    /// What is written for an element and, if two share a place, the one after it.
    fn one(elements: [f32; 2]) -> Self::Place;
    /// [`Format::one`] for the elements of many vectors.
    #[inline(always)]
    fn each(first: &[f32], second: &[f32], out: &mut [Self::Place]) {
        for ((out, &first), &second) in out.iter_mut().zip(first).zip(second) {
            *out = Self::one([first, second]);
        }
    }
    /// What is written for neighbouring elements, a block of places from each of those that begin `stride` apart.
    fn blocks(source: &[f32], stride: usize, out: &mut [[Self::Place; BLOCK]]);
}

/// A block of each of as many vectors.
type Square<T> = [[T; BLOCK]; BLOCK];

/// What stands in a place.
trait Place: Copy + Default {
    /// A bfloat16, given by its bits.
    fn of(half: u16) -> Self;

    /// Writes the first `count` vectors side by side, their places `width` apart.
    #[inline(always)]
    fn write(_: Isa, square: &Square<Self>, count: usize, out: &mut [Self], width: usize) {
        write_apart(square, count, out, width);
    }
}

impl Place for u16 {
    #[inline(always)]
    fn of(half: u16) -> u16 {
        half
    }
}

impl Place for f32 {
    #[inline(always)]
    fn of(half: u16) -> f32 {
        widened(half)
    }
    #[inline(always)]
    fn write(isa: Isa, square: &Square<f32>, count: usize, out: &mut [f32], width: usize) {
        if !write_columns(isa, square, count, out, width) {
            write_apart(square, count, out, width);
        }
    }
}

/// [`Place::write`] number by number.
#[inline(always)]
fn write_apart<T: Copy>(square: &Square<T>, count: usize, out: &mut [T], width: usize) {
    // Distances that are constants need no arithmetic.
    match (count, width) {
        (16, 16) => write_apart_by(square, 16, out, 16),
        _ => write_apart_by(square, count, out, width),
    }
}

#[inline(always)]
fn write_apart_by<T: Copy>(square: &Square<T>, count: usize, out: &mut [T], width: usize) {
    for (i, vector) in square.iter().enumerate().take(count) {
        let out = &mut out[i..][..(BLOCK - 1) * width + 1];
        for (place, &value) in vector.iter().enumerate() {
            out[place * width] = value;
        }
    }
}

/// Elements as they are.
struct Floats;

impl Format for Floats {
    type Place = f32;
    const ELEMENTS: usize = 1;
    #[inline(always)]
    fn one([element, _]: [f32; 2]) -> f32 {
        element
    }
    #[inline(always)]
    fn blocks(source: &[f32], stride: usize, out: &mut [[f32; BLOCK]]) {
        for (out, source) in out.iter_mut().zip(source.chunks(stride)) {
            out.copy_from_slice(&source[..BLOCK]);
        }
    }
}

/// Pairs of bfloat16 in the place of an f32. The processor that multiplies them makes them, too, and takes subnormal numbers as zero then as
/// well.
struct Pairs;

impl Format for Pairs {
    type Place = f32;
    const ELEMENTS: usize = 2;
    #[inline(always)]
    fn one([first, second]: [f32; 2]) -> f32 {
        let half = |x: f32| u32::from(bfloat16(if x.is_subnormal() { 0.0f32.copysign(x) } else { x }));
        f32::from_bits(half(first) | half(second) << 16)
    }
    #[inline(always)]
    fn each(first: &[f32], second: &[f32], out: &mut [f32]) {
        // SAFETY: there are `Storage::Pairs` only where the processor has instructions for them.
        unsafe { pair_apart(first, second, out) };
    }
    #[inline(always)]
    fn blocks(source: &[f32], stride: usize, out: &mut [[f32; BLOCK]]) {
        // SAFETY: as above.
        unsafe { pair_neighbours(source, stride, out) };
    }
}

/// A bfloat16 in each place, as [`Storage::Halves`] has them on either side.
struct Swapped<T>(PhantomData<T>);

impl<T: Place> Format for Swapped<T> {
    type Place = T;
    const ELEMENTS: usize = 1;
    #[inline(always)]
    fn places(k: usize) -> usize {
        k.next_multiple_of(2)
    }
    #[inline(always)]
    fn place(index: usize) -> usize {
        index ^ 1
    }
    #[inline(always)]
    fn one([element, _]: [f32; 2]) -> T {
        T::of(bfloat16(element))
    }
    #[inline(always)]
    fn blocks(source: &[f32], stride: usize, out: &mut [[T; BLOCK]]) {
        for (out, source) in out.iter_mut().zip(source.chunks(stride)) {
            // A loop, because what `array::map` calls is not always inlined, and then compiled for the target's baseline; and an array of its
            // own, which the source cannot overlap, so that the loop runs in vectors.
            let mut halves = [T::default(); BLOCK];
            for (half, &element) in halves.iter_mut().zip(&source[..BLOCK]) {
                *half = T::of(bfloat16(element));
            }
            for pair in halves.as_chunks_mut::<2>().0 {
                pair.reverse();
            }
            *out = halves;
        }
    }
}

/// Places ahead for which sources are asked for whose elements lie apart: the processor sees no stream in a few lines of each row.
const PLACES_AHEAD: usize = 8;
/// Blocks of places ahead for which sources are asked for whose elements are neighbours.
const BLOCKS_AHEAD: usize = 2;

/// Asks for `count` elements of `data` from `start` on, which may lie beyond its end.
#[inline(always)]
fn ask_for(data: &[f32], start: usize, count: usize) {
    for line in (0..count).step_by(Lines::FLOATS) {
        prefetch(data.as_ptr().wrapping_add(start + line));
    }
}

/// Asks for what stands [`PLACES_AHEAD`] places behind the `count` elements at `start`; a place is `rows` rows, `stride` apart.
#[inline(always)]
fn ask_ahead(data: &[f32], start: usize, count: usize, rows: usize, stride: usize) {
    for row in PLACES_AHEAD * rows..(PLACES_AHEAD + 1) * rows {
        ask_for(data, start + row * stride, count);
    }
}

/// `count` vectors of length `k`: element `index` of vector `i` is `data[i * stride + index * element_stride]`.
#[derive(Clone, Copy)]
struct Vectors<'a> {
    data: &'a [f32],
    count: usize,
    k: usize,
    stride: usize,
    element_stride: usize,
}

impl<'a> Vectors<'a> {
    /// The rows of a matrix.
    fn rows(a: Matrix<'a>) -> Self {
        let Matrix { data, rows, cols, row_stride, col_stride } = a;
        Self { data, count: rows, k: cols, stride: row_stride, element_stride: col_stride }
    }

    /// An element, or zero beyond the end.
    #[inline(always)]
    fn at(&self, i: usize, index: usize) -> f32 {
        if index < self.k { self.data[i * self.stride + index * self.element_stride] } else { 0.0 }
    }
}

/// What is written side by side: `width` vectors, place by place, then the next.
#[derive(Clone, Copy)]
struct Groups {
    width: usize,
    /// Whether the last group is as wide as the others, with zeros beyond the last vector.
    filled: bool,
}

/// Writes vectors in groups.
#[inline(always)]
fn write_groups<F: Format>(isa: Isa, vectors: Vectors<'_>, groups: Groups, out: &mut [F::Place]) {
    let places = F::places(vectors.k);
    if places == 0 {
        return;
    }
    if vectors.stride == 1 {
        // The usual widths of panels and heights of tiles as constants let a group's copy become a few vector moves.
        return match (groups.filled, groups.width) {
            (true, 32) => spread::<F, 32>(vectors, groups, out),
            (true, 16) => spread::<F, 16>(vectors, groups, out),
            (false, 12) => spread::<F, 12>(vectors, groups, out),
            (false, 6) => spread::<F, 6>(vectors, groups, out),
            _ => spread::<F, 0>(vectors, groups, out),
        };
    }
    for first in (0..vectors.count).step_by(groups.width) {
        let count = groups.width.min(vectors.count - first);
        let group = Vectors { data: &vectors.data[first * vectors.stride..], count, ..vectors };
        let width = if groups.filled { groups.width } else { count };
        let out = &mut out[first * places..][..width * places];
        if count < width {
            out.fill(F::Place::default());
        }
        turn::<F>(isa, group, width, out);
    }
}

/// Writes vectors whose neighbours are neighbours. Goes along each row of elements once for several groups; `WIDTH` is that of the groups,
/// or zero.
#[inline(always)]
fn spread<F: Format, const WIDTH: usize>(vectors: Vectors<'_>, groups: Groups, out: &mut [F::Place]) {
    /// Elements of a row that are rounded before they go to their groups; a multiple of the height of every whole tile.
    const RUN: usize = 144;
    const { assert!(RUN >= MOST_COLUMNS) };
    let Vectors { data, count, k, element_stride, .. } = vectors;
    let width = if WIDTH > 0 { WIDTH } else { groups.width };
    let places = F::places(k);
    let zeros = [0.0; RUN];
    for start in (0..count).step_by(RUN / width * width) {
        let len = (RUN / width * width).min(count - start);
        let mut run = [F::Place::default(); RUN];
        let run = &mut run[..if groups.filled { len.next_multiple_of(width) } else { len }];
        for index in 0..places {
            let element = index * F::ELEMENTS;
            ask_ahead(data, element * element_stride + start, len, F::ELEMENTS, element_stride);
            let row = |element: usize| match element < k {
                true => &data[element * element_stride + start..][..len],
                false => &zeros[..len],
            };
            F::each(row(element), row(element + F::ELEMENTS - 1), &mut run[..len]);
            let whole = run.chunks_exact(width);
            let last = whole.remainder();
            for (group, from) in whole.enumerate() {
                let out = &mut out[(start + group * width) * places + F::place(index) * width..][..width];
                match (from.first_chunk::<WIDTH>(), out.first_chunk_mut::<WIDTH>()) {
                    (Some(from), Some(out)) if WIDTH > 0 => *out = *from,
                    _ => out.copy_from_slice(from),
                }
            }
            if !last.is_empty() {
                let out = &mut out[(start + run.len() - last.len()) * places + F::place(index) * last.len()..];
                out[..last.len()].copy_from_slice(last);
            }
        }
    }
}

/// Writes one group of vectors, `width` apart, whose neighbours lie apart.
#[inline(always)]
fn turn<F: Format>(isa: Isa, vectors: Vectors<'_>, width: usize, out: &mut [F::Place]) {
    let Vectors { data, count, k, element_stride, .. } = vectors;
    let whole = k / F::ELEMENTS;
    let mut done = 0;
    if element_stride == 1 {
        done = whole - whole % BLOCK;
        if width == 1 {
            // There is nothing to turn.
            F::blocks(data, BLOCK * F::ELEMENTS, out[..done].as_chunks_mut().0);
        } else {
            turn_blocks::<F>(isa, vectors, width, &mut out[..done * width]);
        }
    }
    for index in done..F::places(k) {
        for i in 0..count {
            let element = |offset| vectors.at(i, index * F::ELEMENTS + offset);
            out[F::place(index) * width + i] = F::one([element(0), element(F::ELEMENTS - 1)]);
        }
    }
}

/// Writes whole blocks of places: some of one vector at a time, as they share a cache line of the source, and the stores stay near.
#[inline(always)]
fn turn_blocks<F: Format>(isa: Isa, vectors: Vectors<'_>, width: usize, out: &mut [F::Place]) {
    let Vectors { data, count, stride, .. } = vectors;
    let mut square = [[F::Place::default(); BLOCK]; BLOCK];
    for (start, out) in out.chunks_exact_mut(BLOCK * width).enumerate() {
        for first in (0..count).step_by(BLOCK) {
            let here = BLOCK.min(count - first);
            let source = &data[first * stride + start * BLOCK * F::ELEMENTS..];
            for i in 0..here {
                ask_for(source, i * stride + BLOCKS_AHEAD * BLOCK * F::ELEMENTS, BLOCK * F::ELEMENTS);
            }
            F::blocks(source, stride, &mut square[..here]);
            F::Place::write(isa, &square, here, &mut out[first..], width);
        }
    }
}

multiversion! {
    fn write_panels(processor: Isa, storage: Storage, columns: Vectors<'_>, width: usize, out: &mut [f32]) {
        let groups = Groups { width, filled: true };
        match storage {
            Storage::Floats => write_groups::<Floats>(processor, columns, groups, out),
            Storage::Pairs => write_groups::<Pairs>(processor, columns, groups, out),
            Storage::Halves => write_groups::<Swapped<u16>>(processor, columns, groups, halves(out)),
            Storage::Widened => write_groups::<Swapped<f32>>(processor, columns, groups, out),
        }
    }
}

multiversion! {
    fn write_tiles(processor: Isa, storage: Storage, rows: Vectors<'_>, height: usize, out: &mut [f32]) {
        let groups = Groups { width: height, filled: false };
        match storage {
            Storage::Floats => write_groups::<Floats>(processor, rows, groups, out),
            Storage::Pairs => write_groups::<Pairs>(processor, rows, groups, out),
            Storage::Halves | Storage::Widened => write_groups::<Swapped<f32>>(processor, rows, groups, out),
        }
    }
}

/// Columns that are best packed at once: a whole number of panels, whatever their width, and of cache lines.
pub(crate) const TOGETHER: usize = 3 * MOST_COLUMNS;

/// Packs the columns of `b` as panels, the last filled up with zeros.
pub(crate) fn pack_panels(isa: Isa, storage: Storage, b: Matrix<'_>, out: &mut [f32]) {
    write_panels(isa, isa, storage, Vectors::rows(b.transposed()), panel_width(isa), out);
}

/// Packs the rows of `a` as tiles of `height` rows, fewer in the last.
pub(crate) fn pack_tiles(isa: Isa, storage: Storage, a: Matrix<'_>, height: usize, out: &mut [f32]) {
    write_tiles(isa, isa, storage, Vectors::rows(a), height, out);
}
