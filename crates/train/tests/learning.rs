//! Training teaches: a model from scratch learns its task by example, and from scores alone.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use kernels::Precision;
use model::ModelConfig;
use model::decoder::{Decoder, WeightFormat};
use model::weights::safetensors;
use posttrain_train as train;
use serde_json::{Map, Value};
use train::methods::policy::PolicyOptions;
use train::methods::sft::SftOptions;
use train::options::{OptimizerState, RunOptions, TrainingOptions};
use train::{Error, Evaluator, Outcome};

use crate::common::{Accuracy, Setup, metrics};

fn learning() -> Setup {
    Setup {
        sft: Some(SftOptions {
            batch_size: 25,
            training: TrainingOptions {
                num_train_epochs: 10.0,
                learning_rate: 3e-3,
                warmup_ratio: 0.1,
                ..Default::default()
            },
            ..Default::default()
        }),
        grpo: Some(PolicyOptions {
            prompts_per_step: 16,
            num_generations: 8,
            sampling: rollout::SamplingOptions { max_new_tokens: 3, ..Default::default() },
            training: TrainingOptions { max_steps: Some(120), learning_rate: 1e-3, ..Default::default() },
            ..Default::default()
        }),
        options: RunOptions { save_steps: 0, eval_steps: 40, ..Default::default() },
        precision: Precision::Bf16,
        ..Setup::short()
    }
}

#[test]
fn examples_teach_and_then_scores_teach_more() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let summary = learning().finish(&path);

    let accuracy: Vec<f64> = metrics(&path).iter().filter_map(|line| line.get("eval_accuracy")?.as_f64()).collect();
    let [scratch, after_sft, .., after_grpo] = accuracy[..] else { panic!("too few evaluations: {accuracy:?}") };
    println!("accuracy: {scratch} from scratch, {after_sft} after examples, {after_grpo} after scores");
    assert!(scratch < 0.1, "{scratch}");
    assert!((0.3..0.9).contains(&after_sft), "{after_sft}: the examples should leave something to learn");
    assert!(after_grpo > after_sft + 0.1, "{after_sft} to {after_grpo}");
    let change = summary.change.unwrap();
    assert!(change.interval.low > 0.2 && change.p_value < 1e-6, "{change:?}");

    let rewards: Vec<f64> = metrics(&path).iter().filter_map(|line| line.get("reward")?.as_f64()).collect();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    assert!(mean(&rewards[115..]) > mean(&rewards[..5]) + 0.4, "{rewards:?}");

    // The saved model is the trained one.
    let config = std::fs::read(path.join("final/config.json")).unwrap();
    let config = ModelConfig::from_json_bytes(&config).unwrap();
    let mut saved = Decoder::new(config, safetensors::read(&path.join("final")).unwrap()).unwrap();
    saved.prepare(Precision::Bf16);
    let again = Accuracy.evaluate(&saved, &mut |_, _| {}).unwrap();
    assert_eq!(again.solved, summary.after.unwrap().solved);
}

/// Moments rounded at random teach as well as exact ones, with the second moment's usual long memory.
#[test]
fn moments_in_half_the_memory_teach_as_much() {
    let mean_loss = |optimizer_state| {
        let mut setup = Setup { grpo: None, evaluate: false, ..learning() };
        setup.sft.as_mut().unwrap().training.optimizer_state = optimizer_state;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        setup.finish(&path);
        let losses: Vec<f64> = metrics(&path).iter().map(|line| line["loss"].as_f64().unwrap()).collect();
        let last = &losses[losses.len() - 10..];
        (losses[0], last.iter().sum::<f64>() / last.len() as f64)
    };
    let (start, single) = mean_loss(OptimizerState::F32);
    let (_, half) = mean_loss(OptimizerState::Bf16);
    println!("loss from {start} to {single} with moments in f32, to {half} in bf16");
    assert!(single < 0.3 * start && (half / single - 1.0).abs() < 0.05, "from {start} to {single} and {half}");
}

#[test]
fn sampler_and_trainer_agree_to_the_last_bit_in_every_step() {
    for (precision, lora) in [(Precision::F32, false), (Precision::Bf16, false), (Precision::Bf16, true)] {
        for family in model::config::Family::ALL {
            let setup = Setup { precision, lora, family, evaluate: false, ..Setup::short() };
            let folder = tempfile::tempdir().unwrap();
            setup.finish(&folder.path().join("run"));
            let lines = metrics(&folder.path().join("run"));
            let steps: Vec<_> = lines.iter().filter(|line| line.contains_key("reward")).collect();
            assert_eq!(steps.len(), 3);
            for line in steps {
                for name in ["mean", "max"] {
                    let difference = &line[&format!("sampling/sampling_logp_difference/{name}")];
                    assert_eq!(difference, 0, "{family} {precision:?}, adapter {lora}, step {}", line["step"]);
                }
            }
        }
    }
}

/// A sampler of 8-bit weights is off by little, is told apart from a trainer that has moved, and teaches all the same.
#[test]
fn sampling_with_int8_weights_is_measured_corrected_and_teaches() {
    let mut setup = learning();
    let grpo = setup.grpo.as_mut().unwrap();
    grpo.rollout_weights = WeightFormat::Int8;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    setup.finish(&path);
    let lines = metrics(&path);
    let accuracy: Vec<f64> = lines.iter().filter_map(|line| line.get("eval_accuracy")?.as_f64()).collect();
    let [_, after_sft, .., after_grpo] = accuracy[..] else { panic!("too few evaluations: {accuracy:?}") };
    assert!(after_grpo > after_sft + 0.1, "{after_sft} to {after_grpo}");
    let steps: Vec<_> = lines.iter().filter(|line| line.contains_key("reward")).collect();
    assert_eq!(steps.len(), 120);
    for line in steps {
        let number = |name: &str| line[&format!("sampling/{name}")].as_f64().unwrap();
        let (mean, max) = (number("sampling_logp_difference/mean"), number("sampling_logp_difference/max"));
        assert!(mean > 0.0 && mean < 0.05 && max >= mean && max < 1.0, "{mean} {max}");
        let [least, middle, most] =
            ["min", "mean", "max"].map(|kind| number(&format!("importance_sampling_ratio/{kind}")));
        assert!(least < middle && middle < most && most <= 2.0 && most.ln() <= max + 1e-6, "{least} {middle} {most}");
        // π_old are the trainer's own weights: its first and only pass has moved nowhere.
        assert_eq!(line["clip_ratio/region_mean"], 0);
    }
}

/// Several updates need π_old before the first; the first of them is then what a single one would be.
#[test]
fn with_int8_rollouts_the_first_of_several_updates_is_that_of_one() {
    let first = |iterations: usize| {
        let mut setup = Setup { sft: None, evaluate: false, ..Setup::short() };
        let grpo = setup.grpo.as_mut().unwrap();
        grpo.rollout_weights = WeightFormat::Int8;
        (grpo.num_iterations, grpo.num_minibatches) = (iterations, 1);
        grpo.training.max_steps = Some(1);
        let folder = tempfile::tempdir().unwrap();
        setup.finish(&folder.path().join("run"));
        metrics(&folder.path().join("run")).remove(0)
    };
    let (one, two) = (first(1), first(2));
    for name in ["sampling_logp_difference/mean", "sampling_logp_difference/max", "importance_sampling_ratio/max"] {
        let name = format!("sampling/{name}");
        assert_eq!(one[&name], two[&name], "{name}");
    }
    assert_ne!(one["sampling/sampling_logp_difference/max"], 0);
    assert_ne!(one["loss"], two["loss"]);
}

#[test]
fn a_learning_rate_of_zero_changes_nothing_for_twenty_steps() {
    for lora in [false, true] {
        let mut setup = learning();
        setup.lora = lora;
        setup.evaluate = false;
        setup.sft = None;
        let grpo = setup.grpo.as_mut().unwrap();
        grpo.training.max_steps = Some(20);
        grpo.training.learning_rate = 0.0;
        grpo.training.weight_decay = 0.1;
        grpo.objective.beta = 0.05;
        grpo.prompts_per_step = 4;
        let mut decoder = setup.decoder();
        // Negative zeros are the first to go when a weight is touched.
        decoder.parameter_mut(0)[..8].fill(-0.0);
        let bits = |decoder: &Decoder| -> Vec<u32> {
            (0..decoder.parameters().len())
                .flat_map(|index| decoder.parameter(index).iter().map(|value| value.to_bits()).collect::<Vec<_>>())
                .collect()
        };
        let before = bits(&decoder);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        setup.run_from(decoder, &path, false, &mut (), &AtomicBool::new(false)).unwrap();

        let file = if lora { "final/adapter_model.safetensors" } else { "final/model.safetensors" };
        let mut saved = safetensors::read(&path.join(file)).unwrap();
        let after: Vec<u32> = setup
            .decoder()
            .parameters()
            .iter()
            .flat_map(|info| saved.remove(&info.name).unwrap().data)
            .map(f32::to_bits)
            .collect();
        assert!(before == after, "a weight changed");
        for line in metrics(&path) {
            assert_eq!(line["sampling/sampling_logp_difference/max"], 0, "step {}", line["step"]);
            assert_eq!(line["kl"], 0, "step {}", line["step"]);
        }
        assert_eq!(metrics(&path).len(), 20);
    }
}

/// The names of the metrics of the first line for which `wanted` holds, in the order they are logged.
fn names(path: &Path, wanted: impl Fn(&Map<String, Value>) -> bool) -> Vec<String> {
    let lines = metrics(path);
    let line = lines.iter().find(|line| wanted(line)).unwrap();
    for (name, value) in line {
        // What nothing was measured of is null: here completions that ended by themselves, which chance decides.
        assert!(value.is_number() || name.contains("terminated") || name.contains("correlation"), "{name} is {value}");
    }
    line.keys().cloned().collect()
}

#[test]
fn every_metric_has_its_usual_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    Setup::short().finish(&path);
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<String>>();
    assert_eq!(
        names(&path, |line| line["step"] == 1),
        words("step epoch loss grad_norm entropy mean_token_accuracy learning_rate num_tokens")
    );
    assert_eq!(
        names(&path, |line| line["step"] == 4),
        words(
            "step epoch sampling/prompt_tokens_computed sampling/prompt_tokens_reused \
             reward reward_std frac_reward_zero_std rewards/exact/mean rewards/exact/std \
             status/ok status/wrong status/malformed status/timeout status/error \
             completions/mean_length completions/min_length completions/max_length \
             completions/mean_terminated_length completions/min_terminated_length completions/max_terminated_length \
             completions/clipped_ratio completions/length_reward_correlation \
             sampling/sampling_logp_difference/mean sampling/sampling_logp_difference/max \
             loss grad_norm kl \
             clip_ratio/low_mean clip_ratio/low_min clip_ratio/high_mean clip_ratio/high_max clip_ratio/region_mean \
             entropy learning_rate num_tokens"
        )
    );
    let evaluation = names(&path, |line| line.keys().any(|name| name.starts_with("eval_")));
    assert_eq!(evaluation, words("step eval_accuracy eval_accuracy_low eval_accuracy_high"));
}

#[test]
fn a_value_that_is_not_finite_stops_the_run_and_is_named() {
    let setup = Setup::short();
    let mut decoder = setup.decoder();
    let index = decoder.parameters().iter().position(|info| info.name.contains("layers.1.mlp.down_proj")).unwrap();
    decoder.parameter_mut(index)[5] = f32::NAN;
    let folder = tempfile::tempdir().unwrap();
    let run = |options: Setup| {
        options.run_from(decoder.clone(), &folder.path().join("run"), false, &mut (), &AtomicBool::new(false))
    };
    let error = run(Setup { evaluate: false, ..setup }).unwrap_err();
    assert!(matches!(error, Error::Model { step: 1, .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("step 1") && text.contains("layer 1") && text.contains("row"), "{text}");
}

#[test]
fn a_run_is_not_started_over_another() {
    let setup = Setup { evaluate: false, grpo: None, ..Setup::short() };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    setup.finish(&path);
    let error = setup.run(&path, false, &mut (), &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    // Resuming with another configuration is refused too.
    std::fs::remove_file(path.join("summary.json")).unwrap();
    let mut longer = setup;
    longer.sft.as_mut().unwrap().training.max_steps = Some(9);
    let error = longer.run(&path, true, &mut (), &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
}

#[test]
fn an_adapter_is_saved_as_peft_saves_it() {
    let setup = Setup { lora: true, grpo: None, ..Setup::short() };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let Outcome::Finished(summary) = setup.run(&path, false, &mut (), &AtomicBool::new(false)).unwrap() else {
        panic!("interrupted")
    };
    let saved = safetensors::read(&path.join("final/adapter_model.safetensors")).unwrap();
    assert!(saved.contains_key("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"));
    assert_eq!(saved.values().map(|tensor| tensor.data.len()).sum::<usize>(), summary.trained_parameters);
    assert!(!path.join("final/model.safetensors").exists());
    let card = std::fs::read_to_string(path.join("README.md")).unwrap();
    for part in ["base_model: \"tiny\"", "library_name: peft", "posttrain train test.toml", "| accuracy |", "Seed | 7"]
    {
        assert!(card.contains(part), "no {part:?} in\n{card}");
    }
}
