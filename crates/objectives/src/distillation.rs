//! Distillation: a student moves towards the next-token distributions of teachers.
//!
//! ```text
//! L = Σ_t w_t D(p_t, q_t)        p: the student's distribution at a position, q: the teacher's, both at temperature T
//!
//! forward_kl        D = KL(q ‖ p)
//! reverse_kl        D = KL(p ‖ q)
//! jensen_shannon    D = β KL(q ‖ m) + (1 - β) KL(p ‖ m)      m = β q + (1 - β) p
//! skew_kl           D = KL(q ‖ α q + (1 - α) p)
//! skew_reverse_kl   D = KL(p ‖ α p + (1 - α) q)
//! ```
//!
//! The sums run over the whole vocabulary. The generalised Jensen-Shannon divergence is that of GKD (arXiv 2306.13649,
//! equation 1); divided by β it becomes forward KL as β → 0, and divided by 1 - β reverse KL as β → 1. The skewed divergences
//! are those of DistiLLM (arXiv 2402.03898); α = 0 gives the plain ones.
//!
//! On tokens `y` the student sampled itself, the divergence of a sequence can also be lowered as a return is raised (MiniLLM, arXiv
//! 2306.08543): with `r_t = log q(y_t) - log p(y_t)`,
//!
//! ```text
//! R_t = Σ_{i ≥ t} γ^{i-t} r_i          divided by Σ_{i ≥ t} γ^{i-t} with length_normalization
//! full      L = Σ_t w_t [ D(p_t, q_t) - γ R_{t+1} log p(y_t) ]       the position itself exactly, what follows as a return
//! sampled   L = - Σ_t w_t R_t log p(y_t)                             the position, too, from the token that was drawn
//! ```
//!
//! where the factors of log p are constants. `full` with γ = 0 is GKD's loss, `sampled` with γ = 0 the per-token reverse KL of on-policy
//! distillation, `full` with γ = 1 and `reverse_kl` MiniLLM.
//!
//! On tokens of data, `nll_weight` λ adds their negative log-likelihood, at temperature 1 as in Hinton et al. (arXiv 1503.02531), whatever `T`:
//! `L = Σ_t w_t [ D(p_t, q_t) - λ log softmax(z_t)(y_t) ]`.
//!
//! Where tokens were drawn from a mixture `m_t` with the teacher, the terms of a position weigh `ρ_t = p(y_t) / m_t(y_t)`, MiniLLM's
//! approximation of the ratio of whole beginnings, and what follows is bounded as in PPO (`epsilon`):
//!
//! ```text
//! full      L = Σ_t w_t [ ρ_t D(p_t, q_t) - [ρ_t within bounds] ρ_t γ R_{t+1} log p(y_t) ]
//! ```
//!
//! where a return above 0 has the bound `ρ_t <= 1 + ε`, and one below 0 the bound `ρ_t >= 1 - ε`; beyond it, it teaches nothing.
//!
//! Several teachers with weights, which are divided by their sum, make one target or several ([`Mixing`]). Two teachers can make one that
//! goes beyond the first, away from the second, at every position as far as they differ there ([`mod@crate::extrapolation`]).
//!
//! Deviations:
//! 1. The forward KL of GKD is `forward_kl`, not β = 0; its reverse KL is `reverse_kl`, not β = 1: the formula has neither value.
//! 2. As in TRL, gradients are not multiplied by T², as Hinton et al. do.
//! 3. MiniLLM's exact part of a position is not counted again in its return (TRL's is).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Aggregation;
use crate::distribution::{Distribution, check_range, log_add_exp, times};
use crate::extrapolation::{ExtrapolatedRow, Extrapolation};
use crate::loss::{Error, Reduce, Result, Statistic, check_length};

/// The distance of the student's distribution from the teacher's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// KL(teacher ‖ student): the student covers whatever the teacher does.
    ForwardKl,
    /// KL(student ‖ teacher): the student keeps to what the teacher finds likely.
    #[default]
    ReverseKl,
    /// Between the two, by `beta`.
    JensenShannon,
    /// Forward KL to a mixture with the student, by `skew`.
    SkewKl,
    /// Reverse KL to a mixture with the student, by `skew`.
    SkewReverseKl,
}

/// How several teachers become a target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mixing {
    /// One target: the weighted mean of their probabilities.
    #[default]
    Probabilities,
    /// One target: the softmax of the weighted sum of their logits; a negative weight pushes away from a teacher.
    Logits,
    /// The weighted mean of the divergences from each.
    Losses,
}

/// How the divergence at a position the student sampled is estimated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Estimate {
    /// Over the whole vocabulary.
    #[default]
    Full,
    /// Reverse KL from the sampled token alone; other divergences, and a likelihood of data, it has no estimate of.
    Sampled,
}

/// The parts of the objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DistillationOptions {
    /// The distance of the student's distribution from the teacher's.
    pub divergence: Divergence,
    /// With `jensen_shannon`: the teacher's share of the mixture, above 0 and below 1.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub beta: f64,
    /// With `skew_kl` and `skew_reverse_kl`: the share of the mixture that is the first distribution itself.
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub skew: f64,
    /// Both distributions are compared at this temperature.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub temperature: f64,
    /// How several teachers become a target.
    pub mixing: Mixing,
    /// How much each token counts.
    pub aggregation: Aggregation,
    /// How the divergence at a position the student sampled is estimated.
    pub estimate: Estimate,
    /// How much of the divergence at later positions a sampled token answers for: 0 none of it, 1 all.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub discount: f64,
    /// Divide what a token answers for by the number of positions that entered, each counted by its discount.
    pub length_normalization: bool,
    /// Where tokens were drawn from a mixture with the teacher: how far the importance weight of what follows a token may be from
    /// 1, on the side that its return asks for (MiniLLM's clip).
    #[schemars(extend("minimum" = 0))]
    pub epsilon: f64,
    /// Weight of the negative log-likelihood of the tokens themselves, at temperature 1, on completions that come from data.
    #[schemars(extend("minimum" = 0))]
    pub nll_weight: f64,
    /// Two teachers make one that goes beyond the first, away from the second (AlignDistil). Their weights and `mixing` are then not
    /// read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extrapolation: Option<Extrapolation>,
}

impl Default for DistillationOptions {
    fn default() -> Self {
        Self {
            divergence: Divergence::default(),
            beta: 0.5,
            skew: 0.1,
            temperature: 1.0,
            mixing: Mixing::default(),
            aggregation: Aggregation::Token,
            estimate: Estimate::default(),
            discount: 0.0,
            length_normalization: true,
            epsilon: 0.2,
            nll_weight: 0.0,
            extrapolation: None,
        }
    }
}

/// What the token of a position adds to the loss of its row: `-coefficient · log p(token)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenTerm {
    /// The token.
    pub token: u32,
    /// Its coefficient, with the weight of the position inside.
    pub coefficient: f64,
    /// The temperature of p: that of the options for what a sampled token answers for, 1 for a token of data.
    pub temperature: f64,
}

/// What the row of one position is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DistilledRow {
    /// The weighted loss.
    pub loss: f64,
    /// The divergence from the teachers, in nats.
    pub divergence: f64,
    /// The student's entropy at the temperature, in nats.
    pub entropy: f64,
    /// Whether student and (first) target find the same token most probable.
    pub agrees: bool,
    /// Of a teacher that two models make.
    pub extrapolation: Option<ExtrapolatedRow>,
}

impl DistillationOptions {
    /// Refuses values that make no sense, naming the option.
    pub fn validate(&self) -> Result<()> {
        let between = |value: f64| value > 0.0 && value < 1.0;
        check_range("beta", self.beta, between(self.beta), "above 0 and below 1")?;
        check_range("skew", self.skew, (0.0..1.0).contains(&self.skew), "at least 0 and below 1")?;
        check_range("temperature", self.temperature, self.temperature > 0.0, "a number above 0")?;
        check_range("discount", self.discount, (0.0..=1.0).contains(&self.discount), "0 to 1")?;
        check_range("epsilon", self.epsilon, self.epsilon >= 0.0, "a number, at least 0")?;
        check_range("nll_weight", self.nll_weight, self.nll_weight >= 0.0, "a number, at least 0")?;
        let reverse = self.divergence == Divergence::ReverseKl && self.nll_weight == 0.0;
        if self.estimate == Estimate::Sampled && !reverse {
            let why = "\"sampled\" estimates the reverse KL of the student's own samples alone: it needs divergence = \"reverse_kl\" and \
                       nll_weight = 0";
            return Err(Error::Conflict { what: "estimate", why });
        }
        let Some(extrapolation) = &self.extrapolation else { return Ok(()) };
        extrapolation.validate()?;
        match self.estimate == Estimate::Full && self.discount == 0.0 && self.nll_weight == 0.0 {
            true => Ok(()),
            false => {
                let why = "it needs whole distributions and nothing beside them: estimate = \"full\", discount = 0, nll_weight = 0";
                Err(Error::Conflict { what: "extrapolation", why })
            }
        }
    }

    /// The weights of teachers, divided by their sum.
    ///
    /// # Errors
    /// No teachers; a sum that is not positive; a negative weight other than of logits.
    pub fn shares(&self, weights: &[f64]) -> Result<Vec<f64>> {
        let total: f64 = weights.iter().sum();
        check_range("the sum of the teachers' weights", total, total > 0.0, "a number above 0")?;
        for &weight in weights {
            let valid = weight >= 0.0 || self.mixing == Mixing::Logits;
            check_range("the weight of a teacher", weight, valid, "at least 0, unless `mixing` is `logits`")?;
        }
        Ok(weights.iter().map(|weight| weight / total).collect())
    }

    /// The targets that the teachers' logits at one position make, each with its weight; the weights add up to 1.
    ///
    /// # Errors
    /// Rows of different lengths, or another number of them than of shares.
    pub fn targets(&self, logits: &[&[f32]], shares: &[f64]) -> Result<Vec<(f64, Distribution)>> {
        check_length("the teachers' rows", logits.len(), shares.len())?;
        let vocabulary = logits.first().map_or(0, |row| row.len());
        for row in logits {
            check_length("a teacher's row", row.len(), vocabulary)?;
        }
        let single = |row: &&[f32]| Distribution::new(row, self.temperature);
        Ok(match (self.mixing, logits) {
            (_, [row]) => vec![(1.0, single(row))],
            (Mixing::Losses, _) => shares.iter().copied().zip(logits.iter().map(single)).collect(),
            (Mixing::Probabilities, _) => {
                // Of logarithms: where all probabilities are too small for a number, their mean still has one.
                let mut mixed = vec![f64::NEG_INFINITY; vocabulary];
                for (row, share) in logits.iter().zip(shares) {
                    let log_share = share.ln();
                    let of_row = single(row);
                    let terms = of_row.log_probs().iter().map(|log_p| log_share + log_p);
                    mixed.iter_mut().zip(terms).for_each(|(sum, term)| *sum = log_add_exp(*sum, term));
                }
                vec![(1.0, Distribution::of(mixed))]
            }
            (Mixing::Logits, _) => {
                let mixed = (0..vocabulary).map(|token| {
                    let logits = logits.iter().map(|row| f64::from(row[token]));
                    // A token that one teacher excludes is excluded, whatever its weight.
                    if logits.clone().any(|logit| logit == f64::NEG_INFINITY) {
                        return f64::NEG_INFINITY;
                    }
                    logits.zip(shares).map(|(logit, share)| share * logit).sum::<f64>() / self.temperature
                });
                vec![(1.0, Distribution::of(mixed.collect()))]
            }
        })
    }

    /// The loss at one position, `weight · D - coefficient · log p(token)` with the term `and`. The student's logits are replaced by its
    /// gradient.
    ///
    /// # Errors
    /// Targets of another vocabulary.
    pub fn row(
        &self,
        student: &mut [f32],
        targets: &[(f64, Distribution)],
        weight: f64,
        and: Option<TokenTerm>,
    ) -> Result<DistilledRow> {
        let p = Distribution::new(student, self.temperature);
        let mut divergence = 0.0;
        let mut g = vec![0.0; student.len()];
        for (share, q) in targets {
            check_length("the teacher's vocabulary", q.probs().len(), student.len())?;
            for ((g, p), q) in g.iter_mut().zip(p.pairs()).zip(q.pairs()) {
                let (d, g_token) = self.term(p, q);
                divergence += share * d;
                *g += weight * share * g_token;
            }
        }
        let mut loss = weight * divergence;
        if let Some(TokenTerm { token, coefficient, temperature }) = and {
            let token = token as usize;
            // The gradient below is divided by the options' temperature.
            let scaled = coefficient * (self.temperature / temperature);
            g[token] -= scaled;
            if temperature == self.temperature {
                loss -= coefficient * p.log_probs()[token];
            } else {
                let own = Distribution::new(student, temperature);
                loss -= coefficient * own.log_probs()[token];
                // This term's part of g then adds up to 0, so that the softmax below leaves it as it is.
                g.iter_mut().zip(own.probs()).for_each(|(g, p)| *g += scaled * p);
            }
        }
        p.write_gradient(&g, 1.0, self.temperature, student);
        let agrees = targets.first().is_some_and(|(_, q)| q.most_probable() == p.most_probable());
        Ok(DistilledRow { loss, divergence, entropy: p.entropy(), agrees, extrapolation: None })
    }

    /// The loss at one position, `weight · β/w · D`, where two teachers with these logits make one. The student's logits are replaced by
    /// its gradient.
    ///
    /// # Errors
    /// No options of an extrapolation; another number of teachers than two; other vocabularies.
    pub fn extrapolated_row(&self, student: &mut [f32], teachers: &[&[f32]], weight: f64) -> Result<DistilledRow> {
        let missing = Error::Missing { what: "extrapolation", why: "two teachers are to make one" };
        let teacher = self.extrapolation.ok_or(missing)?.teacher(teachers, self.temperature)?;
        check_length("the teacher's vocabulary", teacher.rewards.len(), student.len())?;
        let seen = teacher.seen_by(&Distribution::new(student, self.temperature));
        let row = self.row(student, &[(1.0, teacher.target)], weight * teacher.coefficient, None)?;
        Ok(DistilledRow { extrapolation: Some(seen), ..row })
    }

    /// The summand of the divergence for a token with (p, log p) and (q, log q), and `p ∂D/∂p` up to a multiple of p, which
    /// the softmax cancels.
    fn term(&self, (p, log_p): (f64, f64), (q, log_q): (f64, f64)) -> (f64, f64) {
        match self.divergence {
            Divergence::ForwardKl => (times(q, log_q - log_p), -q),
            Divergence::ReverseKl => {
                let d = times(p, log_p - log_q);
                (d, d)
            }
            Divergence::JensenShannon => {
                let beta = self.beta;
                let log_m = (beta * q + (1.0 - beta) * p).ln();
                let (from_q, from_p) = (times(q, log_q - log_m), (1.0 - beta) * times(p, log_p - log_m));
                (beta * from_q + from_p, from_p)
            }
            Divergence::SkewKl => {
                let m = self.skew * q + (1.0 - self.skew) * p;
                let log_m = if self.skew == 0.0 { log_p } else { m.ln() };
                let ratio = if m == 0.0 { 1.0 } else { p / m };
                (times(q, log_q - log_m), -(1.0 - self.skew) * q * ratio)
            }
            Divergence::SkewReverseKl => {
                let m = self.skew * p + (1.0 - self.skew) * q;
                let log_m = if self.skew == 0.0 { log_q } else { m.ln() };
                let d = times(p, log_p - log_m);
                // With no share of its own the mixture can be 0 in floating point where p is not.
                let own = if self.skew == 0.0 { 0.0 } else { self.skew * times(p, p / m) };
                (d, d - own)
            }
        }
    }

    /// What each sampled token answers for: the factor of its log-probability in the formulas above, but for its weight.
    /// `rewards` are `log q(y_t) - log p(y_t)` of each token, in nats, `lengths` those of the sequences.
    ///
    /// # Errors
    /// Lengths that do not add up to the rewards.
    pub fn returns(&self, rewards: &[f64], lengths: &[usize]) -> Result<Vec<f64>> {
        check_length("rewards", rewards.len(), lengths.iter().sum())?;
        let mut returns = vec![0.0; rewards.len()];
        let mut end = 0;
        for &length in lengths {
            let start = end;
            end += length;
            // The discounted sum over a token and those after it, and its number of terms.
            let (mut sum, mut terms) = (0.0, 0.0);
            for t in (start..end).rev() {
                let later = (sum, terms);
                (sum, terms) = (rewards[t] + self.discount * sum, 1.0 + self.discount * terms);
                let (factor, (sum, terms)) = match self.estimate {
                    Estimate::Full => (self.discount, later),
                    Estimate::Sampled => (1.0, (sum, terms)),
                };
                let divided = self.length_normalization && terms > 0.0;
                returns[t] = factor * if divided { sum / terms } else { sum };
            }
        }
        Ok(returns)
    }
}

impl DistillationOptions {
    /// Takes importance weights `p(y_t) / m(y_t)` of sampled tokens into account: `weights` of their positions are multiplied by
    /// them, and returns beyond the clip are set to 0. Tokens that come after those of `ratios` are left as they are.
    pub fn weigh(&self, weights: &mut [f64], returns: &mut [f64], ratios: &[f64]) {
        for ((weight, value), ratio) in weights.iter_mut().zip(returns).zip(ratios) {
            *weight *= ratio;
            let beyond = if *value > 0.0 { *ratio > 1.0 + self.epsilon } else { *ratio < 1.0 - self.epsilon };
            if beyond {
                *value = 0.0;
            }
        }
    }
}

/// What there is to log about rows:
/// - `divergence`: their mean divergence from the teachers, in nats.
/// - `entropy`: mean entropy of the student, in nats.
/// - `teacher_agreement`: share of positions where student and teacher find the same token most probable.
/// - With an extrapolation, `extrapolation/weight`, `extrapolation/expected_reward`: means of w and of the student's expected reward at a
///   position. `extrapolation/largest_shift`: the most that a token's log-probability was moved by.
pub fn statistics(rows: &[DistilledRow]) -> Vec<Statistic> {
    let mean = |name, value: fn(&DistilledRow) -> f64| Statistic {
        name,
        values: rows.iter().map(value).collect(),
        reduce: Reduce::Mean,
    };
    let mut all = vec![
        mean("divergence", |row| row.divergence),
        mean("entropy", |row| row.entropy),
        mean("teacher_agreement", |row| f64::from(u8::from(row.agrees))),
    ];
    let seen: Vec<ExtrapolatedRow> = rows.iter().filter_map(|row| row.extrapolation).collect();
    if !seen.is_empty() {
        let of = |name, reduce, value: fn(&ExtrapolatedRow) -> f64| Statistic {
            name,
            values: seen.iter().map(value).collect(),
            reduce,
        };
        all.extend([
            of("extrapolation/weight", Reduce::Mean, |row| row.weight),
            of("extrapolation/expected_reward", Reduce::Mean, |row| row.expected_reward),
            of("extrapolation/largest_shift", Reduce::Max, |row| row.largest_shift),
        ]);
    }
    all
}
