//! Speed and memory of the engine on SmolLM2-135M's shape with random weights, as one JSON line.
//!
//! ```text
//! cargo run --release -p posttrain-model --example speed -- train|generate [--precision f32|bf16] [--lora]
//!                                                           [--threads N] [--repeats N]
//! ```
//! `train`: 8 sequences of 256 tokens, forward, backward, clipping and AdamW. `generate`: 16 prompts of 64 tokens, 128 sampled
//! tokens each. Weights are packed inside the measured time, as after every update. Each phase's time goes to stderr.
//! `bench/compare.py` runs this beside PyTorch.

use std::sync::Arc;
use std::time::Instant;

use base::{Purpose, Random};
use kernels::{AdamW, AdamWStep, Precision};
use posttrain_model::decoder::{DecodeRow, Decoder, Gradients, PackedTokens, SequenceCache, Target, Workspace};
use posttrain_model::lora::LoraConfig;
use posttrain_model::{Family, ModelConfig};
use rayon::prelude::*;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const VOCABULARY: usize = 49152;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| arguments.iter().position(|argument| argument == name).and_then(|i| arguments.get(i + 1));
    let number = |name: &str| value(name).map(|text| text.parse::<usize>()).transpose();
    let task = arguments.first().map_or("train", String::as_str);
    let lora = arguments.iter().any(|argument| argument == "--lora");
    let (precision, precision_name) = match value("--precision").map(String::as_str) {
        Some("f32") => (Precision::F32, "f32"),
        None | Some("bf16") => (Precision::Bf16, "bf16"),
        Some(other) => return Err(format!("unknown precision {other}").into()),
    };
    if let Some(threads) = number("--threads")? {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let repeats = number("--repeats")?.unwrap_or(3);

    let mut decoder = Decoder::random(smollm2_135m(), 1)?;
    if lora {
        decoder.attach_lora(&LoraConfig::default(), 1)?;
    }
    let (case, rates) = match task {
        "train" => (if lora { "lora" } else { "full" }, train(&mut decoder, precision, repeats)?),
        "generate" => ("generate", generate(&mut decoder, precision, repeats)?),
        other => return Err(format!("unknown task {other}").into()),
    };
    let result = serde_json::json!({
        "case": format!("{case}-{precision_name}"),
        "tokens_per_second": rates,
        "peak_memory_bytes": peak_memory(),
        "threads": rayon::current_num_threads(),
        "versions": { "posttrain": env!("CARGO_PKG_VERSION") },
    });
    println!("{result}");
    Ok(())
}

/// The shape of SmolLM2-135M.
fn smollm2_135m() -> ModelConfig {
    let mut config = ModelConfig::tiny(Family::Llama, VOCABULARY);
    config.hidden_size = 576;
    config.intermediate_size = 1536;
    config.heads = 9;
    config.kv_heads = 3;
    config.head_dim = 64;
    config.attention_scale = 0.125;
    config.layers = vec![config.layers[0]; 30];
    config
}

fn random_ids(name: usize, count: usize) -> Vec<u32> {
    let random = Random::new(2, Purpose::Test).step(name as u32);
    (0..count).map(|i| random.at(i as u32).below(VOCABULARY as u64) as u32).collect()
}

/// Prints how long each phase took.
struct Phases {
    start: Instant,
    last: Instant,
    line: String,
}

impl Phases {
    fn start() -> Self {
        Self { start: Instant::now(), last: Instant::now(), line: String::new() }
    }

    fn done(&mut self, phase: &str) {
        self.line += &format!("{phase} {:.3}  ", self.last.elapsed().as_secs_f64());
        self.last = Instant::now();
    }

    fn finish(self) -> f64 {
        eprintln!("{}", self.line);
        self.start.elapsed().as_secs_f64()
    }
}

/// AdamW's moments.
struct Optimizer {
    m: Vec<f32>,
    v: Vec<f32>,
}

impl Optimizer {
    fn update(&mut self, decoder: &mut Decoder, gradients: &Gradients, step: usize) {
        let norm = kernels::sum_of_squares(gradients.flat()).sqrt() as f32;
        let adamw = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
        for index in 0..decoder.parameters().len() {
            let info = &decoder.parameters()[index];
            let update = AdamWStep {
                step: step as u64 + 1,
                learning_rate: 1e-4,
                weight_decay: if info.decay { 0.01 } else { 0.0 },
                gradient_scale: if norm > 1.0 { 1.0 / norm } else { 1.0 },
            };
            let range = info.range.clone();
            let (m, v) = (&mut self.m[range.clone()], &mut self.v[range]);
            adamw.update(update, decoder.parameter_mut(index), gradients.grad(index), m, v);
        }
    }
}

/// Tokens per second of full steps, after one for warming up.
fn train(decoder: &mut Decoder, precision: Precision, repeats: usize) -> Result<Vec<f64>> {
    const SEQUENCES: usize = 8;
    const LENGTH: usize = 256;
    let mut workspace = Workspace::new();
    let mut gradients = decoder.gradients();
    let size = gradients.flat().len();
    let mut optimizer = Optimizer { m: vec![0.0; size], v: vec![0.0; size] };
    let mut rates = Vec::new();
    for step in 0..=repeats {
        let mut tokens = PackedTokens::new();
        let mut targets = Vec::new();
        for sequence in 0..SEQUENCES {
            let ids = random_ids(step * SEQUENCES + sequence, LENGTH);
            tokens.push(&ids, None)?;
            let first = sequence * LENGTH;
            targets.extend(ids[1..].iter().enumerate().map(|(i, &token)| Target { row: first + i, token }));
        }
        let d_log_prob = vec![-1.0 / targets.len() as f32; targets.len()];
        let mut phases = Phases::start();
        decoder.prepare_for_training(precision);
        phases.done("prepare");
        decoder.forward(&tokens, &mut workspace, true)?;
        phases.done("forward");
        decoder.backward(&tokens, &mut workspace, &targets, 1.0, &d_log_prob, None, &mut gradients)?;
        gradients.finish();
        phases.done("backward");
        optimizer.update(decoder, &gradients, step);
        gradients.clear();
        phases.done("update");
        rates.push((SEQUENCES * LENGTH) as f64 / phases.finish());
    }
    Ok(rates.split_off(1))
}

/// New tokens per second of whole generations, after one for warming up.
fn generate(decoder: &mut Decoder, precision: Precision, repeats: usize) -> Result<Vec<f64>> {
    const SEQUENCES: usize = 16;
    const PROMPT: usize = 64;
    const NEW: usize = 128;
    let mut workspace = Workspace::new();
    let mut logits = vec![0.0; SEQUENCES * VOCABULARY];
    let mut weights = logits.clone();
    let mut rates = Vec::new();
    for step in 0..=repeats {
        let prompts: Vec<Vec<u32>> = (0..SEQUENCES).map(|i| random_ids(step * SEQUENCES + i, PROMPT)).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let mut phases = Phases::start();
        // Counts as a change of the weights, so that packing them is part of every repeat.
        decoder.parameter_mut(0);
        decoder.prepare(precision);
        phases.done("prepare");
        let prefills = decoder.prefill(&prompts, &mut workspace)?;
        phases.done("prefill");
        let new_cache =
            |prefill: &posttrain_model::decoder::Prefill| SequenceCache::new(decoder, Arc::clone(&prefill.cache), NEW);
        let mut caches: Vec<SequenceCache> = prefills.iter().map(new_cache).collect();
        let hidden: Vec<f32> = prefills.iter().flat_map(|prefill| prefill.hidden.iter().copied()).collect();
        decoder.logits(&hidden, &mut logits)?;
        for position in 0..NEW {
            let ids = sample(&logits, &mut weights, position as u32);
            if position + 1 == NEW {
                break;
            }
            let mut rows: Vec<DecodeRow> =
                caches.iter_mut().zip(ids.chunks(1)).map(|(cache, tokens)| DecodeRow { tokens, cache }).collect();
            decoder.decode(&mut rows, &mut workspace)?;
            decoder.logits(workspace.hidden(), &mut logits)?;
        }
        phases.done("decode");
        rates.push((SEQUENCES * NEW) as f64 / phases.finish());
    }
    Ok(rates.split_off(1))
}

/// Draws one token from each row of logits by inverting the distribution function.
fn sample(logits: &[f32], weights: &mut [f32], position: u32) -> Vec<u32> {
    let draw = |(row, (logits, weights)): (usize, (&[f32], &mut [f32]))| {
        kernels::softmax_weights(logits, 1.0, weights);
        let blocks: Vec<f32> = weights.chunks(64).map(|block| block.iter().sum()).collect();
        let uniform = Random::new(3, Purpose::Sampling).sample(row as u32).at(position).uniform() as f32;
        let mut rest = uniform * blocks.iter().sum::<f32>();
        let mut crosses = |mass: &f32| {
            rest -= mass;
            rest < 0.0
        };
        let block = blocks.iter().position(&mut crosses).unwrap_or(blocks.len() - 1);
        rest += blocks[block];
        let place = weights[64 * block..].iter().position(|mass| {
            rest -= mass;
            rest < 0.0
        });
        (64 * block + place.unwrap_or(0)) as u32
    };
    logits.par_chunks(VOCABULARY).zip(weights.par_chunks_mut(VOCABULARY)).enumerate().map(draw).collect()
}

/// The process's largest resident size so far, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(1024 * line.split_whitespace().nth(1)?.parse::<u64>().ok()?)
}
