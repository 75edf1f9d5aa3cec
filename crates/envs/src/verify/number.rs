//! The number in an answer, compared exactly.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Budget, Place, Rational};
use crate::reward::{Reward, RewardError, against_gold};
use crate::score::{Answer, Score, Status};

/// Options of the `number` reward: 1 when the last number of the answer equals the expected one.
///
/// Numbers are compared as exact fractions: `0.5`, `1/2`, `\frac{1}{2}` and `50e-2` are equal, `0.333` and `1/3` are not,
/// unless a tolerance says so. An answer without a number, or with one of more than about 38 digits, is malformed. So is a
/// box that holds a second number, or a LaTeX command other than a fraction, a unit (`\text{}`, `\mathrm{}`, `\circ`) or a space.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NumberOptions {
    /// Column with the expected number.
    pub column: String,
    /// Where the answer stands: `text`, `tag` or `boxed`.
    pub place: Place,
    /// Name of the tag, for `place = "tag"`.
    pub tag: String,
    /// Whether commas may group digits by three: `1,234` is 1234, and so are LaTeX's `1{,}234` and `1,\!234`. Otherwise a comma
    /// ends the number.
    pub thousands: bool,
    /// Whether `25%` and `25\%` mean 1/4, in the column too. Otherwise the sign is ignored like any other text in an answer.
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
        let numbers = || Numbers::new(text, options.thousands, options.percent);
        let Some(number) = numbers().last() else { return Status::Malformed };
        let (before, after) = (&text[..number.start], &text[number.end..]);
        if options.place == Place::Boxed && !(numbers().count() == 1 && is_neutral(before) && is_neutral(after)) {
            return Status::Malformed;
        }
        if options.only && !self.is_padding(before, after) {
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
        let plain = |text: &str| {
            // LaTeX writes the units `$` and `%` as `\$` and `\%`.
            let escaped = text.strip_prefix('\\').filter(|text| matches!(*text, "$" | "%"));
            text.is_empty() || self.options.units.iter().any(|unit| unit == escaped.unwrap_or(text))
        };
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
        let gold = |text: &str| exactly(text, self.options.percent);
        against_gold(&self.name, &self.options.column, "a number", answers, gold, verify)
    }
}

/// LaTeX commands beside a number that leave it what it is: signs, spaces and units.
const NEUTRAL: [&str; 9] = [r"\$", r"\%", r"\ ", r"\,", r"\;", r"\!", r"\text{", r"\mathrm{", r"\circ"];

/// Whether every LaTeX command of a text beside a number leaves the number what it is.
fn is_neutral(text: &str) -> bool {
    text.match_indices('\\').all(|(at, _)| NEUTRAL.iter().any(|command| text[at..].starts_with(command)))
}

/// Reads a text that is exactly one number: `-1,234.5`, `3/4`, `2e6`. `None` for anything else, or if it does not fit.
pub fn parse(text: &str) -> Option<Rational> {
    exactly(text, false)
}

/// [`parse`], for which `25%` is 1/4 if `percent`.
fn exactly(text: &str, percent: bool) -> Option<Rational> {
    let text = text.trim();
    let number = Numbers::new(text, true, percent).next()?;
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
/// optional tight denominator (`3/4`); or an optional sign and `\frac{a}{b}` of two such numbers. A sign belongs to the number
/// unless a letter, digit or closing parenthesis stands before it: `12-5` holds 12 and 5. A minus apart from it, by spaces or a
/// currency sign, does where nothing stands before it that it could be subtracted from, and where it is no dash or mark of a
/// list: in `x = - 5` and `is -$5`, not in `3 - 5` or `- 5` on a line of its own below others. The work is linear in the text.
pub struct Numbers<'a> {
    text: &'a str,
    at: usize,
    /// The first byte that is no white space.
    begin: usize,
    thousands: bool,
    percent: bool,
}

impl<'a> Numbers<'a> {
    /// The numbers of `text`; for the two options see [`NumberOptions`].
    pub fn new(text: &'a str, thousands: bool, percent: bool) -> Self {
        Self { text, at: 0, begin: text.len() - text.trim_start().len(), thousands, percent }
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

    /// The place after the spaces at `at`.
    fn after_spaces(&self, at: usize) -> usize {
        self.text.len() - self.text[at..].trim_start_matches(' ').len()
    }

    /// The end of a whole part at `at`, which is a digit: plain digits or groups of three after one to three digits.
    fn whole_part(&self, at: usize) -> usize {
        let mut end = self.digits(at);
        if !self.thousands || end - at > 3 {
            return end;
        }
        // The longest first.
        while let Some(comma) = ["{,}", r",\!", ","].iter().find(|comma| self.text[end..].starts_with(**comma)) {
            let group = end + comma.len();
            if self.digits(group) != group + 3 {
                break;
            }
            end = group + 3;
        }
        end
    }

    /// The sign before `start`: its first byte and whether it is a minus.
    fn sign(&self, start: usize) -> (usize, bool) {
        let before = &self.text[..start];
        let (sign, negative) = match before.chars().next_back() {
            Some(sign @ ('-' | '\u{2212}')) => (sign, true),
            Some(sign @ '+') => (sign, false),
            _ => return self.minus_apart(start).map_or((start, false), |at| (at, true)),
        };
        let at = start - sign.len_utf8();
        match self.text[..at].chars().next_back() {
            Some(c) if c.is_alphanumeric() || c == ')' => (start, false),
            _ => (at, negative),
        }
    }

    /// The minus of the number at `start` that spaces or a currency sign keep apart from it: its first byte.
    fn minus_apart(&self, start: usize) -> Option<usize> {
        const BLANKS: [char; 2] = [' ', '\t'];
        let near = self.text[..start].trim_end_matches(BLANKS);
        let far = match near.strip_suffix(['$', '€', '£', '¥']) {
            Some(rest) => rest.strip_suffix('\\').unwrap_or(rest),
            None => near,
        };
        let before = far.trim_end_matches(BLANKS).strip_suffix(MINUS)?;
        let touches = near.len() == start && far.ends_with(MINUS);
        let left = before.trim_end_matches(BLANKS);
        let subtracts = ends_with_operand(left);
        let belongs = if touches {
            // `is -$5`: from a word at a distance nothing is subtracted.
            !subtracts || (left.len() < before.len() && left.ends_with(char::is_alphabetic))
        } else {
            before.len() == self.begin
                || left.ends_with(['=', '≈', ':', '(', '[', '{'])
                || (left.ends_with('$') && !subtracts)
        };
        belongs.then_some(before.len())
    }

    /// The number whose first digit, decimal point or backslash is at `first`.
    fn number(&self, first: usize) -> Option<Found> {
        let unsigned = if self.starts_at(first) { self.quotient(first) } else { self.fraction(first)? };
        let (end, value) = self.percentage(unsigned);
        let (start, negative) = self.sign(first);
        Some(Found { start, end, value: if negative { value.map(Rational::negate) } else { value } })
    }

    /// The end and the value of the decimal number at `first`, with a tight denominator.
    fn quotient(&self, first: usize) -> (usize, Option<Rational>) {
        let (mut end, mut value) = self.decimal(first);
        if self.byte(end) == Some(b'/') && self.is_digit(end + 1) {
            let denominator_end = self.whole_part(end + 1);
            let denominator = digits_value(&self.text[end + 1..denominator_end]);
            value = value.and_then(|value| value.over(Rational::new(denominator?, 1)?));
            end = denominator_end;
        }
        (end, value)
    }

    /// A number with the percent sign after it, if there is one and it counts.
    fn percentage(&self, (end, value): (usize, Option<Rational>)) -> (usize, Option<Rational>) {
        let sign = self.after_spaces(end);
        let length = ["%", r"\%"].iter().find(|text| self.text[sign..].starts_with(**text)).map(|text| text.len());
        match length.filter(|_| self.percent) {
            Some(length) => (sign + length, value.and_then(|value| value.over(Rational::from(100)))),
            None => (end, value),
        }
    }

    /// The end and the value of LaTeX's fraction of two numbers at `at`, if one is there.
    fn fraction(&self, at: usize) -> Option<(usize, Option<Rational>)> {
        if self.byte(at) != Some(b'\\') {
            return None;
        }
        let name = [r"\frac", r"\dfrac", r"\tfrac"].iter().find(|name| self.text[at..].starts_with(**name))?;
        let (middle, numerator) = self.braced(at + name.len())?;
        let (end, denominator) = self.braced(middle)?;
        Some((end, numerator.zip(denominator).and_then(|(numerator, denominator)| numerator.over(denominator))))
    }

    /// The end and the value of braces at `at` that hold a number and nothing else.
    fn braced(&self, at: usize) -> Option<(usize, Option<Rational>)> {
        let inside = self.text[self.after_spaces(at)..].strip_prefix('{')?.trim_start_matches(' ');
        let unsigned = inside.strip_prefix(MINUS).or(inside.strip_prefix('+')).unwrap_or(inside);
        let first = self.after_spaces(self.text.len() - unsigned.len());
        if !self.starts_at(first) {
            return None;
        }
        let (end, value) = self.percentage(self.quotient(first));
        let close = self.after_spaces(end);
        let value = if inside.starts_with(MINUS) { value.map(Rational::negate) } else { value };
        (self.byte(close) == Some(b'}')).then_some((close + 1, value))
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
            if let Some(found) = self.number(self.at) {
                self.at = found.end;
                return Some(found);
            }
            self.at += 1;
        }
        None
    }
}

/// The signs that are a minus.
const MINUS: [char; 2] = ['-', '\u{2212}'];

/// Whether a text ends with something that a minus after it would subtract from: a letter, a digit, a closing bracket, a percent
/// sign, or one of these and the dollar sign that ends a formula.
fn ends_with_operand(text: &str) -> bool {
    let operand = |c: char| c.is_alphanumeric() || matches!(c, ')' | ']' | '}' | '%');
    text.strip_suffix('$').unwrap_or(text).ends_with(operand)
}

/// The value of the digits of `text`, skipping what groups them and the point; `None` if it does not fit.
fn digits_value(text: &str) -> Option<i128> {
    text.bytes()
        .filter(u8::is_ascii_digit)
        .try_fold(0i128, |value, digit| value.checked_mul(10)?.checked_add(i128::from(digit - b'0')))
}
