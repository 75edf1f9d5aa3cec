//! CE-U: a model forgets by cross-entropy towards its own distribution without the token.
//!
//! "CE-U: Cross Entropy Unlearning", Bo Yang 2025, arXiv 2503.01224. With `p` the model's next-token distribution and `y` the token that is to be
//! forgotten,
//!
//! ```text
//! L = - 1/T Σ_t Σ_{v ≠ y_t} q_v log p_v = mean_t [ H(q) - log(1 - p_{y_t}) ],      q_v = p_v / (1 - p_y),  a constant
//! ```
//!
//! over the answer tokens of the rows to forget but for the first of each ([`mod@objectives::unlearning`]). Gradient ascent on the likelihood
//! pulls with `1 - p_y`: not at all at what is known by heart, and ever on at what is forgotten. CE-U pulls with `p_y`: the other way round, and
//! it ends. It needs neither rows to retain nor a reference model.
//!
//! **World** ([`world`]). tofu-mini: TOFU in a few hundred words. A model learns what is known, then of 40 invented authors by heart; a
//! second one, the same up to there, learns of 36 of them. The first has to become like the second.
//!
//! **Experiment.** Each arm trains the model that knows everybody on the 40 questions about the four authors to forget, and is measured after
//! some of its epochs: *forget quality*, the p-value of the test that its truth ratios are those of the model that never knew them, and *model
//! utility*, the harmonic mean over the retained authors, known authors and facts about numbers ([`mod@eval::unlearning`]). An arm's curve is
//! judged by the *area* that it dominates,
//!
//! ```text
//! x = 1 - log p / log p_start       y = utility / utility_start       both within [0, 1]
//! ```
//!
//! since more of one can always be had for less of the other. CE-U, CE-U with rows to retain, gradient ascent, gradient difference, NPO and
//! SimNPO each have the learning rate with the largest area among the same five (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), found with a seed that judges
//! nothing.
//!
//! Deviations from the paper:
//! 1. A model of 3 layers, and 400 questions in place of 4000; forget10, so that the test has 40 values in each sample.
//! 2. The learning rate is constant after the first epoch, so that training can go on to four times the epochs.
//! 3. The corpus before the invented authors tells of others in both phrasings, or a model this small would not understand the second; and
//!    while it learns of the invented authors it hears the corpus again, or it would forget it.

pub mod world;

use std::collections::BTreeMap;

use data::Example;
use eval::unlearning::{Answered, Kind, Question, answer, forget_quality, model_utility, scores};
use kernels::Precision;
use model::decoder::Decoder;
use model::tokenizer::Tokenizer;
use objectives::unlearning::Forget;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use train::methods::sft::{Sft, SftOptions};
use train::methods::unlearning::{Unlearning, UnlearningOptions};

use self::world::{AUTHORS, Authors, Entry, FIELDS, Set, World};
use crate::error::{Error, Result};
use crate::experiment::{Experiment, Trial, open};
use crate::measurements::{Measurements, Seed};
use crate::system::{Arm, Bound, Claim, Figure, Role, System};

/// The table.
pub const SYSTEM: System = System {
    name: "ce-u",
    title: "CE-U: cross-entropy unlearning",
    paper: "Yang 2025, \"CE-U: Cross Entropy Unlearning\", arXiv 2503.01224",
    summary: "cross-entropy towards its own distribution without the token makes a model forget, and then stops",
    arms: ARMS,
    claims: CLAIMS,
    figures: FIGURES,
    tiny: include_str!("tiny.toml"),
    quick: include_str!("quick.toml"),
    readme: include_str!("README.md"),
    recipes: &["smollm2", "paper"],
    data: Some(data),
    schema: || schemars::schema_for!(CeU).to_value(),
    open: |settings| open::<CeU>("ce-u", settings),
};

const ARMS: &[Arm] = &[
    Arm::new("start", Role::Baseline, "knows everybody; nothing is done"),
    Arm::new("never-saw", Role::Baseline, "was never told of the authors to forget"),
    Arm::new("gradient-ascent", Role::Baseline, "gradient ascent at CE-U's learning rate"),
    Arm::new("gradient-ascent-tuned", Role::Baseline, "gradient ascent at its own"),
    Arm::new("gradient-difference", Role::Baseline, "gradient ascent, and rows to retain"),
    Arm::new("npo", Role::Baseline, "negative preference optimisation; needs a reference model"),
    Arm::new("simnpo", Role::Baseline, "the same without a reference"),
    Arm::new("ce-u", Role::Method, "CE-U on the rows to forget alone"),
    Arm::new("ce-u-retain", Role::Method, "rows to retain are learnt in the same batch"),
    Arm::new("ce-u-whole", Role::Ablation, "the first token of an answer is forgotten too"),
    Arm::new("ce-u-inside", Role::Ablation, "neither the first token nor the end of an answer is forgotten"),
    Arm::new(
        "ce-u-late",
        Role::Ablation,
        "the first five tokens of an answer, which hold little but its form, are left alone",
    ),
];

/// The log10 of the p-value below which two models count as told apart.
const TOLD_APART: f64 = -1.301_029_995_663_981_2;

fn of(seed: &Seed<'_>, arm: &str, name: &str) -> Option<f64> {
    seed.value(arm, name)
}

const CLAIMS: &[Claim] = &[
    Claim {
        id: "1a",
        statement: "CE-U forgets: log10 of its best forget quality among the epochs with at least 80 % of the first utility is above that of 0.05",
        bound: Bound::AtLeast(TOLD_APART),
        measure: |seed| of(seed, "ce-u", "best_quality_with_utility"),
    },
    Claim {
        id: "1b",
        statement: "where its forget quality is best, CE-U has at least 80 % of the first utility",
        bound: Bound::AtLeast(0.8),
        measure: |seed| of(seed, "ce-u", "utility_at_best"),
    },
    Claim {
        id: "1c",
        statement: "gradient ascent at the same learning rate never comes above 0.05, or has less utility where it is best: by how much CE-U has more",
        bound: Bound::AtLeast(0.0),
        measure: |seed| {
            let reached = of(seed, "gradient-ascent", "best_quality")? >= TOLD_APART;
            let theirs = if reached { of(seed, "gradient-ascent", "utility_at_best")? } else { 0.0 };
            Some(of(seed, "ce-u", "utility_at_best")? - theirs)
        },
    },
    Claim {
        id: "1d",
        statement: "CE-U's curve of quality and utility dominates a larger area than that of gradient ascent at its own learning rate: by how much",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(of(seed, "ce-u", "area")? - of(seed, "gradient-ascent-tuned", "area")?),
    },
    Claim {
        id: "2a",
        statement: "over four times the epochs CE-U's loss goes to the entropy of what is left: the rest of it, -log(1 - p), at the end",
        bound: Bound::AtMost(0.05),
        measure: |seed| of(seed, "ce-u", "last_loss"),
    },
    Claim {
        id: "2b",
        statement: "and its gradient decays: its norm in the last epoch over that in the first",
        bound: Bound::AtMost(0.5),
        measure: |seed| of(seed, "ce-u", "gradient_decay"),
    },
    Claim {
        id: "2c",
        statement: "gradient ascent's loss goes on: nats per token at the end, where chance would be -6",
        bound: Bound::AtMost(-20.0),
        measure: |seed| of(seed, "gradient-ascent", "last_loss"),
    },
    Claim {
        id: "2d",
        statement: "and its perplexity on retained rows grows more than tenfold",
        bound: Bound::AtLeast(10.0),
        measure: |seed| of(seed, "gradient-ascent", "perplexity_growth"),
    },
    Claim {
        id: "3",
        statement: "CE-U needs no reference, by construction: models in memory",
        bound: Bound::AtMost(1.0),
        measure: |seed| of(seed, "ce-u", "models"),
    },
    Claim {
        id: "4",
        statement: "rows to retain in the same batch improve utility further: by how much, each where its forget quality is best",
        bound: Bound::AtLeast(0.0),
        measure: |seed| Some(of(seed, "ce-u-retain", "utility_at_best")? - of(seed, "ce-u", "utility_at_best")?),
    },
];

const TRAINED: &[&str] =
    &["ce-u", "ce-u-retain", "gradient-ascent", "gradient-ascent-tuned", "gradient-difference", "npo", "simnpo"];

const FIGURES: &[Figure] = &[
    Figure {
        title: "Utility against forget quality, over the epochs",
        x: "log10 p",
        y: "utility",
        curve: "utility_by_quality",
        arms: TRAINED,
        diagonal: false,
    },
    Figure { title: "Forget quality", x: "epoch", y: "log10 p", curve: "quality", arms: TRAINED, diagonal: false },
    Figure { title: "Model utility", x: "epoch", y: "utility", curve: "utility", arms: TRAINED, diagonal: false },
    Figure {
        title: "Probability of the answers to forget",
        x: "epoch",
        y: "probability",
        curve: "forget_probability",
        arms: TRAINED,
        diagonal: false,
    },
    Figure {
        title: "What is forgotten of an answer",
        x: "epoch",
        y: "utility",
        curve: "utility",
        arms: &["ce-u", "ce-u-whole", "ce-u-inside", "ce-u-late"],
        diagonal: false,
    },
    Figure {
        title: "The norm of the gradient",
        x: "epoch",
        y: "norm",
        curve: "gradient_norm",
        arms: &["ce-u", "gradient-ascent"],
        diagonal: false,
    },
];

/// Settings of the reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CeU {
    /// Invented authors.
    #[schemars(range(min = 2, max = 40))]
    pub authors: usize,
    /// Of these, to be forgotten.
    #[schemars(range(min = 1, max = 39))]
    pub forgotten: usize,
    /// Known authors.
    #[schemars(range(min = 1, max = 40))]
    pub known: usize,
    /// Questions about retained authors, and as many about known ones, in a measurement.
    #[schemars(range(min = 1))]
    pub questions: usize,
    /// Epochs after which a model is measured.
    pub measured_epochs: Vec<u64>,
    /// Further ones of CE-U and gradient ascent, which train on to the last of them.
    pub stability_epochs: Vec<u64>,
    /// How the first model learns what is known.
    pub corpus: SftOptions,
    /// How it then learns of the invented authors, and hears the corpus again.
    pub authors_sft: SftOptions,
    /// What all ways to forget share.
    pub unlearning: UnlearningOptions,
    /// The learning rate of each arm.
    pub learning_rates: BTreeMap<String, f64>,
}

/// The files of tofu-mini with TOFU's forget10 for a seed, to train on and to be measured with: what is to be forgotten, what is to be
/// retained, both together, and what is known.
pub fn data(seed: u64) -> Vec<(&'static str, String)> {
    let world = World::new(Authors { invented: AUTHORS, forgotten: AUTHORS / 10, known: AUTHORS / 2 }, seed);
    let [forget, retain, real, facts] =
        [Set::Forget, Set::Retain, Set::RealAuthors, Set::WorldFacts].map(|set| world.lines(set));
    let known = real.clone() + &facts;
    vec![
        ("full.jsonl", forget.clone() + &retain + &known),
        ("never_saw.jsonl", retain.clone() + &known),
        ("forget.jsonl", forget),
        ("retain.jsonl", retain),
        ("real_authors.jsonl", real),
        ("world_facts.jsonl", facts),
    ]
}

/// What all arms of a seed start from.
pub struct Start {
    asked: Asked,
    /// Knows everybody.
    knows: Decoder,
    /// Was never told of the authors to forget.
    never_saw: Decoder,
    forget: Vec<Example>,
    retain: Vec<Example>,
    /// The model that knows everybody, measured.
    first: Found,
}

/// What a model is measured with.
struct Asked {
    tokenizer: Tokenizer,
    /// The questions to forget.
    forget: Vec<Question>,
    /// Those of the three sets of what should be known.
    known: [(Kind, Vec<Question>); 3],
    /// What the model that never saw them makes of the questions to forget.
    reference: Vec<Answered>,
}

/// What is measured of a model.
#[derive(Clone, Copy)]
struct Found {
    /// log10 of the forget quality.
    quality: f64,
    utility: f64,
    forget_probability: f64,
    forget_rouge: f64,
    forget_extraction: f64,
    retain_perplexity: f64,
    /// Probability, ROUGE-L recall and truth-ratio score of what should be known, set by set: what utility is the mean of.
    parts: [[f64; 3]; 3],
}

/// The sets of what should be known.
const KNOWN: [&str; 3] = ["retain", "real_authors", "world_facts"];

/// What an arm does, `None` for nothing.
fn recipe(arm: &str, shared: &UnlearningOptions) -> Option<UnlearningOptions> {
    let mut options = shared.clone();
    let objective = &mut options.objective;
    let (forget, retain, first) = match arm {
        "ce-u" | "ce-u-inside" => (Forget::CeU, 0.0, 1),
        "ce-u-retain" => (Forget::CeU, 1.0, 1),
        "ce-u-whole" => (Forget::CeU, 0.0, 0),
        "ce-u-late" => (Forget::CeU, 0.0, 5),
        "gradient-ascent" | "gradient-ascent-tuned" => (Forget::GradientAscent, 0.0, 0),
        "gradient-difference" => (Forget::GradientAscent, 1.0, 0),
        "npo" => (Forget::Npo, 0.0, 0),
        "simnpo" => (Forget::SimNpo, 0.0, 0),
        _ => return None,
    };
    (objective.forget, objective.retain_weight, objective.ignore_first_tokens) = (forget, retain, first);
    objective.ignore_last_tokens = usize::from(arm == "ce-u-inside");
    Some(options)
}

impl Experiment for CeU {
    type Start = Start;

    fn validate(&self) -> Result<()> {
        self.corpus.validate().map_err(|error| error.within("corpus"))?;
        self.authors_sft.validate().map_err(|error| error.within("authors_sft"))?;
        self.unlearning.validate().map_err(|error| error.within("unlearning"))?;
        let refuse = |reason: String| Err(Error::Settings { system: "ce-u", reason });
        if !(self.forgotten < self.authors && self.authors <= AUTHORS && (1..=AUTHORS).contains(&self.known)) {
            return refuse(format!(
                "expected fewer authors to forget than there are, and at most {AUTHORS} of a kind, got {} of {} and {} known",
                self.forgotten, self.authors, self.known
            ));
        }
        if let Some(arm) = ARMS
            .iter()
            .find(|arm| recipe(arm.name, &self.unlearning).is_some() && !self.learning_rates.contains_key(arm.name))
        {
            return refuse(format!("expected a learning rate of every arm, {} has none", arm.name));
        }
        let ascending = |epochs: &[u64]| epochs.windows(2).all(|pair| pair[0] < pair[1]);
        let all = [&self.measured_epochs[..], &self.stability_epochs].concat();
        if self.measured_epochs.is_empty() || !ascending(&all) || all[0] == 0 {
            return refuse(format!("expected ascending epochs from 1 on, got {all:?}"));
        }
        Ok(())
    }

    fn start(&self, trial: &Trial<'_>) -> Result<Start> {
        let tokenizer = world::tokenizer()?;
        let authors = Authors { invented: self.authors, forgotten: self.forgotten, known: self.known };
        let world = World::new(authors, trial.seed);
        let [forget, retain] = [Set::Forget, Set::Retain].map(|set| world.entries(set));
        let examples = |entries: &[Entry]| {
            let rows: Vec<_> = entries.iter().map(|entry| (entry.question.clone(), entry.answer.clone())).collect();
            world::examples(&tokenizer, &rows)
        };
        let (forget_rows, retain_rows) = (examples(&forget)?, examples(&retain)?);

        let mut base = Decoder::random(world::model(), trial.seed)?;
        let corpus = world::examples(&tokenizer, &world.corpus())?;
        let mut sft = Sft::new(self.corpus.clone(), corpus.clone())?;
        trial.fit(0, &mut sft, &mut base, &tokenizer, |_, _, _| Ok(()))?;
        let learn = |rows: &[Example]| {
            let mut decoder = base.clone();
            let mut sft = Sft::new(self.authors_sft.clone(), [&corpus[..], rows].concat())?;
            trial.fit(1, &mut sft, &mut decoder, &tokenizer, |_, _, _| Ok(()))?;
            Ok::<_, Error>(decoder)
        };
        let knows = learn(&[&forget_rows[..], &retain_rows].concat())?;
        let mut never_saw = learn(&retain_rows)?;

        let some = |entries: Vec<Entry>| -> Vec<Entry> {
            spread(entries.len(), self.questions).map(|index| entries[index].clone()).collect()
        };
        let known = [
            (Kind::Learnt, world::questions(&tokenizer, &some(retain))?),
            (Kind::Options, world::questions(&tokenizer, &some(world.entries(Set::RealAuthors)))?),
            (Kind::Options, world::questions(&tokenizer, &world.entries(Set::WorldFacts))?),
        ];
        let asked = world::questions(&tokenizer, &forget)?;
        never_saw.prepare(Precision::F32);
        let reference = answer(&never_saw, &tokenizer, &asked, LONGEST, |_| {})?;
        let asked = Asked { tokenizer, forget: asked, known, reference };
        let first = asked.measure(&mut knows.clone())?;
        Ok(Start { asked, knows, never_saw, forget: forget_rows, retain: retain_rows, first })
    }

    fn run(&self, start: &Start, arm: &str, trial: &Trial<'_>) -> Result<Measurements> {
        let mut measured = Measurements::default();
        let Some(mut options) = recipe(arm, &self.unlearning) else {
            let found = if arm == "start" { start.first } else { start.asked.measure(&mut start.never_saw.clone())? };
            found.record(&mut measured);
            return Ok(measured);
        };
        let steps_of_epoch = start.forget.len().div_ceil(options.forget_batch_size) as u64;
        let stability = matches!(arm, "ce-u" | "gradient-ascent");
        let mut epochs = self.measured_epochs.clone();
        if stability {
            epochs.extend(&self.stability_epochs);
        }
        let last = epochs.last().copied().unwrap_or(1);
        options.training.max_steps = Some(last * steps_of_epoch);
        options.training.warmup_steps = steps_of_epoch;
        options.training.learning_rate = self.learning_rates.get(arm).copied().unwrap_or_default();
        let models = 1 + u8::from(options.objective.needs_reference());

        let mut curve = vec![(0, start.first)];
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        let mut method = Unlearning::new(options, start.forget.clone(), start.retain.clone())?;
        let mut decoder = start.knows.clone();
        trial.fit(2, &mut method, &mut decoder, &start.asked.tokenizer, |step, decoder, metrics| {
            losses.extend(metrics.get("forget/loss"));
            norms.extend(metrics.get("grad_norm"));
            let epoch = step / steps_of_epoch;
            if step.is_multiple_of(steps_of_epoch) && epochs.contains(&epoch) {
                curve.push((epoch, start.asked.measure(decoder)?));
            }
            Ok(())
        })?;

        for (epoch, found) in &curve {
            found.point(*epoch as f64, &mut measured);
        }
        let of_epoch = |values: &[f64], epoch: usize| {
            let steps = steps_of_epoch as usize;
            values.get(epoch * steps..(epoch + 1) * steps).map(eval::metrics::mean)
        };
        for epoch in 0..last as usize {
            for (name, values) in [("forget_loss", &losses), ("gradient_norm", &norms)] {
                if let Some(mean) = of_epoch(values, epoch) {
                    measured.point(name, (epoch + 1) as f64, mean);
                }
            }
        }
        let final_epoch = last as usize - 1;
        measured.set_known("last_loss", of_epoch(&losses, final_epoch));
        let ends = of_epoch(&norms, 0).zip(of_epoch(&norms, final_epoch));
        measured.set_known("gradient_decay", ends.filter(|(first, _)| *first > 0.0).map(|(first, last)| last / first));
        let grown = curve.last().map(|(_, found)| found.retain_perplexity / start.first.retain_perplexity);
        measured.set_known("perplexity_growth", grown);
        measured.set("models", f64::from(models));
        // What is compared between arms is the common epochs, without the untouched model.
        let common: Vec<Found> =
            curve.iter().filter(|(epoch, _)| self.measured_epochs.contains(epoch)).map(|(_, found)| *found).collect();
        let best = common.iter().copied().reduce(|best, other| if other.quality > best.quality { other } else { best });
        if let Some(best) = best {
            best.record(&mut measured);
            measured.set("best_quality", best.quality);
            measured.set("utility_at_best", best.utility / start.first.utility);
        }
        // The untouched model has all its utility: what was never better has the quality that it started with.
        let useful = common.iter().filter(|found| found.utility >= 0.8 * start.first.utility);
        let best = useful.map(|found| found.quality).fold(start.first.quality, f64::max);
        measured.set("best_quality_with_utility", best);
        measured.set("area", area(&common, start.first));
        Ok(measured)
    }
}

/// `count` of so many entries, each once, evenly over authors and over the fields that each author has in turn; all if there are no more.
fn spread(entries: usize, count: usize) -> impl Iterator<Item = usize> {
    let coprime =
        |step: usize, to: usize| (2..=step).all(|factor| !(step.is_multiple_of(factor) && to.is_multiple_of(factor)));
    let mut step = (entries / count).max(1);
    while !coprime(step, FIELDS) || !coprime(step, entries) {
        step += 1;
    }
    (0..count.min(entries)).map(move |index| index * step % entries)
}

/// Most tokens of an answer that a model gives by itself.
const LONGEST: usize = 16;

/// The area that points of forgetting and remaining utility dominate, from 0 to 1.
fn area(curve: &[Found], first: Found) -> f64 {
    let within = |value: f64| value.clamp(0.0, 1.0);
    let forgotten = |found: &Found| if first.quality < 0.0 { within(1.0 - found.quality / first.quality) } else { 1.0 };
    let mut points: Vec<(f64, f64)> =
        curve.iter().map(|found| (forgotten(found), within(found.utility / first.utility))).collect();
    points.sort_by(|a, b| b.0.total_cmp(&a.0));
    // From the most forgetful on: each point adds a stripe above those that forget more.
    let (mut area, mut height) = (0.0, 0.0);
    for (x, y) in points {
        if y > height {
            area += x * (y - height);
            height = y;
        }
    }
    area
}

impl Asked {
    /// Measures a model.
    fn measure(&self, decoder: &mut Decoder) -> Result<Found> {
        decoder.prepare(Precision::F32);
        let ask = |questions: &[Question]| answer(decoder, &self.tokenizer, questions, LONGEST, |_| {});
        let forgotten = ask(&self.forget)?;
        let nothing = || Error::Settings { system: "ce-u", reason: "there is nothing to ask".into() };
        let forget = scores(Kind::Forget, &forgotten).ok_or_else(nothing)?;
        let mut sets = Vec::new();
        for (kind, questions) in &self.known {
            sets.push(scores(*kind, &ask(questions)?).ok_or_else(nothing)?);
        }
        let quality = forget_quality(&forgotten, &self.reference).ok_or_else(nothing)?;
        Ok(Found {
            quality: quality.p_value.log10(),
            utility: model_utility(&sets),
            forget_probability: forget.probability,
            forget_rouge: forget.rouge,
            forget_extraction: forget.extraction_strength,
            retain_perplexity: sets[0].perplexity,
            parts: [0, 1, 2].map(|set| [sets[set].probability, sets[set].rouge, sets[set].truth_ratio]),
        })
    }
}

impl Found {
    fn all(&self) -> [(&'static str, f64); 6] {
        [
            ("quality", self.quality),
            ("utility", self.utility),
            ("forget_probability", self.forget_probability),
            ("forget_rouge", self.forget_rouge),
            ("forget_extraction", self.forget_extraction),
            ("retain_perplexity", self.retain_perplexity),
        ]
    }

    fn record(&self, into: &mut Measurements) {
        self.all().into_iter().for_each(|(name, value)| into.set(name, value));
        for (set, [probability, rouge, truth_ratio]) in KNOWN.iter().zip(self.parts) {
            into.set(format!("{set}_probability"), probability);
            into.set(format!("{set}_rouge"), rouge);
            into.set(format!("{set}_truth_ratio"), truth_ratio);
        }
    }

    fn point(&self, epoch: f64, into: &mut Measurements) {
        self.all().into_iter().for_each(|(name, value)| into.point(name, epoch, value));
        into.point("utility_by_quality", self.quality, self.utility);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    fn found(quality: f64, utility: f64) -> Found {
        Found {
            quality,
            utility,
            forget_probability: 0.0,
            forget_rouge: 0.0,
            forget_extraction: 0.0,
            retain_perplexity: 1.0,
            parts: [[0.0; 3]; 3],
        }
    }

    #[test]
    fn the_area_is_that_of_what_is_dominated() {
        let first = found(-10.0, 0.8);
        assert_eq!(area(&[], first), 0.0);
        assert_eq!(area(&[found(-10.0, 0.8)], first), 0.0, "nothing is forgotten");
        assert!((area(&[found(0.0, 0.8)], first) - 1.0).abs() < 1e-12, "everything is, and nothing lost");
        // Half forgotten with everything kept, all forgotten with half kept; a point that both dominate adds nothing.
        let both = [found(-5.0, 0.8), found(0.0, 0.4), found(-6.0, 0.3)];
        assert!((area(&both, first) - 0.75).abs() < 1e-12);
    }

    #[test]
    fn questions_are_spread_over_authors_and_fields() {
        for (entries, count) in [(360, 60), (200, 60), (360, 70), (20, 10), (40, 40), (30, 60), (10, 1)] {
            let chosen: Vec<usize> = spread(entries, count).collect();
            let few = count.min(entries);
            let once: std::collections::BTreeSet<_> = chosen.iter().collect();
            assert!(chosen.len() == few && once.len() == few && chosen.iter().all(|&index| index < entries));
            for field in 0..FIELDS {
                let asked = chosen.iter().filter(|&index| index % FIELDS == field).count();
                assert!(asked.abs_diff(few / FIELDS) <= 1, "{asked} of {few} questions are about field {field}");
            }
        }
    }

    #[test]
    fn arms_differ_in_what_they_should() {
        let shared = UnlearningOptions::default();
        let trained: Vec<&str> =
            ARMS.iter().filter(|arm| recipe(arm.name, &shared).is_some()).map(|arm| arm.name).collect();
        assert_eq!(trained.len(), ARMS.len() - 2);
        let needs = |arm: &str| recipe(arm, &shared).unwrap().objective.needs_reference();
        assert_eq!(trained.into_iter().filter(|arm| needs(arm)).collect::<Vec<_>>(), ["npo"]);
        let inside = recipe("ce-u-inside", &shared).unwrap().objective;
        assert_eq!((inside.ignore_first_tokens, inside.ignore_last_tokens), (1, 1));
    }
}
