//! Bad luck and bad rewards: one clear error, and nothing lost.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::common::{SMALL, assert_same_run, expect, posttrain, stderr, write};

/// Trains with an external reward written in shell.
fn train_with_reward(script: &str, options: &str) -> (Output, Duration) {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    write(folder.path(), "reward.sh", script);
    let reward =
        format!("[[rewards]]\ntype = 'process'\ncommand = ['sh', 'reward.sh']\ndeadline_seconds = 0.5\n{options}\n");
    write(folder.path(), "reward.toml", &reward);
    let started = Instant::now();
    let output = posttrain(folder.path()).args(["train", "small.toml", "reward.toml"]).output().unwrap();
    (output, started.elapsed())
}

/// A reward that gives every answer `$value` after `$1` requests have been answered well.
fn replies(value: &str) -> String {
    format!(
        "while read -r line; do id=${{line#*\\\"id\\\":}}; id=${{id%%,*}}; echo \"{{\\\"id\\\": $id, \\\"value\\\": {value}}}\"; done\n"
    )
}

#[test]
fn a_reward_in_another_language_trains() {
    let (output, _) = train_with_reward(&replies("0.5"), "");
    expect(0, &output);
}

#[test]
fn a_reward_that_crashes_stops_the_run_with_its_name() {
    let (output, _) = train_with_reward("exit 3\n", "");
    expect(1, &output);
    let text = stderr(&output);
    assert!(text.contains("reward process") && text.contains("sh reward.sh") && text.contains("hint:"), "{text}");
}

#[test]
fn a_reward_that_never_answers_cannot_hang_a_run() {
    let (output, time) = train_with_reward("sleep 1000\n", "");
    expect(1, &output);
    assert!(time < Duration::from_secs(20), "{time:?}");
    assert!(stderr(&output).contains("0.5"), "{}", stderr(&output));
}

#[test]
fn a_reward_that_is_not_a_number_is_refused() {
    let (output, _) = train_with_reward(&replies("NaN"), "");
    expect(1, &output);
    assert!(stderr(&output).contains("reward process"), "{}", stderr(&output));
}

#[test]
fn a_reward_may_be_allowed_to_fail() {
    let (output, _) = train_with_reward("exit 3\n", "on_error = 'score'");
    expect(0, &output);
}

/// Runs `posttrain` under a limit on the size of files, in blocks of 512 bytes: what a full disk looks like.
fn limited(folder: &Path, blocks: u32, arguments: &[&str]) -> Output {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
    let mut command = Command::new("sh");
    command.current_dir(folder).env("NO_COLOR", "1").args(["-c", &script, "sh", env!("CARGO_BIN_EXE_posttrain")]);
    command.args(arguments).output().unwrap()
}

#[test]
fn a_disk_that_fills_up_gives_one_error_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    expect(0, &posttrain(folder.path()).args(["train", "small.toml", "--output", "whole"]).output().unwrap());

    // Too small for the optimiser's state: the first checkpoint fails.
    let output = limited(folder.path(), 800, &["train", "small.toml", "--output", "full"]);
    expect(1, &output);
    let text = stderr(&output);
    assert_eq!(text.matches("error:").count(), 1, "{text}");
    assert!(text.contains("cannot write"), "{text}");
    let leftovers = std::fs::read_dir(folder.path().join("full")).unwrap();
    let leftovers =
        leftovers.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains(".partial"));
    assert_eq!(leftovers.count(), 0, "a failed checkpoint leaves nothing behind");

    // With room again, the run goes on as if nothing had happened.
    expect(0, &posttrain(folder.path()).args(["resume", "full"]).output().unwrap());
    assert_same_run(&folder.path().join("whole"), &folder.path().join("full"));
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    // Without a reference model, which a finished run has no more use for and removes.
    write(folder.path(), "small.toml", &SMALL.replace("beta = 0.01", "beta = 0.0"));
    expect(0, &posttrain(folder.path()).args(["train", "small.toml", "--output", "whole"]).output().unwrap());
    expect(0, &posttrain(folder.path()).args(["train", "small.toml", "--output", "damaged"]).output().unwrap());
    // As if killed before the end, and the newest checkpoint cut short by the file system.
    let run = folder.path().join("damaged");
    std::fs::remove_file(run.join("summary.json")).unwrap();
    let weights = run.join("checkpoint-10/model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let output = posttrain(folder.path()).args(["resume", "damaged"]).output().unwrap();
    expect(0, &output);
    assert!(stderr(&output).contains("checkpoint-10 is not a complete checkpoint"), "{}", stderr(&output));
    assert_same_run(&folder.path().join("whole"), &run);
}

#[test]
fn a_run_killed_while_it_writes_its_result_still_finishes() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    expect(0, &posttrain(folder.path()).args(["train", "small.toml", "--output", "whole"]).output().unwrap());
    expect(0, &posttrain(folder.path()).args(["train", "small.toml", "--output", "killed"]).output().unwrap());
    // The last instant: everything is in place but the summary, and the reference model is gone already.
    std::fs::remove_file(folder.path().join("killed/summary.json")).unwrap();
    expect(0, &posttrain(folder.path()).args(["resume", "killed"]).output().unwrap());
    assert_same_run(&folder.path().join("whole"), &folder.path().join("killed"));
}

#[test]
fn a_row_longer_than_the_context_is_named_not_lost_in_silence() {
    let folder = tempfile::tempdir().unwrap();
    let long = "x".repeat(600);
    let rows =
        format!("{{\"prompt\": \"a\", \"completion\": \"b\"}}\n{{\"prompt\": \"a\", \"completion\": \"{long}\"}}\n");
    write(folder.path(), "rows.jsonl", &rows);
    let recipe =
        "[model]\nname = 'tiny-llama'\n[data]\ntrain = ['rows.jsonl']\n[sft]\nbatch_size = 1\ntraining.max_steps = 1\n";
    write(folder.path(), "rows.toml", recipe);
    let train = |flags: &[&str]| {
        posttrain(folder.path()).args(["train", "rows.toml", "--overwrite"]).args(flags).output().unwrap()
    };
    let output = train(&[]);
    expect(0, &output);
    assert!(
        stderr(&output).contains("left out 1 training examples: 1 too long (rows.jsonl, row 2)"),
        "{}",
        stderr(&output)
    );
    let output = train(&["--set", "rendering.overlong=error"]);
    expect(1, &output);
    assert!(stderr(&output).contains("rows.jsonl, row 2"), "{}", stderr(&output));
}

#[test]
fn an_adapter_of_a_layer_that_is_not_there_is_refused_before_anything_else() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    for dry in [&["--dry-run"][..], &[]] {
        let set = ["--set", "lora.layers_to_transform=[0, 99]"];
        let output = posttrain(folder.path()).args(["train", "small.toml"]).args(set).args(dry).output().unwrap();
        assert!(!output.status.success());
        let text = stderr(&output);
        assert!(
            text.contains("lora.layers_to_transform: expected layers of the model") && text.contains("99"),
            "{text}"
        );
        assert!(text.contains("hint:") && text.contains("layers, of which the first is 0"), "{text}");
    }
}
