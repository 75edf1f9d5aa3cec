//! The measures of unlearning against SciPy and Google's ROUGE: tests/reference/unlearning.py.

use posttrain_eval::kolmogorov_smirnov::{asymptotic_p_value, kolmogorov_smirnov};
use posttrain_eval::unlearning::{harmonic_mean, rouge_l_recall};
use serde_json::Value;

fn reference() -> Value {
    serde_json::from_str(include_str!("../../../tests/reference/unlearning.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[track_caller]
fn close(found: f64, expected: &Value, relative: f64) {
    let expected = expected.as_f64().unwrap();
    assert!((found - expected).abs() <= relative * expected.abs() + 1e-300, "{found:e}, expected {expected:e}");
}

#[test]
fn the_test_of_kolmogorov_and_smirnov_is_scipys() {
    let reference = reference();
    let cases = reference["kolmogorov_smirnov"].as_array().unwrap();
    assert!(cases.len() > 6);
    for case in cases {
        let (first, second) = (numbers(&case["first"]), numbers(&case["second"]));
        let found = kolmogorov_smirnov(&first, &second).unwrap();
        close(found.statistic, &case["statistic"], 1e-12);
        close(found.p_value, &case["p_value"], 1e-9);
        assert!(found.exact);
        // The alternating series of a large p-value ends where its terms are rounding errors of 1.
        let asymptotic = asymptotic_p_value(first.len(), second.len(), found.statistic);
        close(asymptotic, &case["asymptotic"], 1e-9);
    }
}

#[test]
fn recall_is_that_of_googles_rouge() {
    for case in reference()["rouge"].as_array().unwrap() {
        let [candidate, reference] = ["candidate", "reference"].map(|name| case[name].as_str().unwrap());
        close(rouge_l_recall(candidate, reference), &case["recall"], 1e-12);
    }
}

#[test]
fn the_harmonic_mean_is_scipys() {
    for case in reference()["harmonic"].as_array().unwrap() {
        close(harmonic_mean(&numbers(&case["values"])), &case["mean"], 1e-12);
    }
}
