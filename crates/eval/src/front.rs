//! Several objectives at once: which models no other one beats, and how good a set of them is.
//!
//! A *point* is what a model reaches in each objective; more is better in all of them. A point *dominates* another that it
//! reaches or exceeds everywhere and exceeds somewhere. The points that none dominates are the *front*.

use crate::metrics::standard_deviation;

/// Whether `a` is at least as good everywhere and better somewhere.
pub fn dominates(a: &[f64], b: &[f64]) -> bool {
    a.iter().zip(b).all(|(a, b)| a >= b) && a.iter().zip(b).any(|(a, b)| a > b)
}

/// Numbers of the points that no other one dominates, in the order of the points; of equal points the first.
pub fn front<P: AsRef<[f64]>>(points: &[P]) -> Vec<usize> {
    let beaten = |index: usize| {
        let point = points[index].as_ref();
        points.iter().enumerate().any(|(other, candidate)| {
            dominates(candidate.as_ref(), point) || (other < index && candidate.as_ref() == point)
        })
    };
    (0..points.len()).filter(|&index| !beaten(index)).collect()
}

/// How far each point is from being beaten by none: by how much it would have to rise in every objective, in standard deviations of the points
/// (the additive ε of Zitzler et al., "Performance assessment of multiobjective optimizers", 2003, for one point).
///
/// ```text
/// ε_i = max_{j ≠ i} min_k (J_k^j - J_k^i) / σ_k
/// ```
///
/// Not above 0 on the front, not below 0 elsewhere; -∞ for a point that is alone.
pub fn shortfalls<P: AsRef<[f64]>>(points: &[P]) -> Vec<f64> {
    let unit = |objective: usize| {
        let values: Vec<f64> = points.iter().map(|point| point.as_ref()[objective]).collect();
        let deviation = standard_deviation(&values);
        if deviation > 0.0 { deviation } else { 1.0 }
    };
    let units: Vec<f64> = (0..points.first().map_or(0, |point| point.as_ref().len())).map(unit).collect();
    let behind = |own: &[f64], other: &[f64]| {
        let gaps = own.iter().zip(other).zip(&units).map(|((own, other), unit)| (other - own) / unit);
        gaps.fold(f64::INFINITY, f64::min)
    };
    let shortfall = |(i, own): (usize, &P)| {
        let others = points.iter().enumerate().filter(|(j, _)| *j != i);
        others.map(|(_, other)| behind(own.as_ref(), other.as_ref())).fold(f64::NEG_INFINITY, f64::max)
    };
    points.iter().enumerate().map(shortfall).collect()
}

/// The area of what the points dominate above `reference` (Zitzler and Thiele, "Multiobjective evolutionary algorithms", 1999), in
/// two objectives. Points that do not exceed the reference in both add nothing.
///
/// ```text
/// HV = Σ_k (J_1^k - z_1) (J_2^k - J_2^{k-1}),      the front by falling J_1, J_2^0 = z_2
/// ```
pub fn hypervolume(points: &[[f64; 2]], reference: [f64; 2]) -> f64 {
    let mut above: Vec<[f64; 2]> =
        points.iter().copied().filter(|point| point[0] > reference[0] && point[1] > reference[1]).collect();
    above.sort_by(|a, b| b[0].total_cmp(&a[0]).then(b[1].total_cmp(&a[1])));
    let (mut volume, mut height) = (0.0, reference[1]);
    for [x, y] in above {
        if y > height {
            volume += (x - reference[0]) * (y - height);
            height = y;
        }
    }
    volume
}

/// The mean squared gap of neighbours on the front, summed over the objectives, each of which is sorted on its own (Xu et al., "Prediction-guided
/// multi-objective reinforcement learning", 2020); 0 for fewer than two points. Less is denser.
pub fn sparsity<P: AsRef<[f64]>>(points: &[P]) -> f64 {
    let Some(objectives) = points.first().map(|point| point.as_ref().len()).filter(|_| points.len() > 1) else {
        return 0.0;
    };
    let gaps = |objective: usize| {
        let mut values: Vec<f64> = points.iter().map(|point| point.as_ref()[objective]).collect();
        values.sort_by(f64::total_cmp);
        values.windows(2).map(|pair| (pair[1] - pair[0]).powi(2)).sum::<f64>()
    };
    (0..objectives).map(gaps).sum::<f64>() / (points.len() - 1) as f64
}

/// The share of `others` that some point of `points` dominates or equals (Zitzler's C-metric); 0 without others.
pub fn coverage<P: AsRef<[f64]>, Q: AsRef<[f64]>>(points: &[P], others: &[Q]) -> f64 {
    let covers = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| a >= b);
    let covered = others.iter().filter(|other| points.iter().any(|point| covers(point.as_ref(), other.as_ref())));
    covered.count() as f64 / others.len().max(1) as f64
}

/// What a point is worth to somebody to whom the objectives count this much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scalarisation {
    /// `Σ_i p_i J_i`. It never picks a point in a dent of the front.
    #[default]
    Linear,
    /// `min_i p_i (J_i - z_i)`, where `z` has the best of every objective: the weighted distance to the ideal that is largest. Every point of a
    /// front is the best for some preference.
    Chebyshev,
}

impl Scalarisation {
    /// The value of a point; `ideal` has the best of every objective.
    pub fn of(self, preference: &[f64], point: &[f64], ideal: &[f64]) -> f64 {
        let weighed = preference.iter().zip(point);
        match self {
            Self::Linear => weighed.map(|(p, value)| p * value).sum(),
            Self::Chebyshev => {
                weighed.zip(ideal).map(|((p, value), ideal)| p * (value - ideal)).fold(f64::INFINITY, f64::min)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DENTED: [[f64; 2]; 3] = [[0.0, 1.0], [0.4, 0.4], [1.0, 0.0]];

    #[test]
    fn the_front_is_what_nothing_dominates() {
        let points = [[1.0, 3.0], [2.0, 2.0], [1.0, 3.0], [1.5, 2.0], [3.0, 1.0], [0.0, 0.0]];
        assert_eq!(front(&points), [0, 1, 4], "of equal points the first");
        assert!(dominates(&[1.0, 2.0], &[1.0, 1.0]) && !dominates(&[1.0, 2.0], &[1.0, 2.0]));
        assert!(!dominates(&[1.0, 2.0], &[2.0, 1.0]));
        assert!(front::<[f64; 2]>(&[]).is_empty());
    }

    #[test]
    fn hypervolume_is_the_area_of_the_staircase() {
        let reference = [0.0, 0.0];
        assert_eq!(hypervolume(&[[2.0, 3.0]], reference), 6.0);
        assert_eq!(hypervolume(&[[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], reference), 6.0);
        // Order, dominated points and copies change nothing.
        assert_eq!(hypervolume(&[[3.0, 1.0], [1.0, 3.0], [1.0, 1.0], [2.0, 2.0], [2.0, 2.0]], reference), 6.0);
        // What is not above the reference in both adds nothing.
        assert_eq!(hypervolume(&[[9.0, 0.0], [-1.0, 9.0]], reference), 0.0);
        assert_eq!(hypervolume(&[[1.0, 1.0]], [0.5, 0.75]), 0.125);
        // Points of equal height or width.
        assert_eq!(hypervolume(&[[2.0, 1.0], [3.0, 1.0], [2.0, 2.0]], reference), 5.0);
    }

    #[test]
    fn shortfalls_say_how_far_the_front_is() {
        // Deviations of 2 and 4: of the last point, the second is 2 / 2 and 4 / 4 away.
        let points = [[0.0, 8.0], [4.0, 8.0], [2.0, 4.0], [2.0, 4.0], [4.0, 0.0]];
        let deviations = [0, 1].map(|k| standard_deviation(&points.map(|point| point[k])));
        let found = shortfalls(&points);
        assert_eq!(found[0], 0.0, "as high as the best, and beaten in the other objective");
        assert!(found[1] < 0.0, "alone on the front: {found:?}");
        let expected = (2.0 / deviations[0]).min(4.0 / deviations[1]);
        assert!((found[2] - expected).abs() < 1e-12 && found[2] == found[3]);
        let on_front = |index: usize| front(&points).contains(&index);
        assert!((0..5).all(|index| if on_front(index) { found[index] <= 0.0 } else { found[index] >= 0.0 }));
        assert_eq!(shortfalls(&[[1.0, 2.0]]), [f64::NEG_INFINITY]);
        let level = shortfalls(&[[1.0, 2.0], [1.0, 3.0]]);
        assert!(level[0] == 0.0 && level[1] < 0.0, "an objective in which all are equal decides nothing: {level:?}");
    }

    #[test]
    fn sparsity_and_coverage() {
        assert_eq!(sparsity(&[[0.0, 2.0], [1.0, 1.0], [3.0, 0.0]]), (1.0 + 4.0 + 1.0 + 1.0) / 2.0);
        assert_eq!(sparsity(&[[0.0, 2.0]]), 0.0);
        let (better, worse) = ([[2.0, 2.0]], [[1.0, 2.0], [3.0, 0.0]]);
        assert_eq!((coverage(&better, &worse), coverage(&worse, &better)), (0.5, 0.0));
        assert_eq!(coverage(&better, &better), 1.0, "equal points cover each other");
    }

    #[test]
    fn chebyshev_reaches_dents_that_sums_do_not() {
        let best = |scalarisation: Scalarisation, p: f64| {
            let value = |index: &usize| scalarisation.of(&[p, 1.0 - p], &DENTED[*index], &[1.0, 1.0]);
            (0..3).max_by(|a, b| value(a).total_cmp(&value(b)))
        };
        assert!((0..=10).all(|tenths| best(Scalarisation::Linear, f64::from(tenths) / 10.0) != Some(1)));
        assert_eq!(best(Scalarisation::Chebyshev, 0.5), Some(1));
        assert_eq!(best(Scalarisation::Chebyshev, 1.0), Some(2));
        assert_eq!(best(Scalarisation::Chebyshev, 0.0), Some(0));
    }
}
