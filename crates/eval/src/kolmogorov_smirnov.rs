//! Whether two samples come from one distribution: the two-sample test of Kolmogorov and Smirnov.
//!
//! ```text
//! D = sup_x | F_n(x) - G_m(x) |
//! ```
//!
//! **Exact.** If both samples come from one continuous distribution, every order of the `n + m` values is equally likely: a random lattice
//! path from `(0, 0)` to `(n, m)`. The p-value is the chance that such a path somewhere touches `|i/n - j/m| ≥ D` (Hodges 1958). With
//! `P(i, j)` the chance that a random path to `(i, j)` has touched it,
//!
//! ```text
//! P(i, j) = 1 where |i m - j n| ≥ D n m,   else   i/(i+j) P(i-1, j) + j/(i+j) P(i, j-1)
//! ```
//!
//! which adds positive numbers alone, so that p-values of 1e-200 are as exact as those of 0.5.
//!
//! **Asymptotic**, for samples so large that the table would be: `Q((√e + 0.12 + 0.11/√e) D)` with `e = n m / (n + m)` (Stephens 1970) and
//! `Q(x) = 2 Σ_k (-1)^{k-1} e^{-2 k² x²}`.
//!
//! Values that occur in both samples make either p-value an upper bound.

use serde::{Deserialize, Serialize};

/// Entries of the table up to which the p-value is exact.
const EXACT: usize = 100_000_000;

/// The outcome of the test.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KolmogorovSmirnov {
    /// The largest distance of the two empirical distributions, within [0, 1].
    pub statistic: f64,
    /// The chance of one as large, if both samples come from one distribution.
    pub p_value: f64,
    /// Whether the p-value is that of the lattice paths, not the asymptotic one.
    pub exact: bool,
}

/// Tests two samples; `None` if one of them is empty or holds a NaN.
pub fn kolmogorov_smirnov(first: &[f64], second: &[f64]) -> Option<KolmogorovSmirnov> {
    let (n, m) = (first.len(), second.len());
    if n == 0 || m == 0 || first.iter().chain(second).any(|value| value.is_nan()) {
        return None;
    }
    let distance = distance(first, second);
    let statistic = distance as f64 / (n as f64 * m as f64);
    let exact = n.saturating_mul(m) <= EXACT;
    let p_value = if exact { exact_p_value(n, m, distance) } else { asymptotic_p_value(n, m, statistic) };
    Some(KolmogorovSmirnov { statistic, p_value, exact })
}

/// `n m D`, a whole number.
fn distance(first: &[f64], second: &[f64]) -> u64 {
    let sorted = |values: &[f64]| {
        let mut values = values.to_vec();
        values.sort_unstable_by(f64::total_cmp);
        values
    };
    let (first, second) = (sorted(first), sorted(second));
    let (mut i, mut j, mut largest) = (0, 0, 0);
    while let (Some(a), Some(b)) = (first.get(i), second.get(j)) {
        // Equal values are one step of both distributions.
        let value = a.min(*b);
        i += first[i..].iter().take_while(|other| **other <= value).count();
        j += second[j..].iter().take_while(|other| **other <= value).count();
        largest = largest.max((i as u64 * second.len() as u64).abs_diff(j as u64 * first.len() as u64));
    }
    largest
}

fn exact_p_value(n: usize, m: usize, distance: u64) -> f64 {
    let outside = |i: usize, j: usize| (i as u64 * m as u64).abs_diff(j as u64 * n as u64) >= distance;
    let mut row = vec![0.0; m + 1];
    for i in 0..=n {
        for j in 0..=m {
            let (before, above) = (if j > 0 { row[j - 1] } else { 0.0 }, row[j]);
            row[j] = match outside(i, j) {
                true => 1.0,
                false if i + j == 0 => 0.0,
                false => (i as f64 * above + j as f64 * before) / (i + j) as f64,
            };
        }
    }
    row[m]
}

/// The asymptotic p-value of a distance between samples of these sizes.
pub fn asymptotic_p_value(n: usize, m: usize, statistic: f64) -> f64 {
    let root = (n as f64 * m as f64 / (n + m) as f64).sqrt();
    survival((root + 0.12 + 0.11 / root) * statistic)
}

/// `1 - K(x)` with Kolmogorov's distribution `K`.
fn survival(x: f64) -> f64 {
    if x <= 0.0 {
        return 1.0;
    }
    // Each series needs a handful of terms on its side of 1, and the alternating one none that cancel.
    if x < 1.0 {
        let term = |k: u32| (-(f64::from(2 * k - 1) * std::f64::consts::PI / x).powi(2) / 8.0).exp();
        return 1.0 - (2.0 * std::f64::consts::PI).sqrt() / x * (1..=8).map(term).sum::<f64>();
    }
    let term = |k: u32| if k % 2 == 1 { 2.0 } else { -2.0 } * (-2.0 * (f64::from(k) * x).powi(2)).exp();
    (1..=8).map(term).sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn small_samples_can_be_counted_by_hand() {
        // Of the 6 orders of two and two values, 2 separate them wholly.
        let apart = kolmogorov_smirnov(&[1.0, 2.0], &[3.0, 4.0]).unwrap();
        assert_eq!((apart.statistic, apart.exact), (1.0, true));
        assert!((apart.p_value - 1.0 / 3.0).abs() < 1e-15);
        let same = kolmogorov_smirnov(&[1.0, 2.0, 5.0], &[1.0, 2.0, 5.0]).unwrap();
        assert_eq!((same.statistic, same.p_value), (0.0, 1.0));
        assert_eq!(kolmogorov_smirnov(&[], &[1.0]), None);
        assert_eq!(kolmogorov_smirnov(&[f64::NAN], &[1.0]), None);
    }

    #[test]
    fn samples_that_are_wholly_apart_have_the_closed_form() {
        // 2 / C(2n, n), far below what a difference from 1 could hold.
        let (n, mut expected) = (200, 2.0f64);
        for k in 1..=n {
            expected *= f64::from(k) / f64::from(n + k);
        }
        let values = |from: u32| (from..from + n).map(f64::from).collect::<Vec<_>>();
        let found = kolmogorov_smirnov(&values(0), &values(1000)).unwrap();
        assert!((found.p_value / expected - 1.0).abs() < 1e-12 && expected < 1e-100, "{found:?} {expected}");
    }

    #[test]
    fn both_series_meet() {
        assert!((survival(1.0 - 1e-12) - survival(1.0)).abs() < 1e-11);
        assert_eq!(survival(0.0), 1.0);
        assert!(survival(8.0) < 1e-50);
    }

    #[test]
    fn the_asymptotic_value_nears_the_exact_one() {
        let first: Vec<f64> = (0..600).map(f64::from).collect();
        let second: Vec<f64> = (0..600).map(|i| f64::from(i) + 45.3).collect();
        let found = kolmogorov_smirnov(&first, &second).unwrap();
        let asymptotic = asymptotic_p_value(600, 600, found.statistic);
        assert!((asymptotic / found.p_value - 1.0).abs() < 0.1, "{found:?} {asymptotic}");
    }
}
