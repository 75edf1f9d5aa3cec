//! Causal attention over packed rows, forward and backward, and of new tokens over cached ones.
//!
//! Everything is f32. A score is a left fold over the head's elements; a row's softmax is one function of exactly the
//! visible keys ([`softmax`]); the weighted values are folded over keys in ascending order, a shared prefix before a
//! segment's own keys, and divided by the row's sum at the end. Decoding runs the same folds, so it gives the same bits.

mod backward;
mod decode;
mod forward;
mod operands;
mod softmax;

pub use backward::attention_backward;
pub use decode::{DecodeQuery, KvBlock, attention_decode};
pub use forward::attention;

/// Heads of an attention layer. A row of queries, keys and values is `[q | k | v]`, see [`AttentionShape::width`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` neighbouring query heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the scores, positive.
    pub scale: f32,
    /// How many keys a query sees, itself included; all of them if absent.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Elements of a row of queries, keys and values.
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The first key that the query at `position` sees.
    fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    fn check(&self) {
        assert!(
            self.head_dim > 0 && self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "attention: {} heads of {} elements over {} key heads",
            self.heads,
            self.head_dim,
            self.kv_heads
        );
        assert!(self.scale > 0.0, "attention: the scale {} is not positive", self.scale);
        assert!(self.window != Some(0), "attention: a window of no keys");
    }
}

/// Rows `start..start + len` form one sequence, which may continue an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first row.
    pub start: usize,
    /// The number of rows.
    pub len: usize,
    /// The index of an earlier segment, itself without prefix, whose rows come before these: a prompt that several
    /// segments share.
    pub prefix: Option<usize>,
}

impl Segment {
    /// The number of tokens before the first row, which is the first row's position.
    pub fn prefix_len(&self, segments: &[Segment]) -> usize {
        self.prefix.map_or(0, |index| segments[index].len)
    }

    /// The number of keys that the last row sees, itself included, if no window hides any.
    pub fn context_len(&self, segments: &[Segment]) -> usize {
        self.prefix_len(segments) + self.len
    }
}

/// Checks that the segments lie inside `rows`, apart from each other, and name proper prefixes.
fn check_segments(segments: &[Segment], rows: usize) {
    for (index, segment) in segments.iter().enumerate() {
        assert!(segment.start + segment.len <= rows, "segment {index} ends after the {rows} rows");
        if let Some(prefix) = segment.prefix {
            assert!(prefix < index, "segment {index} has the prefix {prefix}, which is not an earlier one");
            assert!(segments[prefix].prefix.is_none(), "segment {index}'s prefix {prefix} has a prefix itself");
        }
    }
    let mut order: Vec<&Segment> = segments.iter().filter(|segment| segment.len > 0).collect();
    order.sort_by_key(|segment| segment.start);
    for pair in order.windows(2) {
        assert!(pair[0].start + pair[0].len <= pair[1].start, "the segments {:?} and {:?} overlap", pair[0], pair[1]);
    }
}

/// The rows that no segment covers, as ranges.
fn uncovered(segments: &[Segment], rows: usize) -> Vec<std::ops::Range<usize>> {
    let mut order: Vec<(usize, usize)> = segments.iter().map(|segment| (segment.start, segment.len)).collect();
    order.sort_unstable();
    let mut gaps = Vec::new();
    let mut end = 0;
    for (start, len) in order {
        if len > 0 {
            gaps.push(end..start);
            end = start + len;
        }
    }
    gaps.push(end..rows);
    gaps
}
