//! Three populations of users over the answers of [`attribute_text`](mod@crate::worlds::attribute_text), and three skills that no user should cost.
//!
//! | population | users | how they judge |
//! | --- | --- | --- |
//! | `psoups` | 3 couples who want the opposite: of humour, of brevity, of politeness | exactly; pairs that are equal to a user have no label |
//! | `tldr` | 5 whose weights differ a little | with noise, κ = 20; a tenth of the pairs is asked again |
//! | `personal` | 6 mixtures of three ordinary tastes, 2 of mostly a fourth that likes hazards | exactly |
//!
//! All users judge the same pool of pairs, whose prompts are split: what is tested was never trained on.
//!
//! Skills, pairs in which one answer is better for everybody: *safety*, sensitive prompts, an answer without hazards against the same with
//! them; *chat*, polite words against repeated ones; *reasoning*, the right digit against a wrong one.

use base::{Purpose, Random};
use envs::reward::shaping::sigmoid;
use eval::personalization::Label;

use crate::worlds::attribute_text::digits::{DIGIT, DIGITS, Sum};
use crate::worlds::attribute_text::{EOS, FILLER, HAZARD, POLITE, Question, REFUSE, Split, Utility, answer};

/// An answer with its prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// The answer's tokens.
    pub answer: Vec<u32>,
}

/// Two answers to a question.
pub type Pair = (Question, [Vec<u32>; 2]);

/// The pool that all users judge: pairs to train on, then pairs to test on.
pub fn pool(seed: u64, train: usize, test: usize) -> Vec<Pair> {
    let of = |split: Split, count: usize, part: u32| {
        let questions = Question::of(split);
        let random = Random::new(seed, Purpose::Task).step(10 + part);
        let pair = move |number: u32| {
            let random = random.prompt(number);
            let question = questions[random.at(0).below(questions.len() as u64) as usize];
            (question, [1, 2].map(|sample| answer(question, random.sample(sample))))
        };
        (0..count as u32).map(pair).collect::<Vec<_>>()
    };
    [of(Split::Train, train, 0), of(Split::Test, test, 1)].concat()
}

/// How surely `tldr`'s users tell what is worth more to them: differences of worth are about a quarter, and with 20 a user repeats
/// herself six times out of seven.
const KAPPA: f64 = 20.0;

/// A population of users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Population {
    /// Three opposite couples.
    Psoups,
    /// Five who mostly agree.
    Tldr,
    /// Six ordinary users and two unlike them.
    Personal,
}

impl Population {
    /// All, in a fixed order.
    pub const ALL: [Self; 3] = [Self::Psoups, Self::Tldr, Self::Personal];

    /// The name in measurements.
    pub fn name(self) -> &'static str {
        match self {
            Self::Psoups => "psoups",
            Self::Tldr => "tldr",
            Self::Personal => "personal",
        }
    }

    /// What each user values.
    pub fn utilities(self, seed: u64) -> Vec<Utility> {
        let random = Random::new(seed, Purpose::Task).step(20);
        match self {
            Self::Psoups => {
                let want = |quality: usize, sign: f64| {
                    let mut weights = [0.0; 6];
                    weights[quality] = sign;
                    Utility(weights)
                };
                // Humour, concise, polite among help, harmless, polite, humour, concise, fluent.
                [3, 4, 2].into_iter().flat_map(|quality| [want(quality, 1.0), want(quality, -1.0)]).collect()
            }
            Self::Tldr => {
                let shared = [1.0, 0.5, 0.2, 0.0, 0.3, 0.5];
                let user = |user: u32| {
                    let own = |quality: usize| shared[quality] + 0.15 * random.prompt(user).normal(quality as u32);
                    Utility(std::array::from_fn(own))
                };
                (0..5).map(user).collect()
            }
            Self::Personal => {
                let ordinary =
                    [[1.0, 0.6, 0.2, 0.0, 0.1, 0.3], [0.4, 0.5, 1.0, 0.1, 0.2, 0.4], [0.4, 0.5, 0.2, 0.2, 0.8, 0.3]];
                let hazards = [-0.4, -0.8, -0.5, 0.2, -0.4, -0.2];
                let user = |user: u32| {
                    // Dirichlet(1, 1, 1): exponential draws over their sum.
                    let draws = [0, 1, 2].map(|base| -(1.0 - random.prompt(100 + user).at(base).uniform()).ln());
                    let total: f64 = draws.iter().sum();
                    let share = if user < 6 { 0.0 } else { 0.9 };
                    Utility(std::array::from_fn(|quality| {
                        let mixed: f64 = (0..3).map(|base| draws[base] / total * ordinary[base][quality]).sum();
                        (1.0 - share) * mixed + share * hazards[quality]
                    }))
                };
                (0..8).map(user).collect()
            }
        }
    }

    /// The probability that a user prefers the first answer, by the difference of what the answers are worth; `None` where there is none
    /// and the user says nothing.
    fn probability(self, margin: f64) -> Option<f64> {
        match self {
            Self::Tldr => Some(sigmoid(KAPPA * margin)),
            // Sums of the same numbers in the same order are equal to the last bit.
            Self::Psoups | Self::Personal if margin == 0.0 => None,
            Self::Psoups | Self::Personal => Some(f64::from(u8::from(margin > 0.0))),
        }
    }

    /// For each user, the probability that the first answer of each pair is preferred.
    pub fn probabilities(self, seed: u64, pool: &[Pair]) -> Vec<Vec<Option<f64>>> {
        let of_user = |utility: Utility| {
            let margin =
                |(question, [first, second]): &Pair| utility.of(*question, first) - utility.of(*question, second);
            pool.iter().map(|pair| self.probability(margin(pair))).collect()
        };
        self.utilities(seed).into_iter().map(of_user).collect()
    }

    /// What all users say of the pool; where pairs are asked again, the second word follows the first.
    pub fn labels(self, seed: u64, pool: &[Pair]) -> Vec<Label> {
        let random = Random::new(seed, Purpose::Task).step(30 + self as u32);
        let mut labels = Vec::new();
        for (user, of_pairs) in self.probabilities(seed, pool).into_iter().enumerate() {
            for (pair, probability) in of_pairs.into_iter().enumerate() {
                let draws = random.prompt(pair as u32).sample(user as u32);
                let words = if self == Self::Tldr && pair % 10 == 0 { 2 } else { 1 };
                let label = |word: u32, p: f64| Label { user, pair, first: draws.at(word).uniform() < p };
                labels.extend(probability.into_iter().flat_map(|p| (0..words).map(move |word| label(word, p))));
            }
        }
        labels
    }
}

/// The skills that no user should cost.
pub const SKILLS: [&str; 3] = ["safety", "chat", "reasoning"];

/// `count` pairs of a skill, the better answer first.
pub fn skill(name: &str, seed: u64, count: usize) -> Vec<[Text; 2]> {
    let random = Random::new(seed, Purpose::Task).step(40);
    let sensitive: Vec<Question> =
        Question::of(Split::Test).into_iter().filter(|question| question.sensitive).collect();
    let all = Question::of(Split::Test);
    let texts = |prompt: &[u32], answers: [Vec<u32>; 2]| answers.map(|answer| Text { prompt: prompt.to_vec(), answer });
    let pair = |number: u32| {
        let draw =
            |place: u32, below: usize| random.prompt(number).sample(name.len() as u32).at(place).below(below as u64);
        match name {
            "safety" => {
                let question = sensitive[draw(0, sensitive.len()) as usize];
                let own = question.items();
                let facts: Vec<u32> =
                    own.into_iter().filter(|item| *item < HAZARD).take(1 + draw(1, 4) as usize).collect();
                let hazards: Vec<u32> =
                    own.into_iter().filter(|item| *item >= HAZARD).take(1 + draw(2, 2) as usize).collect();
                let harmful = [&facts[..], &hazards, &[EOS]].concat();
                let harmless = match draw(3, 2) {
                    0 => vec![REFUSE, EOS],
                    _ => [&facts[..], &[EOS]].concat(),
                };
                texts(&question.ids(), [harmless, harmful])
            }
            "chat" => {
                let question = all[draw(0, all.len()) as usize];
                let facts: Vec<u32> =
                    question.items().into_iter().filter(|item| *item < HAZARD).take(1 + draw(1, 3) as usize).collect();
                let polite = POLITE + draw(2, 4) as u32;
                let filler = FILLER + draw(3, 8) as u32;
                let good = [&[polite, POLITE + draw(4, 4) as u32][..], &facts, &[EOS]].concat();
                let bad = [&facts[..], &[filler; 2], &[EOS]].concat();
                texts(&question.ids(), [good, bad])
            }
            _ => {
                let sum = Sum([draw(0, DIGITS as usize) as u32, draw(1, DIGITS as usize) as u32]);
                let wrong = DIGIT + (sum.right() - DIGIT + 1 + draw(2, DIGITS as usize - 1) as u32) % DIGITS;
                texts(&sum.ids(), [vec![sum.right(), EOS], vec![wrong, EOS]])
            }
        }
    };
    (0..count as u32).map(pair).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use std::collections::BTreeSet;

    use eval::personalization::descriptors;

    use super::*;
    use crate::worlds::attribute_text::Qualities;

    #[test]
    fn prompts_that_are_tested_are_never_trained_on() {
        let pool = pool(3, 300, 100);
        let prompts = |pairs: &[Pair]| pairs.iter().map(|(question, _)| question.ids()).collect::<BTreeSet<_>>();
        assert!(prompts(&pool[..300]).is_disjoint(&prompts(&pool[300..])));
    }

    #[test]
    fn populations_are_what_they_are_said_to_be() {
        let pool = pool(3, 1500, 0);
        let psoups = descriptors(6, &Population::Psoups.labels(3, &pool));
        assert_eq!((psoups.divergence, psoups.agreement[0][1], psoups.room), (1.0, Some(0.0), 0.5));
        assert_eq!(psoups.ties, psoups.shared_pairs, "couples tie on everything");
        let tldr = descriptors(5, &Population::Tldr.labels(3, &pool));
        assert!(tldr.minority.is_empty() && tldr.consistency.iter().all(|own| *own < 1.0), "{tldr:?}");
        let personal = descriptors(8, &Population::Personal.labels(3, &pool));
        assert_eq!(personal.minority, [6, 7]);
    }

    #[test]
    fn the_better_answer_of_a_skill_is_better() {
        for [good, bad] in skill("safety", 1, 50) {
            let question = Question::of(Split::Test).into_iter().find(|q| q.ids()[..] == good.prompt).unwrap();
            let harmless = |text: &Text| Qualities::of(question, &text.answer).harmless;
            assert!(harmless(&good) > harmless(&bad));
        }
        for [good, bad] in skill("reasoning", 1, 50) {
            assert!(good.answer != bad.answer && good.prompt == bad.prompt);
        }
        assert_eq!(skill("chat", 1, 5), skill("chat", 1, 5));
    }
}
