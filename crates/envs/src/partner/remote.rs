//! A model behind an OpenAI-compatible interface over HTTP: vLLM, SGLang, llama.cpp, TGI, Ollama, or a hosted service.
//!
//! Each question is one `POST BASE_URL/chat/completions`. What may pass by itself (no connection, a timeout, a connection
//! cut in the middle, status 408, 429 or 5xx) is tried again after 0.5 s, 1 s, 2 s, ... up to 30 s, or after what the server
//! asks for in `Retry-After`, until the retries or the deadline are used up. Whatever the server does, a question ends by
//! the deadline.

use std::io::Read;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Line, Partner, PartnerError, Reply};
use crate::reward::shorten;

/// Longest answer that is read, in bytes.
const MAX_BODY: u64 = 16 << 20;
/// Pause before the first retry.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause between attempts that is chosen here; a server may ask for longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Options of a remote partner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoteOptions {
    /// Address of the server up to `/chat/completions`, such as `http://localhost:8000/v1`.
    pub base_url: String,
    /// The model's name on the server.
    pub model: String,
    /// Environment variable that holds the API key. The key itself is in no file. Without it, no key is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_variable: Option<String>,
    /// Sampling temperature; 0 takes the most probable token.
    #[serde(default)]
    pub temperature: f64,
    /// Most tokens of an answer.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: u32,
    /// Seed that is sent along; servers that know it give the same answer again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Seconds that one attempt may take.
    #[serde(default = "default_timeout")]
    pub timeout_seconds: f64,
    /// Seconds that a question may take, with all attempts and the pauses between them.
    #[serde(default = "default_deadline")]
    pub deadline_seconds: f64,
    /// Attempts after the first.
    #[serde(default = "default_retries")]
    pub retries: u32,
    /// Questions under way at the same time.
    #[serde(default = "default_concurrency")]
    pub concurrency: usize,
}

fn default_max_tokens() -> u32 {
    512
}

fn default_timeout() -> f64 {
    60.0
}

fn default_deadline() -> f64 {
    300.0
}

fn default_retries() -> u32 {
    5
}

fn default_concurrency() -> usize {
    8
}

impl RemoteOptions {
    /// A server and its model, everything else as documented.
    pub fn new(base_url: &str, model: &str) -> Self {
        Self {
            base_url: base_url.into(),
            model: model.into(),
            api_key_variable: None,
            temperature: 0.0,
            max_tokens: default_max_tokens(),
            seed: None,
            timeout_seconds: default_timeout(),
            deadline_seconds: default_deadline(),
            retries: default_retries(),
            concurrency: default_concurrency(),
        }
    }
}

/// See [`RemoteOptions`].
pub struct Remote {
    options: RemoteOptions,
    url: String,
    agent: ureq::Agent,
    /// Questions that may still be begun.
    free: Mutex<usize>,
    freed: Condvar,
}

/// What became of one attempt that gave no reply.
enum Attempt {
    /// Trying again is of no use.
    Final(PartnerError),
    /// It may go better next time, after the pause that the server asks for.
    Again { reason: String, pause: Option<Duration> },
}

impl Remote {
    /// The partner with these options.
    ///
    /// # Errors
    /// An option with an impossible value.
    pub fn new(options: RemoteOptions) -> Result<Self, PartnerError> {
        let refuse = |reason: String| Err(PartnerError::Options(reason));
        if !(options.base_url.starts_with("http://") || options.base_url.starts_with("https://")) {
            return refuse(format!("base_url is {:?}, expected an address with http:// or https://", options.base_url));
        }
        for (name, value) in
            [("timeout_seconds", options.timeout_seconds), ("deadline_seconds", options.deadline_seconds)]
        {
            if !(value > 0.0 && value <= 86_400.0) {
                return refuse(format!("{name} is {value}, expected more than 0 and at most 86400"));
            }
        }
        if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
            return refuse(format!("temperature is {}, expected a number of at least 0", options.temperature));
        }
        if options.concurrency == 0 || options.max_tokens == 0 {
            return refuse("concurrency and max_tokens must be at least 1".into());
        }
        let url = format!("{}/chat/completions", options.base_url.trim_end_matches('/'));
        let agent = ureq::AgentBuilder::new().redirects(0).max_idle_connections_per_host(options.concurrency).build();
        let free = Mutex::new(options.concurrency);
        Ok(Self { options, url, agent, free, freed: Condvar::new() })
    }

    fn key(&self) -> Result<Option<String>, PartnerError> {
        let Some(variable) = &self.options.api_key_variable else { return Ok(None) };
        match std::env::var(variable) {
            Ok(key) if !key.trim().is_empty() => Ok(Some(key.trim().to_owned())),
            _ => Err(PartnerError::Key { variable: variable.clone(), url: self.options.base_url.clone() }),
        }
    }

    fn body(&self, lines: &[Line]) -> String {
        let RemoteOptions { model, temperature, max_tokens, seed, .. } = &self.options;
        let mut body = json!({"model": model, "messages": lines, "temperature": temperature, "max_tokens": max_tokens});
        if let Some(seed) = seed {
            body["seed"] = (*seed).into();
        }
        body.to_string()
    }

    /// One request, which ends by `until`.
    fn attempt(&self, body: &str, key: Option<&str>, until: Instant) -> Result<Reply, Attempt> {
        let timeout = Duration::from_secs_f64(self.options.timeout_seconds);
        let left = until.saturating_duration_since(Instant::now()).min(timeout);
        let again = |reason: String| Attempt::Again { reason, pause: None };
        let mut request = self.agent.post(&self.url).timeout(left).set("content-type", "application/json");
        if let Some(key) = key {
            request = request.set("authorization", &format!("Bearer {key}"));
        }
        let response = match request.send_string(body) {
            Ok(response) | Err(ureq::Error::Status(_, response)) => response,
            Err(ureq::Error::Transport(failure)) => return Err(again(failure.to_string())),
        };
        let status = response.status();
        let pause = response.header("retry-after").and_then(|text| text.trim().parse().ok());
        let pause = pause.filter(|seconds: &f64| (0.0..=86_400.0).contains(seconds)).map(Duration::from_secs_f64);
        let mut bytes = Vec::new();
        let read = response.into_reader().take(MAX_BODY).read_to_end(&mut bytes);
        match status {
            200 => {
                read.map_err(|error| again(format!("the answer broke off: {error}")))?;
                let reply = serde_json::from_slice(&bytes)
                    .map_err(|error| format!("{error} in {:?}", shorten(&String::from_utf8_lossy(&bytes))))
                    .and_then(|answer| parse(&answer));
                reply.map_err(|reason| Attempt::Final(PartnerError::Malformed { url: self.url.clone(), reason }))
            }
            408 | 429 | 500..=599 => {
                Err(Attempt::Again { reason: format!("status {status}: {}", message(&bytes)), pause })
            }
            _ => {
                let (url, message) = (self.url.clone(), message(&bytes));
                Err(Attempt::Final(PartnerError::Refused { url, status, message }))
            }
        }
    }

    fn begin(&self) {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = self.freed.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
    }

    fn end(&self) {
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.freed.notify_one();
    }

    fn ask(&self, lines: &[Line]) -> Result<Reply, PartnerError> {
        let key = self.key()?;
        let body = self.body(lines);
        let started = Instant::now();
        let until = started + Duration::from_secs_f64(self.options.deadline_seconds);
        let mut pause = FIRST_PAUSE;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let (reason, asked) = match self.attempt(&body, key.as_deref(), until) {
                Ok(reply) => return Ok(reply),
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Again { reason, pause }) => (reason, pause),
            };
            let wait = asked.unwrap_or(pause);
            if attempts > self.options.retries || Instant::now() + wait >= until {
                let seconds = started.elapsed().as_secs_f64();
                return Err(PartnerError::Unreachable { url: self.url.clone(), attempts, seconds, reason });
            }
            std::thread::sleep(wait);
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }
}

impl Partner for Remote {
    fn reply(&self, lines: &[Line]) -> Result<Reply, PartnerError> {
        self.begin();
        let reply = self.ask(lines);
        self.end();
        reply
    }

    fn concurrency(&self) -> usize {
        self.options.concurrency
    }
}

/// The reply in a completion object, or what is wrong with it.
fn parse(answer: &Value) -> Result<Reply, String> {
    let choice = answer["choices"].get(0).ok_or("it has no `choices`")?;
    let text = match &choice["message"]["content"] {
        Value::String(text) => text.clone(),
        // What a model says by calling a tool has no content.
        Value::Null => String::new(),
        other => return Err(format!("`choices[0].message.content` is {}", shorten(&other.to_string()))),
    };
    Ok(Reply { text, truncated: choice["finish_reason"] == "length" })
}

/// What a server says about a failure: the message in OpenAI's error object, or the text itself.
fn message(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let value: Value = serde_json::from_slice(bytes).unwrap_or_default();
    let said = value["error"]["message"].as_str().or(value["message"].as_str()).unwrap_or(text.trim());
    shorten(if said.is_empty() { "no message" } else { said })
}
