//! How long work takes, whatever else the machine does.

use std::marker::PhantomData;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What a time was measured by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// Processor time: what other work leaves waiting does not count.
    Processor,
    /// Wall time: of a single thread never less than its processor time, and as much more as the machine was busy.
    #[default]
    Wall,
}

/// Measures the work of the thread that starts it: its processor time on Linux, wall time elsewhere. It stays with that thread.
#[derive(Debug)]
pub struct Stopwatch {
    processor: Option<Duration>,
    wall: Instant,
    /// Another thread's processor time is another time.
    this_thread: PhantomData<*const ()>,
}

impl Stopwatch {
    /// Starts now.
    pub fn start() -> Self {
        Self { processor: processor_time(), wall: Instant::now(), this_thread: PhantomData }
    }

    /// Seconds since the start, and what they were measured by.
    pub fn seconds(&self) -> (f64, Clock) {
        match (self.processor, processor_time()) {
            (Some(start), Some(now)) => (now.saturating_sub(start).as_secs_f64(), Clock::Processor),
            _ => (self.wall.elapsed().as_secs_f64(), Clock::Wall),
        }
    }
}

/// Processor time of the calling thread.
#[cfg(target_os = "linux")]
fn processor_time() -> Option<Duration> {
    Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime)).ok()
}

#[cfg(not(target_os = "linux"))]
fn processor_time() -> Option<Duration> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Computes until the thread has used this much processor time.
    fn busy(time: f64) -> f64 {
        let watch = Stopwatch::start();
        while watch.seconds().0 < time {
            std::hint::spin_loop();
        }
        watch.seconds().0
    }

    #[test]
    fn waiting_takes_no_time_and_work_does() {
        let watch = Stopwatch::start();
        std::thread::sleep(Duration::from_millis(200));
        let (waited, clock) = watch.seconds();
        assert_eq!(clock, Clock::Processor);
        assert!(waited < 0.1, "{waited}");
        let worked = busy(0.05);
        assert!(watch.seconds().0 >= waited + worked);
    }

    #[test]
    fn the_work_of_other_threads_is_theirs() {
        let watch = Stopwatch::start();
        let others = std::thread::scope(|scope| {
            [0, 1].map(|_| scope.spawn(|| busy(0.1))).map(|thread| thread.join().unwrap_or(0.0)).iter().sum::<f64>()
        });
        assert!(others >= 0.2 && watch.seconds().0 < 0.1, "{others}");
    }
}
