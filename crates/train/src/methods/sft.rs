//! Supervised fine-tuning: the model learns to repeat the completions of a data set.
//!
//! ```text
//! L = - (1 / T) Σ_i Σ_{t in mask_i} log π(y_{i,t} | y_{i,<t})        T = Σ_i |mask_i| over the whole step
//! ```
//!
//! A step takes `batch_size` examples in the order of the epoch, cuts them into pieces of at most `micro_batch_tokens`
//! tokens, gathers gradients over the pieces and moves the weights once. Sequences are laid out one after the other without
//! padding and do not see each other. `T` counts the whole step, so the pieces can be cut anywhere.
//!
//! Deviations from TRL's `SFTTrainer`:
//! 1. The mean is over the loss tokens of the step. TRL's was per micro-batch for long, which made the loss depend on the cut.
//! 2. A batch that reaches the end of an epoch goes on with the next one instead of being smaller.
//!
//! Metrics, named as TRL names them:
//! - `loss`: the formula above. `grad_norm`: the norm of its gradient before clipping.
//! - `entropy`, `mean_token_accuracy`: see [`mod@objectives::sft`].

use std::time::Instant;

use candle_core::{Device, Tensor};
use data::Example;
use objectives::{Aggregation, GlobalCounts, SftBatch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Folds;
use crate::error::Result;
use crate::method::{Method, Report, Step, check_losses};
use crate::metrics::Metrics;
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::{Order, split};
use crate::pass::{Pass, Sequence, Unit};
use crate::timing::Phase;

/// Options of supervised fine-tuning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SftOptions {
    /// Examples of one step: TRL's `per_device_train_batch_size` times its `gradient_accumulation_steps`.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_size: usize,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

impl Default for SftOptions {
    fn default() -> Self {
        Self { batch_size: 16, training: TrainingOptions::default() }
    }
}

impl SftOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("batch_size", self.batch_size, (1..=1 << 20).contains(&self.batch_size), "1 to 1048576")?;
        self.training.validate().map_err(|error| error.within("training"))
    }
}

/// Supervised fine-tuning on a list of examples.
pub struct Sft {
    options: SftOptions,
    examples: Vec<Example>,
}

impl Sft {
    /// Fine-tuning on these examples.
    ///
    /// # Errors
    /// Options that mean nothing.
    pub fn new(options: SftOptions, examples: Vec<Example>) -> Result<Self> {
        options.validate().map_err(|error| error.within("sft"))?;
        Ok(Self { options, examples })
    }
}

impl Method for Sft {
    fn name(&self) -> &'static str {
        "sft"
    }

    fn training(&self) -> &TrainingOptions {
        &self.options.training
    }

    fn rows(&self) -> usize {
        self.examples.len()
    }

    fn rows_per_step(&self) -> usize {
        self.options.batch_size
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        let started = Instant::now();
        let rows = Order::new(self.examples.len(), step.seed, step.stage).batch(step.index, self.options.batch_size);
        let units: Vec<Unit<'_>> = rows
            .iter()
            .map(|&row| {
                let example = &self.examples[row];
                Unit { prompt: &[], sequences: vec![Sequence { ids: &example.ids, mask: &example.loss_mask }] }
            })
            .collect();
        let lengths: Vec<usize> = units.iter().flat_map(Unit::lengths).collect();
        let counts = GlobalCounts::of(&lengths, 0);
        let sizes: Vec<usize> = units.iter().map(Unit::rows).collect();

        let mut losses = Vec::new();
        let mut statistics = Folds::default();
        step.decoder.prepare_for_training(step.precision);
        for piece in split(&sizes, self.options.training.micro_batch_tokens) {
            let done = piece.end;
            let pass = Pass::pack(&units[piece]).map_err(step.model_error())?;
            if pass.targets.is_empty() {
                continue;
            }
            let weights = Aggregation::Token.weights(&pass.lengths, &counts);
            // The loss is linear in the log-probabilities, so its gradient is known before they are.
            let d_log_prob: Vec<f64> = weights.iter().map(|weight| -weight).collect();
            step.decoder.forward(&pass.tokens, step.workspace, true).map_err(step.model_error())?;
            let found = step
                .decoder
                .backward(
                    &pass.tokens,
                    step.workspace,
                    &pass.targets,
                    1.0,
                    &pass.by_target(&d_log_prob),
                    None,
                    step.gradients,
                )
                .map_err(step.model_error())?;
            let batch = (|| {
                let on_cpu = |values: Vec<f32>| Tensor::new(values, &Device::Cpu);
                Ok(SftBatch {
                    log_probs: on_cpu(pass.by_sequence(&found.log_prob))?,
                    weights: Tensor::new(weights, &Device::Cpu)?,
                    entropy: Some(on_cpu(pass.by_sequence(&found.entropy))?),
                    correct: Some(pass.by_sequence(&found.most_probable)),
                })
            })();
            let loss = batch.and_then(|batch| objectives::sft(&batch)).map_err(step.objective_error())?;
            losses.extend(loss.values().map_err(step.objective_error())?);
            statistics.extend(&loss.statistics);
            step.progress(Phase::Train, done, units.len());
        }
        check_losses(step.number, &losses, &lengths)?;
        let grad_norm = step.update()?;
        step.spent(Phase::Train, started);

        let mut metrics = Metrics::new();
        metrics.set("loss", losses.iter().sum());
        metrics.set("grad_norm", grad_norm);
        statistics.record(&mut metrics);
        let tokens = units.iter().flat_map(|unit| &unit.sequences).map(|sequence| sequence.ids.len() as u64).sum();
        Ok(Report { metrics, tokens, episodes: None })
    }
}
