//! Safetensors, the file format of Hugging Face: one file, or shards under an index.
//!
//! The header is read with the `safetensors` crate's own types, which check that the tensors lie one after the other
//! without gaps; the data is read tensor by tensor, so that a file's bytes are never all in memory beside its weights.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::Path;

use base::files;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::{Dtype as FileDtype, Metadata, TensorInfo};
use serde::Deserialize;

use super::blob::Blob;
use super::{Tensor, TensorView, Tensors};
use crate::error::{Error, Result};

/// The name of a model's weights in a folder when they are one file.
pub const FILE: &str = "model.safetensors";
/// The name of the index in a folder when they are several.
pub const INDEX: &str = "model.safetensors.index.json";
/// No header is longer; the format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// How floats are stored in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision: exact.
    F32,
    /// IEEE half precision; values beyond ±65504 are refused.
    F16,
    /// The upper half of a single, rounded to the nearest even.
    Bf16,
}

impl Dtype {
    /// The name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    fn in_file(self) -> FileDtype {
        match self {
            Self::F32 => FileDtype::F32,
            Self::F16 => FileDtype::F16,
            Self::Bf16 => FileDtype::BF16,
        }
    }
}

/// The values of a tensor to be written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Values<'a> {
    /// Singles, to be stored as the given type.
    Single(&'a [f32], Dtype),
    /// Bfloat16 as its 16 bits, to be stored as it is.
    Bf16(&'a [u16]),
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Single(values, _) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    fn dtype(&self) -> Dtype {
        match self {
            Self::Single(_, dtype) => *dtype,
            Self::Bf16(_) => Dtype::Bf16,
        }
    }
}

/// Reads every tensor of a file, or of a folder that holds [`FILE`] or [`INDEX`] with its shards.
pub fn read(path: &Path) -> Result<Tensors> {
    if !path.is_dir() {
        return read_blob(&Blob::open(path)?).map_err(|error| error.in_file(path));
    }
    let index = path.join(INDEX);
    if index.is_file() && !path.join(FILE).is_file() { read_shards(path, &index) } else { read(&path.join(FILE)) }
}

/// Reads every tensor of a file that is in memory.
pub fn from_bytes(bytes: Vec<u8>) -> Result<Tensors> {
    read_blob(&Blob::from_bytes(bytes))
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn read_shards(folder: &Path, path: &Path) -> Result<Tensors> {
    let index: Index =
        serde_json::from_slice(&files::read(path)?).map_err(|error| Error::malformed(path.display(), error))?;
    let mut tensors = Tensors::new();
    let mut shards: Vec<&String> = index.weight_map.values().collect();
    shards.sort();
    shards.dedup();
    for shard in shards {
        if Path::new(shard).file_name() != Some(shard.as_ref()) {
            return Err(Error::malformed(path.display(), format!("expected a plain file name, found {shard:?}")));
        }
        for (name, tensor) in read(&folder.join(shard))? {
            match index.weight_map.get(&name) {
                Some(expected) if expected == shard => tensors.insert(name, tensor),
                Some(other) => return Err(Error::tensor(name, format!("in {shard}, but the index says {other}"))),
                None => return Err(Error::tensor(name, format!("in {shard}, but not in {INDEX}"))),
            };
        }
    }
    match index.weight_map.iter().find(|(name, _)| !tensors.contains_key(*name)) {
        Some((name, shard)) => Err(Error::tensor(name, format!("missing from {shard}"))),
        None => Ok(tensors),
    }
}

fn read_blob(blob: &Blob) -> Result<Tensors> {
    let early = |_| Error::malformed("byte 0", format!("the file ends early: {} bytes", blob.len()));
    let length = blob.read(0, 8).map_err(early)?;
    let length = u64::from_le_bytes(length.try_into().unwrap_or_default());
    if length > MAX_HEADER.min(blob.len() - 8) {
        let reason = format!("a header of {length} bytes claimed in a file of {} bytes", blob.len());
        return Err(Error::malformed("byte 0", reason));
    }
    let header = blob.read(8, length as usize).map_err(|error| Error::malformed("header", error))?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|error| Error::malformed("header", error))?;
    let start = 8 + length;
    if start.checked_add(header.data_len() as u64) != Some(blob.len()) {
        let reason = format!("{} bytes claimed after the header, found {}", header.data_len(), blob.len() - start);
        return Err(Error::malformed("data", reason));
    }
    let infos = header.tensors();
    (infos.par_iter()).map(|(name, info)| Ok((name.clone(), read_tensor(blob, start, name, info)?))).collect()
}

fn read_tensor(blob: &Blob, start: u64, name: &str, info: &TensorInfo) -> Result<Tensor> {
    let (from, to) = info.data_offsets;
    let bytes = blob.read(start + from as u64, to - from).map_err(|error| Error::tensor(name, error))?;
    let pair = |pair: &[u8]| [pair[0], pair[1]];
    let data = match info.dtype {
        FileDtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        FileDtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes(pair(b)).to_f32()).collect(),
        FileDtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes(pair(b)).to_f32()).collect(),
        other => return Err(Error::unsupported(format!("tensor {name} of type {other:?}"), "use F32, F16 or BF16")),
    };
    Ok(Tensor::new(info.shape.clone(), data))
}

/// Writes tensors (a [`Tensors`] or views of what lies elsewhere, which is not copied) to one file, in the order of their
/// names. The file is whole or absent, and its bytes depend on nothing but the arguments.
pub fn write<'a, T: Into<TensorView<'a>>>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a String, T)>,
    dtype: Dtype,
) -> Result<()> {
    let values = |(name, tensor): (&'a String, T)| {
        let TensorView { shape, data } = tensor.into();
        (name, shape, Values::Single(data, dtype))
    };
    write_values(path, tensors.into_iter().map(values))
}

/// [`write()`] for tensors of several types, each with its shape.
pub fn write_values<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a String, &'a [usize], Values<'a>)>,
) -> Result<()> {
    let mut tensors: Vec<(&String, &[usize], Values<'a>)> = tensors.into_iter().collect();
    tensors.sort_by_key(|(name, ..)| *name);
    let mut infos = Vec::new();
    let mut end = 0;
    for (name, shape, values) in &tensors {
        let (start, dtype) = (end, values.dtype());
        end += values.len() * dtype.bytes();
        let info = TensorInfo { dtype: dtype.in_file(), shape: shape.to_vec(), data_offsets: (start, end) };
        infos.push(((*name).clone(), info));
        if let Values::Single(values, Dtype::F16) = values
            && let Some(value) = values.iter().find(|value| value.is_finite() && !f16::from_f32(**value).is_finite())
        {
            return Err(Error::tensor(*name, format!("{value} does not fit into float16; write bfloat16 or float32")));
        }
    }
    // transformers refuses files without this entry.
    let origin = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let header = Metadata::new(Some(origin), infos).map_err(|error| Error::malformed(path.display(), error))?;
    let mut header = serde_json::to_vec(&header).map_err(|error| Error::malformed(path.display(), error))?;
    // Data starts at a multiple of 8 bytes.
    header.resize(header.len().next_multiple_of(8), b' ');

    files::write_with(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        tensors.iter().try_for_each(|(.., values)| write_data(file, *values))
    })?;
    Ok(())
}

fn write_data(file: &mut impl Write, values: Values<'_>) -> io::Result<()> {
    match values {
        Values::Single(values, Dtype::F32) => write_each(file, values, f32::to_le_bytes),
        Values::Single(values, Dtype::F16) => write_each(file, values, |value| f16::from_f32(value).to_le_bytes()),
        Values::Single(values, Dtype::Bf16) => write_each(file, values, |value| bf16::from_f32(value).to_le_bytes()),
        Values::Bf16(values) => write_each(file, values, u16::to_le_bytes),
    }
}

fn write_each<T: Copy, const N: usize>(
    file: &mut impl Write,
    values: &[T],
    encode: impl Fn(T) -> [u8; N],
) -> io::Result<()> {
    let mut bytes = Vec::new();
    for chunk in values.chunks(1 << 16) {
        bytes.clear();
        chunk.iter().for_each(|value| bytes.extend(encode(*value)));
        file.write_all(&bytes)?;
    }
    Ok(())
}
