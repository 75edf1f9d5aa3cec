//! A GGUF file: header, configuration, weights, tokenizer and chat template.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;
use model::weights::gguf::Gguf;

fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = Gguf::from_bytes(bytes.to_vec()) else { return };
    if let Ok(tokenizer) = Tokenizer::from_gguf(gguf.metadata()) {
        let _ = tokenizer.encode("What is 12 + 30?");
        let _ = ChatTemplate::from_gguf(gguf.metadata(), &tokenizer);
    }
    let _ = gguf.load();
});
