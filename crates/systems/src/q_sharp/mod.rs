//! Q♯: distributional value learning, and decoding that is guided by it.
//!
//! "Q♯: Provably Optimal Distributional RL for LLM Post-Training", Zhou et al. 2025, arXiv 2502.20548. The reference model stays as it is. A second
//! model learns the law `Z(x, y)` of the return that follows when the reference goes on after token `y`, and tokens are drawn from
//!
//! ```text
//! π(y | x) ∝ π_ref(y | x) exp(Q(x, y) / η),     Q = η log E_{z ~ Z(x, y)} exp(z / η)
//! ```
//!
//! which has the largest `E[return] - η KL(π ‖ π_ref)` of all policies, for every price `η` with the same `Z` ([`mod@rollout::guidance`],
//! [`mod@train::methods::value_model`]). Controlled decoding, the baseline, has `E z` in place of `Q`.
//!
//! **Worlds.** `tree`: three tokens four times, the return at every leaf known; everything can be solved and is compared with what is
//! solved (`tree.rs`). `star`: the path to one end of a star, where the reference takes an arm at random. `chain`: sums of products of digits,
//! where the reference errs on purpose (`world.rs`).
//!
//! **Experiment.** In the tree laws are counted over walks of the reference and of the data loop's second round. In the other worlds a reference learns to
//! imitate; each arm then makes a value model, or trains the reference itself (REINFORCE, DPO) on as many sampled answers as the value model
//! gets to see, guided beginnings included; and answers to held-out prompts are sampled at a grid of prices. For the step size of REINFORCE and DPO there is a grid of two, chosen on prompts that are no
//! test; the value model has none.
//!
//! Deviations from the paper:
//! 1. The reference of the star is made to have the shortcut that the paper's learns from next tokens.
//! 2. Value models start from the weights of their reference where they are as large as it, and from nothing where they are smaller; there is no
//!    smaller language model to start from.
//! 3. The baseline has as many labelled answers as Q♯, all of the reference's, in place of its second round.
//! 4. See [`mod@train::methods::value_model`] for the data loop's.

mod tree;
mod world;

use std::collections::HashSet;

use data::Prompt;
use kernels::Precision;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use rollout::guidance::returns::{expected, soft};
use rollout::{GuidanceOptions, ValueHead, Worth};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::methods::policy::{Policy, PolicyOptions};
use train::methods::preference::{Preference, PreferenceOptions};
use train::methods::sft::SftOptions;
use train::methods::value_model::{ReturnLoss, ValueModel, ValueModelOptions};

use crate::error::Result;
use crate::experiment::{Experiment, Trial, open};
use crate::measurements::{Measurements, Seed};
use crate::system::{Arm, Bound, Claim, Figure, Role, System};
use tree::Tree;
use world::{Answers, Guide, Right, StarOptions};

/// The table.
pub const SYSTEM: System = System {
    name: "q-sharp",
    title: "Q♯: guidance by the law of the return",
    paper: "Zhou et al. 2025, \"Q♯: Provably Optimal Distributional RL for LLM Post-Training\", arXiv 2502.20548",
    summary: "a value model that knows the law of the reference's return guides it better, and nearer to itself, than one that knows the mean",
    arms: ARMS,
    claims: CLAIMS,
    figures: FIGURES,
    tiny: include_str!("tiny.toml"),
    quick: include_str!("quick.toml"),
    readme: include_str!("README.md"),
    recipes: &["paper"],
    data: None,
    schema: || schemars::schema_for!(QSharp).to_value(),
    open: |settings| open::<QSharp>("q-sharp", settings),
};

const ARMS: &[Arm] = &[
    Arm::new("tree-cd", Role::Baseline, "tree: guided by counted means"),
    Arm::new("tree", Role::Method, "tree: guided by counted laws"),
    Arm::new("star-reference", Role::Baseline, "star: not guided"),
    Arm::new("star-reinforce", Role::Baseline, "star: REINFORCE on the reference"),
    Arm::new("star-reinforce-fast", Role::Baseline, "star: the same with a larger step"),
    Arm::new("star-dpo", Role::Baseline, "star: DPO on pairs of the reference's answers"),
    Arm::new("star-dpo-fast", Role::Baseline, "star: the same with a larger step"),
    Arm::new("star", Role::Method, "star: guided by the law"),
    Arm::new("chain-reference", Role::Baseline, "chain: not guided"),
    Arm::new("chain-cd", Role::Baseline, "chain: guided by the mean, one round"),
    Arm::new("chain", Role::Method, "chain: guided by the law, two rounds"),
    Arm::new("chain-small", Role::Method, "chain: the same by a value model a quarter as large"),
    Arm::new("chain-mean", Role::Ablation, "chain: the mean in place of the law"),
    Arm::new("chain-one-round", Role::Ablation, "chain: one round with as many answers"),
    Arm::new("chain-first-token", Role::Ablation, "chain: one label for each answer"),
    Arm::new("chain-action", Role::Ablation, "chain: the value of every next token from one head before it (Q-type)"),
];

/// A number of an arm of the chain's less that of another.
fn lead(seed: &Seed<'_>, arm: &str, other: &str, name: &str) -> Option<f64> {
    Some(seed.value(arm, name)? - seed.value(other, name)?)
}

/// The accuracy on the star of a baseline with a grid.
fn tuned(seed: &Seed<'_>, arms: &[&'static str]) -> Option<f64> {
    seed.value(seed.best(arms, "tuning_accuracy")?, "accuracy")
}

const CLAIMS: &[Claim] = &[
    Claim {
        id: "1a",
        statement: "tree: from one count the worths of all nodes are right at every price: the largest error",
        bound: Bound::AtMost(0.02),
        measure: |seed| seed.value("tree", "error"),
    },
    Claim {
        id: "1b",
        statement: "tree: the objective is within 0.5 % of the best possible at every price: the largest share that is missing",
        bound: Bound::AtMost(0.005),
        measure: |seed| seed.value("tree", "gap"),
    },
    Claim {
        id: "1c",
        statement: "where a later token decides, means choose the sure thing: by how much the objective of laws is higher at η = 0.05",
        bound: Bound::AtLeast(0.1),
        measure: |seed| lead(seed, "tree", "tree-cd", "trap_objective"),
    },
    Claim {
        id: "2a",
        statement: "star: guided, the reference takes the right arm",
        bound: Bound::AtLeast(0.9),
        measure: |seed| seed.value("star", "accuracy"),
    },
    Claim {
        id: "2b",
        statement: "star: alone it takes one at random: distance of its accuracy from one in the number of arms",
        bound: Bound::AtMost(0.05),
        measure: |seed| seed.value("star-reference", "distance_from_chance"),
    },
    Claim {
        id: "2c",
        statement: "star: REINFORCE on as many sampled answers is below: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| {
            Some(seed.value("star", "accuracy")? - tuned(seed, &["star-reinforce", "star-reinforce-fast"])?)
        },
    },
    Claim {
        id: "2d",
        statement: "star: so is DPO: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(seed.value("star", "accuracy")? - tuned(seed, &["star-dpo", "star-dpo-fast"])?),
    },
    Claim {
        id: "3a",
        statement: "chain: at η = 0.1 the law is more often right than the mean: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "chain", "chain-cd", "accuracy"),
    },
    Claim {
        id: "3b",
        statement: "and stays nearer to the reference: by how many nats",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "chain-cd", "chain", "kl"),
    },
    Claim {
        id: "3c",
        statement: "chain: at the divergence that the mean has at η = 0.1 the law is more often right: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| {
            let (kl, accuracy) = (seed.value("chain-cd", "kl")?, seed.value("chain-cd", "accuracy")?);
            Some(height(seed.arm("chain")?.curves.get("frontier")?, kl)? - accuracy)
        },
    },
    Claim {
        id: "3d",
        statement: "chain: the majority of 8 guided answers is more often right than that of the reference's: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "chain", "chain-reference", "majority"),
    },
    Claim {
        id: "3e",
        statement: "chain: the value model chooses among 8 of the reference's answers: by how much it is right more often than one",
        bound: Bound::AtLeast(0.1),
        measure: |seed| Some(seed.value("chain", "verified")? - seed.value("chain-reference", "accuracy")?),
    },
    Claim {
        id: "4a",
        statement: "chain: the mean in place of the law, both with two rounds, loses accuracy at η = 0.1: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "chain", "chain-mean", "accuracy"),
    },
    Claim {
        id: "4b",
        statement: "so does one round in place of two",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "chain", "chain-one-round", "accuracy"),
    },
    Claim {
        id: "4c",
        statement: "so does one label for each answer in place of all",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "chain", "chain-first-token", "accuracy"),
    },
    Claim {
        id: "4d",
        statement: "so does a head over actions in place of states (the Q-type in place of the V-type)",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "chain", "chain-action", "accuracy"),
    },
    Claim {
        id: "5",
        statement: "chain: a value model with a quarter of the weights guides too: by how much accuracy rises at η = 0.1",
        bound: Bound::AtLeast(0.1),
        measure: |seed| lead(seed, "chain-small", "chain-reference", "accuracy"),
    },
];

/// The height of a curve at `x`, between its points along straight lines; at its end to the right of it, nothing to the left.
fn height(curve: &[(f64, f64)], x: f64) -> Option<f64> {
    let mut points = curve.to_vec();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let right = points.iter().position(|point| point.0 >= x);
    match right {
        Some(0) if points[0].0 > x => None,
        Some(0) => Some(points[0].1),
        Some(right) => {
            let ((x0, y0), (x1, y1)) = (points[right - 1], points[right]);
            Some(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
        }
        None => points.last().map(|point| point.1),
    }
}

const GUIDED: &[&str] = &["chain", "chain-cd", "chain-small"];
const ABLATIONS: &[&str] = &["chain", "chain-mean", "chain-one-round", "chain-first-token", "chain-action"];

const FIGURES: &[Figure] = &[
    Figure {
        title: "Chain: accuracy against divergence, over η",
        x: "nats",
        y: "accuracy",
        curve: "frontier",
        arms: GUIDED,
        diagonal: false,
    },
    Figure {
        title: "Chain: what Q♯ is made of",
        x: "nats",
        y: "accuracy",
        curve: "frontier",
        arms: ABLATIONS,
        diagonal: false,
    },
    Figure {
        title: "Chain: majority of 8 against divergence",
        x: "nats",
        y: "accuracy of the majority",
        curve: "majority_by_kl",
        arms: GUIDED,
        diagonal: false,
    },
    Figure {
        title: "Tree: error of the worths by price",
        x: "η",
        y: "largest error",
        curve: "error",
        arms: &["tree"],
        diagonal: false,
    },
];

/// Settings of the reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QSharp {
    /// The tree.
    pub tree: TreeSettings,
    /// The star.
    pub star: StarSettings,
    /// The chain.
    pub chain: ChainSettings,
}

/// Sizes of the tree and of what is counted in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TreeSettings {
    /// Tokens of a walk.
    #[schemars(range(min = 1, max = 10))]
    pub depth: u32,
    /// Tokens to choose from.
    #[schemars(range(min = 2, max = 10))]
    pub tokens: usize,
    /// Rounds.
    #[schemars(range(min = 1))]
    pub rounds: u32,
    /// Walks of a round.
    #[schemars(range(min = 1))]
    pub walks: u32,
    /// Prices at which worths are compared.
    pub etas: Vec<f64>,
}

/// Sizes of the star, and how its models learn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StarSettings {
    /// The shape of a star.
    pub shape: StarOptions,
    /// Width of all models; a multiple of 4.
    #[schemars(range(min = 4))]
    pub width: usize,
    /// Layers of all models.
    #[schemars(range(min = 1))]
    pub layers: usize,
    /// Paths that the reference learns from.
    #[schemars(range(min = 1))]
    pub corpus: u32,
    /// How it does so.
    pub sft: SftOptions,
    /// Stars to train on.
    #[schemars(range(min = 1))]
    pub prompts: u32,
    /// Stars to measure with; those that are trained on are left out.
    #[schemars(range(min = 1))]
    pub test: u32,
    /// Answers of the reference that DPO makes pairs of, for each star.
    #[schemars(range(min = 2))]
    pub pair_generations: usize,
    /// By how much the larger step size of a grid is larger.
    pub faster: f64,
    /// Value models start from the reference's weights, not from nothing.
    pub from_reference: bool,
    /// The value model.
    pub value: ValueModelOptions,
    /// REINFORCE.
    pub reinforce: PolicyOptions,
    /// DPO.
    pub dpo: PreferenceOptions,
}

/// Sizes of the chain, and how its models learn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChainSettings {
    /// What numbers are taken modulo of.
    #[schemars(range(min = 2, max = 100))]
    pub modulus: u32,
    /// Probability of an error in each step that the reference learns from.
    #[schemars(range(min = 0, max = 1))]
    pub noise: f64,
    /// Width of reference and value model; a multiple of 4.
    #[schemars(range(min = 4))]
    pub width: usize,
    /// Width of the smaller value model.
    #[schemars(range(min = 4))]
    pub small_width: usize,
    /// Layers of all models.
    #[schemars(range(min = 1))]
    pub layers: usize,
    /// Solutions that the reference learns from.
    #[schemars(range(min = 1))]
    pub corpus: u32,
    /// How it does so.
    pub sft: SftOptions,
    /// Answers to each held-out problem in a measurement; a multiple of 8.
    #[schemars(range(min = 8))]
    pub samples: usize,
    /// Prices of the curves.
    pub etas: Vec<f64>,
    /// Value models of the reference's width start from its weights, not from nothing.
    pub from_reference: bool,
    /// The value model; its `guidance.eta` is the price that claims are about.
    pub value: ValueModelOptions,
}

/// What all arms of a seed start from.
pub struct Start {
    star: World,
    chain: World,
}

/// A world with its reference.
struct World {
    tokenizer: Tokenizer,
    reference: Decoder,
    train: Vec<Prompt>,
    test: Vec<Prompt>,
}

impl World {
    /// A model of this shape with random weights: others than the reference had.
    fn fresh(&self, width: usize, layers: usize, trial: &Trial<'_>) -> Result<Decoder> {
        Ok(Decoder::random(world::model(&self.tokenizer, width, layers), trial.seed ^ 1 << 32)?)
    }

    /// Makes a value model of the reference out of `value`, and notes what it took.
    fn value(
        &self,
        mut value: Decoder,
        options: ValueModelOptions,
        trial: &Trial<'_>,
        measured: &mut Measurements,
    ) -> Result<Trained> {
        value.add_score(options.score_head(self.tokenizer.vocab_size()), 0.0, 0)?;
        let mut method = ValueModel::new(options.clone(), self.reference.clone(), self.train.clone(), Box::new(Right))?;
        let mut sampled = 0.0;
        trial.fit(1, &mut method, &mut value, &self.tokenizer, |step, _, metrics| {
            sampled += metrics.get("value/sampled_tokens").unwrap_or(0.0);
            for name in ["loss", "accuracy", "mse"] {
                if let Some(found) = metrics.get(name).filter(|found| found.is_finite()) {
                    measured.point(&format!("value_{name}"), step as f64, found);
                }
            }
            for quarter in 1..=4 {
                let error = metrics.get(&format!("calibration/quarter_{quarter}")).filter(|error| error.is_finite());
                measured.set_known(format!("calibration_error_{quarter}"), error);
            }
            Ok(())
        })?;
        measured.set("sampled_tokens", sampled);
        measured.set("weights", value.config().parameter_count() as f64);
        value.prepare(Precision::F32);
        Ok(Trained { value, options })
    }
}

/// A value model that was trained.
struct Trained {
    value: Decoder,
    options: ValueModelOptions,
}

impl Trained {
    fn guide<'a>(&'a self, options: &'a GuidanceOptions) -> Guide<'a> {
        Guide { value: &self.value, outputs: self.options.outputs(), options }
    }
}

/// Rounds of the measurements' draws.
const TEST: u32 = 1;
const TUNING: u32 = 2;
const PAIRS: u32 = 3;

impl Experiment for QSharp {
    type Start = Start;

    fn validate(&self) -> Result<()> {
        for (name, options) in [("star", &self.star.value), ("chain", &self.chain.value)] {
            options.validate().map_err(|error| error.within("value").within(name))?;
        }
        for (name, options) in [("star", &self.star.sft), ("chain", &self.chain.sft)] {
            options.validate().map_err(|error| error.within("sft").within(name))?;
        }
        self.star.reinforce.validate().map_err(|error| error.within("reinforce").within("star"))?;
        Ok(self.star.dpo.validate().map_err(|error| error.within("dpo").within("star"))?)
    }

    fn start(&self, trial: &Trial<'_>) -> Result<Start> {
        let Self { star, chain, .. } = self;
        let tokenizer = world::tokenizer(star.shape.names)?;
        let shape = world::model(&tokenizer, star.width, star.layers);
        let corpus = world::star_corpus(star.shape, trial.seed, star.corpus);
        let train = world::star_prompts(star.shape, &tokenizer, (trial.seed, 0), star.prompts);
        let mut test = world::star_prompts(star.shape, &tokenizer, (trial.seed, TEST), star.test);
        // Of few names the same star comes twice now and then.
        let known: HashSet<&[u32]> = train.iter().map(|prompt| &prompt.ids[..]).collect();
        test.retain(|prompt| !known.contains(&prompt.ids[..]));
        let reference = world::imitation(trial, shape, &tokenizer, star.sft.clone(), corpus)?;
        let stars = World { reference, train, test, tokenizer };
        let tokenizer = world::tokenizer(chain.modulus as usize)?;
        let shape = world::model(&tokenizer, chain.width, chain.layers);
        let corpus = world::chain_corpus((chain.modulus, chain.noise), trial.seed, chain.corpus);
        let chains = World {
            reference: world::imitation(trial, shape, &tokenizer, chain.sft.clone(), corpus)?,
            train: world::chain_prompts(&tokenizer, chain.modulus, false),
            test: world::chain_prompts(&tokenizer, chain.modulus, true),
            tokenizer,
        };
        Ok(Start { star: stars, chain: chains })
    }

    fn run(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        match arm.split_once('-').map_or((arm, ""), |(world, rest)| (world, rest)) {
            ("tree", rest) => Ok(self.tree(rest, trial)),
            ("star", rest) => self.star(&start.star, rest, trial),
            (_, rest) => self.chain(&start.chain, rest, trial),
        }
    }
}

impl QSharp {
    fn tree(&self, rest: &str, trial: &Trial<'_>) -> Measurements {
        let TreeSettings { depth, tokens, rounds, walks, etas } = &self.tree;
        let eta = self.chain.value.guidance.eta;
        let worth = |law: &[(f64, f64)], eta: f64| if rest == "cd" { expected(law) } else { soft(law, eta) };
        let mut measured = Measurements::default();
        let tree = Tree::random(*depth, *tokens, trial.seed);
        let counts = tree.count(*rounds, *walks, eta, trial.seed);
        let (mut error, mut gap) = (0.0, 0.0);
        for &eta in etas {
            let (found, exact) = (counts.worth(|law| worth(law, eta)), tree.soft_values(eta));
            measured.point("error", eta, tree::error(&found, &exact));
            error = f64::max(error, tree::error(&found, &exact));
            gap = f64::max(gap, 1.0 - tree.objective((&found, eta)) / exact[0]);
        }
        measured.set("error", error);
        measured.set("gap", gap);
        let (trap, eta) = (Tree::trap(), 0.05);
        let worth = trap.count(1, *walks, eta, trial.seed).worth(|law| worth(law, eta));
        measured.set("trap_objective", trap.objective((&worth, eta)));
        measured
    }

    fn star(&self, world: &World, rest: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let settings = &self.star;
        let World { tokenizer, reference, train, test } = world;
        let mut measured = Measurements::default();
        let faster = if rest.ends_with("fast") { settings.faster } else { 1.0 };
        let tuning = world::star_prompts(settings.shape, tokenizer, (trial.seed, TUNING), settings.test);
        let mut policy = reference.clone();
        let mut sampled = 0.0;
        if rest.is_empty() {
            let value = match settings.from_reference {
                true => reference.clone(),
                false => world.fresh(settings.width, settings.layers, trial)?,
            };
            let trained = world.value(value, settings.value.clone(), trial, &mut measured)?;
            let guidance = trained.options.guidance.clone();
            let guide = Some((trained.guide(&guidance), &[guidance.eta][..]));
            for answers in world::answers(reference, guide, tokenizer, test, 1, (trial.seed, TEST))? {
                measured.set("accuracy", answers.accuracy());
                measured.set("kl", answers.divergence());
            }
            return Ok(measured);
        }
        if rest.starts_with("reinforce") {
            let mut options = settings.reinforce.clone();
            options.training.learning_rate *= faster;
            let answers = (options.prompts_per_step * options.num_generations) as f64;
            let mut method = Policy::new(options, train.clone(), Box::new(Right))?;
            trial.fit(1, &mut method, &mut policy, tokenizer, |_, _, metrics| {
                sampled += answers * metrics.get("completions/mean_length").unwrap_or(0.0);
                Ok(())
            })?;
        }
        if rest.starts_with("dpo") {
            let size = settings.pair_generations;
            let answers = world::answers(reference, None, tokenizer, train, size, (trial.seed, PAIRS))?;
            sampled = answers.iter().map(Answers::tokens).sum::<usize>() as f64;
            let mut options = settings.dpo.clone();
            options.training.learning_rate *= faster;
            let pairs: Vec<_> = answers.iter().flat_map(Answers::pairs).collect();
            // A reference that is never right has nothing to compare.
            if !pairs.is_empty() {
                let mut method = Preference::new(options, pairs)?;
                trial.fit(1, &mut method, &mut policy, tokenizer, |_, _, _| Ok(()))?;
            }
        }
        policy.prepare(Precision::F32);
        for (name, prompts, round) in [("accuracy", test, TEST), ("tuning_accuracy", &tuning, TUNING)] {
            for answers in world::answers(&policy, None, tokenizer, prompts, 1, (trial.seed, round))? {
                measured.set(name, answers.accuracy());
            }
        }
        let chance = 1.0 / settings.shape.arms as f64;
        measured.set_known("distance_from_chance", measured.values.get("accuracy").map(|found| (found - chance).abs()));
        measured.set("sampled_tokens", sampled);
        Ok(measured)
    }

    fn chain(&self, world: &World, rest: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let settings = &self.chain;
        let World { tokenizer, reference, test, .. } = world;
        let mut measured = Measurements::default();
        let mut options = settings.value.clone();
        let once = |options: &mut ValueModelOptions| {
            options.num_generations *= options.rounds;
            options.rounds = 1;
        };
        if matches!(rest, "cd" | "mean") {
            options.loss_type = ReturnLoss::Squared;
            options.guidance.worth = Worth::Expected;
        }
        if matches!(rest, "cd" | "one-round") {
            once(&mut options);
        }
        options.prefixes &= rest != "first-token";
        if rest == "action" {
            options.head = ValueHead::Action;
        }
        let value = match (rest, settings.from_reference) {
            ("small", _) => world.fresh(settings.small_width, settings.layers, trial)?,
            (_, true) => reference.clone(),
            (_, false) => world.fresh(settings.width, settings.layers, trial)?,
        };
        let own = world::answers(reference, None, tokenizer, test, settings.samples, (trial.seed, TEST))?.remove(0);
        measured.point("frontier", 0.0, own.accuracy());
        measured.point("majority_by_kl", 0.0, own.majority(8));
        if rest == "reference" {
            measured.set("accuracy", own.accuracy());
            measured.set("majority", own.majority(8));
            return Ok(measured);
        }
        let trained = world.value(value, options, trial, &mut measured)?;
        let guidance = trained.options.guidance.clone();
        let guide = Some((trained.guide(&guidance), &settings.etas[..]));
        let found = world::answers(reference, guide, tokenizer, test, settings.samples, (trial.seed, TEST))?;
        for (&eta, answers) in settings.etas.iter().zip(&found) {
            let (accuracy, kl, majority) = (answers.accuracy(), answers.divergence(), answers.majority(8));
            measured.point("frontier", kl, accuracy);
            measured.point("majority_by_kl", kl, majority);
            measured.set(format!("accuracy_{eta}"), accuracy);
            measured.set(format!("kl_{eta}"), kl);
            if eta == guidance.eta {
                measured.set("accuracy", accuracy);
                measured.set("kl", kl);
                measured.set("majority", majority);
            }
        }
        measured.set("verified", own.verified(&trained.value, trained.options.head, 8)?);
        Ok(measured)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn curves_are_read_between_their_points() {
        let curve = [(0.0, 0.5), (2.0, 0.9), (1.0, 0.7)];
        assert_eq!(height(&curve, 0.0), Some(0.5));
        assert!((height(&curve, 1.5).unwrap() - 0.8).abs() < 1e-12);
        assert_eq!((height(&curve, 9.0), height(&curve[1..], 0.5)), (Some(0.9), None));
    }

    #[test]
    fn the_smaller_value_model_has_a_quarter_of_the_weights() {
        let settings: QSharp = serde_json::from_value(crate::settings::settings(&SYSTEM, false).unwrap()).unwrap();
        let tokenizer = world::tokenizer(settings.chain.modulus as usize).unwrap();
        let weights = |width| world::model(&tokenizer, width, settings.chain.layers).parameter_count() as f64;
        let share = weights(settings.chain.small_width) / weights(settings.chain.width);
        assert!((0.2..0.3).contains(&share), "{share}");
        assert!(settings.chain.etas.contains(&settings.chain.value.guidance.eta));
        assert!(settings.chain.samples.is_multiple_of(8));
    }

    #[test]
    fn baselines_sample_as_much_as_the_value_model() {
        let settings: QSharp = serde_json::from_value(crate::settings::settings(&SYSTEM, false).unwrap()).unwrap();
        let star = settings.star;
        let prompts = star.prompts as usize;
        // Every round but the first has guided answers too.
        let guided = prompts * star.value.num_generations * (2 * star.value.rounds - 1);
        let steps = star.reinforce.training.max_steps.unwrap() as usize;
        assert!(steps * star.reinforce.prompts_per_step * star.reinforce.num_generations >= guided);
        assert!(prompts * star.pair_generations >= guided);
    }
}
