//! Evaluations: the counting, and a tiny random model end to end.

use std::sync::Arc;

use data::{Prompt, Source};
use envs::{Answer, Columns, Reward, RewardError, Score, Status};
use kernels::Precision;
use model::config::{Family, ModelConfig};
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use posttrain_eval::evaluate::summarise;
use posttrain_eval::interval::wilson;
use posttrain_eval::{EvaluateError, EvaluateOptions, Sample, evaluate};
use rollout::SamplingOptions;

fn sample(prompt_id: u32, sample: u32, score: Option<Score>) -> Sample {
    Sample { prompt_id, sample, text: String::new(), length: 4 + sample as usize, score }
}

fn verdict(status: Status) -> Option<Score> {
    Some(Score::verdict(status))
}

#[test]
fn one_sample_a_prompt() {
    let statuses = [Status::Ok, Status::Wrong, Status::Ok, Status::Timeout];
    let mut samples: Vec<Sample> = (0..4).map(|id| sample(id, 0, verdict(statuses[id as usize]))).collect();
    samples.push(sample(4, 0, None));
    let evaluation = summarise(samples, 1, 0);
    assert_eq!((evaluation.accuracy, evaluation.mean_reward), (0.5, 0.5));
    assert_eq!(evaluation.interval, wilson(2, 4));
    assert_eq!(evaluation.correct, [1, 0, 1, 0, 0]);
    assert_eq!(evaluation.shares(), [Some(1.0), Some(0.0), Some(1.0), Some(0.0), None]);
    assert_eq!(evaluation.not_applicable, 1);
    assert_eq!(evaluation.pass_at_k, [(1, 0.5, evaluation.interval)]);
    let counts: Vec<usize> = evaluation.statuses.iter().map(|(_, count)| *count).collect();
    assert_eq!(counts, [2, 1, 0, 1, 0]);
    let text = serde_json::to_string(&evaluation).unwrap();
    assert_eq!(serde_json::from_str::<posttrain_eval::Evaluation>(&text).unwrap(), evaluation);
}

#[test]
fn several_samples_a_prompt() {
    let right = |id: u32, number: u32| id == 0 || (id == 1 && number == 2);
    let samples = (0..3).flat_map(|id| {
        (0..4).map(move |number| {
            sample(id, number, verdict(if right(id, number) { Status::Ok } else { Status::Malformed }))
        })
    });
    let evaluation = summarise(samples.collect(), 4, 0);
    assert_eq!(evaluation.correct, [4, 1, 0]);
    assert!((evaluation.accuracy - 1.25 / 3.0).abs() < 1e-12);
    assert!((evaluation.mean_length - 5.5).abs() < 1e-12);
    // pass@2 of one right among four is 1 - C(3, 2) / C(4, 2) = 1/2.
    let expected = [(1, 1.25 / 3.0), (2, 1.5 / 3.0), (4, 2.0 / 3.0)];
    for ((k, found, interval), (expected_k, value)) in evaluation.pass_at_k.iter().zip(expected) {
        assert_eq!(*k, expected_k);
        assert!((found - value).abs() < 1e-12, "pass@{k}: {found}");
        // Of three prompts, all may be the one that is never solved, or the one that always is.
        assert_eq!((interval.low, interval.high), (0.0, 1.0), "pass@{k}");
    }
    assert!(evaluation.interval.contains(evaluation.accuracy));
    assert_eq!(evaluation.shares(), [Some(1.0), Some(0.25), Some(0.0)]);
}

/// Right where the completion's first token is even; tells the row it was given.
struct FirstToken;

impl Reward for FirstToken {
    fn name(&self) -> &str {
        "first_token"
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let judge = |answer: &Answer| {
            // Each completion must come with its own prompt's row.
            assert_eq!(answer.columns["text"], answer.prompt_text);
            Some(Score::verdict(if answer.completion_ids[0].is_multiple_of(2) { Status::Ok } else { Status::Wrong }))
        };
        Ok(answers.iter().map(judge).collect())
    }
}

fn prompts(tokenizer: &Tokenizer) -> Vec<Prompt> {
    (0..12u32)
        .map(|id| {
            let text = format!("{id} and {}", id * 7);
            let ids: Arc<[u32]> = tokenizer.encode(&text).unwrap().into();
            let columns = Columns::from_iter([("text".to_owned(), text.as_str().into())]);
            Prompt { id, ids, text, messages: None, columns, source: Source::new("test", u64::from(id) + 1) }
        })
        .collect()
}

#[test]
fn an_evaluation_does_not_depend_on_the_batch() {
    let tokenizer = Tokenizer::bytes().unwrap();
    let config = ModelConfig::tiny(Family::Llama, tokenizer.vocab_size());
    let mut decoder = Decoder::random(config, 1).unwrap();
    decoder.prepare(Precision::F32);
    let prompts = prompts(&tokenizer);
    let sampling = SamplingOptions { max_new_tokens: 5, ..Default::default() };
    let run = |batch_size, seed| {
        let options = EvaluateOptions { sampling: sampling.clone(), samples: 3, batch_size, seed };
        let mut last = (0, 0);
        let evaluation =
            evaluate(&decoder, &tokenizer, &prompts, &FirstToken, &options, |done, all| last = (done, all)).unwrap();
        assert_eq!(last, (36, 36));
        evaluation
    };
    let evaluation = run(1, 0);
    assert_eq!(evaluation, run(16, 0));
    assert_ne!(evaluation.samples, run(16, 1).samples);
    assert_eq!(evaluation.samples.len(), 36);
    assert_eq!(evaluation.correct.len(), 12);
    assert!(evaluation.correct.iter().any(|right| *right > 0));
    let ids: Vec<_> = evaluation.samples.iter().map(|sample| (sample.prompt_id, sample.sample)).collect();
    assert_eq!(ids[..4], [(0, 0), (0, 1), (0, 2), (1, 0)]);

    let none = evaluate(&decoder, &tokenizer, &[], &FirstToken, &EvaluateOptions::default(), |_, _| {});
    assert!(matches!(none, Err(EvaluateError::Empty { prompts: 0, samples: 1 })));
}
