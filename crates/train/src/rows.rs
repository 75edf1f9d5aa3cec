//! The gradients of one update for losses of whole next-token distributions: [`crate::update`]'s sibling.
//!
//! ```text
//! for each piece of the batch that fits in memory:
//!     forward of other models    hidden states at the loss tokens, nothing else is kept of them
//!     forward                    hidden states, kept for backward
//!     for each chunk of rows:    logits of all models -> the objective -> the loss's gradient in place of the model's logits
//!     backward                   from there to the gradients of the weights
//! ```
//!
//! Logits exist for one chunk at a time. The objective sees one loss token at a time, on any thread, and may depend on nothing
//! but its row and constants; so no cut changes a byte.

use std::ops::Range;
use std::time::Instant;

use base::Random;
use model::decoder::Decoder;
use rayon::prelude::*;

use crate::error::Result;
use crate::method::Step;
use crate::pass::{Pass, Unit};
use crate::timing::Phase;
use crate::update::Batch;

/// A loss token before an objective, with the distributions it was or might have been drawn from.
#[derive(Debug)]
pub struct Row<'a> {
    /// Its place among the loss tokens of the batch, sequence by sequence.
    pub index: usize,
    /// The token.
    pub token: u32,
    /// The logits of the model that is trained; the objective replaces them by the gradient of its loss.
    pub logits: &'a mut [f32],
    /// The logits of the other models, in their order.
    pub others: Vec<&'a [f32]>,
}

/// A model whose distributions the objective sees, beside the one that is trained.
#[derive(Clone, Copy)]
pub enum Other<'a> {
    /// The reference model: the one the stage started from, or with an adapter the model with the adapter switched off.
    Reference,
    /// Another one, prepared for use.
    Model(&'a Decoder),
}

/// Noise on the input embeddings, uniform within `alpha / sqrt(L d)` for a sequence of `L` tokens and a hidden size of `d`: NEFTune,
/// arXiv 2310.05914. A draw is named by unit, sequence, position and place, so that no cut of the batch changes it.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingNoise {
    /// How strong it is.
    pub alpha: f64,
    /// Names the draws of the step.
    pub random: Random,
}

/// How the rows of one update are computed.
#[derive(Clone, Copy, Default)]
pub struct RowPass<'a> {
    /// Rows of the models' forward passes computed at once.
    pub micro_batch_tokens: usize,
    /// The other models.
    pub others: &'a [Other<'a>],
    /// Noise on the embeddings of the model that is trained.
    pub noise: Option<EmbeddingNoise>,
}

/// Adds the gradients of one update, over the units `part` of a batch, to those of the step. Returns what the objective
/// returned for each loss token, sequence by sequence. The decoder must be prepared. The time goes to [`Phase::Train`], that of other
/// models to [`Phase::Reference`].
///
/// # Errors
/// A value that is not finite, named by layer and row; an objective that refuses its input.
pub fn gradients<R: Copy + Send>(
    step: &mut Step<'_>,
    batch: &Batch<'_>,
    part: Range<usize>,
    how: RowPass<'_>,
    objective: impl Fn(Row<'_>) -> objectives::Result<R> + Sync,
) -> Result<Vec<R>> {
    let mut all = Vec::with_capacity(batch.tokens_of(&part).len());
    for piece in batch.pieces(part.clone(), how.micro_batch_tokens) {
        let pass = batch.pack(piece.clone()).map_err(step.model_error())?;
        if pass.targets.is_empty() {
            continue;
        }
        let others = hidden_of_others(step, &pass, how.others)?;
        let started = Instant::now();
        let changed = how.noise.map(|noise| noise.of(batch.units_of(&piece), piece.start, &pass));
        let change = changed.as_ref().map(|noise| noise as &(dyn Fn(usize, &mut [f32]) + Sync));
        step.decoder.forward_with_embeddings(&pass.tokens, step.workspace, true, change).map_err(step.model_error())?;
        let indices = pass.token_of_target();
        let first = batch.tokens_of(&piece).start;
        let mut found: Vec<R> = Vec::with_capacity(pass.targets.len());
        let models = Models { trained: step.decoder, reference: step.reference };
        models
            .trained
            .backward_logits(&pass.tokens, step.workspace, &pass.targets, step.gradients, |rows| {
                // Every chunk is a run of targets.
                let targets = found.len()..found.len() + rows.len();
                let logits = others.iter().map(|other| other.logits(models, targets.clone()));
                let logits = logits.collect::<model::Result<Vec<Logits>>>().map_err(Failure::Model)?;
                let values = rows.into_par_iter().map(|row| {
                    let place = row.target - targets.start;
                    let others = logits.iter().map(|logits| logits.row(place)).collect();
                    let (index, token) = (first + indices[row.target], pass.targets[row.target].token);
                    objective(Row { index, token, logits: row.logits, others })
                });
                found.extend(values.collect::<objectives::Result<Vec<R>>>().map_err(Failure::Objective)?);
                Ok(())
            })
            .map_err(step.model_error())?
            .map_err(|failure| match failure {
                Failure::Model(error) => step.model_error()(error),
                Failure::Objective(error) => step.objective_error()(error),
            })?;
        all.extend(pass.by_sequence(&found));
        step.spent(Phase::Train, started);
        step.progress(Phase::Train, piece.end - part.start, part.len());
    }
    Ok(all)
}

/// What `read` makes of the distributions of other models at each loss token of the units `part` of a batch, sequence by sequence, without any
/// gradient. The time goes to [`Phase::Reference`].
///
/// # Errors
/// As [`gradients`].
pub fn read<R: Copy + Send>(
    step: &mut Step<'_>,
    batch: &Batch<'_>,
    part: Range<usize>,
    how: RowPass<'_>,
    read: impl Fn(u32, &[&[f32]]) -> objectives::Result<R> + Sync,
) -> Result<Vec<R>> {
    let mut all = Vec::with_capacity(batch.tokens_of(&part).len());
    for piece in batch.pieces(part, how.micro_batch_tokens) {
        let pass = batch.pack(piece).map_err(step.model_error())?;
        let others = hidden_of_others(step, &pass, how.others)?;
        let started = Instant::now();
        let mut found = Vec::with_capacity(pass.targets.len());
        for start in (0..pass.targets.len()).step_by(READ_ROWS) {
            let targets = start..pass.targets.len().min(start + READ_ROWS);
            let models = Models { trained: step.decoder, reference: step.reference };
            let logits = others.iter().map(|other| other.logits(models, targets.clone()));
            let logits = logits.collect::<model::Result<Vec<Logits>>>().map_err(step.model_error())?;
            let values = targets.clone().into_par_iter().map(|target| {
                let rows: Vec<&[f32]> = logits.iter().map(|logits| logits.row(target - start)).collect();
                read(pass.targets[target].token, &rows)
            });
            found.extend(values.collect::<objectives::Result<Vec<R>>>().map_err(step.objective_error())?);
        }
        all.extend(pass.by_sequence(&found));
        step.spent(Phase::Reference, started);
    }
    Ok(all)
}

/// Rows of other models' logits that [`read`] holds at a time.
const READ_ROWS: usize = 256;

/// Why the walk over chunks ended early.
enum Failure {
    Model(model::Error),
    Objective(objectives::Error),
}

/// The hidden states of another model at the loss tokens of a pass, which its head turns into logits.
struct Hidden<'o> {
    other: Other<'o>,
    states: Vec<f32>,
}

impl Hidden<'_> {
    /// The logits of a run of targets.
    fn logits(&self, models: Models<'_>, targets: Range<usize>) -> model::Result<Logits> {
        let decoder = self.other.among(models);
        let (d, vocabulary) = (decoder.config().hidden_size, decoder.config().vocab_size);
        let mut values = vec![0.0; targets.len() * vocabulary];
        decoder.logits(&self.states[targets.start * d..targets.end * d], &mut values)?;
        Ok(Logits { values, vocabulary })
    }
}

/// The models of a step.
#[derive(Clone, Copy)]
struct Models<'m> {
    trained: &'m Decoder,
    reference: Option<&'m Decoder>,
}

impl Other<'_> {
    /// The decoder meant: for a reference that is not kept apart, the one that is trained, whose adapter does not reach the head.
    fn among<'m>(&'m self, models: Models<'m>) -> &'m Decoder {
        match self {
            Self::Model(decoder) => decoder,
            Self::Reference => models.reference.unwrap_or(models.trained),
        }
    }
}

/// Rows of one model's logits.
struct Logits {
    values: Vec<f32>,
    vocabulary: usize,
}

impl Logits {
    fn row(&self, place: usize) -> &[f32] {
        &self.values[place * self.vocabulary..][..self.vocabulary]
    }
}

/// Runs other models over a pass and keeps their hidden states at its targets.
fn hidden_of_others<'o>(step: &mut Step<'_>, pass: &Pass, others: &[Other<'o>]) -> Result<Vec<Hidden<'o>>> {
    let started = Instant::now();
    let mut found = Vec::with_capacity(others.len());
    for &other in others {
        let alone = matches!(other, Other::Reference) && step.reference.is_none();
        step.decoder.set_adapter(!alone);
        let decoder = other.among(Models { trained: step.decoder, reference: step.reference });
        let done = decoder.forward(&pass.tokens, step.workspace, false);
        let d = decoder.config().hidden_size;
        step.decoder.set_adapter(true);
        done.map_err(step.model_error())?;
        let mut states = Vec::with_capacity(pass.targets.len() * d);
        for target in &pass.targets {
            states.extend_from_slice(&step.workspace.hidden()[target.row * d..][..d]);
        }
        found.push(Hidden { other, states });
    }
    step.spent(Phase::Reference, started);
    Ok(found)
}

impl EmbeddingNoise {
    /// What the noise does to each row of a pass over `units`, the first of which is number `first` of its batch.
    fn of(self, units: &[Unit<'_>], first: usize, pass: &Pass) -> impl Fn(usize, &mut [f32]) + Sync + use<> {
        // For each row, the name of its draws and the length of its sequence; none on padding.
        let mut rows: Vec<Option<(Random, u32, f64)>> = vec![None; pass.tokens.rows()];
        let mut segments = pass.tokens.segments().iter();
        for (unit, number) in units.iter().zip(first..) {
            let own = unit.sequences.iter().map(|sequence| sequence.ids.len() > 1);
            let packed = std::iter::once(!unit.prompt.is_empty()).chain(own).zip(0..).filter(|(packed, _)| *packed);
            for ((_, place), segment) in packed.zip(&mut segments) {
                let random = self.random.prompt(number as u32).sample(place);
                for position in 0..segment.len {
                    rows[segment.start + position] = Some((random, position as u32, segment.len as f64));
                }
            }
        }
        let alpha = self.alpha;
        move |row, embedding| {
            let Some((random, position, length)) = rows[row] else { return };
            let bound = alpha / (length * embedding.len() as f64).sqrt();
            let start = position * embedding.len() as u32;
            for (value, place) in embedding.iter_mut().zip(start..) {
                *value += ((2.0 * random.at(place).uniform() - 1.0) * bound) as f32;
            }
        }
    }
}
