//! What can be wrong with data, in the words of whoever has to fix it.

use std::path::{Path, PathBuf};

use base::Hint;
use base::files::FileError;

use crate::row::Source;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// The advice for files that do not hold what their format promises.
pub(crate) const DAMAGED: &str = "the file may be damaged or cut short; fetch or write it again";

/// What is wrong with the data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file that is not what its name says.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was expected and what is there.
        reason: String,
    },
    /// A file that cannot be read to its end.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is there.
        reason: String,
    },
    /// A path or pattern that leads to no file.
    #[error("no data files match {pattern:?}")]
    NoFiles {
        /// The path or pattern.
        pattern: String,
    },
    /// Files without a single row, or rows of which none is left.
    #[error("no rows: {0}")]
    Empty(String),
    /// A sequence that begins twice: text that was rendered before, put behind another begin of sequence.
    #[error("{at}: the sequence starts with {token} twice")]
    DoubledBegin {
        /// The row.
        at: Source,
        /// The name of the token.
        token: String,
    },
    /// A row that cannot be used.
    #[error("{at}{}: {reason}", column.as_ref().map(|column| format!(", column {column}")).unwrap_or_default())]
    Row {
        /// The row.
        at: Source,
        /// The column, with the path inside it: `messages[2].role`.
        column: Option<String>,
        /// What was expected and what is there.
        reason: String,
        /// What to do about it.
        hint: Option<String>,
    },
}

impl Error {
    /// An [`Error::Damaged`].
    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), reason: reason.into() }
    }

    /// An [`Error::Row`] about a whole row.
    pub(crate) fn row(at: &Source, reason: impl Into<String>) -> Self {
        Self::Row { at: at.clone(), column: None, reason: reason.into(), hint: None }
    }

    /// An [`Error::Row`] about one column.
    pub(crate) fn column(at: &Source, column: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Row { at: at.clone(), column: Some(column.into()), reason: reason.into(), hint: None }
    }

    /// The row that the error is about, where it is about one.
    pub fn source(&self) -> Option<&Source> {
        match self {
            Self::Row { at, .. } | Self::DoubledBegin { at, .. } => Some(at),
            _ => None,
        }
    }

    /// The same error with advice.
    pub(crate) fn with_hint(mut self, advice: impl Into<String>) -> Self {
        if let Self::Row { hint, .. } = &mut self {
            *hint = Some(advice.into());
        }
        self
    }
}

impl Hint for Error {
    fn hint(&self) -> Option<String> {
        match self {
            Self::File(error) => error.hint(),
            Self::Format { .. } => Some("data files end in .jsonl, .json or .parquet".into()),
            Self::NoFiles { .. } => Some(
                "give a .jsonl, .json or .parquet file, a folder with .jsonl or .parquet files, or a pattern such as \"data/*.jsonl\""
                    .into(),
            ),
            Self::Damaged { .. } => Some(DAMAGED.into()),
            Self::Empty(_) => Some("check the files, and what was left out of them and why".into()),
            Self::DoubledBegin { token, .. } => {
                Some(format!("{token} is put in front of plain text already; take it out of the text"))
            }
            Self::Row { hint, .. } => hint.clone(),
        }
    }
}
