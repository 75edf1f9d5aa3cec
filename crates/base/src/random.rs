//! Counter-based randomness: a draw is a function of its name, not of what was drawn before it.
//!
//! The generator is Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). Its key is
//! made of the run's seed and the [`Purpose`] of the draw, its 128-bit counter of (step, prompt, sample, position).
//! Whatever the number of threads or the order of the work, the same name gives the same bits; nothing in the project
//! draws from a shared stream.

/// What a draw is for. Two purposes never share random bits, whatever their counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Tokens drawn by the sampler.
    Sampling = 1,
    /// The order of the rows of a data set.
    Shuffle = 2,
    /// Initial weights of a model or an adapter.
    Init = 3,
    /// Problems made by a task generator.
    Task = 4,
    /// Resamples of a bootstrap interval.
    Bootstrap = 5,
    /// Dropout and other noise inside a training step.
    Noise = 6,
    /// Test data.
    Test = 7,
    /// Which way the optimiser's state is rounded.
    Rounding = 8,
    /// Episodes that are learnt from again.
    Replay = 9,
    /// Tokens that are left out of a loss.
    Masking = 10,
    /// Which groups make up a minibatch in a later pass over a step.
    Minibatches = 11,
    /// Prompts that a classifier of prompts is fitted on.
    Prompts = 12,
    /// Tokens of a second try, with a hint.
    Hints = 13,
    /// Tokens drawn from the model that the policy is compared with.
    Opponent = 21,
    /// What is wrong in wrong answers.
    Mistake = 22,
    /// Which of several candidates stands for a law that they were not drawn from.
    Resampling = 31,
    /// Beginnings of answers that another model continues, and where it does.
    RollIn = 41,
}

/// The name of a family of draws; [`Random::at`] gives one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Random {
    key: [u32; 2],
    counter: [u32; 3],
}

impl Random {
    /// Draws for `purpose` in the run with this seed, at step, prompt and sample 0.
    pub fn new(seed: u64, purpose: Purpose) -> Self {
        let mixed = split_mix(seed ^ split_mix(purpose as u64));
        Self { key: [mixed as u32, (mixed >> 32) as u32], counter: [0; 3] }
    }

    /// The same family at another step.
    pub fn step(mut self, step: u32) -> Self {
        self.counter[0] = step;
        self
    }

    /// The same family for another prompt (or row).
    pub fn prompt(mut self, prompt: u32) -> Self {
        self.counter[1] = prompt;
        self
    }

    /// The same family for another sample of the prompt.
    pub fn sample(mut self, sample: u32) -> Self {
        self.counter[2] = sample;
        self
    }

    /// The draw at `position`.
    // Inlined even into kernels that are compiled for other instruction sets than this crate.
    #[inline(always)]
    pub fn at(&self, position: u32) -> Draw {
        let [step, prompt, sample] = self.counter;
        Draw(philox4x32_10([position, sample, prompt, step], self.key))
    }

    /// The numbers `0..n` in random order (Fisher-Yates; the draw at position `i` places element `i`).
    pub fn permutation(&self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.at(i as u32).below(i as u64 + 1) as usize);
        }
        order
    }

    /// A standard normal value at `position` (Box-Muller on one draw).
    pub fn normal(&self, position: u32) -> f64 {
        let draw = self.at(position);
        let radius = (-2.0 * (1.0 - draw.uniform()).ln()).sqrt();
        let angle = std::f64::consts::TAU * (f64::from(draw.0[2]) / 4_294_967_296.0);
        radius * angle.cos()
    }
}

/// 128 random bits with views of them as numbers. Views overlap: take one view of a draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw(pub [u32; 4]);

impl Draw {
    /// 64 random bits.
    pub fn bits(&self) -> u64 {
        u64::from(self.0[0]) << 32 | u64::from(self.0[1])
    }

    /// Uniform in `[0, 1)`, with 53 random bits.
    pub fn uniform(&self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`; `n` must be positive. The bias is below `n / 2^64`.
    pub fn below(&self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// Uniform in `low..=high`.
    pub fn between(&self, low: i64, high: i64) -> i64 {
        low + self.below((high - low) as u64 + 1) as i64
    }
}

/// SplitMix64's output function: spreads a seed's bits over a word.
fn split_mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Philox4x32 with ten rounds.
#[inline(always)]
fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xd251_1f53;
        let b = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with Random123 (kat_vectors, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32_10([0xffff_ffff; 4], [0xffff_ffff; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_draw_depends_on_every_part_of_its_name() {
        let base = Random::new(1, Purpose::Sampling);
        let names = [
            base.at(0),
            base.at(1),
            base.step(1).at(0),
            base.prompt(1).at(0),
            base.sample(1).at(0),
            Random::new(2, Purpose::Sampling).at(0),
            Random::new(1, Purpose::Shuffle).at(0),
        ];
        for (i, a) in names.iter().enumerate() {
            for b in &names[..i] {
                assert_ne!(a, b);
            }
        }
    }

    #[test]
    fn moments_of_uniform_and_normal() {
        let random = Random::new(7, Purpose::Test);
        let n = 100_000;
        let mean = (0..n).map(|i| random.at(i).uniform()).sum::<f64>() / f64::from(n);
        assert!((mean - 0.5).abs() < 5e-3, "{mean}");
        let normals: Vec<f64> = (0..n).map(|i| random.normal(i)).collect();
        let mean = normals.iter().sum::<f64>() / f64::from(n);
        let variance = normals.iter().map(|x| x * x).sum::<f64>() / f64::from(n);
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
    }

    #[test]
    fn permutation_is_a_permutation() {
        let mut order = Random::new(3, Purpose::Shuffle).permutation(1000);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }
}
