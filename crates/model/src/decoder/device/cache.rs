//! Cached keys and values on the device: one pool of rows, each holding one token's in every layer.
//!
//! A sequence owns rows wherever they are free, so that sequences grow and end without a copy, and one look-up gathers the keys
//! of a whole batch: Kwon et al., "PagedAttention", arXiv 2309.06180, with pages of one token.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Result, Tensor};

/// Rows that a pool begins with.
const FIRST_ROWS: usize = 1024;

/// Keys and values of the tokens of all sequences.
pub struct Pool {
    device: Device,
    layers: usize,
    /// Elements of a key, all heads together.
    width: usize,
    rows: Mutex<Rows>,
}

#[derive(Default)]
struct Rows {
    /// Of each layer, `count × width`.
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    count: usize,
    /// Rows that nobody owns; the next to be given away is the last.
    free: Vec<u32>,
}

impl Pool {
    pub fn new(device: &Device, layers: usize, width: usize) -> Arc<Self> {
        Arc::new(Self { device: device.clone(), layers, width, rows: Mutex::default() })
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        // Whoever panicked held a list of rows that is whole at any time.
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The places of these rows in the form that [`Pool::write`] takes.
    pub fn places(&self, rows: &[u32]) -> Result<Tensor> {
        Tensor::from_slice(rows, (rows.len(), 1), &self.device)?.broadcast_as((rows.len(), self.width))?.contiguous()
    }

    /// Writes keys and values to places of a layer, and returns all of that layer's.
    pub fn write(&self, layer: usize, places: &Tensor, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let rows = self.rows();
        rows.keys[layer].scatter_set(places, keys, 0)?;
        rows.values[layer].scatter_set(places, values, 0)?;
        Ok((rows.keys[layer].clone(), rows.values[layer].clone()))
    }

    /// Takes `count` free rows; the pool grows where there are fewer.
    fn take(&self, count: usize) -> Result<Vec<u32>> {
        let mut rows = self.rows();
        if rows.free.len() < count {
            let wanted = (rows.count + count - rows.free.len()).max(2 * rows.count).max(FIRST_ROWS);
            let grown = |old: Option<&Tensor>| {
                let new = Tensor::zeros((wanted, self.width), DType::F32, &self.device)?;
                old.map_or(Ok(()), |old| new.slice_set(old, 0, 0))?;
                Ok(new)
            };
            let all = |old: &[Tensor]| (0..self.layers).map(|layer| grown(old.get(layer))).collect::<Result<Vec<_>>>();
            (rows.keys, rows.values) = (all(&rows.keys)?, all(&rows.values)?);
            let new = rows.count as u32..wanted as u32;
            rows.free.extend(new.rev());
            rows.count = wanted;
        }
        let kept = rows.free.len() - count;
        Ok(rows.free.split_off(kept))
    }

    /// Takes rows back. When nobody owns any, the memory goes too.
    fn give_back(&self, returned: impl Iterator<Item = u32>) {
        let mut rows = self.rows();
        rows.free.extend(returned);
        if rows.free.len() == rows.count {
            *rows = Rows::default();
        }
    }
}

/// The rows of one run of tokens, in order.
pub struct Slots {
    pool: Arc<Pool>,
    rows: Vec<u32>,
}

impl Slots {
    pub fn new(pool: &Arc<Pool>) -> Self {
        Self { pool: Arc::clone(pool), rows: Vec::new() }
    }

    /// Room for `count` more tokens.
    pub fn extend(&mut self, count: usize) -> Result<()> {
        self.rows.extend(self.pool.take(count)?);
        Ok(())
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        let rest = self.rows.split_off(len.min(self.rows.len()));
        self.pool.give_back(rest.into_iter());
    }

    pub fn rows(&self) -> &[u32] {
        &self.rows
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        self.pool.give_back(self.rows.drain(..));
    }
}
