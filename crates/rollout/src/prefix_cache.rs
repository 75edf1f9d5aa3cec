//! Keys and values of sequences, kept for prompts that begin like them.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use model::decoder::{Decoder, KvCache, SHARED_FROM, WeightsId, common_beginning};

/// Keys and values of earlier prompts and completions, so that a prompt that begins like one of them (with the same
/// instructions, the same examples, the conversation so far) computes only the rest. Results are the same bits without it.
///
/// Everything is forgotten when the weights, the adapter or the precision change. When more than a given number of tokens
/// is held, the sequences that served longest ago go first.
pub struct PrefixCache {
    capacity: usize,
    weights: Option<WeightsId>,
    /// In lexicographic order: the longest common beginning with a prompt is that of one of its two neighbours.
    sequences: BTreeMap<Arc<[u32]>, Kept>,
    clock: u64,
}

struct Kept {
    cache: Arc<KvCache>,
    /// When it last served, or came.
    used: u64,
}

impl PrefixCache {
    /// An empty cache for at most `capacity` tokens. The newest sequence is kept even if it is longer.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, weights: None, sequences: BTreeMap::new(), clock: 0 }
    }

    /// Tokens whose keys and values are in memory. What several sequences share counts once.
    pub fn tokens(&self) -> usize {
        let held: HashMap<_, _> = self.sequences.values().flat_map(|kept| kept.cache.held()).collect();
        held.values().sum()
    }

    /// Forgets what this decoder cannot use.
    pub(crate) fn serve(&mut self, decoder: &Decoder) {
        let weights = Some(decoder.weights_id());
        if self.weights != weights {
            self.sequences.clear();
            self.weights = weights;
        }
    }

    /// The longest beginning of `prompt` that is known, short of the whole prompt; nothing, if it is too short to be worth
    /// sharing.
    pub(crate) fn beginning(&mut self, prompt: &[u32]) -> KvCache {
        let before = self.sequences.range::<[u32], _>((Bound::Unbounded, Bound::Included(prompt))).next_back();
        let after = self.sequences.range::<[u32], _>((Bound::Excluded(prompt), Bound::Unbounded)).next();
        let neighbours = before.into_iter().chain(after);
        let shared = neighbours.map(|(tokens, _)| (common_beginning(tokens, prompt), Arc::clone(tokens)));
        let Some((len, tokens)) = shared.max_by_key(|(len, _)| *len) else { return KvCache::default() };
        let len = len.min(prompt.len() - 1);
        match self.sequences.get_mut(&tokens) {
            Some(kept) if len >= SHARED_FROM => {
                self.clock += 1;
                kept.used = self.clock;
                kept.cache.beginning(len)
            }
            _ => KvCache::default(),
        }
    }

    /// Takes in a sequence.
    pub(crate) fn keep(&mut self, tokens: Arc<[u32]>, cache: Arc<KvCache>) {
        self.clock += 1;
        self.sequences.insert(tokens, Kept { cache, used: self.clock });
        while self.sequences.len() > 1 && self.tokens() > self.capacity {
            let oldest = self.sequences.iter().min_by_key(|(_, kept)| kept.used).map(|(tokens, _)| Arc::clone(tokens));
            oldest.and_then(|tokens| self.sequences.remove(&tokens));
        }
    }
}
