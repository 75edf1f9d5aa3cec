//! Whole generations with small decoders of every family: the same bits in any batch, order and number of threads, and
//! the trainer's log-probs.

use std::sync::atomic::{AtomicBool, Ordering};

use base::{Hint, Purpose, Random};
use candle_core::DType;
use kernels::Precision;
use model::Family;
use model::decoder::{Decoder, PackedTokens};
use model::reference::ReferenceDecoder;
use model::tokenizer::Tokenizer;
use posttrain_rollout::{Episode, Error, Finish, Generator, LogitsContext, LogitsHook, Request, SamplingOptions};

use crate::common;

fn sampling() -> Random {
    Random::new(9, Purpose::Sampling).step(3)
}

fn generate(decoder: &Decoder, options: &SamplingOptions, batch_size: usize, requests: &[Request]) -> Vec<Episode> {
    let tokenizer = Tokenizer::bytes().unwrap();
    Generator::new(options, batch_size, sampling()).generate(decoder, &tokenizer, requests, |_| {}).unwrap()
}

fn filtered() -> SamplingOptions {
    SamplingOptions {
        temperature: 0.8,
        top_k: 60,
        top_p: 0.95,
        min_p: 0.01,
        max_new_tokens: 24,
        ..SamplingOptions::default()
    }
}

#[test]
fn bits_do_not_depend_on_batch_order_or_threads() {
    for (family, precision) in [(Family::Gemma3, Precision::F32), (Family::Qwen2, Precision::Bf16)] {
        let decoder = common::tiny(family, precision);
        let options = SamplingOptions { top_log_probs: 3, ..filtered() };
        let requests = common::requests(5, 4);
        let expected = generate(&decoder, &options, 1, &requests);
        assert!(expected.iter().zip(&requests).all(|(a, b)| (a.prompt_id, a.sample) == (b.prompt_id, b.sample)));
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                for batch_size in [3, 4, 16, 64] {
                    assert_eq!(generate(&decoder, &options, batch_size, &requests), expected, "batch {batch_size}");
                }
                let order = Random::new(1, Purpose::Test).permutation(requests.len());
                let shuffled: Vec<Request> = order.iter().map(|&i| requests[i].clone()).collect();
                for (&i, episode) in order.iter().zip(generate(&decoder, &options, 4, &shuffled)) {
                    assert_eq!(episode, expected[i], "shuffled");
                }
            });
        }
    }
}

#[test]
fn log_probs_are_the_trainers() {
    for family in common::FAMILIES {
        for precision in [Precision::F32, Precision::Bf16] {
            let decoder = common::tiny(family, precision);
            for (options, batch_size) in [(filtered(), 1), (filtered(), 16), (SamplingOptions::greedy(24), 16)] {
                let episodes = generate(&decoder, &options, batch_size, &common::requests(4, 4));
                assert!(episodes.iter().any(|episode| episode.completion.len() > 5), "something was generated");
                for share in [true, false] {
                    let temperature = options.log_prob_temperature();
                    let trainer = common::trainer_log_probs(&decoder, &episodes, temperature, share);
                    for (episode, trainer) in episodes.iter().zip(trainer) {
                        let name = format!("{family:?} {precision:?} batch {batch_size} share {share}");
                        assert_eq!(common::bits(&episode.log_probs), common::bits(&trainer), "{name}");
                    }
                }
            }
        }
    }
}

#[test]
fn without_filters_both_log_probs_are_one() {
    let decoder = common::tiny(Family::Llama, Precision::F32);
    let options = SamplingOptions { max_new_tokens: 12, ..SamplingOptions::default() };
    for episode in generate(&decoder, &options, 4, &common::requests(2, 2)) {
        assert_eq!(common::bits(&episode.log_probs), common::bits(&episode.filtered_log_probs));
    }
    // A filter only adds probability to what it keeps; forced tokens are not subject to it.
    let options = SamplingOptions { top_k: 5, ..options };
    for episode in generate(&decoder, &options, 4, &common::requests(2, 3)) {
        for i in 0..episode.completion.len() {
            let gain = episode.filtered_log_probs[i] - episode.log_probs[i];
            assert!(if episode.loss_mask[i] { gain > -1e-6 } else { gain == 0.0 }, "{gain}");
        }
    }
}

#[test]
fn greedy_is_the_argmax_of_the_reference() {
    for family in common::FAMILIES {
        let decoder = common::tiny(family, Precision::F32);
        let reference = ReferenceDecoder::new(decoder.config(), &decoder.tensors(), DType::F64).unwrap();
        for episode in generate(&decoder, &SamplingOptions::greedy(12), 3, &common::requests(3, 1)) {
            let mut tokens = PackedTokens::new();
            let ids: Vec<u32> = episode.prompt.iter().chain(&episode.completion).copied().collect();
            tokens.push(&ids, None).unwrap();
            let logits: Vec<Vec<f64>> = reference.logits(&tokens).unwrap().to_vec2().unwrap();
            for (i, &token) in episode.completion.iter().enumerate().filter(|(i, _)| episode.loss_mask[*i]) {
                let row = &logits[episode.prompt.len() + i - 1];
                let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                // f32 and f64 may disagree about logits that are equal to f32's precision.
                assert!(row[token as usize] > largest - 1e-3, "{family:?}, token {i}");
            }
        }
    }
}

#[test]
fn a_completion_continues_from_any_of_its_prefixes() {
    let decoder = common::tiny(Family::Mistral, Precision::Bf16);
    let options = SamplingOptions { max_new_tokens: 50, ..filtered() };
    let prompt = common::prompts(2).remove(1);
    let whole = &generate(&decoder, &options, 1, &Request::samples(5, &prompt, 1).collect::<Vec<_>>())[0];
    assert_eq!(whole.completion.len(), 50, "longer than what is fed in one round");
    for length in [0, 1, 2, 31, 32, 33, 34, 49, 50] {
        let prefix = whole.completion[..length].to_vec();
        let request = Request { prompt_id: 5, sample: 0, prompt: prompt.clone(), prefix };
        let continued = &generate(&decoder, &options, 1, &[request])[0];
        assert_eq!(continued.completion, whole.completion, "{length}");
        assert_eq!(common::bits(&continued.log_probs), common::bits(&whole.log_probs), "{length}");
        assert_eq!(continued.text, whole.text, "{length}");
        assert_eq!(continued.loss_mask.iter().filter(|&&sampled| !sampled).count(), length);
        assert_eq!(continued.finish, Finish::Length);
    }
}

/// Ends most completions at once and some very late.
struct HeavyTail;

impl LogitsHook for HeavyTail {
    fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>) {
        let length =
            if context.request.sample.is_multiple_of(9) { 60 } else { 1 + context.request.sample as usize % 4 };
        logits[common::END as usize] = if context.completion.len() + 1 >= length { 1e4 } else { -1e4 };
    }
}

#[test]
fn the_batch_stays_full_when_lengths_differ_wildly() {
    let decoder = common::tiny(Family::Llama, Precision::F32);
    let tokenizer = Tokenizer::bytes().unwrap();
    let options = SamplingOptions { max_new_tokens: 64, ..SamplingOptions::default() };
    // Samples of several prompts, interleaved: the prompts must not all be kept, nor the order matter.
    let prompts = common::prompts(4);
    let requests: Vec<Request> = (0..18)
        .flat_map(|sample| {
            prompts.iter().enumerate().map(move |(id, prompt)| Request {
                prompt_id: id as u32,
                sample,
                prompt: prompt.clone(),
                prefix: Vec::new(),
            })
        })
        .collect();
    let run = |batch_size: usize| {
        let generator = Generator { hook: Some(&HeavyTail), ..Generator::new(&options, batch_size, sampling()) };
        let (mut rounds, mut most, mut last) = (0, 0, 0);
        let episodes = generator
            .generate(&decoder, &tokenizer, &requests, |progress| {
                rounds += 1;
                most = most.max(progress.running);
                last = progress.tokens;
                assert_eq!(progress.total, 72);
            })
            .unwrap();
        assert!(most <= batch_size);
        assert_eq!(last, episodes.iter().map(|episode| episode.completion.len()).sum::<usize>());
        (episodes, rounds)
    };
    let (alone, rounds) = run(1);
    let tokens: usize = alone.iter().map(|episode| episode.completion.len()).sum();
    assert_eq!(rounds, tokens, "one token a round");
    assert_eq!(alone.iter().filter(|episode| episode.completion.len() == 60).count(), 8);
    let (together, rounds) = run(8);
    assert_eq!(together, alone);
    // A batch that waited for its longest member would need 60 rounds for each eight requests.
    assert!(rounds < tokens / 8 + 120, "{rounds} rounds for {tokens} tokens");
}

#[test]
fn top_log_probs_contain_the_sampled_token() {
    let decoder = common::tiny(Family::Qwen3, Precision::F32);
    let options = SamplingOptions { top_k: 4, top_log_probs: 4, max_new_tokens: 8, ..SamplingOptions::default() };
    for episode in generate(&decoder, &options, 4, &common::requests(2, 2)) {
        assert_eq!(episode.top_log_probs.len(), episode.completion.len());
        for (i, top) in episode.top_log_probs.iter().enumerate().filter(|(i, _)| episode.loss_mask[*i]) {
            let (_, log_prob) = top.iter().find(|(token, _)| *token == episode.completion[i]).unwrap();
            assert_eq!(log_prob.to_bits(), episode.log_probs[i].to_bits());
        }
    }
}

#[test]
fn a_cancelled_generation_says_so() {
    let decoder = common::tiny(Family::Llama, Precision::F32);
    let (cancel, options) = (AtomicBool::new(false), SamplingOptions::default());
    let generator = Generator { cancel: Some(&cancel), ..Generator::new(&options, 4, sampling()) };
    let mut rounds = 0;
    let result = generator.generate(&decoder, &Tokenizer::bytes().unwrap(), &common::requests(2, 2), |_| {
        rounds += 1;
        cancel.store(rounds == 3, Ordering::Relaxed);
    });
    assert!(matches!(result, Err(Error::Cancelled)));
    assert_eq!(rounds, 3);
}

#[test]
fn no_requests_are_no_episodes() {
    let decoder = common::tiny(Family::Llama, Precision::F32);
    assert!(generate(&decoder, &SamplingOptions::default(), 4, &[]).is_empty());
}

#[test]
fn requests_that_cannot_be_served_are_named() {
    let decoder = common::tiny(Family::Llama, Precision::F32);
    let options = SamplingOptions { max_new_tokens: 100, ..SamplingOptions::default() };
    let refuse = |broken: Request| {
        let requests = [Request { prompt_id: 7, sample: 0, prompt: [1].into(), prefix: vec![] }, broken];
        let tokenizer = Tokenizer::bytes().unwrap();
        let error =
            Generator::new(&options, 4, sampling()).generate(&decoder, &tokenizer, &requests, |_| {}).unwrap_err();
        (error.to_string(), error.hint())
    };
    let request = |prompt: &[u32]| Request { prompt_id: 8, sample: 2, prompt: prompt.into(), prefix: vec![] };
    let (message, hint) = refuse(request(&[5; 450]));
    assert_eq!(
        message,
        "request 1 (prompt 8, sample 2): a prompt of 450 tokens and max_new_tokens = 100 exceed the model's context of 512 tokens"
    );
    assert!(hint.unwrap().contains("lower max_new_tokens"));
    assert!(refuse(request(&[])).0.ends_with("the prompt has no tokens"));
    assert!(refuse(request(&[1, 259])).0.ends_with("token 259 is not below the vocabulary size 259"));
    let (message, _) = refuse(Request { prefix: vec![1; 101], ..request(&[1]) });
    assert!(message.ends_with("101 forced tokens are more than max_new_tokens, 100"), "{message}");
    let (message, _) = refuse(Request { prompt_id: 7, sample: 0, ..request(&[1]) });
    assert!(message.contains("request 0 has the same prompt and sample number"), "{message}");
}

/// A diverged model is reported by the engine or here, never sampled from.
#[test]
fn logits_that_are_no_numbers_stop_the_generation() {
    struct Broken;
    impl LogitsHook for Broken {
        fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>) {
            logits[17] = if context.completion.len() == 2 { f32::NAN } else { 0.0 };
        }
    }
    let decoder = common::tiny(Family::Llama, Precision::F32);
    let options = SamplingOptions { min_new_tokens: 5, ..SamplingOptions::default() };
    let generator = Generator { hook: Some(&Broken), ..Generator::new(&options, 4, sampling()) };
    let requests: Vec<Request> = Request::samples(4, &common::prompts(1)[0], 1).collect();
    let error = generator.generate(&decoder, &Tokenizer::bytes().unwrap(), &requests, |_| {}).unwrap_err();
    assert_eq!(error.to_string(), "prompt 4, sample 0, token 2: the logit of token 17 is not a number");
}

#[test]
fn a_decoder_that_is_not_prepared_is_refused() {
    let decoder = Decoder::random(model::ModelConfig::tiny(Family::Llama, common::VOCABULARY), 1).unwrap();
    let requests: Vec<Request> = Request::samples(0, &common::prompts(1)[0], 1).collect();
    let options = SamplingOptions::default();
    let result =
        Generator::new(&options, 4, sampling()).generate(&decoder, &Tokenizer::bytes().unwrap(), &requests, |_| {});
    assert!(matches!(result, Err(Error::Model(_))));
}
