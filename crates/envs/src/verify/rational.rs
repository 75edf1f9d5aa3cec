//! Exact fractions.

use std::fmt;

/// A fraction of two 128-bit integers in lowest terms with a positive denominator, so that equal values are equal
/// structures. Every operation is exact or `None` (overflow, division by zero): there is no rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rational {
    numerator: i128,
    denominator: i128,
}

impl Rational {
    /// `numerator / denominator`; `None` if the denominator is 0 or the reduced fraction does not fit.
    pub fn new(numerator: i128, denominator: i128) -> Option<Self> {
        if denominator == 0 {
            return None;
        }
        let divisor = greatest_common_divisor(numerator.unsigned_abs(), denominator.unsigned_abs());
        let size = i128::try_from(numerator.unsigned_abs() / divisor).ok()?;
        let reduced = i128::try_from(denominator.unsigned_abs() / divisor).ok()?;
        let negative = (numerator < 0) != (denominator < 0);
        Some(Self { numerator: if negative { -size } else { size }, denominator: reduced })
    }

    /// The numerator, in lowest terms, with the sign.
    pub fn numerator(self) -> i128 {
        self.numerator
    }

    /// The denominator, in lowest terms, positive.
    pub fn denominator(self) -> i128 {
        self.denominator
    }

    /// `self + other`.
    pub fn plus(self, other: Self) -> Option<Self> {
        let left = self.numerator.checked_mul(other.denominator)?;
        let right = other.numerator.checked_mul(self.denominator)?;
        Self::new(left.checked_add(right)?, self.denominator.checked_mul(other.denominator)?)
    }

    /// `self - other`.
    pub fn minus(self, other: Self) -> Option<Self> {
        self.plus(other.negate())
    }

    /// `self · other`.
    pub fn times(self, other: Self) -> Option<Self> {
        // Reducing crosswise first keeps the products as small as the result.
        let a = Self::new(self.numerator, other.denominator)?;
        let b = Self::new(other.numerator, self.denominator)?;
        Self::new(a.numerator.checked_mul(b.numerator)?, a.denominator.checked_mul(b.denominator)?)
    }

    /// `self / other`.
    pub fn over(self, other: Self) -> Option<Self> {
        self.times(Self::new(other.denominator, other.numerator)?)
    }

    /// `-self`.
    pub fn negate(self) -> Self {
        // The numerator's size fits i128 (see `new`), so its negation does.
        Self { numerator: -self.numerator, ..self }
    }

    /// `self` to an integer power, by repeated squaring: at most 128 multiplications whatever the exponent.
    pub fn power(self, exponent: i128) -> Option<Self> {
        let mut base = if exponent < 0 { Self::from(1).over(self)? } else { self };
        let mut left = exponent.unsigned_abs();
        let mut result = Self::from(1);
        while left > 0 {
            if left & 1 == 1 {
                result = result.times(base)?;
            }
            left >>= 1;
            if left > 0 {
                base = base.times(base)?;
            }
        }
        Some(result)
    }

    /// The nearest floating-point value, up to rounding of numerator and denominator.
    pub fn to_f64(self) -> f64 {
        self.numerator as f64 / self.denominator as f64
    }
}

impl From<i64> for Rational {
    fn from(value: i64) -> Self {
        Self { numerator: value.into(), denominator: 1 }
    }
}

impl fmt::Display for Rational {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.denominator {
            1 => write!(f, "{}", self.numerator),
            denominator => write!(f, "{}/{denominator}", self.numerator),
        }
    }
}

fn greatest_common_divisor(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ratio(numerator: i128, denominator: i128) -> Rational {
        Rational::new(numerator, denominator).expect("a small fraction")
    }

    #[test]
    fn equal_values_are_equal_structures() {
        assert_eq!(ratio(-6, -4), ratio(3, 2));
        assert_eq!(ratio(6, -4), ratio(-3, 2));
        assert_eq!(ratio(0, -7), Rational::from(0));
        assert_eq!(ratio(1, 3).plus(ratio(1, 6)), Some(ratio(1, 2)));
        assert_eq!(ratio(1, 3).minus(ratio(1, 2)), Some(ratio(-1, 6)));
        assert_eq!(ratio(2, 3).times(ratio(9, 4)), Some(ratio(3, 2)));
        assert_eq!(ratio(2, 3).over(ratio(-4, 3)), Some(ratio(-1, 2)));
        assert_eq!(ratio(2, 3).power(-3), Some(ratio(27, 8)));
        assert_eq!(ratio(-1, 1).power(i128::MAX), Some(ratio(-1, 1)));
        assert_eq!(ratio(0, 1).power(0), Some(ratio(1, 1)));
    }

    #[test]
    fn what_does_not_fit_is_none() {
        let largest = ratio(i128::MAX, 1);
        assert_eq!(largest.plus(Rational::from(1)), None);
        assert_eq!(largest.times(Rational::from(2)), None);
        assert_eq!(Rational::from(9).power(387_420_489), None);
        assert_eq!(Rational::from(1).over(Rational::from(0)), None);
        assert_eq!(Rational::from(0).power(-1), None);
        assert_eq!(Rational::new(i128::MIN, 1), None);
        assert_eq!(Rational::new(1, i128::MIN), None);
        assert_eq!(Rational::new(i128::MIN, 2), Some(ratio(i128::MIN / 2, 1)));
        assert_eq!(Rational::new(i128::MIN, i128::MIN), Some(Rational::from(1)));
    }
}
