//! What personal preferences are like, and what models of them are worth: more than one number.
//!
//! The protocol of "When Personalization Meets Reality: A Multi-Faceted Analysis of Personalized Preference Learning", Dong et al. 2025,
//! arXiv 2502.19158. Users `u` say which of the two answers of a pair `s` they prefer, `l_u(s)`.
//!
//! **Descriptors** say how much there is to personalise, before any model is trained ([`descriptors`]):
//!
//! | | value |
//! | --- | --- |
//! | divergence | share of pairs with two users or more on which not all agree |
//! | high divergence | share of them on which the smaller side has at least 30 % |
//! | agreement `A_uv` | share of the pairs of both on which `u` and `v` agree; Cohen's κ: the same beyond chance (Cohen 1960) |
//! | consistency `C_u` | share of pairs asked again on which `u` says the same each time; 1 without any |
//! | majority accuracy | share of pairs on which `u` sides with the majority, those with a tie left out; 1/2 where all are tied |
//! | room | mean over users of `C_u` - majority accuracy: from the best shared model up to the noise of the users |
//!
//! A user is a *minority* where the majority accuracy is below 1/2.
//!
//! **Facets** of a model that scores answers ([`facets`], [`tax`], [`normalised_gap`]), from whether it prefers what the user prefers, ties
//! counting half: *performance* is the mean over users, with an interval over pairs; *fairness* the worst user, the minority users, spread;
//! the *personalisation tax* what a user's model loses against a reference model in what should not depend on the user; *adaptability* how
//! much of the way from the shared model to the user's own is gone with a few of the user's pairs.

use std::collections::BTreeMap;

use base::{Purpose, Random};
use serde::{Deserialize, Serialize};

use crate::interval::{Interval, quantile};
use crate::metrics::{mean, standard_deviation};

/// A user's word on a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// The user, by number.
    pub user: usize,
    /// The pair, by number.
    pub pair: usize,
    /// Whether the first answer is preferred.
    pub first: bool,
}

/// What the preferences of users are like.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Descriptors {
    /// Pairs that two users or more have judged.
    pub shared_pairs: usize,
    /// Share of them on which not all agree.
    pub divergence: f64,
    /// Share of them on which the smaller side has at least 30 %.
    pub high_divergence: f64,
    /// Pairs on which the two sides are equally large.
    pub ties: usize,
    /// `A_uv`; absent where two users share no pair.
    pub agreement: Vec<Vec<Option<f64>>>,
    /// Cohen's κ; absent where two users share no pair, or where chance alone agrees always.
    pub kappa: Vec<Vec<Option<f64>>>,
    /// `C_u`.
    pub consistency: Vec<f64>,
    /// Share of pairs on which a user sides with the majority.
    pub majority_accuracy: Vec<f64>,
    /// Users who side with it less often than not.
    pub minority: Vec<usize>,
    /// Room for personalisation.
    pub room: f64,
}

/// Describes the preferences of `users` users. Where a user judges a pair again, the first word counts, for all but consistency.
pub fn descriptors(users: usize, labels: &[Label]) -> Descriptors {
    let mut said: Vec<BTreeMap<usize, Vec<bool>>> = vec![BTreeMap::new(); users];
    for label in labels.iter().filter(|label| label.user < users) {
        said[label.user].entry(label.pair).or_default().push(label.first);
    }
    let mut votes: BTreeMap<usize, [usize; 2]> = BTreeMap::new();
    for (pair, words) in said.iter().flatten() {
        votes.entry(*pair).or_default()[usize::from(!words[0])] += 1;
    }
    votes.retain(|_, [first, second]| *first + *second > 1);
    let share = |wanted: &dyn Fn(&[usize; 2]) -> bool| {
        mean(&votes.values().map(|votes| f64::from(u8::from(wanted(votes)))).collect::<Vec<_>>())
    };
    let smaller = |[first, second]: &[usize; 2]| *first.min(second);
    let consistency: Vec<f64> = said
        .iter()
        .map(|said| {
            let again: Vec<&Vec<bool>> = said.values().filter(|words| words.len() > 1).collect();
            let same = again.iter().filter(|words| words.iter().all(|word| *word == words[0])).count();
            if again.is_empty() { 1.0 } else { same as f64 / again.len() as f64 }
        })
        .collect();
    let majority_accuracy: Vec<f64> = said
        .iter()
        .map(|said| {
            let sides = said.iter().filter_map(|(pair, words)| {
                let [first, second] = votes.get(pair).filter(|[first, second]| first != second)?;
                Some(f64::from(u8::from((first > second) == words[0])))
            });
            let sides: Vec<f64> = sides.collect();
            if sides.is_empty() { 0.5 } else { mean(&sides) }
        })
        .collect();
    let room: Vec<f64> = consistency.iter().zip(&majority_accuracy).map(|(own, shared)| own - shared).collect();
    let matrix = |of: Likeness| {
        let entry = |u: usize, v: usize| {
            let both = said[u].iter().filter_map(|(pair, words)| Some((words[0], said[v].get(pair)?[0])));
            of(&both.collect::<Vec<_>>())
        };
        (0..users).map(|u| (0..users).map(|v| entry(u, v)).collect()).collect()
    };
    Descriptors {
        shared_pairs: votes.len(),
        divergence: share(&|votes| smaller(votes) > 0),
        high_divergence: share(&|votes| smaller(votes) * 10 >= (votes[0] + votes[1]) * 3),
        ties: votes.values().filter(|[first, second]| first == second).count(),
        agreement: matrix(agreement),
        kappa: matrix(kappa),
        minority: (0..users).filter(|&user| majority_accuracy[user] < 0.5).collect(),
        consistency,
        majority_accuracy,
        room: mean(&room),
    }
}

/// How alike two users are, from what both said of the pairs that they share.
type Likeness = fn(&[(bool, bool)]) -> Option<f64>;

fn agreement(both: &[(bool, bool)]) -> Option<f64> {
    let same = both.iter().filter(|(one, other)| one == other).count();
    (!both.is_empty()).then(|| same as f64 / both.len() as f64)
}

fn kappa(both: &[(bool, bool)]) -> Option<f64> {
    let share =
        |of: &dyn Fn(&(bool, bool)) -> bool| both.iter().filter(|pair| of(pair)).count() as f64 / both.len() as f64;
    let observed = agreement(both)?;
    let (one, other) = (share(&|pair| pair.0), share(&|pair| pair.1));
    let chance = one * other + (1.0 - one) * (1.0 - other);
    (chance < 1.0).then(|| (observed - chance) / (1.0 - chance))
}

/// Whether a model prefers what a user prefers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// The user.
    pub user: usize,
    /// The pair.
    pub pair: usize,
    /// 1, 0, or 1/2 where the model does not tell the answers apart.
    pub right: f64,
}

impl Outcome {
    /// The outcome of a label and the scores of both answers.
    pub fn new(label: Label, scores: [f64; 2]) -> Self {
        let [own, other] = if label.first { scores } else { [scores[1], scores[0]] };
        let right = if own == other { 0.5 } else { f64::from(u8::from(own > other)) };
        Self { user: label.user, pair: label.pair, right }
    }
}

/// The mean of each of `users` users; `None` for one without outcomes.
pub fn accuracies(users: usize, outcomes: &[Outcome]) -> Vec<Option<f64>> {
    let mut of_user = vec![(0.0, 0usize); users];
    for outcome in outcomes.iter().filter(|outcome| outcome.user < users) {
        let (sum, count) = &mut of_user[outcome.user];
        (*sum, *count) = (*sum + outcome.right, *count + 1);
    }
    of_user.into_iter().map(|(sum, count)| (count > 0).then(|| sum / count as f64)).collect()
}

/// The mean over users of their means: users count alike, however many pairs they have judged.
pub fn macro_accuracy(users: usize, outcomes: &[Outcome]) -> f64 {
    mean(&accuracies(users, outcomes).into_iter().flatten().collect::<Vec<_>>())
}

/// A model's worth in several respects.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facets {
    /// Accuracy of each user; absent without outcomes.
    pub users: Vec<Option<f64>>,
    /// Performance: their mean.
    pub accuracy: f64,
    /// Its 95 % bootstrap interval over pairs: users who judge the same pair are resampled together.
    pub interval: Interval,
    /// Fairness: the worst user.
    pub worst: f64,
    /// The mean over minority users; absent without any.
    pub minority: Option<f64>,
    /// From the worst user to the best.
    pub gap: f64,
    /// The standard deviation over users.
    pub deviation: f64,
}

/// The facets of a model's outcomes.
pub fn facets(users: usize, minority: &[usize], outcomes: &[Outcome], resamples: u32, seed: u64) -> Facets {
    let of_users = accuracies(users, outcomes);
    let known: Vec<f64> = of_users.iter().copied().flatten().collect();
    let of_minority: Vec<f64> = minority.iter().filter_map(|&user| *of_users.get(user)?).collect();
    let worst = known.iter().copied().fold(f64::INFINITY, f64::min).min(1.0);
    let best = known.iter().copied().fold(worst, f64::max);
    Facets {
        accuracy: mean(&known),
        interval: bootstrap_pairs(outcomes, resamples, seed, |outcomes| macro_accuracy(users, outcomes)),
        worst,
        minority: (!of_minority.is_empty()).then(|| mean(&of_minority)),
        gap: best - worst,
        deviation: standard_deviation(&known),
        users: of_users,
    }
}

/// One model against another on the same pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gain {
    /// By how much the accuracy is larger.
    pub accuracy: f64,
    /// Its 95 % paired bootstrap interval over pairs.
    pub interval: Interval,
    /// The same for each user; absent without outcomes.
    pub users: Vec<Option<f64>>,
}

/// By how much `ours` is better than `theirs`, over what both have outcomes of.
pub fn gain(users: usize, ours: &[Outcome], theirs: &[Outcome], resamples: u32, seed: u64) -> Gain {
    let known: BTreeMap<(usize, usize), f64> =
        theirs.iter().map(|outcome| ((outcome.user, outcome.pair), outcome.right)).collect();
    let difference = |ours: &Outcome| {
        let theirs = known.get(&(ours.user, ours.pair))?;
        Some(Outcome { right: ours.right - theirs, ..*ours })
    };
    let differences: Vec<Outcome> = ours.iter().filter_map(difference).collect();
    Gain {
        accuracy: macro_accuracy(users, &differences),
        interval: bootstrap_pairs(&differences, resamples, seed, |outcomes| macro_accuracy(users, outcomes)),
        users: accuracies(users, &differences),
    }
}

/// The 95 % percentile bootstrap interval of a statistic, resampling pairs with all that users say of them. `[0, 0]` for no outcomes.
fn bootstrap_pairs(outcomes: &[Outcome], resamples: u32, seed: u64, statistic: impl Fn(&[Outcome]) -> f64) -> Interval {
    let mut of_pair: BTreeMap<usize, Vec<Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        of_pair.entry(outcome.pair).or_default().push(*outcome);
    }
    let pairs: Vec<Vec<Outcome>> = of_pair.into_values().collect();
    let random = Random::new(seed, Purpose::Bootstrap);
    let resample = |number: u32| {
        let random = random.sample(number);
        let draw = |draw: u32| &pairs[random.at(draw).below(pairs.len() as u64) as usize];
        statistic(&(0..pairs.len() as u32).flat_map(draw).copied().collect::<Vec<_>>())
    };
    let resamples = if pairs.is_empty() { 0 } else { resamples };
    let mut statistics: Vec<f64> = (0..resamples).map(resample).collect();
    statistics.sort_unstable_by(f64::total_cmp);
    Interval { low: quantile(&statistics, 0.025), high: quantile(&statistics, 0.975) }
}

/// What users' models lose in a skill that should not depend on the user.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tax {
    /// Accuracy of the reference model.
    pub reference: f64,
    /// What each user's model loses against it; absent without outcomes.
    pub users: Vec<Option<f64>>,
    /// Their mean.
    pub mean: f64,
    /// The largest.
    pub largest: f64,
}

/// The personalisation tax from the accuracy of a reference model, trained on as many pairs, and those of users' models; `None` without any.
pub fn tax(reference: f64, users: &[Option<f64>]) -> Option<Tax> {
    let users: Vec<Option<f64>> = users.iter().map(|own| own.map(|own| reference - own)).collect();
    let known: Vec<f64> = users.iter().copied().flatten().collect();
    let largest = known.iter().copied().reduce(f64::max)?;
    Some(Tax { reference, mean: mean(&known), largest, users })
}

/// How much of the way from the shared model to the user's own is gone: `(adapted - shared) / (own - shared)`. `None` where there is no way
/// to go.
pub fn normalised_gap(adapted: f64, shared: f64, own: f64) -> Option<f64> {
    (own != shared).then(|| (adapted - shared) / (own - shared))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    fn labels(users: &[&str]) -> Vec<Label> {
        let of_user = |(user, words): (usize, &&str)| {
            let label =
                move |(pair, word): (usize, char)| (word != '.').then_some(Label { user, pair, first: word == '1' });
            words.chars().enumerate().filter_map(label).collect::<Vec<_>>()
        };
        users.iter().enumerate().flat_map(of_user).collect()
    }

    #[test]
    fn opposite_couples_never_agree_and_a_shared_model_is_a_coin() {
        let found = descriptors(4, &labels(&["1122", "2211", "1212", "2121"]));
        assert_eq!((found.divergence, found.high_divergence, found.ties), (1.0, 1.0, 4));
        assert_eq!((found.agreement[0][1], found.agreement[0][2]), (Some(0.0), Some(0.5)));
        assert_eq!((found.kappa[0][1], found.kappa[0][2], found.kappa[0][0]), (Some(-1.0), Some(0.0), Some(1.0)));
        assert_eq!((found.room, found.minority.len()), (0.5, 0), "all are tied");
    }

    #[test]
    fn identical_users_leave_no_room() {
        let found = descriptors(3, &labels(&["1121", "1121", "1121"]));
        assert_eq!((found.divergence, found.room), (0.0, 0.0));
        assert_eq!(found.majority_accuracy, [1.0; 3]);
        assert_eq!(found.kappa[0][1], Some(1.0));
    }

    #[test]
    fn a_minority_is_outvoted() {
        let found = descriptors(4, &labels(&["11111", "11122", "1112.", "22211"]));
        assert_eq!(found.minority, [3]);
        // On the fourth pair 2 are against 2, no majority; on the fifth 2 against 1.
        assert_eq!((found.ties, found.shared_pairs), (1, 5));
        assert_eq!(found.majority_accuracy, [1.0, 0.75, 1.0, 0.25]);
        assert_eq!(found.high_divergence, 0.4, "a quarter is no 30 %");
        assert_eq!(descriptors(2, &labels(&["1.", ".1"])).agreement[0][1], None);
    }

    #[test]
    fn consistency_is_that_of_pairs_asked_again() {
        let mut all = labels(&["1212", "1111"]);
        let again = |pair, first| Label { user: 0, pair, first };
        all.extend([again(0, true), again(1, true), again(1, false), again(2, true)]);
        let found = descriptors(2, &all);
        assert_eq!(found.consistency, [2.0 / 3.0, 1.0]);
        assert_eq!(found.agreement[0][1], Some(0.5), "the first word counts");
    }

    #[test]
    fn users_count_alike_and_a_constant_is_a_coin() {
        let label = |user, pair, first| Label { user, pair, first };
        let always_first = |label: Label| Outcome::new(label, [1.0, 0.0]);
        let balanced: Vec<Outcome> = (0..100).map(|pair| always_first(label(0, pair, pair % 2 == 0))).collect();
        assert_eq!(macro_accuracy(1, &balanced), 0.5);
        assert_eq!(Outcome::new(label(0, 0, true), [2.0, 2.0]).right, 0.5);
        assert_eq!(Outcome::new(label(0, 0, false), [1.0, 2.0]).right, 1.0);
        let uneven = [(0, 1.0), (0, 1.0), (0, 1.0), (1, 0.0)];
        let uneven: Vec<Outcome> =
            (0..).zip(uneven).map(|(pair, (user, right))| Outcome { user, pair, right }).collect();
        let found = facets(3, &[1], &uneven, 200, 1);
        assert_eq!((found.accuracy, found.worst, found.gap, found.minority), (0.5, 0.0, 1.0, Some(0.0)));
        assert_eq!(found.users, [Some(1.0), Some(0.0), None]);
        assert!(found.interval.contains(found.accuracy), "{found:?}");
    }

    #[test]
    fn gains_are_paired() {
        let outcome = |user, pair, right| Outcome { user, pair, right };
        let theirs: Vec<Outcome> = (0..40).map(|pair| outcome(0, pair, f64::from(u8::from(pair % 2 == 0)))).collect();
        let ours: Vec<Outcome> = theirs.iter().map(|theirs| outcome(0, theirs.pair, theirs.right)).collect();
        let same = gain(1, &ours, &theirs, 200, 1);
        assert_eq!((same.accuracy, same.interval), (0.0, Interval { low: 0.0, high: 0.0 }), "pair by pair the same");
        let better: Vec<Outcome> = ours.iter().map(|ours| outcome(0, ours.pair, 1.0)).collect();
        let found = gain(1, &better, &theirs, 200, 1);
        assert!(found.accuracy == 0.5 && found.interval.low > 0.3, "{found:?}");
    }

    #[test]
    fn taxes_and_the_way_to_go() {
        let found = tax(0.9, &[Some(0.9), Some(0.6), None]).unwrap();
        assert!((found.mean - 0.15).abs() < 1e-12 && (found.largest - 0.3).abs() < 1e-12);
        assert!(tax(0.9, &[None]).is_none());
        assert_eq!((normalised_gap(0.75, 0.5, 1.0), normalised_gap(0.5, 0.5, 0.5)), (Some(0.5), None));
    }
}
