//! How long sequences are.

use serde::Serialize;

/// Lengths in tokens, summed up.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Lengths {
    /// Sequences.
    pub count: usize,
    /// The shortest.
    pub min: usize,
    /// Half of them are at most this long.
    pub median: usize,
    /// 95 of 100 are at most this long.
    pub p95: usize,
    /// The longest.
    pub max: usize,
    /// All tokens.
    pub total: usize,
    /// Bins of equal width from the shortest to the longest.
    pub bins: Vec<Bin>,
}

/// Sequences of `from` to `to` tokens, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bin {
    /// Least length.
    pub from: usize,
    /// Greatest length.
    pub to: usize,
    /// Sequences.
    pub count: usize,
}

/// Bins of a histogram, or one more.
const BINS: usize = 10;

impl Lengths {
    /// Sums up lengths.
    pub fn of(mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable();
        let (Some(&min), Some(&max)) = (lengths.first(), lengths.last()) else { return Self::default() };
        let count = lengths.len();
        // The smallest length that at least this share does not exceed.
        let quantile = |percent: usize| lengths[(count * percent).div_ceil(100).max(1) - 1];
        let width = round_width((max - min + 1).div_ceil(BINS));
        let bins = (min / width..=max / width).map(|bin| {
            let (from, end) = (bin * width, (bin + 1) * width);
            let below = |limit: usize| lengths.partition_point(|&length| length < limit);
            Bin { from, to: end - 1, count: below(end) - below(from) }
        });
        Self {
            count,
            min,
            median: quantile(50),
            p95: quantile(95),
            max,
            total: lengths.iter().sum(),
            bins: bins.collect(),
        }
    }
}

/// The next of 1, 2, 5, 10, 20, 50, ...
fn round_width(least: usize) -> usize {
    let mut power = 1;
    loop {
        if let Some(width) = [1, 2, 5].map(|digit| digit * power).into_iter().find(|&width| width >= least) {
            return width;
        }
        power *= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_in_one_bin() {
        let lengths = Lengths::of((1..=200).rev().collect());
        assert_eq!((lengths.min, lengths.median, lengths.p95, lengths.max, lengths.total), (1, 100, 190, 200, 20_100));
        assert_eq!(lengths.bins.iter().map(|bin| bin.count).sum::<usize>(), 200);
        assert_eq!(lengths.bins[0], Bin { from: 0, to: 19, count: 19 });
        assert_eq!(lengths.bins.last(), Some(&Bin { from: 200, to: 219, count: 1 }));
        assert_eq!(lengths.bins.len(), BINS + 1);
        assert_eq!(Lengths::of(vec![1001, 1003]).bins.len(), 3, "bins begin where the lengths do");
    }

    #[test]
    fn one_length_and_none() {
        assert_eq!(Lengths::of(vec![0]).bins, [Bin { from: 0, to: 0, count: 1 }]);
        assert_eq!(Lengths::of(Vec::new()), Lengths::default());
    }
}
