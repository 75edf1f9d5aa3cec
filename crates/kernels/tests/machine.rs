//! What the machine can do, and where the time goes.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

use posttrain_kernels::{Matrix, MatrixMut, Onto, PackedMatrix, Precision, Profiler, bandwidth, matmul, matrix_peak};

#[test]
fn the_roofline_has_a_height() {
    for precision in [Precision::F32, Precision::Bf16] {
        let peak = matrix_peak(precision);
        assert!(peak.is_finite() && peak > 1e6, "{precision:?}: {peak} operations a second");
    }
    let memory = bandwidth();
    for rate in [memory.read, memory.update] {
        assert!(rate.is_finite() && rate > 1e6, "{memory:?}");
    }
}

// One test, because the counters belong to the process.
#[test]
fn a_profiler_counts_while_it_lives() {
    let (m, k, n) = (5, 7, 11);
    let (a, b, mut c) = (vec![1.0; m * k], vec![1.0; k * n], vec![0.0; m * n]);
    let mut packed = PackedMatrix::new(Precision::F32, k, n);
    packed.pack(0, Matrix::new(&b, k, n));
    let mut multiply = || {
        matmul(Precision::F32, Matrix::new(&a, m, k), Matrix::new(&b, k, n), MatrixMut::new(&mut c, m, n), Onto::Zero);
        packed.matmul(Matrix::new(&a, m, k), MatrixMut::new(&mut c, m, n), Onto::Held);
    };
    let (outer, first) = {
        let outer = Profiler::start();
        multiply();
        let inner = Profiler::start();
        multiply();
        (outer.read(), inner.read())
    };
    let operations = 2.0 * (m * k * n) as f64;
    assert_eq!((first.products.calls, first.products.operations), (2, 2.0 * operations));
    assert_eq!((outer.products.calls, outer.products.operations), (4, 4.0 * operations));
    assert!(first.products.seconds > 0.0 && first.products.seconds <= outer.products.seconds);
    assert_eq!(first.attention.calls, 0);
    multiply();
    let later = Profiler::start();
    assert_eq!(later.read().products.calls, 0, "nothing is counted while nobody asks");
}
