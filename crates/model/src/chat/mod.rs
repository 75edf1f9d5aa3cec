//! Conversations to text and tokens by a model's chat template.
//!
//! A [`ChatTemplate`] is a Jinja template rendered as `transformers` renders it. Its output is a [`Rendering`]: text in
//! which the template's own special tokens are known from the same characters in a message, so that nothing a user
//! writes can end a turn or open another.

mod message;
mod python;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use minijinja::{Environment, ErrorKind, UndefinedBehavior, context};
use serde_json::Value;

pub use message::Message;
pub use python::Date;

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::load::{CONFIG, read_object};
use crate::weights::gguf::Metadata;

/// The template of models trained from scratch: turns between `<|im_start|>` and `<|im_end|>`, nothing else.
const CHATML: &str = "\
{%- for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The name under which the template is compiled.
const NAME: &str = "chat template";
/// Steps after which a template is given up; long conversations take some ten thousand.
const FUEL: u64 = 50_000_000;

/// Put in front of a special token's name in a message, and behind it, so that it can be told from the template's own. A name that
/// the template cuts out of a message leaves a mark that is not one of two around a name. These are code points that Unicode
/// reserves for such internal use.
const OPEN: char = '\u{fdd0}';
const CLOSE: char = '\u{fdd2}';
/// Put in front of these three characters where a message has them itself.
const ESCAPE: char = '\u{fdd3}';
const MARKS: [char; 3] = [OPEN, CLOSE, ESCAPE];

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    variables: BTreeMap<String, minijinja::Value>,
}

impl ChatTemplate {
    /// Compiles a template. `bos` and `eos` are the names of the tokens that begin and end a sequence, which templates
    /// know as `bos_token` and `eos_token`.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut environment = python::environment();
        environment.set_fuel(Some(FUEL));
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| Error::malformed("the chat template cannot be read", describe(&error)))?;
        let variables = [("bos_token", bos), ("eos_token", eos)]
            .map(|(name, token)| (name.to_owned(), minijinja::Value::from(token)))
            .into();
        Ok(Self { environment, source: source.to_owned(), variables })
    }

    /// Compiles a template for the special tokens of `tokenizer`.
    pub fn for_tokenizer(source: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let name = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
        Self::new(source, &name(tokenizer.bos()), &name(tokenizer.eos()))
    }

    /// ChatML, for models trained from scratch with [`Tokenizer::bytes`].
    pub fn chatml() -> Result<Self> {
        Self::new(CHATML, "", "<|im_end|>")
    }

    /// The template of a folder in Hugging Face layout: `chat_template.jinja`, or `chat_template` in
    /// `tokenizer_config.json` (a template, or a list of named ones of which `default` is taken).
    pub fn from_folder(folder: &Path, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let path = folder.join("chat_template.jinja");
        if path.is_file() {
            let template = Self::for_tokenizer(&base::files::read_to_string(&path)?, tokenizer);
            return template.map(Some).map_err(|error| error.in_file(&path));
        }
        let path = folder.join(CONFIG);
        let Some(config) = read_object(&path)? else { return Ok(None) };
        let field = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let source = match config.get("chat_template") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(source)) => Some(source.clone()),
            Some(Value::Array(named)) => named
                .iter()
                .find(|entry| field(entry, "name").as_deref() == Some("default"))
                .and_then(|entry| field(entry, "template")),
            Some(_) => None,
        };
        let source = source.ok_or_else(|| {
            let place = format!("{}: chat_template", path.display());
            Error::malformed(place, "expected a template, or a list of named templates with one named \"default\"")
        })?;
        Self::for_tokenizer(&source, tokenizer).map(Some)
    }

    /// The template in the metadata of a GGUF file.
    pub fn from_gguf(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let source = metadata.text("tokenizer.chat_template")?;
        source.map(|source| Self::for_tokenizer(source, tokenizer)).transpose()
    }

    /// Defines a variable that the template may use, such as `enable_thinking`.
    pub fn with_variable(mut self, name: &str, value: &Value) -> Self {
        self.variables.insert(name.to_owned(), minijinja::Value::from_serialize(value));
        self
    }

    /// The day that templates see when they ask for today (`strftime_now`). It never comes from the clock, since the
    /// same run must give the same bytes on any day; without this it is 26 July 2024, the day LLaMA 3's templates
    /// assume.
    pub fn with_date(mut self, date: Date) -> Self {
        python::set_date(&mut self.environment, date);
        self
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation to text, ready for the next turn of the assistant if `add_generation_prompt`.
    pub fn render(&self, messages: &[Message], tools: Option<&[Value]>, add_generation_prompt: bool) -> Result<String> {
        let messages = minijinja::Value::from_serialize(messages);
        let tools = tools.map(minijinja::Value::from_serialize);
        self.render_values(messages, tools, add_generation_prompt)
    }

    /// Like [`ChatTemplate::render`], to text that remembers which special tokens are the template's.
    ///
    /// # Errors
    /// A template that refuses the conversation, or that cuts at the name of a special token in a message so that its own cannot be told
    /// from those of the message.
    pub fn rendering(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
    ) -> Result<Rendering> {
        let mut is_marked = false;
        let mut marked = |value: &Value| {
            let marked = mark(tokenizer, value);
            is_marked |= marked != *value;
            minijinja::Value::from_serialize(marked)
        };
        let values = messages.iter().map(|message| marked(message.fields())).collect();
        let tool_values = tools.map(|tools| tools.iter().map(marked).collect());
        let marked = self.render_values(values, tool_values, add_generation_prompt)?;
        let rendering = Rendering::from_marked(tokenizer, &marked);
        // What the template does must not depend on the marks.
        let plain = is_marked.then(|| self.render(messages, tools, add_generation_prompt)).transpose()?;
        rendering.filter(|rendering| plain.is_none_or(|plain| rendering.text == plain)).ok_or_else(|| {
            let reason = "the chat template treats the name of a special token in a message in a way of its own, so that \
                          it cannot be kept as ordinary text; leave the name out of the message";
            Error::Text(reason.into())
        })
    }

    /// The tokens of a conversation.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        self.rendering(tokenizer, messages, tools, add_generation_prompt)?.encode(tokenizer)
    }

    fn render_values(
        &self,
        messages: minijinja::Value,
        tools: Option<minijinja::Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let fixed = context! { messages, tools, documents => (), add_generation_prompt };
        let variables = minijinja::Value::from_iter(self.variables.clone());
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context! { ..fixed, ..variables }))
            .map_err(|error| Error::Text(describe(&error)))
    }
}

/// The text of a conversation, with the places where the name of a special token is not the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendering {
    text: String,
    ordinary: Vec<usize>,
}

impl Rendering {
    /// Text that is not from a template, in which no name of a special token is the token.
    pub fn ordinary(tokenizer: &Tokenizer, text: &str) -> Self {
        Self { text: text.to_owned(), ordinary: starts_of(tokenizer.special_names(text)) }
    }

    /// Text in which every name of a special token is the token.
    pub fn trusted(text: &str) -> Self {
        Self { text: text.to_owned(), ordinary: Vec::new() }
    }

    /// The rendering of marked messages, or `None` where a mark without its fellow lies at a name: whose name that is cannot be told.
    fn from_marked(tokenizer: &Tokenizer, marked: &str) -> Option<Self> {
        let mut text = String::with_capacity(marked.len());
        let (mut starts, mut ends) = (Vec::new(), Vec::new());
        let mut characters = marked.chars();
        while let Some(character) = characters.next() {
            match character {
                OPEN => starts.push(text.len()),
                // The name between them was taken out.
                CLOSE if starts.last() == Some(&text.len()) => drop(starts.pop()),
                CLOSE => ends.push(text.len()),
                ESCAPE => text.extend(characters.next()),
                _ => text.push(character),
            }
        }
        let opened = |name: &Range<usize>| starts.binary_search(&name.start).is_ok();
        let closed = |name: &Range<usize>| ends.binary_search(&name.end).is_ok();
        let names = tokenizer.special_names(&text).into_iter();
        let (whole, others): (Vec<_>, Vec<_>) = names.partition(|name| opened(name) && closed(name));
        // Names may begin or end alike.
        let is_torn = |name: &Range<usize>| {
            opened(name) && whole.iter().all(|whole| whole.start != name.start)
                || closed(name) && whole.iter().all(|whole| whole.end != name.end)
        };
        if others.iter().any(is_torn) {
            return None;
        }
        Some(Self { text, ordinary: starts_of(whole) })
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether `longer` goes on where this ends.
    pub fn is_prefix_of(&self, longer: &Self) -> bool {
        longer.text.starts_with(&self.text)
            && longer.ordinary.iter().take_while(|&&position| position < self.text.len()).eq(&self.ordinary)
    }

    /// The tokens of the whole text.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        self.encode_range(tokenizer, 0..self.text.len())
    }

    /// The tokens of a part of the text on its own, given in bytes on character boundaries.
    pub fn encode_range(&self, tokenizer: &Tokenizer, range: Range<usize>) -> Result<Vec<u32>> {
        tokenizer.encode_range(&self.text, range, &self.ordinary)
    }
}

/// Where names begin, by ascending start; those that begin alike once.
fn starts_of(names: Vec<Range<usize>>) -> Vec<usize> {
    let mut starts: Vec<usize> = names.into_iter().map(|name| name.start).collect();
    starts.dedup();
    starts
}

/// Marks the names of special tokens in every string of a value.
fn mark(tokenizer: &Tokenizer, value: &Value) -> Value {
    match value {
        Value::String(text) => mark_text(tokenizer, text).into(),
        Value::Array(items) => items.iter().map(|item| mark(tokenizer, item)).collect(),
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| (mark_text(tokenizer, key), mark(tokenizer, value))).collect()
        }
        other => other.clone(),
    }
}

fn mark_text(tokenizer: &Tokenizer, text: &str) -> String {
    let names = tokenizer.special_names(text);
    if names.is_empty() && !text.contains(MARKS) {
        return text.to_owned();
    }
    let mut marked = String::with_capacity(text.len() + 2 * OPEN.len_utf8() * names.len());
    let starts: BTreeSet<usize> = names.iter().map(|name| name.start).collect();
    let ends: BTreeSet<usize> = names.iter().map(|name| name.end).collect();
    for (position, character) in text.char_indices() {
        marked.extend(ends.contains(&position).then_some(CLOSE));
        marked.extend(starts.contains(&position).then_some(OPEN));
        marked.extend(MARKS.contains(&character).then_some(ESCAPE));
        marked.push(character);
    }
    marked.extend(ends.contains(&text.len()).then_some(CLOSE));
    marked
}

/// Replaces the tags with which some templates mark the assistant's text for training, which change no output, by tags
/// that do nothing: `{% generation %}` by `{% if true %}`.
fn without_generation_tags(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        output.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let is_sign = |c: char| c == '-' || c == '+';
        let inner = tag[2..end].trim_matches(is_sign).trim();
        let replacement = match inner {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => inner,
        };
        output.push_str(&tag[..end + 2].replacen(inner, replacement, usize::from(replacement != inner)));
        rest = &tag[end + 2..];
    }
    output.push_str(rest);
    output
}

/// What went wrong and on which line of the template.
fn describe(error: &minijinja::Error) -> String {
    let line = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
    let detail = error.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
    match error.kind() {
        ErrorKind::OutOfFuel => format!("{NAME}{line}: gave up after {FUEL} steps"),
        ErrorKind::InvalidOperation if error.detail().is_some_and(|text| text.starts_with(python::REFUSED)) => {
            format!("{NAME}{line}{detail}")
        }
        kind => format!("{NAME}{line}: {kind}{detail}"),
    }
}
