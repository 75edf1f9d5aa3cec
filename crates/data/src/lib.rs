//! Rows from files, rendered to tokens and masks.
//!
//! The way of the data: [`read()`] turns files into [`Row`]s, [`sample`] recognises what a row means ([`Sample`]), and
//! [`render`] turns samples into what methods train on: [`Example`]s, [`Prompt`]s, preference pairs and steps. Every
//! one of them knows the file and row it came from, and so does every error. [`audit`] looks at rows as a whole: what
//! would be learnt, what is there twice, what is held out and trained on all the same.
//!
//! This crate knows tokenizers and chat templates, but no weights, no loss and no reward.

pub mod audit;
pub mod error;
pub mod read;
pub mod render;
pub mod row;
pub mod sample;

pub use error::{Error, Result};
pub use read::{DataOptions, read};
pub use render::{
    Drops, Example, LabelledExample, PreferencePair, Prompt, RenderOptions, Rendered, Renderer, ScoredExample,
    StepwiseExample,
};
pub use row::{Row, Source};
pub use sample::{Kind, Sample, Text};
