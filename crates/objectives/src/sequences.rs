//! Loss tokens grouped into the sequences they belong to: sums over a sequence, and values repeated for its tokens.

use candle_core::{Device, Tensor};

use crate::loss::Result;
use crate::scalar::sequence_sums;

/// Which tokens of a batch belong together. Tokens of one sequence are adjacent.
#[derive(Debug)]
pub(crate) struct Sequences {
    /// For each token, the place of its sequence, from 0.
    places: Vec<u32>,
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
}

impl Sequences {
    /// From the number of each token's sequence.
    pub fn of(sequence: &[u32]) -> Self {
        let lengths: Vec<usize> = sequence.chunk_by(|a, b| a == b).map(<[u32]>::len).collect();
        let places = (0..).zip(&lengths).flat_map(|(place, &length)| std::iter::repeat_n(place, length)).collect();
        Self { places, lengths }
    }

    /// The sum over each sequence's tokens, in order, `[S]`.
    pub fn sum(&self, tokens: &Tensor) -> Result<Tensor> {
        if self.lengths.is_empty() {
            return Ok(tokens.clone());
        }
        sequence_sums(tokens, &self.places, self.lengths.len())
    }

    /// The mean over each sequence's tokens, `[S]`.
    pub fn mean(&self, tokens: &Tensor) -> Result<Tensor> {
        let lengths: Vec<f64> = self.lengths.iter().map(|&length| length as f64).collect();
        Ok(self.sum(tokens)?.div(&Tensor::from_slice(&lengths, lengths.len(), &Device::Cpu)?)?)
    }

    /// Each sequence's value, repeated for its tokens, `[N]`.
    pub fn spread(&self, sequences: &Tensor) -> Result<Tensor> {
        if self.lengths.is_empty() {
            return Ok(sequences.clone());
        }
        let places = Tensor::from_slice(&self.places, self.places.len(), sequences.device())?;
        Ok(sequences.index_select(&places, 0)?)
    }

    /// The mean of each sequence's values, of plain numbers.
    pub fn means(&self, tokens: &[f64]) -> Vec<f64> {
        self.split(tokens).map(|own| own.iter().sum::<f64>() / own.len() as f64).collect()
    }

    /// The first value of each sequence: of what is the same for all its tokens, the one value there is.
    pub fn first(&self, tokens: &[f64]) -> Vec<f64> {
        self.split(tokens).map(|own| own[0]).collect()
    }

    fn split<'a>(&self, tokens: &'a [f64]) -> impl Iterator<Item = &'a [f64]> {
        let mut rest = tokens;
        self.lengths.iter().map(move |&length| {
            let own;
            (own, rest) = rest.split_at(length);
            own
        })
    }
}
