//! What must hold for any input: gradients equal finite differences, splits change nothing, limits and extremes.

use candle_core::{DType, Device, Tensor, Var};
use objectives::{
    AdaptiveEntropy, AdaptiveKl, Aggregation, Baseline, ClipKind, CorrectionMode, Credit, EntropyControl, Error,
    Estimator, Fold, GlobalCounts, KlDirection, KlEstimator, Loss, Negative, PolicyBatch, PolicyOptions, RatioLevel,
    Rewards, ScaleRewards, SftBatch, SpanReward, TurnReward, ValueBatch,
};
use posttrain_objectives as objectives;
use proptest::prelude::*;

const CLIPS: [ClipKind; 10] = [
    ClipKind::Ppo,
    ClipKind::None,
    ClipKind::Cispo,
    ClipKind::Sapo,
    ClipKind::Gmpo,
    ClipKind::Vespo,
    ClipKind::DppoTv,
    ClipKind::DppoKl,
    ClipKind::ClipCov,
    ClipKind::KlCov,
];
const LEVELS: [RatioLevel; 4] =
    [RatioLevel::Token, RatioLevel::Sequence, RatioLevel::SequenceToken, RatioLevel::SequenceProduct];
const ESTIMATORS: [KlEstimator; 5] =
    [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3, KlEstimator::K1Plus, KlEstimator::K3Plus];

fn tensor(values: &[f64]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

/// A batch as plain numbers, to be perturbed and split.
#[derive(Clone, Debug)]
struct Numbers {
    log_probs: Vec<f64>,
    old: Vec<f64>,
    sampling: Vec<f64>,
    reference: Vec<f64>,
    entropy: Vec<f64>,
    draws: Vec<f64>,
    advantages: Vec<f64>,
    lengths: Vec<usize>,
    weights: Vec<f64>,
    /// Loss tokens of the update, of which these may be a part.
    update_tokens: usize,
}

impl Numbers {
    fn sequence(&self) -> Vec<u32> {
        self.lengths.iter().enumerate().flat_map(|(i, &n)| std::iter::repeat_n(i as u32, n)).collect()
    }

    fn batch(&self, log_probs: &Tensor, entropy: &Tensor) -> PolicyBatch {
        PolicyBatch {
            log_probs: log_probs.clone(),
            old_log_probs: tensor(&self.old),
            sampling_log_probs: Some(tensor(&self.sampling)),
            reference_log_probs: Some(tensor(&self.reference)),
            entropy: Some(entropy.clone()),
            advantages: tensor(&self.advantages),
            weights: tensor(&self.weights),
            sequence: self.sequence(),
            tokens: self.update_tokens,
            draws: Some(self.draws.clone()),
        }
    }

    /// Loss and gradient with respect to log-probabilities.
    fn policy(&self, options: &PolicyOptions) -> (Loss, Vec<f64>) {
        let log_probs = Var::from_tensor(&tensor(&self.log_probs)).unwrap();
        let entropy = tensor(&self.entropy);
        let loss = objectives::policy(options, &self.batch(log_probs.as_tensor(), &entropy)).unwrap();
        let gradient = loss.gradient(log_probs.as_tensor()).unwrap();
        (loss, gradient)
    }

    fn value(&self, options: &PolicyOptions) -> f64 {
        self.policy(options).0.values().unwrap().iter().sum()
    }

    /// The sequences `from..to` as a micro-batch of its own.
    fn slice(&self, from: usize, to: usize) -> Self {
        let start: usize = self.lengths[..from].iter().sum();
        let end: usize = self.lengths[..to].iter().sum();
        let part = |values: &[f64]| values[start..end].to_vec();
        Self {
            log_probs: part(&self.log_probs),
            old: part(&self.old),
            sampling: part(&self.sampling),
            reference: part(&self.reference),
            entropy: part(&self.entropy),
            draws: part(&self.draws),
            advantages: part(&self.advantages),
            lengths: self.lengths[from..to].to_vec(),
            weights: part(&self.weights),
            update_tokens: self.update_tokens,
        }
    }

    /// The sequences from last to first.
    fn reversed(&self) -> Self {
        let parts: Vec<Self> = (0..self.lengths.len()).rev().map(|i| self.slice(i, i + 1)).collect();
        let joined = |of: fn(&Self) -> &Vec<f64>| parts.iter().flat_map(|part| of(part).clone()).collect();
        Self {
            log_probs: joined(|part| &part.log_probs),
            old: joined(|part| &part.old),
            sampling: joined(|part| &part.sampling),
            reference: joined(|part| &part.reference),
            entropy: joined(|part| &part.entropy),
            draws: joined(|part| &part.draws),
            advantages: joined(|part| &part.advantages),
            lengths: parts.iter().flat_map(|part| part.lengths.clone()).collect(),
            weights: joined(|part| &part.weights),
            update_tokens: self.update_tokens,
        }
    }
}

fn any_options() -> impl Strategy<Value = PolicyOptions> {
    let aggregation = prop_oneof![
        Just(Aggregation::Token),
        Just(Aggregation::Sequence),
        Just(Aggregation::SequenceSum),
        Just(Aggregation::Constant),
        Just(Aggregation::Sum)
    ];
    let mode = prop_oneof![
        Just(CorrectionMode::TokenTruncate),
        Just(CorrectionMode::TokenMask),
        Just(CorrectionMode::SequenceTruncate),
        Just(CorrectionMode::SequenceMask),
        Just(CorrectionMode::None)
    ];
    let direction = prop_oneof![Just(KlDirection::Reverse), Just(KlDirection::Forward)];
    let kl = (prop::sample::select(&ESTIMATORS[..]), direction, prop_oneof![Just(0.0), 0.01..0.5f64], any::<bool>());
    let bounds = (0.05..0.4f64, proptest::option::of(0.05..0.4f64), proptest::option::of(1.5..3.0f64));
    let filters =
        (prop_oneof![Just(1.0), 0.2..0.9f64], proptest::option::of(0.0..0.3f64), prop_oneof![Just(0.0), 0.0..0.5f64]);
    let level = prop::sample::select(&LEVELS[..]);
    (aggregation, mode, kl, bounds, filters, level, prop::sample::select(&CLIPS[..])).prop_map(
        |(
            aggregation,
            mode,
            (kl, kl_direction, beta, bias),
            (epsilon, epsilon_high, delta),
            (quantile, threshold, entropy_coef),
            level,
            clip,
        )| {
            let bounded = matches!(clip, ClipKind::Ppo | ClipKind::ClipCov | ClipKind::DppoTv | ClipKind::DppoKl);
            PolicyOptions {
                aggregation,
                importance_sampling_mode: mode,
                kl,
                kl_direction,
                beta,
                use_bias_correction_kl: bias,
                epsilon,
                epsilon_high: if clip == ClipKind::Cispo { Some(1.0 + epsilon) } else { epsilon_high },
                delta: delta.filter(|_| bounded),
                top_entropy_quantile: quantile,
                off_policy_mask_threshold: threshold,
                entropy_coef,
                importance_sampling_level: level,
                clip,
                cov_ratio: 0.3,
                clip_cov_min: 0.1,
                ..PolicyOptions::default()
            }
        },
    )
}

/// A batch of 1-6 sequences, some empty, with log-ratios up to `drift`.
fn any_numbers(drift: f64) -> impl Strategy<Value = (PolicyOptions, Numbers)> {
    (any_options(), prop::collection::vec(0usize..5, 1..7)).prop_flat_map(move |(options, lengths)| {
        let n: usize = lengths.iter().sum();
        let token = (-4.0..0.0f64, -drift..drift, -drift..drift, -drift..drift, 0.0..3.0f64, 0.0..1.0f64);
        (prop::collection::vec(token, n), prop::collection::vec(-2.0..2.0f64, lengths.len())).prop_map(
            move |(tokens, advantages)| {
                let counts = GlobalCounts::of(&lengths, 16);
                let numbers = Numbers {
                    log_probs: tokens.iter().map(|t| t.0).collect(),
                    old: tokens.iter().map(|t| t.0 + t.1).collect(),
                    sampling: tokens.iter().map(|t| t.0 + t.1 + t.3).collect(),
                    reference: tokens.iter().map(|t| t.0 + t.2).collect(),
                    entropy: tokens.iter().map(|t| t.4).collect(),
                    draws: tokens.iter().map(|t| t.5).collect(),
                    advantages: lengths.iter().zip(&advantages).flat_map(|(&n, &a)| vec![a; n]).collect(),
                    weights: options.aggregation.weights(&lengths, &counts),
                    update_tokens: n,
                    lengths: lengths.clone(),
                };
                (options.clone(), numbers)
            },
        )
    })
}

/// Whether the value of a loss has the loss's derivative: not with a stopped gradient on the way.
fn is_its_own_derivative(options: &PolicyOptions) -> bool {
    let clip =
        matches!(options.clip, ClipKind::Ppo | ClipKind::None | ClipKind::Sapo | ClipKind::Gmpo | ClipKind::KlCov);
    let kl = !matches!(options.kl, KlEstimator::K1Plus | KlEstimator::K3Plus) || options.beta == 0.0;
    clip && kl && options.importance_sampling_level != RatioLevel::SequenceToken
}

fn advantages(estimator: Estimator, rewards: &[f64], groups: &[usize]) -> Result<objectives::Advantages, Error> {
    let scores: Vec<Option<f64>> = rewards.iter().copied().map(Some).collect();
    let lengths = vec![1; scores.len()];
    estimator.advantages(&Rewards { scores: &scores, groups, lengths: &lengths, ..Rewards::default() })
}

/// Baselines and scales of whole groups.
fn of_groups() -> impl Iterator<Item = Estimator> {
    [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None].into_iter().flat_map(|scale| {
        [Baseline::GroupMean, Baseline::LeaveOneOut].map(|baseline| Estimator {
            baseline,
            scale,
            ..Estimator::default()
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn gradients_equal_finite_differences((options, numbers) in any_numbers(0.8)) {
        prop_assume!(is_its_own_derivative(&options));
        let step = 1e-6;
        let gradient = numbers.policy(&options).1;
        for (i, &derivative) in gradient.iter().enumerate() {
            let at = |delta: f64| {
                let mut moved = numbers.clone();
                moved.log_probs[i] += delta;
                moved.policy(&options)
            };
            let (above, below) = (at(step), at(-step));
            // The loss has a kink where a ratio meets a bound and where a token changes sides; there no difference quotient is
            // a derivative.
            let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-4);
            if apart(&above.1, &below.1) || apart(&above.1, &gradient) {
                continue;
            }
            let sum = |loss: &Loss| loss.values().unwrap().iter().sum::<f64>();
            let difference = (sum(&above.0) - sum(&below.0)) / (2.0 * step);
            prop_assert!(
                (derivative - difference).abs() < 1e-6 * (1.0 + derivative.abs()),
                "token {i}: {derivative} and {difference}"
            );
        }
    }

    /// Where gradients are stopped, the gradient is that of REINFORCE with a weight: that weight is read off the value.
    #[test]
    fn stopped_weights_are_weights((options, numbers) in any_numbers(0.8)) {
        let level = RatioLevel::Token;
        let options = PolicyOptions { beta: 0.0, entropy_coef: 0.0, importance_sampling_level: level, ..options };
        prop_assume!(matches!(
            options.clip,
            ClipKind::Cispo | ClipKind::Vespo | ClipKind::DppoTv | ClipKind::DppoKl
        ));
        let (loss, gradient) = numbers.policy(&options);
        for ((loss, gradient), log_prob) in loss.values().unwrap().iter().zip(gradient).zip(&numbers.log_probs) {
            prop_assert!((gradient * log_prob - loss).abs() < 1e-12 * (1.0 + loss.abs()), "{gradient} {loss}");
        }
    }

    #[test]
    fn a_split_changes_no_bit((options, numbers) in any_numbers(0.8), cut in 0usize..7) {
        prop_assume!(!options.needs_whole_update());
        let cut = cut.min(numbers.lengths.len());
        let (whole, whole_gradient) = numbers.policy(&options);
        let parts = [numbers.slice(0, cut), numbers.slice(cut, numbers.lengths.len())].map(|part| part.policy(&options));
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

    /// Also where a token is compared with all others of the update.
    #[test]
    fn the_order_of_sequences_does_not_matter((options, numbers) in any_numbers(0.8)) {
        // The covariances of two tokens are equal: which of the two KL-Cov takes is a matter of their order.
        prop_assume!(options.clip != ClipKind::KlCov || numbers.log_probs.len() != 2);
        let (whole, _) = numbers.policy(&options);
        let (turned, _) = numbers.reversed().policy(&options);
        let sum = |loss: &Loss| loss.values().unwrap().iter().sum::<f64>();
        prop_assert!((sum(&whole) - sum(&turned)).abs() < 1e-12 * (1.0 + sum(&whole).abs()));
    }

    #[test]
    fn the_clip_is_the_minimum_of_the_paper((options, numbers) in any_numbers(2.0), dual in any::<bool>()) {
        let (low, high) = (options.epsilon, options.epsilon_high.unwrap_or(options.epsilon));
        let options = PolicyOptions {
            epsilon: low,
            epsilon_high: Some(high),
            aggregation: options.aggregation,
            delta: dual.then_some(2.0),
            importance_sampling_mode: CorrectionMode::None,
            ..PolicyOptions::default()
        };
        let losses = numbers.policy(&options).0.values().unwrap();
        for (i, loss) in losses.iter().enumerate() {
            let (ratio, advantage) = ((numbers.log_probs[i] - numbers.old[i]).exp(), numbers.advantages[i]);
            let mut objective = (ratio * advantage).min(ratio.clamp(1.0 - low, 1.0 + high) * advantage);
            if dual && advantage < 0.0 {
                objective = objective.max(2.0 * advantage);
            }
            let expected = -objective * numbers.weights[i];
            prop_assert!((loss - expected).abs() <= 1e-13, "{loss} and {expected}");
        }
    }

    #[test]
    fn advantages_sum_to_zero_and_ignore_shifts(
        rewards in prop::collection::vec(-5.0..5.0f64, 12), shift in -100.0..100.0f64, group in prop_oneof![Just(2), Just(3), Just(6)],
    ) {
        let groups = vec![group; 12 / group];
        for estimator in of_groups() {
            let values = advantages(estimator, &rewards, &groups).unwrap().tokens;
            let shifted: Vec<f64> = rewards.iter().map(|reward| reward + shift).collect();
            let again = advantages(estimator, &shifted, &groups).unwrap().tokens;
            for (group, (values, again)) in values.chunks(group).zip(again.chunks(group)).enumerate() {
                // Division by a small deviation magnifies rounding: compare on the scale of the values.
                let scale = 1e-9 * (1.0 + values.iter().fold(0.0f64, |a, b| a.max(b.abs()))) * 1e3;
                prop_assert!(values.iter().sum::<f64>().abs() < scale, "group {group}: {values:?}");
                prop_assert!(values.iter().zip(again).all(|(a, b)| (a - b).abs() < scale), "{values:?} {again:?}");
            }
        }
    }

    /// Without a penalty in the reward and without discount a token answers for what its completion does.
    #[test]
    fn both_credits_are_one_without_penalty_and_discount(
        rewards in prop::collection::vec(-5.0..5.0f64, 6), lengths in prop::collection::vec(0usize..4, 6),
    ) {
        let scores: Vec<Option<f64>> = rewards.iter().copied().map(Some).collect();
        let zeros = vec![0.0; lengths.iter().sum()];
        for baseline in [Baseline::GroupMean, Baseline::LeaveOneOut, Baseline::Greedy, Baseline::None] {
            let of = |credit, token_rewards| {
                let estimator = Estimator { baseline, credit, ..Estimator::default() };
                let rewards = Rewards {
                    scores: &scores, groups: &[2, 4], lengths: &lengths, token_rewards, greedy: Some(&[0.5, 1.0]), values: None, turns: None, spans: None,
                };
                estimator.advantages(&rewards).unwrap()
            };
            let whole = of(Credit::Sequence, None);
            for other in [of(Credit::Token, None), of(Credit::Token, Some(&zeros[..])), of(Credit::Sequence, Some(&zeros[..]))] {
                let same = whole.tokens.iter().zip(&other.tokens).all(|(a, b)| (a - b).abs() < 1e-9);
                prop_assert!(same, "{baseline:?}: {whole:?} {other:?}");
            }
        }
    }

    /// λ = 1: rewards to come minus the estimate; λ = 0: the error of one step; both for the two λ on their own.
    #[test]
    fn gae_has_its_limits(tokens in prop::collection::vec((-2.0..2.0f64, -2.0..2.0f64), 0..7), gamma in 0.5..1.0f64) {
        let (rewards, values): (Vec<f64>, Vec<f64>) = tokens.into_iter().unzip();
        let one = objectives::gae::advantages(&rewards, &values, gamma, 1.0);
        let zero = objectives::gae::advantages(&rewards, &values, gamma, 0.0);
        let mut later = 0.0;
        for t in (0..values.len()).rev() {
            later = rewards[t] + gamma * later;
            prop_assert!((one[t] - (later - values[t])).abs() < 1e-9);
            let next = values.get(t + 1).copied().unwrap_or(0.0);
            prop_assert!((zero[t] - (rewards[t] + gamma * next - values[t])).abs() < 1e-12);
        }
    }

    #[test]
    fn the_value_loss_has_its_gradient(
        tokens in prop::collection::vec((-2.0..2.0f64, -0.5..0.5f64, -2.0..2.0f64), 0..6), clip in proptest::option::of(0.05..0.4f64),
    ) {
        let at = |values: &[f64]| {
            let new = Var::from_tensor(&tensor(values)).unwrap();
            let column = |of: fn(&(f64, f64, f64)) -> f64| tensor(&tokens.iter().map(of).collect::<Vec<_>>());
            let loss = objectives::value(clip, &ValueBatch {
                values: new.as_tensor().clone(),
                old_values: column(|t| t.0 + t.1),
                returns: column(|t| t.2),
                weights: tensor(&vec![0.25; tokens.len()]),
            }).unwrap();
            (loss.values().unwrap().iter().sum::<f64>(), loss.gradient(new.as_tensor()).unwrap())
        };
        let values: Vec<f64> = tokens.iter().map(|t| t.0).collect();
        let gradient = at(&values).1;
        for i in 0..values.len() {
            let moved = |delta: f64| {
                let mut values = values.clone();
                values[i] += delta;
                at(&values)
            };
            let (above, below) = (moved(1e-6), moved(-1e-6));
            if (above.1[i] - below.1[i]).abs() > 1e-4 {
                continue;
            }
            prop_assert!((gradient[i] - (above.0 - below.0) / 2e-6).abs() < 1e-8);
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
        prop_assert!((sum(Aggregation::SequenceSum) - 9.0 * expected).abs() < 1e-12);
        prop_assert!((sum(Aggregation::Sum) - counts.tokens as f64).abs() < 1e-12);
    }
}

fn one_sequence(log_probs: &[f64], old: &[f64], reference: &[f64], advantage: f64) -> Numbers {
    Numbers {
        log_probs: log_probs.to_vec(),
        old: old.to_vec(),
        sampling: old.to_vec(),
        reference: reference.to_vec(),
        entropy: vec![1.0; log_probs.len()],
        draws: vec![0.5; log_probs.len()],
        advantages: vec![advantage; log_probs.len()],
        lengths: vec![log_probs.len()],
        weights: vec![1.0 / log_probs.len() as f64; log_probs.len()],
        update_tokens: log_probs.len(),
    }
}

/// On policy r = 1, so d(r A)/d(log π) = A: the gradient is that of REINFORCE with the advantage, whatever the surrogate.
#[test]
fn on_policy_it_is_reinforce() {
    let log_probs = [-0.5, -2.0, -1e-3, -9.0];
    let numbers = one_sequence(&log_probs, &log_probs, &log_probs, 1.5);
    let (loss, gradient) = numbers.policy(&PolicyOptions::default());
    assert_eq!(loss.values().unwrap(), [-1.5 / 4.0; 4]);
    assert_eq!(gradient, [-1.5 / 4.0; 4]);
    for statistic in loss.statistics.iter().filter(|statistic| statistic.name.starts_with("clip_ratio")) {
        assert!(statistic.values.iter().all(|&value| value == 0.0), "{}", statistic.name);
    }
    for clip in CLIPS {
        for level in LEVELS {
            // Covariances are 0 where all advantages are one.
            let options = PolicyOptions {
                clip,
                importance_sampling_level: level,
                epsilon_high: Some(1.0),
                sapo_temperature_neg: 1.0,
                kl_cov_coef: 0.0,
                ..PolicyOptions::default()
            };
            let mean: f64 = numbers.policy(&options).1.iter().sum::<f64>() / 4.0;
            // The ratio of a whole sequence counts each token's gradient for every token.
            let whole = level == RatioLevel::SequenceProduct
                && matches!(
                    clip,
                    ClipKind::Ppo | ClipKind::None | ClipKind::Sapo | ClipKind::ClipCov | ClipKind::KlCov
                );
            let expected = -1.5 / 4.0 * if whole { 4.0 } else { 1.0 };
            assert!((mean - expected).abs() < 1e-12, "{clip:?} {level:?}: {mean}");
        }
    }
}

proptest! {
    /// With CE-U values do not change, nor gradients of what is not lowered; those of what is are multiplied by `p / (1 - p)`. A
    /// divergence in the loss keeps its own.
    #[test]
    fn bad_tokens_are_unlearnt_by_ce_u((options, numbers) in any_numbers(0.8)) {
        // A ratio of the whole sequence mixes the tokens' gradients, with one factor for all of a sequence's.
        prop_assume!(options.clip != ClipKind::KlCov);
        let ce_u = PolicyOptions { negative: Negative::CeU, ..options.clone() };
        ce_u.validate().unwrap();
        let ((likelihood, before), (found, after)) = (numbers.policy(&options), numbers.policy(&ce_u));
        prop_assert_eq!(found.values().unwrap(), likelihood.values().unwrap());
        let divergence = {
            let nothing = Numbers { advantages: vec![0.0; numbers.advantages.len()], ..numbers.clone() };
            nothing.policy(&PolicyOptions { clip: ClipKind::None, ..options }).1
        };
        for (token, (before, after)) in before.iter().zip(&after).enumerate() {
            let p = numbers.log_probs[token].min(-1e-6).exp();
            let factor = if numbers.advantages[token] < 0.0 { p / (1.0 - p) } else { 1.0 };
            let expected = (before - divergence[token]) * factor + divergence[token];
            prop_assert!((after - expected).abs() < 1e-9 * (1.0 + expected.abs()), "{after}, expected {expected}");
        }
    }
}

#[test]
fn beta_to_zero_is_beta_zero() {
    let numbers = one_sequence(&[-0.5, -2.0], &[-0.6, -1.9], &[-1.5, -0.2], -0.7);
    for kl in ESTIMATORS {
        let at = |beta: f64| numbers.value(&PolicyOptions { beta, kl, ..PolicyOptions::default() });
        assert!((at(1e-12) - at(0.0)).abs() < 1e-11);
        assert!((at(1e-2) - at(0.0)).abs() > 1e-4, "beta has an effect");
    }
}

/// d = log ρ - log π = ln 2: k1 = -ln 2, k2 = (ln 2)²/2, k3 = 2 - ln 2 - 1; derivatives with respect to log π are
/// 1, -ln 2 and 1 - 2. Forward, each weighed by ρ/π = 2: k1 = 2 ln 2 with derivative -2 ln 2 - 2, k3 = 2 ln 2 - 1 with -2 ln 2.
#[test]
fn kl_estimators_by_hand() {
    let two = 2f64.ln();
    use KlDirection::{Forward, Reverse};
    for (estimator, direction, value, derivative) in [
        (KlEstimator::K1, Reverse, -two, 1.0),
        (KlEstimator::K2, Reverse, two * two / 2.0, -two),
        (KlEstimator::K3, Reverse, 1.0 - two, -1.0),
        (KlEstimator::K1Plus, Reverse, -two, -two),
        (KlEstimator::K3Plus, Reverse, 1.0 - two, -two),
        (KlEstimator::K1, Forward, 2.0 * two, -2.0 * two - 2.0),
        (KlEstimator::K3, Forward, 2.0 * two - 1.0, -2.0 * two),
    ] {
        let log_prob = Var::from_slice(&[-1.0f64], 1, &Device::Cpu).unwrap();
        let kl = estimator.per_token(direction, log_prob.as_tensor(), &tensor(&[two - 1.0])).unwrap();
        assert!((kl.to_vec1::<f64>().unwrap()[0] - value).abs() < 1e-15, "{estimator:?}");
        let gradients = kl.sum_all().unwrap().backward().unwrap();
        let got = gradients.get(log_prob.as_tensor()).unwrap().to_vec1::<f64>().unwrap()[0];
        assert!((got - derivative).abs() < 1e-15, "{estimator:?}: {got}");
    }
}

/// A divergence of twice the target is an error of 0.2 at most: 1 + 0.2 · 50 / 1000.
#[test]
fn the_coefficient_follows_the_divergence() {
    let after = |kl: f64| {
        let mut controller = AdaptiveKl { coefficient: 0.5 };
        controller.update(kl, 50, 6.0, 1000.0);
        controller.coefficient
    };
    assert!((after(12.0) - 0.505).abs() < 1e-15 && (after(0.0) - 0.495).abs() < 1e-15);
    assert!((after(6.6) - 0.5025).abs() < 1e-15);
    assert_eq!(after(6.0), 0.5);
}

/// Rewards 1, 3: mean 2, sample variance ((−1)² + 1²) / 1 = 2.
/// Above the target there is no bonus, and the coefficient falls to its least; at it or below, it rises to its largest.
#[test]
fn the_coefficient_of_the_entropy_follows_the_entropy() {
    let control = EntropyControl { target: 1.0, delta: 0.25, min: 0.25, max: 1.0 };
    let mut adaptive = AdaptiveEntropy { coefficient: 0.5, entropy: None };
    assert_eq!(adaptive.applied(1.0), 0.0, "nothing is known before the first update");
    let mut after = |entropy: f64| {
        adaptive.update(entropy, control);
        (adaptive.coefficient, adaptive.applied(1.0))
    };
    let found = [1.0, 0.5, 0.9, 1.5, 1.1, 2.0, 2.0, 0.0].map(&mut after);
    let coefficients = [0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.25, 0.5];
    let applied = [0.75, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.5];
    assert_eq!(found.map(|(coefficient, _)| coefficient), coefficients);
    assert_eq!(found.map(|(_, applied)| applied), applied);
}

/// The bonus adds `- c / T` to the derivative by the entropy of every token of the update, however these are weighed.
#[test]
fn an_entropy_bonus_is_the_mean_entropy() {
    let mut numbers = one_sequence(&[-1.0, -0.5, -2.0], &[-1.1, -0.6, -2.0], &[-1.0; 3], 0.7);
    numbers.entropy = vec![0.1, 1.5, 0.8];
    numbers.update_tokens = 12;
    let plain = numbers.value(&PolicyOptions::default());
    let options = PolicyOptions { entropy_coef: 0.6, ..PolicyOptions::default() };
    assert!((numbers.value(&options) - (plain - 0.6 * 2.4 / 12.0)).abs() < 1e-15);
    let entropy = Var::from_tensor(&tensor(&numbers.entropy)).unwrap();
    let batch = numbers.batch(&tensor(&numbers.log_probs), entropy.as_tensor());
    let loss = objectives::policy(&options, &batch).unwrap();
    for derivative in loss.gradient(entropy.as_tensor()).unwrap() {
        assert!((derivative + 0.05).abs() < 1e-15, "{derivative}");
    }
    let missing = objectives::policy(&options, &PolicyBatch { entropy: None, ..batch });
    assert!(matches!(missing, Err(Error::Missing { what: "entropy", .. })));
    for refused in [
        PolicyOptions { entropy_coef: -0.1, ..PolicyOptions::default() },
        PolicyOptions { entropy_target: Some(f64::NAN), ..PolicyOptions::default() },
        PolicyOptions { entropy_coef_min: 2.0, ..PolicyOptions::default() },
    ] {
        assert!(refused.validate().is_err());
    }
}

#[test]
fn advantages_by_hand() {
    let values = |baseline, scale| {
        advantages(Estimator { baseline, scale, ..Estimator::default() }, &[1.0, 3.0], &[2]).unwrap().tokens
    };
    let scaled = 1.0 / (2f64.sqrt() + 1e-4);
    assert_eq!(values(Baseline::GroupMean, ScaleRewards::Group), [-scaled, scaled]);
    assert_eq!(values(Baseline::GroupMean, ScaleRewards::None), [-1.0, 1.0]);
    assert_eq!(values(Baseline::LeaveOneOut, ScaleRewards::None), [-2.0, 2.0]);
    assert_eq!(values(Baseline::None, ScaleRewards::None), [1.0, 3.0]);
}

/// Length 10, the last 4 are paid for: free up to 6, then a quarter a token, and no more than 1.
#[test]
fn overlong_completions_pay() {
    let paid: Vec<f64> = [0, 6, 7, 9, 10, 25].iter().map(|&n| objectives::shaping::overlong(n, 10, 4)).collect();
    assert_eq!(paid, [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]);
    assert_eq!(objectives::shaping::overlong(10, 10, 0), 0.0);
    assert_eq!(objectives::shaping::overlong(5, 10, 20), -0.25, "a margin wider than the limit begins at 0");
}

#[test]
fn quantiles_by_hand() {
    let of = |q: f64| objectives::filter::quantile(&[3.0, 1.0, 2.0, 5.0], q);
    assert_eq!((of(0.0), of(0.5), of(1.0)), (Some(1.0), Some(2.5), Some(5.0)));
    assert_eq!(objectives::filter::quantile(&[], 0.5), None);
    assert_eq!(objectives::value::explained_variance(&[1.0, 2.0], &[1.0, 2.0]), Some(1.0));
    assert_eq!(objectives::value::explained_variance(&[1.5, 1.5], &[1.0, 2.0]), Some(0.0));
    assert_eq!(objectives::value::explained_variance(&[1.0], &[1.0]), None);
}

/// The mean of three 0.1 is not 0.1 in floating point; its deviation times 1/ε would be a visible advantage.
#[test]
fn equal_rewards_teach_nothing() {
    for estimator in of_groups() {
        let advantages = advantages(estimator, &[0.1, 0.1, 0.1, 0.0, 1.0, 7.0, 7.0], &[3, 2, 1, 0, 1]).unwrap();
        assert_eq!(advantages.tokens[..3], [0.0; 3], "{estimator:?}");
        assert_eq!(advantages.tokens[5..], [0.0; 2], "{estimator:?}: alone in their groups");
        assert_eq!((advantages.zero_variance_groups, advantages.groups), (4, 5));
        let numbers = one_sequence(&[-1.0, -2.0], &[-1.1, -2.0], &[-1.0, -2.0], advantages.tokens[0]);
        assert_eq!(numbers.policy(&PolicyOptions::default()).1, [0.0; 2]);
    }
    assert!(!objectives::filter::has_variance(&[Some(0.1), None, Some(0.1)]));
    assert!(objectives::filter::has_variance(&[Some(0.1), None, Some(0.2)]));
    assert!(!objectives::filter::has_variance(&[None, None]));
}

#[test]
fn unscored_samples_take_no_part() {
    let penalties = [-0.5, -0.25, 0.0, -1.0];
    let of = |scores: &[Option<f64>], estimator: Estimator| {
        let (lengths, values) = (vec![1, 1, 2], [0.5, 0.25, 0.125, 0.0]);
        let rewards = Rewards {
            scores,
            groups: &[3],
            lengths: &lengths,
            token_rewards: Some(&penalties),
            greedy: None,
            values: Some(&values),
            turns: None,
            spans: None,
        };
        estimator.advantages(&rewards).unwrap()
    };
    let scores = [Some(1.0), None, Some(0.75)];
    let mean = Estimator { scale: ScaleRewards::None, ..Estimator::default() };
    // Completions are worth 0.5, nothing and -0.25; their mean is 0.125.
    assert_eq!(of(&scores, mean).tokens, [0.375, 0.0, -0.375, -0.375]);
    let none = of(&[None, None, None], mean);
    assert_eq!((none.tokens, none.zero_variance_groups), (vec![0.0; 4], 1));
    let value = of(&scores, Estimator { baseline: Baseline::Value, whiten_advantages: true, ..Estimator::default() });
    assert_eq!((value.tokens[1], value.returns[1]), (0.0, 0.25), "the value model is right about what has no reward");
    let others: f64 = [0, 2, 3].iter().map(|&token| value.tokens[token]).sum();
    assert!(others.abs() < 1e-12, "whitened among the scored: {:?}", value.tokens);
}

/// Completions that lost all their tokens to a mask count in the baseline and nowhere else.
#[test]
fn completions_without_tokens_have_no_advantage_of_tokens() {
    let scores = [Some(1.0), Some(0.0), Some(1.0)];
    for baseline in [Baseline::GroupMean, Baseline::Value, Baseline::None] {
        let estimator = Estimator { baseline, whiten_advantages: true, whiten_rewards: true, ..Estimator::default() };
        let none =
            Rewards { scores: &scores, groups: &[3], lengths: &[0, 0, 0], values: Some(&[]), ..Rewards::default() };
        assert!(estimator.advantages(&none).unwrap().tokens.is_empty());
        let one = Rewards { lengths: &[0, 1, 0], values: Some(&[0.5]), ..none };
        let found = estimator.advantages(&one).unwrap();
        assert!(found.tokens.len() == 1 && found.tokens[0].is_finite(), "{found:?}");
    }
}

#[test]
fn extremes_stay_finite() {
    let extremes = [-1e4, -1e4, 0.0, -1e-30, -1e4];
    let others = [0.0, -1e4, -1e4, 0.0, -9_999.0];
    for advantage in [-3.0, 0.0, 3.0] {
        for (clip, kl) in CLIPS.into_iter().zip(ESTIMATORS.into_iter().cycle()) {
            for (importance_sampling_level, kl_direction) in
                LEVELS.into_iter().zip([KlDirection::Reverse, KlDirection::Forward].into_iter().cycle())
            {
                for (a, b) in [(&extremes, &others), (&others, &extremes)] {
                    let options = PolicyOptions {
                        beta: 0.1,
                        kl,
                        clip,
                        kl_direction,
                        importance_sampling_level,
                        use_bias_correction_kl: true,
                        top_entropy_quantile: 0.5,
                        off_policy_mask_threshold: Some(0.1),
                        cov_ratio: 0.5,
                        baseline: Baseline::Value,
                        ..PolicyOptions::default()
                    };
                    let mut numbers = one_sequence(a, b, b, advantage);
                    numbers.sampling = a.to_vec();
                    let (loss, gradient) = numbers.policy(&options);
                    let values = loss.values().unwrap();
                    let logged = loss.statistics.iter().flat_map(|statistic| &statistic.values);
                    let finite = values.iter().chain(&gradient).chain(logged).all(|x| x.is_finite());
                    assert!(finite, "{clip:?}: {values:?} {gradient:?} {:?}", loss.statistics);
                }
            }
        }
    }
}

#[test]
fn no_tokens_is_no_loss() {
    let empty = one_sequence(&[], &[], &[], 1.0);
    for clip in CLIPS {
        for importance_sampling_level in LEVELS {
            let options = PolicyOptions {
                beta: 0.1,
                clip,
                importance_sampling_level,
                top_entropy_quantile: 0.5,
                off_policy_mask_threshold: Some(0.1),
                importance_sampling_mode: CorrectionMode::SequenceMask,
                ..PolicyOptions::default()
            };
            let (loss, gradient) = empty.policy(&options);
            assert!(loss.values().unwrap().is_empty() && gradient.is_empty());
            for statistic in &loss.statistics {
                let mut fold = Fold::new(statistic.reduce);
                fold.extend(&statistic.values);
                assert_eq!(fold.value(), None, "{}", statistic.name);
            }
        }
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
    let loss =
        objectives::policy(&PolicyOptions::default(), &numbers.batch(log_probs.as_tensor(), &tensor(&numbers.entropy)))
            .unwrap();
    // The first ratio, e^0.25 = 1.284, is held at 1.2; the second is 1.
    assert_eq!(loss.gradient(log_probs.as_tensor()).unwrap(), [0.0, -0.5]);
}

#[test]
fn wrong_inputs_are_named() {
    let numbers = one_sequence(&[-0.5, -2.0], &[-0.5, -2.0], &[-0.5, -2.0], 1.0);
    let log_probs = tensor(&numbers.log_probs);
    let refused = |options: PolicyOptions, change: fn(&mut PolicyBatch)| {
        let mut batch = numbers.batch(&log_probs, &tensor(&numbers.entropy));
        change(&mut batch);
        objectives::policy(&options, &batch).unwrap_err().to_string()
    };
    let default = PolicyOptions::default;
    let error = refused(default(), |batch| batch.old_log_probs = tensor(&[-0.5]));
    assert_eq!(error, "old_log_probs has length 1, expected 2");
    let error = refused(default(), |batch| batch.sampling_log_probs = Some(tensor(&[-0.5])));
    assert_eq!(error, "sampling_log_probs has length 1, expected 2");
    let error = refused(PolicyOptions { beta: 0.04, ..default() }, |batch| batch.reference_log_probs = None);
    assert_eq!(error, "reference_log_probs is missing: beta is not 0");
    let error = refused(PolicyOptions { top_entropy_quantile: 0.5, ..default() }, |batch| batch.entropy = None);
    assert_eq!(error, "entropy is missing: top_entropy_quantile is below 1, or entropy_coef above 0");
    let error = refused(PolicyOptions { clip: ClipKind::ClipCov, ..default() }, |batch| batch.draws = None);
    assert_eq!(error, "draws is missing: clip_cov leaves out tokens at random");

    let error = advantages(Estimator::default(), &[0.0, f64::NAN], &[2]);
    assert!(matches!(error, Err(Error::NonFiniteReward { index: 1, .. })));
    assert!(advantages(Estimator::default(), &[0.0, 1.0, 2.0], &[2]).is_err());
    for (baseline, what) in [(Baseline::Greedy, "greedy"), (Baseline::Value, "values")] {
        let error = advantages(Estimator { baseline, ..Estimator::default() }, &[0.0, 1.0], &[2]).unwrap_err();
        assert!(error.to_string().starts_with(&format!("{what} is missing")), "{error}");
    }
    for wrong in [
        PolicyOptions { epsilon: 1.0, ..default() },
        PolicyOptions { epsilon_high: Some(-0.1), ..default() },
        PolicyOptions { delta: Some(1.1), ..default() },
        PolicyOptions { delta: Some(3.0), clip: ClipKind::Sapo, ..default() },
        PolicyOptions { beta: f64::NAN, ..default() },
        PolicyOptions { lam: 1.5, ..default() },
        PolicyOptions { kl_target: Some(6.0), ..default() },
        PolicyOptions { top_entropy_quantile: 0.0, ..default() },
        PolicyOptions { importance_sampling_clip_min: Some(3.0), ..default() },
        PolicyOptions { vespo_lambda_neg: 0.0, ..default() },
        PolicyOptions { clip: ClipKind::Cispo, epsilon_high: Some(0.28), ..default() },
    ] {
        assert!(matches!(wrong.validate(), Err(Error::Range { .. })), "{wrong:?}");
    }
    let unbounded = PolicyOptions { clip: ClipKind::Cispo, ..default() };
    assert!(
        unbounded.validate().unwrap_err().to_string().starts_with("epsilon_high is missing: with clip = \"cispo\"")
    );
    PolicyOptions { epsilon_high: Some(5.0), ..unbounded }.validate().unwrap();
    let mixed = PolicyOptions { clip: ClipKind::KlCov, negative: Negative::CeU, ..default() };
    assert!(matches!(mixed.validate(), Err(Error::Conflict { what: "negative", .. })));
    default().validate().unwrap();
}

/// Divided by a deviation, what is no difference to a mean of the same rewards would grow ten thousandfold where these are equal.
#[test]
fn deviations_divide_differences_to_a_mean_alone() {
    let refused = |options: &PolicyOptions| {
        let error = options.validate().err().map(|error| error.to_string());
        error.is_some_and(|error| error.starts_with("scale_rewards: a deviation of rewards bounds differences"))
    };
    for scale_rewards in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
        let plain = PolicyOptions { scale_rewards, ..PolicyOptions::default() };
        let by_token = PolicyOptions { credit: Credit::Token, ..plain.clone() };
        let paid = PolicyOptions { beta: 0.1, kl_in: objectives::KlPlacement::Reward, ..plain.clone() };
        let unbounded = [
            PolicyOptions { baseline: Baseline::Greedy, ..plain.clone() },
            PolicyOptions { baseline: Baseline::None, ..plain.clone() },
            PolicyOptions { gamma: 0.9, ..by_token.clone() },
            PolicyOptions { credit: Credit::Token, ..paid.clone() },
        ];
        for options in &unbounded {
            assert_eq!(refused(options), scale_rewards != ScaleRewards::None, "{options:?}");
            assert!(!refused(&PolicyOptions { baseline: Baseline::Value, ..options.clone() }), "not read");
        }
        for options in [plain, by_token, paid] {
            assert!(!refused(&options), "{options:?}");
            assert!(!refused(&PolicyOptions { baseline: Baseline::LeaveOneOut, ..options }));
        }
    }
}

/// Three episodes of two turns with returns (1, 0), (1, 1) and (1, 0.5), totals equal or a rounding error apart: the first turns led to the same, of the
/// second ones the squares are 0.5 with 2 · 2 degrees of freedom. An episode without a score takes no part.
#[test]
fn turns_are_scaled_by_the_deviation_of_what_they_led_to() {
    let turn = |reward: f64, tokens: usize| TurnReward { reward, tokens };
    let turns = [
        vec![turn(1.0, 1), turn(0.0, 2)],
        vec![turn(0.0, 1), turn(1.0, 1)],
        vec![turn(5.0, 1), turn(-7.0, 1)],
        vec![turn(0.5, 2), turn(0.5, 1)],
    ];
    for total in [1.0, 1.0 + f64::EPSILON] {
        for scale in [ScaleRewards::Group, ScaleRewards::Batch] {
            let rewards = Rewards {
                scores: &[Some(1.0), Some(total), None, Some(1.0)],
                groups: &[4],
                lengths: &[3, 2, 2, 3],
                turns: Some(&turns),
                ..Rewards::default()
            };
            let found = Estimator { credit: Credit::Turn, scale, ..Estimator::default() }.advantages(&rewards).unwrap();
            let one = 0.5 / (0.125f64.sqrt() + 1e-4);
            let expected = [0.0, -one, -one, 0.0, one, 0.0, 0.0, 0.0, 0.0, 0.0];
            assert_eq!(found.tokens.len(), expected.len());
            assert!(found.tokens.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{scale:?}: {found:?}");
            assert!(found.sequences.iter().all(|whole| whole.abs() < 1e-9), "the episodes did alike: {found:?}");
        }
    }
}

/// Two tokens of a sequence share one ratio and not the advantage, so that the clip acts on one of them.
#[test]
fn what_is_clipped_is_counted_token_by_token() {
    let mut numbers = one_sequence(&[-1.0, -1.0], &[-2.0, -2.0], &[-1.0, -1.0], 0.0);
    numbers.advantages = vec![0.0, 1.0];
    for clip in [ClipKind::Ppo, ClipKind::DppoTv] {
        let options =
            PolicyOptions { clip, importance_sampling_level: RatioLevel::Sequence, ..PolicyOptions::default() };
        let loss = numbers.policy(&options).0;
        for name in ["clip_ratio/high_mean", "clip_ratio/region_mean"] {
            let found = loss.statistics.iter().find(|statistic| statistic.name == name).unwrap();
            assert_eq!(found.values, [0.5], "{clip:?} {name}");
        }
    }
}

/// `φ = exp(λ + k log w - λ w)` with `w` the sequence's ratio to the sampler: `e^0.3` to the old policy, times the bounded `e^0.4` of that, once.
#[test]
fn vespo_corrects_a_sequence_once() {
    let mut numbers = one_sequence(&[-0.9, -0.8, -1.0], &[-1.0; 3], &[-1.0; 3], 1.0);
    numbers.sampling = vec![-1.5, -0.9, -1.0];
    for (mode, most, kept) in [
        (CorrectionMode::SequenceTruncate, 2.0, 0.4),
        (CorrectionMode::SequenceTruncate, 1.25, 1.25f64.ln()),
        (CorrectionMode::SequenceMask, 2.0, 0.4),
        (CorrectionMode::TokenTruncate, 2.0, 0.4),
    ] {
        let options = PolicyOptions {
            clip: ClipKind::Vespo,
            importance_sampling_mode: mode,
            importance_sampling_clip_max: most,
            ..PolicyOptions::default()
        };
        let loss = numbers.policy(&options).0;
        let phi = &loss.statistics.iter().find(|statistic| statistic.name == "vespo/phi_seq_mean").unwrap().values;
        let log_w: f64 = 0.3 + kept;
        let expected = (3.0 + 2.0 * log_w - 3.0 * log_w.exp()).exp();
        assert!((phi[0] - expected).abs() < 1e-12, "{mode:?} {most}: {phi:?}, expected {expected}");
    }
}

/// With one turn a completion, credit by turns is credit by completions; a discount leaves the first of two turns its share.
#[test]
fn credit_by_turns_is_that_of_completions_where_there_is_one() {
    let turn = |reward: f64, tokens: usize| TurnReward { reward, tokens };
    let own_scores = [1.0, 0.0, 0.25, 3.0].map(Some);
    let lengths = [2, 0, 1, 2];
    let own_turns: Vec<Vec<TurnReward>> =
        own_scores.iter().zip(lengths).map(|(score, tokens)| vec![turn(score.unwrap(), tokens)]).collect();
    for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
        let estimator = Estimator { scale, ..Estimator::default() };
        let rewards = Rewards {
            scores: &own_scores,
            groups: &[2, 2],
            lengths: &lengths,
            turns: Some(&own_turns),
            ..Rewards::default()
        };
        let whole = estimator.advantages(&rewards).unwrap();
        let by_turn = Estimator { credit: Credit::Turn, ..estimator }.advantages(&rewards).unwrap();
        assert!(whole.tokens.iter().zip(&by_turn.tokens).all(|(a, b)| (a - b).abs() < 1e-12));
        assert_eq!(whole.sequences, by_turn.sequences);
    }
    let estimator = Estimator { credit: Credit::Turn, scale: ScaleRewards::None, gamma: 0.5, ..Estimator::default() };
    let turns = [vec![turn(0.0, 1), turn(1.0, 2)], vec![turn(0.0, 2), turn(0.0, 1)]];
    let rewards = Rewards {
        scores: &[Some(1.0), Some(0.0)],
        groups: &[2],
        lengths: &[3, 3],
        turns: Some(&turns),
        ..Rewards::default()
    };
    assert_eq!(estimator.advantages(&rewards).unwrap().tokens, [0.25, 0.5, 0.5, -0.25, -0.25, -0.5]);
    assert!(estimator.advantages(&Rewards { turns: None, ..rewards }).is_err(), "turns are missing");
    assert!(estimator.advantages(&Rewards { lengths: &[3, 2], ..rewards }).is_err(), "tokens that are in no turn");
}

/// A step of two completions of one prompt, the first with two spans and the second with one, and a completion that nobody judged.
fn spans() -> [Vec<SpanReward>; 3] {
    let span = |reward: f64, tokens| SpanReward { reward, tokens };
    [vec![span(1.0, 1..3), span(-0.5, 4..5)], vec![span(0.25, 0..2)], vec![]]
}

/// A completion without spans, or within one, is paid as with credit by completions, whatever it is compared with.
#[test]
fn credit_by_spans_is_that_of_completions_where_the_whole_is_one() {
    let (scores, lengths) = ([Some(1.0), Some(0.0), None, Some(3.0), Some(0.5)], [2, 0, 1, 2, 3]);
    let rewards = [0.1, -0.2, 0.3, 0.0, 0.5, 0.1, 0.2, -0.1];
    let values = [0.3, 0.1, 0.2, 0.0, 0.4, 0.6, 0.1, 0.2];
    for baseline in [Baseline::GroupMean, Baseline::LeaveOneOut, Baseline::Greedy, Baseline::Value, Baseline::None] {
        for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
            for whiten_advantages in [false, true] {
                let estimator = Estimator { baseline, scale, whiten_advantages, ..Estimator::default() };
                let given = Rewards {
                    scores: &scores,
                    groups: &[3, 2],
                    lengths: &lengths,
                    token_rewards: Some(&rewards),
                    greedy: Some(&[0.5, 1.0]),
                    values: Some(&values),
                    ..Rewards::default()
                };
                let whole = estimator.advantages(&given).unwrap();
                let by_span = Estimator { credit: Credit::Span, ..estimator };
                let covered = |index: usize| {
                    let reward = scores[index].unwrap_or(0.0);
                    vec![SpanReward { reward, tokens: 0..lengths[index] }]
                };
                for spans in [vec![Vec::new(); 5], (0..5).map(covered).collect()] {
                    let found = by_span.advantages(&Rewards { spans: Some(&spans), ..given }).unwrap();
                    assert_eq!(found, whole, "{baseline:?} {scale:?}");
                }
            }
        }
    }
}

/// Each span has the advantages of an episode whose prompt is what stands before it (Rewarding Doubt, 2.3); what is in no span has none.
#[test]
fn a_span_is_an_episode_of_its_own() {
    let (rewards, values) =
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], [0.2, 0.4, 0.1, 0.3, 0.6, 0.5, 0.2, 0.7, 0.1]);
    // Tokens of spans: 1, 2 | 4 | 5, 6; of the completion without a score 8.
    let places = [1, 2, 4, 5, 6, 8];
    let of = |all: &[f64]| places.map(|place| all[place]);
    for baseline in [Baseline::GroupMean, Baseline::LeaveOneOut, Baseline::Value, Baseline::None] {
        let estimator = Estimator { baseline, whiten_advantages: baseline == Baseline::Value, ..Estimator::default() };
        let spans = spans();
        let given = Rewards {
            scores: &[Some(0.25), Some(0.25), None],
            groups: &[3],
            lengths: &[5, 3, 1],
            token_rewards: Some(&rewards),
            values: Some(&values),
            spans: Some(&spans),
            ..Rewards::default()
        };
        let found = Estimator { credit: Credit::Span, ..estimator }.advantages(&given).unwrap();
        let episodes = Rewards {
            scores: &[Some(1.0), Some(-0.5), Some(0.25), None],
            groups: &[4],
            lengths: &[2, 1, 2, 1],
            token_rewards: Some(&of(&rewards)),
            values: Some(&of(&values)),
            spans: None,
            ..given
        };
        let expected = estimator.advantages(&episodes).unwrap();
        assert_eq!(of(&found.tokens), expected.tokens[..], "{baseline:?}");
        assert_eq!([0, 3, 7].map(|outside| found.tokens[outside]), [0.0; 3]);
        assert_eq!(found.sequences[0], (expected.sequences[0] + expected.sequences[1]) / 2.0);
        assert_eq!(found.sequences[1..], expected.sequences[2..]);
        if baseline == Baseline::Value {
            assert_eq!(of(&found.returns), expected.returns[..]);
            assert_eq!([0, 3, 7].map(|outside| found.returns[outside]), [0, 3, 7].map(|outside| values[outside]));
        }
    }
}

#[test]
fn spans_that_cannot_be_are_refused() {
    let estimator = Estimator { credit: Credit::Span, ..Estimator::default() };
    let refused = |spans: Option<&[Vec<SpanReward>]>| {
        let rewards = Rewards {
            scores: &[Some(1.0), None, None],
            groups: &[3],
            lengths: &[5, 3, 1],
            spans,
            ..Rewards::default()
        };
        estimator.advantages(&rewards).unwrap_err().to_string()
    };
    assert!(refused(None).starts_with("spans is missing"));
    assert!(refused(Some(&spans()[..2])).contains("the list of spans has length 2, expected 3"));
    let [mut first, second, third] = spans();
    first[1].tokens = 2..5;
    assert!(refused(Some(&[first.clone(), second.clone(), third.clone()])).contains("the start of a span is 2"));
    first[1].tokens = 4..6;
    assert!(refused(Some(&[first.clone(), second.clone(), third.clone()])).contains("the start of a span is 4"));
    first[1] = SpanReward { reward: f64::NAN, tokens: 4..5 };
    assert!(refused(Some(&[first, second, third])).contains("NaN"));
}
