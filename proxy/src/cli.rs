//! The command line: what can be typed, and what becomes of it.
//!
//! Results go to standard output, errors to standard error. Exit codes: 0 done, 1 it failed, 2 the command line or the
//! configuration is wrong, 3 `rules verify` found a difference or a bypass.

mod ca;
mod config;
mod man;
mod rules;
mod run;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::demo;
use crate::error::chain;
use crate::process::command_error::CommandError;

/// The version and the commit that it was built from.
pub(crate) const VERSION: &str = env!("UNDERPASS_VERSION");

/// Transparent zero-trust networking below the application.
#[derive(Debug, Parser)]
#[command(name = "underpass", version = VERSION, arg_required_else_help = true)]
#[command(
    after_help = "Begin with:\n  underpass demo\n\nExit codes: 0 done, 1 it failed, 2 the command line or the configuration is wrong, 3 `rules verify` found a difference or a bypass."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show it: two pods in namespaces of their own, real HTTP through the tunnel, and the proof. Needs no root
    Demo(demo::Arguments),
    /// Run a proxy for the network namespace it stands in (a sidecar container, a VM)
    Run(run::Arguments),
    /// Look after the rules that catch traffic, in the network namespace this stands in
    #[command(subcommand)]
    Rules(rules::Command),
    /// Keep a small certificate authority: files, revocation lists, and Istio's CA protocol
    #[command(subcommand)]
    Ca(ca::Command),
    /// Check or show settings without running anything
    #[command(subcommand)]
    Config(config::Command),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example:\n  underpass completions bash > /etc/bash_completion.d/underpass"
    )]
    Completions {
        /// For which shell
        shell: Shell,
    },
    /// Print the manual page of a command, or write those of all
    Man(man::Arguments),
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Demo(arguments) => demo::run(&arguments).map_err(CommandError::from),
        Command::Run(arguments) => run::run(arguments),
        Command::Rules(command) => rules::run(command),
        Command::Ca(command) => ca::run(command),
        Command::Config(command) => config::run(command),
        Command::Completions { shell } => completions(shell),
        Command::Man(arguments) => man::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With standard error closed there is nobody left to tell; the exit code still tells.
            writeln!(io::stderr(), "underpass: {}", chain(&error)).ok();
            error.exit_code()
        }
    }
}

fn completions(shell: Shell) -> Result<(), CommandError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "underpass", &mut script);
    io::stdout().write_all(&script).map_err(CommandError::Output)
}

/// Writes a result.
fn print(text: &str) -> Result<(), CommandError> {
    io::stdout().write_all(text.as_bytes()).map_err(CommandError::Output)
}

/// A runtime on the thread that uses it.
pub(crate) fn single_threaded_runtime() -> Result<tokio::runtime::Runtime, CommandError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CommandError::Start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
