//! JSON lines: rows, what they mean, their tokens, and what is wrong with them.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use data::audit::{Rows, Setting, audit};
use data::render::Use;
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
    let train = read::jsonl::parse_each(bytes, Path::new("fuzz.jsonl")).collect();
    let setting = Setting {
        tokenizer: &TOKENIZER,
        template: Some(&TEMPLATE),
        context: 4096,
        answer: 0,
        held_out_answer: 0,
        rendering: &options,
        used: Use::Learn,
    };
    audit(Rows { train, ..Rows::default() }, setting, 1);
});
