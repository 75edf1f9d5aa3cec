//! The tests of this crate as one program: it is linked once.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod environments;
mod lint;
mod partners;
mod process;
mod tasks;
mod verifiers;
