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
//! The members `i` of the mix are pairs, or prompts: the loss of a prompt is then the mean over its pairs, which share its weight
//! evenly. A prompt with many pairs counts no more than one with a single pair.
//!
//! Deviation from the paper: losses that tie for the largest share what the largest gets, so that the order of the rows
//! does not matter.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{Error, Result};

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
}

/// What a mix is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Members {
    /// Pairs, whatever their prompts.
    #[default]
    Pairs,
    /// Prompts, each with all of its pairs.
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
    /// Refuses a radius that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let bounded = matches!(self.ball, Ball::TotalVariation | Ball::Cvar);
        match self.radius {
            radius if bounded && !(0.0..1.0).contains(&radius) => {
                Err(Error::Range { what: "radius", got: radius, expected: "at least 0 and below 1" })
            }
            radius if !(radius.is_finite() && radius >= 0.0) => {
                Err(Error::Range { what: "radius", got: radius, expected: "a number, at least 0" })
            }
            _ => Ok(()),
        }
    }

    /// The worst weights for these losses; they are at least 0 and add up to 1.
    pub fn weights(&self, losses: &[f64]) -> Vec<f64> {
        let n = losses.len() as f64;
        let uniform = vec![1.0 / n; losses.len()];
        let (least, largest) =
            losses.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &l| (a.min(l), b.max(l)));
        if losses.is_empty() || self.radius == 0.0 || least == largest {
            return uniform;
        }
        match self.ball {
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
                let at = |scale: f64| {
                    let temperature = (largest - least) * scale.exp();
                    normalised(losses.iter().map(|&l| ((l - largest) / temperature).exp()).collect())
                };
                let distance = |q: &[f64]| q.iter().filter(|&&q| q > 0.0).map(|q| q * (n * q).ln()).sum::<f64>();
                widest(at, distance, self.radius)
            }
        }
    }

    /// The worst weights for losses in groups, of which `groups` numbers that of each: groups have worst weights for their mean
    /// losses, and share them evenly.
    pub fn weights_of_groups(&self, losses: &[f64], groups: &[u32]) -> Vec<f64> {
        let mut sums: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
        for (loss, group) in losses.iter().zip(groups) {
            let (sum, count) = sums.entry(*group).or_default();
            *sum += loss;
            *count += 1.0;
        }
        let means: Vec<f64> = sums.values().map(|(sum, count)| sum / count).collect();
        let shares: BTreeMap<u32, f64> = (sums.iter().zip(self.weights(&means)))
            .map(|((group, (_, count)), weight)| (*group, weight / count))
            .collect();
        groups.iter().map(|group| shares[group]).collect()
    }

    /// Takes mass `radius` from the smallest losses and gives it to the largest.
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
        for (weight, _) in weights.iter_mut().zip(losses).filter(|(_, loss)| **loss == largest) {
            *weight += moved / ties;
        }
        weights
    }
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
