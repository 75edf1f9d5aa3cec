//! A small library of invented facts, and a question that takes several of them to answer.
//!
//! Every name belongs to one split for good (by its hash, as problems of a [`crate::Task`] do), and an episode's library
//! holds names of its own split only. So no fact of a held-out episode occurs in training, and nothing but looking it up
//! answers its question.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tasks::{Draws, Split, split_of};

/// What a question takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One fact: how many people a company employs.
    Lookup,
    /// Two facts, the second found through the first: inhabitants of the town where somebody lives.
    Hop,
    /// Two facts and a sum: people that two companies employ together.
    Sum,
    /// A fact and a product: the cost of several crates.
    Cost,
    /// Four facts and a difference: how much older one company's founder is than another's.
    Age,
}

impl Kind {
    /// The name in `kind` columns.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Hop => "hop",
            Self::Sum => "sum",
            Self::Cost => "cost",
            Self::Age => "age",
        }
    }
}

/// Facts and a question.
pub struct Library {
    /// One sentence each, in random order.
    pub documents: Vec<String>,
    /// The question.
    pub question: String,
    /// What it takes.
    pub kind: Kind,
    /// The documents that hold what is needed, in the order in which it can be found.
    pub evidence: Vec<usize>,
    /// A search for each of them.
    pub searches: Vec<String>,
    /// What is to be computed from the facts, where anything is.
    pub expression: Option<String>,
    /// The answer.
    pub answer: i64,
}

const FIRST: [&str; 24] = [
    "Mara", "Jonas", "Edda", "Pavel", "Lucia", "Anton", "Ines", "Oskar", "Freya", "Dario", "Selma", "Viktor", "Nora",
    "Emil", "Tilda", "Marek", "Alma", "Henrik", "Petra", "Silas", "Vera", "Bruno", "Livia", "Casper",
];
const LAST: [&str; 32] = [
    "Lind", "Horvat", "Brandt", "Novak", "Sorel", "Keller", "Vance", "Moreau", "Dahl", "Ferro", "Quint", "Salo",
    "Weber", "Ortega", "Lund", "Petrov", "Riva", "Hansen", "Castell", "Frey", "Bergman", "Tamm", "Okafor", "Silva",
    "Marsh", "Vogel", "Adler", "Rossi", "Nyberg", "Kovac", "Hale", "Duarte",
];
const ONSET: [&str; 16] =
    ["Vel", "Tor", "Mar", "Ost", "Bren", "Kal", "Lun", "Dor", "Fen", "Gris", "Hal", "Nor", "Pel", "Rav", "Sol", "Wes"];
const MIDDLE: [&str; 12] = ["a", "en", "i", "or", "u", "el", "an", "is", "o", "ar", "im", "e"];
const TOWN_END: [&str; 10] = ["burg", "stad", "ford", "mora", "vik", "dale", "haven", "by", "mont", "field"];
const COMPANY_END: [&str; 8] = ["Works", "Mills", "Foundry", "Brewery", "Textiles", "Glass", "Timber", "Motors"];

struct Person {
    name: String,
    born: i64,
    town: usize,
}

struct Company {
    name: String,
    founder: usize,
    seat: usize,
    employees: i64,
    price: i64,
}

/// A fact as it stands in the library, and a search that finds it.
struct Fact {
    text: String,
    search: String,
}

impl Library {
    /// A library of `size` towns and companies, and of twice as many people.
    pub fn draw(draws: &mut Draws, split: Split, size: usize, kinds: &[Kind]) -> Self {
        let mut names = Names { split, taken: Vec::new() };
        let towns: Vec<(String, i64, i64)> = (0..size)
            .map(|_| {
                let name = names.draw(draws, |draws| {
                    format!("{}{}{}", draws.pick(&ONSET), draws.pick(&MIDDLE), draws.pick(&TOWN_END))
                });
                (name, draws.between(1_200, 98_000), draws.between(1100, 1899))
            })
            .collect();
        let last = size as i64 - 1;
        let people: Vec<Person> = (0..2 * size)
            .map(|_| {
                let name = names.draw(draws, |draws| format!("{} {}", draws.pick(&FIRST), draws.pick(&LAST)));
                Person { name, born: draws.between(1940, 1999), town: draws.between(0, last) as usize }
            })
            .collect();
        let companies: Vec<Company> = (0..size)
            .map(|index| {
                let name = names.draw(draws, |draws| {
                    format!("{}{} {}", draws.pick(&ONSET), draws.pick(&MIDDLE), draws.pick(&COMPANY_END))
                });
                let seat = draws.between(0, last) as usize;
                Company { name, founder: index, seat, employees: draws.between(11, 990), price: draws.between(3, 60) }
            })
            .collect();
        let town = |index: usize| &towns[index].0;

        let inhabitants = |index: usize| Fact {
            text: format!("{} has {} inhabitants.", town(index), towns[index].1),
            search: format!("{} inhabitants", town(index)),
        };
        let home = |index: usize| Fact {
            text: format!("{} lives in {}.", people[index].name, town(people[index].town)),
            search: format!("{} lives in", people[index].name),
        };
        let born = |index: usize| Fact {
            text: format!("{} was born in {}.", people[index].name, people[index].born),
            search: format!("{} born", people[index].name),
        };
        let employees = |index: usize| Fact {
            text: format!("{} employs {} people.", companies[index].name, companies[index].employees),
            search: format!("{} employs people", companies[index].name),
        };
        let founder = |index: usize| Fact {
            text: format!("{} was started by {}.", companies[index].name, people[companies[index].founder].name),
            search: format!("{} started by", companies[index].name),
        };
        let price = |index: usize| Fact {
            text: format!("A crate made by {} costs {} crowns.", companies[index].name, companies[index].price),
            search: format!("crate {} costs", companies[index].name),
        };

        let kind = *draws.pick(kinds);
        let mut order: Vec<usize> = (0..size).collect();
        draws.shuffle(&mut order);
        let (a, b) = (order[0], order[1]);
        let (question, needed, expression, answer) = match kind {
            Kind::Lookup => (
                format!("How many people does {} employ?", companies[a].name),
                vec![employees(a)],
                None,
                companies[a].employees,
            ),
            Kind::Hop => {
                let person = draws.between(0, people.len() as i64 - 1) as usize;
                let home_town = people[person].town;
                let question = format!("How many inhabitants has the town where {} lives?", people[person].name);
                (question, vec![home(person), inhabitants(home_town)], None, towns[home_town].1)
            }
            Kind::Sum => {
                let (x, y) = (companies[a].employees, companies[b].employees);
                let question =
                    format!("How many people do {} and {} employ together?", companies[a].name, companies[b].name);
                (question, vec![employees(a), employees(b)], Some(format!("{x} + {y}")), x + y)
            }
            Kind::Cost => {
                let (count, each) = (draws.between(3, 40), companies[a].price);
                let question = format!("How many crowns do {count} crates made by {} cost?", companies[a].name);
                (question, vec![price(a)], Some(format!("{count} * {each}")), count * each)
            }
            Kind::Age => {
                let year = |company: usize| people[companies[company].founder].born;
                let (elder, younger) = if year(a) <= year(b) { (a, b) } else { (b, a) };
                let question = format!(
                    "How many years older is the founder of {} than the founder of {}?",
                    companies[elder].name, companies[younger].name
                );
                let facts = [elder, younger].map(|company| [founder(company), born(companies[company].founder)]);
                let expression = format!("{} - {}", year(younger), year(elder));
                (question, facts.into_iter().flatten().collect(), Some(expression), year(younger) - year(elder))
            }
        };

        let mut documents: Vec<String> = (0..size)
            .flat_map(|index| {
                let (name, _, year) = &towns[index];
                let seat = format!("{} has its seat in {}.", companies[index].name, town(companies[index].seat));
                let founded = format!("{name} was founded in {year}.");
                let texts = [inhabitants(index), employees(index), founder(index), price(index)].map(|fact| fact.text);
                texts.into_iter().chain([seat, founded])
            })
            .chain((0..people.len()).flat_map(|index| [home(index).text, born(index).text]))
            .collect();
        draws.shuffle(&mut documents);
        let place = |fact: &Fact| documents.iter().position(|text| *text == fact.text);
        let evidence = needed.iter().filter_map(place).collect();
        let searches = needed.into_iter().map(|fact| fact.search).collect();
        Self { documents, question, kind, evidence, searches, expression, answer }
    }
}

/// Names of one split, each once.
struct Names {
    split: Split,
    taken: Vec<String>,
}

impl Names {
    fn draw(&mut self, draws: &mut Draws, mut candidate: impl FnMut(&mut Draws) -> String) -> String {
        loop {
            let name = candidate(draws);
            if split_of(&name) == self.split && !self.taken.contains(&name) {
                self.taken.push(name.clone());
                return name;
            }
        }
    }
}
