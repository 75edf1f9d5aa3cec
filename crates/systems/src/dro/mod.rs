//! Distributionally robust RLHF: reward models and policies for the worst mix of prompts.
//!
//! "Distributionally Robust Reinforcement Learning with Human Feedback", Mandal, Sasnauskas, Radanovic 2025, arXiv 2503.00539. Losses are
//! minimised for the worst distribution of prompts in a ball of total variation around that of the data:
//!
//! ```text
//! reward     min_φ max_{TV(q, 1/n) ≤ ρ} Σ_i q_i [ -log σ(r(x_i, y_w) - r(x_i, y_l)) ]
//! DPO        min_θ max_{TV(q, 1/n) ≤ ρ} Σ_i q_i [ -log σ(β (h(y_w) - h(y_l))) ]
//! policy     max_θ min_{TV(q, 1/n) ≤ ρ} Σ_i q_i [ E r(x_i, y) - β KL(π ‖ π_ref) ]
//! ```
//!
//! The inner problem has a closed form over a batch ([`mod@objectives::worst_case`]), and by Danskin's theorem its gradient is that of the
//! reweighted loss. Recipes say `worst_case = { ball = "total_variation", radius = 0.2, over = "prompts" }`.
//!
//! **World** ([`world`]). A tenth of what is trained on are sums of two digits modulo four, answered rightly or not; the rest are the
//! shared world's prompts about two topics ([`attribute_text`](mod@crate::worlds::attribute_text)), where long answers tend to be worth more. A
//! reward model that learns the mean learns what chat is about. What is deployed is another mix: a tenth chat and nine tenths sums
//! (*flipped*), half and half (*balanced*), sums alone, and prompts about three topics, which nothing was trained on.
//!
//! **Experiment.** A model imitates plausible answers, as many to sums as to chat, of which it would not learn enough from a tenth; its own
//! answers are compared in pairs, of which the one that is worth more is preferred. Reward models (one layer of width 32, from scratch) learn from them; policies learn from them by DPO, or from the utility itself by RLOO. Accuracy is
//! that on pairs of new answers whose order by utility is known. *Out of distribution* is the mean over the four other mixes. Each method
//! and each baseline has a grid of three (of two, for RLOO), chosen on the flipped mix of other answers to prompts that are trained on. *Group DRO*
//! ([`mod@objectives::group_dro`]) is told which pairs are about sums: what there is to gain for those who know.
//!
//! Deviations from the paper:
//! 1. Prompts recur: a batch has several pairs of one prompt, whose mean loss is what the mix is of, and a test has new answers to the sums
//!    that were trained on. There are but 16 of them.
//! 2. Reward models start from random weights, since a model of this size that has seen the corpus leaves no room.
//! 3. The policy game is RLOO's with four answers a prompt, paid by the utility; the paper's is PPO's, paid by the robust reward model.
//! 4. The mass that moves goes to the losses in proportion to `e^{l/τ}`; the exact ball, where all of it goes to the largest loss, is an ablation.
//! 5. AdamW with a constant rate and no averaging of iterates. The theory's rate is a unit test, on a convex problem.
//! 6. Labels are those of the utility, without noise, and batches have 256 pairs in place of 64: with noise, or with fewer pairs, the worst case
//!    is a pair that contradicts others, and nothing is learnt (README). Two ablations flip a tenth of the labels.

#[cfg(test)]
mod convex;
pub mod world;

use base::{Purpose, Random};
use data::{Example, PreferencePair, Prompt};
use eval::metrics::mean;
use kernels::Precision;
use model::ModelConfig;
use model::config::ScoreHead;
use model::decoder::{Decoder, Workspace};
use model::tokenizer::Tokenizer;
use objectives::{Ball, GroupDro, Members, WorstCase};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::methods::policy::{Policy, PolicyOptions};
use train::methods::preference::{Preference, PreferenceOptions};
use train::methods::reward_model::{RewardModel, RewardModelOptions, RewardRows};
use train::methods::sft::{Sft, SftOptions};
use train::scoring::{Batch, Scored, Unit};

use crate::error::{Error, Result};
use crate::experiment::{Experiment, Trial, open};
use crate::measurements::{Measurements, Seed};
use crate::system::{Arm, Bound, Claim, Figure, Role, System};
use crate::worlds::attribute_text::{self as shared, Question, Split, digits};
use world::{Gold, Labelled, Task};

/// The table.
pub const SYSTEM: System = System {
    name: "dro",
    title: "Distributionally robust RLHF",
    paper: "Mandal et al. 2025, \"Distributionally Robust Reinforcement Learning with Human Feedback\", arXiv 2503.00539",
    summary: "trained for the worst mix of prompts, reward models and policies are better on mixes that they were not trained on",
    arms: ARMS,
    claims: CLAIMS,
    figures: FIGURES,
    tiny: include_str!("tiny.toml"),
    quick: include_str!("quick.toml"),
    readme: include_str!("README.md"),
    recipes: &["paper"],
    data: None,
    schema: || schemars::schema_for!(Dro).to_value(),
    open: |settings| open::<Dro>("dro", settings),
};

const ARMS: &[Arm] = &[
    Arm::new("rm", Role::Baseline, "reward model, mean over pairs (empirical risk)"),
    Arm::new("rm-slow", Role::Baseline, "the same at half the learning rate"),
    Arm::new("rm-fast", Role::Baseline, "the same at twice the learning rate"),
    Arm::new("rm-smooth", Role::Baseline, "the same with smoothed labels, ε = 0.1"),
    Arm::new("rm-margin", Role::Baseline, "the same, by a margin: the difference in utility"),
    Arm::new("rm-ensemble", Role::Baseline, "the mean of three of them"),
    Arm::new("rm-group-0.01", Role::Baseline, "group DRO, which is told chat from sums, η = 0.01"),
    Arm::new("rm-group-0.1", Role::Baseline, "group DRO, η = 0.1"),
    Arm::new("rm-group-1", Role::Baseline, "group DRO, η = 1"),
    Arm::new("rm-prompts", Role::Baseline, "mean over prompts of the mean over their pairs: ρ = 0"),
    Arm::new("rm-dro-0.1", Role::Method, "worst mix of prompts, ρ = 0.1, its mass spread by temperature"),
    Arm::new("rm-dro-0.2", Role::Method, "worst mix of prompts, ρ = 0.2"),
    Arm::new("rm-dro-0.4", Role::Method, "worst mix of prompts, ρ = 0.4"),
    Arm::new("rm-dro-0.8", Role::Ablation, "worst mix of prompts, ρ = 0.8"),
    Arm::new("rm-pairs-0", Role::Ablation, "worst mix of pairs, ρ = 0"),
    Arm::new("rm-pairs-0.2", Role::Ablation, "worst mix of pairs instead of prompts, ρ = 0.2"),
    Arm::new("rm-cvar", Role::Ablation, "conditional value at risk in place of total variation, 0.2"),
    Arm::new("rm-chi-square", Role::Ablation, "χ² in place of total variation, 0.2"),
    Arm::new("rm-kl", Role::Ablation, "KL in place of total variation, 0.2"),
    Arm::new("rm-exact-0.2", Role::Ablation, "ρ = 0.2, all of its mass to the largest loss"),
    Arm::new("rm-flipped", Role::Ablation, "empirical risk with a tenth of the labels flipped"),
    Arm::new("rm-dro-flipped", Role::Ablation, "ρ = 0.2 with a tenth of the labels flipped"),
    Arm::new("dpo", Role::Baseline, "DPO"),
    Arm::new("dpo-beta-0.05", Role::Baseline, "DPO, β = 0.05"),
    Arm::new("dpo-beta-0.2", Role::Baseline, "DPO, β = 0.2"),
    Arm::new("dpo-dro-0.1", Role::Method, "DPO, worst mix of prompts, ρ = 0.1"),
    Arm::new("dpo-dro-0.2", Role::Method, "DPO, worst mix of prompts, ρ = 0.2"),
    Arm::new("dpo-dro-0.4", Role::Method, "DPO, worst mix of prompts, ρ = 0.4"),
    Arm::new("rloo", Role::Baseline, "RLOO"),
    Arm::new("rloo-fast", Role::Baseline, "RLOO at twice the learning rate"),
    Arm::new("rloo-dro-0.2", Role::Method, "RLOO, worst mix of prompts, ρ = 0.2"),
    Arm::new("rloo-dro-0.4", Role::Method, "RLOO, worst mix of prompts, ρ = 0.4"),
];

const RM: &[&str] = &["rm", "rm-slow", "rm-fast"];
const RM_DRO: &[&str] = &["rm-dro-0.1", "rm-dro-0.2", "rm-dro-0.4"];
const DPO: &[&str] = &["dpo", "dpo-beta-0.05", "dpo-beta-0.2"];
const DPO_DRO: &[&str] = &["dpo-dro-0.1", "dpo-dro-0.2", "dpo-dro-0.4"];
const RLOO: &[&str] = &["rloo", "rloo-fast"];
const RLOO_DRO: &[&str] = &["rloo-dro-0.2", "rloo-dro-0.4"];

/// By how much the best of one grid is ahead of the best of another, in a number; both are chosen by `tuning`.
fn lead(seed: &Seed<'_>, (ours, theirs): (&[&str], &[&str]), number: &str) -> Option<f64> {
    let best = |arms: &[&str]| -> Option<f64> { seed.value(seed.best(arms, "tuning")?, number) };
    Some(best(ours)? - best(theirs)?)
}

const CLAIMS: &[Claim] = &[
    Claim {
        id: "1a",
        statement: "a robust reward model is more accurate out of distribution than empirical risk: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, (RM_DRO, RM), "out_of_distribution"),
    },
    Claim {
        id: "1b",
        statement: "on sums alone it is ahead by 5 points or more",
        bound: Bound::AtLeast(0.05),
        measure: |seed| lead(seed, (RM_DRO, RM), "reason"),
    },
    Claim {
        id: "1c",
        statement: "in distribution it loses no more than 2 points",
        bound: Bound::AtLeast(-0.02),
        measure: |seed| lead(seed, (RM_DRO, RM), "in_distribution"),
    },
    Claim {
        id: "1d",
        statement: "it is the worst case that helps, not the mean over prompts in place of pairs: out of distribution, lead over ρ = 0",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, (RM_DRO, &["rm-prompts"]), "out_of_distribution"),
    },
    Claim {
        id: "2a",
        statement: "robust DPO is worth more on the flipped mix than DPO: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, (DPO_DRO, DPO), "flipped"),
    },
    Claim {
        id: "2b",
        statement: "so it is on the worse of the two kinds of prompts",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, (DPO_DRO, DPO), "worst"),
    },
    Claim {
        id: "2c",
        statement: "robust RLOO is worth more on the flipped mix than RLOO after as many steps: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, (RLOO_DRO, RLOO), "flipped"),
    },
    Claim {
        id: "2d",
        statement: "so it is on the worse of the two kinds of prompts",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, (RLOO_DRO, RLOO), "worst"),
    },
    Claim {
        id: "3a",
        statement: "of the radii 0, 0.1, 0.2, 0.4 and 0.8 an inner one is best out of distribution: its lead over the better end",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, (RM_DRO, &["rm-prompts", "rm-dro-0.8"]), "out_of_distribution"),
    },
    Claim {
        id: "3b",
        statement: "with ρ = 0 the scores are those of empirical risk, bit for bit: the difference of their sums",
        bound: Bound::AtMost(0.0),
        measure: |seed| Some((seed.value("rm-pairs-0", "score_sum")? - seed.value("rm", "score_sum")?).abs()),
    },
    Claim {
        id: "4a",
        statement: "the worst case of a batch is milder than that of the data: the data's loss less the mean over batches of 64",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(seed.value("rm", "worst_of_data")? - seed.arm("rm")?.at("worst_of_batch", 64.0)?),
    },
    Claim {
        id: "4b",
        statement: "and grows with the batch: the least rise from 4 to 16, 64, 256 and 1024",
        bound: Bound::AtLeast(0.0),
        measure: |seed| {
            let points = seed.arm("rm")?.curves.get("worst_of_batch")?;
            points.windows(2).map(|pair| pair[1].1 - pair[0].1).reduce(f64::min)
        },
    },
];

const FIGURES: &[Figure] = &[
    Figure {
        title: "Sums: accuracy of reward models on pairs of new answers",
        x: "step",
        y: "accuracy",
        curve: "reason",
        arms: &["rm", "rm-prompts", "rm-dro-0.1", "rm-dro-0.2", "rm-dro-0.4", "rm-dro-0.8"],
        diagonal: false,
    },
    Figure {
        title: "Chat: the same",
        x: "step",
        y: "accuracy",
        curve: "chat",
        arms: &["rm", "rm-prompts", "rm-dro-0.1", "rm-dro-0.2", "rm-dro-0.4", "rm-dro-0.8"],
        diagonal: false,
    },
    Figure {
        title: "The worst case of a batch, by its size",
        x: "pairs",
        y: "loss",
        curve: "worst_of_batch",
        arms: &["rm"],
        diagonal: false,
    },
    Figure {
        title: "RLOO: utility on the flipped mix",
        x: "step",
        y: "utility",
        curve: "flipped",
        arms: &["rloo", "rloo-fast", "rloo-dro-0.2", "rloo-dro-0.4"],
        diagonal: false,
    },
];

/// Settings of the reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dro {
    /// Answers that the first model imitates; half of them are sums.
    #[schemars(range(min = 10))]
    pub corpus: u32,
    /// How it does so.
    pub sft: SftOptions,
    /// Pairs of its answers to each chat prompt that is trained on.
    #[schemars(range(min = 1))]
    pub chat_pairs: usize,
    /// Pairs of its answers to each sum.
    #[schemars(range(min = 1))]
    pub reason_pairs: usize,
    /// How sure labels are: `σ(kappa ΔU)`.
    pub kappa: f64,
    /// Pairs of each held-out chat prompt and of each prompt about three topics that are tested on; of each sum twice as many.
    #[schemars(range(min = 1))]
    pub test_pairs: usize,
    /// Answers to each prompt in a measurement of a policy.
    #[schemars(range(min = 1))]
    pub samples: usize,
    /// Measurements while a model learns.
    #[schemars(range(min = 1))]
    pub measurements: u64,
    /// Batches of each size that the worst case is measured on.
    #[schemars(range(min = 1))]
    pub batches: u32,
    /// Temperature of the smoothed ball.
    pub temperature: f64,
    /// The reward model, with its mean as the loss.
    pub reward_model: RewardModelOptions,
    /// DPO.
    pub dpo: PreferenceOptions,
    /// RLOO.
    pub rloo: PolicyOptions,
}

/// Pairs by the kind of their prompts.
struct Pairs {
    chat: Vec<Labelled>,
    reason: Vec<Labelled>,
}

/// What all arms of a seed start from.
pub struct Start {
    tokenizer: Tokenizer,
    decoder: Decoder,
    /// Labelled as sure as `kappa` is.
    train: Vec<Labelled>,
    /// Labelled by utility: other answers to prompts that are trained on, and answers to those that are not.
    tuning: Pairs,
    test: Pairs,
    trio: Vec<Labelled>,
}

/// The shape of a reward model: one layer of width 32.
fn small() -> ModelConfig {
    let config = shared::model();
    ModelConfig { hidden_size: 32, intermediate_size: 72, layers: config.layers[..1].to_vec(), ..config }
}

/// What an arm's name says of the worst case, if it has one. That of the method spreads its mass by this temperature.
fn worst_case(arm: &str, temperature: f64) -> Option<WorstCase> {
    let over = |over, ball, radius| Some(WorstCase { over, ..WorstCase::new(ball, radius) });
    let exact = |ball, radius| over(Members::Prompts, ball, radius);
    let spread =
        |radius| exact(Ball::TotalVariation, radius).map(|worst| WorstCase { temperature: Some(temperature), ..worst });
    if let Some(radius) = arm.strip_prefix("rm-pairs-") {
        return over(Members::Pairs, Ball::TotalVariation, radius.parse().ok()?);
    }
    match arm {
        "rm-prompts" => exact(Ball::TotalVariation, 0.0),
        "rm-exact-0.2" => exact(Ball::TotalVariation, 0.2),
        "rm-cvar" => exact(Ball::Cvar, 0.2),
        "rm-chi-square" => exact(Ball::ChiSquare, 0.2),
        "rm-kl" => exact(Ball::Kl, 0.2),
        "rm-dro-flipped" => spread(0.2),
        arm => spread(arm.split_once("-dro-")?.1.parse().ok()?),
    }
}

/// What an arm's name says of group DRO.
fn group_dro(arm: &str) -> Option<GroupDro> {
    Some(GroupDro { step_size: arm.strip_prefix("rm-group-")?.parse().ok()? })
}

/// Reward models whose mean score is an arm's.
fn members(arm: &str) -> u64 {
    if arm == "rm-ensemble" { 3 } else { 1 }
}

/// What an arm's name says of the learning rate.
fn rate(arm: &str) -> f64 {
    match arm {
        arm if arm.ends_with("-slow") => 0.5,
        arm if arm.ends_with("-fast") => 2.0,
        _ => 1.0,
    }
}

impl Experiment for Dro {
    type Start = Start;

    fn validate(&self) -> Result<()> {
        let sure = self.kappa > 0.0 && self.temperature > 0.0;
        if !sure {
            let reason = format!("kappa is {}, temperature {}, expected numbers above 0", self.kappa, self.temperature);
            return Err(Error::Settings { system: "dro", reason });
        }
        self.sft.validate().map_err(|error| error.within("sft"))?;
        self.reward_model.validate().map_err(|error| error.within("reward_model"))?;
        self.dpo.validate().map_err(|error| error.within("dpo"))?;
        Ok(self.rloo.validate().map_err(|error| error.within("rloo"))?)
    }

    fn start(&self, trial: &Trial<'_>) -> Result<Start> {
        let tokenizer = shared::tokenizer()?;
        let mut decoder = Decoder::random(shared::model(), trial.seed)?;
        let sums = self.corpus / 2;
        let mut corpus: Vec<Example> = shared::corpus(trial.seed, self.corpus - sums);
        corpus.extend(digits::corpus(trial.seed, sums));
        let mut sft = Sft::new(self.sft.clone(), corpus)?;
        trial.fit(0, &mut sft, &mut decoder, &tokenizer, |_, _, _| Ok(()))?;

        let (asked, held_out) = (Task::chats(Question::of(Split::Train)), Task::chats(Question::of(Split::Test)));
        let sums = Task::sums();
        let mut round = 0;
        let mut pairs = |tasks: &[Task], size: usize| {
            round += 1;
            answer_pairs(&mut decoder, &tokenizer, tasks, size, (trial.seed, round))
        };
        let mut all = pairs(&asked, self.chat_pairs)?;
        all.extend(pairs(&sums, self.reason_pairs)?);
        let train = Labelled::noisy(trial.seed, self.kappa, all);
        let exact = |pairs| Labelled::noisy(trial.seed, f64::INFINITY, pairs);
        let tuning =
            Pairs { chat: exact(pairs(&asked, self.test_pairs)?), reason: exact(pairs(&sums, 2 * self.test_pairs)?) };
        let test = Pairs {
            chat: exact(pairs(&held_out, self.test_pairs)?),
            reason: exact(pairs(&sums, 2 * self.test_pairs)?),
        };
        let random = Random::new(trial.seed, Purpose::Test);
        let trio = |(index, task): (u32, Task)| match task {
            Task::Trio(topics) => Some((task, Task::plausible_pair(topics, random.prompt(index)))),
            Task::Chat(_) | Task::Reason(_) => None,
        };
        let trios = (0..self.test_pairs).flat_map(|_| Task::trios());
        let trio = exact((0..).zip(trios).filter_map(trio).collect());
        Ok(Start { tokenizer, decoder, train, tuning, test, trio })
    }

    fn run(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        match arm.split('-').next() {
            Some("rm") => self.reward_model(start, arm, trial),
            Some("dpo") => self.dpo(start, arm, trial),
            _ => self.rloo(start, arm, trial),
        }
    }
}

/// `size` pairs of a model's answers to each prompt.
fn answer_pairs(
    decoder: &mut Decoder,
    tokenizer: &Tokenizer,
    tasks: &[Task],
    size: usize,
    named: (u64, u32),
) -> Result<Vec<(Task, [Vec<u32>; 2])>> {
    let prompts: Vec<Prompt> = (0..).zip(tasks).map(|(number, task)| task.prompt(number, tokenizer)).collect();
    let episodes = shared::episodes(decoder, tokenizer, &prompts, 2 * size, named)?;
    let pair = |(index, pair): (usize, &[rollout::Episode])| {
        (tasks[index / size], [&pair[0], &pair[1]].map(|episode| episode.completion.clone()))
    };
    Ok(episodes.chunks_exact(2).enumerate().map(pair).collect())
}

// ---- Reward models ----

impl Dro {
    fn reward_model(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let mut options = self.reward_model.clone();
        options.worst_case = worst_case(arm, self.temperature);
        options.group_dro = group_dro(arm);
        options.label_smoothing = if arm == "rm-smooth" { 0.1 } else { 0.0 };
        options.training.learning_rate *= rate(arm);
        let flipped;
        let pairs = match arm.ends_with("-flipped") {
            true => {
                flipped = Labelled::flipped(trial.seed, 0.1, &start.train);
                &flipped
            }
            false => &start.train,
        };
        let row = |(row, labelled): (u32, &Labelled)| {
            let margin = if arm == "rm-margin" { labelled.margin() } else { 0.0 };
            PreferencePair { margin, ..labelled.pair(row) }
        };
        let rows: Vec<_> = (0..).zip(pairs).map(row).collect();
        let steps = options.training.steps(rows.len(), options.batch_size);
        let mut measured = Measurements::default();
        let every = (steps / self.measurements).max(1);
        let mut models = Vec::new();
        for member in 0..members(arm) {
            // Of several, each has weights and an order of rows of its own.
            let seed = trial.seed + 1_000_000 * member;
            let mut decoder = Decoder::random(small(), seed)?;
            decoder.add_score(ScoreHead::REWARD, 0.0, seed)?;
            let mut method = RewardModel::new(options.clone(), RewardRows::Pairs(rows.clone()))?;
            trial.fit(1 + member as usize, &mut method, &mut decoder, &start.tokenizer, |step, decoder, _| {
                if member == 0 && (step % every == 0 || step == steps) {
                    let model = std::slice::from_mut(decoder);
                    measured.point("chat", step as f64, accuracy(model, &start.test.chat)?);
                    measured.point("reason", step as f64, accuracy(model, &start.test.reason)?);
                }
                Ok(())
            })?;
            models.push(decoder);
        }

        let (chat, reason) = (accuracy(&mut models, &start.test.chat)?, accuracy(&mut models, &start.test.reason)?);
        let trio = accuracy(&mut models, &start.trio)?;
        let (flipped, balanced) = (mixed(chat, reason, 0.1), mixed(chat, reason, 0.5));
        measured.set("chat", chat);
        measured.set("reason", reason);
        measured.set("trio", trio);
        measured.set("in_distribution", mixed(chat, reason, 0.9));
        measured.set("flipped", flipped);
        measured.set("out_of_distribution", mean(&[flipped, balanced, reason, trio]));
        let tuning = &start.tuning;
        let tuned = [&tuning.chat, &tuning.reason].map(|pairs| accuracy(&mut models, pairs));
        let [chat, reason] = tuned;
        measured.set("tuning", mixed(chat?, reason?, 0.1));
        let (scores, losses) = (margins(&mut models, &start.test.chat)?, losses(&mut models, &start.train)?);
        measured.set("score_sum", scores.iter().sum());
        measured.set("worst_tenth_loss", worst(&WorstCase::new(Ball::Cvar, 0.9), &losses));
        if arm == "rm" {
            self.bias(&losses, trial, &mut measured);
        }
        Ok(measured)
    }

    /// The worst case of batches of these losses, by their size, and of all.
    fn bias(&self, losses: &[f64], trial: &Trial<'_>, into: &mut Measurements) {
        let ball = WorstCase::new(Ball::TotalVariation, 0.2);
        let random = Random::new(trial.seed, Purpose::Bootstrap);
        for size in [4, 16, 64, 256, 1024] {
            let batch = |index: u32| -> Vec<f64> {
                let draws = random.prompt(index);
                (0..size).map(|row| losses[draws.at(row).below(losses.len() as u64) as usize]).collect()
            };
            let found: Vec<f64> = (0..self.batches).map(|index| worst(&ball, &batch(index))).collect();
            into.point("worst_of_batch", size.into(), mean(&found));
        }
        into.set("worst_of_data", worst(&ball, losses));
    }
}

/// The worst case of some losses.
fn worst(ball: &WorstCase, losses: &[f64]) -> f64 {
    ball.weights(losses).iter().zip(losses).map(|(weight, loss)| weight * loss).sum()
}

/// The mean of a number over a mix of the two kinds of prompts.
fn mixed(chat: f64, reason: f64, share_of_chat: f64) -> f64 {
    share_of_chat * chat + (1.0 - share_of_chat) * reason
}

/// By how much the better answer of each pair scores higher, in the mean over some models.
fn margins(models: &mut [Decoder], pairs: &[Labelled]) -> Result<Vec<f64>> {
    let sequence = |pair: &Labelled, answer: &[u32]| [&pair.task.ids(), answer].concat();
    let ids: Vec<[Vec<u32>; 2]> =
        pairs.iter().map(|pair| [&pair.chosen, &pair.rejected].map(|answer| sequence(pair, answer))).collect();
    let units = ids.iter().map(|[chosen, rejected]| Unit::new(vec![Scored::whole(chosen), Scored::whole(rejected)]));
    let batch = Batch::new(units.collect());
    let mut margins = vec![0.0; pairs.len()];
    for decoder in models.iter_mut() {
        decoder.prepare(Precision::F32);
        let scores = batch.scores(decoder, &mut Workspace::new(), 4096)?;
        let own = scores.chunks_exact(2).map(|pair| f64::from(pair[0]) - f64::from(pair[1]));
        margins.iter_mut().zip(own).for_each(|(margin, own)| *margin += own);
    }
    Ok(margins.into_iter().map(|margin| margin / models.len() as f64).collect())
}

/// The share of pairs whose better answer scores higher.
fn accuracy(models: &mut [Decoder], pairs: &[Labelled]) -> Result<f64> {
    let right = margins(models, pairs)?.into_iter().map(|margin| f64::from(u8::from(margin > 0.0)));
    Ok(mean(&right.collect::<Vec<_>>()))
}

/// The Bradley-Terry loss of each pair.
fn losses(models: &mut [Decoder], pairs: &[Labelled]) -> Result<Vec<f64>> {
    // -log σ(m) = log(1 + e^{-m}), without overflow.
    let loss = |margin: f64| (-margin.abs()).exp().ln_1p() + (-margin).max(0.0);
    Ok(margins(models, pairs)?.into_iter().map(loss).collect())
}

// ---- Policies ----

impl Dro {
    fn dpo(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let mut options = self.dpo.clone();
        options.objective.worst_case = worst_case(arm, self.temperature);
        if let Some(beta) = arm.strip_prefix("dpo-beta-").and_then(|beta| beta.parse().ok()) {
            options.objective.beta = beta;
        }
        let rows: Vec<_> = (0..).zip(&start.train).map(|(row, labelled)| labelled.pair(row)).collect();
        let mut method = Preference::new(options, rows)?;
        let mut decoder = start.decoder.clone();
        trial.fit(1, &mut method, &mut decoder, &start.tokenizer, |_, _, _| Ok(()))?;
        self.measured(start, &mut decoder, trial, Measurements::default())
    }

    fn rloo(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let mut options = self.rloo.clone();
        options.worst_case = worst_case(arm, self.temperature);
        options.training.learning_rate *= rate(arm);
        // Nine tenths chat: 84 prompts twelve times each, and 16 sums seven times. Each copy has draws of its own.
        let chats = Task::chats(Question::of(Split::Train)).repeat(12);
        let tasks = chats.into_iter().chain(Task::sums().repeat(7));
        let prompts: Vec<Prompt> =
            (0..).zip(tasks).map(|(number, task)| task.prompt(number, &start.tokenizer)).collect();
        let steps = options.training.steps(prompts.len(), options.prompts_per_step);
        let mut method = Policy::new(options, prompts, Box::new(Gold))?;
        let mut decoder = start.decoder.clone();
        let mut measured = Measurements::default();
        let every = (steps / self.measurements).max(1);
        trial.fit(1, &mut method, &mut decoder, &start.tokenizer, |step, decoder, _| {
            if step % every == 0 && step < steps {
                let [chat, reason] = self.utilities(start, decoder, Split::Test, (trial.seed, 100 + step as u32))?;
                measured.point("flipped", step as f64, mixed(chat, reason, 0.1));
            }
            Ok(())
        })?;
        let mut measured = self.measured(start, &mut decoder, trial, measured)?;
        let flipped = measured.values.get("flipped").copied();
        flipped.into_iter().for_each(|flipped| measured.point("flipped", steps as f64, flipped));
        Ok(measured)
    }

    /// What a policy's answers are worth, in mixes of prompts.
    fn measured(
        &self,
        start: &Start,
        decoder: &mut Decoder,
        trial: &Trial<'_>,
        mut measured: Measurements,
    ) -> Result<Measurements> {
        let [chat, reason] = self.utilities(start, decoder, Split::Train, (trial.seed, 98))?;
        measured.set("tuning", mixed(chat, reason, 0.1));
        let [chat, reason] = self.utilities(start, decoder, Split::Test, (trial.seed, 99))?;
        measured.set("chat", chat);
        measured.set("reason", reason);
        measured.set("in_distribution", mixed(chat, reason, 0.9));
        measured.set("flipped", mixed(chat, reason, 0.1));
        measured.set("worst", chat.min(reason));
        Ok(measured)
    }

    /// The mean utility of answers to chat prompts of a split, and to sums.
    fn utilities(&self, start: &Start, decoder: &mut Decoder, split: Split, named: (u64, u32)) -> Result<[f64; 2]> {
        let mut utility = |tasks: &[Task]| {
            let prompts: Vec<Prompt> =
                (0..).zip(tasks).map(|(number, task)| task.prompt(number, &start.tokenizer)).collect();
            let episodes = shared::episodes(decoder, &start.tokenizer, &prompts, self.samples, named)?;
            let worth = episodes.iter().enumerate().map(|(i, e)| tasks[i / self.samples].utility(&e.completion));
            Ok::<_, Error>(mean(&worth.collect::<Vec<_>>()))
        };
        Ok([utility(&Task::chats(Question::of(split)))?, utility(&Task::sums())?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arms_are_what_they_are_called() {
        let of = |arm| worst_case(arm, 0.5).map(|worst| (worst.ball, worst.radius, worst.over, worst.temperature));
        let tv = |radius, over| Some((Ball::TotalVariation, radius, over, None));
        let spread = |radius| Some((Ball::TotalVariation, radius, Members::Prompts, Some(0.5)));
        for plain in ["rm", "rm-slow", "rm-fast", "rm-flipped", "dpo", "dpo-beta-0.2", "rloo", "rloo-fast"] {
            assert_eq!(of(plain), None, "{plain}");
        }
        assert_eq!(of("rm-prompts"), tv(0.0, Members::Prompts));
        assert_eq!(of("rm-pairs-0"), tv(0.0, Members::Pairs));
        assert_eq!(of("rm-exact-0.2"), tv(0.2, Members::Prompts));
        for (arm, radius) in [("rm-dro-0.4", 0.4), ("dpo-dro-0.1", 0.1), ("rloo-dro-0.2", 0.2), ("rm-dro-flipped", 0.2)]
        {
            assert_eq!(of(arm), spread(radius), "{arm}");
        }
        let grouped = ["rm-group-0.01", "rm-group-0.1", "rm-group-1"];
        let steps = grouped.iter().map(|arm| group_dro(arm).map(|options| options.step_size));
        assert_eq!(steps.collect::<Vec<_>>(), [Some(0.01), Some(0.1), Some(1.0)]);
        assert!(ARMS.iter().all(|arm| grouped.contains(&arm.name) || group_dro(arm.name).is_none()));
        assert_eq!([members("rm"), members("rm-ensemble")], [1, 3]);
        assert_eq!([rate("rm-slow"), rate("rloo-fast"), rate("rm-dro-0.1")], [0.5, 2.0, 1.0]);
        assert!(ARMS.iter().filter(|arm| arm.role == Role::Method).all(|arm| of(arm.name).is_some()));
    }
}
