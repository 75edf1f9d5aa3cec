//! Reward models: scores of completions learned from comparisons, from labels, and from labels of single steps.
//!
//! | function | loss of an item | source |
//! | --- | --- | --- |
//! | [`bradley_terry`] | `-(1 - ε) log σ(u) - ε log σ(-u) + λ (r_c + r_r)²` of a pair, `u = r_c - r_r - m` | Ouyang et al., arXiv 2203.02155; margin `m`: Llama 2, arXiv 2307.09288; centring `λ`: Eisenstein et al., arXiv 2312.09244; smoothing `ε`: Wang et al., arXiv 2401.06080 |
//! | [`plackett_luce`] | `-Σ_k log(e^{r_k} / Σ_{j≥k} e^{r_j})` of a ranking, best first | Plackett 1975; InstructGPT's rankings without cutting them into pairs |
//! | [`labelled`] with `mse` | `(r - y)²` of a completion with a score `y` | HelpSteer2, arXiv 2406.08673 |
//! | [`labelled`] with `bce` | `-y log σ(r) - (1 - y) log σ(-r)`, `y` in `[0, 1]` | outcome: Cobbe et al., arXiv 2110.14168; steps: Math-Shepherd, arXiv 2312.08935 |
//! | [`classified`] | `-log softmax(r)_y` of a step with class `y` | Uesato et al., arXiv 2211.14275; TRL's `PRMTrainer` |
//!
//! `r` are outputs of a score head; an item counts as much as its weight says, which has the global denominator inside. OpenRLHF's
//! `log(1 + e^{r_r - r_c})` is the first row with `m = λ = ε = 0`, written differently.
//!
//! Metrics, named as TRL's `RewardTrainer` and `PRMTrainer` name them:
//! - `accuracy`: share of pairs whose chosen completion scores higher (ties do not); of items on the right side of 0, or whose largest
//!   output is that of their class. `margin`: mean of `r_c - r_r`. `mean_reward`, `min_reward`, `max_reward`: over all scores.
//! - `mse`: mean squared error, of `labelled` with `mse`.

use candle_core::{D, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::{Error, Loss, Reduce, Result, Statistic, check_length, constant, per_token, values};
use crate::scalar::log_sigmoid;

/// Scores of pairs; every list has one entry per pair.
#[derive(Debug)]
pub struct ScoredPairs {
    /// Score of the chosen completion, `[P]`, tracking gradients.
    pub chosen: Tensor,
    /// Score of the rejected completion, `[P]`, tracking gradients.
    pub rejected: Tensor,
    /// By how much the chosen score should lead, `[P]`; 0 where the data do not say.
    pub margins: Vec<f64>,
    /// The share of the pairs taken to be the wrong way round.
    pub label_smoothing: f64,
    /// The weight of each pair, with its global denominator inside, `[P]`.
    pub weights: Vec<f64>,
}

/// The Bradley-Terry loss with margins, smoothed labels, and the centring term of weight `center`.
///
/// # Errors
/// Inputs that differ in length; a negative `center`; a smoothing that is no share below a half.
pub fn bradley_terry(pairs: &ScoredPairs, center: f64) -> Result<Loss> {
    if !(center.is_finite() && center >= 0.0) {
        let (what, expected) = ("center_rewards_coefficient", "a number from 0 up");
        return Err(Error::Range { what, got: center, expected });
    }
    let smoothing = pairs.label_smoothing;
    if !(0.0..0.5).contains(&smoothing) {
        return Err(Error::Range { what: "label_smoothing", got: smoothing, expected: "at least 0 and below 0.5" });
    }
    let count = pairs.chosen.elem_count();
    let chosen = per_token("chosen", &pairs.chosen, count)?;
    let rejected = per_token("rejected", &pairs.rejected, count)?;
    let margins = row("margins", &pairs.margins, &chosen)?;
    let difference = chosen.sub(&rejected)?;
    let lead = difference.sub(&margins)?;
    let mut loss = log_sigmoid(&lead)?.affine(-(1.0 - smoothing), 0.0)?;
    if smoothing > 0.0 {
        loss = loss.sub(&log_sigmoid(&lead.neg()?)?.affine(smoothing, 0.0)?)?;
    }
    if center > 0.0 {
        loss = loss.add(&chosen.add(&rejected)?.sqr()?.affine(center, 0.0)?)?;
    }
    let difference = values(&difference)?;
    let scores: Vec<f64> = interleaved(&values(&chosen)?, &values(&rejected)?);
    let mut statistics = vec![
        accuracy(difference.iter().map(|difference| *difference > 0.0)),
        Statistic { name: "margin", values: difference, reduce: Reduce::Mean },
    ];
    statistics.extend(rewards(&scores));
    Ok(Loss { per_token: loss.mul(&row("weights", &pairs.weights, &chosen)?)?, statistics })
}

/// The Plackett-Luce loss of rankings: `scores` holds those of the first ranking from best to worst, then those of the next, `lengths`
/// the number of each. The loss of a ranking lies at its items, whose `weights` are given.
///
/// # Errors
/// Inputs that differ in length.
pub fn plackett_luce(scores: &Tensor, lengths: &[usize], weights: &[f64]) -> Result<Loss> {
    let count = scores.elem_count();
    let scores = per_token("scores", scores, count)?;
    check_length("rankings", lengths.iter().sum(), count)?;
    let numbers = values(&scores)?;
    let (mut losses, mut statistics, mut first) = (Vec::new(), Vec::new(), 0);
    let mut margins = Vec::new();
    for &length in lengths {
        for place in first..first + length {
            let rest = scores.narrow(0, place, first + length - place)?;
            losses.push(log_sum_exp(&rest)?.sub(&scores.narrow(0, place, 1)?)?);
            margins.extend(numbers[place + 1..first + length].iter().map(|worse| numbers[place] - worse));
        }
        first += length;
    }
    statistics.push(accuracy(margins.iter().map(|margin| *margin > 0.0)));
    statistics.push(Statistic { name: "margin", values: margins, reduce: Reduce::Mean });
    statistics.extend(rewards(&numbers));
    let loss = if losses.is_empty() { scores.clone() } else { Tensor::cat(&losses, 0)? };
    Ok(Loss { per_token: loss.mul(&row("weights", weights, &scores)?)?, statistics })
}

/// How a score is held against a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LabelLoss {
    /// Binary cross-entropy: the score is the log-odds of being right, the label its probability, from 0 to 1.
    #[default]
    Bce,
    /// Squared error: the score is the label, whatever its range.
    Mse,
}

/// The loss of scores with labels, `[N]` each: completions with theirs (an outcome reward model), or steps with theirs.
///
/// # Errors
/// Inputs that differ in length; a label that is no probability, for `bce`.
pub fn labelled(loss: LabelLoss, scores: &Tensor, labels: &[f64], weights: &[f64]) -> Result<Loss> {
    let scores = per_token("scores", scores, scores.elem_count())?;
    let targets = row("labels", labels, &scores)?;
    let numbers = values(&scores)?;
    let (per_item, first) = match loss {
        LabelLoss::Bce => {
            if let Some(&got) = labels.iter().find(|label| !(0.0..=1.0).contains(*label)) {
                return Err(Error::Range { what: "a label", got, expected: "0 to 1" });
            }
            let right = log_sigmoid(&scores)?.mul(&targets)?;
            let wrong = log_sigmoid(&scores.neg()?)?.mul(&targets.affine(-1.0, 1.0)?)?;
            let sides = numbers.iter().zip(labels).map(|(score, label)| (*score > 0.0) == (*label > 0.5));
            (right.add(&wrong)?.neg()?, accuracy(sides))
        }
        LabelLoss::Mse => {
            let squared = scores.sub(&targets)?.sqr()?;
            let errors = values(&squared)?;
            (squared, Statistic { name: "mse", values: errors, reduce: Reduce::Mean })
        }
    };
    let statistics = std::iter::once(first).chain(rewards(&numbers)).collect();
    Ok(Loss { per_token: per_item.mul(&row("weights", weights, &scores)?)?, statistics })
}

/// The cross-entropy of items with one output a class, `[N, K]`, and the class of each.
///
/// # Errors
/// Inputs that differ in length; a class that has no output.
pub fn classified(outputs: &Tensor, classes: &[u32], weights: &[f64]) -> Result<Loss> {
    let (count, width) = outputs.dims2()?;
    check_length("classes", classes.len(), count)?;
    if let Some(&class) = classes.iter().find(|&&class| class as usize >= width) {
        return Err(Error::Range { what: "a class", got: class.into(), expected: "one of the head's outputs" });
    }
    let outputs = outputs.to_dtype(candle_core::DType::F64)?;
    let own = Tensor::from_slice(classes, (count, 1), outputs.device())?;
    let loss = match count {
        0 => outputs.flatten_all()?,
        _ => log_sum_exp(&outputs)?.sub(&outputs.gather(&own, 1)?)?.squeeze(1)?,
    };
    let rows: Vec<Vec<f64>> = outputs.to_vec2()?;
    // The first of equal outputs wins, as in an argmax.
    let largest = |row: &[f64]| (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
    let right = rows.iter().zip(classes).map(|(row, class)| largest(row) == *class as usize);
    Ok(Loss { per_token: loss.mul(&row("weights", weights, &loss)?)?, statistics: vec![accuracy(right)] })
}

/// How the scores of the steps of a completion become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepAggregation {
    /// A chain is as good as its weakest step (Lightman et al., arXiv 2305.20050).
    #[default]
    Min,
    /// The probability that every step is right, if they are independent.
    Product,
    /// What the last step says about all before it.
    Last,
    /// The mean.
    Mean,
}

impl StepAggregation {
    /// The score of steps that are right with these probabilities; `None` without steps.
    pub fn of(self, steps: &[f64]) -> Option<f64> {
        let last = *steps.last()?;
        Some(match self {
            Self::Min => steps.iter().copied().fold(f64::INFINITY, f64::min),
            Self::Product => steps.iter().product(),
            Self::Last => last,
            Self::Mean => steps.iter().sum::<f64>() / steps.len() as f64,
        })
    }
}

/// How the scores that several reward models give one completion become one (Coste et al., arXiv 2310.02743).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ensemble {
    /// The mean.
    #[default]
    Mean,
    /// The most pessimistic: worst-case optimisation.
    Min,
    /// The mean less `uncertainty_penalty` times the variance: uncertainty-weighted optimisation.
    UncertaintyPenalized,
}

impl Ensemble {
    /// The joint score; `None` without scores.
    pub fn of(self, scores: &[f64], uncertainty_penalty: f64) -> Option<f64> {
        let mean = StepAggregation::Mean.of(scores)?;
        Some(match self {
            Self::Mean => mean,
            Self::Min => scores.iter().copied().fold(f64::INFINITY, f64::min),
            Self::UncertaintyPenalized => {
                let variance = scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / scores.len() as f64;
                mean - uncertainty_penalty * variance
            }
        })
    }
}

/// `log Σ e^x` over the last dimension, which stays with size 1.
fn log_sum_exp(x: &Tensor) -> Result<Tensor> {
    let largest = x.detach().max_keepdim(D::Minus1)?;
    Ok(x.broadcast_sub(&largest)?.exp()?.sum_keepdim(D::Minus1)?.log()?.add(&largest)?)
}

/// Constants, one for each of the entries of `like`.
pub(crate) fn row(what: &'static str, numbers: &[f64], like: &Tensor) -> Result<Tensor> {
    constant(what, &Tensor::from_slice(numbers, numbers.len(), like.device())?, like.elem_count())
}

fn accuracy(right: impl Iterator<Item = bool>) -> Statistic {
    Statistic {
        name: "accuracy",
        values: right.map(|right| f64::from(u8::from(right))).collect(),
        reduce: Reduce::Mean,
    }
}

fn rewards(scores: &[f64]) -> [Statistic; 3] {
    [("mean_reward", Reduce::Mean), ("min_reward", Reduce::Min), ("max_reward", Reduce::Max)]
        .map(|(name, reduce)| Statistic { name, values: scores.to_vec(), reduce })
}

fn interleaved(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).flat_map(|(a, b)| [*a, *b]).collect()
}
