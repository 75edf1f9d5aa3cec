//! Episodes between sampling and learning: what was sampled for a step, what waits because the sampler runs ahead, and what is
//! kept to be learnt from again.

use std::collections::VecDeque;

use base::Random;
use data::Prompt;
use envs::{Score, SpanScore};
use model::tokenizer::Tokenizer;
use objectives::{SpanReward, TurnReward, filter};
use rollout::{Episode, PromptTokens};
use serde::{Deserialize, Serialize};

use super::options::ReplayOptions;
use crate::metrics::Metrics;
use crate::rollouts::{self, Groups};

/// Scored groups of episodes, of which nothing points into the data: they can be kept and written down.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Collected {
    /// For each group, the row of its prompt in the data.
    pub rows: Vec<usize>,
    /// For each group, the number of the step that sampled it.
    pub steps: Vec<u64>,
    /// Episodes of each group.
    pub size: usize,
    /// All episodes, group after group, with the log-probabilities they were sampled with.
    pub episodes: Vec<Episode>,
    /// What each of them was paid.
    pub scores: Vec<Option<Score>>,
    /// For each group, what the greedy completion of its prompt was paid; empty where no one asked.
    pub greedy: Vec<f64>,
}

impl Collected {
    /// The number of groups.
    pub fn groups(&self) -> usize {
        self.rows.len()
    }

    /// Adds groups at the end.
    pub fn append(&mut self, other: Self) {
        if other.rows.is_empty() {
            return;
        }
        self.size = other.size;
        self.rows.extend(other.rows);
        self.steps.extend(other.steps);
        self.episodes.extend(other.episodes);
        self.scores.extend(other.scores);
        self.greedy.extend(other.greedy);
    }

    /// Copies of the chosen groups, in the order chosen.
    pub fn chosen(&self, groups: &[usize]) -> Self {
        let of_group = |group: usize| group * self.size..(group + 1) * self.size;
        Self {
            rows: groups.iter().map(|&group| self.rows[group]).collect(),
            steps: groups.iter().map(|&group| self.steps[group]).collect(),
            size: self.size,
            episodes: groups.iter().flat_map(|&group| self.episodes[of_group(group)].iter().cloned()).collect(),
            scores: groups.iter().flat_map(|&group| self.scores[of_group(group)].iter().cloned()).collect(),
            greedy: match self.greedy.is_empty() {
                true => Vec::new(),
                false => groups.iter().map(|&group| self.greedy[group]).collect(),
            },
        }
    }

    /// The groups whose rewards differ.
    pub fn with_variance(&self) -> Vec<usize> {
        let rewards = rollouts::values(&self.scores);
        let groups = rewards.chunks(self.size.max(1)).enumerate();
        groups.filter(|(_, group)| filter::has_variance(group)).map(|(index, _)| index).collect()
    }

    /// The turns of every completion, of which `values` has what it was paid and `masks` the loss tokens. What a value has beside
    /// the rewards of turns is paid to the last one.
    pub fn turns(&self, values: &[Option<f64>], masks: &[Vec<bool>]) -> Vec<Vec<TurnReward>> {
        let of = |index: usize| {
            let (episode, mask) = (&self.episodes[index], &masks[index]);
            let judged = self.scores[index].as_ref().map_or(&[][..], |score| &score.turns);
            let mut turns: Vec<TurnReward> = (episode.turns.iter().enumerate())
                .map(|(index, turn)| TurnReward {
                    reward: judged.get(index).map_or(0.0, |turn| turn.reward),
                    tokens: mask[turn.tokens.clone()].iter().filter(|counted| **counted).count(),
                })
                .collect();
            let paid: f64 = turns.iter().map(|turn| turn.reward).sum();
            if let Some(last) = turns.last_mut() {
                last.reward += values[index].unwrap_or(paid) - paid;
            }
            turns
        };
        (0..self.episodes.len()).map(of).collect()
    }

    /// The spans of every completion, of which `values` has what it was paid and `masks` the loss tokens. What a value differs from its score by is paid to
    /// each of its spans.
    pub fn spans(&self, values: &[Option<f64>], masks: &[Vec<bool>], tokenizer: &Tokenizer) -> Vec<Vec<SpanReward>> {
        let of = |index: usize| {
            let (Some(score), Some(value)) = (&self.scores[index], values[index]) else { return Vec::new() };
            if score.spans.is_empty() {
                return Vec::new();
            }
            let ends = text_ends(&self.episodes[index].completion, tokenizer);
            let first = |span: &SpanScore| ends.partition_point(|end| *end <= span.text.start);
            let counted = |tokens: usize| masks[index][..tokens].iter().filter(|counted| **counted).count();
            let next = score.spans.iter().skip(1).map(first).chain([ends.len()]);
            let mut free = 0;
            let place = |(span, next): (&SpanScore, usize)| {
                let start = first(span).max(free);
                let end = (ends.partition_point(|end| *end < span.text.end) + 1).min(ends.len());
                // The token behind a span is the choice to end it, unless it begins another.
                free = end.max(next.min(end + 1)).max(start);
                SpanReward { reward: span.reward + value - score.value, tokens: counted(start)..counted(free) }
            };
            score.spans.iter().zip(next).map(place).collect()
        };
        (0..self.episodes.len()).map(of).collect()
    }

    /// The same groups beside their prompts. Their prompts cost `prompt_tokens`.
    pub fn groups_of<'p>(&self, prompts: &'p [Prompt], prompt_tokens: PromptTokens) -> Groups<'p> {
        Groups {
            prompts: self.rows.iter().map(|&row| &prompts[row]).collect(),
            size: self.size,
            episodes: self.episodes.clone(),
            prompt_tokens,
            ..Groups::default()
        }
    }
}

/// For each token, how many bytes of the text are known with it.
fn text_ends(completion: &[u32], tokenizer: &Tokenizer) -> Vec<usize> {
    let mut stream = tokenizer.decode_stream();
    let known = |end: &mut usize, &token: &u32| {
        *end += stream.push(token).len();
        Some(*end)
    };
    completion.iter().scan(0, known).collect()
}

/// What a step learns from, and the metrics of how it was sampled.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sampled {
    /// The groups to learn from.
    pub collected: Collected,
    /// Metrics of everything that was sampled, groups left out included.
    pub metrics: Metrics,
}

/// Groups of the last steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Replay {
    steps: VecDeque<Collected>,
}

impl Replay {
    /// Draws groups of earlier steps, each at most once; fewer where there are not as many.
    pub fn draw(&self, options: &ReplayOptions, random: Random) -> Collected {
        let places: Vec<(usize, usize)> = (self.steps.iter().enumerate())
            .flat_map(|(step, collected)| (0..collected.groups()).map(move |group| (step, group)))
            .collect();
        let mut drawn = Collected::default();
        for place in random.permutation(places.len()).into_iter().take(options.groups_per_step) {
            let (step, group) = places[place];
            drawn.append(self.steps[step].chosen(&[group]));
        }
        drawn
    }

    /// Keeps the groups of a step, and forgets those of steps too long ago.
    pub fn keep(&mut self, options: &ReplayOptions, collected: &Collected) {
        if options.steps == 0 {
            return;
        }
        self.steps.push_back(collected.clone());
        while self.steps.len() > options.steps {
            self.steps.pop_front();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use envs::Status;
    use rollout::Finish;

    use super::*;

    /// Spans of a text whose tokens are its bytes, followed by the token that ends it. The first `forced` tokens were not sampled.
    fn spans(text: &str, forced: usize, of_text: &[(usize, usize)], penalty: f64) -> Vec<SpanReward> {
        let tokenizer = Tokenizer::bytes().unwrap();
        let completion: Vec<u32> = text.bytes().map(u32::from).chain([tokenizer.eos().unwrap()]).collect();
        let tokens = completion.len();
        let loss_mask: Vec<bool> = (0..tokens).map(|token| token >= forced).collect();
        let episode = Episode {
            prompt_id: 0,
            sample: 0,
            prompt: [1].into(),
            completion,
            loss_mask: loss_mask.clone(),
            log_probs: vec![0.0; tokens],
            filtered_log_probs: vec![0.0; tokens],
            top_log_probs: Vec::new(),
            finish: Finish::Stop,
            turns: Vec::new(),
            transcript: None,
            text: text.to_owned(),
        };
        let span =
            |(index, &(start, end)): (usize, &(usize, usize))| SpanScore { text: start..end, reward: index as f64 };
        let spans = of_text.iter().enumerate().map(span).collect();
        let collected = Collected {
            rows: vec![0],
            steps: vec![1],
            size: 1,
            episodes: vec![episode],
            scores: vec![Some(Score { spans, ..Score::new(0.5, Status::Ok) })],
            greedy: Vec::new(),
        };
        collected.spans(&[Some(0.5 - penalty)], &[loss_mask], &tokenizer).remove(0)
    }

    #[test]
    fn a_span_has_the_tokens_that_hold_its_text_and_the_one_that_ends_it() {
        let places = |text: &str, forced, of_text: &[(usize, usize)]| -> Vec<(usize, usize)> {
            spans(text, forced, of_text, 0.0).into_iter().map(|span| (span.tokens.start, span.tokens.end)).collect()
        };
        assert_eq!(places("a: 10", 0, &[(3, 5)]), [(3, 6)], "with the end of the text");
        assert_eq!(places("a: 1\nb: 2", 0, &[(3, 4), (8, 9)]), [(3, 5), (8, 10)]);
        assert_eq!(places("a: 1\nb: 2", 4, &[(3, 4), (8, 9)]), [(0, 1), (4, 6)], "among sampled tokens");
        // A character of two bytes is known with its second token.
        assert_eq!(places("\u{e9}: 1", 0, &[(4, 5)]), [(4, 6)]);
        assert_eq!(places("\u{e9}: 1", 0, &[(0, 2)]), [(1, 3)]);
        assert_eq!(places("123", 0, &[(0, 1), (1, 2), (2, 3)]), [(0, 1), (1, 2), (2, 4)], "side by side");
        assert_eq!(places("123", 0, &[(0, 2), (1, 3)]), [(0, 2), (2, 4)], "no token is in two");
        assert_eq!(places("12", 0, &[(0, 9)]), [(0, 3)], "beyond the text");
    }

    #[test]
    fn what_is_paid_beside_the_score_is_paid_to_every_span() {
        let rewards: Vec<f64> = spans("1 2", 0, &[(0, 1), (2, 3)], 0.25).iter().map(|span| span.reward).collect();
        assert_eq!(rewards, [-0.25, 0.75]);
        assert!(spans("1 2", 0, &[], 0.25).is_empty(), "judged as a whole");
    }
}
