//! Sequential tests: the false-alarm bound, and that changes are found.

use base::{Purpose, Random};
use posttrain_eval::sequential::{Bet, Claim, Fall, log_add};
use proptest::prelude::*;

const RATE: f64 = 0.05;

/// Draws in `[0, 1]` with this mean: 0 or 1, the hardest case for a bound.
fn coin(run: u32, step: u32, mean: f64) -> f64 {
    f64::from(u8::from(Random::new(run.into(), Purpose::Test).at(step).uniform() < mean))
}

/// The first step at which the evidence reaches the bound.
fn alarm(steps: u32, mut see: impl FnMut(u32) -> f64) -> Option<u32> {
    (0..steps).find(|&step| see(step) >= (1.0 / RATE).ln())
}

#[test]
fn false_alarms_stay_below_the_stated_rate() {
    const RUNS: u32 = 400;
    for (claim, mean) in [(Claim::AtLeast(0.5), 0.5), (Claim::AtMost(0.3), 0.3), (Claim::AtLeast(0.05), 0.05)] {
        for start in [Bet::anytime, Bet::from_here] {
            let alarms = (0..RUNS).filter(|&run| {
                let mut bet = start(claim);
                alarm(500, |step| bet.see(coin(run, step, mean))).is_some()
            });
            let alarms = alarms.count();
            assert!(alarms as f64 <= RATE * f64::from(RUNS), "{alarms} of {RUNS} for {claim:?}");
        }
    }
}

#[test]
fn the_expected_fortune_is_at_most_one() {
    // Every sequence of eight fair coins once: the mean fortune of players who enter first is exactly 1.
    let fortunes = (0u32..256).map(|bits| {
        let mut bet = Bet::from_here(Claim::AtLeast(0.5));
        for position in 0..8 {
            bet.see(f64::from(bits >> position & 1));
        }
        bet.evidence().exp()
    });
    let mean = fortunes.sum::<f64>() / 256.0;
    assert!((mean - 1.0).abs() < 1e-12, "{mean}");
    // Those who have not entered yet still hold their part: 1 - 1 / (t + 1) is in the game.
    let fortunes = (0u32..256).map(|bits| {
        let mut bet = Bet::anytime(Claim::AtLeast(0.5));
        for position in 0..8 {
            bet.see(f64::from(bits >> position & 1));
        }
        bet.evidence().exp()
    });
    let mean = fortunes.sum::<f64>() / 256.0;
    assert!((mean - 8.0 / 9.0).abs() < 1e-12, "{mean}");
}

#[test]
fn a_late_change_is_found_soon() {
    let mut bet = Bet::anytime(Claim::AtLeast(0.5));
    let found = alarm(1000, |step| bet.see(if step < 500 { 0.8 } else { 0.2 }));
    assert!(found.is_some_and(|step| (505..550).contains(&step)), "{found:?}");
}

#[test]
fn a_fall_is_found_and_a_rise_is_not() {
    let mut fall = Fall::new(10, 0.1);
    assert_eq!(alarm(400, |step| fall.see((f64::from(step) / 300.0).min(0.9))), None);
    let found = alarm(100, |_| fall.see(0.5));
    assert!(found.is_some_and(|step| step < 40), "{found:?}");
    assert!(fall.level().is_some_and(|level| (0.6..0.9).contains(&level)), "{:?}", fall.level());
}

#[test]
fn a_steady_number_does_not_fall() {
    for run in 0..50 {
        let mut fall = Fall::new(10, 0.1);
        // The mean of 32 coins, as a step of 32 answers has it.
        let mean = |step| (0..32).map(|i| coin(run, step * 32 + i, 0.4)).sum::<f64>() / 32.0;
        assert_eq!(alarm(300, |step| fall.see(mean(step))), None, "run {run}");
    }
}

#[test]
fn sums_of_logarithms_know_nothing_and_extremes() {
    assert_eq!(log_add(f64::NEG_INFINITY, f64::NEG_INFINITY), f64::NEG_INFINITY);
    assert_eq!(log_add(f64::NEG_INFINITY, 2.0), 2.0);
    assert!((log_add(0.0, 0.0) - 2f64.ln()).abs() < 1e-15);
    assert_eq!(log_add(1e4, -1e4), 1e4);
}

proptest! {
    #[test]
    fn evidence_is_never_nan(level in -1.0..2.0f64, numbers in prop::collection::vec(-1.0..2.0f64, 1..200)) {
        for claim in [Claim::AtLeast(level), Claim::AtMost(level)] {
            let mut bet = Bet::anytime(claim);
            let mut fall = Fall::new(5, 0.1);
            for &x in &numbers {
                prop_assert!(!bet.see(x).is_nan());
                prop_assert!(!fall.see(x).is_nan());
            }
        }
    }
}
