//! Which text of a conversation is learnt.

use model::chat::{Message, Rendering};

use super::{LossTokens, Pieces, Renderer};
use crate::error::{Error, Result};
use crate::sample::Sample;

impl Renderer<'_> {
    /// Cuts a conversation at the borders of the assistant's turns from message `completion` on, which are learnt.
    ///
    /// A message with `weight` 0 is not. Where a turn ends with a special token, what the template puts after it (a line
    /// break, say) is not part of it: the sampler stops there.
    pub(super) fn conversation(&self, sample: &Sample, messages: &[Message], completion: usize) -> Result<Pieces> {
        let whole = self.render(sample, messages, false)?;
        let end = whole.text().len();
        if self.options.loss == LossTokens::All {
            return Ok(Pieces { rendering: whole, ends: vec![(end, true)], plain: false });
        }
        let from = if self.options.loss == LossTokens::Assistant { 0 } else { completion };
        let turns: Vec<usize> = (from..messages.len()).filter(|&index| messages[index].role() == "assistant").collect();
        if turns.is_empty() {
            let error = Error::row(&sample.source, "no turn of the assistant to learn from");
            return Err(error.with_hint("the roles must be system, user, assistant and tool"));
        }
        let mut ends = Vec::new();
        for turn in turns.into_iter().filter(|&turn| is_weighted(&messages[turn])) {
            let before = self.render(sample, &messages[..turn], true)?;
            let after = self.render(sample, &messages[..=turn], false)?;
            self.check_prefix(sample, turn, &before, &after)?;
            self.check_prefix(sample, turn, &after, &whole)?;
            ends.push((before.text().len(), false));
            ends.push((self.end_of_turn(sample, &after, before.text().len())?, true));
        }
        if ends.is_empty() {
            ends.push((end, false));
        }
        Ok(Pieces { rendering: whole, ends, plain: false })
    }

    fn check_prefix(&self, sample: &Sample, turn: usize, shorter: &Rendering, longer: &Rendering) -> Result<()> {
        if shorter.is_prefix_of(longer) {
            return Ok(());
        }
        let (shorter, longer) = (shorter.text(), longer.text());
        let common = shorter.chars().zip(longer.chars()).take_while(|(a, b)| a == b).count();
        let rest = |text: &str| text.chars().skip(common).take(30).collect::<String>();
        let reason = format!(
            "the chat template renders the conversation up to this turn differently once more follows: {:?} becomes {:?}",
            rest(shorter),
            rest(longer)
        );
        let error = Error::column(&sample.source, format!("messages[{turn}]"), reason);
        Err(error.with_hint(
            "some templates drop earlier reasoning or add a thinking block for generation; make one row per turn with \
             `prompt` and `completion`, set the template's variables, or use loss = \"all\"",
        ))
    }

    /// Where the learnt text of a turn that starts at `start` and ends with `rendering` ends.
    fn end_of_turn(&self, sample: &Sample, rendering: &Rendering, start: usize) -> Result<usize> {
        let text = &rendering.text()[start..];
        let end = start + text.trim_end().len();
        let last = self.encode(sample, rendering, start..end)?.last().copied();
        let ends_special = last.is_some_and(|id| self.tokenizer.is_special(id));
        Ok(if ends_special { end } else { start + text.len() })
    }
}

fn is_weighted(message: &Message) -> bool {
    message.get("weight").and_then(serde_json::Value::as_f64) != Some(0.0)
        && message.get("weight") != Some(&serde_json::Value::Bool(false))
}
