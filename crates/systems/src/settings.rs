//! Settings: `tiny.toml` with every value, and `quick.toml` on top of it.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::system::System;

/// The settings of a system as they stand in its folder, as JSON.
///
/// # Errors
/// Files that are no TOML.
pub fn settings(system: &'static System, quick: bool) -> Result<Value> {
    let read = |text: &str| {
        toml::from_str(text).map_err(|error| Error::Settings { system: system.name, reason: error.to_string() })
    };
    let mut settings: Value = read(system.tiny)?;
    if quick {
        lay(&mut settings, read(system.quick)?);
    }
    Ok(settings)
}

/// Lays `over` on top: single keys of tables, whole values of everything else.
fn lay(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                lay(under.entry(key).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over,
    }
}
