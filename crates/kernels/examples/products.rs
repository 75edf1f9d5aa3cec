//! The speed of matrix products beside the speed of the processor: `cargo run --release --example products`.

use std::hint::black_box;
use std::time::Instant;

use kernels::{Int8Matrix, Isa, Matrix, MatrixMut, Onto, PackedMatrix, Precision, matmul};
use posttrain_kernels as kernels;

/// The shortest of several runs of `work`, in seconds.
fn best(operations: f64, mut work: impl FnMut()) -> f64 {
    let repeats = (1e10 / operations).clamp(1.0, 2000.0) as usize;
    work();
    (0..5)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..repeats {
                work();
            }
            start.elapsed().as_secs_f64() / repeats as f64
        })
        .fold(f64::INFINITY, f64::min)
}

fn main() {
    let threads = rayon::current_num_threads();
    println!("{} on {threads} threads; GFLOP/s, best of 5", Isa::current());
    // A product whose operands stay in the second-level cache shows what the multiply-add units give.
    let peak = |precision| {
        let (m, k, n) = (48, 256, 1024);
        let (a, b, mut c) = (vec![0.5f32; m * k], vec![0.25f32; k * n], vec![0.0f32; m * n]);
        let mut right = PackedMatrix::new(precision, k, n);
        right.pack(0, Matrix::new(&b, k, n));
        let operations = 2.0 * (m * n * k) as f64;
        let multiply = || right.matmul(Matrix::new(black_box(&a), m, k), MatrixMut::new(&mut c, m, n), Onto::Zero);
        operations / best(operations, multiply) / 1e9
    };
    let peaks = [Precision::F32, Precision::Bf16].map(peak);
    println!("operands in cache: f32 {:.0}, bf16 {:.0}", peaks[0], peaks[1]);
    println!(
        "{:>8} {:>8} {:>8}   {:>14} {:>14} {:>14} {:>14} {:>14} {:>14}",
        "rows", "inner", "columns", "f32", "f32 packed", "f32 int8", "bf16", "bf16 packed", "bf16 int8"
    );
    let shapes = [
        (2048, 576, 1536),
        (2048, 1536, 576),
        (2048, 2048, 2048),
        (512, 576, 49152),
        (64, 576, 1536),
        (16, 576, 1536),
        (16, 1536, 576),
        (16, 576, 49152),
        (4, 576, 49152),
        (1, 576, 49152),
    ];
    for (m, k, n) in shapes {
        let (a, b, mut c) = (vec![0.5f32; m * k], vec![0.25f32; k * n], vec![0.0f32; m * n]);
        let operations = 2.0 * (m * n * k) as f64;
        print!("{m:>8} {k:>8} {n:>8}  ");
        for precision in [Precision::F32, Precision::Bf16] {
            let left = Matrix::new(&a, m, k);
            // Weights are stored as outputs x inputs.
            let right = Matrix::new(&b, n, k).transposed();
            let plain = best(operations, || matmul(precision, left, right, MatrixMut::new(&mut c, m, n), Onto::Zero));
            let mut weights = PackedMatrix::new(precision, k, n);
            weights.pack(0, right);
            let packed = best(operations, || weights.matmul(left, MatrixMut::new(&mut c, m, n), Onto::Zero));
            let mut weights = Int8Matrix::new(precision, k, n);
            weights.pack(right);
            let int8 = best(operations, || weights.matmul(left, MatrixMut::new(&mut c, m, n), Onto::Zero));
            for time in [plain, packed, int8] {
                print!(" {:>14.0}", operations / time / 1e9);
            }
        }
        println!();
    }
    println!("gradient of a weight (both operands transposed)");
    for (m, k, n) in [(1536, 2048, 576), (576, 2048, 1536), (49152, 512, 576)] {
        let (a, b, mut c) = (vec![0.5f32; m * k], vec![0.25f32; k * n], vec![0.0f32; m * n]);
        let operations = 2.0 * (m * n * k) as f64;
        print!("{m:>8} {k:>8} {n:>8}  ");
        for precision in [Precision::F32, Precision::Bf16] {
            let left = Matrix::new(&a, k, m).transposed();
            let right = Matrix::new(&b, k, n);
            let time = best(operations, || matmul(precision, left, right, MatrixMut::new(&mut c, m, n), Onto::Held));
            print!(" {:>14.0} {:>14}", operations / time / 1e9, "");
        }
        println!();
    }
}
