//! Who answers: a model, a policy of a frontier, or a mixture of models.

use std::path::Path;

use base::{Purpose, Random};
use eval::Scalarisation;
use kernels::Precision;
use model::DeviceName;
use model::chat::ChatTemplate;
use model::decoder::{Decoder, TaskVectors, WeightFormat};
use rollout::{Episode, Generator, Mean, Mixture, PrefixCache, Progress, Request, SamplingOptions};

use crate::cli;
use crate::failure::Failure;
use crate::frontier_file::{FrontierFile, Part};
use crate::opened::{Opened, Opener};

/// A model that generates, and those that are mixed into what it says.
pub struct Voice {
    /// The model that generates: its name, tokenizer and template are those of all.
    pub model: Opened,
    /// The others, with their shares.
    others: Vec<(Opened, f64)>,
    /// Candidates of which one is resampled.
    candidates: u32,
}

impl Voice {
    /// Opens what the command line asks for.
    pub fn open(flags: &cli::Model, several: &cli::Several, opener: Opener) -> Result<Self, Failure> {
        let alone = |model| Self { model, others: Vec::new(), candidates: 1 };
        let (precision, format) = (flags.precision.into(), flags.weights.into());
        if let Some(path) = &several.frontier {
            return Ok(alone(of_frontier(path, several, flags.device, (precision, format), opener)?));
        }
        let open = |name: &str| opener.open_to_generate(flags.device, name, 0, precision, format);
        let Some((first, others)) = several.mix.split_first() else {
            return Ok(alone(open(&flags.model)?));
        };
        let shares = shares(several)?;
        let model = open(first)?;
        let others = others.iter().map(|name| open(name)).collect::<Result<Vec<_>, _>>()?;
        others.iter().try_for_each(|other| check_language(&model, other))?;
        Ok(Self {
            model,
            others: others.into_iter().zip(shares.into_iter().skip(1)).collect(),
            candidates: several.candidates,
        })
    }

    /// Refuses sampling that a mixture cannot do.
    pub fn check(several: &cli::Several, options: &SamplingOptions) -> Result<(), Failure> {
        if several.candidates > 1 && options.is_greedy() {
            let failure =
                Failure::usage("`--candidates` needs answers that differ: expected a temperature above 0, got 0");
            return Err(failure.hint("leave out `--candidates` for the most likely token at every position"));
        }
        Ok(())
    }

    /// Whether what is said is known before all of it has been.
    pub fn streams(&self) -> bool {
        self.candidates == 1
    }

    /// Answers requests; `cache` knows what was said before. `seed` and `turn` name the draws of resampling.
    pub fn answer(
        &self,
        generator: &Generator<'_>,
        (seed, turn): (u64, u32),
        cache: Option<&mut PrefixCache>,
        requests: &[Request],
        on_progress: impl FnMut(Progress<'_>),
    ) -> Result<Vec<Episode>, Failure> {
        let Opened { decoder, tokenizer, .. } = &self.model;
        let generate = |generator: Generator<'_>, requests: &[Request]| match cache {
            Some(cache) => generator.generate_with(cache, decoder, tokenizer, requests, on_progress),
            None => generator.generate(decoder, tokenizer, requests, on_progress),
        };
        if self.others.is_empty() {
            return Ok(generate(*generator, requests)?);
        }
        let others: Vec<(&Decoder, f64)> = self.others.iter().map(|(other, share)| (&other.decoder, *share)).collect();
        let mixture = Mixture::new(&others, Mean::Geometric, generator.options);
        let generator = Generator { hook: Some(&mixture), ..*generator };
        if self.candidates == 1 {
            return Ok(generate(generator, requests)?);
        }
        let count = self.candidates;
        let candidate =
            |request: &Request, number| Request { sample: request.sample * count + number, ..request.clone() };
        let all: Vec<Request> =
            requests.iter().flat_map(|request| (0..count).map(move |number| candidate(request, number))).collect();
        let candidates = generate(generator, &all)?;
        let size = count as usize;
        let chosen = mixture.resample(&candidates, size, Random::new(seed, Purpose::Resampling).step(turn))?;
        let answers = candidates.chunks(size).zip(chosen).zip(requests);
        let answer = |group: &[Episode], chosen: usize, sample| Episode { sample, ..group[chosen].clone() };
        Ok(answers.map(|((group, one), request)| answer(group, one.chosen, request.sample)).collect())
    }
}

/// The shares of the models of a mixture, scaled to a sum of one.
fn shares(several: &cli::Several) -> Result<Vec<f64>, Failure> {
    let count = several.mix.len();
    if count < 2 {
        let failure = Failure::usage("a mixture needs two models: expected `--mix` at least twice, got it once");
        return Err(failure.hint("`--model` answers with one model"));
    }
    if several.shares.is_empty() {
        return Ok(vec![1.0 / count as f64; count]);
    }
    let total: f64 = several.shares.iter().sum();
    let usable = several.shares.iter().all(|share| *share >= 0.0) && total.is_finite() && total > 0.0;
    if several.shares.len() != count || !usable {
        let failure = Failure::usage(format!(
            "`--shares`: expected {count} numbers from 0 up and not all 0, one for each `--mix`, got {:?}",
            several.shares
        ));
        return Err(failure.hint("`posttrain mix weights` finds the shares that serve the worst-off objective best"));
    }
    Ok(several.shares.iter().map(|share| share / total).collect())
}

/// Refuses models that do not read and write the same tokens.
pub fn check_language(first: &Opened, other: &Opened) -> Result<(), Failure> {
    let differ = |what: &str| {
        Failure::new(format!(
            "{} and {} have different {what}: their tokens do not mean the same",
            first.name, other.name
        ))
        .hint("mix models that were trained from one")
    };
    let sizes = |opened: &Opened| opened.decoder.config().vocab_size;
    if sizes(first) != sizes(other) || first.tokenizer.to_json()? != other.tokenizer.to_json()? {
        return Err(differ("tokenizers"));
    }
    let template = |opened: &Opened| opened.template.as_ref().map(|template| ChatTemplate::source(template).to_owned());
    if template(first) != template(other) {
        return Err(differ("chat templates"));
    }
    Ok(())
}

/// The policy of a frontier that serves a preference best.
fn of_frontier(
    path: &Path,
    several: &cli::Several,
    device: DeviceName,
    (precision, format): (Precision, WeightFormat),
    opener: Opener,
) -> Result<Opened, Failure> {
    let file = FrontierFile::read(path)?;
    let scalarisation = several.utility.map_or(Scalarisation::Linear, Into::into);
    let policy = file.choose(path, &several.preference, scalarisation, several.kl_weight.unwrap_or(0.0))?;
    let device = device.open()?;
    let open = |part: &Part| {
        let opened = opener.open(&part.model, file.seed)?;
        part.check(path, &opened)?;
        Ok::<_, Failure>(opened)
    };
    let base = open(&file.base)?;
    let trained = file.models.iter().map(|part| Ok(open(part)?.decoder)).collect::<Result<Vec<_>, Failure>>()?;
    let Opened { decoder, tokenizer, template, sha256, .. } = base;
    let mut decoder = TaskVectors::new(decoder, trained)?.merged(&policy.coefficients)?;
    if let Some(device) = device {
        decoder.to_device(&device)?;
    }
    decoder.prepare_for_generation(precision, format);
    let coefficients: Vec<String> = policy.coefficients.iter().map(|a| format!("{a:.3}")).collect();
    opener.terminal.note(format!("{}: task vectors times {}", path.display(), coefficients.join(", ")));
    Ok(Opened { name: path.display().to_string(), sha256, decoder, tokenizer, template })
}
