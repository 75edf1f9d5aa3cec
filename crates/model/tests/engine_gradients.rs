//! Gradients against finite differences of the whole engine, bf16 against f32, and the naming of values that are no numbers.

use base::{Purpose, Random};
use kernels::Precision;
use posttrain_model::decoder::{Decoder, Estimate, Gradients, PackedTokens, Workspace};
use posttrain_model::lora::LoraConfig;
use posttrain_model::{Error, ModelConfig};

use crate::engine::*;

/// The loss `Σ d_log_prob · log_prob + d_entropy · entropy` over [`batch`].
fn loss(decoder: &mut Decoder, precision: Precision, d_log_prob: &[f32], d_entropy: &[f32]) -> f64 {
    decoder.prepare(precision);
    let tokens = batch();
    let mut workspace = Workspace::new();
    decoder.forward(&tokens, &mut workspace, false).unwrap();
    let found = decoder.log_probs(&mut workspace, &targets(&tokens), 1.3, true).unwrap();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(d_log_prob, &found.log_prob) + dot(d_entropy, &found.entropy)
}

fn gradients(decoder: &mut Decoder, precision: Precision, d_log_prob: &[f32], d_entropy: &[f32]) -> Gradients {
    decoder.prepare(precision);
    let tokens = batch();
    let mut workspace = Workspace::new();
    let mut gradients = decoder.gradients();
    decoder.forward(&tokens, &mut workspace, true).unwrap();
    decoder
        .backward(&tokens, &mut workspace, &targets(&tokens), 1.3, d_log_prob, Some(d_entropy), &mut gradients)
        .unwrap();
    gradients.finish();
    gradients
}

/// The model as it is, and with an adapter.
fn variants(mut check: impl FnMut(&str, &mut Decoder)) {
    for (name, config) in configs() {
        check(&format!("{name}, full"), &mut decoder(&config, 41));
        let mut adapted = decoder(&config, 42);
        adapt(&mut adapted, &LoraConfig { r: 4, alpha: 8.0, ..LoraConfig::default() }, 6);
        check(&format!("{name}, adapter"), &mut adapted);
    }
}

#[test]
fn every_tensor_agrees_with_finite_differences() {
    let count = targets(&batch()).len();
    let (d_log_prob, d_entropy) = (upstream(3, count), upstream(4, count));
    variants(|name, decoder| {
        let gradients = gradients(decoder, Precision::F32, &d_log_prob, &d_entropy);
        for index in 0..decoder.parameters().len() {
            // Along the gradient, tilted at random: the derivative stays well above the rounding noise of the loss.
            let gradient = gradients.grad(index);
            let norm = kernels::sum_of_squares(gradient).sqrt() as f32;
            let tilt = 0.5 / (gradient.len() as f32).sqrt();
            let random = Random::new(7, Purpose::Test).prompt(index as u32);
            let direction: Vec<f32> =
                gradient.iter().zip(0..).map(|(g, i)| g / norm + tilt * random.normal(i) as f32).collect();
            let analytic: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
            let step = 4e-3f32;
            let original = decoder.parameter(index).to_vec();
            let mut side = |sign: f32| {
                for ((value, original), d) in decoder.parameter_mut(index).iter_mut().zip(&original).zip(&direction) {
                    *value = original + sign * step * d;
                }
                loss(decoder, Precision::F32, &d_log_prob, &d_entropy)
            };
            let numeric = (side(1.0) - side(-1.0)) / (2.0 * f64::from(step));
            decoder.parameter_mut(index).copy_from_slice(&original);
            let error = (numeric - analytic).abs() / (numeric.abs() + analytic.abs());
            let tensor = &decoder.parameters()[index].name;
            assert!(error < 1e-2, "{name}: {tensor}: analytic {analytic}, numeric {numeric}");
        }
    });
}

#[test]
fn bf16_gradients_point_where_f32_gradients_do() {
    let count = targets(&batch()).len();
    let (d_log_prob, d_entropy) = (vec![1.0; count], vec![0.0; count]);
    variants(|name, decoder| {
        let exact = gradients(decoder, Precision::F32, &d_log_prob, &d_entropy);
        let rounded = gradients(decoder, Precision::Bf16, &d_log_prob, &d_entropy);
        for (index, parameter) in decoder.parameters().iter().enumerate() {
            let (a, b) = (exact.grad(index), rounded.grad(index));
            let dot: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let cosine = dot / (kernels::sum_of_squares(a) * kernels::sum_of_squares(b)).sqrt();
            assert!(cosine > 0.99, "{name}: {} has cosine {cosine}", parameter.name);
            assert_ne!(a, b, "{name}: {}: bf16 must round something", parameter.name);
        }
    });
}

#[test]
fn the_first_value_that_is_no_number_is_named() {
    let (_, config) = configs().swap_remove(0);
    let tokens = batch();
    for checkpointing in [false, true] {
        let mut workspace = Workspace::new();
        workspace.set_checkpointing(checkpointing);
        names_the_first_bad_value(&config, &tokens, &mut workspace);
    }
}

fn names_the_first_bad_value(config: &ModelConfig, tokens: &PackedTokens, workspace: &mut Workspace) {
    let poisoned = |tensor: &str| {
        let mut decoder = decoder(config, 43);
        let index = decoder.parameters().iter().position(|parameter| parameter.name == tensor).unwrap();
        decoder.parameter_mut(index)[0] = f32::NAN;
        decoder.prepare(Precision::F32);
        decoder
    };
    let mut name = |tensor| match poisoned(tensor).forward(tokens, workspace, true) {
        Err(Error::NonFinite(found)) => found,
        other => panic!("{other:?}"),
    };
    let found = name("model.layers.1.self_attn.v_proj.weight");
    assert_eq!((found.layer, found.row, &found.tensor[..]), (Some(1), 0, "queries, keys and values"));
    assert_eq!(found.at_step(7).to_string(), "step 7, layer 1, row 0: queries, keys and values holds NaN");
    assert_eq!(name("model.layers.0.mlp.up_proj.weight").tensor, "gate and up projections");
    assert_eq!(name("model.layers.0.mlp.down_proj.weight").tensor, "layer output");
    assert_eq!(name("model.norm.weight").tensor, "final hidden state");

    // Backward: a gradient that overflows.
    let mut decoder = decoder(config, 43);
    decoder.prepare(Precision::F32);
    decoder.forward(tokens, workspace, true).unwrap();
    let targets = targets(tokens);
    let mut gradients = decoder.gradients();
    let huge = vec![f32::MAX; targets.len()];
    let result = decoder.backward(tokens, workspace, &targets, 1.0, &huge, None, &mut gradients);
    let Err(Error::NonFinite(found)) = result else { panic!("{result:?}") };
    assert!(found.tensor.starts_with("gradient"), "{found}");
    assert!(gradients.non_finite().is_some());
}

/// What a run is said to need is what it takes, to within a tenth, and a second step takes no more; checkpointing, which
/// keeps one layer's activations instead of each layer's, takes what it is said to take.
#[test]
fn estimates_are_near_the_truth() {
    let near = |what: &str, estimate: usize, truth: usize| {
        assert!((estimate as f64 / truth as f64 - 1.0).abs() < 0.1, "{what}: estimate {estimate}, in truth {truth}");
    };
    let lora = LoraConfig { r: 16, ..LoraConfig::default() };
    let upper = LoraConfig { layers_to_transform: Some(vec![4, 5]), ..lora.clone() };
    for adapter in [None, Some(&lora), Some(&upper)] {
        let mut config = wide();
        config.vocab_size = 2000;
        config.layers = vec![config.layers[0]; 6];
        let mut decoder = Decoder::random(config.clone(), 1).unwrap();
        adapter.map_or(Ok(()), |lora| decoder.attach_lora(lora, 1)).unwrap();
        decoder.prepare(Precision::F32);
        let tokens = long_batch();
        let targets = targets(&tokens);
        let ones = vec![1.0; targets.len()];
        let mut gradients = decoder.gradients();
        let estimate = Estimate::new(&config, adapter, Precision::F32, tokens.rows(), 100);
        let mut workspace = Workspace::new();
        for (checkpointing, expected) in [(false, estimate.activations), (true, estimate.checkpointed_activations)] {
            workspace.set_checkpointing(checkpointing);
            let mut step = || {
                decoder.forward(&tokens, &mut workspace, true).unwrap();
                decoder.backward(&tokens, &mut workspace, &targets, 1.0, &ones, None, &mut gradients).unwrap();
                gradients.finish();
                workspace.bytes()
            };
            let first = step();
            assert_eq!(step(), first, "the workspace does not grow");
            near("activations", expected, first);
        }
        near("gradients", estimate.gradients, gradients.bytes());
        near("packed weights", estimate.packed, decoder.packed_bytes());
    }
}

#[test]
fn misuse_is_an_error() {
    let (_, config) = configs().swap_remove(0);
    let mut decoder = decoder(&config, 44);
    let mut workspace = Workspace::new();
    let tokens = batch();
    let message = |result: Result<(), Error>| result.unwrap_err().to_string();
    assert!(message(decoder.forward(&tokens, &mut workspace, true)).contains("not prepared"));
    decoder.prepare(Precision::F32);
    decoder.parameter_mut(0)[0] += 1.0;
    assert!(message(decoder.forward(&tokens, &mut workspace, true)).contains("not prepared"));
    decoder.prepare(Precision::F32);

    let mut wrong = PackedTokens::new();
    assert!(message(decoder.forward(&wrong, &mut workspace, true)).contains("empty"));
    assert!(message(wrong.push(&[], None).map(drop)).contains("empty"));
    assert!(message(wrong.push(&[1], Some(0)).map(drop)).contains("cannot continue"));
    wrong.push(&[VOCABULARY as u32], None).unwrap();
    assert!(message(decoder.forward(&wrong, &mut workspace, true)).contains("vocabulary"));
    let mut long = PackedTokens::new();
    long.push(&vec![1; config.max_positions + 1], None).unwrap();
    assert!(message(decoder.forward(&long, &mut workspace, true)).contains("context"));

    decoder.forward(&tokens, &mut workspace, false).unwrap();
    let mut targets = targets(&tokens);
    let mut gradients = decoder.gradients();
    let ones = vec![1.0; targets.len()];
    let mut backward = |decoder: &Decoder, targets: &[_], ones: &[f32]| {
        decoder.backward(&tokens, &mut workspace, targets, 1.0, ones, None, &mut gradients).map(drop)
    };
    assert!(message(backward(&decoder, &targets, &ones)).contains("kept"));
    assert!(message(backward(&decoder, &targets, &ones[1..])).contains("one gradient"));
    targets.reverse();
    assert!(message(backward(&decoder, &targets, &ones)).contains("out of order"));
    targets[0].row = 1000;
    assert!(message(backward(&decoder, &targets, &ones)).contains("rows"));
}
