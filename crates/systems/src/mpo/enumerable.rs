//! Policies small enough to know everything: 258 sequences of one to three of six tokens.
//!
//! A node of the tree is a beginning of a sequence, and its sequence is the one that ends there; node 0 is the empty beginning, which no
//! sequence is. The reference of a prompt is a random table; the specialists are what DPO would make of it with enough data and capacity,
//! `π_k ∝ π_ref e^{r_k / β}` for random rewards.

use base::{Purpose, Random};
use eval::metrics::mean;
use objectives::mixing::{Pool, Response, descend};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::measurements::Measurements;

/// Tokens.
const TOKENS: usize = 6;
/// Nodes of the tree: the empty beginning and the sequences.
const NODES: usize = 1 + TOKENS + TOKENS * TOKENS + TOKENS * TOKENS * TOKENS;
/// The first node that has no children.
const LEAVES: usize = NODES - TOKENS * TOKENS * TOKENS;
/// Objectives.
const OBJECTIVES: usize = 3;

/// Sizes of the enumerable world.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EnumerableOptions {
    /// Prompts, each with tables of its own.
    #[schemars(range(min = 1))]
    pub prompts: u32,
    /// Standard deviation of `r_k / β`.
    pub reward_deviation: f64,
    /// Steps of mirror descent; the shortest of its runs has a sixty-fourth of them.
    #[schemars(range(min = 64))]
    pub steps: u32,
    /// Responses of a step.
    #[schemars(range(min = 1))]
    pub responses: u32,
    /// `c` of the step size.
    pub rate: f64,
    /// Descents that an error is averaged over.
    #[schemars(range(min = 1))]
    pub repeats: u32,
    /// Batches that the bias is averaged over, and draws by resampling.
    #[schemars(range(min = 1))]
    pub draws: u32,
}

/// The policies for one prompt.
struct Tables {
    /// Of each sequence under the reference; entry 0 is not a sequence and has 0.
    reference: Vec<f64>,
    /// Under each specialist.
    specialists: Vec<Vec<f64>>,
}

fn children(node: usize) -> std::ops::Range<usize> {
    if node < LEAVES { TOKENS * node + 1..TOKENS * (node + 1) + 1 } else { 0..0 }
}

/// The probability of every sequence by that of each next step: the children of a node, and the end there.
fn sequences(step: impl Fn(usize) -> (Vec<f64>, f64)) -> Vec<f64> {
    let (mut reach, mut probabilities) = (vec![0.0; NODES], vec![0.0; NODES]);
    reach[0] = 1.0;
    for node in 0..NODES {
        let (next, end) = step(node);
        probabilities[node] = reach[node] * end;
        children(node).zip(next).for_each(|(child, share)| reach[child] = reach[node] * share);
    }
    probabilities
}

fn normalised(values: Vec<f64>) -> Vec<f64> {
    let total: f64 = values.iter().sum();
    values.into_iter().map(|value| value / total).collect()
}

/// Probability of each beginning.
fn masses(table: &[f64]) -> Vec<f64> {
    let mut masses = table.to_vec();
    for node in (0..LEAVES).rev() {
        masses[node] += children(node).map(|child| masses[child]).sum::<f64>();
    }
    masses
}

impl Tables {
    fn random(options: &EnumerableOptions, random: Random) -> Self {
        let reference = sequences(|node| {
            let chances =
                normalised((0..=TOKENS as u32).map(|token| random.sample(node as u32).normal(token).exp()).collect());
            match node {
                0 => (normalised(chances[..TOKENS].to_vec()), 0.0),
                node if node < LEAVES => (chances[..TOKENS].to_vec(), chances[TOKENS]),
                _ => (Vec::new(), 1.0),
            }
        });
        let specialist = |k: u32| {
            let reward = |node: usize| options.reward_deviation * random.sample(NODES as u32 + k).normal(node as u32);
            normalised(reference.iter().enumerate().map(|(node, p)| p * reward(node).exp()).collect())
        };
        Self { specialists: (0..OBJECTIVES as u32).map(specialist).collect(), reference }
    }

    fn response(&self, node: usize) -> Response {
        let log_probs: Vec<f64> = self.specialists.iter().map(|table| table[node].ln()).collect();
        let reference = self.reference[node].ln();
        Response::new(&log_probs, reference, reference)
    }

    /// `log Σ_y Π_k π_k^{λ_k}`.
    fn value(&self, weights: &[f64]) -> f64 {
        self.products(weights).iter().sum::<f64>().ln()
    }

    fn products(&self, weights: &[f64]) -> Vec<f64> {
        let product = |node: usize| {
            let exponent: f64 =
                weights.iter().zip(&self.specialists).map(|(weight, table)| weight * table[node].ln()).sum();
            exponent.exp()
        };
        std::iter::once(0.0).chain((1..NODES).map(product)).collect()
    }

    /// `π_λ`.
    fn mixed(&self, weights: &[f64]) -> Vec<f64> {
        normalised(self.products(weights))
    }

    /// What mixing token by token gives instead.
    fn mixed_by_token(&self, weights: &[f64]) -> Vec<f64> {
        let masses: Vec<Vec<f64>> = self.specialists.iter().map(|table| masses(table)).collect();
        sequences(|node| {
            // By Bayes' rule each specialist's next step, then their weighted geometric mean.
            let mean = |of: &dyn Fn(usize) -> f64| {
                let chance = |k: usize| weights[k] * (of(k) / masses[k][node]).ln();
                (0..OBJECTIVES).map(chance).sum::<f64>().exp()
            };
            let mut steps: Vec<f64> = children(node).map(|child| mean(&|k| masses[k][child])).collect();
            steps.push(if node == 0 { 0.0 } else { mean(&|k| self.specialists[k][node]) });
            let mut steps = normalised(steps);
            let end = steps.pop().unwrap_or(0.0);
            (steps, end)
        })
    }
}

/// Half the sum of the absolute differences.
fn total_variation(a: &[f64], b: &[f64]) -> f64 {
    0.5 * a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>()
}

/// The sequence at a point of the cumulative distribution.
fn draw(table: &[f64], uniform: f64) -> usize {
    let mut running = 0.0;
    let crosses = table.iter().position(|p| {
        running += p;
        running > uniform
    });
    crosses.unwrap_or(NODES - 1)
}

/// Everything that is measured.
struct World<'a> {
    options: &'a EnumerableOptions,
    prompts: Vec<Tables>,
    random: Random,
}

impl World<'_> {
    fn value(&self, weights: &[f64]) -> f64 {
        mean(&self.prompts.iter().map(|tables| tables.value(weights)).collect::<Vec<_>>())
    }

    /// The weights with the least value, by grids that close in on it: the value is convex.
    fn best(&self) -> [f64; OBJECTIVES] {
        let (mut best, mut width) = ([1.0 / 3.0; OBJECTIVES], 0.5);
        while width > 1e-4 {
            let center = best;
            let shifts = || (-4..=4).map(|step| f64::from(step) * width / 4.0);
            let around = shifts().flat_map(|a| shifts().map(move |b| [center[0] + a, center[1] + b]));
            let inside = around.map(|[a, b]| [a, b, 1.0 - a - b]).filter(|all| all.iter().all(|share| *share >= 0.0));
            let valued = inside.map(|weights| (self.value(&weights), weights));
            let least = valued.reduce(|best, other| if other.0 < best.0 { other } else { best });
            best = least.map_or(best, |(_, weights)| weights);
            width *= 0.7;
        }
        best
    }

    /// Mirror descent on fresh responses of the reference. `name` tells descents apart.
    fn descended(&self, name: u32, steps: u32, responses: u32) -> Vec<f64> {
        let batch = |step: u32| -> Vec<Response> {
            let random = self.random.step(1 + name).prompt(step);
            let tables = &self.prompts[random.at(responses).below(self.prompts.len() as u64) as usize];
            (0..responses).map(|j| tables.response(draw(&tables.reference, random.at(j).uniform()))).collect()
        };
        let batches: Vec<Vec<Response>> = (0..steps).map(batch).collect();
        descend(OBJECTIVES, self.options.rate, batches.iter().map(|batch| &batch[..]))
    }

    /// By how much the log of the mean of so many terms falls short of the log of its expectation, on average.
    fn bias(&self, weights: &[f64], responses: u32) -> f64 {
        let short = |number: u32| {
            let random = self.random.step(u32::MAX).sample(responses).prompt(number);
            let tables = &self.prompts[number as usize % self.prompts.len()];
            let all =
                (0..responses).map(|j| tables.response(draw(&tables.reference, random.at(j).uniform()))).collect();
            tables.value(weights) - Pool { prompts: vec![all] }.value(weights)
        };
        mean(&(0..self.options.draws).map(short).collect::<Vec<_>>())
    }

    /// The law of resampling one of so many candidates of the mixture by tokens: the mean of the chances that their weights give.
    fn resampled(&self, tables: &Tables, weights: &[f64], candidates: u32) -> Vec<f64> {
        let (target, proposal) = (tables.products(weights), tables.mixed_by_token(weights));
        let mut law = vec![0.0; NODES];
        for number in 0..self.options.draws {
            let random = self.random.step(u32::MAX - 1).sample(candidates).prompt(number);
            let drawn: Vec<usize> = (0..candidates).map(|j| draw(&proposal, random.at(j).uniform())).collect();
            let chances = normalised(drawn.iter().map(|&node| target[node] / proposal[node]).collect());
            drawn
                .into_iter()
                .zip(chances)
                .for_each(|(node, chance)| law[node] += chance / f64::from(self.options.draws));
        }
        law
    }
}

/// The slope of the least-squares line through the logarithms.
fn slope(points: &[(f64, f64)]) -> f64 {
    let logs: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.ln(), y.max(1e-300).ln())).collect();
    let (x, y) =
        (mean(&logs.iter().map(|p| p.0).collect::<Vec<_>>()), mean(&logs.iter().map(|p| p.1).collect::<Vec<_>>()));
    let covariance: f64 = logs.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    covariance / logs.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>()
}

fn world(options: &EnumerableOptions, seed: u64) -> World<'_> {
    let random = Random::new(seed, Purpose::Task).step(2);
    let prompts = (0..options.prompts).map(|prompt| Tables::random(options, random.prompt(prompt))).collect();
    World { options, prompts, random: Random::new(seed, Purpose::Test) }
}

/// Measures how mirror descent and the decoders fare against what is known exactly.
pub fn measure(options: &EnumerableOptions, seed: u64) -> Measurements {
    let world = world(options, seed);
    let mut measured = Measurements::default();
    let best = world.best();
    let least = world.value(&best);
    measured.set("least_value", least);
    let found = world.descended(0, options.steps, options.responses);
    let distance = found.iter().zip(best).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    measured.set("weight_error", distance);
    let mut errors = Vec::new();
    for quarter in [64, 16, 4, 1] {
        let steps = options.steps / quarter;
        let error = |repeat: u32| world.value(&world.descended(1 + repeat, steps, options.responses)) - least;
        errors.push((f64::from(steps), mean(&(0..options.repeats).map(error).collect::<Vec<_>>())));
    }
    errors.iter().for_each(|(steps, error)| measured.point("error_by_steps", *steps, *error));
    measured.set("slope_in_steps", slope(&errors));
    let biases: Vec<(f64, f64)> = [2, 4, 8, 16].map(|m| (f64::from(m), world.bias(&best, m))).into();
    biases.iter().for_each(|(m, bias)| measured.point("bias_by_responses", *m, *bias));
    measured.set("slope_in_responses", slope(&biases));
    let tables = &world.prompts[0];
    let exact = tables.mixed(&best);
    measured.set("token_variation", total_variation(&tables.mixed_by_token(&best), &exact));
    for candidates in [1, 4, 16, 64] {
        let law = world.resampled(tables, &best, candidates);
        measured.point("variation_by_candidates", f64::from(candidates), total_variation(&law, &exact));
    }
    measured.set_known("resampled_variation", measured.at("variation_by_candidates", 64.0));
    measured
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> EnumerableOptions {
        EnumerableOptions {
            prompts: 3,
            reward_deviation: 1.0,
            steps: 64,
            responses: 8,
            rate: 1.0,
            repeats: 1,
            draws: 20_000,
        }
    }

    #[test]
    fn the_tables_are_distributions_of_258_sequences() {
        let options = options();
        let world = world(&options, 3);
        for tables in &world.prompts {
            for table in tables.specialists.iter().chain([&tables.reference]) {
                assert!((table.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                assert_eq!(table.iter().filter(|p| **p > 0.0).count(), 258);
            }
        }
    }

    /// The problem's value is what the worst-off objective has at the best weights, less the divergence, and all objectives with weight have the same.
    #[test]
    fn the_best_weights_balance_the_objectives() {
        let options = options();
        let world = world(&options, 5);
        let best = world.best();
        assert!(best.iter().all(|weight| *weight > 0.01), "an inner point: {best:?}");
        let expected = |tables: &Tables, k: usize| -> f64 {
            let law = tables.mixed(&best);
            (1..NODES).map(|y| law[y] * (tables.specialists[k][y] / tables.reference[y]).ln()).sum()
        };
        let divergence = |tables: &Tables| -> f64 {
            let law = tables.mixed(&best);
            (1..NODES).map(|y| law[y] * (law[y] / tables.reference[y]).ln()).sum()
        };
        let over_prompts = |of: &dyn Fn(&Tables) -> f64| mean(&world.prompts.iter().map(of).collect::<Vec<_>>());
        let rewards: Vec<f64> = (0..OBJECTIVES).map(|k| over_prompts(&|tables| expected(tables, k))).collect();
        assert!(rewards.iter().all(|reward| (reward - rewards[0]).abs() < 2e-3), "{rewards:?}");
        assert!((rewards[0] - over_prompts(&divergence) - world.value(&best)).abs() < 2e-3);
    }

    #[test]
    fn the_value_is_zero_at_the_corners_and_below_between() {
        let options = options();
        let world = world(&options, 1);
        for k in 0..OBJECTIVES {
            let corner: Vec<f64> = (0..OBJECTIVES).map(|other| f64::from(u8::from(other == k))).collect();
            assert!(world.value(&corner).abs() < 1e-12);
        }
        assert!(world.value(&[0.3, 0.3, 0.4]) < -0.01);
    }

    /// Mixing by tokens is not the law of the mixture; resampling comes as close as one likes.
    #[test]
    fn resampling_converges_to_the_exact_law() {
        let options = options();
        let world = world(&options, 2);
        let tables = &world.prompts[0];
        let weights = [0.3, 0.3, 0.4];
        let exact = tables.mixed(&weights);
        let by_token = total_variation(&tables.mixed_by_token(&weights), &exact);
        assert!(by_token > 0.05, "{by_token}");
        assert!(total_variation(&tables.mixed_by_token(&[0.0, 1.0, 0.0]), &tables.specialists[1]) < 1e-12);
        let far = |candidates| total_variation(&world.resampled(tables, &weights, candidates), &exact);
        let (one, few, many) = (far(1), far(8), far(64));
        assert!((one - by_token).abs() < 0.02, "one candidate is taken as it is: {one}, {by_token}");
        assert!(few < 0.7 * by_token && many < 0.3 * by_token, "{by_token}, {few}, {many}");
    }
}
