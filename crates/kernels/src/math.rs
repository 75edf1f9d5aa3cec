//! Scalar functions whose bits are the same on every machine, written so that loops over them vectorise.

/// `e^x` with a relative error below 1.5e-7; 0 below -86.98 (the last of the normal numbers), infinite above 88.72, NaN
/// for NaN.
///
/// Range reduction by `x = n ln 2 + r`, then the degree-6 polynomial of Cephes' `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LOWEST: f32 = -86.98;
    const HIGHEST: f32 = 88.722_83;
    let clamped = if x < LOWEST { LOWEST } else { x };
    let clamped = if clamped > HIGHEST { HIGHEST } else { clamped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    // n runs from -125 to 128: 2^n as 2 * 2^(n-1) keeps the exponent in range at the top.
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let power = f32::from_bits((exponent.wrapping_add(126) << 23) as u32);
    let y = y * power * 2.0;
    let y = if x < LOWEST { 0.0 } else { y };
    if x > HIGHEST { f32::INFINITY } else { y }
}

/// The natural logarithm of a positive finite number, correctly rounded in nearly all cases; computed in f64.
///
/// `x = 2^e m` with `m` in `[sqrt(1/2), sqrt(2))`, then `ln m = 2 artanh((m-1)/(m+1))` by its series. Zero gives negative
/// infinity, infinity gives itself, a negative number or NaN gives NaN.
pub fn ln(x: f32) -> f32 {
    if x == 0.0 {
        return f32::NEG_INFINITY;
    }
    if x.is_nan() || x < 0.0 {
        return f32::NAN;
    }
    if x == f32::INFINITY {
        return x;
    }
    let bits = f64::from(x).to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut mantissa = f64::from_bits(bits & ((1 << 52) - 1) | (1023 << 52));
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    // |s| < 0.1716, so the first omitted term is below 1e-16.
    let series = (0..10).rev().fold(0.0, |sum, i| sum * square + 1.0 / f64::from(2 * i + 1));
    (exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * series) as f32
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Lanes of a row reduction: element `i` goes to lane `i % LANES`, the lanes are then added pairwise.
pub(crate) const LANES: usize = 32;

/// The sum of `term` over the elements of a row, in an order that depends on its length alone.
#[inline(always)]
pub(crate) fn sum(row: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        add_terms(&mut lanes, LANES, |lane| term(chunk[lane]));
    }
    if !rest.is_empty() {
        let last = padded(rest, 0.0);
        add_terms(&mut lanes, rest.len(), |lane| term(last[lane]));
    }
    total(lanes)
}

/// [`sum`] over the elements of two rows.
#[inline(always)]
pub(crate) fn sum_of_two(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    assert_eq!(a.len(), b.len(), "sum: lengths differ");
    let mut lanes = [0.0f32; LANES];
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        add_terms(&mut lanes, LANES, |lane| term(a[lane], b[lane]));
    }
    if !rest_a.is_empty() {
        let [a, b] = [padded(rest_a, 0.0), padded(rest_b, 0.0)];
        add_terms(&mut lanes, rest_a.len(), |lane| term(a[lane], b[lane]));
    }
    total(lanes)
}

/// [`sum`] over the elements of three rows.
#[inline(always)]
pub(crate) fn sum_of_three(rows: [&[f32]; 3], term: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let [a, b, c] = rows;
    assert!(a.len() == b.len() && a.len() == c.len(), "sum: lengths differ");
    let mut lanes = [0.0f32; LANES];
    let ((a, rest_a), (b, rest_b), (c, rest_c)) =
        (a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        add_terms(&mut lanes, LANES, |lane| term(a[lane], b[lane], c[lane]));
    }
    if !rest_a.is_empty() {
        let [a, b, c] = [padded(rest_a, 0.0), padded(rest_b, 0.0), padded(rest_c, 0.0)];
        add_terms(&mut lanes, rest_a.len(), |lane| term(a[lane], b[lane], c[lane]));
    }
    total(lanes)
}

/// What does not fill the lanes, with `filler` behind. That way the last lanes run in vectors, too, and none of them has to be in memory.
#[inline(always)]
fn padded(rest: &[f32], filler: f32) -> [f32; LANES] {
    let mut lanes = [filler; LANES];
    lanes[..rest.len()].copy_from_slice(rest);
    lanes
}

/// Adds a term to each of the first `count` lanes. All terms are there before the first is added: that way the lanes stay in registers.
#[inline(always)]
fn add_terms(lanes: &mut [f32; LANES], count: usize, term: impl Fn(usize) -> f32) {
    let mut terms = [0.0f32; LANES];
    for (lane, slot) in terms.iter_mut().enumerate() {
        *slot = term(lane);
    }
    for (lane, (sum, term)) in lanes.iter_mut().zip(terms).enumerate() {
        *sum = if lane < count { *sum + term } else { *sum };
    }
}

/// The two sums of `terms(x)` over the elements `x` of a row, each with the bits that [`sum`] gives it.
#[inline(always)]
pub(crate) fn two_sums(row: &[f32], terms: impl Fn(f32) -> (f32, f32)) -> (f32, f32) {
    let (mut first, mut second) = ([0.0f32; LANES], [0.0f32; LANES]);
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let terms = terms(chunk[lane]);
            first[lane] += terms.0;
            second[lane] += terms.1;
        }
    }
    for (lane, &x) in rest.iter().enumerate() {
        let terms = terms(x);
        first[lane] += terms.0;
        second[lane] += terms.1;
    }
    (total(first), total(second))
}

/// The sum of the lanes, pairwise.
#[inline(always)]
fn total(lanes: [f32; LANES]) -> f32 {
    fold(lanes, |a, b| a + b)
}

/// The lanes brought together pairwise: each of the first half with its partner in the second, and again.
#[inline(always)]
fn fold(lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    // Each round is an array of its own, and with it a few vectors.
    macro_rules! halved {
        ($lanes:ident, $width:literal) => {{
            let mut half = [0.0f32; $width];
            for (lane, slot) in half.iter_mut().enumerate() {
                *slot = join($lanes[lane], $lanes[lane + $width]);
            }
            half
        }};
    }
    const { assert!(LANES == 32) };
    let lanes = halved!(lanes, 16);
    let lanes = halved!(lanes, 8);
    let lanes = halved!(lanes, 4);
    let lanes = halved!(lanes, 2);
    join(lanes[0], lanes[1])
}

/// The largest element of `x`; negative infinity for an empty row. A NaN is passed over.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let larger = |best: f32, value: f32| if value > best { value } else { best };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, value);
        }
    }
    if !rest.is_empty() {
        for (lane, value) in lanes.iter_mut().zip(padded(rest, f32::NEG_INFINITY)) {
            *lane = larger(*lane, value);
        }
    }
    fold(lanes, larger)
}
