//! The decoder: engine and reference, weights in and out, tokenizer, chat template, LoRA.
