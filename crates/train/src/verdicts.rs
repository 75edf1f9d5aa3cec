//! How good a model that scores is on held-out rows: the evaluation of reward models.
//!
//! - Pairs: `accuracy`, the share whose chosen completion scores higher, with Wilson's interval (where there are ties, which count half, a
//!   bootstrapped one); `margin`, the mean difference.
//! - Labels (`bce`): `accuracy`, the share on the right side of 0. Scores (`mse`): `mse`, the mean squared error.
//! - Steps: `accuracy`, the mean over solutions of the share of right verdicts on their steps.
//!
//! Intervals of means are bootstrapped over rows.

use data::Example;
use eval::interval::{Interval, RESAMPLES, bootstrap_mean, wilson};
use model::decoder::{Decoder, Workspace};
use model::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::evaluation::{Evaluation, EvaluationError, Evaluator, Measure};
use crate::methods::reward_model::{RewardLoss, RewardRows};
use crate::scoring::{Batch, Scored, Unit};

/// Held-out rows of a model that scores.
pub enum Held {
    /// Of a reward model that learns from them by this loss.
    Whole(RewardRows, RewardLoss),
    /// Of a process reward model.
    Steps(Vec<data::StepwiseExample>),
}

impl Held {
    /// The number of rows.
    pub fn len(&self) -> usize {
        match self {
            Self::Whole(rows, _) => rows.len(),
            Self::Steps(examples) => examples.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn batch(&self) -> Batch<'_> {
        match self {
            Self::Whole(rows, _) => Batch::new(rows.units(&(0..rows.len()).collect::<Vec<_>>())),
            Self::Steps(examples) => {
                let units = examples.iter().map(|example| {
                    let at = example.steps.iter().map(|(place, _)| *place).collect();
                    Unit::new(vec![Scored { ids: &example.ids, at }])
                });
                Batch::new(units.collect())
            }
        }
    }
}

/// Measures on held-out rows.
pub struct Verdicts<'a> {
    /// The rows.
    pub held: Held,
    /// What turns their tokens into text, for those who want to see them.
    pub tokenizer: &'a Tokenizer,
    /// Rows computed at once. Has no influence on the result.
    pub micro_batch_tokens: usize,
    /// Seed of bootstrapped intervals.
    pub seed: u64,
}

impl Evaluator for Verdicts<'_> {
    fn evaluate(
        &mut self,
        decoder: &Decoder,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Evaluation, EvaluationError> {
        let batch = self.held.batch();
        let scores = batch
            .scores(decoder, &mut Workspace::new(), self.micro_batch_tokens)
            .map_err(|error| Box::new(error) as EvaluationError)?;
        progress(self.held.len(), self.held.len());
        let mut scores: Vec<f64> = scores.into_iter().map(f64::from).collect();
        if let Held::Whole(..) = self.held {
            // Of several outputs the first is the reward.
            let outputs = scores.len() / batch.items().max(1);
            scores = scores.into_iter().step_by(outputs.max(1)).collect();
        }
        let bootstrapped = |values: &[f64]| bootstrap_mean(values, RESAMPLES, self.seed);
        let mut found = match &self.held {
            Held::Whole(RewardRows::Pairs(_), _) => {
                let margins: Vec<f64> = scores.chunks_exact(2).map(|pair| pair[0] - pair[1]).collect();
                let margin = measure("margin", &margins, bootstrapped(&margins));
                if margins.contains(&0.0) {
                    // Neither right nor wrong, so that pair by pair there is nothing to compare.
                    let halves: Vec<f64> = margins.iter().map(|margin| 0.5 + 0.5 * sign(*margin)).collect();
                    let accuracy = measure("accuracy", &halves, bootstrapped(&halves));
                    Evaluation { measures: vec![accuracy, margin], ..Evaluation::default() }
                } else {
                    let solved: Vec<bool> = margins.iter().map(|margin| *margin > 0.0).collect();
                    Evaluation { measures: vec![share("accuracy", &solved), margin], solved, ..Evaluation::default() }
                }
            }
            Held::Whole(RewardRows::Scored(examples), RewardLoss::Mse) => {
                let errors: Vec<f64> =
                    examples.iter().zip(&scores).map(|(example, score)| (score - example.score).powi(2)).collect();
                Evaluation { measures: vec![measure("mse", &errors, bootstrapped(&errors))], ..Evaluation::default() }
            }
            Held::Whole(RewardRows::Scored(examples), _) => {
                let right = |(example, score): (&data::ScoredExample, &f64)| (*score > 0.0) == (example.score > 0.5);
                let solved: Vec<bool> = examples.iter().zip(&scores).map(right).collect();
                Evaluation { measures: vec![share("accuracy", &solved)], solved, ..Evaluation::default() }
            }
            Held::Steps(examples) => {
                let outputs = scores.len() / batch.items().max(1);
                let mut verdicts = scores.chunks_exact(outputs.max(1)).map(|outputs| match outputs {
                    [wrong, right] => right - wrong,
                    outputs => outputs[0],
                });
                let shares: Vec<f64> = examples
                    .iter()
                    .map(|example| {
                        let right = |(_, label): &&(usize, f64)| {
                            verdicts.next().is_some_and(|verdict| (verdict > 0.0) == (*label > 0.5))
                        };
                        example.steps.iter().filter(right).count() as f64 / example.steps.len() as f64
                    })
                    .collect();
                let solved = shares.iter().map(|share| *share == 1.0).collect();
                let measures = vec![measure("accuracy", &shares, bootstrapped(&shares))];
                Evaluation { measures, solved, ..Evaluation::default() }
            }
        };
        found.samples = self.samples(&scores, &found.solved);
        Ok(found)
    }
}

impl Verdicts<'_> {
    /// Every row with its scores, to be read.
    fn samples(&self, scores: &[f64], solved: &[bool]) -> Vec<Value> {
        let text = |ids: &[u32]| self.tokenizer.decode(ids);
        // The prompt and the rest, of an example.
        let split = |example: &Example| {
            let given = example.loss_mask.iter().take_while(|learnt| !**learnt).count();
            (text(&example.ids[..given]), text(&example.ids[given..]))
        };
        let mut scores = scores.iter();
        let mut line = |text: &str| format!("{:+.2}  {text}", scores.next().copied().unwrap_or_default());
        let rows: Vec<(String, String)> = match &self.held {
            Held::Whole(RewardRows::Pairs(pairs), _) => pairs
                .iter()
                .map(|pair| {
                    let ((prompt, chosen), (_, rejected)) = (split(&pair.chosen), split(&pair.rejected));
                    (prompt, format!("{}\n{}", line(&chosen), line(&rejected)))
                })
                .collect(),
            Held::Whole(RewardRows::Scored(examples), _) => examples
                .iter()
                .map(|scored| split(&scored.example))
                .map(|(prompt, text)| (prompt, line(&text)))
                .collect(),
            // What a row of steps says is in its labels.
            Held::Steps(_) => Vec::new(),
        };
        let sample = |(index, (question, completion)): (usize, (String, String))| json!({ "question": question, "completion": completion, "solved": solved.get(index) });
        rows.into_iter().enumerate().map(sample).collect()
    }
}

/// -1, 0 or 1.
fn sign(x: f64) -> f64 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

fn share(name: &str, right: &[bool]) -> Measure {
    let count = right.iter().filter(|right| **right).count();
    let values: Vec<f64> = right.iter().map(|right| f64::from(u8::from(*right))).collect();
    measure(name, &values, wilson(count, right.len()))
}

fn measure(name: &str, values: &[f64], interval: Interval) -> Measure {
    let value = eval::metrics::mean(values);
    Measure { name: name.into(), value, low: interval.low, high: interval.high, items: values.len() }
}
