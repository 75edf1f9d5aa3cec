//! Rewards written in any language: an external command over JSON lines.
//!
//! # Protocol
//! The command is started once and asked about one answer at a time. It reads one JSON object a line from its standard
//! input,
//!
//! ```json
//! {"id": 7, "prompt": "What is 3 + 4?", "completion": "The answer is 7.", "columns": {"answer": "7"}}
//! ```
//!
//! and writes one JSON object a line to its standard output, flushed:
//!
//! ```json
//! {"id": 7, "value": 1.0, "status": "ok", "parts": {"concise": 0.5}}
//! ```
//!
//! - `id` is the request's, an integer. Anything else is a failure: scores can't slip to other answers.
//! - `value` is a finite number, or `null` where the reward does not apply.
//! - `status` (optional) is `ok`, `wrong`, `malformed`, `timeout` or `error`; without it, a positive value is `ok` and any
//!   other `wrong`.
//! - `parts` (optional) maps names to finite numbers, which are logged.
//! - Other keys, empty lines and whatever the command writes to its standard error are passed over.
//! - The command ends when its standard input ends.
//!
//! In Python this is a loop over `sys.stdin`; `recipes/rewards/exact_match.py` is a complete one.
//!
//! # Failures
//! A reply that is no such object, has another id or a value that is not finite; a command that crashes, closes its
//! output, can't be started, or doesn't reply within `deadline_seconds`: the command and everything it started is killed,
//! and with `on_error = "stop"` the run ends with an error that says what happened. With `on_error = "score"` the answer
//! gets value 0 with status `error` (or `timeout`), and the command is started afresh for the next answer. Nothing the
//! command does, or fails to do, can make a run wait longer than the deadline for each answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Reward, RewardError, shorten};
use crate::score::{Answer, Score, Status};

/// Longest reply line that is read, in bytes. A command that writes more has failed.
const MAX_REPLY: u64 = 1 << 20;

/// What to do when the command fails to score an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// Stop the run with an error.
    #[default]
    Stop,
    /// Give the answer value 0 with status `error` or `timeout`, and go on.
    Score,
}

/// Options of the `process` reward: an external command scores the answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProcessOptions {
    /// The program and its arguments, started in the current folder without a shell.
    pub command: Vec<String>,
    /// Seconds the command may take for one answer. The first answer's include its start.
    #[serde(default = "default_deadline")]
    pub deadline_seconds: f64,
    /// What to do when the command crashes, is late, or replies with something that is not a score.
    #[serde(default)]
    pub on_error: OnError,
}

fn default_deadline() -> f64 {
    10.0
}

/// See [`ProcessOptions`] and the [protocol](self).
pub struct ProcessReward {
    name: String,
    options: ProcessOptions,
    deadline: Duration,
    /// The running command, if any, and the id of the next request. One batch at a time talks to it.
    state: Mutex<(Option<Worker>, u64)>,
}

impl ProcessReward {
    /// The reward under a name. The command is started by the first answer.
    ///
    /// # Errors
    /// An empty command, or a deadline that is not positive or longer than a day.
    pub fn new(name: String, options: ProcessOptions) -> Result<Self, RewardError> {
        if options.command.is_empty() {
            let reason = "command is empty, expected a program and its arguments".into();
            return Err(RewardError::Options { reward: name, reason });
        }
        let seconds = options.deadline_seconds;
        if !(seconds > 0.0 && seconds <= 86_400.0) {
            let reason = format!("deadline_seconds is {seconds}, expected more than 0 and at most 86400");
            return Err(RewardError::Options { reward: name, reason });
        }
        let deadline = Duration::from_secs_f64(seconds);
        Ok(Self { name, options, deadline, state: Mutex::new((None, 0)) })
    }

    /// Asks the running command, or a fresh one, about one answer.
    fn ask(&self, worker: &mut Option<Worker>, id: u64, answer: &Answer) -> Result<Option<Score>, Failure> {
        let end = Instant::now() + self.deadline;
        let worker = match worker {
            Some(worker) => worker,
            None => worker.insert(Worker::start(&self.options.command)?),
        };
        let request = serde_json::json!({
            "id": id,
            "prompt": answer.prompt_text,
            "completion": answer.completion,
            "columns": answer.columns,
        });
        let line = worker.exchange(format!("{request}\n").into_bytes(), end, self.options.deadline_seconds)?;
        read_reply(&line, id)
    }
}

impl Reward for ProcessReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        // A panic while the lock was held leaves at worst a command that is out of step, which its ids reveal.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (worker, next_id) = &mut *state;
        answers
            .iter()
            .map(|answer| {
                let id = *next_id;
                *next_id += 1;
                self.ask(worker, id, answer).or_else(|failure| {
                    // Its state is unknown: the next answer gets a fresh one.
                    *worker = None;
                    match self.options.on_error {
                        OnError::Score => Ok(Some(Score::verdict(failure.status))),
                        OnError::Stop => Err(RewardError::Process {
                            reward: self.name.clone(),
                            command: self.options.command.join(" "),
                            reason: failure.reason,
                        }),
                    }
                })
            })
            .collect()
    }
}

/// What went wrong with one answer.
#[derive(Debug)]
struct Failure {
    status: Status,
    /// Continues "the command ...".
    reason: String,
}

impl Failure {
    fn error(reason: impl Into<String>) -> Self {
        Self { status: Status::Error, reason: reason.into() }
    }
}

/// What the reading thread saw.
enum Event {
    Line(Vec<u8>),
    Failed(String),
    Closed,
}

/// A running command with the threads that write to it and read from it, so that neither a full pipe nor silence can
/// block the caller. Dropping it kills the command's whole process group.
struct Worker {
    child: Child,
    requests: Sender<Vec<u8>>,
    replies: Receiver<Event>,
}

impl Worker {
    fn start(command: &[String]) -> Result<Self, Failure> {
        let mut process = Command::new(&command[0]);
        process.args(&command[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut process, 0);
        let mut child = process.spawn().map_err(|error| Failure::error(format!("cannot be started: {error}")))?;
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failure::error("has no standard input or output"));
        };
        let (requests, to_write) = channel::<Vec<u8>>();
        let (read, replies) = sync_channel(1);
        // Both threads end when the command's pipes close or the worker is dropped.
        thread::spawn(move || {
            for line in to_write {
                if stdin.write_all(&line).and_then(|()| stdin.flush()).is_err() {
                    break;
                }
            }
        });
        thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            loop {
                let event = read_line(&mut stdout);
                let last = !matches!(event, Event::Line(_));
                if read.send(event).is_err() || last {
                    break;
                }
            }
        });
        Ok(Self { child, requests, replies })
    }

    /// Sends a request and waits for the first line that is not empty.
    fn exchange(&mut self, request: Vec<u8>, end: Instant, seconds: f64) -> Result<Vec<u8>, Failure> {
        // The writer may be gone with a dead command; then the reader says so.
        let _ = self.requests.send(request);
        loop {
            match self.replies.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Event::Line(line)) if line.trim_ascii().is_empty() => {}
                Ok(Event::Line(line)) => return Ok(line),
                Ok(Event::Failed(reason)) => return Err(Failure::error(reason)),
                Ok(Event::Closed) | Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Failure {
                        status: Status::Timeout,
                        reason: format!("did not reply within {seconds} seconds"),
                    });
                }
            }
        }
    }

    /// How the command ended, given a moment to do so after closing its output.
    fn ended(&mut self) -> Failure {
        for _ in 0..50 {
            match self.child.try_wait() {
                Ok(Some(status)) => return Failure::error(format!("ended before replying ({status})")),
                _ => thread::sleep(Duration::from_millis(2)),
            }
        }
        Failure::error("closed its standard output before replying")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        kill_group(&mut self.child);
        // Killed a moment ago, so this returns; it takes the zombie away.
        let _ = self.child.wait();
    }
}

/// Kills the command and everything it started that stayed in its process group.
fn kill_group(child: &mut Child) {
    #[cfg(unix)]
    {
        use rustix::process::{Pid, Signal, kill_process_group};
        // The child leads its group, and the system keeps the id from others while the child is unwaited or a member lives.
        let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
    }
    let _ = child.kill();
}

/// The next line, without reading more than [`MAX_REPLY`] bytes of it.
fn read_line(stdout: &mut impl BufRead) -> Event {
    let mut line = Vec::new();
    match stdout.take(MAX_REPLY).read_until(b'\n', &mut line) {
        Err(error) => Event::Failed(format!("cannot be read from: {error}")),
        Ok(0) => Event::Closed,
        Ok(_) if line.ends_with(b"\n") => Event::Line(line),
        Ok(length) if length as u64 == MAX_REPLY => {
            Event::Failed(format!("replied with a line of over {MAX_REPLY} bytes"))
        }
        // The output ended within a line; whatever it says, the command did not finish saying it.
        Ok(_) => Event::Closed,
    }
}

/// The text with control characters spelled out: what a command says must not steer a terminal.
fn printable(text: &str) -> String {
    text.chars().fold(String::new(), |mut shown, character| {
        match character.is_control() {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
        shown
    })
}

/// Reads one reply to the request `id`.
fn read_reply(line: &[u8], id: u64) -> Result<Option<Score>, Failure> {
    let shown = || shorten(&printable(String::from_utf8_lossy(line).trim()));
    let refuse = |what: &str| Failure::error(format!("replied with {what}: {}", shown()));
    let Ok(Value::Object(reply)) = serde_json::from_slice(line) else {
        return Err(refuse("something other than a JSON object"));
    };
    match reply.get("id").map(Value::as_u64) {
        Some(Some(found)) if found == id => {}
        _ => return Err(refuse(&format!("another id than {id}"))),
    }
    let value = match reply.get("value") {
        Some(Value::Null) => return Ok(None),
        Some(value) => value.as_f64().filter(|value| value.is_finite()),
        None => None,
    };
    let value = value.ok_or_else(|| refuse("no finite number as value"))?;
    let status = match reply.get("status") {
        None | Some(Value::Null) if value > 0.0 => Status::Ok,
        None | Some(Value::Null) => Status::Wrong,
        Some(status) => Status::deserialize(status)
            .map_err(|_| refuse("a status other than ok, wrong, malformed, timeout, error"))?,
    };
    let parts = match reply.get("parts") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Object(parts)) => parts
            .iter()
            .map(|(name, value)| Some((name.clone(), value.as_f64().filter(|value| value.is_finite())?)))
            .collect::<Option<_>>()
            .ok_or_else(|| refuse("a part that is no finite number"))?,
        Some(_) => return Err(refuse("parts that are no object")),
    };
    Ok(Some(Score { parts, ..Score::new(value, status) }))
}
