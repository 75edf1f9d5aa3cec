//! Attention of new tokens over cached keys and values.

use std::ops::Range;

use super::AttentionShape;
use super::operands::Run;
use super::softmax::{Normaliser, normalise, score_stride, softmax};
use crate::buffer::{Buffer, with_scratch};
use crate::half::{bfloat16, narrow};
use crate::isa::Isa;
use crate::matrix::Precision;
use crate::matrix::kernel::{Hints, Left, MOST_COLUMNS, Product, Right, Start, multiply, panel_width};
use crate::parallel::{SharedMut, each_run};
use crate::profile::{Call, Kind};
use crate::simd::Lines;

/// The keys and values of one run of tokens in one layer, laid out for decoding, which reads one head after the other: keys as
/// panels of tokens, so that a score's fold over the head runs for all tokens of a panel at once; values token by token.
///
/// A block for [`Precision::Bf16`] keeps them as bfloat16: half the memory, and half of what a step reads. That loses nothing if
/// they were rounded before ([`round_to_bf16`](crate::round_to_bf16)); otherwise they are rounded here.
#[derive(Clone, Debug)]
pub struct KvBlock {
    isa: Isa,
    shape: AttentionShape,
    len: usize,
    heads: Vec<HeadCache>,
}

/// The keys and values of one key head.
#[derive(Clone, Debug)]
struct HeadCache {
    /// For each panel of tokens: `head_dim` times one number of each.
    keys: Cells,
    /// For each token: the head padded to whole panels.
    values: Cells,
}

/// A growing array of numbers.
#[derive(Clone, Debug)]
enum Cells {
    F32(Buffer),
    Bf16(Vec<u16>),
}

impl Cells {
    fn new(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(Buffer::default()),
            Precision::Bf16 => Self::Bf16(Vec::new()),
        }
    }

    /// Makes room for `len` numbers; what is there already stays, the rest is zero.
    fn grow(&mut self, len: usize) {
        match self {
            Self::F32(cells) => cells.grow(len),
            Self::Bf16(cells) => cells.resize(len.max(cells.len()), 0),
        }
    }

    /// Writes `from` to every `stride`-th place from `start` on.
    fn scatter(&mut self, start: usize, stride: usize, from: &[f32]) {
        match self {
            Self::F32(cells) => {
                let places = cells.as_mut_slice()[start..].iter_mut().step_by(stride);
                places.zip(from).for_each(|(to, from)| *to = *from);
            }
            Self::Bf16(cells) => {
                let places = cells[start..].iter_mut().step_by(stride);
                places.zip(from).for_each(|(to, from)| *to = bfloat16(*from));
            }
        }
    }

    /// Writes `from` from `start` on.
    fn write(&mut self, isa: Isa, start: usize, from: &[f32]) {
        match self {
            Self::F32(cells) => cells.as_mut_slice()[start..][..from.len()].copy_from_slice(from),
            Self::Bf16(cells) => narrow(isa, from, &mut cells[start..][..from.len()]),
        }
    }

    /// `len` numbers from `start` on, as the right operand of a product.
    fn operand(&self, start: usize, len: usize) -> Right {
        match self {
            Self::F32(cells) => Right::Floats(cells.as_slice()[start..][..len].as_ptr()),
            Self::Bf16(cells) => Right::Halves(cells[start..][..len].as_ptr()),
        }
    }

    /// The lines that some numbers lie in.
    fn lines(&self, range: Range<usize>) -> Lines {
        match self {
            Self::F32(cells) => Lines::of(&cells.as_slice()[range]),
            Self::Bf16(cells) => Lines::of(&cells[range]),
        }
    }
}

impl KvBlock {
    /// An empty block with room for `capacity` tokens; it grows beyond that.
    pub fn new(shape: AttentionShape, precision: Precision, capacity: usize) -> Self {
        shape.check();
        let head = HeadCache { keys: Cells::new(precision), values: Cells::new(precision) };
        let mut block = Self { isa: Isa::current(), shape, len: 0, heads: vec![head; shape.kv_heads] };
        block.reserve(capacity);
        block
    }

    fn padded_head(&self) -> usize {
        self.shape.head_dim.next_multiple_of(MOST_COLUMNS)
    }

    fn reserve(&mut self, tokens: usize) {
        let padded = self.padded_head();
        for head in &mut self.heads {
            head.keys.grow(tokens.next_multiple_of(MOST_COLUMNS) * self.shape.head_dim);
            head.values.grow(tokens * padded);
        }
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
        let padded = self.padded_head();
        let panel = panel_width(self.isa);
        let start = self.len / panel * panel * head_dim + self.len % panel;
        let rows = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
        for (head, (keys, values)) in self.heads.iter_mut().zip(rows) {
            head.keys.scatter(start, panel, keys);
            head.values.write(self.isa, self.len * padded, values);
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

/// The queries of neighbouring tokens of one sequence, and what they see.
#[derive(Debug)]
pub struct DecodeQuery<'a> {
    /// Their rows `[q | k | v]`; only the queries are read.
    pub qkv: &'a [f32],
    /// The blocks that hold the sequence, in order, and how many tokens of each belong to it. Its last tokens are the
    /// queries' own; each query sees the tokens before it and itself.
    pub context: &'a [(&'a KvBlock, usize)],
    /// The result: rows of `heads * head_dim` elements.
    pub out: &'a mut [f32],
    /// Rows of `heads`: the log of the sum of the exponentials of the scaled scores, as [`attention`](super::attention) has it.
    pub log_sum_exp: &'a mut [f32],
}

/// Rows of one task.
const TASK_ROWS: usize = 128;
/// Rows of several tokens whose scores are computed at a time.
const BLOCK_ROWS: usize = 32;
/// The newest tokens of a block whose keys and values are asked for ahead; whole panels.
const NEWEST: usize = 4 * MOST_COLUMNS;

/// Attention of each query over its context: bit for bit what [`attention`](super::attention) gives for the same row.
///
/// # Panics
/// If lengths do not fit the shape, a block is of another shape or shorter than said, or a context is shorter than its
/// queries.
pub fn attention_decode(shape: AttentionShape, queries: &mut [DecodeQuery<'_>]) {
    let _call = Call::start(Kind::Attention, 0);
    shape.check();
    let (width, out_width) = (shape.width(), shape.heads * shape.head_dim);
    let mut tasks = Vec::new();
    let mut work = 0;
    for (index, query) in queries.iter().enumerate() {
        let rows = query.qkv.len() / width;
        assert_eq!(query.qkv.len(), rows * width, "attention_decode: the queries' rows");
        assert_eq!(query.out.len(), rows * out_width, "attention_decode: the queries' results");
        assert_eq!(query.log_sum_exp.len(), rows * shape.heads, "attention_decode: the queries' sums");
        for (block, len) in query.context {
            let same = (block.shape.heads, block.shape.kv_heads, block.shape.head_dim);
            assert_eq!(same, (shape.heads, shape.kv_heads, shape.head_dim), "attention_decode: a block's shape");
            assert!(*len <= block.len, "attention_decode: {len} tokens of a block of {}", block.len);
        }
        let context = context_len(query.context);
        assert!(rows <= context, "attention_decode: {rows} queries that see {context} tokens");
        for first in (0..rows).step_by(TASK_ROWS) {
            tasks.extend((0..shape.kv_heads).map(|kv_head| (index, kv_head, first..rows.min(first + TASK_ROWS))));
        }
        work += rows * context * out_width;
    }
    let isa = Isa::current();
    let outs: Vec<[SharedMut<f32>; 2]> =
        (queries.iter_mut()).map(|query| [SharedMut::new(query.out), SharedMut::new(query.log_sum_exp)]).collect();
    let queries: &[DecodeQuery<'_>] = queries;
    let run_task = |task: usize| {
        let (index, kv_head, rows) = tasks[task].clone();
        let DecodeQuery { qkv, context, .. } = &queries[index];
        // Several rows go through the same keys again and again: what they would ask for would be asked for as often.
        let next = tasks.get(task + 1).filter(|_| rows.len() == 1);
        let next = next.map(|&(next, kv_head, _)| (&queries[next], kv_head));
        let before = context_len(context) - qkv.len() / width;
        let [out, log_sum_exp] = outs[index];
        let lanes = Lanes { isa, shape, qkv, context, kv_head, next, out, log_sum_exp };
        let heads = kv_head * shape.group()..(kv_head + 1) * shape.group();
        if rows.len() == 1 {
            lanes.run(rows.start, heads.start, heads.len(), shape.head_dim, shape.head_dim, before + rows.start + 1, 0);
        } else {
            for head in heads {
                for row in rows.clone().step_by(BLOCK_ROWS) {
                    let count = BLOCK_ROWS.min(rows.end - row);
                    lanes.run(row, head, count, width, out_width, before + row + 1, 1);
                }
            }
        }
    };
    let size = tasks.len().div_ceil(8 * rayon::current_num_threads());
    each_run(tasks.len(), size, work, |run| run.for_each(run_task));
}

impl DecodeQuery<'_> {
    /// The keys of one head, of the newest tokens of each block: of these there is always need.
    fn newest_keys(&self, kv_head: usize) -> impl Iterator<Item = Lines> {
        self.context.iter().map(move |(block, len)| {
            let (head_dim, first) = (block.shape.head_dim, len.saturating_sub(NEWEST) / MOST_COLUMNS * MOST_COLUMNS);
            block.heads[kv_head].keys.lines(first * head_dim..len.next_multiple_of(MOST_COLUMNS) * head_dim)
        })
    }

    /// The values of the same tokens.
    fn newest_values(&self, kv_head: usize) -> impl Iterator<Item = Lines> {
        self.context.iter().map(move |(block, len)| {
            let padded = block.padded_head();
            block.heads[kv_head].values.lines(len.saturating_sub(NEWEST) * padded..len * padded)
        })
    }
}

fn context_len(context: &[(&KvBlock, usize)]) -> usize {
    context.iter().map(|(_, len)| len).sum()
}

/// Queries over the keys of one key head: all of its heads for one token, or one head for several tokens.
struct Lanes<'a, 'q> {
    isa: Isa,
    shape: AttentionShape,
    qkv: &'a [f32],
    context: &'a [(&'a KvBlock, usize)],
    kv_head: usize,
    /// Whose keys and values come next: they are asked for while these are read.
    next: Option<(&'a DecodeQuery<'q>, usize)>,
    out: SharedMut<f32>,
    log_sum_exp: SharedMut<f32>,
}

impl Lanes<'_, '_> {
    /// The attention of `count` lanes, of which the first is `head` of row `row`; the others follow `stride` apart in the
    /// rows and `out_stride` apart in the result. The first sees `visible` tokens, each other `advance` more.
    #[allow(clippy::too_many_arguments, reason = "two ways through the same rows")]
    fn run(
        &self,
        row: usize,
        head: usize,
        count: usize,
        stride: usize,
        out_stride: usize,
        visible: usize,
        advance: usize,
    ) {
        let (isa, shape, kv_head) = (self.isa, self.shape, self.kv_head);
        let head_dim = shape.head_dim;
        let queries = &self.qkv[row * shape.width() + head * head_dim..];
        let out_start = (row * shape.heads + head) * head_dim;
        let end = visible + (count - 1) * advance;
        let first = shape.first_visible(visible - 1);
        // The blocks, with the first token that is needed, how many are, and the place of that token in the sequence.
        let parts = self.context.iter().scan(0, |offset, &(block, len)| {
            let run = Run { start: 0, len, offset: *offset };
            let (skipped, needed) = run.needed(first, end);
            *offset += len;
            Some((block, skipped, needed, run.offset + skipped))
        });
        let score_width = score_stride(end);
        with_scratch([count * score_width], |[scores]| {
            let mut ahead = self.next.into_iter().flat_map(|(query, kv_head)| query.newest_keys(kv_head));
            for (block, skipped, needed, place) in parts.clone().filter(|(.., needed, _)| *needed > 0) {
                let panel = panel_width(block.isa);
                let (start, len) = (skipped * head_dim, needed.next_multiple_of(MOST_COLUMNS) * head_dim);
                let product = Product {
                    rows: count,
                    columns: needed,
                    steps: head_dim,
                    a: queries.as_ptr(),
                    left: Left::Rows { stride },
                    b: block.heads[kv_head].keys.operand(start, len),
                    panel_stride: panel * head_dim,
                    step_stride: panel,
                    c: scores[place..].as_mut_ptr(),
                    c_stride: score_width,
                    start: Start::Zero,
                    hints: Hints { ahead: ahead.next().unwrap_or(Lines::NONE), ..Hints::NONE },
                };
                // SAFETY: the lanes lie inside the rows, the block's panels are whole, the scores are ours.
                unsafe { multiply(block.isa, product) };
            }
            ahead.for_each(Lines::ask_for_all);
            let mut normalisers = vec![Normaliser::default(); count];
            for (lane, (normaliser, scores)) in
                normalisers.iter_mut().zip(scores.chunks_exact_mut(score_width)).enumerate()
            {
                let visible = visible + lane * advance;
                let first = shape.first_visible(visible - 1);
                scores[..first].fill(0.0);
                *normaliser = softmax(isa, &mut scores[first..], visible - first, shape.scale);
            }
            for (lane, normaliser) in normalisers.iter().enumerate() {
                let place = (out_start + lane * out_stride) / head_dim;
                // SAFETY: there is one for each head of each row, and these belong to this task alone.
                unsafe { *self.log_sum_exp.get().add(place) = normaliser.log_sum_exp() };
            }
            let mut ahead = self.next.into_iter().flat_map(|(query, kv_head)| query.newest_values(kv_head));
            let mut onto = Start::Zero;
            for (block, skipped, needed, place) in parts.filter(|(.., needed, _)| *needed > 0) {
                let padded = block.padded_head();
                let product = Product {
                    rows: count,
                    columns: head_dim,
                    steps: needed,
                    a: scores[place..].as_ptr(),
                    left: Left::Rows { stride: score_width },
                    b: block.heads[kv_head].values.operand(skipped * padded, needed * padded),
                    panel_stride: panel_width(isa),
                    step_stride: padded,
                    // SAFETY: the row lies inside the result.
                    c: unsafe { self.out.get().add(out_start) },
                    c_stride: out_stride,
                    start: onto,
                    hints: Hints { ahead: ahead.next().unwrap_or(Lines::NONE), ..Hints::NONE },
                };
                // SAFETY: the scores cover the lanes, the block holds `needed` tokens from `skipped` on, and these heads of
                // these rows of the result belong to this task alone.
                unsafe { multiply(isa, product) };
                onto = Start::Held;
            }
            ahead.for_each(Lines::ask_for_all);
            for (lane, normaliser) in normalisers.iter().enumerate() {
                // SAFETY: as above.
                let out = unsafe { self.out.slice(out_start + lane * out_stride, head_dim) };
                normalise(isa, out, normaliser.inverse());
            }
        });
    }
}
