//! Advantages from the rewards of groups: several samples of one prompt are each other's baseline.
//!
//! With rewards `r_1..r_G` of one prompt, mean `m` and sample standard deviation `s = sqrt(Σ (r_i - m)² / (G - 1))`:
//!
//! | name | advantage of sample i | source |
//! | --- | --- | --- |
//! | `group_mean_std` | `(r_i - m) / (s + ε)` | GRPO, arXiv 2402.03300 |
//! | `group_mean` | `r_i - m` | Dr. GRPO, arXiv 2503.20783 |
//! | `batch` | `(r_i - m) / (S + ε)`, `S` over all samples of the batch | Lite PPO, arXiv 2508.08221 |
//! | `leave_one_out` | `r_i - Σ_{j≠i} r_j / (G - 1)` | RLOO, arXiv 2402.14740 |
//!
//! `ε` is [`EPSILON`], as in TRL. A sample without a reward (no reward function applied) takes no part in `m`, `s` and
//! `S` and gets advantage 0. A group whose rewards are all equal gets exactly 0 everywhere, not the rounding error of
//! its mean; such groups are counted, because they teach nothing.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{Error, Result, check_length};

/// Added to a standard deviation before dividing by it.
pub const EPSILON: f64 = 1e-4;

/// How rewards become advantages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Advantage {
    /// Minus the mean of the group, over its standard deviation (TRL: `scale_rewards = "group"`).
    #[default]
    GroupMeanStd,
    /// Minus the mean of the group (TRL: `scale_rewards = "none"`).
    GroupMean,
    /// Minus the mean of the group, over the standard deviation of the batch (TRL: `scale_rewards = "batch"`).
    Batch,
    /// Minus the mean of the group's other samples.
    LeaveOneOut,
}

/// The advantages of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// One per sample, in the order of the rewards.
    pub values: Vec<f64>,
    /// Groups whose scored samples all have the same reward, groups with fewer than two scored samples included.
    pub zero_variance_groups: usize,
    /// All groups.
    pub groups: usize,
}

impl Advantage {
    /// Advantages of `rewards`, which hold consecutive groups of the given lengths. Rewards are `f64`, or
    /// `Option<f64>` where a sample may be unscored.
    ///
    /// Fails when the lengths do not add up to the number of rewards, or when a reward is not finite.
    pub fn of<R: Into<Option<f64>> + Copy>(self, rewards: &[R], group_lengths: &[usize]) -> Result<Advantages> {
        check_length("the list of rewards", rewards.len(), group_lengths.iter().sum())?;
        let rewards: Vec<Option<f64>> = rewards.iter().map(|&reward| reward.into()).collect();
        if let Some((index, value)) =
            rewards.iter().enumerate().find_map(|(i, r)| r.filter(|r| !r.is_finite()).map(|r| (i, r)))
        {
            return Err(Error::NonFiniteReward { index, value });
        }

        let batch_deviation = Moments::of(&rewards).deviation;
        let mut advantages = Advantages {
            values: Vec::with_capacity(rewards.len()),
            zero_variance_groups: 0,
            groups: group_lengths.len(),
        };
        let mut rest = &rewards[..];
        for &length in group_lengths {
            let group;
            (group, rest) = rest.split_at(length);
            let moments = Moments::of(group);
            if moments.constant {
                advantages.zero_variance_groups += 1;
                advantages.values.extend(std::iter::repeat_n(0.0, length));
                continue;
            }
            let scale = match self {
                Self::GroupMeanStd => 1.0 / (moments.deviation + EPSILON),
                Self::GroupMean => 1.0,
                Self::Batch => 1.0 / (batch_deviation + EPSILON),
                // r_i - (G m - r_i) / (G - 1) = (r_i - m) G / (G - 1)
                Self::LeaveOneOut => moments.count / (moments.count - 1.0),
            };
            advantages.values.extend(group.iter().map(|reward| reward.map_or(0.0, |r| (r - moments.mean) * scale)));
        }
        Ok(advantages)
    }
}

/// Mean and sample standard deviation of the scored rewards, folded in order.
struct Moments {
    count: f64,
    mean: f64,
    deviation: f64,
    /// All scored rewards are the same number, or there are fewer than two.
    constant: bool,
}

impl Moments {
    fn of(rewards: &[Option<f64>]) -> Self {
        let scored = || rewards.iter().flatten().copied();
        let count = scored().count() as f64;
        let constant = scored().min_by(f64::total_cmp) == scored().max_by(f64::total_cmp);
        if constant {
            return Self { count, mean: scored().next().unwrap_or(0.0), deviation: 0.0, constant };
        }
        let mean = scored().sum::<f64>() / count;
        let squares: f64 = scored().map(|reward| (reward - mean) * (reward - mean)).sum();
        Self { count, mean, deviation: (squares / (count - 1.0)).sqrt(), constant }
    }
}
