//! What an answer is worth, as a reward.

use envs::{Answer, Reward, RewardError, Score, Status};

use super::{Question, Utility};

/// A utility as a reward; the row's column `question` holds the number of its question.
pub struct Paid {
    name: &'static str,
    utility: Utility,
}

impl Paid {
    /// The reward of this name.
    pub fn new(name: &'static str, utility: Utility) -> Self {
        Self { name, utility }
    }
}

impl Question {
    /// The question of the answer at this place of a batch.
    ///
    /// # Errors
    /// A row that does not say so.
    pub fn asked(reward: &str, row: usize, answer: &Answer<'_>) -> Result<Self, RewardError> {
        let number = answer.columns.get("question").and_then(serde_json::Value::as_u64);
        number.and_then(|number| Self::numbered(number as u32)).ok_or_else(|| RewardError::MissingColumn {
            reward: reward.into(),
            row,
            column: "question".into(),
        })
    }
}

impl Reward for Paid {
    fn name(&self) -> &str {
        self.name
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |(row, answer): (usize, &Answer<'_>)| {
            let question = Question::asked(self.name, row, answer)?;
            Ok(Some(Score::new(self.utility.of(question, answer.completion_ids), Status::Ok)))
        };
        answers.iter().enumerate().map(score).collect()
    }
}
