//! Checks a merged tree against the schema of the options: every key known, every value of its type and in its range.
//!
//! The schema comes from the option structs themselves (schemars), so there is nothing to keep in step with them.

use serde_json::{Map, Value};

use super::tree::{Kind, Node};
use crate::failure::Failure;

/// A JSON schema with its definitions at hand.
#[derive(Clone, Copy)]
pub struct Schema<'a> {
    root: &'a Value,
    here: &'a Value,
}

impl<'a> Schema<'a> {
    /// The root of a schema document.
    pub fn new(root: &'a Value) -> Self {
        Self { root, here: root }.resolved()
    }

    /// Follows `$ref`, and passes through "this or null" to what an optional value is when present.
    fn resolved(self) -> Self {
        if let Some(reference) = self.here["$ref"].as_str()
            && let Some(target) = self.root.pointer(reference.trim_start_matches('#'))
        {
            return Self { here: target, ..self }.resolved();
        }
        let present = |name: &str| {
            let options = self.here[name].as_array()?;
            let mut present = options.iter().filter(|option| option["type"] != "null");
            match (present.next(), present.next()) {
                (Some(only), None) => Some(only),
                _ => None,
            }
        };
        match present("anyOf").or_else(|| present("allOf")) {
            Some(here) => Self { here, ..self }.resolved(),
            None => self,
        }
    }

    fn at(self, here: &'a Value) -> Self {
        Self { here, ..self }.resolved()
    }

    /// The schema of the whole document.
    fn top(self) -> Self {
        Self::new(self.root)
    }

    /// The raw schema.
    pub fn value(self) -> &'a Value {
        self.here
    }

    /// The keys of a table and their schemas as written (with the key's own description), in order of declaration.
    pub fn properties(self) -> Option<&'a Map<String, Value>> {
        self.here["properties"].as_object()
    }

    /// The schema of a key of a table.
    pub fn property(self, key: &str) -> Option<Self> {
        self.properties()?.get(key).map(|here| self.at(here))
    }

    /// The schema of the values of a free table (any key allowed).
    pub fn free_values(self) -> Option<Self> {
        let values = &self.here["additionalProperties"];
        (values.is_object() || values == &Value::Bool(true) || self.is_anything()).then(|| self.at(values))
    }

    /// The schema of the elements of an array.
    pub fn items(self) -> Option<Self> {
        self.here.get("items").map(|items| self.at(items))
    }

    /// The alternatives of a tagged choice.
    pub fn variants(self) -> Option<impl Iterator<Item = Self>> {
        let variants = self.here["oneOf"].as_array().or_else(|| self.here["anyOf"].as_array())?;
        Some(variants.iter().map(move |variant| self.at(variant)))
    }

    /// The words, or words and truth values, allowed where the value is one of a fixed set.
    pub fn choices(self) -> Option<Vec<&'a Value>> {
        if let Some(word) = self.here.get("const") {
            return Some(vec![word]);
        }
        if let Some(choices) = self.here["enum"].as_array() {
            return Some(choices.iter().collect());
        }
        let nested: Option<Vec<Vec<&Value>>> = self.variants()?.map(Self::choices).collect();
        Some(nested?.concat())
    }

    /// The tag of one alternative of a tagged choice: the key with a constant, and the constant.
    pub fn tag(self) -> Option<(&'a str, &'a str)> {
        self.properties()?.iter().find_map(|(key, value)| Some((key.as_str(), value["const"].as_str()?)))
    }

    /// The type in words: `an integer`, `one of a, b, c`, `an array of strings`.
    pub fn type_name(self) -> String {
        if let Some(choices) = self.choices() {
            let choices: Vec<String> =
                choices.iter().map(|choice| format!("`{}`", choice.as_str().unwrap_or(&choice.to_string()))).collect();
            return match choices.as_slice() {
                [word] => word.clone(),
                choices => format!("one of {}", choices.join(", ")),
            };
        }
        let types: Vec<String> = self.types().into_iter().map(|name| self.describe(name)).collect();
        match types.is_empty() {
            true if self.variants().is_some() => "a table".to_owned(),
            true => "any value".to_owned(),
            false => types.join(" or "),
        }
    }

    fn describe(self, name: &str) -> String {
        match name {
            "array" => match self.items() {
                Some(items) => format!("an array of {}", plural(&items.type_name())),
                None => "an array".to_owned(),
            },
            "object" => "a table".to_owned(),
            "integer" => "an integer".to_owned() + &self.range(),
            "number" => "a number".to_owned() + &self.range(),
            other => format!("a {other}"),
        }
    }

    /// The allowed range in words, empty without one.
    fn range(self) -> String {
        // A bound that only says "fits the machine type" tells a reader nothing.
        let bound = |name: &str| self.here[name].as_f64().filter(|bound| bound.abs() < 4e9);
        let range = match (bound("minimum"), bound("exclusiveMinimum"), bound("maximum")) {
            (Some(low), _, Some(high)) => format!(" from {low} to {high}"),
            (Some(low), _, None) => format!(" of at least {low}"),
            (None, Some(low), Some(high)) => format!(" above {low}, up to {high}"),
            (None, Some(low), None) => format!(" above {low}"),
            (None, None, Some(high)) => format!(" of at most {high}"),
            (None, None, None) => String::new(),
        };
        match bound("exclusiveMaximum") {
            Some(high) if range.is_empty() => format!(" below {high}"),
            Some(high) => format!("{range} and below {high}"),
            None => range,
        }
    }

    fn types(self) -> Vec<&'a str> {
        match &self.here["type"] {
            Value::String(name) => vec![name.as_str()],
            Value::Array(names) => names.iter().filter_map(Value::as_str).filter(|name| *name != "null").collect(),
            _ => Vec::new(),
        }
    }

    fn is_anything(self) -> bool {
        self.here == &Value::Bool(true)
            || self.here.is_null()
            || self.here.as_object().is_some_and(|map| {
                !["type", "oneOf", "anyOf", "const", "enum"].iter().any(|key| map.contains_key(*key))
            })
    }

    fn accepts_leaf(self, leaf: &Value) -> bool {
        if let Some(choices) = self.choices() {
            return choices.contains(&leaf);
        }
        let of_type = self.types().into_iter().any(|name| match name {
            "string" => leaf.is_string(),
            "boolean" => leaf.is_boolean(),
            "integer" => leaf.is_i64() || leaf.is_u64(),
            "number" => leaf.is_number(),
            _ => false,
        });
        let bound = |name: &str| self.here[name].as_f64();
        let in_range = leaf.as_f64().is_none_or(|number| {
            bound("minimum").is_none_or(|low| number >= low)
                && bound("exclusiveMinimum").is_none_or(|low| number > low)
                && bound("maximum").is_none_or(|high| number <= high)
                && bound("exclusiveMaximum").is_none_or(|high| number < high)
        });
        of_type && in_range
    }
}

/// `a string` → `strings`.
fn plural(name: &str) -> String {
    match name.strip_prefix("a ").or_else(|| name.strip_prefix("an ")) {
        Some(noun) if !noun.contains(' ') => format!("{noun}s"),
        _ => format!("values, each {name}"),
    }
}

/// Checks `node`, which stands at `path` (dotted, empty for the root).
pub fn check(node: &Node, schema: Schema<'_>, path: &str) -> Result<(), Failure> {
    if schema.is_anything() {
        return Ok(());
    }
    match &node.kind {
        Kind::Leaf(leaf) if schema.accepts_leaf(leaf) => Ok(()),
        Kind::Array(elements) if schema.types().contains(&"array") => {
            let Some(items) = schema.items() else { return Ok(()) };
            elements.iter().enumerate().try_for_each(|(i, element)| check(element, items, &join(path, &i.to_string())))
        }
        Kind::Table(table) => {
            let Some(schema) = variant(node, schema, path)? else { return Err(wrong_type(node, schema, path)) };
            for (key, value) in table {
                let at = join(path, key);
                match schema.property(key).or_else(|| schema.free_values()) {
                    Some(schema) => check(value, schema, &at)?,
                    None => return Err(unknown(value, schema, path, key)),
                }
            }
            let required = schema.here["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
            for key in required {
                if !table.contains_key(key) {
                    let failure = Failure::new(format!("`{}` is missing", join(path, key)));
                    let failure = match schema.property(key) {
                        Some(schema) => failure.hint(format!("expected {}", schema.type_name())),
                        None => failure,
                    };
                    return Err(locate(failure, node, true, "this table"));
                }
            }
            Ok(())
        }
        _ => Err(wrong_type(node, schema, path)),
    }
}

/// The schema of a table: itself, or the alternative its tag names. `None`: not a table at all.
fn variant<'a>(node: &Node, schema: Schema<'a>, path: &str) -> Result<Option<Schema<'a>>, Failure> {
    if schema.properties().is_some() || schema.free_values().is_some() {
        return Ok(Some(schema));
    }
    if schema.types() == ["object"] {
        return Ok(Some(schema));
    }
    let Some(variants) = schema.variants() else { return Ok(None) };
    let tagged: Vec<_> = variants.filter_map(|variant| Some((variant.tag()?, variant))).collect();
    let Some(((key, _), _)) = tagged.first() else { return Ok(None) };
    let Kind::Table(table) = &node.kind else { return Ok(None) };
    let names = || tagged.iter().map(|((_, name), _)| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let Some(chosen) = table.get(*key) else {
        let failure = Failure::new(format!("`{}` is missing: expected one of {}", join(path, key), names()));
        return Err(locate(failure, node, true, "this table"));
    };
    let found =
        tagged.iter().find(|((_, name), _)| matches!(&chosen.kind, Kind::Leaf(Value::String(text)) if text == name));
    match found {
        Some((_, variant)) => Ok(Some(*variant)),
        None => {
            let at = join(path, key);
            let failure = Failure::new(format!("`{at}` is {}: expected one of {}", shown(chosen), names()));
            let failure = match &chosen.kind {
                Kind::Leaf(Value::String(text)) => {
                    did_you_mean(failure, text, tagged.iter().map(|((_, name), _)| *name))
                }
                _ => failure,
            };
            Err(locate(failure, chosen, false, "unknown name"))
        }
    }
}

fn wrong_type(node: &Node, schema: Schema<'_>, path: &str) -> Failure {
    let failure = Failure::new(format!("`{path}`: expected {}, got {}", schema.type_name(), shown(node)));
    let failure = match (&node.kind, schema.choices()) {
        (Kind::Leaf(Value::String(text)), Some(choices)) => {
            did_you_mean(failure, text, choices.into_iter().filter_map(Value::as_str))
        }
        _ => failure.hint(format!("`posttrain config explain {}` describes it", without_indices(path))),
    };
    locate(failure, node, false, "wrong value")
}

fn unknown(node: &Node, schema: Schema<'_>, path: &str, key: &str) -> Failure {
    let keys: Vec<&str> = schema.properties().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
    let failure = Failure::new(format!("unknown key `{}`", join(path, key)));
    let failure = match base::hint::nearest(key, keys.iter().copied()) {
        Some(near) => failure.hint(format!("did you mean `{}`?", join(path, near))),
        // Perhaps a key of a table inside this one, or of another section.
        None => match elsewhere(schema, key, path).or_else(|| elsewhere(schema.top(), key, "")) {
            Some((name, place)) if name == key => failure.hint(format!("there is a key `{place}`")),
            Some((_, place)) => failure.hint(format!("did you mean `{place}`?")),
            None => failure.hint(format!("the keys here are {}", keys.join(", "))),
        },
    };
    locate(failure, node, true, "unknown")
}

/// The name and the place of the key closest to `key` in the tables inside the one at `path`.
fn elsewhere(schema: Schema<'_>, key: &str, path: &str) -> Option<(String, String)> {
    fn gather(schema: Schema<'_>, path: &str, depth: usize, found: &mut Vec<(String, String)>) {
        for (name, value) in schema.properties().into_iter().flatten().filter(|_| depth < 5) {
            let place = join(path, name);
            gather(schema.at(value), &place, depth + 1, found);
            found.push((name.clone(), place));
        }
    }
    let mut found = Vec::new();
    gather(schema, path, 0, &mut found);
    let near = base::hint::nearest(key, found.iter().map(|(name, _)| name.as_str()))?.to_owned();
    found.into_iter().find(|(name, _)| *name == near)
}

fn did_you_mean<'a>(failure: Failure, text: &str, names: impl IntoIterator<Item = &'a str>) -> Failure {
    match base::hint::nearest(text, names) {
        Some(near) => failure.hint(format!("did you mean `{near}`?")),
        None => failure,
    }
}

fn locate(failure: Failure, node: &Node, key: bool, label: &str) -> Failure {
    match &node.place {
        Some(place) => {
            let span = if key { &place.key } else { &place.value };
            failure.at(&place.source, span.clone(), label)
        }
        None => failure,
    }
}

/// A value as an error shows it: `the string "x"`, `an array`.
fn shown(node: &Node) -> String {
    match &node.kind {
        Kind::Leaf(value @ Value::String(_)) => format!("the string {value}"),
        Kind::Leaf(value) => value.to_string(),
        _ => node.type_name().to_owned(),
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// `rewards.0.weight` → `rewards.weight`, the form `config explain` takes.
fn without_indices(path: &str) -> String {
    path.split('.').filter(|part| part.parse::<usize>().is_err()).collect::<Vec<_>>().join(".")
}
