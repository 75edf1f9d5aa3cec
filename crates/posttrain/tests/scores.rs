//! Models that score, from recipe to judge: trained, measured, averaged, asked at test time and paid by.

use std::path::Path;

use model::weights::{Tensors, safetensors};

use crate::common::{SMALL, expect, posttrain, stderr, stdout, write};

const RECIPE: &str = r#"
seed = 7
[model]
name = "tiny-llama"
precision = "f32"
[data]
train = ["pairs.jsonl"]
test = ["pairs.jsonl"]
[reward_model]
batch_size = 8
center_rewards_coefficient = 0.01
[reward_model.training]
max_steps = 12
learning_rate = 3e-3
[run]
save_steps = 0
eval_steps = 0
"#;

fn tensors(folder: &Path) -> Tensors {
    safetensors::read(folder).unwrap()
}

/// Answers that are right win.
fn write_rows(folder: &Path) {
    let rows = |row: &dyn Fn(u32, u32) -> String| -> String {
        (0..6).flat_map(|a| (0..4).map(move |b| (a, b))).map(|(a, b)| row(a, b) + "\n").collect()
    };
    let pairs = rows(&|a, b| {
        let (right, wrong) = (a + b, (a + b + 1 + a % 3) % 10);
        format!("{{\"prompt\": \"{a}+{b}=\", \"chosen\": \"{right}\", \"rejected\": \"{wrong}\", \"margin\": 0.1}}")
    });
    let steps = rows(&|a, b| {
        let label = if a % 2 == 0 { "0.75" } else { "false" };
        format!("{{\"prompt\": \"{a}+{b}=\", \"completions\": [\"{a}\", \"{b}\"], \"labels\": [true, {label}]}}")
    });
    write(folder, "pairs.jsonl", &pairs);
    write(folder, "steps.jsonl", &steps);
    write(folder, "reward.toml", RECIPE);
    write(folder, "small.toml", SMALL);
}

fn run(folder: &Path, arguments: &[&str]) -> String {
    let output = posttrain(folder).args(arguments).output().unwrap();
    expect(0, &output);
    stdout(&output)
}

#[test]
fn reward_models_are_trained_measured_averaged_and_asked() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_rows(folder);
    for (name, seed) in [("one", "seed=1"), ("two", "seed=2")] {
        let told = run(folder, &["train", "reward.toml", "--output", name, "--set", seed]);
        assert!(told.contains("accuracy before") && told.contains("24 problems"), "{told}");
    }
    let config = std::fs::read_to_string(folder.join("one/final/config.json")).unwrap();
    assert!(config.contains("LlamaForSequenceClassification") && config.contains("\"num_labels\": 1"), "{config}");
    let card = std::fs::read_to_string(folder.join("one/README.md")).unwrap();
    assert!(card.contains("pipeline_tag: text-classification"), "{card}");
    let told = run(folder, &["eval", "reward.toml", "--model", "one"]);
    assert!(told.contains("accuracy") && told.contains("margin"), "{told}");

    run(folder, &["merge", "one", "two", "--average", "--shares", "1,3", "--out", "mean"]);
    run(folder, &["eval", "reward.toml", "--model", "mean"]);
    // Every tensor is averaged, the score head among them: three of four parts are the second model's.
    let [one, two, mean] = ["one/final", "two/final", "mean"].map(|name| tensors(&folder.join(name)));
    assert!(mean.contains_key("score.weight") && one["score.weight"] != two["score.weight"]);
    for (name, mean) in &mean {
        let of = one[name].data.iter().zip(&two[name].data).map(|(one, two)| (one + 3.0 * two) / 4.0);
        assert!(of.zip(&mean.data).all(|(expected, found)| (expected - found).abs() < 1e-6), "{name}");
    }
    let two = posttrain(folder).args(["merge", "one", "two", "--out", "none"]).output().unwrap();
    expect(2, &two);

    // As judges of answers, alone and together, and by name of a judge that is none.
    let judged = |strategy: &str, models: &str| {
        let models = format!("judge.models={models}");
        let set = ["--set", &models, "--set", "test_time.samples=4", "--set", "test_time.sampling.max_new_tokens=6"];
        let verb = ["eval", "small.toml", "--test-time", strategy, "--set", "judge.as_probability=true"];
        run(folder, &[&verb[..], &set[..], &["--set", "test_time.simulations=2"]].concat())
    };
    for strategy in ["best_of_n", "majority", "weighted_vote", "step_beam", "mcts"] {
        let told = judged(strategy, "['one', 'mean']");
        assert!(told.contains("accuracy") && told.contains("generated for each"), "{strategy}: {told}");
    }
    assert!(judged("best_of_n", "['one']").contains("with   4"));
    let none = posttrain(folder).args(["eval", "small.toml", "--test-time", "best_of_n"]).output().unwrap();
    expect(1, &none);
    assert!(stderr(&none).contains("`[judge]`"), "{}", stderr(&none));
    let plain = ["eval", "small.toml", "--test-time", "best_of_n", "--set", "judge.models=['tiny-llama']"];
    let plain = posttrain(folder).args(plain).output().unwrap();
    expect(1, &plain);
    assert!(stderr(&plain).contains("no score head"), "{}", stderr(&plain));
    // A model that scores does not write.
    let written = posttrain(folder).args(["generate", "--model", "one", "--prompt", "1", "--raw"]).output().unwrap();
    expect(1, &written);
    assert!(stderr(&written).contains("scores and does not write"), "{}", stderr(&written));

    // As a reward.
    write(folder, "paid.toml", "[[rewards]]\ntype = 'model'\nmodels = ['one', 'two']\nensemble = 'min'\n");
    let steps = ["--set", "sft.training.max_steps=1", "--set", "grpo.training.max_steps=2"];
    run(folder, &[&["train", "small.toml", "paid.toml", "--output", "paid"][..], &steps[..]].concat());
    let metrics = std::fs::read_to_string(folder.join("paid/metrics.jsonl")).unwrap();
    assert!(metrics.contains("rewards/model/mean") && metrics.contains("rewards/model/1/mean"), "{metrics}");
    let lint = posttrain(folder).args(["reward", "lint", "small.toml", "paid.toml", "--rows", "2"]).output().unwrap();
    let table = stdout(&lint);
    assert!(table.starts_with("mean over 2 rows") && table.contains("model"), "{table}\n{}", stderr(&lint));

    // What pays is part of what the run is made from.
    std::fs::remove_file(folder.join("paid/summary.json")).unwrap();
    std::fs::copy(folder.join("two/final/model.safetensors"), folder.join("one/final/model.safetensors")).unwrap();
    let resumed = posttrain(folder).args(["resume", "paid"]).output().unwrap();
    expect(1, &resumed);
    assert!(
        stderr(&resumed).contains("reward model: one are others than the run was started with"),
        "{}",
        stderr(&resumed)
    );
}

/// An error is no percentage, and rows that are neither right nor wrong are called neither.
#[test]
fn a_squared_error_is_no_share() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let rows: String = (0..8)
        .map(|a| format!("{{\"prompt\": \"{a}+1=\", \"completion\": \"{}\", \"score\": {}}}\n", a + 1, a % 2))
        .collect();
    write(folder, "pairs.jsonl", &rows);
    let recipe = RECIPE.replace("center_rewards_coefficient = 0.01", "loss_type = 'mse'").replace("= 12", "= 2");
    write(folder, "mse.toml", &recipe);
    let told = run(folder, &["train", "mse.toml", "--output", "mse"]);
    assert!(told.contains("mse before") && !told.contains(" %  ("), "{told}");
    let told = run(folder, &["eval", "mse.toml", "--model", "mse"]);
    assert!(told.contains("mse") && !told.contains(" %  ("), "{told}");
    let page = std::fs::read_to_string(folder.join("mse/report.html")).unwrap();
    assert!(page.contains("after</div>") && !page.contains("✗ wrong") && !page.contains("✓ right"));
}

/// Two heads are trained and one is left, which is a reward model like any other.
#[test]
fn odin_gives_a_reward_model() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_rows(folder);
    let recipe = RECIPE.replace("[reward_model", "[odin").replace("save_steps = 0", "save_steps = 6");
    write(folder, "odin.toml", &recipe);
    let told = run(folder, &["train", "odin.toml", "--output", "odin"]);
    assert!(told.contains("accuracy before") && told.contains("24 problems"), "{told}");
    let metrics = std::fs::read_to_string(folder.join("odin/metrics.jsonl")).unwrap();
    assert!(metrics.contains("length_correlation/quality") && metrics.contains("heads_cosine"), "{metrics}");
    run(folder, &["eval", "reward.toml", "--model", "odin"]);
    run(folder, &["train", "reward.toml", "--output", "plain"]);
    run(folder, &["merge", "odin", "plain", "--average", "--out", "mean"]);
    assert_eq!(tensors(&folder.join("mean"))["score.weight"].shape[0], 1);
    write(folder, "paid.toml", "[[rewards]]\ntype = 'model'\nmodels = ['odin']\n");
    let steps = ["--set", "sft.training.max_steps=1", "--set", "grpo.training.max_steps=1"];
    run(folder, &[&["train", "small.toml", "paid.toml", "--output", "paid"][..], &steps[..]].concat());

    // Half of what it needs: a model with one head.
    let again = ["train", "odin.toml", "--set", "model.name='odin'", "--output", "again"];
    let again = posttrain(folder).args(again).output().unwrap();
    expect(1, &again);
    let told = stderr(&again);
    assert!(told.contains("odin: its score head has 1 outputs, expected 2, as [odin] is set"), "{told}");
    let labels = ["train", "odin.toml", "--set", "odin.loss_type='bce'", "--output", "labels"];
    let labels = posttrain(folder).args(labels).output().unwrap();
    expect(1, &labels);
    assert!(stderr(&labels).contains("unless loss_type is bradley_terry"), "{}", stderr(&labels));
}

#[test]
fn process_reward_models_are_trained_with_an_adapter_and_asked() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_rows(folder);
    run(
        folder,
        &[
            "train",
            "small.toml",
            "--output",
            "base",
            "--set",
            "sft.training.max_steps=1",
            "--set",
            "grpo.training.max_steps=1",
        ],
    );
    write(
        folder,
        "prm.toml",
        "[model]\nname = 'base/final'\nprecision = 'f32'\n[lora]\nr = 4\n[data]\ntrain = ['steps.jsonl']\ntest = ['steps.jsonl']\n\
         [process_reward]\nloss_type = 'bce'\n[process_reward.training]\nmax_steps = 4\nlearning_rate = 1e-3\n[run]\nsave_steps = 2\n",
    );
    let told = run(folder, &["train", "prm.toml", "--output", "prm"]);
    assert!(told.contains("accuracy after"), "{told}");
    run(folder, &["eval", "prm.toml", "--model", "prm"]);
    run(folder, &["merge", "prm", "--out", "merged"]);
    let config = std::fs::read_to_string(folder.join("merged/config.json")).unwrap();
    assert!(config.contains("LlamaForTokenClassification"), "{config}");
    for model in ["prm", "merged"] {
        let models = format!("judge.models=['{model}']");
        let told = run(
            folder,
            &[
                "eval",
                "small.toml",
                "--test-time",
                "step_beam",
                "--set",
                &models,
                "--set",
                "test_time.sampling.max_new_tokens=6",
            ],
        );
        assert!(told.contains("accuracy"), "{told}");
    }
}

#[test]
fn stages_that_do_not_go_together_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_rows(folder);
    let both = posttrain(folder).args(["train", "small.toml", "reward.toml"]).output().unwrap();
    expect(1, &both);
    assert!(stderr(&both).contains("expected it alone"), "{}", stderr(&both));
    let centred = ["train", "reward.toml", "--set", "reward_model.loss_type=bce"];
    let centred = posttrain(folder).args(centred).output().unwrap();
    expect(1, &centred);
    assert!(stderr(&centred).contains("center_rewards_coefficient"), "{}", stderr(&centred));
}

const VALUE_RECIPE: &str = r#"
seed = 3
[model]
name = "tiny-llama"
precision = "f32"
[[tasks]]
type = "arithmetic"
operations = ["add"]
first = [0, 9]
others = [0, 9]
phrasings = ["{expression}="]
train_problems = 8
test_problems = 0
[[rewards]]
type = "number"
[q_sharp]
num_generations = 2
batch_size = 8
[q_sharp.sampling]
max_new_tokens = 4
[q_sharp.training]
max_steps = 4
learning_rate = 1e-3
[run]
save_steps = 0
eval_steps = 0
"#;

#[test]
fn value_models_are_trained_and_guide() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write(folder, "value.toml", VALUE_RECIPE);
    run(folder, &["train", "value.toml", "--output", "value"]);
    let metrics = std::fs::read_to_string(folder.join("value/metrics.jsonl")).unwrap();
    assert!(metrics.contains("value/sampled_tokens") && metrics.contains("calibration/quarter_4"), "{metrics}");
    let histogram = ["--set", "q_sharp.loss_type='histogram'", "--set", "q_sharp.bins=3"];
    run(folder, &[&["train", "value.toml", "--output", "bins"][..], &histogram[..]].concat());

    let generate = |flags: &[&str]| {
        let verb = ["generate", "--model", "tiny-llama", "--precision", "f32", "--prompt", "1+2=", "--raw"];
        let short = ["--max-new-tokens", "12", "--temperature", "1", "--n", "4"];
        posttrain(folder).args([&verb[..], &short[..], flags].concat()).output().unwrap()
    };
    let told = |flags: &[&str]| {
        let output = generate(flags);
        expect(0, &output);
        stdout(&output)
    };
    let alone = told(&[]);
    let far = told(&["--guide", "value", "--guide-eta", "1e9", "--guide-top-k", "1000"]);
    assert_eq!(far, alone, "at a price that nothing is worth, the model is not guided");
    assert_ne!(told(&["--guide", "value", "--guide-eta", "0.01", "--guide-top-k", "5"]), alone);
    told(&["--guide", "bins", "--guide-loss", "histogram", "--guide-returns", "-1", "1"]);

    let wrong_loss = generate(&["--guide", "bins"]);
    expect(1, &wrong_loss);
    assert!(stderr(&wrong_loss).contains("guide bins: the value model: its score head has 3 outputs, expected 1"));
    // A head over actions, which has outputs for each of the tokens.
    run(folder, &["train", "value.toml", "--output", "action", "--set", "q_sharp.head='action'"]);
    let config = std::fs::read_to_string(folder.join("action/final/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["num_labels"], config["vocab_size"]);
    let by_action = ["--guide", "action", "--guide-head", "action", "--guide-top-k"];
    assert_eq!(told(&[&by_action[..], &["1000", "--guide-eta", "1e9"]].concat()), alone);
    assert_ne!(told(&[&by_action[..], &["5", "--guide-eta", "0.01"]].concat()), alone);
    let wrong_head = generate(&["--guide", "value", "--guide-head", "action"]);
    expect(1, &wrong_head);
    assert!(
        stderr(&wrong_head).contains("its score head has 1 outputs, expected 1 for each of the"),
        "{}",
        stderr(&wrong_head)
    );
    let go_on = ["train", "value.toml", "--set", "model.name='value'", "--set", "q_sharp.reference='tiny-llama'"];
    run(folder, &[&go_on[..], &["--output", "longer"]].concat());
    let other_head = ["--set", "q_sharp.head='action'", "--output", "other"];
    let other_head = posttrain(folder).args([&go_on[..], &other_head[..]].concat()).output().unwrap();
    expect(1, &other_head);
    assert!(stderr(&other_head).contains("value: its score head has 1 outputs, expected"), "{}", stderr(&other_head));

    let tokens = folder.join("value/final/tokenizer.json");
    let text = std::fs::read_to_string(&tokens).unwrap();
    assert!(text.contains("<|im_start|>"));
    std::fs::write(&tokens, text.replace("<|im_start|>", "<|begin|>")).unwrap();
    let other = generate(&["--guide", "value"]);
    expect(1, &other);
    assert!(stderr(&other).contains("have different vocabularies"), "{}", stderr(&other));
    assert!(stderr(&other).contains("choose a value model that was trained for it"), "{}", stderr(&other));

    // What scores cannot be a reference, and an environment is none of its worlds.
    let again = ["train", "value.toml", "--set", "model.name='bins'", "--output", "again"];
    let again = posttrain(folder).args(again).output().unwrap();
    expect(1, &again);
    assert!(stderr(&again).contains("scores and does not write"), "{}", stderr(&again));
}
