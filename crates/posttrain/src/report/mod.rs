//! `report.html`: one self-contained page about a run, and `result.svg`, its picture.
//!
//! The page needs no script and nothing from the net; it follows the reader's light or dark setting.

pub mod assemble;
pub mod chart;
pub mod systems;

use std::fmt::Write as _;

use chart::{Curve, Estimate, escape, intervals, short};

/// Everything the page shows.
pub struct Report {
    /// The headline: what was done to which model.
    pub title: String,
    /// One sentence under it.
    pub subtitle: String,
    /// The first measure in order of time, the last one after training.
    pub evaluations: Vec<Estimate>,
    /// The paired difference between the first and the last evaluation, in words.
    pub difference: Option<String>,
    /// Names and values in a grid: problems, steps, tokens, memory, hash.
    pub facts: Vec<(String, String)>,
    /// What the referee said.
    pub alarms: Vec<String>,
    /// The stages of the run with their curves.
    pub stages: Vec<Stage>,
    /// Answers before and after.
    pub samples: Vec<Sample>,
    /// Seconds by phase of the run, largest first.
    pub phases: Vec<(String, f64)>,
    /// The resolved configuration.
    pub config: String,
    /// The command that repeats the run.
    pub command: String,
}

/// The curves of one stage.
pub struct Stage {
    /// The method: `sft`, `grpo`.
    pub name: String,
    /// In the order they are shown.
    pub curves: Vec<Curve>,
}

/// One problem and its answers before and after training.
pub struct Sample {
    /// What was asked.
    pub prompt: String,
    /// The expected answer, where there is one.
    pub expected: Option<String>,
    /// Text and verdict before, where there is one.
    pub before: Option<(String, Option<bool>)>,
    /// Text and verdict after.
    pub after: (String, Option<bool>),
}

const STYLE: &str = include_str!("page.css");

/// What a metric means, in a few words; `None` for those the page leaves to `metrics.jsonl`.
pub fn caption(metric: &str) -> Option<&'static str> {
    Some(match metric {
        "reward" => "mean reward of the sampled answers",
        "eval_accuracy" => "accuracy on held-out problems",
        "loss" => "the objective's value",
        "accuracy" => "training rows judged rightly",
        "margin" => "score of the better answer less that of the other",
        "mean_reward" => "mean score",
        "kl" => "divergence from the reference model",
        "divergence" => "distance to the teacher's next-token distributions",
        "rewards/accuracies" => "share of pairs whose better answer is preferred",
        "rewards/margins" => "implicit reward of the better answer less that of the other",
        "entropy" => "uncertainty about the next token, nats",
        "completions/mean_length" => "tokens in a sampled answer",
        "completions/clipped_ratio" => "answers cut at the length limit",
        "frac_reward_zero_std" => "groups without a learning signal",
        "clip_ratio/region_mean" => "tokens whose ratio was clipped",
        "grad_norm" => "size of the gradient before clipping",
        "learning_rate" => "step size of the optimiser",
        _ => return None,
    })
}

impl Report {
    /// The page.
    pub fn html(&self) -> String {
        let mut html = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
             <title>{0}</title>\n<style>\n{STYLE}</style></head>\n<body><main>\n<header><h1>{0}</h1><p class=\"soft\">{1}</p></header>\n",
            escape(&self.title),
            escape(&self.subtitle)
        );
        html += &self.result();
        html += &self.facts();
        html += &self.alarms();
        for stage in self.stages.iter().filter(|stage| !stage.curves.is_empty()) {
            html += &stage.html();
        }
        html += &self.samples();
        html += &self.timing();
        let _ = write!(
            html,
            "<h2>Repeat this run</h2>\n<p class=\"soft\">The same binary, configuration and seed give the same bytes, whatever the number of threads.</p>\
             <pre>{}</pre>\n<details><summary>The configuration, every option resolved</summary>\n<pre>{}</pre></details>\n",
            escape(&self.command),
            escape(&self.config)
        );
        html + "</main></body></html>\n"
    }

    fn result(&self) -> String {
        let (Some(first), Some(last)) = (self.evaluations.first(), self.evaluations.last()) else {
            return String::new();
        };
        let shown = |estimate: &Estimate| estimate.shown(estimate.value);
        let numbers = match self.evaluations.len() {
            1 => format!(r#"<span class="number new">{}</span>"#, shown(last)),
            _ => format!(
                r#"<span class="number old">{}</span><span class="arrow">→</span><span class="number new">{}</span>"#,
                shown(first),
                shown(last)
            ),
        };
        let difference = match &self.difference {
            Some(text) => format!("<p>{}</p>", escape(text)),
            None => String::new(),
        };
        format!("<div class=\"hero\">{numbers}</div>\n{difference}{}\n", intervals(&self.evaluations))
    }

    fn facts(&self) -> String {
        let cell = |(key, value): &(String, String)| {
            format!(r#"<div><div class="key">{}</div><div class="val">{}</div></div>"#, escape(key), escape(value))
        };
        format!("<div class=\"facts\">{}</div>\n", self.facts.iter().map(cell).collect::<String>())
    }

    fn alarms(&self) -> String {
        if self.alarms.is_empty() {
            return String::new();
        }
        let items: String = self.alarms.iter().map(|alarm| format!("<li>{}</li>", escape(alarm))).collect();
        format!("<h2>Alarms of the referee</h2>\n<ul class=\"alarms\">{items}</ul>\n")
    }

    fn samples(&self) -> String {
        if self.samples.is_empty() {
            return String::new();
        }
        let verdict = |right: Option<bool>| match right {
            Some(true) => r#" · <span class="right">✓ right</span>"#,
            Some(false) => r#" · <span class="wrong">✗ wrong</span>"#,
            None => "",
        };
        let side = |when: &str, (text, right): &(String, Option<bool>)| {
            format!(
                r#"<div><div class="tag">{when}{}</div><div class="text">{}</div></div>"#,
                verdict(*right),
                escape(text)
            )
        };
        let mut html = String::from("<h2>The same problems, before and after</h2>\n");
        for sample in &self.samples {
            let expected = match &sample.expected {
                Some(answer) => format!(r#"<div class="tag">expected {}</div>"#, escape(answer)),
                None => String::new(),
            };
            let before = sample.before.as_ref().map(|answer| side("before", answer)).unwrap_or_default();
            let _ = writeln!(
                html,
                "<div class=\"sample\"><div class=\"prompt\">{expected}{}</div><div class=\"pair\">{before}{}</div></div>",
                escape(&sample.prompt),
                side("after", &sample.after)
            );
        }
        html
    }

    fn timing(&self) -> String {
        let total: f64 = self.phases.iter().map(|phase| phase.1).sum();
        if total <= 0.0 {
            return String::new();
        }
        const COLORS: [&str; 6] = ["#0f6fde", "#c98a12", "#12794a", "#8458c4", "#6aa9f2", "#8a939d"];
        let color = |i: usize| COLORS[i.min(COLORS.len() - 1)];
        let mut bar = String::new();
        let mut legend = String::new();
        for (i, (name, seconds)) in self.phases.iter().enumerate() {
            let (name, share) = (escape(name), 100.0 * seconds / total);
            let _ = write!(bar, r#"<div style="width:{share:.2}%;background:{}" title="{name}"></div>"#, color(i));
            let _ = write!(
                legend,
                r#"<li><span class="swatch" style="background:{}"></span>{name} <span class="soft">{} · {share:.0} %</span></li>"#,
                color(i),
                duration(*seconds)
            );
        }
        format!("<h2>Where the time went</h2>\n<div class=\"phases\">{bar}</div><ul class=\"legend\">{legend}</ul>\n")
    }

    /// The result as one picture for a README: the accuracies and one curve.
    pub fn picture(&self) -> String {
        let style = "svg{--ink:#1a1d21;--soft:#5f6770;--line:#e3e6ea;--accent:#0f6fde;--before:#8a939d}\
            @media(prefers-color-scheme:dark){svg{--ink:#e6e9ec;--soft:#98a1ab;--line:#2b3036;--accent:#5aa5ff;--before:#87909a}}";
        let rules: String = STYLE.lines().filter(|line| line.starts_with("svg ")).collect();
        let place = |svg: String, x: f64, y: f64, width: f64, height: f64| {
            svg.replacen("<svg ", &format!(r#"<svg x="{x}" y="{y}" width="{width}" height="{height}" "#), 1)
        };
        let curves: Vec<&Curve> = self.stages.iter().flat_map(|stage| &stage.curves).collect();
        let shown: Vec<&&Curve> = [
            "reward",
            "divergence",
            "completions/mean_length",
            "rewards/accuracies",
            "rewards/margins",
            "kl",
            "entropy",
            "loss",
        ]
        .iter()
        .filter_map(|name| curves.iter().find(|curve| curve.name == *name))
        .take(2)
        .collect();
        let top = 40.0 + 34.0 + 44.0 * self.evaluations.len() as f64;
        let height = if shown.is_empty() { top } else { top + 250.0 };
        let mut svg = format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}"><style>{style}{rules}</style><text class="name" x="20" y="24" font-weight="600">{}</text>"#,
            escape(&self.title)
        );
        svg += &place(intervals(&self.evaluations), 20.0, 36.0, 720.0, 44.0 * self.evaluations.len() as f64 + 28.0);
        for (i, curve) in shown.iter().enumerate() {
            let x = 20.0 + 370.0 * i as f64;
            let _ = write!(
                svg,
                r#"<text class="name" x="{x}" y="{}">{} <tspan class="tick">{}</tspan></text>"#,
                top + 24.0,
                escape(&curve.name),
                escape(curve.caption)
            );
            svg += &place(curve.svg(), x, top + 38.0, 350.0, 196.0);
        }
        svg + "</svg>\n"
    }
}

impl Stage {
    fn html(&self) -> String {
        let mut html = format!("<h2>Training: {}</h2>\n<div class=\"curves\">", escape(&self.name));
        for curve in &self.curves {
            let _ = writeln!(
                html,
                "<figure><figcaption><span class=\"mono\">{}</span><span class=\"soft\">{}</span></figcaption><p class=\"note\">{}</p>{}</figure>",
                escape(&curve.name),
                short(curve.last()),
                escape(curve.caption),
                curve.svg()
            );
        }
        html + "</div>\n"
    }
}

/// Seconds as people say them: `48 s`, `6 min 20 s`, `2 h 05 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 9.95 => format!("{seconds:.1} s"),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

/// Bytes in binary units: `1.4 GiB`.
pub fn bytes(count: u64) -> String {
    let count = count as f64;
    match count {
        _ if count < 1024.0 => format!("{count} B"),
        _ if count < 1024.0 * 1024.0 => format!("{:.0} KiB", count / 1024.0),
        _ if count < 1024.0 * 1024.0 * 1024.0 => format!("{:.0} MiB", count / 1024.0 / 1024.0),
        _ => format!("{:.1} GiB", count / 1024.0 / 1024.0 / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let wave = |name: &str, scale: f64| Curve {
            name: name.into(),
            caption: caption(name).unwrap_or_default(),
            points: (1..=60)
                .map(|i| {
                    (
                        f64::from(i),
                        scale * (1.0 - (-f64::from(i) / 20.0).exp()) + 0.1 * scale * f64::from(i * 7 % 13) / 13.0,
                    )
                })
                .collect(),
        };
        Report {
            title: "SmolLM2-135M-Instruct, post-trained with GRPO".into(),
            subtitle: "60 steps on generated arithmetic and word problems".into(),
            evaluations: vec![
                Estimate { label: "before".into(), value: 0.315, low: 0.255, high: 0.382, share: true },
                Estimate { label: "after".into(), value: 0.58, low: 0.511, high: 0.646, share: true },
            ],
            difference: Some("+26.5 points on the same 200 problems".into()),
            alarms: vec!["step 7: <it>".into()],
            facts: [("problems", "200"), ("steps", "60"), ("wall time", "8 min 12 s"), ("peak memory", "2.1 GiB")]
                .map(|(key, value)| (key.into(), value.into()))
                .to_vec(),
            stages: vec![Stage {
                name: "grpo".into(),
                curves: ["reward", "kl", "entropy", "completions/mean_length", "grad_norm", "loss"]
                    .into_iter()
                    .zip([1.0, 0.01, 0.8, 40.0, 3.0, 0.002])
                    .map(|(name, scale)| wave(name, scale))
                    .collect(),
            }],
            samples: vec![Sample {
                prompt: "Tom has 3 boxes with <4> apples each. How many apples?".into(),
                expected: Some("12".into()),
                before: Some(("Tom has 7 apples.".into(), Some(false))),
                after: ("3 × 4 = 12\n\\boxed{12}".into(), Some(true)),
            }],
            phases: vec![("sampling".into(), 300.0), ("training".into(), 150.0), ("evaluation".into(), 40.0)],
            config: "seed = 42\n[model]\nname = \"smollm2-135m-instruct\"\n".into(),
            command: "posttrain train runs/quickstart/config.toml".into(),
        }
    }

    #[test]
    fn the_page_is_whole_and_self_contained() {
        let html = report().html();
        assert!(html.contains("31.5 %") && html.contains("58.0 %") && html.contains("&lt;4&gt; apples"));
        for foreign in ["<script", "http://", "https://", "<link", "@import", "NaN"] {
            assert!(!html.contains(foreign), "{foreign}");
        }
        // Every element that is opened is closed.
        for tag in ["svg", "div", "figure", "h2", "pre", "details", "ul", "li", "span", "p", "g", "text"] {
            let opened = html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        if let Ok(folder) = std::env::var("POSTTRAIN_REPORT_PREVIEW") {
            std::fs::write(format!("{folder}/report.html"), &html).ok();
            std::fs::write(format!("{folder}/result.svg"), report().picture()).ok();
        }
    }

    #[test]
    fn what_is_no_share_is_no_percentage_and_what_has_no_verdict_is_not_wrong() {
        let mut report = report();
        for (estimate, value) in report.evaluations.iter_mut().zip([1.25, 0.4]) {
            *estimate = Estimate { label: estimate.label.clone(), value, low: 0.3, high: 1.5, share: false };
        }
        for sample in &mut report.samples {
            sample.after.1 = None;
            sample.before = sample.before.take().map(|(text, _)| (text, None));
        }
        for page in [report.html(), report.picture()] {
            assert!(page.contains("1.25") && !page.contains("125.0 %") && !page.contains("40.0 %"), "{page}");
            assert!(!page.contains("✗ wrong") && !page.contains("✓ right") && !page.contains("NaN"), "{page}");
        }
    }

    #[test]
    fn times_and_sizes_read_well() {
        assert_eq!([3.12, 48.2, 380.0, 7500.0].map(duration), ["3.1 s", "48 s", "6 min 20 s", "2 h 05 min"]);
        assert_eq!([12, 2048, 5 << 20, 3 << 29].map(bytes), ["12 B", "2 KiB", "5 MiB", "1.5 GiB"]);
    }
}
