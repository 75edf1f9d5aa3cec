//! Losses of reward models: against TRL, transformers and torch, finite differences, limits and extremes.

use candle_core::{Device, Tensor, Var};
use objectives::reward::{
    Ensemble, LabelLoss, ScoredPairs, StepAggregation, bradley_terry, classified, labelled, plackett_luce,
};
use objectives::{Fold, Loss};
use posttrain_objectives as objectives;
use proptest::prelude::*;
use serde_json::Value;

fn reference() -> Value {
    serde_json::from_str(include_str!("../../../tests/reference/reward_losses.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn variable(values: &[f64]) -> Var {
    Var::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

fn total(loss: &Loss) -> f64 {
    loss.values().unwrap().iter().sum()
}

fn metric(loss: &Loss, name: &str) -> f64 {
    let statistic = loss.statistics.iter().find(|statistic| statistic.name == name).unwrap();
    let mut fold = Fold::new(statistic.reduce);
    fold.extend(&statistic.values);
    fold.value().unwrap()
}

fn close(got: f64, expected: f64, what: &str) {
    assert!((got - expected).abs() <= 1e-12 * (1.0 + expected.abs()), "{what}: {got}, the reference has {expected}");
}

/// The loss of pairs of equal weight, and its gradient: first of the chosen scores, then of the rejected ones.
fn pairs(chosen: &[f64], rejected: &[f64], margins: &[f64], center: f64) -> (Loss, Vec<f64>) {
    let (chosen, rejected) = (variable(chosen), variable(rejected));
    let count = margins.len();
    let batch = ScoredPairs {
        chosen: chosen.as_tensor().clone(),
        rejected: rejected.as_tensor().clone(),
        margins: margins.to_vec(),
        label_smoothing: 0.0,
        weights: vec![1.0 / count as f64; count],
    };
    let loss = bradley_terry(&batch, center).unwrap();
    let gradient = [loss.gradient(chosen.as_tensor()).unwrap(), loss.gradient(rejected.as_tensor()).unwrap()].concat();
    (loss, gradient)
}

/// A loss of `scores` with the gradient candle finds.
fn of(scores: &[f64], loss: impl Fn(&Tensor) -> Loss) -> (Loss, Vec<f64>) {
    let scores = variable(scores);
    let loss = loss(scores.as_tensor());
    let gradient = loss.gradient(scores.as_tensor()).unwrap();
    (loss, gradient)
}

#[test]
fn pairs_agree_with_trl_and_openrlhf() {
    for case in reference()["pairs"].as_array().unwrap() {
        let (center, margins) = (case["center"].as_f64().unwrap(), numbers(&case["margins"]));
        let name = format!("center {center}, margins {margins:?}");
        let (loss, gradient) = pairs(&numbers(&case["chosen"]), &numbers(&case["rejected"]), &margins, center);
        close(total(&loss), case["loss"].as_f64().unwrap(), &name);
        gradient.iter().zip(numbers(&case["gradient"])).for_each(|(got, expected)| close(*got, expected, &name));
        for (key, expected) in case["metrics"].as_object().unwrap() {
            // TRL counts what is right in f32.
            assert!((metric(&loss, key) - expected.as_f64().unwrap()).abs() < 1e-6, "{name}: {key}");
        }
        if center == 0.0 && margins[0] == 0.0 {
            close(total(&loss), case["log_exp"].as_f64().unwrap(), "log(1 + exp)");
        }
    }
}

#[test]
fn labels_classes_and_rankings_agree_with_torch() {
    let reference = reference();
    for case in reference["labelled"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let kind = if name == "bce" { LabelLoss::Bce } else { LabelLoss::Mse };
        let labels = numbers(&case["labels"]);
        let weights = vec![1.0 / labels.len() as f64; labels.len()];
        let (loss, gradient) =
            of(&numbers(&case["scores"]), |scores| labelled(kind, scores, &labels, &weights).unwrap());
        close(total(&loss), case["loss"].as_f64().unwrap(), name);
        gradient.iter().zip(numbers(&case["gradient"])).for_each(|(got, expected)| close(*got, expected, name));
        if kind == LabelLoss::Mse {
            close(metric(&loss, "mse"), total(&loss), "mse");
        }
    }
    let case = &reference["classified"];
    let outputs: Vec<f64> = case["outputs"].as_array().unwrap().iter().flat_map(numbers).collect();
    let classes: Vec<u32> = numbers(&case["classes"]).iter().map(|&class| class as u32).collect();
    let (loss, gradient) =
        of(&outputs, |outputs| classified(&outputs.reshape((5, 3)).unwrap(), &classes, &[0.2; 5]).unwrap());
    // transformers computes this loss in f32.
    let near =
        |got: f64, expected: f64| assert!((got - expected).abs() < 1e-6, "classified: {got}, torch has {expected}");
    near(total(&loss), case["loss"].as_f64().unwrap());
    near(metric(&loss, "accuracy"), case["accuracy"].as_f64().unwrap());
    gradient.iter().zip(numbers(&case["gradient"])).for_each(|(got, expected)| near(*got, expected));

    let case = &reference["rankings"];
    let (loss, gradient) = of(&numbers(&case["scores"]), |scores| plackett_luce(scores, &[4, 2], &[0.5; 6]).unwrap());
    close(total(&loss), case["loss"].as_f64().unwrap(), "rankings");
    gradient.iter().zip(numbers(&case["gradient"])).for_each(|(got, expected)| close(*got, expected, "rankings"));
}

#[test]
fn limits() {
    let ln2 = std::f64::consts::LN_2;
    // Equal scores: log 2, no accuracy, and a push of a half.
    let (loss, gradient) = pairs(&[1.5], &[1.5], &[0.0], 0.0);
    close(total(&loss), ln2, "equal scores");
    assert_eq!((metric(&loss, "accuracy"), gradient), (0.0, vec![-0.5, 0.5]));
    // Only the difference counts, unless scores are centred.
    let (shifted, _) = pairs(&[101.5], &[101.5], &[0.0], 0.0);
    close(total(&shifted), ln2, "shift");
    let (centred, gradient) = pairs(&[1.0], &[1.0], &[0.0], 0.25);
    close(total(&centred), ln2 + 1.0, "centred");
    assert_eq!(gradient, [0.5, 1.5]);
    // A margin that is met leaves log 2.
    close(total(&pairs(&[3.0], &[1.0], &[2.0], 0.0).0), ln2, "margin");
    // Smoothed labels are the mean over both ways round: least where the odds are theirs, and without a preference at one half.
    let smooth = |lead: f64, label_smoothing: f64| {
        of(&[lead], |chosen| {
            let (chosen, rejected) = (chosen.clone(), variable(&[0.0]).as_tensor().clone());
            let pair = ScoredPairs { chosen, rejected, margins: vec![0.0], label_smoothing, weights: vec![1.0] };
            bradley_terry(&pair, 0.0).unwrap()
        })
    };
    let (kept, flipped) = (total(&smooth(0.8, 0.0).0), total(&smooth(-0.8, 0.0).0));
    close(total(&smooth(0.8, 0.2).0), 0.8 * kept + 0.2 * flipped, "smoothed");
    assert!(smooth(4f64.ln(), 0.2).1[0].abs() < 1e-15, "the odds of a label that is right four times in five");
    // A ranking of two is a pair; one of one costs nothing.
    let (ranking, _) = of(&[0.7, -0.4], |scores| plackett_luce(scores, &[2], &[1.0; 2]).unwrap());
    close(total(&ranking), total(&pairs(&[0.7], &[-0.4], &[0.0], 0.0).0), "two");
    assert_eq!(total(&of(&[5.0], |scores| plackett_luce(scores, &[1], &[1.0]).unwrap()).0), 0.0);
    // Two classes are one score: their difference.
    let (two, _) = of(&[0.3, 1.1], |outputs| classified(&outputs.reshape((1, 2)).unwrap(), &[1], &[1.0]).unwrap());
    let (one, _) = of(&[0.8], |scores| labelled(LabelLoss::Bce, scores, &[1.0], &[1.0]).unwrap());
    close(total(&two), total(&one), "two classes");
    // The label itself is the least squared error; the log-odds of a soft label the least cross-entropy.
    assert_eq!(of(&[0.3], |scores| labelled(LabelLoss::Mse, scores, &[0.3], &[1.0]).unwrap()).1, [0.0]);
    let odds = (0.3f64 / 0.7).ln();
    assert!(of(&[odds], |scores| labelled(LabelLoss::Bce, scores, &[0.3], &[1.0]).unwrap()).1[0].abs() < 1e-15);
}

#[test]
fn extremes_and_nothing_at_all_give_numbers() {
    let huge = [1e4, -1e4, 0.0];
    let finite = |(loss, gradient): (Loss, Vec<f64>)| {
        assert!(total(&loss).is_finite() && gradient.iter().all(|value| value.is_finite()), "{gradient:?}");
    };
    for &a in &huge {
        for &b in &huge {
            finite(pairs(&[a], &[b], &[0.0], 0.01));
            finite(of(&[a, b], |scores| plackett_luce(scores, &[2], &[0.5; 2]).unwrap()));
            finite(of(&[a, b], |outputs| classified(&outputs.reshape((1, 2)).unwrap(), &[0], &[1.0]).unwrap()));
        }
        finite(of(&[a], |scores| labelled(LabelLoss::Bce, scores, &[0.0], &[1.0]).unwrap()));
        finite(of(&[a], |scores| labelled(LabelLoss::Mse, scores, &[1.0], &[1.0]).unwrap()));
    }
    finite(pairs(&[], &[], &[], 0.5));
    finite(of(&[], |scores| labelled(LabelLoss::Bce, scores, &[], &[]).unwrap()));
    finite(of(&[], |scores| plackett_luce(scores, &[], &[]).unwrap()));
    finite(of(&[], |outputs| classified(&outputs.reshape((0, 2)).unwrap(), &[], &[]).unwrap()));
}

#[test]
fn inputs_that_do_not_fit_are_named() {
    let one = variable(&[0.5]);
    let error = |result: objectives::Result<Loss>| result.unwrap_err().to_string();
    let label = error(labelled(LabelLoss::Bce, one.as_tensor(), &[1.5], &[1.0]));
    assert_eq!(label, "a label is 1.5, expected 0 to 1");
    let length = error(labelled(LabelLoss::Mse, one.as_tensor(), &[1.0, 2.0], &[1.0]));
    assert_eq!(length, "labels has length 2, expected 1");
    let outputs = one.as_tensor().reshape((1, 1)).unwrap();
    assert_eq!(error(classified(&outputs, &[1], &[1.0])), "a class is 1, expected one of the head's outputs");
    assert_eq!(error(plackett_luce(one.as_tensor(), &[2], &[1.0])), "rankings has length 2, expected 1");
    let (chosen, rejected) = (one.as_tensor().clone(), one.as_tensor().clone());
    let mut batch = ScoredPairs { chosen, rejected, margins: vec![0.0], label_smoothing: 0.0, weights: vec![1.0] };
    let center = error(bradley_terry(&batch, -1.0));
    assert_eq!(center, "center_rewards_coefficient is -1, expected a number from 0 up");
    batch.label_smoothing = 0.5;
    assert_eq!(error(bradley_terry(&batch, 0.0)), "label_smoothing is 0.5, expected at least 0 and below 0.5");
}

#[test]
fn steps_and_ensembles_become_one_score() {
    let steps = [0.9, 0.5, 0.8];
    assert_eq!(StepAggregation::Min.of(&steps), Some(0.5));
    assert_eq!(StepAggregation::Last.of(&steps), Some(0.8));
    close(StepAggregation::Product.of(&steps).unwrap(), 0.36, "product");
    close(StepAggregation::Mean.of(&steps).unwrap(), 2.2 / 3.0, "mean");
    for aggregation in [StepAggregation::Min, StepAggregation::Last, StepAggregation::Product, StepAggregation::Mean] {
        assert_eq!(aggregation.of(&[0.25]), Some(0.25), "one step is its outcome");
        assert_eq!(aggregation.of(&[]), None);
    }
    let scores = [1.0, 3.0];
    assert_eq!(Ensemble::Mean.of(&scores, 9.0), Some(2.0));
    assert_eq!(Ensemble::Min.of(&scores, 9.0), Some(1.0));
    assert_eq!(Ensemble::UncertaintyPenalized.of(&scores, 0.5), Some(1.5));
    assert_eq!(Ensemble::UncertaintyPenalized.of(&[2.5], 9.0), Some(2.5), "one model is certain");
    assert_eq!(Ensemble::Mean.of(&[], 0.0), None);
}

proptest! {
    #[test]
    fn gradients_equal_finite_differences(
        scores in prop::collection::vec(-4.0..4.0f64, 6),
        labels in prop::collection::vec(0.0..1.0f64, 6),
        center in 0.0..0.5f64,
        label_smoothing in 0.0..0.4f64,
    ) {
        let weights = [0.3, 0.1, 0.2, 0.15, 0.05, 0.2];
        type Build<'a> = Box<dyn Fn(&Tensor) -> Loss + 'a>;
        let losses: Vec<Build<'_>> = vec![
            Box::new(|x| {
                let (chosen, rejected) = (x.narrow(0, 0, 3).unwrap(), x.narrow(0, 3, 3).unwrap());
                let (margins, weights) = (labels[..3].to_vec(), weights[..3].to_vec());
                bradley_terry(&ScoredPairs { chosen, rejected, margins, label_smoothing, weights }, center).unwrap()
            }),
            Box::new(|x| plackett_luce(x, &[3, 1, 2], &weights).unwrap()),
            Box::new(|x| labelled(LabelLoss::Bce, x, &labels, &weights).unwrap()),
            Box::new(|x| labelled(LabelLoss::Mse, x, &labels, &weights).unwrap()),
            Box::new(|x| classified(&x.reshape((3, 2)).unwrap(), &[1, 0, 1], &weights[..3]).unwrap()),
        ];
        for loss in &losses {
            let (_, gradient) = of(&scores, loss);
            for index in 0..scores.len() {
                let side = |step: f64| {
                    let mut moved = scores.clone();
                    moved[index] += step;
                    total(&of(&moved, loss).0)
                };
                let numeric = (side(1e-5) - side(-1e-5)) / 2e-5;
                prop_assert!((numeric - gradient[index]).abs() < 1e-8, "{numeric} {}", gradient[index]);
            }
        }
    }

    /// A batch and its halves have the same losses, item by item.
    #[test]
    fn a_split_changes_no_bit(scores in prop::collection::vec(-4.0..4.0f64, 8), cut in 0usize..4) {
        let run = |pairs_of: std::ops::Range<usize>| {
            let (chosen, rejected) = (&scores[..4][pairs_of.clone()], &scores[4..][pairs_of.clone()]);
            let batch = ScoredPairs {
                chosen: variable(chosen).as_tensor().clone(),
                rejected: variable(rejected).as_tensor().clone(),
                margins: vec![0.1; pairs_of.len()],
                label_smoothing: 0.1,
                weights: vec![0.25; pairs_of.len()],
            };
            bradley_terry(&batch, 0.1).unwrap().values().unwrap()
        };
        prop_assert_eq!(run(0..4), [run(0..cut), run(cut..4)].concat());
    }
}
