//! What sampling records is the forward: the same hidden states and the same gradients, to the last bit.
#![allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]

mod engine;

use engine::*;
use kernels::Precision;
use posttrain_model::decoder::{
    DecodeRow, Decoder, KvCache, PackedTokens, Prompt, Recording, SequenceCache, Tape, Workspace,
};
use posttrain_model::lora::LoraConfig;

/// Rows that are left for each sequence: more than it needs.
const ROOM: usize = 20;

/// A prompt's samples, of different lengths, one of a single token.
struct Group {
    prompt: Vec<u32>,
    samples: Vec<Vec<u32>>,
}

fn groups() -> Vec<Group> {
    let prompt = ids(1, 7);
    let samples = vec![ids(2, 5), ids(3, 12), ids(4, 1)];
    // The second prompt begins as the first one: what could be shared is recorded all the same.
    let longer = [&prompt[..], &ids(5, 40)].concat();
    vec![Group { prompt, samples }, Group { prompt: longer, samples: vec![ids(6, 13), ids(7, 8)] }]
}

/// The sequences as training packs them.
fn packed(groups: &[Group]) -> PackedTokens {
    let mut tokens = PackedTokens::new();
    for group in groups {
        let prompt = tokens.push(&group.prompt, None).unwrap();
        for sample in &group.samples {
            tokens.push(sample, Some(prompt)).unwrap();
        }
    }
    tokens
}

/// Generates the groups onto a tape: prompts together, then samples side by side, one to three tokens at a time. Returns where on
/// the tape each sequence begins.
fn record(decoder: &Decoder, groups: &[Group], tape: &mut Tape, memory: &mut Workspace) -> Vec<usize> {
    let (mut starts, mut rows) = (Vec::new(), 0);
    let mut place = |len: usize| {
        starts.push(rows);
        rows += len.next_multiple_of(2);
        rows - len.next_multiple_of(2)
    };
    let places: Vec<(usize, Vec<usize>)> = groups
        .iter()
        .map(|group| (place(group.prompt.len()), group.samples.iter().map(|_| place(ROOM)).collect()))
        .collect();
    tape.start(decoder, rows, memory);
    let mut workspace = Workspace::new();
    let prompts: Vec<Prompt<'_>> =
        groups.iter().map(|group| Prompt { tokens: &group.prompt, known: KvCache::default() }).collect();
    let starts_of_prompts: Vec<Option<usize>> = places.iter().map(|(start, _)| Some(*start)).collect();
    let recording = Recording { tape: &mut *tape, tokens: &[], prompts: &starts_of_prompts };
    let prefills = decoder.extend_onto(Some(recording), &mut [], &prompts, &mut workspace).unwrap();
    let mut sequences = Vec::new();
    for ((group, (_, starts)), prefill) in groups.iter().zip(&places).zip(&prefills) {
        for (sample, &start) in group.samples.iter().zip(starts) {
            sequences.push((&sample[..], start, SequenceCache::new(decoder, prefill.cache.clone(), 1), 0));
        }
    }
    for step in 0.. {
        let (mut rows, mut recorded, mut token) = (Vec::new(), Vec::new(), 0);
        for (sample, start, cache, fed) in sequences.iter_mut().filter(|(sample, _, _, fed)| *fed < sample.len()) {
            let tokens = &sample[*fed..sample.len().min(*fed + 1 + step % 3)];
            recorded.extend((0..tokens.len()).map(|place| (token + place, *start + *fed + place)));
            (token, *fed) = (token + tokens.len(), *fed + tokens.len());
            rows.push(DecodeRow { tokens, cache });
        }
        if rows.is_empty() {
            break;
        }
        let recording = Recording { tape: &mut *tape, tokens: &recorded, prompts: &[] };
        decoder.extend_onto(Some(recording), &mut rows, &[], &mut workspace).unwrap();
    }
    starts
}

fn gradient_bits(decoder: &Decoder, tokens: &PackedTokens, workspace: &mut Workspace) -> Vec<u32> {
    let targets = targets(tokens);
    let mut gradients = decoder.gradients();
    let d_log_prob = upstream(3, targets.len());
    let found = decoder.backward(tokens, workspace, &targets, 0.8, &d_log_prob, None, &mut gradients).unwrap();
    gradients.finish();
    [bits(gradients.flat()), bits(&found.log_prob)].concat()
}

fn each_decoder(mut check: impl FnMut(&str, &mut Decoder)) {
    for (name, config) in configs() {
        for precision in [Precision::F32, Precision::Bf16] {
            for adapted in [false, true] {
                let mut decoder = decoder(&config, 22);
                if adapted {
                    adapt(&mut decoder, &LoraConfig { r: 2, alpha: 4.0, ..LoraConfig::default() }, 5);
                }
                decoder.prepare(precision);
                check(&format!("{name}, {precision:?}, adapted: {adapted}"), &mut decoder);
            }
        }
    }
}

#[test]
fn what_was_sampled_needs_no_forward() {
    let groups = groups();
    let tokens = packed(&groups);
    each_decoder(|name, decoder| {
        for checkpointing in [false, true] {
            let mut workspace = Workspace::new();
            workspace.set_checkpointing(checkpointing);
            decoder.forward(&tokens, &mut workspace, true).unwrap();
            let expected = gradient_bits(decoder, &tokens, &mut workspace);
            let size = workspace.bytes();

            let (mut tape, mut workspace) = (Tape::new(), Workspace::new());
            workspace.set_checkpointing(checkpointing);
            // The second time rows hold what the first one left in them.
            for time in 0..2 {
                let starts = record(decoder, &groups, &mut tape, &mut workspace);
                tape.finish(decoder, tokens.clone(), &starts);
                // Others may use the workspace in the meantime.
                decoder.forward(&tokens, &mut workspace, false).unwrap();
                assert!(tape.recall(decoder, &tokens, &mut workspace), "{name}");
                let found = gradient_bits(decoder, &tokens, &mut workspace);
                assert!(found == expected, "{name}, checkpointing {checkpointing}, time {time}");
            }
            let room = ROOM as f64 * 5.0 / tokens.rows() as f64;
            assert!(
                (workspace.bytes() as f64) < size as f64 * (1.0 + room),
                "{name}: no more than the room that was asked for"
            );
        }
    });
}

#[test]
fn only_the_same_tokens_under_the_same_weights_are_recalled() {
    let groups = groups();
    let tokens = packed(&groups);
    let mut decoder = decoder(&configs()[0].1, 23);
    decoder.prepare(Precision::F32);
    let (mut tape, mut workspace) = (Tape::new(), Workspace::new());
    assert!(!tape.recall(&decoder, &tokens, &mut workspace), "nothing was recorded");

    let starts = record(&decoder, &groups, &mut tape, &mut workspace);
    tape.finish(&decoder, tokens.clone(), &starts);
    assert!(!tape.recall(&decoder, &packed(&groups[..1]), &mut workspace), "fewer sequences");
    assert!(!tape.recall(&decoder, &batch(), &mut workspace), "other tokens");
    decoder.parameter_mut(0)[0] += 1.0;
    decoder.prepare(Precision::F32);
    assert!(!tape.recall(&decoder, &tokens, &mut workspace), "weights that have moved");

    let starts = record(&decoder, &groups, &mut tape, &mut workspace);
    tape.finish(&decoder, tokens.clone(), &starts);
    assert!(tape.recall(&decoder, &tokens, &mut workspace));
    assert!(!tape.recall(&decoder, &tokens, &mut workspace), "a tape is handed over once");
}
