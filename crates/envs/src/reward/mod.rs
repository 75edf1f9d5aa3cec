//! Rewards: judges of answers, by name and in weighted combination.

pub mod confidence;
pub mod judge;
pub mod length;
pub mod model;
pub mod process;
pub mod shaping;
mod weighted;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::score::{Answer, Score, Status};
use crate::verify::{ExpressionOptions, FormatOptions, NumberOptions};
pub use confidence::ConfidenceOptions;
pub use judge::JudgeOptions;
pub use length::LengthOptions;
pub use model::ModelRewardOptions;
pub use process::ProcessOptions;
pub use shaping::{Shaped, Shaping};
pub use weighted::Weighted;

/// A judge of answers.
pub trait Reward: Send + Sync {
    /// The name under which its values are logged, as in `rewards/NAME/mean`.
    fn name(&self) -> &str;

    /// Scores a batch of answers: one entry for each, in order. `None` means that the reward does not apply to the
    /// answer's row.
    ///
    /// # Errors
    /// Only what makes every further score meaningless: a row without the expected column, an external command that
    /// cannot be run. A bad *answer* is never an error, it is a [`Score`].
    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError>;

    /// What further scores depend on beside their answers, for a checkpoint: null for most rewards, which depend on nothing else.
    fn state(&self) -> Value {
        Value::Null
    }

    /// Goes back to a state that [`Reward::state`] gave, or with null to that of a new reward.
    ///
    /// # Errors
    /// A state of another reward.
    fn restore(&self, state: &Value) -> Result<(), RewardError> {
        match state {
            Value::Null => Ok(()),
            _ => Err(RewardError::state(self.name(), state, "nothing, since it depends on answers alone")),
        }
    }
}

/// The reward that applies to no row: for environments, which pay by themselves.
pub struct Silent;

impl Reward for Silent {
    fn name(&self) -> &str {
        "silent"
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        Ok(vec![None; answers.len()])
    }
}

/// Why a reward could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum RewardError {
    /// A row lacks what the reward compares answers with.
    #[error("reward {reward}: row {row} of the batch has no column {column:?}")]
    MissingColumn {
        /// The reward's name.
        reward: String,
        /// The answer's place in the batch.
        row: usize,
        /// The column looked for.
        column: String,
    },
    /// The expected answer itself cannot be read.
    #[error("reward {reward}: row {row} of the batch expects {found} in column {column:?}, which is not {expected}")]
    BadColumn {
        /// The reward's name.
        reward: String,
        /// The answer's place in the batch.
        row: usize,
        /// The column.
        column: String,
        /// What is there.
        found: String,
        /// What should be.
        expected: &'static str,
    },
    /// An option has an impossible value.
    #[error("reward {reward}: {reason}")]
    Options {
        /// The reward's name.
        reward: String,
        /// Which option, the value found, and what is expected.
        reason: String,
    },
    /// A checkpoint holds the state of another reward.
    #[error("reward {reward}: it cannot go on from {found}, expected {expected}")]
    State {
        /// The reward's name.
        reward: String,
        /// The state, shortened.
        found: String,
        /// What it would be.
        expected: &'static str,
    },
    /// An external reward command failed and its options say to stop the run.
    #[error("reward {reward}: the command {command:?} {reason}")]
    Process {
        /// The reward's name.
        reward: String,
        /// The command line.
        command: String,
        /// What happened.
        reason: String,
    },
    /// Another model that judges did not answer, or not with a score, and its options say to stop the run.
    #[error("reward {reward}: {source}")]
    Partner {
        /// The reward's name.
        reward: String,
        /// What happened.
        source: crate::partner::PartnerError,
    },
    /// A reward model that cannot be used, or an answer that it cannot read.
    #[error("reward {reward}: {reason}")]
    Model {
        /// The reward's name.
        reward: String,
        /// Which model or answer, and why.
        reason: String,
    },
    /// A reward returned another number of scores than answers.
    #[error("reward {reward} returned {found} scores for {expected} answers")]
    Count {
        /// The reward's name.
        reward: String,
        /// Answers given.
        expected: usize,
        /// Scores returned.
        found: usize,
    },
}

impl RewardError {
    fn state(reward: &str, found: &Value, expected: &'static str) -> Self {
        Self::State { reward: reward.to_owned(), found: shorten(&found.to_string()), expected }
    }
}

impl base::Hint for RewardError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::MissingColumn { .. } => {
                Some("set the reward's `column` to the name of the column with the answer".into())
            }
            Self::BadColumn { .. } => Some("check the data set, or choose a reward that fits its answers".into()),
            Self::Options { .. } => Some("`posttrain config explain rewards` lists every option".into()),
            Self::Process { .. } => Some(
                "try the command by hand: it reads one JSON object a line from stdin and writes one a line to stdout"
                    .into(),
            ),
            Self::Partner { source, .. } => source.hint(),
            Self::State { .. } | Self::Model { .. } | Self::Count { .. } => None,
        }
    }
}

/// One reward of a run: what it is, how it is called and how much it counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RewardConfig {
    /// Name under which the reward is logged; its type if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Factor of its value in the total reward.
    #[serde(default = "one")]
    pub weight: f64,
    /// How the reward is shaped before it is paid; absent, it is paid as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shaping: Option<Shaping>,
    /// The reward and its options, chosen by `type`.
    #[serde(flatten)]
    pub kind: RewardKind,
}

fn one() -> f64 {
    1.0
}

impl RewardConfig {
    /// A reward of weight 1 under its type's name.
    pub fn new(kind: RewardKind) -> Self {
        Self { name: None, weight: 1.0, shaping: None, kind }
    }

    /// The reward as it is, whatever is paid for it: what answers are judged by.
    pub fn unshaped(&self) -> Self {
        Self { shaping: None, ..self.clone() }
    }

    /// The name under which the reward is logged.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(self.kind.name())
    }

    /// Checks the options without loading anything.
    ///
    /// # Errors
    /// An option with an impossible value.
    pub fn validate(&self) -> Result<(), RewardError> {
        match &self.kind {
            RewardKind::Model(options) => options.validate(self.name()),
            _ => self.build().map(drop),
        }
    }

    /// Makes the reward, which must be none that needs a model.
    ///
    /// # Errors
    /// As [`RewardConfig::build_with`].
    pub fn build(&self) -> Result<Box<dyn Reward>, RewardError> {
        self.build_with(&mut |reward, _| {
            let (reward, reason) = (reward.to_owned(), "it needs a model, and none can be loaded here".to_owned());
            Err(RewardError::Model { reward, reason })
        })
    }

    /// Makes the reward; `models` makes those that need a model, from their name and options.
    ///
    /// # Errors
    /// An option with an impossible value; a model that cannot be used. An external command is only started by the first score.
    pub fn build_with(&self, models: MakeModelReward<'_>) -> Result<Box<dyn Reward>, RewardError> {
        let name = self.name().to_owned();
        let reward: Box<dyn Reward> = match &self.kind {
            RewardKind::Number(options) => Box::new(crate::verify::number::NumberReward::new(name, options.clone())?),
            RewardKind::Expression(options) => {
                Box::new(crate::verify::expression::ExpressionReward::new(name, options.clone())?)
            }
            RewardKind::Format(options) => Box::new(crate::verify::format::FormatReward::new(name, options.clone())?),
            RewardKind::Length(options) => Box::new(length::LengthReward::new(name, options.clone())?),
            RewardKind::Confidence(options) => Box::new(confidence::ConfidenceReward::new(name, options.clone())?),
            RewardKind::Judge(options) => Box::new(judge::JudgeReward::new(name, options.clone())?),
            RewardKind::Process(options) => Box::new(process::ProcessReward::new(name, options.clone())?),
            RewardKind::Model(options) => {
                options.validate(&name)?;
                models(&name, options)?
            }
        };
        Ok(match &self.shaping {
            Some(shaping) => Box::new(Shaped::new(reward, shaping.clone())),
            None => reward,
        })
    }
}

/// The rewards that can be named in a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RewardKind {
    /// 1 when the answer's number equals the expected one.
    Number(NumberOptions),
    /// 1 when the answer's arithmetic expression has the expected value.
    Expression(ExpressionOptions),
    /// 1 when the answer is laid out as asked, whatever it says.
    Format(FormatOptions),
    /// A penalty on long answers.
    Length(LengthOptions),
    /// A bet on one's own answer, by the confidence stated with it.
    Confidence(ConfidenceOptions),
    /// An external command that scores answers over JSON lines.
    Process(ProcessOptions),
    /// Another model that says how good an answer is.
    Judge(JudgeOptions),
    /// What one or several reward models say.
    Model(ModelRewardOptions),
}

/// What makes a reward of models, given its name and options.
pub type MakeModelReward<'a> = &'a mut dyn FnMut(&str, &ModelRewardOptions) -> Result<Box<dyn Reward>, RewardError>;

impl RewardKind {
    /// The column with the right answer, where the reward compares with one.
    pub fn column(&self) -> Option<&str> {
        match self {
            Self::Number(options) => Some(&options.column),
            Self::Expression(options) => Some(&options.column),
            Self::Confidence(options) => Some(&options.column),
            Self::Format(_) | Self::Length(_) | Self::Process(_) | Self::Judge(_) | Self::Model(_) => None,
        }
    }

    /// The value of `type` in a configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Number(_) => "number",
            Self::Expression(_) => "expression",
            Self::Format(_) => "format",
            Self::Length(_) => "length",
            Self::Process(_) => "process",
            Self::Confidence(_) => "confidence",
            Self::Judge(_) => "judge",
            Self::Model(_) => "model",
        }
    }
}

/// Scores every answer by its verdict against the gold value that `parse` reads from its row's column.
///
/// A row whose column is missing or can't be read is an error that says which row, and that `kind` was expected.
pub(crate) fn against_gold<T>(
    reward: &str,
    column: &str,
    kind: &'static str,
    answers: &[Answer<'_>],
    parse: impl Fn(&str) -> Option<T>,
    verify: impl Fn(&str, T) -> Status,
) -> Result<Vec<Option<Score>>, RewardError> {
    let score = |(row, answer): (usize, &Answer<'_>)| {
        let text = expected(reward, row, answer, column)?;
        let gold = parse(&text).ok_or_else(|| RewardError::BadColumn {
            reward: reward.into(),
            row,
            column: column.into(),
            found: shorten(&format!("{text:?}")),
            expected: kind,
        })?;
        Ok(Some(Score::verdict(verify(answer.completion, gold))))
    };
    answers.iter().enumerate().map(score).collect()
}

/// The expected answer of a row: column `column` of `answer`, as text.
///
/// Text and numbers are taken as they are; everything else is refused.
fn expected<'a>(
    reward: &str,
    row: usize,
    answer: &Answer<'a>,
    column: &str,
) -> Result<std::borrow::Cow<'a, str>, RewardError> {
    use serde_json::Value;
    match answer.columns.get(column) {
        Some(Value::String(text)) => Ok(text.as_str().into()),
        Some(Value::Number(number)) => Ok(number.to_string().into()),
        None => Err(RewardError::MissingColumn { reward: reward.into(), row, column: column.into() }),
        Some(other) => Err(RewardError::BadColumn {
            reward: reward.into(),
            row,
            column: column.into(),
            found: shorten(&other.to_string()),
            expected: "a text or a number",
        }),
    }
}

/// At most 80 characters of `text`, for messages.
pub(crate) fn shorten(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
