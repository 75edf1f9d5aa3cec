//! Rotary position embeddings: base frequency and the ways to stretch it.

use std::f64::consts::TAU;

use crate::error::{Error, Result};

/// One rotary table (Su et al., "RoFormer", 2021).
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base: dimension pair `i` turns by `theta^(-2i/head_dim)` a position.
    pub theta: f64,
    /// How the frequencies are stretched beyond the length of pre-training.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched for contexts longer than those of pre-training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency is divided by the factor (position interpolation; Chen et al. 2023).
    Linear {
        /// At least 1 in practice; must be positive.
        factor: f64,
    },
    /// Low frequencies are divided by the factor, high ones kept, with a linear blend between (Llama 3.1).
    Llama3 {
        /// Divides the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_positions / low_frequency_factor` are low frequencies.
        low_frequency_factor: f64,
        /// Wavelengths below `original_max_positions / high_frequency_factor` are high frequencies.
        high_frequency_factor: f64,
        /// The context length of pre-training.
        original_max_positions: usize,
    },
}

impl RopeConfig {
    /// An unscaled table.
    pub fn plain(theta: f64) -> Self {
        Self { theta, scaling: RopeScaling::None }
    }

    /// The `head_dim / 2` angles in radians that one position adds, fastest first.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|pair| {
                let frequency = self.theta.powf(-((2 * pair) as f64) / head_dim as f64);
                frequency / self.scaling.divisor(frequency)
            })
            .collect()
    }

    pub(super) fn validate(&self) -> Result<()> {
        let positive = |name: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(Error::malformed(name, format!("expected a positive number, found {value}"))),
        };
        positive("rope_theta", self.theta)?;
        match self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("rope_scaling.factor", factor),
            RopeScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_max_positions } => {
                positive("rope_scaling.factor", factor)?;
                positive("rope_scaling.low_freq_factor", low_frequency_factor)?;
                positive(
                    "rope_scaling.high_freq_factor - low_freq_factor",
                    high_frequency_factor - low_frequency_factor,
                )?;
                positive("rope_scaling.original_max_position_embeddings", original_max_positions as f64)
            }
        }
    }
}

impl RopeScaling {
    /// What a frequency (radians a position) is divided by.
    pub fn divisor(&self, frequency: f64) -> f64 {
        match *self {
            Self::None => 1.0,
            Self::Linear { factor } => factor,
            Self::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_max_positions } => {
                let turns = original_max_positions as f64 * frequency / TAU;
                let blend = (turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor);
                let blend = blend.clamp(0.0, 1.0);
                1.0 / ((1.0 - blend) / factor + blend)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_max_positions: 8192,
        };
        assert_eq!(scaling.divisor(1.0), 1.0);
        assert_eq!(scaling.divisor(1e-6), 8.0);
        // Two turns over the original context: a third of the way from low (1 turn) to high (4 turns).
        let divisor = scaling.divisor(2.0 * TAU / 8192.0);
        assert!((divisor - 1.0 / (2.0 / 3.0 / 8.0 + 1.0 / 3.0)).abs() < 1e-12, "{divisor}");
    }
}
