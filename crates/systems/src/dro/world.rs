//! Three kinds of prompts: most of what is trained on, a tenth of it, and none of it.

use base::{Purpose, Random};
use data::{PreferencePair, Prompt, Source};
use envs::{Answer, Columns, Reward, RewardError, Score, Status};
use model::tokenizer::Tokenizer;

use crate::worlds::attribute_text::digits::Sum;
use crate::worlds::attribute_text::{
    BENIGN, BOS, EOS, FACT, HAZARD, LONGEST, Qualities, Question, SEP, TOPIC, TOPICS, Utility, example, plausible,
};

/// The column of a prompt's number among [`Task::numbered`].
const TASK: &str = "task";

/// A prompt of one of the three kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// About two topics, as in the shared world.
    Chat(Question),
    /// Two digits to add.
    Reason(Sum),
    /// About three topics.
    Trio([u32; 3]),
}

impl Task {
    /// All prompts about three topics, in ascending order.
    pub fn trios() -> Vec<Self> {
        let pairs = (0..TOPICS).flat_map(|a| (a + 1..TOPICS).map(move |b| (a, b)));
        pairs.flat_map(|(a, b)| (b + 1..TOPICS).map(move |c| Self::Trio([a, b, c]))).collect()
    }

    /// All sums.
    pub fn sums() -> Vec<Self> {
        Sum::all().into_iter().map(Self::Reason).collect()
    }

    /// These questions.
    pub fn chats(questions: Vec<Question>) -> Vec<Self> {
        questions.into_iter().map(Self::Chat).collect()
    }

    /// The prompt's tokens.
    pub fn ids(self) -> Vec<u32> {
        match self {
            Self::Chat(question) => question.ids().to_vec(),
            Self::Reason(sum) => sum.ids().to_vec(),
            Self::Trio([a, b, c]) => vec![BOS, BENIGN, TOPIC + a, TOPIC + b, TOPIC + c, SEP],
        }
    }

    /// What an answer is worth.
    pub fn utility(self, answer: &[u32]) -> f64 {
        match self {
            Self::Chat(question) => Utility::GOLD.of(question, answer),
            Self::Reason(sum) => sum.utility(answer),
            Self::Trio(topics) => Utility::GOLD.of_qualities(Qualities::given(&items(topics), false, answer)),
        }
    }

    /// The prompt; `number` names it in random draws.
    pub fn prompt(self, number: u32, tokenizer: &Tokenizer) -> Prompt {
        let ids = self.ids();
        let task = serde_json::to_value(&ids).unwrap_or_default();
        Prompt {
            id: number,
            text: tokenizer.decode(&ids),
            ids: ids.into(),
            messages: None,
            columns: Columns::from_iter([(TASK.to_owned(), task)]),
            source: Source::new("prompts", u64::from(number) + 1),
        }
    }

    /// The task with these tokens; none of three topics.
    fn of(ids: &[u32]) -> Option<Self> {
        let chats = Self::chats(Question::all());
        chats.into_iter().chain(Self::sums()).find(|task| task.ids() == ids)
    }

    /// Two plausible answers to a prompt about three topics, of at most [`LONGEST`] tokens; for others the corpora have their own.
    pub fn plausible_pair(topics: [u32; 3], random: Random) -> [Vec<u32>; 2] {
        [0, 1].map(|sample| {
            let mut answer = plausible(&items(topics), false, random.sample(sample));
            if answer.len() > LONGEST {
                answer.truncate(LONGEST - 1);
                answer.push(EOS);
            }
            answer
        })
    }
}

/// Two facts and a hazard of each topic.
fn items(topics: [u32; 3]) -> Vec<u32> {
    topics.iter().flat_map(|t| [FACT + 2 * t, FACT + 2 * t + 1, HAZARD + t]).collect()
}

/// Two answers to a prompt, the first of which is worth more, or was labelled so.
#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    /// The prompt.
    pub task: Task,
    /// The better answer.
    pub chosen: Vec<u32>,
    /// The other.
    pub rejected: Vec<u32>,
}

impl Labelled {
    /// The pair as a row to train on, in the group of its kind of prompts.
    pub fn pair(&self, row: u32) -> PreferencePair {
        let example = |answer: &[u32]| example("pairs", row, &self.task.ids(), answer);
        let group = match self.task {
            Task::Chat(_) => "chat",
            Task::Reason(_) => "reason",
            Task::Trio(_) => "trio",
        };
        let pair = PreferencePair::new(example(&self.chosen), example(&self.rejected));
        PreferencePair { group: Some(group.into()), ..pair }
    }

    /// By how much the first answer is worth more.
    pub fn margin(&self) -> f64 {
        self.task.utility(&self.chosen) - self.task.utility(&self.rejected)
    }

    /// The label of a pair: the first is preferred with probability `σ(κ (U(first) - U(second)))`. Pairs of equal worth are left out.
    /// The draw of pair `row` is named by `row`.
    pub fn noisy(seed: u64, kappa: f64, pairs: Vec<(Task, [Vec<u32>; 2])>) -> Vec<Self> {
        let random = Random::new(seed, Purpose::Task).step(3);
        let label = |(row, (task, [first, second])): (usize, (Task, [Vec<u32>; 2]))| {
            let margin = task.utility(&first) - task.utility(&second);
            let first_wins = random.prompt(row as u32).at(0).uniform() < envs::reward::shaping::sigmoid(kappa * margin);
            let (chosen, rejected) = if first_wins { (first, second) } else { (second, first) };
            (margin != 0.0).then_some(Self { task, chosen, rejected })
        };
        pairs.into_iter().enumerate().filter_map(label).collect()
    }

    /// Pairs of which a share, drawn by row, is the wrong way round.
    pub fn flipped(seed: u64, share: f64, pairs: &[Self]) -> Vec<Self> {
        let random = Random::new(seed, Purpose::Mistake);
        let flip = |(row, pair): (u32, &Self)| match random.prompt(row).at(0).uniform() < share {
            true => Self { task: pair.task, chosen: pair.rejected.clone(), rejected: pair.chosen.clone() },
            false => pair.clone(),
        };
        (0..).zip(pairs).map(flip).collect()
    }
}

/// What an answer is worth, as a reward.
pub struct Gold;

impl Reward for Gold {
    fn name(&self) -> &str {
        "gold"
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |(row, answer): (usize, &Answer<'_>)| {
            let ids = answer.columns.get(TASK).and_then(|ids| serde_json::from_value::<Vec<u32>>(ids.clone()).ok());
            let task = ids.and_then(|ids| Task::of(&ids)).ok_or_else(|| RewardError::MissingColumn {
                reward: "gold".into(),
                row,
                column: TASK.into(),
            })?;
            Ok(Some(Score::new(task.utility(answer.completion_ids), Status::Ok)))
        };
        answers.iter().enumerate().map(score).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;
    use crate::worlds::attribute_text as world;

    #[test]
    fn prompts_are_known_by_their_tokens() {
        let tokenizer = world::tokenizer().unwrap();
        let (chat, sum) = (Task::chats(Question::all())[17], Task::sums()[6]);
        for task in [chat, sum] {
            let prompt = task.prompt(3, &tokenizer);
            let answer = [world::digits::DIGIT + 3, EOS];
            let scored = Gold.score(&[Answer {
                prompt_text: "",
                completion: "",
                completion_ids: &answer,
                columns: &prompt.columns,
            }]);
            assert_eq!(scored.unwrap()[0].as_ref().unwrap().value, task.utility(&answer));
        }
        assert_eq!(Task::trios().len(), 56);
        let trio = Task::Trio([0, 1, 7]);
        assert_eq!(trio.ids().len(), 6);
        let all = items([0, 1, 7]);
        assert!((trio.utility(&all) - (1.0 + 1.0 + 0.2 * (1.0 - 9.0 / 16.0) + 0.5)).abs() < 1e-12);
    }

    #[test]
    fn labels_follow_utility_and_flips_are_as_many_as_asked() {
        let pair = |index: u32| {
            let topics = [index % 6, 6, 7];
            (Task::Trio(topics), Task::plausible_pair(topics, Random::new(2, Purpose::Test).prompt(index)))
        };
        let exact = Labelled::noisy(1, f64::INFINITY, (0..2000).map(pair).collect());
        assert!(exact.len() > 1900);
        assert!(exact.iter().all(|pair| pair.task.utility(&pair.chosen) > pair.task.utility(&pair.rejected)));
        assert!(exact.iter().all(|pair| pair.chosen.len() <= LONGEST && pair.chosen.last() == Some(&EOS)));
        let flipped = Labelled::flipped(1, 0.1, &exact);
        let changed = exact.iter().zip(&flipped).filter(|(a, b)| a != b).count() as f64 / exact.len() as f64;
        assert!((changed - 0.1).abs() < 0.03, "{changed}");
    }
}
