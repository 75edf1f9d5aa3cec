//! Rankings: of several completions of a prompt, each is better than those after it.
//!
//! ```text
//! h(y) = log π(y) - log π_ref(y)                              as in preference optimisation, per token with `length = "mean"`
//! L    = - λ Σ_i w_i Σ_k log( e^{β h(y_k)} / Σ_{j ≥ k} e^{β h(y_j)} )         y_1, y_2, ... from best to worst
//! ```
//!
//! The model of Plackett and Luce takes the best completion, then the best of the others, and so on; DPO under it: Rafailov et
//! al., arXiv 2305.18290, appendix A.3. Of two completions it is DPO's loss. `λ` is its entry in `loss_weights`.
//!
//! Metrics: `rewards/chosen`, `logps/chosen` of the best, `rewards/rejected`, `logps/rejected` of the worst, `rewards/margins`
//! between them; `rewards/accuracies`: share of all pairs of a ranking whose rewards are in its order.

use candle_core::Tensor;

use crate::loss::{Error, Loss, Reduce, Result, Statistic, check_length, constant, per_token, values};
use crate::reward::plackett_luce;
use crate::scalar::sequence_sums;
use crate::{Length, PairLoss, PreferenceOptions};

/// The loss tokens of some rankings. Lists have one entry per loss token, sequence by sequence, each ranking from best to worst.
#[derive(Debug)]
pub struct RankingBatch {
    /// log π(y_t), `[N]`, tracking gradients.
    pub log_probs: Tensor,
    /// log ρ(y_t) of the reference model, `[N]`; needed unless `reference_free`.
    pub reference_log_probs: Option<Tensor>,
    /// The sequence each token belongs to; tokens of one sequence are adjacent. A sequence may have none.
    pub sequence: Vec<u32>,
    /// Completions of each ranking.
    pub rankings: Vec<usize>,
    /// The weight of each ranking, with its global denominator inside.
    pub weights: Vec<f64>,
}

/// The loss of rankings: one weighted loss for each completion, which is that of its being taken before those after it.
///
/// # Errors
/// Inputs that differ in length; a reference that is missing.
pub fn ranking(options: &PreferenceOptions, batch: &RankingBatch) -> Result<Loss> {
    let tokens = batch.log_probs.elem_count();
    let log_probs = per_token("log_probs", &batch.log_probs, tokens)?;
    check_length("sequence", batch.sequence.len(), tokens)?;
    check_length("weights", batch.weights.len(), batch.rankings.len())?;
    let sequences = batch.rankings.iter().sum();
    if let Some(&beyond) = batch.sequence.iter().find(|&&sequence| sequence as usize >= sequences) {
        return Err(Error::Range { what: "sequence", got: f64::from(beyond), expected: "a sequence of a ranking" });
    }
    let mut lengths = vec![0.0; sequences];
    batch.sequence.iter().for_each(|&sequence| lengths[sequence as usize] += 1.0);
    let lengths =
        Tensor::new(lengths.into_iter().map(|length: f64| length.max(1.0)).collect::<Vec<_>>(), log_probs.device())?;
    let of_completions = |of_tokens: &Tensor| {
        let sums = sequence_sums(of_tokens, &batch.sequence, sequences)?;
        Ok::<_, Error>(match options.length {
            Length::Sum => sums,
            Length::Mean => sums.div(&lengths)?,
        })
    };
    let policy = of_completions(&log_probs)?;
    let ratio = match (options.needs_reference(), &batch.reference_log_probs) {
        (false, _) => policy.clone(),
        (true, Some(reference)) => {
            policy.sub(&of_completions(&constant("reference_log_probs", reference, tokens)?)?)?
        }
        (true, None) => {
            return Err(Error::Missing { what: "reference_log_probs", why: "reference_free is false" });
        }
    };
    let rewards = ratio.affine(options.beta, 0.0)?;
    let of_loss = options.terms().find(|(loss, _)| *loss == PairLoss::PlackettLuce).map_or(1.0, |(_, weight)| weight);
    let weights: Vec<f64> = (batch.rankings.iter().zip(&batch.weights))
        .flat_map(|(&count, &weight)| std::iter::repeat_n(of_loss * weight, count))
        .collect();
    let loss = plackett_luce(&rewards, &batch.rankings, &weights)?;

    let (rewards, log_probs) = (values(&rewards)?, values(&policy)?);
    let (mut firsts, mut lasts, mut right, mut first) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for &count in batch.rankings.iter().filter(|&&count| count > 0) {
        firsts.push(first);
        lasts.push(first + count - 1);
        for better in first..first + count {
            right
                .extend((better + 1..first + count).map(|worse| f64::from(u8::from(rewards[better] > rewards[worse]))));
        }
        first += count;
    }
    let mean = |name, values| Statistic { name, values, reduce: Reduce::Mean };
    let at = |numbers: &[f64], places: &[usize]| places.iter().map(|&place| numbers[place]).collect::<Vec<f64>>();
    let (best, worst) = (at(&rewards, &firsts), at(&rewards, &lasts));
    let statistics = vec![
        mean("rewards/accuracies", right),
        mean("rewards/margins", best.iter().zip(&worst).map(|(best, worst)| best - worst).collect()),
        mean("rewards/chosen", best),
        mean("rewards/rejected", worst),
        mean("logps/chosen", at(&log_probs, &firsts)),
        mean("logps/rejected", at(&log_probs, &lasts)),
    ];
    Ok(Loss { statistics, ..loss })
}
