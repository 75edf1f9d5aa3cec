//! The page of a reproduction, and the page over all of them.

use std::fmt::Write as _;

use base::Clock;
use systems::reproduce::{Finished, by_seed};
use systems::{Evidence, Judgement, System, Verdict};

use super::chart::{Lines, escape, short};
use super::{STYLE, duration};

/// A value with its interval, in words.
pub fn measured(judgement: &Judgement) -> String {
    match (judgement.value, judgement.interval) {
        (Some(value), Some(interval)) => {
            format!("{} [{}, {}]", short(value), short(interval.low), short(interval.high))
        }
        (Some(value), None) => short(value),
        (None, _) => "not measured".into(),
    }
}

/// How many claims hold, fail and are undecided: `3 hold, 1 fails`.
pub fn tally(evidence: &Evidence) -> String {
    let count = |verdict| evidence.claims.iter().filter(|claim| claim.verdict == verdict).count();
    let (holds, fails, undecided) = (count(Verdict::Holds), count(Verdict::Fails), count(Verdict::Undecided));
    let of = |count: usize, one: &str, many: &str| match count {
        0 => None,
        1 => Some(format!("1 {one}")),
        _ => Some(format!("{count} {many}")),
    };
    let parts = [of(holds, "holds", "hold"), of(fails, "fails", "fail"), of(undecided, "undecided", "undecided")];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// The time that all trials took together on one core, in words. Wall time is more than that.
pub fn time(evidence: &Evidence) -> String {
    match evidence.clock {
        Clock::Processor => duration(evidence.seconds),
        Clock::Wall => format!("at most {}", duration(evidence.seconds)),
    }
}

/// A page in the style of reports.
pub fn page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{}</title>\n<style>\n{STYLE}</style></head>\n<body><main>\n{body}</main></body></html>\n",
        escape(title)
    )
}

/// The page of one system.
pub fn html(system: &System, evidence: &Evidence, finished: &[Finished], command: &str) -> String {
    let mut body = format!("<header><h1>{}</h1></header>\n", escape(system.title));
    body += &section(system, evidence, finished);
    let _ = write!(
        body,
        "<h2>Repeat this</h2>\n<p class=\"soft\">The same binary, settings and seeds give the same numbers.</p><pre>{}</pre>\n\
         <details><summary>The settings</summary>\n<pre>{}</pre></details>\n",
        escape(command),
        escape(&format!("{:#}", evidence.settings))
    );
    page(system.title, &body)
}

/// The page over all systems.
pub fn all(sections: &[(&System, Evidence, Vec<Finished>)]) -> String {
    let mut body = String::from("<header><h1>Published systems, reproduced in miniature</h1></header>\n");
    for (system, evidence, finished) in sections {
        let _ = write!(body, "<h2>{}</h2>\n{}", escape(system.title), section(system, evidence, finished));
    }
    page("Published systems, reproduced in miniature", &body)
}

/// What is said of a system: paper, claims, figures, numbers.
fn section(system: &System, evidence: &Evidence, finished: &[Finished]) -> String {
    let mut html = format!("<p>{}</p><p class=\"soft\">{}</p>\n", escape(system.summary), escape(system.paper));
    let fact = |key: &str, value: String| {
        format!(r#"<div><div class="key">{key}</div><div class="val">{}</div></div>"#, escape(&value))
    };
    let _ = writeln!(
        html,
        "<div class=\"facts\">{}{}{}{}</div>",
        fact("claims", tally(evidence)),
        fact("seeds", evidence.seeds.len().to_string()),
        fact("time of one core", time(evidence)),
        fact("settings", evidence.config_sha256[..12].to_owned())
    );
    html += &claims(evidence);
    let seeds = by_seed(finished);
    html += "<div class=\"curves\">\n";
    for figure in system.figures {
        let curves = |arm: &&str| {
            let of_seed = |seed: &systems::Seed<'_>| seed.arm(arm)?.curves.get(figure.curve).cloned();
            ((*arm).to_owned(), seeds.iter().filter_map(of_seed).collect())
        };
        html += &Lines {
            title: figure.title.into(),
            axes: (figure.x.into(), figure.y.into()),
            competitors: figure.arms.iter().map(curves).collect(),
            diagonal: figure.diagonal,
        }
        .html();
    }
    html += "</div>\n";
    html + &arms(system, evidence)
}

fn claims(evidence: &Evidence) -> String {
    let row = |claim: &Judgement| {
        let class = match claim.verdict {
            Verdict::Holds => "right",
            Verdict::Fails => "wrong",
            Verdict::Undecided => "soft",
        };
        format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"{class}\">{}</td></tr>\n",
            escape(&claim.id),
            escape(&claim.statement),
            escape(&measured(claim)),
            escape(&claim.bound),
            claim.verdict.name()
        )
    };
    format!(
        "<table><thead><tr><th></th><th>claim</th><th>mean over seeds, 95 % interval</th><th>bound</th><th></th></tr></thead>\n\
         <tbody>{}</tbody></table>\n",
        evidence.claims.iter().map(row).collect::<String>()
    )
}

/// Every number of every arm.
fn arms(system: &System, evidence: &Evidence) -> String {
    let mut names: Vec<&String> = evidence.arms.values().flat_map(|numbers| numbers.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let head: String = names.iter().map(|name| format!("<th>{}</th>", escape(name))).collect();
    let row = |arm: &systems::Arm| {
        let numbers = evidence.arms.get(arm.name);
        let cell = |name: &&String| {
            let value = numbers.and_then(|numbers| numbers.get(*name)).map_or_else(String::new, |value| short(*value));
            format!("<td>{value}</td>")
        };
        format!(
            "<tr><td title=\"{}\">{}</td>{}</tr>\n",
            escape(arm.about),
            escape(arm.name),
            names.iter().map(cell).collect::<String>()
        )
    };
    format!(
        "<details><summary>Every number, mean over seeds</summary>\n<div class=\"wide\"><table><thead><tr><th></th>{head}</tr></thead>\n\
         <tbody>{}</tbody></table></div></details>\n",
        system.arms.iter().map(row).collect::<String>()
    )
}
