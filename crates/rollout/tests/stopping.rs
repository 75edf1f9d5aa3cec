//! Where completions end, and the text that is left of them.

use base::{Purpose, Random};
use kernels::Precision;
use model::Family;
use model::tokenizer::Tokenizer;
use posttrain_rollout::stop::StopStrings;
use posttrain_rollout::{Episode, Finish, Generator, LogitsContext, LogitsHook, Request, SamplingOptions};
use proptest::prelude::*;

use crate::common;

/// Makes the model say exactly these bytes, then end-of-text for ever.
struct Script(Vec<u8>);

impl LogitsHook for Script {
    fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>) {
        let next = self.0.get(context.completion.len()).map_or(common::END, |&byte| u32::from(byte));
        for (id, logit) in logits.iter_mut().enumerate() {
            // Not banned but hopeless, so that a ban of end-of-text leaves something.
            *logit = if id as u32 == next { 0.0 } else { -50.0 };
        }
    }
}

/// The completion of a scripted model, and its streamed text.
fn say(text: &[u8], options: SamplingOptions, prefix: &[u8]) -> (Episode, String) {
    let decoder = common::tiny(Family::Llama, Precision::F32);
    let tokenizer = Tokenizer::bytes().unwrap();
    let script = Script(text.to_vec());
    let generator = Generator { hook: Some(&script), ..Generator::new(&options, 4, Random::new(1, Purpose::Sampling)) };
    let prefix = prefix.iter().map(|&byte| u32::from(byte)).collect();
    let request = Request { prompt_id: 0, sample: 0, prompt: [1, 2, 3].into(), prefix };
    let mut streamed = String::new();
    let episodes = generator
        .generate(&decoder, &tokenizer, &[request], |progress| {
            progress.pieces.iter().for_each(|piece| streamed.push_str(&piece.text));
        })
        .unwrap();
    let episode = episodes.into_iter().next().unwrap();
    assert_eq!(streamed, episode.text, "the pieces join to the text");
    (episode, streamed)
}

fn stopping_at(stop: &[&str]) -> SamplingOptions {
    SamplingOptions {
        max_new_tokens: 40,
        stop: stop.iter().map(|&s| s.into()).collect(),
        ..SamplingOptions::greedy(40)
    }
}

#[test]
fn the_end_token_stays_in_the_tokens_and_out_of_the_text() {
    let (episode, _) = say(b"four", stopping_at(&[]), b"");
    assert_eq!((episode.text.as_str(), episode.finish), ("four", Finish::Stop));
    assert_eq!(episode.completion, [102, 111, 117, 114, common::END]);
    assert!(episode.loss_mask.iter().all(|&sampled| sampled));
}

#[test]
fn a_stop_string_across_tokens_cuts_the_text_and_keeps_the_tokens() {
    let (episode, _) = say(b"a = 4\n\nQ: more", stopping_at(&["\nQ:", "\n\n"]), b"");
    assert_eq!((episode.text.as_str(), episode.finish), ("a = 4", Finish::Stop));
    assert_eq!(episode.completion.len(), "a = 4\n\n".len());
}

#[test]
fn a_stop_string_of_several_bytes_per_character() {
    let text = "naïve — ✅ done";
    let (episode, _) = say(text.as_bytes(), stopping_at(&["✅"]), b"");
    assert_eq!((episode.text.as_str(), episode.finish), ("naïve — ", Finish::Stop));
    assert_eq!(episode.completion.len(), "naïve — ✅".len());
}

#[test]
fn broken_utf8_is_shown_as_such() {
    let (episode, _) = say(b"ok \xF0\x9F", SamplingOptions::greedy(5), b"");
    assert_eq!((episode.finish, episode.completion.len()), (Finish::Length, 5));
    assert!(episode.text.starts_with("ok ") && episode.text.contains('\u{FFFD}'), "{:?}", episode.text);
}

#[test]
fn length_ends_what_nothing_stops() {
    let (episode, _) = say(b"abcdefgh", SamplingOptions::greedy(3), b"");
    assert_eq!((episode.text.as_str(), episode.finish, episode.log_probs.len()), ("abc", Finish::Length, 3));
    // The end token as the last one allowed is still a stop.
    let (episode, _) = say(b"ab", SamplingOptions::greedy(3), b"");
    assert_eq!((episode.text.as_str(), episode.finish), ("ab", Finish::Stop));
}

#[test]
fn own_stop_tokens_work_like_the_models() {
    let options = SamplingOptions { stop_token_ids: vec![u32::from(b'.')], ..SamplingOptions::greedy(20) };
    let (episode, _) = say(b"Yes. No.", options, b"");
    assert_eq!((episode.text.as_str(), episode.completion.len(), episode.finish), ("Yes", 4, Finish::Stop));
}

/// Makes the model say these tokens, then end-of-text for ever.
struct Tokens(Vec<u32>);

impl LogitsHook for Tokens {
    fn apply(&self, logits: &mut [f32], context: &LogitsContext<'_>) {
        logits.fill(-50.0);
        logits[*self.0.get(context.completion.len()).unwrap_or(&common::END) as usize] = 0.0;
    }
}

#[test]
fn the_name_of_a_special_token_stops_at_the_token_and_at_its_text() {
    let decoder = common::tiny(Family::Llama, Precision::F32);
    let tokenizer = Tokenizer::bytes().unwrap();
    let options = stopping_at(&["<|im_start|>"]);
    let say = |tokens: Vec<u32>| {
        let script = Tokens(tokens);
        let random = Random::new(1, Purpose::Sampling);
        let generator = Generator { hook: Some(&script), ..Generator::new(&options, 4, random) };
        let request = Request { prompt_id: 0, sample: 0, prompt: [1, 2, 3].into(), prefix: Vec::new() };
        generator.generate(&decoder, &tokenizer, &[request], |_| {}).unwrap().remove(0)
    };
    let episode = say(vec![97, 256, 98]);
    assert_eq!((episode.text.as_str(), episode.finish), ("a", Finish::Stop));
    assert_eq!(episode.completion, [97, 256]);
    let spelt: Vec<u32> = "a<|im_start|>b".bytes().map(u32::from).collect();
    let episode = say(spelt.clone());
    assert_eq!((episode.text.as_str(), episode.finish), ("a", Finish::Stop));
    assert_eq!(episode.completion, spelt[..spelt.len() - 1]);
}

#[test]
fn stop_tokens_outside_the_vocabulary_are_refused() {
    let decoder = common::tiny(Family::Llama, Precision::F32);
    let options = SamplingOptions { stop_token_ids: vec![3, 259], ..SamplingOptions::greedy(4) };
    let generator = Generator::new(&options, 4, Random::new(1, Purpose::Sampling));
    let error =
        generator.generate(&decoder, &Tokenizer::bytes().unwrap(), &common::requests(1, 1), |_| {}).unwrap_err();
    let expected = "stop_token_ids is 259 for a vocabulary of 259, expected tokens of the vocabulary";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn nothing_stops_before_the_fewest_tokens() {
    let options = SamplingOptions { min_new_tokens: 6, ..stopping_at(&["b"]) };
    let (episode, _) = say(b"abc", options.clone(), b"");
    // End-of-text is banned at the positions 3 and 4, where the script has nothing else to say.
    assert_eq!(episode.completion.len(), 6);
    assert_eq!(episode.completion[5], common::END);
    assert!(!episode.completion[..5].contains(&common::END));
    assert!(episode.text.starts_with("abc"), "{:?}", episode.text);
    let (episode, _) = say(b"abcdefbg", options, b"");
    assert_eq!((episode.text.as_str(), episode.completion.len()), ("abcdef", 7));
}

#[test]
fn forced_tokens_stop_nothing_and_are_not_trained_on() {
    let (episode, _) = say(b"<think>\nfour\n", stopping_at(&["\n"]), b"<think>\n");
    assert_eq!((episode.text.as_str(), episode.finish), ("<think>\nfour", Finish::Stop));
    assert_eq!(episode.loss_mask, [[false; 8].as_slice(), &[true; 5]].concat());
    assert_eq!(episode.log_probs.len(), 13);
    assert!(episode.log_probs.iter().all(|log_prob| log_prob.is_finite() && *log_prob < 0.0));
}

/// With a script the drawn token has all the probability after the hook, and the model's own before it.
#[test]
fn hooks_change_the_draw_and_not_the_log_probs() {
    let options = SamplingOptions { max_new_tokens: 4, ..SamplingOptions::default() };
    let (episode, _) = say(b"zyxw", options, b"");
    assert_eq!(episode.text, "zyxw");
    let trainer = common::trainer_log_probs(
        &common::tiny(Family::Llama, Precision::F32),
        std::slice::from_ref(&episode),
        1.0,
        true,
    );
    assert_eq!(common::bits(&episode.log_probs), common::bits(&trainer[0]));
    assert!(episode.log_probs.iter().all(|log_prob| *log_prob < -0.1));
    assert!(
        episode.filtered_log_probs.iter().all(|log_prob| log_prob.abs() < 1e-6),
        "{:?}",
        episode.filtered_log_probs
    );
}

proptest! {
    /// However the text is cut into pieces, the result is the text before the stop string that completes first.
    #[test]
    fn pieces_do_not_matter(
        text in "[abé]{0,24}", stop in prop::collection::vec("[abé]{1,4}", 0..3), cuts in prop::collection::vec(0usize..24, 0..6),
    ) {
        let characters: Vec<char> = text.chars().collect();
        let mut bounds: Vec<usize> = cuts.into_iter().map(|cut| cut.min(characters.len())).collect();
        bounds.extend([0, characters.len()]);
        bounds.sort_unstable();
        let single: Vec<String> = characters.iter().map(char::to_string).collect();
        let grouped: Vec<String> = bounds.windows(2).map(|pair| characters[pair[0]..pair[1]].iter().collect()).collect();
        let run = |pieces: &[String]| {
            let mut watch = StopStrings::new(&stop);
            let mut given = String::new();
            for piece in pieces {
                given.push_str(&watch.push(piece));
            }
            let stopped = watch.stopped();
            (given + &watch.finish(), stopped)
        };
        // Character by character, a stop string is seen the moment it is complete.
        let mut expected = (text.clone(), false);
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            if let Some(stop) = stop.iter().filter(|stop| text[..end].ends_with(stop.as_str())).max_by_key(|stop| stop.len()) {
                expected = (text[..end - stop.len()].to_owned(), true);
                break;
            }
        }
        prop_assert_eq!(run(&single), expected.clone());
        let (given, stopped) = run(&grouped);
        prop_assert_eq!(stopped, expected.1);
        // A piece may hold several stop strings; then the one that begins first counts.
        prop_assert!(given.len() <= expected.0.len() && text.starts_with(&given));
        prop_assert!(!stop.iter().any(|stop| given.contains(stop.as_str())));
    }
}
