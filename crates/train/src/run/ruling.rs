//! What follows from an alarm: nothing, a stop, or a way back.
//!
//! Going back is resuming: the run takes up a checkpoint, its logs are cut to the checkpoint's lengths, and everything newer is
//! removed. What is new is the factor of the learning rate, which later checkpoints keep as the number of rollbacks. A process
//! that is killed before the next checkpoint resumes from the same checkpoint with the old learning rate, meets the same alarm
//! in the same step, and goes back again: to the same bytes.

use base::files::{self, Manifest};

use super::{Logs, Session};
use crate::checkpoint::{self, State};
use crate::error::{Error, Result};
use crate::method::Method;
use crate::metrics::Metrics;
use crate::observer::Event;
use crate::optimizer::Optimizer;
use crate::referee::{Action, Alarm, Referee};

/// What follows from the alarms of a step.
pub(super) enum Ruling {
    Proceed,
    GoneBack,
    Stop(Alarm),
}

impl Session<'_> {
    /// The referee of the current stage, who has seen all of it that has been logged.
    pub(super) fn referee_of_stage(&self) -> Result<Referee> {
        let mut referee = Referee::new(&self.run.referee);
        let start = (self.state.global_step - self.state.stage_step) as f64;
        let text = files::read_to_string(&self.directory.metrics())?;
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Metrics>(line).ok());
        for metrics in lines.filter(|metrics| metrics.get("step").is_some_and(|step| step > start)) {
            referee.see(&metrics);
        }
        Ok(referee)
    }

    /// Shows the referee what is about to be logged, and adds its evidence.
    pub(super) fn watch(&mut self, metrics: &mut Metrics) {
        let Some(referee) = &mut self.referee else { return };
        let (evidence, alarms) = referee.see(metrics);
        metrics.extend(evidence);
        self.alarms.extend(alarms);
    }

    /// What the learning rates of the schedule are multiplied with.
    pub(super) fn learning_rate_factor(&self) -> f64 {
        self.run.referee.learning_rate_factor.powi(self.state.rollbacks as i32)
    }

    /// Rules on the alarms of the step that was just made.
    pub(super) fn rule(&mut self, method: &mut dyn Method, optimizer: &mut Optimizer) -> Result<Ruling> {
        let alarms = std::mem::take(&mut self.alarms);
        for alarm in &alarms {
            self.run.observer.observe(Event::Alarm { alarm });
        }
        self.state.alarms.extend(alarms.iter().cloned());
        let Some(first) = alarms.into_iter().next() else { return Ok(Ruling::Proceed) };
        match self.run.referee.action {
            Action::Off | Action::Warn => Ok(Ruling::Proceed),
            Action::Stop => Ok(Ruling::Stop(first)),
            Action::Rollback if self.state.rollbacks >= self.run.referee.max_rollbacks => Ok(Ruling::Stop(first)),
            Action::Rollback => match self.checkpoint_before(&first)? {
                None => Ok(Ruling::Stop(first)),
                Some(step) => {
                    self.go_back(step, &first, method, optimizer)?;
                    Ok(Ruling::GoneBack)
                }
            },
        }
    }

    /// The newest checkpoint of the stage from before the evidence began, or else the oldest. Only those that are made
    /// whether or not a run is interrupted count.
    fn checkpoint_before(&self, alarm: &Alarm) -> Result<Option<u64>> {
        let start = self.state.global_step - self.state.stage_step;
        let mut steps = self.directory.checkpoints()?;
        steps.retain(|&step| step > start && step < self.state.global_step && self.scheduled(step));
        Ok(steps.iter().rev().find(|&&step| step < alarm.since).or(steps.first()).copied())
    }

    fn go_back(&mut self, step: u64, alarm: &Alarm, method: &mut dyn Method, optimizer: &mut Optimizer) -> Result<()> {
        let folder = self.directory.checkpoint(step);
        Manifest::verify(&folder)?;
        let restored = checkpoint::load(&self.directory, step, self.run.decoder.adapter_config().is_some())?;
        let misfit = |reason| Error::Mismatch { folder: folder.clone(), reason };
        checkpoint::restore_parameters(&mut self.run.decoder, restored.parameters).map_err(misfit)?;
        optimizer.restore(restored.optimizer, restored.state.updates).map_err(misfit)?;
        method.load(&folder)?;
        let State { alarms, rollbacks, .. } = std::mem::replace(&mut self.state, restored.state);
        self.state = State { alarms, rollbacks: rollbacks + 1, ..std::mem::take(&mut self.state) };

        let Logs { metrics, events, timing } = Logs::cut(&self.directory, &self.state, true)?;
        (self.metrics, self.events, self.timing) = (metrics, events, timing);
        self.referee = Some(self.referee_of_stage()?);
        let mut metrics = Metrics::new();
        metrics.set("step", step as f64);
        metrics.set("referee/rollbacks", f64::from(self.state.rollbacks));
        metrics.set("referee/alarm_step", alarm.step as f64);
        metrics.set("referee/learning_rate_factor", self.learning_rate_factor());
        self.record(&metrics)?;
        let event = Event::GoneBack { step, learning_rate_factor: self.learning_rate_factor() };
        self.run.observer.observe(event);
        Ok(())
    }
}
