//! What sampling records is the forward: the same hidden states and the same gradients, to the last bit.

use kernels::Precision;
use posttrain_model::decoder::{
    DecodeRow, Decoder, Gradients, KvCache, PackedTokens, Prompt, Recording, SequenceCache, Tape, Workspace,
};
use posttrain_model::lora::LoraConfig;

use crate::engine::*;

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
fn record(
    decoder: &Decoder,
    groups: &[Group],
    tape: &mut Tape,
    memory: &mut Workspace,
    gradients: &mut Gradients,
) -> Vec<usize> {
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
    tape.start(decoder, rows, memory, gradients);
    let mut workspace = Workspace::new();
    let prompts: Vec<Prompt<'_>> =
        groups.iter().map(|group| Prompt { tokens: &group.prompt, known: KvCache::default() }).collect();
    let starts_of_prompts: Vec<Option<usize>> = places.iter().map(|(start, _)| Some(*start)).collect();
    let recording = Recording { tape: &mut *tape, tokens: &[], prompts: &starts_of_prompts };
    let prefills = decoder.extend_onto(Some(recording), &mut [], &prompts, &mut workspace).unwrap();
    let width = decoder.config().hidden_size;
    let mut logits = |decoder: &Decoder, hidden: &[f32], rows: &[(usize, usize)]| {
        let mut logits = vec![0.0; hidden.len() / width * decoder.config().vocab_size];
        decoder.logits(hidden, &mut logits).unwrap();
        gradients.keep_logits(&logits, rows);
    };
    for ((group, (start, _)), prefill) in groups.iter().zip(&places).zip(&prefills) {
        // Once for each sample, as they all draw from it.
        logits(
            decoder,
            &prefill.hidden.repeat(2),
            &[(0, start + group.prompt.len() - 1), (1, start + group.prompt.len() - 1)],
        );
    }
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
        logits(decoder, workspace.hidden(), &recorded);
    }
    starts
}

fn gradient_bits(
    decoder: &Decoder,
    tokens: &PackedTokens,
    workspace: &mut Workspace,
    gradients: &mut Gradients,
) -> Vec<u32> {
    let targets = targets(tokens);
    let d_log_prob = upstream(3, targets.len());
    let found = decoder.backward(tokens, workspace, &targets, 0.8, &d_log_prob, None, gradients).unwrap();
    gradients.finish();
    let found = [bits(gradients.flat()), bits(&found.log_prob)].concat();
    gradients.clear();
    found
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
            let mut gradients = decoder.gradients();
            let expected = gradient_bits(decoder, &tokens, &mut workspace, &mut gradients);
            let size = workspace.bytes();

            let (mut tape, mut workspace) = (Tape::new(), Workspace::new());
            workspace.set_checkpointing(checkpointing);
            // The second time rows hold what the first one left in them.
            for time in 0..2 {
                let starts = record(decoder, &groups, &mut tape, &mut workspace, &mut gradients);
                tape.finish(decoder, tokens.clone(), &starts, &mut gradients);
                // Others may use the workspace in the meantime.
                decoder.forward(&tokens, &mut workspace, false).unwrap();
                assert!(tape.recall(decoder, &tokens, &mut workspace), "{name}");
                let found = gradient_bits(decoder, &tokens, &mut workspace, &mut gradients);
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
    let (mut tape, mut workspace, mut gradients) = (Tape::new(), Workspace::new(), decoder.gradients());
    assert!(!tape.recall(&decoder, &tokens, &mut workspace), "nothing was recorded");

    let starts = record(&decoder, &groups, &mut tape, &mut workspace, &mut gradients);
    tape.finish(&decoder, tokens.clone(), &starts, &mut gradients);
    assert!(!tape.recall(&decoder, &packed(&groups[..1]), &mut workspace), "fewer sequences");
    assert!(!tape.recall(&decoder, &batch(), &mut workspace), "other tokens");
    decoder.parameter_mut(0)[0] += 1.0;
    decoder.prepare(Precision::F32);
    assert!(!tape.recall(&decoder, &tokens, &mut workspace), "weights that have moved");

    let starts = record(&decoder, &groups, &mut tape, &mut workspace, &mut gradients);
    tape.finish(&decoder, tokens.clone(), &starts, &mut gradients);
    assert!(tape.recall(&decoder, &tokens, &mut workspace));
    assert!(!tape.recall(&decoder, &tokens, &mut workspace), "a tape is handed over once");
}

/// Records the groups while logits that are no logits are kept, and returns what backward makes of `tokens`.
fn with_wrong_logits(decoder: &mut Decoder, tokens: &PackedTokens, change: impl FnOnce(&mut Decoder)) -> Vec<f32> {
    let (mut tape, mut workspace, mut gradients) = (Tape::new(), Workspace::new(), decoder.gradients());
    let groups = groups();
    let recorded = packed(&groups);
    let starts: Vec<usize> = recorded.segments().iter().map(|segment| segment.start).collect();
    tape.start(decoder, recorded.rows(), &mut workspace, &mut gradients);
    let rows: Vec<(usize, usize)> = (0..recorded.rows()).map(|row| (row, row)).collect();
    gradients.keep_logits(&vec![0.0; recorded.rows() * decoder.config().vocab_size], &rows);
    tape.finish(decoder, recorded, &starts, &mut gradients);
    change(decoder);
    decoder.forward(tokens, &mut workspace, true).unwrap();
    let targets = targets(tokens);
    let ones = vec![1.0; targets.len()];
    decoder.backward(tokens, &mut workspace, &targets, 1.0, &ones, None, &mut gradients).unwrap().log_prob
}

#[test]
fn kept_logits_are_used_for_the_same_tokens_under_the_same_weights_alone() {
    let config = &configs()[0].1;
    let mut decoder = decoder(config, 24);
    decoder.prepare(Precision::F32);
    let tokens = packed(&groups());
    let uniform = -(config.vocab_size as f32).ln();
    let is_uniform = |log_probs: &[f32]| log_probs.iter().filter(|&&found| (found - uniform).abs() < 1e-6).count();
    let found = with_wrong_logits(&mut decoder, &tokens, |_| {});
    assert_eq!(is_uniform(&found), found.len(), "what is kept is what backward starts from");
    let found = with_wrong_logits(&mut decoder, &batch(), |_| {});
    assert_eq!(is_uniform(&found), 0, "other tokens");
    let found = with_wrong_logits(&mut decoder, &tokens, |decoder| {
        decoder.parameter_mut(0)[0] += 1.0;
        decoder.prepare(Precision::F32);
    });
    assert_eq!(is_uniform(&found), 0, "weights that have moved");
}

#[test]
fn kept_logits_are_no_gradients() {
    let config = &configs()[0].1;
    let mut decoder = decoder(config, 25);
    decoder.prepare(Precision::F32);
    let mut workspace = Workspace::new();
    let keep = |gradients: &mut Gradients, workspace: &mut Workspace| {
        let rows: Vec<(usize, usize)> = (0..1000).map(|row| (row, row)).collect();
        Tape::new().start(&decoder, 2, workspace, gradients);
        gradients.keep_logits(&vec![1.0; 1000 * config.vocab_size], &rows);
    };
    let mut gradients = decoder.gradients();
    keep(&mut gradients, &mut workspace);
    gradients.finish();
    assert!(gradients.flat().iter().all(|gradient| *gradient == 0.0), "they go before gradients are read");
    gradients.clear();
    keep(&mut gradients, &mut workspace);
    assert!(gradients.flat_mut().iter().all(|gradient| *gradient == 0.0), "or written");
    gradients.flat_mut().fill(3.0);
    keep(&mut gradients, &mut workspace);
    assert!(gradients.flat().iter().all(|gradient| *gradient == 3.0), "gradients that are there stay");
}
