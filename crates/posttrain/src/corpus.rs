//! What a recipe trains on and measures with: rows of tasks and files, rendered for a model.

use std::collections::HashSet;

use base::{Purpose, Random, files};
use data::{
    Example, LabelledExample, PreferencePair, Prompt, RenderOptions, Renderer, Row, Sample, Source, StepwiseExample,
};
use envs::environment::{self, EpisodeId};
use envs::tasks::{Split, near_miss};
use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;
use serde_json::{Value, json};
use train::methods::reward_model::{RewardLoss, RewardRows};
use train::run::DataSource;
use train::verdicts::Held;

use crate::config::environment::EnvironmentOptions;
use crate::config::{Config, Rows, Stage, TaskOptions};
use crate::failure::Failure;
use crate::terminal::Terminal;

/// Held-out problems are the same whatever the seed of the run, so that runs can be compared.
const TEST_SEED: u64 = 0;

/// Rendered rows and where they came from.
#[derive(Default)]
pub struct Corpus {
    /// For supervised stages.
    pub examples: Vec<Example>,
    /// To be unlearnt.
    pub forget: Vec<Example>,
    /// For stages that compare two completions.
    pub pairs: Vec<PreferencePair>,
    /// For stages that learn from single judgements.
    pub judged: Vec<LabelledExample>,
    /// For stages that sample.
    pub prompts: Vec<Prompt>,
    /// The same with a hint, for stages that try again with one.
    pub hints: Vec<Prompt>,
    /// For reward models.
    pub rewarded: RewardRows,
    /// For process reward models.
    pub steps: Vec<StepwiseExample>,
    /// Held out: problems to answer.
    pub test: Vec<Prompt>,
    /// Held out: pairs to tell apart.
    pub test_pairs: Vec<PreferencePair>,
    /// Held out: rows to score.
    pub held: Option<Held>,
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
        let room = |stage: &Stage<'_>| match stage.sampling() {
            Some(sampling) => {
                language.with_room(&format!("{}.sampling.max_new_tokens", stage.method()), sampling.max_new_tokens)
            }
            None => Ok(language),
        };
        // Stages that sample share their prompts, which must leave room for the longest answers.
        let rooms = config.stages().iter().map(room).collect::<Result<Vec<_>, Failure>>()?;
        let shared = rooms.into_iter().min_by_key(|language| language.context).unwrap_or(language);
        let mut rendered = Vec::new();
        for stage in config.stages() {
            for rows in stage.rows() {
                if rendered.contains(&rows) {
                    continue;
                }
                rendered.push(rows);
                let language = match rows {
                    Rows::Prompts => shared,
                    Rows::Hints(_) => room(&stage)?,
                    _ => language,
                };
                let renderer = language.renderer(&config.rendering);
                match rows {
                    Rows::Examples => {
                        corpus.examples = kept(renderer.examples(&samples)?, "training examples", terminal);
                    }
                    Rows::Pairs => {
                        corpus.pairs = kept(renderer.preferences(&samples)?, "pairs", terminal);
                    }
                    Rows::Rankings => {
                        corpus.pairs = kept(renderer.rankings(&samples)?, "rankings", terminal);
                    }
                    Rows::Hints(hint) => {
                        corpus.hints =
                            kept(renderer.prompts_with_hint(&samples, hint)?, "prompts with a hint", terminal);
                    }
                    Rows::Judgements => {
                        corpus.judged = kept(renderer.labelled(&samples)?, "judged completions", terminal);
                    }
                    Rows::Prompts => {
                        corpus.prompts = kept(renderer.prompts(&samples)?, "prompts", terminal);
                    }
                    Rows::Forgotten => {
                        let read = data::read(&config.data.forget, &config.data.columns)?;
                        corpus.sources.push(source_of("forget", &config.data.forget.join(", "), &read));
                        corpus.forget =
                            kept(renderer.examples(&data::sample::parse(read)?)?, "rows to forget", terminal);
                    }
                    Rows::Rewarded(loss) => {
                        corpus.rewarded = rewarded(loss, &renderer, &samples, "training rows", terminal)?;
                    }
                    Rows::Steps(separator) => {
                        corpus.steps = steps(separator, &renderer, &samples, "training rows", terminal)?;
                    }
                }
            }
        }
        Ok(corpus)
    }

    /// Rows to train on, whatever the stage.
    pub fn train_rows(&self) -> usize {
        let rows = [
            self.examples.len(),
            self.pairs.len(),
            self.judged.len(),
            self.prompts.len(),
            self.forget.len(),
            self.rewarded.len(),
            self.steps.len(),
        ];
        rows.into_iter().max().unwrap_or(0)
    }

    /// Rows held out.
    pub fn test_rows(&self) -> usize {
        self.test.len().max(self.test_pairs.len()).max(self.held.as_ref().map_or(0, Held::len))
    }

    /// The held-out problems only.
    pub fn for_evaluation(config: &Config, language: Language<'_>, terminal: Terminal) -> Result<Self, Failure> {
        let mut corpus = Self::default();
        if !config.has_evaluation() {
            return Ok(corpus);
        }
        if let Some(scoring) = config.stages().into_iter().find(|stage| stage.is_scoring()) {
            let rows = data::read(&config.data.test, &config.data.columns)?;
            corpus.sources.push(source_of("test", &config.data.test.join(", "), &rows));
            let samples = data::sample::parse(rows)?;
            let renderer = language.renderer(&config.rendering);
            for rows in scoring.rows() {
                match rows {
                    Rows::Rewarded(loss) => {
                        let rows = rewarded(loss, &renderer, &samples, "held-out rows", terminal)?;
                        corpus.held = Some(Held::Whole(rows, loss));
                    }
                    Rows::Steps(separator) => {
                        let rows = steps(separator, &renderer, &samples, "held-out rows", terminal)?;
                        corpus.held = Some(Held::Steps(rows));
                    }
                    Rows::Examples
                    | Rows::Pairs
                    | Rows::Rankings
                    | Rows::Judgements
                    | Rows::Prompts
                    | Rows::Hints(_)
                    | Rows::Forgotten => {}
                }
            }
            return Ok(corpus);
        }
        let mut rows = Vec::new();
        for task in &config.tasks {
            let made = test_rows(task, config.compares())?;
            corpus.sources.push(source_of("test", &task_name(task)?, &made));
            rows.extend(made);
        }
        if let Some(options) = &config.environment {
            let made = test_episodes(options)?;
            corpus.sources.push(source_of("test", options.environment.name(), &made));
            rows.extend(made);
        }
        if !config.data.test.is_empty() {
            let read = data::read(&config.data.test, &config.data.columns)?;
            corpus.sources.push(source_of("test", &config.data.test.join(", "), &read));
            rows.extend(read);
        }
        let samples = data::sample::parse(rows)?;
        if !config.rewards.is_empty() || config.environment.is_some() {
            let mut language =
                language.with_room("evaluation.sampling.max_new_tokens", config.evaluation.sampling.max_new_tokens)?;
            if let Some(test_time) = &config.test_time {
                // A step may begin just before the answer is as long as it may be.
                let longest = test_time.sampling.max_new_tokens + test_time.max_step_tokens;
                language = language.with_room("test_time.sampling.max_new_tokens", longest)?;
            }
            corpus.test = kept(language.renderer(&config.rendering).prompts(&samples)?, "held-out problems", terminal);
        }
        // Held-out problems need not be pairs, as long as there is a reward to judge answers by.
        if config.preference.is_some() && (config.rewards.is_empty() || samples.iter().any(Sample::is_pair)) {
            corpus.test_pairs =
                kept(language.renderer(&config.rendering).preferences(&samples)?, "held-out pairs", terminal);
        }
        Ok(corpus)
    }
}

impl<'a> Language<'a> {
    /// For prompts that are answered with up to `max_new_tokens` tokens, as `option` says (a dotted key, or a flag): what is left of
    /// the context for them.
    pub fn with_room(self, option: &str, max_new_tokens: usize) -> Result<Self, Failure> {
        match self.context.checked_sub(max_new_tokens) {
            None | Some(0) => {
                let failure = Failure::new(format!(
                    "`{option}`: {max_new_tokens} tokens leave no room for a prompt in the model's context of {}",
                    self.context
                ));
                let enough = self.context / 2;
                Err(failure.hint(match option.starts_with("--") {
                    true => format!("lower it: `{option} {enough}`"),
                    false => format!("lower it: `--set {option}={enough}`"),
                }))
            }
            Some(context) => Ok(Self { context, ..self }),
        }
    }

    fn renderer(self, options: &'a RenderOptions) -> Renderer<'a> {
        Renderer::new(self.tokenizer, self.template, self.context, options)
    }
}

/// Renders rows for a reward model with this loss.
fn rewarded(
    loss: RewardLoss,
    renderer: &Renderer<'_>,
    samples: &[Sample],
    what: &str,
    terminal: Terminal,
) -> Result<RewardRows, Failure> {
    match loss {
        RewardLoss::BradleyTerry => Ok(RewardRows::Pairs(kept(renderer.preferences(samples)?, what, terminal))),
        RewardLoss::Bce | RewardLoss::Mse => Ok(RewardRows::Scored(kept(renderer.scored(samples)?, what, terminal))),
    }
}

/// Renders rows for a process reward model that reads this separator after each step.
fn steps(
    separator: &str,
    renderer: &Renderer<'_>,
    samples: &[Sample],
    what: &str,
    terminal: Terminal,
) -> Result<Vec<StepwiseExample>, Failure> {
    Ok(kept(renderer.stepwise(samples, separator)?, what, terminal))
}

/// What was rendered; says how many rows were left out, and why.
fn kept<T>(rendered: data::Rendered<T>, what: &str, terminal: Terminal) -> Vec<T> {
    if !rendered.drops.is_empty() {
        terminal.note(format!("left out {} {what}: {}", rendered.drops.count(), rendered.drops));
    }
    rendered.items
}

/// Everything a recipe trains on and holds out, with an error for each row that cannot be read.
pub fn rows_to_audit(config: &Config) -> Result<data::audit::Rows, Failure> {
    let read = |files: &[String]| match files.is_empty() {
        true => Ok(Vec::new()),
        false => data::read::read_each(files, &config.data.columns),
    };
    let (train, forget) = (read(&config.data.train)?, read(&config.data.forget)?);
    let mut rows = data::audit::Rows { train, forget, ..Default::default() };
    for task in &config.tasks {
        rows.generated.extend(made_rows(task, config.seed, config.compares())?);
        rows.test.extend(test_rows(task, config.compares())?.into_iter().map(Ok));
    }
    rows.test.extend(read(&config.data.test)?);
    Ok(rows)
}

/// Rows to train on, as prompts with the columns their rewards read.
pub fn prompts(config: &Config, language: Language<'_>, terminal: Terminal) -> Result<Vec<Prompt>, Failure> {
    let samples = data::sample::parse(train_rows(config, &mut Vec::new())?)?;
    Ok(kept(language.renderer(&config.rendering).prompts(&samples)?, "prompts", terminal))
}

/// At most so many of the prompts, taken evenly.
pub fn evenly(prompts: Vec<Prompt>, count: usize) -> Vec<Prompt> {
    let all = prompts.len();
    let count = count.min(all);
    let mut places = (0..count).map(|index| index * all / count).peekable();
    let chosen = prompts.into_iter().enumerate().filter(|(place, _)| places.next_if_eq(place).is_some());
    chosen.map(|(_, prompt)| prompt).collect()
}

/// The training problems of a task.
fn made_rows(options: &TaskOptions, seed: u64, pairs: bool) -> Result<Vec<Row>, Failure> {
    let task = options.task.build()?;
    let problems = (0..u64::from(options.train_problems)).map(|i| task.generate(seed, Split::Train, i));
    let wrong = pairs.then(|| Random::new(seed, Purpose::Mistake).step(Split::Train as u32));
    let made = problems.zip(1..);
    Ok(made.map(|(problem, number)| row(options, problem.columns(), task.name(), number, wrong)).collect())
}

fn train_rows(config: &Config, sources: &mut Vec<DataSource>) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    for options in config.tasks.iter().filter(|task| task.train_problems > 0) {
        let made = made_rows(options, config.seed, config.compares())?;
        sources.push(source_of("train", &task_name(options)?, &made));
        rows.extend(made);
    }
    if let Some(options) = &config.environment {
        let name = options.environment.name();
        let mut world = options.environment.build()?;
        let learnt = config.stages().iter().any(|stage| stage.rows().contains(&Rows::Examples));
        let made: Vec<Row> = (0..u64::from(options.train_episodes))
            .map(|index| {
                let episode = EpisodeId { seed: config.seed, split: Split::Train, index };
                let mut columns = environment::row(&mut *world, episode);
                if learnt {
                    columns.insert("completion".into(), environment::demonstration(&mut *world, episode));
                }
                Row { source: Source::new(format!("environment {name}"), index + 1), columns }
            })
            .collect();
        sources.push(source_of("train", name, &made));
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

/// Distinct held-out episodes.
fn test_episodes(options: &EnvironmentOptions) -> Result<Vec<Row>, Failure> {
    let name = options.environment.name();
    let mut world = options.environment.build()?;
    let wanted = u64::from(options.test_episodes);
    let mut seen = HashSet::new();
    let mut rows = Vec::new();
    for index in 0..wanted * CANDIDATES {
        let episode = EpisodeId { seed: TEST_SEED, split: Split::Test, index };
        let problem = world.reset(episode);
        if seen.insert((problem.key, problem.question)) {
            let source = Source::new(format!("environment {name}"), index + 1);
            rows.push(Row { source, columns: environment::row(&mut *world, episode) });
        }
        if rows.len() as u64 == wanted {
            return Ok(rows);
        }
    }
    let failure =
        Failure::new(format!("environment {name} has only {} held-out episodes, expected {wanted}", rows.len()));
    Err(failure.hint("allow larger worlds, or lower `environment.test_episodes`"))
}

/// A problem as a row with the completion that supervised stages learn; or, where there are draws for wrong answers, with a
/// chosen and a rejected one.
fn row(options: &TaskOptions, mut columns: envs::Columns, task: &str, number: u64, wrong: Option<Random>) -> Row {
    let answer = columns.get("answer").and_then(Value::as_str).unwrap_or_default().to_owned();
    let said = |text: String| json!([{"role": "assistant", "content": text}]);
    let completion = said(options.completion.of(number).replace("{answer}", &answer));
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;
    use crate::config::tree::Node;

    /// A prompt of two hundred tokens fits answers of fifty and not of eighty, in a context of 256.
    #[test]
    fn prompts_leave_room_for_the_longest_answers_and_examples_need_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("rows.jsonl");
        let row = |prompt: &str| json!({"prompt": prompt, "completion": "b"}).to_string() + "\n";
        files::write(&file, (row("a") + &row(&"a".repeat(200))).as_bytes()).unwrap();
        let tokenizer = Tokenizer::bytes().unwrap();
        let language = Language { tokenizer: &tokenizer, template: None, context: 256 };
        let (terminal, file) = (Terminal::new(true, true), file.display());
        let sizes = |stages: &str| {
            let text = format!("{stages}\n[[rewards]]\ntype = 'number'\n[data]\ntrain = ['{file}']\n");
            let config = Config::from_tree(Node::from_text("recipe.toml", text).unwrap()).unwrap();
            let corpus = Corpus::for_training(&config, language, terminal).unwrap();
            (corpus.prompts.len(), corpus.examples.len())
        };
        let (short, long) = ("[grpo]\nsampling.max_new_tokens = 50\n", "[star]\nsampling.max_new_tokens = 80\n");
        assert_eq!(sizes(short), (2, 0));
        assert_eq!(sizes(long), (1, 0));
        assert_eq!(sizes(&[long, short].concat()), (1, 0), "both stages are given the same prompts");
        let mixed = "[gkd]\nsampling.max_new_tokens = 80\nteachers = [{ model = 'tiny' }]\n";
        assert_eq!(sizes(&["[sft]\n", mixed].concat()), (1, 2), "what is imitated is not answered");
    }
}
