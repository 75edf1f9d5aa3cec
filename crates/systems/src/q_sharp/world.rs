//! The two worlds of tokens, and what is common to them: prompts whose answer ends in tokens that are known, a reference, and the measurement
//! of guided answers.
//!
//! ```text
//! <bos> 3 8 | 5 9 | 5 3 | 9 1 | / 5 , 8 =   5 3 8 <eos>            star: the path from 5 to 8, edges in random order
//! <bos> 4 + 7 * 8 =   6 ; 0 <eos>                                  chain: 7·8 mod 10, then 4 and that
//! ```
//!
//! **Star.** From a centre go `arms` paths of `nodes - 1` edges over nodes of random names; the path to the end of one of them is asked for. The
//! reference has learned paths to ends that were drawn without looking at the one that is asked for, so that it finds its way and takes the
//! right arm once in `arms` times. Whoever wants to know must look ahead at the first step.
//!
//! **Chain.** The reference has learned solutions in which each of both steps was another digit with probability `noise`, and the second went on
//! from what the first said.

use base::{Purpose, Random};
use data::{Example, Prompt, Source};
use envs::{Answer, Columns, Reward, RewardError, Score, Status};
use kernels::Precision;
use model::config::LayerAttention;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use model::{Family, ModelConfig};
use rollout::{Episode, Generator, Guidance, GuidanceOptions, Request, SamplingOptions, ValueHead, ValueOutputs};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::methods::value_model::valued;

use crate::error::Result;
use crate::words;

const PAD: u32 = 0;
const BOS: u32 = 1;
/// Ends an answer.
pub const EOS: u32 = 2;
const MARKS: [&str; 6] = ["|", "/", "=", "+", "*", ";"];
const BAR: u32 = 3;
const SLASH: u32 = 4;
const EQUALS: u32 = 5;
const PLUS: u32 = 6;
const TIMES: u32 = 7;
const SEMICOLON: u32 = 8;
/// The first number.
const NUMBER: u32 = 9;

/// Draws of measurements are named by steps from here on, apart from those of training.
const MEASUREMENTS: u32 = 1 << 31;
/// Completions computed at the same time.
const SLOTS: usize = 128;

/// The column of a row that holds the tokens its answer ends with.
const ENDING: &str = "ending";

/// Sizes of a star.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StarOptions {
    /// Arms.
    #[schemars(range(min = 2, max = 16))]
    pub arms: usize,
    /// Nodes of a path, the centre among them.
    #[schemars(range(min = 2, max = 16))]
    pub nodes: usize,
    /// Names that nodes may have.
    #[schemars(range(min = 3, max = 1000))]
    pub names: usize,
}

/// A star with a question.
pub struct Star {
    /// The nodes of each arm, the centre left out.
    arms: Vec<Vec<u32>>,
    centre: u32,
    /// The arm that is asked for.
    goal: usize,
    /// Its edges, in the order in which they are told.
    edges: Vec<(u32, u32)>,
}

impl Star {
    /// A star; `random` names its draws.
    pub fn new(options: StarOptions, random: Random) -> Self {
        let names = random.sample(0).permutation(options.names);
        let mut names = names.into_iter().map(|name| NUMBER + name as u32);
        let centre = names.next().unwrap_or(NUMBER);
        let arms: Vec<Vec<u32>> = (0..options.arms).map(|_| names.by_ref().take(options.nodes - 1).collect()).collect();
        let edges: Vec<(u32, u32)> =
            arms.iter().flat_map(|arm| std::iter::once(&centre).chain(arm).copied().zip(arm.iter().copied())).collect();
        let order = random.sample(1).permutation(edges.len());
        let goal = random.sample(2).at(0).below(options.arms as u64) as usize;
        Self { centre, goal, edges: order.into_iter().map(|edge| edges[edge]).collect(), arms }
    }

    fn prompt(&self) -> Vec<u32> {
        let edges = self.edges.iter().flat_map(|&(from, to)| [from, to, BAR]);
        let end = self.arms[self.goal].last().copied().unwrap_or(self.centre);
        std::iter::once(BOS).chain(edges).chain([SLASH, self.centre, end, EQUALS]).collect()
    }

    /// The path along an arm, and the end of the answer.
    fn path(&self, arm: usize) -> Vec<u32> {
        std::iter::once(self.centre).chain(self.arms[arm].iter().copied()).chain([EOS]).collect()
    }
}

/// Paths that are learned from: each along an arm that is drawn without looking at the goal.
pub fn star_corpus(options: StarOptions, seed: u64, size: u32) -> Vec<Example> {
    let random = Random::new(seed, Purpose::Task);
    let row = |row: u32| {
        let random = random.prompt(row);
        let star = Star::new(options, random);
        let arm = random.sample(3).at(0).below(options.arms as u64) as usize;
        example("paths", row, &star.prompt(), &star.path(arm))
    };
    (0..size).map(row).collect()
}

/// Stars with questions; different rounds have different ones.
pub fn star_prompts(options: StarOptions, tokenizer: &Tokenizer, (seed, round): (u64, u32), count: u32) -> Vec<Prompt> {
    let random = Random::new(seed, Purpose::Task).step(10 + round);
    let one = |id: u32| {
        let star = Star::new(options, random.prompt(id));
        prompt(tokenizer, id, star.prompt(), &star.path(star.goal))
    };
    (0..count).map(one).collect()
}

/// A sum to which a product is added.
#[derive(Clone, Copy)]
struct Chain {
    digits: [u32; 3],
    modulus: u32,
}

impl Chain {
    /// All of a modulus: those to train on, and a fifth that is held out.
    fn all(modulus: u32) -> [Vec<Self>; 2] {
        let count = modulus.pow(3) as usize;
        let digits = |number: u32| [number / modulus.pow(2), number / modulus % modulus, number % modulus];
        // The split belongs to the world and not to a run.
        let order = Random::new(0, Purpose::Task).step(1).permutation(count);
        let mut all: Vec<Self> =
            order.into_iter().map(|number| Self { digits: digits(number as u32), modulus }).collect();
        let held_out = all.split_off(count - count / 5);
        [all, held_out]
    }

    fn prompt(self) -> Vec<u32> {
        let [a, b, c] = self.digits.map(|digit| NUMBER + digit);
        vec![BOS, a, PLUS, b, TIMES, c, EQUALS]
    }

    fn product(self) -> u32 {
        self.digits[1] * self.digits[2] % self.modulus
    }

    /// The sum, where the product is said to be this.
    fn sum(self, product: u32) -> u32 {
        (self.digits[0] + product) % self.modulus
    }

    fn solution(product: u32, sum: u32) -> Vec<u32> {
        vec![NUMBER + product, SEMICOLON, NUMBER + sum, EOS]
    }
}

/// Solutions that are learned from, each step another digit with probability `noise`.
pub fn chain_corpus((modulus, noise): (u32, f64), seed: u64, size: u32) -> Vec<Example> {
    let [chains, _] = Chain::all(modulus);
    let random = Random::new(seed, Purpose::Task).step(3);
    let row = |row: u32| {
        let random = random.prompt(row);
        let chain = chains[random.at(0).below(chains.len() as u64) as usize];
        let said = |digit: u32, position: u32| match random.at(position).uniform() < noise {
            true => (digit + 1 + random.at(position + 1).below(u64::from(modulus) - 1) as u32) % modulus,
            false => digit,
        };
        let product = said(chain.product(), 1);
        example("solutions", row, &chain.prompt(), &Chain::solution(product, said(chain.sum(product), 3)))
    };
    (0..size).map(row).collect()
}

/// The problems to train on, or those that are held out.
pub fn chain_prompts(tokenizer: &Tokenizer, modulus: u32, held_out: bool) -> Vec<Prompt> {
    let one = |(id, chain): (u32, Chain)| {
        // Anything may come before the right sum, as it is the answer.
        prompt(tokenizer, id, chain.prompt(), &Chain::solution(0, chain.sum(chain.product()))[2..])
    };
    let [train, test] = Chain::all(modulus);
    (0..).zip(if held_out { test } else { train }).map(one).collect()
}

fn example(name: &str, row: u32, prompt: &[u32], answer: &[u32]) -> Example {
    let ids = [prompt, answer].concat();
    let loss_mask = (0..ids.len()).map(|index| index >= prompt.len()).collect();
    Example { ids, loss_mask, source: Source::new(name, u64::from(row) + 1) }
}

fn prompt(tokenizer: &Tokenizer, id: u32, ids: Vec<u32>, ending: &[u32]) -> Prompt {
    Prompt {
        id,
        text: tokenizer.decode(&ids),
        ids: ids.into(),
        messages: None,
        columns: Columns::from_iter([(ENDING.to_owned(), ending.into())]),
        source: Source::new("q-sharp", u64::from(id) + 1),
    }
}

/// Whether an answer is right: it ends as its row says.
pub fn is_right(prompt: &Prompt, answer: &[u32]) -> bool {
    ending(&prompt.columns).is_some_and(|ending| answer.ends_with(&ending))
}

fn ending(columns: &Columns) -> Option<Vec<u32>> {
    let ids = columns.get(ENDING)?.as_array()?;
    ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

/// Pays 1 for a right answer.
pub struct Right;

impl Reward for Right {
    fn name(&self) -> &str {
        "right"
    }

    fn score(&self, answers: &[Answer]) -> Result<Vec<Option<Score>>, RewardError> {
        let score = |(row, answer): (usize, &Answer<'_>)| {
            let missing = || RewardError::MissingColumn { reward: "right".into(), row, column: ENDING.into() };
            let right = answer.completion_ids.ends_with(&ending(answer.columns).ok_or_else(missing)?);
            let status = if right { Status::Ok } else { Status::Wrong };
            Ok(Some(Score::new(f64::from(u8::from(right)), status)))
        };
        answers.iter().enumerate().map(score).collect()
    }
}

/// The tokens of both worlds as words, with numbers below `numbers`.
///
/// # Errors
/// None, in fact: the words differ.
pub fn tokenizer(numbers: usize) -> Result<Tokenizer> {
    let special = ["<pad>", "<bos>", "<eos>"].into_iter().chain(MARKS).map(String::from);
    words::tokenizer(&special.chain((0..numbers).map(|number| number.to_string())).collect::<Vec<_>>(), BOS, EOS, PAD)
}

/// The shape of a model for this tokenizer.
pub fn model(tokenizer: &Tokenizer, width: usize, layers: usize) -> ModelConfig {
    let tiny = ModelConfig::tiny(Family::Llama, tokenizer.vocab_size());
    ModelConfig {
        hidden_size: width,
        intermediate_size: 2 * width + width / 4,
        layers: vec![LayerAttention { window: None, rope: 0 }; layers],
        bos_token_id: Some(BOS),
        eos_token_ids: vec![EOS],
        pad_token_id: Some(PAD),
        ..tiny
    }
}

/// Answers to some prompts: the first `size` to the first prompt, and so on.
pub struct Answers<'a> {
    /// The prompts.
    pub prompts: &'a [Prompt],
    /// Answers to each.
    pub size: usize,
    /// The answers.
    pub episodes: Vec<Episode>,
}

/// A value model that guides, what its outputs say, and how it guides.
#[derive(Clone, Copy)]
pub struct Guide<'a> {
    /// The value model, prepared.
    pub value: &'a Decoder,
    /// What its outputs are.
    pub outputs: ValueOutputs,
    /// How it guides.
    pub options: &'a GuidanceOptions,
}

/// Samples `size` answers to each prompt at each price of divergence with one generation; without a guide, once. `round` tells samples of
/// one seed apart.
///
/// # Errors
/// Those of generation.
pub fn answers<'a>(
    reference: &Decoder,
    guide: Option<(Guide<'_>, &[f64])>,
    tokenizer: &Tokenizer,
    prompts: &'a [Prompt],
    size: usize,
    (seed, round): (u64, u32),
) -> Result<Vec<Answers<'a>>> {
    let options = sampling();
    let etas = guide.map_or(&[f64::INFINITY][..], |(_, etas)| etas);
    let eta = |request: &Request| etas[request.sample as usize / size];
    let hook = match guide {
        Some((Guide { value, outputs, options: how }, _)) => {
            Some(Guidance::new(value, outputs, how, &options)?.with_eta(&eta))
        }
        None => None,
    };
    let random = Random::new(seed, Purpose::Sampling).step(MEASUREMENTS + round);
    let generator = Generator { hook: hook.as_ref().map(|hook| hook as _), ..Generator::new(&options, SLOTS, random) };
    let count = (etas.len() * size) as u32;
    let requests: Vec<Request> =
        prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, count)).collect();
    let episodes = generator.generate(reference, tokenizer, &requests, |_| {})?;
    let of_eta = |number: usize| {
        let own = episodes.chunks(etas.len() * size).flat_map(|all| &all[number * size..][..size]);
        Answers { prompts, size, episodes: own.cloned().collect() }
    };
    Ok((0..etas.len()).map(of_eta).collect())
}

/// How everybody samples.
pub fn sampling() -> SamplingOptions {
    SamplingOptions { max_new_tokens: 8, ..SamplingOptions::default() }
}

impl Answers<'_> {
    /// Whether each answer is right.
    pub fn right(&self) -> Vec<bool> {
        let prompts = self.prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, self.size));
        prompts.zip(&self.episodes).map(|(prompt, episode)| is_right(prompt, &episode.completion)).collect()
    }

    /// The share of right answers.
    pub fn accuracy(&self) -> f64 {
        let right = self.right();
        right.iter().filter(|right| **right).count() as f64 / right.len() as f64
    }

    /// The divergence of the guided answers from the reference, in nats an answer: the mean of `log π - log π_ref` over what was drawn.
    pub fn divergence(&self) -> f64 {
        let of = |episode: &Episode| {
            let tokens = episode.filtered_log_probs.iter().zip(&episode.log_probs);
            tokens.map(|(guided, own)| f64::from(guided - own)).sum::<f64>()
        };
        self.episodes.iter().map(of).sum::<f64>() / self.episodes.len() as f64
    }

    /// The share of prompts whose most frequent answer among the first `k` is right; what comes before the end does not count.
    pub fn majority(&self, k: usize) -> f64 {
        let right = self.right();
        let won = self.episodes.chunks(self.size).zip(right.chunks(self.size)).filter(|(episodes, right)| {
            let said = |episode: &Episode| episode.completion.iter().rev().take(2).copied().collect::<Vec<u32>>();
            let said: Vec<Option<Vec<u32>>> = episodes.iter().map(|episode| Some(said(episode))).collect();
            eval::metrics::majority(&said, k).is_some_and(|winner| right[winner])
        });
        won.count() as f64 / self.prompts.len() as f64
    }

    /// The accuracy of the best of `k` answers by what a value model says of them at their ends.
    ///
    /// # Errors
    /// A model that refuses the answers.
    pub fn verified(&self, value: &Decoder, head: ValueHead, k: usize) -> Result<f64> {
        let whole: Vec<Vec<u32>> =
            self.episodes.iter().map(|episode| [&episode.prompt[..], &episode.completion].concat()).collect();
        let last = whole.iter().map(|ids| (&ids[..], ids.len() - 1..ids.len()));
        let batch = valued(last, head, 1);
        let scores = batch.scores(value, &mut model::decoder::Workspace::new(), 4096)?;
        let scores: Vec<f64> = scores.into_iter().map(f64::from).collect();
        let right: Vec<f64> = self.right().into_iter().map(|right| f64::from(u8::from(right))).collect();
        let best = scores.chunks(self.size).zip(right.chunks(self.size));
        let best: Vec<f64> = best.filter_map(|(scores, right)| eval::metrics::best_of_n(scores, right, k)).collect();
        Ok(eval::metrics::mean(&best))
    }

    /// Pairs of a right and a wrong answer to the same prompt, as many of each as there are of the rarer kind.
    pub fn pairs(&self) -> Vec<data::PreferencePair> {
        let right = self.right();
        let mut pairs = Vec::new();
        for (group, right) in self.episodes.chunks(self.size).zip(right.chunks(self.size)) {
            let of = |wanted: bool| group.iter().zip(right).filter(move |(_, right)| **right == wanted);
            for ((chosen, _), (rejected, _)) in of(true).zip(of(false)) {
                let example = |episode: &Episode| example("pairs", 0, &episode.prompt, &episode.completion);
                pairs.push(data::PreferencePair::new(example(chosen), example(rejected)));
            }
        }
        pairs
    }

    /// Tokens that were sampled.
    pub fn tokens(&self) -> usize {
        self.episodes.iter().map(|episode| episode.completion.len()).sum()
    }
}

/// A model of a world that has learned these examples.
///
/// # Errors
/// Those of training.
pub fn imitation(
    trial: &crate::experiment::Trial<'_>,
    config: ModelConfig,
    tokenizer: &Tokenizer,
    sft: train::methods::sft::SftOptions,
    corpus: Vec<Example>,
) -> Result<Decoder> {
    let mut decoder = Decoder::random(config, trial.seed)?;
    let mut sft = train::methods::sft::Sft::new(sft, corpus)?;
    trial.fit(0, &mut sft, &mut decoder, tokenizer, |_, _, _| Ok(()))?;
    decoder.prepare(Precision::F32);
    Ok(decoder)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    const STAR: StarOptions = StarOptions { arms: 3, nodes: 4, names: 12 };

    #[test]
    fn paths_follow_edges_from_the_centre_to_the_goal() {
        let tokenizer = tokenizer(STAR.names).unwrap();
        for id in 0..20 {
            let star = Star::new(STAR, Random::new(1, Purpose::Task).prompt(id));
            assert_eq!(star.edges.len(), 9);
            let path = star.path(star.goal);
            assert_eq!(path.len(), 5);
            assert!(path[..4].windows(2).all(|pair| star.edges.contains(&(pair[0], pair[1]))));
            let ids = star.prompt();
            assert_eq!(ids[ids.len() - 4..], [SLASH, path[0], path[3], EQUALS]);
            let mut names: Vec<u32> = star.arms.iter().flatten().copied().chain([star.centre]).collect();
            names.sort_unstable();
            assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "no name twice");
        }
        let prompts = star_prompts(STAR, &tokenizer, (3, 0), 2);
        assert!(prompts[0].text.ends_with('=') && prompts[0].text.contains(" | "), "{}", prompts[0].text);
        assert_ne!(prompts[0].ids, star_prompts(STAR, &tokenizer, (3, 1), 1)[0].ids, "another round");
    }

    #[test]
    fn the_corpus_knows_nothing_of_goals() {
        let corpus = star_corpus(STAR, 1, 3000);
        let right = corpus.iter().filter(|row| row.ids[row.ids.len() - 2] == row.ids[row.ids.len() - 7]);
        let share = right.count() as f64 / 3000.0;
        assert!((share - 1.0 / 3.0).abs() < 0.03, "{share}");
    }

    #[test]
    fn chains_are_sums_of_products() {
        let tokenizer = tokenizer(10).unwrap();
        let (train, test) = (chain_prompts(&tokenizer, 10, false), chain_prompts(&tokenizer, 10, true));
        assert_eq!((train.len(), test.len()), (800, 200));
        assert!(train.iter().all(|one| test.iter().all(|other| one.ids != other.ids)));
        let chain = Chain { digits: [4, 7, 8], modulus: 10 };
        assert_eq!((chain.product(), chain.sum(6), chain.sum(9)), (6, 0, 3));
        assert_eq!(tokenizer.decode(&chain.prompt()), "4 + 7 * 8 =");
        assert_eq!(tokenizer.decode(&Chain::solution(6, 0)), "6 ; 0");
        let prompt = prompt(&tokenizer, 0, chain.prompt(), &Chain::solution(0, 0)[2..]);
        assert!(is_right(&prompt, &Chain::solution(3, 0)) && !is_right(&prompt, &Chain::solution(6, 1)));
        assert!(!is_right(&prompt, &Chain::solution(6, 0)[..3]), "an answer has an end");
    }

    #[test]
    fn the_corpus_is_as_noisy_as_it_is_said_to_be() {
        let corpus = chain_corpus((10, 0.3), 2, 4000);
        let wrong = |row: &&Example| {
            let [.., _, _, b, _, c, _, product, _, _, _] = row.ids[..] else { return true };
            (b - NUMBER) * (c - NUMBER) % 10 != product - NUMBER
        };
        let share = corpus.iter().filter(wrong).count() as f64 / 4000.0;
        assert!((share - 0.3).abs() < 0.03, "{share}");
    }
}
