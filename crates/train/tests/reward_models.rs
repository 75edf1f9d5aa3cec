//! Reward models learn, from pairs, labels and steps; their runs keep the promises of all runs; and they judge as they were trained.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use base::{Purpose, Random};
use data::{Example, PreferencePair, ScoredExample, Source, StepwiseExample};
use envs::{Answer, ModelRewardOptions, Reward};
use kernels::Precision;
use model::ModelConfig;
use model::config::{Family, HeadTask, ScoreHead};
use model::decoder::{Decoder, Workspace};
use model::lora::LoraConfig;
use objectives::{Ball, Ensemble, GroupDro, Members, Odin, StepAggregation, WorstCase};
use posttrain_train as train;
use train::judges::{Judge, ModelReward};
use train::methods::process_reward::{ProcessReward, ProcessRewardOptions, StepLoss};
use train::methods::reward_model::{RewardLoss, RewardModel, RewardModelOptions, RewardRows};
use train::options::{RunOptions, TrainingOptions};
use train::scoring::{Batch, Scored, Unit};
use train::verdicts::{Held, Verdicts};
use train::{Evaluator, Fit, Method, Observer, Outcome, Provenance, Run};

use crate::common::{StopAt, assert_same, metrics, on_threads, seeds, tokenizer};

/// All problems: prompt `ab>`, the larger digit, and a digit that is not.
fn problems() -> impl Iterator<Item = (String, u32, u32)> {
    let random = Random::new(3, Purpose::Test);
    (0..100u32).map(move |id| {
        let (a, b) = (id / 10, id % 10);
        let wrong = (a.max(b) + 1 + random.at(id).below(9) as u32) % 10;
        (format!("{a}{b}>"), a.max(b), wrong)
    })
}

fn example(prompt: &str, answer: u32) -> Example {
    let tokenizer = tokenizer();
    let mut ids = tokenizer.encode(&format!("{prompt}{answer}")).unwrap();
    ids.push(tokenizer.eos().unwrap());
    let loss_mask = (0..ids.len()).map(|index| index >= prompt.len()).collect();
    Example { ids, loss_mask, source: Source::new("problems", 1) }
}

fn pairs() -> RewardRows {
    let pair = |(prompt, right, wrong): (String, u32, u32)| PreferencePair {
        others: Vec::new(),
        reference: None,
        chosen: example(&prompt, right),
        rejected: example(&prompt, wrong),
        margin: 0.0,
        // Two groups, one of them a quarter of the rows.
        group: Some((right % 4 == 0).to_string()),
    };
    RewardRows::Pairs(problems().map(pair).collect())
}

fn scored() -> RewardRows {
    let both = |(prompt, right, wrong): (String, u32, u32)| {
        [(right, 1.0), (wrong, 0.0)].map(|(digit, score)| ScoredExample { example: example(&prompt, digit), score })
    };
    RewardRows::Scored(problems().flat_map(both).collect())
}

/// Two digits as steps, each right or wrong, each on a line.
fn solutions() -> Vec<StepwiseExample> {
    let random = Random::new(4, Purpose::Test);
    let solution = |(id, (prompt, right, wrong)): (u32, (String, u32, u32))| {
        let mut ids = tokenizer().encode(&prompt).unwrap();
        let mut steps = Vec::new();
        for step in 0..2 {
            let good = random.prompt(id).at(step).below(2) == 1;
            ids.extend(tokenizer().encode(&format!("{}\n", if good { right } else { wrong })).unwrap());
            steps.push((ids.len() - 1, f64::from(u8::from(good))));
        }
        StepwiseExample { ids, steps, source: Source::new("problems", 1) }
    };
    (0..).zip(problems()).map(solution).collect()
}

/// What a run varies.
#[derive(Clone)]
struct Setup {
    head: ScoreHead,
    lora: bool,
    precision: Precision,
    seed: u64,
    loss: Loss,
    worst_case: Option<WorstCase>,
    group_dro: Option<GroupDro>,
    odin: Option<Odin>,
    training: TrainingOptions,
}

#[derive(Clone, Copy)]
enum Loss {
    Whole(RewardLoss),
    Steps(StepLoss),
}

impl Setup {
    fn new(loss: Loss) -> Self {
        let head = match loss {
            Loss::Whole(_) => ScoreHead::REWARD,
            Loss::Steps(loss) => ScoreHead { outputs: loss.outputs(), task: HeadTask::Token },
        };
        let training =
            TrainingOptions { max_steps: Some(5), learning_rate: 3e-3, micro_batch_tokens: 40, ..Default::default() };
        let (worst_case, group_dro, odin) = (None, None, None);
        Self { head, lora: false, precision: Precision::F32, seed: 7, loss, worst_case, group_dro, odin, training }
    }

    fn all() -> Vec<Self> {
        let wholes = [RewardLoss::BradleyTerry, RewardLoss::Bce, RewardLoss::Mse].map(Loss::Whole);
        let steps = [StepLoss::CrossEntropy, StepLoss::Bce].map(Loss::Steps);
        let worst = |over| Self {
            worst_case: Some(WorstCase { over, ..WorstCase::new(Ball::TotalVariation, 0.3) }),
            ..Self::new(Loss::Whole(RewardLoss::BradleyTerry))
        };
        let robust = [Members::Pairs, Members::Prompts].map(worst);
        let grouped =
            Self { group_dro: Some(GroupDro { step_size: 0.5 }), ..Self::new(Loss::Whole(RewardLoss::BradleyTerry)) };
        let odin = Self { group_dro: Some(GroupDro { step_size: 0.5 }), ..Self::odin() };
        wholes.into_iter().chain(steps).map(Self::new).chain(robust).chain([grouped, odin]).collect()
    }

    fn odin() -> Self {
        Self {
            head: ScoreHead { outputs: 2, ..ScoreHead::REWARD },
            odin: Some(Odin::default()),
            ..Self::new(Loss::Whole(RewardLoss::BradleyTerry))
        }
    }

    fn decoder(&self) -> Decoder {
        let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), self.seed).unwrap();
        decoder.add_score(self.head, if self.odin.is_some() { 0.02 } else { 0.0 }, 0).unwrap();
        if self.lora {
            decoder.attach_lora(&LoraConfig { r: 4, alpha: 8.0, ..Default::default() }, 2).unwrap();
        }
        decoder
    }

    fn method(&self) -> Box<dyn Method> {
        let training = self.training.clone();
        match self.loss {
            Loss::Whole(loss_type) => {
                let rows = if loss_type == RewardLoss::BradleyTerry { pairs() } else { scored() };
                let center_rewards_coefficient = if loss_type == RewardLoss::BradleyTerry { 0.01 } else { 0.0 };
                let options = RewardModelOptions {
                    loss_type,
                    center_rewards_coefficient,
                    worst_case: self.worst_case,
                    group_dro: self.group_dro,
                    odin: self.odin,
                    batch_size: 16,
                    training,
                    ..Default::default()
                };
                Box::new(RewardModel::new(options, rows).unwrap())
            }
            Loss::Steps(loss_type) => {
                let options = ProcessRewardOptions { loss_type, batch_size: 16, training, ..Default::default() };
                Box::new(ProcessReward::new(options, solutions()).unwrap())
            }
        }
    }

    fn run(&self, folder: &Path, resume: bool, observer: &mut dyn Observer, interrupt: &AtomicBool) -> Outcome {
        let tokenizer = tokenizer();
        let run = Run {
            directory: folder,
            options: RunOptions { save_steps: 2, eval_steps: 0, ..Default::default() },
            seed: self.seed,
            precision: self.precision,
            decoder: self.decoder(),
            tokenizer: &tokenizer,
            chat_template: None,
            stages: vec![self.method()],
            evaluator: None,
            referee: Default::default(),
            world: None,
            observer,
            interrupt,
            provenance: Provenance {
                program: "posttrain test".into(),
                base_model: "tiny".into(),
                ..Default::default()
            },
        };
        if resume { run.resume() } else { run.start() }.unwrap()
    }

    fn finish(&self, folder: &Path) {
        assert!(matches!(self.run(folder, false, &mut (), &AtomicBool::new(false)), Outcome::Finished(_)));
    }
}

/// The trained model, as it was saved.
fn saved(folder: &Path) -> Decoder {
    let config = std::fs::read(folder.join("final/config.json")).unwrap();
    let tensors = model::weights::safetensors::read(&folder.join("final")).unwrap();
    let mut decoder = Decoder::new(ModelConfig::from_json_bytes(&config).unwrap(), tensors).unwrap();
    decoder.prepare(Precision::F32);
    decoder
}

fn column(folder: &Path, name: &str) -> Vec<f64> {
    metrics(folder).iter().filter_map(|line| line.get(name)?.as_f64()).collect()
}

/// On three seeds, from pairs: the loss starts at log 2, and at the end nearly every pair of the data is in order.
#[test]
fn pairs_teach() {
    for seed in [1, 2, 3] {
        let training = TrainingOptions { max_steps: Some(150), learning_rate: 3e-3, ..Default::default() };
        let setup = Setup { seed, training, ..Setup::new(Loss::Whole(RewardLoss::BradleyTerry)) };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        setup.finish(&path);
        let losses = column(&path, "loss");
        assert!((losses[0] - std::f64::consts::LN_2).abs() < 1e-6, "a head of zeros: {}", losses[0]);
        for name in ["accuracy", "margin", "mean_reward", "min_reward", "max_reward", "grad_norm"] {
            assert_eq!(column(&path, name).len(), 150, "{name}");
        }
        let rows = pairs();
        let all: Vec<usize> = (0..rows.len()).collect();
        let scores = Batch::new(rows.units(&all)).scores(&saved(&path), &mut Workspace::new(), 500).unwrap();
        let right = scores.chunks(2).filter(|pair| pair[0] > pair[1]).count();
        println!("seed {seed}: {right} of 100 pairs in order, last loss {}", losses[149]);
        assert!(right >= 90, "seed {seed}: {right} of 100 pairs in order, chance is 50");
    }
}

/// From labels of answers and of steps: verdicts become right.
#[test]
fn labels_of_answers_and_steps_teach() {
    let losses = [Loss::Whole(RewardLoss::Bce), Loss::Steps(StepLoss::CrossEntropy)];
    for (place, loss) in losses.into_iter().enumerate() {
        for seed in seeds(place) {
            let training = TrainingOptions { max_steps: Some(250), learning_rate: 3e-3, ..Default::default() };
            let setup = Setup { seed, training, ..Setup::new(loss) };
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("run");
            setup.finish(&path);
            let accuracy = column(&path, "accuracy");
            let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
            let (first, last) = (mean(&accuracy[..10]), mean(&accuracy[230..]));
            println!("seed {seed}: accuracy {first} at first, {last} at last");
            assert!(last > 0.75 && last > first + 0.2, "seed {seed}: {first} to {last}");
        }
    }
}

#[test]
fn cuts_and_threads_do_not_matter() {
    for setup in Setup::all() {
        for (precision, lora) in [(Precision::F32, false), (Precision::Bf16, true)] {
            let folder = tempfile::tempdir().unwrap();
            let whole = Setup { precision, lora, ..setup.clone() };
            on_threads(2, || whole.finish(&folder.path().join("whole")));
            for (micro_batch_tokens, threads) in [(1, 1), (100_000, 3)] {
                let training = TrainingOptions { micro_batch_tokens, ..whole.training.clone() };
                let cut = Setup { training, ..whole.clone() };
                on_threads(threads, || cut.finish(&folder.path().join("cut")));
                assert_same(
                    &folder.path().join("whole"),
                    &folder.path().join("cut"),
                    &format!("{micro_batch_tokens} tokens"),
                );
                std::fs::remove_dir_all(folder.path().join("cut")).unwrap();
            }
        }
    }
}

/// Without extent the worst case is the mean, to the last bit; with it, something else is learnt.
#[test]
fn a_worst_case_without_extent_changes_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, radius: Option<f64>| {
        let worst_case = radius.map(|radius| WorstCase::new(Ball::TotalVariation, radius));
        let path = folder.path().join(name);
        Setup { worst_case, ..Setup::new(Loss::Whole(RewardLoss::BradleyTerry)) }.finish(&path);
        (std::fs::read(path.join("final/model.safetensors")).unwrap(), column(&path, "loss"))
    };
    let (mean, none, wide) = (run("mean", None), run("none", Some(0.0)), run("wide", Some(0.5)));
    assert!(mean == none && mean.0 != wide.0);
    let weights = column(&folder.path().join("wide"), "row_weights/max");
    assert!(weights.iter().skip(1).all(|weight| *weight > 2.0), "{weights:?}");
}

/// The group that is learnt worse counts more, and more of it is learnt than from the mean.
#[test]
fn weights_of_groups_follow_their_losses() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, step_size: f64| {
        let path = folder.path().join(name);
        let training =
            TrainingOptions { max_steps: Some(40), ..Setup::new(Loss::Whole(RewardLoss::BradleyTerry)).training };
        let group_dro = Some(GroupDro { step_size });
        Setup { group_dro, training, ..Setup::new(Loss::Whole(RewardLoss::BradleyTerry)) }.finish(&path);
        column(&path, "group_weights/max")
    };
    let (even, moved) = (run("even", 0.0), run("moved", 1.0));
    assert!(even.iter().all(|weight| *weight == 0.5), "{even:?}");
    // All losses are log 2 before the first step: nothing is worse yet.
    assert!((moved[0] - 0.5).abs() < 1e-6 && moved[39] > 0.55, "{moved:?}");
}

/// A completion of a digit and some marks, which say nothing.
fn padded(prompt: &str, answer: u32, marks: usize) -> Example {
    let mut padded = example(prompt, answer);
    let end = padded.ids.len() - 1;
    let mark = tokenizer().encode(".").unwrap();
    padded.ids.splice(end..end, mark.repeat(marks));
    padded.loss_mask.resize(padded.ids.len(), true);
    padded
}

/// Pairs of answers of a digit and up to 7 marks, of which the larger digit is the better. In those to learn from one pair of five is the wrong way round,
/// and the longer completion is chosen in 9 of 10; in the others all are in order, and length says nothing.
fn of_lengths(held_out: bool) -> Vec<PreferencePair> {
    let random = Random::new(6, Purpose::Test).step(u32::from(held_out));
    let pair = |id: u32| {
        let random = random.prompt(id);
        let better = 1 + random.at(0).below(9) as u32;
        let mut digits = [better, random.at(1).below(u64::from(better)) as u32];
        let mut marks = [2, 3].map(|place| random.at(place).below(8) as usize);
        if !held_out && random.at(4).uniform() < 0.2 {
            digits.reverse();
        }
        if !held_out && marks[0] < marks[1] && random.at(5).uniform() < 0.8 {
            marks.reverse();
        }
        PreferencePair::new(padded(">", digits[0], marks[0]), padded(">", digits[1], marks[1]))
    };
    (0..400).map(pair).collect()
}

/// Where the longer completion is preferred for no good reason, the head that ODIN keeps goes less with length than a plain reward model does, on every
/// seed, and in the mean over three seeds it is more often right where length says nothing.
#[test]
fn odin_keeps_a_quality_that_does_not_go_with_length() {
    let held_out = RewardRows::Pairs(of_lengths(true));
    let all: Vec<usize> = (0..held_out.len()).collect();
    let RewardRows::Pairs(pairs) = &held_out else { unreachable!("pairs are pairs") };
    let completions = pairs.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]);
    let lengths: Vec<f64> = completions.map(|example| example.ids.len() as f64).collect();
    // Correlation with length, and accuracy.
    let measured = |seed, odin: Option<Odin>| {
        let training = TrainingOptions { max_steps: Some(300), learning_rate: 1e-3, ..Default::default() };
        let options = RewardModelOptions { odin, batch_size: 32, training, ..Default::default() };
        let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), seed).unwrap();
        let (head, deviation) = options.score_head();
        decoder.add_score(head, deviation, seed).unwrap();
        let mut method = RewardModel::new(options, RewardRows::Pairs(of_lengths(false))).unwrap();
        let tokenizer = tokenizer();
        let fit = Fit { decoder: &mut decoder, tokenizer: &tokenizer, seed, stage: 0, precision: Precision::F32 };
        train::fit::<train::Error>(&mut method, fit, |_, _, _| Ok(())).unwrap();
        assert_eq!(decoder.config().score, Some(ScoreHead::REWARD), "one head is left");
        decoder.prepare(Precision::F32);
        let scores = Batch::new(held_out.units(&all)).scores(&decoder, &mut Workspace::new(), 500).unwrap();
        let scores: Vec<f64> = scores.into_iter().map(f64::from).collect();
        let right = scores.chunks(2).filter(|pair| pair[0] > pair[1]).count();
        (correlation(&scores, &lengths).abs(), right as f64 / all.len() as f64)
    };
    let mut lead = 0.0;
    for seed in [1, 2, 3] {
        let (plain, odin) = (measured(seed, None), measured(seed, Some(Odin::default())));
        println!("seed {seed}: correlation and accuracy {plain:?} plain, {odin:?} with ODIN");
        assert!(odin.0 < plain.0 / 2.0, "seed {seed}: correlations {} plain, {} with ODIN", plain.0, odin.0);
        lead += (odin.1 - plain.1) / 3.0;
    }
    assert!(lead > 0.0, "accuracy with ODIN leads by {lead}");
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let product =
        |x: &[f64], of_x: f64, y: &[f64], of_y: f64| x.iter().zip(y).map(|(x, y)| (x - of_x) * (y - of_y)).sum::<f64>();
    product(a, mean_a, b, mean_b) / (product(a, mean_a, a, mean_a) * product(b, mean_b, b, mean_b)).sqrt()
}

/// A checkpoint holds both heads, the result the first of them; evaluations between are of this one.
#[test]
fn odin_ends_with_the_first_of_its_heads() {
    for lora in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let setup = Setup { lora, ..Setup::odin() };
        let stop = AtomicBool::new(false);
        assert_eq!(setup.run(&path, false, &mut StopAt(4, &stop), &stop), Outcome::Interrupted { step: 4 });
        let file = if lora { "adapter_model.safetensors" } else { "model.safetensors" };
        let head = |folder: &str| {
            let tensors = model::weights::safetensors::read(&path.join(folder).join(file)).unwrap();
            let (_, head) = tensors.into_iter().find(|(name, _)| name.ends_with("score.weight")).unwrap();
            head.shape
        };
        assert_eq!(head("checkpoint-4")[0], 2);
        setup.run(&path, true, &mut (), &AtomicBool::new(false));
        assert_eq!(head("final")[0], 1);
        for name in ["length_correlation/quality", "length_correlation/length", "heads_cosine", "quality_accuracy"] {
            assert_eq!(column(&path, name).len(), 5, "{name}");
        }
    }
}

/// All completions are of one length, and the heads are zeros: the first step is that of the comparisons alone, for both heads the same.
#[test]
fn odin_begins_where_nothing_varies() {
    let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), 1).unwrap();
    decoder.add_score(ScoreHead { outputs: 2, ..ScoreHead::REWARD }, 0.0, 0).unwrap();
    let options = RewardModelOptions {
        odin: Some(Odin::default()),
        training: TrainingOptions { max_steps: Some(3), ..Default::default() },
        ..Default::default()
    };
    let mut method = RewardModel::new(options, pairs()).unwrap();
    let tokenizer = tokenizer();
    let fit = Fit { decoder: &mut decoder, tokenizer: &tokenizer, seed: 1, stage: 0, precision: Precision::F32 };
    let mut losses = Vec::new();
    train::fit::<train::Error>(&mut method, fit, |_, _, metrics| {
        losses.push(metrics.get("loss").unwrap());
        Ok(())
    })
    .unwrap();
    assert!(
        (losses[0] - std::f64::consts::LN_2).abs() < 1e-6 && losses.iter().all(|loss| loss.is_finite()),
        "{losses:?}"
    );
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    for (setup, lora) in Setup::all().into_iter().zip([true, false].into_iter().cycle()) {
        let setup = Setup { lora, ..setup };
        let folder = tempfile::tempdir().unwrap();
        let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
        setup.finish(&whole);
        for step in 1..=4 {
            let stop = AtomicBool::new(false);
            assert_eq!(setup.run(&stopped, step > 1, &mut StopAt(step, &stop), &stop), Outcome::Interrupted { step });
        }
        setup.run(&stopped, true, &mut (), &AtomicBool::new(false));
        assert_same(&whole, &stopped, "stopped after every step");
    }
}

#[test]
fn rows_that_do_not_fit_the_loss_are_refused() {
    let message = |loss_type, rows| {
        let result = RewardModel::new(RewardModelOptions { loss_type, ..Default::default() }, rows);
        result.err().unwrap().to_string()
    };
    assert!(message(RewardLoss::BradleyTerry, scored()).contains("bce or mse, for rows with scores"));
    assert!(message(RewardLoss::Mse, pairs()).contains("bradley_terry, for pairs"));
    let RewardRows::Pairs(mut rows) = pairs() else { unreachable!("pairs are pairs") };
    rows[3].group = None;
    let grouped = RewardModelOptions { group_dro: Some(GroupDro::default()), ..Default::default() };
    let error = RewardModel::new(grouped.clone(), RewardRows::Pairs(rows)).err().unwrap().to_string();
    assert!(error.contains("reward_model.group_dro") && error.contains("has no column group"), "{error}");
    let both = RewardModelOptions { worst_case: Some(WorstCase::new(Ball::TotalVariation, 0.1)), ..grouped };
    assert!(both.validate().unwrap_err().to_string().contains("off with worst_case"));
    let centred =
        RewardModelOptions { center_rewards_coefficient: 0.1, loss_type: RewardLoss::Bce, ..Default::default() };
    assert!(centred.validate().unwrap_err().to_string().contains("center_rewards_coefficient"));
    let odin = RewardModelOptions { odin: Some(Odin::default()), loss_type: RewardLoss::Mse, ..Default::default() };
    assert!(
        odin.validate()
            .unwrap_err()
            .to_string()
            .contains("odin: expected off, unless loss_type is bradley_terry, got on")
    );
    let odin = Odin { length_coefficient: -1.0, ..Odin::default() };
    let odin = RewardModelOptions { odin: Some(odin), ..Default::default() };
    assert!(odin.validate().unwrap_err().to_string().contains("odin: length_coefficient is -1"));
    let mut soft = solutions();
    soft[3].steps[0].1 = 0.5;
    let refused = ProcessReward::new(ProcessRewardOptions::default(), soft.clone()).err().unwrap().to_string();
    assert!(refused.contains("bce, for a label of 0.5"), "{refused}");
    assert!(ProcessReward::new(ProcessRewardOptions { loss_type: StepLoss::Bce, ..Default::default() }, soft).is_ok());
}

/// A judge with a head of random weights.
fn judge(head: ScoreHead, seed: u64) -> Judge {
    let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), seed).unwrap();
    decoder.add_score(head, 1.0, seed).unwrap();
    decoder.prepare(Precision::F32);
    Judge { name: format!("judge {seed}"), decoder, tokenizer: tokenizer(), template: None }
}

#[test]
fn a_reward_model_judges_as_it_was_trained_whatever_the_order() {
    let prompts = ["34>", "34>", "71>", "05>"];
    let columns: Vec<envs::Columns> =
        prompts.iter().map(|prompt| [("prompt".to_owned(), (*prompt).into())].into_iter().collect()).collect();
    let texts = ["4", "3", "7", "9"];
    let answer = |index: usize| Answer {
        prompt_text: prompts[index],
        completion: texts[index],
        completion_ids: &[],
        columns: &columns[index],
    };
    let values = |reward: &ModelReward, order: &[usize]| -> Vec<f64> {
        let answers: Vec<Answer<'_>> = order.iter().map(|&index| answer(index)).collect();
        reward.score(&answers).unwrap().into_iter().map(|score| score.unwrap().value).collect()
    };
    let options = ModelRewardOptions { models: vec!["one".into()], ..Default::default() };
    let reward = ModelReward::new("rm", &options, vec![judge(ScoreHead::REWARD, 1)]).unwrap();
    let found = values(&reward, &[0, 1, 2, 3]);
    for (index, value) in found.iter().enumerate() {
        let ids = example(prompts[index], texts[index].parse().unwrap()).ids;
        let batch = Batch::new(vec![Unit::new(vec![Scored::whole(&ids)])]);
        let alone = batch.scores(&judge(ScoreHead::REWARD, 1).decoder, &mut Workspace::new(), 10).unwrap();
        assert_eq!(*value, f64::from(alone[0]), "as training scores it");
    }
    assert_eq!(values(&reward, &[3, 1, 0, 2]), [3, 1, 0, 2].map(|index| found[index]));
    assert_eq!(reward.score(&[]).unwrap(), []);

    // An ensemble, and probabilities.
    let joint = |ensemble, as_probability| {
        let options = ModelRewardOptions { ensemble, as_probability, uncertainty_penalty: 0.5, ..options.clone() };
        let judges = vec![judge(ScoreHead::REWARD, 1), judge(ScoreHead::REWARD, 2)];
        let reward = ModelReward::new("rm", &options, judges).unwrap();
        let score = reward.score(&[answer(0)]).unwrap().remove(0).unwrap();
        assert_eq!(score.parts.len(), 2);
        (score.value, [score.parts[0].1, score.parts[1].1])
    };
    let (mean, [a, b]) = joint(Ensemble::Mean, false);
    assert_eq!((a, mean), (found[0], (a + b) / 2.0));
    assert_ne!(a, b);
    assert_eq!(joint(Ensemble::Min, false).0, a.min(b));
    let variance = (a - b).powi(2) / 4.0;
    assert!((joint(Ensemble::UncertaintyPenalized, false).0 - (mean - 0.5 * variance)).abs() < 1e-12);
    assert!((joint(Ensemble::Mean, true).1[0] - 1.0 / (1.0 + (-a).exp())).abs() < 1e-15);
}

#[test]
fn a_process_reward_model_judges_every_step() {
    let columns: envs::Columns = [("prompt".to_owned(), "34>".into())].into_iter().collect();
    for outputs in [1, 2] {
        let head = ScoreHead { outputs, task: HeadTask::Token };
        let value = |completion: &str, step_aggregation| {
            let options = ModelRewardOptions { models: vec!["one".into()], step_aggregation, ..Default::default() };
            let reward = ModelReward::new("prm", &options, vec![judge(head, 5)]).unwrap();
            let answer = Answer { prompt_text: "34>", completion, completion_ids: &[], columns: &columns };
            reward.score(&[answer]).unwrap().remove(0).unwrap().value
        };
        let first = value("1", StepAggregation::Last);
        let second = value("1\n2\n", StepAggregation::Last);
        assert!((0.0..1.0).contains(&first) && first != second);
        assert_eq!(value("1\n2", StepAggregation::Last), second, "a separator at the end makes no step");
        assert_eq!(value("1\n2", StepAggregation::Min), first.min(second));
        assert!((value("1\n2", StepAggregation::Product) - first * second).abs() < 1e-15);
        assert!((value("1\n\n2", StepAggregation::Mean) - (first + second) / 2.0).abs() < 1e-15);
        assert!((0.0..1.0).contains(&value("", StepAggregation::Min)), "an empty answer has a value");
    }
}

#[test]
fn what_cannot_judge_is_refused() {
    let options = ModelRewardOptions { models: vec!["one".into()], ..Default::default() };
    let message =
        |options: &ModelRewardOptions, judges| ModelReward::new("rm", options, judges).err().unwrap().to_string();
    let mut plain = judge(ScoreHead::REWARD, 1);
    plain.decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), 1).unwrap();
    assert!(message(&options, vec![plain]).contains("no score head"));
    let wide = judge(ScoreHead { outputs: 3, task: HeadTask::Sequence }, 1);
    assert!(message(&options, vec![wide]).contains("3 outputs"));
    assert!(message(&ModelRewardOptions::default(), Vec::new()).contains("models is empty"));
    let reward = ModelReward::new("rm", &options, vec![judge(ScoreHead::REWARD, 1)]).unwrap();
    let columns: envs::Columns = [("prompt".to_owned(), "x".repeat(600).into())].into_iter().collect();
    let answer = Answer { prompt_text: "x", completion: "1", completion_ids: &[], columns: &columns };
    let error = reward.score(&[answer]).unwrap_err().to_string();
    assert!(error.contains("judge 1") && error.contains("tokens, expected at most 512"), "{error}");
}

#[test]
fn verdicts_on_held_out_rows() {
    let tokenizer = tokenizer();
    let measure = |held: Held, decoder: &Decoder| {
        let mut verdicts = Verdicts { held, tokenizer: &tokenizer, micro_batch_tokens: 64, seed: 0 };
        verdicts.evaluate(decoder, &mut |_, _| ()).ok().unwrap()
    };
    let pairs_held = || Held::Whole(pairs(), RewardLoss::BradleyTerry);
    // A head of zeros knows nothing: every pair is a tie.
    let mut zero = Setup::new(Loss::Whole(RewardLoss::BradleyTerry)).decoder();
    zero.prepare(Precision::F32);
    let found = measure(pairs_held(), &zero);
    assert_eq!((found.measures[0].value, found.measures[1].value, found.solved.len()), (0.5, 0.0, 0));
    let judge = judge(ScoreHead::REWARD, 1).decoder;
    let found = measure(pairs_held(), &judge);
    let right = found.solved.iter().filter(|right| **right).count();
    assert_eq!((found.measures[0].name.as_str(), found.measures[0].value), ("accuracy", right as f64 / 100.0));
    assert!(found.measures[0].low < found.measures[0].value && found.measures[0].value < found.measures[0].high);
    assert_eq!(found.samples.len(), 100);
    assert_eq!(found.samples[12]["question"], "12>");
    assert!(found.samples[12]["completion"].as_str().unwrap().contains("  2\n"), "{}", found.samples[12]);

    let scores = measure(Held::Whole(scored(), RewardLoss::Bce), &judge);
    assert_eq!((scores.measures[0].items, scores.solved.len()), (200, 200));
    let errors = measure(Held::Whole(scored(), RewardLoss::Mse), &judge);
    assert_eq!((errors.measures[0].name.as_str(), errors.solved.len()), ("mse", 0));
    for outputs in [1, 2] {
        let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), 5).unwrap();
        decoder.add_score(ScoreHead { outputs, task: HeadTask::Token }, 1.0, 5).unwrap();
        decoder.prepare(Precision::F32);
        let steps = measure(Held::Steps(solutions()), &decoder);
        assert_eq!((steps.measures[0].items, steps.solved.len()), (100, 100));
        assert!((0.2..0.8).contains(&steps.measures[0].value), "{}", steps.measures[0].value);
    }
}
