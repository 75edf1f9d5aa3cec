//! Rewarding Doubt: confidence that is true, learnt from bets.
//!
//! "Rewarding Doubt: A Reinforcement Learning Approach to Confidence Calibration of Large Language Models", 2025, arXiv 2503.02623. After its
//! answer a model states a confidence from 0 to 10, and is paid like a gambler who bet on the answer ([`mod@envs::reward::confidence`]):
//!
//! ```text
//! answer      a ~ π(· | q)              temperature 0.6, top-p 0.9, up to "Confidence:"; no loss
//! confidence  c ~ π(· | q, a)           temperature 1; PPO on these tokens alone
//! reward      R = n(c, a right?) + 0.25 · [a right],   -3 where c cannot be read
//! ```
//!
//! The logarithmic score `n` is largest, in expectation, where `c / 10` is the probability of being right; and since answers carry no
//! loss, they stay what they were, up to the weights that both share. `Doubt` is the method: sample answers, then PPO with the answered questions as
//! prompts.
//!
//! **Worlds** ([`world`]). *Memory*: a model is told facts, often, seldom, in contradiction or never, and states a confidence that has
//! nothing to do with them, mostly 9. Confidence is trained on two relations of half of the entities and measured on the other half, and on a third relation that no
//! bet was ever about. *Odds*: the probability of being right is written on the question, so that the best bet is known.
//!
//! Baselines read a confidence from the verbaliser in other ways: its probability of the answer, the same with the temperature that has the best
//! Brier score on what confidence is trained on, and how many of ten further answers agree.
//!
//! Deviations from the paper:
//! 1. Of each answer several confidences are sampled and compared with their mean (GRPO's baseline); the paper samples one and compares it with a
//!    value head. For bets on one outcome the mean is the better baseline, and the two-layer body has no value loss to serve beside.
//! 2. What shared weights do to the answers is large in a body of two layers, where little belongs to confidence alone. Every update therefore adds
//!    `λ KL(π_ref ‖ π)` at the tokens of the answers that were sampled in the step ([`mod@train::retained`]); the arm `no-retention` does without. Only
//!    answers to questions that confidence is trained on are kept this way. A bonus for entropy keeps trying the levels; where the odds are known, the same
//!    divergence at the confidence does.
//! 3. Rewards are on the paper's scale of 1; its code multiplies them by 10, and advantages are scaled by their deviation either way. The weight of
//!    the divergence is constant; theirs follows the divergence.
//! 4. Minibatches are consecutive prompts of a step.
//! 5. One answer a question.

mod bets;
mod odds;
pub mod world;

use base::{Purpose, Random};
use data::Prompt;
use envs::reward::confidence::{ConfidenceOptions, LEVELS, Scoring};
use eval::calibration::{Calibration, calibration};
use eval::metrics::mean;
use kernels::Precision;
use model::decoder::Decoder;
use model::lora::LoraConfig;
use model::tokenizer::Tokenizer;
use rollout::{Episode, Generator, Request, SamplingOptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::Method;
use train::methods::policy::{Policy, PolicyOptions};
use train::methods::sft::{Sft, SftOptions};

use crate::error::{Error, Result};
use crate::experiment::{Experiment, Trial, open};
use crate::measurements::Measurements;
use crate::system::{Arm, Bound, Claim, Figure, Role, System};
use bets::{Doubt, JointBet, Kept, answered, is_right};
use world::{CONFIDENCE, Fact, Memory, MemoryOptions, Part};

pub use odds::OddsOptions;

/// The table.
pub const SYSTEM: System = System {
    name: "rewarding-doubt",
    title: "Rewarding Doubt: calibrated confidence from bets",
    paper: "2025, \"Rewarding Doubt: A Reinforcement Learning Approach to Confidence Calibration of LLMs\", arXiv 2503.02623",
    summary: "paid by a logarithmic bet on its own answer, a model states confidences that are true and keeps its answers",
    arms: ARMS,
    claims: CLAIMS,
    figures: FIGURES,
    tiny: include_str!("tiny.toml"),
    quick: include_str!("quick.toml"),
    readme: include_str!("README.md"),
    recipes: &["smollm2", "paper"],
    data: None,
    schema: || schemars::schema_for!(RewardingDoubt).to_value(),
    open: |settings| open::<RewardingDoubt>("rewarding-doubt", settings),
};

const ARMS: &[Arm] = &[
    Arm::new("verbalise", Role::Baseline, "the confidence that the first model states"),
    Arm::new("probability", Role::Baseline, "its probability of the answer"),
    Arm::new(
        "scaled-probability",
        Role::Baseline,
        "the same, at the temperature with the best Brier score on the training facts",
    ),
    Arm::new("self-consistency", Role::Baseline, "the share of further answers that agree"),
    Arm::new("rewarding-doubt", Role::Method, "PPO on the confidence, paid by the logarithmic score"),
    Arm::new("brier", Role::Ablation, "paid by Brier's score"),
    Arm::new("linear", Role::Ablation, "paid by the linear score, which is not proper"),
    Arm::new("no-retention", Role::Ablation, "nothing keeps the answers what they are"),
    Arm::new("joint", Role::Ablation, "answers are trained too"),
    Arm::new("odds", Role::Method, "known odds, paid by the logarithmic score"),
    Arm::new("odds-linear", Role::Ablation, "known odds, paid by the linear score"),
];

const CLAIMS: &[Claim] = &[
    Claim {
        id: "1a",
        statement: "the calibration error on held-out entities is at most 0.4 of the verbaliser's: their ratio",
        bound: Bound::AtMost(0.4),
        measure: |seed| Some(seed.value("rewarding-doubt", "test_ece")? / seed.value("verbalise", "test_ece")?),
    },
    Claim {
        id: "1b",
        statement: "it is at most 0.12",
        bound: Bound::AtMost(0.12),
        measure: |seed| seed.value("rewarding-doubt", "test_ece"),
    },
    Claim {
        id: "2a",
        statement: "the confidence tells right from wrong: AUROC at least 0.75",
        bound: Bound::AtLeast(0.75),
        measure: |seed| seed.value("rewarding-doubt", "test_auroc"),
    },
    Claim {
        id: "2b",
        statement: "by at least 0.15 better than the verbaliser's",
        bound: Bound::AtLeast(0.15),
        measure: |seed| Some(seed.value("rewarding-doubt", "test_auroc")? - seed.value("verbalise", "test_auroc")?),
    },
    Claim {
        id: "3",
        statement: "the accuracy changes by at most 0.02",
        bound: Bound::AtMost(0.02),
        measure: |seed| {
            Some((seed.value("rewarding-doubt", "test_accuracy")? - seed.value("verbalise", "test_accuracy")?).abs())
        },
    },
    Claim {
        id: "4",
        statement: "on a relation that no bet was about the calibration error is lower than the verbaliser's: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(seed.value("verbalise", "transfer_ece")? - seed.value("rewarding-doubt", "transfer_ece")?),
    },
    Claim {
        id: "5a",
        statement: "the linear score ends with at least 0.9 of all confidences at 0 or 10",
        bound: Bound::AtLeast(0.9),
        measure: |seed| seed.value("linear", "test_extreme"),
    },
    Claim {
        id: "5b",
        statement: "and with a larger calibration error than the logarithmic one: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(seed.value("linear", "test_ece")? - seed.value("rewarding-doubt", "test_ece")?),
    },
    Claim {
        id: "6a",
        statement: "known odds: for every mark the most frequent level is the best bet or next to it: the largest distance",
        bound: Bound::AtMost(1.0),
        measure: |seed| seed.value("odds", "largest_distance"),
    },
    Claim {
        id: "6b",
        statement: "known odds: the calibration error is at most 0.05",
        bound: Bound::AtMost(0.05),
        measure: |seed| seed.value("odds", "ece"),
    },
    Claim {
        id: "6c",
        statement: "known odds: the expected score is within 5 % of the best possible, minus the entropy",
        bound: Bound::AtMost(0.05),
        measure: |seed| seed.value("odds", "regret"),
    },
];

const READ: &[&str] = &["verbalise", "probability", "scaled-probability", "self-consistency", "rewarding-doubt"];
const BETS: &[&str] = &["rewarding-doubt", "brier", "linear", "no-retention", "joint"];

const FIGURES: &[Figure] = &[
    Figure {
        title: "Reliability on held-out entities",
        x: "confidence",
        y: "share of right answers",
        curve: "test_reliability",
        arms: READ,
        diagonal: true,
    },
    Figure {
        title: "Reliability of different bets",
        x: "confidence",
        y: "share of right answers",
        curve: "test_reliability",
        arms: BETS,
        diagonal: true,
    },
    Figure {
        title: "Calibration error on held-out entities",
        x: "step",
        y: "ECE",
        curve: "ece",
        arms: BETS,
        diagonal: false,
    },
    Figure {
        title: "Accuracy on held-out entities",
        x: "step",
        y: "accuracy",
        curve: "accuracy",
        arms: BETS,
        diagonal: false,
    },
    Figure {
        title: "Known odds: what is stated",
        x: "true probability",
        y: "mean confidence",
        curve: "odds",
        arms: &["odds", "odds-linear"],
        diagonal: true,
    },
];

/// Settings of the reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RewardingDoubt {
    /// Answers to each question in a measurement.
    #[schemars(range(min = 1))]
    pub samples: u32,
    /// Further answers that self-consistency asks for.
    #[schemars(range(min = 1))]
    pub consistency: u32,
    /// What is known.
    pub memory: MemoryOptions,
    /// How the verbaliser is told of it.
    pub sft: SftOptions,
    /// How answers are sampled.
    pub answers: SamplingOptions,
    /// What a bet is paid; every arm says by which score.
    pub bet: ConfidenceOptions,
    /// The adapter that is trained on bets about the memory; without it the model is the reference.
    pub lora: LoraConfig,
    /// PPO on the confidence.
    pub ppo: PolicyOptions,
    /// Weight of the divergence that keeps the answers what they are.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub retain_weight: f64,
    /// The world of known odds.
    pub odds: OddsOptions,
}

/// Draws of measurements are named by steps from here on, apart from those of training.
const MEASUREMENTS: u32 = 1 << 31;

/// What all arms of a seed start from.
pub struct Start {
    memory: Memory,
    tokenizer: Tokenizer,
    /// The verbaliser.
    decoder: Decoder,
}

impl Experiment for RewardingDoubt {
    type Start = Start;

    fn validate(&self) -> Result<()> {
        self.sft.validate().map_err(|error| error.within("sft"))?;
        self.answers.validate()?;
        self.lora.validate()?;
        for (name, weight) in [("retain_weight", self.retain_weight), ("odds.retain_weight", self.odds.retain_weight)] {
            if !(weight.is_finite() && weight > 0.0) {
                let reason = format!("{name} is {weight}, expected a number above 0");
                return Err(Error::Settings { system: "rewarding-doubt", reason });
            }
        }
        for (name, options) in [("ppo", self.ppo.clone()), ("odds", self.odds_options())] {
            if options.has_value_model() {
                let reason = format!("{name}.objective.baseline is \"value\", expected one that needs no value model");
                return Err(Error::Settings { system: "rewarding-doubt", reason });
            }
            options.validate().map_err(|error| error.within(name))?;
        }
        Ok(())
    }

    fn start(&self, trial: &Trial<'_>) -> Result<Start> {
        let memory = Memory::new(&self.memory, trial.seed);
        let tokenizer = memory.tokenizer()?;
        let mut decoder = Decoder::random(memory.model(), trial.seed)?;
        let mut sft = Sft::new(self.sft.clone(), memory.corpus())?;
        trial.fit(0, &mut sft, &mut decoder, &tokenizer, |_, _, _| Ok(()))?;
        Ok(Start { memory, tokenizer, decoder })
    }

    fn run(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        match arm {
            "verbalise" => self.read(start, trial, |_, asked| Ok(asked.iter().map(Asked::stated).collect())),
            "probability" => {
                self.read(start, trial, |_, asked| Ok(asked.iter().map(|one| Some(one.probability(1.0))).collect()))
            }
            "scaled-probability" => {
                let temperature = self.best_temperature(start, trial)?;
                self.read(start, trial, |_, asked| {
                    Ok(asked.iter().map(|one| Some(one.probability(temperature))).collect())
                })
            }
            "self-consistency" => self.read(start, trial, |facts, asked| self.agreement(start, trial, facts, asked)),
            "odds" => self.odds(start, trial, Scoring::Log),
            "odds-linear" => self.odds(start, trial, Scoring::Linear),
            "brier" => self.bet(start, trial, Scoring::Brier, Answers::Retained),
            "linear" => self.bet(start, trial, Scoring::Linear, Answers::Retained),
            "no-retention" => self.bet(start, trial, Scoring::Log, Answers::Free),
            "joint" => self.bet(start, trial, Scoring::Log, Answers::Trained),
            _ => self.bet(start, trial, Scoring::Log, Answers::Retained),
        }
    }
}

/// What training on bets does about the answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answers {
    /// Keeps them what they are.
    Retained,
    /// Nothing.
    Free,
    /// Trains them too.
    Trained,
}

/// An answer that was asked for, with everything a confidence can be read from.
struct Asked {
    right: bool,
    /// The answer's first token.
    value: Option<u32>,
    /// The confidence that was stated, if it could be read.
    level: Option<u8>,
    /// The most probable first tokens and their log-probabilities at the temperature of the answers.
    probable: Vec<(u32, f32)>,
    /// That temperature.
    temperature: f64,
}

impl Asked {
    fn stated(&self) -> Option<f64> {
        self.level.map(|level| f64::from(level) / f64::from(LEVELS))
    }

    /// The probability of the answer at another temperature.
    fn probability(&self, temperature: f64) -> f64 {
        let scale = self.temperature / temperature;
        let weight = |log_prob: f32| (scale * f64::from(log_prob)).exp();
        let total: f64 = self.probable.iter().map(|(_, log_prob)| weight(*log_prob)).sum();
        let own = self.probable.iter().find(|(token, _)| Some(*token) == self.value);
        own.map_or(0.0, |(_, log_prob)| weight(*log_prob) / total)
    }
}

/// Tokens whose probabilities are kept with an answer: more than there are values of a relation.
const PROBABLE: usize = 64;

impl RewardingDoubt {
    /// How answers are sampled: up to where the confidence follows.
    fn answers(&self) -> SamplingOptions {
        SamplingOptions { stop_token_ids: vec![CONFIDENCE], ..self.answers.clone() }
    }

    /// Asks each fact `samples` times, the same way as in training: an answer, then the confidence in it.
    fn ask(
        &self,
        start: &Start,
        decoder: &mut Decoder,
        facts: &[Fact],
        samples: u32,
        (seed, round): (u64, u32),
    ) -> Result<Vec<Asked>> {
        let questions: Vec<Prompt> = facts.iter().map(|fact| start.memory.prompt(*fact, &start.tokenizer)).collect();
        let answers = self.sample(start, decoder, &questions, samples, (seed, round))?;
        let random = Random::new(seed, Purpose::Sampling).step(MEASUREMENTS + 2 * round + 1);
        let continued = answers.iter().enumerate().map(|(index, episode)| Request {
            prompt_id: index as u32,
            sample: 0,
            prompt: [&episode.prompt[..], &episode.completion].concat().into(),
            prefix: Vec::new(),
        });
        let requests: Vec<Request> = continued.collect();
        let confidences =
            Generator::new(&self.ppo.sampling, 64, random).generate(decoder, &start.tokenizer, &requests, |_| {})?;
        let asked = answers.iter().zip(&confidences).enumerate().map(|(index, (answer, confidence))| Asked {
            right: is_right(&questions[index / samples as usize], &answer.completion),
            value: answer.completion.first().copied(),
            level: world::level(&confidence.completion).filter(|_| answer.completion.last() == Some(&CONFIDENCE)),
            probable: answer.top_log_probs.first().cloned().unwrap_or_default(),
            temperature: self.answers.temperature,
        });
        Ok(asked.collect())
    }

    /// Samples answers up to where the confidence follows.
    fn sample(
        &self,
        start: &Start,
        decoder: &mut Decoder,
        questions: &[Prompt],
        samples: u32,
        (seed, round): (u64, u32),
    ) -> Result<Vec<Episode>> {
        decoder.prepare(Precision::F32);
        let requests: Vec<Request> =
            questions.iter().flat_map(|question| Request::samples(question.id, &question.ids, samples)).collect();
        let random = Random::new(seed, Purpose::Sampling).step(MEASUREMENTS + 2 * round);
        let options = SamplingOptions { top_log_probs: PROBABLE, ..self.answers() };
        Ok(Generator::new(&options, 64, random).generate(decoder, &start.tokenizer, &requests, |_| {})?)
    }

    /// Measures the verbaliser, whose confidence `read` finds in its answers.
    fn read(
        &self,
        start: &Start,
        trial: &Trial<'_>,
        read: impl Fn(&[Fact], &[Asked]) -> Result<Vec<Option<f64>>>,
    ) -> Result<Measurements> {
        let mut measured = Measurements::default();
        let mut decoder = start.decoder.clone();
        for (name, part, round) in PARTS {
            trial.go_on()?;
            let facts = start.memory.facts(part);
            let asked = self.ask(start, &mut decoder, &facts, self.samples, (trial.seed, round))?;
            note(&mut measured, name, &asked, &read(&facts, &asked)?);
        }
        Ok(measured)
    }

    /// The temperature at which the verbaliser's probabilities have the best Brier score on the facts that confidence is trained on.
    fn best_temperature(&self, start: &Start, trial: &Trial<'_>) -> Result<f64> {
        const GRID: [f64; 10] = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0];
        let facts = start.memory.facts(Part::Train);
        let asked = self.ask(start, &mut start.decoder.clone(), &facts, self.samples, (trial.seed, 0))?;
        let brier = |temperature: f64| {
            let square = |one: &Asked| (one.probability(temperature) - f64::from(u8::from(one.right))).powi(2);
            mean(&asked.iter().map(square).collect::<Vec<_>>())
        };
        Ok(GRID.into_iter().reduce(|best, other| if brier(other) < brier(best) { other } else { best }).unwrap_or(1.0))
    }

    /// The share of further answers to the same question that agree with each answer.
    fn agreement(&self, start: &Start, trial: &Trial<'_>, facts: &[Fact], asked: &[Asked]) -> Result<Vec<Option<f64>>> {
        let questions: Vec<Prompt> = facts.iter().map(|fact| start.memory.prompt(*fact, &start.tokenizer)).collect();
        let others = self.sample(start, &mut start.decoder.clone(), &questions, self.consistency, (trial.seed, 9))?;
        let share = |(index, asked): (usize, &Asked)| {
            let question = index / self.samples as usize * self.consistency as usize;
            let others = &others[question..question + self.consistency as usize];
            let agree = others.iter().filter(|other| other.completion.first().copied() == asked.value).count();
            Some(agree as f64 / f64::from(self.consistency))
        };
        Ok(asked.iter().enumerate().map(share).collect())
    }

    /// Trains on bets and measures.
    fn bet(&self, start: &Start, trial: &Trial<'_>, scoring: Scoring, answers: Answers) -> Result<Measurements> {
        let bet = ConfidenceOptions { scoring, ..self.bet.clone() };
        let facts = start.memory.facts(Part::Train);
        let questions: Vec<Prompt> = facts.iter().map(|fact| start.memory.prompt(*fact, &start.tokenizer)).collect();
        let mut options = self.ppo.clone();
        let steps = options.training.steps(questions.len(), options.prompts_per_step);
        let size = options.prompts_per_step;
        let sampling = self.answers();
        let mut method: Box<dyn Method + '_> = match answers {
            Answers::Trained => {
                options.sampling.max_new_tokens += self.answers.max_new_tokens;
                Box::new(Policy::new(options, questions, Box::new(JointBet(bet)))?)
            }
            Answers::Retained | Answers::Free => Box::new(Doubt {
                options,
                rows: questions.len(),
                ask: Box::new(move |step| answered(step, &questions, size, &sampling)),
                bet,
                retained: (answers == Answers::Retained).then_some(Kept::Answers(self.retain_weight)),
            }),
        };
        let mut decoder = start.decoder.clone();
        decoder.attach_lora(&self.lora, trial.seed)?;
        let mut measured = Measurements::default();
        let held_out = start.memory.facts(Part::Test);
        trial.fit(1, &mut *method, &mut decoder, &start.tokenizer, |step, decoder, _| {
            if step % (steps / 6).max(1) == 0 {
                let asked = self.ask(start, decoder, &held_out, 1, (trial.seed, 100 + step as u32))?;
                let stated: Vec<Option<f64>> = asked.iter().map(Asked::stated).collect();
                if let Some(found) = fit(&asked, &stated) {
                    measured.point("ece", step as f64, found.ece);
                    measured.point("accuracy", step as f64, found.accuracy);
                }
            }
            Ok(())
        })?;
        for (name, part, round) in PARTS {
            let asked = self.ask(start, &mut decoder, &start.memory.facts(part), self.samples, (trial.seed, round))?;
            let stated: Vec<Option<f64>> = asked.iter().map(Asked::stated).collect();
            note(&mut measured, name, &asked, &stated);
        }
        Ok(measured)
    }
}

/// What is measured: its name, the facts, and the round of its draws.
const PARTS: [(&str, Part, u32); 3] =
    [("train", Part::Train, 3), ("test", Part::Test, 1), ("transfer", Part::Transfer, 2)];

/// The calibration of the confidences that could be read.
fn fit(asked: &[Asked], stated: &[Option<f64>]) -> Option<Calibration> {
    let read: Vec<(f64, bool)> =
        asked.iter().zip(stated).filter_map(|(asked, stated)| Some(((*stated)?, asked.right))).collect();
    calibration(&read)
}

/// The share of confidences at 0 or 1.
fn extreme(stated: &[f64]) -> f64 {
    stated.iter().filter(|stated| **stated == 0.0 || **stated == 1.0).count() as f64 / stated.len() as f64
}

/// Notes everything about a part.
fn note(measured: &mut Measurements, part: &str, asked: &[Asked], stated: &[Option<f64>]) {
    let right: Vec<f64> = asked.iter().map(|asked| f64::from(u8::from(asked.right))).collect();
    measured.set(format!("{part}_accuracy"), mean(&right));
    let unread = stated.iter().filter(|stated| stated.is_none()).count();
    measured.set(format!("{part}_malformed"), unread as f64 / stated.len() as f64);
    let Some(found) = fit(asked, stated) else { return };
    measured.set(format!("{part}_ece"), found.ece);
    measured.set(format!("{part}_brier"), found.brier);
    measured.set(format!("{part}_confidence"), found.confidence);
    measured.set_known(format!("{part}_auroc"), found.auroc);
    measured.set(format!("{part}_extreme"), extreme(&stated.iter().flatten().copied().collect::<Vec<_>>()));
    for bin in &found.bins {
        measured.point(&format!("{part}_reliability"), bin.confidence, bin.accuracy);
    }
}
