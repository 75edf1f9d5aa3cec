//! Every sequence a row becomes, whatever its type: rows as they are looked at, not yet sorted by who trains on them.

use serde::Serialize;

use super::{DropReason, Example, Renderer, StepwiseExample, unpaired};
use crate::error::Result;
use crate::sample::{Content, Sample};

/// What a row is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use<'a> {
    /// Everything in it is trained on, as its type tells.
    Learn,
    /// Its prompt is answered by the model.
    Answer,
    /// A text is imitated, or forgotten; of several completions the best.
    Imitate,
    /// Completions are compared.
    Compare,
    /// Completions are good or bad.
    Judge,
    /// A completion has a score.
    Score,
    /// Steps are right or wrong, each followed by this text.
    Steps(&'a str),
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
    pub fn sequences(&self, sample: &Sample, used: Use<'_>) -> Result<std::result::Result<Vec<Sequence>, DropReason>> {
        let used = match (used, &sample.content) {
            (Use::Learn, Content::PromptOnly(_)) => Use::Answer,
            (Use::Learn, Content::Preference { .. } | Content::Ranking { .. }) => Use::Compare,
            (Use::Learn, Content::UnpairedPreference { .. }) => Use::Judge,
            (Use::Learn, Content::Stepwise { .. }) => Use::Steps(SEPARATOR),
            (Use::Learn, _) => Use::Imitate,
            (used, _) => used,
        };
        let whole = |example: Example| vec![(Part::Example, example).into()];
        Ok(match used {
            Use::Answer => self.prompt_of(0, sample)?.map(|prompt| {
                let loss_mask = vec![false; prompt.ids.len()];
                vec![Sequence { part: Part::Prompt, ids: prompt.ids.to_vec(), loss_mask }]
            }),
            Use::Compare => self.ranking_of(sample)?.map(|ranking| {
                let worse = [ranking.rejected].into_iter().chain(ranking.others);
                let worse = worse.map(|example| (Part::Rejected, example).into());
                std::iter::once((Part::Chosen, ranking.chosen).into()).chain(worse).collect()
            }),
            Use::Judge => {
                let rows = unpaired(sample);
                let judged = rows.iter().map(|row| self.labelled_of(row)).collect::<Result<Vec<_>>>()?;
                let judged = judged.into_iter().collect::<std::result::Result<Vec<_>, _>>();
                judged.map(|judged| judged.into_iter().flat_map(|labelled| whole(labelled.example)).collect())
            }
            Use::Score => self.scored_of(sample)?.map(|scored| whole(scored.example)),
            Use::Steps(separator) => self.steps_of(sample, separator)?.map(|steps| vec![steps.into()]),
            Use::Learn | Use::Imitate => self.example_of(sample)?.map(whole),
        })
    }
}
