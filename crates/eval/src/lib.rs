//! Metrics with intervals, and the evaluation of a model on a task.
