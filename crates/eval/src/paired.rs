//! Comparing two models on the same prompts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::interval::{Interval, quantile, resampled_means};
use crate::metrics::mean;

/// Before against after, item by item. An item is right or wrong, or right in a share of several answers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Comparison {
    /// Mean of after minus before.
    pub difference: f64,
    /// 95 % paired bootstrap interval of the difference.
    pub interval: Interval,
    /// Items that were wrong and became right; of shares, those that grew.
    pub gained: usize,
    /// Items that were right and became wrong; of shares, those that shrank.
    pub lost: usize,
    /// Two-sided p-value of McNemar's exact test, which for shares is the sign test.
    pub p_value: f64,
    /// Whether items are shares of several answers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shares: bool,
}

/// Compares the same items before and after: the share of each that is right, 0 or 1 where it has one answer, or nothing where that
/// cannot be said. Only items of which it is said both times are compared; `None` where there are none. Items beyond the shorter list
/// are ignored.
pub fn compare(before: &[Option<f64>], after: &[Option<f64>], resamples: u32, seed: u64) -> Option<Comparison> {
    let pairs: Vec<(f64, f64)> = before.iter().zip(after).filter_map(|(before, after)| before.zip(*after)).collect();
    let differences: Vec<f64> = pairs.iter().map(|(before, after)| after - before).collect();
    let gained = differences.iter().filter(|difference| **difference > 0.0).count();
    let lost = differences.iter().filter(|difference| **difference < 0.0).count();
    let is_share = |value: f64| value != 0.0 && value != 1.0;
    (!pairs.is_empty()).then(|| Comparison {
        difference: mean(&differences),
        interval: bootstrap_difference(&differences, resamples, seed),
        gained,
        lost,
        p_value: mcnemar_exact(gained, lost),
        shares: pairs.iter().any(|(before, after)| is_share(*before) || is_share(*after)),
    })
}

/// The 95 % percentile bootstrap interval of the mean of paired differences.
pub fn bootstrap_difference(differences: &[f64], resamples: u32, seed: u64) -> Interval {
    let means = resampled_means(differences, resamples, seed);
    Interval { low: quantile(&means, 0.025), high: quantile(&means, 0.975) }
}

/// The two-sided p-value of McNemar's exact test: twice the chance that a fair coin lands as unevenly as the discordant
/// pairs, at most 1 (McNemar, 1947; exact binomial form). 1 without discordant pairs.
pub fn mcnemar_exact(gained: usize, lost: usize) -> f64 {
    let (n, k) = (gained + lost, gained.min(lost));
    // P(X <= k) for X ~ Binomial(n, 1/2), each term from logarithms: C(n, i) itself leaves f64 from n = 1030 on.
    let mut log_choose = 0.0;
    let mut tail = 0.0;
    for i in 0..=k {
        if i > 0 {
            log_choose += ((n - i + 1) as f64 / i as f64).ln();
        }
        tail += (log_choose - n as f64 * std::f64::consts::LN_2).exp();
    }
    (2.0 * tail).min(1.0)
}
