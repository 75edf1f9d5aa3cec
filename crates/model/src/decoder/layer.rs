//! One decoder layer, forward and backward side by side.
//!
//! ```text
//! x = x + post_norm?(W_o · attention(rope(head_norm?(W_qkv · norm(x) + b))))
//! x = x + post_norm?(W_down · (act(W_gate · norm(x)) ∘ (W_up · norm(x))))
//! ```
//! `post_norm` is Gemma's, `head_norm` Qwen3's and Gemma's, `b` Qwen2's. In bf16, attention's keys and values are rounded like the
//! operands of products, and gradients pass the rounding unchanged; attention itself is f32.

use std::ops::Range;

use kernels::{AttentionShape, HeadRange, Precision, RopeTable, Segment};

use super::NonFinite;
use super::linear::{Linear, Products};
use super::parameters::{Gradients, Layout};
use super::workspace::{Activations, Scratch};
use crate::config::{Activation, ModelConfig};

/// The parts of one layer; weights lie in the decoder's flat parameters.
#[derive(Clone)]
pub(super) struct Layer {
    pub index: usize,
    pub shape: AttentionShape,
    /// Index of the layer's rotary table.
    pub rope: usize,
    pub eps: f32,
    pub norm_offset: f32,
    pub activation: Activation,
    pub attention_norm: Range<usize>,
    pub qkv: Linear,
    pub head_norms: Option<HeadNorms>,
    pub output: Linear,
    pub post_attention_norm: Option<Range<usize>>,
    pub mlp_norm: Range<usize>,
    pub gate_up: Linear,
    pub down: Linear,
    pub post_mlp_norm: Option<Range<usize>>,
}

/// Norms of each head's queries and keys.
#[derive(Clone)]
pub(super) struct HeadNorms {
    pub q: Range<usize>,
    pub k: Range<usize>,
}

/// What a layer shares with the others while it runs.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub products: Products<'a>,
    pub positions: &'a [u32],
    pub table: &'a RopeTable,
}

impl Layer {
    /// Lays out the weights of layer `index`.
    pub fn new(layout: &mut Layout, config: &ModelConfig, index: usize) -> Self {
        let d = config.hidden_size;
        let name = |module: &str| format!("model.layers.{index}.{module}");
        let norm =
            |layout: &mut Layout, module: &str, width| layout.push(name(&format!("{module}.weight")), vec![width]);
        let attention_norm = norm(layout, "input_layernorm", d);
        let qkv = vec![
            (name("self_attn.q_proj"), config.q_size()),
            (name("self_attn.k_proj"), config.kv_size()),
            (name("self_attn.v_proj"), config.kv_size()),
        ];
        let qkv = Linear::new(layout, qkv, d, config.qkv_bias);
        let head_norms = config.qk_norm.then(|| HeadNorms {
            q: norm(layout, "self_attn.q_norm", config.head_dim),
            k: norm(layout, "self_attn.k_norm", config.head_dim),
        });
        let output = Linear::new(layout, vec![(name("self_attn.o_proj"), d)], config.q_size(), false);
        // LLaMA calls the norm before the MLP "post attention"; Gemma's of that name does come after attention.
        let after_attention = norm(layout, "post_attention_layernorm", d);
        let (post_attention_norm, mlp_norm) = match config.sandwich_norms {
            true => (Some(after_attention), norm(layout, "pre_feedforward_layernorm", d)),
            false => (None, after_attention),
        };
        let gate_up =
            vec![(name("mlp.gate_proj"), config.intermediate_size), (name("mlp.up_proj"), config.intermediate_size)];
        let gate_up = Linear::new(layout, gate_up, d, false);
        let down = Linear::new(layout, vec![(name("mlp.down_proj"), d)], config.intermediate_size, false);
        let post_mlp_norm = config.sandwich_norms.then(|| norm(layout, "post_feedforward_layernorm", d));
        Self {
            index,
            shape: AttentionShape {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                scale: config.attention_scale,
                window: config.layers[index].window,
            },
            rope: config.layers[index].rope,
            eps: config.eps,
            norm_offset: config.norm_weight_offset,
            activation: config.activation,
            attention_norm,
            qkv,
            head_norms,
            output,
            post_attention_norm,
            mlp_norm,
            gate_up,
            down,
            post_mlp_norm,
        }
    }

    /// The four linears, in the order of [`Activations::low_rank`].
    pub fn linears(&self) -> [&Linear; 4] {
        [&self.qkv, &self.output, &self.gate_up, &self.down]
    }

    pub fn linears_mut(&mut self) -> [&mut Linear; 4] {
        [&mut self.qkv, &mut self.output, &mut self.gate_up, &mut self.down]
    }

    /// Width of the MLP between `gate_up` and `down`.
    fn mlp_width(&self) -> usize {
        self.down.inputs
    }

    /// The queries and the keys within a row of `[q | k | v]`.
    fn head_ranges(&self) -> (HeadRange, HeadRange) {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let width = (heads + 2 * kv_heads) * head_dim;
        (HeadRange { width, first: 0, heads, head_dim }, HeadRange { width, first: heads, heads: kv_heads, head_dim })
    }

    /// The part of a row that turns with the position: all queries and keys.
    fn rotated(&self) -> HeadRange {
        let (q, k) = self.head_ranges();
        HeadRange { heads: q.heads + k.heads, ..q }
    }

    fn norm(&self, pass: Pass<'_>, weight: &Range<usize>, x: &[f32], y: &mut [f32], inverse_rms: &mut [f32]) {
        kernels::rms_norm(x, &pass.products.base[weight.clone()], self.norm_offset, self.eps, y, inverse_rms);
    }

    /// The gradient of a norm whose `inverse_rms` is at hand: `dx +=`.
    #[allow(clippy::too_many_arguments, reason = "the operands of one norm and its two gradients")]
    fn norm_backward(
        &self,
        pass: Pass<'_>,
        weight: &Range<usize>,
        x: &[f32],
        inverse_rms: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        gradients: &mut Gradients,
    ) {
        let values = &pass.products.base[weight.clone()];
        let d_weight = pass.products.trains_base().then(|| gradients.range_mut(weight));
        kernels::rms_norm_backward(x, values, self.norm_offset, inverse_rms, dy, dx, d_weight);
    }

    /// Turns the layer's input into attention's operand, `kept.qkv`.
    pub fn forward_qkv(&self, pass: Pass<'_>, input: &[f32], kept: &mut Activations, scratch: &mut Scratch) {
        self.norm(pass, &self.attention_norm, input, &mut scratch.normed, &mut scratch.inverse_rms);
        self.qkv.forward(pass.products, &scratch.normed, None, &mut kept.qkv, &mut kept.low_rank[0]);
        if let Some(norms) = &self.head_norms {
            let (q, k) = self.head_ranges();
            let (q_weight, k_weight) = (&pass.products.base[norms.q.clone()], &pass.products.base[norms.k.clone()]);
            let (offset, eps) = (self.norm_offset, self.eps);
            kernels::head_norm(q, &mut kept.qkv, q_weight, offset, eps, &mut kept.q_input, &mut kept.q_inverse_rms);
            kernels::head_norm(k, &mut kept.qkv, k_weight, offset, eps, &mut kept.k_input, &mut kept.k_inverse_rms);
        }
        kernels::rope(&mut kept.qkv, self.rotated(), pass.positions, pass.table, false);
        if pass.products.precision == Precision::Bf16 {
            // As caches keep them, so that a token sees the same keys and values whether they come from there or not.
            let (q, _) = self.head_ranges();
            kernels::round_to_bf16(&mut kept.qkv, q.width, q.heads * q.head_dim..q.width);
        }
    }

    /// Attention over packed sequences: `kept.attention` from `kept.qkv`.
    pub fn attend(&self, segments: &[Segment], kept: &mut Activations) {
        kernels::attention(self.shape, segments, &kept.qkv, &mut kept.attention, &mut kept.log_sum_exp);
    }

    /// Continues from `kept.attention` to the layer's `output`, through `kept.middle` and `kept.gate_up`.
    pub fn forward_rest(
        &self,
        pass: Pass<'_>,
        input: &[f32],
        output: &mut [f32],
        kept: &mut Activations,
        scratch: &mut Scratch,
    ) {
        self.forward_middle(pass, input, kept, scratch);
        kernels::gated(self.activation, &kept.gate_up, self.mlp_width(), &mut scratch.gated);
        let low_rank = &mut kept.low_rank[3];
        match &self.post_mlp_norm {
            None => self.down.forward(pass.products, &scratch.gated, Some(&kept.middle), output, low_rank),
            Some(weight) => {
                self.down.forward(pass.products, &scratch.gated, None, &mut kept.mlp_output, low_rank);
                self.norm(pass, weight, &kept.mlp_output, output, &mut scratch.inverse_rms);
                kernels::add(output, &kept.middle);
            }
        }
    }

    /// From `kept.attention` to the input of the activation, `kept.gate_up`.
    fn forward_middle(&self, pass: Pass<'_>, input: &[f32], kept: &mut Activations, scratch: &mut Scratch) {
        let Activations { attention, attention_output, middle, gate_up, low_rank, .. } = kept;
        match &self.post_attention_norm {
            None => self.output.forward(pass.products, attention, Some(input), middle, &mut low_rank[1]),
            Some(weight) => {
                self.output.forward(pass.products, attention, None, attention_output, &mut low_rank[1]);
                self.norm(pass, weight, attention_output, middle, &mut scratch.inverse_rms);
                kernels::add(middle, input);
            }
        }
        self.norm(pass, &self.mlp_norm, middle, &mut scratch.normed, &mut scratch.inverse_rms);
        self.gate_up.forward(pass.products, &scratch.normed, None, gate_up, &mut low_rank[2]);
    }

    /// Computes the activations again from the layer's input, with the bits of the first time. The layer's output is at
    /// hand, as the next layer's input, so its last product is left out where nothing else needs it.
    pub fn recompute(
        &self,
        pass: Pass<'_>,
        segments: &[Segment],
        input: &[f32],
        kept: &mut Activations,
        scratch: &mut Scratch,
    ) {
        self.forward_qkv(pass, input, kept, scratch);
        self.attend(segments, kept);
        self.forward_middle(pass, input, kept, scratch);
        let low_rank = &mut kept.low_rank[3];
        if self.post_mlp_norm.is_some() {
            kernels::gated(self.activation, &kept.gate_up, self.mlp_width(), &mut scratch.gated);
            self.down.forward(pass.products, &scratch.gated, None, &mut kept.mlp_output, low_rank);
        } else if !low_rank.is_empty() {
            kernels::gated(self.activation, &kept.gate_up, self.mlp_width(), &mut scratch.gated);
            self.down.forward_low_rank(pass.products, &scratch.gated, low_rank);
        }
    }

    /// The gradient of the whole layer: `d_residual` goes in as the gradient of its output and comes out as that of its
    /// `input`. `kept.gate_up` is used up. Without `input_gradient` the last step, which only a lower layer or the embedding
    /// would read, is left out.
    #[allow(clippy::too_many_arguments, reason = "one pass over everything the layer kept")]
    pub fn backward(
        &self,
        pass: Pass<'_>,
        segments: &[Segment],
        input: &[f32],
        d_residual: &mut [f32],
        kept: &mut Activations,
        scratch: &mut Scratch,
        input_gradient: bool,
        gradients: &mut Gradients,
    ) {
        let products = pass.products;
        let Scratch { normed, inverse_rms, branch, gated, d_normed, d_attention, d_qkv, d_low_rank, .. } = scratch;
        // What a linear layer's weights are multiplied with is computed again right before their gradients are.

        // The MLP.
        let d_output: &[f32] = match &self.post_mlp_norm {
            None => d_residual,
            Some(weight) => {
                self.norm(pass, weight, &kept.mlp_output, normed, inverse_rms);
                branch.fill(0.0);
                self.norm_backward(pass, weight, &kept.mlp_output, inverse_rms, d_residual, branch, gradients);
                branch
            }
        };
        let low_rank = &kept.low_rank;
        let d_gated = &mut gated[..];
        self.down.input_gradient(products, d_output, Some(d_gated), d_low_rank);
        kernels::gated_backward(self.activation, &mut kept.gate_up, self.mlp_width(), d_gated);
        let d_gate_up = &kept.gate_up;
        self.down.weight_gradients(products, gated, d_output, &low_rank[3], d_low_rank, gradients);
        self.gate_up.input_gradient(products, d_gate_up, Some(d_normed), d_low_rank);
        self.norm(pass, &self.mlp_norm, &kept.middle, normed, inverse_rms);
        self.gate_up.weight_gradients(products, normed, d_gate_up, &low_rank[2], d_low_rank, gradients);
        self.norm_backward(pass, &self.mlp_norm, &kept.middle, inverse_rms, d_normed, d_residual, gradients);

        // Attention.
        let d_output: &[f32] = match &self.post_attention_norm {
            None => d_residual,
            Some(weight) => {
                self.norm(pass, weight, &kept.attention_output, normed, inverse_rms);
                branch.fill(0.0);
                self.norm_backward(pass, weight, &kept.attention_output, inverse_rms, d_residual, branch, gradients);
                branch
            }
        };
        self.output.input_gradient(products, d_output, Some(d_attention), d_low_rank);
        self.output.weight_gradients(products, &kept.attention, d_output, &low_rank[1], d_low_rank, gradients);
        kernels::attention_backward(
            self.shape,
            segments,
            &kept.qkv,
            &kept.attention,
            &kept.log_sum_exp,
            d_attention,
            d_qkv,
        );
        kernels::rope(d_qkv, self.rotated(), pass.positions, pass.table, true);
        if let Some(norms) = &self.head_norms {
            let (q, k) = self.head_ranges();
            let sides =
                [(q, &norms.q, &kept.q_input, &kept.q_inverse_rms), (k, &norms.k, &kept.k_input, &kept.k_inverse_rms)];
            for (range, weight, input, inverse_rms) in sides {
                let d_weight = products.trains_base().then(|| gradients.range_mut(weight));
                let weight = &products.base[weight.clone()];
                kernels::head_norm_backward(range, input, inverse_rms, weight, self.norm_offset, d_qkv, d_weight);
            }
        }
        self.qkv.input_gradient(products, d_qkv, input_gradient.then_some(&mut d_normed[..]), d_low_rank);
        self.norm(pass, &self.attention_norm, input, normed, inverse_rms);
        self.qkv.weight_gradients(products, normed, d_qkv, &low_rank[0], d_low_rank, gradients);
        if input_gradient {
            self.norm_backward(pass, &self.attention_norm, input, inverse_rms, d_normed, d_residual, gradients);
        }
    }

    /// Names the first tensor of the layer's forward that holds a non-finite value, given that its output does.
    pub fn blame(&self, input: &[f32], kept: &Activations, output: &[f32]) -> Option<NonFinite> {
        let d = self.output.outputs;
        let find = |name, rows, width| NonFinite::find(Some(self.index), name, rows, width);
        find("layer input", input, d)
            .or_else(|| find("queries, keys and values", &kept.qkv, self.qkv.outputs))
            .or_else(|| find("attention output", &kept.attention, self.output.inputs))
            .or_else(|| find("residual stream after attention", &kept.middle, d))
            .or_else(|| find("gate and up projections", &kept.gate_up, self.gate_up.outputs))
            .or_else(|| find("layer output", output, d))
    }
}
