//! The tests of this crate as one program: it is linked once.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod adapter;
mod chat_templates;
mod config;
mod device;
mod engine;
mod engine_distributions;
mod engine_exactness;
mod engine_gradients;
mod engine_reference;
mod engine_smollm2;
mod engine_transformers;
mod files;
mod gguf;
mod int8;
mod safetensors;
mod score_head;
mod shared_beginnings;
mod source;
mod tape;
mod task_vectors;
mod tokenizers;
