//! The inner loops of every matrix product: tiles of the result in registers, on one thread.
//!
//! A tile starts from what the destination holds (or zero) and runs one chain of multiply-adds for each of its elements
//! over the reduced index, so that a product cut anywhere along that index is the same product.

use crate::isa::Isa;
use crate::simd::{Lines, Portable, Simd, prefetch};

/// Columns of a panel: the right operand is stored as panels of this many columns, one step of the reduced index after
/// the other.
pub(crate) const PANEL: usize = 32;
/// Rows of the largest tile of any instruction set.
const MAX_ROWS: usize = 12;

/// How the left operand lies in memory. A step is one f32: an element of the reduced index, or a pair of bfloat16.
#[derive(Clone, Copy)]
pub(crate) enum Left {
    /// Tiles of `height` rows (fewer in the last) one after the other, each step by step.
    Tiles { height: usize },
    /// Rows `stride` apart, with neighbouring steps.
    Rows { stride: usize },
    /// Steps `stride` apart, with neighbouring rows.
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

/// What a tile asks for while it computes: `lines` cache lines a step, at most two, `stride` f32 further in each step.
///
/// Few rows leave the processor waiting for the right operand, which comes from memory: it has no time to come in between
/// the panel's few tiles. So the first two tiles of a panel ask for one half each of the next one, where panels lie one after
/// the other; and a panel's only tile asks for what comes after the product, if there is something, before its own next panel.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const f32,
    lines: usize,
    stride: usize,
}

impl Ahead {
    fn of<N: Number>(product: &Product, b: *const N, panel: usize, row: usize, height: usize) -> Self {
        let next = b.wrapping_add((panel + 1) * product.panel_stride).cast::<f32>();
        // Those of a panel in one step.
        let lines = (PANEL * size_of::<N>()).div_ceil(Lines::BYTES);
        let neighbours = |from, lines| Self { from, lines, stride: lines * Lines::FLOATS };
        let lone = product.rows <= height;
        let (after, share) =
            product.hints.ahead.share(panel * product.steps, product.columns.div_ceil(PANEL) * product.steps);
        match row / height {
            0 if lone && share > 0 => neighbours(after, share.min(2)),
            // Steps that are apart hold all panels: each asks for its own columns of the steps that follow.
            0 if lone && product.step_stride > PANEL => {
                let from = b.wrapping_add(panel * product.panel_stride + STEPS_AHEAD * product.step_stride).cast();
                Self { from, lines, stride: product.step_stride * size_of::<N>() / size_of::<f32>() }
            }
            _ if product.step_stride > PANEL => neighbours(next, 0),
            0 if lone => neighbours(next, lines),
            tile if tile < lines => neighbours(next.wrapping_add(tile * product.steps * Lines::FLOATS), 1),
            _ => neighbours(next, 0),
        }
    }
}

/// The tile height for a left operand of `rows` packed rows: all tiles but the last alike, and none nearly empty.
pub(crate) fn tile_height(isa: Isa, rows: usize) -> usize {
    let most = match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 | Isa::Avx512 => crate::simd::Avx512::ROWS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => crate::simd::Avx2::ROWS,
        _ => Portable::ROWS,
    };
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

/// Computes `product`.
///
/// # Safety
/// `isa` must be available. `a` must be readable in the layout `left` says, `b` for whole panels (`PANEL` columns even
/// where fewer are used), and `c` writable, by nobody else.
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
    // SAFETY: see `multiply`; every tile lies inside the product.
    unsafe {
        match (product.b, product.left) {
            (Right::Floats(b), Left::Rows { .. }) => tiles::<S, f32, true>(product, b),
            (Right::Floats(b), _) => tiles::<S, f32, false>(product, b),
            (Right::Pairs(b), Left::Rows { .. }) if S::PAIRS => tiles::<S, Pair, true>(product, b.cast()),
            (Right::Pairs(b), _) if S::PAIRS => tiles::<S, Pair, false>(product, b.cast()),
            (Right::Pairs(_), _) => {
                unreachable!("operands are packed as pairs only where an instruction multiplies them")
            }
            (Right::Halves(b), Left::Rows { .. }) => tiles::<S, u16, true>(product, b),
            (Right::Halves(b), _) => tiles::<S, u16, false>(product, b),
        }
    }
}

/// Rows of the largest tile. Rows that are apart need an address each; more than eight would not stay in registers.
const fn most_rows<S: Simd>(by_rows: bool) -> usize {
    if by_rows && S::ROWS > 8 { 8 } else { S::ROWS }
}

#[inline(always)]
unsafe fn tiles<S: Simd, N: Number, const BY_ROWS: bool>(product: Product, b: *const N) {
    let p = product;
    let height = match p.left {
        Left::Tiles { height } => height,
        Left::Rows { .. } | Left::Steps { .. } => {
            p.rows.div_ceil(p.rows.div_ceil(most_rows::<S>(BY_ROWS)).max(1)).max(1)
        }
    };
    // Then every row of every tile lies at cache lines, as panels are two of them wide at least.
    let at_lines = p.c.addr().is_multiple_of(Lines::BYTES) && p.c_stride.is_multiple_of(Lines::FLOATS);
    let past_caches = p.hints.past_caches && at_lines;
    for (panel, column) in (0..p.columns).step_by(PANEL).enumerate() {
        for row in (0..p.rows).step_by(height) {
            let rows = height.min(p.rows - row);
            let ahead = Ahead::of(&p, b, panel, row, height);
            // SAFETY: see `multiply`.
            unsafe {
                let (a, a_stride) = match p.left {
                    Left::Tiles { .. } => (p.a.add(row * p.steps), rows),
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
                let columns = PANEL.min(p.columns - column);
                let target = Target { start, start_stride, to, stride: p.c_stride, past_caches };
                if columns == PANEL {
                    slabs::<S, N, BY_ROWS>(rows, p.steps, a, a_stride, b, p.step_stride, ahead, target);
                } else {
                    let mut whole = [0.0f32; MAX_ROWS * PANEL];
                    let held = whole.as_mut_ptr();
                    for i in 0..if start.is_null() { 0 } else { rows } {
                        std::ptr::copy_nonoverlapping(start.add(i * start_stride), held.add(i * PANEL), columns);
                    }
                    let aside =
                        Target { start: held, start_stride: PANEL, to: held, stride: PANEL, past_caches: false };
                    slabs::<S, N, BY_ROWS>(rows, p.steps, a, a_stride, b, p.step_stride, ahead, aside);
                    for i in 0..rows {
                        std::ptr::copy_nonoverlapping(held.add(i * PANEL), to.add(i * p.c_stride), columns);
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

impl Target {
    /// The same from `column` on.
    fn at_column(self, column: usize) -> Self {
        let start = if self.start.is_null() { self.start } else { self.start.wrapping_add(column) };
        Self { start, to: self.to.wrapping_add(column), ..self }
    }
}

/// A tile as wide as a panel: two vectors at a time.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "two operands, each an address and strides, and where to go ahead")]
unsafe fn slabs<S: Simd, N: Number, const BY_ROWS: bool>(
    rows: usize,
    steps: usize,
    a: *const f32,
    a_stride: usize,
    b: *const N,
    b_stride: usize,
    ahead: Ahead,
    target: Target,
) {
    macro_rules! with_rows {
        ($($count:literal)*) => {
            match rows {
                $($count if $count <= most_rows::<S>(BY_ROWS) => {
                    let mut column = 0;
                    while column < PANEL {
                        let (b, target) = (b.wrapping_add(column), target.at_column(column));
                        // SAFETY: see `multiply`.
                        unsafe {
                            match ahead.lines {
                                0 => tile::<S, N, $count, BY_ROWS, 0>(steps, a, a_stride, b, b_stride, ahead, target),
                                1 => tile::<S, N, $count, BY_ROWS, 1>(steps, a, a_stride, b, b_stride, ahead, target),
                                _ => tile::<S, N, $count, BY_ROWS, 2>(steps, a, a_stride, b, b_stride, ahead, target),
                            }
                        }
                        column += 2 * S::LANES;
                    }
                })*
                _ => unreachable!("tiles are at most as high as the registers allow"),
            }
        };
    }
    with_rows!(1 2 3 4 5 6 7 8 9 10 11 12);
}

#[inline(always)]
unsafe fn tile<S: Simd, N: Number, const ROWS: usize, const BY_ROWS: bool, const LINES: usize>(
    steps: usize,
    a: *const f32,
    a_stride: usize,
    b: *const N,
    b_stride: usize,
    ahead: Ahead,
    target: Target,
) {
    // SAFETY: see `multiply`.
    unsafe {
        let Target { start, start_stride, to, stride, past_caches } = target;
        let mut sums = [[S::zero(); 2]; ROWS];
        if !start.is_null() {
            for (i, sums) in sums.iter_mut().enumerate() {
                let start = start.add(i * start_stride);
                *sums = [S::load(start), S::load(start.add(S::LANES))];
            }
        }
        for step in 0..steps {
            let right = [N::load::<S>(b.add(step * b_stride)), N::load::<S>(b.add(step * b_stride + S::LANES))];
            for line in 0..LINES {
                prefetch(ahead.from.wrapping_add(step * ahead.stride + line * Lines::FLOATS));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let left = S::splat(if BY_ROWS { a.add(i * a_stride + step) } else { a.add(step * a_stride + i) });
                for (sum, &right) in sums.iter_mut().zip(&right) {
                    *sum = N::multiply_add::<S>(left, right, *sum);
                }
            }
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
