//! `data validate` and `reward lint`: what they print, word for word, and how they end.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::common::{SMALL, expect, posttrain, stderr, stdout, write};

/// Rows with faults of every kind.
const TRAIN: &str = r#"{"prompt": [{"role": "user", "content": "What is 3 + 4?"}], "completion": [{"role": "assistant", "content": "7"}], "answer": "7"}
{"prompt": [{"role": "user", "content": "What is 3 + 5?"}], "completion": [{"role": "assistant", "content": "Let me see.\nIt is 8."}], "answer": 8}
{"prompt": [{"role": "user", "content": "what is 3+4 ?"}], "completion": [{"role": "assistant", "content": "7"}], "answer": "7"}
{"prompt": [{"role": "user", "content": "What is 9 + 9?"}], "completion": 18}
{"prompt": "What is 1 + 1?", "completion":
{"text": "Not of this kind."}
"#;
const TEST: &str = r#"{"prompt": [{"role": "user", "content": "What is 3 + 5?"}], "answer": "8"}
{"prompt": [{"role": "user", "content": "What is 8 + 8?"}], "answer": "16"}
"#;
const PAIRS: &str = r#"{"prompt": "Say hi.", "chosen": " Hi!", "rejected": " No."}
{"prompt": "Say hi.", "chosen": " Hi.", "rejected": " Hi."}
"#;

fn run(folder: &Path, arguments: &[&str]) -> Output {
    posttrain(folder).args(arguments).output().unwrap()
}

fn shown(output: &Output) -> String {
    let code = output.status.code().map_or("killed".to_owned(), |code| code.to_string());
    format!("exit {code}\n--- stdout\n{}--- stderr\n{}", stdout(output), stderr(output))
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    write(folder.path(), "train.jsonl", TRAIN);
    write(folder.path(), "test.jsonl", TEST);
    write(folder.path(), "pairs.jsonl", PAIRS);
    folder
}

#[test]
fn faulty_rows() {
    let folder = folder();
    let arguments = ["data", "validate", "train.jsonl", "--test", "test.jsonl", "--model", "tiny-llama"];
    insta::assert_snapshot!("validate_faulty_rows", shown(&run(folder.path(), &arguments)));
    let output = run(folder.path(), &[&arguments[..], &["--json", "--show", "1"]].concat());
    expect(1, &output);
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((json["errors"].as_u64(), json["rows"]["test"].as_u64()), (Some(4), Some(2)), "{json:#}");
    let checks: Vec<&str> = json["findings"].as_array().unwrap().iter().map(|f| f["check"].as_str().unwrap()).collect();
    assert_eq!(checks, ["unusable", "unusable", "mixed_types", "leak", "duplicate", "mixed_column", "mixed_column"]);
    assert_eq!(json["findings"][3]["at"]["file"], "test.jsonl");
    assert_eq!(json["shown"][0]["sequences"][0]["pieces"][1]["text"], "7<|im_end|>");
}

#[test]
fn pairs() {
    let folder = folder();
    let output = run(folder.path(), &["data", "validate", "pairs.jsonl", "--model", "tiny-llama"]);
    insta::assert_snapshot!("validate_pairs", shown(&output));
}

#[test]
fn a_recipe_is_looked_at_as_its_run_sees_it() {
    let folder = folder();
    insta::assert_snapshot!("validate_recipe", shown(&run(folder.path(), &["data", "validate", "small.toml"])));
    let missing = run(folder.path(), &["data", "validate", "nowhere.jsonl", "--model", "tiny-llama"]);
    insta::assert_snapshot!("validate_missing", shown(&missing));
}

#[test]
fn rewards_that_hold() {
    let folder = folder();
    insta::assert_snapshot!("lint_sound", shown(&run(folder.path(), &["reward", "lint", "small.toml"])));
}

#[test]
fn rewards_that_can_be_cheated() {
    let folder = folder();
    let recipe = "[model]\nname = \"tiny-llama\"\n[data]\ntrain = [\"rows.jsonl\"]\n[[rewards]]\ntype = \"format\"\n\
                  [[rewards]]\ntype = \"length\"\nweight = -1\nmax_length = 40\nbuffer = 40\n";
    write(folder.path(), "cheap.toml", recipe);
    write(
        folder.path(),
        "rows.jsonl",
        "{\"prompt\": \"1 + 2 = \", \"answer\": \"3\"}\n{\"prompt\": \"2 + 2 = \", \"answer\": \"4\"}\n",
    );
    let output = run(folder.path(), &["reward", "lint", "cheap.toml"]);
    insta::assert_snapshot!("lint_cheated", shown(&output));
    let output = run(folder.path(), &["reward", "lint", "cheap.toml", "--json"]);
    expect(1, &output);
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["rows"], 2);
    assert!(json["answers"].as_array().unwrap().iter().any(|paid| paid["flaws"][0]["exploitable"]["rows"] == 1.0));
}

#[test]
fn a_process_that_pays_nan_or_changes_its_mind_is_found() {
    let folder = folder();
    // Pays what the request's number says: another sum the second time.
    let script = "import json, sys\nfor line in sys.stdin:\n    r = json.loads(line)\n    print(json.dumps({'id': r['id'], 'value': r['id'] / 1000}), flush=True)\n";
    write(folder.path(), "fickle.py", script);
    let recipe = SMALL.replacen(
        "[[rewards]]\ntype = \"number\"",
        "[[rewards]]\ntype = \"process\"\ncommand = [\"python3\", \"fickle.py\"]",
        1,
    );
    write(folder.path(), "fickle.toml", &recipe);
    let output = run(folder.path(), &["reward", "lint", "fickle.toml", "--rows", "2"]);
    expect(1, &output);
    assert!(stdout(&output).contains("✗ paid differently the second time on 2 rows"), "{}", stdout(&output));
}
