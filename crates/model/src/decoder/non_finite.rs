//! The first value that is not a number, by name.

use std::fmt;

/// Where an infinity or a NaN first appeared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NonFinite {
    /// The training step, if the caller knows it; see [`NonFinite::at_step`].
    pub step: Option<u64>,
    /// The decoder layer; `None` for the embedding, the final norm, the head and whole tensors.
    pub layer: Option<usize>,
    /// The activation (`attention output`), gradient (`gradient of the layer input`) or parameter.
    pub tensor: String,
    /// The row of the packed batch, or of the tensor.
    pub row: usize,
    /// The value: `NaN`, `inf` or `-inf`.
    pub value: String,
}

impl NonFinite {
    /// The first non-finite value of `rows`, each `width` wide, if any.
    pub(crate) fn find(layer: Option<usize>, tensor: &str, rows: &[f32], width: usize) -> Option<Self> {
        let index = kernels::finite(rows)?;
        Some(Self {
            step: None,
            layer,
            tensor: tensor.to_owned(),
            row: index / width.max(1),
            value: rows[index].to_string(),
        })
    }

    /// The same, with the training step filled in.
    pub fn at_step(mut self, step: u64) -> Self {
        self.step = Some(step);
        self
    }
}

impl fmt::Display for NonFinite {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(step) = self.step {
            write!(formatter, "step {step}, ")?;
        }
        if let Some(layer) = self.layer {
            write!(formatter, "layer {layer}, ")?;
        }
        write!(formatter, "row {}: {} holds {}", self.row, self.tensor, self.value)
    }
}

impl std::error::Error for NonFinite {}
