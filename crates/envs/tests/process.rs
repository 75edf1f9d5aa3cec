//! External reward commands that behave and that do not.
#![cfg(unix)]

use std::time::{Duration, Instant};

use posttrain_envs::reward::process::ProcessReward;
use posttrain_envs::{Answer, Columns, OnError, ProcessOptions, Reward, Score, Status};

/// A reward whose command is a shell script.
fn shell(script: &str, deadline_seconds: f64, on_error: OnError) -> ProcessReward {
    let command = ["sh", "-c", script].map(String::from).to_vec();
    ProcessReward::new("script".into(), ProcessOptions { command, deadline_seconds, on_error }).unwrap()
}

/// Scores `completions` with a row whose answer is 7.
fn score(reward: &dyn Reward, completions: &[&str]) -> Result<Vec<Option<Score>>, String> {
    let columns = Columns::from_iter([("answer".to_owned(), "7".into())]);
    let answer = |completion| Answer { prompt_text: "3 + 4?", completion, completion_ids: &[], columns: &columns };
    let answers: Vec<Answer> = completions.iter().map(|completion| answer(completion)).collect();
    reward.score(&answers).map_err(|error| error.to_string())
}

fn statuses(reward: &dyn Reward, completions: &[&str]) -> Vec<Status> {
    score(reward, completions).unwrap().into_iter().map(|score| score.unwrap().status).collect()
}

#[test]
fn the_example_command_scores() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/rewards/exact_match.py");
    let command = vec!["python3".to_owned(), script.to_owned()];
    let options = ProcessOptions { command, deadline_seconds: 60.0, on_error: OnError::Stop };
    let reward = ProcessReward::new("exact".into(), options).unwrap();
    assert_eq!(
        statuses(&reward, &[" 7. ", "8", "line\nbreak \"quoted\" \u{1F600}", "7"]),
        [Status::Ok, Status::Wrong, Status::Wrong, Status::Ok]
    );
    let columns = Columns::new();
    let answer = Answer { prompt_text: "", completion: "7", completion_ids: &[], columns: &columns };
    assert_eq!(reward.score(&[answer]).unwrap(), [None], "no answer to compare with");
}

#[test]
fn a_reply_carries_value_status_and_parts() {
    let reward = shell(
        r#"read l; echo; echo '{"id":0,"value":-0.5,"status":"malformed","parts":{"a":1,"b":0.25},"extra":[]}'
           read l; echo '{"id":1,"value":null}'
           read l; echo '{"id":2,"value":0}'
           read l; echo '{"id":3,"value":0.1}'"#,
        5.0,
        OnError::Stop,
    );
    assert_eq!(
        score(&reward, &["", "", "", ""]).unwrap(),
        [
            Some(Score { parts: vec![("a".into(), 1.0), ("b".into(), 0.25)], ..Score::new(-0.5, Status::Malformed) }),
            None,
            Some(Score::new(0.0, Status::Wrong)),
            Some(Score::new(0.1, Status::Ok)),
        ]
    );
}

#[test]
fn every_kind_of_failure_is_a_score_or_a_clear_error() {
    let cases = [
        ("exit 3", Status::Error, "ended before replying (exit status: 3)"),
        ("read l; kill -9 $$", Status::Error, "ended before replying (signal: 9"),
        ("exec >&-; sleep 60", Status::Error, "closed its standard output before replying"),
        ("read l; printf '{\"id\":0,\"va'", Status::Error, "ended before replying"),
        ("read l; echo hello", Status::Error, "something other than a JSON object: hello"),
        ("read l; echo '[1]'", Status::Error, "something other than a JSON object"),
        ("read l; echo '{\"id\":0}'", Status::Error, "no finite number as value"),
        ("read l; echo '{\"id\":0,\"value\":NaN}'", Status::Error, "something other than a JSON object"),
        ("read l; echo '{\"id\":0,\"value\":1e999}'", Status::Error, "something other than a JSON object"),
        ("read l; echo '{\"id\":0,\"value\":\"1\"}'", Status::Error, "no finite number as value"),
        ("read l; echo '{\"id\":9,\"value\":1}'", Status::Error, "another id than 0"),
        ("read l; echo '{\"value\":1}'", Status::Error, "another id than 0"),
        ("read l; echo '{\"id\":0,\"value\":1,\"status\":\"fine\"}'", Status::Error, "a status other than"),
        (
            "read l; echo '{\"id\":0,\"value\":1,\"parts\":{\"a\":\"b\"}}'",
            Status::Error,
            "a part that is no finite number",
        ),
        ("read l; echo '{\"id\":0,\"value\":1,\"parts\":3}'", Status::Error, "parts that are no object"),
        ("read l; printf '\\377\\376\\n'", Status::Error, "something other than a JSON object"),
        ("read l; yes | tr -d '\\n'", Status::Error, "a line of over 1048576 bytes"),
        ("read l; yes ''", Status::Timeout, "did not reply within 0.3 seconds"),
        ("read l; sleep 60", Status::Timeout, "did not reply within 0.3 seconds"),
    ];
    for (script, status, reason) in cases {
        // A long deadline where the failure must show by itself.
        let deadline = if status == Status::Timeout { 0.3 } else { 20.0 };
        let started = Instant::now();
        assert_eq!(statuses(&shell(script, deadline, OnError::Score), &[""]), [status], "{script}");
        let error = score(&shell(script, deadline, OnError::Stop), &[""]).unwrap_err();
        assert!(error.contains("reward script: the command \"sh -c"), "{error}");
        assert!(error.contains(reason), "{script}: {error}");
        assert!(started.elapsed() < Duration::from_secs(15), "{script} waited");
    }
}

#[test]
fn a_missing_program_is_a_clear_error() {
    let command = vec!["/no/such/program".to_owned()];
    let options = ProcessOptions { command, deadline_seconds: 1.0, on_error: OnError::Stop };
    let error = score(&ProcessReward::new("gone".into(), options.clone()).unwrap(), &["x"]).unwrap_err();
    assert!(error.contains("\"/no/such/program\" cannot be started"), "{error}");
    let scored = ProcessReward::new("gone".into(), ProcessOptions { on_error: OnError::Score, ..options }).unwrap();
    assert_eq!(statuses(&scored, &["x", "y"]), [Status::Error; 2]);
}

#[test]
fn a_crashed_command_is_started_afresh() {
    // Replies once, with the id it was asked for, then crashes at the next request.
    let script = r#"read l; id=${l#*:}; id=${id%%,*}; echo "{\"id\":$id,\"value\":1}"; read l; exit 1"#;
    let reward = shell(script, 20.0, OnError::Score);
    assert_eq!(statuses(&reward, &["a", "b", "c"]), [Status::Ok, Status::Error, Status::Ok]);
    assert_eq!(statuses(&reward, &["d", "e"]), [Status::Error, Status::Ok], "across batches too");
}

#[test]
fn a_late_reply_is_not_given_to_the_next_answer() {
    let script = r#"read l; sleep 0.6; echo '{"id":0,"value":1}'; read l; echo '{"id":1,"value":1}'"#;
    let reward = shell(script, 0.2, OnError::Score);
    assert_eq!(statuses(&reward, &["a", "b"]), [Status::Timeout; 2]);
}

#[test]
fn an_answer_nobody_reads_cannot_block() {
    let completion = "x".repeat(4 << 20);
    let started = Instant::now();
    assert_eq!(statuses(&shell("sleep 60", 0.3, OnError::Score), &[completion.as_str(); 3]), [Status::Timeout; 3]);
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn the_whole_process_group_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let pid_file = folder.path().join("pid");
    let script = format!("sleep 300 & echo $! > {}; read l; sleep 300", pid_file.display());
    assert_eq!(statuses(&shell(&script, 0.5, OnError::Score), &[""]), [Status::Timeout]);
    let pid: u32 = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    let gone = || {
        // A killed process without a parent to wait for it may stay as a zombie, whose command line is empty.
        std::fs::read(format!("/proc/{pid}/cmdline")).map_or(true, |line| line.is_empty())
    };
    let end = Instant::now() + Duration::from_secs(10);
    while !gone() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(gone(), "the background process {pid} is still there");
}

#[test]
fn impossible_options_are_refused() {
    let refused = |command: Vec<String>, deadline_seconds| {
        let options = ProcessOptions { command, deadline_seconds, on_error: OnError::Stop };
        ProcessReward::new("p".into(), options).err().unwrap().to_string()
    };
    assert!(refused(vec![], 1.0).contains("command is empty"));
    for deadline in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e300] {
        assert!(refused(vec!["true".into()], deadline).contains("deadline_seconds is"));
    }
}
