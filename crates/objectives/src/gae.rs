//! Generalised advantage estimation: advantages of tokens from a value model's estimates.
//!
//! ```text
//! δ_t = r_t + γ V_{t+1} - V_t                  V after the last token: 0
//! A_t = Σ_{k≥t} (γ λ)^{k-t} δ_k
//! ```
//!
//! Schulman et al., arXiv 1506.02438, equation 16. `V_t` is the estimate before token t is chosen. λ = 1 gives the rewards to
//! come minus the estimate, λ = 0 the error of one step. What the value model learns is `A_t + V_t`, with a λ of its own where
//! asked (decoupled GAE, VC-PPO, arXiv 2503.01491: λ = 1 for the value model, so that a late reward reaches early tokens).

/// The advantages of one sequence; `rewards` and `values` have one number for each of its tokens.
pub fn advantages(rewards: &[f64], values: &[f64], gamma: f64, lambda: f64) -> Vec<f64> {
    let mut found = vec![0.0; values.len()];
    let (mut next_value, mut later) = (0.0, 0.0);
    for token in (0..values.len()).rev() {
        later = rewards[token] + gamma * next_value - values[token] + gamma * lambda * later;
        found[token] = later;
        next_value = values[token];
    }
    found
}
