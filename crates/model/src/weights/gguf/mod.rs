//! GGUF, the file format of llama.cpp (versions 2 and 3).
//!
//! A file is a header, key-value metadata, a table of tensors and their data, little-endian throughout
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>). Nothing in a file is trusted: counts and lengths are
//! checked against the bytes that are left before anything is allocated, tensors must lie inside the file and apart
//! from each other, and products of sizes must not overflow. [`Gguf::load`] gives the model in Hugging Face's terms.

mod architecture;
mod block;
mod metadata;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::blob::Blob;
use super::{Source, Tensor, Tensors};
use crate::config::ModelConfig;
use crate::error::{Error, Result};

pub use block::BlockType;
use metadata::Reader;
pub use metadata::{Metadata, Value};

/// An open GGUF file: its metadata and the table of its tensors. Tensor data stays in the file until it is asked for.
#[derive(Debug)]
pub struct Gguf {
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    blob: Blob,
}

/// An entry of the table of tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// The name in llama.cpp's scheme, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Sizes, outermost first (the file has them innermost first).
    pub shape: Vec<usize>,
    /// How the weights are stored.
    pub block_type: BlockType,
    /// First byte, from the start of the file.
    offset: u64,
    /// Bytes.
    size: usize,
}

/// Opens a GGUF file and reads its header.
pub fn read(path: &Path) -> Result<Gguf> {
    Gguf::from_blob(Blob::open(path)?).map_err(|error| error.in_file(path))
}

impl Gguf {
    /// Reads the header of a GGUF file that is in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::from_blob(Blob::from_bytes(bytes))
    }

    fn from_blob(blob: Blob) -> Result<Self> {
        let mut reader = Reader::new(blob.reader(), blob.len());
        let magic = reader.u32()?.to_le_bytes();
        if &magic != b"GGUF" {
            return Err(Error::malformed("byte 0", format!("expected the magic \"GGUF\", found {magic:02x?}")));
        }
        match reader.u32()? {
            2 | 3 => {}
            version if version.swap_bytes() <= 3 => {
                return Err(Error::unsupported("a big-endian GGUF file", "convert it to little-endian"));
            }
            version => {
                return Err(Error::unsupported(format!("GGUF version {version}"), "versions 2 and 3 can be read"));
            }
        }
        let tensor_count = reader.u64()?;
        let metadata_count = reader.u64()?;

        // A key takes at least 8 bytes of length, 4 of type and 1 of value.
        let mut metadata = Metadata::default();
        for _ in 0..reader.claim(metadata_count, 13, "metadata entry")? {
            let key = reader.text()?;
            let value = reader.value().map_err(|error| at_key(error, &key))?;
            if metadata.0.insert(key.clone(), value).is_some() {
                return Err(Error::malformed(key, "the key appears twice"));
            }
        }
        let alignment = metadata.unsigned("general.alignment")?.unwrap_or(32);
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            return Err(Error::malformed("general.alignment", format!("expected a power of two, found {alignment}")));
        }

        // An entry takes at least 8 bytes of name length, 4 of dimension count, 8 of one dimension, 4 and 8.
        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        for _ in 0..reader.claim(tensor_count, 32, "tensor")? {
            let tensor = tensor_info(&mut reader)?;
            if !names.insert(tensor.name.clone()) {
                return Err(Error::tensor(tensor.name, "appears twice"));
            }
            tensors.push(tensor);
        }
        let start = reader.position().next_multiple_of(alignment);
        drop(reader);
        place(&mut tensors, start, alignment, blob.len())?;
        Ok(Self { metadata, tensors, blob })
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The table of tensors, in the order of the file.
    pub fn tensor_infos(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Reads and dequantises one tensor of [`Self::tensor_infos`], as it is in the file.
    pub fn tensor(&self, info: &TensorInfo) -> Result<Tensor> {
        let mut data = vec![0.0; info.shape.iter().product()];
        self.dequantise(info, &mut data)?;
        Ok(Tensor::new(info.shape.clone(), data))
    }

    fn dequantise(&self, info: &TensorInfo, to: &mut [f32]) -> Result<()> {
        let block = (info.block_type.bytes(), info.block_type.weights());
        let read = self.blob.decode(info.offset, block, to, |bytes, to| info.block_type.dequantise(bytes, to));
        read.map_err(|error| Error::tensor(&info.name, error))
    }

    /// The model's configuration, from the metadata and the table of tensors.
    pub fn config(&self) -> Result<ModelConfig> {
        architecture::config(self)
    }

    /// The configuration, and every weight dequantised, in Hugging Face names and layout, checked against each other.
    pub fn load(self) -> Result<(ModelConfig, Tensors)> {
        let weights = self.weights()?;
        let tensors = weights.tensors()?;
        Ok((weights.config, tensors))
    }

    /// The configuration and the weights, in Hugging Face names and layout, checked against each other.
    pub fn weights(self) -> Result<Weights> {
        let config = self.config()?;
        let mut names = BTreeMap::new();
        for (index, info) in self.tensors.iter().enumerate() {
            if let Some(name) = architecture::hugging_face_name(config.family, info)? {
                names.insert(name, index);
            }
        }
        let weights = Weights { gguf: self, config, names };
        super::check(&weights.config, &weights)?;
        Ok(weights)
    }
}

/// The weights of a GGUF file in Hugging Face's terms.
#[derive(Debug)]
pub struct Weights {
    gguf: Gguf,
    /// The model's configuration.
    pub config: ModelConfig,
    /// Hugging Face names, and places in the table of tensors.
    names: BTreeMap<String, usize>,
}

impl Weights {
    /// The file.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }
}

impl Source for Weights {
    fn shapes(&self) -> BTreeMap<&str, &[usize]> {
        let tensors = &self.gguf.tensors;
        self.names.iter().map(|(name, &index)| (name.as_str(), tensors[index].shape.as_slice())).collect()
    }

    fn read(&self, name: &str, to: &mut [f32]) -> Result<()> {
        let index = *self.names.get(name).ok_or_else(|| Error::tensor(name, "missing"))?;
        let info = &self.gguf.tensors[index];
        self.gguf.dequantise(info, to)?;
        architecture::undo_conversion(&self.config, name, info.shape[0], to)
    }
}

/// Adds the key to an error inside its value.
fn at_key(error: Error, key: &str) -> Error {
    match error {
        Error::Malformed { place, reason } => Error::malformed(format!("{key} ({place})"), reason),
        other => other,
    }
}

/// One entry of the table, its offset still relative to the data.
fn tensor_info<R: std::io::Read>(reader: &mut Reader<R>) -> Result<TensorInfo> {
    let name = reader.text()?;
    let dimensions = reader.u32()?;
    if !(1..=4).contains(&dimensions) {
        return Err(Error::tensor(name, format!("expected 1 to 4 dimensions, found {dimensions}")));
    }
    let mut sizes = Vec::new();
    for _ in 0..dimensions {
        sizes.push(reader.u64()?);
    }
    let block_type = BlockType::from_number(reader.u32()?)?;
    let offset = reader.u64()?;

    let row = sizes[0];
    if sizes.contains(&0) || !row.is_multiple_of(block_type.weights() as u64) {
        let reason = format!("rows of {row} are not whole blocks of {block_type:?} ({})", block_type.weights());
        return Err(Error::tensor(name, reason));
    }
    let count = sizes.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
    let size = count
        .and_then(|count| (count / block_type.weights() as u64).checked_mul(block_type.bytes() as u64))
        .and_then(|size| usize::try_from(size).ok());
    let Some(size) = size else {
        return Err(Error::tensor(name, format!("the product of the sizes {sizes:?} overflows")));
    };
    // Each size divides a count that fits.
    let shape = sizes.iter().rev().map(|&size| size as usize).collect();
    Ok(TensorInfo { name, shape, block_type, offset, size })
}

/// Makes offsets absolute and checks that the tensors lie aligned inside the file and do not overlap.
fn place(tensors: &mut [TensorInfo], start: u64, alignment: u64, length: u64) -> Result<()> {
    for tensor in tensors.iter_mut() {
        if !tensor.offset.is_multiple_of(alignment) {
            let reason = format!("its offset {} is not a multiple of the alignment {alignment}", tensor.offset);
            return Err(Error::tensor(&tensor.name, reason));
        }
        let end = tensor.offset.checked_add(start).and_then(|offset| offset.checked_add(tensor.size as u64));
        if end.is_none_or(|end| end > length) {
            let reason = format!(
                "the file ends early: {} bytes at {} of the data claimed, {length} bytes with the data from {start}",
                tensor.size, tensor.offset
            );
            return Err(Error::malformed(format!("tensor {}", tensor.name), reason));
        }
        tensor.offset += start;
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].size as u64 > pair[1].offset {
            return Err(Error::tensor(&pair[1].name, format!("overlaps {}", pair[0].name)));
        }
    }
    Ok(())
}
