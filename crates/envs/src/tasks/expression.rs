//! The arithmetic underneath a problem, in a form that knows when two problems are the same.

use std::fmt;

/// A sum of terms, such as `12 + 3 * 4 - 8 / 2`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sum(pub Vec<Term>);

/// One term of a sum: a product of factors, perhaps divided, added or subtracted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Term {
    /// Whether the term is subtracted.
    pub negative: bool,
    /// The factors, at least one.
    pub factors: Vec<i64>,
    /// What their product is divided by; it must divide it.
    pub divisor: Option<i64>,
}

impl Term {
    /// A single number, added.
    pub fn number(value: i64) -> Self {
        Self { negative: false, factors: vec![value], divisor: None }
    }

    /// A product of factors, added.
    pub fn product(factors: impl Into<Vec<i64>>) -> Self {
        Self { negative: false, factors: factors.into(), divisor: None }
    }

    /// The same term, subtracted.
    pub fn subtracted(self) -> Self {
        Self { negative: true, ..self }
    }

    /// The same term divided by `divisor`.
    pub fn over(self, divisor: i64) -> Self {
        Self { divisor: Some(divisor), ..self }
    }

    fn value(&self) -> i64 {
        let size = self.factors.iter().product::<i64>() / self.divisor.unwrap_or(1);
        if self.negative { -size } else { size }
    }

    /// The term without its sign.
    fn body(&self) -> String {
        let mut text = self.factors.iter().map(i64::to_string).collect::<Vec<_>>().join(" * ");
        if let Some(divisor) = self.divisor {
            text += &format!(" / {divisor}");
        }
        text
    }
}

impl Sum {
    /// `a + b`
    pub fn addition(a: i64, b: i64) -> Self {
        Self(vec![Term::number(a), Term::number(b)])
    }

    /// `a - b`
    pub fn subtraction(a: i64, b: i64) -> Self {
        Self(vec![Term::number(a), Term::number(b).subtracted()])
    }

    /// `a * b`
    pub fn multiplication(a: i64, b: i64) -> Self {
        Self(vec![Term::product([a, b])])
    }

    /// `a / b`, which must be whole
    pub fn division(a: i64, b: i64) -> Self {
        Self(vec![Term::number(a).over(b)])
    }

    /// Its value.
    pub fn value(&self) -> i64 {
        self.0.iter().map(Term::value).sum()
    }

    /// The sum in words: `12 plus 3 times 4 minus 8 divided by 2`.
    pub fn words(&self) -> String {
        let words = [(" + ", " plus "), (" - ", " minus "), (" * ", " times "), (" / ", " divided by ")];
        words.iter().fold(self.to_string(), |text, (sign, word)| text.replace(sign, word))
    }

    /// Its canonical form: factors and terms sorted, so that exchanging operands changes nothing.
    pub fn key(&self) -> String {
        let mut terms: Vec<String> = self
            .0
            .iter()
            .map(|term| {
                let mut term = term.clone();
                term.factors.sort_unstable();
                format!("{}{}", if term.negative { '-' } else { '+' }, term.body())
            })
            .collect();
        terms.sort_unstable();
        terms.join(" ")
    }
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (index, term) in self.0.iter().enumerate() {
            match (index, term.negative) {
                (0, false) => {}
                (0, true) => f.write_str("-")?,
                (_, false) => f.write_str(" + ")?,
                (_, true) => f.write_str(" - ")?,
            }
            f.write_str(&term.body())?;
        }
        Ok(())
    }
}
