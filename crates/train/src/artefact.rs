//! The trained model as a folder other tools read.

use std::path::Path;

use base::files;
use model::chat::ChatTemplate;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use model::weights::safetensors::{self, Dtype};

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
            safetensors::write(&folder.join("adapter_model.safetensors"), &decoder.adapter_tensors(), Dtype::F32)?;
            files::write(&folder.join("adapter_config.json"), config.to_peft_json(base_model).as_bytes())?;
        }
        None => {
            safetensors::write(&folder.join(safetensors::FILE), &decoder.tensors(), Dtype::F32)?;
            let mut config = decoder.config().to_json();
            config["torch_dtype"] = Dtype::F32.name().into();
            files::write(&folder.join("config.json"), format!("{config:#}\n").as_bytes())?;
        }
    }
    let template = chat_template.map(ChatTemplate::source);
    if let Some(template) = template {
        files::write(&folder.join("chat_template.jinja"), template.as_bytes())?;
    }
    tokenizer.save(folder, template)
}
