//! The value model: a second decoder with a number in place of tokens, its own optimiser, and its own place in checkpoints.
//!
//! It starts as a copy of the policy, with an adapter of the same shape where the policy has one, and a head of zeros: every value
//! is 0 at first. Or it starts as a reward model, with its adapter if it has one. The value before a token is read off the row that predicts it, so that all completions of a prompt share the
//! value of the prompt.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use base::{Purpose, Random};
use candle_core::{Device, Tensor, Var};
use model::config::ScoreHead;
use model::decoder::{Decoder, Gradients, ScoreGradients};
use model::weights::{Tensors, safetensors};
use objectives::ValueBatch;

use super::options::PolicyOptions;
use crate::checkpoint;
use crate::error::{Error, Result};
use crate::method::{Step, check_losses, move_weights};
use crate::optimizer::Optimizer;
use crate::options::TrainingOptions;
use crate::timing::Phase;
use crate::update::{Batch, Folds};

const WEIGHTS: &str = "value_model.safetensors";
const OPTIMIZER: &str = "value_optimizer.safetensors";

/// A value model and what moves it.
pub struct Critic {
    decoder: Decoder,
    optimizer: Optimizer,
    gradients: Gradients,
    micro_batch_tokens: usize,
    cliprange: Option<f64>,
}

/// A value model read back from a checkpoint, to be put where it belongs when the policy is at hand.
pub struct Saved {
    folder: PathBuf,
    parameters: Tensors,
    optimizer: Tensors,
    updates: u64,
}

/// What the value model is to learn, one number for each loss token of the whole batch.
pub struct Lesson {
    /// The estimates before the updates of the step.
    pub old: Vec<f64>,
    /// What they should have been.
    pub returns: Vec<f64>,
}

impl Critic {
    /// The value model of a policy, which starts as `init` where there is one.
    ///
    /// # Errors
    /// A policy that the head cannot be added to.
    pub fn new(
        policy: &Decoder,
        init: Option<&Decoder>,
        options: &PolicyOptions,
        (seed, stage): (u64, usize),
    ) -> model::Result<Self> {
        let mut decoder = match init {
            Some(init) => init.clone(),
            None => {
                let mut decoder = policy.without_adapter();
                decoder.add_score(ScoreHead::REWARD, 0.0, seed)?;
                decoder
            }
        };
        if let (Some(config), None) = (policy.adapter_config(), decoder.adapter_config()) {
            decoder.attach_lora(config, seed ^ 1)?;
        }
        let training = TrainingOptions {
            learning_rate: options.value.learning_rate.unwrap_or(options.training.learning_rate),
            ..options.training.clone()
        };
        // The policy's optimiser rounds with sample `stage`.
        let noise = Random::new(seed, Purpose::Rounding).sample(stage as u32 | 1 << 31);
        let optimizer = Optimizer::new(&training, &decoder, noise);
        let gradients = decoder.gradients();
        Ok(Self {
            decoder,
            optimizer,
            gradients,
            micro_batch_tokens: training.micro_batch_tokens,
            cliprange: options.value.cliprange_value,
        })
    }

    /// Makes the current weights ready for use.
    pub fn prepare(&mut self, step: &mut Step<'_>) {
        let started = Instant::now();
        self.decoder.prepare(step.precision);
        step.spent(Phase::Train, started);
    }

    /// The value before every loss token, sequence by sequence. The model must be prepared.
    ///
    /// # Errors
    /// A value that is not finite.
    pub fn values(&self, step: &mut Step<'_>, batch: &Batch<'_>) -> Result<Vec<f64>> {
        let started = Instant::now();
        let found = batch.values(&self.decoder, step.workspace, 0..batch.units(), self.micro_batch_tokens);
        let all = found.map_err(step.model_error())?.into_iter().map(f64::from).collect();
        step.spent(Phase::Train, started);
        Ok(all)
    }

    /// Moves the value model once, by its loss over the units `part`. Returns the norm of the gradient.
    ///
    /// # Errors
    /// A value that is not finite, named.
    pub fn update(
        &mut self,
        step: &mut Step<'_>,
        batch: &Batch<'_>,
        part: Range<usize>,
        lesson: &Lesson,
        learning_rate: f64,
        statistics: &mut Folds,
    ) -> Result<f64> {
        let started = Instant::now();
        let tokens = batch.tokens_of(&part).len();
        let weight = 1.0 / tokens as f64;
        let mut losses = Vec::with_capacity(tokens);
        for piece in batch.pieces(part.clone(), self.micro_batch_tokens) {
            let own = batch.tokens_of(&piece);
            let pass = batch.pack(piece).map_err(step.model_error())?;
            if own.is_empty() {
                continue;
            }
            self.decoder.forward(&pass.tokens, step.workspace, true).map_err(step.model_error())?;
            let values = pass.values(&self.decoder, step.workspace).map_err(step.model_error())?;
            let (loss, gradient) = (|| {
                let new = Var::from_slice(&values, own.len(), &Device::Cpu)?;
                let constant = |all: &[f64]| Tensor::new(&all[own.clone()], &Device::Cpu);
                let inputs = ValueBatch {
                    values: new.as_tensor().clone(),
                    old_values: constant(&lesson.old)?,
                    returns: constant(&lesson.returns)?,
                    weights: Tensor::full(weight, own.len(), &Device::Cpu)?,
                };
                let loss = objectives::value(self.cliprange, &inputs)?;
                let gradient = loss.gradient(&inputs.values)?;
                Ok((loss, gradient))
            })()
            .map_err(step.objective_error())?;
            losses.extend(loss.values().map_err(step.objective_error())?);
            statistics.extend(&loss.statistics);
            let (rows, d_scores) = pass.by_row(&gradient);
            let scores = ScoreGradients { rows: &rows, blocks: None, d_scores: &d_scores };
            self.decoder
                .backward_scores(&pass.tokens, step.workspace, scores, &mut self.gradients)
                .map_err(step.model_error())?;
        }
        check_losses(step.number, &losses, &batch.lengths()[batch.sequences_of(&part)])?;
        let norm =
            move_weights(step.number, &mut self.decoder, &mut self.optimizer, &mut self.gradients, learning_rate)?;
        step.spent(Phase::Train, started);
        Ok(norm)
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.optimizer.updates()
    }

    /// Writes weights and moments into a checkpoint.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, folder: &Path) -> model::Result<()> {
        let parameters = (0..self.decoder.parameters().len()).map(|index| {
            let info = &self.decoder.parameters()[index];
            let values = safetensors::Values::Single(self.decoder.parameter(index), safetensors::Dtype::F32);
            (&info.name, &info.shape[..], values)
        });
        safetensors::write_values(&folder.join(WEIGHTS), parameters)?;
        let moments = self.optimizer.state();
        let tensors = moments.iter().map(|(name, (shape, values))| (name, *shape, *values));
        safetensors::write_values(&folder.join(OPTIMIZER), tensors)
    }

    /// Takes over the weights and moments of an earlier process.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn restore(&mut self, saved: Saved) -> Result<()> {
        let Saved { folder, parameters, optimizer, updates } = saved;
        checkpoint::restore_parameters(&mut self.decoder, parameters)
            .and_then(|()| self.optimizer.restore(optimizer, updates))
            .map_err(|reason| Error::Mismatch { folder, reason })
    }
}

impl Saved {
    /// Reads what [`Critic::save`] wrote after so many updates.
    ///
    /// # Errors
    /// A file that is missing or damaged.
    pub fn read(folder: &Path, updates: u64) -> model::Result<Self> {
        let read = |name: &str| safetensors::read(&folder.join(name));
        Ok(Self { folder: folder.to_owned(), parameters: read(WEIGHTS)?, optimizer: read(OPTIMIZER)?, updates })
    }
}
