//! AlignDistil: alignment as distillation from a teacher beyond the DPO model.
//!
//! "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation", Zhang et al., ACL 2025, arXiv 2503.02832. A DPO model and
//! one of the reversed pairs make a teacher at every position, and the student moves towards its whole distribution:
//!
//! ```text
//! w_t = α Σ_a |p_dpo(a) - p_rev(a)| + 10⁻³,     z*_t = z_dpo + w_t (z_dpo - z_rev)
//! L   = mean over answers of the mean over tokens of  β/w_t · KL(p_t ‖ softmax(z*_t))
//! ```
//!
//! on the student's own answers or on those of the data ([`mod@objectives::extrapolation`], method `aligndistil`).
//!
//! **World.** [`attribute_text`](mod@crate::worlds::attribute_text): answers with six qualities, judged by their utility.
//!
//! **Experiment.** A model imitates the corpus: `π_ref`. 4032 pairs of its own answers are labelled by `σ(8 ΔU)`; DPO learns from them, and from
//! them reversed. Every arm then trains `π_ref` for as many steps of as many answers: by distillation in its modes, or by REINFORCE and PPO, which are
//! paid the DPO reward `β Σ_t log(π_dpo / π_ref)` of the whole answer, less `β_2 = β/2` times the divergence from `π_ref`, as theorem 1 with `w = 2` is.
//! Measured are the utility of answers to held-out prompts, the share of them that beat one of `π_ref`, and the divergence from it. Each method has a grid:
//! of α, of the fixed weight w, of learning rates; what is compared is chosen on prompts that are trained on.
//!
//! Deviations from the paper:
//! 1. Every response token is trained on, and no other; the authors' trainers leave out the first and take in what comes after the end.
//! 2. A row without tokens has no loss and still counts in the mean over rows.
//! 3. The student starts as `π_ref` in every arm, so that the steps of distillation and of reinforcement learning can be compared.
//! 4. The learning rate is constant.

#[cfg(test)]
mod tree;

use data::{Example, Prompt};
use envs::{Answer, Reward, RewardError, Score, Status};
use eval::metrics::mean;
use kernels::Precision;
use model::config::ScoreHead;
use model::decoder::{Decoder, Workspace};
use model::tokenizer::Tokenizer;
use objectives::{Anchor, Extrapolation};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::methods::distillation::{Distillation, DistillationOptions, Lessons, TeacherOptions};
use train::methods::policy::{Policy, PolicyOptions};
use train::methods::preference::{Preference, PreferenceOptions};
use train::methods::reward_model::{RewardModel, RewardModelOptions, RewardRows};
use train::methods::sft::SftOptions;
use train::scoring::{Batch, Scored, Unit};

use crate::error::Result;
use crate::experiment::{Experiment, Trial, open};
use crate::measurements::{Measurements, Seed};
use crate::system::{Arm, Bound, Claim, Figure, Role, System};
use crate::worlds::attribute_text::{self as world, Question, Sampled, Split, Utility};

/// The table.
pub const SYSTEM: System = System {
    name: "aligndistil",
    title: "AlignDistil: alignment as distillation",
    paper: "Zhang et al. 2025, \"AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation\", arXiv 2503.02832",
    summary: "distilled from a teacher beyond the DPO model, token by token, a model becomes better than that, sooner than by reinforcement learning",
    arms: ARMS,
    claims: CLAIMS,
    figures: FIGURES,
    tiny: include_str!("tiny.toml"),
    quick: include_str!("quick.toml"),
    readme: include_str!("README.md"),
    recipes: &["smollm2", "reverse", "paper"],
    data: None,
    schema: || schemars::schema_for!(AlignDistil).to_value(),
    open: |settings| open::<AlignDistil>("aligndistil", settings),
};

const ARMS: &[Arm] = &[
    Arm::new("dpo", Role::Baseline, "DPO"),
    Arm::new("rm", Role::Baseline, "a reward model, for its accuracy"),
    Arm::new("reinforce", Role::Baseline, "REINFORCE on the DPO reward of the answer, advantages whitened"),
    Arm::new("reinforce-fast", Role::Baseline, "the same at twice the learning rate"),
    Arm::new("ppo", Role::Baseline, "PPO with a value model on the same reward"),
    Arm::new("ppo-fast", Role::Baseline, "the same at twice the learning rate"),
    Arm::new("gkd", Role::Baseline, "distillation from the DPO model"),
    Arm::new("aligndistil-0.5", Role::Method, "on its own answers, α = 0.5"),
    Arm::new("aligndistil-1", Role::Method, "on its own answers, α = 1"),
    Arm::new("aligndistil-5", Role::Method, "on its own answers, α = 5"),
    Arm::new("aligndistil-15", Role::Method, "on its own answers, α = 15"),
    Arm::new("aligndistil-off-1", Role::Method, "on the chosen answers, α = 1"),
    Arm::new("aligndistil-off-10", Role::Method, "on the chosen answers, α = 10"),
    Arm::new("theorem1-2", Role::Ablation, "DPO and reference, w = 2"),
    Arm::new("theorem1-4", Role::Ablation, "DPO and reference, w = 4"),
    Arm::new("adaptive-15", Role::Ablation, "DPO and reference, adaptive, α = 15"),
    Arm::new("contrast-0.5", Role::Ablation, "DPO and reverse DPO, w = 0.5"),
    Arm::new("contrast-1", Role::Ablation, "DPO and reverse DPO, w = 1"),
    Arm::new("contrast-2", Role::Ablation, "DPO and reverse DPO, w = 2"),
    Arm::new("contrast-4", Role::Ablation, "DPO and reverse DPO, w = 4"),
];

const METHOD: &[&str] = &["aligndistil-0.5", "aligndistil-1", "aligndistil-5", "aligndistil-15"];
const OFF_POLICY: &[&str] = &["aligndistil-off-1", "aligndistil-off-10"];
const THEOREM: &[&str] = &["theorem1-2", "theorem1-4"];
const CONTRAST: &[&str] = &["contrast-0.5", "contrast-1", "contrast-2", "contrast-4"];
const SCALAR: &[&str] = &["reinforce", "reinforce-fast", "ppo", "ppo-fast"];

/// A number of the best arm of a grid, chosen by utility on prompts that are trained on.
fn of_best(seed: &Seed<'_>, arms: &[&str], number: &str) -> Option<f64> {
    seed.value(seed.best(arms, "tuning")?, number)
}

/// By how much the win rate of the best of one grid is ahead of that of another.
fn lead(seed: &Seed<'_>, ours: &[&str], theirs: &[&str]) -> Option<f64> {
    Some(of_best(seed, ours, "win_rate")? - of_best(seed, theirs, "win_rate")?)
}

/// The win rate that the sweep of fixed weights has at a divergence: interpolated between its arms, that of the nearest outside.
fn of_sweep(seed: &Seed<'_>, kl: f64) -> Option<f64> {
    let point = |arm: &&str| Some((seed.value(arm, "kl")?, seed.value(arm, "win_rate")?));
    let mut points = CONTRAST.iter().map(point).collect::<Option<Vec<(f64, f64)>>>()?;
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let above = points.iter().position(|point| point.0 >= kl);
    Some(match above {
        None => points[points.len() - 1].1,
        Some(0) => points[0].1,
        Some(above) => {
            let ((x0, y0), (x1, y1)) = (points[above - 1], points[above]);
            y0 + (y1 - y0) * (kl - x0) / (x1 - x0)
        }
    })
}

const CLAIMS: &[Claim] = &[
    Claim {
        id: "1a",
        statement: "the reward of DPO against reverse DPO orders held-out pairs better than that of DPO against the reference: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(seed.value("dpo", "contrastive_accuracy")? - seed.value("dpo", "accuracy")?),
    },
    Claim {
        id: "1b",
        statement: "so that the distance to a reward model's accuracy shrinks: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| {
            let rm = seed.value("rm", "accuracy")?;
            let distance = |number| Some((rm - seed.value("dpo", number)?).abs());
            Some(distance("accuracy")? - distance("contrastive_accuracy")?)
        },
    },
    Claim {
        id: "2a",
        statement: "on its own answers it wins more often against the first model than DPO: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, METHOD, &["dpo"]),
    },
    Claim {
        id: "2b",
        statement: "and more often than theorem 1 as it stands, without contrast and adaptive weights",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, METHOD, THEOREM),
    },
    Claim {
        id: "2c",
        statement: "and more often than distillation from the DPO model",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, METHOD, &["gkd"]),
    },
    Claim {
        id: "2d",
        statement: "on the chosen answers of the data it wins at least as often as DPO",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, OFF_POLICY, &["dpo"]),
    },
    Claim {
        id: "3",
        statement: "steps to DPO's utility: those of AlignDistil over those of the fastest of REINFORCE and PPO with the same reward",
        bound: Bound::AtMost(0.5),
        measure: |seed| {
            let fastest = SCALAR.iter().filter_map(|arm| seed.value(arm, "steps_to_dpo")).reduce(f64::min)?;
            Some(of_best(seed, METHOD, "steps_to_dpo")? / fastest)
        },
    },
    Claim {
        id: "4",
        statement: "adaptive weights win more often than the sweep of fixed ones does at the same divergence: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(of_best(seed, METHOD, "win_rate")? - of_sweep(seed, of_best(seed, METHOD, "kl")?)?),
    },
];

const FIGURES: &[Figure] = &[
    Figure {
        title: "Utility of answers to held-out prompts",
        x: "step",
        y: "utility",
        curve: "utility",
        arms: &[
            "reinforce",
            "reinforce-fast",
            "ppo",
            "ppo-fast",
            "gkd",
            "aligndistil-0.5",
            "aligndistil-5",
            "aligndistil-15",
            "theorem1-2",
        ],
        diagonal: false,
    },
    Figure {
        title: "The teacher: contrast and adaptive weights",
        x: "step",
        y: "utility",
        curve: "utility",
        arms: &[
            "aligndistil-0.5",
            "aligndistil-1",
            "aligndistil-15",
            "aligndistil-off-10",
            "adaptive-15",
            "theorem1-4",
            "contrast-1",
            "contrast-2",
            "contrast-4",
        ],
        diagonal: false,
    },
];

/// Settings of the reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AlignDistil {
    /// Answers that the first model imitates.
    #[schemars(range(min = 1))]
    pub corpus: u32,
    /// How it does so.
    pub sft: SftOptions,
    /// Pairs of its answers to each prompt that is trained on.
    #[schemars(range(min = 1))]
    pub pairs: usize,
    /// Pairs of its answers to each held-out prompt.
    #[schemars(range(min = 1))]
    pub test_pairs: usize,
    /// How sure labels are: `σ(kappa ΔU)`.
    pub kappa: f64,
    /// Answers to each prompt in a measurement.
    #[schemars(range(min = 1))]
    pub samples: usize,
    /// Steps between measurements.
    #[schemars(range(min = 1))]
    pub evaluate_steps: u64,
    /// DPO, and reverse DPO.
    pub dpo: PreferenceOptions,
    /// The reward model.
    pub reward_model: RewardModelOptions,
    /// Distillation; an arm says from which teachers, and how.
    pub distillation: DistillationOptions,
    /// REINFORCE and PPO; an arm says which.
    pub policy: PolicyOptions,
}

/// What all arms of a seed start from.
pub struct Start {
    tokenizer: Tokenizer,
    reference: Decoder,
    dpo: Decoder,
    reverse: Decoder,
    pairs: Vec<world::Preference>,
    /// The first is worth more.
    test_pairs: Vec<world::Preference>,
    /// Answers of the reference to the held-out prompts.
    test: Sampled,
    /// Utility of DPO's answers to them.
    dpo_utility: f64,
}

/// What an arm distils from, and on which answers.
#[derive(Debug, PartialEq)]
struct Recipe {
    /// Whether the second model is the reverse DPO model, and not the reference; none for the DPO model alone.
    reverse: Option<bool>,
    extrapolation: Option<Extrapolation>,
    on_policy: bool,
}

/// The recipe of an arm that distils.
fn recipe(arm: &str, beta: f64) -> Option<Recipe> {
    let (mode, weight) = arm.rsplit_once('-').unwrap_or((arm, "1"));
    let (reverse, adaptive) = match mode {
        "gkd" => return Some(Recipe { reverse: None, extrapolation: None, on_policy: true }),
        "aligndistil" | "aligndistil-off" => (true, true),
        "adaptive" => (false, true),
        "theorem1" => (false, false),
        "contrast" => (true, false),
        _ => return None,
    };
    let anchor = if reverse { Anchor::First } else { Anchor::Second };
    let extrapolation = Extrapolation { anchor, weight: weight.parse().ok()?, adaptive, beta };
    Some(Recipe { reverse: Some(reverse), extrapolation: Some(extrapolation), on_policy: !mode.ends_with("-off") })
}

/// The DPO reward of an answer: β Σ_t log(π_dpo(y_t) / π_ref(y_t)).
struct DpoReward {
    models: std::sync::Mutex<[Decoder; 2]>,
    beta: f64,
}

impl Reward for DpoReward {
    fn name(&self) -> &str {
        "dpo"
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let question = |(row, answer): (usize, &Answer<'_>)| {
            let number = answer.columns.get("question").and_then(serde_json::Value::as_u64);
            number.and_then(|number| Question::numbered(number as u32)).ok_or_else(|| RewardError::MissingColumn {
                reward: "dpo".into(),
                row,
                column: "question".into(),
            })
        };
        let questions = answers.iter().enumerate().map(question).collect::<Result<Vec<_>, _>>()?;
        let given: Vec<(Question, &[u32])> =
            questions.into_iter().zip(answers).map(|(question, answer)| (question, answer.completion_ids)).collect();
        let mut models = self.models.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let failed = |error: crate::Error| RewardError::Model { reward: "dpo".into(), reason: error.to_string() };
        let [dpo, reference] = &mut *models;
        let rewards = rewards(dpo, reference, &given, self.beta).map_err(failed)?;
        Ok(rewards.into_iter().map(|reward| Some(Score::new(reward, Status::Ok))).collect())
    }
}

/// `β Σ_t log(p_1(y_t) / p_2(y_t))` of each answer.
fn rewards(first: &mut Decoder, second: &mut Decoder, answers: &[(Question, &[u32])], beta: f64) -> Result<Vec<f64>> {
    let (first, second) = (world::log_probs(first, answers)?, world::log_probs(second, answers)?);
    Ok(first.iter().zip(second).map(|(first, second)| beta * (first - second)).collect())
}

/// The share of pairs whose first answer has the higher reward.
fn accuracy(rewards: impl Fn(&[(Question, &[u32])]) -> Result<Vec<f64>>, pairs: &[world::Preference]) -> Result<f64> {
    let of = |answer: fn(&world::Preference) -> &[u32]| {
        rewards(&pairs.iter().map(|pair| (pair.question, answer(pair))).collect::<Vec<_>>())
    };
    let (chosen, rejected) = (of(|pair| &pair.chosen)?, of(|pair| &pair.rejected)?);
    Ok(mean(&chosen.iter().zip(rejected).map(|(c, r)| f64::from(u8::from(*c > r))).collect::<Vec<_>>()))
}

impl Experiment for AlignDistil {
    type Start = Start;

    fn validate(&self) -> Result<()> {
        self.sft.validate().map_err(|error| error.within("sft"))?;
        self.dpo.validate().map_err(|error| error.within("dpo"))?;
        self.reward_model.validate().map_err(|error| error.within("reward_model"))?;
        let named = DistillationOptions { teachers: vec![TeacherOptions::default()], ..self.distillation.clone() };
        named.validate().map_err(|error| error.within("distillation"))?;
        Ok(self.policy.validate().map_err(|error| error.within("policy"))?)
    }

    fn start(&self, trial: &Trial<'_>) -> Result<Start> {
        let (tokenizer, mut reference) = world::imitation(trial, &self.sft, self.corpus)?;
        let (asked, held_out) = (Question::of(Split::Train), Question::of(Split::Test));
        let mut sampled = |questions: &[Question], size, round| {
            world::sample(&mut reference, &tokenizer, questions, size, (trial.seed, round))
        };
        let own = world::pairs(&sampled(&asked, 2 * self.pairs, 0)?);
        let others = world::pairs(&sampled(&held_out, 2 * self.test_pairs, 1)?);
        let test = sampled(&held_out, self.samples, 2)?;
        let pairs = world::preferences(trial.seed, own, Utility::GOLD, self.kappa);
        let utility = |question, answer: &[u32]| Utility::GOLD.of(question, answer);
        let differ = |(question, [a, b]): &(Question, [Vec<u32>; 2])| utility(*question, a) != utility(*question, b);
        let others = others.into_iter().filter(differ).collect();
        let test_pairs = world::preferences(trial.seed, others, Utility::GOLD, f64::INFINITY);

        let learn = |reversed: bool, stage| -> Result<Decoder> {
            let row = |(row, pair): (u32, &world::Preference)| {
                let mut pair = pair.pair(row);
                if reversed {
                    std::mem::swap(&mut pair.chosen, &mut pair.rejected);
                }
                pair
            };
            let mut method = Preference::new(self.dpo.clone(), (0..).zip(&pairs).map(row).collect())?;
            let mut decoder = reference.clone();
            trial.fit(stage, &mut method, &mut decoder, &tokenizer, |_, _, _| Ok(()))?;
            decoder.prepare(Precision::F32);
            Ok(decoder)
        };
        // The same order of rows, so that the two differ in their labels alone.
        let (mut dpo, reverse) = (learn(false, 1)?, learn(true, 1)?);
        let answers = world::sample(&mut dpo, &tokenizer, &held_out, self.samples, (trial.seed, 3))?;
        let dpo_utility = answers.mean(utility);
        Ok(Start { tokenizer, reference, dpo, reverse, pairs, test_pairs, test, dpo_utility })
    }

    fn run(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let mut measured = Measurements::default();
        match (arm, recipe(arm, self.dpo.objective.beta)) {
            ("rm", _) => measured.set("accuracy", self.reward_model(start, trial)?),
            ("dpo", _) => {
                let mut models = [&start.dpo, &start.reference, &start.reverse].map(Clone::clone);
                let [dpo, reference, reverse] = &mut models;
                let (dpo, beta) = (std::cell::RefCell::new(dpo), self.dpo.objective.beta);
                for (name, other) in [("accuracy", reference), ("contrastive_accuracy", reverse)] {
                    let other = std::cell::RefCell::new(other);
                    let of = |answers: &[(Question, &[u32])]| {
                        rewards(&mut dpo.borrow_mut(), &mut other.borrow_mut(), answers, beta)
                    };
                    measured.set(name, accuracy(of, &start.test_pairs)?);
                }
                self.finish(start, &mut start.dpo.clone(), trial, &mut measured)?;
            }
            (_, Some(recipe)) => {
                let mut method = self.distillation(start, &recipe)?;
                self.learn(start, &mut method, trial, &mut measured)?;
            }
            (arm, None) => {
                let mut method = self.policy(start, arm)?;
                self.learn(start, &mut method, trial, &mut measured)?;
            }
        }
        Ok(measured)
    }
}

impl AlignDistil {
    fn reward_model(&self, start: &Start, trial: &Trial<'_>) -> Result<f64> {
        let mut decoder = start.reference.clone();
        decoder.add_score(ScoreHead::REWARD, 0.0, trial.seed)?;
        let rows = (0..).zip(&start.pairs).map(|(row, pair)| pair.pair(row)).collect();
        let mut method = RewardModel::new(self.reward_model.clone(), RewardRows::Pairs(rows))?;
        trial.fit(2, &mut method, &mut decoder, &start.tokenizer, |_, _, _| Ok(()))?;
        decoder.prepare(Precision::F32);
        let of = |answers: &[(Question, &[u32])]| {
            let ids: Vec<Vec<u32>> =
                answers.iter().map(|(question, answer)| [&question.ids()[..], answer].concat()).collect();
            let units = ids.iter().map(|ids| Unit::new(vec![Scored::whole(ids)])).collect();
            let scores = Batch::new(units).scores(&decoder, &mut Workspace::new(), 4096)?;
            Ok(scores.into_iter().map(f64::from).collect())
        };
        accuracy(of, &start.test_pairs)
    }

    fn distillation(&self, start: &Start, recipe: &Recipe) -> Result<Distillation> {
        let mut options = self.distillation.clone();
        options.objective.extrapolation = recipe.extrapolation;
        options.on_policy_fraction = if recipe.on_policy { 1.0 } else { 0.0 };
        let second = recipe.reverse.map(|reverse| if reverse { &start.reverse } else { &start.reference });
        let teachers: Vec<Decoder> = std::iter::once(&start.dpo).chain(second).cloned().collect();
        options.teachers = vec![TeacherOptions::default(); teachers.len()];
        let prompts: Vec<Prompt> =
            Question::of(Split::Train).into_iter().map(|question| question.prompt(&start.tokenizer)).collect();
        let examples: Vec<Example> = (0..).zip(&start.pairs).map(|(row, pair)| pair.pair(row).chosen).collect();
        Ok(Distillation::new(options, teachers, Lessons { prompts, examples, reward: None })?)
    }

    fn policy(&self, start: &Start, arm: &str) -> Result<Policy> {
        let mut options = self.policy.clone();
        if arm.starts_with("reinforce") {
            options.objective.baseline = objectives::Baseline::None;
        }
        if arm.ends_with("-fast") {
            options.training.learning_rate *= 2.0;
            options.value.learning_rate = options.value.learning_rate.map(|rate| 2.0 * rate);
        }
        let prompts =
            Question::of(Split::Train).into_iter().map(|question| question.prompt(&start.tokenizer)).collect();
        let models = std::sync::Mutex::new([start.dpo.clone(), start.reference.clone()]);
        let reward = DpoReward { models, beta: self.dpo.objective.beta };
        Ok(Policy::new(options, prompts, Box::new(reward))?)
    }

    /// Trains the first model, and measures it on the way and at the end.
    fn learn(
        &self,
        start: &Start,
        method: &mut dyn train::Method,
        trial: &Trial<'_>,
        measured: &mut Measurements,
    ) -> Result<()> {
        let mut decoder = start.reference.clone();
        let steps = method.steps();
        let utility = |question, answer: &[u32]| Utility::GOLD.of(question, answer);
        measured.point("utility", 0.0, start.test.mean(utility));
        trial.fit(3, method, &mut decoder, &start.tokenizer, |step, decoder, _| {
            if step % self.evaluate_steps == 0 || step == steps {
                let named = (trial.seed, 100 + step as u32);
                let answers = world::sample(decoder, &start.tokenizer, &start.test.questions, self.samples, named)?;
                measured.point("utility", step as f64, answers.mean(utility));
            }
            Ok(())
        })?;
        // A model that never comes there is taken to come there at the next measurement, which favours it.
        let never = (steps + self.evaluate_steps) as f64;
        let reached = measured
            .curves
            .get("utility")
            .and_then(|points| points.iter().skip(1).find(|point| point.1 >= start.dpo_utility).map(|point| point.0));
        measured.set("steps_to_dpo", reached.unwrap_or(never));
        self.finish(start, &mut decoder, trial, measured)
    }

    /// What a model's answers are like.
    fn finish(
        &self,
        start: &Start,
        decoder: &mut Decoder,
        trial: &Trial<'_>,
        measured: &mut Measurements,
    ) -> Result<()> {
        let utility = |question, answer: &[u32]| Utility::GOLD.of(question, answer);
        let mut sampled = |questions: &[Question], round| {
            world::sample(decoder, &start.tokenizer, questions, self.samples, (trial.seed, round))
        };
        let (test, tuning) = (sampled(&start.test.questions, 4)?, sampled(&Question::of(Split::Train), 5)?);
        measured.set("utility", test.mean(utility));
        measured.set("tuning", tuning.mean(utility));
        measured.set("win_rate", world::win_rate(&test, &start.test, Utility::GOLD));
        measured.set("length", test.mean(|_, answer| answer.len() as f64));
        let mut reference = start.reference.clone();
        reference.prepare(Precision::F32);
        measured.set("kl", world::divergence(decoder, &reference, &test)?);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn arms_are_the_modes_of_the_paper() {
        let of = |arm| {
            let recipe = recipe(arm, 0.1)?;
            let made = recipe.extrapolation.map(|e| (e.anchor, e.weight, e.adaptive));
            Some((recipe.reverse, made, recipe.on_policy))
        };
        assert_eq!(of("aligndistil-15"), Some((Some(true), Some((Anchor::First, 15.0, true)), true)));
        assert_eq!(of("aligndistil-off-10"), Some((Some(true), Some((Anchor::First, 10.0, true)), false)));
        assert_eq!(of("adaptive-15"), Some((Some(false), Some((Anchor::Second, 15.0, true)), true)));
        assert_eq!(of("theorem1-2"), Some((Some(false), Some((Anchor::Second, 2.0, false)), true)));
        assert_eq!(of("contrast-0.5"), Some((Some(true), Some((Anchor::First, 0.5, false)), true)));
        assert_eq!(of("gkd"), Some((None, None, true)));
        for other in ["dpo", "rm", "reinforce", "reinforce-fast", "ppo", "ppo-fast"] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn the_sweep_is_read_between_its_arms() {
        let points = [(1.0, 0.6), (2.0, 0.7), (4.0, 0.9), (8.0, 0.5)];
        let all: Vec<Measurements> = points
            .iter()
            .map(|&(kl, win_rate)| {
                let values = [("kl".to_owned(), kl), ("win_rate".to_owned(), win_rate)].into();
                Measurements { values, ..Measurements::default() }
            })
            .collect();
        let seed = Seed { seed: 0, arms: CONTRAST.iter().copied().zip(&all).collect() };
        for (kl, expected) in [(0.5, 0.6), (1.0, 0.6), (3.0, 0.8), (6.0, 0.7), (9.0, 0.5)] {
            assert!((of_sweep(&seed, kl).unwrap() - expected).abs() < 1e-12);
        }
    }
}
