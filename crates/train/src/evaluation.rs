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
    /// For each problem, in a fixed order, whether it was solved; empty where that means nothing.
    pub solved: Vec<bool>,
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

    /// The change from an earlier evaluation on the same problems, with a paired test; `None` where the problems differ.
    pub fn compare(&self, earlier: &Self, seed: u64) -> Option<Comparison> {
        let paired = !self.solved.is_empty() && self.solved.len() == earlier.solved.len();
        paired.then(|| paired::compare(&earlier.solved, &self.solved, eval::interval::RESAMPLES, seed))
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
