//! Products with weights in 8 bits against the plain chain that the crate promises.

use kernels::{Int8Matrix, Isa, Matrix, MatrixMut, Onto, Precision};
use posttrain_kernels as kernels;

use crate::common::{bits, noise};

const BLOCK: usize = 32;
const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

fn bfloat16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

/// The integers of a column of `b` in one block, and their scale.
fn round(b: &[f32], n: usize, column: usize, block: std::ops::Range<usize>) -> (Vec<f32>, f32) {
    let values = || block.clone().map(|p| b[p * n + column]);
    let scale = values().map(f32::abs).fold(0.0, f32::max) / 127.0;
    (values().map(|x| if scale > 0.0 { (x / scale).round_ties_even() } else { 0.0 }).collect(), scale)
}

fn naive(precision: Precision, (m, n, k): (usize, usize, usize), a: &[f32], b: &[f32], c: &mut [f32]) {
    for j in 0..n {
        for first in (0..k).step_by(BLOCK) {
            let block = first..k.min(first + BLOCK);
            let (integers, scale) = round(b, n, j, block.clone());
            for i in 0..m {
                let left = &a[i * k..][block.clone()];
                let mut sum = 0.0f32;
                match precision {
                    Precision::F32 => {
                        for (left, right) in left.iter().zip(&integers) {
                            sum = left.mul_add(*right, sum);
                        }
                    }
                    Precision::Bf16 => {
                        for (left, right) in left.chunks(2).zip(integers.chunks(2)) {
                            for (left, right) in left.iter().zip(right).rev() {
                                sum = bfloat16(*left).mul_add(*right, sum);
                            }
                        }
                    }
                }
                c[i * n + j] = sum.mul_add(scale, c[i * n + j]);
            }
        }
    }
}

fn product(precision: Precision, (m, n, k): (usize, usize, usize), a: &[f32], b: Matrix<'_>, c: &mut [f32]) {
    let mut weights = Int8Matrix::new(precision, k, n);
    weights.pack(b);
    let mut apart = vec![f32::NAN; m * n];
    weights.matmul(Matrix::new(a, m, k), MatrixMut::new(&mut apart, m, n), Onto::Rows(Matrix::new(c, m, n)));
    weights.matmul(Matrix::new(a, m, k), MatrixMut::new(c, m, n), Onto::Held);
    assert_eq!(bits(&apart), bits(c), "onto rows elsewhere");
}

const SHAPES: [(usize, usize, usize); 10] = [
    (1, 1, 1),
    (1, 33, 7),
    (1, 96, 576),
    (2, 64, 64),
    (5, 100, 577),
    (13, 96, 300),
    (16, 40, 601),
    (150, 37, 310),
    (193, 5, 31),
    (401, 64, 19),
];

#[test]
fn every_product_is_the_chain_of_blocks() {
    for precision in PRECISIONS {
        for (index, &shape) in SHAPES.iter().enumerate() {
            let (m, n, k) = shape;
            let (a, b) = (noise(index as u64 + 1, m * k), noise(index as u64 + 99, k * n));
            let old = noise(7, m * n);
            let mut expected = old.clone();
            naive(precision, shape, &a, &b, &mut expected);
            let transposed: Vec<f32> = (0..n * k).map(|i| b[i % k * n + i / k]).collect();
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                for right in [Matrix::new(&b, k, n), Matrix::new(&transposed, n, k).transposed()] {
                    let mut c = old.clone();
                    isa.with(|| product(precision, shape, &a, right, &mut c));
                    assert_eq!(bits(&c), bits(&expected), "{shape:?} {precision:?} on {isa}");
                }
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_each_other_nor_on_threads() {
    let (m, n, k) = (200, 70, 130);
    let (a, b) = (noise(1, m * k), noise(2, k * n));
    for precision in PRECISIONS {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            let mut c = vec![0.0; m * n];
            pool.install(|| product(precision, (m, n, k), &a, Matrix::new(&b, k, n), &mut c));
            c
        };
        let together = run(2);
        assert_eq!(bits(&together), bits(&run(1)), "{precision:?}");
        let mut weights = Int8Matrix::new(precision, k, n);
        weights.pack(Matrix::new(&b, k, n));
        for row in [0, 77, 199] {
            let mut alone = vec![f32::NAN; n];
            weights.matmul(Matrix::new(&a[row * k..], 1, k), MatrixMut::new(&mut alone, 1, n), Onto::Zero);
            assert_eq!(bits(&alone), bits(&together[row * n..][..n]), "{precision:?}, row {row}");
        }
    }
}

#[test]
fn the_error_is_that_of_eight_bits() {
    let (m, n, k) = (4, 64, 512);
    let (a, b) = (noise(3, m * k), noise(4, k * n));
    let mut c = vec![0.0; m * n];
    product(Precision::F32, (m, n, k), &a, Matrix::new(&b, k, n), &mut c);
    let (mut error, mut size) = (0.0, 0.0);
    for i in 0..m {
        for j in 0..n {
            let exact: f64 = (0..k).map(|p| f64::from(a[i * k + p]) * f64::from(b[p * n + j])).sum();
            error += (f64::from(c[i * n + j]) - exact).powi(2);
            size += exact.powi(2);
        }
    }
    // Uniform rounding errors within half a step of 1/127 of the largest of 32.
    let relative = (error / size).sqrt();
    assert!((0.001..0.01).contains(&relative), "{relative}");
}

#[test]
fn blocks_of_zeros_tiny_and_infinite_values() {
    let (n, k) = (40, 64);
    let one = vec![1.0; k];
    let of = |fill: &dyn Fn(usize, usize) -> f32| {
        let b: Vec<f32> = (0..k * n).map(|i| fill(i / n, i % n)).collect();
        let mut c = vec![0.0; n];
        product(Precision::Bf16, (1, n, k), &one, Matrix::new(&b, k, n), &mut c);
        c
    };
    assert!(of(&|_, _| 0.0).iter().all(|&x| x == 0.0));
    assert!(of(&|_, _| f32::from_bits(1)).iter().all(|&x| x.abs() < 1e-40));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let c = of(&|row, column| if (row, column) == (33, 5) { bad } else { 1.0 });
        assert!(c.iter().enumerate().all(|(column, x)| x.is_finite() == (column != 5)), "{bad}: {c:?}");
    }
}

#[test]
fn memory_is_about_half_of_bfloat16() {
    let weights = Int8Matrix::new(Precision::Bf16, 576, 1536);
    assert_eq!(weights.precision(), Precision::Bf16);
    assert_eq!(weights.bytes(), 576 * 1536 * 9 / 8);
}
