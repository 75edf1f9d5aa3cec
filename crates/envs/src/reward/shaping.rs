//! Reward shaping: what the policy is paid, made of what a reward says and of what it says of reference answers.
//!
//! A learned reward is a guide near the answers that it was trained on and a fiction far from them. With `r` the reward of an answer and
//! `r_1 .. r_M` those of reference answers to the same prompt (of the model that training starts from, scored once beforehand), PAR pays
//! the probability that the answer is preferred to a reference:
//!
//! ```text
//! PAR(r) = 1/M Σ_m σ(k (r - r_m))
//! ```
//!
//! It is bounded, grows fastest where training starts (`r ≈ r_m`) and ever more slowly where rewards begin to be hacked. The others are what
//! the paper compares it with ("Reward Shaping to Mitigate Reward Hacking in RLHF", Fu et al. 2025, arXiv 2502.18770):
//!
//! | `type` | value | |
//! | --- | --- | --- |
//! | `par` | `1/M Σ_m σ(k (r - r_m))` | bounded, centred |
//! | `centered` | `1/M Σ_m (r - r_m)` | linear: nothing is bounded |
//! | `tanh` | `1/M Σ_m tanh(r - r_m)`; `tanh(r)` without `centered` | |
//! | `polynomial` | `1/M Σ_m p(r - r_m)`; `p(r)` without `centered` | `p`: σ's fit of degree 5 on [-5, 5], 0 and 1 outside |
//! | `sigmoid` | `σ(k r)` | bounded, not centred |
//! | `slow_growth` | `1/M Σ_m σ(k (r - 3 - r_m))` | grows slowly where training starts (the paper's SgFc) |
//! | `log_sigmoid` | `log σ(r - q)`, `q = mean(r_m) + 1.0364 sd(r_m)` | LSC: bounded above, by the references' 85th percentile |
//! | `ceiling` | `min(r, ceiling)` | |
//! | `mean_std` | `(r - mean) / sd` | of all rewards so far |
//! | `clip` | `min(max(r, mean - sd), mean + sd)` | of all rewards so far |
//! | `min_max` | `(r - min) / (max - min)`, 0 where they are equal | of all rewards so far |
//!
//! The last three carry their statistics from step to step ([`Running`]); a batch enters them before its own rewards are shaped.
//!
//! Deviations from the authors' code:
//! 1. A shaping that compares with references refuses a row without any; the code falls back to the raw reward.
//! 2. Their length penalty is a reward of its own (`type = "length"`).

use std::sync::{Mutex, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Reward, RewardError};
use crate::score::{Answer, Score};

/// How a reward is shaped before it is paid. The reference rewards of a row are the numbers in its column `references`, which
/// `posttrain reward references` writes: a list, or a table with a list for each reward by its name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Shaping {
    /// Preference as reward: the mean probability, by the reward itself, of being preferred to a reference.
    Par {
        /// Steepness.
        #[serde(default = "one")]
        k: f64,
    },
    /// The mean difference to the references.
    Centered,
    /// The hyperbolic tangent.
    Tanh {
        /// Of the difference to the references instead of the reward.
        #[serde(default = "yes")]
        centered: bool,
    },
    /// The polynomial of degree 5 that is nearest to the logistic function on [-5, 5].
    Polynomial {
        /// Of the difference to the references instead of the reward.
        #[serde(default = "yes")]
        centered: bool,
    },
    /// The logistic function of the reward itself.
    Sigmoid {
        /// Steepness.
        #[serde(default = "one")]
        k: f64,
    },
    /// PAR, moved to where it grows slowly at first and saturates fast.
    SlowGrowth {
        /// Steepness.
        #[serde(default = "one")]
        k: f64,
    },
    /// The logarithm of the logistic function of the distance to the references' 85th percentile.
    LogSigmoid,
    /// No more than a ceiling.
    Ceiling {
        /// The most that is paid.
        ceiling: f64,
    },
    /// Standardised by all rewards so far.
    MeanStd,
    /// Held within one standard deviation of the mean of all rewards so far.
    Clip,
    /// The place between the least and the largest reward so far.
    MinMax,
}

fn one() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

/// The column of a row that holds its reference rewards: a list of numbers, or a table with a list for each reward by its name.
pub const REFERENCES: &str = "references";

impl Shaping {
    /// Whether rows need reference rewards.
    pub fn needs_references(&self) -> bool {
        match self {
            Self::Par { .. } | Self::Centered | Self::SlowGrowth { .. } | Self::LogSigmoid => true,
            Self::Tanh { centered } | Self::Polynomial { centered } => *centered,
            Self::Sigmoid { .. } | Self::Ceiling { .. } | Self::MeanStd | Self::Clip | Self::MinMax => false,
        }
    }

    /// Whether the value depends on the rewards of earlier batches.
    fn is_running(&self) -> bool {
        matches!(self, Self::MeanStd | Self::Clip | Self::MinMax)
    }

    /// What is paid for reward `r`, where the references of its prompt have the rewards `references` and all answers so far those in `seen`.
    /// Without references, a shaping that needs them gives NaN.
    pub fn value(&self, r: f64, references: &[f64], seen: &Running) -> f64 {
        let mean_over = |f: &dyn Fn(f64) -> f64| {
            references.iter().map(|reference| f(r - reference)).sum::<f64>() / references.len() as f64
        };
        match *self {
            Self::Par { k } => mean_over(&|z| sigmoid(k * z)),
            Self::Centered => mean_over(&|z| z),
            Self::Tanh { centered: true } => mean_over(&f64::tanh),
            Self::Tanh { centered: false } => r.tanh(),
            Self::Polynomial { centered: true } => mean_over(&polynomial),
            Self::Polynomial { centered: false } => polynomial(r),
            Self::Sigmoid { k } => sigmoid(k * r),
            Self::SlowGrowth { k } => mean_over(&|z| sigmoid(k * (z - 3.0))),
            Self::LogSigmoid => {
                let mean = references.iter().sum::<f64>() / references.len() as f64;
                log_sigmoid(r - mean - PERCENTILE_85 * standard_deviation(references, mean))
            }
            Self::Ceiling { ceiling } => r.min(ceiling),
            Self::MeanStd => (r - seen.mean()) / seen.standard_deviation(),
            Self::Clip => {
                let (mean, deviation) = (seen.mean(), seen.standard_deviation());
                r.clamp(mean - deviation, mean + deviation)
            }
            Self::MinMax if seen.max > seen.min => (r - seen.min) / (seen.max - seen.min),
            Self::MinMax => 0.0,
        }
    }
}

/// The standard normal quantile at 0.85, as the paper rounds it.
const PERCENTILE_85: f64 = 1.0364;

/// `1 / (1 + e^-z)`, without overflow.
pub fn sigmoid(z: f64) -> f64 {
    let small = (-z.abs()).exp();
    if z >= 0.0 { 1.0 / (1.0 + small) } else { small / (1.0 + small) }
}

/// `log σ(z)`, finite for every finite `z`.
pub fn log_sigmoid(z: f64) -> f64 {
    z.min(0.0) - (-z.abs()).exp().ln_1p()
}

/// The least-squares fit of degree 5 to σ on [-5, 5], 0 and 1 outside of it.
pub fn polynomial(z: f64) -> f64 {
    const ODD: [f64; 3] = [0.229_327_750, -0.010_259_585_4, 0.000_208_297_981];
    match z {
        z if z < -5.0 => 0.0,
        z if z > 5.0 => 1.0,
        z => 0.5 + z * (ODD[0] + z * z * (ODD[1] + z * z * ODD[2])),
    }
}

/// The sample standard deviation; 0 for one value.
fn standard_deviation(values: &[f64], mean: f64) -> f64 {
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / values.len().saturating_sub(1).max(1) as f64).sqrt()
}

/// Statistics of all rewards so far, folded in order (Welford, 1962).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Running {
    count: u64,
    mean: f64,
    squares: f64,
    min: f64,
    max: f64,
}

impl Running {
    /// Takes in one reward.
    pub fn see(&mut self, reward: f64) {
        self.count += 1;
        let distance = reward - self.mean;
        self.mean += distance / self.count as f64;
        self.squares += distance * (reward - self.mean);
        let first = self.count == 1;
        self.min = if first { reward } else { self.min.min(reward) };
        self.max = if first { reward } else { self.max.max(reward) };
    }

    /// The mean.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// The sample standard deviation; 1 where nothing varies, so that one can divide by it.
    pub fn standard_deviation(&self) -> f64 {
        match self.squares > 0.0 {
            true => (self.squares / (self.count - 1) as f64).sqrt(),
            false => 1.0,
        }
    }
}

/// A reward that is shaped before it is paid. The raw reward stays visible as the part `raw`.
pub struct Shaped {
    reward: Box<dyn Reward>,
    shaping: Shaping,
    seen: Mutex<Running>,
}

impl Shaped {
    /// Shapes `reward`.
    pub fn new(reward: Box<dyn Reward>, shaping: Shaping) -> Self {
        Self { reward, shaping, seen: Mutex::default() }
    }

    /// The reference rewards of a row.
    fn references(&self, row: usize, answer: &Answer<'_>) -> Result<Vec<f64>, RewardError> {
        if !self.shaping.needs_references() {
            return Ok(Vec::new());
        }
        let column = REFERENCES.to_owned();
        let Some(value) = answer.columns.get(REFERENCES) else {
            return Err(RewardError::MissingColumn { reward: self.name().into(), row, column });
        };
        let own = value.get(self.name()).unwrap_or(value);
        let numbers: Option<Vec<f64>> = own.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        numbers.filter(|numbers| !numbers.is_empty()).ok_or_else(|| RewardError::BadColumn {
            reward: self.name().into(),
            row,
            column,
            found: super::shorten(&value.to_string()),
            expected: "a list of at least one number",
        })
    }
}

impl Reward for Shaped {
    fn name(&self) -> &str {
        self.reward.name()
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let mut scores = self.reward.score(answers)?;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        scores.iter().flatten().for_each(|score| seen.see(score.value));
        for (row, (score, answer)) in scores.iter_mut().zip(answers).enumerate() {
            let Some(score) = score else { continue };
            let references = self.references(row, answer)?;
            score.parts.push(("raw".into(), score.value));
            score.value = self.shaping.value(score.value, &references, &seen);
            for span in &mut score.spans {
                span.reward = self.shaping.value(span.reward, &references, &seen);
            }
        }
        Ok(scores)
    }

    fn state(&self) -> Value {
        let own = self.shaping.is_running().then(|| *self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        match (own, self.reward.state()) {
            (None, Value::Null) => Value::Null,
            (own, reward) => json!({ "seen": own, "reward": reward }),
        }
    }

    fn restore(&self, state: &Value) -> Result<(), RewardError> {
        let part = |key: &str| state.get(key).cloned().unwrap_or(Value::Null);
        let seen = serde_json::from_value::<Option<Running>>(part("seen"))
            .map_err(|_| RewardError::state(self.name(), state, "the statistics of a shaping"))?;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen.unwrap_or_default();
        self.reward.restore(&part("reward"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    fn value(shaping: &Shaping, r: f64, references: &[f64]) -> f64 {
        shaping.value(r, references, &Running::default())
    }

    #[test]
    fn par_is_a_probability_that_grows_with_the_reward() {
        let par = Shaping::Par { k: 1.0 };
        assert_eq!(value(&par, 2.5, &[2.5]), 0.5, "against itself");
        let paid: Vec<f64> = (-20..=20).map(|r| value(&par, f64::from(r), &[0.0, 1.0])).collect();
        assert!(paid.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(paid.iter().all(|paid| (0.0..1.0).contains(paid) && *paid > 0.0));
        let (mean_of_sigmoids, sigmoid_of_mean) = (value(&par, 3.0, &[0.0, 4.0]), value(&par, 3.0, &[2.0]));
        assert!(mean_of_sigmoids < sigmoid_of_mean - 0.1, "Jensen: {mean_of_sigmoids} {sigmoid_of_mean}");
    }

    #[test]
    fn what_a_prompt_adds_to_all_its_rewards_is_cancelled_by_references_alone() {
        let (r, references) = (1.3, [0.2, -0.4, 2.0]);
        let moved: Vec<f64> = references.iter().map(|reference| reference + 7.0).collect();
        for shaping in [
            Shaping::Par { k: 2.0 },
            Shaping::Centered,
            Shaping::LogSigmoid,
            Shaping::Tanh { centered: true },
            Shaping::Polynomial { centered: true },
            Shaping::SlowGrowth { k: 1.0 },
        ] {
            let (before, after) = (value(&shaping, r, &references), value(&shaping, r + 7.0, &moved));
            assert!((before - after).abs() < 1e-12, "{shaping:?}");
            assert!(shaping.needs_references());
        }
        let mut seen = Running::default();
        [0.0, 4.0].into_iter().for_each(|reward| seen.see(reward));
        for shaping in [Shaping::Sigmoid { k: 1.0 }, Shaping::Tanh { centered: false }, Shaping::MinMax] {
            assert_ne!(shaping.value(r, &[], &seen), shaping.value(r + 7.0, &[], &seen), "{shaping:?}");
        }
    }

    #[test]
    fn far_from_zero_nothing_overflows() {
        for z in [-1e6, -800.0, -31.0, 31.0, 800.0, 1e6] {
            assert!((0.0..=1.0).contains(&sigmoid(z)) && log_sigmoid(z).is_finite());
        }
        assert!((log_sigmoid(-800.0) + 800.0).abs() < 1e-9);
        assert!((log_sigmoid(0.3) - sigmoid(0.3).ln()).abs() < 1e-15);
    }

    #[test]
    fn the_polynomial_is_the_least_squares_fit() {
        // Of a least-squares fit, what is left is orthogonal to every power in it.
        let steps = 100_000;
        let points = (0..=steps).map(|i| -5.0 + 10.0 * f64::from(i) / f64::from(steps));
        let left: Vec<(f64, f64)> = points.map(|z| (z, sigmoid(z) - polynomial(z))).collect();
        for power in 0..=5 {
            let product: f64 =
                left.iter().map(|(z, left)| left * (z / 5.0).powi(power)).sum::<f64>() / f64::from(steps);
            assert!(product.abs() < 1e-5, "power {power}: {product}");
        }
    }

    #[test]
    fn running_statistics_take_in_a_batch_before_they_shape_it() {
        struct Given;
        impl Reward for Given {
            fn name(&self) -> &str {
                "given"
            }
            fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
                let score = |answer: &Answer| Some(Score::new(answer.completion.parse().unwrap(), crate::Status::Ok));
                Ok(answers.iter().map(score).collect())
            }
        }
        let columns = crate::Columns::new();
        let score = |reward: &Shaped, texts: &[&'static str]| -> Vec<f64> {
            let answer = |text: &&'static str| Answer {
                prompt_text: "",
                completion: text,
                completion_ids: &[],
                columns: &columns,
            };
            let answers: Vec<Answer> = texts.iter().map(answer).collect();
            reward.score(&answers).unwrap().into_iter().map(|score| score.unwrap().value).collect()
        };
        let standardised = Shaped::new(Box::new(Given), Shaping::MeanStd);
        assert_eq!(score(&standardised, &["3"]), [0.0], "nothing varies: divided by 1");
        assert_eq!(score(&standardised, &["5", "4"]), [1.0, 0.0]);
        let between = Shaped::new(Box::new(Given), Shaping::MinMax);
        assert_eq!(score(&between, &["2", "2"]), [0.0, 0.0]);
        assert_eq!(score(&between, &["6", "4"]), [1.0, 0.5]);
        assert_eq!(score(&between, &["3"]), [0.25], "an extreme is never forgotten");
        let (saved, again) = (between.state(), Shaped::new(Box::new(Given), Shaping::MinMax));
        again.restore(&saved).unwrap();
        assert_eq!((score(&again, &["3"]), again.state() == saved), (vec![0.25], false));
        again.restore(&saved).unwrap();
        assert_eq!(again.state(), saved);
        again.restore(&Value::Null).unwrap();
        assert_eq!(score(&again, &["3"]), [0.0], "as new");
        assert!(again.restore(&json!({ "seen": 3 })).is_err());
        assert!(Given.restore(&saved).is_err(), "a reward without a state takes none");
        // Parts of an answer are shaped as answers are.
        struct Parts;
        impl Reward for Parts {
            fn name(&self) -> &str {
                "parts"
            }
            fn score(&self, _: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
                let spans = vec![crate::SpanScore { text: 0..1, reward: 4.0 }];
                Ok(vec![Some(Score { spans, ..Score::new(0.0, crate::Status::Ok) })])
            }
        }
        let answer = Answer { prompt_text: "", completion: "", completion_ids: &[], columns: &columns };
        let minimax = Shaped::new(Box::new(Parts), Shaping::MinMax).score(&[answer]).unwrap();
        assert_eq!(minimax[0].as_ref().unwrap().spans[0].reward, value(&Shaping::MinMax, 4.0, &[]));
        let clipped = Shaped::new(Box::new(Given), Shaping::Clip);
        assert_eq!(score(&clipped, &["0", "2", "4"]), [0.0, 2.0, 4.0]);
        assert!(score(&clipped, &["100"])[0] < 100.0);
        let centred = Shaped::new(Box::new(Given), Shaping::Centered);
        for references in [serde_json::json!([1, 3]), serde_json::json!({ "given": [1, 3], "other": [] })] {
            let columns = crate::Columns::from_iter([(REFERENCES.to_owned(), references)]);
            let answer = Answer { prompt_text: "", completion: "5", completion_ids: &[], columns: &columns };
            let score = centred.score(&[answer]).unwrap().remove(0).unwrap();
            assert_eq!((score.value, score.parts), (3.0, vec![("raw".to_owned(), 5.0)]));
        }
        let answer = Answer { prompt_text: "", completion: "1", completion_ids: &[], columns: &columns };
        assert!(matches!(centred.score(&[answer]), Err(RewardError::MissingColumn { .. })), "no references: refused");
    }

    /// With a divergence of weight η, a bandit's optimum is `π ∝ π_ref exp(r / η)`: what is paid bounds how far it goes.
    #[test]
    fn a_bounded_reward_bounds_how_far_the_optimum_of_a_bandit_is_from_its_reference() {
        let (raw, eta) = ([-20.0, -1.0, 0.0, 1.0, 20.0], 0.5);
        let range = |paid: &[f64]| {
            let logits: Vec<f64> = paid.iter().map(|paid| paid / eta).collect();
            // Ascent on E[r] - η KL by the exact gradient in the logits of the policy's log-ratio to a uniform reference.
            let mut ratio = vec![0.0f64; paid.len()];
            for _ in 0..4000 {
                let normaliser: f64 = ratio.iter().map(|ratio| ratio.exp()).sum();
                let policy: Vec<f64> = ratio.iter().map(|ratio| ratio.exp() / normaliser).collect();
                let gain: Vec<f64> = logits.iter().zip(&ratio).map(|(paid, ratio)| paid - ratio).collect();
                let mean: f64 = policy.iter().zip(&gain).map(|(p, gain)| p * gain).sum();
                ratio.iter_mut().zip(&gain).for_each(|(ratio, gain)| *ratio += 0.1 * (gain - mean));
            }
            let trained =
                ratio.iter().copied().fold(f64::MIN, f64::max) - ratio.iter().copied().fold(f64::MAX, f64::min);
            let optimum =
                logits.iter().copied().fold(f64::MIN, f64::max) - logits.iter().copied().fold(f64::MAX, f64::min);
            assert!((trained - optimum).abs() < 1e-2, "{trained} {optimum}");
            trained
        };
        let shaped: Vec<f64> = raw.iter().map(|&r| value(&Shaping::Par { k: 1.0 }, r, &[0.0])).collect();
        assert!(range(&shaped) <= 1.0 / eta + 1e-9);
        assert!((range(&raw) - 40.0 / eta).abs() < 1e-2);
    }
}
