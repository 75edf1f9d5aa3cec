//! Online preference optimisation: the model's own answers are judged against each other, and the better one is preferred.
//!
//! ```text
//! for each prompt:  a ~ π,  b ~ opponent             the opponent: π again, the reference, a mixture of the two, or an average
//!                   the reward decides which is chosen, which rejected
//! L = preference loss of the pairs                   sigmoid, ipo, ...: see the objective
//!     + α mean log π(b)                              XPO: what the reference says becomes less likely
//! L = - mean [(P(a beats b) - 1/2) log π(a)] + β KL  Nash-MD, instead
//! ```
//!
//! Online DPO: Guo et al., "Direct Language Model Alignment from Online AI Feedback", arXiv 2402.04792. XPO: Xie et al.,
//! arXiv 2405.21046. Nash-MD: Munos et al., "Nash Learning from Human Feedback", arXiv 2312.00886. A step samples a pair for
//! each of `prompts_per_step` prompts, scores it with the rewards of the recipe, and moves the weights once. The losses are
//! those of [`mod@objectives::preference`] and [`mod@objectives::online`].
//!
//! - The reference is the model the stage started from; with an adapter it is the model without the adapter.
//! - Log-probabilities are those of the temperature-scaled distribution, in sampling and in training.
//! - The prompt of a pair is computed once for both completions.
//!
//! Deviations from the papers and TRL:
//! 1. A pair whose rewards are equal, or one of whose completions has none, says nothing: it has no loss, but counts in the
//!    denominator. TRL prefers its first completion.
//! 2. The mixture is of logits, at every token, as in TRL; with an adapter it takes a second copy of the base model. The paper
//!    approximates it in the same way (section 7).
//! 3. `ipo` compares log-ratios per token, as everywhere; TRL's online trainers compare sums.
//!
//! Metrics, named as TRL names them:
//! - `loss`, and `grad_norm`, the norm of its gradient before clipping.
//! - `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`, `logps/*`, of pairs: see
//!   [`mod@objectives::preference`]. `objective/kl`, `loss/score`, of Nash-MD: see [`mod@objectives::online`].
//! - `objective/scores`: mean reward. `objective/scores_margin`: mean difference within pairs. `frac_pairs_tied`: share of
//!   pairs that say nothing.
//! - `reward`, `status/*`, `completions/*` and the other metrics of sampling: see [`mod@crate::rollouts`].
//! - `policy_win_rate`, where the opponent is another model: share of pairs the policy wins, ties counted half.

use std::path::Path;
use std::time::Instant;

use base::Purpose;
use data::Prompt;
use envs::Reward;
use model::decoder::{Decoder, WeightFormat};
use objectives::{NashMdBatch, PairBatch, PairLoss};
use rollout::{Episode, Mean, Mixture};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use crate::carried;
use crate::error::Result;
use crate::method::{Method, Report, Step};
use crate::metrics::mean;
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::Order;
use crate::pass::{Sequence, Unit};
use crate::reference::{MovingReference, Reference, SyncOptions};
use crate::rollouts::{self, Groups, Record, Rollouts};
use crate::timing::Phase;
use crate::update::{self, Batch, Folds, Known, Reading, Scope};

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "online_dpo",
        title: "online direct preference optimisation",
        paper: "Guo et al. 2024, arXiv 2402.04792",
        formula: "L = - mean log σ(β (h_c - h_r)), both completions sampled from π",
        settings: "",
    },
    Preset {
        name: "xpo",
        title: "exploratory preference optimisation",
        paper: "Xie et al. 2024, arXiv 2405.21046",
        formula: "L = - mean log σ(β (h_c - h_r)) + α mean log π(b), b sampled from the reference",
        settings: "opponent = \"reference\"\nexploration = 1e-5",
    },
    Preset {
        name: "nash_md",
        title: "Nash mirror descent, against a mixture of policy and reference",
        paper: "Munos et al. 2023, arXiv 2312.00886",
        formula: "L = - mean (P(a beats b) - 1/2) log π(a) + β mean KL(π ‖ π_ref), b sampled from π^{1 - α} π_ref^α",
        settings: "loss = \"nash\"\nopponent = \"mixture\"\nmixture_coef = 0.5",
    },
    Preset {
        name: "nash_emd",
        title: "Nash mirror descent, against a moving average of the policy",
        paper: "Munos et al. 2023, arXiv 2312.00886, section 7",
        formula: "L = - mean (P(a beats b) - 1/2) log π(a) + β mean KL(π ‖ π_ref), b sampled from the average",
        settings: "loss = \"nash\"\nopponent = \"average\"\naverage = { mixup_alpha = 0.05, steps = 1 }",
    },
];

/// Options of online preference optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OnlinePreferenceOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// Prompts of one step; each gets a pair of completions.
    #[schemars(range(min = 1, max = 65_536))]
    pub prompts_per_step: usize,
    /// Whom the policy's completion is judged against.
    pub opponent: Opponent,
    /// Share of the reference in the mixture, where that is the opponent (TRL's name): 0 is the policy, 1 the reference.
    #[schemars(range(min = 0, max = 1))]
    pub mixture_coef: f64,
    /// How the moving average follows the policy, where it is the opponent.
    pub average: SyncOptions,
    /// What is learnt from the judgement.
    pub loss: OnlineLoss,
    /// The parts of the loss of a pair; of them, `nash` takes `beta` alone.
    pub objective: objectives::PreferenceOptions,
    /// Weight of the log-probability of the opponent's completions in the loss (XPO's α).
    #[schemars(range(min = 0))]
    pub exploration: f64,
    /// How completions are sampled.
    pub sampling: rollout::SamplingOptions,
    /// Sequences decoded at once. Results do not depend on it.
    #[schemars(range(min = 1))]
    pub decode_batch_size: usize,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

/// Whom the policy's completion is judged against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Opponent {
    /// Another completion of the policy.
    #[default]
    Policy,
    /// A completion of the reference model.
    Reference,
    /// A completion of the geometric mixture of policy and reference.
    Mixture,
    /// A completion of the moving average of the policy's weights.
    Average,
}

/// What is learnt from the judgement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnlineLoss {
    /// The preference between the two.
    #[default]
    Pair,
    /// The policy gradient of winning, less the divergence from the reference.
    Nash,
}

impl Default for OnlinePreferenceOptions {
    fn default() -> Self {
        Self {
            method: "online_dpo".into(),
            prompts_per_step: 16,
            opponent: Opponent::Policy,
            mixture_coef: 0.5,
            average: SyncOptions::default(),
            loss: OnlineLoss::Pair,
            objective: objectives::PreferenceOptions::default(),
            exploration: 0.0,
            sampling: rollout::SamplingOptions::default(),
            decode_batch_size: 32,
            training: TrainingOptions::default(),
        }
    }
}

impl OnlinePreferenceOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("prompts_per_step", self.prompts_per_step, (1..=65_536).contains(&self.prompts_per_step), "1 to 65536")?;
        check("decode_batch_size", self.decode_batch_size, self.decode_batch_size > 0, "at least 1")?;
        self.sampling.validate().map_err(|error| OptionError::new("sampling", error.to_string()))?;
        let drawn = !self.sampling.is_greedy();
        check("sampling.temperature", self.sampling.temperature, drawn, "a number above 0: a pair needs to differ")?;
        let coefficient = self.mixture_coef;
        check("mixture_coef", coefficient, (0.0..=1.0).contains(&coefficient), "0 to 1")?;
        self.average.validate().map_err(|error| error.within("average"))?;
        self.objective.validate().map_err(|error| OptionError::new("objective", error.to_string()))?;
        let weighting = self.objective.use_weighting;
        check("objective.use_weighting", weighting, !weighting, "false: the pairs are the policy's own already")?;
        let ranks = self.objective.loss_type.iter().any(|loss| loss.compares_pairs());
        check("objective.loss_type", "aot", !ranks, "a loss of single pairs, since tied ones are left out")?;
        let learns = self.objective.loss_type.contains(&PairLoss::Sft);
        let expected = "a loss that compares, since of a tied pair no completion is chosen";
        check("objective.loss_type", "sft", !learns, expected)?;
        let mixes = self.objective.worst_case.is_some();
        check("objective.worst_case", "one", !mixes, "none, since it weighs all pairs, and tied ones are left out")?;
        let explores = self.exploration.is_finite() && self.exploration >= 0.0;
        check("exploration", self.exploration, explores, "a number, at least 0")?;
        let meant = self.exploration == 0.0 || (self.opponent != Opponent::Policy && self.loss == OnlineLoss::Pair);
        check("exploration", self.exploration, meant, "0: it is for pairs with another opponent than the policy")?;
        self.training.validate().map_err(|error| error.within("training"))
    }

    /// Whether the model the stage starts from is needed: to compare with, or as the opponent.
    pub fn needs_reference(&self) -> bool {
        let compared = self.loss == OnlineLoss::Nash || self.objective.needs_reference();
        compared || matches!(self.opponent, Opponent::Reference | Opponent::Mixture)
    }
}

/// Online preference optimisation on a list of prompts.
pub struct OnlinePreference {
    options: OnlinePreferenceOptions,
    prompts: Vec<Prompt>,
    reward: Box<dyn Reward>,
    reference: Reference,
    average: Option<MovingReference>,
    /// With an adapter, the base model as the other half of a mixture.
    base: Option<Decoder>,
}

impl OnlinePreference {
    /// Training on these prompts with this reward. A prompt and what its answers are judged by are one record.
    ///
    /// # Errors
    /// Options that mean nothing.
    pub fn new(options: OnlinePreferenceOptions, prompts: Vec<Prompt>, reward: Box<dyn Reward>) -> Result<Self> {
        options.validate().map_err(|error| error.within("online_preference"))?;
        let reference = Reference::new(options.needs_reference(), None, 0);
        let average = (options.opponent == Opponent::Average).then(|| MovingReference::new(options.average));
        Ok(Self { options, prompts, reference, average, base: None, reward })
    }

    /// A pair of completions for every prompt: the policy's, then the opponent's.
    fn sample<'p>(&mut self, step: &mut Step<'_>, prompts: &[&'p Prompt]) -> Result<Groups<'p>> {
        let rollouts = |num_generations| Rollouts {
            sampling: &self.options.sampling,
            num_generations,
            decode_batch_size: self.options.decode_batch_size,
            weights: WeightFormat::Full,
            record: Record::default(),
        };
        let random = step.random(Purpose::Sampling);
        let other = step.random(Purpose::Opponent);
        let theirs = match (self.options.opponent, &mut self.average) {
            (Opponent::Average, Some(average)) => {
                rollouts(1).sample_from(average.decoder(step)?, step, other, prompts)?
            }
            (Opponent::Reference, _) => match step.reference {
                Some(reference) => rollouts(1).sample_from(reference, step, other, prompts)?,
                None => {
                    step.decoder.set_adapter(false);
                    let found = rollouts(1).sample(step, other, prompts);
                    step.decoder.set_adapter(true);
                    found?
                }
            },
            (Opponent::Mixture, _) => {
                let reference = match step.reference {
                    Some(reference) => reference,
                    None => {
                        let base = self.base.get_or_insert_with(|| step.decoder.without_adapter());
                        base.prepare(step.precision);
                        &*base
                    }
                };
                let others = [(reference, self.options.mixture_coef)];
                let mixture = Mixture::new(&others, Mean::Geometric, &self.options.sampling);
                rollouts(1).sample_with(Some(&mixture), step, other, prompts)?
            }
            _ => return rollouts(2).sample(step, random, prompts),
        };
        let ours = rollouts(1).sample(step, random, prompts)?;
        let mut prompt_tokens = ours.prompt_tokens;
        prompt_tokens.computed += theirs.prompt_tokens.computed;
        prompt_tokens.reused += theirs.prompt_tokens.reused;
        // Each model numbered its own samples.
        let numbered = |episode: Episode, place| Episode { sample: 2 * episode.sample + place, ..episode };
        let both = ours.episodes.into_iter().zip(theirs.episodes);
        let episodes = both.flat_map(|(ours, theirs)| [numbered(ours, 0), numbered(theirs, 1)]).collect();
        let traces = ours.traces.zip(theirs.traces).map(|((environment, ours), (_, theirs))| {
            (environment, ours.into_iter().zip(theirs).flat_map(|(ours, theirs)| [ours, theirs]).collect())
        });
        Ok(Groups { prompts: prompts.to_vec(), size: 2, episodes, prompt_tokens, recorded: 0, traces })
    }

    fn reading(&self) -> Reading {
        Reading {
            temperature: self.options.sampling.log_prob_temperature(),
            ..Reading::plain(self.options.training.micro_batch_tokens)
        }
    }

    /// Gathers the gradients of the loss of pairs.
    fn learn_pairs(
        &mut self,
        step: &mut Step<'_>,
        groups: &Groups<'_>,
        judged: &[Judged],
        statistics: &mut Folds,
    ) -> Result<(f64, u64)> {
        let units = groups.prompts.iter().zip(groups.episodes.chunks(2)).zip(judged).map(|((prompt, pair), judged)| {
            let (chosen, rejected) = if judged.first_wins() { (&pair[0], &pair[1]) } else { (&pair[1], &pair[0]) };
            Unit { prompt: &prompt.ids, sequences: vec![sequence(chosen), sequence(rejected)] }
        });
        let batch = Batch::new(units.collect());
        let reading = self.reading();
        let objective = &self.options.objective;
        let reference = match objective.needs_reference() {
            true => self.reference.log_probs(step, &batch, &[], reading)?,
            false => None,
        };
        let weight = 1.0 / judged.len() as f64;
        let weights: Vec<f64> = judged.iter().map(|judged| if judged.tied() { 0.0 } else { weight }).collect();
        // The opponent's completion is the second of the sampled pair.
        let explored: Vec<u32> = judged.iter().map(|judged| u32::from(judged.first_wins())).collect();
        let exploration = self.options.exploration;
        let all = 0..batch.units();
        let gathered =
            update::gradients(step, &batch, all, reading, (Scope::Piece, Known::Nothing), statistics, |piece| {
                let pairs = PairBatch {
                    log_probs: piece.log_probs.clone(),
                    reference_log_probs: reference.as_deref().map(|all| piece.of_tokens(all)).transpose()?,
                    sharpened_log_probs: None,
                    sequence: piece.sequence(),
                    sequences_per_pair: 2,
                    weights: piece.constant(&weights[piece.units.clone()])?,
                    sft_tokens: 0,
                    prompts: (0..).take(piece.units.len()).collect(),
                };
                objectives::xpo(objective, exploration, &pairs, &explored[piece.units.clone()])
            })?;
        Ok((gathered.loss, batch.all_tokens()))
    }

    /// Gathers the gradients of the game against the opponent.
    fn learn_game(
        &mut self,
        step: &mut Step<'_>,
        groups: &Groups<'_>,
        judged: &[Judged],
        statistics: &mut Folds,
    ) -> Result<(f64, u64)> {
        let ours = groups.prompts.iter().zip(groups.episodes.chunks(2));
        let units = ours.map(|(prompt, pair)| Unit { prompt: &prompt.ids, sequences: vec![sequence(&pair[0])] });
        let batch = Batch::new(units.collect());
        let reading = self.reading();
        let reference = self.reference.log_probs(step, &batch, &[], reading)?.unwrap_or_default();
        let preferences: Vec<f64> = judged.iter().map(Judged::preference).collect();
        let weights = vec![1.0 / judged.len() as f64; judged.len()];
        let beta = self.options.objective.beta;
        let all = 0..batch.units();
        let gathered =
            update::gradients(step, &batch, all, reading, (Scope::Piece, Known::Nothing), statistics, |piece| {
                let game = NashMdBatch {
                    log_probs: piece.log_probs.clone(),
                    reference_log_probs: piece.of_tokens(&reference)?,
                    sequence: piece.sequence(),
                    preferences: preferences[piece.units.clone()].to_vec(),
                    weights: piece.constant(&weights[piece.units.clone()])?,
                };
                objectives::nash_md(beta, &game)
            })?;
        Ok((gathered.loss, batch.all_tokens()))
    }
}

/// How a pair was judged: the reward of its first completion less that of its second, if both have one.
#[derive(Clone, Copy, Debug)]
struct Judged(Option<f64>);

impl Judged {
    fn first_wins(&self) -> bool {
        self.0.is_none_or(|margin| margin >= 0.0)
    }

    fn tied(&self) -> bool {
        self.0.is_none_or(|margin| margin == 0.0)
    }

    /// How often the first is preferred.
    fn preference(&self) -> f64 {
        if self.tied() { 0.5 } else { f64::from(u8::from(self.first_wins())) }
    }
}

fn sequence(episode: &Episode) -> Sequence<'_> {
    Sequence { ids: &episode.completion, mask: &episode.loss_mask }
}

impl Method for OnlinePreference {
    fn name(&self) -> &str {
        &self.options.method
    }

    fn training(&self) -> &TrainingOptions {
        &self.options.training
    }

    fn rows(&self) -> usize {
        self.prompts.len()
    }

    fn rows_per_step(&self) -> usize {
        self.options.prompts_per_step
    }

    fn needs_reference(&self) -> bool {
        self.reference.needs_start()
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        let prompts = std::mem::take(&mut self.prompts);
        let report = self.round(step, &prompts);
        self.prompts = prompts;
        report
    }

    fn save(&self, folder: &Path) -> Result<()> {
        carried::save_reward(folder, &*self.reward)?;
        self.average.as_ref().map_or(Ok(()), |average| average.save(folder))
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        carried::load_reward(folder, &*self.reward)?;
        self.average.as_mut().map_or(Ok(()), |average| average.load(folder))
    }
}

impl OnlinePreference {
    /// One step: sample, judge, learn.
    fn round(&mut self, step: &mut Step<'_>, all: &[Prompt]) -> Result<Report> {
        let rows = Order::new(all.len(), step.seed, step.stage).batch(step.index, self.options.prompts_per_step);
        let prompts: Vec<&Prompt> = rows.iter().map(|&row| &all[row]).collect();
        let groups = self.sample(step, &prompts)?;
        let scores = groups.score(step, &*self.reward)?;
        let rewards = rollouts::values(&scores);
        let judged: Vec<Judged> =
            rewards.chunks(2).map(|pair| Judged(pair[0].zip(pair[1]).map(|(a, b)| a - b))).collect();

        let started = Instant::now();
        step.decoder.prepare(step.precision);
        step.spent(Phase::Train, started);
        let mut statistics = Folds::default();
        let (loss, tokens) = match self.options.loss {
            OnlineLoss::Pair => self.learn_pairs(step, &groups, &judged, &mut statistics)?,
            OnlineLoss::Nash => self.learn_game(step, &groups, &judged, &mut statistics)?,
        };
        let grad_norm = step.update()?;
        if let Some(average) = &mut self.average {
            average.follow(step);
        }

        let mut metrics = groups.metrics(&scores);
        metrics.set("loss", loss);
        metrics.set("grad_norm", grad_norm);
        statistics.record(&mut metrics);
        let share = |of: &dyn Fn(&Judged) -> f64| mean(&judged.iter().map(of).collect::<Vec<_>>());
        let margins: Vec<f64> = judged.iter().filter_map(|judged| judged.0.map(f64::abs)).collect();
        metrics.set("objective/scores", mean(&rewards.iter().flatten().copied().collect::<Vec<_>>()));
        metrics.set("objective/scores_margin", mean(&margins));
        metrics.set("frac_pairs_tied", share(&|judged| f64::from(u8::from(judged.tied()))));
        if self.options.opponent != Opponent::Policy {
            metrics.set("policy_win_rate", share(&Judged::preference));
        }
        let preferred: Vec<f64> =
            judged.iter().flat_map(|judged| [judged.preference(), 1.0 - judged.preference()]).collect();
        let table = groups.table(step.number, &scores, &[("preferred", &preferred[..])]);
        Ok(Report { metrics, tokens, episodes: Some(table) })
    }
}
