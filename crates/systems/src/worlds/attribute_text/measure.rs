//! What a model's answers are like: sampled answers, exact divergence, win rate.

use base::{Purpose, Random};
use data::Prompt;
use kernels::{Precision, log_softmax_row};
use model::decoder::{Decoder, PackedTokens, Target, Workspace};
use model::tokenizer::Tokenizer;
use rollout::{Episode, Generator, LogitsHook, Request, SamplingOptions};

use super::{LONGEST, Question, Utility};
use crate::error::Result;

/// Draws of measurements are named by steps from here on, apart from those of training.
const MEASUREMENTS: u32 = 1 << 31;

/// The answers of a model to some questions: the first `size` to the first question, and so on.
pub struct Sampled {
    /// The questions.
    pub questions: Vec<Question>,
    /// Answers to each.
    pub size: usize,
    /// The answers.
    pub episodes: Vec<Episode>,
}

impl Sampled {
    /// Every answer with its question.
    pub fn answers(&self) -> impl Iterator<Item = (Question, &[u32])> {
        let question = move |index: usize| self.questions[index / self.size];
        self.episodes.iter().enumerate().map(move |(index, episode)| (question(index), &episode.completion[..]))
    }

    /// The mean over all answers of some number.
    pub fn mean(&self, of: impl Fn(Question, &[u32]) -> f64) -> f64 {
        let values: Vec<f64> = self.answers().map(|(question, answer)| of(question, answer)).collect();
        eval::metrics::mean(&values)
    }
}

/// Samples `size` answers to each question at temperature 1. `round` tells samples of one seed apart.
///
/// # Errors
/// Those of generation.
pub fn sample(
    decoder: &mut Decoder,
    tokenizer: &Tokenizer,
    questions: &[Question],
    size: usize,
    (seed, round): (u64, u32),
) -> Result<Sampled> {
    decoder.prepare(Precision::F32);
    sample_with(None, decoder, tokenizer, questions, size, (seed, round))
}

/// How answers are sampled: at temperature 1.
pub fn sampling() -> SamplingOptions {
    SamplingOptions { max_new_tokens: LONGEST, ..SamplingOptions::default() }
}

/// [`sample`] from what a hook makes of the logits of a model whose weights are prepared.
///
/// # Errors
/// Those of generation.
pub fn sample_with(
    hook: Option<&dyn LogitsHook>,
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    questions: &[Question],
    size: usize,
    (seed, round): (u64, u32),
) -> Result<Sampled> {
    let prompts: Vec<Prompt> = questions.iter().map(|question| question.prompt(tokenizer)).collect();
    let episodes = draw(hook, decoder, tokenizer, &prompts, size, (seed, round))?;
    Ok(Sampled { questions: questions.to_vec(), size, episodes })
}

/// [`sample`] for any prompts.
///
/// # Errors
/// Those of generation.
pub fn episodes(
    decoder: &mut Decoder,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    size: usize,
    (seed, round): (u64, u32),
) -> Result<Vec<Episode>> {
    decoder.prepare(Precision::F32);
    draw(None, decoder, tokenizer, prompts, size, (seed, round))
}

fn draw(
    hook: Option<&dyn LogitsHook>,
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    size: usize,
    (seed, round): (u64, u32),
) -> Result<Vec<Episode>> {
    let requests: Vec<Request> =
        prompts.iter().flat_map(|prompt| Request::samples(prompt.id, &prompt.ids, size as u32)).collect();
    let options = sampling();
    let random = Random::new(seed, Purpose::Sampling).step(MEASUREMENTS + round);
    let generator = Generator { hook, ..Generator::new(&options, 64, random) };
    Ok(generator.generate(decoder, tokenizer, &requests, |_| {})?)
}

/// The divergence `KL(π || π_ref)` of the answers' tokens, over the whole vocabulary, summed over an answer; mean over the answers,
/// in nats.
///
/// # Errors
/// A model that refuses the answers.
pub fn divergence(decoder: &mut Decoder, reference: &Decoder, sampled: &Sampled) -> Result<f64> {
    decoder.prepare(Precision::F32);
    let mut total = 0.0;
    let mut workspace = Workspace::new();
    for episodes in sampled.episodes.chunks(128) {
        let (mut tokens, mut targets) = (PackedTokens::new(), Vec::new());
        for episode in episodes {
            push(&mut tokens, &mut targets, &episode.prompt, &episode.completion)?;
        }
        let [policy, reference] =
            [&*decoder, reference].map(|model| all_log_probs(model, &tokens, &targets, &mut workspace));
        let rows = policy?.into_iter().zip(reference?);
        total += rows.map(|(p, q)| f64::from(p.exp()) * f64::from(p - q)).sum::<f64>();
    }
    Ok(total / sampled.episodes.len() as f64)
}

/// The log-probability of each answer to its question, summed over its tokens, EOS included where it has one.
///
/// # Errors
/// A model that refuses the answers.
pub fn log_probs(decoder: &mut Decoder, answers: &[(Question, &[u32])]) -> Result<Vec<f64>> {
    decoder.prepare(Precision::F32);
    let mut workspace = Workspace::new();
    let mut sums = Vec::with_capacity(answers.len());
    for answers in answers.chunks(128) {
        let (mut tokens, mut targets) = (PackedTokens::new(), Vec::new());
        for (question, answer) in answers {
            push(&mut tokens, &mut targets, &question.ids(), answer)?;
        }
        decoder.forward(&tokens, &mut workspace, false)?;
        let mut all = decoder.log_probs(&mut workspace, &targets, 1.0, false)?.log_prob.into_iter();
        let sum = |(_, answer): &(Question, &[u32])| all.by_ref().take(answer.len()).map(f64::from).sum::<f64>();
        sums.extend(answers.iter().map(sum));
    }
    Ok(sums)
}

/// Adds a sequence, and the tokens of its answer to the targets.
fn push(tokens: &mut PackedTokens, targets: &mut Vec<Target>, prompt: &[u32], answer: &[u32]) -> Result<()> {
    let ids: Vec<u32> = prompt.iter().chain(answer).copied().collect();
    let segment = tokens.push(&ids, None)?;
    let first = tokens.segments()[segment].start + prompt.len() - 1;
    targets.extend((first..).zip(answer).map(|(row, &token)| Target { row, token }));
    Ok(())
}

/// The log-probability of every token at every target, row by row.
fn all_log_probs(
    decoder: &Decoder,
    tokens: &PackedTokens,
    targets: &[Target],
    workspace: &mut Workspace,
) -> Result<Vec<f32>> {
    decoder.forward(tokens, workspace, false)?;
    let mut all = Vec::new();
    decoder.visit_logits(workspace, targets, |rows| {
        for row in rows {
            let start = all.len();
            all.extend_from_slice(row.logits);
            let normaliser = log_softmax_row(row.logits, 1.0, 0).log_sum_exp;
            all[start..].iter_mut().for_each(|logit| *logit -= normaliser);
        }
        Ok::<(), model::Error>(())
    })??;
    Ok(all)
}

/// The share of answers that are worth more than the other model's answer to the same question, sample by sample; ties count half.
pub fn win_rate(ours: &Sampled, theirs: &Sampled, utility: Utility) -> f64 {
    let wins = ours.answers().zip(theirs.answers()).map(|((question, ours), (_, theirs))| {
        let (ours, theirs) = (utility.of(question, ours), utility.of(question, theirs));
        // Equal up to rounding: the same qualities from sums in the same order are the same bits.
        if ours == theirs { 0.5 } else { f64::from(u8::from(ours > theirs)) }
    });
    eval::metrics::mean(&wins.collect::<Vec<_>>())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::super::{model, pairs, tokenizer};
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_sampling() {
        let (tokenizer, mut decoder) = (tokenizer().unwrap(), Decoder::random(model(), 3).unwrap());
        let questions = &Question::all()[..3];
        let sampled = sample(&mut decoder, &tokenizer, questions, 3, (1, 0)).unwrap();
        let answers: Vec<_> = sampled.answers().collect();
        let sampled_sums = sampled.episodes.iter().map(|episode| episode.log_probs.iter().map(|&l| f64::from(l)).sum());
        assert_eq!(log_probs(&mut decoder, &answers).unwrap(), sampled_sums.collect::<Vec<f64>>());
        let pairs = pairs(&sampled);
        assert_eq!(pairs.len(), 3, "the third answer to a question has no partner");
        assert_eq!((pairs[1].0, &pairs[1].1[1][..]), (questions[1], answers[4].1));
    }
}
