//! What a run will need, before it starts: memory from the shapes, time from a quick measurement of this machine.

use std::time::Instant;

use kernels::{Matrix, MatrixMut, Onto, PackedMatrix};
use model::ModelConfig;
use model::decoder::Estimate;

use train::options::{GradientCheckpointing, TrainingOptions};

use crate::config::{Config, Stage};
use crate::corpus::Corpus;
use crate::report::{bytes, duration};

/// Sizes that only the data know.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Rows to train on.
    pub train_rows: usize,
    /// Held-out problems.
    pub test_rows: usize,
    /// Mean length of a prompt or row, in tokens.
    pub row_tokens: f64,
    /// Longest prompt or row, in tokens.
    pub longest: usize,
}

impl Workload {
    /// The sizes of a corpus.
    pub fn of(corpus: &Corpus) -> Self {
        let prompts = corpus.prompts.iter().map(|prompt| prompt.ids.len());
        let examples = corpus.examples.iter().map(|example| example.ids.len());
        let steps = corpus.steps.iter().map(|example| example.ids.len());
        let judged = corpus.judged.iter().map(|judged| judged.example.ids.len());
        // The prompt of a pair is computed once.
        let pairs = corpus.pairs.iter().map(|pair| {
            let shared = pair.shared_tokens();
            shared + pair.completions().map(|completion| completion.ids.len() - shared).sum::<usize>()
        });
        let rewarded = corpus.rewarded.lengths();
        let lengths: Vec<usize> =
            prompts.chain(examples).chain(rewarded).chain(steps).chain(judged).chain(pairs).collect();
        Self {
            train_rows: corpus.train_rows(),
            test_rows: corpus.test_rows(),
            row_tokens: lengths.iter().sum::<usize>() as f64 / lengths.len().max(1) as f64,
            longest: lengths.iter().copied().max().unwrap_or(1),
        }
    }
}

/// What a run needs in memory, in the stage or evaluation that needs most.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Bytes by purpose.
    pub items: Vec<(&'static str, usize)>,
    /// Whether stages that leave it open checkpoint their activations.
    pub checkpointing: bool,
}

impl Memory {
    /// The memory of `config`. Stages that leave activation checkpointing open use it where the run would not fit into
    /// `available` bytes otherwise.
    pub fn new(config: &Config, model: &ModelConfig, work: Workload, available: Option<u64>) -> Self {
        let kept = Self::with(config, model, work, false);
        let open =
            config.stages().iter().any(|stage| stage.training().gradient_checkpointing == GradientCheckpointing::Auto);
        match open && available.is_some_and(|available| available < kept.total()) {
            true => Self::with(config, model, work, true),
            false => kept,
        }
    }

    fn with(config: &Config, model: &ModelConfig, work: Workload, checkpointing: bool) -> Self {
        let precision = config.model.precision.into();
        let estimate = |rows: usize| Estimate::new(model, config.lora.as_ref(), precision, rows, work.longest);
        let one = estimate(1);
        let cache = |slots: usize, new_tokens: usize| slots * (work.longest + new_tokens) * one.cache_per_token;
        let activations = |training: &TrainingOptions, rows: usize| match checkpoints(training, checkpointing) {
            true => estimate(rows).checkpointed_activations,
            false => estimate(rows).activations,
        };
        let optimizer = |training: &TrainingOptions| training.optimizer_state.bytes() * one.trained;
        let purposes = [
            "weights",
            "packed weights",
            "gradients",
            "optimiser",
            "activations",
            "key-value cache",
            "reference model",
            "value model",
            "teachers",
        ];
        let compared = config.stages().iter().any(|stage| stage.needs_reference());
        let copied = config.lora.is_none() || config.stages().iter().any(|stage| stage.copies_reference());
        let reference = if compared && copied { one.scoring_copy } else { 0 };
        let value_model = |stage: Stage<'_>| match stage.has_separate_value_model() {
            true => one.weights + one.packed + one.gradients + optimizer(stage.training()),
            false => 0,
        };
        // Teachers are taken to be as large as their student.
        let teachers = |stage: Stage<'_>| stage.teachers().len() * (one.weights + one.packed);
        // Bytes for these purposes, by phase of the run.
        let mut phases = Vec::new();
        for stage in config.stages() {
            let (training, done) = (stage.training(), stage.work());
            let new_tokens = stage.sampling().map_or(0, |sampling| sampling.max_new_tokens);
            // A batch is cut into pieces of so many tokens, but never within the sequences of a prompt.
            let unit = work.longest + done.sequences_per_row * new_tokens;
            let rows = training.micro_batch_tokens.max(stage.recorded_tokens());
            let rows = rows.min(done.rows_per_step * unit).max(unit);
            // Weights that are trained are packed as they are used, unless they also sample.
            let packed = if config.lora.is_some() || stage.sampling().is_some() { one.packed } else { 0 };
            let slots = done.decode_batch_size.min(done.rows_per_step * done.sequences_per_row);
            phases.push([
                one.weights,
                packed,
                one.gradients,
                optimizer(training),
                activations(training, rows),
                cache(slots, new_tokens),
                if stage.needs_reference() { reference } else { 0 },
                value_model(stage),
                teachers(stage),
            ]);
        }
        if config.has_evaluation() {
            let slots = config.evaluation.batch_size.min(work.test_rows);
            let cache = cache(slots, config.evaluation.sampling.max_new_tokens);
            let value = config.stages().iter().map(|stage| value_model(*stage)).max().unwrap_or(0);
            let optimizer = config.stages().iter().map(|stage| optimizer(stage.training())).max().unwrap_or(0);
            let teachers = config.stages().into_iter().map(teachers).max().unwrap_or(0);
            phases.push([one.weights, one.packed, one.gradients, optimizer, 0, cache, reference, value, teachers]);
        }
        let largest = phases.into_iter().max_by_key(|phase| phase.iter().sum::<usize>()).unwrap_or_default();
        let items = purposes.into_iter().zip(largest).filter(|(_, bytes)| *bytes > 0).collect();
        Self { items, checkpointing }
    }

    /// Bytes in all.
    pub fn total(&self) -> u64 {
        self.items.iter().map(|(_, bytes)| *bytes as u64).sum()
    }

    /// Decides on activation checkpointing for the stages that leave it open.
    pub fn settle(&self, config: &mut Config) {
        for training in config.trainings_mut() {
            training.gradient_checkpointing = match checkpoints(training, self.checkpointing) {
                true => GradientCheckpointing::On,
                false => GradientCheckpointing::Off,
            };
        }
    }
}

/// Whether a stage checkpoints its activations, if `open` is what happens where it leaves this open.
fn checkpoints(training: &TrainingOptions, open: bool) -> bool {
    match training.gradient_checkpointing {
        GradientCheckpointing::Auto => open,
        GradientCheckpointing::On => true,
        GradientCheckpointing::Off => false,
    }
}

/// Memory and time, item by item.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the run needs in memory.
    pub memory: Memory,
    /// Seconds by part of the run.
    pub time: Vec<(String, f64)>,
}

/// What is said where activation checkpointing was decided on.
pub const CHECKPOINTING: &str =
    "activations are computed again in backward, since keeping them would need more memory than is available";

/// Share of the measured matrix rate that a whole training step reaches.
const TRAINING_EFFICIENCY: f64 = 0.75;
/// The same for decoding, whose products have few rows.
const DECODING_EFFICIENCY: f64 = 0.5;
/// Completions rarely use all the tokens they may.
const COMPLETION_SHARE: f64 = 0.5;

impl Plan {
    /// Estimates the run of `config` on this machine, of whose memory so many bytes are `available`.
    pub fn new(config: &Config, model: &ModelConfig, work: Workload, available: Option<u64>) -> Self {
        let precision = config.model.precision.into();
        let rate = matrix_rate(precision, model.hidden_size.max(256), model.intermediate_size.max(512));
        let memory = Memory::new(config, model, work, available);
        let estimate = |context: f64| Estimate::new(model, config.lora.as_ref(), precision, 1, context as usize);
        let completion = |sampling: &rollout::SamplingOptions| sampling.max_new_tokens as f64 * COMPLETION_SHARE;
        let training = |here: &Estimate, options: &TrainingOptions| match checkpoints(options, memory.checkpointing) {
            true => here.training_flops_per_token + here.checkpointing_flops_per_token,
            false => here.training_flops_per_token,
        };

        let mut time = Vec::new();
        if config.has_evaluation() {
            let tokens = completion(&config.evaluation.sampling);
            let one = estimate(work.row_tokens + tokens);
            let flops = work.test_rows as f64 * (work.row_tokens + tokens) * one.forward_flops_per_token;
            time.push(("evaluations, before and after".to_owned(), 2.0 * flops / (rate * DECODING_EFFICIENCY)));
        }
        for stage in config.stages() {
            let (options, done) = (stage.training(), stage.work());
            let tokens = stage.sampling().map_or(0.0, completion);
            let here = match stage.sampling() {
                Some(_) => estimate(work.row_tokens + tokens),
                None => estimate(work.longest as f64),
            };
            let steps = options.steps(work.train_rows, done.rows_per_step) as f64;
            // A prompt is computed once for all its completions, in sampling and in training.
            let packed = done.rows_per_step as f64 * (work.row_tokens + done.sequences_per_row as f64 * tokens);
            let mut passes = packed * done.passes as f64 * training(&here, options);
            let compared = usize::from(stage.needs_reference()) + stage.teachers().len();
            passes += compared as f64 * packed * here.forward_flops_per_token;
            let mut seconds = passes / (rate * TRAINING_EFFICIENCY);
            if stage.sampling().is_some() {
                seconds += packed * here.forward_flops_per_token / (rate * DECODING_EFFICIENCY);
            }
            time.push((format!("{}, {steps} steps", stage.method()), steps * seconds));
        }
        Self { memory, time }
    }

    /// The estimate for people.
    pub fn render(&self) -> String {
        let mut text = format!("estimated memory: {}\n", bytes(self.memory.total()));
        for (what, size) in &self.memory.items {
            text += &format!("  {what:16} {:>9}\n", bytes(*size as u64));
        }
        if self.memory.checkpointing {
            text += CHECKPOINTING;
            text.push('\n');
        }
        let total: f64 = self.time.iter().map(|(_, seconds)| seconds).sum();
        text += &format!("estimated time: {} (answers half as long as allowed)\n", duration(total));
        for (what, seconds) in &self.time {
            text += &format!("  {what:30} {:>12}\n", duration(*seconds));
        }
        text
    }
}

/// Floating-point operations a second of a product of the model's size, measured for a tenth of a second.
fn matrix_rate(precision: kernels::Precision, inner: usize, outer: usize) -> f64 {
    const ROWS: usize = 256;
    let (a, b) = (vec![0.5; ROWS * inner], vec![0.25; inner * outer]);
    let mut c = vec![0.0; ROWS * outer];
    let mut packed = PackedMatrix::new(precision, inner, outer);
    packed.pack(0, Matrix::new(&b, inner, outer));
    let mut multiply = || packed.matmul(Matrix::new(&a, ROWS, inner), MatrixMut::new(&mut c, ROWS, outer), Onto::Zero);
    multiply();
    let started = Instant::now();
    let mut times = 0;
    while started.elapsed().as_secs_f64() < 0.1 {
        multiply();
        times += 1;
    }
    (times * 2 * ROWS * inner * outer) as f64 / started.elapsed().as_secs_f64()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use model::config::Family;
    use train::methods::policy::PolicyOptions;
    use train::methods::sft::SftOptions;

    use super::*;

    #[test]
    fn what_does_not_fit_is_checkpointed_unless_the_recipe_says_otherwise() {
        let mut model = ModelConfig::tiny(Family::Llama, 259);
        model.layers = vec![model.layers[0]; 12];
        let work = Workload { train_rows: 100, test_rows: 0, row_tokens: 30.0, longest: 50 };
        let mut config =
            Config { sft: Some(SftOptions::default()), policy: Some(PolicyOptions::default()), ..Config::default() };
        let memory = |config: &Config, available| Memory::new(config, &model, work, available);
        let settled = |config: &Config, available| {
            let mut settled = config.clone();
            memory(config, available).settle(&mut settled);
            settled.stages().iter().map(|stage| stage.training().gradient_checkpointing).collect::<Vec<_>>()
        };
        use GradientCheckpointing::{Off, On};
        let kept = memory(&config, None);
        assert!(!kept.checkpointing);
        assert_eq!(settled(&config, None), [Off, Off]);
        let (enough, too_little) = (Some(kept.total()), Some(kept.total() - 1));
        assert_eq!(settled(&config, enough), [Off, Off]);
        assert_eq!(settled(&config, too_little), [On, On]);
        let checkpointed = memory(&config, too_little);
        let activations = |memory: &Memory| memory.items.iter().find(|(what, _)| *what == "activations").unwrap().1;
        assert!(checkpointed.checkpointing && activations(&checkpointed) < activations(&kept) / 2);

        config.sft.as_mut().unwrap().training.gradient_checkpointing = Off;
        assert_eq!(settled(&config, too_little), [Off, On]);
        config.policy.as_mut().unwrap().training.gradient_checkpointing = On;
        assert_eq!(settled(&config, enough), [Off, On]);
        assert!(!memory(&config, Some(0)).checkpointing, "nothing is left to decide");
    }

    #[test]
    fn the_plan_says_that_it_checkpoints() {
        let model = ModelConfig::tiny(Family::Llama, 259);
        let work = Workload { train_rows: 100, test_rows: 0, row_tokens: 30.0, longest: 50 };
        let config = Config { sft: Some(SftOptions::default()), ..Config::default() };
        let says = |available| Plan::new(&config, &model, work, available).render().contains(CHECKPOINTING);
        assert!(says(Some(0)) && !says(None));
    }
}
