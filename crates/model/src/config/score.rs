//! The linear head that turns hidden states into numbers instead of tokens: rewards, values, labels of steps.

use super::{Family, ModelConfig};
use crate::error::{Error, Result};

/// A score head: `outputs` numbers for a row of the hidden states, `W h` or `W h + b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreHead {
    /// Numbers for each row; `num_labels` in `config.json`.
    pub outputs: usize,
    /// What the numbers are about.
    pub task: HeadTask,
}

/// What a score head is for, which decides how a folder that holds it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeadTask {
    /// A sequence, whose score is that of its last token: reward models. `LlamaForSequenceClassification` of transformers,
    /// without a bias. It takes the language model's head's place.
    Sequence,
    /// Tokens one by one: process reward models. `LlamaForTokenClassification`, with a bias. It takes the language model's
    /// head's place.
    Token,
    /// The value of having come to a token, beside the language model's head and without a bias: a policy that shares its
    /// body with its critic. `LlamaForCausalLM` with the tensor `score.weight` and `"value_head": true`, both of which
    /// transformers passes over.
    Value,
}

/// More outputs than any head has; a larger number is a damaged file.
const MAX_OUTPUTS: usize = 1 << 20;

impl ScoreHead {
    /// One number a sequence: a reward model.
    pub const REWARD: Self = Self { outputs: 1, task: HeadTask::Sequence };
    /// One number a token beside the language model's head: a critic that shares the policy's body.
    pub const VALUE: Self = Self { outputs: 1, task: HeadTask::Value };

    /// Whether a bias is added.
    pub fn has_bias(self) -> bool {
        self.task == HeadTask::Token
    }

    /// The head's tensors, named with `prefix` in front, for hidden states of this width.
    pub(crate) fn tensor_shapes(self, prefix: &str, hidden: usize) -> Vec<(String, Vec<usize>)> {
        let mut shapes = vec![(format!("{prefix}score.weight"), vec![self.outputs, hidden])];
        if self.has_bias() {
            shapes.push((format!("{prefix}score.bias"), vec![self.outputs]));
        }
        shapes
    }

    /// Checks the number of outputs.
    pub(super) fn validate(self) -> Result<()> {
        if (1..=MAX_OUTPUTS).contains(&self.outputs) {
            return Ok(());
        }
        Err(Error::malformed("num_labels", format!("expected 1 to {MAX_OUTPUTS}, found {}", self.outputs)))
    }
}

impl HeadTask {
    /// All tasks that a class name of transformers stands for.
    pub(super) const CLASSES: [Self; 2] = [Self::Sequence, Self::Token];

    /// The class of transformers: the family's name for language models with another ending.
    pub(super) fn architecture(self, family: Family) -> String {
        let name = family.architecture();
        let Some(stem) = name.strip_suffix("ForCausalLM") else { return name.to_owned() };
        // Gemma's text-only classes are called so.
        let text = if family == Family::Gemma3 { "Text" } else { "" };
        match self {
            Self::Sequence => format!("{stem}{text}ForSequenceClassification"),
            Self::Token => format!("{stem}{text}ForTokenClassification"),
            Self::Value => name.to_owned(),
        }
    }
}

impl ModelConfig {
    /// Whether the model predicts tokens. One whose score head took the language model's head's place does not.
    pub fn has_language_head(&self) -> bool {
        self.score.is_none_or(|score| score.task == HeadTask::Value)
    }
}
