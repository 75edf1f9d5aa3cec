//! The environment of a recipe.

use envs::reward::MakeModelReward;
use envs::{EnvironmentConfig, Reward, RewardConfig, Silent, Weighted};
use eval::play::World;
use model::chat::ChatTemplate;
use rollout::ConversationOptions;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Config;
use crate::failure::Failure;

/// An environment to train in and to measure in: a world that answers the model's turns, and pays for them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EnvironmentOptions {
    /// Episodes to train on.
    #[serde(default = "default_train_episodes")]
    pub train_episodes: u32,
    /// Held-out episodes to measure with. Nothing of them occurs in training.
    #[serde(default = "default_test_episodes")]
    pub test_episodes: u32,
    /// How long an episode may become; beside `max_new_tokens` of the sampling, which bounds all of its tokens.
    #[serde(default)]
    pub conversation: ConversationOptions,
    /// The environment and its own options, chosen by `type`.
    #[serde(flatten)]
    pub environment: EnvironmentConfig,
}

fn default_train_episodes() -> u32 {
    2000
}

fn default_test_episodes() -> u32 {
    200
}

impl Config {
    /// The environment of the recipe, where it has one, with the model's chat template.
    ///
    /// # Errors
    /// A model without a chat template.
    pub fn world<'a>(&'a self, template: Option<&'a ChatTemplate>) -> Result<Option<World<'a>>, Failure> {
        let Some(options) = &self.environment else { return Ok(None) };
        let Some(template) = template else {
            let failure = Failure::new(format!("{} has no chat template, so it cannot converse", self.model.name));
            return Err(failure.hint("`[environment]` needs an instruction-tuned model"));
        };
        Ok(Some(World { environment: &options.environment, template, conversation: &options.conversation }))
    }

    /// What pays answers; `models` makes the rewards that need a model. An environment needs no further judge.
    ///
    /// # Errors
    /// An option of a reward with an impossible value; a model that cannot be used.
    pub fn reward(&self, models: MakeModelReward<'_>) -> Result<Box<dyn Reward>, Failure> {
        self.rewards_of(&self.rewards, models)
    }

    /// What judges answers: the rewards as they are, without their shaping.
    ///
    /// # Errors
    /// Those of [`Config::reward`].
    pub fn judgement(&self, models: MakeModelReward<'_>) -> Result<Box<dyn Reward>, Failure> {
        self.rewards_of(&self.rewards.iter().map(RewardConfig::unshaped).collect::<Vec<_>>(), models)
    }

    fn rewards_of(&self, rewards: &[RewardConfig], models: MakeModelReward<'_>) -> Result<Box<dyn Reward>, Failure> {
        Ok(match self.environment.is_some() && rewards.is_empty() {
            true => Box::new(Silent),
            false => Box::new(Weighted::from_configs_with(rewards, models)?),
        })
    }
}
