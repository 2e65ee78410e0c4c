//! `underpass node`.

use super::run::{SettingsArguments, on_control_thread};
use crate::process::app::Start;
use crate::process::command_error::CommandError;
use crate::process::daemon;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: serve the pods that files in a folder name\n  underpass node --config node.yaml\n\nnode.yaml:\n  node: {pods: {directory: /run/underpass/pods}}\n  mesh: {file: /etc/underpass/mesh.yaml}\n  identity: {local_ca: /etc/underpass/ca}\n\nReplace the running daemon without failing a connection:\n  underpass node --config node.yaml --take-over"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: SettingsArguments,
    /// Stop when standard input ends, so that the process does not outlive its parent
    #[arg(long)]
    until_eof: bool,
    /// Take over the pods of the running daemon without a failed connection; start normally if none
    /// runs
    #[arg(long)]
    take_over: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<(), CommandError> {
    let sources = arguments.settings.sources();
    let settings = sources.load()?;
    if settings.node.pods.is_none() {
        return Err(CommandError::NoPodSource);
    }
    let (logging, warnings) = (settings.logging.clone(), sources.warnings());
    let start = Start { until_eof: arguments.until_eof, take_over: arguments.take_over };
    on_control_thread(&logging, &warnings, daemon::run(settings, sources, start))
}
