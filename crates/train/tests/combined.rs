//! Models made of trained ones: how candidates of a frontier are measured, and what the weights of a mixture are found from.

use std::sync::Arc;

use data::{Prompt, Source};
use envs::{Answer, Columns, Reward, RewardError, Score, Status};
use kernels::Precision;
use model::decoder::{Decoder, TaskVectors};
use model::tokenizer::Tokenizer;
use model::{Family, ModelConfig};
use posttrain_train::frontier::{Frontier, Look, Probe, ProbeError, ProbeOptions, SearchOptions};
use posttrain_train::mixing::{PoolOptions, Proposal, pool, weights};
use rollout::SamplingOptions;

const VOCABULARY: usize = 259;

fn model(seed: u64) -> Decoder {
    let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, VOCABULARY), seed).unwrap();
    decoder.prepare(Precision::F32);
    decoder
}

fn prompts() -> Vec<Prompt> {
    let prompt = |id: u32| Prompt {
        id,
        ids: Arc::from([65 + id, 66, 67]),
        text: "ABC".into(),
        messages: None,
        columns: Columns::new(),
        source: Source::new("test", u64::from(id) + 1),
    };
    (0..3).map(prompt).collect()
}

/// Pays the share of some tokens.
struct Share(&'static str, fn(u32) -> bool);

impl Reward for Share {
    fn name(&self) -> &str {
        self.0
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let share = |ids: &[u32]| ids.iter().filter(|id| self.1(**id)).count() as f64 / ids.len() as f64;
        Ok(answers.iter().map(|answer| Some(Score::new(share(answer.completion_ids), Status::Ok))).collect())
    }
}

const EVEN: Share = Share("even", |id| id % 2 == 0);
const SMALL: Share = Share("small", |id| id < 100);

fn options() -> ProbeOptions {
    let sampling = SamplingOptions { max_new_tokens: 5, ..SamplingOptions::default() };
    ProbeOptions { samples: 4, sampling, batch_size: 5 }
}

fn with_probe<T>(options: &ProbeOptions, then: impl FnOnce(&Probe<'_>) -> T) -> T {
    let (tokenizer, prompts) = (Tokenizer::bytes().unwrap(), prompts());
    let objectives: [&dyn Reward; 2] = [&EVEN, &SMALL];
    then(&Probe::new(model(1), &tokenizer, &prompts, &objectives, options, (Precision::F32, 4)).unwrap())
}

#[test]
fn the_model_before_training_is_where_measurements_begin() {
    with_probe(&options(), |probe| {
        let scores = probe.scores(&mut model(1), Look::whole(0)).unwrap();
        assert_eq!((scores.divergence, scores.perplexity_ratio), (0.0, 1.0));
        let objectives = probe.objectives();
        let means: Vec<f64> = objectives.iter().map(|objective| objective.mean).collect();
        assert_eq!(scores.objectives, means, "the same draws give the same answers");
        assert!(objectives.iter().all(|objective| objective.standard_deviation > 0.0));
        assert_ne!(
            probe.scores(&mut model(1), Look::whole(1)).unwrap().objectives,
            means,
            "another round has other draws"
        );
        let other = probe.scores(&mut model(2), Look::whole(0)).unwrap();
        assert!(other.divergence > 0.0 && other.perplexity_ratio > 1.0);
    });
}

#[test]
fn a_look_takes_its_share_of_the_answers() {
    with_probe(&options(), |probe| {
        let answers = |share| probe.measure(&model(2), Look { round: 1, share }).unwrap().episodes;
        let whole = answers(1.0);
        assert_eq!(whole.len(), 3 * 4);
        // Fewer answers to each of the three prompts, then fewer prompts, at least one. What is asked has the same draws.
        let completions = |episodes: &[rollout::Episode]| -> Vec<Vec<u32>> {
            episodes.iter().map(|episode| episode.completion.clone()).collect()
        };
        let of = |places: &[usize]| -> Vec<Vec<u32>> {
            places.iter().map(|&place| whole[place].completion.clone()).collect()
        };
        assert_eq!(completions(&answers(0.5)), of(&[0, 1, 4, 5, 8, 9]));
        assert_eq!(completions(&answers(0.25)), of(&[0, 4, 8]));
        assert_eq!(completions(&answers(0.125)), of(&[0, 4]));
        assert_eq!(completions(&answers(1e-3)), of(&[0]));
        let same = probe.scores(&mut model(1), Look { round: 0, share: 0.125 }).unwrap();
        assert_eq!((same.divergence, same.perplexity_ratio), (0.0, 1.0), "the first model against its own answers");
    });
}

#[test]
fn measurements_do_not_depend_on_the_batch() {
    let of = |batch_size| {
        with_probe(&ProbeOptions { batch_size, ..options() }, |probe| {
            probe.scores(&mut model(2), Look::whole(0)).unwrap()
        })
    };
    assert_eq!(of(1), of(64));
}

#[test]
fn a_frontier_is_found_by_measuring() {
    let vectors = TaskVectors::new(model(1), vec![model(2), model(3)]).unwrap();
    let search =
        SearchOptions { grid: 2, averages: 3, refinements: 0, max_perplexity_ratio: 1e6, ..SearchOptions::default() };
    let mut measured = 0;
    let frontier =
        with_probe(&options(), |probe| Frontier::find(&vectors, probe, &search, |count| measured = count).unwrap());
    // Three averages and four corners of the grid, the better four, two or more of these, and the front once more.
    assert!((14..=28).contains(&measured) && (1..=measured - 13).contains(&frontier.policies.len()), "{measured}");
    assert_eq!(frontier.objectives[1].name, "small");
}

#[test]
fn an_objective_that_applies_to_nothing_is_an_error() {
    let (tokenizer, prompts, options) = (Tokenizer::bytes().unwrap(), prompts(), options());
    let objectives: [&dyn Reward; 2] = [&EVEN, &envs::reward::Silent];
    let failed = Probe::new(model(1), &tokenizer, &prompts, &objectives, &options, (Precision::F32, 4)).err().unwrap();
    assert!(matches!(failed, ProbeError::Silent(name) if name == "silent"));
}

#[test]
fn a_pool_has_what_every_model_says() {
    let (tokenizer, prompts) = (Tokenizer::bytes().unwrap(), prompts());
    let (reference, other) = (model(1), model(2));
    let of = |models: &[&Decoder], proposal, batch_size| {
        let options = PoolOptions { proposal, responses: 4, max_new_tokens: 5, batch_size };
        pool(&reference, models, &tokenizer, &prompts, &options, 3).unwrap()
    };
    let (same, tokens) = of(&[&reference, &reference], Proposal::Reference, 4);
    assert_eq!((same.prompts.len(), same.prompts[0].len()), (3, 4));
    assert!((3 * 4 * 4..=3 * 4 * 8).contains(&tokens));
    assert!(same.prompts.iter().flatten().all(|one| one.log_ratios == [0.0, 0.0] && one.log_importance == 0.0));
    assert!(weights(&same, 1.0, 50, 1).iter().all(|weight| (weight - 0.5).abs() < 1e-12));
    let (mixed, _) = of(&[&reference, &other], Proposal::Models, 4);
    assert_eq!(of(&[&reference, &other], Proposal::Models, 64).0, mixed);
    for one in mixed.prompts.iter().flatten() {
        // q is the mean of the models' probabilities, the first of which is the reference.
        let expected = -(0.5 + 0.5 * one.log_ratios[1].exp()).ln();
        assert!((one.log_importance - expected).abs() < 1e-9);
    }
}
