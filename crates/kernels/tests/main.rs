//! The tests of this crate as one program: it is linked once.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod adamw;
mod attention;
mod common;
mod int8;
mod products;
mod rows;
