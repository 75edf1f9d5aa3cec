//! Preference optimisation: of two completions of a prompt, the chosen one is to become more likely than the rejected one.
//!
//! ```text
//! h(y) = log π(y) - log π_ref(y)                       summed over the completion's tokens
//! L    = - (1/P) Σ_i log σ( β (h(chosen_i) - h(rejected_i)) )         DPO; every other loss takes its place
//! ```
//!
//! Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290. A step takes `batch_size` pairs in the order of the
//! epoch, computes their log-probabilities under policy and reference, and moves the weights once. What a log-ratio is, what
//! it is worth and what a pair costs are parts of [`mod@objectives::preference`]; the published methods are settings of them.
//!
//! - The reference is the model the stage started from; with an adapter it is the model without the adapter. Its
//!   log-probabilities of a pair are computed when the pair first comes, and kept. With `sync_reference` it follows the
//!   policy (TR-DPO, [`mod@crate::reference`]) and is asked in every step.
//! - The prompt of a pair is computed once for its completions, forward and backward.
//! - Conversations count with all of the assistant's turns after the prompt, and with no other tokens: of a trajectory with
//!   several turns, what users and tools said is given and not learnt (multi-turn DPO, arXiv 2409.02392).
//! - Rankings of several completions are learnt as all of their pairs, or whole with `plackett_luce` ([`mod@objectives::ranking`]).
//! - A column `reference` holds a third completion, which the `sft` term learns instead of the chosen one (TPO).
//!
//! Deviations from TRL's `DPOTrainer`, beside those of the objective:
//! 1. A batch that reaches the end of an epoch goes on with the next one instead of being smaller.
//! 2. Means are over the pairs, or tokens, of the step, however it is cut.
//! 3. `rewards/*` of ORPO lack its factor β: it weighs the loss, and scales no reward.
//!
//! Metrics, named as TRL names them:
//! - `loss`, and `grad_norm`, the norm of its gradient before clipping.
//! - `rewards/*`, `logps/*`, `nll_loss`, `log_odds_*`, `pair_weights/*`: see [`mod@objectives::preference`].
//! - `logits/chosen`, `logits/rejected`: mean logit over the completions' tokens and the vocabulary.
//! - `entropy`: mean entropy over the tokens of all completions. `mean_token_accuracy`: share of the chosen completions'
//!   tokens that are the most probable ones.

use std::path::Path;
use std::time::Instant;

use data::PreferencePair;
use objectives::{PairBatch, PairLoss, RankingBatch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Preset;
use crate::error::Result;
use crate::method::{Method, Report, Step};
use crate::metrics::{Metrics, mean};
use crate::options::{OptionError, TrainingOptions, check};
use crate::order::{Order, numbered};
use crate::pass::Unit;
use crate::reference::{Reference, SyncOptions};
use crate::timing::Phase;
use crate::update::{self, Batch, Folds, Known, Reading, Scope};

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "dpo",
        title: "direct preference optimisation",
        paper: "Rafailov et al. 2023, arXiv 2305.18290",
        formula: "L = - mean log σ(β (h_c - h_r))",
        settings: "",
    },
    Preset {
        name: "cdpo",
        title: "conservative DPO: some preferences are the wrong way round",
        paper: "Mitchell 2023, https://ericmitchell.ai/cdpo.pdf",
        formula: "L = - mean [(1 - ε) log σ(β m) + ε log σ(-β m)], m = h_c - h_r",
        settings: "objective.label_smoothing = 0.1",
    },
    Preset {
        name: "robust_dpo",
        title: "provably robust DPO: unbiased under flipped preferences",
        paper: "Chowdhury et al. 2024, arXiv 2403.00409",
        formula: "L = mean [-(1 - ε) log σ(β m) + ε log σ(-β m)] / (1 - 2ε), m = h_c - h_r",
        settings: "objective.loss_type = [\"robust\"]\nobjective.label_smoothing = 0.1",
    },
    Preset {
        name: "slic",
        title: "sequence likelihood calibration: a hinge",
        paper: "Zhao et al. 2023, arXiv 2305.10425",
        formula: "L = mean max(0, 1 - β (h_c - h_r))",
        settings: "objective.loss_type = [\"hinge\"]",
    },
    Preset {
        name: "ipo",
        title: "identity preference optimisation",
        paper: "Azar et al. 2023, arXiv 2310.12036",
        formula: "L = mean (h_c/n_c - h_r/n_r - 1/(2β))²",
        settings: "objective.loss_type = [\"ipo\"]",
    },
    Preset {
        name: "exo",
        title: "efficient exact optimisation",
        paper: "Ji et al. 2024, arXiv 2402.00856",
        formula: "L = mean KL((σ(β m), σ(-β m)) ‖ (1 - ε, ε)), m = h_c - h_r",
        settings: "objective.loss_type = [\"exo_pair\"]\nobjective.label_smoothing = 1e-3",
    },
    Preset {
        name: "nca",
        title: "noise-contrastive alignment",
        paper: "Chen et al. 2024, arXiv 2402.05369",
        formula: "L = - mean [log σ(β h_c) + (log σ(-β h_c) + log σ(-β h_r)) / 2]",
        settings: "objective.loss_type = [\"nca_pair\"]\nobjective.beta = 0.01",
    },
    Preset {
        name: "bco_pair",
        title: "binary classifier optimisation on pairs",
        paper: "Jung et al. 2024, arXiv 2404.04656",
        formula: "L = - mean [log σ(β h_c) + log σ(-β h_r)]",
        settings: "objective.loss_type = [\"bco_pair\"]",
    },
    Preset {
        name: "sppo",
        title: "self-play preference optimisation, hard preferences",
        paper: "Wu et al. 2024, arXiv 2405.00675",
        formula: "L = mean [(h_c - 1/(2β))² + (h_r + 1/(2β))²]",
        settings: "objective.loss_type = [\"sppo_hard\"]",
    },
    Preset {
        name: "aot",
        title: "alignment via optimal transport, paired",
        paper: "Melnyk et al. 2024, arXiv 2406.05882",
        formula: "L = - mean_k log σ(β (k-th smallest margin of the policy - k-th smallest of the reference))",
        settings: "objective.loss_type = [\"aot\"]",
    },
    Preset {
        name: "aot_unpaired",
        title: "alignment via optimal transport, unpaired",
        paper: "Melnyk et al. 2024, arXiv 2406.05882",
        formula: "L = - mean_k log σ(β (k-th smallest h_c - k-th smallest h_r))",
        settings: "objective.loss_type = [\"aot_unpaired\"]",
    },
    Preset {
        name: "apo_zero",
        title: "anchored preference optimisation, for data better than the model",
        paper: "D'Oosterlinck et al. 2024, arXiv 2408.06266",
        formula: "L = mean [σ(-β h_c) + σ(β h_r)]",
        settings: "objective.loss_type = [\"apo_zero\"]",
    },
    Preset {
        name: "apo_down",
        title: "anchored preference optimisation, for data worse than the model",
        paper: "D'Oosterlinck et al. 2024, arXiv 2408.06266",
        formula: "L = mean [σ(β h_c) + σ(-β (h_c - h_r))]",
        settings: "objective.loss_type = [\"apo_down\"]",
    },
    Preset {
        name: "discopop",
        title: "discovered preference optimisation",
        paper: "Lu et al. 2024, arXiv 2406.08414",
        formula: "L = mean [-log σ(u) (1 - σ(u/τ)) + e^{-u} σ(u/τ)], u = β (h_c - h_r)",
        settings: "objective.loss_type = [\"discopop\"]\nobjective.beta = 0.05",
    },
    Preset {
        name: "dpo_norm",
        title: "length-normalised DPO",
        paper: "Lambert et al. 2024, arXiv 2411.15124",
        formula: "L = - mean log σ(β (h_c/n_c - h_r/n_r))",
        settings: "objective.loss_type = [\"sigmoid_norm\"]\nobjective.beta = 5.0",
    },
    Preset {
        name: "f_dpo",
        title: "DPO under another divergence; Jensen-Shannon unless `objective.score` says otherwise",
        paper: "Wang et al. 2023, arXiv 2309.16240",
        formula: "L = - mean log σ(β (f'(e^{h_c}) - f'(e^{h_r})))",
        settings: "objective.score = \"js_divergence\"",
    },
    Preset {
        name: "wpo",
        title: "weighted preference optimisation: pairs count by how likely they are to the policy",
        paper: "Zhou et al. 2024, arXiv 2406.11827",
        formula: "L = - mean w(y_c) w(y_r) log σ(β (h_c - h_r)), w(y) = exp(mean_t (log π(y_t) - log Σ_v π(v)²))",
        settings: "objective.use_weighting = true",
    },
    Preset {
        name: "ld_dpo",
        title: "length-desensitised DPO",
        paper: "Liu et al. 2024, arXiv 2409.06411",
        formula: "L = - mean log σ(β (h_c - h_r)), tokens beyond the shorter completion's length count α",
        settings: "objective.ld_alpha = 0.5",
    },
    Preset {
        name: "tr_dpo",
        title: "trust-region DPO: the reference follows the policy",
        paper: "Gorbatovski et al. 2024, arXiv 2404.09656",
        formula: "L = - mean log σ(β (h_c - h_r)); every τ steps θ_ref <- α θ + (1 - α) θ_ref",
        settings: "sync_reference = {}",
    },
    Preset {
        name: "dro_dpo",
        title: "distributionally robust DPO: for the worst mix of the pairs",
        paper: "Mandal et al. 2025, arXiv 2503.00539",
        formula: "L = max_q Σ_i q_i l_i, l_i = -log σ(β (h_c - h_r)), q within a ball around the uniform weights",
        settings: "objective.worst_case = { ball = \"total_variation\", radius = 0.2 }",
    },
    Preset {
        name: "dpo_ceu",
        title: "DPO whose rejected completion is unlearnt by CE-U",
        paper: "Yang 2025, arXiv 2503.01224",
        formula: "∇L = - mean β σ(-β m) (∇ log π(y_c) + Σ_t ∇ log(1 - π(y_r,t))), m = h_c - h_r",
        settings: "objective.negative = \"ce_u\"",
    },
    Preset {
        name: "plackett_luce",
        title: "DPO over rankings",
        paper: "Rafailov et al. 2023, arXiv 2305.18290, appendix A.3",
        formula: "L = - mean Σ_k log(e^{β h_k} / Σ_{j ≥ k} e^{β h_j}), completions from best to worst",
        settings: "objective.loss_type = [\"plackett_luce\"]",
    },
    Preset {
        name: "mpo",
        title: "mixed preference optimisation: preference, quality and likelihood",
        paper: "Wang et al. 2024, arXiv 2411.10442",
        formula: "L = 0.8 L_sigmoid + 0.2 L_bco_pair + L_sft",
        settings: "objective.loss_type = [\"sigmoid\", \"bco_pair\", \"sft\"]\nobjective.loss_weights = [0.8, 0.2, 1.0]",
    },
    Preset {
        name: "rpo",
        title: "iterative reasoning preference optimisation: DPO and the chosen one's likelihood",
        paper: "Pang et al. 2024, arXiv 2404.19733",
        formula: "L = - mean log σ(β (h_c - h_r)) - (1/T) Σ_t log π(y_c,t)",
        settings: "objective.loss_type = [\"sigmoid\", \"sft\"]",
    },
    Preset {
        name: "m_dpo",
        title: "multi-turn DPO over trajectories; tools and users are given",
        paper: "Xiong et al. 2024, arXiv 2409.02392",
        formula: "L = - mean log σ(β Σ_turns (h_c - h_r))",
        settings: "",
    },
    Preset {
        name: "orpo",
        title: "odds ratio preference optimisation, without a reference",
        paper: "Hong et al. 2024, arXiv 2403.07691",
        formula: "L = L_sft - λ mean log σ(odds(y_c) - odds(y_r)), odds(y) = p - log(1 - e^p), p = mean_t log π(y_t)",
        settings: "objective.loss_type = [\"sigmoid\", \"sft\"]\nobjective.loss_weights = [0.1, 1.0]\nobjective.beta = 1.0\n\
                   objective.reference_free = true\nobjective.length = \"mean\"\nobjective.score = \"log_odds\"",
    },
    Preset {
        name: "cpo",
        title: "contrastive preference optimisation, without a reference",
        paper: "Xu et al. 2024, arXiv 2401.08417",
        formula: "L = - mean log σ(β (log π(y_c) - log π(y_r))) + L_sft",
        settings: "objective.loss_type = [\"sigmoid\", \"sft\"]\nobjective.reference_free = true",
    },
    Preset {
        name: "simpo",
        title: "simple preference optimisation: means, a margin, no reference",
        paper: "Meng et al. 2024, arXiv 2405.14734",
        formula: "L = - mean log σ(β (mean_t log π(y_c) - mean_t log π(y_r)) - γ)",
        settings: "objective.reference_free = true\nobjective.length = \"mean\"\nobjective.beta = 2.0\nobjective.gamma = 1.0",
    },
    Preset {
        name: "alphapo",
        title: "AlphaPO: SimPO with another shape of the reward",
        paper: "Gupta et al. 2025, arXiv 2501.03884",
        formula: "L = - mean log σ(β (r_c - r_r) - γ), r = (1 - p^{-α}) / α, p = e^{mean_t log π(y_t)}, α = 0.25",
        settings: "objective.reference_free = true\nobjective.length = \"mean\"\nobjective.beta = 2.5\n\
                   objective.gamma = 0.25\nobjective.score = \"alpha_divergence\"\nobjective.score_alpha = 0.75",
    },
    Preset {
        name: "tpo",
        title: "triple preference optimisation: a preference and a third answer to learn",
        paper: "Saeidi et al. 2024, arXiv 2405.16681",
        formula: "L = - mean log σ(β (log π(y_c) - log π(y_r))) - (1/T) Σ_t log π(y_gold,t)",
        settings: "objective.loss_type = [\"sigmoid\", \"sft\"]\nobjective.reference_free = true\nobjective.beta = 0.01",
    },
    Preset {
        name: "tpo_l",
        title: "triple preference optimisation by length, with a margin",
        paper: "Saeidi et al. 2024, arXiv 2405.16681",
        formula: "L = - mean log σ(β (mean_t log π(y_c) - mean_t log π(y_r)) - γ) - (1/T) Σ_t log π(y_gold,t)",
        settings: "objective.loss_type = [\"sigmoid\", \"sft\"]\nobjective.reference_free = true\n\
                   objective.length = \"mean\"\nobjective.beta = 2.0\nobjective.gamma = 0.5",
    },
];

/// Options of preference optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PreferenceOptions {
    /// The published method whose settings are the defaults: one of those that `posttrain methods` lists for the section.
    pub method: String,
    /// Pairs of one step: TRL's `per_device_train_batch_size` times its `gradient_accumulation_steps`.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_size: usize,
    /// The parts of the loss.
    pub objective: objectives::PreferenceOptions,
    /// Let the reference model follow the policy (TRL: `sync_ref_model`); without it, it stays where the stage started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sync_reference: Option<SyncOptions>,
    /// How long the stage lasts and how the weights move.
    pub training: TrainingOptions,
}

impl Default for PreferenceOptions {
    fn default() -> Self {
        Self {
            method: "dpo".into(),
            batch_size: 16,
            objective: objectives::PreferenceOptions::default(),
            sync_reference: None,
            training: TrainingOptions::default(),
        }
    }
}

impl PreferenceOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<(), OptionError> {
        check("batch_size", self.batch_size, (1..=1 << 20).contains(&self.batch_size), "1 to 1048576")?;
        self.objective.validate().map_err(|error| OptionError::new("objective", error.to_string()))?;
        if let Some(sync) = &self.sync_reference {
            sync.validate().map_err(|error| error.within("sync_reference"))?;
            let compared = self.objective.needs_reference();
            check("sync_reference", "no reference", compared, "objective.reference_free = false")?;
        }
        self.training.validate().map_err(|error| error.within("training"))
    }
}

/// Preference optimisation on a list of pairs.
pub struct Preference {
    options: PreferenceOptions,
    pairs: Vec<PreferencePair>,
    reference: Reference,
}

impl Preference {
    /// Training on these pairs. Either all of them have a reference completion, or none.
    ///
    /// # Errors
    /// Options that mean nothing; a pair without a reference completion where others have one.
    pub fn new(options: PreferenceOptions, pairs: Vec<PreferencePair>) -> Result<Self> {
        options.validate().map_err(|error| error.within("preference"))?;
        let all = pairs.first().is_some_and(|pair| pair.reference.is_some());
        if let Some(odd) = pairs.iter().find(|pair| pair.reference.is_some() != all) {
            let (this, first) = if all { ("no", "has one") } else { ("a", "has none") };
            let reason = format!("{} has {this} reference completion, and the first row {first}", odd.chosen.source);
            return Err(OptionError::new("preference", reason).into());
        }
        if let (false, Some(ranking)) = (options.objective.ranks(), pairs.iter().find(|pair| !pair.others.is_empty())) {
            let reason = format!("{} is a ranking: expected pairs, or the loss plackett_luce", ranking.chosen.source);
            return Err(OptionError::new("preference.objective.loss_type", reason).into());
        }
        let reference = Reference::new(options.objective.needs_reference(), options.sync_reference, pairs.len());
        Ok(Self { options, pairs, reference })
    }

    /// Completions of a pair that enter the loss.
    fn sequences_of(&self, pair: &PreferencePair) -> usize {
        let learnt = self.options.objective.loss_type.contains(&PairLoss::Sft) && pair.reference.is_some();
        2 + pair.others.len() + usize::from(learnt)
    }

    /// For each of these pairs, the first of them that has the same prompt.
    fn prompts(&self, rows: &[usize]) -> Vec<u32> {
        let prompt = |&row: &usize| {
            let chosen = &self.pairs[row].chosen;
            &chosen.ids[..chosen.given()]
        };
        numbered(rows.iter().map(prompt))
    }
}

impl Method for Preference {
    fn name(&self) -> &str {
        &self.options.method
    }

    fn training(&self) -> &TrainingOptions {
        &self.options.training
    }

    fn rows(&self) -> usize {
        self.pairs.len()
    }

    fn rows_per_step(&self) -> usize {
        self.options.batch_size
    }

    fn needs_reference(&self) -> bool {
        self.reference.needs_start()
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<Report> {
        let rows = Order::new(self.pairs.len(), step.seed, step.stage).batch(step.index, self.options.batch_size);
        let counts: Vec<usize> = rows.iter().map(|&row| self.sequences_of(&self.pairs[row])).collect();
        let pairs = &self.pairs;
        let units = rows.iter().zip(&counts).map(|(&row, &count)| Unit::of_pair(&pairs[row], count));
        let batch = Batch::new(units.collect());
        // Of each sequence its place in its pair or ranking, and its place from the end.
        let places: Vec<(usize, usize)> =
            counts.iter().flat_map(|&count| (0..count).map(move |place| (place, count - 1 - place))).collect();
        let sequences_per_pair = counts.first().copied().unwrap_or(2);
        let ranks = self.options.objective.ranks();
        let prompts = self.prompts(&rows);
        let reading = Reading::plain(self.options.training.micro_batch_tokens);
        let objective = &self.options.objective;

        step.decoder.prepare_for_training(step.precision);
        let reference = self.reference.log_probs(step, &batch, &rows, reading)?;
        let sharpened = match objective.use_weighting {
            true => {
                let started = Instant::now();
                let reading = Reading { temperature: 0.5, ..reading };
                let found = batch.log_probs(step.decoder, step.workspace, 0..batch.units(), reading);
                step.spent(Phase::Train, started);
                Some(found.map_err(step.model_error())?.log_prob)
            }
            false => None,
        };
        let learnt = if sequences_per_pair == 3 { 2 } else { 0 };
        let sft_tokens = batch.lengths().iter().skip(learnt).step_by(sequences_per_pair).sum();
        let scope = if objective.compares_pairs() { Scope::Batch } else { Scope::Piece };

        let mut statistics = Folds::default();
        let gathered = update::gradients(
            step,
            &batch,
            0..batch.units(),
            Reading { hidden: true, ..reading },
            (scope, Known::Nothing),
            &mut statistics,
            |piece| {
                let weights = vec![1.0 / batch.units() as f64; piece.units.len()];
                if ranks {
                    let rankings = RankingBatch {
                        log_probs: piece.log_probs.clone(),
                        reference_log_probs: reference.as_deref().map(|all| piece.of_tokens(all)).transpose()?,
                        sequence: piece.sequence(),
                        rankings: counts[piece.units.clone()].to_vec(),
                        weights,
                    };
                    return objectives::ranking(objective, &rankings);
                }
                objectives::preference(
                    objective,
                    &PairBatch {
                        log_probs: piece.log_probs.clone(),
                        reference_log_probs: reference.as_deref().map(|all| piece.of_tokens(all)).transpose()?,
                        sharpened_log_probs: sharpened.as_deref().map(|all| piece.of_tokens(all)).transpose()?,
                        sequence: piece.sequence(),
                        sequences_per_pair,
                        weights: piece.constant(&weights)?,
                        sft_tokens,
                        prompts: prompts[piece.units.clone()].to_vec(),
                    },
                )
            },
        )?;
        let mean_logit = |of: &dyn Fn((usize, usize)) -> bool| {
            let chosen = |sequence: usize| of(places[sequence]);
            gathered.mean_logit(step.decoder, batch.lengths(), chosen).map_err(step.model_error())
        };
        let rejected = |(place, from_end): (usize, usize)| if ranks { from_end == 0 } else { place == 1 };
        let logits =
            [("logits/chosen", mean_logit(&|(place, _)| place == 0)?), ("logits/rejected", mean_logit(&rejected)?)];
        let grad_norm = step.update()?;
        self.reference.follow(step);

        let mut metrics = Metrics::new();
        metrics.set("loss", gathered.loss);
        metrics.set("grad_norm", grad_norm);
        statistics.record(&mut metrics);
        logits.into_iter().for_each(|(name, value)| metrics.set(name, value));
        let entropy: Vec<f64> = gathered.found.entropy.iter().copied().map(f64::from).collect();
        metrics.set("entropy", mean(&entropy));
        let mut rest = &gathered.found.most_probable[..];
        let mut right = Vec::new();
        for (sequence, &length) in batch.lengths().iter().enumerate() {
            let own;
            (own, rest) = rest.split_at(length);
            if places[sequence].0 == 0 {
                right.extend(own.iter().map(|&right| f64::from(u8::from(right))));
            }
        }
        metrics.set("mean_token_accuracy", mean(&right));
        Ok(Report { metrics, tokens: batch.all_tokens(), episodes: None })
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.reference.save(folder)
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        self.reference.load(folder)
    }
}
