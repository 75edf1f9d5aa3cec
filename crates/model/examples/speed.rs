//! Speed and memory of the engine on SmolLM2-135M's shape, or another, with random weights, as one JSON line.
//!
//! ```text
//! cargo run --release -p posttrain-model --example speed -- train|generate|decode [--precision f32|bf16] [--lora]
//!     [--device cpu|cuda|cuda:N] [--threads N] [--repeats N] [--sequences N] [--length N] [--prompt N] [--new N]
//!     [--layers N] [--hidden N] [--intermediate N] [--heads N] [--kv-heads N] [--vocabulary N]
//! ```
//! `train`: full steps of `--sequences` (8) of `--length` (256) tokens: forward, backward, clipping and AdamW. `generate`:
//! `--sequences` (16) prompts of `--prompt` (64) tokens, `--new` (128) sampled tokens each. `decode`: the same without the
//! time of packing and of the prompts. Elsewhere weights are packed inside the measured time, as after every update. Each
//! phase's time goes to stderr. `bench/compare.py` runs this beside the peers, `bench/growth.py` over many sizes.

use std::sync::Arc;
use std::time::Instant;

use base::{Purpose, Random};
use kernels::{AdamW, AdamWStep, Precision};
use posttrain_model::decoder::{DecodeRow, Decoder, Gradients, PackedTokens, SequenceCache, Target, Workspace};
use posttrain_model::lora::LoraConfig;
use posttrain_model::{DeviceName, ModelConfig};

/// The binary's allocator, which places large arrays at cache lines.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    kernels::keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| arguments.iter().position(|argument| argument == name).and_then(|i| arguments.get(i + 1));
    let number = |name: &str, default: usize| value(name).map_or(Ok(default), |text| text.parse::<usize>());
    let task = arguments.first().map_or("train", String::as_str);
    let lora = arguments.iter().any(|argument| argument == "--lora");
    let (precision, precision_name) = match value("--precision").map(String::as_str) {
        Some("f32") => (Precision::F32, "f32"),
        None | Some("bf16") => (Precision::Bf16, "bf16"),
        Some(other) => return Err(format!("unknown precision {other}").into()),
    };
    let threads = number("--threads", 0)?;
    if threads > 0 {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let repeats = number("--repeats", 3)?;
    let name: DeviceName = value("--device").map_or(Ok(DeviceName::Cpu), |text| text.parse())?;
    let device = name.open()?;

    let mut config = ModelConfig::smollm2_135m();
    config.vocab_size = number("--vocabulary", config.vocab_size)?;
    config.hidden_size = number("--hidden", config.hidden_size)?;
    config.intermediate_size = number("--intermediate", config.intermediate_size)?;
    config.heads = number("--heads", config.heads)?;
    config.kv_heads = number("--kv-heads", config.kv_heads)?;
    config.layers = vec![config.layers[0]; number("--layers", config.layer_count())?];
    let parameters = config.parameter_count();
    let mut decoder = Decoder::random(config, 1)?;
    if lora {
        decoder.attach_lora(&LoraConfig::default(), 1)?;
    }
    if let Some(device) = &device {
        decoder.to_device(device)?;
    }
    let rates = match task {
        "train" => train(&mut decoder, precision, repeats, number("--sequences", 8)?, number("--length", 256)?)?,
        "generate" | "decode" => {
            let sizes = [number("--sequences", 16)?, number("--prompt", 64)?, number("--new", 128)?];
            generate(&mut decoder, precision, repeats, sizes, task == "decode")?
        }
        other => return Err(format!("unknown task {other}").into()),
    };
    let weight_bytes = decoder.packed_bytes();
    let mut result = serde_json::json!({
        "task": task,
        "precision": precision_name,
        "device": name.to_string(),
        "parameters": parameters,
        "tokens_per_second": rates,
        "peak_memory_bytes": peak_memory(),
        "threads": rayon::current_num_threads(),
        "versions": { "posttrain": env!("CARGO_PKG_VERSION") },
    });
    if task == "decode" && device.is_none() {
        // Every round of one token for each sequence reads the weights once.
        let rounds = number("--sequences", 16)? as f64;
        result["weight_bytes"] = vec![weight_bytes].into();
        result["weight_bytes_per_second"] =
            rates.iter().map(|rate| rate / rounds * weight_bytes as f64).collect::<Vec<_>>().into();
    }
    println!("{result}");
    Ok(())
}

fn random_ids(decoder: &Decoder, name: usize, count: usize) -> Vec<u32> {
    let random = Random::new(2, Purpose::Test).step(name as u32);
    (0..count).map(|i| random.at(i as u32).below(decoder.config().vocab_size as u64) as u32).collect()
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
fn train(
    decoder: &mut Decoder,
    precision: Precision,
    repeats: usize,
    sequences: usize,
    length: usize,
) -> Result<Vec<f64>> {
    let mut workspace = Workspace::new();
    let mut gradients = decoder.gradients();
    let size = gradients.flat().len();
    let mut optimizer = Optimizer { m: vec![0.0; size], v: vec![0.0; size] };
    let mut rates = Vec::new();
    for step in 0..=repeats {
        let mut tokens = PackedTokens::new();
        let mut targets = Vec::new();
        for sequence in 0..sequences {
            let ids = random_ids(decoder, step * sequences + sequence, length);
            let index = tokens.push(&ids, None)?;
            let first = tokens.segments()[index].start;
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
        rates.push((sequences * length) as f64 / phases.finish());
    }
    Ok(rates.split_off(1))
}

/// New tokens per second of whole generations, or of their decoding alone, after one for warming up.
fn generate(
    decoder: &mut Decoder,
    precision: Precision,
    repeats: usize,
    [sequences, prompt, new]: [usize; 3],
    decoding_alone: bool,
) -> Result<Vec<f64>> {
    let vocabulary = decoder.config().vocab_size;
    let mut workspace = Workspace::new();
    let mut logits = vec![0.0; sequences * vocabulary];
    let mut weights = logits.clone();
    let mut rates = Vec::new();
    for step in 0..=repeats {
        let prompts: Vec<Vec<u32>> =
            (0..sequences).map(|i| random_ids(decoder, step * sequences + i, prompt)).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let mut phases = Phases::start();
        // Counts as a change of the weights, so that packing them is part of every repeat.
        decoder.parameter_mut(0);
        decoder.prepare(precision);
        phases.done("prepare");
        let prefills = decoder.prefill(&prompts, &mut workspace)?;
        phases.done("prefill");
        let new_cache =
            |prefill: &posttrain_model::decoder::Prefill| SequenceCache::new(decoder, Arc::clone(&prefill.cache), new);
        let mut caches: Vec<SequenceCache> = prefills.iter().map(new_cache).collect();
        let hidden: Vec<f32> = prefills.iter().flat_map(|prefill| prefill.hidden.iter().copied()).collect();
        decoder.logits(&hidden, &mut logits)?;
        let decoding = Instant::now();
        for position in 0..new {
            let ids = sample(&logits, &mut weights, vocabulary, position as u32);
            if position + 1 == new {
                break;
            }
            let mut rows: Vec<DecodeRow> =
                caches.iter_mut().zip(ids.chunks(1)).map(|(cache, tokens)| DecodeRow { tokens, cache }).collect();
            decoder.decode(&mut rows, &mut workspace)?;
            decoder.logits(workspace.hidden(), &mut logits)?;
        }
        phases.done("decode");
        // The first of the new tokens came from the prompts.
        let alone = (sequences * (new - 1)) as f64 / decoding.elapsed().as_secs_f64();
        let all = (sequences * new) as f64 / phases.finish();
        rates.push(if decoding_alone { alone } else { all });
    }
    Ok(rates.split_off(1))
}

/// Draws one token from each row of logits by inverting the distribution function.
fn sample(logits: &[f32], weights: &mut [f32], vocabulary: usize, position: u32) -> Vec<u32> {
    let draw = |row: usize, logits: &[f32], weights: &mut [f32]| {
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
    let rows = logits.chunks_exact(vocabulary).zip(weights.chunks_exact_mut(vocabulary)).enumerate();
    let mut rows: Vec<_> = rows.map(|(row, (logits, weights))| (row, logits, weights, 0)).collect();
    kernels::on_each(&mut rows, |(row, logits, weights, token)| *token = draw(*row, logits, weights));
    rows.into_iter().map(|(.., token)| token).collect()
}

/// The process's largest resident size so far, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(1024 * line.split_whitespace().nth(1)?.parse::<u64>().ok()?)
}
