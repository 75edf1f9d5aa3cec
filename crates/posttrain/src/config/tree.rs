//! TOML layers merged into one tree whose every value remembers where it was written.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use miette::NamedSource;
use serde_json::Value;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::failure::{Failure, Source};

/// Where a key and its value were written.
#[derive(Clone, Debug)]
pub struct Place {
    /// The file, or the `--set` flag.
    pub source: Source,
    /// Bytes of the key; for an element of an array, of the element.
    pub key: Range<usize>,
    /// Bytes of the value.
    pub value: Range<usize>,
}

/// A value of the merged configuration.
#[derive(Clone, Debug)]
pub struct Node {
    /// The value.
    pub kind: Kind,
    /// Where it was written; for a table, where it was first opened. `None` for the root.
    pub place: Option<Place>,
}

/// The three shapes of a value.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Keys and values; later layers add to it and replace single keys.
    Table(BTreeMap<String, Node>),
    /// Elements; a later layer replaces the array as a whole.
    Array(Vec<Node>),
    /// A string, number or boolean.
    Leaf(Value),
}

impl Default for Node {
    fn default() -> Self {
        Self { kind: Kind::Table(BTreeMap::new()), place: None }
    }
}

impl Node {
    /// Reads one TOML file as a layer.
    pub fn from_file(path: &Path) -> Result<Self, Failure> {
        let text = base::files::read_to_string(path)?;
        Self::from_text(&path.display().to_string(), text)
    }

    /// Reads TOML text; `name` stands for it in errors.
    pub fn from_text(name: &str, text: String) -> Result<Self, Failure> {
        let source: Source = Arc::new(NamedSource::new(name, text));
        let table = DeTable::parse(source.inner()).map_err(|error| {
            let failure = Failure::new(format!("{name} is not valid TOML: {}", error.message()));
            match error.span() {
                Some(span) => failure.at(&source, span, "here"),
                None => failure,
            }
        })?;
        table_node(table.into_inner(), &source, None)
    }

    /// Reads one `a.b=c` of a `--set` flag. What is not a TOML value is taken as a string.
    pub fn from_assignment(assignment: &str) -> Result<Self, Failure> {
        let name = format!("--set {assignment}");
        let Some((key, value)) = assignment.split_once('=') else {
            return Err(Failure::usage(format!("`{name}` has no `=`: expected `--set section.key=value`")));
        };
        let (key, value) = (key.trim(), value.trim());
        Self::from_text(&name, format!("{key} = {value}"))
            .or_else(|_| Self::from_text(&name, format!("{key} = {}", Value::from(value))))
            .map_err(|_| {
                Failure::usage(format!("`{name}`: `{key}` is not a dotted key"))
                    .hint("write for example `--set grpo.training.learning_rate=1e-6`")
            })
    }

    /// Lays `over` on top of this tree. Keys that number elements of a list, from 0, change these and leave the others.
    pub fn merge(&mut self, over: Self) {
        match (&mut self.kind, over.kind) {
            (Kind::Array(under), Kind::Table(over)) if over.keys().all(|key| element(key, under.len()).is_some()) => {
                for (key, node) in over {
                    if let Some(index) = element(&key, under.len()) {
                        under[index].merge(node);
                    }
                }
            }
            (Kind::Table(under), Kind::Table(over)) => {
                for (key, node) in over {
                    match under.get_mut(&key) {
                        Some(old) => old.merge(node),
                        None => drop(under.insert(key, node)),
                    }
                }
            }
            (_, kind) => *self = Self { kind, place: over.place },
        }
    }

    /// The tree without its places.
    pub fn to_json(&self) -> Value {
        match &self.kind {
            Kind::Table(table) => table.iter().map(|(key, node)| (key.clone(), node.to_json())).collect(),
            Kind::Array(elements) => elements.iter().map(Self::to_json).collect(),
            Kind::Leaf(value) => value.clone(),
        }
    }

    /// The name of the value's type, for errors.
    pub fn type_name(&self) -> &'static str {
        match &self.kind {
            Kind::Table(_) => "a table",
            Kind::Array(_) => "an array",
            Kind::Leaf(Value::Bool(_)) => "a boolean",
            Kind::Leaf(Value::String(_)) => "a string",
            Kind::Leaf(Value::Number(number)) if number.is_f64() => "a number",
            Kind::Leaf(_) => "an integer",
        }
    }
}

/// The element of a list of this length that a key numbers.
fn element(key: &str, len: usize) -> Option<usize> {
    key.parse().ok().filter(|index| *index < len)
}

fn table_node(table: DeTable<'_>, source: &Source, place: Option<Place>) -> Result<Node, Failure> {
    let mut nodes = BTreeMap::new();
    for (key, value) in table {
        nodes.insert(key.get_ref().to_string(), value_node(key.span(), value, source)?);
    }
    Ok(Node { kind: Kind::Table(nodes), place })
}

fn value_node(key: Range<usize>, value: Spanned<DeValue<'_>>, source: &Source) -> Result<Node, Failure> {
    let place = Place { source: source.clone(), key, value: value.span() };
    let refuse = |what: &str| Failure::new(what).at(source, place.value.clone(), "here");
    let kind = match value.into_inner() {
        DeValue::Table(table) => return table_node(table, source, Some(place)),
        DeValue::Array(elements) => {
            let nodes = elements.into_iter().map(|element| value_node(element.span(), element, source));
            Kind::Array(nodes.collect::<Result<_, _>>()?)
        }
        DeValue::String(text) => Kind::Leaf(text.into_owned().into()),
        DeValue::Boolean(flag) => Kind::Leaf(flag.into()),
        DeValue::Integer(integer) => {
            let parsed = i64::from_str_radix(integer.as_str(), integer.radix());
            Kind::Leaf(parsed.map_err(|_| refuse("the integer does not fit 64 bits"))?.into())
        }
        DeValue::Float(float) => {
            let parsed = float.as_str().parse::<f64>().ok().and_then(serde_json::Number::from_f64);
            Kind::Leaf(Value::Number(parsed.ok_or_else(|| refuse("the number is not finite"))?))
        }
        DeValue::Datetime(_) => return Err(refuse("a date is not a value of any option")),
    };
    Ok(Node { kind, place: Some(place) })
}
