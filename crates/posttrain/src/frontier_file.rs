//! The file of a frontier: which models are added up, with what coefficients, and what that was measured to reach.

use std::path::Path;

use base::files;
use eval::Scalarisation;
use serde::{Deserialize, Serialize};
use train::frontier::{Frontier, FrontierPolicy};

use crate::failure::Failure;
use crate::opened::Opened;

/// The format that this program reads and writes.
const FORMAT: u32 = 1;

/// A frontier, and the models that it is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FrontierFile {
    /// The number of the format.
    pub format: u32,
    /// The seed of the search, from which the weights of a preset are drawn.
    pub seed: u64,
    /// The model before training.
    pub base: Part,
    /// The models that were trained from it, in the order of the coefficients.
    pub models: Vec<Part>,
    /// The policies.
    #[serde(flatten)]
    pub frontier: Frontier,
}

/// A model that takes part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Its name or folder.
    pub model: String,
    /// SHA-256 of its weights' files.
    pub sha256: String,
}

impl Part {
    /// The model as it is.
    pub fn of(name: &str, opened: &Opened) -> Result<Self, Failure> {
        Ok(Self { model: name.to_owned(), sha256: opened.sha256.get()? })
    }

    /// Refuses another model under the same name.
    pub fn check(&self, path: &Path, opened: &Opened) -> Result<(), Failure> {
        let found = opened.sha256.get()?;
        if found == self.sha256 {
            return Ok(());
        }
        let failure = Failure::new(format!(
            "{} was measured with other weights of {}: expected SHA-256 {}, got {found}",
            path.display(),
            self.model,
            self.sha256
        ));
        Err(failure.hint("search again with `posttrain frontier`, or bring the old weights back"))
    }
}

impl FrontierFile {
    /// A file with these parts.
    pub fn new(seed: u64, base: Part, models: Vec<Part>, frontier: Frontier) -> Self {
        Self { format: FORMAT, seed, base, models, frontier }
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let wrong = |reason: String| {
            Failure::new(format!("{}: {reason}", path.display())).hint("`posttrain frontier` writes such files")
        };
        let text = files::read_to_string(path)?;
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| wrong(format!("not valid JSON: {error}")))?;
        if value["format"] != FORMAT {
            return Err(wrong(format!("expected a frontier of format {FORMAT}, got format {}", value["format"])));
        }
        let file: Self = serde_json::from_value(value).map_err(|error| wrong(format!("not a frontier: {error}")))?;
        // One coefficient a model, or as many for each block of the models.
        let sizes = |policy: &FrontierPolicy| {
            let coefficients = policy.coefficients.len();
            let whole = coefficients > 0 && coefficients.is_multiple_of(file.models.len().max(1));
            whole && policy.scores.objectives.len() == file.frontier.objectives.len()
        };
        if let Some(odd) = file.frontier.policies.iter().position(|policy| !sizes(policy)) {
            return Err(wrong(format!(
                "policy {}: expected {} coefficients, or so many for each block, and {} values",
                odd + 1,
                file.models.len(),
                file.frontier.objectives.len()
            )));
        }
        Ok(file)
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(self).map_err(|error| Failure::new(error.to_string()))?;
        Ok(files::write(path, format!("{text}\n").as_bytes())?)
    }

    /// The policy that serves a preference best.
    pub fn choose(
        &self,
        path: &Path,
        preference: &[f64],
        scalarisation: Scalarisation,
        kl_weight: f64,
    ) -> Result<&FrontierPolicy, Failure> {
        let chosen = self.frontier.choose(preference, scalarisation, kl_weight);
        let chosen = chosen.map_err(|error| Failure::usage(format!("`--preference`: {error}")))?;
        chosen.ok_or_else(|| Failure::new(format!("{} holds no policy", path.display())))
    }
}
