//! Attention.

use crate::isa::{Isa, multiversion};
use crate::math::{exp, ln, max, sum};

/// Heads and scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Keys visible to a query, itself included.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Width of a row of `[q | k | v]`.
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// One sequence of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row.
    pub start: usize,
    /// Rows.
    pub len: usize,
    /// The earlier segment that precedes it.
    pub prefix: Option<usize>,
}

impl Segment {
    /// Tokens before the first row.
    pub fn prefix_len(&self, segments: &[Segment]) -> usize {
        self.prefix.map_or(0, |index| segments[index].len)
    }
}

/// Rows that segment `s` sees up to its row `i`.
fn visible(segments: &[Segment], s: Segment, i: usize, window: Option<usize>) -> Vec<usize> {
    let mut rows: Vec<usize> = s.prefix.map_or(vec![], |p| (segments[p].start..segments[p].start + segments[p].len).collect());
    rows.extend(s.start..=s.start + i);
    let first = window.map_or(0, |w| rows.len().saturating_sub(w));
    rows.split_off(first)
}

multiversion! {
    fn one_query(shape: AttentionShape, q: &[f32], keys: &[&[f32]], values: &[&[f32]], out: &mut [f32]) -> f32 {
        let mut scores: Vec<f32> = keys.iter().map(|k| q.iter().zip(*k).fold(0.0f32, |s, (q, k)| q.mul_add(*k, s)) * shape.scale).collect();
        let highest = max(&scores);
        for s in &mut scores { *s = exp(*s - highest); }
        let total = sum(scores.len(), |i| scores[i]);
        out.fill(0.0);
        for (p, v) in scores.iter().zip(values) {
            for (o, v) in out.iter_mut().zip(*v) { *o = p.mul_add(*v, *o); }
        }
        for o in out.iter_mut() { *o *= 1.0 / total; }
        highest + ln(total)
    }
}

/// Causal attention.
pub fn attention(shape: AttentionShape, segments: &[Segment], qkv: &[f32], out: &mut [f32], log_sum_exp: &mut [f32]) {
    let isa = Isa::current();
    let (hd, w) = (shape.head_dim, shape.width());
    out.fill(0.0);
    log_sum_exp.fill(0.0);
    for &s in segments {
        for i in 0..s.len {
            let row = s.start + i;
            let rows = visible(segments, s, i, shape.window);
            for h in 0..shape.heads {
                let kh = h / (shape.heads / shape.kv_heads);
                let part = |r: usize, head: usize| &qkv[r * w + head * hd..][..hd];
                let keys: Vec<&[f32]> = rows.iter().map(|&r| part(r, shape.heads + kh)).collect();
                let values: Vec<&[f32]> = rows.iter().map(|&r| part(r, shape.heads + shape.kv_heads + kh)).collect();
                let o = &mut out[(row * shape.heads + h) * hd..][..hd];
                log_sum_exp[row * shape.heads + h] = one_query(isa, shape, part(row, h), &keys, &values, o);
            }
        }
    }
}

/// Gradient of [`attention`].
pub fn attention_backward(shape: AttentionShape, segments: &[Segment], qkv: &[f32], out: &[f32], log_sum_exp: &[f32], d_out: &[f32], d_qkv: &mut [f32]) {
    let (hd, w) = (shape.head_dim, shape.width());
    d_qkv.fill(0.0);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).fold(0.0f32, |s, (a, b)| s + a * b);
    for &s in segments {
        for i in 0..s.len {
            let row = s.start + i;
            let rows = visible(segments, s, i, shape.window);
            for h in 0..shape.heads {
                let kh = h / (shape.heads / shape.kv_heads);
                let at = |r: usize, head: usize| r * w + head * hd;
                let o = (row * shape.heads + h) * hd;
                let delta = dot(&out[o..][..hd], &d_out[o..][..hd]);
                for &r in &rows {
                    let (k, v) = (at(r, shape.heads + kh), at(r, shape.heads + shape.kv_heads + kh));
                    let p = exp(dot(&qkv[at(row, h)..][..hd], &qkv[k..][..hd]) * shape.scale - log_sum_exp[row * shape.heads + h]);
                    let ds = p * (dot(&d_out[o..][..hd], &qkv[v..][..hd]) - delta) * shape.scale;
                    for d in 0..hd {
                        d_qkv[at(row, h) + d] += ds * qkv[k + d];
                        d_qkv[k + d] += ds * qkv[at(row, h) + d];
                        d_qkv[v + d] += p * d_out[o + d];
                    }
                }
            }
        }
    }
}

/// Keys and values of one run of tokens in one layer.
#[derive(Clone, Debug)]
pub struct KvBlock {
    shape: AttentionShape,
    rows: Vec<f32>,
}

impl KvBlock {
    /// Empty.
    pub fn new(shape: AttentionShape, capacity: usize) -> Self {
        Self { shape, rows: Vec::with_capacity(capacity * shape.width()) }
    }
    /// Appends one row of `[q | k | v]`.
    pub fn push_row(&mut self, qkv: &[f32]) {
        self.rows.extend_from_slice(qkv);
    }
    /// Appends rows.
    pub fn extend(&mut self, qkv: &[f32]) {
        self.rows.extend_from_slice(qkv);
    }
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.rows.len() / self.shape.width()
    }
    /// Whether none are held.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
    /// Keeps the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.rows.truncate(len * self.shape.width());
    }
}

/// One query of a decode step.
#[derive(Debug)]
pub struct DecodeQuery<'a> {
    /// Its row of `[q | k | v]`.
    pub qkv: &'a [f32],
    /// The blocks it sees, the last one its own.
    pub context: [&'a KvBlock; 2],
    /// Keys visible in the last block.
    pub visible: usize,
    /// Where the result goes.
    pub out: &'a mut [f32],
}

/// Attention of single queries.
pub fn attention_decode(shape: AttentionShape, queries: &mut [DecodeQuery<'_>]) {
    let isa = Isa::current();
    let (hd, w) = (shape.head_dim, shape.width());
    for query in queries {
        let [prefix, own] = query.context;
        let mut rows: Vec<&[f32]> = prefix.rows.chunks(w).chain(own.rows.chunks(w).take(query.visible)).collect();
        let first = shape.window.map_or(0, |window| rows.len().saturating_sub(window));
        let rows = rows.split_off(first);
        for h in 0..shape.heads {
            let kh = h / (shape.heads / shape.kv_heads);
            let keys: Vec<&[f32]> = rows.iter().map(|r| &r[(shape.heads + kh) * hd..][..hd]).collect();
            let values: Vec<&[f32]> = rows.iter().map(|r| &r[(shape.heads + shape.kv_heads + kh) * hd..][..hd]).collect();
            one_query(isa, shape, &query.qkv[h * hd..][..hd], &keys, &values, &mut query.out[h * hd..][..hd]);
        }
    }
}
