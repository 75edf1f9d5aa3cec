//! Preference optimisation: a completion that people chose is to become more likely than the one they rejected.
//!
//! ```text
//! s(y)  = Σ_t v_t log π(y_t)                  v_t: 1, 1/n (mean), α beyond the shorter completion's length (LD-DPO)
//! h(y)  = s(y) - s_ref(y)                     or s(y), without a reference
//! g(y)  = f'(e^{h(y)})                        the score: h itself for the reverse KL divergence
//! l_i   = Σ_k λ_k loss_k(pair i)              a weighted sum of the losses of [`PairLoss`]
//! L     = Σ_i w_i l_i                         w_i: 1/P, times what WPO or the worst case make of it
//! ```
//!
//! Every published method is a setting of these parts: how a sequence's log-probability is formed ([`Length`],
//! `ld_alpha`), whether there is a reference, what a log-ratio is worth ([`Score`]), what a pair costs ([`PairLoss`]), and
//! how much it counts. DPO (Rafailov et al., arXiv 2305.18290) is `sigmoid` on sums with a reference.
//!
//! | `score` | `g` | source |
//! | --- | --- | --- |
//! | `reverse_kl` | `h` | DPO |
//! | `forward_kl` | `1 - e^{-h}` | f-DPO, arXiv 2309.16240 |
//! | `js_divergence` | `log 2 + log σ(h)` | f-DPO |
//! | `alpha_divergence` | `(e^{(a - 1) h} - 1) / (a - 1)` | f-DPO; without a reference and with `a = 1 - α`, AlphaPO, arXiv 2501.03884 |
//! | `log_odds` | `h - log(1 - e^h)` | ORPO, arXiv 2403.07691 |
//!
//! LD-DPO: arXiv 2409.06411. WPO: arXiv 2406.11827; a pair counts by how likely both completions are to the policy itself,
//! `exp(mean_t(log π(y_t) - log Σ_v π(v)²))` for each. Worst-case weights: [`mod@crate::worst_case`]. With `negative = "ce_u"` the gradient
//! of `s` of a rejected completion is that of `-Σ_t v_t log(1 - π(y_t))` ([`mod@crate::negative`]).
//!
//! Deviations from TRL:
//! 1. `label_smoothing` also acts in `sigmoid` and `sigmoid_norm` (conservative DPO), where TRL's `DPOTrainer` ignores it.
//! 2. The `sft` term is not reweighted by WPO, and its mean is over the tokens of the whole batch.
//! 3. Scores with exponentials bound the exponent by 20, and `log_odds` takes a probability of at most `1 - 1e-6`, so that
//!    no score is infinite; beyond the bounds they are constant.
//!
//! Metrics, named as TRL names them; means over pairs:
//! - `rewards/chosen`, `rewards/rejected`: `β h`. `rewards/margins`: their difference. `rewards/accuracies`: share of
//!   pairs whose chosen completion has the higher reward.
//! - `logps/chosen`, `logps/rejected`: `s`.
//! - `nll_loss`, with an `sft` term: the negative log-likelihood of its tokens, mean over pairs of the sum.
//! - `log_odds_chosen`, `log_odds_ratio`, with `score = "log_odds"`: the margin of scores and `log σ` of it.
//! - `pair_weights/mean`, `pair_weights/max`, with `use_weighting` or `worst_case`: `P w_i`.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{Error, Loss, Reduce, Result, Statistic, bounded_exp, check_length, constant, per_token, values};
use crate::pairwise::{PairLoss, Pairs, Two};
use crate::scalar::{log_sigmoid, sequence_sums};
use crate::{Negative, WorstCase};

/// The most probable a completion may be for its odds: `log(1 - 1e-6)`.
const MAX_LOG_PROB_OF_ODDS: f64 = -1e-6;

/// The parts of the objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PreferenceOptions {
    /// What a pair costs: one loss, or several that are added.
    pub loss_type: Vec<PairLoss>,
    /// The weight of each loss; 1 each when empty.
    pub loss_weights: Vec<f64>,
    /// How strongly the policy is held to the reference; the scale of rewards. IPO's τ.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub beta: f64,
    /// The margin by which the chosen completion is to win, after scaling by `beta`. In `sigmoid`, `sigmoid_norm`, `hinge`.
    pub gamma: f64,
    /// The share of preferences taken to be the wrong way round, below 0.5. In `sigmoid`, `sigmoid_norm`, `exo_pair`, `robust`, `aot`,
    /// `aot_unpaired`.
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 0.5))]
    pub label_smoothing: f64,
    /// Leave the reference model out: log-ratios are log-probabilities.
    pub reference_free: bool,
    /// Whether a completion's log-probability is the sum or the mean over its tokens.
    pub length: Length,
    /// Weight of the tokens beyond the length of the shorter completion of the pair (LD-DPO); 1 when absent.
    #[schemars(range(min = 0, max = 1))]
    pub ld_alpha: Option<f64>,
    /// What a log-ratio is worth (TRL: `f_divergence_type`).
    pub score: Score,
    /// The coefficient of `alpha_divergence`: 1 is the reverse, 0 the forward KL divergence (TRL: `f_alpha_divergence_coef`).
    pub score_alpha: f64,
    /// How fast `discopop` passes from one of its losses to the other.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub discopop_tau: f64,
    /// Weight pairs by how likely their completions are to the policy (WPO).
    pub use_weighting: bool,
    /// Train for the worst mix of the pairs near the one in the data.
    pub worst_case: Option<WorstCase>,
    /// How the rejected completion becomes less likely.
    pub negative: Negative,
}

impl Default for PreferenceOptions {
    fn default() -> Self {
        Self {
            loss_type: vec![PairLoss::Sigmoid],
            loss_weights: Vec::new(),
            beta: 0.1,
            gamma: 0.0,
            label_smoothing: 0.0,
            reference_free: false,
            length: Length::Sum,
            ld_alpha: None,
            score: Score::ReverseKl,
            score_alpha: 0.5,
            discopop_tau: 0.05,
            use_weighting: false,
            worst_case: None,
            negative: Negative::GradientAscent,
        }
    }
}

/// How the log-probabilities of a completion's tokens become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Length {
    /// Their sum: the log-probability of the completion.
    #[default]
    Sum,
    /// Their mean, as in SimPO and ORPO.
    Mean,
}

/// What a log-ratio is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Itself.
    #[default]
    ReverseKl,
    /// One minus the inverse ratio.
    ForwardKl,
    /// Of the Jensen-Shannon divergence.
    JsDivergence,
    /// Of the alpha-divergence; see `score_alpha`.
    AlphaDivergence,
    /// The log-odds of the completion; for means without a reference.
    LogOdds,
}

impl Score {
    fn of(self, ratio: &Tensor, alpha: f64) -> Result<Tensor> {
        Ok(match self {
            Self::ReverseKl => ratio.clone(),
            Self::ForwardKl => bounded_exp(&ratio.neg()?)?.affine(-1.0, 1.0)?,
            Self::JsDivergence => log_sigmoid(ratio)?.affine(1.0, 2f64.ln())?,
            // The limit, within the rounding error of the quotient.
            Self::AlphaDivergence if (alpha - 1.0).abs() < 1e-6 => ratio.clone(),
            Self::AlphaDivergence => {
                let order = alpha - 1.0;
                bounded_exp(&ratio.affine(order, 0.0)?)?.affine(1.0 / order, -1.0 / order)?
            }
            Self::LogOdds => {
                let log_prob = ratio.minimum(MAX_LOG_PROB_OF_ODDS)?;
                log_prob.sub(&log_prob.exp()?.affine(-1.0, 1.0)?.log()?)?
            }
        })
    }
}

impl PreferenceOptions {
    /// Whether the log-probs of a reference model are needed.
    pub fn needs_reference(&self) -> bool {
        !self.reference_free
    }

    /// Whether the loss of a pair depends on the other pairs of the batch, which then have to be given all at once.
    pub fn compares_pairs(&self) -> bool {
        self.worst_case.is_some() || self.loss_type.iter().any(|loss| loss.compares_pairs())
    }

    /// Whether the loss is one of rankings of any length ([`crate::ranking()`]), and not of pairs.
    pub fn ranks(&self) -> bool {
        self.loss_type.contains(&PairLoss::PlackettLuce)
    }

    /// The losses and their weights.
    pub(crate) fn terms(&self) -> impl Iterator<Item = (PairLoss, f64)> {
        let weights = self.loss_weights.iter().copied().chain(std::iter::repeat(1.0));
        self.loss_type.iter().copied().zip(weights)
    }

    /// The weight of the `sft` term, if there is one.
    fn sft_weight(&self) -> Option<f64> {
        let weights = self.terms().filter(|(loss, _)| *loss == PairLoss::Sft).map(|(_, weight)| weight);
        weights.reduce(|a, b| a + b)
    }

    /// The weight of every token in the log-probability of its sequence.
    fn token_weights(&self, lengths: &[usize], sequences_per_pair: usize) -> Vec<f64> {
        let mut weights = Vec::new();
        for pair in lengths.chunks(sequences_per_pair) {
            let shared = pair[0].min(pair[1]);
            for &length in pair {
                let scale = match self.length {
                    Length::Sum => 1.0,
                    Length::Mean => 1.0 / length as f64,
                };
                let tail = self.ld_alpha.unwrap_or(1.0);
                weights.extend((0..length).map(|position| if position < shared { scale } else { scale * tail }));
            }
        }
        weights
    }

    /// Refuses values that make no sense, naming the option.
    pub fn validate(&self) -> Result<()> {
        let range = |what, got: f64, good: bool, expected| match good {
            true => Ok(()),
            false => Err(Error::Range { what, got, expected }),
        };
        let count = self.loss_type.len();
        range("the number of loss_type", count as f64, count > 0, "at least 1")?;
        if !self.loss_weights.is_empty() {
            check_length("loss_weights", self.loss_weights.len(), count)?;
        }
        for &weight in &self.loss_weights {
            range("loss_weights", weight, weight.is_finite(), "numbers")?;
        }
        range("beta", self.beta, self.beta.is_finite() && self.beta > 0.0, "a number above 0")?;
        range("gamma", self.gamma, self.gamma.is_finite(), "a number")?;
        let smoothing = self.label_smoothing;
        range("label_smoothing", smoothing, (0.0..0.5).contains(&smoothing), "at least 0 and below 0.5")?;
        if self.loss_type.contains(&PairLoss::ExoPair) {
            range("label_smoothing", smoothing, smoothing > 0.0, "above 0 for exo_pair; its authors suggest 0.001")?;
        }
        if let Some(alpha) = self.ld_alpha {
            range("ld_alpha", alpha, (0.0..=1.0).contains(&alpha), "between 0 and 1")?;
        }
        range("score_alpha", self.score_alpha, self.score_alpha.is_finite(), "a number")?;
        let tau = self.discopop_tau;
        range("discopop_tau", tau, tau.is_finite() && tau > 0.0, "a number above 0")?;
        let weighted = self.use_weighting || self.worst_case.is_some();
        if weighted && self.loss_type.iter().any(|loss| loss.compares_pairs()) {
            let why = "aot and aot_unpaired compare ranks, which use_weighting and worst_case have no weights for";
            return Err(Error::Conflict { what: "loss_type", why });
        }
        let plain = self.loss_type.len() == 1 && !weighted && self.ld_alpha.is_none();
        if self.ranks() && !(plain && smoothing == 0.0 && self.gamma == 0.0) {
            let why =
                "plackett_luce stands alone, without gamma, label_smoothing, ld_alpha, use_weighting and worst_case";
            return Err(Error::Conflict { what: "loss_type", why });
        }
        if smoothing > 0.0 && !self.loss_type.iter().any(|loss| loss.reads_smoothing()) {
            let why = "only sigmoid, sigmoid_norm, exo_pair, robust, aot and aot_unpaired read it, none of which is in loss_type";
            return Err(Error::Conflict { what: "label_smoothing", why });
        }
        let lowers = self.loss_type.iter().all(|loss| loss.only_lowers_rejected()) && smoothing == 0.0;
        if self.negative == Negative::CeU && !lowers {
            let why = "ce_u lowers, so it needs losses that never raise a rejected completion: sigmoid, sigmoid_norm, hinge, \
                       bco_pair, aot, aot_unpaired, apo_zero and sft, without label_smoothing";
            return Err(Error::Conflict { what: "negative", why });
        }
        let conflict = |why| Err(Error::Conflict { what: "score", why });
        if self.score != Score::ReverseKl && !self.loss_type.iter().all(|loss| loss.takes_any_score()) {
            return conflict(
                "only sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust and discopop know others than reverse_kl",
            );
        }
        if self.score == Score::LogOdds && !(self.reference_free && self.length == Length::Mean) {
            return conflict(
                "log_odds are those of a probability: they need reference_free = true and length = \"mean\"",
            );
        }
        self.worst_case.map_or(Ok(()), |worst_case| worst_case.validate())
    }
}

/// The loss tokens of some pairs. Pair `i` is the sequences `k i` (chosen), `k i + 1` (rejected) and, with `k = 3`,
/// `k i + 2`: the completion of the `sft` term. Lists have one entry per loss token, sequence by sequence.
#[derive(Debug)]
pub struct PairBatch {
    /// log π(y_t), `[N]`, tracking gradients.
    pub log_probs: Tensor,
    /// log ρ(y_t) of the reference model, `[N]`; needed unless `reference_free`.
    pub reference_log_probs: Option<Tensor>,
    /// log π(y_t) at temperature 1/2, `[N]`; needed with `use_weighting`: less log π(y_t) it is
    /// `log π(y_t) - log Σ_v π(v)²`.
    pub sharpened_log_probs: Option<Tensor>,
    /// The sequence each token belongs to; tokens of one sequence are adjacent. A sequence may have none.
    pub sequence: Vec<u32>,
    /// Sequences of each pair, 2 or 3.
    pub sequences_per_pair: usize,
    /// The weight of each pair, `[P]`, with its global denominator inside: 1/P.
    pub weights: Tensor,
    /// Tokens of the `sft` term in the whole batch.
    pub sft_tokens: usize,
    /// For each pair, the number of its prompt; needed by a worst case over prompts.
    pub prompts: Vec<u32>,
}

impl PairBatch {
    /// Tokens of each sequence.
    fn lengths(&self, pairs: usize) -> Result<Vec<usize>> {
        if !(2..=3).contains(&self.sequences_per_pair) {
            let got = self.sequences_per_pair as f64;
            return Err(Error::Range { what: "sequences_per_pair", got, expected: "2 or 3" });
        }
        let mut lengths = vec![0; pairs * self.sequences_per_pair];
        for &sequence in &self.sequence {
            let Some(length) = lengths.get_mut(sequence as usize) else {
                return Err(Error::Range {
                    what: "sequence",
                    got: f64::from(sequence),
                    expected: "a sequence of a pair",
                });
            };
            *length += 1;
        }
        Ok(lengths)
    }

    /// The sums of the tokens' values over the sequences at one place of each pair, `[P]`.
    fn column(&self, of_tokens: &Tensor, place: usize, pairs: usize) -> Result<Tensor> {
        let sums = sequence_sums(of_tokens, &self.sequence, pairs * self.sequences_per_pair)?;
        Ok(sums.reshape((pairs, self.sequences_per_pair))?.narrow(1, place, 1)?.flatten_all()?)
    }

    /// The sums over the chosen and the rejected completions.
    fn two(&self, of_tokens: &Tensor, pairs: usize) -> Result<Two> {
        Ok(Two { chosen: self.column(of_tokens, 0, pairs)?, rejected: self.column(of_tokens, 1, pairs)? })
    }

    /// For each token 1 where its completion is a rejected one, else 0, `[N]`.
    fn rejected(&self) -> Result<Tensor> {
        let place = |&sequence: &u32| u8::from(sequence as usize % self.sequences_per_pair == 1);
        let rejected: Vec<u8> = self.sequence.iter().map(place).collect();
        Ok(Tensor::from_slice(&rejected, rejected.len(), self.log_probs.device())?)
    }

    /// Tokens of the chosen and the rejected completions; 1 for one without any, to divide by.
    fn counts(&self, lengths: &[usize]) -> Result<Two> {
        let of = |place: usize| {
            let lengths = lengths.iter().skip(place).step_by(self.sequences_per_pair);
            let counts: Vec<f64> = lengths.map(|&length| length.max(1) as f64).collect();
            Ok::<_, Error>(Tensor::new(counts, self.log_probs.device())?)
        };
        Ok(Two { chosen: of(0)?, rejected: of(1)? })
    }
}

/// The loss of preference optimisation: one weighted loss for each pair.
///
/// With [`PreferenceOptions::compares_pairs`], the batch must be the whole one.
///
/// Fails when the inputs differ in length, or when one that the options need is missing.
pub fn preference(options: &PreferenceOptions, batch: &PairBatch) -> Result<Loss> {
    let tokens = batch.log_probs.elem_count();
    let pairs = batch.weights.elem_count();
    let log_probs = per_token("log_probs", &batch.log_probs, tokens)?;
    let pair_weights = constant("weights", &batch.weights, pairs)?;
    check_length("sequence", batch.sequence.len(), tokens)?;
    let lengths = batch.lengths(pairs)?;
    if pairs == 0 {
        return Ok(Loss { per_token: pair_weights, statistics: Vec::new() });
    }

    let token_weights = Tensor::new(options.token_weights(&lengths, batch.sequences_per_pair), log_probs.device())?;
    let weighted = |log_probs: &Tensor| batch.two(&log_probs.mul(&token_weights)?, pairs);
    let policy = weighted(&options.negative.log_probs(&log_probs, &batch.rejected()?)?)?;
    let (reference, ratio) = if options.needs_reference() {
        let given = batch.reference_log_probs.as_ref();
        let given = given.ok_or(Error::Missing { what: "reference_log_probs", why: "reference_free is false" })?;
        let reference = weighted(&constant("reference_log_probs", given, tokens)?)?;
        let ratio = policy.zip(&reference, Tensor::sub)?;
        (reference, ratio)
    } else {
        (policy.map(|x| Ok(x.zeros_like()?))?, policy.clone())
    };
    let score = ratio.map(|ratio| options.score.of(ratio, options.score_alpha))?;
    let score_per_token = match options.length {
        Length::Mean => score.clone(),
        Length::Sum => score.zip(&batch.counts(&lengths)?, Tensor::div)?,
    };
    let mut statistics = statistics(options, &policy, &ratio, &score)?;

    let parts = Pairs {
        policy,
        reference,
        ratio,
        score,
        score_per_token,
        beta: options.beta,
        gamma: options.gamma,
        label_smoothing: options.label_smoothing,
        discopop_tau: options.discopop_tau,
    };
    let mut loss = pair_weights.zeros_like()?;
    for (term, weight) in options.terms().filter(|(term, _)| *term != PairLoss::Sft) {
        loss = loss.add(&parts.loss(term)?.affine(weight, 0.0)?)?;
    }

    let mut weights = pair_weights.clone();
    if options.use_weighting {
        let given = batch.sharpened_log_probs.as_ref();
        let given = given.ok_or(Error::Missing { what: "sharpened_log_probs", why: "use_weighting is true" })?;
        let aligned = constant("sharpened_log_probs", given, tokens)?.sub(&log_probs.detach())?;
        let mean = batch.two(&aligned, pairs)?.zip(&batch.counts(&lengths)?, Tensor::div)?;
        weights = weights.mul(&bounded_exp(&mean.chosen.add(&mean.rejected)?)?)?;
    }
    if let Some(worst_case) = options.worst_case {
        let losses = values(&loss)?;
        let relative = worst_case.relative_weights(&losses, &batch.prompts)?;
        weights = weights.mul(&Tensor::new(relative, loss.device())?)?;
    }
    if options.use_weighting || options.worst_case.is_some() {
        let relative = values(&weights.div(&pair_weights)?)?;
        statistics.extend([
            Statistic { name: "pair_weights/mean", values: relative.clone(), reduce: Reduce::Mean },
            Statistic { name: "pair_weights/max", values: relative, reduce: Reduce::Max },
        ]);
    }
    loss = loss.mul(&weights)?;

    if let Some(weight) = options.sft_weight() {
        // The third completion, where there is one, or the chosen one.
        let learnt = if batch.sequences_per_pair == 3 { 2 } else { 0 };
        let nll = batch.column(&log_probs, learnt, pairs)?.neg()?;
        statistics.push(Statistic { name: "nll_loss", values: values(&nll)?, reduce: Reduce::Mean });
        loss = loss.add(&nll.affine(weight / batch.sft_tokens.max(1) as f64, 0.0)?)?;
    }
    Ok(Loss { per_token: loss, statistics })
}

fn statistics(options: &PreferenceOptions, policy: &Two, ratio: &Two, score: &Two) -> Result<Vec<Statistic>> {
    let reward = ratio.map(|ratio| Ok(ratio.affine(options.beta, 0.0)?))?;
    let (chosen, rejected) = (values(&reward.chosen)?, values(&reward.rejected)?);
    let won = chosen.iter().zip(&rejected).map(|(chosen, rejected)| f64::from(u8::from(chosen > rejected))).collect();
    let mean = |name, values| Statistic { name, values, reduce: Reduce::Mean };
    let mut statistics = vec![
        mean("rewards/accuracies", won),
        mean("rewards/margins", chosen.iter().zip(&rejected).map(|(chosen, rejected)| chosen - rejected).collect()),
        mean("rewards/chosen", chosen),
        mean("rewards/rejected", rejected),
        mean("logps/chosen", values(&policy.chosen)?),
        mean("logps/rejected", values(&policy.rejected)?),
    ];
    if options.score == Score::LogOdds {
        let margin = score.difference()?;
        statistics.push(mean("log_odds_chosen", values(&margin)?));
        statistics.push(mean("log_odds_ratio", values(&log_sigmoid(&margin)?)?));
    }
    Ok(statistics)
}
