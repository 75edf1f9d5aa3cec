//! `systems`, `reproduce` and `eval calibration`, as a user meets them.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{expect, posttrain, root, stderr, stdout, write};

#[test]
fn the_page_of_systems_is_fresh() {
    let output = posttrain(&root()).args(["systems", "--markdown"]).output().unwrap();
    expect(0, &output);
    let written = fs::read_to_string(root().join("docs/systems.md")).unwrap_or_default();
    assert!(
        written == stdout(&output),
        "docs/systems.md is stale: run `posttrain systems --markdown > docs/systems.md`"
    );
}

#[test]
fn every_system_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    let output = posttrain(folder.path()).arg("systems").output().unwrap();
    expect(0, &output);
    for system in systems::SYSTEMS {
        assert!(stdout(&output).contains(system.name) && stdout(&output).contains(system.summary));
    }
    assert!(stdout(&output).contains("no evidence here"));
}

#[test]
fn a_quick_reproduction_of_everything_writes_reports_and_decides_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let output = posttrain(folder.path()).args(["reproduce", "--all", "--quick"]).output().unwrap();
    expect(0, &output);
    assert!(started.elapsed() < Duration::from_secs(60) * systems::SYSTEMS.len() as u32);
    let index = fs::read_to_string(folder.path().join("runs/systems/index.html")).unwrap();
    for system in systems::SYSTEMS {
        assert!(index.contains(system.title));
        let own = folder.path().join("runs/systems").join(system.name);
        let report = fs::read_to_string(own.join("report.html")).unwrap();
        assert!(report.contains("<svg") && !report.contains("NaN") && !report.contains("http"), "{}", system.name);
        let evidence = fs::read_to_string(own.join("evidence.json")).unwrap();
        let evidence: systems::Evidence = serde_json::from_str(&evidence).unwrap();
        assert_eq!(evidence.seeds, [0]);
        assert!(evidence.claims.iter().all(|claim| claim.verdict == systems::Verdict::Undecided));
        for claim in system.claims {
            assert!(stdout(&output).contains(claim.statement));
        }
    }
    assert!(!folder.path().join("evidence").exists(), "a quick run is no evidence");
}

#[test]
fn mistakes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, code, parts) in [
        (&["reproduce", "pra"][..], 1, ["there is no system `pra`", "did you mean `par`?"]),
        (
            &["reproduce", "par", "--set", "ppo.objective.bta=1"],
            1,
            ["unknown key `ppo.objective.bta`", "ppo.objective.beta"],
        ),
        (&["reproduce", "par", "--set", "samples=0"], 1, ["`samples`", "at least 1"]),
        (&["reproduce", "par", "--arms", "par,vanila"], 1, ["par has no arm `vanila`", "did you mean `vanilla`?"]),
        (&["reproduce"], 2, ["required", "NAME"]),
        (&["eval", "calibration", "nothing.jsonl"], 1, ["cannot read nothing.jsonl", "check the path"]),
    ] {
        let output = posttrain(folder.path()).args(arguments).output().unwrap();
        expect(code, &output);
        assert!(parts.iter().all(|part| stderr(&output).contains(part)), "{arguments:?}:\n{}", stderr(&output));
    }
}

#[test]
fn calibration_counts_what_it_cannot_read() {
    let folder = tempfile::tempdir().unwrap();
    let rows = "{\"question\": \"What is 2 + 2?\", \"answer\": [4, \"four\"]}\n{\"question\": \"Capital of Italy?\", \"answer\": \"Rome\"}\n";
    write(folder.path(), "questions.jsonl", rows);
    write(folder.path(), "bad.jsonl", "{\"question\": \"What?\"}\n");
    let ask = |arguments: &[&str]| {
        let flags = ["--model", "tiny-llama", "--precision", "f32", "--max-new-tokens", "8", "--quiet"];
        posttrain(folder.path()).args(["eval", "calibration"]).args(arguments).args(flags).output().unwrap()
    };
    // A random model says nothing that could be read.
    let output = ask(&["questions.jsonl", "-n", "2", "--report", "reliability.html"]);
    expect(0, &output);
    assert!(stdout(&output).contains("answers     4\nmalformed   100.0 %"), "{}", stdout(&output));
    assert!(stdout(&output).contains("no confidence could be read"));
    assert!(folder.path().join("reliability.html").exists());
    let output = ask(&["questions.jsonl", "--json"]);
    expect(0, &output);
    let found: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((found["answers"].as_u64(), found["malformed"].as_u64()), (Some(2), Some(2)));
    let output = ask(&["bad.jsonl"]);
    expect(1, &output);
    assert!(
        stderr(&output).contains("bad.jsonl, line 1: expected a text, a number or a list of these in column `answer`")
    );
}

#[test]
fn references_are_written_once_and_shape_a_reward() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = r#"
seed = 3
[model]
name = "tiny-llama"
precision = "f32"
[data]
train = ["rows.jsonl"]
[[rewards]]
type = "length"
max_length = 6
buffer = 6
shaping = { type = "par" }
[ppo]
prompts_per_step = 4
num_generations = 1
[ppo.sampling]
max_new_tokens = 8
[ppo.training]
max_steps = 2
"#;
    let row = "{\"prompt\": [{\"role\": \"user\", \"content\": \"Hello?\"}]}\n";
    write(folder.path(), "rows.jsonl", &row.repeat(4));
    write(folder.path(), "par.toml", recipe);
    let run = |arguments: &[&str]| posttrain(folder.path()).args(arguments).arg("--quiet").output().unwrap();
    let output = run(&["train", "par.toml"]);
    expect(1, &output);
    assert!(stderr(&output).contains("row 0 of the batch has no column \"references\""), "{}", stderr(&output));
    expect(0, &run(&["reward", "references", "par.toml", "-n", "3", "--out", "referenced.jsonl"]));
    let rows = fs::read_to_string(folder.path().join("referenced.jsonl")).unwrap();
    for row in rows.lines() {
        let row: serde_json::Value = serde_json::from_str(row).unwrap();
        assert_eq!(row["references"]["length"].as_array().unwrap().len(), 3);
    }
    expect(0, &run(&["train", "par.toml", "--set", "data.train=['referenced.jsonl']", "--output", "run"]));
    let metrics = fs::read_to_string(folder.path().join("run/metrics.jsonl")).unwrap();
    assert!(metrics.contains("rewards/raw/mean") || metrics.contains("/raw/mean"), "{metrics}");
    let output = run(&[
        "train",
        "par.toml",
        "--set",
        "rewards=[{type='length', max_length=6, buffer=6, shaping={type='min_max'}}]",
    ]);
    expect(1, &output);
    assert!(stderr(&output).contains("no checkpoint holds these"), "{}", stderr(&output));
}
