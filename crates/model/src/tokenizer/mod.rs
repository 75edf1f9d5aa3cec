//! Text to token ids and back.
//!
//! A [`Tokenizer`] comes from a Hugging Face folder ([`Tokenizer::from_folder`]), from the metadata of a GGUF file
//! ([`Tokenizer::from_gguf`]) or is the byte-level one of models trained from scratch ([`Tokenizer::bytes`]). It owns
//! the special tokens: ordinary text never becomes one of them. `<|im_end|>` in a user's message is ten ordinary
//! characters, and only [`Tokenizer::encode_with_special`] and the text of a chat template
//! ([`Rendering`](crate::chat::Rendering)) give the token of that name.

mod gguf;
pub(crate) mod load;
mod stream;

use std::ops::Range;

use aho_corasick::{AhoCorasick, Input, MatchKind};

pub use stream::DecodeStream;

use crate::error::{Error, Result};

/// A tokenizer: immutable, shared freely between threads.
#[derive(Debug)]
pub struct Tokenizer {
    /// Set never to find special tokens in text: [`Tokenizer::split`] does.
    inner: tokenizers::Tokenizer,
    /// For text that does not start a sequence, where that makes a difference.
    continuing: Option<Box<tokenizers::Tokenizer>>,
    special: SpecialTokens,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    adds_bos: bool,
    vocab_size: usize,
}

/// The special tokens and how to find them.
#[derive(Debug)]
struct SpecialTokens {
    tokens: Vec<(u32, tokenizers::AddedToken)>,
    /// Finds the longest token at the leftmost place.
    longest: AhoCorasick,
    /// Finds every occurrence of every token, overlapping ones too.
    every: AhoCorasick,
}

/// A stretch of text to encode.
enum Piece {
    Text(Range<usize>),
    Special(u32),
}

impl Tokenizer {
    /// The id of `<|im_end|>` of [`Tokenizer::bytes`].
    const BYTES_END: u32 = 257;

    /// The byte-level tokenizer of models trained from scratch: token `b` is byte `b`, then come `<|im_start|>` (256),
    /// `<|im_end|>` (257, which ends a sequence) and `<|pad|>` (258).
    pub fn bytes() -> Result<Self> {
        let mut vocabulary = serde_json::Map::new();
        for byte in 0..=u8::MAX {
            vocabulary.insert(byte_character(byte).to_string(), byte.into());
        }
        let special = [(256, "<|im_start|>"), (Self::BYTES_END, "<|im_end|>"), (258, "<|pad|>")];
        let byte_level = serde_json::json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
        });
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": special.map(|(id, content)| load::added_token(id, content, true)),
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
        });
        Self::from_json(&json.to_string())?.with_special_ids(None, Some(Self::BYTES_END), Some(258))
    }

    /// The tokens of ordinary text at the start of a sequence. No special token is found in it and none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        self.encode_text(text, true, &mut ids)?;
        Ok(ids)
    }

    /// The tokens of text in which the names of special tokens stand for these tokens. Not for the text of users.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_range(text, 0..text.len(), &[])
    }

    /// The tokens of `text[range]`, where the names of special tokens stand for these tokens unless one of the
    /// ascending positions `ordinary` (in `text`) lies in them.
    pub(crate) fn encode_range(&self, text: &str, range: Range<usize>, ordinary: &[usize]) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for piece in self.special.split(text, range, ordinary) {
            match piece {
                Piece::Special(id) => ids.push(id),
                Piece::Text(range) => self.encode_text(&text[range.clone()], range.start == 0, &mut ids)?,
            }
        }
        Ok(ids)
    }

    fn encode_text(&self, text: &str, starts: bool, ids: &mut Vec<u32>) -> Result<()> {
        let inner = match &self.continuing {
            Some(continuing) if !starts => continuing,
            _ => &self.inner,
        };
        let encoding = guard(|| inner.encode_fast(text, false))
            .and_then(|encoded| encoded.map_err(|error| error.to_string()))
            .map_err(|reason| Error::Text(format!("the tokenizer cannot encode {}: {reason}", excerpt(text))))?;
        // Some models (unigram, word lists) hold their special tokens in the vocabulary that they match text against.
        // Cutting the names apart keeps them text.
        if encoding.get_ids().iter().any(|&id| self.special.has_named(id))
            && let Some(cut) = self.special.first_cut(text)
        {
            self.encode_text(&text[..cut], starts, ids)?;
            return self.encode_text(&text[cut..], false, ids);
        }
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// The text of tokens without the special ones. Bytes that are no UTF-8 become U+FFFD, ids without a token nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decode_skipping(ids, true)
    }

    /// The text of tokens, special ones by their names.
    pub fn decode_with_special(&self, ids: &[u32]) -> String {
        self.decode_skipping(ids, false)
    }

    fn decode_skipping(&self, ids: &[u32], skip_special: bool) -> String {
        match guard(|| self.inner.decode(ids, skip_special)) {
            Ok(Ok(text)) => text,
            // A view must not stop a run: show the tokens as they are.
            Ok(Err(_)) | Err(_) => ids.iter().filter_map(|&id| self.inner.id_to_token(id)).collect(),
        }
    }

    /// A view that turns tokens into text as they come, holding back incomplete characters.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// The name of a token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token by the vocabulary's spelling.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether a token is special.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.tokens.iter().any(|&(special, _)| special == id)
    }

    /// Begin of sequence, where there is one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// End of sequence, where there is one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Padding, where there is one.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Whether plain text (not a rendered conversation, whose template decides) starts with [`Tokenizer::bos`].
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// One more than the largest token id that text can give.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Every place in `text` that is the name of a special token, overlapping ones too, by ascending start.
    pub(crate) fn special_names(&self, text: &str) -> Vec<Range<usize>> {
        let mut names: Vec<Range<usize>> =
            self.special.every.find_overlapping_iter(text).map(|found| found.range()).collect();
        names.sort_unstable_by_key(|name| name.start);
        names
    }
}

impl SpecialTokens {
    fn new(mut tokens: Vec<(u32, tokenizers::AddedToken)>) -> Result<Self> {
        tokens.retain(|(_, token)| !token.content.is_empty());
        tokens.sort_by_key(|&(id, _)| id);
        let find = |kind| {
            AhoCorasick::builder()
                .match_kind(kind)
                .build(tokens.iter().map(|(_, token)| &token.content))
                .map_err(|error| Error::malformed("special tokens", error))
        };
        Ok(Self { longest: find(MatchKind::LeftmostLongest)?, every: find(MatchKind::Standard)?, tokens })
    }

    /// Whether `id` is a special token other than the one that stands for unknown characters.
    fn has_named(&self, id: u32) -> bool {
        (self.tokens.iter()).any(|(special, token)| *special == id && !matches!(&*token.content, "<unk>" | "[UNK]"))
    }

    /// A place inside the first name of a special token in `text`.
    fn first_cut(&self, text: &str) -> Option<usize> {
        let found = self.longest.find(text)?;
        let first = text[found.range()].chars().next()?;
        Some(found.start() + first.len_utf8()).filter(|&cut| cut < found.end())
    }

    /// Cuts `text[range]` into ordinary text and special tokens; see [`Tokenizer::encode_range`].
    fn split(&self, text: &str, range: Range<usize>, ordinary: &[usize]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut from = range.start;
        let mut search = range.start;
        while let Some(found) = self.longest.find(Input::new(text).span(search..range.end)) {
            let next = ordinary.partition_point(|&position| position < found.start());
            if ordinary.get(next).is_some_and(|&position| position < found.end()) {
                search = found.start() + text[found.start()..].chars().next().map_or(1, char::len_utf8);
                continue;
            }
            let (id, token) = &self.tokens[found.pattern().as_usize()];
            let before = &text[from..found.start()];
            let alone = !word_at_end(before) && !word_at_start(&text[found.end()..range.end]);
            search = found.end();
            if token.single_word && !alone {
                continue;
            }
            let before = if token.lstrip { before.trim_end() } else { before };
            if !before.is_empty() {
                pieces.push(Piece::Text(from..from + before.len()));
            }
            pieces.push(Piece::Special(*id));
            if token.rstrip {
                let after = &text[search..range.end];
                search += after.len() - after.trim_start().len();
            }
            from = search;
        }
        if from < range.end {
            pieces.push(Piece::Text(from..range.end));
        }
        pieces
    }
}

fn word_at_end(text: &str) -> bool {
    text.chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_')
}

fn word_at_start(text: &str) -> bool {
    text.chars().next().is_some_and(|c| c.is_alphanumeric() || c == '_')
}

/// The printable character that stands for a byte in byte-level vocabularies (GPT-2's table).
fn byte_character(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        // The others, in order, are the characters from 256 on.
        0..=0x20 => char::from_u32(256 + u32::from(byte)).unwrap_or_default(),
        0x7f..=0xa0 => char::from_u32(256 + 33 + u32::from(byte - 0x7f)).unwrap_or_default(),
        0xad => '\u{143}',
    }
}

/// Runs code of the `tokenizers` crate, which panics on some damaged vocabularies.
fn guard<T>(run: impl FnOnce() -> T) -> std::result::Result<T, String> {
    base::caught(run).map_err(|panic| format!("inconsistent vocabulary ({panic})"))
}

/// The beginning of a text, quoted, for messages.
fn excerpt(text: &str) -> String {
    const SHOWN: usize = 40;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}
