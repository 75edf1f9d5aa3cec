//! A model by any name, ready to compute: named, a folder, a GGUF file, a run, a LoRA adapter on its base.

use std::path::{Path, PathBuf};

use base::files::{self, Digest};
use kernels::Precision;
use model::chat::ChatTemplate;
use model::decoder::WeightFormat;
use model::lora::{self, LoraConfig};
use model::tokenizer::Tokenizer;
use model::weights::{Source, safetensors};
use model::{Decoder, DeviceName, ModelConfig, hub, save, source};
use train::directory::Directory;

use crate::command::models::fetch;
use crate::failure::Failure;
use crate::terminal::Terminal;

/// Makes a decoder of weights in files.
type Build<'a> = dyn Fn(ModelConfig, Box<dyn Source>) -> model::Result<Decoder> + Sync + 'a;

/// How models are found.
#[derive(Clone, Copy, Debug)]
pub struct Opener {
    /// Shows downloads.
    pub terminal: Terminal,
    /// Never use the network.
    pub offline: bool,
}

/// A model in memory.
pub struct Opened {
    /// How it was asked for.
    pub name: String,
    /// SHA-256 of what it was read from.
    pub sha256: Digest,
    /// The decoder; its weights are not packed yet.
    pub decoder: Decoder,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<ChatTemplate>,
}

impl Opened {
    /// Refuses another model whose tokens are not this one's. In the message the two are called by their roles.
    ///
    /// # Errors
    /// The first token that differs.
    pub fn same_vocabulary(&self, own: &str, role: &str, other: &Self) -> Result<(), Failure> {
        let tokens = self.decoder.config().vocab_size.max(other.decoder.config().vocab_size) as u32;
        let differs = |&id: &u32| self.tokenizer.token(id) != other.tokenizer.token(id);
        let Some(id) = (0..tokens).find(differs) else { return Ok(()) };
        let word = |tokenizer: &Tokenizer| tokenizer.token(id).map_or("none".to_owned(), |token| format!("{token:?}"));
        Err(Failure::new(format!(
            "{role} {} and {own} {} have different vocabularies: token {id} is {} to the one and {} to the other",
            other.name,
            self.name,
            word(&other.tokenizer),
            word(&self.tokenizer)
        )))
    }
}

impl Opener {
    /// Opens a model that computes on a device.
    pub fn open_on(&self, device: DeviceName, name: &str, seed: u64) -> Result<Opened, Failure> {
        // A device that is not there is told before anything is read.
        let device = device.open()?;
        let mut opened = self.open(name, seed)?;
        if let Some(device) = device {
            opened.decoder.to_device(&device)?;
        }
        Ok(opened)
    }

    /// Opens a model that generates and scores, prepared for that; full weights are kept in packed form alone.
    pub fn open_to_generate(
        &self,
        device: DeviceName,
        name: &str,
        seed: u64,
        precision: Precision,
        format: WeightFormat,
    ) -> Result<Opened, Failure> {
        let mut opened = match (device, format) {
            (DeviceName::Cpu, WeightFormat::Full) => {
                self.open_with(name, seed, &|config, weights| Decoder::packed(config, weights, precision))?
            }
            _ => self.open_on(device, name, seed)?,
        };
        opened.decoder.prepare_for_generation(precision, format);
        Ok(opened)
    }

    /// Opens a model. The weights of a preset are drawn from `seed`.
    pub fn open(&self, name: &str, seed: u64) -> Result<Opened, Failure> {
        self.open_with(name, seed, &Decoder::new)
    }

    /// [`Opener::open`], where `build` makes decoders of weights in files.
    fn open_with(&self, name: &str, seed: u64, build: &Build) -> Result<Opened, Failure> {
        let path = self.resolve(name)?;
        if let Some(adapter) = adapter_config(&path) {
            return self.open_adapter(&path, &adapter, seed, build);
        }
        let loaded = source::load_into(&path, &mut |_| {}, |config, weights| build(config.clone(), weights))?;
        let decoder = match loaded.weights {
            Some(mut decoder) => {
                decoder.set_special_tokens(&loaded.config);
                decoder
            }
            None => Decoder::random(loaded.config, seed)?,
        };
        Ok(Opened {
            name: name.to_owned(),
            sha256: loaded.sha256,
            decoder,
            tokenizer: loaded.tokenizer,
            template: loaded.chat_template,
        })
    }

    /// Only the shape of a model, its tokenizer and template: what planning and rendering need.
    pub fn shape(&self, name: &str) -> Result<source::Loaded, Failure> {
        let path = self.resolve(name)?;
        match adapter_config(&path) {
            Some(adapter) => self.shape(&self.base_of(&adapter)?),
            None => Ok(source::load(&path, &mut |_| {})?),
        }
    }

    /// SHA-256 of what a model is read from: [`Opened::sha256`], without reading its weights into memory.
    pub fn digest(&self, name: &str) -> Result<Digest, Failure> {
        let path = self.resolve(name)?;
        match adapter_config(&path) {
            Some(adapter) => with_adapter(self.digest(&self.base_of(&adapter)?)?, &path),
            None => Ok(source::load(&path, &mut |_| {})?.sha256),
        }
    }

    /// Whether a named model has to be fetched before it can be used.
    ///
    /// # Errors
    /// One that has to be, where the network must not be used.
    pub fn must_fetch(&self, name: &str) -> Result<bool, Failure> {
        let download = matches!(hub::named(name).map(|model| &model.origin), Some(hub::Origin::Download(_)));
        let absent = download && hub::cached(name).is_none();
        if absent && self.offline {
            let failure = Failure::new(format!("{name} is not in the cache, and --offline forbids to fetch it"));
            return Err(failure.hint(format!("`posttrain pull {name}` fetches it once, with a network")));
        }
        Ok(absent)
    }

    /// Makes sure that a named model is in the cache, and finds the model of a run.
    fn resolve(&self, name: &str) -> Result<String, Failure> {
        if self.must_fetch(name)? {
            fetch(name, self.terminal)?;
        }
        if hub::named(name).is_none() && Path::new(name).is_dir() {
            let run = Directory::new(name);
            if run.final_model().is_dir() {
                return Ok(run.final_model().display().to_string());
            }
            if run.holds_a_run() {
                let newest = run.checkpoints()?.pop().map(|step| run.checkpoint(step));
                let Some(newest) = newest else {
                    let failure = Failure::new(format!(
                        "{name} is a run without a model: it has neither `final` nor a checkpoint"
                    ));
                    return Err(failure.hint(format!("go on with it: `posttrain resume {name}`")));
                };
                return Ok(newest.display().to_string());
            }
        }
        Ok(name.to_owned())
    }

    /// The base model of an adapter, by the name its configuration gives.
    fn base_of(&self, config: &Path) -> Result<String, Failure> {
        let base = named_base(config)?;
        if adapter_config(&self.resolve(&base)?).is_some() {
            let failure = Failure::new(format!("{}: the base model {base} is a LoRA adapter itself", config.display()));
            return Err(failure.hint("merge that adapter into its base first: `posttrain merge`"));
        }
        Ok(base)
    }

    fn open_adapter(&self, folder: &str, config: &Path, seed: u64, build: &Build) -> Result<Opened, Failure> {
        let base = self.base_of(config)?;
        let text = files::read_to_string(config)?;
        let tensors = safetensors::read(&adapter_weights(folder))?;
        let head = lora::saved_head(&text, &tensors)?;
        // A head that is added moves the weights to a new place.
        let build: &Build = if head.is_some() { &Decoder::new } else { build };
        let mut opened = self.open_with(&base, seed, build)?;
        if let (None, Some(head)) = (opened.decoder.config().score, head) {
            // Its values come with the adapter.
            opened.decoder.add_score(head, 0.0, 0)?;
        }
        opened.decoder.load_adapter(&LoraConfig::from_peft_json(&text)?, tensors)?;
        opened.sha256 = with_adapter(opened.sha256, folder)?;
        opened.name = folder.to_owned();
        Ok(opened)
    }
}

/// The `adapter_config.json` of a folder with an adapter.
fn adapter_config(folder: &str) -> Option<PathBuf> {
    let path = Path::new(folder).join(save::ADAPTER_CONFIG);
    path.is_file().then_some(path)
}

/// The digest of a base with the adapter in a folder.
fn with_adapter(base: Digest, folder: &str) -> Result<Digest, Failure> {
    let own = files::sha256(&adapter_weights(folder))?;
    Ok(Digest::later(move || Ok(files::sha256_of(format!("{} {own}", base.get()?).as_bytes()))))
}

fn adapter_weights(folder: &str) -> PathBuf {
    Path::new(folder).join(save::ADAPTER)
}

fn named_base(config: &Path) -> Result<String, Failure> {
    let json: serde_json::Value = serde_json::from_slice(&files::read(config)?)
        .map_err(|error| Failure::new(format!("{}: {error}", config.display())))?;
    json["base_model_name_or_path"]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| Failure::new(format!("{}: `base_model_name_or_path` is missing", config.display())))
}
