//! Density ratios of prompts: bad completions count by how much their prompts look like those of good ones
//! ([`mod@objectives::density_ratio`]).
//!
//! The embedding of a prompt is the mean of the hidden states of its tokens in the model the stage started from, shifted to mean
//! 0 and scaled to norm 1. TRL asks another model, which the user brings. The classifier is fitted before the first step, on at
//! most `prompt_sample_size` prompts of each kind; a run that is resumed fits the same one again.

use std::time::Instant;

use base::{Purpose, Random};
use data::LabelledExample;
use model::decoder::{Decoder, PackedTokens, Workspace};
use objectives::LogisticRegression;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::method::Step;
use crate::options::{OptionError, check};
use crate::order::split;
use crate::timing::Phase;

/// How bad completions are weighed by their prompts. Names are TRL's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DensityRatioOptions {
    /// Prompts of each kind that the classifier of prompts is fitted on, at most.
    #[schemars(range(min = 1))]
    pub prompt_sample_size: usize,
    /// The least weight of a bad completion.
    #[schemars(range(min = 0.0))]
    pub min_density_ratio: f64,
    /// The largest.
    #[schemars(range(min = 0.0))]
    pub max_density_ratio: f64,
}

impl Default for DensityRatioOptions {
    fn default() -> Self {
        Self { prompt_sample_size: 1024, min_density_ratio: 0.5, max_density_ratio: 10.0 }
    }
}

impl DensityRatioOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> std::result::Result<(), OptionError> {
        check("prompt_sample_size", self.prompt_sample_size, self.prompt_sample_size > 0, "at least 1")?;
        let (least, most) = (self.min_density_ratio, self.max_density_ratio);
        check("min_density_ratio", least, least.is_finite() && least >= 0.0, "a number, at least 0")?;
        check("max_density_ratio", most, most.is_finite() && most >= least, "a number, at least min_density_ratio")
    }
}

/// The weights of the rows of a stage.
pub struct DensityRatios {
    options: DensityRatioOptions,
    classifier: Option<LogisticRegression>,
    /// Of each row, once it has come.
    known: Vec<Option<f64>>,
    micro_batch_tokens: usize,
}

impl DensityRatios {
    /// Of so many rows, none of which is known yet.
    pub fn new(options: DensityRatioOptions, rows: usize, micro_batch_tokens: usize) -> Self {
        Self { options, classifier: None, known: vec![None; rows], micro_batch_tokens }
    }

    /// The weights of these rows: 1 of good completions, the density ratio of bad ones. The policy must be prepared.
    ///
    /// # Errors
    /// Those of the forward pass.
    pub fn of(&mut self, step: &mut Step<'_>, all: &[LabelledExample], rows: &[usize]) -> Result<Vec<f64>> {
        let started = Instant::now();
        step.decoder.set_adapter(false);
        let found = self.ask(step, all, rows);
        step.decoder.set_adapter(true);
        step.spent(Phase::Reference, started);
        found
    }

    fn ask(&mut self, step: &mut Step<'_>, all: &[LabelledExample], rows: &[usize]) -> Result<Vec<f64>> {
        let reference = step.reference.unwrap_or(step.decoder);
        let random = Random::new(step.seed, Purpose::Prompts).prompt(step.stage as u32);
        let error = step.model_error();
        let mut embedded =
            |rows: &[usize]| embeddings(reference, step.workspace, all, rows, self.micro_batch_tokens).map_err(&error);
        let classifier = match self.classifier.take() {
            Some(classifier) => classifier,
            None => {
                let order = random.permutation(all.len());
                let of = |label: bool| order.iter().copied().filter(move |&row| all[row].label == label);
                let size = self.options.prompt_sample_size;
                let sample: Vec<usize> = of(true).take(size).chain(of(false).take(size)).collect();
                let labels: Vec<bool> = sample.iter().map(|&row| all[row].label).collect();
                LogisticRegression::fit(&embedded(&sample)?, &labels)
            }
        };
        let unknown: Vec<usize> =
            rows.iter().copied().filter(|&row| !all[row].label && self.known[row].is_none()).collect();
        for (row, embedding) in unknown.iter().zip(embedded(&unknown)?) {
            let (least, most) = (self.options.min_density_ratio, self.options.max_density_ratio);
            self.known[*row] = Some(classifier.odds(&embedding).clamp(least, most));
        }
        self.classifier = Some(classifier);
        Ok(rows.iter().map(|&row| self.known[row].unwrap_or(1.0)).collect())
    }
}

/// The embeddings of the prompts of these rows.
fn embeddings(
    decoder: &Decoder,
    workspace: &mut Workspace,
    all: &[LabelledExample],
    rows: &[usize],
    micro_batch_tokens: usize,
) -> model::Result<Vec<Vec<f64>>> {
    let prompt = |row: &usize| {
        let example = &all[*row].example;
        &example.ids[..example.given()]
    };
    let prompts: Vec<&[u32]> = rows.iter().map(prompt).collect();
    let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.len()).collect();
    let width = decoder.config().hidden_size;
    let mut found = Vec::with_capacity(rows.len());
    for piece in split(&lengths, micro_batch_tokens) {
        let mut tokens = PackedTokens::new();
        for prompt in &prompts[piece] {
            tokens.push(prompt, None)?;
        }
        decoder.forward(&tokens, workspace, false)?;
        for segment in tokens.segments() {
            let mut sum = vec![0.0; width];
            for row in segment.start..segment.start + segment.len {
                let hidden = &workspace.hidden()[row * width..][..width];
                sum.iter_mut().zip(hidden).for_each(|(sum, &value)| *sum += f64::from(value));
            }
            found.push(direction(sum));
        }
    }
    Ok(found)
}

/// The vector shifted to mean 0 and scaled to norm 1.
fn direction(mut vector: Vec<f64>) -> Vec<f64> {
    let mean = vector.iter().sum::<f64>() / vector.len() as f64;
    vector.iter_mut().for_each(|value| *value -= mean);
    let norm = vector.iter().map(|value| value * value).sum::<f64>().sqrt();
    if norm > 0.0 {
        vector.iter_mut().for_each(|value| *value /= norm);
    }
    vector
}
