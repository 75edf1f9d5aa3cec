//! llama.cpp's architectures in Hugging Face's terms: configuration, tensor names, and what its converter changed.

use super::{Gguf, Metadata, TensorInfo, Value};
use crate::config::{Family, LayerAttention, ModelConfig, RopeConfig, RopeScaling, Sizes};
use crate::error::{Error, Result};

/// Frequency divisors, stored as a tensor by models with Llama 3 scaling.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Reads the configuration.
pub(super) fn config(gguf: &Gguf) -> Result<ModelConfig> {
    let metadata = gguf.metadata();
    let name = metadata.text("general.architecture")?.ok_or_else(|| Metadata::missing("general.architecture"))?;
    let mut family = match name {
        "llama" => Family::Llama,
        "mistral" => Family::Mistral,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        "gemma3" => Family::Gemma3,
        _ => {
            let hint = "supported GGUF architectures: llama, mistral, qwen2, qwen3, gemma3";
            return Err(Error::unsupported(format!("GGUF architecture {name}"), hint));
        }
    };
    let keys = Keys { metadata, architecture: name };
    refuse_variations(&keys)?;

    let embedding = gguf.tensors.iter().find(|info| info.name == "token_embd.weight");
    let Some(TensorInfo { shape, .. }) = embedding else {
        return Err(Error::tensor("token_embd.weight", "missing"));
    };
    let layers = match keys.required_size("block_count")? {
        layers @ 1..=crate::config::MAX_LAYERS => layers,
        layers => return Err(Error::malformed(keys.key("block_count"), format!("{layers} layers"))),
    };
    let hidden_size = keys.required_size("embedding_length")?;
    let heads = keys.required_size("attention.head_count")?;
    let head_dim = keys.size("attention.key_length")?.unwrap_or(hidden_size / heads.max(1));
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(size) = keys.size(key)?.filter(|&size| size != head_dim) {
            let hint = "models whose keys, values and rotations all span the whole head can be used";
            return Err(Error::unsupported(format!("{} {size} with heads of {head_dim}", keys.key(key)), hint));
        }
    }
    let window = keys.size("attention.sliding_window")?.filter(|&window| window > 0);
    if family == Family::Llama && window.is_some() {
        family = Family::Mistral;
    }

    let mut config = ModelConfig::of_family(
        family,
        Sizes {
            vocab_size: shape[0],
            hidden_size,
            intermediate_size: keys.required_size("feed_forward_length")?,
            layers,
            heads,
            kv_heads: keys.size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            max_positions: keys.required_size("context_length")?,
        },
    );
    config.tied_head = !gguf.tensors.iter().any(|info| info.name == "output.weight");
    config.eps = keys.required_float("attention.layer_norm_rms_epsilon")? as f32;
    config.ropes = ropes(gguf, &keys, family, head_dim)?;
    config.layers = windows(&keys, family, window, layers)?;
    // The one released Gemma 3 with 62 layers (27B) scales scores by its width per head, not by the width of its heads.
    if family == Family::Gemma3 && layers == 62 {
        config.attention_scale = (1.0 / (hidden_size as f64 / heads as f64).sqrt()) as f32;
    }
    config.bos_token_id = metadata.token("tokenizer.ggml.bos_token_id")?;
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        config.eos_token_ids.extend(metadata.token(key)?.filter(|id| !config.eos_token_ids.contains(id)));
    }
    config.pad_token_id = metadata.token("tokenizer.ggml.padding_token_id")?;
    config.validate()?;
    Ok(config)
}

fn refuse_variations(keys: &Keys) -> Result<()> {
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = keys.float(key)?.filter(|&cap| cap != 0.0) {
            return Err(Error::unsupported(format!("{} = {cap}", keys.key(key)), "models without it can be used"));
        }
    }
    match keys.size("expert_count")? {
        None | Some(0) => Ok(()),
        Some(count) => Err(Error::unsupported(format!("a mixture of {count} experts"), "dense models can be used")),
    }
}

fn ropes(gguf: &Gguf, keys: &Keys, family: Family, head_dim: usize) -> Result<Vec<RopeConfig>> {
    let default = if family == Family::Gemma3 { 1e6 } else { 1e4 };
    let theta = keys.float("rope.freq_base")?.unwrap_or(default);
    let factor = match keys.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.float("rope.scale_linear")?,
    };
    let kind = keys.text("rope.scaling.type")?.unwrap_or(if factor.is_some() { "linear" } else { "none" });
    let mut scaling = match (kind, factor) {
        ("none", _) => RopeScaling::None,
        ("linear", Some(factor)) => RopeScaling::Linear { factor },
        ("linear", None) => return Err(Metadata::missing(&keys.key("rope.scaling.factor"))),
        _ => return Err(Error::unsupported(format!("rope scaling {kind}"), "supported types: none, linear, llama3")),
    };
    if let Some(info) = gguf.tensors.iter().find(|info| info.name == ROPE_FACTORS) {
        scaling = llama3_scaling(theta, head_dim, &gguf.tensor(info)?.data)?;
    }
    let mut ropes = vec![RopeConfig { theta, scaling }];
    if family == Family::Gemma3 {
        ropes.push(RopeConfig::plain(keys.float("rope.freq_base_swa")?.unwrap_or(1e4)));
    }
    Ok(ropes)
}

/// The parameters behind stored frequency divisors: the file has only the divisors, and all released models share all
/// parameters but the factor, which is the divisor of the slowest frequency.
fn llama3_scaling(theta: f64, head_dim: usize, divisors: &[f32]) -> Result<RopeScaling> {
    let unknown = || Error::unsupported(format!("{ROPE_FACTORS} of an unknown scheme"), "supported schemes: llama3");
    if divisors.len() != head_dim / 2 {
        return Err(unknown());
    }
    let scaling = RopeScaling::Llama3 {
        factor: divisors.last().copied().unwrap_or(1.0).into(),
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_max_positions: 8192,
    };
    let frequencies = RopeConfig::plain(theta).inverse_frequencies(head_dim);
    let close =
        |(&frequency, &divisor): (&f64, &f32)| (scaling.divisor(frequency) / f64::from(divisor) - 1.0).abs() < 1e-4;
    if frequencies.iter().zip(divisors).all(close) { Ok(scaling) } else { Err(unknown()) }
}

/// The window and rotary table of each layer.
fn windows(keys: &Keys, family: Family, window: Option<usize>, layers: usize) -> Result<Vec<LayerAttention>> {
    if family != Family::Gemma3 {
        return Ok(vec![LayerAttention { window, rope: 0 }; layers]);
    }
    let pattern = keys.key("attention.sliding_window_pattern");
    let local: Vec<bool> = match keys.metadata.0.get(&pattern) {
        None => (1..=layers).map(|layer| layer % 6 != 0).collect(),
        Some(&Value::Unsigned(period @ 1..)) => (1..=layers as u64).map(|layer| layer % period != 0).collect(),
        Some(Value::Bools(flags)) if flags.len() == layers => flags.clone(),
        Some(_) => return Err(Error::malformed(pattern, format!("expected a period or {layers} bools"))),
    };
    let window = window.ok_or_else(|| Metadata::missing(&keys.key("attention.sliding_window")))?;
    let layer = |local| LayerAttention { window: Some(window).filter(|_| local), rope: local.into() };
    Ok(local.into_iter().map(layer).collect())
}

/// The Hugging Face name of a tensor, or `None` for one that is part of the configuration.
pub(super) fn hugging_face_name(family: Family, info: &TensorInfo) -> Result<Option<String>> {
    let name = match info.name.as_str() {
        ROPE_FACTORS => return Ok(None),
        "token_embd.weight" => Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => Some("model.norm.weight".to_owned()),
        "output.weight" => Some("lm_head.weight".to_owned()),
        name => layer_name(family, name),
    };
    match name {
        Some(name) => Ok(Some(name)),
        None => Err(Error::tensor(&info.name, format!("not part of a {family} model"))),
    }
}

/// `blk.3.attn_q.weight` becomes `model.layers.3.self_attn.q_proj.weight`.
fn layer_name(family: Family, name: &str) -> Option<String> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (part, kind) = rest.rsplit_once('.')?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" if family == Family::Gemma3 => "pre_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_attention_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

/// Undoes what llama.cpp's converter did to the weights beside renaming them.
pub(super) fn undo_conversion(config: &ModelConfig, name: &str, rows: usize, weights: &mut [f32]) -> Result<()> {
    if config.norm_weight_offset != 0.0 && name.ends_with("norm.weight") {
        // Stored ready for use, as offset + weight.
        weights.iter_mut().for_each(|weight| *weight -= config.norm_weight_offset);
    }
    if matches!(config.family, Family::Llama | Family::Mistral)
        && (name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight"))
    {
        if !rows.is_multiple_of(config.head_dim) {
            return Err(Error::tensor(name, format!("{rows} rows are not whole heads of {}", config.head_dim)));
        }
        halve_heads(weights, weights.len() / rows, config.head_dim);
    }
    Ok(())
}

/// Reorders the rows of each head from interleaved pairs (row `2i + s` is part `s` of rotation pair `i`) to halves (row
/// `s * head_dim / 2 + i`), the layout of Hugging Face's rotary embedding.
fn halve_heads(weights: &mut [f32], row: usize, head_dim: usize) {
    let half = head_dim / 2;
    let mut paired = vec![0.0; head_dim * row];
    for head in weights.chunks_exact_mut(head_dim * row) {
        paired.copy_from_slice(head);
        for (place, halved) in head.chunks_exact_mut(row).enumerate() {
            let from = 2 * (place % half) + place / half;
            halved.copy_from_slice(&paired[from * row..][..row]);
        }
    }
}

/// The metadata of one architecture: keys with its name in front.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        let key = self.key(key);
        match self.metadata.unsigned(&key)? {
            None => Ok(None),
            Some(size) => (usize::try_from(size).map(Some)).map_err(|_| Error::malformed(key, "too large")),
        }
    }

    fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| Metadata::missing(&self.key(key)))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.metadata.float(&self.key(key))
    }

    fn required_float(&self, key: &str) -> Result<f64> {
        self.float(key)?.ok_or_else(|| Metadata::missing(&self.key(key)))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.metadata.text(&self.key(key))
    }
}
