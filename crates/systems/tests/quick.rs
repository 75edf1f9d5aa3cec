//! Every system in its shortest honest version: one seed, every arm, every measurement that a claim or a figure reads.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use posttrain_systems as systems;
use systems::reproduce::{Finished, by_seed};
use systems::settings::settings;
use systems::{Error, Event, Reproduction, SYSTEMS, System};

fn reproduction<'a>(
    system: &'static System,
    folder: &'a Path,
    workers: usize,
    interrupt: &'a AtomicBool,
) -> Reproduction<'a> {
    let arms = system.arms.iter().collect();
    Reproduction { system, settings: settings(system, true).unwrap(), arms, seeds: vec![0], folder, workers, interrupt }
}

fn run(system: &'static System, folder: &Path, workers: usize) -> Vec<Finished> {
    reproduction(system, folder, workers, &AtomicBool::new(false)).run(&|_| {}).unwrap()
}

/// What was measured, without how long it took.
fn measured(finished: &[Finished]) -> Vec<(String, &systems::Measurements)> {
    finished.iter().map(|trial| (trial.arm.clone(), &trial.measurements)).collect()
}

#[test]
fn every_claim_and_every_figure_finds_what_it_reads() {
    for system in SYSTEMS {
        let folder = tempfile::tempdir().unwrap();
        let started = Instant::now();
        let finished = run(system, folder.path(), 2);
        assert_eq!(finished.len(), system.arms.len(), "{}", system.name);
        // Two threads compute, and what they take is all that is counted: nothing twice, whoever else computes beside them.
        let seconds: f64 = finished.iter().map(|trial| trial.seconds).sum();
        assert!(seconds > 0.0 && seconds <= 2.0 * started.elapsed().as_secs_f64(), "{}: {seconds}", system.name);
        let seeds = by_seed(&finished);
        for claim in system.claims {
            assert!((claim.measure)(&seeds[0]).is_some(), "{}, claim {}: nothing is measured", system.name, claim.id);
        }
        for (figure, arm) in system.figures.iter().flat_map(|figure| figure.arms.iter().map(move |arm| (figure, arm))) {
            let points = seeds[0].arm(arm).and_then(|measured| measured.curves.get(figure.curve));
            assert!(points.is_some_and(|points| !points.is_empty()), "{}: {arm} has no {}", system.name, figure.curve);
        }
        // Finished trials are read, not run again.
        assert!(finished == run(system, folder.path(), 1), "{}", system.name);
    }
}

#[test]
fn an_interrupted_reproduction_goes_on_to_the_same_measurements() {
    let system = systems::find("par").unwrap();
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let interrupt = AtomicBool::new(false);
    // Stops in the middle of the third trial.
    let stop = |event| {
        if let Event::Step { step, .. } = event
            && step > 3
            && std::fs::read_dir(parts.path())
                .unwrap()
                .flatten()
                .any(|folder| std::fs::read_dir(folder.path()).unwrap().count() >= 2)
        {
            interrupt.store(true, Ordering::Relaxed);
        }
    };
    let stopped = reproduction(system, parts.path(), 1, &interrupt).run(&stop);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    let (finished, resumed) = (run(system, whole.path(), 2), run(system, parts.path(), 1));
    assert!(measured(&finished) == measured(&resumed), "neither the interruption nor the number of workers matters");
}

#[test]
fn settings_that_are_not_the_systems_are_refused() {
    for system in SYSTEMS {
        let mut settings = settings(system, true).unwrap();
        settings["no_such_setting"] = 1.into();
        let error = (system.open)(&settings).err().unwrap().to_string();
        assert!(error.contains(system.name) && error.contains("no_such_setting"), "{error}");
    }
}

#[test]
fn every_recipe_that_is_named_is_there_and_the_other_way_round() {
    for system in SYSTEMS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(system.folder());
        let files = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path());
        let recipes = files.filter(|path| path.extension().is_some_and(|extension| extension == "toml"));
        let names = recipes.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned());
        let mut found: Vec<String> = names.filter(|name| name != "tiny" && name != "quick").collect();
        let mut named = system.recipes.to_vec();
        found.sort_unstable();
        named.sort_unstable();
        assert_eq!(found, named, "{}", system.name);
    }
}

#[test]
fn names_are_unique_and_files_can_have_them() {
    for system in SYSTEMS {
        let mut names: Vec<&str> = system.arms.iter().map(|arm| arm.name).collect();
        assert!(names.iter().all(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || "-.".contains(c))));
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{}: two arms have one name", system.name);
        let mut ids: Vec<&str> = system.claims.iter().map(|claim| claim.id).collect();
        ids.sort_unstable();
        assert!(ids.windows(2).all(|pair| pair[0] != pair[1]), "{}: two claims have one name", system.name);
        assert!(system.figures.iter().flat_map(|figure| figure.arms).all(|arm| system.arm(arm).is_some()));
    }
}
