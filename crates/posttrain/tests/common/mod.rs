//! What the tests of the binary share.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The binary, deaf to the user's environment, in `folder`.
pub fn posttrain(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_posttrain"));
    command.current_dir(folder).env("POSTTRAIN_CACHE", folder.join("cache")).env("NO_COLOR", "1");
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", folder.join("hub")).env_remove("POSTTRAIN_ISA");
    command
}

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// Writes a file into a folder and returns its path.
pub fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    path
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Fails with everything the command said unless it ended with this code.
#[track_caller]
pub fn expect(code: i32, output: &Output) {
    assert_eq!(output.status.code(), Some(code), "stdout:\n{}\nstderr:\n{}", stdout(output), stderr(output));
}

/// A recipe of both stages that takes a second or two: a random model of two layers, a dozen steps.
pub const SMALL: &str = r#"
seed = 7

[model]
name = "tiny-llama"
precision = "f32"

[[tasks]]
type = "arithmetic"
operations = ["add"]
first = [0, 9]
others = [0, 9]
phrasings = ["{expression}="]
train_problems = 64
test_problems = 6

[[rewards]]
type = "number"

[[rewards]]
type = "length"
weight = 0.1
max_length = 8
buffer = 8

[sft]
batch_size = 8
[sft.training]
max_steps = 5
learning_rate = 1e-3

[grpo]
prompts_per_step = 2
num_generations = 4
num_iterations = 2
[grpo.objective]
beta = 0.01
[grpo.sampling]
max_new_tokens = 6
[grpo.training]
max_steps = 5
learning_rate = 1e-4

[evaluation.sampling]
temperature = 0
max_new_tokens = 6

[run]
save_steps = 1
eval_steps = 4
"#;

/// The content of every file of a run that must be the same each time it is made: all but the clock.
pub fn run_bytes(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    collect(run, run, &mut files);
    files.retain(|name, _| !matches!(name.as_str(), "timing.jsonl" | "report.html"));
    if let Some(summary) = files.get_mut("summary.json") {
        let mut value: serde_json::Value = serde_json::from_slice(summary).unwrap();
        assert!(value.as_object_mut().unwrap().remove("timing").is_some());
        *summary = value.to_string().into_bytes();
    }
    files
}

fn collect(root: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(root, &path, files);
        } else {
            files.insert(path.strip_prefix(root).unwrap().display().to_string(), fs::read(&path).unwrap());
        }
    }
}

/// Fails with the names of the files that differ.
#[track_caller]
pub fn assert_same_run(left: &Path, right: &Path) {
    let (left, right) = (run_bytes(left), run_bytes(right));
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&left), names(&right), "the runs hold other files");
    let different: Vec<&String> =
        left.iter().filter(|(name, bytes)| right[*name] != **bytes).map(|(name, _)| name).collect();
    assert!(different.is_empty(), "these files differ: {different:?}");
}
