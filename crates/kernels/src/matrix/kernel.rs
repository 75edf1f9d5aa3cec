//! The inner loops of every matrix product: tiles of the result in registers, on one thread.
//!
//! A tile starts from what the destination holds (or zero) and runs one chain of multiply-adds for each of its elements
//! over the reduced index, so that a product cut anywhere along that index is the same product.

use std::sync::atomic::{Ordering, compiler_fence};

use crate::isa::Isa;
use crate::simd::{Lines, Portable, Simd, prefetch};

/// Columns of the widest panel of any instruction set: a whole number of panels of each.
pub(crate) const MOST_COLUMNS: usize = 32;
/// Rows of the largest tile of any instruction set.
const MOST_ROWS: usize = 12;

/// How the left operand lies in memory. A step is one f32: an element of the reduced index, or a pair of bfloat16.
#[derive(Clone, Copy)]
pub(crate) enum Left {
    /// Tiles of `height` rows (fewer in the last) one after the other, each step by step. The right operand is then packed, too:
    /// its steps are one panel's width apart.
    Tiles { height: usize },
    /// Rows `stride` apart, with neighbouring steps.
    Rows { stride: usize },
    /// Steps `stride` apart, with neighbouring rows; for a right operand in f32.
    Steps { stride: usize },
}

/// Where the right operand lies in memory, and what its numbers are.
#[derive(Clone, Copy)]
pub(crate) enum Right {
    /// f32, as those of the left operand.
    Floats(*const f32),
    /// Pairs of bfloat16 in the place of f32, as those of the left operand.
    Pairs(*const f32),
    /// bfloat16, widened as they are read; the left operand is f32.
    Halves(*const u16),
}

/// What the sums of a product start from.
#[derive(Clone, Copy)]
pub(crate) enum Start {
    /// Zero.
    Zero,
    /// What the destination holds.
    Held,
    /// Other rows, `stride` apart.
    Rows { from: *const f32, stride: usize },
}

/// One product `c = start + a b` of `rows x steps` and `steps x columns`.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub rows: usize,
    pub columns: usize,
    /// Elements of the reduced index, or pairs of bfloat16.
    pub steps: usize,
    pub a: *const f32,
    pub left: Left,
    pub b: Right,
    /// Distance between neighbouring panels of `b`.
    pub panel_stride: usize,
    /// Distance between neighbouring steps inside a panel of `b`.
    pub step_stride: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    pub start: Start,
    pub hints: Hints,
}

/// What the caches are to hold during and after a product; no bit depends on it.
#[derive(Clone, Copy)]
pub(crate) struct Hints {
    /// Whether to write past the caches, where `c` lies at cache lines: for results too large to be found in a cache again. What is
    /// written is there for other threads after [`crate::simd::fence`].
    pub past_caches: bool,
    /// What will be wanted after this product, to be asked for while few rows are multiplied.
    pub ahead: Lines,
}

impl Hints {
    /// Nothing out of the ordinary.
    pub(crate) const NONE: Self = Self { past_caches: false, ahead: Lines::NONE };
}

/// A number of the right operand.
trait Number: Copy {
    /// The numbers at `from`.
    ///
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::Vector;

    /// `left * right + sum`.
    ///
    /// # Safety
    /// As [`Simd::multiply_add`].
    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(left: S::Vector, right: S::Vector, sum: S::Vector) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::multiply_add(left, right, sum) }
    }
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f32) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::load(from) }
    }
}

impl Number for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u16) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::widen(from) }
    }
}

/// Two bfloat16 in the place of an f32.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Pair(f32);

impl Number for Pair {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Pair) -> S::Vector {
        // SAFETY: the caller's promise; a pair lies where an f32 would.
        unsafe { S::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(left: S::Vector, right: S::Vector, sum: S::Vector) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::multiply_add_pairs(left, right, sum) }
    }
}

/// How far ahead to ask for steps that are apart.
const STEPS_AHEAD: usize = 16;

/// What a tile asks for while it computes: `lines` cache lines a step, at most [`most_lines`], `stride` f32 further in each step.
///
/// Few rows leave the processor waiting for the right operand, which comes from memory: it has no time to come in between
/// the panel's few tiles. So the first tiles of a panel ask for one line each in every step, until that is the next one, where panels lie
/// one after the other; and a panel's only tile asks for what comes after the product, if there is something, before its own next panel.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const f32,
    lines: usize,
    stride: usize,
}

impl Ahead {
    fn of<S: Simd, N: Number>(product: &Product, b: *const N, panel: usize, row: usize, height: usize) -> Self {
        let next = b.wrapping_add((panel + 1) * product.panel_stride).cast::<f32>();
        // Those of a panel in one step, at least one, and the f32 of each that belong to the step.
        let lines = (columns::<S>() * size_of::<N>()).div_ceil(Lines::BYTES);
        let floats = columns::<S>() * size_of::<N>() / size_of::<f32>() / lines;
        let neighbours = |from, lines| Self { from, lines, stride: lines * floats };
        let lone = product.rows <= height;
        let apart = product.step_stride > columns::<S>();
        let (after, share) =
            product.hints.ahead.share(panel * product.steps, product.columns.div_ceil(columns::<S>()) * product.steps);
        match row / height {
            0 if lone && share > 0 => {
                let lines = share.min(most_lines::<S>());
                Self { from: after, lines, stride: lines * Lines::FLOATS }
            }
            // Steps that are apart hold all panels: each asks for its own columns of the steps that follow.
            0 if lone && apart => {
                let from = b.wrapping_add(panel * product.panel_stride + STEPS_AHEAD * product.step_stride).cast();
                Self { from, lines, stride: product.step_stride * size_of::<N>() / size_of::<f32>() }
            }
            _ if apart => neighbours(next, 0),
            0 if lone => neighbours(next, lines),
            tile if tile < lines => neighbours(next.wrapping_add(tile * product.steps * Lines::FLOATS), 1),
            _ => neighbours(next, 0),
        }
    }
}

/// Rows and columns of the largest tile.
fn largest_tile(isa: Isa) -> (usize, usize) {
    const fn of<S: Simd>() -> (usize, usize) {
        (S::ROWS, columns::<S>())
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 | Isa::Avx512 => of::<crate::simd::Avx512>(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => of::<crate::simd::Avx2>(),
        _ => of::<Portable>(),
    }
}

/// Columns of a panel, which is as wide as a tile: the right operand is stored as panels of this many columns, one step of the
/// reduced index after the other. All rows meet a panel before the next one is read.
pub(crate) fn panel_width(isa: Isa) -> usize {
    largest_tile(isa).1
}

/// Columns of a tile.
const fn columns<S: Simd>() -> usize {
    2 * S::LANES
}

/// Cache lines that a tile asks for in a step: what a step of f32 in one panel takes, if that is a line.
const fn most_lines<S: Simd>() -> usize {
    columns::<S>() * size_of::<f32>() / Lines::BYTES
}

/// The tile height for a left operand of `rows` packed rows: all tiles but the last alike, and none nearly empty.
pub(crate) fn tile_height(isa: Isa, rows: usize) -> usize {
    even_height(rows, largest_tile(isa).0)
}

/// The height of tiles of at most `most` rows that share `rows` out evenly.
fn even_height(rows: usize, most: usize) -> usize {
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

/// Computes `product`.
///
/// # Safety
/// `isa` must be available. `a` must be readable in the layout `left` says, `b` for whole panels (even where fewer of their
/// columns are used), and `c` writable, by nobody else.
pub(crate) unsafe fn multiply(isa: Isa, product: Product) {
    // SAFETY: the caller's promises are those that the instantiations ask for.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => multiply_avx512bf16(product),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => multiply_avx512(product),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => multiply_avx2(product),
            _ => panels::<Portable>(product),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn multiply_avx512bf16(product: Product) {
    // SAFETY: see `multiply`.
    unsafe { panels::<crate::simd::Avx512Bf16>(product) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn multiply_avx512(product: Product) {
    // SAFETY: see `multiply`.
    unsafe { panels::<crate::simd::Avx512>(product) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_avx2(product: Product) {
    // SAFETY: see `multiply`.
    unsafe { panels::<crate::simd::Avx2>(product) }
}

#[inline(always)]
unsafe fn panels<S: Simd>(product: Product) {
    // SAFETY: see `multiply`.
    unsafe {
        match (product.left, product.b) {
            (Left::Tiles { .. }, _) => numbers::<S, Tiles>(product),
            (Left::Rows { .. }, _) => numbers::<S, Rows>(product),
            (Left::Steps { .. }, Right::Floats(b)) => tiles::<S, f32, Steps>(product, b),
            (Left::Steps { .. }, _) => unreachable!("steps that are apart meet f32 alone"),
        }
    }
}

#[inline(always)]
unsafe fn numbers<S: Simd, O: Order>(product: Product) {
    // SAFETY: see `multiply`.
    unsafe {
        match product.b {
            Right::Floats(b) => tiles::<S, f32, O>(product, b),
            Right::Halves(b) => tiles::<S, u16, O>(product, b),
            Right::Pairs(b) if S::PAIRS => tiles::<S, Pair, O>(product, b.cast()),
            Right::Pairs(_) => unreachable!("operands are packed as pairs only where an instruction multiplies them"),
        }
    }
}

/// How far apart things are that a tile reads.
#[derive(Clone, Copy)]
struct Strides {
    /// Rows of the left operand.
    row: usize,
    /// Steps of the left operand.
    left: usize,
    /// Steps of the right operand.
    right: usize,
}

/// [`Left`], where the inner loops are compiled for it.
trait Order {
    /// Rows of the largest tile, at most.
    const MOST_ROWS: usize = MOST_ROWS;
    /// The distances in a tile of `rows`; where they can be, they are constants.
    fn strides<S: Simd>(rows: usize, left: usize, right: usize) -> Strides;
}

/// [`Left::Tiles`].
struct Tiles;
/// [`Left::Rows`].
struct Rows;
/// [`Left::Steps`].
struct Steps;

impl Order for Tiles {
    #[inline(always)]
    fn strides<S: Simd>(rows: usize, _: usize, _: usize) -> Strides {
        Strides { row: 1, left: rows, right: columns::<S>() }
    }
}

impl Order for Rows {
    // Each row needs an address; those of more would not stay in registers.
    const MOST_ROWS: usize = 8;
    #[inline(always)]
    fn strides<S: Simd>(_: usize, left: usize, right: usize) -> Strides {
        Strides { row: left, left: 1, right }
    }
}

impl Order for Steps {
    #[inline(always)]
    fn strides<S: Simd>(_: usize, left: usize, right: usize) -> Strides {
        Strides { row: 1, left, right }
    }
}

/// Rows of the largest tile.
const fn most_rows<S: Simd, O: Order>() -> usize {
    if S::ROWS > O::MOST_ROWS { O::MOST_ROWS } else { S::ROWS }
}

#[inline(always)]
unsafe fn tiles<S: Simd, N: Number, O: Order>(product: Product, b: *const N) {
    let p = product;
    let height = match p.left {
        Left::Tiles { height } => height,
        Left::Rows { .. } | Left::Steps { .. } => even_height(p.rows, most_rows::<S, O>()),
    };
    // Then every row of every tile lies at a vector's address.
    let at_lines = p.c.addr().is_multiple_of(Lines::BYTES) && p.c_stride.is_multiple_of(Lines::FLOATS);
    let past_caches = p.hints.past_caches && at_lines;
    for (panel, column) in (0..p.columns).step_by(columns::<S>()).enumerate() {
        for row in (0..p.rows).step_by(height) {
            let rows = height.min(p.rows - row);
            let ahead = Ahead::of::<S, N>(&p, b, panel, row, height);
            // SAFETY: see `multiply`; every tile lies inside the product.
            unsafe {
                let (a, stride) = match p.left {
                    Left::Tiles { .. } => (p.a.add(row * p.steps), 0),
                    Left::Rows { stride } => (p.a.add(row * stride), stride),
                    Left::Steps { stride } => (p.a.add(row), stride),
                };
                let b = b.add(panel * p.panel_stride);
                let to = p.c.add(row * p.c_stride + column);
                let (start, start_stride) = match p.start {
                    Start::Zero => (std::ptr::null(), 0),
                    Start::Held => (to.cast_const(), p.c_stride),
                    Start::Rows { from, stride } => (from.add(row * stride + column), stride),
                };
                let here = columns::<S>().min(p.columns - column);
                let target = Target { start, start_stride, to, stride: p.c_stride, past_caches };
                let operands = Operands { steps: p.steps, a, left_stride: stride, b, right_stride: p.step_stride };
                if here == columns::<S>() {
                    tile_of::<S, N, O>(rows, operands, ahead, target);
                } else {
                    let mut whole = [0.0f32; MOST_ROWS * MOST_COLUMNS];
                    let held = whole.as_mut_ptr();
                    for i in 0..if start.is_null() { 0 } else { rows } {
                        std::ptr::copy_nonoverlapping(start.add(i * start_stride), held.add(i * MOST_COLUMNS), here);
                    }
                    let aside = Target {
                        start: held,
                        start_stride: MOST_COLUMNS,
                        to: held,
                        stride: MOST_COLUMNS,
                        past_caches: false,
                    };
                    tile_of::<S, N, O>(rows, operands, ahead, aside);
                    for i in 0..rows {
                        std::ptr::copy_nonoverlapping(held.add(i * MOST_COLUMNS), to.add(i * p.c_stride), here);
                    }
                }
            }
        }
    }
}

/// Where a tile's sums start and where they go.
#[derive(Clone, Copy)]
struct Target {
    /// Null for sums that start from zero.
    start: *const f32,
    start_stride: usize,
    to: *mut f32,
    stride: usize,
    /// Every row of `to` then lies at a vector's address.
    past_caches: bool,
}

/// What a tile multiplies.
#[derive(Clone, Copy)]
struct Operands<N> {
    steps: usize,
    a: *const f32,
    /// As [`Left`] has it.
    left_stride: usize,
    b: *const N,
    right_stride: usize,
}

/// A tile of `rows`.
#[inline(always)]
unsafe fn tile_of<S: Simd, N: Number, O: Order>(rows: usize, operands: Operands<N>, ahead: Ahead, target: Target) {
    macro_rules! with_rows {
        ($($count:literal)*) => {
            match rows {
                // SAFETY: see `multiply`.
                $($count if $count <= most_rows::<S, O>() => unsafe {
                    // What an instruction set never asks for is not compiled for it.
                    match ahead.lines {
                        1 if most_lines::<S>() >= 1 => tile::<S, N, O, $count, 1>(operands, ahead, target),
                        2 if most_lines::<S>() >= 2 => tile::<S, N, O, $count, 2>(operands, ahead, target),
                        _ => tile::<S, N, O, $count, 0>(operands, ahead, target),
                    }
                })*
                _ => unreachable!("tiles are at most as high as the registers allow"),
            }
        };
    }
    with_rows!(1 2 3 4 5 6 7 8 9 10 11 12);
}

#[inline(always)]
unsafe fn tile<S: Simd, N: Number, O: Order, const ROWS: usize, const LINES: usize>(
    operands: Operands<N>,
    mut ahead: Ahead,
    target: Target,
) {
    // SAFETY: see `multiply`.
    unsafe {
        let Operands { steps, mut a, mut b, .. } = operands;
        let strides = O::strides::<S>(ROWS, operands.left_stride, operands.right_stride);
        let Target { start, start_stride, to, stride, past_caches } = target;
        let mut sums = [[S::zero(); 2]; ROWS];
        if !start.is_null() {
            for (i, sums) in sums.iter_mut().enumerate() {
                let start = start.add(i * start_stride);
                *sums = [S::load(start), S::load(start.add(S::LANES))];
            }
        }
        if S::STEPS > 1 {
            keep_place();
        }
        // Counting and moving on are instructions, too: where a core runs short of them, several steps share them.
        for _ in 0..steps / S::STEPS {
            for step in 0..S::STEPS {
                add_step::<S, N, ROWS, LINES>(&mut sums, step, a, b, strides, ahead);
                if S::STEPS > 1 {
                    // Or the compiler begins by reading what all of them need, and has no registers for it.
                    compiler_fence(Ordering::SeqCst);
                }
            }
            a = a.wrapping_add(S::STEPS * strides.left);
            b = b.wrapping_add(S::STEPS * strides.right);
            ahead.from = ahead.from.wrapping_add(S::STEPS * ahead.stride);
        }
        for step in 0..steps % S::STEPS {
            add_step::<S, N, ROWS, LINES>(&mut sums, step, a, b, strides, ahead);
        }
        for (i, sums) in sums.iter().enumerate() {
            let to = to.add(i * stride);
            if past_caches {
                S::stream(to, sums[0]);
                S::stream(to.add(S::LANES), sums[1]);
            } else {
                S::store(to, sums[0]);
                S::store(to.add(S::LANES), sums[1]);
            }
        }
    }
}

/// Lets the loop that follows lie at the same distance from a cache line in every program: where its instructions begin and end in their lines
/// is worth some hundredths of its speed.
#[inline(always)]
fn keep_place() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: some instructions that do nothing.
    unsafe {
        std::arch::asm!(".p2align 6", options(nomem, nostack, preserves_flags));
    }
}

/// Adds the products of one step to the sums of a tile.
#[inline(always)]
unsafe fn add_step<S: Simd, N: Number, const ROWS: usize, const LINES: usize>(
    sums: &mut [[S::Vector; 2]; ROWS],
    step: usize,
    a: *const f32,
    b: *const N,
    strides: Strides,
    ahead: Ahead,
) {
    // SAFETY: see `multiply`.
    unsafe {
        let b = b.add(step * strides.right);
        let right = [N::load::<S>(b), N::load::<S>(b.add(S::LANES))];
        for line in 0..LINES {
            prefetch(ahead.from.wrapping_add(step * ahead.stride + line * Lines::FLOATS));
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            let left = S::splat(a.add(i * strides.row + step * strides.left));
            for (sum, &right) in sums.iter_mut().zip(&right) {
                *sum = N::multiply_add::<S>(left, right, *sum);
            }
        }
    }
}
