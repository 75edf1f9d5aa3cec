//! Sampling from a mixture of two models.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod common;

use base::{Purpose, Random};
use kernels::Precision;
use model::Family;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use posttrain_rollout::{Episode, Generator, Mean, Mixture, Request, SamplingOptions};

const MEANS: [Mean; 2] = [Mean::Geometric, Mean::Arithmetic];

/// Two models with opinions of their own.
fn models() -> (Decoder, Decoder) {
    let own = common::tiny(Family::Llama, Precision::F32);
    let mut other = common::tiny(Family::Llama, Precision::F32);
    for index in 0..other.parameters().len() {
        other.parameter_mut(index).reverse();
    }
    other.prepare(Precision::F32);
    (own, other)
}

fn sampled(
    own: &Decoder,
    mixed: Option<(&Decoder, Mean, f64)>,
    options: &SamplingOptions,
    batch_size: usize,
    requests: &[Request],
) -> Vec<Episode> {
    let mixture = mixed.map(|(other, mean, share)| Mixture::new(other, mean, share, options));
    let generator = Generator::new(options, batch_size, Random::new(5, Purpose::Sampling));
    let generator = Generator { hook: mixture.as_ref().map(|mixture| mixture as _), ..generator };
    generator.generate(own, &Tokenizer::bytes().unwrap(), requests, |_| {}).unwrap()
}

/// At its ends a mixture is one of the models: the tokens are those that the model alone would sample.
#[test]
fn a_mixture_ends_at_the_two_models() {
    let (own, other) = models();
    let options = SamplingOptions { temperature: 0.8, max_new_tokens: 20, ..SamplingOptions::default() };
    let requests = common::requests(3, 3);
    let tokens = |episodes: Vec<Episode>| episodes.into_iter().map(|episode| episode.completion).collect::<Vec<_>>();
    let of = |decoder: &Decoder| tokens(sampled(decoder, None, &options, 4, &requests));
    assert_ne!(of(&own), of(&other));
    for mean in MEANS {
        let with = |share: f64| tokens(sampled(&own, Some((&other, mean, share)), &options, 4, &requests));
        assert_eq!(with(0.0), of(&own), "{mean:?}");
        assert_eq!(with(1.0), of(&other), "{mean:?}");
    }
}

/// What tokens are drawn with is what the two models' own log-probabilities make of it; `log_probs` stay those of the first.
#[test]
fn tokens_are_drawn_from_the_mean() {
    let (own, other) = models();
    let options = SamplingOptions { temperature: 0.7, max_new_tokens: 12, ..SamplingOptions::default() };
    let share = 0.3;
    for mean in MEANS {
        let episodes = sampled(&own, Some((&other, mean, share)), &options, 4, &common::requests(3, 3));
        let first = common::trainer_log_probs(&own, &episodes, 0.7, false);
        let second = common::trainer_log_probs(&other, &episodes, 0.7, false);
        for ((episode, first), second) in episodes.iter().zip(&first).zip(&second) {
            assert_eq!(common::bits(&episode.log_probs), common::bits(first));
            let drawn = (0..episode.completion.len()).filter(|&at| episode.loss_mask[at]);
            for at in drawn {
                let (p, q) = (f64::from(first[at]), f64::from(second[at]));
                let found = f64::from(episode.filtered_log_probs[at]);
                match mean {
                    Mean::Arithmetic => {
                        let expected = ((1.0 - share) * p.exp() + share * q.exp()).ln();
                        assert!((found - expected).abs() < 1e-4, "{found}, expected {expected}");
                    }
                    // By Hölder's inequality its normaliser is at most 1.
                    Mean::Geometric => assert!(found > (1.0 - share) * p + share * q - 1e-4),
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    let (own, other) = models();
    let options = SamplingOptions { max_new_tokens: 90, ..SamplingOptions::default() };
    let requests = common::requests(4, 4);
    for mean in MEANS {
        let run = |batch_size| sampled(&own, Some((&other, mean, 0.5)), &options, batch_size, &requests);
        let expected = run(1);
        for batch_size in [3, 64] {
            assert_eq!(run(batch_size), expected, "{mean:?}, batch {batch_size}");
        }
    }
}
