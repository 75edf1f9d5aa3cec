//! `posttrain eval personalized`: how much users disagree, and what models of their preferences are worth to each of them.
//!
//! Models are judged by the scores they gave: any method, trained anywhere, writes a file of them. The measures are those of
//! [`mod@eval::personalization`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use eval::personalization::{
    Descriptors, Facets, Gain, Label, Outcome, Tax, accuracies, descriptors, facets, gain, macro_accuracy,
    normalised_gap, tax,
};
use serde::Serialize;
use serde_json::Value;

use crate::cli::Personalized as Arguments;
use crate::failure::Failure;
use crate::lines;
use crate::terminal::print;

/// What a preference has to look like.
const PREFERENCE: &str = "a row is {\"user\": \"ada\", \"pair\": \"p17\", \"preferred\": 1}, or {\"skill\": \"safety\", \"pair\": \"s3\", \"preferred\": 2} for everybody";
/// What a score has to look like.
const SCORE: &str = "a row is {\"user\": \"ada\", \"pair\": \"p17\", \"scores\": [0.3, -1.2]}; without `user` it is meant for everybody, \
    and with `pairs_seen` it comes from a model that has seen so many of the user's pairs";

/// What is printed with `--json`.
#[derive(Serialize)]
struct Found {
    users: Vec<String>,
    descriptors: Descriptors,
    reference: String,
    methods: BTreeMap<String, Method>,
}

/// One method.
#[derive(Default, Serialize)]
struct Method {
    facets: Option<Facets>,
    /// Against the reference; absent for the reference itself.
    gain: Option<Gain>,
    /// By skill.
    tax: BTreeMap<String, Tax>,
    /// By the number of a user's pairs that were seen.
    adapted: BTreeMap<u64, Adapted>,
}

/// Accuracy with few of a user's pairs.
#[derive(Serialize)]
struct Adapted {
    accuracy: f64,
    /// Of the way from the reference to `--own`; absent without it.
    normalised_gap: Option<f64>,
}

/// What the file of preferences says.
struct Preferences {
    users: Vec<String>,
    pairs: BTreeMap<String, usize>,
    labels: Vec<Label>,
    /// By skill: pairs and whether the first answer is the better one.
    skills: BTreeMap<String, Vec<(usize, bool)>>,
}

/// The scores of a file.
#[derive(Default)]
struct Scores {
    /// By number of pairs seen (0 where the file does not say), user (`None` for everybody) and pair.
    all: BTreeMap<(u64, Option<usize>, usize), [f64; 2]>,
}

impl Scores {
    fn of(&self, seen: u64, user: usize, pair: usize) -> Option<[f64; 2]> {
        self.all.get(&(seen, Some(user), pair)).or_else(|| self.all.get(&(seen, None, pair))).copied()
    }

    /// The outcomes of all labels that there are scores for.
    fn outcomes(&self, seen: u64, labels: &[Label]) -> Vec<Outcome> {
        labels.iter().filter_map(|label| Some(Outcome::new(*label, self.of(seen, label.user, label.pair)?))).collect()
    }
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    let preferences = read_preferences(&arguments.preferences)?;
    let users = preferences.users.len();
    let mut scores: BTreeMap<String, Scores> = BTreeMap::new();
    let mut order = Vec::new();
    for named in &arguments.scores {
        let Some((name, path)) = named.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty())
        else {
            let failure = Failure::usage(format!("expected a method and its file in `--scores {named}`"));
            return Err(failure.hint("for example: --scores vanilla=vanilla.jsonl"));
        };
        if scores.insert(name.to_owned(), read_scores(Path::new(path), &preferences)?).is_some() {
            return Err(Failure::usage(format!("the method `{name}` is given twice")));
        }
        order.push(name.to_owned());
    }
    let find = |flag: &str, name: &String| {
        scores.get(name).ok_or_else(|| {
            Failure::usage(format!("there are no scores of `{name}`"))
                .hint(format!("`{flag}` names one of {}", order.join(", ")))
        })
    };
    let reference = arguments.reference.clone().unwrap_or_else(|| order[0].clone());
    let shared = find("--reference", &reference)?;
    let own = arguments.own.as_ref().map(|own| find("--own", own)).transpose()?;
    // Where a pair was asked again, what is to be predicted is each word.
    let described = descriptors(users, &preferences.labels);
    let mut methods = BTreeMap::new();
    for (name, scores) in &scores {
        let outcomes = scores.outcomes(0, &preferences.labels);
        let (resamples, seed) = (arguments.resamples, arguments.seed);
        let mut method = Method::default();
        if !outcomes.is_empty() {
            method.facets = Some(facets(users, &described.minority, &outcomes, resamples, seed));
            if *name != reference {
                let theirs = shared.outcomes(0, &preferences.labels);
                method.gain = Some(gain(users, &outcomes, &theirs, resamples, seed));
            }
        }
        for (skill, pairs) in &preferences.skills {
            let of_user = |scores: &Scores, user: usize| {
                let outcome = |&(pair, first): &(usize, bool)| {
                    Some(Outcome::new(Label { user, pair, first }, scores.of(0, user, pair)?))
                };
                accuracies(users, &pairs.iter().filter_map(outcome).collect::<Vec<_>>())[user]
            };
            let base: Vec<f64> = (0..users).filter_map(|user| of_user(shared, user)).collect();
            let own: Vec<Option<f64>> = (0..users).map(|user| of_user(scores, user)).collect();
            if !base.is_empty()
                && let Some(found) = tax(eval::metrics::mean(&base), &own)
            {
                method.tax.insert(skill.clone(), found);
            }
        }
        let seen: BTreeSet<u64> = scores.all.keys().map(|(seen, _, _)| *seen).filter(|seen| *seen > 0).collect();
        for seen in seen {
            let outcomes = scores.outcomes(seen, &preferences.labels);
            if !outcomes.is_empty() {
                let accuracy = macro_accuracy(users, &outcomes);
                // The way from the reference to the user's own model, on what was asked of the adapted one.
                let asked: BTreeSet<(usize, usize)> =
                    outcomes.iter().map(|outcome| (outcome.user, outcome.pair)).collect();
                let end = |scores: &Scores| {
                    let mut outcomes = scores.outcomes(0, &preferences.labels);
                    outcomes.retain(|outcome| asked.contains(&(outcome.user, outcome.pair)));
                    macro_accuracy(users, &outcomes)
                };
                let normalised_gap = own.and_then(|own| normalised_gap(accuracy, end(shared), end(own)));
                method.adapted.insert(seen, Adapted { accuracy, normalised_gap });
            }
        }
        methods.insert(name.clone(), method);
    }
    let found = Found { users: preferences.users, descriptors: described, reference, methods };
    match arguments.json {
        true => {
            let text = serde_json::to_string_pretty(&found)
                .map_err(|error| Failure::new(format!("the result cannot be written: {error}")))?;
            print(text + "\n")
        }
        false => print(table(&found, &order)),
    }
}

/// A name in a column: a text or a number.
fn name(row: &Value, column: &str) -> Option<String> {
    match &row[column] {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn read_preferences(path: &Path) -> Result<Preferences, Failure> {
    let mut numbers: BTreeMap<String, usize> = BTreeMap::new();
    let mut found =
        Preferences { users: Vec::new(), pairs: BTreeMap::new(), labels: Vec::new(), skills: BTreeMap::new() };
    for (source, row) in lines::read(path, PREFERENCE)? {
        let wrong = |reason: String| Failure::new(format!("{source}: {reason}")).hint(PREFERENCE);
        let pair = name(&row, "pair").ok_or_else(|| wrong("expected a name in column `pair`".into()))?;
        let next = found.pairs.len();
        let pair = *found.pairs.entry(pair).or_insert(next);
        let first = match row["preferred"].as_u64() {
            Some(1) => true,
            Some(2) => false,
            _ => return Err(wrong(format!("expected 1 or 2 in column `preferred`, got {}", row["preferred"]))),
        };
        match (name(&row, "skill"), name(&row, "user")) {
            (Some(skill), _) => found.skills.entry(skill).or_default().push((pair, first)),
            (None, Some(user)) => {
                let next = found.users.len();
                let user = *numbers.entry(user.clone()).or_insert_with(|| {
                    found.users.push(user);
                    next
                });
                found.labels.push(Label { user, pair, first });
            }
            (None, None) => return Err(wrong("expected a name in column `user`, or in `skill`".into())),
        }
    }
    match found.users.is_empty() {
        true => Err(Failure::new(format!("{}: no row has a user", path.display())).hint(PREFERENCE)),
        false => Ok(found),
    }
}

fn read_scores(path: &Path, preferences: &Preferences) -> Result<Scores, Failure> {
    let mut found = Scores::default();
    for (source, row) in lines::read(path, SCORE)? {
        let wrong = |reason: String| Failure::new(format!("{source}: {reason}")).hint(SCORE);
        let pair = name(&row, "pair").ok_or_else(|| wrong("expected a name in column `pair`".into()))?;
        let Some(&pair) = preferences.pairs.get(&pair) else {
            return Err(wrong(format!("the preferences have no pair `{pair}`")));
        };
        let user = match name(&row, "user") {
            None => None,
            Some(user) => {
                let number = preferences.users.iter().position(|known| *known == user);
                Some(number.ok_or_else(|| wrong(format!("the preferences have no user `{user}`")))?)
            }
        };
        let scores = row["scores"].as_array().filter(|scores| scores.len() == 2);
        let numbers = scores.and_then(|scores| Some([scores[0].as_f64()?, scores[1].as_f64()?]));
        let scores =
            numbers.ok_or_else(|| wrong(format!("expected two numbers in column `scores`, got {}", row["scores"])))?;
        let seen = match &row["pairs_seen"] {
            Value::Null => 0,
            seen => seen
                .as_u64()
                .filter(|seen| *seen > 0)
                .ok_or_else(|| wrong(format!("expected a whole number above 0 in column `pairs_seen`, got {seen}")))?,
        };
        if found.all.insert((seen, user, pair), scores).is_some() {
            return Err(wrong("this user, pair and number of pairs seen has scores already".into()));
        }
    }
    Ok(found)
}

/// A share in per cent.
fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}

/// The report in Markdown.
fn table(found: &Found, order: &[String]) -> String {
    let described = &found.descriptors;
    let named = |users: &[usize]| users.iter().map(|&user| &found.users[user][..]).collect::<Vec<_>>().join(", ");
    let mut text = String::from("## How much users disagree\n\n| | |\n| --- | --- |\n");
    for (name, value) in [
        ("users", found.users.len().to_string()),
        ("pairs of two users or more", described.shared_pairs.to_string()),
        ("divergence, %", percent(described.divergence)),
        ("high divergence, %", percent(described.high_divergence)),
        ("tied pairs", described.ties.to_string()),
        ("consistency, mean %", percent(eval::metrics::mean(&described.consistency))),
        ("majority accuracy, mean %", percent(eval::metrics::mean(&described.majority_accuracy))),
        ("room for personalisation, points", percent(described.room)),
        ("minority users", if described.minority.is_empty() { "none".into() } else { named(&described.minority) }),
    ] {
        let _ = writeln!(text, "| {name} | {value} |");
    }
    let skills: Vec<&String> =
        found.methods.values().next().map(|method| method.tax.keys().collect()).unwrap_or_default();
    let _ = write!(
        text,
        "\n## Methods\n\nAccuracies in %, their 95 % intervals over pairs; gains and taxes in points against {}.\n\n\
         | method | accuracy | worst user | minority users | best - worst | gain |",
        found.reference
    );
    for skill in &skills {
        let _ = write!(text, " {skill} tax, mean | largest |");
    }
    let _ = write!(text, "\n| --- | --- | --- | --- | --- | --- |{}\n", " --- | --- |".repeat(skills.len()));
    let absent = || "-".to_owned();
    for (name, method) in order.iter().filter_map(|name| Some((name, found.methods.get(name)?))) {
        let _ = match &method.facets {
            Some(facets) => write!(
                text,
                "| {name} | {} [{}, {}] | {} | {} | {} | {} |",
                percent(facets.accuracy),
                percent(facets.interval.low),
                percent(facets.interval.high),
                percent(facets.worst),
                facets.minority.map_or_else(absent, percent),
                percent(facets.gap),
                method.gain.as_ref().map_or_else(absent, |gain| format!(
                    "{} [{}, {}]",
                    percent(gain.accuracy),
                    percent(gain.interval.low),
                    percent(gain.interval.high)
                ))
            ),
            None => write!(text, "| {name} | - | - | - | - | - |"),
        };
        for skill in &skills {
            let _ = match method.tax.get(*skill) {
                Some(tax) => write!(text, " {} | {} |", percent(tax.mean), percent(tax.largest)),
                None => write!(text, " - | - |"),
            };
        }
        text.push('\n');
    }
    if found.methods.values().any(|method| !method.adapted.is_empty()) {
        text += "\n## Few pairs of a user\n\n| method | pairs | accuracy | of the way from the reference to the user's own model |\n| --- | --- | --- | --- |\n";
        for (name, method) in order.iter().filter_map(|name| Some((name, found.methods.get(name)?))) {
            for (seen, adapted) in &method.adapted {
                let way = adapted.normalised_gap.map_or_else(absent, |gap| format!("{gap:.2}"));
                let _ = writeln!(text, "| {name} | {seen} | {} | {way} |", percent(adapted.accuracy));
            }
        }
    }
    text
}
