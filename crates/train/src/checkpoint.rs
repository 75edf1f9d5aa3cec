//! Checkpoints: everything a later process needs to go on as if nothing had happened.
//!
//! A checkpoint is a model in Hugging Face layout (or an adapter in PEFT's) in single precision, `optimizer.safetensors` with
//! the moments as they are in memory, and [`State`] as `trainer_state.json`, sealed by a manifest. No random state is kept: draws are named, not counted.

use std::path::Path;

use base::files::{self, Digest, FileError, Manifest, io_error};
use model::decoder::Decoder;
use model::save;
use model::weights::Tensors;
use model::weights::safetensors;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::directory::{Directory, remove, write_folder};
use crate::error::{Error, Result};
use crate::evaluation::Evaluation;
use crate::optimizer::Optimizer;
use crate::referee::Alarm;
use crate::run::{DataSource, Provenance};

const STATE: &str = "trainer_state.json";
const OPTIMIZER: &str = "optimizer.safetensors";

/// How far a run has come. The first three fields are named as the Hugging Face trainer names them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Passes over the data of the current stage.
    pub epoch: f64,
    /// Steps done, over all stages.
    pub global_step: u64,
    /// Steps of all stages.
    pub max_steps: u64,
    /// The current stage, from 0.
    pub stage: usize,
    /// Steps done in the current stage.
    pub stage_step: u64,
    /// Updates made by the optimiser in the current stage.
    pub updates: u64,
    /// Tokens that passed through training.
    pub num_tokens: u64,
    /// The evaluations so far.
    pub evaluations: Vec<Evaluation>,
    /// What the run is made from.
    pub origin: Origin,
    /// Length of `metrics.jsonl` in bytes.
    pub metrics_bytes: u64,
    /// Length of the TensorBoard file in bytes.
    pub events_bytes: u64,
    /// The referee's alarms so far.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alarms: Vec<Alarm>,
    /// How often it took the run back.
    #[serde(default)]
    pub rollbacks: u32,
}

/// What a run is made from. Where it differs, going on would give neither this run nor the other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// SHA-256 of the resolved configuration.
    pub config_sha256: String,
    /// SHA-256 of the base model.
    pub base_model_sha256: Option<String>,
    /// The data.
    pub data: Vec<DataSource>,
}

impl Origin {
    /// The origin of a run; waits for the hash of its base model.
    ///
    /// # Errors
    /// A base model that cannot be read.
    pub fn of(provenance: &Provenance) -> Result<Self, FileError> {
        Ok(Self {
            config_sha256: files::sha256_of(provenance.config.as_bytes()),
            base_model_sha256: provenance.base_model_sha256.as_ref().map(Digest::get).transpose()?,
            data: provenance.data.clone(),
        })
    }

    /// Compares with what there is now, made from `base_model`.
    ///
    /// # Errors
    /// In words, what differs.
    pub fn check(&self, now: &Self, base_model: &str) -> Result<(), String> {
        if self.config_sha256 != now.config_sha256 {
            return Err("the configuration is another than the run was started with".into());
        }
        if self.base_model_sha256 != now.base_model_sha256 {
            return Err(format!("{base_model} holds another model than the run was started with"));
        }
        let changed = now.data.iter().zip(&self.data).find(|(now, then)| now != then);
        match changed {
            Some((now, _)) => Err(format!("the rows of {} are others than the run was started with", now.name)),
            None if now.data.len() != self.data.len() => {
                Err("the data are others than the run was started with".into())
            }
            None => Ok(()),
        }
    }
}

/// A checkpoint read back.
pub struct Restored {
    /// How far the run had come.
    pub state: State,
    /// The trained parameters by name.
    pub parameters: Tensors,
    /// The moments of the optimiser.
    pub optimizer: Tensors,
}

/// Writes the checkpoint of `state`. `model` writes the files that make the folder a model for other tools.
pub fn save(
    directory: &Directory,
    state: &State,
    optimizer: &Optimizer,
    model: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let step = state.global_step;
    write_folder(&directory.checkpoint(step), |folder| {
        model(folder)?;
        let moments = optimizer.state();
        let tensors = moments.iter().map(|(name, (shape, values))| (name, *shape, *values));
        safetensors::write_values(&folder.join(OPTIMIZER), tensors).map_err(|source| Error::Model { step, source })?;
        let metrics = files::read_to_string(&directory.metrics())?;
        let text = state_text(state, &metrics).map_err(|error| io_error("write", &folder.join(STATE))(error.into()))?;
        files::write(&folder.join(STATE), text.as_bytes())?;
        Ok(())
    })
}

/// The state with every line of `metrics.jsonl` as its `log_history`, where the tools that plot runs look for it.
fn state_text(state: &State, metrics: &str) -> serde_json::Result<String> {
    #[derive(Serialize)]
    struct TrainerState<'a> {
        #[serde(flatten)]
        state: &'a State,
        log_history: Vec<&'a RawValue>,
    }
    let log_history = metrics.lines().map(serde_json::from_str).collect::<serde_json::Result<_>>()?;
    Ok(serde_json::to_string_pretty(&TrainerState { state, log_history })? + "\n")
}

/// The newest checkpoint that is complete, with those passed over because they are not, and why.
///
/// # Errors
/// When there are checkpoints, but not one of them is complete: starting again would throw the run away. A checkpoint that
/// cannot be read, which may be complete: going on from an older one would remove it.
pub fn newest(directory: &Directory) -> Result<(Option<u64>, Vec<FileError>)> {
    let mut damaged = Vec::new();
    for step in directory.checkpoints()?.into_iter().rev() {
        match Manifest::verify(&directory.checkpoint(step)) {
            Ok(_) => return Ok((Some(step), damaged)),
            Err(error @ FileError::Incomplete { .. }) => damaged.push(error),
            Err(error) => return Err(error.into()),
        }
    }
    match damaged.into_iter().next() {
        Some(error) => Err(error.into()),
        None => Ok((None, Vec::new())),
    }
}

/// Reads the checkpoint after `step` steps, which [`newest`] found complete.
pub fn load(directory: &Directory, step: u64, adapter: bool) -> Result<Restored> {
    let folder = directory.checkpoint(step);
    let mismatch = |reason: String| Error::Mismatch { folder: folder.clone(), reason };
    let state: State = serde_json::from_slice(&files::read(&folder.join(STATE))?)
        .map_err(|error| mismatch(format!("{STATE}: {error}")))?;
    if state.global_step != step {
        return Err(mismatch(format!("{STATE} is of step {}", state.global_step)));
    }
    let weights = if adapter { save::ADAPTER } else { safetensors::FILE };
    if !folder.join(weights).exists() {
        return Err(mismatch(format!("it has no {weights}")));
    }
    let read = |name: &str| safetensors::read(&folder.join(name)).map_err(|source| Error::Model { step, source });
    Ok(Restored { state, parameters: read(weights)?, optimizer: read(OPTIMIZER)? })
}

/// Puts parameters read from a file into the decoder.
///
/// # Errors
/// In words, when one is missing or has another shape.
pub fn restore_parameters(decoder: &mut Decoder, mut tensors: Tensors) -> Result<(), String> {
    for index in 0..decoder.parameters().len() {
        let info = &decoder.parameters()[index];
        let tensor = tensors.remove(&info.name).ok_or_else(|| format!("it has no {}", info.name))?;
        if tensor.shape != info.shape {
            return Err(format!("{} has shape {:?}, expected {:?}", info.name, tensor.shape, info.shape));
        }
        decoder.parameter_mut(index).copy_from_slice(&tensor.data);
    }
    match tensors.keys().next() {
        Some(name) => Err(format!("it has {name}, which is no parameter that is trained")),
        None => Ok(()),
    }
}

/// Removes checkpoints beyond the newest `keep` (0: all are kept), and those made by an interruption between the steps that
/// `scheduled` names, so that what is left does not tell whether the run was ever interrupted.
///
/// The newest checkpoint stays whatever it is, unless the run is `finished`.
pub fn rotate(directory: &Directory, keep: usize, finished: bool, scheduled: impl Fn(u64) -> bool) -> Result<()> {
    let steps = directory.checkpoints()?;
    let (mut regular, other): (Vec<u64>, Vec<u64>) = steps.iter().partition(|&&step| scheduled(step));
    let newest = steps.last().filter(|_| !finished);
    for step in other.iter().filter(|step| Some(*step) != newest) {
        remove(&directory.checkpoint(*step))?;
    }
    let surplus = if keep == 0 { 0 } else { regular.len().saturating_sub(keep) };
    for step in regular.drain(..surplus) {
        remove(&directory.checkpoint(step))?;
    }
    Ok(())
}
