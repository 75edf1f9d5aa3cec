//! What an answer comes to, for votes.

use super::Rational;
use super::number::Numbers;

/// The result of an answer; equal results are votes for the same.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Its last number, as an exact fraction: `0.5` and `1/2` are the same.
    Number(Rational),
    /// Without a number, its text without the spaces around it, in lower case.
    Text(String),
}

impl Outcome {
    /// The result of `answer`; `None` for one that says nothing, or whose last number does not fit 128 bits.
    pub fn of(answer: &str) -> Option<Self> {
        match Numbers::new(answer, true, false).last() {
            Some(number) => number.value.map(Self::Number),
            None => Some(answer.trim().to_lowercase()).filter(|text| !text.is_empty()).map(Self::Text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_results_are_equal() {
        assert_eq!(Outcome::of("so 1,200 / 2 = 600."), Outcome::of("600"));
        assert_eq!(Outcome::of("0.50"), Outcome::of("x = 1/2"));
        assert_ne!(Outcome::of("7"), Outcome::of("-7"));
        assert_eq!(Outcome::of(" Paris\n"), Some(Outcome::Text("paris".into())));
        assert_eq!(Outcome::of("  "), None);
    }
}
