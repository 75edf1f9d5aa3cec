//! What can go wrong with a model, in the words of its user.

use std::fmt::Display;
use std::path::Path;

use base::Hint;
use base::files::FileError;

use crate::decoder::NonFinite;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong with a model, its files or its text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file (or a part of one) that does not say what it must.
    #[error("{place}: {reason}")]
    Malformed {
        /// The file, and the key or offset inside it.
        place: String,
        /// What was expected and what is there.
        reason: String,
    },
    /// Something well-formed that this crate does not do, by name.
    #[error("{what} is not supported")]
    Unsupported {
        /// The architecture, option or data type.
        what: String,
        /// What is supported instead.
        hint: String,
    },
    /// Weights that do not fit the configuration.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// The tensor's Hugging Face name.
        name: String,
        /// Missing, unexpected, or expected and found shapes.
        reason: String,
    },
    /// A name that is neither a named model nor a path.
    #[error("no model named {name:?}, and no such file or folder")]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// The nearest name, if any is close.
        nearest: Option<String>,
    },
    /// A named model that is not cached and could not be fetched.
    #[error("cannot get {name}: {}", attempts.join("; "))]
    Unavailable {
        /// The model.
        name: String,
        /// Each route tried and why it failed.
        attempts: Vec<String>,
        /// What to do about it.
        hint: String,
    },
    /// Text that the tokenizer or the chat template refuses.
    #[error("{0}")]
    Text(String),
    /// A request that the model cannot serve, such as a token outside the vocabulary.
    #[error("{0}")]
    Invalid(String),
    /// A GPU that does not answer.
    #[error("device {device:?} cannot be used: {reason}")]
    NoDevice {
        /// Its name.
        device: String,
        /// What the driver says, or that there is none.
        reason: String,
    },
    /// A device, or an operation on it, failed.
    #[error("the device failed: {0}")]
    Device(#[from] candle_core::Error),
    /// The first infinity or NaN of a forward or backward.
    #[error(transparent)]
    NonFinite(#[from] NonFinite),
}

impl Error {
    /// A [`Error::Malformed`] at `place`.
    pub fn malformed(place: impl Display, reason: impl Display) -> Self {
        Self::Malformed { place: place.to_string(), reason: reason.to_string() }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(what: impl Display, hint: impl Display) -> Self {
        Self::Unsupported { what: what.to_string(), hint: hint.to_string() }
    }

    /// An [`Error::Tensor`].
    pub fn tensor(name: impl Display, reason: impl Display) -> Self {
        Self::Tensor { name: name.to_string(), reason: reason.to_string() }
    }

    /// The same error with the file it came from in front of its place, for readers that work on bytes alone.
    pub fn in_file(self, path: &Path) -> Self {
        let file_name = path.file_name().and_then(|name| name.to_str());
        let path = path.display();
        match self {
            Self::Malformed { place, reason } => {
                // Readers that know the file's name by heart begin with it.
                let place = file_name.and_then(|name| place.strip_prefix(name)).unwrap_or(&place);
                let separator = if place.is_empty() || place.starts_with(':') { "" } else { ": " };
                Self::Malformed { place: format!("{path}{separator}{place}"), reason }
            }
            Self::Tensor { name, reason } => Self::Tensor { name: format!("{name} of {path}"), reason },
            Self::Unsupported { what, hint } => Self::Unsupported { what: format!("{path}: {what}"), hint },
            other => other,
        }
    }
}

impl Hint for Error {
    fn hint(&self) -> Option<String> {
        match self {
            Self::File(error) => error.hint(),
            Self::Malformed { .. } => Some("the file may be damaged or cut short; fetch it again".into()),
            Self::Unsupported { hint, .. } | Self::Unavailable { hint, .. } => Some(hint.clone()),
            Self::Tensor { .. } => Some("the weights and config.json must come from the same model".into()),
            Self::UnknownModel { nearest: Some(nearest), .. } => Some(format!("did you mean {nearest}?")),
            Self::UnknownModel { .. } => Some("`posttrain models` lists the named models".into()),
            Self::NonFinite(_) => Some("in training: lower the learning rate, clip gradients, or train in f32; otherwise the weights are damaged".into()),
            Self::NoDevice { .. } => Some("`posttrain doctor` says what it finds; device = \"cpu\" needs no GPU".into()),
            Self::Device(_) => Some("if its memory is exhausted, lower micro_batch_tokens, decode_batch_size or max_new_tokens".into()),
            Self::Text(_) | Self::Invalid(_) => None,
        }
    }
}
