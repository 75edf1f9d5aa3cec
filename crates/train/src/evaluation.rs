//! How good the model is: measured by whoever runs the training, kept and compared here.

use base::Hint;
use eval::paired::{self, Comparison};
use model::decoder::Decoder;
use serde::{Deserialize, Serialize};

use crate::metrics::Metrics;

/// A number with its 95 % confidence interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    /// What was measured, such as `accuracy`.
    pub name: String,
    /// The estimate.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Problems it is an average of.
    pub items: usize,
}

/// One measurement of the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps done.
    pub step: u64,
    /// The numbers, the most important first.
    pub measures: Vec<Measure>,
    /// For each problem, in a fixed order, whether it was solved; empty where that means nothing, or does not say it all.
    pub solved: Vec<bool>,
    /// Where `solved` would not say it all: for each problem the share of its answers that are right, or nothing where that
    /// cannot be said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<Option<f64>>,
    /// What the model said, one JSON object a problem; written to `samples/` and not kept.
    #[serde(skip)]
    pub samples: Vec<serde_json::Value>,
}

impl Evaluation {
    /// The evaluation as metrics: `eval_NAME`, and the interval as `eval_NAME_low` and `eval_NAME_high`.
    pub fn metrics(&self) -> Metrics {
        let mut metrics = Metrics::new();
        for measure in &self.measures {
            metrics.set(format!("eval_{}", measure.name), measure.value);
            metrics.set(format!("eval_{}_low", measure.name), measure.low);
            metrics.set(format!("eval_{}_high", measure.name), measure.high);
        }
        metrics
    }

    /// The change from an earlier evaluation on the same problems, with a paired test; `None` where the problems differ, or
    /// none of them was judged both times.
    pub fn compare(&self, earlier: &Self, seed: u64) -> Option<Comparison> {
        let (before, after) = (earlier.shares(), self.shares());
        let paired = before.len() == after.len();
        paired.then(|| paired::compare(&before, &after, eval::interval::RESAMPLES, seed)).flatten()
    }

    /// The share of right answers to each problem.
    fn shares(&self) -> Vec<Option<f64>> {
        match self.solved.is_empty() {
            true => self.shares.clone(),
            false => self.solved.iter().map(|solved| Some(f64::from(u8::from(*solved)))).collect(),
        }
    }
}

/// Why an evaluation failed: any error with advice.
pub type EvaluationError = Box<dyn Hint + Send + Sync>;

/// Whoever measures the model. The same weights must give the same evaluation.
pub trait Evaluator {
    /// Measures the model; `progress` takes the problems done and all problems.
    ///
    /// # Errors
    /// Whatever makes the measurement impossible.
    fn evaluate(
        &mut self,
        decoder: &Decoder,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Evaluation, EvaluationError>;
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn problems_that_were_not_judged_both_times_change_nothing() {
        let solved = |solved: &[bool]| Evaluation { solved: solved.to_vec(), ..Evaluation::default() };
        let shares = |shares: &[Option<f64>]| Evaluation { shares: shares.to_vec(), ..Evaluation::default() };
        let change = solved(&[true, true]).compare(&solved(&[false, true]), 0).unwrap();
        assert_eq!((change.difference, change.gained, change.lost), (0.5, 1, 0));
        // One that the reward does not apply to later on is not lost.
        let later = shares(&[Some(1.0), Some(1.0), None]);
        assert_eq!(later.compare(&solved(&[false, true, true]), 0), Some(change));
        // All answers of a problem count.
        let change = shares(&[Some(0.75), Some(0.0)]).compare(&shares(&[Some(0.5), Some(0.0)]), 0).unwrap();
        assert_eq!((change.difference, change.gained, change.shares), (0.125, 1, true));
        assert_eq!(shares(&[None]).compare(&solved(&[true]), 0), None);
        assert_eq!(solved(&[true]).compare(&solved(&[true, true]), 0), None, "the problems differ");
        assert_eq!(Evaluation::default().compare(&Evaluation::default(), 0), None);
        // What one answer to each problem leaves behind is as it would be without shares.
        assert!(!serde_json::to_string(&solved(&[true])).unwrap().contains("shares"));
    }
}
