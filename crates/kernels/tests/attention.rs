//! Attention against a naive f64 one, its gradient against finite differences, and the equalities that sampling and
//! training rely on.

use kernels::{
    AttentionShape, DecodeQuery, Isa, KvBlock, Precision, Segment, attention, attention_backward, attention_decode,
    round_to_bf16,
};
use posttrain_kernels as kernels;

use crate::common::{bits, noise};

fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

fn shapes() -> Vec<AttentionShape> {
    let shape = |heads, kv_heads, head_dim, window| AttentionShape {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window,
    };
    vec![
        shape(3, 1, 64, None),
        shape(4, 2, 8, None),
        shape(2, 2, 20, Some(7)),
        shape(2, 1, 40, Some(50)),
        shape(1, 1, 1, Some(1)),
    ]
}

fn segment(start: usize, len: usize, prefix: Option<usize>) -> Segment {
    Segment { start, len, prefix }
}

/// Shared prompts, a lonely sequence, an empty one and uncovered rows; 232 rows.
fn segments() -> Vec<Segment> {
    vec![
        segment(2, 70, None),
        segment(72, 40, Some(0)),
        segment(114, 33, Some(0)),
        segment(148, 0, Some(0)),
        segment(148, 64, None),
        segment(213, 1, Some(0)),
        segment(214, 9, Some(4)),
    ]
}
const ROWS: usize = 226;

/// The rows that row `i` of a segment sees, in order.
fn visible(shape: AttentionShape, segments: &[Segment], segment: Segment, i: usize) -> Vec<usize> {
    let mut rows = Vec::new();
    if let Some(prefix) = segment.prefix {
        rows.extend(segments[prefix].start..segments[prefix].start + segments[prefix].len);
    }
    rows.extend(segment.start..=segment.start + i);
    let first = shape.window.map_or(0, |window| rows.len().saturating_sub(window));
    rows.split_off(first)
}

fn reference(shape: AttentionShape, segments: &[Segment], qkv: &[f64], rows: usize) -> Vec<f64> {
    let (width, d) = (shape.width(), shape.head_dim);
    let mut out = vec![0.0; rows * shape.heads * d];
    for &segment in segments {
        for i in 0..segment.len {
            let row = segment.start + i;
            let keys = visible(shape, segments, segment, i);
            for head in 0..shape.heads {
                let kv_head = head / (shape.heads / shape.kv_heads);
                let at = |row: usize, head: usize| &qkv[row * width + head * d..][..d];
                let score = |key: &usize| {
                    let key = at(*key, shape.heads + kv_head);
                    at(row, head).iter().zip(key).map(|(q, k)| q * k).sum::<f64>() * f64::from(shape.scale)
                };
                let scores: Vec<f64> = keys.iter().map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
                for (key, score) in keys.iter().zip(&scores) {
                    let value = at(*key, shape.heads + shape.kv_heads + kv_head);
                    for (i, value) in value.iter().enumerate() {
                        out[(row * shape.heads + head) * d + i] += (score - largest).exp() / total * value;
                    }
                }
            }
        }
    }
    out
}

fn forward(shape: AttentionShape, segments: &[Segment], qkv: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let rows = qkv.len() / shape.width();
    let (mut out, mut lse) = (vec![f32::NAN; rows * shape.heads * shape.head_dim], vec![f32::NAN; rows * shape.heads]);
    attention(shape, segments, qkv, &mut out, &mut lse);
    (out, lse)
}

fn backward(shape: AttentionShape, segments: &[Segment], qkv: &[f32], d_out: &[f32]) -> Vec<f32> {
    let (out, lse) = forward(shape, segments, qkv);
    let mut d_qkv = vec![f32::NAN; qkv.len()];
    attention_backward(shape, segments, qkv, &out, &lse, d_out, &mut d_qkv);
    d_qkv
}

fn covered(row: usize) -> bool {
    segments().iter().any(|segment| (segment.start..segment.start + segment.len).contains(&row))
}

#[test]
fn forward_agrees_with_f64_and_is_the_same_on_every_instruction_set() {
    for shape in shapes() {
        let qkv = noise(3, ROWS * shape.width());
        let wide: Vec<f64> = qkv.iter().map(|&x| f64::from(x)).collect();
        let expected = reference(shape, &segments(), &wide, ROWS);
        let (first, _) = forward(shape, &segments(), &qkv);
        for (index, (x, y)) in first.iter().zip(&expected).enumerate() {
            assert!((f64::from(*x) - y).abs() < 2e-6, "{shape:?} element {index}: {x} and {y}");
        }
        for isa in available() {
            let (out, _) = isa.with(|| forward(shape, &segments(), &qkv));
            assert_eq!(bits(&out), bits(&first), "{shape:?} on {isa}");
        }
        let width = shape.heads * shape.head_dim;
        for row in (0..ROWS).filter(|&row| !covered(row)) {
            assert!(first[row * width..][..width].iter().all(|&x| x == 0.0), "uncovered row {row}");
        }
    }
}

#[test]
fn backward_agrees_with_finite_differences() {
    for shape in shapes() {
        let qkv = noise(4, ROWS * shape.width());
        let d_out = noise(5, ROWS * shape.heads * shape.head_dim);
        let gradient = backward(shape, &segments(), &qkv, &d_out);
        for seed in 0..6 {
            let direction = noise(100 + seed, qkv.len());
            let epsilon = 1e-5;
            let moved = |sign: f64| -> f64 {
                let x: Vec<f64> =
                    qkv.iter().zip(&direction).map(|(x, d)| f64::from(*x) + sign * epsilon * f64::from(*d)).collect();
                let out = reference(shape, &segments(), &x, ROWS);
                out.iter().zip(&d_out).map(|(x, d)| x * f64::from(*d)).sum()
            };
            let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * epsilon);
            let analytic: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
            assert!((numeric - analytic).abs() < 1e-4 * (1.0 + numeric.abs()), "{shape:?}: {numeric} and {analytic}");
        }
        for isa in available() {
            let other = isa.with(|| backward(shape, &segments(), &qkv, &d_out));
            assert_eq!(bits(&other), bits(&gradient), "{shape:?} on {isa}");
        }
        for row in (0..ROWS).filter(|&row| !covered(row)) {
            let row = &gradient[row * shape.width()..][..shape.width()];
            assert!(row.iter().all(|&x| x == 0.0), "uncovered rows have no gradient");
        }
    }
}

/// A row's tokens may lie in any number of blocks and be asked for one by one or many at a time.
#[test]
fn decoding_gives_the_bits_of_the_forward() {
    for (shape, precision) in shapes().into_iter().flat_map(|shape| [(shape, Precision::F32), (shape, Precision::Bf16)])
    {
        let (width, out_width) = (shape.width(), shape.heads * shape.head_dim);
        let mut qkv = noise(6, ROWS * width);
        if precision == Precision::Bf16 {
            round_to_bf16(&mut qkv, width, out_width..width);
        }
        let (expected, sums) = forward(shape, &segments(), &qkv);
        for segment in segments() {
            let mut prefix = KvBlock::new(shape, precision, 0);
            if let Some(index) = segment.prefix {
                let before = segments()[index];
                prefix.extend(&qkv[before.start * width..][..before.len * width]);
            }
            let shared = prefix.len();
            // A block that goes on beyond what this sequence has in common with it.
            prefix.extend(&noise(8, 5 * width));
            for (cut, step) in [(0, 1), (0, 64), (3, 1), (33, 2), (3, 64), (1, 33)] {
                let cut = segment.len.min(cut);
                let mut middle = KvBlock::new(shape, precision, 3);
                middle.extend(&qkv[segment.start * width..][..cut * width]);
                let mut own = KvBlock::new(shape, precision, 3);
                own.extend(&noise(8, 5 * width));
                own.truncate(0);
                for first in (cut..segment.len).step_by(step) {
                    let rows = segment.start + first..segment.start + segment.len.min(first + step);
                    let qkv = &qkv[rows.start * width..rows.end * width];
                    own.extend(qkv);
                    let mut out = vec![f32::NAN; rows.len() * out_width];
                    let context = &[(&prefix, shared), (&middle, cut), (&own, own.len())];
                    let mut log_sum_exp = vec![f32::NAN; rows.len() * shape.heads];
                    let query = DecodeQuery { qkv, context, out: &mut out, log_sum_exp: &mut log_sum_exp };
                    attention_decode(shape, &mut [query]);
                    let sums = &sums[rows.start * shape.heads..rows.end * shape.heads];
                    assert_eq!(bits(&log_sum_exp), bits(sums), "{shape:?} in {precision:?}, sums of rows {rows:?}");
                    let expected = &expected[rows.start * out_width..rows.end * out_width];
                    assert_eq!(bits(&out), bits(expected), "{shape:?} in {precision:?}, rows {rows:?}, cut at {cut}");
                }
            }
        }
    }
}

#[test]
fn segments_do_not_touch_each_other() {
    let shape = shapes()[1];
    let (width, out_width) = (shape.width(), shape.heads * shape.head_dim);
    let qkv = noise(7, ROWS * width);
    let d_out = noise(8, ROWS * out_width);
    let (out, _) = forward(shape, &segments(), &qkv);
    let gradient = backward(shape, &segments(), &qkv, &d_out);
    // Segment 2 continues segment 0: forward it changes itself alone, backward itself and its prefix.
    let changed = segments()[2];
    let rows = changed.start..changed.start + changed.len;
    let mut other = qkv.clone();
    other[rows.start * width..rows.end * width].iter_mut().for_each(|x| *x *= -1.5);
    let (other_out, _) = forward(shape, &segments(), &other);
    let other_gradient = backward(shape, &segments(), &other, &d_out);
    for row in 0..ROWS {
        let same = bits(&out[row * out_width..][..out_width]) == bits(&other_out[row * out_width..][..out_width]);
        assert_eq!(same, !rows.contains(&row), "row {row} of the output");
        let same = bits(&gradient[row * width..][..width]) == bits(&other_gradient[row * width..][..width]);
        assert_eq!(same, !rows.contains(&row) && !(2..72).contains(&row), "row {row} of the gradient");
    }
}

#[test]
fn a_shared_prefix_gives_the_outputs_of_a_copied_one() {
    let shape = shapes()[0];
    let (width, out_width) = (shape.width(), shape.heads * shape.head_dim);
    let qkv = noise(9, ROWS * width);
    let (expected, _) = forward(shape, &segments(), &qkv);
    for index in [1, 2] {
        let (prefix, own) = (segments()[0], segments()[index]);
        let rows = |segment: Segment| &qkv[segment.start * width..][..segment.len * width];
        let copied = [rows(prefix), rows(own)].concat();
        let (out, _) = forward(shape, &[segment(0, prefix.len + own.len, None)], &copied);
        let mine = &expected[own.start * out_width..][..own.len * out_width];
        assert_eq!(bits(&out[prefix.len * out_width..]), bits(mine));
    }
}

#[test]
fn threads_do_not_change_bits() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
    let shape = shapes()[0];
    let qkv = noise(10, ROWS * shape.width());
    let d_out = noise(11, ROWS * shape.heads * shape.head_dim);
    let run = || (bits(&forward(shape, &segments(), &qkv).0), bits(&backward(shape, &segments(), &qkv, &d_out)));
    assert_eq!(pool(1).install(run), pool(2).install(run));
}

#[test]
fn extreme_scores_stay_finite() {
    let shape = shapes()[0];
    let qkv: Vec<f32> = noise(12, 40 * shape.width()).iter().map(|x| x * 300.0).collect();
    let one = [segment(0, 40, None)];
    let (out, lse) = forward(shape, &one, &qkv);
    assert!(out.iter().chain(&lse).all(|x| x.is_finite()));
    let gradient = backward(shape, &one, &qkv, &noise(13, out.len()));
    assert!(gradient.iter().all(|x| x.is_finite()));
}

#[test]
fn nothing_to_do_is_done() {
    let shape = shapes()[0];
    assert_eq!(forward(shape, &[], &[]).0.len(), 0);
    assert_eq!(forward(shape, &[segment(0, 0, None)], &noise(1, 2 * shape.width())).0, vec![0.0; 2 * 3 * 64]);
    attention_decode(shape, &mut []);
}

#[test]
#[should_panic(expected = "overlap")]
fn overlapping_segments_are_refused() {
    let shape = shapes()[0];
    forward(shape, &[segment(0, 3, None), segment(2, 2, None)], &noise(1, 4 * shape.width()));
}

#[test]
#[should_panic(expected = "not an earlier one")]
fn a_prefix_must_come_before() {
    let shape = shapes()[0];
    forward(shape, &[segment(0, 2, Some(1)), segment(2, 2, None)], &noise(1, 4 * shape.width()));
}
