//! Every sequence a row becomes, whatever its type: rows as they are looked at, not yet sorted by who trains on them.

use serde::Serialize;

use super::{DropReason, Example, Renderer, StepwiseExample};
use crate::error::Result;
use crate::sample::{Content, Sample};

/// What a row is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Everything in it is trained on.
    Learn,
    /// Its prompt is answered by the model.
    Answer,
}

/// What a sequence is to its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The row.
    Example,
    /// Its prompt, of which nothing is learnt.
    Prompt,
    /// The better completion, behind the prompt.
    Chosen,
    /// The worse completion, behind the prompt.
    Rejected,
    /// A solution; learnt is the judgement at each step's last token.
    Steps,
}

/// A sequence of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// What it is to its row.
    pub part: Part,
    /// The tokens.
    pub ids: Vec<u32>,
    /// For each token, whether it is learnt.
    pub loss_mask: Vec<bool>,
}

impl Sequence {
    /// How many of its tokens are learnt.
    pub fn learnt(&self) -> usize {
        self.loss_mask.iter().filter(|learnt| **learnt).count()
    }
}

impl From<(Part, Example)> for Sequence {
    fn from((part, example): (Part, Example)) -> Self {
        Self { part, ids: example.ids, loss_mask: example.loss_mask }
    }
}

impl From<StepwiseExample> for Sequence {
    fn from(StepwiseExample { ids, steps, .. }: StepwiseExample) -> Self {
        let mut loss_mask = vec![false; ids.len()];
        for (last, _) in steps {
            loss_mask[last] = true;
        }
        Self { part: Part::Steps, ids, loss_mask }
    }
}

/// What follows a step where nobody says otherwise.
const SEPARATOR: &str = "\n";

impl Renderer<'_> {
    /// The sequences of one sample, or the reason for which it is left out.
    ///
    /// # Errors
    /// Those of the methods that render samples of one type.
    pub fn sequences(&self, sample: &Sample, used: Use) -> Result<std::result::Result<Vec<Sequence>, DropReason>> {
        Ok(match (&sample.content, used) {
            (Content::PromptOnly(_), _) | (_, Use::Answer) => self.prompt_of(0, sample)?.map(|prompt| {
                let loss_mask = vec![false; prompt.ids.len()];
                vec![Sequence { part: Part::Prompt, ids: prompt.ids.to_vec(), loss_mask }]
            }),
            (Content::Preference { .. }, _) => self
                .pair_of(sample)?
                .map(|pair| vec![(Part::Chosen, pair.chosen).into(), (Part::Rejected, pair.rejected).into()]),
            (Content::Ranking { .. }, _) => self.ranking_of(sample)?.map(|ranking| {
                let worse = [ranking.rejected].into_iter().chain(ranking.others);
                let worse = worse.map(|example| (Part::Rejected, example).into());
                std::iter::once((Part::Chosen, ranking.chosen).into()).chain(worse).collect()
            }),
            (Content::UnpairedPreference { .. }, _) => {
                self.labelled_of(sample)?.map(|labelled| vec![(Part::Example, labelled.example).into()])
            }
            (Content::Stepwise { .. }, _) => self.steps_of(sample, SEPARATOR)?.map(|steps| vec![steps.into()]),
            _ => self.example_of(sample)?.map(|example| vec![(Part::Example, example).into()]),
        })
    }
}
