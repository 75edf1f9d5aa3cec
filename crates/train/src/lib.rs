//! The training loop: optimiser, schedules, checkpoints, metrics and the run directory.
