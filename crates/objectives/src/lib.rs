//! Objectives of post-training: advantages, ratios, clipping, aggregation, divergences, and the losses made of them.
//!
//! Everything here is a pure function of numbers. An objective receives one value per *loss token* (the tokens a
//! micro-batch trains on, flat, in sequence order) as candle tensors and returns one weighted loss per token; their
//! plain sum is the loss. The crate must not know models, tokenizers, files, batches of text or optimisers: whoever
//! calls it owns the log-probabilities and takes the gradient with respect to them from there.
//!
//! The parts are orthogonal. [`advantage`] turns rewards into advantages, [`ratio`] and [`clip`] bound how far the policy
//! moves, [`kl`] measures the distance to a reference, [`correction`] weighs what another sampler drew, [`filter`] leaves tokens
//! out, [`entropy`] keeps it undecided, [`aggregation`] decides how much each token counts. A method ([`policy()`], [`sft()`]) is one file that names its parts,
//! its formula and its paper. Objectives of whole completions ([`preference()`], [`unpaired()`]) return one weighted loss per
//! pair or sequence instead. Three rules hold for every method:
//!
//! 1. Denominators are global. They are inside the weights, so splitting a batch changes neither loss nor gradient.
//! 2. The arithmetic is f64 whatever the precision of the inputs; it costs nothing beside the model.
//! 3. Statistics leave as lists of values with a [`Reduce`], never as averages of averages.

pub mod advantage;
pub mod aggregation;
pub mod clip;
pub mod correction;
pub mod density_ratio;
pub mod distillation;
pub mod distribution;
pub mod entropy;
pub mod extrapolation;
pub mod filter;
pub mod gae;
pub mod group_dro;
pub mod kl;
pub mod loss;
pub mod mixing;
pub mod negative;
pub mod odin;
pub mod online;
pub mod pairwise;
pub mod policy;
pub mod preference;
pub mod ranking;
pub mod ratio;
pub mod reward;
mod scalar;
mod sequences;
pub mod sft;
pub mod shaping;
pub mod spans;
pub mod turns;
pub mod unlearning;
pub mod unpaired;
pub mod value;
pub mod worst_case;

pub use advantage::{Advantages, Baseline, Credit, Estimator, Rewards, ScaleRewards};
pub use aggregation::{Aggregation, GlobalCounts};
pub use clip::{Clip, ClipKind};
pub use correction::{Correction, CorrectionMode};
pub use density_ratio::LogisticRegression;
pub use distillation::DistillationOptions;
pub use distribution::Distribution;
pub use entropy::{AdaptiveEntropy, EntropyControl};
pub use extrapolation::{Anchor, Extrapolation};
pub use group_dro::{GroupDro, GroupWeights};
pub use kl::{AdaptiveKl, KlDirection, KlEstimator, KlPlacement};
pub use loss::{Error, Fold, Loss, Reduce, Result, Statistic};
pub use negative::Negative;
pub use odin::Odin;
pub use online::{NashMdBatch, nash_md, xpo};
pub use pairwise::PairLoss;
pub use policy::{PolicyBatch, PolicyOptions, policy};
pub use preference::{Length, PairBatch, PreferenceOptions, Score, preference};
pub use ranking::{RankingBatch, ranking};
pub use ratio::RatioLevel;
pub use reward::{Ensemble, LabelLoss, ScoredPairs, StepAggregation};
pub use sft::{SftBatch, SftObjective, sft};
pub use spans::SpanReward;
pub use turns::TurnReward;
pub use unlearning::UnlearningOptions;
pub use unpaired::{RunningMean, Unpaired, UnpairedBaseline, UnpairedBatch, UnpairedOptions, Utility, unpaired};
pub use value::{ValueBatch, value};
pub use worst_case::{Ball, Members, WorstCase};
