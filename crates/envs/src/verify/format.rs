//! The layout of an answer, whatever it says.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Budget, Place};
use crate::reward::{Reward, RewardError};
use crate::score::{Answer, Score, Status};

/// Options of the `format` reward: 1 when the answer is laid out as asked, 0 otherwise.
///
/// With `tags`, the completion must be `<t1>...</t1><t2>...</t2>...`: each tag opened and closed exactly once, in this order,
/// not nested, and nothing but white space outside. The part `tags` is the fraction of opening and closing tags that occur exactly once.
/// With `boxed`, exactly one `\boxed{...}` with balanced braces must occur (inside the last tag, if there are tags).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FormatOptions {
    /// The tags, in order.
    pub tags: Vec<String>,
    /// Whether a `\boxed{...}` must occur exactly once.
    pub boxed: bool,
    /// Whether the prompt's template has already opened the first tag, so that the completion starts inside it.
    pub first_tag_open: bool,
    /// Steps the verifier may take for one answer; a longer answer is a timeout.
    pub steps: u64,
}

impl Default for FormatOptions {
    fn default() -> Self {
        Self {
            tags: vec!["think".into(), "answer".into()],
            boxed: false,
            first_tag_open: false,
            steps: super::default_steps(),
        }
    }
}

/// See [`FormatOptions`].
pub struct FormatReward {
    name: String,
    options: FormatOptions,
    /// Every opening and closing tag, in order.
    marks: Vec<String>,
}

impl FormatReward {
    /// The reward under a name.
    ///
    /// # Errors
    /// Nothing to check, or an empty or repeated tag.
    pub fn new(name: String, options: FormatOptions) -> Result<Self, RewardError> {
        let refuse = |reason: String| Err(RewardError::Options { reward: name.clone(), reason });
        if options.tags.is_empty() && !options.boxed {
            return refuse("tags is empty and boxed is false, so that nothing is checked; set one of them".into());
        }
        for (index, tag) in options.tags.iter().enumerate() {
            if tag.is_empty() || options.tags[..index].contains(tag) {
                return refuse(format!("tags holds {tag:?}, expected names that are neither empty nor repeated"));
            }
        }
        let marks = options.tags.iter().flat_map(|tag| [format!("<{tag}>"), format!("</{tag}>")]).collect();
        Ok(Self { name, options, marks })
    }

    /// The judgement of one completion.
    pub fn judge(&self, completion: &str) -> Score {
        // Every mark is searched for over the whole text.
        let searches = self.marks.len() as u64 + 2;
        if Budget::new(self.options.steps).spend(searches.saturating_mul(completion.len() as u64)).is_err() {
            return Score::verdict(Status::Timeout);
        }
        let well_formed = self.tags_in_order(completion) && self.one_box(completion);
        let mut score = Score::verdict(if well_formed { Status::Ok } else { Status::Malformed });
        if !self.marks.is_empty() {
            let required = self.required_marks();
            let once = required.iter().filter(|mark| completion.matches(mark.as_str()).count() == 1).count();
            score.parts.push(("tags".into(), once as f64 / required.len() as f64));
        }
        score
    }

    /// The marks that the completion must hold: all but the one that the prompt has opened.
    fn required_marks(&self) -> &[String] {
        &self.marks[usize::from(self.options.first_tag_open && !self.marks.is_empty())..]
    }

    /// Whether the marks partition the text: nothing but white space before an opening tag, no mark inside a tag.
    fn tags_in_order(&self, completion: &str) -> bool {
        let mut rest = completion;
        for mark in self.required_marks() {
            let Some((before, after)) = rest.split_once(mark.as_str()) else { return false };
            let inside = mark.starts_with("</");
            let clean = if inside {
                self.marks.iter().all(|other| !before.contains(other.as_str()))
            } else {
                before.trim().is_empty()
            };
            if !clean {
                return false;
            }
            rest = after;
        }
        self.marks.is_empty() || rest.trim().is_empty()
    }

    fn one_box(&self, completion: &str) -> bool {
        if !self.options.boxed {
            return true;
        }
        let place = match &self.options.tags[..] {
            [] => Some(completion),
            // The prompt has opened it.
            [tag] if self.options.first_tag_open => {
                completion.split_once(&format!("</{tag}>")).map(|(inside, _)| inside)
            }
            [.., tag] => Place::Tag.find(completion, tag),
        };
        completion.matches(r"\boxed{").count() == 1 && place.and_then(|text| Place::Boxed.find(text, "")).is_some()
    }
}

impl Reward for FormatReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        Ok(answers.iter().map(|answer| Some(self.judge(answer.completion))).collect())
    }
}
