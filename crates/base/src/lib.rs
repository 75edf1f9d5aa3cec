//! The words every crate shares: counter-based randomness, files that are whole or absent, clocks, errors with a hint.
//!
//! This crate knows nothing of models, data or training. Whatever two crates of the house both need and neither
//! owns is a candidate for it; everything else belongs elsewhere.

mod caught;
pub mod clock;
pub mod files;
pub mod hint;
pub mod random;

pub use caught::caught;
pub use clock::{Clock, Stopwatch};
pub use hint::Hint;
pub use random::{Purpose, Random};
