//! Numbers of bfloat16: the upper half of an f32.

use std::ops::Range;

use crate::isa::{Isa, multiversion};
use crate::parallel::{SharedMut, each};

/// The bits of `x` as bfloat16, rounded to nearest, ties to even; a NaN stays one.
#[inline(always)]
pub(crate) fn bfloat16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }) as u16
}

/// The number whose bits as bfloat16 are `half`.
#[inline(always)]
pub(crate) fn widened(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

multiversion! {
    /// `to = from`, rounded.
    pub(crate) fn narrow(from: &[f32], to: &mut [u16]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = bfloat16(from);
        }
    }
}

multiversion! {
    fn round(x: &mut [f32]) {
        for x in x {
            *x = widened(bfloat16(*x));
        }
    }
}

/// Rounds some `columns` of rows of `width` elements to bfloat16: to nearest, ties to even.
///
/// # Panics
/// If `rows` is no number of rows, or the columns do not lie inside them.
pub fn round_to_bf16(rows: &mut [f32], width: usize, columns: Range<usize>) {
    assert!(width > 0 && rows.len().is_multiple_of(width), "round_to_bf16: {} by rows of {width}", rows.len());
    assert!(columns.start <= columns.end && columns.end <= width, "round_to_bf16: columns {columns:?} of {width}");
    let (isa, count) = (Isa::current(), rows.len() / width);
    let shared = SharedMut::new(rows);
    each(count, count * columns.len(), |row| {
        // SAFETY: row `row` belongs to this call alone.
        round(isa, unsafe { shared.slice(row * width + columns.start, columns.len()) });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_with_ties_to_even_and_keeps_what_is_no_number() {
        // One unit of the last place of bfloat16 near 1 is 2^-7.
        let unit = 1.0 / 128.0;
        let cases = [
            (1.0 + 0.4 * unit, 1.0),
            (1.0 + 0.5 * unit, 1.0),
            (1.0 + 1.5 * unit, 1.0 + 2.0 * unit),
            (-1.0 - 0.6 * unit, -1.0 - unit),
            (0.0, 0.0),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
        ];
        for (x, expected) in cases {
            let mut row = [x, x, x];
            round_to_bf16(&mut row, 3, 1..2);
            assert_eq!(row, [x, expected, x], "the middle column alone, to the nearest");
        }
        let mut nan = [f32::from_bits(0x7f80_0001)];
        round_to_bf16(&mut nan, 1, 0..1);
        assert!(nan[0].is_nan());
    }

    #[test]
    fn what_is_rounded_survives_narrowing() {
        let mut rows: Vec<f32> = (0..100).map(|i| (i as f32 - 40.0).exp2() * 1.234_567).collect();
        round_to_bf16(&mut rows, 10, 0..10);
        let mut halves = vec![0; 100];
        narrow(Isa::current(), &rows, &mut halves);
        let back: Vec<f32> = halves.into_iter().map(widened).collect();
        assert_eq!(rows, back);
    }
}
