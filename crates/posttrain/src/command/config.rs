//! `posttrain config`: the reference and the schema of a recipe.

use crate::cli::ConfigCommand;
use crate::config::check::Schema;
use crate::config::{reference, schema};
use crate::failure::Failure;
use crate::terminal::print;

/// Runs the command.
pub fn run(command: &ConfigCommand) -> Result<(), Failure> {
    let schema = schema();
    match command {
        ConfigCommand::Explain { key: Some(key) } => print(reference::explain(Schema::new(&schema), key)?),
        ConfigCommand::Explain { key: None } => print(reference::markdown(Schema::new(&schema))),
        ConfigCommand::Schema => print(format!("{schema:#}\n")),
    }
}
