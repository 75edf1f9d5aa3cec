//! Ctrl-C: the first asks the run to finish its step and save, the second ends the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::failure::{Failure, exit};

/// Whether the user asked to stop.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens for Ctrl-C and polite termination from now on.
    pub fn listen() -> Result<Self, Failure> {
        let interrupt = Self::default();
        for signal in [SIGINT, SIGTERM] {
            // Order matters: the shutdown sees the flag as the signal before this one left it.
            signal_hook::flag::register_conditional_shutdown(signal, exit::INTERRUPTED.into(), interrupt.0.clone())
                .and_then(|_| signal_hook::flag::register(signal, interrupt.0.clone()))
                .map_err(|error| Failure::new(format!("cannot listen for Ctrl-C: {error}")))?;
        }
        Ok(interrupt)
    }

    /// Whether to stop at the next safe point.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// The flag itself, for loops that watch one.
    pub fn flag(&self) -> &AtomicBool {
        &self.0
    }
}
