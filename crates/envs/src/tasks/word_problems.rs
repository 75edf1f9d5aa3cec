//! Short stories with one arithmetic operation.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::expression::Sum;
use super::{Draws, Problem, Task, TaskError};

/// Options of the `word_problems` task. Every choice is uniform.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WordProblemOptions {
    /// Kinds of stories to choose from.
    pub kinds: Vec<Kind>,
    /// Smallest and largest of the first number (of things someone has, or of the total).
    pub first: [i64; 2],
    /// Smallest and largest of the second number (of things that come, go or are compared).
    pub second: [i64; 2],
    /// Smallest and largest size and number of the equal groups in `groups` and `sharing`.
    pub factors: [i64; 2],
    /// Text after the story, such as `Reply with only the number.`; none if empty.
    pub instruction: String,
    /// Content of the system message; without one, the chat template's default holds.
    pub system: Option<String>,
}

impl Default for WordProblemOptions {
    fn default() -> Self {
        Self {
            kinds: vec![Kind::Gain, Kind::Loss],
            first: [2, 20],
            second: [2, 9],
            factors: [2, 9],
            instruction: "Reply with only the number.".into(),
            system: None,
        }
    }
}

/// What happens in a story.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Someone gets more: addition.
    Gain,
    /// Someone gives away: subtraction.
    Loss,
    /// Two people together: addition.
    Together,
    /// How many more one has than the other: subtraction.
    Difference,
    /// Equal groups: multiplication.
    Groups,
    /// Shared equally: division.
    Sharing,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Gain => "gain",
            Self::Loss => "loss",
            Self::Together => "together",
            Self::Difference => "difference",
            Self::Groups => "groups",
            Self::Sharing => "sharing",
        }
    }

    /// The stories. `{a}` and `{b}` are the numbers, `{name}` and `{other}` two people, `{things}` what they count.
    fn stories(self) -> &'static [&'static str] {
        match self {
            Self::Gain => &[
                "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
                "{name} had {a} {things}. Then {other} gave {name} {b} more. How many {things} does {name} have?",
                "There are {a} {things} in a box. {name} puts in {b} more. How many {things} are in the box?",
            ],
            Self::Loss => &[
                "{name} has {a} {things} and gives away {b}. How many {things} are left?",
                "{name} had {a} {things} and lost {b}. How many {things} does {name} have now?",
                "There are {a} {things} in a box. {name} takes out {b}. How many {things} are in the box?",
            ],
            Self::Together => &[
                "{name} has {a} {things} and {other} has {b}. How many {things} do they have together?",
                "{name} bought {a} {things} and {other} bought {b}. How many {things} is that in total?",
            ],
            Self::Difference => &[
                "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have?",
                "{name} found {a} {things}. {other} found {b}. How many fewer {things} did {other} find?",
            ],
            Self::Groups => &[
                "{name} has {a} boxes with {b} {things} each. How many {things} does {name} have?",
                "Each of {a} children gets {b} {things}. How many {things} is that in total?",
            ],
            Self::Sharing => &[
                "{name} shares {a} {things} equally among {b} children. How many {things} does each child get?",
                "{name} puts {a} {things} into {b} boxes, the same number in each. How many {things} are in one box?",
            ],
        }
    }
}

const NAMES: [&str; 12] = ["Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Emma", "Jack", "Sara", "Leo", "Kate"];
const THINGS: [&str; 12] =
    ["apples", "books", "coins", "pens", "cards", "shells", "stamps", "balls", "cookies", "flowers", "stones", "toys"];

/// See [`WordProblemOptions`].
pub struct WordProblems {
    options: WordProblemOptions,
}

impl WordProblems {
    /// The task with these options.
    ///
    /// # Errors
    /// An empty list or an empty or too wide range.
    pub fn new(options: WordProblemOptions) -> Result<Self, TaskError> {
        let refuse = |reason: String| Err(TaskError { task: "word_problems", reason });
        if options.kinds.is_empty() {
            return refuse("kinds is empty".into());
        }
        for (name, [low, high]) in [("first", options.first), ("second", options.second), ("factors", options.factors)]
        {
            if !(1 <= low && low <= high && high <= 1_000_000_000) {
                return refuse(format!("{name} is [{low}, {high}], expected 1 <= low <= high <= 1000000000"));
            }
        }
        Ok(Self { options })
    }
}

impl Task for WordProblems {
    fn name(&self) -> &'static str {
        "word_problems"
    }

    fn draw(&self, draws: &mut Draws) -> Problem {
        let WordProblemOptions { first, second, factors, .. } = self.options;
        let kind = *draws.pick(&self.options.kinds);
        let [[x, y], [group, groups]] =
            [[first, second], [factors, factors]].map(|ranges| ranges.map(|[low, high]| draws.between(low, high)));
        let (a, b, sum) = match kind {
            Kind::Gain | Kind::Together => (x, y, Sum::addition(x, y)),
            Kind::Loss | Kind::Difference => (x.max(y), x.min(y), Sum::subtraction(x.max(y), x.min(y))),
            Kind::Groups => (groups, group, Sum::multiplication(groups, group)),
            Kind::Sharing => (group * groups, groups, Sum::division(group * groups, groups)),
        };
        let name = draws.between(0, NAMES.len() as i64 - 1);
        let other = (name + draws.between(1, NAMES.len() as i64 - 1)) % NAMES.len() as i64;
        let mut question = draws
            .pick(kind.stories())
            .replace("{a}", &a.to_string())
            .replace("{b}", &b.to_string())
            .replace("{name}", NAMES[name as usize])
            .replace("{other}", NAMES[other as usize])
            .replace("{things}", draws.pick::<&str>(&THINGS));
        if !self.options.instruction.is_empty() {
            question = format!("{question} {}", self.options.instruction);
        }
        Problem {
            system: self.options.system.clone(),
            question,
            answer: sum.value().to_string(),
            kind: kind.name(),
            key: sum.key(),
        }
    }
}
