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

use data::Example;
use objectives::{Aggregation, GlobalCounts, SftBatch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use crate::error::Result;
use crate::method::{Method, Report, Step};
use crate::metrics::Metrics;
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::Order;
use crate::pass::{Sequence, Unit};
use crate::timing::Phase;
use crate::update::{self, Batch, Folds, Known, Reading, Scope};

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[Preset {
    name: "sft",
    title: "supervised fine-tuning",
    paper: "Ouyang et al. 2022, arXiv 2203.02155, section 3.5",
    formula: "L = - (1/T) Σ_t log π(y_t | y_<t)",
    settings: "",
}];

/// Options of supervised fine-tuning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SftOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// Examples of one step: TRL's `per_device_train_batch_size` times its `gradient_accumulation_steps`.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_size: usize,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

impl Default for SftOptions {
    fn default() -> Self {
        Self { method: "sft".into(), batch_size: 16, training: TrainingOptions::default() }
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
    fn name(&self) -> &str {
        &self.options.method
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
        let rows = Order::new(self.examples.len(), step.seed, step.stage).batch(step.index, self.options.batch_size);
        let units = rows.iter().map(|&row| {
            let example = &self.examples[row];
            Unit { prompt: &[], sequences: vec![Sequence { ids: &example.ids, mask: &example.loss_mask }] }
        });
        let batch = Batch::new(units.collect());
        let counts = GlobalCounts::of(batch.lengths(), 0);
        let reading = Reading::plain(self.options.training.micro_batch_tokens);

        let mut statistics = Folds::default();
        let started = Instant::now();
        step.decoder.prepare_for_training(step.precision);
        step.spent(Phase::Train, started);
        let all = 0..batch.units();
        let gathered =
            update::gradients(step, &batch, all, reading, (Scope::Piece, Known::Linear), &mut statistics, |piece| {
                let found = piece.found;
                objectives::sft(&SftBatch {
                    log_probs: piece.log_probs.clone(),
                    weights: piece.constant(&Aggregation::Token.weights(piece.lengths, &counts))?,
                    entropy: (!found.entropy.is_empty()).then(|| piece.constant(&found.entropy)).transpose()?,
                    correct: (!found.most_probable.is_empty()).then(|| found.most_probable.clone()),
                })
            })?;
        let grad_norm = step.update()?;

        let mut metrics = Metrics::new();
        metrics.set("loss", gathered.loss);
        metrics.set("grad_norm", grad_norm);
        statistics.record(&mut metrics);
        Ok(Report { metrics, tokens: batch.all_tokens(), episodes: None })
    }
}
