//! The order in which requests are served, and the prompts they share.

use std::collections::HashMap;

use model::decoder::{Decoder, Prefill, Workspace};

use crate::{Request, Result};

/// Requests that wait for a slot.
///
/// Requests with equal prompts are served next to each other, so that a prompt's cache lives from its first request to
/// its last and at most one cache per slot is alive, whatever order the requests came in.
pub(crate) struct Queue<'a> {
    requests: &'a [Request],
    /// Requests still to be served, the next one last.
    waiting: Vec<usize>,
    /// The prompt of every request.
    prompt_of: Vec<usize>,
    prompts: Vec<Prompt<'a>>,
}

struct Prompt<'a> {
    ids: &'a [u32],
    waiting: usize,
    prefill: Option<Prefill>,
}

impl<'a> Queue<'a> {
    pub fn new(requests: &'a [Request]) -> Self {
        let mut known = HashMap::new();
        let mut prompts: Vec<Prompt<'a>> = Vec::new();
        let mut prompt_of = Vec::with_capacity(requests.len());
        for request in requests {
            let prompt = *known.entry(&request.prompt[..]).or_insert_with(|| {
                prompts.push(Prompt { ids: &request.prompt, waiting: 0, prefill: None });
                prompts.len() - 1
            });
            prompts[prompt].waiting += 1;
            prompt_of.push(prompt);
        }
        let mut waiting: Vec<usize> = (0..requests.len()).collect();
        waiting.sort_by_key(|&request| prompt_of[request]);
        waiting.reverse();
        Self { requests, waiting, prompt_of, prompts }
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Takes up to `count` requests and hands each, with its computed prompt, to `start`.
    pub fn take(
        &mut self,
        count: usize,
        decoder: &Decoder,
        workspace: &mut Workspace,
        mut start: impl FnMut(usize, &'a Request, &Prefill),
    ) -> Result<()> {
        let taken = self.waiting.split_off(self.waiting.len().saturating_sub(count));
        let mut missing: Vec<usize> = taken.iter().rev().map(|&request| self.prompt_of[request]).collect();
        missing.retain(|&prompt| self.prompts[prompt].prefill.is_none());
        missing.dedup();
        let ids: Vec<&[u32]> = missing.iter().map(|&prompt| self.prompts[prompt].ids).collect();
        for (&prompt, prefill) in missing.iter().zip(decoder.prefill(&ids, workspace)?) {
            self.prompts[prompt].prefill = Some(prefill);
        }
        for &request in taken.iter().rev() {
            let prompt = &mut self.prompts[self.prompt_of[request]];
            prompt.waiting -= 1;
            if let Some(prefill) = &prompt.prefill {
                start(request, &self.requests[request], prefill);
            }
            if prompt.waiting == 0 {
                prompt.prefill = None;
            }
        }
        Ok(())
    }
}
