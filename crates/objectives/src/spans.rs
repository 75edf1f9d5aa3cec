//! Credit by spans: parts of completions that are judged on their own.
//!
//! A span stands where a completion does: what it is paid, with what its tokens pay themselves, is compared with the spans of its group by the same
//! [`Baseline`](crate::Baseline) and scale, and its loss tokens have the difference as their advantage. A token outside of every span answers for nothing:
//! its advantage is 0, and with a value model there is nothing to learn at it. A completion without spans is one span, which is paid its score.
//!
//! "Rewarding Doubt", 2025, arXiv 2503.02623, makes an episode of its own of every confidence in a list of answers, with what stands before it as the
//! prompt. Its tokens then have the advantages that a span's have here, where a reply is sampled, and computed, once.
//!
//! The baselines of a group hold for its spans as they do for completions that do not depend on each other; later spans of a completion depend on earlier ones.

use std::ops::Range;

use crate::advantage::{Advantages, Rewards};
use crate::loss::{Error, Result, check_length};

/// A part of a completion that is judged on its own.
#[derive(Clone, Debug, PartialEq)]
pub struct SpanReward {
    /// What it is paid.
    pub reward: f64,
    /// Its places among the loss tokens of the completion.
    pub tokens: Range<usize>,
}

/// The spans of a step in the place of its completions.
pub(crate) struct Spans {
    scores: Vec<Option<f64>>,
    groups: Vec<usize>,
    lengths: Vec<usize>,
    token_rewards: Option<Vec<f64>>,
    values: Option<Vec<f64>>,
    /// For each completion, how many spans it has.
    counts: Vec<usize>,
    /// For each token of a span, its place among all loss tokens.
    places: Vec<usize>,
}

impl Spans {
    /// The spans of the completions that `rewards` describes.
    ///
    /// # Errors
    /// Spans that are missing, not in order, or reach beyond their completion.
    pub fn new(rewards: &Rewards<'_>) -> Result<Self> {
        let missing = Error::Missing { what: "spans", why: "a token answers for the span that it is in" };
        let all = rewards.spans.ok_or(missing)?;
        check_length("the list of spans", all.len(), rewards.scores.len())?;
        let (mut scores, mut lengths, mut counts, mut places) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut first = 0;
        for ((spans, score), &length) in all.iter().zip(rewards.scores).zip(rewards.lengths) {
            let mut end = 0;
            for span in spans {
                let Range { start, end: last } = span.tokens;
                if start < end || last < start || last > length {
                    let expected = "spans in the order of their tokens, none of which is in two of them";
                    return Err(Error::Range { what: "the start of a span", got: start as f64, expected });
                }
                end = last;
            }
            let whole = [SpanReward { reward: score.unwrap_or(0.0), tokens: 0..length }];
            let spans = if spans.is_empty() { &whole[..] } else { spans };
            for span in spans {
                scores.push(score.map(|_| span.reward));
                lengths.push(span.tokens.len());
                places.extend(span.tokens.clone().map(|token| first + token));
            }
            counts.push(spans.len());
            first += length;
        }
        let mut rest = &counts[..];
        let in_group = |&size: &usize| {
            let own;
            (own, rest) = rest.split_at(size);
            own.iter().sum()
        };
        let groups = rewards.groups.iter().map(in_group).collect();
        let gather = |values: Option<&[f64]>| values.map(|all| places.iter().map(|&place| all[place]).collect());
        let (token_rewards, values) = (gather(rewards.token_rewards), gather(rewards.values));
        Ok(Self { scores, groups, lengths, token_rewards, values, counts, places })
    }

    /// What the spans are paid, as if they were completions.
    pub fn rewards<'a>(&'a self, greedy: Option<&'a [f64]>) -> Rewards<'a> {
        Rewards {
            scores: &self.scores,
            groups: &self.groups,
            lengths: &self.lengths,
            token_rewards: self.token_rewards.as_deref(),
            values: self.values.as_deref(),
            greedy,
            ..Rewards::default()
        }
    }

    /// The advantages of all tokens from those of the spans. `values` are the value model's estimates for all tokens, where it is the
    /// baseline.
    pub fn spread(&self, of_spans: Advantages, tokens: usize, values: Option<&[f64]>) -> Advantages {
        let mut all = Advantages { tokens: vec![0.0; tokens], returns: Vec::new(), sequences: Vec::new(), ..of_spans };
        self.places.iter().zip(&of_spans.tokens).for_each(|(&place, advantage)| all.tokens[place] = *advantage);
        if let Some(values) = values {
            all.returns = values.to_vec();
            self.places.iter().zip(&of_spans.returns).for_each(|(&place, learnt)| all.returns[place] = *learnt);
        }
        let mut rest = &of_spans.sequences[..];
        for &count in &self.counts {
            let own;
            (own, rest) = rest.split_at(count);
            all.sequences.push(own.iter().sum::<f64>() / count as f64);
        }
        all
    }
}
