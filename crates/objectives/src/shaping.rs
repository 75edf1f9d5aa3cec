//! Rewards for how a completion ended, beside what it says.
//!
//! - Overlong completions (DAPO, arXiv 2503.14476, equation 13): with the longest completion allowed `L` and a margin `c`,
//!   one of `n` tokens gets `0` up to `L - c`, `-1` beyond `L`, and in between `((L - c) - n) / c`.
//! - A completion that did not end by itself (TRL's `missing_eos_penalty`): minus a constant.

/// The penalty of a completion of `length` tokens, between -1 and 0, where `longest` are allowed and the last `margin` of
/// them are paid for; a margin of 0 costs nothing.
pub fn overlong(length: usize, longest: usize, margin: usize) -> f64 {
    let free = longest.saturating_sub(margin);
    match margin {
        0 => 0.0,
        _ => -(length.saturating_sub(free) as f64 / margin as f64).min(1.0),
    }
}
