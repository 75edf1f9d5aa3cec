//! Files of JSON lines that commands read for themselves: rows that nobody trains on.

use std::path::Path;

use base::{Hint, files};
use data::Row;
use data::read::jsonl;
use serde_json::Value;

use crate::failure::Failure;

/// The objects of a file, each with the place it comes from. `hint` says what a row looks like.
///
/// # Errors
/// A file that cannot be read, a line that is no object, a file without rows.
pub fn read(path: &Path, hint: &str) -> Result<Vec<(data::Source, Value)>, Failure> {
    let rows = jsonl::parse(&files::read(path)?, path)
        .map_err(|error| Failure::new(error.to_string()).hint(error.hint().unwrap_or_else(|| hint.to_owned())))?;
    match rows.is_empty() {
        true => Err(Failure::new(format!("{} has no rows", path.display())).hint(hint)),
        false => Ok(rows.into_iter().map(|Row { source, columns }| (source, Value::Object(columns))).collect()),
    }
}
