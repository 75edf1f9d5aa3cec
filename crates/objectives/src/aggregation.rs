//! How much each token counts: the weights that turn token losses into one loss.
//!
//! With `S` sequences in the whole batch, `n_i` loss tokens in sequence i, `T = Σ n_i`, and `L` the longest completion
//! allowed, a token of sequence i weighs
//!
//! | name | weight | TRL's `loss_type` | source |
//! | --- | --- | --- | --- |
//! | `token` | `1 / T` | `dapo` | DAPO, arXiv 2503.14476; also the usual mean of supervised fine-tuning |
//! | `sequence` | `1 / (S n_i)` | `grpo` | GRPO, arXiv 2402.03300 |
//! | `sequence_sum` | `1 / S` | `luspo` | LUSPO, arXiv 2602.05261; also REINFORCE on whole completions |
//! | `constant` | `1 / (S L)` | `dr_grpo` | Dr. GRPO, arXiv 2503.20783 |
//! | `sum` | `1` | none | the plain sum, verl's `token-sum` |
//!
//! TRL's `bnpo` is `token` with the micro-batch's `T`: with a global `T` the two are one.
//!
//! `S`, `T` and `L` belong to the batch of the optimiser step, not to the micro-batch at hand; that is why splitting
//! the batch changes nothing. A sequence without loss tokens (a truncated completion that is masked, say) still counts
//! in `S`, as in TRL.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which denominator a token loss gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// Every token of the batch counts the same (TRL: `loss_type = "dapo"`).
    #[default]
    Token,
    /// Every sequence of the batch counts the same (TRL: `loss_type = "grpo"`).
    Sequence,
    /// Every token counts one over sequences (TRL: `loss_type = "luspo"`).
    SequenceSum,
    /// Every token counts one over sequences times the longest completion allowed (TRL: `loss_type = "dr_grpo"`).
    Constant,
    /// Every token counts 1.
    Sum,
}

/// Counts over the whole batch of one optimiser step, on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GlobalCounts {
    /// Sequences, those without loss tokens included.
    pub sequences: usize,
    /// Loss tokens.
    pub tokens: usize,
    /// The longest completion allowed, in tokens.
    pub max_completion_tokens: usize,
}

impl GlobalCounts {
    /// The counts of a batch whose sequences have these numbers of loss tokens.
    pub fn of(lengths: &[usize], max_completion_tokens: usize) -> Self {
        Self { sequences: lengths.len(), tokens: lengths.iter().sum(), max_completion_tokens }
    }
}

impl Aggregation {
    /// The weight of every loss token of a micro-batch whose sequences have `lengths` loss tokens, flat, in order.
    pub fn weights(self, lengths: &[usize], counts: &GlobalCounts) -> Vec<f64> {
        let sequences = counts.sequences as f64;
        let weight = |length: usize| match self {
            Self::Token => 1.0 / counts.tokens as f64,
            Self::Sequence => 1.0 / (sequences * length as f64),
            Self::SequenceSum => 1.0 / sequences,
            Self::Sum => 1.0,
            Self::Constant => 1.0 / (sequences * counts.max_completion_tokens as f64),
        };
        // A sequence without tokens contributes no weight, so none of the divisions above meets its 0.
        lengths.iter().flat_map(|&length| std::iter::repeat_n(weight(length), length)).collect()
    }
}
