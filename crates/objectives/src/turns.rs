//! Credit by turns: how much better what a turn of a conversation led to was than what the same turn led to elsewhere.
//!
//! ```text
//! G_ik = Σ_{j≥k} γ^{j-k} r_ij                 what turn k of episode i led to
//! b_k  = mean of G_jk over the episodes j of the group that have a turn k
//! D_ik = G_ik - b_k                           the advantage, before it is scaled
//! ```
//!
//! Zeng et al., "Reinforcing multi-turn reasoning in LLM agents via turn-level credit assignment", arXiv 2505.11821; the process
//! supervision of GRPO, arXiv 2402.03300, section 4.1.3.
//!
//! Deviations:
//! 1. The papers normalise the rewards of turns and then add the later ones up; here returns are compared, so that γ means
//!    what it does elsewhere and an episode's number of turns does not move its advantages.
//! 2. A turn that no other episode of the group has is compared with itself and gets 0.
//! 3. The papers have one deviation for each turn, or one of all turns about one mean. Here all turns of a group share that about the mean of
//!    each, `sqrt(Σ_ik D_ik² / Σ_k (n_k - 1))`, where `n_k` episodes have a turn k (with `scale_rewards = "batch"` all turns of the batch): with one
//!    turn an episode, the advantages are GRPO's. Episodes that come to the same total by different turns have a deviation, too.

/// A turn of a completion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TurnReward {
    /// What it was paid.
    pub reward: f64,
    /// Its loss tokens.
    pub tokens: usize,
}

/// What each turn of one group's episodes led to, less the mean of the same turn elsewhere. An episode without turns takes no
/// part.
pub fn differences(episodes: &[Vec<TurnReward>], gamma: f64) -> Vec<Vec<f64>> {
    let returns: Vec<Vec<f64>> = episodes.iter().map(|episode| returns(episode, gamma)).collect();
    let longest = returns.iter().map(Vec::len).max().unwrap_or(0);
    let baselines: Vec<Option<f64>> = (0..longest)
        .map(|turn| {
            let there: Vec<f64> = returns.iter().filter_map(|episode| episode.get(turn).copied()).collect();
            // The rounding error of a mean of equal numbers is no advantage.
            let differ = there.iter().any(|value| *value != there[0]);
            differ.then(|| there.iter().sum::<f64>() / there.len() as f64)
        })
        .collect();
    let difference = |(value, baseline): (&f64, &Option<f64>)| baseline.map_or(0.0, |mean| value - mean);
    returns.iter().map(|episode| episode.iter().zip(&baselines).map(difference).collect()).collect()
}

/// The sample standard deviation of what turns led to about the mean of the same turn elsewhere, over all turns; 0 where no turn can be
/// compared.
pub fn deviation(differences: &[Vec<f64>]) -> f64 {
    let longest = differences.iter().map(Vec::len).max().unwrap_or(0);
    let compared = differences.iter().map(Vec::len).sum::<usize>() - longest;
    let squares: f64 = differences.iter().flatten().map(|difference| difference * difference).sum();
    (squares / compared.max(1) as f64).sqrt()
}

/// The discounted sum of the rewards from each turn on.
fn returns(turns: &[TurnReward], gamma: f64) -> Vec<f64> {
    let mut sums: Vec<f64> = turns.iter().map(|turn| turn.reward).collect();
    for turn in (0..sums.len().saturating_sub(1)).rev() {
        sums[turn] += gamma * sums[turn + 1];
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    fn episode(rewards: &[f64]) -> Vec<TurnReward> {
        rewards.iter().map(|&reward| TurnReward { reward, tokens: 1 }).collect()
    }

    #[test]
    fn a_turn_is_compared_with_the_same_turn_elsewhere() {
        let found = differences(&[episode(&[0.0, 1.0]), episode(&[0.5, 0.0, 0.5]), episode(&[0.0])], 1.0);
        // Returns: 1 1 | 1 0.5 0.5 | 0. Baselines: 2/3, 3/4, and none for the turn that only one episode has.
        let expected: [&[f64]; 3] = [&[1.0 / 3.0, 0.25], &[1.0 / 3.0, -0.25, 0.0], &[-2.0 / 3.0]];
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(found.len(), expected.len());
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-15), "{found:?}");
        }
        // A discount of 0 leaves each turn its own reward.
        assert_eq!(differences(&[episode(&[1.0, 5.0]), episode(&[0.0, 5.0])], 0.0), [[0.5, 0.0], [-0.5, 0.0]]);
    }

    #[test]
    fn all_turns_share_a_deviation() {
        // Of three first, two second and one third turn: 2 + 1 + 0 degrees of freedom.
        let found = deviation(&[vec![1.0, 2.0, 0.0], vec![1.0, -2.0], vec![-2.0]]);
        assert!((found - (14.0f64 / 3.0).sqrt()).abs() < 1e-15, "{found}");
        assert_eq!([deviation(&[]), deviation(&[vec![], vec![0.0]])], [0.0; 2]);
    }

    #[test]
    fn what_cannot_be_compared_is_zero() {
        assert_eq!(differences(&[episode(&[0.1; 3]), episode(&[0.1; 3])], 1.0), [[0.0; 3], [0.0; 3]]);
        assert_eq!(differences(&[vec![], episode(&[2.0])], 1.0), [Vec::<f64>::new(), vec![0.0]]);
        assert!(differences(&[], 1.0).is_empty());
    }
}
