//! Learning-rate schedules.
//!
//! Updates are counted from 0. Warm-up rises linearly and reaches the peak on its last update, so that no update is spent
//! at a learning rate of zero (deviation from the Hugging Face schedules, whose first warm-up update changes nothing).
//! What follows warm-up decays from the peak to `min_lr_rate` times the peak:
//!
//! ```text
//! p = (update - warmup) / (total - warmup)                   share of the decay done
//! constant: 1        linear: 1 - p        cosine: (1 + cos(pi p)) / 2
//! ```

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The shape of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// Stays at the peak.
    #[serde(alias = "constant_with_warmup")]
    Constant,
    /// Falls in a straight line.
    #[default]
    Linear,
    /// Falls along half a cosine.
    Cosine,
}

/// The learning rate of every update of a stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The shape after warm-up.
    pub shape: SchedulerType,
    /// The highest learning rate.
    pub peak: f64,
    /// The share of the peak that decay ends at.
    pub floor: f64,
    /// Updates of warm-up.
    pub warmup: u64,
    /// Updates of the whole stage, warm-up included.
    pub total: u64,
}

impl Schedule {
    /// The learning rate of the update with this number, counted from 0.
    pub fn learning_rate(&self, update: u64) -> f64 {
        if update < self.warmup {
            return self.peak * (update + 1) as f64 / self.warmup as f64;
        }
        let decay = self.total.saturating_sub(self.warmup).max(1);
        let done = ((update - self.warmup) as f64 / decay as f64).min(1.0);
        let share = match self.shape {
            SchedulerType::Constant => return self.peak,
            SchedulerType::Linear => 1.0 - done,
            SchedulerType::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        };
        self.peak * (self.floor + (1.0 - self.floor) * share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: SchedulerType, floor: f64) -> Schedule {
        Schedule { shape, peak: 2.0, floor, warmup: 4, total: 12 }
    }

    #[test]
    fn warm_up_is_a_line_that_ends_at_the_peak() {
        for shape in [SchedulerType::Constant, SchedulerType::Linear, SchedulerType::Cosine] {
            let rates: Vec<f64> = (0..5).map(|update| schedule(shape, 0.0).learning_rate(update)).collect();
            assert_eq!(rates, [0.5, 1.0, 1.5, 2.0, 2.0]);
        }
    }

    #[test]
    fn decay_follows_its_closed_form() {
        let linear = schedule(SchedulerType::Linear, 0.0);
        let cosine = schedule(SchedulerType::Cosine, 0.0);
        for update in 4..12 {
            let left = (12 - update) as f64 / 8.0;
            assert_eq!(linear.learning_rate(update), 2.0 * left);
            let half_angle = (std::f64::consts::FRAC_PI_2 * (1.0 - left)).cos();
            assert!((cosine.learning_rate(update) - 2.0 * half_angle * half_angle).abs() < 1e-12, "update {update}");
            assert_eq!(schedule(SchedulerType::Constant, 0.0).learning_rate(update), 2.0);
        }
        assert_eq!(linear.learning_rate(12), 0.0);
        assert_eq!(linear.learning_rate(100), 0.0, "beyond the end stays at the floor");
        assert_eq!(schedule(SchedulerType::Linear, 0.25).learning_rate(12), 0.5);
        assert_eq!(schedule(SchedulerType::Linear, 0.25).learning_rate(8), 2.0 * 0.625);
    }

    #[test]
    fn a_stage_of_warm_up_alone_divides_by_nothing() {
        let schedule = Schedule { shape: SchedulerType::Linear, peak: 1.0, floor: 0.0, warmup: 3, total: 3 };
        assert_eq!(schedule.learning_rate(2), 1.0);
        assert_eq!(schedule.learning_rate(3), 1.0);
    }
}
