//! Comparing two models on the same prompts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::interval::{Interval, quantile, resampled_means};
use crate::metrics::mean;

/// Before against after, item by item.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Comparison {
    /// Mean of after minus before.
    pub difference: f64,
    /// 95 % paired bootstrap interval of the difference.
    pub interval: Interval,
    /// Items that were wrong and became right.
    pub gained: usize,
    /// Items that were right and became wrong.
    pub lost: usize,
    /// Two-sided p-value of McNemar's exact test.
    pub p_value: f64,
}

/// Compares the correctness of the same items before and after. Items beyond the shorter list are ignored.
pub fn compare(before: &[bool], after: &[bool], resamples: u32, seed: u64) -> Comparison {
    let pairs = || before.iter().zip(after);
    let gained = pairs().filter(|(before, after)| !**before && **after).count();
    let lost = pairs().filter(|(before, after)| **before && !**after).count();
    let differences: Vec<f64> =
        pairs().map(|(before, after)| f64::from(u8::from(*after)) - f64::from(u8::from(*before))).collect();
    Comparison {
        difference: mean(&differences),
        interval: bootstrap_difference(&differences, resamples, seed),
        gained,
        lost,
        p_value: mcnemar_exact(gained, lost),
    }
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
