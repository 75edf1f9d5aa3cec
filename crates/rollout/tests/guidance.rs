//! Sampling under the guidance of a value model.

use base::{Purpose, Random};
use kernels::Precision;
use model::Family;
use model::config::{HeadTask, ScoreHead};
use model::decoder::{Decoder, Workspace};
use model::tokenizer::Tokenizer;
use posttrain_rollout::guidance::returns::tilted;
use posttrain_rollout::{
    Episode, Error, Generator, Guidance, GuidanceOptions, Request, Returns, SamplingOptions, ValueHead, ValueOutputs,
    Worth,
};

use crate::common;

/// A model of the common kind that scores tokens instead.
fn value_model(outputs: usize) -> Decoder {
    let mut decoder = common::tiny(Family::Llama, Precision::F32);
    for index in 0..decoder.parameters().len() {
        decoder.parameter_mut(index).reverse();
    }
    decoder.add_score(ScoreHead { outputs, task: HeadTask::Token }, 0.3, 4).unwrap();
    decoder.prepare(Precision::F32);
    decoder
}

fn state(returns: Returns) -> ValueOutputs {
    ValueOutputs { head: ValueHead::State, returns }
}

fn action(returns: Returns) -> ValueOutputs {
    ValueOutputs { head: ValueHead::Action, returns }
}

fn reference() -> Decoder {
    common::tiny(Family::Llama, Precision::F32)
}

fn sampled(
    guide: Option<Guidance<'_>>,
    sampling: &SamplingOptions,
    batch_size: usize,
    requests: &[Request],
) -> Vec<Episode> {
    let generator = Generator::new(sampling, batch_size, Random::new(5, Purpose::Sampling));
    let generator = Generator { hook: guide.as_ref().map(|guide| guide as _), ..generator };
    generator.generate(&reference(), &Tokenizer::bytes().unwrap(), requests, |_| {}).unwrap()
}

fn completions(episodes: &[Episode]) -> Vec<&[u32]> {
    episodes.iter().map(|episode| &episode.completion[..]).collect()
}

/// Every token is drawn with the probability that the formula gives it, computed anew from whole sequences: `said` is what the value model says of
/// a token behind some others.
fn check_draws(value: &Decoder, outputs: ValueOutputs, said: impl Fn(&mut Workspace, &[u32], u32) -> Vec<f32>) {
    let reference = reference();
    let sampling = SamplingOptions { temperature: 0.7, max_new_tokens: 14, ..SamplingOptions::default() };
    let options = GuidanceOptions { top_k: 6, eta: 0.2, ..GuidanceOptions::default() };
    let guide = Guidance::new(value, outputs, &options, &sampling).unwrap();
    let mut workspace = Workspace::new();
    let mut drawn = 0;
    for episode in sampled(Some(guide), &sampling, 4, &common::requests(3, 3)) {
        for place in (0..episode.completion.len()).filter(|&place| episode.loss_mask[place]) {
            let before = [&episode.prompt[..], &episode.completion[..place]].concat();
            let hidden = reference.prefill(&[&before], &mut workspace).unwrap().remove(0).hidden;
            let mut logits = vec![0.0; common::VOCABULARY];
            reference.logits(&hidden, &mut logits).unwrap();
            let mut best: Vec<u32> = (0..common::VOCABULARY as u32).collect();
            best.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            let log_probs: Vec<f64> = best[..6].iter().map(|&id| f64::from(logits[id as usize]) / 0.7).collect();
            let worths = best[..6].iter().map(|&id| {
                let outputs_of_token = said(&mut workspace, &before, id);
                outputs.returns.worth(&outputs_of_token, Worth::Soft, 0.2, 0.0)
            });
            let (policy, _) = tilted(&log_probs, &worths.collect::<Vec<f64>>(), 0.2);
            let token = best[..6].iter().position(|&id| id == episode.completion[place]).unwrap();
            let found = f64::from(episode.filtered_log_probs[place]);
            assert!((found - policy[token]).abs() < 1e-4, "{found}, expected {}", policy[token]);
            drawn += 1;
        }
    }
    assert!(drawn > 20);
}

#[test]
fn tokens_are_drawn_as_the_formula_says() {
    let value = value_model(3);
    check_draws(&value, state(Returns::Histogram { low: 0.0, high: 1.0 }), |workspace, before, id| {
        value.prefill(&[&[before, &[id]].concat()], workspace).unwrap();
        value.scores(workspace, &[before.len()]).unwrap()
    });
}

/// The outputs of a token lie side by side, in the order of the vocabulary, at the token before it.
#[test]
fn tokens_are_drawn_by_what_is_said_of_them_before_they_come() {
    for (width, returns) in [(1, Returns::Bernoulli), (3, Returns::Histogram { low: 0.0, high: 1.0 })] {
        let value = value_model(width * common::VOCABULARY);
        check_draws(&value, action(returns), |workspace, before, id| {
            value.prefill(&[before], workspace).unwrap();
            let all = value.scores(workspace, &[before.len() - 1]).unwrap();
            all[width * id as usize..][..width].to_vec()
        });
    }
}

/// A head that says the same of a token wherever it is read guides the same, whether it is asked at the token or before it: `W h + b` with `W = 0` says
/// `b`, here the same for every token, so that both guide as the reference alone does.
#[test]
fn heads_that_say_the_same_draw_the_same() {
    let sampling = SamplingOptions { max_new_tokens: 12, ..SamplingOptions::default() };
    let options = GuidanceOptions { top_k: 5, ..GuidanceOptions::default() };
    let constant = |outputs| {
        let mut decoder = reference();
        decoder.add_score(ScoreHead { outputs, task: HeadTask::Token }, 0.0, 0).unwrap();
        let bias = decoder.parameters().iter().position(|parameter| parameter.name == "score.bias").unwrap();
        decoder.parameter_mut(bias).fill(0.3);
        decoder.prepare(Precision::F32);
        decoder
    };
    let of = |value: &Decoder, outputs| {
        let guide = Guidance::new(value, outputs, &options, &sampling).unwrap();
        sampled(Some(guide), &sampling, 4, &common::requests(3, 3))
    };
    let at_token = of(&constant(1), state(Returns::Bernoulli));
    assert_eq!(at_token, of(&constant(common::VOCABULARY), action(Returns::Bernoulli)));
}

/// Guidance that costs more than it can bring changes nothing; η may differ from request to request.
#[test]
fn a_great_price_leaves_the_reference_alone() {
    let value = value_model(1);
    let sampling = SamplingOptions { max_new_tokens: 12, ..SamplingOptions::default() };
    let requests = common::requests(3, 3);
    let own = sampled(None, &sampling, 4, &requests);
    let all = GuidanceOptions { top_k: common::VOCABULARY, eta: 1e9, ..GuidanceOptions::default() };
    let guide = |options| Guidance::new(&value, state(Returns::Bernoulli), options, &sampling).unwrap();
    let far = sampled(Some(guide(&all)), &sampling, 4, &requests);
    assert_eq!(completions(&far), completions(&own));
    assert!(far.iter().zip(&own).all(|(far, own)| common::bits(&far.log_probs) == common::bits(&own.log_probs)));
    let eta = |request: &Request| if request.sample == 0 { 1e9 } else { 0.02 };
    let mixed = sampled(Some(guide(&all).with_eta(&eta)), &sampling, 4, &requests);
    let near = sampled(Some(guide(&GuidanceOptions { eta: 0.02, ..all })), &sampling, 4, &requests);
    for (request, ((mixed, own), near)) in requests.iter().zip(mixed.iter().zip(&own).zip(&near)) {
        let expected = if request.sample == 0 { own } else { near };
        assert_eq!(mixed.completion, expected.completion);
    }
    assert_ne!(completions(&near), completions(&own));
}

/// Neither the batch nor what lies in one piece of the cache matters: completions are long enough to be read again.
#[test]
fn bits_do_not_depend_on_the_batch() {
    let sampling = SamplingOptions { max_new_tokens: 80, ..SamplingOptions::default() };
    let options = GuidanceOptions { top_k: 4, ..GuidanceOptions::default() };
    let requests = common::requests(3, 3);
    for (count, outputs) in [(1, state(Returns::Bernoulli)), (common::VOCABULARY, action(Returns::Bernoulli))] {
        let value = value_model(count);
        let run = |batch_size| {
            let guide = Guidance::new(&value, outputs, &options, &sampling).unwrap();
            sampled(Some(guide), &sampling, batch_size, &requests)
        };
        let expected = run(1);
        assert!(expected.iter().any(|episode| episode.completion.len() > 70));
        for batch_size in [3, 64] {
            assert_eq!(run(batch_size), expected, "{outputs:?}, batch {batch_size}");
        }
    }
}

/// Where an answer may not end yet, its end is no candidate.
#[test]
fn tokens_that_would_end_too_early_are_no_candidates() {
    let value = value_model(1);
    let mut sampling = SamplingOptions { max_new_tokens: 8, min_new_tokens: 6, ..SamplingOptions::default() };
    sampling.stop_token_ids = (0..200).collect();
    let options = GuidanceOptions { top_k: 1, ..GuidanceOptions::default() };
    let guide = Guidance::new(&value, state(Returns::Bernoulli), &options, &sampling).unwrap();
    let requests: Vec<Request> = common::requests(2, 2);
    for episode in sampled(Some(guide), &sampling, 4, &requests) {
        let drawn = (0..5).filter(|&place| episode.loss_mask[place]);
        assert!(drawn.into_iter().all(|place| episode.completion[place] >= 200), "{:?}", episode.completion);
    }
}

#[test]
fn what_cannot_guide_is_refused() {
    let sampling = SamplingOptions::default();
    let refusal = |value: &Decoder, outputs, options: &GuidanceOptions| {
        Guidance::new(value, outputs, options, &sampling).err().map(|error| error.to_string())
    };
    let options = GuidanceOptions::default();
    let (writer, value) = (reference(), value_model(3));
    assert_eq!(refusal(&writer, state(Returns::Mean), &options).unwrap(), "the value model: it has no score head");
    let found = refusal(&value, state(Returns::Bernoulli), &options).unwrap();
    assert_eq!(found, "the value model: its score head has 3 outputs, expected 1");
    assert!(refusal(&value, state(Returns::Histogram { low: 0.0, high: 1.0 }), &options).is_none());
    let found = refusal(&value, action(Returns::Bernoulli), &options).unwrap();
    let expected = format!("1 for each of the {} tokens of its vocabulary", common::VOCABULARY);
    assert_eq!(found, format!("the value model: its score head has 3 outputs, expected {expected}"));
    assert!(refusal(&value_model(common::VOCABULARY), action(Returns::Mean), &options).is_none());
    for wrong in [
        GuidanceOptions { eta: -1.0, ..GuidanceOptions::default() },
        GuidanceOptions { top_k: 0, ..GuidanceOptions::default() },
        GuidanceOptions { floor: 1.0, ..GuidanceOptions::default() },
    ] {
        assert!(matches!(
            Guidance::new(&value_model(1), state(Returns::Bernoulli), &wrong, &sampling),
            Err(Error::Option { .. })
        ));
    }
}
