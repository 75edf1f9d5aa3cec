//! Value models learn how their reference goes on, guide it to what is paid, and their runs keep the promises of all runs.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod common;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use base::{Purpose, Random};
use common::{Exact, Lower, StopAt, assert_same, examples, metrics, on_threads, prompts, tokenizer};
use envs::Reward;
use kernels::Precision;
use model::ModelConfig;
use model::config::Family;
use model::decoder::Decoder;
use model::lora::LoraConfig;
use posttrain_train as train;
use rollout::{Generator, Guidance, GuidanceOptions, LogitsHook, Request, SamplingOptions};
use train::methods::sft::{Sft, SftOptions};
use train::methods::value_model::{ReturnLoss, ValueModel, ValueModelOptions};
use train::options::{RunOptions, TrainingOptions};
use train::{Fit, Method, Observer, Outcome, Provenance, Run};

const LOSSES: [ReturnLoss; 3] = [ReturnLoss::Bernoulli, ReturnLoss::Histogram, ReturnLoss::Squared];

fn options(loss_type: ReturnLoss) -> ValueModelOptions {
    ValueModelOptions {
        loss_type,
        bins: 5,
        num_generations: 1,
        batch_size: 16,
        sampling: SamplingOptions { max_new_tokens: 4, ..Default::default() },
        training: TrainingOptions {
            max_steps: Some(5),
            learning_rate: 3e-3,
            micro_batch_tokens: 40,
            ..Default::default()
        },
        ..Default::default()
    }
}

fn reference() -> Decoder {
    Decoder::random(ModelConfig::tiny(Family::Llama, 259), 3).unwrap()
}

fn run(
    options: &ValueModelOptions,
    lora: bool,
    folder: &Path,
    resume: bool,
    observer: &mut dyn Observer,
    interrupt: &AtomicBool,
) -> Outcome {
    let tokenizer = tokenizer();
    let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), 5).unwrap();
    decoder.add_score(options.head(), 0.0, 0).unwrap();
    if lora {
        decoder.attach_lora(&LoraConfig { r: 4, alpha: 8.0, ..Default::default() }, 2).unwrap();
    }
    let prompts = prompts().into_iter().take(30).collect();
    let method = ValueModel::new(options.clone(), reference(), prompts, Box::new(Lower)).unwrap();
    let run = Run {
        directory: folder,
        options: RunOptions { save_steps: 2, eval_steps: 0, ..Default::default() },
        seed: 7,
        precision: Precision::F32,
        decoder,
        tokenizer: &tokenizer,
        chat_template: None,
        stages: vec![Box::new(method)],
        evaluator: None,
        referee: Default::default(),
        world: None,
        observer,
        interrupt,
        provenance: Provenance { program: "posttrain test".into(), base_model: "tiny".into(), ..Default::default() },
    };
    if resume { run.resume() } else { run.start() }.unwrap()
}

fn finish(options: &ValueModelOptions, folder: &Path) {
    assert!(matches!(run(options, false, folder, false, &mut (), &AtomicBool::new(false)), Outcome::Finished(_)));
}

#[test]
fn cuts_and_threads_do_not_matter() {
    for loss in LOSSES {
        let folder = tempfile::tempdir().unwrap();
        let whole = options(loss);
        on_threads(2, || finish(&whole, &folder.path().join("whole")));
        for (micro_batch_tokens, decode_batch_size, threads) in [(1, 3, 1), (100_000, 64, 3)] {
            let training = TrainingOptions { micro_batch_tokens, ..whole.training.clone() };
            let cut = ValueModelOptions { training, decode_batch_size, ..whole.clone() };
            on_threads(threads, || finish(&cut, &folder.path().join("cut")));
            let what = format!("{loss:?}, {micro_batch_tokens} tokens");
            assert_same(&folder.path().join("whole"), &folder.path().join("cut"), &what);
            std::fs::remove_dir_all(folder.path().join("cut")).unwrap();
        }
    }
}

/// Answers of the rounds so far are part of a checkpoint: no step samples them again.
#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    for (loss, lora) in LOSSES.into_iter().zip([true, false, false]) {
        let folder = tempfile::tempdir().unwrap();
        let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
        run(&options(loss), lora, &whole, false, &mut (), &AtomicBool::new(false));
        for step in 1..=4 {
            let stop = AtomicBool::new(false);
            let outcome = run(&options(loss), lora, &stopped, step > 1, &mut StopAt(step, &stop), &stop);
            assert_eq!(outcome, Outcome::Interrupted { step });
        }
        run(&options(loss), lora, &stopped, true, &mut (), &AtomicBool::new(false));
        assert_same(&whole, &stopped, "stopped after every step");
    }
}

/// Each round samples once, in its first step; the second learns from the answers of both.
#[test]
fn every_round_samples_in_its_first_step() {
    let folder = tempfile::tempdir().unwrap();
    finish(&options(ReturnLoss::Bernoulli), folder.path());
    let episodes: Vec<Option<f64>> =
        metrics(folder.path()).iter().map(|line| line.get("value/episodes").and_then(|value| value.as_f64())).collect();
    let found: Vec<(usize, f64)> =
        episodes.into_iter().enumerate().filter_map(|(step, count)| Some((step, count?))).collect();
    assert_eq!(found, [(0, 30.0), (2, 60.0)]);
}

/// A model that has half learned its task is guided to what it does not do alone.
#[test]
fn guidance_finds_what_is_paid() {
    let tokenizer = tokenizer();
    let training =
        |max_steps| TrainingOptions { max_steps: Some(max_steps), learning_rate: 3e-3, ..Default::default() };
    let mut reference = reference();
    let mut value = Decoder::random(ModelConfig::tiny(Family::Llama, 259), 5).unwrap();
    let options = ValueModelOptions {
        num_generations: 8,
        batch_size: 64,
        sampling: SamplingOptions { max_new_tokens: 3, ..Default::default() },
        training: training(120),
        ..Default::default()
    };
    value.add_score(options.head(), 0.0, 0).unwrap();
    let fit = |method: &mut dyn Method, decoder: &mut Decoder| {
        let fit = Fit { decoder, tokenizer: &tokenizer, seed: 1, stage: 0, precision: Precision::F32 };
        train::fit::<train::Error>(method, fit, |_, _, _| Ok(())).unwrap();
    };
    let sft = SftOptions { batch_size: 32, training: training(40), ..Default::default() };
    fit(&mut Sft::new(sft, examples()).unwrap(), &mut reference);
    let mut method = ValueModel::new(options.clone(), reference.clone(), prompts(), Box::new(Exact)).unwrap();
    fit(&mut method, &mut value);
    reference.prepare(Precision::F32);
    value.prepare(Precision::F32);

    let prompts = prompts();
    let requests: Vec<Request> =
        prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, 4).collect::<Vec<_>>()).collect();
    let hook = Guidance::new(&value, options.returns(), &GuidanceOptions::default(), &options.sampling).unwrap();
    let accuracy = |hook: Option<&dyn LogitsHook>| {
        let generator = Generator::new(&options.sampling, 32, Random::new(9, Purpose::Sampling));
        let generator = Generator { hook, ..generator };
        let episodes = generator.generate(&reference, &tokenizer, &requests, |_| {}).unwrap();
        let right = episodes.iter().zip(prompts.iter().flat_map(|prompt| [prompt; 4]));
        right.filter(|(episode, prompt)| prompt.columns["answer"] == episode.text.as_str()).count() as f64 / 400.0
    };
    let (alone, guided) = (accuracy(None), accuracy(Some(&hook)));
    assert!((0.1..0.7).contains(&alone) && guided > alone + 0.1, "{alone} alone, {guided} guided");
}

#[test]
fn returns_that_the_loss_cannot_speak_of_are_refused() {
    struct Two;
    impl Reward for Two {
        fn name(&self) -> &str {
            "two"
        }

        fn score(&self, answers: &[envs::Answer<'_>]) -> Result<Vec<Option<envs::Score>>, envs::RewardError> {
            Ok(answers.iter().map(|_| Some(envs::Score::new(2.0, envs::Status::Ok))).collect())
        }
    }
    let message = |loss| {
        let tokenizer = tokenizer();
        let options = options(loss);
        let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), 5).unwrap();
        decoder.add_score(options.head(), 0.0, 0).unwrap();
        let mut method = ValueModel::new(options, reference(), prompts(), Box::new(Two)).unwrap();
        let fit = Fit { decoder: &mut decoder, tokenizer: &tokenizer, seed: 1, stage: 0, precision: Precision::F32 };
        train::fit::<train::Error>(&mut method, fit, |_, _, _| Ok(())).err().map(|error| error.to_string())
    };
    let bernoulli = message(ReturnLoss::Bernoulli).unwrap();
    assert_eq!(bernoulli, "step 1: a return is 2, expected 0 to 1, as loss_type is \"bernoulli\"");
    assert!(message(ReturnLoss::Histogram).unwrap().contains("return_low to return_high"));
    assert_eq!(message(ReturnLoss::Squared), None);
}
