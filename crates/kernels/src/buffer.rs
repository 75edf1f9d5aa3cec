//! Memory for packed operands: aligned to cache lines, and kept between calls.

use std::cell::RefCell;
use std::fmt;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

const LINE: usize = 16;

/// A growing array of f32 that starts at a cache line.
#[derive(Clone, Default)]
pub(crate) struct Buffer {
    lines: Vec<Line>,
}

impl Buffer {
    /// `len` zeros, rounded up to whole cache lines.
    pub(crate) fn zeros(len: usize) -> Self {
        let mut lines = in_large_pages(Vec::with_capacity(len.div_ceil(LINE)));
        lines.resize(len.div_ceil(LINE), Line([0.0; LINE]));
        Self { lines }
    }

    /// Makes room for `len` elements; what is there already stays, the rest is zero.
    pub(crate) fn grow(&mut self, len: usize) {
        if self.len() < len {
            self.lines.resize(len.div_ceil(LINE), Line([0.0; LINE]));
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.lines.len() * LINE
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        // SAFETY: a `Line` is 16 f32 without padding.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * LINE) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: a `Line` is 16 f32 without padding.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len() * LINE) }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} f32)", self.len())
    }
}

/// `len` zeros, for arrays that live long: in large pages where the system has them.
///
/// A gigabyte in pages of 4 KiB is a quarter of a million page faults when it is first written, and more pages than the
/// processor remembers whenever it is read; pages of 2 MiB are neither.
pub fn zeros(len: usize) -> Vec<f32> {
    in_large_pages(vec![0.0; len])
}

/// Asks for large pages under memory that has not been written to.
fn in_large_pages<T>(memory: Vec<T>) -> Vec<T> {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        const LARGE: usize = 2 << 20;
        let start = (memory.as_ptr() as usize).next_multiple_of(PAGE);
        let end = (memory.as_ptr() as usize + memory.capacity() * size_of::<T>()) / PAGE * PAGE;
        if end.saturating_sub(start) >= LARGE {
            let start = memory.as_ptr().cast::<u8>().wrapping_add(start - memory.as_ptr() as usize);
            // A refusal costs speed alone.
            // SAFETY: the advice changes what backs the pages, not what they hold, and they belong to `memory`.
            let _ = unsafe {
                rustix::mm::madvise(start.cast_mut().cast(), end - start as usize, rustix::mm::Advice::LinuxHugepage)
            };
        }
    }
    memory
}

/// Runs `work` with `N` scratch buffers of this thread, whose contents are unspecified.
///
/// They are taken for the time of the call, so `work` may itself wait for other tasks that ask for scratch.
pub(crate) fn with_scratch<const N: usize, R>(lengths: [usize; N], work: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    thread_local! {
        static FREE: RefCell<Vec<Buffer>> = const { RefCell::new(Vec::new()) };
    }
    let mut buffers: [Buffer; N] = std::array::from_fn(|_| FREE.with_borrow_mut(Vec::pop).unwrap_or_default());
    for (buffer, len) in buffers.iter_mut().zip(lengths) {
        buffer.grow(len);
    }
    let result = work(buffers.each_mut().map(|buffer| buffer.as_mut_slice()));
    // Last in, first out: the same buffer comes back for the same purpose.
    FREE.with_borrow_mut(|free| free.extend(buffers.into_iter().rev()));
    result
}
