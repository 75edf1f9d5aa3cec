//! Which of two completions the model itself finds more likely: how preference methods are measured on held-out pairs.
//!
//! - `preference_accuracy`: share of pairs whose chosen completion is the more likely one, with Wilson's interval.
//! - `preference_margin`: mean difference of the two log-probabilities, with a bootstrapped interval.
//!
//! Log-probabilities are sums or means over a completion's tokens, as the objective has them. There is no reference in it:
//! the share is that of the model before training too, where rewards relative to a reference would all be 0.

use data::PreferencePair;
use eval::interval::{RESAMPLES, bootstrap_mean, wilson};
use model::decoder::{Decoder, Workspace};
use objectives::Length;

use crate::evaluation::Measure;
use crate::pass::Unit;
use crate::update::{Batch, Reading};

/// Held-out pairs.
#[derive(Clone, Debug)]
pub struct Preferred {
    /// The pairs.
    pub pairs: Vec<PreferencePair>,
    /// How the log-probabilities of tokens become one.
    pub length: Length,
    /// Rows computed at once. Results do not depend on it.
    pub micro_batch_tokens: usize,
    /// Seed of the bootstrap.
    pub seed: u64,
}

impl Preferred {
    /// The measures of a model, prepared for use, and for each pair whether its chosen completion is the more likely one.
    ///
    /// # Errors
    /// Those of the forward pass.
    pub fn measure(&self, decoder: &Decoder) -> model::Result<(Vec<Measure>, Vec<bool>)> {
        let batch = Batch::new(self.pairs.iter().map(|pair| Unit::of_pair(pair, 2)).collect());
        let reading = Reading::plain(self.micro_batch_tokens);
        let found = batch.log_probs(decoder, &mut Workspace::new(), 0..batch.units(), reading)?;
        let mut tokens = found.log_prob.into_iter().map(f64::from);
        let log_probs: Vec<f64> = batch
            .lengths()
            .iter()
            .map(|&length| {
                let sum: f64 = tokens.by_ref().take(length).sum();
                match self.length {
                    Length::Sum => sum,
                    Length::Mean => sum / length.max(1) as f64,
                }
            })
            .collect();
        let margins: Vec<f64> = log_probs.chunks_exact(2).map(|pair| pair[0] - pair[1]).collect();
        let right: Vec<bool> = margins.iter().map(|margin| *margin > 0.0).collect();
        let (items, count) = (margins.len(), right.iter().filter(|right| **right).count());
        let measure = |name: &str, value: f64, interval: eval::interval::Interval| Measure {
            name: name.into(),
            value,
            low: interval.low,
            high: interval.high,
            items,
        };
        let mean = margins.iter().sum::<f64>() / items.max(1) as f64;
        let measures = vec![
            measure("preference_accuracy", count as f64 / items.max(1) as f64, wilson(count, items)),
            measure("preference_margin", mean, bootstrap_mean(&margins, RESAMPLES, self.seed)),
        ];
        Ok((measures, right))
    }
}
