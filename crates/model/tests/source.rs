//! A model from a name, a folder or a file, and back to a folder.

use std::fs;
use std::path::Path;

use base::Hint;
use posttrain_model::source::{Loaded, load};
use posttrain_model::weights::safetensors::Dtype;
use posttrain_model::{Decoder, Family, ModelConfig, hub, save};

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
