//! `posttrain generate` and `posttrain chat`: prompts in, answers out.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::Path;
use std::sync::Arc;

use base::{Hint, Purpose, Random};
use data::read::jsonl;
use model::chat::Message;
use rollout::{
    Finish, Generator, Guidance, GuidanceOptions, LogitsHook, PrefixCache, PromptTokens, Request, Returns,
    SamplingOptions, ValueHead, ValueOutputs,
};
use serde_json::{Value, json};

use crate::cli;
use crate::failure::Failure;
use crate::opened::{Opened, Opener};
use crate::terminal::{Terminal, print};
use crate::voice::Voice;

/// Sequences decoded at once; results do not depend on it.
pub(super) const BATCH: usize = 32;

pub(super) fn options(flags: &cli::Sampling) -> Result<SamplingOptions, Failure> {
    let defaults = SamplingOptions::default();
    let options = SamplingOptions {
        temperature: flags.temperature,
        top_k: flags.top_k.unwrap_or(defaults.top_k),
        top_p: flags.top_p.unwrap_or(defaults.top_p),
        min_p: flags.min_p.unwrap_or(defaults.min_p),
        max_new_tokens: flags.max_new_tokens,
        stop: flags.stop.clone(),
        ..defaults
    };
    options.validate().map_err(|error| Failure::usage(error.to_string()))?;
    Ok(options)
}

pub(super) fn open(flags: &cli::Model, opener: Opener) -> Result<Opened, Failure> {
    opener.open_to_generate(flags.device, &flags.model, 0, flags.precision.into(), flags.weights.into())
}

/// A value model that guides, and how.
pub(super) struct Guide {
    opened: Opened,
    outputs: ValueOutputs,
    options: GuidanceOptions,
}

impl Guide {
    /// The guide of `model` that the flags name, if they name one.
    pub(super) fn open(
        flags: &cli::Guide,
        computing: &cli::Model,
        model: &Opened,
        opener: Opener,
    ) -> Result<Option<Self>, Failure> {
        let Some(name) = &flags.guide else { return Ok(None) };
        let options = GuidanceOptions { eta: flags.guide_eta, top_k: flags.guide_top_k, ..GuidanceOptions::default() };
        options.validate().map_err(|error| Failure::usage(format!("the guide's {error}")))?;
        let returns = match (flags.guide_loss, &flags.guide_returns[..]) {
            (cli::GuideLoss::Bernoulli, _) => Returns::Bernoulli,
            (cli::GuideLoss::Squared, _) => Returns::Mean,
            (cli::GuideLoss::Histogram, &[low, high]) if low < high => Returns::Histogram { low, high },
            (cli::GuideLoss::Histogram, range) => {
                return Err(Failure::usage(format!("the guide's returns are {range:?}, expected two rising numbers")));
            }
        };
        let head = match flags.guide_head {
            cli::GuideHead::State => ValueHead::State,
            cli::GuideHead::Action => ValueHead::Action,
        };
        let mut opened = opener.open_on(computing.device, name, 0)?;
        model.same_vocabulary("model", "guide", &opened).map_err(|failure| {
            failure.hint("a guide reads the tokens of the model: choose a value model that was trained for it")
        })?;
        opened.decoder.prepare(computing.precision.into());
        let guide = Self { opened, outputs: ValueOutputs { head, returns }, options };
        // Its head is looked at before anything is generated.
        guide.hook(&SamplingOptions::default())?;
        Ok(Some(guide))
    }

    /// The guidance of one generation.
    pub(super) fn hook(&self, sampling: &SamplingOptions) -> Result<Guidance<'_>, Failure> {
        Guidance::new(&self.opened.decoder, self.outputs, &self.options, sampling).map_err(|error| {
            let failure = Failure::new(format!("guide {}: {error}", self.opened.name));
            match error.hint() {
                Some(hint) => failure.hint(hint),
                None => failure,
            }
        })
    }
}

/// The tokens of a conversation, ready for the assistant.
pub(super) fn encode(model: &Opened, messages: &[Message]) -> Result<Arc<[u32]>, Failure> {
    let Some(template) = &model.template else {
        let failure = Failure::new(format!("{} has no chat template", model.name));
        return Err(failure.hint("it is a base model: give plain text with `generate --raw`"));
    };
    Ok(template.encode(&model.tokenizer, messages, None, true)?.into())
}

fn encode_plain(model: &Opened, text: &str) -> Result<Arc<[u32]>, Failure> {
    let begin = model.tokenizer.bos().filter(|_| model.tokenizer.adds_bos());
    let ids: Arc<[u32]> = begin.into_iter().chain(model.tokenizer.encode(text)?).collect();
    if ids.is_empty() {
        return Err(Failure::usage("the prompt is empty"));
    }
    Ok(ids)
}

/// `posttrain generate`
pub fn generate(arguments: &cli::Generate, opener: Opener) -> Result<(), Failure> {
    let options = options(&arguments.sampling)?;
    Voice::check(&arguments.several, &options)?;
    let random = Random::new(arguments.sampling.seed, Purpose::Sampling);
    let generator = Generator::new(&options, BATCH, random);
    let Some(prompt) = &arguments.prompt else {
        return from_lines(arguments, &generator, opener);
    };
    let voice = Voice::open(&arguments.model, &arguments.several, opener)?;
    let guide = Guide::open(&arguments.guide, &arguments.model, &voice.model, opener)?;
    let hook = guide.as_ref().map(|guide| guide.hook(&options)).transpose()?;
    let generator = Generator { hook: hook.as_ref().map(|hook| hook as &dyn LogitsHook), ..generator };
    let ids = match arguments.raw {
        true => encode_plain(&voice.model, prompt)?,
        false => {
            let system = arguments.system.iter().map(|text| Message::new("system", text));
            let messages: Vec<Message> = system.chain([Message::new("user", prompt)]).collect();
            encode(&voice.model, &messages)?
        }
    };
    let draws = (arguments.sampling.seed, 0);
    if arguments.n == 1 {
        stream(&voice, &generator, draws, &ids, &mut PrefixCache::new(0))?;
        return Ok(());
    }
    let requests: Vec<Request> = Request::samples(0, &ids, arguments.n).collect();
    let episodes = voice.answer(&generator, draws, None, &requests, |_| {})?;
    print(episodes.iter().map(|episode| format!("{}\n", json!({"completion": episode.text}))).collect::<String>())
}

/// Answers one prompt on standard output, while the answer is made where that is possible, and returns it.
fn stream(
    voice: &Voice,
    generator: &Generator<'_>,
    draws: (u64, u32),
    ids: &Arc<[u32]>,
    cache: &mut PrefixCache,
) -> Result<String, Failure> {
    let requests: Vec<Request> = Request::samples(0, ids, 1).collect();
    let mut failed = None;
    let episodes = voice.answer(generator, draws, Some(cache), &requests, |progress| {
        for piece in progress.pieces.iter().filter(|_| voice.streams()) {
            if failed.is_none() {
                failed = print(&piece.text).err();
            }
        }
    })?;
    if let Some(failure) = failed {
        return Err(failure);
    }
    let text = episodes.into_iter().next().map(|episode| episode.text).unwrap_or_default();
    if !voice.streams() {
        print(&text)?;
    }
    print("\n")?;
    Ok(text)
}

/// JSON objects with `prompt` or `messages` in, the same objects with `completions` out.
fn from_lines(arguments: &cli::Generate, generator: &Generator<'_>, opener: Opener) -> Result<(), Failure> {
    if std::io::stdin().is_terminal() {
        let failure = Failure::usage("no prompt: expected `--prompt TEXT`, or JSON lines on standard input");
        return Err(failure.hint("for example: echo '{\"prompt\": \"What is 2 + 2?\"}' | posttrain generate"));
    }
    let voice = Voice::open(&arguments.model, &arguments.several, opener)?;
    let model = &voice.model;
    let guide = Guide::open(&arguments.guide, &arguments.model, model, opener)?;
    let hook = guide.as_ref().map(|guide| guide.hook(generator.options)).transpose()?;
    let generator = &Generator { hook: hook.as_ref().map(|hook| hook as &dyn LogitsHook), ..*generator };
    let mut rows = Vec::new();
    let mut requests = Vec::new();
    let mut input = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut input);
    read.map_err(|error| Failure::new(format!("cannot read standard input: {error}")))?;
    for row in jsonl::parse_each(&input, Path::new("standard input")) {
        let data::Row { source, columns } = row?;
        let wrong = |reason: String| Failure::new(format!("{source}: {reason}"));
        let row = Value::Object(columns);
        let ids = match (&row["messages"], &row["prompt"]) {
            (list @ Value::Array(_), _) | (_, list @ Value::Array(_)) if arguments.raw => {
                let failure = wrong(format!(
                    "expected a text in `prompt`, as `--raw` says, got {} messages",
                    list.as_array().map_or(0, Vec::len)
                ));
                return Err(failure.hint("leave out `--raw`: messages go through the chat template"));
            }
            (list @ Value::Array(_), _) | (_, list @ Value::Array(_)) => {
                encode(model, &messages(list).map_err(wrong)?)?
            }
            (_, Value::String(text)) if arguments.raw => encode_plain(model, text)?,
            (_, Value::String(text)) => encode(model, &[Message::new("user", text)])?,
            _ => return Err(wrong("expected an object with `prompt` (text or messages) or `messages`".into())),
        };
        requests.extend(Request::samples(rows.len() as u32, &ids, arguments.n));
        rows.push(row);
    }
    let mut progress = opener.terminal.progress("generating", "answer", requests.len() as u64);
    let (mut sampled, mut prompts) = (0, PromptTokens::default());
    let draws = (arguments.sampling.seed, 0);
    let episodes = voice.answer(generator, draws, None, &requests, |now| {
        progress.update(now.finished as u64, &format!("{} tokens", now.tokens));
        (sampled, prompts) = (now.tokens, now.prompt_tokens);
    })?;
    progress.clear();
    opener.terminal.note(format!(
        "{} answers of {sampled} tokens; tokens of prompts: {} computed, {} reused",
        episodes.len(),
        prompts.computed,
        prompts.reused
    ));
    let mut text = String::new();
    for (mut row, answers) in rows.into_iter().zip(episodes.chunks(arguments.n as usize)) {
        row["completions"] = answers.iter().map(|answer| answer.text.clone()).collect();
        row["finish"] =
            answers.iter().map(|answer| if answer.finish == Finish::Stop { "stop" } else { "length" }).collect();
        text += &format!("{row}\n");
    }
    print(text)
}

fn messages(value: &Value) -> Result<Vec<Message>, String> {
    serde_json::from_value(value.clone()).map_err(|error| format!("not a list of messages: {error}"))
}

/// `posttrain chat`
pub fn chat(arguments: &cli::Chat, opener: Opener) -> Result<(), Failure> {
    let options = options(&arguments.sampling)?;
    Voice::check(&arguments.several, &options)?;
    let voice = Voice::open(&arguments.model, &arguments.several, opener)?;
    let model = &voice.model;
    let guide = Guide::open(&arguments.guide, &arguments.model, model, opener)?;
    let terminal = opener.terminal;
    terminal.note(format!("{}; /reset starts over, Ctrl-D ends", model.name));
    let system: Vec<Message> = arguments.system.iter().map(|text| Message::new("system", text)).collect();
    let mut messages = system.clone();
    // What was said before is not computed again.
    let mut cache = PrefixCache::new(model.decoder.config().max_positions);
    let mut turn = 0;
    while let Some(line) = ask(terminal)? {
        match line.trim() {
            "" => continue,
            "/reset" => {
                messages.clone_from(&system);
                continue;
            }
            "/quit" | "/exit" => break,
            text => messages.push(Message::new("user", text)),
        }
        turn += 1;
        let random = Random::new(arguments.sampling.seed, Purpose::Sampling).step(turn);
        let hook = guide.as_ref().map(|guide| guide.hook(&options)).transpose()?;
        let hook = hook.as_ref().map(|hook| hook as &dyn LogitsHook);
        let generator = Generator { hook, ..Generator::new(&options, 1, random) };
        let draws = (arguments.sampling.seed, turn);
        let answer = stream(&voice, &generator, draws, &encode(model, &messages)?, &mut cache)?;
        messages.push(Message::new("assistant", &answer));
    }
    Ok(())
}

/// The next line of the user; `None` at the end.
fn ask(terminal: Terminal) -> Result<Option<String>, Failure> {
    if terminal.interactive {
        // A prompt that cannot be shown is no reason to stop.
        let _ = write!(std::io::stderr(), "> ").and_then(|()| std::io::stderr().flush());
    }
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line);
    match read.map_err(|error| Failure::new(format!("cannot read standard input: {error}")))? {
        0 => Ok(None),
        _ => Ok(Some(line)),
    }
}
