//! JSON lines: rows, what they mean, and their tokens.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use data::{RenderOptions, Renderer, read, sample};
use libfuzzer_sys::fuzz_target;
use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::bytes().expect("the vocabulary is constant"));
static TEMPLATE: LazyLock<ChatTemplate> = LazyLock::new(|| ChatTemplate::chatml().expect("the template is constant"));

fuzz_target!(|bytes: &[u8]| {
    let options = RenderOptions::default();
    let renderer = Renderer::new(&TOKENIZER, Some(&TEMPLATE), 4096, &options);
    if let Ok(samples) = read::jsonl::parse(bytes, Path::new("fuzz.jsonl")).and_then(sample::parse) {
        let _ = renderer.examples(&samples);
        let _ = renderer.prompts(&samples);
        let _ = renderer.preferences(&samples);
        let _ = renderer.labelled(&samples);
        let _ = renderer.stepwise(&samples, "\n");
    }
});
