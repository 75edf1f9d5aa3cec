//! The gradient of attention.
//!
//! With weights `P = softmax(scale Q K')` and output `O = P V` (Dao et al., "FlashAttention", 2022, appendix B):
//! `dV = P' dO`, `dP = dO V'`, `dS = scale P (dP - rowsum(dO O))`, `dQ = dS K`, `dK = dS' Q`. The weights are computed
//! again from the scores and `log_sum_exp`.

use super::forward::BLOCK_ROWS;
use super::operands::{Head, Run, runs};
use super::softmax::{inner, score_stride, softmax_backward};
use super::{AttentionShape, Segment, check_segments, uncovered};
use crate::buffer::with_scratch;
use crate::isa::Isa;
use crate::matrix::kernel::{Hints, Left, Product, Right, Start, multiply, panel_width};
use crate::parallel::{SharedMut, each};
use crate::profile::{Call, Kind};

/// The gradient of [`attention`](super::attention) with respect to `qkv`, from that of its output; overwrites `d_qkv`.
///
/// The gradients of keys and values are folded over query rows in order, segment by segment and for each head in turn;
/// those of a shared prefix over its own rows first, then over the segments that continue it. Rows that no segment covers
/// get zeros.
///
/// # Panics
/// If lengths do not fit the shape or the segments are improper.
pub fn attention_backward(
    shape: AttentionShape,
    segments: &[Segment],
    qkv: &[f32],
    out: &[f32],
    log_sum_exp: &[f32],
    d_out: &[f32],
    d_qkv: &mut [f32],
) {
    let _call = Call::start(Kind::Attention, 0);
    shape.check();
    let width = shape.width();
    let rows = qkv.len() / width;
    let out_len = rows * shape.heads * shape.head_dim;
    assert_eq!(qkv.len(), rows * width, "attention_backward: qkv is no number of rows of {width}");
    assert_eq!(d_qkv.len(), qkv.len(), "attention_backward: d_qkv is not as long as qkv");
    assert!(out.len() == out_len && d_out.len() == out_len, "attention_backward: out and d_out are not {rows} rows");
    assert_eq!(log_sum_exp.len(), rows * shape.heads, "attention_backward: log_sum_exp is not {rows} rows");
    check_segments(segments, rows);
    for gap in uncovered(segments, rows) {
        d_qkv[gap.start * width..gap.end * width].fill(0.0);
    }
    // A task is a segment without prefix, all that continue it, and one key head: nobody else adds to its gradients.
    let roots: Vec<usize> = (0..segments.len()).filter(|&index| segments[index].prefix.is_none()).collect();
    let work = segments.iter().map(|s| s.len * s.context_len(segments)).sum::<usize>() * shape.heads * shape.head_dim;
    let isa = Isa::current();
    let d_qkv = SharedMut::new(d_qkv);
    each(roots.len() * shape.kv_heads, work, |index| {
        let (root, kv_head) = (roots[index / shape.kv_heads], index % shape.kv_heads);
        let task = Task { isa, shape, qkv, out, log_sum_exp, d_out, d_qkv, kv_head };
        let family: Vec<Segment> = std::iter::once(segments[root])
            .chain(segments.iter().copied().filter(|segment| segment.prefix == Some(root)))
            .collect();
        for segment in &family {
            task.clear(*segment);
        }
        for segment in family {
            task.segment(runs(segments, segment, segment.len));
        }
    });
}

/// The gradients of one key head and its query heads in one family of segments.
struct Task<'a> {
    isa: Isa,
    shape: AttentionShape,
    qkv: &'a [f32],
    out: &'a [f32],
    log_sum_exp: &'a [f32],
    d_out: &'a [f32],
    d_qkv: SharedMut<f32>,
    kv_head: usize,
}

/// A run of keys and values, packed.
#[derive(Clone, Copy)]
struct Packed<'a> {
    run: Run,
    key_columns: &'a [f32],
    value_columns: &'a [f32],
    key_rows: &'a [f32],
}

impl Task<'_> {
    fn key_head(&self) -> usize {
        self.shape.heads + self.kv_head
    }

    fn value_head(&self) -> usize {
        self.shape.heads + self.shape.kv_heads + self.kv_head
    }

    /// The address of a head of a row's gradient.
    fn gradient(&self, row: usize, head: usize) -> *mut f32 {
        // SAFETY: rows and heads are inside `d_qkv`.
        unsafe { self.d_qkv.get().add(row * self.shape.width() + head * self.shape.head_dim) }
    }

    /// Sets the gradients of the keys and values to zero.
    fn clear(&self, segment: Segment) {
        let (width, head_dim) = (self.shape.width(), self.shape.head_dim);
        for row in segment.start..segment.start + segment.len {
            for head in [self.key_head(), self.value_head()] {
                // SAFETY: this head of this row belongs to this task alone.
                unsafe { self.d_qkv.slice(row * width + head * head_dim, head_dim) }.fill(0.0);
            }
        }
    }

    fn segment(&self, runs: [Run; 2]) {
        let shape = self.shape;
        let [prefix, own] = runs;
        let keys = Head::query(shape, self.qkv, self.key_head());
        let values = Head::query(shape, self.qkv, self.value_head());
        let (prefix_columns, prefix_rows) = (keys.columns_len(prefix.len), prefix.len * keys.padded());
        let columns = prefix_columns + keys.columns_len(own.len);
        let context = prefix.len + own.len;
        let block = BLOCK_ROWS * score_stride(context);
        let lengths = [columns, columns, context * keys.padded(), 2 * block, 2 * BLOCK_ROWS * keys.padded()];
        with_scratch(lengths, |[key_columns, value_columns, key_rows, scores, rows]| {
            let key_columns = key_columns.split_at_mut(prefix_columns);
            let value_columns = value_columns.split_at_mut(prefix_columns);
            let key_rows = key_rows.split_at_mut(prefix_rows);
            keys.pack_columns(self.isa, prefix.start, prefix.len, key_columns.0);
            keys.pack_columns(self.isa, own.start, own.len, key_columns.1);
            values.pack_columns(self.isa, prefix.start, prefix.len, value_columns.0);
            values.pack_columns(self.isa, own.start, own.len, value_columns.1);
            keys.pack_rows(prefix.start, prefix.len, key_rows.0);
            keys.pack_rows(own.start, own.len, key_rows.1);
            let packed = [
                Packed {
                    run: prefix,
                    key_columns: key_columns.0,
                    value_columns: value_columns.0,
                    key_rows: key_rows.0,
                },
                Packed { run: own, key_columns: key_columns.1, value_columns: value_columns.1, key_rows: key_rows.1 },
            ];
            let (scores, d_scores) = scores[..2 * block].split_at_mut(block);
            let (queries, d_outs) = rows[..2 * BLOCK_ROWS * keys.padded()].split_at_mut(BLOCK_ROWS * keys.padded());
            for head in self.kv_head * shape.group()..(self.kv_head + 1) * shape.group() {
                for row in (0..own.len).step_by(BLOCK_ROWS) {
                    self.block(head, row, packed, scores, d_scores, queries, d_outs);
                }
            }
        });
    }

    /// What the rows from row `row` of the segment on contribute, for one query head.
    #[allow(clippy::too_many_arguments, reason = "four scratch areas")]
    fn block(
        &self,
        head: usize,
        row: usize,
        packed: [Packed<'_>; 2],
        scores: &mut [f32],
        d_scores: &mut [f32],
        queries: &mut [f32],
        d_outs: &mut [f32],
    ) {
        let shape = self.shape;
        let (width, head_dim) = (shape.width(), shape.head_dim);
        let own = packed[1].run;
        let rows = BLOCK_ROWS.min(own.len - row);
        let start = own.start + row;
        let position = own.offset + row;
        let (first, end) = (shape.first_visible(position), position + rows);
        let (stride, panel) = (scores.len() / BLOCK_ROWS, panel_width(self.isa));
        let out_width = shape.heads * head_dim;
        let query = Head::query(shape, self.qkv, head);
        let out = Head { rows: self.out, width: out_width, column: head * head_dim, head_dim };
        let d_out = Head { rows: self.d_out, ..out };
        let padded = query.padded();
        query.pack_rows(start, rows, queries);
        d_out.pack_rows(start, rows, d_outs);
        let by_columns = |a: Head<'_>, columns: &[f32], run: Run, c: &mut [f32]| {
            let (skipped, count) = run.needed(first, end);
            let product = Product {
                rows,
                columns: count,
                steps: head_dim,
                a: a.rows[start * a.width + a.column..].as_ptr(),
                left: Left::Rows { stride: a.width },
                b: Right::Floats(columns[skipped * head_dim..].as_ptr()),
                panel_stride: panel * head_dim,
                step_stride: panel,
                c: c[run.offset + skipped..].as_mut_ptr(),
                c_stride: stride,
                start: Start::Zero,
                hints: Hints::NONE,
            };
            // SAFETY: the rows lie inside `a`, the panels were packed whole, and `c` is this task's own.
            unsafe { multiply(self.isa, product) };
        };
        for Packed { run, key_columns, value_columns, .. } in packed {
            if run.needed(first, end).1 > 0 {
                by_columns(query, key_columns, run, scores);
                by_columns(d_out, value_columns, run, d_scores);
            }
        }
        for i in 0..rows {
            let along = inner(self.isa, out.at(start + i), d_out.at(start + i));
            let visible = shape.first_visible(position + i)..position + i + 1;
            let row = i * stride..i * stride + score_stride(end);
            let (scores, d_scores) = (&mut scores[row.clone()], &mut d_scores[row]);
            let log_sum_exp = self.log_sum_exp[(start + i) * shape.heads + head];
            // With what is not visible, which is zero in the end: it fills the last vector.
            let (weights, d_weights) = (&mut scores[visible.start..], &mut d_scores[visible.start..]);
            softmax_backward(self.isa, weights, d_weights, shape.scale, log_sum_exp, along);
            for row in [scores, d_scores] {
                row[..visible.start].fill(0.0);
                row[visible.end..].fill(0.0);
            }
        }
        let mut onto = Start::Zero;
        for Packed { run, key_rows, .. } in packed {
            let (skipped, count) = run.needed(first, end);
            if count == 0 {
                continue;
            }
            let d_queries = Product {
                rows,
                columns: head_dim,
                steps: count,
                a: d_scores[run.offset + skipped..].as_ptr(),
                left: Left::Rows { stride },
                b: Right::Floats(key_rows[skipped * padded..].as_ptr()),
                panel_stride: panel,
                step_stride: padded,
                c: self.gradient(start, head),
                c_stride: width,
                start: onto,
                hints: Hints::NONE,
            };
            onto = Start::Held;
            let by_rows = |left: &[f32], right: &[f32], head: usize| Product {
                rows: count,
                columns: head_dim,
                steps: rows,
                a: left[run.offset + skipped..].as_ptr(),
                left: Left::Steps { stride },
                b: Right::Floats(right.as_ptr()),
                panel_stride: panel,
                step_stride: padded,
                c: self.gradient(run.start + skipped, head),
                c_stride: width,
                start: Start::Held,
                hints: Hints::NONE,
            };
            for product in
                [d_queries, by_rows(d_scores, queries, self.key_head()), by_rows(scores, d_outs, self.value_head())]
            {
                // SAFETY: the scores cover `rows` rows of `stride`, the right operands were packed whole, and these heads
                // of the family's rows belong to this task alone.
                unsafe { multiply(self.isa, product) };
            }
        }
    }
}
