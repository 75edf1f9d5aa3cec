//! Attention of whole segments.

use super::operands::{Head, Run, runs};
use super::softmax::{Normaliser, normalise, score_stride, softmax};
use super::{AttentionShape, Segment, check_segments, uncovered};
use crate::buffer::with_scratch;
use crate::isa::Isa;
use crate::matrix::kernel::{Hints, Left, MOST_COLUMNS, Product, Right, Start, multiply, panel_width};
use crate::parallel::{SharedMut, each};
use crate::profile::{Call, Kind};

/// Rows of one task.
const TASK_ROWS: usize = 128;
/// Rows whose scores are computed at a time.
pub(super) const BLOCK_ROWS: usize = 32;

/// Causal attention of every segment.
///
/// `qkv` holds rows of [`AttentionShape::width`], `out` rows of `heads * head_dim`, `log_sum_exp` rows of `heads`: the log
/// of the sum of the exponentials of the scaled scores, which [`attention_backward`](super::attention_backward) needs.
/// Rows that no segment covers get zeros.
///
/// # Panics
/// If lengths do not fit the shape or the segments are improper.
pub fn attention(shape: AttentionShape, segments: &[Segment], qkv: &[f32], out: &mut [f32], log_sum_exp: &mut [f32]) {
    let _call = Call::start(Kind::Attention, 0);
    shape.check();
    let rows = qkv.len() / shape.width();
    let out_width = shape.heads * shape.head_dim;
    assert_eq!(qkv.len(), rows * shape.width(), "attention: qkv is no number of rows of {}", shape.width());
    assert_eq!(out.len(), rows * out_width, "attention: out is not {rows} rows of {out_width}");
    assert_eq!(log_sum_exp.len(), rows * shape.heads, "attention: log_sum_exp is not {rows} rows of {}", shape.heads);
    check_segments(segments, rows);
    for gap in uncovered(segments, rows) {
        out[gap.start * out_width..gap.end * out_width].fill(0.0);
        log_sum_exp[gap.start * shape.heads..gap.end * shape.heads].fill(0.0);
    }
    let mut tasks = Vec::new();
    let mut work = 0;
    for &segment in segments {
        for first in (0..segment.len).step_by(TASK_ROWS) {
            // The longest task first: its end decides when all are done.
            tasks.extend((0..shape.kv_heads).map(|kv_head| (segment, kv_head, first)));
        }
        work += segment.len * segment.context_len(segments) * out_width;
    }
    let isa = Isa::current();
    let (out, log_sum_exp) = (SharedMut::new(out), SharedMut::new(log_sum_exp));
    each(tasks.len(), work, |index| {
        let (segment, kv_head, first) = tasks[index];
        let last = (first + TASK_ROWS).min(segment.len);
        let task = Task { isa, shape, qkv, runs: runs(segments, segment, last), kv_head, out, log_sum_exp };
        task.run(segment.start, first, last);
    });
}

/// The rows of one segment and the query heads of one key head.
struct Task<'a> {
    isa: Isa,
    shape: AttentionShape,
    qkv: &'a [f32],
    runs: [Run; 2],
    kv_head: usize,
    out: SharedMut<f32>,
    log_sum_exp: SharedMut<f32>,
}

impl Task<'_> {
    fn run(&self, start: usize, first: usize, last: usize) {
        let shape = self.shape;
        let keys = Head::query(shape, self.qkv, shape.heads + self.kv_head);
        let values = Head::query(shape, self.qkv, shape.heads + shape.kv_heads + self.kv_head);
        let [prefix, own] = self.runs;
        let prefix_columns = keys.columns_len(prefix.len);
        let context = prefix.len + own.len;
        let lengths =
            [prefix_columns + keys.columns_len(own.len), context * values.padded(), BLOCK_ROWS * score_stride(context)];
        with_scratch(lengths, |[packed_keys, packed_values, scores]| {
            let (prefix_keys, own_keys) = packed_keys.split_at_mut(prefix_columns);
            let (prefix_values, own_values) = packed_values.split_at_mut(prefix.len * values.padded());
            keys.pack_columns(self.isa, prefix.start, prefix.len, prefix_keys);
            keys.pack_columns(self.isa, own.start, own.len, own_keys);
            values.pack_rows(prefix.start, prefix.len, prefix_values);
            values.pack_rows(own.start, own.len, own_values);
            let operands = [(prefix, &*prefix_keys, &*prefix_values), (own, &*own_keys, &*own_values)];
            for head in self.kv_head * shape.group()..(self.kv_head + 1) * shape.group() {
                for row in (first..last).step_by(BLOCK_ROWS) {
                    self.block(
                        head,
                        start,
                        row,
                        BLOCK_ROWS.min(last - row),
                        operands,
                        &mut scores[..BLOCK_ROWS * score_stride(context)],
                    );
                }
            }
        });
    }

    /// The output of `rows` rows from row `row` of the segment on, for one head.
    fn block(
        &self,
        head: usize,
        start: usize,
        row: usize,
        rows: usize,
        operands: [(Run, &[f32], &[f32]); 2],
        scores: &mut [f32],
    ) {
        let shape = self.shape;
        let (width, head_dim) = (shape.width(), shape.head_dim);
        let panel = panel_width(self.isa);
        let stride = scores.len() / BLOCK_ROWS;
        let position = self.runs[0].len + row;
        let (first, end) = (shape.first_visible(position), position + rows);
        for (run, keys, _) in operands {
            let (skipped, count) = run.needed(first, end);
            let product = Product {
                rows,
                columns: count,
                steps: head_dim,
                a: self.qkv[(start + row) * width + head * head_dim..].as_ptr(),
                left: Left::Rows { stride: width },
                b: Right::Floats(keys[skipped * head_dim..].as_ptr()),
                panel_stride: panel * head_dim,
                step_stride: panel,
                c: scores[run.offset + skipped..].as_mut_ptr(),
                c_stride: stride,
                start: Start::Zero,
                hints: Hints::NONE,
            };
            // SAFETY: the rows are rows of `qkv`, the panels were packed whole, and the scores are this task's own.
            unsafe { multiply(self.isa, product) };
        }
        let mut normalisers = [Normaliser::default(); BLOCK_ROWS];
        let normalisers = &mut normalisers[..rows];
        for (i, normaliser) in normalisers.iter_mut().enumerate() {
            let scores = &mut scores[i * stride..][..score_stride(end)];
            let visible = shape.first_visible(position + i)..position + i + 1;
            scores[..visible.start].fill(0.0);
            *normaliser = softmax(self.isa, &mut scores[visible.start..], visible.len(), shape.scale);
        }
        for (i, normaliser) in normalisers.iter().enumerate() {
            // SAFETY: this row and head belong to this task alone.
            let kept = unsafe { self.log_sum_exp.slice((start + row + i) * shape.heads + head, 1) };
            kept[0] = normaliser.log_sum_exp();
        }
        let out_width = shape.heads * head_dim;
        let out_start = (start + row) * out_width + head * head_dim;
        let mut onto = Start::Zero;
        for (run, _, values) in operands {
            let (skipped, count) = run.needed(first, end);
            if count == 0 {
                continue;
            }
            let padded = head_dim.next_multiple_of(MOST_COLUMNS);
            let product = Product {
                rows,
                columns: head_dim,
                steps: count,
                a: scores[run.offset + skipped..].as_ptr(),
                left: Left::Rows { stride },
                b: Right::Floats(values[skipped * padded..].as_ptr()),
                panel_stride: panel,
                step_stride: padded,
                // SAFETY: the row lies inside `out`.
                c: unsafe { self.out.get().add(out_start) },
                c_stride: out_width,
                start: onto,
                hints: Hints::NONE,
            };
            // SAFETY: the scores cover `rows` rows, the values were packed for the run, and this head of these rows of
            // `out` belongs to this task alone.
            unsafe { multiply(self.isa, product) };
            onto = Start::Held;
        }
        for (i, normaliser) in normalisers.iter().enumerate() {
            // SAFETY: as above.
            let out = unsafe { self.out.slice(out_start + i * out_width, head_dim) };
            normalise(self.isa, out, normaliser.inverse());
        }
    }
}
