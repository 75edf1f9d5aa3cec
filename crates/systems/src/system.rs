//! What a system is: a table, fixed before anything runs.

use serde::Serialize;
use serde_json::Value;

use crate::error::Result;
use crate::experiment::Runnable;
use crate::measurements::Seed;

/// A published system and what is claimed of it.
pub struct System {
    /// The name on the command line, in files and in evidence.
    pub name: &'static str,
    /// What it is.
    pub title: &'static str,
    /// Authors, year, where.
    pub paper: &'static str,
    /// The claim in one line.
    pub summary: &'static str,
    /// What competes: baselines, the method, its ablations.
    pub arms: &'static [Arm],
    /// What is claimed, each to be judged on its own.
    pub claims: &'static [Claim],
    /// What the report draws.
    pub figures: &'static [Figure],
    /// `tiny.toml`: every setting.
    pub tiny: &'static str,
    /// `quick.toml`: what a run of seconds changes.
    pub quick: &'static str,
    /// `README.md`.
    pub readme: &'static str,
    /// Recipes of other scales beside it, for `posttrain train`: the names of their files without `.toml`, as `smollm2` and `paper`.
    pub recipes: &'static [&'static str],
    /// Writes the data of a world that is text, on which any model can be trained.
    pub data: Option<WriteData>,
    /// The JSON schema of the settings.
    pub schema: fn() -> Value,
    /// Reads the settings.
    pub open: fn(&Value) -> Result<Box<dyn Runnable>>,
}

/// The files of a world that is text, each with its name, for a seed.
pub type WriteData = fn(u64) -> Vec<(&'static str, String)>;

/// One thing that is trained and measured.
#[derive(Clone, Copy, Debug)]
pub struct Arm {
    /// Its name: a part of file names.
    pub name: &'static str,
    /// What it is there for.
    pub role: Role,
    /// What it is, in a few words.
    pub about: &'static str,
}

/// What an arm is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// What the method is compared with.
    Baseline,
    /// The system itself.
    Method,
    /// The method without one of its parts, or with another in its place.
    Ablation,
}

/// A claim: one number a seed, and the bound that its mean over the seeds must keep.
pub struct Claim {
    /// Its name: the number of the claim in the system's description, and a letter for each of its parts.
    pub id: &'static str,
    /// What is claimed, in words.
    pub statement: &'static str,
    /// The bound.
    pub bound: Bound,
    /// The number; `None` where an arm or a measurement is missing.
    pub measure: fn(&Seed<'_>) -> Option<f64>,
}

/// A bound on the mean over the seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Not below this.
    AtLeast(f64),
    /// Not above this.
    AtMost(f64),
}

/// A drawing: one measured curve, a line for each arm.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    /// What it shows.
    pub title: &'static str,
    /// The horizontal axis.
    pub x: &'static str,
    /// The vertical axis.
    pub y: &'static str,
    /// The name of the curve among the measurements.
    pub curve: &'static str,
    /// The arms that are shown, in the order of the legend.
    pub arms: &'static [&'static str],
    /// Draw the diagonal, on which a perfectly calibrated curve would lie.
    pub diagonal: bool,
}

impl Arm {
    /// An arm of this name.
    pub const fn new(name: &'static str, role: Role, about: &'static str) -> Self {
        Self { name, role, about }
    }
}

impl System {
    /// Its folder within the crate's sources.
    pub fn folder(&self) -> String {
        self.name.replace('-', "_")
    }

    /// The arm of this name.
    pub fn arm(&self, name: &str) -> Option<&'static Arm> {
        self.arms.iter().find(|arm| arm.name == name)
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(formatter, "≥ {bound}"),
            Self::AtMost(bound) => write!(formatter, "≤ {bound}"),
        }
    }
}
