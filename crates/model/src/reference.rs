//! The reference decoder: the engine's oracle, in composed candle ops with candle's autodiff.
//!
//! Written to be obviously right, in `f32` or `f64`: every norm, softmax and rotation is spelled out in elementary ops
//! (candle's fused forms have no backward), attention is a full matrix with a mask, logits are stored. It shares no code
//! with the engine but [`ModelConfig`] and [`PackedTokens`].

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, IndexOp, Result, Tensor, Var, backprop::GradStore};

use crate::config::{Activation, ModelConfig};
use crate::decoder::{PackedTokens, Target};
use crate::lora::{LoraConfig, PEFT_PREFIX, peft_key};
use crate::weights::Tensors;

/// A decoder whose weights are candle variables.
pub struct ReferenceDecoder {
    config: ModelConfig,
    dtype: DType,
    variables: BTreeMap<String, Var>,
    lora_scale: f64,
}

impl ReferenceDecoder {
    /// A decoder over copies of `tensors` in `dtype` (`F32` or `F64`).
    ///
    /// # Errors
    /// Shapes that candle refuses.
    pub fn new(config: &ModelConfig, tensors: &Tensors, dtype: DType) -> Result<Self> {
        let mut decoder = Self { config: config.clone(), dtype, variables: BTreeMap::new(), lora_scale: 0.0 };
        decoder.add(tensors)?;
        Ok(decoder)
    }

    /// Adds an adapter under PEFT's names.
    ///
    /// # Errors
    /// Shapes that candle refuses.
    pub fn with_adapter(mut self, config: &LoraConfig, tensors: &Tensors) -> Result<Self> {
        self.lora_scale = f64::from(config.scale());
        self.add(tensors)?;
        Ok(self)
    }

    fn add(&mut self, tensors: &Tensors) -> Result<()> {
        for (name, tensor) in tensors {
            let values = Tensor::from_slice(&tensor.data, tensor.shape.as_slice(), &Device::Cpu)?;
            self.variables.insert(name.clone(), Var::from_tensor(&values.to_dtype(self.dtype)?)?);
        }
        Ok(())
    }

    /// The variable called `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn variable(&self, name: &str) -> Result<&Var> {
        self.variables.get(name).ok_or_else(|| candle_core::Error::Msg(format!("no tensor {name}")))
    }

    /// The gradient of the variable called `name`, as `f64`.
    ///
    /// # Errors
    /// If there is none.
    pub fn gradient(&self, gradients: &GradStore, name: &str) -> Result<Vec<f64>> {
        let gradient = gradients
            .get(self.variable(name)?)
            .ok_or_else(|| candle_core::Error::Msg(format!("no gradient of {name}")))?;
        gradient.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
    }

    /// Hidden states after the final norm: rows × hidden size.
    ///
    /// # Errors
    /// Shapes that candle refuses.
    pub fn hidden(&self, tokens: &PackedTokens) -> Result<Tensor> {
        let config = &self.config;
        let ids = Tensor::new(tokens.ids(), &Device::Cpu)?;
        let mut x = self.variable("model.embed_tokens.weight")?.index_select(&ids, 0)?;
        x = (x * f64::from(config.embedding_scale))?;
        let positions = positions(tokens);
        for index in 0..config.layer_count() {
            let name = |module: &str| format!("model.layers.{index}.{module}");
            let normed = self.norm(&x, &name("input_layernorm"))?;
            let mut branch = self.attention(&normed, index, tokens, &positions)?;
            let mut mlp_norm = "post_attention_layernorm";
            if config.sandwich_norms {
                branch = self.norm(&branch, &name("post_attention_layernorm"))?;
                mlp_norm = "pre_feedforward_layernorm";
            }
            x = (x + branch)?;
            let normed = self.norm(&x, &name(mlp_norm))?;
            let gate = self.linear(&normed, &name("mlp.gate_proj"))?;
            let up = self.linear(&normed, &name("mlp.up_proj"))?;
            let gate = match config.activation {
                Activation::Silu => (&gate / (gate.neg()?.exp()? + 1.0)?)?,
                Activation::GeluTanh => {
                    let inner = ((&gate + (gate.powf(3.0)? * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
                    ((&gate * 0.5)? * (inner.tanh()? + 1.0)?)?
                }
            };
            branch = self.linear(&(gate * up)?, &name("mlp.down_proj"))?;
            if config.sandwich_norms {
                branch = self.norm(&branch, &name("post_feedforward_layernorm"))?;
            }
            x = (x + branch)?;
        }
        self.norm(&x, "model.norm")
    }

    /// Logits: rows × vocabulary.
    ///
    /// # Errors
    /// Shapes that candle refuses.
    pub fn logits(&self, tokens: &PackedTokens) -> Result<Tensor> {
        let head = if self.config.tied_head { "model.embed_tokens.weight" } else { "lm_head.weight" };
        self.hidden(tokens)?.matmul(&self.variable(head)?.t()?)
    }

    /// Log-probabilities and entropies of `targets` under softmax(logits / temperature).
    ///
    /// # Errors
    /// Shapes that candle refuses.
    pub fn log_probs(&self, tokens: &PackedTokens, targets: &[Target], temperature: f64) -> Result<(Tensor, Tensor)> {
        let rows: Vec<u32> = targets.iter().map(|target| target.row as u32).collect();
        let ids: Vec<u32> = targets.iter().map(|target| target.token).collect();
        let rows = Tensor::new(rows, &Device::Cpu)?;
        let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(1)?;
        let log_p = log_softmax(&(self.logits(tokens)?.index_select(&rows, 0)? / temperature)?)?;
        let entropy = (log_p.exp()? * &log_p)?.sum(D::Minus1)?.neg()?;
        Ok((log_p.gather(&ids, 1)?.squeeze(1)?, entropy))
    }

    /// The outputs of the score head at `rows`, rows × outputs; an adapter's copy of the head goes before the base's.
    ///
    /// # Errors
    /// A model without such a head.
    pub fn scores(&self, tokens: &PackedTokens, rows: &[usize]) -> Result<Tensor> {
        let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let hidden = self.hidden(tokens)?.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
        let adapted = format!("{PEFT_PREFIX}score");
        let own = self.variables.contains_key(&format!("{adapted}.weight"));
        self.linear(&hidden, if own { &adapted } else { "score" })
    }

    fn norm(&self, x: &Tensor, module: &str) -> Result<Tensor> {
        let weight =
            (self.variable(&format!("{module}.weight"))?.as_tensor() + f64::from(self.config.norm_weight_offset))?;
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        x.broadcast_div(&(mean_square + f64::from(self.config.eps))?.sqrt()?)?.broadcast_mul(&weight)
    }

    fn linear(&self, x: &Tensor, module: &str) -> Result<Tensor> {
        let mut y = x.matmul(&self.variable(&format!("{module}.weight"))?.t()?)?;
        if let Some(bias) = self.variables.get(&format!("{module}.bias")) {
            y = y.broadcast_add(bias)?;
        }
        if let (Some(a), Some(b)) =
            (self.variables.get(&peft_key(module, 'A')), self.variables.get(&peft_key(module, 'B')))
        {
            y = (y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * self.lora_scale)?)?;
        }
        Ok(y)
    }

    fn attention(&self, x: &Tensor, layer: usize, tokens: &PackedTokens, positions: &[usize]) -> Result<Tensor> {
        let config = &self.config;
        let rows = tokens.rows();
        let module = |name: &str| format!("model.layers.{layer}.self_attn.{name}");
        let heads = |name: &str, count| self.linear(x, &module(name))?.reshape((rows, count, config.head_dim));
        let (mut q, mut k) = (heads("q_proj", config.heads)?, heads("k_proj", config.kv_heads)?);
        let v = heads("v_proj", config.kv_heads)?;
        if config.qk_norm {
            q = self.norm(&q, &module("q_norm"))?;
            k = self.norm(&k, &module("k_norm"))?;
        }
        let (cos, sin) = self.angles(layer, positions)?;
        let (q, k) = (rotate(&q, &cos, &sin)?, rotate(&k, &cos, &sin)?);
        let mask = self.mask(layer, tokens, positions)?;
        let group = config.heads / config.kv_heads;
        let mut outputs = Vec::with_capacity(config.heads);
        for head in 0..config.heads {
            let (q, k, v) = (q.i((.., head))?, k.i((.., head / group))?, v.i((.., head / group))?);
            let scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * f64::from(config.attention_scale))?;
            let weights = log_softmax(&(scores + &mask)?)?.exp()?;
            outputs.push(weights.matmul(&v.contiguous()?)?);
        }
        self.linear(&Tensor::cat(&outputs, 1)?, &module("o_proj"))
    }

    /// Cosines and sines, rows × 1 × head_dim / 2.
    fn angles(&self, layer: usize, positions: &[usize]) -> Result<(Tensor, Tensor)> {
        let rope = &self.config.ropes[self.config.layers[layer].rope];
        let frequencies = rope.inverse_frequencies(self.config.head_dim);
        let angles: Vec<f64> = positions.iter().flat_map(|&p| frequencies.iter().map(move |f| p as f64 * f)).collect();
        let angles = Tensor::from_vec(angles, (positions.len(), 1, frequencies.len()), &Device::Cpu)?;
        Ok((angles.cos()?.to_dtype(self.dtype)?, angles.sin()?.to_dtype(self.dtype)?))
    }

    /// Zero where the row may look at the column, very negative elsewhere.
    fn mask(&self, layer: usize, tokens: &PackedTokens, positions: &[usize]) -> Result<Tensor> {
        let rows = tokens.rows();
        let window = self.config.layers[layer].window.unwrap_or(usize::MAX);
        let mut segment_of = vec![None; rows];
        for (index, segment) in tokens.segments().iter().enumerate() {
            segment_of[segment.start..segment.start + segment.len].fill(Some(index));
        }
        let visible = |row: usize, column: usize| match (segment_of[row], segment_of[column]) {
            (Some(own), Some(other)) => {
                let same = own == other || tokens.segments()[own].prefix == Some(other);
                same && positions[column] <= positions[row] && positions[row] - positions[column] < window
            }
            // Padding looks at itself, so that its softmax is defined.
            _ => row == column,
        };
        let mask: Vec<f64> = (0..rows * rows).map(|i| if visible(i / rows, i % rows) { 0.0 } else { -1e30 }).collect();
        Tensor::from_vec(mask, (rows, rows), &Device::Cpu)?.to_dtype(self.dtype)
    }
}

fn positions(tokens: &PackedTokens) -> Vec<usize> {
    let mut positions = vec![0; tokens.rows()];
    for segment in tokens.segments() {
        for offset in 0..segment.len {
            positions[segment.start + offset] = tokens.prefix_len(segment) + offset;
        }
    }
    positions
}

fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (first, second) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let turned_first = (first.broadcast_mul(cos)? - second.broadcast_mul(sin)?)?;
    let turned_second = (second.broadcast_mul(cos)? + first.broadcast_mul(sin)?)?;
    Tensor::cat(&[turned_first, turned_second], D::Minus1)
}
