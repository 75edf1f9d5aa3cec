//! Value models that guide decoding: what a return will be, learned from how a reference model goes on.
//!
//! ```text
//! Z(x, y)     law of the return when token y follows x and the reference writes the rest
//! bernoulli   L = - 1/T Σ_t R log p(x_t, y_t) + (1 - R) log(1 - p(x_t, y_t))          one output, the log-odds of a return of 1
//! histogram   L = - 1/T Σ_t log p_{bin(R)}(x_t, y_t)                                   `bins` outputs
//! squared     L =   1/T Σ_t (v(x_t, y_t) - R)²                                         one output, the mean of the return
//! ```
//!
//! The reference is never trained. It is guided when it answers: `posttrain generate --guide` draws tokens from
//! `π(y | x) ∝ π_ref(y | x) exp(Q(x, y) / η)` with `Q` computed from the law of the return, for any `η`, which the value model does not
//! depend on ([`mod@rollout::guidance`]). A value model may be smaller than its reference; the vocabulary must be the same.
//!
//! **Heads.** With `head = "state"`, Q♯'s V-type, the head is read at the candidate itself, at the end of `x y`, and has the outputs above. With `head = "action"`, its
//! Q-type, it is read at the end of `x` and has these outputs for each token `y` of the vocabulary: one pass of the model then gives the values of all candidates, from as many
//! times the weights in the head. Learning is the same: of all outputs at `x` those of the token that came have a loss, and only they are computed. Either head has a bias and takes the place of
//! the language model's; what is trained is saved as `...ForTokenClassification`. The head of a guide is not to be seen in its file: `--guide-head` says it, as `--guide-loss` says the loss.
//!
//! **Rounds.** In each of `rounds` the reference answers all prompts `num_generations` times, and the model then learns all tokens of all
//! rounds so far. In the first the answers are the reference's from the start. Later, the reference guided by the model as it is answers first; a number
//! below the length of that answer is drawn, and the reference alone goes on after so many of its tokens. So the states are those that guidance leads to, and the
//! returns those of the reference.
//!
//! **Labels.** A token is labelled with the return if the reference wrote everything after it: the last token of a guided beginning, and all
//! that follow. Earlier ones are not: part of what came after them is the guide's work. With `prefixes = false` the first of them is the only one.
//!
//! The laws are those of the reference as it samples: guide with the temperature and the filters of `sampling`. They are of use where the state after a token is certain; an environment that answers in between is refused.
//!
//! Deviations from Q♯ (Zhou et al. 2025):
//! 1. The switch from guide to reference is drawn within the guided answer and not within the longest answer allowed, most of whose positions no
//!    answer reaches.
//! 2. Training goes on from round to round, where the paper's trains on all data again.
//! 3. Batches are not balanced between returns of 0 and 1: it would move `p`, and `Q` with it.
//!
//! Metrics, beside those of [`crate::rollouts`] in the first step of a round:
//! - `loss`, `grad_norm`; `accuracy` of all tokens' verdicts or `mse`, as in [`mod@objectives::reward`].
//! - `calibration/quarter_1` to `calibration/quarter_4`, with `bernoulli`: expected calibration error of `p` before the update, in the first quarter of the
//!   labelled tokens of each answer, and so on.
//! - `value/episodes`, `value/tokens`: answers and labelled tokens learned from so far in all rounds. `value/sampled_tokens`: tokens sampled for the round, those
//!   of guided answers that were cut away included.

use std::ops::Range;
use std::path::Path;

use base::{Purpose, Random};
use data::Prompt;
use envs::Reward;
use eval::calibration::calibration;
use model::config::{HeadTask, ScoreHead};
use model::decoder::{Decoder, WeightFormat};
use objectives::Loss;
use objectives::reward::{self, LabelLoss};
use rollout::{Episode, GuidanceOptions, Returns, SamplingOptions, ValueHead, ValueOutputs};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use crate::carried;
use crate::error::{Error, Result};
use crate::method::{Method, Report, Step};
use crate::metrics::Metrics;
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::{Order, even_parts};
use crate::rollouts::{Groups, Record, Rollouts, values};
use crate::scoring::{self, Batch, Scored, Unit};
use crate::table::Table;
use crate::update::Scope;

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "q_sharp",
        title: "Q♯: the law of the return, for guidance at any price of divergence",
        paper: "Zhou et al. 2025, arXiv 2502.20548",
        formula: "L = - 1/T Σ_t [R log p + (1 - R) log(1 - p)],  Q = η log(1 - p + p e^{1/η})",
        settings: "loss_type = \"bernoulli\"\nrounds = 2",
    },
    Preset {
        name: "fudge",
        title: "future discriminators: the limit of a small price",
        paper: "Yang and Klein 2021, arXiv 2104.05218",
        formula: "L = - 1/T Σ_t [R log p + (1 - R) log(1 - p)],  π ∝ π_ref p",
        settings: "loss_type = \"bernoulli\"\nrounds = 1\n[guidance]\neta = 0.001",
    },
    Preset {
        name: "controlled_decoding",
        title: "controlled decoding: the mean of the return",
        paper: "Mudgal et al. 2023, arXiv 2310.17022; value augmented sampling: Han et al. 2024, arXiv 2405.06639",
        formula: "L = 1/T Σ_t (v - R)²,  π ∝ π_ref e^{v/η}",
        settings: "loss_type = \"squared\"\nrounds = 1\n[guidance]\nworth = \"expected\"",
    },
];

/// What is learned of the return.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReturnLoss {
    /// The probability of a return of 1; returns lie between 0 and 1.
    #[default]
    Bernoulli,
    /// The probabilities of `bins` returns from `return_low` to `return_high`; each return counts for the nearest.
    Histogram,
    /// The mean.
    Squared,
}

/// Options of value models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ValueModelOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// The model that is to be guided, and is not trained: a named model, a Hugging Face folder, a run or checkpoint, or a GGUF file, with
    /// the vocabulary of the model that is trained. Absent, it is the model that training starts from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// What is learned of the return: `bernoulli`, `histogram` or `squared`.
    pub loss_type: ReturnLoss,
    /// Where the value of a token is read: `state`, at the token, behind all that comes before it, or `action`, before the token, from outputs of its own, so
    /// that one pass gives the values of all tokens that may come next.
    pub head: ValueHead,
    /// With `histogram`: outputs of the head, or of the head for each token.
    #[schemars(range(min = 2, max = 65_536))]
    pub bins: usize,
    /// With `histogram`: the return of the first bin.
    pub return_low: f64,
    /// With `histogram`: the return of the last bin.
    pub return_high: f64,
    /// Rounds of sampling and learning.
    #[schemars(range(min = 1, max = 1024))]
    pub rounds: usize,
    /// Completions sampled for each prompt in each round.
    #[schemars(range(min = 1, max = 65_536))]
    pub num_generations: usize,
    /// Learn the return after every token that the reference goes on from, not after the first of them alone.
    pub prefixes: bool,
    /// Who begins the answers from the second round on: the reference, guided like this.
    pub guidance: GuidanceOptions,
    /// Completions of one optimiser step.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_size: usize,
    /// How completions are sampled. The value model is of use where its reference samples like this.
    pub sampling: SamplingOptions,
    /// Sequences decoded at once. Results do not depend on it.
    #[schemars(range(min = 1))]
    pub decode_batch_size: usize,
    /// How long the stage lasts and how the weights move. An epoch is as many completions as one round samples.
    pub training: TrainingOptions,
}

impl Default for ValueModelOptions {
    fn default() -> Self {
        Self {
            method: "q_sharp".into(),
            reference: None,
            loss_type: ReturnLoss::default(),
            head: ValueHead::default(),
            bins: 11,
            return_low: 0.0,
            return_high: 1.0,
            rounds: 2,
            num_generations: 16,
            prefixes: true,
            guidance: GuidanceOptions::default(),
            batch_size: 128,
            sampling: SamplingOptions::default(),
            decode_batch_size: 32,
            training: TrainingOptions::default(),
        }
    }
}

/// Sequences and their tokens that are valued, as such a head is read, which has `width` outputs that speak of one token.
pub fn valued<'a>(
    sequences: impl Iterator<Item = (&'a [u32], Range<usize>)>,
    head: ValueHead,
    width: usize,
) -> Batch<'a> {
    let read = |token: usize| if head == ValueHead::Action { token - 1 } else { token };
    let unit =
        |(ids, tokens): (&'a [u32], Range<usize>)| Unit::new(vec![Scored { ids, at: tokens.map(read).collect() }]);
    let batch = Batch::new(sequences.map(unit).collect());
    match head {
        ValueHead::State => batch,
        ValueHead::Action => batch.of_next_tokens(width),
    }
}

impl ValueModelOptions {
    /// Refuses values that mean nothing.
    ///
    /// # Errors
    /// The option, what it is, and what it may be.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("bins", self.bins, (2..=65_536).contains(&self.bins), "2 to 65536")?;
        let (low, high) = (self.return_low, self.return_high);
        check("return_low", low, low.is_finite(), "a number")?;
        check("return_high", high, high.is_finite() && high > low, "a number above return_low")?;
        check("rounds", self.rounds, (1..=1024).contains(&self.rounds), "1 to 1024")?;
        let generations = self.num_generations;
        check("num_generations", generations, (1..=65_536).contains(&generations), "1 to 65536")?;
        check("batch_size", self.batch_size, (1..=1 << 20).contains(&self.batch_size), "1 to 1048576")?;
        check("decode_batch_size", self.decode_batch_size, self.decode_batch_size > 0, "at least 1")?;
        self.guidance.validate().map_err(|error| OptionError::new("guidance", error.to_string()))?;
        self.sampling.validate().map_err(|error| OptionError::new("sampling", error.to_string()))?;
        self.training.validate().map_err(|error| error.within("training"))
    }

    /// What the outputs of the model are.
    pub fn outputs(&self) -> ValueOutputs {
        let returns = match self.loss_type {
            ReturnLoss::Bernoulli => Returns::Bernoulli,
            ReturnLoss::Histogram => Returns::Histogram { low: self.return_low, high: self.return_high },
            ReturnLoss::Squared => Returns::Mean,
        };
        ValueOutputs { head: self.head, returns }
    }

    /// Outputs that speak of one token.
    fn width(&self) -> usize {
        if self.loss_type == ReturnLoss::Histogram { self.bins } else { 1 }
    }

    /// The score head of a model over a vocabulary of this size.
    pub fn score_head(&self, vocabulary: usize) -> ScoreHead {
        let tokens = if self.head == ValueHead::Action { vocabulary } else { 1 };
        ScoreHead { outputs: tokens * self.width(), task: HeadTask::Token }
    }

    /// Answers with the tokens that are labelled, as they are scored.
    fn batch<'a>(&self, rows: &[&'a Labelled]) -> Batch<'a> {
        let labelled = rows.iter().map(|row| (&row.ids[..], row.labelled.clone()));
        valued(labelled, self.head, self.width())
    }

    /// The returns that the loss can speak of.
    fn range(&self) -> (f64, f64, &'static str) {
        match self.loss_type {
            ReturnLoss::Bernoulli => (0.0, 1.0, "0 to 1, as loss_type is \"bernoulli\""),
            ReturnLoss::Histogram => (self.return_low, self.return_high, "return_low to return_high"),
            ReturnLoss::Squared => (f64::NEG_INFINITY, f64::INFINITY, "a number"),
        }
    }

    /// The loss of scores, items × outputs, with the return and the weight of each item.
    fn loss(&self, scores: &candle_core::Tensor, returns: &[f64], weights: &[f64]) -> objectives::Result<Loss> {
        match self.loss_type {
            ReturnLoss::Bernoulli => reward::labelled(LabelLoss::Bce, scores, returns, weights),
            ReturnLoss::Squared => reward::labelled(LabelLoss::Mse, scores, returns, weights),
            ReturnLoss::Histogram => {
                let step = (self.return_high - self.return_low) / (self.bins - 1) as f64;
                let bin = |value: &f64| ((value - self.return_low) / step).round() as u32;
                let bins: Vec<u32> = returns.iter().map(bin).collect();
                reward::classified(&scores.reshape((returns.len(), self.bins))?, &bins, weights)
            }
        }
    }
}

/// An answer, and what is learned from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Labelled {
    /// Prompt and completion.
    ids: Vec<u32>,
    /// The tokens that are labelled.
    labelled: Range<usize>,
    /// With this.
    value: f64,
}

impl Labelled {
    /// The labels of an answer whose forced tokens a guide wrote.
    fn new(episode: &Episode, value: f64, prefixes: bool) -> Self {
        let guided = episode.loss_mask.iter().take_while(|sampled| !**sampled).count();
        let first = episode.prompt.len() + guided.saturating_sub(1);
        let ids = [&episode.prompt[..], &episode.completion].concat();
        let end = if prefixes { ids.len() } else { ids.len().min(first + 1) };
        Self { ids, labelled: first..end, value }
    }
}

/// The file of a checkpoint that holds the answers of all rounds so far.
const ANSWERS: &str = "value_model_answers.json";

/// Training of a value model.
pub struct ValueModel {
    options: ValueModelOptions,
    reference: Decoder,
    prompts: Vec<Prompt>,
    reward: Box<dyn Reward>,
    /// The answers of all rounds so far.
    answers: Vec<Labelled>,
}

impl ValueModel {
    /// Learning what this reward pays for the reference's answers to these prompts.
    ///
    /// # Errors
    /// Options that mean nothing.
    pub fn new(
        options: ValueModelOptions,
        reference: Decoder,
        prompts: Vec<Prompt>,
        reward: Box<dyn Reward>,
    ) -> Result<Self> {
        options.validate().map_err(|error| error.within("value_model"))?;
        Ok(Self { options, reference, prompts, reward, answers: Vec::new() })
    }

    /// The number of the round that a step belongs to, and that of the step within it.
    fn round(&self, index: u64) -> (usize, u64) {
        let steps = self.options.training.steps(self.rows(), self.rows_per_step());
        let rounds = even_parts(steps as usize, self.options.rounds).into_iter().filter(|round| !round.is_empty());
        let begun = rounds.enumerate().take_while(|(_, round)| round.start as u64 <= index);
        begun.last().map_or((0, index), |(number, round)| (number, index - round.start as u64))
    }

    /// Samples the answers of a round, and adds what is learned from them.
    fn collect(&mut self, step: &mut Step<'_>, round: usize) -> Result<(Metrics, Table)> {
        let options = &self.options;
        self.reference.prepare(step.precision);
        step.decoder.prepare(step.precision);
        let prompts: Vec<&Prompt> = self.prompts.iter().collect();
        let rollouts = Rollouts {
            sampling: &options.sampling,
            num_generations: options.num_generations,
            decode_batch_size: options.decode_batch_size,
            weights: WeightFormat::Full,
            record: Record::default(),
        };
        let (mut beginnings, mut sampled) = (Vec::new(), 0);
        if round > 0 {
            let random = step.random(Purpose::RollIn);
            let guide = (options.outputs(), &options.guidance);
            let guided = rollouts.sample_guided(&self.reference, guide, step, random, &prompts)?;
            sampled += tokens(&guided);
            beginnings.extend(guided.episodes.into_iter().map(|episode| beginning(episode, random)));
        }
        let random = step.random(Purpose::Sampling);
        let groups = rollouts.continue_from(&self.reference, step, random, (&prompts, &beginnings))?;
        sampled += tokens(&groups);
        let scores = groups.score(step, &*self.reward)?;
        for (episode, value) in groups.episodes.iter().zip(values(&scores)) {
            let Some(value) = value else { continue };
            let (low, high, expected) = options.range();
            if !(low..=high).contains(&value) {
                let source = objectives::Error::Range { what: "a return", got: value, expected };
                return Err(step.objective_error()(source));
            }
            self.answers.push(Labelled::new(episode, value, options.prefixes));
        }
        if self.answers.is_empty() {
            return Err(Error::NoData { stage: step.stage + 1, method: options.method.clone() });
        }
        let mut metrics = groups.metrics(&scores);
        metrics.set("value/episodes", self.answers.len() as f64);
        metrics.set("value/tokens", self.answers.iter().map(|answer| answer.labelled.len()).sum::<usize>() as f64);
        metrics.set("value/sampled_tokens", sampled as f64);
        let forced = |episode: &Episode| episode.loss_mask.iter().filter(|sampled| !**sampled).count() as f64;
        let guided: Vec<f64> = groups.episodes.iter().map(forced).collect();
        Ok((metrics, groups.table(step.number, &scores, &[("guided_tokens", &guided)])))
    }
}

/// Tokens that were sampled.
fn tokens(groups: &Groups<'_>) -> usize {
    groups.episodes.iter().flat_map(|episode| &episode.loss_mask).filter(|sampled| **sampled).count()
}

/// The first tokens of a guided answer, at least one fewer than all.
fn beginning(episode: Episode, random: Random) -> Vec<u32> {
    let Episode { prompt_id, sample, mut completion, .. } = episode;
    // A position that no token has.
    let draw = random.prompt(prompt_id).sample(sample).at(u32::MAX);
    completion.truncate(draw.below(completion.len().max(1) as u64) as usize);
    completion
}

impl Method for ValueModel {
    fn name(&self) -> &str {
        &self.options.method
    }

    fn training(&self) -> &TrainingOptions {
        &self.options.training
    }

    fn rows(&self) -> usize {
        self.prompts.len() * self.options.num_generations
    }

    fn rows_per_step(&self) -> usize {
        self.options.batch_size
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        let (round, index) = self.round(step.index);
        let collected = if index == 0 { Some(self.collect(step, round)?) } else { None };
        // Every round is a set of its own.
        let mut order = Order::of_set(self.answers.len(), step.seed, step.stage, round);
        let rows: Vec<&Labelled> =
            order.batch(index, self.options.batch_size).into_iter().map(|row| &self.answers[row]).collect();
        let batch = self.options.batch(&rows);
        let returns: Vec<f64> = rows.iter().flat_map(|row| row.labelled.clone().map(|_| row.value)).collect();
        let mut outputs = Vec::new();
        let mut report =
            scoring::step(step, &batch, self.options.training.micro_batch_tokens, Scope::Piece, |piece| {
                let returns = &returns[piece.items.clone()];
                outputs.extend(piece.scores.to_vec1::<f32>()?);
                self.options.loss(&piece.scores, returns, &vec![1.0 / batch.items() as f64; returns.len()])
            })?;
        if self.options.loss_type == ReturnLoss::Bernoulli {
            let mut quarters: [Vec<(f64, bool)>; 4] = Default::default();
            let mut said = outputs.iter().zip(&returns);
            for row in &rows {
                let count = row.labelled.len();
                for (place, (&logit, &value)) in said.by_ref().take(count).enumerate() {
                    let stated = (Returns::Bernoulli.worth(&[logit], rollout::Worth::Expected, 1.0, 0.0), value > 0.5);
                    quarters[4 * place / count].push(stated);
                }
            }
            for (number, stated) in (1..).zip(&quarters) {
                let error = calibration(stated).map_or(f64::NAN, |found| found.ece);
                report.metrics.set(format!("calibration/quarter_{number}"), error);
            }
        }
        if let Some((metrics, table)) = collected {
            report.metrics.extend(metrics);
            report.episodes = Some(table);
        }
        Ok(report)
    }

    fn save(&self, folder: &Path) -> Result<()> {
        carried::save_reward(folder, &*self.reward)?;
        carried::save(folder, ANSWERS, &self.answers)
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        carried::load_reward(folder, &*self.reward)?;
        self.answers = carried::load(folder, ANSWERS)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rollout::Finish;

    fn episode(forced: usize, sampled: usize) -> Episode {
        let len = forced + sampled;
        Episode {
            prompt_id: 3,
            sample: 1,
            prompt: [7, 8].into(),
            completion: (0..len as u32).collect(),
            loss_mask: (0..len).map(|place| place >= forced).collect(),
            log_probs: vec![0.0; len],
            filtered_log_probs: vec![0.0; len],
            top_log_probs: Vec::new(),
            finish: Finish::Stop,
            turns: Vec::new(),
            transcript: None,
            text: String::new(),
        }
    }

    /// The continuation after the last token of a guided beginning is the reference's; after any earlier one it is not.
    #[test]
    fn labels_begin_with_the_last_guided_token() {
        let labelled = |forced, prefixes| Labelled::new(&episode(forced, 2), 1.0, prefixes).labelled;
        assert_eq!(labelled(0, true), 2..4, "all tokens of an answer that nobody guided");
        assert_eq!(labelled(1, true), 2..5);
        assert_eq!(labelled(3, true), 4..7);
        assert_eq!((labelled(0, false), labelled(3, false)), (2..3, 4..5));
        assert_eq!(Labelled::new(&episode(1, 1), 0.5, true).ids, [7, 8, 0, 1]);
    }

    #[test]
    fn beginnings_are_of_every_length_below_that_of_the_answer() {
        let random = Random::new(1, Purpose::RollIn);
        let mut seen = [0; 4];
        for sample in 0..400 {
            let guided = Episode { sample, ..episode(0, 4) };
            seen[beginning(guided, random).len()] += 1;
        }
        assert!(seen.iter().all(|count| (70..130).contains(count)), "{seen:?}");
    }

    #[test]
    fn options_are_checked() {
        let options = ValueModelOptions::default;
        assert!(options().validate().is_ok());
        assert!(ValueModelOptions { return_high: 0.0, ..options() }.validate().is_err());
        assert!(ValueModelOptions { rounds: 0, ..options() }.validate().is_err());
        let guidance = GuidanceOptions { eta: 0.0, ..GuidanceOptions::default() };
        let error = ValueModelOptions { guidance, ..options() }.validate().map_err(|error| error.to_string());
        assert_eq!(error, Err("guidance: eta is 0, expected a number above 0".into()));
    }

    #[test]
    fn heads_have_outputs_for_a_law_or_for_the_laws_of_all_tokens() {
        for (head, tokens) in [(ValueHead::State, 1), (ValueHead::Action, 300)] {
            for (loss_type, width) in [(ReturnLoss::Bernoulli, 1), (ReturnLoss::Histogram, 11)] {
                let options = ValueModelOptions { loss_type, head, ..ValueModelOptions::default() };
                assert_eq!(options.score_head(300).outputs, tokens * width);
                assert_eq!(options.outputs().refused(tokens * width, 300), None);
            }
        }
    }
}
