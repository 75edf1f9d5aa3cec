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
//!    `rollout_weights = "int8"`, or on a GPU, is it not: π_old is then what the trainer's forward gives before the weights move (without a
//!    pass of its own, if the step has one update), and the loss is corrected for the sampler's distribution by truncated
//!    importance weights, as TRL's with `vllm_importance_sampling_mode = "token_truncate"`.
//! 3. The reference model is the one the stage started from; with an adapter it is the model without the adapter.
//! 4. The prompt of a group is computed once for all of its completions, forward and backward.
//! 5. Log-probabilities are those of the temperature-scaled distribution over the whole vocabulary, in sampling and in
//!    training, whatever top-k, top-p and min-p leave out.
//! 6. A completion without a reward (no reward applies to its row) has advantage 0 and takes no part in the baseline.
//! 7. With `mask_truncated_completions`, a truncated completion still counts in the denominators of `sequence` and `constant`.
//!
//! Metrics, named as TRL names them, beside those of [`crate::rollouts`]:
//! - `frac_reward_zero_std`: groups whose rewards are all equal teach nothing.
//! - `loss`, `grad_norm`: means over the updates of the step. `entropy`, `kl`, `clip_ratio/*`: see [`mod@objectives::grpo`].
//! - `sampling/sampling_logp_difference/mean|max`: distance between the log-probabilities recorded while sampling and those
//!   of the first update, before the weights moved.
//! - `sampling/importance_sampling_ratio/min|mean|max`, only with `rollout_weights = "int8"` or on a GPU: see
//!   [`mod@objectives::grpo`].

use std::ops::Range;
use std::time::Instant;

use base::Purpose;
use data::Prompt;
use envs::Reward;
use model::decoder::WeightFormat;
use objectives::{GlobalCounts, PolicyBatch, Reduce, Statistic};
use rollout::{Episode, Finish};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use crate::error::Result;
use crate::method::{Method, Report, Step};
use crate::metrics::{Metrics, mean};
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::{Order, even_parts};
use crate::pass::{Sequence, Unit};
use crate::rollouts::{self, Groups, Rollouts};
use crate::timing::Phase;
use crate::update::{self, Batch, Folds, Known, Reading, Scope};

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[Preset {
    name: "grpo",
    title: "group relative policy optimisation",
    paper: "Shao et al. 2024, arXiv 2402.03300",
    formula: "L = Σ_t w_t [ - min(r_t A, clip(r_t, 1 - ε, 1 + ε_high) A) + β KL_t ],  A = (r - mean) / (std + 1e-4)",
    settings: "",
}];

/// Options of group relative policy optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GrpoOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
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
            method: "grpo".into(),
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
    fn name(&self) -> &str {
        &self.options.method
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
        let groups = self.rollouts().sample(step, step.random(Purpose::Sampling), &prompts)?;
        let scores = groups.score(step, &*self.reward)?;
        let rewards = rollouts::values(&scores);
        let advantages =
            self.options.objective.advantage.of(&rewards, &groups.lengths()).map_err(step.objective_error())?.values;

        let masks: Vec<Vec<bool>> = groups.episodes.iter().map(|episode| self.mask(episode)).collect();
        let episodes = Episodes::new(&groups, &masks, &advantages);
        let mut metrics = groups.metrics(&scores);
        let reference = self.reference_log_probs(step, &episodes)?;
        self.optimise(step, &episodes, reference.as_deref(), &mut metrics)?;
        Ok(Report {
            metrics,
            tokens: episodes.batch.all_tokens(),
            episodes: Some(groups.table(step.number, &scores, &[("advantage", &advantages)])),
        })
    }
}

impl Grpo {
    fn rollouts(&self) -> Rollouts<'_> {
        Rollouts {
            sampling: &self.options.sampling,
            num_generations: self.options.num_generations,
            decode_batch_size: self.options.decode_batch_size,
            weights: self.options.rollout_weights,
        }
    }

    fn reading(&self) -> Reading {
        Reading {
            temperature: self.options.sampling.log_prob_temperature(),
            micro_batch_tokens: self.options.training.micro_batch_tokens,
            entropy: false,
        }
    }

    /// The tokens of a completion that the loss is about.
    fn mask(&self, episode: &Episode) -> Vec<bool> {
        match episode.finish {
            Finish::Length if self.options.mask_truncated_completions => vec![false; episode.completion.len()],
            _ => episode.loss_mask.clone(),
        }
    }

    /// Log-probabilities of all loss tokens under the reference model, if the loss needs them.
    fn reference_log_probs(&self, step: &mut Step<'_>, episodes: &Episodes<'_>) -> Result<Option<Vec<f32>>> {
        if !self.needs_reference() {
            return Ok(None);
        }
        episodes.batch.reference_log_probs(step, self.reading()).map(Some)
    }

    /// Where the log-probabilities of the weights before the updates come from.
    fn old_log_probs(&self, step: &mut Step<'_>, episodes: &Episodes<'_>) -> Result<Old> {
        let updates = self.options.num_iterations * self.options.num_minibatches;
        Ok(match (step.decoder.one_forward(self.options.rollout_weights), updates) {
            (true, _) => Old::Sampler,
            (false, 1) => Old::FirstPass,
            (false, _) => {
                let all = 0..episodes.batch.units();
                let found = episodes.batch.log_probs(step.decoder, step.workspace, all, self.reading());
                Old::Computed(found.map_err(step.model_error())?.log_prob)
            }
        })
    }

    /// Makes the updates of the step.
    fn optimise(
        &self,
        step: &mut Step<'_>,
        episodes: &Episodes<'_>,
        reference: Option<&[f32]>,
        metrics: &mut Metrics,
    ) -> Result<()> {
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        let mut statistics = Folds::default();
        let old = self.old_log_probs(step, episodes)?;
        for _ in 0..self.options.num_iterations {
            for part in even_parts(episodes.batch.units(), self.options.num_minibatches) {
                // Before the first update the weights are those that sampled.
                let first = losses.is_empty();
                let started = Instant::now();
                step.decoder.prepare(step.precision);
                step.spent(Phase::Train, started);
                let gathered = self.gather(step, episodes, part.clone(), &old, first, reference, &mut statistics)?;
                if first {
                    let sampled = &episodes.sampling_log_probs[episodes.batch.tokens_of(&part)];
                    metrics.extend(difference_metrics(&gathered.found.log_prob, sampled));
                }
                let entropy = gathered.found.entropy.iter().map(|&entropy| f64::from(entropy)).collect();
                statistics.extend(&[Statistic { name: "entropy", values: entropy, reduce: Reduce::Mean }]);
                losses.push(gathered.loss);
                norms.push(step.update()?);
            }
        }
        metrics.set("loss", mean(&losses));
        metrics.set("grad_norm", mean(&norms));
        statistics.record(metrics);
        Ok(())
    }

    /// Adds up the gradients of one update: of the loss over the groups `part`.
    #[allow(clippy::too_many_arguments, reason = "one update: its groups, and the log-probabilities it is relative to")]
    fn gather(
        &self,
        step: &mut Step<'_>,
        episodes: &Episodes<'_>,
        part: Range<usize>,
        old: &Old,
        first: bool,
        reference: Option<&[f32]>,
        statistics: &mut Folds,
    ) -> Result<update::Gathered> {
        let objective = &self.options.objective;
        let batch = &episodes.batch;
        let lengths = &batch.lengths()[batch.sequences_of(&part)];
        let counts = GlobalCounts::of(lengths, self.options.sampling.max_new_tokens);
        let known = match old {
            Old::Sampler if first => Known::LogProbs(&episodes.sampling_log_probs),
            _ => Known::Nothing,
        };
        update::gradients(step, batch, part, self.reading(), (Scope::Piece, known), statistics, |piece| {
            let sampled = piece.of_tokens(&episodes.sampling_log_probs)?;
            let (old_log_probs, sampling_log_probs) = match old {
                Old::Sampler => (sampled, None),
                Old::FirstPass => (piece.log_probs.detach(), Some(sampled)),
                Old::Computed(all) => (piece.of_tokens(all)?, Some(sampled)),
            };
            let inputs = PolicyBatch {
                log_probs: piece.log_probs.clone(),
                old_log_probs,
                sampling_log_probs,
                reference_log_probs: reference.map(|all| piece.of_tokens(all)).transpose()?,
                entropy: None,
                advantages: piece.of_tokens(&episodes.advantages)?,
                weights: piece.constant(&objective.aggregation.weights(piece.lengths, &counts))?,
                sequence: piece.sequence(),
            };
            objectives::grpo(objective, &inputs)
        })
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

/// The episodes of a step as groups, with one value for each loss token, sequence by sequence.
struct Episodes<'a> {
    batch: Batch<'a>,
    /// As recorded while sampling.
    sampling_log_probs: Vec<f32>,
    advantages: Vec<f64>,
}

impl<'a> Episodes<'a> {
    fn new(groups: &'a Groups<'_>, masks: &'a [Vec<bool>], advantages: &[f64]) -> Self {
        let (mut sampling_log_probs, mut of_tokens) = (Vec::new(), Vec::new());
        for ((episode, mask), &advantage) in groups.episodes.iter().zip(masks).zip(advantages) {
            let counted = mask.iter().zip(&episode.log_probs).filter(|(counted, _)| **counted);
            sampling_log_probs.extend(counted.map(|(_, log_prob)| log_prob));
            of_tokens.resize(sampling_log_probs.len(), advantage);
        }
        let sequence = |(episode, mask): (&'a Episode, &'a Vec<bool>)| Sequence { ids: &episode.completion, mask };
        let units = groups
            .episodes
            .chunks(groups.size)
            .zip(masks.chunks(groups.size))
            .map(|(group, masks)| Unit {
                prompt: &group[0].prompt,
                sequences: group.iter().zip(masks).map(sequence).collect(),
            })
            .collect();
        Self { batch: Batch::new(units), sampling_log_probs, advantages: of_tokens }
    }
}

/// How far the trainer's log-probabilities are from those recorded while sampling.
fn difference_metrics(trained: &[f32], sampled: &[f32]) -> Metrics {
    let difference = |(new, sampled): (&f32, &f32)| (f64::from(*new) - f64::from(*sampled)).abs();
    let differences: Vec<f64> = trained.iter().zip(sampled).map(difference).collect();
    let mut metrics = Metrics::new();
    metrics.set("sampling/sampling_logp_difference/mean", mean(&differences));
    metrics.set("sampling/sampling_logp_difference/max", differences.iter().copied().fold(0.0, f64::max));
    metrics
}
