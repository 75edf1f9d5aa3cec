//! Training methods, one file each. A new method is a new file here: it implements [`crate::method::Method`].

pub mod grpo;
pub mod sft;

use objectives::{Fold, Statistic};

use crate::metrics::Metrics;

/// The statistics of an objective, folded over the pieces of a step.
#[derive(Debug, Default)]
struct Folds(Vec<(&'static str, Fold)>);

impl Folds {
    /// Takes the values of the next piece.
    fn extend(&mut self, statistics: &[Statistic]) {
        for statistic in statistics {
            let place = self.0.iter().position(|(name, _)| *name == statistic.name).unwrap_or_else(|| {
                self.0.push((statistic.name, Fold::new(statistic.reduce)));
                self.0.len() - 1
            });
            self.0[place].1.extend(&statistic.values);
        }
    }

    /// Writes down what was folded; a mean over nothing is left out.
    fn record(&self, metrics: &mut Metrics) {
        for (name, fold) in &self.0 {
            if let Some(value) = fold.value() {
                metrics.set(*name, value);
            }
        }
    }
}
