//! Methods by name: a section `[simpo]` is its family's section with `method = "simpo"`, and a method's settings lie below
//! what the recipe says.

use base::hint::nearest;
use serde_json::{Value, json};
use train::methods::{self, FAMILIES, Family};

use super::load::blame;
use super::tree::{Kind, Node};
use crate::failure::Failure;

/// Marks a section of the schema that is a method of another section.
pub const METHOD_OF: &str = "x-method-of";

/// Adds a section for every method that is not named like its family's section.
pub fn add_sections(schema: &mut Value) {
    for family in FAMILIES {
        let whole = schema["properties"][family.section].clone();
        for preset in family.presets.iter().filter(|preset| preset.name != family.section) {
            let mut section = whole.clone();
            section["description"] =
                format!("{}: `[{}]` with `method = \"{}\"`.", preset.title, family.section, preset.name).into();
            section[METHOD_OF] = json!(family.section);
            schema["properties"][preset.name] = section;
        }
    }
}

/// Moves the sections that are named after methods to those of their families, and lays the settings of each method below.
///
/// What the family's own section says lies on top of what the method's says.
///
/// # Errors
/// Two methods of one family, a method that the family does not have.
pub fn resolve(mut tree: Node) -> Result<Node, Failure> {
    let Kind::Table(sections) = &mut tree.kind else { return Ok(tree) };
    for family in FAMILIES {
        let mut written = Vec::new();
        for preset in family.presets.iter().filter(|preset| preset.name != family.section) {
            if let Some(node) = sections.remove(preset.name) {
                written.push((preset.name, node));
            }
        }
        let own = sections.remove(family.section);
        if let [(first, _), (second, node), ..] = &written[..] {
            let failure = Failure::new(format!("`{first}` and `{second}` are both methods of `{}`", family.section));
            let failure = failure.hint("a run has one stage of a family: keep one of the two sections");
            return Err(match &node.place {
                Some(place) => failure.at(&place.source, place.key.clone(), "here"),
                None => failure,
            });
        }
        let named = written.pop();
        let name = named.as_ref().map(|(name, _)| *name);
        let merged = match (named, own) {
            (None, None) => continue,
            (Some((_, node)), None) | (None, Some(node)) => node,
            (Some((_, mut node)), Some(own)) => {
                node.merge(own);
                node
            }
        };
        sections.insert(family.section.to_owned(), with_settings(family, name, merged)?);
    }
    Ok(tree)
}

/// A family's section with the settings of its method below.
fn with_settings(family: &Family, named: Option<&str>, section: Node) -> Result<Node, Failure> {
    let Kind::Table(options) = &section.kind else { return Ok(section) };
    let chosen = match options.get("method").map(|node| &node.kind) {
        Some(Kind::Leaf(Value::String(chosen))) => Some(chosen.as_str()),
        _ => None,
    };
    let name = chosen.or(named).unwrap_or(family.presets[0].name);
    let Some(preset) = family.preset(name) else {
        let names: Vec<&str> = family.presets.iter().map(|preset| preset.name).collect();
        let failure = Failure::new(format!("`{}` has no method `{name}`", family.section));
        let failure = failure.hint(match (nearest(name, names.iter().copied()), methods::find(name)) {
            (_, Some((other, _))) => format!("it is a method of `{}`", other.section),
            (Some(near), None) => format!("did you mean `{near}`?"),
            (None, None) => format!("its methods are {}", names.join(", ")),
        });
        return Err(blame(failure, &section, "method"));
    };
    let place = section.place.clone();
    let mut whole = Node::from_text(&format!("the settings of {name}"), preset.settings.to_owned())?;
    whole.merge(Node::from_text("the name of the method", format!("method = \"{name}\""))?);
    whole.merge(section);
    whole.place = place;
    Ok(whole)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    fn resolved(text: &str) -> Result<Value, String> {
        let node = Node::from_text("recipe.toml", text.to_owned()).unwrap();
        resolve(node).map(|node| node.to_json()).map_err(|failure| failure.to_string())
    }

    #[test]
    fn a_method_is_its_family_with_settings() {
        let recipe = resolved("[grpo]\nprompts_per_step = 3\n[policy]\nnum_generations = 4").unwrap();
        assert_eq!(recipe["policy"]["method"], "grpo");
        assert_eq!(
            (&recipe["policy"]["prompts_per_step"], &recipe["policy"]["num_generations"]),
            (&json!(3), &json!(4))
        );
        assert!(recipe.get("grpo").is_none());
        assert_eq!(resolved("[sft]").unwrap()["sft"]["method"], "sft");
    }

    #[test]
    fn a_method_of_another_family_is_refused() {
        let error = resolved("[policy]\nmethod = \"gpro\"").unwrap_err();
        assert!(error.contains("`policy` has no method `gpro`"), "{error}");
    }

    #[test]
    fn the_settings_of_every_method_are_options() {
        let schema = super::super::schema();
        for family in FAMILIES {
            for preset in family.presets {
                let recipe = Node::from_text(preset.name, format!("[{}]\n", preset.name)).unwrap();
                let resolved = resolve(recipe).unwrap();
                super::super::check::check(&resolved, super::super::check::Schema::new(&schema), "").unwrap();
            }
        }
    }
}
