//! Where the time goes. Wall-clock values are kept in `timing.jsonl` and in the `timing` part of `summary.json`, and
//! nowhere else: every other file of a run is the same each time the run is made.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Measuring the model on held-out data.
    Evaluate,
    /// Sampling completions.
    Rollout,
    /// Judging completions.
    Score,
    /// Log-probabilities under the reference model.
    Reference,
    /// Forward and backward passes and optimiser updates.
    Train,
    /// Writing checkpoints, episodes and the final model.
    Save,
}

/// Where the time of one step, or of one evaluation or save between steps, went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTiming {
    /// Steps done when this was written.
    pub step: u64,
    /// Seconds in all.
    pub step_time: f64,
    /// Seconds by kind of work.
    pub phases: BTreeMap<Phase, f64>,
    /// Tokens the model saw in training passes.
    pub tokens: u64,
    /// Rows whose forward pass for an update was made while sampling.
    #[serde(default)]
    pub reused_rows: u64,
    /// Most memory the process ever held, in bytes, where the system tells.
    pub peak_memory_bytes: Option<u64>,
}

/// A stopwatch with one hand per phase.
#[derive(Debug)]
pub struct Clock {
    started: Instant,
    phases: BTreeMap<Phase, f64>,
    reused_rows: u64,
}

impl Clock {
    /// Starts now.
    pub fn start() -> Self {
        Self { started: Instant::now(), phases: BTreeMap::new(), reused_rows: 0 }
    }

    /// Adds the time since `started` to `phase`.
    pub fn add(&mut self, phase: Phase, started: Instant) {
        *self.phases.entry(phase).or_default() += started.elapsed().as_secs_f64();
    }

    /// Counts rows that needed no forward pass.
    pub fn reuse(&mut self, rows: usize) {
        self.reused_rows += rows as u64;
    }

    /// Reads the stopwatch and starts it again.
    pub fn lap(&mut self, step: u64, tokens: u64) -> StepTiming {
        let lap = std::mem::replace(self, Self::start());
        StepTiming {
            step,
            step_time: lap.started.elapsed().as_secs_f64(),
            phases: lap.phases,
            tokens,
            reused_rows: lap.reused_rows,
            peak_memory_bytes: peak_memory_bytes(),
        }
    }
}

/// The high-water mark of the memory the process holds (`VmHWM` of Linux).
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
