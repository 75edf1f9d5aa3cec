//! Another model as the judge of answers.
//!
//! The judge is asked once for each answer, by a template that the prompt, the completion and the row's columns fill, and
//! must reply with a number between `low` and `high` inside the last `<score>...</score>`. The value is that number's place
//! in the range, from 0 to 1. Where the range begins at 0, `8/10` is 8 if it ends at 10. Nothing else is read into a reply: one
//! without such a number is a failure of the judge, with status `error`, and never a score.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::process::OnError;
use super::{Reward, RewardError};
use crate::partner::{Line, Partner, PartnerConfig, PartnerError, ask_all};
use crate::score::{Answer, Score, Status};
use crate::verify::{Place, number};

/// Tag around the judge's number.
const TAG: &str = "score";

/// Options of the `judge` reward: another model says how good an answer is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JudgeOptions {
    /// The judge.
    pub partner: PartnerConfig,
    /// What the judge is asked. `{prompt}`, `{completion}` and `{COLUMN}` stand for the prompt, the answer and a column of
    /// its row; doubled braces are braces. It must ask for the score inside `<score></score>`.
    #[serde(default = "default_template")]
    pub template: String,
    /// System message for the judge; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// The score of the worst answer.
    #[serde(default)]
    pub low: f64,
    /// The score of the best answer.
    #[serde(default = "default_high")]
    pub high: f64,
    /// Value, from 0 to 1, from which on an answer's status is `ok`; below it is `wrong`.
    #[serde(default = "default_passes")]
    pub passes: f64,
    /// What to do when the judge cannot be reached, or replies without a score.
    #[serde(default)]
    pub on_error: OnError,
}

fn default_template() -> String {
    "Judge the answer to this prompt.\n\n[prompt]\n{prompt}\n[end of prompt]\n\n[answer]\n{completion}\n[end of answer]\n\n\
     Say briefly what is right and wrong with the answer, then give it a score from 0 (useless) to 10 (perfect) as \
     <score>NUMBER</score>."
        .into()
}

fn default_high() -> f64 {
    10.0
}

fn default_passes() -> f64 {
    0.5
}

/// See [`JudgeOptions`].
pub struct JudgeReward {
    name: String,
    options: JudgeOptions,
    partner: Box<dyn Partner>,
}

impl JudgeReward {
    /// The reward under a name.
    ///
    /// # Errors
    /// An option with an impossible value.
    pub fn new(name: String, options: JudgeOptions) -> Result<Self, RewardError> {
        let refuse = |reason: String| Err(RewardError::Options { reward: name.clone(), reason });
        if !(options.low.is_finite() && options.high.is_finite() && options.low < options.high) {
            return refuse(format!("low is {} and high is {}, expected low < high", options.low, options.high));
        }
        if !(0.0..=1.0).contains(&options.passes) {
            return refuse(format!("passes is {}, expected 0 to 1", options.passes));
        }
        if !options.template.contains("{completion}") {
            return refuse("template has no {completion}, so that the judge would not see the answer".into());
        }
        let partner = match options.partner.build() {
            Ok(partner) => partner,
            Err(error) => return refuse(error.to_string()),
        };
        Ok(Self { name, options, partner })
    }

    fn question(&self, row: usize, answer: &Answer<'_>) -> Result<Vec<Line>, RewardError> {
        let value = |name: &str| match name {
            "prompt" => Some(answer.prompt_text.to_owned()),
            "completion" => Some(answer.completion.to_owned()),
            column => answer.columns.get(column).map(|value| match value {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            }),
        };
        let filled = fill(&self.options.template, value).map_err(|column| RewardError::MissingColumn {
            reward: self.name.clone(),
            row,
            column,
        })?;
        let system = self.options.system.iter().map(|text| Line::new("system", text));
        Ok(system.chain([Line::new("user", filled)]).collect())
    }

    /// The score in a reply; `None` where there is none.
    fn read(&self, reply: &str) -> Option<Score> {
        let JudgeOptions { low, high, passes, .. } = self.options;
        let stated = Place::Tag.find(reply, TAG)?;
        let score = match stated.split_once('/') {
            Some((score, of)) if low == 0.0 && number::parse(of)?.to_f64() == high => score,
            None if !stated.contains(r"\frac") => stated,
            // Of any other fraction it is not said whether it is a number or a share of the range.
            _ => return None,
        };
        let number = number::parse(score)?.to_f64();
        let value = (number - low) / (high - low);
        let status = if value >= passes { Status::Ok } else { Status::Wrong };
        (0.0..=1.0).contains(&value).then(|| Score::new(value, status))
    }
}

impl Reward for JudgeReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let questions: Vec<Vec<Line>> =
            answers.iter().enumerate().map(|(row, answer)| self.question(row, answer)).collect::<Result<_, _>>()?;
        let failed = |source: PartnerError| match self.options.on_error {
            OnError::Stop => Err(RewardError::Partner { reward: self.name.clone(), source }),
            OnError::Score => Ok(Some(Score::verdict(Status::Error))),
        };
        let judge = |reply: Result<_, PartnerError>| match reply {
            Err(error) => failed(error),
            Ok(crate::partner::Reply { text, truncated }) => match self.read(&text) {
                Some(score) => Ok(Some(score)),
                None => failed(PartnerError::NoScore {
                    expected: format!("<{TAG}> with a number from {} to {}", self.options.low, self.options.high),
                    reply: super::shorten(&text),
                    truncated,
                }),
            },
        };
        ask_all(&*self.partner, &questions).into_iter().map(judge).collect()
    }
}

/// Fills `{NAME}` by values, in one pass: nothing inside a value is filled again.
///
/// # Errors
/// The name that has no value.
fn fill(template: &str, value: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut text = String::new();
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        text.push_str(&rest[..at]);
        let brace = &rest[at..at + 1];
        let after = &rest[at + 1..];
        rest = if let Some(after) = after.strip_prefix(brace) {
            text.push_str(brace);
            after
        } else if brace == "{"
            && let Some((name, after)) = after.split_once('}')
        {
            text.push_str(&value(name).ok_or_else(|| name.to_owned())?);
            after
        } else {
            text.push_str(brace);
            after
        };
    }
    text.push_str(rest);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::fill;

    #[test]
    fn values_are_filled_once_and_braces_can_be_written() {
        let value = |name: &str| (name == "a").then(|| "{b}{{".to_owned());
        assert_eq!(fill("x{a}y", value), Ok("x{b}{{y".into()));
        assert_eq!(fill("{{a}} }{{", value), Ok("{a} }{".into()));
        assert_eq!(fill("{missing}", value), Err("missing".into()));
        assert_eq!(fill("open {a", value), Ok("open {a".into()));
    }
}
