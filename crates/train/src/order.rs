//! Which rows of the data a step takes, and how its batch is cut to fit in memory.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Range;

use base::{Purpose, Random};

/// The rows of a data set in a new random order each epoch, as one endless sequence.
///
/// The row at a position is a function of (seed, stage, position): resuming needs the position alone. A batch that reaches
/// the end of an epoch continues with the next one, so that every batch has the same size.
#[derive(Clone, Debug)]
pub struct Order {
    random: Random,
    rows: usize,
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// The order of `rows` rows, of which there must be at least one, in a stage of a run.
    pub fn new(rows: usize, seed: u64, stage: usize) -> Self {
        Self::of_set(rows, seed, stage, 0)
    }

    /// That of one of a stage's data sets, counted from 0. Two sets with as many rows each have an order of their own: else a row would
    /// always meet the same other.
    pub fn of_set(rows: usize, seed: u64, stage: usize, set: usize) -> Self {
        assert!(rows > 0, "a data set without rows has no order");
        let name = stage | set << 16;
        Self { random: Random::new(seed, Purpose::Shuffle).prompt(name as u32), rows, epoch: None }
    }

    /// The row at `position`.
    pub fn row(&mut self, position: u64) -> usize {
        let (epoch, within) = (position / self.rows as u64, position % self.rows as u64);
        if self.epoch.as_ref().is_none_or(|(current, _)| *current != epoch) {
            self.epoch = Some((epoch, self.random.step(epoch as u32).permutation(self.rows)));
        }
        self.epoch.as_ref().map_or(0, |(_, order)| order[within as usize])
    }

    /// The rows of the batch with this number, counted from 0.
    pub fn batch(&mut self, number: u64, size: usize) -> Vec<usize> {
        let first = number * size as u64;
        (first..first + size as u64).map(|position| self.row(position)).collect()
    }
}

/// For each of these things, the place of the first that is equal to it.
pub fn numbered<T: Eq + Hash>(things: impl Iterator<Item = T>) -> Vec<u32> {
    let mut seen = HashMap::new();
    (0..).zip(things).map(|(place, thing)| *seen.entry(thing).or_insert(place)).collect()
}

/// Cuts units of the given sizes into consecutive pieces whose sizes add up to at most `budget`; a unit larger than the
/// budget is a piece of its own.
pub fn split(sizes: &[usize], budget: usize) -> Vec<Range<usize>> {
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut filled = 0;
    for (unit, &size) in sizes.iter().enumerate() {
        match pieces.last_mut() {
            Some(piece) if filled + size <= budget => {
                piece.end = unit + 1;
                filled += size;
            }
            _ => {
                pieces.push(unit..unit + 1);
                filled = size;
            }
        }
    }
    pieces
}

/// Cuts `count` units into `parts` consecutive pieces whose lengths differ by at most one.
pub fn even_parts(count: usize, parts: usize) -> Vec<Range<usize>> {
    (0..parts).map(|part| part * count / parts..(part + 1) * count / parts).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_holds_every_row_once_in_another_order() {
        let mut order = Order::new(10, 1, 0);
        let epochs: Vec<Vec<usize>> = (0..3).map(|epoch| order.batch(epoch, 10)).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(epochs[0], epochs[1]);
        assert_ne!(epochs[0], Order::new(10, 1, 1).batch(0, 10), "stages differ");
        assert_ne!(epochs[0], Order::new(10, 2, 0).batch(0, 10), "seeds differ");
    }

    #[test]
    fn a_position_needs_no_history() {
        let mut whole = Order::new(7, 3, 0);
        let all: Vec<usize> = (0..40).map(|position| whole.row(position)).collect();
        for position in (0..40).rev() {
            assert_eq!(Order::new(7, 3, 0).row(position), all[position as usize]);
        }
        assert_eq!(whole.batch(2, 3), all[6..9], "a batch may straddle two epochs");
    }

    #[test]
    fn pieces_are_consecutive_and_within_the_budget() {
        assert_eq!(split(&[3, 3, 4, 20, 1, 1], 10), [0..3, 3..4, 4..6]);
        assert_eq!(split(&[5], 1), std::slice::from_ref(&(0..1)));
        assert!(split(&[], 10).is_empty());
        assert_eq!(even_parts(7, 3), [0..2, 2..4, 4..7]);
    }
}
