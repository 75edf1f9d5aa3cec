//! Known odds: the probability of being right is written on the question, so that the best bet is known.

use base::{Purpose, Random};
use data::Prompt;
use envs::reward::confidence::{ConfidenceOptions, LEVELS, Scoring};
use eval::calibration::calibration;
use eval::metrics::mean;
use kernels::Precision;
use model::decoder::Decoder;
use rollout::{Generator, Request};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::method::Step;
use train::methods::policy::PolicyOptions;
use train::methods::sft::Sft;
use train::options::TrainingOptions;

use super::bets::{Doubt, Kept};
use super::world::{self, MARKS};
use super::{MEASUREMENTS, RewardingDoubt, Start, extreme};
use crate::error::Result;
use crate::experiment::Trial;
use crate::measurements::Measurements;

/// Settings of the world of known odds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OddsOptions {
    /// The probability of being right for each mark.
    pub probabilities: [f64; MARKS],
    /// Steps of imitation before the bets.
    #[schemars(range(min = 1))]
    pub warm_up_steps: u64,
    /// The loss of PPO.
    pub objective: objectives::PolicyOptions,
    /// How long PPO lasts and how all weights move.
    pub training: TrainingOptions,
    /// Weight of the divergence from the confidences at random that were imitated, so that no level dies out before the marks are told apart.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub retain_weight: f64,
}

impl RewardingDoubt {
    /// PPO in the world of known odds.
    pub(super) fn odds_options(&self) -> PolicyOptions {
        let OddsOptions { objective, training, .. } = self.odds.clone();
        PolicyOptions { objective, training, ..self.ppo.clone() }
    }

    /// Known odds: imitation of confidences at random, then bets.
    pub(super) fn odds(&self, start: &Start, trial: &Trial<'_>, scoring: Scoring) -> Result<Measurements> {
        let (memory, tokenizer, odds) = (&start.memory, &start.tokenizer, self.odds.probabilities);
        let mut decoder = Decoder::random(memory.model(), trial.seed)?;
        let mut sft = self.sft.clone();
        sft.training.max_steps = Some(self.odds.warm_up_steps);
        trial.fit(0, &mut Sft::new(sft, memory.odds_corpus(4096))?, &mut decoder, tokenizer, |_, _, _| Ok(()))?;

        let options = self.odds_options();
        let (rows, half) = (options.prompts_per_step, self.memory.entities / 2);
        let random = Random::new(trial.seed, Purpose::Task).step(2);
        let ask = move |step: &mut Step<'_>| {
            let prompt = |row: u32| {
                let random = random.prompt(row).sample(step.number as u32);
                let mark = random.at(0).below(MARKS as u64) as usize;
                let right = random.at(1).uniform() < odds[mark];
                memory.odds(row, mark, random.at(2).below(half as u64) as usize, right, step.tokenizer)
            };
            Ok((0..rows as u32).map(prompt).collect())
        };
        let bet = ConfidenceOptions { scoring, ..self.bet.clone() };
        let mut method = Doubt {
            options,
            rows,
            ask: Box::new(ask),
            bet,
            retained: Some(Kept::Confidences(self.odds.retain_weight)),
        };
        trial.fit(1, &mut method, &mut decoder, tokenizer, |_, _, _| Ok(()))?;
        self.measure_odds(start, &mut decoder, trial.seed)
    }

    /// What is stated for each mark, on entities that no bet was about.
    fn measure_odds(&self, start: &Start, decoder: &mut Decoder, seed: u64) -> Result<Measurements> {
        let (memory, half) = (&start.memory, self.memory.entities / 2);
        decoder.prepare(Precision::F32);
        let random = Random::new(seed, Purpose::Sampling).step(MEASUREMENTS);
        let (mut measured, mut stated) = (Measurements::default(), Vec::new());
        let (mut largest, mut regret) = (0.0f64, Vec::new());
        for (mark, &odds) in self.odds.probabilities.iter().enumerate() {
            let outcome =
                |entity: usize| random.prompt(entity as u32).sample(u32::MAX).at(mark as u32).uniform() < odds;
            let prompt = |entity: usize| {
                memory.odds((mark * half + entity) as u32, mark, half + entity, outcome(entity), &start.tokenizer)
            };
            let prompts: Vec<Prompt> = (0..half).map(prompt).collect();
            let requests: Vec<Request> =
                prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, 1)).collect();
            let episodes = Generator::new(&self.ppo.sampling, 64, random).generate(
                decoder,
                &start.tokenizer,
                &requests,
                |_| {},
            )?;
            let levels: Vec<Option<u8>> = episodes.iter().map(|episode| world::level(&episode.completion)).collect();
            let count = |level: u8| levels.iter().filter(|stated| **stated == Some(level)).count();
            let expected =
                |level: u8, p: f64| p * Scoring::Log.value(level, true) + (1.0 - p) * Scoring::Log.value(level, false);
            let largest_of =
                |value: &dyn Fn(u8) -> f64| (0..=LEVELS).reduce(|a, b| if value(b) > value(a) { b } else { a });
            let most_frequent = largest_of(&|level| count(level) as f64).unwrap_or(0);
            let best = largest_of(&|level| expected(level, odds)).unwrap_or(0);
            largest = largest.max((f64::from(most_frequent) - f64::from(best)).abs());
            let entropy = -(odds * odds.ln() + (1.0 - odds) * (1.0 - odds).ln());
            for (entity, level) in levels.iter().enumerate() {
                let Some(level) = *level else { continue };
                let p = (f64::from(level) / f64::from(LEVELS)).clamp(0.001, 0.999);
                regret.push((odds * p.ln() + (1.0 - odds) * (1.0 - p).ln() + entropy, entropy));
                stated.push((f64::from(level) / f64::from(LEVELS), outcome(entity)));
            }
            let said: Vec<f64> = levels.iter().flatten().map(|level| f64::from(*level) / f64::from(LEVELS)).collect();
            measured.point("odds", odds, mean(&said));
        }
        measured.set("largest_distance", largest);
        if let Some(found) = calibration(&stated) {
            measured.set("ece", found.ece);
            measured.set("extreme", extreme(&stated.iter().map(|stated| stated.0).collect::<Vec<_>>()));
            let [lost, entropy] =
                [regret.iter().map(|pair| -pair.0).sum::<f64>(), regret.iter().map(|pair| pair.1).sum()];
            measured.set("regret", lost / entropy);
        }
        Ok(measured)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;
    use crate::settings::settings;

    /// The policy that is best at `Σ_c π_c q_c - w KL(u ‖ π)` with `u` uniform: `π_c = (w / n) / (λ - q_c)`, with `λ` above all `q_c` such that it sums to 1.
    fn best_policy(values: &[f64], weight: f64) -> Vec<f64> {
        let share = weight / values.len() as f64;
        let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let policy = |above: f64| values.iter().map(|value| share / (above + top - value)).collect::<Vec<f64>>();
        let (mut low, mut high) = (1e-12f64, 10.0f64);
        for _ in 0..100 {
            let middle = (low * high).sqrt();
            if policy(middle).iter().sum::<f64>() > 1.0 { low = middle } else { high = middle }
        }
        policy(low)
    }

    #[test]
    fn where_what_is_trained_is_largest_the_claims_hold() {
        let system = &super::super::SYSTEM;
        let settings: RewardingDoubt = serde_json::from_value(settings(system, false).unwrap()).unwrap();
        let OddsOptions { probabilities, retain_weight, objective, .. } = settings.odds;
        assert_eq!((objective.beta, objective.entropy_coef), (0.0, 0.0), "the derivation knows no other term");
        let levels = 0..=LEVELS;
        let score =
            |level: u8, p: f64| p * Scoring::Log.value(level, true) + (1.0 - p) * Scoring::Log.value(level, false);
        // Advantages are divided by the deviation of the rewards, which is this at the optimum; and the loss is a mean over the two tokens of a
        // completion, of which the level is one.
        let (deviation, weight) = (0.19, 2.0 * retain_weight);
        let (mut lost, mut most, mut stated) = (0.0, 0.0, [0.0; LEVELS as usize + 1]);
        let (mut right, stated_for) = (stated, |level: u8| f64::from(level) / f64::from(LEVELS));
        for p in probabilities {
            let values: Vec<f64> = levels.clone().map(|level| score(level, p) / deviation).collect();
            let policy = best_policy(&values, weight);
            for (level, share) in levels.clone().zip(&policy) {
                let c = stated_for(level).clamp(0.001, 0.999);
                lost -= share * (p * (c / p).ln() + (1.0 - p) * ((1.0 - c) / (1.0 - p)).ln());
                stated[usize::from(level)] += share;
                right[usize::from(level)] += share * p;
            }
            most -= p * p.ln() + (1.0 - p) * (1.0 - p).ln();
        }
        assert!(lost / most < 0.03, "less than the 0.05 of claim 6c: {}", lost / most);
        let marks = probabilities.len() as f64;
        let error: f64 = levels
            .map(|level| (right[usize::from(level)] - stated[usize::from(level)] * stated_for(level)).abs() / marks)
            .sum();
        assert!(error < 0.03, "less than the 0.05 of claim 6b: {error}");
    }
}
