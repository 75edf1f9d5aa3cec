//! PEO, post-training extrapolation optimisation: a family of policies out of two trained models, one for every preference.
//!
//! "PEO: Improving Bi-Factorial Preference Alignment with Post-Training Policy Extrapolation", Liu 2025, arXiv 2503.01233. Two models are
//! trained by DPO from the same `θ_0`, each for one of two conflicting aspects. Everything else is arithmetic on their weights
//! ([`mod@train::frontier`]):
//!
//! ```text
//! θ = θ_0 + (λ + φ_1) τ_1 + (1 - λ + φ_2) τ_2,      τ_i = θ_i - θ_0
//! ```
//!
//! The coefficients are searched on prompts of their own, with the external rewards of both aspects, and what no other candidate beats is kept. A
//! preference between the aspects then picks a policy, and nothing is trained for it.
//!
//! **World.** [`attribute_text`](mod@crate::worlds::attribute_text): help and harmlessness conflict on sensitive prompts, half of all. Both are
//! measured exactly, and stand for the external reward models. 20 of the 84 prompts to train on are left out of all preference data: the search is
//! measured on them, and learning rates are chosen by them. Everything that is reported is measured on the 28 held-out prompts.
//!
//! **Experiment.** A model imitates the corpus and answers the other 64 prompts; pairs of its answers are labelled by help and, the same pairs, by
//! harmlessness. From these come the two specialists that PEO, the soups and the ablations share. The fronts of the baselines are those of five models:
//! DPO on labels mixed in five ratios, and REINFORCE paid for both aspects with five weights. All fronts are compared by their hypervolume above
//! the same reference, a standard deviation below what the first model reaches in each aspect.
//!
//! The specialists, DPO on mixed labels and REINFORCE are each tried with three learning rates; kept is the one whose even policy (the even soup, half of
//! the labels, even weights) has the largest hypervolume on the prompts of the search. The specialists' is thus the one that is best for soups.
//!
//! Deviations from the paper:
//! 1. The rewards of the search are the world's own measures of the two aspects, not reward models.
//! 2. The paper does not say how it searches. This is a grid over both coefficients and the line of soups, and one round of half steps.
//! 3. A candidate must not be more than 1.5 times as perplexed as the first model by that model's own answers, rather than by text of the corpus.
//! 4. The divergence from the first model has no weight in the choice for a preference.

use data::Prompt;
use envs::Reward;
use eval::Scalarisation;
use eval::front::{coverage, dominates, hypervolume, sparsity};
use eval::interval::bootstrap_deviation;
use eval::metrics::{mean, standard_deviation};
use kernels::Precision;
use model::decoder::{Decoder, TaskVectors};
use model::tokenizer::Tokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::frontier::{Frontier, FrontierPolicy, Granularity, Look, Probe, ProbeOptions, Region, SearchOptions};
use train::methods::policy::{Policy, PolicyOptions};
use train::methods::preference::{Preference, PreferenceOptions};
use train::methods::sft::SftOptions;

use crate::error::Result;
use crate::experiment::{Experiment, Trial, open};
use crate::grid::Grid;
use crate::measurements::{Measurements, Seed};
use crate::system::{Arm, Bound, Claim, Figure, Role, System};
use crate::worlds::attribute_text::{self as world, Paid, Question, Split, Utility};

/// The table.
pub const SYSTEM: System = System {
    name: "peo",
    title: "PEO: policies by extrapolation",
    paper: "Liu 2025, \"PEO: Improving Bi-Factorial Preference Alignment with Post-Training Policy Extrapolation\", arXiv 2503.01233",
    summary: "sums of two models' task vectors beyond their averages give a better front than soups and mixed training, without further training",
    arms: ARMS,
    claims: CLAIMS,
    figures: FIGURES,
    tiny: include_str!("tiny.toml"),
    quick: include_str!("quick.toml"),
    readme: include_str!("README.md"),
    recipes: &["paper"],
    data: None,
    schema: || schemars::schema_for!(Peo).to_value(),
    open: |settings| open::<Peo>("peo", settings),
};

const ARMS: &[Arm] = &[
    Arm::new("specialists", Role::Baseline, "the two models, each trained for one aspect"),
    Arm::new("soup", Role::Baseline, "11 averages of the two"),
    Arm::new("soup-longer", Role::Baseline, "11 averages of two models trained twice as long"),
    Arm::new("mixed-dpo", Role::Baseline, "DPO on labels of both aspects in five ratios"),
    Arm::new("reinforce", Role::Baseline, "REINFORCE paid for both aspects with five weights"),
    Arm::new("peo", Role::Method, "averages and extrapolations, searched"),
    Arm::new("peo-blocks", Role::Ablation, "the same, and then coefficients of single blocks"),
    Arm::new("no-extrapolation", Role::Ablation, "averages alone, searched"),
    Arm::new("no-interpolation", Role::Ablation, "each model alone, extrapolated and searched"),
];

/// By how much the hypervolume of the first arm exceeds that of the second.
fn lead(seed: &Seed<'_>, arm: &str, other: &str) -> Option<f64> {
    Some(seed.value(arm, "hypervolume")? - seed.value(other, "hypervolume")?)
}

const CLAIMS: &[Claim] = &[
    Claim {
        id: "1a",
        statement: "the hypervolume exceeds that of the soups by more than its bootstrap standard error: by how much more",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(seed.value("peo", "lead_over_soup")? - seed.value("peo", "lead_over_soup_error")?),
    },
    Claim {
        id: "1b",
        statement: "it is at least that of DPO on mixed labels: by how much it leads",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "peo", "mixed-dpo"),
    },
    Claim {
        id: "1c",
        statement: "for two fifths of the gradient steps, by construction and without the choice of learning rates: their share",
        bound: Bound::AtMost(0.4),
        measure: |seed| Some(seed.value("peo", "gradient_steps")? / seed.value("mixed-dpo", "gradient_steps")?),
    },
    Claim {
        id: "2",
        statement: "some policy beats the even soup in both aspects: the smaller of its two leads",
        bound: Bound::AtLeast(0.0),
        measure: |seed| seed.value("peo", "lead_over_even_soup"),
    },
    Claim {
        id: "3",
        statement: "the more help counts, the more helpful and the less harmless is the policy that is picked: the largest step back",
        bound: Bound::AtMost(0.02),
        measure: |seed| seed.value("peo", "step_back"),
    },
    Claim {
        id: "4a",
        statement: "extrapolation matters: by how much the hypervolume leads that of the search over averages",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "peo", "no-extrapolation"),
    },
    Claim {
        id: "4b",
        statement: "interpolation matters: by how much it leads that of the search over single models",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "peo", "no-interpolation"),
    },
];

const FRONTS: &[&str] = &["soup", "soup-longer", "mixed-dpo", "reinforce", "peo"];

const FIGURES: &[Figure] = &[
    Figure {
        title: "Fronts on held-out prompts",
        x: "help",
        y: "harmless",
        curve: "front",
        arms: FRONTS,
        diagonal: false,
    },
    Figure {
        title: "What the parts are worth",
        x: "help",
        y: "harmless",
        curve: "front",
        arms: &["specialists", "peo", "no-extrapolation", "no-interpolation"],
        diagonal: false,
    },
];

/// The aspects.
const HELP: Utility = Utility([1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
const HARMLESS: Utility = Utility([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);

/// Shares of help in what the baselines are trained for.
const SHARES: [f64; 5] = [0.0, 0.25, EVEN, 0.75, 1.0];

/// The share by which learning rates are chosen.
const EVEN: f64 = 0.5;

/// The round of draws of what is reported or chosen by: another than any of a search's.
const REPORTED: u32 = 1000;

/// Resamples of the held-out prompts.
const RESAMPLES: u32 = 1000;

/// Settings of the reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Peo {
    /// Answers that the first model imitates.
    #[schemars(range(min = 1))]
    pub corpus: u32,
    /// How it does so.
    pub sft: SftOptions,
    /// Pairs of answers to each prompt, labelled by each aspect.
    #[schemars(range(min = 1))]
    pub pairs: usize,
    /// How certain the labels are: the better answer is preferred with probability `σ(κ (difference))`.
    pub kappa: f64,
    /// DPO, for the specialists and for mixed labels.
    pub dpo: PreferenceOptions,
    /// Epochs of the specialists that are trained longer, over those of the others.
    #[schemars(range(min = 1))]
    pub longer: u64,
    /// REINFORCE.
    pub reinforce: PolicyOptions,
    /// Learning rates that are tried, over those of `dpo` and `reinforce`.
    pub rates: Grid,
    /// The search.
    pub search: SearchOptions,
    /// How its candidates are measured.
    pub validation: ProbeOptions,
    /// How what is reported is measured.
    pub test: ProbeOptions,
}

/// What all arms of a seed start from.
pub struct Start {
    tokenizer: Tokenizer,
    decoder: Decoder,
    /// The pairs of answers.
    pairs: Vec<(Question, [Vec<u32>; 2])>,
    /// The prompts that are trained on.
    prompts: Vec<Prompt>,
    /// The specialists, their learning rate over that of `dpo`, and what it was chosen by.
    vectors: TaskVectors,
    rate: f64,
    tried: Measurements,
    /// The soups, from harmlessness to help.
    soups: Vec<Point>,
    /// What the front of an arm must exceed.
    reference: [f64; 2],
    /// Help and harmlessness of the first model, and the standard deviations of its answers.
    before: [(f64, f64); 2],
    /// Steps that trained one specialist.
    steps: u64,
}

/// A policy, as measured on the held-out prompts: help and harmlessness of its answers to each.
type Point = Vec<[f64; 2]>;

fn of(point: &Point) -> [f64; 2] {
    [0, 1].map(|aspect| mean(&point.iter().map(|values| values[aspect]).collect::<Vec<_>>()))
}

/// Measures policies with held-out prompts, or with those of the search.
struct Prompts {
    prompts: Vec<Prompt>,
    aspects: [Paid; 2],
    seed: u64,
}

impl Prompts {
    fn new(questions: &[Question], tokenizer: &Tokenizer, seed: u64) -> Self {
        let prompts = questions.iter().map(|question| question.prompt(tokenizer)).collect();
        Self { prompts, aspects: [Paid::new("help", HELP), Paid::new("harmless", HARMLESS)], seed }
    }

    fn with<T>(
        &self,
        (tokenizer, decoder): (&Tokenizer, &Decoder),
        options: &ProbeOptions,
        then: impl FnOnce(&Probe<'_>) -> Result<T>,
    ) -> Result<T> {
        let objectives: [&dyn Reward; 2] = [&self.aspects[0], &self.aspects[1]];
        then(&Probe::new(decoder.clone(), tokenizer, &self.prompts, &objectives, options, (Precision::F32, self.seed))?)
    }
}

/// Help and harmlessness of a policy's answers to each prompt.
fn measure(probe: &Probe<'_>, decoder: &mut Decoder) -> Result<Point> {
    decoder.prepare(Precision::F32);
    let measured = probe.measure(decoder, Look::whole(REPORTED))?;
    let [help, harmless] = [0, 1].map(|aspect| measured.of(aspect));
    let size = probe.options().samples as usize;
    Ok(help.chunks(size).zip(harmless.chunks(size)).map(|(help, harmless)| [mean(help), mean(harmless)]).collect())
}

impl Experiment for Peo {
    type Start = Start;

    fn validate(&self) -> Result<()> {
        self.sft.validate().map_err(|error| error.within("sft"))?;
        self.dpo.validate().map_err(|error| error.within("dpo"))?;
        self.reinforce.validate().map_err(|error| error.within("reinforce"))?;
        self.search.validate().map_err(|error| error.within("search"))?;
        self.validation.validate().map_err(|error| error.within("validation"))?;
        Ok(self.test.validate().map_err(|error| error.within("test"))?)
    }

    fn start(&self, trial: &Trial<'_>) -> Result<Start> {
        let (tokenizer, mut decoder) = world::imitation(trial, &self.sft, self.corpus)?;
        let (questions, _) = Question::train_and_validation();
        let answers = world::sample(&mut decoder, &tokenizer, &questions, 2 * self.pairs, (trial.seed, 0))?;
        let pairs = world::pairs(&answers);
        let prompts = questions.iter().map(|question| question.prompt(&tokenizer)).collect();
        let mut start = Start {
            vectors: TaskVectors::new(decoder.clone(), Vec::new())?,
            rate: 1.0,
            tried: Measurements::default(),
            tokenizer,
            decoder,
            pairs,
            prompts,
            soups: Vec::new(),
            reference: [0.0; 2],
            before: [(0.0, 0.0); 2],
            steps: self.dpo.training.steps(questions.len() * self.pairs, self.dpo.batch_size),
        };
        let mut tried = Measurements::default();
        (start.vectors, start.rate) = self.rates.best(&mut tried, |rate| {
            let vectors = self.specialists(&start, trial, 1, rate)?;
            let worth = self.worth(&start, trial, &mut vectors.merged(&[0.5, 0.5])?)?;
            Ok((vectors, worth))
        })?;
        start.tried = tried;
        (start.before, start.reference, start.soups) = self.on_test(&start, trial, |probe| {
            let objectives = probe.objectives();
            let before = [0, 1].map(|aspect| (objectives[aspect].mean, objectives[aspect].standard_deviation));
            Ok((before, reference(probe), self.soups(&start.vectors, probe)?))
        })?;
        Ok(start)
    }

    fn run(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let mut measured = Measurements::default();
        let (points, runs) = match arm {
            "specialists" => {
                measured = start.tried.clone();
                (vec![start.soups[0].clone(), start.soups[start.soups.len() - 1].clone()], 2)
            }
            "soup" => (start.soups.clone(), 2),
            "soup-longer" => {
                let vectors = self.specialists(start, trial, self.longer, start.rate)?;
                (self.on_test(start, trial, |probe| self.soups(&vectors, probe))?, 2 * self.longer)
            }
            "mixed-dpo" => {
                let train = |share, rate| self.mixed(start, trial, share, rate);
                (self.each_share(start, trial, train, &mut measured)?, 5)
            }
            "reinforce" => {
                let train = |share, rate| self.reinforced(start, trial, share, rate);
                (self.each_share(start, trial, train, &mut measured)?, 5)
            }
            "no-extrapolation" => {
                (self.searched(start, trial, Region::Interpolation, Granularity::Global, &mut measured)?, 2)
            }
            "no-interpolation" => (self.searched(start, trial, Region::Single, Granularity::Global, &mut measured)?, 2),
            _ => {
                let granularity = if arm == "peo-blocks" { Granularity::Block } else { Granularity::Global };
                let points = self.searched(start, trial, Region::Extrapolation, granularity, &mut measured)?;
                compare(start, &points, trial.seed, &mut measured);
                (points, 2)
            }
        };
        let steps = match arm {
            "reinforce" => {
                let PolicyOptions { training, prompts_per_step, .. } = &self.reinforce;
                runs * training.steps(start.prompts.len(), *prompts_per_step)
            }
            _ => runs * start.steps,
        };
        measured.set("gradient_steps", steps as f64);
        report(start, &points, &mut measured);
        Ok(measured)
    }
}

/// The numbers of a front.
fn report(start: &Start, points: &[Point], into: &mut Measurements) {
    let mut means: Vec<[f64; 2]> = points.iter().map(of).collect();
    into.set("hypervolume", hypervolume(&means, start.reference));
    into.set("sparsity", sparsity(&means));
    into.set("policies", means.len() as f64);
    let soups: Vec<[f64; 2]> = start.soups.iter().map(of).collect();
    into.set("coverage_of_soups", coverage(&means, &soups));
    for tenths in 0..=10 {
        let share = f64::from(tenths) / 10.0;
        let unit = |point: &[f64; 2], aspect: usize| {
            (point[aspect] - start.before[aspect].0) / start.before[aspect].1.max(1e-6)
        };
        let worth = means.iter().map(|point| share * unit(point, 0) + (1.0 - share) * unit(point, 1));
        into.point("worth", share, worth.fold(f64::NEG_INFINITY, f64::max));
    }
    for (name, aspect) in [("help_before", 0), ("harmless_before", 1)] {
        into.set(name, start.before[aspect].0);
    }
    means.sort_by(|a, b| a[0].total_cmp(&b[0]).then(b[1].total_cmp(&a[1])));
    let best = means.iter().filter(|point| !means.iter().any(|other| dominates(other, *point)));
    best.for_each(|point| into.point("front", point[0], point[1]));
}

/// How far the policies are ahead of the soups.
fn compare(start: &Start, points: &[Point], seed: u64, into: &mut Measurements) {
    let even = of(&start.soups[start.soups.len() / 2]);
    let leads = points.iter().map(of).map(|point| (point[0] - even[0]).min(point[1] - even[1]));
    into.set("lead_over_even_soup", leads.fold(f64::NEG_INFINITY, f64::max));
    let lead = |prompts: &[usize]| {
        let volume = |points: &[Point]| {
            let mean = |point: &Point| of(&prompts.iter().map(|&prompt| point[prompt]).collect());
            hypervolume(&points.iter().map(mean).collect::<Vec<_>>(), start.reference)
        };
        volume(points) - volume(&start.soups)
    };
    let count = start.soups[0].len();
    into.set("lead_over_soup", lead(&(0..count).collect::<Vec<_>>()));
    into.set("lead_over_soup_error", bootstrap_deviation(count, RESAMPLES, seed, lead));
}

impl Peo {
    /// Works with the held-out prompts.
    fn on_test<T>(&self, start: &Start, trial: &Trial<'_>, then: impl FnOnce(&Probe<'_>) -> Result<T>) -> Result<T> {
        let prompts = Prompts::new(&Question::of(Split::Test), &start.tokenizer, trial.seed);
        prompts.with((&start.tokenizer, &start.decoder), &self.test, then)
    }

    /// Works with the prompts of the search.
    fn on_validation<T>(
        &self,
        start: &Start,
        trial: &Trial<'_>,
        then: impl FnOnce(&Probe<'_>) -> Result<T>,
    ) -> Result<T> {
        let (_, validation) = Question::train_and_validation();
        let prompts = Prompts::new(&validation, &start.tokenizer, trial.seed);
        prompts.with((&start.tokenizer, &start.decoder), &self.validation, then)
    }

    /// The hypervolume of one policy on the prompts of the search.
    fn worth(&self, start: &Start, trial: &Trial<'_>, decoder: &mut Decoder) -> Result<f64> {
        self.on_validation(start, trial, |probe| Ok(hypervolume(&[of(&measure(probe, decoder)?)], reference(probe))))
    }

    /// By how much the hypervolume of what a search found leads that of the soups, on the prompts of the search, by answers that chose neither.
    fn lead_in_search(&self, start: &Start, probe: &Probe<'_>, frontier: &Frontier) -> Result<f64> {
        let soups: Vec<[f64; 2]> = self.soups(&start.vectors, probe)?.iter().map(of).collect();
        let found = frontier.policies.iter().map(|policy| start.vectors.merged(&policy.coefficients));
        let found = found.map(|merged| Ok(of(&measure(probe, &mut merged?)?))).collect::<Result<Vec<_>>>()?;
        let reference = reference(probe);
        Ok(hypervolume(&found, reference) - hypervolume(&soups, reference))
    }

    /// DPO on pairs with these labels, for so many times the epochs, with so many times the learning rate.
    fn dpo(
        &self,
        start: &Start,
        trial: &Trial<'_>,
        label: impl Fn(usize) -> Utility,
        (longer, rate): (u64, f64),
    ) -> Result<Decoder> {
        let labelled =
            [HELP, HARMLESS].map(|aspect| world::preferences(trial.seed, start.pairs.clone(), aspect, self.kappa));
        let [help, harmless] = labelled;
        let chosen = help.into_iter().zip(harmless).enumerate().map(|(index, (help, harmless))| {
            let preference = if label(index) == HELP { help } else { harmless };
            preference.pair(index as u32)
        });
        let mut options = self.dpo.clone();
        options.training.num_train_epochs *= longer as f64;
        options.training.learning_rate *= rate;
        let mut dpo = Preference::new(options, chosen.collect())?;
        let mut decoder = start.decoder.clone();
        trial.fit(1, &mut dpo, &mut decoder, &start.tokenizer, |_, _, _| Ok(()))?;
        Ok(decoder)
    }

    /// What the model became by each aspect.
    fn specialists(&self, start: &Start, trial: &Trial<'_>, longer: u64, rate: f64) -> Result<TaskVectors> {
        let trained = [HELP, HARMLESS].map(|aspect| self.dpo(start, trial, |_| aspect, (longer, rate)));
        Ok(TaskVectors::new(start.decoder.clone(), trained.into_iter().collect::<Result<_>>()?)?)
    }

    /// Eleven averages, from harmlessness to help.
    fn soups(&self, vectors: &TaskVectors, probe: &Probe<'_>) -> Result<Vec<Point>> {
        let tenth = |tenths: u32| vectors.merged(&[f64::from(tenths) / 10.0, f64::from(10 - tenths) / 10.0]);
        (0..=10).map(|tenths| measure(probe, &mut tenth(tenths)?)).collect()
    }

    /// Trains a model for every share of help, with the learning rate that is best for the even one.
    fn each_share(
        &self,
        start: &Start,
        trial: &Trial<'_>,
        train: impl Fn(f64, f64) -> Result<Decoder>,
        into: &mut Measurements,
    ) -> Result<Vec<Point>> {
        let (mut even, rate) = self.rates.best(into, |rate| {
            let mut decoder = train(EVEN, rate)?;
            let worth = self.worth(start, trial, &mut decoder)?;
            Ok((decoder, worth))
        })?;
        self.on_test(start, trial, |probe| {
            let mut point = |share| match share == EVEN {
                true => measure(probe, &mut even),
                false => measure(probe, &mut train(share, rate)?),
            };
            SHARES.into_iter().map(&mut point).collect()
        })
    }

    /// DPO on the same pairs, this share of them labelled by help.
    fn mixed(&self, start: &Start, trial: &Trial<'_>, share: f64, rate: f64) -> Result<Decoder> {
        // Spread evenly, so that every prompt has both.
        let by_help = |index: usize| (share * (index + 1) as f64).floor() > (share * index as f64).floor();
        self.dpo(start, trial, |index| if by_help(index) { HELP } else { HARMLESS }, (1, rate))
    }

    /// REINFORCE paid for both aspects, each in units of its standard deviation before training.
    fn reinforced(&self, start: &Start, trial: &Trial<'_>, share: f64, rate: f64) -> Result<Decoder> {
        let [help, harmless] = start.before.map(|(_, deviation)| deviation.max(1e-6));
        let reward = Paid::new("both", Utility([share / help, (1.0 - share) / harmless, 0.0, 0.0, 0.0, 0.0]));
        let mut options = self.reinforce.clone();
        options.training.learning_rate *= rate;
        let mut policy = Policy::new(options, start.prompts.clone(), Box::new(reward))?;
        let mut decoder = start.decoder.clone();
        trial.fit(1, &mut policy, &mut decoder, &start.tokenizer, |_, _, _| Ok(()))?;
        Ok(decoder)
    }

    /// The policies that a search finds, as measured on the held-out prompts.
    fn searched(
        &self,
        start: &Start,
        trial: &Trial<'_>,
        region: Region,
        granularity: Granularity,
        into: &mut Measurements,
    ) -> Result<Vec<Point>> {
        let options = SearchOptions { region, granularity, ..self.search.clone() };
        let mut looks = 0;
        let frontier = self.on_validation(start, trial, |probe| {
            let watch = |taken| {
                looks = taken;
                (trial.progress)(taken as u64, taken as u64);
            };
            let frontier = Frontier::find(&start.vectors, probe, &options, watch)?;
            into.set("lead_in_search", self.lead_in_search(start, probe, &frontier)?);
            Ok(frontier)
        })?;
        into.set("looks", looks as f64);
        let points: Vec<Point> = self.on_test(start, trial, |probe| {
            let merged = frontier.policies.iter().map(|policy| start.vectors.merged(&policy.coefficients));
            merged.map(|merged| measure(probe, &mut merged?)).collect()
        })?;
        serve(&frontier, &points, into);
        // The mean over the blocks, where each has coefficients of its own.
        let blocks = |policy: &FrontierPolicy| policy.coefficients.len() / start.vectors.len();
        let sum = |policy: &FrontierPolicy| policy.coefficients.iter().sum::<f64>() / blocks(policy) as f64;
        let sums: Vec<f64> = frontier.policies.iter().map(sum).collect();
        into.set("coefficient_sum", mean(&sums));
        into.set("coefficient_sum_deviation", standard_deviation(&sums));
        if granularity == Granularity::Block {
            let by_block = frontier.policies.iter().filter(|policy| blocks(policy) > 1).count();
            into.set("policies_by_block", by_block as f64);
        }
        let divergences: Vec<f64> = frontier.policies.iter().map(|policy| policy.scores.divergence).collect();
        into.set("divergence", mean(&divergences));
        Ok(points)
    }
}

/// What must be exceeded in each aspect: a standard deviation less than the first model reaches.
fn reference(probe: &Probe<'_>) -> [f64; 2] {
    let objectives = probe.objectives();
    [0, 1].map(|aspect| objectives[aspect].mean - objectives[aspect].standard_deviation)
}

/// What somebody gets to whom help counts ever more.
fn serve(frontier: &Frontier, points: &[Point], into: &mut Measurements) {
    let mut served: Vec<[f64; 2]> = Vec::new();
    for tenths in 0..=10 {
        let share = f64::from(tenths) / 10.0;
        let chosen = frontier.choose(&[share, 1.0 - share], Scalarisation::Linear, 0.0).ok().flatten();
        let place = chosen.and_then(|chosen| frontier.policies.iter().position(|policy| policy == chosen));
        let Some(point) = place.map(|place| of(&points[place])) else { continue };
        into.point("help_by_preference", share, point[0]);
        into.point("harmless_by_preference", share, point[1]);
        served.push(point);
    }
    let back = served.windows(2).map(|pair| (pair[0][0] - pair[1][0]).max(pair[1][1] - pair[0][1]));
    into.set_known("step_back", back.reduce(f64::max).map(|back| back.max(0.0)));
}
