//! The Hugging Face Hub and its cache.

use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use super::Progress;

/// How long a download may stand still.
const STALL: Duration = Duration::from_secs(60);

/// A file on the Hugging Face Hub.
#[derive(Debug)]
pub struct HubFile {
    /// `owner/name`.
    pub repo: &'static str,
    /// The commit.
    pub revision: &'static str,
    /// Its path in the repository.
    pub file: &'static str,
}

enum Event {
    Start(u64),
    Bytes(u64),
    End(Result<PathBuf, ApiError>),
}

/// Forwards hf-hub's progress to the thread that waits.
struct Reporter(Sender<Event>);

impl hf_hub::api::Progress for Reporter {
    fn init(&mut self, size: usize, _file: &str) {
        // Nobody waits any longer after a stall; there is no one to tell.
        let _ = self.0.send(Event::Start(size as u64));
    }

    fn update(&mut self, size: usize) {
        let _ = self.0.send(Event::Bytes(size as u64));
    }

    fn finish(&mut self) {}
}

impl HubFile {
    fn repo(&self) -> Repo {
        Repo::with_revision(self.repo.to_owned(), RepoType::Model, self.revision.to_owned())
    }

    /// The file in the cache of Hugging Face's tools, if there. Looks for the snapshot itself: a commit that was asked
    /// for by its hash has no entry among the named references.
    pub(super) fn cached(&self, cache: &Cache) -> Option<PathBuf> {
        let folder = cache.path().join(self.repo().folder_name());
        Some(folder.join("snapshots").join(self.revision).join(self.file)).filter(|path| path.is_file())
    }

    /// Downloads the file into the cache of Hugging Face's tools.
    ///
    /// The library has no time-outs of its own, so it runs on a thread that is abandoned when no byte arrives for a
    /// minute; it only ever writes to files of its own.
    pub(super) fn fetch(&self, cache: &Cache, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf, String> {
        let (sender, receiver) = mpsc::channel();
        let (cache, repo, file) = (cache.clone(), self.repo(), self.file);
        let stage = format!("downloading from the Hugging Face Hub ({})", self.repo);
        thread::spawn(move || {
            let endpoint = std::env::var("HF_ENDPOINT").ok();
            let builder = ApiBuilder::from_cache(cache).with_progress(false);
            let builder = endpoint.into_iter().fold(builder, ApiBuilder::with_endpoint);
            let reporter = Reporter(sender.clone());
            let fetched = builder.build().and_then(|api| api.repo(repo).download_with_progress(file, reporter));
            let _ = sender.send(Event::End(fetched));
        });
        let (mut bytes, mut total) = (0, 0);
        loop {
            match receiver.recv_timeout(STALL) {
                Ok(Event::Start(size)) => total = size,
                Ok(Event::Bytes(count)) => bytes += count,
                Ok(Event::End(fetched)) => return fetched.map_err(|error| error.to_string()),
                Err(RecvTimeoutError::Timeout) => return Err(format!("no data for {} seconds", STALL.as_secs())),
                Err(RecvTimeoutError::Disconnected) => return Err("the download stopped without a reason".to_owned()),
            }
            progress(Progress { stage: stage.clone(), bytes, total });
        }
    }
}
