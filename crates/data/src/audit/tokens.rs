//! What training would see: tokens, masks, and what begins and ends them.

use model::chat::{ChatTemplate, Message};
use model::tokenizer::Tokenizer;
use serde::Serialize;

use super::{Check, Finding, Severity};
use crate::render::{Overlong, Part, RenderOptions, Sequence};
use crate::sample::{Content, Kind, Sample, Text};

/// A stretch of a sequence that is learnt as a whole or not at all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// Its text, special tokens by their names.
    pub text: String,
    /// Whether it is learnt.
    pub learnt: bool,
}

/// Cuts a sequence where its mask changes.
pub fn pieces(tokenizer: &Tokenizer, sequence: &Sequence) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut shown = String::new();
    let mut end = 0;
    for run in sequence.loss_mask.chunk_by(|a, b| a == b) {
        end += run.len();
        // Some tokenizers drop the space before the first word of what they decode, so pieces are cut from the whole.
        let mut text = tokenizer.decode_with_special(&sequence.ids[..end]);
        if end < sequence.ids.len() {
            // A character of which only a part is there goes to the piece that completes it.
            text.truncate(text.trim_end_matches(char::REPLACEMENT_CHARACTER).len());
        }
        let piece = match text.strip_prefix(&shown) {
            Some(rest) => rest.to_owned(),
            None => tokenizer.decode_with_special(&sequence.ids[end - run.len()..end]),
        };
        pieces.push(Piece { text: piece, learnt: run[0] });
        shown = text;
    }
    pieces
}

/// Looks at the sequences of samples, one by one.
pub(super) struct Inspector<'a> {
    pub tokenizer: &'a Tokenizer,
    pub rendering: &'a RenderOptions,
    /// Longest sequence.
    pub limit: usize,
}

impl Inspector<'_> {
    /// What is wrong with a sequence of `sample`, which was rendered to its full length.
    pub fn look(&self, sample: &Sample, sequence: &Sequence) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut find = |severity, check, detail: String| {
            findings.push(Finding { severity, check, at: Some(sample.source.clone()), detail });
        };
        let name = |id: u32| self.tokenizer.token(id).unwrap_or_default();
        if let (true, Some(bos)) = (self.tokenizer.adds_bos(), self.tokenizer.bos())
            && sample.content.kind() != Kind::Tokens
            && sequence.ids.first() != Some(&bos)
        {
            find(Severity::Warning, Check::MissingBos, format!("{} begins without {}", of(sequence), name(bos)));
        }
        let trained = matches!(sequence.part, Part::Example | Part::Chosen | Part::Rejected);
        if trained && !self.ends_are_learnt(sequence) {
            // Rows of tokens may be pieces of a longer text.
            let severity = match sample.content.kind() {
                Kind::Tokens => Severity::Warning,
                _ => Severity::Error,
            };
            let detail = match self.tokenizer.eos() {
                Some(eos) => format!("{} is learnt without {} or another end at its end", of(sequence), name(eos)),
                None => format!("{} is learnt without an end: the tokenizer has no end of sequence", of(sequence)),
            };
            find(severity, Check::MissingEos, detail);
        }
        if sequence.ids.len() > self.limit {
            let (length, limit) = (sequence.ids.len(), self.limit);
            let learnt = |mask: &[bool]| mask.iter().filter(|learnt| **learnt).count();
            let (all, kept) = (learnt(&sequence.loss_mask), learnt(&sequence.loss_mask[..limit]));
            let size = format!("{} has {length} tokens of at most {limit}", of(sequence));
            match self.rendering.overlong {
                Overlong::Error => find(Severity::Error, Check::TooLong, format!("{size}: training refuses it")),
                Overlong::Truncate if trained && kept > 0 => {
                    let detail =
                        format!("{size}: {} of {all} learnt tokens are cut off, the end among them", all - kept);
                    find(Severity::Warning, Check::TruncatedCompletion, detail);
                }
                _ => find(Severity::Warning, Check::TooLong, format!("{size}: it is left out")),
            }
        }
        findings
    }

    /// Whether each learnt stretch ends with a special token, but for white space after it: only so is the end learnt.
    fn ends_are_learnt(&self, sequence: &Sequence) -> bool {
        let mut end = 0;
        sequence.loss_mask.chunk_by(|a, b| a == b).all(|run| {
            end += run.len();
            let ids = &sequence.ids[end - run.len()..end];
            let last = ids.iter().rev().find(|&&id| {
                self.tokenizer.is_special(id) || !self.tokenizer.decode_with_special(&[id]).trim().is_empty()
            });
            !run[0] || last.is_some_and(|&id| self.tokenizer.is_special(id) || self.tokenizer.eos() == Some(id))
        })
    }
}

/// A sequence in the middle of a sentence.
fn of(sequence: &Sequence) -> &'static str {
    match sequence.part {
        Part::Example => "the sequence",
        Part::Prompt => "the prompt",
        Part::Chosen => "the chosen completion, with its prompt,",
        Part::Rejected => "the rejected completion, with its prompt,",
        Part::Steps => "the solution",
    }
}

/// Whether a template opens the assistant's turn when it is asked to.
pub(super) fn template_findings(template: &ChatTemplate, samples: &[Sample]) -> Option<Finding> {
    let sample = samples.iter().find(|sample| !conversation(&sample.content).is_empty())?;
    let messages: Vec<Message> = conversation(&sample.content).to_vec();
    let before = messages.iter().take_while(|message| message.role() != "assistant").count();
    let render = |ready| template.render(&messages[..before], sample.tools.as_deref(), ready).ok();
    (before > 0 && render(true)? == render(false)?).then(|| Finding {
        severity: Severity::Warning,
        check: Check::NoGenerationPrompt,
        at: Some(sample.source.clone()),
        detail: "the chat template does not open the assistant's turn: the model has to write its header itself".into(),
    })
}

/// The messages of a sample up to its completion; none where it is plain text.
fn conversation(content: &Content) -> &[Message] {
    match content {
        Content::LanguageModeling(Text::Messages(messages))
        | Content::PromptOnly(Text::Messages(messages))
        | Content::PromptCompletion { prompt: Text::Messages(messages), .. }
        | Content::Preference { prompt: Text::Messages(messages), .. }
        | Content::Ranking { prompt: Text::Messages(messages), .. }
        | Content::UnpairedPreference { prompt: Text::Messages(messages), .. } => messages,
        _ => &[],
    }
}
