//! A linear layer on the device: the engine's [`Linear`] in tensors, forward and backward.

use candle_core::{DType, Device, Result, Tensor};

use super::super::linear::{Adapter, Linear};
use super::super::parameters::Gradients;
use super::{accumulate, product};

/// Copies of the weights of a [`Linear`].
#[derive(Clone)]
pub struct LinearWeights {
    /// The type of the products' operands.
    of: DType,
    /// `outputs × inputs`.
    weight: Tensor,
    bias: Option<Tensor>,
    adapter: Option<AdapterWeights>,
}

#[derive(Clone)]
struct AdapterWeights {
    /// The A of each adapted projection, one below the other.
    a: Tensor,
    /// The B of each.
    b: Vec<Tensor>,
}

impl LinearWeights {
    pub fn copy(linear: &Linear, base: &[f32], of: DType, device: &Device) -> Result<Self> {
        let weight = Tensor::from_slice(&base[linear.weight.clone()], (linear.outputs, linear.inputs), device)?;
        let bias = linear.bias.clone().map(|range| Tensor::from_slice(&base[range], linear.outputs, device));
        Ok(Self { of, weight: weight.to_dtype(of)?, bias: bias.transpose()?, adapter: None })
    }

    pub fn copy_adapter(&mut self, linear: &Linear, parameters: Option<&[f32]>, device: &Device) -> Result<()> {
        self.adapter = None;
        if let (Some(adapter), Some(parameters)) = (&linear.adapter, parameters) {
            let matrix = |range: &std::ops::Range<usize>, rows, columns| {
                Tensor::from_slice(&parameters[range.clone()], (rows, columns), device)?.to_dtype(self.of)
            };
            let b = adapter.parts.iter().map(|part| matrix(&part.b, part.columns.len(), adapter.rank));
            let a = matrix(&adapter.a, adapter.width(), linear.inputs)?;
            self.adapter = Some(AdapterWeights { a, b: b.collect::<Result<_>>()? });
        }
        Ok(())
    }

    /// The adapter's shape and weights, if there is one and it is on.
    fn adapter<'a>(&'a self, linear: &'a Linear, on: bool) -> Option<(&'a Adapter, &'a AdapterWeights)> {
        linear.adapter.as_ref().zip(self.adapter.as_ref()).filter(|_| on)
    }

    /// `x Wᵀ + bias + scale · (x Aᵀ) Bᵀ`.
    pub fn forward(&self, linear: &Linear, adapter: bool, x: &Tensor) -> Result<Tensor> {
        let mut y = product(self.of, x, &self.weight.t()?)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some((adapter, weights)) = self.adapter(linear, adapter) {
            let low_rank = (product(self.of, x, &weights.a.t()?)? * f64::from(adapter.scale))?;
            let mut columns = Vec::new();
            let mut end = 0;
            for (index, (part, b)) in adapter.parts.iter().zip(&weights.b).enumerate() {
                columns.extend(gap(&y, end, part.columns.start)?);
                let low_rank = low_rank.narrow(1, index * adapter.rank, adapter.rank)?;
                columns.push(product(self.of, &low_rank, &b.t()?)?);
                end = part.columns.end;
            }
            columns.extend(gap(&y, end, linear.outputs)?);
            y = (y + Tensor::cat(&columns, 1)?)?;
        }
        Ok(y)
    }

    /// The gradient of `x`; those of the weights that are trained are added to `gradients`: the base's, or the adapter's.
    pub fn backward(
        &self,
        linear: &Linear,
        trains_base: bool,
        x: &Tensor,
        dy: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let mut dx = product(self.of, dy, &self.weight)?;
        if trains_base {
            accumulate(gradients, &linear.weight, &product(self.of, &dy.t()?, x)?)?;
            if let Some(bias) = &linear.bias {
                accumulate(gradients, bias, &dy.sum(0)?)?;
            }
        }
        if let Some((adapter, weights)) = self.adapter(linear, !trains_base) {
            let scale = f64::from(adapter.scale);
            let low_rank = (product(self.of, x, &weights.a.t()?)? * scale)?;
            let mut d_low_rank = Vec::new();
            for (index, (part, b)) in adapter.parts.iter().zip(&weights.b).enumerate() {
                let dy = dy.narrow(1, part.columns.start, part.columns.len())?.contiguous()?;
                let low_rank = low_rank.narrow(1, index * adapter.rank, adapter.rank)?;
                accumulate(gradients, &part.b, &product(self.of, &dy.t()?, &low_rank)?)?;
                d_low_rank.push(product(self.of, &dy, b)?);
            }
            let d_low_rank = (Tensor::cat(&d_low_rank, 1)? * scale)?;
            accumulate(gradients, &adapter.a, &product(self.of, &d_low_rank.t()?, x)?)?;
            dx = (dx + product(self.of, &d_low_rank, &weights.a)?)?;
        }
        Ok(dx)
    }
}

/// Zeros for the columns of `y` that no adapter reaches.
fn gap(y: &Tensor, start: usize, end: usize) -> Result<Option<Tensor>> {
    (end > start).then(|| Tensor::zeros((y.dim(0)?, end - start), y.dtype(), y.device())).transpose()
}
