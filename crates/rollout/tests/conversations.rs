//! Conversations: tokens that stay, masks, limits, and independence of everything but the request.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base::{Hint, Purpose, Random};
use kernels::Precision;
use model::Family;
use model::chat::{ChatTemplate, Message};
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use posttrain_rollout::{
    ConversationOptions, Dialogue, Episode, Error, Fidelity, Finish, Generator, LogitsContext, LogitsHook, Opening,
    PromptTokens, Request, Respondent, Response, SamplingOptions, TurnEnd,
};

use crate::common;

/// Says what it heard, and ends after as many turns as the conversation's number and what was said ask for.
#[derive(Default)]
struct Echo {
    slow: bool,
    heard: Mutex<BTreeMap<(usize, usize), String>>,
}

impl Respondent for Echo {
    fn respond(&self, turn: TurnEnd<'_>) -> Result<Response, Box<dyn StdError + Send + Sync>> {
        if self.slow {
            // Answers overtake each other.
            std::thread::sleep(Duration::from_millis(7 * (turn.conversation as u64 % 3)));
        }
        let before = self.heard.lock().unwrap().insert((turn.conversation, turn.number), turn.text.to_owned());
        assert_eq!(before, None, "each turn is asked about once");
        if turn.number == turn.conversation % 4 {
            return Ok(Response::End);
        }
        Ok(Response::Continue(vec![Message::user(&format!("{}: {:?}", turn.number, turn.text.chars().next()))]))
    }

    fn is_slow(&self) -> bool {
        self.slow
    }
}

/// Makes the model end its turns now and then.
struct EndsTurns;

impl LogitsHook for EndsTurns {
    fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>) {
        let (length, sample) = (context.completion.len(), context.request.sample as usize);
        logits[256] = f32::NEG_INFINITY;
        logits[258] = f32::NEG_INFINITY;
        if (length + sample) % 5 == 4 {
            logits[common::END as usize] = 1e4;
        }
    }
}

struct World {
    decoder: Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Vec<Message>,
    sampling: SamplingOptions,
    options: ConversationOptions,
}

impl World {
    fn new(family: Family, precision: Precision) -> Self {
        Self {
            decoder: common::tiny(family, precision),
            tokenizer: Tokenizer::bytes().unwrap(),
            template: ChatTemplate::chatml().unwrap(),
            messages: vec![Message::system("Be short."), Message::user("hello")],
            sampling: SamplingOptions { max_new_tokens: 200, temperature: 0.7, ..Default::default() },
            options: ConversationOptions { max_turns: 10, max_turn_tokens: 4 },
        }
    }

    fn requests(&self, samples: u32) -> Vec<Request> {
        let prompt = self.template.encode(&self.tokenizer, &self.messages, None, true).unwrap().into();
        Request::samples(3, &prompt, samples).collect()
    }

    fn converse(
        &self,
        requests: &[Request],
        respondent: &dyn Respondent,
        batch_size: usize,
    ) -> posttrain_rollout::Result<Vec<Episode>> {
        let openings = vec![Opening { messages: &self.messages, tools: None }; requests.len()];
        let dialogue = Dialogue { template: &self.template, openings: &openings, respondent, options: &self.options };
        let random = Random::new(5, Purpose::Sampling);
        let generator = Generator { hook: Some(&EndsTurns), ..Generator::new(&self.sampling, batch_size, random) };
        generator.converse(&self.decoder, &self.tokenizer, requests, &dialogue, |_| {})
    }
}

#[test]
fn tokens_are_those_sampled_and_what_the_template_puts_between_them() {
    let world = World::new(Family::Llama, Precision::F32);
    let echo = Echo::default();
    let episodes = world.converse(&world.requests(8), &echo, 4).unwrap();
    let heard = echo.heard.into_inner().unwrap();
    for (index, episode) in episodes.iter().enumerate() {
        assert_eq!(episode.turns.len(), index % 4 + 1);
        assert_eq!(episode.finish, Finish::Stop);
        assert_eq!(episode.loss_mask.len(), episode.completion.len());
        let mut at = 0;
        for (number, turn) in episode.turns.iter().enumerate() {
            // What follows a turn, worked out by hand from ChatML.
            if number > 0 {
                let said = &heard[&(index, number - 1)];
                let closed = episode.turns[number - 1].finish == Finish::Stop;
                let given = format!(
                    "{}\n<|im_start|>user\n{}: {:?}<|im_end|>\n<|im_start|>assistant\n",
                    if closed { "" } else { "<|im_end|>" },
                    number - 1,
                    said.chars().next()
                );
                let given = world.tokenizer.encode_with_special(&given).unwrap();
                assert_eq!(episode.completion[at..turn.tokens.start], given);
                assert!(episode.loss_mask[at..turn.tokens.start].iter().all(|sampled| !sampled));
                assert!(episode.log_probs[at..turn.tokens.start].iter().all(|log_prob| *log_prob == 0.0));
            }
            assert!((1..=4).contains(&turn.tokens.len()));
            assert!(episode.loss_mask[turn.tokens.clone()].iter().all(|sampled| *sampled));
            let tokens = &episode.completion[turn.tokens.clone()];
            assert_eq!(turn.finish == Finish::Stop, tokens.last() == Some(&common::END));
            assert_eq!(world.tokenizer.decode(tokens), heard[&(index, number)]);
            at = turn.tokens.end;
        }
        assert_eq!(at, episode.completion.len(), "nothing follows the last turn");
        assert_eq!(episode.text, heard[&(index, episode.turns.len() - 1)]);
    }
    assert!(episodes.iter().flat_map(|episode| &episode.turns).any(|turn| turn.finish == Finish::Length));
}

#[test]
fn log_probs_are_the_trainers_in_every_turn() {
    for (family, precision) in [(Family::Qwen3, Precision::F32), (Family::Gemma3, Precision::Bf16)] {
        let world = World::new(family, precision);
        let episodes = world.converse(&world.requests(8), &Echo::default(), 3).unwrap();
        let trained = common::trainer_log_probs(&world.decoder, &episodes, 0.7, true);
        for (episode, trained) in episodes.iter().zip(trained) {
            let mask = |values: &[f32]| -> Vec<u32> {
                let sampled = values.iter().zip(&episode.loss_mask).filter(|(_, sampled)| **sampled);
                sampled.map(|(value, _)| value.to_bits()).collect()
            };
            assert_eq!(mask(&episode.log_probs), mask(&trained), "{family:?}, {precision:?}");
        }
    }
}

#[test]
fn neither_batch_nor_order_nor_slow_answers_matter() {
    let world = World::new(Family::Llama, Precision::Bf16);
    let requests = world.requests(10);
    let expected = world.converse(&requests, &Echo::default(), 1).unwrap();
    for (batch_size, slow) in [(3, false), (32, false), (1, true), (4, true), (32, true)] {
        let episodes = world.converse(&requests, &Echo { slow, ..Echo::default() }, batch_size).unwrap();
        assert_eq!(episodes, expected, "{batch_size} at a time, slow: {slow}");
    }
}

#[test]
fn a_single_turn_is_the_episode_without_conversation() {
    struct Ends;
    impl Respondent for Ends {
        fn respond(&self, _: TurnEnd<'_>) -> Result<Response, Box<dyn StdError + Send + Sync>> {
            Ok(Response::End)
        }
    }
    let world = World::new(Family::Mistral, Precision::F32);
    let requests = world.requests(6);
    let sampling = SamplingOptions { max_new_tokens: 4, ..world.sampling.clone() };
    let generator =
        Generator { hook: Some(&EndsTurns), ..Generator::new(&sampling, 4, Random::new(5, Purpose::Sampling)) };
    let alone = generator.generate(&world.decoder, &world.tokenizer, &requests, |_| {}).unwrap();
    let held = world.converse(&requests, &Ends, 4).unwrap();
    for (alone, held) in alone.iter().zip(&held) {
        assert!(held.transcript.is_some() && alone.transcript.is_none());
        // The conversation's turn ended; that it ran out of tokens is said by the turn.
        assert_eq!(held.turns, alone.turns);
        assert_eq!(Episode { transcript: None, finish: alone.finish, ..held.clone() }, *alone);
    }
}

#[test]
fn limits_end_conversations() {
    struct Endless(AtomicUsize);
    impl Respondent for Endless {
        fn respond(&self, _: TurnEnd<'_>) -> Result<Response, Box<dyn StdError + Send + Sync>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Response::Continue(vec![Message::user("go on")]))
        }
    }
    let mut world = World::new(Family::Llama, Precision::F32);
    world.options.max_turns = 3;
    let endless = Endless(AtomicUsize::new(0));
    let episodes = world.converse(&world.requests(4), &endless, 4).unwrap();
    assert!(episodes.iter().all(|episode| episode.turns.len() == 3 && episode.finish == Finish::Length));
    assert_eq!(endless.0.into_inner(), 12, "the last turn is answered too: its reward counts");

    world.options.max_turns = 1000;
    world.sampling.max_new_tokens = 100;
    for episode in world.converse(&world.requests(4), &Endless(AtomicUsize::new(0)), 4).unwrap() {
        assert_eq!(episode.finish, Finish::Length);
        assert!(episode.completion.len() <= 100);
        assert_eq!(episode.loss_mask.last(), Some(&true), "no answer without room for a turn after it");
        assert_eq!(episode.turns.last().unwrap().tokens.end, episode.completion.len());
    }
}

/// Always says the same.
struct Says(&'static [u8]);

impl LogitsHook for Says {
    fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>) {
        // Turns are of equal length, so the place in the turn follows from what was sampled last.
        let last = context.completion.iter().rev().take_while(|&&id| id < 256 && id != u32::from(b'\n')).count();
        let next = self.0.get(last).map_or(common::END, |byte| u32::from(*byte));
        logits[next as usize] = 1e6;
    }
}

#[test]
fn fidelity_tells_tokens_text_and_another_text_apart() {
    let run = |template: &str, says: &'static [u8]| {
        let mut world = World::new(Family::Llama, Precision::F32);
        world.template = ChatTemplate::new(template, "", "<|im_end|>").unwrap();
        world.options.max_turn_tokens = 20;
        let requests = &world.requests(3)[2..];
        let openings = [Opening { messages: &world.messages, tools: None }];
        let echo = Echo::default();
        // The only conversation is number 0, which ends at once: let it go on once.
        struct Once<'a>(&'a Echo);
        impl Respondent for Once<'_> {
            fn respond(&self, turn: TurnEnd<'_>) -> Result<Response, Box<dyn StdError + Send + Sync>> {
                self.0.respond(TurnEnd { conversation: 1, ..turn })
            }
        }
        let dialogue = Dialogue {
            template: &world.template,
            openings: &openings,
            respondent: &Once(&echo),
            options: &world.options,
        };
        let generator = Generator {
            hook: Some(&Says(says)),
            ..Generator::new(&world.sampling, 1, Random::new(5, Purpose::Sampling))
        };
        let episode =
            generator.converse(&world.decoder, &world.tokenizer, requests, &dialogue, |_| {}).unwrap().remove(0);
        assert_eq!(episode.turns.len(), 2);
        episode.transcript.unwrap().fidelity
    };
    let chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                  {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    assert_eq!(run(chatml, b"yes"), Fidelity::Tokens);
    // A byte that is no UTF-8 is U+FFFD in the text, which is three bytes when encoded.
    assert_eq!(run(chatml, b"a\xffb"), Fidelity::Text);
    let trims = chatml.replace("{{ m.content }}", "{{ m.content | trim }}");
    assert_eq!(run(&trims, b"yes "), Fidelity::Differs);
    assert_eq!(run(&chatml.replace("{{ m.content }}", "{{ m.content | upper }}"), b"yes"), Fidelity::Differs);
}

#[test]
fn failures_say_whose_turn_it_was() {
    struct Fails(bool);
    impl Respondent for Fails {
        fn respond(&self, turn: TurnEnd<'_>) -> Result<Response, Box<dyn StdError + Send + Sync>> {
            match turn.number {
                1 => Err("the server is gone".into()),
                _ => Ok(Response::Continue(vec![Message::user("go on")])),
            }
        }
        fn is_slow(&self) -> bool {
            self.0
        }
    }
    let world = World::new(Family::Llama, Precision::F32);
    for slow in [false, true] {
        let error = world.converse(&world.requests(1), &Fails(slow), 2).unwrap_err();
        assert_eq!(error.to_string(), "prompt 3, sample 0, turn 1: the server is gone");
        assert_eq!(error.hint(), None);
    }
    let openings = [];
    let dialogue =
        Dialogue { template: &world.template, openings: &openings, respondent: &Fails(false), options: &world.options };
    let generator = Generator::new(&world.sampling, 1, Random::new(5, Purpose::Sampling));
    let error =
        generator.converse(&world.decoder, &world.tokenizer, &world.requests(2), &dialogue, |_| {}).unwrap_err();
    assert!(matches!(error, Error::Openings { openings: 0, requests: 2 }));
    let options = ConversationOptions { max_turns: 0, ..Default::default() };
    assert_eq!(options.validate().unwrap_err().to_string(), "max_turns is 0, expected at least 1");
}

#[test]
fn a_conversation_computes_every_token_once() {
    let world = World::new(Family::Llama, Precision::F32);
    let requests = world.requests(8);
    let openings = vec![Opening { messages: &world.messages, tools: None }; requests.len()];
    let echo = Echo::default();
    let dialogue =
        Dialogue { template: &world.template, openings: &openings, respondent: &echo, options: &world.options };
    let generator =
        Generator { hook: Some(&EndsTurns), ..Generator::new(&world.sampling, 3, Random::new(5, Purpose::Sampling)) };
    let (mut prompts, mut tokens) = (PromptTokens::default(), 0);
    let episodes = generator
        .converse(&world.decoder, &world.tokenizer, &requests, &dialogue, |now| {
            (prompts, tokens) = (now.prompt_tokens, now.tokens);
            assert!(now.running <= 3);
        })
        .unwrap();
    let length = requests[0].prompt.len();
    assert_eq!(prompts, PromptTokens { computed: length, reused: 7 * length });
    let sampled = episodes.iter().flat_map(|episode| &episode.loss_mask).filter(|sampled| **sampled).count();
    assert_eq!(tokens, sampled);
}
