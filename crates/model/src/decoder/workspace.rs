//! Memory that a forward and a backward reuse from step to step.

use super::device::KeptOnDevice;
use crate::config::ModelConfig;

/// Activations and scratch space of one forward and backward at a time.
///
/// It grows to the largest batch it has seen and stays there, so that a long run does not allocate as it goes.
#[derive(Default)]
pub struct Workspace {
    checkpointing: bool,
    /// Rows of the last forward.
    pub(super) rows: usize,
    /// What the last forward left for backward.
    pub(super) kept: Kept,
    pub(super) positions: Vec<u32>,
    /// The residual stream at the input of each layer and of the final norm. Where nothing is kept for backward, two
    /// entries take turns.
    pub(super) stream: Vec<Vec<f32>>,
    /// The activations of each layer; one entry for all where they are not kept.
    pub(super) layers: Vec<Activations>,
    pub(super) scratch: Scratch,
    /// The gradient of the residual stream.
    pub(super) d_residual: Vec<f32>,
    pub(super) final_inverse_rms: Vec<f32>,
    /// The final norm's output.
    pub(super) hidden: Vec<f32>,
    /// The gradient of `hidden`.
    pub(super) d_hidden: Vec<f32>,
    pub(super) head: HeadScratch,
    /// What the last forward left on the device, where the decoder is on one.
    pub(super) device: KeptOnDevice,
}

/// What a forward leaves for backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kept {
    #[default]
    Nothing,
    /// The residual stream: backward computes each layer's activations again.
    Stream,
    /// The residual stream and the activations of every layer.
    Everything,
}

impl Kept {
    /// The place of a layer's input among the entries of [`Workspace::stream`].
    pub fn input(self, layer: usize) -> usize {
        if self == Self::Nothing { layer % 2 } else { layer }
    }

    /// The place of a layer among the entries of [`Workspace::layers`].
    pub fn activations(self, layer: usize) -> usize {
        if self == Self::Everything { layer } else { 0 }
    }
}

/// What one layer's backward needs of its forward, beside the layer's input. Normed rows and the gated product are
/// recomputed instead.
#[derive(Default)]
pub(super) struct Activations {
    /// Queries, keys and values after bias, head norm and rotation.
    pub qkv: Vec<f32>,
    /// Queries and keys before their head norms.
    pub q_input: Vec<f32>,
    pub k_input: Vec<f32>,
    pub q_inverse_rms: Vec<f32>,
    pub k_inverse_rms: Vec<f32>,
    pub attention: Vec<f32>,
    pub log_sum_exp: Vec<f32>,
    /// The sublayers' outputs before their post norms.
    pub attention_output: Vec<f32>,
    pub mlp_output: Vec<f32>,
    /// The residual stream between attention and MLP.
    pub middle: Vec<f32>,
    pub gate_up: Vec<f32>,
    /// `scale · x Aᵀ` of the layer's four linears.
    pub low_rank: [Vec<f32>; 4],
}

/// Buffers that live within one layer's forward or backward.
#[derive(Default)]
pub(super) struct Scratch {
    pub normed: Vec<f32>,
    pub inverse_rms: Vec<f32>,
    pub branch: Vec<f32>,
    /// The gated activation; in backward its gradient before.
    pub gated: Vec<f32>,
    pub d_normed: Vec<f32>,
    pub d_attention: Vec<f32>,
    pub d_qkv: Vec<f32>,
    pub d_low_rank: Vec<f32>,
}

/// Buffers of the fused head.
#[derive(Default)]
pub(super) struct HeadScratch {
    pub hidden: Vec<f32>,
    pub d_hidden: Vec<f32>,
    pub logits: Vec<f32>,
}

impl Workspace {
    /// An empty workspace.
    pub fn new() -> Self {
        Self::default()
    }

    /// With activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174), a
    /// forward for training keeps the input of each layer alone, and backward computes one layer's forward again at a time:
    /// a fraction of the memory for about one more forward. Results are the same to the last bit.
    pub fn set_checkpointing(&mut self, on: bool) {
        self.checkpointing = on;
        if on {
            self.layers.truncate(1);
        }
    }

    /// Whether a forward for training keeps the input of each layer alone.
    pub(super) fn checkpoints(&self) -> bool {
        self.checkpointing
    }

    /// Gives all memory back; how a forward keeps its activations stays as it was set.
    pub fn release(&mut self) {
        *self = Self { checkpointing: self.checkpointing, ..Self::default() };
    }

    /// The hidden states of the last forward or decode after the final norm: rows × hidden size.
    pub fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    /// Sizes what every forward uses.
    pub(super) fn fit(&mut self, config: &ModelConfig, rows: usize, low_rank: [usize; 4], keep: bool) {
        self.fit_kept(config, rows, low_rank, keep);
        let d = config.hidden_size;
        let scratch = &mut self.scratch;
        resize(&mut scratch.normed, rows * d);
        resize(&mut scratch.inverse_rms, rows);
        resize(&mut scratch.gated, rows * config.intermediate_size);
    }

    /// Sizes what a forward leaves.
    pub(super) fn fit_kept(&mut self, config: &ModelConfig, rows: usize, low_rank: [usize; 4], keep: bool) {
        let d = config.hidden_size;
        self.rows = rows;
        self.kept = match (keep, self.checkpointing) {
            (false, _) => Kept::Nothing,
            (true, true) => Kept::Stream,
            (true, false) => Kept::Everything,
        };
        let layers = config.layer_count();
        let stream = if keep { layers + 1 } else { 2 };
        if self.stream.len() < stream {
            self.stream.resize_with(stream, Vec::new);
        }
        self.stream[..stream].iter_mut().for_each(|input| resize(input, rows * d));
        let kept = if self.kept == Kept::Everything { layers } else { 1 };
        if self.layers.len() < kept {
            self.layers.resize_with(kept, Activations::default);
        }
        self.layers[..kept].iter_mut().for_each(|layer| layer.fit(config, rows, low_rank));
        resize(&mut self.hidden, rows * d);
        resize(&mut self.final_inverse_rms, rows);
    }

    /// Exchanges what forwards left. Memory that holds nothing between passes stays where it is.
    pub(super) fn exchange_kept(&mut self, other: &mut Self) {
        std::mem::swap(self, other);
        std::mem::swap(&mut self.scratch, &mut other.scratch);
        std::mem::swap(&mut self.d_residual, &mut other.d_residual);
        std::mem::swap(&mut self.d_hidden, &mut other.d_hidden);
        std::mem::swap(&mut self.head, &mut other.head);
    }

    /// The buffers that a forward leaves for backward, see [`Kept`].
    pub(super) fn recorded(&mut self, layers: usize) -> impl Iterator<Item = &mut Vec<f32>> {
        let kept = if self.kept == Kept::Everything { layers } else { 0 };
        let activations = self.layers[..kept].iter_mut().flat_map(Activations::buffers_mut);
        let stream = &mut self.stream[..layers + 1];
        stream.iter_mut().chain(activations).chain([&mut self.hidden, &mut self.final_inverse_rms])
    }

    /// Sizes what only backward uses.
    pub(super) fn fit_backward(&mut self, config: &ModelConfig, low_rank: [usize; 4]) {
        let rows = self.rows;
        resize(&mut self.d_residual, rows * config.hidden_size);
        let scratch = &mut self.scratch;
        if config.sandwich_norms {
            resize(&mut scratch.branch, rows * config.hidden_size);
        }
        resize(&mut scratch.d_normed, rows * config.hidden_size);
        resize(&mut scratch.d_attention, rows * config.q_size());
        resize(&mut scratch.d_qkv, rows * (config.q_size() + 2 * config.kv_size()));
        resize(&mut scratch.d_low_rank, rows * low_rank.into_iter().max().unwrap_or(0));
    }

    /// Bytes held on the host.
    pub fn bytes(&self) -> usize {
        let scratch = &self.scratch;
        let head = &self.head;
        let own = [
            &self.d_residual,
            &self.final_inverse_rms,
            &self.hidden,
            &self.d_hidden,
            &scratch.normed,
            &scratch.inverse_rms,
            &scratch.branch,
            &scratch.gated,
            &scratch.d_normed,
            &scratch.d_attention,
            &scratch.d_qkv,
            &scratch.d_low_rank,
            &head.hidden,
            &head.d_hidden,
            &head.logits,
        ];
        let own: usize = own.into_iter().chain(&self.stream).map(Vec::capacity).sum();
        4 * (own + self.positions.capacity() + self.layers.iter().map(Activations::len).sum::<usize>())
    }
}

impl Activations {
    fn fit(&mut self, config: &ModelConfig, rows: usize, low_rank: [usize; 4]) {
        let (d, q, kv) = (config.hidden_size, config.q_size(), config.kv_size());
        resize(&mut self.qkv, rows * (q + 2 * kv));
        if config.qk_norm {
            resize(&mut self.q_input, rows * q);
            resize(&mut self.k_input, rows * kv);
            resize(&mut self.q_inverse_rms, rows * config.heads);
            resize(&mut self.k_inverse_rms, rows * config.kv_heads);
        }
        resize(&mut self.attention, rows * q);
        resize(&mut self.log_sum_exp, rows * config.heads);
        if config.sandwich_norms {
            resize(&mut self.attention_output, rows * d);
            resize(&mut self.mlp_output, rows * d);
        }
        resize(&mut self.middle, rows * d);
        resize(&mut self.gate_up, rows * 2 * config.intermediate_size);
        for (buffer, width) in self.low_rank.iter_mut().zip(low_rank) {
            resize(buffer, rows * width);
        }
    }

    /// All buffers, in one order.
    pub(super) fn buffers(&self) -> impl Iterator<Item = &Vec<f32>> {
        let Self { qkv, q_input, k_input, q_inverse_rms, k_inverse_rms, attention, log_sum_exp, .. } = self;
        let Self { attention_output, mlp_output, middle, gate_up, low_rank, .. } = self;
        let own = [qkv, q_input, k_input, q_inverse_rms, k_inverse_rms, attention, log_sum_exp];
        own.into_iter().chain([attention_output, mlp_output, middle, gate_up]).chain(low_rank)
    }

    /// [`Activations::buffers`], to be written to.
    pub(super) fn buffers_mut(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        let Self { qkv, q_input, k_input, q_inverse_rms, k_inverse_rms, attention, log_sum_exp, .. } = self;
        let own = [qkv, q_input, k_input, q_inverse_rms, k_inverse_rms, attention, log_sum_exp];
        let Self { attention_output, mlp_output, middle, gate_up, low_rank, .. } = self;
        own.into_iter().chain([attention_output, mlp_output, middle, gate_up]).chain(low_rank)
    }

    fn len(&self) -> usize {
        self.buffers().map(Vec::capacity).sum()
    }
}

/// Sets the length, never giving memory back. New elements are zero, old ones keep whatever they held.
pub(super) fn resize(buffer: &mut Vec<f32>, len: usize) {
    if buffer.capacity() < len {
        // A fresh allocation of zeros costs no copy of contents that nobody will read, and no pages until written.
        *buffer = kernels::zeros(len);
    } else {
        buffer.resize(len, 0.0);
    }
}
