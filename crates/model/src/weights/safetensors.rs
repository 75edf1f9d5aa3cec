//! Safetensors, the file format of Hugging Face: one file, or shards under an index.
//!
//! The header is read with the `safetensors` crate's own types, which check that the tensors lie one after the other
//! without gaps; the data is read tensor by tensor, some of it at a time, to where it is used.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use base::files;
use half::{bf16, f16};
use safetensors::tensor::{Dtype as FileDtype, Metadata, TensorInfo};
use serde::Deserialize;

use super::blob::Blob;
use super::{Source, TensorView, Tensors};
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

    /// The floats of `bytes`, as many as `to` holds.
    fn decode(self, bytes: &[u8], to: &mut [f32]) {
        match self {
            Self::F32 => each(bytes, to, f32::from_le_bytes),
            Self::F16 => each(bytes, to, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Self::Bf16 => each(bytes, to, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        }
    }

    fn of_file(dtype: FileDtype, name: &str) -> Result<Self> {
        match dtype {
            FileDtype::F32 => Ok(Self::F32),
            FileDtype::F16 => Ok(Self::F16),
            FileDtype::BF16 => Ok(Self::Bf16),
            other => Err(Error::unsupported(format!("tensor {name} of type {other:?}"), "use F32, F16 or BF16")),
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

/// Tensors in one or several open files.
#[derive(Debug)]
pub struct Safetensors {
    files: Vec<(Option<PathBuf>, Blob)>,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor lies.
#[derive(Debug)]
struct Place {
    file: usize,
    offset: u64,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// Opens a file, or a folder that holds [`FILE`] or [`INDEX`] with its shards.
pub fn open(path: &Path) -> Result<Safetensors> {
    let mut opened = Safetensors { files: Vec::new(), tensors: BTreeMap::new() };
    if !path.is_dir() {
        opened.add_file(path)?;
        return Ok(opened);
    }
    let index = path.join(INDEX);
    match index.is_file() && !path.join(FILE).is_file() {
        true => opened.add_shards(path, &index)?,
        false => drop(opened.add_file(&path.join(FILE))?),
    }
    Ok(opened)
}

/// [`open()`], and reads every tensor.
pub fn read(path: &Path) -> Result<Tensors> {
    open(path)?.tensors()
}

/// Reads every tensor of a file that is in memory.
pub fn from_bytes(bytes: Vec<u8>) -> Result<Tensors> {
    let mut opened = Safetensors { files: Vec::new(), tensors: BTreeMap::new() };
    opened.add(None, Blob::from_bytes(bytes))?;
    opened.tensors()
}

impl Source for Safetensors {
    fn shapes(&self) -> BTreeMap<&str, &[usize]> {
        self.tensors.iter().map(|(name, place)| (name.as_str(), place.shape.as_slice())).collect()
    }

    fn read(&self, name: &str, to: &mut [f32]) -> Result<()> {
        let place = self.tensors.get(name).ok_or_else(|| Error::tensor(name, "missing"))?;
        let (path, blob) = &self.files[place.file];
        let read = blob.decode(place.offset, (place.dtype.bytes(), 1), to, |bytes, to| place.dtype.decode(bytes, to));
        read.map_err(|error| {
            let error = Error::tensor(name, error);
            match path {
                Some(path) => error.in_file(path),
                None => error,
            }
        })
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Safetensors {
    fn add_shards(&mut self, folder: &Path, path: &Path) -> Result<()> {
        let index: Index =
            serde_json::from_slice(&files::read(path)?).map_err(|error| Error::malformed(path.display(), error))?;
        let mut shards: Vec<&String> = index.weight_map.values().collect();
        shards.sort();
        shards.dedup();
        for shard in shards {
            if Path::new(shard).file_name() != Some(shard.as_ref()) {
                return Err(Error::malformed(path.display(), format!("expected a plain file name, found {shard:?}")));
            }
            for name in self.add_file(&folder.join(shard))? {
                match index.weight_map.get(&name) {
                    Some(expected) if expected == shard => {}
                    Some(other) => return Err(Error::tensor(name, format!("in {shard}, but the index says {other}"))),
                    None => return Err(Error::tensor(name, format!("in {shard}, but not in {INDEX}"))),
                }
            }
        }
        match index.weight_map.iter().find(|(name, _)| !self.tensors.contains_key(*name)) {
            Some((name, shard)) => Err(Error::tensor(name, format!("missing from {shard}"))),
            None => Ok(()),
        }
    }

    /// Adds the tensors of a file; returns their names.
    fn add_file(&mut self, path: &Path) -> Result<Vec<String>> {
        self.add(Some(path), Blob::open(path)?).map_err(|error| error.in_file(path))
    }

    fn add(&mut self, path: Option<&Path>, blob: Blob) -> Result<Vec<String>> {
        let (start, header) = read_header(&blob)?;
        let mut names = Vec::new();
        for (name, info) in header.tensors() {
            let dtype = Dtype::of_file(info.dtype, &name)?;
            let offset = start + info.data_offsets.0 as u64;
            let place = Place { file: self.files.len(), offset, dtype, shape: info.shape.clone() };
            self.tensors.insert(name.clone(), place);
            names.push(name);
        }
        self.files.push((path.map(Path::to_owned), blob));
        Ok(names)
    }
}

/// The table of a file, and where its data starts.
fn read_header(blob: &Blob) -> Result<(u64, Metadata)> {
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
    Ok((start, header))
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

fn each<const N: usize>(bytes: &[u8], to: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    for (to, &bytes) in to.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *to = decode(bytes);
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
