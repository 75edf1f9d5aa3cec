//! A model as a folder in Hugging Face layout, which `transformers`, vLLM and [`crate::source::load`] read.

use std::path::Path;

use base::files;
use serde_json::{Map, Value, json};

use crate::chat::ChatTemplate;
use crate::config::{ModelConfig, ScoreHead};
use crate::error::Result;
use crate::lora::LoraConfig;
use crate::tokenizer::Tokenizer;
use crate::weights::TensorView;
use crate::weights::safetensors::{self, Dtype};

/// The name of an adapter's configuration in a folder.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// The name of an adapter's weights in a folder.
pub const ADAPTER: &str = "adapter_model.safetensors";

/// Writes a whole model: weights, then the configuration and the tokenizer. Every file is whole or absent.
pub fn model<'a, T: Into<TensorView<'a>>>(
    folder: &Path,
    config: &ModelConfig,
    tensors: impl IntoIterator<Item = (&'a String, T)>,
    dtype: Dtype,
    tokenizer: &Tokenizer,
    chat_template: Option<&ChatTemplate>,
) -> Result<()> {
    safetensors::write(&folder.join(safetensors::FILE), tensors, dtype)?;
    configuration(folder, config, dtype)?;
    self::tokenizer(folder, tokenizer, chat_template)
}

/// Writes an adapter as PEFT does, with the score head that is trained with it, for the model called `base_model`; and the
/// tokenizer.
pub fn adapter<'a, T: Into<TensorView<'a>>>(
    folder: &Path,
    config: &LoraConfig,
    score: Option<ScoreHead>,
    base_model: &str,
    tensors: impl IntoIterator<Item = (&'a String, T)>,
    tokenizer: &Tokenizer,
    chat_template: Option<&ChatTemplate>,
) -> Result<()> {
    safetensors::write(&folder.join(ADAPTER), tensors, Dtype::F32)?;
    files::write(&folder.join(ADAPTER_CONFIG), config.to_peft_json(base_model, score).as_bytes())?;
    self::tokenizer(folder, tokenizer, chat_template)
}

/// Writes `config.json` and `generation_config.json`.
pub fn configuration(folder: &Path, config: &ModelConfig, dtype: Dtype) -> Result<()> {
    let mut value = config.to_json();
    value["torch_dtype"] = dtype.name().into();
    write_json(&folder.join("config.json"), &value)?;
    let generation: Map<String, Value> = ["bos_token_id", "eos_token_id", "pad_token_id"]
        .into_iter()
        .filter(|key| !value[key].is_null())
        .map(|key| (key.to_owned(), value[key].clone()))
        .collect();
    write_json(&folder.join("generation_config.json"), &generation.into())
}

/// Writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`. The template is
/// in `tokenizer_config.json` too, where older readers look for it.
pub fn tokenizer(folder: &Path, tokenizer: &Tokenizer, chat_template: Option<&ChatTemplate>) -> Result<()> {
    tokenizer.save(folder, chat_template.map(ChatTemplate::source))?;
    let mut special = json!({});
    for (key, id) in [("bos_token", tokenizer.bos()), ("eos_token", tokenizer.eos()), ("pad_token", tokenizer.pad())] {
        if let Some(token) = id.and_then(|id| tokenizer.token(id)) {
            special[key] = token.into();
        }
    }
    write_json(&folder.join("special_tokens_map.json"), &special)?;
    if let Some(template) = chat_template {
        files::write(&folder.join("chat_template.jinja"), template.source().as_bytes())?;
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    Ok(files::write(path, format!("{value:#}\n").as_bytes())?)
}
