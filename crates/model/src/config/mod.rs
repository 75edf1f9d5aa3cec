//! The shape of a decoder: everything the engine must know beside the weights.
//!
//! One block serves five families. They differ in the few switches of [`ModelConfig`], which come from a Hugging Face
//! `config.json` ([`ModelConfig::from_json`]), from GGUF metadata, or from a preset ([`ModelConfig::tiny`]). Whatever
//! the block does not do is refused by name, never ignored.

mod json;
mod rope;
mod score;

use std::fmt;

pub use kernels::Activation;
pub use rope::{RopeConfig, RopeScaling};
pub use score::{HeadTask, ScoreHead};

use crate::error::{Error, Result};

/// The families of decoders, named after the model that set the shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// LLaMA 2/3, SmolLM2 and everything of that shape.
    Llama,
    /// LLaMA with a sliding window on every layer.
    Mistral,
    /// LLaMA with biases on q, k and v (Qwen2, Qwen2.5).
    Qwen2,
    /// RMSNorm on every head of q and k.
    Qwen3,
    /// Norms before and after both sublayers, (1 + weight) norms, GELU, scaled embeddings, local and global layers.
    Gemma3,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 5] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Gemma3];

    /// The class name in the `architectures` list of `config.json`.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Gemma3 => "Gemma3ForCausalLM",
        }
    }

    /// The `model_type` of `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3_text",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3",
        })
    }
}

/// What one layer's attention sees and how it encodes positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerAttention {
    /// With `Some(w)` a query sees itself and the `w - 1` tokens before it; with `None` every earlier token.
    pub window: Option<usize>,
    /// Index into [`ModelConfig::ropes`].
    pub rope: usize,
}

/// Everything the decoder needs to know beside its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Where the shape comes from; the engine reads the switches below, not this.
    pub family: Family,
    /// Rows of the embedding. May exceed the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even. `heads * head_dim` need not equal `hidden_size`.
    pub head_dim: usize,
    /// The output head is the embedding.
    pub tied_head: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// RMSNorm on every head of q and k, before the rotation.
    pub qk_norm: bool,
    /// Norms multiply by `norm_weight_offset + weight`: 1 for Gemma, else 0.
    pub norm_weight_offset: f32,
    /// Further norms after attention and after the MLP, before each is added to the residual stream (Gemma).
    pub sandwich_norms: bool,
    /// The MLP's non-linearity.
    pub activation: Activation,
    /// Embeddings are multiplied by this: sqrt(hidden_size) for Gemma, else 1.
    pub embedding_scale: f32,
    /// Scores are multiplied by this: 1/sqrt(head_dim) but for Gemma, which names its own.
    pub attention_scale: f32,
    /// One entry per layer.
    pub layers: Vec<LayerAttention>,
    /// The rotary tables that `layers` point at: one, or for Gemma the global and the local one.
    pub ropes: Vec<RopeConfig>,
    /// Added to the mean square inside RMSNorm.
    pub eps: f32,
    /// The longest sequence the model was made for.
    pub max_positions: usize,
    /// Begin of sequence, where the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// Padding, where the model has one.
    pub pad_token_id: Option<u32>,
    /// The head that gives numbers instead of tokens, where the model has one.
    pub score: Option<ScoreHead>,
}

/// No model has more layers; a larger count is a damaged file.
pub(crate) const MAX_LAYERS: usize = 1024;
/// No model has a larger width of anything; a larger one is a damaged file.
const MAX_SIZE: usize = 1 << 24;

impl ModelConfig {
    /// Number of layers.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// Width of a query row: `heads * head_dim`.
    pub fn q_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of a key (or value) row: `kv_heads * head_dim`.
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Number of weights; a tied head counts once.
    pub fn parameter_count(&self) -> usize {
        self.tensor_shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// Every tensor of the model by its Hugging Face name, with its shape (`[out, in]` for linear layers): embedding,
    /// layers in order, final norm, the language model's head unless it is tied or absent, the score head.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (d, ffn) = (self.hidden_size, self.intermediate_size);
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, d])];
        for layer in 0..self.layers.len() {
            let mut add = |name: &str, shape: Vec<usize>| shapes.push((format!("model.layers.{layer}.{name}"), shape));
            add("input_layernorm.weight", vec![d]);
            for (projection, rows) in [("q", self.q_size()), ("k", self.kv_size()), ("v", self.kv_size())] {
                add(&format!("self_attn.{projection}_proj.weight"), vec![rows, d]);
                if self.qkv_bias {
                    add(&format!("self_attn.{projection}_proj.bias"), vec![rows]);
                }
            }
            if self.qk_norm {
                add("self_attn.q_norm.weight", vec![self.head_dim]);
                add("self_attn.k_norm.weight", vec![self.head_dim]);
            }
            add("self_attn.o_proj.weight", vec![d, self.q_size()]);
            add("post_attention_layernorm.weight", vec![d]);
            if self.sandwich_norms {
                add("pre_feedforward_layernorm.weight", vec![d]);
            }
            add("mlp.gate_proj.weight", vec![ffn, d]);
            add("mlp.up_proj.weight", vec![ffn, d]);
            add("mlp.down_proj.weight", vec![d, ffn]);
            if self.sandwich_norms {
                add("post_feedforward_layernorm.weight", vec![d]);
            }
        }
        shapes.push(("model.norm.weight".to_owned(), vec![d]));
        if !self.tied_head && self.has_language_head() {
            shapes.push(("lm_head.weight".to_owned(), vec![self.vocab_size, d]));
        }
        shapes.extend(self.score.iter().flat_map(|score| score.tensor_shapes("", d)));
        shapes
    }

    /// The family's fixed switches around the sizes, with full attention and one plain rotary table everywhere.
    pub(crate) fn of_family(family: Family, sizes: Sizes) -> Self {
        let gemma = family == Family::Gemma3;
        Self {
            family,
            vocab_size: sizes.vocab_size,
            hidden_size: sizes.hidden_size,
            intermediate_size: sizes.intermediate_size,
            heads: sizes.heads,
            kv_heads: sizes.kv_heads,
            head_dim: sizes.head_dim,
            tied_head: true,
            qkv_bias: family == Family::Qwen2,
            qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
            norm_weight_offset: if gemma { 1.0 } else { 0.0 },
            sandwich_norms: gemma,
            activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
            embedding_scale: if gemma { (sizes.hidden_size as f64).sqrt() as f32 } else { 1.0 },
            attention_scale: (1.0 / (sizes.head_dim as f64).sqrt()) as f32,
            layers: vec![LayerAttention { window: None, rope: 0 }; sizes.layers],
            ropes: vec![RopeConfig::plain(10_000.0)],
            eps: 1e-6,
            max_positions: sizes.max_positions,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
            score: None,
        }
    }

    /// A model small enough for tests, with everything its family does switched on: 2 layers, width 64, grouped query
    /// heads, and where the family has them a window of 8, two rotary tables, `head_dim` unlike `hidden_size / heads`.
    pub fn tiny(family: Family, vocab_size: usize) -> Self {
        let (heads, kv_heads, head_dim) = match family {
            Family::Llama | Family::Mistral | Family::Qwen2 => (4, 2, 16),
            Family::Qwen3 => (4, 2, 24),
            Family::Gemma3 => (4, 1, 32),
        };
        let sizes = Sizes {
            vocab_size,
            hidden_size: 64,
            intermediate_size: 144,
            layers: 2,
            heads,
            kv_heads,
            head_dim,
            max_positions: 512,
        };
        let mut config = Self::of_family(family, sizes);
        match family {
            Family::Llama => {}
            Family::Mistral => {
                config.tied_head = false;
                config.layers.fill(LayerAttention { window: Some(8), rope: 0 });
            }
            Family::Qwen2 => config.ropes = vec![RopeConfig::plain(1e6)],
            Family::Qwen3 => config.tied_head = false,
            Family::Gemma3 => {
                config.attention_scale = 1.0 / 6.0;
                config.ropes = vec![RopeConfig::plain(1e6), RopeConfig::plain(1e4)];
                config.layers =
                    vec![LayerAttention { window: Some(8), rope: 1 }, LayerAttention { window: None, rope: 0 }];
            }
        }
        config
    }

    /// A LLaMA-shaped model of about a million weights that learns a simple task from scratch in a minute on a CPU:
    /// 4 layers, width 128.
    pub fn small(vocab_size: usize) -> Self {
        Self::of_family(
            Family::Llama,
            Sizes {
                vocab_size,
                hidden_size: 128,
                intermediate_size: 384,
                layers: 4,
                heads: 4,
                kv_heads: 2,
                head_dim: 32,
                max_positions: 1024,
            },
        )
    }

    /// The shape of SmolLM2-135M.
    pub fn smollm2_135m() -> Self {
        let sizes = Sizes {
            vocab_size: 49152,
            hidden_size: 576,
            intermediate_size: 1536,
            layers: 30,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            max_positions: 8192,
        };
        Self { ropes: vec![RopeConfig::plain(1e5)], ..Self::of_family(Family::Llama, sizes) }
    }

    /// Checks the sizes against each other, so that later products cannot overflow or divide by zero.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("num_attention_heads * head_dim", self.heads.saturating_mul(self.head_dim)),
            ("max_position_embeddings", self.max_positions),
        ];
        for (name, size) in sizes {
            if size == 0 || size > MAX_SIZE {
                return Err(Error::malformed(name, format!("expected 1 to {MAX_SIZE}, found {size}")));
            }
        }
        if self.layers.is_empty() || self.layers.len() > MAX_LAYERS {
            let found = self.layers.len();
            return Err(Error::malformed("num_hidden_layers", format!("expected 1 to {MAX_LAYERS}, found {found}")));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            return Err(Error::malformed("num_key_value_heads", format!("{kv_heads} does not divide {heads} heads")));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::malformed("head_dim", format!("expected an even number, found {}", self.head_dim)));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return Err(Error::malformed("rms_norm_eps", format!("expected a positive number, found {}", self.eps)));
        }
        for (name, scale) in [("attention", self.attention_scale), ("embedding", self.embedding_scale)] {
            if !(scale.is_finite() && scale > 0.0) {
                return Err(Error::malformed(name, format!("expected a positive scale, found {scale}")));
            }
        }
        for (index, layer) in self.layers.iter().enumerate() {
            if layer.rope >= self.ropes.len() || layer.window == Some(0) {
                return Err(Error::malformed(format!("layer {index}"), "a window of 0 or an unknown rotary table"));
            }
        }
        self.score.map_or(Ok(()), ScoreHead::validate)?;
        self.ropes.iter().try_for_each(RopeConfig::validate)
    }
}

/// The sizes that every family shares.
pub(crate) struct Sizes {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub max_positions: usize,
}
