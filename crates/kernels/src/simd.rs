//! Vectors of f32: the few operations that matrix products are made of, on each instruction set.

use crate::isa::Isa;

/// A vector type and its operations.
///
/// # Safety
/// Every operation may be called only where the instruction set is available; loads and stores need `LANES` valid elements.
pub(crate) trait Simd {
    /// The vector.
    type Vector: Copy;
    /// Elements of a vector.
    const LANES: usize;
    /// Rows of the largest tile that the registers hold, with two vectors in each row.
    const ROWS: usize;
    /// Steps of a tile's loop that are written out one after the other.
    const STEPS: usize = 1;
    /// Whether one instruction multiplies pairs of bfloat16.
    const PAIRS: bool = false;

    /// All elements zero.
    unsafe fn zero() -> Self::Vector;
    /// The elements at `from`.
    unsafe fn load(from: *const f32) -> Self::Vector;
    /// The numbers of bfloat16 at `from`, widened.
    unsafe fn widen(from: *const u16) -> Self::Vector;
    /// Writes the elements to `to`.
    unsafe fn store(to: *mut f32, vector: Self::Vector);
    /// Writes the elements to `to`, a multiple of the vector's size, past the caches where that can be had.
    unsafe fn stream(to: *mut f32, vector: Self::Vector) {
        // SAFETY: the caller's promise.
        unsafe { Self::store(to, vector) }
    }
    /// The one element at `from` in all lanes.
    unsafe fn splat(from: *const f32) -> Self::Vector;
    /// `a * b + c`, rounded once.
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// Each element of `a` and `b` is a pair of bfloat16 (the first in the low half): `c` plus the second product, then the first. Only
    /// where [`Simd::PAIRS`] says so.
    unsafe fn multiply_add_pairs(_: Self::Vector, _: Self::Vector, _: Self::Vector) -> Self::Vector {
        unreachable!("no instruction multiplies pairs")
    }
}

/// Asks for the cache line at `from` to come into the second-level cache; any address will do.
#[inline(always)]
pub(crate) fn prefetch(from: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint reads nothing that the program sees, and every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(from.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

/// Copies past the caches, where that can be had: for what will not be read soon, and would only take the place of what will.
///
/// # Panics
/// If the lengths differ.
pub(crate) fn stream(from: &[f32], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "stream: lengths differ");
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128, _mm_loadu_ps, _mm_stream_ps};
        // SAFETY: any four floats are a vector.
        let (head, middle, tail) = unsafe { to.align_to_mut::<__m128>() };
        let (from_head, from) = from.split_at(head.len());
        let (from, from_tail) = from.split_at(4 * middle.len());
        head.copy_from_slice(from_head);
        tail.copy_from_slice(from_tail);
        for (to, from) in middle.iter_mut().zip(from.chunks_exact(4)) {
            // SAFETY: `from` has four elements and `to` is aligned; every x86-64 processor has these instructions.
            unsafe { _mm_stream_ps(std::ptr::from_mut(to).cast(), _mm_loadu_ps(from.as_ptr())) };
        }
        fence();
    }
    #[cfg(not(target_arch = "x86_64"))]
    to.copy_from_slice(from);
}

/// After this, what was written past the caches is there before anything that this thread says.
#[inline(always)]
pub(crate) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Cache lines that will be wanted soon, to be asked for.
#[derive(Clone, Copy)]
pub(crate) struct Lines {
    first: *const f32,
    count: usize,
}

impl Lines {
    /// Bytes in a line.
    pub(crate) const BYTES: usize = 64;
    /// f32 in a line.
    pub(crate) const FLOATS: usize = Self::BYTES / size_of::<f32>();

    /// No lines.
    pub(crate) const NONE: Self = Self { first: std::ptr::null(), count: 0 };

    /// As many lines as `data` takes.
    pub(crate) fn of<T>(data: &[T]) -> Self {
        Self { first: data.as_ptr().cast(), count: size_of_val(data).div_ceil(Self::BYTES) }
    }

    /// Shared out evenly over `steps`: the lines of step `step` and how many there are in each step from there on; none when all have been
    /// asked for.
    pub(crate) fn share(self, step: usize, steps: usize) -> (*const f32, usize) {
        let per_step = self.count.div_ceil(steps.max(1));
        let asked = step * per_step;
        (self.first.wrapping_add(asked * Self::FLOATS), if asked < self.count { per_step } else { 0 })
    }

    /// Asks for all of them.
    pub(crate) fn ask_for_all(self) {
        for line in 0..self.count {
            prefetch(self.first.wrapping_add(line * Self::FLOATS));
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, Avx512Bf16, pair_apart, pair_neighbours};

/// What only one instruction set has, elsewhere.
#[cfg(not(target_arch = "x86_64"))]
mod elsewhere {
    pub(crate) unsafe fn pair_neighbours(_: &[f32], _: usize, _: &mut [[f32; 16]]) {
        unreachable!("no instruction makes pairs")
    }
    pub(crate) unsafe fn pair_apart(_: &[f32], _: &[f32], _: &mut [f32]) {
        unreachable!("no instruction makes pairs")
    }
}
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use elsewhere::{pair_apart, pair_neighbours};

/// Writes the columns of a square one after the other, `stride` apart: of each column what comes from the first `rows` rows. Does so in
/// registers, and returns whether `isa` can.
#[inline(always)]
pub(crate) fn write_columns(isa: Isa, square: &[[f32; 16]; 16], rows: usize, out: &mut [f32], stride: usize) -> bool {
    assert!((1..=16).contains(&rows) && out.len() >= 15 * stride + rows, "write_columns: the columns fit");
    #[cfg(not(target_arch = "x86_64"))]
    let _ = square;
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 | Isa::Avx512 => {
            // SAFETY: `Isa::current` returns only what the processor was seen to have, and the columns fit.
            unsafe { x86::write_columns_avx512(square, rows, out.as_mut_ptr(), stride) };
            true
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            // SAFETY: as above.
            unsafe { x86::write_columns_avx2(square, rows, out.as_mut_ptr(), stride) };
            true
        }
        _ => false,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    /// AVX-512 without bfloat16.
    pub(crate) struct Avx512;
    /// AVX-512 with bfloat16.
    pub(crate) struct Avx512Bf16;
    /// AVX2 and FMA.
    pub(crate) struct Avx2;

    /// The operations that both kinds of AVX-512 share.
    macro_rules! avx512_operations {
        () => {
            type Vector = __m512;
            const LANES: usize = 16;
            const ROWS: usize = 12;

            #[inline(always)]
            unsafe fn zero() -> __m512 {
                // SAFETY: the trait's contract, as in every operation below.
                unsafe { _mm512_setzero_ps() }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_loadu_ps(from) }
            }
            #[inline(always)]
            unsafe fn widen(from: *const u16) -> __m512 {
                // SAFETY: as above.
                unsafe {
                    let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
                }
            }
            #[inline(always)]
            unsafe fn store(to: *mut f32, vector: __m512) {
                // SAFETY: as above.
                unsafe { _mm512_storeu_ps(to, vector) }
            }
            #[inline(always)]
            unsafe fn stream(to: *mut f32, vector: __m512) {
                // SAFETY: as above.
                unsafe { _mm512_stream_ps(to, vector) }
            }
            #[inline(always)]
            unsafe fn splat(from: *const f32) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_set1_ps(*from) }
            }
            #[inline(always)]
            unsafe fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_fmadd_ps(a, b, c) }
            }
        };
    }

    impl Simd for Avx512 {
        avx512_operations!();
    }

    impl Simd for Avx512Bf16 {
        avx512_operations!();
        const PAIRS: bool = true;

        #[inline(always)]
        unsafe fn multiply_add_pairs(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: as above; the two vector types differ in name only.
            unsafe {
                let pairs = |x: __m512| std::mem::transmute::<__m512, __m512bh>(x);
                _mm512_dpbf16_ps(c, pairs(a), pairs(b))
            }
        }
    }

    /// Pairs of neighbours, rounded to bfloat16 (to nearest, ties to even, subnormal numbers to zero): each row of `out` from 32 elements,
    /// `stride` after those of the row before.
    ///
    /// # Safety
    /// There must be AVX-512 with bfloat16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(crate) unsafe fn pair_neighbours(source: &[f32], stride: usize, out: &mut [[f32; 16]]) {
        for (out, source) in out.iter_mut().zip(source.chunks(stride)) {
            for (out, source) in out.chunks_exact_mut(8).zip(source[..32].chunks_exact(16)) {
                // SAFETY: 16 elements become 8 pairs.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), rounded(_mm512_loadu_ps(source.as_ptr()))) };
            }
        }
    }

    /// Pairs of an element of `first` (in the low half) and one of `second`, rounded as by [`pair_neighbours`].
    ///
    /// # Safety
    /// There must be AVX-512 with bfloat16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(crate) unsafe fn pair_apart(first: &[f32], second: &[f32], out: &mut [f32]) {
        assert!(first.len() == out.len() && second.len() == out.len(), "pair_apart: lengths differ");
        for start in (0..out.len()).step_by(16) {
            let mask = u16::MAX >> (16 - (out.len() - start).min(16));
            let [low, high] = [first, second].map(|side| {
                // SAFETY: the mask leaves out what lies beyond the end.
                let side = unsafe { _mm512_maskz_loadu_ps(mask, side.as_ptr().add(start)) };
                _mm512_cvtepu16_epi32(rounded(side))
            });
            let pairs = _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32::<16>(high)));
            // SAFETY: as above.
            unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr().add(start), mask, pairs) };
        }
    }

    /// Elements as bfloat16. (Two vectors at once would save nothing, and Bochs 3.0 gets that wrong.)
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn rounded(elements: __m512) -> __m256i {
        // SAFETY: the two vector types differ in name only.
        unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(elements)) }
    }

    /// [`super::write_columns`], four columns of eight rows at a time.
    ///
    /// # Safety
    /// There must be AVX2, and the columns must fit.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(crate) unsafe fn write_columns_avx2(square: &[[f32; 16]; 16], rows: usize, out: *mut f32, stride: usize) {
        const FIRST: i32 = 0b01_00_01_00;
        const SECOND: i32 = 0b11_10_11_10;
        for first in (0..rows).step_by(8) {
            let here = (rows - first).min(8);
            for place in (0..16).step_by(4) {
                // Rows that are four apart share a vector.
                let rows = |i: usize| {
                    let [low, high] = [&square[first + i], &square[first + i + 4]].map(|row| row[place..].as_ptr());
                    // SAFETY: a row has four elements from there on.
                    unsafe { _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high)) }
                };
                let [a, b, c, d] = [rows(0), rows(1), rows(2), rows(3)];
                let [early, late] = [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)];
                let [early_below, late_below] = [_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)];
                let columns = [
                    _mm256_shuffle_ps::<FIRST>(early, early_below),
                    _mm256_shuffle_ps::<SECOND>(early, early_below),
                    _mm256_shuffle_ps::<FIRST>(late, late_below),
                    _mm256_shuffle_ps::<SECOND>(late, late_below),
                ];
                for (i, column) in columns.into_iter().enumerate() {
                    // SAFETY: the columns fit; of each, `here` elements are written.
                    unsafe {
                        let to = out.add((place + i) * stride + first);
                        match here {
                            8 => _mm256_storeu_ps(to, column),
                            // The height of a whole tile.
                            6 => {
                                _mm_storeu_ps(to, _mm256_castps256_ps128(column));
                                _mm_storel_pd(to.add(4).cast(), _mm256_extractf128_pd::<1>(_mm256_castps_pd(column)));
                            }
                            _ => {
                                let mut whole = [0.0f32; 8];
                                _mm256_storeu_ps(whole.as_mut_ptr(), column);
                                std::ptr::copy_nonoverlapping(whole.as_ptr(), to, here);
                            }
                        }
                    }
                }
            }
        }
    }

    /// [`super::write_columns`] in four rounds of shuffles.
    ///
    /// # Safety
    /// There must be AVX-512, and the columns must fit.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(crate) unsafe fn write_columns_avx512(square: &[[f32; 16]; 16], rows: usize, out: *mut f32, stride: usize) {
        // SAFETY: a row is 16 elements.
        let row = |i: usize| unsafe { _mm512_loadu_ps(square[i].as_ptr()) };
        // Of four rows each, in each quarter of a vector: one column of the four that the quarter began with.
        let mut fours = [_mm512_setzero_ps(); 16];
        for (four, columns) in fours.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let [a, b, c, d] = std::array::from_fn(|i| row(4 * four + i));
            let pairs = [_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)].map(|pair| _mm512_castps_pd(pair));
            let others = [_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)].map(|pair| _mm512_castps_pd(pair));
            for half in 0..2 {
                columns[2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[half], others[half]));
                columns[2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[half], others[half]));
            }
        }
        // The quarters of a column, one of each four rows, come together in two rounds.
        const EVEN: i32 = 0b10_00_10_00;
        const ODD: i32 = 0b11_01_11_01;
        let mask = (u16::MAX) >> (16 - rows);
        for i in 0..4 {
            let [a, b, c, d] = [fours[i], fours[4 + i], fours[8 + i], fours[12 + i]];
            let even = [_mm512_shuffle_f32x4::<EVEN>(a, b), _mm512_shuffle_f32x4::<EVEN>(c, d)];
            let odd = [_mm512_shuffle_f32x4::<ODD>(a, b), _mm512_shuffle_f32x4::<ODD>(c, d)];
            let columns = [
                _mm512_shuffle_f32x4::<EVEN>(even[0], even[1]),
                _mm512_shuffle_f32x4::<EVEN>(odd[0], odd[1]),
                _mm512_shuffle_f32x4::<ODD>(even[0], even[1]),
                _mm512_shuffle_f32x4::<ODD>(odd[0], odd[1]),
            ];
            for (quarter, column) in columns.into_iter().enumerate() {
                // SAFETY: the columns fit.
                unsafe { _mm512_mask_storeu_ps(out.add((4 * quarter + i) * stride), mask, column) };
            }
        }
    }

    impl Simd for Avx2 {
        type Vector = __m256;
        const LANES: usize = 8;
        const ROWS: usize = 6;
        const STEPS: usize = 4;

        #[inline(always)]
        unsafe fn zero() -> __m256 {
            // SAFETY: the trait's contract, as in every operation below.
            unsafe { _mm256_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn widen(from: *const u16) -> __m256 {
            // SAFETY: as above.
            unsafe {
                let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
            }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, vector: __m256) {
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(to, vector) }
        }
        #[inline(always)]
        unsafe fn stream(to: *mut f32, vector: __m256) {
            // SAFETY: as above.
            unsafe { _mm256_stream_ps(to, vector) }
        }
        #[inline(always)]
        unsafe fn splat(from: *const f32) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_set1_ps(*from) }
        }
        #[inline(always)]
        unsafe fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
    }
}

/// Four lanes in plain Rust: NEON's registers on AArch64, whatever the compiler makes of it elsewhere.
pub(crate) struct Portable;

impl Simd for Portable {
    type Vector = [f32; 4];
    const LANES: usize = 4;
    const ROWS: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> [f32; 4] {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 4] {
        // SAFETY: the trait's contract.
        unsafe { from.cast::<[f32; 4]>().read() }
    }
    #[inline(always)]
    unsafe fn widen(from: *const u16) -> [f32; 4] {
        // SAFETY: the trait's contract.
        unsafe { from.cast::<[u16; 4]>().read() }.map(crate::half::widened)
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, vector: [f32; 4]) {
        // SAFETY: the trait's contract.
        unsafe { to.cast::<[f32; 4]>().write(vector) }
    }
    #[inline(always)]
    unsafe fn splat(from: *const f32) -> [f32; 4] {
        // SAFETY: the trait's contract.
        unsafe { [*from; 4] }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
}
