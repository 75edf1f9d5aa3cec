//! The value of an arithmetic expression, computed exactly.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::number::leading_decimal;
use super::{Budget, Exhausted, Place, Rational};
use crate::reward::{Reward, RewardError, against_gold};
use crate::score::{Answer, Score, Status};

/// Deepest nesting of parentheses, signs and powers that is read.
const MAX_DEPTH: u32 = 100;

/// Options of the `expression` reward: 1 when the answer is an arithmetic expression with the expected value.
///
/// Expressions have numbers, `+ - * / ^`, parentheses, the signs `× ÷ · −`, and LaTeX's `\times \cdot \div \frac{a}{b}`.
/// They are computed as exact fractions. With `place = "text"` the expression is the last line that is not empty, after
/// its last `=`; dollar signs around it and a full stop after it are dropped. What can't be parsed is malformed; what
/// needs more than 128 bits or more than `steps` steps is a timeout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ExpressionOptions {
    /// Column with the expected value: a number, or an expression itself.
    pub column: String,
    /// Where the answer stands: `text`, `tag` or `boxed`.
    pub place: Place,
    /// Name of the tag, for `place = "tag"`.
    pub tag: String,
    /// Steps the verifier may take for one answer.
    pub steps: u64,
}

impl Default for ExpressionOptions {
    fn default() -> Self {
        Self {
            column: super::default_column(),
            place: Place::Text,
            tag: super::default_tag(),
            steps: super::default_steps(),
        }
    }
}

/// Why an expression has no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpressionError {
    /// It is not an expression.
    #[error("not an arithmetic expression (at byte {0})")]
    Syntax(usize),
    /// It divides by zero.
    #[error("division by zero")]
    DivisionByZero,
    /// A value on the way, or a power's exponent, is too large for exact arithmetic, or is no fraction at all.
    #[error("a value does not fit exact 128-bit fractions")]
    TooLarge,
    /// An exponent is not a whole number, so the value need not be a fraction.
    #[error("an exponent is not a whole number")]
    Exponent,
    /// The budget ran out.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
}

impl ExpressionError {
    /// The status of an answer that ends in this error.
    pub fn status(self) -> Status {
        match self {
            Self::Syntax(_) | Self::DivisionByZero | Self::Exponent => Status::Malformed,
            Self::TooLarge | Self::Exhausted(_) => Status::Timeout,
        }
    }
}

/// The value of an expression, within `budget`.
///
/// Precedence from weakest: `+ -`, then `* /` (both from the left), then signs, then `^` (from the right, so that
/// `-2^2 = -4` and `2^3^2 = 512`).
///
/// # Errors
/// See [`ExpressionError`].
pub fn evaluate(text: &str, budget: &mut Budget) -> Result<Rational, ExpressionError> {
    budget.spend_on(text)?;
    let mut parser = Parser { text, at: 0, depth: 0, budget };
    let value = parser.sum()?;
    parser.skip_spaces();
    if parser.at < text.len() { Err(ExpressionError::Syntax(parser.at)) } else { Ok(value) }
}

/// Recursive descent; the recursion is bounded by [`MAX_DEPTH`].
struct Parser<'a, 'b> {
    text: &'a str,
    at: usize,
    depth: u32,
    budget: &'b mut Budget,
}

impl Parser<'_, '_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn skip_spaces(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    /// Skips spaces and the first of `tokens` that stands there; says whether one did.
    fn take(&mut self, tokens: &[&str]) -> bool {
        self.skip_spaces();
        match tokens.iter().find(|token| self.rest().starts_with(**token)) {
            Some(token) => {
                self.at += token.len();
                true
            }
            None => false,
        }
    }

    fn require(&mut self, token: &str) -> Result<(), ExpressionError> {
        if self.take(&[token]) { Ok(()) } else { Err(ExpressionError::Syntax(self.at)) }
    }

    fn nested(
        &mut self,
        parse: impl FnOnce(&mut Self) -> Result<Rational, ExpressionError>,
    ) -> Result<Rational, ExpressionError> {
        self.budget.spend(1)?;
        if self.depth == MAX_DEPTH {
            return Err(Exhausted.into());
        }
        self.depth += 1;
        let value = parse(self);
        self.depth -= 1;
        value
    }

    fn sum(&mut self) -> Result<Rational, ExpressionError> {
        let mut value = self.product()?;
        loop {
            self.budget.spend(1)?;
            if self.take(&["+"]) {
                value = fits(value.plus(self.product()?))?;
            } else if self.take(&["-", "\u{2212}"]) {
                value = fits(value.minus(self.product()?))?;
            } else {
                return Ok(value);
            }
        }
    }

    fn product(&mut self) -> Result<Rational, ExpressionError> {
        let mut value = self.signed()?;
        loop {
            self.budget.spend(1)?;
            if self.take(&["*", "×", "·", r"\times", r"\cdot"]) {
                value = fits(value.times(self.signed()?))?;
            } else if self.take(&["/", "÷", r"\div"]) {
                value = divide(value, self.signed()?)?;
            } else {
                return Ok(value);
            }
        }
    }

    fn signed(&mut self) -> Result<Rational, ExpressionError> {
        if self.take(&["-", "\u{2212}"]) {
            Ok(self.nested(Self::signed)?.negate())
        } else if self.take(&["+"]) {
            self.nested(Self::signed)
        } else {
            self.power()
        }
    }

    fn power(&mut self) -> Result<Rational, ExpressionError> {
        let base = self.atom()?;
        // `**` would otherwise be read as a product with a missing factor.
        if !self.take(&["^", "**"]) {
            return Ok(base);
        }
        let braced = self.take(&["{"]);
        let exponent = self.nested(if braced { Self::sum } else { Self::signed })?;
        if braced {
            self.require("}")?;
        }
        if exponent.denominator() != 1 {
            return Err(ExpressionError::Exponent);
        }
        if base == Rational::from(0) && exponent.numerator() < 0 {
            return Err(ExpressionError::DivisionByZero);
        }
        fits(base.power(exponent.numerator()))
    }

    fn atom(&mut self) -> Result<Rational, ExpressionError> {
        self.skip_spaces();
        for (open, close) in [(r"\left(", r"\right)"), ("(", ")"), ("{", "}")] {
            if self.take(&[open]) {
                let value = self.nested(Self::sum)?;
                self.require(close)?;
                return Ok(value);
            }
        }
        if self.take(&[r"\frac", r"\dfrac"]) {
            self.require("{")?;
            let numerator = self.nested(Self::sum)?;
            self.require("}")?;
            self.require("{")?;
            let denominator = self.nested(Self::sum)?;
            self.require("}")?;
            return divide(numerator, denominator);
        }
        self.number()
    }

    fn number(&mut self) -> Result<Rational, ExpressionError> {
        let (length, value) = leading_decimal(self.rest()).ok_or(ExpressionError::Syntax(self.at))?;
        self.budget.spend(1)?;
        self.at += length;
        fits(value)
    }
}

fn fits(value: Option<Rational>) -> Result<Rational, ExpressionError> {
    value.ok_or(ExpressionError::TooLarge)
}

fn divide(value: Rational, by: Rational) -> Result<Rational, ExpressionError> {
    if by == Rational::from(0) { Err(ExpressionError::DivisionByZero) } else { fits(value.over(by)) }
}

/// See [`ExpressionOptions`].
pub struct ExpressionReward {
    name: String,
    options: ExpressionOptions,
}

impl ExpressionReward {
    /// The reward under a name.
    ///
    /// # Errors
    /// None today; the signature is that of every reward.
    pub fn new(name: String, options: ExpressionOptions) -> Result<Self, RewardError> {
        Ok(Self { name, options })
    }

    /// The verdict on one completion.
    pub fn verify(&self, completion: &str, gold: Rational) -> Status {
        let mut budget = Budget::new(self.options.steps);
        if budget.spend_on(completion).is_err() {
            return Status::Timeout;
        }
        let Some(text) = self.options.place.find(completion, &self.options.tag) else { return Status::Malformed };
        match evaluate(last_expression(text), &mut budget) {
            Ok(value) if value == gold => Status::Ok,
            Ok(_) => Status::Wrong,
            Err(error) => error.status(),
        }
    }
}

/// The last line of `text` that is not empty, after its last `=`, without dollar signs and full stop.
fn last_expression(text: &str) -> &str {
    let line = text.trim_end().rsplit('\n').next().unwrap_or(text);
    let side = line.rsplit('=').next().unwrap_or(line).trim();
    side.strip_suffix('.').unwrap_or(side).trim_matches('$').trim()
}

impl Reward for ExpressionReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let verify = |completion: &str, gold| self.verify(completion, gold);
        against_gold(
            &self.name,
            &self.options.column,
            "an arithmetic expression",
            answers,
            |text| evaluate(text, &mut Budget::new(self.options.steps)).ok(),
            verify,
        )
    }
}
