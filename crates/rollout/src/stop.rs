//! Stop strings over text that arrives piece by piece.
//!
//! The text a completion decodes to grows as tokens come. A [`StopStrings`] takes the pieces, passes on the text that
//! can no longer be part of a stop string, and says when a stop string is complete. Where several match, the one that
//! begins first counts. Tokens know nothing of the cut: the token that completes the string may reach past its end.

/// Watches a growing text for stop strings.
#[derive(Clone, Debug)]
pub struct StopStrings<'a> {
    stop: &'a [String],
    /// Text that may still turn out to begin a stop string.
    held: String,
    stopped: bool,
}

impl<'a> StopStrings<'a> {
    /// Watches for any of `stop`.
    pub fn new(stop: &'a [String]) -> Self {
        Self { stop, held: String::new(), stopped: false }
    }

    /// Takes the next piece of text and returns what is now certain to come before any stop string. After a stop string
    /// is complete, nothing more is returned.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        if let Some(start) = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let safe = (0..=self.held.len())
            .filter(|&from| self.held.is_char_boundary(from))
            .find(|&from| from == self.held.len() || self.may_continue(from))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(safe);
        std::mem::replace(&mut self.held, rest)
    }

    /// Takes a piece of text that must not stop anything. A stop string that began before it or inside it is not seen.
    pub fn pass(&mut self, piece: &str) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        text
    }

    /// Whether a stop string is complete.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What was held back, once it is known that no more text will come.
    pub fn finish(self) -> String {
        self.held
    }

    /// Whether the held text from `from` on is the beginning of a stop string.
    fn may_continue(&self, from: usize) -> bool {
        let rest = &self.held[from..];
        self.stop.iter().any(|stop| stop.starts_with(rest))
    }
}
