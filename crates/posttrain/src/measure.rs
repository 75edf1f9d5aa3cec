//! Measures a model on held-out problems for the training loop, and keeps what it said.

use data::Prompt;
use envs::{Reward, Status};
use eval::play::World;
use eval::{EvaluateOptions, Sample, evaluate, evaluate_in};
use model::Decoder;
use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;
use serde_json::{Value, json};
use train::verdicts::{Held, Verdicts};
use train::{Evaluation, EvaluationError, Evaluator, Measure};

use crate::config::Config;
use crate::failure::Failure;
use crate::judges;
use crate::opened::Opener;

/// Held-out problems and how to judge answers to them.
pub struct Measurer<'a> {
    prompts: Vec<Prompt>,
    reward: Box<dyn Reward>,
    world: Option<World<'a>>,
    options: EvaluateOptions,
    tokenizer: &'a Tokenizer,
}

impl<'a> Measurer<'a> {
    /// Measures on `prompts` as the recipe says.
    ///
    /// # Errors
    /// Those of [`judges::rewards`] and [`Config::world`].
    pub fn new(
        config: &'a Config,
        prompts: Vec<Prompt>,
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        opener: Opener,
    ) -> Result<Self, Failure> {
        let (reward, world) = (judges::rewards(config, opener)?, config.world(template)?);
        Ok(Self { prompts, reward, world, options: config.evaluation.clone(), tokenizer })
    }
}

/// Whoever measures what a recipe holds out, if it holds out anything: answers to problems, or scores of rows.
pub fn evaluator<'a>(
    config: &'a Config,
    (test, held): (Vec<Prompt>, Option<Held>),
    (tokenizer, template): (&'a Tokenizer, Option<&'a ChatTemplate>),
    opener: Opener,
) -> Result<Option<Box<dyn Evaluator + 'a>>, Failure> {
    if let Some(held) = held {
        let micro_batch_tokens =
            config.stages().iter().map(|stage| stage.training().micro_batch_tokens).max().unwrap_or(2048);
        return Ok(Some(Box::new(Verdicts { held, tokenizer, micro_batch_tokens, seed: config.evaluation.seed })));
    }
    match test.is_empty() {
        true => Ok(None),
        false => Ok(Some(Box::new(Measurer::new(config, test, tokenizer, template, opener)?))),
    }
}

impl Evaluator for Measurer<'_> {
    fn evaluate(
        &mut self,
        decoder: &Decoder,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Evaluation, EvaluationError> {
        let Self { prompts, reward, world, options, tokenizer } = self;
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
            let pass = |(k, value): &(u32, f64)| measure(&format!("pass@{k}"), *value, *value, *value);
            measures.extend(found.pass_at_k.iter().map(pass));
        }
        let answers = found.samples.chunks(self.options.samples as usize);
        let answers = self
            .prompts
            .iter()
            .zip(answers)
            .flat_map(|(prompt, samples)| samples.iter().map(|sample| written(prompt, sample)));
        Ok(Evaluation { step: 0, measures, solved: found.solved(), samples: answers.collect() })
    }
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
