//! One row of logits: filters against Hugging Face and against a naive version, frequencies against probabilities.

use base::{Purpose, Random};
use posttrain_rollout::SamplingOptions;
use posttrain_rollout::sampling::{NoChoice, Scratch};
use proptest::prelude::*;
use serde_json::Value;

/// The distribution that is drawn from, in f64, by sorting everything; and how close any token came to a boundary.
fn naive(logits: &[f32], options: &SamplingOptions) -> (Vec<f64>, f64) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights: Vec<f64> =
        logits.iter().map(|&logit| ((f64::from(logit) - f64::from(max)) / options.temperature).exp()).collect();
    let mut margin = f64::INFINITY;
    if (1..logits.len()).contains(&options.top_k) {
        let mut sorted = logits.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        for (weight, &logit) in weights.iter_mut().zip(logits) {
            *weight *= f64::from(u8::from(logit >= sorted[options.top_k - 1]));
        }
    }
    if options.top_p < 1.0 {
        let total: f64 = weights.iter().sum();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
        let mut before = 0.0;
        for id in order {
            let weight = weights[id];
            margin = margin.min((before / total - options.top_p).abs());
            if before / total >= options.top_p {
                weights[id] = 0.0;
            }
            before += weight;
        }
    }
    if options.min_p > 0.0 {
        for weight in &mut weights {
            margin = margin.min((*weight - options.min_p).abs());
            *weight *= f64::from(u8::from(*weight >= options.min_p));
        }
    }
    let total: f64 = weights.iter().sum();
    (weights.into_iter().map(|weight| weight / total).collect(), margin)
}

/// Aims at the middle of every token's interval of the cumulative distribution.
fn assert_draws_from(logits: &[f32], options: &SamplingOptions, probabilities: &[f64]) {
    let mut scratch = Scratch::default();
    let mut before = 0.0;
    for (id, &probability) in probabilities.iter().enumerate() {
        if probability > 1e-6 {
            let choice = scratch.choose(logits, options, before + probability / 2.0).unwrap();
            assert_eq!(choice.token as usize, id, "{options:?}");
            let log_prob = choice.filtered_log_prob;
            assert!((f64::from(log_prob) - probability.ln()).abs() < 1e-5, "{options:?}: token {id}, {log_prob}");
        }
        before += probability;
    }
}

#[test]
fn filters_agree_with_hugging_face() {
    let reference: Value = serde_json::from_str(include_str!("../../../tests/reference/hf_filters.json")).unwrap();
    for case in reference["cases"].as_array().unwrap() {
        let numbers =
            |key: &str| -> Vec<f64> { case[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect() };
        let logits: Vec<f32> = numbers("logits").iter().map(|&x| x as f32).collect();
        let options = SamplingOptions {
            temperature: case["temperature"].as_f64().unwrap(),
            top_k: case["top_k"].as_u64().unwrap() as usize,
            top_p: case["top_p"].as_f64().unwrap(),
            min_p: case["min_p"].as_f64().unwrap(),
            ..SamplingOptions::default()
        };
        assert_draws_from(&logits, &options, &numbers("probabilities"));
    }
}

fn any_options() -> impl Strategy<Value = SamplingOptions> {
    let top_p = prop_oneof![Just(1.0), 0.01..1.0f64];
    let min_p = prop_oneof![Just(0.0), 0.001..1.0f64];
    (0.2..3.0f64, 0usize..30, top_p, min_p).prop_map(|(temperature, top_k, top_p, min_p)| SamplingOptions {
        temperature,
        top_k,
        top_p,
        min_p,
        ..SamplingOptions::default()
    })
}

/// Logits in steps of a half, so that many are equal, or without steps; more than one block of the sampler long.
fn any_logits() -> impl Strategy<Value = Vec<f32>> {
    (prop::collection::vec(-8.0..8.0f32, 1..150), any::<bool>()).prop_map(|(logits, steps)| match steps {
        true => logits.into_iter().map(|logit| (2.0 * logit).round() / 2.0).collect(),
        false => logits,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn filters_agree_with_the_naive_version(logits in any_logits(), options in any_options()) {
        let (probabilities, margin) = naive(&logits, &options);
        // The sampler's weights are f32: what lies that close to a boundary may fall on either side.
        prop_assume!(margin > 1e-5);
        assert_draws_from(&logits, &options, &probabilities);
    }

    #[test]
    fn a_draw_is_always_a_token_of_the_distribution(
        logits in any_logits(), options in any_options(), uniform in prop_oneof![Just(0.0), Just(1.0 - f64::EPSILON / 2.0), 0.0..1.0f64],
    ) {
        let token = Scratch::default().choose(&logits, &options, uniform).unwrap().token as usize;
        let (probabilities, margin) = naive(&logits, &options);
        prop_assume!(margin > 1e-5);
        prop_assert!(probabilities[token] > 0.0);
    }
}

/// Pearson's statistic of 50,000 draws. Its 99.9th percentile with 11 degrees of freedom is 31.3; the seed is fixed.
#[test]
fn frequencies_follow_the_softmax() {
    let logits: Vec<f32> = (0..12).map(|i| 2.0 * (12.9898 * i as f32).sin()).collect();
    for (temperature, top_k, top_p) in [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.5, 6, 1.0), (1.0, 0, 0.8)] {
        let options = SamplingOptions { temperature, top_k, top_p, ..SamplingOptions::default() };
        let (probabilities, _) = naive(&logits, &options);
        let random = Random::new(5, Purpose::Test);
        let mut scratch = Scratch::default();
        let draws = 50_000;
        let mut counts = vec![0.0; logits.len()];
        for i in 0..draws {
            counts[scratch.choose(&logits, &options, random.at(i).uniform()).unwrap().token as usize] += 1.0;
        }
        let statistic: f64 = counts
            .iter()
            .zip(&probabilities)
            .filter(|(_, probability)| **probability > 0.0)
            .map(|(count, probability)| {
                let expected = probability * f64::from(draws);
                (count - expected) * (count - expected) / expected
            })
            .sum();
        assert!(statistic < 31.3, "{options:?}: {statistic}, {counts:?}");
        let outside = counts.iter().zip(&probabilities).any(|(count, probability)| *count > 0.0 && *probability == 0.0);
        assert!(!outside, "{options:?}: {counts:?}");
    }
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    let options = SamplingOptions::greedy(1);
    let mut logits = vec![-1.0; 200];
    (logits[70], logits[130]) = (3.0, 3.0);
    let choice = Scratch::default().choose(&logits, &options, 0.999).unwrap();
    assert_eq!((choice.token, choice.filtered_log_prob), (70, 0.0));
}

#[test]
fn banned_tokens_are_never_drawn() {
    let mut logits = vec![f32::NEG_INFINITY; 100];
    logits[42] = -1e4;
    for options in [
        SamplingOptions::default(),
        SamplingOptions::greedy(1),
        SamplingOptions { top_k: 10, top_p: 0.5, min_p: 0.1, ..SamplingOptions::default() },
    ] {
        for uniform in [0.0, 0.5, 1.0 - f64::EPSILON / 2.0] {
            assert_eq!(Scratch::default().choose(&logits, &options, uniform).unwrap().token, 42);
        }
    }
}

#[test]
fn rows_without_a_distribution_are_refused() {
    for options in [
        SamplingOptions::default(),
        SamplingOptions::greedy(1),
        SamplingOptions { top_k: 2, ..SamplingOptions::default() },
    ] {
        let choose = |logits: &[f32]| Scratch::default().choose(logits, &options, 0.5).unwrap_err();
        assert_eq!(choose(&[0.0, f32::NAN, 1.0]), NoChoice::NotANumber(1), "{options:?}");
        assert_eq!(choose(&[0.0, 1.0, f32::INFINITY]), NoChoice::NotANumber(2), "{options:?}");
        assert_eq!(choose(&[f32::NEG_INFINITY; 3]), NoChoice::NothingAllowed, "{options:?}");
    }
}

#[test]
fn top_log_probs_fall_and_are_those_of_the_kernel() {
    let logits: Vec<f32> = (0..300).map(|i| 3.0 * (78.233 * i as f32).sin()).collect();
    let top = Scratch::default().top_log_probs(&logits, 0.5, 20);
    assert_eq!(top.len(), 20);
    assert!(top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
    let least = top[19].1;
    for (id, _) in logits.iter().enumerate() {
        let log_prob = kernels::log_softmax_row(&logits, 0.5, id).log_prob;
        match top.iter().find(|(token, _)| *token as usize == id) {
            Some((_, recorded)) => assert_eq!(recorded.to_bits(), log_prob.to_bits()),
            None => assert!(log_prob <= least),
        }
    }
    assert!(Scratch::default().top_log_probs(&logits, 0.5, 0).is_empty());
}

#[test]
fn options_outside_their_range_are_named() {
    let default = SamplingOptions::default;
    for (options, message) in [
        (
            SamplingOptions { temperature: -1.0, ..default() },
            "temperature is -1, expected 0 (greedy) or a number from 1e-6",
        ),
        (
            SamplingOptions { temperature: f64::NAN, ..default() },
            "temperature is NaN, expected 0 (greedy) or a number from 1e-6",
        ),
        (SamplingOptions { top_p: 0.0, ..default() }, "top_p is 0, expected a number above 0 and at most 1"),
        (SamplingOptions { min_p: 1.5, ..default() }, "min_p is 1.5, expected a number from 0 to 1"),
        (SamplingOptions { max_new_tokens: 0, ..default() }, "max_new_tokens is 0, expected at least 1"),
        (
            SamplingOptions { min_new_tokens: 300, ..default() },
            "min_new_tokens is 300, expected at most max_new_tokens",
        ),
        (
            SamplingOptions { stop: vec![String::new()], ..default() },
            "stop is an empty string, expected strings of at least one character",
        ),
    ] {
        assert_eq!(options.validate().unwrap_err().to_string(), message);
    }
    default().validate().unwrap();
    assert!(toml_error("temprature = 1.0").contains("temprature"));
}

fn toml_error(text: &str) -> String {
    let (key, value) = text.split_once(" = ").unwrap();
    let json = format!("{{\"{key}\": {value}}}");
    serde_json::from_str::<SamplingOptions>(&json).unwrap_err().to_string()
}
