//! Functions of one number that several objectives need, stable for any finite input and with exact derivatives.

use candle_core::Tensor;

use crate::loss::Result;

/// `log σ(x) = -log(1 + e^{-x})`; its derivative is `σ(-x)`, at 0 too.
///
/// The larger exponential is factored out as a constant, so that neither overflows and the derivative has no kink.
pub(crate) fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    let negated = x.neg()?;
    let pivot = negated.detach().relu()?;
    let total = negated.sub(&pivot)?.exp()?.add(&pivot.neg()?.exp()?)?;
    Ok(total.log()?.add(&pivot)?.neg()?)
}

/// `σ(x) = 1 / (1 + e^{-x})`.
pub(crate) fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok(log_sigmoid(x)?.exp()?)
}

/// The sum of the values of each of `count` sequences, `[count]`; 0 for one without values. Sums fold in order.
pub(crate) fn sequence_sums(values: &Tensor, sequence: &[u32], count: usize) -> Result<Tensor> {
    let zeros = Tensor::zeros(count, values.dtype(), values.device())?;
    if sequence.is_empty() {
        return Ok(zeros);
    }
    let sequence = Tensor::from_slice(sequence, sequence.len(), values.device())?;
    Ok(zeros.index_add(&sequence, values, 0)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn log_sigmoid_and_its_derivative() {
        let xs = [-1e6f64, -800.0, -3.0, -1e-9, 0.0, 0.5, 40.0, 1e6];
        let variable = Var::from_slice(&xs, xs.len(), &Device::Cpu).unwrap();
        let value = log_sigmoid(variable.as_tensor()).unwrap();
        let found: Vec<f64> = value.to_vec1().unwrap();
        let gradient = value.sum_all().unwrap().backward().unwrap();
        let gradient: Vec<f64> = gradient.get(variable.as_tensor()).unwrap().to_vec1().unwrap();
        for ((&x, found), gradient) in xs.iter().zip(found).zip(gradient) {
            let expected = if x > 0.0 { -(-x).exp().ln_1p() } else { x - x.exp().ln_1p() };
            assert!((found - expected).abs() <= 1e-15 * (1.0 + expected.abs()), "{x}: {found}, expected {expected}");
            let slope = if x > 0.0 { (-x).exp() / (1.0 + (-x).exp()) } else { 1.0 / (1.0 + x.exp()) };
            assert!((gradient - slope).abs() <= 1e-15, "{x}: {gradient}, expected {slope}");
        }
    }

    #[test]
    fn sums_of_sequences_skip_the_empty_ones() {
        let values = Tensor::new(&[1.0f64, 2.0, 4.0], &Device::Cpu).unwrap();
        let sums: Vec<f64> = sequence_sums(&values, &[0, 0, 2], 4).unwrap().to_vec1().unwrap();
        assert_eq!(sums, [3.0, 0.0, 4.0, 0.0]);
        let none = Tensor::new(&[0.0f64; 0], &Device::Cpu).unwrap();
        assert_eq!(sequence_sums(&none, &[], 2).unwrap().to_vec1::<f64>().unwrap(), [0.0; 2]);
    }
}
