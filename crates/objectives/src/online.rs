//! What online preference methods add to the loss of a pair: exploration (XPO), and the game against oneself (Nash-MD).
//!
//! Exploratory preference optimisation (Xie et al., arXiv 2405.21046) judges a completion of the policy against one of the
//! reference, and makes what the reference says less likely, so that the policy looks elsewhere:
//!
//! ```text
//! L = preference loss + α Σ_i w_i log π(y_i)          y_i: the completion sampled from the reference
//! ```
//!
//! Nash-MD (Munos et al., arXiv 2312.00886) plays the policy against a mixture of itself and the reference, and follows the
//! policy gradient of how often it is preferred, less the divergence from the reference:
//!
//! ```text
//! L = Σ_i w_i [ - (P(y_i is preferred) - 1/2) log π(y_i) + β Σ_t log(π(y_t) / ρ(y_t)) log π(y_t) ]
//! ```
//!
//! where `y_i` is sampled from the policy and the log-ratios are constants.
//!
//! Metrics of Nash-MD, named as TRL names them: `objective/kl`, the mean log-ratio of the policy's completions, and
//! `loss/score`, the mean of `(P - 1/2) log π(y)`.

use candle_core::Tensor;

use crate::loss::{Error, Loss, Reduce, Result, Statistic, check_length, constant, per_token, values};
use crate::scalar::sequence_sums;
use crate::{PairBatch, PreferenceOptions, preference};

/// The loss of exploratory preference optimisation: that of [`preference()`], and `alpha` times the mean log-probability of
/// the completions sampled from the reference. `explored` holds for each pair which one that is: 0 the chosen, 1 the rejected.
///
/// Fails as [`preference()`] does.
pub fn xpo(options: &PreferenceOptions, alpha: f64, batch: &PairBatch, explored: &[u32]) -> Result<Loss> {
    let pairs = batch.weights.elem_count();
    check_length("explored", explored.len(), pairs)?;
    if let Some(&place) = explored.iter().find(|&&place| place > 1) {
        return Err(Error::Range { what: "explored", got: f64::from(place), expected: "0 or 1" });
    }
    let loss = preference(options, batch)?;
    let log_probs = per_token("log_probs", &batch.log_probs, batch.sequence.len())?;
    let sums = sequence_sums(&log_probs, &batch.sequence, pairs * batch.sequences_per_pair)?;
    let step = batch.sequences_per_pair as u32;
    let places: Vec<u32> = explored.iter().zip(0..).map(|(place, pair)| pair * step + place).collect();
    let term = sums.index_select(&Tensor::new(places, sums.device())?, 0)?;
    let weights = constant("weights", &batch.weights, pairs)?;
    let per_token = loss.per_token.add(&term.mul(&weights)?.affine(alpha, 0.0)?)?;
    Ok(Loss { per_token, ..loss })
}

/// The loss tokens of some completions of the policy; lists have one entry per loss token unless they say otherwise.
#[derive(Debug)]
pub struct NashMdBatch {
    /// log π(y_t), `[N]`, tracking gradients.
    pub log_probs: Tensor,
    /// log ρ(y_t) of the reference model, `[N]`.
    pub reference_log_probs: Tensor,
    /// The sequence each token belongs to; tokens of one sequence are adjacent. A sequence may have none.
    pub sequence: Vec<u32>,
    /// For each sequence, how likely it is to be preferred to its opponent, from 0 to 1.
    pub preferences: Vec<f64>,
    /// The weight of each sequence, with its global denominator inside, `[S]`.
    pub weights: Tensor,
}

/// The loss of Nash mirror descent: one weighted loss for each completion of the policy.
///
/// Fails when the inputs differ in length.
pub fn nash_md(beta: f64, batch: &NashMdBatch) -> Result<Loss> {
    let (tokens, sequences) = (batch.log_probs.elem_count(), batch.preferences.len());
    let log_probs = per_token("log_probs", &batch.log_probs, tokens)?;
    let reference = constant("reference_log_probs", &batch.reference_log_probs, tokens)?;
    let weights = constant("weights", &batch.weights, sequences)?;
    check_length("sequence", batch.sequence.len(), tokens)?;
    let ratio = log_probs.detach().sub(&reference)?;
    let advantage: Vec<f64> = batch.preferences.iter().map(|preference| preference - 0.5).collect();
    let advantage = Tensor::new(advantage, log_probs.device())?;
    let sum = |of_tokens: &Tensor| sequence_sums(of_tokens, &batch.sequence, sequences);
    let score = sum(&log_probs)?.mul(&advantage)?;
    let kl = sum(&ratio.mul(&log_probs)?)?.affine(beta, 0.0)?;
    let statistics = vec![
        Statistic { name: "objective/kl", values: values(&sum(&ratio)?)?, reduce: Reduce::Mean },
        Statistic { name: "loss/score", values: values(&score)?, reduce: Reduce::Mean },
    ];
    Ok(Loss { per_token: kl.sub(&score)?.mul(&weights)?, statistics })
}
