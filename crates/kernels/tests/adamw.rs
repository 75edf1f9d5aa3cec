//! AdamW with moments in bfloat16: unbiased, and a function of its inputs alone.

use base::{Purpose, Random};
use kernels::{AdamW, AdamWStep, Isa};
use posttrain_kernels as kernels;

use crate::common::{bits, noise};

const METHOD: AdamW = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };

fn step(step: u64) -> AdamWStep {
    AdamWStep { step, learning_rate: 0.01, weight_decay: 0.1, gradient_scale: 0.5 }
}

fn draws(step: u32) -> Random {
    Random::new(1, Purpose::Rounding).step(step)
}

fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    assert_eq!(bits & 0xffff, 0, "{x} is a bfloat16");
    (bits >> 16) as u16
}

fn widened(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

fn mean(x: &[u16]) -> f64 {
    x.iter().map(|&x| f64::from(widened(x))).sum::<f64>() / x.len() as f64
}

/// Parameter and moments after five updates of `n` elements.
fn updated(n: usize) -> (Vec<f32>, Vec<u16>, Vec<u16>) {
    let (mut p, mut m, mut v) = (noise(1, n), vec![0; n], vec![0; n]);
    for number in 1..=5 {
        METHOD.update_bf16(step(number), &mut p, &noise(10 + number, n), &mut m, &mut v, draws(number as u32));
    }
    (p, m, v)
}

#[test]
fn the_expected_moment_is_the_moment() {
    let n = 1 << 18;
    // Moments of both signs, some far down among the subnormal numbers.
    for (m0, v0, g) in [(1.0, 2.0, 1.234), (-3.0, 0.5, -0.777), (2f32.powi(-130), 2f32.powi(-131), 1e-20)] {
        let (mut p, mut m, mut v) = (vec![0.0; n], vec![bf16(m0); n], vec![bf16(v0); n]);
        METHOD.update_bf16(step(3), &mut p, &vec![g; n], &mut m, &mut v, draws(3));
        let (mut exact_p, mut exact_m, mut exact_v) = ([0f32], [m0], [v0]);
        METHOD.update(step(3), &mut exact_p, &[g], &mut exact_m, &mut exact_v);
        assert_eq!(bits(&p), vec![exact_p[0].to_bits(); n], "the parameter moves by what is not rounded yet");
        for (stored, exact) in [(&m, exact_m[0]), (&v, exact_v[0])] {
            let below = widened((exact.to_bits() >> 16) as u16);
            let above = widened((exact.to_bits() >> 16) as u16 + 1);
            assert!(
                stored.iter().all(|&x| [below, above].contains(&widened(x))),
                "{exact} lies between {below} and {above}"
            );
            // Four standard deviations of the mean of `n` draws between the two.
            let tolerance = 4.0 * 0.5 * f64::from((above - below).abs()) / (n as f64).sqrt();
            assert!((mean(stored) - f64::from(exact)).abs() < tolerance, "{exact}: {}", mean(stored));
        }
    }
}

/// The case that rounding to the nearest fails: at beta2 = 0.999 a step moves the second moment by less than half of its last
/// bit.
#[test]
fn the_second_moment_follows_where_the_nearest_would_stall() {
    let (n, steps, gradient) = (4096, 1000, 2.0);
    let (mut p, mut m, mut v) = (vec![0.0; n], vec![0; n], vec![bf16(1.0); n]);
    let mut exact = 1.0;
    let mut nearest: f32 = 1.0;
    for number in 1..=steps {
        let one = AdamWStep { gradient_scale: 1.0, ..step(number) };
        METHOD.update_bf16(one, &mut p, &vec![gradient; n], &mut m, &mut v, draws(number as u32));
        exact = 0.999 * exact + 0.001 * f64::from(gradient * gradient);
        let moved = (0.999 * nearest + 0.001 * gradient * gradient).to_bits();
        nearest = f32::from_bits((moved + 0x7fff + (moved >> 16 & 1)) & 0xffff_0000);
    }
    assert_eq!(nearest, 1.0, "rounding to the nearest has stalled");
    assert!(exact > 2.8);
    assert!((mean(&v) / exact - 1.0).abs() < 0.002, "{} instead of {exact}", mean(&v));
    let spread = v.iter().map(|&v| (f64::from(widened(v)) / exact - 1.0).powi(2)).sum::<f64>() / n as f64;
    assert!(spread.sqrt() < 0.1, "single elements stray by {} of the moment", spread.sqrt());
}

#[test]
fn instruction_sets_and_threads_change_no_bit() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let n = 100_003;
    let expected = pool(1).install(|| updated(n));
    assert!(expected == pool(2).install(|| updated(n)));
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        assert!(expected == isa.with(|| updated(n)), "{isa}");
    }
}

#[test]
fn elements_do_not_see_how_many_follow() {
    let (p, m, v) = updated(70_001);
    for n in [1, 15, 64, 65, 40_000] {
        let (short_p, short_m, short_v) = updated(n);
        assert!(short_p == p[..n] && short_m == m[..n] && short_v == v[..n], "{n} elements");
    }
}
