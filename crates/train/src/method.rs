//! What a training method is to the loop.

use std::path::Path;
use std::time::Instant;

use base::Random;
use eval::play::World;
use kernels::Precision;
use model::decoder::{Decoder, Gradients, Tape, Workspace};
use model::tokenizer::Tokenizer;

use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::observer::{Event, Observer};
use crate::optimizer::{Optimizer, gradient_norm};
use crate::options::TrainingOptions;
use crate::table::Table;
use crate::timing::{Clock, Phase};

/// A way to train: one step of it, given everything a step may need.
///
/// What a step does is a function of the weights, the optimiser, the numbers in [`Step`], and what the method writes in
/// [`Method::save`], which is nothing unless it says so; that is what makes a resumed run equal to one that was never stopped.
pub trait Method {
    /// The name of the published method, as in a configuration.
    fn name(&self) -> &str;

    /// How long the stage lasts and how the weights move.
    fn training(&self) -> &TrainingOptions;

    /// Rows of data there are to train on.
    fn rows(&self) -> usize;

    /// Rows one step takes.
    fn rows_per_step(&self) -> usize;

    /// Steps of the stage.
    fn steps(&self) -> u64 {
        self.training().steps(self.rows(), self.rows_per_step())
    }

    /// Whether steps need the log-probabilities of the model the stage started from.
    fn needs_reference(&self) -> bool {
        false
    }

    /// Makes one step.
    ///
    /// # Errors
    /// Whatever makes it impossible to go on.
    fn step(&mut self, step: &mut Step<'_>) -> Result<Report>;

    /// Makes the model of the last step what the stage leaves behind: takes off what only training needed. A checkpoint holds the model as
    /// it is trained.
    ///
    /// # Errors
    /// A model that it cannot be done to.
    fn finish(&self, _decoder: &mut Decoder) -> model::Result<()> {
        Ok(())
    }

    /// Writes what the method carries from step to step beside the policy and its optimiser, into the folder of a
    /// checkpoint: a value model, a reference that moves, episodes to be replayed. File names begin with the method's.
    ///
    /// # Errors
    /// A file that cannot be written.
    fn save(&self, _folder: &Path) -> Result<()> {
        Ok(())
    }

    /// Reads back what [`Method::save`] wrote, in place of whatever the method has come to carry since.
    ///
    /// # Errors
    /// A file that is missing or does not fit.
    fn load(&mut self, _folder: &Path) -> Result<()> {
        Ok(())
    }
}

/// What one step has to tell.
#[derive(Debug, Default)]
pub struct Report {
    /// The metrics of the method.
    pub metrics: Metrics,
    /// Tokens that passed through training: prompts and completions, padding not counted.
    pub tokens: u64,
    /// What was sampled, one row an episode.
    pub episodes: Option<Table>,
}

/// Everything one step of a method may need.
pub struct Step<'a> {
    /// The number of the step over all stages, from 1.
    pub number: u64,
    /// The number of the step within its stage, from 0.
    pub index: u64,
    /// The stage, from 0.
    pub stage: usize,
    /// The seed of the run.
    pub seed: u64,
    /// The learning rate of all updates of the step.
    pub learning_rate: f64,
    /// Number format of the matrix products.
    pub precision: Precision,
    /// The model that is trained. Each use of it begins with [`Decoder::prepare`] or [`Decoder::prepare_for_training`].
    pub decoder: &'a mut Decoder,
    /// The model the stage started from, where it is kept apart: with full fine-tuning. With an adapter, it is the model
    /// with the adapter switched off.
    pub reference: Option<&'a Decoder>,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The environment that answers what is sampled, in runs that have one.
    pub world: Option<World<'a>>,
    /// The optimiser.
    pub optimizer: &'a mut Optimizer,
    /// Gradients, zero at the start of the step and after each update.
    pub gradients: &'a mut Gradients,
    /// Scratch memory of the engine.
    pub workspace: &'a mut Workspace,
    /// What sampling computed for the update that follows.
    pub tape: &'a mut Tape,
    /// Where the time goes.
    pub clock: &'a mut Clock,
    /// Who wants to know.
    pub observer: &'a mut dyn Observer,
}

impl Step<'_> {
    /// Draws for a purpose in this step.
    pub fn random(&self, purpose: base::Purpose) -> Random {
        Random::new(self.seed, purpose).step(self.number as u32)
    }

    /// Tells the observer how far a phase has come.
    pub fn progress(&mut self, phase: Phase, done: usize, total: usize) {
        self.observer.observe(Event::Progress { phase, done, total });
    }

    /// Adds the time since `started` to a phase.
    pub fn spent(&mut self, phase: Phase, started: Instant) {
        self.clock.add(phase, started);
    }

    /// Gives an error of the model its step.
    pub fn model_error(&self) -> impl Fn(model::Error) -> Error + use<> {
        let step = self.number;
        move |source| Error::Model { step, source }
    }

    /// Gives an error of an objective its step.
    pub fn objective_error(&self) -> impl Fn(objectives::Error) -> Error + use<> {
        let step = self.number;
        move |source| Error::Objective { step, source }
    }

    /// Moves the weights by the gradients gathered since the last update, and sets these to zero. Returns their norm before
    /// clipping. Before the weights are used again, they have to be prepared for that use.
    ///
    /// # Errors
    /// A gradient that is infinite or NaN, by parameter and row.
    pub fn update(&mut self) -> Result<f64> {
        let started = Instant::now();
        let norm = move_weights(self.number, self.decoder, self.optimizer, self.gradients, self.learning_rate)?;
        self.spent(Phase::Train, started);
        Ok(norm)
    }
}

/// Moves a model's weights by its gradients, and sets these to zero; as [`Step::update`], for any model.
///
/// # Errors
/// A gradient that is infinite or NaN, by parameter and row.
pub fn move_weights(
    step: u64,
    decoder: &mut Decoder,
    optimizer: &mut Optimizer,
    gradients: &mut Gradients,
    learning_rate: f64,
) -> Result<f64> {
    gradients.finish();
    let norm = gradient_norm(decoder, gradients);
    if !norm.is_finite() {
        if let Some(found) = gradients.non_finite() {
            return Err(Error::Model { step, source: found.into() });
        }
        return Err(Error::NonFinite { step, what: "the norm of the gradient".into(), value: norm });
    }
    optimizer.update(decoder, gradients, norm, learning_rate);
    gradients.clear();
    Ok(norm)
}

/// Fails on the first loss that is infinite or NaN, naming its sequence and token, or its place among losses that are not
/// those of single tokens.
///
/// `losses` holds the weighted loss of every token, sequence by sequence, or of every pair or sequence; `lengths` the tokens
/// of each sequence.
pub fn check_losses(step: u64, losses: &[f64], lengths: &[usize]) -> Result<()> {
    let Some(bad) = losses.iter().position(|loss| !loss.is_finite()) else { return Ok(()) };
    let what = if losses.len() == lengths.iter().sum::<usize>() {
        let (mut sequence, mut token) = (0, bad);
        while lengths.get(sequence).is_some_and(|&length| token >= length) {
            token -= lengths[sequence];
            sequence += 1;
        }
        format!("the loss of sequence {sequence}, loss token {token}")
    } else {
        format!("loss {bad} of the batch's {}", losses.len())
    };
    Err(Error::NonFinite { step, what, value: losses[bad] })
}

#[cfg(test)]
mod tests {
    use super::check_losses;

    #[test]
    fn a_bad_loss_is_named_by_sequence_and_token() {
        assert!(check_losses(3, &[0.0, 1.0], &[1, 1]).is_ok());
        let error = check_losses(3, &[0.0, 1.0, f64::NAN, 2.0], &[0, 2, 2]).map_err(|error| error.to_string());
        assert_eq!(error, Err("step 3: the loss of sequence 2, loss token 0 is NaN".into()));
        let error = check_losses(3, &[0.0, f64::INFINITY], &[2, 1, 3, 2]).map_err(|error| error.to_string());
        assert_eq!(error, Err("step 3: loss 1 of the batch's 2 is inf".into()));
    }
}
