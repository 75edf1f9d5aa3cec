//! Strategies at test time: what is chosen is what the judge, or the vote, chooses; nothing else matters.

use std::sync::Arc;

use data::{Prompt, Source};
use envs::{Answer, Reward, RewardError, Score, Status};
use kernels::Precision;
use model::config::{Family, ModelConfig};
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use posttrain_eval::{Answerer, EvaluateError, Strategy, TestTime, TestTimeOptions, answer_at_test_time};
use rollout::SamplingOptions;

/// Likes the letter `e`, and answers that are mostly letters.
struct Letters;

impl Letters {
    fn value(text: &str) -> f64 {
        let count = |wanted: fn(&char) -> bool| text.chars().filter(wanted).count() as f64;
        (count(|c| *c == 'e') + count(|c| c.is_ascii_lowercase())) / (1.0 + text.chars().count() as f64)
    }
}

impl Reward for Letters {
    fn name(&self) -> &str {
        "letters"
    }

    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |answer: &Answer<'_>| {
            let value = Self::value(answer.completion);
            Some(Score::new(value, if value > 0.3 { Status::Ok } else { Status::Wrong }))
        };
        Ok(answers.iter().map(score).collect())
    }
}

fn run(strategy: Strategy, change: impl FnOnce(&mut TestTimeOptions)) -> Result<TestTime, EvaluateError> {
    let tokenizer = Tokenizer::bytes().unwrap();
    let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, tokenizer.vocab_size()), 3).unwrap();
    decoder.prepare(Precision::F32);
    let prompt = |id: u32| {
        let text = format!("problem {id}: ");
        let ids: Arc<[u32]> = tokenizer.encode(&text).unwrap().into();
        Prompt {
            id,
            ids,
            text,
            messages: None,
            columns: Default::default(),
            source: Source::new("test", u64::from(id)),
        }
    };
    let prompts: Vec<Prompt> = (0..4).map(prompt).collect();
    let mut options = TestTimeOptions {
        strategy,
        sampling: SamplingOptions { max_new_tokens: 12, ..SamplingOptions::default() },
        step_separator: "e".into(),
        max_step_tokens: 4,
        max_steps: 4,
        simulations: 6,
        beams: 2,
        expansions: 3,
        ..TestTimeOptions::default()
    };
    change(&mut options);
    let model = Answerer { decoder: &decoder, tokenizer: &tokenizer, world: None };
    let judge = strategy.needs_judge().then_some(&Letters as &dyn Reward);
    answer_at_test_time(model, &prompts, judge, &Letters, &options, |_, _| ())
}

const ALL: [Strategy; 6] =
    [Strategy::BestOfN, Strategy::Majority, Strategy::WeightedVote, Strategy::Beam, Strategy::StepBeam, Strategy::Mcts];

#[test]
fn the_number_of_completions_at_once_changes_nothing() {
    for strategy in ALL {
        let one = run(strategy, |options| options.batch_size = 1).unwrap();
        assert_eq!(one, run(strategy, |options| options.batch_size = 64).unwrap(), "{strategy:?}");
        assert_eq!(one.evaluation.samples.len(), 4);
        assert!(one.evaluation.samples.iter().all(|sample| sample.length <= 12), "{strategy:?}");
        assert!(one.tokens_per_problem >= one.evaluation.mean_length, "{strategy:?}");
    }
}

#[test]
fn more_samples_please_the_judge_more() {
    let reward = |samples: u32| run(Strategy::BestOfN, |options| options.samples = samples).unwrap();
    let (one, many) = (reward(1), reward(16));
    assert!(many.evaluation.mean_reward > one.evaluation.mean_reward);
    assert_eq!(many.by_samples.iter().map(|(k, _)| *k).collect::<Vec<_>>(), [1, 2, 4, 8, 16]);
    // The judge is the verifier here: its choice is right whenever one of the samples is.
    assert_eq!(many.by_samples[4].1, many.evaluation.accuracy);
    assert!(many.by_samples.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{:?}", many.by_samples);
    // Another seed, other answers.
    assert_ne!(many, run(Strategy::BestOfN, |options| (options.samples, options.seed) = (16, 1)).unwrap());
}

#[test]
fn searches_please_the_judge_more_than_one_sample() {
    let sample = run(Strategy::BestOfN, |options| options.samples = 1).unwrap().evaluation.mean_reward;
    for strategy in [Strategy::StepBeam, Strategy::Mcts] {
        let found = run(strategy, |_| ()).unwrap().evaluation.mean_reward;
        assert!(found > sample, "{strategy:?}: {found}, one sample: {sample}");
    }
}

#[test]
fn what_cannot_be_done_says_why() {
    let message = |result: Result<TestTime, EvaluateError>| result.unwrap_err().to_string();
    assert_eq!(
        message(run(Strategy::Mcts, |options| options.simulations = 0)),
        "simulations is 0, expected 1 to 1048576"
    );
    assert_eq!(
        message(run(Strategy::Beam, |options| options.length_penalty = -1.0)),
        "length_penalty is -1, expected a number from 0 up"
    );
    let stop = message(run(Strategy::StepBeam, |options| options.sampling.stop.push("x".into())));
    assert!(stop.contains("sampling.stop"), "{stop}");
    let tokenizer = Tokenizer::bytes().unwrap();
    let decoder = Decoder::random(ModelConfig::tiny(Family::Llama, tokenizer.vocab_size()), 3).unwrap();
    let model = Answerer { decoder: &decoder, tokenizer: &tokenizer, world: None };
    let none = answer_at_test_time(model, &[], None, &Letters, &TestTimeOptions::default(), |_, _| ());
    assert!(matches!(none, Err(EvaluateError::Empty { .. })));
}
