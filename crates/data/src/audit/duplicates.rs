//! Rows that are there twice, exactly or nearly.
//!
//! Exactly: the same words in the same order (see `words`). Nearly: a Jaccard similarity of at least
//! [`SIMILAR`] between the sets of [`SHINGLE`] words in a row, as in Lee et al., "Deduplicating Training Data Makes Language
//! Models Better", arXiv 2107.06499. Candidates are found by MinHash (Broder, 1997) with `BANDS` bands of `ROWS` hashes,
//! which misses a pair of similarity 0.8 once in ten million, and each is then compared in full, so nothing is reported that
//! is not alike.
//!
//! A row is compared with the first row of each of its buckets, not with all of them: the work stays linear where thousands
//! of rows follow one pattern.

use std::collections::HashMap;

use super::words::{hash, mix, n_grams};

/// Words of a shingle. Shorter texts are only compared as a whole.
pub const SHINGLE: usize = 5;
/// Similarity from which on two rows are near duplicates.
pub const SIMILAR: f64 = 0.8;
const BANDS: usize = 32;
const ROWS: usize = 4;

/// A row that repeats an earlier one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Duplicate {
    /// Index of the row.
    pub row: usize,
    /// Index of the earlier row.
    pub first: usize,
    /// Jaccard similarity of their shingles; 1 for the same words.
    pub similarity: f64,
}

/// Finds the rows whose words repeat, or nearly repeat, those of an earlier row. Each row is reported once, with the most
/// similar of those it was compared with.
pub fn find(texts: &[Vec<u64>]) -> Vec<Duplicate> {
    let mut whole: HashMap<u64, usize> = HashMap::new();
    let mut buckets: Vec<HashMap<u64, usize>> = vec![HashMap::new(); BANDS];
    let mut shingles: HashMap<usize, Vec<u64>> = HashMap::new();
    let mut found = Vec::new();
    for (row, words) in texts.iter().enumerate().filter(|(_, words)| !words.is_empty()) {
        let first = *whole.entry(hash(words.iter().copied())).or_insert(row);
        if first != row {
            found.push(Duplicate { row, first, similarity: 1.0 });
            continue;
        }
        let mut own: Vec<u64> = n_grams(words, SHINGLE).collect();
        own.sort_unstable();
        own.dedup();
        if own.is_empty() {
            continue;
        }
        let mut candidates: Vec<usize> = bands(&own)
            .zip(&mut buckets)
            .filter_map(|(band, bucket)| match *bucket.entry(band).or_insert(row) {
                first if first == row => None,
                first => Some(first),
            })
            .collect();
        candidates.sort_unstable();
        candidates.dedup();
        let nearest = candidates
            .into_iter()
            .filter_map(|first| Some((jaccard(shingles.get(&first)?, &own), first)))
            .filter(|(similarity, _)| *similarity >= SIMILAR)
            .max_by(|(a, first), (b, second)| a.total_cmp(b).then(second.cmp(first)));
        if let Some((similarity, first)) = nearest {
            found.push(Duplicate { row, first, similarity });
        }
        shingles.insert(row, own);
    }
    found
}

/// One hash for each band: of the least values of its members over all shingles.
fn bands(shingles: &[u64]) -> impl Iterator<Item = u64> {
    let mut least = [u64::MAX; BANDS * ROWS];
    for &shingle in shingles {
        for (index, least) in (1..).zip(&mut least) {
            *least = (*least).min(mix(shingle ^ mix(index)));
        }
    }
    (0..BANDS).map(move |band| hash(least[band * ROWS..(band + 1) * ROWS].iter().copied()))
}

/// Jaccard similarity of two sorted sets.
fn jaccard(a: &[u64], b: &[u64]) -> f64 {
    let (mut i, mut j, mut common) = (0, 0, 0);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => (i, j, common) = (i + 1, j + 1, common + 1),
        }
    }
    common as f64 / (a.len() + b.len() - common) as f64
}

#[cfg(test)]
mod tests {
    use super::super::words::words;
    use super::*;

    fn sentence(length: usize, change: Option<usize>) -> Vec<u64> {
        let word = |i: usize| if Some(i) == change { "changed ".to_owned() } else { format!("w{i} ") };
        words(&(0..length).map(word).collect::<String>())
    }

    #[test]
    fn exact_and_near_duplicates_are_told_from_their_first() {
        let texts = [
            sentence(100, None),
            words("something else entirely, of a few words"),
            sentence(100, Some(50)),
            sentence(100, None),
        ];
        let found = find(&texts);
        // Of 96 shingles, one changed word changes five.
        let near = 91.0 / 101.0;
        assert_eq!(
            found,
            [Duplicate { row: 2, first: 0, similarity: near }, Duplicate { row: 3, first: 0, similarity: 1.0 }]
        );
    }

    #[test]
    fn short_texts_are_compared_as_a_whole() {
        let texts = ["3 + 4", "3 + 5", "3 + 4", "", ""].map(words);
        assert_eq!(find(&texts), [Duplicate { row: 2, first: 0, similarity: 1.0 }]);
    }

    #[test]
    fn less_similar_rows_are_left_alone() {
        assert_eq!(find(&[sentence(40, None), sentence(40, Some(20))]), [], "31 of 41 shingles are common");
    }
}
