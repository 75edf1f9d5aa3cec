//! Where the time goes: counters that are off unless somebody asks.
//!
//! While nobody does, a counted call costs one relaxed load; counting, it costs two looks at the clock. Results never
//! depend on it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

/// What the calls of one kind took, as seen by the threads that made them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    /// Number of calls.
    pub calls: u64,
    /// Seconds inside them, the waiting for other threads included.
    pub seconds: f64,
    /// Floating-point operations, a multiplication and an addition counting as two; 0 where they are not counted.
    pub operations: f64,
}

/// What a piece of work spent in the kernels that take most of the time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Profile {
    /// Matrix products, with the packing of operands that happens inside them. Operations are `2 m n k`.
    pub products: Share,
    /// Attention, forward, backward and decoding. Operations are not counted here.
    pub attention: Share,
}

/// What is counted.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Product,
    Attention,
}

struct Counter {
    calls: AtomicU64,
    nanoseconds: AtomicU64,
    operations: AtomicU64,
}

impl Counter {
    const fn new() -> Self {
        Self { calls: AtomicU64::new(0), nanoseconds: AtomicU64::new(0), operations: AtomicU64::new(0) }
    }

    fn read(&self) -> [u64; 3] {
        [&self.calls, &self.nanoseconds, &self.operations].map(|count| count.load(Ordering::Relaxed))
    }
}

/// How many profilers count.
static ACTIVE: AtomicUsize = AtomicUsize::new(0);
static COUNTERS: [Counter; 2] = [Counter::new(), Counter::new()];

/// Counts from its start until it is dropped.
///
/// The counters belong to the process: kernels that other threads call meanwhile are counted too.
#[derive(Debug)]
pub struct Profiler {
    before: [[u64; 3]; 2],
}

impl Profiler {
    /// Starts to count.
    pub fn start() -> Self {
        ACTIVE.fetch_add(1, Ordering::Relaxed);
        Self { before: COUNTERS.each_ref().map(Counter::read) }
    }

    /// What was counted since the start.
    pub fn read(&self) -> Profile {
        let share = |kind: Kind| {
            let (before, after) = (self.before[kind as usize], COUNTERS[kind as usize].read());
            let [calls, nanoseconds, operations] = std::array::from_fn(|i| after[i].wrapping_sub(before[i]));
            Share { calls, seconds: nanoseconds as f64 * 1e-9, operations: operations as f64 }
        };
        Profile { products: share(Kind::Product), attention: share(Kind::Attention) }
    }
}

impl Drop for Profiler {
    fn drop(&mut self) {
        ACTIVE.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts one call from here to the end of the result's life.
#[must_use = "a call that ends at once is not measured"]
pub(crate) struct Call {
    kind: Kind,
    operations: u64,
    start: Option<Instant>,
}

impl Call {
    pub(crate) fn start(kind: Kind, operations: usize) -> Self {
        let start = (ACTIVE.load(Ordering::Relaxed) > 0).then(Instant::now);
        Self { kind, operations: operations as u64, start }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(start) = self.start {
            let counter = &COUNTERS[self.kind as usize];
            counter.calls.fetch_add(1, Ordering::Relaxed);
            counter.nanoseconds.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
            counter.operations.fetch_add(self.operations, Ordering::Relaxed);
        }
    }
}
