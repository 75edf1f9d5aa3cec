//! The arithmetic of a decoder over plain slices, forward and backward: matrix products, attention, norms, rotary
//! positions, gated activations, log-softmax rows and the optimiser update. Beside them, what the machine could do at best
//! ([`matrix_peak`], [`bandwidth()`]) and where the time goes ([`Profiler`]).
//!
//! Every function here obeys three rules, so that equal inputs give equal bytes however the work is cut:
//!
//! 1. An element of a matrix product is a left fold of fused multiply-adds over the reduced index, starting from the old
//!    value of the destination or from zero. Blocking reloads the partial result and continues the same chain.
//! 2. A row reduction runs in an order that depends on the length of the row alone.
//! 3. Threads share out independent results, never a reduction.
//!
//! The instruction set is chosen at run time ([`Isa`]) and does not change any result either, but for what
//! [`Precision::Bf16`] says about subnormal numbers.
//!
//! This crate knows slices, shapes and segments. It must not know models, parameters' names, losses or files. All the
//! `unsafe` of the project lives here.
#![allow(
    unsafe_code,
    reason = "this is the one crate that holds the project's unsafe code; each block says why it is sound"
)]

mod adamw;
mod attention;
mod buffer;
mod elementwise;
mod gated;
mod half;
mod head;
mod isa;
mod math;
mod matrix;
mod norm;
mod parallel;
mod profile;
mod roofline;
mod rope;
mod simd;

pub use adamw::{AdamW, AdamWStep};
pub use attention::{AttentionShape, DecodeQuery, KvBlock, Segment, attention, attention_backward, attention_decode};
#[cfg(feature = "mimalloc")]
pub use buffer::keep_freed_memory;
pub use buffer::{Floats, zeros};
pub use elementwise::{RowCopy, add, add_bias, bias_backward, copy_rows, finite, scale, sum_of_squares};
pub use gated::{Activation, gated, gated_backward};
pub use half::round_to_bf16;
pub use head::{Normalizer, RowStats, log_softmax_backward_row, log_softmax_row, softmax_weights};
pub use isa::Isa;
pub use math::{exp, ln};
pub use matrix::{Int8Matrix, Matrix, MatrixMut, Onto, PackedMatrix, Precision, matmul};
pub use norm::{head_norm, head_norm_backward, rms_norm, rms_norm_backward};
pub use parallel::on_each;
pub use profile::{Profile, Profiler, Share};
pub use roofline::{Bandwidth, bandwidth, matrix_peak};
pub use rope::{HeadRange, RopeTable, rope};
