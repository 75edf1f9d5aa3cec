//! Tokens to text, one by one.

use super::Tokenizer;

/// Turns tokens into text as they come.
///
/// A piece of text is given out when the tokens behind it end on a whole character, so that the pieces, with
/// [`DecodeStream::finish`], join to what [`Tokenizer::decode`] makes of all tokens at once. They may differ only where
/// a vocabulary with byte tokens yields broken UTF-8, which `decode` replaces back to the first byte token of the run,
/// text that was given out included.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the piece given out last, which decide how the next one decodes (a space in front, say), then
    /// those not given out yet.
    ids: Vec<u32>,
    /// How many of `ids` were given out.
    given: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), given: 0 }
    }

    /// Takes the next token; returns the text that became certain, often empty.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let (text, known) = self.pending();
        if text.len() <= known || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return String::new();
        }
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        text[known..].to_owned()
    }

    /// Ends the stream; returns what was held back, where broken characters show as U+FFFD.
    pub fn finish(self) -> String {
        let (text, known) = self.pending();
        text.get(known..).unwrap_or_default().to_owned()
    }

    /// The text of all tokens kept, and how many bytes of it were given out.
    fn pending(&self) -> (String, usize) {
        let known = self.tokenizer.decode(&self.ids[..self.given]);
        let text = self.tokenizer.decode(&self.ids);
        if text.starts_with(&known) { (text, known.len()) } else { (self.tokenizer.decode(&self.ids[self.given..]), 0) }
    }
}
