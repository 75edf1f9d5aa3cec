//! What can go wrong in a reproduction.

use base::Hint;
use base::files::FileError;

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a reproduction stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Training failed.
    #[error(transparent)]
    Train(#[from] train::Error),
    /// A model refused.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// Sampling failed.
    #[error(transparent)]
    Rollout(#[from] rollout::Error),
    /// A reward could not do its work.
    #[error(transparent)]
    Reward(#[from] envs::RewardError),
    /// A merged model could not be measured.
    #[error(transparent)]
    Probe(#[from] train::frontier::ProbeError),
    /// An option of a stage cannot be used.
    #[error(transparent)]
    Option(#[from] train::options::OptionError),
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Tensors that do not fit.
    #[error("a tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// Settings that are not what the system reads.
    #[error("the settings of {system} are not valid: {reason}")]
    Settings {
        /// The system.
        system: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A measurement that is infinite or NaN.
    #[error("{arm}, seed {seed}: the measurement {name} is {value}")]
    NonFinite {
        /// The arm.
        arm: &'static str,
        /// The seed.
        seed: u64,
        /// The measurement.
        name: String,
        /// Its value.
        value: f64,
    },
    /// The threads could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(String),
    /// Somebody asked to stop; what was finished is kept.
    #[error("interrupted")]
    Interrupted,
}

impl Hint for Error {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Train(error) => error.hint(),
            Self::Model(error) => error.hint(),
            Self::Rollout(error) => error.hint(),
            Self::Reward(error) => error.hint(),
            Self::Probe(error) => error.hint(),
            Self::Option(error) => error.hint(),
            Self::File(error) => error.hint(),
            Self::Interrupted => Some("the same command goes on from what is finished".into()),
            Self::Tensor(_) | Self::Settings { .. } | Self::NonFinite { .. } | Self::Thread(_) => None,
        }
    }
}
