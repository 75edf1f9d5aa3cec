//! The adapter of a decoder: what is trained in place of the base weights, while it is there.

use std::sync::Arc;

use base::{Purpose, Random};

use super::identity::Values;
use super::layer::Layer;
use super::linear::Adapter;
use super::parameters::Layout;
use super::score::Score;
use super::{Decoder, copy, fill};
use crate::error::{Error, Result};
use crate::lora::{LoraConfig, PEFT_PREFIX, peft_key};
use crate::weights::{TensorView, Tensors};

/// An adapter's shape and weights.
#[derive(Clone)]
pub(super) struct AdapterState {
    pub config: LoraConfig,
    pub layout: Arc<Layout>,
    pub values: Vec<f32>,
    /// The score head that is trained with the adapter, in place of the base's.
    pub score: Option<Score>,
    pub on: bool,
}

impl Decoder {
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
        self.values = Values::fresh();
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
            self.values = Values::fresh();
        }
    }

    /// Whether there is an adapter that takes part in passes.
    pub(super) fn adapter_is_on(&self) -> bool {
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
        self.values = Values::fresh();
        for linear in self.layers.iter_mut().flat_map(Layer::linears_mut) {
            linear.adapter = None;
        }
    }

    /// Widths of the adapters' inner products in the four linears of a layer that has some.
    pub(super) fn low_rank(&self) -> [usize; 4] {
        self.layers[self.lowest_trained()].linears().map(|linear| linear.adapter.as_ref().map_or(0, Adapter::width))
    }

    /// The lowest layer with trained weights.
    pub(super) fn lowest_trained(&self) -> usize {
        self.adapter.as_ref().map_or(0, |adapter| adapter.config.lowest_layer())
    }

    /// Checks that what a backward would train takes part in passes.
    pub(super) fn check_adapter_is_on(&self) -> Result<()> {
        match &self.adapter {
            Some(adapter) if !adapter.on => {
                Err(Error::Invalid("backward trains the adapter, which is switched off".into()))
            }
            _ => Ok(()),
        }
    }
}
