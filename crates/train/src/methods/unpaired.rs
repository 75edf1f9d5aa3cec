//! Preference optimisation from single judgements: completions that were found good or bad, one by one.
//!
//! ```text
//! h(y) = log π(y) - log π_ref(y)                       summed over the completion's tokens
//! L    = (1/n) Σ_i λ_i v( ± β (h(y_i) - z) )           + and λ = desirable_weight for good completions
//!                                                      - and λ = undesirable_weight for bad ones
//! ```
//!
//! Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306. A step takes `batch_size`
//! completions in the order of the epoch and moves the weights once; baseline `z` and value `v` are parts of
//! [`mod@objectives::unpaired`]. Rows with `chosen` and `rejected` count as two judgements.
//!
//! - The reference is the model the stage started from; with an adapter it is the model without the adapter. Its
//!   log-probabilities of a row are computed when the row first comes, and kept. With `sync_reference` it follows the policy
//!   ([`mod@crate::reference`]) and is asked in every step.
//! - The mismatched completion of a row, for the baseline of KTO, is that of the next row of the data, whatever the order of
//!   the epoch. It takes a forward pass and no backward.
//! - With `density_ratio`, bad completions count by how much their prompts look like those of good ones ([`crate::density_ratio`]).
//! - The baseline of BCO is a running mean over the stage; checkpoints hold it.
//!
//! Deviations from TRL's `KTOTrainer`, beside those of the objective:
//! 1. A batch that reaches the end of an epoch goes on with the next one instead of being smaller.
//! 2. TRL takes the mismatched completion from the neighbour in the batch.
//!
//! Metrics, named as TRL names them:
//! - `loss`, and `grad_norm`, the norm of its gradient before clipping.
//! - `kl`, `delta`, `rewards/chosen`, `rewards/rejected`, `logps/*`: see [`mod@objectives::unpaired`]. `rewards/margins`: the
//!   difference of the mean rewards, in steps with completions of both kinds.
//! - `density_ratio/mean`, with `density_ratio`: of the bad completions of the step.
//! - `logits/chosen`, `logits/rejected`: mean logit over the tokens of completions of one kind and the vocabulary.
//! - `entropy`: mean entropy over the tokens of all completions.

use std::ops::Range;
use std::path::Path;

use data::{Example, LabelledExample};
use objectives::{RunningMean, UnpairedBatch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use crate::carried;
use crate::density_ratio::{DensityRatioOptions, DensityRatios};
use crate::error::Result;
use crate::method::{Method, Report, Step};
use crate::metrics::{Metrics, mean};
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::Order;
use crate::pass::{Sequence, Unit};
use crate::reference::{Reference, SyncOptions};
use crate::update::{self, Batch, Folds, Known, Reading, Scope};

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "kto",
        title: "Kahneman-Tversky optimisation",
        paper: "Ethayarajh et al. 2024, arXiv 2402.01306",
        formula: "L = mean λ (1 - σ(± β (h - z))), z = max(0, mean h of mismatched completions)",
        settings: "",
    },
    Preset {
        name: "apo_zero_unpaired",
        title: "anchored preference optimisation from single judgements",
        paper: "D'Oosterlinck et al. 2024, arXiv 2408.06266",
        formula: "L = mean λ (1 - σ(± β h))",
        settings: "objective.baseline = \"zero\"",
    },
    Preset {
        name: "bco",
        title: "binary classifier optimisation",
        paper: "Jung et al. 2024, arXiv 2404.04656",
        formula: "L = - mean λ log σ(± β (h - z)), z = running mean of h",
        settings: "objective.baseline = \"running_mean\"\nobjective.utility = \"log_sigmoid\"",
    },
];

/// Options of preference optimisation from single judgements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct UnpairedOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// Completions of one step: TRL's `per_device_train_batch_size` times its `gradient_accumulation_steps`.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_size: usize,
    /// The parts of the loss.
    pub objective: objectives::UnpairedOptions,
    /// Weigh bad completions by how much their prompts look like those of good ones (BCO's underlying distribution matching);
    /// for data whose good and bad completions come from different prompts. Without it, they count the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub density_ratio: Option<DensityRatioOptions>,
    /// Let the reference model follow the policy (TRL: `sync_ref_model`); without it, it stays where the stage started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sync_reference: Option<SyncOptions>,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

impl Default for UnpairedOptions {
    fn default() -> Self {
        Self {
            method: "kto".into(),
            batch_size: 16,
            objective: objectives::UnpairedOptions::default(),
            density_ratio: None,
            sync_reference: None,
            training: TrainingOptions::default(),
        }
    }
}

impl UnpairedOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("batch_size", self.batch_size, (1..=1 << 20).contains(&self.batch_size), "1 to 1048576")?;
        self.objective.validate().map_err(|error| OptionError::new("objective", error.to_string()))?;
        if let Some(sync) = &self.sync_reference {
            sync.validate().map_err(|error| error.within("sync_reference"))?;
        }
        if let Some(density) = &self.density_ratio {
            density.validate().map_err(|error| error.within("density_ratio"))?;
            let stays = self.sync_reference.is_none();
            check(
                "density_ratio",
                "a moving reference",
                stays,
                "no sync_reference: prompts are told apart by a model that stays",
            )?;
        }
        self.training.validate().map_err(|error| error.within("training"))
    }
}

/// Preference optimisation on a list of judged completions.
pub struct Unpaired {
    options: UnpairedOptions,
    rows: Vec<LabelledExample>,
    reference: Reference,
    running: RunningMean,
    densities: Option<DensityRatios>,
}

/// The file of the running mean in a checkpoint.
const RUNNING_MEAN: &str = "unpaired-running-mean.json";

impl Unpaired {
    /// Training on these completions.
    ///
    /// # Errors
    /// Options that mean nothing; a single row, where the loss needs mismatched completions.
    pub fn new(options: UnpairedOptions, rows: Vec<LabelledExample>) -> Result<Self> {
        options.validate().map_err(|error| error.within("unpaired"))?;
        if options.objective.needs_mismatched() && rows.len() == 1 {
            let reason = "one row has no other to be mismatched with: expected at least 2, or another baseline";
            return Err(OptionError::new("unpaired.objective.baseline", reason).into());
        }
        let reference = Reference::new(true, options.sync_reference, rows.len());
        let micro_batch_tokens = options.training.micro_batch_tokens;
        let densities =
            (options.density_ratio.clone()).map(|density| DensityRatios::new(density, rows.len(), micro_batch_tokens));
        Ok(Self { options, rows, reference, running: RunningMean::default(), densities })
    }
}

/// The completion of a row and, if `mismatched`, that of the next one.
fn completions(rows: &[LabelledExample], row: usize, mismatched: bool) -> Vec<&Example> {
    let next = mismatched.then(|| &rows[(row + 1) % rows.len()].example);
    std::iter::once(&rows[row].example).chain(next).collect()
}

/// What is given of one example, followed by what is learnt of others.
fn unit<'a>(prompt: &'a Example, completions: &[&'a Example]) -> Unit<'a> {
    let learnt = completions.iter().map(|example| {
        let given = example.given();
        Sequence { ids: &example.ids[given..], mask: &example.loss_mask[given..] }
    });
    Unit { prompt: &prompt.ids[..prompt.given()], sequences: learnt.collect() }
}

/// The values of the loss tokens of first sequences, and those of the second ones if there are two `kinds`.
fn apart(values: &[f32], lengths: &[usize], kinds: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    let mut rest = values;
    for (sequence, &length) in lengths.iter().enumerate() {
        let own;
        (own, rest) = rest.split_at(length);
        if sequence % kinds == 0 { &mut first } else { &mut second }.extend_from_slice(own);
    }
    (first, second)
}

/// The log-ratio of each sequence.
fn log_ratios(policy: &[f32], reference: &[f32], lengths: &[usize]) -> Vec<f64> {
    let mut tokens = policy.iter().zip(reference).map(|(p, r)| f64::from(*p) - f64::from(*r));
    lengths.iter().map(|&length| tokens.by_ref().take(length).sum()).collect()
}

impl Method for Unpaired {
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

    fn needs_reference(&self) -> bool {
        self.reference.needs_start()
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        let rows = Order::new(self.rows.len(), step.seed, step.stage).batch(step.index, self.options.batch_size);
        let reading = Reading::plain(self.options.training.micro_batch_tokens);
        let needed = self.options.objective.needs_mismatched();
        let completions: Vec<Vec<&Example>> = rows.iter().map(|&row| completions(&self.rows, row, needed)).collect();
        let batch_of = |which: Range<usize>| {
            let units = completions.iter().map(|all| unit(all[0], &all[which.clone()]));
            Batch::new(units.collect())
        };
        let kinds = completions.first().map_or(1, Vec::len);
        let (all, batch) = (batch_of(0..kinds), batch_of(0..1));

        step.decoder.prepare_for_training(step.precision);
        let known = self.reference.log_probs(step, &all, &rows, reading)?.unwrap_or_default();
        let (reference, reference_of_mismatched) = apart(&known, all.lengths(), kinds);
        let mismatched = match kinds {
            1 => Vec::new(),
            _ => {
                let batch = batch_of(1..kinds);
                let found = batch.log_probs(step.decoder, step.workspace, 0..batch.units(), reading);
                log_ratios(&found.map_err(step.model_error())?.log_prob, &reference_of_mismatched, batch.lengths())
            }
        };
        let densities = match &mut self.densities {
            Some(densities) => Some(densities.of(step, &self.rows, &rows)?),
            None => None,
        };
        let good: Vec<bool> = rows.iter().map(|&row| self.rows[row].label).collect();
        let weights: Vec<f64> =
            (0..good.len()).map(|row| densities.as_ref().map_or(1.0, |all| all[row]) / good.len() as f64).collect();
        let objective = &self.options.objective;
        let scope = if objective.compares_completions() { Scope::Batch } else { Scope::Piece };

        let mut statistics = Folds::default();
        let mut running = self.running;
        let gathered = update::gradients(
            step,
            &batch,
            0..batch.units(),
            Reading { hidden: true, ..reading },
            (scope, Known::Nothing),
            &mut statistics,
            |piece| {
                let found = objectives::unpaired(
                    objective,
                    &UnpairedBatch {
                        log_probs: piece.log_probs.clone(),
                        reference_log_probs: piece.of_tokens(&reference)?,
                        sequence: piece.sequence(),
                        good: good[piece.sequences.clone()].to_vec(),
                        weights: piece.of_sequences(&weights)?,
                        mismatched: mismatched.clone(),
                        running: self.running,
                    },
                )?;
                running = found.running;
                Ok(found.loss)
            },
        )?;
        if objective.compares_completions() {
            self.running = running;
        }
        let mean_logit = |label: bool| {
            let judged = |sequence: usize| good[sequence] == label;
            gathered.mean_logit(step.decoder, batch.lengths(), judged).map_err(step.model_error())
        };
        let logits = [("logits/chosen", mean_logit(true)?), ("logits/rejected", mean_logit(false)?)];
        let grad_norm = step.update()?;
        self.reference.follow(step);

        let mut metrics = Metrics::new();
        metrics.set("loss", gathered.loss);
        metrics.set("grad_norm", grad_norm);
        statistics.record(&mut metrics);
        logits.into_iter().filter(|(_, value)| value.is_finite()).for_each(|(name, value)| metrics.set(name, value));
        if let (Some(chosen), Some(rejected)) = (metrics.get("rewards/chosen"), metrics.get("rewards/rejected")) {
            metrics.set("rewards/margins", chosen - rejected);
        }
        if let Some(densities) = densities {
            let of_bad: Vec<f64> =
                densities.into_iter().zip(&good).filter(|(_, good)| !**good).map(|(ratio, _)| ratio).collect();
            metrics.set("density_ratio/mean", mean(&of_bad));
        }
        let entropy: Vec<f64> = gathered.found.entropy.iter().copied().map(f64::from).collect();
        metrics.set("entropy", mean(&entropy));
        Ok(Report { metrics, tokens: batch.all_tokens(), episodes: None })
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.reference.save(folder)?;
        if self.options.objective.compares_completions() {
            carried::save(folder, RUNNING_MEAN, &self.running)?;
        }
        Ok(())
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        self.reference.load(folder)?;
        if self.options.objective.compares_completions() {
            self.running = carried::load(folder, RUNNING_MEAN)?;
        }
        Ok(())
    }
}
