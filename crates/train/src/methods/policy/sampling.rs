//! What a step learns from: the batches that are sampled, ahead of time where the sampler runs behind the policy, and the groups
//! that take the place of those without variance.

use std::collections::BTreeSet;

use base::{Purpose, Random};
use data::Prompt;
use objectives::Baseline;
use rollout::{PromptTokens, SamplingOptions};

use super::Policy;
use super::collected::{Collected, Sampled};
use crate::error::Result;
use crate::method::Step;
use crate::order::{Order, even_parts};
use crate::rollouts::{Groups, Record, Rollouts};

impl Policy {
    /// What this step learns from. Samples the batch of `staleness` steps on, and in the first step all before it.
    pub(super) fn next(&mut self, step: &mut Step<'_>, prompts: &[Prompt]) -> Result<Sampled> {
        let steps = self.options.training.steps(self.prompts.len(), self.options.prompts_per_step);
        let last = (step.index + self.options.staleness as u64).min(steps.saturating_sub(1));
        let first = step.index + self.state.ahead.len() as u64;
        for batch in first..=last {
            let sampled = self.collect(step, prompts, batch)?;
            self.state.ahead.push_back(sampled);
        }
        // The batch of this step was sampled in it or before it.
        Ok(self.state.ahead.pop_front().unwrap_or_default())
    }

    /// Samples and scores the groups of a batch, and others in place of those without variance.
    fn collect(&mut self, step: &mut Step<'_>, prompts: &[Prompt], batch: u64) -> Result<Sampled> {
        let size = self.options.prompts_per_step;
        let mut order = Order::new(prompts.len(), step.seed, step.stage);
        // A draw is named by the step that learns from it.
        let number = step.number + (batch - step.index);
        let mut cost = PromptTokens::default();
        let mut all = self.sample(step, prompts, order.batch(batch, size), number, &mut cost)?;
        let rounds = self.options.max_resampling_rounds as u64;
        let mut seen: BTreeSet<usize> = all.rows.iter().copied().collect();
        for round in 1..=rounds {
            if all.with_variance().len() >= size {
                break;
            }
            let rows: Vec<usize> =
                order.batch(batch + round, size).into_iter().filter(|row| seen.insert(*row)).collect();
            if !rows.is_empty() {
                all.append(self.sample(step, prompts, rows, number, &mut cost)?);
            }
        }
        let mut metrics = all.groups_of(prompts, cost).metrics(&all.scores);
        if rounds == 0 {
            return Ok(Sampled { collected: all, metrics });
        }
        metrics.set("sampling/groups_sampled", all.groups() as f64);
        let mut kept = all.with_variance();
        kept.truncate(size);
        if kept.is_empty() {
            // One group without advantage: the step learns nothing, and has a loss of 0.
            kept.push(0);
        }
        Ok(Sampled { collected: all.chosen(&kept), metrics })
    }

    /// Samples and scores a group for each of these rows.
    fn sample(
        &mut self,
        step: &mut Step<'_>,
        prompts: &[Prompt],
        rows: Vec<usize>,
        number: u64,
        cost: &mut PromptTokens,
    ) -> Result<Collected> {
        let asked: Vec<&Prompt> = rows.iter().map(|&row| &prompts[row]).collect();
        let random = Random::new(step.seed, Purpose::Sampling).step(number as u32);
        let rollouts = Rollouts {
            record: self.record(step.index),
            ..self.rollouts(&self.options.sampling, self.options.num_generations)
        };
        let groups = rollouts.sample(step, random, &asked)?;
        self.recorded = groups.recorded;
        let scores = groups.score(step, &*self.reward)?;
        cost.computed += groups.prompt_tokens.computed;
        cost.reused += groups.prompt_tokens.reused;
        let mut greedy = Vec::new();
        if self.options.objective.baseline == Baseline::Greedy {
            let sampling = SamplingOptions { temperature: 0.0, ..self.options.sampling.clone() };
            let found = self.rollouts(&sampling, 1).sample(step, random, &asked)?;
            let scores = found.score(step, &*self.reward)?;
            greedy = self.shaped(&found.episodes, &scores).iter().map(|score| score.unwrap_or(0.0)).collect();
        }
        let Groups { size, episodes, .. } = groups;
        Ok(Collected { steps: vec![step.number; rows.len()], rows, size, episodes, scores, greedy })
    }

    fn rollouts<'a>(&self, sampling: &'a SamplingOptions, num_generations: usize) -> Rollouts<'a> {
        Rollouts {
            sampling,
            num_generations,
            decode_batch_size: self.options.decode_batch_size,
            weights: self.options.rollout_weights,
            record: Record::default(),
        }
    }

    /// What the first update of a step finds of its forward on the tape.
    fn record(&self, index: u64) -> Record {
        let options = &self.options;
        let learns = !options.has_value_model() || index >= options.value.warmup_steps;
        let first =
            even_parts(options.prompts_per_step, options.num_minibatches).first().map_or(0, ExactSizeIterator::len);
        Record { groups: if learns { first } else { 0 }, rows: options.recorded_tokens() }
    }
}
