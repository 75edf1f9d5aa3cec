//! Weights in memory and in files.
//!
//! Whatever the file, weights have Hugging Face names and layout and are `f32`: [`safetensors`] reads and writes that
//! layout as it is, [`gguf`] dequantises and maps llama.cpp's. A file is opened as a [`Source`], whose values go straight to
//! where they are used: a copy of a model on the way costs more time than reading it.

mod blob;
pub mod gguf;
pub mod safetensors;

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// A dense row-major array.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Sizes, outermost first; linear weights are `[out, in]`.
    pub shape: Vec<usize>,
    /// The product of `shape` elements.
    pub data: Vec<f32>,
}

impl Tensor {
    /// Joins shape and data.
    ///
    /// # Panics
    /// When the number of elements is not the product of the shape.
    pub fn new(shape: Vec<usize>, data: Vec<f32>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "shape {shape:?}");
        Self { shape, data }
    }
}

/// A tensor whose data lie elsewhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorView<'a> {
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// The product of `shape` elements.
    pub data: &'a [f32],
}

impl<'a> From<&'a Tensor> for TensorView<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self { shape: &tensor.shape, data: &tensor.data }
    }
}

impl From<TensorView<'_>> for Tensor {
    fn from(view: TensorView<'_>) -> Self {
        Self::new(view.shape.to_vec(), view.data.to_vec())
    }
}

/// Tensors by Hugging Face name.
pub type Tensors = BTreeMap<String, Tensor>;

/// Weights wherever they are: a table of names and shapes, and the values of one tensor at a time.
pub trait Source: fmt::Debug + Send + Sync {
    /// The shape of every tensor, by its Hugging Face name.
    fn shapes(&self) -> BTreeMap<&str, &[usize]>;

    /// Writes the values of the tensor `name`, which is in the table, to `to`, which has its length.
    ///
    /// # Errors
    /// A file that cannot be read.
    fn read(&self, name: &str, to: &mut [f32]) -> Result<()>;

    /// All of them, in memory.
    ///
    /// # Errors
    /// As [`Source::read`].
    fn tensors(&self) -> Result<Tensors> {
        let read = |(&name, &shape): (&&str, &&[usize])| {
            let mut data = vec![0.0; shape.iter().product()];
            self.read(name, &mut data)?;
            Ok((name.to_owned(), Tensor::new(shape.to_vec(), data)))
        };
        self.shapes().par_iter().map(read).collect()
    }
}

impl Source for Box<dyn Source> {
    fn shapes(&self) -> BTreeMap<&str, &[usize]> {
        (**self).shapes()
    }

    fn read(&self, name: &str, to: &mut [f32]) -> Result<()> {
        (**self).read(name, to)
    }
}

impl Source for Tensors {
    fn shapes(&self) -> BTreeMap<&str, &[usize]> {
        self.iter().map(|(name, tensor)| (name.as_str(), tensor.shape.as_slice())).collect()
    }

    fn read(&self, name: &str, to: &mut [f32]) -> Result<()> {
        let tensor = self.get(name).ok_or_else(|| Error::tensor(name, "missing"))?;
        to.copy_from_slice(&tensor.data);
        Ok(())
    }
}

/// Checks that `weights` are exactly those that `config` calls for, every shape included.
///
/// Two kinds of tensors may be there beside them: a head that equals the embedding it is tied to, as some writers store both,
/// and the rotary frequencies of old checkpoints, which the configuration already gives.
pub fn check(config: &ModelConfig, weights: &dyn Source) -> Result<()> {
    const HEAD: &str = "lm_head.weight";
    const EMBEDDING: &str = "model.embed_tokens.weight";
    let found = weights.shapes();
    let expected = config.tensor_shapes();
    for (name, shape) in &expected {
        match found.get(name.as_str()) {
            None => return Err(Error::tensor(name, "missing")),
            Some(found) if found != shape => {
                return Err(Error::tensor(name, format!("expected shape {shape:?}, found {found:?}")));
            }
            Some(_) => {}
        }
    }
    let known: HashSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    for (&name, shape) in &found {
        let values = |name: &str| {
            let mut values = vec![0.0; shape.iter().product()];
            weights.read(name, &mut values).map(|()| values)
        };
        let tied = name == HEAD && config.tied_head && found.get(EMBEDDING) == Some(shape);
        let allowed = known.contains(name)
            || name.ends_with(".rotary_emb.inv_freq")
            || (tied && values(HEAD)? == values(EMBEDDING)?);
        if !allowed {
            return Err(Error::tensor(name, format!("not part of a {} model of this configuration", config.family)));
        }
    }
    Ok(())
}
