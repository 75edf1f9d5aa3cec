//! The stages of a recipe: what the sections of the families have in common.

use model::decoder::WeightFormat;
use train::methods::online_preference::OnlinePreferenceOptions;
use train::methods::preference::PreferenceOptions;
use train::methods::policy::PolicyOptions;
use train::methods::sft::SftOptions;
use train::methods::unpaired::UnpairedOptions;
use train::options::{OptionError, TrainingOptions};

use super::Config;

/// A stage, with its options.
#[derive(Clone, Copy, Debug)]
pub enum Stage<'a> {
    /// `[sft]`
    Sft(&'a SftOptions),
    /// `[preference]`
    Preference(&'a PreferenceOptions),
    /// `[unpaired]`
    Unpaired(&'a UnpairedOptions),
    /// `[online_preference]`
    OnlinePreference(&'a OnlinePreferenceOptions),
    /// `[policy]`
    Policy(&'a PolicyOptions),
}

/// What a stage learns from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Prompts with completions to imitate.
    Examples,
    /// Prompts with a better and a worse completion.
    Pairs,
    /// Prompts with a completion that is good or bad.
    Judgements,
    /// Prompts, to which the model finds answers itself, and what these are judged by.
    Prompts,
}

/// What a step of a stage computes, for the estimates of memory and time.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Rows of data.
    pub rows_per_step: usize,
    /// Sequences of each row, which share its prompt.
    pub sequences_per_row: usize,
    /// Times that each sequence is trained on.
    pub passes: usize,
    /// Sequences sampled at once; 0 where nothing is sampled.
    pub decode_batch_size: usize,
}

impl<'a> Stage<'a> {
    /// The section of the recipe.
    pub fn section(self) -> &'static str {
        match self {
            Self::Sft(_) => "sft",
            Self::Preference(_) => "preference",
            Self::Unpaired(_) => "unpaired",
            Self::OnlinePreference(_) => "online_preference",
            Self::Policy(_) => "policy",
        }
    }

    /// The published method.
    pub fn method(self) -> &'a str {
        match self {
            Self::Sft(options) => &options.method,
            Self::Preference(options) => &options.method,
            Self::Unpaired(options) => &options.method,
            Self::OnlinePreference(options) => &options.method,
            Self::Policy(options) => &options.method,
        }
    }

    /// How it trains.
    pub fn training(self) -> &'a TrainingOptions {
        match self {
            Self::Sft(options) => &options.training,
            Self::Preference(options) => &options.training,
            Self::Unpaired(options) => &options.training,
            Self::OnlinePreference(options) => &options.training,
            Self::Policy(options) => &options.training,
        }
    }

    /// What it learns from.
    pub fn rows(self) -> Rows {
        match self {
            Self::Sft(_) => Rows::Examples,
            Self::Preference(_) => Rows::Pairs,
            Self::Unpaired(_) => Rows::Judgements,
            Self::OnlinePreference(_) | Self::Policy(_) => Rows::Prompts,
        }
    }

    /// Whether a value model of its own is trained beside the policy.
    pub fn has_separate_value_model(self) -> bool {
        matches!(self, Self::Policy(options) if options.has_value_model() && !options.shares_value_model())
    }

    /// Whether the policy carries its value model as a head of its own.
    pub fn has_value_head(self) -> bool {
        matches!(self, Self::Policy(options) if options.shares_value_model())
    }

    /// How it samples, where it does.
    pub fn sampling(self) -> Option<&'a rollout::SamplingOptions> {
        match self {
            Self::Sft(_) | Self::Preference(_) | Self::Unpaired(_) => None,
            Self::OnlinePreference(options) => Some(&options.sampling),
            Self::Policy(options) => Some(&options.sampling),
        }
    }

    /// The weights it samples with.
    pub fn rollout_weights(self) -> WeightFormat {
        match self {
            Self::Sft(_) | Self::Preference(_) | Self::Unpaired(_) | Self::OnlinePreference(_) => WeightFormat::Full,
            Self::Policy(options) => options.rollout_weights,
        }
    }

    /// How much it computes.
    pub fn work(self) -> Work {
        match self {
            Self::Sft(options) => {
                Work { rows_per_step: options.batch_size, sequences_per_row: 1, passes: 1, decode_batch_size: 0 }
            }
            Self::Preference(options) => {
                Work { rows_per_step: options.batch_size, sequences_per_row: 2, passes: 1, decode_batch_size: 0 }
            }
            Self::Unpaired(options) => {
                Work { rows_per_step: options.batch_size, sequences_per_row: 1, passes: 1, decode_batch_size: 0 }
            }
            Self::OnlinePreference(options) => Work {
                rows_per_step: options.prompts_per_step,
                sequences_per_row: 2,
                passes: 1,
                decode_batch_size: options.decode_batch_size,
            },
            Self::Policy(options) => Work {
                rows_per_step: options.prompts_per_step,
                sequences_per_row: options.num_generations,
                passes: options.num_iterations,
                decode_batch_size: options.decode_batch_size,
            },
        }
    }

    /// Whether it learns from `[[rewards]]`.
    pub fn needs_rewards(self) -> bool {
        matches!(self, Self::OnlinePreference(_) | Self::Policy(_))
    }

    /// Whether it compares with the model it started from.
    pub fn needs_reference(self) -> bool {
        match self {
            Self::Sft(_) => false,
            Self::Preference(options) => options.objective.needs_reference(),
            Self::Unpaired(_) => true,
            Self::OnlinePreference(options) => options.needs_reference(),
            Self::Policy(options) => options.objective.needs_reference(),
        }
    }

    /// Refuses values that mean nothing. The error names the option as one of the method's own section.
    pub fn validate(self) -> Result<(), OptionError> {
        match self {
            Self::Sft(options) => options.validate(),
            Self::Preference(options) => options.validate(),
            Self::Unpaired(options) => options.validate(),
            Self::OnlinePreference(options) => options.validate(),
            Self::Policy(options) => options.validate(),
        }
        .map_err(|error| error.within(self.method()))
    }
}

impl Config {
    /// The stages, in the order in which they run.
    pub fn stages(&self) -> Vec<Stage<'_>> {
        let stages = [
            self.sft.as_ref().map(Stage::Sft),
            self.preference.as_ref().map(Stage::Preference),
            self.unpaired.as_ref().map(Stage::Unpaired),
            self.online_preference.as_ref().map(Stage::OnlinePreference),
            self.policy.as_ref().map(Stage::Policy),
        ];
        stages.into_iter().flatten().collect()
    }

    /// Whether a stage learns from pairs or judgements, so that tasks make wrong answers too.
    pub fn compares(&self) -> bool {
        self.preference.is_some() || self.unpaired.is_some()
    }

    /// How the stages train, to be changed.
    pub fn trainings_mut(&mut self) -> impl Iterator<Item = &mut TrainingOptions> {
        let trainings = [
            self.sft.as_mut().map(|options| &mut options.training),
            self.preference.as_mut().map(|options| &mut options.training),
            self.unpaired.as_mut().map(|options| &mut options.training),
            self.online_preference.as_mut().map(|options| &mut options.training),
            self.policy.as_mut().map(|options| &mut options.training),
        ];
        trainings.into_iter().flatten()
    }
}
