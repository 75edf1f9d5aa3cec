//! Metrics with intervals, and the evaluation of a model on prompts.
//!
//! The metrics are pure functions of numbers; only [`evaluate`](evaluate()), [`answer_at_test_time`], [`unlearning::answer`] and
//! [`mod@play`] run a model. This crate must not know training: it says how good a model is, not how to make it better.

pub mod calibration;
pub mod evaluate;
pub mod front;
pub mod interval;
pub mod kolmogorov_smirnov;
pub mod metrics;
pub mod paired;
pub mod personalization;
pub mod play;
pub mod sequential;
pub mod test_time;
pub mod unlearning;

pub use evaluate::{EvaluateError, EvaluateOptions, Evaluation, Sample, evaluate, evaluate_in};
pub use front::Scalarisation;
pub use interval::Interval;
pub use test_time::{Answerer, Strategy, TestTime, TestTimeOptions, answer_at_test_time};
