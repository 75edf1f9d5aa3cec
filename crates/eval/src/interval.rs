//! Confidence intervals.

use base::{Purpose, Random};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::metrics::{mean, standard_deviation};

/// Quantile of the standard normal distribution that leaves 2.5 % above it.
pub const Z_95: f64 = 1.959_963_984_540_054;

/// A two-sided confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// Whether `value` lies in the interval, its ends included.
    pub fn contains(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }
}

/// Wilson's score interval at 95 % for a proportion (Wilson, 1927); `[0, 1]` for no trials.
pub fn wilson(successes: usize, trials: usize) -> Interval {
    if trials == 0 {
        return Interval { low: 0.0, high: 1.0 };
    }
    let (n, p, z2) = (trials as f64, successes as f64 / trials as f64, Z_95 * Z_95);
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z_95 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    // At 0 and n successes the ends are exact; rounding must not move them.
    let low = if successes == 0 { 0.0 } else { centre - half };
    let high = if successes == trials { 1.0 } else { centre + half };
    Interval { low, high }
}

/// Resamples of a bootstrap interval unless one asks for another number.
pub const RESAMPLES: u32 = 10_000;

/// The 95 % percentile bootstrap interval of the mean of `values` (Efron, 1979). The draws are counter-based: the same
/// values, seed and resamples give the same interval. `[0, 0]` for no values.
pub fn bootstrap_mean(values: &[f64], resamples: u32, seed: u64) -> Interval {
    percentiles(resampled_means(values, resamples, seed)).unwrap_or(Interval { low: 0.0, high: 0.0 })
}

/// The sorted means of `resamples` resamples of `values`.
pub(crate) fn resampled_means(values: &[f64], resamples: u32, seed: u64) -> Vec<f64> {
    if values.is_empty() {
        return Vec::new();
    }
    let mean = |rows: &[usize]| rows.iter().map(|&row| values[row]).sum::<f64>() / values.len() as f64;
    let mut means = resampled(values.len(), resamples, seed, mean);
    means.sort_unstable_by(f64::total_cmp);
    means
}

/// A statistic of each of `resamples` resamples of `count` rows, which it is given by number.
pub(crate) fn resampled<T>(count: usize, resamples: u32, seed: u64, statistic: impl Fn(&[usize]) -> T) -> Vec<T> {
    let random = Random::new(seed, Purpose::Bootstrap);
    let mut rows = vec![0; count];
    let resample = |number: u32| {
        let random = random.sample(number);
        for (draw, row) in (0..).zip(&mut rows) {
            *row = random.at(draw).below(count as u64) as usize;
        }
        statistic(&rows)
    };
    (0..resamples).map(resample).collect()
}

/// The 95 % percentile interval of a statistic from its values over resamples; `None` for no values.
pub(crate) fn percentiles(mut values: Vec<f64>) -> Option<Interval> {
    values.sort_unstable_by(f64::total_cmp);
    (!values.is_empty()).then(|| Interval { low: quantile(&values, 0.025), high: quantile(&values, 0.975) })
}

/// The 95 % interval of the mean of independent values from one normal distribution (Student, 1908): exact for any number of values from
/// two on, which is what a handful of seeds needs; percentile bootstrap intervals of so few values are too narrow. `None` for fewer.
pub fn student(values: &[f64]) -> Option<Interval> {
    let quantile = student_quantile(values.len().checked_sub(1)?)?;
    let (mean, half) = (mean(values), quantile * standard_deviation(values) / (values.len() as f64).sqrt());
    Some(Interval { low: mean - half, high: mean + half })
}

/// The quantile of Student's distribution that leaves 2.5 % above it; `None` without a degree of freedom.
fn student_quantile(degrees: usize) -> Option<f64> {
    const TABLE: [f64; 20] = [
        12.706_205, 4.302_653, 3.182_446, 2.776_445, 2.570_582, 2.446_912, 2.364_624, 2.306_004, 2.262_157, 2.228_139,
        2.200_985, 2.178_813, 2.160_369, 2.144_787, 2.131_450, 2.119_905, 2.109_816, 2.100_922, 2.093_024, 2.085_963,
    ];
    // Beyond the table the expansion of Cornish and Fisher in 1/degrees is exact to five digits (Abramowitz and Stegun, 26.7.5).
    let (z, n) = (Z_95, degrees as f64);
    let first = (z.powi(3) + z) / 4.0;
    let second = (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0;
    let third = (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0;
    let expansion = z + (first + (second + third / n) / n) / n;
    let index = degrees.checked_sub(1)?;
    Some(TABLE.get(index).copied().unwrap_or(expansion))
}

/// The bootstrap standard error of a statistic of `count` rows (Efron, 1979): its standard deviation over resamples of the rows, which it is given by
/// number.
pub fn bootstrap_deviation(count: usize, resamples: u32, seed: u64, statistic: impl Fn(&[usize]) -> f64) -> f64 {
    let random = Random::new(seed, Purpose::Bootstrap);
    let resample = |number: u32| {
        let random = random.step(number);
        statistic(&(0..count).map(|row| random.at(row as u32).below(count as u64) as usize).collect::<Vec<_>>())
    };
    standard_deviation(&(0..resamples).map(resample).collect::<Vec<_>>())
}

/// The quantile of sorted values at `level` in `[0, 1]`, linear between neighbours (Hyndman and Fan's type 7); 0 for none.
pub fn quantile(sorted: &[f64], level: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let position = level.clamp(0.0, 1.0) * last as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (position - below as f64) * (sorted[above] - sorted[below])
}
