//! `posttrain train` and `posttrain resume`: measure, train, measure again, write it all down.

use std::path::{Path, PathBuf};

use model::decoder::Decoder;
use model::{DeviceName, hub};
use train::directory::Directory;
use train::methods::distillation::{Distillation, Lessons};
use train::methods::online_preference::OnlinePreference;
use train::methods::policy::Policy;
use train::methods::preference::Preference;
use train::methods::process_reward::ProcessReward;
use train::methods::rejection::Rejection;
use train::methods::reward_model::RewardModel;
use train::methods::sft::Sft;
use train::methods::unlearning::Unlearning;
use train::methods::unpaired::Unpaired;
use train::methods::value_model::{ValueModel, ValueModelOptions};
use train::run::DataSource;
use train::{Evaluator, Method, Outcome, Provenance, Run, Summary};

use crate::cli;
use crate::config::load::Layers;
use crate::config::{Config, Rows, Stage};
use crate::corpus::{Corpus, Language};
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::judges;
use crate::measure;
use crate::opened::{Opened, Opener};
use crate::plan::{self, Memory, Plan, Workload};
use crate::report::{assemble, bytes, duration};
use crate::terminal::{Terminal, print};
use crate::watch::Watcher;

/// Whether a run starts or goes on.
#[derive(Clone, Copy, PartialEq)]
enum Begin {
    Fresh {
        /// In place of a run that is already there.
        overwrite: bool,
    },
    Again,
}

/// `posttrain train`
pub fn train(arguments: &cli::Train, opener: Opener) -> Result<(), Failure> {
    let layers = Layers { files: arguments.recipe.recipes.clone(), assignments: arguments.recipe.set.clone() };
    let config = Config::load(&layers)?;
    config.check_trainable()?;
    if arguments.dry_run {
        return dry_run(&config, opener);
    }
    let output = output_folder(arguments, &config);
    run(config, &output, Begin::Fresh { overwrite: arguments.overwrite }, opener)
}

/// `posttrain resume`
pub fn resume(arguments: &cli::Resume, opener: Opener) -> Result<(), Failure> {
    let recipe = Directory::new(&arguments.run).config();
    if !recipe.is_file() {
        let failure = Failure::new(format!("{} is not a run: it has no config.toml", arguments.run.display()));
        return Err(failure.hint("give the folder that `posttrain train` wrote"));
    }
    let config = Config::load(&Layers { files: vec![recipe], assignments: Vec::new() })?;
    run(config, &arguments.run, Begin::Again, opener)
}

/// `--output`, else `output_dir`, else `runs/RECIPE` after the last recipe file.
fn output_folder(arguments: &cli::Train, config: &Config) -> PathBuf {
    let named = arguments.output.clone().or_else(|| config.output_dir.clone());
    named.unwrap_or_else(|| {
        let name = arguments.recipe.recipes.last().and_then(|path| path.file_stem()).unwrap_or_default();
        Path::new("runs").join(name)
    })
}

fn dry_run(config: &Config, opener: Opener) -> Result<(), Failure> {
    print(config.to_toml()?)?;
    let model = opener.shape(&config.model.name)?;
    check_adapter(config, model.config.layer_count())?;
    let language = Language {
        tokenizer: &model.tokenizer,
        template: model.chat_template.as_ref(),
        context: model.config.max_positions,
    };
    let corpus = Corpus::for_training(config, language, opener.terminal)?;
    let work = Workload::of(&corpus);
    let available = super::doctor::available_memory();
    let plan = Plan::new(config, &model.config, work, available);
    let terminal = opener.terminal;
    terminal.note(format!("\nmodel: {}, {} parameters", config.model.name, model.config.parameter_count()));
    terminal.note(format!("configuration: {}", config.hash()?));
    terminal.note(format!("rows: {} to train on, {} held out", work.train_rows, work.test_rows));
    terminal.note(plan.render().trim_end());
    if config.model.device != DeviceName::Cpu {
        terminal.note(format!("the estimates are for this machine without {}", config.model.device));
    }
    if let Some(available) = available.filter(|available| *available < plan.memory.total()) {
        terminal.note(format!(
            "only {} of memory are available: lower micro_batch_tokens, or add [lora]",
            bytes(available)
        ));
    }
    Ok(())
}

/// Gives the model the score head that a stage trains, unless it has one like it.
fn add_score_head(config: &Config, model: &mut Opened) -> Result<(), Failure> {
    let found = model.decoder.config();
    let (own, vocabulary) = (found.score, found.vocab_size);
    let stages = config.stages().into_iter();
    let mut heads = stages.filter_map(|stage| Some((stage, stage.score_head(vocabulary)?)));
    let Some((stage, (head, deviation))) = heads.next() else { return Ok(()) };
    match own {
        None => Ok(model.decoder.add_score(head, deviation, config.seed)?),
        Some(own) if own.outputs == head.outputs => Ok(()),
        Some(own) => {
            let (name, section, expected) = (&model.name, stage.method(), head.outputs);
            let failure = Failure::new(format!(
                "{name}: its score head has {} outputs, expected {expected}, as [{section}] is set",
                own.outputs
            ));
            Err(failure.hint(
                "start from a model without a score head, which gets one, or set the section as that model was trained",
            ))
        }
    }
}

/// Whether the adapter fits a model of so many layers.
fn check_adapter(config: &Config, layers: usize) -> Result<(), Failure> {
    let Some(lora) = &config.lora else { return Ok(()) };
    lora.check_layers(layers).map_err(|error| {
        Failure::from(error).hint(format!("{} has {layers} layers, of which the first is 0", config.model.name))
    })
}

/// Where the run computes, in a word.
fn place(config: &Config) -> String {
    match config.model.device {
        DeviceName::Cpu => kernels::Isa::current().to_string(),
        device => device.to_string(),
    }
}

fn run(mut config: Config, output: &Path, begin: Begin, opener: Opener) -> Result<(), Failure> {
    let terminal = opener.terminal;
    // Where the run lies is not part of what it computes; its own folder must not make its files differ.
    let recorded = Config { output_dir: None, ..config.clone() }.to_toml()?;
    let available = super::doctor::available_memory();
    let directory = Directory::new(output);
    let replaces = match begin {
        Begin::Fresh { overwrite } if directory.holds_a_run() => {
            if !overwrite {
                return Err(train::Error::Exists { folder: output.to_owned() }.into());
            }
            // It is removed when there is a run to take its place; whether it can be is told before the work of opening everything.
            drop(directory.lock()?);
            spare_models(&config, output)?;
            true
        }
        _ => false,
    };
    let mut model = opener.open_on(config.model.device, &config.model.name, config.seed)?;
    model.sha256.start();
    // Before its head for tokens goes.
    let mut reference = match &config.value_model {
        Some(options) => Some(open_reference(options, &model, opener, &config)?),
        None => None,
    };
    add_score_head(&config, &mut model)?;
    check_adapter(&config, model.decoder.config().layer_count())?;
    if let Some(lora) = &config.lora {
        model.decoder.attach_lora(lora, config.seed)?;
    }
    let language = Language {
        tokenizer: &model.tokenizer,
        template: model.template.as_ref(),
        context: model.decoder.config().max_positions,
    };
    let mut corpus = Corpus::for_training(&config, language, terminal)?;
    terminal.note(format!(
        "{}: {} rows to train on, {} held out, {} on {} threads",
        config.model.name,
        corpus.train_rows(),
        corpus.test_rows(),
        place(&config),
        rayon::current_num_threads()
    ));
    let memory = Memory::new(&config, model.decoder.config(), Workload::of(&corpus), available);
    if memory.checkpointing {
        terminal.note(plan::CHECKPOINTING);
    }
    memory.settle(&mut config);

    let mut stages: Vec<Box<dyn Method>> = Vec::new();
    let recipe = config.stages();
    for (index, stage) in recipe.iter().copied().enumerate() {
        let again = |rows: Rows<'_>| recipe[index + 1..].iter().any(|later| later.rows().contains(&rows));
        let prompts = again(Rows::Prompts);
        let examples = again(Rows::Examples);
        stages.push(match stage {
            Stage::Sft(options) => Box::new(Sft::new(options.clone(), handed(&mut corpus.examples, examples))?),
            Stage::Rejection(options) => {
                let rows = handed(&mut corpus.prompts, prompts);
                let stage = Rejection::new(options.clone(), rows, judges::rewards(&config, opener)?)?;
                Box::new(stage.with_hints(std::mem::take(&mut corpus.hints)))
            }
            Stage::Preference(options) => {
                Box::new(Preference::new(options.clone(), std::mem::take(&mut corpus.pairs))?)
            }
            Stage::Unpaired(options) => Box::new(Unpaired::new(options.clone(), std::mem::take(&mut corpus.judged))?),
            Stage::OnlinePreference(options) => Box::new(OnlinePreference::new(
                options.clone(),
                handed(&mut corpus.prompts, prompts),
                judges::rewards(&config, opener)?,
            )?),
            Stage::RewardModel(options) => {
                Box::new(RewardModel::new(options.clone(), std::mem::take(&mut corpus.rewarded))?)
            }
            Stage::ProcessReward(options) => {
                Box::new(ProcessReward::new(options.clone(), std::mem::take(&mut corpus.steps))?)
            }
            Stage::ValueModel(options) => {
                let Some((reference, source)) = reference.take() else { continue };
                corpus.sources.extend(source);
                let rows = handed(&mut corpus.prompts, prompts);
                Box::new(ValueModel::new(options.clone(), reference, rows, judges::rewards(&config, opener)?)?)
            }
            Stage::Policy(options) => {
                let rows = handed(&mut corpus.prompts, prompts);
                let stage = Policy::new(options.clone(), rows, judges::rewards(&config, opener)?)?;
                Box::new(match &options.value.init {
                    None => stage,
                    Some(name) => {
                        let (init, source) = open_beside(name, "value model", &model, opener, &config)?;
                        corpus.sources.push(source);
                        stage.with_value_model(init)?
                    }
                })
            }
            Stage::Distillation(options) => {
                let teachers = (options.teachers.iter())
                    .map(|teacher| open_beside(&teacher.model, "teacher", &model, opener, &config));
                let teachers = teachers.collect::<Result<Vec<_>, Failure>>()?;
                let (teachers, sources): (Vec<_>, Vec<_>) = teachers.into_iter().unzip();
                corpus.sources.extend(sources);
                let reward = if config.rewards.is_empty() {
                    None
                } else {
                    Some(judges::judgement(&config, opener)? as Box<dyn envs::Reward>)
                };
                let prompts = handed(&mut corpus.prompts, prompts);
                let examples = handed(&mut corpus.examples, examples);
                Box::new(Distillation::new(options.clone(), teachers, Lessons { prompts, examples, reward })?)
            }
            Stage::Unlearning(options) => {
                let kept = handed(&mut corpus.examples, examples);
                Box::new(Unlearning::new(options.clone(), std::mem::take(&mut corpus.forget), kept)?)
            }
        });
    }
    corpus.sources.extend(judges::sources(&config, opener)?);
    let steps: Vec<u64> = stages.iter().map(|stage| stage.steps()).collect();
    let language = (&model.tokenizer, model.template.as_ref());
    let mut measurer = measure::evaluator(&config, (corpus.test, corpus.test_pairs, corpus.held), language, opener)?;
    let interrupt = Interrupt::listen()?;
    let mut watcher = Watcher::new(terminal);
    let run = Run {
        directory: output,
        options: config.run.clone(),
        referee: config.referee.clone(),
        seed: config.seed,
        precision: config.model.precision.into(),
        decoder: model.decoder,
        tokenizer: &model.tokenizer,
        world: config.world(model.template.as_ref())?,
        chat_template: model.template.as_ref(),
        stages,
        evaluator: measurer.as_deref_mut().map(|measurer| measurer as &mut dyn Evaluator),
        observer: &mut watcher,
        interrupt: interrupt.flag(),
        provenance: Provenance {
            program: concat!("posttrain ", env!("CARGO_PKG_VERSION")).to_owned(),
            command: "posttrain train config.toml --output again".to_owned(),
            config: recorded,
            base_model: config.model.name.clone(),
            base_model_sha256: Some(model.sha256),
            data: corpus.sources,
        },
    };
    if replaces {
        directory.clear(&assemble::FILES)?;
    }
    let outcome = match begin {
        Begin::Fresh { .. } => run.start(),
        Begin::Again => run.resume(),
    };
    drop(watcher);
    match outcome? {
        Outcome::Finished(summary) => {
            assemble::write(&directory, &summary, &steps)?;
            finish(&summary, output, terminal)
        }
        Outcome::Interrupted { step } => {
            let failure = Failure::interrupted(format!("interrupted after step {step}; everything is saved"));
            Err(failure.hint(format!("go on with `posttrain resume {}`", output.display())))
        }
        Outcome::Stopped { alarm } => {
            let failure = Failure::alarmed(format!("the referee stopped the run: {alarm}"));
            let resume = format!("everything is saved; `posttrain resume {}` goes on past the alarm", output.display());
            Err(failure.hint(format!("{resume}; docs/referee.md says what helps")))
        }
    }
}

/// Refuses to replace a run that holds a model which the new one reads: that one could not be resumed.
fn spare_models(config: &Config, output: &Path) -> Result<(), Failure> {
    let Ok(replaced) = output.canonicalize() else { return Ok(()) };
    let inside = |name: &&str| {
        hub::named(name).is_none() && Path::new(name).canonicalize().is_ok_and(|path| path.starts_with(&replaced))
    };
    let stages = config.stages();
    let beside = stages.iter().flat_map(|stage| stage.models_beside());
    match [&*config.model.name].into_iter().chain(beside).chain(config.reward_models()).find(inside) {
        None => Ok(()),
        Some(name) => {
            let failure = Failure::new(format!(
                "the run in {} cannot be replaced: {name} lies in it, which the new run reads",
                output.display()
            ));
            Err(failure.hint("choose another folder with `--output`"))
        }
    }
}

/// The rows of a stage: a copy, if another stage learns from them `again`.
fn handed<T: Clone>(rows: &mut Vec<T>, again: bool) -> Vec<T> {
    if again { rows.clone() } else { std::mem::take(rows) }
}

/// A model that reads the same tokens as the one that is trained, for a role beside it.
fn open_beside(
    name: &str,
    role: &str,
    trained: &Opened,
    opener: Opener,
    config: &Config,
) -> Result<(Decoder, DataSource), Failure> {
    let other = opener.open(name, config.seed)?;
    trained.same_vocabulary("trained model", role, &other).map_err(|failure| {
        failure.hint(format!("a {role} reads and writes the same tokens: choose one of the same family"))
    })?;
    let source = DataSource { name: format!("{role}: {name}"), rows: 0, sha256: other.sha256.get()? };
    Ok((other.decoder, source))
}

/// The model that a value model is to guide, and what the run writes down of it where it is another than the one that training starts
/// from. It must speak of the same tokens.
fn open_reference(
    options: &ValueModelOptions,
    value: &Opened,
    opener: Opener,
    config: &Config,
) -> Result<(Decoder, Option<DataSource>), Failure> {
    let writes = |decoder: &Decoder, name: &str| match decoder.config().has_language_head() {
        true => Ok(()),
        false => {
            let failure =
                Failure::new(format!("{name} scores and does not write: `{}` cannot sample from it", options.method));
            Err(failure.hint(format!("name the model to be guided: `--set {}.reference=MODEL`", options.method)))
        }
    };
    let Some(name) = &options.reference else {
        writes(&value.decoder, &value.name)?;
        return Ok((value.decoder.clone(), None));
    };
    let reference = opener.open_on(config.model.device, name, config.seed)?;
    writes(&reference.decoder, name)?;
    reference.same_vocabulary("reference", "value model", value).map_err(|failure| {
        failure.hint("a value model reads the tokens of its reference: start it from a model of the same family")
    })?;
    let source = DataSource { name: format!("reference: {name}"), rows: 0, sha256: reference.sha256.get()? };
    Ok((reference.decoder, Some(source)))
}

/// The result on standard output, where it is on standard error.
fn finish(summary: &Summary, output: &Path, terminal: Terminal) -> Result<(), Failure> {
    terminal.note(format!(
        "{} steps in {}{}",
        summary.steps,
        duration(summary.timing.seconds),
        summary.timing.peak_memory_bytes.map(|peak| format!(", peak memory {}", bytes(peak))).unwrap_or_default()
    ));
    terminal.note(format!("report: {}", output.join("report.html").display()));
    terminal.note(format!("model:  {}", output.join("final").display()));
    let mut text = String::new();
    for (when, evaluation) in [("before", &summary.before), ("after", &summary.after)] {
        if let Some(measure) = evaluation.as_ref().and_then(|evaluation| evaluation.measures.first()) {
            let (scale, unit, digits) = measure::scale(&measure.name, 1);
            text += &format!(
                "{} {when:6} {:5.digits$}{unit}  (95 % interval {:.digits$} to {:.digits$}, {} problems)\n",
                measure.name,
                scale * measure.value,
                scale * measure.low,
                scale * measure.high,
                measure.items
            );
        }
    }
    if let Some(change) = &summary.change {
        text += &format!("change   {}\n", assemble::difference(change));
    }
    if text.is_empty() {
        text = format!("{}\n", output.join("final").display());
    }
    print(text)
}
