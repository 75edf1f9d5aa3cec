//! Sampling and scoring: prompts in, scored groups of episodes out.
//!
//! A *group* is the completions of one prompt. Every method that learns from the model's own answers samples them here, so
//! that the order of the draws, the metrics and the table of episodes are the same for all of them.
//!
//! Metrics, named as TRL names them; lengths are in tokens:
//! - `reward`: mean reward. `reward_std`: mean over groups of the standard deviation within the group.
//! - `frac_reward_zero_std`: share of groups whose rewards are all equal.
//! - `rewards/NAME/mean`, `rewards/NAME/std`: each part of the reward over all completions it applies to.
//! - `status/ok|wrong|malformed|timeout|error`: share of completions with this verdict.
//! - `completions/mean_length|min_length|max_length`, and the same as `*_terminated_length` over completions that ended by
//!   themselves. `completions/clipped_ratio`: share that ran out of tokens.
//! - `completions/length_reward_correlation`: Pearson correlation of length and reward within groups (both less their group's
//!   mean); `null` where either does not vary.
//! - `sampling/prompt_tokens_computed`, `sampling/prompt_tokens_reused`: tokens of the prompts of all completions that went
//!   through the model while sampling, and that were known from the other samples of the prompt or from prompts that begin
//!   alike.
//!
//! In a run with an environment, a completion is a conversation: what the environment says in between counts as its tokens,
//! and is no part of the loss. Further metrics:
//! - `turns/mean|min|max`: turns of the model in an episode.
//! - `tools/call_frequency`: tool calls of an episode, attempts included. `tools/failure_frequency`: share of calls that failed.
//! - `rendering/other_tokens`, `rendering/other_text`: share of episodes for which the chat template, given the conversation as
//!   text, comes to the same text in other tokens, or to another text ([`rollout::Fidelity`]).

use std::collections::BTreeMap;
use std::time::Instant;

use base::Random;
use data::Prompt;
use envs::environment::Trace;
use envs::{Answer, Reward, Score, Status};
use eval::play::{self, PlayError, World, play};
use model::decoder::{Decoder, PackedTokens, WeightFormat};
use model::tokenizer::Tokenizer;
use rollout::{
    Episode, Fidelity, Finish, Generator, Guidance, GuidanceOptions, LogitsHook, OnTape, Progress, PromptTokens,
    Request, SamplingOptions, TapeRows, ValueOutputs,
};

use crate::error::{Error, Result};
use crate::method::Step;
use crate::metrics::{Metrics, mean, standard_deviation};
use crate::observer::{Event, Observer};
use crate::pass::{Pass, Sequence, Unit};
use crate::table::{Column, Table};
use crate::timing::Phase;

/// How groups are sampled.
#[derive(Clone, Copy, Debug)]
pub struct Rollouts<'a> {
    /// How a token is drawn and when a completion ends.
    pub sampling: &'a SamplingOptions,
    /// Completions of each prompt.
    pub num_generations: usize,
    /// Sequences decoded at once.
    pub decode_batch_size: usize,
    /// The weights that sample.
    pub weights: WeightFormat,
    /// What of the sampler's work is recorded for the update that follows.
    pub record: Record,
}

/// How much of what sampling computes is recorded on the step's tape, where an update finds it that begins with the first groups of the
/// sample, and needs no forward for them ([`update::Reading::recorded`](crate::update::Reading)).
#[derive(Clone, Copy, Debug, Default)]
pub struct Record {
    /// Groups, at most.
    pub groups: usize,
    /// Rows of their prompts and of their completions, were they as long as can be; at most. It is what memory is taken for.
    pub rows: usize,
}

/// Where groups go on a tape: in the order of training, each completion with room for all it may become.
#[derive(Default)]
struct TapePlan {
    groups: usize,
    rows: usize,
    places: Vec<TapeRows>,
}

impl TapePlan {
    /// The groups that were planned, as they are packed for training, and for each of these sequences its first row on the tape.
    fn packed(&self, groups: &Groups<'_>) -> model::Result<(PackedTokens, Vec<usize>)> {
        let tokens = Pass::pack(&groups.units()[..self.groups])?.tokens;
        let mut starts = Vec::with_capacity(tokens.segments().len());
        for (episodes, places) in groups.episodes.chunks(groups.size).zip(self.places.chunks(groups.size)) {
            starts.push(places[0].prompt);
            let fed = episodes.iter().zip(places).filter(|(episode, _)| episode.completion.len() > 1);
            starts.extend(fed.map(|(_, place)| place.completion));
        }
        Ok((tokens, starts))
    }
}

impl Rollouts<'_> {
    /// Samples with the model that is trained. `random` names the draws, usually [`Step::random`] of a purpose.
    ///
    /// # Errors
    /// Those of generation.
    pub fn sample<'p>(&self, step: &mut Step<'_>, random: Random, prompts: &[&'p Prompt]) -> Result<Groups<'p>> {
        self.sample_with(None, step, random, prompts)
    }

    /// [`Rollouts::sample`] from what a hook makes of the model's logits: a mixture with another model.
    ///
    /// # Errors
    /// Those of generation.
    pub fn sample_with<'p>(
        &self,
        hook: Option<&dyn LogitsHook>,
        step: &mut Step<'_>,
        random: Random,
        prompts: &[&'p Prompt],
    ) -> Result<Groups<'p>> {
        step.decoder.prepare_for_generation(step.precision, self.weights);
        let started = Instant::now();
        let plan = match step.world.is_none() && step.decoder.one_forward(self.weights) {
            true => self.tape_plan(prompts),
            false => TapePlan::default(),
        };
        let on_tape = (plan.groups > 0).then(|| {
            step.tape.start(step.decoder, plan.rows, step.workspace, step.gradients);
            OnTape { tape: &mut *step.tape, gradients: &mut *step.gradients, rows: &plan.places }
        });
        let language = (step.tokenizer, step.world);
        let found = self.generate(step.decoder, (hook, on_tape), language, step.observer, random, (prompts, &[]));
        step.spent(Phase::Rollout, started);
        let mut found = found.map_err(failed(step.number))?;
        if plan.groups > 0 {
            let (tokens, starts) = plan.packed(&found).map_err(step.model_error())?;
            step.tape.finish(step.decoder, tokens, &starts, step.gradients);
            found.recorded = plan.groups;
        }
        Ok(found)
    }

    /// What is kept of these prompts' groups. A prompt that comes a second time ends it: it is computed once, and learnt from twice.
    fn tape_plan(&self, prompts: &[&Prompt]) -> TapePlan {
        let mut plan = TapePlan::default();
        // The last token of a completion goes through no model.
        let longest = (self.sampling.max_new_tokens - 1).next_multiple_of(2);
        for prompt in prompts.iter().take(self.record.groups) {
            let first = plan.rows + prompt.ids.len().next_multiple_of(2);
            let end = first.saturating_add(self.num_generations.saturating_mul(longest));
            if end > self.record.rows || prompts[..plan.groups].iter().any(|other| other.ids == prompt.ids) {
                break;
            }
            let places = (0..self.num_generations)
                .map(|sample| TapeRows { prompt: plan.rows, completion: first + sample * longest });
            plan.places.extend(places);
            (plan.groups, plan.rows) = (plan.groups + 1, end);
        }
        plan
    }

    /// Samples with another model, `reference`, guided by the one that is trained. Both must be prepared.
    ///
    /// # Errors
    /// Those of generation; a model that cannot guide.
    pub fn sample_guided<'p>(
        &self,
        reference: &Decoder,
        (outputs, guidance): (ValueOutputs, &GuidanceOptions),
        step: &mut Step<'_>,
        random: Random,
        prompts: &[&'p Prompt],
    ) -> Result<Groups<'p>> {
        let started = Instant::now();
        let hook = Guidance::new(step.decoder, outputs, guidance, self.sampling);
        let found = hook.map_err(PlayError::from).and_then(|hook| {
            let language = (step.tokenizer, step.world);
            self.generate(reference, (Some(&hook), None), language, step.observer, random, (prompts, &[]))
        });
        step.spent(Phase::Rollout, started);
        found.map_err(failed(step.number))
    }

    /// Samples with another model, which must be prepared.
    ///
    /// # Errors
    /// Those of generation.
    pub fn sample_from<'p>(
        &self,
        decoder: &Decoder,
        step: &mut Step<'_>,
        random: Random,
        prompts: &[&'p Prompt],
    ) -> Result<Groups<'p>> {
        self.continue_from(decoder, step, random, (prompts, &[]))
    }

    /// [`Rollouts::sample_from`], where each completion continues its beginning among `beginnings`; none of them is given where there
    /// are none at all.
    ///
    /// # Errors
    /// Those of generation.
    pub fn continue_from<'p>(
        &self,
        decoder: &Decoder,
        step: &mut Step<'_>,
        random: Random,
        (prompts, beginnings): (&[&'p Prompt], &[Vec<u32>]),
    ) -> Result<Groups<'p>> {
        let started = Instant::now();
        let language = (step.tokenizer, step.world);
        let found = self.generate(decoder, (None, None), language, step.observer, random, (prompts, beginnings));
        step.spent(Phase::Rollout, started);
        found.map_err(failed(step.number))
    }

    fn generate<'p>(
        &self,
        decoder: &Decoder,
        (hook, on_tape): (Option<&dyn LogitsHook>, Option<OnTape<'_>>),
        (tokenizer, world): (&Tokenizer, Option<World<'_>>),
        observer: &mut dyn Observer,
        random: Random,
        (prompts, beginnings): (&[&'p Prompt], &[Vec<u32>]),
    ) -> Result<Groups<'p>, PlayError> {
        let generations = self.num_generations as u32;
        // A prompt may come twice in a step, at the seam of two epochs: its samples then get other numbers.
        let mut seen = BTreeMap::new();
        let mut requests: Vec<Request> = prompts
            .iter()
            .flat_map(|prompt| {
                let times = seen.entry(prompt.id).and_modify(|times| *times += 1).or_insert(0);
                let first = *times * generations;
                Request::samples(prompt.id, &prompt.ids, generations)
                    .map(move |request| Request { sample: first + request.sample, ..request })
            })
            .collect();
        for (request, beginning) in requests.iter_mut().zip(beginnings) {
            request.prefix.clone_from(beginning);
        }
        let generator = Generator { hook, ..Generator::new(self.sampling, self.decode_batch_size, random) };
        let mut prompt_tokens = PromptTokens::default();
        let on_progress = |progress: Progress<'_>| {
            prompt_tokens = progress.prompt_tokens;
            observer.observe(Event::Progress { phase: Phase::Rollout, done: progress.finished, total: progress.total });
        };
        let mut found = Groups { prompts: prompts.to_vec(), size: self.num_generations, ..Groups::default() };
        match world {
            None => found.episodes = generator.generate_onto(on_tape, decoder, tokenizer, &requests, on_progress)?,
            Some(world) => {
                let rows: Vec<&Prompt> = (0..requests.len()).map(|index| found.prompt_of(index)).collect();
                let played = play(&generator, decoder, tokenizer, world, &requests, &rows, on_progress)?;
                let traces;
                (found.episodes, traces) = played.into_iter().map(|played| (played.episode, played.trace)).unzip();
                found.traces = Some((world.environment.name(), traces));
            }
        }
        found.prompt_tokens = prompt_tokens;
        Ok(found)
    }
}

/// Gives a failure of sampling its step.
fn failed(step: u64) -> impl Fn(PlayError) -> Error {
    move |source| match source {
        PlayError::Generation(source) => Error::Rollout { step, source },
        source => Error::Play { step, source },
    }
}

/// Episodes of several prompts: the first `size` are those of the first prompt, and so on.
#[derive(Debug, Default)]
pub struct Groups<'p> {
    /// The prompts, each with what its answers are judged by.
    pub prompts: Vec<&'p Prompt>,
    /// Episodes of each prompt.
    pub size: usize,
    /// All episodes, group after group.
    pub episodes: Vec<Episode>,
    /// What the prompts cost.
    pub prompt_tokens: PromptTokens,
    /// How many of the first groups are on the step's tape.
    pub recorded: usize,
    /// In a run with an environment its name, and what it made of each episode.
    pub traces: Option<(&'static str, Vec<Trace>)>,
}

impl<'p> Groups<'p> {
    /// The prompt of an episode.
    pub fn prompt_of(&self, episode: usize) -> &'p Prompt {
        self.prompts[episode / self.size]
    }

    /// One unit for each group: its episodes continue their prompt.
    pub fn units(&self) -> Vec<Unit<'_>> {
        let groups = self.prompts.iter().zip(self.episodes.chunks(self.size));
        groups
            .map(|(prompt, episodes)| Unit {
                prompt: &prompt.ids,
                sequences: episodes.iter().map(Sequence::of).collect(),
            })
            .collect()
    }

    /// The number of episodes of each group.
    pub fn lengths(&self) -> Vec<usize> {
        vec![self.size; self.prompts.len()]
    }

    /// Scores every completion against the row of its own prompt; `None` where no reward applies to it. An environment pays
    /// its episodes itself, and a reward then adds what it thinks of their last turns.
    ///
    /// # Errors
    /// A reward that cannot be computed.
    pub fn score(&self, step: &mut Step<'_>, reward: &dyn Reward) -> Result<Vec<Option<Score>>> {
        let started = Instant::now();
        let answers: Vec<Answer<'_>> = self
            .episodes
            .iter()
            .enumerate()
            .map(|(index, episode)| {
                let prompt = self.prompt_of(index);
                Answer {
                    prompt_text: &prompt.text,
                    completion: &episode.text,
                    completion_ids: &episode.completion,
                    columns: &prompt.columns,
                }
            })
            .collect();
        let reward_error = |source| Error::Reward { step: step.number, source };
        let scores = reward.score(&answers).map_err(reward_error)?;
        if scores.len() != answers.len() {
            let (reward, expected, found) = (reward.name().to_owned(), answers.len(), scores.len());
            return Err(reward_error(envs::RewardError::Count { reward, expected, found }));
        }
        step.spent(Phase::Score, started);
        Ok(match &self.traces {
            Some((environment, traces)) => play::scores(environment, traces, scores),
            None => scores,
        })
    }

    /// The metrics of sampling, of lengths, and of what the episodes were paid.
    pub fn metrics(&self, scores: &[Option<Score>]) -> Metrics {
        let mut metrics = self.prompt_metrics();
        self.reward_metrics(scores, &mut metrics);
        self.length_metrics(&mut metrics);
        metrics.set("completions/length_reward_correlation", self.length_reward_correlation(scores));
        self.conversation_metrics(scores, &mut metrics);
        metrics
    }

    /// The metrics of sampling and of lengths, where nobody pays.
    pub fn sampling_metrics(&self) -> Metrics {
        let mut metrics = self.prompt_metrics();
        self.length_metrics(&mut metrics);
        metrics
    }

    fn prompt_metrics(&self) -> Metrics {
        let mut metrics = Metrics::new();
        metrics.set("sampling/prompt_tokens_computed", self.prompt_tokens.computed as f64);
        metrics.set("sampling/prompt_tokens_reused", self.prompt_tokens.reused as f64);
        metrics
    }

    fn reward_metrics(&self, scores: &[Option<Score>], metrics: &mut Metrics) {
        let rewards: Vec<Option<f64>> = values(scores);
        let groups: Vec<Vec<f64>> =
            rewards.chunks(self.size).map(|group| group.iter().flatten().copied().collect()).collect();
        let deviations: Vec<f64> =
            groups.iter().map(|group| standard_deviation(group)).filter(|deviation| deviation.is_finite()).collect();
        let constant = |group: &&Vec<f64>| group.iter().all(|reward| *reward == group[0]);
        metrics.set("reward", mean(&groups.concat()));
        metrics.set("reward_std", mean(&deviations));
        metrics.set("frac_reward_zero_std", groups.iter().filter(constant).count() as f64 / groups.len() as f64);
        for name in part_names(scores) {
            let values: Vec<f64> = scores.iter().filter_map(|score| part(score.as_ref()?, name)).collect();
            metrics.set(format!("rewards/{name}/mean"), mean(&values));
            metrics.set(format!("rewards/{name}/std"), standard_deviation(&values));
        }
        for status in Status::ALL {
            let count = scores.iter().flatten().filter(|score| score.status == status).count();
            metrics.set(format!("status/{}", status.name()), count as f64 / scores.len() as f64);
        }
    }

    fn length_metrics(&self, metrics: &mut Metrics) {
        let all: Vec<f64> = self.episodes.iter().map(|episode| episode.completion.len() as f64).collect();
        let ended = self.episodes.iter().filter(|episode| episode.finish == Finish::Stop);
        let terminated: Vec<f64> = ended.map(|episode| episode.completion.len() as f64).collect();
        for (kind, lengths) in [("length", &all), ("terminated_length", &terminated)] {
            metrics.set(format!("completions/mean_{kind}"), mean(lengths));
            metrics.set(format!("completions/min_{kind}"), lengths.iter().copied().fold(f64::NAN, f64::min));
            metrics.set(format!("completions/max_{kind}"), lengths.iter().copied().fold(f64::NAN, f64::max));
        }
        metrics.set("completions/clipped_ratio", 1.0 - terminated.len() as f64 / all.len() as f64);
    }

    /// Correlation of length and reward over all scored episodes, each less the mean of its group; NaN where one is constant.
    fn length_reward_correlation(&self, scores: &[Option<Score>]) -> f64 {
        let scored = self.episodes.iter().zip(scores);
        let pairs: Vec<Option<(f64, f64)>> =
            scored.map(|(episode, score)| Some((episode.completion.len() as f64, score.as_ref()?.value))).collect();
        let [mut both, mut lengths, mut rewards] = [0.0; 3];
        for group in pairs.chunks(self.size) {
            let (length, reward): (Vec<f64>, Vec<f64>) = group.iter().flatten().copied().unzip();
            let (mean_length, mean_reward) = (mean(&length), mean(&reward));
            for (length, reward) in length.iter().zip(&reward) {
                let (length, reward) = (length - mean_length, reward - mean_reward);
                both += length * reward;
                lengths += length * length;
                rewards += reward * reward;
            }
        }
        both / (lengths * rewards).sqrt()
    }

    fn conversation_metrics(&self, scores: &[Option<Score>], metrics: &mut Metrics) {
        let fidelity: Vec<Fidelity> =
            self.episodes.iter().filter_map(|episode| Some(episode.transcript.as_ref()?.fidelity)).collect();
        if fidelity.is_empty() {
            return;
        }
        let turns: Vec<f64> = self.episodes.iter().map(|episode| episode.turns.len() as f64).collect();
        metrics.set("turns/mean", mean(&turns));
        metrics.set("turns/min", turns.iter().copied().fold(f64::NAN, f64::min));
        metrics.set("turns/max", turns.iter().copied().fold(f64::NAN, f64::max));
        let judged = || scores.iter().flatten().flat_map(|score| &score.turns);
        let calls: usize = judged().map(|turn| turn.calls).sum();
        let failed: usize = judged().map(|turn| turn.failed_calls).sum();
        metrics.set("tools/call_frequency", calls as f64 / turns.len() as f64);
        metrics.set("tools/failure_frequency", failed as f64 / calls.max(1) as f64);
        for (name, other) in [("tokens", Fidelity::Text), ("text", Fidelity::Differs)] {
            let count = fidelity.iter().filter(|fidelity| **fidelity == other).count();
            metrics.set(format!("rendering/other_{name}"), count as f64 / fidelity.len() as f64);
        }
    }

    /// One row an episode. `values` holds what the method made of each of them, by name: its advantage, say.
    pub fn table(&self, step: u64, scores: &[Option<Score>], values: &[(&str, &[f64])]) -> Table {
        let episodes = &self.episodes;
        let signed = |ids: &[u32]| ids.iter().map(|&id| id as i32).collect();
        let mut table = Table::default();
        table.push("step", Column::Integer(vec![step as i64; episodes.len()]));
        table.push("prompt_id", Column::Integer(episodes.iter().map(|e| i64::from(e.prompt_id)).collect()));
        table.push("sample", Column::Integer(episodes.iter().map(|e| i64::from(e.sample)).collect()));
        let texts = (0..episodes.len()).map(|index| self.prompt_of(index).text.clone()).collect();
        table.push("prompt", Column::Text(texts));
        let completion = |episode: &Episode| match &episode.transcript {
            Some(transcript) => transcript.text.clone(),
            None => episode.text.clone(),
        };
        table.push("completion", Column::Text(episodes.iter().map(completion).collect()));
        let rewards = scores.iter().map(|score| score.as_ref().map(|score| score.value)).collect();
        table.push("reward", Column::Number(rewards));
        for name in part_names(scores) {
            let values = scores.iter().map(|score| part(score.as_ref()?, name)).collect();
            table.push(format!("rewards/{name}"), Column::Number(values));
        }
        let status = |score: &Option<Score>| score.as_ref().map_or("", |score| score.status.name()).to_owned();
        table.push("status", Column::Text(scores.iter().map(status).collect()));
        for (name, values) in values {
            table.push(*name, Column::Number(values.iter().copied().map(Some).collect()));
        }
        table.push("truncated", Column::Flag(episodes.iter().map(|e| e.finish == Finish::Length).collect()));
        table.push("prompt_ids", Column::Integers(episodes.iter().map(|e| signed(&e.prompt)).collect()));
        table.push("completion_ids", Column::Integers(episodes.iter().map(|e| signed(&e.completion)).collect()));
        table.push("log_probs", Column::Numbers(episodes.iter().map(|e| e.log_probs.clone()).collect()));
        if episodes.iter().any(|episode| episode.transcript.is_some()) {
            let rewards = |score: &Option<Score>| {
                score.iter().flat_map(|score| &score.turns).map(|turn| turn.reward as f32).collect()
            };
            table.push("turn_rewards", Column::Numbers(scores.iter().map(rewards).collect()));
        }
        let columns = |index| serde_json::Value::Object(self.prompt_of(index).columns.clone()).to_string();
        table.push("columns", Column::Text((0..episodes.len()).map(columns).collect()));
        table
    }
}

/// The value of each score; `None` where no reward applied.
pub fn values(scores: &[Option<Score>]) -> Vec<Option<f64>> {
    scores.iter().map(|score| score.as_ref().map(|score| score.value)).collect()
}

/// The names of the parts of the scores, in the order of their first appearance.
fn part_names(scores: &[Option<Score>]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in scores.iter().flatten().flat_map(|score| &score.parts) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    names
}

fn part(score: &Score, name: &str) -> Option<f64> {
    score.parts.iter().find(|(part, _)| part == name).map(|(_, value)| *value)
}
