//! Whether stated confidences are true: calibration error, discrimination, reliability.
//!
//! With `c_i` the confidence stated for answer `i`, within [0, 1], and `j_i` whether it is right:
//!
//! | | value |
//! | --- | --- |
//! | expected calibration error | `Σ_b n_b/N · abs(mean j - mean c)` over 11 bins of equal width (Naeini et al. 2015) |
//! | AUROC | probability that a right answer was stated with more confidence than a wrong one, ties 1/2 (Mann and Whitney 1947) |
//! | Brier score | mean of `(c - j)²` (Brier 1950) |
//!
//! With 11 bins each of the levels 0, 0.1, .., 1 has a bin of its own.
//!
//! Intervals are percentiles of 2,000 bootstrap resamples of the questions, with all their answers, and those of a difference between two models are paired:
//! both answer the same resample. Noise only adds to a calibration error, in a resample once more, so that its interval leans upwards.

use serde::Serialize;

use crate::interval::{Interval, percentiles, resampled, wilson};
use crate::metrics::mean;

/// Resamples of an interval.
const RESAMPLES: u32 = 2_000;

/// Bins of the calibration error.
pub const BINS: usize = 11;

/// How well confidences fit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Calibration {
    /// Answers.
    pub answers: usize,
    /// Share of right ones.
    pub accuracy: f64,
    /// Mean confidence.
    pub confidence: f64,
    /// Expected calibration error.
    pub ece: f64,
    /// Area under the ROC curve of confidence as a predictor of being right; `None` where all answers are right, or none.
    pub auroc: Option<f64>,
    /// Brier score.
    pub brier: f64,
    /// The bins that hold answers, by confidence.
    pub bins: Vec<Bin>,
}

/// The answers whose confidence is in one range.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bin {
    /// How many.
    pub answers: usize,
    /// Their mean confidence.
    pub confidence: f64,
    /// The share of right ones.
    pub accuracy: f64,
    /// Its 95 % interval.
    pub interval: Interval,
}

/// Measures pairs of confidence and outcome; confidences outside [0, 1] are moved to its ends. `None` without any.
pub fn calibration(stated: &[(f64, bool)]) -> Option<Calibration> {
    if stated.is_empty() {
        return None;
    }
    let stated: Vec<(f64, bool)> =
        stated.iter().map(|&(confidence, right)| (confidence.clamp(0.0, 1.0), right)).collect();
    let outcome = |right: bool| f64::from(u8::from(right));
    let of = |value: &dyn Fn(&(f64, bool)) -> f64| mean(&stated.iter().map(value).collect::<Vec<_>>());
    let bin = |index: usize| {
        // 1 belongs to the last bin.
        let inside = |confidence: f64| ((confidence * BINS as f64) as usize).min(BINS - 1) == index;
        let members: Vec<(f64, bool)> = stated.iter().copied().filter(|(confidence, _)| inside(*confidence)).collect();
        let right = members.iter().filter(|(_, right)| *right).count();
        (!members.is_empty()).then(|| Bin {
            answers: members.len(),
            confidence: mean(&members.iter().map(|(confidence, _)| *confidence).collect::<Vec<_>>()),
            accuracy: right as f64 / members.len() as f64,
            interval: wilson(right, members.len()),
        })
    };
    let bins: Vec<Bin> = (0..BINS).filter_map(bin).collect();
    let distance = |bin: &Bin| bin.answers as f64 / stated.len() as f64 * (bin.accuracy - bin.confidence).abs();
    Some(Calibration {
        answers: stated.len(),
        accuracy: of(&|(_, right)| outcome(*right)),
        confidence: of(&|(confidence, _)| *confidence),
        ece: bins.iter().map(distance).sum(),
        auroc: auroc(&stated),
        brier: of(&|(confidence, right)| (confidence - outcome(*right)).powi(2)),
        bins,
    })
}

/// The confidence and the outcome of each answer to a question whose confidence can be read.
pub type Question = Vec<(f64, bool)>;

/// Accuracy, calibration error, AUROC and Brier score, or what belongs to each; `None` where they are not defined.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Measures<T> {
    /// Of the share of right answers.
    pub accuracy: Option<T>,
    /// Of the expected calibration error.
    pub ece: Option<T>,
    /// Of the area under the ROC curve.
    pub auroc: Option<T>,
    /// Of the Brier score.
    pub brier: Option<T>,
}

/// A measure, for short.
type Measure = fn(&Calibration) -> Option<f64>;

impl<T> Measures<T> {
    fn of(make: impl Fn(Measure) -> Option<T>) -> Self {
        Self {
            accuracy: make(|found| Some(found.accuracy)),
            ece: make(|found| Some(found.ece)),
            auroc: make(|found| found.auroc),
            brier: make(|found| Some(found.brier)),
        }
    }
}

/// The calibration of the answers to some questions.
fn of_rows(questions: &[Question], rows: &[usize]) -> Option<Calibration> {
    let stated: Vec<(f64, bool)> = rows.iter().flat_map(|&row| questions[row].iter().copied()).collect();
    calibration(&stated)
}

/// The 95 % intervals of the measures.
pub fn intervals(questions: &[Question], seed: u64) -> Measures<Interval> {
    let found = resampled(questions.len(), RESAMPLES, seed, |rows| of_rows(questions, rows));
    Measures::of(|measure| percentiles(found.iter().flatten().filter_map(measure).collect()))
}

/// A difference and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The second less the first.
    pub difference: f64,
    /// Its interval.
    pub interval: Interval,
}

/// By how much the measures of `after` exceed those of `before`, which answer the same questions in the same order.
///
/// # Panics
/// Where the numbers of questions differ.
pub fn differences(before: &[Question], after: &[Question], seed: u64) -> Measures<Difference> {
    assert_eq!(before.len(), after.len(), "both answer the same questions");
    let all: Vec<usize> = (0..before.len()).collect();
    let both = |rows: &[usize]| Some((of_rows(before, rows)?, of_rows(after, rows)?));
    let (found, whole) = (resampled(all.len(), RESAMPLES, seed, both), both(&all));
    Measures::of(|measure| {
        let difference = |(before, after): &(Calibration, Calibration)| Some(measure(after)? - measure(before)?);
        let interval = percentiles(found.iter().flatten().filter_map(difference).collect())?;
        Some(Difference { difference: difference(whole.as_ref()?)?, interval })
    })
}

/// The area under the ROC curve by ranks; `None` where a class is missing.
pub fn auroc(stated: &[(f64, bool)]) -> Option<f64> {
    let mut sorted: Vec<(f64, bool)> = stated.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut wins, mut wrong_below, mut start) = (0.0, 0.0, 0);
    while start < sorted.len() {
        let tied = sorted[start..].iter().take_while(|other| other.0 == sorted[start].0).count();
        let right = sorted[start..start + tied].iter().filter(|(_, right)| *right).count() as f64;
        let wrong = tied as f64 - right;
        wins += right * (wrong_below + wrong / 2.0);
        wrong_below += wrong;
        start += tied;
    }
    let right = stated.len() as f64 - wrong_below;
    (right > 0.0 && wrong_below > 0.0).then(|| wins / (right * wrong_below))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use base::{Purpose, Random};

    use super::*;

    #[test]
    fn every_level_has_a_bin_of_its_own() {
        let stated: Vec<(f64, bool)> = (0..=10).map(|level| (f64::from(level) / 10.0, true)).collect();
        let found = calibration(&stated).unwrap();
        assert_eq!(found.bins.len(), 11);
        assert!(found.bins.iter().all(|bin| bin.answers == 1));
        assert!((found.ece - 0.5).abs() < 1e-12 && found.auroc.is_none());
    }

    #[test]
    fn a_hand_made_example() {
        let stated = [(0.9, true), (0.9, false), (0.2, false), (0.2, false), (0.9, true)];
        let found = calibration(&stated).unwrap();
        let ece = 0.6 * (0.9 - 2.0 / 3.0) + 0.4 * 0.2;
        assert!((found.ece - ece).abs() < 1e-12, "{found:?}");
        assert!((found.brier - (0.01 + 0.81 + 0.04 + 0.04 + 0.01) / 5.0).abs() < 1e-12);
        // Of six pairs of a right and a wrong answer two are tied and four in order.
        assert!((found.auroc.unwrap() - 5.0 / 6.0).abs() < 1e-12);
        assert_eq!((found.answers, found.accuracy), (5, 0.4));
        assert_eq!(calibration(&[]), None);
    }

    /// Questions with two answers each, right with probability 0.7, whose confidence says so where `skill` is large.
    fn questions(skill: f64, seed: u64) -> Vec<Question> {
        let random = Random::new(seed, Purpose::Test);
        let answer = |random: Random| {
            let right = random.at(0).uniform() < 0.7;
            let known = if random.at(1).uniform() < skill { f64::from(u8::from(right)) } else { 0.7 };
            ((10.0 * known).round() / 10.0, right)
        };
        (0..300).map(|row| (0..2).map(|sample| answer(random.prompt(row).sample(sample))).collect()).collect()
    }

    #[test]
    fn intervals_hold_the_measure_and_differences_are_paired() {
        let (dull, sharp) = (questions(0.2, 1), questions(0.8, 1));
        let found = calibration(&sharp.concat()).unwrap();
        let intervals = intervals(&sharp, 0);
        assert!(
            intervals.auroc.unwrap().contains(found.auroc.unwrap()) && intervals.brier.unwrap().contains(found.brier)
        );
        let gain = differences(&dull, &sharp, 0);
        let auroc = gain.auroc.unwrap();
        assert!(auroc.interval.contains(auroc.difference) && auroc.interval.low > 0.0);
        assert!(gain.brier.unwrap().interval.high < 0.0);
        // The same answers differ by exactly nothing, however the questions are drawn.
        let none = differences(&sharp, &sharp, 0);
        assert_eq!(none.ece.unwrap(), Difference { difference: 0.0, interval: Interval { low: 0.0, high: 0.0 } });
        // Nobody wrong: no AUROC, neither of the whole nor of a resample.
        assert_eq!(super::intervals(&[vec![(0.9, true)], vec![(0.8, true)]], 0).auroc, None);
        assert_eq!(
            super::intervals(&[vec![], vec![]], 0),
            Measures { accuracy: None, ece: None, auroc: None, brier: None }
        );
    }

    #[test]
    fn true_probabilities_are_calibrated_up_to_the_noise_of_sampling() {
        let random = Random::new(1, Purpose::Test);
        let answer = |i: u32| {
            let level = f64::from(i % 11) / 10.0;
            (level, random.at(i).uniform() < level)
        };
        let found = calibration(&(0..22_000).map(answer).collect::<Vec<_>>()).unwrap();
        assert!(found.ece < 0.01, "{}", found.ece);
        assert!(found.auroc.unwrap() > 0.8);
    }
}
