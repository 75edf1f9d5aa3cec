//! The `posttrain` binary.

use std::process::ExitCode;

use clap::Parser;
use posttrain::cli::Cli;
use posttrain::terminal::Terminal;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Has the allocator keep what is freed. It would give memory back to the system that has been free for a second; but a training step
/// takes seconds, and its next sampling wants the same caches again, page by page, which is one thread's work.
#[allow(unsafe_code, reason = "the allocator's options can be set in no other way")]
fn keep_freed_memory() {
    /// `mi_option_purge_delay`, which the bindings leave out.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    const NEVER: std::ffi::c_long = -1;
    // SAFETY: it must not be called by several threads at once, and there is one so far.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, NEVER) }
}

fn main() -> ExitCode {
    keep_freed_memory();
    let cli = Cli::parse();
    let terminal = Terminal::new(cli.global.quiet, cli.global.no_color);
    match posttrain::command::run(&cli, terminal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprint!("{}", failure.render(terminal.color));
            ExitCode::from(failure.exit_code())
        }
    }
}
