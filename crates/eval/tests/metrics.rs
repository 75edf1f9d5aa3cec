//! Metrics against closed forms and values computed elsewhere; `tests/reference/metrics.py` prints the constants.

use posttrain_eval::interval::{Interval, bootstrap_deviation, bootstrap_mean, quantile, student, wilson};
use posttrain_eval::metrics::{
    best_of_n, best_of_n_divergence, majority, mean, pass_at_k, standard_deviation, weighted_vote,
};
use posttrain_eval::paired::{compare, mcnemar_exact};
use proptest::prelude::*;

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1.0), "{found} != {expected}");
}

#[test]
fn means_and_spread() {
    assert_eq!(mean(&[]), 0.0);
    assert_eq!(mean(&[1.0, 2.0, 6.0]), 3.0);
    assert_eq!(standard_deviation(&[5.0]), 0.0);
    close(standard_deviation(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]), (32.0f64 / 7.0).sqrt());
}

#[test]
fn pass_at_k_counts_subsets() {
    for ((n, c, k), expected) in
        [((5, 2, 1), 0.4), ((5, 2, 3), 0.9), ((8, 3, 4), 0.928_571_428_571_428_6), ((10, 1, 5), 0.5), ((10, 9, 2), 1.0)]
    {
        close(pass_at_k(n, c, k).unwrap(), expected);
    }
    assert_eq!(pass_at_k(7, 0, 3), Some(0.0));
    assert_eq!(pass_at_k(7, 7, 7), Some(1.0));
    // Large counts leave no room for factorials.
    close(pass_at_k(100_000, 1, 50_000).unwrap(), 0.5);
    assert_eq!(pass_at_k(3, 1, 4), None);
    assert_eq!(pass_at_k(3, 1, 0), None);
    assert_eq!(pass_at_k(3, 4, 1), None);
}

#[test]
fn the_majority_decides() {
    let vote = |answers: &[Option<i32>], k| majority(answers, k);
    assert_eq!(vote(&[Some(1), Some(2), Some(2)], 3), Some(1));
    assert_eq!(vote(&[Some(1), Some(2), Some(2)], 2), Some(0), "only the first two vote; a tie goes to the earlier");
    assert_eq!(vote(&[None, None, Some(3)], 3), Some(2), "the unreadable don't vote");
    assert_eq!(vote(&[Some(3), Some(1), Some(1), Some(3)], 9), Some(0));
    assert_eq!(vote(&[None, None], 2), None);
    assert_eq!(vote(&[Some(1)], 0), None);
}

#[test]
fn wilson_inverts_the_score_test() {
    for ((successes, trials), low, high) in [
        ((8, 10), 0.490_162_471_536_641_83, 0.943_317_848_545_624_8),
        ((50, 200), 0.195_081_680_068_175, 0.314_340_983_120_458_33),
        ((1, 300), 0.000_588_657_721_851_158_3, 0.018_636_693_694_531_234),
        ((199, 200), 0.972_226_295_602_107, 0.999_116_831_284_399),
    ] {
        let interval = wilson(successes, trials);
        close(interval.low, low);
        close(interval.high, high);
    }
    // At the ends: z^2 / (n + z^2).
    let z2 = 1.959_963_984_540_054_f64.powi(2);
    assert_eq!(wilson(0, 10).low, 0.0);
    close(wilson(0, 10).high, z2 / (10.0 + z2));
    assert_eq!(wilson(10, 10).high, 1.0);
    close(wilson(10, 10).low, 10.0 / (10.0 + z2));
    assert_eq!(wilson(0, 0), Interval { low: 0.0, high: 1.0 });
}

#[test]
fn mcnemar_is_the_binomial_test() {
    for ((gained, lost), expected) in [
        ((0, 0), 1.0),
        ((1, 0), 1.0),
        ((5, 1), 0.218_75),
        ((10, 3), 0.092_285_156_25),
        ((30, 12), 0.007_915_897_334_896_727),
    ] {
        close(mcnemar_exact(gained, lost), expected);
        close(mcnemar_exact(lost, gained), expected);
    }
    let large = mcnemar_exact(700, 600);
    assert!((large / 0.006_015_793_861_044_952 - 1.0).abs() < 1e-9, "{large}");
    assert!(mcnemar_exact(5000, 0) < 1e-300);
}

#[test]
fn quantiles_are_linear_between_neighbours() {
    let sorted = [1.0, 2.0, 4.0, 8.0];
    for (level, expected) in [(0.0, 1.0), (0.25, 1.75), (0.5, 3.0), (0.9, 6.8), (1.0, 8.0)] {
        close(quantile(&sorted, level), expected);
    }
    assert_eq!(quantile(&[], 0.5), 0.0);
    assert_eq!(quantile(&[3.0], 0.9), 3.0);
}

#[test]
fn the_bootstrap_deviation_of_a_mean_is_its_standard_error() {
    let values: Vec<f64> = (0..50).map(|i| (f64::from(i) * 0.7).sin()).collect();
    let mean = |rows: &[usize]| rows.iter().map(|&row| values[row]).sum::<f64>() / rows.len() as f64;
    let found = bootstrap_deviation(values.len(), 4000, 1, mean);
    let spread = standard_deviation(&values);
    assert!((found / (spread / 50f64.sqrt()) - 1.0).abs() < 0.05, "{found}");
    assert_eq!(found, bootstrap_deviation(values.len(), 4000, 1, mean));
    assert_eq!(bootstrap_deviation(50, 100, 1, |_| 2.0), 0.0);
}

#[test]
fn the_bootstrap_is_reproducible_and_near_the_normal_interval() {
    let values: Vec<f64> = (0..200).map(|index| f64::from(u8::from(index % 4 == 0))).collect();
    let interval = bootstrap_mean(&values, 2000, 1);
    assert_eq!(interval, bootstrap_mean(&values, 2000, 1));
    assert_ne!(interval, bootstrap_mean(&values, 2000, 2));
    // mean +- z sqrt(p (1 - p) / n) = 0.25 +- 0.0600
    assert!((interval.low - 0.190).abs() < 0.008 && (interval.high - 0.310).abs() < 0.008, "{interval:?}");
    assert_eq!(bootstrap_mean(&[0.5; 9], 100, 1), Interval { low: 0.5, high: 0.5 });
    assert_eq!(bootstrap_mean(&[], 100, 1), Interval { low: 0.0, high: 0.0 });
}

/// Of 400 samples of 50 draws with chance 0.3, about 95 % of the intervals hold 0.3.
#[test]
fn intervals_cover_what_they_promise() {
    let random = base::Random::new(1, base::Purpose::Test);
    let (mut by_wilson, mut by_bootstrap) = (0, 0);
    for trial in 0..400 {
        let draws: Vec<f64> =
            (0..50).map(|draw| f64::from(u8::from(random.prompt(trial).at(draw).uniform() < 0.3))).collect();
        by_wilson += usize::from(wilson(draws.iter().sum::<f64>() as usize, 50).contains(0.3));
        by_bootstrap += usize::from(bootstrap_mean(&draws, 400, u64::from(trial)).contains(0.3));
    }
    // Five standard deviations around 380; the percentile bootstrap is known to fall a little short at n = 50.
    assert!((358..=400).contains(&by_wilson), "{by_wilson}");
    assert!((350..=400).contains(&by_bootstrap), "{by_bootstrap}");
}

#[test]
fn a_comparison_is_paired() {
    let before: Vec<bool> = (0..200).map(|index| index % 4 == 0).collect();
    // 50 right before; of those 5 get lost, of the 150 others 45 are gained.
    let after: Vec<bool> = (0..200).map(|index| if index % 4 == 0 { index >= 20 } else { index < 60 }).collect();
    let shares =
        |right: &[bool]| -> Vec<Option<f64>> { right.iter().map(|&is| Some(f64::from(u8::from(is)))).collect() };
    let (before, after) = (shares(&before), shares(&after));
    let comparison = compare(&before, &after, 2000, 1).unwrap();
    assert_eq!((comparison.gained, comparison.lost), (45, 5));
    close(comparison.difference, 0.2);
    assert_eq!(comparison.p_value, mcnemar_exact(45, 5));
    // The standard error of the mean of paired differences: sqrt((50/200 - 0.2^2) / 200) = 0.0324.
    let half = 1.96 * (0.21f64 / 200.0).sqrt();
    assert!((comparison.interval.low - (0.2 - half)).abs() < 0.01, "{comparison:?}");
    assert!((comparison.interval.high - (0.2 + half)).abs() < 0.01, "{comparison:?}");
    let same = compare(&before, &before, 100, 1).unwrap();
    assert_eq!((same.difference, same.p_value, same.interval), (0.0, 1.0, Interval { low: 0.0, high: 0.0 }));
    assert!(!comparison.shares && !serde_json::to_string(&comparison).unwrap().contains("shares"));

    // Items of which nothing is said one of the times change nothing.
    let with = |items: &[Option<f64>], others: [Option<f64>; 3]| [items, &others[..]].concat();
    let known = compare(&with(&before, [None, Some(1.0), None]), &with(&after, [Some(1.0), None, None]), 2000, 1);
    assert_eq!(known.unwrap(), comparison);
    assert_eq!(compare(&[None, Some(1.0)], &[Some(1.0), None], 100, 1), None);

    // Shares of several answers.
    let found = compare(&[Some(0.25), Some(0.5), Some(1.0)], &[Some(0.75), Some(0.25), Some(1.0)], 100, 1).unwrap();
    assert_eq!((found.gained, found.lost, found.p_value, found.shares), (1, 1, 1.0, true));
    close(found.difference, 0.25 / 3.0);
}

proptest! {
    #[test]
    fn wilson_is_symmetric_and_holds_the_estimate(trials in 1usize..2000, share in 0.0f64..=1.0) {
        let successes = (share * trials as f64) as usize;
        let interval = wilson(successes, trials);
        prop_assert!(interval.contains(successes as f64 / trials as f64));
        prop_assert!(interval.low >= 0.0 && interval.high <= 1.0);
        let mirrored = wilson(trials - successes, trials);
        prop_assert!((interval.low + mirrored.high - 1.0).abs() < 1e-12);
    }

    #[test]
    fn pass_at_k_grows_with_k(samples in 1usize..60, share in 0.0f64..=1.0) {
        let correct = (share * samples as f64) as usize;
        let curve: Vec<f64> = (1..=samples).map(|k| pass_at_k(samples, correct, k).unwrap()).collect();
        prop_assert!((curve[0] - correct as f64 / samples as f64).abs() < 1e-12);
        prop_assert!(curve.windows(2).all(|pair| pair[0] <= pair[1] + 1e-12));
        prop_assert!(curve.iter().all(|value| (0.0..=1.0).contains(value)));
    }

    #[test]
    fn mcnemar_is_a_probability(gained in 0usize..3000, lost in 0usize..3000) {
        let p = mcnemar_exact(gained, lost);
        prop_assert!((0.0..=1.0).contains(&p));
    }
}

/// The mean over all draws, by enumeration.
fn drawn(scores: &[f64], outcomes: &[f64], n: usize) -> f64 {
    let draws = (0u32..1 << scores.len()).filter(|set| set.count_ones() as usize == n);
    let best = |set: u32| {
        let members = (0..scores.len()).filter(|i| set >> i & 1 == 1);
        outcomes[members.reduce(|best, other| if scores[other] > scores[best] { other } else { best }).unwrap()]
    };
    let values: Vec<f64> = draws.map(best).collect();
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn best_of_n_is_the_mean_over_all_draws() {
    let scores = [0.3, -1.0, 2.0, 0.3, 0.9, 2.0];
    let outcomes = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0];
    for n in 1..=6 {
        let found = best_of_n(&scores, &outcomes, n).unwrap();
        assert!((found - drawn(&scores, &outcomes, n)).abs() < 1e-12, "n = {n}: {found}");
        // The best by its own score grows with n.
        assert!((best_of_n(&scores, &scores, n).unwrap() - drawn(&scores, &scores, n)).abs() < 1e-12);
    }
    assert_eq!(best_of_n(&scores, &outcomes, 7), None);
    assert_eq!(best_of_n(&scores, &outcomes, 0), None);
}

#[test]
fn the_divergence_of_best_of_n() {
    for (n, expected) in [(1, 0.0), (2, 0.1931), (4, 0.6363), (16, 1.8351)] {
        assert!((best_of_n_divergence(n) - expected).abs() < 1e-4, "n = {n}");
    }
}

#[test]
fn weighted_votes() {
    let answers = [Some("a"), Some("b"), None, Some("b"), Some("c")];
    assert_eq!(weighted_vote(&answers, &[1.0; 5]), Some(1), "without weights, the majority");
    assert_eq!(weighted_vote(&answers, &[1.0, 0.2, 9.0, 0.3, 0.9]), Some(0), "an empty answer does not vote");
    assert_eq!(weighted_vote(&answers, &[0.5, 0.2, 0.0, 0.4, 0.1]), Some(3), "the best of the class that wins");
    assert_eq!(weighted_vote(&answers, &[0.5, 0.5, 0.0, 0.0, 0.5]), Some(0), "ties: first seen");
    assert_eq!(weighted_vote::<u8>(&[None, None], &[1.0, 1.0]), None);
}

#[test]
fn students_interval_of_a_few_values() {
    // Mean 3, deviation sqrt(2.5), and 2.776445 for four degrees of freedom.
    let found = student(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
    let half = 2.776_445 * (2.5f64 / 5.0).sqrt();
    assert!((found.low - (3.0 - half)).abs() < 1e-6 && (found.high - (3.0 + half)).abs() < 1e-6);
    assert_eq!((student(&[]), student(&[1.0])), (None, None));
    assert_eq!(student(&[2.0; 3]), Some(Interval { low: 2.0, high: 2.0 }));
    // Where the table ends the expansion goes on: 2.0796 for 21 degrees, 1.9840 for 100.
    for (degrees, quantile) in [(21usize, 2.079_614), (100, 1.983_972)] {
        let values: Vec<f64> = (0..=degrees).map(|i| i as f64).collect();
        let half = student(&values).map(|interval| (interval.high - interval.low) / 2.0).unwrap();
        let expected = quantile * standard_deviation(&values) / (values.len() as f64).sqrt();
        assert!((half / expected - 1.0).abs() < 1e-4, "{degrees}: {half} {expected}");
    }
}
