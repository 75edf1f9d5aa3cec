//! Scores of sequences, and the gradients of what an objective makes of them: pack, forward, scores, objective, backward, piece
//! by piece. What [`crate::update`] is to log-probabilities, this is to score heads.
//!
//! A *unit* is what an objective compares, and is never cut: a pair of completions, or one solution with its steps. An *item* is a
//! token after which the head is read; items are numbered through the batch, and each has as many scores as the head has outputs, or as a
//! block of them has, where the head has one for every token that may come next and the one that came is asked for
//! ([`Batch::of_next_tokens`]).
//!
//! An objective that compares units ([`Scope::Batch`]) sees all scores at once: where the batch has several pieces, they come from a
//! pass of their own.

use std::ops::Range;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use model::decoder::{Blocks, Decoder, PackedTokens, ScoreGradients, Workspace, common_beginning};
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
    /// Outputs for each token that may come next, of a head that has some for every one.
    of_next_tokens: Option<usize>,
}

/// Some units in one pass.
struct Packed {
    tokens: PackedTokens,
    /// The row of each item.
    rows: Vec<usize>,
    /// The token after each item, where it is asked for.
    next: Vec<usize>,
}

impl<'a> Batch<'a> {
    /// The batch of these units, in this order.
    pub fn new(units: Vec<Unit<'a>>) -> Self {
        let mut items = vec![0];
        for unit in &units {
            items.push(items[items.len() - 1] + unit.items());
        }
        Self { units, items, of_next_tokens: None }
    }

    /// The same, read by a head that has `width` outputs for every token of the vocabulary: the scores of an item are those of the token that
    /// comes next in its sequence, which must not end there.
    #[must_use]
    pub fn of_next_tokens(self, width: usize) -> Self {
        Self { of_next_tokens: Some(width), ..self }
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
    fn pack(&self, units: Range<usize>) -> model::Result<Packed> {
        let mut packed = Packed { tokens: PackedTokens::new(), rows: Vec::new(), next: Vec::new() };
        for unit in &self.units[units] {
            unit.pack(&mut packed.tokens, &mut packed.rows)?;
            if self.of_next_tokens.is_some() {
                for Scored { ids, at } in &unit.sequences {
                    let next = |&at: &usize| ids.get(at + 1).map(|&id| id as usize);
                    let missing = || model::Error::Invalid("nothing comes after the last token of a sequence".into());
                    packed.next.extend(at.iter().map(next).collect::<Option<Vec<usize>>>().ok_or_else(missing)?);
                }
            }
        }
        Ok(packed)
    }

    /// Which outputs of each row are asked for.
    fn blocks<'p>(&self, packed: &'p Packed) -> Option<Blocks<'p>> {
        self.of_next_tokens.map(|width| Blocks { width, of_rows: &packed.next })
    }

    /// The scores of what was packed, after its forward pass.
    fn read(&self, decoder: &Decoder, workspace: &Workspace, packed: &Packed) -> model::Result<Vec<f32>> {
        match self.blocks(packed) {
            Some(blocks) => decoder.block_scores(workspace, &packed.rows, blocks),
            None => decoder.scores(workspace, &packed.rows),
        }
    }

    /// The scores of all items, items × outputs (or the width of a block), of a decoder that is prepared; `budget` rows are computed at once, which changes no
    /// bit.
    ///
    /// # Errors
    /// Those of the forward pass, and a model without a score head.
    pub fn scores(&self, decoder: &Decoder, workspace: &mut Workspace, budget: usize) -> model::Result<Vec<f32>> {
        let mut all = Vec::new();
        for piece in self.pieces(budget) {
            let packed = self.pack(piece)?;
            decoder.forward(&packed.tokens, workspace, false)?;
            all.extend(self.read(decoder, workspace, &packed)?);
        }
        Ok(all)
    }
}

/// The scores of some units, as an objective sees them.
#[derive(Debug)]
pub struct Piece {
    /// The scores of their items, items × outputs (or the width of a block), flat, tracking gradients.
    pub scores: Tensor,
    /// The place of the units in the batch.
    pub units: Range<usize>,
    /// The place of their items among those of the batch.
    pub items: Range<usize>,
}

impl Piece {
    /// Every second score from `first` on: those of the first or of the second completions of pairs.
    pub fn of_pairs(&self, first: u32) -> candle_core::Result<Tensor> {
        self.every(2, first)
    }

    /// The first of every `step` scores, or another of them.
    pub fn every(&self, step: u32, first: u32) -> candle_core::Result<Tensor> {
        let places: Vec<u32> = (0..self.scores.elem_count() as u32 / step).map(|group| step * group + first).collect();
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
        let packed = batch.pack(units.clone()).map_err(step.model_error())?;
        step.decoder.forward(&packed.tokens, step.workspace, true).map_err(step.model_error())?;
        let d_scores = match &whole {
            Some(all) => {
                let outputs = all.len() / batch.items().max(1);
                all[outputs * batch.items[units.start]..outputs * batch.items[units.end]].to_vec()
            }
            None => {
                let scores = batch.read(step.decoder, step.workspace, &packed).map_err(step.model_error())?;
                evaluated(&scores, units).map_err(step.objective_error())?
            }
        };
        let scores = ScoreGradients { rows: &packed.rows, blocks: batch.blocks(&packed), d_scores: &d_scores };
        step.decoder
            .backward_scores(&packed.tokens, step.workspace, scores, step.gradients)
            .map_err(step.model_error())?;
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
    step_with_weights(step, batch, budget, scope, objective, None)
}

/// A loss of the weights of the score head, outputs × width of the hidden states, flat.
pub type OfWeights<'a> = &'a dyn Fn(&Tensor) -> objectives::Result<Loss>;

/// [`step`] with a loss of the score head's weights beside that of the scores.
///
/// # Errors
/// As [`step`].
pub fn step_with_weights(
    step: &mut Step<'_>,
    batch: &Batch<'_>,
    budget: usize,
    scope: Scope,
    objective: impl FnMut(&Piece) -> objectives::Result<Loss>,
    of_weights: Option<OfWeights<'_>>,
) -> Result<Report> {
    let started = Instant::now();
    step.decoder.prepare_for_training(step.precision);
    step.spent(Phase::Train, started);
    let mut statistics = Folds::default();
    let mut loss = gradients(step, batch, budget, scope, &mut statistics, objective)?;
    if let Some(of_weights) = of_weights {
        loss += weight_gradients(step, &mut statistics, of_weights)?;
    }
    let grad_norm = step.update()?;
    let mut metrics = Metrics::new();
    metrics.set("loss", loss);
    metrics.set("grad_norm", grad_norm);
    statistics.record(&mut metrics);
    Ok(Report { metrics, tokens: batch.all_tokens(), episodes: None })
}

/// Adds the gradients of a loss of the score head's weights to those of the step and returns the loss.
fn weight_gradients(step: &mut Step<'_>, statistics: &mut Folds, of_weights: OfWeights<'_>) -> Result<f64> {
    let weights = step.decoder.score_weight().map_err(step.model_error())?;
    let evaluated = || -> objectives::Result<(Loss, Vec<f32>)> {
        let variable = Var::from_slice(weights, weights.len(), &Device::Cpu)?;
        let loss = of_weights(variable.as_tensor())?;
        let gradient = loss.gradient(variable.as_tensor())?;
        Ok((loss, gradient.into_iter().map(|value| value as f32).collect()))
    };
    let (loss, gradient) = evaluated().map_err(step.objective_error())?;
    statistics.extend(&loss.statistics);
    let losses = loss.values().map_err(step.objective_error())?;
    check_losses(step.number, &losses, &vec![1; losses.len()])?;
    step.decoder.add_score_weight_gradient(&gradient, step.gradients).map_err(step.model_error())?;
    Ok(losses.iter().sum())
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
        let Packed { tokens, rows, next } = batch.pack(0..2).unwrap();
        assert_eq!(tokens.ids(), [1, 2, 3, 4, 5, 0, 7, 8, 9]);
        assert_eq!((&rows[..], &next[..]), (&[3, 4, 6, 8][..], &[][..]));
        // One is the beginning of the other: its last token stays its own.
        let unit = Unit::new(vec![Scored::whole(&[1, 2, 3]), Scored::whole(&[1, 2])]);
        let Packed { tokens, rows, .. } = Batch::new(vec![unit]).pack(0..1).unwrap();
        assert_eq!((tokens.ids(), &rows[..]), (&[1, 0, 2, 3, 2][..], &[3, 4][..]));
    }

    #[test]
    fn the_next_token_is_that_of_the_sequence_whatever_is_shared() {
        let batch = |at: [Vec<usize>; 2]| {
            let [first, second] = at;
            let sequences = vec![Scored { ids: &[1, 2, 3, 4], at: first }, Scored { ids: &[1, 2, 5, 6], at: second }];
            Batch::new(vec![Unit::new(sequences)]).of_next_tokens(1)
        };
        let Packed { tokens, rows, next } = batch([vec![1, 2], vec![2]]).pack(0..1).unwrap();
        assert_eq!(next, [3, 4, 6]);
        // What is read at a token that both begin with is read in a row of its own.
        assert_eq!(rows.iter().map(|&row| tokens.ids()[row]).collect::<Vec<u32>>(), [2, 3, 5]);
        let error = batch([vec![3], vec![2]]).pack(0..1).map(drop).unwrap_err().to_string();
        assert_eq!(error, "nothing comes after the last token of a sequence");
    }

    /// The loss of a value model whose head speaks of all next tokens, along the gradient of the head and of what lies farthest below it.
    #[test]
    fn gradients_of_next_tokens_agree_with_finite_differences() {
        use kernels::Precision;
        use model::ModelConfig;
        use model::config::{Family, HeadTask, ScoreHead};
        use objectives::reward::{LabelLoss, labelled};

        let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 12), 3).unwrap();
        decoder.add_score(ScoreHead { outputs: 12, task: HeadTask::Token }, 0.3, 4).unwrap();
        let sequences =
            vec![Scored { ids: &[1, 2, 3, 4], at: vec![1, 2] }, Scored { ids: &[1, 2, 5, 6, 3], at: vec![2, 3] }];
        let batch = Batch::new(vec![Unit::new(sequences)]).of_next_tokens(1);
        let returns = [1.0, 0.0, 0.7, 0.2];
        let mut objective = |piece: &Piece| labelled(LabelLoss::Bce, &piece.scores, &returns, &[0.25; 4]);
        let mut workspace = Workspace::new();
        let mut loss = |decoder: &mut Decoder| {
            decoder.prepare(Precision::F32);
            let scores = batch.scores(decoder, &mut workspace, 1).unwrap();
            evaluate(&scores, 0..1, 0..4, &mut objective).unwrap().0.values().unwrap().iter().sum::<f64>()
        };
        loss(&mut decoder);
        let mut workspace = Workspace::new();
        let packed = batch.pack(0..1).unwrap();
        decoder.forward(&packed.tokens, &mut workspace, true).unwrap();
        let scores = batch.read(&decoder, &workspace, &packed).unwrap();
        let by_score = |piece: &Piece| labelled(LabelLoss::Bce, &piece.scores, &returns, &[0.25; 4]);
        let (_, d_scores) = evaluate(&scores, 0..1, 0..4, &mut { by_score }).unwrap();
        let mut gradients = decoder.gradients();
        let asked = ScoreGradients { rows: &packed.rows, blocks: batch.blocks(&packed), d_scores: &d_scores };
        decoder.backward_scores(&packed.tokens, &mut workspace, asked, &mut gradients).unwrap();
        gradients.finish();
        let count = decoder.parameters().len();
        let head = (0..count).filter(|&index| decoder.parameters()[index].name.contains("score"));
        for index in head.chain([0]).collect::<Vec<_>>() {
            let (gradient, original) = (gradients.grad(index), decoder.parameter(index).to_vec());
            let norm = kernels::sum_of_squares(gradient).sqrt();
            let step = 4e-3;
            let mut side = |sign: f64| {
                for ((value, original), g) in decoder.parameter_mut(index).iter_mut().zip(&original).zip(gradient) {
                    *value = original + (sign * step * f64::from(*g) / norm) as f32;
                }
                loss(&mut decoder)
            };
            let numeric = (side(1.0) - side(-1.0)) / (2.0 * step);
            decoder.parameter_mut(index).copy_from_slice(&original);
            assert!((numeric / norm - 1.0).abs() < 1e-2, "parameter {index}: analytic {norm}, numeric {numeric}");
        }
    }
}
