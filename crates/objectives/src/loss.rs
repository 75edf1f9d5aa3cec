//! What an objective returns: weighted per-token losses, and statistics that can be folded in any split.

use candle_core::{DType, Tensor};

/// What can be wrong with the inputs of an objective.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Two inputs that describe the same things have different lengths.
    #[error("{what} has length {got}, expected {expected}")]
    Length {
        /// The input.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length it should have.
        expected: usize,
    },
    /// An input that this combination of options needs is absent.
    #[error("{what} is missing: {why}")]
    Missing {
        /// The input.
        what: &'static str,
        /// Why it is needed.
        why: &'static str,
    },
    /// An option or a value is outside its range.
    #[error("{what} is {got}, expected {expected}")]
    Range {
        /// The option or value.
        what: &'static str,
        /// Its value.
        got: f64,
        /// The range.
        expected: &'static str,
    },
    /// Options that do not go together.
    #[error("{what}: {why}")]
    Conflict {
        /// The option.
        what: &'static str,
        /// What it does not go with, and why.
        why: &'static str,
    },
    /// A reward that is not a number would silently poison every advantage of its group.
    #[error("reward {index} is {value}, expected a finite number")]
    NonFiniteReward {
        /// Position in the list of rewards.
        index: usize,
        /// The value.
        value: f64,
    },
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// The result of an objective.
pub type Result<T> = std::result::Result<T, Error>;

/// The value of an objective on one micro-batch.
#[derive(Debug)]
pub struct Loss {
    /// Weighted loss of every loss token, `[N]`, f64. The loss is the plain sum, over all micro-batches of a step.
    pub per_token: Tensor,
    /// What there is to log about these tokens.
    pub statistics: Vec<Statistic>,
}

impl Loss {
    /// The loss of every token.
    pub fn values(&self) -> Result<Vec<f64>> {
        values(&self.per_token)
    }

    /// Both losses in one, token by token, with the statistics of both.
    pub fn plus(self, other: Self) -> Result<Self> {
        let statistics = self.statistics.into_iter().chain(other.statistics).collect();
        Ok(Self { per_token: self.per_token.add(&other.per_token)?, statistics })
    }

    /// Both losses, one after the other, with the statistics of both.
    pub fn and(self, other: Self) -> Result<Self> {
        let statistics = self.statistics.into_iter().chain(other.statistics).collect();
        Ok(Self { per_token: Tensor::cat(&[self.per_token, other.per_token], 0)?, statistics })
    }

    /// The losses of rows whose mean this is: each holds its share `1/n` of it.
    pub fn row_losses(&self) -> Result<Vec<f64>> {
        let shares = self.values()?;
        Ok(shares.iter().map(|share| share * shares.len() as f64).collect())
    }

    /// The mean over rows with other weights: each row's loss times how much it counts relative to its share of the mean. Adds the
    /// statistics `row_weights/mean` and `row_weights/max` over these weights.
    pub fn reweighted(self, relative: Vec<f64>) -> Result<Self> {
        let factors = Tensor::from_slice(&relative, relative.len(), self.per_token.device())?;
        let mut statistics = self.statistics;
        statistics.extend([
            Statistic { name: "row_weights/mean", values: relative.clone(), reduce: Reduce::Mean },
            Statistic { name: "row_weights/max", values: relative, reduce: Reduce::Max },
        ]);
        Ok(Self { per_token: self.per_token.mul(&factors)?, statistics })
    }

    /// The derivative of the loss with respect to `input`, one of the `[N]` tensors the objective was given. The
    /// tensor must track gradients; where the loss does not depend on it, the derivative is 0.
    pub fn gradient(&self, input: &Tensor) -> Result<Vec<f64>> {
        Ok(self.gradients(&[input])?.pop().unwrap_or_default())
    }

    /// [`Loss::gradient`] for several inputs at once.
    pub fn gradients(&self, inputs: &[&Tensor]) -> Result<Vec<Vec<f64>>> {
        if self.per_token.elem_count() == 0 {
            return Ok(inputs.iter().map(|input| vec![0.0; input.elem_count()]).collect());
        }
        let found = self.per_token.sum_all()?.backward()?;
        let of = |input: &&Tensor| match found.get(input) {
            Some(gradient) => values(gradient),
            None => Ok(vec![0.0; input.elem_count()]),
        };
        inputs.iter().map(of).collect()
    }
}

/// How the values of a [`Statistic`] become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Their mean.
    Mean,
    /// The smallest.
    Min,
    /// The largest.
    Max,
    /// Their sum.
    Sum,
}

/// Values to log: one per loss token or one per sequence, in order.
#[derive(Clone, Debug)]
pub struct Statistic {
    /// The metric's name, as TRL logs it.
    pub name: &'static str,
    /// The values of this micro-batch.
    pub values: Vec<f64>,
    /// How they are reduced over a whole step.
    pub reduce: Reduce,
}

/// Folds the values of one statistic, micro-batch after micro-batch, in order and in f64, so that the result does not
/// depend on where the batch was split.
#[derive(Clone, Copy, Debug)]
pub struct Fold {
    reduce: Reduce,
    count: u64,
    state: f64,
}

impl Fold {
    /// Nothing folded yet.
    pub fn new(reduce: Reduce) -> Self {
        let state = match reduce {
            Reduce::Mean | Reduce::Sum => 0.0,
            Reduce::Min => f64::INFINITY,
            Reduce::Max => f64::NEG_INFINITY,
        };
        Self { reduce, count: 0, state }
    }

    /// Takes the next values.
    pub fn extend(&mut self, values: &[f64]) {
        self.count += values.len() as u64;
        self.state = values.iter().fold(self.state, |state, &value| match self.reduce {
            Reduce::Mean | Reduce::Sum => state + value,
            Reduce::Min => state.min(value),
            Reduce::Max => state.max(value),
        });
    }

    /// The reduced value; `None` where there was nothing to reduce (a mean over no tokens is not 0).
    pub fn value(&self) -> Option<f64> {
        match self.reduce {
            _ if self.count == 0 => None,
            Reduce::Mean => Some(self.state / self.count as f64),
            Reduce::Sum | Reduce::Min | Reduce::Max => Some(self.state),
        }
    }
}

/// The numbers of a tensor, flat.
pub(crate) fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// An input of an objective as f64, its length checked against the number of loss tokens.
pub(crate) fn per_token(what: &'static str, tensor: &Tensor, tokens: usize) -> Result<Tensor> {
    check_length(what, tensor.elem_count(), tokens)?;
    Ok(tensor.flatten_all()?.to_dtype(DType::F64)?)
}

/// Like [`per_token`], for inputs that are constants: no gradient flows into them.
pub(crate) fn constant(what: &'static str, tensor: &Tensor, tokens: usize) -> Result<Tensor> {
    per_token(what, &tensor.detach(), tokens)
}

pub(crate) fn check_length(what: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Length { what, got, expected }) }
}

/// The largest exponent taken of a log-ratio: e^20 is 4.9e8, far beyond any ratio that carries information, and far
/// from overflow. Beyond it the value is constant and the gradient 0.
pub(crate) const MAX_LOG_RATIO: f64 = 20.0;

/// `exp(min(x, 20))`.
pub(crate) fn bounded_exp(x: &Tensor) -> Result<Tensor> {
    Ok(x.minimum(MAX_LOG_RATIO)?.exp()?)
}
