//! `posttrain models` and `posttrain pull`: named models and the cache.

use model::hub::{self, NAMED, Origin};

use crate::cli::Pull;
use crate::failure::Failure;
use crate::opened::Opener;
use crate::report::bytes;
use crate::terminal::{Terminal, print};

/// Lists the named models, one a line.
pub fn list() -> Result<(), Failure> {
    let width = NAMED.iter().map(|model| model.name.len()).max().unwrap_or(0);
    let line = |model: &hub::NamedModel| {
        let state = match &model.origin {
            Origin::Preset(_) => "from scratch".to_owned(),
            Origin::Download(_) if hub::cached(model.name).is_some() => "cached".to_owned(),
            Origin::Download(download) => format!("{} to get", bytes(download.size)),
        };
        format!("{:width$}  {state:14}  {}\n", model.name, model.description)
    };
    print(NAMED.iter().map(line).collect::<String>())
}

/// Fetches a named model and prints where it is.
pub fn pull(arguments: &Pull, opener: Opener) -> Result<(), Failure> {
    opener.must_fetch(&arguments.name)?;
    let path = fetch(&arguments.name, opener.terminal)?;
    print(format!("{}\n", path.display()))
}

/// The file of a named model: from the cache, or fetched into it with a progress bar.
pub fn fetch(name: &str, terminal: Terminal) -> Result<std::path::PathBuf, Failure> {
    const MEBI: u64 = 1 << 20;
    let mut shown: Option<(String, crate::terminal::Progress)> = None;
    let path = hub::pull(name, &mut |progress| {
        let total = progress.total.div_ceil(MEBI);
        if shown.as_ref().is_none_or(|(stage, _)| *stage != progress.stage) {
            if let Some((_, bar)) = shown.take() {
                bar.clear();
            }
            shown = Some((progress.stage.clone(), terminal.progress(&progress.stage, "MiB", total)));
        }
        if let Some((_, bar)) = &mut shown {
            bar.update(progress.bytes / MEBI, "");
        }
    });
    if let Some((_, bar)) = shown {
        bar.clear();
    }
    Ok(path?)
}
