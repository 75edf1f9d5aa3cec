use posttrain_kernels::*;
use std::time::Instant;
fn best(n: usize, mut f: impl FnMut()) -> f64 {
    let mut b = f64::MAX;
    for _ in 0..n {
        let t = Instant::now();
        f();
        b = b.min(t.elapsed().as_secs_f64());
    }
    b
}
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
    // bandwidth
    let big = vec![1.0f32; 128 << 20];
    use rayon::prelude::*;
    let t = best(5, || {
        let s: f32 = big
            .par_chunks(1 << 20)
            .map(|c| {
                let mut a = [0.0f32; 64];
                for x in c.chunks_exact(64) {
                    for i in 0..64 {
                        a[i] += x[i];
                    }
                }
                a.iter().sum::<f32>()
            })
            .sum();
        std::hint::black_box(s);
    });
    println!("read bandwidth {:.1} GB/s", big.len() as f64 * 4.0 / t / 1e9);
    drop(big);
    for precision in [Precision::F32, Precision::Bf16] {
        // peak-ish: cached
        for (rows, k, n) in
            [(144usize, 576usize, 576usize), (2048, 576, 3072), (2048, 1536, 576), (2048, 576, 960), (512, 576, 49152)]
        {
            let a = vec![0.5f32; rows * k];
            let b = vec![0.25f32; k * n];
            let mut c = vec![0.0f32; rows * n];
            let mut p = PackedMatrix::new(precision, k, n);
            p.pack(0, Matrix::new(&b, k, n));
            let t = best(5, || p.matmul(Matrix::new(&a, rows, k), MatrixMut::new(&mut c, rows, n), false));
            println!("{precision:?} packed {rows}x{k}x{n}: {:.0} GF/s", 2.0 * (rows * k * n) as f64 / t / 1e9);
        }
        for rows in [1usize, 4, 8, 16, 32] {
            let mut tot = 0.0;
            let mut bytes = 0.0;
            let mut fl = 0.0;
            for (k, n, count) in
                [(576usize, 960usize, 30usize), (576, 576, 30), (576, 3072, 30), (1536, 576, 30), (576, 49152, 1)]
            {
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
                let t = med(7, || {
                    for p in &ps {
                        p.matmul(Matrix::new(&a, rows, k), MatrixMut::new(&mut c, rows, n), false)
                    }
                });
                let by: f64 = ps.iter().map(|p| p.bytes() as f64).sum();
                println!(
                    "{precision:?} rows {rows} {k}x{n} x{count}: {:.2} ms  {:.1} GB/s {:.0} GF/s",
                    t * 1e3,
                    by / t / 1e9,
                    2.0 * (rows * k * n * count) as f64 / t / 1e9
                );
                tot += t;
                bytes += by;
                fl += 2.0 * (rows * k * n * count) as f64;
            }
            println!(
                "== {precision:?} rows {rows}: {:.2} ms, {:.1} GB/s, {:.0} GF/s",
                tot * 1e3,
                bytes / tot / 1e9,
                fl / tot / 1e9
            );
        }
    }
}
