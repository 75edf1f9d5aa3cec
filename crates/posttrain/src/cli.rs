//! The command line: verbs, flags and their help.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use model::DeviceName;
use model::decoder::WeightFormat;

use crate::config::Precision;

/// Post-training of language models: one binary, exact numbers.
#[derive(Debug, Parser)]
#[command(name = "posttrain", version, max_term_width = 100, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 stopped by the referee, 130 interrupted and saved."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Flags every verb takes.
    #[command(flatten)]
    pub global: Global,
}

/// Flags every verb takes.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Threads to compute with; results do not depend on it [default: one per core]
    #[arg(long, global = true, value_name = "N", help_heading = "Global options", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Print results only: no progress, no notes
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub quiet: bool,
    /// Print without colours (also with the environment variable NO_COLOR)
    #[arg(long, global = true, help_heading = "Global options")]
    pub no_color: bool,
    /// Never use the network; models must be in the cache already
    #[arg(long, global = true, help_heading = "Global options")]
    pub offline: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Post-train a model as a recipe says: evaluate, train, evaluate again, write run and report
    Train(Train),
    /// Go on with a run that was interrupted or killed, to the same bytes
    Resume(Resume),
    /// Complete prompts
    Generate(Generate),
    /// Talk to a model
    Chat(Chat),
    /// Measure a model on held-out problems
    Eval(Eval),
    /// Play a recipe's environment yourself
    Play(Play),
    /// Fetch a named model into the cache and print its folder
    Pull(Pull),
    /// List the named models and which of them are cached
    Models,
    /// Fold the LoRA adapter of a run into the weights, or average the weights of several models
    Merge(Merge),
    /// Search sums of models' weights for those that no other beats in a recipe's rewards
    #[command(
        after_help = "Answers with the policy for a preference: posttrain generate --frontier FILE --preference 0.3,0.7"
    )]
    Frontier(Frontier),
    /// Mix models that were trained for different objectives
    Mix {
        /// What to do.
        #[command(subcommand)]
        command: MixCommand,
    },
    /// List the training methods
    Methods,
    /// Say what a training method is: formula, paper, settings, every default, metrics
    Explain(Explain),
    /// List the published systems that can be reproduced, their claims, and whether these hold
    Systems(Systems),
    /// Train a published system, its baselines and ablations over seeds, and say claim by claim whether it holds
    Reproduce(Reproduce),
    /// Look at data before anything is trained on it
    Data {
        /// What to do.
        #[command(subcommand)]
        command: DataCommand,
    },
    /// Look at rewards before anything is paid by them
    Reward {
        /// What to do.
        #[command(subcommand)]
        command: RewardCommand,
    },
    /// Explain options, print their schema
    Config {
        /// What to print.
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Check this machine: processor, memory, disk, cache, Python
    Doctor,
    /// Measure each phase of training and generation against what this machine could do at best
    Bench(Bench),
}

/// One configuration from files and flags.
#[derive(Clone, Debug, Args)]
pub struct Recipe {
    /// Recipe files; a later one overrides single keys of an earlier one
    #[arg(required = true, value_name = "RECIPE")]
    pub recipes: Vec<PathBuf>,
    /// Override one option, for example `--set grpo.training.learning_rate=1e-6` or `--set rewards.0.weight=0.5`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// `posttrain train`
#[derive(Debug, Args)]
pub struct Train {
    /// The configuration.
    #[command(flatten)]
    pub recipe: Recipe,
    /// Folder of the run [default: `output_dir` of the recipe, else runs/RECIPE]
    #[arg(long, short, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Print the resolved configuration with an estimate of memory and time, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Replace a run that is already there
    #[arg(long)]
    pub overwrite: bool,
}

/// `posttrain explain`
#[derive(Debug, Args)]
pub struct Explain {
    /// A method, or a section of a recipe
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Print the page of docs/methods; with the name of a section, that of all its methods
    #[arg(long)]
    pub markdown: bool,
}

/// `posttrain resume`
#[derive(Debug, Args)]
pub struct Resume {
    /// The folder of the run
    #[arg(value_name = "DIR")]
    pub run: PathBuf,
}

/// Which model.
#[derive(Clone, Debug, Args)]
pub struct Model {
    /// A named model, a Hugging Face folder, a run or checkpoint folder, or a GGUF file
    #[arg(long, short, value_name = "MODEL", default_value = "smollm2-135m-instruct")]
    pub model: String,
    /// Number format of the matrix products
    #[arg(long, value_enum, default_value_t = Precision::Bf16)]
    pub precision: Precision,
    /// How weights are stored while answers are made
    #[arg(long, value_enum, default_value_t = Weights::Full)]
    pub weights: Weights,
    /// Where to compute: cpu, cuda or cuda:N
    #[arg(long, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
}

/// How weights are stored for generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Weights {
    /// As the precision says
    Full,
    /// Rounded to 8 bits in blocks of 32: smaller than bf16, not faster, answers a little different
    Int8,
}

impl From<Weights> for WeightFormat {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::Full => Self::Full,
            Weights::Int8 => Self::Int8,
        }
    }
}

/// How to sample.
#[derive(Clone, Debug, Args)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the most likely token
    #[arg(long, default_value_t = 0.7)]
    pub temperature: f64,
    /// Sample from the smallest set of tokens with this probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Sample from the K most likely tokens
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Drop tokens less likely than this share of the most likely one
    #[arg(long, value_name = "P")]
    pub min_p: Option<f64>,
    /// Longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_new_tokens: usize,
    /// Stop at this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Seed of the sampler; the same seed gives the same answer
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Several models that answer as one.
#[derive(Clone, Debug, Args)]
pub struct Several {
    /// Answer with a policy of this file, which `posttrain frontier` wrote: the one that is best for `--preference`
    #[arg(long, help_heading = "Several models", value_name = "FILE", requires = "preference", conflicts_with_all = ["model", "mix"])]
    pub frontier: Option<PathBuf>,
    /// How much each objective of the frontier counts, in the order of the file, for example `0.3,0.7`
    #[arg(long, help_heading = "Several models", value_name = "SHARE", value_delimiter = ',', requires = "frontier")]
    pub preference: Vec<f64>,
    /// How the objectives are weighed [default: linear]
    #[arg(long, help_heading = "Several models", value_enum, requires = "frontier")]
    pub utility: Option<Utility>,
    /// What a nat of divergence from the model before training costs, in standard deviations of an objective [default: 0]
    #[arg(long, help_heading = "Several models", value_name = "COST", requires = "frontier", value_parser = finite)]
    pub kl_weight: Option<f64>,
    /// Answer with a mixture of models that were trained from one, each by its share; repeat for every model
    #[arg(long, help_heading = "Several models", value_name = "MODEL", conflicts_with = "model")]
    pub mix: Vec<String>,
    /// Share of each model of the mixture, scaled to a sum of one [default: equal]
    #[arg(long, help_heading = "Several models", value_name = "SHARE", value_delimiter = ',', requires = "mix")]
    pub shares: Vec<f64>,
    /// Of so many candidates of the mixture, answer with one by the mixture's law of whole answers; 1 mixes token by token
    #[arg(long, help_heading = "Several models", value_name = "N", default_value_t = 1, requires = "mix", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub candidates: u32,
}

/// A number that is one.
fn finite(text: &str) -> Result<f64, String> {
    let number = text.parse().map_err(|_| "expected a number".to_owned())?;
    if f64::is_finite(number) { Ok(number) } else { Err("expected a finite number".into()) }
}

/// A number above 0.
fn positive(text: &str) -> Result<f64, String> {
    finite(text).ok().filter(|number| *number > 0.0).ok_or_else(|| "expected a finite number above 0".into())
}

/// How objectives are weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Utility {
    /// By their weighted sum
    Linear,
    /// By the largest weighted distance to the best of each: reaches every policy of a frontier
    Chebyshev,
}

impl From<Utility> for eval::Scalarisation {
    fn from(utility: Utility) -> Self {
        match utility {
            Utility::Linear => Self::Linear,
            Utility::Chebyshev => Self::Chebyshev,
        }
    }
}

/// What has coefficients of its own in a frontier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Granularity {
    /// A model.
    Global,
    /// Each layer, and what lies outside of the layers, after a search for models.
    Block,
}

impl From<Granularity> for train::frontier::Granularity {
    fn from(granularity: Granularity) -> Self {
        match granularity {
            Granularity::Global => Self::Global,
            Granularity::Block => Self::Block,
        }
    }
}

/// `posttrain frontier`
#[derive(Debug, Args)]
pub struct Frontier {
    /// The recipe whose model the others were trained from, whose rewards are the objectives, and on whose rows to measure.
    #[command(flatten)]
    pub recipe: Recipe,
    /// A model that was trained from the recipe's, for one objective; repeat for every model
    #[arg(long = "model", short, value_name = "MODEL", required = true)]
    pub models: Vec<String>,
    /// Prompts to measure on, taken evenly from the rows to train on
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub prompts: u32,
    /// Answers to each prompt where a candidate is measured most surely
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub samples: u32,
    /// Smallest value added to the coefficients of the even average
    #[arg(long, value_name = "PHI", default_value_t = -0.5, allow_negative_numbers = true)]
    pub low: f64,
    /// Largest value added to them
    #[arg(long, value_name = "PHI", default_value_t = 1.5, allow_negative_numbers = true)]
    pub high: f64,
    /// Values from the smallest to the largest
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(2..=101))]
    pub grid: u32,
    /// Averages of two models that are tried, too
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u32).range(2..=1001))]
    pub averages: u32,
    /// Rounds of half steps around what is left
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=10))]
    pub refinements: u32,
    /// What has coefficients of its own: a whole model, or each of its blocks, too: the layers and what lies outside of them
    #[arg(long, value_enum, default_value_t = Granularity::Global)]
    pub granularity: Granularity,
    /// How often the better half of the candidates is measured again with twice the answers; each time halves those of the first look
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=10))]
    pub halvings: u32,
    /// Drop candidates that are more than so many times as perplexed by the first model's answers as that model is
    #[arg(long, value_name = "RATIO", default_value_t = 1.5)]
    pub max_perplexity_ratio: f64,
    /// Where to write the frontier, as JSON
    #[arg(long, short, value_name = "FILE")]
    pub out: PathBuf,
}

/// `posttrain mix`
#[derive(Debug, Subcommand)]
pub enum MixCommand {
    /// Find the shares with which the worst-off objective is best off
    Weights(MixWeights),
}

/// `posttrain mix weights`
#[derive(Debug, Args)]
pub struct MixWeights {
    /// The recipe whose model the others were trained from, and whose rows to answer.
    #[command(flatten)]
    pub recipe: Recipe,
    /// A model that was trained from the recipe's for one objective, with the same beta as the others; repeat for every model
    #[arg(long, value_name = "MODEL", required = true)]
    pub mix: Vec<String>,
    /// Prompts to answer, taken evenly from the rows to train on
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub prompts: u32,
    /// Responses to each prompt
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub responses: u32,
    /// Longest response, in tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_new_tokens: usize,
    /// Let the mixed models respond in turn, rather than the recipe's: where that one hardly ever answers as they do
    #[arg(long)]
    pub from_models: bool,
    /// Steps of mirror descent
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// Its step size times the root of the steps
    #[arg(long, value_name = "C", default_value_t = 1.0, value_parser = positive)]
    pub rate: f64,
    /// Print one JSON object with everything instead
    #[arg(long)]
    pub json: bool,
}

/// Who guides.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Value guidance")]
pub struct Guide {
    /// A value model of the same vocabulary, trained by `[q_sharp]` of a recipe: draw tokens that it expects a higher return
    /// of, without training the model
    #[arg(long, value_name = "VALUE_MODEL", conflicts_with = "mix")]
    pub guide: Option<String>,
    /// The price of a nat of divergence from the model, in units of the return: small guides hard
    #[arg(long, value_name = "ETA", default_value_t = 0.1, requires = "guide")]
    pub guide_eta: f64,
    /// The most probable tokens that are candidates at each position; others are dropped
    #[arg(long, value_name = "K", default_value_t = 20, requires = "guide")]
    pub guide_top_k: usize,
    /// The loss that the value model was trained with
    #[arg(long, value_enum, value_name = "LOSS", default_value_t = GuideLoss::Bernoulli, requires = "guide")]
    pub guide_loss: GuideLoss,
    /// Where the value model reads the value of a token: the `head` that it was trained with
    #[arg(long, value_enum, value_name = "HEAD", default_value_t = GuideHead::State, requires = "guide")]
    pub guide_head: GuideHead,
    /// The returns of the first and the last bin of a value model trained with `histogram`
    #[arg(long, num_args = 2, value_names = ["LOW", "HIGH"], default_values_t = [0.0, 1.0], allow_negative_numbers = true, requires = "guide")]
    pub guide_returns: Vec<f64>,
}

/// Where a value model reads the value of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GuideHead {
    /// At the token: one pass over all candidates
    State,
    /// Before the token, from outputs of its own: one pass over the last token
    Action,
}

/// What the outputs of a value model say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GuideLoss {
    /// The log-odds of a return of 1
    Bernoulli,
    /// The probabilities of several returns
    Histogram,
    /// The mean of the return
    Squared,
}

/// `posttrain generate`
#[derive(Debug, Args)]
pub struct Generate {
    /// The model.
    #[command(flatten)]
    pub model: Model,
    /// Several models in its place.
    #[command(flatten)]
    pub several: Several,
    /// The prompt, put into the model's chat template; without it prompts are read from standard input, one JSON object a
    /// line with `prompt` or `messages`, and answers are written likewise
    #[arg(long, short)]
    pub prompt: Option<String>,
    /// A system message for `--prompt`
    #[arg(long, requires = "prompt", conflicts_with = "raw")]
    pub system: Option<String>,
    /// Take prompts as plain text, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// Answers for each prompt
    #[arg(long, short, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub n: u32,
    /// How to sample.
    #[command(flatten)]
    pub sampling: Sampling,
    /// Who guides.
    #[command(flatten)]
    pub guide: Guide,
}

/// `posttrain chat`
#[derive(Debug, Args)]
pub struct Chat {
    /// The model.
    #[command(flatten)]
    pub model: Model,
    /// Several models in its place.
    #[command(flatten)]
    pub several: Several,
    /// A system message
    #[arg(long)]
    pub system: Option<String>,
    /// How to sample.
    #[command(flatten)]
    pub sampling: Sampling,
    /// Who guides.
    #[command(flatten)]
    pub guide: Guide,
}

/// `posttrain eval`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Eval {
    /// A measurement that needs no recipe.
    #[command(subcommand)]
    pub command: Option<EvalCommand>,
    /// The recipe whose held-out problems, rewards and sampling to use.
    #[command(flatten)]
    pub recipe: Recipe,
    /// The model to measure [default: the recipe's]
    #[arg(long, short, value_name = "MODEL")]
    pub model: Option<String>,
    /// How weights are stored while answers are made
    #[arg(long, value_enum, default_value_t = Weights::Full)]
    pub weights: Weights,
    /// Spend more than one completion on an answer, as `test_time` of the recipe says
    #[arg(long, value_enum, value_name = "STRATEGY")]
    pub test_time: Option<TestTime>,
    /// Write every answer with its score to this JSON-lines file
    #[arg(long, value_name = "FILE")]
    pub answers: Option<PathBuf>,
}

/// `posttrain eval`, without a recipe
#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// Ask questions with a confidence from 0 to 10, and say whether the confidences are true
    Calibration(Calibration),
    /// Say whether a model has forgotten some questions and kept what it knows of others: TOFU's measures
    Unlearning(Unlearning),
    /// Describe how much users disagree, and judge methods of personalisation by the scores they gave
    Personalized(Personalized),
}

/// `posttrain eval unlearning`
#[derive(Debug, Args)]
#[command(
    after_help = "Rows are TOFU's: `question`, `answer`, `paraphrased_answer` (to forget and to retain) and `perturbed_answer`,\n\
    a list of wrong answers. `posttrain systems data ce-u --out DIR` writes files of this form."
)]
pub struct Unlearning {
    /// The model.
    #[command(flatten)]
    pub model: Model,
    /// JSON lines with the questions to forget
    #[arg(long, value_name = "FILE")]
    pub forget: PathBuf,
    /// JSON lines with questions to retain
    #[arg(long, value_name = "FILE")]
    pub retain: Option<PathBuf>,
    /// JSON lines with questions about real authors, or anything else that is known by options
    #[arg(long, value_name = "FILE")]
    pub real_authors: Option<PathBuf>,
    /// JSON lines with questions about the world, by options
    #[arg(long, value_name = "FILE")]
    pub world_facts: Option<PathBuf>,
    /// A model that never saw the questions to forget: forget quality is how little the two can be told apart
    #[arg(long, value_name = "MODEL")]
    pub retain_model: Option<String>,
    /// Longest answer that the model gives by itself, in tokens
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=65_536))]
    pub max_new_tokens: usize,
    /// Print one JSON object with everything instead
    #[arg(long)]
    pub json: bool,
}

/// `posttrain eval personalized`
#[derive(Debug, Args)]
#[command(
    after_help = "Preferences: {\"user\": \"ada\", \"pair\": \"p17\", \"preferred\": 1}, and for everybody {\"skill\": \"safety\", \"pair\": \"s3\", \"preferred\": 2}.\n\
    Scores: {\"user\": \"ada\", \"pair\": \"p17\", \"scores\": [0.3, -1.2]}; without `user` for everybody; with `pairs_seen` from a model\n\
    that has seen so many of the user's pairs."
)]
pub struct Personalized {
    /// JSON lines with what users prefer, and with pairs of skills that should not depend on the user
    #[arg(long, value_name = "FILE")]
    pub preferences: PathBuf,
    /// A method and the JSON lines with its scores; may be repeated
    #[arg(long, required = true, value_name = "METHOD=FILE")]
    pub scores: Vec<String>,
    /// The method that gains and taxes are measured against [default: the first]
    #[arg(long, value_name = "METHOD")]
    pub reference: Option<String>,
    /// The method that has a user's own model, to which adaptation is the way
    #[arg(long, value_name = "METHOD")]
    pub own: Option<String>,
    /// Resamples of the intervals
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub resamples: u32,
    /// Seed of the resamples
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Print one JSON object with everything instead
    #[arg(long)]
    pub json: bool,
}

/// `posttrain eval calibration`
#[derive(Debug, Args)]
pub struct Calibration {
    /// JSON lines with `question` and `answer`: a text, a number, or a list of all that are right, and of lists of other names
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The model.
    #[command(flatten)]
    pub model: Model,
    /// Ask for all answers that are known, each with a confidence of its own; every one counts, and is right if it shares more than half of its words with
    /// one of the file's
    #[arg(long)]
    pub several: bool,
    /// The request for answer and confidence, in place of the usual one
    #[arg(long)]
    pub system: Option<String>,
    /// Answers to each question
    #[arg(long, short, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub n: u32,
    /// Write every answer to this file, one JSON object a line
    #[arg(long, value_name = "FILE")]
    pub answers: Option<PathBuf>,
    /// Answers to the same questions that `--answers` wrote for another model: say how much this one differs
    #[arg(long, value_name = "FILE")]
    pub before: Option<PathBuf>,
    /// Write the reliability diagram to this HTML file
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Print one JSON object with everything instead
    #[arg(long)]
    pub json: bool,
    /// How to sample.
    #[command(flatten)]
    pub sampling: Sampling,
}

/// `posttrain play`
#[derive(Debug, Args)]
pub struct Play {
    /// The recipe whose environment to play.
    #[command(flatten)]
    pub recipe: Recipe,
    /// The first episode
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub episode: u64,
    /// Play held-out episodes
    #[arg(long)]
    pub test: bool,
    /// Show how the episode is played perfectly
    #[arg(long)]
    pub solve: bool,
}

/// How an answer is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum TestTime {
    /// The sample that the judge values most
    BestOfN,
    /// The most frequent result
    Majority,
    /// The result with the largest sum of the judge's values
    WeightedVote,
    /// The most probable completion, by beams of tokens
    Beam,
    /// The best path of steps, by the judge
    StepBeam,
    /// Tree search over steps, by the judge
    Mcts,
}

impl From<TestTime> for eval::Strategy {
    fn from(strategy: TestTime) -> Self {
        match strategy {
            TestTime::BestOfN => Self::BestOfN,
            TestTime::Majority => Self::Majority,
            TestTime::WeightedVote => Self::WeightedVote,
            TestTime::Beam => Self::Beam,
            TestTime::StepBeam => Self::StepBeam,
            TestTime::Mcts => Self::Mcts,
        }
    }
}

/// `posttrain bench`
#[derive(Debug, Args)]
pub struct Bench {
    /// A named model, a Hugging Face folder, a run or checkpoint folder, or a GGUF file [default: SmolLM2-135M's shape
    /// with random weights, on whose values speed does not depend]
    #[arg(long, short, value_name = "MODEL")]
    pub model: Option<String>,
    /// Number format of the matrix products
    #[arg(long, value_enum, default_value_t = Precision::Bf16)]
    pub precision: Precision,
    /// Train a LoRA adapter (r = 16 on every projection) instead of all weights
    #[arg(long)]
    pub lora: bool,
    /// Sequences of a training step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub batch: u32,
    /// Tokens of each
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    pub length: u32,
    /// Sequences generated at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub decode_batch: u32,
    /// Tokens of their prompts
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub prompt: u32,
    /// Tokens generated for each
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(3..=1_048_576))]
    pub new_tokens: u32,
    /// Measurements of each phase, of which the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeats: u32,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// `posttrain systems`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Systems {
    /// Something else than the list.
    #[command(subcommand)]
    pub command: Option<SystemsCommand>,
    /// Folder with the files of evidence
    #[arg(long, value_name = "DIR", default_value = "evidence")]
    pub evidence: PathBuf,
    /// Print docs/systems.md
    #[arg(long)]
    pub markdown: bool,
}

/// `posttrain systems`, something else than the list
#[derive(Debug, Subcommand)]
pub enum SystemsCommand {
    /// Write the data of a system's world as files that `posttrain train` and `posttrain eval` read
    Data(SystemsData),
}

/// `posttrain systems data`
#[derive(Debug, Args)]
pub struct SystemsData {
    /// A system whose world is text
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Seed of the world
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Folder to write into
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,
}

/// `posttrain reproduce`
#[derive(Debug, Args)]
pub struct Reproduce {
    /// A system; `posttrain systems` lists them
    #[arg(value_name = "NAME", required_unless_present = "all", conflicts_with = "all")]
    pub name: Option<String>,
    /// Every system, and one page over all
    #[arg(long)]
    pub all: bool,
    /// Seeds, from the first on [default: 5; with --quick, 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub seeds: Option<u64>,
    /// The first seed. Evidence is judged with the seeds from 0 on; look for settings with others, from 1000 on, say
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    pub first_seed: u64,
    /// A short run that shows that everything works, and decides nothing
    #[arg(long)]
    pub quick: bool,
    /// Run these arms only; claims that need others are left open
    #[arg(long, value_name = "ARM", value_delimiter = ',', conflicts_with = "all")]
    pub arms: Vec<String>,
    /// Where finished trials are kept and the report is written; the same folder goes on from there
    #[arg(long, short, value_name = "DIR", default_value = "runs/systems")]
    pub output: PathBuf,
    /// Folder for the file of evidence; neither a quick run nor one with other settings or seeds or without some arms writes there
    #[arg(long, value_name = "DIR", default_value = "evidence")]
    pub evidence: PathBuf,
    /// Override one setting of the system, for example `--set ppo.objective.beta=0.1`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "all")]
    pub set: Vec<String>,
}

/// `posttrain pull`
#[derive(Debug, Args)]
pub struct Pull {
    /// A named model; `posttrain models` lists them
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// `posttrain merge`
#[derive(Debug, Args)]
pub struct Merge {
    /// The folder of a LoRA run; with `--average`, of every model
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// Average the weights of all models, their adapters merged
    #[arg(long)]
    pub average: bool,
    /// Shares of the models in the average, scaled to a sum of one [default: equal]
    #[arg(long, value_name = "SHARE", value_delimiter = ',', requires = "average")]
    pub shares: Vec<f64>,
    /// Where to write the merged model
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,
}

/// `posttrain data`
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Show what is learnt of rows, and find what is wrong with them; exits with 1 on errors
    #[command(
        after_help = "Errors are what training would refuse, or what would make its result worthless; warnings are the rest.\n\
        Learnt text is green, or stands between ⟦ and ⟧ where there are no colours."
    )]
    Validate(Validate),
}

/// `posttrain data validate`
#[derive(Debug, Args)]
pub struct Validate {
    /// A recipe (or several, as for `train`), or files with rows to train on
    #[arg(required = true, value_name = "RECIPE_OR_FILES")]
    pub sources: Vec<String>,
    /// Files with held-out rows [default: the recipe's]
    #[arg(long, value_name = "FILE")]
    pub test: Vec<String>,
    /// The model whose tokenizer and chat template are used [default: the recipe's]
    #[arg(long, short, value_name = "MODEL")]
    pub model: Option<String>,
    /// Override one option of the recipe; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Rows to show with their mask
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub show: usize,
    /// Rows to name for each finding
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub name: usize,
    /// Print one JSON object with everything instead
    #[arg(long)]
    pub json: bool,
}

/// `posttrain reward`
#[derive(Debug, Subcommand)]
pub enum RewardCommand {
    /// Pay answers that deserve nothing, and find those that are paid like the right one; exits with 1 if there are any
    Lint(Lint),
    /// Write the rows to train on with the rewards of answers of the model before training, for a reward's `shaping`
    References(References),
}

/// `posttrain reward references`
#[derive(Debug, Args)]
pub struct References {
    /// The recipe whose model to sample, whose rewards to ask, and whose rows to answer.
    #[command(flatten)]
    pub recipe: Recipe,
    /// Answers to each prompt
    #[arg(long, short, value_name = "M", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub n: u32,
    /// Where to write the rows, as JSON lines
    #[arg(long, short, value_name = "FILE")]
    pub out: PathBuf,
}

/// `posttrain reward lint`
#[derive(Debug, Args)]
pub struct Lint {
    /// The recipe whose rewards to pay and whose rows to pay them on.
    #[command(flatten)]
    pub recipe: Recipe,
    /// Rows to try every answer on, taken evenly from those to train on
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub rows: u32,
    /// Print one JSON object with everything instead
    #[arg(long)]
    pub json: bool,
}

/// `posttrain config`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Say what an option or a section means; without a key, print the whole reference
    Explain {
        /// Dotted key, for example `grpo.num_generations`
        #[arg(value_name = "KEY")]
        key: Option<String>,
    },
    /// Print the JSON schema of a recipe
    Schema,
}
