//! The tests of this crate as one program: it is linked once.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod cli;
mod common;
mod config;
mod exactness;
mod failures;
mod hostile;
mod house;
mod learns;
mod looking;
mod scores;
mod several;
mod systems;
