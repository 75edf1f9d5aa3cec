//! What the engine's tests share: models with weights large enough for every part to matter, and batches.

use base::{Purpose, Random};
use posttrain_model::config::{Family, ModelConfig};
use posttrain_model::decoder::{Decoder, PackedTokens, Target};
use posttrain_model::lora::LoraConfig;
use posttrain_model::weights::{Tensor, Tensors};

pub const VOCABULARY: usize = 61;

/// Every family's tiny shape, and the same with the head tied the other way.
pub fn configs() -> Vec<(String, ModelConfig)> {
    let mut configs = Vec::new();
    for family in Family::ALL {
        let config = ModelConfig::tiny(family, VOCABULARY);
        let other = ModelConfig { tied_head: !config.tied_head, ..config.clone() };
        for config in [config, other] {
            configs.push((format!("{family}, {} head", if config.tied_head { "tied" } else { "own" }), config));
        }
    }
    configs
}

/// A shape whose products and attention span several tiles and panels of the kernels in every direction.
pub fn wide() -> ModelConfig {
    let mut config = ModelConfig::tiny(Family::Llama, VOCABULARY);
    config.hidden_size = 328;
    config.intermediate_size = 712;
    config.heads = 6;
    config.head_dim = 64;
    config.attention_scale = 0.125;
    config.layers[1].window = Some(70);
    config
}

/// A batch with a shared prompt for [`wide`]: several blocks of keys, odd lengths.
pub fn long_batch() -> PackedTokens {
    let mut tokens = PackedTokens::new();
    let prompt = tokens.push(&ids(5, 97), None).unwrap();
    tokens.push(&ids(6, 131), Some(prompt)).unwrap();
    tokens.push(&ids(7, 3), Some(prompt)).unwrap();
    tokens.push(&ids(8, 75), None).unwrap();
    tokens
}

/// Random weights: matrices that keep the size of their input, norms around one, biases away from zero.
pub fn weights(config: &ModelConfig, seed: u64) -> Tensors {
    let random = Random::new(seed, Purpose::Test);
    let fill = |(index, (name, shape)): (usize, (String, Vec<usize>))| {
        let random = random.prompt(index as u32);
        let (mean, deviation) = match (shape.len(), name.contains("norm")) {
            (1, true) => (1.0 - f64::from(config.norm_weight_offset), 0.2),
            (1, false) => (0.0, 0.3),
            _ => (0.0, 1.0 / (shape[1] as f64).sqrt()),
        };
        let count = shape.iter().product::<usize>() as u32;
        let data = (0..count).map(|i| (mean + deviation * random.normal(i)) as f32).collect();
        (name, Tensor::new(shape, data))
    };
    config.tensor_shapes().into_iter().enumerate().map(fill).collect()
}

pub fn decoder(config: &ModelConfig, seed: u64) -> Decoder {
    Decoder::new(config.clone(), weights(config, seed)).unwrap()
}

/// Attaches an adapter whose B is not zero.
pub fn adapt(decoder: &mut Decoder, config: &LoraConfig, seed: u64) {
    decoder.attach_lora(config, seed).unwrap();
    let random = Random::new(seed, Purpose::Test).step(9);
    for index in 0..decoder.parameters().len() {
        if decoder.parameters()[index].name.contains("lora_B") {
            let random = random.prompt(index as u32);
            for (i, value) in decoder.parameter_mut(index).iter_mut().enumerate() {
                *value = 0.2 * random.normal(i as u32) as f32;
            }
        }
    }
}

/// Random tokens.
pub fn ids(seed: u64, count: usize) -> Vec<u32> {
    let random = Random::new(seed, Purpose::Test).step(5);
    (0..count).map(|i| random.at(i as u32).below(VOCABULARY as u64) as u32).collect()
}

/// A prompt with two continuations, one of them longer than the window, and a sequence of its own; odd lengths.
pub fn batch() -> PackedTokens {
    let mut tokens = PackedTokens::new();
    let prompt = tokens.push(&ids(1, 7), None).unwrap();
    tokens.push(&ids(2, 5), Some(prompt)).unwrap();
    tokens.push(&ids(3, 12), Some(prompt)).unwrap();
    tokens.push(&ids(4, 13), None).unwrap();
    tokens
}

/// Every next token of a batch, the first token of a continuation included, by ascending row.
pub fn targets(tokens: &PackedTokens) -> Vec<Target> {
    let mut targets = Vec::new();
    for segment in tokens.segments() {
        if let Some(prefix) = segment.prefix {
            let prefix = tokens.segments()[prefix];
            targets.push(Target { row: prefix.start + prefix.len - 1, token: tokens.ids()[segment.start] });
        }
        let rows = segment.start..segment.start + segment.len - 1;
        targets.extend(rows.map(|row| Target { row, token: tokens.ids()[row + 1] }));
    }
    targets.sort_by_key(|target| target.row);
    targets
}

/// Gradients of log-probs (or entropies) that are all different.
pub fn upstream(seed: u64, count: usize) -> Vec<f32> {
    let random = Random::new(seed, Purpose::Test).step(6);
    (0..count).map(|i| random.normal(i as u32) as f32).collect()
}

/// |a - b| / |b|.
pub fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let size: f64 = b.iter().map(|b| b * b).sum();
    (difference / size.max(1e-30)).sqrt()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
