//! The entropy bonus: what a policy gains by staying undecided.
//!
//! ```text
//! L = ... - c · (1/T) Σ_t H(π_t)                  T: the tokens of the update that the policy learns from
//! ```
//!
//! The coefficient `c` may be constant, or follow the entropy so that this stays near a target (adaptive entropy control,
//! Skywork-OR1, He et al., arXiv 2505.22312; TRL's names). After an update in which the mean entropy was `H`:
//!
//! ```text
//! c <- min(c + δ, c_max)  where H <= target,  else  max(c - δ, c_min)
//! ```
//!
//! and the next update has the bonus `c` if `H <= target`, else none. The first update has none.
//!
//! Deviation from TRL: `H` is over all loss tokens, also where `top_entropy_quantile` leaves some out.

use serde::{Deserialize, Serialize};

/// A coefficient that follows the entropy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdaptiveEntropy {
    /// The coefficient, which has an effect where the entropy is low.
    pub coefficient: f64,
    /// The mean entropy in the last update; `None` before the first.
    pub entropy: Option<f64>,
}

/// Where a coefficient may go, and how fast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EntropyControl {
    /// The entropy of a token, in nats, that is not to be fallen below.
    pub target: f64,
    /// What one update changes.
    pub delta: f64,
    /// The least coefficient.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl AdaptiveEntropy {
    /// The coefficient of the next update's bonus.
    pub fn applied(&self, target: f64) -> f64 {
        if self.entropy.is_some_and(|entropy| entropy <= target) { self.coefficient } else { 0.0 }
    }

    /// Takes the mean entropy of an update into account.
    pub fn update(&mut self, entropy: f64, control: EntropyControl) {
        self.coefficient = match entropy <= control.target {
            true => (self.coefficient + control.delta).min(control.max),
            false => (self.coefficient - control.delta).max(control.min),
        };
        self.entropy = Some(entropy);
    }
}
