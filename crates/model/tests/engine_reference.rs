//! The engine against the reference decoder: hidden states, log-probs, entropies and every parameter's gradient.

use candle_core::{DType, Tensor};
use kernels::Precision;
use posttrain_model::ModelConfig;
use posttrain_model::decoder::{Decoder, PackedTokens, Workspace};
use posttrain_model::lora::{LoraConfig, TargetModule};
use posttrain_model::reference::ReferenceDecoder;

use crate::engine::{self, *};

const TEMPERATURE: f32 = 0.7;

/// The batch of [`batch`] with nothing shared: every prompt is repeated.
fn unshared() -> PackedTokens {
    let shared = batch();
    let mut tokens = PackedTokens::new();
    for segment in shared.segments() {
        let prefix = segment.prefix.map(|prefix| shared.segments()[prefix]);
        let mut ids = prefix.map_or(Vec::new(), |prefix| shared.ids()[prefix.start..][..prefix.len].to_vec());
        ids.extend_from_slice(&shared.ids()[segment.start..][..segment.len]);
        tokens.push(&ids, None).unwrap();
    }
    tokens
}

fn compare(what: &str, decoder: &mut Decoder, reference: &ReferenceDecoder, tokens: &PackedTokens) {
    let targets = targets(tokens);
    let (d_log_prob, d_entropy) = (upstream(1, targets.len()), upstream(2, targets.len()));
    decoder.prepare(Precision::F32);
    let mut workspace = Workspace::new();
    decoder.forward(tokens, &mut workspace, true).unwrap();

    let covered: Vec<usize> = tokens.segments().iter().flat_map(|s| s.start..s.start + s.len).collect();
    let d = decoder.config().hidden_size;
    let hidden: Vec<Vec<f64>> = reference.hidden(tokens).unwrap().to_dtype(DType::F64).unwrap().to_vec2().unwrap();
    for &row in &covered {
        let error = distance(&workspace.hidden()[row * d..][..d], &hidden[row]);
        assert!(error < 2e-5, "{what}: hidden row {row} is off by {error:.1e}");
    }

    let found = decoder.log_probs(&mut workspace, &targets, TEMPERATURE, true).unwrap();
    let (log_probs, entropies) = reference.log_probs(tokens, &targets, f64::from(TEMPERATURE)).unwrap();
    assert!(distance(&found.log_prob, &log_probs.to_vec1().unwrap()) < 2e-5, "{what}: log-probs");
    assert!(distance(&found.entropy, &entropies.to_vec1().unwrap()) < 2e-5, "{what}: entropies");

    let mut gradients = decoder.gradients();
    let again = decoder
        .backward(tokens, &mut workspace, &targets, TEMPERATURE, &d_log_prob, Some(&d_entropy), &mut gradients)
        .unwrap();
    assert_eq!(again, found, "{what}: backward computes the same log-probs");
    gradients.finish();
    let column = |values: &[f32]| Tensor::new(values, &candle_core::Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let loss = ((log_probs * column(&d_log_prob)).unwrap() + (entropies * column(&d_entropy)).unwrap()).unwrap();
    let expected = loss.sum_all().unwrap().backward().unwrap();
    for (index, parameter) in decoder.parameters().iter().enumerate() {
        let error = distance(gradients.grad(index), &reference.gradient(&expected, &parameter.name).unwrap());
        assert!(error < 5e-5, "{what}: the gradient of {} is off by {error:.1e}", parameter.name);
    }
}

fn reference(config: &ModelConfig, decoder: &Decoder) -> ReferenceDecoder {
    ReferenceDecoder::new(config, &decoder.tensors(), DType::F64).unwrap()
}

#[test]
fn full_gradients_of_every_family() {
    for (name, config) in configs() {
        let mut decoder = decoder(&config, 11);
        let reference = reference(&config, &decoder);
        compare(&format!("{name}, shared prompt"), &mut decoder, &reference, &batch());
        compare(&format!("{name}, repeated prompt"), &mut decoder, &reference, &unshared());
    }
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
            let reference = reference(&config, &decoder).with_adapter(lora, &decoder.adapter_tensors()).unwrap();
            compare(&format!("{name}, rank {}", lora.r), &mut decoder, &reference, &batch());
        }
    }
}

#[test]
fn gradients_of_a_shape_of_several_tiles() {
    let config = wide();
    let mut decoder = decoder(&config, 15);
    let oracle = reference(&config, &decoder);
    compare("wide, full", &mut decoder, &oracle, &long_batch());
    let lora = LoraConfig { r: 16, ..LoraConfig::default() };
    adapt(&mut decoder, &lora, 4);
    let oracle = oracle.with_adapter(&lora, &decoder.adapter_tensors()).unwrap();
    compare("wide, adapter", &mut decoder, &oracle, &long_batch());
}

#[test]
fn sharing_a_prompt_changes_no_bit_of_the_log_probs() {
    for (name, config) in configs() {
        let mut decoder = decoder(&config, 13);
        decoder.prepare(Precision::F32);
        let log_probs = |tokens: &PackedTokens| {
            let mut workspace = Workspace::new();
            decoder.forward(tokens, &mut workspace, false).unwrap();
            decoder.log_probs(&mut workspace, &targets(tokens), 1.0, false).unwrap().log_prob
        };
        let mut once: Vec<u32> = bits(&log_probs(&batch()));
        let mut repeated = bits(&log_probs(&unshared()));
        // The repeated prompts' own tokens appear three times there and once here.
        once.sort_unstable();
        repeated.sort_unstable();
        repeated.dedup();
        once.dedup();
        assert_eq!(once, repeated, "{name}");
    }
}

#[test]
fn merging_keeps_the_outputs_and_fresh_adapters_change_nothing() {
    for (name, config) in configs() {
        let mut decoder = decoder(&config, 14);
        let hidden = |decoder: &mut Decoder| {
            decoder.prepare(Precision::F32);
            let mut workspace = Workspace::new();
            decoder.forward(&batch(), &mut workspace, false).unwrap();
            workspace.hidden().to_vec()
        };
        let base = hidden(&mut decoder);
        decoder.attach_lora(&LoraConfig::default(), 1).unwrap();
        assert_eq!(hidden(&mut decoder), base, "{name}: a fresh adapter");
        decoder.merge_adapter();
        adapt(&mut decoder, &LoraConfig { r: 4, alpha: 8.0, ..LoraConfig::default() }, 2);
        let adapted = hidden(&mut decoder);
        assert_ne!(adapted, base, "{name}");
        decoder.set_adapter(false);
        assert_eq!(hidden(&mut decoder), base, "{name}: switched off");
        decoder.set_adapter(true);
        let (lora, tensors) = (decoder.adapter_config().unwrap().clone(), decoder.adapter_tensors());
        decoder.merge_adapter();
        let expected: Vec<f64> = adapted.iter().map(|x| f64::from(*x)).collect();
        assert!(distance(&hidden(&mut decoder), &expected) < 1e-5, "{name}: merged");

        let mut loaded = engine::decoder(&config, 14);
        loaded.load_adapter(&lora, tensors.clone()).unwrap();
        assert_eq!(hidden(&mut loaded), adapted, "{name}: loaded");
        let mut damaged = tensors;
        damaged.pop_first();
        let mut fresh = engine::decoder(&config, 14);
        assert!(fresh.load_adapter(&lora, damaged).unwrap_err().to_string().contains("missing"));
        assert_eq!(hidden(&mut fresh), base, "{name}: a refused adapter leaves nothing behind");
    }
}
