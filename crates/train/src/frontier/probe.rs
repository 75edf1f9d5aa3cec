//! What a candidate is worth: its answers to some prompts, judged by every objective.

use base::{Hint, Purpose, Random};
use data::Prompt;
use envs::{Answer, Reward, RewardError};
use eval::metrics::{mean, standard_deviation};
use kernels::Precision;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use rollout::{Episode, Generator, Request, SamplingOptions, scoring};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Look, Objective, Scores};
use crate::options::{OptionError, check};

/// How candidates are measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ProbeOptions {
    /// Answers to each prompt.
    #[schemars(range(min = 1))]
    pub samples: u32,
    /// How they are sampled.
    pub sampling: SamplingOptions,
    /// Sequences decoded at once. Results do not depend on it.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
}

impl Default for ProbeOptions {
    fn default() -> Self {
        Self { samples: 1, sampling: SamplingOptions::default(), batch_size: 32 }
    }
}

impl ProbeOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("samples", self.samples, self.samples > 0, "at least 1")?;
        check("batch_size", self.batch_size, self.batch_size > 0, "at least 1")?;
        self.sampling.validate().map_err(|error| OptionError::new("sampling", error.to_string()))?;
        let drawn = !self.sampling.is_greedy();
        check("sampling.temperature", self.sampling.temperature, drawn, "a number above 0: answers need to differ")
    }
}

/// Why a candidate could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The model refused.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// It could not answer.
    #[error(transparent)]
    Rollout(#[from] rollout::Error),
    /// Its answers could not be judged.
    #[error(transparent)]
    Reward(#[from] RewardError),
    /// An objective says nothing about any answer.
    #[error("the objective {0} applies to none of the answers")]
    Silent(String),
}

impl Hint for ProbeError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Model(error) => error.hint(),
            Self::Rollout(error) => error.hint(),
            Self::Reward(error) => error.hint(),
            Self::Silent(_) => Some("choose prompts whose rows have what the reward reads".into()),
        }
    }
}

/// Prompts and judges, and what the model before training reaches with them.
pub struct Probe<'a> {
    tokenizer: &'a Tokenizer,
    prompts: &'a [Prompt],
    objectives: &'a [&'a dyn Reward],
    options: &'a ProbeOptions,
    precision: Precision,
    seed: u64,
    base: Decoder,
    /// The answers of the model before training, and how they were judged.
    before: Measured,
}

/// Answers, and what each objective says about every one of them.
pub struct Measured {
    /// The answers: those to the first prompt, those to the second, and so on.
    pub episodes: Vec<Episode>,
    /// For each objective, the value of every answer; none where it does not apply.
    pub values: Vec<Vec<Option<f64>>>,
}

impl Measured {
    /// The values of an objective, of the answers that it applies to.
    pub fn of(&self, objective: usize) -> Vec<f64> {
        self.values[objective].iter().flatten().copied().collect()
    }
}

/// How many of an answer's tokens were sampled.
fn tokens(episode: &Episode) -> f64 {
    episode.loss_mask.iter().filter(|sampled| **sampled).count() as f64
}

/// The log-probability of an answer under the model that gave it.
fn log_prob(episode: &Episode) -> f64 {
    episode.of_sampled(&episode.log_probs).map(f64::from).sum()
}

impl<'a> Probe<'a> {
    /// Measures `base`, the model before training, once.
    ///
    /// # Errors
    /// Answers that cannot be sampled or judged.
    pub fn new(
        mut base: Decoder,
        tokenizer: &'a Tokenizer,
        prompts: &'a [Prompt],
        objectives: &'a [&'a dyn Reward],
        options: &'a ProbeOptions,
        (precision, seed): (Precision, u64),
    ) -> Result<Self, ProbeError> {
        base.prepare(precision);
        let before = Measured { episodes: Vec::new(), values: Vec::new() };
        let mut probe = Self { tokenizer, prompts, objectives, options, precision, seed, base, before };
        probe.before = probe.measure(&probe.base, Look::whole(0))?;
        for (index, objective) in objectives.iter().enumerate() {
            if probe.before.of(index).is_empty() {
                return Err(ProbeError::Silent(objective.name().to_owned()));
            }
        }
        Ok(probe)
    }

    /// How candidates are measured.
    pub fn options(&self) -> &ProbeOptions {
        self.options
    }

    /// What counts, as the model before training reaches it.
    pub fn objectives(&self) -> Vec<Objective> {
        let objective = |(index, reward): (usize, &&dyn Reward)| {
            let values = self.before.of(index);
            let name = reward.name().to_owned();
            Objective { name, mean: mean(&values), standard_deviation: standard_deviation(&values) }
        };
        self.objectives.iter().enumerate().map(objective).collect()
    }

    /// What a look with this share of all answers asks: fewer answers to every prompt, or one answer to each of some prompts that are spread evenly.
    fn asked(&self, share: f64) -> (Vec<usize>, u32) {
        let (count, samples) = (self.prompts.len(), f64::from(self.options.samples) * share);
        if samples >= 1.0 {
            return ((0..count).collect(), samples.round() as u32);
        }
        let some = ((count as f64 * samples).ceil() as usize).clamp(1, count.max(1));
        ((0..some).map(|place| place * count / some).collect(), 1)
    }

    /// The answers of a model whose weights are prepared, judged. Draws are named by seed, round, prompt, sample and position: within a round all
    /// models have the same luck.
    ///
    /// # Errors
    /// Answers that cannot be sampled or judged.
    pub fn measure(&self, decoder: &Decoder, look: Look) -> Result<Measured, ProbeError> {
        let (prompts, samples) = self.asked(look.share);
        let prompts = || prompts.iter().map(|&place| &self.prompts[place]);
        let requests: Vec<Request> =
            prompts().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, samples)).collect();
        let random = Random::new(self.seed, Purpose::Sampling).step(look.round);
        let generator = Generator::new(&self.options.sampling, self.options.batch_size, random);
        let episodes = generator.generate(decoder, self.tokenizer, &requests, |_| {})?;
        let rows = prompts().flat_map(|prompt| (0..samples).map(move |_| prompt));
        let answers: Vec<Answer<'_>> = rows
            .zip(&episodes)
            .map(|(prompt, episode)| Answer {
                prompt_text: &prompt.text,
                completion: &episode.text,
                completion_ids: &episode.completion,
                columns: &prompt.columns,
            })
            .collect();
        let mut values = Vec::with_capacity(self.objectives.len());
        for (index, objective) in self.objectives.iter().enumerate() {
            let scores = objective.score(&answers)?;
            if scores.len() != answers.len() {
                let (reward, expected, found) = (objective.name().to_owned(), answers.len(), scores.len());
                return Err(RewardError::Count { reward, expected, found }.into());
            }
            let scores: Vec<Option<f64>> = scores.into_iter().map(|score| score.map(|score| score.value)).collect();
            // What a judge has no number for is worth as little as anything.
            let known = self.before.values.get(index).into_iter().flatten().chain(&scores).flatten();
            let least = known.copied().filter(|value| value.is_finite()).fold(f64::INFINITY, f64::min);
            values.push(scores.into_iter().map(|value| value.map(|v| if v.is_finite() { v } else { least })).collect());
        }
        Ok(Measured { episodes, values })
    }

    /// Measures a candidate, which is prepared for it.
    ///
    /// # Errors
    /// Answers that cannot be sampled or judged.
    pub fn scores(&self, candidate: &mut Decoder, look: Look) -> Result<Scores, ProbeError> {
        candidate.prepare(self.precision);
        let measured = self.measure(candidate, look)?;
        let temperature = self.options.sampling.log_prob_temperature();
        let theirs = scoring::log_probs(&self.base, &measured.episodes, temperature)?;
        let ratios: Vec<f64> = measured.episodes.iter().zip(theirs).map(|(own, base)| log_prob(own) - base).collect();
        // As many answers of the model before training.
        let (prompts, samples) = self.asked(look.share);
        let answers = prompts.iter().flat_map(|&prompt| {
            let first = prompt * self.options.samples as usize;
            self.before.episodes[first..].iter().take(samples as usize)
        });
        let answers: Vec<Episode> = answers.cloned().collect();
        let of_candidate: f64 = scoring::log_probs(candidate, &answers, temperature)?.iter().sum();
        let of_base: f64 = answers.iter().map(log_prob).sum();
        Ok(Scores {
            objectives: (0..self.objectives.len()).map(|objective| mean(&measured.of(objective))).collect(),
            divergence: mean(&ratios),
            perplexity_ratio: ((of_base - of_candidate) / answers.iter().map(tokens).sum::<f64>()).exp(),
        })
    }
}
