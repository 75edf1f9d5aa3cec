//! AdamW over the parameters of a decoder, with clipping by the global norm.

use std::collections::BTreeMap;

use base::Random;
use kernels::{AdamW, AdamWStep, Floats};
use model::decoder::{Decoder, Gradients, ParameterInfo};
use model::weights::Tensors;
use model::weights::safetensors::{Dtype, Values};

use crate::options::{OptimizerState, TrainingOptions};

/// The state of the optimiser: how many updates it made, and the two moments of every parameter.
#[derive(Debug)]
pub struct Optimizer {
    method: AdamW,
    weight_decay: f64,
    max_grad_norm: f64,
    updates: u64,
    parameters: Vec<ParameterInfo>,
    /// The moments, laid out as the gradients are.
    moments: Moments,
    /// Which way moments in bfloat16 are rounded.
    noise: Random,
}

#[derive(Debug)]
enum Moments {
    F32 { first: Floats, second: Floats },
    Bf16 { first: Vec<u16>, second: Vec<u16> },
}

impl Moments {
    fn zeros(state: OptimizerState, length: usize) -> Self {
        match state {
            OptimizerState::F32 => Self::F32 { first: Floats::zeros(length), second: Floats::zeros(length) },
            OptimizerState::Bf16 => Self::Bf16 { first: vec![0; length], second: vec![0; length] },
        }
    }
}

impl Optimizer {
    /// A fresh optimiser for the trainable parameters of `decoder`. `noise` rounds its state, where that is in bfloat16:
    /// draws of the run and the stage.
    pub fn new(options: &TrainingOptions, decoder: &Decoder, noise: Random) -> Self {
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
            moments: Moments::zeros(options.optimizer_state, length),
            noise,
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
            let range = parameter.range.clone();
            let (values, gradient) = (decoder.parameter_mut(index), gradients.grad(index));
            match &mut self.moments {
                Moments::F32 { first, second } => {
                    self.method.update(step, values, gradient, &mut first[range.clone()], &mut second[range]);
                }
                Moments::Bf16 { first, second } => {
                    let (first, second) = (&mut first[range.clone()], &mut second[range]);
                    let noise = self.noise.step(self.updates as u32).prompt(index as u32);
                    self.method.update_bf16(step, values, gradient, first, second, noise);
                }
            }
        }
    }

    /// The moments where they lie, with their shapes, named as PyTorch's Adam names them: `exp_avg.PARAMETER` and
    /// `exp_avg_sq.PARAMETER`.
    pub fn state(&self) -> BTreeMap<String, (&[usize], Values<'_>)> {
        let mut state = BTreeMap::new();
        for parameter in &self.parameters {
            let range = parameter.range.clone();
            let [first, second] = match &self.moments {
                Moments::F32 { first, second } => {
                    [first, second].map(|values| Values::Single(&values[range.clone()], Dtype::F32))
                }
                Moments::Bf16 { first, second } => [first, second].map(|values| Values::Bf16(&values[range.clone()])),
            };
            for (kind, values) in [("exp_avg", first), ("exp_avg_sq", second)] {
                state.insert(format!("{kind}.{}", parameter.name), (&parameter.shape[..], values));
            }
        }
        state
    }

    /// Takes over the moments of an earlier process.
    ///
    /// # Errors
    /// In words, when a moment is missing, unknown, of another shape, or has more digits than are stored here.
    pub fn restore(&mut self, mut state: Tensors, updates: u64) -> Result<(), String> {
        let mut take = |kind: &str, parameter: &ParameterInfo| {
            let name = format!("{kind}.{}", parameter.name);
            let tensor = state.remove(&name).ok_or_else(|| format!("the optimiser state has no {name}"))?;
            match tensor.shape == parameter.shape {
                true => Ok(tensor.data),
                false => Err(format!("{name} has shape {:?}, expected {:?}", tensor.shape, parameter.shape)),
            }
        };
        for parameter in &self.parameters {
            let (exp_avg, exp_avg_sq) = (take("exp_avg", parameter)?, take("exp_avg_sq", parameter)?);
            let range = parameter.range.clone();
            match &mut self.moments {
                Moments::F32 { first, second } => {
                    first[range.clone()].copy_from_slice(&exp_avg);
                    second[range].copy_from_slice(&exp_avg_sq);
                }
                Moments::Bf16 { first, second } => {
                    for (values, read) in [(&mut first[range.clone()], exp_avg), (&mut second[range], exp_avg_sq)] {
                        if read.iter().any(|value| value.to_bits() & 0xffff != 0) {
                            return Err(format!("the moments of {} are not in bfloat16", parameter.name));
                        }
                        values.iter_mut().zip(read).for_each(|(slot, value)| *slot = (value.to_bits() >> 16) as u16);
                    }
                }
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
