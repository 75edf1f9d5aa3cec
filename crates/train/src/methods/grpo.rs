//! Group relative policy optimisation: reinforcement learning from scores, with the samples of one prompt as each other's
//! baseline.
//!
//! ```text
//! for prompt q in the step:  y_1..y_G ~ π(. | q)        sampled with the current weights
//!                            r_i = score(q, y_i)
//!                            A_i = (r_i - mean(r)) / (std(r) + 1e-4)
//! repeat num_iterations times, for each of num_minibatches parts of the groups:
//!     ratio_t = π(y_t) / π_old(y_t)                     π_old: as recorded while sampling
//!     L = Σ_t w_t [ - min(ratio_t A, clip(ratio_t, 1 - ε, 1 + ε_high) A) + β KL_t ]
//!     one optimiser update
//! ```
//!
//! Shao et al., "DeepSeekMath", arXiv 2402.03300. The loss, the advantages and the weights `w_t` are those of
//! [`mod@objectives::grpo`], [`objectives::Advantage`] and [`objectives::Aggregation`], where the options name their variants.
//!
//! Deviations from the paper and from TRL's `GRPOTrainer`:
//! 1. A step is one round of sampling with all of its updates; TRL counts updates. All updates of a step share a learning rate.
//! 2. π_old comes from the sampler, with no second pass: sampler and trainer run the same kernels, so with equal weights the
//!    two agree to the last bit. `sampling/sampling_logp_difference/*` measures this in every step and must be 0. Only with
//!    `rollout_weights = "int8"` is it not: π_old is then what the trainer's forward gives before the weights move (without a
//!    pass of its own, if the step has one update), and the loss is corrected for the sampler's distribution by truncated
//!    importance weights, as TRL's with `vllm_importance_sampling_mode = "token_truncate"`.
//! 3. The reference model is the one the stage started from; with an adapter it is the model without the adapter.
//! 4. The prompt of a group is computed once for all of its completions, forward and backward.
//! 5. Log-probabilities are those of the temperature-scaled distribution over the whole vocabulary, in sampling and in
//!    training, whatever top-k, top-p and min-p leave out.
//! 6. A completion without a reward (no reward applies to its row) has advantage 0 and takes no part in the baseline.
//! 7. With `mask_truncated_completions`, a truncated completion still counts in the denominators of `sequence` and `constant`.
//!
//! Metrics, named as TRL names them; lengths are in tokens:
//! - `reward`: mean reward. `reward_std`: mean over groups of the standard deviation within the group.
//! - `frac_reward_zero_std`: share of groups whose rewards are all equal; they teach nothing.
//! - `rewards/NAME/mean`, `rewards/NAME/std`: each part of the reward over all completions it applies to.
//! - `status/ok|wrong|malformed|timeout|error`: share of completions with this verdict.
//! - `completions/mean_length|min_length|max_length`, and the same as `*_terminated_length` over completions that ended by
//!   themselves. `completions/clipped_ratio`: share that ran out of tokens.
//! - `loss`, `grad_norm`: means over the updates of the step. `entropy`, `kl`, `clip_ratio/*`: see [`mod@objectives::grpo`].
//! - `sampling/sampling_logp_difference/mean|max`: distance between the log-probabilities recorded while sampling and those
//!   of the first update, before the weights moved.
//! - `sampling/importance_sampling_ratio/min|mean|max`, only with `rollout_weights = "int8"`: see [`mod@objectives::grpo`].
//! - `sampling/prompt_tokens_computed`, `sampling/prompt_tokens_reused`: tokens of the prompts of all completions that went
//!   through the model while sampling, and that were known from the other samples of the prompt or from prompts that begin
//!   alike.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use base::Purpose;
use candle_core::{Device, Tensor, Var};
use data::Prompt;
use envs::{Answer, Reward, Score, Status};
use model::decoder::{Decoder, WeightFormat, Workspace};
use objectives::{GlobalCounts, PolicyBatch, Reduce, Statistic};
use rollout::{Episode, Finish, Generator, PromptTokens, Request};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Folds;
use crate::error::{Error, Result};
use crate::method::{Method, Report, Step, check_losses};
use crate::metrics::{Metrics, mean, standard_deviation};
use crate::observer::Event;
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::{Order, even_parts, split};
use crate::pass::{Pass, Sequence, Unit};
use crate::table::{Column, Table};
use crate::timing::Phase;

/// Options of group relative policy optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GrpoOptions {
    /// Prompts of one step. The step samples this many groups of `num_generations` completions.
    #[schemars(range(min = 1, max = 65_536))]
    pub prompts_per_step: usize,
    /// Completions sampled for each prompt: the group whose mean reward is the baseline.
    #[schemars(range(min = 2, max = 65_536))]
    pub num_generations: usize,
    /// Optimisation passes over the episodes of a step.
    #[schemars(range(min = 1, max = 1_024))]
    pub num_iterations: usize,
    /// Optimiser updates of one pass: the step's groups are cut into this many minibatches.
    #[schemars(range(min = 1))]
    pub num_minibatches: usize,
    /// Leave completions that ran out of tokens out of the loss.
    pub mask_truncated_completions: bool,
    /// The parts of the loss: advantage, clip, divergence from the reference model, aggregation.
    pub objective: objectives::GrpoOptions,
    /// How completions are sampled.
    pub sampling: rollout::SamplingOptions,
    /// Sequences decoded at once. Results do not depend on it.
    #[schemars(range(min = 1))]
    pub decode_batch_size: usize,
    /// The weights that sample: `full` are those that are trained, bit for bit; `int8` is a copy rounded to 8 bits, half
    /// as large as bf16's and not faster. The loss is then corrected by `objective.importance_sampling_clip_max`, and
    /// `sampling/sampling_logp_difference/*` says how far the copy is off.
    pub rollout_weights: WeightFormat,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

impl Default for GrpoOptions {
    fn default() -> Self {
        Self {
            prompts_per_step: 8,
            num_generations: 8,
            num_iterations: 1,
            num_minibatches: 1,
            mask_truncated_completions: false,
            objective: objectives::GrpoOptions::default(),
            sampling: rollout::SamplingOptions::default(),
            decode_batch_size: 32,
            rollout_weights: WeightFormat::Full,
            training: TrainingOptions::default(),
        }
    }
}

impl GrpoOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("prompts_per_step", self.prompts_per_step, (1..=65_536).contains(&self.prompts_per_step), "1 to 65536")?;
        let group = (2..=65_536).contains(&self.num_generations);
        check("num_generations", self.num_generations, group, "2 (one has no baseline) to 65536")?;
        let completions = self.prompts_per_step * self.num_generations;
        check("prompts_per_step", completions, completions <= 1 << 20, "at most 1048576 completions in a step")?;
        check("num_iterations", self.num_iterations, (1..=1024).contains(&self.num_iterations), "1 to 1024")?;
        let cut = (1..=self.prompts_per_step).contains(&self.num_minibatches);
        check("num_minibatches", self.num_minibatches, cut, "between 1 and prompts_per_step")?;
        check("decode_batch_size", self.decode_batch_size, self.decode_batch_size > 0, "at least 1")?;
        self.sampling.validate().map_err(|error| OptionError::new("sampling", error.to_string()))?;
        let drawn = !self.sampling.is_greedy();
        check("sampling.temperature", self.sampling.temperature, drawn, "a number above 0: a group needs to differ")?;
        self.training.validate().map_err(|error| error.within("training"))?;
        self.objective.validate().map_err(|error| OptionError::new("objective", error.to_string()))
    }
}

/// Group relative policy optimisation on a list of prompts.
pub struct Grpo {
    options: GrpoOptions,
    prompts: Vec<Prompt>,
    reward: Box<dyn Reward>,
}

impl Grpo {
    /// Training on these prompts with this reward. A prompt and what its answers are judged by are one record.
    ///
    /// # Errors
    /// Options that mean nothing.
    pub fn new(options: GrpoOptions, prompts: Vec<Prompt>, reward: Box<dyn Reward>) -> Result<Self> {
        options.validate().map_err(|error| error.within("grpo"))?;
        Ok(Self { options, prompts, reward })
    }
}

impl Method for Grpo {
    fn name(&self) -> &'static str {
        "grpo"
    }

    fn training(&self) -> &TrainingOptions {
        &self.options.training
    }

    fn rows(&self) -> usize {
        self.prompts.len()
    }

    fn rows_per_step(&self) -> usize {
        self.options.prompts_per_step
    }

    fn needs_reference(&self) -> bool {
        self.options.objective.needs_reference()
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        let order =
            Order::new(self.prompts.len(), step.seed, step.stage).batch(step.index, self.options.prompts_per_step);
        let prompts: Vec<&Prompt> = order.iter().map(|&row| &self.prompts[row]).collect();
        let mut metrics = Metrics::new();
        let episodes = self.sample(step, &prompts, &mut metrics)?;
        let scores = self.score(step, &prompts, &episodes)?;

        let rewards: Vec<Option<f64>> = scores.iter().map(|score| score.as_ref().map(|score| score.value)).collect();
        let groups = vec![self.options.num_generations; prompts.len()];
        let objective = &self.options.objective;
        let advantages = objective.advantage.of(&rewards, &groups).map_err(step.objective_error())?;

        let masks: Vec<Vec<bool>> = episodes.iter().map(|episode| self.mask(episode)).collect();
        let batch = Batch::new(&prompts, &episodes, &masks, &advantages.values);
        let reference = self.reference_log_probs(step, &batch)?;
        self.optimise(step, &batch, reference.as_deref(), &mut metrics)?;

        let zero_variance = advantages.zero_variance_groups as f64 / advantages.groups as f64;
        metrics.extend(self.reward_metrics(&rewards, &scores, zero_variance));
        metrics.extend(length_metrics(&episodes));
        Ok(Report {
            metrics,
            tokens: batch.tokens(),
            episodes: Some(self.table(step, &prompts, &episodes, &scores, &advantages.values)),
        })
    }
}

impl Grpo {
    /// Samples `num_generations` completions of every prompt, group after group.
    fn sample(&self, step: &mut Step<'_>, prompts: &[&Prompt], metrics: &mut Metrics) -> Result<Vec<Episode>> {
        let started = Instant::now();
        let generations = self.options.num_generations as u32;
        // A prompt may come twice in a step, at the seam of two epochs: its samples then get other numbers.
        let mut seen = BTreeMap::new();
        let requests: Vec<Request> = prompts
            .iter()
            .flat_map(|prompt| {
                let times = seen.entry(prompt.id).and_modify(|times| *times += 1).or_insert(0);
                let first = *times * generations;
                Request::samples(prompt.id, &prompt.ids, generations)
                    .map(move |request| Request { sample: first + request.sample, ..request })
            })
            .collect();
        step.decoder.prepare_for_generation(step.precision, self.options.rollout_weights);
        let random = step.random(Purpose::Sampling);
        let generator = Generator::new(&self.options.sampling, self.options.decode_batch_size, random);
        let observer = &mut step.observer;
        let mut prompt_tokens = PromptTokens::default();
        let episodes = generator
            .generate(step.decoder, step.tokenizer, &requests, |progress| {
                prompt_tokens = progress.prompt_tokens;
                observer.observe(Event::Progress {
                    phase: Phase::Rollout,
                    done: progress.finished,
                    total: progress.total,
                });
            })
            .map_err(|source| Error::Rollout { step: step.number, source })?;
        metrics.set("sampling/prompt_tokens_computed", prompt_tokens.computed as f64);
        metrics.set("sampling/prompt_tokens_reused", prompt_tokens.reused as f64);
        step.spent(Phase::Rollout, started);
        Ok(episodes)
    }

    /// Scores every completion against the row of its own prompt.
    fn score(&self, step: &mut Step<'_>, prompts: &[&Prompt], episodes: &[Episode]) -> Result<Vec<Option<Score>>> {
        let started = Instant::now();
        let answers: Vec<Answer<'_>> = episodes
            .chunks(self.options.num_generations)
            .zip(prompts)
            .flat_map(|(group, prompt)| {
                group.iter().map(|episode| Answer {
                    prompt_text: &prompt.text,
                    completion: &episode.text,
                    completion_ids: &episode.completion,
                    columns: &prompt.columns,
                })
            })
            .collect();
        let reward_error = |source| Error::Reward { step: step.number, source };
        let scores = self.reward.score(&answers).map_err(reward_error)?;
        if scores.len() != answers.len() {
            let (reward, expected, found) = (self.reward.name().to_owned(), answers.len(), scores.len());
            return Err(reward_error(envs::RewardError::Count { reward, expected, found }));
        }
        step.spent(Phase::Score, started);
        Ok(scores)
    }

    /// The tokens of a completion that the loss is about.
    fn mask(&self, episode: &Episode) -> Vec<bool> {
        match episode.finish {
            Finish::Length if self.options.mask_truncated_completions => vec![false; episode.completion.len()],
            _ => episode.loss_mask.clone(),
        }
    }

    /// Log-probabilities of all loss tokens under the reference model, if the loss needs them.
    fn reference_log_probs(&self, step: &mut Step<'_>, batch: &Batch<'_>) -> Result<Option<Vec<f64>>> {
        if !self.needs_reference() {
            return Ok(None);
        }
        let started = Instant::now();
        step.decoder.set_adapter(false);
        let found = self.log_probs(step.reference.unwrap_or(step.decoder), step.workspace, batch);
        let found = found.map_err(step.model_error())?;
        step.decoder.set_adapter(true);
        step.spent(Phase::Reference, started);
        Ok(Some(found.into_iter().map(f64::from).collect()))
    }

    /// Log-probabilities of all loss tokens under a model.
    fn log_probs(&self, decoder: &Decoder, workspace: &mut Workspace, batch: &Batch<'_>) -> model::Result<Vec<f32>> {
        let temperature = self.options.sampling.log_prob_temperature();
        let mut found = Vec::new();
        for piece in batch.pieces(0..batch.units.len(), self.options.training.micro_batch_tokens) {
            let pass = Pass::pack(&batch.units[piece])?;
            decoder.forward(&pass.tokens, workspace, false)?;
            let log_probs = decoder.log_probs(workspace, &pass.targets, temperature, false)?;
            found.extend(pass.by_sequence(&log_probs.log_prob));
        }
        Ok(found)
    }

    /// Where the log-probabilities of the weights before the updates come from.
    fn old_log_probs(&self, step: &mut Step<'_>, batch: &Batch<'_>) -> Result<Old> {
        let updates = self.options.num_iterations * self.options.num_minibatches;
        Ok(match (self.options.rollout_weights, updates) {
            (WeightFormat::Full, _) => Old::Sampler,
            (WeightFormat::Int8, 1) => Old::FirstPass,
            (WeightFormat::Int8, _) => {
                let found = self.log_probs(step.decoder, step.workspace, batch);
                Old::Computed(found.map_err(step.model_error())?)
            }
        })
    }

    /// Makes the updates of the step.
    fn optimise(
        &self,
        step: &mut Step<'_>,
        batch: &Batch<'_>,
        reference: Option<&[f64]>,
        metrics: &mut Metrics,
    ) -> Result<()> {
        let started = Instant::now();
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        let mut statistics = Folds::default();
        let updates = self.options.num_iterations * self.options.num_minibatches;
        let old = self.old_log_probs(step, batch)?;
        for _ in 0..self.options.num_iterations {
            for part in even_parts(batch.units.len(), self.options.num_minibatches) {
                // Before the first update the weights are those that sampled.
                let first = losses.is_empty();
                let known = first && matches!(old, Old::Sampler);
                let found = self.gather_gradients(step, batch, part, &old, known, reference, &mut statistics)?;
                if first {
                    metrics.extend(difference_metrics(&found.differences));
                }
                losses.push(found.loss);
                norms.push(step.update()?);
                step.progress(Phase::Train, losses.len(), updates);
            }
        }
        step.spent(Phase::Train, started);
        metrics.set("loss", mean(&losses));
        metrics.set("grad_norm", mean(&norms));
        statistics.record(metrics);
        Ok(())
    }

    /// Adds up the gradients of one update: of the loss over the groups `part`. With `known`, the log-probabilities are those
    /// recorded while sampling, and the head's pass over them is left to the backward pass alone.
    #[allow(clippy::too_many_arguments, reason = "one update: its groups, and the log-probabilities it is relative to")]
    fn gather_gradients(
        &self,
        step: &mut Step<'_>,
        batch: &Batch<'_>,
        part: Range<usize>,
        old: &Old,
        known: bool,
        reference: Option<&[f64]>,
        statistics: &mut Folds,
    ) -> Result<Gathered> {
        let objective = &self.options.objective;
        let temperature = self.options.sampling.log_prob_temperature();
        let lengths: Vec<usize> = batch.units[part.clone()].iter().flat_map(Unit::lengths).collect();
        let counts = GlobalCounts::of(&lengths, self.options.sampling.max_new_tokens);
        let mut losses = Vec::new();
        let mut differences = Vec::new();
        step.decoder.prepare(step.precision);
        for piece in batch.pieces(part, self.options.training.micro_batch_tokens) {
            let tokens = batch.tokens_of(&piece);
            let pass = Pass::pack(&batch.units[piece]).map_err(step.model_error())?;
            if pass.targets.is_empty() {
                continue;
            }
            step.decoder.forward(&pass.tokens, step.workspace, true).map_err(step.model_error())?;
            let sampled = &batch.sampling_log_probs[tokens.clone()];
            let log_probs = match known {
                true => sampled.to_vec(),
                false => {
                    let found = step.decoder.log_probs(step.workspace, &pass.targets, temperature, false);
                    pass.by_sequence(&found.map_err(step.model_error())?.log_prob)
                }
            };

            let (loss, d_log_prob) = (|| {
                let variable = Var::from_slice(&log_probs, pass.targets.len(), &Device::Cpu)?;
                let constant = |values: &[f64]| Tensor::new(values, &Device::Cpu);
                let (old, corrected) = match old {
                    Old::Sampler => (sampled, false),
                    Old::FirstPass => (&log_probs[..], true),
                    Old::Computed(all) => (&all[tokens.clone()], true),
                };
                let inputs = PolicyBatch {
                    log_probs: variable.as_tensor().clone(),
                    old_log_probs: Tensor::new(old, &Device::Cpu)?,
                    sampling_log_probs: corrected.then(|| Tensor::new(sampled, &Device::Cpu)).transpose()?,
                    reference_log_probs: reference.map(|values| constant(&values[tokens.clone()])).transpose()?,
                    entropy: None,
                    advantages: constant(&batch.advantages[tokens.clone()])?,
                    weights: constant(&objective.aggregation.weights(&pass.lengths, &counts))?,
                    sequence: sequence_of_tokens(&pass.lengths),
                };
                let loss = objectives::grpo(objective, &inputs)?;
                let gradient = loss.gradient(&inputs.log_probs)?;
                Ok((loss, gradient))
            })()
            .map_err(step.objective_error())?;
            losses.extend(loss.values().map_err(step.objective_error())?);
            statistics.extend(&loss.statistics);
            let d_log_prob = pass.by_target(&d_log_prob);
            let found = step
                .decoder
                .backward(&pass.tokens, step.workspace, &pass.targets, temperature, &d_log_prob, None, step.gradients)
                .map_err(step.model_error())?;
            let difference = |(new, sampled): (f32, &f32)| (f64::from(new) - f64::from(*sampled)).abs();
            differences.extend(pass.by_sequence(&found.log_prob).into_iter().zip(sampled).map(difference));
            let entropy = pass.by_sequence(&found.entropy).into_iter().map(f64::from).collect();
            statistics.extend(&[Statistic { name: "entropy", values: entropy, reduce: Reduce::Mean }]);
        }
        check_losses(step.number, &losses, &lengths)?;
        Ok(Gathered { loss: losses.iter().sum(), differences })
    }

    fn reward_metrics(&self, rewards: &[Option<f64>], scores: &[Option<Score>], zero_variance: f64) -> Metrics {
        let scored: Vec<f64> = rewards.iter().flatten().copied().collect();
        let deviations: Vec<f64> = rewards
            .chunks(self.options.num_generations)
            .map(|group| standard_deviation(&group.iter().flatten().copied().collect::<Vec<_>>()))
            .filter(|deviation| deviation.is_finite())
            .collect();
        let mut metrics = Metrics::new();
        metrics.set("reward", mean(&scored));
        metrics.set("reward_std", mean(&deviations));
        metrics.set("frac_reward_zero_std", zero_variance);
        for name in part_names(scores) {
            let values: Vec<f64> = scores.iter().filter_map(|score| part(score.as_ref()?, name)).collect();
            metrics.set(format!("rewards/{name}/mean"), mean(&values));
            metrics.set(format!("rewards/{name}/std"), standard_deviation(&values));
        }
        for status in Status::ALL {
            let count = scores.iter().flatten().filter(|score| score.status == status).count();
            metrics.set(format!("status/{}", status.name()), count as f64 / scores.len() as f64);
        }
        metrics
    }

    /// One row an episode.
    fn table(
        &self,
        step: &Step<'_>,
        prompts: &[&Prompt],
        episodes: &[Episode],
        scores: &[Option<Score>],
        advantages: &[f64],
    ) -> Table {
        let prompt_of = |index: usize| prompts[index / self.options.num_generations];
        let signed = |ids: &[u32]| ids.iter().map(|&id| id as i32).collect();
        let mut table = Table::default();
        table.push("step", Column::Integer(vec![step.number as i64; episodes.len()]));
        table.push("prompt_id", Column::Integer(episodes.iter().map(|e| i64::from(e.prompt_id)).collect()));
        table.push("sample", Column::Integer(episodes.iter().map(|e| i64::from(e.sample)).collect()));
        table.push("prompt", Column::Text((0..episodes.len()).map(|index| prompt_of(index).text.clone()).collect()));
        table.push("completion", Column::Text(episodes.iter().map(|episode| episode.text.clone()).collect()));
        let rewards = scores.iter().map(|score| score.as_ref().map(|score| score.value)).collect();
        table.push("reward", Column::Number(rewards));
        for name in part_names(scores) {
            let values = scores.iter().map(|score| part(score.as_ref()?, name)).collect();
            table.push(format!("rewards/{name}"), Column::Number(values));
        }
        let status = |score: &Option<Score>| score.as_ref().map_or("", |score| score.status.name()).to_owned();
        table.push("status", Column::Text(scores.iter().map(status).collect()));
        table.push("advantage", Column::Number(advantages.iter().copied().map(Some).collect()));
        table.push("truncated", Column::Flag(episodes.iter().map(|e| e.finish == Finish::Length).collect()));
        table.push("prompt_ids", Column::Integers(episodes.iter().map(|e| signed(&e.prompt)).collect()));
        table.push("completion_ids", Column::Integers(episodes.iter().map(|e| signed(&e.completion)).collect()));
        table.push("log_probs", Column::Numbers(episodes.iter().map(|e| e.log_probs.clone()).collect()));
        let columns = |index| serde_json::Value::Object(prompt_of(index).columns.clone()).to_string();
        table.push("columns", Column::Text((0..episodes.len()).map(columns).collect()));
        table
    }
}

/// Where the log-probabilities of the weights before the updates come from.
enum Old {
    /// From sampling with the same weights.
    Sampler,
    /// From the forward of the only update.
    FirstPass,
    /// From a forward before the first of several updates: one for each loss token.
    Computed(Vec<f32>),
}

/// What one update knows before the weights move.
struct Gathered {
    loss: f64,
    /// Distance of every loss token's log-probability from the one recorded while sampling.
    differences: Vec<f64>,
}

/// The episodes of a step as groups, with one value for each loss token, sequence by sequence.
struct Batch<'a> {
    units: Vec<Unit<'a>>,
    sizes: Vec<usize>,
    /// Where the loss tokens of each group begin, and where the last ends.
    starts: Vec<usize>,
    /// As recorded while sampling.
    sampling_log_probs: Vec<f32>,
    advantages: Vec<f64>,
}

impl<'a> Batch<'a> {
    fn new(prompts: &[&'a Prompt], episodes: &'a [Episode], masks: &'a [Vec<bool>], advantages: &[f64]) -> Self {
        let generations = episodes.len() / prompts.len();
        let mut batch = Self {
            units: Vec::new(),
            sizes: Vec::new(),
            starts: vec![0],
            sampling_log_probs: Vec::new(),
            advantages: Vec::new(),
        };
        for (group, prompt) in prompts.iter().enumerate() {
            let members = group * generations..(group + 1) * generations;
            for index in members.clone() {
                let counted = masks[index].iter().zip(&episodes[index].log_probs).filter(|(counted, _)| **counted);
                batch.sampling_log_probs.extend(counted.map(|(_, log_prob)| log_prob));
                batch.advantages.resize(batch.sampling_log_probs.len(), advantages[index]);
            }
            let sequences = members.map(|index| Sequence { ids: &episodes[index].completion, mask: &masks[index] });
            let unit = Unit { prompt: &prompt.ids, sequences: sequences.collect() };
            batch.sizes.push(unit.rows());
            batch.units.push(unit);
            batch.starts.push(batch.sampling_log_probs.len());
        }
        batch
    }

    /// Cuts a range of groups into pieces that fit in memory.
    fn pieces(&self, groups: Range<usize>, budget: usize) -> Vec<Range<usize>> {
        let first = groups.start;
        let pieces = split(&self.sizes[groups], budget);
        pieces.into_iter().map(|piece| first + piece.start..first + piece.end).collect()
    }

    /// The loss tokens of a range of groups.
    fn tokens_of(&self, groups: &Range<usize>) -> Range<usize> {
        self.starts[groups.start]..self.starts[groups.end]
    }

    /// Tokens of all prompts and completions.
    fn tokens(&self) -> u64 {
        let of = |unit: &Unit<'_>| unit.prompt.len() + unit.sequences.iter().map(|s| s.ids.len()).sum::<usize>();
        self.units.iter().map(|unit| of(unit) as u64).sum()
    }
}

/// The sequence that each loss token belongs to.
fn sequence_of_tokens(lengths: &[usize]) -> Vec<u32> {
    let numbered = lengths.iter().zip(0..);
    numbered.flat_map(|(&length, sequence)| std::iter::repeat_n(sequence, length)).collect()
}

/// The names of the parts of the scores, in the order of their first appearance.
fn part_names(scores: &[Option<Score>]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in scores.iter().flatten().flat_map(|score| &score.parts) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    names
}

fn part(score: &Score, name: &str) -> Option<f64> {
    score.parts.iter().find(|(part, _)| part == name).map(|(_, value)| *value)
}

fn difference_metrics(differences: &[f64]) -> Metrics {
    let mut metrics = Metrics::new();
    metrics.set("sampling/sampling_logp_difference/mean", mean(differences));
    metrics.set("sampling/sampling_logp_difference/max", differences.iter().copied().fold(0.0, f64::max));
    metrics
}

fn length_metrics(episodes: &[Episode]) -> Metrics {
    let mut metrics = Metrics::new();
    let all: Vec<f64> = episodes.iter().map(|episode| episode.completion.len() as f64).collect();
    let ended = episodes.iter().filter(|episode| episode.finish == Finish::Stop);
    let terminated: Vec<f64> = ended.map(|episode| episode.completion.len() as f64).collect();
    for (kind, lengths) in [("length", &all), ("terminated_length", &terminated)] {
        metrics.set(format!("completions/mean_{kind}"), mean(lengths));
        metrics.set(format!("completions/min_{kind}"), lengths.iter().copied().fold(f64::NAN, f64::min));
        metrics.set(format!("completions/max_{kind}"), lengths.iter().copied().fold(f64::NAN, f64::max));
    }
    metrics.set("completions/clipped_ratio", 1.0 - terminated.len() as f64 / all.len() as f64);
    metrics
}
