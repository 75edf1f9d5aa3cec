//! The columns of rows: how many rows have them, and of what types.

use serde::Serialize;

use super::{Check, Finding, Severity};
use crate::row::{Row, Source, kind};

/// A column.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Rows that have a value in it; null counts as none.
    pub rows: usize,
    /// The types of its values, the most frequent first.
    pub types: Vec<ColumnType>,
    /// The first rows without a value.
    pub missing: Vec<Source>,
}

/// A type of values in a column.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ColumnType {
    /// In words, with an article: `a string`.
    pub name: &'static str,
    /// Rows with it.
    pub rows: usize,
    /// The first of them.
    pub first: Source,
}

/// Rows named of those without a value.
const NAMED: usize = 5;
/// Where so large a share of the rows has a column, the others lack it by mistake.
const USUAL: f64 = 0.9;

/// The columns of `rows`, in the order of their first appearance.
pub fn columns(rows: &[&Row]) -> Vec<Column> {
    let mut columns: Vec<Column> = Vec::new();
    for row in rows {
        for (name, value) in row.columns.iter().filter(|(_, value)| !value.is_null()) {
            let column = match columns.iter_mut().position(|column| column.name == *name) {
                Some(index) => &mut columns[index],
                None => {
                    columns.push(Column { name: name.clone(), rows: 0, types: Vec::new(), missing: Vec::new() });
                    let last = columns.len() - 1;
                    &mut columns[last]
                }
            };
            column.rows += 1;
            match column.types.iter_mut().find(|seen| seen.name == kind(value)) {
                Some(seen) => seen.rows += 1,
                None => column.types.push(ColumnType { name: kind(value), rows: 1, first: row.source.clone() }),
            }
        }
    }
    for column in &mut columns {
        column.types.sort_by_key(|seen| std::cmp::Reverse(seen.rows));
        let without = rows.iter().filter(|row| row.get(&column.name).is_none());
        column.missing = without.take(NAMED).map(|row| row.source.clone()).collect();
    }
    columns
}

/// What is odd about the columns of `rows` rows.
pub(super) fn findings(columns: &[Column], rows: usize) -> Vec<Finding> {
    let mut findings = Vec::new();
    for column in columns {
        if let [usual, others @ ..] = column.types.as_slice() {
            findings.extend(others.iter().map(|other| Finding {
                severity: Severity::Warning,
                check: Check::MixedColumn,
                at: Some(other.first.clone()),
                detail: format!(
                    "column {} holds {} ({} rows), and {} in the others ({})",
                    column.name, other.name, other.rows, usual.name, usual.rows
                ),
            }));
        }
        let missing = rows - column.rows;
        if missing > 0 && column.rows as f64 >= USUAL * rows as f64 {
            findings.push(Finding {
                severity: Severity::Warning,
                check: Check::MissingValue,
                at: column.missing.first().cloned(),
                detail: format!(
                    "column {} has no value here, of {missing} rows without and {} with",
                    column.name, column.rows
                ),
            });
        }
    }
    findings
}
