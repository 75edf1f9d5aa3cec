//! Environments: worlds that answer a model's turns.
//!
//! ```text
//! problem = environment.reset(episode)                    what the model reads first
//! loop: turn = model(everything so far)
//!       transition = environment.step(turn)               what it reads next, the turn's reward, whether it is over
//! ```
//!
//! This is the interface of Gym (Brockman et al., "OpenAI Gym", arXiv 1606.01540) with text in place of actions. What an
//! episode holds is a function of its [`EpisodeId`] alone, and nothing an assistant writes can stop a run: a turn that cannot
//! be read is answered with what is wrong about it, and every environment ends an episode after so many turns.
//!
//! A problem with one answer ([`crate::Task`]) is an environment whose first transition is the last.

pub mod call;
pub mod text_game;
pub mod tools;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::score::{Columns, Score, Status, TurnScore};
use crate::tasks::{Problem, Split};
pub use text_game::TextGameOptions;
pub use tools::ToolsOptions;

/// Which episode of an environment: everything in it follows from these numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpisodeId {
    /// Seed of the run.
    pub seed: u64,
    /// Which part of the episodes.
    pub split: Split,
    /// Number within the part.
    pub index: u64,
}

/// The column of a row that holds its [`EpisodeId`].
pub const EPISODE_COLUMN: &str = "episode";

/// A world that answers an assistant's turns.
pub trait Environment: Send {
    /// The environment's name.
    fn name(&self) -> &'static str;

    /// Who speaks in the observations: `user`, or `tool` where the chat template knows that role.
    fn observer(&self) -> &str;

    /// Declarations of the functions that the model may call, as the chat template expects them; empty where the system
    /// message declares them, or where there are none.
    fn tools(&self) -> Vec<Value> {
        Vec::new()
    }

    /// Begins an episode and forgets the one before. The problem's `answer` is empty where the world itself decides.
    fn reset(&mut self, episode: EpisodeId) -> Problem;

    /// Takes a turn of the assistant. After the end of an episode, and before the first, every turn is answered by the end.
    fn step(&mut self, turn: &str) -> Transition;

    /// The turns of a perfect player from the start of the episode to its end.
    fn demonstration(&self) -> Vec<String>;
}

/// What a turn led to.
#[derive(Clone, Debug, PartialEq)]
pub struct Transition {
    /// What the model reads before its next turn: one message each, at least one unless the episode is over.
    pub observations: Vec<String>,
    /// Reward of the turn, always finite.
    pub reward: f64,
    /// Whether the episode is over.
    pub done: bool,
    /// The verdict on the turn; of the last turn, on the episode.
    pub status: Status,
    /// Tools that were called in the turn, or attempts at it.
    pub calls: usize,
    /// Those of them that failed: not readable, of a tool that does not exist, refused by the tool.
    pub failed_calls: usize,
}

impl Transition {
    /// The end of an episode.
    pub fn end(reward: f64, status: Status) -> Self {
        Self { observations: Vec::new(), reward, done: true, status, calls: 0, failed_calls: 0 }
    }

    /// A message before the next turn.
    pub fn next(observation: String, reward: f64, status: Status) -> Self {
        Self { observations: vec![observation], reward, done: false, status, calls: 0, failed_calls: 0 }
    }
}

/// The rewards of an episode so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// Every turn.
    pub turns: Vec<TurnScore>,
    /// Whether the world ended the episode; otherwise a limit on turns or tokens did.
    pub done: bool,
}

impl Trace {
    /// Takes in what a turn led to.
    pub fn push(&mut self, transition: &Transition) {
        let &Transition { reward, status, calls, failed_calls, .. } = transition;
        self.turns.push(TurnScore { reward, status, calls, failed_calls });
        self.done = transition.done;
    }

    /// The score of the episode: the sum of its rewards, turn by turn, with the status of its last turn, or
    /// [`Status::Timeout`] if the episode was cut off.
    pub fn score(&self) -> Score {
        let value = self.turns.iter().map(|turn| turn.reward).sum();
        let last = self.turns.last().map(|turn| turn.status).filter(|_| self.done);
        Score { turns: self.turns.clone(), ..Score::new(value, last.unwrap_or(Status::Timeout)) }
    }
}

/// An environment and its options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum EnvironmentConfig {
    /// Questions over a small library, with a search tool and a calculator.
    Tools(ToolsOptions),
    /// A text adventure: rooms, keys, locked doors and a treasure.
    TextGame(TextGameOptions),
}

/// An option of an environment has an impossible value.
#[derive(Debug, thiserror::Error)]
#[error("environment {environment}: {reason}")]
pub struct EnvironmentError {
    /// The environment.
    pub environment: &'static str,
    /// Which option, the value found, and what is expected.
    pub reason: String,
}

impl base::Hint for EnvironmentError {
    fn hint(&self) -> Option<String> {
        Some("`posttrain config explain environment` lists every option".into())
    }
}

impl EnvironmentConfig {
    /// The value of `type` in a configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Tools(_) => "tools",
            Self::TextGame(_) => "text_game",
        }
    }

    /// Makes the environment.
    ///
    /// # Errors
    /// An option with an impossible value.
    pub fn build(&self) -> Result<Box<dyn Environment>, EnvironmentError> {
        Ok(match self {
            Self::Tools(options) => Box::new(tools::Tools::new(options.clone())?),
            Self::TextGame(options) => Box::new(text_game::TextGame::new(options.clone())?),
        })
    }
}

/// An episode as a row: `prompt` (messages), `answer`, `kind` and `episode`, and `tools` where the template declares them.
pub fn row(environment: &mut dyn Environment, episode: EpisodeId) -> Columns {
    let mut columns = environment.reset(episode).columns();
    columns.insert(EPISODE_COLUMN.into(), serde_json::json!(episode));
    let tools = environment.tools();
    if !tools.is_empty() {
        columns.insert("tools".into(), tools.into());
    }
    columns
}

/// The episode that a row describes, if it describes one.
pub fn episode_of(row: &Columns) -> Option<EpisodeId> {
    EpisodeId::deserialize(row.get(EPISODE_COLUMN)?).ok()
}

/// The messages after the prompt in a perfect episode: turns of the assistant and what the world says between them.
///
/// The environment is left at the end of that episode.
pub fn demonstration(environment: &mut dyn Environment, episode: EpisodeId) -> Value {
    environment.reset(episode);
    let mut messages = Vec::new();
    for turn in environment.demonstration() {
        let transition = environment.step(&turn);
        messages.push(serde_json::json!({"role": "assistant", "content": turn}));
        if !transition.done {
            let observer = environment.observer().to_owned();
            let observed = |content| serde_json::json!({"role": observer, "content": content});
            messages.extend(transition.observations.into_iter().map(observed));
        }
    }
    messages.into()
}
