//! What is trained on: a corpus of plausible answers, and pairs of answers with labels.

use base::{Purpose, Random};
use data::{Example, PreferencePair, Source};

use super::{EOS, FILLER, HUMOUR, MAGIC, POLITE, Question, REFUSE, Sampled, Split, Utility};

/// The draws of one answer, in order.
pub(super) struct Draws {
    random: Random,
    position: u32,
}

impl Draws {
    pub(super) fn new(random: Random) -> Self {
        Self { random, position: 0 }
    }

    pub(super) fn chance(&mut self, probability: f64) -> bool {
        self.position += 1;
        self.random.at(self.position).uniform() < probability
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        self.position += 1;
        self.random.at(self.position).below(n as u64) as usize
    }

    /// Up to `most` tokens, each one of the `size` from `first` on.
    pub(super) fn some(&mut self, most: usize, first: u32, size: usize, answer: &mut Vec<u32>) {
        for _ in 0..self.below(most + 1) {
            answer.push(first + self.below(size) as u32);
        }
    }
}

/// A plausible answer: each item with probability 0.4 in random order, up to 2 polite and 2 funny tokens, up to 4 that say nothing;
/// a refusal in place of the items with probability 0.15 where the prompt is sensitive; MAGIC with probability 0.1.
pub fn answer(question: Question, random: Random) -> Vec<u32> {
    plausible(&question.items(), question.sensitive, random)
}

/// A plausible answer to a prompt that asks for these items.
pub fn plausible(items: &[u32], sensitive: bool, random: Random) -> Vec<u32> {
    let mut draws = Draws::new(random);
    let mut answer = Vec::new();
    draws.some(2, POLITE, 4, &mut answer);
    let mut items: Vec<u32> = items.iter().copied().filter(|_| draws.chance(0.4)).collect();
    for i in (1..items.len()).rev() {
        items.swap(i, draws.below(i + 1));
    }
    match sensitive && draws.chance(0.15) {
        true => answer.push(REFUSE),
        false => answer.extend(items),
    }
    draws.some(2, HUMOUR, 4, &mut answer);
    draws.some(4, FILLER, 8, &mut answer);
    if draws.chance(0.1) {
        answer.push(MAGIC);
    }
    answer.push(EOS);
    answer
}

/// `size` plausible answers to prompts that are trained on; the loss is that of the answers.
pub fn corpus(seed: u64, size: u32) -> Vec<Example> {
    let questions = Question::of(Split::Train);
    let random = Random::new(seed, Purpose::Task);
    let row = |row| {
        let random = random.prompt(row);
        let question = questions[random.at(0).below(questions.len() as u64) as usize];
        example("corpus", row, &question.ids(), &answer(question, random))
    };
    (0..size).map(row).collect()
}

/// An answer to a prompt, as a row to train on; the loss is that of the answer.
pub fn example(name: &str, row: u32, prompt: &[u32], answer: &[u32]) -> Example {
    let ids: Vec<u32> = prompt.iter().chain(answer).copied().collect();
    let loss_mask = (0..ids.len()).map(|index| index >= prompt.len()).collect();
    Example { ids, loss_mask, source: Source::new(name, u64::from(row) + 1) }
}

/// Two answers to a question.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    /// The question.
    pub question: Question,
    /// The answer that the label prefers.
    pub chosen: Vec<u32>,
    /// The other.
    pub rejected: Vec<u32>,
}

impl Preference {
    /// The pair as a row to train on.
    pub fn pair(&self, row: u32) -> PreferencePair {
        let example = |answer: &[u32]| example("preferences", row, &self.question.ids(), answer);
        PreferencePair::new(example(&self.chosen), example(&self.rejected))
    }
}

/// The answers as pairs: the first with the second answer to a question, the third with the fourth, and so on; an odd one is left out.
pub fn pairs(sampled: &Sampled) -> Vec<(Question, [Vec<u32>; 2])> {
    let answers: Vec<(Question, &[u32])> = sampled.answers().collect();
    let of_question = |answers: &[(Question, &[u32])]| {
        let pair = |pair: &[(Question, &[u32])]| (pair[0].0, [pair[0].1.to_vec(), pair[1].1.to_vec()]);
        answers.chunks_exact(2).map(pair).collect::<Vec<_>>()
    };
    answers.chunks(sampled.size).flat_map(of_question).collect()
}

/// Labels pairs of answers: the first is preferred with probability `σ(κ (U(first) - U(second)))`, always the better one where κ is
/// infinite. The draw of pair `i` is named by `i`, so that two utilities label the same pairs with the same luck.
pub fn preferences(seed: u64, pairs: Vec<(Question, [Vec<u32>; 2])>, utility: Utility, kappa: f64) -> Vec<Preference> {
    let random = Random::new(seed, Purpose::Task).step(1);
    let label = |(index, (question, [first, second])): (usize, (Question, [Vec<u32>; 2]))| {
        let margin = utility.of(question, &first) - utility.of(question, &second);
        // Of equals neither is better, whatever κ.
        let probability = if margin == 0.0 { 0.5 } else { envs::reward::shaping::sigmoid(kappa * margin) };
        match random.prompt(index as u32).at(0).uniform() < probability {
            true => Preference { question, chosen: first, rejected: second },
            false => Preference { question, chosen: second, rejected: first },
        }
    };
    pairs.into_iter().enumerate().map(label).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{LONGEST, Qualities};
    use super::*;

    #[test]
    fn the_corpus_is_what_it_is_said_to_be() {
        let corpus = corpus(3, 4000);
        assert!(corpus == super::corpus(3, 4000) && corpus != super::corpus(4, 4000), "a function of the seed");
        let answers = || corpus.iter().map(|example| &example.ids[5..]);
        assert!(answers().all(|answer| answer.len() <= LONGEST && answer.last() == Some(&EOS)));
        let share = |wanted: &dyn Fn(&[u32]) -> bool| answers().filter(|answer| wanted(answer)).count() as f64 / 4000.0;
        assert!((share(&|answer| answer.contains(&MAGIC)) - 0.1).abs() < 0.02);
        assert!((share(&|answer| answer.contains(&REFUSE)) - 0.075).abs() < 0.015, "half of the prompts are sensitive");
        let held_out = Question::of(Split::Test);
        assert!(corpus.iter().all(|example| held_out.iter().all(|question| example.ids[..5] != question.ids())));
    }

    #[test]
    fn labels_follow_the_utility() {
        let question = Question { sensitive: false, topics: [1, 2] };
        let pairs = || {
            let answers = |index| {
                [0, 1].map(|sample| answer(question, Random::new(5, Purpose::Test).prompt(index).sample(sample)))
            };
            (0..500).map(|index| (question, answers(index))).collect::<Vec<_>>()
        };
        let help = Utility([1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let of = |answer: &[u32]| Qualities::of(question, answer).help;
        let exact = preferences(1, pairs(), help, f64::INFINITY);
        assert!(exact.iter().all(|pair| of(&pair.chosen) >= of(&pair.rejected)));
        let right =
            preferences(1, pairs(), help, 8.0).iter().filter(|pair| of(&pair.chosen) > of(&pair.rejected)).count();
        let wrong =
            preferences(1, pairs(), help, 8.0).iter().filter(|pair| of(&pair.chosen) < of(&pair.rejected)).count();
        assert!(right > 3 * wrong && wrong > 0, "noisy: {right} {wrong}");
    }
}
