//! One token from one row of logits.
//!
//! The filters and their order are those of Hugging Face's `generate`: temperature, then top-k, then top-p, then min-p,
//! each over what the one before it left. Write `p` for the softmax of the logits over the temperature, restricted to
//! the tokens left and renormalised. Exactly:
//!
//! - **top-k** keeps the tokens whose logit is at least the k-th largest: more than k where logits tie there.
//! - **top-p** goes through the tokens by falling logit (equal logits: lower id first) and keeps a token while the
//!   probability of those before it is below `top_p`. The first token is always kept.
//! - **min-p** keeps the tokens with `p ≥ min_p · max p`. The most probable token is always kept.
//! - **greedy** (temperature 0) takes the largest logit, the lowest id among equals; filters have no effect.
//!
//! The draw inverts the cumulative distribution of the kept tokens in ascending order of id at one uniform number, which
//! comes from the counter-based generator: a token depends on its row and on (seed, step, prompt, sample, position), not
//! on the batch it was computed in.

use kernels::{log_softmax_row, softmax_weights};

use crate::SamplingOptions;

/// What was chosen from a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// Its log-probability under the distribution before the filters.
    pub log_prob: f32,
    /// Its log-probability under the distribution that was drawn from, renormalised over the kept tokens.
    pub filtered_log_prob: f32,
}

/// Why nothing could be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoChoice {
    /// A logit is NaN or positive infinity.
    #[error("the logit of token {0} is not a number")]
    NotANumber(usize),
    /// Every logit is negative infinity.
    #[error("no token is allowed")]
    NothingAllowed,
}

/// Buffers of a sampler, to be reused from row to row.
#[derive(Debug, Default)]
pub struct Scratch {
    weights: Vec<f32>,
    sorted: Vec<f32>,
    kept: Vec<u32>,
    keys: Vec<u64>,
}

impl Scratch {
    /// Chooses a token from a row of logits; `uniform`, from 0 up to 1, decides a draw.
    ///
    /// # Errors
    /// Logits that are not numbers, or that allow no token.
    pub fn choose(&mut self, logits: &[f32], options: &SamplingOptions, uniform: f64) -> Result<Choice, NoChoice> {
        if options.is_greedy() {
            let token = argmax(logits)?;
            let log_prob = log_softmax_row(logits, 1.0, token as usize).log_prob;
            return Ok(Choice { token, log_prob, filtered_log_prob: 0.0 });
        }
        self.weights.resize(logits.len(), 0.0);
        let normalizer = softmax_weights(logits, 1.0 / options.log_prob_temperature(), &mut self.weights);
        let total = sum_of_blocks(&self.weights);
        if total.is_nan() {
            return Err(NoChoice::of(logits));
        }

        let top_k = (1..logits.len()).contains(&options.top_k);
        if !top_k && options.top_p == 1.0 && options.min_p == 0.0 {
            let token = draw_from_blocks(&self.weights, uniform * total);
            let log_prob = normalizer.log_prob(logits[token as usize]);
            return Ok(Choice { token, log_prob, filtered_log_prob: log_prob });
        }

        // Each filter keeps a beginning of the tokens in falling order, so that their order matters only in one respect:
        // the probability that top-p counts is relative to what top-k left.
        let least = if top_k { self.largest(logits, options.top_k) } else { f32::NEG_INFINITY };
        let (left, count) = match top_k {
            true => self.mass_from(logits, least),
            false => (total, logits.len()),
        };
        // Tokens of weight at most (1 - p) left / n have together at most (1 - p) left, so all of them come after the
        // nucleus. Half of that bound is far from any rounding, and leaves few to sort. A weight of 0 is never drawn.
        let negligible = 0.5 * (1.0 - options.top_p) * left / count as f64;
        let floor = options.min_p.max(negligible).max(f64::from(f32::MIN_POSITIVE));
        self.kept.clear();
        for (id, (&logit, &weight)) in logits.iter().zip(&self.weights).enumerate() {
            if logit >= least && f64::from(weight) >= floor {
                self.kept.push(id as u32);
            }
        }
        if options.top_p < 1.0 {
            self.keep_nucleus(logits, options.top_p * left);
        }

        let total = self.mass();
        let token = self.draw(uniform * total);
        let log_prob = normalizer.log_prob(logits[token as usize]);
        let filtered_log_prob = (f64::from(self.weights[token as usize]) / total).ln() as f32;
        Ok(Choice { token, log_prob, filtered_log_prob })
    }

    /// The `count` most probable tokens and their log-probs under the whole distribution, falling; lower ids first among
    /// equals.
    pub fn top_log_probs(&mut self, logits: &[f32], inverse_temperature: f32, count: usize) -> Vec<(u32, f32)> {
        let count = count.min(logits.len());
        if count == 0 {
            return Vec::new();
        }
        let least = self.largest(logits, count);
        let mut top: Vec<u32> = (0..logits.len() as u32).filter(|&id| logits[id as usize] >= least).collect();
        top.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        top.truncate(count);
        top.into_iter().map(|id| (id, log_softmax_row(logits, inverse_temperature, id as usize).log_prob)).collect()
    }

    /// The `k`-th largest logit; `k` is at least 1 and at most their number.
    fn largest(&mut self, logits: &[f32], k: usize) -> f32 {
        self.sorted.clear();
        self.sorted.extend_from_slice(logits);
        *self.sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    }

    /// The weight and the number of the tokens whose logit is at least `least`.
    fn mass_from(&self, logits: &[f32], least: f32) -> (f64, usize) {
        let kept = logits.iter().zip(&self.weights).filter(|(logit, _)| **logit >= least);
        kept.fold((0.0, 0), |(mass, count), (_, &weight)| (mass + f64::from(weight), count + 1))
    }

    /// Keeps the tokens, by falling logit and rising id, that have less than `mass` before them.
    fn keep_nucleus(&mut self, logits: &[f32], mass: f64) {
        self.keys.clear();
        self.keys.extend(self.kept.drain(..).map(|id| falling(logits[id as usize], id)));
        let mut before = 0.0;
        let mut rest = &mut self.keys[..];
        let mut size = FIRST_SORTED;
        // Most nuclei are small: sort a beginning, and a longer one only where it does not reach.
        while !rest.is_empty() && before < mass {
            let beginning;
            if size < rest.len() {
                rest.select_nth_unstable(size);
            }
            (beginning, rest) = rest.split_at_mut(size.min(rest.len()));
            beginning.sort_unstable();
            for &key in beginning.iter() {
                if before >= mass {
                    break;
                }
                let id = key as u32;
                self.kept.push(id);
                before += f64::from(self.weights[id as usize]);
            }
            size *= 4;
        }
        self.kept.sort_unstable();
    }

    /// The weight of the kept tokens, added in order of id.
    fn mass(&self) -> f64 {
        self.kept.iter().map(|&id| f64::from(self.weights[id as usize])).sum()
    }

    /// The first kept token at which the running weight exceeds `target`.
    fn draw(&self, target: f64) -> u32 {
        let mut running = 0.0;
        let drawn = self.kept.iter().find(|&&id| {
            running += f64::from(self.weights[id as usize]);
            running > target
        });
        // `uniform * total` can round up to the total itself.
        *drawn.or(self.kept.last()).unwrap_or(&0)
    }
}

impl NoChoice {
    /// What is wrong with a row of logits that has no distribution.
    fn of(logits: &[f32]) -> Self {
        let bad = logits.iter().position(|&logit| logit.is_nan() || logit == f32::INFINITY);
        bad.map_or(Self::NothingAllowed, Self::NotANumber)
    }
}

/// Elements that are reduced together before they join the running result. Blocks do not depend on each other, so the
/// processor works on several at a time, and a draw passes over most of a row block by block.
const BLOCK: usize = 64;

/// The largest logit's token, the lowest id among equals.
fn argmax(logits: &[f32]) -> Result<u32, NoChoice> {
    let larger = |best: f32, logit: f32| if logit > best { logit } else { best };
    let largest = logits
        .chunks(BLOCK)
        .map(|block| block.iter().copied().fold(f32::NEG_INFINITY, larger))
        .fold(f32::NEG_INFINITY, larger);
    let numbers = logits.iter().fold(true, |numbers, &logit| numbers & (logit < f32::INFINITY));
    match logits.iter().position(|&logit| logit == largest) {
        Some(best) if numbers && largest > f32::NEG_INFINITY => Ok(best as u32),
        _ => Err(NoChoice::of(logits)),
    }
}

/// Tokens that top-p sorts at first.
const FIRST_SORTED: usize = 128;

/// A key that rises where the logit falls or, for equal logits, the id rises; the id is its lower half.
fn falling(logit: f32, id: u32) -> u64 {
    // Adding 0 makes -0 equal to 0. Flipping all bits of negative numbers and the sign of others orders floats as integers.
    let bits = (logit + 0.0).to_bits();
    let rising = bits ^ (((bits as i32 >> 31) as u32) | 0x8000_0000);
    u64::from(!rising) << 32 | u64::from(id)
}

fn block_mass(block: &[f32]) -> f64 {
    block.iter().fold(0.0, |mass, &weight| mass + f64::from(weight))
}

fn sum_of_blocks(weights: &[f32]) -> f64 {
    weights.chunks(BLOCK).map(block_mass).fold(0.0, |sum, mass| sum + mass)
}

/// The first token at which the running weight exceeds `target`, over the whole row.
fn draw_from_blocks(weights: &[f32], target: f64) -> u32 {
    let mut before = 0.0;
    for (block, chunk) in weights.chunks(BLOCK).enumerate() {
        let after = before + block_mass(chunk);
        if after > target {
            let mut mass = 0.0;
            let crosses = chunk.iter().position(|&weight| {
                mass += f64::from(weight);
                before + mass > target
            });
            return (block * BLOCK + crosses.unwrap_or(chunk.len() - 1)) as u32;
        }
        before = after;
    }
    // `uniform * total` can round up to the total itself.
    weights.iter().rposition(|&weight| weight > 0.0).unwrap_or(0) as u32
}
