//! Typed views of a row's columns, with errors that name the row, the column and the path inside it.

use model::chat::Message;
use serde_json::Value;

use super::{Content, Text};
use crate::error::{Error, Result};
use crate::row::{Row, kind};

/// A row whose columns are being read.
pub(super) struct Fields<'a>(&'a Row);

impl<'a> Fields<'a> {
    pub fn new(row: &'a Row) -> Self {
        Self(row)
    }

    /// A column, if it is there and not null.
    pub fn optional(&self, column: &str) -> Option<&'a Value> {
        self.0.get(column)
    }

    /// A column that must be there.
    pub fn required(&self, column: &str) -> Result<&'a Value> {
        self.optional(column).ok_or_else(|| {
            let present = self.0.columns.contains_key(column);
            let error = self.error(column, if present { "expected a value, got null" } else { "missing" });
            match base::hint::nearest(column, self.0.columns.keys().map(String::as_str)) {
                Some(near) if !present => error.with_hint(format!("did you mean {near}?")),
                _ => error,
            }
        })
    }

    pub fn error(&self, path: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::column(&self.0.source, path, reason)
    }

    fn expected(&self, path: &str, expected: &str, value: &Value) -> Error {
        self.error(path, format!("expected {expected}, got {}", kind(value)))
    }

    pub fn as_string(&self, path: &str, value: &'a Value) -> Result<&'a str> {
        value.as_str().ok_or_else(|| self.expected(path, "a string", value))
    }

    pub fn as_list(&self, path: &str, value: &'a Value) -> Result<&'a [Value]> {
        value.as_array().map(Vec::as_slice).ok_or_else(|| self.expected(path, "a list", value))
    }

    pub fn string(&self, column: &str) -> Result<&'a str> {
        self.as_string(column, self.required(column)?)
    }

    pub fn list(&self, column: &str) -> Result<&'a [Value]> {
        self.as_list(column, self.required(column)?)
    }

    /// A boolean, also as 0 or 1.
    pub fn as_flag(&self, path: &str, value: &Value) -> Result<bool> {
        match value.as_bool().or_else(|| match value.as_f64()? {
            0.0 => Some(false),
            1.0 => Some(true),
            _ => None,
        }) {
            Some(flag) => Ok(flag),
            None if value.is_number() => Err(self.error(path, format!("expected true or false, got {value}"))),
            None => Err(self.expected(path, "true or false", value)),
        }
    }

    /// A number from 0 to 1, also as a boolean.
    fn as_share(&self, path: &str, value: &Value) -> Result<f64> {
        let share = value.as_bool().map(|flag| f64::from(u8::from(flag))).or_else(|| value.as_f64());
        match share {
            Some(share) if (0.0..=1.0).contains(&share) => Ok(share),
            Some(share) => Err(self.error(path, format!("expected true, false or a number from 0 to 1, got {share}"))),
            None => Err(self.expected(path, "true, false or a number from 0 to 1", value)),
        }
    }

    pub fn flag(&self, column: &str) -> Result<bool> {
        self.as_flag(column, self.required(column)?)
    }

    /// A string, or messages.
    pub fn text(&self, column: &str) -> Result<Text> {
        match self.required(column)? {
            Value::String(text) => Ok(Text::Plain(text.clone())),
            Value::Array(_) => self.messages(column).map(Text::Messages),
            other => Err(self.expected(column, "a string or a list of messages", other)),
        }
    }

    /// A list of messages, not empty.
    pub fn messages(&self, column: &str) -> Result<Vec<Message>> {
        let items = self.list(column)?;
        if items.is_empty() {
            return Err(self.error(column, "expected messages, got an empty list"));
        }
        (items.iter().enumerate()).map(|(index, item)| self.message(&format!("{column}[{index}]"), item)).collect()
    }

    pub fn message(&self, path: &str, value: &Value) -> Result<Message> {
        let Value::Object(fields) = value else {
            return Err(self.expected(path, "a message with role and content", value));
        };
        let mut fields = fields.clone();
        // Columnar files give every message every field; those that are null are not there.
        fields.retain(|key, value| !value.is_null() || key == "content");
        if let Some(weight) = fields.get("weight") {
            self.as_flag(&format!("{path}.weight"), weight)?;
        }
        Message::from_fields(fields).map_err(|(field, reason)| {
            let error = self.error(format!("{path}.{field}"), reason);
            match value.get("from") {
                Some(_) => error.with_hint("messages in the ShareGPT form (from, value) go into `conversations`"),
                None => error,
            }
        })
    }

    /// `prompt` and what follows it, both plain or both conversational. A string may follow messages: the assistant's.
    pub fn prompt_and(&self, column: &str) -> Result<(Text, Text)> {
        let prompt = self.text("prompt")?;
        let completion = self.following(&prompt, column)?;
        Ok((prompt, completion))
    }

    fn following(&self, prompt: &Text, column: &str) -> Result<Text> {
        match (prompt, self.text(column)?) {
            (Text::Messages(_), Text::Plain(text)) => Ok(Text::Messages(vec![Message::assistant(&text)])),
            (Text::Plain(_), Text::Messages(_)) => {
                Err(self.error(column, "expected a string as in prompt, got a list of messages"))
            }
            (_, completion) => Ok(completion),
        }
    }

    pub fn preference(&self) -> Result<Content> {
        if self.optional("prompt").is_some() {
            let prompt = self.text("prompt")?;
            let chosen = self.following(&prompt, "chosen")?;
            let rejected = self.following(&prompt, "rejected")?;
            let reference = self.optional("reference").map(|_| self.following(&prompt, "reference")).transpose()?;
            return Ok(Content::Preference { prompt, chosen, rejected, reference });
        }
        if self.optional("reference").is_some() {
            return Err(self.error("reference", "needs the prompt in a column of its own"));
        }
        let (prompt, chosen, rejected) = match (self.text("chosen")?, self.text("rejected")?) {
            (Text::Plain(chosen), Text::Plain(rejected)) => {
                let (prompt, chosen, rejected) = without_common_text(&chosen, &rejected);
                (Text::Plain(prompt), Text::Plain(chosen), Text::Plain(rejected))
            }
            (Text::Messages(mut chosen), Text::Messages(mut rejected)) => {
                let common = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
                let prompt = chosen.drain(..common).collect();
                rejected.drain(..common);
                (Text::Messages(prompt), Text::Messages(chosen), Text::Messages(rejected))
            }
            _ => return Err(self.error("rejected", "expected the same form as chosen: both strings or both messages")),
        };
        let empty = |text: &Text| matches!(text, Text::Messages(messages) if messages.is_empty());
        if empty(&chosen) || empty(&rejected) {
            return Err(self.error("rejected", "one of chosen and rejected is the beginning of the other"));
        }
        Ok(Content::Preference { prompt, chosen, rejected, reference: None })
    }

    /// `completions` in the order of a column: ranks in `ranking`, of which 1 is the best, or `scores`.
    pub fn ranking(&self, column: &str) -> Result<Content> {
        let prompt = self.text("prompt")?;
        let (completions, order) = (self.list("completions")?, self.list(column)?);
        if completions.len() != order.len() {
            let reason = format!("expected one for each of {} completions, got {}", completions.len(), order.len());
            return Err(self.error(column, reason));
        }
        if completions.len() < 2 {
            return Err(self.error("completions", format!("expected two or more, got {}", completions.len())));
        }
        let number = |(index, value): (usize, &'a Value)| match value.as_f64() {
            Some(number) => Ok((if column == "ranking" { number } else { -number }, index)),
            None => Err(self.expected(&format!("{column}[{index}]"), "a number", value)),
        };
        let mut places = order.iter().enumerate().map(number).collect::<Result<Vec<_>>>()?;
        places.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        if let Some(tied) = places.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let reason = format!("completions {} and {} are equal", tied[0].1, tied[1].1);
            return Err(self.error(column, reason).with_hint("give each its own place, or leave one of them out"));
        }
        let completions = places.into_iter().map(|(_, index)| self.completion(&prompt, index, &completions[index]));
        Ok(Content::Ranking { completions: completions.collect::<Result<_>>()?, prompt })
    }

    /// One of several completions after a prompt.
    fn completion(&self, prompt: &Text, index: usize, value: &'a Value) -> Result<Text> {
        let path = format!("completions[{index}]");
        match (prompt, value) {
            (Text::Plain(_), value) => Ok(Text::Plain(self.as_string(&path, value)?.to_owned())),
            (Text::Messages(_), Value::String(text)) => Ok(Text::Messages(vec![Message::assistant(text)])),
            (Text::Messages(_), value) => {
                let messages = self.as_list(&path, value)?.iter().enumerate();
                let messages = messages.map(|(turn, message)| self.message(&format!("{path}[{turn}]"), message));
                let messages = messages.collect::<Result<Vec<_>>>()?;
                match messages.is_empty() {
                    true => Err(self.error(path, "expected messages, got an empty list")),
                    false => Ok(Text::Messages(messages)),
                }
            }
        }
    }

    pub fn stepwise(&self) -> Result<Content> {
        let prompt = self.text("prompt")?;
        let (completions, labels) = (self.list("completions")?, self.list("labels")?);
        if completions.len() != labels.len() {
            let reason = format!("expected one for each of {} completions, got {}", completions.len(), labels.len());
            return Err(self.error("labels", reason));
        }
        let step = |(index, (text, label)): (usize, (&'a Value, &'a Value))| {
            let text = self.as_string(&format!("completions[{index}]"), text)?;
            Ok((text.to_owned(), self.as_share(&format!("labels[{index}]"), label)?))
        };
        let steps = completions.iter().zip(labels).enumerate().map(step).collect::<Result<Vec<_>>>()?;
        if steps.is_empty() {
            return Err(self.error("completions", "expected steps, got an empty list"));
        }
        Ok(Content::Stepwise { prompt, steps })
    }

    pub fn tokens(&self) -> Result<Content> {
        let id = |(index, value): (usize, &Value)| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.error(format!("input_ids[{index}]"), format!("expected a token id, got {value}")))
        };
        let ids = self.list("input_ids")?.iter().enumerate().map(id).collect::<Result<Vec<u32>>>()?;
        let mask_column =
            ["labels", "completion_mask", "assistant_masks"].into_iter().find(|column| self.optional(column).is_some());
        let loss_mask = match mask_column {
            None => vec![true; ids.len()],
            Some(column) => {
                let values = self.list(column)?;
                if values.len() != ids.len() {
                    let reason =
                        format!("expected one value for each of {} input_ids, got {}", ids.len(), values.len());
                    return Err(self.error(column, reason));
                }
                let flag = |(index, (value, &id)): (usize, (&Value, &u32))| {
                    let path = format!("{column}[{index}]");
                    match (column, value.as_i64()) {
                        ("labels", Some(-100)) => Ok(false),
                        ("labels", Some(label)) if label == i64::from(id) => Ok(true),
                        ("labels", _) => {
                            Err(self.error(path, format!("expected -100 or the token itself ({id}), got {value}")))
                        }
                        _ => self.as_flag(&path, value),
                    }
                };
                values.iter().zip(&ids).enumerate().map(flag).collect::<Result<_>>()?
            }
        };
        Ok(Content::Tokens { ids, loss_mask })
    }

    /// `tools`: a list of schemas, also as JSON text.
    pub fn tools(&self) -> Result<Option<Vec<Value>>> {
        match self.optional("tools") {
            None => Ok(None),
            Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
            Some(Value::String(text)) => serde_json::from_str(text)
                .map(Some)
                .map_err(|error| self.error("tools", format!("expected a list of tools as JSON: {error}"))),
            Some(value) => {
                Ok(Some(self.as_list("tools", value)?.to_vec())).map(|tools| tools.filter(|list| !list.is_empty()))
            }
        }
    }
}

/// Splits two texts into what they begin with together and the rests. A space before the first difference goes to the
/// rests, where tokenizers want it.
fn without_common_text(a: &str, b: &str) -> (String, String, String) {
    let mut common: usize = a.chars().zip(b.chars()).take_while(|(x, y)| x == y).map(|(x, _)| x.len_utf8()).sum();
    if a[..common].ends_with(' ') {
        common -= 1;
    }
    (a[..common].to_owned(), a[common..].to_owned(), b[common..].to_owned())
}
