//! Point estimates: means, spread, pass@k, maj@k.

/// The mean, folded from the left; 0 for no values.
pub fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// The sample standard deviation (divisor n - 1); 0 for fewer than two values.
pub fn standard_deviation(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let mean = mean(values);
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64).sqrt()
}

/// The unbiased estimate of pass@k from `correct` right answers among `samples`: the chance that k samples drawn without
/// replacement hold a right one, `1 - C(n - c, k) / C(n, k)` (Chen et al., "Evaluating Large Language Models Trained on
/// Code", 2021). `None` if `k` is 0 or exceeds the samples, or `correct` does.
pub fn pass_at_k(samples: usize, correct: usize, k: usize) -> Option<f64> {
    if k == 0 || k > samples || correct > samples {
        return None;
    }
    if samples - correct < k {
        return Some(1.0);
    }
    // C(n - c, k) / C(n, k) = prod over i in n-c+1..=n of (1 - k / i)
    let miss: f64 = (samples - correct + 1..=samples).map(|i| 1.0 - k as f64 / i as f64).product();
    Some(1.0 - miss)
}

/// Majority voting over the first `k` answers: the index of the first answer of the largest class of equal answers, ties
/// going to the class whose first answer comes first. `None` answers (nothing could be read) don't vote. The result is
/// `None` if `k` is 0 or nobody votes.
pub fn majority<T: PartialEq>(answers: &[Option<T>], k: usize) -> Option<usize> {
    let voters = &answers[..k.min(answers.len())];
    let votes = |index: usize| voters.iter().filter(|other| **other == voters[index]).count();
    (0..voters.len()).filter(|&index| voters[index].is_some()).rev().max_by_key(|&index| votes(index))
}
