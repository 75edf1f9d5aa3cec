//! Environments: perfect play, no leakage, determinism, and turns that no sane player would make.

use std::collections::{BTreeMap, HashSet};

use posttrain_envs::environment::text_game::Style;
use posttrain_envs::environment::tools::{Declare, Kind};
use posttrain_envs::environment::{
    EPISODE_COLUMN, Environment, EnvironmentConfig, EpisodeId, TextGameOptions, ToolsOptions, Trace, Transition,
    demonstration, episode_of, row,
};
use posttrain_envs::{Split, Status};
use proptest::prelude::*;

fn tools(options: ToolsOptions) -> Box<dyn Environment> {
    EnvironmentConfig::Tools(options).build().unwrap()
}

fn game(options: TextGameOptions) -> Box<dyn Environment> {
    EnvironmentConfig::TextGame(options).build().unwrap()
}

/// Environments with unlike options.
fn environments() -> Vec<Box<dyn Environment>> {
    let hard = TextGameOptions { rooms: [6, 9], doors: 4, contained: 1.0, max_turns: 60, ..Default::default() };
    vec![
        tools(ToolsOptions::default()),
        tools(ToolsOptions {
            size: 12,
            evidence: 0.4,
            place: posttrain_envs::verify::Place::Tag,
            ..Default::default()
        }),
        game(TextGameOptions::default()),
        game(TextGameOptions { progress: 0.0, ..hard.clone() }),
        game(TextGameOptions { style: Style::Brief, rooms: [3, 6], doors: 2, progress: 1.0, ..Default::default() }),
    ]
}

fn train(index: u64) -> EpisodeId {
    EpisodeId { seed: 1, split: Split::Train, index }
}

/// Plays turns until the end; the transitions.
fn play(environment: &mut dyn Environment, episode: EpisodeId, turns: &[String]) -> Vec<Transition> {
    environment.reset(episode);
    let mut played = Vec::new();
    for turn in turns {
        played.push(environment.step(turn));
        if played.last().unwrap().done {
            break;
        }
    }
    played
}

#[test]
fn perfect_play_earns_one_in_every_episode() {
    for mut environment in environments() {
        for split in [Split::Train, Split::Test] {
            for index in 0..200 {
                let episode = EpisodeId { seed: 7, split, index };
                environment.reset(episode);
                let turns = environment.demonstration();
                let played = play(&mut *environment, episode, &turns);
                assert_eq!(played.len(), turns.len(), "{}: {turns:?}", environment.name());
                let mut trace = Trace::default();
                played.iter().for_each(|transition| trace.push(transition));
                let score = trace.score();
                assert_eq!(score.status, Status::Ok, "{}: {turns:?}, {played:?}", environment.name());
                assert!((score.value - 1.0).abs() < 1e-12, "{}", score.value);
                assert!(score.turns.iter().all(|turn| turn.failed_calls == 0));
                assert!(played[..turns.len() - 1].iter().all(|transition| !transition.observations.is_empty()));
            }
        }
    }
}

#[test]
fn an_episode_follows_from_its_numbers() {
    for (mut first, mut second) in environments().into_iter().zip(environments()) {
        let mut seen = HashSet::new();
        for index in 0..50 {
            let episode = train(index);
            let problem = first.reset(episode);
            // The second plays others in between, and in another order.
            second.reset(train(99 - index));
            second.step("hello");
            assert_eq!(second.reset(episode), problem);
            let turns = first.demonstration();
            assert_eq!(play(&mut *first, episode, &turns), play(&mut *second, episode, &turns));
            seen.insert((problem.question, turns));
        }
        assert!(seen.len() > 40, "{} different episodes of 50", seen.len());
    }
}

#[test]
fn nothing_of_the_held_out_split_occurs_in_training() {
    // Names of people, towns and companies: all words with a capital inside a sentence, which the documents hold.
    let mut environment = tools(ToolsOptions { size: 8, results: 20, ..Default::default() });
    let mut names: BTreeMap<bool, HashSet<String>> = BTreeMap::new();
    for index in 0..300 {
        for split in [Split::Train, Split::Test] {
            environment.reset(EpisodeId { seed: index % 3, split, index });
            for query in ["lives in", "inhabitants", "employs people", "started by", "crate costs", "seat"] {
                let call = format!(
                    "<tool_call>{{\"name\": \"search\", \"arguments\": {{\"query\": \"{query}\"}}}}</tool_call>"
                );
                for document in environment.step(&call).observations[0].lines() {
                    let text = document.trim_end_matches('.').replace("A crate made by ", "");
                    let parts = [
                        " lives in ",
                        " has its seat in ",
                        " was started by ",
                        " was founded in ",
                        " was born in ",
                        " has ",
                        " employs ",
                        " costs ",
                    ];
                    let cut = parts.iter().find_map(|part| text.split_once(part)).unwrap();
                    let named = |name: &str| !name.chars().any(|c| c.is_ascii_digit());
                    let found = [cut.0, cut.1].into_iter().filter(|name| named(name)).map(str::to_owned);
                    names.entry(split == Split::Test).or_default().extend(found);
                }
            }
        }
    }
    let common: Vec<&String> = names[&true].intersection(&names[&false]).collect();
    assert!(common.is_empty(), "{common:?}");
    assert!(names[&true].len() > 300 && names[&false].len() > 300);

    let mut environment = game(TextGameOptions::default());
    let mut keys = [HashSet::new(), HashSet::new()];
    for index in 0..2000 {
        for (split, keys) in [Split::Train, Split::Test].into_iter().zip(&mut keys) {
            keys.insert(environment.reset(EpisodeId { seed: index % 5, split, index }).key);
        }
    }
    assert_eq!(keys[0].intersection(&keys[1]).count(), 0);
    assert!(keys[1].len() > 500);
}

#[test]
fn tools_answer_calls_and_failures_are_told_to_the_model() {
    let mut environment = tools(ToolsOptions { kinds: vec![Kind::Cost], evidence: 0.5, ..Default::default() });
    let call = |name: &str, argument: &str, value: &str| {
        format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {{\"{argument}\": \"{value}\"}}}}\n</tool_call>")
    };
    let problem = environment.reset(train(0));
    let calculated = environment.step(&call("calculator", "expression", "(1/3 + 1/6) * 2^10"));
    assert_eq!(calculated, Transition { calls: 1, ..Transition::next("512".into(), 0.0, Status::Ok) });

    let failures = [
        (call("calculator", "expression", "1/0"), "error: calculator: division by zero", Status::Wrong),
        (
            call("calculator", "expression", "two"),
            "error: calculator: not an arithmetic expression (at byte 0)",
            Status::Wrong,
        ),
        (call("calculator", "query", "1"), "error: calculator: the argument \"expression\" is missing", Status::Wrong),
        (
            call("browser", "url", "x"),
            "error: there is no tool \"browser\"; there are search and calculator",
            Status::Wrong,
        ),
        ("<tool_call>{\"nam</tool_call>".into(), "error: the tool call is not a JSON object", Status::Malformed),
    ];
    for (turn, expected, status) in failures {
        environment.reset(train(0));
        let transition = environment.step(&turn);
        assert!(transition.observations[0].starts_with(expected), "{:?}", transition.observations);
        assert_eq!((transition.status, transition.calls, transition.failed_calls), (status, 1, 1));
        assert!(!transition.done && transition.reward == 0.0);
    }
    // Several calls of a turn are answered one by one, and a flood is cut off.
    environment.reset(train(0));
    let turn = format!("{} and {}", call("calculator", "expression", "1+1"), call("search", "query", "zebra"));
    assert_eq!(environment.step(&turn).observations, ["2", "no document fits"]);
    let flood = environment.step(&call("calculator", "expression", "1").repeat(100));
    assert_eq!((flood.observations.len(), flood.calls, flood.failed_calls), (9, 100, 92));

    // The needed document pays once, the right answer the rest; a wrong one nothing.
    environment.reset(train(0));
    let search = &environment.demonstration()[0];
    assert_eq!(environment.step(search).reward, 0.5);
    assert_eq!(environment.step(search).reward, 0.0);
    let end = environment.step(&format!("It is {}.", problem.answer));
    assert_eq!(end, Transition::end(0.5, Status::Ok));
    assert_eq!(environment.step("again"), Transition::end(0.0, Status::Wrong));
    for (answer, status) in [("-1", Status::Wrong), ("no idea", Status::Malformed), ("", Status::Malformed)] {
        environment.reset(train(0));
        assert_eq!(environment.step(answer), Transition::end(0.0, status));
    }
}

#[test]
fn every_episode_ends() {
    let nonsense = ["<tool_call>", "look", "go nowhere", "go north"];
    for mut environment in environments() {
        for say in nonsense {
            for index in 0..20 {
                environment.reset(train(index));
                let turns = (1..=1000).find(|_| environment.step(say).done);
                assert!(turns.is_some_and(|turns| turns <= 60), "{}: {say}", environment.name());
            }
        }
    }
    let mut environment = tools(ToolsOptions { max_turns: 2, ..Default::default() });
    environment.reset(train(0));
    assert!(!environment.step("<tool_call>").done);
    let last = environment.step("<tool_call>");
    assert!(last.done && last.status == Status::Timeout);
}

#[test]
fn the_game_understands_the_ways_people_write() {
    let mut environment = game(TextGameOptions { rooms: [5, 5], doors: 1, contained: 1.0, ..Default::default() });
    for index in 0..100 {
        environment.reset(train(index));
        for turn in environment.demonstration() {
            let variants = [
                turn.clone(),
                turn.to_uppercase(),
                format!("I should hurry.\n\n> {turn}.\n"),
                turn.replace("go ", ""),
                turn.replace("go ", "walk to the ")
                    .replace("open ", "open the ")
                    .replace("unlock ", "unlock the door to the "),
                turn.replace("take ", "pick up the "),
                turn.replace("go ", "").chars().take(if turn.starts_with("go ") { 1 } else { 99 }).collect(),
            ];
            let before = environment.demonstration().len();
            let step = environment.step(&variants[index as usize % variants.len()]);
            assert_eq!(step.status, Status::Ok, "{variants:?}");
            let left = if step.done { 0 } else { environment.demonstration().len() };
            assert_eq!(left + 1, before, "{variants:?}");
        }
    }
}

#[test]
fn the_game_pays_for_progress_and_takes_it_back() {
    let mut environment = game(TextGameOptions { rooms: [4, 4], doors: 0, contained: 0.0, ..Default::default() });
    let episode = (0..100)
        .map(train)
        .find(|episode| {
            environment.reset(*episode);
            environment.demonstration().len() >= 3
        })
        .unwrap();
    let question = environment.reset(episode).question;
    assert!(question.starts_with("You are in the ") && question.contains("Ways out: "), "{question}");
    let turns = environment.demonstration();
    let share = 0.5 / turns.len() as f64;
    let first = environment.step(&turns[0]);
    assert!((first.reward - share).abs() < 1e-12);
    let back = match turns[0].as_str() {
        "go north" => "go south",
        "go south" => "go north",
        "go east" => "go west",
        _ => "go east",
    };
    assert!((environment.step(back).reward + share).abs() < 1e-12);
    let nothing = environment.step("sing");
    assert_eq!((nothing.reward, nothing.status), (0.0, Status::Malformed));
    assert!(nothing.observations[0].starts_with("That is not a command. You are in the "));
    assert_eq!(environment.step("take moon").status, Status::Wrong);
}

#[test]
fn rows_and_demonstrations_are_what_data_sets_hold() {
    let mut environment = tools(ToolsOptions { declare: Declare::Template, ..Default::default() });
    let columns = row(&mut *environment, train(4));
    assert_eq!(episode_of(&columns), Some(train(4)));
    assert_eq!(columns["tools"].as_array().unwrap().len(), 2);
    assert_eq!(columns["prompt"][1]["role"], "user");
    assert!(!columns["prompt"][0]["content"].as_str().unwrap().contains("<tools>"));
    assert!(columns.contains_key(EPISODE_COLUMN));
    let messages = demonstration(&mut *environment, train(4));
    let roles: Vec<&str> = messages.as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(roles.first(), Some(&"assistant"));
    assert_eq!(roles.last(), Some(&"assistant"));
    assert!(roles.windows(2).all(|pair| pair[0] != pair[1]), "{roles:?}");
    assert!(roles.contains(&"tool"));
    let system = tools(ToolsOptions::default());
    assert!(system.tools().is_empty());
    assert_eq!(episode_of(&Default::default()), None);
}

#[test]
fn impossible_options_are_refused() {
    let refused = |config: EnvironmentConfig| config.build().err().unwrap().to_string();
    let game = |options: TextGameOptions| refused(EnvironmentConfig::TextGame(options));
    let tools = |options: ToolsOptions| refused(EnvironmentConfig::Tools(options));
    assert_eq!(tools(ToolsOptions { kinds: vec![], ..Default::default() }), "environment tools: kinds is empty");
    assert!(tools(ToolsOptions { size: 1, ..Default::default() }).ends_with("size is 1, expected 2 to 50"));
    assert!(tools(ToolsOptions { evidence: 2.0, ..Default::default() }).ends_with("evidence is 2, expected 0 to 1"));
    assert!(game(TextGameOptions { rooms: [1, 4], ..Default::default() }).contains("rooms is [1, 4]"));
    assert!(game(TextGameOptions { doors: 5, ..Default::default() }).contains("doors is 5"));
    assert!(game(TextGameOptions { progress: f64::NAN, ..Default::default() }).contains("progress is NaN"));
    assert!(game(TextGameOptions { max_turns: 0, ..Default::default() }).contains("max_turns is 0"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is said, a step gives finite rewards, and the rewards of a game never exceed 1 in sum.
    #[test]
    fn no_turn_breaks_an_environment(turns in proptest::collection::vec("(<tool_call>)?[\\PC\n]{0,40}(\\{\"name\": \"search\", \"arguments\": \\{\"query\": \"[a-z ]*\"\\}\\})?(</tool_call>)?|go (north|south|east|west)|[tolun]|take|open|unlock", 1..30), index in 0u64..50) {
        for mut environment in environments() {
            environment.reset(train(index));
            let mut total = 0.0;
            for turn in &turns {
                let transition = environment.step(turn);
                prop_assert!(transition.reward.is_finite());
                prop_assert!(transition.failed_calls <= transition.calls);
                prop_assert!(transition.done || !transition.observations.is_empty());
                total += transition.reward;
                prop_assert!(total <= 1.0 + 1e-9);
                if transition.done {
                    break;
                }
            }
        }
    }
}
