//! Arms times seeds, in parallel, each finished one in a file of its own.
//!
//! ```text
//! DIR/HASH/ARM-SEED.json      what was measured; HASH is that of the settings, so that different settings never meet
//! ```
//!
//! Every trial runs on one thread, the only one of a pool of its own: what it measures does not depend on how many run beside it, and
//! the processor time of that thread is the trial's. A process that is killed loses the trials that it was in, and the next one goes on
//! with the rest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use base::{Clock, Stopwatch, files};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::experiment::{Runnable, Trial};
use crate::measurements::{Measurements, Seed};
use crate::system::{Arm, System};

/// What to reproduce, and where.
pub struct Reproduction<'a> {
    /// The system.
    pub system: &'static System,
    /// Its settings.
    pub settings: Value,
    /// The arms to run.
    pub arms: Vec<&'static Arm>,
    /// The seeds.
    pub seeds: Vec<u64>,
    /// Folder of the trials' files.
    pub folder: &'a Path,
    /// Trials that run at the same time.
    pub workers: usize,
    /// Set from outside to stop soon.
    pub interrupt: &'a AtomicBool,
}

/// Something that happened, told from the thread that it happened on.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A trial moved on.
    Step {
        /// Its arm.
        arm: &'static str,
        /// Its seed.
        seed: u64,
        /// Steps of its current stage that are done.
        step: u64,
        /// All of them.
        steps: u64,
    },
    /// Trials that are finished, of all.
    Finished {
        /// Finished, by this process or an earlier one.
        done: usize,
        /// All.
        total: usize,
    },
}

/// A finished trial, as it is written down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    /// The arm.
    pub arm: String,
    /// The seed.
    pub seed: u64,
    /// Seconds it took, the start of its seed included for the trial that made that.
    pub seconds: f64,
    /// What they were measured by.
    #[serde(default)]
    pub clock: Clock,
    /// What was measured.
    pub measurements: Measurements,
}

impl Reproduction<'_> {
    /// The SHA-256 of system and settings, in hexadecimal.
    pub fn config_sha256(&self) -> String {
        files::sha256_of(format!("{}\n{}", self.system.name, self.settings).as_bytes())
    }

    /// The file of a trial.
    pub fn file(&self, arm: &str, seed: u64) -> PathBuf {
        self.folder.join(&self.config_sha256()[..16]).join(format!("{arm}-{seed}.json"))
    }

    /// Runs what is not finished, and returns everything: the trials by seed, in the order of the seeds.
    ///
    /// # Errors
    /// Settings that are not the system's; the first failure of a trial; an interruption.
    pub fn run(&self, watch: &(dyn Fn(Event) + Sync)) -> Result<Vec<Finished>> {
        let experiment = (self.system.open)(&self.settings)?;
        // Seed after seed within an arm, so that workers begin with different seeds, whose starts they make side by side.
        let trials: Vec<(&'static Arm, u64)> =
            self.arms.iter().flat_map(|arm| self.seeds.iter().map(move |seed| (*arm, *seed))).collect();
        let open: Vec<(&'static Arm, u64)> =
            trials.iter().copied().filter(|(arm, seed)| self.read(arm.name, *seed).is_none()).collect();
        let done = AtomicUsize::new(trials.len() - open.len());
        watch(Event::Finished { done: done.load(Ordering::Relaxed), total: trials.len() });

        let next = AtomicUsize::new(0);
        let failure: Mutex<Option<Error>> = Mutex::new(None);
        let failed = AtomicBool::new(false);
        let work = || {
            while let Some((arm, seed)) = open.get(next.fetch_add(1, Ordering::Relaxed)) {
                if failed.load(Ordering::Relaxed) {
                    break;
                }
                match self.trial(&*experiment, arm, *seed, watch) {
                    Ok(()) => {
                        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                        watch(Event::Finished { done, total: trials.len() });
                    }
                    Err(error) => {
                        failed.store(true, Ordering::Relaxed);
                        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                }
            }
        };
        let pools: Vec<rayon::ThreadPool> = (0..self.workers.clamp(1, open.len().max(1)))
            .map(|_| rayon::ThreadPoolBuilder::new().num_threads(1).build())
            .collect::<Result<_, _>>()
            .map_err(|error| Error::Thread(error.to_string()))?;
        std::thread::scope(|scope| {
            for pool in &pools {
                scope.spawn(|| pool.install(work));
            }
        });
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let finished = trials.iter().filter_map(|(arm, seed)| self.read(arm.name, *seed));
        Ok(finished.collect())
    }

    fn trial(
        &self,
        experiment: &dyn Runnable,
        arm: &'static Arm,
        seed: u64,
        watch: &(dyn Fn(Event) + Sync),
    ) -> Result<()> {
        let stopwatch = Stopwatch::start();
        let progress = |step, steps| watch(Event::Step { arm: arm.name, seed, step, steps });
        let trial = Trial { seed, interrupt: self.interrupt, progress: &progress };
        trial.go_on()?;
        let measurements = experiment.run(arm.name, &trial)?;
        if let Some((name, value)) = measurements.non_finite() {
            return Err(Error::NonFinite { arm: arm.name, seed, name, value });
        }
        let (seconds, clock) = stopwatch.seconds();
        let finished = Finished { arm: arm.name.into(), seed, seconds, clock, measurements };
        let text = serde_json::to_string(&finished).map_err(|error| Error::Settings {
            system: self.system.name,
            reason: format!("its measurements cannot be written: {error}"),
        })?;
        Ok(files::write(&self.file(arm.name, seed), text.as_bytes())?)
    }

    /// A trial that is finished already. A file that cannot be read is one that is not: the trial runs again.
    fn read(&self, arm: &str, seed: u64) -> Option<Finished> {
        let text = files::read_to_string(&self.file(arm, seed)).ok()?;
        serde_json::from_str(&text).ok()
    }
}

/// The trials of each seed, by arm.
pub fn by_seed(finished: &[Finished]) -> Vec<Seed<'_>> {
    let mut seeds: BTreeMap<u64, Seed<'_>> = BTreeMap::new();
    for trial in finished {
        let seed = seeds.entry(trial.seed).or_insert_with(|| Seed { seed: trial.seed, arms: BTreeMap::new() });
        seed.arms.insert(&trial.arm, &trial.measurements);
    }
    seeds.into_values().collect()
}
