//! Unlearning: a model forgets the rows of one data set and keeps what it does with those of another.
//!
//! ```text
//! a step:   forget_batch_size rows to forget, retain_batch_size rows to keep
//!           L = λ_f L_forget + λ_r L_retain        one optimiser update
//! ```
//!
//! The losses are those of [`mod@objectives::unlearning`]. Tokens that count in a row are its loss tokens, those of the answer; the
//! reference model is the one the stage started from.
//!
//! Deviations from open-unlearning's trainers:
//! 1. Rows to keep come in an order of their own, not one at random with each row to forget.
//! 2. `kl` is averaged over the loss tokens of the rows to keep, not over whole rows with their prompts.
//!
//! Metrics:
//! - `loss`: the formula above. `grad_norm`: the norm of its gradient before clipping.
//! - `forget/loss`, `retain/loss`: its two terms with their weights.
//! - `forget/log_prob`, `retain/log_prob`: mean log-probability of the loss tokens before the update, in nats. The second is absent
//!   with `retain = "kl"`, where `retain/kl` is the mean divergence.
//! - `forget/entropy`, with `ce_u`: mean entropy of the distribution without the token to forget.

use std::time::Instant;

use data::Example;
use objectives::unlearning::{Forget, ForgetBatch, Retain, forget, unlikely_row};
use objectives::{Aggregation, GlobalCounts, SftBatch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use crate::error::Result;
use crate::method::{Method, Report, Step, check_losses};
use crate::metrics::{Metrics, mean};
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::Order;
use crate::pass::Unit;
use crate::retained::retain;
use crate::rows::{self, RowPass};
use crate::timing::Phase;
use crate::update::{self, Batch, Folds, Known, Reading, Scope};

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "npo",
        title: "negative preference optimisation",
        paper: "Zhang et al. 2024, arXiv 2404.05868",
        formula: "L_forget = - (2/β) mean_i log σ( - β [ log π(y_i) - log π_ref(y_i) ] )",
        settings: "[objective]\nforget = \"npo\"",
    },
    Preset {
        name: "simnpo",
        title: "simple negative preference optimisation",
        paper: "Fan et al. 2024, arXiv 2410.07163",
        formula: "L_forget = - (2/β) mean_i log σ( - β / |y_i| · log π(y_i) - γ )",
        settings: "[objective]\nforget = \"simnpo\"\nbeta = 2.5",
    },
    Preset {
        name: "gradient_ascent",
        title: "gradient ascent",
        paper: "Jang et al. 2023, arXiv 2210.01504",
        formula: "L = Σ_t w_t log π(y_t) over the rows to forget",
        settings: "[objective]\nforget = \"gradient_ascent\"\nretain_weight = 0.0",
    },
    Preset {
        name: "gradient_difference",
        title: "gradient difference",
        paper: "Liu et al. 2022, arXiv 2203.12817",
        formula: "L = Σ_forget w_t log π(y_t) - Σ_retain w_t log π(y_t)",
        settings: "[objective]\nforget = \"gradient_ascent\"",
    },
    Preset {
        name: "ce_u",
        title: "cross-entropy unlearning",
        paper: "Yang 2025, arXiv 2503.01224",
        formula: "L = - Σ_t w_t log(1 - π(y_t)) over the rows to forget, but for the first token of each",
        settings: "[objective]\nforget = \"ce_u\"\nretain_weight = 0.0\nignore_first_tokens = 1",
    },
];

/// Options of unlearning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct UnlearningOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// Rows to forget in one step.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub forget_batch_size: usize,
    /// Rows to keep in one step; unused where `objective.retain_weight` is 0.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub retain_batch_size: usize,
    /// The parts of the loss: what forgets, what keeps, their weights.
    pub objective: objectives::UnlearningOptions,
    /// How long the stage lasts, in epochs of the rows to forget, and how the weights move.
    pub training: TrainingOptions,
}

impl Default for UnlearningOptions {
    fn default() -> Self {
        Self {
            method: "npo".into(),
            forget_batch_size: 16,
            retain_batch_size: 16,
            objective: objectives::UnlearningOptions::default(),
            training: TrainingOptions::default(),
        }
    }
}

impl UnlearningOptions {
    /// Whether rows to keep are needed.
    pub fn retains(&self) -> bool {
        self.objective.retain_weight > 0.0
    }

    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        for (name, size) in
            [("forget_batch_size", self.forget_batch_size), ("retain_batch_size", self.retain_batch_size)]
        {
            check(name, size, (1..=1 << 20).contains(&size), "1 to 1048576")?;
        }
        self.objective.validate().map_err(|error| OptionError::new("objective", error.to_string()))?;
        self.training.validate().map_err(|error| error.within("training"))
    }
}

/// Unlearning of a list of examples.
pub struct Unlearning {
    options: UnlearningOptions,
    forget: Vec<Example>,
    retain: Vec<Example>,
}

impl Unlearning {
    /// Forgets the rows of `forget`, keeps those of `retain`.
    ///
    /// # Errors
    /// Options that mean nothing; rows to keep that are needed and missing.
    pub fn new(options: UnlearningOptions, mut forget: Vec<Example>, retain: Vec<Example>) -> Result<Self> {
        let within = |error: OptionError| error.within("unlearning");
        options.validate().map_err(within)?;
        let enough = !options.retains() || !retain.is_empty();
        let weight = options.objective.retain_weight;
        check("objective.retain_weight", weight, enough, "0, as there are no rows to keep").map_err(within)?;
        let (first, last) = (options.objective.ignore_first_tokens, options.objective.ignore_last_tokens);
        forget.iter_mut().for_each(|example| ignore_ends(&mut example.loss_mask, first, last));
        Ok(Self { options, forget, retain })
    }
}

/// Takes the first and the last loss tokens out of a mask.
fn ignore_ends(mask: &mut [bool], first: usize, last: usize) {
    // The first token of a sequence is predicted by nothing and no loss token, whatever its mask.
    let counted: Vec<usize> = (1..mask.len()).filter(|&index| mask[index]).collect();
    let kept = first.min(counted.len())..counted.len().saturating_sub(last);
    for (place, index) in counted.into_iter().enumerate() {
        mask[index] = kept.contains(&place);
    }
}

impl Method for Unlearning {
    fn name(&self) -> &str {
        &self.options.method
    }

    fn training(&self) -> &TrainingOptions {
        &self.options.training
    }

    fn rows(&self) -> usize {
        self.forget.len()
    }

    fn rows_per_step(&self) -> usize {
        self.options.forget_batch_size
    }

    fn needs_reference(&self) -> bool {
        self.options.objective.needs_reference()
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        let forget = self.batch(step, 0, &self.forget, self.options.forget_batch_size);
        let retain = match self.options.retains() {
            true => Some(self.batch(step, 1, &self.retain, self.options.retain_batch_size)),
            false => None,
        };
        let mut metrics = Metrics::new();
        let started = Instant::now();
        step.decoder.prepare_for_training(step.precision);
        step.spent(Phase::Train, started);
        let lost = match self.options.objective.forget {
            Forget::CeU => self.forget_distributions(step, &forget, &mut metrics)?,
            _ => self.forget_tokens(step, &forget, &mut metrics)?,
        };
        let held = match (&retain, self.options.objective.retain) {
            (None, _) => 0.0,
            (Some(retain), Retain::Nll) => self.retain_tokens(step, retain, &mut metrics)?,
            (Some(retain), Retain::Kl) => self.retain_distributions(step, retain, &mut metrics)?,
        };
        let grad_norm = step.update()?;
        metrics.set("loss", lost + held);
        metrics.set("grad_norm", grad_norm);
        let tokens = forget.all_tokens() + retain.map_or(0, |retain| retain.all_tokens());
        Ok(Report { metrics, tokens, episodes: None })
    }
}

impl Unlearning {
    /// The rows of the step from one of its data sets.
    fn batch<'e>(&self, step: &Step<'_>, set: usize, examples: &'e [Example], size: usize) -> Batch<'e> {
        let rows = Order::of_set(examples.len(), step.seed, step.stage, set).batch(step.index, size);
        Batch::new(rows.iter().map(|&row| Unit::of(&examples[row])).collect())
    }

    fn reading(&self) -> Reading {
        Reading::plain(self.options.training.micro_batch_tokens)
    }

    fn forget_tokens(&self, step: &mut Step<'_>, batch: &Batch<'_>, metrics: &mut Metrics) -> Result<f64> {
        let objective = &self.options.objective;
        let weights = mean_weights(batch, 1.0);
        let reference = match objective.forget {
            Forget::Npo => Some(batch.reference_log_probs(step, self.reading())?),
            _ => None,
        };
        let (all, how) = (0..batch.units(), (Scope::Piece, Known::Nothing));
        let found = update::gradients(step, batch, all, self.reading(), how, &mut Folds::default(), |piece| {
            let inputs = ForgetBatch {
                log_probs: piece.log_probs.clone(),
                reference_log_probs: reference.as_ref().map(|all| piece.of_tokens(all)).transpose()?,
                weights: piece.of_tokens(&weights)?,
                lengths: piece.lengths.to_vec(),
                rows: batch.units(),
            };
            let mut loss = forget(objective, &inputs)?;
            loss.per_token = (loss.per_token * objective.forget_weight)?;
            Ok(loss)
        })?;
        metrics.set("forget/loss", found.loss);
        metrics.set("forget/log_prob", mean_of(&found.found.log_prob));
        Ok(found.loss)
    }

    fn forget_distributions(&self, step: &mut Step<'_>, batch: &Batch<'_>, metrics: &mut Metrics) -> Result<f64> {
        let weights = mean_weights(batch, self.options.objective.forget_weight);
        let how = RowPass { micro_batch_tokens: self.options.training.micro_batch_tokens, ..RowPass::default() };
        let found = rows::gradients(step, batch, 0..batch.units(), how, |row| {
            unlikely_row(row.logits, row.token, weights[row.index])
        })?;
        let loss = sum(step, batch, found.iter().map(|row| row.loss).collect())?;
        metrics.set("forget/loss", loss);
        metrics.set("forget/log_prob", mean(&found.iter().map(|row| row.log_prob).collect::<Vec<_>>()));
        metrics.set("forget/entropy", mean(&found.iter().map(|row| row.entropy).collect::<Vec<_>>()));
        Ok(loss)
    }

    fn retain_tokens(&self, step: &mut Step<'_>, batch: &Batch<'_>, metrics: &mut Metrics) -> Result<f64> {
        let weights = mean_weights(batch, self.options.objective.retain_weight);
        let (all, how) = (0..batch.units(), (Scope::Piece, Known::Linear));
        let found = update::gradients(step, batch, all, self.reading(), how, &mut Folds::default(), |piece| {
            let (log_probs, weights) = (piece.log_probs.clone(), piece.of_tokens(&weights)?);
            objectives::sft(&SftBatch { log_probs, weights, entropy: None, correct: None })
        })?;
        metrics.set("retain/loss", found.loss);
        metrics.set("retain/log_prob", mean_of(&found.found.log_prob));
        Ok(found.loss)
    }

    fn retain_distributions(&self, step: &mut Step<'_>, batch: &Batch<'_>, metrics: &mut Metrics) -> Result<f64> {
        let (weight, micro_batch_tokens) =
            (self.options.objective.retain_weight, self.options.training.micro_batch_tokens);
        let found = retain(step, batch, 0..batch.units(), weight, micro_batch_tokens)?;
        metrics.set("retain/loss", found.loss);
        metrics.set("retain/kl", found.divergence);
        Ok(found.loss)
    }
}

/// The weight of every loss token of a batch: one over their number, times `factor`.
fn mean_weights(batch: &Batch<'_>, factor: f64) -> Vec<f64> {
    let weights = Aggregation::Token.weights(batch.lengths(), &GlobalCounts::of(batch.lengths(), 0));
    weights.into_iter().map(|weight| factor * weight).collect()
}

/// The sum of the losses of a batch's tokens, all of which must be finite.
fn sum(step: &Step<'_>, batch: &Batch<'_>, losses: Vec<f64>) -> Result<f64> {
    check_losses(step.number, &losses, batch.lengths())?;
    Ok(losses.iter().sum())
}

fn mean_of(values: &[f32]) -> f64 {
    mean(&values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::ignore_ends;

    #[test]
    fn the_first_and_the_last_loss_tokens_are_left_out() {
        let masked = |mask: &[bool], first, last| {
            let mut mask = mask.to_vec();
            ignore_ends(&mut mask, first, last);
            mask
        };
        assert_eq!(masked(&[false, true, false, true, true], 2, 0), [false, false, false, false, true]);
        assert_eq!(masked(&[false, true, false, true, true], 1, 1), [false, false, false, true, false]);
        assert_eq!(masked(&[true, true, true], 1, 0), [true, false, true], "the first token is predicted by nothing");
        assert_eq!(masked(&[false, true], 0, 0), [false, true]);
        assert_eq!(masked(&[false, true], 5, 0), [false, false]);
        assert_eq!(masked(&[false, true, true], 2, 2), [false, false, false]);
    }
}
