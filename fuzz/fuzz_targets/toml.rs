//! Recipes: any text is read or refused, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use posttrain::config::Config;
use posttrain::config::load::convert;
use posttrain::config::tree::Node;

fuzz_target!(|text: &str| {
    if let Ok(tree) = Node::from_text("fuzz.toml", text.to_owned()) {
        let _ = convert::<Config>(&tree);
    }
    let _ = Node::from_assignment(text);
});
