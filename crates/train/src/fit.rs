//! A stage in memory: the steps of the loop, without a run directory, checkpoints or a referee.
//!
//! For experiments that train many small models and keep only what they measured: what is lost when the process dies is
//! a stage of seconds, which comes out the same when it is done again.

use base::{Purpose, Random};
use kernels::Precision;
use model::decoder::{Decoder, Tape, Workspace};
use model::tokenizer::Tokenizer;

use crate::error::Error;
use crate::method::{Method, Step};
use crate::metrics::Metrics;
use crate::optimizer::Optimizer;
use crate::options::GradientCheckpointing;
use crate::run::check_rows;
use crate::timing::Clock;

/// What is trained, and how its draws are named.
pub struct Fit<'a> {
    /// The model.
    pub decoder: &'a mut Decoder,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Seed of every draw.
    pub seed: u64,
    /// The number of the stage among those of one model: its order of the rows is its own. The draws of a step are named by
    /// seed and step alone.
    pub stage: usize,
    /// Number format of the matrix products.
    pub precision: Precision,
}

/// Trains to the end of the stage. `after` sees the number of steps done, the model, which it may prepare for what it wants to
/// measure, and the metrics of the step.
///
/// # Errors
/// Everything that can go wrong in training, and the first error of `after`, which ends the stage.
pub fn fit<E: From<Error>>(
    method: &mut dyn Method,
    fit: Fit<'_>,
    mut after: impl FnMut(u64, &mut Decoder, &Metrics) -> Result<(), E>,
) -> Result<(), E> {
    check_rows(fit.stage, method)?;
    let steps = method.steps();
    let schedule = method.training().schedule(steps);
    let reference = match method.needs_reference() && fit.decoder.adapter_config().is_none() {
        true => Some(fit.decoder.packed_copy(fit.precision).map_err(|source| Error::Model { step: 0, source })?),
        false => None,
    };
    let noise = Random::new(fit.seed, Purpose::Rounding).sample(fit.stage as u32);
    let mut optimizer = Optimizer::new(method.training(), fit.decoder, noise);
    let mut gradients = fit.decoder.gradients();
    let (mut workspace, mut tape) = (Workspace::new(), Tape::new());
    workspace.set_checkpointing(method.training().gradient_checkpointing == GradientCheckpointing::On);
    let mut clock = Clock::start();
    for index in 0..steps {
        let report = method.step(&mut Step {
            number: index + 1,
            index,
            stage: fit.stage,
            seed: fit.seed,
            learning_rate: schedule.learning_rate(index),
            precision: fit.precision,
            decoder: fit.decoder,
            reference: reference.as_ref(),
            tokenizer: fit.tokenizer,
            world: None,
            optimizer: &mut optimizer,
            gradients: &mut gradients,
            workspace: &mut workspace,
            tape: &mut tape,
            clock: &mut clock,
            observer: &mut (),
        })?;
        after(index + 1, fit.decoder, &report.metrics)?;
    }
    Ok(method.finish(fit.decoder).map_err(|source| Error::Model { step: steps, source })?)
}
