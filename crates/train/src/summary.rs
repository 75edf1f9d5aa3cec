//! `summary.json`: the result of a run in one file, for people and programs.

use std::collections::BTreeMap;
use std::path::Path;

use base::files::{self, FileError};
use eval::paired::Comparison;
use serde::{Deserialize, Serialize};

use crate::checkpoint::State;
use crate::evaluation::Evaluation;
use crate::metrics::Metrics;
use crate::referee::Alarm;
use crate::run::{DataSource, Run};
use crate::timing::{Phase, StepTiming, peak_memory_bytes};

/// The result of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Name and version of the program.
    pub program: String,
    /// The command that makes the same run again.
    pub command: String,
    /// SHA-256 of the resolved configuration.
    pub config_sha256: String,
    /// The model the run started from.
    pub base_model: String,
    /// Hash of its weights, where known.
    pub base_model_sha256: Option<String>,
    /// The data.
    pub data: Vec<DataSource>,
    /// Seed of every draw.
    pub seed: u64,
    /// The methods of the stages, in order.
    pub stages: Vec<String>,
    /// Steps done.
    pub steps: u64,
    /// Tokens that passed through training.
    pub num_tokens: u64,
    /// Parameters that were trained.
    pub trained_parameters: usize,
    /// The first evaluation, if it was made before the first step.
    pub before: Option<Evaluation>,
    /// The last evaluation.
    pub after: Option<Evaluation>,
    /// The change between the two, problem by problem.
    pub change: Option<Comparison>,
    /// The referee's alarms.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alarms: Vec<Alarm>,
    /// How often it took the run back.
    #[serde(default)]
    pub rollbacks: u32,
    /// The metrics of the last step.
    pub last_step: Metrics,
    /// The only part that differs from one execution to the next.
    pub timing: Timing,
}

/// Wall-clock times and memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Seconds of all steps, evaluations and saves; work that was lost to a kill is not counted.
    pub seconds: f64,
    /// Seconds by kind of work.
    pub phases: BTreeMap<Phase, f64>,
    /// Trained tokens a second of training time.
    pub train_tokens_per_second: Option<f64>,
    /// Most memory the process held, in bytes, where the system tells.
    pub peak_memory_bytes: Option<u64>,
}

impl Timing {
    /// Adds up the laps of a run.
    pub fn of(laps: &[StepTiming]) -> Self {
        let mut phases = BTreeMap::new();
        for (phase, seconds) in laps.iter().flat_map(|lap| &lap.phases) {
            *phases.entry(*phase).or_default() += seconds;
        }
        let tokens: u64 = laps.iter().map(|lap| lap.tokens).sum();
        let train = phases.get(&Phase::Train).copied().unwrap_or(0.0);
        let peaks = laps.iter().filter_map(|lap| lap.peak_memory_bytes).chain(peak_memory_bytes());
        Self {
            seconds: laps.iter().map(|lap| lap.step_time).sum(),
            train_tokens_per_second: (train > 0.0).then(|| tokens as f64 / train),
            phases,
            peak_memory_bytes: peaks.max(),
        }
    }
}

impl Summary {
    pub(crate) fn new(run: &Run<'_>, stages: &[&str], state: &State, last_step: Metrics, laps: &[StepTiming]) -> Self {
        let before = state.evaluations.first().filter(|evaluation| evaluation.step == 0);
        let after = state.evaluations.last();
        let change = before.zip(after).and_then(|(before, after)| after.compare(before, run.seed));
        Self {
            program: run.provenance.program.clone(),
            command: run.provenance.command.clone(),
            config_sha256: state.origin.config_sha256.clone(),
            base_model: run.provenance.base_model.clone(),
            base_model_sha256: state.origin.base_model_sha256.clone(),
            data: run.provenance.data.clone(),
            seed: run.seed,
            stages: stages.iter().map(|&name| name.to_owned()).collect(),
            steps: state.global_step,
            num_tokens: state.num_tokens,
            trained_parameters: run.decoder.parameters().iter().map(|info| info.shape.iter().product::<usize>()).sum(),
            before: before.cloned(),
            after: after.cloned(),
            change,
            alarms: state.alarms.clone(),
            rollbacks: state.rollbacks,
            last_step,
            timing: Timing::of(laps),
        }
    }

    /// Reads the summary of a finished run; `None` where there is none.
    pub fn read(path: &Path) -> Result<Option<Self>, FileError> {
        if !path.exists() {
            return Ok(None);
        }
        let incomplete =
            |error: serde_json::Error| FileError::Incomplete { path: path.to_owned(), reason: error.to_string() };
        serde_json::from_slice(&files::read(path)?).map(Some).map_err(incomplete)
    }

    pub(crate) fn write(&self, path: &Path) -> Result<(), FileError> {
        let text = serde_json::to_string_pretty(self).map_err(|error| files::io_error("write", path)(error.into()))?;
        files::write(path, format!("{text}\n").as_bytes())
    }
}
