//! The reference of all options, derived from their schema: `config explain`, `docs/config.md`.

use serde_json::Value;
use train::methods::FAMILIES;

use super::check::Schema;
use super::methods::METHOD_OF;
use crate::failure::Failure;

/// One option or section of the reference.
struct Entry<'a> {
    /// Dotted key; `[]` marks the elements of an array of tables.
    key: String,
    /// The doc comment.
    description: &'a str,
    default: Option<&'a Value>,
    schema: Schema<'a>,
    /// The section of the family, for a section named after a method.
    method_of: Option<&'a str>,
}

impl<'a> Entry<'a> {
    fn new(parent: &str, key: &str, written: &'a Value, schema: Schema<'a>) -> Self {
        let description = written["description"].as_str().or_else(|| schema.value()["description"].as_str());
        let key = if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") };
        Self {
            key,
            description: description.unwrap_or_default(),
            default: written.get("default"),
            schema,
            method_of: written[METHOD_OF].as_str(),
        }
    }

    /// The options inside: of a table, of the elements of an array of tables.
    fn children(&self) -> Vec<Entry<'a>> {
        children(self.table(), &self.key)
    }

    fn table(&self) -> Schema<'a> {
        self.schema.items().unwrap_or(self.schema)
    }

    /// The alternatives of a tagged choice: its tag, the name, the alternative.
    fn variants(&self) -> Vec<(&'a str, &'a str, Schema<'a>)> {
        let variants = self.table().variants().into_iter().flatten();
        variants.filter_map(|variant| variant.tag().map(|(tag, name)| (tag, name, variant))).collect()
    }

    fn is_section(&self) -> bool {
        !self.children().is_empty() || !self.variants().is_empty()
    }

    /// The description as one paragraph a line.
    fn paragraphs(&self) -> Vec<String> {
        self.description.split("\n\n").map(|paragraph| paragraph.replace('\n', " ")).collect()
    }

    fn summary(&self) -> String {
        self.paragraphs().swap_remove(0)
    }

    /// The default as TOML, or nothing for sections and for options that are off by default.
    fn default(&self) -> String {
        match self.default {
            None | Some(Value::Null | Value::Object(_)) => String::new(),
            Some(Value::Array(elements)) if elements.iter().any(Value::is_object) => String::new(),
            Some(value) => value.to_string(),
        }
    }
}

fn children<'a>(schema: Schema<'a>, parent: &str) -> Vec<Entry<'a>> {
    let properties = schema.properties().into_iter().flatten();
    properties
        .filter(|(_, written)| written.get("const").is_none())
        .filter_map(|(key, written)| Some(Entry::new(parent, key, written, schema.property(key)?)))
        .collect()
}

/// What `config explain KEY` prints.
pub fn explain(schema: Schema<'_>, key: &str) -> Result<String, Failure> {
    let mut entries = children(schema, "");
    let mut found: Option<Entry<'_>> = None;
    for part in key.split('.').filter(|part| part.parse::<usize>().is_err()) {
        let parent = found.as_ref().map(|entry| entry.key.clone()).unwrap_or_default();
        let names: Vec<String> = entries.iter().map(|entry| last(&entry.key).to_owned()).collect();
        let Some(entry) = entries.into_iter().find(|entry| last(&entry.key) == part) else {
            let place = if parent.is_empty() { String::new() } else { format!(" in `{parent}`") };
            let failure = Failure::new(format!("there is no option `{part}`{place}"));
            return Err(match base::hint::nearest(part, names.iter().map(String::as_str)) {
                Some(near) if parent.is_empty() => failure.hint(format!("did you mean `{near}`?")),
                Some(near) => failure.hint(format!("did you mean `{parent}.{near}`?")),
                None => failure.hint(format!("the options there are {}", names.join(", "))),
            });
        };
        entries = entry.children();
        for (_, _, variant) in entry.variants() {
            for child in children(variant, &entry.key) {
                if !entries.iter().any(|known| known.key == child.key) {
                    entries.push(child);
                }
            }
        }
        found = Some(entry);
    }
    let Some(entry) = found else { return Ok(list(&entries)) };
    let default = match entry.default() {
        default if default.is_empty() => String::new(),
        default => format!(" (default {default})"),
    };
    let mut text = match entry.is_section() {
        true => format!("[{}]\n\n{}\n", entry.key, entry.paragraphs().join("\n\n")),
        false => {
            format!("{}: {}{default}\n\n{}\n", entry.key, entry.schema.type_name(), entry.paragraphs().join("\n\n"))
        }
    };
    let own = entry.children();
    if !own.is_empty() {
        text += &format!("\n{}", list(&own));
    }
    for (tag, name, variant) in entry.variants() {
        let description = variant.value()["description"].as_str().unwrap_or_default().replace('\n', " ");
        text += &format!("\n{tag} = \"{name}\": {description}\n{}", list(&children(variant, &entry.key)));
    }
    Ok(text)
}

fn last(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// Every option of a section, one line each, with the defaults that `settings` (TOML) change.
pub fn options(schema: Schema<'_>, section: &str, settings: &str) -> String {
    let settings: toml::Table = toml::from_str(settings).unwrap_or_default();
    let mut lines = Vec::new();
    let mut open: Vec<Entry<'_>> =
        children(schema, "").into_iter().filter(|entry| entry.key == section).rev().collect();
    while let Some(entry) = open.pop() {
        if entry.is_section() {
            open.extend(entry.children().into_iter().rev());
            continue;
        }
        let key = entry.key.strip_prefix(section).unwrap_or(&entry.key).trim_start_matches('.').to_owned();
        let set = key.split('.').try_fold(&toml::Value::Table(settings.clone()), |at, part| at.get(part)).cloned();
        let default = set.map_or_else(|| entry.default(), |value| value.to_string());
        lines.push((key, default, entry.summary()));
    }
    let width = lines.iter().map(|(key, _, _)| key.len()).max().unwrap_or(0);
    let line = |(key, default, summary): &(String, String, String)| match default.is_empty() {
        true => format!("  {key:width$}  {summary}\n"),
        false => format!("  {key:width$}  {summary} (default {default})\n"),
    };
    lines.iter().map(line).collect()
}

/// One line an option.
fn list(entries: &[Entry<'_>]) -> String {
    let width = entries.iter().map(|entry| entry.key.len()).max().unwrap_or(0);
    let line = |entry: &Entry<'_>| {
        let default = match entry.default() {
            default if default.is_empty() => String::new(),
            default => format!(" (default {default})"),
        };
        format!("  {:width$}  {}{default}\n", entry.key, entry.summary())
    };
    entries.iter().map(line).collect()
}

/// The whole reference as Markdown: the content of `docs/config.md`.
pub fn markdown(schema: Schema<'_>) -> String {
    let mut text = String::from(
        "# Configuration reference\n\n\
         Written by `posttrain config explain`; do not edit. A recipe is one TOML file. Defaults come first, then the files in\n\
         the order given, then `--set section.key=value` flags; an unknown key is an error. `posttrain config explain KEY`\n\
         prints one entry, `posttrain config schema` the JSON schema for editors.\n",
    );
    let top = children(schema, "").into_iter().filter(|entry| entry.method_of.is_none());
    let (sections, plain): (Vec<_>, Vec<_>) = top.partition(Entry::is_section);
    text += "\n## Top level\n";
    text += &table(&plain);
    for section in sections {
        describe(&section, 2, &mut text);
    }
    text
}

fn describe(entry: &Entry<'_>, level: usize, text: &mut String) {
    let brackets = if entry.schema.items().is_some() { ("[[", "]]") } else { ("[", "]") };
    let heading = "#".repeat(level);
    *text +=
        &format!("\n{heading} `{}{}{}`\n\n{}\n", brackets.0, entry.key, brackets.1, entry.paragraphs().join("\n\n"));
    if let Some(family) = FAMILIES.iter().find(|family| family.section == entry.key) {
        let names: Vec<String> = family.presets.iter().map(|preset| format!("`{}`", preset.name)).collect();
        *text += &format!("\nMethods ([what they are](methods/{}.md)): {}.\n", family.section, names.join(", "));
    }
    let (sections, plain): (Vec<_>, Vec<_>) = entry.children().into_iter().partition(Entry::is_section);
    *text += &table(&plain);
    let variants: Vec<_> = entry.variants();
    let of = |variant| children(variant, &entry.key);
    // A section that every alternative has is described once, after all of them.
    let everywhere = |section: &Entry<'_>| {
        let has = |variant| of(variant).iter().any(|other| other.key == section.key);
        variants.len() > 1 && variants.iter().all(|(_, _, variant)| has(*variant))
    };
    let mut shared = Vec::new();
    for (index, (tag, name, variant)) in variants.iter().enumerate() {
        let description = variant.value()["description"].as_str().unwrap_or_default().replace('\n', " ");
        *text += &format!("\n{heading}# `{tag} = \"{name}\"`\n\n{description}\n");
        let (sections, plain): (Vec<_>, Vec<_>) = of(*variant).into_iter().partition(Entry::is_section);
        *text += &table(&plain);
        let (common, own): (Vec<_>, Vec<_>) = sections.into_iter().partition(everywhere);
        own.iter().for_each(|section| describe(section, level + 2, text));
        if index == 0 {
            shared = common;
        }
    }
    for section in shared.into_iter().chain(sections) {
        describe(&section, level + 1, text);
    }
}

fn table(entries: &[Entry<'_>]) -> String {
    if entries.is_empty() {
        return String::new();
    }
    let row = |entry: &Entry<'_>| {
        let default = match entry.default() {
            default if default.is_empty() => String::new(),
            default => format!("`{default}`"),
        };
        let meaning = entry.paragraphs().join(" ").replace('|', "\\|");
        format!("| `{}` | {} | {default} | {meaning} |\n", last(&entry.key), entry.schema.type_name())
    };
    format!(
        "\n| key | value | default | meaning |\n| --- | --- | --- | --- |\n{}",
        entries.iter().map(row).collect::<String>()
    )
}
