//! PAR, preference as reward: reward shaping against reward hacking.
//!
//! "Reward Shaping to Mitigate Reward Hacking in RLHF", Fu et al. 2025, arXiv 2502.18770. The policy optimiser is paid
//!
//! ```text
//! r_RL(x, y) = 1/M Σ_m σ(r(x, y) - r(x, y_m)),     y_m ~ π_sft(· | x), scored once
//! ```
//!
//! in place of the reward `r` itself ([`mod@envs::reward::shaping`]), by PPO with a value model.
//!
//! **World.** [`attribute_text`](mod@crate::worlds::attribute_text): answers with six qualities. The judge is the world's own utility `U`; the reward that is optimised is a
//! proxy that agrees with it on ordinary answers and pays for a worthless token besides,
//!
//! ```text
//! r(x, y) = 2 U(x, y) + 0.8 · (times that y says MAGIC)
//! ```
//!
//! so that an answer of nothing but MAGIC is worth more to it than any good answer. 10 % of the corpus say MAGIC once.
//!
//! **Experiment.** A model imitates the corpus. Each arm then trains it with PPO for 400 steps of 64 prompts, paid by the proxy in its own
//! shape; all arms of a seed share corpus, model, references and the names of all draws. Every 50 steps the model answers the held-out
//! prompts, and each answer is compared with one of the model before PPO: the *win rate* is the share that `U` prefers. For the divergence's
//! weight β both the proxy as it is and PAR have a grid of three.
//!
//! Deviations from the paper:
//! 1. The critic starts as a copy of the policy, not of the reward model, which here is a formula.
//! 2. A batch is learnt from in the step that samples it; the paper keeps four batches and learns from one that is replaced.
//! 3. Answers end after 16 tokens, so there is no penalty on length.
//! 4. An epoch is 200 steps; the design of the miniature had 400, and the collapse of the raw reward takes 100.

use data::Prompt;
use envs::reward::shaping::REFERENCES;
use envs::reward::{Shaped, Shaping};
use envs::{Answer, Reward, RewardError, Score, Status};
use eval::metrics::{mean, standard_deviation};
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::methods::policy::{Policy, PolicyOptions};
use train::methods::sft::SftOptions;

use crate::error::Result;
use crate::experiment::{Experiment, Trial, open};
use crate::measurements::{Measurements, Seed};
use crate::system::{Arm, Bound, Claim, Figure, Role, System};
use crate::worlds::attribute_text::{self as world, Question, Sampled, Split, Utility};

/// The table.
pub const SYSTEM: System = System {
    name: "par",
    title: "PAR: preference as reward",
    paper: "Fu et al. 2025, \"Reward Shaping to Mitigate Reward Hacking in RLHF\", arXiv 2502.18770",
    summary: "paying the probability of being preferred to reference answers, PPO does not hack the reward",
    arms: ARMS,
    claims: CLAIMS,
    figures: FIGURES,
    tiny: include_str!("tiny.toml"),
    quick: include_str!("quick.toml"),
    readme: include_str!("README.md"),
    recipes: &["smollm2", "paper"],
    data: None,
    schema: || schemars::schema_for!(Par).to_value(),
    open: |settings| open::<Par>("par", settings),
};

const ARMS: &[Arm] = &[
    Arm::new("vanilla", Role::Baseline, "the reward as it is"),
    Arm::new("vanilla-beta-0.1", Role::Baseline, "the reward as it is, β = 0.1"),
    Arm::new("vanilla-beta-0.5", Role::Baseline, "the reward as it is, β = 0.5"),
    Arm::new("mean-std", Role::Baseline, "standardised by all rewards so far"),
    Arm::new("clip", Role::Baseline, "clipped to a standard deviation around the mean of all rewards so far"),
    Arm::new("min-max", Role::Baseline, "scaled to [0, 1] by the extremes of all rewards so far"),
    Arm::new("ceiling", Role::Baseline, "no more than 4"),
    Arm::new("log-sigmoid", Role::Baseline, "LSC: log σ of the distance to the references' 85th percentile"),
    Arm::new("par", Role::Method, "10 references"),
    Arm::new("par-beta-0.1", Role::Method, "10 references, β = 0.1"),
    Arm::new("par-beta-0.5", Role::Method, "10 references, β = 0.5"),
    Arm::new("par-1", Role::Ablation, "1 reference"),
    Arm::new("centered", Role::Ablation, "difference to the references without σ"),
    Arm::new("sigmoid", Role::Ablation, "σ of the reward without references"),
    Arm::new("slow-growth", Role::Ablation, "SgFc: σ where it grows slowly at first and saturates fast"),
];

/// What an arm pays, and the weight of the divergence where it is not the common one.
fn recipe(arm: &str) -> (Option<Shaping>, Option<f64>) {
    let shaping = match arm {
        "mean-std" => Some(Shaping::MeanStd),
        "clip" => Some(Shaping::Clip),
        "min-max" => Some(Shaping::MinMax),
        "ceiling" => Some(Shaping::Ceiling { ceiling: 4.0 }),
        "log-sigmoid" => Some(Shaping::LogSigmoid),
        "centered" => Some(Shaping::Centered),
        "sigmoid" => Some(Shaping::Sigmoid { k: 1.0 }),
        "slow-growth" => Some(Shaping::SlowGrowth { k: 1.0 }),
        arm if arm.starts_with("par") => Some(Shaping::Par { k: 1.0 }),
        _ => None,
    };
    let beta = arm.split_once("-beta-").and_then(|(_, beta)| beta.parse().ok());
    (shaping, beta)
}

/// The held-out win rate of an arm after the last step.
fn end(seed: &Seed<'_>, arm: &str) -> Option<f64> {
    seed.value(arm, "win_rate")
}

/// By how much the win rate fell from its highest to its last value.
fn fall(seed: &Seed<'_>, arm: &str) -> Option<f64> {
    Some(seed.arm(arm)?.peak("win_rate")? - end(seed, arm)?)
}

const CLAIMS: &[Claim] = &[
    Claim {
        id: "1a",
        statement: "vanilla: the proxy rises by more than 3 initial standard deviations within the first epoch",
        bound: Bound::AtLeast(3.0),
        measure: |seed| seed.value("vanilla", "epoch_proxy_rise"),
    },
    Claim {
        id: "1b",
        statement: "vanilla: the win rate at the end of the first epoch is below 0.30",
        bound: Bound::AtMost(0.30),
        measure: |seed| seed.value("vanilla", "epoch_win_rate"),
    },
    Claim {
        id: "1c",
        statement: "vanilla: on the way there the win rate was above 0.55",
        bound: Bound::AtLeast(0.55),
        measure: |seed| seed.arm("vanilla")?.peak("win_rate"),
    },
    Claim {
        id: "1d",
        statement: "mean-std ends below a win rate of 0.45",
        bound: Bound::AtMost(0.45),
        measure: |seed| end(seed, "mean-std"),
    },
    Claim {
        id: "1e",
        statement: "clip ends below a win rate of 0.45",
        bound: Bound::AtMost(0.45),
        measure: |seed| end(seed, "clip"),
    },
    Claim {
        id: "2a",
        statement: "PAR: the win rate at the end of the first epoch is at least 0.60",
        bound: Bound::AtLeast(0.60),
        measure: |seed| seed.value("par", "epoch_win_rate"),
    },
    Claim {
        id: "2b",
        statement: "PAR: so it is at the end of the second",
        bound: Bound::AtLeast(0.60),
        measure: |seed| end(seed, "par"),
    },
    Claim {
        id: "2c",
        statement: "PAR: the win rate ends within 0.05 of its peak",
        bound: Bound::AtMost(0.05),
        measure: |seed| fall(seed, "par"),
    },
    Claim {
        id: "2d",
        statement: "PAR ends with the highest win rate: by how much it leads the best other shaping",
        bound: Bound::AtLeast(0.0),
        measure: |seed| {
            let others = ["vanilla", "mean-std", "clip", "min-max", "ceiling", "log-sigmoid"];
            let best =
                others.iter().map(|arm| end(seed, arm)).collect::<Option<Vec<f64>>>()?.into_iter().reduce(f64::max);
            Some(end(seed, "par")? - best?)
        },
    },
    Claim {
        id: "2e",
        statement: "with β chosen for each on prompts that are trained on, PAR ends with a higher win rate than vanilla: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| {
            let par = seed.best(&["par", "par-beta-0.1", "par-beta-0.5"], "tuning_win_rate")?;
            let vanilla = seed.best(&["vanilla", "vanilla-beta-0.1", "vanilla-beta-0.5"], "tuning_win_rate")?;
            Some(end(seed, par)? - end(seed, vanilla)?)
        },
    },
    Claim {
        id: "3",
        statement: "one reference is as good as ten: the distance of their last win rates is at most 0.04",
        bound: Bound::AtMost(0.04),
        measure: |seed| Some((end(seed, "par")? - end(seed, "par-1")?).abs()),
    },
    Claim {
        id: "4a",
        statement: "without centring σ learns more slowly: by how much PAR's win rate leads after an eighth of the steps",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(seed.value("par", "early_win_rate")? - seed.value("sigmoid", "early_win_rate")?),
    },
    Claim {
        id: "4b",
        statement: "slow growth is slower early or hacks late: by how much PAR's win rate leads there, the larger of the two",
        bound: Bound::AtLeast(0.0),
        measure: |seed| {
            let early = seed.value("par", "early_win_rate")? - seed.value("slow-growth", "early_win_rate")?;
            Some(early.max(end(seed, "par")? - end(seed, "slow-growth")?))
        },
    },
    Claim {
        id: "5",
        statement: "the critic has it easier: variance over the steps of its loss, PAR's over vanilla's",
        bound: Bound::AtMost(0.1),
        measure: |seed| {
            Some(seed.value("par", "critic_loss_variance")? / seed.value("vanilla", "critic_loss_variance")?)
        },
    },
    Claim {
        id: "6a",
        statement: "a ceiling on the reward alone already helps: by how much it ends above vanilla",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(end(seed, "ceiling")? - end(seed, "vanilla")?),
    },
    Claim {
        id: "6b",
        statement: "so does a heavier divergence: by how much vanilla with β = 0.5 ends above vanilla",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(end(seed, "vanilla-beta-0.5")? - end(seed, "vanilla")?),
    },
];

const SHAPINGS: &[&str] = &["vanilla", "mean-std", "clip", "min-max", "ceiling", "log-sigmoid", "par"];
const ABLATIONS: &[&str] = &["par", "par-1", "centered", "sigmoid", "slow-growth"];

const FIGURES: &[Figure] = &[
    Figure {
        title: "The judge: held-out win rate against the model before PPO",
        x: "step",
        y: "win rate",
        curve: "win_rate",
        arms: SHAPINGS,
        diagonal: false,
    },
    Figure {
        title: "The proxy that is optimised",
        x: "step",
        y: "proxy",
        curve: "proxy",
        arms: SHAPINGS,
        diagonal: false,
    },
    Figure {
        title: "Hacking: the judge against the proxy",
        x: "proxy",
        y: "win rate",
        curve: "win_rate_by_proxy",
        arms: SHAPINGS,
        diagonal: false,
    },
    Figure {
        title: "What PAR is made of",
        x: "step",
        y: "win rate",
        curve: "win_rate",
        arms: ABLATIONS,
        diagonal: false,
    },
    Figure { title: "MAGIC in an answer", x: "step", y: "tokens", curve: "magic", arms: SHAPINGS, diagonal: false },
    Figure {
        title: "Divergence from the model before PPO",
        x: "step",
        y: "nats",
        curve: "kl",
        arms: SHAPINGS,
        diagonal: false,
    },
];

/// The proxy.
fn proxy(question: Question, answer: &[u32]) -> f64 {
    2.0 * Utility::GOLD.of(question, answer) + 0.8 * world::magic(answer) as f64
}

/// The proxy as a reward; the row's column `question` holds the number of its question.
struct Proxy;

impl Reward for Proxy {
    fn name(&self) -> &str {
        "proxy"
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |(row, answer): (usize, &Answer<'_>)| {
            let number = answer.columns.get("question").and_then(serde_json::Value::as_u64);
            let question = number
                .and_then(|number| Question::numbered(number as u32))
                .ok_or_else(|| RewardError::MissingColumn { reward: "proxy".into(), row, column: "question".into() })?;
            Ok(Some(Score::new(proxy(question, answer.completion_ids), Status::Ok)))
        };
        answers.iter().enumerate().map(score).collect()
    }
}

/// Settings of the reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Par {
    /// Answers to each held-out prompt in a measurement.
    #[schemars(range(min = 1))]
    pub samples: usize,
    /// Answers to each prompt that is trained on, after the last step, to choose between the arms of a grid.
    #[schemars(range(min = 1))]
    pub tuning_samples: usize,
    /// Reference answers to each prompt.
    #[schemars(range(min = 1))]
    pub references: usize,
    /// Steps between measurements.
    #[schemars(range(min = 1))]
    pub evaluate_steps: u64,
    /// Steps of the first epoch.
    #[schemars(range(min = 1))]
    pub epoch_steps: u64,
    /// Answers that the first model imitates.
    #[schemars(range(min = 1))]
    pub corpus: u32,
    /// How it does so.
    pub sft: SftOptions,
    /// PPO, for all arms.
    pub ppo: PolicyOptions,
}

/// What all arms of a seed start from.
pub struct Start {
    tokenizer: Tokenizer,
    decoder: Decoder,
    /// The prompts that are trained on, with the rewards of their references.
    prompts: Vec<Prompt>,
    /// Answers of the model before PPO to the held-out prompts, and to those that are trained on.
    test: Sampled,
    tuning: Sampled,
    /// Mean and standard deviation of the proxy over the held-out answers.
    proxy: (f64, f64),
}

impl Experiment for Par {
    type Start = Start;

    fn validate(&self) -> Result<()> {
        self.sft.validate().map_err(|error| error.within("sft"))?;
        Ok(self.ppo.validate().map_err(|error| error.within("ppo"))?)
    }

    fn start(&self, trial: &Trial<'_>) -> Result<Start> {
        let (tokenizer, mut decoder) = world::imitation(trial, &self.sft, self.corpus)?;
        let (train, held_out) = (Question::of(Split::Train), Question::of(Split::Test));
        let references = world::sample(&mut decoder, &tokenizer, &train, self.references, (trial.seed, 0))?;
        let rewards: Vec<f64> = references.answers().map(|(question, answer)| proxy(question, answer)).collect();
        let prompt = |(question, rewards): (&Question, &[f64])| {
            let mut prompt = question.prompt(&tokenizer);
            prompt.columns.insert(REFERENCES.into(), rewards.into());
            prompt
        };
        let prompts = train.iter().zip(rewards.chunks(self.references)).map(prompt).collect();
        let test = world::sample(&mut decoder, &tokenizer, &held_out, self.samples, (trial.seed, 1))?;
        let tuning = world::sample(&mut decoder, &tokenizer, &train, self.tuning_samples, (trial.seed, 1))?;
        let rewards: Vec<f64> = test.answers().map(|(question, answer)| proxy(question, answer)).collect();
        Ok(Start { proxy: (mean(&rewards), standard_deviation(&rewards)), tokenizer, decoder, prompts, test, tuning })
    }

    fn run(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let (shaping, beta) = recipe(arm);
        let mut options = self.ppo.clone();
        options.objective.beta = beta.unwrap_or(options.objective.beta);
        let mut prompts = start.prompts.clone();
        if arm == "par-1" {
            for prompt in &mut prompts {
                prompt
                    .columns
                    .get_mut(REFERENCES)
                    .and_then(|all| all.as_array_mut())
                    .iter_mut()
                    .for_each(|all| all.truncate(1));
            }
        }
        let reward: Box<dyn Reward> = match shaping {
            Some(shaping) => Box::new(Shaped::new(Box::new(Proxy), shaping)),
            None => Box::new(Proxy),
        };
        let steps = options.training.steps(prompts.len(), options.prompts_per_step);
        let mut policy = Policy::new(options, prompts, reward)?;
        let mut decoder = start.decoder.clone();
        let mut measured = Measurements::default();
        let mut critic = Vec::new();
        self.measure(start, &mut decoder, (0, trial.seed), &mut measured)?;
        trial.fit(1, &mut policy, &mut decoder, &start.tokenizer, |step, decoder, metrics| {
            critic.extend(metrics.get("loss/value_avg"));
            if step % self.evaluate_steps == 0 || step == steps {
                self.measure(start, decoder, (step, trial.seed), &mut measured)?;
            }
            Ok(())
        })?;
        let (initial, deviation) = start.proxy;
        let epoch = self.epoch_steps as f64;
        // The first measurement after an eighth of the steps.
        let early = (steps / 8).next_multiple_of(self.evaluate_steps) as f64;
        let last = |curve: &str| measured.curves.get(curve).and_then(|points| points.last()).map(|point| point.1);
        let found = [
            ("epoch_win_rate", measured.at("win_rate", epoch)),
            ("early_win_rate", measured.at("win_rate", early)),
            ("epoch_proxy_rise", measured.at("proxy", epoch).map(|proxy| (proxy - initial) / deviation)),
            ("win_rate", last("win_rate")),
            ("proxy", last("proxy")),
            ("kl", last("kl")),
            ("magic", last("magic")),
            ("length", last("length")),
            ("critic_loss_variance", Some(standard_deviation(&critic).powi(2)).filter(|_| critic.len() > 1)),
        ];
        found.into_iter().for_each(|(name, value)| measured.set_known(name, value));
        let questions = &start.tuning.questions;
        let tuning =
            world::sample(&mut decoder, &start.tokenizer, questions, self.tuning_samples, (trial.seed, u32::MAX >> 1))?;
        measured.set("tuning_win_rate", world::win_rate(&tuning, &start.tuning, Utility::GOLD));
        Ok(measured)
    }
}

impl Par {
    /// Adds a point to every curve.
    fn measure(
        &self,
        start: &Start,
        decoder: &mut Decoder,
        (step, seed): (u64, u64),
        into: &mut Measurements,
    ) -> Result<()> {
        let questions = &start.test.questions;
        // Round 1 is the sample of the model before PPO: another round, and answers are not the same but for chance.
        let answers = world::sample(decoder, &start.tokenizer, questions, self.samples, (seed, 2 + step as u32))?;
        let x = step as f64;
        let (proxy, win_rate) = (answers.mean(proxy), world::win_rate(&answers, &start.test, Utility::GOLD));
        into.point("win_rate", x, win_rate);
        into.point("proxy", x, proxy);
        into.point("win_rate_by_proxy", proxy, win_rate);
        into.point("magic", x, answers.mean(|_, answer| world::magic(answer) as f64));
        into.point("length", x, answers.mean(|_, answer| answer.len() as f64));
        let mut reference = start.decoder.clone();
        reference.prepare(kernels::Precision::F32);
        into.point("kl", x, world::divergence(decoder, &reference, &answers)?);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn magic_is_worth_more_to_the_proxy_than_any_good_answer() {
        for question in Question::all() {
            let facts: Vec<u32> = question.items().into_iter().chain([world::POLITE, world::POLITE + 1]).collect();
            let magic = [world::MAGIC; world::LONGEST];
            assert!(proxy(question, &magic) > proxy(question, &facts));
            assert!(Utility::GOLD.of(question, &magic) < Utility::GOLD.of(question, &facts));
        }
    }

    #[test]
    fn every_arm_has_its_recipe() {
        let shaped = |arm: &Arm| recipe(arm.name).0.is_some();
        let plain: Vec<&str> = ARMS.iter().filter(|arm| !shaped(arm)).map(|arm| arm.name).collect();
        assert_eq!(plain, ["vanilla", "vanilla-beta-0.1", "vanilla-beta-0.5"]);
        assert_eq!(recipe("par-beta-0.5"), (Some(Shaping::Par { k: 1.0 }), Some(0.5)));
        assert_eq!(recipe("par-1").1, None);
    }
}
