//! Questions to the other side of conversations, and the answers as they come.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;

use crate::Finish;
use crate::conversation::{Respondent, Response, TurnEnd};

/// An answer, or why there is none.
type Answer = Result<Response, Box<dyn std::error::Error + Send + Sync>>;

/// Turns that have been asked about. A quick respondent answers at once; a slow one on threads that end with `'scope`.
pub(crate) struct Answers<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    respondent: Option<&'env dyn Respondent>,
    sender: Sender<(usize, Answer)>,
    receiver: Receiver<(usize, Answer)>,
}

impl<'scope, 'env> Answers<'scope, 'env> {
    pub fn new(scope: &'scope Scope<'scope, 'env>, respondent: Option<&'env dyn Respondent>) -> Self {
        let (sender, receiver) = channel();
        Self { scope, respondent, sender, receiver }
    }

    /// Asks about a turn.
    pub fn ask(&mut self, conversation: usize, number: usize, text: &str, finish: Finish) {
        let Some(respondent) = self.respondent else { return };
        let (sender, text) = (self.sender.clone(), text.to_owned());
        let answer = move || {
            let answer = respondent.respond(TurnEnd { conversation, number, text: &text, finish });
            // Nobody listens any more after an error elsewhere.
            let _ = sender.send((conversation, answer));
        };
        match respondent.is_slow() {
            true => drop(self.scope.spawn(answer)),
            false => answer(),
        }
    }

    /// The answers that have come; with `wait`, at least one of those that are still to come.
    pub fn take(&mut self, wait: bool) -> Vec<(usize, Answer)> {
        // The sender held here keeps the channel open, so that waiting ends with an answer.
        let first = if wait { self.receiver.recv().ok() } else { None };
        first.into_iter().chain(self.receiver.try_iter()).collect()
    }
}
