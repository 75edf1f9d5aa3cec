//! What was measured of one arm with one seed, and of all arms with one seed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Numbers and curves by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measurements {
    /// Numbers.
    pub values: BTreeMap<String, f64>,
    /// Curves: points in the order they were measured.
    pub curves: BTreeMap<String, Vec<(f64, f64)>>,
}

impl Measurements {
    /// Notes a number.
    pub fn set(&mut self, name: impl Into<String>, value: f64) {
        self.values.insert(name.into(), value);
    }

    /// Notes a number that may not exist: a correlation of what does not vary, say.
    pub fn set_known(&mut self, name: impl Into<String>, value: Option<f64>) {
        if let Some(value) = value {
            self.set(name, value);
        }
    }

    /// Adds a point to a curve.
    pub fn point(&mut self, curve: &str, x: f64, y: f64) {
        self.curves.entry(curve.to_owned()).or_default().push((x, y));
    }

    /// The height of a curve at `x`, where that was measured.
    pub fn at(&self, curve: &str, x: f64) -> Option<f64> {
        self.curves.get(curve)?.iter().find(|point| point.0 == x).map(|point| point.1)
    }

    /// The largest height of a curve.
    pub fn peak(&self, curve: &str) -> Option<f64> {
        self.curves.get(curve)?.iter().map(|point| point.1).reduce(f64::max)
    }

    /// The first number that is not finite, by name.
    pub fn non_finite(&self) -> Option<(String, f64)> {
        let values = self.values.iter().map(|(name, value)| (name, *value));
        let heights = self.curves.iter().flat_map(|(name, points)| points.iter().map(move |point| (name, point.1)));
        values.chain(heights).find(|(_, value)| !value.is_finite()).map(|(name, value)| (name.clone(), value))
    }
}

/// All arms that were run with one seed.
pub struct Seed<'a> {
    /// The seed.
    pub seed: u64,
    /// The measurements by arm.
    pub arms: BTreeMap<&'a str, &'a Measurements>,
}

impl Seed<'_> {
    /// A number of an arm.
    pub fn value(&self, arm: &str, name: &str) -> Option<f64> {
        self.arms.get(arm)?.values.get(name).copied()
    }

    /// The measurements of an arm.
    pub fn arm(&self, arm: &str) -> Option<&Measurements> {
        self.arms.get(arm).copied()
    }

    /// Of these arms, the one with the largest `criterion`; the first of equals.
    pub fn best<'n>(&self, arms: &[&'n str], criterion: &str) -> Option<&'n str> {
        let valued = arms.iter().filter_map(|arm| Some((*arm, self.value(arm, criterion)?)));
        valued.reduce(|best, other| if other.1 > best.1 { other } else { best }).map(|(arm, _)| arm)
    }
}
