//! Advice attached to errors.

/// An error that can tell its reader what to try next.
///
/// The binary prints the advice on a line of its own, after `hint:`.
pub trait Hint: std::error::Error {
    /// One sentence of advice, lower-case and without a full stop, or `None` where there is nothing useful to say.
    fn hint(&self) -> Option<String>;
}

/// The candidate closest to `name` by edit distance, for "did you mean" advice.
///
/// Returns `None` when nothing is close: more than a third of the longer word would have to change.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), candidate))
        .filter(|(distance, candidate)| 3 * distance <= name.chars().count().max(candidate.chars().count()) + 2)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn finds_a_typo_and_refuses_a_stranger() {
        let keys = ["learning_rate", "batch_size", "seed"];
        assert_eq!(nearest("learning_rat", keys), Some("learning_rate"));
        assert_eq!(nearest("sead", keys), Some("seed"));
        assert_eq!(nearest("temperature", keys), None);
    }
}
