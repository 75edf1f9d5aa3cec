//! What is asked: a memory that holds some facts well, some badly and some not at all; and questions with their odds written on them.
//!
//! ```text
//! <bos> Q e17 r2 ? Answer:   v2-5 , Confidence: 9 <eos>             memory: relation 2 of entity 17
//! <bos> Q odds3 e17 ? Answer:   yes , Confidence: 4 <eos>           odds: "yes" is right with the third probability
//! <bos> 6   7 8 9 10 <eos>                                          both: counting
//! ```
//!
//! A fact is told 1, 2, 4, .. 64 times, each twice as often being half as frequent; a third of the entities are never told of; and
//! where a fact is told in two ways, 40 % of the times with the same other value. The judge knows the true value.
//!
//! A model that has never counted has no reason to tell the levels apart: they are stated without rhyme or reason, so that nothing but its
//! initial values separates them, and no bet can. A real model knows the numbers; here some rows count from somewhere up to 10.

use std::sync::Arc;

use base::{Purpose, Random};
use data::{Example, Prompt, Source};
use envs::Columns;
use model::config::LayerAttention;
use model::tokenizer::Tokenizer;
use model::{Family, ModelConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::words;

/// Relations.
pub const RELATIONS: usize = 3;
/// Marks of the odds.
pub const MARKS: usize = 6;
/// Levels of confidence.
pub const LEVELS: usize = 11;

const PAD: u32 = 0;
const BOS: u32 = 1;
/// Ends an answer.
pub const EOS: u32 = 2;
const QUESTION: u32 = 3;
const ASK: u32 = 4;
const ANSWER: u32 = 5;
const COMMA: u32 = 6;
/// After which a level is stated.
pub const CONFIDENCE: u32 = 7;
const YES: u32 = 8;
/// Tokens of a question.
pub const QUESTION_LENGTH: usize = 6;
/// The first level.
pub const LEVEL: u32 = 9;
const MARK: u32 = LEVEL + LEVELS as u32;
const RELATION: u32 = MARK + MARKS as u32;
const VALUE: u32 = RELATION + RELATIONS as u32;

/// Sizes of the memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryOptions {
    /// Entities; half of them are trained on.
    #[schemars(range(min = 4, max = 100_000))]
    pub entities: usize,
    /// Values of each relation.
    #[schemars(range(min = 2, max = 1000))]
    pub values: usize,
    /// Share of entities that are never told of.
    #[schemars(range(min = 0, max = 1))]
    pub unseen: f64,
    /// Share of facts that are told in two ways.
    #[schemars(range(min = 0, max = 1))]
    pub conflicting: f64,
    /// How often the best-known facts are told: a power of two.
    #[schemars(range(min = 1, max = 1024))]
    pub most_told: u32,
    /// Rows that count, for each row that tells something else.
    #[schemars(range(min = 0))]
    pub counting: f64,
    /// Layers of the models.
    #[schemars(range(min = 1))]
    pub layers: usize,
    /// Their width.
    #[schemars(range(min = 2))]
    pub width: usize,
}

/// A fact that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fact {
    /// The entity.
    pub entity: usize,
    /// The relation.
    pub relation: usize,
    /// The token of the true value.
    pub value: u32,
}

/// Which facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Relations 1 and 2 of one half of the entities: what confidence is trained on.
    Train,
    /// The same relations of the other half.
    Test,
    /// The third relation of the other half.
    Transfer,
}

/// The memory.
pub struct Memory {
    options: MemoryOptions,
    random: Random,
}

impl Memory {
    /// The memory of a seed.
    pub fn new(options: &MemoryOptions, seed: u64) -> Self {
        Self { options: options.clone(), random: Random::new(seed, Purpose::Task) }
    }

    /// The tokens: their number is that of the vocabulary.
    pub fn words(&self) -> Vec<String> {
        let mut list: Vec<String> =
            ["<pad>", "<bos>", "<eos>", "Q", "?", "Answer:", ",", "Confidence:", "yes"].map(String::from).into();
        list.extend((0..LEVELS).map(|level| level.to_string()));
        list.extend((0..MARKS).map(|mark| format!("odds{mark}")));
        list.extend((0..RELATIONS).map(|relation| format!("r{}", relation + 1)));
        let values = self.options.values;
        list.extend(
            (0..RELATIONS).flat_map(|relation| (0..values).map(move |value| format!("v{}-{value}", relation + 1))),
        );
        list.extend((0..self.options.entities).map(|entity| format!("e{entity}")));
        list
    }

    /// The tokenizer of the words.
    ///
    /// # Errors
    /// None, in fact: the words differ.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        words::tokenizer(&self.words(), BOS, EOS, PAD)
    }

    /// The shape of the world's models.
    pub fn model(&self) -> ModelConfig {
        ModelConfig {
            bos_token_id: Some(BOS),
            eos_token_ids: vec![EOS],
            pad_token_id: Some(PAD),
            hidden_size: self.options.width,
            intermediate_size: 2 * self.options.width + self.options.width / 4,
            layers: vec![LayerAttention { window: None, rope: 0 }; self.options.layers],
            ..ModelConfig::tiny(Family::Llama, self.words().len())
        }
    }

    fn entity_token(&self, entity: usize) -> u32 {
        VALUE + (RELATIONS * self.options.values + entity) as u32
    }

    fn value_token(&self, relation: usize, value: u64) -> u32 {
        VALUE + (relation * self.options.values) as u32 + value as u32
    }

    /// The fact of an entity and a relation.
    pub fn fact(&self, entity: usize, relation: usize) -> Fact {
        let value = self.draws(entity, relation).at(0).below(self.options.values as u64);
        Fact { entity, relation, value: self.value_token(relation, value) }
    }

    fn draws(&self, entity: usize, relation: usize) -> Random {
        self.random.prompt(entity as u32).sample(relation as u32)
    }

    /// The facts of a part.
    pub fn facts(&self, part: Part) -> Vec<Fact> {
        // Entities are drawn alike, so the first half is as good as any.
        let half = self.options.entities / 2;
        let (entities, relations) = match part {
            Part::Train => (0..half, 0..2),
            Part::Test => (half..self.options.entities, 0..2),
            Part::Transfer => (half..self.options.entities, 2..RELATIONS),
        };
        entities.flat_map(|entity| relations.clone().map(move |relation| self.fact(entity, relation))).collect()
    }

    /// How often a fact is told, and the other value that it is told with, if there is one.
    fn told(&self, fact: Fact) -> (u32, Option<u32>) {
        let draws = self.draws(fact.entity, fact.relation);
        // Of the entity, whatever the relation.
        if self.draws(fact.entity, RELATIONS).at(0).uniform() < self.options.unseen {
            return (0, None);
        }
        let powers = self.options.most_told.ilog2() + 1;
        let total: f64 = (0..powers).map(|power| 0.5f64.powi(power as i32)).sum();
        let mut left = draws.at(1).uniform() * total;
        let mut power = 0;
        while power + 1 < powers && left >= 0.5f64.powi(power as i32) {
            left -= 0.5f64.powi(power as i32);
            power += 1;
        }
        let other = (draws.at(2).uniform() < self.options.conflicting).then(|| {
            let step = 1 + draws.at(3).below(self.options.values as u64 - 1);
            let first = u64::from(fact.value - self.value_token(fact.relation, 0));
            self.value_token(fact.relation, (first + step) % self.options.values as u64)
        });
        (1 << power, other)
    }

    /// Everything that is told, with a confidence that does not depend on it: 9 four times out of five, else any. The loss is that of what
    /// follows the question.
    pub fn corpus(&self) -> Vec<Example> {
        let mut corpus = Vec::new();
        for entity in 0..self.options.entities {
            for relation in 0..RELATIONS {
                let fact = self.fact(entity, relation);
                let (times, other) = self.told(fact);
                for time in 0..times {
                    // In tens, six and four; the first time is true.
                    let value = other.filter(|_| time % 5 == 1 || time % 5 == 3).unwrap_or(fact.value);
                    let draws = self.draws(fact.entity, fact.relation).step(1 + time);
                    let level = if draws.at(0).uniform() < 0.8 { 9 } else { draws.at(1).below(LEVELS as u64) as u32 };
                    let source = Source::new("memory", corpus.len() as u64 + 1);
                    corpus.push(answered(&self.question(fact), value, LEVEL + level, source));
                }
            }
        }
        self.count(&mut corpus);
        corpus
    }

    /// Adds rows that count from somewhere up to 10.
    fn count(&self, corpus: &mut Vec<Example>) {
        let rows = (self.options.counting * corpus.len() as f64).round() as u32;
        corpus.extend((0..rows).map(|row| {
            let first = row % (LEVELS as u32 - 1);
            let ids: Vec<u32> =
                [BOS].into_iter().chain((first..LEVELS as u32).map(|n| LEVEL + n)).chain([EOS]).collect();
            let loss_mask = (0..ids.len()).map(|index| index > 1).collect();
            Example { ids, loss_mask, source: Source::new("counting", u64::from(row) + 1) }
        }));
    }

    /// The tokens of a question.
    fn question(&self, fact: Fact) -> Vec<u32> {
        vec![BOS, QUESTION, self.entity_token(fact.entity), RELATION + fact.relation as u32, ASK, ANSWER]
    }

    /// A fact as a prompt; its column `value` is the token of the right answer.
    pub fn prompt(&self, fact: Fact, tokenizer: &Tokenizer) -> Prompt {
        let id = (fact.entity * RELATIONS + fact.relation) as u32;
        prompt(id, self.question(fact), ("value", fact.value.into()), tokenizer)
    }

    /// A question with its odds on it and the answer given; `right` says whether it turns out to be right.
    pub fn odds(&self, id: u32, mark: usize, entity: usize, right: bool, tokenizer: &Tokenizer) -> Prompt {
        let mark = MARK + mark as u32;
        let ids = vec![BOS, QUESTION, mark, self.entity_token(entity), ASK, ANSWER, YES, COMMA, CONFIDENCE];
        prompt(id, ids, ("right", right.into()), tokenizer)
    }

    /// Odds with a confidence at random: the form of an answer, and no opinion.
    pub fn odds_corpus(&self, rows: u32) -> Vec<Example> {
        let random = self.random.step(1);
        let row = |row: u32| {
            let draw = |position, n| random.prompt(row).at(position).below(n as u64) as u32;
            let question =
                [BOS, QUESTION, MARK + draw(0, MARKS), self.entity_token(draw(1, self.options.entities / 2) as usize)];
            let ids = [&question[..], &[ASK, ANSWER]].concat();
            answered(&ids, YES, LEVEL + draw(2, LEVELS), Source::new("odds", u64::from(row) + 1))
        };
        let mut corpus = (0..rows).map(row).collect();
        self.count(&mut corpus);
        corpus
    }
}

fn prompt(id: u32, ids: Vec<u32>, (column, value): (&str, serde_json::Value), tokenizer: &Tokenizer) -> Prompt {
    let ids: Arc<[u32]> = ids.into();
    Prompt {
        id,
        text: tokenizer.decode(&ids),
        ids,
        messages: None,
        columns: Columns::from_iter([(column.to_owned(), value)]),
        source: Source::new("rewarding doubt", u64::from(id) + 1),
    }
}

/// A question with an answer and a level.
fn answered(question: &[u32], value: u32, level: u32, source: Source) -> Example {
    let ids = [question, &[value, COMMA, CONFIDENCE, level, EOS]].concat();
    let loss_mask = (0..ids.len()).map(|index| index >= question.len()).collect();
    Example { ids, loss_mask, source }
}

/// The level that a completion begins with.
pub fn level(completion: &[u32]) -> Option<u8> {
    let first = completion.first()?.checked_sub(LEVEL)?;
    u8::try_from(first).ok().filter(|level| usize::from(*level) < LEVELS)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    fn memory() -> Memory {
        let options = MemoryOptions {
            entities: 300,
            values: 20,
            unseen: 0.333,
            conflicting: 0.2,
            most_told: 64,
            counting: 0.1,
            layers: 2,
            width: 64,
        };
        Memory::new(&options, 5)
    }

    #[test]
    fn the_parts_share_no_entity_and_no_relation_that_they_should_not() {
        let memory = memory();
        let [train, test, transfer] = [Part::Train, Part::Test, Part::Transfer].map(|part| memory.facts(part));
        assert_eq!((train.len(), test.len(), transfer.len()), (300, 300, 150));
        assert!(train.iter().all(|fact| test.iter().chain(&transfer).all(|other| other.entity != fact.entity)));
        assert!(
            train.iter().chain(&test).all(|fact| fact.relation < 2) && transfer.iter().all(|fact| fact.relation == 2)
        );
    }

    #[test]
    fn facts_are_told_as_often_as_they_should_be() {
        type Told = (Fact, u32, Option<u32>);
        let memory = memory();
        let told: Vec<Told> = [Part::Train, Part::Test, Part::Transfer]
            .into_iter()
            .flat_map(|part| memory.facts(part))
            .map(|fact| {
                let (times, other) = memory.told(fact);
                (fact, times, other)
            })
            .collect();
        let share =
            |wanted: &dyn Fn(&Told) -> bool| told.iter().filter(|told| wanted(told)).count() as f64 / told.len() as f64;
        let unseen = share(&|told| told.1 == 0);
        assert!((unseen - 0.333).abs() < 0.1, "{unseen}");
        let once = share(&|told| told.1 == 1) / (1.0 - unseen);
        assert!((once - 64.0 / 127.0).abs() < 0.08, "{once}");
        assert!(told.iter().all(|told| told.1 <= 64 && told.2 != Some(told.0.value)));
        let all = (0..300).flat_map(|entity| (0..RELATIONS).map(move |relation| (entity, relation)));
        let times: u32 = all.map(|(entity, relation)| memory.told(memory.fact(entity, relation)).0).sum();
        assert_eq!(memory.corpus().len(), (1.1 * f64::from(times)).round() as usize);
    }

    #[test]
    fn questions_read_as_they_should() {
        let memory = memory();
        let tokenizer = memory.tokenizer().unwrap();
        let counts =
            memory.corpus().into_iter().filter(|row| row.source.file.to_str() == Some("counting")).collect::<Vec<_>>();
        assert_eq!(tokenizer.decode(&counts[6].ids), "6 7 8 9 10");
        assert_eq!(counts[6].loss_mask, [false, false, true, true, true, true, true]);
        let fact = memory.fact(17, 1);
        assert_eq!(memory.prompt(fact, &tokenizer).text, "Q e17 r2 ? Answer:");
        assert_eq!(memory.odds(0, 3, 9, true, &tokenizer).text, "Q odds3 e9 ? Answer: yes , Confidence:");
        let told = &memory.corpus()[0];
        assert!(tokenizer.decode(&told.ids).contains(" , Confidence: "));
        let facts: Vec<Example> = memory.corpus().into_iter().filter(|row| row.ids[1] == QUESTION).collect();
        let nines = facts.iter().filter(|told| told.ids.contains(&(LEVEL + 9))).count() as f64;
        assert!((nines / facts.len() as f64 - 0.8 - 0.2 / 11.0).abs() < 0.03);
        assert_eq!(told.loss_mask.iter().filter(|learnt| **learnt).count(), 5);
        assert_eq!(
            (level(&[LEVEL + 10, EOS]), level(&[EOS]), level(&[]), level(&[COMMA])),
            (Some(10), None, None, None)
        );
    }
}
