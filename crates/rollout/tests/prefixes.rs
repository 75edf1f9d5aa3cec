//! Prompts that begin alike: what is computed, and that nothing else changes.

use std::sync::Arc;

use base::{Purpose, Random};
use kernels::Precision;
use model::Family;
use model::decoder::Decoder;
use model::lora::LoraConfig;
use model::tokenizer::Tokenizer;
use posttrain_rollout::{Episode, Generator, PrefixCache, PromptTokens, Request, SamplingOptions};

use crate::common;

fn ids(name: u32, count: u32) -> Vec<u32> {
    let random = Random::new(6, Purpose::Test).prompt(name);
    (0..count).map(|i| random.at(i).below(256) as u32).collect()
}

/// Five questions after the same 50 tokens of instructions, two of them equal, each asked twice, and one of its own.
fn requests() -> Vec<Request> {
    let instructions = ids(0, 50);
    let mut prompts: Vec<Arc<[u32]>> =
        (1..5).map(|name| [&instructions[..], &ids(name, 3 + 4 * name)].concat().into()).collect();
    prompts.insert(2, prompts[0].clone());
    prompts.push(ids(9, 21).into());
    prompts.iter().zip(0..).flat_map(|(prompt, id)| Request::samples(id, prompt, 2).collect::<Vec<_>>()).collect()
}

fn generate(
    decoder: &Decoder,
    requests: &[Request],
    batch_size: usize,
    cache: Option<&mut PrefixCache>,
) -> (Vec<Episode>, PromptTokens) {
    let options = SamplingOptions { max_new_tokens: 20, ..SamplingOptions::default() };
    let generator = Generator::new(&options, batch_size, Random::new(1, Purpose::Sampling));
    let tokenizer = Tokenizer::bytes().unwrap();
    let mut tokens = PromptTokens::default();
    let mut note = |progress: posttrain_rollout::Progress<'_>| tokens = progress.prompt_tokens;
    let episodes = match cache {
        Some(cache) => generator.generate_with(cache, decoder, &tokenizer, requests, &mut note),
        None => generator.generate(decoder, &tokenizer, requests, &mut note),
    };
    (episodes.unwrap(), tokens)
}

fn alone(decoder: &Decoder, requests: &[Request]) -> Vec<Episode> {
    let one = |request: &Request| generate(decoder, std::slice::from_ref(request), 1, None).0.remove(0);
    requests.iter().map(one).collect()
}

#[test]
fn a_common_beginning_is_computed_once_whatever_the_batch() {
    let requests = requests();
    let all: usize = requests.iter().map(|request| request.prompt.len()).sum();
    let computed = 50 + (7 + 11 + 15 + 19) + 21;
    for family in common::FAMILIES {
        for precision in [Precision::F32, Precision::Bf16] {
            let decoder = common::tiny(family, precision);
            let expected = alone(&decoder, &requests);
            for batch_size in [1, 3, 32] {
                let (episodes, tokens) = generate(&decoder, &requests, batch_size, None);
                assert_eq!(episodes, expected, "{family:?}, {precision:?}, {batch_size}");
                assert_eq!(tokens, PromptTokens { computed, reused: all - computed }, "{batch_size}");
                let trained = common::trainer_log_probs(&decoder, &episodes, 1.0, true);
                for (episode, trained) in episodes.iter().zip(trained) {
                    assert_eq!(common::bits(&episode.log_probs), common::bits(&trained));
                }
            }
        }
    }
}

#[test]
fn a_conversation_computes_only_what_is_new() {
    let decoder = common::tiny(Family::Llama, Precision::Bf16);
    let mut cache = PrefixCache::new(10_000);
    let mut conversation = ids(20, 30);
    let mut known = 0;
    for turn in 0..5 {
        conversation.extend(ids(30 + turn, 18));
        let request = [Request { prompt_id: turn, sample: 0, prompt: conversation.clone().into(), prefix: Vec::new() }];
        let (episodes, tokens) = generate(&decoder, &request, 1, Some(&mut cache));
        assert_eq!(episodes, alone(&decoder, &request), "turn {turn}");
        assert_eq!(tokens, PromptTokens { computed: conversation.len() - known, reused: known }, "turn {turn}");
        conversation.extend(&episodes[0].completion);
        // All that the decoder has seen: nothing follows the last token of an answer.
        known = conversation.len() - 1;
        assert_eq!(cache.tokens(), known);
    }
    // The same question again needs its last token only; another beginning needs all but what is common.
    let request = [Request { prompt_id: 0, sample: 0, prompt: conversation[..known].into(), prefix: Vec::new() }];
    let (episodes, tokens) = generate(&decoder, &request, 1, Some(&mut cache));
    assert_eq!((episodes, tokens.computed), (alone(&decoder, &request), 1));
    for (common, reused) in [(40, 40), (16, 16), (15, 0)] {
        let prompt = [&conversation[..common], &[255 - conversation[common].min(254), 7]].concat();
        let request = [Request { prompt_id: 0, sample: 0, prompt: prompt.into(), prefix: Vec::new() }];
        let (episodes, tokens) = generate(&decoder, &request, 1, Some(&mut cache));
        assert_eq!((episodes, tokens.reused), (alone(&decoder, &request), reused));
    }
}

#[test]
fn a_full_cache_forgets_what_served_longest_ago() {
    let decoder = common::tiny(Family::Qwen3, Precision::F32);
    let mut cache = PrefixCache::new(200);
    let ask = |cache: &mut PrefixCache, name: u32| {
        let request = [Request { prompt_id: name, sample: 0, prompt: ids(name, 40).into(), prefix: Vec::new() }];
        let (episodes, tokens) = generate(&decoder, &request, 1, Some(cache));
        assert_eq!(episodes, alone(&decoder, &request));
        assert!(cache.tokens() <= 200);
        tokens.reused
    };
    // Each takes 40 tokens for its prompt and up to 19 for its answer: three fit.
    assert_eq!([1, 2, 3].map(|name| ask(&mut cache, name)), [0, 0, 0]);
    assert_eq!(ask(&mut cache, 1), 39);
    assert_eq!(ask(&mut cache, 4), 0, "takes the place of 2");
    assert_eq!([3, 1, 2].map(|name| ask(&mut cache, name)), [39, 39, 0]);
    let mut small = PrefixCache::new(3);
    assert_eq!([1, 1].map(|name| ask(&mut small, name)), [0, 39], "the newest stays");
}

#[test]
fn nothing_is_reused_after_a_change_of_the_weights() {
    let mut decoder = common::tiny(Family::Gemma3, Precision::F32);
    decoder.attach_lora(&LoraConfig { r: 2, ..LoraConfig::default() }, 3).unwrap();
    for index in 0..decoder.parameters().len() {
        decoder.parameter_mut(index).iter_mut().for_each(|value| *value += 0.1);
    }
    decoder.prepare(Precision::F32);
    let requests = requests();
    let mut cache = PrefixCache::new(10_000);
    let mut reused = |decoder: &Decoder| {
        let (episodes, tokens) = generate(decoder, &requests, 4, Some(&mut cache));
        assert_eq!(episodes, alone(decoder, &requests));
        tokens.reused
    };
    let first = reused(&decoder);
    let again = reused(&decoder);
    assert!(again > first, "{again} and {first}");
    decoder.set_adapter(false);
    assert_eq!(reused(&decoder), first, "without the adapter");
    decoder.set_adapter(true);
    assert_eq!(reused(&decoder), first, "with the adapter");
    decoder.prepare(Precision::Bf16);
    assert_eq!(reused(&decoder), first, "in another precision");
    decoder.parameter_mut(0)[0] += 1.0;
    decoder.prepare(Precision::Bf16);
    assert_eq!(reused(&decoder), first, "with another weight");
    assert_eq!(reused(&decoder), again);
}
