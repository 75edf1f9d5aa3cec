//! The gradients of one optimiser update, whatever the objective: pack, forward, objective, backward, piece by piece.
//!
//! ```text
//! for each piece of the batch that fits in memory:
//!     forward              hidden states, kept for backward; none where sampling kept them
//!     log-probs            of the loss tokens, unless they are known already
//!     objective            loss and statistics; candle's autodiff gives d loss / d log-prob
//!     backward             from there to the gradients of the weights
//! ```
//!
//! An objective that compares across the whole batch ([`Scope::Batch`]) sees all loss tokens at once: where the batch has
//! more than one piece, a forward without gradients collects their log-probabilities first. These are the same to the last
//! bit however the batch is cut, and so is the objective's gradient; the cut changes no byte of the result.

use std::ops::Range;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use model::decoder::{Decoder, LogProbs, ScoreGradients, Workspace};
use objectives::{Fold, Loss, Statistic};

use crate::error::Result;
use crate::method::{Step, check_losses};
use crate::metrics::Metrics;
use crate::order::split;
use crate::pass::{Pass, Unit};
use crate::timing::Phase;

/// Units of sequences, and where the loss tokens of each begin.
#[derive(Debug)]
pub struct Batch<'a> {
    units: Vec<Unit<'a>>,
    /// Rows each unit takes.
    sizes: Vec<usize>,
    /// Loss tokens of each sequence.
    lengths: Vec<usize>,
    /// The first sequence of each unit, and the number of all.
    sequences: Vec<usize>,
    /// The first loss token of each unit, and the number of all.
    tokens: Vec<usize>,
}

impl<'a> Batch<'a> {
    /// The batch of these units, in this order.
    pub fn new(units: Vec<Unit<'a>>) -> Self {
        let (mut lengths, mut sequences, mut tokens) = (Vec::new(), vec![0], vec![0]);
        for unit in &units {
            let first = lengths.len();
            lengths.extend(unit.lengths());
            sequences.push(lengths.len());
            tokens.push(tokens[tokens.len() - 1] + lengths[first..].iter().sum::<usize>());
        }
        Self { sizes: units.iter().map(Unit::rows).collect(), units, lengths, sequences, tokens }
    }

    /// The number of units: what a batch may be cut between.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// A range of units.
    pub fn units_of(&self, units: &Range<usize>) -> &[Unit<'a>] {
        &self.units[units.clone()]
    }

    /// The sequences of a range of units.
    pub fn sequences_of(&self, units: &Range<usize>) -> Range<usize> {
        self.sequences[units.start]..self.sequences[units.end]
    }

    /// The loss tokens of a range of units.
    pub fn tokens_of(&self, units: &Range<usize>) -> Range<usize> {
        self.tokens[units.start]..self.tokens[units.end]
    }

    /// Loss tokens of each sequence, in order.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Loss tokens.
    pub fn loss_tokens(&self) -> usize {
        self.tokens[self.units.len()]
    }

    /// Tokens of all prompts and sequences, as they count for the progress of a run.
    pub fn all_tokens(&self) -> u64 {
        let of = |unit: &Unit<'_>| unit.prompt.len() + unit.sequences.iter().map(|s| s.ids.len()).sum::<usize>();
        self.units.iter().map(|unit| of(unit) as u64).sum()
    }

    /// Cuts a range of units into pieces of at most `budget` rows, where a unit alone does not take more.
    pub fn pieces(&self, units: Range<usize>, budget: usize) -> Vec<Range<usize>> {
        let first = units.start;
        let pieces = split(&self.sizes[units], budget);
        pieces.into_iter().map(|piece| first + piece.start..first + piece.end).collect()
    }

    /// A range of units, packed.
    pub fn pack(&self, units: Range<usize>) -> model::Result<Pass> {
        Pass::pack(&self.units[units])
    }

    /// What a model, prepared for use, gives the loss tokens of a range of units, sequence by sequence.
    ///
    /// # Errors
    /// Those of the forward pass: a value that is not finite, a token or a position the model does not have.
    pub fn log_probs(
        &self,
        decoder: &Decoder,
        workspace: &mut Workspace,
        units: Range<usize>,
        reading: Reading,
    ) -> model::Result<LogProbs> {
        let mut all = LogProbs::default();
        for piece in self.pieces(units, reading.micro_batch_tokens) {
            let pass = self.pack(piece)?;
            decoder.forward(&pass.tokens, workspace, false)?;
            let found = decoder.log_probs(workspace, &pass.targets, reading.temperature, reading.entropy)?;
            extend(&mut all, &pass, &found);
        }
        Ok(all)
    }

    /// What a model with a score head, prepared for use, gives the row before each loss token of a range of units, sequence by
    /// sequence: continuations of a prompt share the value of its end.
    ///
    /// # Errors
    /// As [`Batch::log_probs`]; a model without such a head.
    pub fn values(
        &self,
        decoder: &Decoder,
        workspace: &mut Workspace,
        units: Range<usize>,
        micro_batch_tokens: usize,
    ) -> model::Result<Vec<f32>> {
        let mut all = Vec::new();
        for piece in self.pieces(units, micro_batch_tokens) {
            let pass = self.pack(piece)?;
            decoder.forward(&pass.tokens, workspace, false)?;
            all.extend(pass.values(decoder, workspace)?);
        }
        Ok(all)
    }

    /// Log-probabilities of all loss tokens under the reference model: the one the stage started from, or with an adapter
    /// the model with the adapter switched off. The time goes to [`Phase::Reference`].
    ///
    /// # Errors
    /// As [`Batch::log_probs`].
    pub fn reference_log_probs(&self, step: &mut Step<'_>, reading: Reading) -> Result<Vec<f32>> {
        let started = Instant::now();
        step.decoder.set_adapter(false);
        let reference = step.reference.unwrap_or(step.decoder);
        let found = self.log_probs(reference, step.workspace, 0..self.units(), reading);
        step.decoder.set_adapter(true);
        step.spent(Phase::Reference, started);
        Ok(found.map_err(step.model_error())?.log_prob)
    }
}

/// Appends what was found for the targets of a pass, sequence by sequence.
fn extend(all: &mut LogProbs, pass: &Pass, found: &LogProbs) {
    all.log_prob.extend(pass.by_sequence(&found.log_prob));
    if !found.entropy.is_empty() {
        all.entropy.extend(pass.by_sequence(&found.entropy));
    }
    all.most_probable.extend(pass.by_sequence(&found.most_probable));
}

/// Log-probabilities of which nothing else is known.
fn only(log_prob: Vec<f32>) -> LogProbs {
    LogProbs { log_prob, ..LogProbs::default() }
}

/// How log-probabilities are read off the model.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// What logits are divided by.
    pub temperature: f32,
    /// Rows computed at once.
    pub micro_batch_tokens: usize,
    /// Whether the objective needs the entropy of each distribution.
    pub entropy: bool,
    /// Whether the objective needs the value before each token, of a policy that shares its body with a value model.
    pub values: bool,
    /// Whether the hidden states are asked for ([`Gathered::hidden`]).
    pub hidden: bool,
    /// Units at the beginning of the update whose forward is on the step's tape, where sampling left it. They are one piece.
    pub recorded: usize,
}

impl Reading {
    /// At temperature 1, log-probabilities alone.
    pub fn plain(micro_batch_tokens: usize) -> Self {
        Self { temperature: 1.0, micro_batch_tokens, entropy: false, values: false, hidden: false, recorded: 0 }
    }
}

/// What an objective is shown at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The loss tokens of one piece: the loss of a token depends on no token of another unit.
    Piece,
    /// All loss tokens of the update.
    Batch,
}

/// What is known about the log-probabilities before the pass.
#[derive(Clone, Copy, Debug)]
pub enum Known<'a> {
    /// Nothing.
    Nothing,
    /// All of them, one for each loss token of the whole batch: the weights have not moved since they were computed, which
    /// saves one of the head's products.
    LogProbs(&'a [f32]),
    /// That the loss is linear in them, so that its gradient needs none. The objective is called once with zeros, for the
    /// gradient, and once with the values.
    Linear,
}

/// The loss tokens of some units, as an objective sees them; everything is in the order of the sequences.
#[derive(Debug)]
pub struct Piece<'a> {
    /// log π(y_t) of every loss token, `[N]`, tracking gradients.
    pub log_probs: Tensor,
    /// The entropy at every loss token, `[N]`, tracking gradients, where [`Reading::entropy`] asked for it.
    pub entropy: Option<Tensor>,
    /// The value before every loss token, `[N]`, tracking gradients, where [`Reading::values`] asked for it.
    pub values: Option<Tensor>,
    /// What else the pass found out; empty until the values are known, and for [`Known::LogProbs`].
    pub found: &'a LogProbs,
    /// The place of the units in the batch.
    pub units: Range<usize>,
    /// The place of their sequences among those of the batch.
    pub sequences: Range<usize>,
    /// The place of their loss tokens among those of the batch.
    pub tokens: Range<usize>,
    /// Loss tokens of each sequence.
    pub lengths: &'a [usize],
}

impl Piece<'_> {
    /// For every loss token, which of the piece's sequences it belongs to.
    pub fn sequence(&self) -> Vec<u32> {
        let numbered = self.lengths.iter().zip(0..);
        numbered.flat_map(|(&length, sequence)| std::iter::repeat_n(sequence, length)).collect()
    }

    /// The values of these loss tokens, from those of the whole batch.
    pub fn of_tokens<T: candle_core::WithDType>(&self, all: &[T]) -> candle_core::Result<Tensor> {
        Tensor::new(&all[self.tokens.clone()], &Device::Cpu)
    }

    /// Values of its own, one for each of its loss tokens or sequences.
    pub fn constant<T: candle_core::WithDType>(&self, values: &[T]) -> candle_core::Result<Tensor> {
        Tensor::new(values, &Device::Cpu)
    }

    /// The values of these sequences, from those of the whole batch.
    pub fn of_sequences<T: candle_core::WithDType>(&self, all: &[T]) -> candle_core::Result<Tensor> {
        Tensor::new(&all[self.sequences.clone()], &Device::Cpu)
    }
}

/// What gathering the gradients of one update brought to light.
#[derive(Debug, Default)]
pub struct Gathered {
    /// The loss.
    pub loss: f64,
    /// Log-probabilities and entropies of all loss tokens before the weights move, sequence by sequence.
    pub found: LogProbs,
    /// For each sequence the sum of the hidden states, after the final norm, that predict its loss tokens, where
    /// [`Reading::hidden`] asked for it.
    pub hidden: Vec<Vec<f64>>,
}

impl Gathered {
    /// The mean over the vocabulary and over the loss tokens of the sequences `chosen` of their logits; NaN where there are none.
    ///
    /// Logits are linear in hidden states, so that it takes one row of the head's product, whatever the number of tokens. The
    /// weights must not have moved, and [`Reading::hidden`] must have been asked for.
    ///
    /// # Errors
    /// Weights that are not prepared.
    pub fn mean_logit(
        &self,
        decoder: &Decoder,
        lengths: &[usize],
        chosen: impl Fn(usize) -> bool,
    ) -> model::Result<f64> {
        let mut mean = vec![0.0; decoder.config().hidden_size];
        let mut tokens = 0;
        let own = self.hidden.iter().zip(lengths).enumerate().filter(|(sequence, _)| chosen(*sequence));
        for (_, (sums, length)) in own {
            mean.iter_mut().zip(sums).for_each(|(mean, sum)| *mean += sum);
            tokens += length;
        }
        if tokens == 0 {
            return Ok(f64::NAN);
        }
        let mean: Vec<f32> = mean.into_iter().map(|sum| (sum / tokens as f64) as f32).collect();
        let mut logits = vec![0.0; decoder.config().vocab_size];
        decoder.logits(&mean, &mut logits)?;
        Ok(logits.iter().map(|&logit| f64::from(logit)).sum::<f64>() / logits.len() as f64)
    }
}

/// Adds the gradients of one update, over the units `part` of a batch, to those of the step.
///
/// The objective returns weighted losses with their global denominators inside: the loss is their plain sum. The decoder
/// must be prepared. The time goes to [`Phase::Train`].
///
/// # Errors
/// A value that is not finite, named by layer and row, or by sequence and token; an objective that refuses its input; values of a
/// model without a score head.
pub fn gradients(
    step: &mut Step<'_>,
    batch: &Batch<'_>,
    part: Range<usize>,
    reading: Reading,
    (scope, known): (Scope, Known<'_>),
    statistics: &mut Folds,
    mut objective: impl FnMut(&Piece<'_>) -> objectives::Result<Loss>,
) -> Result<Gathered> {
    let started = Instant::now();
    // Entropies come from the model alone.
    let known = if reading.entropy { Known::Nothing } else { known };
    let recorded = part.start..part.start + reading.recorded.min(part.len());
    let mut pieces = batch.pieces(recorded.end..part.end, reading.micro_batch_tokens);
    if !recorded.is_empty() {
        pieces.insert(0, recorded);
    }
    let mut losses = Vec::new();
    let mut all = LogProbs::default();
    let mut hidden = Vec::new();
    let whole = match scope {
        Scope::Batch if pieces.len() > 1 => {
            let found = match known {
                Known::LogProbs(values) => only(values[batch.tokens_of(&part)].to_vec()),
                Known::Nothing | Known::Linear => {
                    batch.log_probs(step.decoder, step.workspace, part.clone(), reading).map_err(step.model_error())?
                }
            };
            let values = match reading.values {
                true => Some(
                    batch
                        .values(step.decoder, step.workspace, part.clone(), reading.micro_batch_tokens)
                        .map_err(step.model_error())?,
                ),
                false => None,
            };
            let evaluated = Evaluated::of(batch, part.clone(), reading, &found, values.as_deref(), &mut objective)
                .map_err(step.objective_error())?;
            losses.extend_from_slice(&evaluated.losses);
            statistics.extend(&evaluated.statistics);
            Some(evaluated)
        }
        _ => None,
    };
    for piece in pieces {
        let pass = batch.pack(piece.clone()).map_err(step.model_error())?;
        let learns = !pass.targets.is_empty();
        if learns {
            match step.tape.recall(step.decoder, &pass.tokens, step.workspace) {
                true => step.clock.reuse(pass.tokens.rows()),
                false => step.decoder.forward(&pass.tokens, step.workspace, true).map_err(step.model_error())?,
            }
        }
        if reading.hidden {
            hidden.extend(pass.hidden_sums(step.workspace, step.decoder.config().hidden_size));
        }
        if !learns {
            continue;
        }
        let tokens = batch.tokens_of(&piece);
        let values = match reading.values {
            true => Some(pass.values(step.decoder, step.workspace).map_err(step.model_error())?),
            false => None,
        };
        let (d_log_prob, d_entropy, d_values) = match &whole {
            Some(whole) => {
                let first = batch.tokens_of(&part).start;
                let own = |all: &[f64]| all[tokens.start - first..tokens.end - first].to_vec();
                (own(&whole.d_log_prob), whole.d_entropy.as_deref().map(own), whole.d_values.as_deref().map(own))
            }
            None => {
                let before = match known {
                    Known::LogProbs(known) => only(known[tokens].to_vec()),
                    Known::Linear => only(vec![0.0; tokens.len()]),
                    Known::Nothing => {
                        let found = step
                            .decoder
                            .log_probs(step.workspace, &pass.targets, reading.temperature, reading.entropy)
                            .map_err(step.model_error())?;
                        let mut before = LogProbs::default();
                        extend(&mut before, &pass, &found);
                        before
                    }
                };
                let evaluated =
                    Evaluated::of(batch, piece.clone(), reading, &before, values.as_deref(), &mut objective)
                        .map_err(step.objective_error())?;
                if !matches!(known, Known::Linear) {
                    losses.extend_from_slice(&evaluated.losses);
                    statistics.extend(&evaluated.statistics);
                }
                (evaluated.d_log_prob, evaluated.d_entropy, evaluated.d_values)
            }
        };
        let d_entropy = d_entropy.map(|values| pass.by_target(&values));
        let (rows, d_scores) = match d_values {
            Some(d_values) => pass.by_row(&d_values),
            None => (Vec::new(), Vec::new()),
        };
        let found = step
            .decoder
            .backward_with_scores(
                &pass.tokens,
                step.workspace,
                &pass.targets,
                reading.temperature,
                &pass.by_target(&d_log_prob),
                d_entropy.as_deref(),
                ScoreGradients { rows: &rows, blocks: None, d_scores: &d_scores },
                step.gradients,
            )
            .map_err(step.model_error())?;
        let mut after = LogProbs::default();
        extend(&mut after, &pass, &found);
        if whole.is_none() && matches!(known, Known::Linear) {
            let evaluated = Evaluated::of(batch, piece.clone(), reading, &after, values.as_deref(), &mut objective)
                .map_err(step.objective_error())?;
            losses.extend_from_slice(&evaluated.losses);
            statistics.extend(&evaluated.statistics);
        }
        all.log_prob.extend(after.log_prob);
        all.entropy.extend(after.entropy);
        all.most_probable.extend(after.most_probable);
        step.progress(Phase::Train, piece.end - part.start, part.len());
    }
    check_losses(step.number, &losses, &batch.lengths[batch.sequences_of(&part)])?;
    step.spent(Phase::Train, started);
    Ok(Gathered { loss: losses.iter().sum(), found: all, hidden })
}

/// An objective's value on some units, and its derivatives.
struct Evaluated {
    losses: Vec<f64>,
    statistics: Vec<Statistic>,
    d_log_prob: Vec<f64>,
    d_entropy: Option<Vec<f64>>,
    d_values: Option<Vec<f64>>,
}

impl Evaluated {
    fn of(
        batch: &Batch<'_>,
        units: Range<usize>,
        reading: Reading,
        found: &LogProbs,
        values: Option<&[f32]>,
        objective: &mut impl FnMut(&Piece<'_>) -> objectives::Result<Loss>,
    ) -> objectives::Result<Self> {
        let (sequences, tokens) = (batch.sequences_of(&units), batch.tokens_of(&units));
        let variable =
            |values: &[f32]| Ok::<_, objectives::Error>(Var::from_slice(values, values.len(), &Device::Cpu)?);
        let log_probs = variable(&found.log_prob)?;
        let entropy = match reading.entropy {
            true => Some(variable(&found.entropy)?),
            false => None,
        };
        let values = values.map(variable).transpose()?;
        let tensor = |variable: &Option<Var>| variable.as_ref().map(|variable| variable.as_tensor().clone());
        let piece = Piece {
            log_probs: log_probs.as_tensor().clone(),
            entropy: tensor(&entropy),
            values: tensor(&values),
            found,
            units,
            lengths: &batch.lengths[sequences.clone()],
            sequences,
            tokens,
        };
        let loss = objective(&piece)?;
        let inputs: Vec<&Tensor> =
            std::iter::once(&piece.log_probs).chain(&piece.entropy).chain(&piece.values).collect();
        let mut derivatives = loss.gradients(&inputs)?.into_iter();
        Ok(Self {
            losses: loss.values()?,
            statistics: loss.statistics,
            d_log_prob: derivatives.next().unwrap_or_default(),
            d_entropy: piece.entropy.as_ref().and_then(|_| derivatives.next()),
            d_values: piece.values.as_ref().and_then(|_| derivatives.next()),
        })
    }
}

/// The statistics of an objective, folded over the pieces of a step.
#[derive(Debug, Default)]
pub struct Folds(Vec<(&'static str, Fold)>);

impl Folds {
    /// Takes the values of the next piece.
    pub fn extend(&mut self, statistics: &[Statistic]) {
        for statistic in statistics {
            let place = self.0.iter().position(|(name, _)| *name == statistic.name).unwrap_or_else(|| {
                self.0.push((statistic.name, Fold::new(statistic.reduce)));
                self.0.len() - 1
            });
            self.0[place].1.extend(&statistic.values);
        }
    }

    /// Writes down what was folded; a mean over nothing is left out.
    pub fn record(&self, metrics: &mut Metrics) {
        for (name, fold) in &self.0 {
            if let Some(value) = fold.value() {
                metrics.set(*name, value);
            }
        }
    }
}
