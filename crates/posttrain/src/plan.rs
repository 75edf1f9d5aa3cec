//! What a run will need, before it starts: memory from the shapes, time from a quick measurement of this machine.

use std::time::Instant;

use kernels::{Matrix, MatrixMut, PackedMatrix};
use model::ModelConfig;
use model::decoder::Estimate;

use crate::config::Config;
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

/// Memory and time, item by item.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Bytes by purpose.
    pub memory: Vec<(&'static str, usize)>,
    /// Seconds by part of the run.
    pub time: Vec<(String, f64)>,
}

/// Share of the measured matrix rate that a whole training step reaches.
const TRAINING_EFFICIENCY: f64 = 0.75;
/// The same for decoding, whose products have few rows.
const DECODING_EFFICIENCY: f64 = 0.5;
/// Completions rarely use all the tokens they may.
const COMPLETION_SHARE: f64 = 0.5;

impl Plan {
    /// Estimates the run of `config` on this machine.
    pub fn new(config: &Config, model: &ModelConfig, work: Workload) -> Self {
        let precision = config.model.precision.into();
        let rate = matrix_rate(precision, model.hidden_size.max(256), model.intermediate_size.max(512));
        let estimate =
            |rows: usize, context: usize| Estimate::new(model, config.lora.as_ref(), precision, rows, context);
        let completion = |sampling: &rollout::SamplingOptions| sampling.max_new_tokens as f64 * COMPLETION_SHARE;

        let mut largest = estimate(1, work.longest);
        let (mut cache, mut reference) = (0, 0);
        let mut time = Vec::new();
        if config.has_evaluation() {
            let tokens = completion(&config.evaluation.sampling);
            let context = work.row_tokens + tokens;
            let one = estimate(1, context as usize);
            let flops = work.test_rows as f64 * (work.row_tokens + tokens) * one.forward_flops_per_token;
            time.push(("evaluations, before and after".to_owned(), 2.0 * flops / (rate * DECODING_EFFICIENCY)));
            let slots = config.evaluation.batch_size.min(work.test_rows);
            cache = slots * (work.longest + config.evaluation.sampling.max_new_tokens) * one.cache_per_token;
        }
        if let Some(sft) = &config.sft {
            let here = estimate(sft.training.micro_batch_tokens, work.longest);
            let steps = sft.training.steps(work.train_rows, sft.batch_size) as f64;
            let tokens = steps * sft.batch_size as f64 * work.row_tokens;
            time.push((
                format!("sft, {steps} steps"),
                tokens * here.training_flops_per_token / (rate * TRAINING_EFFICIENCY),
            ));
            if here.activations > largest.activations {
                largest = here;
            }
        }
        if let Some(grpo) = &config.grpo {
            let tokens = completion(&grpo.sampling);
            let here = estimate(grpo.training.micro_batch_tokens, (work.row_tokens + tokens) as usize);
            let steps = grpo.training.steps(work.train_rows, grpo.prompts_per_step) as f64;
            // A prompt is computed once for all its completions, in sampling and in training.
            let prompts = grpo.prompts_per_step as f64;
            let packed = prompts * (work.row_tokens + grpo.num_generations as f64 * tokens);
            let decode = packed * here.forward_flops_per_token / (rate * DECODING_EFFICIENCY);
            let passes =
                packed * grpo.num_iterations as f64 * here.training_flops_per_token / (rate * TRAINING_EFFICIENCY);
            let mut step = decode + passes;
            if grpo.objective.needs_reference() {
                step += packed * here.forward_flops_per_token / (rate * TRAINING_EFFICIENCY);
                if config.lora.is_none() {
                    reference = here.weights + here.packed;
                }
            }
            time.push((format!("grpo, {steps} steps"), steps * step));
            if here.activations > largest.activations {
                largest = here;
            }
            let slots = grpo.decode_batch_size.min(grpo.prompts_per_step * grpo.num_generations);
            cache = cache.max(slots * (work.longest + grpo.sampling.max_new_tokens) * here.cache_per_token);
        }
        let memory = vec![
            ("weights", largest.weights),
            ("packed weights", largest.packed),
            ("gradients", largest.gradients),
            ("optimiser", largest.optimizer),
            ("activations", largest.activations),
            ("key-value cache", cache),
            ("reference model", reference),
        ];
        Self { memory: memory.into_iter().filter(|(_, bytes)| *bytes > 0).collect(), time }
    }

    /// Bytes in all.
    pub fn total_memory(&self) -> u64 {
        self.memory.iter().map(|(_, bytes)| *bytes as u64).sum()
    }

    /// The estimate for people.
    pub fn render(&self) -> String {
        let mut text = format!("estimated memory: {}\n", bytes(self.total_memory()));
        for (what, size) in &self.memory {
            text += &format!("  {what:16} {:>9}\n", bytes(*size as u64));
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
    let mut multiply = || packed.matmul(Matrix::new(&a, ROWS, inner), MatrixMut::new(&mut c, ROWS, outer), false);
    multiply();
    let started = Instant::now();
    let mut times = 0;
    while started.elapsed().as_secs_f64() < 0.1 {
        multiply();
        times += 1;
    }
    (times * 2 * ROWS * inner * outer) as f64 / started.elapsed().as_secs_f64()
}
