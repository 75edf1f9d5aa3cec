//! VC-PPO: why PPO gives up long answers, and the two repairs of its value model.
//!
//! "What's Behind PPO's Collapse in Long-CoT? Value Optimization Holds the Secret", Yuan et al. 2025, arXiv 2503.01491. With a reward at the end
//! alone, γ = 1, and a value model whose error at step t is `e_t`, the advantage that PPO learns from is wrong by
//!
//! ```text
//! E[A_t(λ)] - A^π_t = - e_t + (1 - λ) Σ_{l≥1} λ^{l-1} e_{t+l}
//! ```
//!
//! The first term is a baseline and does no harm. The second is the future's error; a step that ends the answer has no future, so where
//! `e < 0`, as in a value model that begins as a reward model, ending is overpaid. And with λ < 1 the value model does not unlearn the error: the
//! end's reward reaches step t with weight `λ^(T-1-t)`, and what it learns there is its own error some steps on. The repairs:
//!
//! - **Value pretraining**: the value model first learns the returns of the frozen policy, with λ = 1 (`value.warmup_steps` of a recipe).
//! - **Decoupled GAE**: λ = 1 for what the value model learns, `λ_actor` < 1 for the policy (`objective.lam_value = 1.0` of a recipe).
//!
//! **Worlds.** A [`corridor`] of 200 steps, tabular; arms named *far* begin with values that are further off (κ = 3), the others with κ = 1. And
//! [`chains`] of thought that a small decoder writes out, arms named *chains*, whose value model begins as a reward model.
//!
//! Deviations from the paper:
//! 1. In the corridor, the gradient step is one of plain policy gradients on whitened advantages, bounded by 1 in each stretch; a ratio and its
//!    clipping act only from the second pass over the same episodes on.
//! 2. Chains add one digit again and again; the design had sums of the prompt's digits, which a decoder of this size does not learn in the time.
//! 3. The reward model of the chains learns rewards themselves (`mse`), not their log-odds, so that it is on the scale of values.

pub mod chains;
pub mod corridor;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use chains::Chains;
use corridor::Corridor;

use crate::error::Result;
use crate::experiment::{Experiment, Trial, open};
use crate::measurements::{Measurements, Seed};
use crate::system::{Arm, Bound, Claim, Figure, Role, System};

/// The table.
pub const SYSTEM: System = System {
    name: "vc-ppo",
    title: "VC-PPO: value-calibrated PPO",
    paper: "Yuan et al. 2025, \"What's Behind PPO's Collapse in Long-CoT? Value Optimization Holds the Secret\", arXiv 2503.01491",
    summary: "a value model that is pretrained and learns with λ = 1 keeps PPO from giving up long answers",
    arms: ARMS,
    claims: CLAIMS,
    figures: FIGURES,
    tiny: include_str!("tiny.toml"),
    quick: include_str!("quick.toml"),
    readme: include_str!("README.md"),
    recipes: &["paper"],
    data: None,
    schema: || schemars::schema_for!(VcPpo).to_value(),
    open: |settings| open::<VcPpo>("vc-ppo", settings),
};

const ARMS: &[Arm] = &[
    Arm::new("vanilla", Role::Baseline, "λ = 0.95 for both, κ = 1"),
    Arm::new("decoupled", Role::Ablation, "decoupled GAE alone, κ = 1"),
    Arm::new("pretrained", Role::Ablation, "value pretraining alone, κ = 1"),
    Arm::new("vc-ppo", Role::Method, "both, κ = 1"),
    Arm::new("vanilla-far", Role::Baseline, "λ = 0.95 for both, κ = 3"),
    Arm::new("decoupled-far", Role::Ablation, "decoupled GAE alone, κ = 3"),
    Arm::new("pretrained-far", Role::Ablation, "value pretraining alone, κ = 3"),
    Arm::new("vc-ppo-far", Role::Method, "both, κ = 3"),
    Arm::new("vanilla-chains", Role::Baseline, "λ = 0.95 for both, on chains of thought"),
    Arm::new("decoupled-chains", Role::Ablation, "decoupled GAE alone, on chains of thought"),
    Arm::new("pretrained-chains", Role::Ablation, "value pretraining alone, on chains of thought"),
    Arm::new("vc-ppo-chains", Role::Method, "both, on chains of thought"),
];

/// What an arm repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repairs {
    /// The value model learns first, alone.
    pub pretrained: bool,
    /// It learns with λ = 1.
    pub decoupled: bool,
}

impl Repairs {
    fn of(arm: &str) -> Self {
        let name = arm.split_once('-').filter(|_| !arm.starts_with("vc-ppo")).map_or(arm, |(name, _)| name);
        let both = name.starts_with("vc-ppo");
        Self { pretrained: both || name == "pretrained", decoupled: both || name == "decoupled" }
    }
}

/// Length at the end over length at the start.
fn kept(seed: &Seed<'_>, arm: &str) -> Option<f64> {
    Some(seed.value(arm, "length")? / seed.value(arm, "initial_length")?)
}

/// By how much an arm's accuracy rose.
fn gained(seed: &Seed<'_>, arm: &str) -> Option<f64> {
    Some(seed.value(arm, "accuracy")? - seed.value(arm, "initial_accuracy")?)
}

/// By how much full VC-PPO is more accurate on chains than another arm.
fn lead(seed: &Seed<'_>, arm: &str) -> Option<f64> {
    Some(seed.value("vc-ppo-chains", "accuracy")? - seed.value(arm, "accuracy")?)
}

const CLAIMS: &[Claim] = &[
    Claim {
        id: "1a",
        statement: "vanilla PPO gives up long episodes: length at the end over length at the start",
        bound: Bound::AtMost(0.2),
        measure: |seed| kept(seed, "vanilla"),
    },
    Claim {
        id: "1b",
        statement: "and with them success",
        bound: Bound::AtMost(0.25),
        measure: |seed| seed.value("vanilla", "success"),
    },
    Claim {
        id: "1c",
        statement: "the same with values that are further off",
        bound: Bound::AtMost(0.2),
        measure: |seed| kept(seed, "vanilla-far"),
    },
    Claim {
        id: "2a",
        statement: "VC-PPO makes episodes longer",
        bound: Bound::AtLeast(1.0),
        measure: |seed| kept(seed, "vc-ppo"),
    },
    Claim {
        id: "2b",
        statement: "and succeeds",
        bound: Bound::AtLeast(0.48),
        measure: |seed| seed.value("vc-ppo", "success"),
    },
    Claim {
        id: "2c",
        statement: "the same with values that are further off",
        bound: Bound::AtLeast(0.48),
        measure: |seed| seed.value("vc-ppo-far", "success"),
    },
    Claim {
        id: "3a",
        statement: "decoupled GAE alone is not enough where values are far off",
        bound: Bound::AtMost(0.25),
        measure: |seed| seed.value("decoupled-far", "success"),
    },
    Claim {
        id: "3b",
        statement: "nor is pretraining alone: by how much VC-PPO succeeds more often",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(seed.value("vc-ppo-far", "success")? - seed.value("pretrained-far", "success")?),
    },
    Claim {
        id: "5a",
        statement: "after pretraining the advantages of the first tenth are unbiased at the first step: distance of their mean from 0",
        bound: Bound::AtMost(0.05),
        measure: |seed| Some(seed.value("vc-ppo", "first_advantages")?.abs()),
    },
    Claim {
        id: "5b",
        statement: "without it they are biased upwards",
        bound: Bound::AtLeast(0.1),
        measure: |seed| seed.value("vanilla", "first_advantages"),
    },
    Claim {
        id: "6a",
        statement: "chains of thought: VC-PPO ends more accurate than vanilla PPO: by how much",
        bound: Bound::AtLeast(0.1),
        measure: |seed| lead(seed, "vanilla-chains"),
    },
    Claim {
        id: "6b",
        statement: "and more accurate than it began: by how much",
        bound: Bound::AtLeast(0.1),
        measure: |seed| gained(seed, "vc-ppo-chains"),
    },
    Claim {
        id: "6c",
        statement: "vanilla PPO's chains shorten by three tenths, or its accuracy falls: the larger of what is beyond that and of the fall",
        bound: Bound::AtLeast(0.0),
        measure: |seed| {
            let beyond = 0.7 - kept(seed, "vanilla-chains")?;
            Some(beyond.max(-gained(seed, "vanilla-chains")?))
        },
    },
    Claim {
        id: "6d",
        statement: "VC-PPO's do not, and its accuracy does not fall: the smaller of what is left of three tenths and of the rise",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some((kept(seed, "vc-ppo-chains")? - 0.7).min(gained(seed, "vc-ppo-chains")?)),
    },
    Claim {
        id: "6e",
        statement: "decoupled GAE alone ends below full VC-PPO: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "decoupled-chains"),
    },
    Claim {
        id: "6f",
        statement: "so does value pretraining alone",
        bound: Bound::AtLeast(0.0),
        measure: |seed| lead(seed, "pretrained-chains"),
    },
    Claim {
        id: "6g",
        statement: "values explain the returns after pretraining: share of the variance",
        bound: Bound::AtLeast(0.3),
        measure: |seed| seed.value("vc-ppo-chains", "explained"),
    },
    Claim {
        id: "6h",
        statement: "and more of it than those of the reward model that they begin as: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(seed.value("vc-ppo-chains", "explained")? - seed.value("vanilla-chains", "explained")?),
    },
];

const NEAR: &[&str] = &["vanilla", "decoupled", "pretrained", "vc-ppo"];
const FAR: &[&str] = &["vanilla-far", "decoupled-far", "pretrained-far", "vc-ppo-far"];

const CHAINS: &[&str] = &["vanilla-chains", "decoupled-chains", "pretrained-chains", "vc-ppo-chains"];

const FIGURES: &[Figure] = &[
    Figure { title: "Length, κ = 1", x: "iteration", y: "steps", curve: "length", arms: NEAR, diagonal: false },
    Figure { title: "Length, κ = 3", x: "iteration", y: "steps", curve: "length", arms: FAR, diagonal: false },
    Figure { title: "Success, κ = 1", x: "iteration", y: "success", curve: "success", arms: NEAR, diagonal: false },
    Figure { title: "Success, κ = 3", x: "iteration", y: "success", curve: "success", arms: FAR, diagonal: false },
    Figure {
        title: "Values when PPO ends, κ = 1",
        x: "step",
        y: "value",
        curve: "values",
        arms: NEAR,
        diagonal: false,
    },
    Figure {
        title: "Accuracy on chains of thought",
        x: "step of the policy",
        y: "accuracy",
        curve: "accuracy",
        arms: CHAINS,
        diagonal: false,
    },
    Figure {
        title: "Length of chains of thought",
        x: "step of the policy",
        y: "tokens",
        curve: "length",
        arms: CHAINS,
        diagonal: false,
    },
    Figure {
        title: "What values explain of the returns",
        x: "step of the policy",
        y: "share of the variance",
        curve: "explained",
        arms: CHAINS,
        diagonal: false,
    },
];

/// Settings of the reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VcPpo {
    /// The tabular world.
    pub corridor: Corridor,
    /// The small decoder's.
    pub chains: Chains,
}

impl Experiment for VcPpo {
    type Start = chains::Start;

    fn validate(&self) -> Result<()> {
        self.corridor.validate()?;
        self.chains.validate()
    }

    fn start(&self, trial: &Trial<'_>) -> Result<chains::Start> {
        self.chains.start(trial)
    }

    fn run(&self, start: &chains::Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let repairs = Repairs::of(arm);
        match arm {
            arm if arm.ends_with("-chains") => self.chains.run(start, repairs, trial),
            arm => self.corridor.run(if arm.ends_with("-far") { 3.0 } else { 1.0 }, repairs, trial),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arms_are_named_after_what_they_repair() {
        let repaired = |arm: &str| {
            let Repairs { pretrained, decoupled } = Repairs::of(arm);
            (pretrained, decoupled)
        };
        for world in ["", "-far", "-chains"] {
            let of = |name: &str| repaired(&format!("{name}{world}"));
            let all = [of("vanilla"), of("decoupled"), of("pretrained"), of("vc-ppo")];
            assert_eq!(all, [(false, false), (false, true), (true, false), (true, true)]);
        }
    }
}
