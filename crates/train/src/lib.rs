//! The training loop: optimiser, schedules, checkpoints, metrics and the run directory.
//!
//! A [`Run`] is a list of stages; a stage repeats the step of its [`Method`]. This crate knows what a model, a rollout, a
//! reward and a loss are, and nothing of terminals: whoever wants to show progress implements [`Observer`]. It must not know
//! the formulas of objectives (crate `objectives`), how configuration files are found and merged, or how anything is printed.
//!
//! Three rules hold everywhere here:
//!
//! 1. A step is a function of the weights, the optimiser's state, the step's number and what its method writes into checkpoints
//!    ([`Method::save`]). Nothing else is carried along.
//! 2. Wall-clock values go to `timing.jsonl` and to the `timing` part of `summary.json`, and nowhere else.
//! 3. What is logged is folded in f64, sequence by sequence in order, whatever the cut of the batch.

pub mod artefact;
mod card;
pub mod carried;
pub mod checkpoint;
pub mod density_ratio;
pub mod directory;
pub mod error;
pub mod evaluation;
pub mod fit;
pub mod frontier;
pub mod judges;
pub mod log;
pub mod method;
pub mod methods;
pub mod metrics;
pub mod mixing;
pub mod observer;
pub mod optimizer;
pub mod options;
pub mod order;
pub mod pass;
pub mod preferred;
pub mod referee;
pub mod reference;
pub mod retained;
pub mod rollouts;
pub mod rows;
pub mod run;
pub mod schedule;
pub mod scoring;
pub mod summary;
pub mod table;
pub mod tensorboard;
pub mod timing;
pub mod update;
pub mod verdicts;

pub use error::{Error, Result};
pub use evaluation::{Evaluation, EvaluationError, Evaluator, Measure};
pub use fit::{Fit, fit};
pub use method::Method;
pub use observer::{Event, Observer};
pub use referee::{Alarm, RefereeOptions};
pub use run::{DataSource, Outcome, Provenance, Run};
pub use summary::Summary;
