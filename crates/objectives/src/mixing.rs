//! Weights for a mixture of models, from what they say about a pool of responses (MPO, Wang et al., arXiv 2502.18699).
//!
//! Models `π_k` were each trained from `π_ref` for an objective of their own, with the same weight β of the divergence. With
//! `s_k(x, y) = log π_k(y | x) - log π_ref(y | x)`, the normalised reward of objective `k` is `β s_k`, whatever reward it was trained on, and
//!
//! ```text
//! π_λ ∝ π_ref e^{Σ_k λ_k s_k} = Π_k π_k^{λ_k} / Z_λ                          the best policy for the weights λ
//! F(λ) = E_x log E_{y ~ π_ref} e^{Σ_k λ_k s_k}                               convex, 0 at the corners, nowhere above 0
//! ∂F/∂λ_k = E_x E_{y ~ π_λ} s_k
//! λ* = argmin F over the simplex                                            π_λ* maximises min_k E s_k - KL, which is F(λ*)
//! ```
//!
//! At λ* the objectives with weight have equal `E s_k`, and those without have no less. `-F` for two models is the Chernoff
//! coefficient `-log Σ_y p^λ q^{1-λ}`, and neither depends on `π_ref`: responses may come from any proposal `q`, with
//! `log π_ref - log q` added to the exponent.
//!
//! [`descend`] is batch stochastic mirror descent: `λ_k <- λ_k e^{-η v_k} / Z` with `v` the gradient of one prompt's
//! `log mean_j e^{a_j}`, `η = c / √T`; the average of the iterates has the guarantee, `O(1/√T)` and `O(1/m)` for the `m` responses that
//! stand for an expectation.

/// A response, as the models see it.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    /// `s_k = log π_k - log π_ref` of each model.
    pub log_ratios: Vec<f64>,
    /// `log π_ref - log q`, where the response was drawn from `q`; 0 where that is the reference.
    pub log_importance: f64,
}

/// Responses to some prompts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pool {
    /// The responses to each prompt.
    pub prompts: Vec<Vec<Response>>,
}

/// A log-ratio below this counts as this: a response that a model all but excludes.
const LEAST_LOG_RATIO: f64 = -50.0;

/// A weight never falls below this, so that it can come back.
const LEAST_WEIGHT: f64 = 1e-12;

impl Response {
    /// A response of these log-probabilities: under each model, under the reference, under what it was drawn from.
    pub fn new(log_probs: &[f64], reference: f64, proposal: f64) -> Self {
        let ratio = |log_prob: &f64| (log_prob - reference).max(LEAST_LOG_RATIO);
        Self { log_ratios: log_probs.iter().map(ratio).collect(), log_importance: reference - proposal }
    }

    /// `Σ_k λ_k s_k + log π_ref - log q`.
    fn exponent(&self, weights: &[f64]) -> f64 {
        weights.iter().zip(&self.log_ratios).map(|(weight, ratio)| weight * ratio).sum::<f64>() + self.log_importance
    }
}

/// What the responses to one prompt say of a mixture.
struct Estimate {
    /// `log mean_j e^{a_j}`.
    log_mean: f64,
    /// `Σ_j w_j s_k(y_j)`, with `w` the softmax of `a`.
    gradient: Vec<f64>,
    /// `1 / Σ_j w_j²`.
    effective: f64,
}

fn estimate(responses: &[Response], weights: &[f64]) -> Estimate {
    let exponents: Vec<f64> = responses.iter().map(|response| response.exponent(weights)).collect();
    let largest = exponents.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let terms: Vec<f64> = exponents.iter().map(|exponent| (exponent - largest).exp()).collect();
    let total: f64 = terms.iter().sum();
    let mut gradient = vec![0.0; weights.len()];
    for (term, response) in terms.iter().zip(responses) {
        for (slope, ratio) in gradient.iter_mut().zip(&response.log_ratios) {
            *slope += term / total * ratio;
        }
    }
    let squares: f64 = terms.iter().map(|term| (term / total).powi(2)).sum();
    Estimate { log_mean: largest + (total / responses.len() as f64).ln(), gradient, effective: 1.0 / squares }
}

impl Pool {
    fn mean(&self, weights: &[f64], of: impl Fn(Estimate) -> f64) -> f64 {
        let sum: f64 = self.prompts.iter().map(|responses| of(estimate(responses, weights))).sum();
        sum / self.prompts.len() as f64
    }

    /// `F(λ)`, as the pool estimates it.
    pub fn value(&self, weights: &[f64]) -> f64 {
        self.mean(weights, |estimate| estimate.log_mean)
    }

    /// `∂F/∂λ_k`: the expected log-ratio of each model under `π_λ`, by importance.
    pub fn gradient(&self, weights: &[f64]) -> Vec<f64> {
        (0..weights.len()).map(|k| self.mean(weights, |estimate| estimate.gradient[k])).collect()
    }

    /// The effective number of responses to a prompt that stand for `π_λ`, on average. Near 1, one response speaks for
    /// all, and the pool is too small or its proposal too far away.
    pub fn effective_size(&self, weights: &[f64]) -> f64 {
        self.mean(weights, |estimate| estimate.effective)
    }

    /// The log of the mass that each model puts on the pool, `log E_{π_ref} e^{s_k}`. It is 0 for every model, up to what
    /// the size of the pool hides.
    pub fn log_masses(&self, count: usize) -> Vec<f64> {
        let corner = |k: usize| (0..count).map(|other| f64::from(u8::from(other == k))).collect::<Vec<f64>>();
        (0..count).map(|k| self.value(&corner(k))).collect()
    }
}

/// The weights of `count` models for which the worst-off objective is best off: the average of the iterates of mirror descent, a
/// step for each batch of responses to one prompt. `rate` is `c` in `η = c / √T`.
pub fn descend<'a>(count: usize, rate: f64, batches: impl ExactSizeIterator<Item = &'a [Response]>) -> Vec<f64> {
    let steps = batches.len().max(1) as f64;
    let eta = rate / steps.sqrt();
    let mut weights = vec![1.0 / count as f64; count];
    if batches.len() == 0 {
        return weights;
    }
    let mut average = vec![0.0; count];
    for responses in batches {
        average.iter_mut().zip(&weights).for_each(|(average, weight)| *average += weight / steps);
        let gradient = estimate(responses, &weights).gradient;
        exponentiated(&mut weights, &gradient, eta);
    }
    average
}

/// A step of exponentiated gradient descent: `λ_k <- λ_k e^{-η v_k} / Z`.
pub fn exponentiated(weights: &mut [f64], gradient: &[f64], eta: f64) {
    let least = gradient.iter().copied().fold(f64::INFINITY, f64::min);
    weights.iter_mut().zip(gradient).for_each(|(weight, slope)| *weight *= (-eta * (slope - least)).exp());
    let total: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|weight| *weight = (*weight / total).max(LEAST_WEIGHT));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every response of a table, each as often as the reference says, as a pool of one prompt: sums become expectations.
    fn table(models: &[&[f64]]) -> Pool {
        let size = models[0].len();
        // Uniform reference.
        let reference = -(size as f64).ln();
        let response = |y: usize| {
            let log_probs: Vec<f64> = models.iter().map(|model| model[y].ln()).collect();
            Response::new(&log_probs, reference, reference)
        };
        Pool { prompts: vec![(0..size).map(response).collect()] }
    }

    const P: [f64; 4] = [0.7, 0.1, 0.1, 0.1];
    const Q: [f64; 4] = [0.1, 0.2, 0.3, 0.4];

    #[test]
    fn it_is_the_chernoff_coefficient_of_two_models() {
        let pool = table(&[&P, &Q]);
        for tenths in 0..=10 {
            let share = f64::from(tenths) / 10.0;
            let expected = P.iter().zip(Q).map(|(p, q)| p.powf(share) * q.powf(1.0 - share)).sum::<f64>().ln();
            assert!((pool.value(&[share, 1.0 - share]) - expected).abs() < 1e-12, "{share}");
            assert!(expected < 1e-12);
        }
        assert!(pool.log_masses(2).iter().all(|mass| mass.abs() < 1e-12), "0 at the corners");
    }

    #[test]
    fn the_gradient_is_that_of_the_value() {
        let pool = table(&[&P, &Q]);
        let weights = [0.3, 0.6];
        for (k, slope) in pool.gradient(&weights).into_iter().enumerate() {
            let at = |shift: f64| {
                let mut weights = weights;
                weights[k] += shift;
                pool.value(&weights)
            };
            assert!((slope - (at(1e-6) - at(-1e-6)) / 2e-6).abs() < 1e-8);
        }
    }

    /// At the minimum the objectives are balanced, and the value is what the worst-off has, less the divergence.
    #[test]
    fn the_minimum_is_balanced() {
        let pool = table(&[&P, &Q]);
        let batch: &[Response] = &pool.prompts[0];
        let found = descend(2, 20.0, std::iter::repeat_n(batch, 20_000));
        let gradient = pool.gradient(&found);
        assert!((gradient[0] - gradient[1]).abs() < 2e-3, "{gradient:?}");
        let mixed: Vec<f64> = P.iter().zip(Q).map(|(p, q)| p.powf(found[0]) * q.powf(found[1])).collect();
        let total: f64 = mixed.iter().sum();
        let divergence: f64 = mixed.iter().map(|p| p / total * (4.0 * p / total).ln()).sum();
        let worst = gradient.iter().copied().fold(f64::INFINITY, f64::min);
        assert!((worst - divergence - pool.value(&found)).abs() < 2e-3);
    }

    #[test]
    fn equal_models_leave_the_weights_alone() {
        let pool = table(&[&P, &P, &P]);
        assert!(pool.value(&[0.2, 0.5, 0.3]).abs() < 1e-12);
        let found = descend(3, 1.0, std::iter::repeat_n(&pool.prompts[0][..], 100));
        assert!(found.iter().all(|weight| (weight - 1.0 / 3.0).abs() < 1e-12));
    }

    #[test]
    fn a_model_that_others_cover_gets_no_weight() {
        // What pleases both pleases the third more than either: E s_3 is never the least.
        let third: [f64; 4] = [0.4, 0.15, 0.2, 0.25];
        let pool = table(&[&P, &Q, &third]);
        let found = descend(3, 20.0, std::iter::repeat_n(&pool.prompts[0][..], 20_000));
        let gradient = pool.gradient(&found);
        assert!(found[2] < 0.01 && gradient[2] > gradient[0].max(gradient[1]), "{found:?}, {gradient:?}");
    }

    #[test]
    fn the_proposal_does_not_matter() {
        // All of the table from a skewed proposal, each response counted by its importance instead of its frequency.
        let proposal: [f64; 4] = [0.4, 0.3, 0.2, 0.1];
        let skewed = |counts: [usize; 4]| {
            let all = (0..4).flat_map(|y| {
                let response = Response::new(&[P[y].ln(), Q[y].ln()], 0.25f64.ln(), proposal[y].ln());
                std::iter::repeat_n(response, counts[y])
            });
            Pool { prompts: vec![all.collect()] }
        };
        let (plain, skewed) = (table(&[&P, &Q]), skewed([4, 3, 2, 1]));
        for weights in [[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]] {
            assert!((plain.value(&weights) - skewed.value(&weights)).abs() < 1e-12);
            let slopes = plain.gradient(&weights).into_iter().zip(skewed.gradient(&weights));
            assert!(slopes.into_iter().all(|(a, b)| (a - b).abs() < 1e-12));
        }
    }

    #[test]
    fn excluded_responses_stay_finite() {
        let response = Response::new(&[f64::NEG_INFINITY, -1.0], -2.0, -2.0);
        assert_eq!(response.log_ratios, [-50.0, 1.0]);
        let pool = Pool { prompts: vec![vec![response]] };
        assert!(pool.value(&[0.5, 0.5]).is_finite());
        assert_eq!(pool.effective_size(&[0.5, 0.5]), 1.0);
        let mut weights = [0.5, 0.5];
        exponentiated(&mut weights, &[1e6, -1e6], 1.0);
        assert!(weights[0] > 0.0 && weights[1] == 1.0);
    }
}
