//! ggml's data types and their dequantisation.
//!
//! Layouts and the order of the roundings follow `ggml-quants.c` (`dequantize_row_*`), so that every value equals, bit
//! for bit, what ggml and the Python `gguf` package give. A block holds a run of one row; its fields are little-endian.

use half::{bf16, f16};

use crate::error::{Error, Result};

/// A data type of ggml that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
    /// 4 bits, scale.
    Q4_0,
    /// 4 bits, scale and minimum.
    Q4_1,
    /// 5 bits, scale.
    Q5_0,
    /// 5 bits, scale and minimum.
    Q5_1,
    /// 8 bits, scale.
    Q8_0,
    /// 2 bits in super-blocks of 256.
    Q2K,
    /// 3 bits in super-blocks of 256.
    Q3K,
    /// 4 bits in super-blocks of 256.
    Q4K,
    /// 5 bits in super-blocks of 256.
    Q5K,
    /// 6 bits in super-blocks of 256.
    Q6K,
}

/// Weights in a K-quant's super-block.
const SUPER: usize = 256;

/// Names of the types of `ggml.h` by number, for messages. Empty where the number was withdrawn.
const NAMES: [&str; 40] = [
    "F32", "F16", "Q4_0", "Q4_1", "", "", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64",
    "F64", "IQ1_M", "BF16", "", "", "", "TQ1_0", "TQ2_0", "", "", "", "MXFP4",
];

impl BlockType {
    /// The type with this number in `ggml.h`.
    pub fn from_number(number: u32) -> Result<Self> {
        Ok(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2K,
            11 => Self::Q3K,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            _ => {
                let name = match NAMES.get(number as usize) {
                    Some(name) if !name.is_empty() => format!("GGUF tensor type {name}"),
                    _ => format!("GGUF tensor type number {number}"),
                };
                let hint = "supported types: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K";
                return Err(Error::unsupported(name, hint));
            }
        })
    }

    /// Weights in a block.
    pub fn weights(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => SUPER,
        }
    }

    /// Bytes in a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Dequantises whole blocks.
    ///
    /// # Panics
    /// When `bytes` and `weights` are not the same whole number of blocks.
    pub fn dequantise(self, bytes: &[u8], weights: &mut [f32]) {
        assert_eq!(bytes.len() % self.bytes(), 0, "whole blocks");
        assert_eq!(bytes.len() / self.bytes() * self.weights(), weights.len(), "as many blocks as weights");
        let blocks = bytes.chunks_exact(self.bytes()).zip(weights.chunks_exact_mut(self.weights()));
        match self {
            Self::F32 => blocks.for_each(|(b, w)| w[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::F16 => blocks.for_each(|(b, w)| w[0] = half(b)),
            Self::Bf16 => blocks.for_each(|(b, w)| w[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Self::Q4_0 => blocks.for_each(|(b, w)| q4_0(b, w)),
            Self::Q4_1 => blocks.for_each(|(b, w)| q4_1(b, w)),
            Self::Q5_0 => blocks.for_each(|(b, w)| q5_0(b, w)),
            Self::Q5_1 => blocks.for_each(|(b, w)| q5_1(b, w)),
            Self::Q8_0 => blocks.for_each(|(b, w)| q8_0(b, w)),
            Self::Q2K => blocks.for_each(|(b, w)| q2_k(b, w)),
            Self::Q3K => blocks.for_each(|(b, w)| q3_k(b, w)),
            Self::Q4K => blocks.for_each(|(b, w)| q4_k(b, w)),
            Self::Q5K => blocks.for_each(|(b, w)| q5_k(b, w)),
            Self::Q6K => blocks.for_each(|(b, w)| q6_k(b, w)),
        }
    }
}

/// The half-precision number at the start of `bytes`.
fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Bit `index` of a little-endian bit set, as 0 or 1.
fn bit(bits: &[u8], index: usize) -> u8 {
    (bits[index / 8] >> (index % 8)) & 1
}

/// scale f16, 16 bytes: weights 0..16 in the low nibbles, 16..32 in the high ones; w = d (q - 8).
fn q4_0(block: &[u8], weights: &mut [f32]) {
    let d = half(block);
    for (i, byte) in block[2..].iter().enumerate() {
        weights[i] = d * f32::from((byte & 15) as i8 - 8);
        weights[i + 16] = d * f32::from((byte >> 4) as i8 - 8);
    }
}

/// scale f16, minimum f16, nibbles as in Q4_0; w = d q + m.
fn q4_1(block: &[u8], weights: &mut [f32]) {
    let (d, m) = (half(block), half(&block[2..]));
    for (i, byte) in block[4..].iter().enumerate() {
        weights[i] = d * f32::from(byte & 15) + m;
        weights[i + 16] = d * f32::from(byte >> 4) + m;
    }
}

/// scale f16, 32 fifth bits, nibbles as in Q4_0; w = d (q - 16).
fn q5_0(block: &[u8], weights: &mut [f32]) {
    let (d, fifth) = (half(block), &block[2..6]);
    for (i, byte) in block[6..].iter().enumerate() {
        weights[i] = d * f32::from((byte & 15 | bit(fifth, i) << 4) as i8 - 16);
        weights[i + 16] = d * f32::from((byte >> 4 | bit(fifth, i + 16) << 4) as i8 - 16);
    }
}

/// scale f16, minimum f16, 32 fifth bits, nibbles as in Q4_0; w = d q + m.
fn q5_1(block: &[u8], weights: &mut [f32]) {
    let (d, m, fifth) = (half(block), half(&block[2..]), &block[4..8]);
    for (i, byte) in block[8..].iter().enumerate() {
        weights[i] = d * f32::from(byte & 15 | bit(fifth, i) << 4) + m;
        weights[i + 16] = d * f32::from(byte >> 4 | bit(fifth, i + 16) << 4) + m;
    }
}

/// scale f16, 32 signed bytes; w = d q.
fn q8_0(block: &[u8], weights: &mut [f32]) {
    let d = half(block);
    for (weight, byte) in weights.iter_mut().zip(&block[2..]) {
        *weight = f32::from(*byte as i8) * d;
    }
}

/// 16 bytes of (scale, minimum) nibbles, 64 bytes of 2-bit values, d f16, dmin f16. Each half of the block takes 32
/// bytes, and each pair of bits in them 32 weights in two groups of 16; w = d·scale q - dmin·minimum.
fn q2_k(block: &[u8], weights: &mut [f32]) {
    let (scales, values) = (&block[..16], &block[16..80]);
    let (d, d_min) = (half(&block[80..]), half(&block[82..]));
    for (group, weights) in weights.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[group] & 15);
        let minimum = d_min * f32::from(scales[group] >> 4);
        let (values, shift) = two_bits(values, group);
        for (weight, byte) in weights.iter_mut().zip(values) {
            *weight = scale * f32::from(byte >> shift & 3) - minimum;
        }
    }
}

/// The 16 bytes that hold the low two bits of group `group` of a 2- or 3-bit K-quant, and the bits' place in them.
fn two_bits(values: &[u8], group: usize) -> (&[u8], usize) {
    let start = 32 * (group / 8) + 16 * (group % 2);
    (&values[start..start + 16], 2 * (group / 2 % 4))
}

/// 32 bytes of third bits, 64 bytes of 2-bit values, 12 bytes of 6-bit scales, d f16; w = d (scale - 32) q, where a
/// third bit that is 0 subtracts 4.
fn q3_k(block: &[u8], weights: &mut [f32]) {
    let (third, values, packed, d) = (&block[..32], &block[32..96], &block[96..108], half(&block[108..]));
    for (group, weights) in weights.chunks_exact_mut(16).enumerate() {
        let low = packed[group % 8] >> (4 * (group / 8)) & 15;
        let high = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
        let scale = d * f32::from((low | high << 4) as i8 - 32);
        let (values, shift) = two_bits(values, group);
        let third = &third[16 * (group % 2)..];
        for ((weight, byte), third) in weights.iter_mut().zip(values).zip(third) {
            let offset = if third >> (group / 2) & 1 == 1 { 0 } else { 4 };
            *weight = scale * f32::from((byte >> shift & 3) as i8 - offset);
        }
    }
}

/// The 6-bit scale and minimum of group `group` (of 8) in the 12 packed bytes of Q4_K and Q5_K.
fn scale_and_minimum(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        (low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

/// d f16, dmin f16, 12 bytes of scales and minima, 128 bytes: each 32 hold two groups of 32 weights, the first in the
/// low nibbles; w = d·scale q - dmin·minimum.
fn q4_k(block: &[u8], weights: &mut [f32]) {
    let (d, d_min, packed, values) = (half(block), half(&block[2..]), &block[4..16], &block[16..]);
    for (group, weights) in weights.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(packed, group);
        let (scale, minimum, shift) = (d * scale, d_min * minimum, 4 * (group % 2));
        for (weight, byte) in weights.iter_mut().zip(&values[32 * (group / 2)..]) {
            *weight = scale * f32::from(byte >> shift & 15) - minimum;
        }
    }
}

/// As Q4_K with 32 bytes of fifth bits (bit `group` of byte `i` for weight `i` of the group) before the nibbles.
fn q5_k(block: &[u8], weights: &mut [f32]) {
    let (d, d_min, packed, fifth, values) =
        (half(block), half(&block[2..]), &block[4..16], &block[16..48], &block[48..]);
    for (group, weights) in weights.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(packed, group);
        let (scale, minimum, shift) = (d * scale, d_min * minimum, 4 * (group % 2));
        for ((weight, byte), fifth) in weights.iter_mut().zip(&values[32 * (group / 2)..]).zip(fifth) {
            *weight = scale * f32::from(byte >> shift & 15 | (fifth >> group & 1) << 4) - minimum;
        }
    }
}

/// 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, d f16; w = d·scale (q - 32). Each half of
/// the block takes 64 bytes of nibbles (two groups of 32 in the low ones, then two in the high ones) and 32 of pairs.
fn q6_k(block: &[u8], weights: &mut [f32]) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half(&block[208..]));
    for (group, weights) in weights.chunks_exact_mut(32).enumerate() {
        let (part, quarter) = (group / 4, group % 4);
        let low = &low[64 * part + 32 * (quarter % 2)..];
        let high = &high[32 * part..];
        for (i, weight) in weights.iter_mut().enumerate() {
            let scale = d * f32::from(scales[2 * group + i / 16] as i8);
            let value = low[i] >> (4 * (quarter / 2)) & 15 | (high[i] >> (2 * quarter) & 3) << 4;
            *weight = scale * f32::from(value as i8 - 32);
        }
    }
}
