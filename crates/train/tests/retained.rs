//! A policy gradient that keeps what the reference says at the tokens of some rows.

use data::Example;
use envs::{Answer, Reward, RewardError, Score};
use kernels::Precision;
use model::ModelConfig;
use model::config::Family;
use model::decoder::Decoder;
use model::lora::LoraConfig;
use model::weights::Tensors;
use posttrain_train as train;
use train::methods::policy::{Policy, PolicyOptions};
use train::options::TrainingOptions;
use train::schedule::SchedulerType;
use train::{Fit, Method};

use crate::common::{Lower, examples, on_threads, prompts, tokenizer};

fn options(micro_batch_tokens: usize) -> PolicyOptions {
    PolicyOptions {
        prompts_per_step: 8,
        num_generations: 8,
        num_minibatches: 2,
        sampling: rollout::SamplingOptions { max_new_tokens: 4, ..Default::default() },
        training: TrainingOptions {
            max_steps: Some(12),
            learning_rate: 3e-3,
            lr_scheduler_type: SchedulerType::Constant,
            micro_batch_tokens,
            ..Default::default()
        },
        ..Default::default()
    }
}

fn rows() -> Vec<Example> {
    examples().into_iter().take(13).collect()
}

fn retaining(options: PolicyOptions, reward: Box<dyn Reward>, weight: f64) -> Policy {
    Policy::new(options, prompts(), reward).unwrap().with_retained(rows(), weight).unwrap()
}

/// Trains; returns the weights and the metrics of the last step.
fn fit(mut method: Policy, adapter: bool) -> (Tensors, train::metrics::Metrics) {
    let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 259), 4).unwrap();
    if adapter {
        decoder.attach_lora(&LoraConfig { r: 4, alpha: 8.0, ..Default::default() }, 2).unwrap();
    }
    assert!(method.needs_reference());
    let mut last = None;
    let tokenizer = tokenizer();
    let fit = Fit { decoder: &mut decoder, tokenizer: &tokenizer, seed: 3, stage: 0, precision: Precision::F32 };
    train::fit(&mut method, fit, |_, _, metrics| {
        last = Some(metrics.clone());
        Ok::<_, train::Error>(())
    })
    .unwrap();
    let weights = if adapter { decoder.adapter_tensors() } else { decoder.tensors() };
    (weights, last.unwrap())
}

/// The same for every answer, so that no answer is better than another.
struct Equal;

impl Reward for Equal {
    fn name(&self) -> &str {
        "equal"
    }

    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<Score>>, RewardError> {
        Ok(answers.iter().map(|_| Some(Score::new(1.0, envs::Status::Ok))).collect())
    }
}

#[test]
fn what_is_retained_stays_while_the_reward_is_learnt() {
    for adapter in [false, true] {
        let of = |weight: f64| {
            let (_, metrics) = fit(retaining(options(1 << 12), Box::new(Lower), weight), adapter);
            let number = |name: &str| metrics.get(name).unwrap();
            assert!((number("retain/loss") - weight * number("retain/kl")).abs() < 1e-9);
            (number("retain/kl"), number("reward"))
        };
        // So light that it only measures.
        let (free, learnt) = of(1e-9);
        let (kept, learnt_too) = of(10.0);
        assert!(free > 0.01, "adapter {adapter}: training moves the rows by {free}");
        assert!(kept < 0.2 * free, "adapter {adapter}: {kept} with the term, {free} without");
        assert!(learnt_too > 0.5 * learnt, "adapter {adapter}: reward {learnt_too}, without the term {learnt}");
    }
}

#[test]
fn a_model_that_is_its_reference_and_is_paid_nothing_stays() {
    let (_, metrics) = fit(retaining(options(64), Box::new(Equal), 1.0), true);
    // Rounding is all there is to learn from.
    let divergence = metrics.get("retain/kl").unwrap();
    assert!(divergence.abs() < 1e-9, "{divergence}");
}

#[test]
fn cuts_and_threads_do_not_matter() {
    let weights =
        |tokens, threads| on_threads(threads, || fit(retaining(options(tokens), Box::new(Lower), 0.5), true).0);
    let whole = weights(1 << 12, 1);
    assert!(whole == weights(40, 3));
}

#[test]
fn what_cannot_be_kept_is_refused() {
    let policy = || Policy::new(options(64), prompts(), Box::new(Lower)).unwrap();
    let error = policy().with_retained(Vec::new(), 1.0).err().unwrap().to_string();
    assert!(error.contains("grpo.retained.rows: expected at least one, got 0"), "{error}");
    let error = policy().with_retained(rows(), 0.0).err().unwrap().to_string();
    assert!(error.contains("grpo.retained.weight: expected a number above 0, got 0"), "{error}");
}
