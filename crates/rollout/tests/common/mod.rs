//! Shared by the tests: small decoders, prompts, and the trainer's view of an episode.

use std::sync::Arc;

use base::{Purpose, Random};
use kernels::Precision;
use model::decoder::{Decoder, PackedTokens, Target, Workspace};
use model::{Family, ModelConfig};
use posttrain_rollout::{Episode, Request};

pub const FAMILIES: [Family; 5] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3, Family::Gemma3];

/// Bytes and the three special tokens of `Tokenizer::bytes`.
pub const VOCABULARY: usize = 259;

/// `<|im_end|>`, the end-of-text token among them.
pub const END: u32 = 257;

/// A random decoder over bytes, its matrices scaled up so that it has strong opinions.
pub fn tiny(family: Family, precision: Precision) -> Decoder {
    let mut decoder = Decoder::random(ModelConfig::tiny(family, VOCABULARY), 11).unwrap();
    for index in 0..decoder.parameters().len() {
        if decoder.parameters()[index].shape.len() > 1 {
            decoder.parameter_mut(index).iter_mut().for_each(|weight| *weight *= 8.0);
        }
    }
    decoder.prepare(precision);
    decoder
}

/// `count` prompts of odd and even lengths.
pub fn prompts(count: u32) -> Vec<Arc<[u32]>> {
    let random = Random::new(3, Purpose::Test);
    (0..count).map(|i| (0..3 + 4 * i + i % 2).map(|j| random.prompt(i).at(j).below(256) as u32).collect()).collect()
}

/// `samples` requests for each prompt; every third has a forced opening.
pub fn requests(prompts: u32, samples: u32) -> Vec<Request> {
    let mut requests: Vec<Request> = self::prompts(prompts)
        .iter()
        .enumerate()
        .flat_map(|(id, prompt)| Request::samples(id as u32, prompt, samples).collect::<Vec<_>>())
        .collect();
    for (i, request) in requests.iter_mut().enumerate().filter(|(i, _)| i % 3 == 2) {
        request.prefix = (0..i as u32 + 1).map(|token| (token * 37) % 256).collect();
    }
    requests
}

/// The log-probs that the trainer computes for the completions of some episodes: in one packed batch where episodes of
/// one prompt share it (`share`), or each on its own after its own copy of the prompt.
pub fn trainer_log_probs(decoder: &Decoder, episodes: &[Episode], temperature: f32, share: bool) -> Vec<Vec<f32>> {
    let mut tokens = PackedTokens::new();
    let mut shared: Vec<(Arc<[u32]>, usize)> = Vec::new();
    let mut targets = Vec::new();
    for episode in episodes {
        let (before, start) = if share {
            let known = shared.iter().find(|(prompt, _)| *prompt == episode.prompt).map(|&(_, segment)| segment);
            let prompt = known.unwrap_or_else(|| {
                let segment = tokens.push(&episode.prompt, None).unwrap();
                shared.push((Arc::clone(&episode.prompt), segment));
                segment
            });
            let own = tokens.push(&episode.completion, Some(prompt)).unwrap();
            let prompt = tokens.segments()[prompt];
            (prompt.start + prompt.len - 1, tokens.segments()[own].start)
        } else {
            let ids: Vec<u32> = episode.prompt.iter().chain(&episode.completion).copied().collect();
            let own = tokens.push(&ids, None).unwrap();
            let start = tokens.segments()[own].start + episode.prompt.len();
            (start - 1, start)
        };
        for (i, &token) in episode.completion.iter().enumerate() {
            targets.push(Target { row: if i == 0 { before } else { start + i - 1 }, token });
        }
    }
    // The head wants targets by ascending row.
    let mut order: Vec<usize> = (0..targets.len()).collect();
    order.sort_by_key(|&i| targets[i].row);
    let sorted: Vec<Target> = order.iter().map(|&i| targets[i]).collect();
    let mut workspace = Workspace::new();
    decoder.forward(&tokens, &mut workspace, false).unwrap();
    let computed = decoder.log_probs(&mut workspace, &sorted, temperature, false).unwrap().log_prob;
    let mut flat = vec![0.0; targets.len()];
    for (&i, log_prob) in order.iter().zip(computed) {
        flat[i] = log_prob;
    }
    let mut rest = flat.into_iter();
    episodes.iter().map(|episode| rest.by_ref().take(episode.completion.len()).collect()).collect()
}

/// The bits of log-probs, for comparisons that forgive nothing.
pub fn bits(log_probs: &[f32]) -> Vec<u32> {
    log_probs.iter().map(|log_prob| log_prob.to_bits()).collect()
}
