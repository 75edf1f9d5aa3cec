//! Tasks, verifiers and rewards: a score with a status, under a step budget.
