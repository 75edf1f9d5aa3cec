//! One completion in the making.

use std::sync::Arc;

use model::decoder::{Decoder, Prefill, SequenceCache};
use model::tokenizer::{DecodeStream, Tokenizer};

use crate::stop::StopStrings;
use crate::{Episode, Finish, Request, SamplingOptions};

/// Tokens of a completion that its cache has room for from the start; it grows when there are more.
const INITIAL_CAPACITY: usize = 128;

/// A token chosen or scored.
pub(crate) struct Token {
    pub id: u32,
    pub sampled: bool,
    pub log_prob: f32,
    pub filtered_log_prob: f32,
    pub top: Vec<(u32, f32)>,
}

/// One completion in the making.
pub(crate) struct Slot<'a> {
    /// Position of the request in the list.
    pub index: usize,
    pub request: &'a Request,
    /// The tokens known so far; at the start, the forced ones.
    pub completion: Vec<u32>,
    pub finish: Option<Finish>,
    options: &'a SamplingOptions,
    cache: SequenceCache,
    /// How many tokens of the completion the decoder has seen.
    fed: usize,
    log_probs: Vec<f32>,
    filtered_log_probs: Vec<f32>,
    top_log_probs: Vec<Vec<(u32, f32)>>,
    stream: DecodeStream<'a>,
    stop: StopStrings<'a>,
    text: String,
}

impl<'a> Slot<'a> {
    pub fn new(
        index: usize,
        request: &'a Request,
        options: &'a SamplingOptions,
        decoder: &Decoder,
        tokenizer: &'a Tokenizer,
        prefill: &Prefill,
    ) -> Self {
        let capacity = options.max_new_tokens.min(INITIAL_CAPACITY.max(request.prefix.len()));
        Self {
            index,
            request,
            completion: request.prefix.clone(),
            finish: None,
            options,
            cache: SequenceCache::new(decoder, Arc::clone(&prefill.cache), capacity),
            fed: 0,
            log_probs: Vec::new(),
            filtered_log_probs: Vec::new(),
            top_log_probs: Vec::new(),
            stream: tokenizer.decode_stream(),
            stop: StopStrings::new(&options.stop),
            text: String::new(),
        }
    }

    /// Takes the token at the next position. Returns the text that became certain.
    pub fn push(&mut self, token: Token, stop_tokens: &[u32]) -> String {
        self.log_probs.push(token.log_prob);
        self.filtered_log_probs.push(token.filtered_log_prob);
        if self.options.top_log_probs > 0 {
            self.top_log_probs.push(token.top);
        }
        if token.sampled {
            self.completion.push(token.id);
        }
        let length = self.log_probs.len();
        // Forced tokens stop nothing, nor does anything before the fewest tokens are there.
        let may_stop = token.sampled && length >= self.options.min_new_tokens;
        let mut text = String::new();
        if may_stop && stop_tokens.contains(&token.id) {
            self.finish = Some(Finish::Stop);
        } else {
            let piece = self.stream.push(token.id);
            text = if may_stop { self.stop.push(&piece) } else { self.stop.pass(&piece) };
            if self.stop.stopped() {
                self.finish = Some(Finish::Stop);
            } else if length == self.options.max_new_tokens {
                self.finish = Some(Finish::Length);
            }
        }
        self.text.push_str(&text);
        text
    }

    /// The next tokens for the decoder, at most `most`, the cache they go to, and the position of the first.
    ///
    /// The last token allowed is never fed: nothing follows it.
    pub fn feed(&mut self, most: usize) -> (&[u32], &mut SequenceCache, usize) {
        let first = self.fed;
        self.fed = self.completion.len().min(first + most).min(self.options.max_new_tokens - 1);
        (&self.completion[first..self.fed], &mut self.cache, first)
    }

    /// The finished episode, the text that had been held back, and the cache of the tokens that the decoder has seen.
    pub fn into_episode(self) -> (Episode, String, SequenceCache) {
        let Self { request, mut text, stream, mut stop, cache, .. } = self;
        let mut rest = stop.push(&stream.finish());
        rest.push_str(&stop.finish());
        text.push_str(&rest);
        let forced = request.prefix.len();
        let episode = Episode {
            prompt_id: request.prompt_id,
            sample: request.sample,
            prompt: Arc::clone(&request.prompt),
            loss_mask: (0..self.completion.len()).map(|position| position >= forced).collect(),
            completion: self.completion,
            log_probs: self.log_probs,
            filtered_log_probs: self.filtered_log_probs,
            top_log_probs: self.top_log_probs,
            finish: self.finish.unwrap_or(Finish::Length),
            text,
        };
        (episode, rest, cache)
    }
}
