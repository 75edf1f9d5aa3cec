//! The loop: stages of steps, with evaluations and checkpoints between them.
//!
//! ```text
//! evaluate                                              before the first step
//! for each stage:  for each step:
//!     step the method -> append metrics -> evaluate, if due -> save a checkpoint, if due -> stop, if asked to
//! write the final model, the model card and the summary
//! ```
//!
//! Stages that learn from rewards are watched by a [`Referee`](crate::referee), whose alarms may stop the run or take it back.
//!
//! A checkpoint holds the lengths of the logs at its time. Resuming cuts them back to these lengths, removes the other
//! files that are newer, and goes on; since a step is a function of what the checkpoint holds, the files come out the same.

mod ruling;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use base::files::{self, Digest, FileError, io_error};
use base::{Purpose, Random};
use eval::play::World;
use kernels::Precision;
use model::chat::ChatTemplate;
use model::decoder::{Decoder, Tape, Workspace};
use model::tokenizer::Tokenizer;
use model::weights::safetensors;

use crate::artefact;
use crate::card;
use crate::checkpoint::{self, Origin, Restored, State};
use crate::directory::{Directory, write_folder};
use crate::error::{Error, Result};
use crate::evaluation::Evaluator;
use crate::log::Log;
use crate::method::{Method, Report, Step};
use crate::metrics::Metrics;
use crate::observer::{Event, Observer};
use crate::optimizer::Optimizer;
use crate::options::{GradientCheckpointing, RunOptions};
use crate::referee::{Alarm, Referee, RefereeOptions};
use crate::summary::Summary;
use crate::tensorboard;
use crate::timing::{Clock, Phase, StepTiming};
use ruling::Ruling;

/// Where the parts of a run come from; written into the model card and the summary.
#[derive(Clone, Debug, Default)]
pub struct Provenance {
    /// Name and version of the program.
    pub program: String,
    /// The command that starts the same run again.
    pub command: String,
    /// The resolved configuration, as text.
    pub config: String,
    /// The model the run starts from, by name or path.
    pub base_model: String,
    /// A hash of the base model's weights, where there is one; asked for with the first result that is written.
    pub base_model_sha256: Option<Digest>,
    /// The data, each with a hash of its content.
    pub data: Vec<DataSource>,
}

/// A source of data.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DataSource {
    /// What it is for, and its name or path.
    pub name: String,
    /// Rows used.
    pub rows: usize,
    /// SHA-256 of its content.
    pub sha256: String,
}

/// Everything a run needs.
pub struct Run<'a> {
    /// The run directory.
    pub directory: &'a Path,
    /// When to save, evaluate and write episodes.
    pub options: RunOptions,
    /// What is watched for in stages that learn from rewards, and what happens then.
    pub referee: RefereeOptions,
    /// Seed of every draw.
    pub seed: u64,
    /// Number format of the matrix products.
    pub precision: Precision,
    /// The model to start from, with an adapter attached where one is to be trained.
    pub decoder: Decoder,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The environment that answers what is sampled; without one, an answer is one turn.
    pub world: Option<World<'a>>,
    /// Its chat template, which goes with the saved model.
    pub chat_template: Option<&'a ChatTemplate>,
    /// The stages, in order.
    pub stages: Vec<Box<dyn Method + 'a>>,
    /// Who measures the model, if anyone.
    pub evaluator: Option<&'a mut dyn Evaluator>,
    /// Who wants to know how it goes.
    pub observer: &'a mut dyn Observer,
    /// Set from outside to stop after the current step.
    pub interrupt: &'a AtomicBool,
    /// Where everything comes from.
    pub provenance: Provenance,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All steps are done and the result is written.
    Finished(Box<Summary>),
    /// It was asked to stop, and can be resumed.
    Interrupted {
        /// Steps done.
        step: u64,
    },
    /// The referee stopped it; it is saved, and can be resumed past the alarm.
    Stopped {
        /// Why.
        alarm: Box<Alarm>,
    },
}

/// How a stage ended.
enum End {
    Finished,
    Interrupted,
    Stopped(Alarm),
}

impl Run<'_> {
    /// Starts a new run in a directory without one.
    ///
    /// # Errors
    /// A directory that holds a run already, and everything that can go wrong in training.
    pub fn start(self) -> Result<Outcome> {
        let directory = Directory::new(self.directory);
        fs::create_dir_all(self.directory).map_err(io_error("create folder", self.directory))?;
        let _lock = directory.lock()?;
        if directory.holds_a_run() {
            return Err(Error::Exists { folder: self.directory.to_owned() });
        }
        if let Some(found) = directory.occupied()? {
            return Err(Error::Occupied { found });
        }
        files::write(&directory.config(), self.provenance.config.as_bytes())?;
        Session::open(self, directory, None)?.run()
    }

    /// Goes on from the newest complete checkpoint, or from the beginning where there is none. A finished run is left as it
    /// is.
    ///
    /// # Errors
    /// Checkpoints none of which is complete, a checkpoint of another run, and everything that can go wrong in training.
    pub fn resume(self) -> Result<Outcome> {
        let directory = Directory::new(self.directory);
        let _lock = directory.lock()?;
        if let Some(summary) = Summary::read(&directory.summary())? {
            return Ok(Outcome::Finished(Box::new(summary)));
        }
        let (step, damaged) = checkpoint::newest(&directory)?;
        for error in &damaged {
            self.observer.observe(Event::Damaged { error });
        }
        let adapter = self.decoder.adapter_config().is_some();
        let restored = step.map(|step| checkpoint::load(&directory, step, adapter)).transpose()?;
        if let Some(restored) = &restored {
            let folder = directory.checkpoint(restored.state.global_step);
            let now = Origin::of(&self.provenance)?;
            (restored.state.origin.check(&now, &self.provenance.base_model))
                .map_err(|reason| Error::Mismatch { folder, reason })?;
        }
        files::write(&directory.config(), self.provenance.config.as_bytes())?;
        Session::open(self, directory, restored)?.run()
    }
}

/// A run in progress.
struct Session<'a> {
    run: Run<'a>,
    directory: Directory,
    state: State,
    /// The optimiser of the stage that a checkpoint stopped in, until that stage goes on.
    restored: Option<Restored>,
    metrics: Log,
    events: Log,
    timing: Log,
    clock: Clock,
    workspace: Workspace,
    tape: Tape,
    /// Tokens trained on since the last line of timing.
    tokens: u64,
    /// Watches the current stage.
    referee: Option<Referee>,
    /// Alarms raised and not yet ruled on.
    alarms: Vec<Alarm>,
}

impl<'a> Session<'a> {
    fn open(run: Run<'a>, directory: Directory, restored: Option<Restored>) -> Result<Self> {
        for (stage, method) in run.stages.iter().enumerate() {
            check_rows(stage, &**method)?;
        }
        let steps: Vec<u64> = run.stages.iter().map(|method| method.steps()).collect();
        let state = match &restored {
            Some(restored) => restored.state.clone(),
            None => State { max_steps: steps.iter().sum(), ..State::default() },
        };
        let fits = state.max_steps == steps.iter().sum::<u64>()
            && state.stage_step <= steps.get(state.stage).copied().unwrap_or(0)
            && steps.iter().take(state.stage).sum::<u64>() + state.stage_step == state.global_step;
        if !fits {
            return Err(Error::Mismatch {
                folder: directory.checkpoint(state.global_step),
                reason: format!(
                    "it is at step {} of stage {} in a run of {} steps, but the configuration has stages of {steps:?} steps",
                    state.stage_step,
                    state.stage + 1,
                    state.max_steps
                ),
            });
        }
        let Logs { metrics, events, timing } = Logs::cut(&directory, &state, restored.is_some())?;
        let mut session = Self {
            metrics,
            events,
            timing,
            clock: Clock::start(),
            workspace: Workspace::new(),
            tape: Tape::new(),
            tokens: 0,
            referee: None,
            alarms: Vec::new(),
            run,
            directory,
            state,
            restored,
        };
        if session.restored.is_none() {
            session.events.append(&tensorboard::header())?;
        }
        Ok(session)
    }

    fn run(mut self) -> Result<Outcome> {
        let event = Event::Started { steps: self.state.max_steps, done: self.state.global_step };
        self.run.observer.observe(event);
        // A killed process may have saved a checkpoint and not yet removed what it replaces.
        self.rotate(false)?;
        let started_from = self.reference_of_first_stage()?;
        self.restore_weights()?;
        if self.state.global_step == 0 && self.run.options.eval_on_start {
            self.evaluate()?;
            if self.run.interrupt.load(Ordering::Relaxed) {
                return Ok(Outcome::Interrupted { step: 0 });
            }
        }
        let mut stages = std::mem::take(&mut self.run.stages);
        let mut started_from = Some(started_from);
        while let Some(method) = stages.get_mut(self.state.stage) {
            let reference = started_from.take().flatten();
            match self.stage(&mut **method, reference)? {
                End::Finished => {
                    let step = self.state.global_step;
                    method.finish(&mut self.run.decoder).map_err(|source| Error::Model { step, source })?;
                }
                End::Interrupted => return Ok(Outcome::Interrupted { step: self.state.global_step }),
                End::Stopped(alarm) => return Ok(Outcome::Stopped { alarm: Box::new(alarm) }),
            }
            if self.state.stage + 1 == stages.len() {
                break;
            }
            self.state.stage += 1;
            self.state.stage_step = 0;
            self.state.updates = 0;
        }
        self.finish(&stages)
    }

    /// A copy of the base model, where the first stage is the current one and needs it beside the model that is trained.
    fn reference_of_first_stage(&self) -> Result<Option<Decoder>> {
        match self.state.stage == 0 && self.needs_reference_copy(&*self.run.stages[0]) {
            true => self.reference_copy(&self.run.decoder).map(Some),
            false => Ok(None),
        }
    }

    /// A copy of a model that nothing will change.
    fn reference_copy(&self, model: &Decoder) -> Result<Decoder> {
        let step = self.state.global_step;
        model.packed_copy(self.run.precision).map_err(|source| Error::Model { step, source })
    }

    /// With an adapter, the reference is the model without it and needs no copy.
    fn needs_reference_copy(&self, method: &dyn Method) -> bool {
        method.needs_reference() && self.run.decoder.adapter_config().is_none()
    }

    fn restore_weights(&mut self) -> Result<()> {
        let Some(restored) = &mut self.restored else { return Ok(()) };
        let folder = self.directory.checkpoint(self.state.global_step);
        checkpoint::restore_parameters(&mut self.run.decoder, std::mem::take(&mut restored.parameters))
            .map_err(|reason| Error::Mismatch { folder, reason })
    }

    /// The reference of a later stage: a copy of the weights it starts from, kept on disk for when the stage is resumed.
    fn reference_of_later_stage(&mut self, method: &dyn Method) -> Result<Option<Decoder>> {
        if self.state.stage == 0 || !self.needs_reference_copy(method) {
            return Ok(None);
        }
        let step = self.state.global_step;
        let model_error = |source| Error::Model { step, source };
        let folder = self.directory.reference(self.state.stage);
        if self.state.stage_step == 0 {
            write_folder(&folder, |folder| {
                let path = folder.join(safetensors::FILE);
                safetensors::write(&path, self.run.decoder.views(), safetensors::Dtype::F32).map_err(model_error)
            })?;
            return self.reference_copy(&self.run.decoder).map(Some);
        }
        files::Manifest::verify(&folder)?;
        let tensors = safetensors::read(&folder).map_err(model_error)?;
        let mut reference = self.run.decoder.clone();
        checkpoint::restore_parameters(&mut reference, tensors).map_err(|reason| Error::Mismatch { folder, reason })?;
        self.reference_copy(&reference).map(Some)
    }

    /// Runs the current stage from where it stands.
    fn stage(&mut self, method: &mut dyn Method, reference: Option<Decoder>) -> Result<End> {
        let steps = method.steps();
        let schedule = method.training().schedule(steps);
        self.run.observer.observe(Event::Stage { stage: self.state.stage, method: method.name(), steps });
        if self.state.stage_step == steps {
            // Only what comes after the stage is left to do; a killed process may have removed the reference already.
            self.restored = None;
            return Ok(End::Finished);
        }
        let reference = match reference {
            Some(reference) => Some(reference),
            None => self.reference_of_later_stage(method)?,
        };
        let noise = Random::new(self.run.seed, Purpose::Rounding).sample(self.state.stage as u32);
        let mut optimizer = Optimizer::new(method.training(), &self.run.decoder, noise);
        if let Some(restored) = self.restored.take() {
            let folder = self.directory.checkpoint(self.state.global_step);
            if self.state.stage_step > 0 {
                method.load(&folder)?;
            }
            optimizer
                .restore(restored.optimizer, self.state.updates)
                .map_err(|reason| Error::Mismatch { folder, reason })?;
        }
        let mut gradients = self.run.decoder.gradients();
        self.workspace.set_checkpointing(method.training().gradient_checkpointing == GradientCheckpointing::On);
        self.referee = Some(self.referee_of_stage()?);
        while self.state.stage_step < steps {
            let number = self.state.global_step + 1;
            let learning_rate = schedule.learning_rate(self.state.stage_step) * self.learning_rate_factor();
            let report = method.step(&mut Step {
                number,
                index: self.state.stage_step,
                stage: self.state.stage,
                seed: self.run.seed,
                learning_rate,
                precision: self.run.precision,
                decoder: &mut self.run.decoder,
                reference: reference.as_ref(),
                tokenizer: self.run.tokenizer,
                world: self.run.world,
                optimizer: &mut optimizer,
                gradients: &mut gradients,
                workspace: &mut self.workspace,
                tape: &mut self.tape,
                clock: &mut self.clock,
                observer: self.run.observer,
            })?;
            self.state.updates = optimizer.updates();
            self.take(report, method, learning_rate)?;
            let last = self.state.global_step == self.state.max_steps;
            if last || every(self.run.options.eval_steps, self.state.global_step) {
                self.evaluate()?;
            }
            match self.rule(method, &mut optimizer)? {
                Ruling::Proceed => {}
                Ruling::GoneBack => continue,
                Ruling::Stop(alarm) => {
                    self.save(&optimizer, method)?;
                    return Ok(End::Stopped(alarm));
                }
            }
            let stopping = !last && self.run.interrupt.load(Ordering::Relaxed);
            if stopping {
                self.run.observer.observe(Event::Stopping { step: self.state.global_step });
            }
            if stopping || self.scheduled(self.state.global_step) {
                self.save(&optimizer, method)?;
            }
            if stopping {
                return Ok(End::Interrupted);
            }
        }
        Ok(End::Finished)
    }

    /// Writes down what a step has to tell.
    fn take(&mut self, report: Report, method: &dyn Method, learning_rate: f64) -> Result<()> {
        let step = self.state.global_step + 1;
        self.state.global_step = step;
        self.state.stage_step += 1;
        self.state.num_tokens += report.tokens;
        self.tokens += report.tokens;
        self.state.epoch = (self.state.stage_step * method.rows_per_step() as u64) as f64 / method.rows() as f64;
        let started = Instant::now();
        if let Some(table) = report.episodes.filter(|_| every(self.run.options.episode_steps, step)) {
            let path = self.directory.episodes(step);
            let bytes = table.to_parquet().map_err(|source| Error::Parquet { path: path.clone(), source })?;
            files::write(&path, &bytes)?;
        }
        self.clock.add(Phase::Save, started);
        let mut metrics = Metrics::new();
        metrics.set("step", step as f64);
        metrics.set("epoch", self.state.epoch);
        metrics.extend(report.metrics);
        metrics.set("learning_rate", learning_rate);
        metrics.set("num_tokens", self.state.num_tokens as f64);
        self.watch(&mut metrics);
        self.record(&metrics)?;
        let timing = self.lap()?;
        self.run.observer.observe(Event::Step { step, metrics: &metrics, timing: &timing });
        Ok(())
    }

    /// Appends metrics, which start with the step, to every log.
    fn record(&mut self, metrics: &Metrics) -> Result<()> {
        self.metrics.append(metrics.to_line().as_bytes())?;
        self.events.append(&tensorboard::scalars(self.state.global_step, metrics))?;
        Ok(())
    }

    /// Writes down where the time since the last lap went.
    fn lap(&mut self) -> Result<StepTiming> {
        let timing = self.clock.lap(self.state.global_step, std::mem::take(&mut self.tokens));
        let line = serde_json::to_string(&timing)
            .map_err(|error| io_error("write", &self.directory.timing())(error.into()))?;
        self.timing.append(format!("{line}\n").as_bytes())?;
        Ok(timing)
    }

    fn evaluate(&mut self) -> Result<()> {
        let Some(evaluator) = &mut self.run.evaluator else { return Ok(()) };
        let step = self.state.global_step;
        let started = Instant::now();
        // An evaluation has no use for what training keeps, and needs memory of its own.
        self.workspace.release();
        self.tape.release();
        self.run.decoder.prepare(self.run.precision);
        let observer = &mut self.run.observer;
        let mut progress = |done, total| observer.observe(Event::Progress { phase: Phase::Evaluate, done, total });
        let mut evaluation = evaluator
            .evaluate(&self.run.decoder, &mut progress)
            .map_err(|error| Error::Evaluation { step, reason: error.to_string(), hint: error.hint() })?;
        evaluation.step = step;
        let samples: String = evaluation.samples.drain(..).map(|sample| format!("{sample}\n")).collect();
        files::write(&self.directory.samples(step), samples.as_bytes())?;
        let mut metrics = Metrics::new();
        metrics.set("step", step as f64);
        metrics.extend(evaluation.metrics());
        self.watch(&mut metrics);
        self.record(&metrics)?;
        self.state.evaluations.push(evaluation);
        self.clock.add(Phase::Evaluate, started);
        self.lap()?;
        self.run.observer.observe(Event::Evaluated { step, metrics: &metrics });
        Ok(())
    }

    /// Whether the options ask for a checkpoint after this many steps.
    fn scheduled(&self, step: u64) -> bool {
        let save_steps = self.run.options.save_steps;
        every(save_steps, step) || (save_steps > 0 && step == self.state.max_steps)
    }

    fn save(&mut self, optimizer: &Optimizer, method: &dyn Method) -> Result<()> {
        let started = Instant::now();
        self.state.metrics_bytes = self.metrics.sync()?;
        self.state.events_bytes = self.events.sync()?;
        self.state.origin = Origin::of(&self.run.provenance)?;
        checkpoint::save(&self.directory, &self.state, optimizer, |folder| {
            self.write_model(folder)?;
            method.save(folder)
        })?;
        self.rotate(false)?;
        self.clock.add(Phase::Save, started);
        let folder = self.directory.checkpoint(self.state.global_step);
        self.run.observer.observe(Event::Saved { step: self.state.global_step, folder: &folder });
        Ok(())
    }

    fn rotate(&self, finished: bool) -> Result<()> {
        checkpoint::rotate(&self.directory, self.run.options.save_total_limit, finished, |step| self.scheduled(step))
    }

    /// Writes the model, or the adapter, in the layout other tools read.
    fn write_model(&self, folder: &Path) -> Result<()> {
        let step = self.state.global_step;
        let Run { decoder, tokenizer, chat_template, provenance, .. } = &self.run;
        artefact::write(folder, decoder, tokenizer, *chat_template, &provenance.base_model)
            .map_err(|source| Error::Model { step, source })
    }

    fn finish(mut self, stages: &[Box<dyn Method + 'a>]) -> Result<Outcome> {
        let started = Instant::now();
        let methods: Vec<&str> = stages.iter().map(|method| method.name()).collect();
        self.state.origin = Origin::of(&self.run.provenance)?;
        let card = card::text(&self.run, &methods, &self.state);
        write_folder(&self.directory.final_model(), |folder| {
            self.write_model(folder)?;
            files::write(&folder.join("README.md"), card.as_bytes())?;
            Ok::<(), Error>(())
        })?;
        files::write(&self.directory.card(), card.as_bytes())?;
        self.rotate(true)?;
        for stage in 0..stages.len() {
            crate::directory::remove(&self.directory.reference(stage))?;
        }
        self.clock.add(Phase::Save, started);
        self.lap()?;
        self.metrics.sync()?;
        self.events.sync()?;
        self.timing.sync()?;
        let summary =
            Summary::new(&self.run, &methods, &self.state, last_step(&self.directory)?, &read_timing(&self.directory)?);
        summary.write(&self.directory.summary())?;
        let folder = self.directory.final_model();
        self.run.observer.observe(Event::Saved { step: self.state.global_step, folder: &folder });
        Ok(Outcome::Finished(Box::new(summary)))
    }
}

/// The logs of a run.
struct Logs {
    metrics: Log,
    events: Log,
    timing: Log,
}

impl Logs {
    /// Takes the directory back to a state, that of a checkpoint where there is one: cuts the logs, and removes what is newer.
    ///
    /// # Errors
    /// Metrics that are missing, before anything is removed; files that cannot be read or written.
    fn cut(directory: &Directory, state: &State, checkpoint: bool) -> Result<Self> {
        Log::check(&directory.metrics(), state.metrics_bytes)?;
        directory.cut(state.global_step)?;
        // The metrics first: events are made again from them.
        let metrics = Log::open(&directory.metrics(), state.metrics_bytes)?;
        let events = Log::open(&directory.events(), kept_events(directory, state.events_bytes)?)?;
        let timing = kept_timing(directory, checkpoint.then_some(state.global_step))?;
        Ok(Self { metrics, events, timing: Log::open(&directory.timing(), timing)? })
    }
}

/// Whether something done every `period` steps (0: never) is due after `step` steps.
fn every(period: u64, step: u64) -> bool {
    period > 0 && step.is_multiple_of(period)
}

/// Refuses a stage, counted from 0, without rows or of more steps than can be numbered.
pub(crate) fn check_rows(stage: usize, method: &dyn Method) -> Result<()> {
    if method.rows() == 0 {
        return Err(Error::NoData { stage: stage + 1, method: method.name().to_owned() });
    }
    let found = method.training().validate_steps(method.rows(), method.rows_per_step());
    Ok(found.map_err(|error| error.within("training").within(method.name()))?)
}

/// The metrics of the last step of training.
fn last_step(directory: &Directory) -> Result<Metrics, FileError> {
    let text = files::read_to_string(&directory.metrics())?;
    let mut lines = text.lines().rev().filter_map(|line| serde_json::from_str(line).ok());
    Ok(lines.find(|metrics: &Metrics| metrics.get("learning_rate").is_some()).unwrap_or_default())
}

fn read_timing(directory: &Directory) -> Result<Vec<StepTiming>, FileError> {
    let path = directory.timing();
    let text = if path.exists() { files::read_to_string(&path)? } else { String::new() };
    // A line that was half written when the process was killed ends what is known.
    Ok(text.lines().map_while(|line| serde_json::from_str(line).ok()).collect())
}

/// Bytes of the TensorBoard file to keep: `known`, or where it is shorter those of a new one, made from the metrics, which
/// have all that is in it.
fn kept_events(directory: &Directory, known: u64) -> Result<u64, FileError> {
    let path = directory.events();
    if Log::length(&path)? >= known {
        return Ok(known);
    }
    let text = files::read_to_string(&directory.metrics())?;
    let mut bytes = tensorboard::header();
    for metrics in text.lines().filter_map(|line| serde_json::from_str::<Metrics>(line).ok()) {
        bytes.extend(tensorboard::scalars(metrics.get("step").unwrap_or_default() as u64, &metrics));
    }
    files::write(&path, &bytes)?;
    Ok(bytes.len() as u64)
}

/// Bytes of `timing.jsonl` to keep: its whole lines of the first `step` steps, none for a run that starts again.
fn kept_timing(directory: &Directory, step: Option<u64>) -> Result<u64, FileError> {
    let Some(step) = step else { return Ok(0) };
    let path = directory.timing();
    let text = if path.exists() { files::read_to_string(&path)? } else { String::new() };
    let known = |line: &&str| {
        line.ends_with('\n') && serde_json::from_str::<StepTiming>(line).is_ok_and(|timing| timing.step <= step)
    };
    Ok(text.split_inclusive('\n').take_while(known).map(|line| line.len() as u64).sum())
}
