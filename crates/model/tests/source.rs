//! A model from a name, a folder or a file, and back to a folder.

use std::fs;
use std::path::Path;

use base::Hint;
use posttrain_model::source::{Loaded, load};
use posttrain_model::tokenizer::Tokenizer;
use posttrain_model::weights::safetensors::Dtype;
use posttrain_model::{Decoder, Family, ModelConfig, hub, save};
use serde_json::{Value, json};

fn loaded(path: &Path) -> posttrain_model::Result<Loaded> {
    load(path.to_str().unwrap(), &mut |progress| panic!("nothing to fetch: {progress:?}"))
}

/// A preset with drawn weights, saved to `folder`.
fn saved(name: &str, folder: &Path) -> Loaded {
    let mut loaded = load(name, &mut |_| {}).unwrap();
    assert!(loaded.weights.is_none());
    let tensors = Decoder::random(loaded.config.clone(), 1).unwrap().tensors();
    let Loaded { config, tokenizer, chat_template, .. } = &loaded;
    save::model(folder, config, &tensors, Dtype::F32, tokenizer, chat_template.as_ref()).unwrap();
    loaded.weights = Some(Box::new(tensors));
    loaded
}

#[test]
fn every_preset_survives_the_way_through_a_folder() {
    for family in Family::ALL {
        let folder = tempfile::tempdir().unwrap();
        let before = saved(&format!("tiny-{family}"), folder.path());
        let after = loaded(folder.path()).unwrap();
        assert_eq!(after.config, before.config, "{family}");
        let weights = |loaded: &Loaded| loaded.weights.as_ref().unwrap().tensors().unwrap();
        assert!(weights(&after) == weights(&before), "{family}: weights differ");
        assert_eq!(after.tokenizer.to_json().unwrap(), before.tokenizer.to_json().unwrap());
        let source = |loaded: &Loaded| loaded.chat_template.as_ref().map(|template| template.source().to_owned());
        assert_eq!(source(&after), source(&before));

        let copy = tempfile::tempdir().unwrap();
        saved(&format!("tiny-{family}"), copy.path());
        assert_eq!(
            loaded(copy.path()).unwrap().sha256.get().unwrap(),
            after.sha256.get().unwrap(),
            "{family}: the hash depends on the contents only"
        );
    }
}

#[test]
fn a_folder_that_is_not_a_model_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let message = |path: &Path| loaded(path).map(|_| ()).unwrap_err().to_string();
    assert!(message(path).contains("config.json"), "{}", message(path));
    fs::write(path.join("adapter_config.json"), "{}").unwrap();
    assert!(message(path).contains("a LoRA adapter as a model"), "{}", message(path));
    saved("tiny-llama", path);
    assert!(loaded(path).is_ok());

    fs::write(path.join("generation_config.json"), r#"{"eos_token_id": [5, 257]}"#).unwrap();
    assert_eq!(loaded(path).unwrap().config.eos_token_ids, [257, 5]);
    fs::write(path.join("generation_config.json"), r#"{"eos_token_id": "x"}"#).unwrap();
    assert!(message(path).contains("generation_config.json: eos_token_id: expected"), "{}", message(path));
    fs::remove_file(path.join("generation_config.json")).unwrap();

    let config = ModelConfig::tiny(Family::Llama, 100).to_json().to_string();
    fs::write(path.join("config.json"), config).unwrap();
    assert!(message(path).contains("expected shape [100, 64], found [259, 64]"), "{}", message(path));
    fs::write(path.join("config.json"), "{").unwrap();
    assert!(message(path).contains("config.json: JSON"), "{}", message(path));
}

/// Changes a JSON file of a folder.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Gemma 3's text models have a token for images, id 262144, and 262144 embeddings.
#[test]
fn added_tokens_beyond_the_embedding_are_ordinary_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let rows = saved("tiny-llama", path).config.vocab_size;
    let (tokens, config) = (path.join("tokenizer.json"), path.join("tokenizer_config.json"));
    let untouched = fs::read_to_string(&tokens).unwrap();
    let add = |id: usize, content: &str, special: bool| {
        let token = json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special,
        });
        edit(&tokens, |json| json["added_tokens"].as_array_mut().unwrap().push(token));
    };
    add(rows, "<image>", true);
    add(rows + 1, "<fill>", false);
    let Loaded { tokenizer, chat_template, .. } = loaded(path).unwrap();
    assert_eq!(tokenizer.vocab_size(), rows);
    let text = "a<image><fill><|im_end|>";
    let expected: Vec<u32> = "a<image><fill>".bytes().map(u32::from).chain([257]).collect();
    assert_eq!(tokenizer.encode_with_special(text).unwrap(), expected);
    assert!(tokenizer.encode(text).unwrap().iter().all(|&id| id < 256));
    // As it was saved, so it is read.
    let again = tempfile::tempdir().unwrap();
    save::tokenizer(again.path(), &tokenizer, chat_template.as_ref()).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(path.join(file), again.path().join(file)).unwrap();
    }
    assert_eq!(loaded(again.path()).unwrap().tokenizer.encode_with_special(text).unwrap(), expected);

    let message = || loaded(path).map(|_| ()).unwrap_err().to_string();
    edit(&config, |json| json["eos_token"] = "<image>".into());
    assert!(message().contains("eos_token: token 259 is outside the embedding of 259 rows"), "{}", message());
    edit(&config, |json| json["eos_token"] = "<|im_end|>".into());
    fs::write(&tokens, untouched).unwrap();
    edit(&tokens, |json| {
        let vocabulary = &mut json["model"]["vocab"];
        for (token, id) in [("<|im_start|>", 256), ("<|im_end|>", 257), ("<|pad|>", 258), ("ab", rows)] {
            vocabulary[token] = id.into();
        }
    });
    assert!(message().contains("260 tokens, but the embedding has 259 rows"), "{}", message());
}

#[test]
fn the_hash_covers_every_file_that_decides_what_a_model_is() {
    let folder = tempfile::tempdir().unwrap();
    saved("tiny-llama", folder.path());
    let hash = || loaded(folder.path()).unwrap().sha256.get().unwrap();
    let mut seen = vec![hash()];
    for (file, text) in [
        ("special_tokens_map.json", r#"{"unk_token": "<|pad|>"}"#),
        ("generation_config.json", "{}"),
        ("model.safetensors.index.json", "{}"),
        ("chat_template.jinja", "other"),
        ("tokenizer_config.json", "{}"),
    ] {
        fs::write(folder.path().join(file), text).unwrap();
        assert!(!seen.contains(&hash()), "{file}");
        seen.push(hash());
    }
    fs::write(folder.path().join("README.md"), "x").unwrap();
    assert!(seen.contains(&hash()), "notes do not count");
}

/// A folder's tokenizer of a class whose `add_bos_token` decides, whatever the rules of the file say.
#[test]
fn the_class_of_a_llama_tokenizer_decides_about_the_begin_of_sequence() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    saved("tiny-llama", path);
    let config = path.join("tokenizer_config.json");
    let adds = |class: &str, adds: Value| {
        edit(&config, |json| {
            json["bos_token"] = "<|im_start|>".into();
            json["tokenizer_class"] = class.into();
            json["add_bos_token"] = adds;
        });
        Tokenizer::from_folder(path).unwrap()
    };
    assert!(!adds("LlamaTokenizerFast", Value::Null).adds_bos(), "the rules decide");
    assert!(!adds("PreTrainedTokenizerFast", true.into()).adds_bos(), "the rules decide");
    let tokenizer = adds("LlamaTokenizerFast", true.into());
    assert!(tokenizer.adds_bos());
    assert_eq!(tokenizer.encode("a").unwrap(), [97], "whoever encodes puts it there");
    // The rules of the file say the same once it was saved.
    save::tokenizer(path, &tokenizer, None).unwrap();
    assert!(Tokenizer::from_folder(path).unwrap().adds_bos());
    assert!(!adds("LlamaTokenizer", false.into()).adds_bos());
    assert!(adds("GPT2Tokenizer", false.into()).adds_bos(), "the rules decide");
}

#[test]
fn an_unknown_name_suggests_the_nearest() {
    let error = loaded("smollm2-135m-instuct".as_ref()).unwrap_err();
    assert!(error.to_string().contains("no model named \"smollm2-135m-instuct\""), "{error}");
    assert_eq!(error.hint().as_deref(), Some("did you mean smollm2-135m-instruct?"));
}

#[test]
fn smollm2_is_what_it_should_be() {
    const NAME: &str = "smollm2-135m-instruct";
    if hub::cached(NAME).is_none() {
        println!("skipped: {NAME} is not cached");
        return;
    }
    let loaded = loaded(NAME.as_ref()).unwrap();
    assert_eq!(loaded.config.parameter_count(), 134_515_008);
    assert_eq!((loaded.config.layer_count(), loaded.config.vocab_size), (30, 49_152));
    assert_eq!((loaded.config.bos_token_id, loaded.config.eos_token_ids), (Some(1), vec![2]));
    assert_eq!(loaded.tokenizer.vocab_size(), 49_152);
    assert!(loaded.chat_template.is_some());
    let tensors = loaded.weights.unwrap().tensors().unwrap();
    // The first values as the Python package `gguf` dequantises them, rows put back as the converter found them.
    let query = &tensors["model.layers.3.self_attn.q_proj.weight"];
    assert_eq!(query.data[..4], [0.077_911_38, 0.152_801_51, -0.109_313_965, -0.034_423_828]);
}
