//! Prompts that begin alike: computed once, with the bits of prompts computed alone, and never with other weights.

use std::sync::Arc;

use kernels::Precision;
use posttrain_model::decoder::{DecodeRow, Decoder, Prefill, Prompt, SequenceCache, WeightFormat, Workspace};
use posttrain_model::lora::LoraConfig;

use crate::engine::*;

/// The bits of a prompt's last hidden state and of three tokens after it.
fn continued(decoder: &Decoder, prefill: &Prefill, workspace: &mut Workspace) -> Vec<u32> {
    let mut cache = SequenceCache::new(decoder, Arc::clone(&prefill.cache), 1);
    let mut all = bits(&prefill.hidden);
    for tokens in [&[5][..], &[8, 1]] {
        decoder.decode(&mut [DecodeRow { tokens, cache: &mut cache }], workspace).unwrap();
        all.extend(bits(workspace.hidden()));
    }
    all
}

/// Prompts with common beginnings of many lengths: of a whole prompt, of a part, too short to be shared, none.
fn prompts() -> Vec<Vec<u32>> {
    let system = ids(70, 41);
    let with = |count: usize, rest: Vec<u32>| [&system[..count], &rest].concat();
    let mut prompts = vec![
        system.clone(),
        with(41, ids(71, 9)),
        with(41, [ids(71, 9), ids(72, 20)].concat()),
        with(40, ids(73, 1)),
        with(35, ids(74, 30)),
        with(3, ids(75, 30)),
        ids(76, 1),
        ids(77, 50),
    ];
    prompts.sort();
    prompts
}

fn each_decoder(mut check: impl FnMut(&str, &Decoder)) {
    for (name, config) in configs() {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut decoder = decoder(&config, 22);
            decoder.prepare(precision);
            check(&format!("{name}, {precision:?}"), &decoder);
        }
    }
}

#[test]
fn sharing_changes_no_bit_and_saves_the_common_tokens() {
    each_decoder(|name, decoder| {
        let mut workspace = Workspace::new();
        let prompts = prompts();
        let views: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let together = decoder.prefill(&views, &mut workspace).unwrap();
        for (prompt, shared) in views.iter().zip(&together) {
            let alone = decoder.prefill(&[prompt], &mut workspace).unwrap().swap_remove(0);
            assert_eq!((alone.computed, alone.cache.len()), (prompt.len(), prompt.len()));
            assert_eq!(shared.cache.len(), prompt.len());
            let expected = continued(decoder, &alone, &mut workspace);
            assert!(continued(decoder, shared, &mut workspace) == expected, "{name}: {} tokens", prompt.len());
        }
        let computed: usize = together.iter().map(|prefill| prefill.computed).sum();
        let distinct = 41 + 9 + 20 + 1 + 30 + 33 + 1 + 50;
        // The prompt that is the beginning of the next one counts its last token twice, by way of its hidden state.
        assert!((distinct..distinct + 4).contains(&computed), "{name}: {computed} computed, {distinct} distinct");
    });
}

#[test]
fn what_is_known_is_continued_beside_running_sequences() {
    each_decoder(|name, decoder| {
        let mut workspace = Workspace::new();
        let (first, second) = (ids(80, 45), ids(81, 7));
        let long = [&first[..], &ids(82, 30)].concat();
        let whole = decoder.prefill(&[&long, &second], &mut workspace).unwrap();
        let expected = continued(decoder, &whole[0], &mut workspace);
        let sampled = continued(decoder, &whole[1], &mut workspace);
        for known in [1, 20, 44, 45, 46, 74] {
            let old = decoder.prefill(&[&first], &mut workspace).unwrap().swap_remove(0);
            // A completion becomes something to continue, in two runs.
            let mut cache = SequenceCache::new(decoder, Arc::clone(&old.cache), 1);
            decoder.decode(&mut [DecodeRow { tokens: &long[45..], cache: &mut cache }], &mut workspace).unwrap();
            let known = cache.into_shared().beginning(known);
            let prompts = [Prompt { tokens: &long, known: known.clone() }];
            let mut running = SequenceCache::new(decoder, Arc::clone(&whole[1].cache), 1);
            let rows = &mut [DecodeRow { tokens: &[5], cache: &mut running }];
            let found = decoder.extend(rows, &prompts, &mut workspace).unwrap().swap_remove(0);
            let d = decoder.config().hidden_size;
            assert!(sampled[d..2 * d] == bits(&workspace.hidden()[..d]), "{name}: the running sequence");
            assert_eq!(found.computed, long.len() - known.len());
            assert!(continued(decoder, &found, &mut workspace) == expected, "{name}: {} known", known.len());
        }
        let all = whole[1].cache.beginning(usize::MAX);
        let error = decoder.extend(&mut [], &[Prompt { tokens: &second, known: all }], &mut workspace);
        assert_eq!(error.err().map(|e| e.to_string()), Some("a prompt of 7 tokens of which 7 are known".into()));
    });
}

#[test]
fn keys_and_values_of_other_weights_are_refused() {
    let mut workspace = Workspace::new();
    let mut decoder = decoder(&configs()[0].1, 23);
    adapt(&mut decoder, &LoraConfig { r: 2, alpha: 4.0, ..LoraConfig::default() }, 5);
    decoder.prepare(Precision::F32);
    let prompt = ids(90, 20);
    let longer = [&prompt[..], &[1]].concat();
    let fresh = decoder.prefill(&[&prompt], &mut workspace).unwrap().swap_remove(0).cache;
    let mut old = vec![fresh];
    let same = decoder.clone();
    let mut check = |decoder: &Decoder, old: &[Arc<posttrain_model::decoder::KvCache>], usable: bool| {
        for cache in old {
            let prompts = [Prompt { tokens: &longer, known: cache.beginning(20) }];
            let prefilled = decoder.extend(&mut [], &prompts, &mut workspace);
            let mut sequence = SequenceCache::new(decoder, Arc::clone(cache), 1);
            let decoded = decoder.decode(&mut [DecodeRow { tokens: &[1], cache: &mut sequence }], &mut workspace);
            assert_eq!((prefilled.is_ok(), decoded.is_ok()), (usable, usable));
        }
    };
    check(&decoder, &old, true);
    check(&same, &old, true);
    decoder.set_adapter(false);
    check(&decoder, &old, false);
    decoder.set_adapter(true);
    check(&decoder, &old, true);
    decoder.prepare_for_generation(Precision::F32, WeightFormat::Int8);
    check(&decoder, &old, false);
    decoder.prepare(Precision::F32);
    check(&decoder, &old, true);
    decoder.prepare(Precision::Bf16);
    check(&decoder, &old, false);
    let mut after = |decoder: &mut Decoder| {
        decoder.prepare(Precision::F32);
        check(decoder, &old, false);
        old.push(decoder.prefill(&[&prompt], &mut Workspace::new()).unwrap().swap_remove(0).cache);
        check(decoder, &old[old.len() - 1..], true);
    };
    // A change, even one to the value that was there, and one in a clone.
    decoder.parameter_mut(0);
    after(&mut decoder);
    after(&mut {
        let mut clone = same.clone();
        clone.parameter_mut(0)[0] += 1.0;
        clone
    });
    decoder.merge_adapter();
    after(&mut decoder);
    decoder.attach_lora(&LoraConfig::default(), 1).unwrap();
    after(&mut decoder);
}
