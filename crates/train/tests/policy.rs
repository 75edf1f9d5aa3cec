//! Every policy gradient by name: it makes steps, it learns, it is cut and stopped without a trace.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use envs::reward::{Shaped, Shaping};
use envs::{Answer, Reward, RewardError, Score, SpanScore, Status};
use kernels::Precision;
use model::weights::safetensors;
use objectives::{Baseline, ClipKind, Credit, KlEstimator};
use posttrain_train as train;
use train::methods::policy::{OldPolicy, PRESETS, Policy, PolicyOptions, ReplayOptions, ValueModel};
use train::options::{GradientCheckpointing, RunOptions, TrainingOptions};
use train::timing::StepTiming;
use train::{Event, Observer, Outcome};

use crate::common::{self, Lower, Setup, StopAt, assert_same, metrics, on_threads, prompts, seeds};

/// The settings of a published method, on a task of a few tokens.
fn preset(name: &str) -> PolicyOptions {
    let preset = PRESETS.iter().find(|preset| preset.name == name).unwrap();
    let options: PolicyOptions = toml::from_str(preset.settings).unwrap_or_else(|error| panic!("{name}: {error}"));
    let overlong_margin = options.overlong_margin.min(2);
    PolicyOptions {
        method: name.into(),
        overlong_margin,
        prompts_per_step: 4,
        num_generations: if options.num_generations == 1 { 1 } else { 4 },
        sampling: rollout::SamplingOptions { max_new_tokens: 4, ..Default::default() },
        training: TrainingOptions {
            max_steps: Some(4),
            learning_rate: 1e-3,
            micro_batch_tokens: 40,
            lr_scheduler_type: train::schedule::SchedulerType::Constant,
            ..Default::default()
        },
        ..options
    }
}

fn setup(policy: PolicyOptions) -> Setup {
    Setup {
        sft: None,
        grpo: Some(policy),
        reward: || Box::new(Lower),
        evaluate: false,
        options: RunOptions { save_steps: 2, save_total_limit: 2, ..Default::default() },
        ..Setup::short()
    }
}

/// A run's metrics, line by line.
fn lines(setup: &Setup) -> Vec<serde_json::Map<String, serde_json::Value>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    setup.finish(&path);
    metrics(&path)
}

#[test]
fn every_published_method_makes_steps() {
    for found in PRESETS {
        let lines = lines(&setup(preset(found.name)));
        assert_eq!(lines.len(), 4, "{}", found.name);
        let learnt = lines.iter().filter(|line| line["grad_norm"].as_f64().is_some_and(|norm| norm > 0.0)).count();
        let alone = preset(found.name).value.warmup_steps as usize;
        assert_eq!(learnt, 4 - alone.min(4), "{}: {lines:?}", found.name);
    }
}

fn many(policy: PolicyOptions, steps: u64) -> PolicyOptions {
    let several = policy.num_generations > 1;
    let learning_rate = if policy.num_iterations > 1 { 1e-3 } else { 2e-3 };
    PolicyOptions {
        prompts_per_step: if several { 8 } else { 32 },
        num_generations: if several { 8 } else { 1 },
        training: TrainingOptions {
            max_steps: Some(steps),
            micro_batch_tokens: 4096,
            learning_rate,
            ..policy.training
        },
        ..policy
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The reward begins near a half, and rises by more than 0.2 whatever the seed.
#[test]
fn methods_learn_from_scores() {
    let names = ["grpo", "ppo", "rloo", "reinforce_plus_plus", "gspo", "cispo", "grpo_ceu"];
    for (place, name) in names.into_iter().enumerate() {
        for seed in seeds(place) {
            let setup = Setup {
                seed,
                options: RunOptions { save_steps: 0, ..Default::default() },
                ..setup(many(preset(name), 30))
            };
            let rewards: Vec<f64> = lines(&setup).iter().map(|line| line["reward"].as_f64().unwrap()).collect();
            let (start, end) = (mean(&rewards[..3]), mean(&rewards[27..]));
            println!("{name}, seed {seed}: {start:.3} to {end:.3}");
            assert!(end > start + 0.2, "{name}, seed {seed}: {start} to {end}");
        }
    }
}

/// Pays every completion the same, and every character of it for being in the lower half of ASCII.
struct LowCharacters;

impl Reward for LowCharacters {
    fn name(&self) -> &str {
        "low"
    }

    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |answer: &Answer<'_>| {
            let text = answer.completion;
            // Of other completions it is not known which token holds which piece of the text.
            (text.is_ascii() && text.len() == answer.completion_ids.len()).then(|| {
                let low: Vec<f64> = text.bytes().map(|byte| f64::from(u8::from(byte < 64))).collect();
                let spans = low.iter().enumerate().map(|(at, &reward)| SpanScore { text: at..at + 1, reward });
                let parts = vec![("low".to_owned(), mean(&low))];
                Score { spans: spans.collect(), parts, ..Score::new(1.0, Status::Ok) }
            })
        };
        Ok(answers.iter().map(score).collect())
    }
}

/// Where completions are all paid the same, only what their parts are paid can teach anything.
#[test]
fn a_part_of_an_answer_learns_from_its_own_reward() {
    for seed in [7, 8, 9] {
        let run = |credit| {
            let mut options = many(preset("grpo"), 30);
            options.sampling.max_new_tokens = 2;
            options.objective.credit = credit;
            lines(&Setup {
                seed,
                reward: || Box::new(LowCharacters),
                options: RunOptions { save_steps: 0, ..Default::default() },
                ..setup(options)
            })
        };
        let by_completion = run(Credit::Sequence);
        assert!(by_completion.iter().all(|line| line["grad_norm"].as_f64() == Some(0.0)));
        let low: Vec<f64> = run(Credit::Span).iter().map(|line| line["rewards/low/mean"].as_f64().unwrap()).collect();
        let (start, end) = (mean(&low[..3]), mean(&low[27..]));
        println!("seed {seed}: {start:.3} to {end:.3}");
        assert!(end > start + 0.15, "seed {seed}: {start} to {end}");
    }
}

/// The mean entropy of the last steps of a run with a bonus for it.
#[test]
fn an_entropy_bonus_keeps_the_policy_undecided() {
    let last = |entropy_coef: f64| {
        let mut options = many(preset("grpo"), 20);
        options.objective.entropy_coef = entropy_coef;
        let lines = lines(&Setup { options: RunOptions { save_steps: 0, ..Default::default() }, ..setup(options) });
        assert!(lines[0].get("entropy_coef").is_none(), "constant");
        lines[19]["entropy"].as_f64().unwrap()
    };
    let (without, with) = (last(0.0), last(0.5));
    println!("entropy {without:.3} without, {with:.3} with the bonus");
    assert!(with > without + 0.02, "{without} without, {with} with");
}

/// Above its target the entropy has no bonus and the coefficient falls; below, it rises with every update.
#[test]
fn the_coefficient_of_the_entropy_follows_its_target() {
    let run = |target: f64| {
        let mut options = PolicyOptions { num_minibatches: 2, ..preset("grpo") };
        options.objective.entropy_coef = 0.1;
        options.objective.entropy_target = Some(target);
        lines(&setup(options)).iter().map(|line| line["entropy_coef"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let close = |found: Vec<f64>, change: f64| {
        let expected = (1..=4).map(|step| 0.1 + change * f64::from(step));
        found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-12)
    };
    assert!(close(run(0.5), -0.01) && close(run(6.0), 0.01));
}

/// The first pass takes the groups as they come; a later one has an order of its own, which one minibatch knows nothing of.
#[test]
fn later_passes_are_shuffled() {
    let run = |shuffle_minibatches, num_iterations, num_minibatches| {
        let options = PolicyOptions { shuffle_minibatches, num_iterations, num_minibatches, ..preset("grpo") };
        lines(&setup(options))
    };
    assert_eq!(run(true, 1, 2), run(false, 1, 2));
    assert_eq!(run(true, 2, 1), run(false, 2, 1));
    assert_ne!(run(true, 2, 2), run(false, 2, 2));
}

/// The setups that carry something from step to step, and those that see a whole update at once.
fn careful() -> Vec<(&'static str, Setup)> {
    let ppo = |change: fn(&mut PolicyOptions)| {
        let mut options = PolicyOptions { num_generations: 2, num_minibatches: 2, ..preset("ppo") };
        options.training.max_steps = Some(5);
        options.num_iterations = 2;
        options.objective.kl_target = Some(0.5);
        change(&mut options);
        setup(options)
    };
    let mut replayed =
        PolicyOptions { staleness: 2, old_policy: OldPolicy::Trainer, num_iterations: 2, ..preset("grpo") };
    replayed.replay = ReplayOptions { steps: 2, groups_per_step: 3 };
    replayed.training.max_steps = Some(6);
    let mut lagging = PolicyOptions { staleness: 1, ..preset("grpo") };
    lagging.objective.beta = 0.1;
    let mut chosen = PolicyOptions { num_iterations: 2, ..preset("clip_cov") };
    chosen.objective.cov_ratio = 0.2;
    chosen.objective.clip_cov_min = 1e-3;
    let mut undecided = PolicyOptions { num_iterations: 2, num_minibatches: 2, ..preset("grpo") };
    undecided.objective.entropy_coef = 0.1;
    undecided.objective.entropy_target = Some(5.535);
    let standardised = || -> Box<dyn Reward> { Box::new(Shaped::new(Box::new(Lower), Shaping::MeanStd)) };
    vec![
        ("ppo", ppo(|_| ())),
        ("paid by all rewards so far", Setup { reward: standardised, ..setup(lagging.clone()) }),
        ("adaptive entropy", setup(undecided)),
        (
            "ppo with an adapter",
            Setup { lora: true, precision: Precision::Bf16, ..ppo(|options| options.value.warmup_steps = 2) },
        ),
        (
            "ppo with a value model that begins as a reward model",
            ppo(|options| options.value.init = Some("judge".into())),
        ),
        (
            "ppo with a shared body",
            Setup { value_head: true, ..ppo(|options| options.value.model = ValueModel::Shared) },
        ),
        ("replay and lag", setup(replayed)),
        ("lag with an adapter and a reference", Setup { lora: true, ..setup(lagging) }),
        ("the worst mix of prompts", ppo(|options| options.worst_case = preset("dro_ppo").worst_case)),
        ("greedy baseline", setup(PolicyOptions { num_generations: 2, ..preset("remax") })),
        ("dynamic sampling", setup(preset("dapo"))),
        ("clip-cov", setup(chosen)),
        ("high entropy", setup(PolicyOptions { num_iterations: 2, ..preset("high_entropy") })),
    ]
}

#[test]
fn cuts_and_threads_do_not_matter() {
    for (name, setup) in careful() {
        let folder = tempfile::tempdir().unwrap();
        let whole = folder.path().join("whole");
        on_threads(2, || setup.finish(&whole));
        for (micro_batch_tokens, decode_batch_size, threads) in [(1, 1, 1), (100_000, 64, 2)] {
            let mut cut = setup.clone();
            let options = cut.grpo.as_mut().unwrap();
            (options.training.micro_batch_tokens, options.decode_batch_size) = (micro_batch_tokens, decode_batch_size);
            let other = folder.path().join(format!("cut-{micro_batch_tokens}"));
            on_threads(threads, || cut.finish(&other));
            assert_same(&whole, &other, &format!("{name}, {micro_batch_tokens} tokens"));
        }
    }
}

#[test]
fn an_update_of_what_was_just_sampled_needs_no_forward() {
    let rows = |setup: &Setup, folder: &Path| -> Vec<u64> {
        setup.finish(folder);
        let timing = std::fs::read_to_string(folder.join("timing.jsonl")).unwrap();
        let steps = timing.lines().map(|line| serde_json::from_str::<StepTiming>(line).unwrap());
        steps.filter(|timing| timing.tokens > 0).map(|timing| timing.reused_rows).collect()
    };
    for (precision, lora, minibatches, budget, tokens) in [
        (Precision::F32, false, 1, 4096, None),
        (Precision::Bf16, true, 2, 4096, None),
        (Precision::Bf16, false, 1, 60, None),
        (Precision::Bf16, false, 1, 1, Some(100)),
    ] {
        let mut options = PolicyOptions { num_minibatches: minibatches, num_iterations: 2, ..preset("grpo") };
        options.training.micro_batch_tokens = budget;
        options.objective.beta = 0.1;
        options.training.gradient_checkpointing =
            if lora { GradientCheckpointing::On } else { GradientCheckpointing::Off };
        let setup = |tokens| Setup {
            precision,
            lora,
            ..setup(PolicyOptions { reuse_forward_tokens: tokens, ..options.clone() })
        };
        let folder = tempfile::tempdir().unwrap();
        let (with, without) = (folder.path().join("with"), folder.path().join("without"));
        let reused = rows(&setup(tokens), &with);
        assert!(reused.len() == 4 && reused.iter().all(|&rows| rows > 0), "{precision:?}: {reused:?}");
        assert_eq!(rows(&setup(Some(0)), &without), [0; 4]);
        assert_same(&with, &without, &format!("{precision:?}, {minibatches} minibatches, {budget} tokens"));
    }
}

#[test]
fn a_shared_value_model_learns_with_the_policy() {
    let mut options = many(preset("ppo"), 30);
    options.value.model = ValueModel::Shared;
    let setup =
        Setup { value_head: true, options: RunOptions { save_steps: 0, ..Default::default() }, ..setup(options) };
    let lines = lines(&setup);
    let numbers = |name: &str| -> Vec<f64> { lines.iter().map(|line| line[name].as_f64().unwrap()).collect() };
    let (rewards, losses) = (numbers("reward"), numbers("loss/value_avg"));
    println!("reward {:.3} to {:.3}", mean(&rewards[..3]), mean(&rewards[27..]));
    assert!(mean(&rewards[27..]) > mean(&rewards[..3]) + 0.2, "{rewards:?}");
    assert!(mean(&losses[5..10]) < 0.7 * losses[0], "{losses:?}");
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    for (name, setup) in careful() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
        setup.finish(&whole);
        let steps = setup.grpo.as_ref().unwrap().training.max_steps.unwrap();
        for step in 1..steps {
            let stop = AtomicBool::new(false);
            let outcome = setup.run(&stopped, step > 1, &mut StopAt(step, &stop), &stop).unwrap();
            assert_eq!(outcome, Outcome::Interrupted { step });
        }
        setup.run(&stopped, true, &mut (), &AtomicBool::new(false)).unwrap();
        assert_same(&whole, &stopped, name);
    }
}

/// Dies at one of the events.
struct DieAt(usize);

impl Observer for DieAt {
    fn observe(&mut self, _event: Event<'_>) {
        match self.0.checked_sub(1) {
            Some(left) => self.0 = left,
            None => resume_unwind(Box::new("death, as ordered")),
        }
    }
}

#[test]
fn a_run_that_dies_anywhere_resumes_to_the_same_bytes() {
    for (name, setup) in careful().into_iter().take(4) {
        let folder = tempfile::tempdir().unwrap();
        let (whole, died) = (folder.path().join("whole"), folder.path().join("died"));
        setup.finish(&whole);
        let mut deaths = 0;
        while deaths < 200 {
            let life = || setup.run(&died, died.exists(), &mut DieAt(7 + 5 * deaths), &AtomicBool::new(false));
            match catch_unwind(AssertUnwindSafe(life)) {
                Ok(outcome) => {
                    assert!(matches!(outcome.unwrap(), Outcome::Finished(_)));
                    break;
                }
                Err(_) => deaths += 1,
            }
        }
        assert!((3..200).contains(&deaths), "{name}: {deaths} deaths");
        assert_same(&whole, &died, name);
    }
}

/// Trained parameters of a finished run.
fn weights(folder: &Path) -> Vec<f32> {
    safetensors::read(&folder.join("final")).unwrap().into_values().flat_map(|tensor| tensor.data).collect()
}

#[test]
fn the_value_model_learns_alone_first() {
    let run = |warmup_steps: u64, learning_rate: f64| {
        let mut options = PolicyOptions { num_generations: 4, ..preset("ppo") };
        options.training.learning_rate = learning_rate;
        options.value.learning_rate = Some(2e-3);
        options.value.warmup_steps = warmup_steps;
        let folder = tempfile::tempdir().unwrap();
        setup(options).finish(&folder.path().join("run"));
        (weights(&folder.path().join("run")), metrics(&folder.path().join("run")))
    };
    let (start, _) = run(0, 0.0);
    let (alone, lines) = run(4, 1e-3);
    assert!(start == alone, "the policy moved during the warm-up");
    assert!(run(3, 1e-3).0 != start, "the policy moves after it");
    let loss = |line: usize| lines[line]["loss/value_avg"].as_f64().unwrap();
    assert!(loss(3) < 0.7 * loss(0), "{} to {}", loss(0), loss(3));
    assert!(lines.iter().all(|line| line["grad_norm"].is_null() && line["val/grad_norm"].as_f64().unwrap() > 0.0));
}

#[test]
fn the_sampler_is_behind_by_as_much_as_asked() {
    let with = |staleness: usize, steps: usize| {
        let groups_per_step = if steps > 0 { 3 } else { 0 };
        let options = PolicyOptions { staleness, replay: ReplayOptions { steps, groups_per_step }, ..preset("grpo") };
        lines(&setup(options))
    };
    let numbers = |lines: &[serde_json::Map<String, serde_json::Value>], name: &str| -> Vec<f64> {
        lines.iter().map(|line| line[name].as_f64().unwrap()).collect()
    };
    let lagging = with(2, 0);
    assert_eq!(numbers(&lagging, "sampling/staleness"), [0.0, 1.0, 2.0, 2.0]);
    let off = numbers(&lagging, "sampling/sampling_logp_difference/max");
    assert!(off[0] == 0.0 && off[1..].iter().all(|&difference| difference > 0.0), "{off:?}");
    // The first step learns from the same samples, whatever is sampled ahead.
    let plain = with(0, 0);
    assert_eq!(lagging[0]["loss"], plain[0]["loss"]);
    assert_ne!(lagging[1]["loss"], plain[1]["loss"], "the next is off policy");

    // 4 groups of the step's own, and 3 of the one before: mean age 3/7. From two steps ages go up to 2.
    assert_eq!(numbers(&with(0, 1), "sampling/staleness"), [0.0, 3.0 / 7.0, 3.0 / 7.0, 3.0 / 7.0]);
    let ages = numbers(&with(0, 2), "sampling/staleness");
    assert!(ages[2] >= 3.0 / 7.0 && ages[2] <= 6.0 / 7.0, "{ages:?}");
}

/// On policy, the trainer's log-probabilities are the sampler's: asking for them changes nothing.
#[test]
fn on_policy_both_old_policies_are_one() {
    let run = |old_policy| lines(&setup(PolicyOptions { old_policy, num_iterations: 2, ..preset("grpo") }));
    assert_eq!(run(OldPolicy::Sampler), run(OldPolicy::Trainer));
    let stale = |old_policy| lines(&setup(PolicyOptions { old_policy, staleness: 1, ..preset("grpo") }));
    assert_ne!(stale(OldPolicy::Sampler), stale(OldPolicy::Trainer));
}

/// Exact answers are rare at first: most groups teach nothing and make room for others.
#[test]
fn groups_without_variance_make_room_for_others() {
    let options = PolicyOptions { max_resampling_rounds: 3, ..preset("grpo") };
    let few = Setup { reward: || Box::new(common::Exact), ..setup(options.clone()) };
    for line in lines(&few) {
        assert_eq!(line["sampling/groups_sampled"], 16, "nothing varies: all rounds are used");
        assert_eq!((line["loss"].as_f64(), line["grad_norm"].as_f64()), (Some(0.0), Some(0.0)));
    }
    for line in lines(&setup(options)) {
        let sampled = line["sampling/groups_sampled"].as_u64().unwrap();
        assert!((4..=8).contains(&sampled), "{sampled}: nearly everything varies");
        assert!(line["grad_norm"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn the_coefficient_of_the_divergence_follows_its_target() {
    let mut options = preset("reinforce_plus_plus");
    options.training.learning_rate = 1e-2;
    options.objective.kl = KlEstimator::K3;
    options.objective.kl_target = Some(1e-6);
    options.objective.kl_horizon = 10.0;
    let lines = lines(&setup(options));
    let numbers = |name: &str| -> Vec<f64> { lines.iter().map(|line| line[name].as_f64().unwrap()).collect() };
    let (kl, coefficients) = (numbers("objective/kl"), numbers("objective/kl_coef"));
    // The reference is the policy at first. Below its target the coefficient shrinks, by 0.2 * 4 completions / 10 a step; above
    // it grows by as much.
    assert!(kl[0] == 0.0 && kl[1..].iter().all(|&kl| kl > 2e-6), "{kl:?}");
    let expected = [0.01, 0.01 * 0.92, 0.01 * 0.92 * 1.08, 0.01 * 0.92 * 1.08 * 1.08];
    let close = coefficients.iter().zip(expected).all(|(coefficient, expected)| (coefficient - expected).abs() < 1e-12);
    assert!(close, "{coefficients:?}");
}

#[test]
fn ppo_logs_the_usual_names() {
    let lines = lines(&setup(preset("ppo")));
    for name in "objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores \
                 policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg \
                 val/ratio val/ratio_var val/num_eos_tokens val/explained_variance episode loss grad_norm entropy reward \
                 clip_ratio/region_mean"
        .split_whitespace()
    {
        assert!(lines.iter().all(|line| line[name].is_number()), "{name}: {:?}", lines[0].get(name));
    }
    assert_eq!(lines[3]["episode"], 16);
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let refused = |change: fn(&mut PolicyOptions)| {
        let mut options = PolicyOptions::default();
        change(&mut options);
        options.validate().unwrap_err().to_string()
    };
    let error = refused(|options| options.num_generations = 1);
    assert_eq!(error, "num_generations: expected 2 (one has no baseline in its group) to 65536, got 1");
    let error = refused(|options| options.replay.steps = 2);
    assert!(error.starts_with("replay.groups_per_step: expected a number above 0"), "{error}");
    let error = refused(|options| options.objective.lam = 2.0);
    assert_eq!(error, "objective: lam is 2, expected 0 to 1");
    let error = refused(|options| {
        options.num_generations = 1;
        options.objective.baseline = Baseline::None;
    });
    assert!(error.starts_with("objective: scale_rewards"), "{error}");
    let moving = |kl_horizon: f64, groups_per_step: usize| {
        let mut options = preset("rloo");
        (options.prompts_per_step, options.num_generations) = (10, 4);
        (options.objective.kl_target, options.objective.kl_horizon) = (Some(6.0), kl_horizon);
        (options.replay.steps, options.replay.groups_per_step) = (groups_per_step.min(1), groups_per_step);
        options.validate().err().map(|error| error.to_string())
    };
    assert_eq!((moving(8.5, 0), moving(9.0, 1)), (None, None));
    let expected = |completions| {
        format!("more than a fifth of the {completions} completions of a step, after which beta could be 0")
    };
    assert_eq!(moving(8.0, 0).unwrap(), format!("objective.kl_horizon: expected {}, got 8", expected(40)));
    assert_eq!(moving(8.5, 1).unwrap(), format!("objective.kl_horizon: expected {}, got 8.5", expected(44)));
    let error = refused(|options| options.value.cliprange_value = Some(0.0));
    assert!(error.starts_with("value.cliprange_value"), "{error}");
    let error = refused(|options| {
        options.max_resampling_rounds = 2;
        options.num_generations = 1;
        options.objective.baseline = Baseline::Value;
    });
    assert!(error.starts_with("max_resampling_rounds"), "{error}");
    let ppo = || Policy::new(preset("ppo"), prompts(), Box::new(Lower)).unwrap();
    let without_head = Setup::short().decoder();
    let error = ppo().with_value_model(without_head).err().unwrap().to_string();
    assert!(error.contains("ppo.value.init: expected a reward model: 1 output, got a head of 0 outputs"), "{error}");
    let grpo = Policy::new(preset("grpo"), prompts(), Box::new(Lower)).unwrap();
    let error = grpo.with_value_model(Setup::short().reward_model()).err().unwrap().to_string();
    assert!(error.contains("expected a method with a separate value model"), "{error}");
    for preset in PRESETS {
        let options: PolicyOptions = toml::from_str(preset.settings).unwrap();
        options.validate().unwrap_or_else(|error| panic!("{}: {error}", preset.name));
    }
    assert!(PRESETS.iter().any(|found| preset(found.name).objective.clip == ClipKind::Vespo));
}
