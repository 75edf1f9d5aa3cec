//! What answers of very different lengths cost: throughput with lengths from a heavy tail beside that with equal lengths,
//! for the same number of requests, of tokens in total and of slots. One JSON line per kind of load, with the median of several
//! draws of the lengths.
//!
//! ```text
//! cargo run --release -p posttrain-rollout --example admission -- [--precision f32|bf16] [--threads N] [--draws N]
//! ```
//! The model has the layers of SmolLM2-135M, but 4 of them, and a vocabulary in proportion, with random weights. `questions`
//! has one answer to each prompt, so that every freed slot admits a new prompt; `groups` has 8 samples of each prompt. A
//! hook ends every answer at its length. With equal lengths all slots become free at once, which is the best case; with a
//! heavy tail, the last few long answers run alone.

use std::sync::Arc;
use std::time::Instant;

use base::{Purpose, Random};
use kernels::Precision;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use model::{Family, ModelConfig};
use posttrain_rollout::{Generator, LogitsContext, LogitsHook, Request, SamplingOptions};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const VOCABULARY: usize = 6144;
const SLOTS: usize = 16;
const REQUESTS: usize = 512;
const PROMPT: usize = 64;
/// The mean length of an answer, and the longest.
const MEAN: usize = 24;
const LONGEST: usize = 256;
/// The token of [`Tokenizer::bytes`] that ends an answer.
const END: usize = 257;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| arguments.iter().position(|argument| argument == name).and_then(|i| arguments.get(i + 1));
    let number = |name: &str| value(name).map(|text| text.parse::<usize>()).transpose();
    let (precision, precision_name) = match value("--precision").map(String::as_str) {
        Some("f32") => (Precision::F32, "f32"),
        None | Some("bf16") => (Precision::Bf16, "bf16"),
        Some(other) => return Err(format!("unknown precision {other}").into()),
    };
    if let Some(threads) = number("--threads")? {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let draws = number("--draws")?.unwrap_or(3);

    let mut decoder = Decoder::random(four_layers(), 1)?;
    decoder.prepare(precision);
    for (load, group) in [("questions", 1), ("groups", 8)] {
        let mut found = Vec::new();
        for draw in 0..draws {
            let uniform = run(&decoder, group, &Lengths(vec![MEAN; REQUESTS]))?;
            found.push((uniform, run(&decoder, group, &Lengths(heavy_tail(draw)))?));
        }
        let ratio = |(uniform, heavy): &(Speed, Speed)| heavy.tokens_per_second / uniform.tokens_per_second;
        found.sort_by(|a, b| ratio(a).total_cmp(&ratio(b)));
        let (uniform, heavy) = &found[found.len() / 2];
        let result = serde_json::json!({
            "case": format!("admission-{load}-{precision_name}"),
            "uniform_tokens_per_second": uniform.tokens_per_second,
            "heavy_tail_tokens_per_second": heavy.tokens_per_second,
            "ratios": found.iter().map(ratio).collect::<Vec<_>>(),
            "slots": SLOTS,
            "mean_slots_in_use": heavy.mean_slots_in_use,
            "threads": rayon::current_num_threads(),
            "versions": { "posttrain": env!("CARGO_PKG_VERSION") },
        });
        println!("{result}");
    }
    Ok(())
}

/// A decoder with the layers of SmolLM2-135M.
fn four_layers() -> ModelConfig {
    let mut config = ModelConfig::tiny(Family::Llama, VOCABULARY);
    config.hidden_size = 576;
    config.intermediate_size = 1536;
    config.heads = 9;
    config.kv_heads = 3;
    config.head_dim = 64;
    config.attention_scale = 0.125;
    config.layers = vec![config.layers[0]; 4];
    config
}

/// Lengths from a Pareto distribution with exponent 1.1, cut at the longest, with the same sum as equal ones.
fn heavy_tail(draw: usize) -> Vec<usize> {
    let random = Random::new(4, Purpose::Test).step(draw as u32);
    let drawn: Vec<f64> = (0..REQUESTS).map(|i| (1.0 - random.at(i as u32).uniform()).powf(-1.0 / 1.1)).collect();
    let lengths = |scale: f64| drawn.iter().map(move |x| ((scale * x) as usize).clamp(1, LONGEST));
    let (mut low, mut high) = (0.0, MEAN as f64);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        let enough = lengths(middle).sum::<usize>() >= MEAN * REQUESTS;
        *(if enough { &mut high } else { &mut low }) = middle;
    }
    let mut lengths: Vec<usize> = lengths(high).collect();
    let mut excess = lengths.iter().sum::<usize>().saturating_sub(MEAN * REQUESTS);
    for length in lengths.iter_mut().filter(|length| **length > 1) {
        let cut = excess.min(*length - 1);
        *length -= cut;
        excess -= cut;
    }
    lengths
}

/// Ends the answer to each request at its length.
struct Lengths(Vec<usize>);

impl LogitsHook for Lengths {
    fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>) {
        let length = self.0[context.request.prompt_id as usize];
        logits[END] = if context.completion.len() + 1 >= length { 1e4 } else { f32::NEG_INFINITY };
    }
}

struct Speed {
    tokens_per_second: f64,
    mean_slots_in_use: f64,
}

fn run(decoder: &Decoder, group: usize, lengths: &Lengths) -> Result<Speed> {
    let random = Random::new(2, Purpose::Test);
    let prompt = |name: usize| -> Arc<[u32]> {
        let random = random.step(name as u32);
        (0..PROMPT).map(|i| random.at(i as u32).below(VOCABULARY as u64) as u32).collect()
    };
    let prompts: Vec<Arc<[u32]>> = (0..REQUESTS / group).map(prompt).collect();
    // The number of a request stands where the hook finds it; samples of one prompt share its tokens.
    let requests: Vec<Request> = (0..REQUESTS)
        .map(|i| Request { prompt_id: i as u32, sample: 0, prompt: prompts[i / group].clone(), prefix: Vec::new() })
        .collect();
    let options = SamplingOptions { max_new_tokens: LONGEST, ..SamplingOptions::default() };
    let sampling = Random::new(1, Purpose::Sampling);
    let generator = Generator { hook: Some(lengths), ..Generator::new(&options, SLOTS, sampling) };
    let (mut rounds, mut tokens) = (0usize, 0);
    let start = Instant::now();
    generator.generate(decoder, &Tokenizer::bytes()?, &requests, |progress| {
        rounds += 1;
        tokens = progress.tokens;
    })?;
    let seconds = start.elapsed().as_secs_f64();
    // Every slot in use in a round gives one token.
    Ok(Speed { tokens_per_second: tokens as f64 / seconds, mean_slots_in_use: tokens as f64 / rounds as f64 })
}
