//! Advantages: how much better a sampled completion, or each of its tokens, did than was to be expected.
//!
//! The score `r_i` of completion i is its last token's reward; a penalty for leaving the reference, where it is part of the
//! reward, is every token's. With `R_i` the sum of a completion's rewards and, over the samples of its prompt, the mean `m`
//! and sample standard deviation `s = sqrt(Σ (R_i - m)² / (G - 1))` of that:
//!
//! | `baseline` | what is subtracted | source |
//! | --- | --- | --- |
//! | `group_mean` | `m` | GRPO, arXiv 2402.03300 |
//! | `leave_one_out` | `Σ_{j≠i} R_j / (G - 1)` | RLOO, arXiv 2402.14740 |
//! | `greedy` | the reward of the greedy completion | ReMax, arXiv 2310.10505 |
//! | `value` | the value model's estimate, token by token ([`mod@crate::gae`]) | PPO, arXiv 1707.06347 |
//! | `none` | nothing | REINFORCE |
//!
//! | `scale_rewards` | what the difference is divided by | source |
//! | --- | --- | --- |
//! | `group` | `s + ε` | GRPO |
//! | `batch` | `S + ε`, `S` over all samples of the batch | Lite PPO, arXiv 2508.08221 |
//! | `none` | 1 | Dr. GRPO, arXiv 2503.20783 |
//!
//! | `credit` | advantage of a token |
//! | --- | --- |
//! | `sequence` | that of its completion, `(R_i - baseline) / scale` |
//! | `token` | `(Σ_{k≥t} γ^{k-t} r_k - baseline) / scale` with baseline and scale of the scores alone; REINFORCE++, arXiv 2501.03262 |
//! | `turn` | `(Σ_{j≥k} γ^{j-k} r_j - mean) / scale` of its turn `k`, with mean and scale of what turns led to ([`mod@crate::turns`]); arXiv 2505.11821 |
//! | `span` | `(r_s - baseline) / scale` of the span `s` that it is in, compared with the spans of the group ([`mod@crate::spans`]); 0 outside; arXiv 2503.02623 |
//!
//! Without a penalty in the reward and with γ = 1 the first two are the same, and with one turn or without spans all. `whiten_advantages` then shifts and scales the
//! advantages of all loss tokens of the step to mean 0 and variance 1 (PPO, REINFORCE++).
//!
//! `ε` is [`EPSILON`], as in TRL. A sample without a reward (no reward function applied) takes no part in `m`, `s` and
//! `S` and gets advantage 0. A group whose rewards are all equal gets exactly 0 everywhere from the baselines of its
//! samples, not the rounding error of its mean; such groups are counted, because they teach nothing. With `credit = "turn"` this
//! holds of what a turn led to, group by group and turn by turn.
//!
//! A deviation bounds what it divides only where this is a difference to a mean of the same numbers: where rewards are nearly equal, anything
//! else divided by it grows up to `1/ε` times. `scale_rewards` therefore has to be `none` with the baselines `greedy` and `none`, and with
//! `credit = "token"` where tokens have returns of their own (a penalty in the reward, or γ below 1).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::gae;
use crate::loss::{Error, Result, check_length};
use crate::spans::{SpanReward, Spans};
use crate::turns::{self, TurnReward};

/// Added to a standard deviation before dividing by it.
pub const EPSILON: f64 = 1e-4;

/// Added to a variance before dividing by its root, as TRL's PPO does.
const WHITEN_EPSILON: f64 = 1e-8;

/// What is subtracted from a reward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// The mean of the group.
    #[default]
    GroupMean,
    /// The mean of the group's other samples.
    LeaveOneOut,
    /// The reward of the prompt's greedy completion, which is sampled in addition.
    Greedy,
    /// The value model's estimate for each token, by generalised advantage estimation.
    Value,
    /// Nothing.
    None,
}

/// What the difference to the baseline is divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// The standard deviation of the group.
    #[default]
    Group,
    /// The standard deviation of the batch.
    Batch,
    /// Nothing.
    None,
}

/// Which rewards a token answers for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Credit {
    /// Those of its whole completion.
    #[default]
    Sequence,
    /// Those from itself on, discounted by `gamma`.
    Token,
    /// Those of its turn in a conversation and of later ones, discounted by `gamma` a turn.
    Turn,
    /// That of its span: of the part of an answer that a reward judges on its own. None, outside of such parts.
    Span,
}

/// The parts of an advantage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimator {
    /// What is subtracted.
    pub baseline: Baseline,
    /// What the difference is divided by.
    pub scale: ScaleRewards,
    /// Which rewards a token answers for; with a value model only [`Credit::Span`] is read.
    pub credit: Credit,
    /// Discount of later rewards, per token.
    pub gamma: f64,
    /// GAE's λ for the advantages.
    pub lambda: f64,
    /// GAE's λ for the returns that the value model learns.
    pub lambda_value: f64,
    /// Divide token rewards by their standard deviation before they are used.
    pub whiten_rewards: bool,
    /// Shift and scale the advantages of all tokens to mean 0 and variance 1.
    pub whiten_advantages: bool,
}

impl Default for Estimator {
    fn default() -> Self {
        Self {
            baseline: Baseline::default(),
            scale: ScaleRewards::default(),
            credit: Credit::default(),
            gamma: 1.0,
            lambda: 0.95,
            lambda_value: 0.95,
            whiten_rewards: false,
            whiten_advantages: false,
        }
    }
}

/// The rewards of a step, and what they are compared with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rewards<'a> {
    /// The score of each completion; `None` where no reward applied.
    pub scores: &'a [Option<f64>],
    /// Completions of each group, in order.
    pub groups: &'a [usize],
    /// Loss tokens of each completion.
    pub lengths: &'a [usize],
    /// The reward of each loss token beside the score: minus the penalty for leaving the reference. Absent where there is none.
    pub token_rewards: Option<&'a [f64]>,
    /// The turns of each completion, for [`Credit::Turn`].
    pub turns: Option<&'a [Vec<TurnReward>]>,
    /// The spans of each completion, for [`Credit::Span`].
    pub spans: Option<&'a [Vec<SpanReward>]>,
    /// The reward of each group's greedy completion, for [`Baseline::Greedy`].
    pub greedy: Option<&'a [f64]>,
    /// The value model's estimate before each loss token, for [`Baseline::Value`].
    pub values: Option<&'a [f64]>,
}

/// The advantages of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// One per loss token, completion by completion.
    pub tokens: Vec<f64>,
    /// One per completion, before whitening over tokens: how it did as a whole, `(R_i - baseline) / scale`, whatever its tokens answer for (with credit by
    /// tokens, of its score alone). With spans the mean of theirs; with a value model the advantage of its first token, 0 without loss tokens.
    pub sequences: Vec<f64>,
    /// What the value model is to learn, one per loss token; empty without a value model.
    pub returns: Vec<f64>,
    /// Groups whose scored samples all have the same reward, groups with fewer than two scored samples included.
    pub zero_variance_groups: usize,
    /// All groups.
    pub groups: usize,
}

impl Estimator {
    /// The advantages of a step.
    ///
    /// # Errors
    /// Lengths that do not add up, a reward that is not finite, and a greedy reward or values that are missing.
    pub fn advantages(&self, rewards: &Rewards<'_>) -> Result<Advantages> {
        let tokens: usize = rewards.lengths.iter().sum();
        check_length("the list of rewards", rewards.scores.len(), rewards.groups.iter().sum())?;
        check_length("the list of lengths", rewards.lengths.len(), rewards.scores.len())?;
        check_length("the rewards of tokens", rewards.token_rewards.map_or(tokens, <[f64]>::len), tokens)?;
        if let Some((index, value)) = first_non_finite(rewards.scores) {
            return Err(Error::NonFiniteReward { index, value });
        }
        if self.credit == Credit::Span {
            check_length("values", rewards.values.map_or(tokens, <[f64]>::len), tokens)?;
            let spans = Spans::new(rewards)?;
            let found = Self { credit: Credit::Sequence, ..*self }.advantages(&spans.rewards(rewards.greedy))?;
            let values = rewards.values.filter(|_| self.baseline == Baseline::Value);
            return Ok(spans.spread(found, tokens, values));
        }
        let mut found = match self.baseline {
            Baseline::Value => self.by_value_model(rewards)?,
            _ => self.by_sequence(rewards)?,
        };
        if self.whiten_advantages {
            let scored = rewards.scores.iter().zip(rewards.lengths);
            let counted: Vec<bool> = scored.flat_map(|(score, &n)| std::iter::repeat_n(score.is_some(), n)).collect();
            whiten(&mut found.tokens, &counted, true);
        }
        Ok(found)
    }

    /// Baselines of whole completions.
    fn by_sequence(&self, rewards: &Rewards<'_>) -> Result<Advantages> {
        let whole: Vec<Option<f64>> = match (self.credit, rewards.token_rewards) {
            (Credit::Sequence, Some(tokens)) => {
                let sums = split(tokens, rewards.lengths).map(|own| own.iter().sum::<f64>());
                rewards.scores.iter().zip(sums).map(|(score, sum)| score.map(|score| score + sum)).collect()
            }
            _ => rewards.scores.to_vec(),
        };
        let greedy = match (self.baseline, rewards.greedy) {
            (Baseline::Greedy, None) => {
                return Err(Error::Missing { what: "greedy", why: "the baseline is the greedy completion's reward" });
            }
            (Baseline::Greedy, Some(greedy)) => {
                check_length("greedy", greedy.len(), rewards.groups.len())?;
                Some(greedy)
            }
            _ => None,
        };

        let batch_deviation = Moments::of(&whole).deviation;
        let mut found = Advantages {
            tokens: Vec::new(),
            sequences: Vec::with_capacity(whole.len()),
            returns: Vec::new(),
            zero_variance_groups: 0,
            groups: rewards.groups.len(),
        };
        // What every token's own return is compared with, and what the difference is multiplied by.
        let mut comparisons = Vec::with_capacity(whole.len());
        for (index, group) in split(&whole, rewards.groups).enumerate() {
            let moments = Moments::of(group);
            found.zero_variance_groups += usize::from(moments.constant);
            let scale = match self.scale {
                ScaleRewards::Group => 1.0 / (moments.deviation + EPSILON),
                ScaleRewards::Batch => 1.0 / (batch_deviation + EPSILON),
                ScaleRewards::None => 1.0,
            };
            for reward in group {
                let reward = reward.unwrap_or(0.0);
                let baseline = match self.baseline {
                    Baseline::GroupMean | Baseline::LeaveOneOut if moments.constant => reward,
                    Baseline::GroupMean => moments.mean,
                    // (G m - r_i) / (G - 1) = m - (r_i - m) / (G - 1)
                    Baseline::LeaveOneOut => moments.mean - (reward - moments.mean) / (moments.count - 1.0),
                    Baseline::Greedy => greedy.map_or(0.0, |greedy| greedy[index]),
                    Baseline::Value | Baseline::None => 0.0,
                };
                found.sequences.push((reward - baseline) * scale);
                comparisons.push((baseline, scale));
            }
        }
        for (advantage, score) in found.sequences.iter_mut().zip(rewards.scores) {
            if score.is_none() {
                *advantage = 0.0;
            }
        }
        if self.credit == Credit::Turn {
            found.tokens = self.by_turn(rewards)?;
            return Ok(found);
        }
        let numbers = found.sequences.iter().zip(&comparisons).zip(rewards.scores.iter().zip(rewards.lengths));
        let mut rest = rewards.token_rewards;
        for ((&advantage, &(baseline, scale)), (score, &length)) in numbers {
            let own = rest.map(|tokens| tokens.split_at(length));
            rest = own.map(|(_, rest)| rest);
            match (self.credit, score) {
                (Credit::Token, Some(score)) if own.is_some() || self.gamma != 1.0 => {
                    let returns = returns(own.map(|(own, _)| own), *score, length, self.gamma);
                    found.tokens.extend(returns.into_iter().map(|sum| (sum - baseline) * scale));
                }
                _ => found.tokens.extend(std::iter::repeat_n(advantage, length)),
            }
        }
        Ok(found)
    }

    /// The advantage of every token from that of its turn.
    fn by_turn(&self, rewards: &Rewards<'_>) -> Result<Vec<f64>> {
        let missing = Error::Missing { what: "turns", why: "a token answers for its turn and later ones" };
        let turns = rewards.turns.ok_or(missing)?;
        check_length("the list of turns", turns.len(), rewards.scores.len())?;
        for (own, &length) in turns.iter().zip(rewards.lengths) {
            check_length("the loss tokens of the turns", own.iter().map(|turn| turn.tokens).sum(), length)?;
        }
        let scored = turns.iter().zip(rewards.scores);
        let compared: Vec<Vec<TurnReward>> =
            scored.map(|(own, score)| score.map_or(Vec::new(), |_| own.clone())).collect();
        let of_batch = turns::deviation(&turns::differences(&compared, self.gamma));
        let mut tokens = Vec::new();
        let mut rest = rewards.lengths.iter();
        for group in split(&compared, rewards.groups) {
            let differences = turns::differences(group, self.gamma);
            let scale = match self.scale {
                ScaleRewards::Group => 1.0 / (turns::deviation(&differences) + EPSILON),
                ScaleRewards::Batch => 1.0 / (of_batch + EPSILON),
                ScaleRewards::None => 1.0,
            };
            for ((own, differences), &length) in group.iter().zip(differences).zip(&mut rest) {
                let end = tokens.len() + length;
                let of_turn =
                    |(turn, difference): (&TurnReward, f64)| std::iter::repeat_n(difference * scale, turn.tokens);
                tokens.extend(own.iter().zip(differences).flat_map(of_turn));
                // Those of a completion without a score.
                tokens.resize(end, 0.0);
            }
        }
        Ok(tokens)
    }

    /// Generalised advantage estimation.
    fn by_value_model(&self, rewards: &Rewards<'_>) -> Result<Advantages> {
        let values = rewards.values.ok_or(Error::Missing { what: "values", why: "the baseline is a value model" })?;
        check_length("values", values.len(), rewards.lengths.iter().sum())?;
        let mut all = match rewards.token_rewards {
            Some(tokens) => tokens.to_vec(),
            None => vec![0.0; values.len()],
        };
        let mut counted = Vec::with_capacity(values.len());
        let mut end = 0;
        for (score, &length) in rewards.scores.iter().zip(rewards.lengths) {
            end += length;
            if let (Some(score), true) = (score, length > 0) {
                all[end - 1] += score;
            }
            counted.extend(std::iter::repeat_n(score.is_some(), length));
        }
        if self.whiten_rewards {
            whiten(&mut all, &counted, false);
        }
        let mut found = Advantages {
            tokens: Vec::with_capacity(values.len()),
            sequences: Vec::with_capacity(rewards.scores.len()),
            returns: Vec::with_capacity(values.len()),
            zero_variance_groups: split(rewards.scores, rewards.groups).filter(|g| Moments::of(g).constant).count(),
            groups: rewards.groups.len(),
        };
        let sequences = split(&all, rewards.lengths).zip(split(values, rewards.lengths)).zip(rewards.scores);
        for ((rewards, values), score) in sequences {
            if score.is_none() {
                found.tokens.extend(std::iter::repeat_n(0.0, values.len()));
                found.returns.extend(values);
                found.sequences.push(0.0);
                continue;
            }
            let advantages = gae::advantages(rewards, values, self.gamma, self.lambda);
            let learnt = gae::advantages(rewards, values, self.gamma, self.lambda_value);
            found.returns.extend(learnt.iter().zip(values).map(|(advantage, value)| advantage + value));
            found.sequences.push(advantages.first().copied().unwrap_or(0.0));
            found.tokens.extend(advantages);
        }
        Ok(found)
    }
}

/// The discounted sum of rewards from each token on; the last token's reward has the score in it.
fn returns(token_rewards: Option<&[f64]>, score: f64, length: usize, gamma: f64) -> Vec<f64> {
    let mut sums = vec![0.0; length];
    let mut later = score;
    for token in (0..length).rev() {
        let own = token_rewards.map_or(0.0, |rewards| rewards[token]);
        later = if token + 1 == length { own + score } else { own + gamma * later };
        sums[token] = later;
    }
    sums
}

/// Scales `values` at the `counted` places to variance 1, and shifts them to mean 0 if `shift`. Fewer than two are left as
/// they are.
fn whiten(values: &mut [f64], counted: &[bool], shift: bool) {
    let moments =
        Moments::of(&values.iter().zip(counted).map(|(&v, &counted)| counted.then_some(v)).collect::<Vec<_>>());
    if moments.count < 2.0 {
        return;
    }
    let scale = 1.0 / (moments.deviation * moments.deviation + WHITEN_EPSILON).sqrt();
    for (value, _) in values.iter_mut().zip(counted).filter(|(_, counted)| **counted) {
        let centred = (*value - moments.mean) * scale;
        *value = if shift { centred } else { centred + moments.mean };
    }
}

/// Consecutive parts of the given lengths.
fn split<'a, T>(values: &'a [T], lengths: &'a [usize]) -> impl Iterator<Item = &'a [T]> {
    let mut rest = values;
    lengths.iter().map(move |&length| {
        let own;
        (own, rest) = rest.split_at(length);
        own
    })
}

fn first_non_finite(scores: &[Option<f64>]) -> Option<(usize, f64)> {
    scores.iter().enumerate().find_map(|(i, score)| score.filter(|score| !score.is_finite()).map(|score| (i, score)))
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
