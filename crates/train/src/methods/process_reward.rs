//! Process reward models: a verdict after every step of a solution.
//!
//! ```text
//! cross_entropy   L = - 1/S Σ_steps log softmax(o(x, s_1 ... s_k))_{label_k}            two outputs: wrong, right
//! bce             L = 1/S Σ_steps  -y_k log σ(r_k) - (1 - y_k) log σ(-r_k)              one output, labels from 0 to 1
//! ```
//!
//! The solution is the prompt, then every step followed by `step_separator`; the head is read at the last token of each separator. `S`
//! counts the labelled steps of the whole optimiser step. The head has a bias and takes the place of the language model's head; a model
//! that has none gets one, all zero. What is trained is saved as `...ForTokenClassification`, which transformers loads. With `train_on_last_step_only`
//! only the verdict on the whole solution is learned: an outcome reward model that is asked after every step.
//!
//! Rows: `prompt`, `completions` (the steps) and `labels`, true or false for each step, or with `bce` a number from 0 to 1, such as the
//! share of continuations from there that came to the right answer (Math-Shepherd, arXiv 2312.08935).
//!
//! Deviations from TRL's `PRMTrainer`:
//! 1. The mean is over the labelled steps of the optimiser step. TRL's is per micro-batch, so that its loss depends on the cut.
//! 2. The head starts at zero, not at random.
//! 3. A row that is too long is left out, counted and named; TRL cuts it off, labels included.
//!
//! Metrics: `loss`; `grad_norm`, the norm of its gradient before clipping; `accuracy` of all verdicts, as in [`mod@objectives::reward`].

use data::StepwiseExample;
use objectives::reward::{self, LabelLoss};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use crate::error::Result;
use crate::method::{Method, Report, Step};
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::Order;
use crate::scoring::{self, Batch, Scored, Unit};
use crate::update::Scope;

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "prm",
        title: "a process reward model: every step right or wrong",
        paper: "Uesato et al. 2022, arXiv 2211.14275; Lightman et al. 2023, arXiv 2305.20050",
        formula: "L = - E log softmax(o(x, s_1 ... s_k))_label",
        settings: "loss_type = \"cross_entropy\"",
    },
    Preset {
        name: "soft_prm",
        title: "a process reward model from estimated values of steps",
        paper: "Wang et al. 2023, Math-Shepherd, arXiv 2312.08935",
        formula: "L = - E [y_k log σ(r_k) + (1 - y_k) log σ(-r_k)]",
        settings: "loss_type = \"bce\"",
    },
];

/// How verdicts on steps are learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepLoss {
    /// Two outputs, wrong and right, as TRL's `PRMTrainer`.
    #[default]
    CrossEntropy,
    /// One output, the log-odds of being right; labels may lie between 0 and 1.
    Bce,
}

impl StepLoss {
    /// Outputs of the head.
    pub fn outputs(self) -> usize {
        match self {
            Self::CrossEntropy => 2,
            Self::Bce => 1,
        }
    }
}

/// Options of process reward models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ProcessRewardOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// The loss: `cross_entropy` or `bce`.
    pub loss_type: StepLoss,
    /// Text after each step; its last token stands for the step.
    pub step_separator: String,
    /// Learn the label of the last step of each solution only.
    pub train_on_last_step_only: bool,
    /// Rows of one step: TRL's `per_device_train_batch_size` times its `gradient_accumulation_steps`.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_size: usize,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

impl Default for ProcessRewardOptions {
    fn default() -> Self {
        Self {
            method: "prm".into(),
            loss_type: StepLoss::CrossEntropy,
            step_separator: "\n".into(),
            train_on_last_step_only: false,
            batch_size: 16,
            training: TrainingOptions::default(),
        }
    }
}

impl ProcessRewardOptions {
    /// Refuses values that mean nothing.
    ///
    /// # Errors
    /// The option, what it is, and what it may be.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("step_separator", "empty", !self.step_separator.is_empty(), "at least one character")?;
        check("batch_size", self.batch_size, (1..=1 << 20).contains(&self.batch_size), "1 to 1048576")?;
        self.training.validate().map_err(|error| error.within("training"))
    }
}

/// Training of a process reward model.
pub struct ProcessReward {
    options: ProcessRewardOptions,
    examples: Vec<StepwiseExample>,
}

impl ProcessReward {
    /// Training on these solutions.
    ///
    /// # Errors
    /// Options that mean nothing; a label that is neither 0 nor 1, for `cross_entropy`.
    pub fn new(options: ProcessRewardOptions, examples: Vec<StepwiseExample>) -> Result<Self> {
        let mut labels = examples.iter().flat_map(|example| &example.steps).map(|(_, label)| *label);
        let soft = match options.loss_type {
            StepLoss::CrossEntropy => labels.find(|label| *label != 0.0 && *label != 1.0),
            StepLoss::Bce => None,
        };
        let hard = match soft {
            Some(label) => check("loss_type", "cross_entropy", false, &format!("bce, for a label of {label}")),
            None => Ok(()),
        };
        options.validate().and(hard).map_err(|error| error.within("process_reward"))?;
        Ok(Self { options, examples })
    }

    /// The labels that are learned from a row.
    fn steps(&self, row: usize) -> &[(usize, f64)] {
        let steps = &self.examples[row].steps;
        if self.options.train_on_last_step_only { &steps[steps.len() - 1..] } else { steps }
    }
}

impl Method for ProcessReward {
    fn name(&self) -> &str {
        &self.options.method
    }

    fn training(&self) -> &TrainingOptions {
        &self.options.training
    }

    fn rows(&self) -> usize {
        self.examples.len()
    }

    fn rows_per_step(&self) -> usize {
        self.options.batch_size
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        let rows = Order::new(self.examples.len(), step.seed, step.stage).batch(step.index, self.options.batch_size);
        let unit = |&row: &usize| {
            let at = self.steps(row).iter().map(|(place, _)| *place).collect();
            Unit::new(vec![Scored { ids: &self.examples[row].ids, at }])
        };
        let batch = Batch::new(rows.iter().map(unit).collect());
        let labels: Vec<f64> = rows.iter().flat_map(|&row| self.steps(row)).map(|(_, label)| *label).collect();
        let loss = |piece: &scoring::Piece| {
            let labels = &labels[piece.items.clone()];
            let weights = vec![1.0 / batch.items() as f64; labels.len()];
            match self.options.loss_type {
                StepLoss::CrossEntropy => {
                    let classes: Vec<u32> = labels.iter().map(|label| *label as u32).collect();
                    reward::classified(&piece.scores.reshape((labels.len(), 2))?, &classes, &weights)
                }
                StepLoss::Bce => reward::labelled(LabelLoss::Bce, &piece.scores, labels, &weights),
            }
        };
        scoring::step(step, &batch, self.options.training.micro_batch_tokens, Scope::Piece, loss)
    }
}
