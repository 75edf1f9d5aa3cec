//! `posttrain play`: a person in the place of the model.

use std::io::BufRead;

use envs::environment::call::ToolCall;
use envs::environment::{EpisodeId, Trace};
use envs::tasks::Split;

use crate::cli::Play;
use crate::config::Config;
use crate::config::load::Layers;
use crate::failure::Failure;
use crate::terminal::{Terminal, print};

/// Runs the command.
pub fn run(arguments: &Play, terminal: Terminal) -> Result<(), Failure> {
    let layers = Layers { files: arguments.recipe.recipes.clone(), assignments: arguments.recipe.set.clone() };
    let config = Config::load(&layers)?;
    let Some(options) = &config.environment else {
        let failure = Failure::new("the recipe has no environment to play: expected `[environment]`");
        return Err(failure.hint("recipes/agent.toml has one"));
    };
    let mut environment = options.environment.build()?;
    let split = if arguments.test { Split::Test } else { Split::Train };
    terminal.note("one line a turn; a tool is called as `NAME ARGUMENT`; Ctrl-D ends");
    let mut input = std::io::stdin().lock();
    for index in arguments.episode.. {
        let problem = environment.reset(EpisodeId { seed: config.seed, split, index });
        if let Some(system) = &problem.system {
            terminal.note(system);
        }
        print(format!("[episode {index}]\n{}\n", problem.question))?;
        if arguments.solve {
            for turn in environment.demonstration() {
                let transition = environment.step(&turn);
                print(format!("> {turn}\n{}\n", transition.observations.join("\n")))?;
            }
            return Ok(());
        }
        let mut trace = Trace::default();
        while !trace.done {
            let mut line = String::new();
            let read = input.read_line(&mut line);
            if read.map_err(|error| Failure::new(format!("cannot read standard input: {error}")))? == 0 {
                return Ok(());
            }
            let transition = environment.step(&turn(line.trim(), options.environment.name()));
            trace.push(&transition);
            print(format!(
                "{}\n[reward {:.3}, {}]\n",
                transition.observations.join("\n"),
                transition.reward,
                transition.status.name()
            ))?;
        }
        let score = trace.score();
        print(format!("[{} after {} turns, {:.3} in all]\n\n", score.status.name(), trace.turns.len(), score.value))?;
    }
    Ok(())
}

/// What a line means as the turn of a model: in an environment with tools, `search WORDS` and `calculator EXPRESSION` are
/// calls.
fn turn(line: &str, environment: &str) -> String {
    let argument = |name: &str| if name == "search" { "query" } else { "expression" };
    match line.split_once(' ') {
        Some((name @ ("search" | "calculator"), rest)) if environment == "tools" => {
            ToolCall::new(name, argument(name), rest).render()
        }
        _ => line.to_owned(),
    }
}
