//! The choice of a setting within a trial: every method tries as many, and keeps the best by prompts that are there for nothing else.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::measurements::Measurements;

/// Settings that are tried one after the other: one positive number or more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Vec<f64>", into = "Vec<f64>")]
pub struct Grid {
    first: f64,
    others: Vec<f64>,
}

impl TryFrom<Vec<f64>> for Grid {
    type Error = String;

    fn try_from(settings: Vec<f64>) -> Result<Self, String> {
        match settings.split_first() {
            Some((&first, others)) if settings.iter().all(|setting| setting.is_finite() && *setting > 0.0) => {
                Ok(Self { first, others: others.to_vec() })
            }
            _ => Err(format!("a grid is one number above 0 or more, got {settings:?}")),
        }
    }
}

impl From<Grid> for Vec<f64> {
    fn from(grid: Grid) -> Self {
        std::iter::once(grid.first).chain(grid.others).collect()
    }
}

impl Grid {
    /// What `attempt` makes of the setting with the highest score, and that setting; the first of equals. Notes the scores as the curve `tuning`
    /// and the setting as `chosen`.
    ///
    /// # Errors
    /// The first error of `attempt`.
    pub fn best<T>(
        &self,
        into: &mut Measurements,
        mut attempt: impl FnMut(f64) -> Result<(T, f64)>,
    ) -> Result<(T, f64)> {
        let mut chosen = self.first;
        let (mut best, mut highest) = attempt(self.first)?;
        into.point("tuning", self.first, highest);
        for &setting in &self.others {
            let (made, score) = attempt(setting)?;
            into.point("tuning", setting, score);
            if score > highest {
                (best, highest, chosen) = (made, score, setting);
            }
        }
        into.set("chosen", chosen);
        Ok((best, chosen))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_best_is_kept_and_everything_is_noted() {
        let grid = Grid::try_from(vec![0.5, 1.0, 2.0, 4.0]).unwrap();
        let mut noted = Measurements::default();
        let score = |setting: f64| if setting < 4.0 { setting.min(1.0) } else { 0.0 };
        let best = grid.best(&mut noted, |setting| Ok((format!("of {setting}"), score(setting)))).unwrap();
        assert_eq!((best, noted.values["chosen"]), (("of 1".to_owned(), 1.0), 1.0));
        assert_eq!(noted.curves["tuning"], [(0.5, 0.5), (1.0, 1.0), (2.0, 1.0), (4.0, 0.0)]);
    }

    #[test]
    fn grids_of_nothing_and_of_no_numbers_are_refused() {
        for wrong in ["[]", "[1.0, -2.0]", "[0.0]", "[1e999]"] {
            assert!(serde_json::from_str::<Grid>(wrong).is_err(), "{wrong}");
        }
        let read: Grid = serde_json::from_str("[0.5, 2.0]").unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), "[0.5,2.0]");
    }
}
