//! Telling states of a decoder's weights apart, so that nothing computed with one is ever used with another.

use std::sync::atomic::{AtomicU64, Ordering};

use kernels::Precision;

use super::WeightFormat;

/// Names what a decoder generates with: its weights, the precision and format they are packed in, whether its adapter is on. Within a
/// process, decoders with equal names compute equal bits; after any change the name is one that never was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightsId {
    pub(super) values: Values,
    pub(super) precision: Option<Precision>,
    pub(super) format: WeightFormat,
    pub(super) adapter: bool,
}

/// Names the values of all weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Values(u64);

impl Values {
    /// A name not given before.
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}
