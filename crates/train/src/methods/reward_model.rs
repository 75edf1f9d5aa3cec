//! Reward models: a score for a whole completion, learned from comparisons or from labels.
//!
//! ```text
//! bradley_terry   L = 1/P Σ_pairs  -(1 - ε) log σ(u) - ε log σ(-u) + λ (r(x, y_c) + r(x, y_r))²,  u = r(x, y_c) - r(x, y_r) - m
//! bce             L = 1/N Σ  -y log σ(r(x, y)) - (1 - y) log σ(-r(x, y))
//! mse             L = 1/N Σ  (r(x, y) - y)²
//! ```
//!
//! `r` is a linear head with one output, without a bias, over the hidden state of a sequence's last token; it takes the place of the
//! language model's head. A model that has no such head gets one, all zero: every reward is 0 at first, and the loss of pairs `log 2`. With
//! `[lora]` the head is trained with the adapter. What is trained is saved as `...ForSequenceClassification`, which transformers loads.
//!
//! A step takes `batch_size` rows in the order of the epoch. What the two completions of a pair begin with together is computed once.
//!
//! With `worst_case` the mean is the one over the worst mix of the step's rows, or of its prompts ([`mod@objectives::worst_case`]): robust
//! reward learning, Mandal et al., arXiv 2503.00539. Where the labels are noisy, train without it first.
//!
//! With `group_dro` it is the one over known groups, of which those that are learnt worse count more ([`mod@objectives::group_dro`]). Every pair
//! then has a column `group`.
//!
//! With `odin` the model has two heads, for quality and for length, whose outputs add up to the score that pairs are compared by: the second takes on what goes with the
//! length of the completions, and the first is kept from it ([`mod@objectives::odin`]). The first alone is the reward: checkpoints hold both, the model that the run
//! ends with has no other, so that it is a reward model like any other, and evaluations are of it. A length is the number of tokens of a completion. Heads that are new start at random,
//! normal with deviation 0.02: heads of zeros would have no directions of their own. The correlations are of one step, so that `batch_size` should not be small.
//!
//! Several reward models can be made one, the average of their weights (WARM: Ramé et al., arXiv 2401.12187): `posttrain merge RUN RUN ... --average --out MODEL`, heads
//! included. Train them from one model with different seeds, orders or learning rates.
//!
//! Rows: `prompt`, `chosen`, `rejected`, and where there are some `margin` and `group`, for `bradley_terry`; `prompt`, `completion` and `label` (true or
//! false) or `score` (a number) for `bce` and `mse`. With `bce` and labels of final answers this is an outcome reward model (ORM).
//!
//! Deviations from TRL's `RewardTrainer`:
//! 1. The head starts at zero, not at random; but for `odin`.
//! 2. Metrics are over the pairs of a step, not means of the means of micro-batches.
//! 3. The score is always that of the last token; transformers looks for the last token that is no padding, which is another where
//!    sequences end with a token that also pads.
//!
//! Metrics: `loss`; `grad_norm`, the norm of its gradient before clipping; those of [`mod@objectives::reward`]. With `worst_case` or `group_dro`
//! also `row_weights/mean|max`, over rows how much they count relative to the mean; with `group_dro` `group_weights/max`, the weight of the group
//! that counts most. With `odin` also those of [`mod@objectives::odin`], and `quality_accuracy`, the share of pairs that the kept head alone has in order; `accuracy`, `margin` and
//! the others are of the sum.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use data::{Example, PreferencePair, ScoredExample};
use model::config::ScoreHead;
use model::decoder::Decoder;
use objectives::reward::{self, LabelLoss, ScoredPairs};
use objectives::{GroupDro, GroupWeights, Odin, Reduce, Statistic, WorstCase};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use crate::carried;
use crate::error::Result;
use crate::method::{Method, Report, Step};
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::{Order, numbered};
use crate::scoring::{self, Batch, Scored, Unit};
use crate::update::Scope;

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "bradley_terry",
        title: "a reward model from comparisons",
        paper: "Ouyang et al. 2022, arXiv 2203.02155, section 3.5",
        formula: "L = - E log σ(r(x, y_c) - r(x, y_r) - m) + λ E (r(x, y_c) + r(x, y_r))²",
        settings: "loss_type = \"bradley_terry\"",
    },
    Preset {
        name: "dro_reward",
        title: "a distributionally robust reward model: for the worst mix of the prompts",
        paper: "Mandal et al. 2025, arXiv 2503.00539",
        formula: "L = max_q Σ_i q_i l_i, l_i: mean of -log σ(r(x_i, y_c) - r(x_i, y_r)) over the pairs of prompt i, TV(q, 1/n) ≤ 0.2",
        settings: "batch_size = 64\nworst_case = { ball = \"total_variation\", radius = 0.2, over = \"prompts\" }",
    },
    Preset {
        name: "group_dro",
        title: "a reward model for the worst of known groups",
        paper: "Sagawa et al. 2020, arXiv 1911.08731",
        formula: "L = Σ_g q_g L_g, L_g: mean of -log σ(r(x, y_c) - r(x, y_r)) over group g; q_g <- q_g e^{η L_g} / Σ_h q_h e^{η L_h}",
        settings: "group_dro = { step_size = 0.01 }",
    },
    Preset {
        name: "odin",
        title: "ODIN: a head for quality, and one for length that is thrown away",
        paper: "Chen et al. 2024, arXiv 2402.07319",
        formula: "L = - E log σ((q + l)(x, y_c) - (q + l)(x, y_r)) + λ_L (|ρ(q, len)| - ρ(l, len)) + λ_O |⟨w_q, w_l⟩| / (|w_q| |w_l|);  r = q",
        settings: "batch_size = 32\nodin = { length_coefficient = 1.0, orthogonality_coefficient = 1.0 }",
    },
    Preset {
        name: "orm",
        title: "an outcome reward model: right or wrong",
        paper: "Cobbe et al. 2021, arXiv 2110.14168",
        formula: "L = - E [y log σ(r(x, y)) + (1 - y) log σ(-r(x, y))]",
        settings: "loss_type = \"bce\"",
    },
    Preset {
        name: "regression",
        title: "a reward model from scores",
        paper: "Wang et al. 2024, HelpSteer2, arXiv 2406.08673",
        formula: "L = E (r(x, y) - s)²",
        settings: "loss_type = \"mse\"",
    },
];

/// What rewards are learned from, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RewardLoss {
    /// From pairs: the chosen completion should score higher.
    #[default]
    BradleyTerry,
    /// From labels or scores between 0 and 1: the reward is the log-odds of being right.
    Bce,
    /// From scores: the reward is the score.
    Mse,
}

/// Options of reward models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RewardModelOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// The loss: `bradley_terry`, `bce` or `mse`.
    pub loss_type: RewardLoss,
    /// Weight of the squared sum of a pair's rewards, which keeps rewards around 0; 0.01 is usual, 0 is off.
    #[schemars(range(min = 0.0))]
    pub center_rewards_coefficient: f64,
    /// The share of the comparisons taken to be the wrong way round; with `bradley_terry`.
    #[schemars(range(min = 0, max = 0.5))]
    pub label_smoothing: f64,
    /// Train for the worst mix of the step's rows near the one in the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worst_case: Option<WorstCase>,
    /// Train for the worst of known groups: those of the column `group`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_dro: Option<GroupDro>,
    /// Two heads, for quality and for length, of which the first is kept; with `bradley_terry`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub odin: Option<Odin>,
    /// Rows of one step: TRL's `per_device_train_batch_size` times its `gradient_accumulation_steps`.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_size: usize,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

impl Default for RewardModelOptions {
    fn default() -> Self {
        Self {
            method: "bradley_terry".into(),
            loss_type: RewardLoss::BradleyTerry,
            center_rewards_coefficient: 0.0,
            label_smoothing: 0.0,
            worst_case: None,
            group_dro: None,
            odin: None,
            batch_size: 16,
            training: TrainingOptions::default(),
        }
    }
}

impl RewardModelOptions {
    /// Refuses values that mean nothing.
    ///
    /// # Errors
    /// The option, what it is, and what it may be.
    pub fn validate(&self) -> Result<(), OptionError> {
        let center = self.center_rewards_coefficient;
        check("center_rewards_coefficient", center, center.is_finite() && center >= 0.0, "a number from 0 up")?;
        let centred = center == 0.0 || self.loss_type == RewardLoss::BradleyTerry;
        check("center_rewards_coefficient", center, centred, "0, unless loss_type is bradley_terry")?;
        let smoothing = self.label_smoothing;
        check("label_smoothing", smoothing, (0.0..0.5).contains(&smoothing), "at least 0 and below 0.5")?;
        let compared = smoothing == 0.0 || self.loss_type == RewardLoss::BradleyTerry;
        check("label_smoothing", smoothing, compared, "0, unless loss_type is bradley_terry")?;
        if let Some(group_dro) = self.group_dro {
            group_dro.validate().map_err(|error| OptionError::new("group_dro", error.to_string()))?;
            check("group_dro", "on", self.worst_case.is_none(), "off with worst_case, which weighs the same rows")?;
            let compared = self.loss_type == RewardLoss::BradleyTerry;
            check("group_dro", "on", compared, "off, unless loss_type is bradley_terry")?;
        }
        if let Some(odin) = self.odin {
            odin.validate().map_err(|error| OptionError::new("odin", error.to_string()))?;
            let compared = self.loss_type == RewardLoss::BradleyTerry;
            check("odin", "on", compared, "off, unless loss_type is bradley_terry")?;
        }
        if let Some(worst_case) = self.worst_case {
            worst_case.validate().map_err(|error| OptionError::new("worst_case", error.to_string()))?;
        }
        check("batch_size", self.batch_size, (1..=1 << 20).contains(&self.batch_size), "1 to 1048576")?;
        self.training.validate().map_err(|error| error.within("training"))
    }

    /// The score head that is trained, and the deviation of the weights that a new one starts with.
    pub fn score_head(&self) -> (ScoreHead, f64) {
        match self.odin {
            Some(_) => (ScoreHead { outputs: 2, ..ScoreHead::REWARD }, 0.02),
            None => (ScoreHead::REWARD, 0.0),
        }
    }
}

/// What a reward model learns from.
#[derive(Clone, Debug)]
pub enum RewardRows {
    /// Comparisons.
    Pairs(Vec<PreferencePair>),
    /// Completions with their scores.
    Scored(Vec<ScoredExample>),
}

impl Default for RewardRows {
    fn default() -> Self {
        Self::Pairs(Vec::new())
    }
}

impl RewardRows {
    /// The tokens of every row; of both completions, for pairs.
    pub fn lengths(&self) -> Vec<usize> {
        match self {
            Self::Pairs(pairs) => pairs.iter().map(|pair| pair.chosen.ids.len() + pair.rejected.ids.len()).collect(),
            Self::Scored(examples) => examples.iter().map(|scored| scored.example.ids.len()).collect(),
        }
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        match self {
            Self::Pairs(pairs) => pairs.len(),
            Self::Scored(examples) => examples.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The prompt of a row.
    fn prompt(&self, row: usize) -> &[u32] {
        let example = match self {
            Self::Pairs(pairs) => &pairs[row].chosen,
            Self::Scored(examples) => &examples[row].example,
        };
        &example.ids[..example.given()]
    }

    /// The units of some rows: pairs, or single completions.
    pub fn units(&self, rows: &[usize]) -> Vec<Unit<'_>> {
        let unit = |&row: &usize| match self {
            Self::Pairs(pairs) => {
                let (chosen, rejected) = (&pairs[row].chosen.ids, &pairs[row].rejected.ids);
                Unit::new(vec![Scored::whole(chosen), Scored::whole(rejected)])
            }
            Self::Scored(examples) => Unit::new(vec![Scored::whole(&examples[row].example.ids)]),
        };
        rows.iter().map(unit).collect()
    }
}

/// Training of a reward model.
pub struct RewardModel {
    options: RewardModelOptions,
    rows: RewardRows,
    groups: Option<Groups>,
}

/// Known groups and what they count.
struct Groups {
    /// Of each row.
    of_rows: Vec<u32>,
    weights: GroupWeights,
}

/// The file of a checkpoint with the weights of groups.
const GROUP_WEIGHTS: &str = "group_weights.json";

impl Groups {
    /// Those that the rows name, in alphabetical order.
    fn of(rows: &RewardRows) -> Result<Self, OptionError> {
        let RewardRows::Pairs(pairs) = rows else {
            return Err(OptionError::new("group_dro", "rows with scores have no groups"));
        };
        let name = |pair: &PreferencePair| {
            let reason =
                || format!("{} has no column group, of which group_dro weighs every value", pair.chosen.source);
            pair.group.clone().ok_or_else(|| OptionError::new("group_dro", reason()))
        };
        let names = pairs.iter().map(name).collect::<Result<Vec<_>, _>>()?;
        let mut numbers: BTreeMap<&str, u32> = names.iter().map(|name| (&name[..], 0)).collect();
        numbers.values_mut().zip(0..).for_each(|(number, place)| *number = place);
        let of_rows = names.iter().map(|name| numbers[&name[..]]).collect();
        Ok(Self { of_rows, weights: GroupWeights::uniform(numbers.len()) })
    }
}

impl RewardModel {
    /// Training on these rows: pairs for `bradley_terry`, scored completions for the others.
    ///
    /// # Errors
    /// Options that mean nothing; rows of the other kind.
    pub fn new(options: RewardModelOptions, rows: RewardRows) -> Result<Self> {
        let of_pairs = matches!(rows, RewardRows::Pairs(_));
        options
            .validate()
            .and_then(|()| match (options.loss_type, of_pairs) {
                (RewardLoss::BradleyTerry, false) => {
                    check("loss_type", "bradley_terry", false, "bce or mse, for rows with scores")
                }
                (RewardLoss::Bce | RewardLoss::Mse, true) => {
                    check("loss_type", "bce or mse", false, "bradley_terry, for pairs")
                }
                _ => Ok(()),
            })
            .map_err(|error| error.within("reward_model"))?;
        let groups = options.group_dro.map(|_| Groups::of(&rows)).transpose();
        let groups = groups.map_err(|error| error.within("reward_model"))?;
        Ok(Self { options, rows, groups })
    }

    /// The loss of a piece of a step's rows, of all of them where they are weighed or have to be seen together; and the weights of groups that this
    /// gives.
    fn loss(
        &self,
        piece: &scoring::Piece,
        rows: &[usize],
    ) -> objectives::Result<(objectives::Loss, Option<GroupWeights>)> {
        let (mut loss, weights) = self.weighed(piece, rows)?;
        if let (Some(odin), RewardRows::Pairs(pairs)) = (self.options.odin, &self.rows) {
            let completions =
                rows[piece.units.clone()].iter().flat_map(|&row| [&pairs[row].chosen, &pairs[row].rejected]);
            let length = |example: &Example| (example.ids.len() - example.given()) as f64;
            let lengths: Vec<f64> = completions.map(length).collect();
            loss = loss.and(odin.decorrelation(&piece.every(2, 0)?, &piece.every(2, 1)?, &lengths)?)?;
            let leads = piece.every(4, 0)?.sub(&piece.every(4, 2)?)?.to_vec1::<f32>()?;
            let values = leads.into_iter().map(|lead| f64::from(u8::from(lead > 0.0))).collect();
            loss.statistics.push(Statistic { name: "quality_accuracy", values, reduce: Reduce::Mean });
        }
        Ok((loss, weights))
    }

    /// The loss of rows by what is to be learned from each of them.
    fn weighed(
        &self,
        piece: &scoring::Piece,
        rows: &[usize],
    ) -> objectives::Result<(objectives::Loss, Option<GroupWeights>)> {
        let weights = vec![1.0 / rows.len() as f64; piece.units.len()];
        let own = &rows[piece.units.clone()];
        let mean = match &self.rows {
            RewardRows::Pairs(pairs) => {
                let margins = own.iter().map(|&row| pairs[row].margin).collect();
                let (chosen, rejected) = match self.options.odin {
                    None => (piece.of_pairs(0)?, piece.of_pairs(1)?),
                    // Quality and length of the chosen completion, and of the rejected one.
                    Some(_) => {
                        (piece.every(4, 0)?.add(&piece.every(4, 1)?)?, piece.every(4, 2)?.add(&piece.every(4, 3)?)?)
                    }
                };
                let label_smoothing = self.options.label_smoothing;
                let pairs = ScoredPairs { chosen, rejected, margins, label_smoothing, weights };
                reward::bradley_terry(&pairs, self.options.center_rewards_coefficient)?
            }
            RewardRows::Scored(examples) => {
                let scores: Vec<f64> = own.iter().map(|&row| examples[row].score).collect();
                let loss = if self.options.loss_type == RewardLoss::Bce { LabelLoss::Bce } else { LabelLoss::Mse };
                reward::labelled(loss, &piece.scores, &scores, &weights)?
            }
        };
        if let (Some(options), Some(groups)) = (self.options.group_dro, &self.groups) {
            let of_rows: Vec<u32> = own.iter().map(|&row| groups.of_rows[row]).collect();
            let (mut loss, after) = groups.weights.of(options, mean, &of_rows)?;
            let values = after.weights().to_vec();
            loss.statistics.push(Statistic { name: "group_weights/max", values, reduce: Reduce::Max });
            return Ok((loss, Some(after)));
        }
        let loss = match self.options.worst_case {
            None => mean,
            Some(worst_case) => worst_case.of(mean, &numbered(own.iter().map(|&row| self.rows.prompt(row))))?,
        };
        Ok((loss, None))
    }
}

impl Method for RewardModel {
    fn name(&self) -> &str {
        &self.options.method
    }

    fn training(&self) -> &TrainingOptions {
        &self.options.training
    }

    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn rows_per_step(&self) -> usize {
        self.options.batch_size
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        let rows = Order::new(self.rows.len(), step.seed, step.stage).batch(step.index, self.options.batch_size);
        let batch = Batch::new(self.rows.units(&rows));
        let together = self.options.worst_case.is_some() || self.groups.is_some() || self.options.odin.is_some();
        let scope = if together { Scope::Batch } else { Scope::Piece };
        let mut weights = None;
        let objective = |piece: &scoring::Piece| {
            let (loss, after) = self.loss(piece, &rows)?;
            weights = after;
            Ok(loss)
        };
        let orthogonality = self.options.odin.map(|odin| {
            move |weights: &Tensor| {
                let width = weights.elem_count() / 2;
                odin.orthogonality(&weights.narrow(0, 0, width)?, &weights.narrow(0, width, width)?)
            }
        });
        let of_weights = orthogonality.as_ref().map(|loss| loss as scoring::OfWeights<'_>);
        let budget = self.options.training.micro_batch_tokens;
        let report = scoring::step_with_weights(step, &batch, budget, scope, objective, of_weights)?;
        if let (Some(groups), Some(after)) = (&mut self.groups, weights) {
            groups.weights = after;
        }
        Ok(report)
    }

    fn finish(&self, decoder: &mut Decoder) -> model::Result<()> {
        if self.options.odin.is_some() { decoder.keep_first_score() } else { Ok(()) }
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.groups.as_ref().map_or(Ok(()), |groups| carried::save(folder, GROUP_WEIGHTS, &groups.weights))
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        if let Some(groups) = &mut self.groups {
            groups.weights = carried::load(folder, GROUP_WEIGHTS)?;
        }
        Ok(())
    }
}
