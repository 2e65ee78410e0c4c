//! `underpass cni`: the CNI plugin, and its installation.
//!
//! The installed binary is named `underpass-cni`. Under this name it acts as `underpass cni`,
//! because runtimes call plugins without arguments.

mod config;
mod daemon;
mod environment;
mod plugin;
mod plugin_error;
mod previous_result;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use self::environment::Environment;
use super::{print, single_threaded_runtime};
use crate::error::chain;
use crate::pods::cni::install::platform::Platform;
use crate::pods::cni::install::{Change, DEFAULT_SOCKET, Installation, PLUGIN_NAME};
use crate::pods::cni::namespace_file;
use crate::process::command_error::CommandError;

const EXAMPLE: &str = "Examples:
  underpass cni install --platform k3s --dry-run
  underpass cni install
  underpass cni uninstall

Without a command, `underpass cni` acts as the plugin, as container runtimes call it: the variables
CNI_COMMAND, CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME and CNI_ARGS define the call, the configuration
comes from standard input, and the result goes to standard output.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Copy this binary to the runtime's plugins, and add it to the network configuration
    #[command(
        after_help = "Example:\n  underpass cni install --platform microk8s --socket /run/underpass/cni.sock"
    )]
    Install {
        #[command(flatten)]
        options: InstallOptions,
        /// Add a separate drop-in file instead of an entry in the list. The runtime must read it,
        /// or pods bypass the mesh: this requires libcni 1.3 or later (containerd 2.1)
        #[arg(long)]
        drop_in: bool,
    },
    /// Remove the plugin from the network configuration, then remove its binary
    #[command(after_help = "Example:\n  underpass cni uninstall --platform k3s")]
    Uninstall {
        #[command(flatten)]
        options: InstallOptions,
    },
}

/// Options of installing and removing the plugin.
#[derive(Debug, clap::Args)]
struct InstallOptions {
    /// The platform, which determines the default folders
    #[arg(long, value_enum, default_value_t = Platform::Kubeadm)]
    platform: Platform,
    /// The folder of the network configurations
    #[arg(long, value_name = "DIR")]
    net_dir: Option<PathBuf>,
    /// The folder of the plugins
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// The daemon's socket, as in node.pods.cni
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Print the changes instead of making them
    #[arg(long)]
    dry_run: bool,
}

impl InstallOptions {
    fn installation(&self, drop_in: bool) -> Installation {
        let folder = |given: &Option<PathBuf>, default: &Path| {
            given.clone().unwrap_or_else(|| default.to_owned())
        };
        Installation {
            network_folder: folder(&self.net_dir, self.platform.network_folder()),
            program_folder: folder(&self.bin_dir, self.platform.program_folder()),
            socket: self.socket.clone(),
            drop_in,
        }
    }
}

/// The command line. If the program is called by the plugin's name, inserts the command `cni`.
pub(super) fn command_line(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.collect();
    let name = arguments.first().and_then(|program| Path::new(program).file_name());
    if name.is_some_and(|name| name == PLUGIN_NAME) {
        arguments.insert(1, "cni".into());
    }
    arguments
}

/// Whether a command line of [`command_line`] is a call of a container runtime.
pub(super) fn is_call(command_line: &[OsString]) -> bool {
    matches!(command_line, [_, command] if command == "cni")
}

pub(super) fn run(arguments: Arguments) -> Result<(), CommandError> {
    match arguments.command {
        None => call(),
        Some(Command::Install { options, drop_in }) => {
            let changes = options.installation(drop_in).install()?;
            apply_or_print(&changes, options.dry_run, "the plugin is installed already")
        }
        Some(Command::Uninstall { options }) => {
            let changes = options.installation(false).uninstall()?;
            apply_or_print(&changes, options.dry_run, "there is nothing to remove")
        }
    }
}

/// Performs one call of a container runtime.
pub(super) fn call() -> Result<(), CommandError> {
    let environment = Environment::of_process();
    let runtime = single_threaded_runtime()?;
    let outcome = runtime.block_on(plugin::call(&environment, io::stdin(), namespace_file::open));
    print(&outcome.text)?;
    outcome.error.map_or(Ok(()), |error| Err(CommandError::Plugin(chain(&error))))
}

/// Performs the changes in order, and prints each when it is done. With `dry_run` it only prints
/// them.
fn apply_or_print(changes: &[Change], dry_run: bool, if_empty: &str) -> Result<(), CommandError> {
    if changes.is_empty() {
        return print(&format!("{if_empty}\n"));
    }
    for change in changes {
        if dry_run {
            print(&format!("would {change:#}\n"))?;
        } else {
            change.apply()?;
            print(&format!("done: {change}\n"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_name_of_plugin_inserts_cni_command() {
        let line = |words: &[&str]| command_line(words.iter().map(OsString::from));
        assert_eq!(line(&["/opt/cni/bin/underpass-cni"]), ["/opt/cni/bin/underpass-cni", "cni"]);
        assert_eq!(line(&["underpass-cni", "install"]), ["underpass-cni", "cni", "install"]);
        assert_eq!(line(&["underpass", "run"]), ["underpass", "run"]);
        assert_eq!(line(&[]), [""; 0]);
        let is_call = |words: &[&str]| is_call(&line(words));
        assert!(is_call(&["underpass-cni"]) && is_call(&["underpass", "cni"]));
        assert!(!is_call(&["underpass-cni", "--help"]) && !is_call(&["underpass", "run"]));
    }
}
