//! Losses of whole distributions: against TRL, transformers and torch, against autodiff and finite differences, at their
//! limits and extremes.

use candle_core::{D, Device, Tensor, Var};
use objectives::distillation::{DistillationOptions, DistilledRow, Divergence, Estimate, Mixing, TokenTerm};
use objectives::distribution::by_autodiff;
use objectives::sft::{SftLoss, SftObjective};
use objectives::unlearning::{Forget, ForgetBatch, UnlearningOptions, forget, masked_target_row, unlikely_row};
use posttrain_objectives as objectives;
use proptest::prelude::*;
use serde_json::Value;

fn reference() -> Value {
    serde_json::from_str(include_str!("../../../tests/reference/distributions.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

/// The reference's tensors.
struct Given {
    all: Value,
    vocabulary: usize,
    tokens: Vec<u32>,
    weights: Vec<f64>,
    lengths: Vec<usize>,
}

impl Given {
    fn new() -> Self {
        let all = reference();
        Self {
            vocabulary: number(&all["vocabulary"]) as usize,
            tokens: numbers(&all["tokens"]).iter().map(|&token| token as u32).collect(),
            weights: numbers(&all["weights"]),
            lengths: numbers(&all["lengths"]).iter().map(|&length| length as usize).collect(),
            all,
        }
    }

    fn rows(&self, name: &str) -> Vec<Vec<f32>> {
        let all: Vec<f32> = numbers(&self.all[name]).iter().map(|&x| x as f32).collect();
        all.chunks(self.vocabulary).map(<[f32]>::to_vec).collect()
    }

    /// Compares what `row` gives for each of the student's rows with a case: `row` returns the weighted loss.
    fn check(&self, name: &str, case: &Value, mut row: impl FnMut(usize, &mut [f32]) -> f64) {
        let expected = numbers(&case["gradient"]);
        for (i, mut logits) in self.rows("student").into_iter().enumerate() {
            let loss = row(i, &mut logits);
            // transformers smooths labels in f32.
            let tolerance = if name == "smoothed" { 1e-7 } else { 1e-12 };
            close(loss, self.weights[i] * number(&case["rows"][i]), tolerance, name);
            for (got, expected) in logits.iter().zip(&expected[i * self.vocabulary..]) {
                // Gradients are handed to the engine in f32.
                assert!(
                    (f64::from(*got) - expected).abs() < 1e-7 * (expected.abs() + 0.01),
                    "{name}: {got}, {expected}"
                );
            }
        }
    }
}

fn close(got: f64, expected: f64, tolerance: f64, what: &str) {
    assert!((got - expected).abs() <= tolerance * (1.0 + expected.abs()), "{what}: {got}, expected {expected}");
}

fn named<T: serde::de::DeserializeOwned>(name: &Value) -> T {
    serde_json::from_value(name.clone()).unwrap()
}

#[test]
fn divergences_agree_with_trl() {
    let given = Given::new();
    let teacher = given.rows("teacher");
    let cases = given.all["divergences"].as_array().unwrap();
    assert_eq!(cases.len(), 16);
    for case in cases {
        let options = DistillationOptions {
            divergence: named(&case["divergence"]),
            beta: number(&case["parameter"]),
            skew: number(&case["parameter"]),
            temperature: number(&case["temperature"]),
            ..DistillationOptions::default()
        };
        let name = format!("{} {} at {}", case["divergence"], case["parameter"], case["temperature"]);
        given.check(&name, case, |i, logits| {
            let targets = options.targets(&[&teacher[i]], &[1.0]).unwrap();
            let row = options.row(logits, &targets, given.weights[i], None).unwrap();
            close(row.divergence, number(&case["rows"][i]), 1e-12, &name);
            row.loss
        });
    }
}

#[test]
fn several_teachers_agree_with_torch() {
    let given = Given::new();
    let (first, second) = (given.rows("teacher"), given.rows("second"));
    for case in given.all["mixtures"].as_array().unwrap() {
        let options = DistillationOptions { mixing: named(&case["mixing"]), ..DistillationOptions::default() };
        // Weights count relative to their sum.
        let weights: Vec<f64> = numbers(&case["shares"]).iter().map(|share| 3.0 * share).collect();
        let shares = options.shares(&weights).unwrap();
        given.check(&case["mixing"].to_string(), case, |i, logits| {
            let targets = options.targets(&[&first[i], &second[i]], &shares).unwrap();
            options.row(logits, &targets, given.weights[i], None).unwrap().loss
        });
    }
}

#[test]
fn minillm_agrees_with_torch() {
    let given = Given::new();
    let teacher = given.rows("teacher");
    for case in given.all["minillm"].as_array().unwrap() {
        let options = DistillationOptions {
            discount: number(&case["gamma"]),
            length_normalization: case["normalise"].as_bool().unwrap(),
            ..DistillationOptions::default()
        };
        let returns = options.returns(&numbers(&case["rewards"]), &given.lengths).unwrap();
        for (got, expected) in returns.iter().zip(numbers(&case["returns"])) {
            close(*got, expected, 1e-12, "return");
        }
        given.check("minillm", case, |i, logits| {
            let targets = options.targets(&[&teacher[i]], &[1.0]).unwrap();
            let weight = given.weights[i];
            let term = TokenTerm { token: given.tokens[i], coefficient: weight * returns[i], temperature: 1.0 };
            options.row(logits, &targets, weight, Some(term)).unwrap().loss
        });
    }
}

/// The coefficient of log p is minus the derivative of MiniLLM's `max(-ρ R, -clip(ρ) R)` by it, where ρ = p / m.
#[test]
fn importance_weights_are_clipped_as_in_ppo() {
    let options = DistillationOptions { epsilon: 0.2, ..DistillationOptions::default() };
    for (log_p, log_m) in [(-1.0, -1.0), (-1.0, -1.5), (-2.0, -1.0), (-1.1, -1.0), (-1.0, -1.1)] {
        for value in [0.7, -0.7] {
            let (mut weights, mut returns) = ([0.25, 0.5], [value, 3.0]);
            let ratio: f64 = f64::exp(log_p - log_m);
            options.weigh(&mut weights, &mut returns, &[ratio]);
            let loss = |log_p: f64| {
                let ratio = f64::exp(log_p - log_m);
                0.25 * f64::max(-ratio * value, -ratio.clamp(0.8, 1.2) * value)
            };
            let slope = (loss(log_p + 1e-6) - loss(log_p - 1e-6)) / 2e-6;
            close(-weights[0] * returns[0], slope, 1e-9, "slope");
            close(weights[0], 0.25 * ratio, 1e-15, "weight");
            assert_eq!((weights[1], returns[1]), (0.5, 3.0), "tokens of data");
        }
    }
}

#[test]
fn sampled_returns_are_sums_and_means_of_what_follows() {
    let options = |discount, length_normalization| DistillationOptions {
        estimate: Estimate::Sampled,
        discount,
        length_normalization,
        ..DistillationOptions::default()
    };
    let rewards = [1.0, -2.0, 4.0, 8.0];
    let of = |options: DistillationOptions| options.returns(&rewards, &[3, 0, 1]).unwrap();
    assert_eq!(of(options(0.0, true)), rewards, "without a discount factor each token answers for itself");
    assert_eq!(of(options(1.0, false)), [3.0, 2.0, 4.0, 8.0]);
    assert_eq!(of(options(1.0, true)), [1.0, 1.0, 4.0, 8.0]);
    assert_eq!(of(options(0.5, false)), [1.0, 0.0, 4.0, 8.0]);
    let full = DistillationOptions { discount: 0.0, ..DistillationOptions::default() };
    assert_eq!(full.returns(&rewards, &[3, 0, 1]).unwrap(), [0.0; 4]);
    assert!(full.returns(&rewards, &[3]).is_err());
}

#[test]
fn forms_of_fine_tuning_agree_with_trl_and_transformers() {
    let given = Given::new();
    let check = |name: &str, case: &Value, options: SftObjective| {
        given.check(name, case, |i, logits| options.row(logits, given.tokens[i], given.weights[i]).unwrap().loss);
    };
    for case in given.all["smoothed"].as_array().unwrap() {
        let label_smoothing = number(&case["epsilon"]);
        check("smoothed", case, SftObjective { label_smoothing, ..SftObjective::default() });
    }
    check("dft", &given.all["dft"], SftObjective { loss_type: SftLoss::Dft, ..SftObjective::default() });
    for case in given.all["eaft"].as_array().unwrap() {
        let eaft_alpha = number(&case["alpha"]);
        check("eaft", case, SftObjective { loss_type: SftLoss::Eaft, eaft_alpha, ..SftObjective::default() });
    }
}

#[test]
fn plain_rows_are_the_negative_log_likelihood() {
    let given = Given::new();
    for options in
        [SftObjective::default(), SftObjective { loss_type: SftLoss::Eaft, eaft_alpha: 0.0, ..SftObjective::default() }]
    {
        for (i, mut logits) in given.rows("student").into_iter().enumerate() {
            let before = logits.clone();
            let row = options.row(&mut logits, given.tokens[i], given.weights[i]).unwrap();
            let stats = log_softmax(&before, given.tokens[i] as usize);
            close(row.loss, -given.weights[i] * stats.0, 1e-12, "loss");
            close(row.entropy, stats.1, 1e-12, "entropy");
            let best = before.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(row.correct, before[given.tokens[i] as usize] == best);
        }
    }
    assert!(SftObjective::default().is_plain());
    assert!(!SftObjective { label_smoothing: 0.1, ..SftObjective::default() }.is_plain());
}

/// The log-probability of a token and the entropy, in the plainest words.
fn log_softmax(logits: &[f32], token: usize) -> (f64, f64) {
    let total: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
    let log_p = |z: f32| f64::from(z) - total.ln();
    (log_p(logits[token]), -logits.iter().map(|&z| log_p(z).exp() * log_p(z)).sum::<f64>())
}

#[test]
fn ce_u_agrees_with_torch() {
    let given = Given::new();
    let case = &given.all["ce_u"];
    given.check("ce_u", case, |i, logits| {
        let weight = given.weights[i];
        let row = unlikely_row(logits, given.tokens[i], weight).unwrap();
        close(row.entropy, number(&case["entropy"][i]), 1e-12, "the entropy of the target");
        row.loss + weight * row.entropy
    });
}

fn forget_batch(log_probs: &Var, case: &Value, lengths: Vec<usize>) -> ForgetBatch {
    let reference = numbers(&case["reference"]);
    ForgetBatch {
        log_probs: log_probs.as_tensor().clone(),
        reference_log_probs: Some(Tensor::new(reference, &Device::Cpu).unwrap()),
        weights: Tensor::ones(log_probs.elem_count(), candle_core::DType::F64, &Device::Cpu).unwrap(),
        lengths,
        rows: number(&case["rows"]) as usize,
    }
}

#[test]
fn npo_and_simnpo_agree_with_torch() {
    let given = Given::new();
    for case in given.all["unlearning"].as_array().unwrap() {
        let options = UnlearningOptions {
            forget: named(&case["kind"]),
            beta: number(&case["beta"]),
            margin: number(&case["margin"]),
            ..UnlearningOptions::default()
        };
        let log_probs = Var::new(numbers(&case["log_probs"]), &Device::Cpu).unwrap();
        // A row without loss tokens counts among the rows and adds a constant.
        let loss = forget(&options, &forget_batch(&log_probs, case, given.lengths.clone())).unwrap();
        close(loss.values().unwrap().iter().sum(), number(&case["loss"]), 1e-12, "loss");
        let gradient = loss.gradient(log_probs.as_tensor()).unwrap();
        for (got, expected) in gradient.iter().zip(numbers(&case["gradient"])) {
            close(*got, expected, 1e-12, "gradient");
        }
        let mut lengths = given.lengths.clone();
        lengths.insert(1, 0);
        let with_empty = forget(&options, &forget_batch(&log_probs, case, lengths)).unwrap();
        assert_eq!(with_empty.gradient(log_probs.as_tensor()).unwrap(), gradient);
    }
}

#[test]
fn npo_becomes_gradient_ascent_on_rows_as_beta_vanishes() {
    let given = Given::new();
    let case = &given.all["unlearning"][0];
    let log_probs = Var::new(numbers(&case["log_probs"]), &Device::Cpu).unwrap();
    let options = UnlearningOptions { beta: 1e-9, ..UnlearningOptions::default() };
    let loss = forget(&options, &forget_batch(&log_probs, case, given.lengths.clone())).unwrap();
    for gradient in loss.gradient(log_probs.as_tensor()).unwrap() {
        close(gradient, 1.0 / 4.0, 1e-8, "one over the rows of the step");
    }
    // Where the model is the reference, the gradient is exactly gradient ascent's whatever beta.
    let mut same = case.clone();
    same["reference"] = case["log_probs"].clone();
    let options = UnlearningOptions { beta: 0.7, ..UnlearningOptions::default() };
    let loss = forget(&options, &forget_batch(&log_probs, &same, given.lengths.clone())).unwrap();
    assert_eq!(loss.gradient(log_probs.as_tensor()).unwrap(), vec![0.25; 5]);
    let ascent = UnlearningOptions { forget: Forget::GradientAscent, ..UnlearningOptions::default() };
    let loss = forget(&ascent, &forget_batch(&log_probs, case, given.lengths.clone())).unwrap();
    assert_eq!(loss.gradient(log_probs.as_tensor()).unwrap(), vec![1.0; 5]);
    assert_eq!(loss.values().unwrap(), numbers(&case["log_probs"]));
}

#[test]
fn forgetting_survives_extremes() {
    for kind in [Forget::Npo, Forget::SimNpo, Forget::GradientAscent] {
        let options = UnlearningOptions { forget: kind, ..UnlearningOptions::default() };
        for value in [-1e4, -1e-9, 0.0] {
            let log_probs = Var::new(&[value, value], &Device::Cpu).unwrap();
            let batch = ForgetBatch {
                log_probs: log_probs.as_tensor().clone(),
                reference_log_probs: Some(Tensor::new(&[-1e4, -0.5], &Device::Cpu).unwrap()),
                weights: Tensor::new(&[0.5, 0.5], &Device::Cpu).unwrap(),
                lengths: vec![1, 0, 1],
                rows: 3,
            };
            let loss = forget(&options, &batch).unwrap();
            let all = [loss.values().unwrap(), loss.gradient(log_probs.as_tensor()).unwrap()].concat();
            assert!(all.iter().all(|x| x.is_finite()), "{kind:?} at {value}: {all:?}");
        }
        let none = Var::new(&[0.0; 0], &Device::Cpu).unwrap();
        let batch = ForgetBatch {
            log_probs: none.as_tensor().clone(),
            reference_log_probs: Some(none.as_tensor().clone()),
            weights: none.as_tensor().clone(),
            lengths: vec![],
            rows: 0,
        };
        assert!(forget(&options, &batch).unwrap().values().unwrap().is_empty());
    }
}

/// CE-U pushes a memorised token and lets a forgotten one be; nothing overflows where 1 - p is 0 in floating point.
#[test]
fn ce_u_is_strong_where_gradient_ascent_is_weak_and_ends_where_that_explodes() {
    let at = |own: f32| {
        let mut logits = vec![0.5, own, -0.25, f32::NEG_INFINITY];
        let row = unlikely_row(&mut logits, 1, 1.0).unwrap();
        assert!(logits.iter().all(|x| x.is_finite()), "{logits:?}");
        let size: f32 = logits.iter().map(|x| x.abs()).sum();
        close(f64::from(size), 2.0 * row.log_prob.exp(), 1e-6, "the sum of the absolute values is 2 p");
        assert_eq!(logits[3], 0.0, "an excluded token stays excluded");
        (row, logits[1])
    };
    let (memorised, pull) = at(200.0);
    assert!(memorised.loss > 199.0 && memorised.log_prob.abs() < 1e-80 && pull == 1.0, "{memorised:?}");
    let (forgotten, pull) = at(-200.0);
    assert!(forgotten.loss < 1e-80 && pull == 0.0, "{forgotten:?}");
    assert!(unlikely_row(&mut [f32::NEG_INFINITY, 3.0], 1, 1.0).is_err(), "nothing else to predict");
    assert!(unlikely_row(&mut [1.0, 3.0], 2, 1.0).is_err(), "no such token");
}

#[test]
fn learning_and_unlearning_are_one_loss() {
    let logits = [0.5f32, -1.25, 2.0, 0.125, f32::NEG_INFINITY];
    let p: Vec<f64> = {
        let total: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
        logits.iter().map(|z| f64::from(*z).exp() / total).collect()
    };
    let at = |keep: &dyn Fn(usize) -> bool| {
        let mut row = logits;
        (masked_target_row(&mut row, keep, 1.0).unwrap(), row)
    };
    // One token: supervised cross-entropy, p - one-hot.
    let (learn, gradient) = at(&|v| v == 2);
    close(learn.loss, -p[2].ln(), 1e-12, "learning");
    close(learn.entropy, 0.0, 1e-12, "one token is certain");
    for (v, found) in gradient.into_iter().enumerate() {
        close(f64::from(found), p[v] - f64::from(u8::from(v == 2)), 1e-7, "the gradient of learning");
    }
    // All but one: CE-U.
    let (unlearn, gradient) = at(&|v| v != 2);
    let mut row = logits;
    let ce_u = unlikely_row(&mut row, 2, 1.0).unwrap();
    assert_eq!((unlearn.loss, unlearn.log_outside, row), (ce_u.loss, ce_u.log_prob, gradient));
    close(unlearn.loss, -(1.0 - p[2]).ln(), 1e-12, "unlearning");
    for (v, found) in gradient.into_iter().enumerate() {
        let expected = if v == 2 { p[2] } else { -p[2] * p[v] / (1.0 - p[2]) };
        close(f64::from(found), expected, 1e-7, "the gradient of unlearning");
    }
    // Anything between, and the ends: everything may follow, nothing may.
    let (some, _) = at(&|v| v < 2);
    close(some.loss, -(p[0] + p[1]).ln(), 1e-12, "a set of two");
    let (all, gradient) = at(&|_| true);
    assert_eq!((all.loss, gradient), (0.0, [0.0; 5]));
    assert!(masked_target_row(&mut logits.clone(), |_| false, 1.0).is_err());
    assert!(masked_target_row(&mut logits.clone(), |v| v == 4, 1.0).is_err(), "an excluded token cannot follow");
}

/// Without the constancy of its target CE-U would also move the entropy of what is left.
#[test]
fn the_target_of_ce_u_is_a_constant() {
    let logits = [1.5f32, 0.25, -0.5, 0.75];
    let mut own = logits;
    unlikely_row(&mut own, 0, 1.0).unwrap();
    // d/dz of -Σ q log p by differences, with q moving along: KL part and entropy part.
    let leaking = |z: &[f64]| {
        let total: f64 = z.iter().map(|z| z.exp()).sum();
        let p: Vec<f64> = z.iter().map(|z| z.exp() / total).collect();
        p.iter().skip(1).map(|p_v| -p_v / (1.0 - p[0]) * p_v.ln()).sum::<f64>()
    };
    let z: Vec<f64> = logits.iter().map(|z| f64::from(*z)).collect();
    let difference = |v: usize| {
        let moved = |by: f64| z.iter().enumerate().map(|(u, z)| if u == v { z + by } else { *z }).collect::<Vec<_>>();
        (leaking(&moved(1e-5)) - leaking(&moved(-1e-5))) / 2e-5
    };
    close(f64::from(own[0]), difference(0), 1e-6, "the token itself is in no entropy");
    assert!((f64::from(own[1]) - difference(1)).abs() > 1e-2, "{} {}", own[1], difference(1));
}

/// Gradient flow of one softmax, from a token that is known by heart and from one that is forgotten.
#[test]
fn gradient_flow_starts_where_ascent_does_not_and_stops_where_ascent_does_not() {
    let softmax = |z: &[f64]| {
        let total: f64 = z.iter().map(|z| z.exp()).sum();
        z.iter().map(|z| z.exp() / total).collect::<Vec<f64>>()
    };
    let flow = |start: f64, ascent: bool| {
        let mut z = vec![(start / (1.0 - start) * 4.0).ln(), 0.0, 0.0, 0.0, 0.0];
        for _ in 0..2000 {
            let mut row: Vec<f32> = z.iter().map(|z| *z as f32).collect();
            match ascent {
                // d log p_y
                true => {
                    let p = softmax(&z);
                    row.iter_mut().zip(&p).for_each(|(slot, p)| *slot = -*p as f32);
                    row[0] += 1.0;
                }
                false => {
                    unlikely_row(&mut row, 0, 1.0).unwrap();
                }
            }
            z.iter_mut().zip(&row).for_each(|(z, gradient)| *z -= 0.01 * f64::from(*gradient));
        }
        softmax(&z)[0]
    };
    assert!(flow(0.999, false) < 0.1, "CE-U leaves what is known by heart: {}", flow(0.999, false));
    assert!(flow(0.999, true) > 0.99, "ascent does not begin: {}", flow(0.999, true));
    assert!(flow(0.001, false) > 0.0009, "CE-U stops: {}", flow(0.001, false));
    assert!(flow(0.001, true) < 1e-10, "ascent goes on: {}", flow(0.001, true));
}

const ALL: [Divergence; 5] = [
    Divergence::ForwardKl,
    Divergence::ReverseKl,
    Divergence::JensenShannon,
    Divergence::SkewKl,
    Divergence::SkewReverseKl,
];

fn distilled(options: &DistillationOptions, student: &[f32], teacher: &[f32]) -> (DistilledRow, Vec<f32>) {
    let mut logits = student.to_vec();
    let targets = options.targets(&[teacher], &[1.0]).unwrap();
    let row = options.row(&mut logits, &targets, 1.0, None).unwrap();
    (row, logits)
}

#[test]
fn equal_distributions_have_no_loss_and_no_gradient() {
    let given = Given::new();
    let student = given.rows("student").swap_remove(0);
    // The same distribution, other logits.
    let shifted: Vec<f32> = student.iter().map(|z| z + 64.0).collect();
    for divergence in ALL {
        let options = DistillationOptions { divergence, ..DistillationOptions::default() };
        let (row, gradient) = distilled(&options, &student, &student);
        assert!(row.divergence.abs() < 1e-14 && row.agrees, "{divergence:?}: {row:?}");
        assert!(gradient.iter().all(|g| g.abs() < 1e-14), "{divergence:?}");
        let (row, _) = distilled(&options, &student, &shifted);
        assert!(row.divergence.abs() < 1e-6, "{divergence:?}: {row:?}");
    }
}

#[test]
fn interpolations_end_at_the_divergences_they_are_between() {
    let given = Given::new();
    let (student, teacher) = (given.rows("student").swap_remove(1), given.rows("teacher").swap_remove(1));
    let of = |options: DistillationOptions| distilled(&options, &student, &teacher);
    let plain = |divergence| of(DistillationOptions { divergence, ..DistillationOptions::default() });
    let same = |name: &str, (row, gradient): (DistilledRow, Vec<f32>), scale: f64, end: (DistilledRow, Vec<f32>)| {
        close(row.divergence / scale, end.0.divergence, 1e-4, name);
        for (got, expected) in gradient.iter().zip(&end.1) {
            close(f64::from(*got) / scale, f64::from(*expected), 1e-4, name);
        }
    };
    let js = |beta| {
        of(DistillationOptions { divergence: Divergence::JensenShannon, beta, ..DistillationOptions::default() })
    };
    same("JS to forward KL", js(1e-6), 1e-6, plain(Divergence::ForwardKl));
    same("JS to reverse KL", js(1.0 - 1e-6), 1e-6, plain(Divergence::ReverseKl));
    for (skewed, end) in
        [(Divergence::SkewKl, Divergence::ForwardKl), (Divergence::SkewReverseKl, Divergence::ReverseKl)]
    {
        let skew = |skew| of(DistillationOptions { divergence: skewed, skew, ..DistillationOptions::default() });
        same("no skew", skew(0.0), 1.0, plain(end));
        same("little skew", skew(1e-7), 1.0, plain(end));
    }
}

#[test]
fn extreme_rows_give_finite_losses_and_gradients() {
    let sure = |token: usize| -> Vec<f32> { (0..6).map(|v| if v == token { 0.0 } else { -1e4 }).collect() };
    let flat = vec![0.0; 6];
    for divergence in ALL {
        let options = DistillationOptions { divergence, ..DistillationOptions::default() };
        for skew in [options.skew, 0.0] {
            let options = DistillationOptions { skew, ..options.clone() };
            for (student, teacher) in [(sure(0), sure(3)), (sure(0), flat.clone()), (flat.clone(), sure(0))] {
                let (row, gradient) = distilled(&options, &student, &teacher);
                assert!(row.loss.is_finite() && row.divergence >= 0.0, "{divergence:?}: {row:?}");
                assert!(gradient.iter().all(|g| g.is_finite()), "{divergence:?}: {gradient:?}");
                // Two teachers that agree are one, where their probabilities are too small for a number, too.
                let mut mixed = student.clone();
                let targets = options.targets(&[&teacher, &teacher], &[0.25, 0.75]).unwrap();
                let of_two = options.row(&mut mixed, &targets, 1.0, None).unwrap();
                close(of_two.divergence, row.divergence, 1e-12, "two teachers");
                for (got, expected) in mixed.iter().zip(&gradient) {
                    close(f64::from(*got), f64::from(*expected), 1e-6, "two teachers");
                }
            }
        }
        // One of two teachers alone counts, and one excludes what the other does not.
        let targets = options.targets(&[&[0.5, f32::NEG_INFINITY], &[0.0, 0.0]], &[1.0, 0.0]).unwrap();
        assert_eq!(targets[0].1.probs(), [1.0, 0.0]);
        let targets = options.targets(&[&[0.5, f32::NEG_INFINITY], &[0.0, 0.0]], &[0.5, 0.5]).unwrap();
        close(targets[0].1.probs()[1], 0.25, 1e-15, "half of a half");
        // A token that both exclude.
        let excluded = [0.3, f32::NEG_INFINITY, -0.2];
        let (row, gradient) = distilled(&options, &excluded, &[0.1, f32::NEG_INFINITY, 0.9]);
        assert!(row.loss.is_finite() && row.entropy.is_finite(), "{divergence:?}: {row:?}");
        assert_eq!(gradient[1], 0.0, "{divergence:?}");
    }
    let logits = DistillationOptions { mixing: Mixing::Logits, ..DistillationOptions::default() };
    let excluding = [0.0, f32::NEG_INFINITY, 1.0];
    let mixed = logits.targets(&[&excluding, &excluding], &[2.0, -1.0]).unwrap();
    assert_eq!(mixed[0].1.probs()[1], 0.0, "infinity minus infinity is an excluded token");
}

#[test]
fn options_without_meaning_are_refused_by_name() {
    let refused = |options: DistillationOptions| options.validate().unwrap_err().to_string();
    let default = DistillationOptions::default;
    assert!(default().validate().is_ok());
    assert_eq!(refused(DistillationOptions { beta: 1.0, ..default() }), "beta is 1, expected above 0 and below 1");
    assert!(refused(DistillationOptions { skew: 1.0, ..default() }).starts_with("skew is 1"));
    assert!(refused(DistillationOptions { temperature: 0.0, ..default() }).starts_with("temperature is 0"));
    assert!(refused(DistillationOptions { discount: 1.5, ..default() }).starts_with("discount is 1.5"));
    assert!(refused(DistillationOptions { nll_weight: f64::NAN, ..default() }).starts_with("nll_weight is NaN"));
    let sampled = || DistillationOptions { estimate: Estimate::Sampled, ..default() };
    assert!(sampled().validate().is_ok());
    let message = "estimate: \"sampled\" estimates the reverse KL of the student's own samples alone: it needs divergence = \
                   \"reverse_kl\" and nll_weight = 0";
    for divergence in ALL.into_iter().filter(|divergence| *divergence != Divergence::ReverseKl) {
        assert_eq!(refused(DistillationOptions { divergence, ..sampled() }), message);
    }
    assert_eq!(refused(DistillationOptions { nll_weight: 0.5, ..sampled() }), message);
    assert!(default().shares(&[]).is_err());
    assert!(default().shares(&[2.0, -1.0]).is_err());
    assert!(DistillationOptions { mixing: Mixing::Logits, ..default() }.shares(&[2.0, -1.0]).is_ok());
    let other = default().targets(&[&[0.0, 1.0]], &[1.0]).unwrap();
    assert!(default().row(&mut [0.0, 1.0, 2.0], &other, 1.0, None).is_err(), "another vocabulary");
    assert!(SftObjective { label_smoothing: 1.0, ..SftObjective::default() }.validate().is_err());
    assert!(SftObjective { eaft_alpha: -1.0, ..SftObjective::default() }.validate().is_err());
    assert!(SftObjective::default().row(&mut [0.0], 1, 1.0).is_err());
    assert!(UnlearningOptions { beta: 0.0, ..UnlearningOptions::default() }.validate().is_err());
    assert!(UnlearningOptions { margin: -1.0, ..UnlearningOptions::default() }.validate().is_err());
}

/// The tensor word is another way to the fused rows: reverse KL written with candle's operations.
#[test]
fn autodiff_gives_what_the_fused_rows_give() {
    let given = Given::new();
    let (mut fused, mut tensor) = (given.rows("student"), given.rows("student"));
    let teacher = given.rows("teacher");
    let options = DistillationOptions::default();
    let mut losses = Vec::new();
    for (row, teacher) in fused.iter_mut().zip(&teacher) {
        let targets = options.targets(&[teacher], &[1.0]).unwrap();
        losses.push(options.row(row, &targets, 1.0, None).unwrap().loss);
    }
    let q = Tensor::from_vec(teacher.concat(), (teacher.len(), given.vocabulary), &Device::Cpu).unwrap();
    let log_softmax = |logits: &Tensor| -> candle_core::Result<Tensor> {
        let total = logits.exp()?.sum_keepdim(D::Minus1)?.log()?;
        logits.broadcast_sub(&total)
    };
    let mut rows: Vec<&mut [f32]> = tensor.iter_mut().map(|row| &mut row[..]).collect();
    let found = by_autodiff(&mut rows, |logits| {
        let (p, q) = (log_softmax(logits)?, log_softmax(&q)?);
        Ok((p.exp()? * (&p - q)?)?.sum(D::Minus1)?)
    })
    .unwrap();
    for (got, expected) in found.iter().zip(&losses) {
        close(*got, *expected, 1e-5, "loss");
    }
    for (got, expected) in tensor.concat().iter().zip(fused.concat()) {
        close(f64::from(*got), f64::from(expected), 1e-5, "gradient");
    }
    assert!(by_autodiff(&mut [], |logits| Ok(logits.clone())).unwrap().is_empty());
    let (mut short, mut long) = ([0.0; 2], [0.0; 3]);
    assert!(by_autodiff(&mut [&mut short, &mut long], |logits| Ok(logits.clone())).is_err());
    assert!(by_autodiff(&mut [&mut [0.0, 1.0]], |logits| Ok(logits.clone())).is_err(), "one loss a row");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn gradients_equal_finite_differences(
        rows in prop::collection::vec((-6.0f32..6.0, -6.0f32..6.0), 2..9),
        kind in 0usize..5,
        parameter in 0.05..0.95f64,
        temperature in 0.5..2.0f64,
        coefficient in -2.0..2.0f64,
        own in prop_oneof![Just(None), Just(Some(1.0)), (0.5..2.0f64).prop_map(Some)],
    ) {
        let options =
            DistillationOptions { divergence: ALL[kind], beta: parameter, skew: parameter, temperature, ..Default::default() };
        let (student, teacher): (Vec<f32>, Vec<f32>) = rows.into_iter().unzip();
        let targets = options.targets(&[&teacher], &[1.0]).unwrap();
        let at = |student: &[f32]| {
            let mut logits = student.to_vec();
            let term = TokenTerm { token: 1, coefficient, temperature: own.unwrap_or(temperature) };
            let row = options.row(&mut logits, &targets, 0.7, Some(term)).unwrap();
            (row, logits)
        };
        let (row, gradient) = at(&student);
        // The token's share of the loss is its own softmax's, whatever temperature the divergence has.
        let own = own.unwrap_or(temperature);
        let total: f64 = student.iter().map(|&z| (f64::from(z) / own).exp()).sum();
        let expected = 0.7 * row.divergence - coefficient * (f64::from(student[1]) / own - total.ln());
        prop_assert!((row.loss - expected).abs() < 1e-9, "{}, {expected}", row.loss);
        prop_assert!(row.divergence >= -1e-15, "{row:?}");
        for v in 0..student.len() {
            let (mut above, mut below) = (student.clone(), student.clone());
            (above[v], below[v]) = (above[v] + 1e-2, below[v] - 1e-2);
            let step = f64::from(above[v]) - f64::from(below[v]);
            let numeric = (at(&above).0.loss - at(&below).0.loss) / step;
            prop_assert!((numeric - f64::from(gradient[v])).abs() < 3e-4 * (1.0 + numeric.abs()), "{numeric}, {}", gradient[v]);
        }
    }

    #[test]
    fn mixing_one_teacher_with_itself_is_that_teacher(teacher in prop::collection::vec(-9.0f32..9.0, 2..9), share in 0.0..1.0f64) {
        for mixing in [Mixing::Probabilities, Mixing::Logits, Mixing::Losses] {
            let options = DistillationOptions { mixing, ..Default::default() };
            let mixed = options.targets(&[&teacher, &teacher], &[share, 1.0 - share]).unwrap();
            let alone = options.targets(&[&teacher], &[1.0]).unwrap();
            for (_, target) in mixed {
                for (got, expected) in target.probs().iter().zip(alone[0].1.probs()) {
                    prop_assert!((got - expected).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn ce_u_gradients_equal_finite_differences(logits in prop::collection::vec(-6.0f32..6.0, 2..9)) {
        let at = |logits: &[f32]| {
            let mut logits = logits.to_vec();
            (unlikely_row(&mut logits, 1, 1.3).unwrap().loss, logits)
        };
        let gradient = at(&logits).1;
        for v in 0..logits.len() {
            let (mut above, mut below) = (logits.clone(), logits.clone());
            (above[v], below[v]) = (above[v] + 1e-2, below[v] - 1e-2);
            let numeric = (at(&above).0 - at(&below).0) / (f64::from(above[v]) - f64::from(below[v]));
            prop_assert!((numeric - f64::from(gradient[v])).abs() < 1e-4, "{numeric}, {}", gradient[v]);
        }
    }
}
