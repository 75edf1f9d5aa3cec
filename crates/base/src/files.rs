//! Files that are whole or absent.
//!
//! [`write()`] puts the bytes aside, syncs them, renames them into place and syncs the folder, so that a kill at any
//! instruction leaves either the old file or the new one. A [`Manifest`] written last makes a folder of files complete:
//! it lists the size and SHA-256 of each, and [`Manifest::verify`] refuses the folder when anything is missing or differs.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use sha2::Sha256;
use sha2::digest::Digest as _;

/// The name of the manifest inside a folder.
pub const MANIFEST: &str = "manifest.json";

/// What went wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried: `read`, `write`, `rename`, ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A folder that should hold a manifest is incomplete or damaged.
    #[error("{path} is not a complete checkpoint: {reason}")]
    Incomplete {
        /// The folder.
        path: PathBuf,
        /// What is missing or differs.
        reason: String,
    },
}

impl crate::Hint for FileError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Io { source, .. } => advice(source.kind()).map(str::to_owned),
            Self::Incomplete { .. } => Some("use an earlier checkpoint, or delete this one".into()),
        }
    }
}

/// What to do about an answer of the operating system.
fn advice(kind: io::ErrorKind) -> Option<&'static str> {
    use io::ErrorKind::{
        AlreadyExists, FileTooLarge, InvalidData, IsADirectory, NotADirectory, NotFound, PermissionDenied,
        QuotaExceeded, ReadOnlyFilesystem, StorageFull,
    };
    Some(match kind {
        StorageFull | QuotaExceeded | FileTooLarge => {
            "the disk is full, or a limit is reached; make room and resume, nothing written before is lost"
        }
        NotFound => "check the path; it is taken relative to the current folder",
        PermissionDenied | ReadOnlyFilesystem => "check who may read and write there, or choose another place",
        AlreadyExists | NotADirectory => "a file is where a folder must be; move it, or choose another place",
        IsADirectory => "this is a folder; name a file in it",
        InvalidData => "the file is damaged, or not text in UTF-8",
        _ => return None,
    })
}

/// Attaches the action and the path to an I/O error.
pub fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Io { action, path, source }
}

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    fs::read(path).map_err(io_error("read", path))
}

/// Reads a whole file as UTF-8.
pub fn read_to_string(path: &Path) -> Result<String, FileError> {
    fs::read_to_string(path).map_err(io_error("read", path))
}

/// Writes `bytes` to `path` so that the file is whole or untouched. Creates the folders above it. A link stays one: what it leads to
/// is written. What is no file (a pipe, a device) is written as it is.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    write_with(path, |file| file.write_all(bytes))
}

/// Like [`write()`], for content that is produced piece by piece.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut io::BufWriter<File>) -> io::Result<()>) -> Result<(), FileError> {
    let real = match fs::metadata(path) {
        Ok(found) if !found.is_dir() => match path.canonicalize() {
            Ok(real) if found.is_file() => Some(real),
            // A rename would put a file in its place, and what has no path of its own cannot be renamed to.
            _ => return write_through(path, fill),
        },
        _ => None,
    };
    let path = real.as_deref().unwrap_or(path);
    let folder = parent(path);
    fs::create_dir_all(folder).map_err(io_error("create folder", folder))?;
    let aside = aside(path);
    let filled = (|| {
        let mut writer = io::BufWriter::with_capacity(1 << 20, File::create(&aside)?);
        fill(&mut writer)?;
        writer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    })();
    if let Err(source) = filled {
        // The reason for the failure matters more than whether the leftover could be removed.
        let _ = fs::remove_file(&aside);
        return Err(FileError::Io { action: "write", path: path.to_owned(), source });
    }
    rename(&aside, path)
}

/// Writes to what is there.
fn write_through(path: &Path, fill: impl FnOnce(&mut io::BufWriter<File>) -> io::Result<()>) -> Result<(), FileError> {
    let filled = (|| {
        let mut writer = io::BufWriter::new(File::options().write(true).truncate(true).open(path)?);
        fill(&mut writer)?;
        writer.flush()
    })();
    filled.map_err(io_error("write", path))
}

/// Renames a file or folder that is already synced, and syncs the folder above.
pub fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    fs::rename(from, to).map_err(io_error("rename", to))?;
    sync_folder(parent(to))
}

/// Syncs a folder's entries to disk.
pub fn sync_folder(folder: &Path) -> Result<(), FileError> {
    File::open(folder).and_then(|handle| handle.sync_all()).map_err(io_error("sync", folder))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The temporary neighbour of `path`: `.NAME.partial`.
fn aside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}

/// The SHA-256 of a file, in hexadecimal.
pub fn sha256(path: &Path) -> Result<String, FileError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    sha256_of_file(&file, path)
}

/// The SHA-256 of an open file from its start on, in hexadecimal. The path is for messages.
pub fn sha256_of_file(mut file: &File, path: &Path) -> Result<String, FileError> {
    file.rewind().map_err(io_error("read", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(io_error("read", path))? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    Ok(hex(&hasher.finalize()))
}

/// The SHA-256 of bytes, in hexadecimal.
pub fn sha256_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A SHA-256 in hexadecimal that is worked out when it is first asked for, or before that on a thread of its own.
///
/// Hashing a model takes longer than reading it, and nobody needs the hash before the first result is written.
#[derive(Clone)]
pub struct Digest {
    compute: Arc<dyn Fn() -> Result<String, FileError> + Send + Sync>,
    value: Arc<Mutex<Option<String>>>,
}

impl Digest {
    /// The digest that `compute` will give.
    pub fn later(compute: impl Fn() -> Result<String, FileError> + Send + Sync + 'static) -> Self {
        Self { compute: Arc::new(compute), value: Arc::default() }
    }

    /// Starts working it out on a thread that stands back where others compute. What goes wrong is told to whoever asks.
    pub fn start(&self) {
        let digest = self.clone();
        let work = move || {
            // Of this thread alone, on Linux. A refusal costs the others some time.
            #[cfg(target_os = "linux")]
            let _ = rustix::process::nice(10);
            digest.get()
        };
        // Without the thread, it is worked out when somebody asks.
        let _ = std::thread::Builder::new().name("digest".into()).spawn(work);
    }

    /// The digest, once it is there.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn get(&self) -> Result<String, FileError> {
        // Held while computing, so that others wait; a panic on the way leaves nothing behind.
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        match &*value {
            Some(value) => Ok(value.clone()),
            None => Ok(value.insert((self.compute)()?).clone()),
        }
    }
}

impl From<String> for Digest {
    fn from(value: String) -> Self {
        let compute = value.clone();
        Self { compute: Arc::new(move || Ok(compute.clone())), value: Arc::new(Mutex::new(Some(value))) }
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digest")
    }
}

/// Size and hash of one file of a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Bytes.
    pub size: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
}

/// The files of a complete folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Entries by path relative to the folder.
    pub files: BTreeMap<String, Entry>,
}

impl Manifest {
    /// Hashes every file directly inside `folder` (but the manifest itself) and writes the manifest, last.
    pub fn seal(folder: &Path) -> Result<Self, FileError> {
        let mut manifest = Self::default();
        for entry in fs::read_dir(folder).map_err(io_error("list", folder))? {
            let path = entry.map_err(io_error("list", folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_file() && name != MANIFEST && !name.ends_with(".partial") {
                let size = fs::metadata(&path).map_err(io_error("read", &path))?.len();
                manifest.files.insert(name, Entry { size, sha256: sha256(&path)? });
            }
        }
        let text = serde_json::to_vec_pretty(&manifest).map_err(|error| FileError::Io {
            action: "write",
            path: folder.join(MANIFEST),
            source: error.into(),
        })?;
        write(&folder.join(MANIFEST), &text)?;
        Ok(manifest)
    }

    /// Reads the manifest of `folder` and checks every file against it.
    ///
    /// # Errors
    /// [`FileError::Incomplete`] when something is missing or differs; [`FileError::Io`] when it cannot be told.
    pub fn verify(folder: &Path) -> Result<Self, FileError> {
        let incomplete = |reason: String| FileError::Incomplete { path: folder.to_owned(), reason };
        let unread = |path: &Path, name: &str, error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => incomplete(format!("{name} is missing")),
            _ => io_error("read", path)(error),
        };
        let path = folder.join(MANIFEST);
        let text = fs::read(&path).map_err(|error| unread(&path, MANIFEST, error))?;
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|error| incomplete(format!("{MANIFEST}: {error}")))?;
        for (name, expected) in &manifest.files {
            let file = folder.join(name);
            let size = fs::metadata(&file).map_err(|error| unread(&file, name, error))?.len();
            if size != expected.size {
                return Err(incomplete(format!("{name} has {size} bytes, expected {}", expected.size)));
            }
            if sha256(&file)? != expected.sha256 {
                return Err(incomplete(format!("{name} differs from its recorded hash")));
            }
        }
        Ok(manifest)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.txt");
        write(&path, b"old").unwrap();
        let error = write_with(&path, |file| {
            file.write_all(b"half of the n")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        });
        assert!(matches!(error, Err(FileError::Io { action: "write", .. })));
        assert_eq!(read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no leftover");
    }

    #[test]
    #[cfg(unix)]
    fn what_a_link_leads_to_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link, null) = (folder.path().join("a/file"), folder.path().join("link"), folder.path().join("null"));
        write(&file, b"old").unwrap();
        std::os::unix::fs::symlink("a/file", &link).unwrap();
        std::os::unix::fs::symlink("/dev/null", &null).unwrap();
        write(&link, b"new").unwrap();
        write(&null, b"nothing").unwrap();
        assert_eq!(read(&file).unwrap(), b"new");
        for link in [link, null] {
            assert!(fs::symlink_metadata(&link).unwrap().is_symlink(), "{}", link.display());
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "no leftover");
    }

    #[test]
    fn a_digest_is_of_the_file_that_was_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write(&path, b"old").unwrap();
        let (file, name) = (File::open(&path).unwrap(), path.clone());
        let digest = Digest::later(move || sha256_of_file(&file, &name));
        write(&path, b"new").unwrap();
        digest.start();
        assert_eq!(digest.get().unwrap(), sha256_of(b"old"));
        let missing = Digest::later(move || sha256(Path::new("/nowhere")));
        missing.start();
        assert!(matches!(missing.get(), Err(FileError::Io { action: "open", .. })));
    }

    #[test]
    fn a_manifest_catches_every_kind_of_damage() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("weights");
        write(&file, b"12345").unwrap();
        assert!(Manifest::verify(folder.path()).is_err(), "unsealed");
        Manifest::seal(folder.path()).unwrap();
        Manifest::verify(folder.path()).unwrap();
        fs::write(&file, b"12344").unwrap();
        assert!(Manifest::verify(folder.path()).unwrap_err().to_string().contains("differs"));
        fs::write(&file, b"1234").unwrap();
        assert!(Manifest::verify(folder.path()).unwrap_err().to_string().contains("4 bytes"));
        fs::remove_file(&file).unwrap();
        assert!(Manifest::verify(folder.path()).unwrap_err().to_string().contains("missing"));
    }

    #[test]
    fn what_cannot_be_read_is_not_called_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let sealed = |name: &str| {
            let entry = Entry { size: 1, sha256: String::new() };
            let manifest = Manifest { files: [(name.to_owned(), entry)].into() };
            write(&folder.path().join(MANIFEST), &serde_json::to_vec(&manifest).unwrap()).unwrap();
            Manifest::verify(folder.path()).unwrap_err()
        };
        assert!(matches!(sealed("weights"), FileError::Incomplete { .. }));
        // Of what lies below a file, the system does not say that it is missing.
        write(&folder.path().join("weights"), b"1").unwrap();
        assert!(matches!(sealed("weights/shard"), FileError::Io { action: "read", .. }));
        fs::remove_file(folder.path().join(MANIFEST)).unwrap();
        fs::create_dir(folder.path().join(MANIFEST)).unwrap();
        assert!(matches!(Manifest::verify(folder.path()).unwrap_err(), FileError::Io { action: "read", .. }));
    }
}
