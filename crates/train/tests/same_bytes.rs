//! The same run gives the same bytes, however the work is cut and shared out, and however often it is stopped.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use base::Hint;
use base::files::{self, Manifest};
use kernels::Precision;
use model::config::Family;
use model::decoder::WeightFormat;
use posttrain_train as train;
use train::methods::policy::Policy;
use train::options::{GradientCheckpointing, OptimizerState};
use train::{Error, Event, Fit, Observer, Outcome};

use crate::common::{self, Setup, StopAt, assert_same, metrics, on_threads};

/// The cuts that must not matter: pieces of a batch, sequences decoded at once, threads.
fn check_cuts(setup: &Setup) {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    on_threads(2, || setup.finish(&whole));
    for (micro_batch_tokens, decode_batch_size, threads) in [(1, 1, 1), (64, 5, 2), (100_000, 64, 1)] {
        let mut cut = setup.clone();
        cut.trainings_mut().for_each(|training| training.micro_batch_tokens = micro_batch_tokens);
        cut.grpo.as_mut().unwrap().decode_batch_size = decode_batch_size;
        let other = folder.path().join(format!("cut-{micro_batch_tokens}"));
        on_threads(threads, || cut.finish(&other));
        assert_same(
            &whole,
            &other,
            &format!("{micro_batch_tokens} tokens, {decode_batch_size} decoded, {threads} threads"),
        );
    }
}

#[test]
fn cuts_and_threads_do_not_matter_in_f32() {
    check_cuts(&Setup::short());
}

#[test]
fn cuts_and_threads_do_not_matter_in_bf16() {
    let mut setup = Setup { precision: Precision::Bf16, ..Setup::short() };
    setup.trainings_mut().for_each(|training| training.optimizer_state = OptimizerState::Bf16);
    check_cuts(&setup);
}

#[test]
fn cuts_and_threads_do_not_matter_with_an_adapter() {
    check_cuts(&Setup { precision: Precision::Bf16, lora: true, ..Setup::short() });
}

#[test]
fn a_stage_in_memory_is_the_stage_of_a_run() {
    let setup = Setup { sft: None, ..Setup::short() };
    let folder = tempfile::tempdir().unwrap();
    let (on_disk, in_memory) = (folder.path().join("run"), folder.path().join("memory"));
    setup.finish(&on_disk);
    let (mut decoder, tokenizer) = (setup.decoder(), common::tokenizer());
    let mut method = Policy::new(setup.grpo.clone().unwrap(), common::prompts(), (setup.reward)()).unwrap();
    let fit =
        Fit { decoder: &mut decoder, tokenizer: &tokenizer, seed: setup.seed, stage: 0, precision: setup.precision };
    let mut losses = Vec::new();
    train::fit(&mut method, fit, |_, _, metrics| {
        losses.extend(metrics.get("loss"));
        Ok::<(), Error>(())
    })
    .unwrap();
    let logged: Vec<f64> = metrics(&on_disk).iter().filter_map(|line| line.get("loss")?.as_f64()).collect();
    assert_eq!((losses.len(), &losses), (3, &logged));
    std::fs::create_dir_all(&in_memory).unwrap();
    train::artefact::write(&in_memory, &decoder, &tokenizer, None, "tiny").unwrap();
    let weights = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    assert!(weights(&in_memory) == weights(&on_disk.join("final")));
}

#[test]
fn activation_checkpointing_does_not_matter() {
    // Gemma 3 has norms after its sublayers too; the stages differ in what they keep.
    let f32 = Setup { family: Family::Gemma3, ..Setup::short() };
    let adapter = Setup { precision: Precision::Bf16, lora: true, ..Setup::short() };
    for (name, setup) in [("f32", f32), ("bf16 with an adapter", adapter)] {
        let folder = tempfile::tempdir().unwrap();
        let kept = folder.path().join("kept");
        setup.finish(&kept);
        for (sft, grpo) in [(true, true), (false, true)] {
            let choice = |on| if on { GradientCheckpointing::On } else { GradientCheckpointing::Off };
            let mut other = setup.clone();
            other.sft.as_mut().unwrap().training.gradient_checkpointing = choice(sft);
            other.grpo.as_mut().unwrap().training.gradient_checkpointing = choice(grpo);
            let path = folder.path().join(format!("{sft}-{grpo}"));
            other.finish(&path);
            assert_same(&kept, &path, &format!("{name}: sft {sft}, grpo {grpo}"));
        }
    }
}

#[test]
fn cuts_and_threads_do_not_matter_with_int8_rollouts() {
    let mut setup = Setup { precision: Precision::Bf16, ..Setup::short() };
    setup.grpo.as_mut().unwrap().rollout_weights = WeightFormat::Int8;
    check_cuts(&setup);
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    let rounded = {
        let mut setup = Setup::short();
        setup.trainings_mut().for_each(|training| training.optimizer_state = OptimizerState::Bf16);
        setup
    };
    for setup in [Setup::short(), Setup { lora: true, ..Setup::short() }, rounded] {
        let folder = tempfile::tempdir().unwrap();
        let whole = folder.path().join("whole");
        setup.finish(&whole);
        let stopped = folder.path().join("stopped");
        for step in 1..=5 {
            let stop = AtomicBool::new(false);
            let outcome = setup.run(&stopped, step > 1, &mut StopAt(step, &stop), &stop).unwrap();
            assert_eq!(outcome, Outcome::Interrupted { step });
            assert!(stopped.join(format!("checkpoint-{step}")).is_dir());
        }
        let outcome = setup.run(&stopped, true, &mut (), &AtomicBool::new(false)).unwrap();
        assert!(matches!(outcome, Outcome::Finished(_)));
        assert_same(&whole, &stopped, "stopped after every step");
    }
}

#[test]
fn an_interruption_without_regular_checkpoints_leaves_no_trace() {
    let mut setup = Setup::short();
    setup.options.save_steps = 0;
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    setup.finish(&whole);
    let stopped = folder.path().join("stopped");
    let stop = AtomicBool::new(false);
    setup.run(&stopped, false, &mut StopAt(4, &stop), &stop).unwrap();
    setup.run(&stopped, true, &mut (), &AtomicBool::new(false)).unwrap();
    assert_same(&whole, &stopped, "stopped once");
}

/// Dies at one of the events.
struct DieAt(usize);

impl Observer for DieAt {
    fn observe(&mut self, _event: Event<'_>) {
        match self.0.checked_sub(1) {
            Some(left) => self.0 = left,
            // Unlike a panic, this prints nothing.
            None => resume_unwind(Box::new("death, as ordered")),
        }
    }
}

#[test]
fn a_run_that_dies_anywhere_resumes_to_the_same_bytes() {
    let setup = Setup::short();
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    setup.finish(&whole);

    let died = folder.path().join("died");
    let (mut deaths, mut events) = (0, 1);
    loop {
        let life = || setup.run(&died, died.exists(), &mut DieAt(events), &AtomicBool::new(false));
        match catch_unwind(AssertUnwindSafe(life)) {
            Ok(outcome) => {
                assert!(matches!(outcome.unwrap(), Outcome::Finished(_)));
                break;
            }
            Err(_) => {
                deaths += 1;
                events += 3;
                litter(&died);
            }
        }
    }
    assert!(deaths >= 10, "{deaths} deaths are not much of a test");
    assert_same(&whole, &died, "died again and again");
}

/// Leaves behind what a process may leave when it is killed in the middle of a write.
fn litter(folder: &Path) {
    for log in ["metrics.jsonl", "timing.jsonl"] {
        let mut text = std::fs::read(folder.join(log)).unwrap();
        text.extend(b"{\"step\": 3, \"lo");
        std::fs::write(folder.join(log), text).unwrap();
    }
    files::write(&folder.join(".checkpoint-9.partial/model.safetensors"), b"half").unwrap();
    files::write(&folder.join("episodes/.step-000009.parquet.partial"), b"half").unwrap();
    files::write(&folder.join("final/model.safetensors"), b"half").unwrap();
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_an_older_one() {
    let setup = Setup::short();
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    setup.finish(&whole);

    let damaged = folder.path().join("damaged");
    let stop = AtomicBool::new(false);
    setup.run(&damaged, false, &mut StopAt(4, &stop), &stop).unwrap();
    flip_a_bit(&damaged.join("checkpoint-4/model.safetensors"));
    let mut seen = Damages::default();
    setup.run(&damaged, true, &mut seen, &AtomicBool::new(false)).unwrap();
    assert_eq!(seen.0.len(), 1, "the damage is told");
    assert!(seen.0[0].contains("model.safetensors differs from its recorded hash"), "{:?}", seen.0);
    assert_same(&whole, &damaged, "resumed from an older checkpoint");
}

#[test]
fn damage_to_every_checkpoint_is_an_error() {
    let mut setup = Setup::short();
    setup.options.save_total_limit = 1;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let stop = AtomicBool::new(false);
    setup.run(&path, false, &mut StopAt(2, &stop), &stop).unwrap();
    for file in ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json"] {
        let file = path.join("checkpoint-2").join(file);
        let bytes = std::fs::read(&file).unwrap();
        flip_a_bit(&file);
        let error = setup.run(&path, true, &mut (), &AtomicBool::new(false)).unwrap_err();
        assert!(matches!(error, Error::File(files::FileError::Incomplete { .. })), "{error}");
        std::fs::write(&file, bytes).unwrap();
    }
    Manifest::verify(&path.join("checkpoint-2")).unwrap();
}

/// What cannot be read now may be readable again: it is not thrown away for something older.
#[test]
fn a_checkpoint_that_cannot_be_read_is_kept() {
    let setup = Setup::short();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let stop = AtomicBool::new(false);
    setup.run(&path, false, &mut StopAt(4, &stop), &stop).unwrap();
    let (manifest, away) = (path.join("checkpoint-4/manifest.json"), folder.path().join("manifest.json"));
    std::fs::rename(&manifest, &away).unwrap();
    std::fs::create_dir(&manifest).unwrap();
    let error = setup.run(&path, true, &mut (), &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(error, Error::File(files::FileError::Io { action: "read", .. })), "{error}");
    std::fs::remove_dir(&manifest).unwrap();
    std::fs::rename(&away, &manifest).unwrap();
    Manifest::verify(&path.join("checkpoint-4")).unwrap();
    let mut seen = Damages::default();
    setup.run(&path, true, &mut seen, &AtomicBool::new(false)).unwrap();
    assert!(seen.0.is_empty(), "{:?}", seen.0);
}

/// Without its metrics a run cannot go on, and loses nothing by the attempt; its events are made again from them.
#[test]
fn logs_that_were_removed_are_an_error_or_made_again() {
    let setup = Setup::short();
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    setup.finish(&whole);

    let path = folder.path().join("run");
    let stop = AtomicBool::new(false);
    setup.run(&path, false, &mut StopAt(4, &stop), &stop).unwrap();
    // A later step that a killed process had begun to write down.
    let (metrics, later) = (path.join("metrics.jsonl"), path.join("episodes/step-000005.parquet"));
    files::write(&later, b"x").unwrap();
    let text = std::fs::read(&metrics).unwrap();
    for left in [None, Some(100)] {
        match left {
            None => std::fs::remove_file(&metrics).unwrap(),
            Some(bytes) => std::fs::write(&metrics, &text[..bytes]).unwrap(),
        }
        let error = setup.run(&path, true, &mut (), &AtomicBool::new(false)).unwrap_err();
        let (found, expected) = (left.unwrap_or(0), text.len());
        let message = format!("has {found} bytes, expected at least the {expected} that the checkpoint was made with");
        assert!(error.to_string().ends_with(&message), "{error}");
        assert!(error.to_string().contains("metrics.jsonl"), "{error}");
        assert!(error.hint().unwrap().contains("trainer_state.json"));
        assert!(later.exists(), "nothing was removed");
    }
    // As the hint says.
    let state: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path.join("checkpoint-4/trainer_state.json")).unwrap()).unwrap();
    let lines: String = state["log_history"].as_array().unwrap().iter().map(|line| format!("{line}\n")).collect();
    assert_eq!(lines.as_bytes(), text);
    std::fs::write(&metrics, lines).unwrap();

    let events = path.join("runs").join(train::tensorboard::FILE_NAME);
    std::fs::write(&events, b"half").unwrap();
    let stop = AtomicBool::new(false);
    setup.run(&path, true, &mut StopAt(5, &stop), &stop).unwrap();
    std::fs::remove_file(&events).unwrap();
    setup.run(&path, true, &mut (), &AtomicBool::new(false)).unwrap();
    assert_same(&whole, &path, "resumed without events");
}

/// Steps are numbered in 32 bits.
#[test]
fn epochs_without_end_are_refused() {
    let mut setup = Setup { sft: None, ..Setup::short() };
    let training = &mut setup.grpo.as_mut().unwrap().training;
    (training.max_steps, training.num_train_epochs) = (None, 1e18);
    let folder = tempfile::tempdir().unwrap();
    let error = setup.run(&folder.path().join("run"), false, &mut (), &AtomicBool::new(false)).unwrap_err();
    let expected = "grpo.training.num_train_epochs: expected at most 4294967295 steps, which take 4 of 100 rows each, \
                    got 1000000000000000000 epochs";
    assert_eq!(error.to_string(), expected);
    let mut method = Policy::new(setup.grpo.clone().unwrap(), common::prompts(), (setup.reward)()).unwrap();
    let (mut decoder, tokenizer) = (setup.decoder(), common::tokenizer());
    let fit =
        Fit { decoder: &mut decoder, tokenizer: &tokenizer, seed: setup.seed, stage: 0, precision: setup.precision };
    let error = train::fit::<Error>(&mut method, fit, |_, _, _| Ok(())).unwrap_err();
    assert_eq!(error.to_string(), expected);
}

#[derive(Default)]
struct Damages(Vec<String>);

impl Observer for Damages {
    fn observe(&mut self, event: Event<'_>) {
        if let Event::Damaged { error } = event {
            self.0.push(error.to_string());
        }
    }
}

fn flip_a_bit(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_finished_run_is_left_alone() {
    let setup = Setup::short();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let summary = setup.finish(&path);
    let before = common::files(&path);
    let outcome = setup.run(&path, true, &mut (), &AtomicBool::new(false)).unwrap();
    assert_eq!(outcome, Outcome::Finished(Box::new(summary)));
    assert_eq!(before, common::files(&path));
    assert_eq!(metrics(&path).len(), 6 + 3, "six steps, three evaluations");
}
