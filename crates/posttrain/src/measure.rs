//! Measures a model on held-out problems and pairs for the training loop, and keeps what it said.

use data::{PreferencePair, Prompt};
use envs::{Reward, Status};
use eval::play::World;
use eval::{EvaluateOptions, Sample, evaluate, evaluate_in};
use model::Decoder;
use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;
use serde_json::{Value, json};
use train::preferred::Preferred;
use train::verdicts::{Held, Verdicts};
use train::{Evaluation, EvaluationError, Evaluator, Measure};

use crate::config::Config;
use crate::failure::Failure;
use crate::judges;
use crate::opened::Opener;

/// Held-out problems and how to judge answers to them, and held-out pairs.
pub struct Measurer<'a> {
    prompts: Vec<Prompt>,
    pairs: Option<Preferred>,
    reward: Box<dyn Reward>,
    world: Option<World<'a>>,
    options: EvaluateOptions,
    tokenizer: &'a Tokenizer,
}

impl<'a> Measurer<'a> {
    /// Measures on `prompts` and `pairs` as the recipe says.
    ///
    /// # Errors
    /// Those of [`judges::judgement`] and [`Config::world`].
    pub fn new(
        config: &'a Config,
        prompts: Vec<Prompt>,
        pairs: Vec<PreferencePair>,
        (tokenizer, template): (&'a Tokenizer, Option<&'a ChatTemplate>),
        opener: Opener,
    ) -> Result<Self, Failure> {
        let (reward, world) = (judges::judgement(config, opener)?, config.world(template)?);
        let pairs = config.preference.as_ref().filter(|_| !pairs.is_empty()).map(|options| Preferred {
            pairs,
            length: options.objective.length,
            micro_batch_tokens: options.training.micro_batch_tokens,
            seed: config.evaluation.seed,
        });
        Ok(Self { prompts, pairs, reward, world, options: config.evaluation.clone(), tokenizer })
    }
}

/// Whoever measures what a recipe holds out, if it holds out anything: answers to problems, pairs, or scores of rows.
pub fn evaluator<'a>(
    config: &'a Config,
    (test, pairs, held): (Vec<Prompt>, Vec<PreferencePair>, Option<Held>),
    language: (&'a Tokenizer, Option<&'a ChatTemplate>),
    opener: Opener,
) -> Result<Option<Box<dyn Evaluator + 'a>>, Failure> {
    if let Some(held) = held {
        let micro_batch_tokens =
            config.stages().iter().map(|stage| stage.training().micro_batch_tokens).max().unwrap_or(2048);
        return Ok(Some(Box::new(Verdicts {
            held,
            tokenizer: language.0,
            micro_batch_tokens,
            seed: config.evaluation.seed,
        })));
    }
    match test.is_empty() && pairs.is_empty() {
        true => Ok(None),
        false => Ok(Some(Box::new(Measurer::new(config, test, pairs, language, opener)?))),
    }
}

impl Evaluator for Measurer<'_> {
    fn evaluate(
        &mut self,
        decoder: &Decoder,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Evaluation, EvaluationError> {
        let mut evaluation = match self.prompts.is_empty() {
            true => Evaluation::default(),
            false => self.answers(decoder, progress)?,
        };
        if let Some(pairs) = &self.pairs {
            let (measures, right) = pairs.measure(decoder).map_err(|error| Box::new(error) as EvaluationError)?;
            evaluation.measures.extend(measures);
            if self.prompts.is_empty() {
                evaluation.solved = right;
            }
        }
        Ok(evaluation)
    }
}

impl Measurer<'_> {
    /// Answers the problems and judges the answers.
    fn answers(
        &self,
        decoder: &Decoder,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Evaluation, EvaluationError> {
        let Self { prompts, reward, world, options, tokenizer, .. } = self;
        let found = match world {
            Some(world) => evaluate_in(*world, decoder, tokenizer, prompts, &**reward, options, progress),
            None => evaluate(decoder, tokenizer, prompts, &**reward, options, progress),
        };
        let found = found.map_err(|error| Box::new(error) as EvaluationError)?;
        let items = self.prompts.len() - found.not_applicable;
        let measure =
            |name: &str, value: f64, low: f64, high: f64| Measure { name: name.into(), value, low, high, items };
        let mut measures = vec![
            measure("accuracy", found.accuracy, found.interval.low, found.interval.high),
            measure("reward", found.mean_reward, found.reward_interval.low, found.reward_interval.high),
        ];
        if self.options.samples > 1 {
            let pass = found.pass_at_k.iter();
            measures.extend(pass.map(|(k, value, of)| measure(&format!("pass@{k}"), *value, of.low, of.high)));
        }
        let answers = found.samples.chunks(self.options.samples as usize);
        let answers = self
            .prompts
            .iter()
            .zip(answers)
            .flat_map(|(prompt, samples)| samples.iter().map(|sample| written(prompt, sample)));
        let (shares, samples) = (found.shares(), answers.collect());
        let plain = self.options.samples == 1 && found.not_applicable == 0;
        let (solved, shares) = match plain {
            true => (shares.iter().map(|share| *share == Some(1.0)).collect(), Vec::new()),
            false => (Vec::new(), shares),
        };
        Ok(Evaluation { step: 0, measures, solved, shares, samples })
    }
}

/// Whether a measure of this name is a share, from 0 to 1, which people read in percent.
pub fn is_share(name: &str) -> bool {
    matches!(name, "accuracy" | "preference_accuracy") || name.starts_with("pass@")
}

/// How people read a measure: the factor of its numbers, their unit, and digits after the point. Shares come in percent with
/// `digits` of them; any other number gets two.
pub fn scale(name: &str, digits: usize) -> (f64, &'static str, usize) {
    if is_share(name) { (100.0, " %", digits) } else { (1.0, "", 2) }
}

/// What is written down about one answer.
pub fn written(prompt: &Prompt, sample: &Sample) -> Value {
    let last = prompt.messages.as_ref().and_then(|messages| messages.last());
    let question = last.and_then(|message| message.text()).unwrap_or(&prompt.text);
    json!({
        "id": prompt.id,
        "sample": sample.sample,
        "question": question,
        "answer": prompt.columns.get("answer"),
        "completion": sample.text,
        "tokens": sample.length,
        "value": sample.score.as_ref().map(|score| score.value),
        "status": sample.score.as_ref().map(|score| Status::name(score.status)),
        "solved": sample.is_right(),
    })
}
