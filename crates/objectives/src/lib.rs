//! Objectives of post-training: advantages, ratios, clipping, aggregation, divergences, and the losses made of them.
//!
//! Everything here is a pure function of numbers. An objective receives one value per *loss token* (the tokens a
//! micro-batch trains on, flat, in sequence order) as candle tensors and returns one weighted loss per token; their
//! plain sum is the loss. The crate must not know models, tokenizers, files, batches of text or optimisers: whoever
//! calls it owns the log-probabilities and takes the gradient with respect to them from there.
//!
//! The parts are orthogonal. [`advantage`] turns rewards into advantages, [`clip`] bounds the policy ratio, [`kl`]
//! measures the distance to a reference, [`aggregation`] decides how much each token counts. A method ([`grpo()`],
//! [`sft()`]) is one file that names its parts, its formula and its paper. Three rules hold for every method:
//!
//! 1. Denominators are global. They are inside the weights, so splitting a batch changes neither loss nor gradient.
//! 2. The arithmetic is f64 whatever the precision of the inputs; it costs nothing beside the model.
//! 3. Statistics leave as lists of values with a [`Reduce`], never as averages of averages.

pub mod advantage;
pub mod aggregation;
pub mod clip;
pub mod distillation;
pub mod distribution;
pub mod grpo;
pub mod kl;
pub mod loss;
pub mod sft;
pub mod unlearning;

pub use advantage::{Advantage, Advantages};
pub use aggregation::{Aggregation, GlobalCounts};
pub use clip::Clip;
pub use distillation::DistillationOptions;
pub use distribution::Distribution;
pub use grpo::{GrpoOptions, PolicyBatch, grpo};
pub use kl::KlEstimator;
pub use loss::{Error, Fold, Loss, Reduce, Result, Statistic};
pub use sft::{SftBatch, SftObjective, sft};
pub use unlearning::UnlearningOptions;
