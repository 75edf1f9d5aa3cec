//! Value guidance: tokens are drawn from what a model says times what a value model hopes for, without training the model.
//!
//! At every position the `top_k` most probable tokens of the model are candidates, the end of the text among them. The value model says what
//! it thinks of the return after each of them ([`returns`]), and
//!
//! ```text
//! π(y | x) ∝ π_ref(y | x) exp(Q(x, y) / η)       over the candidates; all other tokens are dropped
//! ```
//!
//! at the temperature of the sampling, before its top-k, top-p and min-p. A token that is not a candidate is dropped rather than left as it
//! is, since without a value it would be held against candidates that have one.
//!
//! The value model keeps the keys and values of every completion that is being served. With [`ValueHead::State`] the candidates of all of them
//! go through it in one pass, each a token behind what is known; the one that is drawn is known then, so that a token costs one pass of each
//! model. With [`ValueHead::Action`] the one that was drawn goes through it, and what the head says there is said of all candidates. Its bits depend on a
//! completion alone, as those of any decoder do.

pub mod returns;

use std::sync::{Arc, Mutex, PoisonError};

use base::Hint;
use model::decoder::{Decoder, KvCache, PREFILL_ROWS, Prefill, Prompt, Workspace};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::generator::{LogitsContext, LogitsHook};
use crate::served::Served;
use crate::{Error, Request, Result, SamplingOptions};
pub use returns::{Returns, ValueHead, ValueOutputs, Worth};

/// How a value model guides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GuidanceOptions {
    /// The price of a nat of divergence from the model that is guided, in units of the return (η): small guides hard.
    #[schemars(range(min = 0.0), extend("exclusiveMinimum" = 0))]
    pub eta: f64,
    /// How many of the model's most probable tokens are candidates at each position.
    #[schemars(range(min = 1))]
    pub top_k: usize,
    /// What a return is worth: `soft`, to whoever writes on under guidance, or `expected`, if the model writes on alone.
    pub worth: Worth,
    /// A probability of a return of 1 below this counts as this.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub floor: f64,
}

impl Default for GuidanceOptions {
    fn default() -> Self {
        Self { eta: 0.1, top_k: 20, worth: Worth::default(), floor: 1e-4 }
    }
}

impl GuidanceOptions {
    /// Refuses values that make no sense, naming the option.
    ///
    /// # Errors
    /// The first of them.
    pub fn validate(&self) -> Result<()> {
        let refuse = |option, got: String, expected| Err(Error::Option { option, got, expected });
        if !(self.eta.is_finite() && self.eta > 0.0) {
            return refuse("eta", self.eta.to_string(), "a number above 0");
        }
        if self.top_k == 0 {
            return refuse("top_k", self.top_k.to_string(), "at least 1");
        }
        if !(0.0..1.0).contains(&self.floor) {
            return refuse("floor", self.floor.to_string(), "at least 0 and below 1");
        }
        Ok(())
    }
}

/// Guides a generation with a value model. Of use for one call of the generator: it names completions by their requests.
pub struct Guidance<'a> {
    value: &'a Decoder,
    outputs: ValueOutputs,
    options: GuidanceOptions,
    eta: Option<&'a (dyn Fn(&Request) -> f64 + Sync)>,
    temperature: f64,
    reader: Mutex<Reader>,
}

/// Tokens that are known one by one, after which they are read again in one piece: every piece costs a little at every later token.
const PIECES: usize = 32;

/// What the value model knows.
#[derive(Default)]
struct Reader {
    workspace: Workspace,
    known: Served<Known>,
}

/// What it knows of one completion.
#[derive(Default)]
struct Known {
    /// Keys and values of the prompt and of the completion's first tokens, in few pieces.
    solid: KvCache,
    /// Those of all that was read: `solid`, and a piece for each token since.
    cache: KvCache,
    /// Tokens of the completion that were read.
    read: usize,
    /// Pieces behind `solid`.
    pieces: usize,
    candidates: Vec<Candidate>,
}

/// A token that may come next.
struct Candidate {
    token: u32,
    /// Keys and values of everything up to and with it, where it was read itself.
    cache: Option<Arc<KvCache>>,
    outputs: Vec<f32>,
}

impl<'a> Guidance<'a> {
    /// Guidance by `value`, which must be prepared and of the same vocabulary, and whose score head has these outputs. `sampling` is that of the
    /// generator.
    ///
    /// # Errors
    /// Options outside their range; a value model without a score head, or with one of another size.
    pub fn new(
        value: &'a Decoder,
        outputs: ValueOutputs,
        options: &GuidanceOptions,
        sampling: &SamplingOptions,
    ) -> Result<Self> {
        options.validate()?;
        let refuse = |reason, hint: &str| Err(Error::ValueModel { reason, hint: Some(hint.into()) });
        let Some(head) = value.config().score else {
            return refuse("it has no score head".into(), "train one with a section such as `[q_sharp]` of a recipe");
        };
        if let Some(expected) = outputs.refused(head.outputs, value.config().vocab_size) {
            let reason = format!("its score head has {} outputs, expected {expected}", head.outputs);
            return refuse(reason, "say how it was trained: its outputs are read as those of that loss and that head");
        }
        let temperature = f64::from(sampling.log_prob_temperature());
        Ok(Self { value, outputs, options: options.clone(), eta: None, temperature, reader: Mutex::default() })
    }

    /// With another η for each request.
    #[must_use]
    pub fn with_eta(mut self, eta: &'a (dyn Fn(&Request) -> f64 + Sync)) -> Self {
        self.eta = Some(eta);
        self
    }

    /// The most probable tokens that are not banned; lower ids first among equals.
    fn candidates(&self, logits: &[f32], context: &LogitsContext<'_>) -> Vec<u32> {
        let allowed = |&id: &u32| logits[id as usize] > f32::NEG_INFINITY && !context.banned.contains(&id);
        let mut ids: Vec<u32> = (0..logits.len() as u32).filter(allowed).collect();
        let falling = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if self.options.top_k < ids.len() {
            ids.select_nth_unstable_by(self.options.top_k, falling);
            ids.truncate(self.options.top_k);
        }
        ids.sort_unstable();
        ids
    }

    /// Reads what is new in the completions of `rows`, and what is said of every candidate.
    fn read(&self, reader: &mut Reader, rows: &[(LogitsContext<'_>, &[f32])]) -> Result<()> {
        reader.known.next_round();
        let text = |context: &LogitsContext<'_>| [&context.request.prompt[..], context.completion].concat();
        let mut all: Vec<(Vec<u32>, Known)> = Vec::with_capacity(rows.len());
        for (context, _) in rows {
            all.push((text(context), reader.known.take(context).unwrap_or_default()));
        }
        match self.outputs.head {
            ValueHead::State => self.read_states(&mut reader.workspace, rows, &mut all)?,
            ValueHead::Action => self.read_actions(&mut reader.workspace, rows, &mut all)?,
        }
        for ((context, _), (_, known)) in rows.iter().zip(all) {
            reader.known.keep(context, known);
        }
        Ok(())
    }

    /// Reads every candidate behind its completion.
    fn read_states(
        &self,
        workspace: &mut Workspace,
        rows: &[(LogitsContext<'_>, &[f32])],
        all: &mut [(Vec<u32>, Known)],
    ) -> Result<()> {
        for ((_, known), (context, _)) in all.iter_mut().zip(rows) {
            *known = std::mem::take(known).after(context.completion);
        }
        // What was not a candidate before, and what has come to lie in many pieces.
        let behind: Vec<usize> = (0..all.len())
            .filter(|&row| {
                let (known, completion) = (&all[row].1, rows[row].0.completion);
                known.cache.is_empty() || known.read < completion.len() || known.pieces >= PIECES
            })
            .collect();
        let prompts = behind.iter().map(|&row| Prompt { tokens: &all[row].0, known: all[row].1.solid.clone() });
        let mut caches = Vec::with_capacity(behind.len());
        self.pass(workspace, prompts.collect(), |prefill, _| {
            caches.push(prefill.cache);
            Ok(())
        })?;
        for (row, cache) in behind.into_iter().zip(caches) {
            all[row].1.solidify(&cache, rows[row].0.completion.len());
        }

        let tokens: Vec<(usize, u32, Vec<u32>)> = rows
            .iter()
            .enumerate()
            .flat_map(|(row, (context, logits))| self.candidates(logits, context).into_iter().map(move |id| (row, id)))
            .map(|(row, id)| (row, id, [&all[row].0[..], &[id]].concat()))
            .collect();
        let prompts = tokens.iter().map(|(row, _, tokens)| Prompt { tokens, known: all[*row].1.cache.clone() });
        let read = self.outputs_of(workspace, prompts.collect())?;
        for ((row, token, _), (cache, outputs)) in tokens.into_iter().zip(read) {
            all[row].1.candidates.push(Candidate { token, cache: Some(cache), outputs });
        }
        Ok(())
    }

    /// Reads every completion, at whose end the head speaks of all tokens that may come next.
    fn read_actions(
        &self,
        workspace: &mut Workspace,
        rows: &[(LogitsContext<'_>, &[f32])],
        all: &mut [(Vec<u32>, Known)],
    ) -> Result<()> {
        for ((_, known), (context, _)) in all.iter_mut().zip(rows) {
            // What the head said is known of the end alone.
            if context.completion.len() <= known.read {
                *known = Known::default();
            }
        }
        let prompts = all.iter().map(|(tokens, known)| {
            let cache = if known.pieces < PIECES { &known.cache } else { &known.solid };
            Prompt { tokens, known: cache.clone() }
        });
        let read = self.outputs_of(workspace, prompts.collect())?;
        let vocabulary = self.value.config().vocab_size;
        for (((_, known), (cache, outputs)), (context, logits)) in all.iter_mut().zip(read).zip(rows) {
            let length = context.completion.len();
            if known.cache.is_empty() || known.pieces >= PIECES {
                known.solidify(&cache, length);
            } else {
                known.extend(&cache, length);
            }
            let said = |token| self.outputs.of(&outputs, token, vocabulary).to_vec();
            let candidates = self.candidates(logits, context).into_iter();
            known.candidates = candidates.map(|token| Candidate { token, cache: None, outputs: said(token) }).collect();
        }
        Ok(())
    }

    /// The caches of prompts, and the scores of their last tokens.
    fn outputs_of(&self, workspace: &mut Workspace, prompts: Vec<Prompt<'_>>) -> Result<Vec<(Arc<KvCache>, Vec<f32>)>> {
        let mut read = Vec::with_capacity(prompts.len());
        self.pass(workspace, prompts, |prefill, outputs| {
            read.push((prefill.cache, outputs()?));
            Ok(())
        })?;
        Ok(read)
    }

    /// Sends prompts through the value model, as many at once as are best computed together. `done` gets each, and the scores of its
    /// last token where it asks for them.
    fn pass(
        &self,
        workspace: &mut Workspace,
        mut prompts: Vec<Prompt<'_>>,
        mut done: impl FnMut(Prefill, &dyn Fn() -> model::Result<Vec<f32>>) -> model::Result<()>,
    ) -> Result<()> {
        while !prompts.is_empty() {
            let mut new = 0;
            let fits = |prompt: &&Prompt<'_>| {
                new += prompt.tokens.len() - prompt.known.len();
                new <= PREFILL_ROWS
            };
            let count = prompts.iter().take_while(fits).count().max(1);
            let rest = prompts.split_off(count);
            let mut last = 0;
            for prefill in self.value.extend(&mut [], &prompts, workspace).map_err(failed)? {
                last += prefill.computed;
                let row = [last - 1];
                done(prefill, &|| self.value.scores(workspace, &row)).map_err(failed)?;
            }
            prompts = rest;
        }
        Ok(())
    }
}

impl Known {
    /// The same when the completion is this: what was drawn is known, if it was a candidate.
    fn after(mut self, completion: &[u32]) -> Self {
        let candidates = std::mem::take(&mut self.candidates);
        if completion.len() < self.read {
            return Self::default();
        }
        if let [.., last] = completion
            && completion.len() == self.read + 1
            && let Some(drawn) = candidates.into_iter().find(|candidate| candidate.token == *last)
            && let Some(cache) = drawn.cache
        {
            self.extend(&cache, completion.len());
        }
        self
    }

    /// One piece more is known: the first `read` tokens of the completion now.
    fn extend(&mut self, cache: &Arc<KvCache>, read: usize) {
        self.cache = cache.beginning(usize::MAX);
        self.read = read;
        self.pieces += 1;
    }

    /// All that is known of the first `read` tokens lies in few pieces.
    fn solidify(&mut self, cache: &Arc<KvCache>, read: usize) {
        self.solid = cache.beginning(usize::MAX);
        self.cache = cache.beginning(usize::MAX);
        (self.read, self.pieces) = (read, 0);
    }
}

fn failed(error: model::Error) -> Error {
    Error::ValueModel { reason: error.to_string(), hint: error.hint() }
}

impl LogitsHook for Guidance<'_> {
    fn prepare(&self, rows: &[(LogitsContext<'_>, &[f32])]) -> Result<()> {
        self.read(&mut self.reader.lock().unwrap_or_else(PoisonError::into_inner), rows)
    }

    fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>) {
        let eta = self.eta.map_or(self.options.eta, |eta| eta(context.request));
        let (worth, floor) = (self.options.worth, self.options.floor);
        let guided: Vec<(usize, f32)> = {
            let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
            let candidates = reader.known.get(context).map_or(&[][..], |known| &known.candidates);
            let guided = candidates.iter().map(|candidate| {
                let worth = self.outputs.returns.worth(&candidate.outputs, worth, eta, floor);
                let logit = f64::from(logits[candidate.token as usize]) + self.temperature * worth / eta;
                (candidate.token as usize, logit as f32)
            });
            guided.collect()
        };
        // Where every token is banned there is nothing to guide.
        if !guided.is_empty() {
            logits.fill(f32::NEG_INFINITY);
            guided.into_iter().for_each(|(token, logit)| logits[token] = logit);
        }
    }
}
