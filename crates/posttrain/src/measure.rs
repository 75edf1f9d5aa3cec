//! Measures a model on held-out problems and pairs for the training loop, and keeps what it said.

use data::{PreferencePair, Prompt};
use envs::{Status, Weighted};
use eval::{EvaluateOptions, Sample, evaluate};
use model::Decoder;
use model::tokenizer::Tokenizer;
use serde_json::{Value, json};
use train::preferred::Preferred;
use train::{Evaluation, EvaluationError, Evaluator, Measure};

use crate::config::Config;
use crate::failure::Failure;

/// Held-out problems and how to judge answers to them, and held-out pairs.
pub struct Measurer<'a> {
    prompts: Vec<Prompt>,
    pairs: Option<Preferred>,
    reward: Weighted,
    options: EvaluateOptions,
    tokenizer: &'a Tokenizer,
}

impl<'a> Measurer<'a> {
    /// Measures on `prompts` and `pairs` as the recipe says.
    pub fn new(
        config: &Config,
        prompts: Vec<Prompt>,
        pairs: Vec<PreferencePair>,
        tokenizer: &'a Tokenizer,
    ) -> Result<Self, Failure> {
        let reward = Weighted::from_configs(&config.rewards)?;
        let pairs = config.preference.as_ref().filter(|_| !pairs.is_empty()).map(|options| Preferred {
            pairs,
            length: options.objective.length,
            micro_batch_tokens: options.training.micro_batch_tokens,
            seed: config.evaluation.seed,
        });
        Ok(Self { prompts, pairs, reward, options: config.evaluation.clone(), tokenizer })
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
        let found = evaluate(decoder, self.tokenizer, &self.prompts, &self.reward, &self.options, progress)
            .map_err(|error| Box::new(error) as EvaluationError)?;
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
fn written(prompt: &Prompt, sample: &Sample) -> Value {
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
