//! Speed and memory of the engine on SmolLM2-135M's shape with random weights, one JSON line a measurement.
//!
//! ```text
//! cargo run --release -p posttrain-model --example step -- [full|lora|decode]... [f32|bf16]...
//! ```
//! Training: 8 sequences of 256 tokens, forward, backward and AdamW. Decoding: 16 continuations of 128 tokens of one
//! prompt of 64. Each measurement runs in a process of its own, so that its peak memory is its own.

use std::sync::Arc;
use std::time::Instant;

use base::{Purpose, Random};
use kernels::{AdamW, AdamWStep, Precision};
use posttrain_model::decoder::{DecodeRow, Decoder, PackedTokens, SequenceCache, Target, Workspace};
use posttrain_model::lora::LoraConfig;
use posttrain_model::{Family, ModelConfig};

const SEQUENCES: usize = 8;
const LENGTH: usize = 256;
const STEPS: usize = 4;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let pick = |names: &[&'static str]| -> Vec<&'static str> {
        let asked: Vec<_> = names.iter().copied().filter(|name| arguments.iter().any(|a| a == name)).collect();
        if asked.is_empty() { names.to_vec() } else { asked }
    };
    let (tasks, precisions) = (pick(&["full", "lora", "decode"]), pick(&["f32", "bf16"]));
    if let ([task], [precision]) = (&tasks[..], &precisions[..]) {
        return measure(task, precision);
    }
    for task in tasks {
        for precision in &precisions {
            let status = std::process::Command::new(std::env::current_exe()?).args([task, precision]).status()?;
            if !status.success() {
                return Err(format!("{task} {precision}: {status}").into());
            }
        }
    }
    Ok(())
}

fn measure(task: &str, precision_name: &str) -> Result<(), Box<dyn std::error::Error>> {
    let precision = if precision_name == "f32" { Precision::F32 } else { Precision::Bf16 };
    let mut decoder = Decoder::random(smollm2_135m(), 1)?;
    if task == "lora" {
        decoder.attach_lora(&LoraConfig::default(), 1)?;
    }
    let (tokens, seconds) = match task {
        "decode" => decode(&mut decoder, precision)?,
        _ => train(&mut decoder, precision)?,
    };
    let rate = tokens as f64 / seconds;
    println!(
        "{}",
        serde_json::json!({
            "task": task,
            "precision": precision_name,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": rate,
            "peak_memory_bytes": peak_memory(),
            "threads": rayon::current_num_threads(),
        })
    );
    Ok(())
}

/// The shape of SmolLM2-135M.
fn smollm2_135m() -> ModelConfig {
    let mut config = ModelConfig::tiny(Family::Llama, 49152);
    config.hidden_size = 576;
    config.intermediate_size = 1536;
    config.heads = 9;
    config.kv_heads = 3;
    config.head_dim = 64;
    config.attention_scale = 0.125;
    config.layers = vec![config.layers[0]; 30];
    config
}

fn random_ids(step: usize, count: usize) -> Vec<u32> {
    let random = Random::new(2, Purpose::Test).step(step as u32);
    (0..count).map(|i| random.at(i as u32).below(49152) as u32).collect()
}

/// Seconds of the median full step.
fn train(decoder: &mut Decoder, precision: Precision) -> Result<(usize, f64), Box<dyn std::error::Error>> {
    let mut workspace = Workspace::new();
    let mut gradients = decoder.gradients();
    let (mut m, mut v) = (vec![0.0; gradients.flat().len()], vec![0.0; gradients.flat().len()]);
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let mut seconds = Vec::new();
    for step in 0..STEPS {
        let mut tokens = PackedTokens::new();
        let mut targets = Vec::new();
        for sequence in 0..SEQUENCES {
            let ids = random_ids(step * SEQUENCES + sequence, LENGTH);
            tokens.push(&ids, None)?;
            let first = sequence * LENGTH;
            targets.extend(ids[1..].iter().enumerate().map(|(i, &token)| Target { row: first + i, token }));
        }
        let d_log_prob = vec![-1.0 / targets.len() as f32; targets.len()];
        let start = Instant::now();
        let mut marks = vec![("start", start)];
        decoder.prepare(precision);
        marks.push(("prepare", Instant::now()));
        decoder.forward(&tokens, &mut workspace, true)?;
        marks.push(("forward", Instant::now()));
        decoder.backward(&tokens, &mut workspace, &targets, 1.0, &d_log_prob, None, &mut gradients)?;
        gradients.finish();
        marks.push(("backward", Instant::now()));
        for index in 0..decoder.parameters().len() {
            let info = &decoder.parameters()[index];
            let weight_decay = if info.decay { 0.01 } else { 0.0 };
            let range = info.range.clone();
            let update = AdamWStep { step: step as u64 + 1, learning_rate: 1e-4, weight_decay, gradient_scale: 1.0 };
            let (m, v) = (&mut m[range.clone()], &mut v[range]);
            adamw.update(update, decoder.parameter_mut(index), gradients.grad(index), m, v);
        }
        gradients.clear();
        marks.push(("adamw", Instant::now()));
        seconds.push(start.elapsed().as_secs_f64());
        let parts: Vec<String> = marks
            .windows(2)
            .map(|pair| format!("{} {:.3}", pair[1].0, (pair[1].1 - pair[0].1).as_secs_f64()))
            .collect();
        eprintln!("step {step}: {}", parts.join(", "));
    }
    Ok((SEQUENCES * LENGTH, median(&mut seconds[1..])))
}

/// Seconds of the median generation, weights packed beforehand as after an optimiser step.
fn decode(decoder: &mut Decoder, precision: Precision) -> Result<(usize, f64), Box<dyn std::error::Error>> {
    const BATCH: usize = 16;
    const NEW: usize = 128;
    let mut workspace = Workspace::new();
    let mut seconds = Vec::new();
    let mut logits = vec![0.0; BATCH * 49152];
    for step in 0..STEPS {
        let prompt = random_ids(step, 64);
        let start = Instant::now();
        decoder.prepare(precision);
        let prefill = decoder.prefill(&[&prompt], &mut workspace)?.swap_remove(0);
        let mut caches: Vec<SequenceCache> =
            (0..BATCH).map(|_| SequenceCache::new(decoder, Arc::clone(&prefill.cache), NEW)).collect();
        for position in 0..NEW {
            let ids = random_ids(1000 + position, BATCH);
            let mut rows: Vec<DecodeRow> =
                caches.iter_mut().zip(ids.chunks(1)).map(|(cache, tokens)| DecodeRow { tokens, cache }).collect();
            decoder.decode(&mut rows, &mut workspace)?;
            decoder.logits(workspace.hidden(), &mut logits)?;
        }
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok((BATCH * NEW, median(&mut seconds[1..])))
}

fn median(seconds: &mut [f64]) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// The process's largest resident size so far, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(1024 * line.split_whitespace().nth(1)?.parse::<u64>().ok()?)
}
