//! A second task in the same vocabulary: to add two digits modulo four.
//!
//! ```text
//! BOS  BENIGN  d_1  d_2  SEP         4 · 4 = 16 prompts
//! ```
//!
//! An answer is right if its first token is the digit `(d_1 + d_2) mod 4`; whatever follows only makes it longer. With `n` its length
//! without EOS:
//!
//! ```text
//! U = 4 · right - 0.2 · n / 16
//! ```
//!
//! The prompts are too few to hold some out: a table of sums can only be learnt whole. What is held out are answers.

use std::sync::Arc;

use base::{Purpose, Random};
use data::{Example, Prompt, Source};
use envs::Columns;
use model::tokenizer::Tokenizer;

use super::answers::{Draws, example};
use super::{BENIGN, BOS, EOS, FILLER, LONGEST, Question, SEP};

/// The digit 0; the others follow.
pub const DIGIT: u32 = 56;
/// Digits, and the modulus.
pub const DIGITS: u32 = 4;

/// Two digits to add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum(pub [u32; 2]);

impl Sum {
    /// All 16, in a fixed order.
    pub fn all() -> Vec<Self> {
        (0..DIGITS).flat_map(|a| (0..DIGITS).map(move |b| Self([a, b]))).collect()
    }

    /// The prompt's tokens.
    pub fn ids(self) -> [u32; 5] {
        let [a, b] = self.0;
        [BOS, BENIGN, DIGIT + a, DIGIT + b, SEP]
    }

    /// The token of the right digit.
    pub fn right(self) -> u32 {
        DIGIT + (self.0[0] + self.0[1]) % DIGITS
    }

    /// Whether an answer begins with it.
    pub fn is_right(self, answer: &[u32]) -> bool {
        answer.first() == Some(&self.right())
    }

    /// What an answer is worth; what comes from EOS on does not count.
    pub fn utility(self, answer: &[u32]) -> f64 {
        let length = answer.iter().take_while(|&&token| token != EOS).count();
        4.0 * f64::from(u8::from(self.is_right(answer))) - 0.2 * length as f64 / LONGEST as f64
    }

    /// The sum as a prompt. Its number among all prompts of the world, after those of [`Question`], names it in random draws; its
    /// place in [`Sum::all`] is its column `sum`.
    pub fn prompt(self, tokenizer: &Tokenizer) -> Prompt {
        let ids: Arc<[u32]> = self.ids().into();
        let number = self.number();
        Prompt {
            id: Question::COUNT + number,
            text: tokenizer.decode(&ids),
            ids,
            messages: None,
            columns: Columns::from_iter([("sum".to_owned(), number.into())]),
            source: Source::new("digits", u64::from(number) + 1),
        }
    }

    /// Its place in [`Sum::all`].
    fn number(self) -> u32 {
        DIGITS * self.0[0] + self.0[1]
    }

    /// The sum with this number.
    pub fn numbered(number: u32) -> Option<Self> {
        (number < DIGITS * DIGITS).then_some(Self([number / DIGITS, number % DIGITS]))
    }

    /// A plausible answer: a digit, the right one with probability 0.4 and else any of the others, and up to 8 tokens that say nothing.
    fn answer(self, random: Random) -> Vec<u32> {
        let mut draws = Draws::new(random);
        let off = if draws.chance(0.4) { 0 } else { 1 + draws.below(DIGITS as usize - 1) as u32 };
        let mut answer = vec![DIGIT + (self.right() - DIGIT + off) % DIGITS];
        draws.some(8, FILLER, 8, &mut answer);
        answer.push(EOS);
        answer
    }
}

/// `size` plausible answers to sums; the loss is that of the answers.
pub fn corpus(seed: u64, size: u32) -> Vec<Example> {
    let random = Random::new(seed, Purpose::Task).step(2);
    let sums = Sum::all();
    let row = |row| {
        let random = random.prompt(row);
        let sum = sums[random.at(0).below(sums.len() as u64) as usize];
        example("digits", row, &sum.ids(), &sum.answer(random))
    };
    (0..size).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_worth_what_is_said() {
        let sum = Sum([3, 2]);
        assert_eq!((sum.ids(), sum.right()), ([BOS, BENIGN, 59, 58, SEP], 57));
        assert_eq!(sum.utility(&[57, EOS]), 4.0 - 0.2 / 16.0);
        assert_eq!(sum.utility(&[57, FILLER, FILLER, FILLER]), 4.0 - 0.05);
        assert_eq!(sum.utility(&[58, 57, EOS, FILLER]), -0.025, "the first token counts");
        assert_eq!(sum.utility(&[EOS]), 0.0);
        for (number, sum) in Sum::all().into_iter().enumerate() {
            assert_eq!((sum.number(), Sum::numbered(number as u32)), (number as u32, Some(sum)));
        }
        assert_eq!(Sum::numbered(16), None);
    }

    #[test]
    fn the_corpus_is_what_it_is_said_to_be() {
        let corpus = corpus(3, 4000);
        assert!(corpus == super::corpus(3, 4000) && corpus != super::corpus(4, 4000), "a function of the seed");
        let of = |example: &Example| {
            let [a, b] = [example.ids[2], example.ids[3]].map(|digit| digit - DIGIT);
            Sum([a, b]).is_right(&example.ids[5..])
        };
        let right = corpus.iter().filter(|example| of(example)).count() as f64 / 4000.0;
        assert!((right - 0.4).abs() < 0.03, "{right}");
        let longest = corpus.iter().map(|example| example.ids.len() - 5).max();
        assert_eq!(longest, Some(10), "a digit, 8 tokens that say nothing, EOS");
        let digits: Vec<u32> = corpus.iter().map(|example| example.ids[5]).collect();
        assert!((0..DIGITS).all(|digit| digits.iter().filter(|&&d| d == DIGIT + digit).count() > 900));
    }
}
