//! Published systems, reproduced in miniature: each with its world, its recipe, its claims, and whether they hold.
//!
//! A [`System`] is a table that is fixed before anything runs: the arms that compete, the claims about them, the figures that
//! show them. Its [`Experiment`] trains one arm with one seed and measures it. [`reproduce`](mod@reproduce) runs arms times seeds, keeps every
//! finished one in a file of its own, and [`mod@evidence`] judges the claims by the statistics over the seeds.
//!
//! One folder a system: `mod.rs` is the table and the experiment from top to bottom, `README.md` what was found, `tiny.toml` the sizes
//! and `quick.toml` what a short run changes. [`worlds`] are those that several systems share.
//!
//! This crate knows every crate below. It must not know terminals, command lines or how a page is drawn, and it holds no algorithm
//! that a recipe could use without the experiment: rewards belong to `envs`, losses to `objectives`, methods to `train`,
//! metrics to `eval`.

pub mod aligndistil;
pub mod ce_u;
pub mod dro;
pub mod error;
pub mod evidence;
pub mod experiment;
pub mod grid;
pub mod measurements;
pub mod mpo;
pub mod par;
pub mod peo;
pub mod personalized;
pub mod q_sharp;
pub mod reproduce;
pub mod rewarding_doubt;
pub mod settings;
pub mod system;
pub mod vc_ppo;
pub mod words;
pub mod worlds;

pub use error::{Error, Result};
pub use evidence::{Evidence, Judgement, Verdict};
pub use experiment::{Experiment, Trial};
pub use grid::Grid;
pub use measurements::{Measurements, Seed};
pub use reproduce::{Event, Reproduction};
pub use system::{Arm, Bound, Claim, Figure, Role, System, WriteData};

/// Every system, in the order of the list.
pub const SYSTEMS: &[&System] = &[
    &aligndistil::SYSTEM,
    &rewarding_doubt::SYSTEM,
    &vc_ppo::SYSTEM,
    &peo::SYSTEM,
    &ce_u::SYSTEM,
    &dro::SYSTEM,
    &q_sharp::SYSTEM,
    &personalized::SYSTEM,
    &par::SYSTEM,
    &mpo::SYSTEM,
];

/// The system of this name.
pub fn find(name: &str) -> Option<&'static System> {
    SYSTEMS.iter().copied().find(|system| system.name == name)
}
