//! A teacher made of two models, token by token: towards the first and away from the second (AlignDistil).
//!
//! At a position where the models' logits are `z_1` and `z_2`, their distributions `p_1` and `p_2`, and a student's `p`:
//!
//! ```text
//! anchor = "first"      z* = z_1 + w (z_1 - z_2)            a DPO model and one of the reversed pairs
//! anchor = "second"     z* = z_2 + w (z_1 - z_2)            a DPO model and its reference
//! w                     = weight, or with adaptive weights  weight · Σ_a abs(p_1(a) - p_2(a)) + 10⁻³
//! l                     = β/w · D(p, softmax(z*))
//! r(a)                  = β (log p_1(a) - log p_2(a))       the token's reward
//! ```
//!
//! Zhang et al., "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation", ACL 2025, arXiv 2503.02832. Theorem 1 is
//! the reason: with `anchor = "second"` and a divergence from it of weight `β_2 = β/w`, reward less divergence is, position by position,
//!
//! ```text
//! Σ_a p(a) [r(a) - β_2 log(p(a) / p_2(a))] = - β_2 KL(p ‖ softmax(z*)) + β_2 log Z,    Z = Σ_a p_1(a)^w p_2(a)^{1-w}
//! ```
//!
//! so that the most of the one is the least of the other, with its whole gradient and without samples of actions. Contexts are sampled, and
//! their own gradient is left out. With the first as anchor it is the divergence from that which is weighed. Where two models disagree,
//! adaptive weights extrapolate far, at a small coefficient; where they agree, the teacher is the anchor, at a large one, up to `1000 β`.
//!
//! | AlignDistil's mode | teachers | `anchor` | `adaptive` |
//! | --- | --- | --- | --- |
//! | `theorem1` | DPO, reference | `second` | no |
//! | `theorem1_contrast` | DPO, reverse DPO | `first` | no |
//! | `theorem1_adaptive` | DPO, reference | `second` | yes |
//! | `aligndistil` | DPO, reverse DPO | `first` | yes |
//! | `gkd` | DPO | without extrapolation | |
//!
//! The distance of the distributions is the sum of absolute differences, from 0 to 2, as in the authors' code. Nothing here has a
//! gradient but `p`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::distribution::{Distribution, check_range};
use crate::loss::{Result, check_length};

/// Added to an adaptive weight, so that the coefficient stays finite where two models are the same.
pub const LEAST_WEIGHT: f64 = 1e-3;

/// How two teachers make one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Extrapolation {
    /// Where the extrapolation starts, and where it ends with a weight of 0.
    pub anchor: Anchor,
    /// The weight w of the difference of the logits; with `adaptive`, its factor α: 10 on completions of a data set, 15 on the student's
    /// own, in the paper.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub weight: f64,
    /// Weights follow the distance of the two distributions, token by token.
    pub adaptive: bool,
    /// The β that the first teacher was trained with: the scale of its rewards.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub beta: f64,
}

/// Where an extrapolation starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Anchor {
    /// At the first teacher, which is exceeded.
    #[default]
    First,
    /// At the second, usually the model that both started from: the first is at weight 1.
    Second,
}

impl Default for Extrapolation {
    fn default() -> Self {
        Self { anchor: Anchor::First, weight: 15.0, adaptive: true, beta: 0.1 }
    }
}

/// The teacher at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct ExtrapolatedTeacher {
    /// What the student is to be like.
    pub target: Distribution,
    /// The weight w.
    pub weight: f64,
    /// What the divergence from it counts: β/w.
    pub coefficient: f64,
    /// The reward of each token; 0 for one that either model excludes.
    pub rewards: Vec<f64>,
    /// The largest `w abs(z_1 - z_2)`, up to the constant that logits are free in: of differences of log-probabilities.
    pub largest_shift: f64,
}

/// What there is to log about a position with such a teacher.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExtrapolatedRow {
    /// The weight w.
    pub weight: f64,
    /// The student's expected reward.
    pub expected_reward: f64,
    /// The largest shift of a log-probability.
    pub largest_shift: f64,
}

impl Extrapolation {
    /// Refuses values that make no sense.
    pub fn validate(&self) -> Result<()> {
        check_range("extrapolation.weight", self.weight, self.weight > 0.0, "a number above 0")?;
        check_range("extrapolation.beta", self.beta, self.beta > 0.0, "a number above 0")
    }

    /// The teacher that two rows of logits make, at a temperature.
    ///
    /// # Errors
    /// Another number of rows than two; rows of different lengths.
    pub fn teacher(&self, logits: &[&[f32]], temperature: f64) -> Result<ExtrapolatedTeacher> {
        check_length("the teachers of an extrapolation", logits.len(), 2)?;
        check_length("the second teacher's row", logits[1].len(), logits[0].len())?;
        let [first, second] = [0, 1].map(|teacher| Distribution::new(logits[teacher], temperature));
        let weight = match self.adaptive {
            true => {
                let distance: f64 = first.probs().iter().zip(second.probs()).map(|(p, q)| (p - q).abs()).sum();
                self.weight * distance + LEAST_WEIGHT
            }
            false => self.weight,
        };
        let anchor = if self.anchor == Anchor::First { &first } else { &second };
        // A token that either model excludes has no difference: infinity minus infinity is no number.
        let excluded = |(a, b): (&f64, &f64)| *a == f64::NEG_INFINITY || *b == f64::NEG_INFINITY;
        let both = || first.log_probs().iter().zip(second.log_probs());
        let differences: Vec<f64> = both().map(|pair| if excluded(pair) { 0.0 } else { pair.0 - pair.1 }).collect();
        let target = (both().zip(anchor.log_probs()).zip(&differences))
            .map(|((pair, start), difference)| match excluded(pair) {
                true => f64::NEG_INFINITY,
                false => start + weight * difference,
            })
            .collect();
        Ok(ExtrapolatedTeacher {
            target: Distribution::of(target),
            weight,
            coefficient: self.beta / weight,
            largest_shift: differences.iter().fold(0.0, |most: f64, difference| most.max((weight * difference).abs())),
            rewards: differences.into_iter().map(|difference| self.beta * difference).collect(),
        })
    }
}

impl ExtrapolatedTeacher {
    /// What there is to log about a student.
    pub fn seen_by(&self, student: &Distribution) -> ExtrapolatedRow {
        let rewards = student.probs().iter().zip(&self.rewards).map(|(p, reward)| p * reward);
        ExtrapolatedRow { weight: self.weight, expected_reward: rewards.sum(), largest_shift: self.largest_shift }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use base::{Purpose, Random};

    use super::*;
    use crate::DistillationOptions;

    const VOCABULARY: usize = 7;

    /// Logits of three models and a student.
    fn rows(seed: u64) -> [Vec<f32>; 4] {
        let random = Random::new(seed, Purpose::Test);
        [0, 1, 2, 3].map(|row| {
            (0..VOCABULARY as u32).map(|token| (4.0 * random.prompt(row).at(token).uniform() - 2.0) as f32).collect()
        })
    }

    fn of(row: &[f32]) -> Distribution {
        Distribution::new(row, 1.0)
    }

    fn kl(p: &Distribution, q: &Distribution) -> f64 {
        p.pairs().zip(q.log_probs()).map(|((p, log_p), log_q)| p * (log_p - log_q)).sum()
    }

    fn fixed(anchor: Anchor, weight: f64) -> Extrapolation {
        Extrapolation { anchor, weight, adaptive: false, beta: 0.1 }
    }

    #[test]
    fn reward_less_divergence_is_the_divergence_from_the_teacher() {
        for (seed, weight) in (0..20).flat_map(|seed| [0.2, 1.0, 3.0].map(|weight| (seed, weight))) {
            let [dpo, reference, _, student] = rows(seed);
            let teacher = fixed(Anchor::Second, weight).teacher(&[&dpo, &reference], 1.0).unwrap();
            let (p, p_ref, p_dpo) = (of(&student), of(&reference), of(&dpo));
            let beta_2 = 0.1 / weight;
            let left: f64 = (p.pairs().zip(p_ref.log_probs()).zip(&teacher.rewards))
                .map(|(((p, log_p), log_ref), reward)| p * (reward - beta_2 * (log_p - log_ref)))
                .sum();
            let both = p_dpo.log_probs().iter().zip(p_ref.log_probs());
            let z: f64 = both.map(|(a, b)| (weight * a + (1.0 - weight) * b).exp()).sum();
            let right = -beta_2 * kl(&p, &teacher.target) + beta_2 * z.ln();
            assert!((left - right).abs() < 1e-12, "{left} {right}");
            if weight == 1.0 {
                assert!(z.ln().abs() < 1e-12 && kl(&teacher.target, &p_dpo) < 1e-12, "the teacher is the DPO model");
            }
        }
    }

    #[test]
    fn the_contrastive_teacher_is_best_for_twice_the_reward_and_a_divergence_from_the_dpo_model() {
        let [dpo, reverse, _, _] = rows(5);
        let (weight, beta) = (0.7, 0.1);
        let teacher = fixed(Anchor::First, weight).teacher(&[&dpo, &reverse], 1.0).unwrap();
        let objective = |p: &Distribution| -> f64 {
            let rewards = p.probs().iter().zip(&teacher.rewards).map(|(p, reward)| p * reward).sum::<f64>();
            rewards - beta / weight * kl(p, &of(&dpo))
        };
        let best = objective(&teacher.target);
        for seed in 100..400 {
            assert!(objective(&of(&rows(seed)[3])) < best);
        }
    }

    /// Exact DPO models of a reward, from the same reference: the contrast is twice the reward, up to a constant.
    #[test]
    fn the_contrast_of_exact_models_is_twice_the_reward() {
        let [reference, reward, _, _] = rows(8);
        let tilted =
            |sign: f32| -> Vec<f32> { reference.iter().zip(&reward).map(|(z, r)| z + sign * r / 0.1).collect() };
        let (dpo, reverse) = (tilted(1.0), tilted(-1.0));
        let contrast = Extrapolation { beta: 0.1, ..Default::default() }.teacher(&[&dpo, &reverse], 1.0).unwrap();
        let single = Extrapolation { beta: 0.1, ..Default::default() }.teacher(&[&dpo, &reference], 1.0).unwrap();
        let constant = contrast.rewards[0] - 2.0 * f64::from(reward[0]);
        let single_constant = single.rewards[0] - f64::from(reward[0]);
        for ((reward, twice), once) in reward.iter().zip(&contrast.rewards).zip(&single.rewards) {
            assert!((twice - 2.0 * f64::from(*reward) - constant).abs() < 1e-5);
            assert!((once - f64::from(*reward) - single_constant).abs() < 1e-5);
        }
    }

    #[test]
    fn limits() {
        let [dpo, reference, _, _] = rows(1);
        let at = |extrapolation: Extrapolation, second: &[f32]| extrapolation.teacher(&[&dpo, second], 1.0).unwrap();
        // An infinite β_2 is a weight of 0: the reference; β_2 = β is the DPO model.
        assert!(kl(&at(fixed(Anchor::Second, 1e-9), &reference).target, &of(&reference)) < 1e-12);
        assert!(kl(&at(fixed(Anchor::Second, 1.0), &reference).target, &of(&dpo)) < 1e-12);
        assert!(kl(&at(fixed(Anchor::First, 1e-9), &reference).target, &of(&dpo)) < 1e-12);
        // Two models that are one: the teacher is the DPO model, at the largest coefficient.
        for anchor in [Anchor::First, Anchor::Second] {
            let same = at(Extrapolation { anchor, ..Extrapolation::default() }, &dpo);
            assert!(kl(&same.target, &of(&dpo)) < 1e-12);
            assert!(
                (same.weight, same.largest_shift) == (LEAST_WEIGHT, 0.0) && (same.coefficient - 100.0).abs() < 1e-9
            );
        }
        // The distance is at most 2.
        let sure =
            |token: usize| -> Vec<f32> { (0..VOCABULARY).map(|v| if v == token { 60.0 } else { 0.0 }).collect() };
        let far =
            Extrapolation { weight: 15.0, ..Extrapolation::default() }.teacher(&[&sure(0), &sure(1)], 1.0).unwrap();
        assert!((far.weight - 30.0 - LEAST_WEIGHT).abs() < 1e-9);
        // Without a factor only the least weight is left.
        let least = at(Extrapolation { weight: 1e-12, ..Extrapolation::default() }, &reference);
        assert!((least.weight - LEAST_WEIGHT).abs() < 1e-9 && kl(&least.target, &of(&dpo)) < 1e-5);
    }

    #[test]
    fn the_loss_of_equal_models_is_a_hundred_times_that_of_distillation() {
        let [dpo, _, _, student] = rows(2);
        let plain = DistillationOptions::default();
        let mut logits = student.clone();
        let gkd = plain.row(&mut logits, &plain.targets(&[&dpo], &[1.0]).unwrap(), 0.25, None).unwrap();
        let options = DistillationOptions { extrapolation: Some(Extrapolation::default()), ..plain };
        let mut logits = student;
        let row = options.extrapolated_row(&mut logits, &[&dpo, &dpo], 0.25).unwrap();
        assert!((row.loss - 100.0 * gkd.loss).abs() < 1e-9 && row.divergence == gkd.divergence);
        assert_eq!(row.extrapolation.map(|found| found.expected_reward), Some(0.0));
    }

    #[test]
    fn gradients_equal_the_formula_and_finite_differences() {
        for (seed, adaptive) in (20..30).flat_map(|seed| [false, true].map(|adaptive| (seed, adaptive))) {
            let [dpo, reverse, _, student] = rows(seed);
            let extrapolation = Extrapolation { weight: 1.5, adaptive, ..Extrapolation::default() };
            let options = DistillationOptions { extrapolation: Some(extrapolation), ..Default::default() };
            let loss = |student: &[f32]| {
                let mut logits = student.to_vec();
                let row = options.extrapolated_row(&mut logits, &[&dpo, &reverse], 0.5).unwrap();
                (row.loss, logits)
            };
            let (_, gradient) = loss(&student);
            let (teacher, p) = (extrapolation.teacher(&[&dpo, &reverse], 1.0).unwrap(), of(&student));
            let distance = kl(&p, &teacher.target);
            for token in 0..VOCABULARY {
                let gap = p.log_probs()[token] - teacher.target.log_probs()[token];
                let formula = 0.5 * teacher.coefficient * p.probs()[token] * (gap - distance);
                assert!((f64::from(gradient[token]) - formula).abs() < 1e-6);
                let moved = |by: f32| {
                    let mut other = student.clone();
                    other[token] += by;
                    (loss(&other).0, f64::from(other[token]))
                };
                let ((up, z_up), (down, z_down)) = (moved(1e-3), moved(-1e-3));
                let difference = (up - down) / (z_up - z_down);
                assert!((f64::from(gradient[token]) - difference).abs() < 1e-5, "{} {difference}", gradient[token]);
            }
        }
    }

    #[test]
    fn excluded_tokens_stay_excluded() {
        let [mut dpo, mut reverse, _, mut student] = rows(3);
        for row in [&mut dpo, &mut reverse, &mut student] {
            row[2] = f32::NEG_INFINITY;
        }
        reverse[4] = f32::NEG_INFINITY;
        student[4] = f32::NEG_INFINITY;
        let options = DistillationOptions { extrapolation: Some(Extrapolation::default()), ..Default::default() };
        let teacher = Extrapolation::default().teacher(&[&dpo, &reverse], 1.0).unwrap();
        assert_eq!([teacher.target.probs()[2], teacher.target.probs()[4], teacher.rewards[2]], [0.0; 3]);
        let row = options.extrapolated_row(&mut student, &[&dpo, &reverse], 1.0).unwrap();
        assert!(row.loss.is_finite() && student.iter().all(|gradient| gradient.is_finite()));
        assert!(Extrapolation::default().teacher(&[&dpo], 1.0).is_err());
        assert!(Extrapolation::default().teacher(&[&dpo, &[0.0]], 1.0).is_err());
    }

    #[test]
    fn what_does_not_go_with_an_extrapolation_is_refused() {
        let with = |extrapolation| DistillationOptions { extrapolation: Some(extrapolation), ..Default::default() };
        assert!(with(Extrapolation::default()).validate().is_ok());
        let refused = |options: DistillationOptions| options.validate().unwrap_err().to_string();
        let wrong = Extrapolation { weight: 0.0, ..Extrapolation::default() };
        assert_eq!(refused(with(wrong)), "extrapolation.weight is 0, expected a number above 0");
        let wrong = Extrapolation { beta: f64::NAN, ..Extrapolation::default() };
        assert_eq!(refused(with(wrong)), "extrapolation.beta is NaN, expected a number above 0");
        let sampled =
            DistillationOptions { estimate: crate::distillation::Estimate::Sampled, ..with(Extrapolation::default()) };
        assert!(refused(sampled).starts_with("extrapolation: "));
    }
}
