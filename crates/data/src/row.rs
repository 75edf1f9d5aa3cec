//! A row of a file and where it is.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

/// The place a row comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Source {
    /// The file, as it was named, or what made the row.
    #[serde(serialize_with = "as_text")]
    pub file: Arc<Path>,
    /// Number of the row, from 1; in JSONL the number of its line.
    pub row: u64,
}

fn as_text<S: Serializer>(file: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&file.display())
}

impl Source {
    /// Row `row` of `file`.
    pub fn new(file: impl AsRef<Path>, row: u64) -> Self {
        Self { file: file.as_ref().into(), row }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}, row {}", self.file.display(), self.row)
    }
}

/// A row: named values and where they come from.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Where the row comes from.
    pub source: Source,
    /// The values by column, in the file's order.
    pub columns: Map<String, Value>,
}

impl Row {
    /// The value of a column, where there is one; null counts as none.
    pub fn get(&self, column: &str) -> Option<&Value> {
        self.columns.get(column).filter(|value| !value.is_null())
    }
}

/// What a value is, for messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
