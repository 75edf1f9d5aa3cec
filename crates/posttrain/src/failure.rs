//! What a user sees when something goes wrong: what, where, expected and got, then a `hint:` line.

use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use base::Hint;
use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme, LabeledSpan, NamedSource, SourceCode};

/// The exit codes of the binary, documented in `docs/exit-codes.md`.
pub mod exit {
    /// Everything was done.
    pub const DONE: u8 = 0;
    /// It could not be done; standard error says why.
    pub const FAILED: u8 = 1;
    /// The command line was wrong.
    pub const USAGE: u8 = 2;
    /// The referee stopped the run; everything was saved.
    pub const ALARMED: u8 = 3;
    /// Ctrl-C: the step was finished and saved.
    pub const INTERRUPTED: u8 = 130;
}

/// A text and its name, to show an error in its place.
pub type Source = Arc<NamedSource<String>>;

/// An error on its way to the user.
#[derive(Debug)]
pub struct Failure {
    message: String,
    causes: Vec<String>,
    hint: Option<String>,
    place: Option<Box<(Source, LabeledSpan)>>,
    exit: u8,
}

impl Failure {
    /// A failure with this message: lower-case, without a full stop.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), causes: Vec::new(), hint: None, place: None, exit: exit::FAILED }
    }

    /// The work was stopped by Ctrl-C after everything had been saved.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self { exit: exit::INTERRUPTED, ..Self::new(message) }
    }

    /// The referee stopped the run after everything had been saved.
    pub fn alarmed(message: impl Into<String>) -> Self {
        Self { exit: exit::ALARMED, ..Self::new(message) }
    }

    /// A mistake on the command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { exit: exit::USAGE, ..Self::new(message) }
    }

    /// An error with its causes and its advice.
    pub fn advised(error: &dyn Hint) -> Self {
        let message = error.to_string();
        let mut causes = Vec::new();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Many messages already end with their cause.
            if !message.contains(&text) && !causes.contains(&text) {
                causes.push(text);
            }
            source = cause.source();
        }
        Self { hint: error.hint(), causes, ..Self::new(message) }
    }

    /// Adds advice: one sentence, lower-case, without a full stop.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Shows the failure in its place: `span` is a byte range of `source`, `label` stands under it.
    pub fn at(mut self, source: &Source, span: Range<usize>, label: impl Into<String>) -> Self {
        self.place = Some(Box::new((source.clone(), LabeledSpan::new_with_span(Some(label.into()), span))));
        self
    }

    /// The exit code that tells scripts what happened.
    pub fn exit_code(&self) -> u8 {
        self.exit
    }

    /// The text for standard error.
    pub fn render(&self, color: bool) -> String {
        let mut theme = if color { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
        theme.characters.error = "error:".to_owned();
        let handler = GraphicalReportHandler::new_themed(theme)
            .with_links(false)
            .with_wrap_lines(false)
            .with_context_lines(1)
            .without_syntax_highlighting();
        let mut text = String::new();
        // Writing into a `String` cannot fail; should the renderer give up all the same, the message must not be lost.
        if handler.render_report(&mut text, &Shown(self)).is_err() {
            text = format!("  error: {self}\n");
        }
        if let Some(hint) = &self.hint {
            text += &format!("  hint: {hint}\n");
        }
        // miette indents everything by two columns.
        text.lines()
            .filter(|line| !line.is_empty())
            .fold(String::new(), |shown, line| shown + line.strip_prefix("  ").unwrap_or(line).trim_end() + "\n")
    }
}

impl<E: Hint + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::advised(&error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)?;
        self.causes.iter().try_for_each(|cause| write!(formatter, ": {cause}"))
    }
}

/// A failure as miette sees it. (`Failure` itself is no [`Error`]: it converts from every error that has a hint.)
#[derive(Debug)]
struct Shown<'a>(&'a Failure);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl Error for Shown<'_> {}

impl Diagnostic for Shown<'_> {
    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.0.place.as_ref().map(|place| place.0.as_ref() as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let place = self.0.place.as_ref()?;
        Some(Box::new(std::iter::once(place.1.clone())))
    }
}
