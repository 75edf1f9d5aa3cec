//! Safetensors there and back, shards, and files that lie.

use std::fs;
use std::sync::LazyLock;

use posttrain_model::weights::safetensors::{self, Dtype, INDEX};
use posttrain_model::weights::{self, Tensor, Tensors};
use posttrain_model::{Family, ModelConfig};
use proptest::prelude::*;
use serde_json::json;

fn some() -> Tensors {
    let values = vec![1.0, -2.5, 1e-30, f32::MIN_POSITIVE, 0.1, -0.0];
    [("a.weight", vec![2, 3]), ("b", vec![6]), ("c", vec![1, 6, 1])]
        .map(|(name, shape)| (name.to_owned(), Tensor::new(shape, values.clone())))
        .into()
}

fn bits(tensors: &Tensors) -> Vec<(&String, &[usize], Vec<u32>)> {
    let bits = |tensor: &Tensor| tensor.data.iter().map(|value| value.to_bits()).collect();
    tensors.iter().map(|(name, tensor)| (name, tensor.shape.as_slice(), bits(tensor))).collect()
}

#[test]
fn single_precision_comes_back_bit_for_bit_and_writing_is_reproducible() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("model.safetensors"), folder.path().join("two.safetensors"));
    safetensors::write(&one, &some(), Dtype::F32).unwrap();
    safetensors::write(&two, &safetensors::read(folder.path()).unwrap(), Dtype::F32).unwrap();
    assert_eq!(bits(&safetensors::read(&two).unwrap()), bits(&some()));
    assert_eq!(fs::read(one).unwrap(), fs::read(two).unwrap());
}

#[test]
fn half_precisions_round_to_the_nearest_even() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let tensors: Tensors =
        [("x".to_owned(), Tensor::new(vec![3], vec![0.1, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]))].into();
    safetensors::write(&path, &tensors, Dtype::Bf16).unwrap();
    assert_eq!(safetensors::read(&path).unwrap()["x"].data, [0.100_097_656, 1.0, 1.015_625]);
    safetensors::write(&path, &tensors, Dtype::F16).unwrap();
    assert_eq!(safetensors::read(&path).unwrap()["x"].data, [0.099_975_586, 1.003_906_3, 1.011_718_8]);
    let large: Tensors = [("x".to_owned(), Tensor::new(vec![1], vec![1e5]))].into();
    let error = safetensors::write(&path, &large, Dtype::F16).unwrap_err().to_string();
    assert!(error.contains("tensor x: 100000 does not fit"), "{error}");
}

/// Two shards under an index that `spoil` may change.
fn shards(spoil: impl FnOnce(&mut serde_json::Value)) -> posttrain_model::Result<Tensors> {
    let folder = tempfile::tempdir().unwrap();
    let mut index = json!({ "metadata": { "total_size": 72 }, "weight_map": {} });
    let all = some();
    for (number, names) in [(1, vec!["a.weight", "c"]), (2, vec!["b"])] {
        let file = format!("model-0000{number}-of-00002.safetensors");
        let part: Tensors = names.iter().map(|&name| (name.to_owned(), all[name].clone())).collect();
        safetensors::write(&folder.path().join(&file), &part, Dtype::F32).unwrap();
        names.iter().for_each(|&name| index["weight_map"][name] = file.clone().into());
    }
    spoil(&mut index);
    fs::write(folder.path().join(INDEX), index.to_string()).unwrap();
    safetensors::read(folder.path())
}

#[test]
fn shards_are_joined_and_must_match_the_index() {
    assert_eq!(bits(&shards(|_| {}).unwrap()), bits(&some()));
    let cases = [
        (
            shards(|index| index["weight_map"]["d"] = "model-00002-of-00002.safetensors".into()),
            "tensor d: missing from",
        ),
        (shards(|index| index["weight_map"]["b"] = "../b.safetensors".into()), "expected a plain file name"),
        (shards(|index| index["weight_map"]["b"] = "absent.safetensors".into()), "absent.safetensors"),
        (shards(|index| index["weight_map"]["c"] = "model-00002-of-00002.safetensors".into()), "but the index says"),
        (
            shards(|index| {
                index["weight_map"].as_object_mut().unwrap().remove("c");
            }),
            "but not in",
        ),
        (shards(|index| *index = json!([])), INDEX),
    ];
    for (read, expected) in cases {
        let message = read.unwrap_err().to_string();
        assert!(message.contains(expected), "{expected:?} in {message:?}");
    }
}

/// A file with this header and so many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn headers_that_lie_are_refused() {
    let tensor = |dtype: &str, shape: &str, end: u64| {
        format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}"#)
    };
    assert!(safetensors::from_bytes(file(&tensor("F32", "[2]", 8), 8)).is_ok());
    let cases = [
        (file(&tensor("F32", "[2]", 8), 7), "8 bytes claimed after the header, found 7"),
        (file(&tensor("F32", "[2]", 8), 9), "8 bytes claimed after the header, found 9"),
        (file(&tensor("F32", "[3]", 8), 8), "header"),
        (file(&tensor("F32", "[1125899906842624]", 1 << 52), 8), "claimed after the header"),
        (file(&tensor("F32", "[4294967296,4294967296,4294967296]", 8), 8), "header"),
        (file(&tensor("I64", "[1]", 8), 8), "tensor x of type I64"),
        (file(&tensor("F8_E4M3", "[8]", 8), 8), "tensor x of type F8_E4M3"),
        (file(&tensor("nonsense", "[8]", 8), 8), "header"),
        (file("[", 0), "header"),
        (u64::MAX.to_le_bytes().to_vec(), "a header of 18446744073709551615 bytes claimed"),
        (vec![1, 2, 3], "ends early"),
    ];
    for (file, expected) in cases {
        let message = safetensors::from_bytes(file).unwrap_err().to_string();
        assert!(message.contains(expected), "{expected:?} in {message:?}");
    }
}

#[test]
fn weights_must_be_exactly_those_of_the_model() {
    let config = ModelConfig::tiny(Family::Llama, 100);
    let ones = |shape: Vec<usize>| Tensor::new(shape.clone(), vec![1.0; shape.iter().product()]);
    let tensors: Tensors = config.tensor_shapes().into_iter().map(|(name, shape)| (name, ones(shape))).collect();
    let checked = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        weights::check(&config, &tensors).map_err(|error| error.to_string())
    };
    assert_eq!(checked(&|_| {}), Ok(()));
    // A copy of a tied head, and frequencies that the configuration gives, may be there.
    let embedding = &tensors["model.embed_tokens.weight"];
    assert_eq!(checked(&|tensors| drop(tensors.insert("lm_head.weight".into(), embedding.clone()))), Ok(()));
    let frequencies = Tensor::new(vec![8], vec![0.0; 8]);
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    assert_eq!(checked(&|tensors| drop(tensors.insert(name.into(), frequencies.clone()))), Ok(()));
    let other = Tensor::new(embedding.shape.clone(), vec![0.0; embedding.data.len()]);
    let cases = [
        (checked(&|tensors| drop(tensors.remove("model.norm.weight"))), "model.norm.weight: missing"),
        (
            checked(&|tensors| drop(tensors.insert("model.norm.weight".into(), frequencies.clone()))),
            "expected shape [64], found [8]",
        ),
        (
            checked(&|tensors| drop(tensors.insert("lm_head.weight".into(), other.clone()))),
            "lm_head.weight: not part of a llama",
        ),
    ];
    for (result, expected) in cases {
        let message = result.unwrap_err();
        assert!(message.contains(expected), "{expected:?} in {message:?}");
    }
}

/// A sound file, to be spoilt.
static SOUND: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    safetensors::write(&path, &some(), Dtype::F32).unwrap();
    fs::read(path).unwrap()
});

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn spoilt_files_never_panic(flips in prop::collection::vec((0usize..300, 0u8..8), 0..4), cut in 0usize..500) {
        let mut bytes = SOUND.clone();
        for (byte, bit) in flips {
            if let Some(byte) = bytes.get_mut(byte) {
                *byte ^= 1 << bit;
            }
        }
        let whole = bytes.len();
        bytes.truncate(cut);
        let read = safetensors::from_bytes(bytes);
        if cut < whole {
            prop_assert!(read.is_err());
        }
    }

    #[test]
    fn arbitrary_headers_never_panic(header in r#"[{}"\[\]:,a-z0-9]{0,80}"#, data in 0usize..40) {
        let _ = safetensors::from_bytes(file(&header, data));
    }
}
