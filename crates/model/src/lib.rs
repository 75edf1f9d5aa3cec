//! The decoder: engine and reference, weights in and out, tokenizer, chat template, LoRA, score heads.
//!
//! A model comes from a named source, a Hugging Face folder or a GGUF file ([`source::load`]) as a [`ModelConfig`],
//! weights where they lie ([`weights::Source`]), a tokenizer and a chat template, and goes out as a Hugging Face folder ([`save`]).
//! This crate knows no data, no loss and no sampling: it maps tokens to hidden states and log-probs, and gradients of
//! those to gradients of the weights. A score head ([`config::ScoreHead`]) gives numbers in place of, or beside, tokens.

pub mod chat;
pub mod config;
pub mod decoder;
pub mod device;
pub mod error;
pub mod hub;
pub mod lora;
pub mod reference;
pub mod save;
pub mod source;
pub mod tokenizer;
pub mod weights;

pub use config::{Family, ModelConfig};
pub use decoder::Decoder;
pub use device::DeviceName;
pub use error::{Error, Result};
