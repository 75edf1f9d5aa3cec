//! A model in an environment: conversations whose other side is a world.
//!
//! Every conversation has a world of its own, begun from the row of its prompt. What comes of it is the [`Episode`], in
//! tokens, beside the [`Trace`]: the reward and the verdict of every turn.

use std::error::Error as StdError;
use std::sync::{Mutex, PoisonError};

use base::Hint;
use data::{Prompt, Source};
use envs::environment::{EPISODE_COLUMN, EnvironmentError, Trace, episode_of};
use envs::{Environment, EnvironmentConfig, Score};
use model::chat::{ChatTemplate, Message};
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use rollout::{
    ConversationOptions, Dialogue, Episode, Generator, Opening, Progress, Request, Respondent, Response, TurnEnd,
};
use serde_json::Value;

/// Where a model plays, and how long.
#[derive(Clone, Copy)]
pub struct World<'a> {
    /// The environment.
    pub environment: &'a EnvironmentConfig,
    /// The model's chat template.
    pub template: &'a ChatTemplate,
    /// The limits of conversations.
    pub conversation: &'a ConversationOptions,
}

/// A conversation with an environment.
#[derive(Clone, Debug, PartialEq)]
pub struct Played {
    /// Its tokens.
    pub episode: Episode,
    /// What the environment made of its turns: one entry for each of the episode's.
    pub trace: Trace,
}

/// Why an environment could not be played.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlayError {
    /// Its options.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// A prompt that is not the beginning of an episode.
    #[error("{origin}: {reason}")]
    Row {
        /// Where the prompt comes from.
        origin: Source,
        /// What it lacks.
        reason: String,
    },
    /// The model could not answer.
    #[error(transparent)]
    Generation(#[from] rollout::Error),
}

impl Hint for PlayError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Environment(error) => error.hint(),
            Self::Row { .. } => {
                Some("prompts come from `[environment]` itself: leave out `[[tasks]]` and `[data]`".into())
            }
            Self::Generation(error) => error.hint(),
        }
    }
}

/// Plays the episodes of these requests, where request `i` continues the prompt `prompts[i]`. The decoder must be prepared.
///
/// # Errors
/// See [`PlayError`].
pub fn play(
    generator: &Generator<'_>,
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    world: World<'_>,
    requests: &[Request],
    prompts: &[&Prompt],
    on_progress: impl FnMut(Progress<'_>),
) -> Result<Vec<Played>, PlayError> {
    let seats = prompts.iter().map(|prompt| Seat::new(world.environment, prompt)).collect::<Result<Vec<_>, _>>()?;
    let openings: Vec<Opening<'_>> = prompts
        .iter()
        .map(|prompt| Opening {
            messages: prompt.messages.as_deref().unwrap_or_default(),
            tools: prompt.columns.get("tools").and_then(Value::as_array).map(Vec::as_slice),
        })
        .collect();
    let seats = Seats(seats.into_iter().map(Mutex::new).collect());
    let dialogue =
        Dialogue { template: world.template, openings: &openings, respondent: &seats, options: world.conversation };
    let episodes = generator.converse(decoder, tokenizer, requests, &dialogue, on_progress)?;
    let traces = seats.0.into_iter().map(|seat| seat.into_inner().unwrap_or_else(PoisonError::into_inner).trace);
    Ok(episodes.into_iter().zip(traces).map(|(episode, trace)| Played { episode, trace }).collect())
}

/// One conversation's world.
struct Seat {
    environment: Box<dyn Environment>,
    trace: Trace,
}

impl Seat {
    fn new(config: &EnvironmentConfig, prompt: &Prompt) -> Result<Self, PlayError> {
        let lacks = |reason: String| PlayError::Row { origin: prompt.source.clone(), reason };
        if prompt.messages.is_none() {
            return Err(lacks("the prompt is plain text, expected messages".into()));
        }
        let episode = episode_of(&prompt.columns)
            .ok_or_else(|| lacks(format!("the row has no column {EPISODE_COLUMN:?} with an episode's numbers")))?;
        let mut environment = config.build()?;
        environment.reset(episode);
        Ok(Self { environment, trace: Trace::default() })
    }
}

/// The worlds of all conversations.
struct Seats(Vec<Mutex<Seat>>);

impl Respondent for Seats {
    fn respond(&self, turn: TurnEnd<'_>) -> Result<Response, Box<dyn StdError + Send + Sync>> {
        let mut seat = self.0[turn.conversation].lock().unwrap_or_else(PoisonError::into_inner);
        let transition = seat.environment.step(turn.text);
        seat.trace.push(&transition);
        if transition.done {
            return Ok(Response::End);
        }
        let observer = seat.environment.observer();
        Ok(Response::Continue(transition.observations.iter().map(|text| Message::new(observer, text)).collect()))
    }
}

/// The scores of played episodes: what the environment pays, under its name, and what further rewards say, where they
/// apply. The verdict is the environment's.
pub fn scores<'a>(
    environment: &str,
    traces: impl IntoIterator<Item = &'a Trace>,
    further: Vec<Option<Score>>,
) -> Vec<Option<Score>> {
    let score = |(trace, further): (&Trace, Option<Score>)| {
        let mut score = trace.score();
        score.parts.push((environment.to_owned(), score.value));
        if let Some(further) = further {
            score.value += further.value;
            score.parts.extend(further.parts);
        }
        Some(score)
    };
    traces.into_iter().zip(further).map(score).collect()
}
