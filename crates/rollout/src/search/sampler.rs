//! Steps sampled from a model: a step ends at a separator, such as a line break, or where the completion ends.

use std::cell::Cell;
use std::sync::Arc;

use base::Random;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;

use super::{Expansion, Proposer, Step};
use crate::{Episode, Error, Finish, Generator, Request, SamplingOptions};

/// Samples next steps with a model, whose weights must be prepared.
pub struct StepSampler<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    /// The id and the tokens of each problem's prompt.
    prompts: Vec<(u32, Arc<[u32]>)>,
    /// `max_new_tokens` and `stop` are those of one step.
    options: SamplingOptions,
    /// Most tokens of a whole path.
    max_path_tokens: usize,
    batch_size: usize,
    random: Random,
    ends: Vec<u32>,
    tokens: Cell<usize>,
}

impl<'a> StepSampler<'a> {
    /// Samples as `options` say for whole completions, cut into steps by `separator`, none of more than `max_step_tokens` tokens. A
    /// longer stretch without a separator is several steps. `random` names the draws of this search.
    pub fn new(
        (decoder, tokenizer): (&'a Decoder, &'a Tokenizer),
        prompts: Vec<(u32, Arc<[u32]>)>,
        options: &SamplingOptions,
        (separator, max_step_tokens): (&str, usize),
        batch_size: usize,
        random: Random,
    ) -> Self {
        let max_path_tokens = options.max_new_tokens;
        let mut ends = decoder.config().eos_token_ids.clone();
        ends.extend(tokenizer.eos());
        ends.extend(&options.stop_token_ids);
        let options = SamplingOptions {
            max_new_tokens: max_step_tokens.min(max_path_tokens),
            min_new_tokens: 0,
            stop: vec![separator.to_owned()],
            ..options.clone()
        };
        Self { decoder, tokenizer, prompts, options, max_path_tokens, batch_size, random, ends, tokens: Cell::new(0) }
    }

    /// Tokens generated so far.
    pub fn tokens(&self) -> usize {
        self.tokens.get()
    }

    fn step(&self, before: usize, mut episode: Episode) -> Step {
        let room = self.max_path_tokens.saturating_sub(before);
        let cut = episode.completion.len() >= room;
        episode.completion.truncate(room);
        let ended =
            episode.finish == Finish::Stop && episode.completion.last().is_some_and(|id| self.ends.contains(id));
        let log_probs = &episode.log_probs[..episode.completion.len()];
        Step {
            log_prob: log_probs.iter().map(|&log_prob| f64::from(log_prob)).sum(),
            last: ended || cut,
            tokens: episode.completion,
        }
    }
}

impl<E: From<Error>> Proposer<E> for StepSampler<'_> {
    fn propose(&self, expansions: &[Expansion<'_>]) -> Result<Vec<Vec<Step>>, E> {
        let mut requests = Vec::new();
        for expansion in expansions {
            let (prompt_id, prompt) = &self.prompts[expansion.problem];
            let prompt: Arc<[u32]> = [&prompt[..], &expansion.path.tokens()].concat().into();
            let first = expansion.node * expansion.count as u32;
            let samples = Request::samples(*prompt_id, &prompt, expansion.count as u32);
            requests.extend(samples.map(|request| Request { sample: first + request.sample, ..request }));
        }
        if requests.is_empty() {
            return Ok(vec![Vec::new(); expansions.len()]);
        }
        let generator = Generator::new(&self.options, self.batch_size, self.random);
        let episodes = generator.generate(self.decoder, self.tokenizer, &requests, |_| ())?;
        self.tokens.set(self.tokens.get() + episodes.iter().map(|episode| episode.completion.len()).sum::<usize>());
        let mut episodes = episodes.into_iter();
        let of = |expansion: &Expansion<'_>| {
            let before = expansion.path.tokens().len();
            episodes.by_ref().take(expansion.count).map(|episode| self.step(before, episode)).collect()
        };
        Ok(expansions.iter().map(of).collect())
    }
}
