//! Sampling from a mixture of models.

use base::{Purpose, Random};
use kernels::Precision;
use model::Family;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use posttrain_rollout::mixture::resample;
use posttrain_rollout::{
    Episode, Generator, LogitsContext, LogitsHook, Mean, Mixture, Request, SamplingOptions, scoring,
};

use crate::common;

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
    let mixture = mixed.map(|(other, mean, share)| Mixture::new(&[(other, share)], mean, options));
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

/// A third model.
fn third() -> Decoder {
    let mut third = common::tiny(Family::Llama, Precision::F32);
    for index in 0..third.parameters().len() {
        third.parameter_mut(index).rotate_left(7);
    }
    third.prepare(Precision::F32);
    third
}

/// What the models say of the first token, and the mean by the formula, in the order of the shares.
#[test]
fn three_models_are_mixed_by_the_formula() {
    let (own, second) = models();
    let third = third();
    let options = SamplingOptions::default();
    let shares = [0.5, 0.3, 0.2];
    let request = &common::requests(1, 1)[0];
    let logits_of = |decoder: &Decoder| {
        let hook = Mixture::new(&[(decoder, 1.0)], Mean::Geometric, &options);
        let context = LogitsContext { request, completion: &[], banned: &[] };
        let mut logits = vec![0.0; common::VOCABULARY];
        hook.prepare(&[(context, &logits)]).unwrap();
        hook.apply(&mut logits, &context);
        logits
    };
    let of_models = [logits_of(&own), logits_of(&second), logits_of(&third)];
    let probabilities = of_models.clone().map(|logits| {
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        logits.into_iter().map(|logit| f64::from(logit).exp() / total).collect::<Vec<f64>>()
    });
    for mean in MEANS {
        let hook = Mixture::new(&[(&second, shares[1]), (&third, shares[2])], mean, &options);
        let context = LogitsContext { request, completion: &[], banned: &[] };
        let mut mixed = of_models[0].clone();
        hook.prepare(&[(context, &mixed)]).unwrap();
        hook.apply(&mut mixed, &context);
        for (token, &logit) in mixed.iter().enumerate() {
            let expected = match mean {
                Mean::Geometric => (0..3).map(|k| shares[k] * f64::from(of_models[k][token])).sum::<f64>(),
                Mean::Arithmetic => (0..3).map(|k| shares[k] * probabilities[k][token]).sum::<f64>().ln(),
            };
            assert!((f64::from(logit) - expected).abs() < 1e-5 * (1.0 + expected.abs()), "{mean:?}");
        }
    }
}

#[test]
fn bits_of_three_models_do_not_depend_on_the_batch() {
    let (own, second) = models();
    let third = third();
    let options = SamplingOptions { max_new_tokens: 40, ..SamplingOptions::default() };
    let requests = common::requests(3, 3);
    let run = |batch_size| {
        let mixture = Mixture::new(&[(&second, 0.4), (&third, 0.3)], Mean::Geometric, &options);
        let generator = Generator::new(&options, batch_size, Random::new(5, Purpose::Sampling));
        let generator = Generator { hook: Some(&mixture), ..generator };
        generator.generate(&own, &Tokenizer::bytes().unwrap(), &requests, |_| {}).unwrap()
    };
    let expected = run(1);
    assert_eq!(run(2), expected);
    assert_eq!(run(64), expected);
}

#[test]
fn log_probs_of_completions_are_those_of_sampling() {
    let (own, other) = models();
    let options = SamplingOptions { temperature: 0.7, max_new_tokens: 12, ..SamplingOptions::default() };
    let episodes = sampled(&own, None, &options, 4, &common::requests(3, 3));
    let drawn = |episode: &Episode, values: &[f32]| -> f64 {
        values.iter().zip(&episode.loss_mask).filter(|(_, drawn)| **drawn).map(|(value, _)| f64::from(*value)).sum()
    };
    let expected: Vec<f64> = episodes.iter().map(|episode| drawn(episode, &episode.log_probs)).collect();
    assert_eq!(scoring::log_probs(&own, &episodes, 0.7).unwrap(), expected);
    let theirs = common::trainer_log_probs(&other, &episodes, 0.7, false);
    let expected: Vec<f64> = episodes.iter().zip(&theirs).map(|(episode, values)| drawn(episode, values)).collect();
    assert_eq!(scoring::log_probs(&other, &episodes, 0.7).unwrap(), expected);
}

#[test]
fn candidates_are_chosen_by_their_weight() {
    let log_weights = [0.25f64.ln(), 0.5f64.ln(), 0.25f64.ln()];
    let chosen = [0.0, 0.2, 0.3, 0.7, 0.8, 0.999].map(|uniform| resample(&log_weights, uniform).chosen);
    assert_eq!(chosen, [0, 0, 1, 1, 2, 2]);
    assert!((resample(&[-3.0; 5], 0.5).effective - 5.0).abs() < 1e-12);
    assert!((resample(&[0.0, -900.0], 0.999).effective - 1.0).abs() < 1e-12);
    assert_eq!(resample(&[f64::NEG_INFINITY, 2.0], 0.0).chosen, 1);
}

/// A mixture whose every candidate comes from one model needs no correction: all weights are equal.
#[test]
fn a_single_model_is_its_own_law() {
    let (own, other) = models();
    let options = SamplingOptions { max_new_tokens: 30, ..SamplingOptions::default() };
    let candidates = sampled(&own, Some((&other, Mean::Geometric, 0.0)), &options, 4, &common::requests(2, 6));
    let mixture = Mixture::new(&[(&other, 0.0)], Mean::Geometric, &options);
    let resampled = mixture.resample(&candidates, 3, Random::new(9, Purpose::Resampling)).unwrap();
    assert_eq!(resampled.len(), 4);
    assert!(resampled.iter().all(|one| (one.effective - 3.0).abs() < 1e-3));
}
