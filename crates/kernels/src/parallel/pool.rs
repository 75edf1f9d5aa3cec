//! A team of threads for many short loops.
//!
//! A decoding step is some two hundred parallel loops of a few dozen microseconds each. Waking a sleeping thread costs as much
//! as such a loop, so the helpers of this pool keep looking for the next loop for a moment before they sleep, and
//! the thread that starts a loop works on it too.
//!
//! There is one loop at a time. Its life is told by one word, the gate: a count of loops, whether the last one is still
//! open, and how many helpers are inside. Who starts a loop opens the gate and closes it when no index is left; a
//! helper that comes too late finds it closed. The loop ends when the gate is closed and nobody is inside.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a helper looks for the next loop before it sleeps.
const PATIENCE: Duration = Duration::from_micros(100);
/// Looks between two glances at the clock.
const LOOKS: u32 = 64;

/// Set in the gate while the loop may be entered.
const OPEN: u64 = 1 << 16;
/// One helper inside.
const INSIDE: u64 = 1;
/// The helpers inside.
const INSIDE_MASK: u64 = OPEN - 1;
/// One more loop.
const LOOP: u64 = OPEN << 1;

/// One loop: a function to be called with every index below `count`.
struct Loop<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    count: usize,
    next: AtomicUsize,
    /// What the first panic said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Loop<'_> {
    /// Takes indices until there are none.
    fn run(&self) {
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= self.count {
                    break;
                }
                (self.work)(index);
            }
        }));
        if let Err(panic) = result {
            // The rest of the loop would only delay the news.
            self.next.store(self.count, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }
}

struct Helper {
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

pub(super) struct Pool {
    /// Held by whoever runs a loop.
    owner: Mutex<()>,
    gate: AtomicU64,
    current: AtomicPtr<Loop<'static>>,
    helpers: Vec<Helper>,
}

impl Pool {
    /// The pool of this process: with the thread that calls it as many threads as Rayon's global pool.
    pub(super) fn global() -> &'static Pool {
        static POOL: OnceLock<&'static Pool> = OnceLock::new();
        POOL.get_or_init(|| {
            let helpers = rayon::current_num_threads().saturating_sub(1).min(INSIDE_MASK as usize);
            let helper = || Helper { asleep: AtomicBool::new(false), thread: OnceLock::new() };
            let pool = Box::leak(Box::new(Pool {
                owner: Mutex::new(()),
                gate: AtomicU64::new(0),
                current: AtomicPtr::new(std::ptr::null_mut()),
                helpers: std::iter::repeat_with(helper).take(helpers).collect(),
            }));
            let pool: &'static Pool = pool;
            for (index, helper) in pool.helpers.iter().enumerate() {
                let name = format!("kernels-{index}");
                // Without the thread there is one helper fewer; loops end all the same.
                if let Ok(started) = std::thread::Builder::new().name(name).spawn(move || pool.help(helper)) {
                    let _ = helper.thread.set(started.thread().clone());
                }
            }
            pool
        })
    }

    /// Threads of a loop, the caller's included.
    pub(super) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `work` with every index below `count`, or returns false if another loop is running.
    pub(super) fn run(&self, count: usize, work: &(dyn Fn(usize) + Sync)) -> bool {
        let Ok(owner) = self.owner.try_lock() else { return false };
        let job = Loop { work, count, next: AtomicUsize::new(0), panic: Mutex::new(None) };
        self.current.store((&raw const job).cast::<Loop<'static>>().cast_mut(), Ordering::Relaxed);
        // Nobody is inside and the gate is closed: adding both opens the next loop.
        self.gate.fetch_add(LOOP | OPEN, Ordering::SeqCst);
        for helper in &self.helpers {
            if helper.asleep.load(Ordering::SeqCst)
                && let Some(thread) = helper.thread.get()
            {
                thread.unpark();
            }
        }
        job.run();
        let mut gate = self.gate.fetch_and(!OPEN, Ordering::SeqCst);
        let mut looks = 0u32;
        while gate & INSIDE_MASK != 0 {
            looks = looks.wrapping_add(1);
            // A helper whose processor was taken away needs it more than this thread does.
            if looks.is_multiple_of(1 << 12) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
            gate = self.gate.load(Ordering::SeqCst);
        }
        let panic = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner);
        drop(owner);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        true
    }

    /// The life of a helper.
    fn help(&self, helper: &Helper) {
        INSIDE_LOOP.set(true);
        let mut last = 0;
        loop {
            let gate = self.wait(helper, last);
            last = gate / LOOP;
            if self.gate.compare_exchange(gate, gate + INSIDE, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                // SAFETY: the gate was open when this thread stepped inside, so the loop lives on the stack of its owner, who
                // waits until nobody is inside.
                unsafe { &*self.current.load(Ordering::Relaxed) }.run();
                self.gate.fetch_sub(INSIDE, Ordering::SeqCst);
            } else {
                // Another helper stepped in or out, or the loop ended: look again.
                last = last.wrapping_sub(1);
            }
        }
    }

    /// Waits for an open loop other than number `last`, and returns its gate.
    fn wait(&self, helper: &Helper, last: u64) -> u64 {
        let open = || Some(self.gate.load(Ordering::SeqCst)).filter(|gate| gate & OPEN != 0 && gate / LOOP != last);
        loop {
            let start = Instant::now();
            while start.elapsed() < PATIENCE {
                for _ in 0..LOOKS {
                    if let Some(gate) = open() {
                        return gate;
                    }
                    std::hint::spin_loop();
                }
            }
            // Either the owner of the next loop sees that this thread sleeps, or this thread sees the loop.
            helper.asleep.store(true, Ordering::SeqCst);
            while open().is_none() {
                std::thread::park();
            }
            helper.asleep.store(false, Ordering::SeqCst);
        }
    }
}

thread_local! {
    /// Whether this thread belongs to the pool. What it calls runs on itself alone.
    static INSIDE_LOOP: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Whether this thread works for a loop of the pool.
pub(super) fn inside_loop() -> bool {
    INSIDE_LOOP.get()
}
