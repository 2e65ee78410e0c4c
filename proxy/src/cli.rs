//! Defines and runs the commands of the command line.
//!
//! Results go to standard output, errors to standard error. Exit codes: 0 success, 1 failure, 2
//! invalid command line or configuration, 3 `rules verify` found a difference or a bypass, or
//! `status` a problem.

mod admin;
mod admin_client;
mod ca;
mod cni;
mod config;
mod connections;
mod doctor;
mod layout;
mod man;
mod node;
mod proxy_process;
mod rules;
mod run;
mod status;
mod style;
mod verbosity;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use underpass_config::Hint as _;
use underpass_interception::raise_capabilities;

use self::style::{Colour, Style};
use crate::broker::child;
use crate::demo;
use crate::error::chain;
use crate::process::command_error::CommandError;
use crate::version::{LONG_VERSION, VERSION};

/// Transparent zero-trust networking below the application.
#[derive(Debug, Parser)]
#[command(name = "underpass", version = VERSION, long_version = LONG_VERSION, arg_required_else_help = true)]
#[command(
    after_help = "Begin with:\n  underpass demo\n\nExit codes: 0 success, 1 failure, 2 invalid command line or configuration, 3 `rules verify` found a difference or a bypass, or `status` a problem."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a demonstration: pods in new namespaces with real HTTP through the tunnel. Needs no root
    Demo(demo::Arguments),
    /// Run a proxy for the current network namespace (a sidecar container, a VM)
    Run(run::Arguments),
    /// Run a proxy for every pod of a node; istio-cni, a CNI plugin or a folder reports the pods
    Node(node::Arguments),
    /// Serve pods without privileges: the broker of `underpass node` or `underpass run` starts this
    /// command
    #[command(name = child::COMMAND, hide = true)]
    ProxyProcess(proxy_process::Arguments),
    /// Act as the CNI plugin that container runtimes call, or install it
    Cni(cni::Arguments),
    /// Manage interception rules in the current network namespace
    #[command(subcommand)]
    Rules(rules::Command),
    /// Run a small certificate authority: files, revocation lists, and Istio's CA protocol
    #[command(subcommand)]
    Ca(ca::Command),
    /// Show what a running proxy does, and its problems: exit code 0 if it is healthy, otherwise 3
    #[command(
        after_help = "Example:\n  underpass status\n  underpass status --pod shop/web-1 --watch\n\nExit codes: 0 healthy, 3 problems, which are printed, 1 no proxy answers."
    )]
    Status(status::Arguments),
    /// List open and recent connections of a running proxy
    #[command(
        after_help = "Example:\n  underpass connections --verdict denied --since 5m\n  underpass connections --to shop/api --follow"
    )]
    Connections(connections::Arguments),
    /// Read and change the state of a running proxy
    #[command(subcommand)]
    Admin(admin::Command),
    /// Check or show settings without starting a proxy
    #[command(subcommand)]
    Config(config::Command),
    /// Check the host, the settings, certificates and reachability; print each finding with its
    /// remedy
    Doctor(doctor::Arguments),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example:\n  underpass completions bash > /etc/bash_completion.d/underpass"
    )]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page of a command, or write the pages of all commands
    Man(man::Arguments),
}

/// Runs the command of the command line.
pub fn main() -> ExitCode {
    // After a failure an operation that needs a capability reports that.
    raise_capabilities().ok();
    let arguments = cni::command_line(std::env::args_os());
    // Building the definitions of all commands would take a sixth of a call of the plugin.
    let outcome = if cni::is_call(&arguments) { cni::call() } else { run_command(arguments) };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let style = Style::of_stderr();
            let [word, advice] = [(Colour::Red, "error:"), (Colour::Bold, "hint:")]
                .map(|(colour, text)| style.paint(colour, text));
            // Ignored if standard error is closed; the exit code still reports the failure.
            writeln!(io::stderr(), "{word} {}", chain(&error)).ok();
            if let Some(hint) = error.hint() {
                writeln!(io::stderr(), "{advice} {hint}").ok();
            }
            error.exit_code()
        }
    }
}

fn run_command(arguments: Vec<OsString>) -> Result<(), CommandError> {
    match Cli::parse_from(arguments).command {
        Command::Demo(arguments) => demo::run(&arguments).map_err(CommandError::from),
        Command::Run(arguments) => run::run(arguments),
        Command::Node(arguments) => node::run(arguments),
        Command::ProxyProcess(arguments) => proxy_process::run(&arguments),
        Command::Cni(arguments) => cni::run(arguments),
        Command::Rules(command) => rules::run(command),
        Command::Ca(command) => ca::run(command),
        Command::Status(arguments) => status::run(&arguments),
        Command::Connections(arguments) => connections::run(arguments),
        Command::Admin(command) => admin::run(command),
        Command::Config(command) => config::run(command),
        Command::Doctor(arguments) => doctor::run(arguments),
        Command::Completions { shell } => completions(shell),
        Command::Man(arguments) => man::run(&arguments),
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

/// Creates a runtime on the calling thread.
pub(crate) fn single_threaded_runtime() -> Result<tokio::runtime::Runtime, CommandError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CommandError::Start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_definition_is_valid() {
        Cli::command().debug_assert();
    }
}
