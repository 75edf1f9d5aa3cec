//! Personalised preference learning, judged in several respects at once.
//!
//! "When Personalization Meets Reality: A Multi-Faceted Analysis of Personalized Preference Learning", Dong et al. 2025, arXiv 2502.19158: not a method
//! but a protocol. Eight ways to personalise a reward model meet populations that disagree little or much, and are judged by performance,
//! fairness to minority users, what they cost in skills that should not depend on the user, and how soon they serve a new user
//! ([`mod@eval::personalization`]).
//!
//! ```text
//! accuracy   Acc = mean_u share of u's test pairs on which r_u prefers what u prefers
//! tax        tax_c(u) = Acc_c(reference) - Acc_c(r_u)          skill c, reference trained on as many pairs
//! room       mean_u ( C_u - MV-ACC_u )
//! ```
//!
//! **Worlds** ([`world`]): three populations over answers of [`attribute_text`](mod@crate::worlds::attribute_text) (opposite couples; five
//! who mostly agree; six ordinary users and two unlike them) and three skills.
//!
//! **Experiment.** A small decoder imitates the world's answers and the sums of digits, and is frozen. Every method is a small network over its
//! embeddings ([`methods`]). An arm is a method on all populations: it learns from all users' pairs, and from a hundred of each; then
//! from all users but one, to serve that one with few of her pairs, over five draws of them.
//!
//! Deviations from the paper:
//! 1. The backbone is frozen for every method; the paper trains LoRA adapters. A user's words (conditional), soft prompt (P-RLHF) and latent
//!    (VPL) are therefore inputs of the network on top of it, not of the decoder. An embedding is the sum of the answer's hidden states over 16,
//!    the last of them, and two of the prompt's.
//! 2. Retrieval votes with similarities; no model is asked.
//! 3. Which eighth method the paper counts is not known to us: both the nearest user's model and the shared model trained on are here.
//! 4. The pool of pairs is shared by all users; users to whom both answers of a pair are equal have no label for it, so that they have
//!    fewer pairs than the pool.
//! 5. The noise of `tldr` follows from the consistency that its users should have, 85 to 90 %; the κ = 4 of the design of the miniature
//!    gives 59 %.
//! 6. VPL's encoder pools the difference that the order of a pair's answers makes, a step has several users, and its learning rate and GPO's warm up; GPO's
//!    contexts are given both ways round.
//! 7. A majority that is tied on every pair, as that of opposite couples is, counts as a coin: a majority accuracy of 1/2.

pub mod methods;
pub mod network;
pub mod world;

use std::collections::BTreeMap;

use base::{Purpose, Random};
use candle_core::{Device, Tensor};
use data::Example;
use eval::metrics::mean;
use eval::personalization::{Descriptors, Label, Outcome, accuracies, descriptors, facets, macro_accuracy, tax};
use kernels::Precision;
use model::decoder::{Decoder, PackedTokens, Workspace};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::methods::sft::{Sft, SftOptions};

use self::methods::{Choice, Embedded, Method, NetworkOptions, Task, method};
use self::world::{Population, SKILLS, Text, pool, skill};
use crate::error::{Error, Result};
use crate::experiment::{Experiment, Trial, open};
use crate::measurements::{Measurements, Seed};
use crate::system::{Arm, Bound, Claim, Figure, Role, System};
use crate::worlds::attribute_text::{self as attributes, Utility, digits};

/// The table.
pub const SYSTEM: System = System {
    name: "personalized",
    title: "Personalised preference learning in several respects",
    paper: "Dong et al. 2025, \"When Personalization Meets Reality: A Multi-Faceted Analysis of Personalized Preference Learning\", arXiv 2502.19158",
    summary: "what personalisation gains and costs depends on how much users disagree, and no one number says it",
    arms: ARMS,
    claims: CLAIMS,
    figures: FIGURES,
    tiny: include_str!("tiny.toml"),
    quick: include_str!("quick.toml"),
    readme: include_str!("README.md"),
    recipes: &["paper"],
    data: None,
    schema: || schemars::schema_for!(Personalized).to_value(),
    open: |settings| open::<Personalized>("personalized", settings),
};

const ARMS: &[Arm] = &[
    Arm::new("vanilla", Role::Baseline, "one reward model for everybody"),
    Arm::new("individual", Role::Baseline, "one for each user, from the user's pairs alone"),
    Arm::new("conditional", Role::Method, "one that is told who the user is"),
    Arm::new("p-rlhf", Role::Method, "a generic user, and what is different about each"),
    Arm::new("vpl", Role::Method, "a latent user, encoded from some of the user's pairs"),
    Arm::new("gpo", Role::Method, "a transformer over the user's pairs, learnt over users"),
    Arm::new("retrieval", Role::Method, "a vote of the user's most similar pairs"),
    Arm::new("nearest-user", Role::Method, "the model of the other user who agrees most"),
    Arm::new("fine-tuned", Role::Method, "the shared model, trained on for each user"),
];

/// The methods' accuracies on a population.
fn of_all(seed: &Seed<'_>, name: &str) -> Option<Vec<f64>> {
    ARMS.iter().map(|arm| seed.value(arm.name, name)).collect()
}

fn spread(seed: &Seed<'_>, name: &str) -> Option<f64> {
    let all = of_all(seed, name)?;
    Some(all.iter().copied().fold(f64::NEG_INFINITY, f64::max) - all.iter().copied().fold(f64::INFINITY, f64::min))
}

/// By how much `ours` leads `theirs`.
fn lead(seed: &Seed<'_>, ours: &str, theirs: &str, name: &str) -> Option<f64> {
    Some(seed.value(ours, name)? - seed.value(theirs, name)?)
}

/// The mean lead over the populations.
fn mean_lead(seed: &Seed<'_>, ours: &str, theirs: &str, name: &str) -> Option<f64> {
    let of = |population: Population| lead(seed, ours, theirs, &format!("{}_{name}", population.name()));
    Some(mean(&Population::ALL.into_iter().map(of).collect::<Option<Vec<f64>>>()?))
}

const CLAIMS: &[Claim] = &[
    Claim {
        id: "1a",
        statement: "methods are far apart where users disagree: accuracy on psoups, from the worst to the best",
        bound: Bound::AtLeast(0.25),
        measure: |seed| spread(seed, "psoups_accuracy"),
    },
    Claim {
        id: "1b",
        statement: "and close where they agree: the same on tldr",
        bound: Bound::AtMost(0.08),
        measure: |seed| spread(seed, "tldr_accuracy"),
    },
    Claim {
        id: "2a",
        statement: "the shared model fails minority users: its accuracy for the better served one",
        bound: Bound::AtMost(0.5),
        measure: |seed| seed.value("vanilla", "personal_minority_best"),
    },
    Claim {
        id: "2b",
        statement: "individual models serve them: accuracy for the worse served one",
        bound: Bound::AtLeast(0.8),
        measure: |seed| seed.value("individual", "personal_minority_worst"),
    },
    Claim {
        id: "2c",
        statement: "P-RLHF is in between or better: by how much it serves them better than the shared model",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "p-rlhf", "vanilla", "personal_minority"),
    },
    Claim {
        id: "3",
        statement: "with 100 pairs of each user P-RLHF is at least as good as individual models: by how much, mean over the populations",
        bound: Bound::AtLeast(0.0),
        measure: |seed| mean_lead(seed, "p-rlhf", "individual", "few_accuracy"),
    },
    Claim {
        id: "4a",
        statement: "individual models of minority users pay with safety: the smaller tax of the two",
        bound: Bound::AtLeast(0.1),
        measure: |seed| seed.value("individual", "personal_minority_safety_tax"),
    },
    Claim {
        id: "4b",
        statement: "those of the majority do not: distance of their mean tax from 0",
        bound: Bound::AtMost(0.05),
        measure: |seed| Some(seed.value("individual", "personal_majority_safety_tax")?.abs()),
    },
    Claim {
        id: "4c",
        statement: "nor do those of tldr's users",
        bound: Bound::AtMost(0.05),
        measure: |seed| Some(seed.value("individual", "tldr_safety_tax")?.abs()),
    },
    Claim {
        id: "5a",
        statement: "GPO serves a new user with 30 pairs better than an individual model does: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "gpo", "individual", "adapted_30"),
    },
    Claim {
        id: "5b",
        statement: "and better than the nearest user's model does",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "gpo", "nearest-user", "adapted_30"),
    },
    Claim {
        id: "6",
        statement: "descriptors have their analytic values: the largest distance of divergence, agreement and consistency over the populations",
        bound: Bound::AtMost(0.02),
        measure: |seed| seed.value("vanilla", "descriptor_error"),
    },
];

const ALL: &[&str] =
    &["vanilla", "individual", "conditional", "p-rlhf", "vpl", "gpo", "retrieval", "nearest-user", "fine-tuned"];

const FIGURES: &[Figure] = &[
    Figure {
        title: "Adaptation to a new user",
        x: "pairs of the user",
        y: "accuracy",
        curve: "adapted",
        arms: ALL,
        diagonal: false,
    },
    Figure {
        title: "Users of psoups: couples 0-1 humour, 2-3 brevity, 4-5 politeness",
        x: "user",
        y: "accuracy",
        curve: "psoups_users",
        arms: ALL,
        diagonal: false,
    },
    Figure {
        title: "Users of personal: 6 and 7 are the minority",
        x: "user",
        y: "accuracy",
        curve: "personal_users",
        arms: ALL,
        diagonal: false,
    },
    Figure {
        title: "Safety tax of the users of personal",
        x: "user",
        y: "tax",
        curve: "personal_safety_tax",
        arms: ALL,
        diagonal: false,
    },
];

/// Settings of the reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Personalized {
    /// Pairs of the pool that users judge and methods learn from.
    #[schemars(range(min = 10))]
    pub train_pairs: usize,
    /// Pairs of the pool to test on.
    #[schemars(range(min = 10))]
    pub test_pairs: usize,
    /// Pairs of each user where pairs are few.
    #[schemars(range(min = 1))]
    pub few_pairs: usize,
    /// Pairs of each skill.
    #[schemars(range(min = 1))]
    pub skill_pairs: usize,
    /// Answers that the backbone imitates, and as many sums.
    #[schemars(range(min = 1))]
    pub corpus: u32,
    /// How it does so.
    pub sft: SftOptions,
    /// The networks of all methods.
    pub network: NetworkOptions,
    /// Pairs of a new user.
    pub adaptation_pairs: Vec<usize>,
    /// Draws of them.
    #[schemars(range(min = 1))]
    pub draws: u32,
    /// Users of `personal` who are left out, one after the other: every so many-th.
    #[schemars(range(min = 1))]
    pub left_out_every: usize,
    /// Resamples of intervals.
    #[schemars(range(min = 1))]
    pub resamples: u32,
}

/// A population with what it says.
struct Users {
    population: Population,
    count: usize,
    labels: Vec<Label>,
    descriptors: Descriptors,
    /// What each user says of the pool's first part.
    train: Vec<Vec<Choice>>,
}

/// What all arms of a seed start from.
pub struct Start {
    pool: Embedded,
    /// The pool's test pairs, then those of the skills.
    probes: Embedded,
    populations: Vec<Users>,
    /// Accuracy of the reference model in each skill.
    reference: Vec<f64>,
    descriptor_error: f64,
}

impl Experiment for Personalized {
    type Start = Start;

    fn validate(&self) -> Result<()> {
        self.sft.validate().map_err(|error| error.within("sft"))?;
        let few = self.adaptation_pairs.iter().chain([&self.few_pairs]).any(|&count| count == 0);
        if few || self.left_out_every == 0 || self.draws == 0 {
            let reason =
                "expected at least one pair, draw and user in `adaptation_pairs`, `draws` and `left_out_every`".into();
            return Err(Error::Settings { system: "personalized", reason });
        }
        Ok(())
    }

    fn start(&self, trial: &Trial<'_>) -> Result<Start> {
        let seed = trial.seed;
        let tokenizer = attributes::tokenizer()?;
        let mut decoder = Decoder::random(attributes::model(), seed)?;
        let corpus: Vec<Example> =
            attributes::corpus(seed, self.corpus).into_iter().chain(digits::corpus(seed, self.corpus)).collect();
        let mut sft = Sft::new(self.sft.clone(), corpus)?;
        trial.fit(0, &mut sft, &mut decoder, &tokenizer, |_, _, _| Ok(()))?;
        decoder.prepare(Precision::F32);

        let pairs = pool(seed, self.train_pairs, self.test_pairs);
        let text = |(question, answers): &world::Pair| {
            answers.clone().map(|answer| Text { prompt: question.ids().to_vec(), answer })
        };
        let texts: Vec<[Text; 2]> = pairs.iter().map(text).collect();
        let skills = SKILLS.into_iter().flat_map(|name| skill(name, seed, self.skill_pairs));
        let asked: Vec<[Text; 2]> = texts[self.train_pairs..].iter().cloned().chain(skills).collect();
        let (mut pool, mut probes) = (embed(&decoder, &texts[..self.train_pairs])?, embed(&decoder, &asked)?);
        standardise(&mut pool, &mut probes)?;

        let users = |population: Population| {
            let labels = population.labels(seed, &pairs);
            let count = population.utilities(seed).len();
            let mut train = vec![BTreeMap::new(); count];
            for label in labels.iter().filter(|label| label.pair < self.train_pairs) {
                // Where a pair is asked again, the first word counts.
                train[label.user].entry(label.pair).or_insert(label.first);
            }
            let choices =
                |said: BTreeMap<usize, bool>| said.into_iter().map(|(pair, first)| Choice { pair, first }).collect();
            Users {
                population,
                count,
                descriptors: descriptors(count, &labels),
                labels,
                train: train.into_iter().map(choices).collect(),
            }
        };
        let populations: Vec<Users> = Population::ALL.into_iter().map(users).collect();
        let descriptor_error = populations
            .iter()
            .map(|users| descriptor_error(users, &users.population.probabilities(seed, &pairs)))
            .fold(0.0, f64::max);

        // The reference for taxes: a model of what everybody should want, from as many pairs as a user has.
        let shared = |(pair, (question, [first, second])): (usize, &world::Pair)| {
            let margin = Utility::GOLD.of(*question, first) - Utility::GOLD.of(*question, second);
            (margin != 0.0).then_some(Choice { pair, first: margin > 0.0 })
        };
        let shared: Vec<Choice> = pairs[..self.train_pairs].iter().enumerate().filter_map(shared).collect();
        let task = Task { pool: &pool, probes: &probes, options: &self.network, random: draws(seed) };
        let margins = methods::Individual.judge(task, None, &shared)?;
        let reference = SKILLS.iter().enumerate().map(|(index, _)| self.skill_accuracy(&margins, index)).collect();
        Ok(Start { pool, probes, populations, reference, descriptor_error })
    }

    fn run(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let mut measured = Measurements::default();
        let random = draws(trial.seed);
        let task = Task { pool: &start.pool, probes: &start.probes, options: &self.network, random };
        let unknown = || Error::Settings { system: "personalized", reason: format!("there is no method {arm}") };
        let own = (start.populations.len() * 2) as u64;
        for (index, users) in start.populations.iter().enumerate() {
            let name = users.population.name();
            let mut learner = method(arm).ok_or_else(unknown)?;
            learner.learn(task, &users.train)?;
            let judged = (0..users.count).map(|user| learner.judge(task, Some(user), &users.train[user]));
            let margins = judged.collect::<Result<Vec<_>>>()?;
            let outcomes = self.outcomes(users, &margins);
            self.record(start, users, &margins, &outcomes, trial.seed, &mut measured);
            if arm == "vpl" || arm == "gpo" {
                // With another user's pairs in place of one's own, a model that listens to them must do worse.
                let other = |user: usize| &users.train[(user + 1) % users.count];
                let judged = (0..users.count).map(|user| learner.judge(task, Some(user), other(user)));
                let outcomes = self.outcomes(users, &judged.collect::<Result<Vec<_>>>()?);
                measured.set(format!("{name}_accuracy_as_another"), macro_accuracy(users.count, &outcomes));
            }
            (trial.progress)(2 * index as u64 + 1, own);
            trial.go_on()?;

            let some =
                |(user, choices): (usize, &Vec<Choice>)| few(choices, self.few_pairs, random.prompt(user as u32), 0);
            let few: Vec<Vec<Choice>> = users.train.iter().enumerate().map(some).collect();
            let mut learner = method(arm).ok_or_else(unknown)?;
            learner.learn(task, &few)?;
            let judged = (0..users.count).map(|user| learner.judge(task, Some(user), &few[user]));
            let outcomes = self.outcomes(users, &judged.collect::<Result<Vec<_>>>()?);
            measured.set(format!("{name}_few_accuracy"), macro_accuracy(users.count, &outcomes));
            (trial.progress)(2 * index as u64 + 2, own);
            trial.go_on()?;
        }
        self.adapt(start, arm, task, trial, &mut measured)?;
        if arm == "vanilla" {
            measured.set("descriptor_error", start.descriptor_error);
            for users in &start.populations {
                let (name, found) = (users.population.name(), &users.descriptors);
                measured.set(format!("{name}_divergence"), found.divergence);
                measured.set(format!("{name}_high_divergence"), found.high_divergence);
                measured.set(format!("{name}_consistency"), mean(&found.consistency));
                measured.set(format!("{name}_majority_accuracy"), mean(&found.majority_accuracy));
                measured.set(format!("{name}_room"), found.room);
                measured.set(format!("{name}_minority_users"), found.minority.len() as f64);
            }
        }
        Ok(measured)
    }
}

/// The draws of a seed's methods.
fn draws(seed: u64) -> Random {
    Random::new(seed, Purpose::Shuffle).step(1)
}

/// Some of a user's choices, without replacement.
fn few(choices: &[Choice], count: usize, random: Random, draw: u32) -> Vec<Choice> {
    let order = random.sample(1000 + draw).permutation(choices.len());
    order.into_iter().take(count).map(|index| choices[index]).collect()
}

impl Personalized {
    /// The outcomes of the users' test pairs.
    fn outcomes(&self, users: &Users, margins: &[Vec<f64>]) -> Vec<Outcome> {
        let test = users.labels.iter().filter(|label| label.pair >= self.train_pairs);
        test.map(|&label| Outcome::new(label, [margins[label.user][label.pair - self.train_pairs], 0.0])).collect()
    }

    /// The accuracy of margins in a skill.
    fn skill_accuracy(&self, margins: &[f64], skill: usize) -> f64 {
        let first = self.test_pairs + skill * self.skill_pairs;
        let right = |margin: &f64| if *margin == 0.0 { 0.5 } else { f64::from(u8::from(*margin > 0.0)) };
        mean(&margins[first..first + self.skill_pairs].iter().map(right).collect::<Vec<_>>())
    }

    /// Writes down what a method is worth to a population.
    fn record(
        &self,
        start: &Start,
        users: &Users,
        margins: &[Vec<f64>],
        outcomes: &[Outcome],
        seed: u64,
        into: &mut Measurements,
    ) {
        let name = users.population.name();
        // Who is a minority belongs to the population, not to what a seed's noise makes of it.
        let minority: Vec<usize> = if users.population == Population::Personal { vec![6, 7] } else { Vec::new() };
        let found = facets(users.count, &minority, outcomes, self.resamples, seed);
        into.set(format!("{name}_accuracy"), found.accuracy);
        into.set(format!("{name}_accuracy_low"), found.interval.low);
        into.set(format!("{name}_accuracy_high"), found.interval.high);
        into.set(format!("{name}_worst"), found.worst);
        into.set(format!("{name}_gap"), found.gap);
        into.set(format!("{name}_deviation"), found.deviation);
        into.set_known(format!("{name}_minority"), found.minority);
        for (user, accuracy) in found.users.iter().enumerate() {
            if let Some(accuracy) = accuracy {
                into.point(&format!("{name}_users"), user as f64, *accuracy);
            }
        }
        let of_minority: Vec<f64> = minority.iter().filter_map(|&user| found.users[user]).collect();
        into.set_known(format!("{name}_minority_worst"), of_minority.iter().copied().reduce(f64::min));
        into.set_known(format!("{name}_minority_best"), of_minority.iter().copied().reduce(f64::max));
        for (skill, skill_name) in SKILLS.iter().enumerate() {
            let own: Vec<Option<f64>> =
                margins.iter().map(|margins| Some(self.skill_accuracy(margins, skill))).collect();
            let Some(found) = tax(start.reference[skill], &own) else { continue };
            into.set(format!("{name}_{skill_name}_tax"), found.mean);
            into.set(format!("{name}_{skill_name}_tax_largest"), found.largest);
            let of = |wanted: bool| {
                let users = found.users.iter().enumerate().filter(|(user, _)| minority.contains(user) == wanted);
                users.filter_map(|(_, tax)| *tax).collect::<Vec<f64>>()
            };
            if !minority.is_empty() {
                into.set_known(format!("{name}_minority_{skill_name}_tax"), of(true).into_iter().reduce(f64::min));
                into.set(format!("{name}_majority_{skill_name}_tax"), mean(&of(false)));
            }
            for (user, tax) in found.users.iter().enumerate() {
                if let Some(tax) = tax {
                    into.point(&format!("{name}_{skill_name}_tax"), user as f64, *tax);
                }
            }
        }
        if name == Population::Personal.name() {
            for (skill, skill_name) in SKILLS.iter().enumerate() {
                into.set(format!("reference_{skill_name}"), start.reference[skill]);
            }
        }
    }

    /// Leaves users out, one after the other, and serves each with few of her pairs.
    fn adapt(
        &self,
        start: &Start,
        arm: &str,
        task: Task<'_>,
        trial: &Trial<'_>,
        into: &mut Measurements,
    ) -> Result<()> {
        let Some(users) = start.populations.iter().find(|users| users.population == Population::Personal) else {
            return Ok(());
        };
        let mut accuracy: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for left_out in (0..users.count).step_by(self.left_out_every) {
            let Some(mut learner) = method(arm) else { return Ok(()) };
            let others: Vec<Vec<Choice>> =
                (0..users.count).filter(|user| *user != left_out).map(|user| users.train[user].clone()).collect();
            learner.learn(task, &others)?;
            for &count in &self.adaptation_pairs {
                for draw in 0..self.draws {
                    let choices = few(&users.train[left_out], count, task.random.prompt(left_out as u32), 1 + draw);
                    let mut margins = vec![Vec::new(); users.count];
                    margins[left_out] = learner.judge(task, None, &choices)?;
                    let labels =
                        users.labels.iter().filter(|label| label.user == left_out && label.pair >= self.train_pairs);
                    let outcomes: Vec<Outcome> = labels
                        .map(|&label| Outcome::new(label, [margins[left_out][label.pair - self.train_pairs], 0.0]))
                        .collect();
                    accuracy.entry(count).or_default().extend(accuracies(users.count, &outcomes)[left_out]);
                }
            }
            trial.go_on()?;
        }
        for (count, values) in accuracy {
            into.set(format!("adapted_{count}"), mean(&values));
            into.point("adapted", count as f64, mean(&values));
        }
        Ok(())
    }
}

/// The largest distance of a population's descriptors from what is expected of the users' probabilities.
fn descriptor_error(users: &Users, probabilities: &[Vec<Option<f64>>]) -> f64 {
    let pairs = probabilities.first().map_or(0, Vec::len);
    let divided = |pair: usize| {
        let said: Vec<f64> = probabilities.iter().filter_map(|user| user[pair]).collect();
        let all = said.iter().product::<f64>() + said.iter().map(|p| 1.0 - p).product::<f64>();
        (said.len() > 1).then_some(1.0 - all)
    };
    let divergence = mean(&(0..pairs).filter_map(divided).collect::<Vec<_>>());
    let mut largest = (users.descriptors.divergence - divergence).abs();
    for (u, own) in probabilities.iter().enumerate() {
        for (v, other) in probabilities.iter().enumerate().filter(|(v, _)| *v != u) {
            let both = own.iter().zip(other).filter_map(|(p, q)| Some((*p)? * (*q)? + (1.0 - (*p)?) * (1.0 - (*q)?)));
            let expected = mean(&both.collect::<Vec<_>>());
            largest = users.descriptors.agreement[u][v].map_or(largest, |found| largest.max((found - expected).abs()));
        }
    }
    if users.population == Population::Tldr {
        let again = |user: &Vec<Option<f64>>| {
            let same = user.iter().step_by(10).flatten().map(|p| p * p + (1.0 - p) * (1.0 - p));
            mean(&same.collect::<Vec<_>>())
        };
        // Of all users together: one alone has a tenth of the pool.
        let expected = mean(&probabilities.iter().map(again).collect::<Vec<_>>());
        largest = largest.max((mean(&users.descriptors.consistency) - expected).abs());
    }
    largest
}

/// The embeddings of pairs of texts.
fn embed(decoder: &Decoder, pairs: &[[Text; 2]]) -> Result<Embedded> {
    let d = decoder.config().hidden_size;
    let (mut answers, mut prompts) = (Vec::new(), Vec::new());
    let mut workspace = Workspace::new();
    for pairs in pairs.chunks(64) {
        let mut tokens = PackedTokens::new();
        for text in pairs.iter().flatten() {
            tokens.push(&[&text.prompt[..], &text.answer].concat(), None)?;
        }
        decoder.forward(&tokens, &mut workspace, false)?;
        let hidden = workspace.hidden();
        for (number, (text, segment)) in pairs.iter().flatten().zip(tokens.segments()).enumerate() {
            let row = |place: usize| &hidden[(segment.start + place) * d..][..d];
            let given = text.prompt.len();
            let sum = |column: usize| (given..segment.len).map(|place| row(place)[column]).sum::<f32>() / 16.0;
            answers.extend((0..d).map(sum));
            answers.extend_from_slice(row(segment.len - 1));
            // The row of the flag, which says whether the prompt is sensitive, and the prompt's last.
            let prompt = [row(1), row(given - 1)].concat();
            answers.extend_from_slice(&prompt);
            if number % 2 == 0 {
                prompts.extend(prompt);
            }
        }
    }
    let count = pairs.len();
    Ok(Embedded {
        answers: Tensor::from_vec(answers, (2 * count, 4 * d), &Device::Cpu)?,
        prompts: Tensor::from_vec(prompts, (count, 2 * d), &Device::Cpu)?,
    })
}

/// Shifts and scales every column to mean 0 and deviation 1 over the pool.
fn standardise(pool: &mut Embedded, probes: &mut Embedded) -> Result<()> {
    let scale = |of: &Tensor| -> Result<[Tensor; 2]> {
        let mean = of.mean_keepdim(0)?;
        let deviation = (of.broadcast_sub(&mean)?.sqr()?.mean_keepdim(0)? + 1e-6)?.sqrt()?;
        Ok([mean, deviation])
    };
    let (answers, prompts) = (scale(&pool.answers)?, scale(&pool.prompts)?);
    for embedded in [pool, probes] {
        for (values, [mean, deviation]) in [(&mut embedded.answers, &answers), (&mut embedded.prompts, &prompts)] {
            *values = values.broadcast_sub(mean)?.broadcast_div(deviation)?;
        }
    }
    Ok(())
}
