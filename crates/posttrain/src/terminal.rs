//! Talking to people: results on standard output, everything else on standard error.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Failure;
use crate::report::duration;

/// How to talk.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    /// Results only.
    pub quiet: bool,
    /// Colours on standard error.
    pub color: bool,
    /// Colours in results, on standard output.
    pub color_results: bool,
    /// Somebody watches standard error: progress bars instead of lines.
    pub interactive: bool,
}

impl Terminal {
    /// Looks at the standard streams, the environment and the flags.
    pub fn new(quiet: bool, no_color: bool) -> Self {
        let interactive = io::stderr().is_terminal();
        let no_color = no_color || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let color_results = io::stdout().is_terminal() && !no_color;
        Self { quiet, color: interactive && !no_color, color_results, interactive }
    }

    /// One line for the reader, not part of the result.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            // Nobody listening is no reason to fail.
            let _ = writeln!(io::stderr(), "{}", text.as_ref());
        }
    }

    /// Starts to show the progress of `total` units of work.
    pub fn progress(&self, name: &str, unit: &'static str, total: u64) -> Progress {
        let shown = match (self.quiet, self.interactive) {
            (true, _) => Shown::Nothing,
            (false, true) => Shown::Bar(bar(name, total, self.color)),
            (false, false) => Shown::Lines { last: None },
        };
        Progress { name: name.to_owned(), unit, total, first: 0, started: Instant::now(), shown }
    }
}

/// Writes a result to standard output.
///
/// A reader that has gone away (`posttrain models | head -1`) is not an error: the process ends quietly.
pub fn print(text: impl AsRef<str>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_ref().as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Failure::new(format!("cannot write to standard output: {error}"))),
    }
}

fn bar(name: &str, total: u64, color: bool) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = match color {
        true => "{prefix:.bold} {bar:28.blue/black.bright} {pos}/{len} {msg:.dim}",
        false => "{prefix} [{bar:28}] {pos}/{len} {msg}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars(if color { "━╸━" } else { "=> " }));
    }
    bar.set_prefix(name.to_owned());
    bar
}

/// Progress of one piece of work: a bar with rate, remaining time and key numbers for a watcher, now and then a line
/// otherwise.
pub struct Progress {
    name: String,
    unit: &'static str,
    total: u64,
    /// Units that were done before the work started; they say nothing about the rate.
    first: u64,
    started: Instant,
    shown: Shown,
}

enum Shown {
    Nothing,
    Bar(ProgressBar),
    Lines { last: Option<Instant> },
}

/// Without a watcher a line appears at most this often, and at the end.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

impl Progress {
    /// Units that an earlier process did.
    pub fn starting_at(mut self, done: u64) -> Self {
        self.resume_at(done);
        self
    }

    /// The same, where it comes out only after the work has begun.
    pub fn resume_at(&mut self, done: u64) {
        self.first = done;
        if let Shown::Bar(bar) = &self.shown {
            bar.set_position(done);
        }
    }

    /// `done` units are done; `numbers` are the few that matter now.
    pub fn update(&mut self, done: u64, numbers: &str) {
        let elapsed = self.started.elapsed().as_secs_f64();
        let rate = done.saturating_sub(self.first) as f64 / elapsed.max(1e-9);
        let mut text = String::new();
        if rate > 0.0 && elapsed > 0.2 {
            text += &match rate {
                _ if rate >= 10.0 => format!("{rate:.0} {}/s", self.unit),
                _ if rate >= 1.0 => format!("{rate:.1} {}/s", self.unit),
                _ => format!("{:.1} s/{}", 1.0 / rate, self.unit),
            };
            if done < self.total {
                text += &format!(" · {} left", duration((self.total - done) as f64 / rate));
            }
        }
        if !numbers.is_empty() {
            text += if text.is_empty() { "" } else { " · " };
            text += numbers;
        }
        let finished = done >= self.total;
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(text);
            }
            Shown::Lines { last } => {
                let due = last.is_none_or(|last| last.elapsed() >= BETWEEN_LINES);
                if due || finished {
                    *last = Some(Instant::now());
                    let _ = writeln!(io::stderr(), "{} {done}/{} {text}", self.name, self.total);
                }
            }
        }
    }

    /// What is going on inside the current unit; only a watcher sees it.
    pub fn detail(&self, text: &str) {
        if let Shown::Bar(bar) = &self.shown {
            bar.set_message(text.to_owned());
        }
    }

    /// Prints a line without disturbing the bar.
    pub fn line(&self, text: &str) {
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => bar.suspend(|| drop(writeln!(io::stderr(), "{text}"))),
            Shown::Lines { .. } => drop(writeln!(io::stderr(), "{text}")),
        }
    }

    /// The work is over; a bar that is not full stays as it is.
    pub fn finish(self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.abandon();
        }
    }

    /// The work is over and nobody needs to see the bar again.
    pub fn clear(self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}
