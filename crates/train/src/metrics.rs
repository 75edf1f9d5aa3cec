//! Named numbers in the order they were first recorded.
//!
//! Everything in a [`Metrics`] is a function of the configuration, the seed and the data: wall-clock values are kept apart
//! (see [`crate::timing`]), so that the files that hold metrics can be compared byte for byte.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Named numbers; a name that is set again keeps its place.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Metrics(Map<String, Value>);

impl Metrics {
    /// No metrics yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets one number. A value that is not finite is kept as JSON `null`: it means "nothing to measure".
    pub fn set(&mut self, name: impl Into<String>, value: f64) {
        // Whole numbers are written as such: `"step":3` rather than `"step":3.0`.
        let whole = value.fract() == 0.0 && value.abs() < 9e15;
        self.0.insert(name.into(), if whole { (value as i64).into() } else { value.into() });
    }

    /// The number with this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).and_then(Value::as_f64)
    }

    /// All names and numbers, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?)))
    }

    /// Adds everything of `other`.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// One line of JSON, with the line's end.
    pub fn to_line(&self) -> String {
        format!("{}\n", Value::Object(self.0.clone()))
    }
}

/// Mean, folded in f64 in order; NaN of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard deviation with divisor `n - 1`, as TRL reports it; 0 of a single value, NaN of nothing.
pub fn standard_deviation(values: &[f64]) -> f64 {
    let center = mean(values);
    match values.len() {
        0 => f64::NAN,
        1 => 0.0,
        n => (values.iter().map(|x| (x - center).powi(2)).sum::<f64>() / (n - 1) as f64).sqrt(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_keeps_order_and_tells_whole_numbers_apart() {
        let mut metrics = Metrics::new();
        metrics.set("step", 3.0);
        metrics.set("loss", 0.5);
        metrics.set("kl", f64::NAN);
        metrics.set("step", 4.0);
        assert_eq!(metrics.to_line(), "{\"step\":4,\"loss\":0.5,\"kl\":null}\n");
        assert_eq!(metrics.get("kl"), None);
        assert_eq!(metrics.iter().collect::<Vec<_>>(), [("step", 4.0), ("loss", 0.5)]);
    }

    #[test]
    fn deviation_has_the_divisor_of_a_sample() {
        assert_eq!(standard_deviation(&[1.0, 3.0]), 2f64.sqrt());
        assert_eq!(standard_deviation(&[5.0]), 0.0);
        assert!(mean(&[]).is_nan());
    }
}
