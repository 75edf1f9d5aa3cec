//! What a user can set about the referee.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::options::{OptionError, check};

/// What happens when the referee raises an alarm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Nobody watches.
    Off,
    /// The alarm is written down, and the run goes on.
    #[default]
    Warn,
    /// The run saves everything and ends with exit code 3; `posttrain resume` goes on past the alarm.
    Stop,
    /// The run goes back to the newest checkpoint from before the evidence began (or else the oldest there is) and on from
    /// there with a smaller learning rate. Where there is none, and after `max_rollbacks`, it stops.
    Rollback,
}

/// Options of the referee, who watches stages that learn from rewards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RefereeOptions {
    /// What happens at an alarm: `off`, `warn`, `stop` or `rollback`.
    pub action: Action,
    /// Largest probability that a stage in which nothing goes wrong gets any alarm at all, however long it is. Every watch
    /// gets an equal part of it.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub false_alarm_rate: f64,
    /// The metric of a judge who is not paid for, with values from 0 to 1: `rewards/NAME/mean` of a reward with `weight = 0`,
    /// or `eval_accuracy`. Without it nobody can tell a rising reward from a hacked one; the share of `ok` verdicts then
    /// stands in where the others ask whether answers have become better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verifier: Option<String>,
    /// Steps at the beginning of a stage that say what is normal in it; also the steps over which a number is averaged.
    #[schemars(range(min = 2))]
    pub window: usize,
    /// How far the verifier may fall below an earlier window, and how far it must rise to have become better.
    #[schemars(range(min = 0, max = 1))]
    pub tolerance: f64,
    /// Least share of its first entropy that the policy keeps.
    #[schemars(range(min = 0, max = 1))]
    pub entropy_floor: f64,
    /// Largest share of groups whose rewards are all equal, which teach nothing.
    #[schemars(range(min = 0, max = 1))]
    pub zero_variance_ceiling: f64,
    /// Factor by which answers may grow while they do not become better.
    #[schemars(range(min = 1))]
    pub length_growth: f64,
    /// Largest correlation of length and reward within groups while answers do not become better.
    #[schemars(range(min = 0, max = 1))]
    pub length_correlation: f64,
    /// Largest divergence from the reference model, in nats a token.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub kl_limit: f64,
    /// Largest mean distance between the log-probabilities of sampler and trainer.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub mismatch_limit: f64,
    /// How far the reward may rise while the verifier does not, in standard deviations within a group.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub reward_rise: f64,
    /// Factor of the learning rate after each rollback.
    #[schemars(range(min = 0, max = 1))]
    pub learning_rate_factor: f64,
    /// Rollbacks after which an alarm stops the run.
    pub max_rollbacks: u32,
}

impl Default for RefereeOptions {
    fn default() -> Self {
        Self {
            action: Action::Warn,
            false_alarm_rate: 0.01,
            verifier: None,
            window: 10,
            tolerance: 0.1,
            entropy_floor: 0.05,
            zero_variance_ceiling: 0.9,
            length_growth: 2.0,
            length_correlation: 0.6,
            kl_limit: 0.5,
            mismatch_limit: 0.1,
            reward_rise: 1.0,
            learning_rate_factor: 0.5,
            max_rollbacks: 2,
        }
    }
}

impl RefereeOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        let share = |key, value: f64| check(key, value, (0.0..=1.0).contains(&value), "a number between 0 and 1");
        let positive = |key, value: f64| check(key, value, value.is_finite() && value > 0.0, "a number above 0");
        let rate = self.false_alarm_rate;
        check("false_alarm_rate", rate, rate > 0.0 && rate < 1.0, "a number above 0 and below 1")?;
        check("window", self.window, self.window >= 2, "at least 2")?;
        share("tolerance", self.tolerance)?;
        share("entropy_floor", self.entropy_floor)?;
        share("zero_variance_ceiling", self.zero_variance_ceiling)?;
        let growth = self.length_growth;
        check("length_growth", growth, growth.is_finite() && growth >= 1.0, "a number of at least 1")?;
        share("length_correlation", self.length_correlation)?;
        positive("kl_limit", self.kl_limit)?;
        positive("mismatch_limit", self.mismatch_limit)?;
        positive("reward_rise", self.reward_rise)?;
        share("learning_rate_factor", self.learning_rate_factor)
    }
}
