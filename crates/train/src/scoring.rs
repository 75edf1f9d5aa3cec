//! Scores of sequences, and the gradients of what an objective makes of them: pack, forward, scores, objective, backward, piece
//! by piece. What [`crate::update`] is to log-probabilities, this is to score heads.
//!
//! A *unit* is what an objective compares, and is never cut: a pair of completions, or one solution with its steps. An *item* is a
//! token after which the head is read; items are numbered through the batch, and each has as many scores as the head has outputs.
//!
//! An objective that compares units ([`Scope::Batch`]) sees all scores at once: where the batch has several pieces, they come from a
//! pass of their own.

use std::ops::Range;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use model::decoder::{Decoder, PackedTokens, ScoreGradients, Workspace, common_beginning};
use objectives::Loss;

use crate::error::Result;
use crate::method::{Report, Step, check_losses};
use crate::metrics::Metrics;
use crate::order::split;
use crate::timing::Phase;
use crate::update::{Folds, Scope};

/// Sequences that are scored together.
#[derive(Clone, Debug)]
pub struct Unit<'a> {
    /// How many tokens all sequences begin with together, which are computed once; 0 for none.
    shared: usize,
    sequences: Vec<Scored<'a>>,
}

/// A sequence, and the tokens after which it is scored.
#[derive(Clone, Debug)]
pub struct Scored<'a> {
    /// The tokens.
    pub ids: &'a [u32],
    /// Indices of tokens, ascending.
    pub at: Vec<usize>,
}

impl<'a> Scored<'a> {
    /// Scored after its last token: a reward model's score of a sequence.
    pub fn whole(ids: &'a [u32]) -> Self {
        Self { ids, at: Vec::from_iter(ids.len().checked_sub(1)) }
    }
}

impl<'a> Unit<'a> {
    /// The unit of these sequences. What they begin with together is computed once.
    pub fn new(sequences: Vec<Scored<'a>>) -> Self {
        let first = sequences.first().map_or(&[][..], |sequence| sequence.ids);
        // Every sequence keeps a token of its own, and every token that is scored.
        let own = |sequence: &Scored<'_>| {
            let before = sequence.at.first().map_or(0, |&at| at.min(sequence.ids.len() - 1));
            before.min(common_beginning(first, sequence.ids))
        };
        let shared = if sequences.len() < 2 { 0 } else { sequences.iter().map(own).min().unwrap_or(0) };
        Self { shared, sequences }
    }

    /// Rows the unit takes in a pass, at most.
    fn rows(&self) -> usize {
        let own = |sequence: &Scored<'_>| (sequence.ids.len() - self.shared).next_multiple_of(2);
        self.shared.next_multiple_of(2) + self.sequences.iter().map(own).sum::<usize>()
    }

    fn items(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.at.len()).sum()
    }

    fn pack(&self, tokens: &mut PackedTokens, rows: &mut Vec<usize>) -> model::Result<()> {
        let prompt = match self.shared {
            0 => None,
            shared => Some(tokens.push(&self.sequences[0].ids[..shared], None)?),
        };
        for sequence in &self.sequences {
            let segment = tokens.push(&sequence.ids[self.shared..], prompt)?;
            let start = tokens.segments()[segment].start;
            rows.extend(sequence.at.iter().map(|at| start + at - self.shared));
        }
        Ok(())
    }
}

/// Units to be scored.
#[derive(Debug)]
pub struct Batch<'a> {
    units: Vec<Unit<'a>>,
    /// The first item of each unit, and the number of all.
    items: Vec<usize>,
}

impl<'a> Batch<'a> {
    /// The batch of these units, in this order.
    pub fn new(units: Vec<Unit<'a>>) -> Self {
        let mut items = vec![0];
        for unit in &units {
            items.push(items[items.len() - 1] + unit.items());
        }
        Self { units, items }
    }

    /// The number of units.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// The number of items.
    pub fn items(&self) -> usize {
        self.items[self.units.len()]
    }

    /// Tokens of all sequences, as they count for the progress of a run.
    pub fn all_tokens(&self) -> u64 {
        self.units.iter().flat_map(|unit| &unit.sequences).map(|sequence| sequence.ids.len() as u64).sum()
    }

    fn pieces(&self, budget: usize) -> Vec<Range<usize>> {
        split(&self.units.iter().map(Unit::rows).collect::<Vec<_>>(), budget)
    }

    /// Packs a range of units, and finds the rows of their items.
    fn pack(&self, units: Range<usize>) -> model::Result<(PackedTokens, Vec<usize>)> {
        let (mut tokens, mut rows) = (PackedTokens::new(), Vec::new());
        for unit in &self.units[units] {
            unit.pack(&mut tokens, &mut rows)?;
        }
        Ok((tokens, rows))
    }

    /// The scores of all items, items × outputs, of a decoder that is prepared; `budget` rows are computed at once, which changes no
    /// bit.
    ///
    /// # Errors
    /// Those of the forward pass, and a model without a score head.
    pub fn scores(&self, decoder: &Decoder, workspace: &mut Workspace, budget: usize) -> model::Result<Vec<f32>> {
        let mut all = Vec::new();
        for piece in self.pieces(budget) {
            let (tokens, rows) = self.pack(piece)?;
            decoder.forward(&tokens, workspace, false)?;
            all.extend(decoder.scores(workspace, &rows)?);
        }
        Ok(all)
    }
}

/// The scores of some units, as an objective sees them.
#[derive(Debug)]
pub struct Piece {
    /// The scores of their items, items × outputs, flat, tracking gradients.
    pub scores: Tensor,
    /// The place of the units in the batch.
    pub units: Range<usize>,
    /// The place of their items among those of the batch.
    pub items: Range<usize>,
}

impl Piece {
    /// Every second score from `first` on: those of the first or of the second completions of pairs.
    pub fn of_pairs(&self, first: u32) -> candle_core::Result<Tensor> {
        let places: Vec<u32> = (0..self.units.len() as u32).map(|pair| 2 * pair + first).collect();
        self.scores.index_select(&Tensor::from_slice(&places, places.len(), &Device::Cpu)?, 0)
    }
}

/// Adds the gradients of one update to those of the step and returns the loss.
///
/// The objective returns weighted losses with their global denominators inside: the loss is their plain sum. The decoder must be
/// prepared. The time goes to [`Phase::Train`].
///
/// # Errors
/// A value that is not finite, named by layer and row or by item; an objective that refuses its input.
pub fn gradients(
    step: &mut Step<'_>,
    batch: &Batch<'_>,
    budget: usize,
    scope: Scope,
    statistics: &mut Folds,
    mut objective: impl FnMut(&Piece) -> objectives::Result<Loss>,
) -> Result<f64> {
    let started = Instant::now();
    let pieces = batch.pieces(budget);
    let mut losses = Vec::new();
    let mut evaluated = |scores: &[f32], units: Range<usize>| {
        let items = batch.items[units.start]..batch.items[units.end];
        let (found, d_scores) = evaluate(scores, units, items, &mut objective)?;
        statistics.extend(&found.statistics);
        losses.extend(found.values()?);
        Ok(d_scores)
    };
    let whole = match scope {
        Scope::Batch if pieces.len() > 1 => {
            let scores = batch.scores(step.decoder, step.workspace, budget).map_err(step.model_error())?;
            Some(evaluated(&scores, 0..batch.units()).map_err(step.objective_error())?)
        }
        _ => None,
    };
    for units in pieces {
        let done = units.end;
        let (tokens, rows) = batch.pack(units.clone()).map_err(step.model_error())?;
        step.decoder.forward(&tokens, step.workspace, true).map_err(step.model_error())?;
        let d_scores = match &whole {
            Some(all) => {
                let outputs = all.len() / batch.items().max(1);
                all[outputs * batch.items[units.start]..outputs * batch.items[units.end]].to_vec()
            }
            None => {
                let scores = step.decoder.scores(step.workspace, &rows).map_err(step.model_error())?;
                evaluated(&scores, units).map_err(step.objective_error())?
            }
        };
        let scores = ScoreGradients { rows: &rows, d_scores: &d_scores };
        step.decoder.backward_scores(&tokens, step.workspace, scores, step.gradients).map_err(step.model_error())?;
        step.progress(Phase::Train, done, batch.units());
    }
    check_losses(step.number, &losses, &vec![1; losses.len()])?;
    step.spent(Phase::Train, started);
    Ok(losses.iter().sum())
}

/// A whole step of a method that learns scores: prepares the model, gathers the gradients of `batch`, and moves the weights once.
///
/// # Errors
/// As [`gradients`], and a gradient that is not finite.
pub fn step(
    step: &mut Step<'_>,
    batch: &Batch<'_>,
    budget: usize,
    scope: Scope,
    objective: impl FnMut(&Piece) -> objectives::Result<Loss>,
) -> Result<Report> {
    let started = Instant::now();
    step.decoder.prepare_for_training(step.precision);
    step.spent(Phase::Train, started);
    let mut statistics = Folds::default();
    let loss = gradients(step, batch, budget, scope, &mut statistics, objective)?;
    let grad_norm = step.update()?;
    let mut metrics = Metrics::new();
    metrics.set("loss", loss);
    metrics.set("grad_norm", grad_norm);
    statistics.record(&mut metrics);
    Ok(Report { metrics, tokens: batch.all_tokens(), episodes: None })
}

/// The objective of one piece, and its gradient with respect to every score.
fn evaluate(
    scores: &[f32],
    units: Range<usize>,
    items: Range<usize>,
    objective: &mut impl FnMut(&Piece) -> objectives::Result<Loss>,
) -> objectives::Result<(Loss, Vec<f32>)> {
    let variable = Var::from_slice(scores, scores.len(), &Device::Cpu)?;
    let loss = objective(&Piece { scores: variable.as_tensor().clone(), units, items })?;
    let gradient = loss.gradient(variable.as_tensor())?;
    Ok((loss, gradient.into_iter().map(|value| value as f32).collect()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn pairs_share_what_they_begin_with_and_keep_a_token_of_their_own() {
        let unit = Unit::new(vec![Scored::whole(&[1, 2, 3, 4]), Scored::whole(&[1, 2, 5])]);
        let batch = Batch::new(vec![unit.clone(), Unit::new(vec![Scored { ids: &[7, 8, 9], at: vec![0, 2] }])]);
        assert_eq!((batch.units(), batch.items(), batch.all_tokens()), (2, 4, 10));
        let (tokens, rows) = batch.pack(0..2).unwrap();
        assert_eq!(tokens.ids(), [1, 2, 3, 4, 5, 0, 7, 8, 9]);
        assert_eq!(rows, [3, 4, 6, 8]);
        // One is the beginning of the other: its last token stays its own.
        let unit = Unit::new(vec![Scored::whole(&[1, 2, 3]), Scored::whole(&[1, 2])]);
        let (tokens, rows) = Batch::new(vec![unit]).pack(0..1).unwrap();
        assert_eq!((tokens.ids(), &rows[..]), (&[1, 0, 2, 3, 2][..], &[3, 4][..]));
    }
}
