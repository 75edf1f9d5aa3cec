//! What a recipe trains on and measures with: rows of tasks and files, rendered for a model.

use std::collections::HashSet;

use base::{Purpose, Random, files};
use data::{Example, LabelledExample, PreferencePair, Prompt, RenderOptions, Renderer, Row, Source};
use envs::tasks::{Split, near_miss};
use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;
use serde_json::{Value, json};
use train::run::DataSource;

use crate::config::{Config, Rows, TaskOptions};
use crate::failure::Failure;
use crate::terminal::Terminal;

/// Held-out problems are the same whatever the seed of the run, so that runs can be compared.
const TEST_SEED: u64 = 0;

/// Rendered rows and where they came from.
#[derive(Default)]
pub struct Corpus {
    /// For supervised stages.
    pub examples: Vec<Example>,
    /// For stages that compare two completions.
    pub pairs: Vec<PreferencePair>,
    /// For stages that learn from single judgements.
    pub judged: Vec<LabelledExample>,
    /// For stages that sample.
    pub prompts: Vec<Prompt>,
    /// Held out: problems to answer.
    pub test: Vec<Prompt>,
    /// Held out: pairs to tell apart.
    pub test_pairs: Vec<PreferencePair>,
    /// Names, sizes and hashes of everything used.
    pub sources: Vec<DataSource>,
}

/// What to render with.
#[derive(Clone, Copy)]
pub struct Language<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its chat template.
    pub template: Option<&'a ChatTemplate>,
    /// Its longest sequence.
    pub context: usize,
}

impl Corpus {
    /// Everything a run of `config` needs; rows that had to be left out are noted.
    pub fn for_training(config: &Config, language: Language<'_>, terminal: Terminal) -> Result<Self, Failure> {
        let mut corpus = Self::for_evaluation(config, language, terminal)?;
        let rows = train_rows(config, &mut corpus.sources)?;
        let samples = data::sample::parse(rows)?;
        for stage in config.stages() {
            let language = match stage.sampling() {
                Some(sampling) => {
                    language.with_room(&format!("{}.sampling", stage.method()), sampling.max_new_tokens)?
                }
                None => language,
            };
            let renderer = language.renderer(&config.rendering);
            match stage.rows() {
                Rows::Examples => {
                    let rendered = renderer.examples(&samples)?;
                    note_drops(&rendered.drops, "training examples", terminal);
                    corpus.examples = rendered.items;
                }
                Rows::Pairs => {
                    let rendered = renderer.preferences(&samples)?;
                    note_drops(&rendered.drops, "pairs", terminal);
                    corpus.pairs = rendered.items;
                }
                Rows::Judgements => {
                    let rendered = renderer.labelled(&samples)?;
                    note_drops(&rendered.drops, "judged completions", terminal);
                    corpus.judged = rendered.items;
                }
                Rows::Prompts => {
                    let rendered = renderer.prompts(&samples)?;
                    note_drops(&rendered.drops, "prompts", terminal);
                    corpus.prompts = rendered.items;
                }
            }
        }
        Ok(corpus)
    }

    /// The held-out problems only.
    pub fn for_evaluation(config: &Config, language: Language<'_>, terminal: Terminal) -> Result<Self, Failure> {
        let mut corpus = Self::default();
        if !config.has_evaluation() {
            return Ok(corpus);
        }
        let mut rows = Vec::new();
        for task in &config.tasks {
            let made = test_rows(task, config.compares())?;
            corpus.sources.push(source_of("test", &task_name(task)?, &made));
            rows.extend(made);
        }
        if !config.data.test.is_empty() {
            let read = data::read(&config.data.test, &config.data.columns)?;
            corpus.sources.push(source_of("test", &config.data.test.join(", "), &read));
            rows.extend(read);
        }
        let samples = data::sample::parse(rows)?;
        if !config.rewards.is_empty() {
            let language = language.with_room("evaluation.sampling", config.evaluation.sampling.max_new_tokens)?;
            let rendered = language.renderer(&config.rendering).prompts(&samples)?;
            note_drops(&rendered.drops, "held-out problems", terminal);
            corpus.test = rendered.items;
        }
        // Held-out problems need not be pairs, as long as there is a reward to judge answers by.
        if config.preference.is_some() && (config.rewards.is_empty() || samples.iter().any(data::Sample::is_pair)) {
            let rendered = language.renderer(&config.rendering).preferences(&samples)?;
            note_drops(&rendered.drops, "held-out pairs", terminal);
            corpus.test_pairs = rendered.items;
        }
        Ok(corpus)
    }

    /// Rows to train on.
    pub fn train_rows(&self) -> usize {
        [self.examples.len(), self.pairs.len(), self.judged.len(), self.prompts.len()].into_iter().max().unwrap_or(0)
    }

    /// Held-out rows.
    pub fn test_rows(&self) -> usize {
        self.test.len().max(self.test_pairs.len())
    }
}

impl<'a> Language<'a> {
    /// For prompts that `table` answers with up to `max_new_tokens` tokens: what is left of the context for them.
    fn with_room(self, table: &str, max_new_tokens: usize) -> Result<Self, Failure> {
        match self.context.checked_sub(max_new_tokens) {
            None | Some(0) => {
                let failure = Failure::new(format!(
                    "`{table}.max_new_tokens`: {max_new_tokens} tokens leave no room for a prompt in the model's context of {}",
                    self.context
                ));
                Err(failure.hint(format!("lower it: `--set {table}.max_new_tokens={}`", self.context / 2)))
            }
            Some(context) => Ok(Self { context, ..self }),
        }
    }

    fn renderer(self, options: &'a RenderOptions) -> Renderer<'a> {
        Renderer::new(self.tokenizer, self.template, self.context, options)
    }
}

fn note_drops(drops: &data::Drops, what: &str, terminal: Terminal) {
    if !drops.is_empty() {
        terminal.note(format!("left out {} {what}: {drops}", drops.count()));
    }
}

fn train_rows(config: &Config, sources: &mut Vec<DataSource>) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    for options in config.tasks.iter().filter(|task| task.train_problems > 0) {
        let task = options.task.build()?;
        let problems = (0..u64::from(options.train_problems)).map(|i| task.generate(config.seed, Split::Train, i));
        let wrong = config.compares().then(|| Random::new(config.seed, Purpose::Mistake).step(Split::Train as u32));
        let made: Vec<Row> = problems
            .zip(1..)
            .map(|(problem, number)| row(options, problem.columns(), task.name(), number, wrong))
            .collect();
        sources.push(source_of("train", task.name(), &made));
        rows.extend(made);
    }
    if !config.data.train.is_empty() {
        let read = data::read(&config.data.train, &config.data.columns)?;
        sources.push(source_of("train", &config.data.train.join(", "), &read));
        rows.extend(read);
    }
    Ok(rows)
}

fn task_name(options: &TaskOptions) -> Result<String, Failure> {
    Ok(options.task.build()?.name().to_owned())
}

/// Candidates drawn for each problem before giving up on finding one that is new.
const CANDIDATES: u64 = 100;

/// Distinct held-out problems. A task with few of them gives as many as it has.
fn test_rows(options: &TaskOptions, pairs: bool) -> Result<Vec<Row>, Failure> {
    let task = options.task.build()?;
    let wanted = u64::from(options.test_problems);
    let mut seen = HashSet::new();
    let problems = (0..wanted * CANDIDATES).map(|i| task.generate(TEST_SEED, Split::Test, i));
    let distinct = problems.filter(|problem| seen.insert((problem.key.clone(), problem.question.clone())));
    let wrong = pairs.then(|| Random::new(TEST_SEED, Purpose::Mistake).step(Split::Test as u32));
    let rows: Vec<Row> = distinct
        .take(wanted as usize)
        .zip(1..)
        .map(|(problem, number)| row(options, problem.columns(), task.name(), number, wrong))
        .collect();
    if rows.len() as u64 != wanted {
        let failure =
            Failure::new(format!("task {} has only {} held-out problems, expected {wanted}", task.name(), rows.len()));
        return Err(failure.hint("widen the ranges of the task, or lower its `test_problems`"));
    }
    Ok(rows)
}

/// A problem as a row with the completion that supervised stages learn; or, where there are draws for wrong answers, with a
/// chosen and a rejected one.
fn row(options: &TaskOptions, mut columns: envs::Columns, task: &str, number: u64, wrong: Option<Random>) -> Row {
    let answer = columns.get("answer").and_then(Value::as_str).unwrap_or_default().to_owned();
    let said = |text: String| json!([{"role": "assistant", "content": text}]);
    let completion = said(options.completion.replace("{answer}", &answer));
    match wrong {
        None => {
            columns.insert("completion".into(), completion);
        }
        Some(random) => {
            let wrong = near_miss(&answer, random.prompt(number as u32));
            let rejected = options.rejected.replace("{wrong}", &wrong).replace("{answer}", &answer);
            columns.insert("chosen".into(), completion);
            columns.insert("rejected".into(), said(rejected));
        }
    }
    Row { source: Source::new(format!("task {task}"), number), columns }
}

fn source_of(part: &str, name: &str, rows: &[Row]) -> DataSource {
    let mut text = String::new();
    for row in rows {
        text += &Value::Object(row.columns.clone()).to_string();
        text.push('\n');
    }
    DataSource { name: format!("{part}: {name}"), rows: rows.len(), sha256: files::sha256_of(text.as_bytes()) }
}
