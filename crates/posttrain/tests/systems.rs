//! `systems`, `reproduce` and the measurements without a recipe, as a user meets them.

use std::fs;
use std::time::{Duration, Instant};

use crate::common::{expect, posttrain, root, stderr, stdout, write};

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
        (&["eval", "unlearning", "--forget", "nothing.jsonl"], 1, ["cannot read nothing.jsonl", "check the path"]),
        (&["systems", "data", "ceu", "--out", "here"], 1, ["there is no system `ceu` whose world is text", "ce-u"]),
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
    for several in [None, Some("--several")] {
        let arguments: Vec<&str> = ["questions.jsonl", "--json"].into_iter().chain(several).collect();
        let output = ask(&arguments);
        expect(0, &output);
        let found: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!((found["asked"].as_u64(), found["malformed"].as_u64()), (Some(2), Some(2)), "{several:?}");
    }
    // Answers that were written can be compared with, as long as they are to the same questions.
    let output = ask(&["questions.jsonl", "--answers", "answers.jsonl"]);
    expect(0, &output);
    let written = fs::read_to_string(folder.path().join("answers.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(written.lines().next().unwrap()).unwrap();
    assert_eq!((first["question"].as_str(), first["right"].as_bool()), (Some("What is 2 + 2?"), None));
    let spoken = written.replace("\"confidence\":null,\"right\":null", "\"confidence\":3,\"right\":true");
    write(folder.path(), "spoken.jsonl", &spoken);
    let output = ask(&["questions.jsonl", "--before", "spoken.jsonl", "--json"]);
    expect(0, &output);
    let found: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert!(found["differences"]["ece"].is_null(), "there is nothing to compare with where nothing can be read");
    write(folder.path(), "other.jsonl", "{\"question\": \"What is 2 + 2?\", \"answer\": 4}\n");
    let output = ask(&["other.jsonl", "--before", "answers.jsonl"]);
    expect(1, &output);
    assert!(stderr(&output).contains("answers.jsonl, row 2: question 1 is not \"Capital of Italy?\""));
    let output = ask(&["bad.jsonl"]);
    expect(1, &output);
    assert!(
        stderr(&output).contains("bad.jsonl, row 1: expected a text, a number or a list of these in column `answer`")
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
        "--output",
        "running",
    ]);
    expect(0, &output);
    // What a later process has to know of all rewards so far.
    let checkpoints = fs::read_dir(folder.path().join("running")).unwrap().map(|entry| entry.unwrap().path());
    let last = checkpoints.filter(|path| path.join("trainer_state.json").exists()).max().unwrap();
    let state = fs::read_to_string(last.join("reward_state.json")).unwrap();
    assert!(state.contains("\"count\""), "{state}");
}

#[test]
fn unlearning_is_measured_on_the_files_of_the_world() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| posttrain(folder.path()).args(arguments).arg("--quiet").output().unwrap();
    expect(0, &run(&["systems", "data", "ce-u", "--out", "world"]));
    // The first rows of each file are enough.
    for (name, rows) in [("forget", 40), ("retain", 360), ("real_authors", 200), ("world_facts", 60), ("full", 660)] {
        let text = fs::read_to_string(folder.path().join(format!("world/{name}.jsonl"))).unwrap();
        assert_eq!(text.lines().count(), rows, "{name}");
        write(
            folder.path(),
            &format!("{name}.jsonl"),
            &text.lines().take(3).map(|line| format!("{line}\n")).collect::<String>(),
        );
    }
    let flags = ["--model", "tiny-llama", "--precision", "f32", "--max-new-tokens", "4", "--forget", "forget.jsonl"];
    let measure = |more: &[&str]| run(&[&["eval", "unlearning"], &flags[..], more].concat());
    let output = measure(&[]);
    expect(0, &output);
    assert!(stdout(&output).contains("model utility   not measured: no `--retain`"), "{}", stdout(&output));
    assert!(stdout(&output).contains("forget quality  not measured: no `--retain-model`"));
    let sets =
        ["--retain", "retain.jsonl", "--real-authors", "real_authors.jsonl", "--world-facts", "world_facts.jsonl"];
    let output = measure(&[&sets[..], &["--retain-model", "tiny-llama", "--json"]].concat());
    expect(0, &output);
    let found: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(found["forget_quality"]["p_value"], 1.0, "nothing can be told apart from itself");
    assert_eq!(found["sets"].as_array().unwrap().len(), 4);
    assert_eq!(found["sets"][2]["kind"], "options");
    // A random model finds every option about as probable: a share of a sixth.
    let share = found["sets"][3]["probability"].as_f64().unwrap();
    assert!((share - 1.0 / 6.0).abs() < 0.05, "{share}");

    for (row, parts) in [
        ("{\"question\": \"Who?\"}", "expected a text in column `paraphrased_answer`, got null"),
        (
            "{\"question\": \"Who?\", \"answer\": \"A.\", \"paraphrased_answer\": \"B.\", \"perturbed_answer\": []}",
            "expected a list of wrong answers in column `perturbed_answer`, got []",
        ),
        ("nonsense", "not valid JSON: expected ident at character 2"),
        ("[1, 2]", "expected an object, got a list"),
    ] {
        write(folder.path(), "forget.jsonl", &format!("\u{feff}\n{row}\n"));
        let output = measure(&[]);
        expect(1, &output);
        let shown = stderr(&output);
        assert!(shown.contains("forget.jsonl, row 2") && shown.contains(parts) && shown.contains("hint"), "{shown}");
    }
}

/// Ada and Bea agree, Cy wants the opposite; the shared model sides with the majority, the own one with everybody.
#[test]
fn personal_preferences_are_described_and_methods_judged() {
    let folder = tempfile::tempdir().unwrap();
    let (mut preferences, mut shared, mut own) = (String::new(), String::new(), String::new());
    for pair in 0..20 {
        let majority = 1 + pair % 2;
        for (user, preferred) in [("ada", majority), ("bea", majority), ("cy", 3 - majority)] {
            preferences += &format!("{{\"user\": \"{user}\", \"pair\": \"p{pair}\", \"preferred\": {preferred}}}\n");
            let scores = if preferred == 1 { "[1, 0]" } else { "[0, 1]" };
            own += &format!("{{\"user\": \"{user}\", \"pair\": \"p{pair}\", \"scores\": {scores}}}\n");
        }
        let scores = if majority == 1 { "[2.5, 1]" } else { "[1, 2.5]" };
        shared += &format!("{{\"pair\": \"p{pair}\", \"scores\": {scores}}}\n");
        shared += &format!("{{\"user\": \"cy\", \"pair\": \"p{pair}\", \"scores\": [0, 0], \"pairs_seen\": 30}}\n");
    }
    for pair in 0..4 {
        preferences += &format!("{{\"skill\": \"safety\", \"pair\": \"s{pair}\", \"preferred\": 1}}\n");
        shared += &format!("{{\"pair\": \"s{pair}\", \"scores\": [1, 0]}}\n");
        for user in ["ada", "bea", "cy"] {
            let scores = if user == "cy" && pair < 2 { "[0, 1]" } else { "[1, 0]" };
            own += &format!("{{\"user\": \"{user}\", \"pair\": \"s{pair}\", \"scores\": {scores}}}\n");
        }
    }
    write(folder.path(), "preferences.jsonl", &preferences);
    write(folder.path(), "shared.jsonl", &shared);
    write(folder.path(), "own.jsonl", &own);
    write(folder.path(), "bad.jsonl", "{\"user\": \"dan\", \"pair\": \"p1\", \"scores\": [1, 0]}\n");
    let run = |scores: &[&str], more: &[&str]| {
        let mut command = posttrain(folder.path());
        command.args(["eval", "personalized", "--preferences", "preferences.jsonl"]);
        scores.iter().for_each(|scores| {
            command.args(["--scores", scores]);
        });
        command.args(more).output().unwrap()
    };
    let both = ["shared=shared.jsonl", "own=own.jsonl"];
    let output = run(&both, &["--own", "own"]);
    expect(0, &output);
    insta::assert_snapshot!("personalized", stdout(&output));
    let output = run(&both, &["--json"]);
    expect(0, &output);
    let found: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(found["descriptors"]["minority"], serde_json::json!([2]));
    assert_eq!(found["methods"]["own"]["tax"]["safety"]["largest"], 0.5);
    assert_eq!(found["methods"]["shared"]["adapted"]["30"]["accuracy"], 0.5, "a model that tells nothing apart");

    for (scores, more, code, part) in [
        (&["shared.jsonl"][..], &[][..], 2, "expected a method and its file in `--scores shared.jsonl`"),
        (&both, &["--reference", "onw"], 2, "there are no scores of `onw`"),
        (&["bad=bad.jsonl"], &[], 1, "bad.jsonl, row 1: the preferences have no user `dan`"),
        (&["twice=own.jsonl", "twice=own.jsonl"], &[], 2, "the method `twice` is given twice"),
    ] {
        let output = run(scores, more);
        expect(code, &output);
        assert!(stderr(&output).contains(part), "{}", stderr(&output));
    }
}
