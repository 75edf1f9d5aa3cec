//! AdamW over the parameters of a decoder, with clipping by the global norm.

use std::collections::BTreeMap;

use kernels::{AdamW, AdamWStep};
use model::decoder::{Decoder, Gradients, ParameterInfo};
use model::weights::{TensorView, Tensors};

use crate::options::TrainingOptions;

/// The state of the optimiser: how many updates it made, and the two moments of every parameter.
#[derive(Debug)]
pub struct Optimizer {
    method: AdamW,
    weight_decay: f64,
    max_grad_norm: f64,
    updates: u64,
    parameters: Vec<ParameterInfo>,
    /// The moments, laid out as the gradients are.
    first: Vec<f32>,
    second: Vec<f32>,
}

impl Optimizer {
    /// A fresh optimiser for the trainable parameters of `decoder`.
    pub fn new(options: &TrainingOptions, decoder: &Decoder) -> Self {
        let parameters = decoder.parameters().to_vec();
        let length = parameters.iter().map(|parameter| parameter.range.end).max().unwrap_or(0);
        Self {
            method: AdamW {
                beta1: options.adam_beta1 as f32,
                beta2: options.adam_beta2 as f32,
                epsilon: options.adam_epsilon as f32,
            },
            weight_decay: options.weight_decay,
            max_grad_norm: options.max_grad_norm,
            updates: 0,
            parameters,
            first: vec![0.0; length],
            second: vec![0.0; length],
        }
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Moves the weights once. `norm` is the norm of the gradient, which decides how far it is clipped.
    ///
    /// An update with learning rate 0 leaves weights and moments untouched.
    pub fn update(&mut self, decoder: &mut Decoder, gradients: &Gradients, norm: f64, learning_rate: f64) {
        if learning_rate == 0.0 {
            return;
        }
        self.updates += 1;
        for (index, parameter) in self.parameters.iter().enumerate() {
            let step = AdamWStep {
                step: self.updates,
                learning_rate: learning_rate as f32,
                weight_decay: if parameter.decay { self.weight_decay as f32 } else { 0.0 },
                gradient_scale: clip(norm, self.max_grad_norm) as f32,
            };
            let (first, second) = (&mut self.first[parameter.range.clone()], &mut self.second[parameter.range.clone()]);
            self.method.update(step, decoder.parameter_mut(index), gradients.grad(index), first, second);
        }
    }

    /// The moments where they lie, named as PyTorch's Adam names them: `exp_avg.PARAMETER` and `exp_avg_sq.PARAMETER`.
    pub fn state(&self) -> BTreeMap<String, TensorView<'_>> {
        let mut state = BTreeMap::new();
        for parameter in &self.parameters {
            for (kind, values) in [("exp_avg", &self.first), ("exp_avg_sq", &self.second)] {
                let view = TensorView { shape: &parameter.shape, data: &values[parameter.range.clone()] };
                state.insert(format!("{kind}.{}", parameter.name), view);
            }
        }
        state
    }

    /// Takes over the moments of an earlier process.
    ///
    /// # Errors
    /// In words, when a moment is missing, unknown or of another shape.
    pub fn restore(&mut self, mut state: Tensors, updates: u64) -> Result<(), String> {
        for parameter in &self.parameters {
            for (kind, values) in [("exp_avg", &mut self.first), ("exp_avg_sq", &mut self.second)] {
                let name = format!("{kind}.{}", parameter.name);
                let tensor = state.remove(&name).ok_or_else(|| format!("the optimiser state has no {name}"))?;
                if tensor.shape != parameter.shape {
                    return Err(format!("{name} has shape {:?}, expected {:?}", tensor.shape, parameter.shape));
                }
                values[parameter.range.clone()].copy_from_slice(&tensor.data);
            }
        }
        self.updates = updates;
        match state.keys().next() {
            Some(name) => Err(format!("the optimiser state has {name}, which is no parameter that is trained")),
            None => Ok(()),
        }
    }
}

/// What a gradient of this norm is multiplied by so that its norm is at most `max` (0: no limit).
fn clip(norm: f64, max: f64) -> f64 {
    if max > 0.0 && norm > max { max / norm } else { 1.0 }
}

/// The norm of a gradient over all parameters, folded in f64 in their order.
pub fn gradient_norm(decoder: &Decoder, gradients: &Gradients) -> f64 {
    (0..decoder.parameters().len()).map(|index| kernels::sum_of_squares(gradients.grad(index))).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::clip;

    #[test]
    fn clipping_scales_to_the_limit_and_no_further() {
        assert_eq!(clip(4.0, 1.0), 0.25);
        assert_eq!(clip(0.5, 1.0), 1.0);
        assert_eq!(clip(4.0, 0.0), 1.0, "0 is no limit");
    }
}
