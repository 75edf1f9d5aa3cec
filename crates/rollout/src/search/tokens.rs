//! Steps of one token: the most probable ones, for plain beam search.

use std::cell::Cell;
use std::sync::Arc;

use base::{Purpose, Random};
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;

use super::{Expansion, Proposer, Step};
use crate::{Error, Generator, Request, SamplingOptions};

/// Proposes the most probable next tokens of a model, whose weights must be prepared.
pub struct TokenProposer<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    /// The id and the tokens of each problem's prompt.
    prompts: Vec<(u32, Arc<[u32]>)>,
    max_path_tokens: usize,
    batch_size: usize,
    ends: Vec<u32>,
    tokens: Cell<usize>,
}

impl<'a> TokenProposer<'a> {
    /// Proposes tokens for paths of up to `max_path_tokens`.
    pub fn new(
        (decoder, tokenizer): (&'a Decoder, &'a Tokenizer),
        prompts: Vec<(u32, Arc<[u32]>)>,
        max_path_tokens: usize,
        batch_size: usize,
    ) -> Self {
        let mut ends = decoder.config().eos_token_ids.clone();
        ends.extend(tokenizer.eos());
        Self { decoder, tokenizer, prompts, max_path_tokens, batch_size, ends, tokens: Cell::new(0) }
    }

    /// Tokens generated so far: one for each path and position.
    pub fn tokens(&self) -> usize {
        self.tokens.get()
    }
}

impl<E: From<Error>> Proposer<E> for TokenProposer<'_> {
    fn propose(&self, expansions: &[Expansion<'_>]) -> Result<Vec<Vec<Step>>, E> {
        let count = expansions.iter().map(|expansion| expansion.count).max().unwrap_or(0);
        let request = |expansion: &Expansion<'_>| {
            let (prompt_id, prompt) = &self.prompts[expansion.problem];
            let prompt: Arc<[u32]> = [&prompt[..], &expansion.path.tokens()].concat().into();
            Request { prompt_id: *prompt_id, sample: expansion.node, prompt, prefix: Vec::new() }
        };
        let requests: Vec<Request> = expansions.iter().map(request).collect();
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let options = SamplingOptions { top_log_probs: count, ..SamplingOptions::greedy(1) };
        // Nothing is drawn.
        let generator = Generator::new(&options, self.batch_size, Random::new(0, Purpose::Sampling));
        let episodes = generator.generate(self.decoder, self.tokenizer, &requests, |_| ())?;
        self.tokens.set(self.tokens.get() + episodes.len());
        let of = |(expansion, episode): (&Expansion<'_>, crate::Episode)| {
            let full = expansion.path.tokens().len() + 1 >= self.max_path_tokens;
            let likely = episode.top_log_probs.into_iter().next().unwrap_or_default();
            let step = |(token, log_prob): (u32, f32)| Step {
                tokens: vec![token],
                log_prob: f64::from(log_prob),
                last: full || self.ends.contains(&token),
            };
            likely.into_iter().take(expansion.count).map(step).collect()
        };
        Ok(expansions.iter().zip(episodes).map(of).collect())
    }
}
