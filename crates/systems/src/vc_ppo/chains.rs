//! The second world: a small decoder that writes out a chain of thought, or guesses.
//!
//! A prompt holds two digits `s` and `a`; asked for is `s + N a` modulo 10, which a chain finds by `N` additions:
//!
//! ```text
//! BOS s a :      1 v_1  2 v_2  ..  N v_N  =  v_N  EOS          v_1 = s + a, v_2 = v_1 + a, ..  modulo 10
//! ```
//!
//! An answer may stop to think at any time: `= v EOS` is right one time in ten by guessing. The corpus that the model imitates has chains
//! in which every value is replaced by a random digit with a small probability, from which the chain goes on, and some answers that only guess.
//! So a whole chain is right about every second time, and what is asked of PPO is to think as long as before and to slip less often.

use base::{Purpose, Random};
use data::{Example, Prompt, ScoredExample, Source};
use envs::{Answer, Columns, Reward, RewardError, Score, Status};
use eval::metrics::mean;
use kernels::Precision;
use model::config::ScoreHead;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use model::{Family, ModelConfig};
use rollout::{Generator, Request};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::methods::policy::{Policy, PolicyOptions};
use train::methods::reward_model::{RewardModel, RewardModelOptions, RewardRows};
use train::methods::sft::{Sft, SftOptions};

use super::Repairs;
use crate::error::{Error, Result};
use crate::experiment::Trial;
use crate::measurements::Measurements;
use crate::words;

const PAD: u32 = 0;
const BOS: u32 = 1;
const EOS: u32 = 2;
const SEP: u32 = 3;
const EQUALS: u32 = 4;
/// The digit 0.
const DIGIT: u32 = 5;
/// The number of the first step.
const STEP: u32 = 15;
/// Most steps.
const MOST: u32 = 48;
const VOCABULARY: usize = (STEP + MOST) as usize;
/// Draws of measurements are named by steps from here on, apart from those of training.
const MEASUREMENTS: u32 = 1 << 31;

/// Settings of the chains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Chains {
    /// Additions of a whole chain.
    #[schemars(range(min = 2, max = 48))]
    pub additions: u32,
    /// Probability that a value of the corpus is replaced by a random digit.
    #[schemars(range(min = 0, max = 1))]
    pub slips: f64,
    /// Share of the corpus that guesses.
    #[schemars(range(min = 0, max = 1))]
    pub guesses: f64,
    /// Answers that the first model imitates.
    #[schemars(range(min = 1))]
    pub corpus: u32,
    /// Prompts of a measurement, one answer each.
    #[schemars(range(min = 1))]
    pub test_prompts: u32,
    /// Steps of the policy between measurements.
    #[schemars(range(min = 1))]
    pub evaluate_steps: u64,
    /// Steps of value pretraining, before those of `ppo.training`.
    pub pretraining: u64,
    /// How the first model imitates.
    pub sft: SftOptions,
    /// How the reward model learns what answers of the corpus are paid.
    pub reward_model: RewardModelOptions,
    /// PPO; an arm sets λ of the value model and its pretraining.
    pub ppo: PolicyOptions,
}

/// What all arms of a seed start from.
pub struct Start {
    tokenizer: Tokenizer,
    decoder: Decoder,
    reward_model: Decoder,
}

/// A question: the first digit, and the one that is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Question([u32; 2]);

impl Question {
    /// All of them.
    const COUNT: u32 = 100;

    fn numbered(number: u32) -> Self {
        Self([number / 10 % 10, number % 10])
    }

    fn ids(self) -> [u32; 4] {
        let [s, a] = self.0.map(|digit| DIGIT + digit);
        [BOS, s, a, SEP]
    }

    /// The right answer after so many additions.
    fn answer(self, additions: u32) -> u32 {
        (self.0[0] + additions * self.0[1]) % 10
    }

    fn prompt(self, number: u32, tokenizer: &Tokenizer) -> Prompt {
        let ids = self.ids();
        Prompt {
            id: number,
            text: tokenizer.decode(&ids),
            ids: ids.into(),
            messages: None,
            columns: Columns::from_iter([("question".to_owned(), number.into())]),
            source: Source::new("chains", u64::from(number) + 1),
        }
    }
}

/// Whether an answer ends with the right digit after an equals sign.
fn is_right(question: Question, answer: &[u32], additions: u32) -> bool {
    answer.ends_with(&[EQUALS, DIGIT + question.answer(additions), EOS])
}

/// Pays what is right.
struct Right {
    additions: u32,
}

impl Reward for Right {
    fn name(&self) -> &str {
        "right"
    }

    fn score(&self, answers: &[Answer]) -> std::result::Result<Vec<Option<Score>>, RewardError> {
        let score = |(row, answer): (usize, &Answer<'_>)| {
            let number =
                answer.columns.get("question").and_then(serde_json::Value::as_u64).ok_or_else(|| {
                    RewardError::MissingColumn { reward: "right".into(), row, column: "question".into() }
                })?;
            let right = is_right(Question::numbered(number as u32), answer.completion_ids, self.additions);
            Ok(Some(Score::verdict(if right { Status::Ok } else { Status::Wrong })))
        };
        answers.iter().enumerate().map(score).collect()
    }
}

impl Chains {
    /// Refuses settings that mean nothing.
    ///
    /// # Errors
    /// The first option that cannot be used.
    pub fn validate(&self) -> Result<()> {
        if !(2..=MOST).contains(&self.additions) {
            let reason = format!("chains.additions: got {}, expected 2 to {MOST}", self.additions);
            return Err(Error::Settings { system: "vc-ppo", reason });
        }
        self.sft.validate().map_err(|error| error.within("chains.sft"))?;
        self.reward_model.validate().map_err(|error| error.within("chains.reward_model"))?;
        Ok(self.ppo.validate().map_err(|error| error.within("chains.ppo"))?)
    }

    /// The model that imitates the corpus, and the reward model that was trained on whole answers of it.
    ///
    /// # Errors
    /// Those of training.
    pub fn start(&self, trial: &Trial<'_>) -> Result<Start> {
        let tokenizer = tokenizer()?;
        let corpus: Vec<(Example, bool)> = (0..self.corpus).map(|row| self.example(trial.seed, row)).collect();
        let mut decoder = Decoder::random(model(), trial.seed)?;
        let examples = corpus.iter().map(|(example, _)| example.clone()).collect();
        let mut sft = Sft::new(self.sft.clone(), examples)?;
        trial.fit(0, &mut sft, &mut decoder, &tokenizer, |_, _, _| Ok(()))?;
        let scored = |(example, right): (Example, bool)| ScoredExample { example, score: f64::from(u8::from(right)) };
        let rows = RewardRows::Scored(corpus.into_iter().map(scored).collect());
        let mut reward_model = decoder.clone();
        reward_model.add_score(ScoreHead::REWARD, 0.0, trial.seed)?;
        let mut method = RewardModel::new(self.reward_model.clone(), rows)?;
        trial.fit(1, &mut method, &mut reward_model, &tokenizer, |_, _, _| Ok(()))?;
        Ok(Start { tokenizer, decoder, reward_model })
    }

    /// Trains and measures an arm.
    ///
    /// # Errors
    /// Those of training.
    pub fn run(&self, start: &Start, repairs: Repairs, trial: &Trial<'_>) -> Result<Measurements> {
        let mut options = self.ppo.clone();
        let pretraining = if repairs.pretrained { self.pretraining } else { 0 };
        options.value.warmup_steps = pretraining;
        options.objective.lam_value = repairs.decoupled.then_some(1.0);
        let prompts: Vec<Prompt> =
            (0..Question::COUNT).map(|number| Question::numbered(number).prompt(number, &start.tokenizer)).collect();
        let steps = options.training.steps(prompts.len(), options.prompts_per_step);
        options.training.max_steps = Some(steps + pretraining);
        let policy = Policy::new(options, prompts, Box::new(Right { additions: self.additions }))?;
        let mut policy = policy.with_value_model(start.reward_model.clone())?;
        let mut decoder = start.decoder.clone();
        let mut measured = Measurements::default();
        self.measure(start, &mut decoder, (0, trial.seed), &mut measured)?;
        trial.fit(2, &mut policy, &mut decoder, &start.tokenizer, |step, decoder, metrics| {
            let Some(step) = step.checked_sub(pretraining).filter(|step| *step > 0) else { return Ok(()) };
            // Of the values that the step's advantages are made with: those before the update.
            let explained = metrics.get("val/explained_variance").filter(|explained| explained.is_finite());
            if let Some(explained) = explained {
                measured.point("explained", step as f64, explained);
            }
            if step % self.evaluate_steps == 0 || step == steps {
                self.measure(start, decoder, (step, trial.seed), &mut measured)?;
            }
            Ok(())
        })?;
        for name in ["accuracy", "length"] {
            let curve = &measured.curves[name];
            let ends = curve.first().zip(curve.last()).map(|(first, last)| (first.1, last.1));
            measured.set_known(format!("initial_{name}"), ends.map(|(first, _)| first));
            measured.set_known(name, ends.map(|(_, last)| last));
        }
        measured.set_known("explained", measured.at("explained", 1.0));
        Ok(measured)
    }

    /// Adds a point to every curve.
    fn measure(
        &self,
        start: &Start,
        decoder: &mut Decoder,
        (step, seed): (u64, u64),
        into: &mut Measurements,
    ) -> Result<()> {
        decoder.prepare(Precision::F32);
        let random = Random::new(seed, Purpose::Sampling).step(MEASUREMENTS + step as u32);
        let question =
            |row: u32| Question::numbered(random.sample(1).prompt(row).at(0).below(Question::COUNT.into()) as u32);
        let mut requests: Vec<Request> = Vec::new();
        for row in 0..self.test_prompts {
            requests.extend(Request::samples(row, &question(row).ids().into(), 1));
        }
        let generator = Generator::new(&self.ppo.sampling, 64, random);
        let episodes = generator.generate(decoder, &start.tokenizer, &requests, |_| {})?;
        let right = |(row, episode): (u32, &rollout::Episode)| {
            f64::from(u8::from(is_right(question(row), &episode.completion, self.additions)))
        };
        let right: Vec<f64> = (0..).zip(&episodes).map(right).collect();
        let lengths: Vec<f64> = episodes.iter().map(|episode| episode.completion.len() as f64).collect();
        into.point("accuracy", step as f64, mean(&right));
        into.point("length", step as f64, mean(&lengths));
        Ok(())
    }

    /// An answer of the corpus, and whether it is right.
    fn example(&self, seed: u64, row: u32) -> (Example, bool) {
        let random = Random::new(seed, Purpose::Task).prompt(row);
        let question = Question::numbered(random.at(0).below(Question::COUNT.into()) as u32);
        let digit = |position: u32| random.at(position).below(10) as u32;
        let mut answer = Vec::new();
        let mut value = digit(1);
        if random.at(2).uniform() >= self.guesses {
            value = question.0[0];
            for step in 0..self.additions {
                value = (value + question.0[1]) % 10;
                if random.at(3 + 2 * step).uniform() < self.slips {
                    value = digit(4 + 2 * step);
                }
                answer.extend([STEP + step, DIGIT + value]);
            }
        }
        answer.extend([EQUALS, DIGIT + value, EOS]);
        let prompt = question.ids();
        let ids: Vec<u32> = prompt.iter().chain(&answer).copied().collect();
        let loss_mask = (0..ids.len()).map(|index| index >= prompt.len()).collect();
        let right = is_right(question, &answer, self.additions);
        (Example { ids, loss_mask, source: Source::new("corpus", u64::from(row) + 1) }, right)
    }
}

fn tokenizer() -> Result<Tokenizer> {
    let mut list: Vec<String> = ["<pad>", "<bos>", "<eos>", ":", "="].map(String::from).into();
    list.extend((0..10).map(|digit| digit.to_string()));
    list.extend((1..=MOST).map(|step| format!("step-{step}")));
    words::tokenizer(&list, BOS, EOS, PAD)
}

/// The shape of policy and value model.
fn model() -> ModelConfig {
    ModelConfig {
        bos_token_id: Some(BOS),
        eos_token_ids: vec![EOS],
        pad_token_id: Some(PAD),
        ..ModelConfig::tiny(Family::Llama, VOCABULARY)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    fn chains() -> Chains {
        let settings = crate::settings::settings(&super::super::SYSTEM, false).unwrap();
        serde_json::from_value(settings["chains"].clone()).unwrap()
    }

    #[test]
    fn answers_follow_from_their_chains() {
        let question = Question::numbered(73);
        assert_eq!((question.0, question.answer(1), question.answer(4)), ([7, 3], 0, 9));
        let answer = |digit: u32| [STEP, DIGIT, EQUALS, DIGIT + digit, EOS];
        assert!(is_right(question, &answer(9), 4) && !is_right(question, &answer(8), 4));
        assert!(!is_right(question, &answer(9)[..4], 4), "an answer that does not end is none");
        assert!(!is_right(question, &[DIGIT + 9, EOS], 4), "nor is one that does not say so");
        let tokenizer = tokenizer().unwrap();
        assert_eq!(tokenizer.decode(&question.ids()), "7 3 :");
        assert_eq!(tokenizer.encode("step-1 0 = 9").unwrap(), answer(9)[..4]);
    }

    #[test]
    fn the_corpus_is_right_about_every_second_time() {
        let chains = chains();
        let corpus: Vec<(Example, bool)> = (0..4000).map(|row| chains.example(3, row)).collect();
        assert!(corpus == (0..4000).map(|row| chains.example(3, row)).collect::<Vec<_>>());
        let share = |wanted: &dyn Fn(&(Example, bool)) -> bool| {
            corpus.iter().filter(|row| wanted(row)).count() as f64 / corpus.len() as f64
        };
        let guessed = |(example, _): &(Example, bool)| example.ids.len() == 7;
        assert!((share(&guessed) - chains.guesses).abs() < 0.02);
        let right_guess = share(&|row| guessed(row) && row.1) / share(&guessed);
        assert!((right_guess - 0.1).abs() < 0.05, "{right_guess}");
        let right = share(&|row| row.1);
        assert!((0.35..0.65).contains(&right), "{right}");
    }
}
