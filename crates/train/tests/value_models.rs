//! Value models learn how their reference goes on, guide it to what is paid, and their runs keep the promises of all runs.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use base::{Purpose, Random};
use envs::Reward;
use envs::reward::{Shaped, Shaping};
use kernels::Precision;
use model::ModelConfig;
use model::config::Family;
use model::decoder::{Decoder, Workspace};
use model::lora::LoraConfig;
use posttrain_train as train;
use rollout::guidance::returns::{bernoulli, tilted};
use rollout::{Episode, Generator, Guidance, GuidanceOptions, LogitsHook, Request, SamplingOptions, ValueHead};
use train::methods::sft::{Sft, SftOptions};
use train::methods::value_model::{ReturnLoss, ValueModel, ValueModelOptions};
use train::options::{RunOptions, TrainingOptions};
use train::{Fit, Method, Observer, Outcome, Provenance, Run};

use crate::common::{Exact, Lower, StopAt, assert_same, examples, metrics, on_threads, prompts, tokenizer};

const LOSSES: [(ReturnLoss, ValueHead); 5] = [
    (ReturnLoss::Bernoulli, ValueHead::State),
    (ReturnLoss::Histogram, ValueHead::State),
    (ReturnLoss::Squared, ValueHead::State),
    (ReturnLoss::Bernoulli, ValueHead::Action),
    (ReturnLoss::Histogram, ValueHead::Action),
];

fn options((loss_type, head): (ReturnLoss, ValueHead)) -> ValueModelOptions {
    ValueModelOptions {
        loss_type,
        head,
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
    reward: fn() -> Box<dyn Reward>,
    folder: &Path,
    resume: bool,
    observer: &mut dyn Observer,
    interrupt: &AtomicBool,
) -> Outcome {
    let tokenizer = tokenizer();
    let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), 5).unwrap();
    decoder.add_score(options.score_head(259), 0.0, 0).unwrap();
    if lora {
        decoder.attach_lora(&LoraConfig { r: 4, alpha: 8.0, ..Default::default() }, 2).unwrap();
    }
    let prompts = prompts().into_iter().take(30).collect();
    let method = ValueModel::new(options.clone(), reference(), prompts, reward()).unwrap();
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

fn lower() -> Box<dyn Reward> {
    Box::new(Lower)
}

fn finish(options: &ValueModelOptions, folder: &Path) {
    assert!(matches!(
        run(options, false, lower, folder, false, &mut (), &AtomicBool::new(false)),
        Outcome::Finished(_)
    ));
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

/// Answers of the rounds so far are part of a checkpoint, no step samples them again; so is what the reward has seen in them.
#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    let standardised = || -> Box<dyn Reward> { Box::new(Shaped::new(Box::new(Lower), Shaping::MeanStd)) };
    for (loss, lora) in LOSSES.into_iter().zip([true, false, false, true, false]) {
        // The mean of a return may be any number.
        let reward = if loss.0 == ReturnLoss::Squared { standardised } else { lower };
        let folder = tempfile::tempdir().unwrap();
        let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
        run(&options(loss), lora, reward, &whole, false, &mut (), &AtomicBool::new(false));
        for step in 1..=4 {
            let stop = AtomicBool::new(false);
            let outcome = run(&options(loss), lora, reward, &stopped, step > 1, &mut StopAt(step, &stop), &stop);
            assert_eq!(outcome, Outcome::Interrupted { step });
        }
        run(&options(loss), lora, reward, &stopped, true, &mut (), &AtomicBool::new(false));
        assert_same(&whole, &stopped, "stopped after every step");
    }
}

/// Each round samples once, in its first step; the second learns from the answers of both.
#[test]
fn every_round_samples_in_its_first_step() {
    let folder = tempfile::tempdir().unwrap();
    finish(&options(LOSSES[0]), folder.path());
    let episodes: Vec<Option<f64>> =
        metrics(folder.path()).iter().map(|line| line.get("value/episodes").and_then(|value| value.as_f64())).collect();
    let found: Vec<(usize, f64)> =
        episodes.into_iter().enumerate().filter_map(|(step, count)| Some((step, count?))).collect();
    assert_eq!(found, [(0, 30.0), (2, 60.0)]);
}

/// Two tokens out of three each time: nine answers, of which every law can be told. Both heads learn it, and guide as it says.
#[test]
fn both_heads_learn_the_law_that_can_be_enumerated() {
    /// Pays for the answers whose tokens have an odd sum.
    struct Odd;
    impl Reward for Odd {
        fn name(&self) -> &str {
            "odd"
        }

        fn score(&self, answers: &[envs::Answer<'_>]) -> Result<Vec<Option<envs::Score>>, envs::RewardError> {
            let paid = |answer: &envs::Answer<'_>| odd(answer.completion_ids);
            Ok(answers.iter().map(|answer| Some(envs::Score::new(paid(answer), envs::Status::Ok))).collect())
        }
    }
    fn odd(ids: &[u32]) -> f64 {
        f64::from(ids.iter().sum::<u32>() % 2)
    }

    let (tokenizer, eta) = (tokenizer(), 0.4);
    let sampling = SamplingOptions { max_new_tokens: 2, top_k: 3, ..Default::default() };
    let mut reference = reference();
    reference.prepare(Precision::F32);
    let prompts: Vec<_> = prompts().into_iter().take(1).collect();
    // The three tokens after some others, by id, with the logarithms of their probabilities among themselves.
    let next = |ids: &[u32]| {
        let mut workspace = Workspace::new();
        let hidden = reference.prefill(&[ids], &mut workspace).unwrap().remove(0).hidden;
        let mut logits = vec![0.0; 259];
        reference.logits(&hidden, &mut logits).unwrap();
        let mut best: Vec<u32> = (0..259).collect();
        best.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        let kept: Vec<f64> = best[..3].iter().map(|&id| f64::from(logits[id as usize])).collect();
        (best[..3].to_vec(), tilted(&kept, &[0.0; 3], 1.0).0)
    };
    for head in [ValueHead::State, ValueHead::Action] {
        let options = ValueModelOptions {
            head,
            rounds: 1,
            num_generations: 400,
            batch_size: 100,
            sampling: sampling.clone(),
            training: TrainingOptions { max_steps: Some(400), learning_rate: 5e-3, ..Default::default() },
            ..Default::default()
        };
        let mut value = Decoder::random(ModelConfig::tiny(Family::Llama, 259), 5).unwrap();
        value.add_score(options.score_head(259), 0.0, 0).unwrap();
        let mut method = ValueModel::new(options.clone(), reference.clone(), prompts.clone(), Box::new(Odd)).unwrap();
        let fit = Fit { decoder: &mut value, tokenizer: &tokenizer, seed: 1, stage: 0, precision: Precision::F32 };
        train::fit::<train::Error>(&mut method, fit, |_, _, _| Ok(())).unwrap();
        value.prepare(Precision::F32);
        let guidance = GuidanceOptions { eta, top_k: 3, ..GuidanceOptions::default() };
        let hook = Guidance::new(&value, options.outputs(), &guidance, &sampling).unwrap();
        let generator = Generator::new(&sampling, 32, Random::new(9, Purpose::Sampling));
        let generator = Generator { hook: Some(&hook), ..generator };
        let requests: Vec<Request> =
            prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, 20)).collect();
        let episodes: Vec<Episode> = generator.generate(&reference, &tokenizer, &requests, |_| {}).unwrap();
        let mut furthest = 0f64;
        for episode in &episodes {
            for place in 0..episode.completion.len() {
                let before = [&episode.prompt[..], &episode.completion[..place]].concat();
                let (tokens, log_probs) = next(&before);
                let worths: Vec<f64> = (tokens.iter())
                    .map(|&token| {
                        let answer = [&episode.completion[..place], &[token]].concat();
                        let paid = match answer.len() {
                            1 => {
                                let (second, log_probs) = next(&[&before[..], &[token]].concat());
                                let of = |(&id, log_prob): (&u32, &f64)| log_prob.exp() * odd(&[token, id]);
                                second.iter().zip(&log_probs).map(of).sum()
                            }
                            _ => odd(&answer),
                        };
                        bernoulli((paid / (1.0 - paid)).ln(), eta, guidance.floor)
                    })
                    .collect();
                let (policy, _) = tilted(&log_probs, &worths, eta);
                let drawn = tokens.iter().position(|&id| id == episode.completion[place]).unwrap();
                let (found, expected) = (f64::from(episode.filtered_log_probs[place]).exp(), policy[drawn].exp());
                furthest = furthest.max((found - expected).abs());
            }
        }
        println!("{head:?}: probabilities are off by {furthest}");
        assert!(furthest < 0.06, "{head:?}: probabilities are off by {furthest}");
    }
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
    value.add_score(options.score_head(259), 0.0, 0).unwrap();
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
    let hook = Guidance::new(&value, options.outputs(), &GuidanceOptions::default(), &options.sampling).unwrap();
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
        let options = options((loss, ValueHead::State));
        let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), 5).unwrap();
        decoder.add_score(options.score_head(259), 0.0, 0).unwrap();
        let mut method = ValueModel::new(options, reference(), prompts(), Box::new(Two)).unwrap();
        let fit = Fit { decoder: &mut decoder, tokenizer: &tokenizer, seed: 1, stage: 0, precision: Precision::F32 };
        train::fit::<train::Error>(&mut method, fit, |_, _, _| Ok(())).err().map(|error| error.to_string())
    };
    let bernoulli = message(ReturnLoss::Bernoulli).unwrap();
    assert_eq!(bernoulli, "step 1: a return is 2, expected 0 to 1, as loss_type is \"bernoulli\"");
    assert!(message(ReturnLoss::Histogram).unwrap().contains("return_low to return_high"));
    assert_eq!(message(ReturnLoss::Squared), None);
}
