//! Generation: batched decode, shared prefixes, sampling, stop rules, log-probs.
