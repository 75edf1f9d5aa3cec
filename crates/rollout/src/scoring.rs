//! What a model says about completions that are there already.

use std::sync::Arc;

use model::decoder::{Decoder, PackedTokens, Target, Workspace};

use crate::{Episode, Result};

/// Tokens in one pass, about; results do not depend on it.
const TOKENS_PER_PASS: usize = 8192;

/// The log-probability of each completion under a model whose weights are prepared: the sum over the tokens that were sampled. Consecutive
/// completions of one prompt share its computation.
///
/// # Errors
/// A model that refuses the tokens.
pub fn log_probs(decoder: &Decoder, episodes: &[Episode], temperature: f32) -> Result<Vec<f64>> {
    let mut workspace = Workspace::new();
    let mut sums = Vec::with_capacity(episodes.len());
    let mut rest = episodes;
    while !rest.is_empty() {
        let mut pass = Pass::default();
        let fitting = rest.iter().take_while(|episode| pass.tokens_with(episode) <= TOKENS_PER_PASS).count();
        let episodes;
        (episodes, rest) = rest.split_at(fitting.max(1));
        sums.extend(sums_of(decoder, episodes, temperature, &mut workspace)?);
    }
    Ok(sums)
}

/// Counts the tokens of a pass.
#[derive(Default)]
struct Pass {
    prompt: Option<Arc<[u32]>>,
    tokens: usize,
}

impl Pass {
    /// The tokens with this episode among them.
    fn tokens_with(&mut self, episode: &Episode) -> usize {
        if self.prompt.as_ref() != Some(&episode.prompt) {
            self.prompt = Some(Arc::clone(&episode.prompt));
            self.tokens += episode.prompt.len();
        }
        self.tokens += episode.completion.len();
        self.tokens
    }
}

fn sums_of(decoder: &Decoder, episodes: &[Episode], temperature: f32, workspace: &mut Workspace) -> Result<Vec<f64>> {
    let mut tokens = PackedTokens::new();
    // Of which episode, and where.
    let mut targets: Vec<(usize, Target)> = Vec::new();
    let mut prompt: Option<(Arc<[u32]>, usize)> = None;
    for (index, episode) in episodes.iter().enumerate() {
        let known = prompt.take().filter(|(ids, _)| *ids == episode.prompt);
        let segment = match known {
            Some((_, segment)) => segment,
            None => tokens.push(&episode.prompt, None)?,
        };
        prompt = Some((Arc::clone(&episode.prompt), segment));
        let before = tokens.segments()[segment];
        let own = tokens.push(&episode.completion, Some(segment))?;
        let start = tokens.segments()[own].start;
        let row = |at: usize| if at == 0 { before.start + before.len - 1 } else { start + at - 1 };
        let sampled = (0..episode.completion.len()).filter(|&at| episode.loss_mask[at]);
        targets.extend(sampled.map(|at| (index, Target { row: row(at), token: episode.completion[at] })));
    }
    let mut order: Vec<usize> = (0..targets.len()).collect();
    order.sort_by_key(|&place| targets[place].1.row);
    let sorted: Vec<Target> = order.iter().map(|&place| targets[place].1).collect();
    decoder.forward(&tokens, workspace, false)?;
    let computed = decoder.log_probs(workspace, &sorted, temperature, false)?.log_prob;
    let mut by_place = vec![0.0; targets.len()];
    for (place, log_prob) in order.into_iter().zip(computed) {
        by_place[place] = f64::from(log_prob);
    }
    // Token by token in the order of the completion, as the sampler's own are folded.
    let mut sums = vec![0.0; episodes.len()];
    for ((index, _), log_prob) in targets.into_iter().zip(by_place) {
        sums[index] += log_prob;
    }
    Ok(sums)
}
