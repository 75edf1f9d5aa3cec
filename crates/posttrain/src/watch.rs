//! Shows a run to whoever watches: one bar a stage, with the two or three numbers that matter.

use train::observer::{Event, Observer};
use train::timing::Phase;

use crate::report::chart::short;
use crate::terminal::{Progress, Terminal};

/// Follows a run on the terminal.
pub struct Watcher {
    terminal: Terminal,
    /// The bar of the current stage, over the steps of all stages.
    stage: Option<Progress>,
    /// The bar of an evaluation.
    evaluation: Option<Progress>,
    /// Steps done and steps in all, over all stages.
    done: u64,
    steps: u64,
    numbers: String,
}

impl Watcher {
    /// Watches nothing yet.
    pub fn new(terminal: Terminal) -> Self {
        Self { terminal, stage: None, evaluation: None, done: 0, steps: 0, numbers: String::new() }
    }

    /// Prints a line, around the bar where there is one.
    fn line(&self, text: &str) {
        match &self.stage {
            Some(bar) => bar.line(text),
            None => self.terminal.note(text),
        }
    }
}

/// The metrics shown beside the bar: name in the logs, name on the screen.
const SHOWN: [(&str, &str); 5] = [
    ("reward", "reward"),
    ("loss", "loss"),
    ("kl", "kl"),
    ("entropy", "entropy"),
    ("completions/mean_length", "length"),
];

/// As many as fit beside a bar.
const NUMBERS: usize = 3;

fn numbers(metrics: &train::metrics::Metrics) -> String {
    // The loss of a policy hovers around zero and says nothing; its reward does.
    let policy = metrics.get("reward").is_some();
    let value = |(name, label): &(&str, &str)| Some(format!("{label} {}", short(metrics.get(name)?)));
    let wanted = SHOWN.iter().filter(|(name, _)| !(policy && *name == "loss"));
    wanted.filter_map(value).take(NUMBERS).collect::<Vec<_>>().join(" · ")
}

fn doing(phase: Phase) -> &'static str {
    match phase {
        Phase::Evaluate => "evaluating",
        Phase::Rollout => "sampling",
        Phase::Score => "scoring",
        Phase::Reference => "reference",
        Phase::Train => "training",
        Phase::Save => "saving",
    }
}

impl Observer for Watcher {
    fn observe(&mut self, event: Event<'_>) {
        match event {
            Event::Started { steps, done } => {
                (self.done, self.steps) = (done, steps);
                if done > 0 {
                    self.terminal.note(format!("going on after step {done} of {steps}"));
                }
            }
            Event::Damaged { error } => self.line(&format!("passing over a damaged checkpoint: {error}")),
            Event::Stage { method, .. } => {
                if let Some(bar) = self.stage.take() {
                    bar.finish();
                }
                self.stage = Some(self.terminal.progress(method, "step", self.steps).starting_at(self.done));
            }
            Event::Progress { phase: Phase::Evaluate, done, total } => {
                let bar = self
                    .evaluation
                    .get_or_insert_with(|| self.terminal.progress("evaluating", "problem", total as u64));
                bar.update(done as u64, "");
            }
            Event::Progress { phase, done, total } => {
                if let Some(bar) = &self.stage {
                    let before = if self.numbers.is_empty() { "" } else { " · " };
                    bar.detail(&format!("{} {done}/{total}{before}{}", doing(phase), self.numbers));
                }
            }
            Event::Step { step, metrics, .. } => {
                self.done = step;
                self.numbers = numbers(metrics);
                if let Some(bar) = &mut self.stage {
                    bar.update(step, &self.numbers);
                }
            }
            Event::Evaluated { step, metrics } => {
                if let Some(bar) = self.evaluation.take() {
                    bar.clear();
                }
                let Some(accuracy) = metrics.get("eval_accuracy") else { return };
                let (low, high) = (metrics.get("eval_accuracy_low"), metrics.get("eval_accuracy_high"));
                let interval = match low.zip(high) {
                    Some((low, high)) => format!(" (95 % interval {:.1} to {:.1})", 100.0 * low, 100.0 * high),
                    None => String::new(),
                };
                let when = if step == 0 { "before training".to_owned() } else { format!("after step {step}") };
                self.line(&format!("accuracy {when}: {:.1} %{interval}", 100.0 * accuracy));
            }
            Event::Alarm { alarm } => self.line(&format!("referee: {alarm}")),
            Event::GoneBack { step, learning_rate_factor } => {
                self.done = step;
                self.line(&format!(
                    "going back to step {step}, from there with {learning_rate_factor} × the learning rate"
                ));
            }
            Event::Saved { .. } => {}
            Event::Stopping { step } => self.line(&format!("stopping after step {step}: saving")),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Some(bar) = self.stage.take() {
            bar.finish();
        }
        if let Some(bar) = self.evaluation.take() {
            bar.clear();
        }
    }
}
