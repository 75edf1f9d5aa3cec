//! What sharing prompts saves in training: groups of samples of one prompt, each group packed as `[prompt][y1]..[yG]` beside
//! rows that repeat the prompt for every sample. SmolLM2-135M's shape with random weights; one JSON line.
//!
//! ```text
//! cargo run --release -p posttrain-model --example shared_prompts -- [--prompt N] [--precision f32|bf16] [--threads N]
//!                                                                   [--repeats N] [--checkpointing]
//! ```
//! 4 prompts of N tokens (64) with 8 samples of 64 tokens each, forward and backward group by group, as in a step of GRPO.
//! Reported are the rows computed, the seconds of each repeat, the workspace in bytes and, over all tensors, the largest
//! difference of the gradients relative to the largest element of its tensor.

use std::time::Instant;

use base::{Purpose, Random};
use kernels::Precision;
use posttrain_model::decoder::{Decoder, Gradients, PackedTokens, Target, Workspace};
use posttrain_model::{Family, ModelConfig};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const VOCABULARY: usize = 49152;
const PROMPTS: usize = 4;
const SAMPLES: usize = 8;
const NEW: usize = 64;

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
    let prompt = number("--prompt")?.unwrap_or(64);
    let repeats = number("--repeats")?.unwrap_or(1);

    let mut decoder = Decoder::random(smollm2_135m(), 1)?;
    decoder.prepare_for_training(precision);
    let checkpointing = arguments.iter().any(|argument| argument == "--checkpointing");
    let pass = |share| run(&decoder, prompt, share, repeats, checkpointing);
    let (shared, unshared) = (pass(true)?, pass(false)?);
    let result = serde_json::json!({
        "case": format!("shared-prompts-{prompt}-{precision_name}"),
        "shared": shared.report(),
        "unshared": unshared.report(),
        "largest_gradient_difference": largest_difference(&decoder, &shared.gradients, &unshared.gradients),
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
    config.max_positions = 8192;
    config
}

fn random_ids(name: u32, count: usize) -> Vec<u32> {
    let random = Random::new(2, Purpose::Test).step(name);
    (0..count).map(|i| random.at(i as u32).below(VOCABULARY as u64) as u32).collect()
}

/// What one way of packing took.
struct Measured {
    rows: usize,
    seconds: Vec<f64>,
    workspace_bytes: usize,
    gradients: Gradients,
}

impl Measured {
    fn report(&self) -> serde_json::Value {
        let Self { rows, seconds, workspace_bytes, .. } = self;
        serde_json::json!({ "rows": rows, "seconds": seconds, "workspace_bytes": workspace_bytes })
    }
}

/// Forward and backward of all groups, after one pass for warming up.
fn run(decoder: &Decoder, prompt: usize, share: bool, repeats: usize, checkpointing: bool) -> Result<Measured> {
    let mut workspace = Workspace::new();
    workspace.set_checkpointing(checkpointing);
    let mut gradients = decoder.gradients();
    let (mut rows, mut seconds) = (0, Vec::new());
    for _ in 0..=repeats {
        gradients.clear();
        rows = 0;
        let started = Instant::now();
        for group in 0..PROMPTS {
            let (tokens, targets, d_log_prob) = pack(group, prompt, share)?;
            rows += tokens.rows();
            decoder.forward(&tokens, &mut workspace, true)?;
            decoder.backward(&tokens, &mut workspace, &targets, 1.0, &d_log_prob, None, &mut gradients)?;
        }
        gradients.finish();
        seconds.push(started.elapsed().as_secs_f64());
    }
    Ok(Measured { rows, seconds: seconds.split_off(1), workspace_bytes: workspace.bytes(), gradients })
}

/// One group: rows, the samples' tokens as targets, and the gradients of their log-probabilities, as different advantages
/// would make them.
fn pack(group: usize, prompt: usize, share: bool) -> Result<(PackedTokens, Vec<Target>, Vec<f32>)> {
    let name = |index: usize| (group * (SAMPLES + 1) + index) as u32;
    let prompt = random_ids(name(0), prompt);
    let mut tokens = PackedTokens::new();
    let shared = share.then(|| tokens.push(&prompt, None)).transpose()?;
    let mut targets = Vec::new();
    for sample in 0..SAMPLES {
        let completion = random_ids(name(sample + 1), NEW);
        // The last token predicts nothing and needs no row.
        let inputs = &completion[..NEW - 1];
        let (before, first) = match shared {
            Some(prompt) => (tokens.segments()[prompt], tokens.push(inputs, Some(prompt))?),
            None => {
                let index = tokens.push(&[&prompt, inputs].concat(), None)?;
                (tokens.segments()[index], index)
            }
        };
        let last_of_prompt = before.start + prompt.len() - 1;
        let start = match shared {
            Some(_) => tokens.segments()[first].start,
            None => last_of_prompt + 1,
        };
        let rows = std::iter::once(last_of_prompt).chain(start..);
        let advantage = (sample as f32 - 3.5) / (PROMPTS * SAMPLES * NEW) as f32;
        targets.extend(rows.zip(completion).map(|(row, token)| (Target { row, token }, advantage)));
    }
    targets.sort_by_key(|(target, _)| target.row);
    let (targets, d_log_prob) = targets.into_iter().unzip();
    Ok((tokens, targets, d_log_prob))
}

fn largest_difference(decoder: &Decoder, a: &Gradients, b: &Gradients) -> f32 {
    let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0, |most: f32, value| most.max(value.abs()));
    let of_tensor = |index: usize| {
        let (a, b) = (a.grad(index), b.grad(index));
        largest(&mut a.iter().zip(b).map(|(a, b)| a - b)) / largest(&mut b.iter().copied()).max(f32::MIN_POSITIVE)
    };
    largest(&mut (0..decoder.parameters().len()).map(of_tensor))
}
