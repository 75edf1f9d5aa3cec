//! The engine's promises bit by bit: threads, micro-batches, neighbours, decode against forward; f32 and bf16.

use std::sync::Arc;

use kernels::Precision;
use posttrain_model::ModelConfig;
use posttrain_model::decoder::{DecodeRow, Decoder, Gradients, PackedTokens, SequenceCache, Target, Workspace};
use posttrain_model::lora::LoraConfig;

use crate::engine::*;

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Every family's model, full and with an adapter, in both precisions, ready to run.
fn each_decoder(mut check: impl FnMut(&str, &Decoder)) {
    for (name, config) in configs() {
        for adapter in [false, true] {
            let mut decoder = decoder(&config, 21);
            if adapter {
                adapt(&mut decoder, &LoraConfig { r: 3, alpha: 6.0, ..LoraConfig::default() }, 5);
            }
            for precision in PRECISIONS {
                decoder.prepare(precision);
                check(&format!("{name}, adapter {adapter}, {precision:?}"), &decoder);
            }
        }
    }
}

#[test]
fn the_most_probable_token_of_a_row_is_known() {
    each_decoder(|name, decoder| {
        let (ids, vocabulary) = (ids(30, 7), decoder.config().vocab_size);
        let mut tokens = PackedTokens::new();
        tokens.push(&ids, None).unwrap();
        let mut workspace = Workspace::new();
        decoder.forward(&tokens, &mut workspace, false).unwrap();
        let mut logits = vec![0.0; ids.len() * vocabulary];
        decoder.logits(&workspace.hidden()[..ids.len() * decoder.config().hidden_size], &mut logits).unwrap();
        let mut targets = Vec::new();
        let mut expected = Vec::new();
        for (row, logits) in logits.chunks(vocabulary).enumerate() {
            let best = (0..vocabulary).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            let other = (best + 1 + row) % vocabulary;
            targets.extend([best, other].map(|token| Target { row, token: token as u32 }));
            expected.extend([true, logits[other] == logits[best]]);
        }
        let found = decoder.log_probs(&mut workspace, &targets, 1.0, false).unwrap();
        assert_eq!(found.most_probable, expected, "{name}");
    });
}

/// Sequences as groups: a prompt and its continuations.
fn groups() -> Vec<(Vec<u32>, Vec<Vec<u32>>)> {
    vec![
        (ids(31, 5), vec![ids(32, 9), ids(33, 4)]),
        (ids(34, 12), vec![]),
        (ids(35, 3), vec![ids(36, 1), ids(37, 2), ids(38, 17)]),
        (ids(39, 1), vec![ids(40, 6)]),
    ]
}

fn pack(groups: &[(Vec<u32>, Vec<Vec<u32>>)]) -> PackedTokens {
    let mut tokens = PackedTokens::new();
    for (prompt, continuations) in groups {
        let prompt = tokens.push(prompt, None).unwrap();
        for continuation in continuations {
            tokens.push(continuation, Some(prompt)).unwrap();
        }
    }
    tokens
}

/// Accumulated gradients over the given micro-batches, with upstream gradients that depend on the token alone.
fn gradient_bits(decoder: &Decoder, batches: &[PackedTokens]) -> Vec<u32> {
    gradient_bits_in(&mut Workspace::new(), decoder, batches)
}

fn gradient_bits_in(workspace: &mut Workspace, decoder: &Decoder, batches: &[PackedTokens]) -> Vec<u32> {
    let mut gradients = decoder.gradients();
    for tokens in batches {
        let targets = targets(tokens);
        let d_log_prob: Vec<f32> = targets.iter().map(|target| (target.token as f32 * 0.37).sin()).collect();
        let d_entropy: Vec<f32> = targets.iter().map(|target| 0.1 * (target.token as f32 * 0.71).cos()).collect();
        decoder.forward(tokens, workspace, true).unwrap();
        decoder.backward(tokens, workspace, &targets, 0.9, &d_log_prob, Some(&d_entropy), &mut gradients).unwrap();
    }
    gradients.finish();
    bits(gradients.flat())
}

#[test]
fn micro_batches_give_the_same_gradient_bytes() {
    let groups = groups();
    each_decoder(|name, decoder| {
        let whole = gradient_bits(decoder, &[pack(&groups)]);
        let single: Vec<PackedTokens> = groups.chunks(1).map(pack).collect();
        let uneven = [pack(&groups[..3]), pack(&groups[3..])];
        assert!(whole == gradient_bits(decoder, &single), "{name}: one group at a time");
        assert!(whole == gradient_bits(decoder, &uneven), "{name}: three groups and one");
    });
}

#[test]
fn activation_checkpointing_gives_the_same_gradient_bytes() {
    let groups = groups();
    let batches = [pack(&groups[..3]), pack(&groups[3..])];
    each_decoder(|name, decoder| {
        let mut workspace = Workspace::new();
        let kept = gradient_bits_in(&mut workspace, decoder, &batches);
        let size = workspace.bytes();
        workspace.set_checkpointing(true);
        assert!(kept == gradient_bits_in(&mut workspace, decoder, &batches), "{name}");
        assert!(workspace.bytes() < size, "{name}: {} bytes, {size} without", workspace.bytes());
        workspace.release();
        assert_eq!(workspace.bytes(), 0, "{name}");
        assert!(kept == gradient_bits_in(&mut workspace, decoder, &batches), "{name}: released");
        assert!(workspace.bytes() < size, "{name}: still checkpointing");
        workspace.set_checkpointing(false);
        assert!(kept == gradient_bits_in(&mut workspace, decoder, &batches), "{name}: switched off again");
        assert_eq!(workspace.bytes(), size, "{name}");
    });
}

/// The gradient of a prompt's samples, either after one prompt that they share or each after its own.
fn gradients_of_samples(decoder: &Decoder, prompt: &[u32], samples: &[Vec<u32>], share: bool) -> Gradients {
    let mut tokens = PackedTokens::new();
    let shared = share.then(|| tokens.push(prompt, None).unwrap());
    let mut targets = Vec::new();
    for (number, sample) in samples.iter().enumerate() {
        let (prompt_row, start) = match shared {
            Some(prompt) => {
                let index = tokens.push(sample, Some(prompt)).unwrap();
                (tokens.segments()[prompt].start, tokens.segments()[index].start)
            }
            None => {
                let index = tokens.push(&[prompt, sample].concat(), None).unwrap();
                let first = tokens.segments()[index].start;
                (first, first + prompt.len())
            }
        };
        let rows = std::iter::once(prompt_row + prompt.len() - 1).chain(start..);
        for (place, (row, &token)) in rows.zip(sample).enumerate() {
            let d_log_prob = (number as f32 - 2.3) * (place as f32 * 0.37 + 1.0).sin();
            targets.push((Target { row, token }, d_log_prob));
        }
    }
    targets.sort_by_key(|(target, _)| target.row);
    let (targets, d_log_prob): (Vec<Target>, Vec<f32>) = targets.into_iter().unzip();
    let mut workspace = Workspace::new();
    let mut gradients = decoder.gradients();
    decoder.forward(&tokens, &mut workspace, true).unwrap();
    decoder.backward(&tokens, &mut workspace, &targets, 0.9, &d_log_prob, None, &mut gradients).unwrap();
    gradients.finish();
    gradients
}

/// In f32, sharing a prompt moves no tensor's gradient by more than 1e-5 of its size: sums over samples are taken in another
/// order.
#[test]
fn sharing_a_prompt_gives_the_same_gradients() {
    let samples: Vec<Vec<u32>> = (0..8).map(|i| ids(80 + i, 3 + (i as usize * 5) % 14)).collect();
    let mut most = 0.0f64;
    for (name, config) in configs().into_iter().chain([("wide".to_owned(), wide())]) {
        for adapter in [false, true] {
            let mut decoder = decoder(&config, 25);
            if adapter {
                adapt(&mut decoder, &LoraConfig { r: 3, alpha: 6.0, ..LoraConfig::default() }, 5);
            }
            decoder.prepare(Precision::F32);
            for prompt in [ids(90, 40), ids(91, 11)] {
                let [shared, unshared] =
                    [true, false].map(|share| gradients_of_samples(&decoder, &prompt, &samples, share));
                for (index, parameter) in decoder.parameters().iter().enumerate() {
                    let exact: Vec<f64> = unshared.grad(index).iter().map(|value| f64::from(*value)).collect();
                    let distance = distance(shared.grad(index), &exact);
                    assert!(distance < 1e-5, "{name}, adapter {adapter}: {} is off by {distance:.1e}", parameter.name);
                    most = most.max(distance);
                }
            }
        }
    }
    println!("largest distance of a tensor's gradients: {most:.1e}");
}

/// A single sample: the same sums in the same order, to the last bit, where each query head has its own key head. Where
/// several share one, the gradients of a prompt's keys are summed head by head within the prompt and then within the sample.
#[test]
fn a_prompt_of_one_sample_gives_the_same_gradient_bytes() {
    for (name, config) in configs() {
        let config = ModelConfig { kv_heads: config.heads, ..config };
        let mut decoder = decoder(&config, 26);
        decoder.prepare(Precision::F32);
        for (prompt, sample) in [(ids(92, 40), ids(93, 31)), (ids(94, 11), ids(95, 6))] {
            let sample = [sample];
            let [shared, unshared] =
                [true, false].map(|share| bits(gradients_of_samples(&decoder, &prompt, &sample, share).flat()));
            assert!(shared == unshared, "{name}, a prompt of {} tokens", prompt.len());
        }
    }
}

#[test]
fn weights_packed_on_the_way_give_the_same_bytes() {
    let batch = [pack(&groups())];
    for (name, config) in configs() {
        for adapter in [false, true] {
            let mut decoder = decoder(&config, 23);
            if adapter {
                adapt(&mut decoder, &LoraConfig { r: 3, alpha: 6.0, ..LoraConfig::default() }, 5);
            }
            for precision in PRECISIONS {
                let name = format!("{name}, adapter {adapter}, {precision:?}");
                decoder.prepare(precision);
                let (packed, bytes) = (gradient_bits(&decoder, &batch), decoder.packed_bytes());
                let decoded = decode_bits(&decoder);
                decoder.prepare_for_training(precision);
                assert!(packed == gradient_bits(&decoder, &batch), "{name}");
                assert_eq!(decoder.packed_bytes(), if adapter { bytes } else { 0 }, "{name}");
                assert!(decoded == decode_bits(&decoder), "{name}: decode");
                // Changed weights have to be prepared again, one way or the other.
                let value = std::mem::take(&mut decoder.parameter_mut(0)[0]);
                let mut workspace = Workspace::new();
                assert!(decoder.forward(&batch[0], &mut workspace, true).is_err(), "{name}: not prepared");
                decoder.parameter_mut(0)[0] = value;
                decoder.prepare_for_training(precision);
                assert!(packed == gradient_bits(&decoder, &batch), "{name}: prepared again");
                decoder.prepare(precision);
                assert_eq!(decoder.packed_bytes(), bytes, "{name}");
                assert!(decoded == decode_bits(&decoder), "{name}: packed again");
            }
        }
    }
}

#[test]
fn a_decoder_that_only_generates_gives_the_same_bytes_and_learns_nothing() {
    let batch = pack(&groups());
    for (name, config) in configs() {
        let whole = decoder(&config, 23);
        for adapter in [false, true] {
            for precision in PRECISIONS {
                let name = format!("{name}, adapter {adapter}, {precision:?}");
                let (mut whole, mut packed) =
                    (whole.clone(), Decoder::packed(config.clone(), whole.tensors(), precision).unwrap());
                if adapter {
                    for decoder in [&mut whole, &mut packed] {
                        adapt(decoder, &LoraConfig { r: 3, alpha: 6.0, ..LoraConfig::default() }, 5);
                    }
                }
                whole.prepare(precision);
                packed.prepare(precision);
                assert!(decode_bits(&whole) == decode_bits(&packed), "{name}: decode");
                assert_eq!(whole.packed_bytes(), packed.packed_bytes(), "{name}");
                let targets: Vec<Target> = (0..9).map(|row| Target { row, token: 3 }).collect();
                let log_probs = |decoder: &Decoder| {
                    let mut workspace = Workspace::new();
                    decoder.forward(&batch, &mut workspace, true).unwrap();
                    let found = decoder.log_probs(&mut workspace, &targets, 1.0, false).unwrap();
                    let (ones, mut gradients) = ([1.0; 9], decoder.gradients());
                    let backward = decoder.backward(&batch, &mut workspace, &targets, 1.0, &ones, None, &mut gradients);
                    (bits(&found.log_prob), backward.is_err())
                };
                let ((expected, _), (found, refused)) = (log_probs(&whole), log_probs(&packed));
                assert!(expected == found && refused, "{name}: log-probs");
                // A copy reads the weights where they are; with an adapter it is a whole one.
                let (copied, refused) = log_probs(&whole.packed_copy(precision).unwrap());
                assert!(expected == copied && refused != adapter, "{name}: a copy");
            }
        }
        let packed = Decoder::packed(config.clone(), whole.tensors(), Precision::F32).unwrap();
        let written = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| packed.tensors()));
        assert!(written.is_err(), "{name}: weights that were not read are not written");
    }
}

/// The logits after a prompt and after one token more.
fn decode_bits(decoder: &Decoder) -> Vec<u32> {
    let (d, vocabulary) = (decoder.config().hidden_size, decoder.config().vocab_size);
    let mut workspace = Workspace::new();
    let prefill = decoder.prefill(&[&ids(24, 9)], &mut workspace).unwrap().swap_remove(0);
    let mut logits = vec![0.0; 2 * vocabulary];
    decoder.logits(&prefill.hidden, &mut logits[..vocabulary]).unwrap();
    let mut cache = SequenceCache::new(decoder, prefill.cache, 1);
    decoder.decode(&mut [DecodeRow { tokens: &[7], cache: &mut cache }], &mut workspace).unwrap();
    decoder.logits(&workspace.hidden()[..d], &mut logits[vocabulary..]).unwrap();
    bits(&logits)
}

#[test]
fn threads_give_the_same_bytes() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (one, two) = (pool(1), pool(2));
    let batch = [pack(&groups())];
    each_decoder(|name, decoder| {
        let single = one.install(|| gradient_bits(decoder, &batch));
        let double = two.install(|| gradient_bits(decoder, &batch));
        assert!(single == double, "{name}");
    });
}

#[test]
fn a_shape_of_several_tiles_keeps_the_promises() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let groups = vec![
        (ids(71, 97), vec![ids(72, 131), ids(73, 2)]),
        (ids(74, 75), vec![]),
        (ids(75, 33), vec![ids(76, 64), ids(77, 65)]),
    ];
    let mut decoder = decoder(&wide(), 22);
    for precision in PRECISIONS {
        decoder.prepare(precision);
        let whole = pool(1).install(|| gradient_bits(&decoder, &[pack(&groups)]));
        let single: Vec<PackedTokens> = groups.chunks(1).map(pack).collect();
        assert!(whole == pool(2).install(|| gradient_bits(&decoder, &single)), "{precision:?}");

        // Decoding over more keys than a block holds, and past the window.
        let (prompt, continuation) = (&groups[0].0, &groups[0].1[0]);
        let mut workspace = Workspace::new();
        let prefill = decoder.prefill(&[prompt], &mut workspace).unwrap().swap_remove(0);
        let mut cache = SequenceCache::new(&decoder, prefill.cache, 8);
        let mut decoded = Vec::new();
        for tokens in [&continuation[..120]].into_iter().chain(continuation[120..].chunks(1)) {
            decoder.decode(&mut [DecodeRow { tokens, cache: &mut cache }], &mut workspace).unwrap();
            decoded.extend_from_slice(workspace.hidden());
        }
        let tokens = pack(&groups);
        decoder.forward(&tokens, &mut workspace, false).unwrap();
        let d = decoder.config().hidden_size;
        let start = tokens.segments()[1].start;
        let trained = &workspace.hidden()[start * d..][..continuation.len() * d];
        assert!(bits(trained) == bits(&decoded), "{precision:?}: decode");
    }
}

#[test]
fn a_segment_does_not_see_its_neighbours() {
    let before = groups();
    let mut after = groups();
    after[0].1[1] = ids(99, 5);
    let (before, after) = (pack(&before), pack(&after));
    let moved = 2; // The changed continuation has one token more, and rows after it move to stay even.
    each_decoder(|name, decoder| {
        let d = decoder.config().hidden_size;
        let hidden = |tokens| {
            let mut workspace = Workspace::new();
            decoder.forward(tokens, &mut workspace, false).unwrap();
            workspace.hidden().to_vec()
        };
        let (old, new) = (hidden(&before), hidden(&after));
        for (index, segment) in before.segments().iter().enumerate().filter(|(index, _)| *index != moved) {
            let start = after.segments()[index].start;
            let (old, new) = (&old[segment.start * d..], &new[start * d..]);
            assert!(bits(&old[..segment.len * d]) == bits(&new[..segment.len * d]), "{name}: segment {index}");
        }
    });
}

/// Log-probs that the trainer computes equal those that the sampler records, and hidden states equal too: alone or sixteen at a
/// time, one token or several at a time, with shared prompts.
#[test]
fn decoding_has_the_bits_of_the_training_forward() {
    let prompts = [ids(51, 9), ids(52, 1), ids(53, 14)];
    let continuations: Vec<(usize, Vec<u32>)> =
        (0..16).map(|i| (i % 3, ids(60 + i as u64, 3 + (i * 5) % 13))).collect();
    each_decoder(|name, decoder| {
        let (d, vocabulary) = (decoder.config().hidden_size, decoder.config().vocab_size);
        let mut workspace = Workspace::new();
        let views: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let prefills = decoder.prefill(&views, &mut workspace).unwrap();

        // What the trainer sees.
        let mut tokens = PackedTokens::new();
        let mut owners = Vec::new();
        for (prompt, prefill) in prompts.iter().zip(&prefills) {
            let owner = tokens.push(prompt, None).unwrap();
            owners.push(owner);
            assert_eq!(prefill.cache.len(), prompt.len());
        }
        for (prompt, continuation) in &continuations {
            tokens.push(continuation, Some(owners[*prompt])).unwrap();
        }
        decoder.forward(&tokens, &mut workspace, false).unwrap();
        let trained = workspace.hidden().to_vec();
        let targets = targets(&tokens);
        let log_probs = decoder.log_probs(&mut workspace, &targets, 0.8, false).unwrap().log_prob;
        for (owner, prefill) in owners.iter().zip(&prefills) {
            let segment = tokens.segments()[*owner];
            let last = &trained[(segment.start + segment.len - 1) * d..][..d];
            assert!(bits(last) == bits(&prefill.hidden), "{name}: prefill");
        }

        let new_cache = |prompt: usize| SequenceCache::new(decoder, Arc::clone(&prefills[prompt].cache), 4);
        let mut logits = vec![0.0; vocabulary];
        let mut check = |index: usize, position: usize, hidden: &[f32]| {
            let segment = tokens.segments()[owners.len() + index];
            let row = segment.start + position;
            assert!(bits(hidden) == bits(&trained[row * d..][..d]), "{name}: sequence {index}, token {position}");
            if position + 1 < segment.len {
                let token = tokens.ids()[row + 1];
                decoder.logits(hidden, &mut logits).unwrap();
                let sampled = kernels::log_softmax_row(&logits, 1.0 / 0.8, token as usize).log_prob;
                let place = targets.iter().position(|target| target.row == row).unwrap();
                assert_eq!(sampled.to_bits(), log_probs[place].to_bits(), "{name}: log-prob");
            }
        };

        // Sixteen at a time, one token each, as long as they last.
        let mut caches: Vec<SequenceCache> = continuations.iter().map(|(prompt, _)| new_cache(*prompt)).collect();
        let longest = continuations.iter().map(|(_, ids)| ids.len()).max().unwrap();
        for position in 0..longest {
            let alive: Vec<usize> = (0..16).filter(|&i| position < continuations[i].1.len()).collect();
            let mut rows: Vec<DecodeRow> = caches
                .iter_mut()
                .zip(&continuations)
                .filter(|(_, (_, ids))| position < ids.len())
                .map(|(cache, (_, ids))| DecodeRow { tokens: &ids[position..=position], cache })
                .collect();
            decoder.decode(&mut rows, &mut workspace).unwrap();
            for (slot, &index) in alive.iter().enumerate() {
                check(index, position, &workspace.hidden()[slot * d..][..d]);
            }
        }
        // Alone: two tokens at once, then one by one.
        for (index, (prompt, ids)) in continuations.iter().enumerate().take(3) {
            let mut cache = new_cache(*prompt);
            let mut position = 0;
            for tokens in [&ids[..2]].into_iter().chain(ids[2..].chunks(1)) {
                decoder.decode(&mut [DecodeRow { tokens, cache: &mut cache }], &mut workspace).unwrap();
                for (offset, hidden) in workspace.hidden().chunks_exact(d).enumerate() {
                    check(index, position + offset, hidden);
                }
                position += tokens.len();
            }
            assert_eq!(cache.len(), prompts[*prompt].len() + ids.len());
            // Forgetting and repeating gives the same again.
            cache.truncate(1);
            decoder.decode(&mut [DecodeRow { tokens: &ids[1..3], cache: &mut cache }], &mut workspace).unwrap();
            check(index, 2, &workspace.hidden()[d..]);
        }
    });
}
