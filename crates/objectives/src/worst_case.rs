//! Weights for the worst case: the distribution near the uniform one under which the mean loss is largest.
//!
//! ```text
//! q* = argmax { Σ_i q_i l_i : q in the ball around (1/n, ..., 1/n) }
//! ```
//!
//! A loss `Σ_i q*_i l_i` trains for the mix of prompts that is worst for the model now, instead of the one in the data
//! (distributionally robust optimisation; for rewards and DPO: Mandal et al., arXiv 2503.00539). By Danskin's theorem its
//! gradient is `Σ_i q*_i ∇l_i` with `q*` held constant, so that robustness is a reweighting and works with any loss.
//!
//! | ball | `q` may be any distribution with | `q*` |
//! | --- | --- | --- |
//! | `total_variation` | `Σ abs(q_i - 1/n) / 2 <= radius` | the smallest losses give up mass `radius`, the largest gets it |
//! | `cvar` | `q_i <= 1 / (n (1 - radius))` | the largest share `1 - radius` of the losses, evenly |
//! | `chi_square` | `Σ (n q_i - 1)² / 2n <= radius` | proportional to the excess over a threshold |
//! | `kl` | `Σ q_i log(n q_i) <= radius` | proportional to `e^{l_i / τ}` |
//!
//! The members `i` of the mix are rows, or prompts: the loss of a prompt is then the mean over its rows, which share its weight
//! evenly. A prompt with many rows counts no more than one with a single row.
//!
//! **Noise.** `total_variation` gives `radius` of all mass to one loss, and the largest loss may be that of a wrong label. Two options
//! spread it, and both stay within the ball:
//! - `temperature` τ: the mass goes to all losses, in proportion to `e^{l_i / τ}`; near 0 to the largest alone.
//! - `cap`: losses count as no larger than this quantile of them, so that those above it share. In any ball.
//!
//! `q*` needs the losses of the whole batch: of a micro-batch alone the worst case is a milder one. And the batch itself is milder than
//! the data: `max_q` is convex in the losses and concave in the distribution that they are drawn from, so that the mean over batches of
//! `n` of the worst case lies below that of the data, and comes nearer as `n` grows. A batch for these weights should be large.
//!
//! Deviation from the paper: losses that tie for the largest share what the largest gets, so that the order of the rows
//! does not matter.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{Error, Loss, Result, check_length};

/// How far from the data's distribution the worst case may lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorstCase {
    /// The distance in which the ball is one.
    pub ball: Ball,
    /// Its radius: 0 is the plain mean. For `total_variation` and `cvar` it lies below 1.
    pub radius: f64,
    /// What the mix is of.
    #[serde(default)]
    pub over: Members,
    /// With `total_variation`: the mass that moves goes to all losses in proportion to `e^{l / temperature}`; when absent, to the
    /// largest loss alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub temperature: Option<f64>,
    /// Losses above this quantile of the losses count as if they were at it when weights are chosen, so that no single row, whose label
    /// may be wrong, gets everything; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub cap: Option<f64>,
}

/// What a mix is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Members {
    /// Pairs, or whatever the rows are, whatever their prompts.
    #[default]
    Pairs,
    /// Prompts, each with all of its rows.
    Prompts,
}

/// A distance between distributions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ball {
    /// Half the sum of the absolute differences.
    TotalVariation,
    /// The conditional value at risk: no weight grows beyond `1 / (1 - radius)` times its old value.
    Cvar,
    /// Half the mean of the squared relative differences.
    ChiSquare,
    /// The Kullback-Leibler divergence from the uniform distribution.
    Kl,
}

impl WorstCase {
    /// The worst case over rows, in a ball with this radius, exactly.
    pub fn new(ball: Ball, radius: f64) -> Self {
        Self { ball, radius, over: Members::Pairs, temperature: None, cap: None }
    }

    /// Refuses values that make no sense.
    pub fn validate(&self) -> Result<()> {
        let bounded = matches!(self.ball, Ball::TotalVariation | Ball::Cvar);
        let range = |what, got: f64, accepted: bool, expected| match got.is_finite() && accepted {
            true => Ok(()),
            false => Err(Error::Range { what, got, expected }),
        };
        match bounded {
            true => range("radius", self.radius, (0.0..1.0).contains(&self.radius), "at least 0 and below 1")?,
            false => range("radius", self.radius, self.radius >= 0.0, "a number, at least 0")?,
        }
        if let Some(temperature) = self.temperature {
            let spread = self.ball == Ball::TotalVariation;
            range("temperature", temperature, spread, "nothing, unless ball is total_variation")?;
            range("temperature", temperature, temperature > 0.0, "a number above 0")?;
        }
        let cap = self.cap.unwrap_or(1.0);
        range("cap", cap, cap > 0.0 && cap <= 1.0, "above 0 and at most 1")
    }

    /// The worst weights for these losses; they are at least 0 and add up to 1.
    pub fn weights(&self, losses: &[f64]) -> Vec<f64> {
        self.worst(losses).unwrap_or_else(|| vec![1.0 / losses.len() as f64; losses.len()])
    }

    /// How much each of these losses, of which `prompts` numbers the prompt of each, counts relative to its share `1/n` of the mean.
    /// Without extent, a ball over rows gives exactly 1 to each.
    ///
    /// # Errors
    /// Another number of prompts than of losses, where the mix is of prompts.
    pub fn relative_weights(&self, losses: &[f64], prompts: &[u32]) -> Result<Vec<f64>> {
        match self.over {
            Members::Pairs => Ok(self.relative(losses)),
            Members::Prompts => {
                check_length("prompts", prompts.len(), losses.len())?;
                Ok(self.relative_of_groups(losses, prompts))
            }
        }
    }

    /// The mean loss of rows, given as their losses divided by their number, made the worst case of it. `prompts` numbers the prompt
    /// of each row. Beside the loss's own statistics there are, over rows, `row_weights/mean` and `row_weights/max`: the relative weights.
    ///
    /// # Errors
    /// Those of [`WorstCase::relative_weights`].
    pub fn of(&self, mean: Loss, prompts: &[u32]) -> Result<Loss> {
        let weights = self.relative_weights(&mean.row_losses()?, prompts)?;
        mean.reweighted(weights)
    }

    /// The worst weights, times the number of losses.
    fn relative(&self, losses: &[f64]) -> Vec<f64> {
        match self.worst(losses) {
            None => vec![1.0; losses.len()],
            Some(weights) => weights.into_iter().map(|weight| weight * losses.len() as f64).collect(),
        }
    }

    /// The worst weights for losses in groups, times the number of losses: groups have worst weights for their mean losses, and
    /// share them evenly.
    fn relative_of_groups(&self, losses: &[f64], groups: &[u32]) -> Vec<f64> {
        let mut sums: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
        for (loss, group) in losses.iter().zip(groups) {
            let (sum, count) = sums.entry(*group).or_default();
            *sum += loss;
            *count += 1.0;
        }
        let means: Vec<f64> = sums.values().map(|(sum, count)| sum / count).collect();
        let share = |count: f64| losses.len() as f64 / (means.len() as f64 * count);
        let weights: BTreeMap<u32, f64> = (sums.iter().zip(self.relative(&means)))
            .map(|((group, (_, count)), weight)| (*group, weight * share(*count)))
            .collect();
        groups.iter().map(|group| weights[group]).collect()
    }

    /// The worst weights; `None` where no distribution in the ball is worse than the uniform one.
    fn worst(&self, losses: &[f64]) -> Option<Vec<f64>> {
        let capped;
        let losses = match self.cap.and_then(|cap| quantile(losses, cap)) {
            None => losses,
            Some(most) => {
                capped = losses.iter().map(|loss| loss.min(most)).collect::<Vec<_>>();
                &capped
            }
        };
        let n = losses.len() as f64;
        let (least, largest) =
            losses.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &l| (a.min(l), b.max(l)));
        if losses.is_empty() || self.radius == 0.0 || least == largest {
            return None;
        }
        Some(match self.ball {
            Ball::TotalVariation => self.total_variation(losses, largest),
            Ball::Cvar => fill_from_the_top(losses, 1.0 / (n * (1.0 - self.radius))),
            Ball::ChiSquare => {
                let distance = |q: &[f64]| q.iter().map(|q| (n * q - 1.0).powi(2)).sum::<f64>() / (2.0 * n);
                let at = |scale: f64| {
                    // How far the threshold is below the largest loss: almost all of them are above it, or that one alone.
                    let depth = (largest - least) * scale.exp();
                    normalised(losses.iter().map(|&l| (l - largest + depth).max(0.0)).collect())
                };
                widest(at, distance, self.radius)
            }
            Ball::Kl => {
                let distance = |q: &[f64]| q.iter().filter(|&&q| q > 0.0).map(|q| q * (n * q).ln()).sum::<f64>();
                widest(|scale| softmax(losses, largest, (largest - least) * scale.exp()), distance, self.radius)
            }
        })
    }

    /// Takes mass `radius` from the smallest losses and gives it to the largest, or to all by temperature.
    fn total_variation(&self, losses: &[f64], largest: f64) -> Vec<f64> {
        let n = losses.len() as f64;
        let ties = losses.iter().filter(|&&l| l == largest).count() as f64;
        let moved = self.radius.min(1.0 - ties / n);
        let mut weights = vec![1.0 / n; losses.len()];
        let mut left = moved;
        for tied in ascending(losses) {
            let share = (left / tied.len() as f64).min(1.0 / n);
            for index in &tied {
                weights[*index] -= share;
            }
            left -= share * tied.len() as f64;
        }
        let receive: Vec<f64> = match self.temperature {
            Some(temperature) => softmax(losses, largest, temperature),
            None => losses.iter().map(|&loss| if loss == largest { 1.0 / ties } else { 0.0 }).collect(),
        };
        weights.iter_mut().zip(receive).for_each(|(weight, share)| *weight += moved * share);
        weights
    }
}

/// The smallest of these numbers that a share of at least `share` of them does not exceed; `None` without numbers.
fn quantile(numbers: &[f64], share: f64) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * numbers.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// Weights in proportion to `e^{l / temperature}`, of losses of which this is the largest.
fn softmax(losses: &[f64], largest: f64, temperature: f64) -> Vec<f64> {
    normalised(losses.iter().map(|&loss| ((loss - largest) / temperature).exp()).collect())
}

/// Gives each loss at most `cap`, from the largest down, until 1 is spent; equal losses get the same.
fn fill_from_the_top(losses: &[f64], cap: f64) -> Vec<f64> {
    let mut weights = vec![0.0; losses.len()];
    let mut left: f64 = 1.0;
    for tied in ascending(losses).into_iter().rev() {
        let share = (left / tied.len() as f64).clamp(0.0, cap);
        for index in &tied {
            weights[*index] = share;
        }
        left -= share * tied.len() as f64;
    }
    weights
}

/// The indices of the losses in ascending order, equal ones together.
fn ascending(losses: &[f64]) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..losses.len()).collect();
    order.sort_by(|&a, &b| losses[a].total_cmp(&losses[b]));
    order.chunk_by(|&a, &b| losses[a] == losses[b]).map(<[usize]>::to_vec).collect()
}

fn normalised(weights: Vec<f64>) -> Vec<f64> {
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

/// The most unequal weights of a family within a distance, by bisection. The family grows more equal with its argument, the
/// logarithm of a scale relative to the spread of the losses.
fn widest(at: impl Fn(f64) -> Vec<f64>, distance: impl Fn(&[f64]) -> f64, radius: f64) -> Vec<f64> {
    let (mut unequal, mut equal) = (-40.0f64, 40.0f64);
    if distance(&at(unequal)) <= radius {
        return at(unequal);
    }
    for _ in 0..80 {
        let middle = (unequal + equal) / 2.0;
        if distance(&at(middle)) <= radius { equal = middle } else { unequal = middle }
    }
    at(equal)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use base::{Purpose, Random};

    use super::*;

    const BALLS: [Ball; 4] = [Ball::TotalVariation, Ball::Cvar, Ball::ChiSquare, Ball::Kl];

    fn draw(seed: u64, n: usize) -> Vec<f64> {
        let random = Random::new(seed, Purpose::Test);
        (0..n as u32).map(|i| 3.0 * random.at(i).uniform().powi(3)).collect()
    }

    fn value(q: &[f64], losses: &[f64]) -> f64 {
        q.iter().zip(losses).map(|(q, l)| q * l).sum()
    }

    fn mean(losses: &[f64]) -> f64 {
        losses.iter().sum::<f64>() / losses.len() as f64
    }

    fn largest(losses: &[f64]) -> f64 {
        losses.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// How far `q` is from the uniform distribution.
    fn distance(ball: Ball, q: &[f64]) -> f64 {
        let n = q.len() as f64;
        match ball {
            Ball::TotalVariation => q.iter().map(|q| (q - 1.0 / n).abs()).sum::<f64>() / 2.0,
            Ball::Cvar => 1.0 - 1.0 / (n * largest(q)),
            Ball::ChiSquare => q.iter().map(|q| (n * q - 1.0).powi(2)).sum::<f64>() / (2.0 * n),
            Ball::Kl => q.iter().filter(|q| **q > 0.0).map(|q| q * (n * q).ln()).sum(),
        }
    }

    #[test]
    fn weights_are_a_distribution_in_the_ball_and_worse_than_any_other_in_it() {
        for (seed, ball) in (0..20).flat_map(|seed| BALLS.map(|ball| (seed, ball))) {
            let n = 3 + seed as usize;
            let losses = draw(seed, n);
            for radius in [0.05, 0.2, 0.5, 0.9] {
                let q = WorstCase::new(ball, radius).weights(&losses);
                assert!(q.iter().all(|q| *q >= 0.0) && (q.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                assert!(distance(ball, &q) <= radius + 1e-6, "{ball:?} {radius}: {}", distance(ball, &q));
                let worst = value(&q, &losses);
                assert!(worst >= mean(&losses) && worst <= largest(&losses) + 1e-12);
                for other in 0..50 {
                    // Random distributions, drawn towards the uniform one until they are in the ball.
                    let raw = normalised(draw(1000 * (seed + 1) + other, n));
                    let at = |t: f64| -> Vec<f64> { raw.iter().map(|q| t * q + (1.0 - t) / n as f64).collect() };
                    let t = (0..40).map(|i| 0.8f64.powi(i)).find(|t| distance(ball, &at(*t)) <= radius).unwrap();
                    assert!(value(&at(t), &losses) <= worst + 1e-9, "{ball:?} {radius}");
                }
            }
        }
    }

    #[test]
    fn the_value_of_total_variation_is_the_largest_loss_and_the_mean_of_the_upper_part() {
        for seed in 0..20 {
            let losses = draw(seed, 10);
            let mut sorted = losses.clone();
            sorted.sort_by(f64::total_cmp);
            for radius in [0.0, 0.05, 0.1, 0.25, 0.5, 0.89] {
                // The smallest losses give up their tenths until `radius` is spent.
                let upper = |index: usize| (0.1 * (index + 1) as f64 - radius).clamp(0.0, 0.1);
                let top: f64 = sorted.iter().enumerate().map(|(index, loss)| upper(index) * loss).sum();
                let expected = radius * largest(&losses) + top;
                let q = WorstCase::new(Ball::TotalVariation, radius).weights(&losses);
                assert!((value(&q, &losses) - expected).abs() < 1e-12);
                // It is a mixture of the maximum and of the conditional value at risk.
                let cvar = WorstCase::new(Ball::Cvar, radius).weights(&losses);
                let mixed = radius * largest(&losses) + (1.0 - radius) * value(&cvar, &losses);
                assert!((mixed - expected).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn the_value_of_chi_square_is_that_of_its_dual() {
        for seed in 0..5 {
            let losses = draw(seed, 12);
            for radius in [0.05, 0.3, 1.0] {
                // min_η sqrt(1 + 2ρ) sqrt(mean (l - η)_+²) + η, Levy et al. 2020, arXiv 2010.05893.
                let dual = |eta: f64| {
                    let squares = losses.iter().map(|l| (l - eta).max(0.0).powi(2)).sum::<f64>() / losses.len() as f64;
                    ((1.0 + 2.0 * radius) * squares).sqrt() + eta
                };
                let least = (-40_000..40_000).map(|i| dual(f64::from(i) * 1e-3)).fold(f64::INFINITY, f64::min);
                let q = WorstCase::new(Ball::ChiSquare, radius).weights(&losses);
                assert!((value(&q, &losses) - least).abs() < 1e-4, "{} {least}", value(&q, &losses));
            }
        }
    }

    #[test]
    fn the_worst_case_grows_with_the_ball_from_the_mean_to_the_maximum() {
        let losses = draw(3, 16);
        for ball in BALLS {
            let at = |radius| value(&WorstCase::new(ball, radius).weights(&losses), &losses);
            let values: Vec<f64> = (0..20).map(|i| at(f64::from(i) * 0.049)).collect();
            assert!((values[0] - mean(&losses)).abs() < 1e-12);
            assert!(values.windows(2).all(|pair| pair[0] <= pair[1] + 1e-9), "{ball:?}: {values:?}");
            let everything = if matches!(ball, Ball::TotalVariation | Ball::Cvar) { 15.0 / 16.0 } else { 10.0 };
            assert!((at(everything) - largest(&losses)).abs() < 1e-9, "{ball:?}");
        }
    }

    #[test]
    fn a_temperature_stays_in_the_ball_and_passes_from_spread_to_exact() {
        let losses = draw(5, 16);
        let exact = WorstCase::new(Ball::TotalVariation, 0.3);
        let at = |temperature| WorstCase { temperature: Some(temperature), ..exact }.weights(&losses);
        for temperature in [1e-4, 0.1, 1.0, 100.0] {
            let q = at(temperature);
            assert!(distance(Ball::TotalVariation, &q) <= 0.3 + 1e-12 && (q.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            assert!(value(&q, &losses) <= value(&exact.weights(&losses), &losses) + 1e-12);
        }
        for (smooth, exact) in at(1e-4).iter().zip(exact.weights(&losses)) {
            assert!((smooth - exact).abs() < 1e-12);
        }
        assert!(largest(&at(1.0)) < largest(&at(0.1)));
    }

    #[test]
    fn a_cap_lets_the_largest_share() {
        let losses = [0.1, 0.2, 0.3, 0.4, 9.0];
        let capped = WorstCase { cap: Some(0.8), ..WorstCase::new(Ball::TotalVariation, 0.2) };
        let q = capped.weights(&losses);
        for (q, expected) in q.iter().zip([0.0, 0.2, 0.2, 0.3, 0.3]) {
            assert!((q - expected).abs() < 1e-12, "the two largest count as 0.4 each: {q} {expected}");
        }
        assert_eq!(WorstCase { cap: Some(1.0), ..capped }.weights(&losses), {
            WorstCase::new(Ball::TotalVariation, 0.2).weights(&losses)
        });
        assert_eq!(WorstCase { cap: Some(0.1), ..capped }.weights(&losses), [0.2; 5], "all count as the least");
    }

    #[test]
    fn a_ball_without_extent_changes_no_bit() {
        for n in 1..200 {
            let losses = draw(n, n as usize);
            let prompts: Vec<u32> = (0..n as u32).collect();
            for over in [Members::Pairs, Members::Prompts] {
                let none = WorstCase { over, ..WorstCase::new(Ball::TotalVariation, 0.0) };
                assert_eq!(none.relative_weights(&losses, &prompts).unwrap(), vec![1.0; n as usize]);
            }
        }
        for ball in BALLS {
            assert_eq!(WorstCase::new(ball, 0.5).relative_weights(&[2.0; 7], &[]).unwrap(), [1.0; 7], "equal losses");
            assert_eq!(WorstCase::new(ball, 0.5).relative_weights(&[2.0], &[]).unwrap(), [1.0], "a single one");
        }
    }

    /// The worst case is concave in the distribution of the losses, and a sample is the mean of the samples that lack one of its losses: so
    /// it is no milder than they are in the mean, and batches are the milder the smaller they are.
    #[test]
    fn smaller_samples_are_milder_in_the_mean() {
        for (seed, ball) in (0..10).flat_map(|seed| BALLS.map(|ball| (seed, ball))) {
            let worst = WorstCase::new(ball, 0.2);
            let of = |losses: &[f64]| value(&worst.weights(losses), losses);
            for n in [2, 3, 8, 20] {
                let losses = draw(seed, n);
                let without = |left_out: usize| -> Vec<f64> {
                    let kept = losses.iter().enumerate().filter(|(index, _)| *index != left_out);
                    kept.map(|(_, loss)| *loss).collect()
                };
                let smaller: Vec<f64> = (0..n).map(|left_out| of(&without(left_out))).collect();
                assert!(mean(&smaller) < of(&losses) + 1e-9, "{ball:?}, {n}: {} {}", mean(&smaller), of(&losses));
            }
        }
    }

    #[test]
    fn values_that_mean_nothing_are_refused() {
        let tv = WorstCase::new(Ball::TotalVariation, 0.2);
        for (wrong, message) in [
            (WorstCase { radius: 1.0, ..tv }, "radius is 1, expected at least 0 and below 1"),
            (WorstCase::new(Ball::Kl, -0.1), "radius is -0.1, expected a number, at least 0"),
            (WorstCase { temperature: Some(0.0), ..tv }, "temperature is 0, expected a number above 0"),
            (
                WorstCase { temperature: Some(1.0), ..WorstCase::new(Ball::Cvar, 0.2) },
                "temperature is 1, expected nothing, unless ball is total_variation",
            ),
            (WorstCase { cap: Some(0.0), ..tv }, "cap is 0, expected above 0 and at most 1"),
        ] {
            assert_eq!(wrong.validate().unwrap_err().to_string(), message);
        }
    }
}
