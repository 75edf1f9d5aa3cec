//! Memory, counted by the allocator: a long run needs no more than a short one, saving copies nothing, gradients accumulate
//! where they are, and what is said to save memory does.
//!
//! The tests take turns, so that nothing else allocates meanwhile.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

#[allow(dead_code, reason = "this file uses a part of the world")]
mod common;

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use common::Setup;
use model::ModelConfig;
use model::config::Family;
use model::decoder::Decoder;
use peak_alloc::PeakAlloc;
use posttrain_train as train;
use train::methods::sft::SftOptions;
use train::options::{GradientCheckpointing, OptimizerState, TrainingOptions};
use train::{Event, Observer};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

static TURN: Mutex<()> = Mutex::new(());

/// Bytes in use after each step and, where one was saved after a step, the most that were in use on the way there.
#[derive(Default)]
struct Watch {
    used: Vec<usize>,
    saving: Vec<usize>,
}

impl Observer for Watch {
    fn observe(&mut self, event: Event<'_>) {
        match event {
            Event::Step { .. } => {
                self.used.push(ALLOCATOR.current_usage());
                ALLOCATOR.reset_peak_usage();
            }
            Event::Saved { .. } => self.saving.push(ALLOCATOR.peak_usage() - self.used[self.used.len() - 1]),
            _ => {}
        }
    }
}

#[test]
fn memory_stays_flat_and_saving_copies_nothing() {
    const STEPS: u64 = 120;
    let _turn = TURN.lock().unwrap();
    let mut setup = Setup { sft: None, evaluate: false, ..Setup::short() };
    let grpo = setup.grpo.as_mut().unwrap();
    (grpo.num_iterations, grpo.num_minibatches, grpo.training.max_steps) = (1, 1, Some(STEPS));
    setup.options.save_steps = 20;
    // Large enough for a copy of its weights to stand out from what else saving needs.
    let config = ModelConfig { vocab_size: 30_000, ..ModelConfig::tiny(Family::Llama, 259) };
    let decoder = Decoder::random(config, 1).unwrap();
    let weights: usize = decoder.parameters().iter().map(|info| 4 * info.range.len()).sum();
    let folder = tempfile::tempdir().unwrap();
    let mut watch = Watch::default();
    setup.run_from(decoder, &folder.path().join("run"), false, &mut watch, &AtomicBool::new(false)).unwrap();

    assert_eq!(watch.used.len(), STEPS as usize);
    let most = |steps: &[usize]| *steps.iter().max().unwrap();
    let (early, late) = (most(&watch.used[..20]), most(&watch.used[20..]));
    println!("{early} bytes after the first 20 steps, {late} after the others; saving: {:?}", watch.saving);
    assert!(late <= early + early / 100, "{early} bytes in use after the first 20 steps, {late} after the others");
    let saving = most(&watch.saving);
    assert!(saving < weights / 2, "saving took {saving} bytes more; the weights are {weights}");
}

/// The most bytes in use during the later steps of supervised training beyond those before the run.
#[derive(Default)]
struct Peak(usize);

impl Observer for Peak {
    fn observe(&mut self, event: Event<'_>) {
        if let Event::Step { step, .. } = event {
            if step > 1 {
                self.0 = self.0.max(ALLOCATOR.peak_usage());
            }
            ALLOCATOR.reset_peak_usage();
        }
    }
}

fn training_peak(config: &ModelConfig, training: TrainingOptions) -> usize {
    let training = TrainingOptions { max_steps: Some(4), ..training };
    let sft = SftOptions { batch_size: 64, training, ..SftOptions::default() };
    let mut setup = Setup { sft: Some(sft), grpo: None, evaluate: false, ..Setup::short() };
    setup.options.save_steps = 0;
    let decoder = Decoder::random(config.clone(), 1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let before = ALLOCATOR.current_usage();
    let mut peak = Peak::default();
    setup.run_from(decoder, &folder.path().join("run"), false, &mut peak, &AtomicBool::new(false)).unwrap();
    peak.0 - before
}

#[test]
fn a_step_takes_what_it_is_said_to_take() {
    let _turn = TURN.lock().unwrap();
    // Weights that stand out from activations. Beside them there are gradients and two moments; gathering gradients over
    // pieces and packing weights as they are used take no other copy.
    let wide = ModelConfig { vocab_size: 30_000, ..ModelConfig::tiny(Family::Llama, 259) };
    let weights = 4 * wide.parameter_count();
    let pieces = TrainingOptions { micro_batch_tokens: 16, ..Default::default() };
    // The kernels' scratch memory, which stays.
    training_peak(&wide, pieces.clone());
    let single = training_peak(&wide, pieces.clone());
    println!("weights {weights}, a step in pieces {single}");
    assert!(single < 3 * weights + weights / 2, "a step takes {single} bytes, the weights are {weights}");
    let half = training_peak(&wide, TrainingOptions { optimizer_state: OptimizerState::Bf16, ..pieces });
    let saved = single - half;
    assert!(saved.abs_diff(weights) < weights / 10, "moments in bf16 save {saved} bytes, the weights are {weights}");

    // Activations that stand out from weights.
    let mut deep = ModelConfig::tiny(Family::Llama, 259);
    deep.layers = vec![deep.layers[0]; 24];
    let keep = |gradient_checkpointing| TrainingOptions { gradient_checkpointing, ..Default::default() };
    let kept = training_peak(&deep, keep(GradientCheckpointing::Off));
    let checkpointed = training_peak(&deep, keep(GradientCheckpointing::On));
    println!("a step of a deep model {kept}, checkpointed {checkpointed}");
    assert!(3 * checkpointed < 2 * kept, "{checkpointed} bytes with checkpointing, {kept} without");
}
