//! What a user can set about a policy gradient.

use model::decoder::WeightFormat;
use objectives::{Baseline, Credit, WorstCase};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::options::{OptionError, TrainingOptions, check};

/// Options of policy gradients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// Prompts of one step. The step samples this many groups of `num_generations` completions.
    #[schemars(range(min = 1, max = 65_536))]
    pub prompts_per_step: usize,
    /// Completions sampled for each prompt. A baseline that is made of the group needs two.
    #[schemars(range(min = 1, max = 65_536))]
    pub num_generations: usize,
    /// Optimisation passes over the episodes of a step (PPO's epochs).
    #[schemars(range(min = 1, max = 1_024))]
    pub num_iterations: usize,
    /// Optimiser updates of one pass: the step's groups are cut into this many minibatches.
    #[schemars(range(min = 1))]
    pub num_minibatches: usize,
    /// Put the groups in another random order before every pass but the first, whose order is random already, so that minibatches
    /// differ from pass to pass (as in PPO).
    pub shuffle_minibatches: bool,
    /// Leave completions that ran out of tokens out of the loss.
    pub mask_truncated_completions: bool,
    /// What is taken from the reward of a completion that ran out of tokens; nothing when absent.
    pub missing_eos_penalty: Option<f64>,
    /// The last so many tokens of the longest completion allowed are paid for (DAPO's soft overlong punishment); 0 is off.
    pub overlong_margin: usize,
    /// What the whole of that margin costs; a part of it costs its share.
    pub overlong_penalty: f64,
    /// Dynamic sampling: groups whose rewards are all equal are left out, and the prompts that come next are sampled in their
    /// place, in at most this many rounds. 0 keeps all groups.
    #[schemars(range(max = 1_024))]
    pub max_resampling_rounds: usize,
    /// Steps by which the policy that samples is behind: 0 samples with the current weights, 1 is one step off policy. The lag is
    /// fixed, so that a run is reproducible.
    #[schemars(range(max = 1_024))]
    pub staleness: usize,
    /// Groups of earlier steps that every step learns from again.
    pub replay: ReplayOptions,
    /// What the ratio is relative to: `sampler` is the policy that sampled, as its log-probabilities were recorded; `trainer` is
    /// the policy at the start of the step, and the sampler's difference to it is corrected for (decoupled PPO).
    pub old_policy: OldPolicy,
    /// The value model, with `objective.baseline = "value"`.
    pub value: ValueOptions,
    /// Train for the worst mix of the step's prompts near the one in the data: those that are worth least to the policy count more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worst_case: Option<WorstCase>,
    /// The parts of the loss: advantage, ratio, clip, divergence from the reference model, aggregation.
    pub objective: objectives::PolicyOptions,
    /// How completions are sampled.
    pub sampling: rollout::SamplingOptions,
    /// Sequences decoded at once. Results do not depend on it.
    #[schemars(range(min = 1))]
    pub decode_batch_size: usize,
    /// The weights that sample: `full` are those that are trained, bit for bit; `int8` is a copy rounded to 8 bits, half
    /// as large as bf16's and not faster. `old_policy` is then `trainer`, the loss is corrected by
    /// `objective.importance_sampling_mode`, and `sampling/sampling_logp_difference/*` says how far the copy is off.
    pub rollout_weights: WeightFormat,
    /// Keep what sampling computes of the first groups of a step, as many as fit into so many tokens, were their completions as
    /// long as can be: the first update then needs no forward for them, nor their logits, as many of these as fit where
    /// gradients will lie. Nothing else changes, not a bit. It takes the memory of a forward of as many tokens. Absent, `training.micro_batch_tokens`, which takes no more than training does
    /// anyway; 0 keeps nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reuse_forward_tokens: Option<usize>,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

/// What an importance ratio is relative to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OldPolicy {
    /// The policy that sampled.
    #[default]
    Sampler,
    /// The policy at the start of the step.
    Trainer,
}

/// Options of off-policy replay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ReplayOptions {
    /// Steps whose groups are kept, with the log-probabilities they were sampled with; 0 is off.
    #[schemars(range(max = 1_024))]
    pub steps: usize,
    /// Kept groups that a step learns from beside its own, drawn at random.
    #[schemars(range(max = 65_536))]
    pub groups_per_step: usize,
}

/// Where the value model lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ValueModel {
    /// A model of its own.
    #[default]
    Separate,
    /// A head on the policy.
    Shared,
}

/// Options of the value model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ValueOptions {
    /// `separate` is a second model with an optimiser of its own; `shared` is a number beside the tokens at the end of the
    /// policy's own body, which learns both at once.
    pub model: ValueModel,
    /// `separate`: the model that it starts from, as a rule the reward model: a folder or a name, with a head of one output. Absent, a
    /// copy of the policy with a head of zeros.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// `shared`: weight of the value model's loss beside the policy's (TRL's name).
    #[schemars(range(min = 0.0))]
    pub vf_coef: f64,
    /// Peak learning rate of the value model, which follows the schedule of `training`; that of `training` when absent.
    #[schemars(range(min = 0.0))]
    pub learning_rate: Option<f64>,
    /// How far an estimate may move from the one before the step's updates (TRL's name); unbounded when absent.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub cliprange_value: Option<f64>,
    /// Steps at the start in which the value model learns and the policy does not.
    pub warmup_steps: u64,
    /// Passes of the value model over the episodes of a step; `num_iterations` when absent.
    #[schemars(range(min = 1, max = 1_024))]
    pub num_iterations: Option<usize>,
}

impl Default for ValueOptions {
    fn default() -> Self {
        Self {
            model: ValueModel::Separate,
            init: None,
            vf_coef: 0.1,
            learning_rate: None,
            cliprange_value: Some(0.2),
            warmup_steps: 0,
            num_iterations: None,
        }
    }
}

impl Default for PolicyOptions {
    fn default() -> Self {
        Self {
            method: "grpo".into(),
            prompts_per_step: 8,
            num_generations: 8,
            num_iterations: 1,
            num_minibatches: 1,
            shuffle_minibatches: false,
            mask_truncated_completions: false,
            missing_eos_penalty: None,
            overlong_margin: 0,
            overlong_penalty: 1.0,
            max_resampling_rounds: 0,
            staleness: 0,
            replay: ReplayOptions::default(),
            old_policy: OldPolicy::Sampler,
            value: ValueOptions::default(),
            worst_case: None,
            objective: objectives::PolicyOptions::default(),
            sampling: rollout::SamplingOptions::default(),
            decode_batch_size: 32,
            rollout_weights: WeightFormat::Full,
            reuse_forward_tokens: None,
            training: TrainingOptions::default(),
        }
    }
}

impl PolicyOptions {
    /// Whether there is a value model.
    pub fn has_value_model(&self) -> bool {
        self.objective.baseline == Baseline::Value
    }

    /// Whether the value model is a head on the policy, which the decoder has to have ([`model::config::ScoreHead::VALUE`]).
    pub fn shares_value_model(&self) -> bool {
        self.has_value_model() && self.value.model == ValueModel::Shared
    }

    /// Whether a step depends on more of the earlier ones than the policy's weights.
    pub(super) fn carries_state(&self) -> bool {
        let remembers = self.staleness > 0 || self.replay.steps > 0;
        let critic = self.has_value_model() && !self.shares_value_model();
        remembers || critic || self.objective.kl_target.is_some() || self.objective.entropy_target.is_some()
    }

    /// Tokens of the first groups of a step for which sampling keeps room for a forward, at most.
    pub fn recorded_tokens(&self) -> usize {
        match self.staleness > 0 || self.max_resampling_rounds > 0 {
            // What is learnt from is not what is sampled in the same step, or only some of it.
            true => 0,
            false => self.reuse_forward_tokens.unwrap_or(self.training.micro_batch_tokens),
        }
    }

    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("prompts_per_step", self.prompts_per_step, (1..=65_536).contains(&self.prompts_per_step), "1 to 65536")?;
        let compared = matches!(self.objective.baseline, Baseline::GroupMean | Baseline::LeaveOneOut);
        let (least, expected) = match compared {
            true => (2, "2 (one has no baseline in its group) to 65536"),
            false => (1, "1 to 65536"),
        };
        let group = (least..=65_536).contains(&self.num_generations);
        check("num_generations", self.num_generations, group, expected)?;
        let completions = self.prompts_per_step * self.num_generations;
        check("prompts_per_step", completions, completions <= 1 << 20, "at most 1048576 completions in a step")?;
        check("num_iterations", self.num_iterations, (1..=1024).contains(&self.num_iterations), "1 to 1024")?;
        let cut = (1..=self.prompts_per_step).contains(&self.num_minibatches);
        check("num_minibatches", self.num_minibatches, cut, "between 1 and prompts_per_step")?;
        check("decode_batch_size", self.decode_batch_size, self.decode_batch_size > 0, "at least 1")?;
        let penalty = |key, value: f64| check(key, value, value.is_finite() && value >= 0.0, "a number, at least 0");
        penalty("missing_eos_penalty", self.missing_eos_penalty.unwrap_or(0.0))?;
        penalty("overlong_penalty", self.overlong_penalty)?;
        let longest = self.sampling.max_new_tokens;
        check(
            "overlong_margin",
            self.overlong_margin,
            self.overlong_margin <= longest,
            "at most sampling.max_new_tokens",
        )?;
        let rounds = self.max_resampling_rounds;
        check(
            "max_resampling_rounds",
            rounds,
            rounds <= 1024 && (rounds == 0 || self.num_generations > 1),
            "0 to 1024, and 0 with one completion a prompt: it never varies",
        )?;
        check("staleness", self.staleness, self.staleness <= 1024, "0 to 1024")?;
        self.replay.validate().map_err(|error| error.within("replay"))?;
        self.value.validate().map_err(|error| error.within("value"))?;
        self.sampling.validate().map_err(|error| OptionError::new("sampling", error.to_string()))?;
        let drawn = !self.sampling.is_greedy();
        check(
            "sampling.temperature",
            self.sampling.temperature,
            drawn,
            "a number above 0: completions need to differ",
        )?;
        let turn_by_turn = self.objective.credit == Credit::Turn;
        let compared = self.objective.baseline == Baseline::GroupMean && !self.objective.kl_in_reward();
        check(
            "objective.credit",
            "turn",
            compared || !turn_by_turn,
            "\"sequence\", \"token\" or \"span\", unless `baseline` is \"group_mean\" and the divergence is in the loss",
        )?;
        let learnt = (self.prompts_per_step + self.replay.groups_per_step) * self.num_generations;
        let moves = self.objective.kl_target.is_none() || 0.2 * (learnt as f64) < self.objective.kl_horizon;
        check(
            "objective.kl_horizon",
            self.objective.kl_horizon,
            moves,
            &format!("more than a fifth of the {learnt} completions of a step, after which beta could be 0"),
        )?;
        if let Some(worst_case) = self.worst_case {
            worst_case.validate().map_err(|error| OptionError::new("worst_case", error.to_string()))?;
        }
        self.training.validate().map_err(|error| error.within("training"))?;
        self.objective.validate().map_err(|error| OptionError::new("objective", error.to_string()))
    }
}

impl ReplayOptions {
    fn validate(&self) -> Result<(), OptionError> {
        check("steps", self.steps, self.steps <= 1024, "0 to 1024")?;
        let paired = (self.steps == 0) == (self.groups_per_step == 0);
        check(
            "groups_per_step",
            self.groups_per_step,
            paired && self.groups_per_step <= 65_536,
            "a number above 0 where `replay.steps` is, else 0",
        )
    }
}

impl ValueOptions {
    fn validate(&self) -> Result<(), OptionError> {
        let rate = self.learning_rate.unwrap_or(0.0);
        check("learning_rate", rate, rate.is_finite() && rate >= 0.0, "a number, at least 0")?;
        let clip = self.cliprange_value.unwrap_or(1.0);
        check("cliprange_value", clip, clip.is_finite() && clip > 0.0, "a number above 0")?;
        check("vf_coef", self.vf_coef, self.vf_coef.is_finite() && self.vf_coef >= 0.0, "a number, at least 0")?;
        let apart = self.learning_rate.is_some() || self.num_iterations.is_some() || self.warmup_steps > 0;
        let own = apart || self.init.is_some();
        let expected = "`separate` with a start, a learning rate, passes or warm-up steps of its own";
        check("model", "shared", self.model == ValueModel::Separate || !own, expected)?;
        let passes = self.num_iterations.unwrap_or(1);
        check("num_iterations", passes, (1..=1024).contains(&passes), "1 to 1024")
    }
}
