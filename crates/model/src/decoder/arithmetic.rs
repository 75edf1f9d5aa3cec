//! Arithmetic on weights: averages of models, and models beyond the ones that were trained.
//!
//! ```text
//! average        θ = Σ_k s_k θ_k / Σ_k s_k                                  s_k ≥ 0
//! task vectors   θ = θ_0 + Σ_i a_i τ_i,      τ_i = θ_i - θ_0                a_i of either sign
//! ```
//!
//! Model soups (Wortsman et al., arXiv 2203.05482) and weight-averaged reward models (WARM, Ramé et al., arXiv 2401.12187) are averages;
//! task arithmetic (Ilharco et al., arXiv 2212.04089) adds, scales and negates what training did. Every sum is folded in f64, weight by
//! weight in the order of the models, and rounded once.
//!
//! A sum of task vectors is computed as `(1 - Σ a_i) θ_0 + Σ a_i θ_i`. Where the coefficients sum to one it is therefore the average with
//! these shares, and where they pick one model it is that model: the same bits. A weight that is used in two places, as a tied embedding
//! is, exists once and is counted once. Coefficients may differ from block to block: the embedding, the final norm and the heads are one block, each
//! layer is another.

use std::ops::Range;

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::{Decoder, identity};
use crate::error::{Error, Result};

/// Weights that one thread folds at a time.
const CHUNK: usize = 1 << 16;

impl Decoder {
    /// Replaces each weight by its mean over this decoder and `others`, weighted by `shares`, this one's first, which are scaled to a sum of
    /// one. Adapters must have been merged.
    ///
    /// # Errors
    /// A decoder of another shape or with an adapter; shares that are not one a decoder, negative, not finite or all zero.
    pub fn average(&mut self, others: &[Self], shares: &[f64]) -> Result<()> {
        let count = others.len() + 1;
        let total: f64 = shares.iter().sum();
        let usable = shares.iter().all(|share| share.is_finite() && *share >= 0.0) && total.is_finite() && total > 0.0;
        if shares.len() != count || !usable {
            return Err(Error::Invalid(format!("expected {count} shares from 0 up and not all 0, got {shares:?}")));
        }
        check_summable(self, others)?;
        self.combine(0..self.layout.len, others, shares, total);
        Ok(())
    }

    /// For each run of weights that lie together, its block and where it lies.
    fn blocks(&self) -> Vec<(usize, Range<usize>)> {
        let block = |name: &str| {
            let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
            layer.and_then(|layer| layer.parse::<usize>().ok()).map_or(0, |layer| layer + 1)
        };
        self.layout.entries.iter().map(|entry| (block(&entry.name), entry.range.clone())).collect()
    }

    /// Replaces each weight in this part of them by the sum of its values in this decoder and `others`, times `coefficients`, over `divisor`.
    /// Models whose coefficient is 0 take no part.
    fn combine(&mut self, part: Range<usize>, others: &[Self], coefficients: &[f64], divisor: f64) {
        let weighted = |(model, coefficient): (usize, &f64)| (*coefficient != 0.0).then_some((model, *coefficient));
        let terms: Vec<(usize, f64)> = coefficients.iter().enumerate().filter_map(weighted).collect();
        let first = part.start;
        self.base[part].par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
            for (index, value) in (first + chunk * CHUNK..).zip(values) {
                let of = |model: usize| f64::from(if model == 0 { *value } else { others[model - 1].base[index] });
                let sum =
                    terms.iter().map(|&(model, coefficient)| coefficient * of(model)).reduce(|sum, term| sum + term);
                *value = (sum.unwrap_or(0.0) / divisor) as f32;
            }
        });
        self.base_stale = true;
        self.int8 = None;
        self.values = identity::Values::fresh();
    }
}

/// Refuses decoders whose weights cannot be added.
fn check_summable(first: &Decoder, others: &[Decoder]) -> Result<()> {
    let shapes = first.config.tensor_shapes();
    for (number, other) in (2..).zip(others) {
        if other.config.tensor_shapes() != shapes {
            return Err(Error::Invalid(format!("model {number} has not the shape of the first")));
        }
    }
    if first.adapter.is_some() || others.iter().any(|other| other.adapter.is_some()) {
        return Err(Error::Invalid("a model with an adapter cannot be averaged; merge it first".into()));
    }
    first.check_whole();
    others.iter().for_each(Decoder::check_whole);
    Ok(())
}

/// A model and others that were trained from it. What each of them learnt is its task vector.
pub struct TaskVectors {
    base: Decoder,
    trained: Vec<Decoder>,
}

impl TaskVectors {
    /// The task vectors of `trained`, models that `base` became. Adapters are merged: what is added up is the product `B A` that an adapter
    /// stands for, since the product of sums is not the sum of products.
    ///
    /// # Errors
    /// A model of another shape.
    pub fn new(mut base: Decoder, mut trained: Vec<Decoder>) -> Result<Self> {
        base.merge_adapter();
        trained.iter_mut().for_each(Decoder::merge_adapter);
        check_summable(&base, &trained)?;
        Ok(Self { base, trained })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.trained.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.trained.is_empty()
    }

    /// The model that the others were trained from.
    pub fn base(&self) -> &Decoder {
        &self.base
    }

    /// Blocks that may have coefficients of their own: what lies outside of the layers, then layer after layer.
    pub fn blocks(&self) -> usize {
        1 + self.base.config.layers.len()
    }

    /// `θ_0 + Σ a_i τ_i`, a decoder that has to be prepared. There is one coefficient for each task vector, or one for each in the first block,
    /// then one for each in the second, and so on ([`TaskVectors::blocks`]).
    ///
    /// # Errors
    /// Coefficients that are not finite, or of another number.
    pub fn merged(&self, coefficients: &[f64]) -> Result<Decoder> {
        let (count, blocks) = (self.trained.len(), self.blocks());
        let by_block = coefficients.len() == count * blocks;
        if !(by_block || coefficients.len() == count) || coefficients.iter().any(|a| !a.is_finite()) {
            let expected = format!("expected {count} finite coefficients, or {count} for each of {blocks} blocks");
            return Err(Error::Invalid(format!("{expected}, got {coefficients:?}")));
        }
        let mut merged = self.base.clone();
        let mut combine = |part: Range<usize>, coefficients: &[f64]| {
            let rest = 1.0 - coefficients.iter().sum::<f64>();
            // What rounding leaves of 1 - 0.9 - 0.1 is no share of the base.
            let rest = if rest.abs() < 1e-12 { 0.0 } else { rest };
            merged.combine(part, &self.trained, &[&[rest], coefficients].concat(), 1.0);
        };
        match by_block {
            false => combine(0..self.base.layout.len, coefficients),
            true => {
                let parts = self.base.blocks().into_iter();
                parts.for_each(|(block, part)| combine(part, &coefficients[block * count..][..count]));
            }
        }
        Ok(merged)
    }
}
