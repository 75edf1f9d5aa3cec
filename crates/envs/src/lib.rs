//! Tasks, verifiers and rewards.
//!
//! A [`Task`] makes problems whose answers can be checked; a [`Reward`] turns a model's answers into [`Score`]s: a value,
//! a [`Status`] and named parts; [`lint`](mod@lint) tries a reward on answers that deserve nothing. Every verifier works under a step budget, so that no answer, however hostile, can make
//! a run wait.
//!
//! This crate must not know models, tokenizers or training: it sees text, token ids and the columns of the prompt's row.

pub mod lint;
pub mod reward;
pub mod score;
pub mod tasks;
pub mod verify;

pub use reward::process::{OnError, ProcessOptions};
pub use reward::{Reward, RewardConfig, RewardError, RewardKind, Weighted};
pub use score::{Answer, Columns, Score, Status};
pub use tasks::{Problem, Split, Task, TaskConfig};
