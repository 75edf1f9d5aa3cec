//! Questions over a small library, with a search tool and a calculator.
//!
//! Each episode has a library of its own, of some dozens of invented facts, and a question that one to four of them
//! answer, some with a calculation. A turn with tool calls is answered with their results; the first turn without one is
//! the answer, judged by its last number. `search` ranks by BM25, `calculator` computes exact fractions.

mod library;
pub mod search;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::call::{ToolCall, calls};
use super::{Environment, EnvironmentError, EpisodeId, Transition};
use crate::score::Status;
use crate::tasks::{Problem, candidates};
use crate::verify::expression::evaluate;
use crate::verify::number::NumberReward;
use crate::verify::{Budget, NumberOptions, Place, Rational};
pub use library::Kind;
use library::Library;
use search::Index;

/// Calls of one turn that are answered; further ones are refused.
const MAX_CALLS: usize = 8;
/// Steps of the calculator for one expression.
const CALCULATOR_STEPS: u64 = 10_000;

/// Options of the `tools` environment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ToolsOptions {
    /// Kinds of questions to choose from, uniformly: `lookup`, `hop`, `sum`, `cost` and `age`.
    pub kinds: Vec<Kind>,
    /// Towns, and as many companies and twice as many people, in the library of an episode: ten documents for each.
    #[schemars(range(min = 2, max = 50))]
    pub size: usize,
    /// Documents that a search returns.
    #[schemars(range(min = 1, max = 20))]
    pub results: usize,
    /// Turns until an episode ends without an answer.
    #[schemars(range(min = 1, max = 100))]
    pub max_turns: usize,
    /// Share of the reward that is paid turn by turn, for each needed document that a search returns for the first time;
    /// the rest is paid for the right answer.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub evidence: f64,
    /// Where in the last turn the answer stands: `text` (its last number), `tag` (inside `<answer>`) or `boxed`.
    pub place: Place,
    /// Who declares the tools to the model.
    pub declare: Declare,
    /// Role of the messages with results: `tool`, or `user` where the chat template does not know that role.
    pub observer: String,
}

/// Who declares the tools to the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Declare {
    /// The system message, for models whose chat template knows no tools.
    #[default]
    System,
    /// The chat template, in the words the model was trained with.
    Template,
}

impl Default for ToolsOptions {
    fn default() -> Self {
        Self {
            kinds: vec![Kind::Lookup, Kind::Hop, Kind::Sum, Kind::Cost, Kind::Age],
            size: 4,
            results: 3,
            max_turns: 8,
            evidence: 0.0,
            place: Place::Text,
            declare: Declare::System,
            observer: "tool".into(),
        }
    }
}

/// See [`ToolsOptions`].
pub struct Tools {
    options: ToolsOptions,
    verifier: NumberReward,
    episode: Option<Episode>,
}

/// An episode in progress.
struct Episode {
    library: Library,
    index: Index,
    turns: usize,
    /// For each needed document, whether a search has returned it.
    seen: Vec<bool>,
}

impl Tools {
    /// The environment with these options.
    ///
    /// # Errors
    /// An option with an impossible value.
    pub fn new(options: ToolsOptions) -> Result<Self, EnvironmentError> {
        let refuse = |reason: String| Err(EnvironmentError { environment: "tools", reason });
        if options.kinds.is_empty() {
            return refuse("kinds is empty".into());
        }
        for (name, value, most) in
            [("size", options.size, 50), ("results", options.results, 20), ("max_turns", options.max_turns, 100)]
        {
            let least = if name == "size" { 2 } else { 1 };
            if !(least..=most).contains(&value) {
                return refuse(format!("{name} is {value}, expected {least} to {most}"));
            }
        }
        if !(0.0..=1.0).contains(&options.evidence) {
            return refuse(format!("evidence is {}, expected 0 to 1", options.evidence));
        }
        let number = NumberOptions { place: options.place, ..NumberOptions::default() };
        let verifier = NumberReward::new("answer".into(), number)
            .map_err(|error| EnvironmentError { environment: "tools", reason: error.to_string() })?;
        Ok(Self { options, verifier, episode: None })
    }

    fn instructions(&self) -> String {
        let answer = match self.options.place {
            Place::Text => "only the number",
            Place::Tag => "the number inside <answer></answer>",
            Place::Boxed => r"the number inside \boxed{}",
        };
        let task = "Answer the question. Facts are found with `search`, calculations are done with `calculator`.";
        let declared = match self.options.declare {
            Declare::Template => String::new(),
            Declare::System => {
                let tools: Vec<String> = declarations().iter().map(Value::to_string).collect();
                let call = r#"{"name": <name>, "arguments": <arguments>}"#;
                let tools = tools.join("\n");
                format!("\n\n<tools>\n{tools}\n</tools>\n\nTo call one, write\n<tool_call>\n{call}\n</tool_call>\n")
            }
        };
        format!("{task}{declared}\nWhen you know the answer, reply with {answer}.")
    }
}

/// The tools as JSON schemas.
fn declarations() -> Vec<Value> {
    let function = |name: &str, description: &str, argument: &str, meaning: &str| {
        json!({"type": "function", "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string", "description": meaning}},
                "required": [argument],
            },
        }})
    };
    vec![
        function("search", "Finds the documents that fit best.", "query", "Words to look for."),
        function("calculator", "Computes an expression exactly.", "expression", "Numbers, + - * / ^ and parentheses."),
    ]
}

impl Episode {
    /// The result of a call, or what is wrong with it.
    fn call(&mut self, call: &ToolCall, results: usize) -> Result<String, String> {
        match call.name.as_str() {
            "search" => {
                let found = self.index.search(call.text("query")?, results);
                for (seen, document) in self.seen.iter_mut().zip(&self.library.evidence) {
                    *seen |= found.contains(document);
                }
                let texts: Vec<&str> =
                    found.iter().map(|&document| self.library.documents[document].as_str()).collect();
                Ok(if texts.is_empty() { "no document fits".into() } else { texts.join("\n") })
            }
            "calculator" => evaluate(call.text("expression")?, &mut Budget::new(CALCULATOR_STEPS))
                .map(|value| value.to_string())
                .map_err(|error| format!("calculator: {error}")),
            other => Err(format!("there is no tool {other:?}; there are search and calculator")),
        }
    }

    fn seen(&self) -> usize {
        self.seen.iter().filter(|seen| **seen).count()
    }
}

impl Environment for Tools {
    fn name(&self) -> &'static str {
        "tools"
    }

    fn observer(&self) -> &str {
        &self.options.observer
    }

    fn tools(&self) -> Vec<Value> {
        match self.options.declare {
            Declare::System => Vec::new(),
            Declare::Template => declarations(),
        }
    }

    fn reset(&mut self, EpisodeId { seed, split, index }: EpisodeId) -> Problem {
        // Every candidate is of the split asked for, since its names are; the first is taken.
        let mut draws = candidates(seed, index).next().expect("there are candidates");
        let library = Library::draw(&mut draws, split, self.options.size, &self.options.kinds);
        let problem = Problem {
            system: Some(self.instructions()),
            question: library.question.clone(),
            answer: library.answer.to_string(),
            kind: library.kind.name(),
            key: library.question.clone(),
        };
        let index = Index::new(library.documents.iter().map(String::as_str));
        let seen = vec![false; library.evidence.len()];
        self.episode = Some(Episode { library, index, turns: 0, seen });
        problem
    }

    fn step(&mut self, turn: &str) -> Transition {
        let Some(episode) = &mut self.episode else { return Transition::end(0.0, Status::Wrong) };
        let ToolsOptions { max_turns, results, evidence, .. } = self.options;
        let calls = calls(turn);
        if calls.is_empty() {
            let status = self.verifier.verify(turn, Rational::from(episode.library.answer));
            let reward = if status == Status::Ok { 1.0 - evidence } else { 0.0 };
            self.episode = None;
            return Transition::end(reward, status);
        }
        let before = episode.seen();
        let mut transition = Transition { calls: calls.len(), ..Transition::next(String::new(), 0.0, Status::Ok) };
        transition.observations.clear();
        let refused = calls.len().saturating_sub(MAX_CALLS);
        for call in calls.into_iter().take(MAX_CALLS) {
            let (result, failure) = match call {
                Ok(call) => (episode.call(&call, results), Status::Wrong),
                Err(reason) => (Err(reason), Status::Malformed),
            };
            transition.observations.push(result.unwrap_or_else(|reason| {
                transition.failed_calls += 1;
                transition.status = transition.status.max(failure);
                format!("error: {reason}")
            }));
        }
        if refused > 0 {
            transition.failed_calls += refused;
            transition.status = Status::Malformed;
            transition.observations.push(format!("error: more than {MAX_CALLS} calls in one turn"));
        }
        transition.reward = evidence * (episode.seen() - before) as f64 / episode.seen.len() as f64;
        episode.turns += 1;
        if episode.turns == max_turns {
            self.episode = None;
            transition.done = true;
            transition.status = Status::Timeout;
        }
        transition
    }

    fn demonstration(&self) -> Vec<String> {
        let Some(episode) = &self.episode else { return Vec::new() };
        let library = &episode.library;
        let searches = library.searches.iter().map(|query| ToolCall::new("search", "query", query));
        let sum = library.expression.iter().map(|expression| ToolCall::new("calculator", "expression", expression));
        let answer = match self.options.place {
            Place::Text => library.answer.to_string(),
            Place::Tag => format!("<answer>{}</answer>", library.answer),
            Place::Boxed => format!(r"\boxed{{{}}}", library.answer),
        };
        searches.chain(sum).map(|call| call.render()).chain([answer]).collect()
    }
}
