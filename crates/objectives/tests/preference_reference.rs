//! The preference objectives against TRL: values and gradients that `tests/reference/trl_preference.py` obtained from it.

use candle_core::{Device, Tensor, Var};
use objectives::{
    Fold, Length, Loss, NashMdBatch, PairBatch, PairLoss, PreferenceOptions, RunningMean, Score, UnpairedBaseline,
    UnpairedBatch, UnpairedOptions, Utility,
};
use posttrain_objectives as objectives;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn reference() -> Value {
    serde_json::from_str(include_str!("../../../tests/reference/trl_preference.json")).unwrap()
}

fn get<T: DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

fn tensor(values: &[f64]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

fn close(got: f64, expected: f64, tolerance: f64, what: &str) {
    assert!((got - expected).abs() <= tolerance * (1.0 + expected.abs()), "{what}: {got}, TRL has {expected}");
}

fn all_close(got: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (got, expected) in got.iter().zip(expected) {
        close(*got, *expected, tolerance, what);
    }
}

fn metric(loss: &Loss, name: &str) -> f64 {
    let statistic = loss.statistics.iter().find(|statistic| statistic.name == name);
    let statistic = statistic.unwrap_or_else(|| panic!("{name} is not logged"));
    let mut fold = Fold::new(statistic.reduce);
    fold.extend(&statistic.values);
    fold.value().unwrap()
}

fn check(loss: &Loss, log_probs: &Var, case: &Value, tolerance: f64, what: &str) {
    close(loss.values().unwrap().iter().sum(), get(&case["loss"]), tolerance, what);
    let gradient = loss.gradient(log_probs.as_tensor()).unwrap();
    all_close(&gradient, &get::<Vec<f64>>(&case["gradient"]), tolerance, &format!("{what}: gradient"));
    for (name, expected) in case["metrics"].as_object().into_iter().flatten() {
        // TRL counts in single precision.
        close(metric(loss, name), get(expected), tolerance.max(1e-7), &format!("{what}: {name}"));
    }
}

/// Lengths of the sequences, pair by pair.
fn lengths(reference: &Value, columns: &[&str]) -> Vec<usize> {
    let columns: Vec<Vec<usize>> = columns.iter().map(|column| get(&reference[*column])).collect();
    (0..columns[0].len()).flat_map(|pair| columns.iter().map(move |column| column[pair])).collect()
}

fn sequence(lengths: &[usize]) -> Vec<u32> {
    lengths.iter().zip(0..).flat_map(|(&length, sequence)| std::iter::repeat_n(sequence, length)).collect()
}

/// The batch of a case whose sequences have these lengths, and its log-probs.
fn batch(case: &Value, lengths: &[usize], sequences_per_pair: usize) -> (PairBatch, Var) {
    let pairs = lengths.len() / sequences_per_pair;
    let log_probs = Var::from_tensor(&tensor(&get::<Vec<f64>>(&case["log_probs"]))).unwrap();
    let optional = |name: &str| case[name].is_array().then(|| tensor(&get::<Vec<f64>>(&case[name])));
    let learnt = if sequences_per_pair == 3 { 2 } else { 0 };
    let batch = PairBatch {
        log_probs: log_probs.as_tensor().clone(),
        reference_log_probs: optional("reference_log_probs"),
        sharpened_log_probs: optional("sharpened_log_probs"),
        sequence: sequence(lengths),
        sequences_per_pair,
        weights: tensor(&vec![1.0 / pairs as f64; pairs]),
        sft_tokens: lengths.iter().skip(learnt).step_by(sequences_per_pair).sum(),
        prompts: Vec::new(),
    };
    (batch, log_probs)
}

#[test]
fn dpo_agrees_with_trl() {
    let reference = reference();
    let lengths = lengths(&reference, &["chosen", "rejected"]);
    let cases = reference["dpo"].as_array().unwrap();
    assert_eq!(cases.len(), 33);
    for case in cases {
        let options = PreferenceOptions {
            loss_type: get(&case["loss_type"]),
            loss_weights: get(&case["loss_weights"]),
            beta: get(&case["beta"]),
            label_smoothing: get(&case["label_smoothing"]),
            ld_alpha: get(&case["ld_alpha"]),
            score: get(&case["score"]),
            score_alpha: get(&case["score_alpha"]),
            use_weighting: get(&case["use_weighting"]),
            ..PreferenceOptions::default()
        };
        options.validate().unwrap();
        let (batch, log_probs) = batch(case, &lengths, 2);
        let loss = objectives::preference(&options, &batch).unwrap();
        // TRL's alpha-divergence refuses double precision.
        let tolerance = if get(&case["single_precision"]) { 1e-5 } else { 1e-12 };
        check(&loss, &log_probs, case, tolerance, &format!("{options:?}"));
    }
}

/// TRL weights an `sft` term by WPO; here it is left alone.
#[test]
fn cpo_simpo_and_alphapo_agree_with_trl() {
    let reference = reference();
    let lengths = lengths(&reference, &["chosen", "rejected"]);
    for case in reference["cpo"].as_array().unwrap() {
        let (alpha, sft): (f64, f64) = (get(&case["alpha"]), get(&case["cpo_alpha"]));
        let kind = match case["loss_type"].as_str().unwrap() {
            "hinge" => PairLoss::Hinge,
            "ipo" => PairLoss::Ipo,
            _ => PairLoss::Sigmoid,
        };
        let options = PreferenceOptions {
            loss_type: vec![kind, PairLoss::Sft],
            loss_weights: vec![1.0, sft],
            beta: get(&case["beta"]),
            gamma: get(&case["gamma"]),
            label_smoothing: get(&case["label_smoothing"]),
            reference_free: true,
            length: if get(&case["mean"]) { Length::Mean } else { Length::Sum },
            score: Score::AlphaDivergence,
            score_alpha: 1.0 - alpha,
            ..PreferenceOptions::default()
        };
        options.validate().unwrap();
        let (batch, log_probs) = batch(case, &lengths, 2);
        let loss = objectives::preference(&options, &batch).unwrap();
        check(&loss, &log_probs, case, 1e-12, &format!("{options:?}"));
    }
}

#[test]
fn orpo_agrees_with_trl() {
    let reference = reference();
    let lengths = lengths(&reference, &["chosen", "rejected"]);
    for case in reference["orpo"].as_array().unwrap() {
        let options = PreferenceOptions {
            loss_type: vec![PairLoss::Sigmoid, PairLoss::Sft],
            loss_weights: vec![get(&case["beta"]), 1.0],
            beta: 1.0,
            reference_free: true,
            length: Length::Mean,
            score: Score::LogOdds,
            ..PreferenceOptions::default()
        };
        options.validate().unwrap();
        let (batch, log_probs) = batch(case, &lengths, 2);
        let loss = objectives::preference(&options, &batch).unwrap();
        // TRL computes the odds in single precision.
        check(&loss, &log_probs, case, 1e-6, "orpo");
    }
}

#[test]
fn tpo_agrees_with_trl() {
    let reference = reference();
    let lengths = lengths(&reference, &["chosen", "rejected", "gold"]);
    for case in reference["tpo"].as_array().unwrap() {
        let kind = match case["loss_type"].as_str().unwrap() {
            "hinge" => PairLoss::Hinge,
            "ipo" => PairLoss::Ipo,
            _ => PairLoss::Sigmoid,
        };
        let options = PreferenceOptions {
            loss_type: vec![kind, PairLoss::Sft],
            loss_weights: vec![1.0, get(&case["tpo_alpha"])],
            beta: get(&case["beta"]),
            gamma: get(&case["gamma"]),
            reference_free: true,
            length: if get(&case["mean"]) { Length::Mean } else { Length::Sum },
            ..PreferenceOptions::default()
        };
        let (batch, log_probs) = batch(case, &lengths, 3);
        let loss = objectives::preference(&options, &batch).unwrap();
        check(&loss, &log_probs, case, 1e-12, &format!("{options:?}"));
    }
}

/// The batch of an unpaired case, its log-probs, and the case with a flat gradient and without derived metrics.
fn unpaired_case(case: &Value, running: RunningMean) -> (UnpairedBatch, Var, Value) {
    let rows = |name: &str| -> Vec<Vec<f64>> { case.get(name).map(get).unwrap_or_default() };
    let log_probs = rows("log_probs");
    let good: Vec<bool> = get(&case["labels"]);
    let lengths: Vec<usize> = log_probs.iter().map(Vec::len).collect();
    let sum = |row: &Vec<f64>| row.iter().sum::<f64>();
    let mismatched = rows("kl_log_probs");
    let mismatched = mismatched.iter().zip(&rows("kl_reference_log_probs")).map(|(p, r)| sum(p) - sum(r)).collect();
    let variable = Var::from_tensor(&tensor(&log_probs.concat())).unwrap();
    let batch = UnpairedBatch {
        log_probs: variable.as_tensor().clone(),
        reference_log_probs: tensor(&rows("reference_log_probs").concat()),
        sequence: sequence(&lengths),
        weights: tensor(&vec![1.0 / good.len() as f64; good.len()]),
        good,
        mismatched,
        running,
    };
    let mut case = case.clone();
    case["gradient"] = rows("gradient").concat().into();
    case["metrics"].as_object_mut().unwrap().remove("rewards/margins");
    (batch, variable, case)
}

#[test]
fn kto_agrees_with_trl() {
    for case in reference()["kto"].as_array().unwrap() {
        let kto = case["loss_type"] == "kto";
        let options = UnpairedOptions {
            baseline: if kto { UnpairedBaseline::Kl } else { UnpairedBaseline::Zero },
            beta: get(&case["beta"]),
            desirable_weight: get(&case["desirable_weight"]),
            undesirable_weight: get(&case["undesirable_weight"]),
            ..UnpairedOptions::default()
        };
        let (batch, log_probs, case) = unpaired_case(case, RunningMean::default());
        let found = objectives::unpaired(&options, &batch).unwrap();
        check(&found.loss, &log_probs, &case, 1e-12, &format!("{options:?}"));
    }
}

#[test]
fn bco_agrees_with_trl_over_several_steps() {
    let options = UnpairedOptions {
        baseline: UnpairedBaseline::RunningMean,
        utility: Utility::LogSigmoid,
        ..UnpairedOptions::default()
    };
    let mut running = RunningMean::default();
    for case in reference()["bco"].as_array().unwrap() {
        let (batch, log_probs, case) = unpaired_case(case, running);
        let found = objectives::unpaired(&options, &batch).unwrap();
        running = found.running;
        // TRL keeps the running mean in single precision.
        check(&found.loss, &log_probs, &case, 1e-6, "bco");
    }
    assert_eq!(running.count, 15);
}

#[test]
fn xpo_agrees_with_trl() {
    let reference = reference();
    let given = lengths(&reference, &["chosen", "rejected"]);
    for case in reference["xpo"].as_array().unwrap() {
        let options = PreferenceOptions { beta: get(&case["beta"]), ..PreferenceOptions::default() };
        let wins: Vec<bool> = get(&case["policy_wins"]);
        // The case has the policy's completion first in every pair; a batch has the better one first.
        let mut order: Vec<usize> = (0..given.len()).collect();
        order.chunks_mut(2).zip(&wins).filter(|(_, won)| !**won).for_each(|(pair, _)| pair.swap(0, 1));
        let reorder = |name: &str| {
            let flat: Vec<f64> = get(&case[name]);
            let mut rest = &flat[..];
            let sequences: Vec<&[f64]> = given.iter().map(|&length| rest.split_off(..length).unwrap()).collect();
            order.iter().flat_map(|&sequence| sequences[sequence].to_vec()).collect::<Vec<f64>>()
        };
        let mut reordered = case.clone();
        for name in ["log_probs", "reference_log_probs", "gradient"] {
            reordered[name] = reorder(name).into();
        }
        let lengths: Vec<usize> = order.iter().map(|&sequence| given[sequence]).collect();
        let (batch, log_probs) = batch(&reordered, &lengths, 2);
        let explored: Vec<u32> = wins.iter().map(|&won| u32::from(won)).collect();
        let loss = objectives::xpo(&options, get(&case["alpha"]), &batch, &explored).unwrap();
        check(&loss, &log_probs, &reordered, 1e-12, "xpo");
    }
}

#[test]
fn nash_md_agrees_with_trl() {
    for case in reference()["nash_md"].as_array().unwrap() {
        let lengths: Vec<usize> = get(&case["lengths"]);
        let log_probs = Var::from_tensor(&tensor(&get::<Vec<f64>>(&case["log_probs"]))).unwrap();
        let batch = NashMdBatch {
            log_probs: log_probs.as_tensor().clone(),
            reference_log_probs: tensor(&get::<Vec<f64>>(&case["reference_log_probs"])),
            sequence: sequence(&lengths),
            preferences: get(&case["probability"]),
            weights: tensor(&vec![1.0 / lengths.len() as f64; lengths.len()]),
        };
        let loss = objectives::nash_md(get(&case["beta"]), &batch).unwrap();
        check(&loss, &log_probs, case, 1e-12, "nash_md");
    }
}
