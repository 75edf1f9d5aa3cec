//! `posttrain reward lint`: what do worthless answers earn?

use data::Prompt;
use envs::lint::{Layout, Paid, Row, TOLERATED};
use envs::{ModelRewardOptions, RewardConfig, Weighted};
use serde_json::{Value, json};

use crate::cli::Lint;
use crate::config::Config;
use crate::config::load::Layers;
use crate::corpus::{self, Language};
use crate::failure::Failure;
use crate::judges;
use crate::opened::Opener;
use crate::terminal::print;

/// Runs the command.
pub fn lint(arguments: &Lint, opener: Opener) -> Result<(), Failure> {
    let layers = Layers { files: arguments.recipe.recipes.clone(), assignments: arguments.recipe.set.clone() };
    let config = Config::load(&layers)?;
    if config.rewards.is_empty() {
        let failure = Failure::new("the recipe has no reward to pay with: expected at least one `[[rewards]]`");
        return Err(failure.hint("add for example\n\n[[rewards]]\ntype = \"number\""));
    }
    let model = opener.shape(&config.model.name)?;
    let language = Language {
        tokenizer: &model.tokenizer,
        template: model.chat_template.as_ref(),
        context: model.config.max_positions,
    };
    let prompts = corpus::prompts(&config, language, opener.terminal)?;
    let layout = Layout::of(&config.rewards);
    let wanted = (arguments.rows as usize).min(prompts.len());
    let rows: Vec<Row> =
        (0..wanted).map(|index| row(&prompts[index * prompts.len() / wanted], &config, &layout)).collect();
    let as_they_are: Vec<RewardConfig> = config.rewards.iter().map(RewardConfig::unshaped).collect();
    let mut load = |name: &str, options: &ModelRewardOptions| judges::load(name, options, &config, opener);
    let reward = Weighted::from_configs_with(&as_they_are, &mut load)?;
    // A reward sees what the sampler would hand it: the tokens of the text.
    let tokens = |text: &str| model.tokenizer.encode(text).unwrap_or_default();
    let table = envs::lint::lint(&reward, &rows, &layout, &tokens);
    let names: Vec<&str> = reward.names().collect();
    print(if arguments.json { as_json(&table, rows.len()) } else { as_text(&table, rows.len(), &names) })?;
    let flawed = table.iter().filter(|paid| paid.flaws.iter().any(envs::lint::Flaw::is_error)).count();
    match flawed {
        0 => Ok(()),
        _ => {
            let failure =
                Failure::new(format!("the reward can be exploited or fails: {flawed} of {} answers", table.len()));
            Err(failure.hint("docs/rewards.md says what each answer tries and what helps; `--json` prints the answers"))
        }
    }
}

/// A row with the answers that should be right: laid out as the rewards ask, as the row's completion has it, and bare.
fn row(prompt: &Prompt, config: &Config, layout: &Layout) -> Row {
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Array(messages) => messages.last()?.get("content")?.as_str().map(str::to_owned),
        _ => None,
    };
    let column = |name: &str| prompt.columns.get(name).and_then(text);
    let gold = config.rewards.iter().find_map(|reward| column(reward.kind.column()?)).or_else(|| column("answer"));
    let completion = column("completion");
    let gold = gold.or_else(|| completion.clone()).unwrap_or_default();
    let right = [Some(layout.put(&gold)), completion, Some(gold.clone())].into_iter().flatten().collect();
    Row { prompt: prompt.text.clone(), columns: prompt.columns.clone(), right, gold }
}

fn as_json(table: &[Paid], rows: usize) -> String {
    format!("{:#}\n", json!({ "rows": rows, "tolerated": TOLERATED, "answers": table }))
}

/// Width of the widest name of an answer.
const NAME: usize = 28;
/// Width of a number's column, at least.
const NUMBER: usize = 8;

fn as_text(table: &[Paid], rows: usize, rewards: &[&str]) -> String {
    let width = |name: &str| name.chars().count().max(NUMBER) + 2;
    let mut text = format!("mean over {rows} rows\n\n{:NAME$}{:>NUMBER$}", "answer", "reward");
    for name in rewards {
        text += &format!("{name:>0$}", width(name));
    }
    text.push('\n');
    let value = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.3}"));
    for Paid { answer, reward, parts, flaws, .. } in table {
        let mut line = format!("{answer:NAME$}{:>NUMBER$}", value(*reward));
        for name in rewards {
            let part = parts.iter().find(|(part, _)| part == name).map(|(_, value)| *value);
            line += &format!("{:>1$}", value(part), width(name));
        }
        let said: Vec<String> =
            flaws.iter().map(|flaw| format!("{} {flaw}", if flaw.is_error() { "✗" } else { "!" })).collect();
        if !said.is_empty() {
            line += &format!("  {}", said.join(", "));
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}
