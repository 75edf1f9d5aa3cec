//! The tests of this crate as one program: it is linked once.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod distributions;
mod preference_properties;
mod preference_reference;
mod properties;
mod reference;
mod reward;
