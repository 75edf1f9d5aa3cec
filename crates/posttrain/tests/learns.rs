//! The end-to-end test: a model from scratch learns its task, first from examples, then from rewards.

use crate::common::{expect, posttrain, root, stderr};

#[test]
fn a_tiny_model_learns_from_scratch() {
    let folder = tempfile::tempdir().unwrap();
    let output = posttrain(folder.path()).arg("train").arg(root().join("recipes/tiny.toml")).output().unwrap();
    expect(0, &output);
    let run = folder.path().join("runs/tiny");
    let summary: serde_json::Value = serde_json::from_slice(&std::fs::read(run.join("summary.json")).unwrap()).unwrap();
    let accuracy = |when: &str| summary[when]["measures"][0]["value"].as_f64().unwrap();
    assert_eq!(accuracy("before"), 0.0, "a random model knows nothing");
    assert!(accuracy("after") >= 0.5, "accuracy {} after training\n{}", accuracy("after"), stderr(&output));

    // The second stage made it better, by reward alone.
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let rewards: Vec<f64> = lines.iter().filter_map(|line| line["reward"].as_f64()).collect();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (first, last) = (mean(&rewards[..10]), mean(&rewards[rewards.len() - 10..]));
    assert!(last > first + 0.05, "mean reward {first:.3} in the first ten steps, {last:.3} in the last ten");

    // Sampler and trainer agree exactly, step after step.
    let differences = lines.iter().filter_map(|line| line["sampling/sampling_logp_difference/max"].as_f64());
    assert!(differences.clone().count() > 0 && differences.clone().all(|difference| difference == 0.0));
}
