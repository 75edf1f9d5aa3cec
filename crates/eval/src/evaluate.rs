//! A model's answers to prompts, judged and counted.

use base::{Hint, Purpose, Random};
use data::Prompt;
use envs::environment::Trace;
use envs::{Answer, Reward, RewardError, Score, Status};
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use rollout::{Episode, Generator, Request, SamplingOptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::interval::{Interval, RESAMPLES, bootstrap_mean, wilson};
use crate::metrics::{mean, pass_at_k};
use crate::play::{PlayError, Played, World, play, scores};

/// How a model is evaluated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluateOptions {
    /// How completions are chosen; greedy unless said otherwise.
    pub sampling: SamplingOptions,
    /// Completions for each prompt. More than one makes sense at a temperature above 0 only.
    #[schemars(range(min = 1))]
    pub samples: u32,
    /// Completions computed at the same time. Has no influence on the result.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
    /// Seed of sampled completions and of bootstrap intervals.
    pub seed: u64,
}

impl Default for EvaluateOptions {
    fn default() -> Self {
        Self { sampling: SamplingOptions::greedy(256), samples: 1, batch_size: 32, seed: 0 }
    }
}

/// How good a model is on some prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Share of right answers (status `ok`), the mean over prompts; with one sample per prompt also pass@1.
    pub accuracy: f64,
    /// 95 % interval of the accuracy: Wilson's for one sample per prompt, else bootstrapped over prompts.
    pub interval: Interval,
    /// Mean reward over prompts.
    pub mean_reward: f64,
    /// 95 % bootstrap interval of the mean reward.
    pub reward_interval: Interval,
    /// Mean tokens of a completion.
    pub mean_length: f64,
    /// Right answers among the samples of each prompt, in the order of the prompts.
    pub correct: Vec<u32>,
    /// `(k, pass@k, its 95 % interval)` for k = 1, 2, 4, ... up to the samples per prompt. pass@1 is the accuracy and has its
    /// interval; the others are bootstrapped over prompts.
    pub pass_at_k: Vec<(u32, f64, Interval)>,
    /// Answers by status, in the order of [`Status::ALL`].
    pub statuses: Vec<(Status, usize)>,
    /// Prompts that the reward does not apply to. They count nowhere else, but have their place in `correct`.
    pub not_applicable: usize,
    /// Every answer, by prompt and sample.
    pub samples: Vec<Sample>,
}

impl Evaluation {
    /// For each prompt, the share of its samples that are right, or nothing where the reward does not apply: what paired tests
    /// compare. The accuracy is their mean.
    pub fn shares(&self) -> Vec<Option<f64>> {
        let count = self.samples.len() / self.correct.len().max(1);
        self.samples.chunks(count.max(1)).map(share).collect()
    }
}

/// The share of a prompt's samples that are right; `None` where the reward does not apply to any.
fn share(samples: &[Sample]) -> Option<f64> {
    let applies = samples.iter().any(|sample| sample.score.is_some());
    applies.then(|| right(samples) as f64 / samples.len() as f64)
}

/// The right ones among samples.
fn right(samples: &[Sample]) -> usize {
    samples.iter().filter(|sample| sample.is_right()).count()
}

/// One answer and its judgement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The prompt's id.
    pub prompt_id: u32,
    /// Number of the sample among the prompt's.
    pub sample: u32,
    /// The completion.
    pub text: String,
    /// Its tokens.
    pub length: usize,
    /// The judgement; `None` where the reward does not apply.
    pub score: Option<Score>,
}

impl Sample {
    /// Whether the answer is right.
    pub fn is_right(&self) -> bool {
        self.score.as_ref().is_some_and(|score| score.status == Status::Ok)
    }
}

/// Why an evaluation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// No prompts, or no samples of them.
    #[error("nothing to evaluate: {prompts} prompts with {samples} samples each")]
    Empty {
        /// Prompts given.
        prompts: usize,
        /// Samples of each.
        samples: u32,
    },
    /// Options that mean nothing, or lack something.
    #[error("{0}")]
    Options(String),
    /// The model could not answer.
    #[error(transparent)]
    Generation(#[from] rollout::Error),
    /// The answers could not be judged.
    #[error(transparent)]
    Reward(#[from] RewardError),
    /// The environment could not be played.
    #[error(transparent)]
    Play(#[from] PlayError),
}

impl Hint for EvaluateError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Empty { .. } => Some("give at least one prompt and one sample".into()),
            Self::Options(_) => None,
            Self::Generation(error) => error.hint(),
            Self::Reward(error) => error.hint(),
            Self::Play(error) => error.hint(),
        }
    }
}

/// Evaluates a model whose weights are prepared. The same weights, prompts and options give the same evaluation,
/// whatever the batch size. `progress` takes the completions done and all completions.
///
/// # Errors
/// See [`EvaluateError`].
pub fn evaluate(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    reward: &dyn Reward,
    options: &EvaluateOptions,
    mut progress: impl FnMut(usize, usize),
) -> Result<Evaluation, EvaluateError> {
    let requests = requests(prompts, options)?;
    let random = Random::new(options.seed, Purpose::Sampling);
    let episodes = Generator::new(&options.sampling, options.batch_size, random).generate(
        decoder,
        tokenizer,
        &requests,
        |now| progress(now.finished, now.total),
    )?;
    let samples = judge(prompts, &episodes, options.samples, reward)?;
    Ok(summarise(samples, options.samples, options.seed))
}

/// [`evaluate()`] for prompts that begin episodes of an environment, whose verdict counts. A reward that applies, to the last
/// turns, adds to its values. [`Sample::text`] is the conversation after the prompt, with the marks of its turns.
///
/// # Errors
/// See [`EvaluateError`].
pub fn evaluate_in(
    world: World<'_>,
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    reward: &dyn Reward,
    options: &EvaluateOptions,
    mut progress: impl FnMut(usize, usize),
) -> Result<Evaluation, EvaluateError> {
    let requests = requests(prompts, options)?;
    let rows: Vec<&Prompt> =
        prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, options.samples as usize)).collect();
    let random = Random::new(options.seed, Purpose::Sampling);
    let generator = Generator::new(&options.sampling, options.batch_size, random);
    let played =
        play(&generator, decoder, tokenizer, world, &requests, &rows, |now| progress(now.finished, now.total))?;
    let (episodes, traces): (Vec<Episode>, Vec<Trace>) =
        played.into_iter().map(|Played { episode, trace }| (episode, trace)).unzip();
    let mut samples = judge(prompts, &episodes, options.samples, reward)?;
    let further = samples.iter_mut().map(|sample| sample.score.take()).collect();
    let scores = scores(world.environment.name(), &traces, further);
    for ((sample, episode), score) in samples.iter_mut().zip(&episodes).zip(scores) {
        sample.score = score;
        if let Some(transcript) = &episode.transcript {
            sample.text.clone_from(&transcript.text);
        }
    }
    Ok(summarise(samples, options.samples, options.seed))
}

/// The samples that are asked of each prompt.
fn requests(prompts: &[Prompt], options: &EvaluateOptions) -> Result<Vec<Request>, EvaluateError> {
    if prompts.is_empty() || options.samples == 0 {
        return Err(EvaluateError::Empty { prompts: prompts.len(), samples: options.samples });
    }
    Ok(prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, options.samples)).collect())
}

/// Checks that a reward said something about every answer.
pub(crate) fn check_count(reward: &dyn Reward, expected: usize, found: usize) -> Result<(), RewardError> {
    match found == expected {
        true => Ok(()),
        false => Err(RewardError::Count { reward: reward.name().to_owned(), expected, found }),
    }
}

/// Judges `count` consecutive episodes of each prompt, each beside its own prompt's row.
fn judge(
    prompts: &[Prompt],
    episodes: &[Episode],
    count: u32,
    reward: &dyn Reward,
) -> Result<Vec<Sample>, RewardError> {
    let rows = prompts.iter().flat_map(|prompt| (0..count).map(move |_| prompt));
    let answers: Vec<Answer> = rows
        .zip(episodes)
        .map(|(prompt, episode)| Answer {
            prompt_text: &prompt.text,
            completion: &episode.text,
            completion_ids: &episode.completion,
            columns: &prompt.columns,
        })
        .collect();
    let scores = reward.score(&answers)?;
    check_count(reward, answers.len(), scores.len())?;
    let sample = |(episode, score): (&Episode, Option<Score>)| Sample {
        prompt_id: episode.prompt_id,
        sample: episode.sample,
        text: episode.text.clone(),
        length: episode.completion.len(),
        score,
    };
    Ok(episodes.iter().zip(scores).map(sample).collect())
}

/// The numbers of an evaluation with `count` consecutive samples for each prompt.
pub fn summarise(samples: Vec<Sample>, count: u32, seed: u64) -> Evaluation {
    let groups = || samples.chunks(count.max(1) as usize);
    let reward = |group: &[Sample]| {
        let values: Vec<f64> = group.iter().filter_map(|sample| Some(sample.score.as_ref()?.value)).collect();
        mean(&values)
    };
    let judged: Vec<&[Sample]> = groups().filter(|group| share(group).is_some()).collect();
    let shares: Vec<f64> = judged.iter().filter_map(|group| share(group)).collect();
    let rewards: Vec<f64> = judged.iter().map(|group| reward(group)).collect();
    let lengths: Vec<f64> = samples.iter().map(|sample| sample.length as f64).collect();
    let interval = match count {
        1 => wilson(judged.iter().map(|group| right(group)).sum(), judged.len()),
        _ => bootstrap_mean(&shares, RESAMPLES, seed),
    };
    let pass_at = |k: u32| {
        let estimates: Vec<f64> =
            judged.iter().filter_map(|group| pass_at_k(group.len(), right(group), k as usize)).collect();
        (k, mean(&estimates), if k == 1 { interval } else { bootstrap_mean(&estimates, RESAMPLES, seed) })
    };
    let of_status =
        |status| samples.iter().filter_map(|sample| sample.score.as_ref()).filter(|s| s.status == status).count();
    Evaluation {
        accuracy: mean(&shares),
        interval,
        mean_reward: mean(&rewards),
        reward_interval: bootstrap_mean(&rewards, RESAMPLES, seed),
        mean_length: mean(&lengths),
        correct: groups().map(|group| right(group) as u32).collect(),
        pass_at_k: std::iter::successors(Some(1u32), |k| k.checked_mul(2))
            .take_while(|k| *k <= count)
            .map(pass_at)
            .collect(),
        statuses: Status::ALL.into_iter().map(|status| (status, of_status(status))).collect(),
        not_applicable: groups().count() - judged.len(),
        samples,
    }
}
