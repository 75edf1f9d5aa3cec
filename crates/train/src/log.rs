//! Files that grow by whole records and can be cut back to an earlier length.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use base::files::{FileError, io_error};

use crate::error::{Error, Result};

/// A file under construction. What was appended after the last checkpoint is cut off when the run is resumed from it.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Log {
    /// Opens the file, creating it with the folder above, and cuts it to `length` bytes.
    ///
    /// # Errors
    /// As [`Log::check`].
    pub fn open(path: &Path, length: u64) -> Result<Self> {
        Self::check(path, length)?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io_error("create folder", folder))?;
        }
        let open = File::options().create(true).append(true).open(path);
        let file = open.map_err(io_error("open", path))?;
        file.set_len(length).map_err(io_error("truncate", path))?;
        Ok(Self { path: path.to_owned(), file, length })
    }

    /// Bytes of the file; 0 where there is none.
    ///
    /// # Errors
    /// What the system says instead.
    pub fn length(path: &Path) -> Result<u64, FileError> {
        match std::fs::metadata(path) {
            Ok(found) => Ok(found.len()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
            Err(error) => Err(io_error("read", path)(error)),
        }
    }

    /// Passes when the file can be cut to `length` bytes.
    ///
    /// # Errors
    /// When it is shorter than that: what a checkpoint relies on has been removed.
    pub fn check(path: &Path, length: u64) -> Result<()> {
        match Self::length(path)? {
            found if found < length => Err(Error::Log { path: path.to_owned(), found, expected: length }),
            _ => Ok(()),
        }
    }

    /// Appends one record.
    pub fn append(&mut self, record: &[u8]) -> Result<(), FileError> {
        self.file.write_all(record).map_err(io_error("write", &self.path))?;
        self.length += record.len() as u64;
        Ok(())
    }

    /// Waits until everything is on disk and returns the length: what a checkpoint needs to know.
    pub fn sync(&mut self) -> Result<u64, FileError> {
        self.file.sync_all().map_err(io_error("sync", &self.path))?;
        Ok(self.length)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn reopening_cuts_what_came_after() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs/log");
        let mut log = Log::open(&path, 0).unwrap();
        log.append(b"one\n").unwrap();
        let length = log.sync().unwrap();
        log.append(b"two, half writ").unwrap();
        drop(log);
        let mut log = Log::open(&path, length).unwrap();
        log.append(b"two\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo\n");
        let error = Log::open(&path, 100).unwrap_err().to_string();
        assert!(
            error.ends_with("runs/log has 8 bytes, expected at least the 100 that the checkpoint was made with"),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo\n");
    }
}
