//! The engine: a hand-written decoder over plain slices, for training and for generation.
//!
//! A [`Decoder`] owns the weights. [`Decoder::forward`] turns [`PackedTokens`] into hidden states inside a [`Workspace`];
//! [`Decoder::log_probs`] reads log-probabilities off them; [`Decoder::backward`] turns gradients of those into
//! [`Gradients`] of the weights. [`Decoder::prefill`], [`Decoder::decode`] and [`Decoder::extend`] run the same layers over key-value
//! caches.
//! The engine knows no loss.
//!
//! Results do not depend on threads, on the other sequences of a batch or on how a batch is split: every reduction is a
//! left fold over an index of its own sequence, or over tokens in order.

mod adapter;
mod arithmetic;
mod backward;
mod decode;
mod device;
mod estimate;
mod forward;
mod head;
mod identity;
mod kept_logits;
mod layer;
mod linear;
mod non_finite;
mod parameters;
mod score;
mod tape;
mod tokens;
mod workspace;

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use base::{Purpose, Random};
use kernels::{Floats, Precision, RopeTable};
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::weights::{Source, TensorView, Tensors};
use adapter::AdapterState;
use device::OnDevice;
use head::Head;
use layer::Layer;
use linear::Linear;
use parameters::{EMBEDDING, Layout};
use score::Score;

pub use arithmetic::TaskVectors;
pub use decode::{
    DecodeRow, KvCache, PREFILL_ROWS, Prefill, Prompt, Recording, SHARED_FROM, SequenceCache, common_beginning,
};
pub use estimate::Estimate;
pub use head::{LogProbs, LogitRow, Target};
pub use identity::WeightsId;
pub use linear::WeightFormat;
pub use non_finite::NonFinite;
pub use parameters::{Gradients, ParameterInfo};
pub use score::{Blocks, ScoreGradients};
pub use tape::Tape;
pub use tokens::PackedTokens;
pub use workspace::Workspace;

/// The standard deviation of the weights of a random model.
const INITIAL_DEVIATION: f64 = 0.02;

/// A decoder and its weights, with or without an adapter.
#[derive(Clone)]
pub struct Decoder {
    config: ModelConfig,
    layout: Arc<Layout>,
    base: Floats,
    embedding: Range<usize>,
    layers: Vec<Layer>,
    final_norm: Range<usize>,
    /// The language model's head; a classifier has none.
    head: Option<Head>,
    score: Option<Score>,
    tables: Arc<[RopeTable]>,
    adapter: Option<AdapterState>,
    /// The precision of the products.
    precision: Option<Precision>,
    /// Whether the packed copies of the base weights exist and are current.
    base_packed: bool,
    base_stale: bool,
    /// Whether the layers' weights in `base` were never read, see [`Decoder::packed`].
    only_packed: bool,
    adapter_stale: bool,
    /// Changes with every change of a weight.
    values: identity::Values,
    /// The weights that generation reads.
    generation: WeightFormat,
    /// The precision for which the 8-bit weights are current.
    int8: Option<Precision>,
    /// Where passes run, if not here.
    device: Option<OnDevice>,
}

/// What happens to the input embedding of each row, given by number, before the first layer.
pub type EmbeddingChange<'a> = &'a (dyn Fn(usize, &mut [f32]) + Sync);

impl Decoder {
    /// A decoder with the given weights, which are moved into the engine's own layout.
    ///
    /// # Errors
    /// A configuration that contradicts itself; a tensor that is missing, unexpected or of another shape.
    pub fn new(config: ModelConfig, weights: impl Source) -> Result<Self> {
        crate::weights::check(&config, &weights)?;
        let mut decoder = Self::zeros(config)?;
        decoder.read(&weights, |_| true)?;
        Ok(decoder)
    }

    /// A decoder that generates and scores, but can be neither trained nor changed nor written: the weights of its layers'
    /// products go straight from where they lie into their packed form for `precision`, without the copy in f32 that
    /// training needs. That takes half of the memory, or less, and of the time.
    ///
    /// It is prepared for this precision with full weights. [`Decoder::attach_lora`] and [`Decoder::load_adapter`] work as
    /// ever; what needs the weights themselves panics, and backward passes are refused.
    ///
    /// # Errors
    /// As [`Decoder::new`].
    pub fn packed(config: ModelConfig, weights: impl Source, precision: Precision) -> Result<Self> {
        crate::weights::check(&config, &weights)?;
        // Between the embedding and what it holds besides, norms and biases, lie the weights that it does not.
        let mut decoder = Self::with_base(config, Floats::sparse)?;
        decoder.base.want_large_pages(decoder.embedding.clone());
        let linears = decoder.layers.iter_mut().flat_map(Layer::linears_mut);
        linears.collect::<Vec<_>>().into_par_iter().try_for_each(|linear| linear.pack_from(precision, &weights))?;
        let packed: HashSet<String> =
            decoder.layers.iter().flat_map(Layer::linears).flat_map(|linear| linear.weights()).collect();
        decoder.read(&weights, |name| !packed.contains(name))?;
        if let Some(head) = &mut decoder.head {
            head.pack(precision, &decoder.base);
        }
        decoder.precision = Some(precision);
        (decoder.base_packed, decoder.base_stale, decoder.only_packed) = (true, false, true);
        Ok(decoder)
    }

    /// A copy, prepared for `precision`, of a model that is only compared with: it scores and generates as this one does, and holds
    /// no more than [`Decoder::packed`]. On a device, or with an adapter, it is a whole copy.
    ///
    /// # Errors
    /// None that this decoder would not have had.
    pub fn packed_copy(&self, precision: Precision) -> Result<Self> {
        if self.device.is_some() || self.adapter.is_some() || self.only_packed {
            let mut copy = self.clone();
            copy.prepare(precision);
            return Ok(copy);
        }
        Self::packed(self.config.clone(), OwnWeights { layout: &self.layout, base: &self.base }, precision)
    }

    /// Reads the base weights whose names are `wanted`.
    fn read(&mut self, weights: &impl Source, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let mut rest = &mut self.base[..];
        let places = self.layout.entries.iter().map(|entry| {
            let place;
            (place, rest) = std::mem::take(&mut rest).split_at_mut(entry.range.len());
            (entry, place)
        });
        let places: Vec<_> = places.filter(|(entry, _)| wanted(&entry.name)).collect();
        places.into_par_iter().try_for_each(|(entry, place)| weights.read(&entry.name, place))
    }

    /// Stops who is about to read or change weights that are not there.
    fn check_whole(&self) {
        assert!(!self.only_packed, "the decoder was opened to generate: it has its weights in packed form alone");
    }

    /// A decoder with random weights: matrices normal with deviation 0.02, norms one, biases zero.
    ///
    /// # Errors
    /// A configuration that contradicts itself.
    pub fn random(config: ModelConfig, seed: u64) -> Result<Self> {
        let mut decoder = Self::zeros(config)?;
        let random = Random::new(seed, Purpose::Init);
        let norm = 1.0 - decoder.config.norm_weight_offset;
        for (index, entry) in decoder.layout.entries.iter().enumerate() {
            let values = &mut decoder.base[entry.range.clone()];
            if entry.name.contains("norm") {
                values.fill(norm);
            } else if entry.shape.len() > 1 {
                let random = random.prompt(index as u32);
                fill(values, |i| (random.normal(i) * INITIAL_DEVIATION) as f32);
            }
        }
        Ok(decoder)
    }

    fn zeros(config: ModelConfig) -> Result<Self> {
        Self::with_base(config, Floats::zeros)
    }

    /// A decoder whose base parameters, so many zeros, come from `zeros`.
    fn with_base(config: ModelConfig, zeros: fn(usize) -> Floats) -> Result<Self> {
        config.validate()?;
        let d = config.hidden_size;
        let mut layout = Layout::default();
        let embedding = layout.push(EMBEDDING.to_owned(), vec![config.vocab_size, d]);
        let layers = (0..config.layer_count()).map(|index| Layer::new(&mut layout, &config, index)).collect();
        let final_norm = layout.push("model.norm.weight".to_owned(), vec![d]);
        let head = config.has_language_head().then(|| match config.tied_head {
            true => embedding.clone(),
            false => layout.push("lm_head.weight".to_owned(), vec![config.vocab_size, d]),
        });
        let score = config.score.map(|head| Score::new(&mut layout, "", head, d));
        let table = |rope: &crate::config::RopeConfig| {
            RopeTable::new(&rope.inverse_frequencies(config.head_dim), 1.0, config.max_positions)
        };
        Ok(Self {
            tables: config.ropes.iter().map(table).collect(),
            base: zeros(layout.len),
            layout: Arc::new(layout),
            embedding,
            layers,
            final_norm,
            head: head.map(|weight| Head::new(weight, d, config.vocab_size)),
            score,
            adapter: None,
            precision: None,
            base_packed: false,
            base_stale: true,
            only_packed: false,
            adapter_stale: true,
            values: identity::Values::fresh(),
            generation: WeightFormat::Full,
            int8: None,
            device: None,
            config,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Takes over the special tokens of `config`, which is this model's: a decoder may be made before they are known.
    pub fn set_special_tokens(&mut self, config: &ModelConfig) {
        let ModelConfig { bos_token_id, eos_token_ids, pad_token_id, .. } = config;
        (self.config.bos_token_id, self.config.pad_token_id) = (*bos_token_id, *pad_token_id);
        self.config.eos_token_ids.clone_from(eos_token_ids);
    }

    /// A copy of the base weights under their Hugging Face names.
    pub fn tensors(&self) -> Tensors {
        copy(self.views())
    }

    /// The base weights where they lie, under their Hugging Face names.
    pub fn views(&self) -> impl Iterator<Item = (&String, TensorView<'_>)> {
        self.check_whole();
        self.layout.views(&self.base)
    }

    // ---- Parameters ----

    fn trainable(&self) -> &Arc<Layout> {
        self.adapter.as_ref().map_or(&self.layout, |adapter| &adapter.layout)
    }

    /// The trainable parameters in a fixed order: the adapter's if there is one, else all weights.
    pub fn parameters(&self) -> &[ParameterInfo] {
        &self.trainable().entries
    }

    /// The values of parameter `index`.
    pub fn parameter(&self, index: usize) -> &[f32] {
        let whole = || {
            self.check_whole();
            &self.base[..]
        };
        let values = self.adapter.as_ref().map_or_else(whole, |adapter| &adapter.values);
        &values[self.parameters()[index].range.clone()]
    }

    /// The values of parameter `index`, to be changed; [`Decoder::prepare`] must follow.
    pub fn parameter_mut(&mut self, index: usize) -> &mut [f32] {
        let range = self.parameters()[index].range.clone();
        self.values = identity::Values::fresh();
        if self.adapter.is_none() {
            self.check_whole();
        }
        match &mut self.adapter {
            Some(adapter) => {
                self.adapter_stale = true;
                &mut adapter.values[range]
            }
            None => {
                self.base_stale = true;
                self.int8 = None;
                &mut self.base[range]
            }
        }
    }

    /// Zero gradients for the trainable parameters.
    pub fn gradients(&self) -> Gradients {
        Gradients::zeros(self.trainable().clone())
    }

    /// Packs the weights for `precision`, as far as they have changed. This, [`Decoder::prepare_for_training`] or
    /// [`Decoder::prepare_for_generation`] must follow every change of a weight.
    pub fn prepare(&mut self, precision: Precision) {
        if let Some(mut device) = self.device.take() {
            device.prepare(self, precision);
            self.device = Some(device);
            self.precision = Some(precision);
            (self.base_stale, self.adapter_stale, self.generation) = (false, false, WeightFormat::Full);
            return;
        }
        let repack = self.precision != Some(precision);
        if repack || !self.base_packed || self.base_stale {
            self.check_whole();
            for linear in self.layers.iter_mut().flat_map(Layer::linears_mut) {
                linear.pack_base(precision, &self.base);
            }
            if let Some(head) = &mut self.head {
                head.pack(precision, &self.base);
            }
        }
        if let Some(adapter) = self.adapter.as_ref().filter(|_| repack || self.adapter_stale) {
            for linear in self.layers.iter_mut().flat_map(Layer::linears_mut) {
                linear.pack_adapter(precision, &adapter.values);
            }
        }
        self.precision = Some(precision);
        self.base_packed = true;
        self.base_stale = false;
        self.adapter_stale = false;
        self.generation = WeightFormat::Full;
    }

    /// [`Decoder::prepare`] for passes over many rows alone. Weights that are trained change after every few of them, so
    /// these passes pack each weight as they come to it, which takes as long as packing beforehand, and the packed copies of
    /// all weights are given back. Weights under an adapter stay packed. Results are the same to the last bit, but what has
    /// few rows, as generation does, takes several times as long.
    pub fn prepare_for_training(&mut self, precision: Precision) {
        if self.adapter.is_some() || self.device.is_some() {
            return self.prepare(precision);
        }
        self.check_whole();
        self.layers.iter_mut().flat_map(Layer::linears_mut).for_each(Linear::release_base);
        self.head.iter_mut().for_each(Head::release);
        self.precision = Some(precision);
        self.base_packed = false;
        self.base_stale = false;
        self.generation = WeightFormat::Full;
    }

    /// [`Decoder::prepare`] for [`Decoder::prefill`], [`Decoder::decode`], [`Decoder::extend`] and [`Decoder::logits`] with
    /// weights in this format; with [`WeightFormat::Int8`] anything else, which always reads the full weights, packs them as
    /// it goes. The log-probabilities of what is sampled from 8-bit weights are not those that training computes for it.
    pub fn prepare_for_generation(&mut self, precision: Precision, format: WeightFormat) {
        if format == WeightFormat::Full {
            return self.prepare(precision);
        }
        self.prepare_for_training(precision);
        if self.int8 != Some(precision) && self.device.is_none() {
            for linear in self.layers.iter_mut().flat_map(Layer::linears_mut) {
                linear.pack_int8(precision, &self.base);
            }
            if let Some(head) = &mut self.head {
                head.pack_int8(precision, &self.base);
            }
            self.int8 = Some(precision);
        }
        self.generation = format;
    }

    /// The precision the weights are packed for.
    pub fn precision(&self) -> Option<Precision> {
        self.precision
    }

    /// Names what is computed with: anything derived from the weights may be kept as long as this stays the same.
    pub fn weights_id(&self) -> WeightsId {
        WeightsId {
            values: self.values,
            precision: self.precision,
            format: self.generation,
            adapter: self.adapter_is_on(),
        }
    }

    /// Bytes of the packed copies of the weights.
    pub fn packed_bytes(&self) -> usize {
        let linears = self.layers.iter().flat_map(Layer::linears).map(Linear::packed_bytes);
        linears.sum::<usize>() + self.head.as_ref().map_or(0, Head::packed_bytes)
    }

    /// Checks that the packed weights are current.
    fn ready(&self) -> Result<Precision> {
        if self.device.is_some() {
            return Err(Error::unsupported("this on a device", "run it with device = \"cpu\""));
        }
        let stale = self.base_stale || (self.adapter_stale && self.adapter.is_some());
        match self.precision {
            Some(precision) if !stale => Ok(precision),
            _ => Err(not_prepared()),
        }
    }
}

/// The weights of a decoder, as something to read from.
#[derive(Debug)]
struct OwnWeights<'a> {
    layout: &'a Layout,
    base: &'a [f32],
}

impl Source for OwnWeights<'_> {
    fn shapes(&self) -> BTreeMap<&str, &[usize]> {
        self.layout.entries.iter().map(|entry| (entry.name.as_str(), entry.shape.as_slice())).collect()
    }

    fn read(&self, name: &str, to: &mut [f32]) -> Result<()> {
        let entry = self.layout.get(name).ok_or_else(|| Error::tensor(name, "missing"))?;
        to.copy_from_slice(&self.base[entry.range.clone()]);
        Ok(())
    }
}

fn not_prepared() -> Error {
    Error::Invalid("the decoder's weights changed and were not prepared".into())
}

fn nothing_kept() -> Error {
    Error::Invalid("backward needs a forward over the same tokens that kept its activations".into())
}

/// Fills `values` from their indices, on all threads.
fn fill(values: &mut [f32], value: impl Fn(u32) -> f32 + Sync) {
    const CHUNK: usize = 1 << 14;
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        for (offset, slot) in values.iter_mut().enumerate() {
            *slot = value((chunk * CHUNK + offset) as u32);
        }
    });
}

fn copy<'a>(views: impl Iterator<Item = (&'a String, TensorView<'a>)>) -> Tensors {
    views.map(|(name, view)| (name.clone(), view.into())).collect()
}
