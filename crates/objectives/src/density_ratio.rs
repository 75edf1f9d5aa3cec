//! Density ratios: how much more often a prompt comes with good completions than with bad ones.
//!
//! ```text
//! P(good | x) = σ(w · e(x) + b)                         e(x): an embedding of the prompt
//! w, b        = argmin ½ |w|² + Σ_i s_i log(1 + e^{∓(w · e(x_i) + b)})      s_i = n / (2 n_k): both kinds weigh the same
//! λ(x)        = P / (1 - P), within [min, max]
//! ```
//!
//! BCO (Jung et al., arXiv 2404.04656, section 4.2, "underlying distribution matching") weighs bad completions by `λ` of their
//! prompts where the prompts of the two kinds differ, so that the classifier does not learn what a prompt looks like. The
//! classifier is scikit-learn's `LogisticRegression(class_weight="balanced")`, as in TRL, solved by Newton's method with conjugate
//! gradients until its gradient vanishes.

/// A logistic regression.
#[derive(Clone, Debug, PartialEq)]
pub struct LogisticRegression {
    /// The weight of each coordinate.
    pub weights: Vec<f64>,
    /// What is added.
    pub bias: f64,
}

/// Steps of Newton's method at most; it converges in about ten.
const NEWTON_STEPS: usize = 100;

/// The largest derivative, relative to the number of points, at the end.
const TOLERANCE: f64 = 1e-10;

impl LogisticRegression {
    /// The best one for these points, of which `labels` says whether they are good. Points of one kind only leave it undecided:
    /// every probability is then a half.
    pub fn fit(points: &[Vec<f64>], labels: &[bool]) -> Self {
        let width = points.first().map_or(0, Vec::len);
        let good = labels.iter().filter(|good| **good).count();
        let mut theta = vec![0.0; width + 1];
        if good == 0 || good == labels.len() {
            return Self { weights: vec![0.0; width], bias: 0.0 };
        }
        let share = |count: usize| labels.len() as f64 / (2.0 * count as f64);
        let (of_good, of_bad) = (share(good), share(labels.len() - good));
        let problem = Problem {
            points,
            signs: labels.iter().map(|&good| if good { 1.0 } else { -1.0 }).collect(),
            shares: labels.iter().map(|&good| if good { of_good } else { of_bad }).collect(),
        };
        for _ in 0..NEWTON_STEPS {
            let margins = problem.margins(&theta);
            let gradient = problem.gradient(&theta, &margins);
            if gradient.iter().all(|slope| slope.abs() <= TOLERANCE * points.len() as f64) {
                break;
            }
            let step = problem.newton_step(&margins, &gradient);
            let slope = dot(&gradient, &step);
            let value = problem.value(&theta, &margins);
            let mut length = 1.0;
            // Half the step, until it goes down as much as its slope promises.
            let next = loop {
                let moved: Vec<f64> = theta.iter().zip(&step).map(|(at, step)| at + length * step).collect();
                if problem.value(&moved, &problem.margins(&moved)) <= value + 1e-4 * length * slope || length < 1e-8 {
                    break moved;
                }
                length /= 2.0;
            };
            theta = next;
        }
        let bias = theta.pop().unwrap_or_default();
        Self { weights: theta, bias }
    }

    /// The odds `P / (1 - P)` of a point.
    pub fn odds(&self, point: &[f64]) -> f64 {
        (dot(&self.weights, point) + self.bias).exp()
    }
}

/// The points of a regression, the sign of each and how much it counts. Parameters are the weights, and the bias at the end.
struct Problem<'a> {
    points: &'a [Vec<f64>],
    signs: Vec<f64>,
    shares: Vec<f64>,
}

impl Problem<'_> {
    /// `w · e + b` of every point.
    fn margins(&self, theta: &[f64]) -> Vec<f64> {
        let (weights, bias) = theta.split_at(theta.len() - 1);
        self.points.iter().map(|point| dot(weights, point) + bias[0]).collect()
    }

    fn value(&self, theta: &[f64], margins: &[f64]) -> f64 {
        let weights = &theta[..theta.len() - 1];
        let loss = |((margin, sign), share): ((&f64, &f64), &f64)| share * softplus(-sign * margin);
        dot(weights, weights) / 2.0 + margins.iter().zip(&self.signs).zip(&self.shares).map(loss).sum::<f64>()
    }

    fn gradient(&self, theta: &[f64], margins: &[f64]) -> Vec<f64> {
        let slope = |((margin, sign), share): ((&f64, &f64), &f64)| -share * sign * sigmoid(-sign * margin);
        let slopes: Vec<f64> = margins.iter().zip(&self.signs).zip(&self.shares).map(slope).collect();
        self.combined(theta, &slopes)
    }

    /// `(w + Σ_i c_i e_i, Σ_i c_i)`.
    fn combined(&self, theta: &[f64], coefficients: &[f64]) -> Vec<f64> {
        let mut total = theta.to_vec();
        let width = total.len() - 1;
        total[width] = coefficients.iter().sum();
        for (point, coefficient) in self.points.iter().zip(coefficients) {
            total.iter_mut().zip(point).for_each(|(total, value)| *total += coefficient * value);
        }
        total
    }

    /// The step to the minimum of the quadratic approximation, by conjugate gradients.
    fn newton_step(&self, margins: &[f64], gradient: &[f64]) -> Vec<f64> {
        let curvature = |(margin, share): (&f64, &f64)| share * sigmoid(*margin) * sigmoid(-margin);
        let curvatures: Vec<f64> = margins.iter().zip(&self.shares).map(curvature).collect();
        let hessian = |direction: &[f64]| {
            let along = self.margins(direction);
            let coefficients: Vec<f64> = along.iter().zip(&curvatures).map(|(along, c)| along * c).collect();
            self.combined(direction, &coefficients)
        };
        let mut step = vec![0.0; gradient.len()];
        let mut residual: Vec<f64> = gradient.iter().map(|slope| -slope).collect();
        let mut direction = residual.clone();
        let mut squared = dot(&residual, &residual);
        let enough = 1e-12 * squared;
        for _ in 0..2 * gradient.len() {
            if squared <= enough {
                break;
            }
            let image = hessian(&direction);
            let curvature = dot(&direction, &image);
            // Saturated points leave no curvature along the bias: what was found so far still goes down.
            if curvature <= f64::MIN_POSITIVE {
                break;
            }
            let length = squared / curvature;
            step.iter_mut().zip(&direction).for_each(|(step, direction)| *step += length * direction);
            residual.iter_mut().zip(&image).for_each(|(residual, image)| *residual -= length * image);
            let before = std::mem::replace(&mut squared, dot(&residual, &residual));
            let kept = squared / before;
            direction.iter_mut().zip(&residual).for_each(|(at, residual)| *at = residual + kept * *at);
        }
        step
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `log(1 + e^x)`.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two overlapping clouds without structure, the first of them good.
    fn clouds(good: usize, bad: usize, apart: f64) -> (Vec<Vec<f64>>, Vec<bool>) {
        let wave = |i: usize, phase: f64| (12.9898 * i as f64 + phase).sin();
        let labels: Vec<bool> = (0..good + bad).map(|i| i < good).collect();
        let point = |(i, &good): (usize, &bool)| vec![wave(i, 0.0) + if good { apart } else { 0.0 }, wave(i, 2.0)];
        (labels.iter().enumerate().map(point).collect(), labels)
    }

    /// The problem is strictly convex: where the derivatives of its definition vanish is its only minimum.
    #[test]
    fn the_gradient_vanishes_at_the_end() {
        for (good, bad, apart) in [(12, 30, 0.7), (40, 5, -2.0), (7, 7, 30.0)] {
            let (points, labels) = clouds(good, bad, apart);
            let found = LogisticRegression::fit(&points, &labels);
            let n = (good + bad) as f64;
            let mut slopes = [found.weights[0], found.weights[1], 0.0];
            for (point, &label) in points.iter().zip(&labels) {
                let odds = found.odds(point);
                let p = odds / (1.0 + odds);
                let (share, error) =
                    if label { (n / (2.0 * good as f64), p - 1.0) } else { (n / (2.0 * bad as f64), p) };
                slopes[0] += share * error * point[0];
                slopes[1] += share * error * point[1];
                slopes[2] += share * error;
            }
            assert!(slopes.iter().all(|slope| slope.abs() < 1e-8), "{slopes:?}");
            assert!(found.weights[0] * apart > 0.0);
        }
    }

    /// Points that say nothing, and kinds of unequal number: the classes are balanced, so that odds are even.
    #[test]
    fn nothing_to_tell_is_even_odds() {
        let points = vec![vec![0.5, -1.0]; 9];
        let labels: Vec<bool> = (0..9).map(|i| i < 2).collect();
        let found = LogisticRegression::fit(&points, &labels);
        assert!((found.odds(&points[0]) - 1.0).abs() < 1e-9, "{found:?}");
        assert_eq!(LogisticRegression::fit(&points, &[true; 9]).odds(&points[0]), 1.0);
        assert_eq!(LogisticRegression::fit(&[], &[]).odds(&[]), 1.0);
    }

    /// Two points at 1 and -1: the weight solves w = 2 / (1 + e^w), and the bias is 0.
    #[test]
    fn two_points_by_hand() {
        let found = LogisticRegression::fit(&[vec![1.0], vec![-1.0]], &[true, false]);
        let w = found.weights[0];
        assert!((w - 2.0 / (1.0 + w.exp())).abs() < 1e-9 && found.bias.abs() < 1e-9, "{found:?}");
    }

    #[test]
    fn far_points_give_finite_odds_of_the_right_side() {
        let (mut points, labels) = clouds(20, 20, 1.0);
        points.iter_mut().flatten().for_each(|value| *value *= 1e6);
        let found = LogisticRegression::fit(&points, &labels);
        assert!(found.weights.iter().chain([&found.bias]).all(|value| value.is_finite()));
    }
}
