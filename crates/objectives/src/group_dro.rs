//! Weights of known groups: the worse a group is learnt, the more it counts.
//!
//! ```text
//! L_g  = mean of l_i over the rows of group g in the batch
//! q_g <- q_g e^{η L_g} / Σ_h q_h e^{η L_h}                   from batch to batch; uniform at first
//! L    = Σ_g q_g L_g
//! ```
//!
//! Group DRO with the online algorithm of Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", arXiv 1911.08731, algorithm 1:
//! exponentiated-gradient ascent on the weights of the groups against descent on the model. Where it is known which rows belong together it trains for
//! the worst of these groups, while [`mod@crate::worst_case`] has to guess from the losses of a batch what belongs to the worst mix.
//!
//! A group that a batch lacks has factor 1 and no loss in it. Groups count the same at first, whatever their sizes.
//!
//! Deviation: without the adjustment `C / √n_g` for the sizes of the groups, which the paper makes for models that can learn their data by heart.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::distribution::check_range;
use crate::loss::{Loss, Result, check_length};

/// How fast the weights of groups follow their losses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GroupDro {
    /// The step size η of the weights: by how much the logarithm of a group's weight grows for each nat of its loss. With 0 all groups
    /// count the same.
    #[schemars(range(min = 0.0))]
    pub step_size: f64,
}

impl Default for GroupDro {
    fn default() -> Self {
        Self { step_size: 0.01 }
    }
}

impl GroupDro {
    /// Refuses values that make no sense.
    ///
    /// # Errors
    /// A step size that is no number from 0 up.
    pub fn validate(&self) -> Result<()> {
        check_range("step_size", self.step_size, self.step_size >= 0.0, "a number, at least 0")
    }
}

/// The weights of groups after some batches; they add up to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupWeights(Vec<f64>);

impl GroupWeights {
    /// Equal weights, before the first batch.
    pub fn uniform(groups: usize) -> Self {
        Self(vec![1.0 / groups as f64; groups])
    }

    /// The weight of each group.
    pub fn weights(&self) -> &[f64] {
        &self.0
    }

    /// The weights after a batch with these losses, of which `groups` numbers the group of each.
    ///
    /// # Errors
    /// Other numbers of groups than of losses; a group that has no weight.
    pub fn after(&self, options: GroupDro, losses: &[f64], groups: &[u32]) -> Result<Self> {
        let means = self.means(losses, groups)?;
        // The largest exponent is taken out, so that none overflows.
        let exponents: Vec<f64> = means.iter().map(|mean| options.step_size * mean.unwrap_or(0.0)).collect();
        let largest = exponents.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let grown: Vec<f64> =
            self.0.iter().zip(&exponents).map(|(weight, exponent)| weight * (exponent - largest).exp()).collect();
        let total: f64 = grown.iter().sum();
        Ok(Self(grown.into_iter().map(|weight| weight / total).collect()))
    }

    /// How much each row counts relative to its share `1/n` of the mean over the batch's rows: `q_g n / n_g`.
    ///
    /// # Errors
    /// A group that has no weight.
    pub fn relative(&self, groups: &[u32]) -> Result<Vec<f64>> {
        let mut counts = vec![0.0; self.0.len()];
        for &group in groups {
            counts[self.place(group)?] += 1.0;
        }
        let rows = groups.len() as f64;
        Ok(groups.iter().map(|&group| self.0[group as usize] * rows / counts[group as usize]).collect())
    }

    /// The mean loss of rows, given as their losses divided by their number, made that of the weighted groups; and the weights after this
    /// batch, which are those that count. Statistics as those of [`crate::WorstCase::of`].
    ///
    /// # Errors
    /// Those of [`GroupWeights::after`].
    pub fn of(&self, options: GroupDro, mean: Loss, groups: &[u32]) -> Result<(Loss, Self)> {
        let after = self.after(options, &mean.row_losses()?, groups)?;
        Ok((mean.reweighted(after.relative(groups)?)?, after))
    }

    /// The mean loss of each group; none of a group without rows.
    fn means(&self, losses: &[f64], groups: &[u32]) -> Result<Vec<Option<f64>>> {
        check_length("groups", groups.len(), losses.len())?;
        let mut sums = vec![(0.0, 0.0); self.0.len()];
        for (loss, &group) in losses.iter().zip(groups) {
            let (sum, count) = &mut sums[self.place(group)?];
            *sum += loss;
            *count += 1.0;
        }
        Ok(sums.into_iter().map(|(sum, count)| (count > 0.0).then(|| sum / count)).collect())
    }

    fn place(&self, group: u32) -> Result<usize> {
        let known = (group as usize) < self.0.len();
        check_range("the number of a group", group.into(), known, "one of those that have a weight")?;
        Ok(group as usize)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    fn options(step_size: f64) -> GroupDro {
        GroupDro { step_size }
    }

    #[test]
    fn a_batch_by_hand() {
        // Group 0 loses 1 in the mean, group 1 loses 3, group 2 is not there.
        let (losses, groups) = ([0.5, 3.0, 1.5], [0, 1, 0]);
        let after = GroupWeights::uniform(3).after(options(0.5), &losses, &groups).unwrap();
        let grown = [0.5f64.exp(), 1.5f64.exp(), 1.0];
        let total: f64 = grown.iter().sum();
        for (found, grown) in after.weights().iter().zip(grown) {
            assert!((found - grown / total).abs() < 1e-15);
        }
        let relative = after.relative(&groups).unwrap();
        let expected = [after.0[0] * 1.5, after.0[1] * 3.0, after.0[0] * 1.5];
        assert_eq!(relative, expected);
        // The mean over rows with these weights is Σ q_g L_g.
        let weighted: f64 = losses.iter().zip(&relative).map(|(loss, weight)| loss * weight / 3.0).sum();
        assert!((weighted - (after.0[0] * 1.0 + after.0[1] * 3.0)).abs() < 1e-12);
    }

    #[test]
    fn without_a_step_groups_count_the_same_and_with_a_large_one_the_worst_alone() {
        let (losses, groups) = ([2.0, 1.0, 1.0, 1.0], [0, 1, 1, 1]);
        let start = GroupWeights::uniform(2);
        assert_eq!(start.after(options(0.0), &losses, &groups).unwrap(), start);
        // Three rows of four share one half.
        let relative = start.relative(&groups).unwrap();
        assert!((relative[0] - 2.0).abs() < 1e-15 && relative[1..].iter().all(|w| (w - 2.0 / 3.0).abs() < 1e-15));
        let worst = start.after(options(1e6), &losses, &groups).unwrap();
        assert_eq!(worst.weights(), [1.0, 0.0], "nothing overflows");
    }

    #[test]
    fn one_group_is_the_mean_to_the_last_bit() {
        let shares = Tensor::new(&[0.1f64, 0.7, 0.3], &Device::Cpu).unwrap();
        let loss = Loss { per_token: shares.clone(), statistics: Vec::new() };
        let (loss, after) = GroupWeights::uniform(1).of(options(0.3), loss, &[0, 0, 0]).unwrap();
        assert_eq!((loss.values().unwrap(), after.weights()), (vec![0.1, 0.7, 0.3], &[1.0][..]));
    }

    /// Two groups whose losses one number trades against each other: `(x - 1)²` and `(x + 2)²`. The worst of the two is least where they
    /// are equal, at -1/2; the mean over rows, nine of ten of the first group, is least at 0.7.
    #[test]
    fn descent_against_ascent_ends_where_the_groups_are_equal() {
        let groups: Vec<u32> = (0..10).map(|row| u32::from(row == 9)).collect();
        let mut state = GroupWeights::uniform(2);
        let mut x = 0.7;
        for _ in 0..4000 {
            let of = |group: &u32| if *group == 0 { x - 1.0 } else { x + 2.0 };
            let losses: Vec<f64> = groups.iter().map(|group| f64::powi(of(group), 2)).collect();
            state = state.after(options(0.02), &losses, &groups).unwrap();
            let relative = state.relative(&groups).unwrap();
            let slope: f64 = groups.iter().zip(&relative).map(|(group, weight)| 0.2 * of(group) * weight).sum();
            x -= 0.02 * slope;
        }
        assert!((x + 0.5).abs() < 1e-3, "{x}");
        // Where the slopes cancel: q (x - 1) + (1 - q) (x + 2) = 0.
        assert!((state.weights()[0] - 0.5).abs() < 1e-3, "{state:?}");
    }

    #[test]
    fn what_means_nothing_is_refused() {
        assert!(options(-0.1).validate().is_err() && options(f64::NAN).validate().is_err());
        let weights = GroupWeights::uniform(2);
        assert!(weights.relative(&[0, 2]).is_err());
        assert!(weights.after(options(0.1), &[1.0], &[0, 1]).is_err());
    }
}
