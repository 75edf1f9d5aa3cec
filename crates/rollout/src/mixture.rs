//! Sampling from a mixture of two models: the one that generates, and another that reads along.
//!
//! ```text
//! geometric     p ∝ p_1^{1 - α} p_2^α           the weighted mean of logits (Nash-MD, Munos et al., arXiv 2312.00886)
//! arithmetic    p = (1 - α) p_1 + α p_2         the weighted mean of probabilities (MiniLLM, Gu et al., arXiv 2306.08543)
//! ```
//!
//! at the temperature of the sampling, before top-k, top-p and min-p. The other model keeps the keys and values of every
//! completion that is being served, and reads all their new tokens in one pass, so that a round costs one pass of each model.
//! Its bits depend on a completion alone, as those of any decoder do.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use model::decoder::{DecodeRow, Decoder, SequenceCache, Workspace};

use crate::generator::{LogitsContext, LogitsHook};
use crate::{Result, SamplingOptions};

/// What is averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mean {
    /// Logits.
    Geometric,
    /// Probabilities.
    Arithmetic,
}

/// Mixes another model into what tokens are drawn from. Of use for one call of the generator: it names completions by their
/// requests.
pub struct Mixture<'a> {
    other: &'a Decoder,
    mean: Mean,
    share: f64,
    temperature: f64,
    reader: Mutex<Reader>,
}

/// A request's name: its prompt and its sample.
type Name = (u32, u32);

/// Rounds after which a completion that asks for nothing is taken to be finished. One that comes back is read again.
const FORGET_AFTER: u64 = 64;

/// What the other model knows.
#[derive(Default)]
struct Reader {
    workspace: Workspace,
    known: HashMap<Name, Known>,
    round: u64,
}

/// What it knows of one completion.
struct Known {
    cache: SequenceCache,
    /// Tokens of the completion that it has read.
    read: usize,
    /// Of the next token.
    logits: Vec<f32>,
    /// The last round in which it was asked for.
    round: u64,
}

impl<'a> Mixture<'a> {
    /// A mixture in which `other`, which must be prepared and of the same vocabulary, has the share α.
    pub fn new(other: &'a Decoder, mean: Mean, share: f64, options: &SamplingOptions) -> Self {
        let temperature = f64::from(options.log_prob_temperature());
        Self { other, mean, share, temperature, reader: Mutex::default() }
    }
}

impl Reader {
    /// Reads what is new in the completions of `rows`, and makes up the logits of their next tokens.
    fn read(&mut self, other: &Decoder, rows: &[(LogitsContext<'_>, &[f32])]) -> Result<()> {
        let rows: Vec<&LogitsContext<'_>> = rows.iter().map(|(context, _)| context).collect();
        self.round += 1;
        let round = self.round;
        self.known.retain(|_, known| known.round + FORGET_AFTER > round);
        let new: Vec<&LogitsContext<'_>> =
            rows.iter().copied().filter(|row| !self.known.contains_key(&name(row))).collect();
        let prompts: Vec<&[u32]> = new.iter().map(|row| &row.request.prompt[..]).collect();
        let mut hidden: Vec<(Name, Vec<f32>)> = Vec::with_capacity(rows.len());
        for (row, prefill) in new.iter().zip(other.prefill(&prompts, &mut self.workspace)?) {
            let cache = SequenceCache::new(other, prefill.cache, row.completion.len());
            self.known.insert(name(row), Known { cache, read: 0, logits: Vec::new(), round });
            if row.completion.is_empty() {
                hidden.push((name(row), prefill.hidden));
            }
        }
        // Out of the map while the model works on them.
        let mut reading: Vec<(&LogitsContext<'_>, Known)> = Vec::with_capacity(rows.len());
        for &row in &rows {
            if let Some(known) = self.known.remove(&name(row)) {
                reading.push((row, known));
            }
        }
        let mut ends = Vec::with_capacity(rows.len());
        let mut total = 0;
        let mut extended = Vec::with_capacity(rows.len());
        for (row, known) in &mut reading {
            let tokens = &row.completion[known.read..];
            if !tokens.is_empty() {
                total += tokens.len();
                ends.push((name(row), total - 1));
                extended.push(DecodeRow { tokens, cache: &mut known.cache });
            }
        }
        if !extended.is_empty() {
            other.decode(&mut extended, &mut self.workspace)?;
        }
        let width = other.config().hidden_size;
        let last = |(name, row): (Name, usize)| (name, self.workspace.hidden()[row * width..][..width].to_vec());
        hidden.extend(ends.into_iter().map(last));
        for (row, known) in reading {
            self.known.insert(name(row), Known { read: row.completion.len(), round, ..known });
        }
        for (name, hidden) in hidden {
            if let Some(known) = self.known.get_mut(&name) {
                known.logits.resize(other.config().vocab_size, 0.0);
                other.logits(&hidden, &mut known.logits)?;
            }
        }
        Ok(())
    }
}

fn name(row: &LogitsContext<'_>) -> Name {
    (row.request.prompt_id, row.request.sample)
}

impl LogitsHook for Mixture<'_> {
    fn prepare(&self, rows: &[(LogitsContext<'_>, &[f32])]) -> Result<()> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner).read(self.other, rows)
    }

    fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>) {
        let other = {
            let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
            reader.known.get(&name(context)).map(|known| known.logits.clone()).unwrap_or_default()
        };
        let share = self.share;
        match self.mean {
            Mean::Geometric => {
                for (logit, other) in logits.iter_mut().zip(other) {
                    *logit = ((1.0 - share) * f64::from(*logit) + share * f64::from(other)) as f32;
                }
            }
            Mean::Arithmetic => {
                let (own, other) = (log_softmax(logits, self.temperature), log_softmax(&other, self.temperature));
                for ((logit, own), other) in logits.iter_mut().zip(own).zip(other) {
                    let mixed = (1.0 - share) * own.exp() + share * other.exp();
                    *logit = (self.temperature * mixed.ln()) as f32;
                }
            }
        }
    }
}

/// The log-probabilities at a temperature.
fn log_softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scaled: Vec<f64> = logits.iter().map(|&logit| f64::from(logit - largest) / temperature).collect();
    let log_total = scaled.iter().map(|x| x.exp()).sum::<f64>().ln();
    scaled.into_iter().map(|x| x - log_total).collect()
}
