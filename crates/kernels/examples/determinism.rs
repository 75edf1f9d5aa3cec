//! What the fixed order of every sum costs: products in one chain beside products whose reduction is split between threads.
//!
//! ```text
//! cargo run --release -p posttrain-kernels --example determinism > bench/results/determinism.json
//! ```
//! A library that may choose its order splits the reduced index where that is faster: each thread computes a part of every
//! sum, and the parts are added. Here that is done outside the engine, with the same inner loops, so that nothing but the
//! order differs. Times are the best of many.

use std::time::Instant;

use kernels::{Matrix, MatrixMut, Onto, PackedMatrix, Precision, matmul};
use posttrain_kernels as kernels;
use rayon::prelude::*;

/// The shortest of several runs of `work`, in seconds.
fn best(operations: f64, mut work: impl FnMut()) -> f64 {
    let repeats = (4e9 / operations).clamp(1.0, 500.0) as usize;
    work();
    (0..7)
        .map(|_| {
            let start = Instant::now();
            (0..repeats).for_each(|_| work());
            start.elapsed().as_secs_f64() / repeats as f64
        })
        .fold(f64::INFINITY, f64::min)
}

/// `c = sum of parts`, on all threads.
fn add(c: &mut [f32], parts: &[Vec<f32>]) {
    const CHUNK: usize = 1 << 13;
    c.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, c)| {
        c.copy_from_slice(&parts[0][chunk * CHUNK..][..c.len()]);
        for part in &parts[1..] {
            c.iter_mut().zip(&part[chunk * CHUNK..]).for_each(|(sum, x)| *sum += x);
        }
    });
}

/// One line of the result: times in the fixed and in the free order.
fn row(what: &str, fixed: f64, free: f64) -> String {
    let time = |seconds: f64| match seconds {
        _ if seconds >= 1e-3 => format!("{:.2} ms", seconds * 1e3),
        _ => format!("{:.0} µs", seconds * 1e6),
    };
    let price = 100.0 * (fixed / free - 1.0);
    format!(
        "    {{ \"what\": \"{what}\", \"fixed\": \"{}\", \"free\": \"{}\", \"price\": \"{price:+.0} %\" }}",
        time(fixed),
        time(free)
    )
}

fn main() {
    let threads = rayon::current_num_threads();
    let precision = Precision::Bf16;
    let mut rows = Vec::new();
    // Rows, reduced index, columns: a linear layer of the step, decoding with many and with one row, the head.
    for (what, m, k, n) in [
        ("training, gate and up: 2048 x 576 x 3072", 2048, 576, 3072),
        ("training, down: 2048 x 1536 x 576", 2048, 1536, 576),
        ("decoding 16 rows, down: 16 x 1536 x 576", 16, 1536, 576),
        ("decoding 1 row, down: 1 x 1536 x 576", 1, 1536, 576),
        ("decoding 16 rows, head: 16 x 576 x 49152", 16, 576, 49152),
        ("decoding 1 row, head: 1 x 576 x 49152", 1, 576, 49152),
    ] {
        let (a, b, mut c) = (vec![0.5f32; m * k], vec![0.25f32; k * n], vec![0.0f32; m * n]);
        let operations = 2.0 * (m * k * n) as f64;
        let packed = |from: usize, len: usize| {
            let mut packed = PackedMatrix::new(precision, len, n);
            packed.pack(0, Matrix::new(&b[from * n..], len, n));
            packed
        };
        let whole = packed(0, k);
        let fixed = best(operations, || whole.matmul(Matrix::new(&a, m, k), MatrixMut::new(&mut c, m, n), Onto::Zero));
        // Even parts, so that no pair of bf16 is cut.
        let part = k.div_ceil(threads).next_multiple_of(2);
        let parts: Vec<(usize, PackedMatrix)> =
            (0..k).step_by(part).map(|from| (from, packed(from, part.min(k - from)))).collect();
        let mut sums = vec![vec![0.0f32; m * n]; parts.len()];
        let free = best(operations, || {
            sums.par_iter_mut().zip(&parts).for_each(|(sums, (from, right))| {
                let left = Matrix::new(&a[*from..], m, part.min(k - from)).with_row_stride(k);
                right.matmul(left, MatrixMut::new(sums, m, n), Onto::Zero);
            });
            add(&mut c, &sums);
        });
        rows.push(row(what, fixed, free));
    }
    // The gradient of a weight reduces over the tokens, which is where one would split by threads.
    let (m, k, n) = (1536, 2048, 576);
    let (a, b, mut c) = (vec![0.5f32; k * m], vec![0.25f32; k * n], vec![0.0f32; m * n]);
    let operations = 2.0 * (m * k * n) as f64;
    let fixed = best(operations, || {
        let left = Matrix::new(&a, k, m).transposed();
        matmul(precision, left, Matrix::new(&b, k, n), MatrixMut::new(&mut c, m, n), Onto::Held);
    });
    let part = k / threads;
    let mut sums = vec![vec![0.0f32; m * n]; threads];
    let free = best(operations, || {
        sums.par_iter_mut().enumerate().for_each(|(index, sums)| {
            let left = Matrix::new(&a[index * part * m..], part, m).transposed();
            let right = Matrix::new(&b[index * part * n..], part, n);
            matmul(precision, left, right, MatrixMut::new(sums, m, n), Onto::Zero);
        });
        add(&mut c, &sums);
    });
    rows.push(row("gradient of a weight over 2048 tokens: 1536 x 2048 x 576", fixed, free));
    // Attention is f32 in every precision, so that sampling and training agree. Its products, one head of one sequence:
    let (tokens, head) = (256, 64);
    let (q, k, mut scores) = (vec![0.5f32; tokens * head], vec![0.25f32; tokens * head], vec![0.0f32; tokens * tokens]);
    let mut attend = |precision| {
        best(2.0 * (tokens * tokens * head) as f64, || {
            let keys = Matrix::new(&k, tokens, head).transposed();
            matmul(
                precision,
                Matrix::new(&q, tokens, head),
                keys,
                MatrixMut::new(&mut scores, tokens, tokens),
                Onto::Zero,
            );
        })
    };
    let (exact, rounded) = (attend(Precision::F32), attend(Precision::Bf16));
    rows.push(row("attention in f32 rather than bf16, scores of a head: 256 x 64 x 256", exact, rounded));
    println!("{{\n  \"threads\": {threads},\n  \"precision\": \"bf16\",\n  \"rows\": [\n{}\n  ]\n}}", rows.join(",\n"));
}
