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

mod arithmetic;
mod decode;
mod device;
mod estimate;
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

use crate::config::{ModelConfig, ScoreHead};
use crate::error::{Error, Result};
use crate::lora::{LoraConfig, PEFT_PREFIX, peft_key};
use crate::weights::{Source, TensorView, Tensors};
use device::OnDevice;
use head::{Ends, Head, check_temperature};
use layer::{Layer, Pass};
use linear::{Linear, Products};
use parameters::{EMBEDDING, Layout};
use score::Score;
use workspace::{Activations, Kept};

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

#[derive(Clone)]
struct AdapterState {
    config: LoraConfig,
    layout: Arc<Layout>,
    values: Vec<f32>,
    /// The score head that is trained with the adapter, in place of the base's.
    score: Option<Score>,
    on: bool,
}

impl Products<'_> {
    /// Whether the base weights are what is trained.
    fn trains_base(&self) -> bool {
        self.adapter.is_none()
    }
}

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

    // ---- Score head ----

    /// Adds a score head with weights drawn from a normal distribution of this deviation (0: all zero) and a bias of zero.
    /// A head that scores sequences or tokens takes the place of the language model's.
    ///
    /// # Errors
    /// A head that is none, or one on top of another; a decoder with an adapter, whose part the head would have to be.
    pub fn add_score(&mut self, head: ScoreHead, deviation: f64, seed: u64) -> Result<()> {
        if self.config.score.is_some() || self.adapter.is_some() {
            let what = if self.adapter.is_some() { "an adapter" } else { "a score head" };
            return Err(Error::Invalid(format!("a score head cannot be added to a decoder that has {what} already")));
        }
        self.check_whole();
        let mut decoder = Self::zeros(ModelConfig { score: Some(head), ..self.config.clone() })?;
        for entry in &decoder.layout.entries {
            let values = &mut decoder.base[entry.range.clone()];
            if let Some(own) = self.layout.get(&entry.name) {
                values.copy_from_slice(&self.base[own.range.clone()]);
            } else if entry.shape.len() > 1 {
                let random = Random::new(seed, Purpose::Init).step(2);
                fill(values, |i| (random.normal(i) * deviation) as f32);
            }
        }
        decoder.device = self.device.take();
        *self = decoder;
        Ok(())
    }

    /// Leaves the first of the score head's outputs and drops the others; the adapter's copy of the head, if there is one, likewise.
    ///
    /// # Errors
    /// A decoder without a score head.
    pub fn keep_first_score(&mut self) -> Result<()> {
        let head = self.config.score.ok_or_else(no_score_head)?;
        self.check_whole();
        let adapter = self.adapter_config().cloned().zip(Some(self.adapter_tensors()));
        let mut decoder =
            Self::zeros(ModelConfig { score: Some(ScoreHead { outputs: 1, ..head }), ..self.config.clone() })?;
        for entry in &decoder.layout.entries {
            let Some(own) = self.layout.get(&entry.name) else { continue };
            // The rows of the head's tensors are its outputs.
            let own = &self.base[own.range.clone()];
            decoder.base[entry.range.clone()].copy_from_slice(&own[..entry.range.len()]);
        }
        decoder.device = self.device.take();
        if let Some((config, mut tensors)) = adapter {
            for (name, tensor) in &mut tensors {
                if name.contains("score.") {
                    tensor.data.truncate(tensor.data.len() / head.outputs);
                    tensor.shape[0] = 1;
                }
            }
            decoder.load_adapter(&config, tensors)?;
        }
        *self = decoder;
        Ok(())
    }

    /// The weights of the score head that counts, outputs × width of the hidden states.
    ///
    /// # Errors
    /// A decoder without a score head.
    pub fn score_weight(&self) -> Result<&[f32]> {
        let (score, values) = self.score()?;
        Ok(score.weight(values))
    }

    /// Adds a gradient of [`Decoder::score_weight`], of a loss of the weights themselves, to `gradients`.
    ///
    /// # Errors
    /// A decoder without a score head; a gradient of another length; an adapter that is switched off.
    pub fn add_score_weight_gradient(&self, gradient: &[f32], gradients: &mut Gradients) -> Result<()> {
        self.check_adapter_is_on()?;
        self.score()?.0.add_weight_gradient(gradient, gradients)
    }

    /// The score head that counts, with the storage it lies in: the adapter's while the adapter is on.
    fn score(&self) -> Result<(&Score, &[f32])> {
        let adapted = self.adapter.as_ref().filter(|adapter| adapter.on);
        let adapted = adapted.and_then(|adapter| Some((adapter.score.as_ref()?, &adapter.values[..])));
        let own = || self.score.as_ref().map(|score| (score, &self.base[..]));
        adapted.or_else(own).ok_or_else(no_score_head)
    }

    fn language_head(&self) -> Result<&Head> {
        let missing = || Error::Invalid("the model has no language-model head: it scores and does not write".into());
        self.head.as_ref().ok_or_else(missing)
    }

    /// The outputs of the score head at the given rows, ascending, of the last forward or decode: rows × outputs.
    ///
    /// # Errors
    /// A model without such a head, weights that are not prepared, rows outside the batch or out of order, and the first
    /// score that is not finite.
    pub fn scores(&self, workspace: &Workspace, rows: &[usize]) -> Result<Vec<f32>> {
        self.scores_of(workspace, rows, |score, values| Ok(score.forward(values, &workspace.hidden, rows)))
    }

    /// One block of the outputs of the score head at each of the given rows, with the bits that [`Decoder::scores`] gives it: rows × width.
    ///
    /// # Errors
    /// As [`Decoder::scores`], and blocks that the head does not have.
    pub fn block_scores(&self, workspace: &Workspace, rows: &[usize], blocks: Blocks<'_>) -> Result<Vec<f32>> {
        self.scores_of(workspace, rows, |score, values| {
            score.check_blocks(rows, blocks)?;
            Ok(score.forward_blocks(values, &workspace.hidden, rows, blocks))
        })
    }

    fn scores_of(
        &self,
        workspace: &Workspace,
        rows: &[usize],
        forward: impl FnOnce(&Score, &[f32]) -> Result<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        match &self.device {
            Some(device) => device.check_ready(self)?,
            None => drop(self.ready()?),
        }
        let (score, values) = self.score()?;
        score::check_rows(rows, workspace.rows)?;
        let scores = forward(score, values)?;
        match NonFinite::find(None, "score", &scores, scores.len() / rows.len().max(1)) {
            Some(found) => Err(NonFinite { row: rows[found.row], ..found }.into()),
            None => Ok(scores),
        }
    }

    // ---- Adapters ----

    /// Adds a fresh adapter, which changes nothing yet, and makes it what is trained.
    ///
    /// # Errors
    /// An adapter that is none, of layers that the model lacks, or on top of another.
    pub fn attach_lora(&mut self, config: &LoraConfig, seed: u64) -> Result<()> {
        config.validate()?;
        config.check_layers(self.layers.len())?;
        if self.adapter.is_some() {
            return Err(Error::Invalid("the decoder already has an adapter; merge it first".into()));
        }
        let mut layout = Layout::default();
        let adapted = |name: &str| config.target_modules.iter().any(|module| name.ends_with(module.name()));
        let chosen = self.layers.iter_mut().enumerate().filter(|(index, _)| config.adapts(*index));
        for linear in chosen.flat_map(|(_, layer)| layer.linears_mut()) {
            linear.attach(&mut layout, config.r, config.scale(), adapted, peft_key);
        }
        // As PEFT's `modules_to_save`: a copy of the head is trained, and saved with the adapter.
        let score = self.config.score.map(|head| Score::new(&mut layout, PEFT_PREFIX, head, self.config.hidden_size));
        let mut values = vec![0.0; layout.len];
        if let (Some(own), Some(base)) = (&score, &self.score) {
            values[own.range()].copy_from_slice(&self.base[base.range()]);
        }
        let random = Random::new(seed, Purpose::Init).step(1);
        for (index, entry) in layout.entries.iter().enumerate().filter(|(_, entry)| entry.name.contains("lora_A")) {
            let bound = 1.0 / (entry.shape[1] as f64).sqrt();
            let random = random.prompt(index as u32);
            fill(&mut values[entry.range.clone()], |i| ((2.0 * random.at(i).uniform() - 1.0) * bound) as f32);
        }
        self.adapter = Some(AdapterState { config: config.clone(), layout: Arc::new(layout), values, score, on: true });
        self.adapter_stale = true;
        self.values = identity::Values::fresh();
        Ok(())
    }

    /// Adds the adapter of `config` with the values of a PEFT file.
    ///
    /// # Errors
    /// As [`Decoder::attach_lora`]; a tensor that is missing, unexpected or of another shape.
    pub fn load_adapter(&mut self, config: &LoraConfig, mut tensors: Tensors) -> Result<()> {
        self.attach_lora(config, 0)?;
        let loaded = self.adapter.as_mut().map_or(Ok(()), |adapter| {
            for entry in &adapter.layout.entries {
                let tensor = tensors.remove(&entry.name).ok_or_else(|| Error::tensor(&entry.name, "missing"))?;
                if tensor.shape != entry.shape {
                    let reason = format!("expected shape {:?}, found {:?}", entry.shape, tensor.shape);
                    return Err(Error::tensor(&entry.name, reason));
                }
                adapter.values[entry.range.clone()].copy_from_slice(&tensor.data);
            }
            tensors.keys().next().map_or(Ok(()), |extra| Err(Error::tensor(extra, "not part of this adapter")))
        });
        if loaded.is_err() {
            self.drop_adapter();
        }
        loaded
    }

    /// A copy of the adapter's weights under PEFT's names; empty without an adapter.
    pub fn adapter_tensors(&self) -> Tensors {
        copy(self.adapter_views())
    }

    /// The adapter's weights where they lie, under PEFT's names; none without an adapter.
    pub fn adapter_views(&self) -> impl Iterator<Item = (&String, TensorView<'_>)> {
        self.adapter.iter().flat_map(|adapter| adapter.layout.views(&adapter.values))
    }

    /// The adapter's shape, if there is one.
    pub fn adapter_config(&self) -> Option<&LoraConfig> {
        self.adapter.as_ref().map(|adapter| &adapter.config)
    }

    /// Switches the adapter on or off; off is the base model, which serves as the reference policy for free.
    pub fn set_adapter(&mut self, on: bool) {
        if let Some(adapter) = &mut self.adapter {
            adapter.on = on;
        }
    }

    /// Adds the adapter's update to the weights and drops it. The weights are then what is trained.
    pub fn merge_adapter(&mut self) {
        if let Some(adapter) = self.adapter.take() {
            self.check_whole();
            for linear in self.layers.iter_mut().flat_map(Layer::linears_mut) {
                linear.merge(&mut self.base, &adapter.values);
            }
            if let (Some(own), Some(base)) = (&adapter.score, &self.score) {
                self.base[base.range()].copy_from_slice(&adapter.values[own.range()]);
            }
            self.base_stale = true;
            self.int8 = None;
            self.values = identity::Values::fresh();
        }
    }

    /// Whether there is an adapter that takes part in passes.
    fn adapter_is_on(&self) -> bool {
        self.adapter.as_ref().is_some_and(|adapter| adapter.on)
    }

    /// A copy of the base model: the weights that an adapter changes, without it.
    pub fn without_adapter(&self) -> Self {
        let mut base = self.clone();
        base.drop_adapter();
        base
    }

    fn drop_adapter(&mut self) {
        self.adapter = None;
        self.values = identity::Values::fresh();
        for linear in self.layers.iter_mut().flat_map(Layer::linears_mut) {
            linear.adapter = None;
        }
    }

    /// Widths of the adapters' inner products in the four linears of a layer that has some.
    fn low_rank(&self) -> [usize; 4] {
        self.layers[self.lowest_trained()]
            .linears()
            .map(|linear| linear.adapter.as_ref().map_or(0, linear::Adapter::width))
    }

    /// The lowest layer with trained weights.
    fn lowest_trained(&self) -> usize {
        self.adapter.as_ref().map_or(0, |adapter| adapter.config.lowest_layer())
    }

    // ---- Forward ----

    fn products(&self, precision: Precision, format: WeightFormat) -> Products<'_> {
        let adapter = self.adapter.as_ref().filter(|adapter| adapter.on).map(|adapter| &adapter.values[..]);
        Products { precision, format, base: &self.base, adapter }
    }

    /// Runs the decoder over a batch and leaves the hidden states after the final norm in the workspace. With `keep`,
    /// leaves there too what [`Decoder::backward`] needs.
    ///
    /// # Errors
    /// Tokens outside the vocabulary, sequences longer than the context, weights that are not prepared, and the first
    /// value that is not finite.
    pub fn forward(&self, tokens: &PackedTokens, workspace: &mut Workspace, keep: bool) -> Result<()> {
        self.forward_with_embeddings(tokens, workspace, keep, None)
    }

    /// [`Decoder::forward`] with `change` applied to the input embedding of every row after it was looked up and
    /// scaled. Backward takes what `change` adds for a constant.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_with_embeddings(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        keep: bool,
        change: Option<EmbeddingChange<'_>>,
    ) -> Result<()> {
        tokens.check(self.config.vocab_size, self.config.max_positions)?;
        if let Some(device) = &self.device {
            return device.forward(self, tokens, workspace, keep, change);
        }
        workspace.positions = tokens.positions();
        let attend = |layer: &Layer, kept: &mut Activations| layer.attend(tokens.segments(), kept);
        self.run(tokens.ids(), WeightFormat::Full, workspace, keep, change, attend, None)
    }

    /// The stack over rows at `workspace.positions`; `change` sees every row's embedding first, `attend` turns a layer's queries,
    /// keys and values into its attention, and a tape takes in rows: for each pair, the first from here to the second there.
    #[allow(clippy::too_many_arguments, reason = "what forward and generation do differently")]
    fn run(
        &self,
        ids: &[u32],
        format: WeightFormat,
        workspace: &mut Workspace,
        keep: bool,
        change: Option<EmbeddingChange<'_>>,
        mut attend: impl FnMut(&Layer, &mut Activations),
        mut tape: Option<(&mut Tape, &[(usize, usize)])>,
    ) -> Result<()> {
        let precision = self.ready()?;
        if ids.is_empty() {
            return Err(Error::Invalid("the batch is empty".into()));
        }
        let d = self.config.hidden_size;
        workspace.fit(&self.config, ids.len(), self.low_rank(), keep);
        let keeps = workspace.kept;
        let Workspace { positions, stream, layers: kept_layers, scratch, .. } = workspace;
        let embedding = &self.base[self.embedding.clone()];
        for (row, &id) in stream[0].chunks_exact_mut(d).zip(ids) {
            row.copy_from_slice(&embedding[id as usize * d..][..d]);
        }
        if self.config.embedding_scale != 1.0 {
            kernels::scale(&mut stream[0], self.config.embedding_scale);
        }
        if let Some(change) = change {
            stream[0].par_chunks_exact_mut(d).enumerate().for_each(|(row, embedding)| change(row, embedding));
        }
        for layer in &self.layers {
            let around = [keeps.input(layer.index), keeps.input(layer.index + 1)];
            let [input, output] = stream.get_disjoint_mut(around).expect("a layer's input and output are two entries");
            let kept = &mut kept_layers[keeps.activations(layer.index)];
            let pass = Pass { products: self.products(precision, format), positions, table: &self.tables[layer.rope] };
            layer.forward_qkv(pass, input, kept, scratch);
            attend(layer, kept);
            layer.forward_rest(pass, input, output, kept, scratch);
            if kernels::finite(output).is_some()
                && let Some(found) = layer.blame(input, kept, output)
            {
                return Err(found.into());
            }
            if let Some((tape, rows)) = &mut tape {
                tape.take_layer(layer.index, input, kept, rows);
            }
        }
        let norm = &self.base[self.final_norm.clone()];
        let (offset, eps) = (self.config.norm_weight_offset, self.config.eps);
        let input = &stream[keeps.input(self.layers.len())];
        kernels::rms_norm(input, norm, offset, eps, &mut workspace.hidden, &mut workspace.final_inverse_rms);
        if let Some((tape, rows)) = tape {
            tape.take_end(self.layers.len(), [input, &workspace.hidden, &workspace.final_inverse_rms], rows);
        }
        NonFinite::find(None, "final hidden state", &workspace.hidden, d).map_or(Ok(()), |found| Err(found.into()))
    }

    /// The log-probabilities of `targets`, in ascending order of row, under softmax(logits / temperature) of the last
    /// forward; with `want_entropy` also the entropies.
    ///
    /// # Errors
    /// Targets outside the batch or the vocabulary or out of order, a temperature that is not positive, and the first
    /// log-probability that is not finite.
    pub fn log_probs(
        &self,
        workspace: &mut Workspace,
        targets: &[Target],
        temperature: f32,
        want_entropy: bool,
    ) -> Result<LogProbs> {
        let head = self.language_head()?;
        head.check(targets, workspace.rows)?;
        check_temperature(temperature)?;
        if let Some(device) = &self.device {
            return device.log_probs(self, &workspace.hidden, targets, temperature, want_entropy);
        }
        let products = self.products(self.ready()?, WeightFormat::Full);
        head.log_probs(products, &workspace.hidden, targets, temperature, want_entropy, &mut workspace.head)
    }

    /// Hands the logits of `targets`, in ascending order of row, to `visit`: one chunk of rows at a time, from the last
    /// forward. Logits are never all in memory; what `visit` leaves in them is lost.
    ///
    /// # Errors
    /// Targets outside the batch or the vocabulary or out of order; within, the first error of `visit`, which ends the walk.
    pub fn visit_logits<E>(
        &self,
        workspace: &mut Workspace,
        targets: &[Target],
        visit: impl FnMut(Vec<LogitRow<'_>>) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<(), E>> {
        let head = self.language_head()?;
        head.check(targets, workspace.rows)?;
        let Workspace { hidden, head: scratch, .. } = workspace;
        if let Some(device) = &self.device {
            return device.visit(self, hidden, targets, scratch, visit);
        }
        let products = self.products(self.ready()?, WeightFormat::Full);
        Ok(head.visit(products, hidden, targets, scratch, visit))
    }

    // ---- Backward ----

    /// The gradient of `Σ d_log_prob · log_prob + d_entropy · entropy`, added to `gradients`. The workspace must come from
    /// a [`Decoder::forward`] over the same tokens that kept its activations; it is used up.
    ///
    /// Returns the log-probabilities and entropies, which are computed again on the way: with gradients known beforehand, as
    /// in supervised training, no [`Decoder::log_probs`] is needed.
    ///
    /// # Errors
    /// As [`Decoder::log_probs`]; a workspace without activations; an adapter that is switched off; and the first gradient
    /// of an activation that is not finite.
    #[allow(clippy::too_many_arguments, reason = "the two gradients of one head, and where to put the result")]
    pub fn backward(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        targets: &[Target],
        temperature: f32,
        d_log_prob: &[f32],
        d_entropy: Option<&[f32]>,
        gradients: &mut Gradients,
    ) -> Result<LogProbs> {
        let none = ScoreGradients { rows: &[], blocks: None, d_scores: &[] };
        self.backward_with_scores(tokens, workspace, targets, temperature, d_log_prob, d_entropy, none, gradients)
    }

    /// The gradient of `Σ d_scores · score`, added to `gradients`; otherwise as [`Decoder::backward`].
    ///
    /// # Errors
    /// As [`Decoder::scores`] and [`Decoder::backward`].
    pub fn backward_scores(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        scores: ScoreGradients<'_>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        self.backward_heads(tokens, workspace, gradients, |workspace, d_hidden, gradients| {
            self.backward_score_head(workspace, scores, d_hidden, gradients)
        })
    }

    /// [`Decoder::backward`] and [`Decoder::backward_scores`] in one, for a body that two heads share.
    ///
    /// # Errors
    /// As both.
    #[allow(clippy::too_many_arguments, reason = "the gradients of two heads, and where to put the result")]
    pub fn backward_with_scores(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        targets: &[Target],
        temperature: f32,
        d_log_prob: &[f32],
        d_entropy: Option<&[f32]>,
        scores: ScoreGradients<'_>,
        gradients: &mut Gradients,
    ) -> Result<LogProbs> {
        let head = self.language_head()?;
        head.check(targets, workspace.rows)?;
        check_temperature(temperature)?;
        if d_log_prob.len() != targets.len() || d_entropy.is_some_and(|d_entropy| d_entropy.len() != targets.len()) {
            return Err(Error::Invalid(format!("expected one gradient for each of {} targets", targets.len())));
        }
        self.backward_heads(tokens, workspace, gradients, |workspace, d_hidden, gradients| {
            let mut ends = Ends { hidden: &workspace.hidden, d_hidden: &mut *d_hidden, gradients: &mut *gradients };
            let scratch = &mut workspace.head;
            let found = match &self.device {
                Some(device) => device.backward_head(self, targets, temperature, (d_log_prob, d_entropy), &mut ends)?,
                None => {
                    let products = self.products(self.ready()?, WeightFormat::Full);
                    head.backward(products, tokens, targets, temperature, d_log_prob, d_entropy, &mut ends, scratch)?
                }
            };
            self.backward_score_head(workspace, scores, d_hidden, gradients)?;
            Ok(found)
        })
    }

    /// [`Decoder::backward`] for losses of whole distributions: `visit` receives the logits of `targets` one chunk of rows
    /// at a time, as [`Decoder::visit_logits`] would hand them, and replaces every one by the gradient of the loss with
    /// respect to it. The loss of a row may depend on that row and on constants alone, so that no split changes anything.
    ///
    /// # Errors
    /// As [`Decoder::backward`]; within, the first error of `visit`, after which `gradients` hold part of a sum.
    pub fn backward_logits<E>(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        targets: &[Target],
        gradients: &mut Gradients,
        visit: impl FnMut(Vec<LogitRow<'_>>) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<(), E>> {
        let head = self.language_head()?;
        head.check(targets, workspace.rows)?;
        let mut failed = None;
        let done = self.backward_heads(tokens, workspace, gradients, |workspace, d_hidden, gradients| {
            let mut ends = Ends { hidden: &workspace.hidden, d_hidden, gradients };
            let visited = match &self.device {
                Some(device) => device.backward_visit(self, targets, &mut ends, &mut workspace.head, visit)?,
                None => {
                    let products = self.products(self.ready()?, WeightFormat::Full);
                    head.backward_visit(products, tokens, targets, &mut ends, &mut workspace.head, visit)
                }
            };
            visited.map_err(|error| {
                failed = Some(error);
                Error::Invalid("the loss of a chunk of logits failed".into())
            })
        });
        failed.map_or_else(|| done.map(Ok), |error| Ok(Err(error)))
    }

    /// Backward of the heads, which `heads` adds to the gradient of the hidden states, and then of what is below them.
    fn backward_heads<T>(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        gradients: &mut Gradients,
        heads: impl FnOnce(&mut Workspace, &mut [f32], &mut Gradients) -> Result<T>,
    ) -> Result<T> {
        self.check_adapter_is_on()?;
        if self.only_packed {
            return Err(Error::Invalid("a decoder that was opened to generate cannot be trained".into()));
        }
        gradients.expect_logits(self.weights_id(), tokens);
        let mut d_hidden = std::mem::take(&mut workspace.d_hidden);
        d_hidden.clear();
        workspace::resize(&mut d_hidden, workspace.rows * self.config.hidden_size);
        let result = heads(workspace, &mut d_hidden, gradients).and_then(|found| {
            self.backward_hidden(tokens, workspace, &d_hidden, gradients)?;
            Ok(found)
        });
        workspace.d_hidden = d_hidden;
        result
    }

    fn backward_score_head(
        &self,
        workspace: &Workspace,
        scores: ScoreGradients<'_>,
        d_hidden: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        if scores.rows.is_empty() {
            return Ok(());
        }
        let (score, values) = self.score()?;
        score.check(scores, workspace.rows)?;
        score.backward(values, &workspace.hidden, scores, d_hidden, gradients);
        Ok(())
    }

    fn check_adapter_is_on(&self) -> Result<()> {
        match &self.adapter {
            Some(adapter) if !adapter.on => {
                Err(Error::Invalid("backward trains the adapter, which is switched off".into()))
            }
            _ => Ok(()),
        }
    }

    /// The part of [`Decoder::backward`] below the head, from the gradient of [`Workspace::hidden`]: for heads other than
    /// the language model's.
    ///
    /// # Errors
    /// As [`Decoder::backward`].
    pub fn backward_hidden(
        &self,
        tokens: &PackedTokens,
        workspace: &mut Workspace,
        d_hidden: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        self.check_adapter_is_on()?;
        if let Some(device) = &self.device {
            return device.backward_hidden(self, tokens, workspace, d_hidden, gradients);
        }
        let precision = self.ready()?;
        let d = self.config.hidden_size;
        if workspace.kept == Kept::Nothing || workspace.rows != tokens.rows() {
            return Err(nothing_kept());
        }
        // What the layers kept is about to be overwritten.
        let keeps = std::mem::take(&mut workspace.kept);
        workspace.fit_backward(&self.config, self.low_rank());
        let products = self.products(precision, WeightFormat::Full);
        let Workspace { positions, stream, layers: kept_layers, scratch, d_residual, final_inverse_rms, .. } =
            workspace;
        d_residual.fill(0.0);
        let norm = &self.base[self.final_norm.clone()];
        let d_norm = products.trains_base().then(|| gradients.range_mut(&self.final_norm));
        let offset = self.config.norm_weight_offset;
        let final_input = &stream[self.layers.len()];
        kernels::rms_norm_backward(final_input, norm, offset, final_inverse_rms, d_hidden, d_residual, d_norm);
        let lowest = self.lowest_trained();
        for layer in self.layers[lowest..].iter().rev() {
            let pass = Pass { products, positions, table: &self.tables[layer.rope] };
            let (input, kept) = (&stream[layer.index], &mut kept_layers[keeps.activations(layer.index)]);
            if keeps == Kept::Stream {
                layer.recompute(pass, tokens.segments(), input, kept, scratch);
            }
            let input_gradient = layer.index > lowest || products.trains_base();
            layer.backward(pass, tokens.segments(), input, d_residual, kept, scratch, input_gradient, gradients);
            let tensor = "gradient of the layer input";
            if let Some(found) = NonFinite::find(Some(layer.index), tensor, d_residual, d) {
                return Err(found.into());
            }
        }
        if products.trains_base() {
            for segment in tokens.segments() {
                for row in segment.start..segment.start + segment.len {
                    let gradient = &d_residual[row * d..][..d];
                    gradients.add_input_embedding(tokens.ids()[row], gradient, self.config.embedding_scale);
                }
            }
        }
        Ok(())
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

fn no_score_head() -> Error {
    Error::Invalid("the model has no score head".into())
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
