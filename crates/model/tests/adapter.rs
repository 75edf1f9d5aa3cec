//! Adapters against PEFT: files written by `tests/reference/adapter.py`.

use std::path::{Path, PathBuf};

use kernels::Precision;
use posttrain_model::decoder::{Decoder, PackedTokens, Workspace};
use posttrain_model::lora::LoraConfig;
use posttrain_model::tokenizer::Tokenizer;
use posttrain_model::weights::safetensors;
use posttrain_model::{ModelConfig, save};
use serde_json::Value;

use crate::engine::distance;

fn reference(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference").join(path)
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// The tiny Llama with PEFT's adapter on it.
fn adapted() -> (Decoder, LoraConfig) {
    let base = reference("logits/llama");
    let config = ModelConfig::from_json(&serde_json::from_str(&text(&base.join("config.json"))).unwrap()).unwrap();
    let mut decoder = Decoder::new(config, safetensors::read(&base).unwrap()).unwrap();
    let lora = LoraConfig::from_peft_json(&text(&reference("adapter/adapter_config.json"))).unwrap();
    decoder.load_adapter(&lora, safetensors::read(&reference("adapter").join(save::ADAPTER)).unwrap()).unwrap();
    (decoder, lora)
}

fn logits(decoder: &mut Decoder, ids: &[u32]) -> Vec<f32> {
    decoder.prepare(Precision::F32);
    let mut batch = PackedTokens::new();
    batch.push(ids, None).unwrap();
    let mut workspace = Workspace::new();
    decoder.forward(&batch, &mut workspace, false).unwrap();
    let mut logits = vec![0.0; ids.len() * decoder.config().vocab_size];
    decoder.logits(workspace.hidden(), &mut logits).unwrap();
    logits
}

#[test]
fn an_adapter_of_peft_gives_the_logits_it_gives_there() {
    let expected: Value = serde_json::from_str(&text(&reference("adapter/expected.json"))).unwrap();
    let numbers = |value: &Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    };
    let ids: Vec<u32> = numbers(&expected["ids"]).into_iter().map(|id| id as u32).collect();
    let rows: Vec<f64> = expected["logits"].as_array().unwrap().iter().flat_map(numbers).collect();
    let (mut decoder, _) = adapted();
    let error = distance(&logits(&mut decoder, &ids), &rows);
    assert!(error < 2e-5, "logits with the adapter are off by {error:.1e}");
    decoder.merge_adapter();
    let error = distance(&logits(&mut decoder, &ids), &rows);
    assert!(error < 5e-5, "logits of the merged weights are off by {error:.1e}");
}

#[test]
fn a_written_adapter_has_the_names_shapes_and_values_that_peft_wrote() {
    let (decoder, lora) = adapted();
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::bytes().unwrap();
    save::adapter(folder.path(), &lora, None, "llama", decoder.adapter_views(), &tokenizer, None).unwrap();
    let written = safetensors::read(&folder.path().join(save::ADAPTER)).unwrap();
    assert_eq!(written.len(), 2 * 7 * 2, "two matrices for each of seven projections in two layers");
    assert_eq!(written, safetensors::read(&reference("adapter").join(save::ADAPTER)).unwrap());

    let parse = |path: &Path| -> Value { serde_json::from_str(&text(path)).unwrap() };
    let ours = parse(&folder.path().join("adapter_config.json"));
    let theirs = parse(&reference("adapter/adapter_config.json"));
    for (key, value) in ours.as_object().unwrap() {
        let sorted = |value: &Value| {
            let mut value = value.clone();
            if let Some(items) = value.as_array_mut() {
                items.sort_by_key(Value::to_string);
            }
            value
        };
        match (value.as_f64(), theirs[key].as_f64()) {
            (Some(ours), Some(theirs)) => assert_eq!(ours, theirs, "{key}"),
            _ => assert_eq!(sorted(value), sorted(&theirs[key]), "{key}"),
        }
    }
}
