//! The tests of this crate as one program: it is linked once.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod evaluate;
mod metrics;
mod play;
mod sequential;
mod test_time;
mod unlearning;
