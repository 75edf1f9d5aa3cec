//! Several models that answer as one: frontiers and mixtures, on the command line.

use std::path::Path;
use std::sync::LazyLock;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{SMALL, expect, posttrain, stderr, stdout, write};

/// A base, and two models that were trained from it.
static MODELS: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let recipe = SMALL.split("[grpo]").next().unwrap();
    write(folder.path(), "recipe.toml", recipe);
    let train = |name: &str, settings: &[&str]| {
        let settings = settings.iter().flat_map(|setting| ["--set", setting]);
        let output = posttrain(folder.path())
            .args(["train", "recipe.toml", "--quiet", "--output", name])
            .args(settings)
            .output()
            .unwrap();
        expect(0, &output);
    };
    train("base", &["sft.training.max_steps=2"]);
    train("one", &["model.name='base'", "seed=1"]);
    train("other", &["model.name='base'", "seed=2", "sft.training.learning_rate=2e-3"]);
    folder
});

fn folder() -> &'static Path {
    MODELS.path()
}

fn run(code: i32, arguments: &[&str]) -> String {
    let output = posttrain(folder()).args(arguments).output().unwrap();
    expect(code, &output);
    if code == 0 { stdout(&output) } else { stderr(&output) }
}

/// Three answers.
fn answers(flags: &[&str]) -> String {
    let common =
        ["generate", "--quiet", "--raw", "--prompt", "3+4=", "--n", "3", "--max-new-tokens", "8", "--precision", "f32"];
    run(0, &[&common[..], flags].concat())
}

/// Searches once.
static FRONTIER: LazyLock<Value> = LazyLock::new(|| {
    let search = ["--prompts", "3", "--grid", "2", "--averages", "3", "--refinements", "0", "--out", "found.json"];
    let models =
        ["frontier", "recipe.toml", "--set", "model.name='base'", "--model", "one", "--model", "other", "--quiet"];
    let table = run(0, &[&models[..], &search].concat());
    assert!(table.contains("number") && table.contains("length") && table.contains("before training"), "{table}");
    serde_json::from_str(&std::fs::read_to_string(folder().join("found.json")).unwrap()).unwrap()
});

/// The frontier with other policies: their coefficients and values.
fn frontier_of(name: &str, policies: &[(&[f64], [f64; 2])]) {
    let mut file = FRONTIER.clone();
    let policy = |(coefficients, objectives): &(&[f64], [f64; 2])| {
        json!({
            "coefficients": coefficients,
            "scores": {"objectives": objectives, "divergence": 0.0, "perplexity_ratio": 1.0},
        })
    };
    file["policies"] = policies.iter().map(policy).collect();
    write(folder(), name, &file.to_string());
}

#[test]
fn a_frontier_names_its_models_and_its_policies() {
    let file = &*FRONTIER;
    assert_eq!(file["base"]["model"], "base");
    assert_eq!(file["models"].as_array().unwrap().len(), 2);
    assert_eq!(file["objectives"][0]["name"], "number");
    let policies = file["policies"].as_array().unwrap();
    assert!(!policies.is_empty());
    for policy in policies {
        assert_eq!(policy["coefficients"].as_array().unwrap().len(), 2);
        assert!(policy["scores"]["perplexity_ratio"].as_f64().unwrap() <= 1.5);
    }
    assert!(!answers(&["--frontier", "found.json", "--preference", "0.5,0.5"]).is_empty());
}

/// What a policy answers is what the model of its coefficients answers, and the preference picks it.
#[test]
fn a_preference_picks_the_policy_that_answers() {
    frontier_of("ends.json", &[(&[1.0, 0.0], [9.0, 0.0]), (&[0.0, 0.0], [5.0, 5.0]), (&[0.0, 1.0], [0.0, 9.0])]);
    let with =
        |preference: &str| answers(&["--frontier", "ends.json", "--preference", preference, "--utility", "chebyshev"]);
    let of = |model: &str| answers(&["--model", model]);
    assert_ne!(of("one"), of("other"));
    assert_eq!(with("1,0"), of("one"));
    assert_eq!(with("0,1"), of("other"));
}

/// Three blocks: what lies outside of the layers, and two layers.
#[test]
fn a_policy_may_have_coefficients_for_every_block() {
    let models =
        ["frontier", "recipe.toml", "--set", "model.name='base'", "--model", "one", "--model", "other", "--quiet"];
    let search = ["--prompts", "2", "--samples", "1", "--grid", "2", "--averages", "2", "--refinements", "0"];
    let table = run(0, &[&models[..], &search, &["--granularity", "block", "--out", "blocks.json"]].concat());
    let file: Value = serde_json::from_str(&std::fs::read_to_string(folder().join("blocks.json")).unwrap()).unwrap();
    let lengths = file["policies"].as_array().unwrap().iter().map(|policy| policy["coefficients"].as_array().unwrap());
    let lengths: Vec<usize> = lengths.map(Vec::len).collect();
    assert!(lengths.iter().all(|length| [2, 6].contains(length)), "{lengths:?}");
    assert_eq!(table.matches("by block, mean").count(), lengths.iter().filter(|length| **length == 6).count());
    // The same in every block is the model.
    frontier_of("equal.json", &[(&[1.0, 0.0].repeat(3), [9.0, 0.0])]);
    let with = |name| ["--frontier", name, "--preference", "1,0"];
    assert_eq!(answers(&with("equal.json")), answers(&["--model", "one"]));
    for (count, told) in [
        (3, "policy 1: expected 2 coefficients, or so many for each block, and 2 values"),
        (14, "expected 2 finite coefficients, or 2 for each of 3 blocks"),
    ] {
        frontier_of("odd.json", &[(&vec![0.5; count], [9.0, 0.0])]);
        let output = run(1, &[&["generate", "--quiet", "--prompt", "1"][..], &with("odd.json")].concat());
        assert!(output.contains(told), "{output}");
    }
}

#[test]
fn a_mixture_of_one_is_that_one() {
    let with = |shares: &str| answers(&["--mix", "one", "--mix", "other", "--shares", shares]);
    let of = |model: &str| answers(&["--model", model]);
    assert_eq!(with("1,0"), of("one"));
    assert_eq!(with("0,1"), of("other"));
    assert_eq!(with("2,2"), answers(&["--mix", "one", "--mix", "other"]), "shares are scaled, and equal unless said");
    let resampled = || answers(&["--mix", "one", "--mix", "other", "--candidates", "4"]);
    assert_eq!(resampled(), resampled());
    assert_eq!(resampled().lines().count(), 3);
}

#[test]
fn answers_of_a_mixture_do_not_depend_on_what_else_is_asked() {
    let lines = |prompts: &[&str]| {
        let input: String = prompts.iter().map(|prompt| format!("{}\n", json!({"prompt": prompt}))).collect();
        write(folder(), "lines.jsonl", &input);
        let flags = [
            "generate",
            "--quiet",
            "--raw",
            "--mix",
            "one",
            "--mix",
            "other",
            "--candidates",
            "3",
            "--max-new-tokens",
            "6",
        ];
        let input = std::fs::File::open(folder().join("lines.jsonl")).unwrap();
        let output = posttrain(folder()).args(flags).stdin(input).output().unwrap();
        expect(0, &output);
        stdout(&output)
    };
    let both = lines(&["1+1=", "5+6="]);
    assert_eq!(lines(&["1+1="]), both.lines().next().unwrap().to_owned() + "\n");
}

#[test]
fn equal_models_have_equal_shares() {
    let search = ["--prompts", "4", "--responses", "4", "--steps", "50", "--max-new-tokens", "6", "--json", "--quiet"];
    let of = |models: [&str; 2]| -> Value {
        let mixes =
            ["mix", "weights", "recipe.toml", "--set", "model.name='base'", "--mix", models[0], "--mix", models[1]];
        serde_json::from_str(&run(0, &[&mixes[..], &search].concat())).unwrap()
    };
    let same = of(["one", "one"]);
    assert!((same["models"][0]["share"].as_f64().unwrap() - 0.5).abs() < 1e-9);
    let found = of(["one", "other"]);
    let sum: f64 = (0..2).map(|model| found["models"][model]["share"].as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-6, "{found}");
}

#[test]
fn misuse_is_told() {
    frontier_of("two.json", &[(&[1.0, 0.0], [9.0, 0.0])]);
    let generate =
        |code, flags: &[&str]| run(code, &[&["generate", "--quiet", "--raw", "--prompt", "1"], flags].concat());
    insta::assert_snapshot!("preference_of_one", generate(2, &["--frontier", "two.json", "--preference", "1"]));
    insta::assert_snapshot!("mix_of_one", generate(2, &["--mix", "one"]));
    insta::assert_snapshot!(
        "shares_of_another_count",
        generate(2, &["--mix", "one", "--mix", "other", "--shares", "1"])
    );
    insta::assert_snapshot!(
        "candidates_without_chance",
        generate(2, &["--mix", "one", "--mix", "other", "--candidates", "2", "--temperature", "0"])
    );
    let told = generate(2, &["--frontier", "two.json", "--preference", "1,1", "--kl-weight", "nan"]);
    assert!(told.contains("expected a finite number"), "{told}");
    let mix = |code, flags: &[&str]| {
        let mix = ["mix", "weights", "recipe.toml", "--set", "model.name='base'", "--mix", "one", "--mix", "other"];
        run(code, &[&mix[..], flags].concat())
    };
    assert!(mix(2, &["--rate", "nan"]).contains("expected a finite number above 0"));
    assert!(mix(2, &["--max-new-tokens", "0"]).contains("max_new_tokens"));
    assert!(mix(1, &["--max-new-tokens", "600"]).contains("lower it: `--max-new-tokens 256`"));
    let long =
        ["frontier", "recipe.toml", "--model", "one", "--out", "f.json", "--quiet", "--set", "model.name='base'"];
    let told = run(1, &[&long[..], &["--set", "grpo.sampling.max_new_tokens=600"]].concat());
    assert!(told.contains("lower it: `--set grpo.sampling.max_new_tokens=256`"), "{told}");
    write(folder(), "no.json", "{\"format\": 7}");
    insta::assert_snapshot!("frontier_of_another_format", generate(1, &["--frontier", "no.json", "--preference", "1"]));
    let mut changed: Value =
        serde_json::from_str(&std::fs::read_to_string(folder().join("two.json")).unwrap()).unwrap();
    changed["models"][1]["sha256"] = "0".into();
    write(folder(), "changed.json", &changed.to_string());
    let told = generate(1, &["--frontier", "changed.json", "--preference", "1,1"]);
    assert!(told.contains("measured with other weights of other") && told.contains("hint:"), "{told}");
    let one_reward = ["--set", "model.name='base'", "--set", "rewards=[{type='number'}]"];
    let frontier = ["frontier", "recipe.toml", "--model", "one", "--out", "f.json", "--quiet"];
    insta::assert_snapshot!("frontier_of_one_objective", run(1, &[&frontier[..], &one_reward].concat()));
}
