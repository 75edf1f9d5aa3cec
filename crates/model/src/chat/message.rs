//! One turn of a conversation.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// One turn of a conversation: an object with a `role`, usually a `content`, and whatever else the template uses
/// (`tool_calls`, `reasoning_content`, `name`, ...), kept as it is and in its order.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Message(Value);

impl Message {
    /// A message of plain text.
    pub fn new(role: &str, content: &str) -> Self {
        Self(Value::from_iter([("role", role), ("content", content)]))
    }

    /// A message of the user.
    pub fn user(content: &str) -> Self {
        Self::new("user", content)
    }

    /// A message of the assistant.
    pub fn assistant(content: &str) -> Self {
        Self::new("assistant", content)
    }

    /// The instructions above a conversation.
    pub fn system(content: &str) -> Self {
        Self::new("system", content)
    }

    /// The message that an object describes, or what is wrong with it, as the path inside it and the reason.
    pub fn from_fields(fields: Map<String, Value>) -> Result<Self, (&'static str, String)> {
        match fields.get("role") {
            Some(Value::String(_)) => {}
            Some(other) => return Err(("role", format!("expected a string, got {}", kind(other)))),
            None => return Err(("role", "missing".into())),
        }
        match fields.get("content") {
            None | Some(Value::Null | Value::String(_) | Value::Array(_)) => Ok(Self(Value::Object(fields))),
            Some(other) => Err(("content", format!("expected a string or a list of parts, got {}", kind(other)))),
        }
    }

    /// Who speaks: `system`, `user`, `assistant`, `tool`, ...
    pub fn role(&self) -> &str {
        self.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The text, where the content is text.
    pub fn text(&self) -> Option<&str> {
        self.get("content").and_then(Value::as_str)
    }

    /// A field.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// The whole object.
    pub fn fields(&self) -> &Value {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_fields(Map::deserialize(deserializer)?)
            .map_err(|(field, reason)| serde::de::Error::custom(format!("message {field}: {reason}")))
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
