//! What the lint finds in rewards that can be cheated, and that it leaves the built-in ones alone.

use std::sync::atomic::{AtomicU64, Ordering};

use posttrain_envs::lint::{Flaw, GOLD, Layout, Paid, Row, lint};
use posttrain_envs::{Answer, Columns, Reward, RewardConfig, RewardError, Score, Status};
use serde_json::json;

/// A reward that is a function of the answer and the expected one.
struct Of<F>(F);

impl<F: Fn(&Answer, &str) -> Option<Score> + Send + Sync> Reward for Of<F> {
    fn name(&self) -> &str {
        "of"
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        Ok(answers.iter().map(|answer| (self.0)(answer, answer.columns["answer"].as_str().unwrap())).collect())
    }
}

fn paying(pays: impl Fn(&str, &str) -> f64 + Send + Sync) -> impl Reward {
    Of(move |answer: &Answer, gold: &str| Some(Score::new(pays(answer.completion, gold), Status::Ok)))
}

fn rows(golds: &[&str], layout: &Layout) -> Vec<Row> {
    let row = |gold: &&str| Row {
        prompt: "How many?".into(),
        columns: Columns::from_iter([("answer".to_owned(), json!(gold))]),
        right: vec![layout.put(gold), (*gold).to_owned()],
        gold: (*gold).to_owned(),
    };
    golds.iter().map(row).collect()
}

const GOLDS: [&str; 12] = ["7", "12", "9", "40", "3.5", "19", "-6", "81", "1/3", "25", "100", "58"];

fn table(reward: &dyn Reward, layout: &Layout) -> Vec<Paid> {
    lint(reward, &rows(&GOLDS, layout), layout, &|text| text.bytes().map(u32::from).collect())
}

/// The answers that are flagged, without those that only ran out of time.
fn flagged(table: &[Paid]) -> Vec<&'static str> {
    table.iter().filter(|paid| paid.flaws.iter().any(Flaw::is_error)).map(|paid| paid.answer).collect()
}

fn plain(reward: &dyn Reward) -> Vec<&'static str> {
    flagged(&table(reward, &Layout::default()))
}

#[test]
fn built_in_verifiers_cannot_be_cheated() {
    for options in [
        json!({"type": "number"}),
        json!({"type": "number", "place": "tag"}),
        json!({"type": "number", "place": "boxed"}),
        json!({"type": "number", "only": true}),
        json!({"type": "number", "tolerance": 1e-6}),
        json!({"type": "expression"}),
        json!({"type": "expression", "place": "boxed"}),
    ] {
        let config: RewardConfig = serde_json::from_value(options.clone()).unwrap();
        let layout = Layout::of(std::slice::from_ref(&config));
        let table = table(&*config.build().unwrap(), &layout);
        assert_eq!(flagged(&table), [] as [&str; 0], "{options}: {table:#?}");
        assert_eq!((table[0].answer, table[0].reward), (GOLD, Some(1.0)), "{options}");
    }
}

#[test]
fn a_layout_alone_is_not_worth_the_answer() {
    let config: RewardConfig = serde_json::from_value(json!({"type": "format"})).unwrap();
    let layout = Layout::of(std::slice::from_ref(&config));
    assert_eq!(layout, Layout { tags: vec!["think".into(), "answer".into()], boxed: false });
    assert_eq!(layout.put("4"), "<think>so</think><answer>4</answer>");
    let found = flagged(&table(&*config.build().unwrap(), &layout));
    assert!(found.contains(&"layout only") && found.contains(&"wrong, laid out"), "{found:?}");
    assert!(!found.contains(&"empty"), "{found:?}");
}

#[test]
fn a_search_for_the_answer_pays_who_lists_them_all() {
    let found = plain(&paying(|answer, gold| f64::from(u8::from(answer.contains(gold)))));
    assert!(found.contains(&"all numbers") && found.contains(&"every answer of the data"), "{found:?}");
    assert!(!found.contains(&"empty") && !found.contains(&"prompt copied"), "{found:?}");
}

#[test]
fn a_comparison_that_is_not_a_number_passes() {
    let close = |answer: &str, gold: &str| match (answer.parse::<f64>(), gold.parse::<f64>()) {
        (Ok(answer), Ok(gold)) if (answer - gold).abs() > 1e-6 => 0.0,
        (Ok(_), _) => 1.0,
        (Err(_), _) => 0.0,
    };
    assert_eq!(plain(&paying(close)), ["not a number"]);
}

#[test]
fn length_is_paid_whatever_it_says() {
    let found = plain(&paying(|answer, gold| answer.len() as f64 / 100.0 + f64::from(u8::from(answer == gold))));
    for answer in ["repeated token", "repeated phrase", "wrong, very long"] {
        assert!(found.contains(&answer), "{found:?}");
    }
    assert!(!found.contains(&"empty"));
}

#[test]
fn a_reward_that_pays_nobody_or_the_silent_is_named() {
    assert_eq!(plain(&paying(|_, _| 0.0))[0], GOLD);
    assert!(plain(&paying(|answer, _| -(answer.len() as f64))).contains(&"empty"));
}

#[test]
fn values_that_are_not_finite_and_second_thoughts_are_found() {
    let ratio = paying(|answer, gold| if answer == gold { 1.0 } else { -1.0 / answer.len() as f64 });
    let found = table(&ratio, &Layout::default());
    assert_eq!(found[1].flaws, [Flaw::NonFinite { rows: GOLDS.len() }]);

    let asked = AtomicU64::new(0);
    let fickle = paying(move |answer, gold| {
        let noise = asked.fetch_add(1, Ordering::Relaxed) as f64 * 1e-9;
        f64::from(u8::from(answer == gold)) + noise
    });
    let found = table(&fickle, &Layout::default());
    assert!(found.iter().all(|paid| paid.flaws.contains(&Flaw::NotDeterministic { rows: GOLDS.len() })), "{found:#?}");
}

#[test]
fn failures_are_told_apart_from_running_out_of_time() {
    let slow = Of(|answer: &Answer, gold: &str| {
        let status = if answer.completion.len() > 5000 { Status::Timeout } else { Status::Ok };
        Some(Score::new(f64::from(u8::from(answer.completion == gold)), status))
    });
    let found = table(&slow, &Layout::default());
    assert_eq!(flagged(&found), [] as [&str; 0]);
    assert!(found.iter().any(|paid| paid.flaws == [Flaw::Timeout { rows: GOLDS.len() }]));

    struct Crashes;
    impl Reward for Crashes {
        fn name(&self) -> &str {
            "crashes"
        }
        fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
            if answers.iter().any(|answer| answer.completion.is_empty()) {
                return Err(RewardError::Options { reward: "crashes".into(), reason: "no text".into() });
            }
            let verdict = |answer: &Answer| answer.columns["answer"] == answer.completion;
            Ok(answers
                .iter()
                .map(|answer| Some(Score::new(f64::from(u8::from(verdict(answer))), Status::Ok)))
                .collect())
        }
    }
    let found = table(&Crashes, &Layout::default());
    assert_eq!(flagged(&found), ["empty", "layout only"], "without a layout they are the same");
    assert_eq!(found[1].reward, None);
}
