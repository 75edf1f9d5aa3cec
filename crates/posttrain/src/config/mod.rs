//! One TOML file composed of the option structs of the crates.

pub mod check;
pub mod environment;
pub mod load;
pub mod methods;
pub mod reference;
mod stages;
pub mod tree;

use std::path::PathBuf;

use base::Hint;
use data::render::Use;
use data::{DataOptions, RenderOptions};
use envs::{ModelRewardOptions, RewardConfig, RewardKind, TaskConfig};
use eval::{EvaluateOptions, TestTimeOptions};
use model::DeviceName;
use model::decoder::WeightFormat;
use model::lora::LoraConfig;
use rollout::SamplingOptions;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::methods::distillation::DistillationOptions;
use train::methods::online_preference::OnlinePreferenceOptions;
use train::methods::policy::PolicyOptions;
use train::methods::preference::PreferenceOptions;
use train::methods::process_reward::ProcessRewardOptions;
use train::methods::rejection::RejectionOptions;
use train::methods::reward_model::RewardModelOptions;
use train::methods::sft::SftOptions;
use train::methods::unlearning::UnlearningOptions;
use train::methods::unpaired::UnpairedOptions;
use train::methods::value_model::ValueModelOptions;
use train::options::RunOptions;
use train::referee::RefereeOptions;

use crate::failure::Failure;
use check::{Schema, check};
use environment::EnvironmentOptions;
use load::{Layers, blame, to_toml};
pub use stages::{Rows, Stage, Work};
use tree::Node;

/// A recipe: everything that decides what a run computes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Seed of every random draw. The same seed, options and binary give the same bytes.
    pub seed: u64,
    /// Folder of the run; `runs/RECIPE` when absent. Not part of the configuration's hash.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_dir: Option<PathBuf>,
    /// The model to start from.
    pub model: ModelOptions,
    /// Train a low-rank adapter instead of the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// Generated problems to train on and to measure with.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskOptions>,
    /// A world to train in and to measure in, in place of tasks and files; `docs/agents.md` tells of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment: Option<EnvironmentOptions>,
    /// Files to train on and to measure with; `docs/data.md` describes their columns.
    pub data: DataOptions,
    /// How rows become tokens.
    pub rendering: RenderOptions,
    /// Judges of sampled answers; the reward is their weighted sum.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rewards: Vec<RewardConfig>,
    /// Supervised fine-tuning, the first stage when present.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sft: Option<SftOptions>,
    /// Rejection sampling: learn those of the model's own answers that the rewards let pass, the stage after. `[star]` is this
    /// section with `method = "star"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejection: Option<RejectionOptions>,
    /// Reward models from pairs or labels: the only stage of its run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward_model: Option<RewardModelOptions>,
    /// Process reward models from labels of steps: the only stage of its run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process_reward: Option<ProcessRewardOptions>,
    /// Value models that guide another model's decoding: the only stage of its run. `[q_sharp]` is this section with
    /// `method = "q_sharp"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value_model: Option<ValueModelOptions>,
    /// Preference optimisation from pairs, the stage after. `[dpo]` and `[simpo]` are this section with their `method`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preference: Option<PreferenceOptions>,
    /// Preference optimisation from single judgements, the stage after. `[kto]` is this section with `method = "kto"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unpaired: Option<UnpairedOptions>,
    /// Preference optimisation from the model's own answers, judged by the rewards, the stage after. `[online_dpo]` and `[xpo]`
    /// are this section with their `method`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub online_preference: Option<OnlinePreferenceOptions>,
    /// Policy gradients: reinforcement learning from rewards, the stage after. `[grpo]` is this section with `method = "grpo"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyOptions>,
    /// Who watches stages that learn from rewards, for what, and what follows from an alarm; see `docs/referee.md`.
    pub referee: RefereeOptions,
    /// Distillation: learn the distributions of other models. `[gkd]` is this section with `method = "gkd"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distillation: Option<DistillationOptions>,
    /// Unlearning: forget the rows of `data.forget`, keep those of `data.train`, the last stage. `[npo]` is this section with
    /// `method = "npo"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unlearning: Option<UnlearningOptions>,
    /// How the model is measured on held-out problems.
    pub evaluation: EvaluateOptions,
    /// How `posttrain eval --test-time` finds an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test_time: Option<TestTimeOptions>,
    /// The reward models that `posttrain eval --test-time` asks which answer is best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<ModelRewardOptions>,
    /// When a run saves, evaluates and writes down what it sampled.
    pub run: RunOptions,
}

/// Which model, and how it computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelOptions {
    /// A named model (`posttrain models` lists them), a Hugging Face folder, a checkpoint of a run, or a GGUF file.
    pub name: String,
    /// Number format of the matrix products, in sampling and in training alike.
    pub precision: Precision,
    /// Where it computes: `cpu`, or in a build with `--features cuda` an NVIDIA GPU, `cuda` or `cuda:N`. On a GPU, results
    /// are the processor's within rounding, and sampler and trainer agree within rounding; docs/gpu.md says more.
    pub device: DeviceName,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self { name: "smollm2-135m-instruct".into(), precision: Precision::default(), device: DeviceName::Cpu }
    }
}

/// Number format of the matrix products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit operands
    F32,
    /// Operands rounded to bfloat16, sums kept in 32 bits; weights and optimiser state stay in 32 bits
    #[default]
    Bf16,
}

impl From<Precision> for kernels::Precision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
        }
    }
}

/// One text, or several that rows take in turn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline, transform = Templates::text_or_texts)]
pub enum Templates {
    /// The text of every row.
    One(String),
    /// Those of the first row, the second, and so on, and again from the first on.
    Several(Vec<String>),
}

impl Templates {
    /// The schema as the checks and the reference of options read it: one type or another, not alternatives of tables.
    fn text_or_texts(schema: &mut schemars::Schema) {
        *schema = schemars::json_schema!({ "type": ["string", "array"], "items": { "type": "string" } });
    }

    /// The text of a row, by its number.
    pub fn of(&self, number: u64) -> &str {
        match self {
            Self::One(text) => text,
            Self::Several(texts) => texts.get((number % texts.len().max(1) as u64) as usize).map_or("", |text| text),
        }
    }
}

/// A source of generated problems.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TaskOptions {
    /// Problems to train on.
    #[serde(default = "default_train_problems")]
    pub train_problems: u32,
    /// Held-out problems to measure with. No problem of one split occurs in the other, in whatever words.
    #[serde(default = "default_test_problems")]
    pub test_problems: u32,
    /// The assistant's message in supervised examples, and the better one in pairs; `{answer}` stands for the answer. Of several, the
    /// problems take one after the other.
    #[serde(default = "default_completion")]
    pub completion: Templates,
    /// The worse answer of preference pairs; `{wrong}` stands for a wrong answer near the right one, `{answer}` for the right one.
    #[serde(default = "default_rejected")]
    pub rejected: String,
    /// The task and its own options, chosen by `type`.
    #[serde(flatten)]
    pub task: TaskConfig,
}

fn default_train_problems() -> u32 {
    2000
}

fn default_test_problems() -> u32 {
    200
}

fn default_completion() -> Templates {
    Templates::One("{answer}".into())
}

fn default_rejected() -> String {
    "{wrong}".into()
}

/// These things without those that came before, in their order.
fn each_once<T: PartialEq>(things: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for thing in things {
        if !found.contains(&thing) {
            found.push(thing);
        }
    }
    found
}

/// The schema of a recipe, with a section for every method.
pub fn schema() -> serde_json::Value {
    let mut schema = load::schema::<Config>();
    methods::add_sections(&mut schema);
    schema
}

impl Config {
    /// Reads, merges, checks and converts a recipe.
    ///
    /// # Errors
    /// A file that cannot be read, an unknown key, a value of the wrong type or without meaning; each in its place.
    pub fn load(layers: &Layers) -> Result<Self, Failure> {
        Self::from_tree(layers.merged()?)
    }

    /// Checks and converts what was written.
    ///
    /// # Errors
    /// As [`Config::load`], files apart.
    pub fn from_tree(written: Node) -> Result<Self, Failure> {
        let mut tree = Node::default();
        methods::lay(&mut tree, written)?;
        check(&tree, Schema::new(&schema()), "")?;
        let tree = methods::resolve(tree)?;
        let config: Self = load::typed(&tree)?;
        config.validate(&tree)?;
        Ok(config)
    }

    fn validate(&self, tree: &Node) -> Result<(), Failure> {
        for stage in self.stages() {
            stage.validate().map_err(|error| {
                let key = error.key.replacen(stage.method(), stage.section(), 1);
                blame(error.into(), tree, &key)
            })?;
            if let Some(sampling) = stage.sampling() {
                let key = format!("{}.sampling", stage.section());
                self.check_sampling(sampling, tree, &format!("{}.sampling", stage.method()), &key)?;
            }
            if stage.rollout_weights() == WeightFormat::Int8 && self.model.device != DeviceName::Cpu {
                let key = format!("{}.rollout_weights", stage.method());
                let failure = Failure::new(format!("`{key}`: 8-bit weights are for `model.device = \"cpu\"` alone"));
                let place = format!("{}.rollout_weights", stage.section());
                return Err(blame(failure.hint("leave it at \"full\""), tree, &place));
            }
            if stage.needs_rewards() && self.rewards.is_empty() && self.environment.is_none() {
                let failure = Failure::new(format!(
                    "`{}` has no reward to learn from: expected at least one `[[rewards]]`",
                    stage.method()
                ));
                let failure = failure.hint("add for example\n\n[[rewards]]\ntype = \"number\"");
                return Err(blame(failure, tree, stage.section()));
            }
        }
        self.check_scoring_is_alone(tree)?;
        if let (Some(options), Some(_)) = (&self.value_model, &self.environment) {
            let failure = Failure::new(format!(
                "`{}` learns what follows from a token, and an environment answers in between: expected no `[environment]`",
                options.method
            ));
            return Err(blame(failure.hint("use `[[tasks]]` or `data.train`"), tree, "value_model"));
        }
        if let Some(options) = &self.test_time {
            let failure = |reason| blame(Failure::new(format!("`test_time`: {reason}")), tree, "test_time");
            options.validate().map_err(failure)?;
        }
        if let Some(judge) = &self.judge {
            judge.validate("judge").map_err(|error| blame(error.into(), tree, "judge"))?;
        }
        let key = "evaluation.sampling";
        self.check_sampling(&self.evaluation.sampling, tree, key, key)?;
        self.referee.validate().map_err(|error| {
            let error = error.within("referee");
            let key = error.key.clone();
            blame(error.into(), tree, &key)
        })?;
        self.check_verifier().map_err(|failure| blame(failure, tree, "referee.verifier"))?;
        if let Some(lora) = &self.lora {
            lora.validate().map_err(|error| blame(error.into(), tree, "lora"))?;
        }
        for (i, task) in self.tasks.iter().enumerate() {
            task.task.build().map_err(|error| blame(error.into(), tree, &format!("tasks.{i}")))?;
            if task.completion == Templates::Several(Vec::new()) {
                let failure = Failure::new("`completion` is an empty list, expected a text or a list of at least one");
                return Err(blame(failure, tree, &format!("tasks.{i}.completion")));
            }
        }
        if let Some(environment) = &self.environment {
            environment.environment.build().map_err(|error| blame(error.into(), tree, "environment"))?;
            environment
                .conversation
                .validate()
                .map_err(|error| blame(error.into(), tree, "environment.conversation"))?;
            if !(self.tasks.is_empty() && self.data.train.is_empty() && self.data.test.is_empty()) {
                let failure =
                    Failure::new("`environment` stands beside tasks or files: expected one source of prompts");
                return Err(blame(failure.hint("leave out `[[tasks]]` and `[data]`"), tree, "environment"));
            }
        }
        for (i, reward) in self.rewards.iter().enumerate() {
            reward.validate().map_err(|error| blame(error.into(), tree, &format!("rewards.{i}")))?;
        }
        Ok(())
    }

    /// The referee's verifier must be something that is measured.
    fn check_verifier(&self) -> Result<(), Failure> {
        let Some(verifier) = &self.referee.verifier else { return Ok(()) };
        let mut known: Vec<String> =
            self.rewards.iter().map(|reward| format!("rewards/{}/mean", reward.name())).collect();
        known.extend(["eval_accuracy".to_owned(), "status/ok".to_owned()]);
        if known.contains(verifier) {
            return Ok(());
        }
        let failure =
            Failure::new(format!("`referee.verifier`: no metric {verifier:?}: expected one of {}", known.join(", ")));
        Err(failure.hint("a judge who is not paid for is a reward with `weight = 0`"))
    }

    /// A model that scores has lost its language-model head: nothing else can be trained beside it.
    fn check_scoring_is_alone(&self, tree: &Node) -> Result<(), Failure> {
        let stages = self.stages();
        match (stages.iter().find(|stage| stage.is_scoring()), stages.len()) {
            (Some(scoring), 2..) => {
                let failure = Failure::new(format!(
                    "`{}` trains a model that scores, beside stages of one that writes: expected it alone",
                    scoring.method()
                ));
                Err(blame(failure.hint("train the reward model in a run of its own"), tree, scoring.section()))
            }
            _ => Ok(()),
        }
    }

    /// Checks the table at `key`, which the error calls `name`.
    fn check_sampling(&self, options: &SamplingOptions, tree: &Node, name: &str, key: &str) -> Result<(), Failure> {
        options.validate().map_err(|error| {
            let failure = Failure::new(format!("`{name}`: {error}"));
            let failure = match error.hint() {
                Some(hint) => failure.hint(hint),
                None => failure,
            };
            blame(failure, tree, key)
        })
    }

    /// What training needs beyond what measuring needs.
    pub fn check_trainable(&self) -> Result<(), Failure> {
        if self.stages().is_empty() {
            let failure = Failure::new("the recipe has no stage to train: expected for example `[sft]` or `[grpo]`");
            return Err(failure.hint("`posttrain methods` lists them; recipes/ has complete ones"));
        }
        let played = self.environment.as_ref().is_some_and(|environment| environment.train_episodes > 0);
        let nothing = self.tasks.iter().all(|task| task.train_problems == 0) && self.data.train.is_empty() && !played;
        let needed = |stage: &Stage<'_>| stage.rows().iter().any(|rows| *rows != Rows::Forgotten);
        if nothing && self.stages().iter().any(needed) {
            let failure = Failure::new("the recipe has nothing to train on: expected `[[tasks]]` or `data.train`");
            return Err(failure.hint("name your files: `--set data.train=['rows.jsonl']`"));
        }
        if self.value_model.is_some() && !self.data.test.is_empty() {
            let failure =
                Failure::new("`data.test` would not be measured: a value model is measured by what it guides");
            return Err(failure.hint("leave it out, and measure the answers of `posttrain generate --guide`"));
        }
        if self.unlearning.is_some() && self.data.forget.is_empty() {
            let failure = Failure::new("the recipe has nothing to forget: `[unlearning]` expects `data.forget`");
            return Err(failure.hint("name your files: `--set data.forget=['rows.jsonl']`"));
        }
        Ok(())
    }

    /// Whether there is anything to measure.
    pub fn has_evaluation(&self) -> bool {
        if let Some(scoring) = self.stages().into_iter().find(|stage| stage.is_scoring()) {
            return !self.data.test.is_empty() && scoring.rows() != [Rows::Prompts];
        }
        if let Some(environment) = &self.environment {
            return environment.test_episodes > 0;
        }
        let held_out = self.tasks.iter().any(|task| task.test_problems > 0) || !self.data.test.is_empty();
        held_out && (!self.rewards.is_empty() || self.preference.is_some())
    }

    /// What becomes of the rows to train on, in the order of the stages; what their type tells, where no stage learns from them.
    pub fn uses(&self) -> Vec<Use<'_>> {
        let uses = each_once(self.stages().iter().flat_map(|stage| stage.rows()).filter_map(Rows::used));
        if uses.is_empty() { vec![Use::Learn] } else { uses }
    }

    /// What becomes of held-out rows.
    pub fn held_out_uses(&self) -> Vec<Use<'_>> {
        let scoring = self.stages().into_iter().find(|stage| stage.is_scoring());
        match scoring {
            Some(scoring) => scoring.rows().into_iter().filter_map(Rows::used).collect(),
            None if self.preference.is_some() && self.rewards.is_empty() => vec![Use::Compare],
            None => vec![Use::Answer],
        }
    }

    /// The models behind the rewards, each once.
    pub fn reward_models(&self) -> Vec<&str> {
        fn models(reward: &RewardConfig) -> &[String] {
            match &reward.kind {
                RewardKind::Model(options) => &options.models,
                _ => &[],
            }
        }
        each_once(self.rewards.iter().flat_map(models).map(String::as_str))
    }

    /// How the first stage that samples does so, and the option of its longest answer; without one, how `[grpo]` does.
    pub fn sampling(&self) -> (String, SamplingOptions) {
        let first = self.stages().into_iter().find_map(|stage| Some((stage.method(), stage.sampling()?.clone())));
        let (method, sampling) = first.unwrap_or(("grpo", SamplingOptions::default()));
        (format!("{method}.sampling.max_new_tokens"), sampling)
    }

    /// Tokens of the longest answer that a stage samples.
    pub fn longest_answer(&self) -> usize {
        let longest =
            self.stages().into_iter().filter_map(Stage::sampling).map(|sampling| sampling.max_new_tokens).max();
        longest.unwrap_or(0)
    }

    /// The whole recipe as TOML, every option resolved.
    pub fn to_toml(&self) -> Result<String, Failure> {
        to_toml(self)
    }

    /// SHA-256 over everything that decides what a run computes.
    pub fn hash(&self) -> Result<String, Failure> {
        let canonical = Self { output_dir: None, ..self.clone() };
        let text = serde_json::to_string(&canonical)
            .map_err(|error| Failure::new(format!("cannot hash the configuration: {error}")))?;
        Ok(base::files::sha256_of(text.as_bytes()))
    }
}
