//! Operands in the order in which the inner loops read them, rounded to bfloat16 on the way if asked for.

use std::marker::PhantomData;

use crate::half::{bfloat16, widened};
use crate::isa::{Isa, multiversion};
use crate::matrix::kernel::{Right, panel_width};
use crate::matrix::{Matrix, Precision};
use crate::simd::{Lines, prefetch, write_columns};

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
    /// What is written for the first elements of `source`, place by place.
    fn block(source: &[f32]) -> [Self::Place; BLOCK];
}

/// As many blocks, of a vector each, as a block has places.
type Blocks<T> = [[T; BLOCK]; BLOCK];

/// What stands in a place.
trait Place: Copy + Default {
    /// A bfloat16, given by its bits.
    fn of(half: u16) -> Self;

    /// Writes the first `count` blocks side by side, their places `width` apart. `TURN` is for processors with AVX-512, which turn blocks
    /// in their registers.
    #[inline(always)]
    fn write<const TURN: bool>(blocks: &Blocks<Self>, count: usize, out: &mut [Self], width: usize) {
        write_apart(blocks, count, out, width);
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
    fn write<const TURN: bool>(blocks: &Blocks<f32>, count: usize, out: &mut [f32], width: usize) {
        if TURN {
            // SAFETY: `TURN` says that the processor can.
            return unsafe { write_columns(blocks, count, out, width) };
        }
        write_apart(blocks, count, out, width);
    }
}

/// [`Place::write`] number by number.
#[inline(always)]
fn write_apart<T: Copy>(blocks: &Blocks<T>, count: usize, out: &mut [T], width: usize) {
    for (i, block) in blocks.iter().enumerate().take(count) {
        let out = &mut out[i..][..(BLOCK - 1) * width + 1];
        for (place, &value) in block.iter().enumerate() {
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
    fn block(source: &[f32]) -> [f32; BLOCK] {
        *source.first_chunk().expect("a block of elements")
    }
}

/// Pairs of bfloat16 in the place of an f32.
struct Pairs;

impl Format for Pairs {
    type Place = f32;
    const ELEMENTS: usize = 2;
    #[inline(always)]
    fn one([first, second]: [f32; 2]) -> f32 {
        pair([bfloat16(first), bfloat16(second)])
    }
    /// All elements are rounded before they are paired: that way the loop runs in vectors.
    #[inline(always)]
    fn block(source: &[f32]) -> [f32; BLOCK] {
        let rounded: [u16; 2 * BLOCK] = rounded(source);
        let mut pairs = [0.0; BLOCK];
        for (to, &numbers) in pairs.iter_mut().zip(rounded.as_chunks::<2>().0) {
            *to = pair(numbers);
        }
        pairs
    }
}

/// Two bfloat16 in the place of an f32, the first in the low half.
#[inline(always)]
fn pair([first, second]: [u16; 2]) -> f32 {
    f32::from_bits(u32::from(first) | u32::from(second) << 16)
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
    fn block(source: &[f32]) -> [T; BLOCK] {
        let mut halves: [T; BLOCK] = rounded(source);
        for pair in halves.as_chunks_mut::<2>().0 {
            pair.reverse();
        }
        halves
    }
}

/// The first elements of `source` as bfloat16. A loop, because what `array::map` calls is not always inlined, and then compiled for the
/// target's baseline.
#[inline(always)]
fn rounded<T: Place, const COUNT: usize>(source: &[f32]) -> [T; COUNT] {
    let mut halves = [T::default(); COUNT];
    for (half, &element) in halves.iter_mut().zip(&source[..COUNT]) {
        *half = T::of(bfloat16(element));
    }
    halves
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

/// Writes `vectors` place by place, `width` of them in each.
#[inline(always)]
fn interleave<F: Format, const TURN: bool>(vectors: Vectors<'_>, width: usize, out: &mut [F::Place]) {
    let Vectors { data, count, k, stride, element_stride } = vectors;
    let (whole, places) = (k / F::ELEMENTS, F::places(k));
    let out = &mut out[..places * width];
    if count < width {
        out.fill(F::Place::default());
    }
    let mut done = 0;
    if stride == 1 {
        done = whole;
        for index in 0..done {
            let start = index * F::ELEMENTS * element_stride;
            ask_ahead(data, start, count, F::ELEMENTS, element_stride);
            let first = &data[start..][..count];
            let second = &data[start + (F::ELEMENTS - 1) * element_stride..][..count];
            let out = &mut out[F::place(index) * width..][..width];
            for ((out, &first), &second) in out.iter_mut().zip(first).zip(second) {
                *out = F::one([first, second]);
            }
        }
    } else if element_stride == 1 {
        // Some places of one vector at a time: they share a cache line of the source, and the stores stay near.
        done = whole - whole % BLOCK;
        for start in (0..done).step_by(BLOCK) {
            for first in (0..count).step_by(BLOCK) {
                let here = BLOCK.min(count - first);
                let mut blocks = [[F::Place::default(); BLOCK]; BLOCK];
                for (i, block) in blocks.iter_mut().enumerate().take(here) {
                    let source = &data[(first + i) * stride + start * F::ELEMENTS..];
                    ask_for(source, BLOCKS_AHEAD * BLOCK * F::ELEMENTS, BLOCK * F::ELEMENTS);
                    *block = F::block(source);
                }
                let out = &mut out[start * width + first..][..(BLOCK - 1) * width + here];
                F::Place::write::<TURN>(&blocks, here, out, width);
            }
        }
    }
    for index in done..places {
        for i in 0..count {
            let element = |offset| vectors.at(i, index * F::ELEMENTS + offset);
            out[F::place(index) * width + i] = F::one([element(0), element(F::ELEMENTS - 1)]);
        }
    }
}

/// [`interleave`] for any width.
#[inline(always)]
fn interleave_any<F: Format, const TURN: bool>(vectors: Vectors<'_>, width: usize, out: &mut [F::Place]) {
    // A panel's width as a constant lets its copies become plain vector moves.
    match width {
        32 if vectors.count == 32 => interleave::<F, TURN>(Vectors { count: 32, ..vectors }, 32, out),
        16 if vectors.count == 16 => interleave::<F, TURN>(Vectors { count: 16, ..vectors }, 16, out),
        _ => interleave::<F, TURN>(vectors, width, out),
    }
}

#[inline(always)]
fn panel<const TURN: bool>(storage: Storage, width: usize, columns: Vectors<'_>, out: &mut [f32]) {
    match storage {
        Storage::Floats => interleave_any::<Floats, TURN>(columns, width, out),
        Storage::Pairs => interleave_any::<Pairs, TURN>(columns, width, out),
        Storage::Halves => interleave_any::<Swapped<u16>, TURN>(columns, width, halves(out)),
        Storage::Widened => interleave_any::<Swapped<f32>, TURN>(columns, width, out),
    }
}

#[inline(always)]
fn tile<const TURN: bool>(storage: Storage, rows: Vectors<'_>, out: &mut [f32]) {
    let height = rows.count;
    match storage {
        Storage::Floats => interleave::<Floats, TURN>(rows, height, out),
        Storage::Pairs => interleave::<Pairs, TURN>(rows, height, out),
        Storage::Halves | Storage::Widened => interleave::<Swapped<f32>, TURN>(rows, height, out),
    }
}

multiversion! {
    fn panel_plain(storage: Storage, width: usize, columns: Vectors<'_>, out: &mut [f32]) {
        panel::<false>(storage, width, columns, out);
    }
}

multiversion! {
    fn tile_plain(storage: Storage, rows: Vectors<'_>, out: &mut [f32]) {
        tile::<false>(storage, rows, out);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn panel_turning(storage: Storage, width: usize, columns: Vectors<'_>, out: &mut [f32]) {
    panel::<true>(storage, width, columns, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn tile_turning(storage: Storage, rows: Vectors<'_>, out: &mut [f32]) {
    tile::<true>(storage, rows, out);
}

/// Whether to turn blocks in registers: where that can be done, and vectors are neighbouring elements.
#[cfg(target_arch = "x86_64")]
fn turns(isa: Isa, vectors: Vectors<'_>) -> bool {
    matches!(isa, Isa::Avx512Bf16 | Isa::Avx512) && vectors.element_stride == 1 && vectors.count > 1
}

/// Packs the columns of `b` (at most [`panel_width`]) as one panel.
pub(crate) fn pack_panel(isa: Isa, storage: Storage, b: Matrix<'_>, out: &mut [f32]) {
    let (width, columns) = (panel_width(isa), Vectors::rows(b.transposed()));
    #[cfg(target_arch = "x86_64")]
    if turns(isa, columns) {
        // SAFETY: `Isa::current` returns only what the processor was seen to have.
        return unsafe { panel_turning(storage, width, columns, out) };
    }
    panel_plain(isa, storage, width, columns, out);
}

/// Writes one vector of neighbouring elements.
#[inline(always)]
fn write_row<F: Format>(row: &[f32], out: &mut [F::Place]) {
    let (blocks, rest) = row.split_at(row.len() - row.len() % (BLOCK * F::ELEMENTS));
    let (outs, rest_out) = out.split_at_mut(blocks.len() / F::ELEMENTS);
    for (out, block) in outs.as_chunks_mut::<BLOCK>().0.iter_mut().zip(blocks.chunks_exact(BLOCK * F::ELEMENTS)) {
        *out = F::block(block);
    }
    let element = |index: usize| rest.get(index).copied().unwrap_or(0.0);
    for index in 0..F::places(rest.len()) {
        rest_out[F::place(index)] = F::one([element(index * F::ELEMENTS), element((index + 1) * F::ELEMENTS - 1)]);
    }
}

multiversion! {
    /// A tile of one row of neighbouring elements, in which there is nothing to interleave.
    fn row(storage: Storage, row: &[f32], out: &mut [f32]) {
        match storage {
            Storage::Floats => write_row::<Floats>(row, out),
            Storage::Pairs => write_row::<Pairs>(row, out),
            Storage::Halves | Storage::Widened => write_row::<Swapped<f32>>(row, out),
        }
    }
}

/// Writes rows whose neighbours are neighbours as tiles of `height`. Goes along each column once, where [`interleave`] would come back for
/// every tile.
#[inline(always)]
fn spread<F: Format<Place = f32>>(rows: Vectors<'_>, height: usize, out: &mut [f32]) {
    /// Rows that are rounded before they go to their tiles; a multiple of every whole tile's height.
    const RUN: usize = 144;
    let Vectors { data, count, k, element_stride, .. } = rows;
    let places = F::places(k);
    let zeros = [0.0; RUN];
    let mut run = [0.0; RUN];
    let whole = RUN / height * height;
    for start in (0..count).step_by(whole) {
        let len = whole.min(count - start);
        let run = &mut run[..len];
        for index in 0..places {
            let element = index * F::ELEMENTS;
            ask_ahead(data, element * element_stride + start, len, F::ELEMENTS, element_stride);
            let column = |element: usize| match element < k {
                true => &data[element * element_stride + start..][..len],
                false => &zeros[..len],
            };
            let second = column(element + F::ELEMENTS - 1);
            for ((run, &first), &second) in run.iter_mut().zip(column(element)).zip(second) {
                *run = F::one([first, second]);
            }
            for (tile, rows) in run.chunks(height).enumerate() {
                let out = &mut out[(start + tile * height) * places + F::place(index) * rows.len()..][..rows.len()];
                // The usual heights as constants let the copy become a few vector moves.
                match rows.len() {
                    12 => copy::<12>(rows, out),
                    6 => copy::<6>(rows, out),
                    _ => out.copy_from_slice(rows),
                }
            }
        }
    }
}

#[inline(always)]
fn copy<const COUNT: usize>(from: &[f32], to: &mut [f32]) {
    if let (Some(from), Some(to)) = (from.first_chunk::<COUNT>(), to.first_chunk_mut::<COUNT>()) {
        *to = *from;
    }
}

multiversion! {
    fn spread_tiles(storage: Storage, rows: Vectors<'_>, height: usize, out: &mut [f32]) {
        match storage {
            Storage::Floats => spread::<Floats>(rows, height, out),
            Storage::Pairs => spread::<Pairs>(rows, height, out),
            Storage::Halves | Storage::Widened => spread::<Swapped<f32>>(rows, height, out),
        }
    }
}

/// Packs the rows of `a` as tiles of `height` rows, fewer in the last.
pub(crate) fn pack_tiles(isa: Isa, storage: Storage, a: Matrix<'_>, height: usize, out: &mut [f32]) {
    if a.row_stride == 1 {
        return spread_tiles(isa, storage, Vectors::rows(a), height, out);
    }
    let steps = storage.steps(a.cols);
    for first in (0..a.rows).step_by(height) {
        let rows = Vectors::rows(a.block(first, 0, height.min(a.rows - first), a.cols));
        let out = &mut out[first * steps..][..rows.count * steps];
        if rows.count == 1 && rows.element_stride == 1 {
            row(isa, storage, &rows.data[..rows.k], out);
            continue;
        }
        #[cfg(target_arch = "x86_64")]
        if turns(isa, rows) {
            // SAFETY: `Isa::current` returns only what the processor was seen to have.
            unsafe { tile_turning(storage, rows, out) };
            continue;
        }
        tile_plain(isa, storage, rows, out);
    }
}
