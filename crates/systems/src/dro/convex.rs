//! The certificate: on a convex problem the reweighted gradient finds the minimum of the worst case, at the rate of the theory.
//!
//! A reward `r = w · φ` with two features, pairs with noisy labels, the worst case in a ball of total variation of radius 0.2. The certificate is a
//! search by nested grids, which knows neither gradients nor weights: the worst case is evaluated from the sorted losses.

use base::{Purpose, Random};
use objectives::{Ball, WorstCase};

const RADIUS: f64 = 0.2;

/// `φ(y_w) - φ(y_l)` of each pair.
fn pairs(n: u32) -> Vec<[f64; 2]> {
    let random = Random::new(11, Purpose::Test);
    let pair = |index: u32| {
        let draw = |position| 4.0 * random.prompt(index).at(position).uniform() - 2.0;
        let difference = [draw(0), draw(1)];
        // Two kinds of pairs, which want other weights; some labels are wrong.
        let wanted = if random.prompt(index).at(2).uniform() < 0.8 { [1.0, 0.2] } else { [-0.2, 1.0] };
        let margin = wanted[0] * difference[0] + wanted[1] * difference[1];
        let right = random.prompt(index).at(3).uniform() < envs::reward::shaping::sigmoid(2.0 * margin);
        if right { difference } else { difference.map(|x| -x) }
    };
    (0..n).map(pair).collect()
}

fn losses(w: [f64; 2], pairs: &[[f64; 2]]) -> Vec<f64> {
    pairs.iter().map(|d| (-(w[0] * d[0] + w[1] * d[1])).exp().ln_1p()).collect()
}

/// The worst case by its value's formula: `ρ max + (mass of the rest, from the top)`.
fn certificate(w: [f64; 2], pairs: &[[f64; 2]]) -> f64 {
    let mut sorted = losses(w, pairs);
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len() as f64;
    let top: f64 = (0..).zip(&sorted).map(|(i, l)| (f64::from(i + 1) / n - RADIUS).clamp(0.0, 1.0 / n) * l).sum();
    RADIUS * sorted.last().copied().unwrap_or(0.0) + top
}

fn least(pairs: &[[f64; 2]]) -> ([f64; 2], f64) {
    let (mut centre, mut reach) = ([0.0, 0.0], 2.0);
    let mut best = certificate(centre, pairs);
    for _ in 0..24 {
        let around = centre;
        for step in 0..121 {
            let w = [(step % 11 - 5), (step / 11 - 5)].map(|k| f64::from(k) * reach / 5.0);
            let w = [around[0] + w[0], around[1] + w[1]];
            let value = certificate(w, pairs);
            if value < best {
                (best, centre) = (value, w);
            }
        }
        reach *= 0.6;
    }
    (centre, best)
}

/// Subgradient descent from 0 with steps `0.5 / sqrt(t)` on batches of `n` drawn from the pairs, or on all of them; the average iterate
/// after each of these numbers of steps.
fn descend(pairs: &[[f64; 2]], batch: Option<usize>, at: &[usize]) -> Vec<[f64; 2]> {
    let ball = WorstCase::new(Ball::TotalVariation, RADIUS);
    let random = Random::new(2, Purpose::Test);
    let (mut w, mut sum, mut found) = ([0.0; 2], [0.0; 2], Vec::new());
    for step in 1..=at.iter().copied().max().unwrap_or(0) {
        let drawn: Vec<[f64; 2]> = match batch {
            None => pairs.to_vec(),
            Some(n) => {
                let draws = random.step(step as u32);
                (0..n as u32).map(|row| pairs[draws.at(row).below(pairs.len() as u64) as usize]).collect()
            }
        };
        let weights = ball.weights(&losses(w, &drawn));
        let mut gradient = [0.0; 2];
        for (d, weight) in drawn.iter().zip(weights) {
            let slope = -weight * envs::reward::shaping::sigmoid(-(w[0] * d[0] + w[1] * d[1]));
            gradient = [gradient[0] + slope * d[0], gradient[1] + slope * d[1]];
        }
        let size = 0.5 / (step as f64).sqrt();
        w = [w[0] - size * gradient[0], w[1] - size * gradient[1]];
        sum = [sum[0] + w[0], sum[1] + w[1]];
        if at.contains(&step) {
            found.push(sum.map(|x| x / step as f64));
        }
    }
    found
}

#[test]
fn descent_on_batches_finds_the_minimum_of_the_worst_case() {
    let pairs = pairs(256);
    let (_, best) = least(&pairs);
    let plain = |w: [f64; 2]| losses(w, &pairs).iter().sum::<f64>() / 256.0;
    let found = descend(&pairs, Some(128), &[4000])[0];
    let gap = certificate(found, &pairs) - best;
    assert!((0.0..1e-2).contains(&gap), "{gap}");
    // It is another problem than the mean: there the robust weights are worse than none of the robust ones are here.
    let (mut mean_best, mut w_mean) = (f64::INFINITY, [0.0; 2]);
    for step in 0..10_201 {
        let w = [(step % 101 - 50), (step / 101 - 50)].map(|k| f64::from(k) * 0.04);
        if plain(w) < mean_best {
            (mean_best, w_mean) = (plain(w), w);
        }
    }
    assert!(certificate(w_mean, &pairs) > best + 0.02, "{} {best}", certificate(w_mean, &pairs));
}

#[test]
fn the_gap_falls_with_the_root_of_the_steps() {
    let pairs = pairs(256);
    let (_, best) = least(&pairs);
    let at = [30, 100, 300, 1000, 3000];
    let gaps: Vec<f64> = descend(&pairs, None, &at).into_iter().map(|w| (certificate(w, &pairs) - best).ln()).collect();
    let steps: Vec<f64> = at.iter().map(|&steps| (steps as f64).ln()).collect();
    let (mean_x, mean_y) = (steps.iter().sum::<f64>() / 5.0, gaps.iter().sum::<f64>() / 5.0);
    let slope = steps.iter().zip(&gaps).map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>()
        / steps.iter().map(|x| (x - mean_x).powi(2)).sum::<f64>();
    // The theory bounds it by O(1/sqrt T); a problem as benign as this one may fall faster.
    assert!(slope < -0.45, "{slope}: {gaps:?}");
}
