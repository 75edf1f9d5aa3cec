//! The key-value header of a GGUF file.

use std::collections::BTreeMap;
use std::io::{self, Read};

use crate::error::{Error, Result};

/// A metadata value. Numbers are widened: one variant serves all widths of a kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `uint8` to `uint64`.
    Unsigned(u64),
    /// `int8` to `int64`.
    Signed(i64),
    /// `float32` and `float64`.
    Float(f64),
    /// `bool`.
    Bool(bool),
    /// `string`.
    Text(String),
    /// An array of integers of any width.
    Integers(Vec<i64>),
    /// An array of floats of either width.
    Floats(Vec<f64>),
    /// An array of booleans.
    Bools(Vec<bool>),
    /// An array of strings.
    Texts(Vec<String>),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) | Self::Signed(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a bool",
            Self::Text(_) => "a string",
            Self::Integers(_) => "an array of integers",
            Self::Floats(_) => "an array of floats",
            Self::Bools(_) => "an array of bools",
            Self::Texts(_) => "an array of strings",
        }
    }
}

/// The metadata of a GGUF file, by key.
///
/// The typed getters give `None` for an absent key and an error that names the key when it has another type.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(pub BTreeMap<String, Value>);

impl Metadata {
    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        view: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.0.get(key) else {
            return Ok(None);
        };
        match view(value) {
            Some(typed) => Ok(Some(typed)),
            None => Err(Error::malformed(key, format!("expected {expected}, found {}", value.kind()))),
        }
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A non-negative integer of any width.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a non-negative integer", |value| match *value {
            Value::Unsigned(number) => Some(number),
            Value::Signed(number) => number.try_into().ok(),
            _ => None,
        })
    }

    /// A token id.
    pub fn token(&self, key: &str) -> Result<Option<u32>> {
        match self.unsigned(key)? {
            None => Ok(None),
            Some(id) => (u32::try_from(id).map(Some))
                .map_err(|_| Error::malformed(key, format!("expected a token id, found {id}"))),
        }
    }

    /// A float of either width.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a float", |value| match *value {
            Value::Float(number) => Some(number),
            _ => None,
        })
    }

    /// A boolean.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |value| match *value {
            Value::Bool(flag) => Some(flag),
            _ => None,
        })
    }

    /// An array of strings.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Texts(texts) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// An array of integers.
    pub fn integers(&self, key: &str) -> Result<Option<&[i64]>> {
        self.typed(key, "an array of integers", |value| match value {
            Value::Integers(numbers) => Some(numbers.as_slice()),
            _ => None,
        })
    }

    /// An array of floats.
    pub fn floats(&self, key: &str) -> Result<Option<&[f64]>> {
        self.typed(key, "an array of floats", |value| match value {
            Value::Floats(numbers) => Some(numbers.as_slice()),
            _ => None,
        })
    }

    /// The error for a key that must be there.
    pub fn missing(key: &str) -> Error {
        Error::malformed(key, "missing from the metadata")
    }
}

/// Reads little-endian values in order and refuses whatever cannot fit in the bytes that are left, before allocating.
pub(super) struct Reader<R> {
    inner: R,
    position: u64,
    length: u64,
}

impl<R: Read> Reader<R> {
    /// Reads from the start of `length` bytes.
    pub fn new(inner: R, length: u64) -> Self {
        Self { inner, position: 0, length }
    }

    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    fn error(&self, reason: impl std::fmt::Display) -> Error {
        Error::malformed(format!("byte {}", self.position), reason)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.claim(1, N as u64, "value")?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        match self.inner.read_exact(bytes) {
            Ok(()) => {
                self.position += bytes.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(self.error("the file ends early")),
            Err(error) => Err(self.error(error)),
        }
    }

    /// Checks that `count` items of at least `size` bytes each can follow.
    pub fn claim(&self, count: u64, size: u64, what: &str) -> Result<usize> {
        let left = self.length - self.position;
        match count.checked_mul(size) {
            Some(bytes) if bytes <= left => {
                usize::try_from(count).map_err(|_| self.error(format!("{count} {what}s do not fit in memory")))
            }
            _ => Err(self.error(format!("the file ends early: {count} {what}(s) claimed, {left} bytes left"))),
        }
    }

    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    pub fn text(&mut self) -> Result<String> {
        let length = self.u64()?;
        let mut bytes = vec![0; self.claim(length, 1, "byte")?];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|error| self.error(format!("a string that is not UTF-8: {error}")))
    }

    fn flag(&mut self) -> Result<bool> {
        match self.take::<1>()?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.error(format!("expected a bool (0 or 1), found {other}"))),
        }
    }

    fn unsigned(&mut self, kind: u32) -> Result<u64> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.take()?).into(),
            2 => u16::from_le_bytes(self.take()?).into(),
            4 => u32::from_le_bytes(self.take()?).into(),
            _ => u64::from_le_bytes(self.take()?),
        })
    }

    fn signed(&mut self, kind: u32) -> Result<i64> {
        Ok(match kind {
            1 => i8::from_le_bytes(self.take()?).into(),
            3 => i16::from_le_bytes(self.take()?).into(),
            5 => i32::from_le_bytes(self.take()?).into(),
            _ => i64::from_le_bytes(self.take()?),
        })
    }

    fn float(&mut self, kind: u32) -> Result<f64> {
        Ok(match kind {
            6 => f32::from_le_bytes(self.take()?).into(),
            _ => f64::from_le_bytes(self.take()?),
        })
    }

    /// A value with its type in front.
    pub fn value(&mut self) -> Result<Value> {
        let kind = self.u32()?;
        Ok(match kind {
            0 | 2 | 4 | 10 => Value::Unsigned(self.unsigned(kind)?),
            1 | 3 | 5 | 11 => Value::Signed(self.signed(kind)?),
            6 | 12 => Value::Float(self.float(kind)?),
            7 => Value::Bool(self.flag()?),
            8 => Value::Text(self.text()?),
            9 => return self.array(),
            _ => return Err(self.error(format!("unknown value type {kind}"))),
        })
    }

    fn array(&mut self) -> Result<Value> {
        let kind = self.u32()?;
        let count = self.u64()?;
        let smallest = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(self.error("arrays of arrays are not used by any model")),
            _ => return Err(self.error(format!("unknown array type {kind}"))),
        };
        let count = self.claim(count, smallest, "array element")?;
        Ok(match kind {
            0 | 2 | 4 | 10 => Value::Integers(self.repeat(count, |reader| {
                let number = reader.unsigned(kind)?;
                i64::try_from(number).map_err(|_| reader.error(format!("array element {number} is out of range")))
            })?),
            6 | 12 => Value::Floats(self.repeat(count, |reader| reader.float(kind))?),
            7 => Value::Bools(self.repeat(count, Self::flag)?),
            8 => Value::Texts(self.repeat(count, Self::text)?),
            _ => Value::Integers(self.repeat(count, |reader| reader.signed(kind))?),
        })
    }

    /// `count` was checked by [`Self::claim`], which bounds the allocation by a small multiple of the file's length.
    fn repeat<T>(&mut self, count: usize, mut read: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(read(self)?);
        }
        Ok(items)
    }
}
