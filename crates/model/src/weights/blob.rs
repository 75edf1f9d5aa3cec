//! Bytes at an offset, from a file or from memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use base::files::{FileError, io_error};

/// The content of a file, read piece by piece so that at most one tensor of it is in memory for each thread.
#[derive(Debug)]
pub(super) struct Blob {
    content: Content,
    length: u64,
}

#[derive(Debug)]
enum Content {
    File(Mutex<File>),
    Bytes(Vec<u8>),
}

impl Blob {
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let file = File::open(path).map_err(io_error("open", path))?;
        let metadata = file.metadata().map_err(io_error("read", path))?;
        if metadata.is_dir() {
            return Err(io_error("read", path)(io::ErrorKind::IsADirectory.into()));
        }
        Ok(Self { content: Content::File(Mutex::new(file)), length: metadata.len() })
    }

    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { length: bytes.len() as u64, content: Content::Bytes(bytes) }
    }

    /// The number of bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// The `length` bytes at `offset`. Allocates only what is there.
    pub fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        if offset.checked_add(length as u64).is_none_or(|end| end > self.length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match &self.content {
            // Both ends are at most the length of the vector.
            Content::Bytes(bytes) => Ok(bytes[offset as usize..][..length].to_vec()),
            Content::File(file) => {
                let mut bytes = vec![0; length];
                // A panic while the lock was held cannot have left the file in a state that the seek does not reset.
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(offset))?;
                file.read_exact(&mut bytes)?;
                Ok(bytes)
            }
        }
    }

    /// Reads from the start.
    pub fn reader(&self) -> impl Read + '_ {
        io::BufReader::with_capacity(1 << 20, Cursor { blob: self, position: 0 })
    }
}

struct Cursor<'a> {
    blob: &'a Blob,
    position: u64,
}

impl Read for Cursor<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = (buffer.len() as u64).min(self.blob.length - self.position) as usize;
        buffer[..count].copy_from_slice(&self.blob.read(self.position, count)?);
        self.position += count as u64;
        Ok(count)
    }
}
