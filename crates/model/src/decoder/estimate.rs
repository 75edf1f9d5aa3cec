//! What a run will need, before any of it is allocated.

use kernels::Precision;

use super::head::chunk_rows;
use crate::config::ModelConfig;
use crate::lora::LoraConfig;

/// Memory in bytes and work in floating-point operations, from the shapes alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The weights, and an adapter's.
    pub weights: usize,
    /// Their packed copies.
    pub packed: usize,
    /// A copy of the model that only scores, see [`Decoder::packed_copy`](super::Decoder::packed_copy).
    pub scoring_copy: usize,
    /// Number of trained parameters.
    pub trained: usize,
    /// Their gradients.
    pub gradients: usize,
    /// The workspace of a forward that keeps its activations, and of its backward.
    pub activations: usize,
    /// The same with activation checkpointing, see [`Workspace::set_checkpointing`](super::Workspace::set_checkpointing).
    pub checkpointed_activations: usize,
    /// Keys and values of one token of one sequence, in generation.
    pub cache_per_token: usize,
    /// Operations of one token's forward, attention at the given context included.
    pub forward_flops_per_token: f64,
    /// Operations of one token's forward and backward.
    pub training_flops_per_token: f64,
    /// Operations that activation checkpointing adds to these.
    pub checkpointing_flops_per_token: f64,
}

impl Estimate {
    /// The needs of training `config` with micro-batches of `rows` tokens in sequences of `context` tokens.
    pub fn new(
        config: &ModelConfig,
        lora: Option<&LoraConfig>,
        precision: Precision,
        rows: usize,
        context: usize,
    ) -> Self {
        let (d, q, kv, mlp) = (config.hidden_size, config.q_size(), config.kv_size(), config.intermediate_size);
        let layers = config.layer_count();
        let linears = [(d, q + 2 * kv), (q, d), (d, 2 * mlp), (mlp, d)];
        let products = layers * linears.iter().map(|(inputs, outputs)| inputs * outputs).sum::<usize>();
        let vocabulary = if config.has_language_head() { config.vocab_size } else { 0 };
        let head = vocabulary * d;
        let base = config.parameter_count();
        let adapter = lora.map(|lora| adapter_size(config, lora));
        let trained = adapter.unwrap_or(base);
        let low_rank = lora.map_or(0, |lora| lora.r * lora.target_modules.len());

        let mut kept = d + (q + 2 * kv) + q + config.heads + 2 * mlp + low_rank;
        if config.qk_norm {
            kept += q + kv + config.heads + config.kv_heads;
        }
        if config.sandwich_norms {
            kept += 2 * d;
        }
        let stream = (layers + 1) * d;
        let shared = 5 * d + (q + 2 * kv) + q + mlp + if config.sandwich_norms { d } else { 0 };
        let logits = match vocabulary {
            0 => 0,
            size => chunk_rows(size, rows).min(rows) * (size + 2 * d),
        };
        let activations = |slots: usize| 4 * (rows * (stream + slots * kept + shared) + logits);

        let packed_bytes = match precision {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        };
        // A query sees half of its context on average, or its window.
        let seen = |layer: &crate::config::LayerAttention| layer.window.map_or(context / 2, |w| w.min(context / 2));
        let attention_from =
            |lowest: usize| -> f64 { config.layers[lowest..].iter().map(|layer| 4.0 * (q * seen(layer)) as f64).sum() };
        let attention = attention_from(0);
        let dense = 2.0 * (products + head) as f64;
        let update = 2.0 * adapter.unwrap_or(0) as f64;
        let forward = dense + attention + update;
        // Backward, down to the lowest layer that is trained: one product for the gradient of the input, one for that of each
        // trained weight; the head once more.
        let lowest = lora.map_or(0, LoraConfig::lowest_layer).min(layers - 1);
        let inputs = 2.0 * (products / layers * (layers - lowest) + head) as f64;
        let weight_gradients = if adapter.is_some() { 2.0 * update } else { dense };
        let training = forward + inputs + weight_gradients + 2.0 * attention_from(lowest) + 2.0 * head as f64;
        Self {
            weights: 4 * (base + adapter.unwrap_or(0)),
            packed: packed_bytes * (products + head),
            scoring_copy: packed_bytes * (products + head) + 4 * (base - products),
            gradients: 4 * trained,
            trained,
            activations: activations(layers),
            checkpointed_activations: activations(1),
            cache_per_token: 2 * packed_bytes * layers * kv,
            forward_flops_per_token: forward,
            training_flops_per_token: training,
            checkpointing_flops_per_token: 2.0 * (products - layers * mlp * d) as f64 + attention + update,
        }
    }
}

/// Number of weights of an adapter, and of the score head that is trained with it.
fn adapter_size(config: &ModelConfig, lora: &LoraConfig) -> usize {
    use crate::lora::TargetModule as Module;
    let (d, q, kv, mlp) = (config.hidden_size, config.q_size(), config.kv_size(), config.intermediate_size);
    let sides = |module: &Module| match module {
        Module::QProj => d + q,
        Module::KProj | Module::VProj => d + kv,
        Module::OProj => q + d,
        Module::GateProj | Module::UpProj | Module::DownProj => d + mlp,
    };
    let score = config.score.map_or(0, |head| head.outputs * (d + usize::from(head.has_bias())));
    let layers = (0..config.layer_count()).filter(|layer| lora.adapts(*layer)).count();
    layers * lora.r * lora.target_modules.iter().map(sides).sum::<usize>() + score
}
