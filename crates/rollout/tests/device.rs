//! Whole generations by a decoder on a device of candle's, here its processor: the answers of the engine.

use base::{Purpose, Random};
use candle_core::Device;
use kernels::Precision;
use model::DeviceName;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use posttrain_rollout::{Episode, Generator, PrefixCache, SamplingOptions};

use crate::common;

/// Candle's processor, or what `POSTTRAIN_TEST_DEVICE` names.
fn device() -> Device {
    let name = std::env::var("POSTTRAIN_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
    name.parse::<DeviceName>().unwrap().open().unwrap().unwrap_or(Device::Cpu)
}

/// Two rounds of the same requests, prompts with several samples and forced openings among them; the second continues what the
/// first has cached.
fn generate(decoder: &Decoder, batch_size: usize) -> Vec<Episode> {
    let options = SamplingOptions::greedy(24);
    let generator = Generator::new(&options, batch_size, Random::new(9, Purpose::Sampling));
    let (mut cache, tokenizer) = (PrefixCache::new(200), Tokenizer::bytes().unwrap());
    let requests = common::requests(6, 3);
    let mut round = || generator.generate_with(&mut cache, decoder, &tokenizer, &requests, |_| {}).unwrap();
    let mut episodes = round();
    episodes.extend(round());
    episodes
}

#[test]
fn greedy_answers_are_the_engines() {
    for family in common::FAMILIES {
        let engine = common::tiny(family, Precision::F32);
        let mut there = engine.clone();
        there.to_device(&device()).unwrap();
        there.prepare(Precision::F32);
        let expected = generate(&engine, 4);
        for batch_size in [1, 4, 32] {
            for (found, expected) in generate(&there, batch_size).iter().zip(&expected) {
                assert_eq!(found.completion, expected.completion, "{family}, batch of {batch_size}");
                for (found, expected) in found.log_probs.iter().zip(&expected.log_probs) {
                    assert!((found - expected).abs() < 2e-4, "{family}: {found} beside {expected}");
                }
            }
        }
    }
}
