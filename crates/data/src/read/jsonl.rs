//! JSON lines: one object a line.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::row::{Row, Source, kind};

/// Parses JSON lines that come from `path`. Empty lines are skipped; a row's number is that of its line.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Vec<Row>> {
    parse_each(bytes, path).collect()
}

/// Like [`parse`], line by line: an error is about one row, and the others are still there.
pub fn parse_each(bytes: &[u8], path: &Path) -> impl Iterator<Item = Result<Row>> {
    let file: Arc<Path> = path.into();
    let lines = (1..).zip(without_byte_order_mark(bytes).split(|&byte| byte == b'\n'));
    lines.filter(|(_, line)| !line.iter().all(u8::is_ascii_whitespace)).map(move |(number, line)| {
        let source = Source { file: file.clone(), row: number };
        let value = serde_json::from_slice(line).map_err(|error| not_json(&source, &error))?;
        row(source, value)
    })
}

/// Parses a JSON file that comes from `path`: a list of objects, or JSON lines after all.
pub fn parse_json(bytes: &[u8], path: &Path) -> Result<Vec<Row>> {
    parse_json_each(bytes, path)?.into_iter().collect()
}

/// Like [`parse_json`], with an error for each row that cannot be used.
pub fn parse_json_each(bytes: &[u8], path: &Path) -> Result<Vec<Result<Row>>> {
    let bytes = without_byte_order_mark(bytes);
    if bytes.trim_ascii_start().first() != Some(&b'[') {
        return Ok(parse_each(bytes, path).collect());
    }
    let file: Arc<Path> = path.into();
    let items: Vec<Value> =
        serde_json::from_slice(bytes).map_err(|error| Error::damaged(path, format!("not valid JSON: {error}")))?;
    Ok((1..).zip(items).map(|(number, value)| row(Source { file: file.clone(), row: number }, value)).collect())
}

fn row(source: Source, value: Value) -> Result<Row> {
    match value {
        Value::Object(columns) => Ok(Row { source, columns }),
        other => Err(Error::row(&source, format!("expected an object, got {}", kind(&other)))),
    }
}

fn not_json(source: &Source, error: &serde_json::Error) -> Error {
    let text = error.to_string();
    // The line is the row's own; only the column says something.
    let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason);
    let error_at = Error::row(source, format!("not valid JSON: {reason} at character {}", error.column()));
    if error.is_eof() { error_at.with_hint("the row is cut short: every row is one whole line") } else { error_at }
}

fn without_byte_order_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}
