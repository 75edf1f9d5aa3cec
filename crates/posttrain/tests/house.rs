//! Invariant 11: dependencies point to lower layers, and `unsafe` lives in one crate. And no file of tests is left out of the build.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common;

/// The crates, lowest first.
const LAYERS: [&str; 11] =
    ["base", "kernels", "model", "rollout", "objectives", "data", "envs", "eval", "train", "systems", "posttrain"];

#[test]
fn crates_depend_on_lower_layers_only() {
    for (level, name) in LAYERS.iter().enumerate() {
        let text = fs::read_to_string(common::root().join("crates").join(name).join("Cargo.toml")).unwrap();
        let manifest: toml::Table = toml::from_str(&text).unwrap();
        for dependency in manifest["dependencies"].as_table().unwrap().keys() {
            if let Some(of) = LAYERS.iter().position(|layer| layer == dependency) {
                assert!(of < level, "{name} must not depend on {dependency}");
            }
        }
    }
    assert_eq!(fs::read_dir(common::root().join("crates")).unwrap().count(), LAYERS.len(), "a crate without a layer");
}

#[test]
fn only_kernels_is_unsafe() {
    fn check(folder: &Path) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                check(&path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                assert!(!text.contains("unsafe {") && !text.contains("unsafe fn"), "{} is unsafe", path.display());
            }
        }
    }
    for name in LAYERS.iter().filter(|name| **name != "kernels") {
        check(&common::root().join("crates").join(name).join("src"));
    }
}

#[test]
fn every_file_of_tests_is_compiled() {
    for name in LAYERS {
        let crate_folder = common::root().join("crates").join(name);
        let Ok(entries) = fs::read_dir(crate_folder.join("tests")) else { continue };
        let files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect();
        let Ok(main) = fs::read_to_string(crate_folder.join("tests/main.rs")) else {
            assert_eq!(files.len(), 1, "{name}: several programs of tests where one would do");
            continue;
        };
        let manifest = fs::read_to_string(crate_folder.join("Cargo.toml")).unwrap();
        for file in files {
            let stem = file.file_stem().unwrap().to_str().unwrap();
            let found =
                main.contains(&format!("mod {stem};")) || manifest.contains(&format!("path = \"tests/{stem}.rs\""));
            assert!(found, "{} belongs to no program of tests", file.display());
        }
    }
}
