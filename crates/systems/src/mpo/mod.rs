//! MPO, mixing preference optimisation: the best compromise between specialists, without training it.
//!
//! "MPO: An Efficient Post-Processing Framework for Mixing Diverse Preference Alignment", Wang et al., ICML 2025, arXiv 2502.18699. Models `π_k` were
//! trained from one reference, each for one objective. What they say about a pool of the reference's responses determines the weights with which
//! the worst-off objective is best off ([`mod@objectives::mixing`]), and the mixture
//!
//! ```text
//! π_λ ∝ Π_k π_k^{λ_k},      λ* = argmin_λ E_x log E_{y ~ π_ref} e^{Σ_k λ_k s_k},      s_k = log π_k - log π_ref
//! ```
//!
//! is sampled as it is ([`mod@rollout::mixture`]): whole answers, resampled, or token by token, which is not quite the same.
//!
//! **Worlds.** [`attribute_text`](mod@crate::worlds::attribute_text) with the objectives help, harmlessness and humour. And one of
//! [258 sequences](mod@enumerable), in which everything is known exactly: the best weights, the law of the mixture, what the decoders make of it.
//!
//! **Experiment.** A model imitates the corpus; pairs of its answers, labelled by each objective, make three specialists by DPO. The
//! weights come from 32 responses to each of the 64 prompts that are trained on; everything is measured on the 28 held-out ones. The baselines are the
//! specialists themselves, averages of their weights, and policies that REINFORCE trains from the reference for the same rewards `β s_k`: for
//! their mean (MORLHF), and for the worst of them (MaxMin-RLHF), by weights that follow the rewards.
//!
//! Whatever is trained is trained with three learning rates, and the best is kept, by answers to 20 prompts that are there for nothing else: a
//! specialist by its win rate in its own objective, the policies of REINFORCE by the least expected log-ratio. The mixture and the averages are of the
//! specialists that are kept, and have nothing more to choose.
//!
//! An answer *wins* against the reference's answer to the same prompt if the objective is better met; ties count half.
//!
//! Deviations from the paper:
//! 1. What the mixture saves is counted in tokens that went through a model, a backward pass counted as two: clocks do not repeat.
//! 2. MaxMin-RLHF has the paper's rewards and problem, and REINFORCE in the place of PPO.
//! 3. How the paper samples the mixture is not known. The method's arm resamples one of several whole answers.
//! 4. The design of the miniature had 84 prompts for the pool; 20 of them choose the settings here.

pub mod enumerable;

use std::sync::{Arc, Mutex, PoisonError};

use base::{Purpose, Random};
use data::Prompt;
use envs::{Answer, Reward, RewardError, Score, Status};
use eval::metrics::mean;
use kernels::Precision;
use model::decoder::{Decoder, TaskVectors};
use model::tokenizer::Tokenizer;
use objectives::mixing::{Pool, Response, exponentiated};
use rollout::{Episode, Mean, Mixture, scoring};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::methods::policy::{Policy, PolicyOptions};
use train::methods::preference::{Preference, PreferenceOptions};
use train::methods::sft::SftOptions;
use train::mixing::{PoolOptions, pool};

use crate::error::Result;
use crate::experiment::{Experiment, Trial, open};
use crate::grid::Grid;
use crate::measurements::{Measurements, Seed};
use crate::system::{Arm, Bound, Claim, Figure, Role, System};
use crate::worlds::attribute_text::{self as world, Question, Sampled, Split, Utility};
use enumerable::EnumerableOptions;

/// The table.
pub const SYSTEM: System = System {
    name: "mpo",
    title: "MPO: mixing preference optimisation",
    paper: "Wang et al. 2025, \"MPO: An Efficient Post-Processing Framework for Mixing Diverse Preference Alignment\", ICML, arXiv 2502.18699",
    summary: "a log-linear mixture of specialists, with weights found without training, serves the worst-off objective better than any of them and than averages of weights",
    arms: ARMS,
    claims: CLAIMS,
    figures: FIGURES,
    tiny: include_str!("tiny.toml"),
    quick: include_str!("quick.toml"),
    readme: include_str!("README.md"),
    recipes: &["paper"],
    data: None,
    schema: || schemars::schema_for!(Mpo).to_value(),
    open: |settings| open::<Mpo>("mpo", settings),
};

const ARMS: &[Arm] = &[
    Arm::new("reference", Role::Baseline, "the model that all start from"),
    Arm::new("help", Role::Baseline, "the specialist for help"),
    Arm::new("harmless", Role::Baseline, "the specialist for harmlessness"),
    Arm::new("humour", Role::Baseline, "the specialist for humour"),
    Arm::new("soup", Role::Baseline, "the average of their weights"),
    Arm::new("soup-weighted", Role::Baseline, "their average with the weights that MPO finds"),
    Arm::new("morlhf", Role::Baseline, "REINFORCE for the mean of the rewards"),
    Arm::new("maxmin-rlhf", Role::Baseline, "REINFORCE for the least of the rewards"),
    Arm::new("mpo", Role::Method, "whole answers by the law of the mixture, resampled"),
    Arm::new("by-token", Role::Ablation, "mixed token by token"),
    Arm::new("beta-0.1", Role::Ablation, "of specialists with β = 0.1 and the same learning rates"),
    Arm::new("uniform", Role::Ablation, "equal weights"),
    Arm::new("without-help", Role::Ablation, "of the other two specialists"),
    Arm::new("without-harmless", Role::Ablation, "of the other two specialists"),
    Arm::new("without-humour", Role::Ablation, "of the other two specialists"),
    Arm::new("user-weights", Role::Method, "help and harmlessness with five weights of a user's"),
    Arm::new("enumerable", Role::Method, "258 sequences, where everything is known"),
];

/// The objectives: their places in the list of qualities.
const OBJECTIVES: [(&str, Utility); 3] = [
    ("help", Utility([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])),
    ("harmless", Utility([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])),
    ("humour", Utility([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])),
];

/// The names of the specialists' arms.
const SPECIALISTS: [&str; 3] = ["help", "harmless", "humour"];

/// Weights of help in a user's mixture with harmlessness.
const SHARES: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

/// By how much MPO's number exceeds the largest of some arms'.
fn lead(seed: &Seed<'_>, arms: &[&str], name: &str) -> Option<f64> {
    let others = arms.iter().map(|arm| seed.value(arm, name)).collect::<Option<Vec<f64>>>()?;
    Some(seed.value("mpo", name)? - others.into_iter().reduce(f64::max)?)
}

const CLAIMS: &[Claim] = &[
    Claim {
        id: "1a",
        statement: "the least expected log-ratio exceeds that of every specialist: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, &SPECIALISTS, "least_log_ratio"),
    },
    Claim {
        id: "1b",
        statement: "and that of the average of their weights",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, &["soup"], "least_log_ratio"),
    },
    Claim {
        id: "1c",
        statement: "and is that of MaxMin-RLHF, or almost: by how much it leads",
        bound: Bound::AtLeast(-0.02),
        measure: |seed| lead(seed, &["maxmin-rlhf"], "least_log_ratio"),
    },
    Claim {
        id: "1d",
        statement: "the least win rate exceeds that of every specialist: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, &SPECIALISTS, "least_win_rate"),
    },
    Claim {
        id: "1e",
        statement: "and that of the average of their weights",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, &["soup"], "least_win_rate"),
    },
    Claim {
        id: "1f",
        statement: "and is that of MaxMin-RLHF, or almost: by how much it leads",
        bound: Bound::AtLeast(-0.02),
        measure: |seed| lead(seed, &["maxmin-rlhf"], "least_win_rate"),
    },
    Claim {
        id: "2a",
        statement: "after the specialists nothing is trained, by construction: gradient steps",
        bound: Bound::AtMost(0.0),
        measure: |seed| seed.value("mpo", "gradient_steps"),
    },
    Claim {
        id: "2b",
        statement: "at no more than a quarter of MaxMin-RLHF's cost: the share of its passes over tokens",
        bound: Bound::AtMost(0.25),
        measure: |seed| Some(seed.value("mpo", "token_passes")? / seed.value("maxmin-rlhf", "token_passes")?),
    },
    Claim {
        id: "3",
        statement: "without its specialist an objective is met worse than by the reference: the largest win rate of the three",
        bound: Bound::AtMost(0.5),
        measure: |seed| {
            let left_out = [("without-help", "help"), ("without-harmless", "harmless"), ("without-humour", "humour")];
            let rates = left_out.map(|(arm, objective)| seed.value(arm, &format!("win_rate_{objective}")));
            rates.into_iter().collect::<Option<Vec<f64>>>()?.into_iter().reduce(f64::max)
        },
    },
    Claim {
        id: "4a",
        statement: "enumerable: the weights are within 0.02 of the best: the largest distance",
        bound: Bound::AtMost(0.02),
        measure: |seed| seed.value("enumerable", "weight_error"),
    },
    Claim {
        id: "4b",
        statement: "enumerable: the error falls like the root of the steps, or faster: its slope in logarithms",
        bound: Bound::AtMost(-0.4),
        measure: |seed| seed.value("enumerable", "slope_in_steps"),
    },
    Claim {
        id: "4c",
        statement: "enumerable: the bias falls like the number of responses: the distance of its slope from -1",
        bound: Bound::AtMost(0.2),
        measure: |seed| Some((seed.value("enumerable", "slope_in_responses")? + 1.0).abs()),
    },
    Claim {
        id: "5",
        statement: "a user's weights trace a monotone front: the largest step back of a win rate",
        bound: Bound::AtMost(0.02),
        measure: |seed| seed.value("user-weights", "step_back"),
    },
];

const FIGURES: &[Figure] = &[
    Figure {
        title: "Win rates of a user's weights on held-out prompts",
        x: "help",
        y: "harmless",
        curve: "front",
        arms: &["user-weights"],
        diagonal: false,
    },
    Figure {
        title: "258 sequences: distance of the decoder from the mixture's law",
        x: "candidates",
        y: "total variation",
        curve: "variation_by_candidates",
        arms: &["enumerable"],
        diagonal: false,
    },
    Figure {
        title: "258 sequences: error of the weights' value",
        x: "steps of mirror descent",
        y: "nats",
        curve: "error_by_steps",
        arms: &["enumerable"],
        diagonal: false,
    },
];

/// Settings of the reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mpo {
    /// Answers that the reference imitates.
    #[schemars(range(min = 1))]
    pub corpus: u32,
    /// How it does so.
    pub sft: SftOptions,
    /// Pairs of answers to each prompt, labelled by each objective.
    #[schemars(range(min = 1))]
    pub pairs: usize,
    /// How certain the labels are: the better answer is preferred with probability `σ(κ (difference))`.
    pub kappa: f64,
    /// DPO, for the specialists.
    pub dpo: PreferenceOptions,
    /// The responses that weights are found with.
    pub pool: PoolOptions,
    /// Steps of mirror descent.
    #[schemars(range(min = 1))]
    pub steps: u32,
    /// `c` of its step size `c / √steps`.
    pub rate: f64,
    /// REINFORCE, for MORLHF and MaxMin-RLHF; its β is that of DPO.
    pub reinforce: PolicyOptions,
    /// Step size of MaxMin-RLHF's weights.
    pub maxmin_rate: f64,
    /// Learning rates that are tried, over those of `dpo` and `reinforce`.
    pub rates: Grid,
    /// Answers to each prompt that they are chosen by.
    #[schemars(range(min = 1))]
    pub validation_samples: usize,
    /// Answers to each held-out prompt.
    #[schemars(range(min = 1))]
    pub samples: usize,
    /// Candidates of which one is resampled.
    #[schemars(range(min = 1))]
    pub candidates: usize,
    /// The enumerable world.
    pub enumerable: EnumerableOptions,
}

/// What all arms of a seed start from.
pub struct Start {
    tokenizer: Tokenizer,
    reference: Decoder,
    pairs: Vec<(Question, [Vec<u32>; 2])>,
    /// The prompts that are trained on.
    prompts: Vec<Prompt>,
    specialists: Vec<Decoder>,
    /// The learning rate of each, over that of `dpo`, and what its choice was made by.
    rates: Vec<f64>,
    tried: Vec<Measurements>,
    pool: Pool,
    /// Passes of the pool's tokens through a model.
    pool_passes: f64,
    /// The reference's answers to the prompts that settings are chosen by, and to the held-out ones.
    validation: Sampled,
    test: Sampled,
}

/// What answers.
enum Answering<'a> {
    /// A model.
    Model(&'a mut Decoder),
    /// A mixture of specialists, with their weights; resampled of so many candidates.
    Mixture(&'a [&'a Decoder], &'a [f64], usize),
}

impl Experiment for Mpo {
    type Start = Start;

    fn validate(&self) -> Result<()> {
        self.sft.validate().map_err(|error| error.within("sft"))?;
        self.dpo.validate().map_err(|error| error.within("dpo"))?;
        self.pool.validate().map_err(|error| error.within("pool"))?;
        Ok(self.reinforce.validate().map_err(|error| error.within("reinforce"))?)
    }

    fn start(&self, trial: &Trial<'_>) -> Result<Start> {
        let (tokenizer, mut reference) = world::imitation(trial, &self.sft, self.corpus)?;
        let (train, validation) = Question::train_and_validation();
        let mut answers = |questions: &[Question], size, round| {
            world::sample(&mut reference, &tokenizer, questions, size, (trial.seed, round))
        };
        let pairs = world::pairs(&answers(&train, 2 * self.pairs, 0)?);
        let validation = answers(&validation, self.validation_samples, 1)?;
        let test = answers(&Question::of(Split::Test), self.samples, 1)?;
        let prompts = train.iter().map(|question| question.prompt(&tokenizer)).collect();
        let mut start = Start {
            tokenizer,
            reference,
            pairs,
            prompts,
            specialists: Vec::new(),
            rates: Vec::new(),
            tried: Vec::new(),
            pool: Pool::default(),
            pool_passes: 0.0,
            validation,
            test,
        };
        for objective in OBJECTIVES {
            let mut tried = Measurements::default();
            let (specialist, rate) = self.rates.best(&mut tried, |rate| {
                let mut model = self.specialist(&start, trial, objective.1, self.dpo.objective.beta, rate)?;
                let answering = Answering::Model(&mut model);
                let (answers, _) = self.answers(&start, &start.validation, answering, trial.seed)?;
                Ok((model, world::win_rate(&answers, &start.validation, objective.1)))
            })?;
            start.specialists.push(specialist);
            start.rates.push(rate);
            start.tried.push(tried);
        }
        (start.pool, start.pool_passes) = self.pool_of(&start, &start.specialists, trial.seed)?;
        Ok(start)
    }

    fn run(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let mut measured = Measurements::default();
        if arm == "enumerable" {
            return Ok(enumerable::measure(&self.enumerable, trial.seed));
        }
        if arm == "user-weights" {
            self.user_weights(start, trial, &mut measured)?;
            return Ok(measured);
        }
        let all: Vec<&Decoder> = start.specialists.iter().collect();
        let place = |name: &str| OBJECTIVES.iter().position(|(objective, _)| *objective == name);
        if arm == "reference" {
            let answering = Answering::Model(&mut start.reference.clone());
            self.report(start, &start.specialists, answering, trial, &mut measured)?;
        } else if let Some(place) = place(arm) {
            measured = start.tried[place].clone();
            let answering = Answering::Model(&mut start.specialists[place].clone());
            self.report(start, &start.specialists, answering, trial, &mut measured)?;
        } else if let Some(dropped) = arm.strip_prefix("without-").and_then(place) {
            let kept: Vec<usize> = (0..all.len()).filter(|&place| place != dropped).collect();
            let weights = self.weights(&only(&start.pool, &kept), trial.seed);
            let others: Vec<&Decoder> = kept.iter().map(|&place| all[place]).collect();
            self.report(
                start,
                &start.specialists,
                Answering::Mixture(&others, &weights, self.candidates),
                trial,
                &mut measured,
            )?;
        } else if let "morlhf" | "maxmin-rlhf" = arm {
            let rate = if arm == "morlhf" { 0.0 } else { self.maxmin_rate };
            let ((mut trained, noted), _) = self.rates.best(&mut measured, |times| {
                let (mut trained, noted) = self.trained(start, trial, rate, times)?;
                let answering = Answering::Model(&mut trained);
                let (answers, _) = self.answers(start, &start.validation, answering, trial.seed)?;
                let ratios = log_ratios(start, &start.specialists, &answers)?;
                Ok(((trained, noted), ratios.into_iter().fold(f64::INFINITY, f64::min)))
            })?;
            measured.values.extend(noted.values);
            self.report(start, &start.specialists, Answering::Model(&mut trained), trial, &mut measured)?;
        } else if arm == "beta-0.1" {
            let specialist =
                |((_, utility), rate): (&(&str, Utility), &f64)| self.specialist(start, trial, *utility, 0.1, *rate);
            let specialists: Vec<Decoder> =
                OBJECTIVES.iter().zip(&start.rates).map(specialist).collect::<Result<_>>()?;
            let (pool, _) = self.pool_of(start, &specialists, trial.seed)?;
            let weights = self.weights(&pool, trial.seed);
            let all: Vec<&Decoder> = specialists.iter().collect();
            note(&pool, &weights, &mut measured);
            self.report(
                start,
                &specialists,
                Answering::Mixture(&all, &weights, self.candidates),
                trial,
                &mut measured,
            )?;
        } else {
            let weights = match arm {
                "uniform" | "soup" => vec![1.0 / all.len() as f64; all.len()],
                _ => self.weights(&start.pool, trial.seed),
            };
            if arm.starts_with("soup") {
                let vectors = TaskVectors::new(start.reference.clone(), start.specialists.clone())?;
                let mut soup = vectors.merged(&weights)?;
                self.report(start, &start.specialists, Answering::Model(&mut soup), trial, &mut measured)?;
            } else {
                note(&start.pool, &weights, &mut measured);
                measured.set("gradient_steps", 0.0);
                measured.set("token_passes", start.pool_passes);
                let candidates = if arm == "by-token" { 1 } else { self.candidates };
                let answering = Answering::Mixture(&all, &weights, candidates);
                self.report(start, &start.specialists, answering, trial, &mut measured)?;
            }
        }
        Ok(measured)
    }
}

/// What the pool says of some of the models.
fn only(pool: &Pool, kept: &[usize]) -> Pool {
    let response = |response: &Response| Response {
        log_ratios: kept.iter().map(|&place| response.log_ratios[place]).collect(),
        log_importance: response.log_importance,
    };
    Pool { prompts: pool.prompts.iter().map(|responses| responses.iter().map(response).collect()).collect() }
}

/// What the pool says of weights.
fn note(pool: &Pool, weights: &[f64], into: &mut Measurements) {
    into.set("value", pool.value(weights));
    into.set("effective_size", pool.effective_size(weights));
    let (masses, gradient) = (pool.log_masses(weights.len()), pool.gradient(weights));
    for (k, (name, _)) in OBJECTIVES.iter().enumerate() {
        into.set(format!("weight_{name}"), weights[k]);
        into.set(format!("log_mass_{name}"), masses[k]);
        into.set(format!("expected_log_ratio_{name}"), gradient[k]);
    }
}

/// The mean over answers of each specialist's log-ratio to the reference.
fn log_ratios(start: &Start, specialists: &[Decoder], answers: &Sampled) -> Result<Vec<f64>> {
    let mut reference = start.reference.clone();
    reference.prepare(Precision::F32);
    let of_reference = scoring::log_probs(&reference, &answers.episodes, 1.0)?;
    let ratio = |specialist: &Decoder| {
        let of_specialist = scoring::log_probs(specialist, &answers.episodes, 1.0)?;
        let all: Vec<f64> = of_specialist.iter().zip(&of_reference).map(|(own, base)| own - base).collect();
        Ok(mean(&all))
    };
    specialists.iter().map(ratio).collect()
}

impl Mpo {
    /// A model for one objective, trained with so many times the learning rate.
    fn specialist(&self, start: &Start, trial: &Trial<'_>, utility: Utility, beta: f64, rate: f64) -> Result<Decoder> {
        let labelled = world::preferences(trial.seed, start.pairs.clone(), utility, self.kappa);
        let pairs = labelled.iter().zip(0..).map(|(preference, row)| preference.pair(row)).collect();
        let mut options = self.dpo.clone();
        options.objective.beta = beta;
        options.training.learning_rate *= rate;
        let mut dpo = Preference::new(options, pairs)?;
        let mut decoder = start.reference.clone();
        trial.fit(1, &mut dpo, &mut decoder, &start.tokenizer, |_, _, _| Ok(()))?;
        decoder.prepare(Precision::F32);
        Ok(decoder)
    }

    /// What the specialists say of the reference's responses, and how many tokens went through a model for it.
    fn pool_of(&self, start: &Start, specialists: &[Decoder], seed: u64) -> Result<(Pool, f64)> {
        let mut reference = start.reference.clone();
        reference.prepare(Precision::F32);
        let models: Vec<&Decoder> = specialists.iter().collect();
        let (pool, tokens) = pool(&reference, &models, &start.tokenizer, &start.prompts, &self.pool, seed)?;
        // Every response is sampled once, and read by every model.
        Ok((pool, tokens as f64 * (2 + models.len()) as f64))
    }

    /// The weights that are best for the worst-off.
    fn weights(&self, pool: &Pool, seed: u64) -> Vec<f64> {
        train::mixing::weights(pool, self.rate, self.steps, seed)
    }

    /// REINFORCE for weighted log-ratios, with so many `times` the learning rate, and what it took. With `rate` the weights follow the rewards:
    /// those that are less are paid more.
    fn trained(&self, start: &Start, trial: &Trial<'_>, rate: f64, times: f64) -> Result<(Decoder, Measurements)> {
        let mut options = self.reinforce.clone();
        options.training.learning_rate *= times;
        let beta = self.dpo.objective.beta;
        options.objective.beta = beta;
        let reward = Ratios::new(start, beta, rate);
        let passes = Arc::clone(&reward.tokens);
        let weights = Arc::clone(&reward.weights);
        let mut policy = Policy::new(options, start.prompts.clone(), Box::new(reward))?;
        let mut decoder = start.reference.clone();
        let mut steps = 0;
        trial.fit(1, &mut policy, &mut decoder, &start.tokenizer, |step, _, _| {
            steps = step;
            Ok(())
        })?;
        let mut noted = Measurements::default();
        noted.set("gradient_steps", steps as f64);
        let tokens = *passes.lock().unwrap_or_else(PoisonError::into_inner);
        // Sampled, read by the reference and the specialists, and learnt from: forward, and a backward that counts as two.
        noted.set("token_passes", tokens * (1 + 1 + OBJECTIVES.len() + 3) as f64);
        let weights = weights.lock().unwrap_or_else(PoisonError::into_inner);
        OBJECTIVES.iter().zip(&*weights).for_each(|((name, _), weight)| noted.set(format!("weight_{name}"), *weight));
        Ok((decoder, noted))
    }

    /// As many answers to the same prompts as the reference gave.
    fn answers(
        &self,
        start: &Start,
        theirs: &Sampled,
        answering: Answering<'_>,
        seed: u64,
    ) -> Result<(Sampled, Option<f64>)> {
        let (questions, tokenizer) = (&theirs.questions, &start.tokenizer);
        match answering {
            Answering::Model(decoder) => {
                Ok((world::sample(decoder, tokenizer, questions, theirs.size, (seed, 2))?, None))
            }
            Answering::Mixture(models, weights, candidates) => {
                let others: Vec<(&Decoder, f64)> =
                    models.iter().copied().zip(weights.iter().copied()).skip(1).collect();
                let sampling = world::sampling();
                let mixture = Mixture::new(&others, Mean::Geometric, &sampling);
                let size = theirs.size * candidates;
                let sampled = world::sample_with(Some(&mixture), models[0], tokenizer, questions, size, (seed, 2))?;
                if candidates == 1 {
                    return Ok((sampled, None));
                }
                let random = Random::new(seed, Purpose::Resampling);
                let chosen = mixture.resample(&sampled.episodes, candidates, random)?;
                let effective = mean(&chosen.iter().map(|one| one.effective).collect::<Vec<_>>());
                let groups = sampled.episodes.chunks(candidates).zip(chosen);
                let episodes: Vec<Episode> = groups.map(|(group, one)| group[one.chosen].clone()).collect();
                Ok((Sampled { episodes, size: theirs.size, ..sampled }, Some(effective)))
            }
        }
    }

    /// Measures answers by what the specialists and the world say of them.
    fn report(
        &self,
        start: &Start,
        specialists: &[Decoder],
        answering: Answering<'_>,
        trial: &Trial<'_>,
        into: &mut Measurements,
    ) -> Result<()> {
        let (answers, effective) = self.answers(start, &start.test, answering, trial.seed)?;
        into.set_known("effective_candidates", effective);
        let ratios = log_ratios(start, specialists, &answers)?;
        let mut wins = Vec::new();
        for ((name, utility), ratio) in OBJECTIVES.iter().zip(&ratios) {
            let win_rate = world::win_rate(&answers, &start.test, *utility);
            wins.push(win_rate);
            into.set(format!("log_ratio_{name}"), *ratio);
            into.set(format!("win_rate_{name}"), win_rate);
            into.set(*name, answers.mean(|question, answer| utility.of(question, answer)));
        }
        into.set("least_log_ratio", ratios.into_iter().fold(f64::INFINITY, f64::min));
        into.set("least_win_rate", wins.into_iter().fold(f64::INFINITY, f64::min));
        Ok(())
    }

    /// Help and harmlessness with a user's weights.
    fn user_weights(&self, start: &Start, trial: &Trial<'_>, into: &mut Measurements) -> Result<()> {
        let models: Vec<&Decoder> = start.specialists.iter().take(2).collect();
        let mut front: Vec<[f64; 2]> = Vec::new();
        for share in SHARES {
            let weights = [share, 1.0 - share];
            let (answers, _) =
                self.answers(start, &start.test, Answering::Mixture(&models, &weights, self.candidates), trial.seed)?;
            let rates = [0, 1].map(|place| world::win_rate(&answers, &start.test, OBJECTIVES[place].1));
            into.point("front", rates[0], rates[1]);
            into.point("help_by_weight", share, rates[0]);
            into.point("harmless_by_weight", share, rates[1]);
            front.push(rates);
        }
        let back = front.windows(2).map(|pair| (pair[0][0] - pair[1][0]).max(pair[1][1] - pair[0][1]));
        into.set_known("step_back", back.reduce(f64::max).map(|back| back.max(0.0)));
        Ok(())
    }
}

/// `β Σ_k λ_k s_k` of an answer, with weights that follow the rewards: those that are least are paid most.
struct Ratios {
    reference: Decoder,
    specialists: Vec<Decoder>,
    beta: f64,
    rate: f64,
    weights: Arc<Mutex<Vec<f64>>>,
    /// Tokens of all answers and their prompts.
    tokens: Arc<Mutex<f64>>,
}

impl Ratios {
    fn new(start: &Start, beta: f64, rate: f64) -> Self {
        let mut reference = start.reference.clone();
        reference.prepare(Precision::F32);
        let count = start.specialists.len();
        let weights = Arc::new(Mutex::new(vec![1.0 / count as f64; count]));
        Self { reference, specialists: start.specialists.clone(), beta, rate, weights, tokens: Default::default() }
    }
}

impl Reward for Ratios {
    fn name(&self) -> &str {
        "ratios"
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let asked = |(row, answer): (usize, &Answer<'_>)| {
            Question::asked(self.name(), row, answer).map(|question| (question, answer.completion_ids.to_vec()))
        };
        let answers: Vec<(Question, Vec<u32>)> = answers.iter().enumerate().map(asked).collect::<Result<_, _>>()?;
        let failed = |error: crate::Error| RewardError::Model { reward: self.name().into(), reason: error.to_string() };
        let all: Vec<(Question, &[u32])> = answers.iter().map(|(question, answer)| (*question, &answer[..])).collect();
        let log_probs = |model: &Decoder| world::log_probs(&mut model.clone(), &all).map_err(failed);
        let reference = log_probs(&self.reference)?;
        let models: Vec<Vec<f64>> = self.specialists.iter().map(log_probs).collect::<Result<_, _>>()?;
        *self.tokens.lock().unwrap_or_else(PoisonError::into_inner) +=
            answers.iter().map(|(question, answer)| (question.ids().len() + answer.len()) as f64).sum::<f64>();
        let ratio = |model: &[f64], row: usize| self.beta * (model[row] - reference[row]);
        let mut weights = self.weights.lock().unwrap_or_else(PoisonError::into_inner);
        let means: Vec<f64> = (models.iter())
            .map(|model| mean(&(0..answers.len()).map(|row| ratio(model, row)).collect::<Vec<_>>()))
            .collect();
        exponentiated(&mut weights, &means, self.rate);
        let paid = |row: usize| weights.iter().zip(&models).map(|(weight, model)| weight * ratio(model, row)).sum();
        Ok((0..answers.len()).map(|row| Some(Score::new(paid(row), Status::Ok))).collect())
    }
}
