//! Whether claims hold, by the statistics over the seeds, and the file that says so.
//!
//! A claim is one number a seed and a bound on its mean. With Student's 95 % interval of the mean, it
//!
//! - **holds** where the whole interval keeps the bound,
//! - **fails** where none of it does,
//! - is **undecided** otherwise, and always with fewer than two seeds.

use std::collections::BTreeMap;

use base::Clock;
use eval::Interval;
use eval::interval::student;
use eval::metrics::mean;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::measurements::Seed;
use crate::reproduce::{Finished, by_seed};
use crate::system::{Bound, Claim, System};

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The statistics say yes.
    Holds,
    /// The statistics say no.
    Fails,
    /// They don't say.
    Undecided,
}

impl Verdict {
    /// The word in files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::Fails => "fails",
            Self::Undecided => "undecided",
        }
    }
}

/// A claim and what was measured of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The claim's name.
    pub id: String,
    /// The claim in words.
    pub statement: String,
    /// The bound on the mean over the seeds.
    pub bound: String,
    /// The mean over the seeds; absent where nothing was measured.
    pub value: Option<f64>,
    /// Its 95 % interval; absent for fewer than two seeds.
    pub interval: Option<Interval>,
    /// The number of each seed.
    pub seeds: Vec<f64>,
    /// What became of it.
    pub verdict: Verdict,
}

/// What a file of evidence holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// The system.
    pub system: String,
    /// The paper.
    pub paper: String,
    /// Name and version of the program.
    pub program: String,
    /// The commit that it was built from, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Hash of system and settings.
    pub config_sha256: String,
    /// The settings.
    pub settings: Value,
    /// The seeds.
    pub seeds: Vec<u64>,
    /// Seconds of all trials together, each on one thread.
    pub seconds: f64,
    /// What they were measured by. By the wall, they are more than the processor time, by as much as the machine was busy.
    #[serde(default)]
    pub clock: Clock,
    /// The claims.
    pub claims: Vec<Judgement>,
    /// Mean over the seeds of every number, by arm.
    pub arms: BTreeMap<String, BTreeMap<String, f64>>,
}

/// Judges one claim.
pub fn judge(claim: &Claim, seeds: &[Seed<'_>]) -> Judgement {
    let values: Vec<f64> = seeds.iter().filter_map(claim.measure).collect();
    // A claim that cannot be measured for every seed is not decided by those for which it can.
    let interval = student(&values).filter(|_| values.len() == seeds.len());
    let verdict = match (interval, claim.bound) {
        (None, _) => Verdict::Undecided,
        (Some(Interval { low, .. }), Bound::AtLeast(bound)) if low >= bound => Verdict::Holds,
        (Some(Interval { high, .. }), Bound::AtLeast(bound)) if high < bound => Verdict::Fails,
        (Some(Interval { high, .. }), Bound::AtMost(bound)) if high <= bound => Verdict::Holds,
        (Some(Interval { low, .. }), Bound::AtMost(bound)) if low > bound => Verdict::Fails,
        (Some(_), _) => Verdict::Undecided,
    };
    Judgement {
        id: claim.id.into(),
        statement: claim.statement.into(),
        bound: claim.bound.to_string(),
        value: (!values.is_empty()).then(|| mean(&values)),
        interval,
        seeds: values,
        verdict,
    }
}

/// The evidence of finished trials.
pub fn evidence(
    system: &System,
    (program, commit): (&str, Option<&str>),
    config_sha256: String,
    settings: Value,
    finished: &[Finished],
) -> Evidence {
    let seeds = by_seed(finished);
    let mut arms: BTreeMap<String, BTreeMap<String, Vec<f64>>> = BTreeMap::new();
    for trial in finished {
        let arm = arms.entry(trial.arm.clone()).or_default();
        for (name, value) in &trial.measurements.values {
            arm.entry(name.clone()).or_default().push(*value);
        }
    }
    let by_wall = finished.iter().any(|trial| trial.clock == Clock::Wall);
    let means = |numbers: BTreeMap<String, Vec<f64>>| numbers.into_iter().map(|(name, values)| (name, mean(&values)));
    Evidence {
        system: system.name.into(),
        paper: system.paper.into(),
        program: program.into(),
        commit: commit.map(str::to_owned),
        config_sha256,
        settings,
        seeds: seeds.iter().map(|seed| seed.seed).collect(),
        seconds: finished.iter().map(|trial| trial.seconds).sum(),
        clock: if by_wall { Clock::Wall } else { Clock::Processor },
        claims: system.claims.iter().map(|claim| judge(claim, &seeds)).collect(),
        arms: arms.into_iter().map(|(arm, numbers)| (arm, means(numbers).collect())).collect(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;
    use crate::measurements::Measurements;

    fn verdict(values: &[f64], bound: Bound) -> Verdict {
        let all: Vec<Measurements> = values
            .iter()
            .map(|value| Measurements { values: [("x".to_owned(), *value)].into(), ..Default::default() })
            .collect();
        let seeds: Vec<Seed<'_>> =
            (0..).zip(&all).map(|(seed, measured)| Seed { seed, arms: [("arm", measured)].into() }).collect();
        let claim = Claim { id: "1", statement: "", bound, measure: |seed| seed.value("arm", "x") };
        judge(&claim, &seeds).verdict
    }

    #[test]
    fn the_whole_interval_decides() {
        assert_eq!(verdict(&[0.7, 0.71, 0.72], Bound::AtLeast(0.6)), Verdict::Holds);
        assert_eq!(verdict(&[0.7, 0.71, 0.72], Bound::AtLeast(0.8)), Verdict::Fails);
        assert_eq!(verdict(&[0.5, 0.71, 0.9], Bound::AtLeast(0.6)), Verdict::Undecided);
        assert_eq!(verdict(&[0.7, 0.71, 0.72], Bound::AtMost(0.8)), Verdict::Holds);
        assert_eq!(verdict(&[0.7, 0.71, 0.72], Bound::AtMost(0.6)), Verdict::Fails);
    }

    #[test]
    fn a_file_that_names_no_clock_was_measured_by_the_wall() {
        let system = crate::SYSTEMS[0];
        let trial =
            |clock| Finished { arm: "arm".into(), seed: 0, seconds: 2.0, clock, measurements: Measurements::default() };
        let of = |trials: &[Finished]| evidence(system, ("program", None), String::new(), Value::Null, trials);
        let by_processor = of(&[trial(Clock::Processor), trial(Clock::Processor)]);
        assert_eq!((by_processor.seconds, by_processor.clock), (4.0, Clock::Processor));
        assert_eq!(of(&[trial(Clock::Processor), trial(Clock::Wall)]).clock, Clock::Wall);
        let mut file = serde_json::to_value(by_processor).unwrap();
        file.as_object_mut().unwrap().remove("clock");
        assert_eq!(serde_json::from_value::<Evidence>(file).unwrap().clock, Clock::Wall);
    }

    #[test]
    fn one_seed_decides_nothing() {
        assert_eq!(verdict(&[0.7], Bound::AtLeast(0.1)), Verdict::Undecided);
        assert_eq!(verdict(&[], Bound::AtLeast(0.1)), Verdict::Undecided);
    }

    #[test]
    fn a_measurement_that_a_seed_lacks_leaves_the_claim_open() {
        let (full, empty) =
            (Measurements { values: [("x".to_owned(), 1.0)].into(), ..Default::default() }, Measurements::default());
        let seeds = [&full, &full, &empty].map(|measured| Seed { seed: 0, arms: [("arm", measured)].into() });
        let claim =
            Claim { id: "1", statement: "", bound: Bound::AtLeast(0.0), measure: |seed| seed.value("arm", "x") };
        assert_eq!(judge(&claim, &seeds).verdict, Verdict::Undecided);
    }
}
