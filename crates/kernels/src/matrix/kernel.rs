//! The inner loops of every matrix product: tiles of the result in registers, on one thread.
//!
//! A tile starts from what the destination holds (or zero) and runs one chain of multiply-adds for each of its elements
//! over the reduced index, so that a product cut anywhere along that index is the same product.

use crate::isa::Isa;
use crate::simd::{Portable, Simd, prefetch};

/// Columns of a panel: the right operand is stored as panels of this many columns, one step of the reduced index after
/// the other.
pub(crate) const PANEL: usize = 32;
/// Rows of the largest tile of any instruction set.
const MAX_ROWS: usize = 12;

/// How the left operand lies in memory. A step is one element of the reduced index, or one pair of bfloat16.
#[derive(Clone, Copy)]
pub(crate) enum Left {
    /// Tiles of `height` rows (fewer in the last) one after the other, each step by step.
    Tiles { height: usize },
    /// Rows `stride` apart, with neighbouring steps.
    Rows { stride: usize },
    /// Steps `stride` apart, with neighbouring rows.
    Steps { stride: usize },
}

/// One product `c (+)= a b` of `rows x steps` and `steps x columns`.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub rows: usize,
    pub columns: usize,
    /// Elements of the reduced index, or pairs of bfloat16.
    pub steps: usize,
    pub pairs: bool,
    pub a: *const f32,
    pub left: Left,
    pub b: *const f32,
    /// Distance between neighbouring panels of `b`.
    pub panel_stride: usize,
    /// Distance between neighbouring steps inside a panel of `b`.
    pub step_stride: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    /// Whether to continue from what `c` holds.
    pub accumulate: bool,
}

/// f32 in a cache line.
const LINE: usize = 16;

/// How far ahead to ask for steps that are apart.
const STEPS_AHEAD: usize = 16;

/// What a tile asks for while it computes: `lines` cache lines a step, from `from` on.
///
/// Few rows leave the processor waiting for the right operand, which comes from memory: it has no time to come in between
/// the panel's few tiles. So the first two tiles of a panel ask for one half each of the next one, where panels lie one after
/// the other.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const f32,
    lines: usize,
}

impl Ahead {
    fn of(product: &Product, panel: usize, row: usize, height: usize) -> Self {
        let next = product.b.wrapping_add((panel + 1) * product.panel_stride);
        let lines = PANEL / LINE;
        let lone = product.rows <= height;
        match row / height {
            // Steps that are apart hold all panels: the first panel's tile asks for the steps that follow.
            0 if product.step_stride > PANEL && lone && panel == 0 => {
                let from = product.b.wrapping_add(STEPS_AHEAD * product.step_stride);
                Self { from, lines: product.step_stride / LINE }
            }
            _ if product.step_stride > PANEL => Self { from: next, lines: 0 },
            0 if lone => Self { from: next, lines },
            tile if tile < lines => Self { from: next.wrapping_add(tile * product.steps * LINE), lines: 1 },
            _ => Self { from: next, lines: 0 },
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
        match (product.pairs, product.left) {
            (false, Left::Rows { .. }) => tiles::<S, false, true>(product),
            (false, _) => tiles::<S, false, false>(product),
            (true, Left::Rows { .. }) => tiles::<S, true, true>(product),
            (true, _) => tiles::<S, true, false>(product),
        }
    }
}

#[inline(always)]
unsafe fn tiles<S: Simd, const PAIRS: bool, const BY_ROWS: bool>(product: Product) {
    let p = product;
    // Rows that are apart need an address each; more than eight would not stay in registers.
    let height = match p.left {
        Left::Tiles { height } => height,
        Left::Rows { .. } | Left::Steps { .. } => {
            let most = if BY_ROWS { S::ROWS.min(8) } else { S::ROWS };
            p.rows.div_ceil(p.rows.div_ceil(most).max(1)).max(1)
        }
    };
    for (panel, column) in (0..p.columns).step_by(PANEL).enumerate() {
        for row in (0..p.rows).step_by(height) {
            let rows = height.min(p.rows - row);
            let ahead = Ahead::of(&p, panel, row, height);
            // SAFETY: see `multiply`.
            unsafe {
                let (a, a_stride) = match p.left {
                    Left::Tiles { .. } => (p.a.add(row * p.steps), rows),
                    Left::Rows { stride } => (p.a.add(row * stride), stride),
                    Left::Steps { stride } => (p.a.add(row), stride),
                };
                let b = p.b.add(panel * p.panel_stride);
                let c = p.c.add(row * p.c_stride + column);
                let columns = PANEL.min(p.columns - column);
                if columns == PANEL {
                    slabs::<S, PAIRS, BY_ROWS>(
                        rows,
                        p.steps,
                        a,
                        a_stride,
                        b,
                        p.step_stride,
                        ahead,
                        c,
                        p.c_stride,
                        p.accumulate,
                    );
                } else {
                    let mut whole = [0.0f32; MAX_ROWS * PANEL];
                    for i in 0..if p.accumulate { rows } else { 0 } {
                        std::ptr::copy_nonoverlapping(
                            c.add(i * p.c_stride),
                            whole.as_mut_ptr().add(i * PANEL),
                            columns,
                        );
                    }
                    let target = whole.as_mut_ptr();
                    slabs::<S, PAIRS, BY_ROWS>(
                        rows,
                        p.steps,
                        a,
                        a_stride,
                        b,
                        p.step_stride,
                        ahead,
                        target,
                        PANEL,
                        p.accumulate,
                    );
                    for i in 0..rows {
                        std::ptr::copy_nonoverlapping(target.add(i * PANEL), c.add(i * p.c_stride), columns);
                    }
                }
            }
        }
    }
}

/// A tile as wide as a panel: two vectors at a time.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "two operands and a destination, each an address and strides")]
unsafe fn slabs<S: Simd, const PAIRS: bool, const BY_ROWS: bool>(
    rows: usize,
    steps: usize,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    ahead: Ahead,
    c: *mut f32,
    c_stride: usize,
    accumulate: bool,
) {
    macro_rules! with_rows {
        ($($count:literal)*) => {
            match rows {
                $($count if $count <= S::ROWS => {
                    let mut column = 0;
                    while column < PANEL {
                        // SAFETY: see `multiply`.
                        unsafe {
                            tile::<S, $count, PAIRS, BY_ROWS>(
                                steps, a, a_stride, b.add(column), b_stride, ahead, c.add(column), c_stride, accumulate,
                            );
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
#[allow(clippy::too_many_arguments, reason = "two operands and a destination, each an address and strides")]
unsafe fn tile<S: Simd, const ROWS: usize, const PAIRS: bool, const BY_ROWS: bool>(
    steps: usize,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    ahead: Ahead,
    c: *mut f32,
    c_stride: usize,
    accumulate: bool,
) {
    // SAFETY: see `multiply`.
    unsafe {
        let mut sums = [[S::zero(); 2]; ROWS];
        if accumulate {
            for (i, sums) in sums.iter_mut().enumerate() {
                *sums = [S::load(c.add(i * c_stride)), S::load(c.add(i * c_stride + S::LANES))];
            }
        }
        for step in 0..steps {
            let right = [S::load(b.add(step * b_stride)), S::load(b.add(step * b_stride + S::LANES))];
            for line in 0..ahead.lines {
                prefetch(ahead.from.wrapping_add((step * ahead.lines + line) * LINE));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let left = S::splat(if BY_ROWS { a.add(i * a_stride + step) } else { a.add(step * a_stride + i) });
                for (sum, &right) in sums.iter_mut().zip(&right) {
                    *sum = if PAIRS {
                        S::multiply_add_pairs(left, right, *sum)
                    } else {
                        S::multiply_add(left, right, *sum)
                    };
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            S::store(c.add(i * c_stride), sums[0]);
            S::store(c.add(i * c_stride + S::LANES), sums[1]);
        }
    }
}
