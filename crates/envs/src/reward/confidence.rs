//! A bet on one's own answer: the reward of calibrated confidence.
//!
//! "Rewarding Doubt: A Reinforcement Learning Approach to Confidence Calibration of Large Language Models", 2025, arXiv 2503.02623. The answer
//! states an integer confidence `c` from 0 to 10. With `p = min(0.999, max(0.001, c / 10))`
//!
//! ```text
//! s = ln p where the answer is right, else ln (1 - p)
//! n = (s - m) / (M - m),   M = ln 0.999,   m = ln(0.001) / 2
//! R = scale · (n + bonus where the answer is right);     -3 · scale where no confidence can be read
//! ```
//!
//! The logarithmic score is strictly proper: with probability `p*` of being right, `E[s]` is largest at `p = p*` alone, and another `p` loses
//! `KL(Bern(p*) ‖ Bern(p))`. So whoever maximises the reward states what is true. `n` is 1 for the best bet and -1.0003 for the worst. The
//! bonus is the same for every `c` and moves no optimum; it makes "right and sure" worth more than "wrong and sure of that".
//!
//! Where answers are trained too, it must do more. An answer that is surely wrong, with 0 for it, is paid 1; an attempt that is right with
//! probability `p`, and says so, `1 - H(p) / (M - m) + p · bonus`, with `H(p) = - p ln p - (1 - p) ln (1 - p)`. Attempts pay where `bonus > H(p) / (p (M - m))`:
//! with 0.25 those that are right more than seven times in ten, with 1 those that are more than once in twelve. Below that a policy learns to
//! be wrong and to say so.
//!
//! Other scores in its place: Brier's, `n = 1 - 2 (p - j)²`, which is proper too, and the linear one, `n = 2 (j p + (1 - j) (1 - p)) - 1`, which is
//! not: it is largest at 0 or 1.
//!
//! An answer is read as `Answer: <answer>, Confidence: <number>`, at the first place where it stands so; what follows the digits is ignored. It is
//! right if it equals one of the expected answers in lower case, without punctuation and the articles a, an, the, unless there are only articles; where
//! an expected answer is a number, if it is the same number. An answer of which nothing is left is wrong.
//!
//! With `facts = "several"` a reply states any number of facts of this form, each a bet of its own. A fact is right if it shares enough words with an expected
//! answer: `F1 = 2 · common / (words of one + words of the other)` above 1/2. Its number must be whole: `8.5` cannot be read, where a single answer's
//! fraction is lost. A reply is paid the mean over its facts; one without any cannot be read.
//!
//! Each stated confidence is a span of its own ([`SpanScore`]), paid its bet. With `credit = "span"` a policy gradient trains the confidences alone, each by
//! its own bet: answers carry no loss, as in the paper, and how many facts a reply states is not paid for. With credit by whole replies all tokens share the
//! mean, and a reply gains by repeating the fact that it is surest of. A reply without any fact is paid as a whole either way.
//!
//! Deviations from the paper:
//!
//! - With several facts, every confidence is sampled anew there, at temperature 1, after an answer that was sampled at 0.6. Here a reply is sampled once.
//! - An answer to a multiple-choice question cannot be read there if more than one character stands before a colon in it, as in `Rome: a city`. Here it
//!   is read like any other.
//! - Numbers are texts there, so that `-5` is `5` and `1,234` is not `1234`; and of the option `A`, an article, nothing is left, which any
//!   punctuation equals.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Reward, RewardError};
use crate::score::{Answer, Score, SpanScore, Status};
use crate::verify::Rational;
use crate::verify::number::Numbers;

/// How a bet is paid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// The logarithmic score.
    #[default]
    Log,
    /// Brier's score.
    Brier,
    /// The linear score, which rewards overconfidence.
    Linear,
}

/// The largest confidence.
pub const LEVELS: u8 = 10;

impl Scoring {
    /// What a bet of `level` (0 to 10) is paid, without scale and bonus; between 1 and about -1.
    pub fn value(self, level: u8, right: bool) -> f64 {
        let stated = f64::from(level.min(LEVELS)) / f64::from(LEVELS);
        let outcome = f64::from(u8::from(right));
        match self {
            Self::Log => {
                let p = stated.clamp(0.001, 0.999);
                let score = if right { p.ln() } else { (1.0 - p).ln() };
                let (best, worst) = (0.999f64.ln(), 0.001f64.ln() / 2.0);
                (score - worst) / (best - worst)
            }
            Self::Brier => 1.0 - 2.0 * (stated - outcome).powi(2),
            Self::Linear => 2.0 * (outcome * stated + (1.0 - outcome) * (1.0 - stated)) - 1.0,
        }
    }
}

/// What a reply states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Facts {
    /// One answer: the first.
    #[default]
    One,
    /// Any number of them, each with its confidence.
    Several,
}

/// Options of the `confidence` reward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConfidenceOptions {
    /// The column with the expected answer, or a list of answers each of which is right; in it, a list of other names for one of them.
    pub column: String,
    /// What a reply states: one answer, the first, or several, each with a confidence of its own.
    pub facts: Facts,
    /// How a bet is paid.
    pub scoring: Scoring,
    /// Factor of the whole reward; in the paper 10, and 5 with several facts.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub scale: f64,
    /// Added for a right answer, before the factor.
    pub bonus: f64,
    /// Taken for an answer whose confidence cannot be read, before the factor.
    #[schemars(range(min = 0))]
    pub malformed_penalty: f64,
}

impl Default for ConfidenceOptions {
    fn default() -> Self {
        Self {
            column: "answer".into(),
            facts: Facts::One,
            scoring: Scoring::Log,
            scale: 10.0,
            bonus: 0.25,
            malformed_penalty: 3.0,
        }
    }
}

impl ConfidenceOptions {
    /// What a bet is paid; `None` is one that cannot be read.
    pub fn pay(&self, level: Option<u8>, right: bool) -> f64 {
        let value = match level {
            Some(level) => self.scoring.value(level, right) + if right { self.bonus } else { 0.0 },
            None => -self.malformed_penalty,
        };
        self.scale * value
    }

    /// What a reply is paid: the mean over the bets that it states.
    fn score(&self, reply: &str, gold: &[String]) -> Score {
        let stated = self.facts.of(reply);
        let right: Vec<bool> = stated.iter().map(|stated| self.facts.is_right(stated.answer, gold)).collect();
        let paid: Vec<f64> = stated.iter().zip(&right).map(|(stated, &right)| self.pay(stated.level, right)).collect();
        let levels: Vec<f64> =
            stated.iter().filter_map(|stated| Some(f64::from(stated.level?) / f64::from(LEVELS))).collect();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let status = match (levels.is_empty(), right.iter().all(|right| *right)) {
            (true, _) => Status::Malformed,
            (false, true) => Status::Ok,
            (false, false) => Status::Wrong,
        };
        // A reply that states nothing is one bet that cannot be read.
        let mut score = Score::new(if stated.is_empty() { self.pay(None, false) } else { mean(&paid) }, status);
        let spans = stated.iter().zip(paid).map(|(stated, reward)| SpanScore { text: stated.number.clone(), reward });
        score.spans = spans.collect();
        let right: Vec<f64> = right.into_iter().map(|right| f64::from(u8::from(right))).collect();
        score.parts.push(("right".into(), mean(&right)));
        if !levels.is_empty() {
            score.parts.push(("confidence".into(), mean(&levels)));
        }
        if self.facts == Facts::Several {
            score.parts.push(("facts".into(), stated.len() as f64));
        }
        score
    }
}

/// An answer and the confidence stated with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stated<'a> {
    /// The answer.
    pub answer: &'a str,
    /// The confidence, if it is one of 0 to 10.
    pub level: Option<u8>,
    /// Where its number is: bytes of the text.
    pub number: Range<usize>,
}

impl Facts {
    /// What a text states.
    pub fn of(self, text: &str) -> Vec<Stated<'_>> {
        match self {
            Self::One => parse(text).into_iter().collect(),
            Self::Several => parse_all(text),
        }
    }

    /// Whether an answer counts as one of the accepted ones.
    pub fn is_right(self, answer: &str, accepted: &[String]) -> bool {
        let mut accepted = accepted.iter().map(String::as_str);
        match self {
            Self::One => is_right(answer, accepted),
            Self::Several => accepted.any(|accepted| match number(accepted).zip(number(answer)) {
                Some((expected, found)) => expected == found,
                None => token_f1(answer, accepted) > 0.5,
            }),
        }
    }
}

/// Reads the first `Answer: <answer>, Confidence: <number>` of a line.
pub fn parse(text: &str) -> Option<Stated<'_>> {
    let (answer, number) = find(text, 0, |c| c.is_ascii_digit())?;
    let level = text[number.clone()].parse().ok().filter(|level| *level <= LEVELS);
    Some(Stated { answer, level, number })
}

/// Reads every `Answer: <answer>, Confidence: <number>`, each within a line.
pub fn parse_all(text: &str) -> Vec<Stated<'_>> {
    let mut found: Vec<Stated<'_>> = Vec::new();
    let end = |found: &[Stated<'_>]| found.last().map_or(0, |last| last.number.end);
    while let Some((answer, number)) = find(text, end(&found), |c| c.is_ascii_digit() || c == '.') {
        let value = text[number.clone()].parse::<f64>().ok().filter(|value| value.fract() == 0.0);
        let level = value.filter(|value| *value <= f64::from(LEVELS)).map(|value| value as u8);
        found.push(Stated { answer, level, number });
    }
    found
}

/// The first answer from here on with a number of these characters behind it, and where the number is.
fn find(text: &str, from: usize, belongs: impl Fn(char) -> bool) -> Option<(&str, Range<usize>)> {
    let answers = text[from..].match_indices("Answer:").map(|(at, name)| from + at + name.len());
    for start in answers {
        let start = text.len() - text[start..].trim_start().len();
        let line = text[start..].lines().next().unwrap_or_default();
        for (comma, _) in line.match_indices(',') {
            let Some(number) = line[comma + 1..].trim_start().strip_prefix("Confidence:") else { continue };
            let number = number.trim_start();
            let length = number.find(|c: char| !belongs(c)).unwrap_or(number.len());
            if number[..length].contains(|c: char| c.is_ascii_digit()) {
                let at = start + line.len() - number.len();
                return Some((line[..comma].trim_end(), at..at + length));
            }
        }
    }
    None
}

/// The words that two answers share, as the harmonic mean of their shares of both: 1 for the same words, 0 for none in common.
pub fn token_f1(answer: &str, accepted: &str) -> f64 {
    let (answer, accepted) = (normalised(answer), normalised(accepted));
    let mut left: Vec<&str> = accepted.split_whitespace().collect();
    let all = answer.split_whitespace().count() + left.len();
    if all == 0 {
        return 0.0;
    }
    let taken = answer.split_whitespace().filter(|word| {
        let place = left.iter().position(|other| other == word);
        place.map(|place| left.swap_remove(place)).is_some()
    });
    2.0 * taken.count() as f64 / all as f64
}

/// Text as answers are compared: lower case, punctuation and underscores as spaces, no articles beside other words, single
/// spaces.
pub fn normalised(text: &str) -> String {
    let spaced: String = text.to_lowercase().chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let others: Vec<&str> = words.iter().copied().filter(|word| !ARTICLES.contains(word)).collect();
    if others.is_empty() { words.join(" ") } else { others.join(" ") }
}

/// Words that say nothing.
const ARTICLES: [&str; 3] = ["a", "an", "the"];

/// The number that a text is, beside punctuation and articles; `None` for any other text, or if it does not fit.
fn number(text: &str) -> Option<Rational> {
    let mut numbers = Numbers::new(text, true, false);
    let found = numbers.next().filter(|_| numbers.next().is_none())?;
    let (before, after) = (&text[..found.start], &text[found.end..]);
    let apart = !before.ends_with(char::is_alphanumeric) && !after.starts_with(char::is_alphanumeric);
    let silent = |text: &str| normalised(text).split(' ').all(|word| word.is_empty() || ARTICLES.contains(&word));
    found.value.filter(|_| apart && silent(before) && silent(after))
}

/// Whether an answer equals one of the accepted ones: as a number where that is one, else as [`normalised`] text.
pub fn is_right<'a>(answer: &str, accepted: impl IntoIterator<Item = &'a str>) -> bool {
    let (text, value) = (normalised(answer), number(answer));
    accepted.into_iter().any(|accepted| match number(accepted) {
        Some(expected) => value == Some(expected),
        None => !text.is_empty() && normalised(accepted) == text,
    })
}

/// The accepted answers in a column: a text, a number, or a list of these, and of lists of other names.
pub fn accepted(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Number(number) => Some(vec![number.to_string()]),
        Value::Array(list) if !list.is_empty() => {
            Some(list.iter().map(accepted).collect::<Option<Vec<_>>>()?.into_iter().flatten().collect())
        }
        _ => None,
    }
}

/// See [`ConfidenceOptions`].
pub struct ConfidenceReward {
    name: String,
    options: ConfidenceOptions,
}

impl ConfidenceReward {
    /// The reward under a name.
    ///
    /// # Errors
    /// A scale that is not above 0, or a bonus or penalty that is not a number.
    pub fn new(name: String, options: ConfidenceOptions) -> Result<Self, RewardError> {
        let refuse = |key: &str, value: f64, expected: &str| {
            Err(RewardError::Options { reward: name.clone(), reason: format!("{key} is {value}, expected {expected}") })
        };
        if !(options.scale.is_finite() && options.scale > 0.0) {
            return refuse("scale", options.scale, "a number above 0");
        }
        if !options.bonus.is_finite() {
            return refuse("bonus", options.bonus, "a number");
        }
        if !(options.malformed_penalty.is_finite() && options.malformed_penalty >= 0.0) {
            return refuse("malformed_penalty", options.malformed_penalty, "a number of at least 0");
        }
        Ok(Self { name, options })
    }
}

impl Reward for ConfidenceReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |(row, answer): (usize, &Answer<'_>)| {
            let (reward, column) = (self.name.clone(), self.options.column.clone());
            let Some(value) = answer.columns.get(&self.options.column) else {
                return Err(RewardError::MissingColumn { reward, row, column });
            };
            let Some(gold) = accepted(value) else {
                let (found, expected) = (super::shorten(&value.to_string()), "a text, a number or a list of these");
                return Err(RewardError::BadColumn { reward, row, column, found, expected });
            };
            Ok(Some(self.options.score(answer.completion, &gold)))
        };
        answers.iter().enumerate().map(score).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    /// The level with the largest expected score; the lower of equals.
    fn best(scoring: Scoring, p: f64, bonus: f64) -> u8 {
        let expected = |level| p * (scoring.value(level, true) + bonus) + (1.0 - p) * scoring.value(level, false);
        (0..=LEVELS).reduce(|best, level| if expected(level) > expected(best) { level } else { best }).unwrap()
    }

    #[test]
    fn bets_are_paid_by_the_table() {
        let right = [-0.7503, 0.5834, 0.7842, 0.9016, 0.9849, 1.0495, 1.1023, 1.1470, 1.1857, 1.2198, 1.2500];
        let wrong = [1.0000, 0.9698, 0.9357, 0.8970, 0.8523, 0.7995, 0.7349, 0.6516, 0.5342, 0.3334, -1.0003];
        let options = ConfidenceOptions { scale: 1.0, ..Default::default() };
        for level in 0..=LEVELS {
            assert!((options.pay(Some(level), true) - right[usize::from(level)]).abs() < 1e-4, "right, {level}");
            assert!((options.pay(Some(level), false) - wrong[usize::from(level)]).abs() < 1e-4, "wrong, {level}");
        }
        assert!((options.pay(Some(10), true) - options.pay(Some(0), false) - 0.25).abs() < 1e-12);
        assert_eq!(ConfidenceOptions::default().pay(None, true), -30.0);
    }

    #[test]
    fn an_attempt_pays_more_than_being_surely_wrong_where_the_bonus_is_large_enough() {
        let (best, worst) = (0.999f64.ln(), 0.001f64.ln() / 2.0);
        let least = |p: f64| -(p * p.ln() + (1.0 - p) * (1.0 - p).ln()) / (p * (best - worst));
        for (bonus, p) in [(0.25, 0.7), (1.0, 1.0 / 12.0)] {
            assert!((least(p) - bonus).abs() < 0.005, "{bonus}: {}", least(p));
        }
        for (level, p) in (1..LEVELS).map(|level| (level, f64::from(level) / f64::from(LEVELS))) {
            for bonus in [least(p) - 0.01, least(p) + 0.01] {
                let attempt =
                    p * (Scoring::Log.value(level, true) + bonus) + (1.0 - p) * Scoring::Log.value(level, false);
                // The clip moves both ends by a thousandth.
                assert_eq!(attempt > Scoring::Log.value(0, false), bonus > least(p), "{level}, {bonus}");
            }
        }
    }

    #[test]
    fn the_logarithmic_bet_is_best_at_the_true_probability() {
        // Where level k gives way to k + 1: L0 / (L0 + L1), L1 = ln(p_{k+1} / p_k), L0 = ln((1 - p_k) / (1 - p_{k+1})).
        let stated = |level: u8| (f64::from(level) / 10.0).clamp(0.001, 0.999);
        let threshold = |level: u8| {
            let (low, high) = (stated(level), stated(level + 1));
            let (l1, l0) = ((high / low).ln(), ((1.0 - low) / (1.0 - high)).ln());
            l0 / (l0 + l1)
        };
        let table = [0.0222, 0.1452, 0.2477, 0.3489, 0.4497, 0.5503, 0.6511, 0.7523, 0.8548, 0.9778];
        for (level, expected) in (0..LEVELS).zip(table) {
            assert!((threshold(level) - expected).abs() < 5e-5, "{level}");
            assert!((threshold(level) + threshold(9 - level) - 1.0).abs() < 1e-12);
        }
        for step in 0..=1000 {
            let p = f64::from(step) / 1000.0;
            let level = (0..LEVELS).filter(|level| threshold(*level) < p).count() as u8;
            assert_eq!(best(Scoring::Log, p, 0.0), level, "{p}");
            assert_eq!(best(Scoring::Log, p, 0.25), level, "the bonus moves no optimum: {p}");
            // Half a level and a little; more beside the ends, where the clipped 0 and 1 are bets that nobody should make.
            let allowed = if matches!(level, 1 | 9) { 0.078 } else { 0.0551 };
            assert!((f64::from(level) / 10.0 - p).abs() < allowed, "{p}");
        }
    }

    #[test]
    fn the_linear_bet_is_all_or_nothing_and_briers_is_not() {
        // At one half every linear bet is worth the same.
        for step in (0..=100).filter(|step| *step != 50) {
            let p = f64::from(step) / 100.0;
            assert_eq!(best(Scoring::Linear, p, 0.0), if p > 0.5 { 10 } else { 0 }, "{p}");
            assert!((f64::from(best(Scoring::Brier, p, 0.0)) / 10.0 - p).abs() <= 0.0501, "{p}");
        }
    }

    #[test]
    fn answers_are_read_as_the_paper_reads_them() {
        let read = |text| parse(text).map(|stated| (stated.answer, stated.level));
        assert_eq!(read("Answer: Rome, Confidence: 7"), Some(("Rome", Some(7))));
        assert_eq!(read("So. Answer:  Rome, Italy,  Confidence:10."), Some(("Rome, Italy", Some(10))));
        assert_eq!(read("Answer: Rome, Confidence: 7/10"), Some(("Rome", Some(7))));
        assert_eq!(read("Answer: Rome, Confidence: 8.5"), Some(("Rome", Some(8))), "a fraction is lost");
        assert_eq!(read("Answer: Rome, Confidence: 85"), Some(("Rome", None)), "out of range");
        assert_eq!(read("Answer: Rome, Confidence: 99999999999999999999"), Some(("Rome", None)));
        assert_eq!(read("Answer: Rome, Confidence: high"), None);
        assert_eq!(read("Answer: Rome\n, Confidence: 7"), None, "on one line");
        assert_eq!(read("Answer: I do not know. Answer: Rome, Confidence: 2").map(|read| read.1), Some(Some(2)));
        assert_eq!(read("Confidence: 7"), None);
    }

    #[test]
    fn several_facts_are_read_each_with_its_number() {
        let read = |text| parse_all(text).iter().map(|stated| (stated.answer, stated.level)).collect::<Vec<_>>();
        assert_eq!(
            read(
                "Answer: Emma, Confidence: 9\nAnswer: Persuasion, Confidence: 10.\n\nAnswer: Rome, Italy, Confidence:0"
            ),
            [("Emma", Some(9)), ("Persuasion", Some(10)), ("Rome, Italy", Some(0))]
        );
        assert_eq!(
            read("Answer: a, Confidence: 1, Answer: b, Confidence: 2"),
            [("a", Some(1)), ("b", Some(2))],
            "on one line"
        );
        assert_eq!(read("Answer: a, Confidence: 8.5 Answer: b, Confidence: 8.0"), [("a", None), ("b", Some(8))]);
        assert_eq!(read("Answer: a, Confidence: 85\nAnswer: b, Confidence: 1.2.3"), [("a", None), ("b", None)]);
        assert_eq!(read("Answer: a, Confidence: 7/10\nAnswer: é, Confidence: 3"), [("a", Some(7)), ("é", Some(3))]);
        // An answer without a number lends its place to the next one of its line, and to none of the next line.
        assert_eq!(read("Answer: a, Confidence: high\nAnswer: b, Confidence: 2"), [("b", Some(2))]);
        assert_eq!(read("Answer: a, Confidence: ...\nAnswer: b"), []);
        assert_eq!(read(""), []);
        // Where there is one, both ways of reading agree.
        let one = "So. Answer:  Rome, Confidence:10, surely.";
        assert_eq!(parse_all(one), [parse(one).unwrap()]);
    }

    #[test]
    fn facts_are_right_by_more_than_half_of_their_words() {
        assert_eq!(token_f1("The Beatles", "beatles!"), 1.0);
        assert_eq!(
            (token_f1("", "a"), token_f1("!", ""), token_f1("A.", "a")),
            (0.0, 0.0, 1.0),
            "nothing is right in nothing"
        );
        assert_eq!((token_f1("x", ""), token_f1("x", "y")), (0.0, 0.0));
        // A word counts as often as it is there.
        assert!((token_f1("new york new york", "new york") - 2.0 / 3.0).abs() < 1e-15);
        assert!((token_f1("jane austen", "austen") - 2.0 / 3.0).abs() < 1e-15);
        let right = |answer: &str| Facts::Several.is_right(answer, &["Jane Austen".into(), "Emma".into()]);
        assert!(right("austen") && right("emma") && right("Jane Austen, the novelist"));
        assert!(!right("jane smith"), "one half is not enough");
        assert!(!Facts::One.is_right("austen", &["Jane Austen".into()]), "a single answer has to be the same");
        let right = |answer: &str| Facts::Several.is_right(answer, &["5".into()]);
        assert!(right("5.0") && right("5 apples") && !right("-5") && !right("!"));
    }

    #[test]
    fn a_reply_is_paid_the_mean_of_its_bets() {
        let options = ConfidenceOptions { facts: Facts::Several, scale: 5.0, ..Default::default() };
        let gold = accepted(&serde_json::json!([["Jane Austen", "Austen"], "Emma"])).unwrap();
        let paid = options
            .score("Answer: Austen, Confidence: 9\nAnswer: Rome, Confidence: 2\nAnswer: Emma, Confidence: 99", &gold);
        let expected = (options.pay(Some(9), true) + options.pay(Some(2), false) + options.pay(None, true)) / 3.0;
        assert!((paid.value - expected).abs() < 1e-12 && paid.status == Status::Wrong);
        let part = |name: &str| paid.parts.iter().find(|part| part.0 == name).unwrap().1;
        assert_eq!((part("facts"), part("right")), (3.0, 2.0 / 3.0));
        assert!((part("confidence") - 0.55).abs() < 1e-12, "of those that can be read");
        for nothing in ["", "Austen, surely", "Answer: Emma, Confidence: high"] {
            let paid = options.score(nothing, &gold);
            assert_eq!((paid.value, paid.status), (-15.0, Status::Malformed), "{nothing}");
        }
        // Each number is paid its own bet; where there is none, the reply is paid as a whole.
        let reply = "Answer: Austen, Confidence: 9\nAnswer: Rome, Confidence: 10.\nAnswer: Emma, Confidence: 99";
        let spans = options.score(reply, &gold).spans;
        let read: Vec<&str> = spans.iter().map(|span| &reply[span.text.clone()]).collect();
        assert_eq!(read, ["9", "10.", "99"]);
        let bets = [(Some(9), true), (Some(10), false), (None, true)];
        assert!(spans.iter().zip(bets).all(|(span, (level, right))| span.reward == options.pay(level, right)));
        assert!(options.score("Austen, surely", &gold).spans.is_empty());
        // One fact is one answer.
        let (one, reply) = (ConfidenceOptions { scale: 5.0, ..Default::default() }, "Answer: Emma, Confidence: 7");
        let (several, one) = (options.score(reply, &gold), one.score(reply, &gold));
        assert_eq!((several.value, &several.spans), (one.value, &one.spans));
        assert_eq!((one.spans.len(), &reply[one.spans[0].text.clone()]), (1, "7"));
    }

    #[test]
    fn right_answers_may_differ_in_form() {
        assert!(is_right("The  Beatles!", ["beatles"]) && is_right("new_york", ["x", "New York"]));
        assert!(!is_right("beat", ["beatles"]));
        // Numbers are compared as such.
        for (answer, expected) in [
            ("5", "5"),
            ("the **5**.", "5"),
            ("$5", "5"),
            ("5%", "5"),
            ("1234", "1,234"),
            ("1.50", "1.5"),
            ("1/2", "0.5"),
            ("-5", "- 5"),
            ("1914 - 1918", "1914-1918"),
            ("f 16", "F-16"),
        ] {
            assert!(is_right(answer, [expected]) && is_right(expected, [answer]), "{answer:?}, {expected:?}");
        }
        for (answer, expected) in [("-5", "5"), ("-$5", "$5"), ("5", "5a"), ("5", "u5"), ("5 or 6", "5")] {
            assert!(!is_right(answer, [expected]) && !is_right(expected, [answer]), "{answer:?}, {expected:?}");
        }
        assert!(!is_right("1 5", ["1.5"]));
        // The letter of an option is no article, and nothing is no answer.
        assert!(is_right("(A)", ["a"]) && is_right("the", ["The"]));
        for expected in ["A", "", "!", "?!"] {
            assert!(!is_right("", [expected]) && !is_right("!!", [expected]), "{expected:?}");
        }
        assert_eq!(accepted(&serde_json::json!(["a", 3])), Some(vec!["a".into(), "3".into()]));
        assert_eq!(accepted(&serde_json::json!([["a", "b"], 3])), Some(vec!["a".into(), "b".into(), "3".into()]));
        assert_eq!((accepted(&serde_json::json!([])), accepted(&Value::Null)), (None, None));
        assert_eq!(accepted(&serde_json::json!(["a", []])), None);
    }
}
