//! Tokenizers against the `tokenizers` library of Python (tests/reference/tokens.py), and their promises.

use std::path::Path;

use posttrain_model::tokenizer::Tokenizer;
use posttrain_model::weights::gguf::{Metadata, Value};
use proptest::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    text: String,
    ordinary: Vec<u32>,
    parsed: Option<Vec<u32>>,
}

/// SmolLM2's tokenizer, when the model is cached.
fn smollm2() -> Option<Tokenizer> {
    let name = "smollm2-135m-instruct";
    let Some(path) = posttrain_model::hub::cached(name) else {
        eprintln!("skipped: {name} is not cached");
        return None;
    };
    let gguf = posttrain_model::weights::gguf::read(&path).unwrap();
    Some(Tokenizer::from_gguf(gguf.metadata()).unwrap())
}

#[test]
fn smollm2_gives_the_reference_tokens() {
    let Some(tokenizer) = smollm2() else { return };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/tokens.json");
    let cases: Vec<Case> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let reloaded = Tokenizer::from_json(&tokenizer.to_json().unwrap()).unwrap();
    for tokenizer in [&tokenizer, &reloaded] {
        for case in &cases {
            assert_eq!(tokenizer.encode(&case.text).unwrap(), case.ordinary, "{:?}", case.text);
            let parsed = case.parsed.as_ref().unwrap_or(&case.ordinary);
            assert_eq!(&tokenizer.encode_with_special(&case.text).unwrap(), parsed, "{:?}", case.text);
            assert_eq!(tokenizer.decode(&case.ordinary), case.text);
            assert_eq!(tokenizer.decode_with_special(parsed), case.text);
        }
    }
    assert!(cases.iter().filter(|case| case.parsed.is_some()).count() >= 3);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (Some(1), Some(2), Some(2)));
    assert_eq!((tokenizer.vocab_size(), tokenizer.adds_bos()), (49152, false));
    assert_eq!(tokenizer.id("<|im_end|>"), Some(2));
}

#[test]
fn a_saved_tokenizer_reads_back_to_the_same_files() {
    let folder = tempfile::tempdir().unwrap();
    let again = tempfile::tempdir().unwrap();
    for tokenizer in
        [Some(Tokenizer::bytes().unwrap()), smollm2(), Some(sentence_piece(true)), Some(sentence_piece(false))]
            .into_iter()
            .flatten()
    {
        tokenizer.save(folder.path(), Some("{{ messages }}")).unwrap();
        let read = Tokenizer::from_folder(folder.path()).unwrap();
        read.save(again.path(), Some("{{ messages }}")).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let text = |folder: &tempfile::TempDir| std::fs::read_to_string(folder.path().join(file)).unwrap();
            assert_eq!(text(&folder), text(&again));
        }
        assert_eq!((read.bos(), read.eos(), read.pad()), (tokenizer.bos(), tokenizer.eos(), tokenizer.pad()));
        assert_eq!((read.adds_bos(), read.vocab_size()), (tokenizer.adds_bos(), tokenizer.vocab_size()));
    }
}

#[test]
fn bytes_are_their_own_tokens() {
    let tokenizer = Tokenizer::bytes().unwrap();
    let text: String = (0..=0x2ff).filter_map(char::from_u32).chain("漢🙂".chars()).collect();
    let expected: Vec<u32> = text.bytes().map(u32::from).collect();
    assert_eq!(tokenizer.encode(&text).unwrap(), expected);
    assert_eq!(tokenizer.decode(&expected), text);
    assert_eq!(tokenizer.encode_with_special("a<|im_end|>").unwrap(), [97, 257]);
    assert_eq!(tokenizer.encode("<|im_end|>").unwrap().len(), 10);
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos(), tokenizer.pad()), (259, Some(257), Some(258)));
}

/// A small vocabulary in the form of LLaMA 2 (which puts a space and `<s>` in front) or Gemma (which does neither).
fn sentence_piece(llama: bool) -> Tokenizer {
    const NORMAL: i64 = 1;
    let mut pieces = vec![("<unk>".to_owned(), 0.0, 2), ("<s>".to_owned(), 0.0, 3), ("</s>".to_owned(), 0.0, 3)];
    pieces.extend((0..=255u8).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6)));
    let words = ["▁t", "he", "▁the", "er", "in", "▁a", "▁▁", "the", "th"];
    pieces.extend(words.iter().zip(1..).map(|(word, rank)| ((*word).to_owned(), -f64::from(rank), NORMAL)));
    let letters = "▁abcdefghijklmnopqrstuvwxyz".chars().zip(100..);
    pieces.extend(letters.map(|(letter, rank)| (letter.to_string(), -f64::from(rank), NORMAL)));
    let metadata = [
        ("model", Value::Text("llama".into())),
        ("tokens", Value::Texts(pieces.iter().map(|piece| piece.0.clone()).collect())),
        ("scores", Value::Floats(pieces.iter().map(|piece| piece.1).collect())),
        ("token_type", Value::Integers(pieces.iter().map(|piece| piece.2).collect())),
        ("bos_token_id", Value::Unsigned(1)),
        ("eos_token_id", Value::Unsigned(2)),
        ("add_bos_token", Value::Bool(llama)),
        ("add_space_prefix", Value::Bool(llama)),
    ];
    let metadata = metadata.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    Tokenizer::from_gguf(&Metadata(metadata)).unwrap()
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let tokenizer = sentence_piece(true);
    let tokens = |ids: Vec<u32>| ids.into_iter().map(|id| tokenizer.token(id).unwrap()).collect::<Vec<_>>();
    // "▁t" scores best, then "he", then both make "▁the".
    assert_eq!(tokens(tokenizer.encode("the thin").unwrap()), ["▁the", "▁t", "h", "in"]);
    assert_eq!(tokens(tokenizer.encode("é").unwrap()), ["▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(tokens(tokenizer.encode("a</s>").unwrap())[..2], ["▁a", "<0x3C>"]);
    assert_eq!(tokens(tokenizer.encode_with_special("<s>a</s>").unwrap()), ["<s>", "▁a", "</s>"]);
    for text in ["the thin hat", "  two", "naïve 🙂 日本"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()), text);
    }
    assert!(tokenizer.adds_bos());
    let gemma = sentence_piece(false);
    assert_eq!(gemma.token(gemma.encode("the").unwrap()[0]).unwrap(), "the");
    assert!(!gemma.adds_bos());
}

#[test]
fn only_the_start_of_a_sequence_gets_a_space() {
    let json = r#"{
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true},
        "model": {"type": "BPE", "vocab": {"<s>": 0, "▁": 1, "a": 2, "▁a": 3}, "merges": [["▁", "a"]]}
    }"#;
    let tokenizer = Tokenizer::from_json(json).unwrap();
    assert_eq!(tokenizer.encode("a a").unwrap(), [3, 3]);
    assert_eq!(tokenizer.encode_with_special("<s>a a").unwrap(), [0, 2, 3]);
}

#[test]
fn special_tokens_in_the_model_s_own_vocabulary_stay_text() {
    let json = r#"{
        "added_tokens": [{"id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false,
                  "vocab": [["<unk>", 0.0], ["</s>", -1.0], ["<", -2.0], ["/", -2.0], ["s", -2.0], [">", -2.0], ["a", -2.0]]}
    }"#;
    let tokenizer = Tokenizer::from_json(json).unwrap();
    assert_eq!(tokenizer.encode("a</s>").unwrap(), [6, 2, 3, 4, 5]);
    assert_eq!(tokenizer.encode_with_special("a</s>").unwrap(), [6, 1]);
}

#[test]
fn metadata_errors_name_the_key() {
    let error = |edit: &dyn Fn(&mut Metadata)| {
        let mut metadata = Metadata::default();
        metadata.0.insert("tokenizer.ggml.model".into(), Value::Text("gpt2".into()));
        metadata.0.insert("tokenizer.ggml.pre".into(), Value::Text("smollm".into()));
        metadata.0.insert("tokenizer.ggml.tokens".into(), Value::Texts(["a", "b", "ab"].map(String::from).to_vec()));
        metadata.0.insert("tokenizer.ggml.merges".into(), Value::Texts(vec!["a b".into()]));
        edit(&mut metadata);
        Tokenizer::from_gguf(&metadata).map(|_| ()).map_err(|error| error.to_string())
    };
    let set = |key: &'static str, value: Value| {
        move |metadata: &mut Metadata| drop(metadata.0.insert(format!("tokenizer.ggml.{key}"), value.clone()))
    };
    assert_eq!(error(&|_| ()), Ok(()));
    for (key, value, part) in [
        ("model", Value::Text("bert".into()), "bert"),
        ("pre", Value::Text("martian".into()), "martian"),
        ("tokens", Value::Texts(vec!["a".into(), "a".into()]), "twice"),
        ("merges", Value::Texts(vec!["ab".into()]), "merges[0]"),
        ("merges", Value::Texts(vec!["a c".into()]), "c"),
        ("eos_token_id", Value::Unsigned(3), "eos_token_id"),
        ("token_type", Value::Integers(vec![1]), "token_type"),
        ("tokens", Value::Unsigned(1), "tokens"),
    ] {
        let message = error(&set(key, value)).unwrap_err();
        assert!(message.contains(part), "{key}: {message}");
    }
}

/// What llama.cpp does where a file says nothing about it.
#[test]
fn rules_of_llama_3_put_the_begin_of_sequence_in_front() {
    let adds_bos = |name: &str, said: Option<bool>| {
        let texts = |texts: &[&str]| Value::Texts(texts.iter().map(|&text| text.into()).collect());
        let mut metadata = vec![
            ("model", Value::Text("gpt2".into())),
            ("pre", Value::Text(name.into())),
            ("tokens", texts(&["<|begin_of_text|>", "a", "b", "ab"])),
            ("merges", texts(&["a b"])),
            ("bos_token_id", Value::Unsigned(0)),
        ];
        metadata.extend(said.map(|adds| ("add_bos_token", Value::Bool(adds))));
        let metadata = metadata.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
        Tokenizer::from_gguf(&Metadata(metadata)).unwrap().adds_bos()
    };
    for name in ["llama3", "llama-v3", "llama-bpe", "falcon3"] {
        assert!(adds_bos(name, None), "{name}");
        assert!(!adds_bos(name, Some(false)), "{name}");
    }
    for name in ["smollm", "qwen2", "default"] {
        assert!(!adds_bos(name, None), "{name}");
        assert!(adds_bos(name, Some(true)), "{name}");
    }
}

/// All of the stream's text: what came piece by piece, then what was held back.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.decode_stream();
    let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
    text.push_str(&stream.finish());
    text
}

#[test]
fn streams_hold_back_incomplete_characters() {
    let tokenizer = Tokenizer::bytes().unwrap();
    let mut stream = tokenizer.decode_stream();
    let pieces: Vec<String> = "é🙂a".bytes().map(|byte| stream.push(byte.into())).collect();
    assert_eq!(pieces, ["", "é", "", "", "", "🙂", "a"]);
    assert_eq!(stream.finish(), "");
    let mut stream = tokenizer.decode_stream();
    assert_eq!(
        (stream.push(0xf0), stream.push(0x9f), stream.finish().as_str()),
        (String::new(), String::new(), "\u{fffd}")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_text_survives_encoding_and_decoding(text in any::<String>()) {
        let tokenizer = Tokenizer::bytes().unwrap();
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert!(ids.iter().all(|&id| id < 256));
        prop_assert_eq!(tokenizer.decode(&ids), text);
    }

    #[test]
    fn streams_join_to_the_whole(ids in prop::collection::vec(0u32..259, 0..60)) {
        let tokenizer = Tokenizer::bytes().unwrap();
        prop_assert_eq!(streamed(&tokenizer, &ids), tokenizer.decode(&ids));
    }

    #[test]
    fn streams_of_sentence_pieces_join_to_the_whole(text in any::<String>(), ids in prop::collection::vec(0u32..290, 0..60)) {
        let tokenizer = sentence_piece(true);
        let encoded = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(streamed(&tokenizer, &encoded), tokenizer.decode(&encoded));
        // Broken bytes in between may show otherwise, but nothing whole is lost.
        let letters = |text: &str| text.chars().filter(char::is_ascii_lowercase).count();
        prop_assert!(letters(&streamed(&tokenizer, &ids)) >= letters(&tokenizer.decode(&ids)));
    }

    #[test]
    fn damaged_tokenizer_files_never_panic(position in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
        let mut json = sentence_piece(true).to_json().unwrap().into_bytes();
        let position = position.index(json.len());
        if cut {
            json.truncate(position);
        } else {
            json[position] = byte;
        }
        if let Ok(text) = String::from_utf8(json)
            && let Ok(tokenizer) = Tokenizer::from_json(&text)
        {
            let ids = tokenizer.encode("the thin hat <s> é").unwrap_or_default();
            tokenizer.decode(&ids);
        }
    }
}
