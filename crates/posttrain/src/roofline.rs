//! Each phase of training and of generation beside what this machine could do at best.
//!
//! A phase has work that its shapes dictate: floating-point operations of matrix products and of attention, and bytes that
//! must come from or go to memory at least once (weights, kept activations, gradients, moments, key-value cache; what fits
//! into the caches of a large machine may beat that). Its *bound* is the time of the work at the machine's peak, or of the bytes at the machine's bandwidth, whichever is longer.

use std::time::Instant;

use base::{Purpose, Random};
use kernels::{Isa, Precision, Profile, Profiler, bandwidth, matrix_peak};
use model::decoder::{Decoder, Estimate, Gradients, PackedTokens, Target, Workspace};
use model::tokenizer::Tokenizer;
use model::{ModelConfig, lora::LoraConfig};
use rollout::{Generator, Request, SamplingOptions};
use serde::Serialize;
use train::optimizer::{Optimizer, gradient_norm};
use train::options::TrainingOptions;

use crate::failure::Failure;

/// What to measure.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sizes {
    /// Sequences of a training step.
    pub batch: usize,
    /// Tokens of each.
    pub length: usize,
    /// Sequences generated at once.
    pub decode_batch: usize,
    /// Tokens of their prompts.
    pub prompt: usize,
    /// Tokens generated for each.
    pub new_tokens: usize,
    /// Measurements of each phase, after one for warming up.
    pub repeats: usize,
}

/// What the machine can do at best, on the threads in use.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Machine {
    /// Highest rate of multiply-adds with f32 operands, in operations a second.
    pub f32_peak: f64,
    /// The same with bf16 operands.
    pub bf16_peak: f64,
    /// Highest rate of reading memory, in bytes a second.
    pub read_bandwidth: f64,
    /// Highest rate of changing memory in place, bytes read and bytes written together.
    pub update_bandwidth: f64,
}

impl Machine {
    /// Measures it, which takes a few tenths of a second.
    pub fn measure() -> Self {
        let memory = bandwidth();
        Self {
            f32_peak: matrix_peak(Precision::F32),
            bf16_peak: matrix_peak(Precision::Bf16),
            read_bandwidth: memory.read,
            update_bandwidth: memory.update,
        }
    }

    /// The better of two measurements in each respect: what else runs on a machine only ever slows it down.
    fn or_better(self, other: Self) -> Self {
        Self {
            f32_peak: self.f32_peak.max(other.f32_peak),
            bf16_peak: self.bf16_peak.max(other.bf16_peak),
            read_bandwidth: self.read_bandwidth.max(other.read_bandwidth),
            update_bandwidth: self.update_bandwidth.max(other.update_bandwidth),
        }
    }

    /// The matrix peak of a precision.
    pub fn peak(&self, precision: Precision) -> f64 {
        match precision {
            Precision::F32 => self.f32_peak,
            Precision::Bf16 => self.bf16_peak,
        }
    }

    /// The least time that these bytes need on their way, in seconds.
    fn memory_seconds(&self, moved: Traffic) -> f64 {
        let (read, all) = (moved.read as f64, moved.total());
        (read / self.read_bandwidth).max(all / self.read_bandwidth.max(self.update_bandwidth))
    }
}

/// Bytes between memory and processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// To the processor.
    pub read: usize,
    /// From the processor.
    pub written: usize,
}

impl Traffic {
    /// All of them.
    pub fn total(&self) -> f64 {
        (self.read + self.written) as f64
    }
}

/// Which end of the roofline a phase hangs from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// The rate of multiply-adds.
    Compute,
    /// The rate of memory.
    Memory,
}

/// One phase: what it took, and what its work would take at best.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// Its name.
    pub name: &'static str,
    /// Its time, in seconds; the median.
    pub seconds: f64,
    /// Operations of its matrix products, counted from the shapes of those that ran.
    pub product_operations: f64,
    /// Operations of its attention, from the shapes.
    pub attention_operations: f64,
    /// Bytes that must move between memory and processor.
    pub bytes: Traffic,
    /// Seconds inside matrix products; the median.
    pub product_seconds: f64,
    /// Seconds inside attention; the median.
    pub attention_seconds: f64,
    /// What the work takes at least on this machine, in seconds.
    pub bound_seconds: f64,
    /// What binds it.
    pub limit: Limit,
}

impl Phase {
    /// The share of the bound that was achieved.
    pub fn achieved(&self) -> f64 {
        self.bound_seconds / self.seconds
    }

    /// Operations a second inside matrix products; `None` without products.
    pub fn product_rate(&self) -> Option<f64> {
        (self.product_operations > 0.0).then(|| self.product_operations / self.product_seconds)
    }
}

/// Every phase of one model on one machine.
#[derive(Clone, Debug, Serialize)]
pub struct Roofline {
    /// The sizes of the work.
    pub sizes: Sizes,
    /// The number format of the products, `f32` or `bf16`.
    pub precision: String,
    /// Whether an adapter is trained instead of the weights.
    pub lora: bool,
    /// Weights of the model.
    pub parameters: usize,
    /// The instruction set.
    pub kernels: String,
    /// Threads computing.
    pub threads: usize,
    /// The machine.
    pub machine: Machine,
    /// The phases of a training step, in order.
    pub training: Vec<Phase>,
    /// Prompts into the cache, and one round of generation: a token for each sequence.
    pub generation: Vec<Phase>,
    /// Tokens a second of whole training steps.
    pub training_tokens_per_second: f64,
    /// Tokens a second of decoding.
    pub decode_tokens_per_second: f64,
    /// Rate inside the products of a training step, relative to the matrix peak.
    pub products_of_peak: f64,
    /// Share of a training step that is inside products.
    pub products_of_step: f64,
    /// Share of its bound that decoding achieves.
    pub decode_of_bound: f64,
    /// The largest memory of the process so far, in bytes, where the system tells.
    pub peak_memory_bytes: Option<u64>,
}

/// The times of one phase over the repeats.
struct Measured {
    name: &'static str,
    seconds: Vec<f64>,
    profiles: Vec<Profile>,
}

impl Measured {
    fn new(name: &'static str) -> Self {
        Self { name, seconds: Vec::new(), profiles: Vec::new() }
    }

    fn time<R>(&mut self, work: impl FnOnce() -> R) -> R {
        let (profiler, start) = (Profiler::start(), Instant::now());
        let result = work();
        self.push(start.elapsed().as_secs_f64(), profiler.read(), 1.0);
        result
    }

    /// One measurement of `parts` equal parts, of which one counts.
    fn push(&mut self, seconds: f64, mut profile: Profile, parts: f64) {
        for share in [&mut profile.products, &mut profile.attention] {
            share.seconds /= parts;
            share.operations /= parts;
        }
        self.seconds.push(seconds / parts);
        self.profiles.push(profile);
    }

    /// Drops the measurement of the warming up.
    fn forget_first(&mut self) {
        self.seconds.remove(0);
        self.profiles.remove(0);
    }

    fn phase(&self, machine: &Machine, precision: Precision, attention_operations: f64, bytes: Traffic) -> Phase {
        let profiles = |value: fn(&Profile) -> f64| median(self.profiles.iter().map(value).collect());
        let product_operations = profiles(|profile| profile.products.operations);
        // Attention is f32 whatever the precision of the products.
        let compute = product_operations / machine.peak(precision) + attention_operations / machine.f32_peak;
        let memory = machine.memory_seconds(bytes);
        Phase {
            name: self.name,
            seconds: median(self.seconds.clone()),
            product_operations,
            attention_operations,
            bytes,
            product_seconds: profiles(|profile| profile.products.seconds),
            attention_seconds: profiles(|profile| profile.attention.seconds),
            bound_seconds: compute.max(memory),
            limit: if compute >= memory { Limit::Compute } else { Limit::Memory },
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// Measures every phase of `decoder`, whose weights, or adapter if there is one, are trained for as many steps as there are measurements.
///
/// # Errors
/// Sizes that the model's context does not hold, and numbers that overflow.
pub fn measure(
    decoder: &mut Decoder,
    tokenizer: &Tokenizer,
    precision: Precision,
    sizes: Sizes,
    mut note: impl FnMut(&str),
) -> Result<Roofline, Failure> {
    let context = decoder.config().max_positions;
    for (what, tokens) in [("--length", sizes.length), ("--prompt and --new-tokens", sizes.prompt + sizes.new_tokens)] {
        if tokens > context {
            return Err(Failure::usage(format!("{what}: {tokens} tokens do not fit the model's context of {context}")));
        }
    }
    note("measuring the machine");
    let before = Machine::measure();
    note("measuring training");
    let training = measure_training(decoder, precision, sizes)?;
    note("measuring generation");
    let generation = measure_generation(decoder, tokenizer, sizes)?;
    let machine = before.or_better(Machine::measure());

    let (config, lora) = (decoder.config(), decoder.adapter_config());
    let moved = Moved::new(config, lora, precision, sizes);
    let attention = attention_operations(config, 0, sizes.length) * sizes.batch as f64;
    let prefill = attention_operations(config, 0, sizes.prompt) * sizes.decode_batch as f64;
    let decode = attention_operations(config, sizes.prompt, sizes.new_tokens) * sizes.decode_batch as f64
        / sizes.new_tokens as f64;
    // Backward computes the scores again, then a gradient for each of the four operands of the two products.
    let work =
        [(0.0, moved.prepare), (attention, moved.forward), (2.5 * attention, moved.backward), (0.0, moved.update)];
    let training: Vec<Phase> =
        training.iter().zip(work).map(|(phase, (ops, bytes))| phase.phase(&machine, precision, ops, bytes)).collect();
    let work = [(prefill, moved.prefill), (decode, moved.decode)];
    let generation: Vec<Phase> =
        generation.iter().zip(work).map(|(phase, (ops, bytes))| phase.phase(&machine, precision, ops, bytes)).collect();

    let total = |value: fn(&Phase) -> f64| training.iter().map(value).sum::<f64>();
    let (seconds, product_seconds) = (total(|phase| phase.seconds), total(|phase| phase.product_seconds));
    let product_rate = total(|phase| phase.product_operations) / product_seconds;
    let decode = &generation[1];
    Ok(Roofline {
        sizes,
        precision: match precision {
            Precision::F32 => "f32".to_owned(),
            Precision::Bf16 => "bf16".to_owned(),
        },
        lora: lora.is_some(),
        parameters: config.parameter_count(),
        kernels: Isa::current().to_string(),
        threads: rayon::current_num_threads(),
        machine,
        training_tokens_per_second: (sizes.batch * sizes.length) as f64 / seconds,
        decode_tokens_per_second: sizes.decode_batch as f64 / decode.seconds,
        products_of_peak: product_rate / machine.peak(precision),
        products_of_step: product_seconds / seconds,
        decode_of_bound: decode.achieved(),
        peak_memory_bytes: train::timing::peak_memory_bytes(),
        training,
        generation,
    })
}

fn random_ids(config: &ModelConfig, name: usize, count: usize) -> Vec<u32> {
    let random = Random::new(2, Purpose::Test).step(name as u32);
    (0..count).map(|position| random.at(position as u32).below(config.vocab_size as u64) as u32).collect()
}

/// Packing, forward, backward and update of supervised steps over random tokens.
fn measure_training(decoder: &mut Decoder, precision: Precision, sizes: Sizes) -> Result<[Measured; 4], Failure> {
    let Sizes { batch, length, repeats, .. } = sizes;
    let mut phases = ["prepare", "forward", "backward", "optimiser"].map(Measured::new);
    let [prepare, forward, backward, update] = &mut phases;
    let options = TrainingOptions::default();
    let mut optimizer = Optimizer::new(&options, decoder, Random::new(2, Purpose::Rounding));
    let mut workspace = Workspace::new();
    let mut gradients: Gradients = decoder.gradients();
    for step in 0..=repeats {
        let mut tokens = PackedTokens::new();
        let mut targets = Vec::new();
        for sequence in 0..batch {
            let ids = random_ids(decoder.config(), step * batch + sequence, length);
            let index = tokens.push(&ids, None)?;
            let first = tokens.segments()[index].start;
            targets.extend(ids[1..].iter().enumerate().map(|(row, &token)| Target { row: first + row, token }));
        }
        let d_log_prob = vec![-1.0 / targets.len() as f32; targets.len()];
        prepare.time(|| decoder.prepare(precision));
        forward.time(|| decoder.forward(&tokens, &mut workspace, true))?;
        backward.time(|| {
            let result = decoder.backward(&tokens, &mut workspace, &targets, 1.0, &d_log_prob, None, &mut gradients);
            gradients.finish();
            result
        })?;
        update.time(|| {
            let norm = gradient_norm(decoder, &gradients);
            optimizer.update(decoder, &gradients, norm, options.learning_rate);
            gradients.clear();
        });
    }
    decoder.prepare(precision);
    phases.iter_mut().for_each(Measured::forget_first);
    Ok(phases)
}

/// Prefill of all prompts, and the mean round of generation.
fn measure_generation(decoder: &Decoder, tokenizer: &Tokenizer, sizes: Sizes) -> Result<[Measured; 2], Failure> {
    let Sizes { decode_batch, prompt, new_tokens, repeats, .. } = sizes;
    let mut phases = ["prefill", "decode"].map(Measured::new);
    let [prefill, decode] = &mut phases;
    let mut workspace = Workspace::new();
    let options = SamplingOptions {
        temperature: 1.0,
        min_new_tokens: new_tokens,
        max_new_tokens: new_tokens,
        ..SamplingOptions::default()
    };
    for repeat in 0..=repeats {
        let prompts: Vec<Vec<u32>> =
            (0..decode_batch).map(|i| random_ids(decoder.config(), repeat * decode_batch + i, prompt)).collect();
        let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        prefill.time(|| decoder.prefill(&slices, &mut workspace))?;

        let requests: Vec<Request> = prompts
            .into_iter()
            .enumerate()
            .flat_map(|(index, prompt)| Request::samples(index as u32, &prompt.into(), 1).collect::<Vec<_>>())
            .collect();
        let generator = Generator::new(&options, decode_batch, Random::new(3, Purpose::Sampling).step(repeat as u32));
        // The first round computes the prompts too, and the last feeds no token to the decoder: those between count.
        let mut round = 0;
        let mut started = None;
        generator.generate(decoder, tokenizer, &requests, |_| {
            round += 1;
            if round == 1 {
                started = Some((Profiler::start(), Instant::now()));
            } else if round + 1 == new_tokens
                && let Some((profiler, start)) = started.take()
            {
                decode.push(start.elapsed().as_secs_f64(), profiler.read(), (new_tokens - 2) as f64);
            }
        })?;
    }
    phases.iter_mut().for_each(Measured::forget_first);
    Ok(phases)
}

/// Operations of attention's two products for one sequence of `new` tokens after `before` others, in all layers.
fn attention_operations(config: &ModelConfig, before: usize, new: usize) -> f64 {
    let visible = |window: Option<usize>| -> usize {
        (before + 1..=before + new).map(|seen| window.map_or(seen, |window| seen.min(window))).sum()
    };
    config.layers.iter().map(|layer| (4 * config.q_size() * visible(layer.window)) as f64).sum()
}

/// What each phase must move at least once between memory and processor.
struct Moved {
    prepare: Traffic,
    forward: Traffic,
    backward: Traffic,
    update: Traffic,
    prefill: Traffic,
    decode: Traffic,
}

impl Moved {
    fn new(config: &ModelConfig, lora: Option<&LoraConfig>, precision: Precision, sizes: Sizes) -> Self {
        let here = Estimate::new(config, lora, precision, sizes.batch * sizes.length, sizes.length);
        let element = match precision {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        };
        // Weights that are in products, those that are packed again after an update, those that are trained.
        let in_products = here.packed / element;
        let trained = here.gradients / 4;
        let repacked = if lora.is_some() { trained } else { in_products };
        let packed_head = element * config.vocab_size * config.hidden_size;
        let cached = |tokens: usize| sizes.decode_batch * tokens * here.cache_per_token;
        Self {
            prepare: Traffic { read: 4 * repacked, written: element * repacked },
            forward: Traffic { read: here.packed - packed_head, written: here.activations },
            // The head again, the weights unpacked, what forward kept; gradients are added to.
            backward: Traffic {
                read: packed_head + 4 * in_products + here.activations + here.gradients,
                written: here.gradients,
            },
            // The gradient for its norm, again for the update, and cleared; weights and moments are changed.
            update: Traffic {
                read: 2 * here.gradients + 4 * trained + 2 * 4 * trained,
                written: here.gradients + 4 * trained + 2 * 4 * trained,
            },
            prefill: Traffic { read: here.packed - packed_head, written: cached(sizes.prompt) },
            // Half of the new tokens are in the cache on average.
            decode: Traffic { read: here.packed + cached(sizes.prompt + sizes.new_tokens / 2), written: cached(1) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_is_counted_pair_by_pair() {
        let mut config = ModelConfig::smollm2_135m();
        let one_pair = (4 * config.q_size() * config.layer_count()) as f64;
        assert_eq!(attention_operations(&config, 0, 4), 10.0 * one_pair);
        assert_eq!(attention_operations(&config, 3, 1), 4.0 * one_pair);
        for layer in &mut config.layers {
            layer.window = Some(2);
        }
        assert_eq!(attention_operations(&config, 0, 4), 7.0 * one_pair);
    }

    #[test]
    fn the_longer_of_two_bounds_binds() {
        let machine = Machine { f32_peak: 1e9, bf16_peak: 2e9, read_bandwidth: 1e8, update_bandwidth: 2e8 };
        let mut measured = Measured::new("phase");
        let mut profile = Profile::default();
        profile.products.operations = 4e9;
        measured.push(8.0, profile, 1.0);
        let phase = measured.phase(&machine, Precision::Bf16, 1e9, Traffic { read: 100, written: 100 });
        assert_eq!((phase.bound_seconds, phase.limit), (3.0, Limit::Compute));
        assert_eq!(phase.achieved(), 3.0 / 8.0);
        let phase = measured.phase(&machine, Precision::Bf16, 1e9, Traffic { read: 400_000_000, written: 0 });
        assert_eq!((phase.bound_seconds, phase.limit), (4.0, Limit::Memory));
        let phase = measured.phase(&machine, Precision::Bf16, 1e9, Traffic { read: 500_000_000, written: 900_000_000 });
        assert_eq!((phase.bound_seconds, phase.limit), (7.0, Limit::Memory));
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
    }
}
