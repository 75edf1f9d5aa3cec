//! A model from wherever it is: a name, a folder in Hugging Face layout, or a GGUF file.

use std::fs::{self, File};
use std::path::Path;

use base::files::{self, Digest};

use crate::chat::ChatTemplate;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::hub::{self, Origin, Progress};
use crate::save;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::load::{CONFIG, SPECIAL_MAP, TOKENIZER};
use crate::weights::{self, Source, gguf, safetensors};

/// A model ready to become a decoder. The weights stay where they are until then, unless something was made of them ([`load_into`]).
#[derive(Debug)]
pub struct Loaded<W = Box<dyn Source>> {
    /// How it was asked for.
    pub name: String,
    /// The shape, its special tokens completed from the tokenizer's.
    pub config: ModelConfig,
    /// The weights, or `None` for a preset, whose weights are to be drawn.
    pub weights: Option<W>,
    /// The tokenizer. It gives no token beyond the embedding's rows: added tokens that the file has beyond them are ordinary text.
    pub tokenizer: Tokenizer,
    /// The chat template, if the model has one.
    pub chat_template: Option<ChatTemplate>,
    /// SHA-256 of what the model was read from: the GGUF file, the files of the folder that were used, or the preset's
    /// configuration.
    pub sha256: Digest,
}

/// Loads a named model (fetching it if need be), a folder, or a GGUF file. A name goes before a path; write `./tiny` for
/// a folder that is called like a named model.
pub fn load(name_or_path: &str, progress: &mut dyn FnMut(Progress)) -> Result<Loaded> {
    load_into(name_or_path, progress, |_, weights| Ok(weights))
}

/// [`load`], where `make` makes something of the weights, a decoder say, while the tokenizer is read, which is the work of one thread.
/// The configuration it sees lacks the special tokens that the tokenizer alone knows.
pub fn load_into<W: Send>(
    name_or_path: &str,
    progress: &mut dyn FnMut(Progress),
    make: impl FnOnce(&ModelConfig, Box<dyn Source>) -> Result<W> + Send,
) -> Result<Loaded<W>> {
    let path = Path::new(name_or_path);
    let mut loaded = match hub::named(name_or_path).map(|model| &model.origin) {
        Some(Origin::Preset(config)) => preset(*config)?,
        Some(Origin::Download(download)) => {
            let path = hub::pull(name_or_path, progress)?;
            // The file was right when it came; the name must mean the same bytes now.
            let sha256 = download.sha256.to_owned().into();
            let (verified, loaded) = rayon::join(|| hub::verify(&path, download), || from_gguf(&path, sha256, make));
            verified.map_err(|reason| Error::malformed(path.display(), reason))?;
            loaded?
        }
        None if path.is_dir() => from_folder(path, make)?,
        None if path.is_file() => from_gguf(path, file_sha256(path)?, make)?,
        None => return Err(hub::unknown(name_or_path)),
    };
    name_or_path.clone_into(&mut loaded.name);
    Ok(loaded)
}

fn preset<W>(config: fn(usize) -> ModelConfig) -> Result<Loaded<W>> {
    let tokenizer = Tokenizer::bytes()?;
    let config = config(tokenizer.vocab_size());
    let chat_template = Some(ChatTemplate::chatml()?);
    let sha256 = files::sha256_of(config.to_json().to_string().as_bytes());
    Loaded::new(config, None, tokenizer, chat_template, sha256.into())
}

fn from_gguf<W>(
    path: &Path,
    sha256: Digest,
    make: impl FnOnce(&ModelConfig, Box<dyn Source>) -> Result<W>,
) -> Result<Loaded<W>> {
    let in_file = |error: Error| error.in_file(path);
    let weights = gguf::read(path)?.weights().map_err(in_file)?;
    let metadata = weights.gguf().metadata();
    let tokenizer = Tokenizer::from_gguf(metadata).map_err(in_file)?;
    let chat_template = ChatTemplate::from_gguf(metadata, &tokenizer).map_err(in_file)?;
    let config = weights.config.clone();
    let made = make(&config, Box::new(weights))?;
    Loaded::new(config, Some(made), tokenizer, chat_template, sha256).map_err(in_file)
}

fn from_folder<W: Send>(
    folder: &Path,
    make: impl FnOnce(&ModelConfig, Box<dyn Source>) -> Result<W> + Send,
) -> Result<Loaded<W>> {
    let path = folder.join("config.json");
    if !path.is_file() && folder.join(save::ADAPTER_CONFIG).is_file() {
        let hint = "load the base model it was trained on, with the adapter beside it; or merge the two first";
        return Err(Error::unsupported(format!("{}: a LoRA adapter as a model", folder.display()), hint));
    }
    let mut config = ModelConfig::from_json_bytes(&files::read(&path)?).map_err(|error| error.in_file(&path))?;
    generation_tokens(&folder.join("generation_config.json"), &mut config)?;
    let sha256 = folder_sha256(folder)?;
    let weights = safetensors::open(folder)?;
    weights::check(&config, &weights).map_err(|error| error.in_file(folder))?;
    let (tokenizer, made) = rayon::join(|| Tokenizer::from_folder(folder), || make(&config, Box::new(weights)));
    let tokenizer = tokenizer?;
    let chat_template = ChatTemplate::from_folder(folder, &tokenizer)?;
    Loaded::new(config, Some(made?), tokenizer, chat_template, sha256).map_err(|error| error.in_file(folder))
}

/// Adds the tokens that end a generation according to `generation_config.json`: chat models often name more there.
fn generation_tokens(path: &Path, config: &mut ModelConfig) -> Result<()> {
    if path.is_file() {
        let tokens = ModelConfig::eos_tokens(&files::read(path)?).map_err(|error| error.in_file(path))?;
        config.eos_token_ids.extend(tokens);
        dedup(&mut config.eos_token_ids);
    }
    Ok(())
}

/// Drops repetitions and keeps the order.
fn dedup(ids: &mut Vec<u32>) {
    let mut seen = Vec::new();
    ids.retain(|id| {
        !seen.contains(id) && {
            seen.push(*id);
            true
        }
    });
}

/// The hash of a file. It is opened here, so that the hash is that of what is read even if its name means another file later.
fn file_sha256(path: &Path) -> Result<Digest> {
    let (path, file) = (path.to_owned(), File::open(path).map_err(files::io_error("open", path))?);
    Ok(Digest::later(move || files::sha256_of_file(&file, &path)))
}

/// The hash of the names and hashes of a folder's model files, in the order of their names.
fn folder_sha256(folder: &Path) -> Result<Digest> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(files::io_error("list", folder))? {
        let name = entry.map_err(files::io_error("list", folder))?.file_name().to_string_lossy().into_owned();
        let model = ["config.json", "generation_config.json", TOKENIZER, CONFIG, SPECIAL_MAP, safetensors::INDEX];
        if model.contains(&name.as_str()) || name.ends_with(".safetensors") || name.ends_with(".jinja") {
            names.push(name);
        }
    }
    names.sort();
    let hash = |name| Ok((file_sha256(&folder.join(&name))?, name));
    let hashes = names.into_iter().map(hash).collect::<Result<Vec<_>>>()?;
    Ok(Digest::later(move || {
        let mut lines = String::new();
        for (sha256, name) in &hashes {
            lines += &format!("{} {name}\n", sha256.get()?);
        }
        Ok(files::sha256_of(lines.as_bytes()))
    }))
}

impl<W> Loaded<W> {
    /// Joins the parts, checks that the vocabularies fit, and completes the configuration's special tokens.
    fn new(
        mut config: ModelConfig,
        weights: Option<W>,
        tokenizer: Tokenizer,
        chat_template: Option<ChatTemplate>,
        sha256: Digest,
    ) -> Result<Self> {
        let tokenizer = tokenizer.with_embeddings(config.vocab_size)?;
        config.bos_token_id = config.bos_token_id.or(tokenizer.bos());
        config.pad_token_id = config.pad_token_id.or(tokenizer.pad());
        config.eos_token_ids.extend(tokenizer.eos());
        dedup(&mut config.eos_token_ids);
        if let Some(id) = config.eos_token_ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            let reason = format!("{id} is outside the vocabulary of {}", config.vocab_size);
            return Err(Error::malformed("eos_token_id", reason));
        }
        Ok(Self { name: String::new(), config, weights, tokenizer, chat_template, sha256 })
    }
}
