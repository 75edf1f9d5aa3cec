//! Verifiers and combinations of rewards: what they accept, refuse and survive.

use std::time::{Duration, Instant};

use posttrain_envs::reward::confidence::Facts;
use posttrain_envs::reward::{LengthOptions, length::LengthReward};
use posttrain_envs::verify::expression::{ExpressionError, ExpressionReward, evaluate};
use posttrain_envs::verify::format::FormatReward;
use posttrain_envs::verify::number::{NumberReward, Numbers, parse};
use posttrain_envs::verify::{Budget, Exhausted, ExpressionOptions, FormatOptions, NumberOptions, Place, Rational};
use posttrain_envs::{
    Answer, Columns, Reward, RewardConfig, RewardError, RewardKind, Score, SpanScore, Status, Weighted,
};
use proptest::prelude::*;

fn ratio(numerator: i128, denominator: i128) -> Rational {
    Rational::new(numerator, denominator).unwrap()
}

fn number(options: NumberOptions) -> impl Fn(&str, &str) -> Status {
    let reward = NumberReward::new("number".into(), options).unwrap();
    move |completion, gold| reward.verify(completion, parse(gold).unwrap())
}

#[test]
fn the_last_number_is_compared_exactly() {
    use Status::{Malformed, Ok, Wrong};
    let verify = number(NumberOptions::default());
    for (completion, gold, expected) in [
        ("42", "42", Ok),
        ("The answer is 42.", "42", Ok),
        ("17 + 25 = 42\n\n", "42", Ok),
        ("42, not 43", "42", Wrong),
        ("**42**", "42", Ok),
        ("$1,234.50", "1234.5", Ok),
        ("1,234,567 apples", "1234567", Ok),
        ("1,2345", "2345", Ok),
        ("12,34", "34", Ok),
        ("it is 0.5", "1/2", Ok),
        ("it is 3/6", "0.5", Ok),
        ("it is .5", "0.5", Ok),
        ("0.3333", "1/3", Wrong),
        ("5e-1", "0.5", Ok),
        ("2.5E3", "2500", Ok),
        ("-7", "-7", Ok),
        ("= \u{2212}7", "-7", Ok),
        ("+7", "7", Ok),
        ("12-5", "5", Ok),
        ("12 -5", "-5", Ok),
        ("(3)-5", "5", Ok),
        ("007", "7", Ok),
        ("7%", "7", Ok),
        ("-0", "0", Ok),
        ("1/0", "1", Malformed),
        ("", "1", Malformed),
        ("no number", "1", Malformed),
        ("four", "4", Malformed),
        ("\u{0664}", "4", Malformed),
        ("7e", "7", Ok),
        ("H2O", "2", Ok),
        ("99999999999999999999999999999999999999999", "1", Malformed),
        ("1e40", "1", Malformed),
        ("1e999999999999999999999999999999", "1", Malformed),
        ("0e999999", "0", Ok),
        (r"so $\frac{1}{2}$", "1/2", Ok),
        (r"-\dfrac{ 3 } { 4 }.", "-0.75", Ok),
        (r"\tfrac{1,000}{-8}", "-125", Ok),
        (r"\frac{1/2}{0.25}", "2", Ok),
        (r"\frac{7}{42}", "42", Wrong),
        (r"\frac{7}{0}", "0", Malformed),
        (r"\frac{x}{42}", "42", Ok),
        (r"\frac{\frac{1}{2}}{3}", "3", Ok),
        (r"1{,}234", "1234", Ok),
        (r"1,\!234{,}567", "1234567", Ok),
        // A minus apart from its number, and marks that are none.
        ("- 5", "-5", Ok),
        ("x = - 5", "-5", Ok),
        ("it is: \u{2212} 5", "-5", Ok),
        (r"so $- 5$ or $-\$5$", "-5", Ok),
        ("is -$5", "-5", Ok),
        ("**-€5**", "-5", Ok),
        ("(- $ 5)", "-5", Ok),
        ("3 - 5", "5", Ok),
        ("$3 - $5", "5", Ok),
        ("$3 -$5", "5", Ok),
        ("3-$5", "5", Ok),
        (r"$3$ - 5", "5", Ok),
        ("5% - 3%", "3", Ok),
        ("x - 5", "5", Ok),
        ("the answer - 5", "5", Ok),
        ("In all:\n- 5 apples", "5", Ok),
        ("---\n5", "5", Ok),
    ] {
        assert_eq!(verify(completion, gold), expected, "{completion:?} against {gold:?}");
    }
}

#[test]
fn options_change_what_a_number_is() {
    use Status::{Malformed, Ok, Wrong};
    let defaults = NumberOptions::default;
    let plain = number(NumberOptions { thousands: false, ..defaults() });
    assert_eq!(plain("1,234", "234"), Ok);

    let percent = number(NumberOptions { percent: true, ..defaults() });
    assert_eq!(percent("it is 25 %", "1/4"), Ok);
    assert_eq!(percent("12.5%", "0.125"), Ok);
    assert_eq!(percent("25", "1/4"), Wrong);
    assert_eq!(percent(r"it is 25\%", "1/4"), Ok);
    assert_eq!(percent(r"\frac{50\%}{2}", "1/4"), Ok);

    let near = number(NumberOptions { tolerance: 0.01, ..defaults() });
    assert_eq!(near("0.3333", "1/3"), Ok);
    assert_eq!(near("0.35", "1/3"), Wrong);
    let relative = number(NumberOptions { relative_tolerance: 0.01, ..defaults() });
    assert_eq!(relative("1009", "1000"), Ok);
    assert_eq!(relative("1011", "1000"), Wrong);
    assert_eq!(relative("-1009", "-1000"), Ok);

    let only = number(NumberOptions { only: true, units: vec!["$".into(), "apples".into()], ..defaults() });
    for (completion, expected) in [
        (" 42 ", Ok),
        ("42.", Ok),
        ("$42", Ok),
        ("42 apples.", Ok),
        ("42 pears", Malformed),
        ("40 42", Malformed),
        ("The answer is 42", Malformed),
        ("41", Wrong),
    ] {
        assert_eq!(only(completion, "42"), expected, "{completion:?}");
    }

    let tag = number(NumberOptions { place: Place::Tag, ..defaults() });
    assert_eq!(tag("<think>1</think><answer>42</answer> 7", "42"), Ok);
    assert_eq!(tag("42", "42"), Malformed);
    let boxed = number(NumberOptions { place: Place::Boxed, ..defaults() });
    assert_eq!(boxed(r"so \boxed{42} = 40 + 2", "42"), Ok);
    assert_eq!(boxed(r"so \boxed{}", "42"), Malformed);
    for (content, gold, expected) in [
        (r"\frac{7}{42}", "42", Wrong),
        (r"\frac{1}{2}", "1/2", Ok),
        (r"\frac{1}{2}", "2", Wrong),
        (r"1{,}234", "1234", Ok),
        (r"1{,}234", "234", Wrong),
        ("-$5", "-5", Ok),
        ("- 5", "-5", Ok),
        ("x = 5", "5", Ok),
        (r"\$5\,\text{ apples}", "5", Ok),
        (r"25\%", "25", Ok),
        (r"90^\circ", "90", Ok),
        (r"\frac{x}{5}", "5", Malformed),
        (r"3\frac{1}{2}", "1/2", Malformed),
        (r"\sqrt{5}", "5", Malformed),
        (r"5\pi", "5", Malformed),
        ("2^5", "5", Malformed),
        ("3, 5", "5", Malformed),
    ] {
        assert_eq!(boxed(&format!(r"\boxed{{{content}}}"), gold), expected, "{content}");
    }
    let units = NumberOptions { place: Place::Boxed, only: true, units: vec!["$".into()], ..defaults() };
    let units = number(units);
    assert_eq!((units(r"\boxed{\$5}", "5"), units(r"\boxed{5\%}", "5")), (Ok, Malformed));

    for tolerance in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(NumberReward::new("n".into(), NumberOptions { tolerance, ..defaults() }).is_err());
    }
}

#[test]
fn expressions_have_exact_values() {
    let value = |text: &str| evaluate(text, &mut Budget::new(10_000));
    for (text, expected) in [
        ("1 + 2 * 3", ratio(7, 1)),
        ("(1 + 2) * 3", ratio(9, 1)),
        ("10 - 3 - 4", ratio(3, 1)),
        ("1/3 + 1/6", ratio(1, 2)),
        ("12 / 4 / 3", ratio(1, 1)),
        ("12/4*3", ratio(9, 1)),
        ("-2^2", ratio(-4, 1)),
        ("(-2)^2", ratio(4, 1)),
        ("2^3^2", ratio(512, 1)),
        ("2**-2", ratio(1, 4)),
        ("2^{1+2}", ratio(8, 1)),
        ("--3", ratio(3, 1)),
        ("2*-3", ratio(-6, 1)),
        ("0.1 + 0.2", ratio(3, 10)),
        ("1,000 × 2 ÷ 4", ratio(500, 1)),
        ("3 · 4 \u{2212} 5", ratio(7, 1)),
        (r"\frac{1}{2} \times 3", ratio(3, 2)),
        (r"\left(1 + 2\right) \cdot 2", ratio(6, 1)),
        ("(3)-5", ratio(-2, 1)),
    ] {
        assert_eq!(value(text), Ok(expected), "{text}");
    }
    for text in ["", "1 +", "(1", "1)", "2(3)", "1 2", "x", "1..2", "++", r"\frac{1}", "1 = 1", "^2", "é"] {
        let found = value(text);
        assert!(matches!(found, Err(ExpressionError::Syntax(_))), "{text}: {found:?}");
    }
    assert_eq!(value("1 / (2 - 2)"), Err(ExpressionError::DivisionByZero));
    assert_eq!(value("0^-1"), Err(ExpressionError::DivisionByZero));
    assert_eq!(value("2^(1/2)"), Err(ExpressionError::Exponent));
    assert_eq!(value("9^9^9"), Err(ExpressionError::TooLarge));
    assert_eq!(evaluate("1+1", &mut Budget::new(3)), Err(Exhausted.into()));
}

#[test]
fn the_expression_reward_reads_the_last_line() {
    let reward = ExpressionReward::new("expression".into(), ExpressionOptions::default()).unwrap();
    for (completion, expected) in [
        ("4 * 6", Status::Ok),
        ("First:\n2 + 3 = 4 * 6.\n\n", Status::Ok),
        ("$24$", Status::Ok),
        ("4 * 5", Status::Wrong),
        ("four times six", Status::Malformed),
        ("24 / 0", Status::Malformed),
        ("9^9^9^9", Status::Timeout),
    ] {
        assert_eq!(reward.verify(completion, Rational::from(24)), expected, "{completion:?}");
    }
}

#[test]
fn formats_are_checked_to_the_letter() {
    let reward = FormatReward::new("format".into(), FormatOptions::default()).unwrap();
    for (completion, expected, tags) in [
        ("<think>a</think><answer>b</answer>", true, 1.0),
        (" <think>\na\n</think>\n\n<answer></answer>\n", true, 1.0),
        ("<answer>b</answer><think>a</think>", false, 1.0),
        ("<think>a<answer>b</answer></think>", false, 1.0),
        ("so <think>a</think><answer>b</answer>", false, 1.0),
        ("<think>a</think> so <answer>b</answer>", false, 1.0),
        ("<think>a</think><answer>b</answer> so", false, 1.0),
        ("<think>a<think></think><answer>b</answer>", false, 0.75),
        ("<think>a</think><answer>b", false, 0.75),
        ("<think>a</think><answer>b</answer><answer>c</answer>", false, 0.5),
        ("plain", false, 0.0),
        ("", false, 0.0),
    ] {
        let score = reward.judge(completion);
        assert_eq!(score.status == Status::Ok, expected, "{completion:?}");
        assert_eq!(score.value, f64::from(u8::from(expected)));
        assert_eq!(score.parts, [("tags".to_owned(), tags)], "{completion:?}");
    }
    let inside = FormatOptions { first_tag_open: true, ..Default::default() };
    let inside = FormatReward::new("format".into(), inside).unwrap();
    assert_eq!(inside.judge("a</think><answer>b</answer>").status, Status::Ok);
    assert_eq!(inside.judge("<think>a</think><answer>b</answer>").status, Status::Malformed);
    let open = FormatOptions { tags: vec!["answer".into()], boxed: true, first_tag_open: true, ..Default::default() };
    let open = FormatReward::new("format".into(), open).unwrap();
    assert_eq!(open.judge(r"so \boxed{1}</answer>").status, Status::Ok);
    assert_eq!(open.judge(r"so 1</answer>\boxed{1}").status, Status::Malformed);
    assert_eq!(open.judge("so 1</answer>").status, Status::Malformed);
    let boxed = FormatOptions { tags: vec![], boxed: true, ..Default::default() };
    let boxed = FormatReward::new("format".into(), boxed).unwrap();
    assert_eq!(boxed.judge(r"so \boxed{\frac{1}{2}}.").status, Status::Ok);
    assert_eq!(boxed.judge(r"\boxed{1} or \boxed{2}").status, Status::Malformed);
    assert_eq!(boxed.judge(r"\boxed{1").status, Status::Malformed);
    let both = FormatReward::new("format".into(), FormatOptions { boxed: true, ..Default::default() }).unwrap();
    assert_eq!(both.judge(r"<think>a</think><answer>\boxed{1}</answer>").status, Status::Ok);
    assert_eq!(both.judge(r"<think>\boxed{1}</think><answer>1</answer>").status, Status::Malformed);
    for tags in [vec![], vec!["a".to_owned(), "a".to_owned()], vec![String::new()]] {
        assert!(FormatReward::new("format".into(), FormatOptions { tags, ..Default::default() }).is_err());
    }
}

#[test]
fn length_is_punished_softly() {
    let reward = LengthReward::new("length".into(), LengthOptions { max_length: 20, buffer: 8 }).unwrap();
    for (length, value) in [(0, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (20, -1.0), (99, -1.0)] {
        assert_eq!(reward.value(length), value, "{length}");
    }
    let cliff = LengthReward::new("length".into(), LengthOptions { max_length: 20, buffer: 0 }).unwrap();
    assert_eq!((cliff.value(20), cliff.value(21)), (0.0, -1.0));
    assert!(LengthReward::new("length".into(), LengthOptions { max_length: 2, buffer: 3 }).is_err());
}

/// Every verdict on `completion` for a row whose answer is 1.
fn all_verdicts(completion: &str) -> Vec<Status> {
    let columns = Columns::from_iter([("answer".to_owned(), "1".into())]);
    let answer = Answer { prompt_text: "", completion, completion_ids: &[], columns: &columns };
    let place = |place| NumberOptions { place, only: true, percent: true, ..Default::default() };
    let tagged = ExpressionOptions { place: Place::Tag, ..Default::default() };
    [
        RewardKind::Number(NumberOptions::default()),
        RewardKind::Number(place(Place::Tag)),
        RewardKind::Number(place(Place::Boxed)),
        RewardKind::Expression(ExpressionOptions::default()),
        RewardKind::Expression(tagged),
        RewardKind::Format(FormatOptions { boxed: true, ..Default::default() }),
    ]
    .into_iter()
    .map(|kind| {
        let score = RewardConfig::new(kind).build().unwrap().score(&[answer]).unwrap()[0].clone().unwrap();
        assert!(score.value.is_finite());
        score.status
    })
    .collect()
}

#[test]
fn pathological_answers_end_quickly() {
    let big = 1 << 20;
    let within = 90_000;
    let nested = |n: usize| format!("{}1{}", "(".repeat(n), ")".repeat(n));
    let answers = [
        "9".repeat(big),
        "9".repeat(within),
        "1,".repeat(within / 2),
        "1*".repeat(within / 4) + "1",
        "1+1/3^".repeat(within / 20) + "1",
        "1/7+".repeat(within / 10) + "1",
        "9^9^9".into(),
        "9^".repeat(within / 2) + "9",
        "-".repeat(within) + "1",
        nested(within / 4),
        nested(big),
        r"\frac{".repeat(within / 8),
        r"\boxed{".repeat(within / 8),
        "{".repeat(within),
        "<answer>".repeat(within / 10),
        "</answer>".repeat(within / 10),
        "<think></think>".repeat(within / 20),
        "=".repeat(within),
        "\n".repeat(within),
        "%".repeat(within) + "1" + &" ".repeat(10),
        "1 ".repeat(within / 2),
        "\u{2212}".repeat(within / 3),
        "\u{10ffff}\0\u{202e}".repeat(within / 10),
        " ".repeat(within / 2) + &"- 1 ".repeat(within / 8),
        " - $ ".repeat(within / 5) + "1",
        r"\frac{1}{".repeat(within / 9),
        r"\frac{".to_owned() + &" ".repeat(within / 2) + "1}{" + &"2".repeat(within / 4),
    ];
    for answer in &answers {
        let started = Instant::now();
        let statuses = all_verdicts(answer);
        assert!(!statuses.contains(&Status::Error), "{statuses:?}");
        assert!(started.elapsed() < Duration::from_millis(500), "{:.20}... took {:?}", answer, started.elapsed());
    }
    assert!(all_verdicts(&answers[0]).iter().all(|status| *status == Status::Timeout));
    assert_eq!(all_verdicts(&nested(1000))[3], Status::Timeout);
    assert_eq!(all_verdicts(&nested(90))[3], Status::Ok);
}

proptest! {
    #[test]
    fn verifiers_never_panic(text in "\\PC{0,60}") {
        all_verdicts(&text);
    }

    #[test]
    fn verifiers_never_panic_on_near_misses(text in r"([-+*/^(){}.,=%$€e0-9 \n−×]|\\frac\{1\}\{|\\[$%!]|\\frac|\\boxed\{|<think>|</think>|<answer>|</answer>){0,40}") {
        all_verdicts(&text);
        let found: Vec<_> = Numbers::new(&text, true, true).collect();
        for pair in found.windows(2) {
            prop_assert!(pair[0].end <= pair[1].start || pair[0].end <= pair[1].end);
        }
        for number in found {
            prop_assert!(number.start < number.end);
            prop_assert!(text.get(number.start..number.end).is_some());
        }
    }

    #[test]
    fn stated_confidences_are_numbers_of_the_text_in_order(text in r"(Answer:|Confidence:|,|[0-9.]| |\n|é|x){0,40}") {
        let found = Facts::Several.of(&text);
        let starts = [0].into_iter().chain(found.iter().map(|stated| stated.number.end));
        for (stated, start) in found.iter().zip(starts) {
            prop_assert!(start < stated.number.start);
            let number = &text[stated.number.clone()];
            prop_assert!(number.contains(|c: char| c.is_ascii_digit()) && text.contains(stated.answer));
            prop_assert!(stated.level.is_none_or(|level| number.parse() == Ok(f64::from(level))));
        }
        // Where one is read, several begin there or before.
        let first = Facts::One.of(&text).into_iter().next();
        prop_assert!(first.is_none_or(|first| found[0].number.start <= first.number.start));
    }

    #[test]
    fn a_budget_bounds_the_work(text in r"[-+*/^()0-9 ]{0,60}", steps in 0u64..200) {
        let unbounded = evaluate(&text, &mut Budget::new(1_000_000));
        match evaluate(&text, &mut Budget::new(steps)) {
            Err(ExpressionError::Exhausted(_)) => {}
            bounded => prop_assert_eq!(bounded, unbounded),
        }
    }

    #[test]
    fn integers_survive_writing_and_reading(value in any::<i64>(), denominator in 1i64..1000) {
        let exact = ratio(value.into(), denominator.into());
        prop_assert_eq!(parse(&exact.to_string()), Some(exact));
        prop_assert_eq!(evaluate(&exact.to_string(), &mut Budget::new(1000)), Ok(exact));
    }

    #[test]
    fn expressions_agree_with_integer_arithmetic(a in -99i64..99, b in -99i64..99, c in 1i64..99, d in 0u32..4) {
        let text = format!("{a} + {b} * ({c} - {a}) ^ {d}");
        prop_assert_eq!(evaluate(&text, &mut Budget::new(1000)), Ok(Rational::from(a + b * (c - a).pow(d))));
        let text = format!("({a} - {b}) / {c}");
        prop_assert_eq!(evaluate(&text, &mut Budget::new(1000)), Ok(ratio((a - b).into(), c.into())));
    }
}

/// A reward that says the same of every answer.
struct Fixed(&'static str, Option<Score>);

impl Reward for Fixed {
    fn name(&self) -> &str {
        self.0
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        Ok(vec![self.1.clone(); answers.len()])
    }
}

fn weighted(members: Vec<(f64, Fixed)>) -> Result<Weighted, RewardError> {
    let boxed = |(weight, reward)| (weight, Box::new(reward) as Box<dyn Reward>);
    Weighted::new(members.into_iter().map(boxed).collect())
}

#[test]
fn weights_add_up_over_the_rewards_that_apply() {
    let columns = Columns::new();
    let answer = Answer { prompt_text: "", completion: "", completion_ids: &[], columns: &columns };
    let total = |members| weighted(members).unwrap().score(&[answer]).unwrap()[0].clone();
    let ok = |value| Some(Score::new(value, Status::Ok));
    let shaped = Some(Score { parts: vec![("tags".into(), 0.25)], ..Score::new(0.5, Status::Malformed) });
    let score = total(vec![(2.0, Fixed("a", ok(1.0))), (-1.0, Fixed("b", shaped)), (5.0, Fixed("c", None))]).unwrap();
    assert_eq!((score.value, score.status), (1.5, Status::Ok));
    assert_eq!(score.parts, [("a".to_owned(), 1.0), ("b".to_owned(), 0.5), ("b/tags".to_owned(), 0.25)]);
    let score = total(vec![(1.0, Fixed("a", None)), (1.0, Fixed("b", Some(Score::verdict(Status::Wrong))))]).unwrap();
    assert_eq!(score.status, Status::Wrong, "the first that applies");
    let score = total(vec![(1.0, Fixed("a", ok(1.0))), (1.0, Fixed("b", Some(Score::verdict(Status::Timeout))))]);
    assert_eq!(score.unwrap().status, Status::Timeout, "a failure is not hidden");
    assert_eq!(total(vec![(1.0, Fixed("a", None))]), None);

    // A part of the answer is paid its own reward, and what the others pay for the answer.
    let spans = vec![SpanScore { text: 0..2, reward: 3.0 }, SpanScore { text: 4..5, reward: -1.0 }];
    let judged = Some(Score { spans, ..Score::new(1.0, Status::Ok) });
    let other = Some(Score { spans: vec![SpanScore { text: 2..3, reward: 0.0 }], ..Score::new(0.5, Status::Ok) });
    let members = vec![(2.0, Fixed("a", judged)), (1.0, Fixed("b", ok(10.0))), (-1.0, Fixed("c", other))];
    let score = total(members).unwrap();
    assert_eq!(score.value, 11.5);
    let expected = [(0..2, 2.0 * 3.0 + 10.0 - 0.5), (2..3, 2.0 + 10.0), (4..5, -2.0 + 10.0 - 0.5)];
    assert_eq!(score.spans, expected.map(|(text, reward)| SpanScore { text, reward }));

    assert!(weighted(vec![]).is_err());
    assert!(weighted(vec![(f64::NAN, Fixed("a", None))]).is_err());
    assert!(weighted(vec![(1.0, Fixed("a", None)), (1.0, Fixed("a", None))]).is_err());
}

#[test]
fn rows_without_a_usable_answer_are_named() {
    let config = RewardConfig::new(RewardKind::Number(NumberOptions::default()));
    let reward = config.build().unwrap();
    let message = |columns: serde_json::Value| {
        let columns = columns.as_object().unwrap().clone();
        let good = Columns::from_iter([("answer".to_owned(), 1.into())]);
        let answer = |columns| Answer { prompt_text: "", completion: "1", completion_ids: &[], columns };
        reward.score(&[answer(&good), answer(&columns)]).unwrap_err().to_string()
    };
    assert_eq!(message(serde_json::json!({})), "reward number: row 1 of the batch has no column \"answer\"");
    assert!(
        message(serde_json::json!({"answer": "seven"}))
            .contains("expects \"seven\" in column \"answer\", which is not a number")
    );
    assert!(message(serde_json::json!({"answer": [7]})).contains("not a text or a number"));
    assert!(message(serde_json::json!({"answer": "25%"})).contains("not a number"));
    // Where a percent sign counts, it does in the column too.
    let options = NumberOptions { percent: true, ..Default::default() };
    let reward = RewardConfig::new(RewardKind::Number(options)).build().unwrap();
    let columns = Columns::from_iter([("answer".to_owned(), "25%".into())]);
    let answer = Answer { prompt_text: "", completion: "a quarter, 1/4", completion_ids: &[], columns: &columns };
    assert_eq!(reward.score(&[answer]).unwrap()[0].as_ref().map(|score| score.status), Some(Status::Ok));
}

#[test]
fn configurations_are_read_strictly() {
    let read = |text: &str| serde_json::from_str::<RewardConfig>(text);
    let config = read(r#"{"type": "number", "name": "exact", "weight": 2, "place": "tag"}"#).unwrap();
    assert_eq!((config.name(), config.weight), ("exact", 2.0));
    assert_eq!(config.kind, RewardKind::Number(NumberOptions { place: Place::Tag, ..Default::default() }));
    assert_eq!(read(r#"{"type": "format"}"#).unwrap(), RewardConfig::new(RewardKind::Format(FormatOptions::default())));
    for (text, expected) in [
        (r#"{"type": "number", "colunm": "x"}"#, "unknown field `colunm`"),
        (r#"{"type": "numbre"}"#, "unknown variant `numbre`"),
        (r#"{"weight": 1}"#, "type"),
        (r#"{"type": "length", "max_length": 3}"#, "missing field `buffer`"),
    ] {
        let error = read(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
    let round = serde_json::to_string(&config).unwrap();
    assert_eq!(read(&round).unwrap(), config);
}
