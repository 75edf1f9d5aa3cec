use posttrain_kernels::*;
use std::time::Instant;
fn med(n: usize, mut f: impl FnMut()) -> f64 {
    let mut v = vec![];
    for _ in 0..n {
        let t = Instant::now();
        f();
        v.push(t.elapsed().as_secs_f64());
    }
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}
fn main() {
    let l: Vec<f32> = (0..49152).map(|i| (i % 97) as f32 * 0.1).collect();
    let mut w = l.clone();
    println!(
        "max+sums row {:.1} us",
        1e6 * med(99, || {
            std::hint::black_box(log_softmax_row(&l, 1.0, 5));
        })
    );
    println!(
        "weights row {:.1} us",
        1e6 * med(99, || {
            std::hint::black_box(softmax_weights(&l, 1.0, &mut w));
        })
    );
    if std::env::args().len() > 1 {
        return;
    }

    for precision in [Precision::F32, Precision::Bf16] {
        for rows in [8usize, 12, 16, 24, 32] {
            for (k, n) in [(576usize, 960usize), (576, 576), (576, 3072), (1536, 576)] {
                for count in [1usize, 60] {
                    let b = vec![0.25f32; k * n];
                    let ps: Vec<PackedMatrix> = (0..count)
                        .map(|_| {
                            let mut p = PackedMatrix::new(precision, k, n);
                            p.pack(0, Matrix::new(&b, k, n));
                            p
                        })
                        .collect();
                    let a = vec![0.5f32; rows * k];
                    let mut c = vec![0.0f32; rows * n];
                    let t = med(21, || {
                        for i in 0..60 {
                            ps[i % count].matmul(Matrix::new(&a, rows, k), MatrixMut::new(&mut c, rows, n), false)
                        }
                    });
                    print!(
                        "{precision:?} rows {rows} {k}x{n} x{count}: {:.1} us {:.0} GF/s   ",
                        t * 1e6 / 60.0,
                        2.0 * (rows * k * n * 60) as f64 / t / 1e9
                    );
                }
                println!();
            }
        }
    }
}
