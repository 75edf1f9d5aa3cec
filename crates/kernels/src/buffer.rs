//! Memory for packed operands: aligned to cache lines, and kept between calls.

use std::alloc::{self, Layout};
use std::cell::RefCell;
use std::fmt;
use std::ops::Range;

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
    /// `len` zeros, rounded up to whole cache lines. Large ones are not written: their pages come when the threads that fill them do.
    pub(crate) fn zeros(len: usize) -> Self {
        let lines = len.div_ceil(LINE);
        let Some(layout) = Layout::array::<Line>(lines).ok().filter(|layout| layout.size() > 0) else {
            return Self::default();
        };
        // SAFETY: the layout is that of a vector of lines, all of whose elements are there, and zero is a number.
        let lines = unsafe {
            let start = alloc::alloc_zeroed(layout).cast::<Line>();
            if start.is_null() {
                alloc::handle_alloc_error(layout);
            }
            Vec::from_raw_parts(start, lines, lines)
        };
        Self { lines: in_large_pages(lines) }
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

/// Has mimalloc, where it is the allocator, keep what is freed. It would give memory back to the system that has been free for a
/// second; but a training step takes seconds, and its next sampling wants the same caches again, page by page.
///
/// To be called before there are other threads.
#[cfg(feature = "mimalloc")]
pub fn keep_freed_memory() {
    /// `mi_option_purge_delay`, which the bindings leave out.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    const NEVER: std::ffi::c_long = -1;
    // SAFETY: this writes one number, which the allocator reads when it next looks.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, NEVER) }
}

/// Many f32 that live long. They are zero until written to, and cost neither time nor memory until then; large arrays are in
/// large pages where the system has them.
///
/// An allocator would hand out memory that was used before, which has to be set to zero by one thread; pages fresh from the
/// system are zero, and each comes when a thread first writes to it.
pub struct Floats(Storage);

enum Storage {
    Allocated(Vec<f32>),
    #[cfg(target_os = "linux")]
    Mapped {
        start: std::ptr::NonNull<f32>,
        len: usize,
    },
}

#[cfg(target_os = "linux")]
// SAFETY: the mapping belongs to its owner alone, like a `Vec`'s memory.
unsafe impl Send for Storage {}
#[cfg(target_os = "linux")]
// SAFETY: as above.
unsafe impl Sync for Storage {}

impl Floats {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut floats = Self::sparse(len);
        floats.want_large_pages(0..len);
        floats
    }

    /// `len` zeros of which few will be written to, here and there: in small pages, because the first write to a page takes all of it.
    pub fn sparse(len: usize) -> Self {
        #[cfg(target_os = "linux")]
        if let Some(mapped) = Storage::map(len) {
            return Self(mapped);
        }
        Self(Storage::Allocated(vec![0.0; len]))
    }

    /// Asks for large pages under a part that has not been written to.
    ///
    /// # Panics
    /// If the part does not lie inside.
    pub fn want_large_pages(&mut self, part: Range<usize>) {
        ask_for_large_pages(self[part].as_ptr_range());
    }
}

#[cfg(target_os = "linux")]
impl Storage {
    /// Below this many bytes an allocator is as good.
    const WORTH_MAPPING: usize = 32 << 20;

    /// A mapping of zeros, where it is worth one and the system gives one.
    fn map(len: usize) -> Option<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let bytes = len.checked_mul(size_of::<f32>()).filter(|&bytes| bytes >= Self::WORTH_MAPPING)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the system chooses a place where nothing is mapped.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE) }.ok()?;
        Some(Self::Mapped { start: std::ptr::NonNull::new(start.cast())?, len })
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        if let Self::Mapped { start, len } = self {
            // SAFETY: the mapping was made with this place and size, and nothing borrows from it any more.
            let _ = unsafe { rustix::mm::munmap(start.as_ptr().cast(), *len * size_of::<f32>()) };
        }
    }
}

impl std::ops::Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Storage::Allocated(values) => values,
            // SAFETY: the mapping is readable, as long as `len` says, and any bits are an f32.
            #[cfg(target_os = "linux")]
            Storage::Mapped { start, len } => unsafe { std::slice::from_raw_parts(start.as_ptr(), *len) },
        }
    }
}

impl std::ops::DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.0 {
            Storage::Allocated(values) => values,
            // SAFETY: as above, and writable.
            #[cfg(target_os = "linux")]
            Storage::Mapped { start, len } => unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), *len) },
        }
    }
}

impl Clone for Floats {
    fn clone(&self) -> Self {
        let mut clone = Self::zeros(self.len());
        clone.copy_from_slice(self);
        clone
    }
}

impl fmt::Debug for Floats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Floats({})", self.len())
    }
}

/// Memory that has not been written to, in large pages.
fn in_large_pages<T>(memory: Vec<T>) -> Vec<T> {
    let start = memory.as_ptr();
    ask_for_large_pages(start..start.wrapping_add(memory.capacity()));
    memory
}

/// Asks for large pages under the whole pages of memory that has not been written to, if they are worth one.
fn ask_for_large_pages<T>(memory: Range<*const T>) {
    #[cfg(target_os = "linux")]
    {
        const LARGE: usize = 2 << 20;
        let page = rustix::param::page_size();
        let start = memory.start.cast::<u8>();
        let start = start.wrapping_add(start.addr().next_multiple_of(page) - start.addr());
        let bytes = (memory.end.addr() / page * page).saturating_sub(start.addr());
        if bytes >= LARGE {
            // A refusal costs speed alone.
            // SAFETY: the advice changes what backs the pages, not what they hold.
            let _ = unsafe { rustix::mm::madvise(start.cast_mut().cast(), bytes, rustix::mm::Advice::LinuxHugepage) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_zero_until_written_whether_they_are_mapped_or_not() {
        for len in [0, 1, 1000, (8 << 20) - 1, 8 << 20, (8 << 20) + 7] {
            let mut floats = Floats::sparse(len);
            floats.want_large_pages(len / 3..len / 2);
            assert!(floats.len() == len && floats.iter().all(|x| *x == 0.0), "{len} zeros");
            floats.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            let clone = floats.clone();
            floats.fill(-1.0);
            assert!(clone.iter().enumerate().all(|(i, x)| *x == i as f32), "a clone of {len} is its own");
        }
    }
}
