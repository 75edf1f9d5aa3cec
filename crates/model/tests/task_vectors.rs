//! Sums of task vectors: where they are a model or an average, and what adapters and tied weights add.

use posttrain_model::decoder::{Decoder, TaskVectors};
use posttrain_model::lora::LoraConfig;
use posttrain_model::{Family, ModelConfig};

const VOCABULARY: usize = 40;

fn random(seed: u64) -> Decoder {
    Decoder::random(ModelConfig::tiny(Family::Llama, VOCABULARY), seed).unwrap()
}

/// The bits of every weight.
fn bits(decoder: &Decoder) -> Vec<u32> {
    decoder.views().flat_map(|(_, tensor)| tensor.data.iter().map(|value| value.to_bits())).collect()
}

#[test]
fn coefficients_that_pick_a_model_give_its_bits() {
    let vectors = TaskVectors::new(random(1), vec![random(2), random(3)]).unwrap();
    let merged = |coefficients: &[f64]| bits(&vectors.merged(coefficients).unwrap());
    assert_eq!(merged(&[0.0, 0.0]), bits(&random(1)));
    assert_eq!(merged(&[1.0, 0.0]), bits(&random(2)));
    assert_eq!(merged(&[0.0, 1.0]), bits(&random(3)));
}

#[test]
fn without_extrapolation_it_is_the_soup_to_the_last_bit() {
    let vectors = TaskVectors::new(random(1), vec![random(2), random(3)]).unwrap();
    for tenths in 0..=10 {
        let shares = [f64::from(tenths) / 10.0, f64::from(10 - tenths) / 10.0];
        let mut soup = random(2);
        soup.average(&[random(3)], &shares).unwrap();
        assert_eq!(bits(&vectors.merged(&shares).unwrap()), bits(&soup), "{shares:?}");
    }
}

#[test]
fn blocks_have_coefficients_of_their_own() {
    let vectors = TaskVectors::new(random(1), vec![random(2), random(3)]).unwrap();
    let blocks = vectors.blocks();
    assert_eq!(blocks, 1 + random(1).config().layers.len());
    // The same everywhere is the same model.
    let everywhere = vectors.merged(&[1.25, -0.5].repeat(blocks)).unwrap();
    assert_eq!(bits(&everywhere), bits(&vectors.merged(&[1.25, -0.5]).unwrap()));
    // The second model's first layer, the third one's second, and the base elsewhere.
    let mut coefficients = vec![0.0; 2 * blocks];
    (coefficients[2], coefficients[5]) = (1.0, 1.0);
    let (merged, parts) = (vectors.merged(&coefficients).unwrap(), [random(1), random(2), random(3)]);
    for (index, (name, tensor)) in merged.views().enumerate() {
        let from = if name.contains("layers.0.") { 1 } else { 2 * usize::from(name.contains("layers.1.")) };
        let expected = parts[from].views().nth(index).unwrap().1.data;
        assert_eq!(tensor.data, expected, "{name} is that of model {}", from + 1);
    }
    assert!(vectors.merged(&[0.5; 3]).err().unwrap().to_string().contains("or 2 for each of"));
}

#[test]
fn sums_are_those_of_the_formula() {
    let (base, one, other) = (random(1), random(2), random(3));
    let merged =
        TaskVectors::new(base.clone(), vec![one.clone(), other.clone()]).unwrap().merged(&[1.25, -0.5]).unwrap();
    let values = |decoder: &Decoder| -> Vec<f64> {
        decoder.views().flat_map(|(_, tensor)| tensor.data.to_vec()).map(f64::from).collect()
    };
    let (base, one, other) = (values(&base), values(&one), values(&other));
    for (index, merged) in values(&merged).into_iter().enumerate() {
        let expected = base[index] + 1.25 * (one[index] - base[index]) - 0.5 * (other[index] - base[index]);
        assert!((merged - expected).abs() <= 1e-6 * (1.0 + expected.abs()), "{merged}, expected {expected}");
    }
}

/// `B_1 A_1 + B_2 A_2` is not `(B_1 + B_2)(A_1 + A_2)`.
#[test]
fn adapters_count_as_the_products_that_they_stand_for() {
    let base = random(1);
    let adapted = |seed: u64| {
        let mut decoder = base.clone();
        decoder.attach_lora(&LoraConfig { r: 2, ..LoraConfig::default() }, seed).unwrap();
        for index in 0..decoder.parameters().len() {
            decoder
                .parameter_mut(index)
                .iter_mut()
                .enumerate()
                .for_each(|(i, value)| *value += 0.01 * ((i % 7) as f32 - 3.0));
        }
        decoder
    };
    let vectors = TaskVectors::new(base.clone(), vec![adapted(4), adapted(5)]).unwrap();
    let sum = vectors.merged(&[1.0, 1.0]).unwrap();
    let products = |seed| {
        let mut merged = adapted(seed);
        merged.merge_adapter();
        merged
    };
    let (one, other) = (products(4), products(5));
    let mut changed = 0;
    for index in 0..base.parameters().len() {
        let all = [&base, &one, &other, &sum].map(|decoder| decoder.parameter(index));
        for place in 0..all[0].len() {
            let [base, one, other, sum] = all.map(|values| f64::from(values[place]));
            assert!((sum - (one + other - base)).abs() < 1e-6);
            changed += usize::from(one != base);
        }
    }
    assert!(changed > 0);
}

#[test]
fn a_tied_embedding_is_counted_once() {
    let config = ModelConfig { tied_head: true, ..ModelConfig::tiny(Family::Llama, VOCABULARY) };
    let tied = |seed| Decoder::random(config.clone(), seed).unwrap();
    let merged = TaskVectors::new(tied(1), vec![tied(2)]).unwrap().merged(&[2.0]).unwrap();
    assert_eq!(merged.parameters().len(), tied(1).parameters().len());
    let embeddings = [&tied(1), &tied(2), &merged].map(|decoder| decoder.parameter(0).to_vec());
    for ((base, one), merged) in embeddings[0].iter().zip(&embeddings[1]).zip(&embeddings[2]) {
        assert_eq!(*merged, (2.0 * f64::from(*one) - f64::from(*base)) as f32);
    }
}

#[test]
fn what_cannot_be_added_is_refused() {
    let vectors = TaskVectors::new(random(1), vec![random(2)]).unwrap();
    let refused = |coefficients: &[f64]| vectors.merged(coefficients).err().unwrap().to_string();
    assert!(refused(&[0.5, 0.5]).contains("expected 1 finite coefficients"));
    assert!(refused(&[f64::NAN]).contains("NaN"));
    let wider = Decoder::random(ModelConfig::tiny(Family::Llama, VOCABULARY + 1), 1).unwrap();
    assert!(TaskVectors::new(random(1), vec![wider]).err().unwrap().to_string().contains("shape"));
}
