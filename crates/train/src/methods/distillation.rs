//! Distillation: a student learns the next-token distributions of one or several teachers, on completions of a data set, on
//! its own, or on some of each.
//!
//! ```text
//! a step of B rows:   λ B prompts    y ~ α q + (1 - α) π, num_generations of them, sampled with the current weights; α = 0: y ~ π
//!                     the rest       completions of the data set
//!                     L = Σ_t w_t [ D(p_t, q_t) - c_t log p(y_t) ]        one optimiser update
//! ```
//!
//! `p` is the student's distribution at a position and `q` that of its teachers, both over the whole vocabulary, at one temperature but for
//! `log p` of a token of the data set (`nll_weight`), which is at temperature 1; logits exist for
//! one chunk of positions at a time and are never stored. Divergences, mixtures of teachers and the factors `c` are those of
//! [`mod@objectives::distillation`]. Student and teachers share a vocabulary.
//!
//! With `objective.extrapolation` two teachers make one: an aligned model and the one it is to be moved away from, which gives alignment by
//! reinforcement learning without rewards or samples of actions ([`mod@objectives::extrapolation`]). `teachers = [{ model = "runs/dpo" },
//! { model = "runs/reverse_dpo" }]`, where the second has learnt from the same pairs with `data.columns = { chosen = "rejected", rejected =
//! "chosen" }`. Weights of teachers are then not read. Both have the student's vocabulary, and three models are in memory.
//!
//! With the estimate `sampled`, the student's log-probabilities are those that sampling recorded, and its forward, as far as it fits
//! into `training.micro_batch_tokens`, is the one that sampling made: beside sampling a step takes the teachers' forward and a
//! backward pass.
//!
//! Deviations from GKD (arXiv 2306.13649) and TRL's trainers:
//! 1. λ (`on_policy_fraction`, TRL's `lmbda`) is a fixed share of the rows of every step, not the chance of a whole batch.
//! 2. MiniLLM's (arXiv 2306.08543) loss of language modelling on other text (its `L_PT`) is left out, and a step makes one
//!    update, so that its clipped ratio is the importance weight of the mixture alone.
//!
//! Metrics, beside those of [`crate::rollouts`] where the student samples:
//! - `loss`: the formula above. `grad_norm`: the norm of its gradient before clipping.
//! - `sampling/importance_sampling_ratio/min|mean|max`, with `teacher_mix`: of `p / (α q + (1 - α) p)` over sampled tokens.
//! - `divergence`, `entropy`, `teacher_agreement`: see [`objectives::distillation::statistics`]. With the estimate `sampled`,
//!   `divergence` is the mean of `log p(y_t) - log q(y_t)`, and stands alone.

use std::path::Path;
use std::time::Instant;

use base::Purpose;
use data::{Example, Prompt};
use envs::{Reward, Score};
use model::decoder::{Decoder, WeightFormat};
use objectives::distillation::{Estimate, TokenTerm, statistics};
use objectives::{GlobalCounts, Reduce, SftBatch, Statistic};
use rollout::{Episode, LogitsHook, Mean, Mixture, PromptTokens};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use crate::carried;
use crate::error::{Error, Result};
use crate::method::{Method, Report, Step, check_losses};
use crate::metrics::Metrics;
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::Order;
use crate::pass::Unit;
use crate::rollouts::{Groups, Record, Rollouts};
use crate::rows::{self, Other, RowPass};
use crate::timing::Phase;
use crate::update::{self, Batch, Folds, Known, Reading, Scope};

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "distillation",
        title: "distillation on the student's own samples",
        paper: "Agarwal et al. 2024, arXiv 2306.13649, with λ = 1",
        formula: "L = Σ_t w_t KL(p_t ‖ q_t),  y ~ π",
        settings: "",
    },
    Preset {
        name: "gkd",
        title: "generalised knowledge distillation",
        paper: "Agarwal et al. 2024, arXiv 2306.13649",
        formula: "L = Σ_t w_t [ β KL(q_t ‖ m_t) + (1 - β) KL(p_t ‖ m_t) ],  m = β q + (1 - β) p,  a share λ of y from π",
        settings: "on_policy_fraction = 0.5\n[objective]\ndivergence = \"jensen_shannon\"\nbeta = 0.5",
    },
    Preset {
        name: "on_policy_distillation",
        title: "on-policy distillation: per-token reverse KL of sampled tokens",
        paper: "Lu and Thinking Machines 2025, \"On-Policy Distillation\"",
        formula: "L = - Σ_t w_t [ log q(y_t) - log p(y_t) ] log p(y_t),  the bracket a constant,  y ~ π",
        settings: "[objective]\nestimate = \"sampled\"\ndiscount = 0.0",
    },
    Preset {
        name: "minillm",
        title: "MiniLLM: reverse KL of sequences",
        paper: "Gu et al. 2024, arXiv 2306.08543",
        formula: "L = Σ_t w_t ρ_t [ KL(p_t ‖ q_t) - R_{t+1} log p(y_t) ],  R: mean of log q - log p over what follows,  y ~ m = α q + (1 - α) p,  ρ = p/m",
        settings: "teacher_mix = 0.2\n[objective]\ndivergence = \"reverse_kl\"\ndiscount = 1.0\nlength_normalization = true",
    },
    Preset {
        name: "aligndistil",
        title: "AlignDistil: a teacher beyond a DPO model, away from one of reversed pairs",
        paper: "Zhang et al. 2025, arXiv 2503.02832",
        formula: "L = mean_y mean_t (β/w_t) KL(p_t ‖ softmax(z_1 + w_t (z_1 - z_2))),  w_t = α Σ |p_1 - p_2| + 10⁻³,  y ~ π",
        settings: "[objective]\naggregation = \"sequence\"\n[objective.extrapolation]\nanchor = \"first\"\nadaptive = true\nweight = 15.0\nbeta = 0.1",
    },
    Preset {
        name: "aligndistil_theorem1",
        title: "RLHF with a DPO reward as distillation: theorem 1 of AlignDistil",
        paper: "Zhang et al. 2025, arXiv 2503.02832, theorem 1",
        formula: "L = mean_y mean_t β_2 KL(p_t ‖ softmax(z_ref + w (z_dpo - z_ref))),  w = β/β_2,  y ~ π",
        settings: "[objective]\naggregation = \"sequence\"\n[objective.extrapolation]\nanchor = \"second\"\nadaptive = false\nweight = 2.0\nbeta = 0.1",
    },
    Preset {
        name: "knowledge_distillation",
        title: "knowledge distillation on a data set",
        paper: "Hinton et al. 2015, arXiv 1503.02531; Sanh et al. 2019, arXiv 1910.01108",
        formula: "L = Σ_t w_t KL(q_t ‖ p_t),  y from the data",
        settings: "on_policy_fraction = 0.0\n[objective]\ndivergence = \"forward_kl\"",
    },
    Preset {
        name: "distillm",
        title: "DistiLLM: skewed KL",
        paper: "Ko et al. 2024, arXiv 2402.03898",
        formula: "L = Σ_t w_t KL(q_t ‖ α q_t + (1 - α) p_t),  a share λ of y from π",
        settings: "on_policy_fraction = 0.5\n[objective]\ndivergence = \"skew_kl\"\nskew = 0.1",
    },
];

/// A model to learn from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TeacherOptions {
    /// A named model, a Hugging Face folder, a run or checkpoint, or a GGUF file, with the student's vocabulary.
    pub model: String,
    /// How much it counts relative to the other teachers; below 0, with `objective.mixing = "logits"`, it is a model to move away from.
    pub weight: f64,
}

impl Default for TeacherOptions {
    fn default() -> Self {
        Self { model: String::new(), weight: 1.0 }
    }
}

/// Options of distillation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DistillationOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// The models to learn from.
    pub teachers: Vec<TeacherOptions>,
    /// Rows of one step.
    #[schemars(range(min = 1, max = 65_536))]
    pub batch_size: usize,
    /// Share of the rows of a step, rounded to whole rows, to which the student finds the completions itself; the others come
    /// with theirs from the data.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub on_policy_fraction: f64,
    /// Completions the student samples for each of its prompts.
    #[schemars(range(min = 1, max = 65_536))]
    pub num_generations: usize,
    /// Share of the teacher in the mixture that the student's completions are sampled from (MiniLLM's α); 0 samples from the
    /// student alone. What is learnt from a token is then weighed by how much more probable it is to the student than to the
    /// mixture.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub teacher_mix: f64,
    /// The parts of the loss: divergence, temperature, mixture of teachers, aggregation.
    pub objective: objectives::DistillationOptions,
    /// How the student's completions are sampled.
    pub sampling: rollout::SamplingOptions,
    /// Sequences decoded at once. Results do not depend on it.
    #[schemars(range(min = 1))]
    pub decode_batch_size: usize,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

impl Default for DistillationOptions {
    fn default() -> Self {
        Self {
            method: "distillation".into(),
            teachers: Vec::new(),
            batch_size: 16,
            on_policy_fraction: 1.0,
            num_generations: 1,
            teacher_mix: 0.0,
            objective: objectives::DistillationOptions::default(),
            sampling: rollout::SamplingOptions::default(),
            decode_batch_size: 32,
            training: TrainingOptions::default(),
        }
    }
}

impl DistillationOptions {
    /// Rows of a step to which the student finds the completions itself.
    pub fn prompts_per_step(&self) -> usize {
        (self.on_policy_fraction * self.batch_size as f64).round() as usize
    }

    /// Rows of a step that come with completions.
    pub fn examples_per_step(&self) -> usize {
        self.batch_size - self.prompts_per_step()
    }

    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("batch_size", self.batch_size, (1..=65_536).contains(&self.batch_size), "1 to 65536")?;
        let fraction = self.on_policy_fraction;
        check("on_policy_fraction", fraction, (0.0..=1.0).contains(&fraction), "0 to 1")?;
        let generations = self.num_generations;
        check("num_generations", generations, (1..=65_536).contains(&generations), "1 to 65536")?;
        let completions = self.prompts_per_step() * generations;
        check("num_generations", generations, completions <= 1 << 20, "at most 1048576 completions in a step")?;
        check("decode_batch_size", self.decode_batch_size, self.decode_batch_size > 0, "at least 1")?;
        let mixed = self.teacher_mix;
        check("teacher_mix", mixed, (0.0..1.0).contains(&mixed), "at least 0 and below 1")?;
        let single = mixed == 0.0 || (self.teachers.len() == 1 && !self.sampling.is_greedy());
        check("teacher_mix", mixed, single, "0 with several teachers, or without a sampling temperature")?;
        self.sampling.validate().map_err(|error| OptionError::new("sampling", error.to_string()))?;
        self.objective.validate().map_err(|error| OptionError::new("objective", error.to_string()))?;
        let own = self.objective.estimate == Estimate::Full || self.examples_per_step() == 0;
        check("objective.estimate", "sampled", own, "full, as not all completions are the student's own samples")?;
        let likelihood = self.objective.nll_weight;
        let read = likelihood == 0.0 || self.examples_per_step() > 0;
        check(
            "objective.nll_weight",
            likelihood,
            read,
            "0, as the student samples for every row (on_policy_fraction)",
        )?;
        check("teachers", "none", !self.teachers.is_empty(), "at least one model to learn from")?;
        let two = self.objective.extrapolation.is_none() || self.teachers.len() == 2;
        let expected = "2, towards the first and away from the second, with objective.extrapolation";
        check("teachers", self.teachers.len(), two, expected)?;
        let weights: Vec<f64> = self.teachers.iter().map(|teacher| teacher.weight).collect();
        self.objective.shares(&weights).map_err(|error| OptionError::new("teachers", error.to_string()))?;
        self.training.validate().map_err(|error| error.within("training"))
    }
}

/// What a student learns on.
pub struct Lessons {
    /// Prompts it answers itself.
    pub prompts: Vec<Prompt>,
    /// Rows that come with completions.
    pub examples: Vec<Example>,
    /// What judges its answers, for the metrics alone.
    pub reward: Option<Box<dyn Reward>>,
}

/// Distillation from models that are held in memory.
pub struct Distillation {
    options: DistillationOptions,
    /// One for each of the options' teachers.
    teachers: Vec<Decoder>,
    shares: Vec<f64>,
    lessons: Lessons,
}

impl Distillation {
    /// Learning from these teachers, in the order of the options.
    ///
    /// # Errors
    /// Options that mean nothing; another number of teachers than they name.
    pub fn new(options: DistillationOptions, teachers: Vec<Decoder>, lessons: Lessons) -> Result<Self> {
        let within = |error: OptionError| error.within("distillation");
        options.validate().map_err(within)?;
        let (given, named) = (teachers.len(), options.teachers.len());
        check("teachers", given, given == named, "one model for each that is named").map_err(within)?;
        let weights: Vec<f64> = options.teachers.iter().map(|teacher| teacher.weight).collect();
        let shares = options.objective.shares(&weights);
        let shares = shares.map_err(|error| within(OptionError::new("teachers", error.to_string())))?;
        Ok(Self { options, teachers, shares, lessons })
    }
}

impl Method for Distillation {
    fn name(&self) -> &str {
        &self.options.method
    }

    fn training(&self) -> &TrainingOptions {
        &self.options.training
    }

    fn rows(&self) -> usize {
        match (self.options.prompts_per_step(), self.options.examples_per_step()) {
            (0, _) => self.lessons.examples.len(),
            (_, 0) => self.lessons.prompts.len(),
            (_, _) => self.lessons.prompts.len().min(self.lessons.examples.len()),
        }
    }

    fn rows_per_step(&self) -> usize {
        self.options.prompts_per_step().max(self.options.examples_per_step())
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        self.prepare_teachers(step)?;
        let groups = self.sample(step)?;
        let scores: Vec<Option<Score>> = match &self.lessons.reward {
            Some(reward) => groups.score(step, &**reward)?,
            None => vec![None; groups.episodes.len()],
        };
        let mut metrics = match (groups.episodes.is_empty(), &self.lessons.reward) {
            (true, _) => Metrics::new(),
            (false, None) => groups.sampling_metrics(),
            (false, Some(_)) => groups.metrics(&scores),
        };

        let drawn = self.importance(&groups.episodes);
        let mut units = groups.units();
        units.extend(self.examples(step).into_iter().map(Unit::of));
        let batch = Batch::new(units);
        let started = Instant::now();
        step.decoder.prepare_for_training(step.precision);
        step.spent(Phase::Train, started);
        let mut folds = Folds::default();
        let losses = match self.options.objective.estimate {
            Estimate::Full => self.full(step, &batch, &groups, &drawn, &mut folds)?,
            Estimate::Sampled => self.sampled(step, &batch, &groups, &drawn, &mut folds)?,
        };
        check_losses(step.number, &losses, batch.lengths())?;
        let grad_norm = step.update()?;
        metrics.set("loss", losses.iter().sum());
        metrics.set("grad_norm", grad_norm);
        folds.record(&mut metrics);
        let episodes = (!groups.prompts.is_empty()).then(|| groups.table(step.number, &scores, &[]));
        Ok(Report { metrics, tokens: batch.all_tokens(), episodes })
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.lessons.reward.as_ref().map_or(Ok(()), |reward| carried::save_reward(folder, &**reward))
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        self.lessons.reward.as_ref().map_or(Ok(()), |reward| carried::load_reward(folder, &**reward))
    }
}

impl Distillation {
    /// Packs the teachers' weights, the first time, and checks that they speak of the same tokens.
    fn prepare_teachers(&mut self, step: &mut Step<'_>) -> Result<()> {
        let started = Instant::now();
        let student = step.decoder.config().vocab_size;
        for (teacher, options) in self.teachers.iter_mut().zip(&self.options.teachers) {
            let vocabulary = teacher.config().vocab_size;
            if vocabulary != student {
                return Err(Error::Vocabulary { teacher: options.model.clone(), vocabulary, student });
            }
            teacher.prepare(step.precision);
        }
        step.spent(Phase::Reference, started);
        Ok(())
    }

    /// The student's answers to its prompts of the step.
    fn sample<'p>(&'p self, step: &mut Step<'_>) -> Result<Groups<'p>> {
        let prompts = &self.lessons.prompts;
        let size = self.options.num_generations;
        let chosen: Vec<&Prompt> = match self.options.prompts_per_step() {
            0 => {
                let (episodes, prompt_tokens) = (Vec::new(), PromptTokens::default());
                return Ok(Groups { prompts: Vec::new(), size, episodes, prompt_tokens, recorded: 0, traces: None });
            }
            count => {
                let rows = Order::new(prompts.len(), step.seed, step.stage).batch(step.index, count);
                rows.into_iter().map(|row| &prompts[row]).collect()
            }
        };
        let rollouts = Rollouts {
            sampling: &self.options.sampling,
            num_generations: size,
            decode_batch_size: self.options.decode_batch_size,
            weights: WeightFormat::Full,
            record: match self.options.objective.estimate {
                // It learns from whole distributions of several models, row by row.
                Estimate::Full => Record::default(),
                Estimate::Sampled => Record { groups: usize::MAX, rows: self.options.training.micro_batch_tokens },
            },
        };
        let (random, share) = (step.random(Purpose::Sampling), self.options.teacher_mix);
        let mixture = (self.teachers.first().filter(|_| share > 0.0))
            .map(|teacher| Mixture::new(&[(teacher, share)], Mean::Arithmetic, &self.options.sampling));
        rollouts.sample_with(mixture.as_ref().map(|mixture| mixture as &dyn LogitsHook), step, random, &chosen)
    }

    /// The rows of the step that come with completions.
    fn examples(&self, step: &Step<'_>) -> Vec<&Example> {
        let examples = &self.lessons.examples;
        match self.options.examples_per_step() {
            0 => Vec::new(),
            count => {
                // Beside prompts they are the second set: the two may be the same rows.
                let set = usize::from(self.options.prompts_per_step() > 0);
                let rows = Order::of_set(examples.len(), step.seed, step.stage, set).batch(step.index, count);
                rows.into_iter().map(|row| &examples[row]).collect()
            }
        }
    }

    fn row_pass<'a>(&self, others: &'a [Other<'a>]) -> RowPass<'a> {
        RowPass { micro_batch_tokens: self.options.training.micro_batch_tokens, others, noise: None }
    }

    /// The weight of every loss token.
    fn weights(&self, batch: &Batch<'_>) -> Vec<f64> {
        let counts = GlobalCounts::of(batch.lengths(), self.options.sampling.max_new_tokens);
        self.options.objective.aggregation.weights(batch.lengths(), &counts)
    }

    /// How much more probable the tokens of these episodes are to the student than to the mixture they were drawn from; empty
    /// where the student drew them.
    fn importance(&self, episodes: &[Episode]) -> Vec<f64> {
        if self.options.teacher_mix == 0.0 {
            return Vec::new();
        }
        let of = |episode: &Episode| {
            let both = episode.of_sampled(&episode.log_probs).zip(episode.of_sampled(&episode.filtered_log_probs));
            both.map(|(p, m)| (f64::from(p) - f64::from(m)).exp()).collect::<Vec<f64>>()
        };
        episodes.iter().flat_map(of).collect()
    }

    /// What the student gave the tokens that it sampled, where sampling has recorded it as training would compute it.
    fn recorded_log_probs(&self, step: &Step<'_>, groups: &Groups<'_>) -> Option<Vec<f32>> {
        let same = self.reading().temperature == self.options.sampling.log_prob_temperature();
        (same && step.decoder.one_forward(WeightFormat::Full))
            .then(|| groups.episodes.iter().flat_map(|episode| episode.of_sampled(&episode.log_probs)).collect())
    }

    /// The gradients with every position's divergence over the whole vocabulary. The first units are the student's own groups,
    /// whose tokens have the importance weights `drawn`, if not all of them are 1.
    fn full(
        &self,
        step: &mut Step<'_>,
        batch: &Batch<'_>,
        groups: &Groups<'_>,
        drawn: &[f64],
        folds: &mut Folds,
    ) -> Result<Vec<f64>> {
        let objective = &self.options.objective;
        let mut weights = self.weights(batch);
        let mut coefficients = match objective.discount > 0.0 {
            true => self.returns(step, batch, groups)?.1,
            false => vec![0.0; batch.tokens_of(&(0..groups.prompts.len())).len()],
        };
        objective.weigh(&mut weights, &mut coefficients, drawn);
        folds.extend(&ratio_statistics(drawn));
        let sampled = coefficients.len();
        coefficients.resize(batch.loss_tokens(), objective.nll_weight);
        let others: Vec<Other<'_>> = self.teachers.iter().map(Other::Model).collect();
        let found = rows::gradients(step, batch, 0..batch.units(), self.row_pass(&others), |row| {
            let weight = weights[row.index];
            if objective.extrapolation.is_some() {
                return objective.extrapolated_row(row.logits, &row.others, weight);
            }
            let targets = objective.targets(&row.others, &self.shares)?;
            let coefficient = weight * coefficients[row.index];
            let temperature = if row.index < sampled { objective.temperature } else { 1.0 };
            let term = TokenTerm { token: row.token, coefficient, temperature };
            objective.row(row.logits, &targets, weight, (coefficient != 0.0).then_some(term))
        })?;
        folds.extend(&statistics(&found));
        Ok(found.iter().map(|row| row.loss).collect())
    }

    /// The gradients with every position's divergence from the sampled token alone.
    fn sampled(
        &self,
        step: &mut Step<'_>,
        batch: &Batch<'_>,
        groups: &Groups<'_>,
        drawn: &[f64],
        folds: &mut Folds,
    ) -> Result<Vec<f64>> {
        let all = 0..batch.units();
        let (log_probs, mut returns) = self.returns(step, batch, groups)?;
        let mut weights = self.weights(batch);
        self.options.objective.weigh(&mut weights, &mut returns, drawn);
        folds.extend(&ratio_statistics(drawn));
        let factors: Vec<f64> = weights.iter().zip(returns).map(|(weight, value)| weight * value).collect();
        let known = Known::LogProbs(&log_probs.student);
        let reading = Reading { recorded: groups.recorded, ..self.reading() };
        let mut losses = Vec::new();
        update::gradients(step, batch, all, reading, (Scope::Piece, known), folds, |piece| {
            let batch = SftBatch {
                log_probs: piece.log_probs.clone(),
                weights: piece.of_tokens(&factors)?,
                entropy: None,
                correct: None,
            };
            let loss = objectives::sft(&batch)?;
            losses.extend(loss.values()?);
            Ok(loss)
        })?;
        let gaps = log_probs.student.iter().zip(&log_probs.teachers).map(|(p, q)| f64::from(*p) - q).collect();
        folds.extend(&[Statistic { name: "divergence", values: gaps, reduce: Reduce::Mean }]);
        Ok(losses)
    }

    fn reading(&self) -> Reading {
        Reading {
            temperature: self.options.objective.temperature as f32,
            ..Reading::plain(self.options.training.micro_batch_tokens)
        }
    }

    /// The log-probabilities of the tokens that the student sampled, in the first units, and what each of them answers for.
    fn returns(
        &self,
        step: &mut Step<'_>,
        batch: &Batch<'_>,
        groups: &Groups<'_>,
    ) -> Result<(SampledLogProbs, Vec<f64>)> {
        let units = 0..groups.prompts.len();
        let objective = &self.options.objective;
        let others: Vec<Other<'_>> = self.teachers.iter().map(Other::Model).collect();
        let teachers = rows::read(step, batch, units.clone(), self.row_pass(&others), |token, logits| {
            let targets = objective.targets(logits, &self.shares)?;
            Ok(targets.iter().map(|(share, q)| share * q.log_probs()[token as usize]).sum::<f64>())
        })?;
        let student = match self.recorded_log_probs(step, groups) {
            Some(recorded) => recorded,
            None => {
                let started = Instant::now();
                let found = batch.log_probs(step.decoder, step.workspace, units.clone(), self.reading());
                step.spent(Phase::Train, started);
                found.map_err(step.model_error())?.log_prob
            }
        };
        let rewards: Vec<f64> = teachers.iter().zip(&student).map(|(q, p)| q - f64::from(*p)).collect();
        let lengths = &batch.lengths()[batch.sequences_of(&units)];
        let returns = objective.returns(&rewards, lengths).map_err(step.objective_error())?;
        Ok((SampledLogProbs { student, teachers }, returns))
    }
}

/// The metrics of importance weights, where there are any.
fn ratio_statistics(drawn: &[f64]) -> Vec<Statistic> {
    let of = |(name, reduce)| Statistic { name, values: drawn.to_vec(), reduce };
    let kinds = [
        ("sampling/importance_sampling_ratio/min", Reduce::Min),
        ("sampling/importance_sampling_ratio/mean", Reduce::Mean),
        ("sampling/importance_sampling_ratio/max", Reduce::Max),
    ];
    kinds.into_iter().filter(|_| !drawn.is_empty()).map(of).collect()
}

/// Log-probabilities of tokens that the student sampled.
struct SampledLogProbs {
    student: Vec<f32>,
    /// With several targets, the mean over them.
    teachers: Vec<f64>,
}
