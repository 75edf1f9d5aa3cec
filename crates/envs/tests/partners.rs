//! Partners against a scripted server on the loopback interface, and judges.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base::Hint;
use posttrain_envs::partner::scripted::Rule;
use posttrain_envs::partner::{Line, RemoteOptions, ScriptedOptions, ask_all};
use posttrain_envs::reward::JudgeOptions;
use posttrain_envs::reward::judge::JudgeReward;
use posttrain_envs::{Answer, Columns, OnError, Partner, PartnerConfig, Reward, RewardConfig, RewardKind, Status};
use serde_json::{Value, json};

/// What the server does with a request.
#[derive(Clone)]
enum Act {
    /// Replies with a status, headers and a body.
    Reply(u16, &'static str, String),
    /// Says nothing for so long, then as above.
    Late(Duration),
    /// Announces a body and closes the connection in the middle of it.
    Cut,
    /// Closes the connection at once.
    Hang,
}

/// A server that does one thing after the other, the last one for ever, and remembers what it was asked.
struct Server {
    url: String,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
    most: Arc<AtomicUsize>,
}

fn completion(text: &str) -> Act {
    Act::Reply(200, "", json!({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).to_string())
}

impl Server {
    fn new(acts: Vec<Act>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let (asked, most) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let (next, running) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (asked_, most_) = (Arc::clone(&asked), Arc::clone(&most));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (acts, asked, next) = (acts.clone(), Arc::clone(&asked_), Arc::clone(&next));
                let (running, most) = (Arc::clone(&running), Arc::clone(&most_));
                std::thread::spawn(move || {
                    most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    serve(stream.unwrap(), &acts, &next, &asked);
                    running.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { url, asked, most }
    }

    fn options(&self) -> RemoteOptions {
        RemoteOptions { deadline_seconds: 20.0, timeout_seconds: 10.0, ..RemoteOptions::new(&self.url, "judge") }
    }

    fn asked(&self) -> Vec<(String, Value)> {
        self.asked.lock().unwrap().clone()
    }
}

fn serve(mut stream: TcpStream, acts: &[Act], next: &AtomicUsize, asked: &Mutex<Vec<(String, Value)>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if let Some(text) = line.to_lowercase().strip_prefix("content-length:") {
            length = text.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    asked.lock().unwrap().push((head, serde_json::from_slice(&body).unwrap()));
    let act = &acts[next.fetch_add(1, Ordering::SeqCst).min(acts.len() - 1)];
    let mut reply = |status: u16, headers: &str, body: &str, announced: usize| {
        let text =
            format!("HTTP/1.1 {status} X\r\nconnection: close\r\n{headers}content-length: {announced}\r\n\r\n{body}");
        // The client may have given up by now.
        let _ = stream.write_all(text.as_bytes());
    };
    match act {
        Act::Reply(status, headers, body) => reply(*status, headers, body, body.len()),
        Act::Late(time) => {
            std::thread::sleep(*time);
            reply(200, "", "{}", 2);
        }
        Act::Cut => reply(200, "", "{\"choices\": [{\"mess", 1000),
        Act::Hang => {}
    }
}

fn partner(options: RemoteOptions) -> Box<dyn Partner> {
    PartnerConfig::Remote(options).build().unwrap()
}

fn hello() -> Vec<Line> {
    vec![Line::new("system", "Be kind."), Line::new("user", "hello")]
}

#[test]
fn a_question_is_one_request_in_openais_form() {
    let body = json!({"choices": [{"message": {"content": "hi!"}, "finish_reason": "length"}]});
    let server = Server::new(vec![Act::Reply(200, "", body.to_string())]);
    let options = RemoteOptions { seed: Some(4), temperature: 0.5, max_tokens: 9, ..server.options() };
    let reply = partner(options).reply(&hello()).unwrap();
    assert_eq!(reply.text, "hi!");
    assert!(reply.truncated);
    let (head, body) = server.asked().remove(0);
    assert!(head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"), "{head}");
    assert!(!head.to_lowercase().contains("authorization"));
    let messages = json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]);
    let expected = json!({
        "model": "judge", "messages": messages, "temperature": 0.5, "max_tokens": 9, "seed": 4
    });
    assert_eq!(body, expected);
}

#[test]
fn what_may_pass_is_tried_again() {
    let busy = Act::Reply(429, "retry-after: 0\r\n", json!({"error": {"message": "slow down"}}).to_string());
    let down = Act::Reply(503, "retry-after: 0.01\r\n", "starting".into());
    let server = Server::new(vec![busy, down, Act::Cut, completion("at last")]);
    assert_eq!(partner(server.options()).reply(&hello()).unwrap().text, "at last");
    assert_eq!(server.asked().len(), 4);
    let server = Server::new(vec![Act::Hang, completion("well")]);
    assert_eq!(partner(server.options()).reply(&hello()).unwrap().text, "well");
}

#[test]
fn nothing_takes_longer_than_the_deadline() {
    let server = Server::new(vec![Act::Late(Duration::from_secs(60))]);
    let options = RemoteOptions { timeout_seconds: 0.2, deadline_seconds: 1.5, ..server.options() };
    let started = Instant::now();
    let error = partner(options).reply(&hello()).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    let message = error.to_string();
    assert!(message.contains("gave no answer in 2 attempts over"), "{message}");
    assert!(error.hint().unwrap().contains("timeout_seconds"));
    // A server that asks for more patience than there is gets none.
    let server = Server::new(vec![Act::Reply(429, "retry-after: 3600\r\n", String::new())]);
    let message = partner(server.options()).reply(&hello()).unwrap_err().to_string();
    assert!(message.contains("in 1 attempts") && message.ends_with("status 429: no message"), "{message}");
    let busy = Act::Reply(500, "retry-after: 0\r\n", "oops".into());
    let server = Server::new(vec![busy]);
    let options = RemoteOptions { retries: 2, ..server.options() };
    let message = partner(options).reply(&hello()).unwrap_err().to_string();
    assert!(message.contains("in 3 attempts") && message.ends_with("status 500: oops"), "{message}");
    assert_eq!(server.asked().len(), 3);
}

#[test]
fn refusals_and_garbage_are_clear_errors_at_once() {
    let refuse = |act: Act| {
        let server = Server::new(vec![act]);
        let error = partner(server.options()).reply(&hello()).unwrap_err();
        assert_eq!(server.asked().len(), 1, "{error}");
        (error.to_string().replace(&server.url, "URL"), error.hint().unwrap())
    };
    let said = |text: &str| json!({"error": {"message": text}}).to_string();
    let (message, hint) = refuse(Act::Reply(401, "", said("bad key")));
    assert_eq!(message, "URL/chat/completions answers with status 401: bad key");
    assert!(hint.contains("api_key_variable"));
    let (message, hint) = refuse(Act::Reply(404, "", said("no model judge")));
    assert_eq!(message, "URL/chat/completions answers with status 404: no model judge");
    assert!(hint.contains("/models"));
    let (message, _) = refuse(Act::Reply(301, "location: http://127.0.0.1:1/\r\n", String::new()));
    assert!(message.ends_with("status 301: no message"), "{message}");
    let (message, hint) = refuse(Act::Reply(200, "", "<html>hello</html>".into()));
    assert!(message.contains("is no chat completion") || message.contains("no chat completion"), "{message}");
    assert!(message.contains("<html>hello") && hint.contains("OpenAI-compatible"), "{message}");
    let (message, _) = refuse(Act::Reply(200, "", "{}".into()));
    assert!(message.ends_with("it has no `choices`"), "{message}");
    let (message, _) = refuse(Act::Reply(200, "", json!({"choices": [{"message": {"content": 3}}]}).to_string()));
    assert!(message.ends_with("`choices[0].message.content` is 3"), "{message}");
}

#[test]
fn the_key_comes_from_the_environment() {
    let server = Server::new(vec![completion("hi")]);
    let with_key = |variable: &str| RemoteOptions { api_key_variable: Some(variable.into()), ..server.options() };
    let error = partner(with_key("POSTTRAIN_TEST_NO_SUCH_KEY")).reply(&hello()).unwrap_err();
    assert!(error.to_string().contains("POSTTRAIN_TEST_NO_SUCH_KEY"), "{error}");
    assert!(error.hint().unwrap().contains("export POSTTRAIN_TEST_NO_SUCH_KEY="));
    assert!(server.asked().is_empty());
    // A variable that every process has stands for a key; nothing may be set in a test with threads.
    let path = std::env::var("PATH").unwrap();
    partner(with_key("PATH")).reply(&hello()).unwrap();
    assert!(server.asked()[0].0.contains(&format!("Bearer {}", path.trim())), "the key is sent");
}

#[test]
fn several_questions_share_the_line_but_not_more_than_allowed() {
    let server = Server::new(vec![completion("x")]);
    let options = RemoteOptions { concurrency: 3, ..server.options() };
    let questions: Vec<Vec<Line>> = (0..20).map(|i| vec![Line::new("user", i.to_string())]).collect();
    let replies = ask_all(&*partner(options), &questions);
    assert_eq!(replies.len(), 20);
    assert!(replies.iter().all(|reply| reply.as_ref().unwrap().text == "x"));
    assert!(server.most.load(Ordering::SeqCst) <= 3 + 1, "one more may still be closing");
    let mut asked: Vec<u32> = server
        .asked()
        .iter()
        .map(|(_, body)| body["messages"][0]["content"].as_str().unwrap().parse().unwrap())
        .collect();
    asked.sort_unstable();
    assert_eq!(asked, (0..20).collect::<Vec<_>>());
}

#[test]
fn impossible_options_are_refused() {
    let refused = |options: RemoteOptions| PartnerConfig::Remote(options).build().err().unwrap().to_string();
    let options = || RemoteOptions::new("http://localhost:1/v1", "m");
    assert!(refused(RemoteOptions { base_url: "localhost".into(), ..options() }).contains("base_url is \"localhost\""));
    assert!(refused(RemoteOptions { timeout_seconds: 0.0, ..options() }).contains("timeout_seconds is 0"));
    assert!(refused(RemoteOptions { deadline_seconds: f64::NAN, ..options() }).contains("deadline_seconds is NaN"));
    assert!(refused(RemoteOptions { concurrency: 0, ..options() }).contains("concurrency"));
    assert!(refused(RemoteOptions { temperature: -1.0, ..options() }).contains("temperature is -1"));
}

fn script(rules: &[(&str, &str)], otherwise: Option<&str>) -> PartnerConfig {
    let rules = rules.iter().map(|(when, say)| Rule { when: (*when).into(), say: (*say).into() }).collect();
    PartnerConfig::Scripted(ScriptedOptions { rules, otherwise: otherwise.map(str::to_owned) })
}

#[test]
fn a_script_says_the_first_rule_that_fits() {
    let partner = script(&[("left", "right"), ("l", "m")], None).build().unwrap();
    let ask = |text: &str| partner.reply(&[Line::new("user", "left"), Line::new("user", text)]);
    assert_eq!(ask("turn left").unwrap().text, "right");
    assert_eq!(ask("all").unwrap().text, "m");
    assert_eq!(ask("nothing").unwrap_err().to_string(), "the script has no rule for \"nothing\"");
    let partner = script(&[], Some("what?")).build().unwrap();
    assert_eq!(partner.reply(&[]).unwrap().text, "what?");
}

fn judge(partner: PartnerConfig, on_error: OnError) -> JudgeReward {
    let options = json!({"partner": partner, "template": "{question} {completion}: rate it", "low": 1, "high": 5});
    let options = JudgeOptions { on_error, ..serde_json::from_value(options).unwrap() };
    JudgeReward::new("judge".into(), options).unwrap()
}

fn score(reward: &JudgeReward, completions: &[&str]) -> Result<Vec<(f64, Status)>, String> {
    let columns: Columns = Columns::from_iter([("question".to_owned(), "What is {completion}?".into())]);
    let answer = |completion| Answer { prompt_text: "", completion, completion_ids: &[], columns: &columns };
    let answers: Vec<Answer> = completions.iter().map(|completion| answer(completion)).collect();
    let scores = reward.score(&answers).map_err(|error| error.to_string())?;
    Ok(scores.into_iter().map(|score| score.map(|score| (score.value, score.status)).unwrap()).collect())
}

#[test]
fn a_judges_number_becomes_a_value_and_nothing_else_does() {
    let rules = [
        ("good", "Nice. <score>5</score>"),
        ("middling", "<score>1</score> no: <score> 3.0 </score>"),
        ("bad", "<score>2</score>"),
        ("over", "<score>6</score>"),
        ("wordy", "<score>five</score>"),
        ("two", "<score>2 or 3</score>"),
        ("silent", "Five points."),
    ];
    let reward = judge(script(&rules, None), OnError::Score);
    let found = score(&reward, &["good", "middling", "bad", "over", "wordy", "two", "silent", "unheard of"]).unwrap();
    let error = (0.0, Status::Error);
    let expected = [(1.0, Status::Ok), (0.5, Status::Ok), (0.25, Status::Wrong), error, error, error, error, error];
    assert_eq!(found, expected);
    let stop = judge(script(&rules, None), OnError::Stop);
    assert_eq!(
        score(&stop, &["good", "silent"]).unwrap_err(),
        "reward judge: the judge's reply has no <score> with a number from 1 to 5: \"Five points.\""
    );
    assert!(score(&stop, &["unheard of"]).unwrap_err().contains("no rule"));
    let body = json!({"choices": [{"message": {"content": "Well, <sco"}, "finish_reason": "length"}]});
    let server = Server::new(vec![Act::Reply(200, "", body.to_string())]);
    assert_eq!(
        score(&judge(PartnerConfig::Remote(server.options()), OnError::Stop), &["long"]).unwrap_err(),
        "reward judge: the judge's reply, cut off at `max_tokens`, has no <score> with a number from 1 to 5: \"Well, <sco\""
    );
}

#[test]
fn a_share_of_the_best_score_is_that_score_and_other_fractions_are_none() {
    let rules = ["8/10", "10 / 10", "1/2", "8/100", "12/10", "0.8", r"\frac{8}{10}"];
    let rules: Vec<(String, String)> =
        rules.iter().map(|says| (format!("[{says}]"), format!("<score>{says}</score>"))).collect();
    let rules: Vec<(&str, &str)> = rules.iter().map(|(when, say)| (when.as_str(), say.as_str())).collect();
    let asked: Vec<&str> = rules.iter().map(|(when, _)| *when).collect();
    let judged = |low: f64, high: f64| -> Vec<Option<f64>> {
        let options = json!({"partner": script(&rules, None), "template": "{completion}", "low": low, "high": high});
        let options = JudgeOptions { on_error: OnError::Score, ..serde_json::from_value(options).unwrap() };
        let scores = score(&JudgeReward::new("judge".into(), options).unwrap(), &asked).unwrap();
        scores.into_iter().map(|(value, status)| (status != Status::Error).then_some(value)).collect()
    };
    assert_eq!(judged(0.0, 10.0), [Some(0.8), Some(1.0), None, None, None, Some(0.08), None]);
    assert_eq!(judged(-10.0, 10.0), [None, None, None, None, None, Some(0.54), None], "where 0 is not the worst");
}

#[test]
fn a_judge_sees_prompt_answer_and_columns_once() {
    let server = Server::new(vec![completion("<score>4</score>")]);
    let reward = judge(PartnerConfig::Remote(server.options()), OnError::Stop);
    // Neither the column nor the answer can write into the template.
    assert_eq!(score(&reward, &["{question} {nothing}"]).unwrap(), [(0.75, Status::Ok)]);
    let content = server.asked()[0].1["messages"][0]["content"].clone();
    assert_eq!(content, "What is {completion}? {question} {nothing}: rate it");
}

#[test]
fn judges_are_configured_like_other_rewards() {
    let config: RewardConfig = serde_json::from_value(json!({
        "type": "judge", "name": "style", "weight": 0.5,
        "partner": {"type": "remote", "base_url": "http://localhost:8000/v1", "model": "m"},
    }))
    .unwrap();
    assert_eq!(config.build().unwrap().name(), "style");
    let RewardKind::Judge(options) = &config.kind else { panic!("{config:?}") };
    let refused = |options: JudgeOptions| JudgeReward::new("j".into(), options).err().unwrap().to_string();
    let message = refused(JudgeOptions { template: "rate it".into(), ..options.clone() });
    assert_eq!(message, "reward j: template has no {completion}, so that the judge would not see the answer");
    assert!(refused(JudgeOptions { low: 3.0, high: 3.0, ..options.clone() }).contains("low is 3 and high is 3"));
    let reward = JudgeReward::new("j".into(), JudgeOptions { template: "{x} {completion}".into(), ..options.clone() });
    assert!(score(&reward.unwrap(), &["a"]).unwrap_err().contains("has no column \"x\""));
}
