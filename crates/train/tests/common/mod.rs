//! A world small enough to train in seconds: given two digits, name the larger one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use base::{Purpose, Random};
use data::{Example, Prompt, Source};
use envs::{Answer, Reward, RewardError, Score, Status};
use kernels::Precision;
use model::ModelConfig;
use model::config::Family;
use model::decoder::Decoder;
use model::lora::LoraConfig;
use model::tokenizer::Tokenizer;
use posttrain_train as train;
use rollout::{Generator, Request, SamplingOptions};
use train::methods::policy::{Policy, PolicyOptions};
use train::methods::sft::{Sft, SftOptions};
use train::options::{RunOptions, TrainingOptions};
use train::{
    Evaluation, EvaluationError, Evaluator, Event, Measure, Method, Observer, Outcome, Provenance, RefereeOptions, Run,
};

/// All problems: prompt `ab>` and the larger digit.
fn problems() -> impl Iterator<Item = (u32, String, String)> {
    (0..100).map(|id| (id, format!("{}{}>", id / 10, id % 10), (id / 10).max(id % 10).to_string()))
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::bytes().unwrap()
}

pub fn examples() -> Vec<Example> {
    let tokenizer = tokenizer();
    problems()
        .map(|(id, prompt, answer)| {
            let mut ids = tokenizer.encode(&prompt).unwrap();
            let learnt = ids.len();
            ids.extend(tokenizer.encode(&answer).unwrap());
            ids.push(tokenizer.eos().unwrap());
            let loss_mask = (0..ids.len()).map(|index| index >= learnt).collect();
            Example { ids, loss_mask, source: Source::new("problems", u64::from(id) + 1) }
        })
        .collect()
}

pub fn prompts() -> Vec<Prompt> {
    let tokenizer = tokenizer();
    problems()
        .map(|(id, text, answer)| Prompt {
            id,
            ids: tokenizer.encode(&text).unwrap().into(),
            text,
            messages: None,
            columns: [("answer".to_owned(), answer.into())].into_iter().collect(),
            source: Source::new("problems", u64::from(id) + 1),
        })
        .collect()
}

/// 1 for the right digit and nothing else.
pub struct Exact;

impl Reward for Exact {
    fn name(&self) -> &str {
        "exact"
    }

    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |answer: &Answer<'_>| {
            let right = answer.columns["answer"] == answer.completion;
            let mut score = Score::verdict(if right { Status::Ok } else { Status::Wrong });
            score.parts.push(("exact".into(), score.value));
            Some(score)
        };
        Ok(answers.iter().map(score).collect())
    }
}

/// The share of a completion's tokens in the lower half of the vocabulary: something a random model can learn from at once.
pub struct Lower;

impl Reward for Lower {
    fn name(&self) -> &str {
        "lower"
    }

    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |answer: &Answer<'_>| {
            let lower = answer.completion_ids.iter().filter(|&&id| id < 128).count();
            Some(Score::new(lower as f64 / answer.completion_ids.len() as f64, Status::Ok))
        };
        Ok(answers.iter().map(score).collect())
    }
}

/// Solves every problem greedily.
pub struct Accuracy;

impl Evaluator for Accuracy {
    fn evaluate(
        &mut self,
        decoder: &Decoder,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Evaluation, EvaluationError> {
        let options = SamplingOptions::greedy(3);
        let prompts = prompts();
        let requests: Vec<Request> =
            prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, 1)).collect();
        let generator = Generator::new(&options, 16, Random::new(0, Purpose::Sampling));
        let episodes = generator
            .generate(decoder, &tokenizer(), &requests, |at| progress(at.finished, at.total))
            .map_err(|error| Box::new(error) as EvaluationError)?;
        let solved: Vec<bool> =
            episodes.iter().zip(&prompts).map(|(e, prompt)| prompt.columns["answer"] == e.text.as_str()).collect();
        let right = solved.iter().filter(|solved| **solved).count();
        let interval = eval::interval::wilson(right, solved.len());
        let samples = episodes.iter().map(|episode| serde_json::json!({ "completion": episode.text })).collect();
        let measures = vec![Measure {
            name: "accuracy".into(),
            value: right as f64 / solved.len() as f64,
            low: interval.low,
            high: interval.high,
            items: solved.len(),
        }];
        Ok(Evaluation { measures, solved, samples, ..Evaluation::default() })
    }
}

/// Asks the run to stop after a step.
pub struct StopAt<'a>(pub u64, pub &'a AtomicBool);

impl Observer for StopAt<'_> {
    fn observe(&mut self, event: Event<'_>) {
        if matches!(event, Event::Step { step, .. } if step == self.0) {
            self.1.store(true, Ordering::Relaxed);
        }
    }
}

/// What a test varies.
#[derive(Clone)]
pub struct Setup {
    pub precision: Precision,
    pub lora: bool,
    pub sft: Option<SftOptions>,
    pub grpo: Option<PolicyOptions>,
    pub reward: fn() -> Box<dyn Reward>,
    pub seed: u64,
    pub value_head: bool,
    pub options: RunOptions,
    pub referee: RefereeOptions,
    pub evaluate: bool,
    pub family: Family,
}

impl Setup {
    /// Three SFT steps, then three GRPO steps with a reference, two passes and two minibatches; a checkpoint every two steps.
    pub fn short() -> Self {
        let training = |steps| TrainingOptions {
            max_steps: Some(steps),
            learning_rate: 3e-3,
            weight_decay: 0.01,
            warmup_steps: 1,
            micro_batch_tokens: 40,
            ..Default::default()
        };
        Self {
            precision: Precision::F32,
            lora: false,
            sft: Some(SftOptions { batch_size: 12, training: training(3), ..SftOptions::default() }),
            grpo: Some(PolicyOptions {
                prompts_per_step: 4,
                num_generations: 4,
                num_iterations: 2,
                num_minibatches: 2,
                objective: objectives::PolicyOptions { beta: 0.1, ..Default::default() },
                sampling: SamplingOptions { max_new_tokens: 4, ..Default::default() },
                training: training(3),
                ..Default::default()
            }),
            reward: || Box::new(Exact),
            seed: 7,
            value_head: false,
            options: RunOptions { save_steps: 2, save_total_limit: 2, eval_steps: 3, ..Default::default() },
            referee: RefereeOptions::default(),
            evaluate: true,
            family: Family::Llama,
        }
    }

    pub fn decoder(&self) -> Decoder {
        let mut decoder = Decoder::random(ModelConfig::tiny(self.family, 259), self.seed - 6).unwrap();
        if self.value_head {
            decoder.add_score(model::config::ScoreHead::VALUE, 0.0, 3).unwrap();
        }
        if self.lora {
            decoder.attach_lora(&LoraConfig { r: 4, alpha: 8.0, ..Default::default() }, 2).unwrap();
        }
        decoder
    }

    /// A reward model of the same vocabulary, whose head is not zero.
    pub fn reward_model(&self) -> Decoder {
        let mut decoder = Decoder::random(ModelConfig::tiny(self.family, 259), 5).unwrap();
        decoder.add_score(model::config::ScoreHead::REWARD, 0.1, 3).unwrap();
        decoder
    }

    pub fn trainings_mut(&mut self) -> impl Iterator<Item = &mut TrainingOptions> {
        let sft = self.sft.as_mut().map(|options| &mut options.training);
        sft.into_iter().chain(self.grpo.as_mut().map(|options| &mut options.training))
    }

    fn stages(&self) -> Vec<Box<dyn Method>> {
        let mut stages: Vec<Box<dyn Method>> = Vec::new();
        if let Some(sft) = &self.sft {
            stages.push(Box::new(Sft::new(sft.clone(), examples()).unwrap()));
        }
        if let Some(grpo) = &self.grpo {
            let policy = Policy::new(grpo.clone(), prompts(), (self.reward)()).unwrap();
            stages.push(Box::new(match grpo.value.init {
                Some(_) => policy.with_value_model(self.reward_model()).unwrap(),
                None => policy,
            }));
        }
        stages
    }

    /// Runs in `folder`: from the start, or on from what is there.
    pub fn run(
        &self,
        folder: &Path,
        resume: bool,
        observer: &mut dyn Observer,
        interrupt: &AtomicBool,
    ) -> train::Result<Outcome> {
        self.run_from(self.decoder(), folder, resume, observer, interrupt)
    }

    pub fn run_from(
        &self,
        decoder: Decoder,
        folder: &Path,
        resume: bool,
        observer: &mut dyn Observer,
        interrupt: &AtomicBool,
    ) -> train::Result<Outcome> {
        let tokenizer = tokenizer();
        let mut accuracy = Accuracy;
        let run = Run {
            directory: folder,
            options: self.options.clone(),
            referee: self.referee.clone(),
            seed: self.seed,
            precision: self.precision,
            decoder,
            tokenizer: &tokenizer,
            world: None,
            chat_template: None,
            stages: self.stages(),
            evaluator: self.evaluate.then_some(&mut accuracy as &mut dyn Evaluator),
            observer,
            interrupt,
            provenance: Provenance {
                program: "posttrain test".into(),
                command: "posttrain train test.toml".into(),
                config: "seed = 7\n".into(),
                base_model: "tiny".into(),
                ..Default::default()
            },
        };
        if resume { run.resume() } else { run.start() }
    }

    /// Runs to the end, unwatched.
    pub fn finish(&self, folder: &Path) -> train::Summary {
        match self.run(folder, false, &mut (), &AtomicBool::new(false)).unwrap() {
            Outcome::Finished(summary) => *summary,
            other => panic!("{other:?}"),
        }
    }
}

/// Every file below `folder` that does not depend on the clock, by path. The summary is taken without its timing.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    collect(folder, folder, &mut found);
    found.remove("timing.jsonl").expect("a run has a timing log");
    if let Some(summary) = found.get_mut("summary.json") {
        let mut value: serde_json::Value = serde_json::from_slice(summary).unwrap();
        value.as_object_mut().unwrap().remove("timing").expect("a summary has a timing part");
        *summary = value.to_string().into_bytes();
    }
    found
}

fn collect(root: &Path, folder: &Path, found: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(root, &path, found);
        } else {
            found
                .insert(path.strip_prefix(root).unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap());
        }
    }
}

/// Fails with the names of the files that differ.
pub fn assert_same(left: &Path, right: &Path, what: &str) {
    let (left, right) = (files(left), files(right));
    assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>(), "{what}: other files");
    let differing: Vec<&String> = left.keys().filter(|name| left[*name] != right[*name]).collect();
    assert!(differing.is_empty(), "{what}: {differing:?} differ");
}

/// The lines of `metrics.jsonl`.
pub fn metrics(folder: &Path) -> Vec<serde_json::Map<String, serde_json::Value>> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The seeds that the method at `place` in its family learns from. Each costs time: the first method gets three, its siblings one.
pub fn seeds(place: usize) -> std::ops::Range<u64> {
    0..if place == 0 { 3 } else { 1 }
}

/// Runs `work` on so many threads.
pub fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}
