//! What can stop a run.

use std::path::PathBuf;

use base::Hint;
use base::files::FileError;

use crate::options::OptionError;

/// Why a run stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option cannot be used.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// A file could not be read or written, or a checkpoint is damaged.
    #[error(transparent)]
    File(#[from] FileError),
    /// The model refused, or one of its values is not finite.
    #[error("step {step}: {source}")]
    Model {
        /// The step.
        step: u64,
        /// What the model says.
        source: model::Error,
    },
    /// Sampling failed.
    #[error("step {step}: {source}")]
    Rollout {
        /// The step.
        step: u64,
        /// What the generator says.
        source: rollout::Error,
    },
    /// The environment could not be played.
    #[error("step {step}: {source}")]
    Play {
        /// The step.
        step: u64,
        /// What is wrong with it or with its rows.
        source: eval::play::PlayError,
    },
    /// A reward could not do its work.
    #[error("step {step}: {source}")]
    Reward {
        /// The step.
        step: u64,
        /// What the reward says.
        source: envs::RewardError,
    },
    /// The loss could not be computed.
    #[error("step {step}: {source}")]
    Objective {
        /// The step.
        step: u64,
        /// What the objective says.
        source: objectives::Error,
    },
    /// A quantity that everything after would inherit is infinite or NaN.
    #[error("step {step}: {what} is {value}")]
    NonFinite {
        /// The step.
        step: u64,
        /// The quantity: the loss of which sequence and token, the gradient of which parameter.
        what: String,
        /// Its value.
        value: f64,
    },
    /// The evaluation failed.
    #[error("evaluation after step {step}: {reason}")]
    Evaluation {
        /// Steps done.
        step: u64,
        /// What the evaluation says.
        reason: String,
        /// Its advice.
        hint: Option<String>,
    },
    /// A teacher that speaks of other tokens than its student.
    #[error("teacher {teacher} has a vocabulary of {vocabulary} tokens, the student one of {student}")]
    Vocabulary {
        /// The teacher's name.
        teacher: String,
        /// Its tokens.
        vocabulary: usize,
        /// The student's.
        student: usize,
    },
    /// There is nothing to train on.
    #[error("stage {stage} ({method}): the data set has no rows")]
    NoData {
        /// The stage, from 1.
        stage: usize,
        /// Its method.
        method: String,
    },
    /// A new run was asked for where one already is.
    #[error("{folder} already holds a run")]
    Exists {
        /// The run directory.
        folder: PathBuf,
    },
    /// Another process is writing to the run directory.
    #[error("another process is writing to {folder}")]
    Busy {
        /// The run directory.
        folder: PathBuf,
    },
    /// A new run was asked for in a folder that has something of the names a run writes.
    #[error("{found} is in the way of a new run, and no run wrote it")]
    Occupied {
        /// The file or folder.
        found: PathBuf,
    },
    /// A checkpoint that is complete but does not belong to this run.
    #[error("{folder} does not fit this run: {reason}")]
    Mismatch {
        /// The checkpoint.
        folder: PathBuf,
        /// What differs.
        reason: String,
    },
    /// A log that is shorter than it was when the checkpoint was made: somebody removed it, or a part of it.
    #[error("{path} has {found} bytes, expected at least the {expected} that the checkpoint was made with")]
    Log {
        /// The log.
        path: PathBuf,
        /// Its bytes; 0 where there is none.
        found: u64,
        /// Its bytes then.
        expected: u64,
    },
    /// A table could not be written as Parquet.
    #[error("cannot encode {path}: {source}")]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The encoder's answer.
        source: parquet::errors::ParquetError,
    },
}

/// The result of everything in this crate that can stop a run.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Hint for Error {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Option(error) => error.hint(),
            Self::File(error) => error.hint(),
            Self::Model { source, .. } => source.hint(),
            Self::Rollout { source, .. } => source.hint(),
            Self::Play { source, .. } => source.hint(),
            Self::Reward { source, .. } => source.hint(),
            Self::Objective { .. } => None,
            Self::NonFinite { .. } => {
                Some("lower the learning rate or max_grad_norm, or train with precision = \"f32\"".into())
            }
            Self::Evaluation { hint, .. } => hint.clone(),
            Self::Vocabulary { .. } => {
                Some("distillation compares distributions token by token: choose a teacher of the same family".into())
            }
            Self::NoData { .. } => Some("check the data files and what was dropped from them".into()),
            Self::Exists { folder } => {
                Some(format!("go on with it: `posttrain resume {}`; or choose another directory", folder.display()))
            }
            Self::Busy { .. } => Some("wait for it, stop it, or choose another directory".into()),
            Self::Occupied { .. } => Some("choose another directory, or move it away".into()),
            Self::Mismatch { .. } => Some("put back what the run was started with, or start another run".into()),
            Self::Log { .. } => Some(
                "put the file back, nothing else was touched; `log_history` in the checkpoint's trainer_state.json has its lines"
                    .into(),
            ),
            Self::Parquet { .. } => None,
        }
    }
}
