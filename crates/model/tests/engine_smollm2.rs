//! The engine on a real model: SmolLM2-135M-Instruct against transformers, and its own promises at full size.

use std::path::Path;
use std::sync::Arc;

use kernels::Precision;
use posttrain_model::decoder::{DecodeRow, Decoder, PackedTokens, SequenceCache, Target, Workspace};
use posttrain_model::{hub, weights};
use serde_json::Value;

/// The real model, or `None` with a word about it where it is not cached.
fn smollm2() -> Option<Decoder> {
    let Some(path) = hub::cached("smollm2-135m-instruct") else {
        println!("skipped: smollm2-135m-instruct is not cached");
        return None;
    };
    let (config, tensors) = weights::gguf::read(&path).unwrap().load().unwrap();
    Some(Decoder::new(config, tensors).unwrap())
}

struct Prompt {
    ids: Vec<u32>,
    log_probs: Vec<f64>,
    top_ids: Vec<usize>,
    top_logits: Vec<f64>,
}

fn prompts() -> Vec<Prompt> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/logits/smollm2.json");
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let numbers =
        |value: &Value| -> Vec<f64> { value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect() };
    let prompt = |prompt: &Value| Prompt {
        ids: numbers(&prompt["ids"]).into_iter().map(|id| id as u32).collect(),
        log_probs: numbers(&prompt["log_probs"]),
        top_ids: numbers(&prompt["top_ids"]).into_iter().map(|id| id as usize).collect(),
        top_logits: numbers(&prompt["top_logits"]),
    };
    json["prompts"].as_array().unwrap().iter().map(prompt).collect()
}

fn next_tokens(ids: &[u32]) -> Vec<Target> {
    ids[1..].iter().enumerate().map(|(row, &token)| Target { row, token }).collect()
}

#[test]
fn logits_and_log_probs_agree_with_transformers() {
    let Some(mut decoder) = smollm2() else { return };
    for (precision, tolerance) in [(Precision::F32, 2e-3), (Precision::Bf16, 0.5)] {
        decoder.prepare(precision);
        for prompt in prompts() {
            let mut tokens = PackedTokens::new();
            tokens.push(&prompt.ids, None).unwrap();
            let mut workspace = Workspace::new();
            decoder.forward(&tokens, &mut workspace, false).unwrap();
            let found = decoder.log_probs(&mut workspace, &next_tokens(&prompt.ids), 1.0, false).unwrap().log_prob;
            for (found, expected) in found.iter().zip(&prompt.log_probs) {
                assert!((f64::from(*found) - expected).abs() < tolerance, "{precision:?}: {found} {expected}");
            }
            let d = decoder.config().hidden_size;
            let mut logits = vec![0.0; decoder.config().vocab_size];
            decoder.logits(&workspace.hidden()[(prompt.ids.len() - 1) * d..], &mut logits).unwrap();
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            assert!(precision == Precision::Bf16 || best == prompt.top_ids[0]);
            for (&id, &expected) in prompt.top_ids.iter().zip(&prompt.top_logits) {
                let found = f64::from(logits[id]);
                assert!((found - expected).abs() < tolerance, "{precision:?}: token {id}: {found} {expected}");
            }
        }
    }
}

#[test]
fn decoding_has_the_bits_of_the_training_forward() {
    let Some(mut decoder) = smollm2() else { return };
    let prompts = prompts();
    let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|value| value.to_bits()).collect() };
    for precision in [Precision::F32, Precision::Bf16] {
        decoder.prepare(precision);
        let (d, vocabulary) = (decoder.config().hidden_size, decoder.config().vocab_size);
        let mut workspace = Workspace::new();
        let prompt = &prompts[0].ids;
        // Sixteen continuations: real text, shifted.
        let text: Vec<u32> = prompts[1].ids.iter().chain(&prompts[2].ids).copied().collect();
        let continuations: Vec<Vec<u32>> = (0..16).map(|shift| text[shift..shift + 6].to_vec()).collect();
        let mut tokens = PackedTokens::new();
        tokens.push(prompt, None).unwrap();
        let mut targets = Vec::new();
        for ids in &continuations {
            let start = tokens.rows().next_multiple_of(2);
            tokens.push(ids, Some(0)).unwrap();
            targets.extend(next_tokens(ids).iter().map(|target| Target { row: start + target.row, ..*target }));
        }
        decoder.forward(&tokens, &mut workspace, false).unwrap();
        let trained = decoder.log_probs(&mut workspace, &targets, 0.9, false).unwrap().log_prob;

        for batch in [16, 1] {
            let prefill = decoder.prefill(&[prompt], &mut workspace).unwrap().swap_remove(0);
            for (group, continuations) in continuations.chunks(batch).enumerate().take(2) {
                let mut caches: Vec<SequenceCache> =
                    continuations.iter().map(|_| SequenceCache::new(&decoder, Arc::clone(&prefill.cache), 6)).collect();
                for position in 0..5 {
                    let mut rows: Vec<DecodeRow> = caches
                        .iter_mut()
                        .zip(continuations)
                        .map(|(cache, ids)| DecodeRow { tokens: &ids[position..=position], cache })
                        .collect();
                    decoder.decode(&mut rows, &mut workspace).unwrap();
                    let mut logits = vec![0.0; continuations.len() * vocabulary];
                    decoder.logits(&workspace.hidden()[..continuations.len() * d], &mut logits).unwrap();
                    for (index, (ids, logits)) in continuations.iter().zip(logits.chunks(vocabulary)).enumerate() {
                        let token = ids[position + 1] as usize;
                        let sampled = kernels::log_softmax_row(logits, 1.0 / 0.9, token).log_prob;
                        let trained = trained[(group * batch + index) * 5 + position];
                        assert_eq!(
                            bits(&[sampled]),
                            bits(&[trained]),
                            "{precision:?}, batch {batch}, sequence {index}"
                        );
                    }
                }
            }
        }
    }
}
