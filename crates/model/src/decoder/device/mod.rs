//! The decoder on a device of candle's, such as a GPU: the engine's layers in tensor operations.
//!
//! Whatever has a name stays on the host in f32: weights, their gradients, the optimiser's state. The device holds copies of the
//! weights in the precision of the products, made when the weights are prepared, and each backward adds its gradients to the
//! host's (Rajbhandari et al., "ZeRO-Offload", arXiv 2101.06840). What crosses the border in a pass is small: embeddings of
//! tokens go in, hidden states and their gradients go both ways, a chunk of logits comes out where generation asks.
//!
//! Linears and the head have their backward written out, as in the engine. What lies between them (norms, rotary positions,
//! attention, the activation) is a few functions from tensors to a tensor, and candle's autodiff goes back through one of them at
//! a time ([`pull_back`]), so that no graph is ever larger than that. Forward keeps what the engine keeps, and nothing of a
//! sequence's length squared.
//!
//! Sums are candle's, and so is their order: results agree with the engine's within rounding, not to the last bit.

mod attention;
mod cache;
mod head;
mod layer;
mod linear;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor, Var};
use kernels::{Precision, RopeTable};

use super::head::Head;
use super::identity::Values;
use super::layer::Layer;
use super::linear::Linear;
use super::non_finite::NonFinite;
use super::parameters::Gradients;
use super::{Decoder, EmbeddingChange, PackedTokens, WeightFormat, Workspace};
use crate::error::{Error, Result};
use attention::Plan;
use layer::{Kept, LayerWeights};

pub(super) use attention::Span;
pub(super) use cache::{Pool, Slots};

/// A device and what it knows of the decoder's weights.
#[derive(Clone)]
pub(super) struct OnDevice {
    device: Device,
    tables: Arc<[RopeTable]>,
    weights: Option<Weights>,
    /// Why the weights of the last preparation are not there.
    failed: Option<String>,
    pub pool: Arc<Pool>,
}

/// Copies of the weights.
#[derive(Clone)]
struct Weights {
    precision: Precision,
    layers: Vec<LayerWeights>,
    final_norm: Tensor,
    /// The language model's, `vocabulary × hidden`, where there is one.
    head: Option<Tensor>,
}

/// What forwards leave in a workspace for backward.
#[derive(Default)]
pub(super) struct KeptOnDevice {
    layers: Vec<Kept>,
    /// The input of the final norm.
    last: Option<Tensor>,
    pass: Option<Pass>,
}

/// What the layers of one pass share.
struct Pass {
    plan: Plan,
    /// For each rotary table the cosines and sines of the rows, each `rows × 1 × head_dim / 2`.
    angles: Vec<(Tensor, Tensor)>,
}

impl Decoder {
    /// Lets all passes run on a device of candle's. Weights and gradients stay here, to be read and changed as before, and
    /// [`Decoder::prepare`] copies the weights there. 8-bit weights are not for devices.
    ///
    /// # Errors
    /// A device that takes no tensor.
    pub fn to_device(&mut self, device: &Device) -> Result<()> {
        self.check_whole();
        self.device = None;
        Tensor::zeros(1, DType::F32, device)?;
        self.device = Some(OnDevice::new(self, device));
        self.values = Values::fresh();
        (self.precision, self.base_packed, self.int8) = (None, false, None);
        self.layers.iter_mut().flat_map(Layer::linears_mut).for_each(Linear::release_base);
        self.head.iter_mut().for_each(Head::release);
        Ok(())
    }

    /// Whether what is sampled with weights in this format has, to the last bit, the log-probabilities that training computes.
    pub fn one_forward(&self, format: WeightFormat) -> bool {
        self.device.is_none() && format == WeightFormat::Full
    }

    /// The device that passes run on, if it is not this processor with the engine's own kernels.
    pub fn device(&self) -> Option<&Device> {
        self.device.as_ref().map(OnDevice::device)
    }
}

/// The number format of the operands of products.
fn product_type(precision: Precision) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    }
}

/// A matrix product with operands of this type, its result in f32. An operand is laid out densely or as the transpose of
/// something dense, which is all that the devices' libraries take.
fn product(of: DType, a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    dense(&a.to_dtype(of)?)?.matmul(&dense(&b.to_dtype(of)?)?)?.to_dtype(DType::F32)
}

fn dense(x: &Tensor) -> candle_core::Result<Tensor> {
    match x.is_contiguous() || x.t()?.is_contiguous() {
        true => Ok(x.clone()),
        false => x.contiguous(),
    }
}

/// The gradients of `Σ piece(inputs) · d_output` with respect to each of `inputs`.
fn pull_back<const N: usize>(
    inputs: [&Tensor; N],
    d_output: &Tensor,
    piece: impl Fn([&Tensor; N]) -> candle_core::Result<Tensor>,
) -> candle_core::Result<[Tensor; N]> {
    let variables = inputs.iter().map(|input| Var::from_tensor(input)).collect::<candle_core::Result<Vec<_>>>()?;
    let output = piece(std::array::from_fn(|index| variables[index].as_tensor()))?;
    let gradients = (output * d_output)?.sum_all()?.backward()?;
    let mut result = inputs.map(Tensor::clone);
    for (slot, variable) in result.iter_mut().zip(&variables) {
        *slot = match gradients.get(variable) {
            Some(gradient) => gradient.clone(),
            None => variable.zeros_like()?,
        };
    }
    Ok(result)
}

/// Root mean square normalisation over the last dimension.
fn norm(x: &Tensor, weight: &Tensor, offset: f32, eps: f32) -> candle_core::Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?.recip()?;
    x.broadcast_mul(&scale)?.broadcast_mul(&(weight + f64::from(offset))?)
}

/// The values of a tensor, row after row.
fn to_host(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// Adds a gradient to that of a range of parameters.
fn accumulate(gradients: &mut Gradients, range: &Range<usize>, gradient: &Tensor) -> candle_core::Result<()> {
    kernels::add(gradients.range_mut(range), &to_host(gradient)?);
    Ok(())
}

impl OnDevice {
    pub fn new(decoder: &Decoder, device: &Device) -> Self {
        Self {
            device: device.clone(),
            tables: Arc::clone(&decoder.tables),
            weights: None,
            failed: None,
            pool: Pool::new(device, decoder.config.layer_count(), decoder.config.kv_size()),
        }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Copies the weights that changed. What goes wrong is told by the next pass.
    pub fn prepare(&mut self, decoder: &Decoder, precision: Precision) {
        let repack = self.weights.as_ref().is_none_or(|weights| weights.precision != precision);
        if repack || decoder.base_stale {
            // The old copies go before the new ones come.
            self.weights = None;
        }
        let copied = match &mut self.weights {
            None => Weights::copy(decoder, precision, &self.device).map(|weights| self.weights = Some(weights)),
            Some(weights) if decoder.adapter_stale => weights.copy_adapter(decoder, &self.device),
            Some(_) => Ok(()),
        };
        self.failed = copied.err().map(|error| error.to_string());
    }

    /// Checks that the weights are current.
    pub fn check_ready(&self, decoder: &Decoder) -> Result<()> {
        self.ready(decoder).map(drop)
    }

    /// The weights, if they are current.
    fn ready(&self, decoder: &Decoder) -> Result<&Weights> {
        if let Some(reason) = &self.failed {
            return Err(Error::Invalid(format!("the weights could not be copied to the device: {reason}")));
        }
        if decoder.generation == WeightFormat::Int8 {
            return Err(Error::unsupported(
                "generation with 8-bit weights on a device",
                "use full weights: rollout_weights = \"full\"",
            ));
        }
        let stale = decoder.base_stale || (decoder.adapter_stale && decoder.adapter.is_some());
        self.weights.as_ref().filter(|_| !stale).ok_or_else(super::not_prepared)
    }

    /// The windows that layers have.
    fn windows(decoder: &Decoder) -> Vec<Option<usize>> {
        let windows: BTreeSet<Option<usize>> = decoder.layers.iter().map(|layer| layer.shape.window).collect();
        windows.into_iter().collect()
    }

    /// [`Decoder::forward_with_embeddings`].
    pub fn forward(
        &self,
        decoder: &Decoder,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        keep: bool,
        change: Option<EmbeddingChange<'_>>,
    ) -> Result<()> {
        let positions = tokens.positions();
        let spans: Vec<Span> = tokens.segments().iter().map(|segment| Span::of_segment(tokens, segment)).collect();
        let plan =
            Plan::new(&self.device, &decoder.layers[0].shape, &Self::windows(decoder), &spans, tokens.rows(), keep)?;
        let embedded = self.embed(decoder, tokens.ids(), change)?;
        self.run(decoder, embedded, &positions, plan, None, workspace, keep)
    }

    /// Generation: appends tokens to sequences whose keys and values lie in the pool. `spans` says which rows see what.
    pub fn append(
        &self,
        decoder: &Decoder,
        ids: &[u32],
        positions: &[u32],
        spans: &[Span],
        new: &[u32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        let plan = Plan::new(&self.device, &decoder.layers[0].shape, &Self::windows(decoder), spans, ids.len(), false)?;
        self.run(decoder, self.embed(decoder, ids, None)?, positions, plan, Some(new), workspace, false)
    }

    /// The stack over embedded rows. With `new`, keys and values go to these rows of the pool, and attention reads the pool.
    #[allow(clippy::too_many_arguments, reason = "the rows of one pass, and where their keys and values live")]
    fn run(
        &self,
        decoder: &Decoder,
        embedded: Tensor,
        positions: &[u32],
        plan: Plan,
        new: Option<&[u32]>,
        workspace: &mut Workspace,
        keep: bool,
    ) -> Result<()> {
        let weights = self.ready(decoder)?;
        let d = decoder.config.hidden_size;
        workspace.device = KeptOnDevice::default();
        workspace.rows = positions.len();
        let pass = Pass { plan, angles: self.angles(positions)? };
        let new = new.map(|rows| self.pool.places(rows)).transpose()?;
        let mut x = embedded.clone();
        let mut kept_layers = Vec::new();
        for (layer, weights) in decoder.layers.iter().zip(&weights.layers) {
            let cached = new.as_ref().map(|new| (&*self.pool, new));
            let (output, kept) = weights.forward(layer, decoder.adapter_is_on(), &pass, cached, &x)?;
            x = output;
            // With checkpointing, the input alone is kept.
            match (keep, workspace.checkpoints()) {
                (true, true) => kept_layers.push(kept.input_alone()),
                (true, false) => kept_layers.push(kept),
                (false, _) => {}
            }
        }
        let (offset, eps) = (decoder.config.norm_weight_offset, decoder.config.eps);
        workspace.hidden = to_host(&norm(&x, &weights.final_norm, offset, eps)?)?;
        if let Some(found) = NonFinite::find(None, "final hidden state", &workspace.hidden, d) {
            return Err(self.blame(decoder, weights, &pass, new.as_ref(), embedded)?.unwrap_or(found).into());
        }
        if keep {
            workspace.device = KeptOnDevice { layers: kept_layers, last: Some(x), pass: Some(pass) };
        }
        Ok(())
    }

    /// Runs the stack again to find the layer in which a value that is no number first appears.
    fn blame(
        &self,
        decoder: &Decoder,
        weights: &Weights,
        pass: &Pass,
        new: Option<&Tensor>,
        mut x: Tensor,
    ) -> Result<Option<NonFinite>> {
        let d = decoder.config.hidden_size;
        if let Some(found) = NonFinite::find(None, "embedding", &to_host(&x)?, d) {
            return Ok(Some(found));
        }
        for (layer, weights) in decoder.layers.iter().zip(&weights.layers) {
            let cached = new.map(|new| (&*self.pool, new));
            x = weights.forward(layer, decoder.adapter_is_on(), pass, cached, &x)?.0;
            if let Some(found) = NonFinite::find(Some(layer.index), "layer output", &to_host(&x)?, d) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The embeddings of tokens, looked up and changed where they lie.
    fn embed(&self, decoder: &Decoder, ids: &[u32], change: Option<EmbeddingChange<'_>>) -> Result<Tensor> {
        if ids.is_empty() {
            return Err(Error::Invalid("the batch is empty".into()));
        }
        let d = decoder.config.hidden_size;
        let embedding = &decoder.base[decoder.embedding.clone()];
        let mut rows = Vec::with_capacity(ids.len() * d);
        ids.iter().for_each(|&id| rows.extend_from_slice(&embedding[id as usize * d..][..d]));
        if decoder.config.embedding_scale != 1.0 {
            kernels::scale(&mut rows, decoder.config.embedding_scale);
        }
        if let Some(change) = change {
            rows.chunks_exact_mut(d).enumerate().for_each(|(row, embedding)| change(row, embedding));
        }
        Ok(Tensor::from_vec(rows, (ids.len(), d), &self.device)?)
    }

    /// Cosines and sines of rows at these positions.
    fn angles(&self, positions: &[u32]) -> Result<Vec<(Tensor, Tensor)>> {
        let of = |table: &RopeTable| {
            let rows: Vec<&[f32]> = positions.iter().map(|&position| table.row(position as usize)).collect();
            let width = rows.first().map_or(0, |row| row.len());
            let rows = Tensor::from_vec(rows.concat(), (positions.len(), 1, width), &self.device)?;
            Ok((rows.narrow(2, 0, width / 2)?.contiguous()?, rows.narrow(2, width / 2, width / 2)?.contiguous()?))
        };
        self.tables.iter().map(of).collect()
    }

    /// [`Decoder::backward_hidden`].
    pub fn backward_hidden(
        &self,
        decoder: &Decoder,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        d_hidden: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let weights = self.ready(decoder)?;
        let d = decoder.config.hidden_size;
        let KeptOnDevice { layers, last, pass } = std::mem::take(&mut workspace.device);
        let (Some(last), Some(pass)) = (last, pass.filter(|_| workspace.rows == tokens.rows())) else {
            return Err(super::nothing_kept());
        };
        let trains_base = decoder.adapter.is_none();
        let (offset, eps) = (decoder.config.norm_weight_offset, decoder.config.eps);
        let d_hidden = Tensor::from_slice(d_hidden, (tokens.rows(), d), &self.device)?;
        let [mut d_residual, d_weight] =
            pull_back([&last, &weights.final_norm], &d_hidden, |[x, weight]| norm(x, weight, offset, eps))?;
        if trains_base {
            accumulate(gradients, &decoder.final_norm, &d_weight)?;
        }
        let forward = decoder.layers.iter().zip(&weights.layers).zip(layers);
        for ((layer, weights), kept) in forward.skip(decoder.lowest_trained()).rev() {
            d_residual = weights.backward(layer, trains_base, &pass, kept, &d_residual, gradients)?;
        }
        if trains_base {
            let d_residual = to_host(&d_residual)?;
            for segment in tokens.segments() {
                for row in segment.start..segment.start + segment.len {
                    let gradient = &d_residual[row * d..][..d];
                    gradients.add_input_embedding(tokens.ids()[row], gradient, decoder.config.embedding_scale);
                }
            }
        }
        Ok(())
    }
}

impl Weights {
    fn copy(source: &Decoder, precision: Precision, device: &Device) -> candle_core::Result<Self> {
        let of = product_type(precision);
        let layers = source.layers.iter().map(|layer| LayerWeights::copy(layer, &source.base, of, device));
        let norm = &source.base[source.final_norm.clone()];
        let head = source.head.as_ref().map(|head| {
            let weight = &source.base[head.weight.clone()];
            Tensor::from_slice(weight, (head.vocabulary, head.hidden), device)?.to_dtype(of)
        });
        let mut weights = Self {
            precision,
            layers: layers.collect::<candle_core::Result<_>>()?,
            final_norm: Tensor::from_slice(norm, norm.len(), device)?,
            head: head.transpose()?,
        };
        weights.copy_adapter(source, device)?;
        Ok(weights)
    }

    fn copy_adapter(&mut self, source: &Decoder, device: &Device) -> candle_core::Result<()> {
        for (weights, layer) in self.layers.iter_mut().zip(&source.layers) {
            weights.copy_adapter(layer, source.adapter.as_ref().map(|adapter| &adapter.values[..]), device)?;
        }
        Ok(())
    }
}
