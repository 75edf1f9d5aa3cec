//! One arm with one seed: what a system does, and what it does it with.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kernels::Precision;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use serde::de::DeserializeOwned;
use serde_json::Value;
use train::metrics::Metrics;
use train::{Fit, Method};

use crate::error::{Error, Result};
use crate::measurements::Measurements;

/// What a system trains and measures. The implementing type is its settings.
pub trait Experiment: Send + Sync + Sized {
    /// What all arms of one seed start from: data, a model that imitates it, reference answers.
    type Start: Send + Sync;

    /// Refuses settings that mean nothing.
    ///
    /// # Errors
    /// The first option that cannot be used.
    fn validate(&self) -> Result<()>;

    /// Makes what all arms of the trial's seed start from.
    ///
    /// # Errors
    /// Whatever makes it impossible.
    fn start(&self, trial: &Trial<'_>) -> Result<Self::Start>;

    /// Trains and measures one arm.
    ///
    /// # Errors
    /// Whatever makes it impossible.
    fn run(&self, start: &Self::Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements>;
}

/// One arm with one seed, on one thread.
pub struct Trial<'a> {
    /// Seed of everything.
    pub seed: u64,
    /// Set from outside to stop soon.
    pub interrupt: &'a AtomicBool,
    /// Told of the steps done and of all steps of the stage at hand.
    pub progress: &'a (dyn Fn(u64, u64) + Sync),
}

impl Trial<'_> {
    /// Trains a model in memory, in single precision. `after` sees the steps done, the model and the metrics of the step.
    ///
    /// # Errors
    /// What can go wrong in training, an interruption, and the first error of `after`.
    pub fn fit(
        &self,
        stage: usize,
        method: &mut dyn Method,
        decoder: &mut Decoder,
        tokenizer: &Tokenizer,
        mut after: impl FnMut(u64, &mut Decoder, &Metrics) -> Result<()>,
    ) -> Result<()> {
        let steps = method.steps();
        let fit = Fit { decoder, tokenizer, seed: self.seed, stage, precision: Precision::F32 };
        train::fit(method, fit, |step, decoder, metrics| {
            (self.progress)(step, steps);
            self.go_on()?;
            after(step, decoder, metrics)
        })
    }

    /// Fails where somebody asked to stop.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn go_on(&self) -> Result<()> {
        if self.interrupt.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// An [`Experiment`] whose type is forgotten.
pub trait Runnable: Send + Sync {
    /// Trains and measures one arm; the start of a seed is made once.
    ///
    /// # Errors
    /// Whatever makes it impossible.
    fn run(&self, arm: &str, trial: &Trial<'_>) -> Result<Measurements>;
}

/// The experiment with these settings.
///
/// # Errors
/// Settings that are not the experiment's, or mean nothing.
pub fn open<E: Experiment + DeserializeOwned + 'static>(
    system: &'static str,
    settings: &Value,
) -> Result<Box<dyn Runnable>> {
    let experiment: E = serde_json::from_value(settings.clone())
        .map_err(|error| Error::Settings { system, reason: error.to_string() })?;
    experiment.validate()?;
    Ok(Box::new(Opened { experiment, starts: Mutex::default() }))
}

/// Made by whoever comes first; the others wait.
type Slot<S> = Arc<Mutex<Option<Arc<S>>>>;

struct Opened<E: Experiment> {
    experiment: E,
    starts: Mutex<BTreeMap<u64, Slot<E::Start>>>,
}

impl<E: Experiment> Runnable for Opened<E> {
    fn run(&self, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let slot = self.starts.lock().unwrap_or_else(PoisonError::into_inner).entry(trial.seed).or_default().clone();
        let start = {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            match &*slot {
                Some(start) => Arc::clone(start),
                None => Arc::clone(slot.insert(Arc::new(self.experiment.start(trial)?))),
            }
        };
        self.experiment.run(&start, arm, trial)
    }
}
