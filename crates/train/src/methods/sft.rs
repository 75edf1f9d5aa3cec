//! Supervised fine-tuning: the model learns to repeat the completions of a data set.
//!
//! ```text
//! L = - (1 / T) Σ_i Σ_{t in mask_i} log π(y_{i,t} | y_{i,<t})        T = Σ_i |mask_i| over the whole step
//! ```
//!
//! Each token's term has the forms of [`mod@objectives::sft`]: weights by probability (DFT) or entropy (EAFT), smoothed labels. NEFTune (arXiv
//! 2310.05914) adds noise to the input embeddings, uniform within `alpha / sqrt(L d)` for a sequence of `L` tokens and a hidden size of `d`.
//!
//! A step takes `batch_size` examples in the order of the epoch, cuts them into pieces of at most `micro_batch_tokens`
//! tokens, gathers gradients over the pieces and moves the weights once. Sequences are laid out one after the other without
//! padding and do not see each other. `T` counts the whole step, so the pieces can be cut anywhere.
//!
//! Deviations from TRL's `SFTTrainer`:
//! 1. The mean is over the loss tokens of the step. TRL's was per micro-batch for long, which made the loss depend on the cut.
//! 2. A batch that reaches the end of an epoch goes on with the next one instead of being smaller.
//! 3. NEFTune's `L` is the length of each sequence, not that of its padded batch.
//!
//! Metrics, named as TRL names them:
//! - `loss`: the formula above. `grad_norm`: the norm of its gradient before clipping.
//! - `entropy`, `mean_token_accuracy`: see [`mod@objectives::sft`].

use std::time::Instant;

use base::Purpose;
use data::Example;
use objectives::{Aggregation, GlobalCounts, SftBatch, SftObjective};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use crate::error::Result;
use crate::method::{Method, Report, Step, check_losses};
use crate::metrics::Metrics;
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::Order;
use crate::pass::Unit;
use crate::rows::{self, EmbeddingNoise, RowPass};
use crate::timing::Phase;
use crate::update::{self, Batch, Folds, Known, Reading, Scope};

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "sft",
        title: "supervised fine-tuning",
        paper: "Ouyang et al. 2022, arXiv 2203.02155, section 3.5",
        formula: "L = - (1/T) Σ_t log π(y_t | y_<t)",
        settings: "",
    },
    Preset {
        name: "dft",
        title: "dynamic fine-tuning",
        paper: "Wu et al. 2025, arXiv 2508.05629",
        formula: "L = - (1/T) Σ_t π(y_t) log π(y_t),  the factor a constant",
        settings: "[objective]\nloss_type = \"dft\"",
    },
    Preset {
        name: "eaft",
        title: "entropy-adaptive fine-tuning",
        paper: "Diao et al. 2026, arXiv 2601.02151",
        formula: "L = - (1/T) Σ_t (H_t / ln 20)^α log π(y_t),  H: entropy of the 20 most probable tokens, a constant",
        settings: "[objective]\nloss_type = \"eaft\"",
    },
    Preset {
        name: "neftune",
        title: "supervised fine-tuning with noisy embeddings",
        paper: "Jain et al. 2023, arXiv 2310.05914",
        formula: "L = - (1/T) Σ_t log π(y_t | x + u),  u uniform within α / sqrt(L d)",
        settings: "neftune_noise_alpha = 5.0",
    },
];

/// Options of supervised fine-tuning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SftOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// Examples of one step: TRL's `per_device_train_batch_size` times its `gradient_accumulation_steps`.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_size: usize,
    /// The parts of the loss: how much each token counts, smoothed labels.
    pub objective: SftObjective,
    /// Strength of the noise on the input embeddings, NEFTune's alpha; 0 is none.
    #[schemars(extend("minimum" = 0))]
    pub neftune_noise_alpha: f64,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

impl Default for SftOptions {
    fn default() -> Self {
        Self {
            method: "sft".into(),
            batch_size: 16,
            objective: SftObjective::default(),
            neftune_noise_alpha: 0.0,
            training: TrainingOptions::default(),
        }
    }
}

impl SftOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("batch_size", self.batch_size, (1..=1 << 20).contains(&self.batch_size), "1 to 1048576")?;
        let alpha = self.neftune_noise_alpha;
        check("neftune_noise_alpha", alpha, alpha.is_finite() && alpha >= 0.0, "a number, at least 0")?;
        self.objective.validate().map_err(|error| OptionError::new("objective", error.to_string()))?;
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
        let batch = Batch::new(rows.iter().map(|&row| Unit::of(&self.examples[row])).collect());
        let alpha = self.options.neftune_noise_alpha;
        let noise = (alpha > 0.0).then(|| EmbeddingNoise { alpha, random: step.random(Purpose::Noise) });
        let micro_batch_tokens = self.options.training.micro_batch_tokens;
        let metrics = supervised(step, &batch, &self.options.objective, noise, micro_batch_tokens)?;
        Ok(Report { metrics, tokens: batch.all_tokens(), episodes: None })
    }
}

/// One supervised update: the mean loss over the loss tokens of a batch, its gradients, one step of the optimiser.
pub(super) fn supervised(
    step: &mut Step<'_>,
    batch: &Batch<'_>,
    objective: &SftObjective,
    noise: Option<EmbeddingNoise>,
    micro_batch_tokens: usize,
) -> Result<Metrics> {
    let counts = GlobalCounts::of(batch.lengths(), 0);
    let mut statistics = Folds::default();
    let started = Instant::now();
    step.decoder.prepare_for_training(step.precision);
    step.spent(Phase::Train, started);
    let all = 0..batch.units();
    let loss = match objective.is_plain() && noise.is_none() {
        true => {
            let how = (Scope::Piece, Known::Linear);
            update::gradients(step, batch, all, Reading::plain(micro_batch_tokens), how, &mut statistics, |piece| {
                let found = piece.found;
                objectives::sft(&SftBatch {
                    log_probs: piece.log_probs.clone(),
                    weights: piece.constant(&Aggregation::Token.weights(piece.lengths, &counts))?,
                    entropy: (!found.entropy.is_empty()).then(|| piece.constant(&found.entropy)).transpose()?,
                    correct: (!found.most_probable.is_empty()).then(|| found.most_probable.clone()),
                })
            })?
            .loss
        }
        false => {
            let weights = Aggregation::Token.weights(batch.lengths(), &counts);
            let found = rows::gradients(step, batch, all, RowPass { micro_batch_tokens, others: &[], noise }, |row| {
                objective.row(row.logits, row.token, weights[row.index])
            })?;
            let losses: Vec<f64> = found.iter().map(|row| row.loss).collect();
            check_losses(step.number, &losses, batch.lengths())?;
            statistics.extend(&objectives::sft::statistics(&found));
            losses.iter().sum()
        }
    };
    let grad_norm = step.update()?;

    let mut metrics = Metrics::new();
    metrics.set("loss", loss);
    metrics.set("grad_norm", grad_norm);
    statistics.record(&mut metrics);
    Ok(metrics)
}
