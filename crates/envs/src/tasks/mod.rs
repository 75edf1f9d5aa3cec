//! Tasks: endless problems with answers that can be checked.
//!
//! A problem is a function of (seed, split, index). The split is decided by a hash of the *underlying* problem (the
//! numbers and the operation, not the words), so that a test problem never occurs in training: not under another seed, not
//! in other words, not with the operands of a sum or product exchanged, and not in another task of this module.

pub mod arithmetic;
pub mod expression;
pub mod word_problems;

use base::{Purpose, Random, random::Draw};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::score::Columns;
pub use arithmetic::ArithmeticOptions;
pub use word_problems::WordProblemOptions;

/// Which part of the problems to draw from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Problems to train on: four fifths of all.
    Train,
    /// Held-out problems: the other fifth.
    Test,
}

/// A question with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Content of the system message; without one, the chat template's default holds.
    pub system: Option<String>,
    /// Content of the user message.
    pub question: String,
    /// The exact answer: a whole number in decimal.
    pub answer: String,
    /// The kind of problem, for accuracy by kind.
    pub kind: &'static str,
    /// The underlying problem in canonical form; equal for problems that differ in words or order only.
    pub key: String,
}

impl Problem {
    /// The problem as a row of the prompt-only type: `prompt` (messages), `answer` and `kind`.
    pub fn columns(&self) -> Columns {
        let message = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
        let system = self.system.iter().map(|content| message("system", content));
        let prompt = system.chain([message("user", &self.question)]).collect();
        Columns::from_iter([
            ("prompt".to_owned(), serde_json::Value::Array(prompt)),
            ("answer".to_owned(), self.answer.as_str().into()),
            ("kind".to_owned(), self.kind.into()),
        ])
    }
}

/// A wrong answer that is near the right one, a whole number in decimal: off by one, two or ten, or with two neighbouring digits
/// exchanged. It has the sign of the right one.
///
/// An answer that is no such number is returned with a sign of doubt.
pub fn near_miss(answer: &str, random: Random) -> String {
    let Ok(right) = answer.parse::<i64>() else { return format!("{answer}?") };
    let mut draws = Draws { random, position: 0 };
    loop {
        let size = right.saturating_abs();
        let wrong = match draws.between(0, 3) {
            0 => size.saturating_add(*draws.pick(&[-10, 10])),
            1 => size.saturating_add(*draws.pick(&[-2, 2])),
            2 => size.saturating_add(*draws.pick(&[-1, 1])),
            _ => exchanged(size, &mut draws),
        };
        if wrong != size && wrong >= 0 {
            return if right < 0 { (-wrong).to_string() } else { wrong.to_string() };
        }
    }
}

/// The number with two neighbouring digits exchanged, if it has two.
fn exchanged(number: i64, draws: &mut Draws) -> i64 {
    let mut digits = number.to_string().into_bytes();
    if digits.len() > 1 {
        let place = draws.between(0, digits.len() as i64 - 2) as usize;
        digits.swap(place, place + 1);
    }
    digits.iter().fold(0i64, |number, digit| number.saturating_mul(10).saturating_add(i64::from(digit - b'0')))
}

/// A source of problems.
pub trait Task: Send + Sync {
    /// The task's name.
    fn name(&self) -> &'static str;

    /// One candidate problem; the same draws give the same problem. It may belong to either split.
    fn draw(&self, draws: &mut Draws) -> Problem;

    /// The problem of this seed, split and index.
    ///
    /// # Panics
    /// If ten thousand candidates in a row belong to the other split, which the construction of a task rules out (see
    /// [`TaskConfig::build`]).
    fn generate(&self, seed: u64, split: Split, index: u64) -> Problem {
        candidates(seed, index)
            .map(|mut draws| self.draw(&mut draws))
            .find(|problem| split_of(&problem.key) == split)
            .expect("both splits of a task hold problems")
    }
}

/// The draws of one candidate after the other for the problem of this seed and index.
pub(crate) fn candidates(seed: u64, index: u64) -> impl Iterator<Item = Draws> {
    let random = Random::new(seed, Purpose::Task).step((index >> 32) as u32).prompt(index as u32);
    (0..MAX_ATTEMPTS).map(move |attempt| Draws { random: random.sample(attempt), position: 0 })
}

/// Candidates drawn for one problem before a split counts as empty.
const MAX_ATTEMPTS: u32 = 10_000;

/// Whether both splits occur among the keys of a thousand candidates.
pub(crate) fn has_both_splits(key: impl Fn(&mut Draws) -> String) -> bool {
    let mut seen = [false; 2];
    candidates(0, 0).take(MAX_ATTEMPTS as usize / 10).any(|mut draws| {
        seen[usize::from(split_of(&key(&mut draws)) == Split::Test)] = true;
        seen == [true; 2]
    })
}

/// The draws of one candidate problem, in order.
pub struct Draws {
    random: Random,
    position: u32,
}

impl Draws {
    fn next(&mut self) -> Draw {
        self.position += 1;
        self.random.at(self.position - 1)
    }

    /// Uniform in `low..=high`.
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        self.next().between(low, high)
    }

    /// `items` in random order (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.next().below(i as u64 + 1) as usize);
        }
    }

    /// One of `items`, which must not be empty.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.next().below(items.len() as u64) as usize]
    }
}

/// The split that the problem with this key belongs to, under every seed.
pub fn split_of(key: &str) -> Split {
    if hash(key).is_multiple_of(5) { Split::Test } else { Split::Train }
}

/// FNV-1a, finished by a multiplication so that the low bits depend on all.
fn hash(key: &str) -> u64 {
    let hash = key
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16
}

/// A task and its options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TaskConfig {
    /// Bare arithmetic.
    Arithmetic(ArithmeticOptions),
    /// Short stories with one operation.
    WordProblems(WordProblemOptions),
}

/// An option of a task has an impossible value.
#[derive(Debug, thiserror::Error)]
#[error("task {task}: {reason}")]
pub struct TaskError {
    task: &'static str,
    reason: String,
}

impl base::Hint for TaskError {
    fn hint(&self) -> Option<String> {
        Some("`posttrain config explain task` lists every option".into())
    }
}

impl TaskConfig {
    /// Makes the task.
    ///
    /// # Errors
    /// An option with an impossible value, or options that leave so few problems that a split is empty.
    pub fn build(&self) -> Result<Box<dyn Task>, TaskError> {
        let task: Box<dyn Task> = match self {
            Self::Arithmetic(options) => Box::new(arithmetic::Arithmetic::new(options.clone())?),
            Self::WordProblems(options) => Box::new(word_problems::WordProblems::new(options.clone())?),
        };
        match has_both_splits(|draws| task.draw(draws).key) {
            true => Ok(task),
            false => {
                let reason = "its options leave too few problems to hold some out; widen the ranges".into();
                Err(TaskError { task: task.name(), reason })
            }
        }
    }
}
