//! Reading GGUF: every data type against ggml's values, every family's names and conversions, and files that lie.

use posttrain_model::config::RopeScaling;
use posttrain_model::weights::Tensor;
use posttrain_model::weights::gguf::{self, Gguf, Value};
use posttrain_model::{Family, ModelConfig};
use proptest::prelude::*;

use crate::files;

const BLOCKS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/reference/blocks");

/// `tests/reference/blocks.py` wrote the file and the hashes with the Python package `gguf`.
#[test]
fn every_type_dequantises_to_the_bits_of_ggml() {
    let gguf = gguf::read(format!("{BLOCKS}/blocks.gguf").as_ref()).unwrap();
    let expected = std::fs::read_to_string(format!("{BLOCKS}/sha256.txt")).unwrap();
    assert_eq!(expected.lines().count(), 13);
    for (line, info) in expected.lines().zip(gguf.tensor_infos()) {
        let mut fields = line.split(' ');
        assert_eq!(fields.next(), Some(info.name.as_str()));
        let sha256 = fields.next().unwrap();
        let tensor = gguf.tensor(info).unwrap();
        assert_eq!(tensor.shape, [3, 512]);
        for (value, text) in tensor.data.iter().zip(fields) {
            assert!(
                (value - text.parse::<f32>().unwrap()).abs() <= 1e-6 * value.abs(),
                "{}: {value} {text}",
                info.name
            );
        }
        let bytes: Vec<u8> = tensor.data.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(base::files::sha256_of(&bytes), sha256, "{}", info.name);
    }
}

#[test]
fn every_family_comes_back_as_it_was_before_conversion() {
    for family in Family::ALL {
        let mut config = ModelConfig::tiny(family, 100);
        if family == Family::Gemma3 {
            // GGUF files do not state the scale of the scores.
            config.attention_scale = 1.0 / (config.head_dim as f32).sqrt();
        }
        let tensors = files::weights(&config);
        let file = files::gguf(&files::metadata(&config), &files::converted(&config, &tensors));
        let (found, loaded) = Gguf::from_bytes(file).unwrap().load().unwrap();
        assert_eq!(found, config, "{family}");
        assert!(loaded == tensors, "{family}: weights differ");
    }
}

#[test]
fn llama3_scaling_is_recognised_from_its_divisors() {
    let mut config = ModelConfig::tiny(Family::Llama, 100);
    config.ropes[0].theta = 5e5;
    let scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_max_positions: 8192,
    };
    let frequencies = config.ropes[0].inverse_frequencies(config.head_dim);
    let mut divisors: Vec<f32> = frequencies.iter().map(|&frequency| scaling.divisor(frequency) as f32).collect();
    assert_eq!(divisors.last(), Some(&32.0));
    let tensors = files::converted(&config, &files::weights(&config));
    let with = |divisors: &[f32]| {
        let mut tensors = tensors.clone();
        tensors.push(("rope_freqs.weight".to_owned(), Tensor::new(vec![divisors.len()], divisors.to_vec())));
        Gguf::from_bytes(files::gguf(&files::metadata(&config), &tensors)).unwrap().load()
    };
    assert_eq!(with(&divisors).unwrap().0.ropes[0].scaling, scaling);
    divisors[1] = 2.0;
    assert!(with(&divisors).unwrap_err().to_string().contains("rope_freqs.weight"));
}

/// Values by name, in the order of the file.
type Named<T> = Vec<(String, T)>;

/// Metadata and tensors of a tiny model, to be spoilt.
fn parts() -> (ModelConfig, Named<Value>, Named<Tensor>) {
    let config = ModelConfig::tiny(Family::Llama, 100);
    let tensors = files::converted(&config, &files::weights(&config));
    (config.clone(), files::metadata(&config), tensors)
}

#[test]
fn a_wrong_model_is_refused_by_name() {
    let load = |metadata: &[(String, Value)], tensors: &[(String, Tensor)]| {
        Gguf::from_bytes(files::gguf(metadata, tensors)).and_then(|gguf| gguf.load()).unwrap_err().to_string()
    };
    let (_, metadata, tensors) = parts();
    let without = |name: &str| -> Vec<_> { tensors.iter().filter(|(other, _)| other != name).cloned().collect() };
    let with = |name: &str, shape: Vec<usize>| {
        let mut tensors = without(name);
        let count = shape.iter().product();
        tensors.push((name.to_owned(), Tensor::new(shape, vec![0.0; count])));
        tensors
    };
    let set = |key: &str, value: Value| {
        let mut metadata: Vec<_> = metadata.iter().filter(|(other, _)| other != key).cloned().collect();
        metadata.push((key.to_owned(), value));
        metadata
    };
    let cases = [
        (load(&metadata, &without("blk.1.ffn_up.weight")), "model.layers.1.mlp.up_proj.weight: missing"),
        (load(&metadata, &with("blk.0.attn_k.weight", vec![16, 64])), "expected shape [32, 64], found [16, 64]"),
        (load(&metadata, &with("blk.0.attn_q.bias", vec![64])), "self_attn.q_proj.bias: not part of a llama model"),
        (load(&metadata, &with("blk.0.router.weight", vec![8])), "blk.0.router.weight: not part of a llama model"),
        (load(&metadata, &with("blk.2.ffn_up.weight", vec![144, 64])), "model.layers.2.mlp.up_proj.weight: not part"),
        (load(&set("general.architecture", Value::Text("mamba".into())), &tensors), "GGUF architecture mamba"),
        (load(&set("llama.rope.scaling.type", Value::Text("yarn".into())), &tensors), "rope scaling yarn"),
        (load(&set("llama.expert_count", Value::Unsigned(8)), &tensors), "8 experts"),
        (load(&set("llama.block_count", Value::Unsigned(1 << 60)), &tensors), "llama.block_count"),
        (load(&set("llama.attention.key_length", Value::Unsigned(1 << 60)), &tensors), "1152921504606846976"),
        (load(&set("llama.embedding_length", Value::Text("64".into())), &tensors), "llama.embedding_length: expected"),
        (load(&set("general.alignment", Value::Unsigned(3)), &tensors), "general.alignment"),
        (load(&metadata[1..], &tensors), "general.architecture: missing"),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{expected:?} in {message:?}");
    }
}

/// A header with one tensor entry, all fields free.
fn one_tensor(dimensions: &[u64], kind: u32, offset: u64, data: usize) -> Vec<u8> {
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend(1u64.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.extend(1u64.to_le_bytes());
    file.push(b'x');
    file.extend((dimensions.len() as u32).to_le_bytes());
    dimensions.iter().for_each(|size| file.extend(size.to_le_bytes()));
    file.extend(kind.to_le_bytes());
    file.extend(offset.to_le_bytes());
    file.resize(file.len().next_multiple_of(32) + data, 0);
    file
}

#[test]
fn headers_that_lie_are_refused_before_anything_is_allocated() {
    let refused = |file: Vec<u8>| Gguf::from_bytes(file).map(|_| ()).unwrap_err().to_string();
    assert!(Gguf::from_bytes(one_tensor(&[8], 0, 0, 32)).is_ok());
    let cases = [
        (one_tensor(&[1 << 62], 0, 0, 32), "overflows"),
        (one_tensor(&[1 << 40, 1 << 40], 0, 0, 32), "overflows"),
        (one_tensor(&[1 << 40], 0, 0, 32), "the file ends early"),
        (one_tensor(&[8], 0, 32, 32), "the file ends early"),
        (one_tensor(&[8], 0, u64::MAX - 31, 32), "the file ends early"),
        (one_tensor(&[4], 0, 8, 32), "alignment"),
        (one_tensor(&[0], 0, 0, 32), "whole blocks"),
        (one_tensor(&[8], 2, 0, 32), "whole blocks"),
        (one_tensor(&[], 0, 0, 32), "dimensions"),
        (one_tensor(&[1; 5], 0, 0, 32), "dimensions"),
        (one_tensor(&[8], 16, 0, 32), "IQ2_XXS"),
        (one_tensor(&[8], 99, 0, 32), "number 99"),
    ];
    for (file, expected) in cases {
        let message = refused(file);
        assert!(message.contains(expected), "{expected:?} in {message:?}");
    }
    let header = |version: u32, tensors: u64, metadata: u64, rest: &[u8]| {
        let mut file = b"GGUF".to_vec();
        file.extend(version.to_le_bytes());
        file.extend(tensors.to_le_bytes());
        file.extend(metadata.to_le_bytes());
        file.extend(rest);
        file
    };
    let nested = [&0u64.to_le_bytes()[..], &9u32.to_le_bytes(), &9u32.to_le_bytes(), &1u64.to_le_bytes()].concat();
    let long =
        [&0u64.to_le_bytes()[..], &9u32.to_le_bytes(), &8u32.to_le_bytes(), &(1u64 << 61).to_le_bytes()].concat();
    let cases = [
        (header(3, u64::MAX, 0, &[]), "tensor(s) claimed"),
        (header(3, 0, u64::MAX, &[]), "metadata entry(s) claimed"),
        (header(3, 0, 1, &[0xff; 16]), "claimed"),
        (header(3, 0, 1, &nested), "arrays of arrays"),
        (header(3, 0, 1, &long), "array element(s) claimed"),
        (header(1, 0, 0, &[]), "GGUF version 1"),
        (header(3u32.swap_bytes(), 0, 0, &[]), "big-endian"),
        (b"GGML".to_vec(), "magic"),
        (Vec::new(), "ends early"),
    ];
    for (file, expected) in cases {
        let message = refused(file);
        assert!(message.contains(expected), "{expected:?} in {message:?}");
    }
}

#[test]
fn overlapping_tensors_are_refused() {
    let (_, metadata, tensors) = parts();
    let mut file = files::gguf(&metadata, &tensors);
    // Both of the last two entries of the table point at the last but one's data.
    let position =
        |name: &str| file.windows(name.len()).position(|bytes| bytes == name.as_bytes()).unwrap() + name.len();
    let offset_of = |(name, tensor): &(String, Tensor)| position(name) + 4 + 8 * tensor.shape.len() + 4;
    let [.., first, second] = &tensors[..] else { panic!("too few tensors") };
    let (from, to) = (offset_of(first), offset_of(second));
    file.copy_within(from..from + 8, to);
    assert!(Gguf::from_bytes(file).unwrap_err().to_string().contains("overlaps"));
}

fn load(bytes: Vec<u8>) -> bool {
    Gguf::from_bytes(bytes).and_then(|gguf| gguf.load()).is_ok()
}

#[test]
fn every_truncation_is_an_error() {
    let (_, metadata, tensors) = parts();
    let file = files::gguf(&metadata, &tensors);
    assert!(load(file.clone()));
    let header = file.len() - tensors.iter().map(|(_, tensor)| 4 * tensor.data.len()).sum::<usize>();
    for length in (0..header).chain((header..file.len()).step_by(997)).chain([file.len() - 1]) {
        assert!(!load(file[..length].to_vec()), "{length} of {} bytes", file.len());
    }
}

/// Address space of this process at its largest, in bytes; 0 where the system does not tell.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap_or("0 kB");
    1024 * line.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// A spoilt header gives an error or another model, never a panic nor a large allocation.
    #[test]
    fn spoilt_files_never_panic_nor_allocate_what_they_claim(
        flips in prop::collection::vec((0usize..4000, 0u8..8), 1..6),
        long in prop::option::of((0usize..4000, prop::num::u64::ANY)),
    ) {
        let (_, metadata, tensors) = parts();
        let mut file = files::gguf(&metadata, &tensors);
        let before = peak();
        for (byte, bit) in flips {
            file[byte] ^= 1 << bit;
        }
        if let Some((start, value)) = long {
            file[start..start + 8].copy_from_slice(&value.to_le_bytes());
        }
        load(file);
        prop_assert!(peak() - before < 1 << 30);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(prop::num::u8::ANY, 0..300)) {
        load([&b"GGUF\x03\0\0\0"[..], &bytes].concat());
    }
}
