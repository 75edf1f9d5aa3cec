//! What a method carries from step to step beside weights and moments, as JSON in the folder of a checkpoint.

use std::path::Path;

use base::files::{self, io_error};
use envs::Reward;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// What the rewards of a method carry ([`Reward::state`]).
const REWARD: &str = "reward_state.json";

/// Writes a value as the file `name`.
///
/// # Errors
/// A file that cannot be written.
pub fn save<T: Serialize>(folder: &Path, name: &str, value: &T) -> Result<()> {
    let path = folder.join(name);
    let text = serde_json::to_string(value).map_err(|error| io_error("write", &path)(error.into()))?;
    Ok(files::write(&path, text.as_bytes())?)
}

/// Reads what [`save`] wrote.
///
/// # Errors
/// A file that is missing, or holds something else.
pub fn load<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<T> {
    let text = files::read(&folder.join(name))?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::Mismatch { folder: folder.to_owned(), reason: format!("{name}: {error}") })
}

/// Writes the state of a reward, if it has one.
///
/// # Errors
/// A file that cannot be written.
pub fn save_reward(folder: &Path, reward: &dyn Reward) -> Result<()> {
    match reward.state() {
        Value::Null => Ok(()),
        state => save(folder, REWARD, &state),
    }
}

/// Gives a reward the state that [`save_reward`] wrote; without one, that of a new reward.
///
/// # Errors
/// A file that cannot be read, or is of other rewards.
pub fn load_reward(folder: &Path, reward: &dyn Reward) -> Result<()> {
    let state = if folder.join(REWARD).exists() { load(folder, REWARD)? } else { Value::Null };
    let mismatch = |error: envs::RewardError| {
        let reason = format!("{REWARD}: {error}");
        Error::Mismatch { folder: folder.to_owned(), reason }
    };
    reward.restore(&state).map_err(mismatch)
}
