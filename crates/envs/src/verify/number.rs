//! The number in an answer, compared exactly.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Budget, Place, Rational};
use crate::reward::{Reward, RewardError, against_gold};
use crate::score::{Answer, Score, Status};

/// Options of the `number` reward: 1 when the last number of the answer equals the expected one.
///
/// Numbers are compared as exact fractions: `0.5`, `1/2` and `50e-2` are equal, `0.333` and `1/3` are not, unless a
/// tolerance says so. An answer without a number, or with one of more than about 38 digits, is malformed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NumberOptions {
    /// Column with the expected number.
    pub column: String,
    /// Where the answer stands: `text`, `tag` or `boxed`.
    pub place: Place,
    /// Name of the tag, for `place = "tag"`.
    pub tag: String,
    /// Whether commas may group digits by three: `1,234` is 1234. Otherwise a comma ends the number.
    pub thousands: bool,
    /// Whether `25%` means 1/4. Otherwise the sign is ignored like any other text.
    pub percent: bool,
    /// Whether the place must hold nothing but the number, spaces, a final full stop and one of `units`.
    pub only: bool,
    /// Texts that may stand before or after the number when `only` is set, such as `"$"` or `"apples"`.
    pub units: Vec<String>,
    /// Greatest difference that still counts as equal. With both tolerances 0, numbers are compared exactly.
    pub tolerance: f64,
    /// The same as a fraction of the expected number's size; the larger of the two allowances holds.
    pub relative_tolerance: f64,
    /// Steps the verifier may take for one answer; a longer answer is a timeout.
    pub steps: u64,
}

impl Default for NumberOptions {
    fn default() -> Self {
        Self {
            column: super::default_column(),
            place: Place::Text,
            tag: super::default_tag(),
            thousands: true,
            percent: false,
            only: false,
            units: Vec::new(),
            tolerance: 0.0,
            relative_tolerance: 0.0,
            steps: super::default_steps(),
        }
    }
}

/// See [`NumberOptions`].
pub struct NumberReward {
    name: String,
    options: NumberOptions,
}

impl NumberReward {
    /// The reward under a name.
    ///
    /// # Errors
    /// A tolerance that is negative or not finite.
    pub fn new(name: String, options: NumberOptions) -> Result<Self, RewardError> {
        for (option, value) in [("tolerance", options.tolerance), ("relative_tolerance", options.relative_tolerance)] {
            if !(value.is_finite() && value >= 0.0) {
                let reason = format!("{option} is {value}, expected a finite number of at least 0");
                return Err(RewardError::Options { reward: name, reason });
            }
        }
        Ok(Self { name, options })
    }

    /// The verdict on one completion.
    pub fn verify(&self, completion: &str, gold: Rational) -> Status {
        let options = &self.options;
        if Budget::new(options.steps).spend_on(completion).is_err() {
            return Status::Timeout;
        }
        let Some(text) = options.place.find(completion, &options.tag) else { return Status::Malformed };
        let Some(number) = Numbers::new(text, options.thousands, options.percent).last() else {
            return Status::Malformed;
        };
        if options.only && !self.is_padding(&text[..number.start], &text[number.end..]) {
            return Status::Malformed;
        }
        match number.value {
            None => Status::Malformed,
            Some(value) if self.equal(value, gold) => Status::Ok,
            Some(_) => Status::Wrong,
        }
    }

    fn equal(&self, value: Rational, gold: Rational) -> bool {
        let NumberOptions { tolerance, relative_tolerance, .. } = self.options;
        if tolerance == 0.0 && relative_tolerance == 0.0 {
            return value == gold;
        }
        let allowed = tolerance.max(relative_tolerance * gold.to_f64().abs());
        (value.to_f64() - gold.to_f64()).abs() <= allowed
    }

    /// Whether the text around a number says nothing: at most one unit on either side.
    fn is_padding(&self, before: &str, after: &str) -> bool {
        let plain = |text: &str| text.is_empty() || self.options.units.iter().any(|unit| unit == text);
        let after = after.trim();
        plain(before.trim()) && plain(after.strip_suffix('.').unwrap_or(after).trim())
    }
}

impl Reward for NumberReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let verify = |completion: &str, gold| self.verify(completion, gold);
        against_gold(&self.name, &self.options.column, "a number", answers, parse, verify)
    }
}

/// Reads a text that is exactly one number: `-1,234.5`, `3/4`, `2e6`. `None` for anything else, or if it does not fit.
pub fn parse(text: &str) -> Option<Rational> {
    let text = text.trim();
    let number = Numbers::new(text, true, false).next()?;
    (number.start == 0 && number.end == text.len()).then_some(number.value).flatten()
}

/// A number found in a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Found {
    /// First byte.
    pub start: usize,
    /// The byte after the last.
    pub end: usize,
    /// Its value; `None` if it does not fit 128 bits, or divides by zero.
    pub value: Option<Rational>,
}

/// The numbers of a text from left to right.
///
/// A number is an optional sign, digits (grouped by commas if `thousands`), an optional decimal part and exponent, and an
/// optional tight denominator (`3/4`). A sign belongs to the number unless a letter, digit or closing parenthesis stands
/// before it: `12-5` holds 12 and 5. The work is linear in the text.
pub struct Numbers<'a> {
    text: &'a str,
    at: usize,
    thousands: bool,
    percent: bool,
}

impl<'a> Numbers<'a> {
    /// The numbers of `text`; for the two options see [`NumberOptions`].
    pub fn new(text: &'a str, thousands: bool, percent: bool) -> Self {
        Self { text, at: 0, thousands, percent }
    }

    fn byte(&self, at: usize) -> Option<u8> {
        self.text.as_bytes().get(at).copied()
    }

    fn is_digit(&self, at: usize) -> bool {
        self.byte(at).is_some_and(|byte| byte.is_ascii_digit())
    }

    /// Whether a digit, or a decimal point with a digit after it, is at `at`.
    fn starts_at(&self, at: usize) -> bool {
        self.is_digit(at) || (self.byte(at) == Some(b'.') && self.is_digit(at + 1))
    }

    /// The end of the digits at `at`.
    fn digits(&self, mut at: usize) -> usize {
        while self.is_digit(at) {
            at += 1;
        }
        at
    }

    /// The end of a whole part at `at`, which is a digit: plain digits or groups of three after one to three digits.
    fn whole_part(&self, at: usize) -> usize {
        let mut end = self.digits(at);
        if !self.thousands || end - at > 3 {
            return end;
        }
        while self.byte(end) == Some(b',') && self.digits(end + 1) == end + 4 {
            end += 4;
        }
        end
    }

    /// The sign just before `start`: its first byte and whether it is a minus.
    fn sign(&self, start: usize) -> (usize, bool) {
        let before = &self.text[..start];
        let (sign, negative) = match before.chars().next_back() {
            Some(sign @ ('-' | '\u{2212}')) => (sign, true),
            Some(sign @ '+') => (sign, false),
            _ => return (start, false),
        };
        let at = start - sign.len_utf8();
        match self.text[..at].chars().next_back() {
            Some(c) if c.is_alphanumeric() || c == ')' => (start, false),
            _ => (at, negative),
        }
    }

    /// The number whose first digit (or decimal point) is at `first`.
    fn number(&self, first: usize) -> Found {
        let (mut end, mut value) = self.decimal(first);
        if self.byte(end) == Some(b'/') && self.is_digit(end + 1) {
            let denominator_end = self.whole_part(end + 1);
            let denominator = digits_value(&self.text[end + 1..denominator_end]);
            value = value.and_then(|value| value.over(Rational::new(denominator?, 1)?));
            end = denominator_end;
        }
        let spaces = self.text[end..].len() - self.text[end..].trim_start_matches(' ').len();
        if self.percent && self.byte(end + spaces) == Some(b'%') {
            end += spaces + 1;
            value = value.and_then(|value| value.over(Rational::from(100)));
        }
        let (start, negative) = self.sign(first);
        Found { start, end, value: if negative { value.map(Rational::negate) } else { value } }
    }

    /// The end and the value of the decimal number whose first digit (or decimal point) is at `first`.
    fn decimal(&self, first: usize) -> (usize, Option<Rational>) {
        let whole_end = if self.is_digit(first) { self.whole_part(first) } else { first };
        let mut end = whole_end;
        if self.byte(end) == Some(b'.') && self.is_digit(end + 1) {
            end = self.digits(end + 1);
        }
        let decimals = end.saturating_sub(whole_end + 1);
        let mut value = digits_value(&self.text[first..end]);
        let mut exponent = -(decimals as i128);
        if let Some(b'e' | b'E') = self.byte(end) {
            let digits = match self.byte(end + 1) {
                Some(b'+' | b'-') => end + 2,
                _ => end + 1,
            };
            let exponent_end = self.digits(digits);
            // A letter after the digits makes it a word such as `3e5x`, not an exponent.
            if exponent_end > digits && !self.byte(exponent_end).is_some_and(|byte| byte.is_ascii_alphabetic()) {
                let size = digits_value(&self.text[digits..exponent_end]);
                let negative = self.byte(end + 1) == Some(b'-');
                match size {
                    Some(size) if size <= 1_000_000 => exponent += if negative { -size } else { size },
                    _ => value = None,
                }
                end = exponent_end;
            }
        }
        let value = value.and_then(|value| {
            let value = Rational::new(value, 1)?;
            if value == Rational::from(0) { Some(value) } else { value.times(Rational::from(10).power(exponent)?) }
        });
        (end, value)
    }
}

/// The unsigned decimal number at the start of `text`: its length and its value (`None` if it does not fit).
pub(super) fn leading_decimal(text: &str) -> Option<(usize, Option<Rational>)> {
    let numbers = Numbers::new(text, true, false);
    numbers.starts_at(0).then(|| numbers.decimal(0))
}

impl Iterator for Numbers<'_> {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        while self.at < self.text.len() {
            if self.starts_at(self.at) {
                let found = self.number(self.at);
                self.at = found.end;
                return Some(found);
            }
            self.at += 1;
        }
        None
    }
}

/// The value of the digits of `text`, skipping commas and the point; `None` if it does not fit.
fn digits_value(text: &str) -> Option<i128> {
    text.bytes()
        .filter(u8::is_ascii_digit)
        .try_fold(0i128, |value, digit| value.checked_mul(10)?.checked_add(i128::from(digit - b'0')))
}
