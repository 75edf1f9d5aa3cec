//! What a hook keeps of the completions that are being served.

use std::collections::HashMap;

use crate::generator::LogitsContext;

/// A request's name: its prompt and its sample.
type Name = (u32, u32);

/// Rounds after which a completion that asks for nothing is taken to be finished. One that comes back is read again.
const FORGET_AFTER: u64 = 2;

/// Something for each completion that asked for it in the last rounds.
#[derive(Debug)]
pub(crate) struct Served<T> {
    kept: HashMap<Name, (u64, T)>,
    round: u64,
}

impl<T> Default for Served<T> {
    fn default() -> Self {
        Self { kept: HashMap::new(), round: 0 }
    }
}

impl<T> Served<T> {
    /// Begins a round, and forgets the completions that are taken to be finished.
    pub fn next_round(&mut self) {
        self.round += 1;
        self.kept.retain(|_, (asked, _)| *asked + FORGET_AFTER > self.round);
    }

    /// What is kept of a completion.
    pub fn get(&self, context: &LogitsContext<'_>) -> Option<&T> {
        self.kept.get(&name(context)).map(|(_, kept)| kept)
    }

    /// What is kept of a completion, to be changed.
    pub fn get_mut(&mut self, context: &LogitsContext<'_>) -> Option<&mut T> {
        self.kept.get_mut(&name(context)).map(|(_, kept)| kept)
    }

    /// Takes out what is kept of a completion.
    pub fn take(&mut self, context: &LogitsContext<'_>) -> Option<T> {
        self.kept.remove(&name(context)).map(|(_, kept)| kept)
    }

    /// Keeps something of a completion that asks in this round.
    pub fn keep(&mut self, context: &LogitsContext<'_>, kept: T) {
        self.kept.insert(name(context), (self.round, kept));
    }
}

fn name(context: &LogitsContext<'_>) -> Name {
    (context.request.prompt_id, context.request.sample)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Request;

    #[test]
    fn what_asks_for_nothing_is_forgotten_after_two_rounds() {
        let request = |sample| Request { prompt_id: 3, sample, prompt: [1].into(), prefix: Vec::new() };
        let (one, other) = (request(0), request(1));
        let of = |request| LogitsContext { request, completion: &[], banned: &[] };
        let mut served = Served::default();
        served.next_round();
        served.keep(&of(&one), "one");
        served.keep(&of(&other), "other");
        served.next_round();
        assert_eq!((served.get(&of(&one)), served.get(&of(&other))), (Some(&"one"), Some(&"other")));
        let taken = served.take(&of(&one)).unwrap_or_default();
        served.keep(&of(&one), taken);
        served.next_round();
        assert_eq!((served.get(&of(&one)), served.get(&of(&other))), (Some(&"one"), None));
    }
}
