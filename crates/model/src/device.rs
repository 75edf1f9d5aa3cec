//! Where a decoder computes, by name.

use std::fmt;
use std::str::FromStr;

use candle_core::Device;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The name of a device: `cpu`, `cuda` (the first GPU) or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^(cpu|cuda(:[0-9]+)?)$"))]
pub enum DeviceName {
    /// This machine's processor, by the engine's own kernels.
    #[default]
    Cpu,
    /// An NVIDIA GPU by its number, from 0.
    Cuda(usize),
}

impl DeviceName {
    /// Whether this build can compute on GPUs.
    pub const CUDA: bool = cfg!(feature = "cuda");

    /// Makes the device ready; `None` is the processor, which the engine takes care of.
    ///
    /// # Errors
    /// A GPU in a build without them, or one that does not answer.
    pub fn open(self) -> Result<Option<Device>> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(_) if !Self::CUDA => Err(Error::unsupported(
                format!("device {:?} in a build for processors alone", self.to_string()),
                "build with `cargo build --release -p posttrain --features cuda`; docs/gpu.md says what that needs",
            )),
            // The library of the driver is looked up at this moment, and its absence is a panic down there.
            Self::Cuda(number) => match base::caught(|| Device::new_cuda(number)) {
                Ok(Ok(device)) => Ok(Some(device)),
                Ok(Err(error)) => Err(self.silent(first_line(&error.to_string()))),
                Err(panic) => Err(self.silent(first_line(&panic))),
            },
        }
    }

    fn silent(self, reason: &str) -> Error {
        Error::NoDevice { device: self.to_string(), reason: reason.to_owned() }
    }
}

/// What comes after it is a backtrace, or the paths that were searched.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or(text)
}

impl fmt::Display for DeviceName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => write!(formatter, "cpu"),
            Self::Cuda(0) => write!(formatter, "cuda"),
            Self::Cuda(number) => write!(formatter, "cuda:{number}"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("expected `cpu`, `cuda` or `cuda:N`, found {text:?}");
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", number)) => number.parse().map(Self::Cuda).map_err(|_| wrong()),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for DeviceName {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceName> for String {
    fn from(device: DeviceName) -> Self {
        device.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::DeviceName;

    #[test]
    fn names_are_read_back() {
        for (text, device) in [
            ("cpu", DeviceName::Cpu),
            ("cuda", DeviceName::Cuda(0)),
            ("cuda:0", DeviceName::Cuda(0)),
            ("cuda:3", DeviceName::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA"] {
            assert!(text.parse::<DeviceName>().is_err_and(|error| error.contains(&format!("{text:?}"))), "{text:?}");
        }
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_build_for_processors_names_the_feature() {
        assert!(matches!(DeviceName::Cpu.open(), Ok(None)));
        let error = DeviceName::Cuda(1).open().map(drop);
        assert!(error.is_err_and(|error| {
            error.to_string() == "device \"cuda:1\" in a build for processors alone is not supported"
                && base::Hint::hint(&error).is_some_and(|hint| hint.contains("--features cuda"))
        }));
    }
}
