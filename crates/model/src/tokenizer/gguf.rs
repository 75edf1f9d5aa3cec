//! Tokenizers from the metadata of GGUF files.
//!
//! The file holds a vocabulary and names the rules to use it; here the rules are spelt out as a `tokenizer.json`.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{Tokenizer, load};
use crate::error::{Error, Result};
use crate::weights::gguf::Metadata;

/// Llama.cpp's kinds of tokens.
mod kind {
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const UNUSED: i64 = 5;
    pub const BYTE: i64 = 6;
}

/// The key of the rules that cut text into words, for byte-level BPE.
const PRE: &str = "tokenizer.ggml.pre";
/// The names of LLaMA 3's rules.
const LLAMA3_NAMES: [&str; 4] = ["llama3", "llama-v3", "llama-bpe", "falcon3"];

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The vocabulary as the metadata has it.
struct Vocabulary<'a> {
    tokens: &'a [String],
    kinds: &'a [i64],
    ids: HashMap<&'a str, u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that the metadata of a GGUF file describes.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self> {
        let vocabulary = Vocabulary::new(metadata)?;
        let model = required(metadata.text("tokenizer.ggml.model")?, "tokenizer.ggml.model")?;
        let mut json = match model {
            "gpt2" => byte_pairs(metadata, &vocabulary)?,
            "llama" => sentence_piece(metadata, &vocabulary)?,
            _ => {
                let hint = "supported values of tokenizer.ggml.model: gpt2, llama";
                return Err(Error::unsupported(format!("GGUF tokenizer {model}"), hint));
            }
        };
        let id = |key: &str| vocabulary.id(metadata, key);
        let bos = id("tokenizer.ggml.bos_token_id")?;
        let eos = match id("tokenizer.ggml.eot_token_id")? {
            Some(end_of_turn) => Some(end_of_turn),
            None => id("tokenizer.ggml.eos_token_id")?,
        };
        let pad = id("tokenizer.ggml.padding_token_id")?;
        json["version"] = "1.0".into();
        json["added_tokens"] = vocabulary.added_tokens(&[bos, eos, pad]);
        // Where the file says nothing, llama.cpp decides by the kind of vocabulary.
        let by_default = model == "llama" || metadata.text(PRE)?.is_some_and(|name| LLAMA3_NAMES.contains(&name));
        let adds_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(by_default);
        if let (true, Some(bos)) = (adds_bos, bos) {
            json["post_processor"] = load::begin_of_sequence(&vocabulary.tokens[bos as usize], bos);
        }
        Self::from_json(&json.to_string())?.with_special_ids(bos, eos, pad)
    }
}

impl<'a> Vocabulary<'a> {
    fn new(metadata: &'a Metadata) -> Result<Self> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        const KINDS: &str = "tokenizer.ggml.token_type";
        let tokens = required(metadata.texts(TOKENS)?, TOKENS)?;
        let kinds = metadata.integers(KINDS)?.unwrap_or_default();
        if !kinds.is_empty() && kinds.len() != tokens.len() {
            return Err(Error::malformed(KINDS, format!("{} entries for {} tokens", kinds.len(), tokens.len())));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in (0..).zip(tokens) {
            if let Some(first) = ids.insert(token.as_str(), id) {
                return Err(Error::malformed(TOKENS, format!("{token:?} is there twice, as {first} and {id}")));
            }
        }
        Ok(Self { tokens, kinds, ids })
    }

    fn kind(&self, id: usize) -> i64 {
        self.kinds.get(id).copied().unwrap_or_default()
    }

    /// A token id of the metadata, checked.
    fn id(&self, metadata: &Metadata, key: &str) -> Result<Option<u32>> {
        match metadata.token(key)? {
            Some(id) if id as usize >= self.tokens.len() => {
                Err(Error::malformed(key, format!("{id} is not in the vocabulary of {} tokens", self.tokens.len())))
            }
            id => Ok(id),
        }
    }

    /// The tokens that are found in text before all rules, as `added_tokens`.
    fn added_tokens(&self, special: &[Option<u32>]) -> Value {
        let entry = |(id, token): (usize, &String)| {
            let kind = self.kind(id);
            let is_special = matches!(kind, kind::CONTROL | kind::UNKNOWN)
                || special.contains(&Some(id as u32))
                || (kind != kind::UNUSED && looks_special(token));
            (is_special || kind == kind::USER_DEFINED).then(|| load::added_token(id as u32, token, is_special))
        };
        self.tokens.iter().enumerate().filter_map(entry).collect()
    }

    fn vocab(&self) -> Map<String, Value> {
        self.tokens.iter().cloned().zip((0u32..).map(Value::from)).collect()
    }
}

/// Names of turn markers, which some converters store as ordinary tokens.
fn looks_special(token: &str) -> bool {
    (token.starts_with("<|") && token.ends_with("|>") && token.len() > 4 && !token.contains(char::is_whitespace))
        || matches!(token, "<start_of_turn>" | "<end_of_turn>" | "<bos>" | "<eos>" | "<pad>" | "<s>" | "</s>")
}

fn required<T>(value: Option<T>, key: &str) -> Result<T> {
    value.ok_or_else(|| Metadata::missing(key))
}

/// Byte-level BPE: GPT-2, LLaMA 3, Qwen, SmolLM.
fn byte_pairs(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Value> {
    const MERGES: &str = "tokenizer.ggml.merges";
    let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let split = |regex: &str| json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false });
    let sequence = |mut rules: Vec<Value>| {
        rules.push(byte_level(false));
        json!({ "type": "Sequence", "pretokenizers": rules })
    };
    let name = metadata.text(PRE)?.unwrap_or("default");
    let mut normalizer = Value::Null;
    let mut ignore_merges = false;
    let pre_tokenizer = match name {
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            json!({ "type": "Sequence", "pretokenizers": [{ "type": "Digits", "individual_digits": true }, byte_level(true)] })
        }
        "gpt-2" | "gpt2" | "phi-2" | "olmo" | "mpt" | "roberta-bpe" => byte_level(true),
        name if LLAMA3_NAMES.contains(&name) => {
            ignore_merges = true;
            sequence(vec![split(LLAMA3)])
        }
        "qwen2" | "stablelm2" | "deepseek-r1-qwen" => {
            normalizer = json!({ "type": "NFC" });
            sequence(vec![split(QWEN2)])
        }
        "default" => {
            sequence(vec![split(r"[\p{P}\$\+<=>\^~\|]+"), split(GPT2), split(r"\p{N}+"), split("[0-9][0-9][0-9]")])
        }
        _ => {
            let hint = "supported values of tokenizer.ggml.pre: smollm, gpt-2, llama-bpe, qwen2, default and names of the same rules";
            return Err(Error::unsupported(format!("GGUF pre-tokenizer {name}"), hint));
        }
    };
    let merges = required(metadata.texts(MERGES)?, MERGES)?;
    let pair = |(rank, merge): (usize, &String)| match merge.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() => Ok(json!([left, right])),
        _ => Err(Error::malformed(format!("{MERGES}[{rank}]"), format!("expected two tokens, found {merge:?}"))),
    };
    let merges: Vec<Value> = merges.iter().enumerate().map(pair).collect::<Result<_>>()?;
    Ok(json!({
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": byte_level(true),
        "model": { "type": "BPE", "vocab": vocabulary.vocab(), "merges": merges, "ignore_merges": ignore_merges },
    }))
}

/// SentencePiece's BPE with byte fallback: LLaMA 2, Mistral, Gemma. The scores of the pieces order the merges.
fn sentence_piece(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Value> {
    const SCORES: &str = "tokenizer.ggml.scores";
    let scores = required(metadata.floats(SCORES)?, SCORES)?;
    if scores.len() != vocabulary.tokens.len() {
        let reason = format!("{} entries for {} tokens", scores.len(), vocabulary.tokens.len());
        return Err(Error::malformed(SCORES, reason));
    }
    if let Some(id) = scores.iter().position(|score| !score.is_finite()) {
        return Err(Error::malformed(format!("{SCORES}[{id}]"), "expected a finite number"));
    }
    let unknown = (0..vocabulary.tokens.len()).find(|&id| vocabulary.kind(id) == kind::UNKNOWN);
    let adds_space = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);

    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let mut normalizers = vec![spaces];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if adds_space {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(json!({
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE",
            "vocab": vocabulary.vocab(),
            "merges": merges(vocabulary, scores),
            "unk_token": unknown.map(|id| &vocabulary.tokens[id]),
            "fuse_unk": true,
            "byte_fallback": true,
        },
    }))
}

/// Every way to join two pieces to a third, best score of the third first; ties as `transformers` breaks them.
fn merges(vocabulary: &Vocabulary, scores: &[f64]) -> Vec<Value> {
    let ordinary =
        |id: usize| !matches!(vocabulary.kind(id), kind::CONTROL | kind::UNKNOWN | kind::UNUSED | kind::BYTE);
    let mut found: Vec<(f64, &str, &str)> = Vec::new();
    for (id, piece) in vocabulary.tokens.iter().enumerate().filter(|&(id, _)| ordinary(id)) {
        let mut ways: Vec<(u32, u32, &str, &str)> = piece
            .char_indices()
            .skip(1)
            .filter_map(|(cut, _)| {
                let (left, right) = piece.split_at(cut);
                let (left_id, right_id) = (*vocabulary.ids.get(left)?, *vocabulary.ids.get(right)?);
                (ordinary(left_id as usize) && ordinary(right_id as usize)).then_some((left_id, right_id, left, right))
            })
            .collect();
        ways.sort_unstable_by_key(|&(left, right, ..)| (left, right));
        found.extend(ways.into_iter().map(|(_, _, left, right)| (scores[id], left, right)));
    }
    let length = |text: &str| text.chars().count();
    found.sort_by(|a, b| {
        b.0.total_cmp(&a.0).then_with(|| length(b.1).cmp(&length(a.1))).then_with(|| length(b.2).cmp(&length(a.2)))
    });
    found.into_iter().map(|(_, left, right)| json!([left, right])).collect()
}
