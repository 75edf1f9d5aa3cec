//! The decoder on a device of candle's against the engine: log-probs, every gradient, generation, errors. The device is candle's
//! processor; what a GPU adds to it is candle's own kernels, and with `POSTTRAIN_TEST_DEVICE=cuda` these tests run on one.

use std::sync::Arc;

use candle_core::Device;
use kernels::Precision;
use posttrain_model::config::ScoreHead;
use posttrain_model::decoder::{
    DecodeRow, Decoder, KvCache, Prompt, ScoreGradients, SequenceCache, WeightFormat, Workspace,
};
use posttrain_model::lora::{LoraConfig, TargetModule};
use posttrain_model::{DeviceName, Error, Family, ModelConfig};

use crate::engine::*;

const TEMPERATURE: f32 = 0.7;

/// Candle's processor, or what `POSTTRAIN_TEST_DEVICE` names.
fn device() -> Device {
    let name = std::env::var("POSTTRAIN_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
    name.parse::<DeviceName>().unwrap().open().unwrap().unwrap_or(Device::Cpu)
}

fn on_device(decoder: &Decoder, precision: Precision) -> Decoder {
    let mut decoder = decoder.clone();
    decoder.to_device(&device()).unwrap();
    decoder.prepare(precision);
    decoder
}

/// |a - b| / |b|.
fn off(a: &[f32], b: &[f32]) -> f64 {
    distance(a, &b.iter().map(|&b| f64::from(b)).collect::<Vec<_>>())
}

/// Log-probs, entropies and gradients of both within a relative `tolerance`.
fn compare(what: &str, decoder: &mut Decoder, precision: Precision, checkpointing: bool, tolerance: f64) {
    let tokens = if decoder.config().hidden_size > 300 { long_batch() } else { batch() };
    let targets = targets(&tokens);
    let (d_log_prob, d_entropy) = (upstream(1, targets.len()), upstream(2, targets.len()));
    decoder.prepare(precision);
    let device = on_device(decoder, precision);
    let run = |decoder: &Decoder| {
        let mut workspace = Workspace::new();
        workspace.set_checkpointing(checkpointing);
        let mut gradients = decoder.gradients();
        decoder.forward(&tokens, &mut workspace, true).unwrap();
        let found = decoder.log_probs(&mut workspace, &targets, TEMPERATURE, true).unwrap();
        // Twice, as two micro-batches would be.
        for _ in 0..2 {
            decoder.forward(&tokens, &mut workspace, true).unwrap();
            let again = decoder.backward(
                &tokens,
                &mut workspace,
                &targets,
                TEMPERATURE,
                &d_log_prob,
                Some(&d_entropy),
                &mut gradients,
            );
            assert_eq!(again.unwrap(), found, "{what}: backward computes the same log-probs");
        }
        gradients.finish();
        (found, gradients)
    };
    let ((expected, expected_gradients), (found, gradients)) = (run(decoder), run(&device));
    for (name, a, b) in
        [("log-probs", &found.log_prob, &expected.log_prob), ("entropies", &found.entropy, &expected.entropy)]
    {
        let error = off(a, b);
        assert!(error < tolerance, "{what}: {name} are off by {error:.1e}");
    }
    if precision == Precision::F32 {
        assert_eq!(found.most_probable, expected.most_probable, "{what}");
    }
    for (index, parameter) in decoder.parameters().iter().enumerate() {
        let error = off(gradients.grad(index), expected_gradients.grad(index));
        assert!(error < 2.5 * tolerance, "{what}: the gradient of {} is off by {error:.1e}", parameter.name);
    }
}

#[test]
fn full_gradients_of_every_family() {
    for (name, config) in configs() {
        for checkpointing in [false, true] {
            compare(&name, &mut decoder(&config, 11), Precision::F32, checkpointing, 2e-5);
        }
    }
    compare("wide", &mut decoder(&wide(), 15), Precision::F32, false, 2e-5);
}

#[test]
fn adapter_gradients_of_every_family() {
    let some = LoraConfig {
        r: 3,
        alpha: 5.0,
        use_rslora: true,
        target_modules: vec![TargetModule::QProj, TargetModule::VProj, TargetModule::UpProj],
        layers_to_transform: Some(vec![1]),
    };
    let all = LoraConfig { r: 4, alpha: 8.0, ..LoraConfig::default() };
    for (name, config) in configs() {
        for lora in [&some, &all] {
            let mut decoder = decoder(&config, 12);
            adapt(&mut decoder, lora, 3);
            compare(&format!("{name}, rank {}", lora.r), &mut decoder, Precision::F32, false, 2e-5);
        }
    }
}

/// Both round operands to bfloat16; the device rounds each product's result as well.
#[test]
fn bf16_agrees_within_its_rounding() {
    for (name, config) in configs() {
        compare(&name, &mut decoder(&config, 13), Precision::Bf16, false, 3e-2);
    }
}

/// The hidden states of the same three prompts and their continuations, from either decoder: two prompts that share a beginning,
/// one of a single token, decoded in steps of one and several tokens, one of them forgotten again, and a prompt that comes later
/// and continues what the first sequence has cached.
fn generate(decoder: &Decoder) -> Vec<Vec<f32>> {
    let mut workspace = Workspace::new();
    let long = ids(21, 40);
    let mut other = long.clone();
    other.truncate(30);
    other.extend(ids(22, 7));
    let mut hidden = Vec::new();
    let prefills = decoder.prefill(&[&long, &other, &long[..1]], &mut workspace).unwrap();
    assert_eq!(prefills.iter().map(|prefill| prefill.computed).collect::<Vec<_>>(), [40, 7, 1]);
    hidden.extend(prefills.iter().map(|prefill| prefill.hidden.clone()));
    let continued = |index: usize| SequenceCache::new(decoder, Arc::clone(&prefills[index].cache), 1);
    let mut caches: Vec<SequenceCache> = (0..3).chain([0]).map(continued).collect();
    for (step, count) in [1, 3, 1].into_iter().enumerate() {
        let tokens: Vec<Vec<u32>> = (0..4).map(|index| ids(30 + 10 * step as u64 + index, count)).collect();
        let mut rows: Vec<DecodeRow<'_>> =
            caches.iter_mut().zip(&tokens).map(|(cache, tokens)| DecodeRow { tokens, cache }).collect();
        decoder.decode(&mut rows, &mut workspace).unwrap();
        hidden.push(workspace.hidden().to_vec());
        if step == 1 {
            caches[1].truncate(2);
            assert_eq!(caches[1].len(), 39);
        }
    }
    let shared = caches.remove(0).into_shared();
    assert_eq!(shared.len(), 45);
    let known = shared.beginning(43);
    let mut tokens = long.clone();
    tokens.extend([1, 2, 3, 4, 5]);
    let mut rows: Vec<DecodeRow<'_>> = caches.iter_mut().map(|cache| DecodeRow { tokens: &[7], cache }).collect();
    let later = decoder.extend(&mut rows, &[Prompt { tokens: &tokens, known }], &mut workspace).unwrap();
    hidden.push(workspace.hidden().to_vec());
    assert_eq!((later[0].computed, later[0].cache.len()), (2, 45));
    hidden
}

#[test]
fn generation_gives_the_engines_hidden_states() {
    let tall = (String::from("wide"), wide());
    for (name, config) in configs().into_iter().chain([tall]) {
        let mut engine = decoder(&config, 16);
        engine.prepare(Precision::F32);
        let expected = generate(&engine);
        let found = generate(&on_device(&engine, Precision::F32));
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let error = off(found, expected);
            assert!(error < 2e-5, "{name}: hidden states {index} are off by {error:.1e}");
        }
        let (mut logits, mut expected_logits) = (vec![0.0; 2 * VOCABULARY], vec![0.0; 2 * VOCABULARY]);
        let rows = &expected[3][..2 * config.hidden_size];
        engine.logits(rows, &mut expected_logits).unwrap();
        on_device(&engine, Precision::F32).logits(rows, &mut logits).unwrap();
        assert!(off(&logits, &expected_logits) < 2e-5, "{name}: logits");
    }
}

#[test]
fn weights_are_copied_again_when_they_changed_and_only_then() {
    let mut engine = decoder(&ModelConfig::tiny(Family::Qwen3, VOCABULARY), 17);
    adapt(&mut engine, &LoraConfig { r: 2, ..LoraConfig::default() }, 3);
    let mut device = on_device(&engine, Precision::F32);
    let hidden = |decoder: &mut Decoder, precision| {
        decoder.prepare(precision);
        let mut workspace = Workspace::new();
        decoder.forward(&batch(), &mut workspace, false).unwrap();
        workspace.hidden().to_vec()
    };
    let first = hidden(&mut device, Precision::F32);
    assert!(off(&first, &hidden(&mut engine, Precision::F32)) < 2e-5);
    for decoder in [&mut engine, &mut device] {
        decoder.parameter_mut(3)[1] += 0.5;
    }
    let mut workspace = Workspace::new();
    assert!(device.forward(&batch(), &mut workspace, false).is_err(), "the change was not prepared");
    let changed = hidden(&mut device, Precision::F32);
    assert!(off(&changed, &first) > 1e-3 && off(&changed, &hidden(&mut engine, Precision::F32)) < 2e-5);
    assert!(off(&hidden(&mut device, Precision::Bf16), &hidden(&mut engine, Precision::Bf16)) < 3e-2);
    for decoder in [&mut engine, &mut device] {
        decoder.set_adapter(false);
    }
    assert!(off(&hidden(&mut device, Precision::F32), &hidden(&mut engine, Precision::F32)) < 2e-5);
    for decoder in [&mut engine, &mut device] {
        decoder.set_adapter(true);
        decoder.merge_adapter();
    }
    assert!(off(&hidden(&mut device, Precision::F32), &changed) < 2e-5, "merged weights compute the same");
}

#[test]
fn what_a_device_cannot_do_is_said() {
    let engine = decoder(&ModelConfig::tiny(Family::Llama, VOCABULARY), 18);
    let mut device = on_device(&engine, Precision::F32);
    assert!(device.device().is_some() && engine.device().is_none());
    let mut workspace = Workspace::new();

    let error = device.backward_hidden(&batch(), &mut workspace, &[], &mut device.gradients()).unwrap_err();
    assert!(error.to_string().contains("kept its activations"), "{error}");

    device.prepare_for_generation(Precision::F32, WeightFormat::Int8);
    let error = device.prefill(&[&[1, 2, 3]], &mut workspace).err().unwrap();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");

    // Keys and values do not move between the engine and a device.
    let mut engine = engine;
    engine.prepare(Precision::F32);
    let known: KvCache = engine.prefill(&[&ids(1, 20)], &mut workspace).unwrap()[0].cache.beginning(20);
    device.prepare(Precision::F32);
    let tokens = ids(1, 24);
    let error = device.extend(&mut [], &[Prompt { tokens: &tokens, known }], &mut workspace).err().unwrap();
    assert!(error.to_string().contains("other weights"), "{error}");
}

#[test]
fn the_first_value_that_is_no_number_is_named() {
    let mut decoder = decoder(&ModelConfig::tiny(Family::Llama, VOCABULARY), 19);
    let names: Vec<String> = decoder.parameters().iter().map(|parameter| parameter.name.clone()).collect();
    let index = names.iter().position(|name| name == "model.layers.1.mlp.down_proj.weight").unwrap();
    decoder.parameter_mut(index)[0] = f32::NAN;
    let mut workspace = Workspace::new();
    let error = on_device(&decoder, Precision::F32).forward(&batch(), &mut workspace, true).unwrap_err();
    let Error::NonFinite(found) = error else { panic!("{error}") };
    assert_eq!((found.layer, found.tensor.as_str(), found.row), (Some(1), "layer output", 0));
}

/// A policy and its critic on one body; the score head is added to a decoder that is on the device already.
#[test]
fn two_heads_share_a_body() {
    let mut engine = decoder(&ModelConfig::tiny(Family::Qwen2, VOCABULARY), 20);
    let mut device = on_device(&engine, Precision::F32);
    let tokens = batch();
    let targets = targets(&tokens);
    let rows: Vec<usize> = (0..tokens.rows()).step_by(3).collect();
    let (d_log_prob, d_scores) = (upstream(1, targets.len()), upstream(3, rows.len()));
    let [expected, found] = [&mut engine, &mut device].map(|decoder| {
        decoder.add_score(ScoreHead::VALUE, 0.3, 5).unwrap();
        decoder.prepare(Precision::F32);
        let (mut workspace, mut gradients) = (Workspace::new(), decoder.gradients());
        decoder.forward(&tokens, &mut workspace, true).unwrap();
        let scores = decoder.scores(&workspace, &rows).unwrap();
        let given = ScoreGradients { rows: &rows, blocks: None, d_scores: &d_scores };
        decoder
            .backward_with_scores(&tokens, &mut workspace, &targets, 1.0, &d_log_prob, None, given, &mut gradients)
            .unwrap();
        gradients.finish();
        (scores, gradients)
    });
    assert!(device.device().is_some());
    assert!(off(&found.0, &expected.0) < 2e-5);
    for (index, parameter) in engine.parameters().iter().enumerate() {
        let error = off(found.1.grad(index), expected.1.grad(index));
        assert!(error < 5e-5, "the gradient of {} is off by {error:.1e}", parameter.name);
    }
}

/// Losses of whole distributions see the engine's logits and reach the same gradients, from changed embeddings too.
#[test]
fn logits_go_out_and_their_gradients_come_back() {
    for (name, config) in configs() {
        let mut engine = decoder(&config, 21);
        engine.prepare(Precision::F32);
        let there = on_device(&engine, Precision::F32);
        let tokens = batch();
        let targets = targets(&tokens);
        let change = |row: usize, embedding: &mut [f32]| embedding[0] += 0.1 * row as f32;
        let weights = upstream(4, VOCABULARY);
        let [expected, found] = [&engine, &there].map(|decoder| {
            let (mut workspace, mut gradients) = (Workspace::new(), decoder.gradients());
            decoder.forward_with_embeddings(&tokens, &mut workspace, true, Some(&change)).unwrap();
            let mut seen = Vec::new();
            let looked = decoder.visit_logits(&mut workspace, &targets, |rows| {
                rows.into_iter().for_each(|row| seen.extend_from_slice(row.logits));
                Ok::<(), ()>(())
            });
            assert_eq!(looked.unwrap(), Ok(()));
            // The loss is Σ w_j z_j² / 2.
            let done = decoder.backward_logits(&tokens, &mut workspace, &targets, &mut gradients, |rows| {
                for row in rows {
                    row.logits.iter_mut().zip(&weights).for_each(|(logit, weight)| *logit *= weight);
                }
                Ok::<(), ()>(())
            });
            assert_eq!(done.unwrap(), Ok(()));
            gradients.finish();
            let refused = decoder.visit_logits(&mut workspace, &targets, |_| Err("enough"));
            assert_eq!(refused.unwrap(), Err("enough"));
            (seen, gradients)
        });
        assert!(off(&found.0, &expected.0) < 2e-5, "{name}");
        for (index, parameter) in engine.parameters().iter().enumerate() {
            let error = off(found.1.grad(index), expected.1.grad(index));
            assert!(error < 5e-5, "{name}: the gradient of {} is off by {error:.1e}", parameter.name);
        }
    }
}
