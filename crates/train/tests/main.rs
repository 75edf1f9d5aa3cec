//! The tests of this crate as one program: it is linked once.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod agents;
mod combined;
mod common;
mod device;
mod distributions;
mod formats;
mod learning;
mod policy;
mod preferences;
mod referee;
mod retained;
mod reward_models;
mod same_bytes;
mod value_models;
