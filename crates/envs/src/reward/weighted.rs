//! Several rewards as one.

use serde_json::{Map, Value};

use super::{MakeModelReward, Reward, RewardConfig, RewardError};
use crate::score::{Answer, Score, SpanScore, Status};

/// The weighted sum of several rewards.
///
/// The value is `Σ weight · value` over the rewards that apply to the row. As in TRL, one that does not apply (`None`)
/// contributes nothing and the other weights stay as they are: they are not renormalised, so rows that fewer rewards
/// apply to have a smaller range. The sum is `None` only where no reward applies.
///
/// The status is that of the first reward that applies, in the order of the list: put the verifier first and the rewards
/// that shape the value after it. Only a [`Status::Timeout`] or [`Status::Error`] of a later reward comes before it, since
/// a verifier's failure must not hide behind another's success.
///
/// The spans are those of all members. Each is paid what its own member pays for it, and what the others pay for the answer.
///
/// The parts are each applying reward's unweighted value under its name, followed by its own parts as `NAME/PART`.
pub struct Weighted {
    name: String,
    members: Vec<(f64, Box<dyn Reward>)>,
}

impl Weighted {
    /// Combines `members`, pairs of weight and reward.
    ///
    /// # Errors
    /// No member, a weight that is not finite, or two members of one name.
    pub fn new(members: Vec<(f64, Box<dyn Reward>)>) -> Result<Self, RewardError> {
        let refuse = |reward: &str, reason: String| Err(RewardError::Options { reward: reward.into(), reason });
        if members.is_empty() {
            return refuse("list", "it is empty, expected at least one reward".into());
        }
        for (index, (weight, member)) in members.iter().enumerate() {
            if !weight.is_finite() {
                return refuse(member.name(), format!("weight is {weight}, expected a finite number"));
            }
            if members[..index].iter().any(|(_, other)| other.name() == member.name()) {
                return refuse(member.name(), "two rewards have this name; give one of them another `name`".into());
            }
        }
        Ok(Self { name: "reward".into(), members })
    }

    /// Builds and combines the rewards of a configuration, none of which may need a model.
    ///
    /// # Errors
    /// Those of [`Weighted::new`] and [`RewardConfig::build`].
    pub fn from_configs(configs: &[RewardConfig]) -> Result<Self, RewardError> {
        Self::new(
            configs.iter().map(|config| Ok((config.weight, config.build()?))).collect::<Result<_, RewardError>>()?,
        )
    }

    /// The same, where `models` makes those that need a model.
    ///
    /// # Errors
    /// Those of [`Weighted::new`] and [`RewardConfig::build_with`].
    pub fn from_configs_with(configs: &[RewardConfig], models: MakeModelReward<'_>) -> Result<Self, RewardError> {
        let mut members = Vec::with_capacity(configs.len());
        for config in configs {
            members.push((config.weight, config.build_with(models)?));
        }
        Self::new(members)
    }

    /// The names of the members, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|(_, member)| member.name())
    }
}

impl Reward for Weighted {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let mut totals: Vec<Option<Score>> = vec![None; answers.len()];
        for (weight, member) in &self.members {
            let scores = member.score(answers)?;
            if scores.len() != answers.len() {
                return Err(RewardError::Count {
                    reward: member.name().into(),
                    expected: answers.len(),
                    found: scores.len(),
                });
            }
            for (total, score) in totals.iter_mut().zip(scores) {
                let Some(score) = score else { continue };
                let total = total.get_or_insert_with(|| Score::new(0.0, score.status));
                total.value += weight * score.value;
                // By how much more than the answer, whose total is known when every member has been asked.
                let lead = |SpanScore { text, reward }| SpanScore { text, reward: weight * (reward - score.value) };
                total.spans.extend(score.spans.into_iter().map(lead));
                if matches!(score.status, Status::Timeout | Status::Error) && total.status < score.status {
                    total.status = score.status;
                }
                total.parts.push((member.name().into(), score.value));
                total
                    .parts
                    .extend(score.parts.into_iter().map(|(part, value)| (format!("{}/{part}", member.name()), value)));
            }
        }
        for total in totals.iter_mut().flatten() {
            total.spans.iter_mut().for_each(|span| span.reward += total.value);
            total.spans.sort_by_key(|span| span.text.start);
        }
        Ok(totals)
    }

    fn state(&self) -> Value {
        let states = self.members.iter().map(|(_, member)| (member.name().to_owned(), member.state()));
        let states: Map<String, Value> = states.filter(|(_, state)| !state.is_null()).collect();
        if states.is_empty() { Value::Null } else { states.into() }
    }

    fn restore(&self, state: &Value) -> Result<(), RewardError> {
        self.members.iter().try_for_each(|(_, member)| member.restore(state.get(member.name()).unwrap_or(&Value::Null)))
    }
}
