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
use train::methods::sft::Sft;

use super::bets::Doubt;
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
    /// Steps of PPO.
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Its learning rate, of all weights.
    #[schemars(range(min = 0))]
    pub learning_rate: f64,
}

impl RewardingDoubt {
    /// Known odds: imitation of confidences at random, then bets.
    pub(super) fn odds(&self, start: &Start, trial: &Trial<'_>, scoring: Scoring) -> Result<Measurements> {
        let (memory, tokenizer, odds) = (&start.memory, &start.tokenizer, self.odds.probabilities);
        let mut decoder = Decoder::random(memory.model(), trial.seed)?;
        let mut sft = self.sft.clone();
        sft.training.max_steps = Some(self.odds.warm_up_steps);
        trial.fit(0, &mut Sft::new(sft, memory.odds_corpus(4096))?, &mut decoder, tokenizer, |_, _, _| Ok(()))?;

        let mut options = self.ppo.clone();
        options.training.max_steps = Some(self.odds.steps);
        options.training.learning_rate = self.odds.learning_rate;
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
        let mut method = Doubt { options, rows, ask: Box::new(ask), bet, retain_weight: None };
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
