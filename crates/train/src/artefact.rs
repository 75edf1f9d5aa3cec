//! The trained model as a folder other tools read.

use std::path::Path;

use model::chat::ChatTemplate;
use model::decoder::Decoder;
use model::save;
use model::tokenizer::Tokenizer;
use model::weights::safetensors::Dtype;

/// Writes the model in Hugging Face layout, or its adapter in PEFT's, with tokenizer and chat template, in single precision
/// so that reading it back gives the same weights.
pub fn write(
    folder: &Path,
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    chat_template: Option<&ChatTemplate>,
    base_model: &str,
) -> model::Result<()> {
    match decoder.adapter_config() {
        Some(config) => {
            let (score, tensors) = (decoder.config().score, decoder.adapter_views());
            save::adapter(folder, config, score, base_model, tensors, tokenizer, chat_template)
        }
        None => save::model(folder, decoder.config(), decoder.views(), Dtype::F32, tokenizer, chat_template),
    }
}
