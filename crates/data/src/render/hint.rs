//! Prompts with a hint: what follows the question, with the values of columns in their places.

use model::chat::Message;
use serde_json::Value;

use super::{Prompt, Rendered, Renderer};
use crate::error::{Error, Result};
use crate::sample::{Content, Sample, Text};

impl Renderer<'_> {
    /// Renders prompts as [`Renderer::prompts`] does, each with `hint` at its end: after plain text, or at the end of the last
    /// message. `{column}` in the hint is the value of the column.
    ///
    /// # Errors
    /// Those of prompts; a row without a column that the hint names, or without a text to put it after.
    pub fn prompts_with_hint(&self, samples: &[Sample], hint: &str) -> Result<Rendered<Prompt>> {
        let hinted = samples.iter().map(|sample| hinted(sample, hint)).collect::<Result<Vec<_>>>()?;
        self.prompts(&hinted)
    }
}

/// The prompt of a sample with the hint at its end.
fn hinted(sample: &Sample, hint: &str) -> Result<Sample> {
    let hint = filled(sample, hint)?;
    let prompt = sample.content.prompt().ok_or_else(|| super::unexpected(sample, "rows with a prompt"))?;
    let prompt = match prompt {
        Text::Plain(text) => Text::Plain(format!("{text}{hint}")),
        Text::Messages(messages) => {
            let mut messages = messages.clone();
            let last = messages.last().and_then(|message| Some((message.fields().as_object()?, message.text()?)));
            let Some((fields, text)) = last else {
                return Err(Error::row(&sample.source, "the last message has no text that a hint could follow"));
            };
            let mut fields = fields.clone();
            fields.insert("content".into(), format!("{text}{hint}").into());
            let message =
                Message::from_fields(fields).map_err(|(field, reason)| Error::column(&sample.source, field, reason))?;
            messages.pop();
            messages.push(message);
            Text::Messages(messages)
        }
    };
    Ok(Sample { content: Content::PromptOnly(prompt), ..sample.clone() })
}

/// The hint with the values of the sample's columns.
fn filled(sample: &Sample, hint: &str) -> Result<String> {
    let mut text = String::new();
    let mut rest = hint;
    while let Some((before, after)) = rest.split_once('{') {
        let Some((column, after)) = after.split_once('}') else { break };
        let value = sample.columns.get(column).filter(|value| !value.is_null());
        let value = value.ok_or_else(|| Error::column(&sample.source, column, "missing, and the hint names it"))?;
        text += before;
        text += &match value {
            Value::String(value) => value.clone(),
            value => value.to_string(),
        };
        rest = after;
    }
    Ok(text + rest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::row::Source;

    fn sample(prompt: Text) -> Sample {
        let columns = json!({ "answer": 7, "unit": "kg" }).as_object().unwrap().clone();
        Sample { content: Content::PromptOnly(prompt), tools: None, columns, source: Source::new("rows", 1) }
    }

    #[test]
    fn a_hint_follows_the_question() {
        let plain = hinted(&sample(Text::Plain("3 + 4 =".into())), " ({answer} {unit})").unwrap();
        assert_eq!(plain.content.prompt(), Some(&Text::Plain("3 + 4 = (7 kg)".into())));
        let messages = vec![Message::system("Be brief."), Message::user("3 + 4?")];
        let chat = hinted(&sample(Text::Messages(messages)), " It is {answer}.").unwrap();
        let expected = vec![Message::system("Be brief."), Message::user("3 + 4? It is 7.")];
        assert_eq!(chat.content.prompt(), Some(&Text::Messages(expected)));
    }

    #[test]
    fn a_column_that_is_not_there_is_named() {
        let error = hinted(&sample(Text::Plain("x".into())), "{anwser}").unwrap_err().to_string();
        assert!(error.contains("anwser") && error.contains("the hint names it"), "{error}");
        assert_eq!(filled(&sample(Text::Plain("x".into())), "{ 1").unwrap(), "{ 1");
    }
}
