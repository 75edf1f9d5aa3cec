//! Supervised fine-tuning: the negative log-likelihood of the completion's tokens, and its variants.
//!
//! ```text
//! L = Σ_t w_t c_t [ - (1 - ε) log π(y_t) - (ε / V) Σ_v log π(v) ]
//!
//! nll     c_t = 1
//! dft     c_t = π(y_t)
//! eaft    c_t = (H_K / ln K)^α      H_K: entropy of the K = 20 most probable tokens among themselves
//! ```
//!
//! The weights `w_t` come from [`crate::Aggregation`]; with `token` they are `1 / T` and the loss is the mean over all
//! loss tokens of the batch. Which tokens are loss tokens (the completion, the assistant's turns) was decided when the
//! row was rendered; tokens outside the mask do not reach this function. `c` is a constant of each token: DFT (arXiv 2508.05629)
//! takes the implicit reward `1 / π(y_t)` out of the gradient, EAFT (arXiv 2601.02151) spares tokens that contradict what the model
//! is sure of. `ε` smooths the labels over the vocabulary of `V` tokens (arXiv 1512.00567).
//!
//! Deviations:
//! 1. `ε` combines with every form; TRL allows it with `nll` alone.
//! 2. EAFT's entropy is divided by `ln K`, as in the paper; Axolotl leaves that out.
//!
//! Metrics, named as TRL names them:
//! - `entropy`: mean entropy of the next-token distribution at the loss tokens, in nats.
//! - `mean_token_accuracy`: fraction of loss tokens that are the most probable token at their position.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::distribution::{Distribution, check_range};
use crate::loss::{Loss, Reduce, Result, Statistic, check_length, constant, per_token, values};

/// How much each token counts beside its weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SftLoss {
    /// All the same.
    #[default]
    Nll,
    /// By the probability the model gives it: dynamic fine-tuning.
    Dft,
    /// By how undecided the model is: entropy-adaptive fine-tuning.
    Eaft,
}

/// The parts of the objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SftObjective {
    /// How much each token counts: `nll` all the same, `dft` by its probability, `eaft` by the entropy there.
    pub loss_type: SftLoss,
    /// Share of the label that goes to the whole vocabulary evenly.
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub label_smoothing: f64,
    /// With `eaft`: the power of the entropy; 0 makes it `nll`.
    #[schemars(extend("minimum" = 0))]
    pub eaft_alpha: f64,
}

impl Default for SftObjective {
    fn default() -> Self {
        Self { loss_type: SftLoss::default(), label_smoothing: 0.0, eaft_alpha: 1.0 }
    }
}

/// EAFT looks at this many of the most probable tokens.
const EAFT_TOKENS: usize = 20;

/// What the row of one loss token is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SftRow {
    /// The weighted loss.
    pub loss: f64,
    /// The entropy, in nats.
    pub entropy: f64,
    /// Whether no token is more probable than the label.
    pub correct: bool,
}

impl SftObjective {
    /// Refuses values that make no sense, naming the option.
    pub fn validate(&self) -> Result<()> {
        let smoothing = self.label_smoothing;
        check_range("label_smoothing", smoothing, (0.0..1.0).contains(&smoothing), "at least 0 and below 1")?;
        check_range("eaft_alpha", self.eaft_alpha, self.eaft_alpha >= 0.0, "a number, at least 0")
    }

    /// Whether the loss is a fixed multiple of each token's log-probability, which [`sft`] then computes from that alone.
    pub fn is_plain(&self) -> bool {
        self.loss_type == SftLoss::Nll && self.label_smoothing == 0.0
    }

    /// The loss at one position; the logits are replaced by its gradient.
    ///
    /// # Errors
    /// A label outside the row.
    pub fn row(&self, logits: &mut [f32], label: u32, weight: f64) -> Result<SftRow> {
        let label = label as usize;
        check_range("the label", label as f64, label < logits.len(), "a token of the vocabulary")?;
        let p = Distribution::new(logits, 1.0);
        let log_prob = p.log_probs()[label];
        let weight = weight
            * match self.loss_type {
                SftLoss::Nll => 1.0,
                SftLoss::Dft => p.probs()[label],
                SftLoss::Eaft => relative_entropy_of_top(&p).powf(self.eaft_alpha),
            };
        let (own, even) = (1.0 - self.label_smoothing, self.label_smoothing / logits.len() as f64);
        let all: f64 = if even == 0.0 { 0.0 } else { p.log_probs().iter().sum() };
        let mut g = vec![-even; logits.len()];
        g[label] -= own;
        p.write_gradient(&g, weight, 1.0, logits);
        let correct = p.probs().iter().all(|&other| other <= p.probs()[label]);
        Ok(SftRow { loss: -weight * (own * log_prob + even * all), entropy: p.entropy(), correct })
    }
}

/// The entropy of the most probable tokens among themselves, over the most it could be.
fn relative_entropy_of_top(p: &Distribution) -> f64 {
    let mut top = p.log_probs().to_vec();
    let count = EAFT_TOKENS.min(top.len());
    if count < 2 {
        return 0.0;
    }
    top.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
    top.truncate(count);
    // In one order, whatever the selection left them in.
    top.sort_unstable_by(|a, b| b.total_cmp(a));
    Distribution::of(top).entropy() / (count as f64).ln()
}

/// What there is to log about rows.
pub fn statistics(rows: &[SftRow]) -> Vec<Statistic> {
    let correct = rows.iter().map(|row| f64::from(u8::from(row.correct))).collect();
    vec![
        Statistic { name: "entropy", values: rows.iter().map(|row| row.entropy).collect(), reduce: Reduce::Mean },
        Statistic { name: "mean_token_accuracy", values: correct, reduce: Reduce::Mean },
    ]
}

/// The loss tokens of a micro-batch of supervised rows; every list has one entry per loss token.
#[derive(Debug)]
pub struct SftBatch {
    /// log π(y_t), `[N]`, tracking gradients.
    pub log_probs: Tensor,
    /// The weight of each token, with its global denominator inside, `[N]`.
    pub weights: Tensor,
    /// The entropy at each token, `[N]`, where it was computed.
    pub entropy: Option<Tensor>,
    /// Whether each token is the most probable one, where it was computed.
    pub correct: Option<Vec<bool>>,
}

/// The plain loss of supervised fine-tuning, `nll` without smoothing.
///
/// Fails when the inputs differ in length.
pub fn sft(batch: &SftBatch) -> Result<Loss> {
    let tokens = batch.log_probs.elem_count();
    let log_probs = per_token("log_probs", &batch.log_probs, tokens)?;
    let weights = constant("weights", &batch.weights, tokens)?;
    let loss = log_probs.neg()?.mul(&weights)?;

    let mut statistics = Vec::new();
    if let Some(entropy) = &batch.entropy {
        let entropy = constant("entropy", entropy, tokens)?;
        statistics.push(Statistic { name: "entropy", values: values(&entropy)?, reduce: Reduce::Mean });
    }
    if let Some(correct) = &batch.correct {
        check_length("correct", correct.len(), tokens)?;
        let correct = correct.iter().map(|&correct| f64::from(u8::from(correct))).collect();
        statistics.push(Statistic { name: "mean_token_accuracy", values: correct, reduce: Reduce::Mean });
    }
    Ok(Loss { per_token: loss, statistics })
}
