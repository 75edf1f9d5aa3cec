//! The objectives against TRL: values and gradients that `tests/reference/trl_losses.py` obtained from it.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

use candle_core::{Device, Var};
use objectives::{Advantage, Aggregation, Fold, GlobalCounts, GrpoOptions, Loss, PolicyBatch, SftBatch};
use posttrain_objectives as objectives;
use serde_json::Value;

fn reference() -> Value {
    serde_json::from_str(include_str!("../../../tests/reference/trl_losses.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn variable(values: &[f64]) -> Var {
    Var::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

fn lengths(case: &Value) -> Vec<usize> {
    numbers(&case["lengths"]).iter().map(|&n| n as usize).collect()
}

/// Each sequence's value, repeated for its tokens.
fn spread<T: Copy>(values: &[T], lengths: &[usize]) -> Vec<T> {
    values.iter().zip(lengths).flat_map(|(&value, &n)| std::iter::repeat_n(value, n)).collect()
}

fn close(got: f64, expected: f64, tolerance: f64, what: &str) {
    assert!((got - expected).abs() <= tolerance * (1.0 + expected.abs()), "{what}: {got}, TRL has {expected}");
}

fn metric(loss: &Loss, name: &str) -> f64 {
    let statistic = loss.statistics.iter().find(|statistic| statistic.name == name).unwrap();
    let mut fold = Fold::new(statistic.reduce);
    fold.extend(&statistic.values);
    fold.value().unwrap()
}

#[test]
fn grpo_agrees_with_trl() {
    let reference = reference();
    let cases = reference["grpo"].as_array().unwrap();
    assert_eq!(cases.len(), 15);
    let corrected = cases.iter().filter(|case| case["sampling_log_probs"].is_array());
    assert_eq!(corrected.count(), 6);
    for case in cases {
        let name = format!("{} beta {}", case["loss_type"], case["beta"]);
        let lengths = lengths(case);
        let aggregation = match case["loss_type"].as_str().unwrap() {
            "dapo" => Aggregation::Token,
            "grpo" => Aggregation::Sequence,
            _ => Aggregation::Constant,
        };
        let options = GrpoOptions {
            aggregation,
            epsilon: case["epsilon"].as_f64().unwrap(),
            epsilon_high: case["epsilon_high"].as_f64(),
            beta: case["beta"].as_f64().unwrap(),
            ..GrpoOptions::default()
        };
        let counts = GlobalCounts::of(&lengths, case["max_completion_length"].as_u64().unwrap() as usize);
        let log_probs = variable(&numbers(&case["log_probs"]));
        let loss = objectives::grpo(
            &options,
            &PolicyBatch {
                log_probs: log_probs.as_tensor().clone(),
                old_log_probs: variable(&numbers(&case["old_log_probs"])).as_tensor().clone(),
                sampling_log_probs: case["sampling_log_probs"]
                    .is_array()
                    .then(|| variable(&numbers(&case["sampling_log_probs"])).as_tensor().clone()),
                reference_log_probs: Some(variable(&numbers(&case["reference_log_probs"])).as_tensor().clone()),
                entropy: Some(variable(&numbers(&case["entropy"])).as_tensor().clone()),
                advantages: variable(&spread(&numbers(&case["advantages"]), &lengths)).as_tensor().clone(),
                weights: variable(&aggregation.weights(&lengths, &counts)).as_tensor().clone(),
                sequence: spread(&[0, 1, 2, 3], &lengths),
            },
        )
        .unwrap();
        close(loss.values().unwrap().iter().sum(), case["loss"].as_f64().unwrap(), 1e-12, &name);
        let gradient = loss.gradient(log_probs.as_tensor()).unwrap();
        for (got, expected) in gradient.iter().zip(numbers(&case["gradient"])) {
            close(*got, expected, 1e-12, &format!("{name} gradient"));
        }
        if case["sampling_log_probs"].is_array() {
            let ratios = numbers(&case["ratio"]);
            assert!(ratios.contains(&2.0), "the bound acts");
            let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
            let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
            for (kind, expected) in [("min", least), ("mean", mean), ("max", 2.0)] {
                let name = format!("sampling/importance_sampling_ratio/{kind}");
                close(metric(&loss, &name), expected, 1e-12, &name);
            }
        }
        for (key, expected) in case["metrics"].as_object().unwrap() {
            // TRL counts clipped tokens in f32.
            close(metric(&loss, key), expected.as_f64().unwrap(), 1e-6, &format!("{name} {key}"));
        }
    }
}

#[test]
fn advantages_agree_with_trl() {
    for case in reference()["advantages"].as_array().unwrap() {
        let rewards: Vec<Option<f64>> = case["rewards"].as_array().unwrap().iter().map(Value::as_f64).collect();
        let group = case["group"].as_u64().unwrap() as usize;
        for (name, advantage) in [
            ("group_mean_std", Advantage::GroupMeanStd),
            ("group_mean", Advantage::GroupMean),
            ("batch", Advantage::Batch),
            ("leave_one_out", Advantage::LeaveOneOut),
        ] {
            let got = advantage.of(&rewards, &vec![group; rewards.len() / group]).unwrap();
            for (got, expected) in got.values.iter().zip(numbers(&case[name])) {
                close(*got, expected, 1e-13, name);
            }
        }
    }
}

#[test]
fn sft_agrees_with_transformers() {
    let case = &reference()["sft"];
    let lengths = lengths(case);
    let counts =
        GlobalCounts { sequences: 5, tokens: case["items"].as_u64().unwrap() as usize, max_completion_tokens: 8 };
    let correct: Vec<bool> = case["correct"].as_array().unwrap().iter().map(|x| x.as_bool().unwrap()).collect();
    assert!(correct.contains(&true) && correct.contains(&false));
    let weights = Aggregation::Token.weights(&lengths, &counts);
    let log_probs = variable(&numbers(&case["log_probs"]));
    let loss = objectives::sft(&SftBatch {
        log_probs: log_probs.as_tensor().clone(),
        weights: variable(&weights).as_tensor().clone(),
        entropy: Some(variable(&numbers(&case["entropy"])).as_tensor().clone()),
        correct: Some(correct.clone()),
    })
    .unwrap();
    // transformers computes this loss in f32.
    close(loss.values().unwrap().iter().sum(), case["loss"].as_f64().unwrap(), 1e-7, "sft");
    let negated: Vec<f64> = weights.iter().map(|weight| -weight).collect();
    assert_eq!(loss.gradient(log_probs.as_tensor()).unwrap(), negated);
    let accuracy = correct.iter().filter(|&&correct| correct).count() as f64 / correct.len() as f64;
    assert_eq!(metric(&loss, "mean_token_accuracy"), accuracy);
}
