//! A `tokenizer.json`, and text through whatever tokenizer it gives.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::tokenizer::Tokenizer;

fuzz_target!(|json: &str| {
    let Ok(tokenizer) = Tokenizer::from_json(json) else { return };
    if let Ok(ids) = tokenizer.encode("What is 12 + 30? naïve 🦀") {
        tokenizer.decode(&ids);
    }
});
