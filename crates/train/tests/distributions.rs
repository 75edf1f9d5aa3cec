//! Methods that learn from whole distributions or from their own kept answers: distillation, unlearning, forms of supervised
//! fine-tuning, rejection sampling. They learn, and their runs keep the promises of all runs.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use data::{Example, Prompt, Source};
use envs::reward::{Shaped, Shaping};
use envs::{Answer, Reward, RewardError, Score};
use kernels::Precision;
use model::ModelConfig;
use model::config::Family;
use model::decoder::Decoder;
use model::lora::LoraConfig;
use model::weights::safetensors;
use objectives::unlearning::Forget;
use posttrain_train as train;
use rollout::SamplingOptions;
use serde::de::DeserializeOwned;
use train::methods::distillation::{self, Distillation, DistillationOptions, Lessons, TeacherOptions};
use train::methods::rejection::{self, Rejection, RejectionOptions};
use train::methods::sft::{self, Sft, SftOptions};
use train::methods::unlearning::{self, Unlearning, UnlearningOptions};
use train::methods::{Family as Methods, Preset};
use train::options::{RunOptions, TrainingOptions};
use train::{Evaluator, Method, Observer, Outcome, Provenance, Run};

use crate::common::{Accuracy, Exact, StopAt, assert_same, examples, metrics, on_threads, prompts, seeds, tokenizer};

/// A stage of one of the families.
#[derive(Clone)]
enum Stage {
    Sft(SftOptions),
    Distillation(DistillationOptions),
    Unlearning(UnlearningOptions),
    Rejection(RejectionOptions),
}

impl Stage {
    fn training(&mut self) -> &mut TrainingOptions {
        match self {
            Self::Sft(options) => &mut options.training,
            Self::Distillation(options) => &mut options.training,
            Self::Unlearning(options) => &mut options.training,
            Self::Rejection(options) => &mut options.training,
        }
    }

    fn method(&self) -> Box<dyn Method> {
        match self.clone() {
            Self::Sft(options) => Box::new(Sft::new(options, examples()).unwrap()),
            Self::Distillation(options) => {
                let reward: Box<dyn Reward> = match options.objective.nll_weight > 0.0 {
                    // Depends on all answers so far.
                    true => Box::new(Shaped::new(Box::new(Exact), Shaping::MeanStd)),
                    false => Box::new(Exact),
                };
                let lessons = Lessons { prompts: prompts(), examples: examples(), reward: Some(reward) };
                let mut teachers = vec![teacher().clone(); options.teachers.len()];
                if options.objective.extrapolation.is_some() {
                    teachers[1] = beginner().clone();
                }
                Box::new(Distillation::new(options, teachers, lessons).unwrap())
            }
            Self::Unlearning(options) => {
                let (forget, retain) = split(examples());
                Box::new(Unlearning::new(options, forget, retain).unwrap())
            }
            Self::Rejection(options) => {
                let hints = if options.rationalization_hint.is_some() { hinted() } else { Vec::new() };
                Box::new(Rejection::new(options, prompts(), Box::new(Exact)).unwrap().with_hints(hints))
            }
        }
    }
}

/// A prompt whose answer is the digit in it that an easy prompt names: `77>` for the problem `37>`.
fn hinted() -> Vec<Prompt> {
    let easy = |prompt: Prompt| {
        let answer = prompt.columns["answer"].as_str().unwrap().to_owned();
        let text = format!("{answer}{answer}>");
        Prompt { ids: tokenizer().encode(&text).unwrap().into(), text, ..prompt }
    };
    prompts().into_iter().map(easy).collect()
}

/// Rows to forget, one in five, and rows to keep.
fn split(examples: Vec<Example>) -> (Vec<Example>, Vec<Example>) {
    let (forget, retain): (Vec<_>, Vec<_>) = examples.into_iter().enumerate().partition(|(row, _)| row % 5 == 0);
    let examples = |rows: Vec<(usize, Example)>| rows.into_iter().map(|(_, example)| example).collect();
    (examples(forget), examples(retain))
}

/// The options a preset stands for.
fn options<T: DeserializeOwned>(preset: &Preset) -> T {
    toml::from_str(&format!("method = \"{}\"\n{}", preset.name, preset.settings)).unwrap()
}

fn stage(family: &Methods, preset: &Preset) -> Option<Stage> {
    let sampling = || SamplingOptions { max_new_tokens: 3, ..Default::default() };
    // Two models make one teacher where the preset extrapolates.
    let teacher = |name: &str| TeacherOptions { model: name.into(), weight: 1.0 };
    let second = preset.settings.contains("extrapolation").then(|| teacher("other"));
    let teachers = std::iter::once(teacher("teacher")).chain(second).collect();
    Some(match family.section {
        "sft" => Stage::Sft(SftOptions { batch_size: 25, ..options(preset) }),
        "distillation" => Stage::Distillation(DistillationOptions {
            batch_size: 24,
            num_generations: 2,
            teachers,
            sampling: sampling(),
            ..options(preset)
        }),
        "unlearning" => {
            Stage::Unlearning(UnlearningOptions { forget_batch_size: 10, retain_batch_size: 20, ..options(preset) })
        }
        "rejection" => {
            Stage::Rejection(RejectionOptions { prompts_per_step: 16, sampling: sampling(), ..options(preset) })
        }
        _ => return None,
    })
}

/// Every published method of the four families.
fn all() -> Vec<(&'static str, Stage)> {
    let presets =
        train::methods::FAMILIES.iter().flat_map(|family| family.presets.iter().map(move |preset| (family, preset)));
    let stages: Vec<_> = presets.filter_map(|(family, preset)| Some((preset.name, stage(family, preset)?))).collect();
    let expected = [sft::PRESETS, distillation::PRESETS, unlearning::PRESETS, rejection::PRESETS];
    assert_eq!(stages.len(), expected.iter().map(|presets| presets.len()).sum::<usize>());
    stages
}

fn named(name: &str) -> Stage {
    all().into_iter().find(|(other, _)| *other == name).unwrap().1
}

/// A run of one stage.
#[derive(Clone)]
struct Setup {
    decoder: Decoder,
    stage: Stage,
    seed: u64,
    precision: Precision,
    evaluate: bool,
}

impl Setup {
    fn run(
        &self,
        folder: &Path,
        resume: bool,
        observer: &mut dyn Observer,
        interrupt: &AtomicBool,
    ) -> train::Result<Outcome> {
        self.run_method(self.stage.method(), folder, resume, observer, interrupt)
    }

    fn run_method(
        &self,
        method: Box<dyn Method>,
        folder: &Path,
        resume: bool,
        observer: &mut dyn Observer,
        interrupt: &AtomicBool,
    ) -> train::Result<Outcome> {
        let tokenizer = tokenizer();
        let mut accuracy = Accuracy;
        let run = Run {
            directory: folder,
            options: RunOptions { save_steps: 2, save_total_limit: 2, eval_steps: 0, ..Default::default() },
            seed: self.seed,
            precision: self.precision,
            decoder: self.decoder.clone(),
            tokenizer: &tokenizer,
            world: None,
            referee: Default::default(),
            chat_template: None,
            stages: vec![method],
            evaluator: self.evaluate.then_some(&mut accuracy as &mut dyn Evaluator),
            observer,
            interrupt,
            provenance: Provenance { base_model: "tiny".into(), ..Default::default() },
        };
        if resume { run.resume() } else { run.start() }
    }

    /// The metrics of a run of another method.
    fn lines_of(&self, method: Box<dyn Method>) -> Vec<serde_json::Map<String, serde_json::Value>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let outcome = self.run_method(method, &path, false, &mut (), &AtomicBool::new(false)).unwrap();
        assert!(matches!(outcome, Outcome::Finished(_)), "{outcome:?}");
        metrics(&path)
    }

    fn finish(&self, folder: &Path) -> train::Summary {
        match self.run(folder, false, &mut (), &AtomicBool::new(false)).unwrap() {
            Outcome::Finished(summary) => *summary,
            outcome => panic!("{outcome:?}"),
        }
    }

    /// The values of a metric over the steps of a run, and the accuracy before and after.
    fn learn(&self, metric: &str) -> (Vec<f64>, f64, f64) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let summary = self.finish(&path);
        let values = metrics(&path).iter().filter_map(|line| line.get(metric)?.as_f64()).collect();
        let accuracy =
            |evaluation: Option<train::Evaluation>| evaluation.map_or(f64::NAN, |found| found.measures[0].value);
        (values, accuracy(summary.before), accuracy(summary.after))
    }
}

fn training(steps: u64, learning_rate: f64) -> TrainingOptions {
    TrainingOptions { max_steps: Some(steps), learning_rate, warmup_steps: 2, ..Default::default() }
}

fn random(seed: u64) -> Decoder {
    Decoder::random(ModelConfig::tiny(Family::Llama, 259), seed).unwrap()
}

/// A model that has learnt from the examples for so many steps.
fn taught(steps: u64) -> Decoder {
    let stage = Stage::Sft(SftOptions { batch_size: 25, training: training(steps, 3e-3), ..SftOptions::default() });
    let setup = Setup { decoder: random(11), stage, seed: 11, precision: Precision::F32, evaluate: false };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    setup.finish(&path);
    Decoder::new(ModelConfig::tiny(Family::Llama, 259), safetensors::read(&path.join("final")).unwrap()).unwrap()
}

/// Knows nearly all answers.
fn teacher() -> &'static Decoder {
    static TEACHER: OnceLock<Decoder> = OnceLock::new();
    TEACHER.get_or_init(|| taught(160))
}

/// Knows the form of an answer, and some answers.
fn beginner() -> &'static Decoder {
    static BEGINNER: OnceLock<Decoder> = OnceLock::new();
    BEGINNER.get_or_init(|| taught(32))
}

fn ends(values: &[f64]) -> (f64, f64) {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    (mean(&values[..3]), mean(&values[values.len() - 3..]))
}

#[test]
fn students_come_close_to_their_teacher() {
    let mut knows = teacher().clone();
    knows.prepare(Precision::F32);
    let accuracy = Accuracy.evaluate(&knows, &mut |_, _| {}).unwrap().measures[0].value;
    assert!(accuracy > 0.9, "the teacher itself solves {accuracy}");
    for (place, preset) in distillation::PRESETS.iter().enumerate() {
        for seed in seeds(place) {
            let mut stage = named(preset.name);
            // An estimate from sampled tokens alone is noisier than one over the whole vocabulary, and learns more slowly.
            let sampled = ["on_policy_distillation", "minillm"].contains(&preset.name);
            *stage.training() = training(if sampled { 120 } else { 60 }, 3e-3);
            let setup = Setup { decoder: beginner().clone(), stage, seed, precision: Precision::F32, evaluate: true };
            let (divergence, before, after) = setup.learn("divergence");
            let (first, last) = ends(&divergence);
            println!("{} {seed}: divergence {first:.3} to {last:.3}, accuracy {before} to {after}", preset.name);
            assert!(last < 0.6 * first, "{} {seed}: divergence from {first} to {last}", preset.name);
            assert!(after > before + 0.05, "{} {seed}: accuracy from {before} to {after}", preset.name);
        }
    }
}

#[test]
fn answers_that_pass_teach() {
    for (place, preset) in rejection::PRESETS.iter().enumerate() {
        for seed in seeds(place) {
            let mut stage = named(preset.name);
            *stage.training() = training(60, 1e-3);
            let setup = Setup { decoder: beginner().clone(), stage, seed, precision: Precision::F32, evaluate: true };
            let (kept, before, after) = setup.learn("rejection/kept_ratio");
            println!("{} {seed}: kept {:?}, accuracy {before} to {after}", preset.name, ends(&kept));
            assert!(after > before + 0.05, "{} {seed}: accuracy from {before} to {after}", preset.name);
        }
    }
}

/// What is only found with a hint is learnt without it, and only where nothing was found before.
#[test]
fn failed_prompts_are_tried_again_with_a_hint() {
    let first = |hint: Option<&str>| {
        let Stage::Rejection(options) = named("star") else { panic!("another family") };
        let options = RejectionOptions { num_generations: 2, rationalization_hint: hint.map(str::to_owned), ..options };
        let stage = Stage::Rejection(RejectionOptions { training: training(1, 1e-3), ..options });
        let setup = Setup { decoder: beginner().clone(), stage, seed: 1, precision: Precision::F32, evaluate: false };
        let folder = tempfile::tempdir().unwrap();
        setup.finish(&folder.path().join("run"));
        metrics(&folder.path().join("run")).remove(0)
    };
    let (plain, led) = (first(None), first(Some("{answer}")));
    assert!(plain.get("rejection/rationalized_ratio").is_none());
    let number = |line: &serde_json::Map<String, serde_json::Value>, name: &str| line[name].as_f64().unwrap();
    assert_eq!(number(&led, "reward"), number(&plain, "reward"), "the first try is the same");
    let gained = number(&led, "rejection/prompts_ratio") - number(&plain, "rejection/prompts_ratio");
    assert!((gained - number(&led, "rejection/rationalized_ratio")).abs() < 1e-12 && gained > 0.0, "{gained}");
    let tokens = number(&led, "num_tokens") - number(&plain, "num_tokens");
    // Prompts have three tokens and answers one, and the end: those of the second try are learnt without the hint.
    assert!(tokens >= 16.0 * gained * 5.0, "{tokens}");
}

#[test]
fn every_form_of_fine_tuning_teaches() {
    let mut forms: Vec<(&str, Stage)> = sft::PRESETS.iter().map(|preset| (preset.name, named(preset.name))).collect();
    let Stage::Sft(mut smoothed) = named("sft") else { panic!("another family") };
    smoothed.objective.label_smoothing = 0.1;
    forms.push(("label smoothing", Stage::Sft(smoothed)));
    for (place, (name, mut stage)) in forms.into_iter().enumerate() {
        if let Stage::Sft(options) = &mut stage {
            // The usual 5 is for embeddings of the usual size; those of so small a model would drown.
            options.neftune_noise_alpha = options.neftune_noise_alpha.min(0.1);
        }
        for seed in seeds(place) {
            *stage.training() = training(60, 3e-3);
            let setup = Setup {
                decoder: beginner().clone(),
                stage: stage.clone(),
                seed,
                precision: Precision::F32,
                evaluate: true,
            };
            let (_, before, after) = setup.learn("loss");
            println!("{name} {seed}: accuracy {before} to {after}");
            assert!(after > before + 0.15, "{name} {seed}: accuracy from {before} to {after}");
        }
    }
}

#[test]
fn what_is_to_be_forgotten_is_forgotten_and_the_rest_is_kept() {
    let (forget, retain) = split(examples());
    let mut failed = Vec::new();
    for (place, preset) in unlearning::PRESETS.iter().enumerate() {
        for seed in seeds(place) {
            let Stage::Unlearning(mut options) = named(preset.name) else { panic!("another family") };
            // An answer is one digit and the end: nothing would be left without the first.
            options.objective.ignore_first_tokens = 0;
            // Means over tokens push less hard than sums.
            options.training = training(if preset.name == "simnpo" { 120 } else { 36 }, 5e-4);
            let retains = options.retains();
            let setup = Setup {
                decoder: teacher().clone(),
                stage: Stage::Unlearning(options),
                seed,
                precision: Precision::F32,
                evaluate: false,
            };
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("run");
            setup.finish(&path);
            let mut after =
                Decoder::new(ModelConfig::tiny(Family::Llama, 259), safetensors::read(&path.join("final")).unwrap())
                    .unwrap();
            let of = |decoder: &mut Decoder, examples: &[Example]| mean_log_prob(decoder, examples);
            let (forgotten, kept) = (of(&mut after, &forget), of(&mut after, &retain));
            let before = of(&mut teacher().clone(), &forget);
            println!("{} {seed}: forget {before:.3} to {forgotten:.3}, retain {kept:.3}", preset.name);
            // A mean over tokens comes to rest against the rows that are kept sooner than a sum.
            let by = if preset.name == "simnpo" { 0.5 } else { 1.0 };
            let apart = kept > -0.5 && kept > forgotten + 0.7 * by;
            if forgotten >= before - by || (retains && !apart) {
                failed.push(format!("{} {seed}: forgets {forgotten}, keeps {kept}", preset.name));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// The mean log-probability of the loss tokens of examples.
fn mean_log_prob(decoder: &mut Decoder, examples: &[Example]) -> f64 {
    use train::pass::Unit;
    use train::update::{Batch, Reading};
    decoder.prepare(Precision::F32);
    let batch = Batch::new(examples.iter().map(Unit::of).collect());
    let mut workspace = model::decoder::Workspace::new();
    let found = batch.log_probs(decoder, &mut workspace, 0..batch.units(), Reading::plain(4096)).unwrap();
    found.log_prob.iter().map(|&log_prob| f64::from(log_prob)).sum::<f64>() / found.log_prob.len() as f64
}

/// A student that samples with its teacher's help finds what the teacher knows sooner than alone.
#[test]
fn a_teacher_in_the_mixture_leads_to_right_answers() {
    let reward = |teacher_mix: f64| {
        let Stage::Distillation(options) = named("minillm") else { panic!("another family") };
        let stage = Stage::Distillation(DistillationOptions { teacher_mix, training: training(4, 1e-4), ..options });
        let setup = Setup { decoder: beginner().clone(), stage, seed: 1, precision: Precision::F32, evaluate: false };
        let folder = tempfile::tempdir().unwrap();
        setup.finish(&folder.path().join("run"));
        metrics(&folder.path().join("run"))
    };
    let (alone, led) = (reward(0.0), reward(0.8));
    let mean = |lines: &[serde_json::Map<String, serde_json::Value>]| {
        lines.iter().map(|line| line["reward"].as_f64().unwrap()).sum::<f64>() / lines.len() as f64
    };
    assert!(mean(&led) > mean(&alone) + 0.2, "{} alone, {} led", mean(&alone), mean(&led));
    assert!(alone[0].get("sampling/importance_sampling_ratio/max").is_none());
    for line in &led {
        let ratio = |kind: &str| line[&format!("sampling/importance_sampling_ratio/{kind}")].as_f64().unwrap();
        assert!(ratio("max") <= 1.0 / 0.2 + 1e-3, "the mixture has a fifth of the student in it");
        assert!(ratio("min") < 1.0 && (0.3..1.7).contains(&ratio("mean")), "{}", ratio("mean"));
    }
}

/// CE-U stops by itself where gradient ascent goes on without end.
#[test]
fn ce_u_comes_to_rest_and_gradient_ascent_does_not() {
    let norms = |name: &str| {
        let Stage::Unlearning(mut options) = named(name) else { panic!("another family") };
        options.objective.ignore_first_tokens = 0;
        options.training = training(80, 1e-3);
        let setup = Setup {
            decoder: teacher().clone(),
            stage: Stage::Unlearning(options),
            seed: 5,
            precision: Precision::F32,
            evaluate: false,
        };
        let folder = tempfile::tempdir().unwrap();
        setup.finish(&folder.path().join("run"));
        let lines = metrics(&folder.path().join("run"));
        let last = lines.last().unwrap();
        (last["grad_norm"].as_f64().unwrap(), last["loss"].as_f64().unwrap())
    };
    let (ce_u, ascent) = (norms("ce_u"), norms("gradient_ascent"));
    assert!(ce_u.0 < 0.05 && (0.0..0.05).contains(&ce_u.1), "{ce_u:?}");
    assert!(ascent.0 > 20.0 * ce_u.0 && ascent.1 < -10.0, "{ascent:?}");
}

/// Pays nothing, and writes down whose answers it is shown.
struct Shown(Arc<Mutex<Vec<u32>>>);

impl Reward for Shown {
    fn name(&self) -> &str {
        "shown"
    }

    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<Score>>, RewardError> {
        let mut shown = self.0.lock().unwrap();
        shown.extend(answers.iter().map(|answer| answer.columns["row"].as_u64().unwrap() as u32));
        Ok(vec![None; answers.len()])
    }
}

/// As many prompts as examples, of each one a step: they meet in no fixed pairs.
#[test]
fn prompts_and_examples_come_in_orders_of_their_own() {
    let rows = 10;
    let prompt = |row: u32| Prompt {
        columns: [("row".to_owned(), row.into())].into_iter().collect(),
        ..prompts().swap_remove(row as usize)
    };
    // The length of an example tells its row.
    let example = |row: u32| {
        let mut ids = tokenizer().encode("12>").unwrap();
        ids.extend(vec![ids[0]; row as usize + 1]);
        let loss_mask = (0..ids.len()).map(|index| index >= 3).collect();
        Example { ids, loss_mask, source: Source::new("rows", u64::from(row) + 1) }
    };
    let Stage::Distillation(options) = named("gkd") else { panic!("another family") };
    let options = DistillationOptions {
        batch_size: 2,
        num_generations: 1,
        sampling: SamplingOptions { max_new_tokens: 1, ..Default::default() },
        training: training(20, 1e-4),
        ..options
    };
    let shown = Arc::new(Mutex::new(Vec::new()));
    let lessons = Lessons {
        prompts: (0..rows).map(prompt).collect(),
        examples: (0..rows).map(example).collect(),
        reward: Some(Box::new(Shown(shown.clone()))),
    };
    let stage = Stage::Distillation(options.clone());
    let setup = Setup { decoder: beginner().clone(), stage, seed: 3, precision: Precision::F32, evaluate: false };
    let method = Distillation::new(options, vec![teacher().clone()], lessons).unwrap();
    let lines = setup.lines_of(Box::new(method));
    let seen: Vec<u64> = lines.iter().map(|line| line["num_tokens"].as_u64().unwrap()).collect();
    // A prompt of three tokens and an answer of one; an example of four and as many as its row's number.
    let examples: Vec<u32> =
        std::iter::once(&0).chain(&seen).zip(&seen).map(|(before, after)| (after - before - 8) as u32).collect();
    let prompts = shown.lock().unwrap().clone();
    for epoch in [0..10, 10..20] {
        for rows in [&prompts[epoch.clone()], &examples[epoch.clone()]] {
            let mut sorted = rows.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>(), "an epoch of {rows:?}");
        }
        assert_ne!(prompts[epoch.clone()], examples[epoch]);
    }
}

/// Rows to forget and as many rows to keep, which are here the same: a step does not take the same of both.
#[test]
fn rows_to_keep_come_in_an_order_of_their_own() {
    let Stage::Unlearning(options) = named("gradient_difference") else { panic!("another family") };
    let options = UnlearningOptions { retain_batch_size: 10, training: training(10, 0.0), ..options };
    let stage = Stage::Unlearning(options.clone());
    let setup = Setup { decoder: beginner().clone(), stage, seed: 3, precision: Precision::F32, evaluate: false };
    let lines = setup.lines_of(Box::new(Unlearning::new(options, examples(), examples()).unwrap()));
    let of = |name: &str| lines.iter().map(|line| line[name].as_f64().unwrap()).collect::<Vec<f64>>();
    let (forget, retain) = (of("forget/log_prob"), of("retain/log_prob"));
    assert!(forget.iter().zip(&retain).all(|(forget, retain)| (forget - retain).abs() > 1e-6), "{forget:?} {retain:?}");
    // Both have seen every row once.
    assert!((forget.iter().sum::<f64>() - retain.iter().sum::<f64>()).abs() < 1e-3, "{forget:?} {retain:?}");
}

/// Variants whose runs must keep the promises: every method, and the options that take other ways through the code.
fn variants() -> Vec<(String, Stage)> {
    let mut variants: Vec<(String, Stage)> = all().into_iter().map(|(name, stage)| (name.to_owned(), stage)).collect();
    let Stage::Distillation(gkd) = named("gkd") else { panic!("another family") };
    for mixing in ["losses", "probabilities", "logits"] {
        let mut options = gkd.clone();
        options.objective.mixing = serde_json::from_value(mixing.into()).unwrap();
        options.objective.nll_weight = 0.5;
        let weight = if mixing == "logits" { -0.5 } else { 0.5 };
        options.teachers.push(TeacherOptions { model: "other".into(), weight });
        variants.push((format!("two teachers, {mixing}"), Stage::Distillation(options)));
    }
    let Stage::Unlearning(mut kl) = named("npo") else { panic!("another family") };
    kl.objective.retain = serde_json::from_value("kl".into()).unwrap();
    variants.push(("npo with kl".into(), Stage::Unlearning(kl)));
    let Stage::Rejection(star) = named("star") else { panic!("another family") };
    let star = RejectionOptions { rationalization_hint: Some("{answer}".into()), ..star };
    variants.push(("star with hints".into(), Stage::Rejection(star)));
    variants
}

fn short(mut stage: Stage, lora: bool, precision: Precision) -> Setup {
    let training = stage.training();
    *training = TrainingOptions { micro_batch_tokens: 40, weight_decay: 0.01, ..training_of(4) };
    let mut decoder = beginner().clone();
    if lora {
        decoder.attach_lora(&LoraConfig { r: 4, alpha: 8.0, ..Default::default() }, 2).unwrap();
    }
    Setup { decoder, stage, seed: 9, precision, evaluate: false }
}

fn training_of(steps: u64) -> TrainingOptions {
    training(steps, 2e-3)
}

#[test]
fn cuts_and_threads_do_not_matter() {
    for (name, stage) in variants() {
        for (lora, precision) in [(false, Precision::F32), (true, Precision::Bf16)] {
            let folder = tempfile::tempdir().unwrap();
            let whole = folder.path().join("whole");
            let setup = short(stage.clone(), lora, precision);
            on_threads(2, || setup.finish(&whole));
            for (micro_batch_tokens, threads) in [(1, 1), (100_000, 2)] {
                let mut cut = setup.clone();
                cut.stage.training().micro_batch_tokens = micro_batch_tokens;
                let other = folder.path().join(format!("cut-{micro_batch_tokens}"));
                on_threads(threads, || cut.finish(&other));
                assert_same(&whole, &other, &format!("{name}, adapter {lora}, {micro_batch_tokens} tokens"));
            }
        }
    }
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    for (name, stage) in variants() {
        let setup = short(stage, false, Precision::Bf16);
        let folder = tempfile::tempdir().unwrap();
        let whole = folder.path().join("whole");
        setup.finish(&whole);
        let stopped = folder.path().join("stopped");
        for step in 1..=3 {
            let stop = AtomicBool::new(false);
            let outcome = setup.run(&stopped, step > 1, &mut StopAt(step, &stop), &stop).unwrap();
            assert_eq!(outcome, Outcome::Interrupted { step }, "{name}");
        }
        let outcome = setup.run(&stopped, true, &mut (), &AtomicBool::new(false)).unwrap();
        assert!(matches!(outcome, Outcome::Finished(_)), "{name}");
        assert_same(&whole, &stopped, &format!("{name}, stopped after every step"));
    }
}

#[test]
fn a_student_that_is_its_teacher_learns_nothing() {
    let mut stage = named("distillation");
    *stage.training() = training(3, 1e-3);
    let setup = Setup { decoder: teacher().clone(), stage, seed: 4, precision: Precision::F32, evaluate: false };
    let (divergence, ..) = setup.learn("divergence");
    let (norms, ..) = setup.learn("grad_norm");
    assert!(divergence[0].abs() < 1e-12 && norms[0] < 1e-6, "{divergence:?}, {norms:?}");
    let (agreement, ..) = setup.learn("teacher_agreement");
    assert_eq!(agreement[0], 1.0);
}

#[test]
fn misuse_is_one_clear_error() {
    let lessons = || Lessons { prompts: prompts(), examples: examples(), reward: None };
    let refused =
        |options: DistillationOptions, teachers: Vec<Decoder>| match Distillation::new(options, teachers, lessons()) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("accepted"),
        };
    let Stage::Distillation(good) = named("gkd") else { panic!("another family") };
    let error = refused(DistillationOptions { teachers: Vec::new(), ..good.clone() }, Vec::new());
    assert!(error.contains("distillation.teachers"), "{error}");
    assert!(refused(good.clone(), Vec::new()).contains("teachers"));
    let Stage::Distillation(mut alone) = named("aligndistil") else { panic!("another family") };
    alone.teachers.truncate(1);
    let error = refused(alone, vec![teacher().clone()]);
    assert!(error.contains("teachers: expected 2, towards the first and away from the second"), "{error}");
    let mut sampled = good.clone();
    sampled.objective.estimate = objectives::distillation::Estimate::Sampled;
    sampled.objective.divergence = objectives::distillation::Divergence::ReverseKl;
    let error = refused(sampled, vec![teacher().clone()]);
    assert!(error.contains("objective.estimate"), "{error}");

    // A teacher with other tokens.
    let other = Decoder::random(ModelConfig::tiny(Family::Llama, 300), 1).unwrap();
    let method = Distillation::new(good, vec![other], lessons()).unwrap();
    let tokenizer = tokenizer();
    let folder = tempfile::tempdir().unwrap();
    let run = Run {
        directory: &folder.path().join("run"),
        options: RunOptions::default(),
        seed: 1,
        precision: Precision::F32,
        decoder: random(1),
        tokenizer: &tokenizer,
        world: None,
        referee: Default::default(),
        chat_template: None,
        stages: vec![Box::new(method)],
        evaluator: None,
        observer: &mut (),
        interrupt: &AtomicBool::new(false),
        provenance: Provenance::default(),
    };
    let error = run.start().unwrap_err().to_string();
    assert_eq!(error, "teacher teacher has a vocabulary of 300 tokens, the student one of 259");

    // Only tokens of data have a likelihood to raise: without a row that comes with one, its weight would not be read.
    let Stage::Distillation(mut options) = named("gkd") else { panic!("another family") };
    options.objective.nll_weight = 0.5;
    options.validate().unwrap();
    options.on_policy_fraction = 1.0;
    let error = options.validate().unwrap_err().to_string();
    let expected = "0, as the student samples for every row (on_policy_fraction)";
    assert_eq!(error, format!("objective.nll_weight: expected {expected}, got 0.5"));

    let options = UnlearningOptions { objective: Default::default(), ..UnlearningOptions::default() };
    assert_eq!(options.objective.forget, Forget::Npo);
    let Err(error) = Unlearning::new(options, examples(), Vec::new()) else { panic!("accepted") };
    assert!(error.to_string().contains("unlearning.objective.retain_weight"), "{error}");
}
