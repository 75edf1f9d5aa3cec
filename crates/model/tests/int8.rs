//! Generation with weights in 8 bits: near the full ones, the same bits in every batch, and training knows nothing of it.

use std::sync::Arc;

use kernels::Precision;
use posttrain_model::decoder::{DecodeRow, Decoder, SequenceCache, WeightFormat, Workspace};
use posttrain_model::lora::LoraConfig;

use crate::engine::*;

fn each_decoder(mut check: impl FnMut(&str, Precision, &mut Decoder)) {
    for (name, config) in configs() {
        for (precision, adapter) in [(Precision::F32, true), (Precision::Bf16, false), (Precision::Bf16, true)] {
            let mut decoder = decoder(&config, 22);
            if adapter {
                adapt(&mut decoder, &LoraConfig { r: 3, alpha: 6.0, ..LoraConfig::default() }, 5);
            }
            decoder.prepare(precision);
            check(&format!("{name}, adapter {adapter}, {precision:?}"), precision, &mut decoder);
        }
    }
}

/// Logits after a prompt and after each of three further tokens.
fn logits(decoder: &Decoder, prompts: &[&[u32]]) -> Vec<Vec<f32>> {
    let mut workspace = Workspace::new();
    let prefills = decoder.prefill(prompts, &mut workspace).unwrap();
    let of = |hidden: &[f32]| {
        let mut logits = vec![0.0; hidden.len() / decoder.config().hidden_size * VOCABULARY];
        decoder.logits(hidden, &mut logits).unwrap();
        logits
    };
    let mut all: Vec<Vec<f32>> = prefills.iter().map(|prefill| of(&prefill.hidden)).collect();
    let mut caches: Vec<SequenceCache> =
        prefills.iter().map(|prefill| SequenceCache::new(decoder, Arc::clone(&prefill.cache), 3)).collect();
    for token in [3, 1, 4] {
        let mut rows: Vec<DecodeRow<'_>> =
            caches.iter_mut().map(|cache| DecodeRow { tokens: std::slice::from_ref(&token), cache }).collect();
        decoder.decode(&mut rows, &mut workspace).unwrap();
        let logits = of(workspace.hidden());
        for (all, logits) in all.iter_mut().zip(logits.chunks(VOCABULARY)) {
            all.extend_from_slice(logits);
        }
    }
    all
}

#[test]
fn it_is_near_the_full_weights_and_the_same_in_every_batch() {
    let prompts = [ids(1, 5), ids(2, 40), ids(3, 1)];
    let views: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    each_decoder(|name, precision, decoder| {
        let full = logits(decoder, &views);
        decoder.prepare_for_generation(precision, WeightFormat::Int8);
        let together = logits(decoder, &views);
        for (index, prompt) in views.iter().enumerate() {
            assert!(bits(&logits(decoder, &[prompt])[0]) == bits(&together[index]), "{name}: prompt {index}");
            let exact: Vec<f64> = full[index].iter().map(|&x| f64::from(x)).collect();
            let off = distance(&together[index], &exact);
            assert!(off > 1e-5 && off < 0.05, "{name}: {off}");
        }
        decoder.prepare_for_generation(precision, WeightFormat::Full);
        assert!(logits(decoder, &views).concat() == full.concat(), "{name}: and back");
    });
}

#[test]
fn training_reads_the_full_weights() {
    each_decoder(|name, precision, decoder| {
        let tokens = batch();
        let targets = targets(&tokens);
        let upstream = upstream(3, targets.len());
        let train = |decoder: &Decoder| {
            let mut workspace = Workspace::new();
            let mut gradients = decoder.gradients();
            decoder.forward(&tokens, &mut workspace, true).unwrap();
            let forward = decoder.log_probs(&mut workspace, &targets, 0.9, false).unwrap().log_prob;
            decoder.backward(&tokens, &mut workspace, &targets, 0.9, &upstream, None, &mut gradients).unwrap();
            gradients.finish();
            (bits(&forward), bits(gradients.flat()))
        };
        let full = train(decoder);
        decoder.prepare_for_generation(precision, WeightFormat::Int8);
        assert!(train(decoder) == full, "{name}");
    });
}

#[test]
fn it_follows_every_change_of_the_weights() {
    let (name, config) = &configs()[0];
    let prompt = ids(9, 12);
    let mut followed = decoder(config, 1);
    for (seed, precision) in [(1, Precision::F32), (1, Precision::Bf16), (2, Precision::Bf16)] {
        let mut fresh = decoder(config, seed);
        for index in 0..fresh.parameters().len() {
            followed.parameter_mut(index).copy_from_slice(fresh.parameter(index));
        }
        fresh.prepare_for_generation(precision, WeightFormat::Int8);
        followed.prepare_for_generation(precision, WeightFormat::Int8);
        assert!(logits(&followed, &[&prompt]) == logits(&fresh, &[&prompt]), "{name}, {seed}, {precision:?}");
    }
    followed.parameter_mut(0)[0] += 1.0;
    assert!(followed.prefill(&[&prompt], &mut Workspace::new()).is_err(), "not prepared");
}
