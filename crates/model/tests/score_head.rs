//! The score head: finite differences, the reference decoder, transformers, splits of a batch, and the way through files.

use std::path::Path;

use candle_core::DType;
use kernels::Precision;
use posttrain_model::config::{HeadTask, ModelConfig, ScoreHead};
use posttrain_model::decoder::{Blocks, Decoder, Gradients, PackedTokens, ScoreGradients, Target, Workspace};
use posttrain_model::lora::{self, LoraConfig};
use posttrain_model::reference::ReferenceDecoder;
use posttrain_model::tokenizer::Tokenizer;
use posttrain_model::weights::safetensors::{self, Dtype};
use posttrain_model::{save, source};
use serde_json::Value;

use crate::engine::*;

const HEADS: [ScoreHead; 3] = [ScoreHead::REWARD, ScoreHead { outputs: 3, task: HeadTask::Token }, ScoreHead::VALUE];

fn lora() -> LoraConfig {
    LoraConfig { r: 3, alpha: 6.0, ..LoraConfig::default() }
}

/// A model of every family with every kind of head, as it is and with an adapter whose copy of the head is its own.
fn variants(mut check: impl FnMut(&str, &mut Decoder)) {
    for (name, config) in configs() {
        for head in HEADS {
            let build = |seed| {
                let mut decoder = decoder(&config, seed);
                decoder.add_score(head, 0.3, seed).unwrap();
                decoder
            };
            check(&format!("{name}, {head:?}, full"), &mut build(51));
            let mut adapted = build(52);
            adapt(&mut adapted, &lora(), 8);
            let own = adapted.parameters().iter().position(|parameter| parameter.name.contains("score")).unwrap();
            adapted.parameter_mut(own).iter_mut().for_each(|value| *value *= 1.5);
            check(&format!("{name}, {head:?}, adapter"), &mut adapted);
        }
    }
}

/// The last row of every segment, and one in the middle of a prompt.
fn rows(tokens: &PackedTokens) -> Vec<usize> {
    let last = tokens.segments().iter().map(|segment| segment.start + segment.len - 1);
    let mut rows: Vec<usize> = last.chain([2]).collect();
    rows.sort_unstable();
    rows
}

/// What the score head is asked and, where there is one, the language model's head beside it.
struct Asked {
    tokens: PackedTokens,
    rows: Vec<usize>,
    d_scores: Vec<f32>,
    targets: Vec<Target>,
    d_log_prob: Vec<f32>,
}

impl Asked {
    fn of(decoder: &Decoder) -> Self {
        let tokens = batch();
        let rows = rows(&tokens);
        let targets = if decoder.config().has_language_head() { targets(&tokens) } else { Vec::new() };
        let outputs = decoder.config().score.unwrap().outputs;
        let (d_scores, d_log_prob) = (upstream(9, rows.len() * outputs), upstream(10, targets.len()));
        Self { tokens, rows, d_scores, targets, d_log_prob }
    }

    fn loss(&self, decoder: &mut Decoder) -> f64 {
        decoder.prepare(Precision::F32);
        let mut workspace = Workspace::new();
        decoder.forward(&self.tokens, &mut workspace, false).unwrap();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let mut loss = dot(&self.d_scores, &decoder.scores(&workspace, &self.rows).unwrap());
        if !self.targets.is_empty() {
            let found = decoder.log_probs(&mut workspace, &self.targets, 1.0, false).unwrap();
            loss += dot(&self.d_log_prob, &found.log_prob);
        }
        loss
    }

    fn gradients(&self, decoder: &mut Decoder) -> Gradients {
        decoder.prepare(Precision::F32);
        let mut workspace = Workspace::new();
        let mut gradients = decoder.gradients();
        decoder.forward(&self.tokens, &mut workspace, true).unwrap();
        let scores = ScoreGradients { rows: &self.rows, blocks: None, d_scores: &self.d_scores };
        let (tokens, targets) = (&self.tokens, &self.targets);
        if targets.is_empty() {
            decoder.backward_scores(tokens, &mut workspace, scores, &mut gradients).unwrap();
        } else {
            let d_log_prob = &self.d_log_prob;
            decoder
                .backward_with_scores(tokens, &mut workspace, targets, 1.0, d_log_prob, None, scores, &mut gradients)
                .unwrap();
        }
        gradients.finish();
        gradients
    }
}

#[test]
fn gradients_agree_with_finite_differences_and_with_the_reference_decoder() {
    variants(|name, decoder| {
        let asked = Asked::of(decoder);
        let gradients = asked.gradients(decoder);

        let mut reference = ReferenceDecoder::new(decoder.config(), &decoder.tensors(), DType::F64).unwrap();
        if let Some(config) = decoder.adapter_config() {
            reference = reference.with_adapter(config, &decoder.adapter_tensors()).unwrap();
        }
        let column = |values: &[f32]| {
            candle_core::Tensor::new(values, &candle_core::Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
        };
        let scores = reference.scores(&asked.tokens, &asked.rows).unwrap().flatten_all().unwrap();
        let mut loss = (&scores * column(&asked.d_scores)).unwrap().sum_all().unwrap();
        if !asked.targets.is_empty() {
            let (log_probs, _) = reference.log_probs(&asked.tokens, &asked.targets, 1.0).unwrap();
            loss = (loss + (log_probs * column(&asked.d_log_prob)).unwrap().sum_all().unwrap()).unwrap();
        }
        let mut workspace = Workspace::new();
        decoder.forward(&asked.tokens, &mut workspace, false).unwrap();
        let found = decoder.scores(&workspace, &asked.rows).unwrap();
        assert!(distance(&found, &scores.to_vec1().unwrap()) < 2e-5, "{name}: scores");
        let expected = loss.backward().unwrap();
        for (index, parameter) in decoder.parameters().iter().enumerate() {
            let error = distance(gradients.grad(index), &reference.gradient(&expected, &parameter.name).unwrap());
            assert!(error < 5e-5, "{name}: the gradient of {} is off by {error:.1e}", parameter.name);
        }

        // The head itself, and what lies farthest below it, along their gradients.
        let count = decoder.parameters().len();
        let head = (0..count).filter(|&index| decoder.parameters()[index].name.contains("score"));
        for index in head.chain([0]).collect::<Vec<_>>() {
            let gradient = gradients.grad(index);
            let norm = kernels::sum_of_squares(gradient).sqrt();
            let step = 4e-3;
            let original = decoder.parameter(index).to_vec();
            let mut side = |sign: f64| {
                for ((value, original), g) in decoder.parameter_mut(index).iter_mut().zip(&original).zip(gradient) {
                    *value = original + (sign * step * f64::from(*g) / norm) as f32;
                }
                asked.loss(decoder)
            };
            let numeric = (side(1.0) - side(-1.0)) / (2.0 * step);
            decoder.parameter_mut(index).copy_from_slice(&original);
            let tensor = &decoder.parameters()[index].name;
            assert!((numeric / norm - 1.0).abs() < 1e-2, "{name}: {tensor}: analytic {norm}, numeric {numeric}");
        }
    });
}

/// One batch, and the same in two micro-batches that end in different places, give the same bytes.
#[test]
fn a_split_and_the_number_of_threads_change_no_bit() {
    let sequences: Vec<Vec<u32>> = [9usize, 4, 13, 7, 1].iter().zip(60..).map(|(&n, seed)| ids(seed, n)).collect();
    let run = |precision: Precision, cuts: &[usize], threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut decoder = decoder(&wide(), 53);
            decoder.add_score(ScoreHead { outputs: 2, task: HeadTask::Token }, 0.3, 1).unwrap();
            decoder.prepare(precision);
            let mut workspace = Workspace::new();
            let mut gradients = decoder.gradients();
            let mut scores = Vec::new();
            let mut start = 0;
            for &end in cuts {
                let mut tokens = PackedTokens::new();
                for ids in &sequences[start..end] {
                    tokens.push(ids, None).unwrap();
                }
                let rows: Vec<usize> = tokens.segments().iter().map(|s| s.start + s.len - 1).collect();
                decoder.forward(&tokens, &mut workspace, true).unwrap();
                scores.extend(decoder.scores(&workspace, &rows).unwrap());
                let upstream = upstream(11, 2 * sequences.len());
                let asked = ScoreGradients { rows: &rows, blocks: None, d_scores: &upstream[2 * start..2 * end] };
                decoder.backward_scores(&tokens, &mut workspace, asked, &mut gradients).unwrap();
                start = end;
            }
            gradients.finish();
            (bits(&scores), bits(gradients.flat()))
        })
    };
    for precision in [Precision::F32, Precision::Bf16] {
        let whole = run(precision, &[5], 2);
        assert!(whole == run(precision, &[1, 2, 5], 1), "{precision:?}: three pieces");
        assert!(whole == run(precision, &[3, 4, 5], 3), "{precision:?}: other pieces");
    }
}

/// A block for each row is what the whole head gives it, bit for bit, forward and backward, where the other outputs have no gradient.
#[test]
fn blocks_have_the_bits_of_the_whole_head() {
    let (width, count) = (2, 5);
    let config = ModelConfig::tiny(posttrain_model::Family::Llama, VOCABULARY);
    let tokens = batch();
    let rows = rows(&tokens);
    let of_rows: Vec<usize> = (0..rows.len()).map(|row| (3 * row + 1) % count).collect();
    let blocks = Blocks { width, of_rows: &of_rows };
    for (task, adapter) in [(HeadTask::Token, false), (HeadTask::Token, true), (HeadTask::Sequence, false)] {
        let mut decoder = decoder(&config, 57);
        decoder.add_score(ScoreHead { outputs: width * count, task }, 0.3, 1).unwrap();
        if adapter {
            adapt(&mut decoder, &lora(), 9);
        }
        decoder.prepare(Precision::F32);
        let mut workspace = Workspace::new();
        let d_scores = upstream(12, rows.len() * width);
        let mut whole = vec![0.0; rows.len() * width * count];
        let mut gradients_of = |scores: ScoreGradients<'_>| {
            decoder.forward(&tokens, &mut workspace, true).unwrap();
            let mut gradients = decoder.gradients();
            decoder.backward_scores(&tokens, &mut workspace, scores, &mut gradients).unwrap();
            gradients.finish();
            gradients
        };
        for (row, &block) in of_rows.iter().enumerate() {
            whole[(row * count + block) * width..][..width].copy_from_slice(&d_scores[row * width..][..width]);
        }
        let own = gradients_of(ScoreGradients { rows: &rows, blocks: Some(blocks), d_scores: &d_scores });
        let dense = gradients_of(ScoreGradients { rows: &rows, blocks: None, d_scores: &whole });
        assert!(own.flat().iter().any(|gradient| *gradient != 0.0));
        // Zeros have signs of their own.
        assert!(own.flat() == dense.flat(), "{task:?}");
        let all = decoder.scores(&workspace, &rows).unwrap();
        let found = decoder.block_scores(&workspace, &rows, blocks).unwrap();
        for (row, &block) in of_rows.iter().enumerate() {
            let expected = &all[(row * count + block) * width..][..width];
            assert_eq!(bits(&found[row * width..][..width]), bits(expected), "{task:?}, row {row}");
        }
        let message = |blocks| decoder.block_scores(&workspace, &rows, blocks).unwrap_err().to_string();
        assert_eq!(message(Blocks { width: 3, of_rows: &of_rows }), "10 outputs are not blocks of 3");
        assert_eq!(
            message(Blocks { width, of_rows: &of_rows[1..] }),
            format!("expected a block for each of {} rows, got {}", rows.len(), rows.len() - 1)
        );
        let beyond = vec![5; rows.len()];
        assert_eq!(message(Blocks { width, of_rows: &beyond }), "block 5 is asked for, but the head has 5");
    }
}

/// What is left says what the first output said, with an adapter or without.
#[test]
fn one_of_several_outputs_can_be_kept() {
    let config = ModelConfig::tiny(posttrain_model::Family::Llama, VOCABULARY);
    let (tokens, mut workspace) = (batch(), Workspace::new());
    for (task, adapter) in [(HeadTask::Sequence, false), (HeadTask::Token, true)] {
        let mut decoder = decoder(&config, 58);
        decoder.add_score(ScoreHead { outputs: 3, task }, 0.3, 1).unwrap();
        if adapter {
            adapt(&mut decoder, &lora(), 9);
        }
        let mut scores = |decoder: &mut Decoder| {
            decoder.prepare(Precision::F32);
            decoder.forward(&tokens, &mut workspace, false).unwrap();
            decoder.scores(&workspace, &rows(&tokens)).unwrap()
        };
        let all = scores(&mut decoder);
        decoder.keep_first_score().unwrap();
        assert_eq!(decoder.config().score, Some(ScoreHead { outputs: 1, task }));
        let first: Vec<f32> = all.chunks(3).map(|outputs| outputs[0]).collect();
        assert_eq!(bits(&scores(&mut decoder)), bits(&first), "{task:?}");
        assert_eq!(decoder.adapter_config().is_some(), adapter);
        let found = if adapter { decoder.adapter_tensors() } else { decoder.tensors() };
        let head = found.iter().find(|(name, _)| name.ends_with("score.weight")).unwrap();
        assert_eq!(head.1.shape[0], 1);
    }
    let message = decoder(&config, 58).keep_first_score().unwrap_err().to_string();
    assert_eq!(message, "the model has no score head");
}

/// A gradient of the head's weights goes to the head that is trained.
#[test]
fn weights_of_the_head_have_gradients_of_their_own() {
    let config = ModelConfig::tiny(posttrain_model::Family::Llama, VOCABULARY);
    for adapter in [false, true] {
        let mut decoder = decoder(&config, 59);
        decoder.add_score(ScoreHead { outputs: 2, task: HeadTask::Token }, 0.3, 1).unwrap();
        if adapter {
            adapt(&mut decoder, &lora(), 9);
        }
        let mut gradients = decoder.gradients();
        let given = upstream(13, decoder.score_weight().unwrap().len());
        decoder.add_score_weight_gradient(&given, &mut gradients).unwrap();
        decoder.add_score_weight_gradient(&given, &mut gradients).unwrap();
        for (index, parameter) in decoder.parameters().iter().enumerate() {
            let expected =
                |place: usize| if parameter.name.ends_with("score.weight") { 2.0 * given[place] } else { 0.0 };
            assert!(gradients.grad(index).iter().enumerate().all(|(place, found)| *found == expected(place)));
        }
        let index = decoder.parameters().iter().position(|parameter| parameter.name.ends_with("score.weight")).unwrap();
        assert_eq!(decoder.score_weight().unwrap(), decoder.parameter(index));
        let short = decoder.add_score_weight_gradient(&given[1..], &mut gradients).unwrap_err().to_string();
        assert!(short.contains("gradients of a score head's weights"), "{short}");
    }
}

#[test]
fn decoding_gives_the_scores_of_the_training_forward() {
    let config = ModelConfig::tiny(posttrain_model::Family::Llama, VOCABULARY);
    let mut decoder = decoder(&config, 54);
    decoder.add_score(ScoreHead::VALUE, 0.3, 1).unwrap();
    decoder.prepare(Precision::F32);
    let ids = ids(70, 12);
    let mut tokens = PackedTokens::new();
    tokens.push(&ids, None).unwrap();
    let mut workspace = Workspace::new();
    decoder.forward(&tokens, &mut workspace, false).unwrap();
    let every: Vec<usize> = (0..ids.len()).collect();
    let all = decoder.scores(&workspace, &every).unwrap();
    for (row, score) in all.iter().enumerate() {
        let mut prefix = PackedTokens::new();
        prefix.push(&ids[..=row], None).unwrap();
        decoder.forward(&prefix, &mut workspace, false).unwrap();
        assert_eq!(decoder.scores(&workspace, &[row]).unwrap()[0].to_bits(), score.to_bits(), "row {row}");
    }
}

#[test]
fn heads_survive_the_way_through_a_folder() {
    for (name, config) in configs() {
        for head in HEADS {
            let loaded = source::load("tiny-llama", &mut |_| {}).unwrap();
            let config = ModelConfig { vocab_size: loaded.config.vocab_size, ..config.clone() };
            let mut before = Decoder::random(config.clone(), 3).unwrap();
            before.add_score(head, 0.1, 4).unwrap();
            let folder = tempfile::tempdir().unwrap();
            save::model(folder.path(), before.config(), before.views(), Dtype::F32, &loaded.tokenizer, None).unwrap();
            let read = source::load(folder.path().to_str().unwrap(), &mut |_| {}).unwrap();
            assert_eq!(read.config.score, Some(head), "{name}");
            let after = Decoder::new(read.config, read.weights.unwrap()).unwrap();
            assert!(after.tensors() == before.tensors(), "{name}: {head:?}");
            let own_head = before.tensors().contains_key("lm_head.weight");
            assert_eq!(own_head, !config.tied_head && head.task == HeadTask::Value, "{name}: {head:?}");

            // With an adapter: the head travels with it, onto a base that has none.
            let base = decoder(&config, 55);
            let mut before = base.clone();
            before.add_score(head, 0.1, 4).unwrap();
            adapt(&mut before, &lora(), 9);
            let folder = tempfile::tempdir().unwrap();
            let tokenizer = Tokenizer::bytes().unwrap();
            let tensors = before.adapter_views();
            save::adapter(folder.path(), &lora(), Some(head), "base", tensors, &tokenizer, None).unwrap();
            let text = std::fs::read_to_string(folder.path().join(save::ADAPTER_CONFIG)).unwrap();
            let tensors = safetensors::read(&folder.path().join(save::ADAPTER)).unwrap();
            assert_eq!(lora::saved_head(&text, &tensors).unwrap(), Some(head), "{name}");
            let mut after = base;
            after.add_score(head, 0.0, 0).unwrap();
            after.load_adapter(&LoraConfig::from_peft_json(&text).unwrap(), tensors).unwrap();
            assert!(after.adapter_tensors() == before.adapter_tensors(), "{name}: {head:?}");
            let scores = |decoder: &mut Decoder| {
                decoder.prepare(Precision::F32);
                let mut workspace = Workspace::new();
                decoder.forward(&batch(), &mut workspace, false).unwrap();
                decoder.scores(&workspace, &rows(&batch())).unwrap()
            };
            let with_adapter = scores(&mut after);
            assert_eq!(bits(&with_adapter), bits(&scores(&mut before)), "{name}: {head:?}");
            after.merge_adapter();
            let merged: Vec<f64> = scores(&mut after).into_iter().map(f64::from).collect();
            assert!(distance(&with_adapter, &merged) < 1e-4, "{name}: {head:?}: merged scores");
        }
    }
}

/// `tests/reference/score_heads.py` gives the tiny Llama heads and says what transformers makes of them.
#[test]
fn scores_are_those_of_transformers() {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference");
    let expected: Value =
        serde_json::from_str(&std::fs::read_to_string(reference.join("score_heads.json")).unwrap()).unwrap();
    let numbers = |value: &Value| -> Vec<f64> {
        let mut numbers = Vec::new();
        let mut open = vec![value];
        while let Some(value) = open.pop() {
            match value {
                Value::Array(items) => open.extend(items.iter().rev()),
                number => numbers.push(number.as_f64().unwrap()),
            }
        }
        numbers
    };
    let ids: Vec<u32> = numbers(&expected["ids"]).into_iter().map(|id| id as u32).collect();
    for (key, task) in [("sequence", HeadTask::Sequence), ("token", HeadTask::Token)] {
        let expected = &expected[key];
        let base = source::load(reference.join("logits/llama").to_str().unwrap(), &mut |_| {});
        let config = base.map(|loaded| loaded.config).unwrap_or_else(|_| {
            let text = std::fs::read(reference.join("logits/llama/config.json")).unwrap();
            ModelConfig::from_json_bytes(&text).unwrap()
        });
        let mut decoder = Decoder::new(config, safetensors::read(&reference.join("logits/llama")).unwrap()).unwrap();
        let weight = numbers(&expected["weight"]);
        let outputs = weight.len() / decoder.config().hidden_size;
        decoder.add_score(ScoreHead { outputs, task }, 0.0, 0).unwrap();
        let values: Vec<f64> = weight.into_iter().chain(numbers(&expected["bias"])).collect();
        let mut rest = &values[..];
        for index in 0..decoder.parameters().len() {
            if decoder.parameters()[index].name.starts_with("score") {
                let slot = decoder.parameter_mut(index);
                let (own, others) = rest.split_at(slot.len());
                slot.iter_mut().zip(own).for_each(|(slot, value)| *slot = *value as f32);
                rest = others;
            }
        }
        assert!(rest.is_empty(), "{key}: every number has its place");
        decoder.prepare(Precision::F32);
        let mut tokens = PackedTokens::new();
        tokens.push(&ids, None).unwrap();
        let mut workspace = Workspace::new();
        decoder.forward(&tokens, &mut workspace, false).unwrap();
        let rows: Vec<usize> = match task {
            HeadTask::Sequence => vec![ids.len() - 1],
            _ => (0..ids.len()).collect(),
        };
        let error = distance(&decoder.scores(&workspace, &rows).unwrap(), &numbers(&expected["scores"]));
        assert!(error < 2e-5, "{key}: scores are off by {error:.1e}");
    }
}

#[test]
fn misuse_is_an_error() {
    let config = ModelConfig::tiny(posttrain_model::Family::Llama, VOCABULARY);
    let plain = decoder(&config, 56);
    let mut scoring = plain.clone();
    scoring.add_score(ScoreHead::REWARD, 0.1, 1).unwrap();
    let message = |result: Result<(), posttrain_model::Error>| result.unwrap_err().to_string();
    assert!(message(scoring.add_score(ScoreHead::VALUE, 0.1, 1)).contains("a score head already"));
    let none = ScoreHead { outputs: 0, task: HeadTask::Token };
    assert!(message(plain.clone().add_score(none, 0.1, 1)).contains("num_labels"));
    let mut adapted = plain.clone();
    adapt(&mut adapted, &lora(), 9);
    assert!(message(adapted.add_score(ScoreHead::VALUE, 0.1, 1)).contains("an adapter already"));

    let tokens = batch();
    let mut workspace = Workspace::new();
    let forward = |decoder: &mut Decoder, workspace: &mut Workspace| {
        decoder.prepare(Precision::F32);
        decoder.forward(&tokens, workspace, true).unwrap();
    };
    forward(&mut plain.clone(), &mut workspace);
    let mut prepared = plain;
    prepared.prepare(Precision::F32);
    assert!(message(prepared.scores(&workspace, &[0]).map(drop)).contains("no score head"));
    forward(&mut scoring, &mut workspace);
    assert!(message(scoring.scores(&workspace, &[1000]).map(drop)).contains("row 1000"));
    assert!(message(scoring.scores(&workspace, &[3, 3]).map(drop)).contains("ascending"));
    let wanted = targets(&tokens);
    let found = scoring.log_probs(&mut workspace, &wanted, 1.0, false).map(drop);
    assert!(message(found).contains("no language-model head"));
    assert!(message(scoring.logits(&[], &mut [])).contains("no language-model head"));
    let mut gradients = scoring.gradients();
    let wrong = ScoreGradients { rows: &[1, 2], blocks: None, d_scores: &[1.0] };
    let result = scoring.backward_scores(&tokens, &mut workspace, wrong, &mut gradients);
    assert!(message(result).contains("expected 2 gradients of scores, got 1"));

    let mut adapted = prepared.clone();
    adapted.add_score(ScoreHead::VALUE, 0.1, 1).unwrap();
    adapt(&mut adapted, &lora(), 9);
    adapted.set_adapter(false);
    forward(&mut adapted, &mut workspace);
    let mut gradients = adapted.gradients();
    let one = ScoreGradients { rows: &[1], blocks: None, d_scores: &[1.0] };
    let result = adapted.backward_scores(&tokens, &mut workspace, one, &mut gradients);
    assert!(message(result).contains("switched off"));

    let head = scoring.parameters().iter().position(|parameter| parameter.name == "score.weight").unwrap();
    scoring.parameter_mut(head)[0] = f32::NAN;
    forward(&mut scoring, &mut workspace);
    assert!(message(scoring.scores(&workspace, &[4]).map(drop)).contains("row 4: score holds NaN"));
}

#[test]
fn averages_of_weights() {
    let config = ModelConfig::tiny(posttrain_model::Family::Llama, VOCABULARY);
    let build = |seed| {
        let mut decoder = decoder(&config, seed);
        decoder.add_score(ScoreHead::REWARD, 0.3, seed).unwrap();
        decoder
    };
    let (a, b) = (build(61), build(62));
    let mut mean = a.clone();
    mean.average(std::slice::from_ref(&b), &[1.0, 1.0]).unwrap();
    let mut third = a.clone();
    third.average(std::slice::from_ref(&b), &[2.0, 1.0]).unwrap();
    for index in 0..a.parameters().len() {
        let name = &a.parameters()[index].name;
        for (i, (x, y)) in a.parameter(index).iter().zip(b.parameter(index)).enumerate() {
            assert_eq!(mean.parameter(index)[i], ((f64::from(*x) + f64::from(*y)) / 2.0) as f32, "{name}");
            assert!((third.parameter(index)[i] - (2.0 * x + y) / 3.0).abs() < 1e-6, "{name}");
        }
    }
    let mut same = a.clone();
    same.average(&[a.clone(), a.clone()], &[0.2, 0.5, 0.1]).unwrap();
    assert!(same.parameter(0).iter().zip(a.parameter(0)).all(|(x, y)| (x - y).abs() <= f32::EPSILON * y.abs()));
    let mut alone = a.clone();
    alone.average(&[], &[3.0]).unwrap();
    assert!(alone.tensors() == a.tensors());

    let message = |decoder: &mut Decoder, others: &[Decoder], shares: &[f64]| {
        decoder.average(others, shares).unwrap_err().to_string()
    };
    assert!(message(&mut mean, std::slice::from_ref(&b), &[1.0]).contains("expected 2 shares"));
    assert!(message(&mut mean, std::slice::from_ref(&b), &[0.0, 0.0]).contains("not all 0"));
    assert!(message(&mut mean, &[decoder(&config, 63)], &[1.0, 1.0]).contains("model 2 has not the shape"));
    let mut adapted = build(64);
    adapt(&mut adapted, &lora(), 9);
    assert!(message(&mut mean, &[adapted], &[1.0, 1.0]).contains("adapter"));
}
