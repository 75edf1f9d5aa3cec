//! `posttrain systems`: the published systems that can be reproduced, and what is known of their claims.

use std::path::Path;

use base::files;
use base::hint::nearest;
use systems::{Evidence, Role, SYSTEMS, System, WriteData};

use crate::cli::{Systems, SystemsData};
use crate::failure::Failure;
use crate::report::systems::{measured, tally, time};
use crate::terminal::{Terminal, print};

/// Runs the command.
pub fn list(arguments: &Systems) -> Result<(), Failure> {
    if arguments.markdown {
        return print(markdown(&arguments.evidence)?);
    }
    let width = SYSTEMS.iter().map(|system| system.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for system in SYSTEMS {
        let known = match evidence(&arguments.evidence, system)? {
            Some(evidence) => format!("{}, over {} seeds", tally(&evidence), evidence.seeds.len()),
            None => "no evidence here".into(),
        };
        text += &format!("{:width$}  {}\n", system.name, system.summary);
        text += &format!("{:width$}  {}\n{:width$}  {} claims: {known}\n\n", "", system.paper, "", system.claims.len());
    }
    print(text.trim_end().to_owned() + "\n")
}

/// `posttrain systems data`
pub fn data(arguments: &SystemsData, terminal: Terminal) -> Result<(), Failure> {
    let worlds: Vec<(&str, WriteData)> =
        SYSTEMS.iter().filter_map(|system| Some((system.name, system.data?))).collect();
    let Some((_, write)) = worlds.iter().find(|(name, _)| *name == arguments.name) else {
        let names: Vec<&str> = worlds.iter().map(|(name, _)| *name).collect();
        let failure = Failure::new(format!("there is no system `{}` whose world is text", arguments.name));
        return Err(match nearest(&arguments.name, names.iter().copied()) {
            Some(near) => failure.hint(format!("did you mean `{near}`?")),
            None => failure.hint(format!("such a world have: {}", names.join(", "))),
        });
    };
    for (name, text) in write(arguments.seed) {
        let path = arguments.out.join(name);
        files::write(&path, text.as_bytes())?;
        terminal.note(format!("wrote {} rows to {}", text.lines().count(), path.display()));
    }
    Ok(())
}

/// The file of evidence of a system, if it is there.
fn evidence(folder: &Path, system: &System) -> Result<Option<Evidence>, Failure> {
    let path = folder.join(format!("{}.json", system.name));
    if !path.exists() {
        return Ok(None);
    }
    let text = files::read_to_string(&path)?;
    let read = serde_json::from_str(&text);
    read.map(Some).map_err(|error| {
        Failure::new(format!("{} is no file of evidence: {error}", path.display()))
            .hint(format!("`posttrain reproduce {}` writes it again", system.name))
    })
}

/// The page docs/systems.md.
fn markdown(folder: &Path) -> Result<String, Failure> {
    let mut text = String::from(
        "# Systems\n\nWritten by `posttrain systems --markdown`; do not edit.\n\n\
         Published systems, reproduced in miniature: `posttrain reproduce NAME` trains the method, its baselines and its ablations over seeds, \
         and judges every claim by Student's 95 % interval of its mean over the seeds. A claim *holds* where the whole interval keeps \
         the bound, *fails* where none of it does, and is *undecided* otherwise. Claims are written down before they are run; what was changed after a run its README says. The time is the \
         processor time of all trials, which run on one thread each: two idle cores need half as long. *At most* marks a time that was taken by the \
         wall, waiting for other work included.\n\n\
         | system | what is claimed | evidence | time of one core | recipes of other scales |\n| --- | --- | --- | --- | --- |\n",
    );
    let mut sections = String::new();
    for system in SYSTEMS {
        let found = evidence(folder, system)?;
        let known = found.as_ref().map_or_else(|| "none yet".to_owned(), tally);
        let needed = found.as_ref().map(time).unwrap_or_default();
        let recipe = |name: &&str| format!("[{name}](../crates/systems/src/{}/{name}.toml)", system.folder());
        let recipes: Vec<String> = system.recipes.iter().map(recipe).collect();
        let recipes = recipes.join(", ");
        text += &format!("| [{0}](#{0}) | {1} | {known} | {needed} | {recipes} |\n", system.name, system.summary);
        sections += &section(system, found.as_ref());
    }
    Ok(text + &sections)
}

fn section(system: &System, evidence: Option<&Evidence>) -> String {
    let mut text = format!(
        "\n## {0}\n\n{1}. {2}. [What was found](../crates/systems/src/{3}/README.md).\n\n| arm | role | what |\n| --- | --- | --- |\n",
        system.name,
        system.title,
        system.paper,
        system.folder()
    );
    for arm in system.arms {
        let role = match arm.role {
            Role::Baseline => "baseline",
            Role::Method => "method",
            Role::Ablation => "ablation",
        };
        // Arms of later versions are not in a file of an earlier one.
        let missing = evidence.is_some_and(|evidence| !evidence.arms.contains_key(arm.name));
        text += &format!(
            "| {} | {role} | {}{} |\n",
            arm.name,
            arm.about,
            if missing { " (not in the evidence)" } else { "" }
        );
    }
    match evidence {
        Some(evidence) => {
            text += "\n| | claim | measured | bound | verdict |\n| --- | --- | --- | --- | --- |\n";
            for claim in &evidence.claims {
                text += &format!(
                    "| {} | {} | {} | {} | {} |\n",
                    claim.id,
                    claim.statement,
                    measured(claim),
                    claim.bound,
                    claim.verdict.name()
                );
            }
            text += &format!(
                "\n{} seeds, {} of one core; [evidence/{}.json](../evidence/{}.json).\n",
                evidence.seeds.len(),
                time(evidence),
                system.name,
                system.name
            );
        }
        None => {
            text += "\n| | claim | bound |\n| --- | --- | --- |\n";
            for claim in system.claims {
                text += &format!("| {} | {} | {} |\n", claim.id, claim.statement, claim.bound);
            }
        }
    }
    text
}
