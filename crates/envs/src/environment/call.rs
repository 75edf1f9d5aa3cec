//! Tool calls in the text of a turn, written as Hermes and Qwen models write them:
//!
//! ```text
//! <tool_call>
//! {"name": "search", "arguments": {"query": "the founder of Orvia"}}
//! </tool_call>
//! ```

use serde_json::{Map, Value};

/// Opens a call.
pub const OPEN: &str = "<tool_call>";
/// Closes a call.
pub const CLOSE: &str = "</tool_call>";

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// The tool.
    pub name: String,
    /// Its arguments by name.
    pub arguments: Map<String, Value>,
}

impl ToolCall {
    /// A call with one text argument.
    pub fn new(name: &str, argument: &str, value: &str) -> Self {
        Self { name: name.into(), arguments: Map::from_iter([(argument.to_owned(), value.into())]) }
    }

    /// The call as a model writes it.
    pub fn render(&self) -> String {
        let call = serde_json::json!({"name": self.name, "arguments": self.arguments});
        format!("{OPEN}\n{call}\n{CLOSE}")
    }

    /// A text argument.
    ///
    /// # Errors
    /// What is wrong, for the model to read.
    pub fn text(&self, argument: &str) -> Result<&str, String> {
        match self.arguments.get(argument) {
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(format!("{}: {argument} is {other}, expected a string", self.name)),
            None => Err(format!("{}: the argument {argument:?} is missing", self.name)),
        }
    }
}

/// The calls in a turn, in order; of one that cannot be read, what is wrong, for the model to read.
///
/// The last call need not be closed: sampling may have stopped at the closing tag.
pub fn calls(turn: &str) -> Vec<Result<ToolCall, String>> {
    let after_open = turn.split(OPEN).skip(1);
    after_open.map(|text| parse(text.split(CLOSE).next().unwrap_or(text))).collect()
}

fn parse(text: &str) -> Result<ToolCall, String> {
    let fields: Map<String, Value> =
        serde_json::from_str(text.trim()).map_err(|error| format!("the tool call is not a JSON object: {error}"))?;
    let Some(Value::String(name)) = fields.get("name") else {
        return Err("the tool call has no \"name\"".into());
    };
    let arguments = match fields.get("arguments") {
        Some(Value::Object(arguments)) => arguments.clone(),
        // Some models write the arguments as text that holds the object, as OpenAI's interface does.
        Some(Value::String(text)) => {
            serde_json::from_str(text).map_err(|error| format!("the arguments are not a JSON object: {error}"))?
        }
        None => Map::new(),
        Some(_) => return Err("the \"arguments\" are not a JSON object".into()),
    };
    Ok(ToolCall { name: name.clone(), arguments })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read_wherever_they_stand() {
        let call = ToolCall::new("search", "query", "a <b> \"c\"");
        assert_eq!(calls(&call.render()), [Ok(call.clone())]);
        assert_eq!(calls(&format!("I will look. {0} and {0}", call.render())), [Ok(call.clone()), Ok(call.clone())]);
        let open = call.render().replace(CLOSE, "");
        assert_eq!(calls(&open), [Ok(call)]);
        assert!(calls("no call </tool_call>").is_empty());
        let text = r#"<tool_call>{"name": "f", "arguments": "{\"x\": 1}"}</tool_call>"#;
        assert_eq!(calls(text)[0].as_ref().unwrap().arguments["x"], 1);
        assert!(calls(r#"<tool_call>{"name": "f"}</tool_call>"#)[0].as_ref().unwrap().arguments.is_empty());
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let reason = |text: &str| calls(&format!("{OPEN}{text}{CLOSE}"))[0].clone().unwrap_err();
        assert!(reason("{\"name\": }").starts_with("the tool call is not a JSON object: expected value"));
        assert!(reason("[1]").contains("not a JSON object"));
        assert!(reason("").contains("not a JSON object"));
        assert_eq!(reason("{\"arguments\": {}}"), "the tool call has no \"name\"");
        assert_eq!(reason("{\"name\": \"f\", \"arguments\": [1]}"), "the \"arguments\" are not a JSON object");
        assert!(reason("{\"name\": \"f\", \"arguments\": \"x\"}").starts_with("the arguments are not a JSON object"));
        // Deep nesting is refused by the parser rather than followed to the end of the stack.
        assert!(reason(&"[".repeat(100_000)).contains("not a JSON object"));
        assert_eq!(calls(&OPEN.repeat(3)).len(), 3);
        let call = ToolCall { name: "f".into(), arguments: Map::from_iter([("x".to_owned(), 1.into())]) };
        assert_eq!(call.text("x").unwrap_err(), "f: x is 1, expected a string");
        assert_eq!(call.text("y").unwrap_err(), "f: the argument \"y\" is missing");
    }
}
