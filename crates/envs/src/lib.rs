//! Tasks, environments, verifiers and rewards.
//!
//! A [`Task`] makes problems whose answers can be checked; a [`Reward`] turns a model's answers into [`Score`]s: a value,
//! a [`Status`] and named parts; [`lint`](mod@lint) tries a reward on answers that deserve nothing. An [`Environment`]
//! answers a model's turns one by one, and a [`Partner`] is another model that answers messages: to judge, or to play a
//! user. Every verifier works under a step budget, so that no answer, however hostile, can make a run wait.
//!
//! This crate must not know models, tokenizers or training: it sees text, token ids and the columns of the prompt's row.

pub mod environment;
pub mod lint;
pub mod partner;
pub mod reward;
pub mod score;
pub mod tasks;
pub mod verify;

pub use environment::{Environment, EnvironmentConfig, EpisodeId, Transition};
pub use partner::{Partner, PartnerConfig};
pub use reward::model::ModelRewardOptions;
pub use reward::process::{OnError, ProcessOptions};
pub use reward::{Reward, RewardConfig, RewardError, RewardKind, Silent, Weighted};
pub use score::{Answer, Columns, Score, SpanScore, Status, TurnScore};
pub use tasks::{Problem, Split, Task, TaskConfig};
