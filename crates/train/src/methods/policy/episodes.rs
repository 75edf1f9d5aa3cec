//! The episodes of a step as a batch, with what is known of each loss token before the updates.

use base::Random;
use rollout::Episode;

use super::collected::Collected;
use super::critic::Lesson;
use crate::method::Step;
use crate::pass::{Sequence, Unit};
use crate::update::Batch;

/// The episodes of a step as groups, and lists with one value for each loss token, sequence by sequence.
pub struct Episodes<'a> {
    /// The groups, a unit each.
    pub batch: Batch<'a>,
    /// As recorded while sampling.
    pub sampling_log_probs: Vec<f32>,
    /// A number in `0..1`, named by prompt, sample and position.
    pub draws: Vec<f64>,
    /// Filled in when they are known.
    pub advantages: Vec<f64>,
    /// Under the weights before the updates, where neither sampling nor the first pass gives them.
    pub old_log_probs: Option<Vec<f32>>,
    /// Under the reference model, if it is needed.
    pub reference_log_probs: Option<Vec<f32>>,
    /// How much its group counts relative to the others, where they do not count the same.
    pub group_weights: Option<Vec<f64>>,
    /// What a value model estimates before the updates, and what it should have, if there is one.
    pub lesson: Option<Lesson>,
    /// The steps that sampled them, of each group.
    steps: &'a [u64],
}

impl<'a> Episodes<'a> {
    /// The loss tokens are those that `masks` counts; `random` names the draws of the step.
    pub fn new(collected: &'a Collected, masks: &'a [Vec<bool>], random: Random) -> Self {
        let (mut sampling_log_probs, mut draws) = (Vec::new(), Vec::new());
        for (episode, mask) in collected.episodes.iter().zip(masks) {
            let random = random.prompt(episode.prompt_id).sample(episode.sample);
            for (position, _) in mask.iter().enumerate().filter(|(_, counted)| **counted) {
                sampling_log_probs.push(episode.log_probs[position]);
                draws.push(random.at(position as u32).uniform());
            }
        }
        let sequence = |(episode, mask): (&'a Episode, &'a Vec<bool>)| Sequence { ids: &episode.completion, mask };
        let groups = collected.episodes.chunks(collected.size).zip(masks.chunks(collected.size));
        let units = groups.map(|(group, masks)| Unit {
            prompt: &group[0].prompt,
            sequences: group.iter().zip(masks).map(sequence).collect(),
        });
        Self {
            batch: Batch::new(units.collect()),
            sampling_log_probs,
            draws,
            advantages: Vec::new(),
            old_log_probs: None,
            reference_log_probs: None,
            group_weights: None,
            lesson: None,
            steps: &collected.steps,
        }
    }

    /// The same groups in another order.
    pub fn in_order(&self, groups: &[usize]) -> Self {
        let units = groups.iter().map(|&group| self.batch.units_of(&(group..group + 1))[0].clone());
        let tokens: Vec<usize> = groups.iter().flat_map(|&group| self.batch.tokens_of(&(group..group + 1))).collect();
        Self {
            batch: Batch::new(units.collect()),
            sampling_log_probs: chosen(&self.sampling_log_probs, &tokens),
            draws: chosen(&self.draws, &tokens),
            advantages: chosen(&self.advantages, &tokens),
            old_log_probs: self.old_log_probs.as_ref().map(|all| chosen(all, &tokens)),
            reference_log_probs: self.reference_log_probs.as_ref().map(|all| chosen(all, &tokens)),
            group_weights: self.group_weights.as_ref().map(|all| chosen(all, &tokens)),
            lesson: self
                .lesson
                .as_ref()
                .map(|lesson| Lesson { old: chosen(&lesson.old, &tokens), returns: chosen(&lesson.returns, &tokens) }),
            steps: self.steps,
        }
    }

    /// Whether the weights at the start of the step are those that sampled everything.
    pub fn is_on_policy(&self, step: &Step<'_>) -> bool {
        self.steps.iter().all(|&sampled| sampled == step.number)
    }
}

fn chosen<T: Copy>(all: &[T], places: &[usize]) -> Vec<T> {
    places.iter().map(|&place| all[place]).collect()
}
