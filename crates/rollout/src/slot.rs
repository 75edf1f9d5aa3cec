//! One completion in the making.

use std::sync::Arc;

use model::decoder::{Decoder, Prefill, SequenceCache};
use model::tokenizer::{DecodeStream, Tokenizer};

use crate::conversation::Record;
use crate::episode::{Transcript, Turn};
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
    /// Why the turn at hand ended, as soon as it has.
    pub turn_end: Option<Finish>,
    pub finish: Option<Finish>,
    /// The turns that have ended.
    pub turns: Vec<Turn>,
    /// What was said, in a conversation.
    pub record: Option<Record<'a>>,
    /// The text of the turn at hand.
    pub text: String,
    options: &'a SamplingOptions,
    tokenizer: &'a Tokenizer,
    cache: SequenceCache,
    /// How many tokens of the completion the decoder has seen.
    fed: usize,
    /// Where the turn at hand began, and where it ends at the latest.
    turn_start: usize,
    turn_limit: usize,
    loss_mask: Vec<bool>,
    log_probs: Vec<f32>,
    filtered_log_probs: Vec<f32>,
    top_log_probs: Vec<Vec<(u32, f32)>>,
    stream: DecodeStream<'a>,
    stop: StopStrings<'a>,
}

impl<'a> Slot<'a> {
    /// A completion of a request in which a turn has at most `turn_tokens` tokens.
    pub fn new(
        index: usize,
        request: &'a Request,
        options: &'a SamplingOptions,
        turn_tokens: usize,
        decoder: &Decoder,
        tokenizer: &'a Tokenizer,
        prefill: &Prefill,
    ) -> Self {
        let capacity = options.max_new_tokens.min(INITIAL_CAPACITY.max(request.prefix.len()));
        Self {
            index,
            request,
            completion: request.prefix.clone(),
            turn_end: None,
            finish: None,
            turns: Vec::new(),
            record: None,
            text: String::new(),
            options,
            tokenizer,
            cache: SequenceCache::new(decoder, Arc::clone(&prefill.cache), capacity),
            fed: 0,
            turn_start: 0,
            turn_limit: turn_tokens.max(request.prefix.len()).min(options.max_new_tokens),
            loss_mask: Vec::new(),
            log_probs: Vec::new(),
            filtered_log_probs: Vec::new(),
            top_log_probs: Vec::new(),
            stream: tokenizer.decode_stream(),
            stop: StopStrings::new(&options.stop),
        }
    }

    /// Takes the token at the next position. Returns the text that became certain.
    pub fn push(&mut self, token: Token, stop_tokens: &[u32]) -> String {
        self.log_probs.push(token.log_prob);
        self.filtered_log_probs.push(token.filtered_log_prob);
        self.loss_mask.push(token.sampled);
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
            self.turn_end = Some(Finish::Stop);
        } else {
            let piece = self.stream.push(token.id);
            text = if may_stop { self.stop.push(&piece) } else { self.stop.pass(&piece) };
            if self.stop.stopped() {
                self.turn_end = Some(Finish::Stop);
            } else if length == self.turn_limit {
                self.turn_end = Some(Finish::Length);
            }
        }
        if self.turn_end.is_some() {
            let stream = std::mem::replace(&mut self.stream, self.tokenizer.decode_stream());
            let mut stop = std::mem::replace(&mut self.stop, StopStrings::new(&self.options.stop));
            text.push_str(&stop.push(&stream.finish()));
            text.push_str(&stop.finish());
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

    /// The position whose token is chosen or scored next. Those before are known and done with.
    pub fn next_position(&self) -> usize {
        self.log_probs.len()
    }

    /// Ends the turn at hand, and returns its number.
    pub fn close_turn(&mut self, finish: Finish) -> usize {
        self.turns.push(Turn { tokens: self.turn_start..self.completion.len(), finish });
        self.turns.len() - 1
    }

    /// Continues with tokens of the other side and a turn of at most `turn_tokens` tokens. Returns whether there is room
    /// for a token of that turn; if not, nothing is appended.
    pub fn continue_with(&mut self, tokens: &[u32], turn_tokens: usize) -> bool {
        let length = self.completion.len() + tokens.len();
        if length >= self.options.max_new_tokens {
            return false;
        }
        self.completion.extend_from_slice(tokens);
        self.loss_mask.resize(length, false);
        self.log_probs.resize(length, 0.0);
        self.filtered_log_probs.resize(length, 0.0);
        if self.options.top_log_probs > 0 {
            self.top_log_probs.resize(length, Vec::new());
        }
        self.turn_start = length;
        self.turn_limit = self.options.max_new_tokens.min(length.saturating_add(turn_tokens));
        self.turn_end = None;
        self.text.clear();
        true
    }

    /// The finished episode, and the cache of the tokens that the decoder has seen.
    pub fn into_episode(self) -> (Episode, SequenceCache) {
        let Self { request, record, tokenizer, completion, cache, .. } = self;
        let transcript = record.map(|record| Transcript {
            text: tokenizer.decode_with_special(&completion),
            fidelity: record.fidelity(tokenizer, &request.prompt, &completion),
        });
        let episode = Episode {
            prompt_id: request.prompt_id,
            sample: request.sample,
            prompt: Arc::clone(&request.prompt),
            completion,
            loss_mask: self.loss_mask,
            log_probs: self.log_probs,
            filtered_log_probs: self.filtered_log_probs,
            top_log_probs: self.top_log_probs,
            finish: self.finish.unwrap_or(Finish::Length),
            turns: self.turns,
            transcript,
            text: self.text,
        };
        (episode, cache)
    }
}
