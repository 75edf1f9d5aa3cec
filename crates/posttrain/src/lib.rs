//! The `posttrain` binary as a library: configuration, commands, progress and reports.
//!
//! It wires the crates below together and talks to people; it must not know how anything is computed. Whatever another
//! program might want belongs in a crate below.

pub mod config;
pub mod failure;
pub mod report;
