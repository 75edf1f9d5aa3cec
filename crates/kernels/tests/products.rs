//! Matrix products against the naive fold, and the properties that everything above relies on.

use kernels::{Floats, Isa, Matrix, MatrixMut, Onto, PackedMatrix, Precision, matmul};
use posttrain_kernels as kernels;
use proptest::prelude::*;

use crate::common::{bits, noise};

fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

fn bfloat16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

/// `c (+)= a b` by the fold that the crate promises.
fn naive(
    precision: Precision,
    (m, n, k): (usize, usize, usize),
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
    accumulate: bool,
) {
    for i in 0..m {
        for j in 0..n {
            let mut sum = if accumulate { c[i * n + j] } else { 0.0 };
            let (left, right) = (|p: usize| a[i * k + p], |p: usize| b[p * n + j]);
            match precision {
                Precision::F32 => {
                    for p in 0..k {
                        sum = left(p).mul_add(right(p), sum);
                    }
                }
                Precision::Bf16 => {
                    for p in (0..k).step_by(2) {
                        if p + 1 < k {
                            sum = bfloat16(left(p + 1)).mul_add(bfloat16(right(p + 1)), sum);
                        }
                        sum = bfloat16(left(p)).mul_add(bfloat16(right(p)), sum);
                    }
                }
            }
            c[i * n + j] = sum;
        }
    }
}

const SHAPES: [(usize, usize, usize); 13] = [
    (1, 1, 1),
    (1, 33, 7),
    (2, 64, 64),
    (3, 31, 289),
    (5, 100, 577),
    (8, 32, 2),
    (12, 65, 16),
    (13, 96, 300),
    (16, 40, 601),
    (49, 70, 33),
    (150, 37, 620),
    (60, 33, 1190),
    (301, 64, 19),
];

#[test]
fn every_product_is_the_naive_fold() {
    for isa in available() {
        for precision in [Precision::F32, Precision::Bf16] {
            for (index, &shape) in SHAPES.iter().enumerate() {
                let (m, n, k) = shape;
                let (a, b, c) = (noise(index as u64 + 1, m * k), noise(index as u64 + 99, k * n), noise(7, m * n));
                for onto in [Onto::Zero, Onto::Held] {
                    let mut expected = c.clone();
                    naive(precision, shape, &a, &b, &mut expected, matches!(onto, Onto::Held));
                    let (left, right) = (Matrix::new(&a, m, k), Matrix::new(&b, k, n));
                    let mut plain = c.clone();
                    isa.with(|| matmul(precision, left, right, MatrixMut::new(&mut plain, m, n), onto));
                    assert_eq!(bits(&plain), bits(&expected), "matmul {shape:?} {precision:?} on {isa}");
                    let mut packed = c.clone();
                    isa.with(|| {
                        let mut weights = PackedMatrix::new(precision, k, n);
                        weights.pack(0, right);
                        weights.matmul(left, MatrixMut::new(&mut packed, m, n), onto);
                    });
                    assert_eq!(bits(&packed), bits(&expected), "packed {shape:?} {precision:?} on {isa}");
                }
                // The same onto other rows than the destination's, which may hold anything.
                let mut expected = c.clone();
                naive(precision, shape, &a, &b, &mut expected, true);
                let spread: Vec<f32> = c.chunks(n).flat_map(|row| row.iter().copied().chain([f32::NAN; 3])).collect();
                let onto = Onto::Rows(Matrix::new(&spread[..spread.len() - 3], m, n).with_row_stride(n + 3));
                let (left, right) = (Matrix::new(&a, m, k), Matrix::new(&b, k, n));
                let (mut plain, mut packed) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
                isa.with(|| {
                    matmul(precision, left, right, MatrixMut::new(&mut plain, m, n), onto);
                    let mut weights = PackedMatrix::new(precision, k, n);
                    weights.pack(0, right);
                    weights.matmul(left, MatrixMut::new(&mut packed, m, n), onto);
                });
                assert_eq!(bits(&plain), bits(&expected), "matmul onto {shape:?} {precision:?} on {isa}");
                assert_eq!(bits(&packed), bits(&expected), "packed onto {shape:?} {precision:?} on {isa}");
            }
        }
    }
}

/// The largest subnormal number is nearest to the smallest normal bfloat16. Whether it counts as that or as zero may depend on the instruction
/// set alone: not on where it stands, nor on how the operand lies.
#[test]
fn a_subnormal_number_counts_the_same_wherever_it_stands() {
    let (m, n, k) = (49, 35, 67);
    let (subnormal, large) = (f32::from_bits(0x007f_ffff), 2f32.powi(100));
    for isa in available() {
        let mut found = Vec::new();
        for place in 0..k {
            let small: Vec<f32> = (0..m.max(n) * k).map(|i| if i % k == place { subnormal } else { 0.0 }).collect();
            let across: Vec<f32> = (0..k * m.max(n)).map(|i| if i / n == place { subnormal } else { 0.0 }).collect();
            let larges = vec![large; k * m.max(n)];
            let lefts = [Matrix::new(&small, m, k), Matrix::new(&across, k, n).transposed()];
            let rights = [Matrix::new(&across, k, n), Matrix::new(&small, n, k).transposed()];
            let (left, right) = (Matrix::new(&larges, m, k), Matrix::new(&larges, k, n));
            let products = lefts.map(|left| (left, right)).into_iter().chain(rights.map(|right| (left, right)));
            for (left, right) in products {
                let mut product = vec![f32::NAN; left.rows() * n];
                isa.with(|| {
                    matmul(Precision::Bf16, left, right, MatrixMut::new(&mut product, left.rows(), n), Onto::Zero);
                });
                found.extend(bits(&product));
            }
        }
        assert!(found.iter().all(|&bits| bits == found[0]), "{isa}: the same everywhere");
        assert!([0, 2f32.powi(-26).to_bits()].contains(&found[0]), "{isa}: zero, or the smallest normal number");
    }
}

/// Results this large are written past the caches where their rows start at cache lines, as they do in a mapping of pages.
#[test]
fn a_large_result_is_the_same_wherever_it_lies() {
    let (m, n, k) = (1100, 960, 6);
    let (a, b, held) = (noise(1, m * k), noise(2, k * n), noise(3, m * n));
    let (left, right) = (Matrix::new(&a, m, k), Matrix::new(&b, k, n));
    let mut memory = Floats::zeros(9 << 20);
    for isa in available() {
        for precision in [Precision::F32, Precision::Bf16] {
            for (onto, first, extra) in
                [(Onto::Zero, 0, 0), (Onto::Zero, 0, 16), (Onto::Zero, 1, 0), (Onto::Zero, 0, 1), (Onto::Held, 0, 0)]
            {
                let mut expected = held.clone();
                naive(precision, (m, n, k), &a, &b, &mut expected, matches!(onto, Onto::Held));
                let width = n + extra;
                let c = &mut memory[first..first + m * width];
                c.chunks_mut(width).zip(held.chunks(n)).for_each(|(to, from)| to[..n].copy_from_slice(from));
                let target = MatrixMut::new(c, m, n).with_row_stride(width);
                isa.with(|| matmul(precision, left, right, target, onto));
                let rows = memory[first..].chunks(width).zip(expected.chunks(n)).take(m);
                for (row, (found, expected)) in rows.enumerate() {
                    assert_eq!(bits(&found[..n]), bits(expected), "row {row}, {precision:?} on {isa}, {first} {extra}");
                }
            }
        }
    }
}

#[test]
fn views_may_be_strided_and_transposed() {
    let (m, n, k) = (21, 45, 38);
    let (a, b) = (noise(1, m * k), noise(2, k * n));
    let transpose = |x: &[f32], rows: usize, cols: usize, stride: usize| {
        let mut out = vec![f32::NAN; cols * stride];
        for i in 0..rows {
            for j in 0..cols {
                out[j * stride + i] = x[i * cols + j];
            }
        }
        out
    };
    let (a_t, b_t) = (transpose(&a, m, k, m + 3), transpose(&b, k, n, k + 5));
    for precision in [Precision::F32, Precision::Bf16] {
        let mut expected = vec![0.0; m * n];
        naive(precision, (m, n, k), &a, &b, &mut expected, false);
        let left = Matrix::new(&a_t, k, m).with_row_stride(m + 3).transposed();
        let right = Matrix::new(&b_t, n, k).with_row_stride(k + 5).transposed();
        let mut c = vec![5.0; m * (n + 2)];
        matmul(precision, left, right, MatrixMut::new(&mut c, m, n).with_row_stride(n + 2), Onto::Zero);
        for i in 0..m {
            assert_eq!(bits(&c[i * (n + 2)..][..n]), bits(&expected[i * n..][..n]));
            assert_eq!(c[i * (n + 2) + n..][..2], [5.0, 5.0], "what lies between the rows is left alone");
        }
    }
}

#[test]
fn matrices_side_by_side_equal_each_alone() {
    let parts = [40, 7, 64, 20];
    let n: usize = parts.iter().sum();
    for (isa, k) in available().flat_map(|isa| [50, 51].map(|k| (isa, k))) {
        let a = noise(3, 9 * k);
        for precision in [Precision::F32, Precision::Bf16] {
            isa.with(|| {
                let mut together = PackedMatrix::new(precision, k, n);
                let mut first = 0;
                let mut expected = vec![0.0; 9 * n];
                for (index, width) in parts.into_iter().enumerate() {
                    let b = noise(index as u64 + 10, k * width);
                    together.pack(first, Matrix::new(&b, k, width));
                    let target = MatrixMut::new(&mut expected[first..], 9, width).with_row_stride(n);
                    matmul(precision, Matrix::new(&a, 9, k), Matrix::new(&b, k, width), target, Onto::Zero);
                    first += width;
                }
                let mut c = vec![0.0; 9 * n];
                together.matmul(Matrix::new(&a, 9, k), MatrixMut::new(&mut c, 9, n), Onto::Zero);
                assert_eq!(bits(&c), bits(&expected), "{precision:?} on {isa}");
            });
        }
    }
}

#[test]
fn a_packed_matrix_stays_with_its_instruction_set() {
    let (m, n, k) = (13, 70, 51);
    let (a, b) = (noise(1, m * k), noise(2, k * n));
    for precision in [Precision::F32, Precision::Bf16] {
        let mut products = Vec::new();
        for [packed_for, called_under] in available().flat_map(|one| available().map(move |other| [one, other])) {
            let mut right = packed_for.with(|| PackedMatrix::new(precision, k, n));
            let mut c = vec![0.0; m * n];
            called_under.with(|| {
                right.pack(0, Matrix::new(&b, k, n));
                right.matmul(Matrix::new(&a, m, k), MatrixMut::new(&mut c, m, n), Onto::Zero);
            });
            products.push(bits(&c));
        }
        assert!(products.windows(2).all(|pair| pair[0] == pair[1]), "{precision:?}");
    }
}

#[test]
fn bfloat16_keeps_nan_and_infinity() {
    for isa in available() {
        for value in [f32::NAN, f32::from_bits(0x7fff_ffff), f32::from_bits(0x7f80_0001)] {
            let mut c = [0.0];
            isa.with(|| {
                matmul(
                    Precision::Bf16,
                    Matrix::new(&[value], 1, 1),
                    Matrix::new(&[1.0], 1, 1),
                    MatrixMut::new(&mut c, 1, 1),
                    Onto::Zero,
                )
            });
            assert!(c[0].is_nan(), "{isa}");
        }
        let mut c = [0.0];
        isa.with(|| {
            matmul(
                Precision::Bf16,
                Matrix::new(&[f32::INFINITY], 1, 1),
                Matrix::new(&[-2.0], 1, 1),
                MatrixMut::new(&mut c, 1, 1),
                Onto::Zero,
            )
        });
        assert_eq!(c[0], f32::NEG_INFINITY, "{isa}");
    }
}

#[test]
fn an_empty_sum_is_zero_or_what_was_there() {
    let mut c = [3.0, 4.0];
    matmul(Precision::F32, Matrix::new(&[], 1, 0), Matrix::new(&[], 0, 2), MatrixMut::new(&mut c, 1, 2), Onto::Held);
    assert_eq!(c, [3.0, 4.0]);
    matmul(Precision::F32, Matrix::new(&[], 1, 0), Matrix::new(&[], 0, 2), MatrixMut::new(&mut c, 1, 2), Onto::Zero);
    assert_eq!(c, [0.0, 0.0]);
    let onto = Onto::Rows(Matrix::new(&[5.0, 6.0], 1, 2));
    matmul(Precision::F32, Matrix::new(&[], 1, 0), Matrix::new(&[], 0, 2), MatrixMut::new(&mut c, 1, 2), onto);
    assert_eq!(c, [5.0, 6.0]);
}

#[test]
#[should_panic(expected = "matmul: 2x3 times 2x3 into 2x3")]
fn shapes_that_do_not_fit_are_refused() {
    let x = [0.0; 6];
    matmul(
        Precision::F32,
        Matrix::new(&x, 2, 3),
        Matrix::new(&x, 2, 3),
        MatrixMut::new(&mut [0.0; 6], 2, 3),
        Onto::Zero,
    );
}

#[test]
#[should_panic(expected = "needs 9 elements")]
fn a_view_beyond_its_data_is_refused() {
    let _ = Matrix::new(&[0.0; 8], 2, 4).with_row_stride(5);
}

fn product(precision: Precision, (m, n, k): (usize, usize, usize), a: &[f32], b: &[f32]) -> Vec<f32> {
    let mut c = vec![0.0; m * n];
    matmul(precision, Matrix::new(a, m, k), Matrix::new(b, k, n), MatrixMut::new(&mut c, m, n), Onto::Zero);
    c
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_row_does_not_depend_on_the_others(m in 1usize..60, n in 1usize..90, k in 1usize..700, pick in 0usize..60, bf16: bool) {
        let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
        let (a, b) = (noise(m as u64, m * k), noise(n as u64, k * n));
        let row = pick % m;
        let all = product(precision, (m, n, k), &a, &b);
        let one = product(precision, (1, n, k), &a[row * k..][..k], &b);
        prop_assert_eq!(bits(&all[row * n..][..n]), bits(&one));
    }

    #[test]
    fn a_sum_may_be_cut_anywhere(m in 1usize..60, n in 1usize..70, half in 1usize..330, rest in 1usize..400, bf16: bool) {
        let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
        let (cut, k) = (2 * half, 2 * half + rest);
        let (a, b) = (noise(5, m * k), noise(6, k * n));
        let whole = product(precision, (m, n, k), &a, &b);
        let mut c = vec![0.0; m * n];
        let left = |from: usize, len: usize| Matrix::new(&a[from..], m, len).with_row_stride(k);
        matmul(precision, left(0, cut), Matrix::new(&b, cut, n), MatrixMut::new(&mut c, m, n), Onto::Zero);
        matmul(precision, left(cut, rest), Matrix::new(&b[cut * n..], rest, n), MatrixMut::new(&mut c, m, n), Onto::Held);
        prop_assert_eq!(bits(&whole), bits(&c));
    }
}

#[test]
fn threads_do_not_change_bits() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
    for shape @ (m, n, k) in [(300, 200, 400), (16, 900, 600), (2000, 70, 64)] {
        let (a, b) = (noise(5, m * k), noise(6, k * n));
        for precision in [Precision::F32, Precision::Bf16] {
            let one = pool(1).install(|| product(precision, shape, &a, &b));
            for threads in [2, 3] {
                assert_eq!(bits(&one), bits(&pool(threads).install(|| product(precision, shape, &a, &b))));
            }
        }
    }
}
