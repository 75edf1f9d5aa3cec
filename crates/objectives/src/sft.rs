//! Supervised fine-tuning: the negative log-likelihood of the completion's tokens.
//!
//! ```text
//! L = - Σ_t w_t log π(y_t | y_<t)
//! ```
//!
//! The weights `w_t` come from [`crate::Aggregation`]; with `token` they are `1 / T` and the loss is the mean over all
//! loss tokens of the batch. Which tokens are loss tokens (the completion, the assistant's turns) was decided when the
//! row was rendered; tokens outside the mask do not reach this function.
//!
//! Metrics, named as TRL names them:
//! - `entropy`: mean entropy of the next-token distribution at the loss tokens, in nats.
//! - `mean_token_accuracy`: fraction of loss tokens that are the most probable token at their position.

use candle_core::Tensor;

use crate::loss::{Loss, Reduce, Result, Statistic, check_length, constant, per_token, values};

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

/// The loss of supervised fine-tuning.
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
