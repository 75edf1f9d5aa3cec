//! The `posttrain` binary.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use posttrain::cli::Cli;
use posttrain::terminal::Terminal;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    kernels::keep_freed_memory();
    let cli = Cli::parse();
    let terminal = Terminal::new(cli.global.quiet, cli.global.no_color);
    match posttrain::command::run(&cli, terminal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // The exit code says that it failed, even if nobody listens.
            let _ = write!(std::io::stderr(), "{}", failure.render(terminal.color));
            ExitCode::from(failure.exit_code())
        }
    }
}
