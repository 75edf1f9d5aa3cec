//! Ranking of a small library by BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009):
//!
//! ```text
//! score(q, d) = Σ_t∈q  ln(1 + (N - n_t + 0.5) / (n_t + 0.5)) · f_td (k1 + 1) / (f_td + k1 (1 - b + b |d| / mean |d|))
//! ```
//!
//! with k1 = 1.2 and b = 0.75, the usual values. `N` documents, of which `n_t` hold the term; `f_td` occurrences in `d`.

use std::collections::BTreeMap;

const K1: f64 = 1.2;
const B: f64 = 0.75;

/// Words of a query that count; the rest is ignored.
const MAX_WORDS: usize = 64;

/// Documents, ready to be searched.
pub struct Index {
    /// For each term, the documents that hold it and how often.
    postings: BTreeMap<String, Vec<(usize, f64)>>,
    /// Length of each document over the mean length.
    lengths: Vec<f64>,
}

impl Index {
    /// Indexes documents.
    pub fn new<'a>(documents: impl IntoIterator<Item = &'a str>) -> Self {
        let mut postings: BTreeMap<String, Vec<(usize, f64)>> = BTreeMap::new();
        let mut lengths = Vec::new();
        for (document, text) in documents.into_iter().enumerate() {
            let mut length = 0.0;
            for word in words(text) {
                length += 1.0;
                let found = postings.entry(word).or_default();
                match found.last_mut() {
                    Some((last, count)) if *last == document => *count += 1.0,
                    _ => found.push((document, 1.0)),
                }
            }
            lengths.push(length);
        }
        let mean = lengths.iter().sum::<f64>() / lengths.len() as f64;
        lengths.iter_mut().for_each(|length| *length /= mean);
        Self { postings, lengths }
    }

    /// The `count` best documents that share a word with the query, best first; earlier documents first among equals.
    pub fn search(&self, query: &str, count: usize) -> Vec<usize> {
        let scores = self.scores(query);
        let mut ranked: Vec<usize> = (0..scores.len()).filter(|&document| scores[document] > 0.0).collect();
        ranked.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        ranked.truncate(count);
        ranked
    }

    /// The score of every document.
    fn scores(&self, query: &str) -> Vec<f64> {
        let mut scores = vec![0.0; self.lengths.len()];
        for word in words(query).take(MAX_WORDS) {
            let Some(found) = self.postings.get(&word) else { continue };
            let (all, holding) = (self.lengths.len() as f64, found.len() as f64);
            let rarity = (1.0 + (all - holding + 0.5) / (holding + 0.5)).ln();
            for &(document, frequency) in found {
                let saturation = frequency + K1 * (1.0 - B + B * self.lengths[document]);
                scores[document] += rarity * frequency * (K1 + 1.0) / saturation;
            }
        }
        scores
    }
}

/// Runs of letters and digits, in lower case.
fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIBRARY: [&str; 4] =
        ["the cat sat on the mat", "a dog sat", "the dog of the cat, a cat's dog", "nothing of the kind"];

    #[test]
    fn rare_words_count_more_and_order_is_certain() {
        let index = Index::new(LIBRARY);
        assert_eq!(index.search("cat", 3), [2, 0], "twice in one, once in the other");
        assert_eq!(index.search("DOG!", 3), [1, 2], "once in a short one beats twice in a long one");
        assert_eq!(index.search("mat dog", 1), [0], "the rarer word decides");
        assert!(index.search("zebra", 3).is_empty());
        assert!(index.search("", 3).is_empty());
        assert_eq!(Index::new(["x y", "x y"]).search("y x", 5), [0, 1]);
    }

    #[test]
    fn scores_are_those_of_the_formula() {
        // Of two documents, of lengths 1 and 3, both hold `x` and the second `y`.
        let scores = Index::new(["x", "x x y"]).scores("x y");
        let (common, rare) = (1.2f64.ln(), 2.0f64.ln());
        assert!((scores[0] - common * 2.2 / (1.0 + 1.2 * 0.625)).abs() < 1e-12);
        let expected = common * 4.4 / (2.0 + 1.2 * 1.375) + rare * 2.2 / (1.0 + 1.2 * 1.375);
        assert!((scores[1] - expected).abs() < 1e-12, "{} and {expected}", scores[1]);
    }
}
