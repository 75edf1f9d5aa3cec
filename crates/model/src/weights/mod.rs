//! Weights in memory and in files.
//!
//! Whatever the file, weights have Hugging Face names and layout and are `f32`: [`safetensors`] reads and writes that
//! layout as it is, [`gguf`] dequantises and maps llama.cpp's.

mod blob;
pub mod gguf;
pub mod safetensors;

use std::collections::{BTreeMap, HashSet};

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

/// Checks that `tensors` are exactly those that `config` calls for, every shape included.
///
/// A head stored beside a tied embedding is dropped when it equals it, as some writers store both.
pub fn check(config: &ModelConfig, tensors: &mut Tensors) -> Result<()> {
    const HEAD: &str = "lm_head.weight";
    if config.tied_head && tensors.get(HEAD).is_some_and(|head| Some(head) == tensors.get("model.embed_tokens.weight"))
    {
        tensors.remove(HEAD);
    }
    // Old checkpoints carry the rotary frequencies, which the configuration already gives.
    tensors.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
    let expected = config.tensor_shapes();
    for (name, shape) in &expected {
        match tensors.get(name) {
            None => return Err(Error::tensor(name, "missing")),
            Some(found) if found.shape != *shape => {
                return Err(Error::tensor(name, format!("expected shape {shape:?}, found {:?}", found.shape)));
            }
            Some(_) => {}
        }
    }
    if tensors.len() > expected.len() {
        let known: HashSet<_> = expected.iter().map(|(name, _)| name).collect();
        if let Some(extra) = tensors.keys().find(|name| !known.contains(name)) {
            return Err(Error::tensor(extra, format!("not part of a {} model of this configuration", config.family)));
        }
    }
    Ok(())
}
