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
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use metrics_exporter_prometheus::BuildError;
use thiserror::Error;
use underpass_config::ConfigErrors;
use underpass_hbone::HboneError;
use underpass_interception::InterceptionError;

use crate::demo::{self, DemoError};
use crate::error::chain;
use crate::process::instance::{InstanceError, Running};
use crate::process::take_over::TakeOverError;
use crate::rules::self_test::SelfTestError;

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

/// Why a command did not do what it was told.
#[derive(Debug, Error)]
pub(crate) enum CommandError {
    /// Exit code 2: the operator can mend it in the configuration.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// Exit code 2: the mistakes are printed already.
    #[error("mistakes in the configuration: {0}")]
    Mistakes(usize),
    #[error(transparent)]
    Interception(#[from] InterceptionError),
    #[error("there is no certificate to begin with (identity, trust)")]
    Identity(#[source] HboneError),
    #[error(
        "interception.dns: capture leads DNS queries to port {port}, but `underpass run` has no DNS proxy yet: they would \
         be refused. Set interception.dns: off; `underpass rules install` can lead them to a DNS proxy of your own"
    )]
    NoDnsProxy { port: u16 },
    #[error("{}{}", chain(error), listed(suspects))]
    SelfTest {
        error: SelfTestError,
        /// What may be the cause.
        suspects: Vec<String>,
    },
    #[error("cannot take over")]
    TakeOver(#[from] TakeOverError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(
        "the rules are those of a proxy that runs ({0}), which would put them back: stop it, or replace them all the same \
         with `--force`"
    )]
    KeptByProxy(Box<Running>),
    #[error(
        "interception.profile is none: there are no rules to look after; choose ambient, sidecar or osm (`--profile`)"
    )]
    NoRules,
    /// Exit code 3: the result, already printed, is that there is a difference.
    #[error("the rules that are installed are not those of these settings")]
    Difference,
    /// Exit code 3 as well.
    #[error("the rules are installed, but traffic passes them by: {0}")]
    Bypassed(String),
    #[error(transparent)]
    Hbone(#[from] HboneError),
    #[error(transparent)]
    Demo(#[from] DemoError),
    #[error("the process could not be set up")]
    Start(#[source] io::Error),
    #[error(
        "a thread cannot be started: is a limit of processes too low (`ulimit -u`, pids.max of the cgroup, TasksMax of the \
         service)?"
    )]
    Thread(#[source] io::Error),
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("metrics could not be set up")]
    Metrics(#[source] BuildError),
    #[error("there is no command {0:?}: `underpass --help` lists them")]
    NoSuchCommand(String),
    #[error("the result could not be written")]
    Output(#[source] io::Error),
}

impl CommandError {
    /// What went wrong while something was started that needs a thread (EAGAIN: pthread_create(3)).
    pub(crate) fn start(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock => Self::Thread(error),
            _ => Self::Start(error),
        }
    }

    /// A self-test that could not be made.
    pub(crate) fn self_test(error: SelfTestError) -> Self {
        Self::SelfTest { error, suspects: Vec::new() }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_)
            | Self::Mistakes(_)
            | Self::NoDnsProxy { .. }
            | Self::NoRules
            | Self::NoSuchCommand(_) => ExitCode::from(2),
            Self::Difference | Self::Bypassed(_) => ExitCode::from(3),
            _ => ExitCode::FAILURE,
        }
    }
}

fn listed(suspects: &[String]) -> String {
    let suspects = suspects.iter().map(|suspect| format!("; found here: {suspect}"));
    suspects.collect()
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
