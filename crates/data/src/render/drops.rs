//! Rows that were left out, counted and named.

use std::collections::BTreeMap;
use std::fmt;

use crate::row::Source;

/// Why a row is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DropReason {
    /// More tokens than allowed.
    TooLong,
    /// Cut to the allowed length, nothing to learn is left.
    CompletionCutOff,
    /// No token is to be learnt.
    NothingToLearn,
}

impl fmt::Display for DropReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::TooLong => "too long",
            Self::CompletionCutOff => "completion cut off",
            Self::NothingToLearn => "nothing to learn",
        })
    }
}

/// The rows that were left out, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    rows: BTreeMap<DropReason, Vec<Source>>,
}

impl Drops {
    pub(super) fn add(&mut self, reason: DropReason, source: Source) {
        self.rows.entry(reason).or_default().push(source);
    }

    /// How many rows were left out.
    pub fn count(&self) -> usize {
        self.rows.values().map(Vec::len).sum()
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The reasons and their rows, in the order of the data.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, &[Source])> {
        self.rows.iter().map(|(&reason, rows)| (reason, rows.as_slice()))
    }
}

/// One clause per reason, with the first few rows: `3 too long (train.jsonl, row 4; train.jsonl, row 9; ...)`.
impl fmt::Display for Drops {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMED: usize = 5;
        if self.is_empty() {
            return formatter.write_str("none");
        }
        for (index, (reason, rows)) in self.rows.iter().enumerate() {
            let mut names: Vec<String> = rows.iter().take(NAMED).map(Source::to_string).collect();
            if rows.len() > NAMED {
                names.push("...".into());
            }
            let separator = if index > 0 { ", " } else { "" };
            write!(formatter, "{separator}{} {reason} ({})", rows.len(), names.join("; "))?;
        }
        Ok(())
    }
}
