//! The referee: watches a stage that learns from rewards, and says when something goes wrong, what, and since when.
//!
//! Every [`Watch`] is a sequential test of one number of the step's metrics against a claim of the form "given all that came
//! before, its expected value is at most (at least) a bound". The tests are bets ([`eval::sequential`]): whatever the numbers
//! depend on, if all claims hold, **the probability of any alarm in a stage, of whatever length, is at most
//! `false_alarm_rate`**, by Ville's inequality for each watch and a sum over the watches.
//!
//! | watch | number | what is bet on | claim |
//! | --- | --- | --- | --- |
//! | `entropy` | `entropy` | `H / (H + f H₀)`, `f = entropy_floor` | at least 1/2 |
//! | `advantages` | `frac_reward_zero_std` | itself | at most `zero_variance_ceiling` |
//! | `length` | `completions/mean_length` | `L / (L + g L₀)`, `g = length_growth` | at most 1/2 |
//! | `length_reward` | `completions/length_reward_correlation` | `(1 + ρ) / 2` | at most that of `length_correlation` |
//! | `drift` | `kl` | `k / (k + kl_limit)` | at most 1/2 |
//! | `mismatch` | `sampling/sampling_logp_difference/mean` | `d / (d + mismatch_limit)` | at most 1/2 |
//! | `verifier` | the option `verifier` | itself, cut to 0 to 1 | never falls below an earlier window ([`eval::sequential::Fall`]) |
//! | `reward` | `reward` | `z / (z + reward_rise)`, `z = max(0, (r - r₀) / s₀)` | at most 1/2 |
//!
//! With index 0: the mean of the stage's first `window` steps, which every claim takes as given, so bets begin after them;
//! `s₀` is `reward_std` there, the spread within groups. `x / (x + limit)` is concave, so `E[x] ≤ limit` implies the claim
//! (Jensen): the bound is one on the mean of the number itself. For the entropy, which is bounded from below, it is not: there
//! the claim is the one about what is bet on.
//!
//! Some things are healthy when the model has become better, so bets rest there. They rest depending on *earlier* steps only,
//! which keeps the bound:
//! - `entropy` and `advantages` rest while the verifier's mean over the last `window` is at least 95 %: there is nothing left to learn.
//! - `length`, `length_reward` and `reward` rest while it is above its first value by more than `tolerance`.
//!
//! The referee's state is a function of the metrics of the stage; it is made again from `metrics.jsonl` when a run is resumed.
//!
//! Metrics: `referee/WATCH`, the evidence of each watch as the share of what an alarm needs (both as logarithms of the
//! fortune); 1 is an alarm, 0 is a fortune of at most 1.

mod options;

pub use options::{Action, RefereeOptions};

use std::collections::VecDeque;

use eval::sequential::{Bet, Claim, Fall};
use serde::{Deserialize, Serialize};

use crate::metrics::{Metrics, mean};

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Watch {
    /// The policy becomes deterministic.
    Entropy,
    /// Groups whose rewards are all equal.
    Advantages,
    /// Answers grow and do not become better.
    Length,
    /// Length is paid.
    LengthReward,
    /// The policy leaves its reference.
    Drift,
    /// Sampler and trainer disagree.
    Mismatch,
    /// The verifier falls.
    Verifier,
    /// The reward rises and the verifier does not.
    Reward,
}

impl Watch {
    /// Every watch.
    pub const ALL: [Self; 8] = [
        Self::Entropy,
        Self::Advantages,
        Self::Length,
        Self::LengthReward,
        Self::Drift,
        Self::Mismatch,
        Self::Verifier,
        Self::Reward,
    ];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Entropy => "entropy",
            Self::Advantages => "advantages",
            Self::Length => "length",
            Self::LengthReward => "length_reward",
            Self::Drift => "drift",
            Self::Mismatch => "mismatch",
            Self::Verifier => "verifier",
            Self::Reward => "reward",
        }
    }

    /// What an alarm means.
    fn cause(self) -> &'static str {
        match self {
            Self::Entropy => "the entropy has collapsed",
            Self::Advantages => "the advantages have collapsed: groups have equal rewards",
            Self::Length => "answers grow and do not become better",
            Self::LengthReward => "length is what is paid, and answers do not become better",
            Self::Drift => "the policy has left its reference",
            Self::Mismatch => "sampler and trainer disagree",
            Self::Verifier => "answers become worse",
            Self::Reward => "the reward rises and answers do not become better",
        }
    }
}

/// Something went wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alarm {
    /// The step whose metrics completed the evidence.
    pub step: u64,
    /// The first step of the evidence: since then the fortune has been above 1.
    pub since: u64,
    /// What was watched.
    pub watch: Watch,
    /// The metric.
    pub metric: String,
    /// Its value in the step.
    pub value: f64,
    /// What its expected value was to keep to.
    pub bound: f64,
    /// Odds against the claim, and the odds an alarm needs.
    pub odds: f64,
    /// See `odds`.
    pub needed: f64,
    /// The reward at the beginning of the stage and over the last steps, where known.
    pub reward: Option<[f64; 2]>,
    /// The same of the verifier.
    pub verifier: Option<[f64; 2]>,
}

impl std::fmt::Display for Alarm {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { step, since, watch, metric, value, bound, odds, needed, .. } = self;
        let side = if matches!(watch, Watch::Entropy | Watch::Verifier) { "below" } else { "above" };
        write!(
            formatter,
            "step {step}: {}: {metric} {value:.4}, {side} {bound:.4} since step {since} (odds {odds:.0} : 1, alarm at {needed:.0} : 1)",
            watch.cause()
        )?;
        for (name, change) in [("reward", self.reward), ("verifier", self.verifier)] {
            if let Some([first, last]) = change {
                write!(formatter, ", {name} {first:.3} → {last:.3}")?;
            }
        }
        Ok(())
    }
}

/// Watches one stage.
#[derive(Clone, Debug)]
pub struct Referee {
    options: RefereeOptions,
    /// The stage's first steps, until there are enough of them.
    first: Vec<Metrics>,
    /// Means of the first steps; `None` until then.
    normal: Option<Normal>,
    rewards: Recent,
    verdicts: Recent,
    fall: Fall,
    watches: Vec<Watching>,
}

/// What is normal in a stage.
#[derive(Clone, Copy, Debug)]
struct Normal {
    entropy: f64,
    length: f64,
    reward: f64,
    deviation: f64,
    /// Of the verifier, or of who stands in for it.
    verdict: f64,
}

/// One watch and its evidence.
#[derive(Clone, Debug)]
struct Watching {
    watch: Watch,
    bet: Option<Bet>,
    /// The last step after which the fortune was at most 1.
    quiet: u64,
    alarmed: bool,
}

/// The last few values of a number.
#[derive(Clone, Debug)]
struct Recent {
    values: VecDeque<f64>,
    capacity: usize,
}

impl Recent {
    fn push(&mut self, value: f64) {
        if self.values.len() == self.capacity {
            self.values.pop_front();
        }
        self.values.push_back(value);
    }

    /// NaN of nothing.
    fn mean(&self) -> f64 {
        self.values.iter().sum::<f64>() / self.values.len() as f64
    }
}

/// Who stands in for the verifier.
const STAND_IN: &str = "status/ok";
/// A verifier's mean from which on there is nothing left to learn.
const SOLVED: f64 = 0.95;
/// Least spread of rewards that a rise is measured in.
const LEAST_DEVIATION: f64 = 1e-3;

/// A number to bet on.
struct Observation {
    metric: String,
    value: f64,
    /// What its expected value must keep to.
    bound: f64,
    /// The number between 0 and 1, and the claim about it.
    x: f64,
    claim: Claim,
}

impl Referee {
    /// Watches a stage from its first step on.
    pub fn new(options: &RefereeOptions) -> Self {
        let recent = Recent { values: VecDeque::new(), capacity: options.window };
        let watching = |watch| Watching { watch, bet: None, quiet: 0, alarmed: false };
        Self {
            first: Vec::new(),
            normal: None,
            rewards: recent.clone(),
            verdicts: recent,
            fall: Fall::new(options.window, options.tolerance),
            watches: Watch::ALL.map(watching).into(),
            options: options.clone(),
        }
    }

    /// The odds that an alarm needs: each watch has its part of the rate of false alarms.
    fn needed(&self) -> f64 {
        Watch::ALL.len() as f64 / self.options.false_alarm_rate
    }

    /// Looks at the metrics of a step, or of an evaluation after it. Returns the evidence, as metrics, and the alarms that
    /// these metrics raise; each watch raises at most one.
    pub fn see(&mut self, metrics: &Metrics) -> (Metrics, Vec<Alarm>) {
        if self.options.action == Action::Off {
            return Default::default();
        }
        let step = metrics.get("step").unwrap_or_default() as u64;
        let bound = self.needed().ln();
        let mut evidence = Metrics::new();
        let mut alarms = Vec::new();
        for index in 0..self.watches.len() {
            let watch = self.watches[index].watch;
            let Some((observation, fortune)) = self.bet(index, metrics) else { continue };
            evidence.set(format!("referee/{}", watch.name()), (fortune / bound).max(0.0));
            let watching = &mut self.watches[index];
            if fortune <= 0.0 {
                watching.quiet = step;
            }
            if fortune >= bound && !watching.alarmed {
                watching.alarmed = true;
                let since = watching.quiet + 1;
                alarms.push(self.alarm(step, since, watch, observation, fortune));
            }
        }
        self.remember(metrics);
        (evidence, alarms)
    }

    /// Bets on what a watch sees in `metrics`, unless it sees nothing or rests. Returns what it saw and its evidence.
    fn bet(&mut self, index: usize, metrics: &Metrics) -> Option<(Observation, f64)> {
        let watch = self.watches[index].watch;
        if watch == Watch::Verifier {
            let metric = self.options.verifier.clone()?;
            let value = metrics.get(&metric)?;
            let fortune = self.fall.see(value);
            let bound = self.fall.level()?;
            return Some((Observation { metric, value, bound, x: value, claim: Claim::AtLeast(bound) }, fortune));
        }
        let normal = self.normal?;
        let observation = self.observe(watch, &normal, metrics)?;
        let rests = self.rests(watch, &normal);
        let watching = &mut self.watches[index];
        let bet = watching.bet.get_or_insert_with(|| Bet::anytime(observation.claim));
        let fortune = if rests { bet.evidence() } else { bet.see(observation.x) };
        Some((observation, fortune))
    }

    /// What a watch sees in the metrics of a step.
    fn observe(&self, watch: Watch, normal: &Normal, metrics: &Metrics) -> Option<Observation> {
        let options = &self.options;
        let metric = match watch {
            Watch::Entropy => "entropy",
            Watch::Advantages => "frac_reward_zero_std",
            Watch::Length => "completions/mean_length",
            Watch::LengthReward => "completions/length_reward_correlation",
            Watch::Drift => "kl",
            Watch::Mismatch => "sampling/sampling_logp_difference/mean",
            Watch::Reward => options.verifier.as_ref().map(|_| "reward")?,
            Watch::Verifier => return None,
        };
        let value = metrics.get(metric)?;
        // A number that is at least 0 and whose mean is to be at most `limit`.
        let at_most = |excess: f64, limit: f64| {
            let excess = excess.max(0.0);
            (excess / (excess + limit), Claim::AtMost(0.5))
        };
        let (bound, (x, claim)) = match watch {
            Watch::Entropy => {
                let floor = options.entropy_floor * normal.entropy;
                (floor, (value / (value + floor), Claim::AtLeast(0.5)))
            }
            Watch::Advantages => {
                let ceiling = options.zero_variance_ceiling;
                (ceiling, (value, Claim::AtMost(ceiling)))
            }
            Watch::Length => {
                let limit = options.length_growth * normal.length;
                (limit, at_most(value, limit))
            }
            Watch::LengthReward => {
                let limit = options.length_correlation;
                (limit, ((1.0 + value) / 2.0, Claim::AtMost((1.0 + limit) / 2.0)))
            }
            Watch::Drift => (options.kl_limit, at_most(value, options.kl_limit)),
            Watch::Mismatch => (options.mismatch_limit, at_most(value, options.mismatch_limit)),
            Watch::Reward => {
                let rise = (value - normal.reward) / normal.deviation;
                (normal.reward + options.reward_rise * normal.deviation, at_most(rise, options.reward_rise))
            }
            Watch::Verifier => return None,
        };
        x.is_finite().then(|| Observation { metric: metric.to_owned(), value, bound, x, claim })
    }

    /// Whether a watch has no reason to bet, by what was known before the step.
    fn rests(&self, watch: Watch, normal: &Normal) -> bool {
        match watch {
            Watch::Entropy | Watch::Advantages => self.verdicts.mean() >= SOLVED,
            Watch::Length | Watch::LengthReward | Watch::Reward => {
                self.verdicts.mean() > normal.verdict + self.options.tolerance
            }
            Watch::Drift | Watch::Mismatch | Watch::Verifier => false,
        }
    }

    /// Keeps what later bets depend on.
    fn remember(&mut self, metrics: &Metrics) {
        let judge = self.options.verifier.as_deref().unwrap_or(STAND_IN);
        if let Some(verdict) = metrics.get(judge) {
            self.verdicts.push(verdict);
        }
        let Some(reward) = metrics.get("reward") else { return };
        self.rewards.push(reward);
        if self.normal.is_some() {
            return;
        }
        self.first.push(metrics.clone());
        if self.first.len() < self.options.window {
            return;
        }
        let of = |name: &str| mean(&self.first.iter().filter_map(|metrics| metrics.get(name)).collect::<Vec<_>>());
        self.normal = Some(Normal {
            entropy: of("entropy"),
            length: of("completions/mean_length"),
            reward: of("reward"),
            deviation: of("reward_std").max(LEAST_DEVIATION),
            verdict: self.verdicts.mean(),
        });
        self.first.clear();
    }

    fn alarm(&self, step: u64, since: u64, watch: Watch, observation: Observation, fortune: f64) -> Alarm {
        let Observation { metric, value, bound, .. } = observation;
        let change = |first: fn(&Normal) -> f64, recent: &Recent| {
            let change = [first(self.normal.as_ref()?), recent.mean()];
            change.iter().all(|value| value.is_finite()).then_some(change)
        };
        Alarm {
            step,
            since,
            watch,
            metric,
            value,
            bound,
            odds: fortune.exp().min(f64::MAX),
            needed: self.needed(),
            reward: change(|normal| normal.reward, &self.rewards),
            verifier: self.options.verifier.as_ref().and_then(|_| change(|normal| normal.verdict, &self.verdicts)),
        }
    }
}
