//! The generator: a loop over slots.
//!
//! Each round admits requests into free slots, feeds the decoder their prompts and the tokens it has not seen of the others,
//! turns the hidden states into logits, chooses or scores a token for each, and retires what is finished. A slot that becomes
//! free is taken in the next round, so that a batch with completions of very different lengths stays full; and new prompts
//! share one pass over the weights with the running completions, so that a prompt alone costs no pass of its own. A
//! conversation leaves its slot at the end of a turn and comes back when it has been answered ([`crate::conversation`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use base::Random;
use kernels::log_softmax_row;
use model::decoder::{DecodeRow, Decoder, Gradients, KvCache, Recording, Tape, Workspace};
use model::tokenizer::Tokenizer;

use crate::answers::Answers;
use crate::conversation::{self, Dialogue, Record};
use crate::prefix_cache::PrefixCache;
use crate::queue::Queue;
use crate::sampling::{Choice, NoChoice, Scratch};
use crate::slot::{Slot, Token};
use crate::{ConversationOptions, Episode, Error, Finish, Request, Response, Result, SamplingOptions};

/// Changes logits before a token is drawn from them: to ban tokens, to follow a grammar, to mix in another model.
///
/// Called for sampled tokens only. Recorded `log_probs` are those of the untouched logits.
pub trait LogitsHook: Sync {
    /// Sees several rows that tokens are about to be drawn from, at once, with their logits, before [`LogitsHook::apply`] changes
    /// them one by one.
    ///
    /// # Errors
    /// Whatever keeps the hook from changing them.
    fn prepare(&self, _rows: &[(LogitsContext<'_>, &[f32])]) -> Result<()> {
        Ok(())
    }

    /// Changes the logits of the next token in place, called from several threads at once. Negative infinity bans a token.
    fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>);
}

/// What a [`LogitsHook`] sees.
#[derive(Clone, Copy, Debug)]
pub struct LogitsContext<'a> {
    /// The request that is being served.
    pub request: &'a Request,
    /// The completion so far, forced tokens included.
    pub completion: &'a [u32],
    /// Tokens that will not be drawn, whatever becomes of their logits: those that would end the completion too early.
    pub banned: &'a [u32],
}

/// How far a generation is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Requests answered.
    pub finished: usize,
    /// All requests.
    pub total: usize,
    /// Requests being served.
    pub running: usize,
    /// Tokens sampled so far.
    pub tokens: usize,
    /// Tokens of the prompts of all requests that were admitted so far.
    pub prompt_tokens: PromptTokens,
    /// Text that became certain in this round.
    pub pieces: &'a [Piece],
}

/// Where the keys and values of prompts came from, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptTokens {
    /// Went through the model.
    pub computed: usize,
    /// Were known: from another request with the same prompt, from a prompt that begins alike, or from a [`PrefixCache`].
    pub reused: usize,
}

/// New text of one completion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Position of its request in the list.
    pub request: usize,
    /// The text, to be appended to what came before.
    pub text: String,
}

/// Generates completions.
#[derive(Clone, Copy)]
pub struct Generator<'a> {
    /// How tokens are chosen and when a completion ends.
    pub options: &'a SamplingOptions,
    /// Completions computed at the same time. Has no influence on what they contain.
    pub batch_size: usize,
    /// The draws: `Random::new(seed, Purpose::Sampling)` at the step at hand. Prompt, sample and position come from the
    /// requests.
    pub random: Random,
    /// Changes logits before a token is drawn.
    pub hook: Option<&'a dyn LogitsHook>,
    /// When set to true by another thread, generation ends soon with [`Error::Cancelled`].
    pub cancel: Option<&'a AtomicBool>,
}

impl<'a> Generator<'a> {
    /// A generator without hook and cancellation.
    pub fn new(options: &'a SamplingOptions, batch_size: usize, random: Random) -> Self {
        Self { options, batch_size, random, hook: None, cancel: None }
    }

    /// Answers `requests`, in their order. The decoder's weights must be prepared.
    ///
    /// Besides the options' own stop tokens, the end-of-text tokens of the model and the tokenizer end a completion, and the special
    /// tokens whose names are stop strings: text does not show them. Prompts that begin alike are computed once.
    ///
    /// # Errors
    /// Options outside their range; a request that is empty, too long for the model or a duplicate of another; logits
    /// that are no numbers or that allow no token; cancellation.
    pub fn generate(
        &self,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        requests: &[Request],
        on_progress: impl FnMut(Progress<'_>),
    ) -> Result<Vec<Episode>> {
        self.generate_onto(None, decoder, tokenizer, requests, on_progress)
    }

    /// [`Generator::generate`], which leaves on a tape, if there is one, what the decoder computed of some requests.
    ///
    /// # Errors
    /// As [`Generator::generate`]; a tape for a decoder on a device.
    pub fn generate_onto(
        &self,
        on_tape: Option<OnTape<'_>>,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        requests: &[Request],
        on_progress: impl FnMut(Progress<'_>),
    ) -> Result<Vec<Episode>> {
        // Each prompt has most in common with the one before it in the queue, so no more than that one is kept.
        let cache = Cache { prefixes: &mut PrefixCache::new(0), keep_completions: false };
        self.answer(decoder, tokenizer, requests, (None, on_tape), cache, on_progress)
    }

    /// Holds conversations: [`Generator::generate`], where the turns of request `i` are answered as conversation `i` of
    /// `dialogue`, until the other side ends it or a limit is reached.
    ///
    /// # Errors
    /// As [`Generator::generate`]; a chat template that refuses the messages; a failure of the other side.
    pub fn converse(
        &self,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        requests: &[Request],
        dialogue: &Dialogue<'_>,
        on_progress: impl FnMut(Progress<'_>),
    ) -> Result<Vec<Episode>> {
        conversation::check(dialogue, requests)?;
        let cache = Cache { prefixes: &mut PrefixCache::new(0), keep_completions: false };
        self.answer(decoder, tokenizer, requests, (Some(dialogue), None), cache, on_progress)
    }

    /// [`Generator::generate`], where prompts continue what `cache` knows from earlier calls, and where it takes in the
    /// prompts and completions of this one.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn generate_with(
        &self,
        cache: &mut PrefixCache,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        requests: &[Request],
        on_progress: impl FnMut(Progress<'_>),
    ) -> Result<Vec<Episode>> {
        let cache = Cache { prefixes: cache, keep_completions: true };
        self.answer(decoder, tokenizer, requests, (None, None), cache, on_progress)
    }

    fn answer(
        &self,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        requests: &[Request],
        (dialogue, on_tape): (Option<&Dialogue<'_>>, Option<OnTape<'_>>),
        cache: Cache<'_>,
        mut on_progress: impl FnMut(Progress<'_>),
    ) -> Result<Vec<Episode>> {
        self.options.validate()?;
        crate::check::stop_tokens(self.options, decoder.config())?;
        crate::check::requests(requests, self.options, decoder.config())?;
        cache.prefixes.serve(decoder);
        let mut stop_tokens = decoder.config().eos_token_ids.clone();
        stop_tokens.extend(tokenizer.eos());
        stop_tokens.extend(&self.options.stop_token_ids);
        let named = self.options.stop.iter().filter_map(|name| tokenizer.id(name));
        stop_tokens.extend(named.filter(|&id| tokenizer.is_special(id)));

        let mut episodes: Vec<Option<Episode>> = vec![None; requests.len()];
        let mut round = Round {
            generator: self,
            decoder,
            tokenizer,
            dialogue,
            on_tape,
            stop_tokens: &stop_tokens,
            queue: Queue::new(requests),
            cache,
            slots: Vec::new(),
            waiting: Vec::new(),
            heads: Vec::new(),
            hidden: Vec::new(),
            logits: Vec::new(),
            scratch: Vec::new(),
            workspace: Workspace::new(),
            prompt_tokens: PromptTokens::default(),
        };
        let (mut finished, mut tokens) = (0, 0);
        std::thread::scope(|scope| {
            let mut answers = Answers::new(scope, dialogue.map(|dialogue| dialogue.respondent));
            while finished < requests.len() {
                if self.cancel.is_some_and(|cancel| cancel.load(Ordering::Relaxed)) {
                    return Err(Error::Cancelled);
                }
                round.advance()?;
                let mut pieces = Vec::new();
                tokens += round.choose(&mut pieces)?;
                round.end_turns(&mut answers);
                round.take_answers(&mut answers)?;
                for (request, episode) in round.retire() {
                    episodes[request] = Some(episode);
                    finished += 1;
                }
                on_progress(Progress {
                    finished,
                    total: requests.len(),
                    running: round.slots.len(),
                    tokens,
                    prompt_tokens: round.prompt_tokens,
                    pieces: &pieces,
                });
            }
            Ok(())
        })?;
        Ok(episodes.into_iter().flatten().collect())
    }
}

/// Requests whose activations are kept.
pub struct OnTape<'a> {
    /// Where they go; it was started.
    pub tape: &'a mut Tape,
    /// Those that the tape was started with; logits are kept there.
    pub gradients: &'a mut Gradients,
    /// For the first requests of the list, where on the tape their tokens begin. Requests after these are not recorded.
    pub rows: &'a [TapeRows],
}

/// Where a request's tokens go on a tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TapeRows {
    /// The row of the first token of its prompt; requests with the same prompt have the same.
    pub prompt: usize,
    /// The row of the first token of its completion.
    pub completion: usize,
}

impl TapeRows {
    /// The row that predicts the token at `position` of the completion of `request`.
    fn predicting(self, position: usize, request: &Request) -> usize {
        match position.checked_sub(1) {
            Some(before) => self.completion + before,
            None => self.prompt + request.prompt.len() - 1,
        }
    }
}

/// What is known of prompts from before.
struct Cache<'a> {
    prefixes: &'a mut PrefixCache,
    /// Whether a later prompt may continue a completion.
    keep_completions: bool,
}

/// A row of hidden states: it predicts the token at `position` of the completion in `slot`.
#[derive(Clone, Copy)]
struct Head {
    slot: usize,
    position: usize,
}

/// Forced tokens fed to the decoder in one round, per slot.
const FORCED_PER_ROUND: usize = 32;

struct Round<'a> {
    generator: &'a Generator<'a>,
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    dialogue: Option<&'a Dialogue<'a>>,
    on_tape: Option<OnTape<'a>>,
    stop_tokens: &'a [u32],
    queue: Queue<'a>,
    cache: Cache<'a>,
    slots: Vec<Slot<'a>>,
    /// Conversations without a slot: their turn has not been answered, or no slot was free since.
    waiting: Vec<Slot<'a>>,
    heads: Vec<Head>,
    /// One row for each of `heads`.
    hidden: Vec<f32>,
    /// Logits of at most `batch_size` rows.
    logits: Vec<f32>,
    /// One for each row of `logits`.
    scratch: Vec<RowScratch>,
    workspace: Workspace,
    prompt_tokens: PromptTokens,
}

#[derive(Default)]
struct RowScratch {
    sampler: Scratch,
    /// The logits before hooks and bans.
    original: Vec<f32>,
}

impl Round<'_> {
    fn batch_size(&self) -> usize {
        self.generator.batch_size.max(1)
    }

    /// Fills free slots, and computes their prompts and the tokens that the decoder has not seen of the others.
    fn advance(&mut self) -> Result<()> {
        let free = self.batch_size() - self.slots.len();
        let answered = self.waiting.extract_if(.., |slot| slot.turn_end.is_none()).take(free);
        self.slots.extend(answered);
        // Conversations that wait keep their memory: no more of them than there are slots.
        let free = (self.batch_size() - self.slots.len()).saturating_sub(self.waiting.len());
        let admission = self.queue.take(free, self.cache.prefixes);
        let mut prompts = self.queue.missing(&admission);
        let places: &[TapeRows] = self.on_tape.as_ref().map_or(&[], |on_tape| on_tape.rows);
        // The tokens of running completions that are recorded: their numbers among all, and their rows on the tape.
        let mut recorded = Vec::new();
        let mut rows = Vec::with_capacity(self.slots.len());
        // The rows of hidden states that are needed, among those of all tokens.
        let mut needed = Vec::new();
        let mut fed = 0;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let (next, request) = (slot.next_position(), slot.index);
            let (tokens, cache, first) = slot.feed(FORCED_PER_ROUND);
            for position in (first + 1..=first + tokens.len()).filter(|&position| position >= next) {
                self.heads.push(Head { slot: index, position });
                needed.push(fed + position - first - 1);
            }
            if let Some(place) = places.get(request) {
                recorded.extend((0..tokens.len()).map(|token| (fed + token, place.completion + first + token)));
            }
            fed += tokens.len();
            rows.push(DecodeRow { tokens, cache });
        }
        let on_tape: Vec<Option<usize>> =
            self.queue.first_requests(&admission).map(|request| Some(places.get(request)?.prompt)).collect();
        for (prompt, _) in prompts.iter_mut().zip(&on_tape).filter(|(_, row)| row.is_some()) {
            // What goes onto the tape has to be computed, known or not.
            prompt.known = KvCache::default();
        }
        let mut computed = Vec::new();
        if !(rows.is_empty() && prompts.is_empty()) {
            let recording = (self.on_tape.as_mut()).map(|own| Recording {
                tape: &mut *own.tape,
                tokens: &recorded,
                prompts: &on_tape,
            });
            computed = self.decoder.extend_onto(recording, &mut rows, &prompts, &mut self.workspace)?;
            let width = self.decoder.config().hidden_size;
            let hidden = self.workspace.hidden();
            needed.into_iter().for_each(|row| self.hidden.extend_from_slice(&hidden[row * width..][..width]));
        }

        let Self { generator, decoder, tokenizer, dialogue, queue, cache, slots, heads, hidden, prompt_tokens, .. } =
            self;
        let new: usize = computed.iter().map(|prefill| prefill.computed).sum();
        prompt_tokens.computed += new;
        let mut all = 0;
        let turn_tokens = dialogue.map_or(usize::MAX, |dialogue| dialogue.options.max_turn_tokens);
        queue.start(admission, computed, cache.prefixes, |index, request, prefill| {
            all += request.prompt.len();
            heads.push(Head { slot: slots.len(), position: 0 });
            hidden.extend_from_slice(&prefill.hidden);
            let mut slot = Slot::new(index, request, generator.options, turn_tokens, decoder, tokenizer, prefill);
            slot.record = dialogue.map(|dialogue| Record::new(dialogue, index));
            slots.push(slot);
        });
        prompt_tokens.reused += all - new;
        Ok(())
    }

    /// Chooses a token, or scores a forced one, from every row of hidden states. Returns the number of tokens sampled.
    fn choose(&mut self, pieces: &mut Vec<Piece>) -> Result<usize> {
        let vocabulary = self.decoder.config().vocab_size;
        let width = self.decoder.config().hidden_size;
        let chunk = self.batch_size();
        let mut sampled = 0;
        let heads = std::mem::take(&mut self.heads);
        let hidden = std::mem::take(&mut self.hidden);
        self.scratch.resize_with(chunk.min(heads.len()).max(self.scratch.len()), RowScratch::default);
        for (heads, hidden) in heads.chunks(chunk).zip(hidden.chunks(chunk * width)) {
            self.logits.resize(heads.len() * vocabulary, 0.0);
            self.decoder.logits(hidden, &mut self.logits)?;
            if let Some(OnTape { gradients, rows, .. }) = &mut self.on_tape {
                let recorded = heads.iter().enumerate().filter_map(|(from, head)| {
                    let slot = &self.slots[head.slot];
                    Some((from, rows.get(slot.index)?.predicting(head.position, slot.request)))
                });
                gradients.keep_logits(&self.logits, &recorded.collect::<Vec<_>>());
            }
            if let Some(hook) = self.generator.hook {
                let rows = heads.iter().zip(self.logits.chunks_exact(vocabulary));
                let drawn = rows.filter(|(head, _)| self.slots[head.slot].completion.len() <= head.position);
                let context = |(&Head { slot, position }, logits)| {
                    (self.generator.context(&self.slots[slot], position, self.stop_tokens), logits)
                };
                let drawn: Vec<_> = drawn.map(context).collect();
                if !drawn.is_empty() {
                    hook.prepare(&drawn)?;
                }
            }
            let (generator, slots, stop_tokens) = (self.generator, &self.slots, self.stop_tokens);
            let rows = self.logits.chunks_exact_mut(vocabulary).zip(heads).zip(&mut self.scratch);
            let mut rows: Vec<_> = rows.map(|((logits, head), scratch)| (logits, head, scratch, None)).collect();
            kernels::on_each(&mut rows, |(logits, head, scratch, token)| {
                let slot = &slots[head.slot];
                *token = Some(generator.next_token(slot, head.position, stop_tokens, logits, scratch));
            });
            let tokens: Vec<_> = rows.into_iter().map(|(_, head, _, token)| (head, token)).collect();
            for (head, token) in tokens.into_iter().filter_map(|(head, token)| Some((head, token?))) {
                let slot = &mut self.slots[head.slot];
                let token = token.map_err(|reason| Error::Logits {
                    prompt_id: slot.request.prompt_id,
                    sample: slot.request.sample,
                    position: head.position,
                    reason: reason.to_string(),
                })?;
                sampled += usize::from(token.sampled);
                let text = slot.push(token, self.stop_tokens);
                if !text.is_empty() {
                    pieces.push(Piece { request: slot.index, text });
                }
            }
        }
        Ok(sampled)
    }

    /// Closes the turns that have ended. Where somebody answers them, the conversation leaves its slot and they are asked.
    fn end_turns(&mut self, answers: &mut Answers<'_, '_>) {
        for mut slot in self.slots.extract_if(.., |slot| slot.turn_end.is_some()) {
            let finish = slot.turn_end.unwrap_or(Finish::Length);
            let turn = slot.close_turn(finish);
            match &mut slot.record {
                None => slot.finish = Some(finish),
                Some(record) => {
                    record.push_turn(&slot.text);
                    answers.ask(slot.index, turn, &slot.text, finish);
                }
            }
            self.waiting.push(slot);
        }
    }

    /// Takes the answers that are there; waits for one if nothing else can be done.
    fn take_answers(&mut self, answers: &mut Answers<'_, '_>) -> Result<()> {
        let Some(dialogue) = self.dialogue else { return Ok(()) };
        let ConversationOptions { max_turns, max_turn_tokens } = *dialogue.options;
        let idle =
            self.slots.is_empty() && self.waiting.iter().all(|slot| slot.turn_end.is_some() && slot.finish.is_none());
        for (index, answer) in answers.take(idle && !self.waiting.is_empty()) {
            let Some(slot) = self.waiting.iter_mut().find(|slot| slot.index == index) else { continue };
            let Request { prompt_id, sample, .. } = *slot.request;
            let turn = slot.turns.len() - 1;
            let answer = answer.map_err(|source| Error::Response { prompt_id, sample, turn, source })?;
            let messages = match answer {
                Response::End => {
                    slot.finish = Some(Finish::Stop);
                    continue;
                }
                Response::Continue(messages) => messages,
            };
            let last = slot.completion.last().copied().filter(|last| self.stop_tokens.contains(last));
            let stop = last.filter(|_| slot.turns[turn].finish == Finish::Stop);
            let Some(record) = &mut slot.record else { continue };
            let goes_on = turn + 1 < max_turns && {
                let tokens = record.push_answer(self.tokenizer, messages, stop)?;
                slot.continue_with(&tokens, max_turn_tokens)
            };
            if !goes_on {
                slot.finish = Some(Finish::Length);
            }
        }
        Ok(())
    }

    /// Takes out what is finished.
    fn retire(&mut self) -> Vec<(usize, Episode)> {
        let Self { waiting, cache, .. } = self;
        waiting
            .extract_if(.., |slot| slot.finish.is_some())
            .map(|slot| {
                let request = slot.index;
                let (episode, seen) = slot.into_episode();
                if cache.keep_completions {
                    let tokens = episode.prompt.iter().chain(&episode.completion).take(seen.len()).copied().collect();
                    cache.prefixes.keep(tokens, Arc::new(seen.into_shared()));
                }
                (request, episode)
            })
            .collect()
    }
}

impl Generator<'_> {
    /// What a hook sees of the token at `position`.
    fn context<'a>(&self, slot: &'a Slot<'_>, position: usize, stop_tokens: &'a [u32]) -> LogitsContext<'a> {
        let banned = if position + 1 < self.options.min_new_tokens { stop_tokens } else { &[] };
        LogitsContext { request: slot.request, completion: &slot.completion, banned }
    }

    /// The token at `position` of a slot's completion: forced, or drawn from `logits`.
    fn next_token(
        &self,
        slot: &Slot<'_>,
        position: usize,
        stop_tokens: &[u32],
        logits: &mut [f32],
        scratch: &mut RowScratch,
    ) -> std::result::Result<Token, NoChoice> {
        let options = self.options;
        let inverse_temperature = 1.0 / options.log_prob_temperature();
        let RowScratch { sampler, original } = scratch;
        let top = sampler.top_log_probs(logits, inverse_temperature, options.top_log_probs);

        if let Some(&id) = slot.completion.get(position) {
            let log_prob = log_softmax_row(logits, inverse_temperature, id as usize).log_prob;
            return Ok(Token { id, sampled: false, log_prob, filtered_log_prob: log_prob, top });
        }

        let context = self.context(slot, position, stop_tokens);
        let changed = !context.banned.is_empty() || self.hook.is_some();
        if changed {
            original.clear();
            original.extend_from_slice(logits);
        }
        if let Some(hook) = self.hook {
            hook.apply(logits, &context);
        }
        for &stop in context.banned {
            if let Some(logit) = logits.get_mut(stop as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        let draw = self.random.prompt(slot.request.prompt_id).sample(slot.request.sample).at(position as u32);
        let choice = sampler.choose(logits, options, draw.uniform())?;
        let Choice { token: id, filtered_log_prob, .. } = choice;
        let log_prob = match changed {
            true => log_softmax_row(original, inverse_temperature, id as usize).log_prob,
            false => choice.log_prob,
        };
        Ok(Token { id, sampled: true, log_prob, filtered_log_prob, top })
    }
}
