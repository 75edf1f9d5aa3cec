//! A reward in two parts, of which one takes on the length of the answer, so that the other is free of it.
//!
//! ```text
//! r       = q + l                                              two heads over one hidden state; comparisons are of r
//! L_L     = |ρ(q, len)| - ρ(l, len)                            over the completions of a step
//! L_O     = |⟨w_q, w_l⟩| / (|w_q| |w_l|)                       weights of the heads
//! L       = L_BT(r) + λ_L L_L + λ_O L_O
//! ```
//!
//! `ρ` is Pearson's correlation, `len` the number of tokens of a completion. Policies are paid by `q` alone. Chen et al., "ODIN: Disentangled
//! Reward Mitigates Hacking in RLHF", arXiv 2402.07319.
//!
//! A correlation is that of the completions of one step, all of them at once: its loss is not a mean over rows, and the more rows a step has, the better it is
//! known. Where all lengths or all scores are the same there is none: the term is then 0 and has no gradient, as that of heads without weights.
//!
//! Nothing but `L_L` keeps the quality out of the length head: comparisons are of the sum, and a correlation pulls the less the further scores spread. Where the kept
//! head learns little beside the sum, `λ_L` is too small.
//!
//! Statistics: `length_correlation/quality` and `length_correlation/length`, `ρ` of each head; `heads_cosine`, the cosine between their weights.

use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::distribution::check_range;
use crate::loss::{Loss, Reduce, Result, Statistic, per_token, values};
use crate::reward::row;

/// How much the two terms of ODIN count beside the loss of the comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Odin {
    /// Weight `λ_L` of the correlations with the length: that of the quality, which is to be 0, less that of the length head.
    #[schemars(range(min = 0.0))]
    pub length_coefficient: f64,
    /// Weight `λ_O` of the cosine between the weights of both heads, which is to be 0.
    #[schemars(range(min = 0.0))]
    pub orthogonality_coefficient: f64,
}

impl Default for Odin {
    fn default() -> Self {
        Self { length_coefficient: 1.0, orthogonality_coefficient: 1.0 }
    }
}

/// Below this variance, or square of a norm, there is no direction: scores and lengths are all the same, weights are 0.
const NOTHING: f64 = 1e-12;

impl Odin {
    /// Refuses values that make no sense.
    ///
    /// # Errors
    /// A coefficient that is no number from 0 up.
    pub fn validate(&self) -> Result<()> {
        let (length, orthogonality) = (self.length_coefficient, self.orthogonality_coefficient);
        check_range("length_coefficient", length, length >= 0.0, "a number, at least 0")?;
        check_range("orthogonality_coefficient", orthogonality, orthogonality >= 0.0, "a number, at least 0")
    }

    /// `λ_L L_L` of all completions of a step, as one loss: the outputs `quality` and `length` of both heads, `[N]` each, tracking gradients, with
    /// the number of tokens of each completion.
    ///
    /// # Errors
    /// Inputs that differ in length.
    pub fn decorrelation(&self, quality: &Tensor, length: &Tensor, lengths: &[f64]) -> Result<Loss> {
        let quality = per_token("quality", quality, lengths.len())?;
        let length = per_token("length", length, lengths.len())?;
        let of_quality = correlation(&quality, &row("lengths", lengths, &quality)?)?;
        let of_length = correlation(&length, &row("lengths", lengths, &length)?)?;
        let loss = of_quality.abs()?.sub(&of_length)?.affine(self.length_coefficient, 0.0)?;
        let statistics = vec![
            Statistic { name: "length_correlation/quality", values: values(&of_quality)?, reduce: Reduce::Mean },
            Statistic { name: "length_correlation/length", values: values(&of_length)?, reduce: Reduce::Mean },
        ];
        Ok(Loss { per_token: loss, statistics })
    }

    /// `λ_O L_O`, as one loss: the weights of both heads, `[d]` each, tracking gradients.
    ///
    /// # Errors
    /// Weights that differ in length.
    pub fn orthogonality(&self, quality: &Tensor, length: &Tensor) -> Result<Loss> {
        let quality = per_token("quality", quality, quality.elem_count())?;
        let length = per_token("length", length, quality.elem_count())?;
        let cosine = cosine(&quality, &length, 1.0)?;
        let statistics = vec![Statistic { name: "heads_cosine", values: values(&cosine)?, reduce: Reduce::Mean }];
        Ok(Loss { per_token: cosine.abs()?.affine(self.orthogonality_coefficient, 0.0)?, statistics })
    }
}

/// Pearson's correlation, `[1]`; 0 where one of both does not vary.
fn correlation(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let count = a.elem_count();
    if count == 0 {
        return zero();
    }
    let centred = |x: &Tensor| x.broadcast_sub(&x.mean_keepdim(0)?);
    cosine(&centred(a)?, &centred(b)?, count as f64)
}

/// The cosine, `[1]`; 0 where the square of a norm, divided by `count`, is next to nothing.
fn cosine(a: &Tensor, b: &Tensor, count: f64) -> Result<Tensor> {
    let squares = |x: &Tensor| x.sqr()?.sum_keepdim(0);
    let (of_a, of_b) = (squares(a)?, squares(b)?);
    if values(&of_a)?[0] / count <= NOTHING || values(&of_b)?[0] / count <= NOTHING {
        return zero();
    }
    // Each root by itself: a product of squares might underflow.
    Ok(a.mul(b)?.sum_keepdim(0)?.div(&of_a.sqrt()?)?.div(&of_b.sqrt()?)?)
}

fn zero() -> Result<Tensor> {
    Ok(Tensor::zeros(1, DType::F64, &Device::Cpu)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use candle_core::Var;

    use super::*;

    const LENGTHS: [f64; 5] = [3.0, 8.0, 4.0, 4.0, 11.0];
    const QUALITY: [f64; 5] = [0.3, -1.2, 0.4, 0.9, 0.1];
    const LENGTH: [f64; 5] = [0.0, 0.5, -0.7, 0.2, 0.3];

    fn variable(numbers: &[f64]) -> Var {
        Var::from_slice(numbers, numbers.len(), &Device::Cpu).unwrap()
    }

    /// Pearson's correlation as it is written in books, and its derivative with respect to `x`.
    fn pearson(x: &[f64], y: &[f64]) -> (f64, Vec<f64>) {
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let centred = |x: &[f64]| x.iter().map(|value| value - mean(x)).collect::<Vec<f64>>();
        let norm = |x: &[f64]| x.iter().map(|value| value * value).sum::<f64>().sqrt();
        let (x, y) = (centred(x), centred(y));
        let rho = x.iter().zip(&y).map(|(x, y)| x * y).sum::<f64>() / norm(&x) / norm(&y);
        let slope = |(own, other): (&f64, &f64)| (other / norm(&y) - rho * own / norm(&x)) / norm(&x);
        (rho, x.iter().zip(&y).map(slope).collect())
    }

    fn decorrelation(quality: &[f64], length: &[f64], lengths: &[f64]) -> (f64, [Vec<f64>; 2], Loss) {
        let (quality, length) = (variable(quality), variable(length));
        let odin = Odin { length_coefficient: 2.5, ..Odin::default() };
        let loss = odin.decorrelation(quality.as_tensor(), length.as_tensor(), lengths).unwrap();
        let found = loss.gradients(&[quality.as_tensor(), length.as_tensor()]).unwrap();
        (loss.values().unwrap()[0], found.try_into().unwrap(), loss)
    }

    #[test]
    fn correlations_and_their_gradients_are_those_of_the_closed_form() {
        let ((of_quality, slope), (of_length, length_slope)) =
            (pearson(&QUALITY, &LENGTHS), pearson(&LENGTH, &LENGTHS));
        assert!(of_quality < 0.0, "the size counts, not the sign: {of_quality}");
        let (loss, [d_quality, d_length], found) = decorrelation(&QUALITY, &LENGTH, &LENGTHS);
        assert!((loss - 2.5 * (of_quality.abs() - of_length)).abs() < 1e-12);
        assert!(d_quality.iter().zip(&slope).all(|(found, slope)| (found + 2.5 * slope).abs() < 1e-12));
        assert!(d_length.iter().zip(&length_slope).all(|(found, slope)| (found + 2.5 * slope).abs() < 1e-12));
        let logged: Vec<f64> = found.statistics.iter().map(|statistic| statistic.values[0]).collect();
        assert!((logged[0] - of_quality).abs() < 1e-12 && (logged[1] - of_length).abs() < 1e-12);
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let (_, [d_quality, d_length], _) = decorrelation(&QUALITY, &LENGTH, &LENGTHS);
        let moved = |numbers: &[f64], at: usize, by: f64| {
            let mut numbers = numbers.to_vec();
            numbers[at] += by;
            numbers
        };
        let step = 1e-6;
        for at in 0..5 {
            let side = |by: f64| decorrelation(&moved(&QUALITY, at, by), &LENGTH, &LENGTHS).0;
            assert!(((side(step) - side(-step)) / (2.0 * step) - d_quality[at]).abs() < 1e-7);
            let side = |by: f64| decorrelation(&QUALITY, &moved(&LENGTH, at, by), &LENGTHS).0;
            assert!(((side(step) - side(-step)) / (2.0 * step) - d_length[at]).abs() < 1e-7);
        }
        let odin = Odin { orthogonality_coefficient: 0.7, ..Odin::default() };
        let orthogonality = |a: &[f64], b: &[f64]| {
            let (a, b) = (variable(a), variable(b));
            let loss = odin.orthogonality(a.as_tensor(), b.as_tensor()).unwrap();
            (loss.values().unwrap()[0], loss.gradients(&[a.as_tensor(), b.as_tensor()]).unwrap())
        };
        let (value, gradients) = orthogonality(&QUALITY, &LENGTH);
        let dot: f64 = QUALITY.iter().zip(&LENGTH).map(|(a, b)| a * b).sum();
        let norm = |x: &[f64]| x.iter().map(|value| value * value).sum::<f64>().sqrt();
        assert!((value - 0.7 * dot.abs() / norm(&QUALITY) / norm(&LENGTH)).abs() < 1e-12);
        for (at, (d_quality, d_length)) in gradients[0].iter().zip(&gradients[1]).enumerate() {
            let side = |by: f64| orthogonality(&moved(&QUALITY, at, by), &LENGTH).0;
            assert!(((side(step) - side(-step)) / (2.0 * step) - d_quality).abs() < 1e-7);
            let side = |by: f64| orthogonality(&QUALITY, &moved(&LENGTH, at, by)).0;
            assert!(((side(step) - side(-step)) / (2.0 * step) - d_length).abs() < 1e-7);
        }
    }

    /// Neither where scores lie nor how far they spread makes a difference.
    #[test]
    fn only_the_direction_counts() {
        let (loss, _, _) = decorrelation(&QUALITY, &LENGTH, &LENGTHS);
        let other = QUALITY.map(|quality| 1e3 + 0.02 * quality);
        assert!((decorrelation(&other, &LENGTH.map(|length| 5.0 * length), &LENGTHS).0 - loss).abs() < 1e-9);
        let perfect = LENGTHS.map(|length| 0.1 * length);
        assert!((decorrelation(&perfect, &perfect, &LENGTHS).0).abs() < 1e-12, "1 - 1");
        assert!((decorrelation(&[0.0; 5], &perfect, &LENGTHS).0 + 2.5).abs() < 1e-12, "the best there is");
    }

    #[test]
    fn what_does_not_vary_has_no_correlation_and_no_gradient() {
        for (quality, length, lengths) in [
            (&[0.5; 5][..], &LENGTH[..], &LENGTHS[..]),
            (&QUALITY, &[0.0; 5], &LENGTHS),
            (&QUALITY, &LENGTH, &[7.0; 5]),
            (&[0.1], &[0.2], &[3.0]),
            (&[], &[], &[]),
        ] {
            let (loss, gradients, _) = decorrelation(quality, length, lengths);
            assert!(loss.is_finite() && gradients.iter().flatten().all(|gradient| gradient.is_finite()));
        }
        let (loss, gradients, _) = decorrelation(&QUALITY, &LENGTH, &[7.0; 5]);
        assert!(loss == 0.0 && gradients.iter().flatten().all(|gradient| *gradient == 0.0));
        let (none, some) = (variable(&[0.0; 3]), variable(&[1.0, 2.0, 0.0]));
        let loss = Odin::default().orthogonality(none.as_tensor(), some.as_tensor()).unwrap();
        let gradients = loss.gradients(&[none.as_tensor(), some.as_tensor()]).unwrap();
        assert!(loss.values().unwrap() == [0.0] && gradients.iter().flatten().all(|gradient| *gradient == 0.0));
    }

    #[test]
    fn inputs_and_options_are_checked() {
        let error = Odin { length_coefficient: -1.0, ..Odin::default() }.validate().unwrap_err().to_string();
        assert_eq!(error, "length_coefficient is -1, expected a number, at least 0");
        let odin = Odin { orthogonality_coefficient: f64::NAN, ..Odin::default() };
        assert!(odin.validate().unwrap_err().to_string().contains("orthogonality_coefficient"));
        let short =
            Odin::default().decorrelation(variable(&QUALITY).as_tensor(), variable(&[1.0]).as_tensor(), &LENGTHS);
        assert_eq!(short.unwrap_err().to_string(), "length has length 1, expected 5");
    }
}
