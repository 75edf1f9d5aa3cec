//! Policy gradients: reinforcement learning from scores.
//!
//! ```text
//! for prompt q in the step:  y_1..y_G ~ π(. | q)        sampled with the current weights
//!                            r_i = score(q, y_i)        less what truncated and overlong completions pay
//!                            A   = advantages           of completions, or of tokens
//! repeat num_iterations times, for each of num_minibatches parts of the groups:
//!     ratio_t = π(y_t) / π_old(y_t)                     π_old: as recorded while sampling
//!     L = Σ_t w_t [ - min(ratio_t A, clip(ratio_t, 1 - ε, 1 + ε_high) A) + β KL_t ] - c_H mean_t H_t
//!     one optimiser update; with a value model, one of its own
//! ```
//!
//! This is GRPO (Shao et al., "DeepSeekMath", arXiv 2402.03300). Other methods choose other parts: what a reward is compared
//! with, what the ratio is of, what bounds it, where the divergence is paid, how tokens are weighed. The options of
//! [`mod@objectives::policy`] name the parts, and the presets of the family name the published choices.
//!
//! **Value model** (`baseline = "value"`, PPO): a second decoder, a copy of the policy with a number in place of tokens, its own
//! optimiser and its own place in checkpoints. It learns from the step's returns, minibatch by minibatch beside the policy, and
//! for the first `value.warmup_steps` alone. With `value.model = "shared"` it is a head on the policy's own body instead, and both
//! losses make one update: `L + vf_coef · L_value`.
//!
//! **Parts of answers** (`credit = "span"`). Where a reward judges parts of an answer on their own ([`envs::SpanScore`]: each of several facts, by the
//! confidence that is stated for it), the tokens of a part answer for that part alone, and those outside for nothing ([`mod@objectives::spans`]). A part is paid its own
//! reward and what everything else pays for the answer. Its tokens are those that hold a piece of its text, and the one behind them, by which it ends.
//!
//! **Reward shaping.** With `kl_in = "reward"` every token pays `β` times its divergence from the reference, and the score is
//! the last token's; with `kl_target`, `β` follows the divergence. Truncated and overlong completions pay
//! `missing_eos_penalty` and `overlong_penalty`.
//!
//! **Dynamic sampling** (`max_resampling_rounds`, DAPO): groups whose rewards are all equal, those of whole completions
//! whatever the credit, make room for groups of the prompts that come next in the data. What varies after the rounds is what the
//! step learns from; if nothing does, it learns nothing.
//!
//! **The worst mix of prompts** (`worst_case`, robust policy optimisation, Mandal et al., arXiv 2503.00539). With `V_i` the mean over the
//! completions of prompt i of what they are paid, `r - β Σ_t (log π - log ρ)` wherever the divergence is paid, the tokens of a prompt count
//! `n q_i` times, where `q` is the worst mix for the losses `-V_i` ([`mod@objectives::worst_case`]). It is computed once a step, over all of its
//! groups. What is worst depends on the scale of rewards: where prompts of one kind can earn less than others, they remain the worst
//! whatever is learnt. The shaping `centered` pays the difference to reference answers instead (the regret).
//!
//! **Off policy, and reproducible.** With `staleness = k` the sampler is exactly k steps behind: the first step samples k + 1
//! batches, every later one samples the batch that is learnt from k steps on. With `replay`, groups of earlier steps are learnt
//! from again. Both keep the log-probabilities that the episodes were sampled with, so that ratios are relative to the policy
//! that sampled (`old_policy = "sampler"`); with `old_policy = "trainer"` they are relative to the policy at the start of the
//! step, and the difference between the two is corrected for by bounded importance weights.
//!
//! Deviations from the papers and from TRL's `GRPOTrainer`, `RLOOTrainer` and `PPOTrainer`:
//! 1. A step is one round of sampling with all of its updates; TRL counts updates. All updates of a step share a learning rate.
//! 2. π_old comes from the sampler, with no second pass: sampler and trainer run the same kernels, so with equal weights the
//!    two agree to the last bit. So do all activations and logits, and the first update starts from those that sampling left
//!    (`reuse_forward_tokens`). `sampling/sampling_logp_difference/*` must be 0 unless the sampler is behind. It compares with what
//!    training computes itself: with `reuse_forward_tokens = 0` in every step and everything, otherwise what sampling did not leave. With `rollout_weights = "int8"` or on a GPU, π_old is what the trainer's forward gives before the
//!    weights move (without a pass of its own, if the step has one update).
//! 3. The reference model is the one the stage started from; with an adapter it is the model without the adapter.
//! 4. The prompt of a group is computed once for all of its completions, forward and backward.
//! 5. Log-probabilities are those of the temperature-scaled distribution over the whole vocabulary, in sampling and in
//!    training, whatever top-k, top-p and min-p leave out.
//! 6. A completion without a reward (no reward applies to its row) has advantage 0 and takes no part in the baseline.
//! 7. With `mask_truncated_completions`, a truncated completion still counts in the denominators of `sequence` and `constant`.
//! 8. Minibatches are made of whole groups, consecutive ones of the step, whose prompts come in random order. With
//!    `shuffle_minibatches` every later pass has an order of its own, as in PPO, where a single completion is what is shuffled.
//! 9. A separate value model has an optimiser of its own; TRL's PPO has one for both, and weighs the value loss by `vf_coef`.
//!
//! Metrics, named as TRL names them, beside those of [`crate::rollouts`] and [`mod@objectives::policy`]:
//! - `frac_reward_zero_std`: groups whose rewards are all equal teach nothing to a baseline made of the group.
//! - `sampling/groups_sampled`, with dynamic sampling: groups that were sampled for the step.
//! - `group_weights/max`, `group_values/min|mean`, with `worst_case`: the largest `n q_i`, the least and the mean `V_i`.
//! - `sampling/staleness`, with `staleness` or `replay`: mean over groups of the steps since they were sampled.
//! - `loss`, `grad_norm`: means over the updates of the step. `entropy`: of the policy at the loss tokens, in nats.
//! - `entropy_coef`, with `entropy_target`: after the updates of the step.
//! - `sampling/sampling_logp_difference/mean|max`: distance between the log-probabilities recorded while sampling and those
//!   of the first update, before the weights moved.
//! - `sampling/importance_sampling_ratio/min|mean|max`, where the sampler is not π_old: see [`mod@objectives::policy`].
//! - `retain/loss`, `retain/kl`, where rows are kept ([`Policy::with_retained`]): the term that this adds to `loss`, and the divergence alone.
//! - With the divergence in the reward or a value model: `objective/kl` and `objective/entropy` (means over completions of the
//!   sums over tokens of the divergence and of `- log π`), `objective/non_score_reward` (what tokens paid), `objective/scores`,
//!   `objective/rlhf_reward` (both together); `objective/kl_coef` with `kl_target`.
//! - With a value model: `policy/entropy_avg`, `val/ratio_var` (variance over updates of the mean ratio), `val/num_eos_tokens`
//!   (completions that ended by themselves), `val/explained_variance`, `val/grad_norm` (of a separate one), `episode`
//!   (completions since the stage began), and those of [`mod@objectives::value`].

mod collected;
mod critic;
mod episodes;
mod options;
mod presets;
mod sampling;

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use base::Purpose;
use data::{Example, Prompt};
use envs::{Reward, Score};
use model::decoder::Decoder;
use objectives::{
    AdaptiveEntropy, AdaptiveKl, Credit, GlobalCounts, PolicyBatch, Reduce, Rewards, Statistic, ValueBatch, shaping,
};
use rollout::{Episode, Finish, PromptTokens};
use serde::{Deserialize, Serialize};

use crate::carried;
use crate::error::{Error, Result};
use crate::method::{Method, Report, Step};
use crate::metrics::{Metrics, mean, standard_deviation};
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::{even_parts, numbered};
use crate::pass::Unit;
use crate::retained::retain;
use crate::rollouts;
use crate::timing::Phase;
use crate::update::{self, Batch, Folds, Known, Reading, Scope};
use collected::{Collected, Replay, Sampled};
use critic::{Critic, Lesson, Saved};
use episodes::Episodes;

pub use options::{OldPolicy, PolicyOptions, ReplayOptions, ValueModel, ValueOptions};
pub use presets::PRESETS;

/// The file of a checkpoint that holds what is carried from step to step beside weights.
const STATE: &str = "policy_state.json";

/// A policy gradient on a list of prompts.
pub struct Policy {
    options: PolicyOptions,
    prompts: Arc<[Prompt]>,
    reward: Box<dyn Reward>,
    state: State,
    critic: Option<Critic>,
    /// A value model that was read before there was a policy to build it from.
    saved: Option<Saved>,
    /// What the value model starts from, if not from the policy.
    value_init: Option<Decoder>,
    /// How many of the step's first groups are on its tape.
    recorded: usize,
    /// Rows whose distributions are kept, and how much that counts.
    retained: Option<(Arc<[Example]>, f64)>,
}

/// What is carried from step to step beside weights, as it is written down.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct State {
    /// Steps done in the run.
    step: u64,
    /// Weight of the divergence in the reward, where it moves.
    kl: Option<AdaptiveKl>,
    /// Weight of the entropy, where it moves.
    entropy: Option<AdaptiveEntropy>,
    /// Batches that were sampled ahead.
    ahead: VecDeque<Sampled>,
    /// Groups to learn from again.
    replay: Replay,
    /// Updates of the value model.
    value_updates: Option<u64>,
}

impl Policy {
    /// Training on these prompts with this reward. A prompt and what its answers are judged by are one record.
    ///
    /// # Errors
    /// Options that mean nothing.
    pub fn new(options: PolicyOptions, prompts: Vec<Prompt>, reward: Box<dyn Reward>) -> Result<Self> {
        options.validate().map_err(|error| error.within(&options.method))?;
        let kl = options.objective.kl_target.map(|_| AdaptiveKl { coefficient: options.objective.beta });
        let coefficient = options.objective.entropy_coef;
        let entropy = options.objective.entropy_target.map(|_| AdaptiveEntropy { coefficient, entropy: None });
        let state = State { kl, entropy, ..State::default() };
        Ok(Self {
            options,
            prompts: prompts.into(),
            reward,
            state,
            critic: None,
            saved: None,
            value_init: None,
            recorded: 0,
            retained: None,
        })
    }

    /// Keeping what the reference model says at the loss tokens of these rows: each update adds `weight` times the divergence of
    /// [`mod@crate::retained`] over its share of them.
    ///
    /// # Errors
    /// No rows; a weight that is no number above 0.
    pub fn with_retained(mut self, rows: Vec<Example>, weight: f64) -> Result<Self> {
        let within = |error: OptionError| error.within("retained").within(&self.options.method);
        check("rows", rows.len(), !rows.is_empty(), "at least one").map_err(within)?;
        check("weight", weight, weight.is_finite() && weight > 0.0, "a number above 0").map_err(within)?;
        self.retained = Some((rows.into(), weight));
        Ok(self)
    }

    /// With a value model that starts as this model ([`ValueOptions::init`]) and not as the policy.
    ///
    /// # Errors
    /// A method without a separate value model; a model without a head of one output.
    pub fn with_value_model(mut self, init: Decoder) -> Result<Self> {
        let within = |error: OptionError| error.within("value").within(&self.options.method);
        let separate = self.options.has_value_model() && !self.options.shares_value_model();
        check("init", "a model", separate, "a method with a separate value model").map_err(within)?;
        let outputs = init.config().score.map_or(0, |head| head.outputs);
        check("init", format!("a head of {outputs} outputs"), outputs == 1, "a reward model: 1 output")
            .map_err(within)?;
        self.value_init = Some(init);
        Ok(self)
    }
}

impl Method for Policy {
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
        self.options.objective.needs_reference() || self.retained.is_some()
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        self.open_critic(step)?;
        let prompts = Arc::clone(&self.prompts);
        let Sampled { collected: own, mut metrics } = self.next(step, &prompts)?;
        let mut collected = own.clone();
        if self.options.replay.steps > 0 {
            collected.append(self.state.replay.draw(&self.options.replay, step.random(Purpose::Replay)));
            self.state.replay.keep(&self.options.replay, &own);
        }

        let masks: Vec<Vec<bool>> = collected.episodes.iter().map(|episode| self.mask(episode)).collect();
        let mut episodes = Episodes::new(&collected, &masks, step.random(Purpose::Masking));
        episodes.reference_log_probs = self.reference_log_probs(step, &episodes)?;
        episodes.group_weights = self.group_weights(step, &collected, &episodes, &mut metrics)?;
        let values = self.values(step, &episodes)?;
        let advantages = self.advantages(step, &collected, &episodes, values.as_deref(), &mut metrics)?;
        episodes.advantages = advantages.tokens;
        episodes.lesson = values.map(|old| Lesson { old, returns: advantages.returns });
        let tokens = episodes.batch.all_tokens();
        self.optimise(step, episodes, &mut metrics)?;
        self.state.step = step.number;

        self.step_metrics(step, &collected, &mut metrics);
        let groups = own.groups_of(&prompts, PromptTokens::default());
        let advantages = &advantages.sequences[..own.episodes.len()];
        Ok(Report {
            metrics,
            tokens,
            episodes: Some(groups.table(step.number, &own.scores, &[("advantage", advantages)])),
        })
    }

    fn save(&self, folder: &Path) -> Result<()> {
        carried::save_reward(folder, &*self.reward)?;
        if !self.options.carries_state() {
            return Ok(());
        }
        let state = State { value_updates: self.critic.as_ref().map(Critic::updates), ..self.state.clone() };
        carried::save(folder, STATE, &state)?;
        let Some(critic) = &self.critic else { return Ok(()) };
        critic.save(folder).map_err(|source| Error::Model { step: self.state.step, source })
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        carried::load_reward(folder, &*self.reward)?;
        if !self.options.carries_state() {
            return Ok(());
        }
        self.state = carried::load(folder, STATE)?;
        // One that has gone on since is built again.
        self.critic = None;
        if let Some(updates) = self.state.value_updates {
            let saved = Saved::read(folder, updates);
            self.saved = Some(saved.map_err(|source| Error::Model { step: self.state.step, source })?);
        }
        Ok(())
    }
}

// ---- Rewards and advantages ----

impl Policy {
    /// Scores, less what truncated and overlong completions pay.
    fn shaped(&self, episodes: &[Episode], scores: &[Option<Score>]) -> Vec<Option<f64>> {
        let (longest, margin) = (self.options.sampling.max_new_tokens, self.options.overlong_margin);
        let of = |(episode, score): (&Episode, Option<f64>)| {
            let missing = self.options.missing_eos_penalty.filter(|_| episode.finish == Finish::Length);
            let overlong = self.options.overlong_penalty * shaping::overlong(episode.completion.len(), longest, margin);
            Some(score? - missing.unwrap_or(0.0) + overlong)
        };
        episodes.iter().zip(rollouts::values(scores)).map(of).collect()
    }

    /// The advantage of every token, from what its completion was paid and what it paid itself; `values` has the value model's
    /// estimates, where there are any.
    fn advantages(
        &mut self,
        step: &Step<'_>,
        collected: &Collected,
        episodes: &Episodes<'_>,
        values: Option<&[f64]>,
        metrics: &mut Metrics,
    ) -> Result<objectives::Advantages> {
        let objective = &self.options.objective;
        let scores = self.shaped(&collected.episodes, &collected.scores);
        let sampled = &episodes.sampling_log_probs;
        let divergence = (episodes.reference_log_probs.as_ref())
            .filter(|_| objective.kl_in_reward())
            .map(|reference| objective.kl.values(objective.kl_direction, sampled, reference))
            .transpose()
            .map_err(step.objective_error())?;
        let beta = self.state.kl.map_or(objective.beta, |kl| kl.coefficient);
        let token_rewards: Option<Vec<f64>> = divergence.as_ref().map(|all| all.iter().map(|kl| -beta * kl).collect());
        let masks = || collected.episodes.iter().map(|episode| self.mask(episode)).collect::<Vec<_>>();
        let turns = (objective.credit == Credit::Turn).then(|| collected.turns(&scores, &masks()));
        let spans = (objective.credit == Credit::Span).then(|| collected.spans(&scores, &masks(), step.tokenizer));
        let rewards = Rewards {
            scores: &scores,
            turns: turns.as_deref(),
            spans: spans.as_deref(),
            groups: &vec![collected.size; collected.groups()],
            lengths: episodes.batch.lengths(),
            token_rewards: token_rewards.as_deref(),
            greedy: Some(&collected.greedy[..]).filter(|greedy| !greedy.is_empty()),
            values,
        };
        let found = objective.estimator().advantages(&rewards).map_err(step.objective_error())?;

        if divergence.is_some() || values.is_some() {
            let of_completion = |values: &[f64]| values.iter().sum::<f64>() / scores.len() as f64;
            let scored = mean(&scores.iter().flatten().copied().collect::<Vec<_>>());
            let paid = token_rewards.as_deref().map_or(0.0, of_completion);
            let surprise: Vec<f64> = sampled.iter().map(|&log_prob| -f64::from(log_prob)).collect();
            if let Some(divergence) = &divergence {
                let kl = of_completion(divergence);
                metrics.set("objective/kl", kl);
                if let (Some(adaptive), Some(target)) = (&mut self.state.kl, objective.kl_target) {
                    metrics.set("objective/kl_coef", beta);
                    adaptive.update(kl, scores.len(), target, objective.kl_horizon);
                }
            }
            metrics.set("objective/entropy", of_completion(&surprise));
            metrics.set("objective/non_score_reward", paid);
            metrics.set("objective/scores", scored);
            metrics.set("objective/rlhf_reward", scored + paid);
        }
        if let Some(values) = values {
            let explained = objectives::value::explained_variance(values, &found.returns);
            metrics.set("val/explained_variance", explained.unwrap_or(f64::NAN));
        }
        Ok(found)
    }

    /// For every token, how much its group counts in the worst mix of prompts, relative to the mean.
    fn group_weights(
        &self,
        step: &Step<'_>,
        collected: &Collected,
        episodes: &Episodes<'_>,
        metrics: &mut Metrics,
    ) -> Result<Option<Vec<f64>>> {
        let Some(worst_case) = self.options.worst_case else { return Ok(None) };
        let scores = self.shaped(&collected.episodes, &collected.scores);
        let (batch, beta) = (&episodes.batch, self.state.kl.map_or(self.options.objective.beta, |kl| kl.coefficient));
        let left = |group: usize| match &episodes.reference_log_probs {
            None => 0.0,
            Some(reference) => {
                let own = batch.tokens_of(&(group..group + 1));
                let pairs = episodes.sampling_log_probs[own.clone()].iter().zip(&reference[own]);
                pairs.map(|(policy, reference)| f64::from(*policy) - f64::from(*reference)).sum::<f64>()
            }
        };
        let value = |(group, own): (usize, &[Option<f64>])| {
            let scored: Vec<f64> = own.iter().flatten().copied().collect();
            // A group that nothing judges is worth what the others are worth: it is neither worst nor best.
            (!scored.is_empty()).then(|| mean(&scored) - beta * left(group) / own.len() as f64)
        };
        let values: Vec<Option<f64>> = scores.chunks(collected.size).enumerate().map(value).collect();
        let known: Vec<f64> = values.iter().flatten().copied().collect();
        let middle = if known.is_empty() { 0.0 } else { mean(&known) };
        let losses: Vec<f64> = values.iter().map(|value| -value.unwrap_or(middle)).collect();
        let prompts = numbered(collected.rows.iter());
        let weights = worst_case.relative_weights(&losses, &prompts).map_err(step.objective_error())?;
        metrics.set("group_weights/max", weights.iter().copied().fold(0.0, f64::max));
        metrics.set("group_values/min", known.iter().copied().reduce(f64::min).unwrap_or(middle));
        metrics.set("group_values/mean", middle);
        let of_group =
            |(group, weight): (usize, &f64)| std::iter::repeat_n(*weight, batch.tokens_of(&(group..group + 1)).len());
        Ok(Some(weights.iter().enumerate().flat_map(of_group).collect()))
    }

    /// The tokens of a completion that the loss is about.
    fn mask(&self, episode: &Episode) -> Vec<bool> {
        match episode.finish {
            Finish::Length if self.options.mask_truncated_completions => vec![false; episode.completion.len()],
            _ => episode.loss_mask.clone(),
        }
    }

    /// Metrics of the step as a whole.
    fn step_metrics(&self, step: &Step<'_>, collected: &Collected, metrics: &mut Metrics) {
        if self.options.staleness > 0 || self.options.replay.steps > 0 {
            let ages: Vec<f64> = collected.steps.iter().map(|&sampled| (step.number - sampled) as f64).collect();
            metrics.set("sampling/staleness", mean(&ages));
        }
        if self.options.has_value_model() {
            let ended = collected.episodes.iter().filter(|episode| episode.finish == Finish::Stop).count();
            metrics.set("val/num_eos_tokens", ended as f64);
            let completions = self.options.prompts_per_step * self.options.num_generations;
            metrics.set("episode", ((step.index + 1) * completions as u64) as f64);
        }
    }
}

// ---- Other models ----

impl Policy {
    /// Builds the value model, or puts together the one that was read.
    fn open_critic(&mut self, step: &mut Step<'_>) -> Result<()> {
        if !self.options.has_value_model() || self.options.shares_value_model() || self.critic.is_some() {
            return Ok(());
        }
        let critic = Critic::new(step.decoder, self.value_init.as_ref(), &self.options, (step.seed, step.stage));
        let mut critic = critic.map_err(step.model_error())?;
        if let Some(saved) = self.saved.take() {
            critic.restore(saved)?;
        }
        self.critic = Some(critic);
        Ok(())
    }

    fn reading(&self) -> Reading {
        Reading {
            temperature: self.options.sampling.log_prob_temperature(),
            ..Reading::plain(self.options.training.micro_batch_tokens)
        }
    }

    /// Log-probabilities of all loss tokens under the reference model, if they are needed.
    fn reference_log_probs(&self, step: &mut Step<'_>, episodes: &Episodes<'_>) -> Result<Option<Vec<f32>>> {
        if !self.options.objective.needs_reference() {
            return Ok(None);
        }
        // With an adapter the reference is the decoder itself; a step that samples nothing has not prepared it yet.
        step.decoder.prepare(step.precision);
        episodes.batch.reference_log_probs(step, self.reading()).map(Some)
    }

    /// The value model's estimates, if there is one.
    fn values(&mut self, step: &mut Step<'_>, episodes: &Episodes<'_>) -> Result<Option<Vec<f64>>> {
        if self.options.shares_value_model() {
            let started = Instant::now();
            step.decoder.prepare(step.precision);
            let (all, rows) = (0..episodes.batch.units(), self.options.training.micro_batch_tokens);
            let found = episodes.batch.values(step.decoder, step.workspace, all, rows).map_err(step.model_error())?;
            step.spent(Phase::Train, started);
            return Ok(Some(found.into_iter().map(f64::from).collect()));
        }
        let Some(critic) = &mut self.critic else { return Ok(None) };
        critic.prepare(step);
        critic.values(step, &episodes.batch).map(Some)
    }

    /// Where the log-probabilities of the weights before the updates come from; computes them where they need a pass of their
    /// own.
    fn old_log_probs(&self, step: &mut Step<'_>, episodes: &mut Episodes<'_>) -> Result<Old> {
        let updates = self.options.num_iterations * self.options.num_minibatches;
        let other = !step.decoder.one_forward(self.options.rollout_weights);
        let trainer = other || (self.options.old_policy == OldPolicy::Trainer && !episodes.is_on_policy(step));
        Ok(match (trainer, updates) {
            (false, _) => Old::Sampler,
            (true, 1) => Old::FirstPass,
            (true, _) => {
                let started = Instant::now();
                step.decoder.prepare(step.precision);
                let all = 0..episodes.batch.units();
                let found = episodes.batch.log_probs(step.decoder, step.workspace, all, self.reading());
                step.spent(Phase::Train, started);
                episodes.old_log_probs = Some(found.map_err(step.model_error())?.log_prob);
                Old::Computed
            }
        })
    }
}

// ---- Learning ----

impl Policy {
    /// Makes the updates of the step.
    fn optimise(&mut self, step: &mut Step<'_>, mut episodes: Episodes<'_>, metrics: &mut Metrics) -> Result<()> {
        let (mut losses, mut norms, mut ratios, mut value_norms) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut statistics = Folds::default();
        let units = episodes.batch.units();
        // Dynamic sampling may leave fewer groups than there are minibatches.
        let parts = even_parts(units, self.options.num_minibatches.min(units));
        let taught = episodes.lesson.is_some();
        let alone = taught && step.index < self.options.value.warmup_steps;
        let policy_passes = if alone { 0 } else { self.options.num_iterations };
        let value_passes = self.options.value.num_iterations.unwrap_or(self.options.num_iterations);
        let old = if alone { Old::Sampler } else { self.old_log_probs(step, &mut episodes)? };
        let passes = policy_passes.max(if taught { value_passes } else { 0 });
        let shuffles = self.options.shuffle_minibatches && parts.len() > 1;
        let rows_and_weight = self.retained.clone();
        let kept = rows_and_weight.as_ref().map(|(rows, weight)| {
            let parts = even_parts(rows.len(), parts.len().min(rows.len()));
            (Batch::new(rows.iter().map(Unit::of).collect()), parts, *weight)
        });
        let mut retained = Vec::new();
        for pass in 0..passes {
            if pass > 0 && shuffles {
                let order = step.random(Purpose::Minibatches).sample(pass as u32).permutation(units);
                episodes = episodes.in_order(&order);
            }
            let episodes = &episodes;
            let parts = parts.iter().cloned().enumerate();
            for (number, part) in parts.filter(|(_, part)| !episodes.batch.tokens_of(part).is_empty()) {
                if pass < policy_passes {
                    // Before the first update the weights are those at the start of the step.
                    let first = losses.is_empty();
                    let gathered = self.gather(step, episodes, part.clone(), (old, first), &mut statistics)?;
                    let found = &gathered.update.found;
                    if first {
                        let sampled = &episodes.sampling_log_probs[episodes.batch.tokens_of(&part)];
                        metrics.extend(difference_metrics(&found.log_prob, sampled));
                    }
                    self.take_entropy(&found.entropy, &mut statistics);
                    losses.push(gathered.update.loss);
                    ratios.extend(gathered.ratio);
                    if let Some((batch, parts, weight)) = &kept {
                        let (part, rows) =
                            (parts[number % parts.len()].clone(), self.options.training.micro_batch_tokens);
                        retained.push(retain(step, batch, part, *weight, rows)?);
                    }
                    norms.push(step.update()?);
                }
                if let (Some(critic), Some(lesson), true) = (&mut self.critic, &episodes.lesson, pass < value_passes) {
                    critic.prepare(step);
                    let rate = value_learning_rate(&self.options, step.learning_rate);
                    value_norms.push(critic.update(step, &episodes.batch, part, lesson, rate, &mut statistics)?);
                }
            }
        }
        metrics.set("loss", mean(&losses));
        metrics.set("grad_norm", mean(&norms));
        if kept.is_some() {
            metrics.set("retain/loss", mean(&retained.iter().map(|found| found.loss).collect::<Vec<_>>()));
            metrics.set("retain/kl", mean(&retained.iter().map(|found| found.divergence).collect::<Vec<_>>()));
        }
        statistics.record(metrics);
        if let Some(entropy) = self.state.entropy {
            metrics.set("entropy_coef", entropy.coefficient);
        }
        if taught {
            metrics.set("val/ratio_var", standard_deviation(&ratios).powi(2));
        }
        if self.critic.is_some() {
            metrics.set("val/grad_norm", mean(&value_norms));
        }
        Ok(())
    }

    /// The parts of the loss of the next update.
    fn objective(&self) -> objectives::PolicyOptions {
        let options = &self.options.objective;
        let entropy_coef = match (self.state.entropy, options.entropy_target) {
            (Some(entropy), Some(target)) => entropy.applied(target),
            _ => options.entropy_coef,
        };
        objectives::PolicyOptions { entropy_coef, ..options.clone() }
    }

    /// Adds up the gradients of one update: of the loss over the groups `part`. `first` says that the weights have not moved
    /// yet in this step; a value model that shares the policy's body takes its lesson along.
    fn gather(
        &self,
        step: &mut Step<'_>,
        episodes: &Episodes<'_>,
        part: Range<usize>,
        (old, first): (Old, bool),
        statistics: &mut Folds,
    ) -> Result<Gathered> {
        let started = Instant::now();
        step.decoder.prepare(step.precision);
        step.spent(Phase::Train, started);
        let objective = &self.objective();
        let batch = &episodes.batch;
        let lengths = &batch.lengths()[batch.sequences_of(&part)];
        let counts = GlobalCounts::of(lengths, self.options.sampling.max_new_tokens);
        let known = match old {
            Old::Sampler if first && episodes.is_on_policy(step) => Known::LogProbs(&episodes.sampling_log_probs),
            _ => Known::Nothing,
        };
        let scope = if objective.needs_whole_update() { Scope::Batch } else { Scope::Piece };
        let values = self.options.shares_value_model();
        let recorded = if first { self.recorded } else { 0 };
        let reading = Reading { entropy: objective.needs_entropy(), values, recorded, ..self.reading() };
        let (mut moved, mut measured) = (0.0, 0);
        let tokens = batch.tokens_of(&part).len();
        let gathered = update::gradients(step, batch, part, reading, (scope, known), statistics, |piece| {
            let sampled = piece.of_tokens(&episodes.sampling_log_probs)?;
            let (old_log_probs, sampling_log_probs) = match (old, &episodes.old_log_probs) {
                (Old::Computed, Some(all)) => (piece.of_tokens(all)?, Some(sampled)),
                (Old::FirstPass, _) => (piece.log_probs.detach(), Some(sampled)),
                _ => (sampled, None),
            };
            let reference = episodes.reference_log_probs.as_ref().filter(|_| objective.kl_in_loss());
            let mut weights = objective.aggregation.weights(piece.lengths, &counts);
            if let Some(groups) = &episodes.group_weights {
                weights.iter_mut().zip(&groups[piece.tokens.clone()]).for_each(|(weight, group)| *weight *= group);
            }
            let inputs = PolicyBatch {
                log_probs: piece.log_probs.clone(),
                old_log_probs,
                sampling_log_probs,
                reference_log_probs: reference.map(|all| piece.of_tokens(all)).transpose()?,
                entropy: piece.entropy.clone(),
                advantages: piece.of_tokens(&episodes.advantages)?,
                weights: piece.constant(&weights)?,
                sequence: piece.sequence(),
                tokens,
                draws: Some(episodes.draws[piece.tokens.clone()].to_vec()),
            };
            let mut loss = objectives::policy(objective, &inputs)?;
            if let (Some(values), Some(lesson)) = (&piece.values, &episodes.lesson) {
                let weights = vec![self.options.value.vf_coef / tokens as f64; piece.tokens.len()];
                let inputs = ValueBatch {
                    values: values.clone(),
                    old_values: piece.of_tokens(&lesson.old)?,
                    returns: piece.of_tokens(&lesson.returns)?,
                    weights: piece.constant(&weights)?,
                };
                loss = loss.plus(objectives::value(self.options.value.cliprange_value, &inputs)?)?;
            }
            for ratio in loss.statistics.iter().filter(|statistic| statistic.name == "val/ratio") {
                moved = ratio.values.iter().fold(moved, |sum, ratio| sum + ratio);
                measured += ratio.values.len();
            }
            Ok(loss)
        })?;
        Ok(Gathered { update: gathered, ratio: (measured > 0).then(|| moved / measured as f64) })
    }

    /// Takes the entropies of an update into account.
    fn take_entropy(&mut self, entropy: &[f32], statistics: &mut Folds) {
        let values: Vec<f64> = entropy.iter().map(|&entropy| f64::from(entropy)).collect();
        if let (Some(adaptive), Some(control)) = (&mut self.state.entropy, self.options.objective.entropy_control()) {
            adaptive.update(mean(&values), control);
        }
        if self.options.has_value_model() {
            let values = values.clone();
            statistics.extend(&[Statistic { name: "policy/entropy_avg", values, reduce: Reduce::Mean }]);
        }
        statistics.extend(&[Statistic { name: "entropy", values, reduce: Reduce::Mean }]);
    }
}

/// The learning rate of the value model where the policy's is this: the two follow one schedule.
fn value_learning_rate(options: &PolicyOptions, learning_rate: f64) -> f64 {
    match (options.value.learning_rate, options.training.learning_rate) {
        (None, _) => learning_rate,
        (Some(_), 0.0) => 0.0,
        (Some(peak), policy) => peak * (learning_rate / policy),
    }
}

/// Where the log-probabilities of the weights before the updates come from.
#[derive(Clone, Copy)]
enum Old {
    /// From sampling.
    Sampler,
    /// From the forward of the only update.
    FirstPass,
    /// From a forward before the first of several updates.
    Computed,
}

/// One update's gradients were gathered.
struct Gathered {
    update: update::Gathered,
    /// The mean ratio, where it was measured.
    ratio: Option<f64>,
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
