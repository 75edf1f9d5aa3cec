//! The reference model of a method: where it stands, and what it says of a batch.
//!
//! It is the model the stage started from; with an adapter, the model without the adapter. Or it follows the policy:
//!
//! ```text
//! every `steps` steps:  θ_ref <- α θ + (1 - α) θ_ref        α: mixup_alpha
//! ```
//!
//! With α = 1 the reference is replaced (a hard update), below 1 it moves part of the way (a soft one): Gorbatovski et al.,
//! "Learn Your Reference Model for Real Good Alignment" (TR-DPO), arXiv 2404.09656. With `steps = 1` it is the exponential
//! moving average of the policy. The reference has all weights of its own; an adapter is merged into its copy.

use std::path::{Path, PathBuf};
use std::time::Instant;

use model::decoder::Decoder;
use model::weights::{Tensors, safetensors};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint::restore_parameters;
use crate::error::{Error, Result};
use crate::method::Step;
use crate::options::{OptionError, check};
use crate::timing::Phase;
use crate::update::{Batch, Reading};

/// How the reference model follows the policy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SyncOptions {
    /// The share of the policy in the reference after it has moved (TRL: `ref_model_mixup_alpha`).
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1))]
    pub mixup_alpha: f64,
    /// Steps from one move to the next (TRL: `ref_model_sync_steps`).
    #[schemars(range(min = 1))]
    pub steps: u64,
}

impl Default for SyncOptions {
    fn default() -> Self {
        Self { mixup_alpha: 0.6, steps: 512 }
    }
}

impl SyncOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        let share = self.mixup_alpha > 0.0 && self.mixup_alpha <= 1.0;
        check("mixup_alpha", self.mixup_alpha, share, "above 0 and at most 1")?;
        check("steps", self.steps, self.steps > 0, "at least 1")
    }
}

/// The reference model of a method.
pub enum Reference {
    /// There is none.
    None,
    /// The model the stage started from. What it says of a row never changes: it is asked once for each, and remembered.
    Fixed(Vec<Option<Vec<f32>>>),
    /// A model that follows the policy.
    Moving(Box<MovingReference>),
}

impl Reference {
    /// The reference of a method with this many rows, if it is `needed`.
    pub fn new(needed: bool, sync: Option<SyncOptions>, rows: usize) -> Self {
        match sync {
            _ if !needed => Self::None,
            None => Self::Fixed(vec![None; rows]),
            Some(options) => Self::Moving(Box::new(MovingReference::new(options))),
        }
    }

    /// Whether the stage has to keep the model it started from.
    pub fn needs_start(&self) -> bool {
        matches!(self, Self::Fixed(_))
    }

    /// The reference's log-probabilities of all loss tokens of a batch whose units are these rows, in their order; of units that
    /// come only once, `rows` is empty. The policy must be prepared.
    ///
    /// # Errors
    /// Those of the forward pass.
    pub fn log_probs(
        &mut self,
        step: &mut Step<'_>,
        batch: &Batch<'_>,
        rows: &[usize],
        reading: Reading,
    ) -> Result<Option<Vec<f32>>> {
        match self {
            Self::None => Ok(None),
            Self::Moving(moving) => {
                let started = Instant::now();
                let found = batch.log_probs(moving.decoder(step)?, step.workspace, 0..batch.units(), reading);
                step.spent(Phase::Reference, started);
                Ok(Some(found.map_err(step.model_error())?.log_prob))
            }
            Self::Fixed(_) if rows.is_empty() => batch.reference_log_probs(step, reading).map(Some),
            Self::Fixed(known) => {
                if rows.iter().any(|&row| known[row].is_none()) {
                    let found = batch.reference_log_probs(step, reading)?;
                    for (unit, &row) in rows.iter().enumerate() {
                        known[row] = Some(found[batch.tokens_of(&(unit..unit + 1))].to_vec());
                    }
                }
                Ok(Some(rows.iter().flat_map(|&row| known[row].iter().flatten().copied()).collect()))
            }
        }
    }

    /// Moves the reference if it is due after this step.
    pub fn follow(&mut self, step: &Step<'_>) {
        if let Self::Moving(moving) = self {
            moving.follow(step);
        }
    }

    /// Writes what the next step needs into the folder of a checkpoint.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        match self {
            Self::Moving(moving) => moving.save(folder),
            Self::None | Self::Fixed(_) => Ok(()),
        }
    }

    /// Reads it back.
    ///
    /// # Errors
    /// A file that is missing or damaged.
    pub fn load(&mut self, folder: &Path) -> Result<()> {
        match self {
            Self::Moving(moving) => moving.load(folder),
            Self::None | Self::Fixed(_) => Ok(()),
        }
    }
}

/// The file of the reference's weights in a checkpoint.
const FILE: &str = "reference.safetensors";

/// A reference model that follows the policy: what a method carries from step to step.
pub struct MovingReference {
    options: SyncOptions,
    decoder: Option<Decoder>,
    /// Weights read from the folder of a checkpoint, until the next step makes a model of them.
    restored: Option<(PathBuf, Tensors)>,
    /// The last step that used it.
    step: u64,
}

impl MovingReference {
    /// A reference that will start where its stage does.
    pub fn new(options: SyncOptions) -> Self {
        Self { options, decoder: None, restored: None, step: 0 }
    }

    /// The reference in this step, prepared for use.
    ///
    /// # Errors
    /// Weights of a checkpoint that do not fit the model.
    pub fn decoder(&mut self, step: &Step<'_>) -> Result<&Decoder> {
        let decoder = match (self.decoder.take(), self.restored.take()) {
            (Some(decoder), _) => decoder,
            (None, Some((folder, tensors))) => {
                let mut decoder = merged(step.decoder);
                restore_parameters(&mut decoder, tensors).map_err(|reason| Error::Mismatch { folder, reason })?;
                decoder
            }
            (None, None) => merged(step.decoder),
        };
        self.step = step.number;
        let decoder = self.decoder.insert(decoder);
        decoder.prepare(step.precision);
        Ok(decoder)
    }

    /// Moves the reference if it is due after this step.
    pub fn follow(&mut self, step: &Step<'_>) {
        if !(step.index + 1).is_multiple_of(self.options.steps) {
            return;
        }
        if let Some(reference) = &mut self.decoder {
            let policy = merged(step.decoder);
            let share = self.options.mixup_alpha as f32;
            for index in 0..policy.parameters().len() {
                let moving = reference.parameter_mut(index).iter_mut();
                moving.zip(policy.parameter(index)).for_each(|(to, from)| *to = share * from + (1.0 - share) * *to);
            }
        }
    }

    /// Writes the weights into the folder of a checkpoint.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let Some(decoder) = &self.decoder else { return Ok(()) };
        safetensors::write(&folder.join(FILE), decoder.views(), safetensors::Dtype::F32)
            .map_err(|source| Error::Model { step: self.step, source })
    }

    /// Reads them back.
    ///
    /// # Errors
    /// A file that is missing or damaged.
    pub fn load(&mut self, folder: &Path) -> Result<()> {
        let found = safetensors::read(&folder.join(FILE));
        let tensors = found.map_err(|source| Error::Model { step: self.step, source })?;
        // One that has gone on since is built again.
        self.decoder = None;
        self.restored = Some((folder.to_owned(), tensors));
        Ok(())
    }
}

/// The model as it answers: with its adapter merged into the weights.
fn merged(policy: &Decoder) -> Decoder {
    let mut copy = policy.clone();
    copy.merge_adapter();
    copy
}
