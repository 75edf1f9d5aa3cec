//! What a user can set about training. The doc comment of a field is its only documentation: help, the schema and the
//! reference pages are made from it. Names are those of TRL and the Hugging Face trainer where the meaning is the same.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::schedule::{Schedule, SchedulerType};

/// An option whose value cannot be used.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("{key}: {reason}")]
pub struct OptionError {
    /// The option, with the tables above it: `training.learning_rate`.
    pub key: String,
    /// What was expected and what was found.
    pub reason: String,
}

impl base::Hint for OptionError {
    fn hint(&self) -> Option<String> {
        Some("`posttrain config explain` lists every option with its meaning and default".into())
    }
}

impl OptionError {
    pub(crate) fn new(key: &str, reason: impl Into<String>) -> Self {
        Self { key: key.into(), reason: reason.into() }
    }

    /// The same error seen from a table above.
    pub fn within(mut self, table: &str) -> Self {
        self.key = format!("{table}.{}", self.key);
        self
    }
}

/// Passes when `value` satisfies `accepted`; otherwise an error that says what was expected.
pub(crate) fn check<T: std::fmt::Display>(
    key: &str,
    value: T,
    accepted: bool,
    expected: &str,
) -> Result<(), OptionError> {
    if accepted { Ok(()) } else { Err(OptionError::new(key, format!("expected {expected}, got {value}"))) }
}

/// When a run saves, evaluates and writes down what it sampled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunOptions {
    /// Write a checkpoint every this many steps, and after the last step. 0 writes none: a killed run starts again.
    pub save_steps: u64,
    /// Keep this many checkpoints and remove older ones. 0 keeps all.
    pub save_total_limit: usize,
    /// Evaluate every this many steps. 0 evaluates only before the first and after the last step.
    pub eval_steps: u64,
    /// Evaluate before the first step.
    pub eval_on_start: bool,
    /// Write the sampled episodes of every this many steps to `episodes/`. 0 writes none.
    pub episode_steps: u64,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self { save_steps: 20, save_total_limit: 2, eval_steps: 0, eval_on_start: true, episode_steps: 1 }
    }
}

/// How long a stage lasts, how it is cut to fit in memory, and how AdamW moves the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingOptions {
    /// Steps of the stage. When absent, `num_train_epochs` decides.
    #[schemars(range(min = 1, max = 4_294_967_295u32))]
    pub max_steps: Option<u64>,
    /// Passes over the data, used when `max_steps` is absent. May be a fraction.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub num_train_epochs: f64,
    /// Tokens computed at once. Smaller needs less memory; results do not depend on it. A batch is cut between examples,
    /// or between groups of completions of one prompt, so a single large one may exceed it.
    #[schemars(range(min = 1))]
    pub micro_batch_tokens: usize,
    /// Activation checkpointing: keep only each layer's input and compute the rest again in backward. Takes a fraction of the
    /// memory for activations and about a third more time; results are the same to the last bit. `"auto"` switches it on
    /// where the run is estimated to need more memory than the machine has available.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Peak learning rate. 0 trains nothing, which is useful to check that nothing drifts.
    #[schemars(range(min = 0))]
    pub learning_rate: f64,
    /// Shape of the learning rate after warm-up: `constant`, `linear` or `cosine`.
    pub lr_scheduler_type: SchedulerType,
    /// Share of the peak learning rate at which `linear` and `cosine` end.
    #[schemars(range(min = 0, max = 1))]
    pub min_lr_rate: f64,
    /// Steps over which the learning rate rises to its peak. Cannot be combined with `warmup_ratio`.
    pub warmup_steps: u64,
    /// Warm-up as a share of all steps of the stage, rounded up. Cannot be combined with `warmup_steps`.
    #[schemars(range(min = 0, max = 1))]
    pub warmup_ratio: f64,
    /// Decoupled weight decay, applied to matrices only: norms and biases are left alone.
    #[schemars(range(min = 0))]
    pub weight_decay: f64,
    /// Decay of AdamW's mean of the gradient.
    #[schemars(range(min = 0, max = 1))]
    pub adam_beta1: f64,
    /// Decay of AdamW's mean of the squared gradient.
    #[schemars(range(min = 0, max = 1))]
    pub adam_beta2: f64,
    /// Added to AdamW's denominator.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub adam_epsilon: f64,
    /// How AdamW's two means are stored: `f32`, or `bf16` in half the memory. Bfloat16 is rounded up or down at random, with
    /// the true mean as its expected value, since rounded to the nearest it would stop following the gradient.
    pub optimizer_state: OptimizerState,
    /// Gradients whose norm over all parameters is larger are scaled down to this norm. 0 switches clipping off.
    #[schemars(range(min = 0))]
    pub max_grad_norm: f64,
}

impl Default for TrainingOptions {
    fn default() -> Self {
        Self {
            max_steps: None,
            num_train_epochs: 1.0,
            micro_batch_tokens: 2048,
            gradient_checkpointing: GradientCheckpointing::Auto,
            learning_rate: 1e-5,
            lr_scheduler_type: SchedulerType::default(),
            min_lr_rate: 0.0,
            warmup_steps: 0,
            warmup_ratio: 0.0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            optimizer_state: OptimizerState::F32,
            max_grad_norm: 1.0,
        }
    }
}

/// When the activations of a forward are computed again instead of kept. Written `"auto"`, `true` or `false`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub enum GradientCheckpointing {
    /// As memory demands. Whoever starts a run and knows the machine decides, and sets one of the others; a run that finds
    /// this left keeps its activations.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// How [`GradientCheckpointing`] stands in a file.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Always(bool),
    Word(Word),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Word {
    Auto,
}

impl From<Written> for GradientCheckpointing {
    fn from(written: Written) -> Self {
        match written {
            Written::Word(Word::Auto) => Self::Auto,
            Written::Always(true) => Self::On,
            Written::Always(false) => Self::Off,
        }
    }
}

impl From<GradientCheckpointing> for Written {
    fn from(choice: GradientCheckpointing) -> Self {
        match choice {
            GradientCheckpointing::Auto => Self::Word(Word::Auto),
            GradientCheckpointing::On => Self::Always(true),
            GradientCheckpointing::Off => Self::Always(false),
        }
    }
}

impl JsonSchema for GradientCheckpointing {
    fn schema_name() -> Cow<'static, str> {
        "GradientCheckpointing".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "enum": ["auto", true, false] })
    }
}

/// How the moments of the optimiser are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerState {
    /// In single precision.
    #[default]
    F32,
    /// In bfloat16 with stochastic rounding.
    Bf16,
}

impl OptimizerState {
    /// Bytes for each trained parameter.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 8,
            Self::Bf16 => 4,
        }
    }
}

/// Steps that a stage may have: draws are named by the number of the step, in 32 bits.
const MAX_STEPS: u64 = u32::MAX as u64;

impl TrainingOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        let share = |x: f64| (0.0..=1.0).contains(&x);
        let decay = |x: f64| (0.0..1.0).contains(&x);
        let not_negative = |x: f64| x.is_finite() && x >= 0.0;
        if let Some(steps) = self.max_steps {
            check("max_steps", steps, (1..=MAX_STEPS).contains(&steps), "1 to 4294967295")?;
        }
        let epochs = self.num_train_epochs;
        check("num_train_epochs", epochs, epochs.is_finite() && epochs > 0.0, "a number above 0")?;
        check("micro_batch_tokens", self.micro_batch_tokens, self.micro_batch_tokens > 0, "at least 1")?;
        check("learning_rate", self.learning_rate, not_negative(self.learning_rate), "a number of at least 0")?;
        check("min_lr_rate", self.min_lr_rate, share(self.min_lr_rate), "a share between 0 and 1")?;
        check("warmup_ratio", self.warmup_ratio, share(self.warmup_ratio), "a share between 0 and 1")?;
        if self.warmup_steps > 0 && self.warmup_ratio > 0.0 {
            return Err(OptionError::new("warmup_ratio", "cannot be combined with warmup_steps; remove one of them"));
        }
        check("weight_decay", self.weight_decay, not_negative(self.weight_decay), "a number of at least 0")?;
        check("adam_beta1", self.adam_beta1, decay(self.adam_beta1), "a number in [0, 1)")?;
        check("adam_beta2", self.adam_beta2, decay(self.adam_beta2), "a number in [0, 1)")?;
        let positive = self.adam_epsilon.is_finite() && self.adam_epsilon > 0.0;
        check("adam_epsilon", self.adam_epsilon, positive, "a number above 0")?;
        check("max_grad_norm", self.max_grad_norm, not_negative(self.max_grad_norm), "a number of at least 0")
    }

    /// Refuses epochs of `rows` rows that are more steps than can be numbered when each takes `per_step`.
    ///
    /// # Errors
    /// The option, what it is, and what it may be.
    pub fn validate_steps(&self, rows: usize, per_step: usize) -> Result<(), OptionError> {
        let few = self.steps(rows, per_step) <= MAX_STEPS;
        let expected = format!("at most 4294967295 steps, which take {per_step} of {rows} rows each");
        check("num_train_epochs", format!("{} epochs", self.num_train_epochs), few, &expected)
    }

    /// Steps of the stage when each takes `per_step` of `rows` rows.
    pub fn steps(&self, rows: usize, per_step: usize) -> u64 {
        let by_epochs = || (self.num_train_epochs * rows as f64 / per_step as f64).ceil().max(1.0) as u64;
        self.max_steps.unwrap_or_else(by_epochs)
    }

    /// The learning rates of a stage of `steps` steps.
    pub fn schedule(&self, steps: u64) -> Schedule {
        let warmup = match self.warmup_steps {
            0 => (self.warmup_ratio * steps as f64).ceil() as u64,
            given => given,
        };
        Schedule {
            shape: self.lr_scheduler_type,
            peak: self.learning_rate,
            floor: self.min_lr_rate,
            warmup,
            total: steps,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_option_and_the_value() {
        let options = TrainingOptions { adam_beta2: 1.0, ..Default::default() };
        let error = options.validate().map_err(|error| error.within("training"));
        let expected = "training.adam_beta2: expected a number in [0, 1), got 1";
        assert_eq!(error.map_err(|error| error.to_string()), Err(expected.into()));
        let both = TrainingOptions { warmup_ratio: 0.1, warmup_steps: 3, ..Default::default() };
        assert!(both.validate().is_err());
        assert!(TrainingOptions { learning_rate: f64::NAN, ..Default::default() }.validate().is_err());
        assert_eq!(TrainingOptions::default().validate(), Ok(()));
    }

    #[test]
    fn unknown_options_are_refused() {
        let unknown = serde_json::from_str::<TrainingOptions>(r#"{"learning_rat": 1e-5}"#);
        assert!(unknown.is_err_and(|error| error.to_string().contains("learning_rat")));
    }

    #[test]
    fn checkpointing_is_auto_or_yes_or_no() {
        let choices = [
            ("\"auto\"", GradientCheckpointing::Auto),
            ("true", GradientCheckpointing::On),
            ("false", GradientCheckpointing::Off),
        ];
        for (text, choice) in choices {
            assert_eq!(serde_json::from_str::<GradientCheckpointing>(text).ok(), Some(choice));
            assert_eq!(serde_json::to_string(&choice).ok().as_deref(), Some(text));
        }
        assert!(serde_json::from_str::<GradientCheckpointing>("\"on\"").is_err());
    }

    #[test]
    fn epochs_become_steps() {
        let stage = TrainingOptions { num_train_epochs: 2.0, ..Default::default() };
        assert_eq!(stage.steps(10, 4), 5);
        assert_eq!(stage.steps(11, 4), 6, "a part of a batch is a step");
        assert_eq!(TrainingOptions { max_steps: Some(3), ..stage }.steps(10, 4), 3);
        let endless = TrainingOptions { num_train_epochs: 1e18, ..Default::default() };
        assert_eq!(endless.validate(), Ok(()), "of how many rows is not known");
        let error = endless.validate_steps(10, 4).map_err(|error| error.to_string());
        let expected = "num_train_epochs: expected at most 4294967295 steps, which take 4 of 10 rows each, got 1000000000000000000 epochs";
        assert_eq!(error, Err(expected.into()));
        let longest = TrainingOptions { num_train_epochs: f64::from(u32::MAX), ..Default::default() };
        assert_eq!(longest.validate_steps(4, 4), Ok(()));
        assert!(longest.validate_steps(5, 4).is_err());
        assert_eq!(TrainingOptions { max_steps: Some(3), ..endless }.validate_steps(10, 4), Ok(()));
    }

    #[test]
    fn warm_up_by_share_rounds_up() {
        let options = TrainingOptions { warmup_ratio: 0.05, ..Default::default() };
        assert_eq!(options.schedule(30).warmup, 2);
    }
}
