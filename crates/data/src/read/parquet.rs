//! Parquet files, row by row.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use base::files::io_error;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Number, Value};

use crate::error::{DAMAGED, Error, Result};
use crate::row::{Row, Source};

/// Reads all rows of a file.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let file = File::open(path).map_err(io_error("open", path))?;
    // The library panics on some damaged files.
    base::caught(|| read_rows(file, path))
        .unwrap_or_else(|panic| Err(Error::damaged(path, format!("not a Parquet file that can be read: {panic}"))))
}

fn read_rows(file: File, path: &Path) -> Result<Vec<Row>> {
    let name: Arc<Path> = path.into();
    let malformed = |error| Error::damaged(path, format!("not a Parquet file that can be read: {}", said(&error)));
    let reader = SerializedFileReader::new(file).map_err(malformed)?;
    let mut rows = Vec::new();
    for (number, row) in (1..).zip(reader.get_row_iter(None).map_err(malformed)?) {
        let source = Source { file: name.clone(), row: number };
        let row = row.map_err(|error| Error::row(&source, said(&error)).with_hint(DAMAGED))?;
        let columns = row
            .get_column_iter()
            .map(|(column, field)| match value(field) {
                Ok(value) => Ok((column.clone(), value)),
                Err(reason) => Err(Error::column(&source, column, reason)),
            })
            .collect::<Result<_>>()?;
        rows.push(Row { source, columns });
    }
    Ok(rows)
}

/// The beginning of the library's message, which may quote whole pages.
fn said(error: &ParquetError) -> String {
    const SHOWN: usize = 120;
    let text = error.to_string();
    let text = text.strip_prefix("Parquet error: ").unwrap_or(&text);
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The JSON value of a field, or why it has none.
fn value(field: &Field) -> std::result::Result<Value, String> {
    let float = |number: f64| match Number::from_f64(number) {
        Some(number) => Ok(Value::Number(number)),
        None => Err(format!("{number} is not a number that can be used")),
    };
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(flag) => (*flag).into(),
        Field::Byte(number) => (*number).into(),
        Field::Short(number) => (*number).into(),
        Field::Int(number) | Field::Date(number) | Field::TimeMillis(number) => (*number).into(),
        Field::Long(number) | Field::TimeMicros(number) => (*number).into(),
        Field::TimestampMillis(number) | Field::TimestampMicros(number) => (*number).into(),
        Field::UByte(number) => (*number).into(),
        Field::UShort(number) => (*number).into(),
        Field::UInt(number) => (*number).into(),
        Field::ULong(number) => (*number).into(),
        Field::Float16(number) => float(number.to_f64())?,
        Field::Float(number) => float(f64::from(*number))?,
        Field::Double(number) => float(*number)?,
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => match bytes.as_utf8() {
            Ok(text) => text.into(),
            Err(_) => return Err("expected text, got bytes that are no UTF-8".into()),
        },
        Field::Group(group) => group
            .get_column_iter()
            .map(|(name, field)| Ok((name.clone(), value(field)?)))
            .collect::<std::result::Result<_, String>>()?,
        Field::ListInternal(list) => {
            list.elements().iter().map(value).collect::<std::result::Result<Vec<_>, _>>()?.into()
        }
        Field::MapInternal(map) => map
            .entries()
            .iter()
            .map(|(key, field)| match value(key)? {
                Value::String(key) => Ok((key, value(field)?)),
                key => Ok((key.to_string(), value(field)?)),
            })
            .collect::<std::result::Result<_, String>>()?,
        other => other.to_string().into(),
    })
}
