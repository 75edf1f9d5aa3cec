//! What must hold for any input: gradients equal finite differences, splits change nothing, limits and extremes.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

use candle_core::{DType, Device, Tensor, Var};
use objectives::{
    Advantage, Aggregation, Error, Fold, GlobalCounts, GrpoOptions, KlEstimator, Loss, PolicyBatch, SftBatch,
};
use posttrain_objectives as objectives;
use proptest::prelude::*;

fn tensor(values: &[f64]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

/// A batch as plain numbers, to be perturbed and split.
#[derive(Clone, Debug)]
struct Numbers {
    log_probs: Vec<f64>,
    old: Vec<f64>,
    reference: Vec<f64>,
    advantages: Vec<f64>,
    lengths: Vec<usize>,
    weights: Vec<f64>,
}

impl Numbers {
    fn sequence(&self) -> Vec<u32> {
        self.lengths.iter().enumerate().flat_map(|(i, &n)| std::iter::repeat_n(i as u32, n)).collect()
    }

    fn batch(&self, log_probs: &Tensor) -> PolicyBatch {
        PolicyBatch {
            log_probs: log_probs.clone(),
            old_log_probs: tensor(&self.old),
            sampling_log_probs: None,
            reference_log_probs: Some(tensor(&self.reference)),
            entropy: Some(tensor(&self.old)),
            advantages: tensor(&self.advantages),
            weights: tensor(&self.weights),
            sequence: self.sequence(),
        }
    }

    /// Loss and gradient. Gradients are with respect to f64 log-probs.
    fn grpo(&self, options: &GrpoOptions) -> (Loss, Vec<f64>) {
        let log_probs = Var::from_tensor(&tensor(&self.log_probs)).unwrap();
        let loss = objectives::grpo(options, &self.batch(log_probs.as_tensor())).unwrap();
        let gradient = loss.gradient(log_probs.as_tensor()).unwrap();
        (loss, gradient)
    }

    fn value(&self, options: &GrpoOptions) -> f64 {
        self.grpo(options).0.values().unwrap().iter().sum()
    }

    /// The sequences `from..to` as a micro-batch of its own.
    fn slice(&self, from: usize, to: usize) -> Self {
        let start: usize = self.lengths[..from].iter().sum();
        let end: usize = self.lengths[..to].iter().sum();
        Self {
            log_probs: self.log_probs[start..end].to_vec(),
            old: self.old[start..end].to_vec(),
            reference: self.reference[start..end].to_vec(),
            advantages: self.advantages[start..end].to_vec(),
            lengths: self.lengths[from..to].to_vec(),
            weights: self.weights[start..end].to_vec(),
        }
    }
}

fn any_options() -> impl Strategy<Value = GrpoOptions> {
    let aggregation = prop_oneof![Just(Aggregation::Token), Just(Aggregation::Sequence), Just(Aggregation::Constant)];
    let kl = prop_oneof![Just(KlEstimator::K1), Just(KlEstimator::K2), Just(KlEstimator::K3)];
    let beta = prop_oneof![Just(0.0), 0.01..0.5f64];
    (aggregation, kl, beta, 0.05..0.4f64, proptest::option::of(0.05..0.4f64)).prop_map(
        |(aggregation, kl, beta, epsilon, epsilon_high)| GrpoOptions {
            aggregation,
            kl,
            beta,
            epsilon,
            epsilon_high,
            ..GrpoOptions::default()
        },
    )
}

/// A batch of 1-6 sequences, some empty, with log-ratios up to `drift`.
fn any_numbers(drift: f64) -> impl Strategy<Value = (GrpoOptions, Numbers)> {
    (any_options(), prop::collection::vec(0usize..5, 1..7)).prop_flat_map(move |(options, lengths)| {
        let n: usize = lengths.iter().sum();
        let token = (-4.0..0.0f64, -drift..drift, -drift..drift);
        (prop::collection::vec(token, n), prop::collection::vec(-2.0..2.0f64, lengths.len())).prop_map(
            move |(tokens, advantages)| {
                let counts = GlobalCounts::of(&lengths, 16);
                let numbers = Numbers {
                    log_probs: tokens.iter().map(|t| t.0).collect(),
                    old: tokens.iter().map(|t| t.0 + t.1).collect(),
                    reference: tokens.iter().map(|t| t.0 + t.2).collect(),
                    advantages: lengths.iter().zip(&advantages).flat_map(|(&n, &a)| vec![a; n]).collect(),
                    weights: options.aggregation.weights(&lengths, &counts),
                    lengths: lengths.clone(),
                };
                (options.clone(), numbers)
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn gradients_equal_finite_differences((options, numbers) in any_numbers(0.8)) {
        let step = 1e-6;
        let gradient = numbers.grpo(&options).1;
        let clip = options.clip();
        for (i, &derivative) in gradient.iter().enumerate() {
            // The loss has a kink where the ratio meets a bound; there no difference quotient is a derivative.
            let ratio = (numbers.log_probs[i] - numbers.old[i]).exp();
            if (ratio - 1.0 + clip.low).abs() < 1e-4 || (ratio - 1.0 - clip.high).abs() < 1e-4 {
                continue;
            }
            let at = |delta: f64| {
                let mut moved = numbers.clone();
                moved.log_probs[i] += delta;
                moved.value(&options)
            };
            let difference = (at(step) - at(-step)) / (2.0 * step);
            prop_assert!((derivative - difference).abs() < 1e-7, "token {i}: {derivative} and {difference}");
        }
    }

    #[test]
    fn a_split_changes_no_bit((options, numbers) in any_numbers(0.8), cut in 0usize..7) {
        let cut = cut.min(numbers.lengths.len());
        let (whole, whole_gradient) = numbers.grpo(&options);
        let parts = [numbers.slice(0, cut), numbers.slice(cut, numbers.lengths.len())].map(|part| part.grpo(&options));
        let gradient: Vec<f64> = parts.iter().flat_map(|part| part.1.clone()).collect();
        prop_assert_eq!(&gradient, &whole_gradient);
        let values: Vec<f64> = parts.iter().flat_map(|part| part.0.values().unwrap()).collect();
        prop_assert_eq!(values, whole.values().unwrap());
        for (i, statistic) in whole.statistics.iter().enumerate() {
            let (mut one, mut two) = (Fold::new(statistic.reduce), Fold::new(statistic.reduce));
            one.extend(&statistic.values);
            for part in &parts {
                two.extend(&part.0.statistics[i].values);
            }
            prop_assert_eq!(one.value(), two.value(), "{}", statistic.name);
        }
    }

    #[test]
    fn the_clip_is_the_minimum_of_the_paper((options, numbers) in any_numbers(2.0)) {
        let options = GrpoOptions { beta: 0.0, ..options };
        let clip = options.clip();
        let losses = numbers.grpo(&options).0.values().unwrap();
        for (i, loss) in losses.iter().enumerate() {
            let (ratio, advantage) = ((numbers.log_probs[i] - numbers.old[i]).exp(), numbers.advantages[i]);
            let bounded = ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
            let expected = -(ratio * advantage).min(bounded * advantage) * numbers.weights[i];
            prop_assert!((loss - expected).abs() <= 1e-14, "{loss} and {expected}");
        }
    }

    #[test]
    fn advantages_sum_to_zero_and_ignore_shifts(
        rewards in prop::collection::vec(-5.0..5.0f64, 12), shift in -100.0..100.0f64, group in prop_oneof![Just(2), Just(3), Just(6)],
    ) {
        let lengths = vec![group; 12 / group];
        for advantage in [Advantage::GroupMeanStd, Advantage::GroupMean, Advantage::Batch, Advantage::LeaveOneOut] {
            let values = advantage.of(&rewards, &lengths).unwrap().values;
            let shifted: Vec<f64> = rewards.iter().map(|reward| reward + shift).collect();
            let again = advantage.of(&shifted, &lengths).unwrap().values;
            for (group, (values, again)) in values.chunks(group).zip(again.chunks(group)).enumerate() {
                // Division by a small deviation magnifies rounding: compare on the scale of the values.
                let scale = 1e-9 * (1.0 + values.iter().fold(0.0f64, |a, b| a.max(b.abs()))) * 1e3;
                prop_assert!(values.iter().sum::<f64>().abs() < scale, "group {group}: {values:?}");
                prop_assert!(values.iter().zip(again).all(|(a, b)| (a - b).abs() < scale), "{values:?} {again:?}");
            }
        }
    }

    #[test]
    fn weights_do_what_their_names_say(lengths in prop::collection::vec(0usize..9, 1..8)) {
        prop_assume!(lengths.iter().any(|&n| n > 0));
        let counts = GlobalCounts::of(&lengths, 9);
        let sum = |aggregation: Aggregation| aggregation.weights(&lengths, &counts).iter().sum::<f64>();
        let filled = lengths.iter().filter(|&&n| n > 0).count() as f64;
        prop_assert!((sum(Aggregation::Token) - 1.0).abs() < 1e-12);
        prop_assert!((sum(Aggregation::Sequence) - filled / lengths.len() as f64).abs() < 1e-12);
        let expected = counts.tokens as f64 / (9 * lengths.len()) as f64;
        prop_assert!((sum(Aggregation::Constant) - expected).abs() < 1e-12);
    }
}

fn one_sequence(log_probs: &[f64], old: &[f64], reference: &[f64], advantage: f64) -> Numbers {
    Numbers {
        log_probs: log_probs.to_vec(),
        old: old.to_vec(),
        reference: reference.to_vec(),
        advantages: vec![advantage; log_probs.len()],
        lengths: vec![log_probs.len()],
        weights: vec![1.0 / log_probs.len() as f64; log_probs.len()],
    }
}

/// On policy r = 1, so d(r A)/d(log π) = A: the gradient is that of REINFORCE with the advantage, exactly.
#[test]
fn on_policy_it_is_reinforce() {
    let log_probs = [-0.5, -2.0, -1e-3, -9.0];
    let numbers = one_sequence(&log_probs, &log_probs, &log_probs, 1.5);
    let (loss, gradient) = numbers.grpo(&GrpoOptions::default());
    assert_eq!(loss.values().unwrap(), [-1.5 / 4.0; 4]);
    assert_eq!(gradient, [-1.5 / 4.0; 4]);
    for statistic in loss.statistics.iter().filter(|statistic| statistic.name.starts_with("clip_ratio")) {
        assert!(statistic.values.iter().all(|&value| value == 0.0), "{}", statistic.name);
    }
}

#[test]
fn beta_to_zero_is_beta_zero() {
    let numbers = one_sequence(&[-0.5, -2.0], &[-0.6, -1.9], &[-1.5, -0.2], -0.7);
    let at = |beta: f64| numbers.value(&GrpoOptions { beta, ..GrpoOptions::default() });
    assert!((at(1e-12) - at(0.0)).abs() < 1e-11);
    assert!((at(1e-2) - at(0.0)).abs() > 1e-4, "beta has an effect");
}

/// d = log ρ - log π = ln 2: k1 = -ln 2, k2 = (ln 2)²/2, k3 = 2 - ln 2 - 1; derivatives with respect to log π are
/// 1, -ln 2 and 1 - 2.
#[test]
fn kl_estimators_by_hand() {
    let two = 2f64.ln();
    for (estimator, value, derivative) in
        [(KlEstimator::K1, -two, 1.0), (KlEstimator::K2, two * two / 2.0, -two), (KlEstimator::K3, 1.0 - two, -1.0)]
    {
        let log_prob = Var::from_slice(&[-1.0f64], 1, &Device::Cpu).unwrap();
        let kl = estimator.per_token(log_prob.as_tensor(), &tensor(&[two - 1.0])).unwrap();
        assert!((kl.to_vec1::<f64>().unwrap()[0] - value).abs() < 1e-15, "{estimator:?}");
        let gradients = kl.sum_all().unwrap().backward().unwrap();
        let got = gradients.get(log_prob.as_tensor()).unwrap().to_vec1::<f64>().unwrap()[0];
        assert!((got - derivative).abs() < 1e-15, "{estimator:?}: {got}");
    }
}

/// Rewards 1, 3: mean 2, sample variance ((−1)² + 1²) / 1 = 2.
#[test]
fn advantages_by_hand() {
    let values = |advantage: Advantage| advantage.of(&[1.0, 3.0], &[2]).unwrap().values;
    let scaled = 1.0 / (2f64.sqrt() + 1e-4);
    assert_eq!(values(Advantage::GroupMeanStd), [-scaled, scaled]);
    assert_eq!(values(Advantage::GroupMean), [-1.0, 1.0]);
    assert_eq!(values(Advantage::LeaveOneOut), [-2.0, 2.0]);
}

/// The mean of three 0.1 is not 0.1 in floating point; its deviation times 1/ε would be a visible advantage.
#[test]
fn equal_rewards_teach_nothing() {
    for advantage in [Advantage::GroupMeanStd, Advantage::GroupMean, Advantage::Batch, Advantage::LeaveOneOut] {
        let advantages = advantage.of(&[0.1, 0.1, 0.1, 0.0, 1.0, 7.0, 7.0], &[3, 2, 1, 0, 1]).unwrap();
        assert_eq!(advantages.values[..3], [0.0; 3], "{advantage:?}");
        assert_eq!(advantages.values[5..], [0.0; 2], "{advantage:?}: alone in their groups");
        assert_eq!((advantages.zero_variance_groups, advantages.groups), (4, 5));
        let numbers = one_sequence(&[-1.0, -2.0], &[-1.1, -2.0], &[-1.0, -2.0], advantages.values[0]);
        assert_eq!(numbers.grpo(&GrpoOptions::default()).1, [0.0; 2]);
    }
}

#[test]
fn unscored_samples_take_no_part() {
    let advantages = Advantage::GroupMean.of(&[Some(1.0), None, Some(0.0)], &[3]).unwrap();
    assert_eq!(advantages.values, [0.5, 0.0, -0.5]);
    let advantages = Advantage::GroupMeanStd.of(&[None::<f64>, None], &[2]).unwrap();
    assert_eq!((advantages.values, advantages.zero_variance_groups), (vec![0.0; 2], 1));
}

#[test]
fn extremes_stay_finite() {
    let extremes = [-1e4, -1e4, 0.0, -1e-30, -1e4];
    let others = [0.0, -1e4, -1e4, 0.0, -9_999.0];
    for advantage in [-3.0, 0.0, 3.0] {
        for kl in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
            for (a, b) in [(&extremes, &others), (&others, &extremes)] {
                let options = GrpoOptions { beta: 0.1, kl, ..GrpoOptions::default() };
                let (loss, gradient) = one_sequence(a, b, b, advantage).grpo(&options);
                let values = loss.values().unwrap();
                assert!(values.iter().chain(&gradient).all(|x| x.is_finite()), "{values:?} {gradient:?}");
            }
        }
    }
}

#[test]
fn no_tokens_is_no_loss() {
    let empty = one_sequence(&[], &[], &[], 1.0);
    let (loss, gradient) = empty.grpo(&GrpoOptions { beta: 0.1, ..GrpoOptions::default() });
    assert!(loss.values().unwrap().is_empty() && gradient.is_empty());
    for statistic in &loss.statistics {
        let mut fold = Fold::new(statistic.reduce);
        fold.extend(&statistic.values);
        assert_eq!(fold.value(), None, "{}", statistic.name);
    }
    let none = tensor(&[]);
    let batch = SftBatch { log_probs: none.clone(), weights: none, entropy: None, correct: Some(vec![]) };
    assert!(objectives::sft(&batch).unwrap().values().unwrap().is_empty());
    assert!(Aggregation::Sequence.weights(&[0, 0], &GlobalCounts::of(&[0, 0], 0)).is_empty());
}

/// What the engine hands over is f32; the gradient comes back for exactly that tensor.
#[test]
fn single_precision_inputs_are_accepted() {
    let numbers = one_sequence(&[-0.5, -2.0], &[-0.75, -2.0], &[-0.5, -2.0], 1.0);
    let log_probs = Var::from_tensor(&tensor(&numbers.log_probs).to_dtype(DType::F32).unwrap()).unwrap();
    let loss = objectives::grpo(&GrpoOptions::default(), &numbers.batch(log_probs.as_tensor())).unwrap();
    // The first ratio, e^0.25 = 1.284, is held at 1.2; the second is 1.
    assert_eq!(loss.gradient(log_probs.as_tensor()).unwrap(), [0.0, -0.5]);
}

#[test]
fn wrong_inputs_are_named() {
    let numbers = one_sequence(&[-0.5, -2.0], &[-0.5, -2.0], &[-0.5, -2.0], 1.0);
    let log_probs = tensor(&numbers.log_probs);
    let error = objectives::grpo(
        &GrpoOptions::default(),
        &PolicyBatch { old_log_probs: tensor(&[-0.5]), ..numbers.batch(&log_probs) },
    );
    assert_eq!(error.unwrap_err().to_string(), "old_log_probs has length 1, expected 2");
    let error = objectives::grpo(
        &GrpoOptions::default(),
        &PolicyBatch { sampling_log_probs: Some(tensor(&[-0.5])), ..numbers.batch(&log_probs) },
    );
    assert_eq!(error.unwrap_err().to_string(), "sampling_log_probs has length 1, expected 2");
    let error = objectives::grpo(
        &GrpoOptions { beta: 0.04, ..GrpoOptions::default() },
        &PolicyBatch { reference_log_probs: None, ..numbers.batch(&log_probs) },
    );
    assert_eq!(error.unwrap_err().to_string(), "reference_log_probs is missing: beta is not 0");
    let error = Advantage::GroupMean.of(&[0.0, f64::NAN], &[2]);
    assert!(matches!(error, Err(Error::NonFiniteReward { index: 1, .. })));
    assert!(Advantage::GroupMean.of(&[0.0, 1.0, 2.0], &[2]).is_err());
    for wrong in [
        GrpoOptions { epsilon: 1.0, ..GrpoOptions::default() },
        GrpoOptions { epsilon_high: Some(-0.1), ..GrpoOptions::default() },
        GrpoOptions { beta: f64::NAN, ..GrpoOptions::default() },
    ] {
        assert!(matches!(wrong.validate(), Err(Error::Range { .. })), "{wrong:?}");
    }
    GrpoOptions::default().validate().unwrap();
}
