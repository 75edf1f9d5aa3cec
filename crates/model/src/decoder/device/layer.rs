//! One decoder layer on the device; the engine's [`Layer`] says which weights and in which order.

use candle_core::{DType, Device, Result, Tensor};

use super::super::layer::Layer;
use super::super::parameters::Gradients;
use super::cache::Pool;
use super::linear::LinearWeights;
use super::{Pass, accumulate, norm, pull_back};
use crate::config::Activation;

/// Copies of the weights of a layer.
#[derive(Clone)]
pub struct LayerWeights {
    attention_norm: Tensor,
    qkv: LinearWeights,
    /// Of the queries and of the keys.
    head_norms: Option<[Tensor; 2]>,
    output: LinearWeights,
    post_attention_norm: Option<Tensor>,
    mlp_norm: Tensor,
    gate_up: LinearWeights,
    down: LinearWeights,
    post_mlp_norm: Option<Tensor>,
}

/// What one layer's backward needs of its forward.
pub struct Kept {
    input: Tensor,
    /// Without it, backward computes it again.
    activations: Option<Activations>,
}

/// The activations between the parts of a layer.
struct Activations {
    /// Queries, keys and values before head norms and rotation.
    qkv: Tensor,
    attention: Tensor,
    /// The input of the norm after attention, where there is one.
    attention_output: Tensor,
    /// The residual stream between attention and MLP.
    middle: Tensor,
    gate_up: Tensor,
    /// The input of the norm after the MLP, where there is one.
    mlp_output: Tensor,
}

impl Kept {
    /// The input without the activations.
    pub fn input_alone(self) -> Self {
        Self { activations: None, ..self }
    }
}

impl LayerWeights {
    pub fn copy(layer: &Layer, base: &[f32], of: DType, device: &Device) -> Result<Self> {
        let norm = |range: &std::ops::Range<usize>| Tensor::from_slice(&base[range.clone()], range.len(), device);
        let linear = |linear| LinearWeights::copy(linear, base, of, device);
        let head_norms = layer.head_norms.as_ref().map(|norms| Result::Ok([norm(&norms.q)?, norm(&norms.k)?]));
        Ok(Self {
            attention_norm: norm(&layer.attention_norm)?,
            qkv: linear(&layer.qkv)?,
            head_norms: head_norms.transpose()?,
            output: linear(&layer.output)?,
            post_attention_norm: layer.post_attention_norm.as_ref().map(norm).transpose()?,
            mlp_norm: norm(&layer.mlp_norm)?,
            gate_up: linear(&layer.gate_up)?,
            down: linear(&layer.down)?,
            post_mlp_norm: layer.post_mlp_norm.as_ref().map(norm).transpose()?,
        })
    }

    pub fn copy_adapter(&mut self, layer: &Layer, parameters: Option<&[f32]>, device: &Device) -> Result<()> {
        let weights = [&mut self.qkv, &mut self.output, &mut self.gate_up, &mut self.down];
        weights.into_iter().zip(layer.linears()).try_for_each(|(to, of)| to.copy_adapter(of, parameters, device))
    }

    /// The layer's output and what led to it. With `cached`, the new keys and values go to these places of the pool, and
    /// attention reads the pool.
    pub fn forward(
        &self,
        layer: &Layer,
        adapter: bool,
        pass: &Pass,
        cached: Option<(&Pool, &Tensor)>,
        input: &Tensor,
    ) -> Result<(Tensor, Kept)> {
        let normed = |x: &Tensor, weight: &Tensor| norm(x, weight, layer.norm_offset, layer.eps);
        let qkv = self.qkv.forward(&layer.qkv, adapter, &normed(input, &self.attention_norm)?)?;
        let [q, k, v] = split(layer, &self.turn(layer, pass, &qkv)?)?;
        let attention = match cached {
            None => pass.plan.attend(&layer.shape, &q, &k, &v)?,
            Some((pool, places)) => {
                let (keys, values) = pool.write(layer.index, places, &k, &v)?;
                pass.plan.attend(&layer.shape, &q, &keys, &values)?
            }
        };
        let attention_output = self.output.forward(&layer.output, adapter, &attention)?;
        let middle = match &self.post_attention_norm {
            None => (input + &attention_output)?,
            Some(weight) => (input + normed(&attention_output, weight)?)?,
        };
        let gate_up = self.gate_up.forward(&layer.gate_up, adapter, &normed(&middle, &self.mlp_norm)?)?;
        let mlp_output = self.down.forward(&layer.down, adapter, &gated(layer.activation, &gate_up)?)?;
        let output = match &self.post_mlp_norm {
            None => (&middle + &mlp_output)?,
            Some(weight) => (&middle + normed(&mlp_output, weight)?)?,
        };
        let activations = Activations { qkv, attention, attention_output, middle, gate_up, mlp_output };
        Ok((output, Kept { input: input.clone(), activations: Some(activations) }))
    }

    /// The gradient of the layer's input, given that of its output.
    pub fn backward(
        &self,
        layer: &Layer,
        trains_base: bool,
        pass: &Pass,
        kept: Kept,
        d_output: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let Kept { input, activations } = kept;
        let activations = match activations {
            Some(activations) => Some(activations),
            None => self.forward(layer, !trains_base, pass, None, &input)?.1.activations,
        };
        let Some(Activations { qkv, attention, attention_output, middle, gate_up, mlp_output }) = activations else {
            candle_core::bail!("a forward leaves the activations of layer {}", layer.index)
        };
        let (offset, eps) = (layer.norm_offset, layer.eps);
        let norm_backward = |x: &Tensor, weight: &Tensor, range, dy: &Tensor, gradients: &mut Gradients| {
            let [dx, d_weight] = pull_back([x, weight], dy, |[x, weight]| norm(x, weight, offset, eps))?;
            if trains_base {
                accumulate(gradients, range, &d_weight)?;
            }
            Result::Ok(dx)
        };

        // The MLP.
        let d_branch = match self.post_mlp_norm.as_ref().zip(layer.post_mlp_norm.as_ref()) {
            None => d_output.clone(),
            Some((weight, range)) => norm_backward(&mlp_output, weight, range, d_output, gradients)?,
        };
        let product = gated(layer.activation, &gate_up)?;
        let d_product = self.down.backward(&layer.down, trains_base, &product, &d_branch, gradients)?;
        let [d_gate_up] = pull_back([&gate_up], &d_product, |[gate_up]| gated(layer.activation, gate_up))?;
        let normed = norm(&middle, &self.mlp_norm, offset, eps)?;
        let d_normed = self.gate_up.backward(&layer.gate_up, trains_base, &normed, &d_gate_up, gradients)?;
        let d_middle = norm_backward(&middle, &self.mlp_norm, &layer.mlp_norm, &d_normed, gradients)?;
        let d_middle = (d_output + d_middle)?;

        // Attention.
        let d_branch = match self.post_attention_norm.as_ref().zip(layer.post_attention_norm.as_ref()) {
            None => d_middle.clone(),
            Some((weight, range)) => norm_backward(&attention_output, weight, range, &d_middle, gradients)?,
        };
        let d_attention = self.output.backward(&layer.output, trains_base, &attention, &d_branch, gradients)?;
        let [q, k, v] = split(layer, &self.turn(layer, pass, &qkv)?)?;
        let d_turned = Tensor::cat(&pass.plan.backward(&layer.shape, [&q, &k, &v], &d_attention)?, 1)?;
        let d_qkv = match self.head_norms.as_ref().zip(layer.head_norms.as_ref()) {
            None => {
                let [d_qkv] = pull_back([&qkv], &d_turned, |[qkv]| turn(layer, pass, qkv, None))?;
                d_qkv
            }
            Some(([q, k], ranges)) => {
                let inputs = [&qkv, q, k];
                let [d_qkv, d_q, d_k] =
                    pull_back(inputs, &d_turned, |[qkv, q, k]| turn(layer, pass, qkv, Some([q, k])))?;
                if trains_base {
                    accumulate(gradients, &ranges.q, &d_q)?;
                    accumulate(gradients, &ranges.k, &d_k)?;
                }
                d_qkv
            }
        };
        let normed = norm(&input, &self.attention_norm, offset, eps)?;
        let d_normed = self.qkv.backward(&layer.qkv, trains_base, &normed, &d_qkv, gradients)?;
        let d_input = norm_backward(&input, &self.attention_norm, &layer.attention_norm, &d_normed, gradients)?;
        d_middle + d_input
    }

    fn turn(&self, layer: &Layer, pass: &Pass, qkv: &Tensor) -> Result<Tensor> {
        turn(layer, pass, qkv, self.head_norms.as_ref().map(|[q, k]| [q, k]))
    }
}

/// Queries, keys and values after their norms and rotation, side by side in a row as before.
fn turn(layer: &Layer, pass: &Pass, qkv: &Tensor, norms: Option<[&Tensor; 2]>) -> Result<Tensor> {
    let (heads, kv, d) = (layer.shape.heads, layer.shape.kv_heads, layer.shape.head_dim);
    let rows = qkv.dim(0)?;
    let all = qkv.reshape((rows, heads + 2 * kv, d))?;
    let (mut q, mut k, v) = (all.narrow(1, 0, heads)?, all.narrow(1, heads, kv)?, all.narrow(1, heads + kv, kv)?);
    if let Some([q_norm, k_norm]) = norms {
        q = norm(&q, q_norm, layer.norm_offset, layer.eps)?;
        k = norm(&k, k_norm, layer.norm_offset, layer.eps)?;
    }
    let angles = &pass.angles[layer.rope];
    Tensor::cat(&[rotate(&q, angles)?, rotate(&k, angles)?, v], 1)?.reshape((rows, (heads + 2 * kv) * d))
}

/// Turns element `i` of each head with element `i + head_dim / 2`.
fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let half = x.dim(2)? / 2;
    let (first, second) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let turned_first = (first.broadcast_mul(cos)? - second.broadcast_mul(sin)?)?;
    let turned_second = (second.broadcast_mul(cos)? + first.broadcast_mul(sin)?)?;
    Tensor::cat(&[turned_first, turned_second], 2)
}

/// Queries, keys and values, each `rows × heads · head_dim`.
fn split(layer: &Layer, turned: &Tensor) -> Result<[Tensor; 3]> {
    let (q, kv) = (layer.shape.heads * layer.shape.head_dim, layer.shape.kv_heads * layer.shape.head_dim);
    let part = |first, width| turned.narrow(1, first, width)?.contiguous();
    Ok([part(0, q)?, part(q, kv)?, part(q + kv, kv)?])
}

/// `act(gate) ∘ up` of rows of `[gate | up]`.
fn gated(activation: Activation, gate_up: &Tensor) -> Result<Tensor> {
    let width = gate_up.dim(1)? / 2;
    let (gate, up) = (gate_up.narrow(1, 0, width)?, gate_up.narrow(1, width, width)?);
    let gate = match activation {
        Activation::Silu => gate.silu()?,
        // Candle's `gelu` is the form with tanh.
        Activation::GeluTanh => gate.gelu()?,
    };
    gate * up
}
