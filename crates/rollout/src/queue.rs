//! The order in which requests are served, and the prompts they share.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::decoder::{KvCache, PREFILL_ROWS, Prefill, Prompt};

use crate::Request;
use crate::prefix_cache::PrefixCache;

/// Requests that wait for a slot.
///
/// They are served in the lexicographic order of their prompts. Requests with equal prompts are thus next to each other, so
/// that a prompt's cache lives from its first request to its last; and each prompt comes after the one with which it has
/// most in common.
pub(crate) struct Queue<'a> {
    requests: &'a [Request],
    /// Requests still to be served, the next one last.
    waiting: Vec<usize>,
    /// The prompt of every request.
    prompt_of: Vec<usize>,
    prompts: Vec<Shared<'a>>,
}

/// A prompt of one or several requests.
struct Shared<'a> {
    ids: &'a Arc<[u32]>,
    /// The first request in the list that has it.
    first: usize,
    waiting: usize,
    prefill: Option<Prefill>,
}

/// Requests that were taken from the queue.
pub(crate) struct Admission {
    /// Their positions in the list.
    pub requests: Vec<usize>,
    /// Prompts to be computed first, with what is known of them.
    missing: Vec<(usize, KvCache)>,
}

impl<'a> Queue<'a> {
    pub fn new(requests: &'a [Request]) -> Self {
        let mut ranks: BTreeMap<&[u32], usize> = requests.iter().map(|request| (&request.prompt[..], 0)).collect();
        ranks.values_mut().enumerate().for_each(|(index, rank)| *rank = index);
        let prompt_of: Vec<usize> = requests.iter().map(|request| ranks[&request.prompt[..]]).collect();
        let mut waiting: Vec<usize> = (0..requests.len()).collect();
        waiting.sort_by_key(|&request| prompt_of[request]);
        let mut prompts: Vec<Shared<'a>> = Vec::with_capacity(ranks.len());
        for &request in &waiting {
            if prompt_of[request] == prompts.len() {
                prompts.push(Shared { ids: &requests[request].prompt, first: request, waiting: 0, prefill: None });
            }
            prompts[prompt_of[request]].waiting += 1;
        }
        waiting.reverse();
        Self { requests, waiting, prompt_of, prompts }
    }

    /// Takes up to `count` requests, fewer if their prompts are too much for one pass.
    pub fn take(&mut self, count: usize, cache: &mut PrefixCache) -> Admission {
        let mut admission = Admission { requests: Vec::new(), missing: Vec::new() };
        let mut rows = 0;
        while admission.requests.len() < count
            && let Some(&request) = self.waiting.last()
        {
            let index = self.prompt_of[request];
            let prompt = &self.prompts[index];
            let planned = admission.missing.last().is_some_and(|(last, _)| *last == index);
            if prompt.prefill.is_none() && !planned {
                let known = cache.beginning(prompt.ids);
                rows += prompt.ids.len() - known.len();
                if rows > PREFILL_ROWS && !admission.missing.is_empty() {
                    break;
                }
                admission.missing.push((index, known));
            }
            admission.requests.push(request);
            self.waiting.pop();
        }
        admission
    }

    /// The prompts that an admission has to compute.
    pub fn missing(&self, admission: &Admission) -> Vec<Prompt<'a>> {
        let prompt =
            |(index, known): &(usize, KvCache)| Prompt { tokens: self.prompts[*index].ids, known: known.clone() };
        admission.missing.iter().map(prompt).collect()
    }

    /// For each prompt that an admission has to compute, the first request in the list that has it.
    pub fn first_requests(&self, admission: &Admission) -> impl Iterator<Item = usize> {
        admission.missing.iter().map(|(index, _)| self.prompts[*index].first)
    }

    /// Starts the requests of an admission, given its missing prompts.
    pub fn start(
        &mut self,
        admission: Admission,
        computed: Vec<Prefill>,
        cache: &mut PrefixCache,
        mut start: impl FnMut(usize, &'a Request, &Prefill),
    ) {
        for ((index, _), prefill) in admission.missing.into_iter().zip(computed) {
            cache.keep(Arc::clone(self.prompts[index].ids), Arc::clone(&prefill.cache));
            self.prompts[index].prefill = Some(prefill);
        }
        for request in admission.requests {
            let prompt = &mut self.prompts[self.prompt_of[request]];
            prompt.waiting -= 1;
            if let Some(prefill) = &prompt.prefill {
                start(request, &self.requests[request], prefill);
            }
            if prompt.waiting == 0 {
                prompt.prefill = None;
            }
        }
    }
}
