//! Requests that cannot be served are refused before any work is done.

use std::collections::HashMap;

use model::ModelConfig;

use crate::{Error, Request, Result, SamplingOptions};

/// Refuses stop tokens that the model does not have.
pub(crate) fn stop_tokens(options: &SamplingOptions, config: &ModelConfig) -> Result<()> {
    match options.stop_token_ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        Some(id) => {
            let got = format!("{id} for a vocabulary of {}", config.vocab_size);
            Err(Error::Option { option: "stop_token_ids", got, expected: "tokens of the vocabulary" })
        }
        None => Ok(()),
    }
}

/// Refuses the first request that the model cannot serve.
pub(crate) fn requests(requests: &[Request], options: &SamplingOptions, config: &ModelConfig) -> Result<()> {
    let mut names = HashMap::new();
    for (index, request) in requests.iter().enumerate() {
        let refuse = |reason: String, hint: Option<&str>| {
            let (prompt_id, sample) = (request.prompt_id, request.sample);
            Err(Error::Request { index, prompt_id, sample, reason, hint: hint.map(str::to_owned) })
        };
        let (prompt, forced, most) = (request.prompt.len(), request.prefix.len(), options.max_new_tokens);
        if prompt == 0 {
            return refuse("the prompt has no tokens".into(), Some("start with the beginning-of-text token"));
        }
        if forced > most {
            return refuse(
                format!("{forced} forced tokens are more than max_new_tokens, {most}"),
                Some("forced tokens count towards max_new_tokens; raise it"),
            );
        }
        if prompt + most > config.max_positions {
            return refuse(
                format!(
                    "a prompt of {prompt} tokens and max_new_tokens = {most} exceed the model's context of {} tokens",
                    config.max_positions
                ),
                Some("lower max_new_tokens or drop prompts that are too long"),
            );
        }
        if let Some(id) = request.prompt.iter().chain(&request.prefix).find(|&&id| id as usize >= config.vocab_size) {
            return refuse(
                format!("token {id} is not below the vocabulary size {}", config.vocab_size),
                Some("the tokenizer must come from the same model"),
            );
        }
        if let Some(other) = names.insert((request.prompt_id, request.sample), index) {
            return refuse(
                format!("request {other} has the same prompt and sample number, so both would draw the same tokens"),
                None,
            );
        }
    }
    Ok(())
}
