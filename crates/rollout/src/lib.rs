//! Generation: many requests through one decoder, with shared prompts, exact log-probs and stop rules.
//!
//! A [`Request`] is a prompt's tokens and a sample number; an [`Episode`] is what came of it: token ids, which of them
//! were sampled, their log-probs, and text as a mere view. [`Generator`] admits requests into a batch of slots as slots
//! become free. What an episode contains depends on the weights, the options, the seed and its own request, never on the
//! batch size, the other requests, their order or the number of threads; and the log-probs it records equal, bit for bit,
//! those that [`model::decoder::Decoder::log_probs`] computes for the same tokens. So do all activations, which can be kept for
//! training ([`Generator::generate_onto`]). With a [`Dialogue`], somebody answers the model's turns, and an episode is a whole
//! conversation.
//!
//! [`search`] grows solutions step by step where a judge says that it pays.
//!
//! This crate knows decoders and tokenizers. It must not know rewards, losses, data sets or files.

mod answers;
mod check;
pub mod conversation;
pub mod episode;
pub mod error;
pub mod generator;
pub mod guidance;
pub mod mixture;
pub mod options;
pub mod prefix_cache;
mod queue;
pub mod sampling;
pub mod scoring;
pub mod search;
mod served;
mod slot;
pub mod stop;

pub use conversation::{ConversationOptions, Dialogue, Fidelity, Opening, Respondent, Response, TurnEnd};
pub use episode::{Episode, Finish, Request, Transcript, Turn};
pub use error::{Error, Result};
pub use generator::{Generator, LogitsContext, LogitsHook, OnTape, Piece, Progress, PromptTokens, TapeRows};
pub use guidance::{Guidance, GuidanceOptions, Returns, ValueHead, ValueOutputs, Worth};
pub use mixture::{Mean, Mixture, Resampled};
pub use options::SamplingOptions;
pub use prefix_cache::PrefixCache;
