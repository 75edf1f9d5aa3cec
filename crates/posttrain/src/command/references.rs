//! `posttrain reward references`: what rewards say of the model that training starts from.
//!
//! A reward's `shaping` compares an answer with reference answers to the same prompt. They are sampled once, from the model before training,
//! and only their rewards are kept: in the column `references` of the row, by the name of the reward.

use std::collections::BTreeMap;

use base::{Purpose, Random, files};
use envs::reward::shaping::REFERENCES;
use envs::{Answer, Reward};
use rollout::{Generator, Request, SamplingOptions};
use serde_json::Value;

use super::generate::BATCH;
use crate::cli::References;
use crate::config::Config;
use crate::config::load::Layers;
use crate::corpus::{self, Language};
use crate::failure::Failure;
use crate::judges;
use crate::opened::Opener;

/// Runs the command.
pub fn run(arguments: &References, opener: Opener) -> Result<(), Failure> {
    let layers = Layers { files: arguments.recipe.recipes.clone(), assignments: arguments.recipe.set.clone() };
    let config = Config::load(&layers)?;
    if config.rewards.is_empty() {
        return Err(Failure::new("the recipe has no reward to ask: expected at least one `[[rewards]]`"));
    }
    let (longest, sampling) = config.sampling();
    let mut model = opener.open_on(config.model.device, &config.model.name, config.seed)?;
    model.decoder.prepare(config.model.precision.into());
    let language = Language {
        tokenizer: &model.tokenizer,
        template: model.template.as_ref(),
        context: model.decoder.config().max_positions,
    };
    let prompts = corpus::prompts(&config, language.with_room(&longest, sampling.max_new_tokens)?, opener.terminal)?;
    let requests: Vec<Request> =
        prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, arguments.n)).collect();
    let sampling = SamplingOptions { top_log_probs: 0, ..sampling };
    let generator = Generator::new(&sampling, BATCH, Random::new(config.seed, Purpose::Opponent));
    let mut progress = opener.terminal.progress("sampling", "answer", requests.len() as u64);
    let episodes = generator.generate(&model.decoder, &model.tokenizer, &requests, |now| {
        progress.update(now.finished as u64, "");
    })?;
    progress.clear();

    let size = arguments.n as usize;
    let answers: Vec<Answer<'_>> = (episodes.iter().enumerate())
        .map(|(index, episode)| Answer {
            prompt_text: &prompts[index / size].text,
            completion: &episode.text,
            completion_ids: &episode.completion,
            columns: &prompts[index / size].columns,
        })
        .collect();
    let mut rewards: Vec<BTreeMap<&str, Vec<f64>>> = vec![BTreeMap::new(); prompts.len()];
    for reward in &config.rewards {
        // What is compared is the reward as it is.
        let judge: Box<dyn Reward> =
            reward.unshaped().build_with(&mut |name, options| judges::load(name, options, &config, opener))?;
        for (index, score) in judge.score(&answers)?.into_iter().enumerate() {
            let Some(score) = score else { continue };
            rewards[index / size].entry(reward.name()).or_default().push(score.value);
        }
    }
    let row = |(prompt, rewards): (&data::Prompt, BTreeMap<&str, Vec<f64>>)| {
        let mut columns = prompt.columns.clone();
        columns
            .insert(REFERENCES.into(), rewards.into_iter().map(|(name, values)| (name, Value::from(values))).collect());
        format!("{}\n", Value::Object(columns))
    };
    let lines: String = prompts.iter().zip(rewards).map(row).collect();
    files::write(&arguments.out, lines.as_bytes())?;
    opener.terminal.note(format!("wrote {} rows to {}", prompts.len(), arguments.out.display()));
    Ok(())
}
