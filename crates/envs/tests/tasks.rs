//! Tasks: correct answers, no leakage, determinism.

use std::collections::HashSet;

use base::{Purpose, Random};

use posttrain_envs::tasks::arithmetic::Operation;
use posttrain_envs::tasks::word_problems::Kind;
use posttrain_envs::tasks::{ArithmeticOptions, WordProblemOptions, near_miss, split_of};
use posttrain_envs::verify::{Budget, Rational, expression};
use posttrain_envs::{Problem, Split, Task, TaskConfig};

const DRAWS: u64 = 100_000;

fn arithmetic(options: ArithmeticOptions) -> Box<dyn Task> {
    TaskConfig::Arithmetic(options).build().unwrap()
}

fn every_operation() -> ArithmeticOptions {
    ArithmeticOptions {
        operations: vec![Operation::Add, Operation::Subtract, Operation::Multiply, Operation::Divide],
        ..Default::default()
    }
}

fn every_kind() -> WordProblemOptions {
    let kinds = vec![Kind::Gain, Kind::Loss, Kind::Together, Kind::Difference, Kind::Groups, Kind::Sharing];
    WordProblemOptions { kinds, ..Default::default() }
}

/// What a question asks, read from its text alone and blind to order in sums and products: the leak a reader would see.
fn visible(problem: &Problem) -> (Vec<u64>, &'static str) {
    let mut numbers: Vec<u64> = problem
        .question
        .split(|c: char| !c.is_ascii_digit())
        .filter(|digits| !digits.is_empty())
        .map(|digits| digits.parse().unwrap())
        .collect();
    let operation = match problem.kind {
        "addition" | "gain" | "together" => "+",
        "subtraction" | "loss" | "difference" => "-",
        "multiplication" | "groups" => "*",
        "division" | "sharing" => "/",
        other => other,
    };
    if matches!(operation, "+" | "*") {
        numbers.sort_unstable();
    }
    (numbers, operation)
}

#[test]
fn no_test_problem_occurs_in_training() {
    let tasks = [arithmetic(every_operation()), TaskConfig::WordProblems(every_kind()).build().unwrap()];
    let mut train = HashSet::new();
    let mut test = HashSet::new();
    // Both tasks share the sets, and the two splits have different seeds.
    for task in &tasks {
        for index in 0..DRAWS / 2 {
            train.insert(visible(&task.generate(index % 7, Split::Train, index)));
            test.insert(visible(&task.generate(100, Split::Test, index)));
        }
    }
    assert!(train.len() > 1000 && test.len() > 200, "{} and {}", train.len(), test.len());
    assert_eq!(train.intersection(&test).count(), 0);
}

#[test]
fn chains_with_exchanged_operands_share_a_side() {
    let options = ArithmeticOptions {
        operands: 3,
        operations: vec![Operation::Add, Operation::Subtract, Operation::Multiply],
        first: [1, 9],
        others: [1, 9],
        factors: [2, 9],
        phrasings: vec!["What is {expression}?".into()],
        ..Default::default()
    };
    let task = arithmetic(options);
    let keys = |split| (0..5000).map(|index| task.generate(1, split, index).key).collect::<HashSet<_>>();
    let (train, test) = (keys(Split::Train), keys(Split::Test));
    assert!(train.is_disjoint(&test));
    assert!(train.iter().all(|key| split_of(key) == Split::Train));
    // 2 + 3 + 4 in every order is one problem.
    let key = |question: &str| {
        (0..200_000)
            .map(|index| task.generate(2, Split::Train, index))
            .chain((0..50_000).map(|index| task.generate(2, Split::Test, index)))
            .find(|problem| problem.question == question)
            .map(|problem| problem.key)
    };
    let expected = key("What is 2 + 3 * 4?");
    assert!(expected.is_some());
    assert_eq!(key("What is 4 * 3 + 2?"), expected);
    assert_eq!(key("What is 3 * 4 + 2?"), expected);
}

#[test]
fn one_fifth_is_held_out() {
    let keys = (0..200).flat_map(|a| (0..200).map(move |b| format!("+{a} -{b}")));
    let held_out = keys.filter(|key| split_of(key) == Split::Test).count() as f64;
    // Within five standard deviations of a fair draw.
    assert!((held_out - 8000.0).abs() < 400.0, "{held_out}");
}

#[test]
fn answers_are_right() {
    for operands in [2, 3, 5] {
        let mut options = every_operation();
        options.operands = operands;
        if operands > 2 {
            options.operations.retain(|operation| *operation != Operation::Divide);
        }
        options.phrasings = vec!["{expression}".into()];
        let task = arithmetic(options);
        for index in 0..3000 {
            let problem = task.generate(3, Split::Train, index);
            let value = expression::evaluate(&problem.question, &mut Budget::new(1000)).unwrap();
            assert_eq!(value, Rational::from(problem.answer.parse::<i64>().unwrap()), "{}", problem.question);
            assert!(value.numerator() >= 0);
        }
    }
    let task = TaskConfig::WordProblems(every_kind()).build().unwrap();
    for index in 0..3000 {
        let problem = task.generate(3, Split::Test, index);
        assert!(!problem.question.contains(['{', '}']), "{}", problem.question);
        let (numbers, operation) = visible(&problem);
        // `visible` sorts the operands of sums and products only.
        let [a, b] = numbers[..] else { panic!("{}", problem.question) };
        let answer = match operation {
            "+" => a + b,
            "-" => a - b,
            "*" => a * b,
            "/" => a / b,
            _ => unreachable!(),
        };
        assert_eq!(problem.answer, answer.to_string(), "{}", problem.question);
    }
}

#[test]
fn a_problem_is_a_function_of_seed_split_and_index() {
    let task = arithmetic(ArithmeticOptions::default());
    let questions = |seed, split| (0..50).map(|index| task.generate(seed, split, index).question).collect::<Vec<_>>();
    assert_eq!(questions(1, Split::Train), questions(1, Split::Train));
    assert_ne!(questions(1, Split::Train), questions(2, Split::Train));
    assert_ne!(task.generate(1, Split::Train, 5), task.generate(1, Split::Train, 5 + (1 << 32)));
    // Frozen: a change of these lines changes every recorded run.
    let expected = [
        "What is 39 plus 7?",
        "What is 46 plus 37? Reply with only the number.",
        "What is 36 plus 18? Reply with only the number.",
    ];
    assert_eq!(questions(1, Split::Train)[..3], expected);
}

#[test]
fn a_row_has_prompt_answer_and_kind() {
    let options = ArithmeticOptions { system: Some("Answer with a number.".into()), ..Default::default() };
    let problem = arithmetic(options).generate(1, Split::Train, 0);
    let columns = problem.columns();
    assert_eq!(columns["prompt"][0]["role"], "system");
    assert_eq!(columns["prompt"][1]["role"], "user");
    assert_eq!(columns["prompt"][1]["content"], problem.question.as_str());
    assert_eq!(columns["answer"], problem.answer.as_str());
    assert_eq!(columns["kind"], problem.kind);
}

#[test]
fn arithmetic_reads_in_signs_and_in_words() {
    let phrasings = vec!["{expression} is {words}".into()];
    let questions = |options| {
        let task = arithmetic(ArithmeticOptions { phrasings: Clone::clone(&phrasings), ..options });
        (0..40).map(|index| task.generate(1, Split::Train, index).question).collect::<Vec<_>>()
    };
    for question in questions(every_operation()) {
        let (signs, words) = question.split_once(" is ").unwrap();
        let spoken = [("+", "plus"), ("-", "minus"), ("*", "times"), ("/", "divided by")];
        assert_eq!(spoken.iter().fold(signs.to_owned(), |text, (sign, word)| text.replace(sign, word)), words);
    }
}

#[test]
fn impossible_options_are_refused() {
    let refused = |change: &dyn Fn(&mut ArithmeticOptions)| {
        let mut options = ArithmeticOptions::default();
        change(&mut options);
        TaskConfig::Arithmetic(options).build().err().unwrap().to_string()
    };
    assert!(refused(&|o| o.operations.clear()).contains("operations is empty"));
    assert!(refused(&|o| o.operands = 1).contains("operands is 1, expected 2 to 8"));
    assert!(refused(&|o| o.first = [5, 4]).contains("first is [5, 4]"));
    assert!(refused(&|o| o.others = [-1, 4]).contains("others is [-1, 4]"));
    assert!(refused(&|o| o.factors = [0, 4]).contains("factors is [0, 4]"));
    assert!(refused(&|o| o.phrasings = vec!["hello".into()]).contains("has neither {expression} nor {words}"));
    let single = |o: &mut ArithmeticOptions| (o.operations, o.first, o.others) = (vec![Operation::Add], [3, 3], [4, 4]);
    assert!(refused(&single).contains("too few problems"));
    assert!(refused(&|o| (o.operands, o.operations) = (3, vec![Operation::Divide])).contains("needs operands = 2"));
}

#[test]
fn near_misses_are_wrong_near_and_the_same_every_time() {
    let at = |answer: &str, index| near_miss(answer, Random::new(3, Purpose::Mistake).prompt(index));
    for answer in ["0", "7", "42", "-42", "100", "1331", "9223372036854775807", "-9223372036854775808"] {
        let right: i128 = answer.parse().unwrap();
        let found: Vec<String> = (0..200).map(|index| at(answer, index)).collect();
        assert_eq!(found, (0..200).map(|index| at(answer, index)).collect::<Vec<_>>());
        for wrong in &found {
            let number: i128 = wrong.parse().unwrap();
            assert!(number != right && number * right >= 0, "{wrong} for {answer}");
        }
        let distances = found.iter().map(|wrong| (wrong.parse::<i128>().unwrap() - right).abs());
        assert!(distances.filter(|distance| *distance <= 10).count() >= 100, "{answer}");
    }
    assert!((0..50).map(|index| at("1331", index)).any(|wrong| wrong == "3131"), "digits change places");
    assert_eq!(at("seven", 0), "seven?");
}
