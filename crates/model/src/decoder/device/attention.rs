//! Attention on the device, over packed sequences or cached ones: padded blocks of queries, each with the keys it may see.
//!
//! Every sequence knows its keys as a list of rows, from position 0 to that of its last query, wherever these rows lie: among
//! the rows of the pass (a shared prompt's and its own), or in the pool of cached keys. A key is then visible to a query if its
//! place in the list is not above the query's position, and that is the whole mask. Queries of neighbouring sequences with
//! about as many keys share a block; a long sequence is cut into several. A block's scores have a bounded size.

use std::ops::Range;

use candle_core::{D, DType, Device, Result, Tensor};
use kernels::{AttentionShape, Segment};

use super::super::PackedTokens;
use super::pull_back;

/// Scores of one block, in floats (256 MiB).
const SCORES: usize = 64 << 20;

/// A row that is none; candle takes it for a row of zeros.
const NOWHERE: u32 = u32::MAX;

/// Neighbouring rows of one sequence in a pass, and the rows of the keys from position 0 to the last of them.
pub struct Span {
    pub queries: Range<usize>,
    pub keys: Vec<u32>,
}

impl Span {
    /// A segment of a packed batch after its prefix.
    pub fn of_segment(tokens: &PackedTokens, segment: &Segment) -> Self {
        let rows = |segment: &Segment| segment.start as u32..(segment.start + segment.len) as u32;
        let prefix = segment.prefix.map(|prefix| rows(&tokens.segments()[prefix]));
        Self {
            queries: segment.start..segment.start + segment.len,
            keys: prefix.into_iter().flatten().chain(rows(segment)).collect(),
        }
    }

    /// The sequence cut so that a piece has at most `scores` pairs of a query and a key: each with its queries, its first
    /// position and its keys.
    fn pieces(&self, scores: usize) -> impl Iterator<Item = Piece<'_>> {
        let Range { start, end } = self.queries;
        let before = self.keys.len() - self.queries.len();
        let most = (scores / self.keys.len()).max(1);
        (start..end).step_by(most).map(move |first| {
            let last = end.min(first + most);
            let position = before + first - start;
            Piece { queries: first..last, position, keys: &self.keys[..position + last - first] }
        })
    }
}

struct Piece<'a> {
    queries: Range<usize>,
    /// The position of the first query.
    position: usize,
    keys: &'a [u32],
}

/// Pieces of several sequences, padded to the same numbers of queries and keys.
struct Block {
    sequences: usize,
    query_count: usize,
    key_count: usize,
    /// Rows of queries, sequence by sequence.
    queries: Tensor,
    /// Rows of keys, sequence by sequence.
    keys: Tensor,
    /// For each window that layers have: 0 where a query sees a key, very negative elsewhere, `sequences × 1 × 1 × queries × keys`.
    masks: Vec<(Option<usize>, Tensor)>,
}

/// How the rows of a pass attend to each other, the same in every layer.
pub struct Plan {
    blocks: Vec<Block>,
    /// For each row its place among the queries of all blocks.
    places: Tensor,
    /// For each row its places among the keys of all blocks, equally many for each row.
    uses: Option<Tensor>,
}

impl Plan {
    /// A plan for the queries of `spans` among `rows` rows, for layers with these windows. With `backward`, keys are rows of
    /// the pass, and gradients can flow back to them.
    pub fn new(
        device: &Device,
        shape: &AttentionShape,
        windows: &[Option<usize>],
        spans: &[Span],
        rows: usize,
        backward: bool,
    ) -> Result<Self> {
        Self::with_budget(device, SCORES / shape.heads, windows, spans, rows, backward)
    }

    /// The same with at most so many pairs of a query and a key in a block, unless one query sees more.
    fn with_budget(
        device: &Device,
        scores: usize,
        windows: &[Option<usize>],
        spans: &[Span],
        rows: usize,
        backward: bool,
    ) -> Result<Self> {
        let pieces: Vec<Piece<'_>> = spans.iter().flat_map(|span| span.pieces(scores)).collect();
        let (mut queries, mut keys) = (Vec::new(), Vec::new());
        let mut blocks = Vec::new();
        let mut rest = &pieces[..];
        while !rest.is_empty() {
            let (block, later) = rest.split_at(together(rest, scores));
            blocks.push(Block::new(device, windows, block, &mut queries, &mut keys)?);
            rest = later;
        }
        let mut places = vec![NOWHERE; rows];
        for (place, &row) in queries.iter().enumerate().filter(|(_, row)| **row != NOWHERE) {
            places[row as usize] = place as u32;
        }
        let uses = backward.then(|| uses(&keys, rows)).map(|uses| Tensor::new(uses, device)).transpose()?;
        Ok(Self { blocks, places: Tensor::new(places, device)?, uses })
    }

    /// The attention of every row: `rows × heads · head_dim`, from queries of the same shape and `keys` and `values` of
    /// `_ × kv_heads · head_dim`. Zero for rows that are no query.
    pub fn attend(&self, shape: &AttentionShape, queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let of = |block: &Block| {
            let [q, k, v] = block.gather(queries, keys, values)?;
            block.attend(shape, &q, &k, &v)
        };
        let outputs = self.blocks.iter().map(of).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&outputs, 0)?.index_select(&self.places, 0)
    }

    /// The gradients of queries, keys and values, given that of their attention.
    pub fn backward(
        &self,
        shape: &AttentionShape,
        [queries, keys, values]: [&Tensor; 3],
        d_attention: &Tensor,
    ) -> Result<[Tensor; 3]> {
        let mut gradients: [Vec<Tensor>; 3] = Default::default();
        for block in &self.blocks {
            let [q, k, v] = block.gather(queries, keys, values)?;
            let d_output = d_attention.index_select(&block.queries, 0)?;
            let back = pull_back([&q, &k, &v], &d_output, |[q, k, v]| block.attend(shape, q, k, v))?;
            gradients.iter_mut().zip(back).for_each(|(all, gradient)| all.push(gradient));
        }
        let [d_queries, d_keys, d_values] = gradients;
        let summed = |gradients: Vec<Tensor>| {
            let Some(uses) = &self.uses else { candle_core::bail!("the plan has no way back to its keys") };
            let (rows, width) = (self.places.dim(0)?, keys.dim(1)?);
            let gathered = Tensor::cat(&gradients, 0)?.index_select(uses, 0)?;
            gathered.reshape((rows, uses.dim(0)? / rows, width))?.sum(1)
        };
        let d_queries = Tensor::cat(&d_queries, 0)?.index_select(&self.places, 0)?;
        Ok([d_queries, summed(d_keys)?, summed(d_values)?])
    }
}

/// How many of the first pieces make a block: within the budget, and not mostly padding.
fn together(pieces: &[Piece<'_>], scores: usize) -> usize {
    let (mut query_count, mut key_count, mut area) = (0, 0, 0);
    let fits = |(index, piece): &(usize, &Piece<'_>)| {
        query_count = query_count.max(piece.queries.len());
        key_count = key_count.max(piece.keys.len());
        area += piece.queries.len() * piece.keys.len();
        let padded = (index + 1) * query_count * key_count;
        *index == 0 || (padded <= scores && padded <= 2 * area)
    };
    pieces.iter().enumerate().take_while(fits).count()
}

/// For each row its places among `keys`, padded to equally many.
fn uses(keys: &[u32], rows: usize) -> Vec<u32> {
    let mut places = vec![Vec::new(); rows];
    for (place, &row) in keys.iter().enumerate().filter(|(_, row)| **row != NOWHERE) {
        places[row as usize].push(place as u32);
    }
    let most = places.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let padded = places.into_iter().flat_map(|mut places| {
        places.resize(most, NOWHERE);
        places
    });
    padded.collect()
}

impl Block {
    /// A block of these pieces, whose padded rows are also appended to `all_queries` and `all_keys`.
    fn new(
        device: &Device,
        windows: &[Option<usize>],
        pieces: &[Piece<'_>],
        all_queries: &mut Vec<u32>,
        all_keys: &mut Vec<u32>,
    ) -> Result<Self> {
        let sequences = pieces.len();
        let query_count = pieces.iter().map(|piece| piece.queries.len()).max().unwrap_or(0);
        let key_count = pieces.iter().map(|piece| piece.keys.len()).max().unwrap_or(0);
        let (first_query, first_key) = (all_queries.len(), all_keys.len());
        let mut positions = Vec::with_capacity(sequences * query_count);
        for (index, piece) in (1..).zip(pieces) {
            all_queries.extend(piece.queries.clone().map(|row| row as u32));
            all_queries.resize(first_query + index * query_count, NOWHERE);
            all_keys.extend(piece.keys);
            all_keys.resize(first_key + index * key_count, NOWHERE);
            // Padding looks at position 0, so that its softmax is defined.
            positions.extend((piece.position..).take(piece.queries.len()).map(|position| position as u32));
            positions.resize(index * query_count, 0);
        }
        let positions = Tensor::from_vec(positions, (sequences, 1, 1, query_count, 1), device)?;
        let masks = windows.iter().map(|&window| Ok((window, mask(&positions, key_count, window)?)));
        Ok(Self {
            sequences,
            query_count,
            key_count,
            queries: Tensor::new(&all_queries[first_query..], device)?,
            keys: Tensor::new(&all_keys[first_key..], device)?,
            masks: masks.collect::<Result<_>>()?,
        })
    }

    /// The block's rows of queries, keys and values.
    fn gather(&self, queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<[Tensor; 3]> {
        Ok([
            queries.index_select(&self.queries, 0)?,
            keys.index_select(&self.keys, 0)?,
            values.index_select(&self.keys, 0)?,
        ])
    }

    /// Attention within the block, from its own rows.
    fn attend(&self, shape: &AttentionShape, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (s, l, c) = (self.sequences, self.query_count, self.key_count);
        let (kv, d) = (shape.kv_heads, shape.head_dim);
        let group = shape.heads / kv;
        // The query heads of a key head are further rows of it: no key is copied.
        let q = q.reshape((s, l, kv, group, d))?.permute((0, 2, 3, 1, 4))?.contiguous()?;
        let q = q.reshape((s, kv, group * l, d))?;
        let k = k.reshape((s, c, kv, d))?.permute((0, 2, 3, 1))?.contiguous()?;
        let v = v.reshape((s, c, kv, d))?.permute((0, 2, 1, 3))?.contiguous()?;
        let scores = (q.matmul(&k)? * f64::from(shape.scale))?.reshape((s, kv, group, l, c))?;
        let mask = self.masks.iter().find(|(window, _)| *window == shape.window);
        let Some((_, mask)) = mask else { candle_core::bail!("no mask for a window of {:?}", shape.window) };
        let scores = scores.broadcast_add(mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let output = weights.reshape((s, kv, group * l, c))?.matmul(&v)?;
        let output = output.reshape((s, kv, group, l, d))?.permute((0, 3, 1, 2, 4))?.contiguous()?;
        output.reshape((s * l, shape.heads * d))
    }
}

/// 0 where a query at its position sees a key, very negative elsewhere.
fn mask(positions: &Tensor, key_count: usize, window: Option<usize>) -> Result<Tensor> {
    let keys = |first: u32| {
        let keys = Tensor::arange(first, first + key_count as u32, positions.device())?;
        keys.reshape((1, 1, 1, 1, key_count))
    };
    let mut visible = keys(0)?.broadcast_le(positions)?.to_dtype(DType::F32)?;
    if let Some(window) = window {
        let near = keys(window.min(1 << 30) as u32)?.broadcast_gt(positions)?;
        visible = (visible * near.to_dtype(DType::F32)?)?;
    }
    visible.affine(1e30, -1e30)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use base::{Purpose, Random};

    use super::*;

    const SHAPE: AttentionShape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 6, scale: 0.4, window: Some(5) };

    fn random(step: u32, rows: usize, width: usize) -> Tensor {
        let random = Random::new(1, Purpose::Test).step(step);
        let values: Vec<f32> = (0..rows * width).map(|i| random.normal(i as u32) as f32).collect();
        Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// However sequences are cut into blocks, each query sees the same keys and each key gathers the same gradients.
    #[test]
    fn cutting_into_blocks_changes_nothing_but_rounding() {
        let mut tokens = PackedTokens::new();
        let prompt = tokens.push(&[1; 9], None).unwrap();
        for len in [7, 1, 12] {
            tokens.push(&vec![2; len], Some(prompt)).unwrap();
        }
        tokens.push(&[3; 23], None).unwrap();
        let rows = tokens.rows();
        let spans: Vec<Span> = tokens.segments().iter().map(|segment| Span::of_segment(&tokens, segment)).collect();
        let (q, k, v, d) = (random(1, rows, 24), random(2, rows, 12), random(3, rows, 12), random(4, rows, 24));
        let run = |scores| {
            let plan = Plan::with_budget(&Device::Cpu, scores, &[SHAPE.window], &spans, rows, true).unwrap();
            let attention = plan.attend(&SHAPE, &q, &k, &v).unwrap();
            let back = plan.backward(&SHAPE, [&q, &k, &v], &d).unwrap();
            let results: Vec<Vec<f32>> = [&attention].into_iter().chain(&back).map(values).collect();
            (plan.blocks.len(), results)
        };
        let (few, expected) = run(1 << 20);
        for scores in [1, 50, 200] {
            let (many, found) = run(scores);
            assert!(many > few, "{many} blocks of at most {scores} scores, beside {few}");
            for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
                assert!((found - expected).abs() < 1e-5, "{found} beside {expected}, at most {scores} scores");
            }
        }
    }
}
