//! The objectives against TRL, whose values and gradients `tests/reference/trl_losses.py` wrote down; and where TRL has nothing,
//! against the formulas of the papers, token by token, in `tests/reference/policy_losses.py`.

use candle_core::{Device, Var};
use objectives::{
    Aggregation, Baseline, Estimator, Fold, GlobalCounts, Loss, PolicyBatch, PolicyOptions, Rewards, ScaleRewards,
    SftBatch, ValueBatch,
};
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
    assert!((got - expected).abs() <= tolerance * (1.0 + expected.abs()), "{what}: {got}, expected {expected}");
}

fn metric(loss: &Loss, name: &str) -> f64 {
    let statistic = loss.statistics.iter().find(|statistic| statistic.name == name);
    let statistic = statistic.unwrap_or_else(|| panic!("there is no metric {name}"));
    let mut fold = Fold::new(statistic.reduce);
    fold.extend(&statistic.values);
    fold.value().unwrap()
}

/// The objective of a case on its numbers, where the tokens of all cases are named alike.
fn policy(options: &PolicyOptions, case: &Value) -> (Loss, Vec<f64>) {
    let lengths = lengths(case);
    let longest = case["max_completion_length"].as_u64().unwrap_or(8) as usize;
    let counts = GlobalCounts::of(&lengths, longest);
    let log_probs = variable(&numbers(&case["log_probs"]));
    let constant = |name: &str| case[name].is_array().then(|| variable(&numbers(&case[name])).as_tensor().clone());
    let entropy = case["entropy"].is_array().then(|| variable(&numbers(&case["entropy"])));
    let batch = PolicyBatch {
        log_probs: log_probs.as_tensor().clone(),
        old_log_probs: constant("old_log_probs").unwrap(),
        sampling_log_probs: constant("sampling_log_probs"),
        reference_log_probs: constant("reference_log_probs"),
        entropy: entropy.as_ref().map(|entropy| entropy.as_tensor().clone()),
        advantages: variable(&spread(&numbers(&case["advantages"]), &lengths)).as_tensor().clone(),
        weights: variable(&options.aggregation.weights(&lengths, &counts)).as_tensor().clone(),
        sequence: spread(&[0, 1, 2, 3], &lengths),
        tokens: lengths.iter().sum(),
        draws: case["draws"].is_array().then(|| numbers(&case["draws"])),
    };
    options.validate().unwrap();
    let loss = objectives::policy(options, &batch).unwrap();
    let gradient = loss.gradient(log_probs.as_tensor()).unwrap();
    if let (Some(entropy), true) = (entropy, case["entropy_gradient"].is_array()) {
        let found = loss.gradient(entropy.as_tensor()).unwrap();
        for (got, expected) in found.iter().zip(numbers(&case["entropy_gradient"])) {
            close(*got, expected, 1e-12, "gradient of the entropy");
        }
    }
    (loss, gradient)
}

/// Checks loss, gradient and metrics of a case against what it holds.
fn check(name: &str, options: &PolicyOptions, case: &Value) -> Loss {
    let (loss, gradient) = policy(options, case);
    close(loss.values().unwrap().iter().sum(), case["loss"].as_f64().unwrap(), 1e-12, name);
    for (got, expected) in gradient.iter().zip(numbers(&case["gradient"])) {
        close(*got, expected, 1e-12, &format!("{name} gradient"));
    }
    // The entropy is a property of the model's distributions: whoever runs the model logs it, and what follows from it.
    let elsewhere = ["entropy", "entropy_coef", "policy_loss"];
    let metrics = case["metrics"].as_object().into_iter().flatten();
    let metrics = metrics.filter(|(key, _)| !elsewhere.contains(&key.as_str()));
    for (key, expected) in metrics {
        // TRL counts clipped tokens in f32.
        close(metric(&loss, key), expected.as_f64().unwrap(), 1e-6, &format!("{name} {key}"));
    }
    loss
}

#[test]
fn grpo_agrees_with_trl() {
    let reference = reference();
    let cases = reference["grpo"].as_array().unwrap();
    assert_eq!(cases.len(), 15);
    let corrected = cases.iter().filter(|case| case["sampling_log_probs"].is_array());
    assert_eq!(corrected.count(), 6);
    for case in cases {
        let aggregation = match case["loss_type"].as_str().unwrap() {
            "dapo" => Aggregation::Token,
            "grpo" => Aggregation::Sequence,
            _ => Aggregation::Constant,
        };
        let options = PolicyOptions {
            aggregation,
            epsilon: case["epsilon"].as_f64().unwrap(),
            epsilon_high: case["epsilon_high"].as_f64(),
            beta: case["beta"].as_f64().unwrap(),
            ..PolicyOptions::default()
        };
        let loss = check(&format!("{} beta {}", case["loss_type"], case["beta"]), &options, case);
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
    }
}

#[test]
fn every_other_loss_agrees_with_trl() {
    let reference = reference();
    let cases = reference["policy"].as_array().unwrap();
    assert_eq!(cases.len(), 28);
    for case in cases {
        let options: PolicyOptions = serde_json::from_value(case["options"].clone()).unwrap();
        check(&case["options"].to_string(), &options, case);
    }
}

fn formulas() -> Value {
    serde_json::from_str(include_str!("../../../tests/reference/policy_losses.json")).unwrap()
}

#[test]
fn losses_that_trl_lacks_agree_with_their_formulas() {
    let reference = formulas();
    let cases = reference["losses"].as_array().unwrap();
    assert_eq!(cases.len(), 17);
    for case in cases {
        let options: PolicyOptions = serde_json::from_value(case["options"].clone()).unwrap();
        check(&case["options"].to_string(), &options, case);
    }
}

#[test]
fn advantages_of_tokens_agree_with_their_formulas() {
    let reference = formulas();
    let step = &reference["step"];
    let scores: Vec<Option<f64>> = numbers(&step["scores"]).into_iter().map(Some).collect();
    let groups: Vec<usize> = numbers(&step["groups"]).iter().map(|&n| n as usize).collect();
    let (lengths, penalties) = (lengths(step), numbers(&step["penalties"]));
    let (values, greedy) = (numbers(&step["values"]), numbers(&step["greedy"]));
    let rewards = Rewards {
        scores: &scores,
        groups: &groups,
        lengths: &lengths,
        token_rewards: Some(&penalties),
        greedy: Some(&greedy),
        values: Some(&values),
        turns: None,
        spans: None,
    };
    let cases = reference["advantages"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let options: PolicyOptions = serde_json::from_value(case["options"].clone()).unwrap();
        let found = options.estimator().advantages(&rewards).unwrap();
        let expected = numbers(&case["tokens"]);
        assert_eq!(found.tokens.len(), expected.len());
        for (got, expected) in found.tokens.iter().zip(expected) {
            close(*got, expected, 1e-12, &case["options"].to_string());
        }
        let returns = if case["returns"].is_array() { numbers(&case["returns"]) } else { Vec::new() };
        assert_eq!(found.returns.len(), returns.len());
        for (got, expected) in found.returns.iter().zip(returns) {
            close(*got, expected, 1e-12, &case["options"].to_string());
        }
    }
}

#[test]
fn the_value_loss_agrees_with_its_formula() {
    for case in formulas()["values"].as_array().unwrap() {
        let new = variable(&numbers(&case["values"]));
        let tokens = new.as_tensor().elem_count();
        let loss = objectives::value(
            case["clip"].as_f64(),
            &ValueBatch {
                values: new.as_tensor().clone(),
                old_values: variable(&numbers(&case["old_values"])).as_tensor().clone(),
                returns: variable(&numbers(&case["returns"])).as_tensor().clone(),
                weights: variable(&vec![1.0 / tokens as f64; tokens]).as_tensor().clone(),
            },
        )
        .unwrap();
        close(loss.values().unwrap().iter().sum(), case["loss"].as_f64().unwrap(), 1e-13, "loss");
        for (got, expected) in loss.gradient(new.as_tensor()).unwrap().iter().zip(numbers(&case["gradient"])) {
            close(*got, expected, 1e-13, "gradient");
        }
        close(metric(&loss, "val/clipfrac_avg"), case["held"].as_f64().unwrap(), 1e-15, "held");
    }
}

#[test]
fn advantages_agree_with_trl() {
    for case in reference()["advantages"].as_array().unwrap() {
        let scores: Vec<Option<f64>> = case["rewards"].as_array().unwrap().iter().map(Value::as_f64).collect();
        let group = case["group"].as_u64().unwrap() as usize;
        let groups = vec![group; scores.len() / group];
        let lengths = vec![1; scores.len()];
        for (name, baseline, scale) in [
            ("group_mean_std", Baseline::GroupMean, ScaleRewards::Group),
            ("group_mean", Baseline::GroupMean, ScaleRewards::None),
            ("batch", Baseline::GroupMean, ScaleRewards::Batch),
            ("leave_one_out", Baseline::LeaveOneOut, ScaleRewards::None),
        ] {
            let rewards = Rewards { scores: &scores, groups: &groups, lengths: &lengths, ..Rewards::default() };
            let got = Estimator { baseline, scale, ..Estimator::default() }.advantages(&rewards).unwrap();
            assert_eq!(got.sequences, got.tokens);
            for (got, expected) in got.tokens.iter().zip(numbers(&case[name])) {
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
