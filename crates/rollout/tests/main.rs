//! The tests of this crate as one program: it is linked once.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod common;
mod conversations;
mod device;
mod generation;
mod guidance;
mod mixture;
mod prefixes;
mod sampling;
mod search;
mod smollm2;
mod stopping;
mod tape;
