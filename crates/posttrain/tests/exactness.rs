//! Invariants 1 and 3 over the real binary: the same bytes however the run is made, however often it is killed.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{SMALL, assert_same_run, expect, posttrain, stderr, write};

fn train(folder: &Path, output: &str, flags: &[&str]) {
    let output = posttrain(folder).args(["train", "small.toml", "--output", output]).args(flags).output().unwrap();
    expect(0, &output);
}

#[test]
fn threads_and_micro_batches_change_no_byte() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    train(folder.path(), "one", &["--threads", "1"]);
    train(folder.path(), "two", &["--threads", "2"]);
    assert_same_run(&folder.path().join("one"), &folder.path().join("two"));

    // Other cuts are another configuration, so only what the model learnt and logged can be compared.
    let cut = ["sft.training.micro_batch_tokens=24", "grpo.training.micro_batch_tokens=40", "grpo.decode_batch_size=3"];
    let flags: Vec<&str> = cut.iter().flat_map(|set| ["--set", set]).collect();
    train(folder.path(), "cut", &flags);
    for file in
        ["metrics.jsonl", "final/model.safetensors", "samples/step-000010.jsonl", "episodes/step-000010.parquet"]
    {
        let read = |run: &str| std::fs::read(folder.path().join(run).join(file)).unwrap();
        assert!(read("one") == read("cut"), "{file} depends on how batches are cut");
    }
}

#[test]
fn another_seed_is_another_run() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    train(folder.path(), "one", &[]);
    train(folder.path(), "two", &["--set", "seed=8"]);
    let read = |run: &str| std::fs::read(folder.path().join(run).join("metrics.jsonl")).unwrap();
    assert_ne!(read("one"), read("two"));
}

#[test]
fn a_run_killed_twenty_times_ends_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    let started = Instant::now();
    train(folder.path(), "whole", &[]);
    let whole = started.elapsed();

    let random = base::Random::new(20, base::Purpose::Test);
    let mut first = true;
    let mut kills = 0;
    while kills < 20 {
        let run = folder.path().join("killed");
        // A run that had not even started cannot be resumed.
        let verb: &[&str] = if first || !run.join("config.toml").exists() {
            &["train", "small.toml", "--output", "killed"]
        } else {
            &["resume", "killed"]
        };
        first = false;
        let mut child =
            posttrain(folder.path()).args(verb).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        // From the first instruction to about a third of the whole run, so that the kills spread over all of it.
        thread::sleep(whole.mul_f64(0.35 * random.at(kills).uniform()) + Duration::from_millis(1));
        let finished = child.try_wait().unwrap();
        child.kill().ok();
        child.wait().unwrap();
        if finished.is_some() {
            // It got to the end between two kills; what is left of the kills goes to a fresh run.
            assert_same_run(&folder.path().join("whole"), &run);
            std::fs::remove_dir_all(&run).unwrap();
            first = true;
        }
        kills += 1;
    }
    let run = folder.path().join("killed");
    let verb: &[&str] = if run.join("config.toml").exists() {
        &["resume", "killed"]
    } else {
        &["train", "small.toml", "--output", "killed"]
    };
    expect(0, &posttrain(folder.path()).args(verb).output().unwrap());
    assert_same_run(&folder.path().join("whole"), &run);
}

/// Sends a signal the way a terminal does.
fn signal(name: &str, process: u32) {
    assert!(Command::new("kill").args([name, &process.to_string()]).status().unwrap().success());
}

#[test]
fn ctrl_c_finishes_the_step_saves_and_exits_130() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    train(folder.path(), "whole", &[]);
    // Checkpoints only at the end, so that the one that is found was written because of the interruption.
    let child = posttrain(folder.path())
        .args(["train", "small.toml", "--output", "stopped", "--set", "run.save_steps=1000"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = folder.path().join("stopped/metrics.jsonl");
    // Two lines: the evaluation before the first step, and a step.
    while std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 2 {
        thread::sleep(Duration::from_millis(2));
    }
    signal("-INT", child.id());
    let output = child.wait_with_output().unwrap();
    expect(130, &output);
    assert!(stderr(&output).contains("posttrain resume stopped"), "{}", stderr(&output));
    let saved = std::fs::read_dir(folder.path().join("stopped")).unwrap();
    let saved = saved.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("checkpoint-"));
    assert_eq!(saved.count(), 1);
    expect(0, &posttrain(folder.path()).args(["resume", "stopped"]).output().unwrap());
    for file in ["metrics.jsonl", "final/model.safetensors"] {
        let read = |run: &str| std::fs::read(folder.path().join(run).join(file)).unwrap();
        assert!(read("whole") == read("stopped"), "{file} differs after an interruption");
    }
}
