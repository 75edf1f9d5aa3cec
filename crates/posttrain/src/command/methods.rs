//! `posttrain methods` and `posttrain explain`: the published methods, their formulas, papers and settings.

use base::hint::nearest;
use train::methods::{self, FAMILIES, Family, Preset};

use crate::config::check::Schema;
use crate::config::{reference, schema};
use crate::failure::Failure;
use crate::terminal::print;

/// `posttrain methods`
pub fn list() -> Result<(), Failure> {
    let width = FAMILIES.iter().flat_map(|family| family.presets).map(|preset| preset.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for family in FAMILIES {
        text += &format!("{} [{}]\n", family.title, family.section);
        for preset in family.presets {
            text += &format!("  {:width$}  {}; {}\n", preset.name, preset.title, preset.paper);
        }
        text.push('\n');
    }
    print(text.trim_end().to_owned() + "\n")
}

/// `posttrain explain NAME`
pub fn explain(name: &str, markdown: bool) -> Result<(), Failure> {
    let family = FAMILIES.iter().find(|family| family.section == name);
    match (methods::find(name), family) {
        (_, Some(family)) if markdown => print(page(family)),
        (Some((family, preset)), _) => print(one(family, preset, markdown)),
        (None, _) => {
            let known = FAMILIES.iter().flat_map(|family| family.presets.iter().map(|preset| preset.name));
            let failure = Failure::new(format!("there is no method `{name}`"));
            Err(match nearest(name, known) {
                Some(near) => failure.hint(format!("did you mean `{near}`? `posttrain methods` lists them all")),
                None => failure.hint("`posttrain methods` lists them all"),
            })
        }
    }
}

/// One method: what it is, its settings, and everything that can be set.
fn one(family: &Family, preset: &Preset, markdown: bool) -> String {
    let mut text = summary(preset, if markdown { "# " } else { "" });
    let settings = settings(family, preset);
    text += &format!("\nIn a recipe: `[{}]`", preset.name);
    text += &match settings.is_empty() {
        true => String::from(", with every option at its default.\n"),
        false => format!(", which is `[{}]` with these settings:\n\n{}", family.section, indented(&settings)),
    };
    text += "\nEvery option and its default:\n\n";
    text += &reference::options(Schema::new(&schema()), preset.name, preset.settings);
    text += &format!("\n{}", metrics(family));
    text
}

/// The page of a family: its methods, then what its files say.
fn page(family: &Family) -> String {
    let mut text = format!(
        "# {}\n\nWritten by `posttrain explain {} --markdown`; do not edit. Options: [`[{}]`](../config.md).\n",
        family.title, family.section, family.section
    );
    text += "\n| method | what | paper |\n| --- | --- | --- |\n";
    for preset in family.presets {
        text += &format!("| [`{}`](#{}) | {} | {} |\n", preset.name, preset.name, preset.title, preset.paper);
    }
    text += &format!("\n{}\n## Methods\n", family.prologue());
    for preset in family.presets {
        text += &format!("\n{}", summary(preset, "### "));
        let settings = settings(family, preset);
        if !settings.is_empty() {
            text += &format!("\n```toml\n[{}]\n{settings}```\n", family.section);
        }
    }
    text
}

fn summary(preset: &Preset, heading: &str) -> String {
    let title = match heading {
        "### " => format!("### {}\n\n{}. {}.", preset.name, preset.title, preset.paper),
        heading => format!("{heading}{}: {}\n\n{}", preset.name, preset.title, preset.paper),
    };
    format!("{title}\n\n{}", indented(preset.formula))
}

/// The settings as a recipe would spell them, with the method's name where the section needs it.
fn settings(family: &Family, preset: &Preset) -> String {
    let name = match preset.name == family.presets[0].name && preset.settings.trim().is_empty() {
        true => String::new(),
        false => format!("method = \"{}\"\n", preset.name),
    };
    let lines: Vec<&str> = preset.settings.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    name + &lines.iter().map(|line| format!("{line}\n")).collect::<String>()
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {}\n", line.trim())).collect()
}

/// What the family's files say about metrics.
fn metrics(family: &Family) -> String {
    let prologue = family.prologue();
    let paragraphs: Vec<&str> = prologue.split("\n\n").collect();
    let about = paragraphs.iter().filter(|paragraph| paragraph.trim_start().starts_with("Metrics"));
    about.map(|paragraph| format!("{}\n", paragraph.trim())).collect::<Vec<_>>().join("\n")
}
