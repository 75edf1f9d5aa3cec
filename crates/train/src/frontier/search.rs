//! The search for coefficients: a grid, half steps around what nothing dominates, ever surer looks at ever fewer, and a fresh one.

use std::collections::BTreeSet;

use eval::front::{front, shortfalls};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::FrontierPolicy;
use crate::options::{OptionError, check};

/// Where coefficients are looked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Region {
    /// Averages of the models, and a box around the even one.
    #[default]
    Extrapolation,
    /// Averages alone: soups.
    Interpolation,
    /// Each model alone, with more or less of its own task vector.
    Single,
}

/// What has coefficients of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// A model: all of its weights have the same.
    #[default]
    Global,
    /// A block of it, too: each layer, and what lies outside of the layers. After the search for models, another round of half steps tries single
    /// blocks.
    Block,
}

/// How coefficients are looked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SearchOptions {
    /// Where.
    pub region: Region,
    /// What has coefficients of its own.
    pub granularity: Granularity,
    /// The smallest φ.
    pub low: f64,
    /// The largest.
    pub high: f64,
    /// Values of each φ in the grid.
    #[schemars(range(min = 2))]
    pub grid: usize,
    /// Averages of two models, both ends included; of more models, those with shares in the same steps.
    #[schemars(range(min = 2))]
    pub averages: usize,
    /// Rounds of half steps.
    pub refinements: u32,
    /// How often the better half of the candidates is measured again with twice the answers. The first look takes `1 / 2^halvings` of them,
    /// so that all looks together take `(1 + halvings) / 2^halvings` of what measuring every candidate with all answers would.
    pub halvings: u32,
    /// A candidate is dropped whose perplexity on answers of the model before training is more than so many times that model's.
    #[schemars(extend("exclusiveMinimum" = 1))]
    pub max_perplexity_ratio: f64,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self {
            region: Region::Extrapolation,
            granularity: Granularity::Global,
            low: -0.5,
            high: 1.5,
            grid: 5,
            averages: 11,
            refinements: 1,
            halvings: 2,
            max_perplexity_ratio: 1.5,
        }
    }
}

/// What a candidate reaches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// The mean of each objective.
    pub objectives: Vec<f64>,
    /// The divergence from the model before training, in nats an answer.
    pub divergence: f64,
    /// Perplexity on text of the model before training, over that model's own.
    pub perplexity_ratio: f64,
}

/// How a candidate is measured: in a round all by the same draws, in another round by others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Look {
    /// Names the draws.
    pub round: u32,
    /// The share of all answers, above 0 and up to 1.
    pub share: f64,
}

impl Look {
    /// With all answers.
    pub fn whole(round: u32) -> Self {
        Self { round, share: 1.0 }
    }
}

impl Scores {
    /// The mean of these scores and others, from these shares of answers.
    fn pooled(&self, share: f64, other: &Self, other_share: f64) -> Self {
        let mean = |own: f64, other: f64| (share * own + other_share * other) / (share + other_share);
        Self {
            objectives: self.objectives.iter().zip(&other.objectives).map(|(own, other)| mean(*own, *other)).collect(),
            divergence: mean(self.divergence, other.divergence),
            perplexity_ratio: mean(self.perplexity_ratio, other.perplexity_ratio),
        }
    }
}

impl SearchOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        let ordered = self.low.is_finite() && self.high.is_finite() && self.low < self.high;
        check("low", self.low, ordered, "a number below `high`")?;
        check("grid", self.grid, (2..=101).contains(&self.grid), "2 to 101")?;
        check("averages", self.averages, (2..=1001).contains(&self.averages), "2 to 1001")?;
        check("refinements", self.refinements, self.refinements <= 10, "0 to 10")?;
        check("halvings", self.halvings, self.halvings <= 10, "0 to 10")?;
        let ratio = self.max_perplexity_ratio;
        check("max_perplexity_ratio", ratio, ratio > 1.0, "a number above 1")
    }

    fn step(&self) -> f64 {
        match self.region {
            Region::Interpolation => 1.0 / (self.averages - 1) as f64,
            Region::Extrapolation | Region::Single => (self.high - self.low) / (self.grid - 1) as f64,
        }
    }

    fn phis(&self) -> impl Iterator<Item = f64> {
        (0..self.grid).map(|index| self.low + index as f64 * self.step())
    }

    /// The coarse candidates.
    fn candidates(&self, count: usize) -> Vec<Vec<f64>> {
        let averages = || averages(count, self.averages - 1);
        match self.region {
            Region::Interpolation => averages(),
            Region::Single => (0..count)
                .flat_map(|model| self.phis().map(move |phi| along(&vec![0.0; count], model, 1.0 + phi)))
                .collect(),
            Region::Extrapolation => {
                let mut grid = vec![vec![1.0 / count as f64; count]];
                for axis in 0..count {
                    grid = grid.iter().flat_map(|from| self.phis().map(move |phi| along(from, axis, phi))).collect();
                }
                averages().into_iter().chain(grid).collect()
            }
        }
    }

    /// The candidates one step around another, within the region.
    fn around(&self, center: &[f64], step: f64) -> Vec<Vec<f64>> {
        let count = center.len();
        match self.region {
            Region::Extrapolation => {
                let mut found = vec![center.to_vec()];
                for axis in 0..count {
                    let steps = [-step, 0.0, step];
                    found = found.iter().flat_map(|from| steps.map(|step| along(from, axis, step))).collect();
                }
                found
            }
            Region::Interpolation => {
                let pairs =
                    (0..count).flat_map(|to| (0..count).filter(move |&from| from != to).map(move |from| (to, from)));
                let moved = pairs.map(|(to, from)| along(&along(center, to, step), from, -step));
                moved.filter(|shares| shares.iter().all(|share| (-1e-9..=1.0 + 1e-9).contains(share))).collect()
            }
            Region::Single => {
                let axes = (0..count).filter(|&axis| center[axis] != 0.0);
                axes.flat_map(|axis| [-step, step].map(|step| along(center, axis, step))).collect()
            }
        }
    }

    /// The candidates one step from coefficients of whole models in a single one of `blocks` blocks, within the region: coefficients of every block, block after
    /// block. In a box a step goes along one axis, since blocks are many already.
    fn around_in_blocks(&self, center: &[f64], blocks: usize, step: f64) -> Vec<Vec<f64>> {
        let moved = |to: &[f64]| to.iter().zip(center).filter(|(to, from)| to != from).count();
        let most = if self.region == Region::Extrapolation { 1 } else { center.len() };
        let mut steps = self.around(center, step);
        steps.retain(|to| (1..=most).contains(&moved(to)));
        let placed = |block: usize| {
            let steps = steps.iter();
            steps.map(move |to| (0..blocks).flat_map(|own| if own == block { to } else { center }).copied().collect())
        };
        (0..blocks).flat_map(placed).collect()
    }
}

/// Coefficients with one of them shifted.
fn along(from: &[f64], axis: usize, shift: f64) -> Vec<f64> {
    from.iter().enumerate().map(|(index, value)| if index == axis { value + shift } else { *value }).collect()
}

/// All shares of `count` models in steps of `1 / parts`.
fn averages(count: usize, parts: usize) -> Vec<Vec<f64>> {
    if count == 1 {
        return vec![vec![parts as f64 / parts.max(1) as f64]];
    }
    /// All ways to write `parts` as a sum of `count` numbers.
    fn compositions(count: usize, parts: usize) -> Vec<Vec<usize>> {
        if count == 1 {
            return vec![vec![parts]];
        }
        let first =
            |first| compositions(count - 1, parts - first).into_iter().map(move |rest| [vec![first], rest].concat());
        (0..=parts).flat_map(first).collect()
    }
    let share = |part: usize| part as f64 / parts as f64;
    compositions(count, parts).into_iter().map(|shares| shares.into_iter().map(share).collect()).collect()
}

/// Coefficients on a fine lattice, so that what is reached on two ways is one candidate.
fn place(coefficients: &[f64]) -> Vec<i64> {
    coefficients.iter().map(|a| (a * 1e6).round() as i64).collect()
}

/// Looks for the coefficients of `count` task vectors of models with `blocks` blocks that no others beat (successive halving, Jamieson and Talwalkar,
/// AISTATS 2016, of what is nearest to the front). `score` measures a candidate: a coefficient for each task vector or, in the last round of
/// [`Granularity::Block`], so many for each block, block after block.
///
/// # Errors
/// The first error of `score`.
pub fn search<E>(
    options: &SearchOptions,
    (count, blocks): (usize, usize),
    mut score: impl FnMut(&[f64], Look) -> Result<Scores, E>,
) -> Result<Vec<FrontierPolicy>, E> {
    let limit = options.max_perplexity_ratio;
    let mut look = Look { round: 0, share: 0.5f64.powi(options.halvings as i32) };
    let mut seen = BTreeSet::new();
    let mut field: Vec<FrontierPolicy> = Vec::new();
    let mut candidates = options.candidates(count);
    let mut step = options.step();
    let by_block = options.granularity == Granularity::Block;
    let rounds = options.refinements + u32::from(by_block);
    for refinement in 0..=rounds {
        candidates.retain(|candidate| seen.insert(place(candidate)));
        for coefficients in std::mem::take(&mut candidates) {
            let scores = score(&coefficients, look)?;
            field.push(FrontierPolicy { coefficients, scores });
        }
        if refinement < rounds {
            step /= 2.0;
            let around = |policy: &FrontierPolicy| match refinement < options.refinements {
                true => options.around(&policy.coefficients, step),
                false => options.around_in_blocks(&policy.coefficients, blocks, step),
            };
            candidates = undominated(field.clone(), limit).iter().flat_map(around).collect();
        }
    }
    let mut taken = look.share;
    for round in 1..=options.halvings {
        field = better_half(field, limit);
        look = Look { round, share: 2.0 * look.share };
        for policy in &mut field {
            let again = score(&policy.coefficients, look)?;
            policy.scores = policy.scores.pooled(taken, &again, look.share);
        }
        taken += look.share;
    }
    field = undominated(field, limit);
    // Of many candidates with some noise, the best are the lucky ones: what is said of them comes from answers that did not choose them.
    for policy in &mut field {
        policy.scores = score(&policy.coefficients, Look::whole(options.halvings + 1))?;
    }
    Ok(undominated(field, limit))
}

/// Those that are not broken.
fn whole(mut policies: Vec<FrontierPolicy>, max_perplexity_ratio: f64) -> Vec<FrontierPolicy> {
    policies.retain(|policy| policy.scores.perplexity_ratio <= max_perplexity_ratio);
    policies
}

fn points(policies: &[FrontierPolicy]) -> Vec<&[f64]> {
    policies.iter().map(|policy| &policy.scores.objectives[..]).collect()
}

/// What is left without broken candidates and without those that others beat.
fn undominated(policies: Vec<FrontierPolicy>, max_perplexity_ratio: f64) -> Vec<FrontierPolicy> {
    let policies = whole(policies, max_perplexity_ratio);
    let best = front(&points(&policies));
    let mut number = 0..;
    policies.into_iter().filter(|_| number.next().is_some_and(|number| best.contains(&number))).collect()
}

/// Of the candidates that are not broken, the half that is nearest to the front, and all of the front.
fn better_half(policies: Vec<FrontierPolicy>, max_perplexity_ratio: f64) -> Vec<FrontierPolicy> {
    let policies = whole(policies, max_perplexity_ratio);
    let points = points(&policies);
    let shortfalls = shortfalls(&points);
    let mut order: Vec<usize> = (0..policies.len()).collect();
    order.sort_by(|a, b| shortfalls[*a].total_cmp(&shortfalls[*b]));
    order.truncate(policies.len().div_ceil(2).max(front(&points).len()));
    let mut number = 0..;
    policies.into_iter().filter(|_| number.next().is_some_and(|number| order.contains(&number))).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use std::convert::Infallible;

    use base::{Purpose, Random};
    use eval::front::hypervolume;

    use super::*;

    /// `J_i(θ) = -|θ - θ_i*|² / 2` in ten dimensions, the optima orthogonal and of length 1, and training from 0 that goes the share `s` of the way to
    /// each. The Pareto set is the segment between the optima, which the coefficients `(λ, 1 - λ) / s` reach.
    struct Quadratic {
        optima: [[f64; 10]; 2],
        share: f64,
    }

    impl Quadratic {
        fn new(share: f64) -> Self {
            let half = |sign: f64| std::array::from_fn(|i| if i % 2 == 0 { 1.0 } else { sign } / 10f64.sqrt());
            Self { optima: [half(1.0), half(-1.0)], share }
        }

        fn scores(&self, coefficients: &[f64]) -> Scores {
            let theta = |i: usize| (0..2).map(|k| coefficients[k] * self.share * self.optima[k][i]).sum::<f64>();
            let objective = |k: usize| -0.5 * (0..10).map(|i| (theta(i) - self.optima[k][i]).powi(2)).sum::<f64>();
            Scores { objectives: vec![objective(0), objective(1)], divergence: 0.0, perplexity_ratio: 1.0 }
        }

        fn search(&self, options: &SearchOptions) -> Vec<FrontierPolicy> {
            search(options, (2, 1), |coefficients, _| Ok::<_, Infallible>(self.scores(coefficients))).unwrap()
        }
    }

    fn volume(policies: &[FrontierPolicy]) -> f64 {
        let point = |policy: &FrontierPolicy| [policy.scores.objectives[0], policy.scores.objectives[1]];
        hypervolume(&policies.iter().map(point).collect::<Vec<_>>(), [-2.0, -2.0])
    }

    #[test]
    fn the_search_finds_the_pareto_segment_of_a_quadratic() {
        let found = Quadratic::new(0.5).search(&SearchOptions::default());
        for eighths in 0..=8 {
            let share = f64::from(eighths) / 8.0;
            let place = place(&[2.0 * share, 2.0 * (1.0 - share)]);
            assert!(found.iter().any(|policy| super::place(&policy.coefficients) == place), "{share}");
        }
        // What lies beside the segment is beaten by points of it, if not always by those of the lattice.
        let off = |policy: &FrontierPolicy| (policy.coefficients.iter().sum::<f64>() - 2.0).abs();
        assert!(found.iter().all(|policy| off(policy) <= 0.25 + 1e-9));
    }

    /// In closed form, for `s = 1/2`: above (-2, -2), the segment between the optima has the hypervolume
    /// `2 + ∫ (2 - λ²) 2 (1 - λ) dλ = 23/6`, and the averages of the models `165/64 + 41/48 = 659/192`.
    #[test]
    fn hypervolumes_of_the_quadratic_are_those_of_the_closed_form() {
        let toy = Quadratic::new(0.5);
        let fine = SearchOptions { grid: 41, averages: 201, refinements: 0, ..SearchOptions::default() };
        let extrapolated = volume(&toy.search(&fine));
        let soups = volume(&toy.search(&SearchOptions { region: Region::Interpolation, ..fine }));
        assert!((extrapolated / (23.0 / 6.0) - 1.0).abs() < 0.01, "{extrapolated}");
        assert!((soups / (659.0 / 192.0) - 1.0).abs() < 0.01, "{soups}");
        // Where training went all the way, there is nothing to extrapolate.
        let done = Quadratic::new(1.0);
        let soup = volume(&done.search(&SearchOptions { region: Region::Interpolation, ..SearchOptions::default() }));
        assert!(volume(&done.search(&SearchOptions::default())) < 1.05 * soup);
    }

    #[test]
    fn single_models_stay_on_their_axes() {
        let toy = Quadratic::new(0.5);
        let found = toy.search(&SearchOptions { region: Region::Single, ..SearchOptions::default() });
        assert!(found.iter().all(|policy| policy.coefficients.contains(&0.0)));
        assert!(!found.is_empty());
    }

    #[test]
    fn every_candidate_is_measured_once_and_survivors_again() {
        let toy = Quadratic::new(0.8);
        let mut calls: Vec<(Vec<i64>, Look)> = Vec::new();
        let found = search(&SearchOptions::default(), (2, 1), |coefficients, look| {
            calls.push((place(coefficients), look));
            Ok::<_, Infallible>(toy.scores(coefficients))
        });
        let found = found.unwrap();
        let of_round = |round| -> Vec<&Vec<i64>> {
            calls.iter().filter(|call| call.1.round == round).map(|call| &call.0).collect()
        };
        let share = |round| calls.iter().find(|call| call.1.round == round).unwrap().1.share;
        for round in 0..=3 {
            assert_eq!(of_round(round).iter().collect::<BTreeSet<_>>().len(), of_round(round).len(), "nothing twice");
        }
        assert!(of_round(0).contains(&&vec![500_000, 500_000]), "the soup is a candidate");
        assert_eq!([0, 1, 2, 3].map(share), [0.25, 0.5, 1.0, 1.0]);
        assert_eq!(of_round(1).len(), of_round(0).len().div_ceil(2), "the front is less than half");
        assert_eq!(of_round(2).len(), of_round(1).len().div_ceil(2).max(found.len()));
        assert_eq!(of_round(3).len(), found.len(), "the toy has no noise");
        assert!(of_round(2).iter().all(|place| of_round(1).contains(place)));
    }

    /// Where measurements have noise, what is found serves preferences better, for fewer answers, than if every candidate had as many.
    #[test]
    fn surer_looks_at_fewer_candidates_find_better_policies() {
        let toy = Quadratic::new(0.5);
        let random = Random::new(1, Purpose::Test);
        // A look with all answers has twice those that every candidate has without halving.
        let regret_and_cost = |halvings: u32, answers: f64, seed: u32| {
            let options = SearchOptions { halvings, refinements: 2, ..SearchOptions::default() };
            let (mut draw, mut cost) = (0, 0.0);
            let found = search(&options, (2, 1), |coefficients, look| {
                let mut scores = toy.scores(coefficients);
                for value in &mut scores.objectives {
                    draw += 1;
                    *value += 0.03 / (look.share * answers).sqrt() * random.step(seed).prompt(halvings).normal(draw);
                }
                cost += look.share * answers;
                Ok::<_, Infallible>(scores)
            });
            let policies = found.unwrap();
            let regret = |tenths: u32| {
                let share = f64::from(tenths) / 10.0;
                let worth = |scores: &Scores| share * scores.objectives[0] + (1.0 - share) * scores.objectives[1];
                let chosen = policies.iter().max_by(|a, b| worth(&a.scores).total_cmp(&worth(&b.scores))).unwrap();
                // With s = 1/2, the best coefficients are twice the shares.
                worth(&toy.scores(&[2.0 * share, 2.0 - 2.0 * share])) - worth(&toy.scores(&chosen.coefficients))
            };
            [(0..=10).map(regret).sum::<f64>() / 11.0, cost]
        };
        let mean = |halvings, answers| {
            let all: Vec<[f64; 2]> = (0..400).map(|seed| regret_and_cost(halvings, answers, seed)).collect();
            [0, 1].map(|k| all.iter().map(|one| one[k]).sum::<f64>() / 400.0)
        };
        let ([at_once, cost], [halved, cheaper]) = (mean(0, 1.0), mean(3, 2.0));
        assert!(halved < 0.95 * at_once && cheaper < cost, "{halved}, {at_once} for {cheaper}, {cost}");
    }

    #[test]
    fn broken_candidates_are_dropped_however_good_they_seem() {
        let toy = Quadratic::new(0.5);
        let found = search(&SearchOptions::default(), (2, 1), |coefficients, _| {
            let mut scores = toy.scores(coefficients);
            scores.perplexity_ratio = coefficients.iter().sum();
            Ok::<_, Infallible>(scores)
        });
        assert!(found.unwrap().iter().all(|policy| policy.coefficients.iter().sum::<f64>() <= 1.5 + 1e-9));
    }

    /// Training that went half the way in one half of the dimensions and all the way in the other: no coefficient of whole models is right for
    /// both halves, those of blocks are.
    #[test]
    fn blocks_reach_what_whole_models_do_not() {
        let halves = [Quadratic::new(0.5), Quadratic::new(1.0)];
        let find = |granularity, refinements| {
            let options = SearchOptions { granularity, refinements, halvings: 0, ..SearchOptions::default() };
            let found = search(&options, (2, 2), |coefficients, _| {
                let own =
                    |block: usize| if coefficients.len() == 4 { &coefficients[2 * block..][..2] } else { coefficients };
                let [first, second] = [0, 1].map(|block| halves[block].scores(own(block)).objectives);
                let objectives = first.iter().zip(&second).map(|(a, b)| (a + b) / 2.0).collect();
                Ok::<_, Infallible>(Scores { objectives, divergence: 0.0, perplexity_ratio: 1.0 })
            });
            found.unwrap()
        };
        let (whole, finer, blocks) =
            (find(Granularity::Global, 1), find(Granularity::Global, 2), find(Granularity::Block, 1));
        assert!(whole.iter().all(|policy| policy.coefficients.len() == 2));
        assert!(volume(&blocks) > volume(&finer) + 0.02, "{} {}", volume(&blocks), volume(&finer));
        // A block moves alone, by one axis, from what whole models reached.
        let of_blocks: Vec<_> = blocks.iter().filter(|policy| policy.coefficients.len() == 4).collect();
        assert!(!of_blocks.is_empty());
        for policy in of_blocks {
            let differing = (0..2).filter(|&model| policy.coefficients[model] != policy.coefficients[2 + model]);
            assert_eq!(differing.count(), 1, "{policy:?}");
        }
    }

    #[test]
    fn steps_in_single_blocks_stay_in_the_region() {
        let around = |region, center: &[f64]| {
            SearchOptions { region, ..SearchOptions::default() }.around_in_blocks(center, 3, 0.25)
        };
        assert_eq!(around(Region::Extrapolation, &[0.5, 0.5]).len(), 3 * 4);
        for shares in around(Region::Interpolation, &[0.9, 0.1]) {
            assert!(shares.chunks(2).all(|own| (own.iter().sum::<f64>() - 1.0).abs() < 1e-12), "{shares:?}");
        }
        assert!(around(Region::Single, &[1.0, 0.0]).iter().all(|own| own[1] == 0.0 && own[3] == 0.0 && own[5] == 0.0));
    }

    #[test]
    fn more_than_two_models() {
        let options = SearchOptions { grid: 2, averages: 3, ..SearchOptions::default() };
        let all = options.candidates(3);
        // Six averages in halves and the eight corners of the box.
        assert_eq!(all.len(), 6 + 8);
        assert!(all.iter().all(|coefficients| coefficients.len() == 3));
        assert!(averages(3, 10).iter().all(|shares| (shares.iter().sum::<f64>() - 1.0).abs() < 1e-12));
    }
}
