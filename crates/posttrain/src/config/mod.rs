//! One TOML file composed of the option structs of the crates.

pub mod check;
pub mod load;
pub mod reference;
pub mod tree;
