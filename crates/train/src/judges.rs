//! Reward models as rewards: what they were trained to say, said about answers.
//!
//! An answer is rendered as the rows were that the model learned from: after the prompt of its own row, by the model's template, with the
//! tokenizer of the model. Models are asked about all answers of a batch at once; answers to the same prompt share its computation. What an
//! answer is worth depends neither on the others nor on how the batch is cut.

use std::sync::Mutex;

use data::render::Overlong;
use data::sample::{Content, Sample, Text};
use data::{RenderOptions, Renderer, Row, Source};
use envs::{Answer, ModelRewardOptions, Reward, RewardError, Score, Status};
use model::chat::{ChatTemplate, Message};
use model::config::HeadTask;
use model::decoder::{Decoder, Workspace};
use model::tokenizer::Tokenizer;

use crate::scoring::{Batch, Scored, Unit};

/// A model with a score head, and the language it reads.
pub struct Judge {
    /// How it is called in messages.
    pub name: String,
    /// The decoder; its weights are prepared.
    pub decoder: Decoder,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<ChatTemplate>,
}

/// One or several reward models as a reward. Parts of a score are those of the models, by their number from 1, if there are several.
pub struct ModelReward {
    name: String,
    options: ModelRewardOptions,
    judges: Vec<Judge>,
    workspace: Mutex<Workspace>,
}

impl ModelReward {
    /// The reward that these models give.
    ///
    /// # Errors
    /// Options that mean nothing; a model without a score head, or with one that gives more than a reward.
    pub fn new(name: &str, options: &ModelRewardOptions, judges: Vec<Judge>) -> Result<Self, RewardError> {
        options.validate(name)?;
        for judge in &judges {
            let reason = match judge.decoder.config().score {
                None => "it has no score head, expected a reward model".to_owned(),
                Some(head) => match (head.task, head.outputs) {
                    (HeadTask::Sequence | HeadTask::Value, 1) | (HeadTask::Token, 1 | 2) => continue,
                    (_, outputs) => {
                        format!("its score head has {outputs} outputs, expected 1, or 2 for a verdict on steps")
                    }
                },
            };
            return Err(RewardError::Model { reward: name.to_owned(), reason: format!("{}: {reason}", judge.name) });
        }
        Ok(Self { name: name.to_owned(), options: options.clone(), judges, workspace: Mutex::default() })
    }

    /// What one model says about every answer.
    fn values(&self, judge: &Judge, answers: &[Answer<'_>]) -> Result<Vec<f64>, String> {
        let rendering = RenderOptions { overlong: Overlong::Error, ..RenderOptions::default() };
        let context = judge.decoder.config().max_positions;
        let renderer = Renderer::new(&judge.tokenizer, judge.template.as_ref(), context, &rendering);
        let head = judge.decoder.config().score.ok_or("it has no score head")?;
        let of_steps = head.task == HeadTask::Token;
        let samples: Vec<Sample> = answers
            .iter()
            .zip(1..)
            .map(|(answer, number)| sample(answer, number, of_steps.then_some(&self.options.step_separator[..])))
            .collect::<data::Result<_>>()
            .map_err(|error| error.to_string())?;
        // The tokens of every answer, and after which of them the head is read.
        let rendered: Vec<(Vec<u32>, Vec<usize>)> = if of_steps {
            let found = renderer.stepwise(&samples, &self.options.step_separator).map_err(|error| error.to_string())?;
            let places = |steps: Vec<(usize, f64)>| steps.into_iter().map(|(place, _)| place).collect();
            found.items.into_iter().map(|example| (example.ids, places(example.steps))).collect()
        } else {
            let found = renderer.examples(&samples).map_err(|error| error.to_string())?;
            let whole = |example: data::Example| {
                let last = example.ids.len() - 1;
                (example.ids, vec![last])
            };
            found.items.into_iter().map(whole).collect()
        };
        if rendered.len() != answers.len() {
            return Err(format!("{} of {} answers render to nothing", answers.len() - rendered.len(), answers.len()));
        }
        let groups = answers.chunk_by(|a, b| a.prompt_text == b.prompt_text).map(<[_]>::len);
        let mut rest = rendered.iter().map(|(ids, at)| Scored { ids, at: at.clone() });
        let batch = Batch::new(groups.map(|size| Unit::new(rest.by_ref().take(size).collect())).collect());
        let mut workspace = self.workspace.lock().map_err(|_| "an earlier call failed".to_owned())?;
        let scores = batch
            .scores(&judge.decoder, &mut workspace, self.options.micro_batch_tokens)
            .map_err(|error| error.to_string())?;
        drop(workspace);
        let mut outputs = scores.chunks_exact(head.outputs).map(|outputs| match outputs {
            [wrong, right] => f64::from(right - wrong),
            outputs => f64::from(outputs[0]),
        });
        let value = |(_, at): &(Vec<u32>, Vec<usize>)| {
            let scores: Vec<f64> = outputs.by_ref().take(at.len()).collect();
            if of_steps {
                let steps: Vec<f64> = scores.into_iter().map(logistic).collect();
                return self.options.step_aggregation.of(&steps).unwrap_or(0.0);
            }
            let score = scores.first().copied().unwrap_or(0.0);
            if self.options.as_probability { logistic(score) } else { score }
        };
        Ok(rendered.iter().map(value).collect())
    }
}

impl Reward for ModelReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        if answers.is_empty() {
            return Ok(Vec::new());
        }
        let mut by_model = Vec::with_capacity(self.judges.len());
        for judge in &self.judges {
            by_model.push(self.values(judge, answers).map_err(|reason| RewardError::Model {
                reward: self.name.clone(),
                reason: format!("{}: {reason}", judge.name),
            })?);
        }
        let score = |index: usize| {
            let values: Vec<f64> = by_model.iter().map(|values| values[index]).collect();
            let joint = self.options.ensemble.of(&values, self.options.uncertainty_penalty).unwrap_or(0.0);
            let mut score = Score::new(joint, Status::Ok);
            if values.len() > 1 {
                score.parts =
                    (1..).zip(values).map(|(number, value): (u32, f64)| (number.to_string(), value)).collect();
            }
            Some(score)
        };
        Ok((0..answers.len()).map(score).collect())
    }
}

/// The answer as a row that is trained on: its row's prompt, and the completion, in steps if a separator is given.
fn sample(answer: &Answer<'_>, number: u64, separator: Option<&str>) -> data::Result<Sample> {
    let row = Row { source: Source::new("answers", number), columns: answer.columns.clone() };
    let mut sample = data::sample::parse_row(row)?;
    let prompt = sample.content.prompt().cloned().unwrap_or_else(|| Text::Plain(answer.prompt_text.to_owned()));
    sample.content = match separator {
        Some(separator) => {
            let steps = answer.completion.split(separator).filter(|step| !step.trim().is_empty());
            let mut steps: Vec<(String, f64)> = steps.map(|step| (step.to_owned(), 0.0)).collect();
            if steps.is_empty() {
                steps.push((String::new(), 0.0));
            }
            Content::Stepwise { prompt, steps }
        }
        None => {
            let completion = match &prompt {
                Text::Plain(_) => Text::Plain(answer.completion.to_owned()),
                Text::Messages(_) => Text::Messages(vec![Message::assistant(answer.completion)]),
            };
            Content::PromptCompletion { prompt, completion }
        }
    };
    Ok(sample)
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
