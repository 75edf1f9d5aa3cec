//! Tokenizers from and to files.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::{AddedToken, PostProcessorWrapper};

use super::{SpecialTokens, Tokenizer, guard};
use crate::error::{Error, Result};

/// The vocabulary and the rules.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// Which tokens are special, and the chat template.
pub(crate) const CONFIG: &str = "tokenizer_config.json";
/// An older place for the special tokens.
pub(crate) const SPECIAL_MAP: &str = "special_tokens_map.json";
/// No vocabulary is larger; a larger id is a damaged file.
const MAX_VOCABULARY: usize = 1 << 24;
/// The classes of `transformers` whose `add_bos_token` decides, whatever the rules of `tokenizer.json` say: LLaMA's and those made like it.
const OWN_BOS: [&str; 7] = [
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "CohereTokenizerFast",
];

/// What a `tokenizer.json` says about its added tokens.
#[derive(Deserialize)]
struct Declared {
    #[serde(default)]
    added_tokens: Vec<DeclaredToken>,
}

#[derive(Deserialize)]
struct DeclaredToken {
    id: u32,
    content: String,
}

impl Tokenizer {
    /// Reads the tokenizer of a folder in Hugging Face layout.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join(TOKENIZER);
        let tokenizer = Self::from_json(&base::files::read_to_string(&path)?).map_err(|error| error.in_file(&path))?;
        let mut named = [None, None, None];
        let mut adds_bos = None;
        for file in [CONFIG, SPECIAL_MAP] {
            let Some(config) = read_object(&folder.join(file))? else { continue };
            let class = config.get("tokenizer_class").and_then(Value::as_str);
            if file == CONFIG && class.is_some_and(|class| OWN_BOS.contains(&class)) {
                adds_bos = config.get("add_bos_token").and_then(Value::as_bool);
            }
            for (token, key) in named.iter_mut().zip(["bos_token", "eos_token", "pad_token"]) {
                let name = config.get(key).and_then(|value| value.as_str().or_else(|| value.get("content")?.as_str()));
                if let (None, Some(name)) = (&token, name) {
                    let id = tokenizer.id(name).ok_or_else(|| {
                        Error::malformed(
                            format!("{}: {key}", folder.join(file).display()),
                            format!("{name:?} is not in the vocabulary"),
                        )
                    })?;
                    *token = Some(id);
                }
            }
        }
        let [bos, eos, pad] = named;
        let tokenizer = tokenizer.with_special_ids(bos, eos, pad)?;
        match adds_bos {
            Some(adds_bos) if adds_bos != tokenizer.adds_bos => tokenizer.with_bos_added(adds_bos),
            _ => Ok(tokenizer),
        }
    }

    /// Reads a `tokenizer.json`. It does not say which tokens begin and end a sequence:
    /// [`Tokenizer::with_special_ids`] does.
    pub fn from_json(json: &str) -> Result<Self> {
        let declared: Declared = serde_json::from_str(json).map_err(|error| Error::malformed(TOKENIZER, error))?;
        let mut inner = guard(|| tokenizers::Tokenizer::from_bytes(json))
            .and_then(|read| read.map_err(|error| error.to_string()))
            .map_err(|reason| Error::malformed(TOKENIZER, reason))?;
        if let Some(token) =
            declared.added_tokens.iter().find(|token| inner.token_to_id(&token.content) != Some(token.id))
        {
            return Err(Error::malformed(
                format!("{TOKENIZER}: added_tokens"),
                format!("{:?} has id {}, which is not the next free one", token.content, token.id),
            ));
        }
        // Cutting and padding are decisions of whoever asks for tokens.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| Error::malformed(TOKENIZER, error))?;
        inner.set_encode_special_tokens(true);

        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        if vocab_size == 0 || vocab_size > MAX_VOCABULARY {
            return Err(Error::malformed(TOKENIZER, format!("a vocabulary of {vocab_size} tokens")));
        }
        let special = inner.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special).collect();
        let continuing = continuing(&inner)?.map(Box::new);
        Ok(Self {
            special: SpecialTokens::new(special)?,
            continuing,
            inner,
            bos: None,
            eos: None,
            pad: None,
            adds_bos: false,
            vocab_size,
        })
    }

    /// Names the tokens that begin, end and pad a sequence. They are special from here on.
    pub fn with_special_ids(mut self, bos: Option<u32>, eos: Option<u32>, pad: Option<u32>) -> Result<Self> {
        let mut added = Vec::new();
        for id in [bos, eos, pad].into_iter().flatten() {
            let Some(content) = self.inner.id_to_token(id) else {
                let reason = format!("{id} is not in the vocabulary of {} tokens", self.vocab_size);
                return Err(Error::malformed("special token", reason));
            };
            if !self.is_special(id) {
                added.push(AddedToken::from(content, true).normalized(false));
            }
        }
        if !added.is_empty() {
            for inner in std::iter::once(&mut self.inner).chain(self.continuing.as_deref_mut()) {
                inner.add_special_tokens(added.iter().cloned()).map_err(|error| Error::malformed(TOKENIZER, error))?;
            }
            let special =
                self.inner.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special).collect();
            self.special = SpecialTokens::new(special)?;
        }
        (self.bos, self.eos, self.pad) = (bos, eos, pad);
        let probe = guard(|| self.inner.encode_fast("", true))
            .and_then(|encoded| encoded.map_err(|error| error.to_string()))
            .map_err(|reason| Error::malformed(TOKENIZER, reason))?;
        self.adds_bos = bos.is_some() && probe.get_ids().first() == bos.as_ref();
        Ok(self)
    }

    /// With rules that put the begin of sequence, if there is one, in front of a text, or that put nothing around it.
    fn with_bos_added(mut self, adds: bool) -> Result<Self> {
        let bos = self.bos.filter(|_| adds).and_then(|id| Some((id, self.token(id)?)));
        let rules = bos.as_ref().map(|(id, token)| serde_json::from_value(begin_of_sequence(token, *id)));
        let rules: Option<PostProcessorWrapper> =
            rules.transpose().map_err(|error| Error::malformed(TOKENIZER, error))?;
        self.inner.with_post_processor(rules);
        self.adds_bos = bos.is_some();
        Ok(self)
    }

    /// The tokenizer of a model with so many embeddings. Added tokens beyond them, of which such a model can make nothing, are found in no
    /// text: their names are ordinary text.
    ///
    /// # Errors
    /// Ordinary tokens beyond them, or one that begins, ends or pads a sequence.
    pub(crate) fn with_embeddings(mut self, rows: usize) -> Result<Self> {
        if self.vocab_size <= rows {
            return Ok(self);
        }
        let ordinary = self.inner.get_vocab(false).values().max().map_or(0, |&id| id as usize + 1);
        if ordinary > rows {
            return Err(Error::malformed("tokenizer", format!("{ordinary} tokens, but the embedding has {rows} rows")));
        }
        for (name, id) in [("bos_token", self.bos), ("eos_token", self.eos), ("pad_token", self.pad)] {
            if let Some(id) = id.filter(|&id| id as usize >= rows) {
                let reason = format!("token {id} is outside the embedding of {rows} rows");
                return Err(Error::malformed(format!("tokenizer: {name}"), reason));
            }
        }
        let beyond = |id: u32| id as usize >= rows;
        let added = self.inner.get_added_tokens_decoder();
        let plain = added.iter().filter(|(id, token)| beyond(**id) && !token.special);
        // Special tokens are looked for by this type alone.
        let hidden: Vec<AddedToken> = plain.map(|(_, token)| AddedToken { special: true, ..token.clone() }).collect();
        for inner in std::iter::once(&mut self.inner).chain(self.continuing.as_deref_mut()) {
            inner.add_special_tokens(hidden.iter().cloned()).map_err(|error| Error::malformed(TOKENIZER, error))?;
        }
        self.special =
            SpecialTokens::new(added.into_iter().filter(|(id, token)| token.special && !beyond(*id)).collect())?;
        self.vocab_size = rows;
        Ok(self)
    }

    /// The `tokenizer.json` of this tokenizer, which [`Tokenizer::from_json`] reads back to the same.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|error| Error::malformed(TOKENIZER, error))
    }

    /// The `tokenizer_config.json` that goes with it.
    pub fn config_json(&self, chat_template: Option<&str>) -> Value {
        let name = |id: Option<u32>| id.and_then(|id| self.token(id));
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.adds_bos,
            "bos_token": name(self.bos),
            "eos_token": name(self.eos),
            "pad_token": name(self.pad),
            "clean_up_tokenization_spaces": false,
        });
        if let Some(template) = chat_template {
            config["chat_template"] = template.into();
        }
        config
    }

    /// Writes both files to a folder.
    pub fn save(&self, folder: &Path, chat_template: Option<&str>) -> Result<()> {
        base::files::write(&folder.join(TOKENIZER), self.to_json()?.as_bytes())?;
        let config = format!("{:#}\n", self.config_json(chat_template));
        Ok(base::files::write(&folder.join(CONFIG), config.as_bytes())?)
    }
}

/// The tokenizer for text that continues a sequence, when the rules put something in front of a sequence only.
fn continuing(inner: &tokenizers::Tokenizer) -> Result<Option<tokenizers::Tokenizer>> {
    let malformed = |error: serde_json::Error| Error::malformed(TOKENIZER, error);
    let mut rules = serde_json::to_value(inner.get_pre_tokenizer()).map_err(malformed)?;
    if !never_prepend(&mut rules) {
        return Ok(None);
    }
    let mut inner = inner.clone();
    let rules: tokenizers::PreTokenizerWrapper = serde_json::from_value(rules).map_err(malformed)?;
    inner.with_pre_tokenizer(Some(rules));
    Ok(Some(inner))
}

/// Turns every `"prepend_scheme": "first"` to `"never"`; whether there was one.
fn never_prepend(rules: &mut Value) -> bool {
    match rules {
        Value::Object(fields) => fields.iter_mut().fold(false, |changed, (key, value)| {
            if key == "prepend_scheme" && value == "first" {
                *value = "never".into();
                true
            } else {
                never_prepend(value) || changed
            }
        }),
        Value::Array(items) => items.iter_mut().fold(false, |changed, item| changed | never_prepend(item)),
        _ => false,
    }
}

/// An entry of the `added_tokens` of a `tokenizer.json`.
pub(super) fn added_token(id: u32, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": special,
    })
}

/// The post-processor that puts one token in front of a text.
pub(super) fn begin_of_sequence(token: &str, id: u32) -> Value {
    json!({
        "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": token, "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [
            { "SpecialToken": { "id": token, "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } },
            { "SpecialToken": { "id": token, "type_id": 1 } }, { "Sequence": { "id": "B", "type_id": 1 } },
        ],
        "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
    })
}

/// Reads a JSON file that may be absent.
pub(crate) fn read_object(path: &Path) -> Result<Option<serde_json::Map<String, Value>>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = base::files::read_to_string(path)?;
    serde_json::from_str(&text).map(Some).map_err(|error| Error::malformed(path.display(), error))
}
