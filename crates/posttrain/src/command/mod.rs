//! One file a verb.

pub mod bench;
pub mod calibration;
pub mod config;
pub mod data;
pub mod doctor;
pub mod eval;
pub mod frontier;
pub mod generate;
pub mod merge;
pub mod methods;
pub mod mix;
pub mod models;
pub mod personalized;
pub mod play;
pub mod references;
pub mod reproduce;
pub mod reward;
pub mod systems;
pub mod train;
pub mod unlearning;

use crate::cli::{Cli, Command, DataCommand, EvalCommand, MixCommand, RewardCommand, SystemsCommand};
use crate::failure::Failure;
use crate::opened::Opener;
use crate::terminal::Terminal;

/// Does what the command line says.
pub fn run(cli: &Cli, terminal: Terminal) -> Result<(), Failure> {
    kernels::Isa::chosen().map_err(|reason| {
        let available = kernels::Isa::ALL.into_iter().filter(|isa| isa.available());
        let names: Vec<String> = available.map(|isa| isa.to_string()).collect();
        Failure::new(reason).hint(format!("this processor has {}; leave it unset for the best", names.join(", ")))
    })?;
    if let Some(threads) = cli.global.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global();
        pool.map_err(|error| Failure::new(format!("cannot start {threads} threads: {error}")))?;
    }
    let opener = Opener { terminal, offline: cli.global.offline };
    match &cli.command {
        Command::Train(arguments) => train::train(arguments, opener),
        Command::Resume(arguments) => train::resume(arguments, opener),
        Command::Generate(arguments) => generate::generate(arguments, opener),
        Command::Chat(arguments) => generate::chat(arguments, opener),
        Command::Play(arguments) => play::run(arguments, terminal),
        Command::Eval(arguments) => match &arguments.command {
            Some(EvalCommand::Calibration(arguments)) => calibration::run(arguments, opener),
            Some(EvalCommand::Unlearning(arguments)) => unlearning::run(arguments, opener),
            Some(EvalCommand::Personalized(arguments)) => personalized::run(arguments),
            None => eval::run(arguments, opener),
        },
        Command::Pull(arguments) => models::pull(arguments, opener),
        Command::Models => models::list(),
        Command::Merge(arguments) => merge::run(arguments, opener),
        Command::Frontier(arguments) => frontier::run(arguments, opener),
        Command::Mix { command: MixCommand::Weights(arguments) } => mix::run(arguments, opener),
        Command::Methods => methods::list(),
        Command::Explain(arguments) => methods::explain(&arguments.name, arguments.markdown),
        Command::Data { command: DataCommand::Validate(arguments) } => data::validate(arguments, opener),
        Command::Reward { command: RewardCommand::Lint(arguments) } => reward::lint(arguments, opener),
        Command::Reward { command: RewardCommand::References(arguments) } => references::run(arguments, opener),
        Command::Config { command } => config::run(command),
        Command::Systems(arguments) => match &arguments.command {
            Some(SystemsCommand::Data(arguments)) => systems::data(arguments, terminal),
            None => systems::list(arguments),
        },
        Command::Reproduce(arguments) => reproduce::run(arguments, terminal),
        Command::Doctor => doctor::run(),
        Command::Bench(arguments) => bench::run(arguments, opener),
    }
}
