//! Conversations: episodes in which somebody answers the model's turns.
//!
//! ```text
//! completion = turn 1 | what follows it | turn 2 | what follows it | ... | last turn
//!              sampled  given             sampled  given                   sampled
//! ```
//!
//! The tokens of a turn are those sampled, for good: nothing is decoded and encoded again. What follows a turn (its closing
//! mark, the messages of the other side, the opening of the next turn) is the *suffix* that the chat template renders after
//! it, and is encoded on its own. [`Fidelity`] says whether the template, given the whole conversation as text, would have
//! come to the same tokens. Keys and values stay in their slot from turn to turn; a conversation that waits for an answer
//! leaves its slot to another.

use std::error::Error as StdError;

use model::chat::{ChatTemplate, Message};
use model::tokenizer::Tokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Finish, Request, Result};

/// How long conversations may become, beside [`crate::SamplingOptions::max_new_tokens`], which bounds all tokens after the
/// prompt, those of the other side among them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConversationOptions {
    /// Most turns of the model.
    #[schemars(range(min = 1))]
    pub max_turns: usize,
    /// Most tokens of a turn. A turn that reaches them is closed and answered like any other.
    #[schemars(range(min = 1))]
    pub max_turn_tokens: usize,
}

impl Default for ConversationOptions {
    fn default() -> Self {
        Self { max_turns: 16, max_turn_tokens: 256 }
    }
}

impl ConversationOptions {
    /// Refuses values that make no sense, naming the option.
    pub fn validate(&self) -> Result<()> {
        for (option, value) in [("max_turns", self.max_turns), ("max_turn_tokens", self.max_turn_tokens)] {
            if value == 0 {
                return Err(Error::Option { option, got: "0".into(), expected: "at least 1" });
            }
        }
        Ok(())
    }
}

/// Conversations that are to be held: one for each request.
#[derive(Clone, Copy)]
pub struct Dialogue<'a> {
    /// The model's chat template.
    pub template: &'a ChatTemplate,
    /// The messages that each request's prompt was rendered from.
    pub openings: &'a [Opening<'a>],
    /// The other side.
    pub respondent: &'a dyn Respondent,
    /// How long they may become.
    pub options: &'a ConversationOptions,
}

/// What a conversation starts from.
#[derive(Clone, Copy, Debug)]
pub struct Opening<'a> {
    /// The messages of the prompt.
    pub messages: &'a [Message],
    /// Tools that the chat template declares.
    pub tools: Option<&'a [Value]>,
}

/// The other side of conversations: an environment, a user, another model.
pub trait Respondent: Sync {
    /// Answers a turn. Each turn of a conversation is asked about once, in order; different conversations at the same time
    /// and in any order.
    ///
    /// # Errors
    /// Whatever makes it pointless to go on with any conversation.
    fn respond(&self, turn: TurnEnd<'_>) -> std::result::Result<Response, Box<dyn StdError + Send + Sync>>;

    /// Whether an answer may take long. It is then waited for on a thread of its own while other conversations go on.
    fn is_slow(&self) -> bool {
        false
    }
}

/// A turn of the model that has ended.
#[derive(Clone, Copy, Debug)]
pub struct TurnEnd<'a> {
    /// Position of the conversation's request in the list.
    pub conversation: usize,
    /// The turn, from 0.
    pub number: usize,
    /// What the model said, without special tokens and cut before a stop string.
    pub text: &'a str,
    /// Why the turn ended.
    pub finish: Finish,
}

/// What follows a turn.
#[derive(Clone, Debug, PartialEq)]
pub enum Response {
    /// These messages, and then another turn.
    Continue(Vec<Message>),
    /// Nothing: the conversation is over.
    End,
}

/// How the tokens of a conversation compare with those of the chat template over the conversation as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fidelity {
    /// The same tokens.
    Tokens,
    /// The same text, cut into other tokens: encoding the text would have trained on tokens that were never sampled.
    Text,
    /// Another text: the template changes what it rendered before, once more follows (by dropping earlier reasoning, say), or
    /// the model sampled special tokens within a turn, which its text does not show.
    Differs,
}

/// The messages of a conversation as it goes on.
pub(crate) struct Record<'a> {
    template: &'a ChatTemplate,
    tools: Option<&'a [Value]>,
    messages: Vec<Message>,
}

impl<'a> Record<'a> {
    pub fn new(dialogue: &Dialogue<'a>, index: usize) -> Self {
        let Opening { messages, tools } = dialogue.openings[index];
        Self { template: dialogue.template, tools, messages: messages.to_vec() }
    }

    /// Takes in a turn of the model.
    pub fn push_turn(&mut self, text: &str) {
        self.messages.push(Message::assistant(text));
    }

    /// Takes in the answer to the last turn and returns the tokens that follow the turn. `stop` is the token that ended
    /// the turn, if one did; what the template writes up to this token is there already.
    pub fn push_answer(
        &mut self,
        tokenizer: &Tokenizer,
        answer: Vec<Message>,
        stop: Option<u32>,
    ) -> model::Result<Vec<u32>> {
        let turn = self.messages.len() - 1;
        self.messages.extend(answer);
        // Text that stands for the turn, longer than every run of its character in the conversation.
        let longest = self.messages.iter().map(|message| longest_run(&message.fields().to_string())).max();
        let mark: String = std::iter::repeat_n(MARK, longest.unwrap_or(0) + 1).collect();
        let said = std::mem::replace(&mut self.messages[turn], Message::assistant(&mark));
        let rendering = self.template.rendering(tokenizer, &self.messages, self.tools, true);
        self.messages[turn] = said;
        let rendering = rendering?;
        let text = rendering.text();
        let Some(start) = text.find(&mark).map(|start| start + mark.len()) else {
            return Err(model::Error::Text("the chat template leaves out the assistant's last turn".into()));
        };
        let tokens = rendering.encode_range(tokenizer, start..text.len())?;
        let closing = tokens.iter().position(|&id| tokenizer.is_special(id)).filter(|&at| Some(tokens[at]) == stop);
        Ok(tokens[closing.map_or(0, |at| at + 1)..].to_vec())
    }

    /// Compares the tokens of the conversation with those that the template gives for its text. A closing mark that the
    /// last turn lacks makes no difference.
    pub fn fidelity(&self, tokenizer: &Tokenizer, prompt: &[u32], completion: &[u32]) -> Fidelity {
        let Ok(rendering) = self.template.rendering(tokenizer, &self.messages, self.tools, false) else {
            return Fidelity::Differs;
        };
        let tokens = [prompt, completion].concat();
        match rendering.encode(tokenizer) {
            Ok(rendered) if rendered.starts_with(&tokens) => Fidelity::Tokens,
            _ if rendering.text().starts_with(&tokenizer.decode_with_special(&tokens)) => Fidelity::Text,
            _ => Fidelity::Differs,
        }
    }
}

/// A code point that Unicode reserves for internal use, as a template's stand-in for a turn.
const MARK: char = '\u{fdd1}';

fn longest_run(text: &str) -> usize {
    text.split(|c| c != MARK).map(|run| run.len() / MARK.len_utf8()).max().unwrap_or(0)
}

/// Refuses a dialogue that does not fit its requests.
pub(crate) fn check(dialogue: &Dialogue<'_>, requests: &[Request]) -> Result<()> {
    dialogue.options.validate()?;
    let (openings, requests) = (dialogue.openings.len(), requests.len());
    match openings == requests {
        true => Ok(()),
        false => Err(Error::Openings { openings, requests }),
    }
}
