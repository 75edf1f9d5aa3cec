//! Attention of single queries over cached keys and values.

use super::AttentionShape;
use super::operands::Run;
use super::softmax::{normalise, softmax};
use crate::buffer::{Buffer, with_scratch};
use crate::isa::Isa;
use crate::matrix::kernel::{Left, PANEL, Product, multiply};
use crate::parallel::{SharedMut, each};

/// The keys and values of one run of tokens in one layer, laid out for decoding: keys as panels of 32 tokens, so that a
/// score's fold over the head runs for 32 tokens at once; values token by token.
#[derive(Clone, Debug)]
pub struct KvBlock {
    shape: AttentionShape,
    len: usize,
    /// For each panel of tokens, for each key head: `head_dim x PANEL`.
    keys: Buffer,
    /// For each token, for each value head: the head padded to whole panels.
    values: Buffer,
}

impl KvBlock {
    /// An empty block with room for `capacity` tokens; it grows beyond that.
    pub fn new(shape: AttentionShape, capacity: usize) -> Self {
        shape.check();
        let mut block = Self { shape, len: 0, keys: Buffer::default(), values: Buffer::default() };
        block.reserve(capacity);
        block
    }

    fn padded_head(&self) -> usize {
        self.shape.head_dim.next_multiple_of(PANEL)
    }

    fn reserve(&mut self, tokens: usize) {
        self.keys.grow(tokens.next_multiple_of(PANEL) * self.shape.kv_heads * self.shape.head_dim);
        self.values.grow(tokens * self.shape.kv_heads * self.padded_head());
    }

    /// Appends the keys and values of one row `[q | k | v]`.
    ///
    /// # Panics
    /// If the row is not as wide as the shape says.
    pub fn push_row(&mut self, qkv: &[f32]) {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        assert_eq!(qkv.len(), self.shape.width(), "push_row: the row's width");
        self.reserve(self.len + 1);
        let (keys, values) = qkv[heads * head_dim..].split_at(kv_heads * head_dim);
        let (panel, column) = (self.len / PANEL, self.len % PANEL);
        let panel = &mut self.keys.as_mut_slice()[panel * kv_heads * head_dim * PANEL..][..kv_heads * head_dim * PANEL];
        for (to, &key) in panel.chunks_exact_mut(PANEL).zip(keys) {
            to[column] = key;
        }
        let padded = self.padded_head();
        let row = &mut self.values.as_mut_slice()[self.len * kv_heads * padded..][..kv_heads * padded];
        for (to, value) in row.chunks_exact_mut(padded).zip(values.chunks_exact(head_dim)) {
            to[..head_dim].copy_from_slice(value);
        }
        self.len += 1;
    }

    /// Appends several rows.
    ///
    /// # Panics
    /// If `qkv` is no number of rows.
    pub fn extend(&mut self, qkv: &[f32]) {
        let width = self.shape.width();
        assert!(qkv.len().is_multiple_of(width), "extend: {} is no number of rows of {width}", qkv.len());
        self.reserve(self.len + qkv.len() / width);
        for row in qkv.chunks_exact(width) {
            self.push_row(row);
        }
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Keeps the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

/// One token's query, and what it sees.
#[derive(Debug)]
pub struct DecodeQuery<'a> {
    /// Its row `[q | k | v]`; only the queries are read.
    pub qkv: &'a [f32],
    /// The blocks that hold its context: a shared prefix (perhaps empty), then its own, which holds the token itself.
    pub context: [&'a KvBlock; 2],
    /// How many tokens of the last block it sees, itself included.
    pub visible: usize,
    /// The result: `heads * head_dim` elements.
    pub out: &'a mut [f32],
}

/// Attention of each query over its context: bit for bit what [`attention`](super::attention) gives for the same row.
///
/// # Panics
/// If lengths do not fit the shape, a block is of another shape, or a query sees no key or more than there are.
pub fn attention_decode(shape: AttentionShape, queries: &mut [DecodeQuery<'_>]) {
    shape.check();
    let out_width = shape.heads * shape.head_dim;
    let mut work = 0;
    for query in queries.iter() {
        assert_eq!(query.qkv.len(), shape.width(), "attention_decode: the query's row");
        assert_eq!(query.out.len(), out_width, "attention_decode: the query's result");
        let [prefix, own] = query.context;
        for block in [prefix, own] {
            let same = (block.shape.heads, block.shape.kv_heads, block.shape.head_dim);
            assert_eq!(same, (shape.heads, shape.kv_heads, shape.head_dim), "attention_decode: a block's shape");
        }
        assert!(
            query.visible <= own.len && prefix.len + query.visible > 0,
            "attention_decode: a query that sees {} of {} tokens",
            query.visible,
            own.len
        );
        work += (prefix.len + query.visible) * out_width;
    }
    let isa = Isa::current();
    let outs: Vec<SharedMut<f32>> = queries.iter_mut().map(|query| SharedMut::new(query.out)).collect();
    let queries: &[DecodeQuery<'_>] = queries;
    let group_width = shape.group() * shape.head_dim;
    each(queries.len() * shape.kv_heads, work, |task| {
        let (index, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let query = &queries[index];
        // SAFETY: these heads of this query belong to this task alone; the shared borrow reads other fields.
        let out = unsafe { outs[index].slice(kv_head * group_width, group_width) };
        one_group(isa, shape, query.qkv, query.context, query.visible, kv_head, out);
    });
}

/// The query heads that share one key head.
fn one_group(
    isa: Isa,
    shape: AttentionShape,
    qkv: &[f32],
    context: [&KvBlock; 2],
    visible: usize,
    kv_head: usize,
    out: &mut [f32],
) {
    let (group, head_dim) = (shape.group(), shape.head_dim);
    let prefix = context[0];
    let end = prefix.len + visible;
    let first = shape.first_visible(end - 1);
    let runs = [Run { start: 0, len: prefix.len, offset: 0 }, Run { start: 0, len: visible, offset: prefix.len }];
    with_scratch([group * end], |[scores]| {
        for (run, block) in runs.into_iter().zip(context) {
            let (skipped, count) = run.needed(first, end);
            if count == 0 {
                continue;
            }
            let product = Product {
                rows: group,
                columns: count,
                steps: head_dim,
                pairs: false,
                a: qkv[kv_head * group * head_dim..].as_ptr(),
                left: Left::Rows { stride: head_dim },
                b: block.keys.as_slice()[(skipped * shape.kv_heads + kv_head * PANEL) * head_dim..].as_ptr(),
                panel_stride: shape.kv_heads * head_dim * PANEL,
                step_stride: PANEL,
                c: scores[run.offset + skipped..].as_mut_ptr(),
                c_stride: end,
                accumulate: false,
            };
            // SAFETY: the group's heads lie inside the row, the block's panels are whole, the scores are ours.
            unsafe { multiply(isa, product) };
        }
        let mut accumulate = false;
        let mut inverse_totals = vec![0.0; group];
        for (inverse_total, scores) in inverse_totals.iter_mut().zip(scores.chunks_exact_mut(end)) {
            scores[..first].fill(0.0);
            (*inverse_total, _) = softmax(isa, &mut scores[first..], shape.scale);
        }
        for (run, block) in runs.into_iter().zip(context) {
            let (skipped, count) = run.needed(first, end);
            if count == 0 {
                continue;
            }
            let padded = block.padded_head();
            let product = Product {
                rows: group,
                columns: head_dim,
                steps: count,
                pairs: false,
                a: scores[run.offset + skipped..].as_ptr(),
                left: Left::Rows { stride: end },
                b: block.values.as_slice()[(skipped * shape.kv_heads + kv_head) * padded..].as_ptr(),
                panel_stride: PANEL,
                step_stride: shape.kv_heads * padded,
                c: out.as_mut_ptr(),
                c_stride: head_dim,
                accumulate,
            };
            // SAFETY: the scores cover the group, the block holds `count` tokens from `skipped` on, `out` is ours.
            unsafe { multiply(isa, product) };
            accumulate = true;
        }
        for (out, &inverse_total) in out.chunks_exact_mut(head_dim).zip(&inverse_totals) {
            normalise(isa, out, inverse_total);
        }
    });
}
