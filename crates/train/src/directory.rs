//! The run directory: what is where, and what has to go when a run is resumed.
//!
//! ```text
//! config.toml                 the resolved configuration
//! metrics.jsonl               one line a step and one an evaluation; nothing in it depends on the clock
//! timing.jsonl                one line a step: where the time went
//! runs/events.out.tfevents.*  the same metrics for TensorBoard
//! episodes/step-N.parquet     what was sampled in a step, with rewards and advantages
//! samples/step-N.jsonl        what the evaluation after N steps saw
//! checkpoint-N/               model, optimiser and trainer_state.json after N steps, sealed by a manifest
//! reference-N/                the weights a later stage started from, while it lasts
//! final/                      the trained model in Hugging Face layout, or the adapter in PEFT's
//! README.md                   the model card
//! summary.json                the result in one file; written last
//! ```
//!
//! Files appear whole or not at all, but for the three logs, which grow by whole records and are cut back to what the
//! newest checkpoint knows when a run is resumed. Everything except `timing.jsonl` and the `timing` part of `summary.json`
//! is the same, byte for byte, however often the run was killed.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use base::files::{self, FileError, Manifest, io_error};

use crate::error::{Error, Result};
use crate::tensorboard;

/// The layout of a run directory.
#[derive(Clone, Debug)]
pub struct Directory {
    root: PathBuf,
}

impl Directory {
    /// The directory at `root`, which need not exist.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved configuration.
    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// The metrics, one JSON object a line.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// The wall-clock values, one JSON object a line.
    pub fn timing(&self) -> PathBuf {
        self.root.join("timing.jsonl")
    }

    /// The TensorBoard events.
    pub fn events(&self) -> PathBuf {
        self.root.join("runs").join(tensorboard::FILE_NAME)
    }

    /// The episodes of a step.
    pub fn episodes(&self, step: u64) -> PathBuf {
        self.root.join("episodes").join(format!("step-{step:06}.parquet"))
    }

    /// What the evaluation after `step` steps saw.
    pub fn samples(&self, step: u64) -> PathBuf {
        self.root.join("samples").join(format!("step-{step:06}.jsonl"))
    }

    /// The checkpoint after `step` steps.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.root.join(format!("checkpoint-{step}"))
    }

    /// The weights that a later stage started from, where it needs them for its whole duration.
    pub fn reference(&self, stage: usize) -> PathBuf {
        self.root.join(format!("reference-{stage}"))
    }

    /// The trained model.
    pub fn final_model(&self) -> PathBuf {
        self.root.join("final")
    }

    /// The model card.
    pub fn card(&self) -> PathBuf {
        self.root.join("README.md")
    }

    /// The result.
    pub fn summary(&self) -> PathBuf {
        self.root.join("summary.json")
    }

    /// Whether a run was started here.
    pub fn holds_a_run(&self) -> bool {
        self.config().exists() || self.metrics().exists()
    }

    /// Keeps other processes from writing here until the file that is returned is dropped.
    ///
    /// # Errors
    /// [`Error::Busy`] when another process does. Where the file system knows no locks, nobody is kept out.
    pub fn lock(&self) -> Result<File> {
        let folder = File::open(&self.root).map_err(io_error("open", &self.root))?;
        match folder.try_lock() {
            Err(TryLockError::WouldBlock) => Err(Error::Busy { folder: self.root.clone() }),
            Err(TryLockError::Error(error)) if error.kind() != io::ErrorKind::Unsupported => {
                Err(io_error("lock", &self.root)(error).into())
            }
            Ok(()) | Err(TryLockError::Error(_)) => Ok(folder),
        }
    }

    /// An entry that is in the way of a new run: one that bears a name of the list above.
    pub fn occupied(&self) -> Result<Option<PathBuf>, FileError> {
        Ok(list(&self.root)?.into_iter().find(|path| is_ours(path) && !is_partial(path)))
    }

    /// Removes a run, and the files named in `also`. What no run writes stays.
    ///
    /// # Errors
    /// A run that is going on, or a file that cannot be removed.
    pub fn clear(&self, also: &[&str]) -> Result<()> {
        let _lock = self.lock()?;
        for path in list(&self.root)? {
            if is_ours(&path) || also.iter().any(|name| path.ends_with(name)) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// The steps with a checkpoint folder, complete or not, in ascending order.
    pub fn checkpoints(&self) -> Result<Vec<u64>, FileError> {
        let mut steps: Vec<u64> = numbered(&self.root, "checkpoint-", "")?.into_iter().map(|(step, _)| step).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Removes what a killed process left half-made, and everything written after `step` steps except the logs.
    pub fn cut(&self, step: u64) -> Result<(), FileError> {
        for path in list(&self.root)? {
            if is_partial(&path) {
                remove(&path)?;
            }
        }
        for (folder, extension) in [("episodes", ".parquet"), ("samples", ".jsonl")] {
            let folder = self.root.join(folder);
            for (found, path) in numbered(&folder, "step-", extension)? {
                if found > step {
                    remove(&path)?;
                }
            }
            // Samples of the evaluation before the first step belong to it.
            for path in list(&folder)? {
                if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
                    remove(&path)?;
                }
            }
        }
        for found in self.checkpoints()?.into_iter().filter(|&found| found > step) {
            remove(&self.checkpoint(found))?;
        }
        for path in [self.final_model(), self.card(), self.summary()] {
            remove(&path)?;
        }
        Ok(())
    }
}

/// Whether a run writes something of this name into its directory.
fn is_ours(path: &Path) -> bool {
    const NAMES: [&str; 9] = [
        "config.toml",
        "metrics.jsonl",
        "timing.jsonl",
        "runs",
        "episodes",
        "samples",
        "final",
        "README.md",
        "summary.json",
    ];
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let numbered = |prefix| name.strip_prefix(prefix).is_some_and(|number| number.parse::<u64>().is_ok());
    NAMES.contains(&&*name) || numbered("checkpoint-") || numbered("reference-") || is_partial(path)
}

/// Whether a killed process left this half-made.
fn is_partial(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.') && name.ends_with(".partial")
}

/// Builds a folder aside with `fill`, seals it with a manifest and renames it to `path`: it is complete or absent.
pub fn write_folder<E: From<FileError>>(path: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!(".{name}.partial"));
    remove(&aside)?;
    let made = (|| {
        fs::create_dir_all(&aside).map_err(io_error("create folder", &aside))?;
        fill(&aside)?;
        Manifest::seal(&aside)?;
        remove(path)?;
        files::rename(&aside, path)?;
        Ok(())
    })();
    if made.is_err() {
        // The reason for the failure matters more than whether the leftover could be removed; a full disk needs the space.
        let _ = remove(&aside);
    }
    made
}

/// Removes a file, or a folder with everything in it; what is not there is fine.
///
/// A folder loses its manifest first, so that a kill in between cannot leave something that looks complete.
pub fn remove(path: &Path) -> Result<(), FileError> {
    let attempt = if path.is_dir() {
        let manifest = path.join(files::MANIFEST);
        if manifest.exists() {
            fs::remove_file(&manifest).map_err(io_error("remove", &manifest))?;
        }
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match attempt {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(io_error("remove", path)),
    }
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, FileError> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(io_error("list", folder))?;
    entries.map(|entry| Ok(entry.map_err(io_error("list", folder))?.path())).collect()
}

/// The entries called `{prefix}{number}{suffix}`.
fn numbered(folder: &Path, prefix: &str, suffix: &str) -> Result<Vec<(u64, PathBuf)>, FileError> {
    let number = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok()
    };
    Ok(list(folder)?.into_iter().filter_map(|path| Some((number(&path)?, path))).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn cutting_keeps_what_the_checkpoint_knows() {
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory::new(folder.path());
        for step in [0, 2, 3] {
            files::write(&directory.samples(step), b"x").unwrap();
            files::write(&directory.episodes(step), b"x").unwrap();
        }
        for step in [2, 3, 10] {
            fs::create_dir(directory.checkpoint(step)).unwrap();
        }
        fs::create_dir(folder.path().join(".checkpoint-4.partial")).unwrap();
        files::write(&directory.summary(), b"{}").unwrap();
        assert_eq!(directory.checkpoints().unwrap(), [2, 3, 10], "by number, not by name");
        directory.cut(2).unwrap();
        assert_eq!(directory.checkpoints().unwrap(), [2]);
        assert!(directory.samples(0).exists() && directory.samples(2).exists() && !directory.samples(3).exists());
        assert!(!directory.episodes(3).exists() && !directory.summary().exists());
        assert!(!folder.path().join(".checkpoint-4.partial").exists());
    }

    #[test]
    fn clearing_takes_nothing_that_no_run_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory::new(folder.path());
        files::write(&folder.path().join("thesis.tex"), b"x").unwrap();
        assert_eq!(directory.occupied().unwrap(), None);
        files::write(&directory.config(), b"x").unwrap();
        files::write(&folder.path().join("report.html"), b"x").unwrap();
        fs::create_dir(directory.checkpoint(3)).unwrap();
        fs::create_dir(folder.path().join("checkpoint-best")).unwrap();
        assert!(directory.occupied().unwrap().is_some());

        let lock = directory.lock().unwrap();
        assert!(matches!(directory.clear(&[]), Err(Error::Busy { .. })));
        drop(lock);
        directory.clear(&["report.html"]).unwrap();
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["checkpoint-best", "thesis.tex"]);
    }

    #[test]
    fn a_folder_that_fails_half_way_leaves_the_old_one() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("checkpoint-1");
        write_folder(&path, |folder| files::write(&folder.join("a"), b"1")).unwrap();
        let full = || FileError::Io { action: "write", path: "b".into(), source: io::ErrorKind::StorageFull.into() };
        let failed = write_folder(&path, |folder| {
            files::write(&folder.join("a"), b"2")?;
            Err(full())
        });
        assert!(failed.is_err());
        Manifest::verify(&path).unwrap();
        assert_eq!(fs::read(path.join("a")).unwrap(), b"1");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1, "no leftover");
    }
}
