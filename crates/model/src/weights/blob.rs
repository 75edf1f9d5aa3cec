//! Bytes at an offset, from a file or from memory.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use base::files::{FileError, io_error};
use rayon::prelude::*;

/// Bytes that a thread reads at a time: they stay in its second-level cache while they become floats.
const CHUNK: usize = 1 << 18;

/// The content of a file, read piece by piece.
#[derive(Debug)]
pub(super) struct Blob {
    content: Content,
    length: u64,
}

#[derive(Debug)]
enum Content {
    File(File),
    Bytes(Vec<u8>),
}

impl Blob {
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let file = File::open(path).map_err(io_error("open", path))?;
        let metadata = file.metadata().map_err(io_error("read", path))?;
        if metadata.is_dir() {
            return Err(io_error("read", path)(io::ErrorKind::IsADirectory.into()));
        }
        Ok(Self { content: Content::File(file), length: metadata.len() })
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
        let mut bytes = vec![0; length];
        self.read_into(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `bytes` from `offset` on.
    fn read_into(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > self.length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match &self.content {
            // Both ends are at most the length of the vector.
            Content::Bytes(content) => bytes.copy_from_slice(&content[offset as usize..][..bytes.len()]),
            Content::File(file) => file.read_exact_at(bytes, offset)?,
        }
        Ok(())
    }

    /// Decodes what lies at `offset` into `to`, some whole blocks at a time and on all threads: `block.0` bytes become `block.1` floats.
    pub fn decode(
        &self,
        offset: u64,
        block: (usize, usize),
        to: &mut [f32],
        decode: impl Fn(&[u8], &mut [f32]) + Sync,
    ) -> io::Result<()> {
        let (bytes, floats) = block;
        let blocks = (CHUNK / bytes).min(to.len() / floats);
        let chunks = to.par_chunks_mut((blocks * floats).max(1)).enumerate();
        chunks.try_for_each_init(
            || vec![0; blocks * bytes],
            |buffer, (index, to)| {
                let buffer = &mut buffer[..to.len() / floats * bytes];
                self.read_into(offset + (index * blocks * bytes) as u64, buffer)?;
                decode(buffer, to);
                Ok(())
            },
        )
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
        self.blob.read_into(self.position, &mut buffer[..count])?;
        self.position += count as u64;
        Ok(count)
    }
}
