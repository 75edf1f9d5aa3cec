//! What this machine can do at best: the two ends of the roofline (Williams, Waterman and Patterson, "Roofline: An
//! Insightful Visual Performance Model for Multicore Architectures", 2009).

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use crate::isa::{Isa, multiversion};
use crate::matrix::Precision;
use crate::simd::{Portable, Simd};

/// Seconds that one measurement of the matrix peak takes at least.
const SHORTEST: f64 = 4e-3;
/// Measurements, of which the best counts: a machine that is shared or that warms up is never faster than it is.
const ATTEMPTS: usize = 9;
/// Elements of the buffer that is read to measure the memory: 256 MiB, more than caches hold.
const STREAM: usize = 64 << 20;

/// The highest rate of multiply-adds on all threads, in floating-point operations a second: of the instruction that matrix
/// products of this precision are made of, on operands that never leave the registers.
pub fn matrix_peak(precision: Precision) -> f64 {
    let isa = Isa::current();
    let pairs = precision == Precision::Bf16;
    let attempt = |rounds: usize| {
        let start = Instant::now();
        let done = rayon::broadcast(|_| chains(isa, pairs, rounds));
        (done.iter().sum::<usize>() as f64, start.elapsed().as_secs_f64())
    };
    let mut rounds = 1 << 8;
    while attempt(rounds).1 < SHORTEST {
        rounds *= 2;
    }
    (0..ATTEMPTS).map(|_| attempt(rounds)).map(|(operations, seconds)| operations / seconds).fold(0.0, f64::max)
}

/// The highest rates of memory with all threads, in bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bandwidth {
    /// Reading alone.
    pub read: f64,
    /// Changing in place, what is read and what is written together. Often more than reading alone, because processors
    /// have ways of their own for what leaves them.
    pub update: f64,
}

/// Measures the bandwidth of memory on a buffer that caches do not hold.
pub fn bandwidth() -> Bandwidth {
    let isa = Isa::current();
    let mut stream = vec![0.0f32; STREAM];
    let bytes = size_of_val(&stream[..]) as f64;
    let part = STREAM.div_ceil(rayon::current_num_threads());
    // Written once, so that every page is there.
    stream.par_chunks_mut(part).for_each(|part| part.fill(1.0));
    let (mut shortest_read, mut shortest_update) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..ATTEMPTS {
        let start = Instant::now();
        black_box(stream.par_chunks(part).map(|part| read(isa, part)).sum::<f32>());
        shortest_read = shortest_read.min(start.elapsed().as_secs_f64());
        let start = Instant::now();
        stream.par_chunks_mut(part).for_each(|part| update(isa, part));
        shortest_update = shortest_update.min(start.elapsed().as_secs_f64());
    }
    Bandwidth { read: bytes / shortest_read, update: 2.0 * bytes / shortest_update }
}

/// Places of a part that are visited in turn, so that many requests are under way at a time.
const PLACES: usize = 8;
/// Elements that are visited at one place before the next has its turn.
const BLOCK: usize = 64;

multiversion! {
    fn read(data: &[f32]) -> f32 {
        let apart = data.len() / PLACES;
        let mut sums = [0.0f32; BLOCK];
        for start in (0..apart).step_by(BLOCK) {
            for place in 0..PLACES {
                for (sum, x) in sums.iter_mut().zip(&data[place * apart + start..][..BLOCK.min(apart - start)]) {
                    *sum += x;
                }
            }
        }
        sums.iter().sum()
    }
}

multiversion! {
    fn update(data: &mut [f32]) {
        let apart = data.len() / PLACES;
        for start in (0..apart).step_by(BLOCK) {
            for place in 0..PLACES {
                for x in &mut data[place * apart + start..][..BLOCK.min(apart - start)] {
                    *x = 1.5 - *x;
                }
            }
        }
    }
}

/// Runs `rounds` of multiply-adds in independent chains on this thread and returns how many operations that were.
fn chains(isa: Isa, pairs: bool, rounds: usize) -> usize {
    // SAFETY: `Isa::current` returns only what the processor was seen to have.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => chains_avx512bf16(pairs, rounds),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => chains_avx512(pairs, rounds),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => chains_avx2(pairs, rounds),
            _ => chains_of::<Portable>(pairs, rounds),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn chains_avx512bf16(pairs: bool, rounds: usize) -> usize {
    // SAFETY: see `chains`.
    unsafe { chains_of::<crate::simd::Avx512Bf16>(pairs, rounds) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn chains_avx512(pairs: bool, rounds: usize) -> usize {
    // SAFETY: see `chains`.
    unsafe { chains_of::<crate::simd::Avx512>(pairs, rounds) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn chains_avx2(pairs: bool, rounds: usize) -> usize {
    // SAFETY: see `chains`.
    unsafe { chains_of::<crate::simd::Avx2>(pairs, rounds) }
}

#[inline(always)]
unsafe fn chains_of<S: Simd>(pairs: bool, rounds: usize) -> usize {
    /// Enough to hide the latency of two units, few enough for sixteen registers.
    const CHAINS: usize = 12;
    let pairs = pairs && S::PAIRS;
    // Small and normal also as a pair of bfloat16, so that no sum overflows or becomes subnormal.
    let operand = [f32::from_bits(0x3a80_3a80); 16];
    let mut left = [0.0f32; 16];
    // SAFETY: the caller has the instruction set; a vector has at most 16 elements.
    unsafe {
        let (a, b) = (S::load(black_box(&operand).as_ptr()), S::load(black_box(&operand).as_ptr()));
        let mut sums = [S::zero(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = if pairs { S::multiply_add_pairs(a, b, *sum) } else { S::multiply_add(a, b, *sum) };
            }
        }
        for sum in sums {
            S::store(left.as_mut_ptr(), sum);
            black_box(&left);
        }
    }
    let per_element = if pairs { 4 } else { 2 };
    rounds * CHAINS * S::LANES * per_element
}
