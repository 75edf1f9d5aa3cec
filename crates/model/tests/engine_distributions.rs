//! Losses of whole distributions, seen one chunk of logits at a time, and changes of the input embeddings.

use std::convert::Infallible;

use candle_core::{D, DType, Device, Tensor};
use kernels::Precision;
use posttrain_model::decoder::{Decoder, Gradients, LogitRow, PackedTokens, Target, Workspace};
use posttrain_model::lora::LoraConfig;
use posttrain_model::reference::ReferenceDecoder;

use crate::engine::*;

/// The distribution that the row of target `index` is held against.
fn other(index: usize) -> Vec<f64> {
    let logits = upstream(100 + index as u64, VOCABULARY);
    let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit).exp() / total).collect()
}

/// How much target `index` counts.
fn weight(index: usize) -> f64 {
    1.0 + 0.25 * (index % 5) as f64
}

/// The softmax of a row.
fn softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|logit| f64::from(logit - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

/// The cross entropy of each row with [`other`], and its gradient in place of the logits.
fn cross_entropy(rows: Vec<LogitRow<'_>>) -> f64 {
    let mut loss = 0.0;
    for row in rows {
        let (p, q, weight) = (softmax(row.logits), other(row.target), weight(row.target));
        loss -= weight * p.iter().zip(&q).map(|(p, q)| q * p.ln()).sum::<f64>();
        for ((logit, p), q) in row.logits.iter_mut().zip(p).zip(q) {
            *logit = (weight * (p - q)) as f32;
        }
    }
    loss
}

fn backward(decoder: &Decoder, tokens: &PackedTokens, targets: &[Target]) -> (f64, Gradients) {
    let mut workspace = Workspace::new();
    let mut gradients = decoder.gradients();
    let mut loss = 0.0;
    decoder.forward(tokens, &mut workspace, true).unwrap();
    let Ok(()) = decoder
        .backward_logits(tokens, &mut workspace, targets, &mut gradients, |rows| {
            loss += cross_entropy(rows);
            Ok::<_, Infallible>(())
        })
        .unwrap();
    gradients.finish();
    (loss, gradients)
}

#[test]
fn losses_of_distributions_have_the_gradients_of_the_reference() {
    for (name, config) in configs() {
        let mut decoder = decoder(&config, 71);
        let reference = ReferenceDecoder::new(&config, &decoder.tensors(), DType::F64).unwrap();
        decoder.prepare(Precision::F32);
        let tokens = batch();
        let targets = targets(&tokens);
        let (loss, gradients) = backward(&decoder, &tokens, &targets);

        let rows: Vec<u32> = targets.iter().map(|target| target.row as u32).collect();
        let weighted: Vec<f64> =
            (0..targets.len()).flat_map(|i| other(i).into_iter().map(move |q| q * weight(i))).collect();
        let weighted = Tensor::from_vec(weighted, (targets.len(), VOCABULARY), &Device::Cpu).unwrap();
        let logits = reference.logits(&tokens).unwrap();
        let logits = logits.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap();
        let largest = logits.max_keepdim(D::Minus1).unwrap().detach();
        let shifted = logits.broadcast_sub(&largest).unwrap();
        let total = shifted.exp().unwrap().sum_keepdim(D::Minus1).unwrap().log().unwrap();
        let log_probs = shifted.broadcast_sub(&total).unwrap();
        let expected = (log_probs * weighted).unwrap().sum_all().unwrap().neg().unwrap();
        let value: f64 = expected.to_scalar().unwrap();
        assert!((loss - value).abs() < 1e-4 * value.abs(), "{name}: {loss} is not {value}");
        let expected = expected.backward().unwrap();
        for (index, parameter) in decoder.parameters().iter().enumerate() {
            let error = distance(gradients.grad(index), &reference.gradient(&expected, &parameter.name).unwrap());
            assert!(error < 5e-5, "{name}: the gradient of {} is off by {error:.1e}", parameter.name);
        }
    }
}

/// All gradients, bit by bit.
fn all_bits(decoder: &Decoder, gradients: &Gradients) -> Vec<u32> {
    (0..decoder.parameters().len()).flat_map(|index| bits(gradients.grad(index))).collect()
}

#[test]
fn the_loss_of_a_token_has_the_same_bits_through_whole_rows() {
    for (name, config) in configs() {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut decoder = decoder(&config, 72);
            adapt(&mut decoder, &LoraConfig { r: 3, alpha: 6.0, ..LoraConfig::default() }, 5);
            decoder.prepare(precision);
            let tokens = batch();
            let targets = targets(&tokens);
            let upstream = upstream(9, targets.len());
            let mut workspace = Workspace::new();
            let mut fused = decoder.gradients();
            decoder.forward(&tokens, &mut workspace, true).unwrap();
            decoder.backward(&tokens, &mut workspace, &targets, 1.0, &upstream, None, &mut fused).unwrap();
            let mut rows = decoder.gradients();
            decoder.forward(&tokens, &mut workspace, true).unwrap();
            let Ok(()) = decoder
                .backward_logits(&tokens, &mut workspace, &targets, &mut rows, |rows| {
                    for row in rows {
                        let token = targets[row.target].token as usize;
                        let stats = kernels::log_softmax_row(row.logits, 1.0, token);
                        kernels::log_softmax_backward_row(row.logits, 1.0, token, stats, upstream[row.target], 0.0);
                    }
                    Ok::<_, Infallible>(())
                })
                .unwrap();
            assert_eq!(all_bits(&decoder, &fused), all_bits(&decoder, &rows), "{name}, {precision:?}");
        }
    }
}

#[test]
fn visited_logits_are_those_of_the_head() {
    for (name, config) in configs() {
        let mut decoder = decoder(&config, 73);
        decoder.prepare(Precision::Bf16);
        let tokens = batch();
        let targets = targets(&tokens);
        let mut workspace = Workspace::new();
        decoder.forward(&tokens, &mut workspace, false).unwrap();
        let mut all = vec![0.0; tokens.rows() * VOCABULARY];
        decoder.logits(&workspace.hidden()[..tokens.rows() * config.hidden_size], &mut all).unwrap();
        let mut seen = Vec::new();
        let Ok(()) = decoder
            .visit_logits(&mut workspace, &targets, |rows| {
                for row in rows {
                    let expected = &all[targets[row.target].row * VOCABULARY..][..VOCABULARY];
                    assert_eq!(bits(row.logits), bits(expected), "{name}");
                    seen.push(row.target);
                }
                Ok::<_, Infallible>(())
            })
            .unwrap();
        assert_eq!(seen, (0..targets.len()).collect::<Vec<_>>(), "{name}: every target once, in order");
    }
}

#[test]
fn an_error_of_the_loss_ends_the_walk() {
    let (_, config) = configs().swap_remove(0);
    let mut decoder = decoder(&config, 74);
    decoder.prepare(Precision::F32);
    let tokens = batch();
    let targets = targets(&tokens);
    let mut workspace = Workspace::new();
    decoder.forward(&tokens, &mut workspace, true).unwrap();
    assert_eq!(decoder.visit_logits(&mut workspace, &targets, |_| Err("no")).unwrap(), Err("no"));
    let mut gradients = decoder.gradients();
    let result = decoder.backward_logits(&tokens, &mut workspace, &targets, &mut gradients, |_| Err("no"));
    assert_eq!(result.unwrap(), Err("no"));
    let beyond = [Target { row: tokens.rows(), token: 0 }];
    assert!(decoder.visit_logits(&mut workspace, &beyond, |_| Ok::<_, Infallible>(())).is_err());
}

/// A constant that depends on the row and the place in it.
fn noise(row: usize, embedding: &mut [f32]) {
    for (i, value) in embedding.iter_mut().enumerate() {
        *value += 0.3 * ((row * 31 + i) as f32).sin();
    }
}

#[test]
fn gradients_under_changed_embeddings_agree_with_finite_differences() {
    for (name, config) in configs() {
        let mut decoder = decoder(&config, 75);
        let tokens = batch();
        let targets = targets(&tokens);
        let loss = |decoder: &mut Decoder, workspace: &mut Workspace| {
            decoder.prepare(Precision::F32);
            decoder.forward_with_embeddings(&tokens, workspace, true, Some(&noise)).unwrap();
            let found = decoder.log_probs(workspace, &targets, 1.0, false).unwrap();
            found.log_prob.iter().map(|&log_prob| f64::from(log_prob)).sum::<f64>()
        };
        for checkpointing in [false, true] {
            let mut workspace = Workspace::new();
            workspace.set_checkpointing(checkpointing);
            let with = loss(&mut decoder, &mut workspace);
            let mut gradients = decoder.gradients();
            let ones = vec![1.0; targets.len()];
            decoder.backward(&tokens, &mut workspace, &targets, 1.0, &ones, None, &mut gradients).unwrap();
            gradients.finish();
            decoder.forward(&tokens, &mut workspace, false).unwrap();
            let plain = decoder.log_probs(&mut workspace, &targets, 1.0, false).unwrap();
            let without: f64 = plain.log_prob.iter().map(|&log_prob| f64::from(log_prob)).sum();
            assert!((with - without).abs() > 1e-2, "{name}: the change must reach the loss");
            // The embedding and the first layer's projections feel the change most.
            for index in 0..3 {
                let gradient = gradients.grad(index);
                let norm = kernels::sum_of_squares(gradient).sqrt() as f32;
                let original = decoder.parameter(index).to_vec();
                let step = 4e-3f32;
                let mut side = |sign: f32| {
                    for ((value, original), g) in decoder.parameter_mut(index).iter_mut().zip(&original).zip(gradient) {
                        *value = original + sign * step * g / norm;
                    }
                    loss(&mut decoder, &mut workspace)
                };
                let numeric = (side(1.0) - side(-1.0)) / (2.0 * f64::from(step));
                decoder.parameter_mut(index).copy_from_slice(&original);
                decoder.prepare(Precision::F32);
                let error = (numeric - f64::from(norm)).abs() / f64::from(norm);
                assert!(error < 1e-2, "{name}: {}: {norm} is not {numeric}", decoder.parameters()[index].name);
            }
        }
    }
}

#[test]
fn micro_batches_of_whole_rows_give_the_same_gradient_bytes() {
    for (name, config) in configs() {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut decoder = decoder(&config, 76);
            decoder.prepare(precision);
            let sequences = [ids(51, 9), ids(52, 4), ids(53, 12)];
            let gradients = |batches: &[&[Vec<u32>]]| {
                let mut workspace = Workspace::new();
                let mut gradients = decoder.gradients();
                for sequences in batches {
                    let mut tokens = PackedTokens::new();
                    for ids in *sequences {
                        tokens.push(ids, None).unwrap();
                    }
                    let targets = targets(&tokens);
                    decoder.forward(&tokens, &mut workspace, true).unwrap();
                    let Ok(()) = decoder
                        .backward_logits(&tokens, &mut workspace, &targets, &mut gradients, |rows| {
                            for row in rows {
                                let token = targets[row.target].token as usize;
                                let p = softmax(row.logits);
                                // The expected square of the probability: a loss of the whole row.
                                let mean: f64 = p.iter().map(|p| p * p).sum();
                                for (logit, p) in row.logits.iter_mut().zip(&p) {
                                    *logit = (2.0 * p * (p - mean)) as f32;
                                }
                                row.logits[token] += 0.5;
                            }
                            Ok::<_, Infallible>(())
                        })
                        .unwrap();
                }
                gradients.finish();
                all_bits(&decoder, &gradients)
            };
            let whole = gradients(&[&sequences]);
            assert_eq!(whole, gradients(&[&sequences[..1], &sequences[1..]]), "{name}, {precision:?}");
            assert_eq!(whole, gradients(&[&sequences[..2], &sequences[2..]]), "{name}, {precision:?}");
        }
    }
}
