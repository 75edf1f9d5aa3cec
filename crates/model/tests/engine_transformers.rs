//! The engine against PyTorch and transformers: files written by `tests/reference/logits.py`.

use std::path::{Path, PathBuf};

use kernels::Precision;
use posttrain_model::decoder::{Decoder, PackedTokens, Target, Workspace};
use posttrain_model::{ModelConfig, weights};
use serde_json::Value;

use crate::engine::distance;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/logits")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn tokens(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|id| id as u32).collect()
}

/// The targets of every next token of one sequence.
fn next_tokens(ids: &[u32]) -> Vec<Target> {
    ids[1..].iter().enumerate().map(|(row, &token)| Target { row, token }).collect()
}

#[test]
fn logits_and_gradient_norms_of_every_family() {
    for family in ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3"] {
        let folder = folder().join(family);
        let expected = json(&folder.join("expected.json"));
        let config = ModelConfig::from_json(&json(&folder.join("config.json"))).unwrap();
        let tensors = weights::safetensors::read(&folder.join("model.safetensors")).unwrap();
        let mut decoder = Decoder::new(config.clone(), tensors).unwrap();
        decoder.prepare(Precision::F32);
        let ids = tokens(&expected["ids"]);
        let mut batch = PackedTokens::new();
        batch.push(&ids, None).unwrap();
        let mut workspace = Workspace::new();
        decoder.forward(&batch, &mut workspace, true).unwrap();

        let mut logits = vec![0.0; ids.len() * config.vocab_size];
        decoder.logits(workspace.hidden(), &mut logits).unwrap();
        for (row, (found, expected)) in
            logits.chunks(config.vocab_size).zip(expected["logits"].as_array().unwrap()).enumerate()
        {
            let error = distance(found, &numbers(expected));
            assert!(error < 2e-5, "{family}: the logits of row {row} are off by {error:.1e}");
        }

        let targets = next_tokens(&ids);
        let d_log_prob = vec![-1.0 / targets.len() as f32; targets.len()];
        let mut gradients = decoder.gradients();
        decoder.backward(&batch, &mut workspace, &targets, 1.0, &d_log_prob, None, &mut gradients).unwrap();
        gradients.finish();
        let norms = expected["gradient_norms"].as_object().unwrap();
        assert_eq!(norms.len(), decoder.parameters().len(), "{family}");
        for (index, parameter) in decoder.parameters().iter().enumerate() {
            let norm = kernels::sum_of_squares(gradients.grad(index)).sqrt();
            let expected = norms[&parameter.name].as_f64().unwrap();
            assert!((norm - expected).abs() < 1e-4 * expected, "{family}: {} {norm} {expected}", parameter.name);
        }
    }
}
