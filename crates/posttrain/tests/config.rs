//! Recipes: precedence, round trips, hostile files.

use std::path::PathBuf;

use posttrain::config::load::Layers;
use posttrain::config::tree::Node;
use posttrain::config::{Config, schema};
use proptest::prelude::*;

use crate::common::{SMALL, root, write};

/// What every recipe must go through without a panic.
fn read(text: &str) -> Result<Config, String> {
    let tree = Node::from_text("recipe.toml", text.to_owned()).map_err(|failure| failure.render(false))?;
    Config::from_tree(tree).map_err(|failure| failure.render(false))
}

#[test]
fn defaults_files_and_flags_in_this_order() {
    let folder = tempfile::tempdir().unwrap();
    let first =
        write(folder.path(), "first.toml", "seed = 1\n[sft]\nbatch_size = 2\n[sft.training]\nlearning_rate = 1e-3\n");
    let second = write(folder.path(), "second.toml", "[sft]\nbatch_size = 3\n");
    let load = |files: &[&PathBuf], assignments: &[&str]| {
        let files = files.iter().map(|path| (*path).clone()).collect();
        let assignments = assignments.iter().map(|text| (*text).to_owned()).collect();
        Config::load(&Layers { files, assignments }).map_err(|failure| failure.to_string()).unwrap()
    };
    let batch_size = |config: Config| config.sft.unwrap().batch_size;
    assert_eq!(load(&[], &[]), Config::default());
    assert_eq!(batch_size(load(&[&first], &[])), 2);
    assert_eq!(batch_size(load(&[&first, &second], &[])), 3);
    assert_eq!(batch_size(load(&[&second, &first], &[])), 2);
    assert_eq!(batch_size(load(&[&first, &second], &["sft.batch_size=4", "sft.batch_size=5"])), 5);
    let config = load(&[&first, &second], &["seed=9"]);
    assert_eq!((config.seed, config.sft.unwrap().training.learning_rate), (9, 1e-3));
    // A run's own recipe has the family's section, whatever the recipe called it.
    let text = "[policy]\nmethod = 'grpo'\ntraining.learning_rate = 1e-3\n[[rewards]]\ntype = 'number'\n";
    let run = write(folder.path(), "config.toml", text);
    let policy = load(&[&run], &["grpo.training.learning_rate=1e-6"]).policy.unwrap();
    assert_eq!((&policy.method[..], policy.training.learning_rate), ("grpo", 1e-6));
}

#[test]
fn the_hash_sees_what_is_computed_and_nothing_else() {
    let hash = |text: &str| read(text).unwrap().hash().map_err(|failure| failure.to_string()).unwrap();
    assert_eq!(hash(""), hash("seed = 0"));
    assert_eq!(hash("output_dir = 'a'"), hash("output_dir = 'b'"));
    assert_ne!(hash("seed = 1"), hash("seed = 2"));
}

#[test]
fn every_option_is_documented() {
    fn undocumented(schema: &serde_json::Value, path: &str, found: &mut Vec<String>) {
        for (key, value) in schema["properties"].as_object().into_iter().flatten() {
            let at = format!("{path}.{key}");
            let documented =
                value["description"].is_string() || value["$ref"].is_string() || value["const"].is_string();
            if !documented && !value["anyOf"].is_array() {
                found.push(at.clone());
            }
            undocumented(value, &at, found);
        }
        for part in ["oneOf", "anyOf", "allOf"] {
            schema[part].as_array().into_iter().flatten().for_each(|variant| undocumented(variant, path, found));
        }
        for (name, definition) in schema["$defs"].as_object().into_iter().flatten() {
            undocumented(definition, name, found);
        }
    }
    let mut found = Vec::new();
    undocumented(&schema(), "", &mut found);
    assert!(found.is_empty(), "options without a doc comment: {found:?}");
}

#[test]
fn recipes_read_back_from_what_they_resolve_to() {
    let files = |folder: &str| std::fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let systems = files("crates/systems/src").filter(|path| path.is_dir() && !path.ends_with("worlds"));
    // What is no recipe there are the settings of the miniature.
    let miniature = |path: &PathBuf| path.ends_with("tiny.toml") || path.ends_with("quick.toml");
    let theirs = systems.flat_map(|folder| files(&folder.display().to_string())).filter(|path| !miniature(path));
    for path in files("recipes").chain(theirs) {
        if path.extension().is_some_and(|extension| extension == "toml") {
            let config = read(&std::fs::read_to_string(&path).unwrap()).unwrap();
            let resolved = config.to_toml().map_err(|failure| failure.to_string()).unwrap();
            assert_eq!(read(&resolved).unwrap(), config, "{}", path.display());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_truncated_recipe_never_panics(length in 0..SMALL.len()) {
        if let Some(text) = SMALL.get(..length) {
            let _ = read(text);
        }
    }

    #[test]
    fn a_recipe_with_flipped_bits_never_panics(flips in prop::collection::vec((0..SMALL.len(), 0u32..8), 1..6)) {
        let mut bytes = SMALL.as_bytes().to_vec();
        for (place, bit) in flips {
            bytes[place] ^= 1 << bit;
        }
        if let Ok(text) = String::from_utf8(bytes) {
            let _ = read(&text);
        }
    }

    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}") {
        let _ = read(&text);
        let _ = Node::from_assignment(&text);
    }

    #[test]
    fn a_number_survives_its_way_through_a_flag(rate in 0f64..1e3) {
        let mut tree = Node::from_text("recipe.toml", "[sft]".into()).map_err(|failure| failure.to_string()).unwrap();
        let assignment = format!("sft.training.learning_rate={rate:?}");
        tree.merge(Node::from_assignment(&assignment).map_err(|failure| failure.to_string()).unwrap());
        let config = Config::from_tree(tree).map_err(|failure| failure.to_string()).unwrap();
        prop_assert_eq!(config.sft.unwrap().training.learning_rate, rate);
    }
}
