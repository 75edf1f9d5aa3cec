//! What users read: help and errors, word for word.

use std::process::{Command, Output, Stdio};

use crate::common::{SMALL, expect, posttrain, root, stderr, stdout, write};

/// Exit code, standard output and standard error of a command.
fn shown(output: &Output) -> String {
    let code = output.status.code().map_or("killed".to_owned(), |code| code.to_string());
    format!("exit {code}\n--- stdout\n{}--- stderr\n{}", stdout(output), stderr(output))
}

fn run(arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    write(folder.path(), "typo.toml", "[grpo]\nprompts_per_step = 4\nnum_generation = 8\n");
    write(folder.path(), "type.toml", "seed = 1\n[sft]\nbatch_size = \"large\"\n");
    write(folder.path(), "broken.toml", "seed = 1\n[model\n");
    write(folder.path(), "empty.toml", "");
    write(folder.path(), "method.toml", "[policy]\nmethod = \"gropo\"\n");
    write(folder.path(), "rows.toml", "[data]\ntrain = ['rows.jsonl']\n[model]\nname = 'tiny-llama'\n[sft]\n");
    write(
        folder.path(),
        "rows.jsonl",
        "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\", \"completion\": 3}\n",
    );
    shown(&posttrain(folder.path()).args(arguments).output().unwrap())
}

/// One snapshot for each command.
macro_rules! shows {
    ($($name:ident: $arguments:expr;)*) => { $(
        #[test]
        fn $name() {
            insta::assert_snapshot!(stringify!($name), run(&$arguments));
        }
    )* };
}

shows! {
    help: ["--help"];
    help_of_train: ["train", "--help"];
    help_of_generate: ["generate", "--help"];
    help_of_bench: ["bench", "--help"];
    help_of_frontier: ["frontier", "--help"];
    help_of_mix_weights: ["mix", "weights", "--help"];
    help_of_data_validate: ["data", "validate", "--help"];
    help_of_reward_lint: ["reward", "lint", "--help"];
    explained_referee: ["config", "explain", "referee"];
    referee_without_its_verifier: ["train", "small.toml", "--set", "referee.verifier='rewards/gold/mean'"];
    no_verb: [];
    unknown_verb: ["trian"];
    models: ["models"];
    methods: ["methods"];
    explained_method: ["explain", "sft"];
    unknown_method: ["explain", "gpro"];
    unknown_method_of_a_family: ["train", "method.toml"];
    explained_option: ["config", "explain", "grpo.num_generations"];
    explained_section: ["config", "explain", "run"];
    explained_choice: ["config", "explain", "rewards"];
    explained_typo: ["config", "explain", "grpo.num_generation"];
    unknown_key: ["train", "small.toml", "typo.toml"];
    unknown_key_in_a_flag: ["train", "small.toml", "--set", "sft.training.learning_rat=1"];
    unknown_key_of_a_table_further_in: ["train", "small.toml", "--set", "grpo.learning_rat=1"];
    wrong_type: ["train", "small.toml", "type.toml"];
    out_of_range: ["train", "small.toml", "--set", "grpo.num_generations=1"];
    options_that_exclude_each_other: ["train", "small.toml", "--set", "sft.training.warmup_steps=3", "--set", "sft.training.warmup_ratio=0.1"];
    broken_toml: ["train", "broken.toml"];
    missing_recipe: ["train", "nowhere.toml"];
    nothing_to_train: ["train", "empty.toml"];
    wrong_row: ["train", "rows.toml"];
    missing_data: ["train", "rows.toml", "--set", "data.train=['nowhere.jsonl']"];
    unknown_model: ["generate", "--model", "smolm2-135m-instruct", "--prompt", "hi"];
    offline_and_uncached: ["generate", "--offline", "--prompt", "hi"];
    resume_without_a_run: ["resume", "nowhere"];
    merge_without_an_adapter: ["merge", "tiny-llama", "--out", "merged"];
    wrong_flag_value: ["doctor", "--threads", "0"];
    wrong_device: ["train", "small.toml", "--set", "model.device='gpu'"];
    wrong_device_flag: ["generate", "--device", "gpu", "--prompt", "hi"];
    guide_without_a_head: ["generate", "--model", "tiny-llama", "--prompt", "hi", "--raw", "--guide", "tiny-llama"];
    guide_without_a_price: ["generate", "--model", "tiny-llama", "--prompt", "hi", "--raw", "--guide", "tiny-llama", "--guide-eta", "0"];
    price_without_a_guide: ["generate", "--model", "tiny-llama", "--prompt", "hi", "--guide-eta", "0.2"];
    bench_beyond_the_context: ["bench", "--model", "tiny-llama", "--length", "513", "--quiet"];
}

#[test]
fn flags_that_would_be_left_out_are_refused() {
    let told = run(&["pull", "--offline", "smollm2-135m-instruct"]);
    assert!(told.starts_with("exit 1") && told.contains("--offline forbids to fetch it"), "{told}");
    let system = ["generate", "--model", "tiny-llama", "--system", "Be brief."];
    let told = run(&system);
    assert!(told.starts_with("exit 2") && told.contains("--prompt"), "{told}");
    let told = run(&[&system[..], &["--prompt", "hi", "--raw"]].concat());
    assert!(told.starts_with("exit 2") && told.contains("'--raw'"), "{told}");
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_gpu_in_a_build_for_processors() {
    let device = "model.device='cuda:1'";
    insta::assert_snapshot!("a_gpu_in_a_build_for_processors", run(&["train", "small.toml", "--set", device]));
}

#[test]
fn a_run_is_not_overwritten_by_accident() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    let train = |flags: &[&str]| {
        posttrain(folder.path()).args(["train", "small.toml", "--quiet"]).args(flags).output().unwrap()
    };
    expect(0, &train(&[]));
    assert!(folder.path().join("runs/small/report.html").is_file());
    let again = train(&[]);
    expect(1, &again);
    insta::assert_snapshot!("existing_run", shown(&again));
    expect(0, &train(&["--overwrite"]));
    let resumed = posttrain(folder.path()).args(["resume", "runs/small"]).output().unwrap();
    expect(0, &resumed);
}

#[test]
fn dry_run_prints_a_recipe_that_resolves_to_itself() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    let dry = |recipe: &str| {
        let output = posttrain(folder.path()).args(["train", recipe, "--dry-run"]).output().unwrap();
        expect(0, &output);
        assert!(stderr(&output).contains("estimated memory") && stderr(&output).contains("estimated time"));
        stdout(&output)
    };
    let resolved = dry("small.toml");
    write(folder.path(), "resolved.toml", &resolved);
    assert_eq!(dry("resolved.toml"), resolved);
    assert!(!folder.path().join("runs").exists());
}

#[test]
fn every_recipe_is_valid_and_plans() {
    let folder = tempfile::tempdir().unwrap();
    let row = "{\"prompt\": [{\"role\": \"user\", \"content\": \"1 + 1?\"}], \"completion\": [{\"role\": \"assistant\", \"content\": \"2\"}], \"answer\": \"2\"}\n";
    let pair = "{\"prompt\": \"1 + 1?\", \"chosen\": \"2\", \"rejected\": \"3\"}\n";
    let steps = "{\"prompt\": \"1 + 1?\", \"completions\": [\"2\"], \"labels\": [true]}\n";
    let rows = [("[reward_model]", pair), ("[process_reward]", steps)];
    for entry in std::fs::read_dir(root().join("recipes")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let recipe = std::fs::read_to_string(&path).unwrap();
            let row = rows.iter().find(|(section, _)| recipe.contains(section)).map_or(row, |(_, row)| row);
            write(folder.path(), "train.jsonl", row);
            write(folder.path(), "test.jsonl", row);
            write(folder.path(), "forget.jsonl", row);
            write(folder.path(), "retain.jsonl", row);
            // Whatever the model, the rest of the recipe must hold.
            let output = posttrain(folder.path())
                .arg("train")
                .arg(&path)
                .args(["--dry-run", "--set", "model.name=tiny", "--set", "rendering.max_length=200"])
                .output()
                .unwrap();
            expect(0, &output);
        }
    }
}

#[test]
fn generated_documents_are_fresh() {
    let folder = tempfile::tempdir().unwrap();
    for (verb, file) in [("explain", "config.md"), ("schema", "config.schema.json")] {
        let output = posttrain(folder.path()).args(["config", verb]).output().unwrap();
        expect(0, &output);
        let written = std::fs::read_to_string(root().join("docs").join(file)).unwrap();
        assert!(written == stdout(&output), "docs/{file} is stale: run `posttrain config {verb} > docs/{file}`");
    }
    for family in train::methods::FAMILIES {
        let section = family.section;
        let output = posttrain(folder.path()).args(["explain", section, "--markdown"]).output().unwrap();
        expect(0, &output);
        let written = std::fs::read_to_string(root().join(format!("docs/methods/{section}.md"))).unwrap_or_default();
        let command = format!("posttrain explain {section} --markdown > docs/methods/{section}.md");
        assert!(written == stdout(&output), "docs/methods/{section}.md is stale: run `{command}`");
    }
}

#[test]
fn bench_counts_the_work_of_every_phase() {
    let folder = tempfile::tempdir().unwrap();
    let bench = |flags: &[&str]| {
        let sizes = ["--batch=2", "--length=16", "--decode-batch=3", "--prompt=8", "--new-tokens=6", "--repeats=1"];
        let mut command = posttrain(folder.path());
        command.args(["bench", "--model", "tiny-llama", "--json", "bench.json", "--quiet"]).args(sizes).args(flags);
        let output = command.output().unwrap();
        expect(0, &output);
        assert_eq!(stderr(&output), "");
        let json = std::fs::read_to_string(folder.path().join("bench.json")).unwrap();
        (stdout(&output), serde_json::from_str::<serde_json::Value>(&json).unwrap())
    };
    let (table, result) = bench(&["--precision", "f32"]);
    for phase in ["prepare", "forward", "backward", "optimiser", "step", "prefill", "decode"] {
        assert!(table.lines().any(|line| line.trim_start().starts_with(phase)), "{phase} is missing:\n{table}");
    }
    for phase in ["training", "generation"].iter().flat_map(|part| result[part].as_array().unwrap()) {
        for value in [&phase["seconds"], &phase["bound_seconds"], &phase["bytes"]["read"], &phase["bytes"]["written"]] {
            assert!(value.as_f64().unwrap() > 0.0, "{phase}");
        }
    }
    // Two layers: query, key and value; output; gate and up; down.
    let layers = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 64 * 2 * 144 + 144 * 64);
    let head = 64 * (result["parameters"].as_u64().unwrap() - layers - 5 * 64) / 64;
    let operations = |part: &str, index: usize| result[part][index]["product_operations"].as_f64().unwrap();
    assert_eq!(operations("training", 1), (2 * 2 * 16 * layers) as f64);
    assert_eq!(operations("training", 2), (2 * 2 * 2 * 16 * layers + 3 * 2 * 2 * 16 * head) as f64);
    assert_eq!(operations("generation", 0), (2 * 3 * 8 * layers) as f64);
    assert_eq!(operations("generation", 1), (2 * 3 * (layers + head)) as f64);

    let (_, adapted) = bench(&["--lora", "--precision", "bf16"]);
    assert!(adapted["training"][3]["bytes"]["read"].as_u64() < result["training"][3]["bytes"]["read"].as_u64());
    assert_eq!((adapted["lora"].as_bool(), adapted["precision"].as_str()), (Some(true), Some("bf16")));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = posttrain(folder.path())
        .args(["config", "explain"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    expect(0, &output);
    assert_eq!(stderr(&output), "");
}

#[test]
fn generate_reads_lines_and_writes_lines() {
    let folder = tempfile::tempdir().unwrap();
    let input = "{\"prompt\": \"a\", \"id\": 1}\n\n{\"messages\": [{\"role\": \"user\", \"content\": \"b\"}]}\n";
    let path = write(folder.path(), "input.jsonl", input);
    let generate = |path: &std::path::Path| {
        posttrain(folder.path())
            .args(["generate", "--model", "tiny-llama", "--max-new-tokens", "3", "--n", "2", "--quiet"])
            .stdin(std::fs::File::open(path).unwrap())
            .output()
            .unwrap()
    };
    let output = generate(&path);
    expect(0, &output);
    let rows: Vec<serde_json::Value> =
        stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0]["id"], 1);
    assert!(rows.iter().all(|row| row["completions"].as_array().unwrap().len() == 2));
    assert_eq!(stdout(&generate(&path)), stdout(&output), "the same seed gives the same answers");
    let output = posttrain(folder.path())
        .args(["generate", "--model", "tiny-llama", "--max-new-tokens", "3", "--n", "2", "--raw"])
        .stdin(std::fs::File::open(write(folder.path(), "raw.jsonl", "{\"prompt\": \"abcde\"}\n")).unwrap())
        .output()
        .unwrap();
    assert!(stderr(&output).contains("tokens of prompts: 5 computed, 5 reused"), "{}", stderr(&output));

    let output = generate(&write(folder.path(), "bad.jsonl", "{\"prompt\": \"a\"}\n{\"question\": \"b\"}\n"));
    expect(1, &output);
    let told = stderr(&output);
    assert!(told.contains("standard input, row 2: expected an object with `prompt`"), "{told}");
    let output = generate(&write(folder.path(), "list.jsonl", "\u{feff}{\"prompt\": \"a\"}\n[1, 2]\n"));
    expect(1, &output);
    let told = stderr(&output);
    assert!(told.contains("standard input, row 2: expected an object, got a list"), "{told}");
    let output = posttrain(folder.path())
        .args(["generate", "--model", "tiny-llama", "--raw"])
        .stdin(std::fs::File::open(&path).unwrap())
        .output()
        .unwrap();
    expect(1, &output);
    let told = stderr(&output);
    assert!(told.contains("standard input, row 3: expected a text in `prompt`, as `--raw` says"), "{told}");
}

#[test]
fn eval_measures_with_intervals_and_writes_answers() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    let output = posttrain(folder.path())
        .args(["eval", "small.toml", "--model", "tiny-qwen3", "--answers", "answers.jsonl"])
        .output()
        .unwrap();
    expect(0, &output);
    assert!(stdout(&output).contains("accuracy") && stdout(&output).contains("6 problems"), "{}", stdout(&output));
    assert_eq!(std::fs::read_to_string(folder.path().join("answers.jsonl")).unwrap().lines().count(), 6);
}

#[test]
fn a_lora_run_merges_into_a_model() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "small.toml", SMALL);
    let base = posttrain(folder.path())
        .args([
            "train",
            "small.toml",
            "--output",
            "base",
            "--set",
            "sft.training.max_steps=1",
            "--set",
            "grpo.training.max_steps=1",
        ])
        .output()
        .unwrap();
    expect(0, &base);
    write(folder.path(), "lora.toml", "[model]\nname = 'base/final'\n[lora]\nr = 4\n");
    let output =
        posttrain(folder.path()).args(["train", "small.toml", "lora.toml", "--output", "lora"]).output().unwrap();
    expect(0, &output);
    let output = posttrain(folder.path()).args(["merge", "lora", "--out", "merged"]).output().unwrap();
    expect(0, &output);
    assert!(stdout(&output).contains("largest logit difference"));
    let answer = |model: &str| {
        let output = posttrain(folder.path())
            .args([
                "generate",
                "--model",
                model,
                "--prompt",
                "1",
                "--temperature",
                "0",
                "--max-new-tokens",
                "4",
                "--precision",
                "f32",
            ])
            .output()
            .unwrap();
        expect(0, &output);
        stdout(&output)
    };
    assert_eq!(answer("merged"), answer("lora"));
}

#[test]
fn chat_answers_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "input", "hello\n/reset\nhello\n");
    let output = posttrain(folder.path())
        .args(["chat", "--model", "tiny-llama", "--max-new-tokens", "2"])
        .stdin(std::fs::File::open(path).unwrap())
        .output()
        .unwrap();
    expect(0, &output);
}

#[test]
fn doctor_examines_this_machine() {
    let folder = tempfile::tempdir().unwrap();
    let output = posttrain(folder.path()).arg("doctor").output().unwrap();
    expect(0, &output);
    for part in ["processor", "kernels", "threads", "memory", "disk", "cache", "is not cached", "python"] {
        assert!(stdout(&output).contains(part), "{part} is not in\n{}", stdout(&output));
    }
}

#[test]
fn the_ci_script_is_valid_shell() {
    assert!(Command::new("bash").args(["-n"]).arg(root().join(".ci/run")).status().unwrap().success());
}
