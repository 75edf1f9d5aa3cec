//! Rejection sampling: a model answers, judges keep the good answers, and the model learns them by heart.
//!
//! ```text
//! for each prompt q of a step:   y_1..y_N ~ sampler(. | q)        r_i = score(q, y_i)
//!                                kept: those with r_i >= threshold (`correct`), or the best (`best`)
//! L = - (1 / T) Σ_{kept} Σ_t log π(y_t)                           one optimiser update
//! ```
//!
//! With the sampler `reference` the answers are those of the model the stage started from, as in RFT (arXiv 2308.01825) and in the distillation of
//! best-of-N; with `policy` they are the current model's, as in STaR (arXiv 2203.14465) and RAFT (arXiv 2304.06767). The loss is
//! that of supervised fine-tuning, with all its forms ([`mod@objectives::sft`]).
//!
//! **Rationalisation** (STaR): prompts without an answer that is kept are tried again with the answer as a hint behind the question.
//! What is kept then is learnt as an answer to the prompt without the hint. Metrics and `episodes/` are those of the first try.
//!
//! Deviations:
//! 1. Sampling and learning alternate step by step, not in rounds over the whole data set; with the sampler `reference` it makes
//!    no difference to what is learnt from.
//! 2. Training goes on from the current weights, where STaR begins again from the first model in every round.
//! 3. STaR's rationalisation needs a hint that says how the answer is told (`rationalization_hint`); without it there is none.
//! 4. A step that keeps nothing moves nothing: its loss and norm are absent.
//!
//! Metrics, beside those of [`crate::rollouts`]:
//! - `rejection/kept_ratio`: share of completions that are learnt. `rejection/prompts_ratio`: share of prompts with any.
//! - `rejection/rationalized_ratio`, with a hint: share of prompts with an answer from the second try alone.
//! - `loss`, `grad_norm`, `entropy`, `mean_token_accuracy`: as in supervised fine-tuning.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use base::Purpose;
use data::Prompt;
use envs::{Reward, Score};
use model::decoder::WeightFormat;
use rollout::{Finish, SamplingOptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use super::sft::supervised;
use crate::carried;
use crate::error::Result;
use crate::method::{Method, Report, Step};
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::Order;
use crate::pass::{Sequence, Unit};
use crate::rollouts::{Groups, Record, Rollouts, values};
use crate::update::Batch;

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "rft",
        title: "rejection-sampling fine-tuning",
        paper: "Yuan et al. 2023, arXiv 2308.01825",
        formula: "L = - (1/T) Σ log π(y_t) over the distinct correct answers of the first model",
        settings: "sampler = \"reference\"\nkeep = \"correct\"\ndistinct = true",
    },
    Preset {
        name: "star",
        title: "self-taught reasoner",
        paper: "Zelikman et al. 2022, arXiv 2203.14465",
        formula: "L = - (1/T) Σ log π(y_t) over the correct answers of the current model",
        settings: "sampler = \"policy\"\nkeep = \"correct\"",
    },
    Preset {
        name: "raft",
        title: "reward-ranked fine-tuning",
        paper: "Dong et al. 2023, arXiv 2304.06767",
        formula: "L = - (1/T) Σ log π(y_t) over the best answer of the current model to each prompt",
        settings: "sampler = \"policy\"\nkeep = \"best\"\nmax_kept = 1",
    },
    Preset {
        name: "best_of_n_distillation",
        title: "distillation of best-of-N sampling",
        paper: "Stiennon et al. 2020, arXiv 2009.01325; Sessa et al. 2024, arXiv 2407.14622",
        formula: "L = - (1/T) Σ log π(y_t) over the best of N answers of the first model to each prompt",
        settings: "sampler = \"reference\"\nkeep = \"best\"\nmax_kept = 1",
    },
];

/// Who answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// The model as it is now.
    Policy,
    /// The model the stage started from.
    #[default]
    Reference,
}

/// Which answers are learnt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// Those with a reward of at least `threshold`, in the order they were sampled.
    #[default]
    Correct,
    /// Those with the highest rewards, whatever these are; the earlier of equals.
    Best,
}

/// Options of rejection sampling.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RejectionOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// Prompts of one step.
    #[schemars(range(min = 1, max = 65_536))]
    pub prompts_per_step: usize,
    /// Completions sampled for each prompt.
    #[schemars(range(min = 1, max = 65_536))]
    pub num_generations: usize,
    /// Who answers: `policy`, the model as it is now, or `reference`, the model the stage started from.
    pub sampler: Sampler,
    /// Which answers are learnt: `correct` ones, or the `best`.
    pub keep: Keep,
    /// With `keep = "correct"`: the least reward of an answer that is kept.
    pub threshold: f64,
    /// The most answers kept for a prompt; 0 is no limit.
    pub max_kept: usize,
    /// Of answers with the same tokens keep the first.
    pub distinct: bool,
    /// Never keep an answer that ran out of tokens.
    pub drop_truncated: bool,
    /// What a prompt ends with when it is tried again because no answer was kept; `{answer}` is the value of the column `answer`,
    /// and so with other columns. There is no second try without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rationalization_hint: Option<String>,
    /// The loss on what is kept.
    pub objective: objectives::SftObjective,
    /// How completions are sampled.
    pub sampling: SamplingOptions,
    /// Sequences decoded at once. Results do not depend on it.
    #[schemars(range(min = 1))]
    pub decode_batch_size: usize,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

impl Default for RejectionOptions {
    fn default() -> Self {
        Self {
            method: "rft".into(),
            prompts_per_step: 8,
            num_generations: 8,
            sampler: Sampler::default(),
            keep: Keep::default(),
            threshold: 1.0,
            max_kept: 0,
            distinct: false,
            drop_truncated: true,
            rationalization_hint: None,
            objective: objectives::SftObjective::default(),
            sampling: SamplingOptions::default(),
            decode_batch_size: 32,
            training: TrainingOptions::default(),
        }
    }
}

impl RejectionOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("prompts_per_step", self.prompts_per_step, (1..=65_536).contains(&self.prompts_per_step), "1 to 65536")?;
        let generations = self.num_generations;
        check("num_generations", generations, (1..=65_536).contains(&generations), "1 to 65536")?;
        let completions = self.prompts_per_step * generations;
        check("prompts_per_step", completions, completions <= 1 << 20, "at most 1048576 completions in a step")?;
        check("threshold", self.threshold, self.threshold.is_finite(), "a number")?;
        check("decode_batch_size", self.decode_batch_size, self.decode_batch_size > 0, "at least 1")?;
        self.sampling.validate().map_err(|error| OptionError::new("sampling", error.to_string()))?;
        self.objective.validate().map_err(|error| OptionError::new("objective", error.to_string()))?;
        self.training.validate().map_err(|error| error.within("training"))
    }

    /// Which of a group's answers are learnt, best or first first.
    fn kept(&self, answers: &[Answered<'_>]) -> Vec<usize> {
        let eligible = |&index: &usize| {
            let answer = &answers[index];
            let enough = match self.keep {
                Keep::Correct => answer.reward.is_some_and(|reward| reward >= self.threshold),
                Keep::Best => answer.reward.is_some(),
            };
            enough && !(self.drop_truncated && answer.truncated) && !answer.completion.is_empty()
        };
        let mut kept: Vec<usize> = (0..answers.len()).filter(eligible).collect();
        if self.keep == Keep::Best {
            let reward = |index: usize| answers[index].reward.unwrap_or(f64::NEG_INFINITY);
            kept.sort_by(|&a, &b| reward(b).total_cmp(&reward(a)));
        }
        if self.distinct {
            let mut seen = HashSet::new();
            kept.retain(|&index| seen.insert(answers[index].completion));
        }
        if self.max_kept > 0 {
            kept.truncate(self.max_kept);
        }
        kept
    }
}

/// What decides whether an answer is kept.
struct Answered<'a> {
    completion: &'a [u32],
    reward: Option<f64>,
    truncated: bool,
}

/// Rejection sampling on a list of prompts.
pub struct Rejection {
    options: RejectionOptions,
    prompts: Vec<Prompt>,
    /// The prompts with a hint, by number.
    hints: HashMap<u32, Prompt>,
    reward: Box<dyn Reward>,
}

impl Rejection {
    /// Learning the answers to these prompts that this reward lets pass.
    ///
    /// # Errors
    /// Options that mean nothing.
    pub fn new(options: RejectionOptions, prompts: Vec<Prompt>, reward: Box<dyn Reward>) -> Result<Self> {
        options.validate().map_err(|error| error.within("rejection"))?;
        Ok(Self { options, prompts, hints: HashMap::new(), reward })
    }

    /// Trying again with these prompts, which are the others with a hint at the end, where no answer is kept.
    #[must_use]
    pub fn with_hints(mut self, hints: Vec<Prompt>) -> Self {
        self.hints = hints.into_iter().map(|prompt| (prompt.id, prompt)).collect();
        self
    }
}

impl Method for Rejection {
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
        self.options.sampler == Sampler::Reference
    }

    fn save(&self, folder: &Path) -> Result<()> {
        carried::save_reward(folder, &*self.reward)
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        carried::load_reward(folder, &*self.reward)
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        let options = &self.options;
        let order = Order::new(self.prompts.len(), step.seed, step.stage).batch(step.index, options.prompts_per_step);
        let prompts: Vec<&Prompt> = order.iter().map(|&row| &self.prompts[row]).collect();
        let groups = self.sample(step, Purpose::Sampling, &prompts)?;
        let scores = groups.score(step, &*self.reward)?;
        let mut metrics = groups.metrics(&scores);

        let kept = self.kept(&groups, &scores);
        let failed: Vec<&Prompt> =
            kept.iter().zip(&prompts).filter(|(kept, _)| kept.is_empty()).map(|(_, prompt)| *prompt).collect();
        let (told, hinted): (Vec<&Prompt>, Vec<&Prompt>) =
            failed.into_iter().filter_map(|prompt| Some((prompt, self.hints.get(&prompt.id)?))).unzip();
        let second = match hinted.is_empty() {
            true => Groups::default(),
            false => self.sample(step, Purpose::Hints, &hinted)?,
        };
        let reasons = match hinted.is_empty() {
            true => Vec::new(),
            false => self.kept(&second, &second.score(step, &*self.reward)?),
        };
        // What was found with a hint is learnt without it.
        let units = learnt_units(&groups, &kept, &prompts).chain(learnt_units(&second, &reasons, &told));
        let batch = Batch::new(units.collect());
        let rationalized = reasons.iter().filter(|kept| !kept.is_empty()).count();
        let learnt = |episode: usize| f64::from(u8::from(kept[episode / groups.size].contains(&episode)));
        let learnt: Vec<f64> = (0..groups.episodes.len()).map(learnt).collect();
        metrics.set("rejection/kept_ratio", learnt.iter().sum::<f64>() / learnt.len() as f64);
        metrics.set("rejection/prompts_ratio", batch.units() as f64 / groups.prompts.len() as f64);
        if options.rationalization_hint.is_some() {
            metrics.set("rejection/rationalized_ratio", rationalized as f64 / groups.prompts.len() as f64);
        }
        if batch.loss_tokens() > 0 {
            let micro_batch_tokens = options.training.micro_batch_tokens;
            metrics.extend(supervised(step, &batch, &options.objective, None, micro_batch_tokens)?);
        }
        let episodes = Some(groups.table(step.number, &scores, &[("kept", &learnt)]));
        Ok(Report { metrics, tokens: batch.all_tokens(), episodes })
    }
}

impl Rejection {
    fn sample<'p>(&self, step: &mut Step<'_>, purpose: Purpose, prompts: &[&'p Prompt]) -> Result<Groups<'p>> {
        let rollouts = Rollouts {
            sampling: &self.options.sampling,
            num_generations: self.options.num_generations,
            decode_batch_size: self.options.decode_batch_size,
            weights: WeightFormat::Full,
            record: Record::default(),
        };
        let random = step.random(purpose);
        match (self.options.sampler, step.reference) {
            (Sampler::Policy, _) => rollouts.sample(step, random, prompts),
            (Sampler::Reference, Some(reference)) => rollouts.sample_from(reference, step, random, prompts),
            (Sampler::Reference, None) => {
                step.decoder.set_adapter(false);
                let groups = rollouts.sample(step, random, prompts);
                step.decoder.set_adapter(true);
                groups
            }
        }
    }

    /// The episodes of each group that are learnt.
    fn kept(&self, groups: &Groups<'_>, scores: &[Option<Score>]) -> Vec<Vec<usize>> {
        let answers: Vec<Answered<'_>> = groups
            .episodes
            .iter()
            .zip(values(scores))
            .map(|(episode, reward)| Answered {
                completion: &episode.completion,
                reward,
                truncated: episode.finish == Finish::Length,
            })
            .collect();
        let groups = answers.chunks(groups.size).zip((0..).step_by(groups.size));
        groups.map(|(group, first)| self.options.kept(group).into_iter().map(|index| first + index).collect()).collect()
    }
}

/// The kept episodes of each group, as answers to these prompts; groups without any are left out.
fn learnt_units<'a>(
    groups: &'a Groups<'_>,
    kept: &'a [Vec<usize>],
    prompts: &'a [&'a Prompt],
) -> impl Iterator<Item = Unit<'a>> {
    kept.iter().zip(prompts).filter(|(kept, _)| !kept.is_empty()).map(|(kept, prompt)| Unit {
        prompt: &prompt.ids,
        sequences: kept.iter().map(|&episode| Sequence::of(&groups.episodes[episode])).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_kept_by_reward_number_and_content() {
        let answer =
            |completion: &'static [u32], reward| Answered { completion, reward, truncated: completion.len() > 2 };
        let answers = [
            answer(&[1], Some(0.5)),
            answer(&[2], Some(1.0)),
            answer(&[2], Some(1.0)),
            answer(&[3, 4], Some(2.0)),
            answer(&[3, 4, 5], Some(9.0)),
            answer(&[6], None),
            answer(&[], Some(9.0)),
        ];
        let default = RejectionOptions::default;
        assert_eq!(default().kept(&answers), [1, 2, 3]);
        assert_eq!(RejectionOptions { distinct: true, ..default() }.kept(&answers), [1, 3]);
        assert_eq!(RejectionOptions { max_kept: 1, ..default() }.kept(&answers), [1]);
        assert_eq!(
            RejectionOptions { threshold: 0.0, drop_truncated: false, ..default() }.kept(&answers),
            [0, 1, 2, 3, 4]
        );
        assert_eq!(RejectionOptions { keep: Keep::Best, ..default() }.kept(&answers), [3, 1, 2, 0]);
        assert_eq!(RejectionOptions { keep: Keep::Best, max_kept: 1, ..default() }.kept(&answers), [3]);
        assert!(RejectionOptions { threshold: 10.0, ..default() }.kept(&answers).is_empty());
    }
}
