//! Answers that cost more than one completion: best-of-n, votes, and search.
//!
//! | strategy | the answer | needs a judge | source |
//! | --- | --- | --- | --- |
//! | `best_of_n` | the one of `samples` that the judge values most | yes | Stiennon et al., arXiv 2009.01325 |
//! | `majority` | the most frequent result of `samples` | no | self-consistency, arXiv 2203.11171 |
//! | `weighted_vote` | the result with the largest sum of the judge's values | yes | arXiv 2206.02336 |
//! | `beam` | the most probable completion that `beams` beams of tokens find | no | arXiv 1609.08144 |
//! | `step_beam` | the best of `beams` paths of steps, each step the best of `expansions` | yes | arXiv 2408.03314 |
//! | `mcts` | the path that a tree search visits most | yes | see [`mod@rollout::search`] |
//!
//! The judge is any [`Reward`]: a reward model, a process reward model (which judges unfinished paths too), or a verifier. What two answers
//! have in common in a vote is their result: the last number, or the text where there is none.
//!
//! In an environment a sample is a whole episode, for the strategies that take samples. Votes and judges look at its last turn; without a
//! judge, what the environment paid says which episode is best.

use std::sync::Arc;

use base::{Purpose, Random};
use data::Prompt;
use envs::environment::Trace;
use envs::verify::Outcome;
use envs::{Answer, Reward};
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use rollout::search::{
    BeamOptions, Judge, LengthNormalized, MctsOptions, Path, StepSampler, TokenProposer, beam, mcts,
};
use rollout::{Episode, Generator, Progress, Request, SamplingOptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::evaluate::{EvaluateError, Evaluation, Sample, check_count, summarise};
use crate::metrics::{best_of_n, majority, mean, weighted_vote};
use crate::play::{World, play, scores};

/// How an answer is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// The sample that the judge values most.
    BestOfN,
    /// The most frequent result.
    #[default]
    Majority,
    /// The result with the largest sum of values.
    WeightedVote,
    /// The most probable completion, token by token.
    Beam,
    /// The best path, step by step.
    StepBeam,
    /// Tree search over steps.
    Mcts,
}

impl Strategy {
    /// Whether the answer is one of several independent completions.
    pub fn takes_samples(self) -> bool {
        matches!(self, Self::BestOfN | Self::Majority | Self::WeightedVote)
    }

    /// Whether a judge has to choose.
    pub fn needs_judge(self) -> bool {
        !matches!(self, Self::Majority | Self::Beam)
    }
}

/// How much an answer may cost, and where it goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TestTimeOptions {
    /// The strategy: `best_of_n`, `majority`, `weighted_vote`, `beam`, `step_beam` or `mcts`.
    pub strategy: Strategy,
    /// How tokens are drawn; `beam` draws none, and takes the longest answer from here.
    pub sampling: SamplingOptions,
    /// Completions of each problem, for `best_of_n`, `majority` and `weighted_vote`.
    #[schemars(range(min = 1))]
    pub samples: u32,
    /// Paths kept by `beam` and `step_beam`.
    #[schemars(range(min = 1))]
    pub beams: usize,
    /// Next steps of each path, for `beam`, `step_beam` and `mcts`.
    #[schemars(range(min = 1))]
    pub expansions: usize,
    /// Simulations of each problem, for `mcts`.
    #[schemars(range(min = 1))]
    pub simulations: usize,
    /// Weight of steps that were tried little, for `mcts`.
    #[schemars(range(min = 0.0))]
    pub exploration: f64,
    /// Text that ends a step of `step_beam` and `mcts`.
    pub step_separator: String,
    /// Longest step, in tokens.
    #[schemars(range(min = 1))]
    pub max_step_tokens: usize,
    /// Most steps of a path.
    #[schemars(range(min = 1))]
    pub max_steps: usize,
    /// How much `beam` favours long completions: 0 compares probabilities, 1 is close to comparing those of a token.
    pub length_penalty: f64,
    /// Completions computed at the same time. Has no influence on the result.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
    /// Seed of all draws.
    pub seed: u64,
}

impl Default for TestTimeOptions {
    fn default() -> Self {
        Self {
            strategy: Strategy::default(),
            sampling: SamplingOptions { temperature: 0.7, ..SamplingOptions::default() },
            samples: 8,
            beams: 4,
            expansions: 4,
            simulations: 16,
            exploration: 1.0,
            step_separator: "\n".into(),
            max_step_tokens: 64,
            max_steps: 16,
            length_penalty: 1.0,
            batch_size: 32,
            seed: 0,
        }
    }
}

impl TestTimeOptions {
    /// Refuses values that mean nothing.
    ///
    /// # Errors
    /// The option, what it is, and what it may be, in words.
    pub fn validate(&self) -> Result<(), String> {
        self.sampling.validate().map_err(|error| format!("sampling.{error}"))?;
        let counts = [
            ("samples", self.samples as usize),
            ("beams", self.beams),
            ("expansions", self.expansions),
            ("simulations", self.simulations),
            ("max_step_tokens", self.max_step_tokens),
            ("max_steps", self.max_steps),
            ("batch_size", self.batch_size),
        ];
        if let Some((option, count)) = counts.iter().find(|(_, count)| !(1..=1 << 20).contains(count)) {
            return Err(format!("{option} is {count}, expected 1 to 1048576"));
        }
        for (option, value) in [("exploration", self.exploration), ("length_penalty", self.length_penalty)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(format!("{option} is {value}, expected a number from 0 up"));
            }
        }
        let by_steps = matches!(self.strategy, Strategy::StepBeam | Strategy::Mcts);
        if by_steps && !(self.sampling.stop.is_empty() && self.sampling.min_new_tokens == 0) {
            return Err(
                "sampling.stop and sampling.min_new_tokens have no meaning for steps, expected none and 0".into()
            );
        }
        if self.step_separator.is_empty() {
            return Err("step_separator is empty, expected at least one character".into());
        }
        Ok(())
    }
}

/// How good answers found at such cost are.
#[derive(Clone, Debug, PartialEq)]
pub struct TestTime {
    /// The answers, one a problem, as an evaluation.
    pub evaluation: Evaluation,
    /// Tokens generated for each answer, all that was thrown away included; the mean.
    pub tokens_per_problem: f64,
    /// `(k, accuracy)` with k = 1, 2, 4, ... samples, for `best_of_n` (an unbiased estimate from all samples), `majority` and
    /// `weighted_vote` (of the first k); empty for searches.
    pub by_samples: Vec<(u32, f64)>,
}

/// The model that answers.
#[derive(Clone, Copy)]
pub struct Answerer<'a> {
    /// The decoder; its weights are prepared.
    pub decoder: &'a Decoder,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The environment that answers it, where there is one.
    pub world: Option<World<'a>>,
}

/// Answers `prompts` by the strategy of `options`, and judges the answers with `reward`. `judge` says which of several is best.
///
/// # Errors
/// No prompts; options that mean nothing; a strategy that needs a judge and has none, or a search in an environment; what generation
/// and judging can meet.
pub fn answer_at_test_time(
    model: Answerer<'_>,
    prompts: &[Prompt],
    judge: Option<&dyn Reward>,
    reward: &dyn Reward,
    options: &TestTimeOptions,
    mut progress: impl FnMut(usize, usize),
) -> Result<TestTime, EvaluateError> {
    if prompts.is_empty() {
        return Err(EvaluateError::Empty { prompts: 0, samples: options.samples });
    }
    options.validate().map_err(EvaluateError::Options)?;
    let scorer = || match judge {
        Some(judge) => Ok(Judged { judge, prompts, tokenizer: model.tokenizer }),
        None => Err(EvaluateError::Options(format!("strategy {:?} needs a judge", options.strategy))),
    };
    if model.world.is_some() && !options.strategy.takes_samples() {
        let reason = format!("strategy {:?} finds answers of one turn, and there is an environment", options.strategy);
        return Err(EvaluateError::Options(format!("{reason}: expected best_of_n, majority or weighted_vote")));
    }
    let named = || prompts.iter().map(|prompt| (prompt.id, Arc::clone(&prompt.ids))).collect();
    let random = Random::new(options.seed, Purpose::Sampling);
    let steps = || {
        let cut = (&options.step_separator[..], options.max_step_tokens);
        StepSampler::new((model.decoder, model.tokenizer), named(), &options.sampling, cut, options.batch_size, random)
    };
    let width = BeamOptions { beams: options.beams, expansions: options.expansions, max_steps: options.max_steps };
    let (paths, tokens): (Vec<Path>, usize) = match options.strategy {
        Strategy::BestOfN | Strategy::Majority | Strategy::WeightedVote => {
            let paid = model.world.is_some() && judge.is_none();
            let judge = if options.strategy.needs_judge() && !paid { Some(scorer()?) } else { None };
            return sampled(model, prompts, judge, reward, options, progress);
        }
        Strategy::Beam => {
            let length = options.sampling.max_new_tokens;
            let proposer = TokenProposer::new((model.decoder, model.tokenizer), named(), length, options.batch_size);
            let judge = LengthNormalized { alpha: options.length_penalty };
            let found =
                beam::<EvaluateError>(prompts.len(), BeamOptions { max_steps: length, ..width }, &proposer, &judge)?;
            (found.into_iter().map(best_path).collect(), proposer.tokens())
        }
        Strategy::StepBeam => {
            let proposer = steps();
            let found = beam::<EvaluateError>(prompts.len(), width, &proposer, &scorer()?)?;
            (found.into_iter().map(best_path).collect(), proposer.tokens())
        }
        Strategy::Mcts => {
            let proposer = steps();
            let options = MctsOptions {
                simulations: options.simulations,
                expansions: options.expansions,
                exploration: options.exploration,
                max_steps: options.max_steps,
            };
            let trees = mcts::<EvaluateError>(prompts.len(), options, &proposer, &scorer()?)?;
            (trees.into_iter().map(|tree| tree.best.path).collect(), proposer.tokens())
        }
    };
    progress(prompts.len(), prompts.len());
    let answers: Vec<Vec<u32>> = paths.iter().map(Path::tokens).collect();
    let texts: Vec<String> = answers.iter().map(|ids| model.tokenizer.decode(ids)).collect();
    let judged =
        score(reward, prompts.iter().zip(&texts).zip(&answers).map(|((p, text), ids)| (p, &text[..], &ids[..])))?;
    let sample = |(((prompt, text), ids), score): (((&Prompt, String), &Vec<u32>), _)| Sample {
        prompt_id: prompt.id,
        sample: 0,
        text,
        length: ids.len(),
        score,
    };
    let samples = prompts.iter().zip(texts).zip(&answers).zip(judged).map(sample).collect();
    Ok(TestTime {
        evaluation: summarise(samples, 1, options.seed),
        tokens_per_problem: tokens as f64 / prompts.len() as f64,
        by_samples: Vec::new(),
    })
}

fn best_path(found: Vec<rollout::search::Found>) -> Path {
    found.into_iter().next().map(|found| found.path).unwrap_or_default()
}

/// Whole completions, of which one is chosen.
fn sampled(
    model: Answerer<'_>,
    prompts: &[Prompt],
    judge: Option<Judged<'_>>,
    reward: &dyn Reward,
    options: &TestTimeOptions,
    mut progress: impl FnMut(usize, usize),
) -> Result<TestTime, EvaluateError> {
    let count = options.samples as usize;
    let requests: Vec<Request> =
        prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, options.samples)).collect();
    let random = Random::new(options.seed, Purpose::Sampling);
    let generator = Generator::new(&options.sampling, options.batch_size, random);
    let rows = || prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, count));
    let on_progress = |now: Progress<'_>| progress(now.finished, now.total);
    let (episodes, traces) = match model.world {
        None => (generator.generate(model.decoder, model.tokenizer, &requests, on_progress)?, None),
        Some(world) => {
            let rows: Vec<&Prompt> = rows().collect();
            let played = play(&generator, model.decoder, model.tokenizer, world, &requests, &rows, on_progress)?;
            let (episodes, traces): (Vec<Episode>, Vec<Trace>) =
                played.into_iter().map(|played| (played.episode, played.trace)).unzip();
            (episodes, Some((world.environment.name(), traces)))
        }
    };
    let answers =
        || rows().zip(&episodes).map(|(prompt, episode)| (prompt, &episode.text[..], &episode.completion[..]));
    let further = score(reward, answers())?;
    let gold = match &traces {
        Some((environment, traces)) => scores(environment, traces, further),
        None => further,
    };
    let values = match judge {
        Some(judge) => judge.values(answers())?,
        None if traces.is_some() => gold.iter().map(|score| score.as_ref().map_or(0.0, |score| score.value)).collect(),
        None => vec![1.0; episodes.len()],
    };
    let results: Vec<Option<Outcome>> = episodes.iter().map(|episode| Outcome::of(&episode.text)).collect();
    // The choice among the first k samples of a problem, whose first is number `first`.
    let choose = |first: usize, k: usize| {
        let (values, results) = (&values[first..first + k], &results[first..first + k]);
        let chosen = match options.strategy {
            Strategy::Majority => majority(results, k),
            Strategy::WeightedVote => weighted_vote(results, values),
            _ => (0..k).reduce(|best, other| if values[other] > values[best] { other } else { best }),
        };
        first + chosen.unwrap_or(0)
    };
    let right = |index: usize| gold[index].as_ref().map(|score| f64::from(u8::from(score.status == envs::Status::Ok)));
    let firsts: Vec<usize> = (0..prompts.len()).map(|problem| problem * count).collect();
    let accuracy = |k: usize| {
        let of = |&first: &usize| {
            let all: Option<Vec<f64>> = (first..first + count).map(right).collect();
            match options.strategy {
                Strategy::BestOfN => best_of_n(&values[first..first + count], &all?, k),
                _ => right(choose(first, k)),
            }
        };
        mean(&firsts.iter().filter_map(of).collect::<Vec<_>>())
    };
    let by_samples = std::iter::successors(Some(1u32), |k| k.checked_mul(2)).take_while(|k| *k <= options.samples);
    let by_samples = by_samples.map(|k| (k, accuracy(k as usize))).collect();
    let sample = |&first: &usize| {
        let index = choose(first, count);
        let episode = &episodes[index];
        Sample {
            prompt_id: episode.prompt_id,
            sample: episode.sample,
            text: episode.text.clone(),
            length: episode.completion.len(),
            score: gold[index].clone(),
        }
    };
    let tokens: usize = episodes.iter().map(|episode| episode.completion.len()).sum();
    Ok(TestTime {
        evaluation: summarise(firsts.iter().map(sample).collect(), 1, options.seed),
        tokens_per_problem: tokens as f64 / prompts.len() as f64,
        by_samples,
    })
}

/// A reward as the judge of answers and of the beginnings of answers.
struct Judged<'a> {
    judge: &'a dyn Reward,
    prompts: &'a [Prompt],
    tokenizer: &'a Tokenizer,
}

impl Judged<'_> {
    fn values<'a>(
        &self,
        answers: impl Iterator<Item = (&'a Prompt, &'a str, &'a [u32])>,
    ) -> Result<Vec<f64>, EvaluateError> {
        let scores = score(self.judge, answers)?;
        // What the judge does not apply to is worth nothing.
        Ok(scores.into_iter().map(|score| score.map_or(0.0, |score| score.value)).collect())
    }
}

impl Judge<EvaluateError> for Judged<'_> {
    fn judge(&self, paths: &[(usize, &Path)]) -> Result<Vec<f64>, EvaluateError> {
        let answers: Vec<Vec<u32>> = paths.iter().map(|(_, path)| path.tokens()).collect();
        let texts: Vec<String> = answers.iter().map(|ids| self.tokenizer.decode(ids)).collect();
        let prompts = paths.iter().map(|(problem, _)| &self.prompts[*problem]);
        self.values(prompts.zip(&texts).zip(&answers).map(|((prompt, text), ids)| (prompt, &text[..], &ids[..])))
    }
}

fn score<'a>(
    reward: &dyn Reward,
    answers: impl Iterator<Item = (&'a Prompt, &'a str, &'a [u32])>,
) -> Result<Vec<Option<envs::Score>>, EvaluateError> {
    let answer = |(prompt, completion, completion_ids): (&'a Prompt, &'a str, &'a [u32])| Answer {
        prompt_text: &prompt.text,
        completion,
        completion_ids,
        columns: &prompt.columns,
    };
    let answers: Vec<Answer<'_>> = answers.map(answer).collect();
    let scores = reward.score(&answers)?;
    check_count(reward, answers.len(), scores.len())?;
    Ok(scores)
}
