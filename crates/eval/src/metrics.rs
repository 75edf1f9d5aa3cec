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

/// Weighted voting: like [`majority`] over all answers, where each vote counts as its weight. The index returned is that of the answer
/// with the largest weight among the winners' class; `None` if nobody votes.
pub fn weighted_vote<T: PartialEq>(answers: &[Option<T>], weights: &[f64]) -> Option<usize> {
    let voters: Vec<usize> = (0..answers.len().min(weights.len())).filter(|&index| answers[index].is_some()).collect();
    let votes =
        |of: usize| voters.iter().filter(|&&other| answers[other] == answers[of]).map(|&v| weights[v]).sum::<f64>();
    let first_of_largest =
        |largest: usize, other: &usize| if votes(*other) > votes(largest) { *other } else { largest };
    let winner = voters.iter().skip(1).fold(*voters.first()?, first_of_largest);
    let class = voters.into_iter().filter(|&index| answers[index] == answers[winner]);
    class.reduce(|best, other| if weights[other] > weights[best] { other } else { best })
}

/// The unbiased estimate of what the best of `n` answers is worth: the mean, over all ways to draw `n` of the answers without replacement,
/// of the `outcome` of the one with the largest score (the first of equals). With outcomes of 0 and 1, the accuracy of best-of-n; with the
/// scores themselves as outcomes, the expected largest score (Nakano et al., arXiv 2112.09332, appendix I). `None` if `n` is 0 or exceeds
/// the answers.
pub fn best_of_n(scores: &[f64], outcomes: &[f64], n: usize) -> Option<f64> {
    let count = scores.len();
    if n == 0 || n > count || outcomes.len() != count {
        return None;
    }
    let mut order: Vec<usize> = (0..count).collect();
    // The worst first; of equals, the later is worse.
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(b.cmp(&a)));
    // The answer of rank i (from 0) is the best of n in C(i, n - 1) of C(count, n) draws.
    let mut share = 1.0 / binomial(count, n);
    let mut total = 0.0;
    for (rank, &index) in order.iter().enumerate().skip(n - 1) {
        total += share * outcomes[index];
        share *= (rank + 1) as f64 / (rank + 2 - n) as f64;
    }
    Some(total)
}

/// The bound `log n - (n - 1) / n` on the divergence of best-of-n from the model it samples from, in nats (Hilton and Gao; exact where
/// scores have no ties, arXiv 2401.01879).
pub fn best_of_n_divergence(n: usize) -> f64 {
    let n = n.max(1) as f64;
    n.ln() - (n - 1.0) / n
}

fn binomial(n: usize, k: usize) -> f64 {
    (0..k).map(|i| (n - i) as f64 / (k - i) as f64).product()
}
