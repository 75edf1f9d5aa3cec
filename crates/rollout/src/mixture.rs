//! Sampling from a mixture of models: the one that generates, and others that read along.
//!
//! ```text
//! geometric     p ∝ Π_k p_k^{w_k}         the weighted mean of logits (Nash-MD, Munos et al., arXiv 2312.00886; MPO, Wang et al., arXiv 2502.18699)
//! arithmetic    p = Σ_k w_k p_k           the weighted mean of probabilities (MiniLLM, Gu et al., arXiv 2306.08543)
//! ```
//!
//! at the temperature of the sampling, before top-k, top-p and min-p; the shares `w` add up to one. Every other model keeps the keys and
//! values of every completion that is being served, and reads all their new tokens in one pass, so that a round costs one pass of each
//! model. Its bits depend on a completion alone, as those of any decoder do.
//!
//! Token by token, the geometric mixture is not the law `Π_k π_k(y)^{w_k} / Z` of whole completions: each token is normalised on its own,
//! and what the normalisers of later tokens are worth is lost. [`Mixture::resample`] draws from that law by sampling importance
//! resampling (Rubin, 1988): of candidates `y` of the mixture `q`, one with a chance in proportion to `Π_k π_k(y)^{w_k} / q(y)`. With ever
//! more candidates that is exact.

use std::sync::{Mutex, MutexGuard, PoisonError};

use base::Random;
use model::decoder::{DecodeRow, Decoder, SequenceCache, Workspace};

use crate::generator::{LogitsContext, LogitsHook};
use crate::served::Served;
use crate::{Episode, Result, SamplingOptions, scoring};

/// What is averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mean {
    /// Logits.
    Geometric,
    /// Probabilities.
    Arithmetic,
}

/// Mixes other models into what tokens are drawn from. Of use for one call of the generator: it names completions by their
/// requests.
pub struct Mixture<'a> {
    mean: Mean,
    /// The share of the model that generates.
    own: f64,
    others: Vec<Other<'a>>,
    temperature: f64,
}

/// A model that reads along.
struct Other<'a> {
    decoder: &'a Decoder,
    share: f64,
    reader: Mutex<Reader>,
}

/// One of several candidates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Resampled {
    /// Its number.
    pub chosen: usize,
    /// The effective number of candidates `1 / Σ w²` (Kong, 1992), their weights `w` adding up to one: near 1, one candidate outweighs
    /// all others, and more of them are needed.
    pub effective: f64,
}

/// What the other model knows.
#[derive(Default)]
struct Reader {
    workspace: Workspace,
    known: Served<Known>,
}

/// What it knows of one completion.
struct Known {
    cache: SequenceCache,
    /// Tokens of the completion that it has read.
    read: usize,
    /// Of the next token.
    logits: Vec<f32>,
}

impl<'a> Mixture<'a> {
    /// A mixture in which `others`, which must be prepared and of the same vocabulary, have these shares, and the model that generates
    /// has the rest.
    pub fn new(others: &[(&'a Decoder, f64)], mean: Mean, options: &SamplingOptions) -> Self {
        let others: Vec<Other<'a>> =
            others.iter().map(|&(decoder, share)| Other { decoder, share, reader: Mutex::default() }).collect();
        let own = 1.0 - others.iter().map(|other| other.share).sum::<f64>();
        Self { mean, own, others, temperature: f64::from(options.log_prob_temperature()) }
    }

    /// Of `size` consecutive candidates each, drawn from this geometric mixture, the one that stands for the law of whole completions. The
    /// draw is that of `random` for the prompt and the number of the group among those of its prompt.
    ///
    /// # Errors
    /// A model that refuses the candidates.
    pub fn resample(&self, candidates: &[Episode], size: usize, random: Random) -> Result<Vec<Resampled>> {
        let drawn =
            |episode: &Episode, log_probs: &[f32]| -> f64 { episode.of_sampled(log_probs).map(f64::from).sum() };
        let mut log_weights: Vec<f64> = (candidates.iter())
            .map(|one| self.own * drawn(one, &one.log_probs) - drawn(one, &one.filtered_log_probs))
            .collect();
        for other in &self.others {
            let log_probs = scoring::log_probs(other.decoder, candidates, self.temperature as f32)?;
            for (weight, log_prob) in log_weights.iter_mut().zip(log_probs) {
                *weight += other.share * log_prob;
            }
        }
        let chosen = candidates.chunks(size).zip(log_weights.chunks(size)).map(|(candidates, log_weights)| {
            let Episode { prompt_id, sample, .. } = candidates[0];
            resample(log_weights, random.prompt(prompt_id).sample(sample / size as u32).at(0).uniform())
        });
        Ok(chosen.collect())
    }
}

/// One of several candidates, with a chance in proportion to `e^w`; `uniform`, from 0 up to 1, decides.
pub fn resample(log_weights: &[f64], uniform: f64) -> Resampled {
    let largest = log_weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = log_weights.iter().map(|w| if *w == largest { 1.0 } else { (w - largest).exp() }).collect();
    let total: f64 = weights.iter().sum();
    let mut running = 0.0;
    let crosses = weights.iter().position(|weight| {
        running += weight;
        running > uniform * total
    });
    let effective = total * total / weights.iter().map(|weight| weight * weight).sum::<f64>();
    // `uniform * total` can round up to the total itself.
    Resampled { chosen: crosses.unwrap_or(weights.len().saturating_sub(1)), effective }
}

impl Reader {
    /// Reads what is new in the completions of `rows`, and makes up the logits of their next tokens.
    fn read(&mut self, other: &Decoder, rows: &[(LogitsContext<'_>, &[f32])]) -> Result<()> {
        let rows: Vec<&LogitsContext<'_>> = rows.iter().map(|(context, _)| context).collect();
        self.known.next_round();
        let new: Vec<&LogitsContext<'_>> = rows.iter().copied().filter(|row| self.known.get(row).is_none()).collect();
        let prompts: Vec<&[u32]> = new.iter().map(|row| &row.request.prompt[..]).collect();
        let mut hidden: Vec<(&LogitsContext<'_>, Vec<f32>)> = Vec::with_capacity(rows.len());
        for (row, prefill) in new.iter().zip(other.prefill(&prompts, &mut self.workspace)?) {
            let cache = SequenceCache::new(other, prefill.cache, row.completion.len());
            self.known.keep(row, Known { cache, read: 0, logits: Vec::new() });
            if row.completion.is_empty() {
                hidden.push((row, prefill.hidden));
            }
        }
        // Out of the map while the model works on them.
        let mut reading: Vec<(&LogitsContext<'_>, Known)> = Vec::with_capacity(rows.len());
        for &row in &rows {
            if let Some(known) = self.known.take(row) {
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
                ends.push((*row, total - 1));
                extended.push(DecodeRow { tokens, cache: &mut known.cache });
            }
        }
        if !extended.is_empty() {
            other.decode(&mut extended, &mut self.workspace)?;
        }
        let width = other.config().hidden_size;
        let last = |(row, end): (_, usize)| (row, self.workspace.hidden()[end * width..][..width].to_vec());
        hidden.extend(ends.into_iter().map(last));
        for (row, known) in reading {
            self.known.keep(row, Known { read: row.completion.len(), ..known });
        }
        for (row, hidden) in hidden {
            if let Some(known) = self.known.get_mut(row) {
                known.logits.resize(other.config().vocab_size, 0.0);
                other.logits(&hidden, &mut known.logits)?;
            }
        }
        Ok(())
    }
}

impl Other<'_> {
    fn reader(&self) -> MutexGuard<'_, Reader> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the model says of the next token.
    fn logits(&self, context: &LogitsContext<'_>) -> Vec<f32> {
        self.reader().known.get(context).map(|known| known.logits.clone()).unwrap_or_default()
    }
}

impl LogitsHook for Mixture<'_> {
    fn prepare(&self, rows: &[(LogitsContext<'_>, &[f32])]) -> Result<()> {
        self.others.iter().try_for_each(|other| other.reader().read(other.decoder, rows))
    }

    fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>) {
        let mut mixed: Vec<f64> = match self.mean {
            Mean::Geometric => logits.iter().map(|&logit| self.own * f64::from(logit)).collect(),
            Mean::Arithmetic => {
                log_softmax(logits, self.temperature).into_iter().map(|own| self.own * own.exp()).collect()
            }
        };
        for other in &self.others {
            let theirs = other.logits(context);
            match self.mean {
                Mean::Geometric => {
                    for (mixed, logit) in mixed.iter_mut().zip(theirs) {
                        *mixed += other.share * f64::from(logit);
                    }
                }
                Mean::Arithmetic => {
                    for (mixed, log_prob) in mixed.iter_mut().zip(log_softmax(&theirs, self.temperature)) {
                        *mixed += other.share * log_prob.exp();
                    }
                }
            }
        }
        for (logit, mixed) in logits.iter_mut().zip(mixed) {
            *logit = match self.mean {
                Mean::Geometric => mixed as f32,
                Mean::Arithmetic => (self.temperature * mixed.ln()) as f32,
            };
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
