//! Formats that are imported as one of the row types.

use model::chat::Message;
use serde_json::Value;

use super::fields::Fields;
use super::{Content, Text};
use crate::error::Result;

/// ShareGPT: `conversations` of `{from, value}`, with an optional `system`. Messages of `{role, content}` pass as well.
pub(super) fn share_gpt(fields: &Fields) -> Result<Content> {
    const COLUMN: &str = "conversations";
    let items = fields.list(COLUMN)?;
    let mut messages = system(fields)?;
    for (index, item) in items.iter().enumerate() {
        let path = format!("{COLUMN}[{index}]");
        let Some(from) = item.get("from") else {
            messages.push(fields.message(&path, item)?);
            continue;
        };
        let role = match fields.as_string(&format!("{path}.from"), from)? {
            "human" | "user" => "user",
            "gpt" | "assistant" | "chatgpt" | "bing" | "bard" => "assistant",
            "system" => "system",
            "tool" | "observation" | "function_response" => "tool",
            other => {
                let reason = format!("expected human, gpt, system or tool, got {other:?}");
                return Err(fields.error(format!("{path}.from"), reason));
            }
        };
        let Some(value) = item.get("value") else {
            return Err(fields.error(format!("{path}.value"), "missing"));
        };
        messages.push(Message::new(role, fields.as_string(&format!("{path}.value"), value)?));
    }
    if items.is_empty() {
        return Err(fields.error(COLUMN, "expected messages, got an empty list"));
    }
    Ok(Content::LanguageModeling(Text::Messages(messages)))
}

/// Alpaca: `instruction`, with optional `input`, `output`, `system` and `history` of `[instruction, answer]` pairs.
pub(super) fn alpaca(fields: &Fields) -> Result<Content> {
    let mut prompt = system(fields)?;
    if fields.optional("history").is_some() {
        for (index, turn) in fields.list("history")?.iter().enumerate() {
            let path = format!("history[{index}]");
            let [user, assistant] = fields.as_list(&path, turn)? else {
                return Err(fields.error(path, "expected a pair of instruction and answer"));
            };
            prompt.push(Message::user(fields.as_string(&path, user)?));
            prompt.push(Message::assistant(fields.as_string(&path, assistant)?));
        }
    }
    let instruction = fields.string("instruction")?;
    let input = if fields.optional("input").is_some() { fields.string("input")? } else { "" };
    prompt.push(Message::user(&match input {
        "" => instruction.to_owned(),
        input => format!("{instruction}\n{input}"),
    }));
    let prompt = Text::Messages(prompt);
    if fields.optional("output").is_none() {
        return Ok(Content::PromptOnly(prompt));
    }
    let completion = Text::Messages(vec![Message::assistant(fields.string("output")?)]);
    Ok(Content::PromptCompletion { prompt, completion })
}

/// The ground truth of a verl row, which rewards look for under `answer`.
pub(super) fn verl_answer(fields: &Fields) -> Result<Option<Value>> {
    match fields.optional("reward_model") {
        Some(Value::Object(reward)) => Ok(reward.get("ground_truth").filter(|truth| !truth.is_null()).cloned()),
        _ => Ok(None),
    }
}

fn system(fields: &Fields) -> Result<Vec<Message>> {
    match fields.optional("system") {
        None => Ok(Vec::new()),
        Some(_) => match fields.string("system")? {
            "" => Ok(Vec::new()),
            text => Ok(vec![Message::system(text)]),
        },
    }
}
