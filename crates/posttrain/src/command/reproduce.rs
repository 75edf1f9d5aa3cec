//! `posttrain reproduce`: a published system over seeds, judged claim by claim.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use base::files;
use base::hint::nearest;
use serde_json::Value;
use systems::evidence::evidence;
use systems::reproduce::Finished;
use systems::settings::settings;
use systems::{Arm, Error, Event, Evidence, Reproduction, SYSTEMS, System};

use crate::cli::Reproduce;
use crate::config::check::{Schema, check};
use crate::config::load::{closed, to_toml};
use crate::config::tree::Node;
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::report::systems::{all, html, measured};
use crate::terminal::{Terminal, print};

/// The commit that the binary was built from, where the build says it.
const COMMIT: Option<&str> = option_env!("POSTTRAIN_COMMIT");

/// Seeds that claims are judged by: those from 0 on.
const SEEDS: u64 = 5;

/// Runs the command.
pub fn run(arguments: &Reproduce, terminal: Terminal) -> Result<(), Failure> {
    let interrupt = Interrupt::listen()?;
    let chosen: Vec<&'static System> = match &arguments.name {
        Some(name) => vec![find(name)?],
        None => SYSTEMS.to_vec(),
    };
    let mut pages = Vec::new();
    for system in chosen {
        let (evidence, finished) = reproduce(system, arguments, &interrupt, terminal)?;
        print(table(system, &evidence))?;
        pages.push((system, evidence, finished));
    }
    if arguments.all {
        let path = arguments.output.join("index.html");
        files::write(&path, all(&pages).as_bytes())?;
        terminal.note(format!("page    {}", path.display()));
    }
    Ok(())
}

fn find(name: &str) -> Result<&'static System, Failure> {
    systems::find(name).ok_or_else(|| {
        let failure = Failure::new(format!("there is no system `{name}`"));
        match nearest(name, SYSTEMS.iter().map(|system| system.name)) {
            Some(near) => failure.hint(format!("did you mean `{near}`? `posttrain systems` lists them all")),
            None => failure.hint("`posttrain systems` lists them all"),
        }
    })
}

/// The arms of the command line, or all.
fn arms(system: &'static System, arguments: &Reproduce) -> Result<Vec<&'static Arm>, Failure> {
    if arguments.arms.is_empty() {
        return Ok(system.arms.iter().collect());
    }
    let arm = |name: &String| {
        system.arm(name).ok_or_else(|| {
            let failure = Failure::new(format!("{} has no arm `{name}`", system.name));
            let names: Vec<&str> = system.arms.iter().map(|arm| arm.name).collect();
            match nearest(name, names.iter().copied()) {
                Some(near) => failure.hint(format!("did you mean `{near}`?")),
                None => failure.hint(format!("it has {}", names.join(", "))),
            }
        })
    };
    arguments.arms.iter().map(arm).collect()
}

/// The settings of a system with those of the command line on top, every key checked.
fn resolved(system: &'static System, arguments: &Reproduce) -> Result<Value, Failure> {
    let text = to_toml(&settings(system, arguments.quick)?)?;
    let mut tree = Node::from_text(&format!("the settings of {}", system.name), text)?;
    for assignment in &arguments.set {
        tree.merge(Node::from_assignment(assignment)?);
    }
    check(&tree, Schema::new(&closed((system.schema)())), "")?;
    Ok(tree.to_json())
}

fn reproduce(
    system: &'static System,
    arguments: &Reproduce,
    interrupt: &Interrupt,
    terminal: Terminal,
) -> Result<(Evidence, Vec<Finished>), Failure> {
    let folder = arguments.output.join(system.name);
    let seeds = arguments.seeds.unwrap_or(if arguments.quick { 1 } else { SEEDS });
    let reproduction = Reproduction {
        system,
        settings: resolved(system, arguments)?,
        arms: arms(system, arguments)?,
        seeds: (arguments.first_seed..).take(seeds as usize).collect(),
        folder: &folder,
        workers: rayon::current_num_threads(),
        interrupt: interrupt.flag(),
    };
    let total = reproduction.arms.len() as u64 * seeds;
    let progress = Mutex::new((terminal.progress(system.name, "trial", total), 0u64, true));
    let finished = reproduction.run(&|event| {
        let (bar, done, first) = &mut *progress.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Finished { done: now, .. } => {
                *done = now as u64;
                // Trials of an earlier process say nothing about the rate.
                if std::mem::take(first) && now > 0 {
                    bar.resume_at(*done);
                }
                bar.update(*done, "");
            }
            Event::Step { arm, seed, step, steps } => {
                bar.detail(&format!("{arm}, seed {seed}: step {step} of {steps}"))
            }
        }
    });
    progress.into_inner().unwrap_or_else(PoisonError::into_inner).0.finish();
    let finished = finished.map_err(|error| match error {
        Error::Interrupted => {
            Failure::interrupted("interrupted; finished trials are kept").hint("the same command goes on from there")
        }
        error => error.into(),
    })?;
    let program = concat!("posttrain ", env!("CARGO_PKG_VERSION"));
    let sha256 = reproduction.config_sha256();
    let evidence = evidence(system, (program, COMMIT), sha256, reproduction.settings.clone(), &finished);
    write(system, arguments, &evidence, &finished, terminal)?;
    Ok((evidence, finished))
}

/// Writes evidence and report.
fn write(
    system: &System,
    arguments: &Reproduce,
    evidence: &Evidence,
    finished: &[Finished],
    terminal: Terminal,
) -> Result<(), Failure> {
    let folder = arguments.output.join(system.name);
    let text = serde_json::to_string_pretty(evidence)
        .map_err(|error| Failure::new(format!("the evidence cannot be written: {error}")))?
        + "\n";
    let own = folder.join("evidence.json");
    files::write(&own, text.as_bytes())?;
    let report = folder.join("report.html");
    files::write(&report, html(system, evidence, finished, &command(system, arguments)).as_bytes())?;
    let mut written: Vec<&Path> = vec![&report, &own];
    let shared = arguments.evidence.join(format!("{}.json", system.name));
    if is_evidence(arguments) {
        files::write(&shared, text.as_bytes())?;
        written.push(&shared);
    }
    for path in written {
        terminal.note(format!("wrote {}", path.display()));
    }
    Ok(())
}

/// Whether a run is what the claims are judged by.
fn is_evidence(arguments: &Reproduce) -> bool {
    let seeds = arguments.first_seed == 0 && arguments.seeds.is_none_or(|seeds| seeds == SEEDS);
    seeds && !arguments.quick && arguments.set.is_empty() && arguments.arms.is_empty()
}

/// The command that gives the same numbers.
fn command(system: &System, arguments: &Reproduce) -> String {
    let mut command = format!("posttrain reproduce {}", system.name);
    if let Some(seeds) = arguments.seeds {
        command += &format!(" --seeds {seeds}");
    }
    if arguments.first_seed > 0 {
        command += &format!(" --first-seed {}", arguments.first_seed);
    }
    if arguments.quick {
        command += " --quick";
    }
    if !arguments.arms.is_empty() {
        command += &format!(" --arms {}", arguments.arms.join(","));
    }
    arguments.set.iter().fold(command, |command, assignment| format!("{command} --set '{assignment}'"))
}

/// The claims as a table.
fn table(system: &System, evidence: &Evidence) -> String {
    let seeds = match evidence.seeds.len() {
        1 => "1 seed, which decides nothing".to_owned(),
        count => format!("{count} seeds, 95 % intervals of the mean"),
    };
    let mut text = format!("{}\n{}\n{seeds}\n\n", system.title, system.paper);
    let shown: Vec<String> = evidence.claims.iter().map(measured).collect();
    let width = shown.iter().map(|value| value.chars().count()).max().unwrap_or(0);
    for (claim, value) in evidence.claims.iter().zip(&shown) {
        let (verdict, bound) = (claim.verdict.name(), &claim.bound);
        text += &format!("{:>3}  {verdict:9}  {value:width$}  {bound:7}  {}\n", claim.id, claim.statement);
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn only_the_run_that_claims_are_judged_by_is_evidence() {
        let writes =
            |flags: &[&str]| match Cli::parse_from([&["posttrain", "reproduce", "par"], flags].concat()).command {
                Command::Reproduce(arguments) => is_evidence(&arguments),
                _ => false,
            };
        assert!(writes(&[]) && writes(&["--seeds", "5"]));
        for other in [
            &["--seeds", "1"][..],
            &["--seeds", "6"],
            &["--first-seed", "1"],
            &["--quick"],
            &["--arms", "par"],
            &["--set", "ppo.objective.beta=0.1"],
        ] {
            assert!(!writes(other), "{other:?}");
        }
    }
}
