//! Rows from files, rendered to tokens and masks.
