//! Post-training of language models: one binary, exact numbers.
