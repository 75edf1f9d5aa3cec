//! The first world: a corridor of many steps, whose policy and values are tables.
//!
//! At each step the policy quits or goes on; quitting is paid with probability 0.15, the end with 0.6. The probability of quitting is one
//! number for each of ten stretches. Values begin at `0.45 - κ (1 - t/T)`, as those of a model that was trained on whole answers do.

use base::{Purpose, Random};
use eval::metrics::{mean, standard_deviation};
use objectives::gae;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Repairs;
use crate::error::{Error, Result};
use crate::experiment::Trial;
use crate::measurements::Measurements;

/// Settings of the corridor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Corridor {
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

impl Corridor {
    /// Refuses settings that mean nothing.
    ///
    /// # Errors
    /// Stretches that do not fill the corridor; a policy that quits at once.
    pub fn validate(&self) -> Result<()> {
        let fits = self.length.is_multiple_of(self.buckets) && (0.0..1.0).contains(&self.quit_probability);
        match fits {
            true => Ok(()),
            false => Err(Error::Settings {
                system: "vc-ppo",
                reason: format!(
                    "corridor: expected `length` to be a multiple of `buckets` and `quit_probability` below 1, got {}, {} and {}",
                    self.length, self.buckets, self.quit_probability
                ),
            }),
        }
    }

    /// Trains and measures an arm whose values begin too low by `bias`, the more the earlier.
    ///
    /// # Errors
    /// An interruption.
    pub fn run(
        &self,
        bias: f64,
        Repairs { pretrained, decoupled }: Repairs,
        trial: &Trial<'_>,
    ) -> Result<Measurements> {
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
