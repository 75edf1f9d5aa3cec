//! Reward models loaded for those who ask them.

use envs::{ModelRewardOptions, Reward, RewardError};
use train::judges::{Judge, ModelReward};
use train::run::DataSource;

use crate::config::Config;
use crate::failure::Failure;
use crate::opened::Opener;

/// What judges answers in a recipe: its rewards without their shaping, their reward models loaded.
pub fn judgement(config: &Config, opener: Opener) -> Result<Box<dyn Reward>, Failure> {
    config.judgement(&mut |name, options| load(name, options, config, opener))
}

/// What a recipe pays for answers, its reward models loaded.
pub fn rewards(config: &Config, opener: Opener) -> Result<Box<dyn Reward>, Failure> {
    config.reward(&mut |name, options| load(name, options, config, opener))
}

/// The models behind the rewards of a recipe, for what a run writes down of its origin.
pub fn sources(config: &Config, opener: Opener) -> Result<Vec<DataSource>, Failure> {
    let source = |name: &&str| {
        Ok(DataSource { name: format!("reward model: {name}"), rows: 0, sha256: opener.digest(name)?.get()? })
    };
    config.reward_models().iter().map(source).collect()
}

/// A reward of this name, made of models that are loaded here.
pub fn load(
    name: &str,
    options: &ModelRewardOptions,
    config: &Config,
    opener: Opener,
) -> Result<Box<dyn Reward>, RewardError> {
    let judge = |folder: &String| {
        let mut opened = opener
            .open(folder, config.seed)
            .map_err(|failure| RewardError::Model { reward: name.to_owned(), reason: failure.to_string() })?;
        opened.decoder.prepare(config.model.precision.into());
        Ok(Judge {
            name: folder.clone(),
            decoder: opened.decoder,
            tokenizer: opened.tokenizer,
            template: opened.template,
        })
    };
    let judges = options.models.iter().map(judge).collect::<Result<_, RewardError>>()?;
    Ok(Box::new(ModelReward::new(name, options, judges)?))
}
