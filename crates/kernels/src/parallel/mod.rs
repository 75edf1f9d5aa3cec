//! Sharing out rows between threads. Work that is too small to pay for telling another thread runs where it is.

mod pool;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use pool::Pool;

/// Elements below which a kernel stays on the calling thread.
const SMALL: usize = 1 << 14;

/// Rows of one task, for rows that cost `row` elements of work each.
pub(crate) fn rows_per_task(rows: usize, row: usize) -> usize {
    if rows * row < SMALL { rows.max(1) } else { rows.div_ceil(8 * rayon::current_num_threads()).max(1) }
}

/// Calls `work` for each index below `count`, on all threads if `elements` of work in total are worth it.
pub(crate) fn each(count: usize, elements: usize, work: impl Fn(usize) + Sync + Send) {
    let threads = rayon::current_num_threads();
    if count <= 1 || elements < SMALL || threads == 1 || pool::inside_loop() {
        return (0..count).for_each(work);
    }
    let pool = Pool::global();
    // Another number of threads than the pool's was asked for, or somebody else computes at the same time.
    if pool.threads() != threads || !pool.run(count, &work) {
        (0..count).into_par_iter().with_max_len(1).for_each(work);
    }
}

/// Calls `work` once for each thread's part of the indices below `count`, with the runs of at most `size` neighbours that are still
/// to be done; on all threads if `elements` of work in total are worth it.
///
/// Each thread has a part of its own, through which it goes in order before it takes what is left of the others': so what
/// it asks the memory for ahead is its own, and a thread that is held up holds up nobody.
pub(crate) fn each_part(
    count: usize,
    size: usize,
    elements: usize,
    work: impl Fn(&mut dyn Iterator<Item = Range<usize>>) + Sync + Send,
) {
    let parts = rayon::current_num_threads();
    let part_len = count.div_ceil(parts);
    let taken: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
    each(parts, elements, |own| {
        let mut runs = (own..parts).chain(0..own).flat_map(|part| {
            let end = count.min((part + 1) * part_len);
            let next = &taken[part];
            std::iter::from_fn(move || {
                let start = part * part_len + next.fetch_add(size, Ordering::Relaxed);
                (start < end).then(|| start..end.min(start + size))
            })
        });
        work(&mut runs);
    });
}

/// Calls `work` with each run of [`each_part`].
pub(crate) fn each_run(count: usize, size: usize, elements: usize, work: impl Fn(Range<usize>) + Sync + Send) {
    each_part(count, size, elements, |runs| runs.for_each(&work));
}

/// Calls `work` with each of `items`, on the kernels' own threads: for what is done between products, where the threads of
/// another pool would have to be woken and would get in the way of these. An item should be worth ten microseconds or more.
pub fn on_each<T: Send>(items: &mut [T], work: impl Fn(&mut T) + Sync + Send) {
    let count = items.len();
    let shared = SharedMut::new(items);
    each(count, SMALL, |index| {
        // SAFETY: item `index` belongs to this call alone.
        unsafe { shared.slice(index, 1) }.iter_mut().for_each(&work);
    });
}

/// Calls `work` with the start and the contents of each run of `size` elements of `data` (fewer in the last).
pub(crate) fn each_chunk<T: Send>(data: &mut [T], size: usize, work: impl Fn(usize, &mut [T]) + Sync + Send) {
    let len = data.len();
    let shared = SharedMut::new(data);
    each(len.div_ceil(size), len, |index| {
        let start = index * size;
        // SAFETY: run `index` belongs to this call alone.
        work(start, unsafe { shared.slice(start, size.min(len - start)) });
    });
}

/// A pointer that threads may share because each writes its own part of what it points to.
pub(crate) struct SharedMut<T>(*mut T);

impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<T> {}

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

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::time::Duration;

    use super::*;

    /// Runs a loop that is worth sharing and counts how often each index comes.
    fn counts(count: usize) -> Vec<usize> {
        let seen: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
        each(count, SMALL, |index| {
            seen[index].fetch_add(1, Ordering::Relaxed);
        });
        seen.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_index_comes_once_however_long_the_pause_between_loops() {
        for (round, pause) in [0, 0, 20, 500, 0, 2000].into_iter().cycle().take(600).enumerate() {
            std::thread::sleep(Duration::from_micros(if round % 50 < 6 { pause } else { 0 }));
            assert_eq!(counts(1 + round % 37), vec![1; 1 + round % 37], "round {round}");
        }
    }

    #[test]
    fn every_index_comes_in_one_run() {
        for (count, size) in [(0, 1), (1, 1), (7, 3), (64, 5), (1000, 7)] {
            let seen: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            each_run(count, size, SMALL, |run| {
                assert!(!run.is_empty() && run.len() <= size);
                run.for_each(|index| {
                    seen[index].fetch_add(1, Ordering::Relaxed);
                });
            });
            assert_eq!(seen.into_iter().map(AtomicUsize::into_inner).collect::<Vec<_>>(), vec![1; count]);
        }
    }

    #[test]
    fn every_item_comes_once() {
        let mut items: Vec<usize> = (0..100).collect();
        on_each(&mut items, |item| *item += 1);
        assert_eq!(items, (1..101).collect::<Vec<_>>());
    }

    #[test]
    fn loops_inside_loops_and_beside_loops_end() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let total = AtomicUsize::new(0);
                        each(8, SMALL, |_| {
                            total.fetch_add(counts(5).iter().sum(), Ordering::Relaxed);
                        });
                        assert_eq!(total.into_inner(), 40);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_next_loop_runs() {
        for _ in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| each(16, SMALL, |index| assert_ne!(index, 11, "spoilt"))));
            assert!(result.is_err());
            assert_eq!(counts(16), vec![1; 16]);
        }
    }
}
