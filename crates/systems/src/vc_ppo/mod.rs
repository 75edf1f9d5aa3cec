//! VC-PPO: why PPO gives up long answers, and the two repairs of its value model.
//!
//! "What's Behind PPO's Collapse in Long-CoT? Value Optimization Holds the Secret", Yuan et al. 2025, arXiv 2503.01491. With a reward at the end
//! alone, γ = 1, and a value model whose error at step t is `e_t`, the advantage that PPO learns from is wrong by
//!
//! ```text
//! E[A_t(λ)] - A^π_t = - e_t + (1 - λ) Σ_{l≥1} λ^{l-1} e_{t+l}
//! ```
//!
//! The first term is a baseline and does no harm. The second is the future's error; a step that ends the answer has no future, so where
//! `e < 0`, as in a value model that begins as a reward model, ending is overpaid. And with λ < 1 the value model does not unlearn the error: the
//! end's reward reaches step t with weight `λ^(T-1-t)`, and what it learns there is its own error some steps on. The repairs:
//!
//! - **Value pretraining**: the value model first learns the returns of the frozen policy, with λ = 1 (`value.warmup_steps` of a recipe).
//! - **Decoupled GAE**: λ = 1 for what the value model learns, `λ_actor` < 1 for the policy (`objective.lam_value = 1.0` of a recipe).
//!
//! **World.** A corridor of 200 steps. At each step the policy quits or goes on; quitting is paid with probability 0.15, the end with 0.6.
//! The probability of quitting is one number for each of ten stretches. Values are a table, which begins at `0.45 - κ (1 - t/T)`; arms named
//! *far* have κ = 3, the others κ = 1. Everything is a formula of [`mod@objectives::gae`] away from PPO on a language model, and can be run a hundred times.
//!
//! Deviations from the paper:
//! 1. The gradient step is one of plain policy gradients on whitened advantages, bounded by 1 in each stretch; a ratio and its clipping act only from
//!    the second pass over the same episodes on.

use base::{Purpose, Random};
use eval::metrics::{mean, standard_deviation};
use objectives::gae;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::experiment::{Experiment, Trial, open};
use crate::measurements::{Measurements, Seed};
use crate::system::{Arm, Bound, Claim, Figure, Role, System};

/// The table.
pub const SYSTEM: System = System {
    name: "vc-ppo",
    title: "VC-PPO: value-calibrated PPO",
    paper: "Yuan et al. 2025, \"What's Behind PPO's Collapse in Long-CoT? Value Optimization Holds the Secret\", arXiv 2503.01491",
    summary: "a value model that is pretrained and learns with λ = 1 keeps PPO from giving up long answers",
    arms: ARMS,
    claims: CLAIMS,
    figures: FIGURES,
    tiny: include_str!("tiny.toml"),
    quick: include_str!("quick.toml"),
    readme: include_str!("README.md"),
    schema: || schemars::schema_for!(VcPpo).to_value(),
    open: |settings| open::<VcPpo>("vc-ppo", settings),
};

const ARMS: &[Arm] = &[
    Arm::new("vanilla", Role::Baseline, "λ = 0.95 for both, κ = 1"),
    Arm::new("decoupled", Role::Ablation, "decoupled GAE alone, κ = 1"),
    Arm::new("pretrained", Role::Ablation, "value pretraining alone, κ = 1"),
    Arm::new("vc-ppo", Role::Method, "both, κ = 1"),
    Arm::new("vanilla-far", Role::Baseline, "λ = 0.95 for both, κ = 3"),
    Arm::new("decoupled-far", Role::Ablation, "decoupled GAE alone, κ = 3"),
    Arm::new("pretrained-far", Role::Ablation, "value pretraining alone, κ = 3"),
    Arm::new("vc-ppo-far", Role::Method, "both, κ = 3"),
];

/// What an arm changes.
struct Recipe {
    /// How far the values of the first steps are too low.
    bias: f64,
    pretrained: bool,
    decoupled: bool,
}

fn recipe(arm: &str) -> Recipe {
    let (name, far) = arm.strip_suffix("-far").map_or((arm, false), |name| (name, true));
    Recipe {
        bias: if far { 3.0 } else { 1.0 },
        pretrained: matches!(name, "pretrained" | "vc-ppo"),
        decoupled: matches!(name, "decoupled" | "vc-ppo"),
    }
}

/// Length at the end over length at the start.
fn kept(seed: &Seed<'_>, arm: &str) -> Option<f64> {
    Some(seed.value(arm, "length")? / seed.value(arm, "initial_length")?)
}

const CLAIMS: &[Claim] = &[
    Claim {
        id: "1a",
        statement: "vanilla PPO gives up long episodes: length at the end over length at the start",
        bound: Bound::AtMost(0.2),
        measure: |seed| kept(seed, "vanilla"),
    },
    Claim {
        id: "1b",
        statement: "and with them success",
        bound: Bound::AtMost(0.25),
        measure: |seed| seed.value("vanilla", "success"),
    },
    Claim {
        id: "1c",
        statement: "the same with values that are further off",
        bound: Bound::AtMost(0.2),
        measure: |seed| kept(seed, "vanilla-far"),
    },
    Claim {
        id: "2a",
        statement: "VC-PPO makes episodes longer",
        bound: Bound::AtLeast(1.0),
        measure: |seed| kept(seed, "vc-ppo"),
    },
    Claim {
        id: "2b",
        statement: "and succeeds",
        bound: Bound::AtLeast(0.48),
        measure: |seed| seed.value("vc-ppo", "success"),
    },
    Claim {
        id: "2c",
        statement: "the same with values that are further off",
        bound: Bound::AtLeast(0.48),
        measure: |seed| seed.value("vc-ppo-far", "success"),
    },
    Claim {
        id: "3a",
        statement: "decoupled GAE alone is not enough where values are far off",
        bound: Bound::AtMost(0.25),
        measure: |seed| seed.value("decoupled-far", "success"),
    },
    Claim {
        id: "3b",
        statement: "nor is pretraining alone: by how much VC-PPO succeeds more often",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(seed.value("vc-ppo-far", "success")? - seed.value("pretrained-far", "success")?),
    },
    Claim {
        id: "5a",
        statement: "after pretraining the advantages of the first tenth are unbiased at the first step: distance of their mean from 0",
        bound: Bound::AtMost(0.05),
        measure: |seed| Some(seed.value("vc-ppo", "first_advantages")?.abs()),
    },
    Claim {
        id: "5b",
        statement: "without it they are biased upwards",
        bound: Bound::AtLeast(0.1),
        measure: |seed| seed.value("vanilla", "first_advantages"),
    },
];

const NEAR: &[&str] = &["vanilla", "decoupled", "pretrained", "vc-ppo"];
const FAR: &[&str] = &["vanilla-far", "decoupled-far", "pretrained-far", "vc-ppo-far"];

const FIGURES: &[Figure] = &[
    Figure { title: "Length, κ = 1", x: "iteration", y: "steps", curve: "length", arms: NEAR, diagonal: false },
    Figure { title: "Length, κ = 3", x: "iteration", y: "steps", curve: "length", arms: FAR, diagonal: false },
    Figure { title: "Success, κ = 1", x: "iteration", y: "success", curve: "success", arms: NEAR, diagonal: false },
    Figure { title: "Success, κ = 3", x: "iteration", y: "success", curve: "success", arms: FAR, diagonal: false },
    Figure {
        title: "Values when PPO ends, κ = 1",
        x: "step",
        y: "value",
        curve: "values",
        arms: NEAR,
        diagonal: false,
    },
];

/// Settings of the reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VcPpo {
    /// Steps of the corridor.
    #[schemars(range(min = 10, max = 100_000))]
    pub length: usize,
    /// Stretches of it, each with one probability of quitting.
    #[schemars(range(min = 1))]
    pub buckets: usize,
    /// Probability that quitting is paid.
    #[schemars(range(min = 0, max = 1))]
    pub quit_reward: f64,
    /// Probability that reaching the end is paid.
    #[schemars(range(min = 0, max = 1))]
    pub end_reward: f64,
    /// Probability of quitting at a step, before training.
    #[schemars(range(min = 0, max = 1))]
    pub quit_probability: f64,
    /// The value of the last step, before training.
    pub initial_value: f64,
    /// Episodes of an iteration.
    #[schemars(range(min = 1))]
    pub episodes: u32,
    /// Iterations of PPO.
    #[schemars(range(min = 1))]
    pub iterations: u32,
    /// Iterations of value pretraining.
    pub pretraining: u32,
    /// Step size of the logits.
    pub actor_step: f64,
    /// Step size of the values, towards the mean of what they are to be.
    pub critic_step: f64,
    /// λ, where it is not 1.
    #[schemars(range(min = 0, max = 1))]
    pub lambda: f64,
}

/// One walk.
struct Episode {
    /// Steps.
    length: usize,
    /// Whether it ended by quitting.
    quit: bool,
    /// What was paid at its end.
    reward: f64,
}

impl Episode {
    fn rewards(&self) -> Vec<f64> {
        let mut rewards = vec![0.0; self.length];
        rewards[self.length - 1] = self.reward;
        rewards
    }
}

impl Experiment for VcPpo {
    type Start = ();

    fn validate(&self) -> Result<()> {
        let fits = self.length.is_multiple_of(self.buckets) && (0.0..1.0).contains(&self.quit_probability);
        match fits {
            true => Ok(()),
            false => Err(Error::Settings {
                system: "vc-ppo",
                reason: format!(
                    "expected `length` to be a multiple of `buckets` and `quit_probability` below 1, got {}, {} and {}",
                    self.length, self.buckets, self.quit_probability
                ),
            }),
        }
    }

    fn start(&self, _trial: &Trial<'_>) -> Result<()> {
        Ok(())
    }

    fn run(&self, (): &(), arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let Recipe { bias, pretrained, decoupled } = recipe(arm);
        let mut logits = vec![(self.quit_probability / (1.0 - self.quit_probability)).ln(); self.buckets];
        let mut values = self.values(bias);
        let random = Random::new(trial.seed, Purpose::Sampling);
        for iteration in 0..if pretrained { self.pretraining } else { 0 } {
            let episodes = self.walk(&logits, random.sample(1).step(iteration));
            self.learn_values(&mut values, &episodes, 1.0);
        }
        let mut measured = Measurements::default();
        for iteration in 0..self.iterations {
            trial.go_on()?;
            (trial.progress)(u64::from(iteration) + 1, self.iterations.into());
            let episodes = self.walk(&logits, random.step(iteration));
            let advantages: Vec<Vec<f64>> = episodes
                .iter()
                .map(|episode| gae::advantages(&episode.rewards(), &values[..episode.length], 1.0, self.lambda))
                .collect();
            let lengths: Vec<f64> = episodes.iter().map(|episode| episode.length as f64).collect();
            let successes: Vec<f64> = episodes.iter().map(|episode| episode.reward).collect();
            measured.point("length", iteration.into(), mean(&lengths));
            measured.point("success", iteration.into(), mean(&successes));
            if iteration == 0 {
                let first = advantages.iter().flat_map(|all| all.iter().take(self.length / 10).copied());
                measured.set("first_advantages", mean(&first.collect::<Vec<_>>()));
                measured.set("initial_length", mean(&lengths));
            }
            let steps = self.gradient(&logits, &episodes, &advantages);
            self.learn_values(&mut values, &episodes, if decoupled { 1.0 } else { self.lambda });
            logits.iter_mut().zip(steps).for_each(|(logit, step)| *logit += self.actor_step * step.clamp(-1.0, 1.0));
        }
        for (step, value) in values.iter().enumerate() {
            measured.point("values", step as f64, *value);
        }
        // The last eighth, for less noise than one iteration has.
        let last = (self.iterations as usize / 8).max(1);
        for name in ["length", "success"] {
            let tail: Vec<f64> = measured.curves[name].iter().rev().take(last).map(|point| point.1).collect();
            measured.set(name, mean(&tail));
        }
        Ok(measured)
    }
}

impl VcPpo {
    /// Values like those of a reward model, which was trained on whole answers: too low, the more the earlier.
    fn values(&self, bias: f64) -> Vec<f64> {
        (0..self.length).map(|step| self.initial_value - bias * (1.0 - step as f64 / self.length as f64)).collect()
    }

    /// The probability of quitting at a step.
    fn quits(&self, logits: &[f64], step: usize) -> f64 {
        envs::reward::shaping::sigmoid(logits[step * self.buckets / self.length])
    }

    /// Walks of the policy.
    fn walk(&self, logits: &[f64], random: Random) -> Vec<Episode> {
        let walk = |episode: u32| {
            let draw = |position: usize| random.prompt(episode).at(position as u32).uniform();
            let quit = (0..self.length).find(|&step| draw(step) < self.quits(logits, step));
            let chance = if quit.is_some() { self.quit_reward } else { self.end_reward };
            let reward = f64::from(u8::from(draw(self.length) < chance));
            Episode { length: quit.map_or(self.length, |step| step + 1), quit: quit.is_some(), reward }
        };
        (0..self.episodes).map(walk).collect()
    }

    /// Moves each value towards the mean of `A_t(λ) + V_t` over the episodes that came there.
    fn learn_values(&self, values: &mut [f64], episodes: &[Episode], lambda: f64) {
        let (mut sums, mut counts) = (vec![0.0; self.length], vec![0.0; self.length]);
        for episode in episodes {
            let advantages = gae::advantages(&episode.rewards(), &values[..episode.length], 1.0, lambda);
            for (step, advantage) in advantages.iter().enumerate() {
                sums[step] += advantage;
                counts[step] += 1.0;
            }
        }
        for (value, (sum, count)) in
            values.iter_mut().zip(sums.iter().zip(&counts)).filter(|(_, (_, count))| **count > 0.0)
        {
            *value += self.critic_step * sum / count;
        }
    }

    /// The policy gradient in the logits of quitting: of an episode, its mean over the episodes; advantages are whitened over all steps.
    fn gradient(&self, logits: &[f64], episodes: &[Episode], advantages: &[Vec<f64>]) -> Vec<f64> {
        let all: Vec<f64> = advantages.iter().flatten().copied().collect();
        let (middle, deviation) = (mean(&all), standard_deviation(&all).max(1e-4));
        let mut gradient = vec![0.0; self.buckets];
        for (episode, advantages) in episodes.iter().zip(advantages) {
            for (step, advantage) in advantages.iter().enumerate() {
                let quits = f64::from(u8::from(episode.quit && step + 1 == episode.length));
                let score = quits - self.quits(logits, step);
                gradient[step * self.buckets / self.length] +=
                    (advantage - middle) / deviation * score / episodes.len() as f64;
            }
        }
        gradient
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Errors of the values of a corridor of 200 steps, on a path whose reward is always 1.
    fn chain(c: f64) -> (Vec<f64>, Vec<f64>) {
        let errors: Vec<f64> = (0..200).map(|step| -c * (1.0 - f64::from(step) / 200.0)).collect();
        let mut rewards = vec![0.0; 200];
        rewards[199] = 1.0;
        (rewards, errors)
    }

    /// The advantage of this path under the true values is 0, so that everything that GAE finds is the error's.
    #[test]
    fn the_error_of_the_advantage_is_the_error_of_the_future() {
        for lambda in [0.0, 0.5, 0.95, 1.0] {
            let (rewards, errors) = chain(0.7);
            let values: Vec<f64> = errors.iter().map(|error| 1.0 + error).collect();
            let found = gae::advantages(&rewards, &values, 1.0, lambda);
            for (step, found) in found.iter().enumerate() {
                let later = errors[step + 1..].iter().enumerate();
                let later: f64 = later.map(|(l, error)| lambda.powi(l as i32) * error).sum();
                let expected = -errors[step] + (1.0 - lambda) * later;
                assert!((found - expected).abs() < 1e-9, "λ {lambda}, step {step}: {found} {expected}");
            }
        }
    }

    #[test]
    fn one_fit_with_lambda_1_removes_the_error_and_one_with_less_keeps_it() {
        let (rewards, errors) = chain(1.0);
        let values: Vec<f64> = errors.iter().map(|error| 1.0 + error).collect();
        let fitted = |lambda| -> Vec<f64> {
            let advantages = gae::advantages(&rewards, &values, 1.0, lambda);
            advantages.iter().zip(&values).map(|(advantage, value)| advantage + value - 1.0).collect()
        };
        assert!(fitted(1.0).iter().all(|error| error.abs() < 1e-12));
        assert!(fitted(0.95)[0] <= -0.9, "{}", fitted(0.95)[0]);
        // A constant error c leaves c (1 - λ^(T-1-t)).
        let constant = gae::advantages(&rewards, &[0.5; 200], 1.0, 0.95);
        for (step, advantage) in constant.iter().enumerate() {
            let left = -0.5 * (1.0 - 0.95f64.powi(199 - step as i32));
            assert!((advantage + 0.5 - 1.0 - left).abs() < 1e-9);
        }
    }

    #[test]
    fn advantages_are_those_of_the_worked_example() {
        let (rewards, values) = ([0.0, 0.0, 0.0, 1.0], [0.1, 0.2, 0.4, 0.7]);
        for (lambda, expected) in [
            (1.0, [0.9, 0.8, 0.6, 0.3]),
            (0.95, [0.817_962_5, 0.755_75, 0.585, 0.3]),
            (0.5, [0.3125, 0.425, 0.45, 0.3]),
            (0.0, [0.1, 0.2, 0.3, 0.3]),
        ] {
            let found = gae::advantages(&rewards, &values, 1.0, lambda);
            assert!(
                found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-9),
                "{lambda}: {found:?}"
            );
        }
    }

    #[test]
    fn targets_are_a_mixture_of_n_step_returns() {
        let random = Random::new(4, Purpose::Test);
        let draw = |row: u32| -> Vec<f64> { (0..9).map(|i| random.prompt(row).at(i).uniform()).collect() };
        let (rewards, values, lambda) = (draw(0), draw(1), 0.8f64);
        let advantages = gae::advantages(&rewards, &values, 1.0, lambda);
        for step in 0..9 {
            let left = 9 - step;
            let n_step =
                |n: usize| rewards[step..step + n].iter().sum::<f64>() + values.get(step + n).copied().unwrap_or(0.0);
            let mixed: f64 = (1..left).map(|n| (1.0 - lambda) * lambda.powi(n as i32 - 1) * n_step(n)).sum();
            let expected = mixed + lambda.powi(left as i32 - 1) * n_step(left);
            assert!((advantages[step] + values[step] - expected).abs() < 1e-12);
        }
    }
}
