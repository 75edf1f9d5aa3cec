//! Sharing out rows between threads. Work that is too small to pay for waking a thread runs where it is.

use rayon::prelude::*;

/// Elements below which a kernel stays on the calling thread.
const SMALL: usize = 1 << 15;

/// Rows of one task, for rows that cost `row` elements of work each.
pub(crate) fn rows_per_task(rows: usize, row: usize) -> usize {
    if rows * row < SMALL { rows.max(1) } else { rows.div_ceil(8 * rayon::current_num_threads()).max(1) }
}

/// Calls `work` for each index below `count`, on all threads if `elements` of work in total are worth it.
pub(crate) fn each(count: usize, elements: usize, work: impl Fn(usize) + Sync + Send) {
    if count <= 1 || elements < SMALL || rayon::current_num_threads() == 1 {
        (0..count).for_each(work);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(work);
    }
}

/// A pointer that threads may share because each writes its own part of what it points to.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T>(*mut T);

// SAFETY: only `SharedMut::slice` and `SharedMut::get` give access, and their callers promise disjoint parts.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(data: &mut [T]) -> Self {
        Self(data.as_mut_ptr())
    }

    pub(crate) fn get(self) -> *mut T {
        self.0
    }

    /// The part of the data at `start`.
    ///
    /// # Safety
    /// The part must lie inside the slice this was made of, which must still be mutably borrowed, and nobody else may use
    /// it while the result lives.
    pub(crate) unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}
