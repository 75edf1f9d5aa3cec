//! Generation: prompts into key-value caches, then tokens one by one, with the same bits as the training forward.

use std::sync::Arc;

use kernels::{DecodeQuery, KvBlock};

use super::{Decoder, PackedTokens, Workspace};
use crate::error::{Error, Result};

/// Rows of prompts computed together.
const PREFILL_ROWS: usize = 2048;

/// The keys and values of a run of tokens in every layer.
pub struct KvCache {
    layers: Vec<KvBlock>,
    len: usize,
}

impl KvCache {
    fn new(decoder: &Decoder, capacity: usize) -> Self {
        Self { layers: decoder.layers.iter().map(|layer| KvBlock::new(layer.shape, capacity)).collect(), len: 0 }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A prompt that has been computed.
pub struct Prefill {
    /// Its keys and values, to be shared by all continuations.
    pub cache: Arc<KvCache>,
    /// The hidden state after the final norm at its last token.
    pub hidden: Vec<f32>,
}

/// The cache of one sequence: a shared prompt and its own continuation.
pub struct SequenceCache {
    prefix: Arc<KvCache>,
    own: KvCache,
}

impl SequenceCache {
    /// A continuation of `prefix` with room for `capacity` tokens before it has to grow.
    pub fn new(decoder: &Decoder, prefix: Arc<KvCache>, capacity: usize) -> Self {
        Self { prefix, own: KvCache::new(decoder, capacity) }
    }

    /// Tokens in the whole sequence so far.
    pub fn len(&self) -> usize {
        self.prefix.len + self.own.len
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
        self.own.len = self.own.len.min(len);
    }
}

/// Tokens to append to one sequence.
pub struct DecodeRow<'a> {
    /// One token, or several in order.
    pub tokens: &'a [u32],
    /// The sequence.
    pub cache: &'a mut SequenceCache,
}

impl Decoder {
    /// Computes prompts, each on its own, and returns their caches and last hidden states in order.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn prefill(&self, prompts: &[&[u32]], workspace: &mut Workspace) -> Result<Vec<Prefill>> {
        let mut done = Vec::with_capacity(prompts.len());
        let mut rest = prompts;
        while !rest.is_empty() {
            let mut tokens = PackedTokens::new();
            let mut count = 0;
            while count < rest.len() && (count == 0 || tokens.rows() + rest[count].len() <= PREFILL_ROWS) {
                tokens.push(rest[count], None)?;
                count += 1;
            }
            rest = &rest[count..];
            self.prefill_packed(&tokens, workspace, &mut done)?;
        }
        Ok(done)
    }

    fn prefill_packed(&self, tokens: &PackedTokens, workspace: &mut Workspace, done: &mut Vec<Prefill>) -> Result<()> {
        self.ready()?;
        tokens.check(self.config.vocab_size, self.config.max_positions)?;
        let mut caches: Vec<KvCache> =
            tokens.segments().iter().map(|segment| KvCache::new(self, segment.len)).collect();
        workspace.positions = tokens.positions();
        self.run(tokens.ids(), workspace, false, |layer, kept| {
            kernels::attention(layer.shape, tokens.segments(), &kept.qkv, &mut kept.attention, &mut kept.log_sum_exp);
            let width = layer.qkv.outputs;
            for (segment, cache) in tokens.segments().iter().zip(&mut caches) {
                cache.layers[layer.index].extend(&kept.qkv[segment.start * width..][..segment.len * width]);
            }
        })?;
        let d = self.config.hidden_size;
        for (segment, mut cache) in tokens.segments().iter().zip(caches) {
            cache.len = segment.len;
            let last = segment.start + segment.len - 1;
            done.push(Prefill { cache: Arc::new(cache), hidden: workspace.hidden[last * d..][..d].to_vec() });
        }
        Ok(())
    }

    /// Appends tokens to sequences. [`Workspace::hidden`] then holds one row for each token, in order.
    ///
    /// The bits of a row depend on its own sequence alone, not on the other rows.
    ///
    /// # Errors
    /// As [`Decoder::forward`]; the caches are then in no usable state.
    pub fn decode(&self, rows: &mut [DecodeRow<'_>], workspace: &mut Workspace) -> Result<()> {
        self.ready()?;
        let vocabulary = self.config.vocab_size;
        let max_positions = self.config.max_positions;
        let mut ids = Vec::new();
        workspace.positions.clear();
        for row in rows.iter() {
            if let Some(&id) = row.tokens.iter().find(|&&id| id as usize >= vocabulary) {
                return Err(Error::Invalid(format!("token {id} is not below the vocabulary size {vocabulary}")));
            }
            let first = row.cache.len();
            if first + row.tokens.len() > max_positions {
                return Err(Error::Invalid(format!(
                    "a sequence outgrows the model's context of {max_positions} tokens"
                )));
            }
            ids.extend_from_slice(row.tokens);
            workspace.positions.extend((first..first + row.tokens.len()).map(|position| position as u32));
        }
        self.run(&ids, workspace, false, |layer, kept| {
            let mut qkv_rows = kept.qkv.chunks_exact(layer.qkv.outputs);
            for row in rows.iter_mut() {
                for qkv in qkv_rows.by_ref().take(row.tokens.len()) {
                    row.cache.own.layers[layer.index].push_row(qkv);
                }
            }
            let mut queries = Vec::with_capacity(ids.len());
            let mut qkv_rows = kept.qkv.chunks_exact(layer.qkv.outputs);
            let mut out_rows = kept.attention.chunks_exact_mut(layer.output.inputs);
            for row in rows.iter() {
                let own = &row.cache.own;
                for visible in own.len + 1..=own.len + row.tokens.len() {
                    if let (Some(qkv), Some(out)) = (qkv_rows.next(), out_rows.next()) {
                        let context = [&row.cache.prefix.layers[layer.index], &own.layers[layer.index]];
                        queries.push(DecodeQuery { qkv, context, visible, out });
                    }
                }
            }
            kernels::attention_decode(layer.shape, &mut queries);
        })?;
        for row in rows {
            row.cache.own.len += row.tokens.len();
        }
        Ok(())
    }

    /// The logits of rows of hidden states: rows × vocabulary, the same bits as those inside the fused head.
    ///
    /// # Errors
    /// If the weights are not prepared.
    pub fn logits(&self, hidden: &[f32], logits: &mut [f32]) -> Result<()> {
        let precision = self.ready()?;
        self.head.logits(self.products(precision), hidden, logits);
        Ok(())
    }
}
