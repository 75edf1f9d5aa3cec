//! What a mixture of models is found from: responses to prompts, and their log-probabilities under every model
//! ([`mod@objectives::mixing`]).

use base::{Purpose, Random};
use data::Prompt;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use objectives::mixing::{Response, descend};
use rollout::{Episode, Generator, Request, Result, SamplingOptions, scoring};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::options::{OptionError, check};

pub use objectives::mixing::Pool;

/// Who gives the responses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Proposal {
    /// The model that the others were trained from.
    #[default]
    Reference,
    /// The others in turn, each response counted by its probability under all of them: where the reference hardly ever answers as they do.
    Models,
}

/// How a pool of responses is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PoolOptions {
    /// Who gives the responses.
    pub proposal: Proposal,
    /// Responses to each prompt.
    #[schemars(range(min = 1))]
    pub responses: u32,
    /// Longest response, in tokens.
    #[schemars(range(min = 1))]
    pub max_new_tokens: usize,
    /// Sequences decoded at once. Results do not depend on it.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self { proposal: Proposal::Reference, responses: 16, max_new_tokens: 256, batch_size: 32 }
    }
}

impl PoolOptions {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> std::result::Result<(), OptionError> {
        check("responses", self.responses, self.responses > 0, "at least 1")?;
        check("max_new_tokens", self.max_new_tokens, self.max_new_tokens > 0, "at least 1")?;
        check("batch_size", self.batch_size, self.batch_size > 0, "at least 1")
    }
}

/// Responses at temperature 1, without filters: what they are drawn from must be a model's own law.
///
/// All models are prepared, and share tokens and chat template. Returned with the number of tokens of all prompts and responses.
///
/// # Errors
/// A model that cannot answer, or refuses the answers.
pub fn pool(
    reference: &Decoder,
    models: &[&Decoder],
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    options: &PoolOptions,
    seed: u64,
) -> Result<(Pool, usize)> {
    let episodes = responses(reference, models, tokenizer, prompts, options, seed)?;
    let of_reference = scoring::log_probs(reference, &episodes, 1.0)?;
    let of_models: Vec<Vec<f64>> =
        models.iter().map(|model| scoring::log_probs(model, &episodes, 1.0)).collect::<Result<_>>()?;
    let response = |index: usize| {
        let log_probs: Vec<f64> = of_models.iter().map(|model| model[index]).collect();
        let proposal = match options.proposal {
            Proposal::Reference => of_reference[index],
            Proposal::Models => log_mean_exp(&log_probs),
        };
        Response::new(&log_probs, of_reference[index], proposal)
    };
    let all: Vec<Response> = (0..episodes.len()).map(response).collect();
    let prompts = all.chunks(options.responses as usize).map(<[Response]>::to_vec).collect();
    let tokens = episodes.iter().map(|episode| episode.prompt.len() + episode.completion.len()).sum();
    Ok((Pool { prompts }, tokens))
}

/// The weights for which the worst-off objective is best off, by mirror descent of so many steps, each on the responses to one prompt of the pool.
pub fn weights(pool: &Pool, rate: f64, steps: u32, seed: u64) -> Vec<f64> {
    let models = pool.prompts.iter().flatten().next().map_or(0, |response| response.log_ratios.len());
    let random = Random::new(seed, Purpose::Shuffle);
    let batch = |step: u32| &pool.prompts[random.at(step).below(pool.prompts.len() as u64) as usize][..];
    let batches: Vec<&[Response]> = (0..if models == 0 { 0 } else { steps }).map(batch).collect();
    descend(models, rate, batches.into_iter())
}

/// The responses to each prompt, in the order of the prompts.
fn responses(
    reference: &Decoder,
    models: &[&Decoder],
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    options: &PoolOptions,
    seed: u64,
) -> Result<Vec<Episode>> {
    let sampling = SamplingOptions { max_new_tokens: options.max_new_tokens, ..SamplingOptions::default() };
    let generator = Generator::new(&sampling, options.batch_size, Random::new(seed, Purpose::Sampling));
    let requests = |who: usize, of: usize| -> Vec<Request> {
        let all = prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, options.responses));
        all.filter(|request| request.sample as usize % of == who).collect()
    };
    let proposers = match options.proposal {
        Proposal::Reference => &[reference],
        Proposal::Models => models,
    };
    let mut episodes = Vec::with_capacity(prompts.len() * options.responses as usize);
    for (who, proposer) in proposers.iter().enumerate() {
        let requests = requests(who, proposers.len());
        episodes.extend(generator.generate(proposer, tokenizer, &requests, |_| {})?);
    }
    let place: std::collections::HashMap<u32, usize> =
        prompts.iter().enumerate().map(|(place, prompt)| (prompt.id, place)).collect();
    episodes.sort_by_key(|episode| (place.get(&episode.prompt_id).copied(), episode.sample));
    Ok(episodes)
}

fn log_mean_exp(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + (values.iter().map(|value| (value - largest).exp()).sum::<f64>() / values.len() as f64).ln()
}
