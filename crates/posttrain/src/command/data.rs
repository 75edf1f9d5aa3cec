//! `posttrain data validate`: what is learnt of rows, and what is wrong with them.

use data::DataOptions;
use data::audit::columns::Column;
use data::audit::lengths::Lengths;
use data::audit::tokens::{Piece, pieces};
use data::audit::{Audit, Finding, Setting, Severity, Specimen, audit};
use data::render::Part;
use model::tokenizer::Tokenizer;
use serde_json::json;

use crate::cli::Validate;
use crate::config::Config;
use crate::config::load::Layers;
use crate::corpus;
use crate::failure::Failure;
use crate::opened::Opener;
use crate::terminal::print;

/// Runs the command.
pub fn validate(arguments: &Validate, opener: Opener) -> Result<(), Failure> {
    let config = configuration(arguments)?;
    let model = opener.shape(&config.model.name)?;
    let rows = corpus::rows_to_audit(&config)?;
    let setting = Setting {
        tokenizer: &model.tokenizer,
        template: model.chat_template.as_ref(),
        context: model.config.max_positions,
        answer: config.longest_answer(),
        held_out_answer: config.evaluation.sampling.max_new_tokens,
        rendering: &config.rendering,
        used: &config.uses(),
        held_out: &config.held_out_uses(),
    };
    let found = audit(rows, setting, arguments.show);
    let page = Page {
        audit: &found,
        model: &config.model.name,
        tokenizer: &model.tokenizer,
        color: opener.terminal.color_results,
        named: arguments.name,
    };
    print(if arguments.json { page.json() } else { page.text(setting) })?;
    match found.count(Severity::Error) {
        0 => Ok(()),
        errors => {
            let failure = Failure::new(format!("the data has {}", counted(errors, "error")));
            Err(failure.hint("the findings name the rows; docs/data.md says what each check means"))
        }
    }
}

/// The recipe, or an empty one with the files to look at.
fn configuration(arguments: &Validate) -> Result<Config, Failure> {
    let is_recipe = |source: &&String| source.ends_with(".toml");
    let recipes = arguments.sources.iter().filter(is_recipe).map(Into::into).collect();
    let files: Vec<String> = arguments.sources.iter().filter(|source| !is_recipe(source)).cloned().collect();
    let mut config = Config::load(&Layers { files: recipes, assignments: arguments.set.clone() })?;
    if !files.is_empty() {
        config.tasks.clear();
        config.data = DataOptions { train: files, ..config.data };
    }
    if !arguments.test.is_empty() {
        config.data.test.clone_from(&arguments.test);
    }
    if let Some(model) = &arguments.model {
        config.model.name.clone_from(model);
    }
    if config.data.train.is_empty() && config.data.forget.is_empty() && config.tasks.is_empty() {
        let failure = Failure::new("there are no rows to look at: expected `[[tasks]]` or `data.train`");
        return Err(failure.hint("name the files themselves: `posttrain data validate rows.jsonl`"));
    }
    Ok(config)
}

/// What is printed.
struct Page<'a> {
    audit: &'a Audit,
    model: &'a str,
    tokenizer: &'a Tokenizer,
    color: bool,
    /// Rows named for each finding.
    named: usize,
}

/// Width of the longest bar, in characters.
const BAR: usize = 40;
/// Width of the names in front of lines.
const NAME: usize = 10;

impl Page<'_> {
    fn text(&self, setting: Setting<'_>) -> String {
        let audit = self.audit;
        let mut text = line("model", &format!("{}, {}", self.model, self.ends(setting)));
        let made =
            if audit.generated > 0 { format!(" ({} of them generated)", audit.generated) } else { String::new() };
        let kind = audit.kind.map(|kind| format!(", {kind}")).unwrap_or_default();
        let forget = if audit.forget > 0 { format!("; {} to forget", audit.forget) } else { String::new() };
        text += &line("rows", &format!("{} to train on{made}{kind}{forget}; {} held out", audit.train, audit.test));
        text.push('\n');
        for (index, column) in audit.columns.iter().enumerate() {
            text += &line(if index == 0 { "columns" } else { "" }, &self.column(column));
        }
        for specimen in &audit.specimens {
            text.push('\n');
            text += &self.specimen(specimen);
        }
        text.push('\n');
        text += &self.lengths();
        text.push('\n');
        text += &self.findings();
        text
    }

    /// What begins and ends a sequence, and who opens the assistant's turn.
    fn ends(&self, setting: Setting<'_>) -> String {
        let name = |id: Option<u32>| id.and_then(|id| self.tokenizer.token(id));
        let begin = match name(self.tokenizer.bos()) {
            Some(bos) if self.tokenizer.adds_bos() => format!("BOS {bos}"),
            Some(bos) => format!("BOS {bos} (not put in front of text)"),
            None => "no BOS".into(),
        };
        let end = name(self.tokenizer.eos()).map_or("no EOS".into(), |eos| format!("EOS {eos}"));
        let template = if setting.template.is_some() { "a chat template" } else { "no chat template" };
        format!("context {}, {begin}, {end}, {template}", setting.context)
    }

    fn column(&self, column: &Column) -> String {
        let types = column.types.iter().enumerate().map(|(index, seen)| match index {
            0 if column.types.len() == 1 => seen.name.to_owned(),
            0 => format!("{} ({})", seen.name, seen.rows),
            _ => format!("{} ({}, first in {})", seen.name, seen.rows, seen.first),
        });
        let types = types.collect::<Vec<_>>().join(", ");
        format!("{:16} in {} of {} rows, {types}", column.name, column.rows, self.audit.train)
    }

    /// A row with what is learnt of it.
    fn specimen(&self, specimen: &Specimen) -> String {
        let mut text = String::new();
        for sequence in &specimen.sequences {
            let part = match sequence.part {
                Part::Example => "",
                Part::Prompt => ", prompt",
                Part::Chosen => ", chosen",
                Part::Rejected => ", rejected",
                Part::Steps => ", steps",
            };
            let (tokens, learnt) = (sequence.ids.len(), sequence.learnt());
            text += &format!("{}{part}: {tokens} tokens, {learnt} learnt\n", specimen.source);
            let marked: String =
                pieces(self.tokenizer, sequence).iter().map(|piece| marked(piece, self.color)).collect();
            text += &marked.split('\n').map(|line| format!("  {line}\n")).collect::<String>();
        }
        text
    }

    fn lengths(&self) -> String {
        let audit = self.audit;
        let mut text = String::new();
        for (name, lengths) in [("tokens", &audit.tokens), ("given", &audit.given), ("learnt", &audit.learnt)] {
            let Lengths { min, median, p95, max, total, .. } = lengths;
            text += &line(name, &format!("{min} to {max}, median {median}, 95 % up to {p95}, {total} in all"));
        }
        let beyond = format!("longest sequence used: {} tokens", audit.limit);
        text += &line("", &beyond);
        let largest = audit.tokens.bins.iter().map(|bin| bin.count).max().unwrap_or(0).max(1);
        for bin in &audit.tokens.bins {
            let bar = "█".repeat((bin.count * BAR).div_ceil(largest));
            let over = if bin.to > audit.limit { "  beyond the longest" } else { "" };
            text += &line("", &format!("{:>6} – {:<6} {:>7} {bar}{over}", bin.from, bin.to, bin.count));
        }
        text
    }

    fn findings(&self) -> String {
        let mut text = String::new();
        for same in self.audit.findings.chunk_by(|a, b| (a.severity, a.check) == (b.severity, b.check)) {
            let severity = match same[0].severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            };
            text += &line(&self.emphasis(severity), &format!("{}: {}", same[0].check, same.len()));
            for Finding { at, detail, .. } in same.iter().take(self.named) {
                let place = at.as_ref().map(|at| format!("{at}: ")).unwrap_or_default();
                text += &line("", &format!("{place}{detail}"));
            }
            if same.len() > self.named {
                text += &line("", &format!("and {} more", same.len() - self.named));
            }
        }
        let (errors, warnings) = (self.audit.count(Severity::Error), self.audit.count(Severity::Warning));
        text + &format!("{}, {}\n", counted(errors, "error"), counted(warnings, "warning"))
    }

    /// The word that opens a finding, padded to its column.
    fn emphasis(&self, severity: &'static str) -> String {
        let padded = format!("{severity:NAME$}");
        match (self.color, severity) {
            (true, "error") => format!("\x1b[1;31m{padded}\x1b[0m"),
            (true, _) => format!("\x1b[1;33m{padded}\x1b[0m"),
            (false, _) => padded,
        }
    }

    fn json(&self) -> String {
        let audit = self.audit;
        let specimen = |specimen: &Specimen| {
            let sequence = |sequence: &data::render::Sequence| json!({ "part": sequence.part, "pieces": pieces(self.tokenizer, sequence) });
            json!({
                "source": specimen.source,
                "sequences": specimen.sequences.iter().map(sequence).collect::<Vec<_>>(),
            })
        };
        let value = json!({
            "model": self.model,
            "type": audit.kind.map(|kind| kind.to_string()),
            "rows": { "train": audit.train, "generated": audit.generated, "forget": audit.forget, "test": audit.test },
            "limit": audit.limit,
            "columns": audit.columns,
            "lengths": { "tokens": audit.tokens, "given": audit.given, "learnt": audit.learnt },
            "shown": audit.specimens.iter().map(specimen).collect::<Vec<_>>(),
            "errors": audit.count(Severity::Error),
            "warnings": audit.count(Severity::Warning),
            "findings": audit.findings,
        });
        format!("{value:#}\n")
    }
}

/// A line of the page under a name.
fn line(name: &str, text: &str) -> String {
    format!("{name:NAME$}{text}\n")
}

/// A piece of text as it is shown: green or in brackets where it is learnt.
fn marked(piece: &Piece, color: bool) -> String {
    // What a row holds must not steer the terminal.
    let clean = |c: char| if c.is_control() && c != '\n' && c != '\t' { char::REPLACEMENT_CHARACTER } else { c };
    let text: String = piece.text.chars().map(clean).collect();
    match (piece.learnt, color) {
        (false, _) => text,
        (true, false) => format!("⟦{text}⟧"),
        // Each line on its own, so that a pager or a cut does not lose the colour.
        (true, true) => text.split('\n').map(|line| format!("\x1b[30;42m{line}\x1b[0m")).collect::<Vec<_>>().join("\n"),
    }
}

/// A number with its noun.
fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}
