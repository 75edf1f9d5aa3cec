//! What generation leaves on a tape is the forward of its episodes, whatever the batch.

use base::{Purpose, Random};
use kernels::{Precision, Segment};
use model::decoder::{PackedTokens, Tape, Target, Workspace};
use model::tokenizer::Tokenizer;
use posttrain_rollout::{Episode, Generator, OnTape, Request, SamplingOptions, TapeRows};

use crate::common;

const LONGEST: usize = 20;
const SAMPLES: usize = 3;

/// Two prompts after the same beginning, and two of their own; some requests have a forced opening.
fn requests() -> Vec<Request> {
    let mut requests = common::requests(2, SAMPLES as u32);
    let beginning: Vec<u32> = (0..30).collect();
    for (id, end) in [(2, 7), (3, 9)] {
        let prompt = [&beginning[..], &[end; 4]].concat().into();
        requests.extend(Request::samples(id, &prompt, SAMPLES as u32));
    }
    requests
}

/// Rows for the first `groups` groups: each prompt, then its completions.
fn plan(requests: &[Request], groups: usize) -> (Vec<TapeRows>, usize) {
    let (mut places, mut rows) = (Vec::new(), 0);
    for group in requests.chunks(SAMPLES).take(groups) {
        let first = rows + group[0].prompt.len().next_multiple_of(2);
        places.extend((0..SAMPLES).map(|sample| TapeRows { prompt: rows, completion: first + sample * LONGEST }));
        rows = first + SAMPLES * LONGEST;
    }
    (places, rows)
}

/// The sequences as training packs them, without the last token of each, and where on the tape they begin.
fn packed(episodes: &[Episode], places: &[TapeRows]) -> (PackedTokens, Vec<usize>) {
    let (mut tokens, mut starts) = (PackedTokens::new(), Vec::new());
    for (group, places) in episodes.chunks(SAMPLES).zip(places.chunks(SAMPLES)) {
        let prompt = tokens.push(&group[0].prompt, None).unwrap();
        starts.push(places[0].prompt);
        for (episode, place) in group.iter().zip(places).filter(|(episode, _)| episode.completion.len() > 1) {
            tokens.push(&episode.completion[..episode.completion.len() - 1], Some(prompt)).unwrap();
            starts.push(place.completion);
        }
    }
    (tokens, starts)
}

#[test]
fn episodes_on_tape_need_no_forward() {
    let options = SamplingOptions { max_new_tokens: LONGEST, ..SamplingOptions::default() };
    let tokenizer = Tokenizer::bytes().unwrap();
    let requests = requests();
    for family in common::FAMILIES {
        for precision in [Precision::F32, Precision::Bf16] {
            let decoder = common::tiny(family, precision);
            let generator = |slots| Generator::new(&options, slots, Random::new(1, Purpose::Sampling));
            let expected = generator(32).generate(&decoder, &tokenizer, &requests, |_| {}).unwrap();
            for (slots, groups) in [(1, 4), (3, 4), (5, 2), (32, 4), (32, 3)] {
                let (places, rows) = plan(&requests, groups);
                let (mut tape, mut workspace, mut kept) = (Tape::new(), Workspace::new(), decoder.gradients());
                tape.start(&decoder, rows, &mut workspace, &mut kept);
                let on_tape = OnTape { tape: &mut tape, gradients: &mut kept, rows: &places };
                let episodes =
                    generator(slots).generate_onto(Some(on_tape), &decoder, &tokenizer, &requests, |_| {}).unwrap();
                assert_eq!(episodes, expected, "{family:?}, {precision:?}: recording changes nothing");

                let (tokens, starts) = packed(&episodes[..groups * SAMPLES], &places);
                tape.finish(&decoder, tokens.clone(), &starts, &mut kept);
                assert!(tape.recall(&decoder, &tokens, &mut workspace));
                let mut forward = Workspace::new();
                decoder.forward(&tokens, &mut forward, true).unwrap();
                let targets = targets(&tokens);
                let upstream: Vec<f32> = (0..targets.len()).map(|i| (i as f32 * 0.37).sin()).collect();
                let passes = [(&mut workspace, kept), (&mut forward, decoder.gradients())];
                let [taped, computed] = passes.map(|(workspace, mut gradients)| {
                    let width = decoder.config().hidden_size;
                    let rows = |segment: &Segment| segment.start * width..(segment.start + segment.len) * width;
                    let hidden = tokens.segments().iter().flat_map(|own| common::bits(&workspace.hidden()[rows(own)]));
                    let hidden: Vec<u32> = hidden.collect();
                    let found =
                        decoder.backward(&tokens, workspace, &targets, 0.9, &upstream, None, &mut gradients).unwrap();
                    gradients.finish();
                    (hidden, common::bits(&found.log_prob), common::bits(gradients.flat()))
                });
                assert!(taped.0 == computed.0, "{family:?}, {precision:?}, {slots} slots: hidden states");
                assert!(taped.1 == computed.1, "{family:?}, {precision:?}, {slots} slots: log-probabilities");
                assert!(taped.2 == computed.2, "{family:?}, {precision:?}, {slots} slots: gradients");
            }
        }
    }
}

/// Every token that the rows of a batch predict within it.
fn targets(tokens: &PackedTokens) -> Vec<Target> {
    let target = |row: usize, at: usize| Target { row, token: tokens.ids()[at] };
    let mut targets = Vec::new();
    for segment in tokens.segments() {
        if let Some(prefix) = segment.prefix.map(|prefix| tokens.segments()[prefix]) {
            targets.push(target(prefix.start + prefix.len - 1, segment.start));
        }
        targets.extend((segment.start..segment.start + segment.len - 1).map(|row| target(row, row + 1)));
    }
    targets.sort_by_key(|target| target.row);
    targets
}
