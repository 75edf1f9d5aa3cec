//! Held-out rows that were trained on: train/test leakage.
//!
//! A held-out prompt leaks when a training row has the same words. It overlaps when at least [`SHARE`] of its words lie in
//! runs of [`N`] words that one training row has too, as Tülu 3 measures contamination (arXiv 2411.15124). Runs that more
//! than [`COMMON`] training rows have are the pattern of the data, not its content, and count on neither side. Instructions
//! (`system` messages) are left out of both.

use std::collections::{HashMap, HashSet};

use super::words::{hash, n_grams};

/// Words of a run.
pub const N: usize = 8;
/// Share of a held-out prompt's words from which on it overlaps.
pub const SHARE: f64 = 0.5;
/// Training rows beyond which a run of words is a pattern.
pub const COMMON: usize = 10;

/// A held-out row and the training row that it shares most with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overlap {
    /// Index of the held-out row.
    pub test: usize,
    /// Index of the training row.
    pub train: usize,
    /// Share of the prompt's words that the training row has too; 1 for the same words.
    pub share: f64,
    /// Whether the training row's prompt, or the row, has the same words and no others.
    pub same: bool,
}

/// The words of a training row.
#[derive(Clone, Debug, Default)]
pub struct Trained {
    /// Of its prompt.
    pub prompt: Vec<u64>,
    /// Of the whole row.
    pub whole: Vec<u64>,
}

/// Finds the held-out prompts that training rows give away, in the order of the held-out rows.
pub fn find(train: &[Trained], test: &[Vec<u64>]) -> Vec<Overlap> {
    let mut same: HashMap<u64, usize> = HashMap::new();
    for (row, trained) in train.iter().enumerate() {
        for words in [&trained.prompt, &trained.whole] {
            same.entry(hash(words.iter().copied())).or_insert(row);
        }
    }
    // Where each run of a held-out prompt stands, and which training rows have it.
    let mut places: HashMap<u64, Vec<(usize, usize)>> = HashMap::new();
    for (row, words) in test.iter().enumerate() {
        for (at, run) in n_grams(words, N).enumerate() {
            places.entry(run).or_default().push((row, at));
        }
    }
    let runs_of = |trained: &Trained| -> HashSet<u64> {
        n_grams(&trained.whole, N).filter(|run| places.contains_key(run)).collect()
    };
    let mut rows_with: HashMap<u64, usize> = HashMap::new();
    for run in train.iter().flat_map(runs_of) {
        *rows_with.entry(run).or_default() += 1;
    }
    let is_pattern = |run: &u64| rows_with.get(run).is_some_and(|&rows| rows > COMMON);
    let patterns: Vec<usize> = test
        .iter()
        .map(|words| {
            covered(words.len(), n_grams(words, N).enumerate().filter(|(_, run)| is_pattern(run)).map(|(at, _)| at))
        })
        .collect();

    let mut best: Vec<Option<Overlap>> = vec![None; test.len()];
    for (row, trained) in train.iter().enumerate() {
        let mut hits: Vec<(usize, usize)> =
            runs_of(trained).iter().filter(|run| !is_pattern(run)).flat_map(|run| &places[run]).copied().collect();
        hits.sort_unstable();
        for group in hits.chunk_by(|a, b| a.0 == b.0) {
            let held_out = group[0].0;
            let words = test[held_out].len();
            let content = words.saturating_sub(patterns[held_out]).max(1);
            let share = covered(words, group.iter().map(|&(_, at)| at)) as f64 / content as f64;
            if share >= SHARE && best[held_out].is_none_or(|best| best.share < share) {
                best[held_out] = Some(Overlap { test: held_out, train: row, share: share.min(1.0), same: false });
            }
        }
    }
    for (row, words) in test.iter().enumerate().filter(|(_, words)| !words.is_empty()) {
        if let Some(&train) = same.get(&hash(words.iter().copied())) {
            best[row] = Some(Overlap { test: row, train, share: 1.0, same: true });
        }
    }
    best.into_iter().flatten().collect()
}

/// How many of `words` words lie in the runs that start at the ascending places `starts`.
fn covered(words: usize, starts: impl Iterator<Item = usize>) -> usize {
    let mut end = 0;
    let mut count = 0;
    for start in starts {
        let from = start.max(end);
        end = (start + N).min(words);
        count += end.saturating_sub(from);
    }
    count
}

#[cfg(test)]
mod tests {
    use super::super::words::words;
    use super::*;

    fn trained(prompt: &str, rest: &str) -> Trained {
        Trained { prompt: words(prompt), whole: words(&format!("{prompt} {rest}")) }
    }

    #[test]
    fn the_same_prompt_leaks_however_short() {
        let train = [trained("2 + 2?", "4"), trained("3 + 4?", "7")];
        let found = find(&train, &[words("3+4 ?"), words("3 + 5?")]);
        assert_eq!(found, [Overlap { test: 0, train: 1, share: 1.0, same: true }]);
    }

    #[test]
    fn half_of_a_long_prompt_is_an_overlap_and_less_is_not() {
        let text = |range: std::ops::Range<usize>| range.map(|i| format!("w{i} ")).collect::<String>();
        let train = [trained(&text(100..110), &text(0..10))];
        let found = find(&train, &[words(&text(0..20)), words(&text(0..21))]);
        assert_eq!(found, [Overlap { test: 0, train: 0, share: 0.5, same: false }]);
    }

    #[test]
    fn what_many_rows_have_is_a_pattern() {
        let story = |name: &str| format!("{name} has some apples and then buys a few more at the market");
        let train: Vec<Trained> = (0..=COMMON).map(|i| trained(&story(&format!("n{i}")), "")).collect();
        assert_eq!(find(&train, &[words(&story("someone"))]), []);
        assert_eq!(find(&train[..2], &[words(&story("someone"))]).len(), 1);
    }
}
