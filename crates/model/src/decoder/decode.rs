//! Generation: prompts into key-value caches, then tokens one by one, with the same bits as the training forward.
//!
//! What is cached is never moved: a [`KvCache`] is a list of runs of tokens, each computed once, of which it uses the
//! beginnings. Sequences that begin alike name the same runs.

use std::sync::Arc;

use kernels::{DecodeQuery, KvBlock, Precision};
use rayon::prelude::*;

use super::device::{Slots, Span};
use super::identity::WeightsId;
use super::layer::Layer;
use super::workspace::Activations;
use super::{Decoder, Tape, Workspace};
use crate::error::{Error, Result};

/// Rows of prompts that are best computed together; more would only take more memory.
pub const PREFILL_ROWS: usize = 2048;

/// Tokens from which on a common beginning is shared rather than computed again: a further run costs a little in every
/// later step.
pub const SHARED_FROM: usize = 16;

/// The keys and values of a run of neighbouring tokens in every layer.
struct Run {
    /// The engine's; none on a device.
    layers: Vec<KvBlock>,
    /// On a device, the rows of its pool.
    slots: Option<Slots>,
    len: usize,
    weights: WeightsId,
}

impl Run {
    fn new(decoder: &Decoder, capacity: usize) -> Self {
        let precision = decoder.precision.unwrap_or(Precision::F32);
        let slots = decoder.device.as_ref().map(|device| Slots::new(&device.pool));
        // On all threads, because new memory comes page by page.
        let layers = decoder.layers.par_iter().filter(|_| slots.is_none());
        let layers = layers.map(|layer| KvBlock::new(layer.shape, precision, capacity)).collect();
        Self { layers, slots, len: 0, weights: decoder.weights_id() }
    }

    /// The rows of the pool that hold the first `len` tokens.
    fn rows(&self, len: usize) -> &[u32] {
        self.slots.as_ref().map_or(&[], |slots| &slots.rows()[..len])
    }
}

/// The keys and values of the first tokens of a sequence, to be shared by everything that continues them.
#[derive(Clone, Default)]
pub struct KvCache {
    /// Runs, and how many of each one's first tokens belong to the sequence.
    runs: Vec<(Arc<Run>, usize)>,
}

impl KvCache {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.runs.iter().map(|(_, len)| len).sum()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The cache of the first `len` tokens (all, if there are fewer).
    pub fn beginning(&self, len: usize) -> Self {
        let mut rest = len;
        let mut runs = Vec::new();
        for (run, len) in &self.runs {
            let kept = rest.min(*len);
            if kept > 0 {
                runs.push((Arc::clone(run), kept));
            }
            rest -= kept;
        }
        Self { runs }
    }

    /// The runs it keeps in memory: something that tells one from another, and the tokens of each.
    pub fn held(&self) -> impl Iterator<Item = (usize, usize)> {
        self.runs.iter().map(|(run, _)| (Arc::as_ptr(run).addr(), run.len))
    }

    fn known(&self) -> Vec<(Known, usize)> {
        self.runs.iter().map(|(run, len)| (Known::Old(Arc::clone(run)), *len)).collect()
    }

    fn check(&self, weights: WeightsId) -> Result<()> {
        match self.runs.iter().all(|(run, _)| run.weights == weights) {
            true => Ok(()),
            false => Err(stale()),
        }
    }
}

/// A prompt that is to be computed.
pub struct Prompt<'a> {
    /// Its tokens.
    pub tokens: &'a [u32],
    /// What is known of its beginning; less than the whole prompt, perhaps nothing.
    pub known: KvCache,
}

impl<'a> Prompt<'a> {
    /// What is to be computed after what is known.
    fn alone(&self) -> Extension<'a> {
        Extension { tokens: &self.tokens[self.known.len()..], known: self.known.known() }
    }

    /// The same, if another prompt of the pass may know more: the one `before`, whose `extension` appends to run `own`.
    fn after(&self, before: &Prompt<'_>, extension: &Extension<'_>, own: usize) -> Extension<'a> {
        // The last token is computed in any case: its hidden state is asked for.
        let shared = common_beginning(before.tokens, self.tokens).min(self.tokens.len() - 1);
        match shared >= self.known.len() + SHARED_FROM {
            true => Extension { tokens: &self.tokens[shared..], known: extension.beginning(own, shared) },
            false => self.alone(),
        }
    }
}

/// A prompt that has been computed.
pub struct Prefill {
    /// Its keys and values, to be shared by all continuations.
    pub cache: Arc<KvCache>,
    /// The hidden state after the final norm at its last token.
    pub hidden: Vec<f32>,
    /// How many of its tokens were computed; the others were known, or shared with the prompt before it.
    pub computed: usize,
}

/// The cache of one sequence: a shared prompt and its own continuation.
pub struct SequenceCache {
    prompt: Arc<KvCache>,
    own: Run,
}

impl SequenceCache {
    /// A continuation of `prompt` with room for `capacity` tokens before it has to grow.
    pub fn new(decoder: &Decoder, prompt: Arc<KvCache>, capacity: usize) -> Self {
        Self { prompt, own: Run::new(decoder, capacity) }
    }

    /// Tokens in the whole sequence so far.
    pub fn len(&self) -> usize {
        self.prompt.len() + self.own.len
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all but the first `len` tokens of the continuation, the shared prompt not counted.
    pub fn truncate(&mut self, len: usize) {
        for block in &mut self.own.layers {
            block.truncate(len);
        }
        if let Some(slots) = &mut self.own.slots {
            slots.truncate(len);
        }
        self.own.len = self.own.len.min(len);
    }

    /// The whole sequence, as something to be continued.
    pub fn into_shared(self) -> KvCache {
        let mut shared = self.prompt.beginning(usize::MAX);
        if self.own.len > 0 {
            let len = self.own.len;
            shared.runs.push((Arc::new(self.own), len));
        }
        shared
    }
}

/// Tokens to append to one sequence.
pub struct DecodeRow<'a> {
    /// One token, or several in order.
    pub tokens: &'a [u32],
    /// The sequence.
    pub cache: &'a mut SequenceCache,
}

/// A tape, and what goes there.
pub struct Recording<'a> {
    /// The tape, which was started.
    pub tape: &'a mut Tape,
    /// Of the tokens that are appended to sequences: pairs of a token's number among them and its row on the tape.
    pub tokens: &'a [(usize, usize)],
    /// For each prompt the row of its first token, if it is to be recorded. It is then computed, though the one before it may have
    /// begun alike, and nothing may be known of it.
    pub prompts: &'a [Option<usize>],
}

/// A run that new tokens follow: an old one, or the one that another extension of the same pass appends to.
#[derive(Clone)]
enum Known {
    Old(Arc<Run>),
    Own(usize),
}

/// New tokens of one sequence in the pass at hand, and the runs they see before those of the run they are appended to.
struct Extension<'a> {
    tokens: &'a [u32],
    known: Vec<(Known, usize)>,
}

impl Extension<'_> {
    /// The runs of the first `len` tokens of the sequence, if this is its first extension and appends to run `own`.
    fn beginning(&self, own: usize, len: usize) -> Vec<(Known, usize)> {
        let mut rest = len;
        let runs = self.known.iter().cloned().chain([(Known::Own(own), self.tokens.len())]);
        let kept = runs.map(|(run, len)| {
            let kept = rest.min(len);
            rest -= kept;
            (run, kept)
        });
        kept.filter(|(_, kept)| *kept > 0).collect()
    }
}

impl Decoder {
    /// Computes prompts and returns their caches and last hidden states in order. Prompts next to each other share the
    /// computation of what they have in common.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn prefill(&self, prompts: &[&[u32]], workspace: &mut Workspace) -> Result<Vec<Prefill>> {
        let mut done = Vec::with_capacity(prompts.len());
        let mut rest = prompts;
        while !rest.is_empty() {
            let (mut count, mut rows) = (0, 0);
            while count < rest.len() && (count == 0 || rows + rest[count].len() <= PREFILL_ROWS) {
                rows += rest[count].len();
                count += 1;
            }
            let (now, later) = rest.split_at(count);
            rest = later;
            let now: Vec<Prompt<'_>> = now.iter().map(|tokens| Prompt { tokens, known: KvCache::default() }).collect();
            done.extend(self.extend(&mut [], &now, workspace)?);
        }
        Ok(done)
    }

    /// Appends tokens to sequences. [`Workspace::hidden`] then holds one row for each token, in order.
    ///
    /// The bits of a row depend on its own sequence alone, not on the other rows.
    ///
    /// # Errors
    /// As [`Decoder::forward`]; keys and values of other weights. The caches are then in no usable state.
    pub fn decode(&self, rows: &mut [DecodeRow<'_>], workspace: &mut Workspace) -> Result<()> {
        self.extend(rows, &[], workspace).map(drop)
    }

    /// [`Decoder::decode`] and [`Decoder::prefill`] in one pass over the weights. [`Workspace::hidden`] begins with the
    /// rows of `rows`.
    ///
    /// # Errors
    /// As [`Decoder::decode`]; a prompt of which nothing is left to be computed.
    pub fn extend(
        &self,
        rows: &mut [DecodeRow<'_>],
        prompts: &[Prompt<'_>],
        workspace: &mut Workspace,
    ) -> Result<Vec<Prefill>> {
        self.extend_onto(None, rows, prompts, workspace)
    }

    /// [`Decoder::extend`], after which a tape holds what was computed of some of the tokens.
    ///
    /// # Errors
    /// As [`Decoder::extend`]; a tape on a device.
    pub fn extend_onto(
        &self,
        recording: Option<Recording<'_>>,
        rows: &mut [DecodeRow<'_>],
        prompts: &[Prompt<'_>],
        workspace: &mut Workspace,
    ) -> Result<Vec<Prefill>> {
        let weights = self.weights_id();
        for row in rows.iter() {
            row.cache.prompt.check(weights)?;
            if row.cache.own.weights != weights {
                return Err(stale());
            }
        }
        for prompt in prompts {
            prompt.known.check(weights)?;
            if prompt.known.len() >= prompt.tokens.len() {
                let (known, tokens) = (prompt.known.len(), prompt.tokens.len());
                return Err(Error::Invalid(format!("a prompt of {tokens} tokens of which {known} are known")));
            }
        }
        let mut own: Vec<&mut Run> = Vec::with_capacity(rows.len() + prompts.len());
        let mut extensions = Vec::with_capacity(rows.len() + prompts.len());
        for DecodeRow { tokens, cache } in rows {
            let SequenceCache { prompt, own: run } = &mut **cache;
            extensions.push(Extension { tokens, known: prompt.known() });
            own.push(run);
        }
        let decoded = extensions.iter().map(|extension| extension.tokens.len()).sum::<usize>();
        for (index, prompt) in prompts.iter().enumerate() {
            let recorded = recording.as_ref().is_some_and(|recording| recording.prompts[index].is_some());
            let before = index.checked_sub(1).filter(|_| !recorded).map(|before| &prompts[before]);
            extensions.push(match (before, extensions.last()) {
                (Some(before), Some(extension)) => prompt.after(before, extension, extensions.len() - 1),
                _ => prompt.alone(),
            });
        }
        let of_prompts = own.len();
        let mut new: Vec<Run> =
            extensions[of_prompts..].iter().map(|extension| Run::new(self, extension.tokens.len())).collect();
        own.extend(&mut new);
        let ids = self.place(&extensions, &own, workspace)?;
        match (self.device.is_some(), recording) {
            (true, None) => self.append_on_device(&ids, &extensions, &mut own, workspace)?,
            (true, Some(_)) => return Err(Error::unsupported("a tape on a device", "do without one")),
            (false, recording) => self.append(&ids, &extensions, &mut own, workspace, recording)?,
        }
        for (extension, own) in extensions.iter().zip(own) {
            own.len += extension.tokens.len();
        }

        let new: Vec<Arc<Run>> = new.into_iter().map(Arc::new).collect();
        let d = self.config.hidden_size;
        let mut end = decoded;
        let done = extensions[of_prompts..].iter().enumerate().map(|(index, extension)| {
            let computed = extension.tokens.len();
            let runs = extension.beginning(of_prompts + index, usize::MAX).into_iter().map(|(run, len)| match run {
                Known::Old(run) => (run, len),
                Known::Own(own) => (Arc::clone(&new[own - of_prompts]), len),
            });
            end += computed;
            let hidden = workspace.hidden[(end - 1) * d..][..d].to_vec();
            Prefill { cache: Arc::new(KvCache { runs: runs.collect() }), hidden, computed }
        });
        Ok(done.collect())
    }

    /// The tokens of all extensions, and in the workspace their positions.
    fn place(&self, extensions: &[Extension<'_>], own: &[&mut Run], workspace: &mut Workspace) -> Result<Vec<u32>> {
        let (vocabulary, max_positions) = (self.config.vocab_size, self.config.max_positions);
        let mut ids = Vec::new();
        workspace.positions.clear();
        for (extension, own) in extensions.iter().zip(own) {
            let tokens = extension.tokens;
            if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocabulary) {
                return Err(Error::Invalid(format!("token {id} is not below the vocabulary size {vocabulary}")));
            }
            let first = extension.known.iter().map(|(_, len)| len).sum::<usize>() + own.len;
            if first + tokens.len() > max_positions {
                return Err(Error::Invalid(format!(
                    "a sequence outgrows the model's context of {max_positions} tokens"
                )));
            }
            ids.extend_from_slice(tokens);
            workspace.positions.extend((first..first + tokens.len()).map(|position| position as u32));
        }
        Ok(ids)
    }

    /// [`Decoder::append`] with keys and values on the device.
    fn append_on_device(
        &self,
        ids: &[u32],
        extensions: &[Extension<'_>],
        own: &mut [&mut Run],
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Some(device) = &self.device else { return Ok(()) };
        for (extension, own) in extensions.iter().zip(own.iter_mut()) {
            own.slots.iter_mut().try_for_each(|slots| slots.extend(extension.tokens.len()))?;
        }
        let mut first = 0;
        let mut new = Vec::with_capacity(ids.len());
        let spans = extensions.iter().zip(own.iter()).map(|(extension, own_run)| {
            let last = own_run.len + extension.tokens.len();
            let known = extension.known.iter().map(|(known, len)| match known {
                Known::Old(run) => run.rows(*len),
                Known::Own(other) => own[*other].rows(*len),
            });
            let keys = known.chain([own_run.rows(last)]).flatten().copied().collect();
            new.extend_from_slice(&own_run.rows(last)[own_run.len..]);
            first += extension.tokens.len();
            Span { queries: first - extension.tokens.len()..first, keys }
        });
        let spans: Vec<Span> = spans.collect();
        let positions = std::mem::take(&mut workspace.positions);
        device.append(self, ids, &positions, &spans, &new, workspace)
    }

    /// Runs the stack over the tokens of all extensions and appends their keys and values to the runs in `own`.
    fn append(
        &self,
        ids: &[u32],
        extensions: &[Extension<'_>],
        own: &mut [&mut Run],
        workspace: &mut Workspace,
        recording: Option<Recording<'_>>,
    ) -> Result<()> {
        let attend = |layer: &Layer, kept: &mut Activations| {
            let (width, out_width) = (layer.qkv.outputs, layer.output.inputs);
            // All keys and values come first: a prompt may see those of another.
            let mut rest = &kept.qkv[..];
            let appended = extensions.iter().zip(own.iter_mut()).map(|(extension, own)| {
                let qkv;
                (qkv, rest) = rest.split_at(extension.tokens.len() * width);
                (&mut own.layers[layer.index], qkv)
            });
            kernels::on_each(&mut appended.collect::<Vec<_>>(), |(block, qkv)| block.extend(qkv));
            let contexts = extensions.iter().enumerate().map(|(index, extension)| {
                let known = extension.known.iter().map(|(known, len)| match known {
                    Known::Old(run) => (&run.layers[layer.index], *len),
                    Known::Own(other) => (&own[*other].layers[layer.index], *len),
                });
                known.chain([(&own[index].layers[layer.index], own[index].len + extension.tokens.len())]).collect()
            });
            let contexts: Vec<Vec<(&KvBlock, usize)>> = contexts.collect();
            let (mut rest, mut rest_out) = (&kept.qkv[..], &mut kept.attention[..]);
            let mut rest_sums = &mut kept.log_sum_exp[..];
            let queries = extensions.iter().zip(&contexts).map(|(extension, context)| {
                let rows = extension.tokens.len();
                let (qkv, out, log_sum_exp);
                (qkv, rest) = rest.split_at(rows * width);
                (out, rest_out) = std::mem::take(&mut rest_out).split_at_mut(rows * out_width);
                (log_sum_exp, rest_sums) = std::mem::take(&mut rest_sums).split_at_mut(rows * layer.shape.heads);
                DecodeQuery { qkv, context, out, log_sum_exp }
            });
            kernels::attention_decode(layer.shape, &mut queries.collect::<Vec<_>>());
        };
        let Some(Recording { tape, tokens, prompts }) = recording else {
            return self.run(ids, self.generation, workspace, false, None, attend, None);
        };
        let mut rows = tokens.to_vec();
        let mut end = ids.len();
        for (extension, &row) in extensions.iter().rev().zip(prompts.iter().rev()) {
            let count = extension.tokens.len();
            end -= count;
            rows.extend(row.into_iter().flat_map(|row| (0..count).map(move |token| (end + token, row + token))));
        }
        self.run(ids, self.generation, workspace, false, None, attend, Some((tape, &rows)))
    }

    /// The logits of rows of hidden states: rows × vocabulary. With full weights, they have the bits of those inside the
    /// fused head.
    ///
    /// # Errors
    /// If the weights are not prepared, or the model does not predict tokens.
    pub fn logits(&self, hidden: &[f32], logits: &mut [f32]) -> Result<()> {
        if let Some(device) = &self.device {
            return device.logits(self, hidden, logits);
        }
        let precision = self.ready()?;
        self.language_head()?.logits(self.products(precision, self.generation), hidden, logits);
        Ok(())
    }
}

/// How many of their first tokens two sequences have in common.
pub fn common_beginning(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn stale() -> Error {
    Error::Invalid("the cached keys and values come from other weights or another precision".into())
}
