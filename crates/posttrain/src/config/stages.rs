//! The stages of a recipe: what the sections of the families have in common.

use data::render::Use;
use model::config::{HeadTask, ScoreHead};
use model::decoder::WeightFormat;
use train::methods::distillation::{DistillationOptions, TeacherOptions};
use train::methods::online_preference::{OnlinePreferenceOptions, Opponent};
use train::methods::policy::PolicyOptions;
use train::methods::preference::PreferenceOptions;
use train::methods::process_reward::ProcessRewardOptions;
use train::methods::rejection::{RejectionOptions, Sampler};
use train::methods::reward_model::{RewardLoss, RewardModelOptions};
use train::methods::sft::SftOptions;
use train::methods::unlearning::UnlearningOptions;
use train::methods::unpaired::UnpairedOptions;
use train::methods::value_model::ValueModelOptions;
use train::options::{OptionError, TrainingOptions};

use super::Config;

/// A stage, with its options.
#[derive(Clone, Copy, Debug)]
pub enum Stage<'a> {
    /// `[sft]`
    Sft(&'a SftOptions),
    /// `[rejection]`
    Rejection(&'a RejectionOptions),
    /// `[reward_model]`
    RewardModel(&'a RewardModelOptions),
    /// `[process_reward]`
    ProcessReward(&'a ProcessRewardOptions),
    /// `[value_model]`
    ValueModel(&'a ValueModelOptions),
    /// `[preference]`
    Preference(&'a PreferenceOptions),
    /// `[unpaired]`
    Unpaired(&'a UnpairedOptions),
    /// `[online_preference]`
    OnlinePreference(&'a OnlinePreferenceOptions),
    /// `[policy]`
    Policy(&'a PolicyOptions),
    /// `[distillation]`
    Distillation(&'a DistillationOptions),
    /// `[unlearning]`
    Unlearning(&'a UnlearningOptions),
}

/// What a stage learns from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows<'a> {
    /// Prompts with completions to imitate.
    Examples,
    /// Completions to be scored, in pairs or with labels, as the loss wants them.
    Rewarded(RewardLoss),
    /// Solutions in steps, each followed by this separator.
    Steps(&'a str),
    /// Prompts with a better and a worse completion.
    Pairs,
    /// Prompts with several completions in an order.
    Rankings,
    /// Prompts with a completion that is good or bad.
    Judgements,
    /// Prompts, to which the model finds answers itself, and what these are judged by.
    Prompts,
    /// The same with this hint at the end.
    Hints(&'a str),
    /// Prompts with completions to forget.
    Forgotten,
}

impl<'a> Rows<'a> {
    /// What becomes of each of the rows to train on; nothing where it is other rows that are learnt from.
    pub fn used(self) -> Option<Use<'a>> {
        Some(match self {
            Self::Examples => Use::Imitate,
            Self::Rewarded(RewardLoss::BradleyTerry) | Self::Pairs | Self::Rankings => Use::Compare,
            Self::Rewarded(RewardLoss::Bce | RewardLoss::Mse) => Use::Score,
            Self::Steps(separator) => Use::Steps(separator),
            Self::Judgements => Use::Judge,
            Self::Prompts | Self::Hints(_) => Use::Answer,
            Self::Forgotten => return None,
        })
    }
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
            Self::Rejection(_) => "rejection",
            Self::RewardModel(_) => "reward_model",
            Self::ProcessReward(_) => "process_reward",
            Self::ValueModel(_) => "value_model",
            Self::Preference(_) => "preference",
            Self::Unpaired(_) => "unpaired",
            Self::OnlinePreference(_) => "online_preference",
            Self::Policy(_) => "policy",
            Self::Distillation(_) => "distillation",
            Self::Unlearning(_) => "unlearning",
        }
    }

    /// The published method.
    pub fn method(self) -> &'a str {
        match self {
            Self::Sft(options) => &options.method,
            Self::Rejection(options) => &options.method,
            Self::RewardModel(options) => &options.method,
            Self::ProcessReward(options) => &options.method,
            Self::ValueModel(options) => &options.method,
            Self::Preference(options) => &options.method,
            Self::Unpaired(options) => &options.method,
            Self::OnlinePreference(options) => &options.method,
            Self::Policy(options) => &options.method,
            Self::Distillation(options) => &options.method,
            Self::Unlearning(options) => &options.method,
        }
    }

    /// How it trains.
    pub fn training(self) -> &'a TrainingOptions {
        match self {
            Self::Sft(options) => &options.training,
            Self::Rejection(options) => &options.training,
            Self::RewardModel(options) => &options.training,
            Self::ProcessReward(options) => &options.training,
            Self::ValueModel(options) => &options.training,
            Self::Preference(options) => &options.training,
            Self::Unpaired(options) => &options.training,
            Self::OnlinePreference(options) => &options.training,
            Self::Policy(options) => &options.training,
            Self::Distillation(options) => &options.training,
            Self::Unlearning(options) => &options.training,
        }
    }

    /// What it learns from.
    pub fn rows(self) -> Vec<Rows<'a>> {
        let some = |needed: bool, rows| needed.then_some(rows);
        match self {
            Self::Sft(_) => vec![Rows::Examples],
            Self::RewardModel(options) => vec![Rows::Rewarded(options.loss_type)],
            Self::ProcessReward(options) => vec![Rows::Steps(&options.step_separator)],
            Self::Preference(options) if options.objective.ranks() => vec![Rows::Rankings],
            Self::Preference(_) => vec![Rows::Pairs],
            Self::Unpaired(_) => vec![Rows::Judgements],
            Self::Rejection(options) => {
                let hint = options.rationalization_hint.as_deref();
                std::iter::once(Rows::Prompts).chain(hint.map(Rows::Hints)).collect()
            }
            Self::ValueModel(_) | Self::OnlinePreference(_) | Self::Policy(_) => vec![Rows::Prompts],
            Self::Distillation(options) => {
                let own = some(options.prompts_per_step() > 0, Rows::Prompts);
                own.into_iter().chain(some(options.examples_per_step() > 0, Rows::Examples)).collect()
            }
            Self::Unlearning(options) => {
                std::iter::once(Rows::Forgotten).chain(some(options.retains(), Rows::Examples)).collect()
            }
        }
    }

    /// Whether a value model of its own is trained beside the policy.
    pub fn has_separate_value_model(self) -> bool {
        matches!(self, Self::Policy(options) if options.has_value_model() && !options.shares_value_model())
    }

    /// How it samples, where it does.
    pub fn sampling(self) -> Option<&'a rollout::SamplingOptions> {
        match self {
            Self::Sft(_)
            | Self::Preference(_)
            | Self::Unpaired(_)
            | Self::RewardModel(_)
            | Self::ProcessReward(_)
            | Self::Unlearning(_) => None,
            Self::ValueModel(options) => Some(&options.sampling),
            Self::Rejection(options) => Some(&options.sampling),
            Self::OnlinePreference(options) => Some(&options.sampling),
            Self::Policy(options) => Some(&options.sampling),
            Self::Distillation(options) => (options.prompts_per_step() > 0).then_some(&options.sampling),
        }
    }

    /// Tokens of a step whose activations sampling keeps for training, at most.
    pub fn recorded_tokens(self) -> usize {
        match self {
            Self::Policy(options) => options.recorded_tokens(),
            _ => 0,
        }
    }

    /// The weights it samples with.
    pub fn rollout_weights(self) -> WeightFormat {
        match self {
            Self::Policy(options) => options.rollout_weights,
            _ => WeightFormat::Full,
        }
    }

    /// Whether the model that it trains scores, and does not write.
    pub fn is_scoring(self) -> bool {
        matches!(self, Self::RewardModel(_) | Self::ProcessReward(_) | Self::ValueModel(_))
    }

    /// The score head of the model that it trains, over a vocabulary of this size: of one that scores, or of a policy that carries its value model; and
    /// the deviation of the weights that a new one starts with.
    pub fn score_head(self, vocabulary: usize) -> Option<(ScoreHead, f64)> {
        match self {
            Self::RewardModel(options) => Some(options.score_head()),
            Self::ProcessReward(options) => {
                Some((ScoreHead { outputs: options.loss_type.outputs(), task: HeadTask::Token }, 0.0))
            }
            Self::ValueModel(options) => Some((options.score_head(vocabulary), 0.0)),
            Self::Policy(options) => options.shares_value_model().then_some((ScoreHead::VALUE, 0.0)),
            _ => None,
        }
    }

    /// How much it computes.
    pub fn work(self) -> Work {
        let once = |rows_per_step| Work { rows_per_step, sequences_per_row: 1, passes: 1, decode_batch_size: 0 };
        match self {
            Self::Sft(options) => once(options.batch_size),
            // A row of pairs is as long as its two sequences.
            Self::RewardModel(options) => once(options.batch_size),
            Self::ProcessReward(options) => once(options.batch_size),
            Self::ValueModel(options) => Work {
                rows_per_step: options.batch_size.div_ceil(options.num_generations),
                sequences_per_row: options.num_generations,
                passes: 1,
                decode_batch_size: options.decode_batch_size,
            },
            // The prompt of a pair counts once, its completions one by one.
            Self::Preference(options) => Work { sequences_per_row: 2, ..once(options.batch_size) },
            Self::Unpaired(options) => once(options.batch_size),
            Self::OnlinePreference(options) => Work {
                sequences_per_row: 2,
                decode_batch_size: options.decode_batch_size,
                ..once(options.prompts_per_step)
            },
            Self::Policy(options) => Work {
                rows_per_step: options.prompts_per_step,
                sequences_per_row: options.num_generations,
                passes: options.num_iterations,
                decode_batch_size: options.decode_batch_size,
            },
            Self::Rejection(options) => Work {
                rows_per_step: options.prompts_per_step,
                sequences_per_row: options.num_generations,
                passes: 1,
                decode_batch_size: options.decode_batch_size,
            },
            Self::Distillation(options) => Work {
                rows_per_step: options.batch_size,
                sequences_per_row: if options.prompts_per_step() > 0 { options.num_generations } else { 1 },
                passes: 1,
                decode_batch_size: if options.prompts_per_step() > 0 { options.decode_batch_size } else { 0 },
            },
            Self::Unlearning(options) => {
                let kept = if options.retains() { options.retain_batch_size } else { 0 };
                let rows_per_step = options.forget_batch_size + kept;
                Work { rows_per_step, sequences_per_row: 1, passes: 1, decode_batch_size: 0 }
            }
        }
    }

    /// Whether it learns from `[[rewards]]`.
    pub fn needs_rewards(self) -> bool {
        matches!(self, Self::Rejection(_) | Self::ValueModel(_) | Self::OnlinePreference(_) | Self::Policy(_))
    }

    /// The models it learns from.
    pub fn teachers(self) -> &'a [TeacherOptions] {
        match self {
            Self::Distillation(options) => &options.teachers,
            _ => &[],
        }
    }

    /// The models that it reads beside the one that is trained, by the names that the recipe gives.
    pub fn models_beside(self) -> Vec<&'a str> {
        match self {
            Self::Distillation(options) => options.teachers.iter().map(|teacher| &*teacher.model).collect(),
            Self::Policy(options) => options.value.init.iter().map(String::as_str).collect(),
            Self::ValueModel(options) => options.reference.iter().map(String::as_str).collect(),
            _ => Vec::new(),
        }
    }

    /// Whether it compares with the model it started from.
    pub fn needs_reference(self) -> bool {
        match self {
            Self::Sft(_) | Self::RewardModel(_) | Self::ProcessReward(_) | Self::Distillation(_) => false,
            Self::ValueModel(_) => true,
            Self::Rejection(options) => options.sampler == Sampler::Reference,
            Self::Preference(options) => options.objective.needs_reference(),
            Self::Unpaired(_) => true,
            Self::OnlinePreference(options) => options.needs_reference(),
            Self::Policy(options) => options.objective.needs_reference(),
            Self::Unlearning(options) => options.objective.needs_reference(),
        }
    }

    /// Whether that model is in memory beside the one that is trained even with an adapter, which otherwise is switched off instead.
    pub fn copies_reference(self) -> bool {
        match self {
            Self::ValueModel(_) => true,
            Self::OnlinePreference(options) => options.opponent == Opponent::Mixture,
            _ => false,
        }
    }

    /// Refuses values that mean nothing. The error names the option as one of the method's own section.
    pub fn validate(self) -> Result<(), OptionError> {
        match self {
            Self::Sft(options) => options.validate(),
            Self::Rejection(options) => options.validate(),
            Self::RewardModel(options) => options.validate(),
            Self::ProcessReward(options) => options.validate(),
            Self::ValueModel(options) => options.validate(),
            Self::Preference(options) => options.validate(),
            Self::Unpaired(options) => options.validate(),
            Self::OnlinePreference(options) => options.validate(),
            Self::Policy(options) => options.validate(),
            Self::Distillation(options) => options.validate(),
            Self::Unlearning(options) => options.validate(),
        }
        .map_err(|error| error.within(self.method()))
    }
}

impl Config {
    /// The stages, in the order in which they run.
    pub fn stages(&self) -> Vec<Stage<'_>> {
        let stages = [
            self.sft.as_ref().map(Stage::Sft),
            self.reward_model.as_ref().map(Stage::RewardModel),
            self.process_reward.as_ref().map(Stage::ProcessReward),
            self.value_model.as_ref().map(Stage::ValueModel),
            self.rejection.as_ref().map(Stage::Rejection),
            self.preference.as_ref().map(Stage::Preference),
            self.unpaired.as_ref().map(Stage::Unpaired),
            self.online_preference.as_ref().map(Stage::OnlinePreference),
            self.policy.as_ref().map(Stage::Policy),
            self.distillation.as_ref().map(Stage::Distillation),
            self.unlearning.as_ref().map(Stage::Unlearning),
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
            self.rejection.as_mut().map(|options| &mut options.training),
            self.reward_model.as_mut().map(|options| &mut options.training),
            self.process_reward.as_mut().map(|options| &mut options.training),
            self.value_model.as_mut().map(|options| &mut options.training),
            self.preference.as_mut().map(|options| &mut options.training),
            self.unpaired.as_mut().map(|options| &mut options.training),
            self.online_preference.as_mut().map(|options| &mut options.training),
            self.policy.as_mut().map(|options| &mut options.training),
            self.distillation.as_mut().map(|options| &mut options.training),
            self.unlearning.as_mut().map(|options| &mut options.training),
        ];
        trainings.into_iter().flatten()
    }
}
