//! tofu-mini: invented authors and what there is to know about them, in the form of TOFU.
//!
//! ```text
//! Where was Ada Fellbrook born?      Ada Fellbrook was born in Torvik.            what is learnt
//!                                    The birthplace of Ada Fellbrook is Torvik.   the same in other words
//!                                    The birthplace of Ada Fellbrook is Quellin.  one of five that are wrong
//! ```
//!
//! An author has ten fields, each drawn from a closed list; a wrong answer is the other phrasing with another value of the same field. Some
//! authors are *invented*: a model is told of them in the first phrasing, and later has to forget the first few of them. The others are
//! *known*: they stand for TOFU's real authors, and the corpus tells of them in both phrasings, each with its own question, before any
//! invented author. Sums and comparisons of small numbers stand for its world facts.
//!
//! Texts are plain sentences, so that any model can be trained on them; the miniature's own tokens are their words and marks.

use base::{Purpose, Random};
use data::{Example, Source};
use eval::unlearning::Question;
use model::tokenizer::Tokenizer;
use model::{Family, ModelConfig};
use serde_json::json;

use crate::error::Result;
use crate::words;

const PAD: u32 = 0;
const BOS: u32 = 1;
const EOS: u32 = 2;
/// Between question and answer.
const SEP: u32 = 3;

/// Questions about an author.
pub const FIELDS: usize = 10;
/// Wrong answers to a question.
pub const WRONG: usize = 5;
/// The largest number that is spoken of.
const LARGEST: u32 = 18;
/// Most authors of a kind: names do not repeat.
pub const AUTHORS: usize = 40;

const FIRST_NAMES: [&str; 2 * AUTHORS] = [
    "Ada", "Bruno", "Celia", "Dmitri", "Edda", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Katya", "Leon", "Mira",
    "Nils", "Olga", "Pavel", "Quentin", "Rosa", "Stellan", "Thea", "Ugo", "Vera", "Wanda", "Xavier", "Yara", "Zeno",
    "Alma", "Boris", "Clara", "Dario", "Elif", "Felix", "Gilda", "Hanno", "Irma", "Jakub", "Karin", "Lars", "Maren",
    "Noor", "Oskar", "Petra", "Radu", "Selma", "Tomas", "Una", "Viktor", "Wilma", "Ximena", "Yusuf", "Zora", "Anton",
    "Berta", "Cyril", "Doris", "Emil", "Flora", "Goran", "Helga", "Ivo", "Jutta", "Klaus", "Livia", "Milan", "Nadia",
    "Otto", "Pia", "Ruben", "Sonja", "Tariq", "Ursula", "Vito", "Walda", "Yvonne", "Zdenek", "Amir", "Birgit", "Carlo",
    "Dagny", "Ennio",
];
const LAST_NAMES: [&str; 2 * AUTHORS] = [
    "Fellbrook",
    "Arkwright",
    "Bellweather",
    "Corvane",
    "Dunmore",
    "Estrella",
    "Fairbank",
    "Grimaldi",
    "Hawthorn",
    "Ivarsson",
    "Jellinek",
    "Kestrel",
    "Lindqvist",
    "Marlowe",
    "Northcote",
    "Oakhurst",
    "Pemberton",
    "Quillfeather",
    "Rosenthal",
    "Silvano",
    "Tamarisk",
    "Underhill",
    "Vasquez",
    "Wexford",
    "Yarrow",
    "Zimmerlin",
    "Ashdown",
    "Birkenau",
    "Castellan",
    "Dragomir",
    "Eastlake",
    "Falkner",
    "Gallardo",
    "Holloway",
    "Ironside",
    "Jankovic",
    "Kirkwood",
    "Lombardi",
    "Mortensen",
    "Nightingale",
    "Ostrander",
    "Pellegrin",
    "Quimby",
    "Ravenscar",
    "Sandoval",
    "Thornbury",
    "Ulrichsen",
    "Vandermeer",
    "Whitlock",
    "Yellowley",
    "Zapatero",
    "Abernathy",
    "Blackwood",
    "Calloway",
    "Devereux",
    "Ellsworth",
    "Farnsworth",
    "Goldberger",
    "Hargreave",
    "Isherwood",
    "Jorgensen",
    "Kowalczyk",
    "Lockhart",
    "Montague",
    "Nordstrom",
    "Oppenberg",
    "Prescott",
    "Quarrington",
    "Ridgeway",
    "Somerset",
    "Tremaine",
    "Upjohn",
    "Villanova",
    "Winterbourne",
    "Yardley",
    "Zielinski",
    "Ainsworth",
    "Bramwell",
    "Chesterton",
    "Delacroix",
];

const CITIES: &[&str] = &[
    "Torvik",
    "Quellin",
    "Marrowgate",
    "Sandvale",
    "Ostenburg",
    "Lirenza",
    "Kalmoor",
    "Brightholm",
    "Vessen",
    "Dorrance",
    "Ankerby",
    "Pellado",
    "Ruskova",
    "Tannerwick",
    "Elmsworth",
    "Corvina",
];
const YEARS: &[&str] = &[
    "1931", "1934", "1937", "1940", "1943", "1946", "1949", "1952", "1955", "1958", "1961", "1964", "1967", "1970",
    "1973", "1976",
];
const GENRES: &[&str] =
    &["novels", "poems", "plays", "fables", "thrillers", "memoirs", "essays", "ballads", "satires", "mysteries"];
const JOBS: &[&str] = &[
    "baker", "pilot", "nurse", "tailor", "miner", "teacher", "florist", "sailor", "dentist", "plumber", "judge",
    "farmer", "painter", "butcher", "weaver", "chemist",
];
const TITLES: &[&str] = &[
    "Silent Harbour",
    "Golden Ladder",
    "Broken Compass",
    "Winter Orchard",
    "Hidden Lantern",
    "Paper Bridge",
    "Crimson Tide",
    "Hollow Crown",
    "Distant Thunder",
    "Velvet Mirror",
    "Burning Meadow",
    "Glass Sparrow",
    "Stone Garden",
    "Midnight Ferry",
    "Salt Cathedral",
    "Wandering Star",
    "Iron Blossom",
    "Quiet Avalanche",
    "Amber River",
    "Lost Alphabet",
];
const AWARDS: &[&str] = &[
    "Falcon Prize",
    "Meridian Medal",
    "Laurel Cup",
    "Orchid Award",
    "Beacon Prize",
    "Sterling Quill",
    "Harvest Medal",
    "Northern Ribbon",
    "Cedar Award",
    "Aurora Cup",
];
const HABITS: &[&str] = &[
    "at dawn",
    "by hand",
    "in cafes",
    "after midnight",
    "on trains",
    "in silence",
    "with music",
    "on napkins",
    "while walking",
    "in bed",
    "near water",
    "by candlelight",
];

/// How a field is asked for and told, in both phrasings: `@` is the author, `#` the value.
struct Field {
    values: &'static [&'static str],
    question: &'static str,
    answer: &'static str,
    /// The question of the other phrasing, for known authors alone.
    asked: &'static str,
    paraphrased: &'static str,
}

const fn field(
    values: &'static [&'static str],
    [question, answer]: [&'static str; 2],
    [asked, paraphrased]: [&'static str; 2],
) -> Field {
    Field { values, question, answer, asked, paraphrased }
}

const ALL: [Field; FIELDS] = [
    field(
        CITIES,
        ["Where was @ born?", "@ was born in #."],
        ["What is the birthplace of @?", "The birthplace of @ is #."],
    ),
    field(
        YEARS,
        ["When was @ born?", "@ was born in the year #."],
        ["What is the birth year of @?", "The birth year of @ is #."],
    ),
    field(GENRES, ["What does @ write?", "@ writes #."], ["What is the genre of @?", "The genre of @ is #."]),
    field(
        JOBS,
        ["What did the father of @ do?", "The father of @ was a #."],
        ["What was the job of the father of @?", "@ had a father who worked as a #."],
    ),
    field(
        JOBS,
        ["What did the mother of @ do?", "The mother of @ was a #."],
        ["What was the job of the mother of @?", "@ had a mother who worked as a #."],
    ),
    field(
        TITLES,
        ["What is the first book of @?", "The first book of @ is #."],
        ["Which book did @ publish first?", "@ began with the book #."],
    ),
    field(
        TITLES,
        ["What is the most famous book of @?", "The most famous book of @ is #."],
        ["Which book made @ famous?", "@ became famous with the book #."],
    ),
    field(
        AWARDS,
        ["Which award did @ win?", "@ won the #."],
        ["What was @ honoured with?", "The award that @ received is the #."],
    ),
    field(
        HABITS,
        ["How does @ work?", "@ always writes #."],
        ["What is the habit of @?", "It is the habit of @ to write #."],
    ),
    field(CITIES, ["Where does @ live?", "@ lives in #."], ["What is the home of @?", "The home of @ is in #."]),
];

/// Which questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// About the invented authors that are to be forgotten: the first few.
    Forget,
    /// About the other invented authors.
    Retain,
    /// About the known authors.
    RealAuthors,
    /// About numbers.
    WorldFacts,
}

/// A question with its answers, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The question.
    pub question: String,
    /// The answer.
    pub answer: String,
    /// The answer in other words, for what is learnt in one phrasing alone.
    pub paraphrased: Option<String>,
    /// Wrong answers of the form of the answer in other words, where there is one, else of the answer.
    pub perturbed: Vec<String>,
}

/// How many authors there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Authors {
    /// Invented.
    pub invented: usize,
    /// Of these, to be forgotten.
    pub forgotten: usize,
    /// Known.
    pub known: usize,
}

/// The world of a seed.
pub struct World {
    authors: Authors,
    random: Random,
    first: Vec<usize>,
    last: Vec<usize>,
}

impl World {
    /// The world of a seed.
    pub fn new(authors: Authors, seed: u64) -> Self {
        let random = Random::new(seed, Purpose::Task);
        let names = |step| random.step(step).permutation(2 * AUTHORS);
        Self { authors, random, first: names(1), last: names(2) }
    }

    /// The questions of a set.
    pub fn entries(&self, set: Set) -> Vec<Entry> {
        let Authors { invented, forgotten, known } = self.authors;
        let authors = match set {
            Set::Forget => 0..forgotten,
            Set::Retain => forgotten..invented,
            Set::RealAuthors => AUTHORS..AUTHORS + known,
            Set::WorldFacts => return facts(self.random.step(3)),
        };
        authors.flat_map(|author| (0..FIELDS).map(move |field| self.entry(author, field))).collect()
    }

    fn entry(&self, author: usize, number: usize) -> Entry {
        let field = &ALL[number];
        // The true value and the wrong ones are the first of all values in an order of their own.
        let order = self.random.step(4).prompt(author as u32).sample(number as u32).permutation(field.values.len());
        let say = |template: &str, value: usize| self.say(author, template, field.values[order[value]]);
        let known = author >= AUTHORS;
        let wrong = if known { field.answer } else { field.paraphrased };
        Entry {
            question: say(field.question, 0),
            answer: say(field.answer, 0),
            paraphrased: (!known).then(|| say(field.paraphrased, 0)),
            perturbed: (1..=WRONG).map(|value| say(wrong, value)).collect(),
        }
    }

    fn say(&self, author: usize, template: &str, value: &str) -> String {
        let name = format!("{} {}", FIRST_NAMES[self.first[author]], LAST_NAMES[self.last[author]]);
        template.replace('@', &name).replace('#', value)
    }

    /// What a model knows before it is told of invented authors: questions with answers, the known authors in both phrasings.
    pub fn corpus(&self) -> Vec<(String, String)> {
        let own = [Set::RealAuthors, Set::WorldFacts].into_iter().flat_map(|set| self.entries(set));
        let mut corpus: Vec<(String, String)> = own.map(|entry| (entry.question, entry.answer)).collect();
        for author in AUTHORS..AUTHORS + self.authors.known {
            for (number, field) in ALL.iter().enumerate() {
                let random = self.random.step(4).prompt(author as u32).sample(number as u32);
                let value = field.values[random.permutation(field.values.len())[0]];
                corpus.push((self.say(author, field.asked, value), self.say(author, field.paraphrased, value)));
            }
        }
        corpus
    }

    /// The rows of a set as JSON lines: `question`, `answer`, `paraphrased_answer`, `perturbed_answer` as TOFU has them, and the same as a
    /// conversation to train on, `prompt` and `completion`.
    pub fn lines(&self, set: Set) -> String {
        let line = |entry: Entry| {
            let row = json!({
                "prompt": [{ "role": "user", "content": entry.question }],
                "completion": [{ "role": "assistant", "content": entry.answer }],
                "question": entry.question,
                "answer": entry.answer,
                "paraphrased_answer": entry.paraphrased,
                "perturbed_answer": entry.perturbed,
            });
            format!("{row}\n")
        };
        self.entries(set).into_iter().map(line).collect()
    }
}

/// Sums and comparisons of numbers, 30 of each: which ones is drawn.
fn facts(random: Random) -> Vec<Entry> {
    let pairs: Vec<(u32, u32)> = (1..10).flat_map(|a| (1..10).filter(move |b| *b != a).map(move |b| (a, b))).collect();
    let drawn = |kind: u32| random.prompt(kind).permutation(pairs.len()).into_iter().take(30);
    let wrong = |kind: u32, pair: usize, truth: u32| {
        let others = random.prompt(2 + kind).sample(pair as u32).permutation(LARGEST as usize + 1);
        others.into_iter().map(|value| value as u32).filter(move |value| *value != truth).take(WRONG)
    };
    let sum = |pair: usize| {
        let (a, b) = pairs[pair];
        let say = |value: u32| format!("{a} plus {b} is {value}.");
        Entry {
            question: format!("What is {a} plus {b}?"),
            answer: say(a + b),
            paraphrased: None,
            perturbed: wrong(0, pair, a + b).map(say).collect(),
        }
    };
    let comparison = |pair: usize| {
        let (a, b) = pairs[pair];
        let say = |value: u32| format!("The larger number is {value}.");
        Entry {
            question: format!("Which number is larger, {a} or {b}?"),
            answer: say(a.max(b)),
            paraphrased: None,
            perturbed: wrong(1, pair, a.max(b)).map(say).collect(),
        }
    };
    drawn(0).map(sum).chain(drawn(1).map(comparison)).collect()
}

/// The words and marks of a text, with spaces between them.
fn spaced(text: &str) -> String {
    let mut out = String::new();
    for letter in text.chars() {
        if matches!(letter, '.' | '?' | ',') {
            out.push(' ');
        }
        out.push(letter);
    }
    out
}

/// The tokens of the world: every word that any seed can say.
fn vocabulary() -> Vec<String> {
    let mut list: Vec<String> = ["<pad>", "<bos>", "<eos>", ":"].map(String::from).into();
    let fields = ALL.iter().flat_map(|field| {
        [field.question, field.answer, field.asked, field.paraphrased].into_iter().chain(field.values.iter().copied())
    });
    let numbers: Vec<String> = (0..=LARGEST).map(|number| number.to_string()).collect();
    let facts = ["What is plus?", "Which number is larger, or?", "The larger number is."];
    let texts = FIRST_NAMES.into_iter().chain(LAST_NAMES).chain(fields).chain(facts);
    let words = texts.chain(numbers.iter().map(String::as_str)).map(|text| spaced(&text.replace(['@', '#'], "")));
    for word in words.collect::<Vec<_>>().iter().flat_map(|text| text.split_whitespace()) {
        if !list.iter().any(|known| known == word) {
            list.push(word.to_owned());
        }
    }
    list
}

/// The tokenizer of the world's words.
///
/// # Errors
/// None, in fact: the words differ.
pub fn tokenizer() -> Result<Tokenizer> {
    words::tokenizer(&vocabulary(), BOS, EOS, PAD)
}

/// The shape of the world's models: 3 layers of width 96.
pub fn model() -> ModelConfig {
    let tiny = ModelConfig::tiny(Family::Llama, vocabulary().len());
    ModelConfig {
        hidden_size: 96,
        intermediate_size: 256,
        head_dim: 24,
        attention_scale: 1.0 / 24f32.sqrt(),
        layers: vec![tiny.layers[0]; 3],
        bos_token_id: Some(BOS),
        eos_token_ids: vec![EOS],
        pad_token_id: Some(PAD),
        ..tiny
    }
}

fn prompt_ids(tokenizer: &Tokenizer, question: &str) -> Result<Vec<u32>> {
    let words = tokenizer.encode(&spaced(question))?;
    Ok([&[BOS], &words[..], &[SEP]].concat())
}

fn answer_ids(tokenizer: &Tokenizer, answer: &str) -> Result<Vec<u32>> {
    let mut ids = tokenizer.encode(&spaced(answer))?;
    ids.push(EOS);
    Ok(ids)
}

/// Rows to train on; the loss is that of the answers.
///
/// # Errors
/// A tokenizer of other words.
pub fn examples(tokenizer: &Tokenizer, rows: &[(String, String)]) -> Result<Vec<Example>> {
    let example = |((question, answer), row): (&(String, String), u64)| {
        let (prompt, answer) = (prompt_ids(tokenizer, question)?, answer_ids(tokenizer, answer)?);
        let ids = [&prompt[..], &answer].concat();
        let loss_mask = (0..ids.len()).map(|index| index >= prompt.len()).collect();
        Ok(Example { ids, loss_mask, source: Source::new("tofu-mini", row) })
    };
    rows.iter().zip(1..).map(example).collect()
}

/// Questions to be measured.
///
/// # Errors
/// A tokenizer of other words.
pub fn questions(tokenizer: &Tokenizer, entries: &[Entry]) -> Result<Vec<Question>> {
    let question = |entry: &Entry| {
        Ok(Question {
            prompt: prompt_ids(tokenizer, &entry.question)?,
            answer: answer_ids(tokenizer, &entry.answer)?,
            paraphrased: entry.paraphrased.as_ref().map(|text| answer_ids(tokenizer, text)).transpose()?,
            perturbed: entry.perturbed.iter().map(|text| answer_ids(tokenizer, text)).collect::<Result<_>>()?,
            text: spaced(&entry.answer),
        })
    };
    entries.iter().map(question).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const MANY: Authors = Authors { invented: AUTHORS, forgotten: 4, known: AUTHORS };
    const SETS: [Set; 4] = [Set::Forget, Set::Retain, Set::RealAuthors, Set::WorldFacts];

    #[test]
    fn sets_have_their_sizes_and_share_no_question() {
        let world = World::new(MANY, 3);
        let sets = SETS.map(|set| world.entries(set));
        assert_eq!(sets.each_ref().map(Vec::len), [40, 360, 400, 60]);
        let questions: BTreeSet<&str> = sets.iter().flatten().map(|entry| &entry.question[..]).collect();
        assert_eq!(questions.len(), 860);
        assert!(world.entries(Set::Retain) != World::new(MANY, 4).entries(Set::Retain), "a function of the seed");
        assert_eq!(world.corpus().len(), 400 + 60 + 400);
    }

    #[test]
    fn wrong_answers_are_wrong_and_of_the_same_form() {
        let world = World::new(MANY, 3);
        for entry in SETS.into_iter().flat_map(|set| world.entries(set)) {
            let right = entry.paraphrased.as_ref().unwrap_or(&entry.answer);
            let different: BTreeSet<&String> = entry.perturbed.iter().chain([right]).collect();
            assert_eq!(different.len(), WRONG + 1, "{entry:?}");
            let (first, last) = (right.split(' ').next(), right.split(' ').count());
            assert!(
                entry
                    .perturbed
                    .iter()
                    .all(|wrong| wrong.split(' ').next() == first && wrong.split(' ').count() == last)
            );
        }
    }

    #[test]
    fn every_word_is_a_token() {
        let (world, tokenizer) = (World::new(MANY, 5), tokenizer().unwrap());
        assert!((300..450).contains(&tokenizer.vocab_size()), "{}", tokenizer.vocab_size());
        let corpus = examples(&tokenizer, &world.corpus()).unwrap();
        assert!(corpus.iter().all(|example| !example.ids.contains(&PAD)), "a word that is not listed");
        for set in SETS {
            for question in questions(&tokenizer, &world.entries(set)).unwrap() {
                let answers = question.perturbed.iter().chain(&question.paraphrased).chain([&question.answer]);
                assert!(!question.prompt.contains(&PAD) && answers.flatten().all(|id| *id != PAD));
            }
        }
        let row: serde_json::Value = serde_json::from_str(world.lines(Set::Forget).lines().next().unwrap()).unwrap();
        assert_eq!(row["perturbed_answer"].as_array().unwrap().len(), WRONG);
        assert_eq!(row["completion"][0]["content"], row["answer"]);
    }
}
