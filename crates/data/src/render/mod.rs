//! Samples to tokens and masks.
//!
//! Which tokens are learnt is decided by rendering: the tokens of an assistant's turn are what the template adds to the
//! conversation before it, ready for the assistant, to make the conversation up to its end. Both are text prefixes of
//! the whole, or the row is an error. Each such piece is encoded on its own, so that the tokens of a prompt are those
//! that the sampler sees, whatever follows.
//!
//! Nothing is learnt by accident and nothing disappears in silence: a row that cannot be used is an error that names
//! it, or is counted and named in [`Drops`].

mod conversation;
mod drops;
mod hint;
mod scored;
mod sequences;

use std::sync::Arc;

use model::chat::{ChatTemplate, Message, Rendering};
use model::tokenizer::Tokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use drops::{DropReason, Drops};
pub use scored::{ScoredExample, StepwiseExample};
pub use sequences::{Part, Sequence, Use};

use crate::error::{Error, Result};
use crate::row::Source;
use crate::sample::{Content, Sample, Text};

/// How samples become tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RenderOptions {
    /// Longest sequence, in tokens; for prompts the longest prompt. Without it, the model's context.
    pub max_length: Option<usize>,
    /// What happens to longer sequences: `drop` (counted and named), `truncate` or `error`.
    pub overlong: Overlong,
    /// Which tokens are learnt: `completion`, `assistant` or `all`.
    pub loss: LossTokens,
    /// Read the names of special tokens in plain text (`text`, `prompt`, `completion`) as these tokens, for text that was
    /// rendered with a chat template before. Messages are never read so.
    pub special_tokens_in_text: bool,
}

/// What happens to a sequence that is too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// The row is left out, counted and named.
    #[default]
    Drop,
    /// The end is cut off; the row is left out when nothing to learn remains. Prompts are never cut, but left out.
    Truncate,
    /// The run stops and names the row.
    Error,
}

/// Which tokens are learnt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossTokens {
    /// The completion of rows with a prompt; the assistant's turns of `messages`; all of plain `text`.
    #[default]
    Completion,
    /// The assistant's turns, those in the prompt too. Plain text as with `completion`.
    Assistant,
    /// Every token.
    All,
}

/// Tokens to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The tokens.
    pub ids: Vec<u32>,
    /// For each token, whether it is learnt. The last one always is, and the first never: nothing predicts it.
    pub loss_mask: Vec<bool>,
    /// Where the example comes from.
    pub source: Source,
}

impl Example {
    /// The number of tokens before the first that is learnt: the prompt's, where there is one.
    pub fn given(&self) -> usize {
        self.loss_mask.iter().take_while(|&&learnt| !learnt).count()
    }
}

/// A prompt to complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Index of its row among all rows, those left out counted too, so that it does not depend on what is left out.
    pub id: u32,
    /// The tokens.
    pub ids: Arc<[u32]>,
    /// The text of the tokens.
    pub text: String,
    /// The conversation, for prompts that are one.
    pub messages: Option<Vec<Message>>,
    /// All columns of the row, for rewards.
    pub columns: Map<String, Value>,
    /// Where the prompt comes from.
    pub source: Source,
}

/// Two completions of one prompt, or a ranking of more, each with the prompt in front.
#[derive(Clone, Debug, PartialEq)]
pub struct PreferencePair {
    /// The better one.
    pub chosen: Example,
    /// The worse one.
    pub rejected: Example,
    /// In a ranking, those that are worse still, from better to worse.
    pub others: Vec<Example>,
    /// By how much the better one should be ahead: the column `margin`, or 0.
    pub margin: f64,
    /// The group that the pair belongs to: the column `group`, where the row has it.
    pub group: Option<String>,
    /// One that is right beyond comparison, where the row has it.
    pub reference: Option<Example>,
}

impl PreferencePair {
    /// A pair and nothing more: no margin, no group, no others, no reference completion.
    pub fn new(chosen: Example, rejected: Example) -> Self {
        Self { chosen, rejected, others: Vec::new(), margin: 0.0, group: None, reference: None }
    }

    /// The completions: chosen, rejected, others, reference.
    pub fn completions(&self) -> impl Iterator<Item = &Example> {
        [&self.chosen, &self.rejected].into_iter().chain(&self.others).chain(&self.reference)
    }

    /// Tokens that all completions begin with, before anything is learnt: the prompt, which needs to be computed only once.
    pub fn shared_tokens(&self) -> usize {
        let common = |other: &Example| self.chosen.ids.iter().zip(&other.ids).take_while(|(a, b)| a == b).count();
        self.completions().map(|example| example.given().min(common(example))).min().unwrap_or(0)
    }
}

/// A completion that is good or bad.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledExample {
    /// Prompt and completion.
    pub example: Example,
    /// Whether the completion is good.
    pub label: bool,
}

/// What came of samples: what was rendered, and what was left out and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered<T> {
    /// In the order of the rows.
    pub items: Vec<T>,
    /// The rows that were left out.
    pub drops: Drops,
}

/// Renders samples for one model.
#[derive(Clone, Copy, Debug)]
pub struct Renderer<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    options: &'a RenderOptions,
    limit: usize,
}

/// A row rendered, or the reason for which it is left out.
type Outcome<T> = std::result::Result<T, DropReason>;

/// Text cut into pieces that are encoded one by one, and whether each is learnt.
struct Pieces {
    rendering: Rendering,
    /// Ends of the pieces in the text, in bytes, ascending.
    ends: Vec<(usize, bool)>,
    /// Whether the tokens that begin and end a sequence are put around the text: templates bring their own.
    plain: bool,
}

impl<'a> Renderer<'a> {
    /// Renders for the model with this tokenizer, chat template and longest sequence (`context`).
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        context: usize,
        options: &'a RenderOptions,
    ) -> Self {
        let limit = options.max_length.map_or(context, |length| length.min(context));
        Self { tokenizer, template, options, limit }
    }

    /// Renders language-modeling, prompt-completion and token rows, and the chosen completions of preference rows, the best ones
    /// of rankings.
    pub fn examples(&self, samples: &[Sample]) -> Result<Rendered<Example>> {
        self.each(samples, |_, sample| self.example_of(sample))
    }

    fn example_of(&self, sample: &Sample) -> Result<Outcome<Example>> {
        match &sample.content {
            Content::LanguageModeling(Text::Plain(text)) => self.example(sample, self.plain("", text)),
            Content::LanguageModeling(Text::Messages(messages)) => {
                self.example(sample, self.conversation(sample, messages, 0)?)
            }
            Content::PromptCompletion { prompt, completion }
            | Content::Preference { prompt, chosen: completion, .. } => self.completion(sample, prompt, completion),
            Content::Ranking { prompt, completions } => self.completion(sample, prompt, &completions[0]),
            Content::Tokens { ids, loss_mask } => self.finish(sample, ids.clone(), loss_mask.clone()),
            _ => Err(unexpected(sample, "language-modeling, prompt-completion or tokens")),
        }
    }

    /// Renders the prompts of prompt-only rows, and of any other rows that have one. `messages` that end with another's
    /// turn are a prompt too.
    pub fn prompts(&self, samples: &[Sample]) -> Result<Rendered<Prompt>> {
        self.each(samples, |id, sample| self.prompt_of(id, sample))
    }

    fn prompt_of(&self, id: u32, sample: &Sample) -> Result<Outcome<Prompt>> {
        let prompt = sample.content.prompt().ok_or_else(|| unexpected(sample, "rows with a prompt"))?;
        self.prompt(id, sample, prompt.clone())
    }

    /// Renders preference rows. A ranking counts as all of its pairs.
    pub fn preferences(&self, samples: &[Sample]) -> Result<Rendered<PreferencePair>> {
        let pairs: Vec<Sample> = samples.iter().flat_map(pairs).collect();
        self.each(&pairs, |_, sample| self.pair_of(sample))
    }

    /// Renders rankings. A preference row is one of two completions.
    pub fn rankings(&self, samples: &[Sample]) -> Result<Rendered<PreferencePair>> {
        self.each(samples, |_, sample| self.ranking_of(sample))
    }

    fn ranking_of(&self, sample: &Sample) -> Result<Outcome<PreferencePair>> {
        let Content::Ranking { prompt, completions } = &sample.content else { return self.pair_of(sample) };
        let rendered = completions.iter().map(|text| self.completion(sample, prompt, text));
        let group = scored::name(sample, "group")?;
        let rendered: Outcome<Vec<Example>> = rendered.collect::<Result<Vec<_>>>()?.into_iter().collect();
        Ok(rendered.and_then(|completions| {
            let mut completions = completions.into_iter();
            let (Some(chosen), Some(rejected)) = (completions.next(), completions.next()) else {
                return Err(DropReason::NothingToLearn);
            };
            let others = completions.collect();
            Ok(PreferencePair { chosen, rejected, others, margin: 0.0, group: group.clone(), reference: None })
        }))
    }

    fn pair_of(&self, sample: &Sample) -> Result<Outcome<PreferencePair>> {
        let Content::Preference { prompt, chosen, rejected, reference } = &sample.content else {
            return Err(unexpected(sample, "preference"));
        };
        let chosen = self.completion(sample, prompt, chosen)?;
        let rejected = self.completion(sample, prompt, rejected)?;
        let reference = reference.as_ref().map(|text| self.completion(sample, prompt, text)).transpose()?;
        let margin = scored::number(sample, "margin")?.unwrap_or(0.0);
        let group = scored::name(sample, "group")?;
        Ok((|| {
            let (chosen, rejected, reference) = (chosen?, rejected?, reference.transpose()?);
            Ok(PreferencePair { chosen, rejected, others: Vec::new(), reference, margin, group })
        })())
    }

    /// Renders unpaired preference rows. A preference row counts as two of them: its chosen completion is good, its rejected
    /// one bad.
    pub fn labelled(&self, samples: &[Sample]) -> Result<Rendered<LabelledExample>> {
        let unpaired: Vec<Sample> = samples.iter().flat_map(unpaired).collect();
        self.each(&unpaired, |_, sample| self.labelled_of(sample))
    }

    fn labelled_of(&self, sample: &Sample) -> Result<Outcome<LabelledExample>> {
        let Content::UnpairedPreference { prompt, completion, label } = &sample.content else {
            return Err(unexpected(sample, "unpaired preference or preference"));
        };
        let example = self.completion(sample, prompt, completion)?;
        Ok(example.map(|example| LabelledExample { example, label: *label }))
    }

    fn each<T>(&self, samples: &[Sample], render: impl Fn(u32, &Sample) -> Result<Outcome<T>>) -> Result<Rendered<T>> {
        let mut rendered = Rendered { items: Vec::with_capacity(samples.len()), drops: Drops::default() };
        for (id, sample) in (0..).zip(samples) {
            match render(id, sample)? {
                Ok(item) => rendered.items.push(item),
                Err(reason) => rendered.drops.add(reason, sample.source.clone()),
            }
        }
        if rendered.items.is_empty() {
            return Err(Error::Empty(match samples.len() {
                0 => "no samples were given".into(),
                count => format!("all {count} were left out: {}", rendered.drops),
            }));
        }
        Ok(rendered)
    }

    fn completion(&self, sample: &Sample, prompt: &Text, completion: &Text) -> Result<Outcome<Example>> {
        match (prompt, completion) {
            (Text::Plain(prompt), Text::Plain(completion)) => self.example(sample, self.plain(prompt, completion)),
            (Text::Messages(prompt), Text::Messages(completion)) => {
                let messages = [prompt.as_slice(), completion].concat();
                self.example(sample, self.conversation(sample, &messages, prompt.len())?)
            }
            _ => Err(Error::row(&sample.source, "prompt and completion must be both plain or both conversational")),
        }
    }

    /// Plain text: what is given and what is learnt.
    fn plain(&self, given: &str, learnt: &str) -> Pieces {
        let rendering = self.text(&format!("{given}{learnt}"));
        let end = rendering.text().len();
        let ends = if self.options.loss == LossTokens::All || given.is_empty() {
            vec![(end, true)]
        } else {
            vec![(given.len(), false), (end, true)]
        };
        Pieces { rendering, ends, plain: true }
    }

    fn text(&self, text: &str) -> Rendering {
        if self.options.special_tokens_in_text {
            Rendering::trusted(text)
        } else {
            Rendering::ordinary(self.tokenizer, text)
        }
    }

    fn begin(&self) -> Vec<u32> {
        self.tokenizer.bos().filter(|_| self.tokenizer.adds_bos()).into_iter().collect()
    }

    fn example(&self, sample: &Sample, pieces: Pieces) -> Result<Outcome<Example>> {
        let mut ids = if pieces.plain { self.begin() } else { Vec::new() };
        let mut loss_mask = vec![self.options.loss == LossTokens::All; ids.len()];
        let mut from = 0;
        for (end, learnt) in pieces.ends {
            ids.extend(self.encode(sample, &pieces.rendering, from..end)?);
            loss_mask.resize(ids.len(), learnt);
            from = end;
        }
        if pieces.plain
            && let Some(eos) = self.tokenizer.eos()
            && ids.last() != Some(&eos)
        {
            ids.push(eos);
            loss_mask.push(true);
        }
        self.finish(sample, ids, loss_mask)
    }

    /// Checks tokens and masks and settles their length.
    fn finish(&self, sample: &Sample, mut ids: Vec<u32>, mut loss_mask: Vec<bool>) -> Result<Outcome<Example>> {
        let vocabulary = self.tokenizer.vocab_size();
        if let Some(index) = ids.iter().position(|&id| id as usize >= vocabulary) {
            let reason = format!("expected a token below {vocabulary}, got {}", ids[index]);
            return Err(Error::column(&sample.source, format!("input_ids[{index}]"), reason));
        }
        self.refuse_doubled_begin(sample, &ids)?;
        // Nothing predicts the first token, and nothing is learnt after the last that is learnt.
        if let Some(first) = loss_mask.first_mut() {
            *first = false;
        }
        let used = |loss_mask: &[bool]| loss_mask.iter().rposition(|&learnt| learnt).map_or(0, |last| last + 1);
        let length = used(&loss_mask);
        if length == 0 {
            return Ok(Err(DropReason::NothingToLearn));
        }
        ids.truncate(length);
        loss_mask.truncate(length);
        if let Some(reason) = self.too_long(sample, length)? {
            if self.options.overlong == Overlong::Drop {
                return Ok(Err(reason));
            }
            let length = used(&loss_mask[..self.limit]);
            if length == 0 {
                return Ok(Err(DropReason::CompletionCutOff));
            }
            ids.truncate(length);
            loss_mask.truncate(length);
        }
        Ok(Ok(Example { ids, loss_mask, source: sample.source.clone() }))
    }

    fn prompt(&self, id: u32, sample: &Sample, text: Text) -> Result<Outcome<Prompt>> {
        let (rendering, mut ids, messages) = match text {
            Text::Plain(text) => (self.text(&text), self.begin(), None),
            Text::Messages(messages) => {
                if messages.last().is_some_and(|message| message.role() == "assistant") {
                    let error = Error::row(&sample.source, "the prompt ends with the assistant's turn");
                    return Err(error.with_hint("leave out the last message, or move it to `completion`"));
                }
                (self.render(sample, &messages, true)?, Vec::new(), Some(messages))
            }
        };
        ids.extend(self.encode(sample, &rendering, 0..rendering.text().len())?);
        if ids.is_empty() {
            return Err(Error::column(&sample.source, "prompt", "no tokens"));
        }
        self.refuse_doubled_begin(sample, &ids)?;
        if let Some(reason) = self.too_long(sample, ids.len())? {
            return Ok(Err(reason));
        }
        let (text, columns, source) = (rendering.text().to_owned(), sample.columns.clone(), sample.source.clone());
        Ok(Ok(Prompt { id, ids: ids.into(), text, messages, columns, source }))
    }

    /// The reason to shorten or leave out a sequence of this length, if there is one.
    fn too_long(&self, sample: &Sample, length: usize) -> Result<Option<DropReason>> {
        if length <= self.limit {
            return Ok(None);
        }
        if self.options.overlong == Overlong::Error {
            let reason = format!("{length} tokens, expected at most {}", self.limit);
            let error = Error::row(&sample.source, reason);
            return Err(
                error.with_hint("raise max_length within the model's context, or set overlong to drop or truncate")
            );
        }
        Ok(Some(DropReason::TooLong))
    }

    fn refuse_doubled_begin(&self, sample: &Sample, ids: &[u32]) -> Result<()> {
        match (self.tokenizer.bos(), ids) {
            (Some(bos), &[first, second, ..]) if first == bos && second == bos => {
                let token = self.tokenizer.token(bos).unwrap_or_default();
                Err(Error::DoubledBegin { at: sample.source.clone(), token })
            }
            _ => Ok(()),
        }
    }

    fn encode(&self, sample: &Sample, rendering: &Rendering, range: std::ops::Range<usize>) -> Result<Vec<u32>> {
        rendering.encode_range(self.tokenizer, range).map_err(|error| Error::row(&sample.source, error.to_string()))
    }

    fn render(&self, sample: &Sample, messages: &[Message], add_generation_prompt: bool) -> Result<Rendering> {
        let template = self.template.ok_or_else(|| {
            let error = Error::row(&sample.source, "the row is a conversation, and the model has no chat template");
            error.with_hint("use plain text columns, or a model with a chat template")
        })?;
        template
            .rendering(self.tokenizer, messages, sample.tools.as_deref(), add_generation_prompt)
            .map_err(|error| Error::row(&sample.source, error.to_string()))
    }
}

/// A preference row as two judgements; any other as it is.
fn unpaired(sample: &Sample) -> Vec<Sample> {
    let Content::Preference { prompt, chosen, rejected, .. } = &sample.content else { return vec![sample.clone()] };
    let judged = |completion: &Text, label: bool| {
        let content = Content::UnpairedPreference { prompt: prompt.clone(), completion: completion.clone(), label };
        Sample { content, ..sample.clone() }
    };
    vec![judged(chosen, true), judged(rejected, false)]
}

/// A ranking as its pairs; any other row as it is.
fn pairs(sample: &Sample) -> Vec<Sample> {
    let Content::Ranking { prompt, completions } = &sample.content else { return vec![sample.clone()] };
    let pair = |chosen: &Text, rejected: &Text| {
        let (prompt, chosen, rejected) = (prompt.clone(), chosen.clone(), rejected.clone());
        Sample { content: Content::Preference { prompt, chosen, rejected, reference: None }, ..sample.clone() }
    };
    let worse = |better: usize| completions[better + 1..].iter();
    (0..completions.len())
        .flat_map(|better| worse(better).map(|text| pair(&completions[better], text)).collect::<Vec<_>>())
        .collect()
}

fn unexpected(sample: &Sample, expected: &str) -> Error {
    Error::row(&sample.source, format!("expected {expected}, got a {} row", sample.content.kind()))
}
