//! A small table written as Parquet, column by column. Equal tables give equal bytes.

use std::sync::Arc;

use parquet::basic::{Compression, ConvertedType, LogicalType, Repetition, Type as PhysicalType};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::errors::{ParquetError, Result};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::{PrimitiveTypeBuilder, Type, TypePtr};

/// The values of one column.
#[derive(Clone, Debug, PartialEq)]
pub enum Column {
    /// Whole numbers.
    Integer(Vec<i64>),
    /// Numbers, some of which may be missing.
    Number(Vec<Option<f64>>),
    /// Yes or no.
    Flag(Vec<bool>),
    /// Text.
    Text(Vec<String>),
    /// Lists of whole numbers.
    Integers(Vec<Vec<i32>>),
    /// Lists of numbers.
    Numbers(Vec<Vec<f32>>),
}

/// Named columns of equal length.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table(pub Vec<(String, Column)>);

impl Table {
    /// Adds a column.
    pub fn push(&mut self, name: impl Into<String>, column: Column) {
        self.0.push((name.into(), column));
    }

    /// The table as a Parquet file with one row group.
    pub fn to_parquet(&self) -> Result<Vec<u8>> {
        let fields = self.0.iter().map(|(name, column)| column.field(name)).collect::<Result<_>>()?;
        let schema = Arc::new(Type::group_type_builder("episodes").with_fields(fields).build()?);
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties))?;
        let mut group = writer.next_row_group()?;
        let mut columns = self.0.iter();
        while let Some(mut writer) = group.next_column()? {
            if let Some((_, column)) = columns.next() {
                column.write(writer.untyped())?;
            }
            writer.close()?;
        }
        group.close()?;
        writer.into_inner()
    }
}

impl Column {
    fn field(&self, name: &str) -> Result<TypePtr> {
        let list = |kind| {
            let element = Arc::new(scalar("element", kind, Repetition::REQUIRED).build()?);
            let entries = Type::group_type_builder("list").with_repetition(Repetition::REPEATED);
            let entries = Arc::new(entries.with_fields(vec![element]).build()?);
            Type::group_type_builder(name)
                .with_repetition(Repetition::REQUIRED)
                .with_logical_type(Some(LogicalType::List))
                .with_converted_type(ConvertedType::LIST)
                .with_fields(vec![entries])
                .build()
        };
        let field = match self {
            Self::Integer(_) => scalar(name, PhysicalType::INT64, Repetition::REQUIRED).build(),
            Self::Number(_) => scalar(name, PhysicalType::DOUBLE, Repetition::OPTIONAL).build(),
            Self::Flag(_) => scalar(name, PhysicalType::BOOLEAN, Repetition::REQUIRED).build(),
            Self::Text(_) => scalar(name, PhysicalType::BYTE_ARRAY, Repetition::REQUIRED)
                .with_logical_type(Some(LogicalType::String))
                .with_converted_type(ConvertedType::UTF8)
                .build(),
            Self::Integers(_) => list(PhysicalType::INT32),
            Self::Numbers(_) => list(PhysicalType::FLOAT),
        };
        field.map(Arc::new)
    }

    fn write(&self, writer: &mut ColumnWriter<'_>) -> Result<()> {
        match (self, writer) {
            (Self::Integer(values), ColumnWriter::Int64ColumnWriter(writer)) => writer.write_batch(values, None, None),
            (Self::Number(values), ColumnWriter::DoubleColumnWriter(writer)) => {
                let present: Vec<f64> = values.iter().copied().flatten().collect();
                let levels: Vec<i16> = values.iter().map(|value| i16::from(value.is_some())).collect();
                writer.write_batch(&present, Some(&levels), None)
            }
            (Self::Flag(values), ColumnWriter::BoolColumnWriter(writer)) => writer.write_batch(values, None, None),
            (Self::Text(values), ColumnWriter::ByteArrayColumnWriter(writer)) => {
                let bytes: Vec<ByteArray> = values.iter().map(|text| text.as_str().into()).collect();
                writer.write_batch(&bytes, None, None)
            }
            (Self::Integers(lists), ColumnWriter::Int32ColumnWriter(writer)) => {
                let (present, repeated) = levels(lists);
                writer.write_batch(&lists.concat(), Some(&present), Some(&repeated))
            }
            (Self::Numbers(lists), ColumnWriter::FloatColumnWriter(writer)) => {
                let (present, repeated) = levels(lists);
                writer.write_batch(&lists.concat(), Some(&present), Some(&repeated))
            }
            _ => return Err(ParquetError::General("a column's writer does not fit its values".into())),
        }
        .map(drop)
    }
}

fn scalar(name: &str, kind: PhysicalType, repetition: Repetition) -> PrimitiveTypeBuilder<'_> {
    Type::primitive_type_builder(name, kind).with_repetition(repetition)
}

/// Definition levels (1: an element is there) and repetition levels (1: it continues the list) of required lists.
fn levels<T>(lists: &[Vec<T>]) -> (Vec<i16>, Vec<i16>) {
    let mut present = Vec::new();
    let mut repeated = Vec::new();
    for list in lists {
        present.push(i16::from(!list.is_empty()));
        repeated.push(0);
        for _ in 1..list.len() {
            present.push(1);
            repeated.push(1);
        }
    }
    (present, repeated)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use parquet::file::reader::{FileReader, SerializedFileReader};

    use super::*;

    #[test]
    fn every_kind_of_column_reads_back() {
        let mut table = Table::default();
        table.push("step", Column::Integer(vec![1, 1, 1]));
        table.push("rewards/number", Column::Number(vec![Some(0.5), None, Some(-1.0)]));
        table.push("truncated", Column::Flag(vec![true, false, true]));
        table.push("completion", Column::Text(vec!["é".into(), String::new(), "c".into()]));
        table.push("completion_ids", Column::Integers(vec![vec![1, 2], vec![], vec![3]]));
        table.push("log_probs", Column::Numbers(vec![vec![], vec![-0.5, -0.25], vec![-1.0]]));
        let bytes = table.to_parquet().unwrap();
        assert_eq!(bytes, table.to_parquet().unwrap());

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.parquet");
        std::fs::write(&path, bytes).unwrap();
        let reader = SerializedFileReader::new(std::fs::File::open(path).unwrap()).unwrap();
        let rows: Vec<String> = reader.get_row_iter(None).unwrap().map(|row| row.unwrap().to_string()).collect();
        assert_eq!(
            rows,
            [
                r#"{step: 1, rewards/number: 0.5, truncated: true, completion: "é", completion_ids: [1, 2], log_probs: []}"#,
                r#"{step: 1, rewards/number: null, truncated: false, completion: "", completion_ids: [], log_probs: [-5E-1, -2.5E-1]}"#,
                r#"{step: 1, rewards/number: -1E0, truncated: true, completion: "c", completion_ids: [3], log_probs: [-1E0]}"#,
            ]
        );
    }
}
