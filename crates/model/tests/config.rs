//! `config.json` in and out: what released models write, what is refused, and every preset there and back.

use base::Hint;
use posttrain_model::config::{Activation, RopeConfig, RopeScaling};
use posttrain_model::{Family, ModelConfig};
use proptest::prelude::*;
use serde_json::{Value, json};

#[test]
fn every_preset_survives_the_way_through_json() {
    for family in Family::ALL {
        let config = ModelConfig::tiny(family, 300);
        config.validate().unwrap();
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config, "{family}");
    }
    let mut config = ModelConfig::small(300);
    config.eos_token_ids = vec![3, 4];
    config.bos_token_id = Some(1);
    config.ropes[0].scaling = RopeScaling::Linear { factor: 2.0 };
    assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
}

/// The keys that every model writes.
fn base(architecture: &str) -> Value {
    json!({
        "architectures": [architecture], "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "head_dim": 16, "rms_norm_eps": 1e-5,
    })
}

fn with(architecture: &str, keys: Value) -> posttrain_model::Result<ModelConfig> {
    let mut config = base(architecture);
    for (key, value) in keys.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::from_json(&config)
}

#[test]
fn llama_3_scaling_in_both_spellings() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let old = with("LlamaForCausalLM", json!({ "rope_theta": 5e5, "rope_scaling": scaling })).unwrap();
    let mut parameters = scaling.clone();
    parameters["rope_theta"] = 5e5.into();
    let new = with("LlamaForCausalLM", json!({ "rope_parameters": parameters })).unwrap();
    assert_eq!(old, new);
    assert_eq!(old.ropes[0].theta, 5e5);
    assert!(matches!(old.ropes[0].scaling, RopeScaling::Llama3 { factor: 32.0, original_max_positions: 8192, .. }));
}

#[test]
fn gemma_has_local_and_global_layers() {
    let keys = json!({
        "sliding_window": 8, "sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 36, "hidden_activation": "gelu_pytorch_tanh",
    });
    let config = with("Gemma3ForCausalLM", keys).unwrap();
    let windows: Vec<_> = config.layers.iter().map(|layer| layer.window).collect();
    assert_eq!(windows, [Some(8), Some(8), None, Some(8)]);
    assert_eq!(config.layers.iter().map(|layer| layer.rope).collect::<Vec<_>>(), [1, 1, 0, 1]);
    assert_eq!(config.ropes, [RopeConfig::plain(1e6), RopeConfig::plain(1e4)]);
    assert_eq!(config.attention_scale, 1.0 / 6.0);
    assert_eq!((config.embedding_scale, config.norm_weight_offset), (8.0, 1.0));
    assert!(config.tied_head && config.sandwich_norms && config.qk_norm);
    assert_eq!(config.activation, Activation::GeluTanh);

    let types = json!(["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]);
    let parameters = json!({
        "full_attention": { "rope_type": "default", "rope_theta": 1e6 },
        "sliding_attention": { "rope_type": "default", "rope_theta": 1e4 },
    });
    let keys = json!({
        "sliding_window": 8, "layer_types": types, "rope_parameters": parameters, "query_pre_attn_scalar": 36,
    });
    assert_eq!(with("Gemma3ForCausalLM", keys).unwrap(), config);
}

#[test]
fn windows_of_mistral_and_qwen() {
    let windows = |architecture: &str, keys: Value| -> Vec<_> {
        with(architecture, keys).unwrap().layers.iter().map(|layer| layer.window).collect()
    };
    assert_eq!(windows("MistralForCausalLM", json!({ "sliding_window": 9 })), [Some(9); 4]);
    assert_eq!(windows("MistralForCausalLM", json!({ "sliding_window": null })), [None; 4]);
    assert_eq!(windows("MistralForCausalLM", json!({})), [Some(4096); 4]);
    let qwen = json!({ "sliding_window": 9, "max_window_layers": 3, "use_sliding_window": true });
    assert_eq!(windows("Qwen2ForCausalLM", qwen), [None, None, None, Some(9)]);
    let off = json!({ "sliding_window": 9, "max_window_layers": 0, "use_sliding_window": false });
    assert_eq!(windows("Qwen3ForCausalLM", off), [None; 4]);
}

#[test]
fn defaults_are_those_of_the_architecture() {
    let config = with("LlamaForCausalLM", json!({ "num_key_value_heads": null, "head_dim": null })).unwrap();
    assert_eq!((config.kv_heads, config.head_dim, config.ropes[0].theta), (4, 16, 1e4));
    assert!(!config.tied_head && !config.qkv_bias);
    assert!(config.eos_token_ids.is_empty());
    let config = with("Qwen2ForCausalLM", json!({ "eos_token_id": [7, 8] })).unwrap();
    assert!(config.qkv_bias);
    assert_eq!(config.eos_token_ids, [7, 8]);
    let mut mistral = base("MistralForCausalLM");
    mistral["num_attention_heads"] = 16.into();
    mistral["num_key_value_heads"] = Value::Null;
    assert_eq!(ModelConfig::from_json(&mistral).unwrap().kv_heads, 16);
    mistral.as_object_mut().unwrap().remove("num_key_value_heads");
    assert_eq!(ModelConfig::from_json(&mistral).unwrap().kv_heads, 8);
}

#[test]
fn what_the_decoder_does_not_do_is_refused_by_name() {
    let llama = "LlamaForCausalLM";
    let cases = [
        (with("GPT2LMHeadModel", json!({})), "architecture GPT2LMHeadModel is not supported"),
        (with("Gemma3ForConditionalGeneration", json!({})), "Gemma3ForConditionalGeneration"),
        (with(llama, json!({ "attention_bias": true })), "attention_bias = true"),
        (with("Qwen3ForCausalLM", json!({ "attention_bias": true })), "attention_bias = true"),
        (with(llama, json!({ "mlp_bias": true })), "mlp_bias = true"),
        (with(llama, json!({ "hidden_act": "relu" })), "activation relu"),
        (with(llama, json!({ "rope_scaling": { "type": "yarn", "factor": 4.0 } })), "rope_type yarn"),
        (with(llama, json!({ "rope_scaling": { "rope_type": "linear" } })), "rope_scaling.factor: missing"),
        (with(llama, json!({ "partial_rotary_factor": 0.5 })), "partial_rotary_factor"),
        (with(llama, json!({ "sliding_window": 8 })), "sliding_window in LlamaForCausalLM"),
        (with(llama, json!({ "quantization_config": { "bits": 4 } })), "quantization_config"),
        (with("Gemma3ForCausalLM", json!({ "final_logit_softcapping": 30.0 })), "final_logit_softcapping = 30"),
        (with("Qwen3ForCausalLM", json!({ "layer_types": ["linear_attention", "a", "b", "c"] })), "layer_types[0]"),
    ];
    for (config, expected) in cases {
        let error = config.unwrap_err();
        assert!(error.to_string().contains(expected), "{expected:?} in {error}");
        assert!(error.hint().is_some(), "{error}");
    }
    let error = with("GPT2LMHeadModel", json!({})).unwrap_err();
    for family in Family::ALL {
        assert!(error.hint().unwrap().contains(family.architecture()));
    }
}

#[test]
fn nonsense_names_its_key() {
    let llama = |keys| with("LlamaForCausalLM", keys).unwrap_err().to_string();
    let cases = [
        (llama(json!({ "hidden_size": "64" })), "hidden_size: expected a non-negative integer, found \"64\""),
        (llama(json!({ "hidden_size": null })), "hidden_size: missing"),
        (llama(json!({ "num_attention_heads": 0 })), "num_attention_heads: expected 1 to"),
        (llama(json!({ "num_hidden_layers": 1u64 << 50 })), "num_hidden_layers: expected 1 to"),
        (llama(json!({ "head_dim": 15 })), "head_dim: expected an even number"),
        (llama(json!({ "head_dim": u64::MAX })), "head_dim: expected 1 to"),
        (llama(json!({ "num_key_value_heads": 3 })), "num_key_value_heads: 3 does not divide 4"),
        (llama(json!({ "rms_norm_eps": -1.0 })), "rms_norm_eps: expected a positive number"),
        (llama(json!({ "rope_theta": 0.0 })), "rope_theta: expected a positive number"),
        (llama(json!({ "eos_token_id": ["a"] })), "eos_token_id: expected a token id or a list"),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{expected:?} in {message:?}");
    }
    assert!(ModelConfig::from_json_bytes(b"[1]").unwrap_err().to_string().contains("expected an object"));
    assert!(ModelConfig::from_json_bytes(b"{").unwrap_err().to_string().contains("JSON"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn spoilt_files_never_panic(family in 0usize..5, flips in prop::collection::vec((0usize..600, 0u8..8), 0..4), cut in 0usize..2000) {
        let mut text = ModelConfig::tiny(Family::ALL[family], 300).to_json().to_string().into_bytes();
        for (byte, bit) in flips {
            if let Some(byte) = text.get_mut(byte) {
                *byte ^= 1 << bit;
            }
        }
        text.truncate(cut);
        // Whatever is accepted must be safe to size things by.
        if let Ok(config) = ModelConfig::from_json_bytes(&text) {
            config.parameter_count();
        }
    }
}
