//! Episodes between sampling and learning: what was sampled for a step, what waits because the sampler runs ahead, and what is
//! kept to be learnt from again.

use std::collections::VecDeque;

use base::Random;
use data::Prompt;
use envs::Score;
use objectives::{TurnReward, filter};
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
