//! Sequences packed for one forward and backward pass, and the bookkeeping between tokens and hidden rows.

use data::{Example, PreferencePair};
use model::decoder::{Decoder, PackedTokens, Target, Workspace};
use rollout::Episode;

/// One sequence and which of its tokens the loss is about.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// The tokens.
    pub ids: &'a [u32],
    /// For each token, whether its log-probability enters the loss.
    pub mask: &'a [bool],
}

impl<'a> Sequence<'a> {
    /// A sampled completion, of which the loss is about the tokens that were drawn.
    pub fn of(episode: &'a Episode) -> Self {
        Self { ids: &episode.completion, mask: &episode.loss_mask }
    }
}

/// What is never separated when a batch is cut: sequences that continue the same prompt, which is computed once.
#[derive(Clone, Debug)]
pub struct Unit<'a> {
    /// The shared prompt; empty where there is none.
    pub prompt: &'a [u32],
    /// The continuations, or with an empty prompt the sequences themselves.
    pub sequences: Vec<Sequence<'a>>,
}

impl<'a> Unit<'a> {
    /// A row of data on its own.
    pub fn of(example: &'a Example) -> Self {
        Self { prompt: &[], sequences: vec![Sequence { ids: &example.ids, mask: &example.loss_mask }] }
    }

    /// The first completions of a pair (chosen, rejected, reference), as continuations of what they share.
    pub fn of_pair(pair: &'a PreferencePair, completions: usize) -> Self {
        let shared = pair.shared_tokens();
        let rest = |example: &'a Example| Sequence { ids: &example.ids[shared..], mask: &example.loss_mask[shared..] };
        Self { prompt: &pair.chosen.ids[..shared], sequences: pair.completions().take(completions).map(rest).collect() }
    }

    /// Rows the unit takes in a pass, at most.
    pub fn rows(&self) -> usize {
        let own: usize = self.sequences.iter().map(|sequence| sequence.ids.len().next_multiple_of(2)).sum();
        self.prompt.len().next_multiple_of(2) + own
    }

    /// Loss tokens of each sequence.
    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        self.sequences.iter().map(|sequence| {
            let first = usize::from(self.prompt.is_empty());
            sequence.mask.iter().skip(first).filter(|&&counted| counted).count()
        })
    }
}

/// Units packed into rows, with the rows that predict their loss tokens.
///
/// The engine wants targets by ascending row; objectives want loss tokens sequence by sequence. The two orders differ,
/// because the last row of a prompt predicts the first token of each of its continuations.
#[derive(Debug)]
pub struct Pass {
    /// The rows.
    pub tokens: PackedTokens,
    /// The loss tokens by ascending row.
    pub targets: Vec<Target>,
    /// Loss tokens of each sequence, in order.
    pub lengths: Vec<usize>,
    /// For each loss token in sequence order, its place in `targets`.
    places: Vec<usize>,
}

impl Pass {
    /// Packs units one after the other. The last token of a sequence predicts nothing and gets no row.
    pub fn pack(units: &[Unit<'_>]) -> model::Result<Self> {
        let mut tokens = PackedTokens::new();
        let mut targets = Vec::new();
        let mut lengths = Vec::new();
        for unit in units {
            let prompt = match unit.prompt {
                [] => None,
                prompt => Some(tokens.push(prompt, None)?),
            };
            // The row that predicts the first token of each sequence: the prompt's last.
            let before = prompt.map(|index| last_row(&tokens, index));
            for sequence in &unit.sequences {
                let inputs = &sequence.ids[..sequence.ids.len().saturating_sub(1)];
                let start = match inputs {
                    [] => None,
                    inputs => {
                        let index = tokens.push(inputs, prompt)?;
                        Some(tokens.segments()[index].start)
                    }
                };
                let found = targets.len();
                for (position, (&token, &counted)) in sequence.ids.iter().zip(sequence.mask).enumerate() {
                    let row = match position {
                        0 => before,
                        position => start.map(|start| start + position - 1),
                    };
                    if let (true, Some(row)) = (counted, row) {
                        targets.push(Target { row, token });
                    }
                }
                lengths.push(targets.len() - found);
            }
        }
        let mut by_row: Vec<usize> = (0..targets.len()).collect();
        by_row.sort_by_key(|&token| targets[token].row);
        let mut places = vec![0; targets.len()];
        for (place, &token) in by_row.iter().enumerate() {
            places[token] = place;
        }
        Ok(Self { tokens, targets: by_row.into_iter().map(|token| targets[token]).collect(), lengths, places })
    }

    /// The rows that predict targets, ascending and each once, and for each target the place of its row among them.
    fn rows(&self) -> (Vec<usize>, Vec<usize>) {
        let mut rows: Vec<usize> = Vec::new();
        let mut places = Vec::with_capacity(self.targets.len());
        for target in &self.targets {
            if rows.last() != Some(&target.row) {
                rows.push(target.row);
            }
            places.push(rows.len() - 1);
        }
        (rows, places)
    }

    /// The score of the row before each loss token after a forward over these rows, sequence by sequence: the value of having come
    /// there.
    ///
    /// # Errors
    /// As [`Decoder::scores`].
    pub fn values(&self, decoder: &Decoder, workspace: &Workspace) -> model::Result<Vec<f32>> {
        let (rows, places) = self.rows();
        let scores = decoder.scores(workspace, &rows)?;
        Ok(self.by_sequence(&places.into_iter().map(|place| scores[place]).collect::<Vec<_>>()))
    }

    /// The rows before loss tokens, ascending, and gradients of their values from those of loss tokens in sequence order: a row
    /// that predicts several tokens gets the sum, in their order.
    pub fn by_row(&self, of_tokens: &[f64]) -> (Vec<usize>, Vec<f32>) {
        let (rows, places) = self.rows();
        let mut gradients = vec![0.0; rows.len()];
        for (place, gradient) in places.into_iter().zip(self.by_target(of_tokens)) {
            gradients[place] += gradient;
        }
        (rows, gradients)
    }

    /// For each sequence the sum of the hidden states that predict its loss tokens, in their order, after a forward over these
    /// rows; `width` is the length of a hidden state.
    pub fn hidden_sums(&self, workspace: &Workspace, width: usize) -> Vec<Vec<f64>> {
        let mut places = self.places.iter();
        let of_sequence = |&length: &usize| {
            let mut sum = vec![0.0; width];
            for &place in places.by_ref().take(length) {
                let row = &workspace.hidden()[self.targets[place].row * width..][..width];
                sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
            }
            sum
        };
        self.lengths.iter().map(of_sequence).collect()
    }

    /// Values of targets, rearranged sequence by sequence.
    pub fn by_sequence<T: Copy>(&self, of_targets: &[T]) -> Vec<T> {
        self.places.iter().map(|&place| of_targets[place]).collect()
    }

    /// For each target, the place of its loss token in sequence order.
    pub fn token_of_target(&self) -> Vec<usize> {
        let mut tokens = vec![0; self.places.len()];
        for (token, &place) in self.places.iter().enumerate() {
            tokens[place] = token;
        }
        tokens
    }

    /// Values of loss tokens in sequence order, rearranged for `targets` and rounded to single precision.
    pub fn by_target(&self, of_tokens: &[f64]) -> Vec<f32> {
        let mut values = vec![0.0; of_tokens.len()];
        for (&place, &value) in self.places.iter().zip(of_tokens) {
            values[place] = value as f32;
        }
        values
    }
}

fn last_row(tokens: &PackedTokens, segment: usize) -> usize {
    let segment = &tokens.segments()[segment];
    segment.start + segment.len - 1
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn a_lone_sequence_predicts_every_token_but_its_first() {
        let unit = Unit { prompt: &[], sequences: vec![Sequence { ids: &[5, 6, 7], mask: &[true, false, true] }] };
        assert_eq!(unit.lengths().collect::<Vec<_>>(), [1]);
        let pass = Pass::pack(&[unit]).unwrap();
        assert_eq!(pass.tokens.ids(), [5, 6], "the last token gets no row");
        assert_eq!(pass.targets, [Target { row: 1, token: 7 }]);
        assert_eq!(pass.lengths, [1]);
    }

    #[test]
    fn continuations_share_the_row_that_predicts_their_first_tokens() {
        let all = &[true; 3];
        let unit = Unit {
            prompt: &[1, 2, 3],
            sequences: vec![
                Sequence { ids: &[10, 11, 12], mask: all },
                Sequence { ids: &[20], mask: &all[..1] },
                Sequence { ids: &[30, 31], mask: &[false, true] },
            ],
        };
        assert_eq!(unit.lengths().collect::<Vec<_>>(), [3, 1, 1]);
        let pass = Pass::pack(&[unit]).unwrap();
        assert_eq!(pass.tokens.ids(), [1, 2, 3, 0, 10, 11, 30]);
        let targets: Vec<(usize, u32)> = pass.targets.iter().map(|target| (target.row, target.token)).collect();
        assert_eq!(targets, [(2, 10), (2, 20), (4, 11), (5, 12), (6, 31)]);
        assert_eq!(pass.by_row(&[1.0, 2.0, 3.0, 4.0, 5.0]), (vec![2, 4, 5, 6], vec![5.0, 2.0, 3.0, 5.0]));
        assert_eq!(pass.by_sequence(&[0.0, 1.0, 2.0, 3.0, 4.0]), [0.0, 2.0, 3.0, 1.0, 4.0]);
        assert_eq!(pass.by_target(&[0.0, 2.0, 3.0, 1.0, 4.0]), [0.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(pass.token_of_target(), [0, 3, 1, 2, 4]);
        assert_eq!(pass.lengths, [3, 1, 1]);
    }
}
