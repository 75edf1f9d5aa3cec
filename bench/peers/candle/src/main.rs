//! candle's quantised LLaMA: one sequence, a prompt of 64 tokens, 128 further tokens, as one JSON line. The argument is a
//! GGUF file.

use std::fs::File;
use std::time::Instant;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Result, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;

const PROMPT: usize = 64;
const NEW: usize = 128;
const REPEATS: usize = 2;

fn main() -> Result<()> {
    let path = std::env::args().nth(1).ok_or_else(|| candle_core::Error::msg("expected a GGUF file"))?;
    let mut file = File::open(path)?;
    let content = gguf_file::Content::read(&mut file)?;
    // One token reads every matrix; the tied embedding is the head.
    let matrices = content.tensor_infos.values().filter(|info| info.shape.rank() == 2);
    let weight_bytes: usize =
        matrices.map(|info| info.shape.elem_count() / info.ggml_dtype.block_size() * info.ggml_dtype.type_size()).sum();
    let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
    let mut rates = Vec::new();
    for repeat in 0..=REPEATS {
        let prompt: Vec<u32> = (0..PROMPT).map(|i| ((repeat * PROMPT + i) % 40000 + 100) as u32).collect();
        let mut logits = model.forward(&Tensor::new(&prompt[..], &Device::Cpu)?.unsqueeze(0)?, 0)?;
        let started = Instant::now();
        for position in PROMPT..PROMPT + NEW {
            let token: u32 = logits.squeeze(0)?.argmax(0)?.to_scalar()?;
            logits = model.forward(&Tensor::new(&[token], &Device::Cpu)?.unsqueeze(0)?, position)?;
        }
        rates.push(NEW as f64 / started.elapsed().as_secs_f64());
    }
    let rates = rates.split_off(1);
    let bytes_rates: Vec<f64> = rates.iter().map(|rate| rate * weight_bytes as f64).collect();
    let peak = std::fs::read_to_string("/proc/self/status").ok().and_then(|status| {
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        Some(1024 * line.split_whitespace().next()?.parse::<u64>().ok()?)
    });
    println!(
        "{}",
        serde_json::json!({
            "tokens_per_second": rates,
            "weight_bytes_per_second": bytes_rates,
            "weight_bytes": [weight_bytes],
            "peak_memory_bytes": peak,
            "setting": "Q8_0",
            "versions": { "candle": "0.11.1" },
        })
    );
    Ok(())
}
