//! What does a reward pay to answers that deserve nothing?
//!
//! Reinforcement learning finds whatever a reward pays for. [`lint`] tries the known tricks first: it pays [`ADVERSARIES`]
//! and the right answer on the same rows and compares. A trick is *exploitable* when it is paid at least as much as the right
//! answer on more than [`TOLERATED`] of the rows, or on average. Every answer is paid twice, the second time in reverse order:
//! a reward that pays differently then is *not deterministic*.

mod answers;

use serde::Serialize;

pub use answers::{ADVERSARIES, Adversary, Layout, Task};

use crate::reward::Reward;
use crate::score::{Answer, Columns, Score, Status};

/// Share of rows on which a wrong answer may be right by chance.
pub const TOLERATED: f64 = 0.1;

/// A row to try answers on.
#[derive(Clone, Debug)]
pub struct Row {
    /// The prompt as the model sees it.
    pub prompt: String,
    /// Its columns.
    pub columns: Columns,
    /// Answers one of which should be right: the first, laid out as the rewards ask; others as the data has them.
    pub right: Vec<String>,
    /// The right answer itself, not laid out.
    pub gold: String,
}

/// What is wrong with a reward.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Flaw {
    /// A worthless answer is paid like the right one.
    Exploitable {
        /// Share of rows on which it is.
        rows: f64,
    },
    /// The right answer is not paid more than saying nothing.
    GoldUnpaid,
    /// A value that is infinite or NaN.
    NonFinite {
        /// Rows with one.
        rows: usize,
    },
    /// The same answer was paid differently the second time.
    NotDeterministic {
        /// Rows on which it was.
        rows: usize,
    },
    /// The reward ran out of time on the answer.
    Timeout {
        /// Rows on which it did.
        rows: usize,
    },
    /// The reward failed on the answer.
    Failed {
        /// Rows on which it did; all where it gave up.
        rows: usize,
        /// What it said, where it said something.
        reason: Option<String>,
    },
}

impl Flaw {
    /// Whether it must not be trained with. Running out of time on a hostile answer, which is then paid nothing, is not.
    pub fn is_error(&self) -> bool {
        !matches!(self, Self::Timeout { .. })
    }
}

impl std::fmt::Display for Flaw {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exploitable { rows } => {
                write!(formatter, "paid like the right answer on {:.0} % of rows", 100.0 * rows)
            }
            Self::GoldUnpaid => formatter.write_str("paid no more than an empty answer"),
            Self::NonFinite { rows } => write!(formatter, "not finite on {rows} rows"),
            Self::NotDeterministic { rows } => write!(formatter, "paid differently the second time on {rows} rows"),
            Self::Timeout { rows } => write!(formatter, "ran out of time on {rows} rows"),
            Self::Failed { rows, reason: None } => write!(formatter, "failed on {rows} rows"),
            Self::Failed { reason: Some(reason), .. } => write!(formatter, "failed: {reason}"),
        }
    }
}

/// What one kind of answer is paid.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Paid {
    /// The kind of answer.
    pub answer: &'static str,
    /// Mean reward over the rows that it applies to; `None` where it applies to none, or failed.
    pub reward: Option<f64>,
    /// The mean of each part of the reward, by name.
    pub parts: Vec<(String, f64)>,
    /// What is wrong.
    pub flaws: Vec<Flaw>,
    /// The answer to the first row, to be tried by hand.
    pub example: String,
}

/// The name of the right answer in tables.
pub const GOLD: &str = "right answer";

/// Pays every adversary and, first in the list, the right answer. `tokens` turns an answer into the tokens that rewards of
/// length count.
pub fn lint(reward: &dyn Reward, rows: &[Row], layout: &Layout, tokens: &dyn Fn(&str) -> Vec<u32>) -> Vec<Paid> {
    let mut golds: Vec<String> = rows.iter().map(|row| row.gold.clone()).collect();
    golds.sort_unstable();
    golds.dedup();
    let pay = |answers: Vec<String>| Attempt::new(reward, rows, answers, tokens);

    // Which layout a reward of one's own wants is not known: the right answer is the one of the candidates that it pays best.
    let candidates = rows.iter().map(|row| row.right.len()).max().unwrap_or(0);
    let candidate = |index: usize, row: &Row| row.right.get(index).or(row.right.first()).cloned().unwrap_or_default();
    let tried = (0..candidates).map(|index| pay(rows.iter().map(|row| candidate(index, row)).collect()));
    let gold = tried.reduce(|best, next| if next.mean() > best.mean() { next } else { best });
    let Some(gold) = gold else { return Vec::new() };

    let mut table: Vec<Paid> = vec![gold.paid(GOLD, None)];
    for adversary in ADVERSARIES {
        let answer = |row: &Row| {
            let task = Task { prompt: &row.prompt, gold: &row.gold, golds: &golds, layout };
            (adversary.answer)(&task)
        };
        table.push(pay(rows.iter().map(answer).collect()).paid(adversary.name, Some(&gold)));
    }
    let of_nothing = table[1].reward;
    if table[0].reward.is_none_or(|gold| of_nothing.is_some_and(|nothing| gold <= nothing)) {
        table[0].flaws.push(Flaw::GoldUnpaid);
    }
    table
}

/// One answer to every row, paid twice.
struct Attempt {
    example: String,
    scores: Vec<Option<Score>>,
    /// Rows on which the second payment differed.
    unsteady: usize,
    /// Why there are no scores.
    error: Option<String>,
}

impl Attempt {
    fn new(reward: &dyn Reward, rows: &[Row], answers: Vec<String>, tokens: &dyn Fn(&str) -> Vec<u32>) -> Self {
        let ids: Vec<Vec<u32>> = answers.iter().map(|answer| tokens(answer)).collect();
        let mut batch: Vec<Answer<'_>> = rows
            .iter()
            .zip(answers.iter().zip(&ids))
            .map(|(row, (completion, completion_ids))| Answer {
                prompt_text: &row.prompt,
                completion,
                completion_ids,
                columns: &row.columns,
            })
            .collect();
        let first = reward.score(&batch);
        batch.reverse();
        let second = reward.score(&batch);
        let example = answers.first().cloned().unwrap_or_default();
        match (first, second) {
            (Ok(scores), Ok(mut again)) if scores.len() == rows.len() && again.len() == rows.len() => {
                again.reverse();
                let differs = |(a, b): &(&Option<Score>, &Option<Score>)| match (a, b) {
                    // NaN differs from itself, and is reported as what it is.
                    (Some(a), Some(b)) => a.value.to_bits() != b.value.to_bits() || a.status != b.status,
                    (a, b) => a.is_some() != b.is_some(),
                };
                let unsteady = scores.iter().zip(&again).filter(differs).count();
                Self { example, scores, unsteady, error: None }
            }
            (Err(error), _) | (_, Err(error)) => {
                Self { example, scores: Vec::new(), unsteady: 0, error: Some(error.to_string()) }
            }
            (Ok(scores), _) => {
                let error = format!("{} scores for {} answers", scores.len(), rows.len());
                Self { example, scores: Vec::new(), unsteady: 0, error: Some(error) }
            }
        }
    }

    fn mean(&self) -> Option<f64> {
        let values: Vec<f64> = self.scores.iter().flatten().map(|score| score.value).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    }

    /// Sums up, and compares with what the right answers are paid.
    fn paid(&self, answer: &'static str, gold: Option<&Self>) -> Paid {
        let count =
            |wanted: &dyn Fn(&Score) -> bool| self.scores.iter().flatten().filter(|score| wanted(score)).count();
        let mut flaws = Vec::new();
        let mut flaw = |rows: usize, flaw: fn(usize) -> Flaw| {
            if rows > 0 {
                flaws.push(flaw(rows));
            }
        };
        flaw(count(&|score| !score.value.is_finite()), |rows| Flaw::NonFinite { rows });
        flaw(self.unsteady, |rows| Flaw::NotDeterministic { rows });
        flaw(count(&|score| score.status == Status::Timeout), |rows| Flaw::Timeout { rows });
        flaw(count(&|score| score.status == Status::Error), |rows| Flaw::Failed { rows, reason: None });
        if let Some(reason) = &self.error {
            flaws.push(Flaw::Failed { rows: 0, reason: Some(reason.clone()) });
        }
        if let Some(gold) = gold {
            let both =
                self.scores.iter().zip(&gold.scores).filter_map(|(a, b)| Some((a.as_ref()?.value, b.as_ref()?.value)));
            let both: Vec<(f64, f64)> = both.collect();
            let paid = both.iter().filter(|(worthless, gold)| worthless >= gold).count();
            let rows = paid as f64 / both.len().max(1) as f64;
            if rows > TOLERATED || self.mean().zip(gold.mean()).is_some_and(|(worthless, gold)| worthless >= gold) {
                flaws.push(Flaw::Exploitable { rows });
            }
        }
        let mut parts: Vec<(String, Vec<f64>)> = Vec::new();
        for (name, value) in self.scores.iter().flatten().flat_map(|score| &score.parts) {
            match parts.iter_mut().find(|(known, _)| known == name) {
                Some((_, values)) => values.push(*value),
                None => parts.push((name.clone(), vec![*value])),
            }
        }
        let parts = parts.into_iter().map(|(name, values)| (name, values.iter().sum::<f64>() / values.len() as f64));
        Paid { answer, reward: self.mean(), parts: parts.collect(), flaws, example: self.example.clone() }
    }
}
