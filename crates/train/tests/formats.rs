//! The files of a run, read by code that shares nothing with the code that writes them, and the optimiser against its formula.

use std::path::Path;

use base::{Purpose, Random};
use model::weights::{Tensors, safetensors};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use posttrain_train as train;
use train::optimizer::{Optimizer, gradient_norm};
use train::options::{OptimizerState, TrainingOptions};

use crate::common::{self, Setup, metrics};

/// CRC-32C by a table, as most libraries do it.
fn crc32c(data: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256u32)
        .map(|byte| (0..8).fold(byte, |sum, _| if sum % 2 == 1 { (sum / 2) ^ 0x82f6_3b78 } else { sum / 2 }))
        .collect();
    data.iter().fold(u32::MAX, |sum, byte| table[(sum as u8 ^ byte) as usize] ^ (sum >> 8)) ^ u32::MAX
}

fn masked(data: &[u8]) -> u32 {
    let sum = crc32c(data);
    sum.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The records of a TFRecord file, their sums checked.
fn records(mut file: &[u8]) -> Vec<&[u8]> {
    let mut records = Vec::new();
    while !file.is_empty() {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        assert_eq!(u32::from_le_bytes(file[8..12].try_into().unwrap()), masked(&file[..8]), "sum of a length");
        let data = &file[12..12 + length];
        assert_eq!(u32::from_le_bytes(file[12 + length..16 + length].try_into().unwrap()), masked(data), "sum of data");
        records.push(data);
        file = &file[16 + length..];
    }
    records
}

/// A field of a protobuf message: its number and raw content.
fn fields(mut message: &[u8]) -> Vec<(u64, Vec<u8>)> {
    fn variable(message: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = message[0];
            *message = &message[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }
    let mut found = Vec::new();
    while !message.is_empty() {
        let key = variable(&mut message);
        let length = match key & 7 {
            0 => {
                found.push((key >> 3, variable(&mut message).to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            2 => variable(&mut message) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        found.push((key >> 3, message[..length].to_vec()));
        message = &message[length..];
    }
    found
}

#[test]
fn tensorboard_sees_what_metrics_jsonl_holds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    Setup::short().finish(&path);
    let file = std::fs::read_dir(path.join("runs")).unwrap().next().unwrap().unwrap().path();
    assert!(file.to_string_lossy().contains("tfevents"));
    let bytes = std::fs::read(file).unwrap();
    let mut events = records(&bytes).into_iter();

    let first = fields(events.next().unwrap());
    assert!(first.contains(&(3, b"brain.Event:2".to_vec())), "{first:?}");
    let lines = metrics(&path);
    assert_eq!(events.len(), lines.len());
    for (event, line) in events.zip(lines) {
        let event = fields(event);
        let field = |number| &event.iter().find(|(found, _)| *found == number).unwrap().1;
        let step = u64::from_le_bytes(field(2)[..].try_into().unwrap());
        assert_eq!(line["step"], step);
        assert_eq!(f64::from_le_bytes(field(1)[..].try_into().unwrap()), step as f64, "the step stands for the clock");
        let scalars: Vec<(String, f32)> = fields(field(5))
            .into_iter()
            .map(|(number, value)| {
                assert_eq!(number, 1);
                let value = fields(&value);
                let tag = String::from_utf8(value[0].1.clone()).unwrap();
                (tag, f32::from_le_bytes(value[1].1[..].try_into().unwrap()))
            })
            .collect();
        let expected: Vec<(String, f32)> =
            line.iter().filter_map(|(name, value)| Some((name.clone(), value.as_f64()? as f32))).collect();
        assert_eq!(scalars, expected);
    }
}

fn json(field: &Field) -> serde_json::Value {
    match field {
        Field::Null => serde_json::Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(value) => value.as_str().into(),
        Field::ListInternal(list) => list.elements().iter().map(json).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn episodes_hold_tokens_rewards_and_advantages() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    Setup::short().finish(&path);
    let file = std::fs::File::open(path.join("episodes/step-000005.parquet")).unwrap();
    let reader = SerializedFileReader::new(file).unwrap();
    let rows: Vec<serde_json::Value> = reader
        .get_row_iter(None)
        .unwrap()
        .map(|row| row.unwrap().get_column_iter().map(|(name, field)| (name.clone(), json(field))).collect())
        .collect();
    assert_eq!(rows.len(), 16);
    let tokenizer = common::tokenizer();
    for group in rows.chunks(4) {
        let advantages: f64 = group.iter().map(|row| row["advantage"].as_f64().unwrap()).sum();
        assert!(advantages.abs() < 1e-9, "advantages of a group add up to nothing");
        for row in group {
            assert_eq!(row["prompt"], group[0]["prompt"]);
            let ids: Vec<u32> =
                row["completion_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(row["completion"], tokenizer.decode(&ids).as_str());
            assert_eq!(row["log_probs"].as_array().unwrap().len(), ids.len());
            let columns: serde_json::Value = serde_json::from_str(row["columns"].as_str().unwrap()).unwrap();
            let right = columns["answer"] == row["completion"];
            assert_eq!(row["reward"], f64::from(u8::from(right)));
            assert_eq!(row["status"], if right { "ok" } else { "wrong" });
        }
    }
}

/// The names of the files in a folder, in order.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn models_and_adapters_are_folders_that_other_tools_read() {
    const TOKENIZER: [&str; 3] = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"];
    const MODEL: [&str; 3] = ["config.json", "generation_config.json", "model.safetensors"];
    const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];
    for (lora, model) in [(false, &MODEL[..]), (true, &ADAPTER)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        Setup { lora, grpo: None, evaluate: false, ..Setup::short() }.finish(&path);
        for (folder, own) in [
            ("final", &["README.md", "manifest.json"][..]),
            ("checkpoint-3", &["manifest.json", "optimizer.safetensors", "trainer_state.json"]),
        ] {
            let mut expected = [&TOKENIZER, model, own].concat();
            expected.sort_unstable();
            assert_eq!(names(&path.join(folder)), expected, "{folder}, adapter {lora}");
        }
        let text = |name: &str| std::fs::read_to_string(path.join("final").join(name)).unwrap();
        let special: serde_json::Value = serde_json::from_str(&text("special_tokens_map.json")).unwrap();
        assert_eq!(special["eos_token"], "<|im_end|>");
        if !lora {
            let generation: serde_json::Value = serde_json::from_str(&text("generation_config.json")).unwrap();
            let config: serde_json::Value = serde_json::from_str(&text("config.json")).unwrap();
            assert_eq!(generation["eos_token_id"], config["eos_token_id"]);
            assert_eq!(config["torch_dtype"], "float32");
        }
    }
}

/// The update of Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2, in f64 from scratch.
#[test]
fn adamw_follows_its_formula() {
    let options = TrainingOptions {
        weight_decay: 0.1,
        max_grad_norm: 0.5,
        adam_beta1: 0.8,
        adam_beta2: 0.95,
        adam_epsilon: 1e-6,
        ..Default::default()
    };
    let mut decoder = Setup::short().decoder();
    let count = decoder.parameters().len();
    let decays: Vec<bool> = decoder.parameters().iter().map(|info| info.shape.len() > 1).collect();
    assert!(decays.contains(&true) && decays.contains(&false));
    let values = |decoder: &model::decoder::Decoder| -> Vec<Vec<f64>> {
        (0..count).map(|index| decoder.parameter(index).iter().map(|&value| f64::from(value)).collect()).collect()
    };
    let mut expected = values(&decoder);
    let mut first: Vec<Vec<f64>> = expected.iter().map(|values| vec![0.0; values.len()]).collect();
    let mut second = first.clone();

    let noise = Random::new(1, Purpose::Rounding);
    let mut optimizer = Optimizer::new(&options, &decoder, noise);
    let mut gradients = decoder.gradients();
    for update in 1..=5 {
        let rate = 1e-2 / f64::from(update);
        for (index, gradient) in gradients.flat_mut().iter_mut().enumerate() {
            *gradient = ((index as f32 * 0.37 + update as f32).sin()) * 1e-3;
        }
        let norm = gradient_norm(&decoder, &gradients);
        let squares: f64 = gradients.flat().iter().map(|&gradient| f64::from(gradient).powi(2)).sum();
        assert!((norm - squares.sqrt()).abs() < 1e-9 * norm);
        let clip = if norm > 0.5 { 0.5 / norm } else { 1.0 };
        for index in 0..count {
            for (i, &gradient) in gradients.grad(index).iter().enumerate() {
                let gradient = f64::from(gradient) * clip;
                let (m, v) = (&mut first[index][i], &mut second[index][i]);
                *m = 0.8 * *m + 0.2 * gradient;
                *v = 0.95 * *v + 0.05 * gradient * gradient;
                let m_hat = *m / (1.0 - 0.8f64.powi(update));
                let v_hat = *v / (1.0 - 0.95f64.powi(update));
                let decay = if decays[index] { 0.1 } else { 0.0 };
                let value = &mut expected[index][i];
                *value -= rate * (m_hat / (v_hat.sqrt() + 1e-6) + decay * *value);
            }
        }
        optimizer.update(&mut decoder, &gradients, norm, rate);
    }
    assert_eq!(optimizer.updates(), 5);
    for (found, expected) in values(&decoder).iter().flatten().zip(expected.iter().flatten()) {
        assert!((found - expected).abs() < 2e-5, "{found} instead of {expected}");
    }
}

/// The state of an optimiser after two updates, before and after a file, and a fresh optimiser that took it over.
fn stored_state(optimizer_state: OptimizerState) -> (Optimizer, Tensors, Optimizer) {
    let options = TrainingOptions { optimizer_state, ..Default::default() };
    let mut decoder = Setup::short().decoder();
    let noise = Random::new(1, Purpose::Rounding);
    let mut optimizer = Optimizer::new(&options, &decoder, noise);
    let mut gradients = decoder.gradients();
    for update in 0..2 {
        let values = gradients.flat_mut().iter_mut().enumerate();
        values.for_each(|(index, gradient)| *gradient = (index as f32 * 0.37 + update as f32).sin());
        optimizer.update(&mut decoder, &gradients, 1.0, 1e-3);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("optimizer.safetensors");
    let state = optimizer.state();
    safetensors::write_values(&path, state.iter().map(|(name, (shape, values))| (name, *shape, *values))).unwrap();
    drop(state);
    let read = safetensors::read(&path).unwrap();
    let mut again = Optimizer::new(&options, &decoder, noise);
    again.restore(read.clone(), 2).unwrap();
    (optimizer, read, again)
}

#[test]
fn the_state_of_the_optimiser_survives_a_file() {
    for optimizer_state in [OptimizerState::F32, OptimizerState::Bf16] {
        let (optimizer, mut read, mut again) = stored_state(optimizer_state);
        assert_eq!(again.state(), optimizer.state());
        assert_eq!(again.updates(), 2);
        read.remove("exp_avg.model.norm.weight").unwrap();
        assert!(again.restore(read, 5).unwrap_err().contains("exp_avg.model.norm.weight"));
    }
    let (_, singles, _) = stored_state(OptimizerState::F32);
    let (.., mut halves) = stored_state(OptimizerState::Bf16);
    assert!(halves.restore(singles, 2).unwrap_err().contains("are not in bfloat16"));
}
