//! Verifiers: rewards that read an answer and decide.
//!
//! Each is a pure function of the answer, its row and its options, and works under a [`Budget`]: the answer comes from a
//! model that is paid for being strange.

pub mod budget;
pub mod expression;
pub mod format;
pub mod number;
pub mod outcome;
pub mod place;
pub mod rational;

pub use budget::{Budget, Exhausted};
pub use expression::ExpressionOptions;
pub use format::FormatOptions;
pub use number::NumberOptions;
pub use outcome::Outcome;
pub use place::Place;
pub use rational::Rational;

/// Steps a verifier may take for one answer unless its options say otherwise.
pub(crate) fn default_steps() -> u64 {
    100_000
}

/// The column with the expected answer unless the options say otherwise.
pub(crate) fn default_column() -> String {
    "answer".into()
}

/// The tag around the answer unless the options say otherwise.
pub(crate) fn default_tag() -> String {
    "answer".into()
}
