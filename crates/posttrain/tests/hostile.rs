//! Damaged models, hostile data, wrong numbers, full folders: one clear error each, and nothing lost.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{SMALL, assert_same_run, expect, posttrain, stderr, stdout, write};

/// A finished run in a folder of its own.
static RUN: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    expect(0, &posttrain(folder.path()).args(["train", "small.toml", "--output", "run"]).output().unwrap());
    folder
});

/// Fails unless the command said one error with all of these words, a hint, and nothing else of note.
#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    let text = stderr(output);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{:?}\n{text}", output.status);
    assert_eq!(text.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{text}");
    assert!(!text.contains("panicked"), "{text}");
    for word in words.iter().chain(&["hint: "]) {
        assert!(text.contains(word), "expected {word:?} in:\n{text}");
    }
    assert_eq!(stdout(output), "", "nothing half-done on standard output");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// Asks a damaged copy of a good model.
fn ask(damage: impl FnOnce(&Path)) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(&RUN.path().join("run/final"), &model);
    damage(&model);
    let mut command = posttrain(folder.path());
    command.args(["generate", "--model", "model", "--prompt", "hi", "--max-new-tokens", "2"]).output().unwrap()
}

fn edit_bytes(path: PathBuf, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

fn edit_json(path: PathBuf, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Changes the header of a safetensors file.
fn edit_header(path: PathBuf, change: impl FnOnce(&mut Value)) {
    edit_bytes(path, |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let header = header.to_string();
        let data = bytes.split_off(8 + length);
        *bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    });
}

#[test]
fn a_damaged_model_is_refused_by_file_and_place() {
    const WEIGHTS: &str = "model.safetensors";
    const UP: &str = "model.layers.0.mlp.up_proj.weight";
    expect(0, &ask(|_| {}));
    let cut = |length: usize| move |model: &Path| edit_bytes(model.join(WEIGHTS), |bytes| bytes.truncate(length));
    refused(&ask(cut(0)), &["model/model.safetensors", "ends early"]);
    refused(&ask(cut(100)), &["model/model.safetensors"]);
    refused(&ask(cut(200_000)), &["model/model.safetensors", "bytes claimed"]);
    let huge = |model: &Path| edit_bytes(model.join(WEIGHTS), |bytes| bytes[7] = 0xff);
    refused(&ask(huge), &["model/model.safetensors", "header"]);
    let renamed = |header: &mut Value| {
        let tensor = header.as_object_mut().unwrap().remove(UP).unwrap();
        header["stranger"] = tensor;
    };
    refused(&ask(|model| edit_header(model.join(WEIGHTS), renamed)), &[UP, "missing", "of model"]);
    let turned = |header: &mut Value| header[UP]["shape"].as_array_mut().unwrap().reverse();
    refused(&ask(|model| edit_header(model.join(WEIGHTS), turned)), &[UP, "expected shape"]);
    let integers = |header: &mut Value| header["model.norm.weight"]["dtype"] = "I32".into();
    refused(&ask(|model| edit_header(model.join(WEIGHTS), integers)), &["model/model.safetensors", "I32"]);
    let not_a_number = |bytes: &mut Vec<u8>| {
        let half = bytes.len() / 2;
        bytes[half..].fill(0xff);
    };
    refused(&ask(|model| edit_bytes(model.join(WEIGHTS), not_a_number)), &["NaN", "damaged"]);
}

#[test]
fn a_configuration_or_vocabulary_that_does_not_fit_is_refused() {
    let config = |change: fn(&mut Value)| move |model: &Path| edit_json(model.join("config.json"), change);
    let mamba = |config: &mut Value| config["architectures"] = json!(["MambaForCausalLM"]);
    refused(&ask(config(mamba)), &["config.json", "MambaForCausalLM", "LlamaForCausalLM"]);
    refused(&ask(config(|config| config["num_attention_heads"] = 0.into())), &["config.json", "num_attention_heads"]);
    refused(&ask(config(|config| config["hidden_size"] = (1u64 << 62).into())), &["config.json", "hidden_size"]);
    let absent = |name: &'static str| move |model: &Path| fs::remove_file(model.join(name)).unwrap();
    refused(&ask(absent("config.json")), &["model/config.json"]);
    refused(&ask(absent("tokenizer.json")), &["model/tokenizer.json"]);

    let tokenizer = |change: fn(&mut Value)| move |model: &Path| edit_json(model.join("tokenizer.json"), change);
    let stranger = |tokenizer: &mut Value| tokenizer["model"]["merges"] = json!([["q", "zzz"]]);
    refused(&ask(tokenizer(stranger)), &["error: model/tokenizer.json: ", "zzz"]);
    let larger = |tokenizer: &mut Value| {
        let added = std::mem::replace(&mut tokenizer["added_tokens"], json!([]));
        let ordinary = &mut tokenizer["model"]["vocab"];
        for token in added.as_array().unwrap() {
            ordinary[token["content"].as_str().unwrap()] = token["id"].clone();
        }
        for id in 259..400 {
            ordinary[format!("extra{id}")] = id.into();
        }
    };
    refused(&ask(tokenizer(larger)), &["400 tokens", "the embedding has"]);
    refused(&ask(|model| fs::write(model.join("tokenizer.json"), b"\xff\xfe").unwrap()), &["tokenizer.json", "UTF-8"]);
    let template = |text: &'static str| move |model: &Path| fs::write(model.join("chat_template.jinja"), text).unwrap();
    refused(&ask(template("{% for %}")), &["chat template", "line 1"]);
    let endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
    let output = ask(template(endless));
    expect(1, &output);
    assert!(stderr(&output).contains("chat template"), "{}", stderr(&output));
}

#[test]
fn what_is_no_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let generate =
        |model: &str| posttrain(folder.path()).args(["generate", "--prompt", "hi", "--model", model]).output().unwrap();
    fs::create_dir(folder.path().join("empty")).unwrap();
    refused(&generate("empty"), &["empty/config.json"]);
    fs::create_dir(folder.path().join("folder.gguf")).unwrap();
    refused(&generate("folder.gguf"), &["folder.gguf"]);
    write(folder.path(), "text.gguf", "hello");
    refused(&generate("text.gguf"), &["text.gguf", "GGUF"]);
    write(folder.path(), "short.gguf", "GGUF\u{3}");
    refused(&generate("short.gguf"), &["short.gguf", "ends early"]);
    refused(&generate("nowhere"), &["nowhere"]);

    // An adapter whose base model is itself.
    fs::create_dir(folder.path().join("adapter")).unwrap();
    write(folder.path(), "adapter/adapter_config.json", r#"{"base_model_name_or_path": "adapter", "r": 4}"#);
    refused(&generate("adapter"), &["adapter_config.json", "is a LoRA adapter itself"]);
}

/// Trains on these rows.
fn train_on(name: &str, rows: &[u8]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(name), rows).unwrap();
    let recipe = format!(
        "[model]\nname = 'tiny-llama'\n[data]\ntrain = ['{name}']\n[sft]\nbatch_size = 1\ntraining.max_steps = 1\n"
    );
    write(folder.path(), "rows.toml", &recipe);
    let output = posttrain(folder.path()).args(["train", "rows.toml", "--output", "run"]).output().unwrap();
    assert_eq!(folder.path().join("run").exists(), output.status.success(), "a run is made when there is one to make");
    output
}

#[test]
fn hostile_rows_are_named() {
    let good = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
    let after_good = |row: &str| train_on("rows.jsonl", format!("{good}{row}\n").as_bytes());
    let error = |output: &Output, words: &[&str]| {
        expect(1, output);
        words.iter().for_each(|word| assert!(stderr(output).contains(word), "{word:?} in:\n{}", stderr(output)));
    };
    refused(&train_on("rows.jsonl", b""), &["rows.jsonl", "no rows"]);
    refused(&train_on("rows.jsonl", b"\n \r\n"), &["rows.jsonl", "no rows"]);
    error(&after_good(r#"{"prompt": 3, "completion": "b"}"#), &["row 2, column prompt", "got a number"]);
    error(&after_good(r#"{"prompt": "a", "completion": NaN}"#), &["row 2", "not valid JSON"]);
    error(&after_good(r#"{"prompt": "a", "completion": "b", "x": 1e999}"#), &["row 2", "out of range"]);
    error(&after_good(r#"{"prompt": "\ud800", "completion": "b"}"#), &["row 2", "not valid JSON"]);
    error(&after_good(&"[".repeat(10_000)), &["row 2", "not valid JSON"]);
    error(&train_on("rows.jsonl", b"{\"prompt\": \"\xff\", \"completion\": \"b\"}\n"), &["row 1", "not valid JSON"]);
    refused(&after_good(r#"{"prompt": "a", "comple"#), &["row 2", "cut short"]);
    refused(&train_on("rows.parquet", b"PAR1 but no more"), &["rows.parquet", "not a Parquet file"]);
    refused(&train_on("rows.parquet", b""), &["rows.parquet", "not a Parquet file"]);

    // A byte order mark and Windows line ends are fine, and so is a row of a megabyte beside others.
    let windows = format!("\u{feff}{}", good.replace('\n', "\r\n"));
    expect(0, &train_on("rows.jsonl", windows.as_bytes()));
    let long = format!("{{\"prompt\": \"a\", \"completion\": \"{}\"}}", "x".repeat(1 << 20));
    let output = after_good(&long);
    expect(0, &output);
    assert!(stderr(&output).contains("1 too long (rows.jsonl, row 2)"), "{}", stderr(&output));
}

#[test]
fn numbers_out_of_range_are_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    for assignment in [
        "grpo.sampling.temperature=-1",
        "grpo.sampling.temperature=nan",
        "grpo.sampling.top_p=2",
        "grpo.sampling.max_new_tokens=0",
        "grpo.sampling.max_new_tokens=100000000",
        "evaluation.sampling.max_new_tokens=512",
        "grpo.training.learning_rate=nan",
        "grpo.training.learning_rate=-1",
        "grpo.training.max_steps=-1",
        "grpo.num_generations=1",
        "grpo.num_generations=1000000000",
        "grpo.prompts_per_step=1000000000",
        "sft.batch_size=0",
        "sft.batch_size=1000000000000",
        "lora.r=100000000",
        "seed=-1",
        "nonsense=1",
    ] {
        let output = posttrain(folder.path()).args(["train", "small.toml", "--set", assignment]).output().unwrap();
        let key = assignment.split('=').next().unwrap();
        refused(&output, &[key]);
        assert!(!folder.path().join("runs").exists(), "{assignment} left a run behind");
    }
}

#[test]
fn a_new_run_harms_nothing_that_is_there() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    let train = |flags: &[&str]| posttrain(folder.path()).args(["train", "small.toml"]).args(flags).output().unwrap();

    write(folder.path(), "README.md", "my project");
    refused(&train(&["--output", "."]), &["README.md", "in the way"]);
    assert_eq!(fs::read_to_string(folder.path().join("README.md")).unwrap(), "my project");

    refused(&train(&["--output", "small.toml"]), &["small.toml", "a file is where a folder must be"]);

    copy(&RUN.path().join("run"), &folder.path().join("run"));
    write(folder.path(), "run/notes.txt", "mine");
    refused(&train(&["--output", "run"]), &["already holds a run"]);
    // A run that cannot begin takes nobody's place.
    let overwrite = |set: &str| train(&["--output", "run", "--overwrite", "--set", set]);
    refused(&overwrite("data.train=['nowhere.jsonl']"), &["nowhere.jsonl"]);
    refused(&overwrite("model.name='run'"), &["run lies in it, which the new run reads"]);
    assert_same_run(&RUN.path().join("run"), &{
        let copied = folder.path().join("copied");
        copy(&folder.path().join("run"), &copied);
        fs::remove_file(copied.join("notes.txt")).unwrap();
        copied
    });
    expect(0, &train(&["--output", "run", "--overwrite"]));
    assert_eq!(fs::read_to_string(folder.path().join("run/notes.txt")).unwrap(), "mine");
    fs::remove_file(folder.path().join("run/notes.txt")).unwrap();
    assert_same_run(&RUN.path().join("run"), &folder.path().join("run"));
}

#[test]
fn two_processes_cannot_write_one_run() {
    let folder = tempfile::tempdir().unwrap();
    copy(&RUN.path().join("run"), &folder.path().join("run"));
    write(folder.path(), "small.toml", SMALL);
    let other = fs::File::open(folder.path().join("run")).unwrap();
    other.lock().unwrap();
    let resume = || posttrain(folder.path()).args(["resume", "run"]).output().unwrap();
    refused(&resume(), &["another process is writing to run"]);
    let again =
        posttrain(folder.path()).args(["train", "small.toml", "--output", "run", "--overwrite"]).output().unwrap();
    refused(&again, &["another process is writing to run"]);
    drop(other);
    expect(0, &resume());
    assert_same_run(&RUN.path().join("run"), &folder.path().join("run"));
}

#[test]
fn a_run_goes_on_only_as_it_began() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let resume = || posttrain(folder.path()).args(["resume", "run"]).output().unwrap();
    let unfinished = |from: &str, to: &str| {
        let _ = fs::remove_dir_all(&run);
        copy(&RUN.path().join("run"), &run);
        fs::remove_file(run.join("summary.json")).unwrap();
        let config = fs::read_to_string(run.join("config.toml")).unwrap();
        assert!(config.contains(from), "{config}");
        fs::write(run.join("config.toml"), config.replace(from, to)).unwrap();
    };
    unfinished("learning_rate = 0.0001", "learning_rate = 0.1");
    refused(&resume(), &["checkpoint-10", "the configuration is another"]);
    let edited = fs::read_to_string(run.join("config.toml")).unwrap();
    assert!(edited.contains("learning_rate = 0.1"), "the user's edit is not undone");
    unfinished("tiny-llama", "nowhere");
    refused(&resume(), &["nowhere"]);
    unfinished("seed", "[[[");
    let output = resume();
    expect(1, &output);
    assert!(stderr(&output).contains("run/config.toml"), "{}", stderr(&output));
    fs::remove_file(run.join("config.toml")).unwrap();
    refused(&resume(), &["no config.toml"]);
    unfinished("seed = 7", "seed = 7");
    fs::write(run.join("metrics.jsonl"), "{}\n").unwrap();
    refused(&resume(), &["metrics.jsonl", "3 bytes"]);
}

#[test]
fn an_error_that_nobody_hears_is_still_an_error() {
    let mut command = posttrain(RUN.path());
    let mut child = command.args(["resume", "nowhere"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    expect(1, &child.wait_with_output().unwrap());
}

#[test]
fn a_kernel_set_that_is_none_is_refused() {
    let with = |isa: &str| posttrain(RUN.path()).arg("models").env("POSTTRAIN_ISA", isa).output().unwrap();
    refused(&with("avx9"), &["POSTTRAIN_ISA: no instruction set is called `avx9`", "portable"]);
    expect(0, &with("portable"));
    expect(0, &with(""));
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = posttrain(RUN.path()).args(["config", "schema"]).stdout(full).output().unwrap();
    expect(1, &output);
    assert!(stderr(&output).contains("standard output"), "{}", stderr(&output));
}

#[test]
fn no_home_and_no_cache_are_no_surprise() {
    let mut bare = Command::new(env!("CARGO_BIN_EXE_posttrain"));
    expect(0, &bare.env_clear().arg("models").output().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "file", "");
    let mut command = posttrain(folder.path());
    command.env("POSTTRAIN_CACHE", file).args(["pull", "smollm2-135m-instruct"]);
    refused(&command.output().unwrap(), &["file/models"]);
}

#[test]
fn generation_refuses_what_cannot_be() {
    let generate =
        |flags: &[&str]| posttrain(RUN.path()).args(["generate", "--model", "run/final"]).args(flags).output().unwrap();
    refused(&generate(&["--prompt", &"x ".repeat(600)]), &["exceed the model's context of 512"]);
    refused(&generate(&["--prompt", "hi", "--max-new-tokens", "5000"]), &["exceed the model's context of 512"]);
    for flags in
        [["--max-new-tokens", "0"], ["--temperature", "nan"], ["--top-p", "7"], ["-n", "0"], ["--threads", "0"]]
    {
        let output = generate(&[&["--prompt", "hi"], &flags[..]].concat());
        expect(2, &output);
        assert_eq!(stdout(&output), "");
    }
}
