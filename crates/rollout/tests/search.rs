//! Searches against enumeration: a toy whose best path is known, a model's most probable completion, a bandit.

use std::convert::Infallible;
use std::sync::Arc;

use base::{Purpose, Random};
use kernels::Precision;
use model::config::{Family, ModelConfig};
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use posttrain_rollout::search::{
    BeamOptions, Expansion, Judge, LengthNormalized, MctsOptions, Path, Proposer, Step, StepSampler, TokenProposer,
    beam, mcts,
};
use posttrain_rollout::{Error, SamplingOptions};

/// Digits 0, 1, 2; a path ends after `depth` of them.
struct Digits {
    depth: usize,
}

impl Proposer<Infallible> for Digits {
    fn propose(&self, expansions: &[Expansion<'_>]) -> Result<Vec<Vec<Step>>, Infallible> {
        let steps = |expansion: &Expansion<'_>| {
            let last = expansion.path.steps.len() + 1 == self.depth;
            (0..3).take(expansion.count).map(|digit| Step { tokens: vec![digit], log_prob: -1.0, last }).collect()
        };
        Ok(expansions.iter().map(steps).collect())
    }
}

/// What a path is worth: random numbers by problem and digits, or by what can still come of it.
struct Worth {
    depth: usize,
    perfect: bool,
}

impl Worth {
    fn of(&self, problem: usize, digits: &[u32]) -> f64 {
        let code = digits.iter().fold(1u32, |code, digit| 3 * code + digit);
        Random::new(5, Purpose::Test).prompt(problem as u32).at(code).uniform()
    }

    /// The best finished path that begins so, by enumeration.
    fn best(&self, problem: usize, digits: &[u32]) -> (f64, Vec<u32>) {
        if digits.len() == self.depth {
            return (self.of(problem, digits), digits.to_vec());
        }
        let next = (0..3).map(|digit| self.best(problem, &[digits, &[digit]].concat()));
        next.reduce(|best, other| if other.0 > best.0 { other } else { best }).unwrap()
    }
}

impl Judge<Infallible> for Worth {
    fn judge(&self, paths: &[(usize, &Path)]) -> Result<Vec<f64>, Infallible> {
        let value = |(problem, path): &(usize, &Path)| match self.perfect {
            true => self.best(*problem, &path.tokens()).0,
            false => self.of(*problem, &path.tokens()),
        };
        Ok(paths.iter().map(value).collect())
    }
}

const PROBLEMS: usize = 6;
const DEPTH: usize = 4;

#[test]
fn a_beam_that_keeps_everything_finds_the_best_path_and_so_does_one_with_a_perfect_judge() {
    for (beams, perfect) in [(81, false), (1, true)] {
        let judge = Worth { depth: DEPTH, perfect };
        let options = BeamOptions { beams, expansions: 3, max_steps: DEPTH };
        let found = beam(PROBLEMS, options, &Digits { depth: DEPTH }, &judge).unwrap();
        for (problem, found) in found.iter().enumerate() {
            let (value, digits) = judge.best(problem, &[]);
            assert_eq!((found[0].value, found[0].path.tokens()), (value, digits), "problem {problem}, {beams} beams");
            assert!(found.windows(2).all(|pair| pair[0].value >= pair[1].value));
        }
    }
}

#[test]
fn problems_side_by_side_are_as_problems_alone_and_an_early_end_keeps_its_place() {
    let judge = Worth { depth: DEPTH, perfect: false };
    let options = BeamOptions { beams: 2, expansions: 3, max_steps: DEPTH };
    let all = beam(PROBLEMS, options, &Digits { depth: DEPTH }, &judge).unwrap();
    assert_eq!(all[..2], beam(2, options, &Digits { depth: DEPTH }, &judge).unwrap());
    // Paths that end at once: nothing is left to grow.
    let short = beam(1, options, &Digits { depth: 1 }, &judge).unwrap();
    assert_eq!(short[0].len(), 2);
    assert!(short[0].iter().all(|found| found.path.is_finished() && found.path.steps.len() == 1));
    // Depth runs out: the paths are unfinished and say so.
    let cut = beam(1, BeamOptions { max_steps: 2, ..options }, &Digits { depth: DEPTH }, &judge).unwrap();
    assert!(cut[0].iter().all(|found| !found.path.is_finished() && found.path.steps.len() == 2));
}

/// Pays for every digit, from the first, that is as it should be: 1 for a path that is right throughout.
struct Digit {
    depth: usize,
}

impl Digit {
    fn wanted(&self, problem: usize) -> Vec<u32> {
        let random = Random::new(6, Purpose::Test).prompt(problem as u32);
        (0..self.depth).map(|place| random.at(place as u32).below(3) as u32).collect()
    }
}

impl Judge<Infallible> for Digit {
    fn judge(&self, paths: &[(usize, &Path)]) -> Result<Vec<f64>, Infallible> {
        let value = |(problem, path): &(usize, &Path)| {
            let right =
                path.tokens().iter().zip(self.wanted(*problem)).take_while(|(got, wanted)| *got == wanted).count();
            right as f64 / self.depth as f64
        };
        Ok(paths.iter().map(value).collect())
    }
}

#[test]
fn a_tree_finds_the_best_path_when_it_has_seen_enough() {
    let judge = Digit { depth: DEPTH };
    let options = MctsOptions { simulations: 60, expansions: 3, exploration: 0.2, max_steps: DEPTH };
    let trees = mcts(PROBLEMS, options, &Digits { depth: DEPTH }, &judge).unwrap();
    for (problem, tree) in trees.iter().enumerate() {
        assert_eq!(tree.first_visits.iter().sum::<u32>(), 60, "every simulation goes through a first step");
        assert_eq!((tree.best.value, tree.best.path.tokens()), (1.0, judge.wanted(problem)), "problem {problem}");
    }
    let alone = mcts(1, options, &Digits { depth: DEPTH }, &judge).unwrap();
    assert_eq!(alone[0], trees[0], "the other problems do not matter");

    // With values of leaves alone and time to see every leaf, the largest is among those met.
    struct Leaves(Worth);
    impl Judge<Infallible> for Leaves {
        fn judge(&self, paths: &[(usize, &Path)]) -> Result<Vec<f64>, Infallible> {
            let value = |(problem, path): &(usize, &Path)| match path.is_finished() {
                true => self.0.of(*problem, &path.tokens()),
                false => 0.0,
            };
            Ok(paths.iter().map(value).collect())
        }
    }
    let leaves = Leaves(Worth { depth: 2, perfect: false });
    let options = MctsOptions { simulations: 400, expansions: 3, exploration: 2.0, max_steps: 2 };
    let tree = &mcts(1, options, &Digits { depth: 2 }, &leaves).unwrap()[0];
    let largest = tree.finished.iter().map(|found| found.value).fold(0.0, f64::max);
    assert_eq!((tree.finished.len(), largest), (9, leaves.0.best(0, &[]).0));
}

/// Two arms, of values 0.3 and 0.7: the better one gets almost all visits.
#[test]
fn a_bandit_converges() {
    struct Arms;
    impl Judge<Infallible> for Arms {
        fn judge(&self, paths: &[(usize, &Path)]) -> Result<Vec<f64>, Infallible> {
            Ok(paths.iter().map(|(_, path)| if path.tokens() == [1] { 0.7 } else { 0.3 }).collect())
        }
    }
    let options = MctsOptions { simulations: 500, expansions: 2, exploration: 1.0, max_steps: 1 };
    let tree = &mcts(1, options, &Digits { depth: 1 }, &Arms).unwrap()[0];
    assert_eq!(tree.best.path.tokens(), [1]);
    assert_eq!(tree.first_visits.iter().sum::<u32>(), 500);
    assert!(tree.first_visits[1] > 400, "{:?}", tree.first_visits);
}

fn tiny() -> (Decoder, Tokenizer) {
    let tokenizer = Tokenizer::bytes().unwrap();
    let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, tokenizer.vocab_size()), 3).unwrap();
    // Weights of a size that makes some tokens likely.
    for index in 0..decoder.parameters().len() {
        if decoder.parameters()[index].shape.len() > 1 {
            decoder.parameter_mut(index).iter_mut().for_each(|value| *value *= 8.0);
        }
    }
    decoder.prepare(Precision::F32);
    (decoder, tokenizer)
}

#[test]
fn one_beam_of_tokens_is_greedy_and_a_full_beam_is_the_most_probable_completion() {
    let (decoder, tokenizer) = tiny();
    let prompt: Arc<[u32]> = vec![10, 20, 30].into();
    let vocabulary = decoder.config().vocab_size;
    let length = 2;
    let tokens = TokenProposer::new((&decoder, &tokenizer), vec![(0, Arc::clone(&prompt))], length, 64);
    let judge = LengthNormalized { alpha: 0.0 };
    let search = |beams: usize| {
        let options = BeamOptions { beams, expansions: vocabulary, max_steps: length };
        beam::<Error>(1, options, &tokens, &judge).unwrap().remove(0).remove(0)
    };
    let greedy =
        posttrain_rollout::Generator::new(&SamplingOptions::greedy(length), 1, Random::new(0, Purpose::Sampling))
            .generate(
                &decoder,
                &tokenizer,
                &posttrain_rollout::Request::samples(0, &prompt, 1).collect::<Vec<_>>(),
                |_| (),
            )
            .unwrap();
    assert_eq!(search(1).path.tokens(), greedy[0].completion);

    // By enumeration: every first token, and the best second one after each.
    let best = (0..vocabulary as u32).map(|first| {
        let (mut packed, mut workspace) = (model::decoder::PackedTokens::new(), model::decoder::Workspace::new());
        packed.push(&[10, 20, 30, first], None).unwrap();
        decoder.forward(&packed, &mut workspace, false).unwrap();
        let of = |workspace: &mut model::decoder::Workspace, row, token| {
            let target = [model::decoder::Target { row, token }];
            f64::from(decoder.log_probs(workspace, &target, 1.0, false).unwrap().log_prob[0])
        };
        let one = of(&mut workspace, 2, first);
        if decoder.config().eos_token_ids.contains(&first) || tokenizer.eos() == Some(first) {
            return one;
        }
        let second = (0..vocabulary as u32).map(|token| of(&mut workspace, 3, token)).fold(f64::MIN, f64::max);
        one + second
    });
    let best = best.fold(f64::MIN, f64::max);
    let found = search(vocabulary);
    assert!((found.value - best).abs() < 1e-6, "{} {best}", found.value);
}

#[test]
fn sampled_steps_end_at_the_separator_and_do_not_depend_on_the_batch() {
    let (decoder, tokenizer) = tiny();
    let prompts: Vec<(u32, Arc<[u32]>)> = (0..3).map(|id| (id, vec![40 + id, 50, 60].into())).collect();
    let options = SamplingOptions { max_new_tokens: 40, ..SamplingOptions::default() };
    let run = |batch: usize, count: usize| {
        let random = Random::new(9, Purpose::Sampling);
        let sampler =
            StepSampler::new((&decoder, &tokenizer), prompts[..count].to_vec(), &options, ("a", 12), batch, random);
        let judge = LengthNormalized { alpha: 1.0 };
        beam::<Error>(count, BeamOptions { beams: 2, expansions: 3, max_steps: 8 }, &sampler, &judge).unwrap()
    };
    let found = run(16, 3);
    assert_eq!(found[..2], run(1, 2), "batch and company do not matter");
    for found in found.iter().flatten() {
        let path = &found.path;
        assert!(path.tokens().len() <= 40);
        for step in &path.steps {
            let separator = step.tokens.last() == Some(&u32::from(b'a'));
            assert!(step.last || separator || step.tokens.len() == 12, "{step:?}");
        }
    }
}
