//! The `posttrain` binary as a library: configuration, commands, progress and reports.
//!
//! It wires the crates below together and talks to people; it must not know how anything is computed. Whatever another
//! program might want belongs in a crate below.

pub mod cli;
pub mod command;
pub mod config;
pub mod corpus;
pub mod failure;
pub mod frontier_file;
pub mod interrupt;
pub mod judges;
pub mod lines;
pub mod measure;
pub mod opened;
pub mod plan;
pub mod report;
pub mod roofline;
pub mod terminal;
pub mod voice;
pub mod watch;
