//! Rows from files.

pub mod jsonl;
pub mod parquet;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use base::files::io_error;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::row::Row;

/// Where the data is and how its columns are called.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataOptions {
    /// Rows to train on: files (`.jsonl`, `.json`, `.parquet`), folders, of which `.jsonl` and `.parquet` files are read, or patterns such as `data/*.jsonl`.
    pub train: Vec<String>,
    /// Rows to unlearn: `[unlearning]` makes the model forget them and keep those of `train`. Named as in `train`.
    pub forget: Vec<String>,
    /// Rows to evaluate on, never trained on. Named as in `train`.
    pub test: Vec<String>,
    /// Columns that go by another name in the files: `{ prompt = "question" }` takes the prompt from `question`, and
    /// `{ chosen = "rejected", rejected = "chosen" }` reverses pairs.
    pub columns: BTreeMap<String, String>,
}

/// Reads the rows of files, folders and patterns, in the order given; a folder's or pattern's files in the order of
/// their names. `columns` renames columns, as in [`DataOptions::columns`].
pub fn read(patterns: &[String], columns: &BTreeMap<String, String>) -> Result<Vec<Row>> {
    read_each(patterns, columns)?.into_iter().collect()
}

/// Like [`read()`], with an error for each row that cannot be used.
///
/// # Errors
/// What concerns more than one row: a file that cannot be read or is of no known format, nothing to read at all.
pub fn read_each(patterns: &[String], columns: &BTreeMap<String, String>) -> Result<Vec<Result<Row>>> {
    let mut rows = Vec::new();
    for pattern in patterns {
        for path in files(pattern)? {
            rows.extend(read_file_each(&path)?);
        }
    }
    if rows.is_empty() {
        return Err(Error::Empty(format!("nothing in {}", patterns.join(", "))));
    }
    let renamed = |row: Result<Row>| row.and_then(|row| rename(row, columns));
    Ok(rows.into_iter().map(renamed).collect())
}

/// Reads one file by the format its name tells.
pub fn read_file(path: &Path) -> Result<Vec<Row>> {
    read_file_each(path)?.into_iter().collect()
}

fn read_file_each(path: &Path) -> Result<Vec<Result<Row>>> {
    match extension(path).as_deref() {
        Some("jsonl" | "ndjson") => Ok(jsonl::parse_each(&base::files::read(path)?, path).collect()),
        Some("json") => jsonl::parse_json_each(&base::files::read(path)?, path),
        Some("parquet") => Ok(parquet::read(path)?.into_iter().map(Ok).collect()),
        _ => Err(Error::Format { path: path.to_owned(), reason: "the name tells no known format".into() }),
    }
}

fn extension(path: &Path) -> Option<String> {
    Some(path.extension()?.to_str()?.to_ascii_lowercase())
}

/// The files that a path or pattern stands for, sorted.
fn files(pattern: &str) -> Result<Vec<PathBuf>> {
    let path = Path::new(pattern);
    let mut found = Vec::new();
    if path.is_dir() {
        walk(path, &mut found)?;
    } else if path.exists() || !pattern.contains(['*', '?', '[']) {
        return Ok(vec![path.to_owned()]);
    } else {
        let matches = glob::glob(pattern)
            .map_err(|error| Error::Format { path: path.to_owned(), reason: format!("not a pattern: {error}") })?;
        for entry in matches {
            let path = entry.map_err(|error| {
                let path = error.path().to_owned();
                io_error("list", &path)(error.into())
            })?;
            found.push(path);
        }
        found.retain(|path| path.is_file());
    }
    if found.is_empty() {
        return Err(Error::NoFiles { pattern: pattern.to_owned() });
    }
    found.sort();
    Ok(found)
}

/// Collects the data files under a folder, without hidden files and folders, and without `.json`, which mostly says something about the
/// data instead.
fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(io_error("list", folder))? {
        let path = entry.map_err(io_error("list", folder))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() {
            walk(&path, found)?;
        } else if matches!(extension(&path).as_deref(), Some("jsonl" | "ndjson" | "parquet")) {
            found.push(path);
        }
    }
    Ok(())
}

fn rename(mut row: Row, columns: &BTreeMap<String, String>) -> Result<Row> {
    // All are read before any is written, so that columns can change places.
    let mut values = Vec::with_capacity(columns.len());
    for (name, from) in columns {
        let Some(value) = row.columns.get(from).cloned() else {
            let error = Error::row(&row.source, format!("there is no column {from} to take {name} from"));
            let near = base::hint::nearest(from, row.columns.keys().map(String::as_str));
            return Err(error.with_hint(match near {
                Some(near) => format!("did you mean {near}?"),
                None => format!("its columns are {}", names(&row)),
            }));
        };
        values.push((name.clone(), value));
    }
    row.columns.extend(values);
    Ok(row)
}

/// The names of a row's columns, for messages.
pub(crate) fn names(row: &Row) -> String {
    match row.columns.len() {
        0 => "none".into(),
        _ => row.columns.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
    }
}
