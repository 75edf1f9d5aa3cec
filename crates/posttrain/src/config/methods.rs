//! Methods by name: a section `[simpo]` is its family's section with `method = "simpo"`, and a method's settings lie below
//! what the recipe says.

use std::collections::BTreeMap;

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

/// Lays a layer of a recipe on top of those below. A method's section and its family's are one table under two names, so that the layer counts
/// and not the name; the table bears the method's name where a layer has it. Within a layer, what the family's own section says lies on top.
///
/// # Errors
/// Two methods of one family.
pub fn lay(tree: &mut Node, over: Node) -> Result<(), Failure> {
    let mut over = gathered(over)?;
    if let (Kind::Table(under), Kind::Table(over)) = (&mut tree.kind, &mut over.kind) {
        for family in FAMILIES {
            let (Some(lower), Some(upper)) = (written(family, under).next(), written(family, over).next()) else {
                continue;
            };
            let upper_node = over.remove(upper).unwrap_or_default();
            let mut node = under.remove(lower).unwrap_or_default();
            if upper != family.section {
                refuse_another(family, method(family, lower, &node), upper, &upper_node)?;
            }
            node.merge(upper_node);
            under.insert(if upper == family.section { lower } else { upper }.to_owned(), node);
        }
    }
    tree.merge(over);
    Ok(())
}

/// A layer with one section a family.
fn gathered(mut layer: Node) -> Result<Node, Failure> {
    let Kind::Table(sections) = &mut layer.kind else { return Ok(layer) };
    for family in FAMILIES {
        let names: Vec<&str> = written(family, sections).filter(|name| *name != family.section).collect();
        let [first, rest @ ..] = &names[..] else { continue };
        if let Some((second, node)) = rest.first().and_then(|second| sections.get_key_value(*second)) {
            refuse_another(family, Some(first), second, node)?;
        }
        if let (Some(own), Some(named)) = (sections.remove(family.section), sections.get_mut(*first)) {
            named.merge(own);
        }
    }
    Ok(layer)
}

/// The sections of a family that a table has: those named after its methods, then its own.
fn written<'a>(family: &'a Family, sections: &'a BTreeMap<String, Node>) -> impl Iterator<Item = &'static str> + 'a {
    let named = family.presets.iter().map(|preset| preset.name).filter(|name| *name != family.section);
    named.chain([family.section]).filter(|name| sections.contains_key(*name))
}

/// The method that a section names, by its key or its own name.
fn method<'a>(family: &Family, section: &'a str, node: &'a Node) -> Option<&'a str> {
    let key = match &node.kind {
        Kind::Table(options) => options.get("method").map(|node| &node.kind),
        _ => None,
    };
    match key {
        Some(Kind::Leaf(Value::String(chosen))) => Some(chosen),
        _ => (section != family.section).then_some(section),
    }
}

/// Refuses a section named after another method than `first`, if that is one of the family's.
fn refuse_another(family: &Family, first: Option<&str>, second: &str, node: &Node) -> Result<(), Failure> {
    let Some(first) = first.filter(|first| *first != second && family.preset(first).is_some()) else { return Ok(()) };
    let failure = Failure::new(format!("`{first}` and `{second}` are both methods of `{}`", family.section));
    let failure = failure.hint("a run has one stage of a family: keep one of the two sections");
    Err(match &node.place {
        Some(place) => failure.at(&place.source, place.key.clone(), "here"),
        None => failure,
    })
}

/// Moves the sections that are named after methods to those of their families, and lays the settings of each method below.
///
/// # Errors
/// A method that the family does not have.
pub fn resolve(mut tree: Node) -> Result<Node, Failure> {
    let Kind::Table(sections) = &mut tree.kind else { return Ok(tree) };
    for family in FAMILIES {
        let Some(name) = written(family, sections).next() else { continue };
        if let Some(node) = sections.remove(name) {
            sections.insert(family.section.to_owned(), with_settings(family, name, node)?);
        }
    }
    Ok(tree)
}

/// A family's section with the settings of its method below.
fn with_settings(family: &Family, written: &str, section: Node) -> Result<Node, Failure> {
    if !matches!(section.kind, Kind::Table(_)) {
        return Ok(section);
    }
    let name = method(family, written, &section).unwrap_or(family.presets[0].name).to_owned();
    let Some(preset) = family.preset(&name) else {
        let names: Vec<&str> = family.presets.iter().map(|preset| preset.name).collect();
        let failure = Failure::new(format!("`{}` has no method `{name}`", family.section));
        let failure = failure.hint(match (nearest(&name, names.iter().copied()), methods::find(&name)) {
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

    /// The layers as one recipe.
    fn layered(layers: &[&str]) -> Result<Value, String> {
        let mut tree = Node::default();
        for text in layers {
            let layer = Node::from_text("recipe.toml", (*text).to_owned()).unwrap();
            lay(&mut tree, layer).map_err(|failure| failure.render(false))?;
        }
        resolve(tree).map(|node| node.to_json()).map_err(|failure| failure.to_string())
    }

    fn resolved(text: &str) -> Result<Value, String> {
        layered(&[text])
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
    fn a_later_layer_wins_whatever_it_calls_the_section() {
        let (grpo, policy) = ("[grpo]\nprompts_per_step = 3", "[policy]\nmethod = \"grpo\"\nprompts_per_step = 4");
        assert_eq!(layered(&[grpo, policy]).unwrap()["policy"]["prompts_per_step"], 4);
        assert_eq!(layered(&[policy, grpo]).unwrap()["policy"]["prompts_per_step"], 3);
        assert_eq!(layered(&[policy, grpo, "policy.prompts_per_step = 5"]).unwrap()["policy"]["prompts_per_step"], 5);
        // Elements of a list, too, and the settings of the method below everything.
        let teachers = ["[gkd]\nteachers = [{ model = 'a' }]", "distillation.teachers.0.model = 'b'"];
        assert_eq!(layered(&teachers).unwrap()["distillation"]["teachers"][0]["model"], "b");
        let dapo = layered(&["[policy]\nprompts_per_step = 3", "dapo.num_generations = 4"]).unwrap();
        assert_eq!((&dapo["policy"]["method"], &dapo["policy"]["prompts_per_step"]), (&json!("dapo"), &json!(3)));
        assert_eq!(layered(&[grpo, "policy.method = 'dapo'"]).unwrap()["policy"]["method"], "dapo");
    }

    #[test]
    fn two_methods_of_a_family_are_refused_in_one_layer_and_in_two() {
        let policy = "[policy]\nmethod = \"grpo\"";
        for layers in [&["[grpo]\n[dapo]"][..], &["[grpo]", "dapo.num_generations = 4"], &[policy, "[dapo]"]] {
            let error = layered(layers).unwrap_err();
            let told = error.contains("are both methods of `policy`") && error.contains("hint: a run has one stage");
            assert!(told && error.contains("recipe.toml:"), "{layers:?}: {error}");
        }
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
