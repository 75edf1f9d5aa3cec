//! How a run tells the outside world what it is doing.

use std::path::Path;

use crate::metrics::Metrics;
use crate::referee::Alarm;
use crate::timing::{Phase, StepTiming};

/// Something that happened in a run.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// The run starts, or goes on after `done` steps.
    Started {
        /// Steps of all stages.
        steps: u64,
        /// Steps already done by an earlier process.
        done: u64,
    },
    /// A stage starts or goes on.
    Stage {
        /// Its number, from 0.
        stage: usize,
        /// The name of its method.
        method: &'a str,
        /// Its steps.
        steps: u64,
    },
    /// Work inside a phase moved on.
    Progress {
        /// The phase.
        phase: Phase,
        /// Units done.
        done: usize,
        /// Units in all.
        total: usize,
    },
    /// A step is done and its metrics are written.
    Step {
        /// Its number over all stages, from 1.
        step: u64,
        /// What was measured.
        metrics: &'a Metrics,
        /// Where the time went.
        timing: &'a StepTiming,
    },
    /// The model was evaluated after this many steps.
    Evaluated {
        /// Steps done; 0 is the model the run started from.
        step: u64,
        /// What was measured.
        metrics: &'a Metrics,
    },
    /// A checkpoint or the final model is complete on disk.
    Saved {
        /// Steps done.
        step: u64,
        /// The folder.
        folder: &'a Path,
    },
    /// A checkpoint is not complete and was passed over.
    Damaged {
        /// What is wrong with it.
        error: &'a base::files::FileError,
    },
    /// The referee raises an alarm.
    Alarm {
        /// What is wrong.
        alarm: &'a Alarm,
    },
    /// The run goes back to where it was after this many steps.
    GoneBack {
        /// Steps done then.
        step: u64,
        /// What the learning rate is multiplied with from here on.
        learning_rate_factor: f64,
    },
    /// An interruption was noticed: the run stops after this step.
    Stopping {
        /// The step that is finished first.
        step: u64,
    },
}

/// Whoever wants to know. Events arrive in order, on the thread that runs the training.
pub trait Observer {
    /// Takes note of an event.
    fn observe(&mut self, event: Event<'_>);
}

/// Watches nothing.
impl Observer for () {
    fn observe(&mut self, _event: Event<'_>) {}
}
