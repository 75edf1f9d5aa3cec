//! Measures a model on held-out problems: greedy or sampled answers, judged by the recipe's rewards.

use base::{Purpose, Random};
use data::Prompt;
use envs::{Answer, Reward, Status, Weighted};
use eval::interval::{RESAMPLES, bootstrap_mean, wilson};
use model::Decoder;
use model::tokenizer::Tokenizer;
use rollout::{Episode, Generator, Request, SamplingOptions};
use serde_json::{Value, json};
use train::{Evaluation, EvaluationError, Evaluator, Measure};

use crate::config::Config;
use crate::failure::Failure;

/// Held-out problems and how to judge answers to them.
pub struct Measurer<'a> {
    prompts: Vec<Prompt>,
    reward: Weighted,
    sampling: SamplingOptions,
    batch_size: usize,
    seed: u64,
    tokenizer: &'a Tokenizer,
}

impl<'a> Measurer<'a> {
    /// Measures on `prompts` as the recipe says.
    pub fn new(config: &Config, prompts: Vec<Prompt>, tokenizer: &'a Tokenizer) -> Result<Self, Failure> {
        Ok(Self {
            prompts,
            reward: Weighted::from_configs(&config.rewards)?,
            sampling: config.evaluation.sampling.clone(),
            batch_size: config.evaluation.decode_batch_size,
            seed: config.seed,
            tokenizer,
        })
    }

    /// Scores the answers, each beside its own prompt.
    fn judge(&self, episodes: &[Episode]) -> Result<Vec<(f64, Option<Status>)>, EvaluationError> {
        let answers: Vec<Answer<'_>> = self
            .prompts
            .iter()
            .zip(episodes)
            .map(|(prompt, episode)| Answer {
                prompt_text: &prompt.text,
                completion: &episode.text,
                completion_ids: &episode.completion,
                columns: &prompt.columns,
            })
            .collect();
        let scores = self.reward.score(&answers).map_err(|error| Box::new(error) as EvaluationError)?;
        Ok(scores.into_iter().map(|score| score.map_or((0.0, None), |score| (score.value, Some(score.status)))).collect())
    }
}

impl Evaluator for Measurer<'_> {
    fn evaluate(
        &mut self,
        decoder: &Decoder,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Evaluation, EvaluationError> {
        let random = Random::new(self.seed, Purpose::Sampling);
        let generator = Generator::new(&self.sampling, self.batch_size, random);
        let requests: Vec<Request> =
            self.prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, 1)).collect();
        let episodes = generator
            .generate(decoder, self.tokenizer, &requests, |now| progress(now.finished, now.total))
            .map_err(|error| Box::new(error) as EvaluationError)?;
        let judged = self.judge(&episodes)?;

        let solved: Vec<bool> = judged.iter().map(|(_, status)| *status == Some(Status::Ok)).collect();
        let items = solved.len();
        let right = solved.iter().filter(|solved| **solved).count();
        let rewards: Vec<f64> = judged.iter().map(|(value, _)| *value).collect();
        let lengths: Vec<f64> = episodes.iter().map(|episode| episode.completion.len() as f64).collect();
        let accuracy = wilson(right, items);
        let mean = |name: &str, values: &[f64]| {
            let interval = bootstrap_mean(values, RESAMPLES, self.seed);
            Measure {
                name: name.to_owned(),
                value: eval::metrics::mean(values),
                low: interval.low,
                high: interval.high,
                items,
            }
        };
        let measures = vec![
            Measure {
                name: "accuracy".to_owned(),
                value: right as f64 / items.max(1) as f64,
                low: accuracy.low,
                high: accuracy.high,
                items,
            },
            mean("reward", &rewards),
            mean("length", &lengths),
        ];
        let samples = self.prompts.iter().zip(&episodes).zip(&judged);
        let samples = samples.map(|((prompt, episode), (value, status))| sample(prompt, episode, *value, *status));
        Ok(Evaluation { step: 0, measures, solved, samples: samples.collect() })
    }
}

/// What is written down about one answer.
fn sample(prompt: &Prompt, episode: &Episode, value: f64, status: Option<Status>) -> Value {
    let last = prompt.messages.as_ref().and_then(|messages| messages.last());
    let question = last.and_then(|message| message.text()).unwrap_or(&prompt.text);
    json!({
        "id": prompt.id,
        "question": question,
        "answer": prompt.columns.get("answer"),
        "completion": episode.text,
        "tokens": episode.completion.len(),
        "value": value,
        "status": status.map(Status::name),
        "solved": status == Some(Status::Ok),
    })
}
