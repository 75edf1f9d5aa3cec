//! Whole runs on a device of candle's, here its processor, beside the engine's.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::Device;
use kernels::Precision;
use model::DeviceName;
use model::config::Family;
use posttrain_train as train;
use serde_json::{Map, Value};
use train::{Event, Observer, Outcome};

use crate::common::{Setup, assert_same, metrics};

/// Candle's processor, or what `POSTTRAIN_TEST_DEVICE` names.
fn device() -> Device {
    let name = std::env::var("POSTTRAIN_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
    name.parse::<DeviceName>().unwrap().open().unwrap().unwrap_or(Device::Cpu)
}

fn run(setup: &Setup, folder: &Path, resume: bool, observer: &mut dyn Observer, stop: &AtomicBool) -> Outcome {
    let mut decoder = setup.decoder();
    decoder.to_device(&device()).unwrap();
    setup.run_from(decoder, folder, resume, observer, stop).unwrap()
}

fn number(line: &Map<String, Value>, name: &str) -> f64 {
    line[name].as_f64().unwrap()
}

/// Three steps by example, then three by scores, with a reference model, two passes and two minibatches each.
#[test]
fn a_run_follows_the_engines() {
    for (family, lora) in [(Family::Llama, false), (Family::Gemma3, true)] {
        let setup = Setup { family, lora, ..Setup::short() };
        let folder = tempfile::tempdir().unwrap();
        let (engine, device) = (folder.path().join("engine"), folder.path().join("device"));
        setup.finish(&engine);
        run(&setup, &device, false, &mut (), &AtomicBool::new(false));
        let steps = |path: &Path| -> Vec<Map<String, Value>> {
            metrics(path).into_iter().filter(|line| line.contains_key("loss")).collect()
        };
        let (expected, found) = (steps(&engine), steps(&device));
        assert_eq!((expected.len(), found.len()), (6, 6));
        for (found, expected) in found.iter().zip(&expected) {
            let off = |name: &str| (number(found, name) - number(expected, name)).abs();
            let step = &found["step"];
            match found.get("reward") {
                None => {
                    assert!(off("loss") < 1e-4 * number(expected, "loss"), "{family}, step {step}");
                    assert!(off("grad_norm") < 1e-3 * number(expected, "grad_norm"), "{family}, step {step}");
                }
                Some(_) => {
                    // The sampler's log-probabilities are the trainer's within rounding, which is measured and corrected.
                    let difference = number(found, "sampling/sampling_logp_difference/max");
                    assert!(difference < 1e-4, "{family}, step {step}: {difference}");
                    for kind in ["min", "mean", "max"] {
                        let ratio = number(found, &format!("sampling/importance_sampling_ratio/{kind}"));
                        assert!((ratio - 1.0).abs() < 1e-4, "{family}, step {step}: {ratio}");
                    }
                    // Once weights differ in their last digits, so may a token, and the means over a few dozen of them.
                    for name in ["entropy", "completions/mean_length"] {
                        let (found, expected) = (number(found, name), number(expected, name));
                        assert!(
                            (found / expected - 1.0).abs() < 0.1,
                            "{family}, step {step}, {name}: {found}, {expected}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn examples_teach_as_much() {
    for precision in [Precision::F32, Precision::Bf16] {
        let mut setup = Setup { grpo: None, evaluate: false, precision, ..Setup::short() };
        let training = &mut setup.sft.as_mut().unwrap().training;
        training.max_steps = Some(30);
        training.gradient_checkpointing = train::options::GradientCheckpointing::On;
        let folder = tempfile::tempdir().unwrap();
        let (engine, device) = (folder.path().join("engine"), folder.path().join("device"));
        setup.finish(&engine);
        run(&setup, &device, false, &mut (), &AtomicBool::new(false));
        let losses = |path: &Path| -> Vec<f64> { metrics(path).iter().map(|line| number(line, "loss")).collect() };
        let (expected, found) = (losses(&engine), losses(&device));
        println!("{precision:?}: from {} to {} on the engine, {} on the device", expected[0], expected[29], found[29]);
        assert!(expected[29] < 0.7 * expected[0] && (found[29] / expected[29] - 1.0).abs() < 0.05);
    }
}

/// Stops the run after its fourth step.
struct Stop<'a>(&'a AtomicBool);

impl Observer for Stop<'_> {
    fn observe(&mut self, event: Event<'_>) {
        if let Event::Step { step: 4, .. } = event {
            self.0.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }
}

/// As far as the device repeats itself, which candle's processor does, a run repeats and resumes to the same bytes.
#[test]
fn a_run_repeats_and_resumes() {
    let setup = Setup::short();
    let folder = tempfile::tempdir().unwrap();
    let [once, again] = ["once", "again"].map(|name| folder.path().join(name));
    run(&setup, &once, false, &mut (), &AtomicBool::new(false));
    let stop = AtomicBool::new(false);
    let outcome = run(&setup, &again, false, &mut Stop(&stop), &stop);
    assert_eq!(outcome, Outcome::Interrupted { step: 4 });
    run(&setup, &again, true, &mut (), &AtomicBool::new(false));
    assert_same(&once, &again, "interrupted and resumed");
}
