//! Unlearning: a model forgets some rows and keeps the others.
//!
//! ```text
//! L = λ_f L_forget + λ_r L_retain
//!
//! gradient_ascent   L_forget =   Σ_t w_t log π(y_t)
//! npo               L_forget = - (2 / β) mean_i log σ( - β [ log π(y_i) - log π_ref(y_i) ] )
//! simnpo            L_forget = - (2 / β) mean_i log σ( - β / |y_i| · log π(y_i) - γ )
//! ce_u              L_forget = - Σ_t w_t log(1 - π(y_t))
//!
//! nll               L_retain = - Σ_t w_t log π(y_t)
//! kl                L_retain =   Σ_t w_t KL(π_ref ‖ π)
//! ```
//!
//! Gradient ascent with `nll` is gradient difference (GradDiff). NPO: arXiv 2404.05868; its limit β → 0 is gradient ascent on
//! whole sequences. SimNPO: arXiv 2410.07163, with the margin γ. CE-U: arXiv 2503.01224: the cross-entropy towards the model's own
//! distribution `q` without the token, `-Σ q_v log p_v = H(q) - log(1 - p_y)`, where `q` is a constant: its gradient is that of
//! `-log(1 - p_y)`, at most 2 in the sum of its absolute values, 0 for what is forgotten, where gradient ascent's grows without bound.
//! `log π(y_i)` is the sum over the loss tokens of a row; the means run over the rows of the step.
//!
//! **Learning and unlearning are one loss** ([`masked_target_row`]): cross-entropy towards the model's own distribution restricted to a set `S`
//! of tokens, a constant `q`. It is `-log Σ_{v ∈ S} p_v + H(q)`; with `S = {y}` it is that of supervised learning, with `S` everything but `y`
//! it is CE-U, and a position that is ignored has no row. Nothing but the sum of gradients joins rows of one batch, so `ce_u` with
//! `retain = "nll"` is such a batch, in which `forget_weight` and `retain_weight` say what a token to forget and a token to keep count.
//!
//! Deviations:
//! 1. `ce_u` reports `-log(1 - p_y)` as its loss, without the constant `H(q)`, which is `forget/entropy`.

use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::distribution::{Distribution, check_range};
use crate::loss::{Error, Loss, Result, check_length, constant, per_token};
use crate::scalar::{log_sigmoid, sequence_sums};

/// What makes the model forget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Forget {
    /// Lower the likelihood, without end.
    GradientAscent,
    /// Negative preference optimisation: lower it relative to the reference model, ever more slowly.
    #[default]
    Npo,
    /// The same without a reference, per token of a row.
    #[serde(rename = "simnpo")]
    SimNpo,
    /// Cross-entropy towards the model's own distribution without the token.
    CeU,
}

/// What makes the model keep the other rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Retain {
    /// Their negative log-likelihood.
    #[default]
    Nll,
    /// The divergence of their next-token distributions from those of the reference model.
    Kl,
}

/// The parts of the objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct UnlearningOptions {
    /// What makes the model forget.
    pub forget: Forget,
    /// Weight of what makes it forget.
    #[schemars(extend("minimum" = 0))]
    pub forget_weight: f64,
    /// With `npo` and `simnpo`: how soon a row counts as forgotten; towards 0, `npo` becomes gradient ascent.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub beta: f64,
    /// With `simnpo`: the γ of its formula.
    #[schemars(extend("minimum" = 0))]
    pub margin: f64,
    /// Leave this many of the first loss tokens of a row to be forgotten out: what any answer begins with need not be.
    pub ignore_first_tokens: usize,
    /// Leave this many of the last loss tokens of a row to be forgotten out: with 1 the model does not unlearn to end its answers.
    pub ignore_last_tokens: usize,
    /// What makes the model keep the other rows.
    pub retain: Retain,
    /// Weight of what makes it keep them; with 0, no such rows are needed.
    #[schemars(extend("minimum" = 0))]
    pub retain_weight: f64,
}

impl Default for UnlearningOptions {
    fn default() -> Self {
        Self {
            forget: Forget::default(),
            forget_weight: 1.0,
            beta: 0.1,
            margin: 0.0,
            ignore_first_tokens: 0,
            ignore_last_tokens: 0,
            retain: Retain::default(),
            retain_weight: 1.0,
        }
    }
}

impl UnlearningOptions {
    /// Refuses values that make no sense, naming the option.
    pub fn validate(&self) -> Result<()> {
        check_range("forget_weight", self.forget_weight, self.forget_weight >= 0.0, "a number, at least 0")?;
        check_range("beta", self.beta, self.beta > 0.0, "a number above 0")?;
        check_range("margin", self.margin, self.margin >= 0.0, "a number, at least 0")?;
        check_range("retain_weight", self.retain_weight, self.retain_weight >= 0.0, "a number, at least 0")
    }

    /// Whether the log-probs of a reference model are needed.
    pub fn needs_reference(&self) -> bool {
        self.forget == Forget::Npo || (self.retain == Retain::Kl && self.retain_weight > 0.0)
    }
}

/// The loss tokens of the rows to forget of a micro-batch; every list has one entry per loss token.
#[derive(Debug)]
pub struct ForgetBatch {
    /// log π(y_t), `[N]`, tracking gradients.
    pub log_probs: Tensor,
    /// log π_ref(y_t), `[N]`: for NPO.
    pub reference_log_probs: Option<Tensor>,
    /// The weight of each token with its global denominator inside, `[N]`: for gradient ascent.
    pub weights: Tensor,
    /// The loss tokens of each row, in order.
    pub lengths: Vec<usize>,
    /// Rows to forget in the whole step.
    pub rows: usize,
}

/// The loss of forgetting, without its weight: one value per token (`gradient_ascent`) or per row (`npo`, `simnpo`).
///
/// # Errors
/// Inputs that differ in length, a missing reference, and `ce_u`, which needs whole distributions ([`unlikely_row`]).
pub fn forget(options: &UnlearningOptions, batch: &ForgetBatch) -> Result<Loss> {
    let tokens = batch.log_probs.elem_count();
    let log_probs = per_token("log_probs", &batch.log_probs, tokens)?;
    check_length("the loss tokens of the rows", batch.lengths.iter().sum(), tokens)?;
    let beta = options.beta;
    let rows: Vec<u32> =
        batch.lengths.iter().zip(0..).flat_map(|(&length, row)| std::iter::repeat_n(row, length)).collect();
    let of_rows = |of_tokens: &Tensor| sequence_sums(of_tokens, &rows, batch.lengths.len());
    let loss = match options.forget {
        Forget::GradientAscent => log_probs.mul(&constant("weights", &batch.weights, tokens)?)?,
        Forget::Npo => {
            let missing = Error::Missing { what: "reference_log_probs", why: "NPO compares with the reference model" };
            let reference = batch.reference_log_probs.as_ref().ok_or(missing)?;
            let log_ratio = (log_probs - constant("reference_log_probs", reference, tokens)?)?;
            saturating(&of_rows(&log_ratio)?, beta, batch.rows)?
        }
        Forget::SimNpo => {
            let counts: Vec<f64> = batch.lengths.iter().map(|&length| length.max(1) as f64).collect();
            let means = of_rows(&log_probs)?.div(&Tensor::new(counts, &Device::Cpu)?)?;
            saturating(&(means + options.margin / beta)?, beta, batch.rows)?
        }
        Forget::CeU => {
            return Err(Error::Missing { what: "logits", why: "CE-U is a loss of whole distributions" });
        }
    };
    Ok(Loss { per_token: loss, statistics: Vec::new() })
}

/// `-(2 / β) log σ(-β x) / rows`.
fn saturating(x: &Tensor, beta: f64, rows: usize) -> Result<Tensor> {
    Ok(log_sigmoid(&x.affine(-beta, 0.0)?)?.affine(-2.0 / (beta * rows.max(1) as f64), 0.0)?)
}

/// What the row of one position to forget is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ForgottenRow {
    /// `-weight · log(1 - p_y)`.
    pub loss: f64,
    /// log p_y.
    pub log_prob: f64,
    /// The entropy of the distribution without the token, in nats.
    pub entropy: f64,
}

/// What the row of one position is worth, whose target is the model's own distribution on a set of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MaskedRow {
    /// `-weight · log Σ_{v ∈ S} p_v`.
    pub loss: f64,
    /// `log Σ_{v ∉ S} p_v`.
    pub log_outside: f64,
    /// The entropy of the target, in nats.
    pub entropy: f64,
}

/// The loss `-weight · log Σ_{v ∈ S} p_v` at one position, where `S` are the tokens that `keep` says yes to; the logits are replaced by its
/// gradient, which is `p_v` outside of `S` and `-p_v (1 - p(S)) / p(S)` inside, times the weight.
///
/// It is `log Σ_v e^{z_v} - log Σ_{v ∈ S} e^{z_v}`, which no probability near 0 or 1 can spoil. A logit of negative infinity is in neither set.
///
/// # Errors
/// A set in which nothing can be predicted.
pub fn masked_target_row(logits: &mut [f32], keep: impl Fn(usize) -> bool, weight: f64) -> Result<MaskedRow> {
    let of = |inside: bool| {
        let logit = |(v, &logit): (usize, &f32)| if keep(v) == inside { f64::from(logit) } else { f64::NEG_INFINITY };
        logits.iter().enumerate().map(logit).collect::<Vec<_>>()
    };
    let possible = |logits: &[f64]| logits.iter().filter(|logit| **logit > f64::NEG_INFINITY).count();
    let (inside, outside) = (of(true), of(false));
    let targets = possible(&inside);
    check_range("the number of tokens that may follow", targets as f64, targets > 0, "at least 1")?;
    let q = Distribution::of(inside.clone());
    if possible(&outside) == 0 {
        logits.fill(0.0);
        return Ok(MaskedRow { loss: 0.0, log_outside: f64::NEG_INFINITY, entropy: q.entropy() });
    }
    let rest = Distribution::of(outside.clone());
    // The log-odds of the outside: the difference of both log-sum-exps, each read off at its most probable token.
    let log_sum_exp =
        |logits: &[f64], own: &Distribution| logits[own.most_probable()] - own.log_probs()[own.most_probable()];
    let odds = log_sum_exp(&outside, &rest) - log_sum_exp(&inside, &q);
    let p_outside = 1.0 / (1.0 + (-odds).exp());
    for ((logit, q), rest) in logits.iter_mut().zip(q.probs()).zip(rest.probs()) {
        *logit = (weight * p_outside * (rest - q)) as f32;
    }
    let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
    Ok(MaskedRow { loss: weight * softplus(odds), log_outside: -softplus(-odds), entropy: q.entropy() })
}

/// CE-U's loss `-weight · log(1 - p_y)` at one position: [`masked_target_row`] where everything but the token is kept.
///
/// # Errors
/// A token outside the row, or one besides which nothing is left to predict.
pub fn unlikely_row(logits: &mut [f32], token: u32, weight: f64) -> Result<ForgottenRow> {
    let y = token as usize;
    check_range("the token to forget", y as f64, y < logits.len(), "a token of the vocabulary")?;
    let row = masked_target_row(logits, |v| v != y, weight)?;
    Ok(ForgottenRow { loss: row.loss, log_prob: row.log_outside, entropy: row.entropy })
}
