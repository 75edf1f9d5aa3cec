//! The gated activation of the decoder's MLP: `activation(gate) * up` (Shazeer, "GLU Variants Improve Transformer", 2020).

use crate::isa::{Isa, multiversion};
use crate::math::sigmoid;
use crate::parallel::{SharedMut, each_chunk, rows_per_task};

/// The function applied to the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU, `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, computed as
    /// `x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))`.
    GeluTanh,
}

/// Twice `sqrt(2 / pi)`.
const GELU_SCALE: f32 = 1.595_769;
const GELU_CUBIC: f32 = 0.044_715;

/// The value of the activation.
#[inline(always)]
fn value<const GELU: bool>(x: f32) -> f32 {
    if GELU { x * sigmoid(GELU_SCALE * x * (GELU_CUBIC * x * x + 1.0)) } else { x * sigmoid(x) }
}

/// Its value and its derivative.
#[inline(always)]
fn value_and_slope<const GELU: bool>(x: f32) -> (f32, f32) {
    let (s, inner) = if GELU {
        let square = GELU_CUBIC * x * x;
        (sigmoid(GELU_SCALE * x * (square + 1.0)), GELU_SCALE * (3.0 * square + 1.0))
    } else {
        (sigmoid(x), 1.0)
    };
    (x * s, s + x * s * (1.0 - s) * inner)
}

/// `out = activation(gate) * up` for rows `[gate | up]` of width `2 * width` and rows of `out` of width `width`.
pub fn gated(activation: Activation, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len(), "gated: the input is twice as wide as the output");
    if out.is_empty() {
        return;
    }
    assert!(out.len().is_multiple_of(width), "gated: {} is no number of rows of {width}", out.len());
    let isa = Isa::current();
    let rows = rows_per_task(out.len() / width, width);
    each_chunk(out, rows * width, |start, out| {
        let gate_up = &gate_up[2 * start..][..2 * out.len()];
        match activation {
            Activation::Silu => silu_rows(isa, gate_up, width, out),
            Activation::GeluTanh => gelu_rows(isa, gate_up, width, out),
        }
    });
}

multiversion! {
    fn silu_rows(gate_up: &[f32], width: usize, out: &mut [f32]) {
        forward_rows::<false>(gate_up, width, out);
    }
}

multiversion! {
    fn gelu_rows(gate_up: &[f32], width: usize, out: &mut [f32]) {
        forward_rows::<true>(gate_up, width, out);
    }
}

#[inline(always)]
fn forward_rows<const GELU: bool>(gate_up: &[f32], width: usize, out: &mut [f32]) {
    for (gate_up, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
        let (gate, up) = gate_up.split_at(width);
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = value::<GELU>(gate) * up;
        }
    }
}

/// The gradient of [`gated`], in place: rows `[gate | up]` become their own gradients, and those of its result the result once more,
/// from which the gradient of the next weight is computed.
pub fn gated_backward(activation: Activation, gate_up: &mut [f32], width: usize, d_out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * d_out.len(), "gated_backward: the input is twice as wide as the output");
    if d_out.is_empty() {
        return;
    }
    assert!(d_out.len().is_multiple_of(width), "gated_backward: {} is no number of rows of {width}", d_out.len());
    let isa = Isa::current();
    let rows = rows_per_task(d_out.len() / width, width);
    let d_out = SharedMut::new(d_out);
    each_chunk(gate_up, 2 * rows * width, |start, gate_up| {
        // SAFETY: a chunk of `gate_up` is whole rows, and their gradients belong to this call alone.
        let d_out = unsafe { d_out.slice(start / 2, gate_up.len() / 2) };
        match activation {
            Activation::Silu => silu_rows_backward(isa, gate_up, width, d_out),
            Activation::GeluTanh => gelu_rows_backward(isa, gate_up, width, d_out),
        }
    });
}

multiversion! {
    fn silu_rows_backward(gate_up: &mut [f32], width: usize, d_out: &mut [f32]) {
        backward_rows::<false>(gate_up, width, d_out);
    }
}

multiversion! {
    fn gelu_rows_backward(gate_up: &mut [f32], width: usize, d_out: &mut [f32]) {
        backward_rows::<true>(gate_up, width, d_out);
    }
}

#[inline(always)]
fn backward_rows<const GELU: bool>(gate_up: &mut [f32], width: usize, d_out: &mut [f32]) {
    for (gate_up, d_out) in gate_up.chunks_exact_mut(2 * width).zip(d_out.chunks_exact_mut(width)) {
        let (gate, up) = gate_up.split_at_mut(width);
        for ((gate, up), out) in gate.iter_mut().zip(up).zip(d_out) {
            let (value, slope) = value_and_slope::<GELU>(*gate);
            let (d_out, factor) = (*out, *up);
            *out = value * factor;
            *gate = d_out * factor * slope;
            *up = d_out * value;
        }
    }
}
