//! The episodes of a step as a batch, with one number for each loss token.

use base::Random;
use rollout::Episode;

use super::collected::Collected;
use crate::method::Step;
use crate::pass::{Sequence, Unit};
use crate::update::Batch;

/// The episodes of a step as groups, with one value for each loss token, sequence by sequence.
pub struct Episodes<'a> {
    /// The groups, a unit each.
    pub batch: Batch<'a>,
    /// As recorded while sampling.
    pub sampling_log_probs: Vec<f32>,
    /// A number in `0..1`, named by prompt, sample and position.
    pub draws: Vec<f64>,
    /// Filled in when they are known.
    pub advantages: Vec<f64>,
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
        let (batch, steps) = (Batch::new(units.collect()), &collected.steps[..]);
        Self { batch, sampling_log_probs, draws, advantages: Vec::new(), steps }
    }

    /// Whether the weights at the start of the step are those that sampled everything.
    pub fn is_on_policy(&self, step: &Step<'_>) -> bool {
        self.steps.iter().all(|&sampled| sampled == step.number)
    }
}
