//! The method: answers that are sampled and kept, confidences that are trained by bets.

use base::{Purpose, Random};
use data::{Example, Prompt};
use envs::reward::confidence::ConfidenceOptions;
use envs::{Answer, Reward, RewardError, Score, Status};
use model::decoder::WeightFormat;
use model::tokenizer::Tokenizer;
use rollout::{Episode, SamplingOptions};
use train::Method;
use train::method::{Report, Step};
use train::methods::policy::{Policy, PolicyOptions};
use train::options::TrainingOptions;
use train::order::Order;
use train::rollouts::{Record, Rollouts};

use super::world::{self, CONFIDENCE, EOS};

/// Draws of answers are named by steps from here on, apart from those of confidences.
const ANSWERS: u32 = 1 << 30;

/// Where the answered questions of a step come from: prompts that end where the confidence is asked for, with the column `right`.
pub(super) type Ask<'a> = Box<dyn FnMut(&mut Step<'_>) -> train::Result<Vec<Prompt>> + 'a>;

/// PPO on the confidence alone.
pub(super) struct Doubt<'a> {
    pub options: PolicyOptions,
    pub rows: usize,
    pub ask: Ask<'a>,
    pub bet: ConfidenceOptions,
    /// What stays near the reference, if anything does.
    pub retained: Option<Kept>,
}

/// What updates keep near the reference, and with which weight.
#[derive(Clone, Copy)]
pub(super) enum Kept {
    /// The answers: they stay what they are.
    Answers(f64),
    /// The confidences: no level that the reference states dies out.
    Confidences(f64),
}

impl Method for Doubt<'_> {
    fn name(&self) -> &str {
        "rewarding_doubt"
    }

    fn training(&self) -> &TrainingOptions {
        &self.options.training
    }

    fn rows(&self) -> usize {
        self.rows
    }

    fn rows_per_step(&self) -> usize {
        self.options.prompts_per_step
    }

    fn needs_reference(&self) -> bool {
        self.options.objective.needs_reference() || self.retained.is_some()
    }

    fn step(&mut self, step: &mut Step<'_>) -> train::Result<Report> {
        let prompts = (self.ask)(step)?;
        let retained = self.retained.map(|kept| match kept {
            Kept::Answers(weight) => (prompts.iter().map(answer).collect(), weight),
            Kept::Confidences(weight) => (prompts.iter().map(confidence).collect(), weight),
        });
        // With a baseline made of the group, nothing is carried from step to step that the decoder does not carry.
        let mut policy = Policy::new(self.options.clone(), prompts, Box::new(Bet(self.bet.clone())))?;
        if let Some((rows, weight)) = retained {
            policy = policy.with_retained(rows, weight)?;
        }
        policy.step(step)
    }
}

/// Samples an answer to each question of a step, and puts it behind the question.
pub(super) fn answered(
    step: &mut Step<'_>,
    questions: &[Prompt],
    size: usize,
    sampling: &SamplingOptions,
) -> train::Result<Vec<Prompt>> {
    let rows = Order::new(questions.len(), step.seed, step.stage).batch(step.index, size);
    let chosen: Vec<&Prompt> = rows.iter().map(|&row| &questions[row]).collect();
    let random = Random::new(step.seed, Purpose::Sampling).step(ANSWERS + step.number as u32);
    let rollouts = Rollouts {
        sampling,
        num_generations: 1,
        decode_batch_size: 64,
        weights: WeightFormat::Full,
        record: Record::default(),
    };
    let groups = rollouts.sample(step, random, &chosen)?;
    Ok(chosen
        .iter()
        .zip(&groups.episodes)
        .map(|(question, episode)| continued(question, episode, step.tokenizer))
        .collect())
}

/// A question with its answer, and whether that is right.
fn continued(question: &Prompt, episode: &Episode, tokenizer: &Tokenizer) -> Prompt {
    let ids = [&question.ids[..], &episode.completion].concat();
    let mut prompt = Prompt { text: tokenizer.decode(&ids), ids: ids.into(), ..question.clone() };
    prompt.columns.insert("right".into(), is_right(question, &episode.completion).into());
    prompt
}

/// An answered question as a row whose loss is about the answer.
fn answer(prompt: &Prompt) -> Example {
    let loss_mask = (0..prompt.ids.len()).map(|index| index >= world::QUESTION_LENGTH).collect();
    Example { ids: prompt.ids.to_vec(), loss_mask, source: prompt.source.clone() }
}

/// An answered question as a row whose loss is about where the confidence is stated; which one stands there does not matter to a divergence.
fn confidence(prompt: &Prompt) -> Example {
    let ids = [&prompt.ids[..], &[world::LEVEL]].concat();
    let loss_mask = (0..ids.len()).map(|index| index == prompt.ids.len()).collect();
    Example { ids, loss_mask, source: prompt.source.clone() }
}

/// Whether a completion begins with the value that the question asks for.
pub(super) fn is_right(question: &Prompt, completion: &[u32]) -> bool {
    let value = question.columns.get("value").and_then(serde_json::Value::as_u64);
    completion.first().is_some_and(|&first| value == Some(first.into()))
}

/// Pays a confidence that follows an answer.
struct Bet(ConfidenceOptions);

impl Reward for Bet {
    fn name(&self) -> &str {
        "bet"
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |(row, answer): (usize, &Answer<'_>)| {
            let right = answer
                .columns
                .get("right")
                .and_then(serde_json::Value::as_bool)
                .ok_or_else(|| RewardError::MissingColumn { reward: "bet".into(), row, column: "right".into() })?;
            // A confidence is a level and the end.
            let level = world::level(answer.completion_ids).filter(|_| answer.completion_ids[1..] == [EOS]);
            Ok(Some(paid(&self.0, level, right)))
        };
        answers.iter().enumerate().map(score).collect()
    }
}

/// Pays answer and confidence in one.
pub(super) struct JointBet(pub ConfidenceOptions);

impl Reward for JointBet {
    fn name(&self) -> &str {
        "bet"
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |answer: &Answer<'_>| {
            let value = answer.columns.get("value").and_then(serde_json::Value::as_u64);
            let right = answer.completion_ids.first().is_some_and(|&first| value == Some(first.into()));
            let stated = answer.completion_ids.iter().position(|&token| token == CONFIDENCE);
            let level = stated.and_then(|at| world::level(&answer.completion_ids[at + 1..]));
            Some(paid(&self.0, level, right))
        };
        Ok(answers.iter().map(score).collect())
    }
}

fn paid(bet: &ConfidenceOptions, level: Option<u8>, right: bool) -> Score {
    let status = match (level, right) {
        (None, _) => Status::Malformed,
        (Some(_), true) => Status::Ok,
        (Some(_), false) => Status::Wrong,
    };
    Score::new(bet.pay(level, right), status)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use data::Source;
    use envs::Columns;

    use super::world::LEVEL;
    use super::*;

    fn paid_for(reward: &dyn Reward, columns: &Columns, completion_ids: &[u32]) -> Score {
        let answer = Answer { prompt_text: "", completion: "", completion_ids, columns };
        reward.score(&[answer]).unwrap()[0].clone().unwrap()
    }

    #[test]
    fn a_confidence_is_a_level_and_the_end() {
        let bet = ConfidenceOptions { scale: 1.0, ..ConfidenceOptions::default() };
        let columns = |right: bool| Columns::from_iter([("right".to_owned(), right.into())]);
        let of = |right: bool, ids: &[u32]| paid_for(&Bet(bet.clone()), &columns(right), ids);
        assert_eq!(of(true, &[LEVEL + 7, EOS]).value, bet.pay(Some(7), true));
        assert_eq!(of(false, &[LEVEL, EOS]).value, 1.0);
        for malformed in
            [&[LEVEL + 7][..], &[LEVEL + 7, LEVEL], &[LEVEL + 7, EOS, EOS], &[EOS], &[CONFIDENCE, EOS], &[]]
        {
            let score = of(true, malformed);
            assert_eq!((score.value, score.status), (-3.0, Status::Malformed), "{malformed:?}");
        }
    }

    #[test]
    fn answer_and_confidence_in_one_are_paid_alike() {
        let bet = ConfidenceOptions { scale: 1.0, ..ConfidenceOptions::default() };
        let columns = Columns::from_iter([("value".to_owned(), 40.into())]);
        let of = |ids: &[u32]| paid_for(&JointBet(bet.clone()), &columns, ids);
        assert_eq!(of(&[40, 6, CONFIDENCE, LEVEL + 9, EOS]).value, bet.pay(Some(9), true));
        assert_eq!(of(&[41, 6, CONFIDENCE, LEVEL + 9, EOS]).value, bet.pay(Some(9), false));
        assert_eq!(of(&[40, 6, LEVEL + 9, EOS]).status, Status::Malformed);
    }

    #[test]
    fn what_is_kept_is_the_answer_or_the_confidence_alone() {
        let question = [1, 3, 90, 27, 4, 5];
        let ids = [&question[..], &[40, 6, CONFIDENCE]].concat();
        let prompt = Prompt {
            id: 0,
            text: String::new(),
            ids: ids.clone().into(),
            messages: None,
            columns: Columns::default(),
            source: Source::new("test", 1),
        };
        let row = answer(&prompt);
        assert_eq!(row.ids, ids);
        assert_eq!(row.loss_mask, [false, false, false, false, false, false, true, true, true]);
        let row = confidence(&prompt);
        assert_eq!(row.ids[..9], ids);
        assert_eq!(row.loss_mask, [[false; 9].as_slice(), &[true]].concat());
    }
}
