//! Tests that may look at the data after every step: sequential tests by betting.
//!
//! [`Bet`] watches numbers `x_1, x_2, ...` in `[0, 1]` and plays against the claim that, from any step on and given all that
//! came before, their expected value is at least `m` (or at most `m`). The player starts with 1 and loses money in the long
//! run while the claim holds, whatever else is true of the numbers: they may depend on each other, change their
//! distribution, come from a model that is being trained. A fortune of `1 / α` is evidence against the claim:
//!
//! > **If the claim holds, the probability that the fortune ever reaches `1 / α`, over an endless run and with a look after
//! > every step, is at most `α`.**
//!
//! This is a theorem, not an approximation. With a bet `λ ∈ [0, 1 / max(m, 1 - m)]` chosen before `x_t` is seen, the factor
//! `f_t = 1 + λ (m - x_t)` is not negative and has an expected value of at most 1 under the claim. The fortune
//!
//! ```text
//! S_0 = 0,   S_t = f_t (S_{t-1} + w_t),   w_t = 1 / (t (t + 1)),   Σ_t w_t = 1
//! ```
//!
//! is the mixture, with weights `w_t`, of players who enter at step `t`; `S_t + Σ_{u > t} w_u` is a supermartingale that starts
//! at 1, and Ville's inequality gives the bound. So a change is found whenever it comes, at a price of `ln (t (t + 1))` in
//! evidence. The fortunes of several `λ` are averaged, which keeps all of this true and needs no knowledge of the variance.
//!
//! Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", arXiv 2010.09686, for the bets; Shin,
//! Ramdas and Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", arXiv 2203.03532, for players
//! who enter at every step (their bound is on the expected time to a false alarm; the weights that sum to 1 turn it into one
//! on its probability).

/// Shares of the largest bet that are tried, each with the same part of the fortune.
const SHARES: [f64; 6] = [0.05, 0.1, 0.2, 0.4, 0.7, 0.95];

/// What a [`Bet`] plays against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Claim {
    /// The expected value is at least this.
    AtLeast(f64),
    /// The expected value is at most this.
    AtMost(f64),
}

/// A player against a [`Claim`].
#[derive(Clone, Debug, PartialEq)]
pub struct Bet {
    claim: Claim,
    /// `ln S` for each share; minus infinity at the start.
    fortunes: [f64; SHARES.len()],
    /// Numbers seen.
    seen: u64,
    /// Whether players enter at every step, or only at the first.
    entering: bool,
}

impl Bet {
    /// Players against `claim` who enter at every step: for a change that may come at any time.
    pub fn anytime(claim: Claim) -> Self {
        Self { claim, fortunes: [f64::NEG_INFINITY; SHARES.len()], seen: 0, entering: true }
    }

    /// Players against `claim` who all enter at the first step: for a claim about all that follows from here on.
    pub fn from_here(claim: Claim) -> Self {
        Self { fortunes: [0.0; SHARES.len()], entering: false, ..Self::anytime(claim) }
    }

    /// Bets on one number and returns the evidence after it. Numbers outside `[0, 1]` are moved to its ends.
    pub fn see(&mut self, x: f64) -> f64 {
        self.seen += 1;
        // Towards "at least" in both cases.
        let (level, x) = match self.claim {
            Claim::AtLeast(level) => (level, x),
            Claim::AtMost(level) => (1.0 - level, 1.0 - x),
        };
        // A lower level is a weaker claim, so cutting it keeps the bound.
        let (level, x) = (level.min(1.0 - 1e-3), x.clamp(0.0, 1.0));
        let entering =
            if self.entering { -((self.seen as f64).ln() + (self.seen as f64 + 1.0).ln()) } else { f64::NEG_INFINITY };
        // The largest bet that cannot lose more than everything: x is at most 1.
        let largest = 1.0 / (1.0 - level);
        for (share, fortune) in SHARES.iter().zip(&mut self.fortunes) {
            let factor = 1.0 + share * largest * (level - x);
            *fortune = log_add(*fortune, entering) + factor.ln();
        }
        self.evidence()
    }

    /// The natural logarithm of the fortune.
    pub fn evidence(&self) -> f64 {
        self.fortunes.iter().copied().fold(f64::NEG_INFINITY, log_add) - (SHARES.len() as f64).ln()
    }
}

/// `ln (e^a + e^b)`.
pub fn log_add(a: f64, b: f64) -> f64 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if high == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

/// A watch for numbers in `[0, 1]` that fall below what they were: at the end of every window of the run it starts players
/// against the claim that the expected value never falls below a level that the window gives,
///
/// ```text
/// level = mean - tolerance - 2 sd / √window       of the window's numbers; sd is their standard deviation
/// ```
///
/// The `k`-th window's players own `1 / (k (k + 1))` of the fortune. A level is known before its players' first bet, so the
/// bound of [`Bet`] holds for them all together: if the expected value, given the past, never falls below the level of any
/// earlier window, the probability that the fortune ever reaches `1 / α` is at most `α`.
#[derive(Clone, Debug, PartialEq)]
pub struct Fall {
    window: usize,
    tolerance: f64,
    /// Numbers since the last window ended.
    recent: Vec<f64>,
    players: Vec<Player>,
}

/// Who entered after a window.
#[derive(Clone, Debug, PartialEq)]
struct Player {
    level: f64,
    share: f64,
    bet: Bet,
}

impl Fall {
    /// A watch with windows of so many numbers (at least 2).
    pub fn new(window: usize, tolerance: f64) -> Self {
        Self { window: window.max(2), tolerance, recent: Vec::new(), players: Vec::new() }
    }

    /// Bets on one number and returns the evidence after it.
    pub fn see(&mut self, x: f64) -> f64 {
        for player in &mut self.players {
            player.bet.see(x);
        }
        self.recent.push(x.clamp(0.0, 1.0));
        if self.recent.len() == self.window {
            let n = self.window as f64;
            let mean = self.recent.iter().sum::<f64>() / n;
            let variance = self.recent.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
            let level = mean - self.tolerance - 2.0 * (variance / n).sqrt();
            let k = self.players.len() as f64 + 1.0;
            let bet = Bet::from_here(Claim::AtLeast(level));
            self.players.push(Player { level, share: 1.0 / (k * (k + 1.0)), bet });
            self.recent.clear();
        }
        self.evidence()
    }

    /// The natural logarithm of the fortune.
    pub fn evidence(&self) -> f64 {
        self.players.iter().map(Player::evidence).fold(f64::NEG_INFINITY, log_add)
    }

    /// The level of the players who own most.
    pub fn level(&self) -> Option<f64> {
        let richest = self.players.iter().max_by(|a, b| a.evidence().total_cmp(&b.evidence()));
        richest.map(|player| player.level)
    }
}

impl Player {
    fn evidence(&self) -> f64 {
        self.share.ln() + self.bet.evidence()
    }
}
