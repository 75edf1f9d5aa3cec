//! What must hold for any preference batch: gradients equal finite differences, splits and the order of rows change
//! nothing, limits and extremes.

use candle_core::{DType, Device, Tensor, Var};
use objectives::{
    Ball, Error, Length, Loss, Members, NashMdBatch, Negative, PairBatch, PairLoss, PreferenceOptions, RankingBatch,
    RunningMean, Score, UnpairedBaseline, UnpairedBatch, UnpairedOptions, Utility, WorstCase,
};
use posttrain_objectives as objectives;
use proptest::prelude::*;

const LOSSES: [PairLoss; 15] = [
    PairLoss::Sigmoid,
    PairLoss::SigmoidNorm,
    PairLoss::Hinge,
    PairLoss::Ipo,
    PairLoss::ExoPair,
    PairLoss::NcaPair,
    PairLoss::Robust,
    PairLoss::BcoPair,
    PairLoss::SppoHard,
    PairLoss::Aot,
    PairLoss::AotUnpaired,
    PairLoss::ApoZero,
    PairLoss::ApoDown,
    PairLoss::Discopop,
    PairLoss::Sft,
];

fn tensor(values: &[f64]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

/// Pairs as plain numbers: for each sequence its tokens, as log-probs of policy, reference and sharpened policy.
#[derive(Clone, Debug)]
struct Pairs {
    sequences: Vec<Vec<[f64; 3]>>,
    per_pair: usize,
    /// Pairs and sft tokens of the whole batch, of which this may be a part.
    whole: (usize, usize),
}

impl Pairs {
    fn new(sequences: Vec<Vec<[f64; 3]>>, per_pair: usize) -> Self {
        let learnt = if per_pair == 3 { 2 } else { 0 };
        let sft = sequences.iter().skip(learnt).step_by(per_pair).map(Vec::len).sum();
        Self { whole: (sequences.len() / per_pair, sft), sequences, per_pair }
    }

    fn column(&self, which: usize) -> Vec<f64> {
        self.sequences.iter().flatten().map(|token| token[which]).collect()
    }

    fn batch(&self, log_probs: &Tensor) -> PairBatch {
        let numbered = self.sequences.iter().zip(0..);
        let pairs = self.sequences.len() / self.per_pair;
        PairBatch {
            log_probs: log_probs.clone(),
            reference_log_probs: Some(tensor(&self.column(1))),
            sharpened_log_probs: Some(tensor(&self.column(2))),
            sequence: numbered.flat_map(|(tokens, number)| vec![number; tokens.len()]).collect(),
            sequences_per_pair: self.per_pair,
            weights: tensor(&vec![1.0 / self.whole.0 as f64; pairs]),
            sft_tokens: self.whole.1,
            prompts: (0..pairs as u32).map(|pair| pair / 2).collect(),
        }
    }

    fn loss(&self, options: &PreferenceOptions) -> (Loss, Vec<f64>) {
        let log_probs = Var::from_tensor(&tensor(&self.column(0))).unwrap();
        let loss = objectives::preference(options, &self.batch(log_probs.as_tensor())).unwrap();
        let gradient = loss.gradient(log_probs.as_tensor()).unwrap();
        (loss, gradient)
    }

    fn values(&self, options: &PreferenceOptions) -> Vec<f64> {
        self.loss(options).0.values().unwrap()
    }

    fn value(&self, options: &PreferenceOptions) -> f64 {
        self.values(options).iter().sum()
    }

    /// The pairs in this order, as a batch of their own or as a part of this one.
    fn pick(&self, order: &[usize]) -> Self {
        let sequences = order.iter().flat_map(|pair| self.sequences[pair * self.per_pair..][..self.per_pair].to_vec());
        Self { sequences: sequences.collect(), ..self.clone() }
    }

    /// Every log-prob of the policy moved a little; `None` for those that have none.
    fn moved(&self, token: usize, by: f64) -> Self {
        let mut moved = self.clone();
        moved.sequences.iter_mut().flatten().nth(token).unwrap()[0] += by;
        moved
    }
}

/// Options of every kind, valid together.
fn any_options() -> impl Strategy<Value = PreferenceOptions> {
    let score = prop_oneof![
        4 => Just(Score::ReverseKl),
        1 => Just(Score::ForwardKl),
        1 => Just(Score::JsDivergence),
        1 => Just(Score::AlphaDivergence),
        1 => Just(Score::LogOdds),
    ];
    let terms = prop::collection::vec((0..LOSSES.len(), 0.1..1.5f64), 1..4);
    let length = prop_oneof![2 => Just(Length::Sum), 1 => Just(Length::Mean)];
    let numbers = (0.05..1.0f64, 0.0..1.0f64, 0.01..0.4f64, proptest::option::of(0.0..1.0f64), 0.2..0.8f64);
    (terms, score, length, any::<(bool, bool)>(), numbers).prop_map(
        |(terms, score, length, (reference_free, use_weighting), (beta, gamma, label_smoothing, ld_alpha, alpha))| {
            let odds = score == Score::LogOdds;
            let kept = |loss: PairLoss| score == Score::ReverseKl || loss.takes_any_score();
            let kind = |index: usize| if kept(LOSSES[index]) { LOSSES[index] } else { PairLoss::Sigmoid };
            let loss_type: Vec<PairLoss> = terms.iter().map(|(index, _)| kind(*index)).collect();
            PreferenceOptions {
                use_weighting: use_weighting && !loss_type.iter().any(|loss| loss.compares_pairs()),
                label_smoothing: if loss_type.iter().any(|loss| loss.reads_smoothing()) {
                    label_smoothing
                } else {
                    0.0
                },
                loss_type,
                loss_weights: terms.iter().map(|(_, weight)| *weight).collect(),
                beta,
                gamma,
                reference_free: reference_free || odds,
                length: if odds { Length::Mean } else { length },
                ld_alpha,
                score,
                score_alpha: alpha,
                discopop_tau: 0.5,
                worst_case: None,
                negative: Negative::GradientAscent,
            }
        },
    )
}

fn any_pairs() -> impl Strategy<Value = Pairs> {
    let token = (-3.0..-0.2f64, -0.7..0.7f64, -0.5..0.2f64).prop_map(|(p, r, s)| [p, p + r, p + s]);
    let sequence = prop::collection::vec(token, 0..5);
    (1usize..6, 2usize..4).prop_flat_map(move |(pairs, per_pair)| {
        prop::collection::vec(sequence.clone(), pairs * per_pair)
            .prop_map(move |sequences| Pairs::new(sequences, per_pair))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn gradients_equal_finite_differences(options in any_options(), pairs in any_pairs()) {
        options.validate().unwrap();
        // What is a constant to the gradient has to be one to the difference.
        let options = PreferenceOptions { use_weighting: false, ..options };
        let (_, gradient) = pairs.loss(&options);
        let h = 1e-6;
        for (token, &gradient) in gradient.iter().enumerate() {
            let at = |by: f64| pairs.moved(token, by).values(&options);
            // Pair by pair: in the sum of all, the rounding of a large loss would cover the change of a small one.
            let rise = |to: &[f64], from: &[f64]| to.iter().zip(from).map(|(to, from)| to - from).sum::<f64>() / h;
            let (below, here, above) = (at(-h), at(0.0), at(h));
            let difference = rise(&above, &below) / 2.0;
            // At the corner of a hinge, or where the order of two pairs changes, the slopes on the two sides differ.
            if (rise(&above, &here) - rise(&here, &below)).abs() < 1e-3 {
                let rounding = 4.0 * f64::EPSILON * here.iter().map(|value| value.abs()).fold(0.0, f64::max) / h;
                let allowed = 1e-6 * (1.0 + gradient.abs()) + rounding;
                prop_assert!((difference - gradient).abs() < allowed, "{difference} {gradient}");
            }
        }
    }

    #[test]
    fn a_split_changes_no_bit(options in any_options(), pairs in any_pairs(), cut in any::<prop::sample::Index>()) {
        prop_assume!(!options.compares_pairs());
        let count = pairs.sequences.len() / pairs.per_pair;
        let all: Vec<usize> = (0..count).collect();
        let (first, second) = all.split_at(cut.index(count));
        let (whole, gradient) = pairs.loss(&options);
        let parts = [first, second].map(|part| pairs.pick(part).loss(&options));
        prop_assert_eq!(whole.values().unwrap(), [parts[0].0.values().unwrap(), parts[1].0.values().unwrap()].concat());
        prop_assert_eq!(gradient, [parts[0].1.clone(), parts[1].1.clone()].concat());
    }

    #[test]
    fn the_order_of_the_pairs_does_not_matter(options in any_options(), pairs in any_pairs(), robust in any::<bool>()) {
        let worst_case = WorstCase::new(Ball::ChiSquare, 0.3);
        let worst_case = (robust && !options.compares_pairs()).then_some(worst_case);
        let options = PreferenceOptions { worst_case, ..options };
        let count = pairs.sequences.len() / pairs.per_pair;
        let backwards: Vec<usize> = (0..count).rev().collect();
        let (value, other) = (pairs.value(&options), pairs.pick(&backwards).value(&options));
        prop_assert!((value - other).abs() < 1e-9 * (1.0 + value.abs()), "{value} {other}");
    }

    #[test]
    fn extremes_stay_finite(options in any_options(), extreme in prop::sample::select(vec![-1e4, -1e-30, 0.0, -30.0])) {
        let other = if extreme == -1e4 { 0.0 } else { -1e4 };
        let long = |p: f64, r: f64| vec![[p, r, p]; 3];
        let sequences =
            vec![long(extreme, other), long(other, extreme), vec![], long(extreme, other), long(other, other), vec![]];
        let worst = (!options.compares_pairs()).then_some(WorstCase::new(Ball::Kl, 0.2));
        for worst_case in [None, worst] {
            let options = PreferenceOptions { worst_case, ..options.clone() };
            let (loss, gradient) = Pairs::new(sequences.clone(), 2).loss(&options);
            let values = loss.values().unwrap();
            prop_assert!(values.iter().chain(&gradient).all(|x| x.is_finite()), "{values:?} {gradient:?}");
            for statistic in &loss.statistics {
                prop_assert!(statistic.values.iter().all(|x| x.is_finite()), "{statistic:?}");
            }
        }
    }

    #[test]
    fn worst_weights_are_a_distribution_in_the_ball(
        losses in prop::collection::vec(-3.0..3.0f64, 1..12),
        radius in 0.0..0.9f64,
        ball in prop::sample::select(vec![Ball::TotalVariation, Ball::Cvar, Ball::ChiSquare, Ball::Kl]),
    ) {
        let q = WorstCase::new(ball, radius).weights(&losses);
        let n = losses.len() as f64;
        prop_assert!((q.iter().sum::<f64>() - 1.0).abs() < 1e-9 && q.iter().all(|&q| q >= 0.0), "{q:?}");
        let distance = match ball {
            Ball::TotalVariation => q.iter().map(|q| (q - 1.0 / n).abs()).sum::<f64>() / 2.0,
            Ball::Cvar => 1.0 - 1.0 / (n * q.iter().copied().fold(0.0, f64::max)),
            Ball::ChiSquare => q.iter().map(|q| (n * q - 1.0).powi(2)).sum::<f64>() / (2.0 * n),
            Ball::Kl => q.iter().filter(|&&q| q > 0.0).map(|q| q * (n * q).ln()).sum(),
        };
        prop_assert!(distance <= radius + 1e-9, "{distance} {radius}");
        let value = |q: &[f64]| q.iter().zip(&losses).map(|(q, l)| q * l).sum::<f64>();
        let mean = losses.iter().sum::<f64>() / n;
        prop_assert!(value(&q) >= mean - 1e-9);
        let wider = WorstCase::new(ball, radius + 0.05).weights(&losses);
        prop_assert!(value(&wider) >= value(&q) - 1e-9, "a larger ball holds a worse case");
        for (a, qa) in losses.iter().zip(&q) {
            for (b, qb) in losses.iter().zip(&q) {
                prop_assert!(a < b || qa >= qb || (qa - qb).abs() < 1e-12, "larger losses weigh more");
            }
        }
    }
}

/// A ranking of these rewards, each that of a completion with one token, and one without any.
fn ranked(rewards: &[f64], options: &PreferenceOptions) -> (f64, Vec<f64>) {
    let log_probs = Var::from_tensor(&tensor(rewards)).unwrap();
    let batch = RankingBatch {
        log_probs: log_probs.as_tensor().clone(),
        reference_log_probs: Some(tensor(&vec![0.0; rewards.len()])),
        sequence: (0..rewards.len() as u32).collect(),
        rankings: vec![rewards.len()],
        weights: vec![1.0],
    };
    let loss = objectives::ranking(options, &batch).unwrap();
    (loss.values().unwrap().iter().sum(), loss.gradient(log_probs.as_tensor()).unwrap())
}

fn plackett_luce() -> PreferenceOptions {
    PreferenceOptions { loss_type: vec![PairLoss::PlackettLuce], beta: 0.7, ..PreferenceOptions::default() }
}

/// `-Σ_k log(e^{β h_k} / Σ_{j ≥ k} e^{β h_j})`, written out; and its derivatives against differences.
#[test]
fn rankings_by_hand() {
    let options = plackett_luce();
    for rewards in [vec![0.3, -1.2, 2.0, 0.1], vec![0.0; 3], vec![1e4, -1e4, 3.0]] {
        let (loss, gradient) = ranked(&rewards, &options);
        let expected: f64 = (0..rewards.len())
            .map(|k| {
                let rest: Vec<f64> = rewards[k..].iter().map(|reward| 0.7 * reward).collect();
                let largest = rest.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                largest + rest.iter().map(|x| (x - largest).exp()).sum::<f64>().ln() - rest[0]
            })
            .sum();
        assert!((loss - expected).abs() < 1e-12 * (1.0 + expected.abs()), "{loss}, expected {expected}");
        for (place, derivative) in gradient.iter().enumerate() {
            let at = |delta: f64| {
                let mut moved = rewards.clone();
                moved[place] += delta;
                ranked(&moved, &options).0
            };
            let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((derivative - difference).abs() < 1e-5, "{derivative}, {difference}");
        }
    }
}

/// Of two completions it is DPO's loss, as a ranking and as a pair; all orders of equal rewards are equally likely.
#[test]
fn rankings_of_two_are_pairs() {
    let pairs = two_pairs();
    let dpo = PreferenceOptions { beta: 0.7, ..PreferenceOptions::default() };
    assert!((pairs.value(&plackett_luce()) - pairs.value(&dpo)).abs() < 1e-12);
    let (loss, _) = ranked(&[0.4, -0.3], &plackett_luce());
    assert!((loss - (1.0 + f64::exp(-0.49)).ln()).abs() < 1e-12);
    let (loss, _) = ranked(&[0.2; 5], &plackett_luce());
    assert!((loss - 120f64.ln()).abs() < 1e-12, "{loss}");
}

#[test]
fn rankings_weigh_and_refuse() {
    let options = PreferenceOptions { length: Length::Mean, ..plackett_luce() };
    let batch = |weights: Vec<f64>, sequence: Vec<u32>| RankingBatch {
        log_probs: tensor(&[-1.0, -2.0, -0.5, -3.0]),
        reference_log_probs: Some(tensor(&[-1.0; 4])),
        sequence,
        rankings: vec![2, 3],
        weights,
    };
    // Two tokens of the first completion, one of the second; of the second ranking the last alone has one.
    let loss = objectives::ranking(&options, &batch(vec![0.25, 0.5], vec![0, 0, 1, 4])).unwrap();
    let values = loss.values().unwrap();
    let first = (1.0 + f64::exp(0.7 * (0.5 + 0.5))).ln();
    assert!((values[0] - 0.25 * first).abs() < 1e-12 && values[1] == 0.0);
    let last: f64 = f64::exp(0.7 * -2.0);
    assert!((values[2] - 0.5 * (2.0 + last).ln()).abs() < 1e-12 && (values[3] - 0.5 * (1.0 + last).ln()).abs() < 1e-12);
    let weighted = PreferenceOptions { loss_weights: vec![0.2], ..options.clone() };
    let scaled = objectives::ranking(&weighted, &batch(vec![0.25, 0.5], vec![0, 0, 1, 4])).unwrap().values().unwrap();
    assert!(scaled.iter().zip(&values).all(|(scaled, value)| (scaled - 0.2 * value).abs() < 1e-15), "{scaled:?}");
    let accuracies = loss.statistics.iter().find(|found| found.name == "rewards/accuracies").unwrap();
    assert_eq!(accuracies.values, [0.0, 0.0, 1.0, 1.0], "equal rewards are in no order");
    assert!(objectives::ranking(&options, &batch(vec![0.25], vec![0, 0, 1, 4])).is_err());
    assert!(objectives::ranking(&options, &batch(vec![0.25, 0.5], vec![0, 0, 1, 5])).is_err());
    for refused in [
        PreferenceOptions { use_weighting: true, ..plackett_luce() },
        PreferenceOptions { loss_type: vec![PairLoss::PlackettLuce, PairLoss::Sft], ..plackett_luce() },
        PreferenceOptions { label_smoothing: 0.1, ..plackett_luce() },
    ] {
        assert!(refused.validate().is_err());
    }
}

/// A prompt's pairs share its weight; the weight follows the mean of their losses, and is uniform over prompts at radius 0.
#[test]
fn the_worst_mix_of_prompts() {
    let (losses, prompts) = ([1.0, 3.0, 2.5, 0.0, 0.5], [7, 7, 2, 7, 9]);
    let of = |ball, radius| -> Vec<f64> {
        let worst = WorstCase { over: Members::Prompts, ..WorstCase::new(ball, radius) };
        worst.relative_weights(&losses, &prompts).unwrap().into_iter().map(|weight| weight / 5.0).collect()
    };
    let third = 1.0 / 3.0;
    let close = |found: Vec<f64>, expected: [f64; 5]| {
        for (found, expected) in found.into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-15, "{found}, expected {expected}");
        }
    };
    close(of(Ball::Kl, 0.0), [third / 3.0, third / 3.0, third, third / 3.0, third]);
    // Mean losses 4/3, 2.5 and 0.5: the least gives up 0.2, the largest gets it.
    close(of(Ball::TotalVariation, 0.2), [third / 3.0, third / 3.0, third + 0.2, third / 3.0, third - 0.2]);
    let pairs = two_pairs();
    let over = |over| {
        let worst_case = Some(WorstCase { over, ..WorstCase::new(Ball::ChiSquare, 0.4) });
        pairs.value(&PreferenceOptions { worst_case, ..PreferenceOptions::default() })
    };
    let plain = pairs.value(&PreferenceOptions::default());
    assert!((over(Members::Prompts) - plain).abs() < 1e-12, "both pairs are of one prompt");
    assert!(over(Members::Pairs) > plain);
}

fn two_pairs() -> Pairs {
    let sequences = vec![
        vec![[-1.0, -1.5, -1.2], [-0.5, -0.4, -0.6]],
        vec![[-2.0, -1.0, -2.0]],
        vec![[-0.25, -0.5, -0.25]],
        vec![[-1.5, -1.25, -1.5], [-3.0, -2.5, -3.0], [-0.5, -1.0, -0.4]],
    ];
    Pairs::new(sequences, 2)
}

/// Of two equal completions none can be preferred: the symmetric losses stand at log 2 and push nowhere.
#[test]
fn an_identical_pair_teaches_nothing() {
    let tokens = vec![[-1.0, -1.5, -1.0], [-0.5, -0.25, -0.5]];
    let pairs = Pairs::new(vec![tokens.clone(), tokens], 2);
    for (loss, expected) in [
        (PairLoss::Sigmoid, 2f64.ln()),
        (PairLoss::SigmoidNorm, 2f64.ln()),
        (PairLoss::Aot, 2f64.ln()),
        (PairLoss::AotUnpaired, 2f64.ln()),
        (PairLoss::Robust, 2f64.ln()),
        (PairLoss::Hinge, 1.0),
    ] {
        let options = PreferenceOptions {
            loss_type: vec![loss],
            label_smoothing: 0.1,
            beta: 0.3,
            ..PreferenceOptions::default()
        };
        let (found, gradient) = pairs.loss(&options);
        assert!((found.values().unwrap()[0] - expected).abs() < 1e-15, "{loss:?}");
        // The same tokens twice: what one completion gains the other loses.
        assert_eq!(
            gradient[..2].iter().zip(&gradient[2..]).map(|(a, b)| a + b).collect::<Vec<_>>(),
            [0.0; 2],
            "{loss:?}"
        );
    }
}

/// At the reference every log-ratio is 0: DPO's slope is β/2, up for the chosen tokens and down for the rejected.
#[test]
fn at_the_reference_by_hand() {
    let at = |log_prob: f64| [log_prob, log_prob, log_prob];
    let pairs = Pairs::new(vec![vec![at(-1.0), at(-2.0)], vec![at(-0.5)]], 2);
    let of = |loss| {
        let options = PreferenceOptions { loss_type: vec![loss], beta: 0.4, ..PreferenceOptions::default() };
        let (loss, gradient) = pairs.loss(&options);
        (loss.values().unwrap()[0], gradient)
    };
    assert_eq!(of(PairLoss::Sigmoid), (2f64.ln(), vec![-0.2, -0.2, 0.2]));
    assert_eq!(of(PairLoss::Hinge), (1.0, vec![-0.4, -0.4, 0.4]));
    assert_eq!(of(PairLoss::ApoZero), (1.0, vec![-0.1, -0.1, 0.1]));
    assert_eq!(of(PairLoss::SppoHard), (2.0 * 1.25 * 1.25, vec![-2.5, -2.5, 2.5]));
    assert_eq!(of(PairLoss::Ipo), (1.25 * 1.25, vec![-1.25, -1.25, 2.5]));
    let (value, gradient) = of(PairLoss::BcoPair);
    assert_eq!((value, gradient), (2.0 * 2f64.ln(), vec![-0.2, -0.2, 0.2]));
}

proptest! {
    /// With CE-U the loss is DPO's, and its gradient that of `w β σ(-β m) [-h_c - Σ_t log(1 - p_t)]`, the first factors constants.
    #[test]
    fn the_rejected_completion_is_unlearnt_by_ce_u(pairs in any_pairs(), beta in 0.05..1.0f64, gamma in 0.0..1.0f64) {
        let dpo = PreferenceOptions { beta, gamma, ..PreferenceOptions::default() };
        let ce_u = PreferenceOptions { negative: Negative::CeU, ..dpo.clone() };
        ce_u.validate().unwrap();
        let ((likelihood, _), (found, gradient)) = (pairs.loss(&dpo), pairs.loss(&ce_u));
        prop_assert_eq!(found.values().unwrap(), likelihood.values().unwrap());
        let margins = &found.statistics.iter().find(|statistic| statistic.name == "rewards/margins").unwrap().values;
        // What the gradient is that of, with the margins held.
        let held = |pairs: &Pairs| {
            let of = |(sequence, tokens): (usize, &Vec<[f64; 3]>)| {
                let pair = sequence / pairs.per_pair;
                let pull = beta / (1.0 + (margins[pair] - gamma).exp()) / pairs.whole.0 as f64;
                let cost = |token: &[f64; 3]| match sequence % pairs.per_pair {
                    0 => -token[0],
                    1 => -(-token[0].exp_m1()).ln(),
                    _ => 0.0,
                };
                pull * tokens.iter().map(cost).sum::<f64>()
            };
            pairs.sequences.iter().enumerate().map(of).sum::<f64>()
        };
        let h = 1e-6;
        for (token, &gradient) in gradient.iter().enumerate() {
            let difference = (held(&pairs.moved(token, h)) - held(&pairs.moved(token, -h))) / (2.0 * h);
            prop_assert!((difference - gradient).abs() < 1e-6 * (1.0 + gradient.abs()), "{difference} {gradient}");
        }
    }
}

#[test]
fn ce_u_only_lowers() {
    let refused = |options: PreferenceOptions| {
        let options = PreferenceOptions { negative: Negative::CeU, ..options };
        assert!(matches!(options.validate(), Err(Error::Conflict { what: "negative", .. })), "{options:?}");
    };
    refused(PreferenceOptions { label_smoothing: 0.1, ..PreferenceOptions::default() });
    for loss in LOSSES {
        let options = PreferenceOptions { loss_type: vec![loss], ..PreferenceOptions::default() };
        if !loss.only_lowers_rejected() {
            refused(PreferenceOptions {
                label_smoothing: 0.1 * f64::from(u8::from(loss == PairLoss::ExoPair)),
                ..options
            });
            continue;
        }
        // Whatever the margin, more of a rejected token never costs less.
        for rejected in [-9.0, -1.0, -0.01] {
            let at = |log_prob: f64| [log_prob, -1.0, -1.0];
            let pairs = Pairs::new(vec![vec![at(-1.0)], vec![at(rejected)]], 2);
            assert!(pairs.loss(&options).1[1] >= 0.0, "{loss:?} at {rejected}");
        }
    }
}

#[test]
fn limits() {
    let pairs = two_pairs();
    let value = |options: PreferenceOptions| pairs.value(&options);
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} {b}");
    let default = PreferenceOptions::default;
    // Without scale nothing is preferred.
    close(value(PreferenceOptions { beta: 1e-9, ..default() }), 2f64.ln());
    // The alpha-divergence passes through the forward and reverse divergences.
    let alpha = |score_alpha| PreferenceOptions { score: Score::AlphaDivergence, score_alpha, ..default() };
    close(value(alpha(1.0 - 1e-9)), value(default()));
    close(value(alpha(1.0 + 1e-4)) - value(default()), 0.0);
    close(value(alpha(0.0)), value(PreferenceOptions { score: Score::ForwardKl, ..default() }));
    // LD-DPO: 1 is DPO; at 0 the longer completion ends with the shorter.
    assert_eq!(value(PreferenceOptions { ld_alpha: Some(1.0), ..default() }), value(default()));
    let mut short = pairs.clone();
    short.sequences[0].truncate(1);
    short.sequences[3].truncate(1);
    assert_eq!(value(PreferenceOptions { ld_alpha: Some(0.0), ..default() }), short.value(&default()));
    // A ball without extent holds the mean alone.
    let worst_case = Some(WorstCase::new(Ball::TotalVariation, 0.0));
    close(value(PreferenceOptions { worst_case, ..default() }), value(default()));
    // And one that holds everything looks at the worst pair alone.
    let worst_case = Some(WorstCase::new(Ball::TotalVariation, 0.99));
    let worst = 2.0 * pairs.loss(&default()).0.values().unwrap().into_iter().fold(0.0, f64::max);
    close(value(PreferenceOptions { worst_case, ..default() }), worst);
    // Smoothing one half cannot tell the two apart; just below, robust DPO still can.
    close(value(PreferenceOptions { label_smoothing: 0.49999999, ..default() }), {
        let flipped = Pairs::new([1, 0, 3, 2].map(|i| pairs.sequences[i].clone()).to_vec(), 2);
        flipped.value(&PreferenceOptions { label_smoothing: 0.49999999, ..default() })
    });
}

/// Smoothing changes the losses that say that they read it, and no other.
#[test]
fn smoothing_acts_where_it_is_read() {
    let pairs = two_pairs();
    for loss in LOSSES {
        let at = |label_smoothing: f64| {
            pairs.value(&PreferenceOptions { loss_type: vec![loss], label_smoothing, ..PreferenceOptions::default() })
        };
        assert_eq!(at(0.1) != at(0.3), loss.reads_smoothing(), "{loss:?}");
    }
}

/// WPO by hand: a completion counts by the mean of its sharpened less its plain log-probs.
#[test]
fn likely_pairs_count_more() {
    let pairs = two_pairs();
    let options = PreferenceOptions { use_weighting: true, ..PreferenceOptions::default() };
    let plain = pairs.loss(&PreferenceOptions::default()).0.values().unwrap();
    let weighted = pairs.loss(&options).0.values().unwrap();
    let expected = [(-0.15f64).exp(), (0.1f64 / 3.0).exp()];
    for ((plain, weighted), expected) in plain.iter().zip(&weighted).zip(expected) {
        assert!((weighted / plain - expected).abs() < 1e-12, "{} {expected}", weighted / plain);
    }
}

#[test]
fn single_precision_inputs_are_accepted() {
    let pairs = two_pairs();
    let log_probs = Var::from_tensor(&tensor(&pairs.column(0)).to_dtype(DType::F32).unwrap()).unwrap();
    let batch = pairs.batch(log_probs.as_tensor());
    let loss = objectives::preference(&PreferenceOptions::default(), &batch).unwrap();
    let exact = pairs.loss(&PreferenceOptions::default()).1;
    for (got, exact) in loss.gradient(log_probs.as_tensor()).unwrap().iter().zip(exact) {
        assert!((got - exact).abs() < 1e-7);
    }
}

#[test]
fn wrong_inputs_and_options_are_named() {
    let pairs = two_pairs();
    let log_probs = tensor(&pairs.column(0));
    let with = |batch: PairBatch, options: &PreferenceOptions| {
        objectives::preference(options, &batch).unwrap_err().to_string()
    };
    let batch = PairBatch { reference_log_probs: None, ..pairs.batch(&log_probs) };
    let default = PreferenceOptions::default();
    assert_eq!(with(batch, &default), "reference_log_probs is missing: reference_free is false");
    let batch = PairBatch { sharpened_log_probs: None, ..pairs.batch(&log_probs) };
    let weighted = PreferenceOptions { use_weighting: true, ..default.clone() };
    assert_eq!(with(batch, &weighted), "sharpened_log_probs is missing: use_weighting is true");
    let batch = PairBatch { sequence: vec![0, 0, 1, 2, 3, 3, 4], ..pairs.batch(&log_probs) };
    assert_eq!(with(batch, &default), "sequence is 4, expected a sequence of a pair");
    for (wrong, message) in [
        (PreferenceOptions { beta: 0.0, ..default.clone() }, "beta is 0, expected a number above 0"),
        (
            PreferenceOptions { loss_type: vec![], ..default.clone() },
            "the number of loss_type is 0, expected at least 1",
        ),
        (
            PreferenceOptions { loss_weights: vec![1.0, 2.0], ..default.clone() },
            "loss_weights has length 2, expected 1",
        ),
        (
            PreferenceOptions { loss_type: vec![PairLoss::ExoPair], ..default.clone() },
            "label_smoothing is 0, expected above 0 for exo_pair; its authors suggest 0.001",
        ),
        (
            PreferenceOptions { loss_type: vec![PairLoss::ApoZero], score: Score::ForwardKl, ..default.clone() },
            "score: only sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust and discopop know others than reverse_kl",
        ),
        (
            PreferenceOptions { loss_type: vec![PairLoss::Aot], use_weighting: true, ..default.clone() },
            "loss_type: aot and aot_unpaired compare ranks, which use_weighting and worst_case have no weights for",
        ),
        (
            PreferenceOptions { score: Score::LogOdds, ..default.clone() },
            "score: log_odds are those of a probability: they need reference_free = true and length = \"mean\"",
        ),
        (
            PreferenceOptions {
                loss_type: vec![PairLoss::Hinge, PairLoss::Sft],
                label_smoothing: 0.1,
                ..default.clone()
            },
            "label_smoothing: only sigmoid, sigmoid_norm, exo_pair, robust, aot and aot_unpaired read it, none of which is in \
             loss_type",
        ),
        (
            PreferenceOptions { worst_case: Some(WorstCase::new(Ball::Cvar, 1.0)), ..default },
            "radius is 1, expected at least 0 and below 1",
        ),
    ] {
        assert_eq!(wrong.validate().unwrap_err().to_string(), message);
    }
}

/// Judged completions as plain numbers: whether each is good, and its tokens under policy and reference.
#[derive(Clone, Debug)]
struct Judged {
    sequences: Vec<(bool, Vec<[f64; 2]>)>,
    mismatched: Vec<f64>,
}

impl Judged {
    fn loss(&self, options: &UnpairedOptions) -> (Loss, Vec<f64>) {
        let column = |which: usize| -> Vec<f64> {
            self.sequences.iter().flat_map(|(_, tokens)| tokens).map(|token| token[which]).collect()
        };
        let log_probs = Var::from_tensor(&tensor(&column(0))).unwrap();
        let numbered = self.sequences.iter().zip(0..);
        let count = self.sequences.len();
        let batch = UnpairedBatch {
            log_probs: log_probs.as_tensor().clone(),
            reference_log_probs: tensor(&column(1)),
            sequence: numbered.flat_map(|((_, tokens), number)| vec![number; tokens.len()]).collect(),
            good: self.sequences.iter().map(|(good, _)| *good).collect(),
            weights: tensor(&vec![1.0 / count as f64; count]),
            mismatched: self.mismatched.clone(),
            running: RunningMean { count: 5, mean: 0.25 },
        };
        let found = objectives::unpaired(options, &batch).unwrap();
        let gradient = found.loss.gradient(log_probs.as_tensor()).unwrap();
        (found.loss, gradient)
    }

    fn total(&self, options: &UnpairedOptions) -> f64 {
        self.loss(options).0.values().unwrap().iter().sum()
    }
}

fn any_judged() -> impl Strategy<Value = Judged> {
    let token = (-3.0..0.0f64, -0.7..0.7f64).prop_map(|(p, r)| [p, p + r]);
    let sequence = (any::<bool>(), prop::collection::vec(token, 0..4));
    let mismatched = prop::collection::vec(-2.0..2.0f64, 1..5);
    (prop::collection::vec(sequence, 1..8), mismatched)
        .prop_map(|(sequences, mismatched)| Judged { sequences, mismatched })
}

#[test]
fn unpaired_values_by_hand() {
    let tokens = |ratio: f64| vec![[-1.0, -1.0 - ratio]];
    let judged = Judged { sequences: vec![(true, tokens(2.0)), (false, tokens(-1.0))], mismatched: vec![0.5, 1.5] };
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let options = UnpairedOptions { beta: 0.5, desirable_weight: 1.5, ..UnpairedOptions::default() };
    let (loss, gradient) = judged.loss(&options);
    let (good, bad) = (sigmoid(-0.5), sigmoid(0.5 * (-1.0 - 1.0)));
    for (got, expected) in loss.values().unwrap().iter().zip([0.75 * good, 0.5 * bad]) {
        assert!((got - expected).abs() < 1e-15);
    }
    let slope = |p: f64| 0.5 * p * (1.0 - p);
    for (got, expected) in gradient.iter().zip([-0.75 * slope(good), 0.5 * slope(bad)]) {
        assert!((got - expected).abs() < 1e-15, "{got} {expected}");
    }
    let bco = UnpairedOptions { baseline: UnpairedBaseline::RunningMean, utility: Utility::LogSigmoid, ..options };
    // Five ratios of mean 0.25, then 2 and -1: 2.25 / 7.
    let mean = 2.25 / 7.0;
    let (loss, _) = judged.loss(&bco);
    let expected = [-0.75 * sigmoid(0.5 * (2.0 - mean)).ln(), -0.5 * sigmoid(-0.5 * (-1.0 - mean)).ln()];
    for (got, expected) in loss.values().unwrap().iter().zip(expected) {
        assert!((got - expected).abs() < 1e-14, "{got} {expected}");
    }
    // A policy that is nearer to other rows' completions than the reference has no baseline below 0.
    let near = Judged { mismatched: vec![-3.0], ..judged.clone() };
    let none = UnpairedOptions { baseline: UnpairedBaseline::Zero, ..options.clone() };
    assert_eq!(near.total(&options), judged.total(&none));
    // Without scale nothing is good or bad: (1.5 + 1) / 2 of one half.
    assert!((judged.total(&UnpairedOptions { beta: 1e-12, ..options }) - 0.625).abs() < 1e-11);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn unpaired_gradients_equal_finite_differences(judged in any_judged(), log in any::<bool>(), kl in any::<bool>()) {
        let utility = if log { Utility::LogSigmoid } else { Utility::Sigmoid };
        let baseline = if kl { UnpairedBaseline::Kl } else { UnpairedBaseline::Zero };
        let options = UnpairedOptions { baseline, utility, beta: 0.7, undesirable_weight: 0.5, ..Default::default() };
        let (_, gradient) = judged.loss(&options);
        for (token, gradient) in gradient.iter().enumerate() {
            let at = |by: f64| {
                let mut moved = judged.clone();
                moved.sequences.iter_mut().flat_map(|(_, tokens)| tokens).nth(token).unwrap()[0] += by;
                moved.total(&options)
            };
            let difference = (at(1e-6) - at(-1e-6)) / 2e-6;
            prop_assert!((difference - gradient).abs() < 1e-8, "{difference} {gradient}");
        }
        let mut backwards = judged.clone();
        backwards.sequences.reverse();
        prop_assert!((judged.total(&options) - backwards.total(&options)).abs() < 1e-12);
    }
}

#[test]
fn unpaired_extremes_stay_finite_and_missing_baselines_are_named() {
    let tokens = |a: f64, b: f64| vec![[a, b]; 3];
    let judged = Judged {
        sequences: vec![(true, tokens(-1e4, 0.0)), (false, tokens(0.0, -1e4)), (false, vec![])],
        mismatched: vec![3e4],
    };
    for baseline in [UnpairedBaseline::Zero, UnpairedBaseline::Kl, UnpairedBaseline::RunningMean] {
        for utility in [Utility::Sigmoid, Utility::LogSigmoid] {
            let (loss, gradient) = judged.loss(&UnpairedOptions { baseline, utility, ..Default::default() });
            assert!(loss.values().unwrap().iter().chain(&gradient).all(|x| x.is_finite()), "{baseline:?} {utility:?}");
        }
    }
    let batch = UnpairedBatch {
        log_probs: tensor(&[-1.0]),
        reference_log_probs: tensor(&[-1.0]),
        sequence: vec![0],
        good: vec![true],
        weights: tensor(&[1.0]),
        mismatched: vec![],
        running: RunningMean::default(),
    };
    let error = objectives::unpaired(&UnpairedOptions::default(), &batch).unwrap_err();
    assert!(matches!(error, Error::Missing { what: "mismatched", .. }));
    for wrong in [
        UnpairedOptions { beta: 0.0, ..Default::default() },
        UnpairedOptions { desirable_weight: -1.0, ..Default::default() },
        UnpairedOptions { undesirable_weight: f64::NAN, ..Default::default() },
    ] {
        assert!(matches!(wrong.validate(), Err(Error::Range { .. })), "{wrong:?}");
    }
}

/// On policy Nash-MD is REINFORCE: its gradient is (1/2 - P) and β times the log-ratio, token by token.
#[test]
fn nash_md_by_hand() {
    let log_probs = Var::from_slice(&[-1.0f64, -2.0, -0.5], 3, &Device::Cpu).unwrap();
    let batch = NashMdBatch {
        log_probs: log_probs.as_tensor().clone(),
        reference_log_probs: tensor(&[-1.5, -1.0, -0.5]),
        sequence: vec![0, 0, 1],
        preferences: vec![1.0, 0.25],
        weights: tensor(&[0.5, 0.5]),
    };
    let loss = objectives::nash_md(0.5, &batch).unwrap();
    assert_eq!(loss.gradient(log_probs.as_tensor()).unwrap(), [0.5 * (0.25 - 0.5), 0.5 * (-0.5 - 0.5), 0.5 * 0.25]);
}
