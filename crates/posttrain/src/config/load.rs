//! From files and flags to a typed value: read, merge, check, convert.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::methods;
use super::tree::{Kind, Node};
use crate::failure::Failure;

/// The JSON schema of `T`, with every table closed: a key that is not listed is an error.
pub fn schema<T: JsonSchema>() -> Value {
    closed(schemars::schema_for!(T).to_value())
}

/// A JSON schema with every table closed.
pub fn closed(mut schema: Value) -> Value {
    let definitions = schema["$defs"].clone();
    inline(&mut schema, &definitions);
    schema
}

/// Brings the shapes that serde's `tag` and `flatten` produce into one form that [`check`] and the reference understand:
/// a choice is a list of whole, closed tables.
fn inline(schema: &mut Value, definitions: &Value) {
    let Some(object) = schema.as_object_mut() else {
        schema.as_array_mut().into_iter().flatten().for_each(|element| inline(element, definitions));
        return;
    };
    // A tagged alternative that refers to a struct: the struct's keys join the tag.
    if object.contains_key("properties")
        && let Some(reference) = object.get("$ref").and_then(Value::as_str)
        && let Some(target) =
            definitions.get(reference.trim_start_matches("#/$defs/")).and_then(Value::as_object).cloned()
    {
        object.remove("$ref");
        join(object, &target);
    }
    // Keys beside a choice: they belong to every alternative.
    if let Some(Value::Array(mut variants)) = object.get("oneOf").cloned()
        && let Some(Value::Object(_)) = object.get("properties")
    {
        let mut shared = object.clone();
        shared.remove("oneOf");
        for variant in variants.iter_mut().filter_map(Value::as_object_mut) {
            // The variant's own reference first, so that the shared keys join a whole table.
            let mut whole = Value::Object(variant.clone());
            inline(&mut whole, definitions);
            if let Value::Object(whole) = whole {
                *variant = whole;
            }
            join(variant, &shared);
        }
        object.retain(|key, _| key == "description" || key == "$defs" || key == "$schema" || key == "title");
        object.insert("oneOf".into(), variants.into());
    }
    if object.contains_key("properties") {
        object.entry("additionalProperties").or_insert(false.into());
    }
    for (key, value) in object.iter_mut() {
        // Defaults and constants are data, not schemas.
        if !matches!(key.as_str(), "default" | "const" | "enum" | "required" | "examples") {
            inline(value, definitions);
        }
    }
}

/// Adds the keys of `other` to a table's schema; its own description stays.
fn join(table: &mut Map<String, Value>, other: &Map<String, Value>) {
    if let Some(Value::Object(properties)) = table.get_mut("properties") {
        for (key, value) in other.get("properties").and_then(Value::as_object).into_iter().flatten() {
            properties.entry(key).or_insert_with(|| value.clone());
        }
    }
    let mut required = table.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
    required.extend(other.get("required").and_then(Value::as_array).cloned().unwrap_or_default());
    if !required.is_empty() {
        table.insert("required".into(), required.into());
    }
    if let Some(description) = other.get("description") {
        table.entry("description").or_insert_with(|| description.clone());
    }
}

/// Files in order, then assignments in order: each lies on top of what came before.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// TOML files.
    pub files: Vec<PathBuf>,
    /// The `a.b=c` of `--set` flags.
    pub assignments: Vec<String>,
}

impl Layers {
    /// Reads and merges everything.
    pub fn merged(&self) -> Result<Node, Failure> {
        let mut tree = Node::default();
        for file in &self.files {
            methods::lay(&mut tree, Node::from_file(file)?)?;
        }
        for assignment in &self.assignments {
            methods::lay(&mut tree, Node::from_assignment(assignment)?)?;
        }
        Ok(tree)
    }
}

/// Converts a tree that was checked: the schema knows keys, types and ranges; what is left is what a type itself refuses.
pub fn typed<T: DeserializeOwned>(tree: &Node) -> Result<T, Failure> {
    serde_json::from_value(tree.to_json())
        .map_err(|error| Failure::new(format!("the configuration is not valid: {error}")))
}

/// Points a failure about the option `key` (dotted) at the place where the option was written.
pub fn blame(failure: Failure, tree: &Node, key: &str) -> Failure {
    let mut node = tree;
    for part in key.split('.') {
        let next = match &node.kind {
            Kind::Table(table) => table.get(part),
            Kind::Array(elements) => part.parse::<usize>().ok().and_then(|i| elements.get(i)),
            Kind::Leaf(_) => None,
        };
        // An option that was not written has no place; its table may have one.
        let Some(next) = next else { break };
        node = next;
    }
    match &node.place {
        Some(place) => failure.at(&place.source, place.value.clone(), "here"),
        None => failure,
    }
}

/// A value as TOML, options that are off left out.
pub fn to_toml<T: Serialize>(value: &T) -> Result<String, Failure> {
    let broken = |error: &dyn std::fmt::Display| Failure::new(format!("cannot write the configuration: {error}"));
    let json = serde_json::to_value(value).map_err(|error| broken(&error))?;
    toml::to_string(&without_nulls(json)).map_err(|error| broken(&error))
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => map
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key, without_nulls(value)))
            .collect(),
        Value::Array(elements) => elements.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use serde::Deserialize;

    use super::super::check::{Schema, check};
    use super::*;

    /// Checks a tree against the schema of `T` and converts it.
    fn convert<T: JsonSchema + DeserializeOwned>(tree: &Node) -> Result<T, Failure> {
        check(tree, Schema::new(&schema::<T>()), "")?;
        typed(tree)
    }

    /// Options of a test.
    #[derive(Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Options {
        /// Seed of everything.
        seed: u64,
        /// Optional section.
        grpo: Option<Section>,
        /// Judges.
        rewards: Vec<Judge>,
        /// Words.
        stop: Vec<String>,
    }

    /// A section.
    #[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(default)]
    struct Section {
        /// Peak learning rate.
        learning_rate: f64,
        /// Shape.
        shape: Shape,
        /// Longer options.
        #[serde(flatten)]
        length: Length,
    }

    impl Default for Section {
        fn default() -> Self {
            Self { learning_rate: 0.5, shape: Shape::Constant, length: Length::default() }
        }
    }

    /// How long.
    #[derive(Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Length {
        /// Steps.
        #[schemars(range(min = 1))]
        max_steps: Option<u32>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "snake_case")]
    enum Shape {
        /// Flat.
        Constant,
        /// Falling.
        Cosine,
    }

    /// One judge.
    #[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
    struct Judge {
        /// Factor.
        #[serde(default)]
        weight: f64,
        #[serde(flatten)]
        kind: Kind,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(tag = "type", rename_all = "snake_case")]
    enum Kind {
        /// By number.
        Number(Number),
        /// By format.
        Format {
            /// Tag.
            tag: String,
        },
    }

    /// Number options.
    #[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Number {
        /// Column.
        column: String,
    }

    impl Default for Number {
        fn default() -> Self {
            Self { column: "answer".into() }
        }
    }

    fn parse(texts: &[&str]) -> Result<Options, String> {
        let mut tree = Node::default();
        for text in texts {
            tree.merge(Node::from_text("recipe.toml", (*text).into()).map_err(|failure| failure.render(false))?);
        }
        convert(&tree).map_err(|failure| failure.render(false))
    }

    #[test]
    fn later_layers_win_key_by_key() {
        let options = parse(&["seed = 1\ngrpo.shape = 'cosine'", "grpo.learning_rate = 2", "seed = 3"]).unwrap();
        let length = Length::default();
        assert_eq!(options.grpo, Some(Section { learning_rate: 2.0, shape: Shape::Cosine, length }));
        assert_eq!(options.seed, 3);
    }

    #[test]
    fn choices_and_flattened_options_are_read() {
        let options = parse(&[
            "[[rewards]]\ntype = 'number'\nweight = 2\n[[rewards]]\ntype = 'format'\ntag = 'x'\n[grpo]\nmax_steps = 4",
        ])
        .unwrap();
        assert_eq!(options.rewards[0], Judge { weight: 2.0, kind: Kind::Number(Number::default()) });
        assert_eq!(options.grpo.unwrap().length.max_steps, Some(4));
    }

    #[test]
    fn mistakes_are_shown_in_their_place() {
        for (text, wanted) in [
            (
                "[grpo]\nlearning_rat = 1",
                ["unknown key `grpo.learning_rat`", "recipe.toml:2:1", "did you mean `grpo.learning_rate`?"],
            ),
            (
                "learning_rate = 1",
                ["unknown key `learning_rate`", "recipe.toml:1:1", "there is a key `grpo.learning_rate`"],
            ),
            ("seed = -1", ["expected an integer of at least 0, got -1", "recipe.toml:1:8", ""]),
            ("seed = 1.5", ["`seed`: expected an integer", "got 1.5", ""]),
            ("grpo = 3", ["`grpo`: expected a table, got 3", "", ""]),
            ("grpo.max_steps = 0", ["`grpo.max_steps`: expected an integer of at least 1, got 0", "", ""]),
            ("grpo.max_step = 1", ["unknown key", "did you mean `grpo.max_steps`?", ""]),
            ("stop = ['a', 3]", ["`stop.1`: expected a string, got 3", "recipe.toml:1:14", ""]),
            ("stop = 'a'", ["expected an array of strings, got the string \"a\"", "", ""]),
            ("grpo.shape = 'cosin'", ["one of `constant`, `cosine`", "did you mean `cosine`?", ""]),
            ("[[rewards]]\nweight = 1", ["`rewards.0.type` is missing", "`number`, `format`", ""]),
            ("[[rewards]]\ntype = 'numbre'", ["did you mean `number`?", "", ""]),
            (
                "[[rewards]]\ntype = 'number'\ncolum = 'x'",
                ["unknown key `rewards.0.colum`", "did you mean `rewards.0.column`?", ""],
            ),
            ("[[rewards]]\ntype = 'format'", ["`rewards.0.tag` is missing", "", ""]),
            ("seed = ", ["recipe.toml is not valid TOML", "recipe.toml:1", ""]),
            ("seed = nan", ["the number is not finite", "", ""]),
            ("seed = 99999999999999999999", ["does not fit", "", ""]),
        ] {
            let shown = parse(&[text]).unwrap_err();
            for part in wanted {
                assert!(shown.contains(part), "{text:?} shows\n{shown}\nwithout {part:?}");
            }
        }
    }

    #[test]
    fn assignments_take_toml_or_plain_words() {
        let mut tree = Node::default();
        for assignment in ["grpo.shape=cosine", "grpo.learning_rate = 1e-6", "stop=['x y']", "seed=7"] {
            tree.merge(Node::from_assignment(assignment).unwrap());
        }
        let options: Options = convert(&tree).unwrap();
        assert_eq!((options.seed, options.stop), (7, vec!["x y".to_owned()]));
        assert_eq!(options.grpo.unwrap().learning_rate, 1e-6);
        assert!(Node::from_assignment("seed").is_err());
    }

    #[test]
    fn an_element_of_a_list_is_changed_by_its_number() {
        let mut tree =
            Node::from_text("recipe", "rewards = [{ type = 'number' }, { type = 'format' }]".into()).unwrap();
        tree.merge(Node::from_assignment("rewards.1.weight=0.5").unwrap());
        assert_eq!(tree.to_json()["rewards"][1], serde_json::json!({ "type": "format", "weight": 0.5 }));
        assert_eq!(tree.to_json()["rewards"][0], serde_json::json!({ "type": "number" }));
        // There is no third to change.
        tree.merge(Node::from_assignment("rewards.2.weight=1").unwrap());
        assert!(tree.to_json()["rewards"].is_object(), "left for the check to refuse");
    }

    #[test]
    fn written_toml_reads_back() {
        let options = parse(&["seed = 5\nstop = ['a']\n[grpo]\nmax_steps = 2\n[[rewards]]\ntype='number'"]).unwrap();
        assert_eq!(parse(&[&to_toml(&options).unwrap()]).unwrap(), options);
    }

    #[test]
    fn the_reference_covers_every_kind_of_option() {
        let schema = schema::<Options>();
        let text = super::super::reference::markdown(Schema::new(&schema));
        for part in [
            "| `seed` | an integer of at least 0 | `0` | Seed of everything. |",
            "## `[grpo]`",
            "| `max_steps` |",
            "type = \"number\"",
            "`[[rewards]]`",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let explained = super::super::reference::explain(Schema::new(&schema), "grpo.learning_rate").unwrap();
        assert_eq!(explained, "grpo.learning_rate: a number (default 0.5)\n\nPeak learning rate.\n");
        assert!(super::super::reference::explain(Schema::new(&schema), "rewards.0.column").unwrap().contains("Column"));
        assert!(super::super::reference::explain(Schema::new(&schema), "grpo.lerning_rate").is_err());
    }
}
