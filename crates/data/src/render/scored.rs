//! Rows for models that score: completions with scores, solutions with a label for each step.

use serde_json::Value;

use super::{Example, Outcome, Rendered, Renderer, unexpected};
use crate::error::{Error, Result};
use crate::row::{Source, kind};
use crate::sample::{Content, Sample, Text};

/// A completion and how good it is.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredExample {
    /// Prompt and completion.
    pub example: Example,
    /// How good the completion is.
    pub score: f64,
}

/// A solution in steps.
#[derive(Clone, Debug, PartialEq)]
pub struct StepwiseExample {
    /// The tokens of the problem and all steps.
    pub ids: Vec<u32>,
    /// For each step the index of its last token and how right the step is, from 0 to 1.
    pub steps: Vec<(usize, f64)>,
    /// Where the example comes from.
    pub source: Source,
}

impl Renderer<'_> {
    /// Renders rows with a prompt and a completion, and its `score`, a number, or its `label`, true (1) or false (0).
    pub fn scored(&self, samples: &[Sample]) -> Result<Rendered<ScoredExample>> {
        self.each(samples, |_, sample| self.scored_of(sample))
    }

    pub(super) fn scored_of(&self, sample: &Sample) -> Result<Outcome<ScoredExample>> {
        let (example, score) = match &sample.content {
            Content::UnpairedPreference { prompt, completion, label } => {
                (self.completion(sample, prompt, completion)?, f64::from(u8::from(*label)))
            }
            Content::PromptCompletion { prompt, completion } => {
                let score = number(sample, "score")?;
                let missing = || Error::column(&sample.source, "score", "missing");
                (self.completion(sample, prompt, completion)?, score.ok_or_else(missing)?)
            }
            _ => return Err(unexpected(sample, "a completion with `label` or `score`")),
        };
        Ok(example.map(|example| ScoredExample { example, score }))
    }

    /// Renders stepwise rows. Each step is followed by `separator`, whose last token stands for the step. Prompts that are conversations
    /// go through the chat template.
    pub fn stepwise(&self, samples: &[Sample], separator: &str) -> Result<Rendered<StepwiseExample>> {
        self.each(samples, |_, sample| self.steps_of(sample, separator))
    }

    pub(super) fn steps_of(&self, sample: &Sample, separator: &str) -> Result<Outcome<StepwiseExample>> {
        let Content::Stepwise { prompt, steps } = &sample.content else {
            return Err(unexpected(sample, "stepwise supervision"));
        };
        let mut ids = match prompt {
            // Nothing needs to come before the first step.
            Text::Plain(text) if text.is_empty() => self.begin(),
            prompt => match self.prompt(0, sample, prompt.clone())? {
                Ok(prompt) => prompt.ids.to_vec(),
                Err(reason) => return Ok(Err(reason)),
            },
        };
        let mut labelled = Vec::new();
        for (index, (step, label)) in steps.iter().enumerate() {
            let rendering = self.text(&format!("{step}{separator}"));
            let before = ids.len();
            ids.extend(self.encode(sample, &rendering, 0..rendering.text().len())?);
            if ids.len() == before {
                return Err(Error::column(&sample.source, format!("completions[{index}]"), "no tokens"));
            }
            labelled.push((ids.len() - 1, *label));
        }
        self.refuse_doubled_begin(sample, &ids)?;
        Ok(match self.too_long(sample, ids.len())? {
            None => Ok(StepwiseExample { ids, steps: labelled, source: sample.source.clone() }),
            Some(reason) => Err(reason),
        })
    }
}

/// A column that holds a name, where there is one: text, or a number that stands for it.
pub(super) fn name(sample: &Sample, column: &str) -> Result<Option<String>> {
    match sample.columns.get(column).filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(Value::String(name)) => Ok(Some(name.clone())),
        Some(Value::Number(number)) => Ok(Some(number.to_string())),
        Some(other) => {
            let reason = format!("expected text or a number, got {}", kind(other));
            Err(Error::column(&sample.source, column, reason))
        }
    }
}

/// A column that holds a finite number, where there is one.
pub(super) fn number(sample: &Sample, column: &str) -> Result<Option<f64>> {
    let Some(value) = sample.columns.get(column).filter(|value| !value.is_null()) else { return Ok(None) };
    let found = match value {
        Value::Number(number) => number.as_f64().filter(|number| number.is_finite()),
        _ => None,
    };
    let expected = || Error::column(&sample.source, column, format!("expected a number, got {}", kind(value)));
    Ok(Some(found.ok_or_else(expected)?))
}
