//! Many policies out of a few trained models: sums of task vectors that no other sum beats (PEO, Liu 2025, arXiv 2503.01233).
//!
//! Models `θ_i` were trained from `θ_0`, each for an objective of its own. Without any further training,
//!
//! ```text
//! θ(λ, φ) = θ_0 + Σ_i a_i τ_i,      a_i = λ_i + φ_i,      τ_i = θ_i - θ_0
//! ```
//!
//! is their soup where `φ = 0`, goes beyond every soup where `φ_i > 0`, and takes an objective back where `φ_i < 0`. [`search()`] looks for the coefficients
//! that no others beat: a coarse grid, then steps of half its width around what nothing beats, all measured by few answers, to the same prompts and with the
//! same draws ([`Probe`]). Those that have forgotten how to write are dropped, and the half that is nearest to the front is measured again with twice the answers,
//! and again: where many candidates are close, answers are spent on those that may be the best. What no other beats at last is measured afresh, so that luck in
//! the search is not mistaken for quality. With `granularity = "block"` a last round of half steps moves the coefficients of single layers (or of what lies
//! outside of them) around what nothing beats. A [`Frontier`] is what remains: a preference between the objectives picks one of its policies.

mod probe;
mod search;

use eval::Scalarisation;
use model::decoder::TaskVectors;
use serde::{Deserialize, Serialize};

pub use probe::{Measured, Probe, ProbeError, ProbeOptions};
pub use search::{Granularity, Look, Region, Scores, SearchOptions, search};

/// Policies that no other sum of the same task vectors was found to beat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Frontier {
    /// What counts, in the order of every list of values.
    pub objectives: Vec<Objective>,
    /// The policies.
    pub policies: Vec<FrontierPolicy>,
}

/// An objective, and what the model before training reaches in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Objective {
    /// Its name.
    pub name: String,
    /// The mean over the answers of the model before training.
    pub mean: f64,
    /// Their standard deviation: the unit in which objectives are weighed against each other.
    pub standard_deviation: f64,
}

/// One policy of a frontier.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FrontierPolicy {
    /// What each task vector is multiplied by: in the whole model or, with as many for each block, block by block.
    pub coefficients: Vec<f64>,
    /// What it was measured to reach.
    pub scores: Scores,
}

/// A preference that means nothing.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error(
    "a preference gives each of the {objectives} objectives ({names}) a share from 0 up, and not all of them 0: got {got:?}"
)]
pub struct PreferenceError {
    objectives: usize,
    names: String,
    got: Vec<f64>,
}

impl Frontier {
    /// Searches. `progress` is told of the looks taken: some candidates are looked at more than once.
    ///
    /// # Errors
    /// Answers that cannot be sampled or judged.
    pub fn find(
        vectors: &TaskVectors,
        probe: &Probe<'_>,
        options: &SearchOptions,
        mut progress: impl FnMut(usize),
    ) -> Result<Self, ProbeError> {
        let mut looks = 0;
        let policies = search(options, (vectors.len(), vectors.blocks()), |coefficients, look| {
            let mut merged = vectors.merged(coefficients)?;
            looks += 1;
            progress(looks);
            probe.scores(&mut merged, look)
        })?;
        Ok(Self { objectives: probe.objectives(), policies })
    }

    /// The policy that is worth most to somebody with this preference, which is scaled to a sum of one: by the objectives in units of their standard
    /// deviations, less `kl_weight` times the divergence from the model before training. The first of equals.
    ///
    /// # Errors
    /// A preference that does not give each objective a share.
    pub fn choose(
        &self,
        preference: &[f64],
        scalarisation: Scalarisation,
        kl_weight: f64,
    ) -> Result<Option<&FrontierPolicy>, PreferenceError> {
        let total: f64 = preference.iter().sum();
        let usable = preference.iter().all(|share| *share >= 0.0) && total.is_finite() && total > 0.0;
        if preference.len() != self.objectives.len() || !usable {
            return Err(PreferenceError {
                objectives: self.objectives.len(),
                names: self.objectives.iter().map(|objective| &objective.name[..]).collect::<Vec<_>>().join(", "),
                got: preference.to_vec(),
            });
        }
        let preference: Vec<f64> = preference.iter().map(|share| share / total).collect();
        let points: Vec<Vec<f64>> = self.policies.iter().map(|policy| self.normalised(policy)).collect();
        let best = |objective: usize| points.iter().map(|point| point[objective]).fold(f64::NEG_INFINITY, f64::max);
        let ideal: Vec<f64> = (0..preference.len()).map(best).collect();
        let worth = |(policy, point): (&FrontierPolicy, &Vec<f64>)| {
            scalarisation.of(&preference, point, &ideal) - kl_weight * policy.scores.divergence
        };
        let valued = self.policies.iter().zip(&points).map(|pair| (pair.0, worth(pair)));
        let best = valued.reduce(|best, other| if other.1 > best.1 { other } else { best });
        Ok(best.map(|(policy, _)| policy))
    }

    /// What a policy reaches, in standard deviations above the model before training.
    fn normalised(&self, policy: &FrontierPolicy) -> Vec<f64> {
        let normalise = |(value, objective): (&f64, &Objective)| {
            let unit = if objective.standard_deviation > 0.0 { objective.standard_deviation } else { 1.0 };
            (value - objective.mean) / unit
        };
        policy.scores.objectives.iter().zip(&self.objectives).map(normalise).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    fn frontier() -> Frontier {
        let objective = |name: &str, standard_deviation| Objective { name: name.into(), mean: 1.0, standard_deviation };
        let policy = |coefficient: f64, objectives: [f64; 2], divergence| FrontierPolicy {
            coefficients: vec![coefficient, 1.0 - coefficient],
            scores: Scores { objectives: objectives.to_vec(), divergence, perplexity_ratio: 1.0 },
        };
        Frontier {
            // The second objective's values are ten times as large and worth as much.
            objectives: vec![objective("help", 1.0), objective("harmless", 10.0)],
            policies: vec![policy(1.0, [3.0, 1.0], 5.0), policy(0.5, [2.5, 14.0], 1.0), policy(0.0, [1.0, 21.0], 4.0)],
        }
    }

    fn chosen(preference: &[f64], scalarisation: Scalarisation, kl_weight: f64) -> f64 {
        frontier().choose(preference, scalarisation, kl_weight).unwrap().unwrap().coefficients[0]
    }

    #[test]
    fn a_preference_picks_by_values_in_units_of_their_spread() {
        assert_eq!(chosen(&[1.0, 0.0], Scalarisation::Linear, 0.0), 1.0);
        assert_eq!(chosen(&[0.5, 0.5], Scalarisation::Linear, 0.0), 0.5);
        assert_eq!(chosen(&[0.1, 0.9], Scalarisation::Linear, 0.0), 0.0);
        // Shares are scaled.
        assert_eq!(chosen(&[3.0, 3.0], Scalarisation::Linear, 0.0), 0.5);
        assert_eq!(chosen(&[0.9, 0.1], Scalarisation::Linear, 0.0), 1.0);
        assert_eq!(chosen(&[0.9, 0.1], Scalarisation::Linear, 1.0), 0.5, "at a price of the divergence");
        assert_eq!(chosen(&[0.5, 0.5], Scalarisation::Chebyshev, 0.0), 0.5);
    }

    #[test]
    fn preferences_that_mean_nothing_are_refused() {
        let refused = |preference: &[f64]| frontier().choose(preference, Scalarisation::Linear, 0.0).unwrap_err();
        assert!(refused(&[1.0]).to_string().contains("2 objectives (help, harmless)"));
        for preference in [[0.0, 0.0], [1.0, -0.1], [f64::NAN, 1.0], [f64::INFINITY, 1.0]] {
            assert!(refused(&preference).to_string().contains("from 0 up"));
        }
    }
}
