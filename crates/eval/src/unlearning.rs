//! Whether a model has forgotten what it should, and nothing else: the measures of TOFU.
//!
//! "TOFU: A Task of Fictitious Unlearning for LLMs", Maini et al. 2024, arXiv 2401.06121. A question comes with its answer, the answer in
//! other words, and wrong answers of the same form. With `ℓ(a)` the mean log-probability of the tokens of answer `a`, in nats:
//!
//! | measure | of a question | source |
//! | --- | --- | --- |
//! | probability | `e^ℓ(answer)`; with options `e^ℓ(answer) / (e^ℓ(answer) + Σ_wrong e^ℓ(wrong))` | TOFU |
//! | truth ratio `R` | `e^(mean_wrong ℓ(wrong) - ℓ(paraphrased))`: means before the exponential | TOFU |
//! | its score | `max(0, 1 - R)` for what should be known, `min(R, 1/R)` for what should be forgotten | TOFU |
//! | ROUGE-L recall | longest common subsequence of words over the words of the answer | Lin 2004 |
//! | exact memorisation | share of the answer's tokens that are the most probable one | Tirumala et al., arXiv 2205.10770 |
//! | extraction strength | `1 - k/n`, `k` the shortest beginning after which every token is the most probable one | Carlini et al., arXiv 2012.07805 |
//!
//! **Forget quality** is the p-value of the test of Kolmogorov and Smirnov ([`mod@crate::kolmogorov_smirnov`]) between the truth ratios on
//! the questions to forget of the model and of one that never saw them: 1 where the two cannot be told apart. **Model utility** is the
//! harmonic mean of probability, ROUGE-L recall and truth-ratio score over the sets of what should be known.
//!
//! A set is *learnt* (answers have a paraphrase: the rows to retain) or *of options* (they have none, and the answer itself stands for it:
//! real authors, world facts).
//!
//! Deviations from locuslab/tofu:
//! 1. Words are compared as they are; its ROUGE compares their stems. Letters of all scripts count, not only those of ASCII.
//! 2. `R` is as the paper has it; its script writes the inverse, with the formulas turned round.
//! 3. The p-value is exact up to samples of ten thousand.

use std::sync::Arc;

use base::{Purpose, Random};
use model::decoder::{Decoder, PackedTokens, Target, Workspace};
use model::tokenizer::Tokenizer;
use rollout::{Generator, Request, SamplingOptions};
use serde::{Deserialize, Serialize};

use crate::kolmogorov_smirnov::{KolmogorovSmirnov, kolmogorov_smirnov};
use crate::metrics::mean;

/// A question in tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Everything up to the answer.
    pub prompt: Vec<u32>,
    /// The answer, with the token that ends it.
    pub answer: Vec<u32>,
    /// The answer in other words; where there is none, the answer itself stands for it.
    pub paraphrased: Option<Vec<u32>>,
    /// Wrong answers of the same form.
    pub perturbed: Vec<Vec<u32>>,
    /// The text of the answer.
    pub text: String,
}

/// What a model makes of a question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    /// `ℓ(answer)`.
    pub answer: f64,
    /// `ℓ(paraphrased)`.
    pub paraphrased: Option<f64>,
    /// `ℓ` of every wrong answer.
    pub perturbed: Vec<f64>,
    /// For each token of the answer, whether no token is more probable.
    pub most_probable: Vec<bool>,
    /// What the model answers by itself.
    pub text: String,
    /// Its ROUGE-L recall.
    pub rouge: f64,
}

/// The kind of a set of questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Should be forgotten.
    Forget,
    /// Should be known, as it was learnt.
    Learnt,
    /// Should be known, as a choice among options.
    Options,
}

/// The means over a set of questions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SetScores {
    /// What the set is.
    pub kind: Kind,
    /// Questions.
    pub questions: usize,
    /// Probability.
    pub probability: f64,
    /// ROUGE-L recall.
    pub rouge: f64,
    /// Score of the truth ratio.
    pub truth_ratio: f64,
    /// Exact memorisation.
    pub exact_memorisation: f64,
    /// Extraction strength.
    pub extraction_strength: f64,
    /// `e` to the mean, over the questions, of `-ℓ(answer)`.
    pub perplexity: f64,
}

impl Answered {
    /// The truth ratio, `None` without wrong answers.
    pub fn truth_ratio(&self) -> Option<f64> {
        let right = self.paraphrased.unwrap_or(self.answer);
        (!self.perturbed.is_empty()).then(|| (mean(&self.perturbed) - right).exp())
    }

    /// The probability of the answer: by itself, or among the options.
    pub fn probability(&self, kind: Kind) -> f64 {
        match kind {
            Kind::Forget | Kind::Learnt => self.answer.exp(),
            // Over e^ℓ(answer), so that improbable answers do not make it 0 over 0.
            Kind::Options => 1.0 / (1.0 + self.perturbed.iter().map(|wrong| (wrong - self.answer).exp()).sum::<f64>()),
        }
    }
}

/// The score of a truth ratio, from 0 to 1.
pub fn truth_ratio_score(kind: Kind, ratio: f64) -> f64 {
    match kind {
        Kind::Forget => ratio.min(1.0 / ratio),
        Kind::Learnt | Kind::Options => (1.0 - ratio).max(0.0),
    }
}

/// The share of tokens that are the most probable one; 0 for no tokens.
pub fn exact_memorisation(most_probable: &[bool]) -> f64 {
    mean(&most_probable.iter().map(|&yes| f64::from(u8::from(yes))).collect::<Vec<_>>())
}

/// How much of an answer comes by itself after its beginning; 0 for no tokens.
pub fn extraction_strength(most_probable: &[bool]) -> f64 {
    let by_itself = most_probable.iter().rev().take_while(|&&yes| yes).count();
    if most_probable.is_empty() { 0.0 } else { by_itself as f64 / most_probable.len() as f64 }
}

/// The recall of ROUGE-L: words of `reference` that are a common subsequence with `candidate`, over all of them. A reference without words
/// is recalled by anything.
pub fn rouge_l_recall(candidate: &str, reference: &str) -> f64 {
    let words = |text: &str| {
        let lower = text.to_lowercase();
        let words = lower.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty());
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    let (candidate, reference) = (words(candidate), words(reference));
    if reference.is_empty() {
        return 1.0;
    }
    // The longest common subsequence of the reference so far and each beginning of the candidate.
    let mut longest = vec![0usize; candidate.len() + 1];
    for word in &reference {
        let mut diagonal = 0;
        for (place, other) in candidate.iter().enumerate() {
            let above = longest[place + 1];
            longest[place + 1] = if word == other { diagonal + 1 } else { above.max(longest[place]) };
            diagonal = above;
        }
    }
    longest[candidate.len()] as f64 / reference.len() as f64
}

/// The harmonic mean of numbers from 0 up; 0 if one of them is, or there are none.
pub fn harmonic_mean(values: &[f64]) -> f64 {
    match values.is_empty() || values.iter().any(|&value| value <= 0.0) {
        true => 0.0,
        false => values.len() as f64 / values.iter().map(|value| 1.0 / value).sum::<f64>(),
    }
}

/// The means over a set of questions; `None` without any, or where one has no wrong answers.
pub fn scores(kind: Kind, answered: &[Answered]) -> Option<SetScores> {
    let ratios = answered.iter().map(Answered::truth_ratio).collect::<Option<Vec<f64>>>()?;
    let of = |value: &dyn Fn(&Answered) -> f64| mean(&answered.iter().map(value).collect::<Vec<_>>());
    (!answered.is_empty()).then(|| SetScores {
        kind,
        questions: answered.len(),
        probability: of(&|answered| answered.probability(kind)),
        rouge: of(&|answered| answered.rouge),
        truth_ratio: mean(&ratios.iter().map(|&ratio| truth_ratio_score(kind, ratio)).collect::<Vec<_>>()),
        exact_memorisation: of(&|answered| exact_memorisation(&answered.most_probable)),
        extraction_strength: of(&|answered| extraction_strength(&answered.most_probable)),
        perplexity: (-of(&|answered| answered.answer)).exp(),
    })
}

/// Model utility: the harmonic mean of probability, ROUGE-L recall and truth-ratio score over sets of what should be known.
pub fn model_utility(sets: &[SetScores]) -> f64 {
    harmonic_mean(&sets.iter().flat_map(|set| [set.probability, set.rouge, set.truth_ratio]).collect::<Vec<_>>())
}

/// Forget quality: the test between the truth ratios, on the questions to forget, of a model and of one that never saw them. `None` where
/// there are none.
pub fn forget_quality(unlearned: &[Answered], never_saw: &[Answered]) -> Option<KolmogorovSmirnov> {
    let ratios = |answered: &[Answered]| answered.iter().map(Answered::truth_ratio).collect::<Option<Vec<f64>>>();
    kolmogorov_smirnov(&ratios(unlearned)?, &ratios(never_saw)?)
}

/// Puts questions to a model whose weights are prepared: the log-probabilities of all answers, and the answer it gives by itself, greedily,
/// of at most `max_new_tokens` tokens. `progress` takes the questions done.
///
/// # Errors
/// Questions that the model refuses, and failures of generation.
pub fn answer(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    questions: &[Question],
    max_new_tokens: usize,
    mut progress: impl FnMut(usize),
) -> rollout::Result<Vec<Answered>> {
    let prompts: Vec<Arc<[u32]>> = questions.iter().map(|question| question.prompt.clone().into()).collect();
    let requests: Vec<Request> =
        prompts.iter().zip(0..).flat_map(|(prompt, id)| Request::samples(id, prompt, 1)).collect();
    let options = SamplingOptions::greedy(max_new_tokens);
    let generator = Generator::new(&options, BATCH, Random::new(0, Purpose::Sampling));
    let episodes = generator.generate(decoder, tokenizer, &requests, |now| progress(now.finished))?;
    let mut workspace = Workspace::new();
    let answered = questions.iter().zip(episodes).map(|(question, episode)| {
        let mut answered = log_probs(decoder, question, &mut workspace)?;
        answered.rouge = rouge_l_recall(&episode.text, &question.text);
        answered.text = episode.text;
        Ok(answered)
    });
    answered.collect()
}

/// Questions answered at once; results do not depend on it.
const BATCH: usize = 32;

/// The log-probabilities of all answers to a question, whose prompt is computed once.
fn log_probs(decoder: &Decoder, question: &Question, workspace: &mut Workspace) -> model::Result<Answered> {
    let answers: Vec<&[u32]> = std::iter::once(&question.answer)
        .chain(&question.paraphrased)
        .chain(&question.perturbed)
        .map(|answer| &answer[..])
        .collect();
    let mut tokens = PackedTokens::new();
    let prompt = tokens.push(&question.prompt, None)?;
    // Every answer's first token is predicted by the prompt's last row.
    let last = question.prompt.len() - 1;
    let first = |answer: &&[u32]| answer.first().map(|&token| Target { row: last, token });
    let mut targets: Vec<Target> = answers.iter().filter_map(first).collect();
    for answer in &answers {
        let segment = tokens.push(answer, Some(prompt))?;
        let start = tokens.segments()[segment].start;
        targets.extend((start..).zip(&answer[1..]).map(|(row, &token)| Target { row, token }));
    }
    decoder.forward(&tokens, workspace, false)?;
    let found = decoder.log_probs(workspace, &targets, 1.0, false)?;
    let mut rest = answers.len();
    let mut means = Vec::with_capacity(answers.len());
    let mut most_probable = Vec::new();
    for (index, answer) in answers.iter().enumerate() {
        let later = rest..rest + answer.len() - 1;
        rest = later.end;
        let log_prob = std::iter::once(index).chain(later.clone()).map(|target| f64::from(found.log_prob[target]));
        means.push(log_prob.sum::<f64>() / answer.len() as f64);
        if index == 0 {
            most_probable = std::iter::once(index).chain(later).map(|target| found.most_probable[target]).collect();
        }
    }
    let mut means = means.into_iter();
    Ok(Answered {
        answer: means.next().unwrap_or_default(),
        paraphrased: question.paraphrased.as_ref().and_then(|_| means.next()),
        perturbed: means.collect(),
        most_probable,
        text: String::new(),
        rouge: 0.0,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use kernels::Precision;
    use model::{Family, ModelConfig};

    use super::*;

    fn answered(answer: f64, paraphrased: Option<f64>, perturbed: &[f64]) -> Answered {
        let (perturbed, text) = (perturbed.to_vec(), String::new());
        Answered { answer, paraphrased, perturbed, most_probable: vec![true, false, true, true], text, rouge: 0.5 }
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
    }

    #[test]
    fn losses_are_averaged_before_the_exponential() {
        let ratio = answered(-0.1, Some(-1.0), &[-2.0, -6.0]).truth_ratio().unwrap();
        close(ratio, (-3.0f64).exp());
        let of_probabilities = ((-2.0f64).exp() + (-6.0f64).exp()) / 2.0 / (-1.0f64).exp();
        assert!((ratio - of_probabilities).abs() > 0.1, "which the mean of probabilities would not be");
        // Without a paraphrase the answer stands for it.
        close(answered(-0.5, None, &[-0.5]).truth_ratio().unwrap(), 1.0);
        assert_eq!(answered(-0.5, None, &[]).truth_ratio(), None);
    }

    #[test]
    fn scores_of_truth_ratios() {
        for (ratio, forget, known) in [(0.25, 0.25, 0.75), (1.0, 1.0, 0.0), (4.0, 0.25, 0.0)] {
            close(truth_ratio_score(Kind::Forget, ratio), forget);
            close(truth_ratio_score(Kind::Learnt, ratio), known);
            close(truth_ratio_score(Kind::Options, ratio), known);
        }
        assert_eq!(truth_ratio_score(Kind::Forget, f64::INFINITY), 0.0);
        assert_eq!(truth_ratio_score(Kind::Forget, 0.0), 0.0);
    }

    #[test]
    fn options_share_one_probability() {
        let even = answered(-1.0, None, &[-1.0, -1.0, -1.0]);
        close(even.probability(Kind::Options), 0.25);
        close(even.probability(Kind::Learnt), (-1.0f64).exp());
        let improbable = answered(-900.0, None, &[-900.0]);
        close(improbable.probability(Kind::Options), 0.5);
    }

    #[test]
    fn recall_is_that_of_words_in_order() {
        close(rouge_l_recall("the cat sat", "The cat sat."), 1.0);
        close(rouge_l_recall("sat cat the", "the cat sat"), 1.0 / 3.0);
        close(rouge_l_recall("a cat, really, sat there", "the cat sat"), 2.0 / 3.0);
        close(rouge_l_recall("", "the cat"), 0.0);
        close(rouge_l_recall("anything", "..."), 1.0);
    }

    #[test]
    fn what_comes_by_itself() {
        let (yes, no) = (true, false);
        close(extraction_strength(&[no, yes, no, yes, yes]), 0.4);
        close(extraction_strength(&[yes, yes]), 1.0);
        close(extraction_strength(&[yes, no]), 0.0);
        close(exact_memorisation(&[no, yes, no, yes, yes]), 0.6);
        assert_eq!((exact_memorisation(&[]), extraction_strength(&[])), (0.0, 0.0));
    }

    #[test]
    fn one_number_that_is_zero_makes_the_harmonic_mean_zero() {
        close(harmonic_mean(&[1.0, 0.5, 0.25]), 3.0 / 7.0);
        assert_eq!((harmonic_mean(&[1.0, 0.0]), harmonic_mean(&[])), (0.0, 0.0));
        let set = scores(Kind::Learnt, &[answered(0.5f64.ln(), Some(-1.0), &[-2.0])]).unwrap();
        close(set.probability, 0.5);
        close(set.perplexity, 2.0);
        close(set.truth_ratio, 1.0 - (-1.0f64).exp());
        close(model_utility(&[set]), 3.0 / (2.0 + 2.0 + 1.0 / set.truth_ratio));
        assert!(scores(Kind::Learnt, &[]).is_none());
    }

    #[test]
    fn a_model_that_never_saw_the_questions_is_indistinguishable_from_itself() {
        let all: Vec<Answered> =
            (0..20).map(|i| answered(-1.0, Some(-1.0 - f64::from(i) / 10.0), &[-2.0, -3.0])).collect();
        assert_eq!(forget_quality(&all, &all).unwrap().p_value, 1.0);
        let sure: Vec<Answered> = (0..20).map(|_| answered(-0.1, Some(-0.1), &[-20.0])).collect();
        assert!(forget_quality(&sure, &all).unwrap().p_value < 1e-9);
        assert!(forget_quality(&[], &all).is_none());
    }

    #[test]
    fn a_shared_prompt_gives_the_log_probabilities_of_whole_sequences() {
        let mut decoder = Decoder::random(ModelConfig::tiny(Family::Llama, 32), 3).unwrap();
        decoder.prepare(Precision::F32);
        let question = Question {
            prompt: vec![1, 7, 9],
            answer: vec![4, 5, 6, 2],
            paraphrased: Some(vec![8, 2]),
            perturbed: vec![vec![4, 5, 9, 2], vec![11]],
            text: String::new(),
        };
        let mut workspace = Workspace::new();
        let found = log_probs(&decoder, &question, &mut workspace).unwrap();
        let whole = |answer: &[u32]| {
            let mut tokens = PackedTokens::new();
            tokens.push(&[&question.prompt[..], answer].concat(), None).unwrap();
            let targets: Vec<Target> = answer.iter().zip(2..).map(|(&token, row)| Target { row, token }).collect();
            let mut workspace = Workspace::new();
            decoder.forward(&tokens, &mut workspace, false).unwrap();
            let all = decoder.log_probs(&mut workspace, &targets, 1.0, false).unwrap();
            (all.log_prob.iter().map(|&value| f64::from(value)).sum::<f64>() / answer.len() as f64, all.most_probable)
        };
        let (answer, most_probable) = whole(&question.answer);
        assert_eq!((found.answer, found.most_probable), (answer, most_probable));
        assert_eq!(found.paraphrased, Some(whole(&[8, 2]).0));
        assert_eq!(found.perturbed, [whole(&[4, 5, 9, 2]).0, whole(&[11]).0]);
    }
}
