//! Small networks over frozen embeddings: their weights, their layers, and AdamW.

use base::Random;
use candle_core::{D, Device, Result, Tensor, Var};
use kernels::{AdamW, AdamWStep};

/// What is trained, with the two moments of each.
pub struct Weights {
    random: Random,
    variables: Vec<Var>,
    moments: Vec<[Vec<f32>; 2]>,
    updates: u64,
}

/// `x W + b`.
#[derive(Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// The layer's outputs for rows of inputs.
    pub fn forward(&self, inputs: &Tensor) -> Result<Tensor> {
        inputs.matmul(&self.weight)?.broadcast_add(&self.bias)
    }
}

impl Weights {
    /// None yet; first values are drawn from `random`.
    pub fn new(random: Random) -> Self {
        Self { random, variables: Vec::new(), moments: Vec::new(), updates: 0 }
    }

    /// A matrix of values uniform within `bound` of zero.
    pub fn matrix(&mut self, rows: usize, columns: usize, bound: f64) -> Result<Tensor> {
        let random = self.random.sample(self.variables.len() as u32);
        let value = |place: u32| ((2.0 * random.at(place).uniform() - 1.0) * bound) as f32;
        let values: Vec<f32> = (0..(rows * columns) as u32).map(value).collect();
        let variable = Var::from_vec(values, (rows, columns), &Device::Cpu)?;
        let tensor = variable.as_tensor().clone();
        self.moments.push([vec![0.0; rows * columns], vec![0.0; rows * columns]]);
        self.variables.push(variable);
        Ok(tensor)
    }

    /// A linear layer.
    pub fn linear(&mut self, inputs: usize, outputs: usize) -> Result<Linear> {
        let weight = self.matrix(inputs, outputs, 1.0 / (inputs as f64).sqrt())?;
        Ok(Linear { weight, bias: self.matrix(1, outputs, 0.0)? })
    }

    /// Moves the weights once along the gradient of a loss.
    pub fn step(&mut self, loss: &Tensor, learning_rate: f64, weight_decay: f64) -> Result<()> {
        let gradients = loss.backward()?;
        self.updates += 1;
        let method = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
        for (variable, [first, second]) in self.variables.iter().zip(&mut self.moments) {
            let Some(gradient) = gradients.get(variable.as_tensor()) else { continue };
            let mut values = variable.as_tensor().flatten_all()?.to_vec1::<f32>()?;
            // A row is a bias.
            let decays = variable.as_tensor().dim(0)? > 1;
            let step = AdamWStep {
                step: self.updates,
                learning_rate: learning_rate as f32,
                weight_decay: if decays { weight_decay as f32 } else { 0.0 },
                gradient_scale: 1.0,
            };
            method.update(step, &mut values, &gradient.flatten_all()?.to_vec1::<f32>()?, first, second);
            variable.set(&Tensor::from_vec(values, variable.as_tensor().shape(), &Device::Cpu)?)?;
        }
        Ok(())
    }

    /// A copy of all values.
    pub fn values(&self) -> Result<Vec<Tensor>> {
        self.variables.iter().map(|variable| variable.as_tensor().copy()).collect()
    }

    /// Takes back values of earlier, and forgets all moments.
    pub fn restore(&mut self, values: &[Tensor]) -> Result<()> {
        self.updates = 0;
        self.moments.iter_mut().flatten().for_each(|moment| moment.fill(0.0));
        self.variables.iter().zip(values).try_for_each(|(variable, value)| variable.set(value))
    }
}

/// A reward: one number for a row of inputs, through one hidden layer.
#[derive(Clone)]
pub struct Reward {
    hidden: Linear,
    output: Linear,
}

impl Reward {
    /// A reward over inputs of this width.
    pub fn new(weights: &mut Weights, inputs: usize, hidden: usize) -> Result<Self> {
        Ok(Self { hidden: weights.linear(inputs, hidden)?, output: weights.linear(hidden, 1)? })
    }

    /// The rewards of rows, `[rows]`.
    pub fn forward(&self, inputs: &Tensor) -> Result<Tensor> {
        self.output.forward(&self.hidden.forward(inputs)?.silu()?)?.squeeze(1)
    }
}

/// The mean of `-log σ(x)`.
pub fn negative_log_sigmoid(x: &Tensor) -> Result<Tensor> {
    // log(1 + e^-x) = max(0, -x) + log(1 + e^-|x|)
    (x.neg()?.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?.mean_all()
}

/// The softmax over the last dimension.
pub fn softmax(logits: &Tensor) -> Result<Tensor> {
    let exp = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

/// Rows scaled to length `√width`, so that their numbers are about 1 (Zhang and Sennrich, "Root mean square layer normalization", 2019).
pub fn normalised(rows: &Tensor) -> Result<Tensor> {
    rows.broadcast_div(&(rows.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?)
}

/// Rows of a tensor by number.
pub fn rows(of: &Tensor, numbers: &[u32]) -> Result<Tensor> {
    of.index_select(&Tensor::from_slice(numbers, numbers.len(), &Device::Cpu)?, 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use base::Purpose;

    use super::*;

    #[test]
    fn losses_are_finite_everywhere() {
        let x = Tensor::new(&[0.0f32], &Device::Cpu).unwrap();
        let at = |x: f32| {
            negative_log_sigmoid(&Tensor::new(&[x], &Device::Cpu).unwrap()).unwrap().to_scalar::<f32>().unwrap()
        };
        assert!((negative_log_sigmoid(&x).unwrap().to_scalar::<f32>().unwrap() - 2f32.ln()).abs() < 1e-6);
        assert!((at(-200.0) - 200.0).abs() < 1e-3 && at(200.0) == 0.0);
    }

    #[test]
    fn normalised_rows_have_one_length() {
        let rows = Tensor::new(&[[3.0f32, 4.0], [-30.0, 40.0], [0.0, 0.0]], &Device::Cpu).unwrap();
        let found = normalised(&rows).unwrap().to_vec2::<f32>().unwrap();
        let length = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!(found[..2].iter().all(|row| (length(row) - 2f32.sqrt()).abs() < 1e-4), "{found:?}");
        assert!((found[0][1] / found[0][0] - 4.0 / 3.0).abs() < 1e-5 && found[2] == [0.0, 0.0]);
    }

    #[test]
    fn restored_weights_learn_the_same_again() {
        let mut weights = Weights::new(Random::new(1, Purpose::Test));
        let reward = Reward::new(&mut weights, 2, 4).unwrap();
        let inputs = Tensor::new(&[[1.0f32, 2.0], [3.0, -1.0]], &Device::Cpu).unwrap();
        let first = weights.values().unwrap();
        let mut learn = || {
            for _ in 0..5 {
                let loss = negative_log_sigmoid(&reward.forward(&inputs).unwrap()).unwrap();
                weights.step(&loss, 0.1, 0.01).unwrap();
            }
            let learnt = reward.forward(&inputs).unwrap().to_vec1::<f32>().unwrap();
            weights.restore(&first).unwrap();
            learnt
        };
        let once = learn();
        assert!(once[0] > reward.forward(&inputs).unwrap().to_vec1::<f32>().unwrap()[0]);
        assert_eq!(once, learn());
    }
}
