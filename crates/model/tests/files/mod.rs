//! Files made by hand: a GGUF writer, and a model in llama.cpp's names and layout.

use std::fmt::Write as _;

use posttrain_model::weights::gguf::Value;
use posttrain_model::weights::{Tensor, Tensors};
use posttrain_model::{Family, ModelConfig};

/// Writes a GGUF file (version 3, alignment 32) of F32 tensors, shapes outermost first.
pub fn gguf(metadata: &[(String, Value)], tensors: &[(String, Tensor)]) -> Vec<u8> {
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut file, key);
        write_value(&mut file, value);
    }
    let mut offset = 0u64;
    for (name, tensor) in tensors {
        text(&mut file, name);
        file.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&size| file.extend((size as u64).to_le_bytes()));
        file.extend(0u32.to_le_bytes());
        file.extend(offset.to_le_bytes());
        offset = (offset + 4 * tensor.data.len() as u64).next_multiple_of(32);
    }
    for (_, tensor) in tensors {
        file.resize(file.len().next_multiple_of(32), 0);
        tensor.data.iter().for_each(|value| file.extend(value.to_le_bytes()));
    }
    file
}

fn text(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}

fn write_value(file: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Unsigned(number) => {
            file.extend(10u32.to_le_bytes());
            file.extend(number.to_le_bytes());
        }
        Value::Signed(number) => {
            file.extend(11u32.to_le_bytes());
            file.extend(number.to_le_bytes());
        }
        Value::Float(number) => {
            file.extend(12u32.to_le_bytes());
            file.extend(number.to_le_bytes());
        }
        Value::Bool(flag) => {
            file.extend(7u32.to_le_bytes());
            file.push((*flag).into());
        }
        Value::Text(string) => {
            file.extend(8u32.to_le_bytes());
            text(file, string);
        }
        Value::Integers(numbers) => {
            array(file, 11, numbers.len());
            numbers.iter().for_each(|number| file.extend(number.to_le_bytes()));
        }
        Value::Floats(numbers) => {
            array(file, 12, numbers.len());
            numbers.iter().for_each(|number| file.extend(number.to_le_bytes()));
        }
        Value::Bools(flags) => {
            array(file, 7, flags.len());
            flags.iter().for_each(|&flag| file.push(flag.into()));
        }
        Value::Texts(strings) => {
            array(file, 8, strings.len());
            strings.iter().for_each(|string| text(file, string));
        }
    }
}

fn array(file: &mut Vec<u8>, kind: u32, count: usize) {
    file.extend(9u32.to_le_bytes());
    file.extend(kind.to_le_bytes());
    file.extend((count as u64).to_le_bytes());
}

/// Weights for every tensor of `config`, all different.
pub fn weights(config: &ModelConfig) -> Tensors {
    let mut next = 0u32;
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let data = (0..shape.iter().product())
            .map(|_| {
                next += 1;
                // Exact in f32, and so that adding Gemma's 1 and taking it away again is exact too.
                (next % 4096) as f32 / 4096.0
            })
            .collect();
        (name, Tensor::new(shape, data))
    };
    config.tensor_shapes().into_iter().map(tensor).collect()
}

/// The metadata llama.cpp's converter writes for `config`.
pub fn metadata(config: &ModelConfig) -> Vec<(String, Value)> {
    let architecture = match config.family {
        Family::Mistral => "llama".to_owned(),
        family => family.to_string(),
    };
    let size = |size: usize| Value::Unsigned(size as u64);
    let mut metadata = vec![
        ("block_count", size(config.layer_count())),
        ("context_length", size(config.max_positions)),
        ("embedding_length", size(config.hidden_size)),
        ("feed_forward_length", size(config.intermediate_size)),
        ("attention.head_count", size(config.heads)),
        ("attention.head_count_kv", size(config.kv_heads)),
        ("attention.key_length", size(config.head_dim)),
        ("attention.value_length", size(config.head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::Float(config.eps.into())),
        ("rope.freq_base", Value::Float(config.ropes[0].theta)),
    ];
    if let Some(window) = config.layers[0].window {
        metadata.push(("attention.sliding_window", size(window)));
    }
    if config.family == Family::Gemma3 {
        metadata.push(("attention.sliding_window_pattern", size(2)));
    }
    let mut metadata: Vec<_> =
        metadata.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value)).collect();
    metadata.insert(0, ("general.architecture".to_owned(), Value::Text(architecture)));
    metadata
}

/// `tensors` as llama.cpp's converter writes them: its names, the rows of q and k interleaved for the llama
/// architecture, 1 added to Gemma's norms.
pub fn converted(config: &ModelConfig, tensors: &Tensors) -> Vec<(String, Tensor)> {
    tensors.iter().map(|(name, tensor)| (llama_cpp_name(config, name), convert(config, name, tensor))).collect()
}

fn convert(config: &ModelConfig, name: &str, tensor: &Tensor) -> Tensor {
    let mut tensor = tensor.clone();
    if name.ends_with("norm.weight") {
        tensor.data.iter_mut().for_each(|value| *value += config.norm_weight_offset);
    }
    let permuted = matches!(config.family, Family::Llama | Family::Mistral)
        && (name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight"));
    if permuted {
        // The converter's reshape(heads, 2, head_dim / 2, in).swapaxes(1, 2).
        let (width, half) = (tensor.shape[1], config.head_dim / 2);
        let source = tensor.data.clone();
        for row in 0..tensor.shape[0] {
            let (head, within) = (row / config.head_dim, row % config.head_dim);
            let from = head * config.head_dim + (within % 2) * half + within / 2;
            tensor.data[row * width..][..width].copy_from_slice(&source[from * width..][..width]);
        }
    }
    tensor
}

fn llama_cpp_name(config: &ModelConfig, name: &str) -> String {
    let gemma = config.family == Family::Gemma3;
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", if gemma { "post_attention_norm" } else { "ffn_norm" }),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let mut converted = String::new();
    let mut rest = name;
    if let Some((layer, part)) = name.strip_prefix("model.layers.").and_then(|name| name.split_once('.')) {
        let _ = write!(converted, "blk.{layer}.");
        rest = part;
    }
    let (part, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
    let part = pairs.iter().find(|(from, _)| *from == part).map_or(part, |(_, to)| to);
    let _ = write!(converted, "{part}.{kind}");
    converted
}
