//! What a model keeps while it learns something else: its distributions at the tokens of some rows.
//!
//! ```text
//! L_retain = λ mean_t KL(π_ref(. | y_<t) ‖ π(. | y_<t))      over the loss tokens of the rows
//! ```
//!
//! The divergence is over the whole vocabulary, from the reference, so that nothing that the reference might say is lost (learning
//! without forgetting, Li and Hoiem, arXiv 1606.09282, without its temperature). [`crate::methods::unlearning`] and [`crate::methods::policy`]
//! add it to their losses.

use std::ops::Range;

use objectives::DistillationOptions;
use objectives::distillation::Divergence;

use crate::error::Result;
use crate::method::{Step, check_losses};
use crate::metrics::mean;
use crate::rows::{self, Other, RowPass};
use crate::update::Batch;

/// The divergence of an update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retained {
    /// With its weight.
    pub loss: f64,
    /// Mean over the loss tokens, in nats.
    pub divergence: f64,
}

/// Adds the gradient of `weight` times the mean divergence over the loss tokens of the units `part` of a batch to those of the step. The decoder
/// must be prepared.
///
/// # Errors
/// As [`rows::gradients`]; a loss that is not finite.
pub fn retain(
    step: &mut Step<'_>,
    batch: &Batch<'_>,
    part: Range<usize>,
    weight: f64,
    micro_batch_tokens: usize,
) -> Result<Retained> {
    let objective = DistillationOptions { divergence: Divergence::ForwardKl, ..DistillationOptions::default() };
    let weight = weight * (1.0 / batch.tokens_of(&part).len() as f64);
    let how = RowPass { micro_batch_tokens, others: &[Other::Reference], noise: None };
    let lengths = &batch.lengths()[batch.sequences_of(&part)];
    let found = rows::gradients(step, batch, part, how, |row| {
        let targets = objective.targets(&row.others, &[1.0])?;
        objective.row(row.logits, &targets, weight, None)
    })?;
    let losses: Vec<f64> = found.iter().map(|row| row.loss).collect();
    check_losses(step.number, &losses, lengths)?;
    let divergences: Vec<f64> = found.iter().map(|row| row.divergence).collect();
    Ok(Retained { loss: losses.iter().sum(), divergence: mean(&divergences) })
}
