//! What a value model says of a return, and what a soft policy makes of it.
//!
//! With `Z(x, y)` the law of the return when token `y` follows `x` and the reference model writes the rest, and `η` the price of a nat
//! of divergence from the reference (Zhou et al. 2025, Q♯, arXiv 2502.20548):
//!
//! ```text
//! Q(x, y)  = η log E_{z ~ Z(x, y)} exp(z / η)                           soft
//! π(y | x) = π_ref(y | x) exp(Q(x, y) / η) / Σ_y' π_ref(y' | x) exp(Q(x, y') / η)
//! V(x)     = η log Σ_y π_ref(y | x) exp(Q(x, y) / η)
//! ```
//!
//! Where the state after a token is certain, as it is where nobody but the model writes, this is the solution of the soft Bellman
//! equations `Q(x, y) = V(x y)`: `π` has the largest `E[return] - η KL(π ‖ π_ref)` of all policies, and `Z` does not depend on `η`. A tool or a
//! partner that answers by chance breaks it, and so does a reward that is drawn by chance once everything is written.
//!
//! `exp(1 / η)` overflows at `η = 0.001`, so that every sum is one of logarithms.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the outputs of a value model say of the return.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Returns {
    /// One output, the log-odds that the return is 1 and not 0.
    Bernoulli,
    /// One output for each of several returns, evenly spaced from `low` to `high`: the logits of their probabilities.
    Histogram {
        /// The least return.
        low: f64,
        /// The largest.
        high: f64,
    },
    /// One output, the mean of the return; nothing is known of its law.
    Mean,
}

/// Where a value model reads what a token is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ValueHead {
    /// At the token itself, behind all that comes before it: the head speaks of the state that the token leads to. Q♯'s V-type. Every candidate is
    /// read by the whole model.
    #[default]
    State,
    /// Before the token: the head has outputs of its own for every token of the vocabulary, which speak of taking it as the next. Q♯'s Q-type. One
    /// pass gives the values of all candidates.
    Action,
}

/// What the outputs of a value model are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ValueOutputs {
    /// Where they are read.
    pub head: ValueHead,
    /// What they say of the return.
    pub returns: Returns,
}

/// What a return is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Worth {
    /// `η log E exp(z / η)`: what the return is worth to whoever writes on under guidance. Q♯.
    #[default]
    Soft,
    /// `E z`: what it is worth if the reference writes on. Controlled decoding (Mudgal et al. 2023, arXiv 2310.17022) and value
    /// augmented sampling (Han et al. 2024, arXiv 2405.06639).
    Expected,
}

impl ValueOutputs {
    /// The number of outputs that a head can have over a vocabulary of this size, in words, where `outputs` is not among them.
    pub fn refused(self, outputs: usize, vocabulary: usize) -> Option<String> {
        match self.head {
            ValueHead::State => self.returns.refused(outputs).map(str::to_owned),
            ValueHead::Action => {
                let whole = outputs.is_multiple_of(vocabulary);
                let refused = self.returns.refused(if whole { outputs / vocabulary } else { 0 });
                refused.map(|each| format!("{each} for each of the {vocabulary} tokens of its vocabulary"))
            }
        }
    }

    /// What is said of a token, in all that a head says in the place where it is read.
    pub fn of(self, outputs: &[f32], token: u32, vocabulary: usize) -> &[f32] {
        match self.head {
            ValueHead::State => outputs,
            ValueHead::Action => {
                let width = outputs.len() / vocabulary;
                &outputs[width * token as usize..][..width]
            }
        }
    }
}

impl Returns {
    /// The number of outputs it can have, in words, where `outputs` is not among them.
    pub fn refused(self, outputs: usize) -> Option<&'static str> {
        match (self, outputs) {
            (Self::Bernoulli | Self::Mean, 1) | (Self::Histogram { .. }, 2..) => None,
            (Self::Bernoulli | Self::Mean, _) => Some("1"),
            (Self::Histogram { .. }, _) => Some("2 or more"),
        }
    }

    /// The worth of the return that `outputs` speak of. A probability of a return of 1 below `floor` counts as `floor`: an error of the
    /// model there would count for `η log` of a ratio of tiny numbers.
    pub fn worth(self, outputs: &[f32], worth: Worth, eta: f64, floor: f64) -> f64 {
        let first = outputs.first().copied().map_or(0.0, f64::from);
        match (self, worth) {
            (Self::Mean, _) => first,
            (Self::Bernoulli, Worth::Soft) => bernoulli(first, eta, floor),
            (Self::Bernoulli, Worth::Expected) => log_sigmoid(first).exp(),
            (Self::Histogram { low, high }, _) => {
                let step = (high - low) / (outputs.len().max(2) - 1) as f64;
                let law = (0..).zip(outputs).map(|(bin, &logit)| (f64::from(logit), low + step * f64::from(bin)));
                let law: Vec<(f64, f64)> = law.collect();
                match worth {
                    Worth::Soft => soft(&law, eta),
                    Worth::Expected => expected(&law),
                }
            }
        }
    }
}

/// `η log(1 - p + p e^{1/η})` with `p = max(σ(logit), floor)`: the soft worth of a return that is 1 with probability `p` and 0 otherwise.
pub fn bernoulli(logit: f64, eta: f64, floor: f64) -> f64 {
    let (mut right, mut wrong) = (log_sigmoid(logit), log_sigmoid(-logit));
    if floor > 0.0 && right < floor.ln() {
        (right, wrong) = (floor.ln(), (-floor).ln_1p());
    }
    eta * log_add(wrong, right + 1.0 / eta)
}

/// `η log Σ_z p(z) e^{z/η}`: the soft worth of a return, given the logits of its values and these.
pub fn soft(law: &[(f64, f64)], eta: f64) -> f64 {
    let total = log_sum(law.iter().map(|(logit, _)| *logit));
    eta * (log_sum(law.iter().map(|(logit, value)| logit + value / eta)) - total)
}

/// `Σ_z p(z) z`: the mean of a return, given the logits of its values and these.
pub fn expected(law: &[(f64, f64)]) -> f64 {
    let total = log_sum(law.iter().map(|(logit, _)| *logit));
    law.iter().map(|(logit, value)| (logit - total).exp() * value).sum()
}

/// The logarithms of `π(y) ∝ π_ref(y) e^{Q(y)/η}`, and `V = η log Σ_y π_ref(y) e^{Q(y)/η}`, given those of `π_ref`.
pub fn tilted(log_probs: &[f64], worth: &[f64], eta: f64) -> (Vec<f64>, f64) {
    let tilted: Vec<f64> = log_probs.iter().zip(worth).map(|(log_prob, worth)| log_prob + worth / eta).collect();
    let total = log_sum(tilted.iter().copied());
    (tilted.into_iter().map(|log_prob| log_prob - total).collect(), eta * total)
}

/// `log σ(x)`, exact for large arguments of either sign.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn log_add(a: f64, b: f64) -> f64 {
    log_sum([a, b].into_iter())
}

fn log_sum(terms: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = terms.clone().fold(f64::NEG_INFINITY, f64::max);
    match largest.is_finite() {
        true => largest + terms.map(|term| (term - largest).exp()).sum::<f64>().ln(),
        false => largest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETAS: [f64; 6] = [1e-3, 0.01, 0.05, 0.1, 1.0, 1e4];

    fn logit(p: f64) -> f64 {
        p.ln() - (-p).ln_1p()
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn sure_returns_are_worth_themselves() {
        for eta in ETAS {
            assert!(bernoulli(f64::NEG_INFINITY, eta, 0.0).abs() < 1e-12, "p = 0, η = {eta}");
            assert!(close(bernoulli(f64::INFINITY, eta, 0.0), 1.0), "p = 1, η = {eta}");
            assert!(close(soft(&[(0.0, 0.25)], eta), 0.25));
            assert!(close(Returns::Mean.worth(&[0.5], Worth::Soft, eta, 0.0), 0.5));
        }
    }

    #[test]
    fn the_formula_is_the_plain_one_where_that_can_be_computed() {
        for (p, eta) in [(0.3, 0.1), (0.01, 0.05), (0.9, 1.0), (0.5, 7.0)] {
            let plain = eta * f64::ln(1.0 - p + p * f64::exp(1.0 / eta));
            assert!(close(bernoulli(logit(p), eta, 0.0), plain));
            let law = [(f64::ln(1.0 - p), 0.0), (f64::ln(p), 1.0)];
            assert!(close(soft(&law, eta), plain));
        }
    }

    #[test]
    fn the_worth_lies_between_mean_and_best_and_falls_with_eta() {
        for p in [1e-6, 0.01, 0.3, 0.99] {
            let worths: Vec<f64> = ETAS.iter().map(|&eta| bernoulli(logit(p), eta, 0.0)).collect();
            assert!(worths.windows(2).all(|pair| pair[0] > pair[1]), "{worths:?}");
            assert!(worths.iter().all(|worth| (p - 1e-9..=1.0).contains(worth)), "Jensen: {worths:?}");
            // A great price leaves the mean, a small one what can be reached at all.
            assert!((worths[5] - p).abs() < 1e-4 && (worths[0] - 1.0).abs() < 0.02, "{worths:?}");
        }
    }

    #[test]
    fn histograms_are_read_by_their_bins() {
        let outputs = [1.0, 2.0, 0.5];
        let returns = Returns::Histogram { low: -1.0, high: 3.0 };
        let law = [(1.0, -1.0), (2.0, 1.0), (0.5, 3.0)];
        assert!(close(returns.worth(&outputs, Worth::Soft, 0.7, 0.0), soft(&law, 0.7)));
        assert!(close(returns.worth(&outputs, Worth::Expected, 0.7, 0.0), expected(&law)));
        assert!((soft(&law, 1e6) - expected(&law)).abs() < 1e-5);
        let two = Returns::Histogram { low: 0.0, high: 1.0 };
        let p = logit(0.2) as f32;
        assert!((two.worth(&[0.0, p], Worth::Soft, 0.1, 0.0) - bernoulli(f64::from(p), 0.1, 0.0)).abs() < 1e-9);
        assert_eq!((returns.refused(3), returns.refused(1)), (None, Some("2 or more")));
        assert_eq!((Returns::Bernoulli.refused(1), Returns::Mean.refused(2)), (None, Some("1")));
    }

    #[test]
    fn heads_over_actions_have_outputs_for_every_token() {
        let of = |returns| ValueOutputs { head: ValueHead::Action, returns };
        let histogram = of(Returns::Histogram { low: 0.0, high: 1.0 });
        assert_eq!((of(Returns::Mean).refused(7, 7), histogram.refused(21, 7)), (None, None));
        for (outputs, refused) in [(of(Returns::Mean), 1), (of(Returns::Bernoulli), 14), (of(Returns::Bernoulli), 8)] {
            let expected = "1 for each of the 7 tokens of its vocabulary";
            assert_eq!(outputs.refused(refused, 7).as_deref(), Some(expected));
        }
        assert_eq!(histogram.refused(7, 7).as_deref(), Some("2 or more for each of the 7 tokens of its vocabulary"));
        assert_eq!(histogram.of(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 1, 3), [2.0, 3.0]);
        assert_eq!(ValueOutputs { head: ValueHead::State, ..histogram }.of(&[0.0, 1.0], 9, 3), [0.0, 1.0]);
    }

    #[test]
    fn no_probability_counts_for_less_than_the_floor() {
        for eta in [0.02, 0.1] {
            let at = |p: f64| bernoulli(logit(p), eta, 1e-4);
            assert!(close(at(1e-9), at(1e-4)) && at(2e-4) > at(1e-4));
            assert!(close(at(0.3), bernoulli(logit(0.3), eta, 0.0)));
        }
        assert!((Returns::Bernoulli.worth(&[0.0], Worth::Expected, 0.1, 1e-4) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn equal_worths_leave_the_reference_alone() {
        let log_probs = [0.2f64, 0.5, 0.3].map(f64::ln);
        let (policy, value) = tilted(&log_probs, &[0.4; 3], 0.01);
        assert!(policy.iter().zip(log_probs).all(|(policy, reference)| close(*policy, reference)));
        assert!(close(value, 0.4));
        // Whoever pays nothing for divergence takes what is best.
        let (policy, value) = tilted(&log_probs, &[0.1, 0.2, 0.9], 1e-3);
        assert!(policy[2].abs() < 1e-9 && (value - 0.9).abs() < 0.01);
    }

    #[test]
    fn the_policy_is_the_best_of_all() {
        // E[Q] - η KL of the tilted policy is V, and no other policy has more.
        let (log_probs, worth, eta) = ([0.2f64, 0.5, 0.3].map(f64::ln), [0.1, 0.4, 0.9], 0.3);
        let objective = |policy: &[f64]| {
            let of = |((log_prob, worth), reference): ((&f64, &f64), &f64)| {
                log_prob.exp() * (worth - eta * (log_prob - reference))
            };
            policy.iter().zip(&worth).zip(&log_probs).map(of).sum::<f64>()
        };
        let (policy, value) = tilted(&log_probs, &worth, eta);
        assert!(close(objective(&policy), value));
        for move_by in [-0.02, 0.02] {
            let mut other: Vec<f64> = policy.iter().map(|log_prob| log_prob.exp()).collect();
            other[0] += move_by;
            other[2] -= move_by;
            assert!(objective(&other.iter().map(|p| p.ln()).collect::<Vec<f64>>()) < value);
        }
    }
}
