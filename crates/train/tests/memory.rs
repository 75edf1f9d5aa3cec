//! Memory, counted by the allocator: a long run needs no more than a short one, and saving copies nothing.
//!
//! One test, alone in its process, so that nothing else allocates meanwhile.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod common;

use std::sync::atomic::AtomicBool;

use common::Setup;
use model::ModelConfig;
use model::config::Family;
use model::decoder::Decoder;
use peak_alloc::PeakAlloc;
use posttrain_train as train;
use train::{Event, Observer};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

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
