//! The row kernels against f64 references and finite differences, on every instruction set.

use kernels::{Activation, AdamW, AdamWStep, HeadRange, Isa, RopeTable, RowStats};
use posttrain_kernels as kernels;

use crate::common::{bits, noise};

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// What `work` gives, checked to be the same on every instruction set.
fn everywhere(work: impl Fn() -> Vec<f32>) -> Vec<f32> {
    let first = work();
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        assert_eq!(bits(&isa.with(&work)), bits(&first), "{isa} differs");
    }
    first
}

/// Asserts that `gradient` is the derivative of `value` at `x`, along every axis.
fn check_gradient(value: impl Fn(&[f64]) -> f64, x: &[f32], gradient: &[f32]) {
    let epsilon = 1e-6;
    for i in 0..x.len() {
        let moved = |sign: f64| {
            let mut x = wide(x);
            x[i] += sign * epsilon;
            value(&x)
        };
        let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * epsilon);
        let analytic = f64::from(gradient[i]);
        assert!((numeric - analytic).abs() < 2e-5 * (1.0 + numeric.abs()), "axis {i}: {numeric} and {analytic}");
    }
}

fn rms_norm(x: &[f64], weight: &[f64], offset: f64, epsilon: f64) -> Vec<f64> {
    x.chunks(weight.len())
        .flat_map(|x| {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let inverse = 1.0 / (mean + epsilon).sqrt();
            x.iter().zip(weight).map(|(x, w)| x * inverse * (offset + w)).collect::<Vec<_>>()
        })
        .collect()
}

fn inner(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}

#[test]
fn rms_norm_and_its_gradient() {
    for (width, offset) in [(37, 0.0), (64, 1.0), (3, 0.0)] {
        let rows = 5;
        let (x, weight, dy) = (noise(1, rows * width), noise(2, width), noise(3, rows * width));
        let forward = || {
            let (mut y, mut inverse) = (vec![0.0; rows * width], vec![0.0; rows]);
            kernels::rms_norm(&x, &weight, offset, 1e-5, &mut y, &mut inverse);
            y.extend(inverse);
            y
        };
        let result = everywhere(forward);
        let (y, inverse) = result.split_at(rows * width);
        let expected = rms_norm(&wide(&x), &wide(&weight), f64::from(offset), f64::from(1e-5f32));
        assert!(y.iter().zip(&expected).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5));
        let gradients = everywhere(|| {
            let (mut dx, mut dweight) = (vec![1.0; rows * width], vec![2.0; width]);
            kernels::rms_norm_backward(&x, &weight, offset, inverse, &dy, &mut dx, Some(&mut dweight));
            dx.extend(dweight);
            dx
        });
        let added = |from: f32, x: &[f32]| x.iter().map(|x| x - from).collect::<Vec<_>>();
        let (epsilon, offset) = (f64::from(1e-5f32), f64::from(offset));
        check_gradient(
            |x| inner(&rms_norm(x, &wide(&weight), offset, epsilon), &dy),
            &x,
            &added(1.0, &gradients[..rows * width]),
        );
        check_gradient(
            |w| inner(&rms_norm(&wide(&x), w, offset, epsilon), &dy),
            &weight,
            &added(2.0, &gradients[rows * width..]),
        );
    }
}

#[test]
fn head_norm_is_rms_norm_of_its_heads() {
    let range = HeadRange { width: 40, first: 1, heads: 2, head_dim: 8 };
    let (rows, weight) = (noise(1, 3 * 40), noise(2, 8));
    let (mut normed, mut input, mut inverse) = (rows.clone(), vec![0.0; 3 * 16], vec![0.0; 6]);
    kernels::head_norm(range, &mut normed, &weight, 1.0, 1e-6, &mut input, &mut inverse);
    let (mut expected, mut expected_inverse) = (vec![0.0; 48], vec![0.0; 6]);
    kernels::rms_norm(&input, &weight, 1.0, 1e-6, &mut expected, &mut expected_inverse);
    let d = noise(3, 3 * 40);
    let (mut d_rows, mut dweight) = (d.clone(), vec![0.0; 8]);
    kernels::head_norm_backward(range, &input, &inverse, &weight, 1.0, &mut d_rows, Some(&mut dweight));
    let d_heads: Vec<f32> = d.chunks(40).flat_map(|row| row[8..24].to_vec()).collect();
    let (mut dx, mut expected_dweight) = (vec![0.0; 48], vec![0.0; 8]);
    kernels::rms_norm_backward(&input, &weight, 1.0, &inverse, &d_heads, &mut dx, Some(&mut expected_dweight));
    assert_eq!(bits(&inverse), bits(&expected_inverse));
    assert_eq!(bits(&dweight), bits(&expected_dweight));
    for row in 0..3 {
        assert_eq!(input[row * 16..][..16], rows[row * 40 + 8..][..16], "the input is kept");
        assert_eq!(normed[row * 40 + 8..][..16], expected[row * 16..][..16]);
        assert_eq!(d_rows[row * 40 + 8..][..16], dx[row * 16..][..16]);
        for (now, before) in [(&normed, &rows), (&d_rows, &d)] {
            assert_eq!(now[row * 40..][..8], before[row * 40..][..8], "other heads are left alone");
            assert_eq!(now[row * 40 + 24..][..16], before[row * 40 + 24..][..16], "other heads are left alone");
        }
    }
}

#[test]
fn rope_turns_and_turns_back() {
    let frequencies = [1.0, 0.1, 0.01, 0.001];
    let table = RopeTable::new(&frequencies, 1.0, 50);
    assert_eq!(table.max_positions(), 50);
    let range = HeadRange { width: 20, first: 0, heads: 2, head_dim: 8 };
    let rows = noise(1, 3 * 20);
    let positions = [0, 7, 49];
    let turned = everywhere(|| {
        let mut turned = rows.clone();
        kernels::rope(&mut turned, range, &positions, &table, false);
        turned
    });
    assert_eq!(turned[..20], rows[..20], "position 0 does not turn");
    for (row, &position) in positions.iter().enumerate() {
        for head in 0..2 {
            for (i, frequency) in frequencies.iter().enumerate() {
                let (at, angle) = (row * 20 + head * 8 + i, f64::from(position) * frequency);
                let (x, y) = (f64::from(rows[at]), f64::from(rows[at + 4]));
                assert!((f64::from(turned[at]) - (x * angle.cos() - y * angle.sin())).abs() < 1e-6);
                assert!((f64::from(turned[at + 4]) - (y * angle.cos() + x * angle.sin())).abs() < 1e-6);
            }
        }
    }
    let mut back = turned;
    kernels::rope(&mut back, range, &positions, &table, true);
    assert!(back.iter().zip(&rows).all(|(a, b)| (a - b).abs() < 1e-6));
}

/// The whole table would take 16 GiB.
#[test]
fn only_positions_that_are_used_take_memory() {
    let frequencies: Vec<f64> = (0..128).map(|i| 1e4f64.powf(-f64::from(i) / 128.0)).collect();
    let positions = 1 << 24;
    let table = RopeTable::new(&frequencies, 0.5, positions);
    for position in [0, 255, 256, 1000, positions - 1] {
        let row = table.row(position);
        assert_eq!(row.len(), 256);
        for (i, frequency) in frequencies.iter().enumerate() {
            let angle = position as f64 * frequency;
            let expected = [(angle.cos() * 0.5) as f32, (angle.sin() * 0.5) as f32];
            assert_eq!(bits(&[row[i], row[i + 128]]), bits(&expected));
        }
    }
}

#[test]
fn gated_activations_and_their_gradients() {
    type Function = fn(f64) -> f64;
    let activations: [(Activation, Function); 2] = [
        (Activation::Silu, |x| x / (1.0 + (-x).exp())),
        (Activation::GeluTanh, |x| {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }),
    ];
    let (rows, width) = (3, 11);
    for (activation, function) in activations {
        let gate_up: Vec<f32> = noise(1, rows * 2 * width).iter().map(|x| 4.0 * x).collect();
        let d_out = noise(2, rows * width);
        let value = |gate_up: &[f64]| -> Vec<f64> {
            gate_up
                .chunks(2 * width)
                .flat_map(|row| (0..width).map(|i| function(row[i]) * row[width + i]).collect::<Vec<_>>())
                .collect()
        };
        let out = everywhere(|| {
            let mut out = vec![0.0; rows * width];
            kernels::gated(activation, &gate_up, width, &mut out);
            out
        });
        assert!(out.iter().zip(value(&wide(&gate_up))).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5));
        let gradient = everywhere(|| {
            let (mut gradient, mut again) = (gate_up.clone(), d_out.clone());
            kernels::gated_backward(activation, &mut gradient, width, &mut again);
            assert_eq!(again, out, "the result once more");
            gradient
        });
        check_gradient(|x| inner(&value(x), &d_out), &gate_up, &gradient);
        let mut out = [0.0; 2];
        kernels::gated(activation, &[-1e4, 1e4, 1.0, 1.0], 2, &mut out);
        assert_eq!(out, [0.0, 1e4], "far from zero");
    }
}

fn log_softmax(logits: &[f64], t: f64, target: usize) -> (f64, f64) {
    let largest = logits.iter().map(|x| x * t).fold(f64::NEG_INFINITY, f64::max);
    let log_total = logits.iter().map(|x| (x * t - largest).exp()).sum::<f64>().ln() + largest;
    let entropy = -logits.iter().map(|x| (x * t - log_total).exp() * (x * t - log_total)).sum::<f64>();
    (logits[target] * t - log_total, entropy)
}

#[test]
fn log_softmax_rows_and_their_gradient() {
    for (n, t) in [(1, 1.0), (50, 1.0), (333, 1.0 / 0.7)] {
        let logits: Vec<f32> = noise(n as u64, n).iter().map(|x| 6.0 * x).collect();
        let target = n / 3;
        let result = everywhere(|| {
            let RowStats { log_prob, log_sum_exp, entropy, .. } = kernels::log_softmax_row(&logits, t, target);
            vec![log_prob, log_sum_exp, entropy]
        });
        let (log_prob, entropy) = log_softmax(&wide(&logits), f64::from(t), target);
        assert!((f64::from(result[0]) - log_prob).abs() < 1e-5, "{} and {log_prob}", result[0]);
        assert!((f64::from(result[2]) - entropy).abs() < 1e-5, "{} and {entropy}", result[2]);
        let mut weights = vec![0.0; n];
        let normalizer = kernels::softmax_weights(&logits, t, &mut weights);
        assert_eq!(normalizer.log_prob(logits[target]).to_bits(), result[0].to_bits());
        let gradient = everywhere(|| {
            let mut row = logits.clone();
            let stats = kernels::log_softmax_row(&row, t, target);
            kernels::log_softmax_backward_row(&mut row, t, target, stats, 0.8, -0.3);
            row
        });
        let value = |x: &[f64]| {
            let (log_prob, entropy) = log_softmax(x, f64::from(t), target);
            f64::from(0.8f32) * log_prob + f64::from(-0.3f32) * entropy
        };
        check_gradient(value, &logits, &gradient);
    }
}

#[test]
fn the_most_probable_targets_are_those_with_the_largest_logit() {
    let logits = [0.5, -1.0, 2.0, 2.0, f32::NEG_INFINITY];
    let found = [0, 1, 2, 3, 4].map(|target| kernels::log_softmax_row(&logits, 1.0, target).most_probable);
    assert_eq!(found, [false, false, true, true, false]);
}

#[test]
fn extreme_logits_have_defined_results() {
    let stats = kernels::log_softmax_row(&[-1e4, 0.0, f32::NEG_INFINITY], 1.0, 1);
    assert_eq!((stats.log_prob, stats.entropy), (0.0, 0.0));
    assert_eq!(kernels::log_softmax_row(&[-1e4, 0.0, f32::NEG_INFINITY], 1.0, 0).log_prob, -1e4);
    assert_eq!(kernels::log_softmax_row(&[-1e4, 0.0, f32::NEG_INFINITY], 1.0, 2).log_prob, f32::NEG_INFINITY);
    for bad in [f32::NAN, f32::INFINITY] {
        assert!(kernels::log_softmax_row(&[0.0, bad, 1.0], 1.0, 0).log_prob.is_nan(), "{bad}");
    }
    assert!(kernels::log_softmax_row(&[f32::NEG_INFINITY; 2], 1.0, 0).log_prob.is_nan());
    let mut weights = [0.0; 3];
    kernels::softmax_weights(&[1.0, 3.0, f32::NEG_INFINITY], 1.0, &mut weights);
    assert_eq!((weights[1], weights[2]), (1.0, 0.0));
    assert!((weights[0] - (-2.0f32).exp()).abs() < 1e-7);
}

#[test]
fn exp_and_ln_are_close_to_the_truth() {
    for i in 0..200_000 {
        let x = -86.9 + 175.6 * i as f32 / 200_000.0;
        let truth = f64::from(x).exp();
        assert!((f64::from(kernels::exp(x)) / truth - 1.0).abs() < 1.5e-7, "exp({x})");
        assert_eq!(kernels::ln(truth as f32), f64::from(truth as f32).ln() as f32, "ln({truth})");
    }
    assert_eq!(
        (kernels::exp(0.0), kernels::exp(f32::NEG_INFINITY), kernels::exp(f32::INFINITY)),
        (1.0, 0.0, f32::INFINITY)
    );
    assert!(kernels::exp(f32::NAN).is_nan() && kernels::ln(-1.0).is_nan() && kernels::ln(f32::NAN).is_nan());
    assert_eq!(
        (kernels::ln(0.0), kernels::ln(1.0), kernels::ln(f32::INFINITY)),
        (f32::NEG_INFINITY, 0.0, f32::INFINITY)
    );
}

#[test]
fn adamw_follows_its_formula() {
    let method = AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8 };
    let n = 1000;
    let result = everywhere(|| {
        let (mut p, mut m, mut v) = (noise(1, n), vec![0.0; n], vec![0.0; n]);
        for step in 1..=5 {
            let gradient = noise(10 + step, n);
            let step = AdamWStep { step, learning_rate: 0.01, weight_decay: 0.1, gradient_scale: 0.5 };
            method.update(step, &mut p, &gradient, &mut m, &mut v);
        }
        p
    });
    let (mut p, mut m, mut v) = (wide(&noise(1, n)), vec![0.0; n], vec![0.0; n]);
    for step in 1..=5 {
        for (i, gradient) in noise(10 + step, n).into_iter().enumerate() {
            let g = 0.5 * f64::from(gradient);
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.95 * v[i] + 0.05 * g * g;
            let (m, v) = (m[i] / (1.0 - 0.9f64.powi(step as i32)), v[i] / (1.0 - 0.95f64.powi(step as i32)));
            p[i] -= 0.01 * (m / (v.sqrt() + 1e-8) + 0.1 * p[i]);
        }
    }
    assert!(result.iter().zip(&p).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5));
}

#[test]
fn a_part_of_a_slice_gets_the_same_bits() {
    // Remainders and alignment must not matter: each element is the same function of its inputs.
    let x = noise(1, 4000);
    let whole = {
        let mut out = vec![0.0; 2000];
        kernels::gated(Activation::Silu, &x, 2000, &mut out);
        out
    };
    for (start, len) in [(1, 1), (3, 17), (5, 63), (999, 1001)] {
        let part = [&x[start..start + len], &x[2000 + start..2000 + start + len]].concat();
        let mut out = vec![0.0; len];
        kernels::gated(Activation::Silu, &part, len, &mut out);
        assert_eq!(bits(&out), bits(&whole[start..start + len]));
    }
}

#[test]
fn small_elementwise_kernels() {
    let x = noise(1, 100_000);
    let sum = kernels::sum_of_squares(&x);
    let expected: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    assert!((sum - expected).abs() < 1e-9 * expected);
    assert_eq!(kernels::finite(&x), None);
    for (index, bad) in [(0, f32::NAN), (40_000, f32::INFINITY), (99_999, f32::NEG_INFINITY)] {
        let mut x = x.clone();
        x[index] = bad;
        assert_eq!(kernels::finite(&x), Some(index));
    }
    let mut rows = vec![1.0; 6];
    kernels::add_bias(&mut rows, &[1.0, 2.0, 3.0]);
    assert_eq!(rows, [2.0, 3.0, 4.0, 2.0, 3.0, 4.0]);
    let mut d_bias = [1.0, 0.0, 0.0];
    kernels::bias_backward(&rows, &mut d_bias);
    assert_eq!(d_bias, [5.0, 6.0, 8.0]);
    kernels::scale(&mut d_bias, 2.0);
    kernels::add(&mut d_bias, &[1.0; 3]);
    assert_eq!(d_bias, [11.0, 13.0, 17.0]);
}

#[test]
fn rows_go_to_their_places_and_nothing_else_changes() {
    // Widths and starts that no vector divides.
    for width in [1, 3, 9, 16, 37, 576] {
        let from = noise(width as u64, 9 * width);
        let mut to = noise(99, 1 + 12 * width);
        let before = to.clone();
        let rows = [(8, 3), (0, 11), (4, 0), (5, 5)];
        let mut arrays = [kernels::RowCopy { width, from: &from, to: &mut to[1..] }];
        kernels::copy_rows(&mut arrays, &rows);
        assert_eq!(to[0], before[0]);
        for place in 0..12 {
            let expected = match rows.iter().find(|(_, to)| *to == place) {
                Some((row, _)) => &from[row * width..][..width],
                None => &before[1 + place * width..][..width],
            };
            assert_eq!(&to[1 + place * width..][..width], expected, "place {place} of width {width}");
        }
    }
}

#[test]
#[should_panic(expected = "two rows go to the same place")]
fn rows_that_meet_are_refused() {
    let mut to = [0.0; 4];
    kernels::copy_rows(&mut [kernels::RowCopy { width: 2, from: &[1.0; 4], to: &mut to }], &[(0, 1), (1, 1)]);
}
